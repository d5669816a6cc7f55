"""Chat Completions chunks, as many servers write them, into stream events.

Liberal in what it takes: the format is OpenAI's, but its details differ from server to server. Tool calls come in pieces or
whole, with an index, with an id, with neither, or all with index 0; usage comes in a chunk of its own, in the last one, in
every one, or never; thinking comes in one of three places. Strict in one thing: without a finish reason there is no `Finished`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from activities.llm.failures import parse_arguments
from activities.llm.openai_chat_request import Dialect
from activities.llm.openai_errors import error_in
from domain.events import TokenUsage
from domain.model import (
    Alive,
    Began,
    Finished,
    FinishReason,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.token_estimate import prompt_tokens, text_tokens
from domain.tools import ToolCall

_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "recitation": "content_filter",
    "prohibited_content": "content_filter",
    "refusal": "refusal",
}
"""Every other reason is a stop."""

_THOUGHT_BEGINS: Final = "<thought>"
_THOUGHT_ENDS: Final = "</thought>"


class _Call(Struct):
    """A tool call as far as it has come."""

    index: int | None
    id: str = ""
    name: str = ""
    arguments: str = ""
    extra_content: dict[str, object] | None = None


class ChatStream:
    """Reads one answer. `read` each chunk, then `finish` once the stream has ended."""

    def __init__(self, request: ModelRequest, dialect: Dialect, dropped: list[str], key: str | None) -> None:
        self._request = request
        self._dialect = dialect
        self._dropped = dropped
        self._keys = [key] if key else []
        self._response_id: str | None = None
        self._finish_reason: str | None = None
        self._usage: Mapping[str, object] | None = None
        self._calls: list[_Call] = []
        self._refused = False
        self._in_thought = False
        self._written: list[str] = []
        self._reasoning_content: list[str] = []
        self._reasoning_details: list[dict[str, object]] = []
        self._extra_content: dict[str, object] | None = None

    def read(self, chunk: object) -> Iterator[StreamEvent]:
        """The events of one chunk, at least one. Raises `ModelError` for an error the server put into the stream."""
        self._raise_error_in(chunk)
        if not isinstance(chunk, dict):
            yield Alive()
            return
        if self._response_id is None and isinstance(chunk.get("id"), str) and chunk["id"]:
            self._response_id = chunk["id"]
            yield Began(response_id=chunk["id"])
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        said = False
        for event in self._read_choice(_first_choice(chunk)):
            said = True
            yield event
        if not said:
            yield Alive()

    def finish(self) -> Iterator[StreamEvent]:
        """The tool calls and the end; nothing when the server had not come to an end."""
        if self._finish_reason is None:
            return
        calls = list(self._tool_calls())
        yield from calls
        yield Finished(
            reason=self._reason(bool(calls)),
            usage=self._token_usage(calls),
            response_id=self._response_id,
            state=self._state(calls),
            dropped_options=self._dropped,
        )

    # --- reading ---

    def _read_choice(self, choice: Mapping[str, object]) -> Iterator[StreamEvent]:
        delta = _mapping(choice.get("delta")) or _mapping(choice.get("message"))
        yield from self._read_reasoning(delta)
        yield from self._read_content(delta)
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            self._refused = True
            self._written.append(refusal)
            yield TextDelta(refusal)
        for piece in _dicts(delta.get("tool_calls")):
            self._read_call(piece)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._finish_reason = reason.lower()
            self._raise_failed_finish(choice)

    def _read_reasoning(self, delta: Mapping[str, object]) -> Iterator[StreamEvent]:
        text = delta.get("reasoning_content")
        if isinstance(text, str) and text:
            self._reasoning_content.append(text)
        else:
            text = delta.get("reasoning")
        details = _dicts(delta.get("reasoning_details"))
        for detail in details:
            self._keep_detail(detail)
        if not isinstance(text, str) or not text:
            text = "".join(str(detail.get("text") or detail.get("summary") or "") for detail in details)
        if text:
            yield self._thought(text)

    def _keep_detail(self, detail: dict[str, object]) -> None:
        """Pieces of one reasoning block are put together, for blocks go back as they were, in their order."""
        last = self._reasoning_details[-1] if self._reasoning_details else None
        if last is None or any(last.get(name) != detail.get(name) for name in ("type", "index")):
            self._reasoning_details.append(dict(detail))
            return
        for name, value in detail.items():
            if name in ("text", "summary", "data") and isinstance(value, str):
                last[name] = str(last.get(name) or "") + value
            elif value is not None:
                last[name] = value

    def _read_content(self, delta: Mapping[str, object]) -> Iterator[StreamEvent]:
        google = _mapping(_mapping(delta.get("extra_content")).get("google"))
        if google.get("thought_signature"):
            self._extra_content = {"google": {"thought_signature": google["thought_signature"]}}
        content = delta.get("content")
        if isinstance(content, str):
            if self._dialect.name == "gemini":
                yield from self._gemini_text(content, marked=google.get("thought") is True)
            elif content:
                yield self._said(content)
        for part in _dicts(content):  # Mistral's parts
            if part.get("type") == "thinking":
                yield from (self._thought(text) for text in _texts(part.get("thinking")))
            else:
                yield from (self._said(text) for text in _texts([part]))

    def _gemini_text(self, content: str, *, marked: bool) -> Iterator[StreamEvent]:
        """Thoughts come as content of marked chunks between tags; the closing tag begins the first chunk without a mark."""
        thought, text = "", content
        if marked:
            if not self._in_thought:
                content = content.removeprefix(_THOUGHT_BEGINS)
            self._in_thought = True
            thought, ended, text = content.partition(_THOUGHT_ENDS)
            if ended:
                self._in_thought = False
        elif self._in_thought:
            self._in_thought = False
            text = content.removeprefix(_THOUGHT_ENDS)
        if thought:
            yield self._thought(thought)
        if text:
            yield self._said(text)

    def _said(self, text: str) -> TextDelta:
        self._written.append(text)
        return TextDelta(text)

    def _thought(self, text: str) -> ThinkingDelta:
        self._written.append(text)
        return ThinkingDelta(text)

    def _read_call(self, piece: Mapping[str, object]) -> None:
        function = _mapping(piece.get("function"))
        name, arguments = function.get("name"), function.get("arguments")
        call = self._call_for(piece.get("index"), piece.get("id"), name)
        if isinstance(piece.get("id"), str) and not call.id:
            call.id = str(piece["id"])
        if isinstance(name, str) and not call.name:
            call.name = name
        if isinstance(arguments, str):
            call.arguments += arguments
        elif arguments is not None:
            call.arguments += msgspec.json.encode(arguments).decode()
        if isinstance(piece.get("extra_content"), dict):
            call.extra_content = dict(_mapping(piece["extra_content"]))

    def _call_for(self, index: object, call_id: object, name: object) -> _Call:
        """Which call a piece belongs to: the one with its id, else with its index, else the newest. A new name begins one."""
        begins = isinstance(name, str) and bool(name)
        found: _Call | None = None
        if isinstance(call_id, str) and call_id:
            found = next((call for call in self._calls if call.id == call_id), None)
        if found is None and isinstance(index, int):
            found = next((call for call in reversed(self._calls) if call.index == index), None)
            # Some servers give every call the index 0: another id with a name is another call.
            if found is not None and begins and found.name and call_id and found.id != call_id:
                found = None
        elif found is None and not begins and self._calls:
            found = self._calls[-1]
        if found is None:
            found = _Call(index if isinstance(index, int) else None)
            self._calls.append(found)
        return found

    # --- errors ---

    def _raise_error_in(self, chunk: object) -> None:
        """The SDK raises for an `error` on top of a chunk; these are the other places."""
        found = _mapping(chunk[0]) if isinstance(chunk, list) and chunk else _mapping(chunk)
        error = found.get("error") or _first_choice(found).get("error")
        if not error and "choices" not in found and (found.get("object") == "error" or found.get("code")):
            error = found if found.get("message") else None
        if not error:
            return
        raise error_in(error, keys=self._keys)

    def _raise_failed_finish(self, choice: Mapping[str, object]) -> None:
        reason = self._finish_reason or ""
        if reason == "error" or "malformed_function_call" in reason:
            native = choice.get("native_finish_reason")
            raise ModelError(ModelErrorKind.SERVER_ERROR, f"The model's answer ended with `{native or reason}`"[:1000])

    # --- the end ---

    def _reason(self, has_calls: bool) -> FinishReason:
        if self._refused:
            return "refusal"
        # Gemini tells more behind a colon: `content_filter: SAFETY`.
        reason = _FINISH_REASONS.get((self._finish_reason or "").partition(":")[0].strip(), "stop")
        if reason in ("stop", "tool_calls"):
            return "tool_calls" if has_calls else "stop"
        return reason

    def _tool_calls(self) -> Iterator[ToolCallReady]:
        used = {call.id for message in self._request.messages for call in message.tool_calls}
        for number, call in enumerate(self._calls):
            # Servers that count their calls from zero in every answer would name an old one, and get its result.
            if not call.id or call.id in used:
                call.id = self._derived_id(number)
            used.add(call.id)
            arguments, problem = parse_arguments(call.arguments)
            raw = call.arguments if problem else None
            yield ToolCallReady(ToolCall(id=call.id, name=call.name, arguments=arguments), problem, raw)

    def _derived_id(self, number: int) -> str:
        """The same in every attempt of a step."""
        seed = f"{self._request.session_id}\0{self._request.idempotency_key}\0{number}"
        return f"call_{hashlib.sha256(seed.encode()).hexdigest()[:24]}"

    def _state(self, calls: list[ToolCallReady]) -> list[dict[str, object]]:
        state: list[dict[str, object]] = [
            {"type": "tool_call", "id": call.id, "extra_content": call.extra_content}
            for call in self._calls
            if call.extra_content
        ]
        if self._extra_content:
            state.append({"type": "message", "extra_content": self._extra_content})
        if self._reasoning_details:
            state.append({"type": "reasoning_details", "reasoning_details": self._reasoning_details})
        elif self._reasoning_content and calls:
            state.append({"type": "reasoning_content", "reasoning_content": "".join(self._reasoning_content)})
        return state

    def _token_usage(self, calls: list[ToolCallReady]) -> TokenUsage:
        if self._usage is None:
            # Nobody counted: what accounting and limits go by must still be about right.
            arguments = "".join(call.name + call.arguments for call in self._calls)
            return TokenUsage(
                input_tokens=prompt_tokens(self._request.messages, self._request.tools),
                output_tokens=text_tokens("".join(self._written) + arguments),
            )
        return read_usage(self._usage, self._dialect)


def read_usage(usage: Mapping[str, object], dialect: Dialect) -> TokenUsage:
    """Disjoint: `prompt_tokens` of these servers contains what came from or went to a cache."""
    details = _mapping(usage.get("prompt_tokens_details"))
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    read = _count(details.get("cached_tokens")) or _count(usage.get("prompt_cache_hit_tokens"))
    written = _count(details.get("cache_write_tokens"))
    if dialect.name == "gemini":
        # Thinking is missing in its completion_tokens, but not in the total.
        completion = max(completion, _count(usage.get("total_tokens")) - prompt)
    return TokenUsage(
        input_tokens=max(0, prompt - read - written),
        output_tokens=completion,
        cache_read_tokens=read or None,
        cache_creation_tokens=written or None,
        actual_cost_usd=_cost(usage) if dialect.name == "openrouter" else None,
    )


def _cost(usage: Mapping[str, object]) -> float | None:
    """One credit is a dollar. With a key of one's own upstream, its bill comes on top of the fee."""
    cost = usage.get("cost")
    if not isinstance(cost, int | float):
        return None
    upstream = _mapping(usage.get("cost_details")).get("upstream_inference_cost")
    own_key = usage.get("is_byok") is True and isinstance(upstream, int | float)
    return float(cost) + (float(upstream) if own_key and isinstance(upstream, int | float) else 0.0)


def _first_choice(chunk: Mapping[str, object]) -> Mapping[str, object]:
    choices = _dicts(chunk.get("choices"))
    return choices[0] if choices else {}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _texts(parts: object) -> Iterator[str]:
    if isinstance(parts, str) and parts:
        yield parts
    for part in _dicts(parts):
        if isinstance(part.get("text"), str) and part["text"]:
            yield str(part["text"])


def _count(value: object) -> int:
    return max(0, int(value)) if isinstance(value, int | float) else 0
