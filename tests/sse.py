"""An SSE reader on a bare socket, for what no HTTP client lets a test do: read slowly, not at all, or hang up with a reset.

And `ApiProcess`: the API and its streams on a real socket in this event loop, with limits and timing of the test's choice and
no engine behind it. Two of them on one database know of each other's events by notification only, as two processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlencode, urlsplit

import asyncpg
import msgspec
from msgspec import Struct

from activities.capabilities.registry import builtin_registry
from activities.mcp.authorization import McpAuthorization
from activities.mcp.source import McpSource
from api.app import create_app
from api.background import BackgroundTasks
from api.services import Services
from api.streams import StreamHub, StreamLimits, StreamTiming
from cli.engine import discover_models
from db.database import Database
from db.event_log import EventLog
from db.mcp_directory import DatabaseDirectory
from db.messages import MessageStore
from db.schedules import ScheduleStore
from db.scheduling import Scheduling
from db.session_tasks import TaskStore
from domain.ports import TurnGateway
from infra.encryption import Keyring
from infra.event_bus import EventBus
from infra.http_server import HttpServer, bind
from infra.network import LOOPBACK
from infra.settings import load_settings
from tests.fakes.schedule_clock import FakeClock

FRAME_SECONDS = 20.0
"""For a busy machine; a frame takes milliseconds."""

Json = dict[str, object]


class Frame(Struct, frozen=True, kw_only=True):
    """One SSE frame. A comment has neither event nor data. `raw` is what came over the wire."""

    raw: bytes
    event: str | None = None
    id: str | None = None
    retry: int | None = None
    data: bytes | None = None

    @property
    def json(self) -> Json:
        assert self.data is not None
        return msgspec.json.decode(self.data, type=Json)

    @property
    def sequence(self) -> int:
        return msgspec.convert(self.json["sequence"], int)

    @property
    def payload(self) -> Json:
        return msgspec.convert(self.json["data"], Json)


def parsed(raw: bytes) -> Frame:
    fields: dict[str, str | bytes] = {}
    for line in raw.decode().split("\n"):
        name, _, value = line.partition(": ")
        assert name not in fields, f"a field twice: {raw!r}"
        fields[name] = value
    unknown = set(fields) - {"event", "id", "retry", "data", ""}
    assert not unknown, f"unexpected fields {unknown}: {raw!r}"
    data = fields.get("data")
    return Frame(
        raw=raw,
        event=str(fields["event"]) if "event" in fields else None,
        id=str(fields["id"]) if "id" in fields else None,
        retry=int(fields["retry"]) if "retry" in fields else None,
        data=None if data is None else str(data).encode(),
    )


class SseConnection:
    """One `GET …/sse`. `async with SseConnection(…) as stream`, or `open` and `close`/`reset` by hand."""

    def __init__(
        self,
        url: str,
        parameters: Mapping[str, str | int | Sequence[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        receive_buffer: int | None = None,
    ) -> None:
        self._url = urlsplit(url)
        query = urlencode(parameters or {}, doseq=True)
        self._target = self._url.path + (f"?{query}" if query else "")
        self._headers = {"Host": self._url.netloc, "Accept": "text/event-stream", **(headers or {})}
        self._receive_buffer = receive_buffer
        self._body = b""
        self._ended = False
        self.status = 0
        self.headers: dict[str, str] = {}

    async def open(self) -> Self:
        connection = socket.socket()
        if self._receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (self._url.hostname or LOOPBACK, self._url.port))
        self._socket = connection
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=16 * 1024)
        lines = [f"GET {self._target} HTTP/1.1", *(f"{name}: {value}" for name, value in self._headers.items())]
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), FRAME_SECONDS)
        first, *rest = head.decode().strip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def reset(self) -> None:
        """Hang up the hard way: the peer gets an RST, with data of its own still under way."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        await asyncio.sleep(0)

    async def _chunk(self) -> bytes:
        """The next piece of the body; empty at its proper end. Raises `IncompleteReadError` when it is cut."""
        size = int(await self._reader.readline() or b"-1", 16)
        if size < 0:
            raise asyncio.IncompleteReadError(b"", None)
        piece = await self._reader.readexactly(size)
        await self._reader.readexactly(2)
        return piece

    async def raw_frame(self) -> bytes | None:
        """The bytes of the next frame without its empty line, None at the proper end of the body."""
        while b"\n\n" not in self._body:
            if self._ended:
                assert not self._body, f"cut in the middle of a frame: {self._body[:200]!r}"
                return None
            piece = await self._chunk()
            self._ended = not piece
            self._body += piece
        raw, _, self._body = self._body.partition(b"\n\n")
        return raw

    async def next(self, seconds: float = FRAME_SECONDS) -> Frame | None:
        """The next frame, None at the end. Raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            raw = await self.raw_frame()
        return None if raw is None else parsed(raw)

    async def expect(self, event: str, seconds: float = FRAME_SECONDS) -> Frame:
        frame = await self.next(seconds)
        assert frame is not None, f"the stream ended instead of `{event}`"
        assert frame.event == event, f"{frame.event or frame.raw!r} instead of {event}"
        return frame

    async def take(self, count: int, seconds: float = FRAME_SECONDS) -> list[Frame]:
        """The next `count` events; comments and `connected` do not count."""
        frames: list[Frame] = []
        async with asyncio.timeout(seconds):
            while len(frames) < count:
                frame = await self.next(seconds)
                assert frame is not None, f"the stream ended after {len(frames)} of {count} events"
                if frame.id is not None:
                    frames.append(frame)
        return frames

    async def rest(self, seconds: float = FRAME_SECONDS) -> list[Frame]:
        """Every frame until the end."""
        frames: list[Frame] = []
        while (frame := await self.next(seconds)) is not None:
            frames.append(frame)
        return frames

    async def body(self) -> bytes:
        """The body of an answer that is no stream."""
        return await asyncio.wait_for(self._reader.readexactly(int(self.headers["content-length"])), FRAME_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ApiProcess:
    url: str
    log: EventLog
    bus: EventBus
    hub: StreamHub
    server: HttpServer

    def sse(self, session_id: str) -> str:
        return f"{self.url}/sessions/{session_id}/sse"


@contextlib.asynccontextmanager
async def api_process(
    database: Database,
    dsn: str,
    turns: TurnGateway,
    *,
    everywhere: int = 1_000,
    per_session: int = 100,
    per_org: int = 1_000,
    cycle_seconds: float = 300,
    heartbeat_seconds: float = 30,
) -> AsyncIterator[ApiProcess]:
    """An API on the database, with a pool and an event bus of its own (Piccolo knows one engine a process, so that is shared)."""
    drain = asyncio.Event()
    async with asyncpg.create_pool(dsn, min_size=1, max_size=5) as pool:
        bus = EventBus()
        log = EventLog(pool, bus)
        hub = StreamHub(
            log,
            bus,
            StreamLimits(everywhere=everywhere, per_session=per_session, per_org=per_org),
            StreamTiming(cycle_seconds=cycle_seconds, heartbeat_seconds=heartbeat_seconds),
            drain,
        )
        background = BackgroundTasks()
        services = Services(
            settings=load_settings({"DEV_MODE": "true", "DATABASE_URL": dsn}),
            database=database,
            log=log,
            capabilities=builtin_registry(),
            turns=turns,
            messages=MessageStore(log),
            tasks=TaskStore(log, turns),
            scheduling=Scheduling(ScheduleStore(log, MessageStore(log)), FakeClock()),
            streams=hub,
            background=background,
            keyring=Keyring.of(None, None),
            discover_models=discover_models,
            discover_mcp_tools=McpSource(DatabaseDirectory(database.pool, Keyring.of(None, None))).discover,
            mcp_authorizer=McpAuthorization(()),
            check_model_options=lambda provider_type, options: None,
            check_message_metadata=lambda metadata: None,
            version="0.0.0",
        )
        listener = bind(LOOPBACK, 0)
        server = HttpServer(create_app(services), drain)
        await bus.listen(dsn)
        serving = asyncio.create_task(server.serve_on(listener))
        await server.ready.wait()
        try:
            yield ApiProcess(
                url=f"http://{LOOPBACK}:{listener.getsockname()[1]}/api/v1", log=log, bus=bus, hub=hub, server=server
            )
        finally:
            server.stop()
            await serving
            await background.close(1)
            await bus.close()


async def until(condition: Callable[[], bool], seconds: float = FRAME_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event to tell of it
            await asyncio.sleep(0.01)
