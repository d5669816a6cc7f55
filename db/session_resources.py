"""What tools may use of their session, from PostgreSQL: its workspace's files, its storage, and what it is."""

from __future__ import annotations

from typing import Final

import asyncpg
import msgspec

from db.event_log import append_in
from db.session_stats import usage_columns
from db.session_storage import DatabaseStorage
from db.workspace_files import DatabaseFiles
from domain.clock import timestamp
from domain.events import NewEvent, SessionTitleUpdated, TokenUsage
from domain.ids import Prefix, parse_id
from domain.session_info import SessionInfo
from domain.turns import SessionGone
from infra.encryption import Keyring

_INFO: Final = """
SELECT s.title, s.locale, s.created_at, t.turn_count, t.input_tokens, t.output_tokens, t.cache_read_tokens,
       t.cache_creation_tokens, t.estimated_cost_usd, t.actual_cost_usd, t.effective_cost_usd,
       coalesce(h.display_name, h.name) AS harness, coalesce(a.display_name, a.name) AS agent, a.public_id AS agent_id,
       (SELECT u.last_result->>'model' FROM turns u WHERE u.session_id = s.id AND u.last_result IS NOT NULL
        ORDER BY u.started_at DESC LIMIT 1) AS model
FROM sessions s JOIN session_state t ON t.session_id = s.id JOIN harnesses h ON h.id = s.harness_id
LEFT JOIN agents a ON a.id = s.agent_id
WHERE s.id = $1 AND s.deleted_at IS NULL
"""
_LOCK_TITLE: Final = "SELECT title FROM sessions WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE"


class DatabaseResources:
    """Serves the port `domain.turns.SessionResources`."""

    def __init__(self, pool: asyncpg.Pool, keyring: Keyring) -> None:
        self._pool = pool
        self._keyring = keyring

    def files(self, session_id: str) -> DatabaseFiles:
        return DatabaseFiles.of_session(self._pool, session_id)

    def storage(self, session_id: str) -> DatabaseStorage:
        return DatabaseStorage(self._pool, self._keyring, session_id)

    async def session_info(self, session_id: str) -> SessionInfo:
        row = await self._pool.fetchrow(_INFO, parse_id(Prefix.SESSION, session_id))
        if row is None:
            raise SessionGone
        return SessionInfo(
            id=session_id,
            title=row["title"],
            agent=row["agent"],
            agent_id=row["agent_id"],
            harness=row["harness"],
            model=row["model"],
            locale=row["locale"],
            created_at=timestamp(row["created_at"]),
            turn_count=row["turn_count"],
            usage=msgspec.convert(usage_columns(dict(row)), TokenUsage),
        )

    async def set_title(self, session_id: str, title: str) -> None:
        key = parse_id(Prefix.SESSION, session_id)
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(_LOCK_TITLE, key)
            if row is None:
                raise SessionGone
            # A call that runs again after a crash finds its title and says nothing twice.
            if row["title"] == title:
                return
            await connection.execute("UPDATE sessions SET title = $2, updated_at = now() WHERE id = $1", key, title)
            updated = SessionTitleUpdated(title=title, previous_title=row["title"])
            # Readers in every process, this one's too, hear of it from PostgreSQL.
            await append_in(connection, session_id, [NewEvent(data=updated)])  # type: ignore[arg-type]  # a pool's proxy
