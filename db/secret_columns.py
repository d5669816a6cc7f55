"""Where the database holds secrets, and what is done to all of them: count by key, move to the current key, check.

`SECRET_COLUMNS` is the only list; a new column of envelopes is a new line there. Decisions:
- Counting reads the beginning of an envelope, where `infra.encryption` writes the key's id: every process counts when it starts,
  and large values stay where PostgreSQL put them.
- Moving to the current key takes no lock and no transaction beyond a row: a row is written only if it still holds what was
  decrypted. So servers may write meanwhile, and an interrupted run is simply run again.
- Reports name rows and key ids, never what is stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final
from uuid import UUID

from msgspec import Struct

from db.database import Database
from domain.errors import EncryptionNotConfigured
from infra.encryption import ALGORITHM, KEY_ID_PATTERN, VERSION, Keyring, UndecryptableSecret, bound_to

PAGE_ROWS: Final = 100
"""A page is held in memory, and a compacted context may take some hundred kilobytes."""

KEY_ID_WITHIN_CHARACTERS: Final = 256
"""The id stands third in an envelope and has at most 64 characters."""

Values = tuple[UUID, ...]


class SecretColumn(Struct, frozen=True, kw_only=True):
    """`id_column` names the row in the envelope's place; `key_columns` are the primary key, which finds the row again."""

    table: str
    id_column: str
    column: str
    key_columns: tuple[str, ...]


SECRET_COLUMNS: Final = (
    SecretColumn(table="providers", id_column="id", column="credentials", key_columns=("id",)),
    SecretColumn(table="context_checkpoints", id_column="id", column="native", key_columns=("session_id", "id")),
    SecretColumn(table="user_connections", id_column="id", column="api_key", key_columns=("id",)),
    SecretColumn(table="session_secrets", id_column="id", column="value", key_columns=("id",)),
    SecretColumn(table="mcp_servers", id_column="id", column="api_key", key_columns=("id",)),
    SecretColumn(table="mcp_servers", id_column="id", column="headers", key_columns=("id",)),
    SecretColumn(table="mcp_servers", id_column="id", column="oauth_client", key_columns=("id",)),
    SecretColumn(table="mcp_servers", id_column="id", column="oauth_grant", key_columns=("id",)),
    SecretColumn(table="mcp_scoped_secrets", id_column="id", column="value", key_columns=("id",)),
    SecretColumn(table="mcp_oauth_flows", id_column="id", column="value", key_columns=("id",)),
)


class StoredSecret(Struct, frozen=True, kw_only=True):
    """An envelope and where it is. It has no readable representation: damaged rows may hold anything."""

    column: SecretColumn
    key: Values
    envelope: str

    @property
    def row(self) -> UUID:
        return self.key[self.column.key_columns.index(self.column.id_column)]

    @property
    def place(self) -> str:
        return bound_to(self.column.table, self.row, self.column.column)

    def __repr__(self) -> str:
        return f"StoredSecret({self.place})"


class Unreadable(Struct, frozen=True, kw_only=True):
    table: str
    row: UUID
    column: str
    problem: str


class Reencryption(Struct, frozen=True, kw_only=True):
    """What a run did. `left` counts what is under another key after it, by key id: written meanwhile by a server that has
    not got the current key yet, or unreadable."""

    reencrypted: int
    already_current: int
    unreadable: tuple[Unreadable, ...]
    left: Mapping[str | None, int]


class SecretsCheck(Struct, frozen=True, kw_only=True):
    readable: int
    unreadable: tuple[Unreadable, ...]
    by_key: Mapping[str | None, int]


async def count_by_key(database: Database) -> dict[str | None, int]:
    """How many stored secrets there are under each key id; None for what does not look like an envelope."""
    counts: dict[str | None, int] = {}
    for column in SECRET_COLUMNS:
        rows = await database.pool.fetch(_count_query(column), KEY_ID_WITHIN_CHARACTERS, _KEY_ID_IN_ENVELOPE)
        for row in rows:
            counts[row["key_id"]] = counts.get(row["key_id"], 0) + row["secrets"]
    return counts


async def check_secrets(database: Database, keyring: Keyring, on_each: Callable[[], None]) -> SecretsCheck:
    """Decrypt everything; `on_each` is told after every value."""
    readable = 0
    unreadable: list[Unreadable] = []
    async for stored in _each(database):
        try:
            keyring.decrypt(stored.envelope, bound_to=stored.place)
            readable += 1
        except UndecryptableSecret as error:
            unreadable.append(_unreadable(stored, error))
        on_each()
    return SecretsCheck(readable=readable, unreadable=tuple(unreadable), by_key=await count_by_key(database))


async def reencrypt(database: Database, keyring: Keyring, on_each: Callable[[], None]) -> Reencryption:
    """Move everything that can be read to the current key. Raises `EncryptionNotConfigured`."""
    if not keyring.can_encrypt:
        raise EncryptionNotConfigured
    reencrypted = already_current = 0
    unreadable: list[Unreadable] = []
    async for stored in _each(database):
        try:
            if await _moved(database, keyring, stored):
                reencrypted += 1
            else:
                already_current += 1
        except UndecryptableSecret as error:
            unreadable.append(_unreadable(stored, error))
        on_each()
    left = await count_by_key(database)
    for key_id in keyring.key_ids[:1]:
        left.pop(key_id, None)
    return Reencryption(
        reencrypted=reencrypted, already_current=already_current, unreadable=tuple(unreadable), left=left
    )


async def _moved(database: Database, keyring: Keyring, stored: StoredSecret) -> bool:
    """Whether there was something to do. Raises `UndecryptableSecret`."""
    found: StoredSecret | None = stored
    while found is not None and keyring.needs_reencryption(found.envelope):
        plaintext = keyring.decrypt(found.envelope, bound_to=found.place)
        envelope = keyring.encrypt(plaintext.reveal(), bound_to=found.place)
        if await _replaced(database, found, envelope):
            return True
        # Somebody was faster: with another secret, by deleting it, or with another run of this.
        found = await _found_again(database, found)
    return False


def _unreadable(stored: StoredSecret, error: UndecryptableSecret) -> Unreadable:
    return Unreadable(table=stored.column.table, row=stored.row, column=stored.column.column, problem=error.problem)


# --- SQL. Names come from the list above, never from outside. ----------------------------------------------------------

_KEY_ID_IN_ENVELOPE: Final = (
    rf'^\s*\{{\s*"version"\s*:\s*{VERSION}\s*,\s*"alg"\s*:\s*"{ALGORITHM}"\s*,\s*"key_id"\s*:\s*"({KEY_ID_PATTERN})"'
)


def _count_query(column: SecretColumn) -> str:
    return f"""
        SELECT substring(left({column.column}, $1) from $2) AS key_id, count(*) AS secrets
        FROM {column.table} WHERE {column.column} IS NOT NULL GROUP BY key_id
    """  # noqa: S608


def _page_query(column: SecretColumn, *, first: bool) -> str:
    keys = ", ".join(column.key_columns)
    after = ", ".join(f"${place}" for place, _ in enumerate(column.key_columns, start=2))
    beyond = "" if first else f"AND ({keys}) > ({after})"
    return f"""
        SELECT {keys}, {column.column} AS envelope FROM {column.table}
        WHERE {column.column} IS NOT NULL {beyond} ORDER BY {keys} LIMIT $1
    """  # noqa: S608


def _this_row(column: SecretColumn) -> str:
    return " AND ".join(f"{name} = ${place}" for place, name in enumerate(column.key_columns, start=1))


async def _each(database: Database) -> AsyncIterator[StoredSecret]:
    for column in SECRET_COLUMNS:
        last: Values = ()
        while True:
            rows = await database.pool.fetch(_page_query(column, first=not last), PAGE_ROWS, *last)
            for row in rows:
                last = tuple(row[name] for name in column.key_columns)
                yield StoredSecret(column=column, key=last, envelope=row["envelope"])
            if len(rows) < PAGE_ROWS:
                break


async def _found_again(database: Database, stored: StoredSecret) -> StoredSecret | None:
    column = stored.column
    envelope = await database.pool.fetchval(
        f"SELECT {column.column} FROM {column.table} WHERE {_this_row(column)}",  # noqa: S608
        *stored.key,
    )
    return None if envelope is None else StoredSecret(column=column, key=stored.key, envelope=envelope)


async def _replaced(database: Database, stored: StoredSecret, envelope: str) -> bool:
    """Whether the row still held what was read, and now holds the new envelope."""
    column = stored.column
    places = len(column.key_columns)
    status = await database.pool.execute(
        f"UPDATE {column.table} SET {column.column} = ${places + 1} "  # noqa: S608
        f"WHERE {_this_row(column)} AND {column.column} = ${places + 2}",
        *stored.key,
        envelope,
        stored.envelope,
    )
    return status == "UPDATE 1"
