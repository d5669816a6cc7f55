"""What a turn does, seen from outside: a running engine, a client, and at the end of each test the invariants of the log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import msgspec
import pytest
from temporalio.client import Client, WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.worker import WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from activities.capabilities import test_faults as faults
from activities.capabilities.registry import CapabilityRegistry, builtin_registry
from db.session_resources import DatabaseResources
from db.turn_ending import LOST_TURN_REASON, SUPERSEDED_REASON
from domain.events import StoredEvent
from domain.ids import Prefix, parse_id
from domain.model import USER_ERROR_CODES
from infra.encryption import Keyring
from tests.stack import EVERRUNS, Json, Stack, of_type, payload
from tests.turn_workers import turn_worker
from workflows import contract

TOOLS = [{"ref": "test_faults"}, {"ref": "test_math"}]
ASK_CLIENT = {"type": "client_side", "name": "ask_client", "description": "Asks.", "parameters": {"type": "object"}}
SLOW: Json = {"mode": "lorem", "tokens": 60, "inter_token_delay_ms": 40}
HANGING: Json = {"mode": "lorem", "tokens": 60, "stall_after_tokens": 8}
LONG_SECONDS = 60.0
SOON_SECONDS = 15.0
"""Far below what a stopped step would have taken, far above what stopping it takes, on a busy machine."""


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    """Shared: a test makes its own sessions and kills nothing."""
    async with Stack() as running:
        yield running


def script(*turns: Json, **fields: object) -> Json:
    return {"mode": "script", "turns": list(turns), **fields}


def call(name: str, call_id: str | None = None, /, **arguments: object) -> Json:
    return {"name": name, "arguments": arguments, **({"id": call_id} if call_id else {})}


def calling(*calls: Json, text: str = "") -> Json:
    return {"text": text, "tool_calls": list(calls)}


def saying(text: str) -> Json:
    return {"text": text}


def answers(log: Sequence[StoredEvent]) -> list[str]:
    """The texts of agent messages, in order."""
    found: list[str] = []
    for data in of_type(log, "output.message.completed"):
        parts = data["message"]["content"]  # type: ignore[index]
        found.append("".join(part["text"] for part in parts if part["type"] == "text"))
    return found


def types(log: Sequence[StoredEvent], *wanted: str) -> list[str]:
    return [event.type for event in log if event.type in wanted]


def results(log: Sequence[StoredEvent]) -> dict[str, Json]:
    return {str(data["tool_call_id"]): data for data in of_type(log, "tool.completed")}


def places(log: Sequence[StoredEvent], event_type: str) -> dict[str, int]:
    """Where each call's event of this type stands."""
    found: dict[str, int] = {}
    for event in log:
        if event.type == event_type:
            data = payload(event)
            found[str(data.get("tool_call_id") or data["tool_call"]["id"])] = event.sequence  # type: ignore[index]
    return found


async def usable(stack: Stack, session: str) -> list[StoredEvent]:
    """The session rests and answers; its whole log, checked."""
    answered = await stack.ask(session, "Still there?", llmsim={"mode": "fixed", "text": "Yes."})
    assert types(answered, "turn.started", "turn.completed") == ["turn.started", "turn.completed"]
    assert answers(answered) == ["Yes."]
    return await stack.check(session)


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_a_message_is_answered_and_the_session_rests(stack: Stack) -> None:
    session = await stack.create_session()
    log = await stack.ask(session, "hi", llmsim={"mode": "fixed", "text": "Good morning to you."})
    assert answers(log) == ["Good morning to you."]
    assert "".join(str(data["delta"]) for data in of_type(log, "output.message.delta")) == "Good morning to you."
    assert log[-1].type == "session.idled"
    assert (await stack.session(session))["status"] == "idle"
    await usable(stack, session)


async def test_an_empty_answer_ends_the_turn(stack: Stack) -> None:
    session = await stack.create_session()
    log = await stack.ask(session, "hi", llmsim={"mode": "empty"})
    assert answers(log) == [""]
    assert types(log, "turn.completed", "turn.failed") == ["turn.completed"]
    await usable(stack, session)


async def test_the_list_of_messages_is_the_conversation(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    steps = script(calling(call("add", "call_sum", a=2, b=3), text="Adding."), saying("It is 5."))
    await stack.ask(session, "2 + 3?", llmsim=steps)
    listed = (await stack.client.get(f"sessions/{session}/messages")).json()["data"]
    assert [message["role"] for message in listed] == ["user", "agent", "tool_result", "agent"]
    assert listed[1]["content"] == [
        {"type": "text", "text": "Adding."},
        {"type": "tool_call", "id": "call_sum", "name": "add", "arguments": {"a": 2, "b": 3}},
    ]
    assert listed[2]["content"] == [{"type": "tool_result", "tool_call_id": "call_sum", "result": '{"result":5}'}]
    assert listed[3]["content"] == [{"type": "text", "text": "It is 5."}]
    assert [message.get("phase") for message in listed] == [None, "commentary", None, "final_answer"]


async def test_usage_adds_up_over_steps_turns_and_the_session(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    await stack.ask(session, "2 + 3?", llmsim=script(calling(call("add", a=2, b=3)), saying("It is 5.")))
    await stack.ask(session, "Again?", llmsim={"mode": "fixed", "text": "Five."})
    log = await stack.check(session)
    for kind in ("input_tokens", "output_tokens"):
        spent = [data["usage"][kind] for data in of_type(log, "output.message.completed")]  # type: ignore[index]
        assert all(tokens > 0 for tokens in spent)
        ended = [data["usage"][kind] for data in of_type(log, "turn.completed")]  # type: ignore[index]
        assert ended == [sum(spent[:2]), spent[2]]
        idled = [data["usage"][kind] for data in of_type(log, "session.idled")]  # type: ignore[index]
        assert idled == [sum(spent[:2]), sum(spent)]
        assert (await stack.session(session))["usage"][kind] == sum(spent)  # type: ignore[index]
    assert [(data["llm_call_count"], data["tool_call_count"]) for data in of_type(log, "turn.completed")] == [
        (2, 1),
        (1, 0),
    ]


async def test_asking_for_another_model_is_told_once(stack: Stack) -> None:
    session = await stack.create_session()
    models = {model["model_id"]: model["id"] for model in (await stack.client.get("models")).json()["data"]}
    for name in ("llmsim-echo", "llmsim-echo", "llmsim-model"):
        log = await stack.ask(session, "hello", controls={"model_id": models[name]})
        assert answers(log) == ["Echo: hello" if name == "llmsim-echo" else "Hello! I'm a simulated LLM response."]
    changed = of_type(await stack.check(session), "session.model.changed")
    assert [(one["previous_model_name"], one["model_name"]) for one in changed] == [("llmsim-echo", "llmsim-model")]


async def test_an_edit_of_the_agent_takes_effect_at_the_next_turn(stack: Stack) -> None:
    created = await stack.client.post(
        "agents", json={"name": f"pinned-{uuid4().hex[:8]}", "system_prompt": "Be old.", "capabilities": TOOLS}
    )
    agent = created.json()["id"]
    session = await stack.create_session(agent_id=agent)
    twice = (calling(call("test_sleep", seconds=1)), calling(call("test_sleep", seconds=0.01)))
    await stack.post_message(session, "go", llmsim=script(*twice, saying("Done.")))
    await stack.wait_for_event(session, "tool.started")
    edited = await stack.client.patch(f"agents/{agent}", json={"system_prompt": "Be new.", "capabilities": []})
    assert edited.status_code == 200, edited.text
    await stack.idle(session)
    await stack.ask(session, "and now?", llmsim={"mode": "fixed", "text": "New."})
    log = await stack.check(session)
    # The tools are listed with the first call of a turn; that they are there for the whole of it shows in the second result.
    generations = of_type(log, "llm.generation")
    listed = [one["tools"] for one in generations if "tools" in one]
    offered = [{tool["name"] for tool in tools} for tools in listed]  # type: ignore[union-attr,index]
    assert ["test_sleep" in names for names in offered] == [True, False]
    assert [one["success"] for one in of_type(log, "tool.completed")] == [True, True]
    prompts = [one["messages"][0]["content"][0]["text"] for one in (generations[0], generations[3])]  # type: ignore[index]
    assert ["Be old." in prompts[0], "Be new." in prompts[0], "Be new." in prompts[1]] == [True, False, True]


async def test_a_session_outlives_its_archived_agent(stack: Stack) -> None:
    name = f"archived-{uuid4().hex[:8]}"
    agent = (await stack.client.post("agents", json={"name": name, "system_prompt": "Hi."})).json()["id"]
    session = await stack.create_session(agent_id=agent)
    assert (await stack.client.delete(f"agents/{agent}")).is_success
    await usable(stack, session)


# --- tools ------------------------------------------------------------------------------------------------------------


async def test_calls_of_one_answer_run_side_by_side(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    calls = [call("test_sleep", f"call_{number}", seconds=0.6) for number in range(3)]
    log = await stack.ask(session, "go", llmsim=script(calling(*calls), saying("Done.")))
    assert types(log, "tool.started", "tool.completed") == ["tool.started"] * 3 + ["tool.completed"] * 3
    assert len(of_type(log, "act.started")) == 1
    await stack.check(session)


async def test_calls_run_one_by_one_when_the_session_says_so(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS, parallel_tool_calls=False)
    calls = [call("test_sleep", f"call_{number}", seconds=0.1) for number in range(3)]
    log = await stack.ask(session, "go", llmsim=script(calling(*calls), saying("Done.")))
    assert types(log, "tool.started", "tool.completed") == ["tool.started", "tool.completed"] * 3
    assert list(results(log)) == ["call_0", "call_1", "call_2"]
    await stack.check(session)


async def test_calls_of_one_concurrency_class_take_turns_and_hold_up_nobody_else(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    calls = [
        call("test_serial", "call_a", seconds=0.4),
        call("test_serial", "call_b", seconds=0.4),
        call("test_sleep", "call_c", seconds=0.4),
    ]
    log = await stack.ask(session, "go", llmsim=script(calling(*calls), saying("Done.")))
    started, completed = places(log, "tool.started"), places(log, "tool.completed")
    assert started["call_b"] > completed["call_a"]
    assert started["call_c"] < completed["call_a"]
    await stack.check(session)


async def test_what_goes_wrong_in_a_tool_becomes_its_result(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    calls = [
        call("test_fail", "call_expected", message="No paper."),
        call("test_fail", "call_unexpected", message="secret detail", internal=True),
        call("no_such_tool", "call_unknown"),
        call("add", "call_invalid", a="two", b=3),
        call("add", "call_fine", a=2, b=3),
    ]
    log = await stack.ask(session, "go", llmsim=script(calling(*calls), saying("So be it.")))
    found = results(log)
    assert {key: one["status"] for key, one in found.items()} == {
        "call_expected": "error",
        "call_unexpected": "error",
        "call_unknown": "error",
        "call_invalid": "error",
        "call_fine": "success",
    }
    assert found["call_expected"]["error"] == "No paper."
    assert "secret" not in str(found["call_unexpected"])
    assert "no_such_tool" in str(found["call_unknown"]["error"])
    assert "add" in str(found["call_unknown"]["error"])
    assert "a" in str(found["call_invalid"]["error"])
    assert types(log, "turn.completed", "turn.failed") == ["turn.completed"]
    assert answers(log)[-1] == "So be it."
    await stack.check(session)


async def test_the_iteration_limit_ends_a_loop_and_leaves_no_call_open(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS, max_iterations=3)
    log = await stack.ask(session, "loop", llmsim=script(calling(call("add", a=1, b=1), text="Once more.")))
    (ended,) = of_type(log, "turn.completed")
    assert (ended["iterations"], ended["stop_reason"]) == (3, "max_iterations")
    assert [one["status"] for one in of_type(log, "tool.completed")] == ["success", "success", "cancelled"]
    await usable(stack, session)


async def test_call_ids_that_a_provider_repeats_are_made_unique(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS, parallel_tool_calls=False)
    again = calling(call("add", "call_1", a=1, b=1), call("add", "call_1", a=2, b=2))
    await stack.ask(session, "go", llmsim=script(again, again, again, saying("Done.")))
    found = results(await stack.check(session))
    assert len(found) == 6
    assert [one["result"][0]["text"] for one in found.values()] == ['{"result":2}', '{"result":4}'] * 3  # type: ignore[index]


# --- messages to a running turn ---------------------------------------------------------------------------------------


async def test_steering_while_the_model_writes_is_read_by_the_next_step(stack: Stack) -> None:
    session = await stack.create_session()
    await stack.post_message(session, "Tell me a story", llmsim=SLOW)
    await stack.wait_for_event(session, "output.message.delta")
    steered = await stack.post_message(session, "Shorter", llmsim={"mode": "fixed", "text": "The end."})
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, "turn.started")) == 1
    assert [data.get("input_message_ids") for data in of_type(log, "reason.started")] == [None, [steered["id"]]]
    assert answers(log)[1] == "The end."
    phases = [data["message"]["phase"] for data in of_type(log, "output.message.completed")]  # type: ignore[index]
    assert phases == ["commentary", "final_answer"]


async def test_steering_while_a_tool_runs_is_read_after_its_result(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    await stack.post_message(session, "go", llmsim=script(calling(call("test_sleep", seconds=1))))
    await stack.wait_for_event(session, "tool.started")
    steered = await stack.post_message(session, "And?", llmsim={"mode": "echo"})
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, "turn.started")) == 1
    assert results(log).popitem()[1]["status"] == "success"
    assert of_type(log, "reason.started")[1]["input_message_ids"] == [steered["id"]]
    assert answers(log)[-1] == "Echo: And?"


async def test_steering_between_steps_is_read_once_wherever_it_lands(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    steps = script(*[calling(call("add", a=1, b=number)) for number in range(6)], saying("Done."))
    await stack.post_message(session, "go", llmsim=steps)
    posted = 0
    async with asyncio.timeout(60), contextlib.aclosing(stack.events(session)) as events:
        async for event in events:
            if event.type in ("reason.completed", "act.completed", "tool.completed", "turn.completed") and posted < 12:
                posted += 1
                await stack.post_message(session, f"Note {posted}")
            if event.type == "session.idled" and (await stack.session(session))["status"] == "idle":
                break
    log = await stack.check(session)
    assert posted >= 6
    assert len(of_type(log, "input.message")) == 1 + posted


async def test_follow_ups_get_a_turn_each_after_the_running_one(stack: Stack) -> None:
    session = await stack.create_session()
    first = await stack.post_message(session, "one", llmsim=SLOW)
    await stack.wait_for_event(session, "output.message.delta")
    others = [
        await stack.post_message(session, text, delivery="follow_up", llmsim={"mode": "echo"})
        for text in ("two", "three")
    ]
    await stack.wait_for_event(session, "session.idled", 3)
    log = await stack.check(session)
    started = [data["input_message_ids"] for data in of_type(log, "turn.started")]
    assert started == [[first["id"]], [others[0]["id"]], [others[1]["id"]]]
    await usable(stack, session)


async def test_an_interrupt_stops_the_model_and_keeps_what_it_said(stack: Stack) -> None:
    session = await stack.create_session()
    await stack.post_message(session, "Tell me a story", llmsim=HANGING)
    await stack.wait_for_event(session, "output.message.delta")
    began = time.monotonic()
    await stack.post_message(session, "Stop", delivery="interrupt", llmsim={"mode": "fixed", "text": "Stopped."})
    await stack.idle(session)
    assert time.monotonic() - began < SOON_SECONDS
    log = await stack.check(session)
    told = "".join(str(data["delta"]) for data in of_type(log, "output.message.delta")[:-1])
    kept, answer = answers(log)
    assert kept
    assert told.startswith(kept)
    assert answer == "Stopped."
    assert of_type(log, "output.message.completed")[0]["message"]["metadata"] == {"interrupted": True}  # type: ignore[index]
    assert [data.get("interrupted") for data in of_type(log, "reason.completed")] == [True, None]
    assert len(of_type(log, "turn.started")) == 1


@pytest.mark.parametrize("parallel", [True, False], ids=["side by side", "one by one"])
async def test_an_interrupt_stops_the_tools_and_leaves_no_call_open(stack: Stack, parallel: bool) -> None:
    session = await stack.create_session(capabilities=TOOLS, parallel_tool_calls=parallel)
    calls = [call("test_sleep", "call_a", seconds=60), call("test_sleep", "call_b", seconds=60)]
    await stack.post_message(session, "go", llmsim=script(calling(*calls)))
    await stack.wait_for_event(session, "tool.started", 2 if parallel else 1)
    began = time.monotonic()
    await stack.post_message(session, "Stop", delivery="interrupt", llmsim={"mode": "fixed", "text": "Stopped."})
    await stack.idle(session)
    assert time.monotonic() - began < SOON_SECONDS
    log = await stack.check(session)
    assert set(results(log)) == {"call_a", "call_b"}
    assert not any(one["success"] for one in results(log).values())
    assert answers(log)[-1] == "Stopped."


async def test_an_interrupt_of_a_call_with_effects_says_that_they_are_unknown(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    await stack.post_message(session, "go", llmsim=script(calling(call("test_effect_once", "call_once", seconds=60))))
    await stack.wait_for_event(session, "tool.started")
    await stack.post_message(session, "Stop", delivery="interrupt", llmsim={"mode": "fixed", "text": "Stopped."})
    await stack.idle(session)
    log = await stack.check(session)
    assert results(log)["call_once"]["status"] == "cancelled"
    assert "unknown" in str(results(log)["call_once"]["error"])


# --- cancel -----------------------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Json, str]] = {
    "reasoning": (HANGING, "output.message.delta"),
    "acting": (script(calling(call("test_sleep", seconds=60))), "tool.started"),
    "acting one by one": (
        script(calling(call("test_serial", seconds=60), call("test_serial", seconds=60))),
        "tool.started",
    ),
    "waiting for the client": (script(calling(call("ask_client"))), "tool.call_requested"),
    "waiting for a retry": (
        {"mode": "error", "error": {"class": "overloaded", "retry_after_seconds": 60, "attempts": 1}},
        "llm.generation",
    ),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_ends_the_turn_in_every_phase(stack: Stack, phase: str) -> None:
    llmsim, reached = PHASES[phase]
    session = await stack.create_session(capabilities=TOOLS, tools=[ASK_CLIENT])
    await stack.post_message(session, "go", llmsim=llmsim)
    await stack.wait_for_event(session, reached)
    began = time.monotonic()
    assert (await stack.cancel(session, "changed my mind"))["status"] == "cancelled"
    await stack.idle(session)
    assert time.monotonic() - began < SOON_SECONDS
    log = await usable(stack, session)
    (cancelled,) = of_type(log, "turn.cancelled")
    assert cancelled["reason"] == "changed my mind"
    after = [event.type for event in log if event.sequence > places_of(log, "turn.cancelled")]
    assert after[:3] == ["input.message", "output.message.completed", "session.idled"]
    assert (await stack.cancel(session))["status"] == "no_op"


def places_of(log: Sequence[StoredEvent], event_type: str) -> int:
    return next(event.sequence for event in log if event.type == event_type)


async def test_a_cancel_right_after_the_message_ends_its_turn(stack: Stack) -> None:
    for _ in range(5):
        session = await stack.create_session()
        await stack.post_message(session, "go", llmsim=HANGING)
        assert (await stack.cancel(session))["status"] == "cancelled"
        await stack.idle(session)
        log = await usable(stack, session)
        assert types(log, "turn.cancelled", "turn.completed") == ["turn.cancelled", "turn.completed"]


async def test_messages_waiting_at_a_cancel_become_history_and_later_ones_are_answered(stack: Stack) -> None:
    session = await stack.create_session()
    await stack.post_message(session, "go", llmsim=HANGING)
    await stack.wait_for_event(session, "output.message.delta")
    waiting = await stack.post_message(session, "This too")
    await stack.cancel(session)
    later = await stack.post_message(session, "And now?", llmsim={"mode": "fixed", "text": "Here."})
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert of_type(log, "turn.cancelled")[0]["input_message_ids"] == [waiting["id"]]
    assert of_type(log, "turn.started")[1]["input_message_ids"] == [later["id"]]
    assert answers(log)[-1] == "Here."


# --- client-side tools ------------------------------------------------------------------------------------------------


async def submit(stack: Stack, session: str, **given: object) -> tuple[int, Json]:
    body = {"tool_results": [{"tool_call_id": key, "result": value} for key, value in given.items()]}
    answer = await stack.client.post(f"sessions/{session}/tool-results", json=body)
    return answer.status_code, answer.json()


async def test_a_mixed_batch_runs_ours_first_and_then_asks_the_client(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS, tools=[ASK_CLIENT])
    calls = [call("ask_client", "call_c"), call("add", "call_s", a=1, b=2)]
    await stack.post_message(session, "go", llmsim=script(calling(*calls), saying("Both are in.")))
    (requested,) = await stack.wait_for_event(session, "tool.call_requested")
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert [one["id"] for one in requested.data["tool_calls"]] == ["call_c"]  # type: ignore[union-attr,index]
    assert await submit(stack, session, call_c={"answer": 42}) == (200, {"accepted": 1, "status": "active"})
    await stack.idle(session)
    log = await stack.check(session)
    assert list(results(log)) == ["call_s", "call_c"]
    assert results(log)["call_c"]["result"] == [{"type": "text", "text": '{"answer":42}'}]
    assert answers(log)[-1] == "Both are in."


async def test_client_calls_left_out_of_the_results_are_told_as_interrupted(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    calls = [call("ask_client", "call_a"), call("ask_client", "call_b")]
    await stack.post_message(session, "go", llmsim=script(calling(*calls), saying("One is in.")))
    await stack.wait_for_event(session, "tool.call_requested")
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.idle(session)
    found = results(await stack.check(session))
    assert (found["call_a"]["status"], found["call_b"]["status"]) == ("success", "error")


async def test_results_sent_twice_count_once_and_end_no_later_wait(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS, tools=[ASK_CLIENT])
    steps = script(
        calling(call("ask_client", "call_a")),
        calling(call("test_sleep", seconds=1)),
        calling(call("ask_client", "call_b")),
        saying("Done."),
    )
    await stack.post_message(session, "go", llmsim=steps)
    await stack.wait_for_event(session, "tool.call_requested")
    assert (await submit(stack, session, call_a="first"))[0] == 200
    await stack.wait_for_event(session, "tool.started")
    assert (await submit(stack, session, call_a="second"))[0] == 200
    await stack.wait_for_event(session, "tool.call_requested", 2)
    assert (await submit(stack, session, call_a="third"))[0] == 200
    assert (await submit(stack, session, call_b="late"))[0] == 200
    await stack.idle(session)
    found = results(await stack.check(session))
    assert found["call_a"]["result"] == [{"type": "text", "text": "first"}]
    assert found["call_b"]["result"] == [{"type": "text", "text": "late"}]


async def test_results_nobody_asked_for_are_refused(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    status, problem = await submit(stack, session, call_a="yes")
    assert (status, problem["code"]) == (409, "not_waiting_for_tool_results")
    await stack.post_message(session, "go", llmsim=script(calling(call("ask_client", "call_a")), saying("Done.")))
    await stack.wait_for_event(session, "tool.call_requested")
    status, problem = await submit(stack, session, call_z="yes")
    assert (status, problem["code"]) == (400, "invalid_input")
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.idle(session)
    await usable(stack, session)


async def test_a_new_message_supersedes_the_wait_for_the_client(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    await stack.post_message(session, "go", llmsim=script(calling(call("ask_client", "call_a"))))
    await stack.wait_for_event(session, "tool.call_requested")
    await stack.post_message(session, "Never mind", llmsim={"mode": "fixed", "text": "Fine."})
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert [data["reason"] for data in of_type(log, "turn.cancelled")] == [SUPERSEDED_REASON]
    assert results(log)["call_a"]["status"] == "cancelled"
    assert answers(log)[-1] == "Fine."


async def test_steering_from_before_the_wait_is_read_with_the_results(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    slow = {**calling(call("ask_client", "call_a")), "text": "One moment, please.", "inter_token_delay_ms": 200}
    await stack.post_message(session, "go", llmsim=script(slow, saying("Done.")))
    await stack.wait_for_event(session, "output.message.delta")
    await stack.post_message(session, "And be quick")
    await stack.wait_for_event(session, "tool.call_requested")
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.idle(session)
    log = await stack.check(session)
    assert not of_type(log, "turn.cancelled")
    assert results(log)["call_a"]["status"] == "success"


async def test_a_follow_up_does_not_end_the_wait_for_the_client(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    await stack.post_message(session, "go", llmsim=script(calling(call("ask_client", "call_a")), saying("Done.")))
    await stack.wait_for_event(session, "tool.call_requested")
    await stack.post_message(session, "Later", delivery="follow_up", llmsim={"mode": "fixed", "text": "Now."})
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.wait_for_event(session, "session.idled", 2)
    assert answers(await stack.check(session)) == ["", "Done.", "Now."]


async def test_a_client_that_does_not_answer_is_told_to_the_model(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    steps = script(calling(call("ask_client", "call_a")), saying("Without, then."))
    await signal_with_start(await stack.temporal(), session, brought("go", steps), client_tool_timeout_seconds=1)
    await stack.idle(session)
    log = await usable(stack, session)
    assert results(log)["call_a"]["status"] == "timeout"
    assert "Without, then." in answers(log)


# --- failures of the model --------------------------------------------------------------------------------------------

FATAL = {
    "authentication": "provider_misconfigured",
    "quota_exhausted": "provider_quota_exhausted",
    "unsupported_model": "model_unavailable",
    "invalid_response": "processing_error",
    "invalid_request": "processing_error",
    "invalid_tool_schema": "invalid_tool_schema",
    "context_overflow": "request_too_large",
    "other": "processing_error",
}
TRANSIENT = {
    "rate_limit": "provider_rate_limited",
    "timeout": "provider_unavailable",
    "transport": "provider_unavailable",
    "overloaded": "provider_unavailable",
    "server_error": "provider_unavailable",
}


@pytest.fixture(scope="module", autouse=True)
async def given_up(stack: Stack) -> dict[str, str]:
    """A session for each error that stays: five attempts take a quarter of a minute, so they begin before the other tests."""
    sessions: dict[str, str] = {}
    for kind in TRANSIENT:
        sessions[kind] = await stack.create_session()
        await stack.post_message(sessions[kind], "hi", llmsim=failing(kind))
    return sessions


def failing(kind: str, **fields: object) -> Json:
    return {"mode": "error", "error": {"class": kind, "message": "the provider's own words", **fields}}


def assert_failed(log: Sequence[StoredEvent], code: str) -> None:
    (failed,) = of_type(log, "turn.failed")
    (apology,) = of_type(log, "output.message.completed")
    assert (failed["error_code"], failed["error"]) == (code, USER_ERROR_CODES[code])
    assert apology["error_code"] == code
    assert answers(log) == [USER_ERROR_CODES[code]]
    told = [event for event in log if b"own words" in event.data and event.type != "input.message"]
    assert [event.type for event in told] == ["reason.completed"], "a provider's words are for operators"


@pytest.mark.parametrize(("kind", "code"), FATAL.items(), ids=list(FATAL))
async def test_an_error_that_stays_fails_the_turn_at_once(stack: Stack, kind: str, code: str) -> None:
    session = await stack.create_session()
    log = await stack.ask(session, "hi", llmsim=failing(kind))
    assert_failed(log, code)
    assert len(of_type(log, "llm.generation")) == 1
    await usable(stack, session)


@pytest.mark.parametrize("kind", TRANSIENT)
async def test_an_error_that_passes_is_retried(stack: Stack, kind: str) -> None:
    session = await stack.create_session()
    log = await stack.ask(session, "hi", llmsim={**failing(kind, attempts=1), "text": "Second time lucky."})
    assert answers(log) == ["Second time lucky."]
    assert [data["metadata"]["success"] for data in of_type(log, "llm.generation")] == [False, True]  # type: ignore[index]
    assert of_type(log, "llm.generation")[1]["metadata"]["retry"]["attempts"] == 1  # type: ignore[index]
    await stack.check(session)


@pytest.mark.parametrize(("kind", "code"), TRANSIENT.items(), ids=list(TRANSIENT))
async def test_a_transient_error_that_does_not_pass_fails_the_turn(
    stack: Stack, given_up: dict[str, str], kind: str, code: str
) -> None:
    session = given_up[kind]
    await stack.wait_for_event(session, "session.idled", timeout=90)
    log = await stack.read_log(session)
    assert len(of_type(log, "llm.generation")) == contract.MODEL_ATTEMPTS
    assert_failed(log, code)
    await usable(stack, session)


async def test_the_provider_says_when_to_come_back(stack: Stack) -> None:
    session = await stack.create_session()
    llmsim = {**failing("rate_limit", attempts=1, retry_after_seconds=3), "text": "Here I am."}
    log = await stack.ask(session, "hi", llmsim=llmsim)
    refused, answered = [event.ts for event in log if event.type == "llm.generation"]
    assert 3 <= (answered - refused).total_seconds() < SOON_SECONDS
    retry = of_type(log, "llm.generation")[1]["metadata"]["retry"]  # type: ignore[index]
    assert retry == {"attempts": 1, "total_wait_ms": 3000}
    await stack.check(session)


@pytest.mark.parametrize(
    "fault",
    [
        {"cut_after_tokens": 6, "fault_attempts": 1},
        {"error": {"class": "overloaded", "attempts": 1}, "error_after_tokens": 6},
    ],
    ids=["cut", "error"],
)
async def test_a_stream_that_breaks_begins_anew_and_says_so(stack: Stack, fault: Json) -> None:
    session = await stack.create_session()
    log = await stack.ask(session, "talk", llmsim={"mode": "lorem", "tokens": 20, **fault})
    (recovered,) = of_type(log, "reason.recovered")
    before = [payload(event) for event in log if event.sequence < places_of(log, "reason.recovered")]
    streamed = "".join(str(data["delta"]) for data in before if "delta" in data)
    assert recovered["accumulated_len"] == len(streamed) > 0
    assert (recovered["mode"], recovered["attempt"]) == ("restart", 2)
    assert len(answers(log)[0].split()) == 20
    await stack.check(session)


# --- callers of Temporal ----------------------------------------------------------------------------------------------


def brought(text: str, llmsim: Json) -> Json:
    """A message as a caller of any Temporal SDK brings it."""
    return {"content": [{"type": "text", "text": text}], "metadata": {"llmsim": llmsim}}


async def signal_with_start(client: Client, session: str, message: Json, **start: object) -> None:
    await client.start_workflow(
        "Turn",
        {"session_id": session, **start},
        id=session,
        task_queue=contract.TURNS_QUEUE,
        start_signal="message",
        start_signal_args=[message],
    )


async def test_a_signal_with_content_begins_a_turn_and_steers_it(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    client = await stack.temporal()
    await signal_with_start(client, session, brought("go", script(calling(call("test_sleep", seconds=1)))))
    await stack.wait_for_event(session, "tool.started")
    await client.get_workflow_handle(session).signal("message", brought("Shorter", {"mode": "fixed", "text": "End."}))
    await stack.idle(session)
    log = await usable(stack, session)
    assert len(of_type(log, "turn.started")) == 2
    assert answers(log) == ["", "End.", "Yes."]


async def test_content_that_is_signalled_during_the_last_answer_is_answered_too(stack: Stack) -> None:
    session = await stack.create_session()
    client = await stack.temporal()
    await signal_with_start(client, session, brought("Tell me a story", SLOW))
    await stack.wait_for_event(session, "output.message.delta")
    await client.get_workflow_handle(session).signal("message", brought("And?", {"mode": "fixed", "text": "End."}))
    await client.get_workflow_handle(session).result()
    log = await stack.check(session)
    assert len(of_type(log, "input.message")) == 2
    assert answers(log)[-1] == "End."


async def test_an_update_with_start_answers_with_message_and_turn(stack: Stack) -> None:
    session = await stack.create_session()
    client = await stack.temporal()

    async def send(text: str, llmsim: Json) -> contract.SendMessageReceipt:
        start = WithStartWorkflowOperation(
            "Turn",
            {"session_id": session},
            id=session,
            task_queue=contract.TURNS_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        return await client.execute_update_with_start_workflow(
            "send_message",
            brought(text, llmsim),
            start_workflow_operation=start,
            result_type=contract.SendMessageReceipt,
        )

    first = await send("Tell me a story", SLOW)
    await stack.wait_for_event(session, "output.message.delta")
    status = await client.get_workflow_handle(session).query("status", result_type=contract.TurnStatusView)
    assert (status.turn_id, status.phase, status.iteration) == (first.turn_id, contract.TurnPhase.REASONING, 1)
    second = await send("Shorter", {"mode": "fixed", "text": "End."})
    assert (first.steered, second.steered, second.turn_id) == (False, True, first.turn_id)
    await stack.idle(session)
    log = await stack.check(session)
    assert [data["turn_id"] for data in of_type(log, "turn.started")] == [first.turn_id]
    posted = [data["message"]["id"] for data in of_type(log, "input.message")]  # type: ignore[index]
    assert posted == [first.message_id, second.message_id]
    assert answers(log)[-1] == "End."


async def test_the_status_query_says_what_a_turn_waits_for(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    client = await stack.temporal()
    await stack.post_message(session, "go", llmsim=script(calling(call("ask_client", "call_a")), saying("Done.")))
    await stack.wait_for_event(session, "tool.call_requested")
    handle = client.get_workflow_handle(session)
    deadline = time.monotonic() + SOON_SECONDS
    while True:  # the log is ahead of the workflow by the answer of one step
        status = await handle.query("status", result_type=contract.TurnStatusView)
        if status.phase is contract.TurnPhase.WAITING_FOR_TOOL_RESULTS or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.02)
    assert status.waiting_for == ["call_a"]
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.idle(session)
    result = await client.get_workflow_handle(session).result()
    assert result == {"ending": "completed", "turn_id": status.turn_id, "iterations": 2}


async def test_a_terminated_workflow_leaves_a_usable_session(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    client = await stack.temporal()
    for llmsim, reached in (PHASES["reasoning"], PHASES["acting"]):
        log = await stack.read_log(session)
        await stack.post_message(session, "go", llmsim=llmsim)
        await stack.wait_for_event(session, reached, after_sequence=log[-1].sequence)
        await client.get_workflow_handle(session).terminate("by an operator")
        posted = await stack.post_message(session, "Still there?", llmsim={"mode": "fixed", "text": "Yes."})
        await stack.wait_for_event(session, "turn.completed", after_sequence=log[-1].sequence)
        await stack.idle(session, after_sequence=log[-1].sequence)
        log = await stack.check(session)
        assert of_type(log, "turn.cancelled")[-1]["reason"] == LOST_TURN_REASON
        assert of_type(log, "turn.started")[-1]["input_message_ids"] == [posted["id"]]
        assert answers(log)[-1] == "Yes."


CONTINUE_AS_NEW_EVENTS = 4_096
"""The length at which Temporal's server suggests to continue as new; its default."""


async def test_a_long_turn_continues_as_new_without_a_trace_in_the_log(stack: Stack) -> None:
    session = await stack.create_session(tools=[ASK_CLIENT])
    client = await stack.temporal()
    steps = script(calling(call("ask_client", "call_a")), saying("After all that."))
    await signal_with_start(client, session, brought("go", steps), client_tool_timeout_seconds=300)
    await stack.wait_for_event(session, "tool.call_requested")
    handle = client.get_workflow_handle(session)
    first_run = (await handle.describe()).run_id
    # A history is quickest made long by signals: 380 iterations would do the same in a minute.
    for _ in range(CONTINUE_AS_NEW_EVENTS // 64 + 1):
        await asyncio.gather(*(handle.signal("resume") for _ in range(64)))
    assert (await submit(stack, session, call_a="yes"))[0] == 200
    await stack.idle(session, timeout=LONG_SECONDS)
    log = await stack.check(session)
    (started,) = of_type(log, "turn.started")
    (completed,) = of_type(log, "turn.completed")
    assert started["turn_id"] == completed["turn_id"] == f"turn_{first_run.replace('-', '')}"
    assert completed["iterations"] == 2
    assert answers(log) == ["", "After all that."]
    runs = [found.run_id async for found in client.list_workflows(f"WorkflowId = '{session}'")]
    assert len(runs) >= 2
    await usable(stack, session)


# --- other workers ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def worker_of_ours(
    stack: Stack, registry: CapabilityRegistry, runner: WorkflowRunner | None = None
) -> AsyncIterator[tuple[Client, str]]:
    """A worker in this process on a queue of its own: a Temporal client and the queue."""
    client = await stack.temporal()
    queue = f"test-{uuid4().hex}"
    resources = DatabaseResources(stack.pool, Keyring.of(None, None))
    async with turn_worker(client, queue, stack.log, resources, registry=registry, runner=runner):
        yield client, queue


async def run_turn(stack: Stack, client: Client, queue: str, session: str, llmsim: Json) -> list[StoredEvent]:
    """A turn on that queue, to its end."""
    await client.execute_workflow(
        "Turn",
        {"session_id": session},
        id=session,
        task_queue=queue,
        start_signal="message",
        start_signal_args=[brought("go", llmsim)],
    )
    return await stack.check(session)


async def test_the_workflow_runs_in_temporals_sandbox(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    async with worker_of_ours(stack, builtin_registry(), SandboxedWorkflowRunner()) as (client, queue):
        steps = script(calling(call("add", a=1, b=2), call("test_serial", seconds=0)), saying("Done."))
        log = await run_turn(stack, client, queue, session, steps)
    assert answers(log)[-1] == "Done."


async def test_a_tool_that_takes_too_long_gets_a_result_that_says_so(stack: Stack) -> None:
    hasty = CapabilityRegistry()
    hurried = [msgspec.structs.replace(tool, timeout_seconds=0.3) for tool in faults.CAPABILITY.tools]
    hasty.register(msgspec.structs.replace(faults.CAPABILITY, tools=tuple(hurried)))
    session = await stack.create_session(harness_name="base", capabilities=[{"ref": "test_faults"}])
    async with worker_of_ours(stack, hasty) as (client, queue):
        calls = [call("test_sleep", "call_slow", seconds=60), call("test_sleep", "call_quick", seconds=0)]
        log = await run_turn(stack, client, queue, session, script(calling(*calls), saying("So be it.")))
    assert {key: one["status"] for key, one in results(log).items()} == {
        "call_slow": "timeout",
        "call_quick": "success",
    }
    assert answers(log)[-1] == "So be it."


# --- the checker's command --------------------------------------------------------------------------------------------


async def check_log_command(stack: Stack, *sessions: str) -> tuple[int | None, str]:
    """`everruns check-log`: exit code and output."""
    environment = {**os.environ, **stack.addresses.environment}
    process = await asyncio.create_subprocess_exec(
        EVERRUNS,
        "check-log",
        *sessions,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    return process.returncode, printed.decode()


async def test_check_log_names_the_event_that_breaks_a_rule(stack: Stack) -> None:
    good, bad, running = [await stack.create_session() for _ in range(3)]
    await usable(stack, good)
    await usable(stack, bad)
    await stack.post_message(running, "go", llmsim=HANGING)
    await stack.wait_for_event(running, "output.message.delta")
    code, printed = await check_log_command(stack, good, bad, running)
    assert (code, "every rule holds" in printed) == (0, True), printed
    await stack.pool.execute(
        """INSERT INTO events (org_id, session_id, sequence, id, type, ts, context, data)
           SELECT org_id, session_id, 999, gen_random_uuid(), type, now(), context, data FROM events
           WHERE session_id = $1 AND sequence = 1""",
        parse_id(Prefix.SESSION, bad),
    )
    code, printed = await check_log_command(stack, good, bad, running)
    assert (code, printed.count("\n")) == (1, 2), printed
    assert f"{bad} 999 sequences_are_contiguous: " in printed
    assert printed.endswith("1 violation.\n")
    code, printed = await check_log_command(stack, "session_unknown")
    assert (code, "session_unknown" in printed) == (1, True), printed
    await stack.cancel(running)
    await stack.idle(running)
