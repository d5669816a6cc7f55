"""What a session does with its tasks: begin, look, wait, talk, stop. For tools through `SessionTaskPort`, and for the API.

A stop is two things: a note in the task's row, and the word to the child's turn. The note is what counts: `db.task_upkeep` gives
the word again where it was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID, uuid5

import asyncpg
import msgspec
import structlog

from db import inbox
from db.child_sessions import create_child, is_deleted, put_message, turn_labels
from db.event_log import EventLog, SessionTransaction
from db.initial_files import put_initial_files
from db.patient_state import is_away
from db.task_reports import BUSY, Outcome, TaskFollower, Wake, child_transaction, settle_task
from db.task_rows import (
    COLUMNS,
    OPEN,
    NewTask,
    TaskRow,
    add_message,
    change_task,
    create_task,
    lock_task,
    read_messages,
    read_task,
    task_row,
)
from db.turn_rows import lock_state
from domain.errors import EverrunsError
from domain.ids import Prefix, format_id, is_id, parse_id
from domain.messages import ExternalActor
from domain.ports import TurnGateway
from domain.tasks import (
    SUBAGENT_KIND,
    SessionTask,
    SessionTaskDetail,
    SpawnRequest,
    TaskError,
    TaskLimits,
    TaskMessage,
    TaskMessagePart,
    TaskProblem,
    TaskState,
    TaskTextPart,
)
from domain.turns import SessionGone

FIRST_LOOK_SECONDS: Final = 0.1
MAX_LOOK_SECONDS: Final = 1.0
"""Between two looks at a task somebody waits for. Workers hold no connection for notifications; a read by key every second
is cheaper than one, and a wait that another worker goes on with needs nothing but the row."""

THREAD_MESSAGES: Final = 20
MAX_LISTED: Final = 50
PARENT_SOURCE: Final = "session"
"""`external_actor.source` of what a parent says to its sub-agent."""

LIMITS: Final = TaskLimits()

_LIST: Final = f"""
SELECT {COLUMNS} FROM session_tasks WHERE session_id = $1 AND ($2::text[] IS NULL OR state = ANY($2))
ORDER BY created_at DESC, id DESC LIMIT $3
"""  # noqa: S608
_OPEN_TASKS: Final = f"SELECT id FROM session_tasks WHERE session_id = $1 AND {OPEN}"  # noqa: S608
_OPEN_COUNT: Final = f"SELECT count(*) FROM session_tasks WHERE session_id = $1 AND {OPEN}"  # noqa: S608
_CALL: Final = """SELECT status, extract(epoch FROM clock_timestamp() - started_at)::float8 AS age_seconds FROM tool_calls
    WHERE session_id = $1 AND call_id = $2"""
_TOUCH: Final = "UPDATE session_tasks SET updated_at = clock_timestamp() WHERE id = $1"

log = structlog.get_logger(__name__)


class TaskStore:
    def __init__(self, log: EventLog, turns: TurnGateway, limits: TaskLimits = LIMITS) -> None:
        self._log = log
        self._turns = turns
        self.follower = TaskFollower(log, turns)
        self.limits = limits

    @property
    def pool(self) -> asyncpg.Pool:
        return self._log.pool

    # --- begin --------------------------------------------------------------------------------------------------------

    async def spawn(self, session_id: str, request: SpawnRequest, *, call_id: str, idempotency_key: str) -> TaskRow:
        """Begin a sub-agent, or find the one that this key began. Raises `TaskProblem`, `SessionGone`."""
        parent_key = parse_id(Prefix.SESSION, session_id)
        task_key = uuid5(parent_key, f"task:{idempotency_key}")
        # A retry sends no word: the first attempt did, or the reconciler does.
        found = await read_task(self._log.pool, task_key)  # type: ignore[arg-type]  # a pool reads like a connection
        if found is not None:
            return found
        child_id = format_id(Prefix.SESSION, uuid5(parent_key, f"child:{idempotency_key}"))
        async with self._log.transaction(session_id) as parent:
            child = SessionTransaction(parent.connection, child_id)
            task, wake = await self._begin(parent, child, task_key, request, call_id)
        await self.follower.deliver(wake)
        return task

    async def _begin(
        self, parent: SessionTransaction, child: SessionTransaction, task_key: UUID, request: SpawnRequest, call_id: str
    ) -> tuple[TaskRow, Wake | None]:
        made = await create_child(child, parent.key, request, self.limits)
        if made is None:
            found = await read_task(parent.connection, task_key)
            if found is None:
                raise SessionGone
            return found, None
        actor = ExternalActor(actor_id=parent.session_id, source=PARENT_SOURCE)
        message_id = await put_message(child, await lock_state(child), request.instructions, actor)
        # The child's rows first: see `db.task_rows`.
        await lock_state(parent)
        call = await parent.connection.fetchrow(_CALL, parent.key, call_id)
        if call is not None and call["status"] == "settled":
            raise TaskProblem("The call has ended meanwhile; nothing was begun.")
        if (await parent.connection.fetchval(_OPEN_COUNT, parent.key) or 0) >= self.limits.max_running:
            raise TaskProblem(
                f"{self.limits.max_running} tasks of this session are running already. Wait for one of them, or cancel one."
            )
        spec: dict[str, object] = {"instructions": request.instructions, "mode": request.mode}
        if made.agent_id is not None:
            spec["agent_id"] = made.agent_id
        task = await create_task(
            parent,
            NewTask(
                id=task_key,
                org_id=made.org_id,
                root_session_id=made.root,
                child_session_id=child.key,
                kind=SUBAGENT_KIND,
                display_name=request.name,
                mode=request.mode,
                call_id=call_id,
                spec=spec,
                wake_policy=request.wake_policy,
                seconds=self.limits.background_seconds,
            ),
        )
        if made.has_new_files:
            # A workspace is locked after sessions, here as in a step that writes files.
            await put_initial_files(parent.connection, child.key, made.workspace)
        labels = await turn_labels(parent.connection, child.key, 1)
        return task, Wake(session_id=child.session_id, message_id=message_id, running=False, labels=labels)

    # --- look and wait ------------------------------------------------------------------------------------------------

    async def find(
        self, session_id: str, states: Sequence[str] | None = None, *, limit: int = MAX_LISTED
    ) -> list[TaskRow]:
        """Newest first."""
        rows = await self._log.pool.fetch(_LIST, parse_id(Prefix.SESSION, session_id), states, limit)
        return [task_row(row) for row in rows]

    async def get(self, session_id: str, task_id: str) -> TaskRow:
        """Raises `TaskProblem` unless it is a task of this session."""
        task = None
        if is_id(Prefix.TASK, task_id):
            task = await read_task(self._log.pool, parse_id(Prefix.TASK, task_id))  # type: ignore[arg-type]  # as above
        if task is None or task.session_id != parse_id(Prefix.SESSION, session_id):
            raise TaskProblem(f"There is no task `{task_id[:80]}` in this session.")
        return task

    async def messages(
        self, task: TaskRow, *, limit: int = THREAD_MESSAGES, after: UUID | None = None
    ) -> list[TaskMessage]:
        async with self._log.connection() as connection:
            return await read_messages(connection, task.id, limit=limit, after=after)

    async def wait(
        self, session_id: str, task_id: str, *, call_id: str, seconds: float | None, until_input: bool
    ) -> TaskRow:
        """See `domain.tasks.SessionTasks.wait`. A database that is away for a moment does not end it."""
        loop = asyncio.get_running_loop()
        limit = self.limits.foreground_seconds
        seconds = limit if seconds is None else min(seconds, limit)
        call = await self._log.pool.fetchrow(_CALL, parse_id(Prefix.SESSION, session_id), call_id)
        deadline = loop.time() + seconds - ((call["age_seconds"] if call is not None else None) or 0.0)
        pause = FIRST_LOOK_SECONDS
        task = await self.get(session_id, task_id)
        while not task.state.is_final and not (until_input and task.state is TaskState.AWAITING_INPUT):
            left = deadline - loop.time()
            if left <= 0:
                break
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, MAX_LOOK_SECONDS)
            try:
                task = await self.get(session_id, task_id)
            except Exception as error:
                if not is_away(error):
                    raise
        return task

    async def detach(self, session_id: str, task_id: str) -> TaskRow:
        """Decided under the parent's lock: the task has ended, or its end will be told by a message."""
        task = await self.get(session_id, task_id)
        async with self._log.transaction(session_id) as parent:
            await lock_state(parent)
            locked = await lock_task(parent.connection, task.id)
            if locked is None or locked.state.is_final or locked.mode == "background":
                return locked or task
            return await change_task(parent, task.id, mode="background")

    # --- talk ---------------------------------------------------------------------------------------------------------

    async def send(
        self,
        task: TaskRow,
        content: list[TaskMessagePart],
        *,
        message: UUID,
        in_reply_to: str | None = None,
        deliver: bool = True,
    ) -> TaskMessage:
        """Say something to a child, once for each `message` id. One that has ended goes to work again, as another attempt.

        Without `deliver` it is only kept: its content has reached the child another way. Raises `TaskProblem`, `SessionGone`.
        """
        wake: Wake | None = None
        async with self._log.transaction(task.parent_id) as parent:
            child = child_transaction(parent, task)
            child_state = await lock_state(child)
            await lock_state(parent)
            locked = await lock_task(parent.connection, task.id)
            if locked is None:
                raise TaskProblem("The task does not exist any more.")
            if await is_deleted(parent.connection, child.key):
                raise TaskProblem("The task's session was deleted.")
            if not locked.state.is_final and locked.cancel_requested_at is not None:
                raise TaskProblem("The task is being cancelled.")
            said = await add_message(parent, locked, "inbound", content, message=message, in_reply_to=in_reply_to)
            if said is None:
                stored = await read_messages(parent.connection, task.id, limit=THREAD_MESSAGES)
                return next(one for one in stored if one.id == format_id(Prefix.TASK_MESSAGE, message))
            if deliver:
                if locked.state.is_final:
                    await self._reopen(parent, locked)
                actor = ExternalActor(actor_id=parent.session_id, source=PARENT_SOURCE)
                message_id = await put_message(child, child_state, text_of(content), actor)
                wake = Wake(
                    session_id=child.session_id,
                    message_id=message_id,
                    running=child_state.status in BUSY,
                    labels=await turn_labels(parent.connection, child.key, child_state.turn_count + 1),
                )
        await self.follower.deliver(wake)
        return said

    async def _reopen(self, parent: SessionTransaction, task: TaskRow) -> None:
        if (await parent.connection.fetchval(_OPEN_COUNT, parent.key) or 0) >= self.limits.max_running:
            raise TaskProblem(f"{self.limits.max_running} tasks of this session are running already.")
        deadline: datetime | None = await parent.connection.fetchval(
            "SELECT clock_timestamp() + make_interval(secs => $1)", self.limits.background_seconds
        )
        await change_task(
            parent,
            task.id,
            state=TaskState.RUNNING.value,
            mode="background",
            attempt=task.attempt + 1,
            deadline_at=deadline,
            summary=None,
            error=None,
            finished_at=None,
            cancel_requested_at=None,
            quiet=False,
        )

    # --- stop ---------------------------------------------------------------------------------------------------------

    async def stop(
        self, task_id: UUID, *, reason: str, quiet: bool = False, error: TaskError | None = None
    ) -> TaskRow | None:
        """Cancel a task and everything below it. `quiet`: its end is told to nobody. With `error` it ends as failed.

        A child at rest is settled at once; a running one ends its turn first, which settles the task.
        """
        async with self._log.connection() as connection:
            task = await read_task(connection, task_id)
        if task is None or task.state.is_final:
            return task
        async with self._log.transaction(task.parent_id) as parent:
            child = child_transaction(parent, task)
            child_state = await lock_state(child)
            state = await lock_state(parent)
            locked = await lock_task(parent.connection, task_id)
            if locked is None or locked.state.is_final:
                return locked
            task, wake, running = locked, None, True
            if locked.cancel_requested_at is None or (quiet and not locked.quiet):
                now: datetime | None = await parent.connection.fetchval("SELECT clock_timestamp()")
                task = await change_task(
                    parent,
                    task_id,
                    cancel_requested_at=locked.cancel_requested_at or now,
                    quiet=quiet or locked.quiet,
                    error=error or locked.error,
                    state_detail=f"cancelling: {reason}",
                )
            else:
                await parent.connection.execute(_TOUCH, task_id)
            if child_state.status not in BUSY and child_state.turn_id is None and not await inbox.unread(child):
                running = False
                wake = await settle_task(parent, state, task, _stopped(task, reason))
        await self.stop_below(task.child_id, reason=reason)
        if running:
            await self._tell_child(task, reason, child_state.last_sequence)
        await self.follower.deliver(wake)
        async with self._log.connection() as connection:
            return await read_task(connection, task_id)

    async def stop_orphan(self, task_id: UUID) -> None:
        """Tell a child that was marked in the transaction that settled its call."""
        await self.stop(task_id, reason="the call that waited for it has ended", quiet=True)

    async def stop_below(self, session_id: str, *, reason: str) -> int:
        """Cancel all tasks below a session, quietly; returns how many of its own there were."""
        rows = await self._log.pool.fetch(_OPEN_TASKS, parse_id(Prefix.SESSION, session_id))
        for row in rows:
            await self.stop(row["id"], reason=reason, quiet=True)
        return len(rows)

    async def _tell_child(self, task: TaskRow, reason: str, read_up_to: int) -> None:
        try:
            await self._turns.cancel(task.child_id, reason, read_up_to=read_up_to)
        except EverrunsError as error:
            log.warning("a sub-agent could not be told to stop", task_id=task.public_id, error=error.message)


def _stopped(task: TaskRow, reason: str) -> Outcome:
    if task.error is not None:
        return Outcome(state=TaskState.FAILED, error=task.error)
    return Outcome(state=TaskState.CANCELED, summary=reason)


def text_of(content: Sequence[TaskMessagePart]) -> str:
    """As a model reads it."""
    return "\n\n".join(
        part.text if isinstance(part, TaskTextPart) else msgspec.json.encode(part.data).decode() for part in content
    )


class SessionTaskPort:
    """Serves the port `domain.tasks.SessionTasks` for one session."""

    def __init__(self, store: TaskStore, session_id: str) -> None:
        self._store = store
        self._session_id = session_id

    async def spawn(self, request: SpawnRequest, *, call_id: str, idempotency_key: str) -> SessionTask:
        task = await self._store.spawn(self._session_id, request, call_id=call_id, idempotency_key=idempotency_key)
        return task.view()

    async def wait(
        self, task_id: str, *, call_id: str, seconds: float | None = None, until_input: bool = False
    ) -> SessionTask:
        task = await self._store.wait(
            self._session_id, task_id, call_id=call_id, seconds=seconds, until_input=until_input
        )
        return task.view()

    async def detach(self, task_id: str) -> SessionTask:
        return (await self._store.detach(self._session_id, task_id)).view()

    async def find(self, *, only_open: bool = False) -> Sequence[SessionTask]:
        states = [state.value for state in TaskState if not state.is_final] if only_open else None
        return [task.view() for task in await self._store.find(self._session_id, states)]

    async def get(self, task_id: str) -> SessionTaskDetail:
        task = await self._store.get(self._session_id, task_id)
        return SessionTaskDetail(task=task.view(), messages=await self._store.messages(task))

    async def send(self, task_id: str, text: str, *, idempotency_key: str) -> SessionTask:
        task = await self._store.get(self._session_id, task_id)
        message = uuid5(task.id, f"message:{idempotency_key}")
        await self._store.send(task, [TaskTextPart(text=text)], message=message)
        return (await self._store.get(self._session_id, task_id)).view()

    async def cancel(self, task_id: str) -> SessionTask:
        """Quietly: whoever asked knows."""
        task = await self._store.get(self._session_id, task_id)
        stopped = await self._store.stop(task.id, reason="its session cancelled it", quiet=True)
        return (stopped or task).view()
