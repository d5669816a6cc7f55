"""Budgets as clients read and change them; `budget_gate` is where turns meet them.

A change locks the budget's row alone. Sessions it sets free are released afterwards, each in a transaction of its own, because
a session is locked before its budgets everywhere; what a crash leaves in between, the reconciler releases.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET, Struct, UnsetType

from db import budget_rows
from db.budget_gate import release, release_sessions
from db.database import Database
from db.event_log import EventLog
from db.sessions import require_session
from domain import budgets as rules
from domain.budgets import Action, Budget, BudgetStatus, Period, SubjectType
from domain.clock import timestamp
from domain.errors import Conflict, NotFound, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, DEFAULT_ORG_PUBLIC_ID, Prefix, format_id, parse_id, uuid7
from domain.limits import check_id

MAX_BUDGETS_PER_ORG: Final = 10_000
MAX_BUDGETS_PER_SUBJECT: Final = 20
"""A model call locks and writes every budget it is charged to."""
MAX_LISTED: Final = 1_000

_STORED: Final = f"{budget_rows.COLUMNS}, b.metadata, b.created_at, b.updated_at"
_INSERT: Final = """
INSERT INTO budgets (id, org_id, subject_type, subject_id, subject_key, currency, limit_amount, soft_limit, period,
    period_started_at, metadata) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
"""
_GET: Final = f"SELECT {_STORED} FROM budgets b WHERE b.org_id = $1 AND b.id = $2"  # noqa: S608
_LIST: Final = f"""SELECT {_STORED} FROM budgets b WHERE b.org_id = $1 AND b.status <> 'disabled'
    AND ($2::text IS NULL OR b.subject_type = $2) AND ($3::text IS NULL OR b.subject_id = $3)
    ORDER BY b.id LIMIT {MAX_LISTED}"""  # noqa: S608
_OF_SESSION: Final = f"SELECT {_STORED} FROM budgets b WHERE b.org_id = $1 AND b.id = ANY($2::uuid[])"  # noqa: S608
_COUNT: Final = """SELECT count(*) AS of_org, count(*) FILTER (WHERE subject_type = $2 AND subject_key = $3) AS of_subject
    FROM budgets WHERE org_id = $1 AND status <> 'disabled'"""
_SET_METADATA: Final = "UPDATE budgets SET metadata = $2 WHERE id = $1"
_LEDGER: Final = """SELECT id, amount, meter_source, ref_type, ref_id, session_id, description, created_at FROM budget_ledger
    WHERE budget_id = $1 ORDER BY id DESC LIMIT $2 OFFSET $3"""

_SUBJECTS: Final = {
    SubjectType.SESSION: "SELECT id FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL",
    SubjectType.AGENT: "SELECT id FROM agents WHERE org_id = $1 AND public_id = $2 AND status <> 'deleted'",
    SubjectType.HARNESS: "SELECT id FROM harnesses WHERE org_id = $1 AND id = $2 AND status <> 'deleted'",
    SubjectType.USER: "SELECT subject_id FROM principals WHERE org_id = $1 AND subject_id = $2 AND kind = 'user'",
    SubjectType.ORG: "SELECT $2::uuid FROM organizations WHERE id = $1 AND public_id = $3",
}
_PREFIXES: Final = {
    SubjectType.SESSION: Prefix.SESSION,
    SubjectType.AGENT: Prefix.AGENT,
    SubjectType.HARNESS: Prefix.HARNESS,
    SubjectType.USER: Prefix.USER,
    SubjectType.ORG: Prefix.ORG,
}


class NewBudget(Struct, frozen=True, kw_only=True):
    subject_type: SubjectType
    subject_id: str
    currency: str
    limit: Decimal
    soft_limit: Decimal | None = None
    period: Period | None = None
    metadata: dict[str, object] | None = None


class BudgetChanges(Struct, frozen=True, kw_only=True):
    """None clears a soft limit or metadata."""

    limit: Decimal | UnsetType = UNSET
    soft_limit: Decimal | UnsetType | None = UNSET
    status: BudgetStatus | UnsetType = UNSET
    metadata: dict[str, object] | UnsetType | None = UNSET


class StoredBudget(Struct, frozen=True, kw_only=True):
    budget: Budget
    organization_id: str
    metadata: dict[str, object] | None
    created_at: str
    updated_at: str


class Changed(Struct, frozen=True, kw_only=True):
    """`woken` are sessions that the change lets go on; the caller has their turns started."""

    stored: StoredBudget
    woken: list[str]


class Resumed(Struct, frozen=True, kw_only=True):
    budgets: int
    woken: list[str]


class LedgerEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`amount` is positive for what was spent, negative for what was added."""

    id: str
    budget_id: str
    amount: float
    meter_source: str
    created_at: str
    ref_type: str | None = None
    ref_id: str | None = None
    session_id: str | None = None
    description: str | None = None


async def create_budget(database: Database, new: NewBudget) -> StoredBudget:
    """Raises `MalformedId`, `NotFound` or `ResourceLimit`."""
    now = datetime.now(UTC)
    async with database.transaction() as connection:
        subject = await _subject(connection, new.subject_type, new.subject_id)
        counts = await connection.fetchrow(_COUNT, DEFAULT_ORG_ID, new.subject_type.value, subject)
        assert counts is not None
        if counts["of_org"] >= MAX_BUDGETS_PER_ORG:
            raise ResourceLimit(f"An organization may have {MAX_BUDGETS_PER_ORG} budgets; delete some first")
        if counts["of_subject"] >= MAX_BUDGETS_PER_SUBJECT:
            raise ResourceLimit(f"A subject may have {MAX_BUDGETS_PER_SUBJECT} budgets; delete some first")
        key = uuid7()
        await connection.execute(
            _INSERT,
            key,
            DEFAULT_ORG_ID,
            new.subject_type.value,
            new.subject_id,
            subject,
            new.currency,
            new.limit,
            new.soft_limit,
            None if new.period is None else msgspec.json.encode(new.period).decode(),
            rules.first_period(new.period, now),
            _json(new.metadata),
        )
        return await _get(connection, key)


async def _subject(connection: asyncpg.Connection, kind: SubjectType, public_id: str) -> UUID:
    """The row a budget is about. Raises `MalformedId` or `NotFound`."""
    # An agent's id may have been chosen by a client, but it has this form all the same.
    check_id(_PREFIXES[kind], public_id, "subject_id")
    key = parse_id(_PREFIXES[kind], public_id)
    arguments: list[object] = [DEFAULT_ORG_ID, public_id if kind is SubjectType.AGENT else key]
    if kind is SubjectType.ORG:
        arguments.append(public_id)
    found: UUID | None = await connection.fetchval(_SUBJECTS[kind], *arguments)
    if found is None:
        raise NotFound(f"There is no such {'organization' if kind is SubjectType.ORG else kind}", field="subject_id")
    return found


async def get_budget(database: Database, budget_id: str) -> StoredBudget:
    key = parse_id(Prefix.BUDGET, budget_id)
    async with database.transaction() as connection:
        return await _get(connection, key)


async def _get(connection: asyncpg.Connection, key: UUID, *, lock: bool = False) -> StoredBudget:
    row = await connection.fetchrow(f"{_GET} FOR NO KEY UPDATE" if lock else _GET, DEFAULT_ORG_ID, key)
    if row is None:
        raise NotFound(f"There is no budget `{format_id(Prefix.BUDGET, key)}`")
    return _stored(row)


def _stored(row: asyncpg.Record) -> StoredBudget:
    return StoredBudget(
        budget=budget_rows.budget_of(row, datetime.now(UTC)),
        organization_id=DEFAULT_ORG_PUBLIC_ID,
        metadata=None if row["metadata"] is None else msgspec.json.decode(row["metadata"]),
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
    )


def _json(value: dict[str, object] | None) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


async def list_budgets(database: Database, kind: SubjectType | None, subject_id: str | None) -> list[StoredBudget]:
    """In the order they were made; not those that are disabled."""
    rows = await database.pool.fetch(_LIST, DEFAULT_ORG_ID, kind and kind.value, subject_id)
    return [_stored(row) for row in rows]


async def update_budget(database: Database, log: EventLog, budget_id: str, changes: BudgetChanges) -> Changed:
    """Raises `NotFound`, `InvalidInput` or `Conflict`."""
    key = parse_id(Prefix.BUDGET, budget_id)
    async with database.transaction() as connection:
        budget = (await _get(connection, key, lock=True)).budget
        limit = budget.limit if isinstance(changes.limit, UnsetType) else changes.limit
        soft_limit = budget.soft_limit if isinstance(changes.soft_limit, UnsetType) else changes.soft_limit
        if (limit, soft_limit) != (budget.limit, budget.soft_limit):
            budget = rules.with_limits(budget, limit, soft_limit)
        if not isinstance(changes.status, UnsetType):
            budget = rules.with_status(budget, changes.status)
        await budget_rows.write(connection, budget)
        if not isinstance(changes.metadata, UnsetType):
            await connection.execute(_SET_METADATA, key, _json(changes.metadata))
        stored = await _get(connection, key)
    return Changed(stored=stored, woken=await _released(log, budget, key))


async def top_up(
    database: Database, log: EventLog, budget_id: str, amount: Decimal, description: str | None
) -> Changed:
    """Raises `NotFound`, `InvalidInput`, and `Conflict` for a budget that is disabled."""
    key = parse_id(Prefix.BUDGET, budget_id)
    async with database.transaction() as connection:
        budget = (await _get(connection, key, lock=True)).budget
        if budget.status is BudgetStatus.DISABLED:
            raise Conflict("The budget is disabled")
        budget = rules.topped_up(budget, amount, datetime.now(UTC))
        await budget_rows.enter(connection, budget, -amount, rules.TOP_UP, description=description)
        await budget_rows.write(connection, budget)
        stored = await _get(connection, key)
    return Changed(stored=stored, woken=await _released(log, budget, key))


async def disable_budget(database: Database, log: EventLog, budget_id: str) -> list[str]:
    """The sessions to wake."""
    changed = await update_budget(database, log, budget_id, BudgetChanges(status=BudgetStatus.DISABLED))
    return changed.woken


async def _released(log: EventLog, budget: Budget, key: UUID) -> list[str]:
    return [] if budget.action is Action.PAUSE else await release_sessions(log, key)


async def read_ledger(database: Database, budget_id: str, *, limit: int, offset: int) -> list[LedgerEntry]:
    """Newest first."""
    stored = await get_budget(database, budget_id)
    rows = await database.pool.fetch(_LEDGER, budget_rows.key_of(stored.budget), limit, offset)
    return [
        LedgerEntry(
            id=format_id(Prefix.LEDGER_ENTRY, row["id"]),
            budget_id=budget_id,
            amount=float(row["amount"]),
            meter_source=row["meter_source"],
            created_at=timestamp(row["created_at"]),
            ref_type=row["ref_type"],
            ref_id=row["ref_id"],
            session_id=None if row["session_id"] is None else format_id(Prefix.SESSION, row["session_id"]),
            description=row["description"],
        )
        for row in rows
    ]


async def session_budgets(database: Database, session_id: str) -> list[StoredBudget]:
    """Those a session is charged to, its own first. Raises `NotFound`."""
    key = await require_session(database, session_id)
    async with database.transaction() as connection:
        keys = [budget_rows.key_of(budget) for budget in await budget_rows.applying(connection, key)]
        rows = {row["id"]: _stored(row) for row in await connection.fetch(_OF_SESSION, DEFAULT_ORG_ID, keys)}
    return [rows[one] for one in keys if one in rows]


async def is_paused(database: Database, session_id: str) -> bool:
    """Whether a budget holds the session up; clients are shown an idle one."""
    query = "SELECT status = 'paused' FROM session_state WHERE session_id = $1"
    return bool(await database.pool.fetchval(query, parse_id(Prefix.SESSION, session_id)))


async def resume_session(database: Database, log: EventLog, session_id: str) -> Resumed:
    """Let every budget that pauses the session go on to its hard limit, for all sessions it pauses. Raises `NotFound`."""
    key = await require_session(database, session_id)
    freed: list[Budget] = []
    async with database.transaction() as connection:
        for budget in await budget_rows.lock(connection, await budget_rows.applying(connection, key)):
            if budget.action is Action.PAUSE:
                freed.append(rules.resumed(budget))
                await budget_rows.write(connection, freed[-1])
    woken = [session for budget in freed for session in await release_sessions(log, budget_rows.key_of(budget))]
    # Paused by a budget that does not pause any longer: of that its row knows nothing any more.
    own = await release(log, session_id)
    return Resumed(budgets=len(freed), woken=woken if own is None else [*woken, own])
