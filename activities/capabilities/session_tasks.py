"""Looking after tasks: see them, wait for one, talk to it, stop it."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from activities.capabilities.subagents import WAIT_TIMEOUT_SECONDS, told
from domain.capabilities import Capability, Tool, ToolContext
from domain.tasks import MESSAGE_MAX_CHARACTERS
from domain.tools import SideEffect

MAX_WAIT_SECONDS: Final = 300
LISTED_RESULT_CHARACTERS: Final = 500

TaskId = Annotated[str, Meta(max_length=80, description="`task_…`, as `spawn_agent` or `list_tasks` returned it.")]


class ListTasks(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    only_open: Annotated[bool, Meta(description="Leave out those that have ended.")] = False


class GetTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task_id: TaskId


class CancelTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task_id: TaskId


class MessageTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task_id: TaskId
    message: Annotated[str, Meta(min_length=1, max_length=MESSAGE_MAX_CHARACTERS)]


class WaitTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task_id: TaskId
    timeout_seconds: Annotated[int, Meta(ge=1, le=MAX_WAIT_SECONDS)] = MAX_WAIT_SECONDS


async def list_tasks(context: ToolContext, arguments: ListTasks) -> dict[str, object]:
    tasks = [told(task) for task in await context.tasks.find(only_open=arguments.only_open)]
    for task in tasks:
        result = task.get("result")
        if isinstance(result, str) and len(result) > LISTED_RESULT_CHARACTERS:
            task["result"] = f"{result[:LISTED_RESULT_CHARACTERS]}… (`get_task` shows all of it)"
    return {"tasks": tasks}


async def get_task(context: ToolContext, arguments: GetTask) -> dict[str, object]:
    found = await context.tasks.get(arguments.task_id)
    messages = [
        {"direction": message.direction, "at": message.created_at, "content": msgspec.to_builtins(message.content)}
        for message in found.messages
        # The result stands in the task.
        if message.direction == "inbound" or message.in_reply_to is not None
    ]
    return {**told(found.task), "messages": messages}


async def message_task(context: ToolContext, arguments: MessageTask) -> dict[str, object]:
    task = await context.tasks.send(arguments.task_id, arguments.message, idempotency_key=context.idempotency_key)
    return {**told(task), "note": "It reads the message at its next step. Its answer comes when it ends."}


async def cancel_task(context: ToolContext, arguments: CancelTask) -> dict[str, object]:
    return told(await context.tasks.cancel(arguments.task_id))


async def wait_task(context: ToolContext, arguments: WaitTask) -> dict[str, object]:
    task = await context.tasks.wait(
        arguments.task_id, call_id=context.tool_call_id, seconds=arguments.timeout_seconds, until_input=True
    )
    if task.state.is_final or task.input_request is not None:
        return told(task)
    return {**told(task), "note": "It has not ended yet."}


CAPABILITY = Capability(
    id="session_tasks",
    name="Session Tasks",
    description="Lets the model look after the tasks it has begun: list, wait, talk, cancel.",
    category="Orchestration",
    icon="list-checks",
    system_prompt="""\
Tasks that you have begun go on beside this conversation. A message tells you when one ends: use `wait_task` only when you can \
do nothing before, and `message_task` to correct a task or to ask one that has ended something more.""",
    tools=(
        Tool(
            name="list_tasks",
            display_name="List tasks",
            description="The tasks of this session, newest first, with their states and the beginning of their results.",
            arguments=ListTasks,
            run=list_tasks,
            side_effect=SideEffect.PURE,
            timeout_seconds=30.0,
            readonly=True,
        ),
        Tool(
            name="get_task",
            display_name="Get task",
            description="One task: its state, its whole result, and what was said to it.",
            arguments=GetTask,
            run=get_task,
            side_effect=SideEffect.PURE,
            timeout_seconds=30.0,
            readonly=True,
        ),
        Tool(
            name="message_task",
            display_name="Message task",
            description="Say something to a task. A running one reads it at its next step; one that has ended goes on.",
            arguments=MessageTask,
            run=message_task,
            side_effect=SideEffect.IDEMPOTENT,
            timeout_seconds=30.0,
        ),
        Tool(
            name="cancel_task",
            display_name="Cancel task",
            description="Stop a task and everything it has begun itself.",
            arguments=CancelTask,
            run=cancel_task,
            side_effect=SideEffect.IDEMPOTENT,
            timeout_seconds=30.0,
        ),
        Tool(
            name="wait_task",
            display_name="Wait for task",
            description="Wait until a task has ended or waits for input, up to 300 seconds.",
            arguments=WaitTask,
            run=wait_task,
            side_effect=SideEffect.PURE,
            timeout_seconds=WAIT_TIMEOUT_SECONDS,
            readonly=True,
        ),
    ),
)
