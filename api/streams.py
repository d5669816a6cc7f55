"""Live event streams: one feed per session and process, any number of readers.

A feed keeps the newest frames in a bounded ring, encoded once for everybody. A reader has a cursor and nothing else: while
its cursor is inside the ring it takes frames from there, when it has fallen behind (or just came) it reads pages from the log
until it has caught up. So a slow client costs its socket buffer, never a queue; nothing is skipped, and order is the log's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, TypeVar

import structlog
from msgspec import Struct

from api.frames import CONNECTED, HEARTBEAT, disconnecting, sse_frame
from db.event_log import EventLog
from domain.errors import TooManyStreams
from domain.events import Accumulator, StoredEvent
from infra.event_bus import EventBus

RING_EVENTS: Final = 2_000
RING_BYTES: Final = 1_000_000
PAGE_EVENTS: Final = 500
CYCLE_JITTER: Final = 0.2
"""Streams opened together must not all come back together."""

log = structlog.get_logger(__name__)
Key = TypeVar("Key")


class StreamLimits(Struct, frozen=True, kw_only=True):
    everywhere: int
    per_session: int
    per_org: int


class StreamTiming(Struct, frozen=True, kw_only=True):
    cycle_seconds: float
    heartbeat_seconds: float


class Selection(Struct, frozen=True):
    """Which types a reader wants; `exclude` is applied after `types`."""

    types: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()

    def wants(self, event_type: str) -> bool:
        return (self.types is None or event_type in self.types) and event_type not in self.exclude


class _Frame(Struct, frozen=True):
    sequence: int
    type: str
    data: bytes


async def encode_page(log: EventLog, events: Sequence[StoredEvent], accumulator: Accumulator) -> list[_Frame]:
    """Frames of consecutive events. A delta whose beginning lies before the page gets it from the log."""
    frames: list[_Frame] = []
    for event in events:
        if event.type in Accumulator.TYPES and not accumulator.knows(event):
            accumulator.prime(event, await log.text_before(event))
        frames.append(_Frame(event.sequence, event.type, sse_frame(event, accumulator)))
    return frames


class _Feed:
    """The newest frames of one session. `position` is the sequence up to which the ring is complete."""

    def __init__(self, session_id: str, log: EventLog) -> None:
        self.session_id = session_id
        self.position = 0
        self.readers = 0
        self._log = log
        self._ring: deque[_Frame] = deque()
        self._bytes = 0
        self._accumulator = Accumulator()
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._known = 0
        self._ready: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Find out where the log is. Frames from here on are in the ring; older ones come from the log."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._find_position())
        await asyncio.shield(self._ready)

    async def _find_position(self) -> None:
        self.position = await self._log.last_sequence(self.session_id)
        if self._known > self.position:
            self._catch_up()

    def committed(self, events: Sequence[StoredEvent]) -> None:
        self._known = max(self._known, events[-1].sequence)
        ready = self._ready is not None and self._ready.done()
        fresh = [event for event in events if event.sequence > self.position]
        in_order = bool(fresh) and fresh[0].sequence == self.position + 1 and self._reading is None
        if ready and in_order and all(self._encodable(event) for event in fresh):
            self._append([_Frame(e.sequence, e.type, sse_frame(e, self._accumulator)) for e in fresh])
        elif ready and fresh:
            self._catch_up()

    def advanced(self, sequence: int | None) -> None:
        if sequence is not None and sequence <= self.position:
            return
        self._known = max(self._known, sequence or self._known + 1)
        if self._ready is not None and self._ready.done():
            self._catch_up()

    def _encodable(self, event: StoredEvent) -> bool:
        return event.type not in Accumulator.TYPES or self._accumulator.knows(event)

    def _catch_up(self) -> None:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        try:
            while True:
                wanted = self._known
                events = await self._log.read(self.session_id, after_sequence=self.position, limit=PAGE_EVENTS)
                self._append(await encode_page(self._log, events, self._accumulator))
                if not events and wanted == self._known:
                    self._known = self.position
                    return
                if len(events) < PAGE_EVENTS and self._known <= self.position:
                    return
        except Exception:
            # The readers see no progress now; the next notification or the listener's return starts another try.
            log.exception("reading the log for a stream failed", session_id=self.session_id)
        finally:
            self._reading = None

    def _append(self, frames: Sequence[_Frame]) -> None:
        for frame in frames:
            self._ring.append(frame)
            self._bytes += len(frame.data)
            self.position = frame.sequence
        while self._ring and (len(self._ring) > RING_EVENTS or self._bytes > RING_BYTES):
            self._bytes -= len(self._ring.popleft().data)
        if frames:
            self.poke()

    def poke(self) -> None:
        """Have every reader look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def after(self, cursor: int) -> list[_Frame] | None:
        """Frames after a cursor, or None when the ring does not reach back that far."""
        if cursor >= self.position:
            return []
        first = self._ring[0].sequence if self._ring else self.position + 1
        if cursor + 1 < first:
            return None
        return [self._ring[-back] for back in range(self.position - cursor, 0, -1)]

    @property
    def changed(self) -> asyncio.Event:
        return self._changed

    def close(self) -> None:
        for task in (self._reading, self._ready):
            if task is not None:
                task.cancel()


class StreamHub:
    """All open streams of this process: their feeds, their limits, and the way they end together."""

    def __init__(
        self, log: EventLog, bus: EventBus, limits: StreamLimits, timing: StreamTiming, drain: asyncio.Event
    ) -> None:
        self._log = log
        self._bus = bus
        self._limits = limits
        self._timing = timing
        self._drain = drain
        self._feeds: dict[str, _Feed] = {}
        self._open = 0
        self._per_session: Counter[str] = Counter()
        self._per_org: Counter[int] = Counter()
        self._draining: asyncio.Task[None] | None = None

    @property
    def open_streams(self) -> int:
        return self._open

    def open(self, org_id: int, session_id: str, *, cursor: int, selection: Selection) -> EventStream:
        """A stream from a cursor on. Raises `TooManyStreams` before anything is sent."""
        limits = self._limits
        if self._open >= limits.everywhere:
            raise TooManyStreams("global SSE connection limit reached")
        if self._per_session[session_id] >= limits.per_session:
            raise TooManyStreams("per-session SSE connection limit reached")
        if self._per_org[org_id] >= limits.per_org:
            raise TooManyStreams("per-organization SSE connection limit reached")
        if self._draining is None:
            self._draining = asyncio.create_task(self._end_all_on_drain())
        self._open += 1
        self._per_session[session_id] += 1
        self._per_org[org_id] += 1
        feed = self._feeds.get(session_id)
        if feed is None:
            feed = self._feeds[session_id] = _Feed(session_id, self._log)
            self._bus.attach(session_id, feed)
        feed.readers += 1
        return EventStream(self._frames(feed, cursor, selection), lambda: self._release(org_id, session_id, feed))

    def _release(self, org_id: int, session_id: str, feed: _Feed) -> None:
        self._open -= 1
        _take_one(self._per_session, session_id)
        _take_one(self._per_org, org_id)
        feed.readers -= 1
        if feed.readers == 0:
            self._bus.detach(session_id, feed)
            self._feeds.pop(session_id, None)
            feed.close()

    async def _frames(self, feed: _Feed, cursor: int, selection: Selection) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        jitter = random.uniform(1 - CYCLE_JITTER, 1 + CYCLE_JITTER)  # noqa: S311  # spreads load, guards nothing
        ends_at = loop.time() + self._timing.cycle_seconds * jitter
        yield CONNECTED
        await feed.ready()
        accumulator: Accumulator | None = None
        while not self._drain.is_set():
            changed = feed.changed
            frames = feed.after(cursor)
            if frames is None:
                accumulator = accumulator or Accumulator()
                events = await self._log.read(feed.session_id, after_sequence=cursor, limit=PAGE_EVENTS)
                frames = await encode_page(self._log, events, accumulator)
            else:
                accumulator = None
            if frames:
                cursor = frames[-1].sequence
                data = b"".join(frame.data for frame in frames if selection.wants(frame.type))
                if data:
                    yield data
                if loop.time() >= ends_at:
                    break
                continue
            remaining = ends_at - loop.time()
            if remaining <= 0:
                break
            try:
                async with asyncio.timeout(min(remaining, self._timing.heartbeat_seconds)):
                    await changed.wait()
            except TimeoutError:
                if loop.time() < ends_at:
                    yield HEARTBEAT
        yield disconnecting("shutdown" if self._drain.is_set() else "connection_cycle")

    async def _end_all_on_drain(self) -> None:
        await self._drain.wait()
        for feed in self._feeds.values():
            feed.poke()


def _take_one(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]


class EventStream(AsyncIterator[bytes]):
    """The chunks of one open stream. Its slot is freed exactly once: at the end, on a cancel, or when it is dropped.

    Dropped, because a client may disconnect while a chunk is being sent: then the framework cancels the sending and nobody
    asks this iterator again.
    """

    def __init__(self, frames: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        self._frames = frames
        self._finalizer = weakref.finalize(self, release)
        self._finalizer.atexit = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._frames)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self._finalizer()

    async def aclose(self) -> None:
        self.release()
        close = getattr(self._frames, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):
                await close()
