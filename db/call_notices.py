"""What capabilities have noted about calls, as events: findings of guardrails, and repairs of arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from db.turn_rows import TurnRow, step_context
from domain.capabilities import GuardrailHit
from domain.events import GuardrailTriggered, NewEvent, ToolCallRepaired
from domain.turns import PlannedCall, StepRef


def planned_notices(ref: StepRef, turn: TurnRow, planned: Sequence[PlannedCall], message_id: str) -> Iterator[NewEvent]:
    """For the calls of one answer, under the ids they have in the log."""
    context = step_context(turn, ref.exec_id)
    for item in planned:
        for payload in _triggered(turn, item.hits, item.call.id, message_id):
            key = f"guardrail.triggered:{item.call.id}:{payload.stage}:{payload.capability_id}:{payload.check_id}"
            yield NewEvent(data=payload, context=context, dedupe_key=key)
        if item.repair is not None:
            repaired = ToolCallRepaired(
                turn_id=turn.public_id,
                tool_call_id=item.call.id,
                tool_name=item.call.name,
                outcome=item.repair,
            )
            yield NewEvent(data=repaired, context=context, dedupe_key=f"tool.call_repaired:{item.call.id}")


def result_notices(turn: TurnRow, hits: Sequence[GuardrailHit], call_id: str, exec_id: str) -> list[NewEvent]:
    """For the result of a call."""
    return [
        NewEvent(
            data=payload,
            context=step_context(turn, exec_id),
            dedupe_key=f"guardrail.triggered:{call_id}:{payload.stage}:{payload.capability_id}:{payload.check_id}",
        )
        for payload in _triggered(turn, hits, call_id, None)
    ]


def _triggered(
    turn: TurnRow, hits: Sequence[GuardrailHit], call_id: str, message_id: str | None
) -> Iterator[GuardrailTriggered]:
    for hit in hits:
        yield GuardrailTriggered(
            turn_id=turn.public_id,
            capability_id=hit.capability_id,
            check_id=hit.check_id,
            stage=hit.stage,
            action=hit.action,
            reason_code=hit.reason_code,
            message_id=message_id,
            tool_call_id=call_id,
        )
