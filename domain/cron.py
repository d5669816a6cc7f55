"""Cron expressions of five fields, read once and meant the same everywhere.

Ours and not a library's or Temporal's, because an expression is needed in two forms that must agree: as sets of values, which
become Temporal's structured calendars, and as times, which are shown and checked. Temporal's reading of a cron text differs from
cron's own in one point (a day of the month *and* a day of the week), so the text never reaches it.
`tests/integration/test_schedule_clock.py` compares the times here with those Temporal finds. A local time that a clock leaves out
does not fire, with both. The hour that a clock shows twice is the one difference: here its first showing counts, while Temporal
(1.32) takes the second or both, depending on the zone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property, lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Struct

from domain.errors import InvalidInput

EXPRESSION_MAX_CHARACTERS: Final = 200
HORIZON_DAYS: Final = 9 * 366
"""29 February comes every four years, and once a century after eight."""

MINUTES_PER_DAY: Final = 24 * 60

MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_ZONE_NAME: Final = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,3}")
_NOT_ZONES: Final = frozenset({"localtime", "posixrules", "Factory", "Local"})
"""Names that mean something else on another machine."""


class CronField(Struct, frozen=True, kw_only=True):
    """`names` stand for numbers from `low` on."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


FIELDS: Final = (
    CronField(name="minute", low=0, high=59),
    CronField(name="hour", low=0, high=23),
    CronField(name="day of the month", low=1, high=31),
    CronField(name="month", low=1, high=12, names=_MONTHS),
    # 7 is Sunday too.
    CronField(name="day of the week", low=0, high=7, names=_WEEKDAYS),
)


class Cron(Struct, frozen=True, kw_only=True, dict=True):
    """Which values each field takes, sorted. `weekdays` count from Sunday, 0. With `either_day` one of the two kinds of day is
    enough: cron's rule when neither field begins with `*`."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    either_day: bool

    def on(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (of_month or of_week) if self.either_day else (of_month and of_week)

    @cached_property
    def minutes_of_day(self) -> tuple[int, ...]:
        return tuple(hour * 60 + minute for hour, minute in itertools.product(self.hours, self.minutes))

    def next_after(self, moment: datetime, zone: str) -> datetime | None:
        """The first time after `moment`, in UTC; None when there is none in years."""
        return next(self.times_after(moment, zone), None)

    def times_after(self, moment: datetime, zone: str) -> Iterator[datetime]:
        """Times after `moment` in their order, in UTC."""
        local = time_zone(zone)
        # A day earlier: where a clock is set back over midnight, yesterday's local times come once more.
        first = moment.astimezone(local).date() - timedelta(days=1)
        for day in (first + timedelta(days=number) for number in range(HORIZON_DAYS)):
            if self.on(day):
                yield from (one for one in self._times_on(day, local) if one > moment)

    def _times_on(self, day: date, zone: ZoneInfo) -> list[datetime]:
        times: set[datetime] = set()
        for minute in self.minutes_of_day:
            wall = datetime.combine(day, time(minute // 60, minute % 60))
            moment = wall.replace(tzinfo=zone).astimezone(UTC)
            # Not on this day's clock when it was just set forward.
            if moment.astimezone(zone).replace(tzinfo=None) == wall:
                times.add(moment)
        return sorted(times)

    def shortest_gap_seconds(self, today: date) -> int:
        """Between two times that follow each other, by the clock on the wall; a day when it is changed may have a shorter one."""
        times = self.minutes_of_day
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        days = [today + timedelta(days=number) for number in range(HORIZON_DAYS)]
        if any(self.on(day) and self.on(following) for day, following in itertools.pairwise(days)):
            gaps.append(MINUTES_PER_DAY - times[-1] + times[0])
        return min(gaps, default=MINUTES_PER_DAY) * 60


def parse_cron(expression: str, field: str = "cron_expression") -> Cron:
    """Raises `InvalidInput`, which says what is wrong in which of the five fields."""
    text = expression.strip()
    if len(text) > EXPRESSION_MAX_CHARACTERS:
        raise InvalidInput(f"{field} may hold {EXPRESSION_MAX_CHARACTERS} characters", field=field)
    parts = MACROS.get(text.lower(), text).split()
    if len(parts) != len(FIELDS):
        raise InvalidInput(
            f"{field} must have five fields, minute, hour, day of the month, month and day of the week, such as `30 9 * * 1-5`; "
            f"a time zone is given separately",
            field=field,
        )
    minutes, hours, days, months, weekdays = (
        _values(part, kind, field) for part, kind in zip(parts, FIELDS, strict=True)
    )
    return Cron(
        minutes=minutes,
        hours=hours,
        days=days,
        months=months,
        weekdays=tuple(sorted({day % 7 for day in weekdays})),
        either_day=not parts[2].startswith("*") and not parts[4].startswith("*"),
    )


def _values(text: str, kind: CronField, field: str) -> tuple[int, ...]:
    values: set[int] = set()
    for item in text.split(","):
        span, slash, step_text = item.partition("/")
        step = 1
        if slash:
            if not step_text.isascii() or not step_text.isdigit() or not 0 < int(step_text) <= kind.high:
                raise _bad(kind, item, field)
            step = int(step_text)
        if span == "*":
            low, high = kind.low, kind.high - (kind.names is _WEEKDAYS)
        else:
            start, dash, end = span.partition("-")
            low = _number(start, kind, item, field)
            # `5/10` is "from 5 on, every 10".
            high = _number(end, kind, item, field) if dash else (kind.high if slash else low)
            if dash and kind.names is _WEEKDAYS and high == 0:
                high = 7  # `fri-sun`
        if low > high:
            raise _bad(kind, item, field)
        values.update(range(low, high + 1, step))
    return tuple(sorted(values))


def _number(text: str, kind: CronField, item: str, field: str) -> int:
    if text.lower() in kind.names:
        return kind.names.index(text.lower()) + kind.low
    if not text.isascii() or not text.isdigit() or not kind.low <= int(text) <= kind.high:
        raise _bad(kind, item, field)
    return int(text)


def _bad(kind: CronField, item: str, field: str) -> InvalidInput:
    names = f" or {kind.names[0]}-{kind.names[-1]}" if kind.names else ""
    return InvalidInput(
        f"{field}: `{item[:20]}` is not a {kind.name}: numbers from {kind.low} to {kind.high}{names}, "
        f"`*`, ranges `a-b`, steps `/n` and lists `a,b` are understood",
        field=field,
    )


def check_time_zone(name: str, field: str = "timezone") -> None:
    """Raises `InvalidInput` unless it is the name of a time zone."""
    try:
        time_zone(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidInput(
            f"{field}: `{name[:40]}` is not a time zone; give an IANA name such as `Europe/Berlin`, or `UTC`",
            field=field,
        ) from None


@lru_cache(maxsize=1_000)
def time_zone(name: str) -> ZoneInfo:
    """Raises `ZoneInfoNotFoundError`, `ValueError` or, for the name of a directory of zones, `OSError`."""
    if len(name) > 64 or not _ZONE_NAME.fullmatch(name) or name.split("/")[0] in (*_NOT_ZONES, "posix", "right"):
        raise ValueError(name)
    return ZoneInfo(name)


def ranges(values: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted values as (first, last) of runs without a gap."""
    found: list[tuple[int, int]] = []
    for value in values:
        if found and found[-1][1] == value - 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return found
