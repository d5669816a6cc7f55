"""What must happen to tasks whoever dies: deadlines, words that were lost, children that nobody has followed.

A deadline is a column, so it outlives every worker and server. Every server's reconciler does this; two at once do no harm.
"""

from __future__ import annotations

from typing import Final

import structlog

from db.session_tasks import TaskStore
from db.task_rows import OPEN
from domain.ids import Prefix, format_id
from domain.tasks import TaskError

WORD_LOST_SECONDS: Final = 5.0
"""A child that is told to stop does so in well under a second, unless the word was lost."""

UNFOLLOWED_SECONDS: Final = 5.0
"""A child is followed right after each of its steps, unless its worker died there. Not at once here: it may still be about to."""

_OVERDUE: Final = (
    f"SELECT id FROM session_tasks WHERE {OPEN} AND deadline_at < now() AND cancel_requested_at IS NULL LIMIT 100"  # noqa: S608
)
_UNTOLD: Final = f"""
SELECT id FROM session_tasks WHERE {OPEN} AND cancel_requested_at < now() - make_interval(secs => $1)
AND updated_at < now() - make_interval(secs => $1) LIMIT 100
"""  # noqa: S608
# Of those that look different from their children; the busy ones among them are looked at after a rest.
_UNFOLLOWED: Final = f"""
SELECT k.id, k.child_session_id FROM session_tasks k JOIN session_state c ON c.session_id = k.child_session_id
WHERE {OPEN} AND c.updated_at < now() - make_interval(secs => $1) AND k.updated_at < now() - make_interval(secs => $1)
AND ((c.status = 'waiting_for_tool_results') <> (k.state = 'awaiting_input')
     OR c.turn_id IS NULL AND NOT EXISTS (SELECT 1 FROM inbox i WHERE i.session_id = c.session_id)) LIMIT 100
"""  # noqa: S608
_ABANDONED: Final = f"""
SELECT k.id FROM session_tasks k JOIN sessions s ON s.id = k.session_id
WHERE {OPEN} AND s.deleted_at IS NOT NULL AND k.cancel_requested_at IS NULL LIMIT 100
"""  # noqa: S608
_TOUCH: Final = "UPDATE session_tasks SET updated_at = clock_timestamp() WHERE id = $1"

log = structlog.get_logger(__name__)


class TaskUpkeep:
    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def once(self) -> int:
        """Enforce deadlines, repeat words that were lost, follow children nobody has followed; returns how many that were."""
        pool = self._store.pool
        overdue = await pool.fetch(_OVERDUE)
        for row in overdue:
            hours = self._store.limits.background_seconds / 3600
            timeout = TaskError(kind="timeout", message=f"The task did not end within {hours:g} hours and was stopped.")
            await self._store.stop(row["id"], reason="it took too long", error=timeout)
        untold = await pool.fetch(_UNTOLD, WORD_LOST_SECONDS)
        for row in untold:
            await self._store.stop(row["id"], reason="it was cancelled before")
        abandoned = await pool.fetch(_ABANDONED)  # begun while their parent was being deleted
        for row in abandoned:
            await self._store.stop(row["id"], reason="its session was deleted", quiet=True)
        unfollowed = await pool.fetch(_UNFOLLOWED, UNFOLLOWED_SECONDS)
        news = 0
        for row in unfollowed:
            if await self._store.follower.follow(format_id(Prefix.SESSION, row["child_session_id"])):
                news += 1
            else:
                await pool.execute(_TOUCH, row["id"])
        count = len(overdue) + len(untold) + len(abandoned) + news
        if count:
            log.info("tasks looked after", count=count)
        return count
