"""Where capabilities meet: waits for a person with sub-agents, budgets, forks, schedules, guardrails, servers and clients."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from activities.capabilities.test_faults import EFFECTS_FILE_VARIABLE
from api.reconciler import Reconciler
from db.messages import MessageStore, NewMessage
from domain.approvals import ApprovalDecision, Decision
from domain.events import StoredEvent
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.messages import TextPart
from infra.turn_gateway import TemporalTurns, TurnOptions
from tests.fakes.mcp_servers import Seen, discovered, helper, hostile, json_rpc, listed
from tests.integration.test_budgets_end_to_end import at_rest_in_temporal, budget_for, called
from tests.integration.test_subagents import child_of, eventually, parent_with, reports, results, task_in, tasks_of
from tests.stack import Json, Stack, of_type
from tests.sub_agents import bg, call, calling, fg, saying, script

ASKING: Final[Json] = {"ref": "tool_approval", "config": {"exempt": ["spawn_agent"]}}
REFS: Final[list[Json]] = [
    {"ref": "session_storage"},
    {"ref": "subagents"},
    {"ref": "test_faults"},
    {"ref": "ask_user"},
    ASKING,
]
LOOK: Final[Json] = {
    "type": "client_side",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object"},
}
QUESTION: Final[Json] = {
    "questions": [{"id": "size", "question": "Which size?", "options": [{"label": "S"}, {"label": "L"}]}]
}
WAITING: Final = "waitingfortoolresults"


@pytest.fixture(scope="module")
def effects() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="everruns-effects-") as directory:
        yield Path(directory) / "effects"


@pytest.fixture(scope="module")
async def stack(effects: Path) -> AsyncIterator[Stack]:
    """Its only worker is a process of its own, which a test may kill."""
    environment = {"MCP_ALLOW_PRIVATE_HOSTS": "127.0.0.1", EFFECTS_FILE_VARIABLE: str(effects)}
    async with Stack(no_worker=True, environment=environment) as running:
        await running.start_worker()
        yield running


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with helper(Seen()) as address:
        yield address


def store(key: str, call_id: str) -> Json:
    return call("kv_store", call_id, operation="set", key=key, value="1")


async def asked(stack: Stack, *turns: Json, **fields: Any) -> str:
    """A session whose turn waits for a person or a client."""
    session = await stack.create_session(**{"harness_name": "base", "capabilities": REFS, **fields})
    await stack.post_message(session, "go", llmsim=script(*turns))
    await stack.wait_for_event(session, "tool.call_requested")
    return session


async def decide(stack: Stack, session: str, decision: str, *call_ids: str) -> httpx.Response:
    decisions = [{"tool_call_id": one, "decision": decision} for one in call_ids]
    return await stack.client.post(f"sessions/{session}/tool-approvals", json={"decisions": decisions})


async def decided(stack: Stack, session: str, decision: str, *call_ids: str) -> Json:
    answer = await decide(stack, session, decision, *call_ids)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def keys(stack: Stack, session: str) -> list[str]:
    return [one["key"] for one in (await stack.client.get(f"sessions/{session}/storage/keys")).json()["data"]]


async def status(stack: Stack, session: str) -> object:
    return (await stack.session(session))["status"]


async def rewind_is_refused(stack: Stack, session: str) -> None:
    refused = await stack.client.post(f"sessions/{session}/rewind", json={"sequence": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "session_busy")


async def forked(stack: Stack, session: str) -> str:
    answer = await stack.client.post(f"sessions/{session}/fork", json={})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def types(log: list[StoredEvent], *wanted: str) -> list[str]:
    return [event.type for event in log if event.type in wanted]


def statuses(log: list[StoredEvent]) -> dict[str, object]:
    return {call_id: one["status"] for call_id, one in results(log).items()}


def prompt(log: list[StoredEvent]) -> str:
    """What the newest model call was sent besides what was sent before."""
    return msgspec.json.encode(of_type(log, "llm.generation")[-1]["messages"]).decode()


# --- sub-agents -------------------------------------------------------------------------------------------------------


async def test_a_call_of_a_sub_agent_that_needs_leave_is_decided_in_its_session_and_the_parent_goes_on(
    stack: Stack,
) -> None:
    session = await parent_with(stack, calling(store("a", "call_c")), saying("Stored it."), capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("All done.")))
    task = await task_in(stack, session, "awaiting_input")
    child = child_of(task)
    assert task["input_request"]["expected"]["tool_call_ids"] == ["call_c"]  # type: ignore[index]
    assert await status(stack, session) == "active"
    assert await keys(stack, child) == []
    await decided(stack, child, "allow", "call_c")
    await stack.idle(session)
    assert "Stored it." in str(results(await stack.check(session))["call_a"]["result"])
    await stack.check(child)
    assert await keys(stack, child) == ["a"]


async def test_a_rejected_call_of_a_sub_agent_reaches_its_model_and_the_parent_goes_on(stack: Stack) -> None:
    session = await parent_with(stack, calling(store("a", "call_c")), saying("I must not."), capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("All done.")))
    child = child_of(await task_in(stack, session, "awaiting_input"))
    await decided(stack, child, "reject", "call_c")
    await stack.idle(session)
    assert "I must not." in str(results(await stack.check(session))["call_a"]["result"])
    assert "rejected this call" in prompt(await stack.check(child))
    assert await keys(stack, child) == []


async def test_a_cancel_of_the_parent_withdraws_what_its_sub_agent_asks(stack: Stack) -> None:
    session = await parent_with(stack, calling(store("a", "call_c")), saying("Stored it."), capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("All done.")))
    child = child_of(await task_in(stack, session, "awaiting_input"))
    assert (await stack.cancel(session))["status"] == "cancelled"
    await stack.idle(session)
    await stack.idle(child)
    await task_in(stack, session, "canceled")
    await stack.check(session)
    assert statuses(await stack.check(child)) == {"call_c": "cancelled"}
    late = await decide(stack, child, "allow", "call_c")
    assert (late.status_code, late.json()["code"]) == (409, "not_waiting_for_approvals")
    assert await keys(stack, child) == []


async def test_a_capability_of_data_does_not_bring_spawning_back_where_the_depth_ends(stack: Stack) -> None:
    definition = {"name": "delegating", "description": "Delegates.", "dependencies": ["subagents"]}
    made = await stack.client.post("capabilities", json={"definition": definition})
    assert made.status_code == 201, made.text
    refs = [{"ref": "declarative:delegating"}]
    session = await parent_with(stack, calling(fg()), saying("Passed on."), capabilities=refs)
    await stack.ask(session, "go", llmsim=script(calling(fg("call_a")), saying("Done.")))
    (first,) = await tasks_of(stack, session)
    (second,) = await tasks_of(stack, child_of(first))
    deepest = await stack.check(child_of(second))
    (refused,) = results(deepest).values()
    assert "Unknown tool `spawn_agent`" in str(refused["error"])
    assert not of_type(deepest, "capability.skipped")
    assert await tasks_of(stack, child_of(second)) == []
    for one, offered in ((child_of(first), True), (child_of(second), False)):
        report = (await stack.client.get(f"sessions/{one}/context-report")).json()
        assert any(part["source_id"] == "spawn_agent" for part in report["contributions"]) is offered


# --- budgets ----------------------------------------------------------------------------------------------------------


async def test_an_allowed_call_runs_although_the_budget_is_used_up_and_its_result_is_there_after_a_top_up(
    stack: Stack,
) -> None:
    session = await stack.create_session(harness_name="base", capabilities=REFS)
    budget = await budget_for(stack, session, limit=1)
    await stack.post_message(session, "go", llmsim=script(calling(store("a", "call_a")), saying("Done.")))
    await stack.wait_for_event(session, "tool.call_requested")
    assert await status(stack, session) == WAITING
    await decided(stack, session, "allow", "call_a")
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a"]
    assert types(log, "tool.completed", "turn.failed", "turn.completed") == ["tool.completed", "turn.failed"]
    assert of_type(log, "turn.failed")[0]["error_code"] == "budget_exhausted"
    await called(stack, "POST", f"budgets/{budget['id']}/top-up", amount=1_000_000)
    log = await stack.ask(session, "And now?", llmsim={"mode": "fixed", "text": "It is stored."})
    (generation,) = of_type(log, "llm.generation")
    assert generation["prompt_message_count"] == 6, "system, question, call, result, apology, question"
    await stack.check(session)


async def test_a_budget_pauses_a_turn_after_the_call_that_was_allowed_and_nothing_is_lost(stack: Stack) -> None:
    session = await stack.create_session(harness_name="base", capabilities=REFS)
    await budget_for(stack, session, limit=1_000_000, soft_limit=1)
    await stack.post_message(session, "go", llmsim=script(calling(store("a", "call_a")), saying("Done.")))
    await stack.wait_for_event(session, "tool.call_requested")
    assert not types(await stack.read_log(session), "budget.paused"), "waiting for a person costs nothing"
    await decided(stack, session, "allow", "call_a")
    await stack.wait_for_event(session, "budget.paused")
    await at_rest_in_temporal(stack, session)
    log = await stack.check(session, finished=False)
    assert types(log, "tool.completed", "budget.paused") == ["tool.completed", "budget.paused"]
    await rewind_is_refused(stack, session)
    fork = await forked(stack, session)
    await called(stack, "POST", f"sessions/{session}/resume")
    await stack.idle(session)
    log = await stack.check(session)
    assert (statuses(log), await keys(stack, session)) == ({"call_a": "success"}, ["a"])
    assert types(log, "turn.started", "turn.completed") == ["turn.started", "turn.completed"]
    await stack.ask(fork, "and here?", llmsim={"mode": "fixed", "text": "Here too."})
    assert types(await stack.check(fork), "turn.cancelled", "turn.completed") == ["turn.cancelled", "turn.completed"]
    assert await keys(stack, fork) == ["a"]


async def test_an_answer_to_a_server_counts_although_a_budget_pauses_the_turn_afterwards(
    stack: Stack, url: str
) -> None:
    session = await stack.create_session(harness_name="base", mcpServers={"docs": {"url": url}})
    await budget_for(stack, session, limit=1_000_000, soft_limit=1)
    await stack.post_message(
        session, "go", llmsim=script(calling(call("mcp_docs__book", "call_a", hotel="Ritz")), saying("Booked."))
    )
    await stack.wait_for_event(session, "tool.call_requested")
    answer = {"action": "accept", "content": {"nights": 3}}
    assert (await stack.client.post(f"sessions/{session}/elicitation-answers", json=answer)).status_code == 200
    await stack.wait_for_event(session, "budget.paused")
    await called(stack, "POST", f"sessions/{session}/resume")
    await stack.idle(session)
    assert "Ritz: accept 3" in str(results(await stack.check(session))["call_a"]["result"])


async def test_a_sub_agent_that_a_budget_pauses_is_cancelled_with_its_parent(stack: Stack) -> None:
    session = await parent_with(stack, calling(call("test_effect_pure", name="x")), saying("Done."), capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("All done.")))
    child = child_of(await task_in(stack, session, "running", "awaiting_input"))
    await stack.wait_for_event(child, "turn.started")
    await stack.idle(session)
    # It has ended; asked once more in the background, it is paused by a budget of its own.
    await budget_for(stack, child, limit=1_000_000, soft_limit=1)
    (task,) = await tasks_of(stack, session)
    more = call("message_task", "call_m", task_id=task["id"], message="Again.")
    before = (await stack.read_log(session))[-1].sequence
    await stack.post_message(session, "more", llmsim=script(calling(more), saying("Asked.")))
    await stack.wait_for_event(session, "tool.call_requested", after_sequence=before)
    await decided(stack, session, "allow", "call_m")
    await stack.wait_for_event(child, "budget.paused")
    await stack.idle(session, after_sequence=before)
    assert (await stack.cancel(session))["status"] == "cancelled"
    await task_in(stack, session, "canceled")
    await stack.idle(child)
    await stack.check(child)
    await stack.check(session)


# --- forks and rewinds ------------------------------------------------------------------------------------------------


async def test_a_fork_asks_nobody_about_a_call_that_the_source_still_waits_for(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")), saying("Done."))
    await rewind_is_refused(stack, session)
    fork = await forked(stack, session)
    assert await status(stack, fork) == "idle"
    assert (await stack.client.get(f"sessions/{fork}/tool-approvals")).json()["data"] == []
    assert (await decide(stack, fork, "allow", "call_a")).status_code == 409
    await decided(stack, session, "allow", "call_a")
    await stack.idle(session)
    assert (await decide(stack, fork, "allow", "call_a")).status_code == 409, "decided in the source only"
    assert (await keys(stack, session), await keys(stack, fork)) == (["a"], [])
    log = await stack.ask(fork, "never mind", llmsim={"mode": "fixed", "text": "Fine."})
    assert "forked before this call had returned" in prompt(log)
    await stack.check(fork)
    await stack.check(session)
    early = next(event.sequence for event in await stack.read_log(session) if event.type == "tool.call_requested")
    answer = await stack.client.post(f"sessions/{session}/fork", json={"sequence": early})
    assert answer.status_code == 201, answer.text
    before = answer.json()["id"]
    assert (await decide(stack, before, "allow", "call_a")).status_code == 409, "the copy was cut before the decision"
    await stack.check(before)


async def test_a_fork_of_a_session_that_asks_its_user_rests(stack: Stack) -> None:
    session = await asked(stack, calling(call("ask_user", "call_a", **QUESTION)), saying("L it is."))
    await rewind_is_refused(stack, session)
    fork = await forked(stack, session)
    answers = {"status": "answered", "answers": [{"id": "size", "selected": ["L"]}]}
    assert (await stack.client.post(f"sessions/{fork}/question-answers", json=answers)).status_code == 409
    assert (await stack.client.post(f"sessions/{session}/question-answers", json=answers)).status_code == 200
    await stack.idle(session)
    await stack.check(session)
    await stack.ask(fork, "never mind", llmsim={"mode": "fixed", "text": "Fine."})
    await stack.check(fork)


async def test_a_fork_does_not_touch_the_sub_agent_that_the_source_waits_for(stack: Stack) -> None:
    session = await parent_with(stack, calling(store("a", "call_c")), saying("Stored it."), capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("All done.")))
    child = child_of(await task_in(stack, session, "awaiting_input"))
    await rewind_is_refused(stack, session)
    fork = await forked(stack, session)
    assert await tasks_of(stack, fork) == []
    await stack.ask(fork, "never mind", llmsim={"mode": "fixed", "text": "Fine."})
    assert (await stack.cancel(fork))["status"] == "no_op"
    assert await status(stack, child) == WAITING
    await decided(stack, child, "allow", "call_c")
    await stack.idle(session)
    assert statuses(await stack.check(session)) == {"call_a": "success"}
    assert statuses(await stack.check(fork)) == {"call_a": "cancelled"}
    await stack.check(child)


async def test_a_fork_asks_anew_where_the_source_was_told_to_allow_always(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")), calling(store("b", "call_b")), saying("Done."))
    await decided(stack, session, "allow_always", "call_a")
    await stack.idle(session)
    fork = await forked(stack, session)
    assert (await stack.client.get(f"sessions/{fork}/tool-approvals")).json()["rules"] == []
    before = (await stack.read_log(fork))[-1].sequence
    await stack.post_message(fork, "go on", llmsim=script(calling(store("c", "call_c")), saying("Done.")))
    await stack.wait_for_event(fork, "tool.call_requested", after_sequence=before)
    await decided(stack, fork, "reject", "call_c")
    await stack.idle(fork, after_sequence=before)
    await stack.check(fork)
    assert await keys(stack, fork) == await keys(stack, session) == ["a", "b"]


# --- what arrives while a person is asked -----------------------------------------------------------------------------


async def test_a_report_and_a_scheduled_message_do_not_end_the_wait_for_a_decision(stack: Stack) -> None:
    session = await parent_with(stack, saying("Found it."), capabilities=REFS)
    both = calling(bg("call_b"), store("a", "call_a"))
    await stack.post_message(session, "go", llmsim=script(both, saying("Done."), saying("And that.")))
    await stack.wait_for_event(session, "tool.call_requested")
    await task_in(stack, session, "succeeded")
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    made = await stack.client.post(f"sessions/{session}/schedules", json={"message": "Later!", "scheduled_at": soon})
    assert made.status_code == 201, made.text
    await stack.wait_for_event(session, "schedule.triggered")

    query = "UPDATE inbox SET created_at = created_at - interval '1 minute' WHERE session_id = $1"
    await stack.pool.execute(query, parse_id(Prefix.SESSION, session))
    # To whom unread messages as old as these are a reason to look.
    await Reconciler(MessageStore(stack.log), TemporalTurns(await stack.temporal(), TurnOptions())).once()
    assert await status(stack, session) == WAITING
    await decided(stack, session, "allow", "call_a")
    await stack.wait_for_event(session, "session.idled", 2)
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a"]
    assert statuses(log)["call_a"] == "success"
    assert len(reports(log)) == 1
    turns = types(log, "turn.started", "turn.completed", "turn.cancelled")
    assert turns == ["turn.started", "turn.completed"] * 2, (
        "the report is read in the turn, the schedule's message after it"
    )


@pytest.mark.parametrize("reported", [False, True])
async def test_a_decision_whose_word_was_lost_is_carried_out_all_the_same(stack: Stack, reported: bool) -> None:
    session = await parent_with(stack, saying("Found it."), capabilities=REFS)
    calls = calling(bg("call_b"), store("a", "call_a")) if reported else calling(store("a", "call_a"))
    await stack.post_message(session, "go", llmsim=script(calls, saying("Done."), saying("And that.")))
    await stack.wait_for_event(session, "tool.call_requested")
    if reported:
        await task_in(stack, session, "succeeded")
        await stack.wait_for_event(session, "input.message", 2)
    # As a server that is killed between its commit and its word leaves it.
    decision = ApprovalDecision(tool_call_id="call_a", decision=Decision.ALLOW)
    assert (await MessageStore(stack.log).decide_approvals(DEFAULT_ORG_ID, session, [decision])).ends_wait
    key = parse_id(Prefix.SESSION, session)
    await stack.pool.execute(
        "UPDATE session_state SET updated_at = now() - interval '2 minutes' WHERE session_id = $1", key
    )
    await stack.pool.execute("UPDATE inbox SET created_at = now() - interval '1 minute' WHERE session_id = $1", key)
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log)["call_a"] == "success"
    assert types(log, "turn.cancelled", "turn.completed") == ["turn.completed"]


async def test_a_message_whose_word_was_lost_withdraws_the_call_all_the_same(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")))
    new = NewMessage(content=[TextPart(text="Never mind")], metadata={"llmsim": {"mode": "fixed", "text": "Fine."}})
    assert (await MessageStore(stack.log).post(DEFAULT_ORG_ID, session, new)).ends_wait
    key = parse_id(Prefix.SESSION, session)
    await stack.pool.execute("UPDATE inbox SET created_at = now() - interval '1 minute' WHERE session_id = $1", key)
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "cancelled"}
    assert types(log, "turn.cancelled", "turn.completed") == ["turn.cancelled", "turn.completed"]


# --- several waits in one answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["approval", "answer"])
async def test_an_answer_to_a_server_and_a_decision_of_one_batch_come_in_any_order(
    stack: Stack, url: str, first: str
) -> None:
    config = {"ref": "tool_approval", "config": {"exempt": ["mcp_*"]}}
    session = await asked(
        stack,
        calling(call("mcp_docs__book", "call_m", hotel="Ritz"), store("a", "call_a")),
        saying("Done."),
        capabilities=[{"ref": "session_storage"}, config],
        mcpServers={"docs": {"url": url}},
    )
    (requested,) = of_type(await stack.read_log(session), "tool.call_requested")
    assert {one["kind"] for one in requested["waiting"]} == {"approval", "elicitation"}  # type: ignore[union-attr,index]

    async def approve() -> httpx.Response:
        return await decide(stack, session, "allow", "call_a")

    async def answer() -> httpx.Response:
        body = {"action": "accept", "content": {"nights": 2}}
        return await stack.client.post(f"sessions/{session}/elicitation-answers", json=body)

    order = [approve, answer] if first == "approval" else [answer, approve]
    assert (await order[0]()).json()["status"] == WAITING
    assert await status(stack, session) == WAITING
    assert (await order[1]()).json()["status"] == "active"
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a"]
    assert "Ritz: accept 2" in str(results(log)["call_m"]["result"])
    assert len(of_type(log, "act.started")) == len(of_type(log, "act.completed")) == 1


async def test_a_server_may_ask_again_and_again_in_a_call_that_was_allowed(stack: Stack) -> None:
    """More often than a call may lose its worker; and the leave to run is no answer to the server."""
    rounds = 5
    received: list[dict[str, Any]] = []

    async def reply(request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        match request.get("method"):
            case "server/discover":
                return discovered(request)
            case "tools/list":
                return listed(request, {"name": "ask", "description": "Asks.", "inputSchema": {"type": "object"}})
            case "tools/call":
                received.append(request["params"])
                if len(received) <= rounds:
                    form = {
                        "mode": "form",
                        "message": f"Question {len(received)}?",
                        "requestedSchema": {"type": "object", "properties": {}},
                    }
                    return json_rpc(
                        request,
                        {
                            "resultType": "input_required",
                            "inputRequests": {"k": {"method": "elicitation/create", "params": form}},
                            "requestState": f"state {len(received)}",
                        },
                    )
                return json_rpc(request, {"resultType": "complete", "content": [{"type": "text", "text": "Thanks."}]})
            case _:
                return json_rpc(request, {})

    async with hostile(reply) as address:
        session = await asked(
            stack, calling(call("mcp_docs__ask", "call_a")), saying("Done."), mcpServers={"docs": {"url": address}}
        )
        await decided(stack, session, "allow", "call_a")
        for number in range(rounds):
            requested = await stack.wait_for_event(session, "tool.call_requested", number + 2)
            waiting: Any = requested[-1].data["waiting"]
            assert waiting[0]["request"]["message"] == f"Question {number + 1}?"
            repeated = await decide(stack, session, "allow", "call_a")
            assert repeated.status_code == 200, "the same decision again is harmless"
            assert repeated.json()["status"] == WAITING
            answer = await stack.client.post(f"sessions/{session}/elicitation-answers", json={"action": "accept"})
            assert answer.status_code == 200, answer.text
        await stack.idle(session)
        log = await stack.check(session)
    assert "Thanks." in str(results(log)["call_a"]["result"])
    assert types(log, "turn.completed", "turn.sealed") == ["turn.completed"]
    assert "inputResponses" not in received[0]
    assert [one["inputResponses"] for one in received[1:]] == [{"k": {"action": "accept"}}] * rounds
    assert len(of_type(log, "tool.started")) == len(of_type(log, "act.started")) == 1


async def test_calls_of_one_concurrency_class_run_one_after_another_once_they_are_allowed(stack: Stack) -> None:
    calls = [call("test_serial", f"call_{name}", seconds=0.3) for name in "abc"]
    session = await asked(stack, calling(*calls), saying("Done."))
    await decided(stack, session, "reject", "call_b")
    await decided(stack, session, "allow", "call_c", "call_a")
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "success", "call_b": "error", "call_c": "success"}
    times = [msgspec.json.decode(results(log)[one]["result"][0]["text"]) for one in ("call_a", "call_c")]  # type: ignore[index]
    assert times[0]["ended_at"] <= times[1]["started_at"]


async def test_what_nobody_decides_in_time_is_told_so_once_and_what_was_allowed_runs(stack: Stack) -> None:
    """The wait of the undecided call does not begin anew with the run of the other one."""
    refs = [{"ref": "session_storage"}, {"ref": "tool_approval", "config": {"wait_hours": 0.0005}}]
    session = await asked(
        stack, calling(store("a", "call_a"), store("b", "call_b")), saying("Done."), capabilities=refs
    )
    await decided(stack, session, "allow", "call_a")
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "success", "call_b": "timeout"}
    # Given up at the end of its own wait, before the other one had run.
    assert types(log, "tool.started", "tool.completed") == ["tool.completed", "tool.started", "tool.completed"]


@pytest.mark.parametrize("first", ["approval", "answer"])
async def test_a_question_and_a_decision_of_one_batch_come_in_any_order(stack: Stack, first: str) -> None:
    both = calling(call("ask_user", "call_q", **QUESTION), store("a", "call_a"))
    session = await asked(stack, both, saying("Done."))

    async def approve() -> httpx.Response:
        return await decide(stack, session, "allow", "call_a")

    async def answer() -> httpx.Response:
        body = {"status": "answered", "answers": [{"id": "size", "selected": ["L"]}]}
        return await stack.client.post(f"sessions/{session}/question-answers", json=body)

    order = [approve, answer] if first == "approval" else [answer, approve]
    for place, give in enumerate(order):
        assert (given := await give()).status_code == 200, given.text
        assert given.json()["status"] == ("active" if place else WAITING)
    await stack.idle(session)
    assert statuses(await stack.check(session)) == {"call_a": "success", "call_q": "success"}
    assert await keys(stack, session) == ["a"]


async def test_an_interrupt_while_allowed_calls_run_stops_them_and_is_read_in_the_turn(stack: Stack) -> None:
    calls = [call("test_serial", f"call_{name}", seconds=30) for name in "ab"]
    session = await asked(stack, calling(*calls))
    await decided(stack, session, "allow", "call_a", "call_b")
    await stack.wait_for_event(session, "tool.started")
    answer: Json = {"mode": "fixed", "text": "Stopped."}
    await stack.post_message(session, "Stop", llmsim=answer, delivery="interrupt")
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "cancelled", "call_b": "error"}
    assert "not executed" in str(results(log)["call_b"]["error"])
    assert types(log, "tool.started", "turn.completed", "turn.cancelled") == ["tool.started", "turn.completed"]


# --- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", ["allow", "reject"])
async def test_a_decision_does_not_take_a_call_from_the_client_that_runs_it(stack: Stack, decision: str) -> None:
    session = await asked(stack, calling(store("a", "call_a"), call("look", "call_l")), saying("Done."), tools=[LOOK])
    await decided(stack, session, decision, "call_a")

    async def waits_again() -> bool:
        return await status(stack, session) == WAITING

    await stack.wait_for_event(session, "tool.completed")
    await eventually("the client's call is waited for", waits_again)
    body = {"tool_results": [{"tool_call_id": "call_l", "result": "a tree"}]}
    answer = await stack.client.post(f"sessions/{session}/tool-results", json=body)
    assert answer.status_code == 200, answer.text
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "success" if decision == "allow" else "error", "call_l": "success"}
    assert "a tree" in prompt(log)
    assert types(log, "tool.call_requested", "turn.completed") == ["tool.call_requested", "turn.completed"]
    (completed,) = of_type(log, "turn.completed")
    assert completed["iterations"] == 2


async def test_a_client_may_return_a_result_while_what_was_allowed_runs(stack: Stack) -> None:
    slow = call("test_effect_idempotent", "call_a", seconds=1, name="slow")
    session = await asked(stack, calling(slow, call("look", "call_l")), saying("Done."), tools=[LOOK])
    await decided(stack, session, "allow", "call_a")
    await stack.wait_for_event(session, "tool.started")
    body = {"tool_results": [{"tool_call_id": "call_l", "result": "a tree"}]}
    answer = await stack.client.post(f"sessions/{session}/tool-results", json=body)
    assert answer.status_code == 200, answer.text
    await stack.idle(session)
    assert statuses(await stack.check(session)) == {"call_a": "success", "call_l": "success"}


@pytest.mark.parametrize("delivery", ["interrupt", "steer"])
async def test_a_message_withdraws_both_a_decision_s_and_a_client_s_call(stack: Stack, delivery: str) -> None:
    session = await asked(stack, calling(store("a", "call_a"), call("look", "call_l")), saying("Done."), tools=[LOOK])
    await stack.post_message(session, "Stop", llmsim={"mode": "fixed", "text": "Stopped."}, delivery=delivery)
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_a": "cancelled", "call_l": "cancelled"}
    assert (await decide(stack, session, "allow", "call_a")).status_code == 409
    assert await keys(stack, session) == []


async def test_a_decision_that_is_sent_again_after_the_turn_tells_that_the_session_rests(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")), saying("Done."))
    assert (await decided(stack, session, "allow", "call_a"))["status"] == "active"
    await stack.idle(session)
    assert (await decided(stack, session, "allow", "call_a"))["status"] == "idle"
    assert await keys(stack, session) == ["a"]
    await stack.check(session)


# --- capabilities that look at calls and results ----------------------------------------------------------------------


async def test_calls_that_were_rejected_count_as_repetitions_and_nobody_is_asked_once_more(stack: Stack) -> None:
    refs = [*REFS, {"ref": "loop_detection", "config": {"threshold": 2}}]
    turns = [calling(store("a", f"call_{number}")) for number in range(3)]
    session = await asked(stack, *turns, saying("I give up."), capabilities=refs)
    await decided(stack, session, "reject", "call_0")
    await stack.wait_for_event(session, "tool.call_requested", 2)
    await decided(stack, session, "reject", "call_1")
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, "tool.call_requested")) == 2
    assert "repeats itself" in str(results(log)["call_2"]["error"])
    assert await keys(stack, session) == []


async def test_nobody_is_asked_about_a_call_that_a_guardrail_blocks(stack: Stack) -> None:
    checks = [{"type": "blocklist", "stage": "tool_use", "words": ["forbidden"]}]
    for refs in (
        [{"ref": "guardrails", "config": {"checks": checks}}, *REFS],
        [*REFS, {"ref": "guardrails", "config": {"checks": checks}}],
    ):
        session = await stack.create_session(harness_name="base", capabilities=refs)
        turns = script(calling(store("forbidden", "call_a")), saying("Oh."))
        log = await stack.ask(session, "go", llmsim=turns)
        assert not of_type(log, "tool.call_requested")
        assert "not allowed here" in str(results(log)["call_a"]["error"])
        assert await keys(stack, session) == []
        await stack.check(session)


async def test_a_long_result_that_a_guardrail_replaces_is_kept_nowhere_as_it_was(stack: Stack) -> None:
    # What it finds stands in what only the file would have held.
    check = {"type": "regex", "stage": "tool_output", "patterns": ["0003700: "], "replacement": "withheld"}
    refs = [
        {"ref": "session_file_system"},
        {"ref": "test_faults"},
        {"ref": "guardrails", "config": {"checks": [check]}},
    ]
    session = await stack.create_session(harness_name="base", capabilities=refs)
    large = [call("test_large", f"call_{name}", bytes=size) for name, size in (("a", 200_100), ("b", 190_000))]
    log = await stack.ask(session, "go", llmsim=script(calling(*large), saying("Done.")))
    assert results(log)["call_a"]["result"] == [{"type": "text", "text": "withheld"}]
    assert (await stack.client.get(f"sessions/{session}/fs/outputs/call_a.stdout")).status_code == 404
    kept = await stack.client.get(f"sessions/{session}/fs/outputs/call_b.stdout")
    assert len(kept.json()["content"]) == 190_000
    assert b"0003700: " not in b"".join(event.data for event in await stack.check(session))


# --- crashes ----------------------------------------------------------------------------------------------------------


def runs(effects: Path, call_id: str) -> int:
    return effects.read_text().count(f"{call_id} ") if effects.exists() else 0


async def test_a_call_that_was_allowed_while_no_worker_lived_runs_exactly_once(stack: Stack, effects: Path) -> None:
    once = call("test_effect_once", "call_once", name="once")
    session = await asked(stack, calling(once), saying("Done."))
    await stack.kill(stack.workers[0])
    await decided(stack, session, "allow", "call_once")
    await stack.start_worker()
    await stack.idle(session)
    log = await stack.check(session)
    assert statuses(log) == {"call_once": "success"}
    assert runs(effects, "call_once") == 1


async def test_a_worker_killed_right_after_the_decision_leaves_a_call_that_ran_at_most_once(
    stack: Stack, effects: Path
) -> None:
    once = call("test_effect_once", "call_killed", name="killed", seconds=0.3)
    session = await asked(stack, calling(once), saying("Done."))
    await decided(stack, session, "allow", "call_killed")
    await stack.restart_worker(stack.workers[0])
    await stack.idle(session)
    log = await stack.check(session)
    ran = runs(effects, "call_killed")
    outcome = results(log)["call_killed"]
    assert ran == 1 if outcome["success"] else ran <= 1
    assert outcome["success"] or "unknown" in str(outcome["error"]).lower()
