"""Results of calls that no worker runs: those of client-side tools, and the user's answers to questions.

The turn waits for all calls of one `tool.call_requested` at once, and the word of any of them wakes it. So the end of the wait is
decided here: a question that is still open keeps the turn waiting, for a person who is reading it must not lose it because a
program was faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from db import tool_ledger
from db.event_log import SessionTransaction
from db.tool_ledger import CallRow
from db.turn_rows import StateRow, TurnRow, read_turn
from domain.errors import InvalidInput, NotWaitingForAnswers, NotWaitingForToolResults
from domain.events import ToolCompleted
from domain.messages import ContentPart, TextPart
from domain.questions import AnswerSubmission, QuestionSet, answer_to
from domain.tools import ClientToolResult
from domain.turns import ToolSettlement

WAITING: Final = "waiting_for_tool_results"

_COMPLETED: Final = "SELECT data FROM events WHERE session_id = $1 AND dedupe_key = 'tool.completed:' || $2"
_ACTIVATE: Final = "UPDATE session_state SET status = 'active' WHERE session_id = $1"

_completed_decoder = msgspec.json.Decoder(ToolCompleted)


class SettledCalls(Struct, frozen=True, kw_only=True):
    """Calls that have a result now. `ends_wait` tells whether the turn is to be woken."""

    call_ids: list[str]
    ends_wait: bool


async def take_results(work: SessionTransaction, state: StateRow, results: Sequence[ClientToolResult]) -> SettledCalls:
    """Raises `InvalidInput`, `NotWaitingForToolResults`."""
    rows = [await tool_ledger.read_call(work, result.tool_call_id) for result in results]
    known = [row for row in rows if row is not None and row.kind == "client"]
    if state.status != WAITING and not await _is_between_waits(work, state, known):
        if known and len(known) == len(results) and all(row.status == "settled" for row in known):
            return SettledCalls(call_ids=[row.call.id for row in known], ends_wait=True)
        raise NotWaitingForToolResults(f"Session is not waiting for tool results (current status: {state.status})")
    if not known:
        raise InvalidInput(
            f"`{results[0].tool_call_id[:80]}` is not an open client-side tool call of this session",
            field="tool_results[0].tool_call_id",
        )
    turn = await _turn(work, state)
    if turn is None:
        raise NotWaitingForToolResults("Session is not waiting for tool results (current status: idle)")
    call_ids = [row.call.id for row in known]
    if all(row.status == "settled" for row in known):
        # Sent again, to a wait that goes on: they are of an earlier one, or a question has kept theirs open.
        return SettledCalls(call_ids=call_ids, ends_wait=False)
    for row, result in zip(rows, results, strict=True):
        if row is not None and row.kind == "client" and row.status != "settled":
            await tool_ledger.settle_call(work, turn, row, _settlement(result))
    if state.status != WAITING:
        return SettledCalls(call_ids=call_ids, ends_wait=False)
    left = await tool_ledger.read_open_calls(work)
    return await _settled(work, call_ids, goes_on=any(row.asked is not None or row.status == "waiting" for row in left))


async def _is_between_waits(work: SessionTransaction, state: StateRow, known: Sequence[CallRow]) -> bool:
    """Whether the turn runs calls that a person has just allowed, and will wait for these calls again when they have ended."""
    if state.status != "active" or not any(row.status != "settled" and row.asked_number > 0 for row in known):
        return False
    left = await tool_ledger.read_open_calls(work)
    return not any(row.status == "waiting" for row in left) and any(
        row.answered or row.status == "running" for row in left
    )


async def take_answers(
    work: SessionTransaction, state: StateRow, answers: AnswerSubmission, tool_call_id: str | None
) -> SettledCalls:
    """Raises `InvalidInput`, `NotWaitingForAnswers`."""
    row, asked = await _question_call(work, state, tool_call_id)
    if row.status == "settled":
        return await _answered_before(work, state, row, asked, answers)
    turn = await _turn(work, state) if state.status == WAITING else None
    if turn is None:
        # Asked for by the model, but the calls before it still run, or the turn has just ended.
        raise NotWaitingForAnswers
    settlement = ToolSettlement(status="success", result=_result(asked, answers))
    await tool_ledger.settle_call(work, turn, row, settlement)
    left = await tool_ledger.read_open_calls(work)
    return await _settled(work, [row.call.id], goes_on=any(row.awaited for row in left))


async def end_wait(work: SessionTransaction, call: CallRow) -> SettledCalls:
    """After `tool_ledger.answer_call` or `settle_call` for a call that waited: whether the turn is to be woken.

    It is when nothing is left that a person has to decide; `call` is the row as it was while it waited.
    """
    left = await tool_ledger.read_open_calls(work)
    return await _settled(
        work, [call.wake_id], goes_on=any(row.asked is not None or row.status == "waiting" for row in left)
    )


async def _question_call(
    work: SessionTransaction, state: StateRow, tool_call_id: str | None
) -> tuple[CallRow, QuestionSet]:
    if tool_call_id is not None:
        row = await tool_ledger.read_call(work, tool_call_id)
        if row is not None and (asked := row.asked) is not None:
            return row, asked
        if state.status != WAITING:
            raise NotWaitingForAnswers
        raise InvalidInput(f"tool_call_id: `{tool_call_id[:80]}` asks no questions here", field="tool_call_id")
    open_calls = [(row, asked) for row in await tool_ledger.read_open_calls(work) if (asked := row.asked) is not None]
    if state.status != WAITING or not open_calls:
        raise NotWaitingForAnswers
    if len(open_calls) > 1:
        waiting = ", ".join(row.call.id for row, _ in open_calls)
        raise InvalidInput(
            f"tool_call_id is required: several calls wait for answers ({waiting})", field="tool_call_id"
        )
    return open_calls[0]


async def _answered_before(
    work: SessionTransaction, state: StateRow, row: CallRow, asked: QuestionSet, answers: AnswerSubmission
) -> SettledCalls:
    data: str | None = await work.connection.fetchval(_COMPLETED, work.key, row.call.id)
    stored = _completed_decoder.decode(data).result if data is not None else None
    if stored is None:
        raise NotWaitingForAnswers("The questions are not waiting for an answer any more")
    if stored != _result(asked, answers):
        raise NotWaitingForAnswers("The questions were answered already")
    # The same answer again: perhaps its sender never heard of it, and the turn neither.
    return SettledCalls(call_ids=[row.call.id], ends_wait=state.status != WAITING)


async def _settled(work: SessionTransaction, call_ids: list[str], *, goes_on: bool) -> SettledCalls:
    if not goes_on:
        # Before the turn is told, as everywhere: the log says what the session does.
        await work.connection.execute(_ACTIVATE, work.key)
    return SettledCalls(call_ids=call_ids, ends_wait=not goes_on)


async def _turn(work: SessionTransaction, state: StateRow) -> TurnRow | None:
    return None if state.turn_id is None else await read_turn(work, state.turn_id)


def _result(asked: QuestionSet, answers: AnswerSubmission) -> list[ContentPart]:
    return [TextPart(text=msgspec.json.encode(answer_to(asked, answers)).decode())]


def _settlement(result: ClientToolResult) -> ToolSettlement:
    if result.error is not None:
        return ToolSettlement(status="error", error=result.error)
    value = result.result
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return ToolSettlement(status="success", result=[TextPart(text=text)])
