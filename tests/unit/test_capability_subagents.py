"""What the tools for sub-agents ask of a session's tasks, and what they tell the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest

from activities.capabilities import session_tasks, subagents
from activities.capabilities.registry import builtin_registry
from activities.capabilities.tool_call import ToolOutcome, call_tool
from domain.config import CapabilityRef
from domain.events import ToolStatus
from domain.messages import TextPart
from domain.tasks import (
    SessionTask,
    SessionTaskDetail,
    SpawnRequest,
    TaskError,
    TaskInputRequest,
    TaskLimits,
    TaskLinks,
    TaskMessage,
    TaskProblem,
    TaskState,
    TaskTextPart,
    WakePolicy,
)
from tests.tool_context import PlainContext

TOOLS = {tool.name: tool for one in (subagents, session_tasks) for tool in one.CAPABILITY.tools}
RUNNING = SessionTask(
    id="task_1",
    session_id="session_1",
    kind="subagent",
    display_name="Look",
    state=TaskState.RUNNING,
    links=TaskLinks(child_session_id="session_2"),
    created_at="2026-11-21T00:00:00.000Z",
    updated_at="2026-11-21T00:00:00.000Z",
)
ASKED: Final = {"name": "Look", "instructions": "Find out."}
LOOK: Final = SpawnRequest(name="Look", instructions="Find out.")


def ended(state: TaskState, **fields: Any) -> SessionTask:
    return msgspec.structs.replace(RUNNING, state=state, **fields)


class FakeTasks:
    """Remembers what was asked; `after` is what a wait ends with, `detached` what it is when it is let go."""

    def __init__(self, after: SessionTask = RUNNING, detached: SessionTask = RUNNING) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.after = after
        self.detached = detached
        self.problem: TaskProblem | None = None

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.problem is not None:
            raise self.problem

    async def spawn(self, request: SpawnRequest, *, call_id: str, idempotency_key: str) -> SessionTask:
        self._note("spawn", request, call_id, idempotency_key)
        return RUNNING

    async def wait(
        self, task_id: str, *, call_id: str, seconds: float | None = None, until_input: bool = False
    ) -> SessionTask:
        self._note("wait", task_id, call_id, seconds, until_input)
        return self.after

    async def detach(self, task_id: str) -> SessionTask:
        self._note("detach", task_id)
        return self.detached

    async def find(self, *, only_open: bool = False) -> Sequence[SessionTask]:
        self._note("find", only_open)
        return [self.after]

    async def get(self, task_id: str) -> SessionTaskDetail:
        self._note("get", task_id)
        part = TaskTextPart(text="And this?")
        said = [
            TaskMessage(id="tmsg_1", task_id=task_id, direction=direction, content=[part], created_at="then")
            for direction in ("inbound", "outbound")
        ]
        return SessionTaskDetail(task=self.after, messages=said)

    async def send(self, task_id: str, text: str, *, idempotency_key: str) -> SessionTask:
        self._note("send", task_id, text, idempotency_key)
        return self.after

    async def cancel(self, task_id: str) -> SessionTask:
        self._note("cancel", task_id)
        return self.after


class Context(PlainContext):
    def __init__(self, tasks: FakeTasks) -> None:
        self._tasks = tasks

    @property
    def tasks(self) -> FakeTasks:
        return self._tasks


async def run(tasks: FakeTasks, tool: str, **arguments: object) -> ToolOutcome:
    return await call_tool(TOOLS[tool], Context(tasks), arguments)


async def told(tasks: FakeTasks, tool: str, **arguments: object) -> dict[str, Any]:
    outcome = await run(tasks, tool, **arguments)
    assert outcome.status is ToolStatus.SUCCESS, outcome.error
    assert outcome.result is not None
    (part,) = outcome.result
    assert isinstance(part, TextPart)
    return json.loads(part.text)


async def test_background_is_the_default_and_does_not_wait() -> None:
    tasks = FakeTasks()
    answer = await told(tasks, "spawn_agent", **ASKED)
    assert tasks.calls == [("spawn", LOOK, "call_1", "key_1")]
    assert (answer["task_id"], answer["session_id"], answer["state"]) == ("task_1", "session_2", "running")
    assert "message when it ends" in answer["note"]


async def test_what_is_asked_for_reaches_the_child() -> None:
    tasks = FakeTasks()
    config = {"workspace": "own", "model_id": "model_1", "max_iterations": 3, "wake_policy": "silent"}
    answer = await told(
        tasks, "spawn_agent", **ASKED, target={"type": "subagent", "agent": "expert"}, blueprint="expert", config=config
    )
    (spawned,) = tasks.calls
    assert spawned[1] == msgspec.structs.replace(
        LOOK,
        agent="expert",
        own_workspace=True,
        model_id="model_1",
        max_iterations=3,
        wake_policy=WakePolicy.SILENT,
    )
    assert "Nobody will tell you" in answer["note"]


async def test_foreground_waits_and_returns_the_answer() -> None:
    tasks = FakeTasks(after=ended(TaskState.SUCCEEDED, summary="Forty-two."))
    answer = await told(tasks, "spawn_agent", **ASKED, mode="foreground")
    assert [call[0] for call in tasks.calls] == ["spawn", "wait"]
    assert (answer["result"], answer["state"]) == ("Forty-two.", "succeeded")


async def test_foreground_that_takes_too_long_is_let_go() -> None:
    tasks = FakeTasks()
    answer = await told(tasks, "spawn_agent", **ASKED, mode="foreground")
    assert [call[0] for call in tasks.calls] == ["spawn", "wait", "detach"]
    assert "goes on in the background" in answer["note"]


async def test_foreground_that_ends_at_the_last_moment_returns_the_answer() -> None:
    tasks = FakeTasks(detached=ended(TaskState.SUCCEEDED, summary="Just in time."))
    assert (await told(tasks, "spawn_agent", **ASKED, mode="foreground"))["result"] == "Just in time."


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (ended(TaskState.FAILED, error=TaskError(kind="timeout", message="Too slow.")), "failed (timeout): Too slow."),
        (ended(TaskState.FAILED), "failed for an unknown reason"),
        (ended(TaskState.CANCELED), "was cancelled"),
    ],
)
async def test_foreground_that_does_not_end_well_is_an_error(after: SessionTask, text: str) -> None:
    outcome = await run(FakeTasks(after=after), "spawn_agent", **ASKED, mode="foreground")
    assert outcome.status is ToolStatus.ERROR
    assert text in (outcome.error or "")


async def test_a_problem_is_told_in_its_own_words() -> None:
    for name, arguments in {
        "spawn_agent": ASKED,
        "get_task": {"task_id": "task_9"},
        "message_task": {"task_id": "task_9", "message": "hi"},
        "cancel_task": {"task_id": "task_9"},
        "wait_task": {"task_id": "task_9"},
    }.items():
        tasks = FakeTasks()
        tasks.problem = TaskProblem("Not today.")
        outcome = await run(tasks, name, **arguments)
        assert (outcome.status, outcome.error) == (ToolStatus.ERROR, "Not today.")


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "Look"},
        {"name": "", "instructions": "x"},
        {"name": " ", "instructions": "x"},
        {"name": "x", "instructions": "\n"},
        {"name": "x" * 201, "instructions": "x"},
        {"name": "x", "instructions": "x" * 32_001},
        {**ASKED, "mode": "sideways"},
        {**ASKED, "target": {"type": "a2a"}},
        {**ASKED, "blueprint": "one", "target": {"agent": "other"}},
        {**ASKED, "config": {"workspace": "host"}},
        {**ASKED, "config": {"max_iterations": 0}},
        {**ASKED, "config": {"secrets": True}},
    ],
)
async def test_arguments_that_make_no_sense_begin_nothing(arguments: dict[str, object]) -> None:
    tasks = FakeTasks()
    outcome = await run(tasks, "spawn_agent", **arguments)
    assert outcome.status is ToolStatus.ERROR
    assert "Invalid arguments for `spawn_agent`" in (outcome.error or "")
    assert tasks.calls == []


async def test_a_wait_is_bounded_and_ends_when_a_person_is_needed() -> None:
    asks = TaskInputRequest(id="call_9", prompt="Which size?")
    tasks = FakeTasks(after=ended(TaskState.AWAITING_INPUT, input_request=asks))
    answer = await told(tasks, "wait_task", task_id="task_1", timeout_seconds=7)
    assert tasks.calls == [("wait", "task_1", "call_1", 7, True)]
    assert answer["waits_for"] == "Which size?"
    assert "note" not in answer
    for seconds in (0, 301, -1):
        outcome = await run(tasks, "wait_task", task_id="task_1", timeout_seconds=seconds)
        assert outcome.status is ToolStatus.ERROR
    assert (await told(FakeTasks(), "wait_task", task_id="task_1"))["note"] == "It has not ended yet."


async def test_lists_show_the_beginning_of_results_and_one_task_all_of_it() -> None:
    tasks = FakeTasks(after=ended(TaskState.SUCCEEDED, summary="x" * 5_000))
    (listed,) = (await told(tasks, "list_tasks", only_open=True))["tasks"]
    assert len(listed["result"]) < 600
    assert "get_task" in listed["result"]
    found = await told(tasks, "get_task", task_id="task_1")
    assert found["result"] == "x" * 5_000
    assert [one["direction"] for one in found["messages"]] == ["inbound"], "the result stands in the task"


async def test_cancelling_says_that_it_is_under_way() -> None:
    tasks = FakeTasks(after=ended(TaskState.RUNNING, cancel_requested_at="now"))
    assert (await told(tasks, "cancel_task", task_id="task_1"))["cancelling"] is True
    done = FakeTasks(after=ended(TaskState.CANCELED, cancel_requested_at="now"))
    assert "cancelling" not in await told(done, "cancel_task", task_id="task_1")


async def test_a_message_names_its_call_so_that_a_retry_says_it_once() -> None:
    tasks = FakeTasks()
    await told(tasks, "message_task", task_id="task_1", message="Hurry")
    assert tasks.calls == [("send", "task_1", "Hurry", "key_1")]


def test_tools_that_wait_may_take_longer_than_the_wait() -> None:
    for name in ("spawn_agent", "wait_task"):
        assert TOOLS[name].timeout_seconds > TaskLimits().foreground_seconds


def test_whoever_can_spawn_can_look_after_tasks() -> None:
    resolved = builtin_registry().resolve([CapabilityRef(ref="subagents")])
    assert {tool.tool.name for tool in resolved.tools} == set(TOOLS)
    assert "subagents" in resolved.capabilities[-1].capability.features
