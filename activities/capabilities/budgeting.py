"""Lets a model see what it may still spend. The budgets hold with or without it: it only knows of them through this."""

from __future__ import annotations

from typing import Final

from domain.budgets import Budget, check_of
from domain.capabilities import Capability, NoArguments, Tool, ToolContext
from domain.tools import SideEffect

PROMPT: Final = """\
Your work may be limited by budgets, which every answer and tool call of yours draws on. Before you begin something long, call \
`check_budget` once, and plan with what is left: prefer a whole result within the budget to a better one that breaks off. When \
it says `warn`, come to an end soon and say what is still to be done."""


async def check_budget(context: ToolContext, _arguments: NoArguments) -> dict[str, object]:
    budgets = await context.budgets()
    check = check_of(budgets)
    shown: dict[str, object] = {"action": check.action.value, "budgets": [_standing(budget) for budget in budgets]}
    if check.message is not None:
        shown["message"] = check.message
    elif not budgets:
        shown["message"] = "No budget limits this session."
    return shown


def _standing(budget: Budget) -> dict[str, object]:
    standing: dict[str, object] = {
        "for": budget.subject_type.value,
        "currency": budget.currency,
        "limit": float(budget.limit),
        "spent": float(budget.spent),
        "left": float(budget.balance),
    }
    if budget.soft_limit is not None:
        standing["pauses_after"] = float(budget.soft_limit)
    return standing


CAPABILITY = Capability(
    id="budgeting",
    name="Budgeting",
    description="Tells the model what is left of the budgets that limit its session.",
    category="Core",
    icon="wallet",
    system_prompt=PROMPT,
    tools=(
        Tool(
            name="check_budget",
            display_name="Check budget",
            description="See what is left of the budgets this session spends from.",
            run=check_budget,
            side_effect=SideEffect.PURE,
            timeout_seconds=10.0,
            readonly=True,
        ),
    ),
)
