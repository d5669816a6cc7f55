"""`/v1/budgets`, and what a session's budgets say about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import Limit, Offset, capped
from api.problems import declared
from api.requests import present
from api.services import Services
from db import budgets
from db.budgets import BudgetChanges, LedgerEntry, NewBudget, StoredBudget
from domain import budgets as rules
from domain.budgets import BudgetCheck, BudgetStatus, Period
from domain.clock import timestamp
from domain.limits import DESCRIPTION_MAX_BYTES, check_text

METADATA_MAX_BYTES: Final = 16 * 1024
DEFAULT_LEDGER_LIMIT: Final = 50


class CreateBudget(Struct, frozen=True, kw_only=True):
    """`subject_type` is session, agent, harness, user or org. `usd`, `tokens` and `credits` are charged with what models use."""

    subject_type: str
    subject_id: str
    currency: str
    limit: float
    soft_limit: float | None = None
    period: Period | None = None
    metadata: dict[str, object] | None = None


class UpdateBudget(Struct, frozen=True, kw_only=True):
    """Absent fields stay as they are; null clears `soft_limit` and `metadata`."""

    limit: float | UnsetType | None = UNSET
    soft_limit: float | UnsetType | None = UNSET
    status: BudgetStatus | UnsetType | None = UNSET
    metadata: dict[str, object] | UnsetType | None = UNSET


class TopUp(Struct, frozen=True, kw_only=True):
    amount: float
    description: str | None = None


class ResumeSession(Struct, frozen=True, kw_only=True):
    """Takes nothing."""


class BudgetView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`balance` is what is left of `limit` in the running period; it is negative after an overshoot."""

    id: str
    organization_id: str
    subject_type: Literal["session", "agent", "harness", "user", "org"]
    subject_id: str
    currency: str
    limit: float
    balance: float
    status: BudgetStatus
    created_at: str
    updated_at: str
    soft_limit: float | None = None
    period: Period | None = None
    period_started_at: str | None = None
    metadata: dict[str, object] | None = None


class SessionResumed(Struct, frozen=True, kw_only=True):
    """`resumed_budgets` counts the budgets that paused the session and do so no longer."""

    session_id: str
    resumed_budgets: int


def budget_view(stored: StoredBudget) -> BudgetView:
    budget = stored.budget
    return BudgetView(
        id=budget.id,
        organization_id=stored.organization_id,
        subject_type=budget.subject_type.value,
        subject_id=budget.subject_id,
        currency=budget.currency,
        limit=float(budget.limit),
        soft_limit=None if budget.soft_limit is None else float(budget.soft_limit),
        balance=float(budget.balance),
        status=budget.status,
        period=budget.period,
        period_started_at=None if budget.period_started_at is None else timestamp(budget.period_started_at),
        metadata=stored.metadata,
        created_at=stored.created_at,
        updated_at=stored.updated_at,
    )


def _check_metadata(metadata: dict[str, object] | UnsetType | None) -> None:
    if isinstance(metadata, dict):
        check_text(msgspec.json.encode(metadata).decode(), "metadata", METADATA_MAX_BYTES)


def _wake(services: Services, sessions: Sequence[str]) -> None:
    # They are released: if the engine can't be told right now, the reconciler tells it.
    for session_id in dict.fromkeys(sessions):
        services.background.start(services.turns.wake(session_id), "wake resumed session")


@get("/", operation_id="list_budgets", summary="List budgets", responses=declared())
async def list_budgets(
    services: NamedDependency[Services],
    subject_type: FromQuery[str | None] = None,
    subject_id: FromQuery[str | None] = None,
) -> list[BudgetView]:
    """All that are not disabled, or those of a subject."""
    kind = None if subject_type is None else rules.subject_type(subject_type)
    return [budget_view(stored) for stored in await budgets.list_budgets(services.database, kind, subject_id)]


@post("/", operation_id="create_budget", summary="Create a budget", responses=declared(409, 413))
async def create_budget(services: NamedDependency[Services], data: JSONBody[CreateBudget]) -> BudgetView:
    """It is charged with every model call that is finished from now on."""
    _check_metadata(data.metadata)
    if data.period is not None:
        rules.check_period(data.period)
    new = NewBudget(
        subject_type=rules.subject_type(data.subject_type),
        subject_id=data.subject_id,
        currency=rules.check_currency(data.currency),
        limit=rules.amount(data.limit, "limit"),
        soft_limit=None if data.soft_limit is None else rules.amount(data.soft_limit, "soft_limit", positive=False),
        period=data.period,
        metadata=data.metadata,
    )
    rules.check_limits(new.limit, new.soft_limit)
    return budget_view(await budgets.create_budget(services.database, new))


@get("/{budget_id:str}", operation_id="get_budget", summary="Get a budget", responses=declared())
async def get_budget(services: NamedDependency[Services], budget_id: FromPath[str]) -> BudgetView:
    """With what is left of it now."""
    return budget_view(await budgets.get_budget(services.database, budget_id))


@patch("/{budget_id:str}", operation_id="update_budget", summary="Update a budget", responses=declared(409, 413))
async def update_budget(
    services: NamedDependency[Services], budget_id: FromPath[str], data: JSONBody[UpdateBudget]
) -> BudgetView:
    """A higher limit, or `status` active, lets paused sessions go on. `status` disabled is what DELETE sets."""
    _check_metadata(data.metadata)
    limit, soft_limit = present(data.limit), data.soft_limit
    changes = BudgetChanges(
        limit=UNSET if isinstance(limit, UnsetType) else rules.amount(limit, "limit"),
        soft_limit=rules.amount(soft_limit, "soft_limit", positive=False)
        if isinstance(soft_limit, int | float)
        else soft_limit,
        status=present(data.status),
        metadata=data.metadata,
    )
    changed = await budgets.update_budget(services.database, services.log, budget_id, changes)
    _wake(services, changed.woken)
    return budget_view(changed.stored)


@delete("/{budget_id:str}", operation_id="delete_budget", summary="Delete a budget", responses=declared())
async def delete_budget(services: NamedDependency[Services], budget_id: FromPath[str]) -> None:
    """It is disabled: charged no longer, listed no longer, and holds nobody up. Its ledger stays."""
    _wake(services, await budgets.disable_budget(services.database, services.log, budget_id))


@post(
    "/{budget_id:str}/top-up",
    operation_id="top_up_budget",
    summary="Top up a budget",
    status_code=200,
    responses=declared(409, 413),
)
async def top_up_budget(
    services: NamedDependency[Services], budget_id: FromPath[str], data: JSONBody[TopUp]
) -> BudgetView:
    """Adds to the balance of the running period. Sessions that were paused by this budget go on."""
    amount = rules.amount(data.amount, "amount")
    if data.description is not None:
        check_text(data.description, "description", DESCRIPTION_MAX_BYTES)
    changed = await budgets.top_up(services.database, services.log, budget_id, amount, data.description)
    _wake(services, changed.woken)
    return budget_view(changed.stored)


@get("/{budget_id:str}/ledger", operation_id="list_budget_ledger", summary="Read a ledger", responses=declared())
async def list_budget_ledger(
    services: NamedDependency[Services],
    budget_id: FromPath[str],
    offset: Offset = 0,
    limit: Limit = DEFAULT_LEDGER_LIMIT,
) -> list[LedgerEntry]:
    """What was spent and added, newest first. Entries never change."""
    return await budgets.read_ledger(services.database, budget_id, limit=capped(limit), offset=offset)


@get("/{budget_id:str}/check", operation_id="check_budget", summary="Check a budget", responses=declared())
async def check_budget(services: NamedDependency[Services], budget_id: FromPath[str]) -> BudgetCheck:
    """What this budget demands of whoever it is charged for."""
    stored = await budgets.get_budget(services.database, budget_id)
    return rules.check_of([stored.budget])


@get("/budgets", operation_id="list_session_budgets", summary="List a session's budgets", responses=declared())
async def list_session_budgets(services: NamedDependency[Services], session_id: FromPath[str]) -> list[BudgetView]:
    """Every budget the session is charged to: its own, then those of its parents, agent, harness, user and organization."""
    return [budget_view(stored) for stored in await budgets.session_budgets(services.database, session_id)]


@get("/budget-check", operation_id="check_session_budgets", summary="Check a session's budgets", responses=declared())
async def check_session_budgets(services: NamedDependency[Services], session_id: FromPath[str]) -> BudgetCheck:
    """The most restrictive demand of all its budgets."""
    stored = await budgets.session_budgets(services.database, session_id)
    return rules.check_of([one.budget for one in stored])


@post(
    "/resume",
    operation_id="resume_session",
    summary="Resume a paused session",
    status_code=200,
    responses=declared(413),
)
async def resume_session(
    services: NamedDependency[Services],
    session_id: FromPath[str],
    data: JSONBody[ResumeSession | None] = None,
) -> SessionResumed:
    """Lets the budgets that pause the session go on to their hard limits; a paused turn continues where it was."""
    resumed = await budgets.resume_session(services.database, services.log, session_id)
    _wake(services, resumed.woken)
    return SessionResumed(session_id=session_id, resumed_budgets=resumed.budgets)


router = Router(
    path="/budgets",
    tags=["Budgets"],
    route_handlers=[
        list_budgets,
        create_budget,
        get_budget,
        update_budget,
        delete_budget,
        top_up_budget,
        list_budget_ledger,
        check_budget,
    ],
)
session_router = Router(
    path="/sessions/{session_id:str}",
    tags=["Budgets"],
    route_handlers=[list_session_budgets, check_session_budgets, resume_session],
)
