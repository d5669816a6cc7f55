"""The driver for every server with `/chat/completions`: OpenAI-compatible ones, OpenRouter, Fireworks, Gemini.

The SDK makes the request, but chunks are read here and as plain JSON: many servers leave out or add what the SDK's types rely on,
and its reader swallows the comments by which a gateway says that its model is still thinking.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final, Protocol

from activities.llm.openai_chat_request import DRIVER, dialect_of, prepare
from activities.llm.openai_chat_stream import ChatStream
from activities.llm.openai_sdk import client_of, key_of, list_models, model_error
from domain.model import DiscoveredModel, ModelEndpoint, ModelRequest, StreamEvent

_PATH: Final = "/chat/completions"
_DRAIN_SECONDS: Final = 0.5
"""A connection can serve again only when its answer was read to the end, which should be there already."""


class OpenAIChat:
    name = DRIVER

    async def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        import httpx2

        client = client_of(request.endpoint)
        key = key_of(request.endpoint)
        prepared = prepare(request)
        answer = ChatStream(request, dialect_of(request.endpoint), prepared.dropped, key.reveal() if key else None)
        try:
            response = await client.post(_PATH, cast_to=httpx2.Response, body=prepared.body, stream=True)
            try:
                async with aclosing(_chunks(response)) as chunks:
                    async for chunk in chunks:
                        for event in answer.read(chunk):
                            yield event
            finally:
                # Whoever stops listening stops the generation: servers notice by the closed connection.
                await response.aclose()
        except Exception as error:
            raise model_error(error) from None
        for event in answer.finish():
            yield event

    async def list_models(self, endpoint: ModelEndpoint) -> list[DiscoveredModel]:
        return await list_models(endpoint)


class _Response(Protocol):
    @property
    def headers(self) -> _Headers: ...
    def aiter_lines(self) -> AsyncIterator[str]: ...
    async def aread(self) -> bytes: ...


class _Headers(Protocol):
    def get(self, key: str, default: str, /) -> str: ...


async def _chunks(response: _Response) -> AsyncGenerator[object, None]:
    """The JSON of each event; None for a comment. A server that does not stream gives its whole answer as one chunk."""
    if response.headers.get("content-type", "").startswith("application/json"):
        yield json.loads(await response.aread())
        return
    lines = response.aiter_lines()
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif line.startswith(":"):
            yield None
        elif not line and data:
            text = "\n".join(data)
            data = []
            if text.startswith("[DONE]"):
                await _drain(lines)
                return
            # Not msgspec: some servers write NaN among their probabilities.
            yield json.loads(text)


async def _drain(lines: AsyncIterator[str]) -> None:
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in lines:
                pass
    except TimeoutError:
        pass
