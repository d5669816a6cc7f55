"""OpenAI's Responses API: its events and errors, background responses that outlive their connection, and its strictness."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import parse_qs

from tests.fakes.script import Answer, Call, Failure
from tests.fakes.server import AbruptEnd, ClientGone, Exchange, FakeProvider, Json

BASE: Final = "/v1"

FAILURES: Final[dict[Failure, tuple[int, Json]]] = {
    "rate_limit": (
        429,
        {
            "message": "Rate limit reached for gpt-5.4 in organization org-fake on requests per min (RPM): Limit 3, Used 3, "
            "Requested 1. Visit https://platform.openai.com/account/rate-limits to learn more.",
            "type": "requests",
            "code": "rate_limit_exceeded",
        },
    ),
    "overloaded": (
        503,
        {
            "message": "Our servers are currently overloaded. Please try again later.",
            "type": "service_unavailable_error",
            "code": "server_is_overloaded",
        },
    ),
    "server_error": (
        500,
        {
            "message": "The server had an error processing your request. Sorry about that! You can retry your request, or "
            "contact us through our help center at help.openai.com if you keep seeing this error.",
            "type": "server_error",
            "code": "server_error",
        },
    ),
    "quota": (
        429,
        {
            "message": "You exceeded your current quota, please check your plan and billing details. For more information on "
            "this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
            "type": "insufficient_quota",
            "code": "insufficient_quota",
        },
    ),
    "usage_limit": (
        429,
        {
            "message": "The usage limit has been reached",
            "type": "usage_limit_reached",
            "code": "usage_limit_reached",
            "plan_type": "team",
            "resets_at": 1893456000,
        },
    ),
    "auth": (
        401,
        {
            "message": "Incorrect API key provided: sk-fake**********************1234. You can find your API key at "
            "https://platform.openai.com/account/api-keys.",
            "type": "invalid_request_error",
            "code": "invalid_api_key",
        },
    ),
    "permission": (
        403,
        {
            "message": "You have insufficient permissions for this operation. Missing scopes: api.responses.write. Check that "
            "you have the correct role in your organization, and if you're using a restricted API key, that it has the "
            "necessary scopes.",
            "type": "invalid_request_error",
            "code": "missing_scope",
        },
    ),
    "attestation": (
        404,
        {
            "message": "Your organization must be verified to use the model `gpt-5.4`. Please go to: "
            "https://platform.openai.com/settings/organization/general and click on Verify Organization. If you just "
            "verified, it can take up to 15 minutes for access to propagate.",
            "type": "invalid_request_error",
            "code": "model_not_found",
        },
    ),
    "not_found": (
        400,
        {
            "message": "The requested model 'gpt-none' does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
    ),
    "overflow": (
        400,
        {
            "message": "Your input exceeds the context window of this model. Please adjust your input and try again.",
            "type": "invalid_request_error",
            "param": "input",
            "code": "context_length_exceeded",
        },
    ),
    "tool_schema": (
        400,
        {
            "message": "Invalid schema for function 'lookup': In context=('properties', 'when'), 'datetime' is not valid under "
            "any of the given schemas.",
            "type": "invalid_request_error",
            "param": "tools[0].parameters",
            "code": "invalid_function_parameters",
        },
    ),
    "content_filter": (
        400,
        {
            "message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy. Please try again "
            "with a different prompt: https://platform.openai.com/docs/guides/reasoning#advice-on-prompting",
            "type": "invalid_request_error",
            "code": "invalid_prompt",
        },
    ),
    "invalid_request": (
        400,
        {
            "message": "Unknown parameter: 'nonsense'.",
            "type": "invalid_request_error",
            "param": "nonsense",
            "code": "unknown_parameter",
        },
    ),
}

MODELS: Final = (
    "gpt-5.4",
    "gpt-5.4-mini",
    "text-embedding-3-large",
    "tts-1",
    "whisper-1",
    "gpt-image-2",
    "omni-moderation-latest",
)

_MAX_ID_CHARACTERS: Final = 64
_INCOMPLETE: Final = {
    "length": "max_output_tokens",
    "max_output_tokens": "max_output_tokens",
    "content_filter": "content_filter",
}


class Generation:
    """A response in the making. Its events stay, so that they can be streamed again from any place."""

    def __init__(self, response_id: str, body: Json, answer: Answer) -> None:
        self.id = response_id
        self.body = body
        self.answer = answer
        self.events: list[Json] = []
        self.output: list[Json] = []
        self.status = "queued" if body.get("background") else "in_progress"
        self.error: Json | None = None
        self.is_over = False
        self.broken = False
        """Whether its first connection was cut already: a replay is not."""
        self.cut_at: int | None = None
        """How many events a connection gets before it is cut."""
        self.task: asyncio.Task[None] | None = None
        self.grown = asyncio.Event()

    def add(self, event: Json) -> None:
        self.events.append({**event, "sequence_number": len(self.events)})
        self._wake()

    def end(self, status: str) -> None:
        self.status = status
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()

    def response(self) -> Json:
        body, answer = self.body, self.answer
        is_complete = self.status in ("completed", "incomplete")
        reason = _INCOMPLETE.get(answer.finish or "")
        return {
            "id": self.id,
            "object": "response",
            "created_at": 1767225600,
            "status": self.status,
            "background": bool(body.get("background")),
            "error": self.error,
            "incomplete_details": {"reason": reason} if self.status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": body["model"],
            "output": list(self.output) if self.is_over or is_complete else [],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "prompt_cache_key": body.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None} | (body.get("reasoning") or {}),
            "service_tier": body.get("service_tier", "default"),
            "store": body.get("store", True),
            "temperature": body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}, "verbosity": "medium"} | (body.get("text") or {}),
            "tool_choice": "auto",
            "tools": body.get("tools", []),
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": _usage(answer) if is_complete else None,
            "user": None,
            "metadata": {},
        }


class FakeOpenAIResponses(FakeProvider):
    provider_type = "openai"
    base_path = f"{BASE}/"

    def __init__(self) -> None:
        super().__init__()
        self.generations: dict[str, Generation] = {}
        """Stored responses; what is taken out of it is gone."""
        self.generations_started = 0
        """What would be billed."""
        self.stopped: list[str] = []
        self.reports: Literal["error", "nested error", "response.failed"] = "error"
        """How a failure inside a stream is told: all of these are seen."""
        self.refuses_states = False
        self.refuses_states_in_stream = False
        self.refuses_summaries = False
        self.refuses_connections = 0
        """How many of the next requests for a running response fail with 503."""
        self.compacts = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeProvider]:
        async with super().running():
            try:
                yield self
            finally:
                for generation in self.generations.values():
                    _cancel(generation)

    async def handle(self, exchange: Exchange) -> None:
        request = exchange.request
        path = request.path.removeprefix(BASE).strip("/").split("/")
        if not request.headers.get("authorization", "").removeprefix("Bearer ") and "api-key" not in request.headers:
            await self._fail(exchange, Answer(failure="auth"))
            return
        match request.method, path:
            case "GET", ["models"]:
                await self._models(exchange)
            case "POST", ["responses"]:
                await self._create(exchange)
            case "POST", ["responses", "compact"]:
                await self._compact(exchange)
            case "GET", ["responses", response_id]:
                await self._retrieve(exchange, self.generations.get(response_id))
            case "POST", ["responses", response_id, "cancel"]:
                await self._cancel(exchange, self.generations.get(response_id))
            case _:
                await exchange.json(_error(f"Invalid URL ({request.method} {request.path})"), status=404)

    # --- routes ---

    async def _models(self, exchange: Exchange) -> None:
        answer = self._answers.popleft() if self._answers else None
        if answer is not None and answer.failure is not None:
            await self._fail(exchange, answer)
            return
        data = [{"id": name, "object": "model", "created": 1767225600, "owned_by": "openai"} for name in MODELS]
        await exchange.json({"object": "list", "data": data})

    async def _create(self, exchange: Exchange) -> None:
        body = exchange.request.body
        if (problem := next(self._problems(body), None)) is not None:
            await exchange.json({"error": {"param": None, "code": None} | problem}, status=400)
            return
        answer = self.next_answer()
        if answer.failure is not None and answer.after is None:
            await self._fail(exchange, answer)
            return
        generation = self.begin(body, answer)
        if not body.get("stream"):
            assert generation.task is not None
            await generation.task
            await exchange.json(generation.response())
            return
        try:
            await self._follow(exchange, generation, 0)
        except ClientGone:
            if not body.get("background"):
                _cancel(generation)
            raise

    def begin(self, body: Json, answer: Answer) -> Generation:
        """From here on it runs by itself; connections only follow it."""
        generation = Generation(answer.response_id or self.new_id("resp_"), body, answer)
        self.generations_started += 1
        if body.get("store", True):
            self.generations[generation.id] = generation
        generation.task = asyncio.create_task(self._generate(generation))
        return generation

    async def _retrieve(self, exchange: Exchange, generation: Generation | None) -> None:
        query = parse_qs(exchange.request.query)
        if self.refuses_connections:
            self.refuses_connections -= 1
            await self._fail(exchange, Answer(failure="overloaded"))
        elif generation is None:
            await exchange.json(_error("Response with id 'resp_…' not found."), status=404)
        elif query.get("stream") != ["true"]:
            await exchange.json(generation.response())
        elif not generation.body.get("background"):
            await exchange.json(_error("This response cannot be streamed."), status=400)
        else:
            await self._follow(exchange, generation, int(query.get("starting_after", ["-1"])[0]) + 1)

    async def _cancel(self, exchange: Exchange, generation: Generation | None) -> None:
        if generation is None:
            await exchange.json(_error("Response with id 'resp_…' not found."), status=404)
        elif not generation.body.get("background"):
            await exchange.json(_error("Cannot cancel a synchronous response."), status=400)
        else:
            if not generation.is_over:
                self.stopped.append(generation.id)
                _cancel(generation)
            await exchange.json(generation.response())

    async def _compact(self, exchange: Exchange) -> None:
        body = exchange.request.body
        answer = self._answers.popleft() if self._answers else Answer()
        if not self.compacts:
            await exchange.json(_error("Invalid URL (POST /v1/responses/compact)"), status=404)
        elif (problem := next(self._problems(body), None)) is not None:
            await exchange.json({"error": {"param": None, "code": None} | problem}, status=400)
        elif answer.failure is not None:
            await self._fail(exchange, answer)
        else:
            said = [item for item in body["input"] if item.get("role") == "user"]
            compaction_id = self.new_id("cmp_")
            output = [
                *({"id": self.new_id("msg_"), "status": "completed"} | item for item in said),
                {"id": compaction_id, "type": "compaction", "encrypted_content": encrypted(compaction_id)},
            ]
            await exchange.json(
                {
                    "id": self.new_id("resp_"),
                    "object": "response.compaction",
                    "created_at": 1767225600,
                    "output": output,
                    "usage": _usage(answer),
                }
            )

    async def _fail(self, exchange: Exchange, answer: Answer) -> None:
        assert answer.failure is not None
        status, error = FAILURES[answer.failure]
        headers = {"x-request-id": self.new_id("req_")}
        if answer.retry_after_seconds is not None:
            headers["retry-after"] = str(answer.retry_after_seconds)
        await exchange.json({"error": {"param": None, **error}}, status=status, headers=headers)

    # --- a response ---

    async def _follow(self, exchange: Exchange, generation: Generation, position: int) -> None:
        async with exchange.stream({"x-request-id": self.new_id("req_")}):
            while True:
                while position < len(generation.events):
                    if position == generation.cut_at and not generation.broken:
                        break
                    event = generation.events[position]
                    await exchange.event(event, event=event["type"])
                    position += 1
                if position == generation.cut_at and not generation.broken:
                    generation.broken = True
                    if not generation.body.get("background"):
                        _cancel(generation)
                    if generation.answer.cut == "abrupt":
                        raise AbruptEnd
                    return
                if generation.is_over:
                    return
                await exchange.until(generation.grown)

    async def _generate(self, generation: Generation) -> None:
        answer = generation.answer
        for kind in ("created", *(["queued"] if generation.status == "queued" else []), "in_progress"):
            if kind == "in_progress":
                generation.status = "in_progress"
            generation.add({"type": f"response.{kind}", "response": generation.response()})
        if self.refuses_states_in_stream and _brings_reasoning(generation.body):
            self._report(generation, _UNVERIFIED)
            return
        sent = 0
        for event, is_piece in self._events(generation):
            if is_piece and sent == answer.after and await self._strike(generation):
                return
            generation.add(event)
            if is_piece:
                sent += 1
                if answer.piece_delay_seconds:
                    await asyncio.sleep(answer.piece_delay_seconds)
        wanted = answer.cut is not None or answer.stall or answer.failure is not None
        if wanted and (answer.after is None or sent <= answer.after) and await self._strike(generation):
            return  # a place beyond the end is the end
        kind = "incomplete" if answer.finish in _INCOMPLETE else "completed"
        generation.end(kind)
        generation.add({"type": f"response.{kind}", "response": generation.response()})

    async def _strike(self, generation: Generation) -> bool:
        """What happens at `after`; True when the generation is over. A cut is one of the connection alone."""
        answer = generation.answer
        if answer.cut is not None:
            generation.cut_at = len(generation.events)
            return False
        if answer.stall:
            await asyncio.Event().wait()
        if answer.failure is not None:
            error = dict(FAILURES[answer.failure][1])
            if answer.retry_after_seconds is not None:
                error["message"] += f" Please try again in {answer.retry_after_seconds}s."
            self._report(generation, error)
            return True
        return False

    def _report(self, generation: Generation, error: Json) -> None:
        told = {"code": error.get("code"), "message": error["message"], "param": error.get("param")}
        generation.error = {"code": told["code"], "message": told["message"]}
        match self.reports:
            case "error":
                generation.add({"type": "error", **told})
            case "nested error":
                generation.add({"type": "error", "error": {"type": error["type"], **told}})
            case "response.failed":
                generation.status = "failed"
                generation.add({"type": "response.failed", "response": generation.response()})
        generation.end("failed")

    def _events(self, generation: Generation) -> Iterator[tuple[Json, bool]]:
        answer = generation.answer
        if answer.thinking:
            yield from self._reasoning(generation)
        if answer.text or answer.refusal:
            yield from self._message(generation)
        for call in answer.calls:
            yield from self._function_call(generation, call)

    def _reasoning(self, generation: Generation) -> Iterator[tuple[Json, bool]]:
        item: Json = {"id": self.new_id("rs_"), "type": "reasoning", "summary": []}
        place = {"item_id": item["id"], "output_index": len(generation.output)}
        part = {**place, "summary_index": 0}
        text = "".join(generation.answer.thinking)
        yield _added(place, item), False
        yield (
            {
                "type": "response.reasoning_summary_part.added",
                **part,
                "part": {"type": "summary_text", "text": ""},
            },
            False,
        )
        for piece in generation.answer.thinking:
            yield {"type": "response.reasoning_summary_text.delta", **part, "delta": piece}, True
        yield {"type": "response.reasoning_summary_text.done", **part, "text": text}, False
        summary = {"type": "summary_text", "text": text}
        yield {"type": "response.reasoning_summary_part.done", **part, "part": summary}, False
        done = item | {"summary": [summary]}
        if "reasoning.encrypted_content" in generation.body.get("include", []):
            done["encrypted_content"] = encrypted(item["id"])
        yield _done(generation, place, done), False

    def _message(self, generation: Generation) -> Iterator[tuple[Json, bool]]:
        answer = generation.answer
        item: Json = {"id": self.new_id("msg_"), "type": "message", "role": "assistant", "content": []}
        if answer.phase:
            item["phase"] = answer.phase
        place = {"item_id": item["id"], "output_index": len(generation.output)}
        yield _added(place, item | {"status": "in_progress"}), False
        content: list[Json] = []
        for kind, pieces in (("output_text", answer.text), ("refusal", answer.refusal)):
            if not pieces:
                continue
            at = {**place, "content_index": len(content)}
            yield {"type": "response.content_part.added", **at, "part": _part(kind, "")}, False
            extra: Json = {"logprobs": []} if kind == "output_text" else {}
            for piece in pieces:
                yield {"type": f"response.{kind}.delta", **at, "delta": piece, **extra}, True
            text = "".join(pieces)
            field = "text" if kind == "output_text" else "refusal"
            yield {"type": f"response.{kind}.done", **at, field: text, **extra}, False
            content.append(_part(kind, text))
            yield {"type": "response.content_part.done", **at, "part": content[-1]}, False
        yield _done(generation, place, item | {"status": "completed", "content": content}), False

    def _function_call(self, generation: Generation, call: Call) -> Iterator[tuple[Json, bool]]:
        item: Json = {
            "id": self.new_id("fc_"),
            "type": "function_call",
            "call_id": call.id or self.new_id("call_"),
            "name": call.name,
            "arguments": "",
        }
        place = {"item_id": item["id"], "output_index": len(generation.output)}
        yield _added(place, item | {"status": "in_progress"}), False
        middle = len(call.arguments) // 2
        for piece in (call.arguments[:middle], call.arguments[middle:]):
            yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}, False
        yield (
            {
                "type": "response.function_call_arguments.done",
                **place,
                "name": call.name,
                "arguments": call.arguments,
            },
            False,
        )
        yield _done(generation, place, item | {"status": "completed", "arguments": call.arguments}), False

    # --- requests ---

    def _problems(self, body: Json) -> Iterator[Json]:
        """What the API would refuse in a request, in its words as far as they matter."""
        for name in body.keys() - _known_parameters():
            yield _problem(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
        if body.get("background") and not body.get("store", True):
            yield _problem("Background responses require store to be true.", param="store")
        if self.refuses_summaries and (body.get("reasoning") or {}).get("summary"):
            yield _problem(
                "Your organization must be verified to generate reasoning summaries. Please go to: "
                "https://platform.openai.com/settings/organization/general and click on Verify Organization.",
                param="reasoning.summary",
                code="unsupported_value",
            )
        if self.refuses_states and _brings_reasoning(body):
            yield _UNVERIFIED
        yield from _input_problems(body["input"])


def _input_problems(items: list[Json]) -> Iterator[Json]:
    called = [item["call_id"] for item in items if item["type"] == "function_call"]
    answered = [item["call_id"] for item in items if item["type"] == "function_call_output"]
    for call_id in called + answered:
        if len(call_id) > _MAX_ID_CHARACTERS:
            yield _problem("Invalid 'input[0].call_id': string too long.", code="string_above_max_length")
    for call_id in set(answered) - set(called):
        yield _problem(f"No tool call found for function call output with call_id {call_id}.", param="input")
    for call_id in set(called) - set(answered):
        yield _problem(f"No tool output found for function call {call_id}.", param="input")
    for position, item in enumerate(items):
        if item["type"] not in ("reasoning", "compaction"):
            continue
        if item.get("encrypted_content") != encrypted(item["id"]):
            yield _UNVERIFIED
        following = items[position + 1] if position + 1 < len(items) else {}
        led_on = following.get("type") in ("reasoning", "function_call") or following.get("role") == "assistant"
        if item["type"] == "reasoning" and not led_on:
            yield _problem(f"Item '{item['id']}' of type 'reasoning' was provided without its required following item.")
        if item["type"] == "reasoning" and "status" in item:
            yield _problem(f"Unknown parameter: 'input[{position}].status'.", code="unknown_parameter")


def _known_parameters() -> set[str]:
    from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

    return set(ResponseCreateParamsStreaming.__annotations__)


def _brings_reasoning(body: Json) -> bool:
    return any(item["type"] == "reasoning" for item in body["input"])


def encrypted(item_id: str) -> str:
    """The only content that is accepted with this id."""
    return "gAAAAA" + hashlib.sha256(item_id.encode()).hexdigest()


def _cancel(generation: Generation) -> None:
    if generation.task is not None:
        generation.task.cancel()
    if not generation.is_over:
        generation.end("cancelled")


def _problem(message: str, *, param: str | None = None, code: str | None = None) -> Json:
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


_UNVERIFIED: Final = _problem(
    "The encrypted content gAAA...fake could not be verified.", code="invalid_encrypted_content"
)


def _error(message: str) -> Json:
    return {"error": _problem(message)}


def _added(place: Json, item: Json) -> Json:
    return {"type": "response.output_item.added", "output_index": place["output_index"], "item": item}


def _done(generation: Generation, place: Json, item: Json) -> Json:
    generation.output.append(item)
    return {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}


def _part(kind: str, text: str) -> Json:
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(answer: Answer) -> Json | None:
    usage = answer.usage
    if usage is None:
        return None
    total_input = usage.input + usage.cache_read + usage.cache_write
    counted: dict[str, Any] = {
        "input_tokens": total_input,
        "input_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": total_input + usage.output,
    }
    return counted | ({"cost": usage.cost_usd} if usage.cost_usd is not None else {})
