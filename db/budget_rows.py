"""Rows of budgets and of their ledger, and which budgets a session is charged to.

Lock order: a session's `session_state` first, then budgets by their ids, all in one statement. Whoever needs only budgets locks
only them, and lets go of them before it locks a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

import asyncpg
import msgspec

from domain.budgets import Budget, BudgetStatus, Period, SubjectType, rolled
from domain.ids import Prefix, format_id, parse_id, uuid7

MAX_SESSION_DEPTH: Final = 32
"""Sub-agents are nested a few levels deep; this bounds the walk should there ever be a circle in the data."""

COLUMNS: Final = """b.id, b.subject_type, b.subject_id, b.currency, b.limit_amount, b.soft_limit, b.spent, b.status, b.period,
    b.period_started_at, b.warned, b.soft_limit_waived"""

# A sub-agent's session spends from the budgets of the sessions above it as well, up to the one a person started.
SUBJECTS: Final = f"""
WITH RECURSIVE line AS (
    SELECT s.id, s.parent_session_id, 0 AS depth FROM sessions s WHERE s.id = $1
    UNION ALL
    SELECT p.id, p.parent_session_id, line.depth + 1 FROM sessions p JOIN line ON p.id = line.parent_session_id
    WHERE line.depth < {MAX_SESSION_DEPTH}
), subjects AS (
    SELECT 'session' AS type, id AS key FROM line
    UNION ALL SELECT 'agent', s.agent_id FROM sessions s WHERE s.id = $1
    UNION ALL SELECT 'harness', s.harness_id FROM sessions s WHERE s.id = $1
    UNION ALL SELECT 'user', p.subject_id FROM sessions s JOIN principals p ON p.id = s.owner_principal_id
        WHERE s.id = $1 AND p.kind = 'user'
)
"""  # noqa: S608
APPLYING: Final = f"""{SUBJECTS}
SELECT {COLUMNS} FROM budgets b JOIN sessions own ON own.id = $1 AND b.org_id = own.org_id
WHERE b.status <> 'disabled' AND (b.subject_type = 'org'
    OR EXISTS (SELECT FROM subjects WHERE subjects.type = b.subject_type AND subjects.key = b.subject_key))
ORDER BY array_position(ARRAY['session', 'agent', 'harness', 'user', 'org'], b.subject_type), b.id
"""  # noqa: S608
_LOCK: Final = f"""SELECT {COLUMNS} FROM budgets b WHERE b.id = ANY($1::uuid[]) AND b.status <> 'disabled'
    ORDER BY b.id FOR NO KEY UPDATE"""  # noqa: S608
_WRITE: Final = """UPDATE budgets SET limit_amount = $2, soft_limit = $3, spent = $4, status = $5, period_started_at = $6,
    warned = $7, soft_limit_waived = $8, updated_at = clock_timestamp() WHERE id = $1"""
# The session may be gone for good by now, which is no reason not to charge what it has used.
_ENTER: Final = """
INSERT INTO budget_ledger (id, budget_id, org_id, amount, meter_source, ref_type, ref_id, session_id, description)
SELECT $1, b.id, b.org_id, $3, $4, $5, $6, (SELECT s.id FROM sessions s WHERE s.id = $7), $8 FROM budgets b WHERE b.id = $2
ON CONFLICT DO NOTHING
"""


def budget_of(row: asyncpg.Record, now: datetime | None = None) -> Budget:
    """A row of `COLUMNS`; with `now`, rolled over to its period."""
    period = row["period"]
    budget = Budget(
        id=format_id(Prefix.BUDGET, row["id"]),
        subject_type=SubjectType(row["subject_type"]),
        subject_id=row["subject_id"],
        currency=row["currency"],
        limit=row["limit_amount"],
        soft_limit=row["soft_limit"],
        spent=row["spent"],
        status=BudgetStatus(row["status"]),
        period=None if period is None else msgspec.json.decode(period, type=Period),
        period_started_at=row["period_started_at"],
        warned=row["warned"],
        soft_limit_waived=row["soft_limit_waived"],
    )
    return budget if now is None else rolled(budget, now)


async def applying(connection: asyncpg.Connection, session: UUID) -> list[Budget]:
    """The budgets a session is charged to, its own first, in the period of this moment."""
    now = datetime.now(UTC)
    return [budget_of(row, now) for row in await connection.fetch(APPLYING, session)]


async def lock(connection: asyncpg.Connection, budgets: Sequence[Budget]) -> list[Budget]:
    """These budgets as they are now, for change; not those that were disabled meanwhile."""
    if not budgets:
        return []
    now = datetime.now(UTC)
    keys = [key_of(budget) for budget in budgets]
    return [budget_of(row, now) for row in await connection.fetch(_LOCK, keys)]


async def write(connection: asyncpg.Connection, budget: Budget) -> None:
    await connection.execute(
        _WRITE,
        key_of(budget),
        budget.limit,
        budget.soft_limit,
        budget.spent,
        budget.status.value,
        budget.period_started_at,
        budget.warned,
        budget.soft_limit_waived,
    )


async def enter(
    connection: asyncpg.Connection,
    budget: Budget,
    amount: Decimal,
    meter: str,
    *,
    ref: tuple[str, str] | None = None,
    session: UUID | None = None,
    description: str | None = None,
) -> bool:
    """Write a line of the ledger; `ref` is a kind and an id. Whether it is new: one meter charges an id once."""
    ref_type, ref_id = ref or (None, None)
    status = await connection.execute(
        _ENTER, uuid7(), key_of(budget), amount, meter, ref_type, ref_id, session, description
    )
    return status == "INSERT 0 1"


def key_of(budget: Budget) -> UUID:
    return parse_id(Prefix.BUDGET, budget.id)
