"""`GET …/events` and its summary: every filter, the windows, and what a malformed value is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest

from api.services import Services
from domain.clock import timestamp
from domain.events import (
    EventContext,
    EventPayload,
    InputMessage,
    NewEvent,
    OutputMessageCompleted,
    OutputMessageDelta,
    ReasonCompleted,
    ReasonStarted,
    SessionIdled,
    SessionTitleUpdated,
    StoredEvent,
    ToolCompleted,
    ToolStarted,
    ToolStatus,
    TurnCompleted,
    TurnFailed,
    TurnStarted,
)
from domain.ids import Prefix, new_id
from domain.messages import Message, Role, TextPart
from domain.tools import ToolCall
from tests.conftest import API

NOW = "2026-01-01T00:00:00.000Z"
TEXTS = ["100% sure_thing", 'she said "no"', "back\\slash and\nnewline", "Straße \U0001f9ec"]


def message(role: Role, text: str) -> Message:
    return Message(id=new_id(Prefix.MESSAGE), role=role, content=[TextPart(text=text)], created_at=NOW)


@dataclass(frozen=True)
class Told:
    """A session whose log is known: three turns, each of one reason step with three deltas and one tool call."""

    id: str
    log: list[StoredEvent]
    turns: list[str]
    execs: list[str]

    def of(self, *types: str) -> list[int]:
        return [event.sequence for event in self.log if event.type in types]


async def tell(services: Services, session: str) -> Told:
    turns: list[str] = []
    execs: list[str] = []
    for number in range(3):
        turn, step = new_id(Prefix.TURN), new_id(Prefix.EXEC)
        turns.append(turn)
        execs.append(step)
        in_turn = EventContext(turn_id=turn, trace_id=turn)
        in_step = EventContext(turn_id=turn, exec_id=step, trace_id=turn)
        asked, answer = message(Role.USER, TEXTS[number]), message(Role.AGENT, "abc")
        tool = ["get_weather", "add", "get_weather"][number]
        call = ToolCall(id=f"call_{number}", name=tool, arguments={"location": TEXTS[3]})

        def event(payload: EventPayload, context: EventContext = in_turn, tags: list[str] | None = None) -> NewEvent:
            return NewEvent(data=payload, context=context, tags=tags)

        await services.log.append(
            session,
            [
                event(InputMessage(message=asked), EventContext(), tags=["all", f"turn-{number}"]),
                event(TurnStarted(turn_id=turn, input_message_id=asked.id)),
                event(ReasonStarted(harness_id=new_id(Prefix.HARNESS)), in_step),
                *(
                    event(OutputMessageDelta(turn_id=turn, message_id=answer.id, delta=letter, offset=offset), in_step)
                    for offset, letter in enumerate("abc")
                ),
                event(OutputMessageCompleted(message=answer), in_step),
                event(ReasonCompleted(success=True, has_tool_calls=True, tool_call_count=1), in_step),
                event(ToolStarted(tool_call=call), in_step),
                event(
                    ToolCompleted(tool_call_id=call.id, tool_name=tool, success=True, status=ToolStatus.SUCCESS),
                    in_step,
                ),
                event(
                    TurnFailed(turn_id=turn, error="no") if number == 2 else TurnCompleted(turn_id=turn, iterations=1)
                ),
                event(SessionIdled(turn_id=turn)),
            ],
        )
        await asyncio.sleep(0.003)  # Turns are told apart by time, which is served in milliseconds.
    return Told(session, await services.log.read(session, after_sequence=0, limit=1_000), turns, execs)


@pytest.fixture
async def told(services: Services, make_session) -> Told:
    return await tell(services, (await make_session())["id"])


async def ask(client: httpx.AsyncClient, session: str, **parameters: Any) -> httpx.Response:
    answer = await client.get(f"{API}/sessions/{session}/events", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer


async def found(client: httpx.AsyncClient, told: Told, **parameters: Any) -> list[int]:
    return [event["sequence"] for event in (await ask(client, told.id, **parameters)).json()["data"]]


PER_TURN = 12
TURN_STARTS = [3, 15, 27]
"""`session.started` is 1, then each turn begins with its message."""


async def test_without_parameters_the_whole_log_oldest_first(client: httpx.AsyncClient, told: Told) -> None:
    answer = await ask(client, told.id)
    events = answer.json()["data"]
    assert [event["sequence"] for event in events] == list(range(1, 3 * PER_TURN + 2))
    assert "x-total-count" not in answer.headers
    assert [event["id"] for event in events] == [event.id for event in told.log]
    assert events[0]["context"] == {}
    assert events[2]["context"] == {"turn_id": told.turns[0], "trace_id": told.turns[0]}
    assert events[1]["tags"] == ["all", "turn-0"]


async def test_deltas_carry_the_text_so_far_even_when_the_first_ones_are_filtered_out(
    client: httpx.AsyncClient, told: Told
) -> None:
    for parameters, expected in (
        ({"types": "output.message.delta", "turn_id": told.turns[0]}, ["a", "ab", "abc"]),
        ({"types": "output.message.delta", "after_sequence": 6, "before_sequence": 9}, ["abc"]),
        ({"types": "output.message.delta", "turn_id": told.turns[1], "order_desc": "true"}, ["abc", "ab", "a"]),
    ):
        events = (await ask(client, told.id, **parameters)).json()["data"]
        assert [event["data"]["accumulated"] for event in events][-3:] == expected


async def test_types_narrow_and_exclude_removes(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(client, told, types=["turn.started", "turn.completed"]) == told.of(
        "turn.started", "turn.completed"
    )
    assert await found(client, told, types=["turn.started", "turn.completed"], exclude="turn.completed") == TURN_STARTS
    without = await found(client, told, exclude=["output.message.delta", "tool.started"])
    assert without == [n for n in range(1, 38) if n not in told.of("output.message.delta", "tool.started")]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"after_sequence": 35}, [36, 37]),
        ({"before_sequence": 3}, [1, 2]),
        ({"after_sequence": 3, "before_sequence": 6}, [4, 5]),
        ({"after_sequence": 37}, []),
        ({"before_sequence": 1}, []),
        ({"after_sequence": 3, "limit": 2}, [4, 5]),
        ({"after_sequence": 2**63 - 1}, []),
        ({"before_sequence": 0}, []),
    ],
)
async def test_cursors_are_exclusive(
    client: httpx.AsyncClient, told: Told, parameters: dict[str, int], expected: list[int]
) -> None:
    assert await found(client, told, **parameters) == expected


async def test_since_id_goes_on_after_a_stored_event_and_never_fails(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(client, told, since_id=told.log[34].id) == [36, 37]
    assert await found(client, told, since_id=new_id(Prefix.EVENT)) == []
    assert len(await found(client, told, since_id="nonsense")) == 37


async def test_limit_gives_the_newest_from_where_a_turn_begins(client: httpx.AsyncClient, told: Told) -> None:
    answer = await ask(client, told.id, limit=4)
    assert [event["sequence"] for event in answer.json()["data"]] == list(range(27, 38))
    assert answer.headers["x-total-count"] == str(37 - 9), "deltas are not counted"
    # Exactly at a turn's beginning nothing is added, and the first turn's page reaches back to the session's start.
    assert await found(client, told, limit=11) == list(range(27, 38))
    assert await found(client, told, limit=3, before_sequence=3) == [1, 2]
    assert await found(client, told, limit=1_000) == list(range(1, 38))


async def test_pages_back_from_the_end_add_up_to_the_log(client: httpx.AsyncClient, told: Told) -> None:
    pages: list[int] = []
    before = 1_000
    for _ in range(20):
        page = await found(client, told, limit=5, before_sequence=before)
        if not page:
            break
        assert page == list(range(page[0], page[-1] + 1))
        pages = page + pages
        before = page[0]
    assert pages == list(range(1, 38))


async def test_a_filtered_page_is_not_widened_and_counts_what_matches(client: httpx.AsyncClient, told: Told) -> None:
    answer = await ask(client, told.id, limit=2, types=["tool.completed", "output.message.delta"])
    assert [event["sequence"] for event in answer.json()["data"]] == told.of("tool.completed", "output.message.delta")[
        -2:
    ]
    assert answer.headers["x-total-count"] == "3"


async def test_around_gives_a_window_on_each_side(client: httpx.AsyncClient, told: Told) -> None:
    center = told.log[19]
    assert await found(client, told, around=center.id, window=2) == [18, 19, 20, 21, 22]
    assert await found(client, told, around=center.id) == list(range(1, 38))
    assert await found(client, told, around=told.log[0].id, window=2) == [1, 2, 3]
    assert await found(client, told, around=told.log[-1].id, window=1) == [36, 37]
    assert await found(client, told, around=center.id, window=1, order_desc="true") == [21, 20, 19]
    # The neighbours are filtered, the event itself is asked for by name.
    assert await found(client, told, around=center.id, window=1, types="turn.started") == [15, 20, 27]


async def test_times_are_inclusive_and_may_have_any_offset(client: httpx.AsyncClient, told: Told) -> None:
    second = told.log[PER_TURN + 1].ts
    first_of_second = PER_TURN + 2
    assert (await found(client, told, from_ts=second.isoformat()))[0] == first_of_second
    assert (await found(client, told, from_ts=timestamp(second)))[0] == first_of_second
    assert (await found(client, told, from_ts=second.replace(tzinfo=None).isoformat()))[0] == first_of_second
    kyiv = (second + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00"
    assert (await found(client, told, from_ts=kyiv))[0] == first_of_second
    both = await found(client, told, from_ts=second.isoformat(), to_ts=second.isoformat())
    assert both == list(range(first_of_second, first_of_second + PER_TURN))
    assert await found(client, told, to_ts="2020-01-01T00:00:00Z") == []


async def test_turn_exec_and_trace(client: httpx.AsyncClient, told: Told) -> None:
    whole = list(range(15, 26))
    assert await found(client, told, turn_id=told.turns[1]) == whole
    assert await found(client, told, trace_id=told.turns[1]) == whole
    assert await found(client, told, exec_id=told.execs[1]) == list(range(16, 24))
    assert await found(client, told, turn_id=new_id(Prefix.TURN)) == []
    assert await found(client, told, trace_id="anything") == []


async def test_one_of_the_tags_is_enough(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(client, told, tags="all") == told.of("input.message")
    assert await found(client, told, tags=["turn-0", "turn-2", "nobody's"]) == [2, 26]
    assert await found(client, told, tags="nobody's") == []


async def test_tool_name_finds_beginning_and_end_of_its_calls(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(client, told, tool_name="add") == [22, 23]
    assert await found(client, told, tool_name="get_weather", types="tool.completed") == [11, 35]
    assert await found(client, told, tool_name="get") == []


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        ("100% sure", [2]),
        ("0%s", []),
        ("%", [2]),
        ("sure_thing", [2]),
        ("sure.thing", []),
        ("SHE SAID", [14]),
        ('said "no"', [14]),
        ("back\\slash", [26]),
        ("and\nnewline", [26]),
        ("\\", [26]),
        ("Straße \U0001f9ec", [10, 22, 34]),
        ("nobody said this", []),
        ("", list(range(1, 38))),
    ],
)
async def test_q_is_a_substring_in_any_case_in_which_wildcards_mean_themselves(
    client: httpx.AsyncClient, told: Told, q: str, expected: list[int]
) -> None:
    assert await found(client, told, q=q) == expected


async def test_order_desc_turns_every_answer_around(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(client, told, order_desc="true") == list(range(37, 0, -1))
    assert await found(client, told, order_desc="true", limit=4) == list(range(37, 26, -1))
    assert await found(client, told, order_desc="false", types="turn.started") == TURN_STARTS


async def test_filters_combine(client: httpx.AsyncClient, told: Told) -> None:
    assert await found(
        client,
        told,
        turn_id=told.turns[0],
        types=["tool.started", "tool.completed"],
        q="get_weather",
        after_sequence=10,
    ) == [11]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"window": 0}, "window"),
        ({"window": 501}, "window"),
        ({"after_sequence": -1}, "after_sequence"),
        ({"after_sequence": 2**63}, "after_sequence"),
        ({"before_sequence": "x"}, "before_sequence"),
        ({"before_sequence": 10**30}, "before_sequence"),
        ({"around": "event_1"}, "around"),
        ({"around": "event_" + "a" * 32}, "around"),
        ({"around": "event_" + "a" * 32, "after_sequence": 1}, "around"),
        ({"around": "event_" + "a" * 32, "before_sequence": 1}, "around"),
        ({"around": "event_" + "a" * 32, "since_id": "event_" + "b" * 32}, "around"),
        ({"from_ts": "yesterday"}, "from_ts"),
        ({"to_ts": "2026-13-01T00:00:00Z"}, "to_ts"),
        ({"to_ts": "9999-12-31T23:59:59-12:00"}, "to_ts"),
        ({"from_ts": "0001-01-01T00:00:00+12:00"}, "from_ts"),
        ({"turn_id": "turn_1"}, "turn_id"),
        ({"turn_id": "exec_" + "a" * 32}, "turn_id"),
        ({"exec_id": "exec_" + "A" * 32}, "exec_id"),
        ({"order_desc": "sideways"}, "order_desc"),
        ({"types": "turn.exploded"}, "types"),
        ({"types": "turn.started,turn.failed"}, "types"),
        ({"exclude": ["turn.started"] * 65}, "exclude"),
        ({"trace_id": "a\0b"}, "trace_id"),
        ({"tool_name": "\0"}, "tool_name"),
        ({"q": "\0"}, "q"),
        ({"tags": ["fine", "\0"]}, "tags[1]"),
    ],
)
async def test_a_malformed_value_is_400_and_named(
    client: httpx.AsyncClient, make_session, parameters: dict[str, Any], field: str
) -> None:
    session = (await make_session())["id"]
    answer = await client.get(f"{API}/sessions/{session}/events", params=parameters)
    assert answer.status_code == 400, answer.text
    problem = answer.json()
    assert problem["field"] == field
    assert problem["error"] == {"code": problem["code"], "message": problem["detail"]}


@pytest.mark.parametrize("path", ["events", "events/summary"])
@pytest.mark.parametrize(("session", "status"), [("session_1", 400), ("session_" + "a" * 32, 404)])
async def test_the_log_of_no_session(client: httpx.AsyncClient, path: str, session: str, status: int) -> None:
    assert (await client.get(f"{API}/sessions/{session}/{path}")).status_code == status


async def test_without_a_limit_at_most_10000_events_and_searches_1000(
    client: httpx.AsyncClient, services: Services, make_session
) -> None:
    session = (await make_session())["id"]
    for _ in range(11):
        await services.log.append(session, [NewEvent(data=SessionTitleUpdated(title="needle"))] * 1_000)
    everything = (await ask(client, session)).json()["data"]
    assert (len(everything), everything[-1]["sequence"]) == (10_000, 10_000)
    assert len((await ask(client, session, q="needle")).json()["data"]) == 1_000


@pytest.mark.parametrize("text", ["a\0b", "x" * 300 + "\0", "\0"])
async def test_a_nul_in_a_message_is_replaced_wherever_it_stands(
    client: httpx.AsyncClient, make_session, text: str
) -> None:
    """PostgreSQL cannot store it; the client is told what is stored."""
    session = (await make_session())["id"]
    body = {"message": {"content": [{"type": "text", "text": text}]}}
    posted = await client.post(f"{API}/sessions/{session}/messages", json=body)
    assert posted.status_code == 201, posted.text
    assert posted.json()["content"] == [{"type": "text", "text": text.replace("\0", "\ufffd")}]
    stored = (await ask(client, session, types="input.message")).json()["data"][0]["data"]["message"]
    assert stored == posted.json()
    assert (await client.get(f"{API}/sessions/{session}/messages")).json()["data"] == [posted.json()]


async def test_summary_counts_by_type(client: httpx.AsyncClient, told: Told) -> None:
    answer = await client.get(f"{API}/sessions/{told.id}/events/summary")
    summary = answer.json()
    counts = {one["event_type"]: one["count"] for one in summary["by_type"]}
    assert counts == {name: len(told.of(name)) for name in {event.type for event in told.log}}
    assert (summary["total"], summary["turn_count"], summary["error_count"]) == (37, 3, 1)
    assert summary["first_ts"] == timestamp(told.log[0].ts)
    assert summary["last_ts"] == timestamp(told.log[-1].ts)
