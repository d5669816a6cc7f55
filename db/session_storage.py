"""A session's values and secrets in PostgreSQL.

A secret is sealed to its own row, under the id that the row keeps for life, so that an envelope copied from another row, of
whatever session, opens nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

import asyncpg
import structlog

from db.session_belongings import OF_LIVE_SESSION, locked_session, told_to_tools
from domain.clock import timestamp
from domain.errors import ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id, uuid7
from domain.limits import MAX_SECRETS_PER_SESSION, MAX_VALUES_PER_SESSION, VALUES_MAX_BYTES
from domain.secret import Secret
from domain.session_storage import (
    StorageProblem,
    StoredSecret,
    StoredValue,
    check_key,
    check_secret_name,
    check_secrets,
    check_value,
)
from infra.encryption import Keyring, UndecryptableSecret, bound_to

_VALUE_COLUMNS: Final = "key, value, created_at, updated_at"
_VALUE: Final = f"SELECT {_VALUE_COLUMNS} FROM session_values WHERE {OF_LIVE_SESSION} AND key = $3"  # noqa: S608
_VALUES: Final = f"SELECT {_VALUE_COLUMNS} FROM session_values WHERE {OF_LIVE_SESSION} ORDER BY key"  # noqa: S608
_OTHER_VALUES: Final = """SELECT count(*) AS values, coalesce(sum(octet_length(value)), 0)::bigint AS bytes FROM session_values
    WHERE session_id = $1 AND key <> $2"""
_SET_VALUE: Final = f"""INSERT INTO session_values (session_id, key, value) VALUES ($1, $2, $3)
    ON CONFLICT (session_id, key) DO UPDATE SET value = excluded.value, updated_at = clock_timestamp()
    RETURNING {_VALUE_COLUMNS}"""  # noqa: S608
_DELETE_VALUE: Final = "DELETE FROM session_values WHERE session_id = $1 AND key = $2"

_SECRET: Final = f"SELECT id, value FROM session_secrets WHERE {OF_LIVE_SESSION} AND name = $3"  # noqa: S608
_SHOWN: Final = "name, created_at, updated_at"
_SECRETS: Final = f"SELECT {_SHOWN} FROM session_secrets WHERE {OF_LIVE_SESSION} ORDER BY name"  # noqa: S608
_IDS_BY_NAME: Final = "SELECT name, id FROM session_secrets WHERE session_id = $1"
_SET_SECRETS: Final = f"""INSERT INTO session_secrets (session_id, id, name, value)
    SELECT $1, n.id, n.name, n.value FROM unnest($2::uuid[], $3::text[], $4::text[]) AS n(id, name, value)
    ON CONFLICT (session_id, name) DO UPDATE SET value = excluded.value, updated_at = clock_timestamp()
    RETURNING {_SHOWN}"""  # noqa: S608
_DELETE_NAMED: Final = "DELETE FROM session_secrets WHERE session_id = $1 AND name = $2"

log = structlog.get_logger(__name__)


class DatabaseStorage:
    """Serves the port `domain.session_storage.SessionStorage`."""

    def __init__(self, pool: asyncpg.Pool, keyring: Keyring, session_id: str) -> None:
        self._pool = pool
        self._keyring = keyring
        self._session_id = session_id
        self._key = parse_id(Prefix.SESSION, session_id)

    async def get(self, key: str) -> StoredValue | None:
        with told_to_tools(StorageProblem):
            check_key(key)
            row = await self._pool.fetchrow(_VALUE, DEFAULT_ORG_ID, self._key, key)
            return None if row is None else _value(row)

    async def set(self, key: str, value: str) -> StoredValue:
        with told_to_tools(StorageProblem):
            check_key(key)
            check_value(value)
            async with locked_session(self._pool, self._session_id) as connection:
                await self._check_room(connection, key, value)
                row = await connection.fetchrow(_SET_VALUE, self._key, key, value)
            assert row is not None
            return _value(row)

    async def delete(self, key: str) -> bool:
        with told_to_tools(StorageProblem):
            check_key(key)
            async with locked_session(self._pool, self._session_id) as connection:
                return await connection.execute(_DELETE_VALUE, self._key, key) == "DELETE 1"

    async def keys(self) -> list[StoredValue]:
        return await list_values(self._pool, self._session_id)

    async def get_secret(self, name: str) -> Secret | None:
        with told_to_tools(StorageProblem):
            check_secret_name(name)
            row = await self._pool.fetchrow(_SECRET, DEFAULT_ORG_ID, self._key, name)
        if row is None:
            return None
        try:
            return self._keyring.decrypt(row["value"], bound_to=_place(row["id"]))
        except UndecryptableSecret as error:
            log.warning("stored secret cannot be read", place=error.place, reason=error.reason)
            raise StorageProblem(f"The secret `{name}` cannot be read; it has to be set again.") from None

    async def set_secret(self, name: str, value: Secret) -> StoredSecret:
        with told_to_tools(StorageProblem):
            (stored,) = await set_secrets(self._pool, self._keyring, self._session_id, {name: value})
            return stored

    async def delete_secret(self, name: str) -> bool:
        with told_to_tools(StorageProblem):
            check_secret_name(name)
            async with locked_session(self._pool, self._session_id) as connection:
                return await connection.execute(_DELETE_NAMED, self._key, name) == "DELETE 1"

    async def secrets(self) -> list[StoredSecret]:
        return await list_secrets(self._pool, self._session_id)

    async def _check_room(self, connection: asyncpg.Connection, key: str, value: str) -> None:
        others = await connection.fetchrow(_OTHER_VALUES, self._key, key)
        assert others is not None
        if others["values"] >= MAX_VALUES_PER_SESSION:
            raise ResourceLimit(f"A session may hold {MAX_VALUES_PER_SESSION} values; delete some first")
        if others["bytes"] + len(value.encode()) > VALUES_MAX_BYTES:
            raise ResourceLimit(f"A session's values may hold {VALUES_MAX_BYTES} bytes together; delete some first")


async def list_values(pool: asyncpg.Pool, session_id: str) -> list[StoredValue]:
    """By key; none for a session that is deleted or never was."""
    rows = await pool.fetch(_VALUES, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id))
    return [_value(row) for row in rows]


async def list_secrets(pool: asyncpg.Pool, session_id: str) -> list[StoredSecret]:
    """By name; none for a session that is deleted or never was."""
    rows = await pool.fetch(_SECRETS, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id))
    return [_secret(row) for row in rows]


async def set_secrets(
    pool: asyncpg.Pool, keyring: Keyring, session_id: str, secrets: Mapping[str, Secret]
) -> list[StoredSecret]:
    """Store all or none; what has one of the names is replaced.

    Raises `InvalidInput`, `NotFound`, `ResourceLimit` and `EncryptionNotConfigured`.
    """
    check_secrets(secrets)
    key = parse_id(Prefix.SESSION, session_id)
    async with locked_session(pool, session_id) as connection:
        ids: dict[str, UUID] = {row["name"]: row["id"] for row in await connection.fetch(_IDS_BY_NAME, key)}
        if len(ids.keys() | secrets.keys()) > MAX_SECRETS_PER_SESSION:
            raise ResourceLimit(f"A session may hold {MAX_SECRETS_PER_SESSION} secrets; delete some first")
        rows = {name: ids.get(name) or uuid7() for name in secrets}
        envelopes = [keyring.encrypt(secrets[name].reveal(), bound_to=_place(row)) for name, row in rows.items()]
        stored = await connection.fetch(_SET_SECRETS, key, list(rows.values()), list(rows), envelopes)
    return [_secret(row) for row in stored]


def _place(row: UUID) -> str:
    return bound_to("session_secrets", row, "value")


def _value(row: asyncpg.Record) -> StoredValue:
    return StoredValue(
        key=row["key"],
        value=row["value"],
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
    )


def _secret(row: asyncpg.Record) -> StoredSecret:
    return StoredSecret(
        name=row["name"], created_at=timestamp(row["created_at"]), updated_at=timestamp(row["updated_at"])
    )
