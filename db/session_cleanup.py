"""What a deleted session leaves behind besides its log: values, secrets, databases, lasting decisions, files of its workspace.

Rows of the session go in the transaction that deletes it. Files may be many: they go afterwards, in batches, so that
nobody waits long for the locks on shared content. What is still to do is told by the rows themselves and not by a note, so a
crash leaves nothing that the next look does not find, and what older versions have left is found as well.

A workspace is cleared away when no session has it any more and nobody made it as such: it is a session's own, and that session is
deleted, or it was deleted over the API. From then on its status says so, and no new session can join it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import asyncpg
import structlog

from db import workspace_blobs
from db.database import Database

BATCH_ROWS: Final = 500
MAX_WORKSPACES_AT_ONCE: Final = 100

_TABLES: Final = (
    "session_values",  # before its history: a trigger writes what is deleted into that
    "session_value_history",
    "session_secrets",
    "session_databases",
    "session_database_writes",
    "tool_approval_rules",
)
_FORGET: Final = tuple(f"DELETE FROM {table} WHERE session_id = ANY($1::uuid[])" for table in _TABLES)  # noqa: S608
_FORGET_LEFTOVERS: Final = tuple(
    f"DELETE FROM {table} x USING sessions s WHERE s.id = x.session_id AND s.deleted_at IS NOT NULL"  # noqa: S608
    for table in _TABLES
)

_IS_UNWANTED: Final = """
(w.status = 'deleted' OR EXISTS (SELECT 1 FROM sessions o WHERE o.id = w.id AND o.deleted_at IS NOT NULL))
AND NOT EXISTS (SELECT 1 FROM sessions s WHERE s.workspace_id = w.id AND s.deleted_at IS NULL)
"""
_UNWANTED: Final = f"""SELECT w.id FROM workspace_usage u JOIN workspaces w ON w.id = u.workspace_id WHERE {_IS_UNWANTED}
    LIMIT {MAX_WORKSPACES_AT_ONCE}"""  # noqa: S608
# Whoever makes a session with a workspace locks that row, too. What is asked behind the lock is a statement of its own: it sees
# what was committed before the lock was had.
_LOCK: Final = "SELECT org_id FROM workspaces WHERE id = $1 FOR NO KEY UPDATE"
_MARK: Final = f"""UPDATE workspaces w SET status = 'deleted', deleted_at = coalesce(w.deleted_at, now()), updated_at = now()
    WHERE w.id = $1 AND {_IS_UNWANTED} RETURNING w.id"""  # noqa: S608
# Also the lock of all who change files. At this moment nothing has been there before, so the trigger keeps no former version.
_FREEZE: Final = "UPDATE workspace_usage SET changed_at = '-infinity' WHERE workspace_id = $1 RETURNING workspace_id"
_DELETE_ENTRIES: Final = f"""DELETE FROM workspace_entries WHERE workspace_id = $1 AND path IN (
    SELECT path FROM workspace_entries WHERE workspace_id = $1 ORDER BY path LIMIT {BATCH_ROWS}) RETURNING blob_hash"""  # noqa: S608
_DELETE_VERSIONS: Final = f"""DELETE FROM workspace_history WHERE workspace_id = $1 AND total IN (
    SELECT total FROM workspace_history WHERE workspace_id = $1 ORDER BY total LIMIT {BATCH_ROWS}) RETURNING blob_hash"""  # noqa: S608
_DELETE_RECEIPTS: Final = "DELETE FROM workspace_receipts WHERE workspace_id = $1"
_DELETE_USAGE: Final = "DELETE FROM workspace_usage WHERE workspace_id = $1"

log = structlog.get_logger(__name__)


async def forget_sessions(connection: asyncpg.Connection, sessions: Sequence[UUID]) -> None:
    """Part of the transaction that deletes them and has locked their rows, as writers of all this do."""
    for query in _FORGET:
        await connection.execute(query, sessions)


class Cleanup:
    """Each method may be broken off anywhere and called again, by several servers at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def once(self) -> int:
        """Everything that is there to clear away; returns how many workspaces that were."""
        for query in _FORGET_LEFTOVERS:
            await self._database.pool.execute(query)
        count = 0
        while unwanted := await self._database.pool.fetch(_UNWANTED):
            cleared = await self.clear([row["id"] for row in unwanted])
            count += cleared
            if not cleared:  # others are at it, or somebody wants them after all
                break
        if count:
            log.info("workspaces of deleted sessions cleared away", count=count)
        return count

    async def clear(self, workspaces: Sequence[UUID]) -> int:
        """Those of them that nobody wants any more; returns how many they were."""
        count = 0
        for workspace in workspaces:
            org_id = await self._claimed(workspace)
            if org_id is not None:
                while await self._clear_batch(workspace, org_id):
                    pass
                count += 1
        return count

    async def _claimed(self, workspace: UUID) -> int | None:
        async with self._database.transaction() as connection:
            org_id: int | None = await connection.fetchval(_LOCK, workspace)
            return None if await connection.fetchval(_MARK, workspace) is None else org_id

    async def _clear_batch(self, workspace: UUID, org_id: int) -> bool:
        """Whether there may be more."""
        async with self._database.transaction() as connection:
            if await connection.fetchval(_FREEZE, workspace) is None:
                return False
            rows = await connection.fetch(_DELETE_ENTRIES, workspace)
            if len(rows) < BATCH_ROWS:
                rows += await connection.fetch(_DELETE_VERSIONS, workspace)
            is_empty = not rows
            if is_empty:
                await connection.execute(_DELETE_RECEIPTS, workspace)
                await connection.execute(_DELETE_USAGE, workspace)
            await workspace_blobs.release(
                connection, org_id, {row["blob_hash"] for row in rows if row["blob_hash"] is not None}
            )
            return not is_empty
