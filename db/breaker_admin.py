"""Circuit breakers as operators see and force them; `db.circuit_breakers` has the engine's own transitions.

A breaker is addressed by the public id of its model. A model without a row has a closed breaker that never counted a failure.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import asyncpg

from db.columns import read_resource
from domain.errors import NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id
from domain.resources import CircuitBreaker

_BREAKERS: Final = """
SELECT m.id, m.model_id AS model, p.name AS provider, coalesce(b.state, 'closed') AS state,
       coalesce(b.failure_count, 0) AS failure_count, coalesce(b.success_count, 0) AS success_count,
       b.opened_at, b.half_open_at, b.last_failure_at, coalesce(b.updated_at, m.updated_at) AS updated_at
FROM models m JOIN providers p ON p.id = m.provider_id LEFT JOIN circuit_breakers b ON b.model_id = m.id
WHERE m.org_id = $1
"""
_LISTED: Final = f"{_BREAKERS} AND b.model_id IS NOT NULL ORDER BY m.id"
_ONE: Final = f"{_BREAKERS} AND m.id = $2"

# Without `half_open_at` no call ever claims a try, so the breaker stays open until somebody closes it.
_FORCE_OPEN: Final = """
INSERT INTO circuit_breakers (model_id, org_id, state, opened_at) VALUES ($1, $2, 'open', clock_timestamp())
ON CONFLICT (model_id) DO UPDATE SET state = 'open', success_count = 0, opened_at = clock_timestamp(), half_open_at = NULL,
    updated_at = clock_timestamp()
"""
_FORCE_CLOSE: Final = """
UPDATE circuit_breakers SET state = 'closed', failure_count = 0, success_count = 0, window_started_at = NULL,
    opened_at = NULL, half_open_at = NULL, updated_at = clock_timestamp()
WHERE model_id = $1 AND org_id = $2
"""
_DELETE: Final = "DELETE FROM circuit_breakers WHERE model_id = $1 AND org_id = $2"


async def list_breakers(pool: asyncpg.Pool) -> list[CircuitBreaker]:
    """Those that have counted something, or were forced."""
    return [_breaker_of(row) for row in await pool.fetch(_LISTED, DEFAULT_ORG_ID)]


async def get_breaker(pool: asyncpg.Pool, key: str) -> CircuitBreaker:
    """Raises `NotFound` for a model that does not exist, as all functions here do."""
    row = await pool.fetchrow(_ONE, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, key))
    if row is None:
        raise NotFound(f"There is no model `{key}`, so it has no circuit breaker")
    return _breaker_of(row)


async def force_open(pool: asyncpg.Pool, key: str) -> CircuitBreaker:
    """Hold it open until it is closed by hand."""
    return await _force(pool, key, _FORCE_OPEN)


async def force_close(pool: asyncpg.Pool, key: str) -> CircuitBreaker:
    return await _force(pool, key, _FORCE_CLOSE)


async def delete_breaker(pool: asyncpg.Pool, key: str) -> CircuitBreaker:
    """Forget what was counted; returns the breaker as it is from now on."""
    return await _force(pool, key, _DELETE)


async def _force(pool: asyncpg.Pool, key: str, statement: str) -> CircuitBreaker:
    await get_breaker(pool, key)
    await pool.execute(statement, parse_id(Prefix.MODEL, key), DEFAULT_ORG_ID)
    return await get_breaker(pool, key)


def _breaker_of(row: asyncpg.Record) -> CircuitBreaker:
    key: UUID = row["id"]
    return read_resource(dict(row), CircuitBreaker, key=format_id(Prefix.MODEL, key))
