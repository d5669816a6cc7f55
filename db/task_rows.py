"""The rows of tasks, and the events that go with every change of one.

A task's row is changed under the lock of its parent's session, in the transaction that writes the event into the parent's log.
Whoever needs the child's lock as well takes it first: child, parent, task. So a transaction that holds a parent's lock never
waits for a child's. What a step of the parent wants of a child (cancel it, say) is noted in the task's row and done in a
transaction of its own. And a step of a child, which may hold budgets, never waits for its parent (see `db.task_reports`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db.event_log import SessionTransaction
from domain.clock import timestamp
from domain.events import NewEvent, TaskCreated, TaskMessageReceived, TaskMessageSent, TaskUpdated
from domain.ids import Prefix, format_id, uuid7
from domain.tasks import (
    SessionTask,
    TaskDirection,
    TaskError,
    TaskInputRequest,
    TaskLinks,
    TaskMessage,
    TaskMessagePart,
    TaskMode,
    TaskState,
    WakePolicy,
)

T = TypeVar("T")

COLUMNS: Final = """id, org_id, session_id, root_session_id, child_session_id, kind, display_name, mode, call_id, state,
    state_detail, summary, spec, input_request, error, wake_policy, quiet, attempt, deadline_at, cancel_requested_at, created_at,
    started_at, finished_at, updated_at"""
OPEN: Final = "state IN ('queued', 'running', 'awaiting_input')"

_BY_ID: Final = f"SELECT {COLUMNS} FROM session_tasks WHERE id = $1"  # noqa: S608
_BY_CHILD: Final = f"SELECT {COLUMNS} FROM session_tasks WHERE child_session_id = $1"  # noqa: S608
_LOCKED: Final = f"{_BY_ID} FOR UPDATE"
_INSERT: Final = f"""
INSERT INTO session_tasks (id, org_id, session_id, root_session_id, child_session_id, kind, display_name, mode, call_id, state,
    spec, wake_policy, deadline_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'running', $10, $11, clock_timestamp() + make_interval(secs => $12))
RETURNING {COLUMNS}
"""  # noqa: S608
_INSERT_MESSAGE: Final = """
INSERT INTO session_task_messages (id, org_id, task_id, direction, content, in_reply_to) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (id) DO NOTHING RETURNING created_at
"""
_MESSAGES: Final = """
SELECT id, task_id, direction, content, in_reply_to, created_at FROM session_task_messages
WHERE task_id = $1 AND ($2::uuid IS NULL OR (created_at, id) > (
    SELECT created_at, id FROM session_task_messages WHERE id = $2 AND task_id = $1))
ORDER BY created_at DESC, id DESC LIMIT $3
"""
_MESSAGES_AFTER: Final = _MESSAGES.replace(" DESC", "")


class TaskRow(Struct, frozen=True, kw_only=True):
    id: UUID
    org_id: int
    session_id: UUID
    root_session_id: UUID
    child_session_id: UUID
    kind: str
    display_name: str
    mode: TaskMode
    call_id: str | None
    state: TaskState
    state_detail: str | None
    summary: str | None
    spec: dict[str, object]
    input_request: TaskInputRequest | None
    error: TaskError | None
    wake_policy: WakePolicy
    quiet: bool
    attempt: int
    deadline_at: datetime
    cancel_requested_at: datetime | None
    created_at: datetime
    started_at: datetime
    finished_at: datetime | None
    updated_at: datetime

    @property
    def public_id(self) -> str:
        return format_id(Prefix.TASK, self.id)

    @property
    def parent_id(self) -> str:
        return format_id(Prefix.SESSION, self.session_id)

    @property
    def child_id(self) -> str:
        return format_id(Prefix.SESSION, self.child_session_id)

    def view(self) -> SessionTask:
        return SessionTask(
            id=self.public_id,
            session_id=self.parent_id,
            kind=self.kind,
            display_name=self.display_name,
            state=self.state,
            state_detail=self.state_detail,
            summary=self.summary,
            spec=self.spec or None,
            input_request=self.input_request,
            links=TaskLinks(child_session_id=self.child_id),
            # Before its end it is what a task that is being stopped will have failed with.
            error=self.error if self.state is TaskState.FAILED else None,
            wake_policy=self.wake_policy,
            attempt=self.attempt,
            cancel_requested_at=_optional(self.cancel_requested_at),
            created_at=timestamp(self.created_at),
            started_at=timestamp(self.started_at),
            finished_at=_optional(self.finished_at),
            updated_at=timestamp(self.updated_at),
        )


class NewTask(Struct, frozen=True, kw_only=True):
    id: UUID
    org_id: int
    root_session_id: UUID
    child_session_id: UUID
    kind: str
    display_name: str
    mode: TaskMode
    call_id: str
    spec: dict[str, object]
    wake_policy: WakePolicy
    seconds: float
    """Until its deadline."""


def _optional(moment: datetime | None) -> str | None:
    return None if moment is None else timestamp(moment)


def task_row(row: asyncpg.Record) -> TaskRow:
    """A row of `COLUMNS`."""
    values = dict(row)
    values |= {
        "spec": msgspec.json.decode(row["spec"]),
        "input_request": _decoded(row["input_request"], TaskInputRequest),
        "error": _decoded(row["error"], TaskError),
        "state": TaskState(row["state"]),
        "wake_policy": WakePolicy(row["wake_policy"]),
    }
    return TaskRow(**values)


def _decoded(text: str | None, kind: type[T]) -> T | None:
    return None if text is None else msgspec.json.decode(text, type=kind)


async def read_task(connection: asyncpg.Connection, task: UUID) -> TaskRow | None:
    row = await connection.fetchrow(_BY_ID, task)
    return None if row is None else task_row(row)


async def task_of_child(connection: asyncpg.Connection, child: UUID) -> TaskRow | None:
    """The task that a session is, if it is one."""
    row = await connection.fetchrow(_BY_CHILD, child)
    return None if row is None else task_row(row)


async def lock_task(connection: asyncpg.Connection, task: UUID) -> TaskRow | None:
    """To be called with the parent's session locked."""
    row = await connection.fetchrow(_LOCKED, task)
    return None if row is None else task_row(row)


async def create_task(parent: SessionTransaction, new: NewTask) -> TaskRow:
    row = await parent.connection.fetchrow(
        _INSERT,
        new.id,
        new.org_id,
        parent.key,
        new.root_session_id,
        new.child_session_id,
        new.kind,
        new.display_name,
        new.mode,
        new.call_id,
        msgspec.json.encode(new.spec).decode(),
        new.wake_policy.value,
        new.seconds,
    )
    assert row is not None, "INSERT … RETURNING returns the row"
    task = task_row(row)
    await parent.append(NewEvent(data=TaskCreated(task=task.view()), dedupe_key=f"task.created:{new.id.hex}"))
    return task


async def change_task(parent: SessionTransaction, task: UUID, **values: object) -> TaskRow:
    """Set columns of a locked row and tell of it. Structs are stored as JSON; names of columns are the caller's own."""
    stored = [msgspec.json.encode(value).decode() if isinstance(value, Struct) else value for value in values.values()]
    assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(values, 2))
    row = await parent.connection.fetchrow(
        f"UPDATE session_tasks SET {assignments}, updated_at = clock_timestamp() WHERE id = $1 RETURNING {COLUMNS}",  # noqa: S608
        task,
        *stored,
    )
    assert row is not None, "the row is locked"
    changed = task_row(row)
    await parent.append(NewEvent(data=TaskUpdated(task=changed.view())))
    return changed


async def add_message(
    parent: SessionTransaction,
    task: TaskRow,
    direction: TaskDirection,
    content: list[TaskMessagePart],
    *,
    message: UUID | None = None,
    in_reply_to: str | None = None,
) -> TaskMessage | None:
    """Keep what was said and tell of it; None when a message of this id is there already."""
    key = message or uuid7()
    created = await parent.connection.fetchval(
        _INSERT_MESSAGE,
        key,
        task.org_id,
        task.id,
        direction,
        msgspec.json.encode(content).decode(),
        in_reply_to,
    )
    if created is None:
        return None
    stored = TaskMessage(
        id=format_id(Prefix.TASK_MESSAGE, key),
        task_id=task.public_id,
        direction=direction,
        content=content,
        created_at=timestamp(created),
        in_reply_to=in_reply_to,
    )
    kind = TaskMessageSent if direction == "inbound" else TaskMessageReceived
    await parent.append(NewEvent(data=kind(task_id=task.public_id, message=stored)))
    return stored


async def read_messages(
    connection: asyncpg.Connection, task: UUID, *, limit: int, after: UUID | None = None
) -> list[TaskMessage]:
    """Oldest first: the newest ones, or, with a cursor, the first ones after it."""
    rows = await connection.fetch(_MESSAGES if after is None else _MESSAGES_AFTER, task, after, limit)
    return [
        TaskMessage(
            id=format_id(Prefix.TASK_MESSAGE, row["id"]),
            task_id=format_id(Prefix.TASK, row["task_id"]),
            direction=row["direction"],
            content=msgspec.json.decode(row["content"], type=list[TaskMessagePart]),
            created_at=timestamp(row["created_at"]),
            in_reply_to=row["in_reply_to"],
        )
        for row in (rows if after is not None else rows[::-1])
    ]
