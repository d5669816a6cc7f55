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
SLICE_BYTES: Final = 256 * 1024
"""Encoded and sent at a time: the deltas of a long message, each with all its text so far, make megabytes of one page."""
READ_RETRY_SECONDS: Final = 0.5
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


async def encode_slice(log: EventLog, events: Sequence[StoredEvent], accumulator: Accumulator) -> list[_Frame]:
    """Frames of the first of these consecutive events: at least one, and about `SLICE_BYTES`.

    A delta whose beginning lies before them gets it from the log.
    """
    frames: list[_Frame] = []
    size = 0
    for event in events:
        if event.type in Accumulator.TYPES and not accumulator.knows(event):
            accumulator.prime(event, await log.text_before(event))
        frames.append(_Frame(event.sequence, event.type, sse_frame(event, accumulator)))
        size += len(frames[-1].data)
        if size >= SLICE_BYTES:
            break
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
        self._positioned = False
        self._positioning: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Find out where the log is. Frames from here on are in the ring; older ones come from the log."""
        if self._positioned:
            return
        # One query for all who wait; when it fails they fail, and the next reader asks again.
        if self._positioning is None or self._positioning.done():
            self._positioning = asyncio.create_task(self._find_position())
        await asyncio.shield(self._positioning)

    async def _find_position(self) -> None:
        self.position = await self._log.last_sequence(self.session_id)
        self._positioned = True
        if self._known > self.position:
            self._catch_up()

    def committed(self, events: Sequence[StoredEvent]) -> None:
        self._known = max(self._known, events[-1].sequence)
        fresh = [event for event in events if event.sequence > self.position]
        in_order = bool(fresh) and fresh[0].sequence == self.position + 1 and self._reading is None
        if self._positioned and in_order and all(self._encodable(event) for event in fresh):
            self._append([_Frame(e.sequence, e.type, sse_frame(e, self._accumulator)) for e in fresh])
        elif self._positioned and fresh:
            self._catch_up()

    def advanced(self, sequence: int | None) -> None:
        if sequence is not None and sequence <= self.position:
            return
        self._known = max(self._known, sequence or self._known + 1)
        if self._positioned:
            self._catch_up()

    def _encodable(self, event: StoredEvent) -> bool:
        return event.type not in Accumulator.TYPES or self._accumulator.knows(event)

    def _catch_up(self) -> None:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        try:
            while True:
                try:
                    await self._read_to_end()
                except Exception as error:
                    # Nobody may ever tell us again that there is something to read.
                    log.warning(
                        "reading the log for a stream failed", session_id=self.session_id, error=type(error).__name__
                    )
                    await asyncio.sleep(READ_RETRY_SECONDS)
                else:
                    return
        finally:
            self._reading = None

    async def _read_to_end(self) -> None:
        while True:
            wanted = self._known
            events = await self._log.read(self.session_id, after_sequence=self.position, limit=PAGE_EVENTS)
            full = len(events) == PAGE_EVENTS
            while events:
                frames = await encode_slice(self._log, events, self._accumulator)
                self._append(frames)
                events = events[len(frames) :]
            if full:
                continue
            if self._known <= self.position:
                return
            if wanted == self._known:
                # What was announced is not there (yet): its transaction was rolled back, or we were told to just look.
                self._known = self.position
                return

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
        """The next frames after a cursor, or None when the ring does not reach back that far."""
        if cursor >= self.position:
            return []
        first = self._ring[0].sequence if self._ring else self.position + 1
        if cursor + 1 < first:
            return None
        frames: list[_Frame] = []
        size = 0
        for back in range(self.position - cursor, 0, -1):
            frames.append(self._ring[-back])
            size += len(frames[-1].data)
            if size >= SLICE_BYTES:
                break
        return frames

    @property
    def changed(self) -> asyncio.Event:
        return self._changed

    def close(self) -> None:
        for task in (self._reading, self._positioning):
            if task is not None:
                task.cancel()


class _Growth:
    """A reader of the bus that only tells that there is something to read."""

    def __init__(self) -> None:
        self.grown = asyncio.Event()

    def committed(self, events: Sequence[StoredEvent]) -> None:
        self.grown.set()

    def advanced(self, sequence: int | None) -> None:
        self.grown.set()


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

    @contextlib.asynccontextmanager
    async def watch(self, session_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever the session's log may have grown, for somebody who reads the log then."""
        sink = _Growth()
        self._bus.attach(session_id, sink)
        try:
            yield sink.grown
        finally:
            self._bus.detach(session_id, sink)

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
        beats_at = loop.time() + self._timing.heartbeat_seconds
        accumulator: Accumulator | None = None
        backlog: list[StoredEvent] = []
        reason = "connection_cycle"
        yield CONNECTED
        try:
            await feed.ready()
            while not self._drain.is_set() and loop.time() < ends_at:
                changed = feed.changed
                frames = feed.after(cursor)
                if frames is None:
                    if not backlog:
                        backlog = await self._log.read(feed.session_id, after_sequence=cursor, limit=PAGE_EVENTS)
                    accumulator = accumulator or Accumulator()
                    frames = await encode_slice(self._log, backlog, accumulator)
                    backlog = backlog[len(frames) :]
                else:
                    backlog, accumulator = [], None
                if frames:
                    cursor = frames[-1].sequence
                    data = b"".join(frame.data for frame in frames if selection.wants(frame.type))
                    if data:
                        yield data
                        beats_at = loop.time() + self._timing.heartbeat_seconds
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(ends_at, beats_at)):
                        await changed.wait()
                if loop.time() >= beats_at:
                    yield HEARTBEAT
                    beats_at = loop.time() + self._timing.heartbeat_seconds
        except Exception:
            log.exception("an event stream failed", session_id=feed.session_id)
            reason = "error"
        yield disconnecting("shutdown" if self._drain.is_set() else reason)

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
