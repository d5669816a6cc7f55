"""The connection pool, shared by Piccolo and plain asyncpg, and the schema.

Piccolo keeps its engine in module state, so a process talks to one database at a time; `Database` is the only code that
touches that engine.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import AsyncIterator

import asyncpg

os.environ.setdefault("PICCOLO_CONF", "db.piccolo_conf")

from piccolo.apps.migrations.commands.forwards import run_forwards

from db.piccolo_conf import DB

MIGRATION_LOCK = 0x65_76_65_72_72_75_6E_73
"""Advisory lock that makes migrators queue up ("everruns" in ASCII); Piccolo itself takes none."""


class MigrationFailed(Exception):
    """The schema could not be brought up to date"""


async def _as_it_is(_connection: asyncpg.Connection) -> None:
    """Give a connection back without asyncpg's `RESET ALL`, a round trip after every use (open transactions still end).

    Nothing changes the state of a pooled connection: no `SET` but `SET LOCAL`, no `LISTEN`, and the one advisory lock is
    released by whoever takes it.
    """


class Database:
    """An open pool. Use `open` and `close`, or `async with Database.opened(dsn)`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    @classmethod
    async def open(cls, dsn: str, *, pool_size: int = 10) -> Database:
        """Raises whatever asyncpg raises when the server cannot be reached."""
        DB.config = {"dsn": dsn}
        await DB.start_connection_pool(min_size=min(2, pool_size), max_size=pool_size, reset=_as_it_is)
        if DB.pool is None:
            raise RuntimeError("Piccolo did not open its pool")
        return cls(DB.pool)

    async def close(self) -> None:
        await DB.close_connection_pool()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, dsn: str, *, pool_size: int = 10) -> AsyncIterator[Database]:
        database = await cls.open(dsn, pool_size=pool_size)
        try:
            yield database
        finally:
            await database.close()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        async with self.pool.acquire() as connection, connection.transaction():
            yield connection  # type: ignore[misc]  # asyncpg's proxy is a Connection in all but type

    async def migrate(self) -> list[str]:
        """Bring the schema up to date; returns what the migration tool printed. Concurrent callers queue up.

        Raises `MigrationFailed`.
        """
        async with self.pool.acquire() as holder:
            await holder.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
            try:
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    result = await run_forwards("everruns")
            finally:
                await holder.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK)
        if not result.success:
            raise MigrationFailed(result.message or printed.getvalue())
        return [line for line in printed.getvalue().splitlines() if line.strip()]

    async def applied_migrations(self) -> list[str]:
        rows = await self.pool.fetch("SELECT name FROM migration WHERE app_name = 'everruns' ORDER BY name")
        return [row["name"] for row in rows]
