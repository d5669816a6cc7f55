"""Anthropic's Messages API.

Events are read as they come over the wire, not through the SDK's stream: that one swallows the pings (which prove that a silent
call is alive) and raises errors in the middle of a stream as if they were responses. The call is over at `message_stop` and
nowhere else; without it this ends without `Finished`.

Thinking is signed, and must come back unmodified and in its place with the message it belongs to. A state therefore is the
order of that message's blocks: thinking as it came, text by its number of characters, calls by their number. Where the API does
not accept it any more (see `refuses_thinking`), the call is made once more without.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from functools import cache, lru_cache
from typing import Any, Final, cast

import msgspec
from msgspec import Struct, field

from activities.llm.anthropic_errors import api_error, readable, refuses_thinking
from activities.llm.anthropic_request import DRIVER, Prepared, prepare
from activities.llm.failures import parse_arguments
from domain.events import TokenUsage
from domain.model import (
    Alive,
    Began,
    DiscoveredModel,
    Finished,
    FinishReason,
    ModelEndpoint,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.providers import API_KEY, PROVIDER_TYPES
from domain.tools import ToolCall

_MAX_CLIENTS: Final = 64
"""A process serves many organizations' keys. A client is made in a moment; what is worth keeping is in `_connections`."""

_CONNECT_TIMEOUT_SECONDS: Final = 10.0
_READ_TIMEOUT_SECONDS: Final = 600.0
"""Only a last resort: the engine gives up on a silent stream long before."""

_MODELS_PER_PAGE: Final = 100

_FINISH: Final[dict[str, FinishReason]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
    # Only tools that run at the provider pause a turn, and none is offered.
    "pause_turn": "stop",
}


class AnthropicMessages:
    name = DRIVER

    async def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        key = _key_of(request.endpoint)
        prepared = prepare(request)
        try:
            response = await _open(request.endpoint, key, prepared)
        except ModelError as error:
            if not (prepared.echoes and refuses_thinking(error)):
                raise
            prepared = prepare(request, with_states=False)
            response = await _open(request.endpoint, key, prepared)
        reading = _Reading(prepared.dropped)
        async with response, aclosing(_wire_events(response, key, prepared)) as events:
            async for event in events:
                for said in reading.read(event):
                    yield said

    async def list_models(self, endpoint: ModelEndpoint) -> list[DiscoveredModel]:
        key = _key_of(endpoint)
        try:
            return [
                DiscoveredModel(model_id=model.id, display_name=model.display_name or None)
                async for model in _client(_base_url(endpoint), key).models.list(limit=_MODELS_PER_PAGE)
                if getattr(model, "lifecycle", None) != "retired"
            ]
        except Exception as error:
            raise _model_error(error, key) from None


# --- connection -------------------------------------------------------------------------------------------------------


def _key_of(endpoint: ModelEndpoint) -> str:
    secret = endpoint.credentials.get(API_KEY)
    key = secret.reveal().strip() if secret else ""
    which = f"`{endpoint.provider_public_id}`" if endpoint.provider_public_id else "Anthropic"
    if not key:
        raise ModelError(ModelErrorKind.NOT_CONFIGURED, f"The provider {which} has no API key")
    if not (key.isascii() and key.isprintable()):
        # The HTTP library would refuse it with a message that repeats it.
        raise ModelError(ModelErrorKind.AUTHENTICATION, f"The API key of {which} has characters that no key has")
    return key


def _base_url(endpoint: ModelEndpoint) -> str:
    """Without `/v1`, which the SDK adds, and which people copy along."""
    base_url = endpoint.base_url or PROVIDER_TYPES["anthropic"].base_url or ""
    return base_url.rstrip("/").removesuffix("/v1")


@cache
def _connections():
    """One pool for all keys, so that a client that falls out of the cache has nothing to close, and a stream on it goes on."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    from anthropic import DefaultAsyncHttpxClient

    return DefaultAsyncHttpxClient(
        timeout=_timeout(),
        # What a server sets for one key must not go along with another.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        # A redirect would carry the conversation, and the key, to an address nobody has configured.
        follow_redirects=False,
    )


def _timeout():
    from anthropic import Timeout

    return Timeout(_READ_TIMEOUT_SECONDS, connect=_CONNECT_TIMEOUT_SECONDS)


@lru_cache(maxsize=_MAX_CLIENTS)
def _client(base_url: str, key: str):
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(
        api_key=key,
        base_url=base_url,
        max_retries=0,
        timeout=_timeout(),
        open_telemetry=False,
        # An explicit header goes before one of ANTHROPIC_CUSTOM_HEADERS, which is not meant for other people's keys.
        default_headers={"Authorization": f"Bearer {key}"},
        http_client=_connections(),
    )


async def _open(endpoint: ModelEndpoint, key: str, prepared: Prepared):
    """The SDK's stream, whose response has begun. Raises `ModelError`."""
    try:
        # The SDK types bodies as TypedDicts; ours is checked by the contract tests.
        body = cast("dict[str, Any]", prepared.body)
        return await _client(_base_url(endpoint), key).messages.create(
            **body, stream=True, extra_headers=prepared.headers
        )
    except Exception as error:
        raise _model_error(error, key, prepared) from None


async def _wire_events(stream: Any, key: str, prepared: Prepared) -> AsyncGenerator[dict[str, Any], None]:
    """Every event of the stream, pings too. Raises `ModelError` for an `error` event and a broken connection."""
    try:
        async for frame in stream.raw_events(stream.response):
            if not frame.data:
                continue
            event = msgspec.json.decode(frame.data)
            if not isinstance(event, dict):
                raise msgspec.DecodeError("an event is not an object")
            if event.get("type", frame.event) == "error":
                response = stream.response
                raise api_error(
                    event,
                    status=response.status_code,
                    headers=response.headers,
                    tool_names=prepared.tool_names,
                    secrets=[key],
                )
            yield event
    except Exception as error:
        raise _model_error(error, key, prepared) from None


def _model_error(error: Exception, key: str, prepared: Prepared | None = None) -> ModelError:
    """For whatever the SDK or its HTTP library raised. A `ModelError` passes through."""
    import anthropic
    import httpx2

    if isinstance(error, ModelError):
        return error
    if isinstance(error, anthropic.APIStatusError):
        return api_error(
            error.body if error.body is not None else error.message,
            status=error.status_code,
            headers=error.response.headers,
            tool_names=prepared.tool_names if prepared else (),
            secrets=[key],
        )
    cause = error.__cause__ if isinstance(error, anthropic.APIConnectionError) and error.__cause__ else error
    match cause:
        case httpx2.TimeoutException() | anthropic.APITimeoutError() | TimeoutError():
            kind = ModelErrorKind.TIMEOUT
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL() | httpx2.LocalProtocolError():
            # A wrong address stays wrong: only a connection that could work is tried again.
            kind = ModelErrorKind.INVALID_REQUEST
        case httpx2.TransportError() | anthropic.APIConnectionError() | OSError():
            kind = ModelErrorKind.TRANSPORT
        case ValueError() | msgspec.DecodeError() | anthropic.AnthropicError():  # something that is no event
            kind = ModelErrorKind.SERVER_ERROR
        case _:
            kind = ModelErrorKind.OTHER
    told = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    return ModelError(kind, readable(f"Anthropic: {told}", [key]))


# --- stream -----------------------------------------------------------------------------------------------------------


class _Counts(Struct):
    """As the API counts: input without what a cache gave or took. Later counts are totals, not additions."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0

    def update(self, usage: object) -> None:
        if isinstance(usage, dict):
            for name in self.__struct_fields__:
                if isinstance(usage.get(name), int):
                    setattr(self, name, usage[name])

    def usage(self) -> TokenUsage:
        return TokenUsage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cache_read_tokens=self.cache_read_input_tokens or None,
            cache_creation_tokens=self.cache_creation_input_tokens or None,
        )


class _Block(Struct):
    """A content block while it streams. `whole` is what came at its start."""

    type: str
    whole: dict[str, Any]
    pieces: list[str] = field(default_factory=list)
    signature: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class _Reading:
    """What one stream has said so far."""

    def __init__(self, dropped: list[str]) -> None:
        self._dropped = dropped
        self._message_id: str | None = None
        self._blocks: dict[int, _Block] = {}
        self._state: list[dict[str, object]] = []
        self._calls = 0
        self._said_something = False
        self._stop_reason: str | None = None
        self._counts = _Counts()

    def read(self, event: dict[str, Any]) -> Iterator[StreamEvent]:
        match event.get("type"):
            case "message_start":
                message = event.get("message") or {}
                self._message_id = message.get("id")
                self._counts.update(message.get("usage"))
                yield Began(response_id=self._message_id or "")
            case "content_block_start":
                yield from self._begin(event)
            case "content_block_delta":
                yield from self._delta(event)
            case "content_block_stop":
                yield from self._end(self._blocks.pop(event.get("index", 0), None))
            case "message_delta":
                yield from self._stop(event)
            case "message_stop":
                yield self._finished()
            case _:
                yield Alive()

    def _begin(self, event: dict[str, Any]) -> Iterator[StreamEvent]:
        whole = event.get("content_block") or {}
        block = _Block(type=whole.get("type", ""), whole=whole)
        self._blocks[event.get("index", 0)] = block
        # Empty as a rule, but it is the beginning of the block.
        yield from self._piece(block, whole.get(block.type) if block.type in ("text", "thinking") else "")
        block.signature = whole.get("signature") or ""

    def _delta(self, event: dict[str, Any]) -> Iterator[StreamEvent]:
        block = self._blocks.get(event.get("index", 0))
        delta = event.get("delta") or {}
        if block is None:
            return
        match delta.get("type"):
            case "text_delta":
                yield from self._piece(block, delta.get("text"))
            case "thinking_delta":
                yield from self._piece(block, delta.get("thinking"))
            case "input_json_delta":
                block.pieces.append(delta.get("partial_json") or "")
                yield Alive()
            case "signature_delta":
                block.signature += delta.get("signature") or ""
                yield Alive()
            case _:
                yield Alive()

    def _piece(self, block: _Block, text: str | None) -> Iterator[StreamEvent]:
        if not text:
            return
        block.pieces.append(text)
        if block.type == "thinking":
            yield ThinkingDelta(text)
        else:
            self._said_something = True
            yield TextDelta(text)

    def _end(self, block: _Block | None) -> Iterator[StreamEvent]:
        match block:
            case _Block(type="text"):
                self._state.append({"type": "text", "characters": len(block.text)})
            case _Block(type="thinking"):
                self._state.append({"type": "thinking", "thinking": block.text, "signature": block.signature})
            case _Block(type="redacted_thinking"):
                self._state.append({"type": "redacted_thinking", "data": block.whole.get("data", "")})
            case _Block(type="tool_use"):
                self._state.append({"type": "tool_use", "index": self._calls})
                self._calls += 1
                self._said_something = True
                yield _tool_call(block)
            case _:
                pass

    def _stop(self, event: dict[str, Any]) -> Iterator[StreamEvent]:
        delta = event.get("delta") or {}
        self._counts.update(event.get("usage"))
        self._stop_reason = delta.get("stop_reason") or self._stop_reason
        explanation = (delta.get("stop_details") or {}).get("explanation")
        if self._stop_reason == "refusal" and explanation and not self._said_something:
            # Refused before a word was written: the reason is all there is to show.
            self._state.append({"type": "text", "characters": len(explanation)})
            yield TextDelta(explanation)

    def _finished(self) -> Finished:
        thought = any(item["type"] in ("thinking", "redacted_thinking") for item in self._state)
        return Finished(
            reason=_FINISH.get(self._stop_reason or "", "tool_calls" if self._calls else "stop"),
            usage=self._counts.usage(),
            response_id=self._message_id,
            state=self._state if thought else [],
            dropped_options=self._dropped,
        )


def _tool_call(block: _Block) -> ToolCallReady:
    name, call_id, given = block.whole.get("name", ""), block.whole.get("id", ""), block.whole.get("input")
    arguments, problem = parse_arguments(block.text)
    if not block.pieces and isinstance(given, dict):
        # A server that does not stream arguments gives them at once.
        arguments = given
    return ToolCallReady(ToolCall(id=call_id, name=name, arguments=arguments), problem, block.text if problem else None)
