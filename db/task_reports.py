"""How a sub-agent's progress reaches its parent.

`ReportingLog` looks at what a transaction has appended to the log of a session. When that may have moved a task, the child is
followed right after the commit, in a transaction of its own: where the child stands is read from its session and its log, and the
task's row, the event in the parent's log and the message for the parent's model are written together. Nothing is handed over
between the two transactions, so nothing is lost between them: whoever looks at the child later comes to the same result, and
`db.task_upkeep` looks at those whose worker died in between.

Why not in the transaction that ends the child's turn: that one may hold budgets, which the parent's own steps lock after the
parent's session. Lock order here: the child's session, the parent's, the task (see `db.task_rows`), and nothing after them.

The other direction: when a call of `spawn_agent` ends before its foreground child (a cancel, an interrupt, a lost worker), the
task is marked in the transaction that settles the call, and the child is told after the commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
import structlog
from msgspec import Struct

from db.child_sessions import is_deleted, put_message, turn_labels
from db.event_log import EventLog, Publisher, SessionTransaction
from db.task_rows import OPEN, TaskRow, add_message, change_task, lock_task, task_of_child
from db.turn_rows import StateRow, lock_state
from domain.errors import EverrunsError
from domain.events import (
    OutputMessageCompleted,
    StoredEvent,
    ToolCallRequested,
    ToolCompleted,
    TurnCancelled,
    TurnFailed,
    TurnSealed,
)
from domain.ids import Prefix, format_id
from domain.messages import Delivery, ExternalActor
from domain.ports import TurnGateway, TurnLabels
from domain.tasks import (
    SPAWN_AGENT,
    SUMMARY_MAX_CHARACTERS,
    TASK_SOURCE,
    TaskError,
    TaskInputRequest,
    TaskState,
    TaskTextPart,
    WakePolicy,
)
from domain.turns import SessionGone

WAITING: Final = "waiting_for_tool_results"
BUSY: Final = frozenset({"active", WAITING})
MOVING: Final = frozenset(
    {
        "session.idled",
        "tool.call_requested",
        "turn.started",
        "reason.started",
        "tool.started",
        "tool.completed",
        "budget.paused",
        "budget.resumed",
    }
)
"""Events after which a child may stand elsewhere than before."""

PAUSED: Final = "paused by a budget"
PROMPT_MAX_CHARACTERS: Final = 2_000
NO_ANSWER: Final = "The sub-agent ended without an answer."
CANCELLED_WITH_CALL: Final = "the call that waited for it has ended"

_STATE: Final = "SELECT status, turn_id FROM session_state WHERE session_id = $1"
_BUSY: Final = f"""
SELECT EXISTS (SELECT 1 FROM inbox WHERE session_id = $1) AS unread, EXISTS (
    SELECT 1 FROM session_tasks WHERE session_id = $1 AND {OPEN} AND mode = 'background' AND wake_policy <> 'silent'
    AND NOT quiet) AS expecting
"""  # noqa: S608
_LAST: Final = """
SELECT type, data FROM events WHERE session_id = $1
AND type IN ('output.message.completed', 'turn.completed', 'turn.failed', 'turn.sealed', 'turn.cancelled')
ORDER BY sequence DESC LIMIT 4
"""
_REQUESTED: Final = (
    "SELECT data FROM events WHERE session_id = $1 AND type = 'tool.call_requested' ORDER BY sequence DESC LIMIT 1"
)
_ORPHANS: Final = f"""
SELECT id FROM session_tasks WHERE session_id = $1 AND call_id = $2 AND mode = 'foreground' AND {OPEN}
"""  # noqa: S608

log = structlog.get_logger(__name__)


class Wake(Struct, frozen=True, kw_only=True):
    """A session that has an unread message now."""

    session_id: str
    message_id: str
    running: bool
    labels: TurnLabels | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """Where a child stands: what its task's row is to say."""

    state: TaskState
    summary: str | None = None
    error: TaskError | None = None
    input_request: TaskInputRequest | None = None
    detail: str | None = None

    def is_that_of(self, task: TaskRow) -> bool:
        """Whether the row says so already. The detail of a task that is being stopped tells why."""
        detail = task.state_detail if task.cancel_requested_at is not None else self.detail
        return (self.state, self.input_request, detail) == (task.state, task.input_request, task.state_detail)


class TaskFollower:
    """Brings tasks up to date with their children, and wakes parents."""

    def __init__(self, log: EventLog, turns: TurnGateway) -> None:
        self._log = log
        self._turns = turns

    async def follow(self, session_id: str) -> bool:
        """Look where a session stands, if it is a child whose task is open; returns whether that was news."""
        async with self._log.connection() as connection:
            child = SessionTransaction(connection, session_id)
            task = await task_of_child(connection, child.key)
            # Without a lock: most steps of a child are no news. What comes later is followed later.
            if task is None or task.state.is_final or (await outcome_of_child(child, task)).is_that_of(task):
                return False
        async with self._log.transaction(task.parent_id) as parent:
            child = SessionTransaction(parent.connection, session_id)
            try:
                await lock_state(child)
                state = await lock_state(parent)
            except SessionGone:
                return False
            locked = await lock_task(parent.connection, task.id)
            if locked is None or locked.state.is_final:
                return False
            outcome = await outcome_of_child(child, locked)
            if outcome.is_that_of(locked):
                return False
            wake = await settle_task(parent, state, locked, outcome)
        await self.deliver(wake)
        return True

    async def deliver(self, wake: Wake | None) -> None:
        """Give the word to the parent's turn. When it is lost, the reconciler finds the unread message."""
        if wake is None:
            return
        try:
            await self._turns.wake(
                wake.session_id,
                message_id=wake.message_id,
                delivery=Delivery.STEER,
                running=wake.running,
                ends_wait=False,
                labels=wake.labels,
            )
        except EverrunsError as error:
            log.warning("a session could not be woken", session_id=wake.session_id, error=error.message)


class ReportingLog(EventLog):
    """The event log of workers. `stop` ends a task that nobody waits for any more, by its id."""

    def __init__(
        self, pool: asyncpg.Pool, publisher: Publisher, follower: TaskFollower, stop: Callable[[UUID], Awaitable[None]]
    ) -> None:
        super().__init__(pool, publisher)
        self._follower = follower
        self._stop = stop

    @contextlib.asynccontextmanager
    async def transaction(self, session_id: str) -> AsyncIterator[SessionTransaction]:
        async with super().transaction(session_id) as work:
            yield work
            orphans = await mark_orphans(work)
        # Committed: what fails from here on must not fail the step, and is made up for by `db.task_upkeep`.
        try:
            if not MOVING.isdisjoint(event.type for event in work.appended):
                await self._follower.follow(session_id)
            for task in orphans:
                await self._stop(task)
        except Exception as error:
            log.warning("tasks could not be followed", session_id=session_id, error=type(error).__name__)


async def settle_task(parent: SessionTransaction, state: StateRow, task: TaskRow, outcome: Outcome) -> Wake | None:
    """Write where a child stands. Both the parent's session and the task are locked."""
    changes: dict[str, object] = {"state": outcome.state.value, "input_request": outcome.input_request}
    if outcome.state.is_final or task.cancel_requested_at is None:
        changes["state_detail"] = outcome.detail
    if outcome.state.is_final:
        changes |= {"summary": outcome.summary, "error": outcome.error}
        finished = await parent.connection.fetchval("SELECT clock_timestamp()")
        changes["finished_at"] = finished
    changed = await change_task(parent, task.id, **changes)
    if changed.state is task.state and changed.input_request == task.input_request:
        return None
    said = outcome.summary if outcome.state.is_final else outcome.input_request and outcome.input_request.prompt
    if said:
        request = outcome.input_request
        await add_message(
            parent, changed, "outbound", [TaskTextPart(text=said)], in_reply_to=None if request is None else request.id
        )
    if not _wakes(changed) or await _must_rest(parent):
        return None
    return await _tell(parent, state, changed)


def _wakes(task: TaskRow) -> bool:
    if task.quiet or task.mode == "foreground":
        return False
    match task.wake_policy:
        case WakePolicy.SILENT:
            return False
        case WakePolicy.ON_TERMINAL:
            return task.state.is_final
        case WakePolicy.ON_ACTIVITY:
            return task.state.is_final or task.state is TaskState.AWAITING_INPUT


async def _must_rest(parent: SessionTransaction) -> bool:
    """A parent that is deleted, or is a child about to be cancelled itself, is not put to work again."""
    if await is_deleted(parent.connection, parent.key):
        return True
    own = await task_of_child(parent.connection, parent.key)
    return own is not None and own.cancel_requested_at is not None


async def _tell(parent: SessionTransaction, state: StateRow, task: TaskRow) -> Wake:
    text = told(task)
    actor = ExternalActor(actor_id=task.public_id, source=TASK_SOURCE, actor_name=task.display_name)
    known = {"task_id": task.public_id, "state": task.state.value, "child_session_id": task.child_id}
    message_id = await put_message(parent, state, text, actor, task=known)
    running = state.status in BUSY
    return Wake(
        session_id=parent.session_id,
        message_id=message_id,
        running=running,
        labels=None if running else await turn_labels(parent.connection, parent.key, state.turn_count + 1),
    )


def told(task: TaskRow) -> str:
    """What the parent's model reads, as a message of the user's role."""
    name = f"Task `{task.display_name}` ({task.public_id})"
    match task.state:
        case TaskState.SUCCEEDED:
            return f"{name} has finished. Its result:\n\n{task.summary}"
        case TaskState.CANCELED:
            return f"{name} was cancelled."
        case TaskState.AWAITING_INPUT:
            prompt = task.input_request.prompt if task.input_request else ""
            return f"{name} waits for input: {prompt}"
        case _:
            error = task.error or TaskError(kind="unknown", message="It failed.")
            return f"{name} failed ({error.kind}): {error.message}"


async def outcome_of_child(work: SessionTransaction, task: TaskRow) -> Outcome:
    """Read from the child's session how far it is."""
    row = await work.connection.fetchrow(_STATE, work.key)
    if row is None:
        return Outcome(state=TaskState.FAILED, error=TaskError(kind="orphaned", message="Its session is gone."))
    if row["status"] == WAITING:
        return Outcome(state=TaskState.AWAITING_INPUT, input_request=await _input_request(work))
    busy = await work.connection.fetchrow(_BUSY, work.key)
    assert busy is not None, "a row of two columns"
    if row["turn_id"] is not None or busy["unread"]:
        return Outcome(state=TaskState.RUNNING, detail=PAUSED if row["status"] == "paused" else None)
    ended = await _ended(work, task)
    if ended.state is TaskState.SUCCEEDED and busy["expecting"]:
        # Its answer is about work that still goes on; it will hear of the end of that, and answer again.
        return Outcome(state=TaskState.RUNNING)
    return ended


async def _ended(work: SessionTransaction, task: TaskRow) -> Outcome:
    """How the child's last turn ended."""
    rows = await work.connection.fetch(_LAST, work.key)
    ending = next((row for row in rows if row["type"] != OutputMessageCompleted.event_type), None)
    text = next(
        (
            msgspec.json.decode(row["data"], type=OutputMessageCompleted).message.text
            for row in rows
            if row["type"] == OutputMessageCompleted.event_type
        ),
        "",
    )
    if ending is None:
        return Outcome(state=TaskState.CANCELED)
    match ending["type"]:
        case "turn.completed":
            return Outcome(state=TaskState.SUCCEEDED, summary=shortened(text, task) or NO_ANSWER)
        case "turn.failed":
            failed = msgspec.json.decode(ending["data"], type=TurnFailed)
            return _failed(failed.error_code or "processing_error", failed.error)
        case "turn.sealed":
            sealed = msgspec.json.decode(ending["data"], type=TurnSealed)
            kind = "budget_exhausted" if sealed.reason == "budget" else sealed.reason
            return _failed(kind, text or "The sub-agent was stopped.")
        case "turn.cancelled" if task.error is not None:
            return Outcome(state=TaskState.FAILED, error=task.error)
        case "turn.cancelled":
            cancelled = msgspec.json.decode(ending["data"], type=TurnCancelled)
            return Outcome(state=TaskState.CANCELED, summary=cancelled.reason)
        case _:
            return Outcome(state=TaskState.CANCELED)


def _failed(kind: str, message: str) -> Outcome:
    return Outcome(state=TaskState.FAILED, error=TaskError(kind=kind, message=message[:PROMPT_MAX_CHARACTERS]))


def shortened(text: str, task: TaskRow) -> str:
    if len(text) <= SUMMARY_MAX_CHARACTERS:
        return text
    note = f"\n\n[The first {SUMMARY_MAX_CHARACTERS:,} of {len(text):,} characters. The whole answer is in {task.child_id}.]"
    return text[:SUMMARY_MAX_CHARACTERS] + note


async def _input_request(work: SessionTransaction) -> TaskInputRequest | None:
    data = await work.connection.fetchval(_REQUESTED, work.key)
    if data is None:
        return None
    requested = msgspec.json.decode(data, type=ToolCallRequested)
    asked = [question.question for one in requested.questions or () for question in one.questions]
    waiting = [one.tool_call for one in requested.waiting or ()]
    calls = [*requested.tool_calls, *waiting]
    if not calls:
        return None
    names = ", ".join(f"`{call.name}`" for call in calls)
    prompt = " ".join(asked) or (f"Approval or an answer for {names}" if waiting else f"Results of {names}")
    return TaskInputRequest(
        id=calls[0].id,
        prompt=prompt[:PROMPT_MAX_CHARACTERS],
        expected={"session_id": work.session_id, "tool_call_ids": [call.id for call in calls]},
    )


async def mark_orphans(work: SessionTransaction) -> list[UUID]:
    """Foreground tasks whose calls were settled just now by something other than their own end."""
    found: list[UUID] = []
    for call_id in _unfinished_spawns(work.appended):
        for row in await work.connection.fetch(_ORPHANS, work.key, call_id):
            task = await lock_task(work.connection, row["id"])
            if task is None or task.state.is_final or task.cancel_requested_at is not None:
                continue
            now = await work.connection.fetchval("SELECT clock_timestamp()")
            await change_task(
                work, task.id, cancel_requested_at=now, quiet=True, state_detail=f"cancelling: {CANCELLED_WITH_CALL}"
            )
            found.append(task.id)
    return found


def _unfinished_spawns(events: Sequence[StoredEvent]) -> list[str]:
    calls: list[str] = []
    for event in events:
        if event.type == ToolCompleted.event_type and SPAWN_AGENT.encode() in event.data:
            completed = msgspec.json.decode(event.data, type=ToolCompleted)
            if completed.tool_name == SPAWN_AGENT and not completed.success:
                calls.append(completed.tool_call_id)
    return calls


def child_transaction(parent: SessionTransaction, task: TaskRow) -> SessionTransaction:
    """The child's side of a transaction that is about its parent too. Lock the child first."""
    return SessionTransaction(parent.connection, format_id(Prefix.SESSION, task.child_session_id))
