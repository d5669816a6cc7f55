"""The tool-call ledger: one row per call, `requested -> running -> settled`, always in the transaction of its events.

A call that needs a person is `waiting`: before it runs (an approval), or in the middle (its tool asked). The answer makes it
`requested` again.

It answers the one question a recovery has to ask: has this call run, may it have run, or has it certainly not run?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import asyncpg
import msgspec
from msgspec import Struct

from db.event_log import SessionTransaction
from db.turn_rows import TurnRow, step_context, turn_context
from domain.capabilities import Resumption
from domain.events import (
    ActCompleted,
    ActStarted,
    NewEvent,
    ToolCallRequested,
    ToolCompleted,
    ToolStarted,
    ToolStatus,
    TranscriptRepaired,
    WaitingCall,
)
from domain.ids import Prefix, derived_id
from domain.questions import QuestionSet, asked_by
from domain.tools import SideEffect, ToolCall, ToolCallSummary
from domain.turns import ActResult, CallRef, CallWait, PlannedCall, ToolSettlement

OpenCallReason = Literal["interrupted", "timed_out", "cancelled", "superseded", "iteration_limit"]

OUTCOME_UNKNOWN: Final = (
    "The worker running this call was lost. Whether the call took effect is unknown, and it was not run again. "
    "Do not repeat it without checking or asking first."
)
_NOT_RUN: Final = "The call was not executed; it is safe to request it again."
_STOPPED: Final = "The call was interrupted before it returned; it is safe to request it again."
_OPEN_TEXT: Final[dict[str, str]] = {
    "timed_out": "Timed out waiting for client tool results",
    "cancelled": "Cancelled: the turn was cancelled",
    "superseded": "Cancelled: user sent a new message",
    "iteration_limit": "Not executed: the turn reached its iteration limit",
}
APPROVAL: Final = "approval"
"""The `wait_kind` of a call that may not run before a person has allowed it."""

REJECTED_ALWAYS: Final = (
    "The user does not allow this tool in this session. Do not call it again; find another way or ask."
)
_NO_DECISION: Final = "Nobody answered in time. The call was not executed."
_NO_ANSWER: Final = "The user did not answer in time. Go on without the answer, or ask again later."

_COLUMNS: Final = """call_id, turn_id, iteration, ordinal, name, display_name, arguments, kind, side_effect, concurrency_class,
    timeout_seconds, status, outcome, attempt, starts, worker, problem, wait_kind, wait_number, asked_number, wait_seconds,
    wait_request, wait_state, wait_answer"""
_READ_CALL: Final = f"SELECT {_COLUMNS} FROM tool_calls WHERE session_id = $1 AND call_id = $2"  # noqa: S608
_OPEN_CALLS: Final = f"""SELECT {_COLUMNS} FROM tool_calls WHERE session_id = $1 AND status <> 'settled'
    ORDER BY requested_at, ordinal"""  # noqa: S608
_BATCH: Final = f"""SELECT {_COLUMNS}, extract(epoch FROM clock_timestamp() - requested_at) * 1000 AS age_ms
    FROM tool_calls WHERE session_id = $1 AND turn_id = $2 AND iteration = $3 ORDER BY ordinal"""  # noqa: S608
_KNOWN_IDS: Final = "SELECT call_id FROM tool_calls WHERE session_id = $1 AND call_id = ANY($2::text[])"
_CALL_COUNT: Final = "SELECT count(*) FROM tool_calls WHERE session_id = $1"
_REQUEST: Final = """INSERT INTO tool_calls (session_id, call_id, org_id, turn_id, iteration, ordinal, name, display_name,
    arguments, kind, side_effect, concurrency_class, timeout_seconds, problem, status, wait_kind, wait_number, wait_seconds,
    wait_request)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)"""
_RUN: Final = """UPDATE tool_calls SET status = 'running', attempt = $3, starts = starts + 1, worker = $4,
    started_at = coalesce(started_at, clock_timestamp()) WHERE session_id = $1 AND call_id = $2"""
_RELEASE: Final = """UPDATE tool_calls SET starts = starts - 1
    WHERE session_id = $1 AND call_id = $2 AND attempt = $3 AND status = 'running'"""
# A start that ended in a question is not one that was lost.
_SUSPEND: Final = """UPDATE tool_calls SET status = 'waiting', wait_kind = $3, wait_number = wait_number + 1, wait_seconds = $4,
    wait_request = $5, wait_state = $6, wait_answer = NULL, starts = 0 WHERE session_id = $1 AND call_id = $2"""
_ANSWER: Final = "UPDATE tool_calls SET status = 'requested', wait_answer = $3 WHERE session_id = $1 AND call_id = $2"
_ASK: Final = """
WITH asked AS (
    UPDATE tool_calls SET asked_number = greatest(wait_number, 1) WHERE session_id = $1 AND call_id = ANY($2::text[])
)
UPDATE session_state SET status = 'waiting_for_tool_results' WHERE session_id = $1
"""
_RULES: Final = (
    "SELECT tool_name, decision FROM tool_approval_rules WHERE session_id = $1 AND tool_name = ANY($2::text[])"
)
_SETTLE: Final = """UPDATE tool_calls SET status = 'settled', outcome = $3, settled_at = clock_timestamp()
    WHERE session_id = $1 AND call_id = $2"""


class CallRow(Struct, frozen=True, kw_only=True):
    call: ToolCall
    display_name: str | None
    kind: str
    side_effect: SideEffect
    concurrency_class: str | None
    timeout_seconds: float
    status: str
    outcome: str | None
    attempt: int
    starts: int
    worker: str | None
    iteration: int
    problem: str | None = None
    wait_kind: str | None = None
    wait_number: int = 0
    asked_number: int = 0
    wait_seconds: float | None = None
    wait_request: dict[str, object] = {}
    wait_state: dict[str, object] = {}
    wait_answer: dict[str, object] | None = None

    @property
    def awaited(self) -> bool:
        """Whether somebody else has to act: a client that runs it, or a person who answers."""
        return self.status == "waiting" or (self.kind == "client" and self.status != "settled")

    @property
    def answered(self) -> bool:
        """It has got what it was waiting for, and can run now."""
        return self.status == "requested" and self.wait_answer is not None

    @property
    def wake_id(self) -> str:
        """What the turn waits for. Each further wait of a call has an id of its own."""
        return self.call.id if self.wait_number <= 1 else f"{self.call.id}:{self.wait_number}"

    @property
    def resumption(self) -> Resumption | None:
        # Leave to run is no answer to a question of the tool's: it begins as if nobody had been asked.
        if self.wait_answer is None or self.wait_kind == APPROVAL:
            return None
        return Resumption(state=self.wait_state, answer=self.wait_answer)

    @property
    def asked(self) -> QuestionSet | None:
        """The questions that only the user can answer, if the call asks any."""
        return asked_by(self.call) if self.kind == "client" else None

    def ref(self) -> CallRef:
        return CallRef(
            call_id=self.call.id,
            name=self.call.name,
            timeout_seconds=self.timeout_seconds,
            concurrency_class=self.concurrency_class,
        )


def _call_row(row: asyncpg.Record) -> CallRow:
    arguments = msgspec.json.decode(row["arguments"], type=dict[str, object])
    return CallRow(
        call=ToolCall(id=row["call_id"], name=row["name"], arguments=arguments),
        display_name=row["display_name"],
        kind=row["kind"],
        side_effect=SideEffect(row["side_effect"]),
        concurrency_class=row["concurrency_class"],
        timeout_seconds=row["timeout_seconds"],
        status=row["status"],
        outcome=row["outcome"],
        attempt=row["attempt"],
        starts=row["starts"],
        worker=row["worker"],
        iteration=row["iteration"],
        problem=row["problem"],
        wait_kind=row["wait_kind"],
        wait_number=row["wait_number"],
        asked_number=row["asked_number"],
        wait_seconds=row["wait_seconds"],
        wait_request=_object(row["wait_request"]) or {},
        wait_state=_object(row["wait_state"]) or {},
        wait_answer=_object(row["wait_answer"]),
    )


def _object(column: str | None) -> dict[str, object] | None:
    return None if column is None else msgspec.json.decode(column, type=dict[str, object])


def act_exec_id(turn: TurnRow, iteration: int) -> str:
    return derived_id(Prefix.EXEC, turn.id, f"act:{iteration}")


def call_exec_id(turn: TurnRow, call_id: str) -> str:
    return derived_id(Prefix.EXEC, turn.id, f"call:{call_id}")


def _summary(row: CallRow) -> ToolCallSummary:
    return ToolCallSummary(id=row.call.id, name=row.call.name, display_name=row.display_name)


async def with_free_ids(work: SessionTransaction, planned: Sequence[PlannedCall]) -> list[PlannedCall]:
    """The calls under ids that are new in this session: some providers count from `call_1` in every response."""
    if not planned:
        return []
    ids = [item.call.id for item in planned]
    number = 0
    while True:
        taken = {row["call_id"] for row in await work.connection.fetch(_KNOWN_IDS, work.key, ids)}
        if not taken and len(set(ids)) == len(ids):
            break
        # Numbers begin where the session's calls end: an id that comes back in every response is free at the first try.
        number = number or await work.connection.fetchval(_CALL_COUNT, work.key) or 0
        for place, call_id in enumerate(ids):
            if call_id in taken:
                number += 1
                ids[place] = f"{planned[place].call.id}_{number}"
            taken.add(ids[place])
    return [
        msgspec.structs.replace(item, call=msgspec.structs.replace(item.call, id=call_id))
        for item, call_id in zip(planned, ids, strict=True)
    ]


async def request_calls(
    work: SessionTransaction, org_id: int, turn: TurnRow, iteration: int, planned: Sequence[PlannedCall]
) -> None:
    planned = await _decided(work, planned)
    await work.connection.executemany(
        _REQUEST,
        [
            (
                work.key,
                item.call.id,
                org_id,
                turn.id,
                iteration,
                ordinal,
                item.call.name,
                item.display_name,
                msgspec.json.encode(item.call.arguments).decode(),
                item.kind,
                item.side_effect.value,
                item.concurrency_class,
                item.timeout_seconds,
                item.problem,
                *_approval_columns(item),
            )
            for ordinal, item in enumerate(planned)
        ],
    )


async def _decided(work: SessionTransaction, planned: Sequence[PlannedCall]) -> Sequence[PlannedCall]:
    """Calls that need leave, after what was decided for the rest of the session."""
    names = [item.call.name for item in planned if item.approval is not None]
    if not names:
        return planned
    rules = {row["tool_name"]: row["decision"] for row in await work.connection.fetch(_RULES, work.key, names)}

    def decided(item: PlannedCall) -> PlannedCall:
        rule = rules.get(item.call.name) if item.approval is not None else None
        if rule is None:
            return item
        if rule == "reject_always":
            # As for every refusal: nothing can have happened, whatever becomes of the worker that says so.
            return msgspec.structs.replace(item, approval=None, problem=REJECTED_ALWAYS, side_effect=SideEffect.PURE)
        return msgspec.structs.replace(item, approval=None)

    return [decided(item) for item in planned]


def _approval_columns(item: PlannedCall) -> tuple[str, str | None, int, float | None, str | None]:
    """Status, wait_kind, wait_number, wait_seconds, wait_request."""
    approval = item.approval
    if approval is None or item.problem is not None:
        return "requested", None, 0, None, None
    request = msgspec.json.encode({"reason": approval.reason}).decode()
    return "waiting", APPROVAL, 1, approval.wait_seconds, request


async def release_call(work: SessionTransaction, call_id: str, *, attempt: int) -> None:
    """Take back the start of an attempt that handed its call over."""
    await work.connection.execute(_RELEASE, work.key, call_id, attempt)


async def suspend_call(
    work: SessionTransaction, row: CallRow, wait: CallWait, wait_seconds: float | None = None
) -> None:
    """Put a running call to rest until somebody has answered."""
    request, state = msgspec.json.encode(wait.request).decode(), msgspec.json.encode(wait.state).decode()
    await work.connection.execute(_SUSPEND, work.key, row.call.id, wait.kind, wait_seconds, request, state)


async def answer_call(work: SessionTransaction, row: CallRow, answer: dict[str, object]) -> None:
    """Give a waiting call what it waits for. It runs when the turn is woken."""
    await work.connection.execute(_ANSWER, work.key, row.call.id, msgspec.json.encode(answer).decode())


async def open_waits(work: SessionTransaction) -> ActResult:
    """What the session waits for, for a workflow that may not have heard of it."""
    return _waits([row for row in await read_open_calls(work) if row.awaited])


def _waits(rows: Sequence[CallRow]) -> ActResult:
    seconds = [row.wait_seconds for row in rows if row.wait_seconds is not None]
    return ActResult(
        waiting=bool(rows), waits=[row.wake_id for row in rows], wait_seconds=max(seconds) if seconds else None
    )


async def read_call(work: SessionTransaction, call_id: str) -> CallRow | None:
    row = await work.connection.fetchrow(_READ_CALL, work.key, call_id)
    return None if row is None else _call_row(row)


async def read_open_calls(work: SessionTransaction) -> list[CallRow]:
    return [_call_row(row) for row in await work.connection.fetch(_OPEN_CALLS, work.key)]


async def start_call(work: SessionTransaction, turn: TurnRow, row: CallRow, *, attempt: int, worker: str) -> None:
    """Mark a call as running. The first of a batch also opens the batch."""
    act_exec = act_exec_id(turn, row.iteration)
    await work.connection.execute(_RUN, work.key, row.call.id, attempt, worker)
    events = [
        NewEvent(
            data=ToolStarted(tool_call=row.call, display_name=row.display_name),
            context=step_context(turn, call_exec_id(turn, row.call.id), parent=act_exec),
            dedupe_key=f"tool.started:{row.call.id}",
        )
    ]
    if row.attempt == 0:
        batch = [_call_row(item) for item in await work.connection.fetch(_BATCH, work.key, turn.id, row.iteration)]
        events.insert(
            0,
            NewEvent(
                data=ActStarted(tool_calls=[_summary(item) for item in batch if item.kind == "server"]),
                context=step_context(turn, act_exec),
                dedupe_key=f"act.started:{act_exec}",
            ),
        )
    await work.append(*events)


async def settle_call(
    work: SessionTransaction, turn: TurnRow, row: CallRow, settlement: ToolSettlement, *, attempts: int | None = None
) -> None:
    """Settle one call and append its `tool.completed`, the only one its id ever gets."""
    await work.connection.execute(_SETTLE, work.key, row.call.id, settlement.status)
    await work.append(
        NewEvent(
            data=ToolCompleted(
                tool_call_id=row.call.id,
                tool_name=row.call.name,
                success=settlement.status == "success",
                status=ToolStatus(settlement.status),
                result=settlement.result if settlement.status == "success" else None,
                error=settlement.error,
                duration_ms=settlement.duration_ms,
                capability_id=settlement.capability_id,
                capability_name=settlement.capability_name,
                display_name=row.display_name,
                attempts=attempts if attempts is not None and attempts > 1 else None,
            ),
            context=step_context(turn, call_exec_id(turn, row.call.id), parent=act_exec_id(turn, row.iteration)),
            dedupe_key=f"tool.completed:{row.call.id}",
        )
    )


async def close_batch(work: SessionTransaction, turn: TurnRow, iteration: int) -> ActResult:
    """After a server-side call settled or was put to rest: close the batch if none is left that can run now, and ask clients and
    persons for the rest.
    """
    rows = await work.connection.fetch(_BATCH, work.key, turn.id, iteration)
    batch = [_call_row(row) for row in rows]
    server = [row for row in batch if row.kind == "server"]
    if any(row.status in ("requested", "running") for row in server):
        return ActResult()
    settled = all(row.status == "settled" for row in server)
    if settled and any(row.attempt > 0 for row in server):  # otherwise nothing opened the batch
        succeeded = sum(row.outcome == "success" for row in server)
        act_exec = act_exec_id(turn, iteration)
        await work.append(
            NewEvent(
                data=ActCompleted(
                    completed=True,
                    success_count=succeeded,
                    error_count=len(server) - succeeded,
                    duration_ms=round(rows[0]["age_ms"]),
                ),
                context=step_context(turn, act_exec),
                dedupe_key=f"act.completed:{act_exec}",
            )
        )
    return await request_answers(work, turn, batch)


async def request_answers(work: SessionTransaction, turn: TurnRow, rows: Sequence[CallRow]) -> ActResult:
    """Ask for what only a client or a person can give; the status flips in the same transaction, before anybody can see it.

    A client's call is asked for once. One that its client has left out of its results is given up, as ever.
    """
    awaited = [row for row in rows if row.awaited]
    new = [row for row in awaited if row.asked_number < max(row.wait_number, 1)]
    if not new and not any(row.status == "waiting" for row in awaited) and not _client_is_at_work(rows):
        return ActResult()
    await work.connection.execute(_ASK, work.key, [row.call.id for row in new])
    if new:
        client = [row for row in new if row.kind == "client"]
        waiting = [row for row in new if row.kind == "server"]
        key = f"tool.call_requested:{turn.id.hex}:{new[0].iteration}"
        if waiting:
            key = ":".join((key, *(row.wake_id for row in new)))
        await work.append(
            NewEvent(
                data=ToolCallRequested(
                    tool_calls=[row.call for row in client],
                    tool_summaries=[_summary(row) for row in client] or None,
                    questions=[asked for row in client if (asked := row.asked) is not None] or None,
                    waiting=[_waiting(row) for row in waiting] or None,
                ),
                context=turn_context(turn),
                dedupe_key=key,
            )
        )
    return _waits(awaited)


def _client_is_at_work(batch: Sequence[CallRow]) -> bool:
    """Whether only persons have answered so far: their decisions must not take a call from a client that still runs it."""
    clients = [row for row in batch if row.kind == "client" and row.asked is None]
    decided = any(row.kind == "server" and row.wait_kind is not None for row in batch)
    return decided and bool(clients) and not any(row.status == "settled" for row in clients)


async def wait_on(work: SessionTransaction, turn: TurnRow, rows: Sequence[CallRow]) -> ActResult:
    """After a person has rejected calls: what is still to be waited for. `rows` are the open calls."""
    if not rows or any(row.kind != "client" or row.asked_number == 0 for row in rows):
        return ActResult()
    found = await work.connection.fetch(_BATCH, work.key, turn.id, rows[0].iteration)
    return await request_answers(work, turn, [_call_row(row) for row in found])


def _waiting(row: CallRow) -> WaitingCall:
    return WaitingCall(
        tool_call=row.call, kind=row.wait_kind or "", request=row.wait_request, display_name=row.display_name
    )


async def settle_open_calls(
    work: SessionTransaction, turn: TurnRow, why: OpenCallReason, rows: Sequence[CallRow] | None = None
) -> int:
    """Give every open call a result that says what is known about it; returns how many there were.

    `rows` are the open calls, when the caller has read them.
    """
    rows = await read_open_calls(work) if rows is None else rows
    for row in rows:
        status: Literal["error", "timeout", "cancelled"] = "cancelled"
        if why == "interrupted":
            status = "error"
            text = _interruption(row)
        else:
            text = _OPEN_TEXT[why]
            if why == "timed_out":
                status = "timeout"
                text = _NO_ANSWER if row.asked is not None else _NO_DECISION if row.status == "waiting" else text
            elif _may_have_run(row):
                text = f"{text}. {OUTCOME_UNKNOWN}"
        await settle_call(work, turn, row, ToolSettlement(status=status, error=text))
        if why == "interrupted":
            await work.append(
                NewEvent(
                    data=TranscriptRepaired(tool_call_id=row.call.id, tool_name=row.call.name, action="synthesize"),
                    context=turn_context(turn),
                    dedupe_key=f"transcript.repaired:{row.call.id}",
                )
            )
    for iteration in sorted({row.iteration for row in rows if row.kind == "server"}):
        await close_batch(work, turn, iteration)
    return len(rows)


def _interruption(row: CallRow) -> str:
    if row.status == "waiting":
        return "Cancelled: interrupted before the user answered"
    if row.kind == "client":
        who = "client returned a result" if row.asked is None else "user answered"
        return f"Cancelled: interrupted before the {who}"
    if _may_have_run(row):
        return OUTCOME_UNKNOWN
    return _NOT_RUN if row.status == "requested" else _STOPPED


def _may_have_run(row: CallRow) -> bool:
    return row.kind == "server" and row.status == "running" and row.side_effect is SideEffect.AT_MOST_ONCE
