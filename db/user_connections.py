"""Connections of a user to outside services: one sealed key per provider, which the API never gives back."""

from __future__ import annotations

from typing import Final

import asyncpg
from msgspec import Struct

from db.database import Database
from domain.clock import timestamp
from domain.errors import NotFound, ResourceLimit
from domain.ids import ANONYMOUS_USER_ID, DEFAULT_ORG_ID, uuid7
from domain.limits import MAX_CONNECTIONS_PER_USER
from domain.secret import Secret
from infra.encryption import Keyring, bound_to

_LOCK: Final = "SELECT 1 FROM users WHERE id = $1 FOR NO KEY UPDATE"
_OWN: Final = "SELECT provider, id FROM user_connections WHERE org_id = $1 AND user_id = $2"
_SET: Final = """INSERT INTO user_connections (id, org_id, user_id, provider, api_key) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (org_id, user_id, provider) DO UPDATE SET api_key = excluded.api_key, updated_at = clock_timestamp()
    RETURNING provider, created_at, updated_at"""
_LIST: Final = """SELECT provider, created_at, updated_at FROM user_connections
    WHERE org_id = $1 AND user_id = $2 ORDER BY provider"""
_DELETE: Final = "DELETE FROM user_connections WHERE org_id = $1 AND user_id = $2 AND provider = $3"


class UserConnection(Struct, frozen=True, kw_only=True):
    provider: str
    created_at: str
    updated_at: str


async def set_connection(database: Database, keyring: Keyring, provider: str, api_key: Secret) -> UserConnection:
    """What the user had for this provider is replaced. Raises `ResourceLimit` or `EncryptionNotConfigured`."""
    async with database.transaction() as connection:
        await connection.execute(_LOCK, ANONYMOUS_USER_ID)
        rows = await connection.fetch(_OWN, DEFAULT_ORG_ID, ANONYMOUS_USER_ID)
        ids = {row["provider"]: row["id"] for row in rows}
        if provider not in ids and len(ids) >= MAX_CONNECTIONS_PER_USER:
            raise ResourceLimit(f"A user may have {MAX_CONNECTIONS_PER_USER} connections; remove one first")
        key = ids.get(provider) or uuid7()
        envelope = keyring.encrypt(api_key.reveal(), bound_to=bound_to("user_connections", key, "api_key"))
        row = await connection.fetchrow(_SET, key, DEFAULT_ORG_ID, ANONYMOUS_USER_ID, provider, envelope)
        assert row is not None
        return _connection(row)


async def list_connections(database: Database) -> list[UserConnection]:
    """By provider."""
    return [_connection(row) for row in await database.pool.fetch(_LIST, DEFAULT_ORG_ID, ANONYMOUS_USER_ID)]


async def remove_connection(database: Database, provider: str) -> None:
    """Raises `NotFound`."""
    status = await database.pool.execute(_DELETE, DEFAULT_ORG_ID, ANONYMOUS_USER_ID, provider)
    if status == "DELETE 0":
        raise NotFound(f"There is no connection to `{provider[:80]}`")


def _connection(row: asyncpg.Record) -> UserConnection:
    return UserConnection(
        provider=row["provider"], created_at=timestamp(row["created_at"]), updated_at=timestamp(row["updated_at"])
    )
