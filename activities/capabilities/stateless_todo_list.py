"""A to-do list that lives in the conversation: each call carries the whole list, nothing is stored."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct, field

from domain.capabilities import Capability, Tool, ToolContext
from domain.tools import SideEffect


class TodoStatus(StrEnum):
    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"


class Todo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    content: Annotated[str, Meta(min_length=1, max_length=1000, description="What is to be done, as an instruction.")]
    active_form: Annotated[
        str, Meta(min_length=1, max_length=1000, description="The same while it is being done: 'Reading the logs'.")
    ] = field(name="activeForm")
    status: TodoStatus


class WriteTodos(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    todos: Annotated[list[Todo], Meta(max_length=200, description="The whole list; it replaces the previous one.")]


async def write_todos(_context: ToolContext, arguments: WriteTodos) -> dict[str, object]:
    counts = Counter(todo.status for todo in arguments.todos)
    result: dict[str, object] = {
        "message": "The list was updated.",
        "total": len(arguments.todos),
        **{status.value: counts[status] for status in TodoStatus},
    }
    if counts[TodoStatus.IN_PROGRESS] > 1:
        result["note"] = "More than one item is in progress. Keep one in progress at a time."
    return result


CAPABILITY = Capability(
    id="stateless_todo_list",
    name="To-do List",
    description="Lets the model plan longer work as a list and show its progress.",
    category="Productivity",
    icon="list-checks",
    system_prompt="""\
You can keep a to-do list with `write_todos`. Use it for work of three or more steps, or when the user names several things; \
leave it out for a simple question.
Write the list before you begin. Every call replaces the whole list, so repeat the items that did not change. Set an item to \
`in_progress` when you start on it, one at a time, and to `completed` as soon as it is really done. Add what you discover on \
the way, and drop what turns out not to be needed.""",
    tools=(
        Tool(
            name="write_todos",
            display_name="Update to-do list",
            description="Replace the to-do list with the given one. Returns how many items have each status.",
            arguments=WriteTodos,
            run=write_todos,
            side_effect=SideEffect.PURE,
            concurrency_class="session_todos",
            timeout_seconds=10.0,
        ),
    ),
)
