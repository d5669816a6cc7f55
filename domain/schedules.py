"""Messages that come back to a session later: once, or again and again. What may be asked for, and the ports around it.

PostgreSQL says which schedules there are and what they say; Temporal is the clock that fires them. The two are kept in agreement
by `pending` (PostgreSQL knows the schedule, Temporal may not) and a reconciler.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, Literal, Protocol

from msgspec import Struct

from domain.cron import Cron, check_time_zone, parse_cron, time_zone
from domain.errors import InvalidInput
from domain.limits import check_text
from domain.ports import TurnLabels

MAX_SCHEDULES_PER_SESSION: Final = 5
MAX_SCHEDULES_PER_ORG: Final = 100
"""Active ones. The first is counted under the session's lock, the second without any."""

MIN_SPACING_SECONDS: Final = 300
MESSAGE_MAX_BYTES: Final = 32 * 1024
"""It is read by a model at every firing."""
MAX_AHEAD: Final = timedelta(days=3653)
"""Ten years: beyond, it is a slip of the pen."""

_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:?\d\d)?")

ScheduleStatus = Literal["pending", "active", "completed", "cancelled", "failed"]
ALL_STATUSES: Final[tuple[ScheduleStatus, ...]] = ("pending", "active", "completed", "cancelled", "failed")
LIVE_STATUSES: Final[tuple[ScheduleStatus, ...]] = ("pending", "active")

EndReason = Literal[
    "fired", "cancelled", "session_deleted", "agent_archived", "harness_archived", "no_more_times", "refused"
]


class Schedule(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule as it is served. Times are RFC 3339 in UTC.

    `pending` will fire like an active one: the clock is about to be set.
    """

    id: str
    session_id: str
    status: ScheduleStatus
    message: str
    timezone: str
    trigger_count: int
    created_at: str
    updated_at: str
    scheduled_at: str | None = None
    cron_expression: str | None = None
    next_trigger_at: str | None = None
    last_triggered_at: str | None = None
    ended_at: str | None = None
    end_reason: EndReason | None = None


class NewSchedule(Struct, frozen=True, kw_only=True):
    """A checked request. Either `scheduled_at`, in UTC and whole seconds, or `cron_expression`; `first_at` is the first time."""

    message: str
    timezone: str
    first_at: datetime
    scheduled_at: datetime | None = None
    cron_expression: str | None = None


class Timing(Struct, frozen=True, kw_only=True):
    """What the clock needs to know of a schedule: no message. `next_at` is when it is due next, or was due."""

    schedule_id: str
    timezone: str
    next_at: datetime
    scheduled_at: datetime | None = None
    cron: Cron | None = None


class ScheduleRefused(Exception):
    """The clock cannot keep this schedule, now or ever: its server does not know the time zone, say."""


class ScheduleClock(Protocol):
    """What fires schedules. Every method raises `DependencyUnavailable` when it cannot be reached, and may be repeated."""

    async def arm(self, timing: Timing) -> bool:
        """See to it that the schedule fires; whether it did not know the schedule before. Raises `ScheduleRefused`."""
        ...

    async def disarm(self, schedule_id: str) -> None:
        """Forget a schedule; not knowing it is fine."""
        ...

    async def fire_now(self, schedule_id: str) -> None:
        """Fire once, unless a firing is under way."""
        ...

    async def is_paused(self, schedule_id: str) -> bool | None:
        """Whether somebody has stopped it at the clock; None when the clock does not know it."""
        ...

    async def known(self) -> set[str]:
        """All schedules the clock has; those of the last seconds may be missing."""
        ...


class Delivery(Struct, frozen=True, kw_only=True):
    """A message that a schedule has put into its session; the session's turn is to be told. `over`: it was the last one."""

    session_id: str
    message_id: str
    steered: bool
    ends_wait: bool
    labels: TurnLabels
    over: bool


class Undelivered(StrEnum):
    """Why a firing says nothing."""

    OVER = "over"
    """The schedule has ended, and is to be taken off the clock."""
    UNREAD = "unread"
    """Its last message is still unread: the session is paused, or waits for somebody. More of the same would only pile up."""


class ScheduledDeliveries(Protocol):
    async def deliver(self, schedule_id: str, due_at: datetime) -> Delivery | Undelivered:
        """Put the message into its session, once for each time it is due."""
        ...

    async def forget(self, schedule_id: str) -> None:
        """Take a schedule that is over off the clock. Raises `DependencyUnavailable`."""
        ...


class SessionSchedules(Protocol):
    """The schedules of one session, for its tools. Methods raise errors of `domain.errors` whose text a model may read."""

    async def create(self, new: NewSchedule, *, idempotency_key: str) -> Schedule:
        """The same schedule for the same key."""
        ...

    async def cancel(self, schedule_id: str) -> Schedule:
        """The schedule as it is then: one that has ended already stays as it ended."""
        ...

    async def live(self) -> list[Schedule]:
        """Those that will fire, oldest first."""
        ...


def new_schedule(
    message: str,
    *,
    scheduled_at: str | None = None,
    cron_expression: str | None = None,
    timezone: str | None = None,
    now: datetime | None = None,
) -> NewSchedule:
    """Check a request. A `scheduled_at` without an offset is a time in `timezone`. Raises `InvalidInput`."""
    now = now or datetime.now(UTC)
    if not message.strip():
        raise InvalidInput("message must not be empty", field="message")
    # Before its size: half a surrogate pair has no bytes to count.
    if _NOT_STORABLE.search(message):
        raise InvalidInput("message must not contain U+0000 or half of a surrogate pair", field="message")
    check_text(message, "message", MESSAGE_MAX_BYTES)
    zone = timezone or "UTC"
    check_time_zone(zone)
    if (scheduled_at is None) == (cron_expression is None):
        raise InvalidInput(
            "Give either scheduled_at, for one time, or cron_expression, to repeat", field="scheduled_at"
        )
    if scheduled_at is not None:
        moment = _moment(scheduled_at, zone, now)
        return NewSchedule(message=message, timezone=zone, first_at=moment, scheduled_at=moment)
    assert cron_expression is not None
    expression = cron_expression.strip()
    first = _first_time(parse_cron(expression), zone, now)
    return NewSchedule(message=message, timezone=zone, first_at=first, cron_expression=expression)


def _moment(text: str, zone: str, now: datetime, field: str = "scheduled_at") -> datetime:
    if not _TIME.fullmatch(text):
        raise InvalidInput(f"{field} must be an RFC 3339 time such as `2030-01-31T09:00:00+01:00`", field=field)
    try:
        moment = datetime.fromisoformat(text.upper())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=time_zone(zone))
        moment = moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{field} is not a time that exists: {error}", field=field) from None
    if moment.microsecond:
        # Up: the clock counts whole seconds, and must not be early.
        moment = moment.replace(microsecond=0) + timedelta(seconds=1)
    shown = now.isoformat(timespec="seconds").replace("+00:00", "Z")
    if moment <= now:
        raise InvalidInput(f"{field} is in the past; it is {shown} now", field=field)
    if moment - now > MAX_AHEAD:
        raise InvalidInput(f"{field} is more than ten years ahead; it is {shown} now", field=field)
    return moment


def _first_time(cron: Cron, zone: str, now: datetime, field: str = "cron_expression") -> datetime:
    first = cron.next_after(now, zone)
    if first is None:
        raise InvalidInput(f"{field} names a date that does not exist: it would never fire", field=field)
    gap = cron.shortest_gap_seconds(now.date())
    if gap < MIN_SPACING_SECONDS:
        raise InvalidInput(
            f"{field} would fire twice within {gap} seconds; {MIN_SPACING_SECONDS} seconds must lie between two times",
            field=field,
        )
    return first
