"""What the files of a workspace were: copied into another workspace, or made to be again what they were.

The history is written by a trigger (see the migration): a version has been there from `since` on and before `until`, and an entry
that is there still from `since` on. No statement here touches content; entries and versions refer to it by its hash.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from domain.errors import HistoryGone

_COLUMNS: Final = "path, id, org_id, is_directory, is_readonly, blob_hash, size_bytes, encoding, created_at, updated_at"
_FRESH: Final = _COLUMNS.replace("id,", "another_id_v1(id),", 1)

_AS_OF: Final = f"""
    SELECT {_COLUMNS}, since FROM workspace_entries WHERE workspace_id = $1 AND since <= $2
    UNION ALL
    SELECT {_COLUMNS}, since FROM workspace_history WHERE workspace_id = $1 AND since <= $2 AND until > $2
"""  # noqa: S608
_DELETE_OTHERS: Final = f"""
WITH target AS ({_AS_OF})
DELETE FROM workspace_entries e WHERE e.workspace_id = $1 AND NOT EXISTS (
    SELECT 1 FROM target t WHERE t.path = e.path AND t.id = e.id AND t.is_directory = e.is_directory
        AND t.blob_hash IS NOT DISTINCT FROM e.blob_hash AND t.is_readonly = e.is_readonly AND t.encoding = e.encoding)
"""  # noqa: S608
# What was deleted just now is in the history by now, so the same query still tells the whole target.
_INSERT_MISSING: Final = f"""
INSERT INTO workspace_entries (workspace_id, {_COLUMNS})
SELECT $1, {_COLUMNS} FROM ({_AS_OF}) AS target ORDER BY path
ON CONFLICT (workspace_id, path) DO NOTHING
"""  # noqa: S608

_HOLD: Final = "SELECT known_since FROM workspace_usage WHERE workspace_id = $1 FOR SHARE"
_COPY_ENTRIES: Final = f"""
INSERT INTO workspace_entries (workspace_id, {_COLUMNS}, since)
SELECT $2, {_FRESH}, since FROM workspace_entries WHERE workspace_id = $1 ORDER BY path
"""  # noqa: S608
_COPY_ENTRIES_AS_OF: Final = f"""
INSERT INTO workspace_entries (workspace_id, {_COLUMNS}, since)
SELECT $3, {_FRESH}, since FROM ({_AS_OF}) AS target ORDER BY path
"""  # noqa: S608
_COPY_VERSIONS: Final = f"""
INSERT INTO workspace_history (workspace_id, total, since, until, {_COLUMNS})
SELECT $2, total, since, until, {_COLUMNS} FROM workspace_history
WHERE workspace_id = $1 AND ($3::timestamptz IS NULL OR until <= $3)
"""  # noqa: S608
_COPY_USAGE: Final = """
INSERT INTO workspace_usage (workspace_id, size_bytes, entry_count, known_since)
SELECT $1, coalesce(sum(size_bytes), 0)::bigint, count(*), $2 FROM workspace_entries WHERE workspace_id = $1
"""


def check_known(known_since: datetime | None, moment: datetime) -> None:
    """Raises `HistoryGone`."""
    if known_since is not None and moment < known_since:
        raise HistoryGone


async def restore(connection: asyncpg.Connection, workspace: UUID, moment: datetime) -> None:
    """Only what differs is touched. The caller has the workspace's lock, knows that the moment is known, and counts anew."""
    await connection.execute(_DELETE_OTHERS, workspace, moment)
    await connection.execute(_INSERT_MISSING, workspace, moment)


async def copy(connection: asyncpg.Connection, source: UUID, target: UUID, moment: datetime | None) -> None:
    """Fill a workspace that has no files yet: with what the source has now, or had at a moment. What came before comes with it.

    Writers of the source wait until the transaction ends. Raises `HistoryGone`.
    """
    known_since: datetime | None = await connection.fetchval(_HOLD, source)
    if moment is None:
        await connection.execute(_COPY_ENTRIES, source, target)
    else:
        check_known(known_since, moment)
        await connection.execute(_COPY_ENTRIES_AS_OF, source, moment, target)
    await connection.execute(_COPY_VERSIONS, source, target, moment)
    await connection.execute(_COPY_USAGE, target, known_since)
