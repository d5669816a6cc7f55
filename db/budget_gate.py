"""Where budgets meet turns: what a model call is charged, and whether the next one may be made.

**Charging** happens in the transaction that commits the call, so a call that is committed is charged and one that is not is not,
whatever is retried. A call is never refused before it could be made: the one that passes a limit is the last one, and tools it
asked for still run.

**Looking** happens when a turn or a step is about to begin, in that step's own transaction, without a lock on any budget.

*Used up* (hard limit): the turn ends with an apology, as it does when a model cannot be called. Later turns end the same way.

*Paused* (soft limit): the session's status is `paused`, and nothing of it is left in Temporal. The run ends; the turn stays open
in the log with status `paused`, its history legal, unread messages in the inbox. Any run that is started later, by whoever
(a resume, a message, the reconciler), begins by looking here. While the budget still pauses, that run ends at once. Afterwards it
takes the paused turn up under its own name, where it was; without one it begins a turn with what is unread. So there is nothing a
lost signal or a killed process could leave behind: the session's row and the budget's row decide, and the reconciler starts a run
for sessions whose budget pauses them no longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from db import budget_rows, inbox, tool_ledger
from db.budget_events import exhausted_event, paused_event, resumed_event, warning_event
from db.event_log import EventLog, SessionTransaction
from db.turn_ending import close_partial_message, close_turn
from db.turn_opening import open_turn
from db.turn_rows import StateRow, TurnRow, lock_state, read_turn
from domain.budgets import MODEL_CALL, Action, Budget, charge_of, charged, deciding, error_fields, is_low
from domain.events import NewEvent, TokenUsage
from domain.ids import Prefix, format_id, parse_id
from domain.turns import FinishInput, ReasonNext, ReasonResult, SessionGone, StepRef, TurnEnding

BUDGET_EXHAUSTED: Final = "budget_exhausted"

_PAUSE: Final = "UPDATE session_state SET status = 'paused', paused_by = $2 WHERE session_id = $1"
_SET_STATUS: Final = "UPDATE session_state SET status = $2, updated_at = clock_timestamp() WHERE session_id = $1"
_PAUSE_TURN: Final = """UPDATE turns SET status = 'paused', iteration = $2, open_message_id = NULL, open_exec_id = NULL,
    resumed_by = NULL WHERE id = $1"""
_TAKE_UP: Final = "UPDATE turns SET status = 'running', resumed_by = $2 WHERE id = $1"
_TAKEN_UP: Final = "SELECT id, iteration FROM turns WHERE id = $1 AND status = 'running' AND resumed_by = $2"
_RESULT: Final = "UPDATE turns SET iteration = greatest(iteration, $2), last_result = $3 WHERE id = $1"
_PAUSED_BY: Final = f"SELECT {budget_rows.COLUMNS} FROM budgets b WHERE b.id = $1"  # noqa: S608
_PAUSED_SESSIONS: Final = "SELECT session_id FROM session_state WHERE status = 'paused' AND paused_by = $1"
_PAUSING_BUDGETS: Final = f"""SELECT {budget_rows.COLUMNS} FROM budgets b
    WHERE b.id IN (SELECT paused_by FROM session_state WHERE status = 'paused')"""  # noqa: S608


class Charged(Struct, frozen=True, kw_only=True):
    """`events` are for the caller to append before the turn's end; `pausing` is the budget that lets no further call be made."""

    events: Sequence[NewEvent] = ()
    pausing: Budget | None = None


# --- charging ---------------------------------------------------------------------------------------------------------


async def charge(
    work: SessionTransaction,
    state: StateRow,
    turn: TurnRow,
    usage: TokenUsage,
    *,
    exec_id: str,
    meter: str = MODEL_CALL,
    ref: tuple[str, str] | None = None,
) -> Charged:
    """Charge what a call took to every budget it counts for. `ref` is what the ledger names; without one, the step."""
    if not state.has_budgets:
        return Charged()
    events: list[NewEvent] = []
    left: list[Budget] = []
    now = datetime.now(UTC)
    for budget in await budget_rows.lock(work.connection, await budget_rows.applying(work.connection, work.key)):
        amount = charge_of(usage, budget.currency)
        if amount == 0:
            left.append(budget)
            continue
        is_new = await budget_rows.enter(
            work.connection, budget, amount, meter, ref=ref or ("exec", exec_id), session=work.key
        )
        if not is_new:
            left.append(budget)
            continue
        after = charged(budget, amount, now)
        if after.action is Action.STOP and budget.action is not Action.STOP:
            events.append(exhausted_event(turn, after))
        elif after.action is Action.WARN and is_low(after) and not after.warned:
            after = msgspec.structs.replace(after, warned=True)
            events.append(warning_event(turn, exec_id, after))
        await budget_rows.write(work.connection, after)
        left.append(after)
    strictest = deciding(left)
    return Charged(events=events, pausing=strictest if strictest and strictest.action is Action.PAUSE else None)


async def pause_at_rest(work: SessionTransaction, budget: Budget) -> None:
    """Pause a session whose turn has just ended; `budget.paused` is in the log already."""
    await work.connection.execute(_PAUSE, work.key, budget_rows.key_of(budget))


# --- looking ----------------------------------------------------------------------------------------------------------


async def before_step(
    work: SessionTransaction,
    state: StateRow,
    turn: TurnRow,
    ref: StepRef,
    open_calls: Literal["interrupted", "timed_out"],
) -> ReasonResult | None:
    """Between two steps of a turn: None when the next one may be made."""
    budget = await _blocking(work, state)
    if budget is None:
        return None
    if budget.action is Action.STOP:
        return await _end_exhausted(work, state, turn, ref, budget)
    await close_partial_message(work, turn)
    await tool_ledger.settle_open_calls(work, turn, open_calls)
    # The workflow counts steps that were interrupted as well; the step that takes the turn up must have a number of its own.
    await work.connection.execute(_PAUSE_TURN, turn.id, ref.iteration - 1)
    await work.connection.execute(_PAUSE, work.key, budget_rows.key_of(budget))
    await work.append(paused_event(turn, budget))
    return ReasonResult(next=ReasonNext.PAUSED)


async def before_turn(work: SessionTransaction, state: StateRow, ref: StepRef) -> ReasonResult | None:
    """At the beginning of a run: None when it may begin a turn with what is unread."""
    if state.turn_id is None and state.status != "paused" and not state.has_budgets:
        return None
    if (taken_up := await _taken_up(work, state, ref)) is not None:
        return taken_up
    paused = await _paused_turn(work, state)
    if paused is None and not await inbox.unread(work):
        return None
    budget = await _blocking(work, state)
    if budget is not None and budget.action is Action.PAUSE:
        if state.status != "paused":
            await work.append(paused_event(paused, budget))
        await work.connection.execute(_PAUSE, work.key, budget_rows.key_of(budget))
        return ReasonResult(next=ReasonNext.PAUSED)
    if budget is not None:
        return await _end_exhausted(work, state, paused, ref, budget)
    if state.status == "paused":
        await _tell_resumed(work, state)
    if paused is None:
        return None
    await work.connection.execute(_TAKE_UP, paused.id, parse_id(Prefix.TURN, ref.turn_id))
    await work.connection.execute(_SET_STATUS, work.key, "active")
    return ReasonResult(next=ReasonNext.TAKE_UP, turn_id=paused.public_id, iteration=paused.iteration)


async def take_paused_turn(work: SessionTransaction, state: StateRow) -> TurnRow | None:
    """The session's paused turn, to be ended by the caller."""
    turn = await _paused_turn(work, state)
    if turn is None:
        return None
    await work.connection.execute(_TAKE_UP, turn.id, None)
    return msgspec.structs.replace(turn, status="running")


async def _blocking(work: SessionTransaction, state: StateRow) -> Budget | None:
    if not state.has_budgets:
        return None
    budget = deciding(await budget_rows.applying(work.connection, work.key))
    return budget if budget is not None and budget.action in (Action.PAUSE, Action.STOP) else None


async def _paused_turn(work: SessionTransaction, state: StateRow) -> TurnRow | None:
    turn = None if state.turn_id is None else await read_turn(work, state.turn_id)
    return turn if turn is not None and turn.status == "paused" else None


async def _taken_up(work: SessionTransaction, state: StateRow, ref: StepRef) -> ReasonResult | None:
    """When this very run has taken a turn up already: its answer was lost."""
    if state.turn_id is None:
        return None
    row = await work.connection.fetchrow(_TAKEN_UP, state.turn_id, parse_id(Prefix.TURN, ref.turn_id))
    if row is None:
        return None
    turn_id = format_id(Prefix.TURN, row["id"])
    return ReasonResult(next=ReasonNext.TAKE_UP, turn_id=turn_id, iteration=row["iteration"])


async def _end_exhausted(
    work: SessionTransaction, state: StateRow, turn: TurnRow | None, ref: StepRef, budget: Budget
) -> ReasonResult:
    """End a turn, the running one or one that is opened to be ended, with an apology."""
    if turn is None:
        opened = await open_turn(work, state, ref.turn_id)
        if opened is None:
            return ReasonResult(next=ReasonNext.NOTHING)
        turn = opened.turn
        await work.append(*opened.events)
    turn = msgspec.structs.replace(
        turn, last_error=None, last_error_code=BUDGET_EXHAUSTED, last_error_fields=error_fields(budget)
    )
    await work.append(exhausted_event(turn, budget))
    ending = FinishInput(
        session_id=work.session_id,
        turn_id=turn.public_id,
        iteration=turn.iteration,
        ending=TurnEnding.FAILED,
        error_code=BUDGET_EXHAUSTED,
    )
    await close_turn(work, state, turn, ending)
    result = ReasonResult(
        next=ReasonNext.DONE,
        ending=TurnEnding.FAILED,
        more=bool(await inbox.unread(work)),
        ended_at=work.appended[-1].sequence,
    )
    # For a retry of this step whose answer was lost.
    is_own = turn.id == parse_id(Prefix.TURN, ref.turn_id)
    iteration = ref.iteration if is_own else turn.iteration
    await work.connection.execute(_RESULT, turn.id, iteration, msgspec.json.encode(result).decode())
    return result


# --- going on ---------------------------------------------------------------------------------------------------------


async def release_sessions(log: EventLog, budget: UUID) -> list[str]:
    """Let the sessions that waited for this budget go on; returns those that have something to do, to be woken."""
    rows = await log.pool.fetch(_PAUSED_SESSIONS, budget)
    return [session for row in rows if (session := await release(log, format_id(Prefix.SESSION, row["session_id"])))]


async def release(log: EventLog, session_id: str) -> str | None:
    """The session, if nothing pauses it any longer and something waits to be done."""
    async with log.transaction(session_id) as work:
        try:
            state = await lock_state(work)
        except SessionGone:
            return None
        if state.status != "paused":
            return None
        budget = await _blocking(work, state)
        if budget is not None and budget.action is Action.PAUSE:
            await work.connection.execute(_PAUSE, work.key, budget_rows.key_of(budget))
            return None
        if budget is None:
            await _tell_resumed(work, state)
        waits = state.turn_id is not None or bool(await inbox.unread(work))
        await work.connection.execute(_SET_STATUS, work.key, "active" if waits else "idle")
    return session_id if waits else None


async def release_all(log: EventLog) -> list[str]:
    """Sessions that wait for a budget that pauses nobody now: its period is over, or whoever resumed it was killed then."""
    now = datetime.now(UTC)
    budgets = [budget_rows.budget_of(row, now) for row in await log.pool.fetch(_PAUSING_BUDGETS)]
    freed = [budget for budget in budgets if budget.action is not Action.PAUSE]
    return [session for budget in freed for session in await release_sessions(log, budget_rows.key_of(budget))]


async def _tell_resumed(work: SessionTransaction, state: StateRow) -> None:
    row = None if state.paused_by is None else await work.connection.fetchrow(_PAUSED_BY, state.paused_by)
    if row is not None:
        await work.append(resumed_event(budget_rows.budget_of(row, datetime.now(UTC))))
