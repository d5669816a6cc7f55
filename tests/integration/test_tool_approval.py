"""`tool_approval`: calls wait for a person, run once when allowed, never when not, and nothing that restarts ends the wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from everruns_sdk.agent import AgentClient

from tests.integration.test_docs_examples import commands, curl_request
from tests.stack import Json, Stack, of_type

REFS: list[Json] = [{"ref": "session_storage"}, {"ref": "current_time"}, {"ref": "tool_approval"}]


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(no_worker=True) as running:
        await running.start_worker()
        yield running


def script(*turns: Json) -> Json:
    return {"mode": "script", "turns": list(turns)}


def store(key: str, call_id: str) -> Json:
    return {"id": call_id, "name": "kv_store", "arguments": {"operation": "set", "key": key, "value": "1"}}


def calling(*calls: Json) -> Json:
    return {"tool_calls": list(calls)}


async def asked(
    stack: Stack, *turns: Json, capabilities: list[Json] | None = None, tools: list[Json] | None = None
) -> str:
    """A session whose turn waits for a decision."""
    session = await stack.create_session(capabilities=capabilities or REFS, tools=tools or [])
    await stack.post_message(session, "go", llmsim=script(*turns))
    await stack.wait_for_event(session, "tool.call_requested")
    return session


async def decide(
    stack: Stack, session: str, *decisions: tuple[str, str], reason: str | None = None
) -> tuple[int, Json]:
    listed = [{"tool_call_id": call, "decision": decision, "reason": reason} for call, decision in decisions]
    answer = await stack.client.post(f"sessions/{session}/tool-approvals", json={"decisions": listed})
    return answer.status_code, answer.json()


async def keys(stack: Stack, session: str) -> list[str]:
    return [one["key"] for one in (await stack.client.get(f"sessions/{session}/storage/keys")).json()["data"]]


async def test_an_allowed_call_runs_once_although_its_worker_was_killed_while_it_waited(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    session = await asked(stack, calling(store("a", "call_a")), {"text": "Done."})
    log = await stack.read_log(session)
    (requested,) = of_type(log, "tool.call_requested")
    assert requested["tool_calls"] == []
    waiting_calls: Any = requested["waiting"]
    (waiting,) = waiting_calls
    assert (waiting["kind"], waiting["tool_call"]["id"]) == ("approval", "call_a")
    await stack.kill(stack.workers[0])
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert await keys(stack, session) == []
    await stack.start_worker()
    pending = (await stack.client.get(f"sessions/{session}/tool-approvals")).json()
    assert [one["tool_call"]["name"] for one in pending["data"]] == ["kv_store"]
    async with AgentClient(stack.api, "evr_agent_test") as agent:  # the SDK's own call
        assert await agent.submit_tool_approvals(
            session, {"decisions": [{"tool_call_id": "call_a", "decision": "allow"}]}
        ) == {"resolved": [{"tool_call_id": "call_a", "tool": "kv_store", "outcome": "allowed"}], "status": "active"}
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a"]
    assert len(of_type(log, "tool.started")) == len(of_type(log, "tool.completed")) == 1
    (completed,) = of_type(log, "turn.completed")
    assert completed["iterations"] == 2
    assert [one["outcome"] for one in of_type(log, "tool.approval_resolved")] == ["allowed"]
    assert len(of_type(log, "act.started")) == len(of_type(log, "act.completed")) == 1


async def test_calls_that_need_no_leave_run_first(stack: Stack) -> None:
    clock: Json = {"id": "call_t", "name": "get_current_time", "arguments": {}}
    session = await asked(stack, calling(store("a", "call_a"), clock), {"text": "Done."})
    assert [one["tool_call_id"] for one in of_type(await stack.read_log(session), "tool.completed")] == ["call_t"]
    assert (await decide(stack, session, ("call_a", "allow")))[0] == 200
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a"]
    assert len(of_type(log, "act.started")) == len(of_type(log, "act.completed")) == 1


async def test_a_rejected_call_does_not_run_and_the_model_reads_why(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")), {"text": "As you wish."})
    assert (await decide(stack, session, ("call_a", "reject"), reason="use the other store"))[1]["status"] == "active"
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == []
    assert not of_type(log, "tool.started")
    prompt = msgspec.json.encode(of_type(log, "llm.generation")[-1]["messages"]).decode()
    assert "rejected this call" in prompt
    assert "use the other store" in prompt


async def test_the_turn_goes_on_when_everything_is_decided(stack: Stack) -> None:
    both = calling(store("a", "call_a"), store("b", "call_b"), store("c", "call_c"))
    session = await asked(stack, both, {"text": "Done."})
    assert (await decide(stack, session, ("call_b", "allow")))[1]["status"] == "waitingfortoolresults"
    assert await keys(stack, session) == []
    status, answer = await decide(stack, session, ("call_a", "reject"), ("call_c", "allow"))
    assert (status, answer["status"]) == (200, "active")
    await stack.idle(session)
    log = await stack.check(session)
    assert await keys(stack, session) == ["b", "c"]
    assert {one["tool_call_id"]: one["success"] for one in of_type(log, "tool.completed")} == {
        "call_a": False,
        "call_b": True,
        "call_c": True,
    }


async def test_a_lasting_decision_holds_for_waiting_and_later_calls_until_it_is_taken_back(stack: Stack) -> None:
    both = calling(store("a", "call_a"), store("b", "call_b"))
    session = await asked(stack, both, calling(store("c", "call_c")), {"text": "Done."})
    status, answer = await decide(stack, session, ("call_a", "allow_always"))
    resolved: Any = answer["resolved"]
    assert (status, {one["tool_call_id"] for one in resolved}) == (200, {"call_a", "call_b"})
    await stack.idle(session)
    assert await keys(stack, session) == ["a", "b", "c"]
    rules = (await stack.client.get(f"sessions/{session}/tool-approvals")).json()["rules"]
    assert [(one["tool"], one["decision"]) for one in rules] == [("kv_store", "allow_always")]
    before = len(await stack.check(session))

    assert (await stack.client.delete(f"sessions/{session}/tool-approvals/rules/kv_store")).status_code == 204
    assert (await stack.client.delete(f"sessions/{session}/tool-approvals/rules/kv_store")).status_code == 404
    await stack.post_message(
        session, "again", llmsim=script(calling(store("d", "call_d")), calling(store("e", "call_e")), {"text": "Done."})
    )
    await stack.wait_for_event(session, "tool.call_requested", after_sequence=before)
    assert (await decide(stack, session, ("call_d", "reject_always")))[0] == 200
    await stack.idle(session, after_sequence=before)
    log = await stack.check(session)
    assert await keys(stack, session) == ["a", "b", "c"]
    assert "not allow this tool" in str(of_type(log, "tool.completed")[-1]["error"])


async def test_the_same_decision_again_is_harmless_and_another_one_is_refused(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a"), store("b", "call_b")), {"text": "Done."})
    first = await decide(stack, session, ("call_a", "allow"))
    assert await decide(stack, session, ("call_a", "allow")) == first
    status, problem = await decide(stack, session, ("call_a", "reject"))
    assert (status, problem["code"]) == (409, "not_waiting_for_approvals")
    assert (await decide(stack, session, ("call_b", "allow")))[0] == 200
    await stack.idle(session)
    assert (await decide(stack, session, ("call_a", "allow")))[0] == 200
    assert (await decide(stack, session, ("call_b", "reject")))[0] == 409
    await stack.check(session)


async def test_unknown_calls_and_malformed_decisions_change_nothing(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")), {"text": "Done."})
    elsewhere = await stack.create_session()
    status, problem = await decide(stack, session, ("call_a", "allow"), ("call_x", "allow"))
    assert (status, problem["field"]) == (400, "decisions[1].tool_call_id")
    assert (await decide(stack, session, ("call_a", "perhaps")))[0] == 400
    assert (await decide(stack, session))[0] == 400
    assert (await decide(stack, elsewhere, ("call_a", "allow")))[0] == 400
    unknown = "session_" + "0" * 32
    assert (await decide(stack, unknown, ("call_a", "allow")))[0] == 404
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert await keys(stack, session) == []
    await stack.cancel(session)
    await stack.idle(session)
    await stack.check(session)
    assert (await decide(stack, session, ("call_a", "allow")))[1]["code"] == "not_waiting_for_approvals"
    assert await keys(stack, session) == []


async def test_nobody_is_asked_about_a_call_that_could_not_run(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS)
    wrong: Json = {"id": "call_w", "name": "kv_store", "arguments": {"operation": "explode"}}
    await stack.post_message(session, "go", llmsim=script(calling(wrong), {"text": "Oh."}))
    await stack.idle(session)
    log = await stack.check(session)
    assert not of_type(log, "tool.call_requested")
    assert "Invalid arguments" in str(of_type(log, "tool.completed")[0]["error"])


async def test_a_call_nobody_decides_about_is_not_executed(stack: Stack) -> None:
    refs: list[Json] = [{"ref": "session_storage"}, {"ref": "tool_approval", "config": {"wait_hours": 0.0003}}]
    session = await asked(stack, calling(store("a", "call_a")), {"text": "Without, then."}, capabilities=refs)
    await stack.idle(session)
    log = await stack.check(session)
    (completed,) = of_type(log, "tool.completed")
    assert (completed["status"], await keys(stack, session)) == ("timeout", [])
    assert "was not executed" in str(completed["error"])


async def test_a_new_message_withdraws_the_call(stack: Stack) -> None:
    session = await asked(stack, calling(store("a", "call_a")))
    await stack.post_message(session, "Never mind", llmsim={"mode": "fixed", "text": "Fine."})
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert [one["status"] for one in of_type(log, "tool.completed")] == ["cancelled"]
    assert (await decide(stack, session, ("call_a", "allow")))[0] == 409


async def test_results_of_client_tools_do_not_end_the_wait_for_a_decision(stack: Stack) -> None:
    look: Json = {"type": "client_side", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    seen: Json = {"id": "call_l", "name": "look", "arguments": {}}
    session = await asked(stack, calling(store("a", "call_a"), seen), {"text": "Done."}, tools=[look])
    (requested,) = of_type(await stack.read_log(session), "tool.call_requested")
    calls: Any = requested["tool_calls"]
    assert [one["id"] for one in calls] == ["call_l"]
    body = {"tool_results": [{"tool_call_id": "call_l", "result": "a tree"}]}
    assert (await stack.client.post(f"sessions/{session}/tool-results", json=body)).status_code == 200
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert (await decide(stack, session, ("call_a", "allow")))[1]["status"] == "active"
    await stack.idle(session)
    log = await stack.check(session)
    assert all(one["success"] for one in of_type(log, "tool.completed"))


async def test_the_documented_example_asks_and_is_decided(stack: Stack) -> None:
    page = "docs/capabilities/tool_approval.md"
    session = await stack.create_session(capabilities=REFS)
    origin = stack.api.removesuffix("/api/v1").removesuffix("/api").rstrip("/")
    for command in commands(page, "curl"):
        request = curl_request(command, {"API": f"{origin}/api/v1", "SESSION": session})
        url = request.url.replace("http://127.0.0.1:9300", origin)
        answer = await stack.client.request(request.method, url, headers=request.headers, content=request.body)
        assert answer.is_success, f"{command}\n{answer.text}"
        if url.endswith("/messages"):
            await stack.wait_for_event(session, "tool.call_requested")
    await stack.idle(session)
    assert await keys(stack, session) == ["report/due"]
