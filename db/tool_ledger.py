"""The tool-call ledger: one row per call, `requested -> running -> settled`, always in the transaction of its events.

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
from domain.events import (
    ActCompleted,
    ActStarted,
    NewEvent,
    ToolCallRequested,
    ToolCompleted,
    ToolStarted,
    ToolStatus,
    TranscriptRepaired,
)
from domain.ids import Prefix, derived_id
from domain.questions import QuestionSet, asked_by
from domain.tools import SideEffect, ToolCall, ToolCallSummary
from domain.turns import CallRef, PlannedCall, ToolSettlement

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
_NO_ANSWER: Final = "The user did not answer in time. Go on without the answer, or ask again later."

_COLUMNS: Final = """call_id, turn_id, iteration, ordinal, name, display_name, arguments, kind, side_effect, concurrency_class,
    timeout_seconds, status, outcome, attempt, starts, worker, problem"""
_READ_CALL: Final = f"SELECT {_COLUMNS} FROM tool_calls WHERE session_id = $1 AND call_id = $2"  # noqa: S608
_OPEN_CALLS: Final = f"""SELECT {_COLUMNS} FROM tool_calls WHERE session_id = $1 AND status <> 'settled'
    ORDER BY requested_at, ordinal"""  # noqa: S608
_BATCH: Final = f"""SELECT {_COLUMNS}, extract(epoch FROM clock_timestamp() - requested_at) * 1000 AS age_ms
    FROM tool_calls WHERE session_id = $1 AND turn_id = $2 AND iteration = $3 ORDER BY ordinal"""  # noqa: S608
_KNOWN_IDS: Final = "SELECT call_id FROM tool_calls WHERE session_id = $1 AND call_id = ANY($2::text[])"
_CALL_COUNT: Final = "SELECT count(*) FROM tool_calls WHERE session_id = $1"
_REQUEST: Final = """INSERT INTO tool_calls (session_id, call_id, org_id, turn_id, iteration, ordinal, name, display_name,
    arguments, kind, side_effect, concurrency_class, timeout_seconds, problem)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"""
_RUN: Final = """UPDATE tool_calls SET status = 'running', attempt = $3, starts = starts + 1, worker = $4,
    started_at = coalesce(started_at, clock_timestamp()) WHERE session_id = $1 AND call_id = $2"""
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
    )


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
            )
            for ordinal, item in enumerate(planned)
        ],
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


async def close_batch(work: SessionTransaction, turn: TurnRow, iteration: int) -> bool:
    """After a server-side call settled: close the batch if it was the last, and hand open client-side calls to the client.

    Returns whether the turn now waits for the client.
    """
    rows = await work.connection.fetch(_BATCH, work.key, turn.id, iteration)
    batch = [_call_row(row) for row in rows]
    server = [row for row in batch if row.kind == "server"]
    if any(row.status != "settled" for row in server):
        return False
    if any(row.attempt > 0 for row in server):  # otherwise nothing opened the batch
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
    return await request_client_calls(work, turn, [row for row in batch if row.kind == "client"])


async def request_client_calls(work: SessionTransaction, turn: TurnRow, rows: Sequence[CallRow]) -> bool:
    """Ask the client to run its calls; the status flips in the same transaction, before the client can see the request."""
    waiting = [row for row in rows if row.status != "settled"]
    if not waiting:
        return False
    await work.connection.execute(
        "UPDATE session_state SET status = 'waiting_for_tool_results' WHERE session_id = $1", work.key
    )
    await work.append(
        NewEvent(
            data=ToolCallRequested(
                tool_calls=[row.call for row in waiting],
                tool_summaries=[_summary(row) for row in waiting],
                questions=[asked for row in waiting if (asked := row.asked) is not None] or None,
            ),
            context=turn_context(turn),
            dedupe_key=f"tool.call_requested:{turn.id.hex}:{waiting[0].iteration}",
        )
    )
    return True


async def settle_open_calls(work: SessionTransaction, turn: TurnRow, why: OpenCallReason) -> int:
    """Give every open call a result that says what is known about it; returns how many there were."""
    rows = await read_open_calls(work)
    for row in rows:
        status: Literal["error", "timeout", "cancelled"] = "cancelled"
        if why == "interrupted":
            status = "error"
            text = _interruption(row)
        else:
            text = _OPEN_TEXT[why]
            if why == "timed_out":
                status = "timeout"
                text = _NO_ANSWER if row.asked is not None else text
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
    if row.kind == "client":
        who = "client returned a result" if row.asked is None else "user answered"
        return f"Cancelled: interrupted before the {who}"
    if _may_have_run(row):
        return OUTCOME_UNKNOWN
    return _NOT_RUN if row.status == "requested" else _STOPPED


def _may_have_run(row: CallRow) -> bool:
    return row.kind == "server" and row.status == "running" and row.side_effect is SideEffect.AT_MOST_ONCE
