"""Keeps the clock in agreement with the stored schedules: after a crash between the two, after the clock lost its memory.

Every server runs one; rows are claimed, and telling the clock the same thing twice is harmless.
"""

from __future__ import annotations

import structlog

from db.scheduling import Scheduling

log = structlog.get_logger(__name__)


class ScheduleReconciler:
    def __init__(self, scheduling: Scheduling) -> None:
        self._scheduling = scheduling
        self._restored = False

    async def once(self) -> int:
        """One round; the first also looks for everything the clock should know. Returns how many schedules were looked into."""
        settled = await self._scheduling.settle()
        # Second: a Temporal that will not list its schedules must not keep us from setting them.
        if not self._restored:
            restored = await self._scheduling.restore()
            self._restored = True
            if restored:
                log.info("schedules put on the clock that it did not know", count=restored)
        return settled
