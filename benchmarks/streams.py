"""Cells about event streams and long logs: fan-out, replay, and whether turn 10,000 costs what turn 1 costs."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from benchmarks.client import Conversation, EventStream
from benchmarks.long_log import TurnTemplate, fill
from benchmarks.measurement import Figure, latency, p50, rss_bytes
from benchmarks.scope import Scope
from benchmarks.stack import ONE_TOOL_SCRIPT, Stack
from benchmarks.turns import turn_after_pause, whole_log
from domain.events import NewEvent, ToolProgress

FAN_OUT_SESSIONS: Final = 50
FAN_OUT_STREAMS: Final = 1_000
EVENTS_PER_SECOND: Final = 100
TICK_SECONDS: Final = 0.02
BURST_EVENTS: Final = 20
HEARTBEAT_SECONDS: Final = 5
"""Six times the default rate, so that the idle time that is measured has a heartbeat of every stream in it."""

SPARE_FILES: Final = 100
REPLAY_EVENTS: Final = 20_000
WINDOW_TURNS: Final = 400
"""Enough that the window of newest events a prompt is built from is full: from here on a turn's cost must not grow."""

_stamp = b'"message":"'


class Reader:
    """One open stream: how many events came, and how old each was."""

    def __init__(self) -> None:
        self.seen = 0
        self.ages_ms: list[float] = []
        self.wanted = 0
        self.enough: asyncio.Future[None] | None = None
        self.stream: EventStream | None = None

    def event(self, kind: bytes, frame: bytes, at: float) -> None:
        self.seen += 1
        begin = frame.find(_stamp)
        if begin > 0:
            begin += len(_stamp)
            self.ages_ms.append((at - float(frame[begin : frame.index(b'"', begin)])) * 1000)
        if self.enough is not None and self.seen >= self.wanted and not self.enough.done():
            self.enough.set_result(None)

    async def until(self, seen: int) -> None:
        if self.seen < seen:
            self.wanted = seen
            self.enough = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(60):
                await self.enough


def stamped() -> NewEvent:
    return NewEvent(data=ToolProgress(tool_call_id="call_bench", tool_name="bench", message=f"{time.time():.6f}"))


async def fan_out(scope: Scope) -> list[Figure]:
    """Events are appended from this process, as a worker elsewhere does, so they reach the streams by notification."""
    streams = scope.count(FAN_OUT_STREAMS, quick=400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < streams + SPARE_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, streams + SPARE_FILES), hard))
    per_session = streams // FAN_OUT_SESSIONS
    environment = {"SSE_HEARTBEAT_INTERVAL_SECS": str(HEARTBEAT_SECONDS)}
    async with scope.stack(environment=environment) as stack:
        sessions = [
            await stack.api.create("/sessions", {"harness_name": "base", "title": f"fan-out {number}"})
            for number in range(FAN_OUT_SESSIONS)
        ]
        await _open(stack, sessions[:1], 20, close=True)  # what a process allocates once is no stream's
        before = rss_bytes(stack.pid)
        began = time.monotonic()
        readers = await _open(stack, sessions, per_session)
        opening = time.monotonic() - began
        await asyncio.sleep(1.0)
        per_stream = (rss_bytes(stack.pid) - before) / streams
        async with scope.measured(stack.cpu_clock()) as idle:
            await asyncio.sleep(HEARTBEAT_SECONDS)
        async with scope.measured(stack.cpu_clock()) as paced:
            ages = await _at_a_pace(scope, stack, sessions, readers)
        async with scope.measured(stack.cpu_clock()) as burst:
            delivered, took = await _bursts(scope, stack, sessions, readers)
        every = [reader for group in readers.values() for reader in group]
        lost = sum(reader.stream is None or reader.stream.closed for reader in every)
        uneven = sum(len({reader.seen for reader in group}) > 1 for group in readers.values())
        for reader in every:
            if reader.stream is not None:
                reader.stream.close()
    if lost or uneven:
        raise RuntimeError(f"{lost} streams ended early, readers of {uneven} sessions saw different numbers of events")
    return [
        Figure(name="streams open at once", value=streams, unit="", n=FAN_OUT_SESSIONS),
        Figure(name="streams opened per second, one client", value=streams / opening, unit="/s"),
        Figure(name="memory of the process per open stream", value=per_stream / 1024, unit="KiB"),
        Figure(
            name=f"CPU of the process with all streams idle, a heartbeat every {HEARTBEAT_SECONDS} s",
            value=idle.used["everruns"] / idle.seconds * 100,
            unit="% core",
        ),
        *latency(f"append → client at {EVENTS_PER_SECOND} events/s to {per_session} streams each", ages),
        Figure(
            name="CPU of the process at that pace", value=paced.used["everruns"] / paced.seconds * 100, unit="% core"
        ),
        Figure(name="events delivered, as fast as they go", value=delivered / took, unit="/s", n=delivered),
        Figure(
            name="CPU of the process per delivered event", value=burst.used["everruns"] * 1e6 / delivered, unit="µs"
        ),
    ]


async def from_the_end(stack: Stack, session: str) -> str:
    """The cursor of a client that has read everything so far."""
    return f"?after_sequence={await stack.log.last_sequence(session)}"


async def _open(stack: Stack, sessions: list[str], per_session: int, *, close: bool = False) -> dict[str, list[Reader]]:
    readers: dict[str, list[Reader]] = {}
    for session in sessions:
        group = [Reader() for _ in range(per_session)]
        query = await from_the_end(stack, session)
        opened = await asyncio.gather(
            *(EventStream.open(stack.api, session, reader.event, query=query) for reader in group)
        )
        for reader, stream in zip(group, opened, strict=True):
            reader.stream = stream
            if close:
                stream.close()
        readers[session] = group
    return readers


async def _at_a_pace(scope: Scope, stack: Stack, sessions: list[str], readers: dict[str, list[Reader]]) -> list[float]:
    """A few events of alternating sessions every tick, whether or not the last ones have arrived."""
    ticks = round(scope.seconds(8.0, quick=3.0) / TICK_SECONDS)
    each = round(EVENTS_PER_SECOND * TICK_SECONDS)
    sent: dict[str, int] = defaultdict(int)
    began = time.monotonic()
    for tick in range(ticks):
        chosen = [sessions[(tick * each + number) % len(sessions)] for number in range(each)]
        for session in chosen:
            sent[session] += 1
        await asyncio.gather(*(stack.log.append(session, [stamped()]) for session in chosen))
        await asyncio.sleep(max(0.0, began + (tick + 1) * TICK_SECONDS - time.monotonic()))
    for session, group in readers.items():
        for reader in group:
            await reader.until(sent[session])
    return [age for group in readers.values() for reader in group for age in reader.ages_ms]


async def _bursts(
    scope: Scope, stack: Stack, sessions: list[str], readers: dict[str, list[Reader]]
) -> tuple[int, float]:
    """Every session at once: a batch, and the next one when all its readers have it. Returns deliveries and seconds."""
    rounds = scope.count(10, quick=4)
    before = sum(reader.seen for group in readers.values() for reader in group)
    began = time.monotonic()

    async def one(session: str) -> None:
        group = readers[session]
        for _ in range(rounds):
            wanted = group[0].seen + BURST_EVENTS
            await stack.log.append(session, [stamped() for _ in range(BURST_EVENTS)])
            for reader in group:
                await reader.until(wanted)

    await asyncio.gather(*(one(session) for session in sessions))
    took = time.monotonic() - began
    return sum(reader.seen for group in readers.values() for reader in group) - before, took


async def replay(scope: Scope) -> list[Figure]:
    """One long session read from the start, over the stream and over pages."""
    async with scope.stack() as stack:
        template = await recorded_turn(stack, ONE_TOOL_SCRIPT, "one-tool")
        session = await stack.api.create("/sessions", {"harness_name": "base", "title": "long"})
        turns = REPLAY_EVENTS // template.length + 1
        began = time.monotonic()
        events = await fill(stack.log, session, template, turns)
        appending = time.monotonic() - began
        total = await stack.log.last_sequence(session)
        rates: list[float] = []
        cpu: list[float] = []
        page_rates: list[float] = []
        size = 0
        for _ in range(scope.count(5, quick=2)):
            async with scope.measured(stack.cpu_clock()) as clock:
                reader = Reader()
                began = time.monotonic()
                stream = await EventStream.open(stack.api, session, reader.event)
                await reader.until(total)
                rates.append(reader.seen / (time.monotonic() - began))
                stream.close()
            cpu.append(clock.used["everruns"] * 1e6 / reader.seen)
            began = time.monotonic()
            cursor = read = size = 0
            while True:
                body = await stack.api.get(f"/sessions/{session}/events?limit=1000&after_sequence={cursor}")
                page = msgspec.json.decode(body, type=_Page).data
                read += len(page)
                size += len(body)
                if len(page) < 1000:
                    break
                cursor = page[-1].sequence
            page_rates.append(read / (time.monotonic() - began))
    n = len(rates)
    return [
        Figure(name=f"appended through EventLog.append, {events:,} events", value=events / appending, unit="/s"),
        Figure(
            name="replayed over SSE from the start, median",
            value=p50(rates),
            unit="/s",
            n=n,
            aim=20_000,
            aim_is="at least",
        ),
        Figure(name="replayed over SSE from the start, best", value=max(rates), unit="/s", n=n),
        Figure(name="CPU of the process per replayed event", value=p50(cpu), unit="µs", n=n),
        Figure(name="read with GET /events, pages of 1,000, median", value=p50(page_rates), unit="/s", n=n),
        Figure(name="size of an event on the wire", value=size / events, unit="bytes"),
    ]


class _PageEvent(msgspec.Struct):
    sequence: int


class _Page(msgspec.Struct):
    data: list[_PageEvent]


async def recorded_turn(stack: Stack, script: dict[str, object], model: str) -> TurnTemplate:
    """The second turn of a session: the first has its extras."""
    conversation = await Conversation.begin(stack.api, await stack.create_session_with(script, model))
    await turn_after_pause(conversation)
    await turn_after_pause(conversation)
    conversation.close()
    log = await whole_log(stack, conversation.session)
    start = max(place for place, event in enumerate(log) if event.type == "input.message")
    return TurnTemplate(log[start:])


async def flatness(scope: Scope) -> list[Figure]:
    """Turns of a new session, of one whose prompt window is full, and of one with thousands of turns, in rotation."""
    long_turns = scope.count(10_000, quick=2_000)
    script: dict[str, object] = {"mode": "fixed", "text": "The answer is five."}
    async with scope.stack() as stack:
        template = await recorded_turn(stack, script, "recorded")
        body = await stack.create_session_with(script, "fixed")
        lengths = {"turn 1": 0, f"turn {WINDOW_TURNS}": WINDOW_TURNS, f"turn {long_turns:,}": long_turns}
        sessions: dict[str, str] = {}
        for name, turns in lengths.items():
            sessions[name] = await stack.api.create("/sessions", body)
            await fill(stack.log, sessions[name], template, turns)
        await stack.pool.execute("VACUUM (ANALYZE) events")
        conversations = {
            name: await Conversation.join(stack.api, session, query=await from_the_end(stack, session))
            for name, session in sessions.items()
            if lengths[name]
        }
        turn_ms: dict[str, list[float]] = defaultdict(list)
        request_ms: dict[tuple[str, str], list[float]] = defaultdict(list)
        for conversation in conversations.values():
            for _ in range(3):
                await turn_after_pause(conversation)
        async with scope.measured(stack.cpu_clock()):
            for _ in range(scope.count(40, quick=12)):
                fresh = await Conversation.begin(stack.api, body)
                turn_ms["turn 1"].append((await turn_after_pause(fresh)).to_idle_ms)
                fresh.close()
                sessions["turn 1"] = fresh.session
                for name, conversation in conversations.items():
                    turn_ms[name].append((await turn_after_pause(conversation)).to_idle_ms)
            for _ in range(scope.count(5, quick=2)):
                for name, session in sessions.items():
                    for what, request in _requests(stack, session).items():
                        began = time.monotonic()
                        await request()
                        request_ms[what, name].append((time.monotonic() - began) * 1000)
        for conversation in conversations.values():
            conversation.close()
        events = await stack.log.last_sequence(sessions[f"turn {long_turns:,}"])
    names = list(lengths)
    first, window, last = names
    figures = [Figure(name=f"events in the log of {last}", value=events, unit="")]
    for name in names:
        figures += latency(f"POST → session.idled, {name}", turn_ms[name])
    figures += [
        Figure(name=f"{last} over turn 1, p50", value=p50(turn_ms[last]) / p50(turn_ms[first]), unit="×"),
        Figure(name=f"{last} over {window}, p50", value=p50(turn_ms[last]) / p50(turn_ms[window]), unit="×", aim=1.25),
    ]
    for what in _requests(stack, ""):
        figures += [
            Figure(name=f"{what}, {name}, median", value=p50(request_ms[what, name]), unit="ms") for name in names
        ]
    return figures


def _requests(stack: Stack, session: str) -> dict[str, Callable[[], Awaitable[object]]]:
    api = stack.api

    async def attach() -> None:
        query = await from_the_end(stack, session)
        (await EventStream.open(api, session, lambda kind, frame, at: None, query=query)).close()

    return {
        "stream opened at the end of the log": attach,
        "GET /events?limit=50": lambda: api.get(f"/sessions/{session}/events?limit=50"),
        "GET /messages": lambda: api.get(f"/sessions/{session}/messages"),
        "GET session": lambda: api.get(f"/sessions/{session}"),
    }
