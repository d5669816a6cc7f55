"""What tools may use of their session, from PostgreSQL: its workspace's files, its storage, and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import asyncpg
import msgspec

from db.budget_rows import applying
from db.event_log import append_in
from db.memories import find_memory, memory_files
from db.scheduling import OneSessionsSchedules, Scheduling
from db.session_databases import StoredDatabases
from db.session_past import StoredPast
from db.session_stats import usage_columns
from db.session_storage import DatabaseStorage
from db.session_tasks import SessionTaskPort, TaskStore
from db.workspace_files import DatabaseFiles
from domain.budgets import Budget
from domain.clock import timestamp
from domain.events import NewEvent, SessionTitleUpdated, TokenUsage
from domain.ids import Prefix, parse_id
from domain.memory_access import OpenMemory
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

    def __init__(
        self,
        pool: asyncpg.Pool,
        keyring: Keyring,
        scheduling: Scheduling | None = None,
        tasks: TaskStore | None = None,
    ) -> None:
        self._pool = pool
        self._keyring = keyring
        self._scheduling = scheduling
        self._tasks = tasks

    def files(self, session_id: str) -> DatabaseFiles:
        return DatabaseFiles.of_session(self._pool, session_id)

    def storage(self, session_id: str) -> DatabaseStorage:
        return DatabaseStorage(self._pool, self._keyring, session_id)

    def past(self, session_id: str) -> StoredPast:
        return StoredPast(self._pool, session_id)

    def databases(self, session_id: str) -> StoredDatabases:
        return StoredDatabases(self._pool, session_id)

    def schedules(self, session_id: str) -> OneSessionsSchedules:
        assert self._scheduling is not None, "whoever runs tools that schedule gives them a clock"
        return OneSessionsSchedules(self._scheduling, session_id)

    def tasks(self, session_id: str) -> SessionTaskPort:
        assert self._tasks is not None, "whoever runs tools that begin turns gives them a way to"
        return SessionTaskPort(self._tasks, session_id)

    async def memory(self, session_id: str, id_or_name: str) -> OpenMemory | None:
        query = "SELECT org_id FROM sessions WHERE id = $1 AND deleted_at IS NULL"
        org_id = await self._pool.fetchval(query, parse_id(Prefix.SESSION, session_id))
        memory = None if org_id is None else await find_memory(self._pool, org_id, id_or_name)
        return memory and OpenMemory(
            name=memory.name,
            description=memory.description,
            is_readonly=memory.is_readonly,
            files=memory_files(self._pool, memory.id),
        )

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

    async def budgets(self, session_id: str) -> Sequence[Budget]:
        async with self._pool.acquire() as connection:
            return await applying(connection, parse_id(Prefix.SESSION, session_id))  # type: ignore[arg-type]  # a proxy

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
