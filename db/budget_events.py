"""The events of budgets. No database here."""

from __future__ import annotations

from typing import TypeVar

from db.turn_rows import TurnRow, step_context, turn_context
from domain.budgets import Budget, message_of
from domain.events import BudgetExhausted, BudgetPaused, BudgetResumed, BudgetWarning, EventContext, NewEvent

BudgetEvent = TypeVar("BudgetEvent", BudgetWarning, BudgetPaused, BudgetExhausted, BudgetResumed)


def _payload(kind: type[BudgetEvent], budget: Budget, message: str) -> BudgetEvent:
    return kind(
        budget_id=budget.id,
        currency=budget.currency,
        limit=float(budget.limit),
        balance=float(budget.balance),
        soft_limit=None if budget.soft_limit is None else float(budget.soft_limit),
        message=message,
    )


def warning_event(turn: TurnRow, exec_id: str, budget: Budget) -> NewEvent:
    data = _payload(BudgetWarning, budget, message_of(budget))
    key = f"budget.warning:{budget.id}:{exec_id}"
    return NewEvent(data=data, context=step_context(turn, exec_id), dedupe_key=key)


def exhausted_event(turn: TurnRow, budget: Budget) -> NewEvent:
    """Once in a turn: by the call that used the budget up, or by the step that was not made because of it."""
    data = _payload(BudgetExhausted, budget, message_of(budget))
    key = f"budget.exhausted:{budget.id}:{turn.id.hex}"
    return NewEvent(data=data, context=turn_context(turn), dedupe_key=key)


def paused_event(turn: TurnRow | None, budget: Budget) -> NewEvent:
    context = EventContext() if turn is None else turn_context(turn)
    return NewEvent(data=_payload(BudgetPaused, budget, message_of(budget)), context=context)


def resumed_event(budget: Budget) -> NewEvent:
    return NewEvent(data=_payload(BudgetResumed, budget, "The session goes on."))
