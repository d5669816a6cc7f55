"""`everruns demo`: it proves what it says, its exit code depends on the proof, and it leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest

from cli.demo_proof import findings
from cli.demo_story import REAL, SIMULATED, Kill, SeenEvent, Teller, Told
from domain.events import StoredEvent
from domain.ids import Prefix, new_id
from tests.processes import Command, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

WHOLE_DEMO_SECONDS = 100.0
"""It takes about 25; this is a busy machine's."""

ORPHANS_SECONDS = 15.0


# --- The command ----------------------------------------------------------------------------------------------------


async def test_the_demo_survives_two_kills_proves_it_and_stays_up_when_asked() -> None:
    async with Command("demo", "--keep") as demo:
        await demo.printed("Ctrl-C stops everything.", WHOLE_DEMO_SECONDS)
        out = demo.out
        kills = re.findall(r"SIGKILL  worker (\d+) dies (.*); worker (\d+) starts", out)
        assert [where for _, where, _ in kills] == ["in the middle of the model's answer", "in the middle of a tool"]
        (first, _, second), (second_again, _, third) = kills
        assert second == second_again
        assert len({first, second, third}) == 3
        proof = out.partition("The proof, after ")[2]
        assert len(re.findall(r"^  ✓ ", proof, re.MULTILINE)) == 7
        assert "✗" not in out
        assert "\x1b" not in out, "plain lines when it is not a terminal"
        assert demo.err == ""
        link = re.search(r"http://\S+/workflows/session_[0-9a-f]{32}", out)
        events = re.search(r"http://\S+/events", out)
        assert link is not None
        assert events is not None
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            assert "<html" in (await client.get(link[0])).text.lower()
            stored = (await client.get(events[0])).raise_for_status().json()["data"]
        assert f"{len(stored)} of the {len(stored)} stored events reached the client" in out
        assert {"reason.recovered", "turn.completed"} <= {event["type"] for event in stored}
        demo.interrupt()
        assert await demo.wait() == 0
        await demo.nothing_left()


@pytest.mark.parametrize("moment", ["is a process of its own", "SIGKILL"])
async def test_ctrl_c_ends_the_demo_at_any_time_and_leaves_nothing(moment: str) -> None:
    async with Command("demo") as demo:
        await demo.printed(moment)
        demo.interrupt()
        assert await demo.wait() == 130, "it proved nothing"
        assert "The proof" not in demo.out
        assert demo.err == ""
        await demo.nothing_left()


async def test_a_killed_demo_takes_its_worker_and_servers_with_it() -> None:
    async with Command("demo") as demo:
        await demo.printed("SIGKILL")
        assert len(demo.everything()) >= 5, "itself, the supervisor, PostgreSQL, Temporal and a worker"
        demo.send_signal(signal.SIGKILL)
        assert await demo.wait() == -signal.SIGKILL
        await demo.nothing_left(ORPHANS_SECONDS)


async def test_an_unknown_model_is_told_with_the_known_ones() -> None:
    code, _, err = await run(
        "demo", "--model", "gpt-0", "--simulated", environment={"DEFAULT_GEMINI_API_KEY": "sk-test"}
    )
    assert code == 1
    (line,) = err.strip().splitlines()
    assert line.startswith("everruns: there is no model `gpt-0`; there are llmsim-echo, llmsim-lorem, llmsim-model")


# --- The proof ------------------------------------------------------------------------------------------------------

SESSION = new_id(Prefix.SESSION)
CALL = "call_1"
PAYLOADS: Sequence[tuple[str, dict[str, object]]] = (
    ("act.started", {"tool_calls": [{"id": CALL, "name": "get_weather"}]}),
    ("tool.completed", {"tool_call_id": CALL, "tool_name": "get_weather", "success": True, "status": "success"}),
    ("output.message.delta", {"turn_id": "turn", "message_id": "message", "delta": "Hi", "offset": 0}),
    (
        "output.message.completed",
        {"message": {"id": "message", "role": "agent", "content": [{"type": "text", "text": "Hi"}], "created_at": ""}},
    ),
)


def log_and_seen() -> tuple[list[StoredEvent], list[SeenEvent]]:
    """A log of a few events and a client that saw all of them."""
    log: list[StoredEvent] = []
    seen: list[SeenEvent] = []
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for sequence, (name, data) in enumerate(PAYLOADS, start=1):
        event_id = new_id(Prefix.EVENT)
        log.append(
            StoredEvent(
                id=event_id,
                type=name,
                ts=now,
                session_id=SESSION,
                sequence=sequence,
                context=b"{}",
                data=json.dumps(data).encode(),
            )
        )
        shown = {**data, "accumulated": data["delta"]} if "delta" in data else data
        whole: dict[str, object] = {
            "id": event_id,
            "type": name,
            "ts": "2026-01-01T00:00:00.000Z",
            "session_id": SESSION,
            "sequence": sequence,
            "context": {},
            "data": shown,
        }
        seen.append(msgspec.convert({**whole, "whole": whole}, SeenEvent))
    return log, seen


def broken_claims(
    log: Sequence[StoredEvent],
    seen: Sequence[SeenEvent],
    *,
    effects: Sequence[str] = ("call_1 1 invitation",),
    recovered: int = 2,
) -> set[str]:
    kills = SIMULATED.kills()
    for kill in kills[:recovered]:
        kill.recovered_seconds = 3.0
    told = Told(session_id=SESSION, seen=list(seen), kills=kills, seconds=20.0)
    found = findings(told, log, effects, Teller(story=SIMULATED))
    broken = {finding.claim for finding in found if not finding.holds}
    # Four events are no whole turn, and check_log says so; it has its own tests.
    return broken - {"the log breaks no rule"}


def test_the_proof_holds_when_the_client_saw_the_log() -> None:
    assert broken_claims(*log_and_seen()) == set()


@pytest.mark.parametrize("missing", range(len(PAYLOADS)))
def test_the_proof_breaks_when_an_event_is_lost(missing: int) -> None:
    log, seen = log_and_seen()
    assert "nothing lost" in broken_claims(log, seen[:missing] + seen[missing + 1 :])


@pytest.mark.parametrize("twice", range(len(PAYLOADS)))
def test_the_proof_breaks_when_an_event_comes_twice(twice: int) -> None:
    log, seen = log_and_seen()
    assert "nothing doubled, same order, same content" in broken_claims(log, [*seen[: twice + 1], *seen[twice:]])


def test_the_proof_breaks_when_the_order_is_another() -> None:
    log, seen = log_and_seen()
    assert broken_claims(log, [seen[1], seen[0], *seen[2:]]) == {"nothing doubled, same order, same content"}


def test_the_proof_breaks_when_the_stream_added_up_to_another_text() -> None:
    log, seen = log_and_seen()
    delta = msgspec.structs.replace(seen[2], data={**seen[2].data, "accumulated": "H"})
    assert "every streamed message is whole" in broken_claims(log, [*seen[:2], delta, seen[3]])


def test_the_proof_breaks_when_a_call_has_two_results() -> None:
    log, seen = log_and_seen()
    assert "one result per tool call" in broken_claims(log, [*seen, seen[1]])


@pytest.mark.parametrize("effects", [(), ("call_1 1 invitation", "call_1 2 invitation")])
def test_the_proof_breaks_unless_the_effect_happened_once(effects: Sequence[str]) -> None:
    assert broken_claims(*log_and_seen(), effects=effects) == {"the invitation was sent once"}


def test_the_proof_breaks_when_a_kill_did_not_happen_or_was_not_survived() -> None:
    assert broken_claims(*log_and_seen(), recovered=1) == {"the worker was killed twice, the turn went on"}


# --- The proof of a model that nobody scripted -------------------------------------------------------------------------

KILLED = datetime(2026, 1, 1, tzinfo=UTC)
WHOLE_LETTER: Sequence[tuple[float, str, dict[str, object]]] = (
    (-3, "act.started", {"tool_calls": [{"id": CALL, "name": "test_effect_once"}]}),
    (-3, "tool.started", {"tool_call": {"id": CALL, "name": "test_effect_once", "arguments": {}}}),
    (-2, "tool.completed", {"tool_call_id": CALL, "tool_name": "test_effect_once", "success": True}),
    (-1, "output.message.delta", {"message_id": "letter", "delta": "Dear ", "accumulated": "Dear "}),
    (4, "output.message.delta", {"message_id": "letter", "delta": "team", "accumulated": "Dear team"}),
    (5, "llm.generation", {"metadata": {"success": True, "response_id": "resp_1"}}),
    (5, "output.message.completed", {"message": {"id": "letter", "content": [{"type": "text", "text": "Dear team"}]}}),
    (6, "turn.completed", {"usage": {"input_tokens": 9, "output_tokens": 3, "effective_cost_usd": 0.01}}),
)
RESTART = (3, "reason.recovered", {"message_id": "letter", "mode": "restart", "accumulated_len": 5})


def seen_at(after_seconds: float, name: str, data: dict[str, object]) -> SeenEvent:
    return SeenEvent(
        id=new_id(Prefix.EVENT),
        type=name,
        ts=KILLED + timedelta(seconds=after_seconds),
        sequence=1,
        data=data,
        context={"exec_id": "step"},
    )


def interrupted(seen: Sequence[SeenEvent]) -> list[Kill]:
    """The letter's kill, as the client settles it, and that of a tool, which never came."""
    in_answer, in_tool = REAL.kills()
    for event in seen:
        if in_answer.at is None and event.subject == "letter":
            in_answer.aim(event, KILLED.timestamp())
        elif in_answer.recovered_seconds is None and not in_answer.too_late:
            in_answer.is_settled_by(event)
    return [in_answer, in_tool]


def verdicts(
    story: Sequence[tuple[float, str, dict[str, object]]],
    *,
    effects: Sequence[str] = ("call_1 1 invitation",),
    priced: bool = True,
) -> dict[str, bool | None]:
    """Of the claims that only a real model's story makes: they need no log."""
    seen = [seen_at(*event) for event in story]
    told = Told(session_id=SESSION, seen=seen, kills=interrupted(seen), seconds=20.0)
    found = findings(told, [], effects, Teller(story=REAL, background=True, is_priced=priced))
    about = ("answer, the", "tool, the", "one gen", "result", "twice", "ended", "cost")
    return {key: finding.holds for key in about for finding in found if key in finding.claim}


def without(*types: str) -> list[tuple[float, str, dict[str, object]]]:
    return [event for event in WHOLE_LETTER if event[1] not in types]


SHOWN = {
    "answer, the": True,
    "tool, the": None,
    "one gen": True,
    "result": True,
    "twice": True,
    "ended": True,
    "cost": True,
}


def test_what_a_real_model_did_is_proven_and_what_it_did_not_do_is_not_claimed() -> None:
    assert verdicts(WHOLE_LETTER) == SHOWN
    silent = verdicts(without("act.started", "tool.started", "tool.completed"), effects=())
    assert silent == SHOWN | {"result": None, "twice": None}


def test_text_that_was_taken_back_is_no_resumed_generation() -> None:
    anew = (4, "output.message.delta", {"message_id": "letter", "delta": "Dear team", "accumulated": "Dear team"})
    story = [*WHOLE_LETTER[:4], RESTART, anew, *WHOLE_LETTER[5:]]
    assert verdicts(story) == SHOWN | {"one gen": False}


def test_a_second_generation_of_the_same_step_is_told() -> None:
    assert verdicts([*WHOLE_LETTER, WHOLE_LETTER[5]]) == SHOWN | {"one gen": False}


def test_a_kill_that_nothing_came_after_fails_and_one_that_came_too_late_claims_nothing() -> None:
    lost = verdicts(WHOLE_LETTER[:4])
    assert lost["answer, the"] is False
    late = [*WHOLE_LETTER[:4], (0.1, *WHOLE_LETTER[6][1:]), WHOLE_LETTER[7]]
    assert verdicts(late) == SHOWN | {"answer, the": None, "one gen": None}


def test_an_effect_that_happened_twice_fails_a_real_models_proof_and_one_that_never_did_does_not() -> None:
    assert verdicts(WHOLE_LETTER, effects=("call_1 1 invitation", "call_1 2 invitation")) == SHOWN | {"twice": False}
    assert verdicts(WHOLE_LETTER, effects=()) == SHOWN


def test_two_results_of_a_call_and_a_turn_without_an_answer_fail_a_real_models_proof() -> None:
    assert verdicts([*WHOLE_LETTER, WHOLE_LETTER[2]]) == SHOWN | {"result": False}
    assert verdicts(without("output.message.completed"))["ended"] is False
    assert verdicts(without("turn.completed")) == SHOWN | {"ended": False, "cost": False}


def test_a_cost_that_is_missing_fails_only_where_the_price_is_known() -> None:
    free = (6, "turn.completed", {"usage": {"input_tokens": 9, "output_tokens": 3}})
    story = [*without("turn.completed"), free]
    assert verdicts(story) == SHOWN | {"cost": False}
    assert verdicts(story, priced=False) == SHOWN | {"cost": None}
