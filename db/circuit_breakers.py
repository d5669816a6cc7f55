"""Circuit breakers: one per model, shared by all workers through one row each. These are the engine's transitions.

    closed     calls pass; 5 failures within 60 s open it
    open       no call for 30 s; an operator may hold it open without an end
    half_open  one call at a time may try: 2 successes close it, a failure opens it again

A worker that dies while it tries blocks the next try for 30 s at most.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import asyncpg

FAILURES_TO_OPEN: Final = 5
WINDOW_SECONDS: Final = 60
OPEN_SECONDS: Final = 30
SUCCESSES_TO_CLOSE: Final = 2
HELD_OPEN_WAIT_SECONDS: Final = 30.0
"""How long a call waits before it looks again at a breaker that an operator holds open."""

_NOTE_FAILURE: Final = f"""
INSERT INTO circuit_breakers AS b (model_id, org_id, failure_count, window_started_at, last_failure_at)
VALUES ($1, $2, 1, clock_timestamp(), clock_timestamp())
ON CONFLICT (model_id) DO UPDATE SET
    failure_count = CASE WHEN b.state = 'closed' AND b.window_started_at < clock_timestamp() - interval '{WINDOW_SECONDS} s'
                         THEN 1 ELSE b.failure_count + 1 END,
    window_started_at = CASE WHEN b.state = 'closed' AND b.failure_count > 0
                              AND b.window_started_at >= clock_timestamp() - interval '{WINDOW_SECONDS} s'
                             THEN b.window_started_at ELSE clock_timestamp() END,
    last_failure_at = clock_timestamp(),
    updated_at = clock_timestamp()
"""  # noqa: S608
_OPEN_WHEN_DUE: Final = f"""
UPDATE circuit_breakers SET state = 'open', success_count = 0, opened_at = clock_timestamp(),
    half_open_at = clock_timestamp() + interval '{OPEN_SECONDS} s', updated_at = clock_timestamp()
WHERE model_id = $1 AND (state = 'half_open' OR (state = 'closed' AND failure_count >= {FAILURES_TO_OPEN}))
RETURNING true
"""  # noqa: S608
_CLAIM_TRY: Final = f"""
UPDATE circuit_breakers SET state = 'half_open', success_count = CASE WHEN state = 'open' THEN 0 ELSE success_count END,
    half_open_at = clock_timestamp() + interval '{OPEN_SECONDS} s', updated_at = clock_timestamp()
WHERE model_id = $1 AND state <> 'closed' AND half_open_at <= clock_timestamp()
RETURNING true
"""  # noqa: S608
_NOTE_SUCCESS: Final = f"""
UPDATE circuit_breakers SET success_count = success_count + 1, updated_at = clock_timestamp(),
    state = CASE WHEN success_count + 1 >= {SUCCESSES_TO_CLOSE} THEN 'closed' ELSE state END,
    failure_count = CASE WHEN success_count + 1 >= {SUCCESSES_TO_CLOSE} THEN 0 ELSE failure_count END,
    opened_at = CASE WHEN success_count + 1 >= {SUCCESSES_TO_CLOSE} THEN NULL ELSE opened_at END,
    half_open_at = CASE WHEN success_count + 1 >= {SUCCESSES_TO_CLOSE} THEN NULL ELSE clock_timestamp() END
WHERE model_id = $1 AND state = 'half_open'
"""  # noqa: S608


async def note_failure(pool: asyncpg.Pool, org_id: int, model: UUID) -> bool:
    """Count a failure; returns whether it opened the breaker."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(_NOTE_FAILURE, model, org_id)
        return bool(await connection.fetchval(_OPEN_WHEN_DUE, model))


async def note_success(pool: asyncpg.Pool, model: UUID) -> None:
    """A call came back while the breaker was half open."""
    await pool.execute(_NOTE_SUCCESS, model)


async def claim_try(connection: asyncpg.Connection, model: UUID) -> bool:
    """Whether this call is the one that may try a model whose breaker is not closed."""
    return bool(await connection.fetchval(_CLAIM_TRY, model))
