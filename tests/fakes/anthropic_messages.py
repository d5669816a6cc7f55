"""Anthropic's Messages API: its events and errors, and its strictness about requests."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Final

from tests.fakes.script import Answer, Call, Failure
from tests.fakes.server import AbruptEnd, Exchange, FakeProvider, Json

NO_ATTESTATION: Final = "Anthropic has no verification that an API call could ask for"

FAILURES: Final[dict[Failure, tuple[int, str, str, str | None]]] = {
    "rate_limit": (
        429,
        "rate_limit_error",
        "This request would exceed your organization's rate limit of 50 requests per minute.",
        None,
    ),
    "overloaded": (529, "overloaded_error", "Overloaded", None),
    "server_error": (500, "api_error", "Internal server error", None),
    "quota": (
        400,
        "invalid_request_error",
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to purchase credits.",
        None,
    ),
    "usage_limit": (
        400,
        "invalid_request_error",
        "You have reached your specified API usage limits. You will regain access on 2030-01-01 at 00:00 UTC.",
        None,
    ),
    "auth": (401, "authentication_error", "invalid x-api-key", None),
    "permission": (403, "permission_error", "Your API key does not have permission to use the specified resource.", None),
    "not_found": (404, "not_found_error", "model: claude-none", None),
    "overflow": (400, "invalid_request_error", "prompt is too long: 210431 tokens > 200000 maximum", None),
    "tool_schema": (
        400,
        "invalid_request_error",
        "tools.0.custom.input_schema: JSON schema is invalid. It must match JSON Schema draft 2020-12.",
        None,
    ),
    "content_filter": (400, "invalid_request_error", "Output blocked by content filtering policy", None),
    "invalid_request": (400, "invalid_request_error", "metadata.user_id: Extra inputs are not permitted", None),
}  # fmt: skip
"""Status, type, message, error code. Not `attestation`: see `NO_ATTESTATION`."""

BAD_SIGNATURE: Final = "messages.1.content.0: Invalid `signature` in `thinking` block"
NO_THINKING: Final = (
    "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `tool_use`. When `thinking` is enabled, "
    "a final `assistant` message must start with a thinking block"
)

_MAX_BREAKPOINTS: Final = 4
_LEGAL_ID: Final = re.compile(r"[a-zA-Z0-9_-]+")


class FakeAnthropic(FakeProvider):
    provider_type = "anthropic"

    def __init__(self) -> None:
        super().__init__()
        self.refuse_thinking: str | None = None
        """With this message, requests that bring thinking blocks are refused."""
        self.models: list[Json] = [_model("claude-opus-5-5", "Claude Opus 5.5"), _model("claude-old", "Old", "retired")]

    async def handle(self, exchange: Exchange) -> None:
        match exchange.request.method, exchange.request.path:
            case "POST", "/v1/messages":
                await self._message(exchange)
            case "GET", "/v1/models":
                await self._list(exchange)
            case _:
                await exchange.json(_error("not_found_error", "Not Found"), status=404)

    async def _list(self, exchange: Exchange) -> None:
        """One model a page, to make a client turn pages."""
        after = re.search(r"after_id=([^&]+)", exchange.request.query)
        ids = [model["id"] for model in self.models]
        start = ids.index(after[1]) + 1 if after else 0
        page = self.models[start : start + 1]
        answer = self._answers.popleft() if self._answers else None
        if answer is not None and answer.failure is not None:
            await self._fail(exchange, answer)
            return
        await exchange.json(
            {
                "data": page,
                "has_more": start + 1 < len(ids),
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def _message(self, exchange: Exchange) -> None:
        body = exchange.request.body
        wrong = next(problems(body), None)
        if wrong is None and self.refuse_thinking and _has_thinking(body):
            wrong = self.refuse_thinking
        sent = exchange.request.headers
        if not (sent.get("x-api-key") or sent.get("authorization")) or not sent.get("anthropic-version"):
            await exchange.json(_error("authentication_error", "x-api-key header is required"), status=401)
        elif wrong is not None:
            await exchange.json(_error("invalid_request_error", wrong), status=400)
        else:
            answer = self.next_answer()
            if answer.failure is not None and answer.after is None:
                await self._fail(exchange, answer)
            else:
                await self._stream(exchange, answer, body)

    async def _fail(self, exchange: Exchange, answer: Answer) -> None:
        assert answer.failure is not None
        status, kind, message, code = FAILURES[answer.failure]
        headers = {"request-id": self.new_id("req_")}
        if answer.retry_after_seconds is not None:
            headers["retry-after"] = str(answer.retry_after_seconds)
        await exchange.json(_error(kind, message, code), status=status, headers=headers)

    async def _stream(self, exchange: Exchange, answer: Answer, body: Json) -> None:
        usage = _usage(answer)
        message_id = answer.response_id or self.new_id("msg_")
        async with exchange.stream({"request-id": self.new_id("req_")}):
            start: Json = {
                "id": message_id, "type": "message", "role": "assistant", "model": body["model"],
                "content": [], "stop_reason": None, "stop_sequence": None,
            }  # fmt: skip
            if usage:
                start["usage"] = {**usage, "output_tokens": 1}
            await _say(exchange, {"type": "message_start", "message": start})
            await _say(exchange, {"type": "ping"})
            sent = 0
            async for event, is_piece in self._events(answer):
                if is_piece and sent == answer.after and await _strike(exchange, answer):
                    return
                await _say(exchange, event)
                if is_piece:
                    sent += 1
                    if answer.piece_delay_seconds:
                        await exchange.pause(answer.piece_delay_seconds)
            if answer.after is not None and sent <= answer.after and await _strike(exchange, answer):
                return  # a place beyond the end is the end
            stop: Json = {
                "type": "message_delta",
                "delta": {"stop_reason": _stop_reason(answer), "stop_sequence": None},
            }
            if usage:
                stop["usage"] = usage
            await _say(exchange, stop)
            await _say(exchange, {"type": "message_stop"})

    async def _events(self, answer: Answer) -> AsyncIterator[tuple[Json, bool]]:
        """Each event between the start and the end of a message, and whether it is a piece of the script."""
        index = 0
        if answer.thinking:
            yield _start(index, {"type": "thinking", "thinking": "", "signature": ""}), False
            for piece in answer.thinking:
                yield _delta(index, {"type": "thinking_delta", "thinking": piece}), True
            yield _delta(index, {"type": "signature_delta", "signature": self.new_id("sig+/=")}), False
            yield _stop(index), False
            index += 1
        if answer.text or answer.refusal:
            yield _start(index, {"type": "text", "text": ""}), False
            for piece in (*answer.text, *answer.refusal):
                yield _delta(index, {"type": "text_delta", "text": piece}), True
            yield _stop(index), False
            index += 1
        for call in answer.calls:
            for event in self._call(index, call):
                yield event, False
            index += 1

    def _call(self, index: int, call: Call) -> Iterator[Json]:
        block = {"type": "tool_use", "id": call.id or self.new_id("toolu_"), "name": call.name, "input": {}}
        yield _start(index, block)
        half = len(call.arguments) // 2
        for piece in ("", call.arguments[:half], call.arguments[half:]):
            yield _delta(index, {"type": "input_json_delta", "partial_json": piece})
        yield _stop(index)


async def _strike(exchange: Exchange, answer: Answer) -> bool:
    """What happens at `after`; True when the stream is over."""
    if answer.failure is not None:
        _, kind, message, code = FAILURES[answer.failure]
        await _say(exchange, _error(kind, message, code))
        return True
    if answer.stall:
        await exchange.stall()
    if answer.cut == "abrupt":
        raise AbruptEnd
    return answer.cut is not None


async def _say(exchange: Exchange, event: Json) -> None:
    await exchange.event(event, event=event["type"])


def _error(kind: str, message: str, code: str | None = None) -> Json:
    error: Json = {"type": kind, "message": message}
    if code:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": "req_0000"}


def _start(index: int, block: Json) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _delta(index: int, delta: Json) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _stop(index: int) -> Json:
    return {"type": "content_block_stop", "index": index}


def _usage(answer: Answer) -> Json:
    if answer.usage is None:
        return {}
    return {
        "input_tokens": answer.usage.input,
        "cache_read_input_tokens": answer.usage.cache_read,
        "cache_creation_input_tokens": answer.usage.cache_write,
        "output_tokens": answer.usage.output,
    }


def _stop_reason(answer: Answer) -> str:
    if answer.finish:
        return answer.finish
    if answer.refusal:
        return "refusal"
    return "tool_use" if answer.calls else "end_turn"


def _model(model_id: str, name: str, lifecycle: str = "active") -> Json:
    return {
        "type": "model", "id": model_id, "display_name": name, "lifecycle": lifecycle,
        "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def _has_thinking(body: Json) -> bool:
    return any(
        block["type"] in ("thinking", "redacted_thinking") for turn in body["messages"] for block in turn["content"]
    )


def problems(body: Json) -> Iterator[str]:
    """What the API would refuse in a request, in its words as far as they matter."""
    if not isinstance(body.get("max_tokens"), int):
        yield "max_tokens: Field required"
    turns = body["messages"]
    if not turns or turns[0]["role"] != "user":
        yield "messages: first message must use the `user` role"
    if turns and turns[-1]["role"] != "user":
        yield "This model does not support assistant message prefill. The conversation must end with a user message."
    blocks = [*body.get("system", []), *(block for turn in turns for block in turn["content"])]
    if any(block["type"] == "text" and not block["text"].strip() for block in blocks):
        yield "messages: text content blocks must contain non-whitespace text"
    marked = [block for block in (*body.get("tools", []), *blocks) if "cache_control" in block]
    if len(marked) > _MAX_BREAKPOINTS:
        yield f"A maximum of {_MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {len(marked)}."
    if any(block.get("type") in ("thinking", "redacted_thinking") for block in marked):
        yield "messages: `cache_control` is not permitted on thinking blocks"
    if any(block["type"] == "tool_use" for block in blocks) and not body.get("tools"):
        yield "Requests which include `tool_use` or `tool_result` blocks must define tools"
    yield from _order_problems(turns)
    yield from _thinking_problems(body)


def _order_problems(turns: list[Json]) -> Iterator[str]:
    waiting: list[str] = []
    for number, turn in enumerate(turns):
        content = turn["content"]
        if not content:
            yield f"messages.{number}: all messages must have non-empty content"
            continue
        results = [block["tool_use_id"] for block in content if block["type"] == "tool_result"]
        if sorted(results) != sorted(waiting):
            yield f"messages.{number}: `tool_use` ids were found without `tool_result` blocks immediately after"
        if any(block["type"] != "tool_result" for block in content[: len(results)]):
            yield f"messages.{number}: `tool_result` blocks must come first"
        waiting = [block["id"] for block in content if block["type"] == "tool_use"]
        if any(not _LEGAL_ID.fullmatch(call_id) for call_id in waiting):
            yield f"messages.{number}: tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
        if turn["role"] == "assistant" and content[-1]["type"] in ("thinking", "redacted_thinking"):
            yield f"messages.{number}: The final block in an assistant message cannot be `thinking`."


def _thinking_problems(body: Json) -> Iterator[str]:
    thinking = body.get("thinking") or {}
    if thinking.get("type") == "enabled":
        if not 1024 <= thinking["budget_tokens"] < body["max_tokens"]:
            yield "`max_tokens` must be greater than `thinking.budget_tokens`"
        loop = [turn for turn in body["messages"] if turn["role"] == "assistant"]
        answered = any(block["type"] == "tool_result" for block in body["messages"][-1]["content"])
        if answered and len(loop) == 1 and loop[0]["content"][0]["type"] not in ("thinking", "redacted_thinking"):
            yield NO_THINKING
    if thinking.get("type") in ("enabled", "adaptive") and "temperature" in body:
        yield "`temperature` may only be set to 1 when thinking is enabled."
    if thinking.get("type") == "disabled" and _has_thinking(body):
        yield "When thinking is disabled, an `assistant` message in the final position cannot contain `thinking`."
