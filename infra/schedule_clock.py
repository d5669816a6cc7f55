"""Temporal Schedules as our clock: one per schedule, under the same id, whose action starts `ScheduledMessage` with that id.

Overlap is skipped: while a firing waits for a worker or the database, more of them would only be the same message again. What was
missed while Temporal was down is caught up for ten minutes when a schedule repeats (an older "good morning" is of no use, and
the next one comes), and without a limit when it is the only time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleBackfill,
    ScheduleCalendarSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleRange,
    ScheduleSpec,
    ScheduleState,
)
from temporalio.service import RPCError, RPCStatusCode

from domain.cron import Cron, ranges
from domain.errors import DependencyUnavailable
from domain.ids import Prefix, is_id
from domain.schedules import ScheduleRefused, Timing
from workflows import contract

RPC_TIMEOUT: Final = timedelta(seconds=5)
CRON_CATCH_UP: Final = timedelta(minutes=10)
ONE_SHOT_CATCH_UP: Final = timedelta(days=36_500)
MARGIN: Final = timedelta(seconds=2)
"""A Temporal Schedule never fires for times before its own creation, which is a moment after we ask for it."""

EVERY_DAY_OF_MONTH: Final = (ScheduleRange(1, 31),)
EVERY_DAY_OF_WEEK: Final = (ScheduleRange(0, 6),)


class TemporalScheduleClock:
    """Serves the port `domain.schedules.ScheduleClock`."""

    def __init__(self, client: Client, turns_queue: str = contract.TURNS_QUEUE) -> None:
        self._client = client
        self._turns_queue = turns_queue

    async def arm(self, timing: Timing) -> bool:
        now = datetime.now(UTC)
        with _translated():
            try:
                await self._client.create_schedule(
                    timing.schedule_id,
                    self._schedule(timing, now),
                    backfill=_missed(timing, now),
                    rpc_timeout=RPC_TIMEOUT,
                )
            except ScheduleAlreadyRunningError:
                return False
            except RPCError as error:
                if error.status is RPCStatusCode.INVALID_ARGUMENT:
                    raise ScheduleRefused from error
                raise
        return True

    async def disarm(self, schedule_id: str) -> None:
        with _translated(), _missing_is_fine():
            await self._client.get_schedule_handle(schedule_id).delete(rpc_timeout=RPC_TIMEOUT)

    async def fire_now(self, schedule_id: str) -> None:
        with _translated(), _missing_is_fine():
            handle = self._client.get_schedule_handle(schedule_id)
            await handle.trigger(overlap=ScheduleOverlapPolicy.SKIP, rpc_timeout=RPC_TIMEOUT)

    async def is_paused(self, schedule_id: str) -> bool | None:
        with _translated(), _missing_is_fine():
            found = await self._client.get_schedule_handle(schedule_id).describe(rpc_timeout=RPC_TIMEOUT)
            return found.schedule.state.paused
        return None

    async def known(self) -> set[str]:
        with _translated():
            listed = await self._client.list_schedules(rpc_timeout=RPC_TIMEOUT)
            return {one.id async for one in listed if is_id(Prefix.SCHEDULE, one.id)}

    def _schedule(self, timing: Timing, now: datetime) -> Schedule:
        action = ScheduleActionStartWorkflow(
            contract.SCHEDULED_MESSAGE_WORKFLOW,
            contract.ScheduledMessageStart(schedule_id=timing.schedule_id),
            # Temporal appends the time it fires for.
            id=timing.schedule_id,
            task_queue=self._turns_queue,
        )
        if timing.scheduled_at is not None:
            return Schedule(
                action=action,
                spec=ScheduleSpec(calendars=[_exactly(_not_missed(timing.scheduled_at, now))]),
                policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=ONE_SHOT_CATCH_UP),
                state=ScheduleState(limited_actions=True, remaining_actions=1),
            )
        assert timing.cron is not None
        return Schedule(
            action=action,
            spec=ScheduleSpec(calendars=calendars(timing.cron), time_zone_name=timing.timezone),
            policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=CRON_CATCH_UP),
        )


def calendars(cron: Cron) -> list[ScheduleCalendarSpec]:
    """A calendar asks for all of its fields; cron's "either kind of day" is therefore two of them."""
    days, weekdays = _ranges(cron.days), _ranges(cron.weekdays)
    pairs = [(days, EVERY_DAY_OF_WEEK), (EVERY_DAY_OF_MONTH, weekdays)] if cron.either_day else [(days, weekdays)]
    return [
        ScheduleCalendarSpec(
            minute=_ranges(cron.minutes),
            hour=_ranges(cron.hours),
            day_of_month=of_month,
            month=_ranges(cron.months),
            day_of_week=of_week,
        )
        for of_month, of_week in pairs
    ]


def _ranges(values: tuple[int, ...]) -> tuple[ScheduleRange, ...]:
    return tuple(ScheduleRange(first, last) for first, last in ranges(values))


def _not_missed(moment: datetime, now: datetime) -> datetime:
    earliest = (now + MARGIN).replace(microsecond=0) + timedelta(seconds=1)
    return max(moment, earliest)


def _exactly(moment: datetime) -> ScheduleCalendarSpec:
    """Without a time zone of its own the calendar is in UTC, as `moment` is."""
    return ScheduleCalendarSpec(
        second=(ScheduleRange(moment.second),),
        minute=(ScheduleRange(moment.minute),),
        hour=(ScheduleRange(moment.hour),),
        day_of_month=(ScheduleRange(moment.day),),
        month=(ScheduleRange(moment.month),),
        year=(ScheduleRange(moment.year),),
    )


def _missed(timing: Timing, now: datetime) -> list[ScheduleBackfill]:
    """What a repeating schedule would have caught up, had Temporal not lost it."""
    if timing.cron is None or timing.next_at > now:
        return []
    # A backfill begins after its start.
    start = max(timing.next_at, now - CRON_CATCH_UP) - timedelta(seconds=1)
    return [ScheduleBackfill(start_at=start, end_at=now, overlap=ScheduleOverlapPolicy.SKIP)]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RPCError as error:
        raise DependencyUnavailable from error


@contextlib.contextmanager
def _missing_is_fine() -> Iterator[None]:
    try:
        yield
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
