"""A client that costs next to nothing: raw asyncio, no HTTP library, so that the CPU is left to what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Self
from urllib.parse import urlsplit

import msgspec

Json = dict[str, object]
OnEvent = Callable[[bytes, bytes, float], None]
"""Type of the event, its whole frame, and when it came (`time.time()`)."""

TURN_SECONDS: Final = 30.0


class Api:
    """One keep-alive connection. Raises `RuntimeError` for an answer that is no success."""

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        self.host = parts.hostname or ""
        self.port = parts.port or 80
        self.path = parts.path
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def _connect(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader, self._writer = await asyncio.open_connection(self.host, self.port)

    async def __aexit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    async def get(self, path: str) -> bytes:
        return await self._request(f"GET {self.path}{path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())

    async def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return await self._request(head.encode() + body)

    async def create(self, path: str, body: Json) -> str:
        """POST, and the id of what was created."""
        return msgspec.json.decode(await self.post(path, msgspec.json.encode(body)), type=dict)["id"]

    async def _request(self, request: bytes) -> bytes:
        assert self._reader is not None
        if self._reader.at_eof():  # The server closes connections that were idle for a few seconds.
            await self._connect()
        assert self._writer is not None
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        at = lowered.index(b"content-length:") + 15
        body = await self._reader.readexactly(int(lowered[at : lowered.index(b"\r\n", at)]))
        if not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"{request[:80]!r}: {head[:40]!r} {body[:300]!r}")
        return body


class EventStream(asyncio.Protocol):
    """One SSE connection. Frames are cut at the blank line; the server never splits one over two HTTP chunks."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False

    @classmethod
    async def open(cls, api: Api, session: str, on_event: OnEvent, *, query: str = "") -> Self:
        """Open and wait for the server's first frame."""
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(on_event), api.host, api.port)
        assert stream._transport is not None
        request = f"GET {api.path}/sessions/{session}/sse{query} HTTP/1.1\r\nHost: {api.host}\r\n\r\n"
        stream._transport.write(request.encode())
        async with asyncio.timeout(TURN_SECONDS):
            await stream.connected
        return stream

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are no subclass of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.connected.done():
            self.connected.set_exception(ConnectionError("the stream was not opened"))

    def data_received(self, data: bytes) -> None:
        now = time.time()
        *frames, self._tail = (self._tail + data).split(b"\n\n")
        for frame in frames:
            begin = frame.find(b"event: ")
            if begin < 0:  # a heartbeat
                continue
            kind = frame[begin + 7 : frame.index(b"\n", begin)]
            if kind == b"connected":
                if not self.connected.done():
                    self.connected.set_result(None)
                continue
            self._on_event(kind, frame, now)
        if not self.connected.done() and self._tail.startswith(b"HTTP/1.1") and b" 200 " not in self._tail[:16]:
            self.connected.set_exception(RuntimeError(self._tail[:300].decode()))


class TurnTimes(msgspec.Struct, kw_only=True):
    """Moments of one turn as its client saw them, in seconds of `time.time()`; 0 for what did not come."""

    posted: float = 0.0
    answered: float = 0.0
    first_delta: float = 0.0
    idled: float = 0.0

    @property
    def to_answer_ms(self) -> float:
        return (self.answered - self.posted) * 1000

    @property
    def to_first_delta_ms(self) -> float:
        return (self.first_delta - self.posted) * 1000

    @property
    def to_idle_ms(self) -> float:
        return (self.idled - self.posted) * 1000


class Conversation:
    """A session, the connection its messages go through, and the stream that follows it: what an SDK client holds."""

    def __init__(self, api: Api, session: str) -> None:
        self.api = api
        self.session = session
        self._stream: EventStream | None = None
        self._times = TurnTimes()
        self._idle: asyncio.Future[None] | None = None

    @classmethod
    async def begin(cls, api: Api, body: Json) -> Self:
        return await cls.join(api, await api.create("/sessions", body))

    @classmethod
    async def join(cls, api: Api, session: str, *, query: str = "") -> Self:
        conversation = cls(api, session)
        conversation._stream = await EventStream.open(api, session, conversation._event, query=query)
        return conversation

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    async def turn(self, message: bytes) -> TurnTimes:
        """Post a message and wait until the stream says that the session rests."""
        self._idle = asyncio.get_running_loop().create_future()
        times = self._times = TurnTimes(posted=time.time())
        async with asyncio.timeout(TURN_SECONDS):
            await self.api.post(f"/sessions/{self.session}/messages", message)
            times.answered = time.time()
            await self._idle
        return times

    def _event(self, kind: bytes, frame: bytes, at: float) -> None:
        if kind == b"output.message.delta" and not self._times.first_delta:
            self._times.first_delta = at
        elif kind == b"session.idled" and self._idle is not None and not self._idle.done():
            self._times.idled = at
            self._idle.set_result(None)


def message(text: str, llmsim: Json | None = None) -> bytes:
    """The body of POST messages; `llmsim` scripts the simulated model."""
    body: Json = {"message": {"content": [{"type": "text", "text": text}]}}
    if llmsim is not None:
        body["metadata"] = {"llmsim": llmsim}
    return msgspec.json.encode(body)
