"""Rows and clock together. Every change is a row first and the clock second, so that a crash between the two leaves a row that
says what is still to be told; `settle` tells it.

An ended schedule that the clock still knows does no harm until then: what it fires finds the row, delivers nothing, and takes it
off the clock itself.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import structlog

from db.schedules import OVERDUE_SECONDS, PENDING_SECONDS, RECHECK_SECONDS, ScheduleStore, UnsettledSchedule, timing_of
from domain.errors import DependencyUnavailable, InvalidInput
from domain.ids import Prefix, derived_id, parse_id
from domain.schedules import (
    LIVE_STATUSES,
    MAX_SCHEDULES_PER_SESSION,
    Delivery,
    NewSchedule,
    Schedule,
    ScheduleClock,
    ScheduleRefused,
    Timing,
    Undelivered,
)

REFUSED: Final = "timezone: the server that keeps the time does not know this time zone"

log = structlog.get_logger(__name__)


class Scheduling:
    """Serves the port `domain.schedules.ScheduledDeliveries`, too."""

    def __init__(self, store: ScheduleStore, clock: ScheduleClock) -> None:
        self.store = store
        self._clock = clock

    async def create(
        self, org_id: int, session_id: str, new: NewSchedule, *, schedule_id: str | None = None
    ) -> Schedule:
        """While the clock is away the schedule stays pending, and is safe. Raises `InvalidInput`, `NotFound`, `ResourceLimit`."""
        created = await self.store.create(org_id, session_id, new, schedule_id=schedule_id)
        if created.status != "pending":
            return created
        try:
            if not await self._arm(timing_of(created)):
                raise InvalidInput(REFUSED, field="timezone")
        except DependencyUnavailable as error:
            log.warning("the clock is away, a schedule stays pending", schedule_id=created.id, error=error.message)
        return await self.store.get(org_id, session_id, created.id)

    async def cancel(self, org_id: int, session_id: str, schedule_id: str) -> Schedule:
        """Nothing is delivered any more once this has returned. Raises `NotFound`."""
        ended = await self.store.cancel(org_id, session_id, schedule_id)
        try:
            await self.forget(schedule_id)
        except DependencyUnavailable as error:
            log.warning("the clock is away, it is told later", schedule_id=schedule_id, error=error.message)
        return ended

    async def deliver(self, schedule_id: str, due_at: datetime) -> Delivery | Undelivered:
        return await self.store.deliver(schedule_id, due_at)

    async def forget(self, schedule_id: str) -> None:
        await self._clock.disarm(schedule_id)
        await self.store.forgotten(schedule_id)

    async def settle(
        self,
        *,
        pending_seconds: float = PENDING_SECONDS,
        overdue_seconds: float = OVERDUE_SECONDS,
        recheck_seconds: float = RECHECK_SECONDS,
    ) -> int:
        """Look into what is unsettled; returns how many there were. Raises `DependencyUnavailable`."""
        found = await self.store.claim_unsettled(
            pending_seconds=pending_seconds, overdue_seconds=overdue_seconds, recheck_seconds=recheck_seconds
        )
        for one in found:
            if one.timing is None:
                await self.forget(one.id)
            elif one.pending:
                await self._arm(one.timing)
            else:
                await self._look_into_overdue(one.timing)
            log.info("schedule settled", schedule_id=one.id, ended=one.timing is None, pending=one.pending)
        return len(found)

    async def restore(self) -> int:
        """Put on the clock what it has lost; returns how many. Raises `DependencyUnavailable`."""
        live = await self.store.live()
        known = await self._clock.known() if live else set[str]()
        lost: list[UnsettledSchedule] = [one for one in live if one.id not in known]
        for one in lost:
            assert one.timing is not None
            await self._arm(one.timing)
        return len(lost)

    async def _arm(self, timing: Timing) -> bool:
        """False when the clock can't keep it; the schedule has failed then."""
        try:
            await self._clock.arm(timing)
        except ScheduleRefused:
            await self.store.end(timing.schedule_id, "failed", "refused")
            await self.store.forgotten(timing.schedule_id)
            return False
        if not await self.store.armed(timing.schedule_id):
            # It ended while the clock was being told, and may have been taken off before it was on.
            await self.forget(timing.schedule_id)
        return True

    async def _look_into_overdue(self, timing: Timing) -> None:
        """The time has passed and nothing was delivered: lost with the clock's memory, missed, or late."""
        paused = await self._clock.is_paused(timing.schedule_id)
        if paused is None:
            await self._arm(timing)
        elif timing.cron is not None:
            # The clock goes on by itself; only the time that is shown is of the past.
            await self._postpone(timing)
        elif not paused:
            await self._clock.fire_now(timing.schedule_id)

    async def _postpone(self, timing: Timing) -> None:
        assert timing.cron is not None
        next_at = timing.cron.next_after(datetime.now(UTC), timing.timezone)
        if next_at is None:
            await self.store.end(timing.schedule_id, "completed", "no_more_times")
        else:
            await self.store.postpone(timing.schedule_id, next_at)


class OneSessionsSchedules:
    """Serves the port `domain.schedules.SessionSchedules`."""

    def __init__(self, scheduling: Scheduling, session_id: str) -> None:
        self._scheduling = scheduling
        self._session_id = session_id

    async def create(self, new: NewSchedule, *, idempotency_key: str) -> Schedule:
        org_id = await self._scheduling.store.org_of(self._session_id)
        schedule_id = derived_id(Prefix.SCHEDULE, parse_id(Prefix.SESSION, self._session_id), idempotency_key)
        return await self._scheduling.create(org_id, self._session_id, new, schedule_id=schedule_id)

    async def cancel(self, schedule_id: str) -> Schedule:
        org_id = await self._scheduling.store.org_of(self._session_id)
        return await self._scheduling.cancel(org_id, self._session_id, schedule_id)

    async def live(self) -> list[Schedule]:
        org_id = await self._scheduling.store.org_of(self._session_id)
        found, _ = await self._scheduling.store.page(
            org_id, self._session_id, LIVE_STATUSES, offset=0, limit=MAX_SCHEDULES_PER_SESSION
        )
        return found[::-1]
