"""Workspaces: CRUD and life cycle. Their files are in `db.workspace_files`.

A session that brings no workspace gets one of its own, with the session's UUID. Lists leave those out: there are as many as there
are sessions, and a session says which is its.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
from msgspec import UNSET

from db.columns import column_values, like_patterns, read_resource
from db.database import Database
from db.workspace_changes import WorkspaceChanges as FileChanges
from domain.errors import Archived, Conflict, NotFound, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id, uuid7
from domain.limits import MAX_WORKSPACES_PER_ORG
from domain.resources import Lifecycle, Workspace, WorkspaceChanges

SHARED: Final = "NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = workspaces.id)"
IN_USE: Final = "SELECT EXISTS (SELECT 1 FROM sessions WHERE workspace_id = $1 AND deleted_at IS NULL)"


def workspace_of(row: asyncpg.Record) -> Workspace:
    return read_resource(dict(row), Workspace, id=format_id(Prefix.WORKSPACE, row["id"]))


async def list_workspaces(database: Database, *, search: str | None, include_archived: bool) -> list[Workspace]:
    """Newest first. Each word of `search` must occur in the name or the description."""
    states = [Lifecycle.ACTIVE, Lifecycle.ARCHIVED] if include_archived else [Lifecycle.ACTIVE]
    arguments: list[object] = [DEFAULT_ORG_ID, states]
    condition = ""
    for pattern in like_patterns(search):
        arguments.append(pattern)
        condition += f" AND concat_ws(E'\\n', name, description) ILIKE ${len(arguments)}"
    rows = await database.pool.fetch(
        f"SELECT * FROM workspaces WHERE org_id = $1 AND status = ANY($2::text[]) AND {SHARED}{condition} "  # noqa: S608
        "ORDER BY created_at DESC, id DESC",
        *arguments,
    )
    return [workspace_of(row) for row in rows]


async def get_workspace(database: Database, workspace_id: str, *, editable: bool = False) -> Workspace:
    """Raises `NotFound`, and, when it has to be `editable`, `Archived`."""
    row = await database.pool.fetchrow(
        "SELECT * FROM workspaces WHERE org_id = $1 AND id = $2 AND status <> 'deleted'",
        DEFAULT_ORG_ID,
        parse_id(Prefix.WORKSPACE, workspace_id),
    )
    if row is None:
        raise _not_found(workspace_id)
    if editable and row["status"] == Lifecycle.ARCHIVED:
        raise Archived("The workspace is archived, and so are its files")
    return workspace_of(row)


async def create_workspace(database: Database, changes: WorkspaceChanges) -> Workspace:
    changes.check()
    async with database.transaction() as connection:
        count = await connection.fetchval(
            f"SELECT count(*) FROM workspaces WHERE org_id = $1 AND status <> 'deleted' AND {SHARED}",  # noqa: S608
            DEFAULT_ORG_ID,
        )
        if (count or 0) >= MAX_WORKSPACES_PER_ORG:
            raise ResourceLimit(f"An organization may have {MAX_WORKSPACES_PER_ORG} workspaces; delete one first")
        row = await connection.fetchrow(
            "INSERT INTO workspaces (id, org_id, name, description) VALUES ($1, $2, $3, $4) RETURNING *",
            uuid7(),
            DEFAULT_ORG_ID,
            changes.name,
            None if changes.description is UNSET else changes.description,
        )
        assert row is not None
        return workspace_of(row)


async def update_workspace(database: Database, workspace_id: str, changes: WorkspaceChanges) -> Workspace:
    """An archived workspace takes no edit but the one that makes it active again, or deletes it."""
    changes.check()
    async with database.transaction() as connection:
        row = await _locked(connection, workspace_id)
        values = column_values(changes)
        before = Lifecycle(row["status"])
        wanted = Lifecycle(str(values.get("status", before)))
        if wanted is Lifecycle.DELETED:
            if before is not Lifecycle.ARCHIVED:
                raise Conflict("Only an archived workspace can be deleted; archive it first")
            return await _delete(connection, row)
        if before is Lifecycle.ARCHIVED and wanted is Lifecycle.ARCHIVED and values.keys() - {"status"}:
            raise Archived
        if wanted is not before:
            values["archived_at"] = datetime.now(UTC) if wanted is Lifecycle.ARCHIVED else None
        return await _update(connection, row["id"], values) if values else workspace_of(row)


async def archive_workspace(database: Database, workspace_id: str) -> None:
    """Archiving twice is fine. The sessions that have the workspace go on."""
    async with database.transaction() as connection:
        row = await _locked(connection, workspace_id)
        if row["status"] != Lifecycle.ARCHIVED:
            await _update(connection, row["id"], {"status": Lifecycle.ARCHIVED.value, "archived_at": datetime.now(UTC)})


async def _delete(connection: asyncpg.Connection, row: asyncpg.Record) -> Workspace:
    """The row stays, for the sessions that go on with it, and with it the files as long as there are such sessions."""
    key: UUID = row["id"]
    deleted = await _update(connection, key, {"status": Lifecycle.DELETED.value, "deleted_at": datetime.now(UTC)})
    if not await connection.fetchval(IN_USE, key):
        async with FileChanges.opened(connection, key, row["org_id"]) as files:
            await files.delete_everything()
    return deleted


async def _update(connection: asyncpg.Connection, key: UUID, values: dict[str, object]) -> Workspace:
    assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(values, 2))
    row = await connection.fetchrow(
        f"UPDATE workspaces SET {assignments}, updated_at = now() WHERE id = $1 RETURNING *",  # noqa: S608
        key,
        *values.values(),
    )
    assert row is not None
    return workspace_of(row)


async def _locked(connection: asyncpg.Connection, workspace_id: str) -> asyncpg.Record:
    row = await connection.fetchrow(
        "SELECT * FROM workspaces WHERE org_id = $1 AND id = $2 AND status <> 'deleted' FOR NO KEY UPDATE",
        DEFAULT_ORG_ID,
        parse_id(Prefix.WORKSPACE, workspace_id),
    )
    if row is None:
        raise _not_found(workspace_id)
    return row


def _not_found(workspace_id: str) -> NotFound:
    return NotFound(f"There is no workspace `{workspace_id[:80]}`")
