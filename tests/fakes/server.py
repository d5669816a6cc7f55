"""What the fakes share: an ASGI app that records requests, hands out scripted answers and writes server-sent events."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

from tests.conftest import served
from tests.fakes.script import Answer

Json = dict[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HELLO: Final = Answer(text=["Hello", " there."])


async def received(receive: Receive) -> bytes:
    """The whole body of a request."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


class Recorded(Struct, frozen=True, kw_only=True):
    """A request as it arrived. Header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Json


class ClientGone(Exception):
    """The client closed the connection before the answer was over"""


class AbruptEnd(Exception):
    """Raised by a fake to drop the connection in the middle of a stream"""


class Exchange:
    """One request and the way to answer it."""

    def __init__(self, request: Recorded, receive: Receive, send: Send) -> None:
        self.request = request
        self._receive = receive
        self._send = send
        self._gone = asyncio.Event()
        self._streaming = False

    async def json(self, body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = msgspec.json.encode(body)
        sent = {"content-type": "application/json", **(headers or {})}
        await self._send({"type": "http.response.start", "status": status, "headers": _raw(sent)})
        await self._send({"type": "http.response.body", "body": content})

    @asynccontextmanager
    async def stream(self, headers: Mapping[str, str] | None = None) -> AsyncIterator[None]:
        """Around `event` calls. Inside, `ClientGone` is raised at the next event once the client has left."""
        sent = {"content-type": "text/event-stream", **(headers or {})}
        await self._send({"type": "http.response.start", "status": 200, "headers": _raw(sent)})
        watching = asyncio.create_task(self._watch())
        try:
            yield
            await self._send({"type": "http.response.body", "body": b""})
        finally:
            watching.cancel()

    async def event(self, data: object, *, event: str | None = None) -> None:
        """One server-sent event; `data` is JSON unless it is a str."""
        if self._gone.is_set():
            raise ClientGone
        text = data if isinstance(data, str) else msgspec.json.encode(data).decode()
        frame = (f"event: {event}\n" if event else "") + f"data: {text}\n\n"
        await self._send({"type": "http.response.body", "body": frame.encode(), "more_body": True})

    async def pause(self, seconds: float) -> None:
        """Wait, unless the client leaves first, which raises `ClientGone`."""
        try:
            async with asyncio.timeout(seconds):
                await self._gone.wait()
        except TimeoutError:
            return
        raise ClientGone

    async def until(self, event: asyncio.Event) -> None:
        """Wait for the event, unless the client leaves first, which raises `ClientGone`."""
        waiting = {asyncio.ensure_future(either.wait()) for either in (event, self._gone)}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
        if not event.is_set():
            raise ClientGone

    async def stall(self) -> None:
        """Send nothing more until the client leaves."""
        await self._gone.wait()
        raise ClientGone

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


class FakeProvider:
    """Subclasses implement `handle` for their routes and call `next_answer` for each model call."""

    provider_type: ClassVar[str]
    """Of `domain.providers`; what a test creates a provider with."""
    base_path: ClassVar[str] = ""
    """What comes after the origin in the provider's `base_url`."""

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.origin = ""
        self.open_streams = 0
        self.clients_gone = 0
        """How many streams the client closed before they were over: what a cancelled call looks like from here."""
        self._answers: deque[Answer] = deque()
        self._ids = itertools.count(1)

    @property
    def url(self) -> str:
        """The provider's `base_url`."""
        return self.origin + self.base_path

    def play(self, *answers: Answer) -> None:
        """Answer the next model calls with these; when they are used up, with `HELLO`."""
        self._answers.extend(answers)

    def next_answer(self) -> Answer:
        return self._answers.popleft() if self._answers else HELLO

    def new_id(self, prefix: str) -> str:
        return f"{prefix}{next(self._ids):04d}"

    async def handle(self, exchange: Exchange) -> None:
        raise NotImplementedError

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeProvider]:
        async with served(self) as origin:  # type: ignore[arg-type]  # any ASGI app
            self.origin = origin
            yield self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await received(receive)
        request = Recorded(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode(),
            headers={name.decode().lower(): value.decode() for name, value in scope["headers"]},
            body=msgspec.json.decode(body) if body else {},
        )
        self.requests.append(request)
        self.open_streams += 1
        try:
            await self.handle(Exchange(request, receive, send))
        except ClientGone:
            self.clients_gone += 1
        finally:
            self.open_streams -= 1
