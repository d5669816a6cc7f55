"""The driver for OpenAI's Responses API, at OpenAI and at Azure.

With the option `background` a generation belongs to the provider, not to the connection: it goes on when we leave, and is taken
up again after the last event that was read, by this call when its connection breaks, or by another worker through
`ModelRequest.resume`. Nothing here ends it by itself, for a worker that shuts down wants it to go on; that is what `stop` is for.
Otherwise closing the connection ends the generation.

A call is begun anew, before anything of it was yielded, when the provider refuses what only we wanted: reasoning of earlier
turns it cannot decrypt, or summaries of reasoning, which some organizations may not see.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol
from urllib.parse import quote

import structlog

from activities.llm.openai_responses_request import (
    DRIVER,
    cache_key,
    input_items,
    instructions,
    prepare,
)
from activities.llm.openai_responses_stream import ProviderFailure, ResponseReader, refuses_state, usage_of
from activities.llm.openai_sdk import client_of, key_of, list_models, model_error
from domain.model import (
    DiscoveredModel,
    ModelEndpoint,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    NativeCompaction,
    StreamEvent,
)

RECONNECT_DELAYS_SECONDS: Final = (0.2, 1.0, 3.0)
"""Before each try to take up a background response whose connection broke; anew after every event that came."""

STOP_TIMEOUT_SECONDS: Final = 5.0
_DRAIN_SECONDS: Final = 0.25
"""For the end of the stream after its last event: a connection that was read to its end is used again."""

_GONE: Final = (400, 404, 410)
"""Of a response that is to be resumed: unknown, expired, or not one that can be."""

_NOTHING_TO_STOP: Final = (400, 404, 409)

_CANNOT_COMPACT: Final = (400, 404, 405, 501)
_NO_SUCH_SERVICE: Final = (
    ModelErrorKind.INVALID_REQUEST,
    ModelErrorKind.UNSUPPORTED_MODEL,
    ModelErrorKind.SERVER_ERROR,
)

log = structlog.get_logger(__name__)


class _Events(Protocol):
    """What is used of the SDK's `AsyncStream`."""

    def __aiter__(self) -> AsyncIterator[object]: ...
    async def close(self) -> None: ...


class OpenAIResponses:
    name = DRIVER

    def __init__(self, *, reconnect_delays_seconds: Sequence[float] = RECONNECT_DELAYS_SECONDS) -> None:
        self._delays = tuple(reconnect_delays_seconds)

    async def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        call = _Call(request, self._delays)
        async with aclosing(call.events()) as events:  # type: ignore[type-var]  # a generator
            async for event in events:
                yield event

    async def stop(self, endpoint: ModelEndpoint, response_id: str) -> None:
        """End a background generation. One that is over or unknown is a success. Raises `ModelError`."""
        await stop(endpoint, response_id)

    async def compact(self, request: ModelRequest) -> NativeCompaction | None:
        answer = await _compact(request) or {}
        output = answer.get("output")
        return NativeCompaction(items=output, usage=usage_of(answer.get("usage"))) if output else None

    async def list_models(self, endpoint: ModelEndpoint) -> list[DiscoveredModel]:
        return await list_models(endpoint)


class _Call:
    """One model call, over as many connections as it takes."""

    def __init__(self, request: ModelRequest, delays: tuple[float, ...]) -> None:
        self._request = request
        self._client = client_of(request.endpoint)
        key = key_of(request.endpoint)
        self._key = key.reveal() if key else None
        self._delays = delays
        self._tries = 0
        self._broke_at: int | None = None
        self._with_states = self._with_summary = True
        self._prepared = prepare(request)
        self._resuming = request.resume is not None
        """Whether it is still the old generation that is read."""
        self._reader = self._new_reader()

    async def events(self) -> AsyncIterator[StreamEvent]:
        connection = await (self._resume() if self._resuming else self._create())
        while connection is not None:
            failure: Exception | None = None
            try:
                arriving = aiter(connection)
                async for raw in arriving:
                    for event in self._reader.read(_json(raw)):
                        yield event
                    if self._reader.finished:
                        await _drain(arriving)
                        return
            except Exception as error:
                failure = _reported(error) or error
            finally:
                await connection.close()
            connection = await self._after(failure)

    def _new_reader(self) -> ResponseReader:
        resume = self._request.resume if self._resuming else None
        resumable = resume is not None or self._prepared.background
        return ResponseReader(self._prepared.dropped, resumable=resumable, resume=resume)

    async def _after(self, failure: Exception | None) -> _Events | None:
        """What to read after a connection that ended before its response did. None to leave it at that."""
        if isinstance(failure, ProviderFailure):
            return await self._after_report(failure)
        if failure is not None and not _is_broken_connection(failure):
            raise model_error(failure) from None
        if self._reader.resumable and self._reader.response_id is not None:
            return await self._reconnect(failure)
        if failure is not None:
            raise model_error(failure) from None
        return None

    async def _after_report(self, failure: ProviderFailure) -> _Events:
        if self._reader.delivered:
            raise failure.model_error(self._key) from None
        if self._resuming:
            return await self._anew()
        if failure.refuses_state and self._relax_states():
            self._reader = self._new_reader()
            return await self._create()
        raise failure.model_error(self._key) from None

    # --- a new generation ---

    async def _create(self) -> _Events:
        while True:
            try:
                return await self._open("/responses", body=self._prepared.body)
            except Exception as error:
                if not self._relax(error):
                    raise model_error(error) from None

    def _relax(self, error: Exception) -> bool:
        """Ask for less, if what was refused is what only we wanted."""
        if _status(error) not in (400, 404):
            return False
        if refuses_state(getattr(error, "code", None), error):
            return self._relax_states()
        if getattr(error, "param", None) == "reasoning.summary" and self._with_summary and self._prepared.summarizes:
            self._with_summary = False
            self._prepare_again()
            return True
        return False

    def _relax_states(self) -> bool:
        if not (self._with_states and self._prepared.echoes):
            return False
        self._with_states = False
        self._prepare_again()
        return True

    def _prepare_again(self) -> None:
        self._prepared = prepare(self._request, with_states=self._with_states, with_summary=self._with_summary)

    # --- one that runs already ---

    async def _resume(self) -> _Events | None:
        try:
            return await self._retrieve()
        except Exception as error:
            if _status(error) in _GONE:
                return await self._anew(is_gone=True)
            if not _is_broken_connection(error):
                raise model_error(error) from None
            return await self._reconnect(error)

    async def _reconnect(self, failure: Exception | None) -> _Events | None:
        """Raises the last failure when nothing helps. A response whose stream always just ends was stopped, or is lost."""
        if self._broke_at != self._reader.cursor:
            self._broke_at, self._tries = self._reader.cursor, 0
        is_gone = False
        while self._tries < len(self._delays):
            await asyncio.sleep(self._delays[self._tries])
            self._tries += 1
            try:
                return await self._retrieve()
            except Exception as error:
                is_gone = _status(error) in _GONE
                if is_gone:
                    break
                failure = error
                if not model_error(error).retryable:
                    break
        if self._resuming and not self._reader.delivered and (is_gone or failure is None):
            return await self._anew(is_gone=is_gone)
        if failure is not None:
            raise model_error(failure) from None
        return None

    async def _retrieve(self) -> _Events:
        assert self._reader.response_id is not None
        query: dict[str, object] = {"stream": True}
        if self._reader.cursor >= 0:
            query["starting_after"] = self._reader.cursor
        if "include" in self._prepared.body:
            query["include"] = self._prepared.body["include"]
        return await self._open(_path(self._reader.response_id), query=query)

    async def _anew(self, *, is_gone: bool = False) -> _Events:
        """The old generation is not to be had: end what may be left of it, and begin another."""
        if self._reader.response_id is not None and not is_gone:
            try:
                await stop(self._request.endpoint, self._reader.response_id)
            except ModelError as error:
                log.warning("an old generation could not be stopped at its provider", error=error.kind)
        self._resuming = False
        self._reader = self._new_reader()
        return await self._create()

    async def _open(
        self, path: str, *, body: Mapping[str, object] | None = None, query: Mapping[str, object] | None = None
    ) -> _Events:
        from openai import AsyncStream

        if body is None:
            return await self._client.get(
                path,
                cast_to=object,
                options={"params": query or {}},
                stream=True,
                stream_cls=AsyncStream[object],
            )
        return await self._client.post(path, cast_to=object, body=body, stream=True, stream_cls=AsyncStream[object])


async def stop(endpoint: ModelEndpoint, response_id: str) -> None:
    """One that is over or unknown is a success. Raises `ModelError`."""
    client = client_of(endpoint)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
            await client.post(f"{_path(response_id)}/cancel", cast_to=object)
    except Exception as error:
        if _status(error) not in _NOTHING_TO_STOP:
            raise model_error(error) from None


async def _compact(request: ModelRequest) -> Mapping[str, Any] | None:
    client = client_of(request.endpoint)
    for with_states in (True, False):
        items, echoes = input_items(request, [], with_states=with_states)
        body: dict[str, object] = {"model": request.model, "input": items, **cache_key(request)}
        if system := instructions(request):
            body["instructions"] = system
        try:
            return _json(await client.post("/responses/compact", cast_to=object, body=body))
        except Exception as error:
            if echoes and refuses_state(getattr(error, "code", None), error):
                continue
            failure = model_error(error)
            if _status(error) in _CANNOT_COMPACT and failure.kind in _NO_SUCH_SERVICE:
                return None
            raise failure from None
    return None


async def _drain(arriving: AsyncIterator[object]) -> None:
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in arriving:
                pass
    except Exception:  # noqa: S110  # the answer is whole; what is lost is a warm connection
        pass


def _path(response_id: str) -> str:
    return f"/responses/{quote(response_id, safe='')}"


def _json(raw: object) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else {}


def _status(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _reported(error: Exception) -> ProviderFailure | None:
    """The SDK raises for an event with an error object in it, and only for that."""
    import openai

    if not isinstance(error, openai.APIError) or isinstance(error, openai.APIStatusError | openai.APIConnectionError):
        return None
    return ProviderFailure(_json(error.body), error)


def _is_broken_connection(error: Exception) -> bool:
    import httpx2
    import openai

    return isinstance(error, openai.APIConnectionError | httpx2.TransportError | OSError)
