"""What memories, workspaces, skills, declarative capabilities and MCP servers share: rows that are archived before they are
deleted, and some of them switched off in between.

`active` (⇄ `disabled`) → `archived` → `deleted`. Names, where they are unique, are so among live rows. SQL is put together from
constants of ours, never from input.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import asyncpg

from db.columns import like_patterns
from db.database import Database
from domain.errors import Archived, Conflict, NameTaken, NotFound, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id

LIVE: Final = ("active", "disabled")


@dataclass(frozen=True, kw_only=True)
class ArchivableRows:
    """`full` and `taken` are what a caller is told who wants one row too many, or a name that is somebody else's."""

    table: str
    prefix: Prefix
    noun: str
    maximum: int
    full: str
    taken: str = ""
    name_field: str = "name"
    live: tuple[str, ...] = LIVE
    among: str = "true"
    """A condition for the rows that lists and the limit are about."""

    def not_found(self, public_id: str) -> NotFound:
        return NotFound(f"There is no {self.noun} `{public_id[:80]}`")

    async def list(
        self, connection: asyncpg.Connection | asyncpg.Pool, *, search: str | None, include_archived: bool
    ) -> list[asyncpg.Record]:
        """Newest first. Each word of `search` must occur in the name or the description."""
        arguments: list[object] = [DEFAULT_ORG_ID, [*self.live, *(["archived"] if include_archived else [])]]
        condition = ""
        for pattern in like_patterns(search):
            arguments.append(pattern)
            condition += f" AND concat_ws(E'\\n', name, description) ILIKE ${len(arguments)}"
        return await connection.fetch(
            f"SELECT * FROM {self.table} WHERE org_id = $1 AND status = ANY($2::text[]) AND {self.among}{condition} "  # noqa: S608
            "ORDER BY created_at DESC, id DESC",
            *arguments,
        )

    async def get(
        self, connection: asyncpg.Connection | asyncpg.Pool, public_id: str, *, lock: bool = False
    ) -> asyncpg.Record:
        """Raises `MalformedId` or `NotFound`."""
        locking = " FOR NO KEY UPDATE" if lock else ""
        row = await connection.fetchrow(
            f"SELECT * FROM {self.table} WHERE org_id = $1 AND id = $2 AND status <> 'deleted'{locking}",  # noqa: S608
            DEFAULT_ORG_ID,
            parse_id(self.prefix, public_id),
        )
        if row is None:
            raise self.not_found(public_id)
        return row

    @contextlib.asynccontextmanager
    async def writing(self, database: Database) -> AsyncIterator[asyncpg.Connection]:
        """A transaction in which a name that somebody else has is `NameTaken`."""
        try:
            async with database.transaction() as connection:
                yield connection
        except asyncpg.UniqueViolationError:
            raise NameTaken(self.taken, field=self.name_field) from None

    async def insert(self, connection: asyncpg.Connection, values: dict[str, object]) -> asyncpg.Record:
        """Raises `ResourceLimit`."""
        count = await connection.fetchval(
            f"SELECT count(*) FROM {self.table} WHERE org_id = $1 AND status <> 'deleted' AND {self.among}",  # noqa: S608
            DEFAULT_ORG_ID,
        )
        if (count or 0) >= self.maximum:
            raise ResourceLimit(self.full)
        given = {"org_id": DEFAULT_ORG_ID, **values}
        places = ", ".join(f"${place}" for place in range(1, len(given) + 1))
        row = await connection.fetchrow(
            f"INSERT INTO {self.table} ({', '.join(given)}) VALUES ({places}) RETURNING *",  # noqa: S608
            *given.values(),
        )
        assert row is not None
        return row

    async def change(
        self, connection: asyncpg.Connection, row: asyncpg.Record, values: dict[str, object], status: str | None
    ) -> asyncpg.Record:
        """A PATCH. An archived row takes no edit but the one that brings it back, or deletes it."""
        before, wanted = row["status"], status or row["status"]
        if wanted == "deleted":
            return await self.delete(connection, row, field="status")
        if before == "archived" and wanted == "archived" and values:
            raise Archived
        changed = dict(values)
        if wanted != before:
            changed |= {"status": wanted, "archived_at": datetime.now(UTC) if wanted == "archived" else None}
        return await self._update(connection, row, changed) if changed else row

    async def archive(self, connection: asyncpg.Connection, row: asyncpg.Record) -> asyncpg.Record:
        """Archiving twice is fine."""
        if row["status"] == "archived":
            return row
        return await self._update(connection, row, {"status": "archived", "archived_at": datetime.now(UTC)})

    async def delete(
        self, connection: asyncpg.Connection, row: asyncpg.Record, *, field: str | None = None
    ) -> asyncpg.Record:
        """A tombstone stays; no request finds it. `field` is what asked for it."""
        if row["status"] != "archived":
            raise Conflict(f"Only an archived {self.noun} can be deleted; archive it first", field=field)
        return await self._update(connection, row, {"status": "deleted", "deleted_at": datetime.now(UTC)})

    async def _update(
        self, connection: asyncpg.Connection, row: asyncpg.Record, values: dict[str, object]
    ) -> asyncpg.Record:
        assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(values, 2))
        updated = await connection.fetchrow(
            f"UPDATE {self.table} SET {assignments}, updated_at = now() WHERE id = $1 RETURNING *",  # noqa: S608
            row["id"],
            *values.values(),
        )
        assert updated is not None
        return updated
