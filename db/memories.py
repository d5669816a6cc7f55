"""Memories: CRUD and life cycle. Their files are workspace entries under the memory's own id, so everything about files (paths,
limits, search, content shared by hash) is what workspaces have.

A remote source (`github`, `git`) is stored, and its memory cannot be written over the API or by tools, since the next sync would
undo it. Syncing itself needs a git client, which this server does not have: it says so instead of seeming to work.
"""

from __future__ import annotations

from typing import Final

import asyncpg
import msgspec
from msgspec import UNSET

from db.archivable_rows import ArchivableRows
from db.columns import json_column
from db.database import Database
from db.workspace_changes import WorkspaceChanges as FileChanges
from db.workspace_files import DatabaseFiles
from domain.clock import timestamp
from domain.errors import Archived, InvalidInput
from domain.ids import Prefix, format_id, is_id, parse_id, uuid7
from domain.limits import MAX_MEMORIES_PER_ORG
from domain.memories import SYNC_NOT_SUPPORTED, ManualSource, Memory, MemoryChanges, source_of
from domain.resources import Lifecycle

ROWS: Final = ArchivableRows(
    table="memories",
    prefix=Prefix.MEMORY,
    noun="memory",
    maximum=MAX_MEMORIES_PER_ORG,
    full=f"An organization may have {MAX_MEMORIES_PER_ORG} memories; delete one first",
    taken="A memory of this name exists already",
    live=("active",),
)

OF_MEMORY: Final = "SELECT id, org_id, created_at, updated_at FROM memories WHERE id = $1 AND status <> 'deleted'"
_NOT_SYNCED: Final = """UPDATE memories SET sync_status = 'failed', last_sync_error = $2, updated_at = now()
    WHERE id = $1 RETURNING *"""


def memory_of(row: asyncpg.Record) -> Memory:
    def moment(name: str) -> str | None:
        return None if row[name] is None else timestamp(row[name])

    source = source_of(row["source_type"], msgspec.json.decode(row["source"]))
    return Memory(
        id=format_id(Prefix.MEMORY, row["id"]),
        name=row["name"],
        description=row["description"],
        source=source,
        source_type=row["source_type"],
        status=Lifecycle(row["status"]),
        sync_status=row["sync_status"],
        is_readonly=not isinstance(source, ManualSource),
        last_synced_at=moment("last_synced_at"),
        last_sync_error=row["last_sync_error"],
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
        archived_at=moment("archived_at"),
        deleted_at=moment("deleted_at"),
    )


def memory_files(pool: asyncpg.Pool, memory_id: str) -> DatabaseFiles:
    """Whether the caller may is checked before."""
    return DatabaseFiles(pool, OF_MEMORY, parse_id(Prefix.MEMORY, memory_id))


async def find_memory(pool: asyncpg.Pool, org_id: int, id_or_name: str) -> Memory | None:
    """An active memory, as a capability's configuration names it."""
    row = await pool.fetchrow(
        "SELECT * FROM memories WHERE org_id = $1 AND status = 'active' AND (name = $2 OR id = $3)",
        org_id,
        id_or_name,
        parse_id(Prefix.MEMORY, id_or_name) if is_id(Prefix.MEMORY, id_or_name) else None,
    )
    return None if row is None else memory_of(row)


async def list_memories(database: Database, *, search: str | None, include_archived: bool) -> list[Memory]:
    """Newest first. Each word of `search` must occur in the name or the description."""
    rows = await ROWS.list(database.pool, search=search, include_archived=include_archived)
    return [memory_of(row) for row in rows]


async def get_memory(database: Database, memory_id: str, *, editable: bool = False) -> Memory:
    """Raises `NotFound`, and, when it has to be `editable`, `Archived`."""
    memory = memory_of(await ROWS.get(database.pool, memory_id))
    if editable and memory.status is Lifecycle.ARCHIVED:
        raise Archived("The memory is archived, and so are its files")
    return memory


async def create_memory(database: Database, changes: MemoryChanges) -> Memory:
    """Raises `InvalidInput`, `InputTooLarge`, `NameTaken` or `ResourceLimit`."""
    changes.check()
    async with ROWS.writing(database) as connection:
        return memory_of(await ROWS.insert(connection, {"id": uuid7(), **_columns(changes)}))


async def update_memory(database: Database, memory_id: str, changes: MemoryChanges) -> Memory:
    """An archived memory takes no edit but the one that makes it active again, or deletes it."""
    changes.check()
    async with ROWS.writing(database) as connection:
        row = await ROWS.get(connection, memory_id, lock=True)
        status = None if changes.status is UNSET else changes.status
        changed = await ROWS.change(connection, row, _columns(changes), status)
        if changed["status"] == Lifecycle.DELETED:
            async with FileChanges.opened(connection, row["id"], row["org_id"]) as files:
                await files.delete_everything()
    return memory_of(changed)


async def archive_memory(database: Database, memory_id: str) -> None:
    """Archiving twice is fine."""
    async with ROWS.writing(database) as connection:
        await ROWS.archive(connection, await ROWS.get(connection, memory_id, lock=True))


async def sync_memory(database: Database, memory_id: str) -> Memory:
    """Notes, where everybody can read it, that it cannot be done. Raises `InvalidInput` for a memory without a remote source."""
    async with database.transaction() as connection:
        row = await ROWS.get(connection, memory_id, lock=True)
        if row["status"] == Lifecycle.ARCHIVED:
            raise Archived
        if row["source_type"] == "manual":
            raise InvalidInput("The memory is written by hand; there is nothing to sync it with")
        updated = await connection.fetchrow(_NOT_SYNCED, row["id"], SYNC_NOT_SUPPORTED)
        assert updated is not None
        return memory_of(updated)


def _columns(changes: MemoryChanges) -> dict[str, object]:
    values: dict[str, object] = {}
    if changes.name is not UNSET:
        values["name"] = changes.name
    if changes.description is not UNSET:
        values["description"] = changes.description
    if changes.source is not UNSET:
        values["source_type"] = changes.source.source_type
        values["source"] = json_column(changes.source.stored())
        values |= {"sync_status": "idle", "last_sync_error": None, "last_synced_at": None}
    return values
