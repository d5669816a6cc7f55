"""What the values of a session's storage were; the history is written by a trigger, as that of files is (`db.workspace_history`).

Writers of a session's values lock its row in `sessions`. So does, before calling anything here, whoever wants to copy or restore
them. Secrets have no history.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

_COLUMNS: Final = "key, value, created_at, updated_at"
_AS_OF: Final = f"""
    SELECT {_COLUMNS}, since FROM session_values WHERE session_id = $1 AND since <= $2
    UNION ALL
    SELECT {_COLUMNS}, since FROM session_value_history WHERE session_id = $1 AND since <= $2 AND until > $2
"""  # noqa: S608
_DELETE_OTHERS: Final = f"""
WITH target AS ({_AS_OF})
DELETE FROM session_values v WHERE v.session_id = $1
    AND NOT EXISTS (SELECT 1 FROM target t WHERE t.key = v.key AND t.value = v.value)
"""  # noqa: S608
_INSERT_MISSING: Final = f"""
INSERT INTO session_values (session_id, {_COLUMNS}) SELECT $1, {_COLUMNS} FROM ({_AS_OF}) AS target
ON CONFLICT (session_id, key) DO NOTHING
"""  # noqa: S608
_COPY: Final = f"""INSERT INTO session_values (session_id, {_COLUMNS}, since)
    SELECT $2, {_COLUMNS}, since FROM session_values WHERE session_id = $1"""  # noqa: S608
_COPY_AS_OF: Final = f"""INSERT INTO session_values (session_id, {_COLUMNS}, since)
    SELECT $3, {_COLUMNS}, since FROM ({_AS_OF}) AS target"""  # noqa: S608
_COPY_VERSIONS: Final = f"""INSERT INTO session_value_history (session_id, total, since, until, {_COLUMNS})
    SELECT $2, total, since, until, {_COLUMNS} FROM session_value_history
    WHERE session_id = $1 AND ($3::timestamptz IS NULL OR until <= $3)"""  # noqa: S608


async def restore(connection: asyncpg.Connection, session: UUID, moment: datetime) -> None:
    await connection.execute(_DELETE_OTHERS, session, moment)
    await connection.execute(_INSERT_MISSING, session, moment)


async def copy(connection: asyncpg.Connection, source: UUID, target: UUID, moment: datetime | None) -> None:
    """Into a session that has none yet: the values the source has now, or had at a moment, with what they were before."""
    if moment is None:
        await connection.execute(_COPY, source, target)
    else:
        await connection.execute(_COPY_AS_OF, source, moment, target)
    await connection.execute(_COPY_VERSIONS, source, target, moment)
