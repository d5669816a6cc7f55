"""The end of a turn, whichever it is. Every ending leaves the log legal and the session at rest and usable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from db import inbox, tool_ledger
from db.event_log import SessionTransaction, read_partial_text, read_replacement
from db.turn_events import duration_ms, reason_aborted_event, synthetic_message, turn_event
from db.turn_rows import StateRow, TurnRow, read_turn, turn_context
from domain.clock import now_timestamp
from domain.events import (
    EventPayload,
    InputMessage,
    NewEvent,
    OutputMessageCompleted,
    SessionIdled,
    TokenUsage,
    TurnCancelled,
    TurnFailed,
    TurnSealed,
)
from domain.ids import Prefix, format_id, new_id
from domain.messages import Message, Phase, Role, TextPart
from domain.model import USER_ERROR_CODES
from domain.turns import FinishInput, TurnEnding

CANCEL_NOTE: Final = "User requested to cancel the work."
CANCEL_ANSWER: Final = "Work was cancelled by user."
SEALED_ANSWER: Final = "I stopped because this turn made no progress after several attempts."
SUPERSEDED_REASON: Final = "superseded by a new message"
DETAIL_CHARACTERS: Final = 1_000
LOST_TURN_REASON: Final = "the workflow of this turn ended without closing it"

_END: Final = """
WITH ended AS (
    UPDATE turns SET status = $2, ended_at = clock_timestamp(), open_message_id = NULL, open_exec_id = NULL WHERE id = $1
)
UPDATE session_state SET status = $4, turn_id = NULL, step_exec_id = NULL, step_attempt = 0, active_ms = active_ms + $5,
    finished_at = clock_timestamp() WHERE session_id = $3
"""


async def close_turn(work: SessionTransaction, state: StateRow, turn: TurnRow, input: FinishInput) -> None:
    """End a turn the way its workflow decided."""
    iterations = max(turn.iteration, input.iteration)
    match input.ending:
        case TurnEnding.CANCELLED:
            read = await inbox.take_for_running_turn(work, up_to=input.read_up_to)
            await close_partial_message(work, turn)
            await tool_ledger.settle_open_calls(work, turn, "cancelled")
            payloads: list[EventPayload] = [
                TurnCancelled(
                    turn_id=turn.public_id, reason=input.reason, input_message_ids=read or None, usage=turn.usage
                ),
                InputMessage(message=synthetic_message(Role.USER, CANCEL_NOTE)),
                OutputMessageCompleted(message=synthetic_message(Role.AGENT, CANCEL_ANSWER)),
            ]
        case TurnEnding.SUPERSEDED:
            await close_partial_message(work, turn)
            await tool_ledger.settle_open_calls(work, turn, "superseded")
            payloads = [TurnCancelled(turn_id=turn.public_id, reason=SUPERSEDED_REASON, usage=turn.usage)]
        case TurnEnding.FAILED:
            payloads = [await _close_with_apology(work, turn, input)]
        case TurnEnding.SEALED:
            await close_partial_message(work, turn)
            await tool_ledger.settle_open_calls(work, turn, "interrupted")
            payloads = [
                OutputMessageCompleted(message=synthetic_message(Role.AGENT, SEALED_ANSWER)),
                TurnSealed(
                    turn_id=turn.public_id,
                    reason="no_progress",
                    detail=input.reason,
                    iterations=iterations,
                    usage=turn.usage,
                ),
            ]
    await end_turn(
        work,
        turn,
        input.ending.value,
        [turn_event(turn, payload) for payload in payloads],
        iterations=iterations,
        usage=state.usage,
        more=bool(await inbox.unread(work)),
    )


async def end_turn(
    work: SessionTransaction,
    turn: TurnRow,
    status: str,
    events: Sequence[NewEvent],
    *,
    iterations: int,
    usage: TokenUsage,
    more: bool,
) -> None:
    """Close the turn and rest the session. `usage` is the session's total; with `more`, another turn follows at once."""
    await work.connection.execute(_END, turn.id, status, work.key, "active" if more else "idle", duration_ms(turn))
    idled = SessionIdled(turn_id=turn.public_id, iterations=iterations, usage=usage)
    await work.append(*events, turn_event(turn, idled))


async def close_lost_turn(work: SessionTransaction, state: StateRow, key: UUID) -> None:
    """Close a turn whose workflow is gone: terminated by an operator, for example."""
    turn = await read_turn(work, key)
    if turn is None or turn.status != "running":
        return
    await close_partial_message(work, turn)
    await tool_ledger.settle_open_calls(work, turn, "interrupted")
    lost = TurnCancelled(turn_id=turn.public_id, reason=LOST_TURN_REASON, usage=turn.usage)
    await end_turn(
        work,
        turn,
        "cancelled",
        [turn_event(turn, lost)],
        iterations=turn.iteration,
        usage=state.usage,
        more=bool(await inbox.unread(work)),
    )


async def close_partial_message(work: SessionTransaction, turn: TurnRow) -> None:
    """Keep what was streamed of a message that will never be finished: clients have seen it."""
    if turn.open_message_id is None:
        return
    text = await read_replacement(work.connection, work.session_id, turn.open_message_id)
    if text is None:
        text = await read_partial_text(work.connection, work.session_id, turn.open_message_id)
    message = Message(
        id=turn.open_message_id,
        role=Role.AGENT,
        content=[TextPart(text=text)] if text else [],
        created_at=now_timestamp(),
        phase=Phase.COMMENTARY,
        metadata={"interrupted": True},
    )
    await _close_step(work, turn, OutputMessageCompleted(message=message), error=None)


async def _close_with_apology(work: SessionTransaction, turn: TurnRow, input: FinishInput) -> TurnFailed:
    """The message that was being written becomes the apology, so that no client is left with half a text."""
    source_code = input.error_code or turn.last_error_code or "processing_error"
    level = turn.config.error_disclosure
    code = "processing_error" if level == "generic" else source_code
    text = USER_ERROR_CODES.get(code, USER_ERROR_CODES["processing_error"])
    fields = _error_fields(turn, source_code)
    await tool_ledger.settle_open_calls(work, turn, "interrupted")
    message = Message(
        id=turn.open_message_id or new_id(Prefix.MESSAGE),
        role=Role.AGENT,
        content=[TextPart(text=text)],
        created_at=now_timestamp(),
        phase=Phase.FINAL_ANSWER,
        metadata={
            "error_code": code,
            **({"error_fields": fields} if fields else {}),
            "error_disclosure": level,
            "source_error_code": source_code,
        },
    )
    apology = OutputMessageCompleted(message=message, error_code=code, error_fields=fields, error_disclosure=level)
    await _close_step(work, turn, apology, error=turn.last_error or source_code)
    return TurnFailed(turn_id=turn.public_id, error=text, error_code=code, error_fields=fields, error_disclosure=level)


def _error_fields(turn: TurnRow, source_code: str) -> dict[str, object] | None:
    """What the turn's disclosure level lets clients know besides the code; the provider's words only at `detailed`."""
    level = turn.config.error_disclosure
    if level == "generic" or turn.last_error_code != source_code:
        return None
    fields = dict(turn.last_error_fields)
    if level == "detailed" and turn.last_error:
        fields["detail"] = turn.last_error[:DETAIL_CHARACTERS]
    return fields or None


async def _close_step(
    work: SessionTransaction, turn: TurnRow, output: OutputMessageCompleted, *, error: str | None
) -> None:
    """End the open reason step, if there is one, with this message."""
    key = f"output.message.completed:{output.message.id}"
    events = [NewEvent(data=output, context=turn_context(turn), dedupe_key=key)]
    if turn.open_exec_id is not None:
        events.append(reason_aborted_event(turn, format_id(Prefix.EXEC, turn.open_exec_id), error))
    await work.append(*events)
