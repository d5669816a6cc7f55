"""Sub-agents in a whole engine: results come back, cancels go down, and nothing is lost or done twice on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final
from uuid import uuid4

import pytest
from temporalio.client import Client

from db.session_resources import DatabaseResources
from db.session_tasks import TaskStore
from db.task_reports import ReportingLog
from domain.events import StoredEvent
from domain.ids import Prefix, new_id, parse_id
from domain.model import USER_ERROR_CODES
from domain.tasks import TaskLimits
from infra.encryption import Keyring
from infra.event_bus import EventBus
from infra.turn_gateway import TemporalTurns, TurnOptions
from tests.stack import Json, Stack, of_type
from tests.sub_agents import bg, call, calling, fg, model_with_script, saying, script
from tests.turn_workers import turn_worker

REFS: Final = [{"ref": "subagents"}, {"ref": "test_faults"}]
WAIT_SECONDS: Final = 60.0


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    """Its only worker is a process of its own, which a test may kill."""
    async with Stack(no_worker=True) as running:
        await running.start_worker()
        yield running


async def eventually(what: str, check: Callable[[], Awaitable[bool]], *, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)


async def tasks_of(stack: Stack, session: str) -> list[Json]:
    answer = await stack.client.get(f"sessions/{session}/tasks")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def task_in(stack: Stack, session: str, *states: str) -> Json:
    """The session's only task, once it is in one of these states."""
    found: list[Json] = []

    async def there() -> bool:
        found[:] = await tasks_of(stack, session)
        return len(found) == 1 and found[0]["state"] in states

    await eventually(f"a task of {session} is {states}", there)
    return found[0]


def child_of(task: Json) -> str:
    links = task["links"]
    assert isinstance(links, dict)
    return str(links["child_session_id"])


def results(log: Sequence[StoredEvent]) -> dict[str, Json]:
    return {str(data["tool_call_id"]): data for data in of_type(log, "tool.completed")}


def answers(log: Sequence[StoredEvent]) -> list[str]:
    found: list[str] = []
    for data in of_type(log, "output.message.completed"):
        parts = data["message"]["content"]  # type: ignore[index]
        found.append("".join(part["text"] for part in parts if part["type"] == "text"))
    return found


def reports(log: Sequence[StoredEvent]) -> list[str]:
    """What tasks have told the model."""
    messages = [data["message"] for data in of_type(log, "input.message")]
    return [
        message["content"][0]["text"]  # type: ignore[index]
        for message in messages
        if message.get("external_actor", {}).get("source") == "task"  # type: ignore[union-attr]
    ]


async def parent_with(stack: Stack, *child: Json, **session: object) -> str:
    """A session whose sub-agents play these turns."""
    model = await model_with_script(stack, script(*child))
    return await stack.create_session(**{"harness_name": "base", "capabilities": REFS, "model_id": model, **session})


GATE: Final = {"type": "client_side", "name": "gate", "description": "Waits.", "parameters": {"type": "object"}}
HELD: Final = calling(call("gate", "held"))
"""A child that plays this goes on when the test says so."""


async def let_go(stack: Stack, session: str, call_id: str = "held") -> None:
    body = {"tool_results": [{"tool_call_id": call_id, "result": "go"}]}
    answer = await stack.client.post(f"sessions/{session}/tool-results", json=body)
    assert answer.status_code == 200, answer.text


# --- results ----------------------------------------------------------------------------------------------------------


async def test_a_foreground_sub_agent_answers_in_the_call_s_result(stack: Stack) -> None:
    session = await parent_with(stack, saying("Forty-two."), title="Asker")
    log = await stack.ask(session, "go", llmsim=script(calling(fg("call_a")), saying("It is 42.")))
    assert results(log)["call_a"]["success"] is True, results(log)
    assert "Forty-two." in str(results(log)["call_a"]["result"])
    assert answers(log)[-1] == "It is 42."
    (task,) = await tasks_of(stack, session)
    assert (task["state"], task["summary"], task["kind"]) == ("succeeded", "Forty-two.", "subagent")
    child = await stack.session(child_of(task))
    assert child["parent_session_id"] == session
    assert child["title"] == "Look"
    mother = await stack.session(session)
    for name in ("harness_id", "model_id", "workspace_id", "owner_principal_id", "organization_id"):
        assert child[name] == mother[name], name
    assert reports(log) == []
    assert [event.type for event in log if event.type.startswith("task.")] == [
        "task.created",
        "task.updated",
        "task.message.received",
    ]
    await stack.check(child_of(task))
    await stack.check(session)


async def test_a_background_result_wakes_a_parent_that_rests(stack: Stack) -> None:
    session = await parent_with(stack, HELD, saying("Forty-two."), tools=[GATE])
    turns = script(calling(bg("call_a")), saying("Started."), saying("The result is in."))
    log = await stack.ask(session, "go", llmsim=turns)
    assert '"state":"running"' in str(results(log)["call_a"]["result"])
    await let_go(stack, child_of(await task_in(stack, session, "awaiting_input")))
    await stack.idle(session, after_sequence=log[-1].sequence)
    log = await stack.check(session)
    assert answers(log) == ["", "Started.", "The result is in."]
    (told,) = reports(log)
    assert "Forty-two." in told
    assert len(of_type(log, "turn.started")) == 2


async def test_a_background_result_does_not_end_a_wait_for_the_client(stack: Stack) -> None:
    session = await parent_with(stack, HELD, saying("Forty-two."), tools=[GATE])
    held = calling(call("gate", "call_g"))
    await stack.post_message(session, "go", llmsim=script(calling(bg("call_a")), held, saying("Got both.")))
    await stack.wait_for_event(session, "tool.call_requested")
    await let_go(stack, child_of(await task_in(stack, session, "awaiting_input")))
    await task_in(stack, session, "succeeded")
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    await let_go(stack, session, "call_g")
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, "turn.started")) == len(of_type(log, "turn.completed")) == 1
    assert len(reports(log)) == 1
    assert answers(log)[-1] == "Got both."


async def test_a_background_result_steers_a_parent_that_works(stack: Stack) -> None:
    session = await parent_with(stack, saying("Forty-two."))
    turns = script(calling(bg("call_a")), calling(call("test_sleep", "call_b", seconds=3)), saying("Both are done."))
    log = await stack.ask(session, "go", llmsim=turns)
    await stack.check(session)
    assert len(of_type(log, "turn.started")) == 1
    assert len(reports(log)) == 1
    read = [data for data in of_type(log, "reason.started") if data.get("input_message_ids")]
    assert len(read) == 1, "read in the running turn"
    assert answers(log)[-1] == "Both are done."


async def test_a_silent_task_tells_nobody(stack: Stack) -> None:
    session = await parent_with(stack, saying("Forty-two."))
    quiet = bg("call_a", config={"wake_policy": "silent"})
    log = await stack.ask(session, "go", llmsim=script(calling(quiet), saying("Started.")))
    await task_in(stack, session, "succeeded")
    log = await stack.check(session)
    assert reports(log) == []
    assert (await stack.session(session))["status"] == "idle"


async def test_a_sub_agent_that_fails_fails_its_task_with_the_code(stack: Stack) -> None:
    failing: Json = {"mode": "error", "error": {"class": "authentication", "message": "no"}}
    model = await model_with_script(stack, failing)
    session = await stack.create_session(harness_name="base", capabilities=REFS, model_id=model)
    log = await stack.ask(session, "go", llmsim=script(calling(fg("call_a")), saying("It did not work.")))
    (task,) = await tasks_of(stack, session)
    assert task["state"] == "failed"
    assert task["error"]["kind"] in USER_ERROR_CODES  # type: ignore[index]
    assert results(log)["call_a"]["success"] is False
    assert str(task["error"]["kind"]) in str(results(log)["call_a"]["error"])  # type: ignore[index]
    await stack.check(session)


async def test_another_agent_of_the_organization_does_the_work(stack: Stack) -> None:
    name = f"expert-{uuid4().hex[:8]}"
    made = await stack.client.post("agents", json={"name": name, "system_prompt": "You know.", "harness_name": "base"})
    session = await parent_with(stack, saying("As an expert: yes."), network_access={"allowed": ["example.com"]})
    asked = fg("call_a", target={"type": "subagent", "agent": name})
    unknown = fg("call_b", blueprint="nobody-here")
    log = await stack.ask(session, "go", llmsim=script(calling(asked, unknown), saying("Done.")))
    assert "As an expert" in str(results(log)["call_a"])
    assert "There is no agent `nobody-here`" in str(results(log)["call_b"]["error"])
    (task,) = await tasks_of(stack, session)
    child = await stack.session(child_of(task))
    assert child["agent_id"] == made.json()["id"]
    assert child.get("capabilities") == []
    assert child["network_access"] == {"allowed": ["example.com"]}, "no way around the parent's limits"


async def test_a_foreground_sub_agent_that_takes_too_long_goes_on_in_the_background(stack: Stack) -> None:
    session = await parent_with(stack, HELD, saying("Forty-two."), tools=[GATE])
    turns = script(calling(fg("call_a")), saying("Not yet."), saying("Now it is here."))
    async with hasty_worker(stack) as (client, queue):
        await client.execute_workflow(
            "Turn",
            {"session_id": session},
            id=session,
            task_queue=queue,
            start_signal="message",
            start_signal_args=[{"content": [{"type": "text", "text": "go"}], "metadata": {"llmsim": turns}}],
        )
        log = await stack.check(session)
        assert "goes on in the background" in str(results(log)["call_a"]["result"])
        await let_go(stack, child_of(await task_in(stack, session, "awaiting_input")))
        await stack.idle(session, after_sequence=log[-1].sequence)
    log = await stack.check(session)
    assert answers(log) == ["", "Not yet.", "Now it is here."]
    assert len(reports(log)) == 1


@contextlib.asynccontextmanager
async def hasty_worker(stack: Stack) -> AsyncIterator[tuple[Client, str]]:
    """A worker in this process, on a queue of its own, whose foreground waits are short."""
    client = await stack.temporal()
    queue = f"test-{uuid4().hex}"
    gateway = TemporalTurns(client, TurnOptions(turns_queue=queue))
    tasks = TaskStore(stack.log, gateway, TaskLimits(foreground_seconds=0.5))
    log = ReportingLog(stack.pool, EventBus(), tasks.follower, tasks.stop_orphan)
    resources = DatabaseResources(stack.pool, Keyring.of(None, None), tasks=tasks)
    async with turn_worker(client, queue, log, resources):
        yield client, queue


# --- depth and number -------------------------------------------------------------------------------------------------


async def test_sub_agents_have_sub_agents_down_to_the_depth_limit(stack: Stack) -> None:
    spawning = [calling(fg()), saying("Passed on.")]
    session = await parent_with(stack, *spawning)
    log = await stack.ask(session, "go", llmsim=script(calling(fg("call_a")), saying("Done.")))
    assert "Passed on." in str(results(log)["call_a"]["result"])
    (first,) = await tasks_of(stack, session)
    (second,) = await tasks_of(stack, child_of(first))
    deepest = await stack.read_log(child_of(second))
    assert await tasks_of(stack, child_of(second)) == []
    (refused,) = results(deepest).values()
    assert "Unknown tool `spawn_agent`" in str(refused["error"]), "it is not even offered"
    offered = [tool["name"] for tool in of_type(deepest, "llm.generation")[0].get("tools", [])]  # type: ignore[union-attr]
    assert "spawn_agent" not in offered
    tree = await stack.client.get("tasks", params={"root_session_id": session})
    assert [task["id"] for task in tree.json()] == [second["id"], first["id"]]


async def test_a_sub_agent_has_ended_when_what_it_began_has_ended(stack: Stack) -> None:
    deepest = await model_with_script(stack, script(HELD, saying("The deepest answer.")))
    # A script of a model plays anew after each message: told of the deepest answer, the middle one has nothing to begin.
    spawning = bg(config={"model_id": deepest}) | {"when": "begin now"}
    middle = await model_with_script(stack, script(calling(spawning), saying("Waiting.")))
    session = await stack.create_session(harness_name="base", capabilities=REFS, model_id=middle, tools=[GATE])
    turns = script(calling(bg("call_a", instructions="begin now")), saying("Started."), saying("The end."))
    log = await stack.ask(session, "go", llmsim=turns)
    child = child_of((await tasks_of(stack, session))[0])
    await stack.idle(child)
    below = await task_in(stack, child, "awaiting_input")
    assert (await tasks_of(stack, session))[0]["state"] == "running"
    assert reports(await stack.read_log(session)) == []
    await let_go(stack, child_of(below))
    await task_in(stack, session, "succeeded")
    await stack.idle(session, after_sequence=log[-1].sequence)
    assert "The deepest answer." in reports(await stack.check(child))[0]
    assert len(reports(await stack.check(session))) == 1


# --- cancels ----------------------------------------------------------------------------------------------------------

SLEEPING: Final = calling(call("test_sleep", seconds=60))


async def test_cancelling_a_turn_cancels_the_sub_agent_it_waits_for(stack: Stack) -> None:
    session = await parent_with(stack, SLEEPING)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a"))))
    task = await task_in(stack, session, "running")
    child = child_of(task)
    await stack.wait_for_event(child, "tool.started")
    # Through Temporal, as its Web UI does it: nothing but the turn hears of it.
    await (await stack.temporal()).get_workflow_handle(session).cancel()
    await stack.idle(session)
    await stack.idle(child)
    assert (await task_in(stack, session, "canceled"))["cancel_requested_at"]
    assert reports(await stack.check(session)) == []
    assert of_type(await stack.check(child), "turn.cancelled")


async def test_an_interrupt_cancels_the_sub_agent_it_takes_the_turn_from(stack: Stack) -> None:
    session = await parent_with(stack, SLEEPING)
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a"))))
    child = child_of(await task_in(stack, session, "running"))
    await stack.wait_for_event(child, "tool.started")
    await stack.post_message(session, "Stop it", llmsim=script(saying("Fine.")), delivery="interrupt")
    await stack.idle(session)
    await task_in(stack, session, "canceled")
    assert answers(await stack.check(session))[-1] == "Fine."


async def test_cancelling_a_session_cancels_the_whole_tree(stack: Stack) -> None:
    session = await parent_with(stack, calling(bg(), call("test_sleep", seconds=60)))
    # The grandchild plays the same turns, but has nothing to spawn with: it sleeps.
    log = await stack.ask(session, "go", llmsim=script(calling(bg("call_a")), saying("Started."), saying("Woken.")))
    child = child_of(await task_in(stack, session, "running"))
    grandchild = child_of(await task_in(stack, child, "running"))
    for one in (child, grandchild):
        await stack.wait_for_event(one, "tool.started")
    assert (await stack.session(session))["status"] == "idle"
    assert (await stack.cancel(session))["status"] == "cancelled"
    for one in (child, grandchild):
        await stack.idle(one)
    await task_in(stack, session, "canceled")
    await task_in(stack, child, "canceled")
    assert (await stack.read_log(session))[-1].type == "task.message.received" or reports(log) == []
    assert reports(await stack.check(session)) == reports(await stack.check(child)) == []
    assert (await stack.cancel(session))["status"] == "no_op"


async def test_a_cancelled_task_tells_the_parent_and_ends_its_sub_agent(stack: Stack) -> None:
    session = await parent_with(stack, SLEEPING)
    log = await stack.ask(session, "go", llmsim=script(calling(bg("call_a")), saying("Started."), saying("A pity.")))
    task = await task_in(stack, session, "running")
    await stack.wait_for_event(child_of(task), "tool.started")
    answer = await stack.client.post(f"sessions/{session}/tasks/{task['id']}/cancel")
    assert answer.status_code == 200
    assert answer.json()["cancel_requested_at"]
    await stack.idle(child_of(task))
    await stack.idle(session, after_sequence=log[-1].sequence)
    (told,) = reports(await stack.check(session))
    assert "was cancelled" in told
    again = await stack.client.post(f"sessions/{session}/tasks/{task['id']}/cancel")
    assert again.json()["state"] == "canceled"


async def test_a_deleted_parent_takes_its_sub_agents_with_it(stack: Stack) -> None:
    session = await parent_with(stack, SLEEPING)
    await stack.ask(session, "go", llmsim=script(calling(bg("call_a")), saying("Started.")))
    child = child_of(await task_in(stack, session, "running"))
    await stack.wait_for_event(child, "tool.started")
    assert (await stack.client.delete(f"sessions/{session}")).status_code == 204
    assert (await stack.client.get(f"sessions/{child}")).status_code == 404

    async def ended() -> bool:
        return [event.type for event in await stack.read_log(child)][-1] == "session.idled"

    await eventually("the child's turn ends", ended)
    await stack.check(child)
    assert (
        await stack.pool.fetchval(
            "SELECT state FROM session_tasks WHERE child_session_id = $1", parse_id(Prefix.SESSION, child)
        )
        == "canceled"
    )


async def test_a_task_past_its_deadline_fails_and_says_so(stack: Stack) -> None:
    session = await parent_with(stack, SLEEPING)
    log = await stack.ask(session, "go", llmsim=script(calling(bg("call_a")), saying("Started."), saying("Too late.")))
    task = await task_in(stack, session, "running")
    await stack.wait_for_event(child_of(task), "tool.started")
    await stack.pool.execute(
        "UPDATE session_tasks SET deadline_at = now() WHERE id = $1", parse_id(Prefix.TASK, str(task["id"]))
    )
    failed = await task_in(stack, session, "failed")
    assert failed["error"]["kind"] == "timeout"  # type: ignore[index]
    await stack.idle(session, after_sequence=log[-1].sequence)
    (told,) = reports(await stack.check(session))
    assert "timeout" in told


# --- talking ----------------------------------------------------------------------------------------------------------


async def test_a_task_that_has_ended_can_be_asked_more(stack: Stack) -> None:
    session = await parent_with(stack, saying("Here I am."))
    await stack.ask(session, "go", llmsim=script(calling(fg("call_a")), saying("Done.")))
    (task,) = await tasks_of(stack, session)
    more = [
        calling(call("message_task", "call_m", task_id=task["id"], message="And the rest?")),
        calling(call("wait_task", "call_w", task_id=task["id"])),
        calling(call("get_task", "call_g", task_id=task["id"])),
        calling(call("list_tasks", "call_l"), call("get_task", "call_x", task_id=new_id(Prefix.TASK))),
        saying("Now I know."),
    ]
    log = await stack.ask(session, "more", llmsim=script(*more))
    found = results(log)
    assert all(found[key]["success"] for key in ("call_m", "call_w", "call_g", "call_l")), found
    assert '"state":"succeeded"' in str(found["call_w"]["result"])
    assert "And the rest?" in str(found["call_g"]["result"])
    assert str(task["id"]) in str(found["call_l"]["result"])
    assert "There is no task" in str(found["call_x"]["error"])
    (task,) = await tasks_of(stack, session)
    assert (task["attempt"], task["state"]) == (2, "succeeded")
    assert len(of_type(await stack.check(child_of(task)), "turn.completed")) == 2


async def test_a_sub_agent_that_asks_a_person_is_answered_in_its_own_session(stack: Stack) -> None:
    question = {"questions": [{"id": "size", "question": "Which size?", "options": [{"label": "S"}, {"label": "L"}]}]}
    asking = calling({"name": "ask_user", "id": "ask", "arguments": question})
    session = await parent_with(stack, asking, saying("L it is."), capabilities=[*REFS, {"ref": "ask_user"}])
    turns = script(calling(bg("call_a", config={"wake_policy": "on_activity"})), saying("Started."), saying("More."))
    log = await stack.ask(session, "go", llmsim=turns)
    task = await task_in(stack, session, "awaiting_input")
    assert task["input_request"]["prompt"] == "Which size?"  # type: ignore[index]
    assert task["input_request"]["id"] == "ask"  # type: ignore[index]
    answer = await stack.client.post(
        f"sessions/{child_of(task)}/question-answers",
        json={"status": "answered", "answers": [{"id": "size", "selected": ["L"]}]},
    )
    assert answer.status_code == 200, answer.text
    task = await task_in(stack, session, "succeeded")
    assert "input_request" not in task
    await stack.wait_for_event(session, "input.message", 3)
    await stack.idle(session, after_sequence=log[-1].sequence)
    waits, done = reports(await stack.read_log(session))
    assert "Which size?" in waits
    assert "L it is." in done


# --- crashes ----------------------------------------------------------------------------------------------------------


async def test_a_wait_for_a_sub_agent_outlives_its_worker(stack: Stack) -> None:
    # The child is still at work when its worker dies as well.
    session = await parent_with(stack, calling(call("test_effect_idempotent", seconds=2)), saying("Forty-two."))
    await stack.post_message(session, "go", llmsim=script(calling(fg("call_a")), saying("It is 42.")))
    task = await task_in(stack, session, "running")
    await stack.wait_for_event(child_of(task), "tool.started")
    await stack.restart_worker(stack.workers[0])
    await stack.idle(session, timeout=WAIT_SECONDS)
    log = await stack.check(session)
    assert "Forty-two." in str(results(log)["call_a"]["result"])
    assert results(log)["call_a"]["attempts"] == 2
    assert len(await tasks_of(stack, session)) == 1, "the same child"
    assert len(of_type(log, "task.created")) == 1
    await stack.check(child_of(task))
