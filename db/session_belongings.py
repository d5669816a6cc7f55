"""How what belongs to a session is read and written: its values and secrets, its databases.

It is there while the session is. Writers lock the session's row: limits are counted under that lock, and nothing is written to a
session that is being deleted, for its belongings go in that transaction (`db.session_cleanup`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

import asyncpg

from db.sessions import session_not_found
from domain.errors import EverrunsError
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id

OF_LIVE_SESSION: Final = "session_id = (SELECT id FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL)"
_LOCK: Final = "SELECT 1 FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL FOR NO KEY UPDATE"


@contextlib.asynccontextmanager
async def locked_session(pool: asyncpg.Pool, session_id: str) -> AsyncIterator[asyncpg.Connection]:
    """A transaction that no other writer of this session's belongings shares. Raises `NotFound`."""
    async with pool.acquire() as connection, connection.transaction():
        if await connection.fetchval(_LOCK, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id)) is None:
            raise session_not_found(session_id)
        yield connection  # type: ignore[misc]  # a pool's proxy


@contextlib.contextmanager
def told_to_tools(problem: type[Exception]) -> Iterator[None]:
    """What a request would be refused with, as the `problem` that a model reads."""
    try:
        yield
    except EverrunsError as error:
        raise problem(f"{error.message}.") from None
