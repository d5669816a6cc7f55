"""Cells about turns: overhead over bare Temporal, latency to the first delta and to rest, turns per second, memory, and hops."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from typing import Final

import msgspec
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client

from benchmarks.bare import Answer, Bare, Order
from benchmarks.client import Conversation, Json, TurnTimes, message
from benchmarks.measurement import CpuClock, Figure, latency, p50, p99, rss_bytes, total
from benchmarks.scope import Scope
from benchmarks.stack import ONE_TOOL_SCRIPT, Stack
from domain.events import StoredEvent
from domain.ids import Prefix, parse_id
from infra.temporal_client import DATA_CONVERTER

PAUSE_SECONDS: Final = 0.04
"""Between two turns of a session measured one at a time: its run closes a moment after its session rests, and no person
answers faster."""

SESSIONS_PER_LANE: Final = 2
"""A lane of a closed loop takes turns in two sessions, for the same reason."""

FIRST_TOKEN_MS: Final = 150
WARM_UP_TURNS: Final = 12

ASK: Final = message("What is 2 + 3?")


async def turn_after_pause(conversation: Conversation, body: bytes = ASK) -> TurnTimes:
    await asyncio.sleep(PAUSE_SECONDS)
    return await conversation.turn(body)


async def whole_log(stack: Stack, session: str) -> list[StoredEvent]:
    return await stack.log.read(session, after_sequence=0, limit=10_000)


async def rows_of_a_turn(stack: Stack, session: str) -> tuple[Order, int]:
    """The rows that the last turn of a session wrote, by who writes them in the bare variant."""
    log = await whole_log(stack, session)
    start = max(place for place, event in enumerate(log) if event.type == "input.message")
    rows = [0, 0, 0, 0]
    writer = 0
    for event in log[start:]:
        if event.type == "session.activated":
            writer = 1
        elif event.type == "tool.started":
            writer = 2
        elif event.type == "reason.started" and writer == 2:
            writer = 3
        rows[writer] += 1
    size = sum(len(event.data) + len(event.context) for event in log[start:]) // len(log[start:])
    return Order(rows=(rows[0], rows[1], rows[2], rows[3]), row_bytes=size), sum(rows)


async def overhead(scope: Scope) -> list[Figure]:
    """Ours and both bare variants in turns, in a random-free rotation: drift of the machine hits all three alike."""
    async with (
        scope.stack() as stack,
        Bare(stack.addresses.temporal, stack.addresses.database_url) as bare,
    ):
        stack.count_in("bare", bare.pid)
        nothing = Order()
        conversation = await Conversation.begin(
            stack.api, await stack.create_session_with(ONE_TOOL_SCRIPT, "one-tool", title="overhead")
        )
        for _ in range(WARM_UP_TURNS):
            await turn_after_pause(conversation)
            await bare.ask(nothing)
        writing, row_count = await rows_of_a_turn(stack, conversation.session)
        ours: list[float] = []
        answers: dict[str, list[Answer]] = {"nothing": [], "rows": []}
        async with scope.measured(stack.cpu_clock()):
            for _ in range(scope.count(80, quick=15)):
                ours.append((await turn_after_pause(conversation)).to_idle_ms)
                for name, order in (("nothing", nothing), ("rows", writing)):
                    await asyncio.sleep(PAUSE_SECONDS)
                    answers[name].append(await bare.ask(order))
        loop = await _loops_side_by_side(scope, stack, bare, writing)
        conversation.close()
    empty = [answer.result_ms for answer in answers["nothing"]]
    naive = [answer.result_ms for answer in answers["rows"]]
    n = len(ours)
    return [
        *latency("turn reason → act → reason: POST → session.idled at the client", ours, aim_p50=60),
        *latency("bare Temporal, steps write nothing: start → result", empty),
        *latency(f"bare Temporal, the same {row_count} rows one by one: start → result", naive),
        Figure(
            name="overhead over bare that writes nothing, p50", value=p50(ours) / p50(empty), unit="×", n=n, aim=1.25
        ),
        Figure(name="overhead over bare that writes nothing, p99", value=p99(ours) / p99(empty), unit="×", n=n),
        Figure(
            name="overhead over bare with the same rows, p50", value=p50(ours) / p50(naive), unit="×", n=n, aim=1.25
        ),
        Figure(name="overhead over bare with the same rows, p99", value=p99(ours) / p99(naive), unit="×", n=n),
        Figure(
            name="bare with the same rows: start → end of its last step, p50",
            value=p50([answer.last_step_ms for answer in answers["rows"]]),
            unit="ms",
            n=n,
        ),
        *loop,
    ]


async def _loops_side_by_side(scope: Scope, stack: Stack, bare: Bare, writing: Order) -> list[Figure]:
    """Eight in flight, ours and bare one after the other, twice: what a turn costs in throughput."""
    seconds = scope.seconds(3.0, quick=1.5)
    rates: dict[str, list[float]] = defaultdict(list)
    async with scope.conversations(stack, "one-tool-8", 8 * SESSIONS_PER_LANE) as conversations:
        await closed_loop(conversations, 8, 0.5)
        for _ in range(scope.count(2, quick=1)):
            turns, took = await closed_loop(conversations, 8, seconds)
            rates["ours"].append(turns / took)
            for name, order in (("nothing", Order()), ("rows", writing)):
                done = await bare.ask(msgspec.structs.replace(order, in_flight=8, seconds=seconds))
                rates[name].append(done.turns / done.seconds)
    mean = {name: sum(values) / len(values) for name, values in rates.items()}
    return [
        Figure(
            name="turns/s at 8 in flight, of bare that writes nothing", value=mean["ours"] / mean["nothing"], unit="×"
        ),
        Figure(name="turns/s at 8 in flight, of bare with the same rows", value=mean["ours"] / mean["rows"], unit="×"),
    ]


async def closed_loop(conversations: list[Conversation], in_flight: int, seconds: float) -> tuple[int, float]:
    """Lanes that take turns as fast as they can; returns the turns done and the time they took."""
    began = time.monotonic()
    turns = 0

    async def lane(own: list[Conversation]) -> None:
        nonlocal turns
        place = 0
        while time.monotonic() - began < seconds:
            await own[place % len(own)].turn(ASK)
            place += 1
            turns += 1

    lanes = [conversations[number::in_flight] for number in range(in_flight)]
    await asyncio.gather(*(lane(own[:SESSIONS_PER_LANE]) for own in lanes))
    return turns, time.monotonic() - began


async def first_delta(scope: Scope) -> list[Figure]:
    """At once, and with a model that thinks for a moment, in turns."""
    async with scope.stack() as stack:
        at_once = await stack.create_session_with({"mode": "fixed", "text": "Hello there."}, "at-once")
        thinking = await stack.create_session_with(
            {"mode": "fixed", "text": "Hello there.", "first_token_delay_ms": FIRST_TOKEN_MS}, "thinking"
        )
        quick = await Conversation.begin(stack.api, at_once)
        slow = await Conversation.begin(stack.api, thinking)
        for _ in range(WARM_UP_TURNS):
            await turn_after_pause(quick)
        await turn_after_pause(slow)
        turns: list[TurnTimes] = []
        slow_turns: list[TurnTimes] = []
        async with scope.measured(stack.cpu_clock()):
            for number in range(scope.count(150, quick=30)):
                turns.append(await turn_after_pause(quick))
                if number % 3 == 0:
                    slow_turns.append(await turn_after_pause(slow))
        log = await whole_log(stack, slow.session)
        started = [event.ts.timestamp() for event in log if event.type == "reason.started"][-len(slow_turns) :]
        written = [event.ts.timestamp() for event in log if event.type == "output.message.delta"]
        spoken = [at + FIRST_TOKEN_MS / 1000 for at in started]
        per_turn = len(written) // (len(slow_turns) + 1)
        first_written = written[::per_turn][-len(slow_turns) :]
        quick.close()
        slow.close()
    from_byte = [(turn.first_delta - at) * 1000 for turn, at in zip(slow_turns, spoken, strict=True)]
    delivery = [(turn.first_delta - at) * 1000 for turn, at in zip(slow_turns, first_written, strict=True)]
    return [
        *latency("POST → 201", [turn.to_answer_ms for turn in turns]),
        *latency("POST → first delta at the client", [turn.to_first_delta_ms for turn in turns], aim_p50=25),
        *latency("model's first byte → first delta at the client (step's opening included)", from_byte),
        *latency("first delta's append → at the client", delivery),
        *latency("turn of one reason: POST → session.idled", [turn.to_idle_ms for turn in turns]),
    ]


async def throughput(scope: Scope) -> list[Figure]:
    """Rounds of 1, 8 and 32 in flight in turns; CPU from /proc, per turn and part."""
    levels = (1, 8, 32)
    seconds = scope.seconds(6.0, quick=1.5)
    done: Counter[int] = Counter()
    took: dict[int, float] = defaultdict(float)
    clocks: dict[int, list[CpuClock]] = defaultdict(list)
    async with (
        scope.stack() as stack,
        scope.conversations(stack, "one-tool", 32 * SESSIONS_PER_LANE) as conversations,
    ):
        await closed_loop(conversations, 8, scope.seconds(3.0, quick=1.0))
        for _ in range(scope.count(2, quick=1)):
            for level in levels:
                async with scope.measured(stack.cpu_clock()) as clock:
                    turns, wall = await closed_loop(conversations, level, seconds)
                done[level] += turns
                took[level] += wall
                clocks[level].append(clock)
    figures: list[Figure] = []
    for level in levels:
        figures.append(
            Figure(
                name=f"turns/s, {level} in flight",
                value=done[level] / took[level],
                unit="/s",
                n=done[level],
                aim=30 if level == 32 else None,
                aim_is="at least",
            )
        )
        used = total(clocks[level])
        figures += [
            Figure(name=f"CPU per turn, {level} in flight: {part}", value=used[part] * 1000 / done[level], unit="ms")
            for part in ("temporal", "postgres", "everruns", "client")
        ]
        share = sum(clock.foreign_share for clock in clocks[level]) / len(clocks[level])
        figures.append(Figure(name=f"CPU used by others, {level} in flight", value=share * 100, unit="%"))
    return figures


async def memory(scope: Scope) -> list[Figure]:
    """RSS of the process that is API and worker, and of the Temporal server, early on and some hundred turns later."""
    seconds = scope.seconds(7.0, quick=2.0)
    marks: list[tuple[int, int, int]] = []
    async with (
        scope.stack() as stack,
        scope.conversations(stack, "one-tool", 16 * SESSIONS_PER_LANE) as conversations,
    ):
        done, _ = await closed_loop(conversations, 16, seconds)
        marks.append((done, rss_bytes(stack.pid), rss_bytes(stack.addresses.temporal_pid)))
        async with scope.measured(stack.cpu_clock()):
            for _ in range(scope.count(3, quick=1)):
                turns, _ = await closed_loop(conversations, 16, seconds)
                done += turns
                marks.append((done, rss_bytes(stack.pid), rss_bytes(stack.addresses.temporal_pid)))
    (first, own, server), (last, own_after, server_after) = marks[0], marks[-1]
    thousands = (last - first) / 1000
    growth, server_growth = (own_after - own) / 1e6 / thousands, (server_after - server) / 1e6 / thousands
    return [
        Figure(name=f"RSS of everruns dev after {first} turns", value=own / 1e6, unit="MB"),
        Figure(name=f"RSS of everruns dev after {last} turns", value=own_after / 1e6, unit="MB"),
        Figure(name="growth of everruns dev per 1,000 turns", value=growth, unit="MB"),
        Figure(
            name=f"RSS of the Temporal dev server after {last} turns (in memory)", value=server_after / 1e6, unit="MB"
        ),
        Figure(
            name="growth of the Temporal dev server per 1,000 turns",
            value=server_growth,
            unit="MB",
        ),
    ]


async def hops(scope: Scope) -> list[Figure]:
    """Where the time of a turn goes: moments of the log, of Temporal's history and of the client, medians since the POST."""
    moments: dict[str, list[float]] = defaultdict(list)
    async with scope.stack() as stack:
        temporal = await Client.connect(stack.addresses.temporal, data_converter=DATA_CONVERTER)
        conversation = await Conversation.begin(stack.api, await stack.create_session_with(ONE_TOOL_SCRIPT, "one-tool"))
        for _ in range(WARM_UP_TURNS):
            await turn_after_pause(conversation)
        turns: list[TurnTimes] = []
        seen = len(await whole_log(stack, conversation.session))
        async with scope.measured(stack.cpu_clock()):
            for _ in range(scope.count(60, quick=20)):
                turns.append(await turn_after_pause(conversation))
        log = (await whole_log(stack, conversation.session))[seen:]
        starts = [place for place, event in enumerate(log) if event.type == "input.message"]
        for times, start, end in zip(turns, starts, [*starts[1:], len(log)], strict=True):
            for name, at in (("answered", times.answered), ("first delta", times.first_delta), ("idled", times.idled)):
                moments[f"client: {name}"].append(at - times.posted)
            count: Counter[str] = Counter()
            for event in log[start:end]:
                count[event.type] += 1
                moments[f"log: {event.type} {count[event.type]}"].append(event.ts.timestamp() - times.posted)
            turn = next(_turn_id(event) for event in log[start:end] if event.type == "turn.started")
            count.clear()
            run = str(parse_id(Prefix.TURN, turn))
            async for past in temporal.get_workflow_handle(conversation.session, run_id=run).fetch_history_events():
                name = EventType.Name(past.event_type).removeprefix("EVENT_TYPE_").replace("_", " ").lower()
                count[name] += 1
                at = past.event_time.ToNanoseconds() / 1e9
                moments[f"temporal: {name} {count[name]}"].append(at - times.posted)
        conversation.close()
    medians = sorted((p50(values) * 1000, name, len(values)) for name, values in moments.items())
    return [Figure(name=name, value=value, unit="ms", n=n) for value, name, n in medians]


def _turn_id(event: StoredEvent) -> str:
    fields: Json = msgspec.json.decode(event.data, type=dict)
    return str(fields["turn_id"])
