"""Tasks for people: every read and every act is of one organization, and of sessions that are not deleted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg

from db.messages import MessageStore
from db.session_tasks import TaskStore, text_of
from db.task_rows import COLUMNS, TaskRow, task_row
from domain.errors import Conflict, InvalidInput, NotFound
from domain.ids import Prefix, parse_id, uuid7
from domain.ports import TurnGateway
from domain.tasks import SessionTask, SessionTaskDetail, TaskMessage, TaskMessagePart, TaskProblem, TaskState
from domain.tools import ClientToolResult

_COLUMNS: Final = ", ".join(f"k.{column.strip()}" for column in COLUMNS.split(","))
_TASKS: Final = f"""
SELECT {_COLUMNS} FROM session_tasks k JOIN sessions s ON s.id = k.session_id
WHERE k.org_id = $1 AND s.deleted_at IS NULL
"""  # noqa: S608
_SESSION: Final = "SELECT 1 FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL"


async def list_tasks(
    store: TaskStore,
    org_id: int,
    *,
    limit: int,
    session_id: str | None = None,
    root_session_id: str | None = None,
    state: TaskState | None = None,
    kind: str | None = None,
    created_after: datetime | None = None,
) -> list[SessionTask]:
    """Newest first. Raises `MalformedId`, and `NotFound` for a `session_id` that is no session."""
    arguments: list[object] = [org_id]
    clauses: list[str] = []

    def add(clause: str, value: object) -> None:
        arguments.append(value)
        clauses.append(f" AND {clause} ${len(arguments)}")

    if session_id is not None:
        key = parse_id(Prefix.SESSION, session_id)
        if await store.pool.fetchval(_SESSION, org_id, key) is None:
            raise NotFound("Session not found")
        add("k.session_id =", key)
    if root_session_id is not None:
        add("k.root_session_id =", parse_id(Prefix.SESSION, root_session_id))
    if state is not None:
        add("k.state =", state.value)
    if kind is not None:
        add("k.kind =", kind)
    if created_after is not None:
        add("k.created_at >", created_after if created_after.tzinfo else created_after.replace(tzinfo=UTC))
    query = f"{_TASKS}{''.join(clauses)} ORDER BY k.created_at DESC, k.id DESC LIMIT {int(limit)}"
    return [task_row(row).view() for row in await store.pool.fetch(query, *arguments)]


async def get_task(
    store: TaskStore, org_id: int, session_id: str, task_id: str, *, after_id: str | None, limit: int
) -> SessionTaskDetail:
    """Raises `MalformedId` or `NotFound`."""
    after = None if after_id is None else parse_id(Prefix.TASK_MESSAGE, after_id)
    task = await _task(store.pool, org_id, session_id, task_id)
    return SessionTaskDetail(task=task.view(), messages=await store.messages(task, limit=limit, after=after))


async def cancel_task(store: TaskStore, org_id: int, session_id: str, task_id: str) -> SessionTask:
    """Raises `MalformedId` or `NotFound`."""
    task = await _task(store.pool, org_id, session_id, task_id)
    stopped = await store.stop(task.id, reason="cancelled over the API")
    return (stopped or task).view()


async def send(
    store: TaskStore, org_id: int, session_id: str, task_id: str, content: Sequence[TaskMessagePart]
) -> TaskMessage:
    """Raises `MalformedId`, `NotFound` or `Conflict`."""
    task = await _task(store.pool, org_id, session_id, task_id)
    return await _kept(store, task, content)


async def answer(
    store: TaskStore,
    messages: MessageStore,
    turns: TurnGateway,
    org_id: int,
    session_id: str,
    task_id: str,
    content: Sequence[TaskMessagePart],
    *,
    in_reply_to: str,
) -> TaskMessage:
    """Give the call that a task waits for its result. Raises also `InvalidInput`, `NotWaitingForToolResults`."""
    task = await _task(store.pool, org_id, session_id, task_id)
    if task.input_request is None or task.input_request.id != in_reply_to:
        raise InvalidInput(f"in_reply_to: the task does not wait for `{in_reply_to[:80]}`", field="in_reply_to")
    result = ClientToolResult(tool_call_id=in_reply_to, result=text_of(content))
    settled = await messages.submit_tool_results(org_id, task.child_id, [result])
    if settled.ends_wait:
        await turns.tool_results(task.child_id, settled.call_ids)
    return await _kept(store, task, content, in_reply_to=in_reply_to)


async def _kept(
    store: TaskStore, task: TaskRow, content: Sequence[TaskMessagePart], *, in_reply_to: str | None = None
) -> TaskMessage:
    try:
        return await store.send(
            task, list(content), message=uuid7(), in_reply_to=in_reply_to, deliver=in_reply_to is None
        )
    except TaskProblem as problem:
        raise Conflict(str(problem)) from None


async def _task(pool: asyncpg.Pool, org_id: int, session_id: str, task_id: str) -> TaskRow:
    session: UUID = parse_id(Prefix.SESSION, session_id)
    row = await pool.fetchrow(
        f"{_TASKS} AND k.session_id = $2 AND k.id = $3", org_id, session, parse_id(Prefix.TASK, task_id)
    )
    if row is None:
        raise NotFound("There is no such task")
    return task_row(row)
