"""Answers to what a tool asks a person in the middle of a call, as MCP servers do. The call goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from db import client_calls, tool_ledger
from db.client_calls import WAITING
from db.event_log import SessionTransaction
from db.tool_ledger import CallRow
from db.turn_rows import StateRow
from domain.errors import InvalidInput, NotWaitingForAnswers

ELICITATION: Final = "elicitation"
FIELD: Final = "tool_call_id"


class AnsweredCall(Struct, frozen=True, kw_only=True):
    """`wake_ids` are what the turn is to be told, if `ends_wait`. `waits`: the session goes on waiting."""

    call_id: str
    wake_ids: list[str]
    ends_wait: bool
    waits: bool


async def take_answer(
    work: SessionTransaction,
    state: StateRow,
    tool_call_id: str | None,
    answer: dict[str, object],
    check: Callable[[Mapping[str, object]], None],
) -> AnsweredCall:
    """`check` is given what was asked, and raises for an answer that does not fit. The same answer once more is harmless.

    Raises `InvalidInput`, `NotWaitingForAnswers`.
    """
    row = await _call(work, state, tool_call_id)
    if row.status != "waiting":
        if row.wait_answer == answer:
            # Perhaps its sender never heard of it, and the turn neither.
            return AnsweredCall(
                call_id=row.call.id,
                wake_ids=[row.wake_id],
                ends_wait=state.status == "active",
                waits=state.status == WAITING,
            )
        raise NotWaitingForAnswers("The call is not waiting for an answer any more")
    if state.status != WAITING:
        raise NotWaitingForAnswers
    check(row.wait_request)
    await tool_ledger.answer_call(work, row, answer)
    settled = await client_calls.end_wait(work, row)
    return AnsweredCall(
        call_id=row.call.id, wake_ids=settled.call_ids, ends_wait=settled.ends_wait, waits=not settled.ends_wait
    )


async def _call(work: SessionTransaction, state: StateRow, tool_call_id: str | None) -> CallRow:
    if tool_call_id is not None:
        row = await tool_ledger.read_call(work, tool_call_id)
        if row is None or row.wait_kind != ELICITATION:
            raise InvalidInput(f"{FIELD}: `{tool_call_id[:80]}` asks nothing in this session", field=FIELD)
        return row
    waiting = [
        row
        for row in await tool_ledger.read_open_calls(work)
        if row.status == "waiting" and row.wait_kind == ELICITATION
    ]
    if not waiting or state.status != WAITING:
        raise NotWaitingForAnswers
    if len(waiting) > 1:
        names = ", ".join(row.call.id for row in waiting)
        raise InvalidInput(f"{FIELD} is required: several calls wait for answers ({names})", field=FIELD)
    return waiting[0]
