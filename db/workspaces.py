"""Workspaces: CRUD and life cycle. Their files are in `db.workspace_files`.

A session that brings no workspace gets one of its own, with the session's UUID. Lists leave those out: there are as many as there
are sessions, and a session says which is its.
"""

from __future__ import annotations

from typing import Final

import asyncpg

from db.archivable_rows import ArchivableRows
from db.columns import column_values, read_resource
from db.database import Database
from db.workspace_changes import WorkspaceChanges as FileChanges
from domain.errors import Archived
from domain.ids import Prefix, format_id, uuid7
from domain.limits import MAX_WORKSPACES_PER_ORG
from domain.resources import Lifecycle, Workspace, WorkspaceChanges

ROWS: Final = ArchivableRows(
    table="workspaces",
    prefix=Prefix.WORKSPACE,
    noun="workspace",
    maximum=MAX_WORKSPACES_PER_ORG,
    full=f"An organization may have {MAX_WORKSPACES_PER_ORG} workspaces; delete one first",
    live=("active",),
    among="NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = workspaces.id)",
)
IN_USE: Final = "SELECT EXISTS (SELECT 1 FROM sessions WHERE workspace_id = $1 AND deleted_at IS NULL)"


def workspace_of(row: asyncpg.Record) -> Workspace:
    return read_resource(dict(row), Workspace, id=format_id(Prefix.WORKSPACE, row["id"]))


async def list_workspaces(database: Database, *, search: str | None, include_archived: bool) -> list[Workspace]:
    """Newest first. Each word of `search` must occur in the name or the description."""
    rows = await ROWS.list(database.pool, search=search, include_archived=include_archived)
    return [workspace_of(row) for row in rows]


async def get_workspace(database: Database, workspace_id: str, *, editable: bool = False) -> Workspace:
    """Raises `NotFound`, and, when it has to be `editable`, `Archived`."""
    workspace = workspace_of(await ROWS.get(database.pool, workspace_id))
    if editable and workspace.status is Lifecycle.ARCHIVED:
        raise Archived("The workspace is archived, and so are its files")
    return workspace


async def create_workspace(database: Database, changes: WorkspaceChanges) -> Workspace:
    """Raises `InvalidInput`, `InputTooLarge` or `ResourceLimit`."""
    changes.check()
    async with database.transaction() as connection:
        return workspace_of(await ROWS.insert(connection, {"id": uuid7(), **column_values(changes)}))


async def update_workspace(database: Database, workspace_id: str, changes: WorkspaceChanges) -> Workspace:
    """An archived workspace takes no edit but the one that makes it active again, or deletes it.

    A deleted one keeps its row, for the sessions that go on with it, and with it the files as long as there are such sessions.
    """
    changes.check()
    values = column_values(changes)
    status = values.pop("status", None)
    async with database.transaction() as connection:
        row = await ROWS.get(connection, workspace_id, lock=True)
        changed = await ROWS.change(connection, row, values, None if status is None else str(status))
        if changed["status"] == Lifecycle.DELETED and not await connection.fetchval(IN_USE, row["id"]):
            async with FileChanges.opened(connection, row["id"], row["org_id"]) as files:
                await files.delete_everything()
    return workspace_of(changed)


async def archive_workspace(database: Database, workspace_id: str) -> None:
    """Archiving twice is fine. The sessions that have the workspace go on."""
    async with database.transaction() as connection:
        await ROWS.archive(connection, await ROWS.get(connection, workspace_id, lock=True))
