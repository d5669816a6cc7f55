"""SQLite databases of sessions in PostgreSQL.

An image is replaced by compare-and-set on its version, under the lock on the session's row that also guards limits: a writer that
worked on an image which is not the current one any more changes nothing. The write's idempotency key is stored in that same
transaction, so a repetition finds what the first one has done.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
import msgspec

from db.session_belongings import OF_LIVE_SESSION, locked_session, told_to_tools
from domain.clock import timestamp
from domain.errors import DatabaseLimit, EverrunsError, NameTaken, NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id, uuid7
from domain.limits import DATABASE_MAX_BYTES, MAX_DATABASES_PER_SESSION
from domain.session_databases import (
    DatabaseChanged,
    DatabaseImage,
    DatabaseInfo,
    DatabaseProblem,
    NewImage,
    TableSchema,
    check_database_name,
)

WRITES_REMEMBERED: Final = 100
"""Of a session. A step is tried again within minutes, and calls of a session's databases run one after another."""

_COLUMNS: Final = "name, size_bytes, page_count, created_at, updated_at"
_LIST: Final = f"SELECT {_COLUMNS} FROM session_databases WHERE {OF_LIVE_SESSION} ORDER BY name"  # noqa: S608
_INFO: Final = f"SELECT {_COLUMNS} FROM session_databases WHERE {OF_LIVE_SESSION} AND name = $3"  # noqa: S608
_IMAGE: Final = f"SELECT id, version, content FROM session_databases WHERE {OF_LIVE_SESSION} AND name = $3"  # noqa: S608
_TABLES: Final = f"SELECT tables FROM session_databases WHERE {OF_LIVE_SESSION} AND name = $3"  # noqa: S608
_RESULT: Final = f"SELECT result FROM session_database_writes WHERE {OF_LIVE_SESSION} AND idempotency_key = $3"  # noqa: S608

_COUNT: Final = "SELECT count(*) FROM session_databases WHERE session_id = $1"
_CREATE: Final = f"""INSERT INTO session_databases (id, session_id, name, content, size_bytes, page_count, tables)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (session_id, name) DO NOTHING RETURNING {_COLUMNS}"""  # noqa: S608
_REPLACE: Final = """UPDATE session_databases SET version = version + 1, content = $5, size_bytes = $6, page_count = $7,
    tables = $8, updated_at = clock_timestamp()
    WHERE session_id = $1 AND name = $2 AND id = $3 AND version = $4 RETURNING version"""
_DELETE: Final = "DELETE FROM session_databases WHERE session_id = $1 AND name = $2"
_WRITTEN: Final = "SELECT result FROM session_database_writes WHERE session_id = $1 AND idempotency_key = $2"
_NOTE: Final = """INSERT INTO session_database_writes (id, session_id, idempotency_key, database_id, version, result)
    VALUES ($1, $2, $3, $4, $5, $6)"""
_FORGET: Final = f"""DELETE FROM session_database_writes WHERE session_id = $1 AND id < (
    SELECT id FROM session_database_writes WHERE session_id = $1 ORDER BY id DESC LIMIT 1 OFFSET {WRITES_REMEMBERED - 1})"""  # noqa: S608
_COPY: Final = """INSERT INTO session_databases
    (id, session_id, name, content, size_bytes, page_count, tables, created_at, updated_at)
    SELECT gen_random_uuid(), $2, name, content, size_bytes, page_count, tables, created_at, updated_at
    FROM session_databases WHERE session_id = $1 AND ($3::timestamptz IS NULL OR updated_at <= $3)"""


class StoredDatabases:
    """Serves the port `domain.session_databases.SessionDatabases`."""

    def __init__(self, pool: asyncpg.Pool, session_id: str) -> None:
        self._pool = pool
        self._session_id = session_id
        self._key = parse_id(Prefix.SESSION, session_id)

    async def list(self) -> list[DatabaseInfo]:
        return await list_databases(self._pool, self._session_id)

    async def load(self, name: str) -> DatabaseImage | None:
        with told_to_tools(DatabaseProblem):
            check_database_name(name, "database")
            row = await self._pool.fetchrow(_IMAGE, DEFAULT_ORG_ID, self._key, name)
        if row is None:
            return None
        return DatabaseImage(id=str(row["id"]), version=row["version"], content=row["content"])

    async def schema(self, name: str) -> list[TableSchema] | None:
        with told_to_tools(DatabaseProblem):
            check_database_name(name, "database")
            return await _tables(self._pool, self._session_id, name)

    async def result_of(self, idempotency_key: str) -> str | None:
        return await self._pool.fetchval(_RESULT, DEFAULT_ORG_ID, self._key, idempotency_key)

    async def store(
        self, name: str, image: NewImage, *, replaces: DatabaseImage | None, idempotency_key: str, result: str
    ) -> str:
        with told_to_tools(DatabaseProblem):
            check_database_name(name, "database")
            async with locked_session(self._pool, self._session_id) as connection:
                earlier: str | None = await connection.fetchval(_WRITTEN, self._key, idempotency_key)
                if earlier is not None:
                    return earlier
                database_id, version = await self._put(connection, name, image, replaces)
                await connection.execute(_NOTE, uuid7(), self._key, idempotency_key, database_id, version, result)
                await connection.execute(_FORGET, self._key)
        return result

    async def _put(
        self, connection: asyncpg.Connection, name: str, image: NewImage, replaces: DatabaseImage | None
    ) -> tuple[UUID, int]:
        if image.size_bytes > DATABASE_MAX_BYTES:
            raise DatabaseProblem(f"A database may hold {DATABASE_MAX_BYTES:,} bytes.")
        content = (image.content, image.size_bytes, image.page_count, bytes(image.tables).decode())
        if replaces is None:
            database_id = uuid7()
            await _create(connection, database_id, self._key, name, content)
            return database_id, 1
        database_id = UUID(replaces.id)
        version = await connection.fetchval(_REPLACE, self._key, name, database_id, replaces.version, *content)
        if version is None:
            raise DatabaseChanged(f"The database `{name}` was changed or deleted by somebody else meanwhile.")
        return database_id, version


async def list_databases(pool: asyncpg.Pool, session_id: str) -> list[DatabaseInfo]:
    """By name; none for a session that is deleted or never was."""
    rows = await pool.fetch(_LIST, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id))
    return [_info(row) for row in rows]


async def create_database(pool: asyncpg.Pool, session_id: str, name: str) -> DatabaseInfo:
    """An empty one. Raises `InvalidInput`, `NotFound`, `NameTaken` and `DatabaseLimit`."""
    check_database_name(name)
    key = parse_id(Prefix.SESSION, session_id)
    async with locked_session(pool, session_id) as connection:
        try:
            return await _create(connection, uuid7(), key, name, (b"", 0, 0, "[]"))
        except DatabaseChanged:
            raise NameTaken(f"The session already has a database `{name}`", field="name") from None


async def get_database(pool: asyncpg.Pool, session_id: str, name: str) -> DatabaseInfo:
    """Raises `NotFound`."""
    row = None
    if _is_name(name):
        row = await pool.fetchrow(_INFO, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id), name)
    if row is None:
        raise _not_found()
    return _info(row)


async def get_tables(pool: asyncpg.Pool, session_id: str, name: str) -> list[TableSchema]:
    """Raises `NotFound`."""
    tables = await _tables(pool, session_id, name) if _is_name(name) else None
    if tables is None:
        raise _not_found()
    return tables


async def delete_database(pool: asyncpg.Pool, session_id: str, name: str) -> None:
    """A script that runs meanwhile finds its image gone. Raises `NotFound`."""
    key = parse_id(Prefix.SESSION, session_id)
    async with locked_session(pool, session_id) as connection:
        if not _is_name(name) or await connection.execute(_DELETE, key, name) == "DELETE 0":
            raise _not_found()


async def copy_databases(
    connection: asyncpg.Connection, source_session: UUID, target_session: UUID, unchanged_since: datetime | None = None
) -> None:
    """Give a new session copies of databases: of all, as they are now, or of those that have not changed since a moment.

    Both are row ids; the caller has checked whose they are.
    """
    await connection.execute(_COPY, source_session, target_session, unchanged_since)


async def _create(
    connection: asyncpg.Connection, database_id: UUID, session: UUID, name: str, content: tuple[bytes, int, int, str]
) -> DatabaseInfo:
    """Raises `DatabaseChanged` when there is one of that name, and `DatabaseLimit`; the session's row is locked."""
    if await connection.fetchval("SELECT 1 FROM session_databases WHERE session_id = $1 AND name = $2", session, name):
        raise DatabaseChanged(f"The database `{name}` was made by somebody else meanwhile.")
    count: int | None = await connection.fetchval(_COUNT, session)
    assert count is not None
    if count >= MAX_DATABASES_PER_SESSION:
        raise DatabaseLimit(f"A session may have {MAX_DATABASES_PER_SESSION} databases; delete one first")
    row = await connection.fetchrow(_CREATE, database_id, session, name, *content)
    assert row is not None
    return _info(row)


async def _tables(pool: asyncpg.Pool, session_id: str, name: str) -> list[TableSchema] | None:
    stored: str | None = await pool.fetchval(_TABLES, DEFAULT_ORG_ID, parse_id(Prefix.SESSION, session_id), name)
    return None if stored is None else msgspec.json.decode(stored, type=list[TableSchema])


def _is_name(name: str) -> bool:
    try:
        check_database_name(name)
    except EverrunsError:
        return False
    return True


def _not_found() -> NotFound:
    # Without the name, which may be anything: whoever asks knows it.
    return NotFound("The session has no database of this name", field="name")


def _info(row: asyncpg.Record) -> DatabaseInfo:
    return DatabaseInfo(
        name=row["name"],
        size_bytes=row["size_bytes"],
        page_count=row["page_count"],
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
    )
