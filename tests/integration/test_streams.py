"""Live event streams over real sockets: frames, cursors, filters, limits, and the ways they end.

Most tests run the API in this process (`tests.sse.api_process`) and write to the log themselves; what is about processes
(signals, memory, the engine's own events) uses `tests.stack`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TypedDict

import asyncpg
import httpx
import pytest

from db.database import Database
from db.event_log import EventLog
from domain.events import (
    EVENT_TYPES,
    EventPayload,
    InputMessage,
    NewEvent,
    OutputMessageCompleted,
    OutputMessageDelta,
    ReasonThinkingDelta,
    SessionTitleUpdated,
    StoredEvent,
)
from domain.ids import Prefix, new_id
from domain.messages import Message, Role, TextPart
from infra.event_bus import CHANNEL
from tests.conftest import RecordingTurns
from tests.sse import ApiProcess, Frame, SseConnection, api_process, until
from tests.stack import Stack


class Limits(TypedDict, total=False):
    everywhere: int
    per_session: int
    per_org: int


TURN = new_id(Prefix.TURN)
AWKWARD = 'line\nline\r\n\u2028\u2029\u0085\x0b\x0c\x1c "quoted" \\ back \x7f data: id: \U0001f9ec e\u0301 \ufeff'


@pytest.fixture
async def api(database: Database, dsn: str, turns: RecordingTurns) -> AsyncIterator[ApiProcess]:
    async with api_process(database, dsn, turns) as process:
        yield process


@pytest.fixture
async def other(database: Database, dsn: str, turns: RecordingTurns) -> AsyncIterator[ApiProcess]:
    """A second API on the same database: it hears of the first one's events by notification."""
    async with api_process(database, dsn, turns) as process:
        yield process


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


async def new_session(api: ApiProcess) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        created = await client.post(f"{api.url}/sessions", json={})
    assert created.status_code == 201, created.text
    return created.json()["id"]


async def write(log: EventLog, session: str, *payloads: EventPayload) -> list[StoredEvent]:
    return await log.append(session, [NewEvent(data=payload) for payload in payloads])


def title(text: str) -> SessionTitleUpdated:
    return SessionTitleUpdated(title=text)


def said(text: str) -> InputMessage:
    message = Message(
        id=new_id(Prefix.MESSAGE), role=Role.USER, content=[TextPart(text=text)], created_at="2026-01-01T00:00:00.000Z"
    )
    return InputMessage(message=message)


def answered(message_id: str, text: str) -> OutputMessageCompleted:
    message = Message(
        id=message_id, role=Role.AGENT, content=[TextPart(text=text)], created_at="2026-01-01T00:00:00.000Z"
    )
    return OutputMessageCompleted(message=message)


def deltas(message_id: str, pieces: Sequence[str]) -> list[OutputMessageDelta]:
    offsets = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
    return [
        OutputMessageDelta(turn_id=TURN, message_id=message_id, delta=piece, offset=offset)
        for piece, offset in zip(pieces, offsets, strict=True)
    ]


def sequences(frames: Sequence[Frame]) -> list[int]:
    return [frame.sequence for frame in frames]


# --- frames ---------------------------------------------------------------------------------------------------------------


async def test_a_stream_begins_with_connected_and_every_event_is_one_frame_of_four_lines(api: ApiProcess) -> None:
    session = await new_session(api)
    stored = await write(api.log, session, title("one"), said(AWKWARD))
    async with SseConnection(api.sse(session)) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in stream.headers["cache-control"]
        assert stream.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in stream.headers
        connected = await stream.expect("connected")
        assert connected.json == {"status": "connected"}
        assert connected.retry is not None
        assert connected.id is None
        frames = await stream.take(3)
    assert [frame.event for frame in frames] == ["session.started", "session.title.updated", "input.message"]
    for frame in frames:
        assert [line.partition(b":")[0] for line in frame.raw.split(b"\n")] == [b"event", b"id", b"retry", b"data"]
        assert frame.retry == 100
        assert frame.json["id"] == frame.id
        assert frame.json["type"] == frame.event
        assert frame.json["session_id"] == session
        assert frame.json["context"] == {}
    assert [frame.id for frame in frames[1:]] == [event.id for event in stored]


async def test_text_survives_whatever_characters_it_has_and_whichever_line_breaks_a_client_knows(
    api: ApiProcess,
) -> None:
    session = await new_session(api)
    message_id = new_id(Prefix.MESSAGE)
    await write(api.log, session, said(AWKWARD), *deltas(message_id, [AWKWARD, "\U0001f600", "\u2028" * 3]))
    async with SseConnection(api.sse(session), {"exclude": "session.started"}) as stream:
        await stream.expect("connected")
        frames = await stream.take(4)
    for frame in frames:
        assert frame.data is not None
        # `str.splitlines` knows every line break that any SSE parser splits at.
        assert len(frame.data.decode().splitlines()) == 1
    assert frames[0].payload["message"]["content"] == [{"type": "text", "text": AWKWARD}]  # type: ignore[index]
    assert frames[3].payload["accumulated"] == AWKWARD + "\U0001f600" + "\u2028" * 3


async def test_both_addresses_serve_the_same_stream(api: ApiProcess) -> None:
    session = await new_session(api)
    await write(api.log, session, *map(title, "abc"))
    bodies: list[list[bytes]] = []
    for path in ("sse", "events/stream"):
        async with SseConnection(f"{api.url}/sessions/{session}/{path}") as stream:
            bodies.append([frame.raw for frame in await stream.take(4)])
    assert bodies[0] == bodies[1]


async def test_processes_serve_the_same_bytes_for_the_same_event(api: ApiProcess, other: ApiProcess) -> None:
    session = await new_session(api)
    async with SseConnection(api.sse(session)) as first, SseConnection(other.sse(session)) as second:
        await first.take(1)
        await second.take(1)
        message_id = new_id(Prefix.MESSAGE)
        for payload in (said(AWKWARD), *deltas(message_id, ["a", "ä", AWKWARD]), answered(message_id, "aä" + AWKWARD)):
            await write(api.log, session, payload)
        live = [frame.raw for frame in await first.take(5)]
        assert [frame.raw for frame in await second.take(5)] == live
    async with SseConnection(other.sse(session), {"after_sequence": 1}) as replayed:
        assert [frame.raw for frame in await replayed.take(5)] == live


# --- cursors --------------------------------------------------------------------------------------------------------------


async def test_without_a_cursor_a_stream_begins_at_the_first_event(api: ApiProcess) -> None:
    session = await new_session(api)
    await write(api.log, session, *map(title, "abc"))
    async with SseConnection(api.sse(session)) as stream:
        assert sequences(await stream.take(4)) == [1, 2, 3, 4]


@pytest.mark.parametrize(("after", "expected"), [(0, [1, 2, 3]), (2, [3, 4]), (4, [5])])
async def test_after_sequence_is_exclusive(api: ApiProcess, after: int, expected: list[int]) -> None:
    session = await new_session(api)
    await write(api.log, session, *map(title, "abc"))
    async with SseConnection(api.sse(session), {"after_sequence": after}) as stream:
        await stream.expect("connected")
        await write(api.log, session, title("live"))
        assert sequences(await stream.take(len(expected))) == expected


async def test_a_cursor_beyond_the_end_waits_for_what_comes_after_it(api: ApiProcess) -> None:
    session = await new_session(api)
    async with SseConnection(api.sse(session), {"after_sequence": 3}) as stream:
        await stream.expect("connected")
        for text in "abcd":
            await write(api.log, session, title(text))
        assert sequences(await stream.take(2)) == [4, 5]


async def test_since_id_of_a_stored_event_continues_strictly_after_it(api: ApiProcess) -> None:
    session = await new_session(api)
    stored = await write(api.log, session, *map(title, "abc"))
    for cursor in ({"since_id": stored[1].id}, {}):
        headers = {} if cursor else {"Last-Event-ID": stored[1].id}
        async with SseConnection(api.sse(session), cursor, headers) as stream:
            assert sequences(await stream.take(1)) == [4]


async def test_since_id_of_a_delta_continues_inside_the_message(api: ApiProcess) -> None:
    session = await new_session(api)
    stored = await write(api.log, session, *deltas(new_id(Prefix.MESSAGE), ["a", "b", "c"]))
    async with SseConnection(api.sse(session), {"since_id": stored[0].id}) as stream:
        frames = await stream.take(2)
    assert [frame.payload["accumulated"] for frame in frames] == ["ab", "abc"]


async def test_an_event_id_that_is_not_stored_continues_at_its_time(api: ApiProcess) -> None:
    """Ephemeral events of another deployment, and ids of other sessions, still tell when they were seen."""
    session, elsewhere = await new_session(api), await new_session(api)
    await write(api.log, session, title("before"))
    await asyncio.sleep(0.005)  # The id's time has a resolution of a millisecond.
    foreign = (await write(api.log, elsewhere, title("elsewhere")))[0].id
    unknown = new_id(Prefix.EVENT)
    await asyncio.sleep(0.005)
    await write(api.log, session, title("after"))
    for cursor in (unknown, foreign):
        async with SseConnection(api.sse(session), {"since_id": cursor}) as stream:
            assert sequences(await stream.take(1)) == [3], cursor


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "nonsense",
        "event_",
        "event_" + "0" * 32,
        "event_" + "f" * 32,
        "EVENT_" + "a" * 32,
        "\0",
        "session_" + "1" * 32,
    ],
)
async def test_a_cursor_that_says_nothing_replays_everything(api: ApiProcess, cursor: str) -> None:
    session = await new_session(api)
    await write(api.log, session, title("a"))
    async with SseConnection(api.sse(session), {"since_id": cursor}) as stream:
        assert stream.status == 200
        assert sequences(await stream.take(2)) == [1, 2]


async def test_last_event_id_wins_over_the_address_it_reconnects_to(api: ApiProcess) -> None:
    session = await new_session(api)
    stored = await write(api.log, session, *map(title, "abc"))
    headers = {"Last-Event-ID": stored[1].id}
    for parameters in ({"since_id": stored[0].id}, {"after_sequence": 0}):
        async with SseConnection(api.sse(session), parameters, headers) as stream:
            assert sequences(await stream.take(1)) == [4]


@pytest.mark.parametrize(
    ("parameters", "field", "code"),
    [
        ({"since_id": "event_" + "a" * 32, "after_sequence": 1}, "after_sequence", "invalid_input"),
        ({"after_sequence": "x"}, "after_sequence", "invalid_input"),
        ({"after_sequence": -1}, "after_sequence", "invalid_input"),
        ({"after_sequence": 2**63}, "after_sequence", "invalid_input"),
        ({"types": "turn.exploded"}, "types", "unknown_event_type"),
        ({"types": ["turn.started", "Turn.Started"]}, "types", "unknown_event_type"),
        ({"types": "turn.started,turn.completed"}, "types", "unknown_event_type"),
        ({"types": ""}, "types", "unknown_event_type"),
        ({"exclude": "turn.exploded"}, "exclude", "unknown_event_type"),
        ({"types": ["turn.started"] * 65}, "types", "invalid_input"),
        ({"exclude": ["turn.started"] * 65}, "exclude", "invalid_input"),
    ],
)
async def test_a_wrong_parameter_is_refused_before_the_stream_starts(
    api: ApiProcess, parameters: dict[str, str], field: str, code: str
) -> None:
    session = await new_session(api)
    async with SseConnection(api.sse(session), parameters) as stream:
        assert stream.status == 400
        assert stream.headers["content-type"] == "application/problem+json"
        problem = httpx.Response(400, content=await stream.body()).json()
    assert (problem["field"], problem["code"]) == (field, code)
    assert problem["error"] == {"code": code, "message": problem["detail"]}
    assert api.hub.open_streams == 0


@pytest.mark.parametrize(("session", "status"), [("session_1", 400), (f"session_{8:032x}", 404)])
async def test_a_stream_of_no_session_is_refused(api: ApiProcess, session: str, status: int) -> None:
    async with SseConnection(api.sse(session)) as stream:
        assert stream.status == status


# --- filters --------------------------------------------------------------------------------------------------------------


async def test_types_narrow_and_exclude_removes_from_what_is_left_in_replay_and_live(api: ApiProcess) -> None:
    session = await new_session(api)
    parameters = {
        "types": [
            "input.message",
            "session.title.updated",
            *[name for name in EVENT_TYPES if name.startswith("turn.")],
        ],
        "exclude": ["session.title.updated"],
    }
    await write(api.log, session, title("a"), said("one"))
    async with SseConnection(api.sse(session), parameters) as stream:
        assert sequences(await stream.take(1)) == [3]
        await write(api.log, session, title("b"), said("two"), title("c"))
        assert sequences(await stream.take(1)) == [5]


async def test_64_names_are_allowed(api: ApiProcess) -> None:
    session = await new_session(api)
    async with SseConnection(api.sse(session), {"types": ["session.started"] * 64}) as stream:
        assert sequences(await stream.take(1)) == [1]


# --- replay, then live ----------------------------------------------------------------------------------------------------


async def test_replay_goes_over_into_live_without_gap_or_duplicate_under_concurrent_writes(
    api: ApiProcess, other: ApiProcess
) -> None:
    session = await new_session(api)
    events = 600
    chance = random.Random(7)
    written = asyncio.Event()

    async def writer(process: ApiProcess, count: int) -> None:
        left = count
        while left:
            batch = min(left, chance.randint(1, 4))
            await write(process.log, session, *[title("x" * chance.randint(1, 400)) for _ in range(batch)])
            left -= batch
            await asyncio.sleep(0)
        written.set()

    async def reader(process: ApiProcess, after: int, begin: int) -> None:
        await until(lambda: progress[0] >= begin)
        async with SseConnection(process.sse(session), {"after_sequence": after}) as stream:
            frames = await stream.take(events + 1 - after, 60)
        assert sequences(frames) == list(range(after + 1, events + 2))

    progress = [0]

    async def watch() -> None:
        async with SseConnection(api.sse(session)) as stream:
            while progress[0] <= events:
                progress[0] = (await stream.take(1))[0].sequence

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for process in (api, other):
            group.create_task(writer(process, events // 2))
            for after, begin in ((0, 0), (0, 100), (37, 300), (550, 500)):
                group.create_task(reader(process, after, begin))


async def test_a_reader_that_comes_back_again_and_again_sees_every_event_once(
    api: ApiProcess, other: ApiProcess
) -> None:
    session = await new_session(api)
    events = 200
    seen: list[int] = []

    async def writer() -> None:
        for number in range(events):
            await write(api.log, session, title(str(number)))

    async def reader() -> None:
        cursor: str | None = None
        chance = random.Random(11)
        while len(seen) <= events:
            process = chance.choice([api, other])
            async with SseConnection(process.sse(session), {"since_id": cursor} if cursor else {}) as stream:
                for _ in range(chance.randint(0, 25)):
                    if len(seen) > events:
                        break
                    frame = (await stream.take(1))[0]
                    seen.append(frame.sequence)
                    cursor = frame.id

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(writer())
        group.create_task(reader())
    assert seen == list(range(1, events + 2))


# --- accumulated ----------------------------------------------------------------------------------------------------------

PIECES = ["Ein", " Hund", " \U0001f415", " läuft", "\u2028", "\n", "über", " die", " Straße", "."]


def assert_accumulated(frames: Sequence[Frame], pieces: Sequence[str], first: int) -> None:
    expected = ["".join(pieces[: place + 1]) for place in range(first, len(pieces))]
    assert [frame.payload["accumulated"] for frame in frames] == expected
    assert [frame.payload["delta"] for frame in frames] == list(pieces[first:])


async def test_accumulated_is_the_whole_text_so_far_wherever_a_reader_joins(api: ApiProcess, other: ApiProcess) -> None:
    session = await new_session(api)
    message_id = new_id(Prefix.MESSAGE)
    payloads = deltas(message_id, PIECES)
    half = len(PIECES) // 2
    stored = await write(api.log, session, *payloads[:half])
    # A feed that begins in the middle of the message, by notification only.
    async with SseConnection(other.sse(session), {"after_sequence": stored[-1].sequence}) as late:
        await late.expect("connected")
        await until(lambda: other.hub.open_streams == 1)
        for payload in payloads[half:]:
            stored += await write(api.log, session, payload)
        assert_accumulated(await late.take(len(PIECES) - half), PIECES, half)
    for process in (api, other):
        for place, event in enumerate(stored[:-1]):
            async with SseConnection(process.sse(session), {"since_id": event.id}) as stream:
                assert_accumulated(await stream.take(len(PIECES) - place - 1), PIECES, place + 1)


async def test_accumulated_starts_over_when_a_generation_does(api: ApiProcess, other: ApiProcess) -> None:
    session = await new_session(api)
    message_id = new_id(Prefix.MESSAGE)
    first = await write(api.log, session, *deltas(message_id, ["lost ", "text ", "of a dead ", "worker"]))
    second = await write(api.log, session, *deltas(message_id, ["the ", "answer"]))
    expected = ["lost text of a dead ", "lost text of a dead worker", "the ", "the answer"]
    for process in (api, other):
        async with SseConnection(process.sse(session), {"since_id": first[1].id}) as stream:
            assert [frame.payload["accumulated"] for frame in await stream.take(4)] == expected
        async with SseConnection(process.sse(session), {"since_id": second[0].id}) as stream:
            assert [frame.payload["accumulated"] for frame in await stream.take(1)] == ["the answer"]


async def test_thinking_accumulates_beside_the_text(api: ApiProcess) -> None:
    session = await new_session(api)
    message_id = new_id(Prefix.MESSAGE)
    thinking = [
        ReasonThinkingDelta(turn_id=TURN, message_id=message_id, delta=delta, offset=offset)
        for delta, offset in (("hm ", 0), ("well", 3))
    ]
    text = deltas(message_id, ["so", " be it"])
    stored = await write(api.log, session, thinking[0], text[0], thinking[1], text[1])
    async with SseConnection(api.sse(session), {"since_id": stored[1].id}) as stream:
        assert [frame.payload["accumulated"] for frame in await stream.take(2)] == ["hm well", "so be it"]


# --- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"everywhere": 2}, "global SSE connection limit reached"),
        ({"per_session": 2}, "per-session SSE connection limit reached"),
        ({"per_org": 2}, "per-organization SSE connection limit reached"),
    ],
)
async def test_a_stream_past_a_limit_gets_429_before_it_starts(
    database: Database, dsn: str, turns: RecordingTurns, limits: Limits, message: str
) -> None:
    async with api_process(database, dsn, turns, **limits) as api:
        session = await new_session(api)
        async with SseConnection(api.sse(session)) as first, SseConnection(api.sse(session)):
            await first.take(1)
            async with SseConnection(api.sse(session)) as third:
                assert third.status == 429
                assert third.headers["content-type"] == "application/problem+json"
                assert int(third.headers["retry-after"]) > 0
                problem = httpx.Response(429, content=await third.body()).json()
            assert problem["error"] == {"code": "sse_limit", "message": message}
            # The streams that were there are not disturbed.
            await write(api.log, session, title("live"))
            assert sequences(await first.take(1)) == [2]
        await until(lambda: api.hub.open_streams == 0)
        async with SseConnection(api.sse(session)) as again:
            assert again.status == 200


async def test_a_limit_of_one_session_leaves_others_alone(database: Database, dsn: str, turns: RecordingTurns) -> None:
    async with api_process(database, dsn, turns, per_session=1) as api:
        one, two = await new_session(api), await new_session(api)
        async with SseConnection(api.sse(one)) as first, SseConnection(api.sse(two)) as second:
            assert (first.status, second.status) == (200, 200)


@contextlib.contextmanager
def without_garbage_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while-sending"])
async def test_a_disconnect_frees_the_slot_at_once(
    database: Database, dsn: str, turns: RecordingTurns, way: str, busy: bool
) -> None:
    async with api_process(database, dsn, turns, per_session=1) as api:
        session = await new_session(api)
        if busy:
            for _ in range(20):
                await write(api.log, session, *[title("x" * 50_000) for _ in range(10)])
        with without_garbage_collection():
            for _ in range(3):
                stream = await SseConnection(api.sse(session), receive_buffer=4_096).open()
                assert stream.status == 200
                await stream.expect("connected")
                if busy:
                    await stream.expect("session.started")
                await (stream.reset() if way == "reset" else stream.close())
                await until(lambda: api.hub.open_streams == 0)


# --- endings --------------------------------------------------------------------------------------------------------------


async def test_a_cycle_ends_with_disconnecting_within_its_jitter(
    database: Database, dsn: str, turns: RecordingTurns
) -> None:
    async with api_process(database, dsn, turns, cycle_seconds=1.5) as api:
        session = await new_session(api)
        began = time.monotonic()
        streams = [await SseConnection(api.sse(session)).open() for _ in range(8)]

        async def lasted(stream: SseConnection) -> float:
            frames = await stream.rest()
            assert frames[-1].event == "disconnecting"
            assert frames[-1].json == {"reason": "connection_cycle", "retry_ms": 100}
            return time.monotonic() - began

        lives = await asyncio.gather(*map(lasted, streams))
        for stream in streams:
            await stream.close()
        assert min(lives) >= 1.5 * 0.8
        assert max(lives) < 1.5 * 1.2 + 5, "far beyond the jitter, even on a busy machine"
        assert len({round(life, 3) for life in lives}) > 1, "all ended together"
        await until(lambda: api.hub.open_streams == 0)


async def test_a_cycle_loses_nothing(database: Database, dsn: str, turns: RecordingTurns) -> None:
    async with api_process(database, dsn, turns, cycle_seconds=0.3) as api:
        session = await new_session(api)
        seen: list[int] = []

        async def writer() -> None:
            for number in range(150):
                await write(api.log, session, title(str(number)))
                await asyncio.sleep(0.01)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(writer())
            cycles, cursor = 0, None
            while len(seen) < 151:
                async with SseConnection(api.sse(session), {"since_id": cursor} if cursor else {}) as stream:
                    for frame in await stream.rest():
                        if frame.id is not None:
                            seen.append(frame.sequence)
                            cursor = frame.id
                cycles += 1
        assert seen == list(range(1, 152))
        assert cycles >= 2


async def test_a_silent_stream_has_heartbeats_and_so_has_one_whose_filter_swallows_everything(
    database: Database, dsn: str, turns: RecordingTurns
) -> None:
    async with api_process(database, dsn, turns, heartbeat_seconds=0.3) as api:
        session = await new_session(api)
        stop = asyncio.Event()

        async def writer() -> None:
            while not stop.is_set():
                await write(api.log, session, title("unwanted"))
                await asyncio.sleep(0.05)

        writing = asyncio.create_task(writer())
        async with SseConnection(api.sse(session), {"types": "input.message"}) as stream:
            await stream.expect("connected")
            for _ in range(3):
                frame = await stream.next()
                assert frame is not None
                assert frame.raw == b": heartbeat"
            await write(api.log, session, said("wanted"))
            frame = await stream.next()
            while frame is not None and frame.raw == b": heartbeat":
                frame = await stream.next()
            assert frame is not None
            assert frame.event == "input.message"
        stop.set()
        await writing


async def test_a_server_that_stops_ends_every_stream_with_shutdown(
    database: Database, dsn: str, turns: RecordingTurns
) -> None:
    async with api_process(database, dsn, turns) as api:
        sessions = [await new_session(api) for _ in range(3)]
        streams = [await SseConnection(api.sse(session)).open() for session in sessions for _ in range(2)]
        for stream in streams:
            await stream.take(1)
        api.server.stop()
        for stream in streams:
            assert [frame.event for frame in await stream.rest()] == ["disconnecting"]
            await stream.close()
        await until(lambda: api.hub.open_streams == 0)


async def test_a_log_that_cannot_be_read_ends_the_stream_with_error(api: ApiProcess, dsn: str) -> None:
    session = await new_session(api)
    connection = await asyncpg.connect(dsn)
    await connection.execute("ALTER TABLE events RENAME TO events_away")
    try:
        async with SseConnection(api.sse(session)) as stream:
            await stream.expect("connected")
            ending = await stream.rest()
        assert [frame.event for frame in ending] == ["disconnecting"]
        assert ending[0].json["reason"] == "error"
        await until(lambda: api.hub.open_streams == 0)
    finally:
        await connection.execute("ALTER TABLE events_away RENAME TO events")
    async with SseConnection(api.sse(session)) as stream:
        assert sequences(await stream.take(1)) == [1]
    await connection.close()


async def test_an_event_whose_first_read_failed_still_arrives(api: ApiProcess, dsn: str) -> None:
    session = await new_session(api)
    connection = await asyncpg.connect(dsn)
    async with SseConnection(api.sse(session)) as stream:
        await stream.take(1)
        async with connection.transaction():
            # Nothing is published in this process, and when the notification comes the table is not there.
            quiet = EventLog(_OneConnection(connection), _Nobody())  # type: ignore[arg-type]
            await quiet.append(session, [NewEvent(data=title("late"))])
            await connection.execute("ALTER TABLE events RENAME TO events_away")
        with pytest.raises(TimeoutError):
            await stream.next(0.3)
        await connection.execute("ALTER TABLE events_away RENAME TO events")
        assert sequences(await stream.take(1)) == [2]
    await connection.close()


class _OneConnection:
    """A pool of one connection that is inside a transaction."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncpg.Connection]:
        yield self._connection


class _Nobody:
    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        pass


# --- notifications --------------------------------------------------------------------------------------------------------


async def test_streams_catch_up_after_the_listener_lost_its_connection(
    api: ApiProcess, other: ApiProcess, dsn: str
) -> None:
    session = await new_session(api)
    async with SseConnection(other.sse(session)) as stream:
        await stream.take(1)
        connection = await asyncpg.connect(dsn)
        for round_ in range(3):
            killed = await connection.fetchval(
                """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = 'everruns-listener'"""
            )
            assert killed, "no listener to cut off"
            # While nobody listens, notifications go nowhere.
            await write(api.log, session, title(str(round_)))
            assert sequences(await stream.take(1)) == [2 + round_]
            async with asyncio.timeout(10):
                while not await _listeners(connection):  # noqa: ASYNC110  # a row in another process's table
                    await asyncio.sleep(0.02)
        await connection.close()


async def _listeners(connection: asyncpg.Connection) -> int:
    """Listeners of both processes, once they are ready."""
    count = await connection.fetchval(
        """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
           AND application_name = 'everruns-listener' AND query LIKE 'LISTEN %'"""
    )
    return count if count == 2 else 0


async def test_a_foreign_notification_disturbs_nobody(api: ApiProcess, dsn: str) -> None:
    session = await new_session(api)
    connection = await asyncpg.connect(dsn)
    async with SseConnection(api.sse(session)) as stream:
        await stream.take(1)
        key = session.removeprefix("session_")
        for payload in ("", "nonsense", f"{key}", f"{key}:", f"{key}:-1", f"{key}:x", f"{key}:99999", "0" * 32 + ":7"):
            await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
        await write(api.log, session, title("a"))
        assert sequences(await stream.take(1)) == [2]
    await connection.close()


# --- slow readers ---------------------------------------------------------------------------------------------------------


async def test_a_reader_that_stops_reading_holds_nobody_up_and_later_gets_everything_in_order(
    api: ApiProcess, other: ApiProcess
) -> None:
    session = await new_session(api)
    batches, batch = 60, 10
    slow = await SseConnection(other.sse(session), receive_buffer=8_192).open()
    async with SseConnection(api.sse(session)) as quick, SseConnection(other.sse(session)) as second:
        for _ in range(batches):
            await write(api.log, session, *[title("y" * 20_000) for _ in range(batch)])
        expected = list(range(1, batches * batch + 2))
        assert sequences(await quick.take(len(expected), 60)) == expected
        assert sequences(await second.take(len(expected), 60)) == expected
    await write(api.log, session, title("last"))
    assert sequences(await slow.take(len(expected) + 1, 60)) == [*expected, expected[-1] + 1]
    await slow.close()


async def test_a_slow_reader_of_one_long_message_sees_the_text_grow_without_a_break(
    api: ApiProcess, other: ApiProcess
) -> None:
    session = await new_session(api)
    message_id = new_id(Prefix.MESSAGE)
    pieces = [f"{number} " + "z" * 150 for number in range(300)]
    slow = await SseConnection(other.sse(session), {"exclude": "session.started"}, receive_buffer=8_192).open()
    for payload in deltas(message_id, pieces):
        await write(api.log, session, payload)
    await write(api.log, session, answered(message_id, "".join(pieces)))
    frames = await slow.take(len(pieces) + 1, 60)
    await slow.close()
    assert_accumulated(frames[:-1], pieces, 0)


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_unread_streams_do_not_grow_the_server(stack: Stack) -> None:
    session = await stack.create_session()
    url = f"{stack.api}/sessions/{session}/sse"
    pool = await asyncpg.create_pool(stack.database_url, min_size=1, max_size=1)
    log = EventLog(pool, _Nobody())
    unread = [await SseConnection(url, receive_buffer=8_192).open() for _ in range(10)]

    async def pour() -> int:
        async with SseConnection(url) as healthy:
            last = (await log.read(session, after_sequence=0, limit=10_000))[-1].sequence
            for _ in range(20):
                last = (await write(log, session, *[title("m" * 40_000) for _ in range(20)]))[-1].sequence
            await healthy.take(last, 60)
        return last

    await pour()
    before = resident_bytes(stack.pid)
    await pour()
    last = await pour()
    grown = resident_bytes(stack.pid) - before
    # 32 MB went by: a queue per reader would hold ten times that.
    assert grown < 25_000_000, f"{grown / 1e6:.0f} MB"
    assert sequences(await unread[0].take(last, 60)) == list(range(1, last + 1))
    for stream in unread:
        await stream.close()
    await pool.close()


# --- processes ------------------------------------------------------------------------------------------------------------


async def test_sigterm_ends_streams_cleanly_and_the_process_quickly(stack: Stack) -> None:
    server, url = await stack.start_server()
    session = await stack.create_session()
    streams = [await SseConnection(f"{url}/sessions/{session}/sse").open() for _ in range(5)]
    for stream in streams:
        await stream.take(1)
    server.stopping = True
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    for stream in streams:
        ending = await stream.rest()
        assert [frame.event for frame in ending] == ["disconnecting"]
        assert ending[0].json == {"reason": "shutdown", "retry_ms": 100}
        await stream.close()
    async with asyncio.timeout(15):
        await server.wait()
    # Streams that do not end by themselves are cut after five seconds of grace.
    assert time.monotonic() - began < 5
    assert server.exit_code == 0
    # The same cursor works at the process that is left.
    await stack.ask(session, "still there?")


async def test_a_turn_streams_the_same_bytes_from_the_worker_s_own_process_and_from_another(stack: Stack) -> None:
    server, url = await stack.start_server()
    session = await stack.create_session(capabilities=[{"ref": "test_weather"}])
    script: dict[str, object] = {
        "mode": "script",
        "turns": [
            {
                "thinking": "Where is that?",
                "text": AWKWARD,
                "tool_calls": [{"name": "get_weather", "arguments": {"location": "Lviv \u2028 \U0001f327"}}],
                "inter_token_delay_ms": 5,
            },
            {"text": "Take an umbrella. " * 40, "inter_token_delay_ms": 2},
        ],
    }
    async with (
        SseConnection(f"{stack.api}/sessions/{session}/sse") as home,
        SseConnection(f"{url}/sessions/{session}/sse") as away,
    ):
        await home.take(1)
        await away.take(1)
        log = await stack.ask(session, "Weather?", llmsim=script)
        one, two = await home.take(len(log)), await away.take(len(log))
    assert sequences(one) == [event.sequence for event in log]
    assert [frame.raw for frame in one] == [frame.raw for frame in two]
    joined = [await _joined(api, session, event.id) for api in (stack.api, url) for event in log[:: len(log) // 6]]
    for frames in joined:
        assert [frame.raw for frame in frames] == [frame.raw for frame in one][len(one) - len(frames) :]
    texts = {
        str(frame.payload["message_id"]): str(frame.payload["accumulated"])
        for frame in one
        if frame.event == "output.message.delta"
    }
    completed = [frame.payload["message"] for frame in one if frame.event == "output.message.completed"]
    assert list(texts.values()) == [message["content"][0]["text"] for message in completed]  # type: ignore[index]
    await stack.kill(server)


async def _joined(api: str, session: str, cursor: str) -> list[Frame]:
    """Everything from a cursor on, up to the end of the turn."""
    frames: list[Frame] = []
    async with SseConnection(f"{api}/sessions/{session}/sse", {"since_id": cursor}) as stream:
        await stream.expect("connected")
        with contextlib.suppress(TimeoutError):
            while not frames or frames[-1].event != "session.idled":
                frames += await stream.take(1, 1)
    return frames
