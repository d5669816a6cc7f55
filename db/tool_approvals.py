"""Decisions about tool calls that wait for leave, and the rules that lasting decisions leave behind.

A rejected call is settled at once. An allowed one becomes runnable again; it runs when the turn is woken, which happens when
nothing is left for a person to decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from db import client_calls, tool_ledger
from db.event_log import SessionTransaction
from db.tool_ledger import APPROVAL, CallRow
from db.turn_rows import StateRow, TurnRow, read_turn, turn_context
from domain.approvals import ApprovalDecision, ApprovalRule, Decision, PendingApproval, ResolvedApproval
from domain.clock import timestamp
from domain.errors import InvalidInput, NotWaitingForApprovals
from domain.events import NewEvent, ToolApprovalResolved
from domain.turns import ToolSettlement

REJECTED: Final = "The user rejected this call. It was not executed. Do not repeat it; find another way or ask."

_SET_RULE: Final = """INSERT INTO tool_approval_rules (session_id, tool_name, decision) VALUES ($1, $2, $3)
    ON CONFLICT (session_id, tool_name) DO UPDATE SET decision = excluded.decision, created_at = clock_timestamp()"""
_RULES: Final = """SELECT tool_name, decision, created_at FROM tool_approval_rules WHERE session_id = $1
    ORDER BY tool_name"""
_MADE: Final = (
    "SELECT data->>'decision' FROM events WHERE session_id = $1 AND dedupe_key = 'tool.approval_resolved:' || $2"
)
_DROP_RULE: Final = "DELETE FROM tool_approval_rules WHERE session_id = $1 AND tool_name = $2"


class DecidedCalls(Struct, frozen=True, kw_only=True):
    """`wake_ids` are what the turn is to be told, if `ends_wait`. `waits`: the session goes on waiting."""

    resolved: list[ResolvedApproval]
    wake_ids: list[str]
    ends_wait: bool
    waits: bool


async def take_decisions(
    work: SessionTransaction, state: StateRow, decisions: Sequence[ApprovalDecision]
) -> DecidedCalls:
    """All or none of them. The same decision once more is harmless; a lasting one also decides the other waiting calls of its
    tool.

    Raises `InvalidInput`, `NotWaitingForApprovals`.
    """
    found = [await _approval_call(work, place, one) for place, one in enumerate(decisions)]
    rows = [row for row, _ in found]
    made = {row.call.id: before for row, before in found if before is not None}
    waiting = [(row, one) for row, one in zip(rows, decisions, strict=True) if row.call.id not in made]
    turn = await read_turn(work, state.turn_id) if state.turn_id is not None else None
    if waiting and (turn is None or state.status != client_calls.WAITING):
        raise NotWaitingForApprovals
    decided = {row.call.id for row in rows}
    for row in await tool_ledger.read_open_calls(work):
        lasting = next((one for other, one in waiting if other.call.name == row.call.name and one.decision.lasts), None)
        if lasting is not None and row.wait_kind == APPROVAL and row.status == "waiting" and row.call.id not in decided:
            waiting.append((row, lasting))
            rows.append(row)
    ends_wait = False
    for row, one in waiting:
        assert turn is not None
        ends_wait = (await _decide(work, turn, row, one)).ends_wait
    outcomes = made | {row.call.id: one.decision for row, one in waiting}
    return DecidedCalls(
        resolved=[_resolved(row, outcomes[row.call.id]) for row in rows],
        wake_ids=[row.wake_id for row in rows],
        # Sent again to a turn that has gone on: perhaps its workflow never heard of it.
        ends_wait=ends_wait or (not waiting and state.status == "active"),
        waits=not ends_wait and state.status == client_calls.WAITING,
    )


async def pending_approvals(work: SessionTransaction) -> list[PendingApproval]:
    rows = await tool_ledger.read_open_calls(work)
    return [
        PendingApproval(tool_call=row.call, reason=str(row.wait_request.get("reason", "")))
        for row in rows
        if row.status == "waiting" and row.wait_kind == APPROVAL
    ]


async def read_rules(work: SessionTransaction) -> list[ApprovalRule]:
    return [
        ApprovalRule(tool=row["tool_name"], decision=Decision(row["decision"]), created_at=timestamp(row["created_at"]))
        for row in await work.connection.fetch(_RULES, work.key)
    ]


async def drop_rule(work: SessionTransaction, tool: str) -> bool:
    """Whether there was one."""
    return await work.connection.execute(_DROP_RULE, work.key, tool) != "DELETE 0"


async def _approval_call(
    work: SessionTransaction, place: int, one: ApprovalDecision
) -> tuple[CallRow, Decision | None]:
    """The call, and what was decided about it before; without that it waits for a decision."""
    row = await tool_ledger.read_call(work, one.tool_call_id)
    field = f"decisions[{place}].tool_call_id"
    before = None if row is None else await _decision_of(work, row)
    if row is None or (before is None and row.wait_kind != APPROVAL):
        raise InvalidInput(f"{field}: `{one.tool_call_id[:80]}` needs no approval in this session", field=field)
    if before is None and row.status != "waiting":
        raise NotWaitingForApprovals("The call is not waiting for a decision any more")
    if before is not None and before.allows != one.decision.allows:
        raise NotWaitingForApprovals("The call was decided already")
    return row, before


async def _decide(
    work: SessionTransaction, turn: TurnRow, row: CallRow, one: ApprovalDecision
) -> client_calls.SettledCalls:
    decision = one.decision
    if decision.lasts:
        await work.connection.execute(_SET_RULE, work.key, row.call.name, decision.value)
    await tool_ledger.answer_call(work, row, {"decision": decision.value})
    await work.append(
        NewEvent(
            data=ToolApprovalResolved(
                tool_call_id=row.call.id,
                tool_name=row.call.name,
                decision=decision.value,
                outcome=_outcome(decision),
                reason=one.reason,
            ),
            context=turn_context(turn),
            dedupe_key=f"tool.approval_resolved:{row.call.id}",
        )
    )
    if not decision.allows:
        text = f"{REJECTED} The user's reason: {one.reason}" if one.reason else REJECTED
        await tool_ledger.settle_call(work, turn, row, ToolSettlement(status="error", error=text))
        await tool_ledger.close_batch(work, turn, row.iteration)
    return await client_calls.end_wait(work, row)


async def _decision_of(work: SessionTransaction, row: CallRow) -> Decision | None:
    if row.wait_kind != APPROVAL:  # Its tool may have asked something since.
        value = await work.connection.fetchval(_MADE, work.key, row.call.id)
    else:
        value = (row.wait_answer or {}).get("decision")
    return Decision(value) if isinstance(value, str) else None


def _outcome(decision: Decision) -> Literal["allowed", "rejected"]:
    return "allowed" if decision.allows else "rejected"


def _resolved(row: CallRow, decision: Decision) -> ResolvedApproval:
    return ResolvedApproval(tool_call_id=row.call.id, tool=row.call.name, outcome=_outcome(decision))
