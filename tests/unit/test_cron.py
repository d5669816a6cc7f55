"""Cron expressions: what they mean, which are refused, and when they are due."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.cron import Cron, check_time_zone, parse_cron, ranges
from domain.errors import InvalidInput
from domain.schedules import MAX_AHEAD, MESSAGE_MAX_BYTES, MIN_SPACING_SECONDS, new_schedule

NOW = datetime(2026, 11, 21, 12, 0, 30, tzinfo=UTC)


def next_times(expression: str, count: int, zone: str = "UTC", after: datetime = NOW) -> list[str]:
    times = itertools.islice(parse_cron(expression).times_after(after, zone), count)
    return [one.strftime("%Y-%m-%d %H:%M") for one in times]


def test_five_fields_mean_what_they_mean_in_cron() -> None:
    assert next_times("30 9 * * 1-5", 2) == ["2026-11-23 09:30", "2026-11-24 09:30"]
    assert next_times("*/20 8-9 1 * *", 4) == [f"2026-12-01 {one}" for one in ("08:00", "08:20", "08:40", "09:00")]
    assert next_times("5/25 0 1 jan *", 3) == [f"2027-01-01 00:{one}" for one in ("05", "30", "55")]
    assert next_times("0 0 * * 7", 1) == next_times("0 0 * * SUN", 1) == next_times("0 0 * * 0", 1)
    assert next_times("0 0 * * fri-sun", 3) == ["2026-11-22 00:00", "2026-11-27 00:00", "2026-11-28 00:00"]
    assert next_times("@daily", 1) == ["2026-11-22 00:00"]
    assert next_times(" 0\t6  * * * ", 1) == ["2026-11-22 06:00"]


def test_either_kind_of_day_is_enough_when_both_are_given() -> None:
    assert next_times("0 0 13 * 5", 4) == [
        "2026-11-27 00:00",
        "2026-12-04 00:00",
        "2026-12-11 00:00",
        "2026-12-13 00:00",
    ]
    # A field that begins with `*` restricts instead: odd days that are Fridays.
    assert next_times("0 0 */2 * 5", 2) == ["2026-11-27 00:00", "2026-12-11 00:00"]


def test_times_are_those_of_the_zone_and_follow_its_clock() -> None:
    assert next_times("0 9 * * *", 1, "Asia/Tokyo") == ["2026-11-22 00:00"]
    spring = datetime(2027, 3, 27, 12, tzinfo=UTC)
    # At 2 o'clock on the 28th clocks in Berlin go to 3: there is no 2:30, and 9:00 comes an hour earlier.
    assert next_times("30 2 * * *", 2, "Europe/Berlin", spring) == ["2027-03-29 00:30", "2027-03-30 00:30"]
    assert next_times("0 9 * * *", 1, "Europe/Berlin", spring) == ["2027-03-28 07:00"]


def test_29_february_comes_and_30_february_does_not() -> None:
    assert next_times("0 0 29 2 *", 2) == ["2028-02-29 00:00", "2032-02-29 00:00"]
    assert parse_cron("0 0 30 2 *").next_after(NOW, "UTC") is None


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "* * * *",
        "0 0 0 * * *",
        "0 0 0 * * * 2030",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 13 *",
        "* * * foo *",
        "* * * * 8",
        "-1 * * * *",
        "5-1 * * * *",
        "*/0 * * * *",
        "*/60 * * * *",
        "1,,2 * * * *",
        "1-2-3 * * * *",
        "1/2/3 * * * *",
        "٣ * * * *",
        "² * * * *",
        "* * L * *",
        "* * 15W * *",
        "* * * * 5#2",
        "CRON_TZ=UTC 0 9 * * *",
        "@every 5m",
        "@reboot",
        "0 9 * * 1-5; rm -rf /",
        f"{'0,' * 200}0 9 * * *",
        f"*/{'9' * 150} * * * *",
    ],
)
def test_what_is_not_cron_is_refused_and_the_field_is_named(expression: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_cron(expression)
    assert refused.value.field == "cron_expression"
    assert "cron_expression" in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("expression", "seconds"),
    [
        ("* * * * *", 60),
        ("*/5 * * * *", 300),
        ("*/7 * * * *", 240),  # :56 and the next :00
        ("0,59 12 * * *", 59 * 60),
        ("59,0 * * * *", 60),
        ("0 0 * * *", 86400),
        ("58 23 * * *", 86400),
        ("0,58 0,23 * * *", 120),  # 23:58 and 0:00, on days that follow each other
        ("0,58 0,23 1 * *", 58 * 60),  # the same, but never on two days in a row
        ("0,58 0,23 1,31 * *", 120),  # 31 December and 1 January
        ("0 0 1 1 *", 86400),
    ],
)
def test_the_shortest_gap_counts_over_midnight_only_where_two_days_follow(expression: str, seconds: int) -> None:
    assert parse_cron(expression).shortest_gap_seconds(NOW.date()) == seconds


numbers = st.integers(0, 59)
minutes = st.one_of(
    st.integers(1, 59).map(lambda step: f"*/{step}"),
    st.lists(numbers, min_size=1, max_size=4).map(lambda xs: ",".join(map(str, xs))),
)
hours = st.one_of(
    st.just("*"), st.lists(st.integers(0, 23), min_size=1, max_size=3).map(lambda xs: ",".join(map(str, xs)))
)
days = st.one_of(
    st.just("*"), st.lists(st.integers(1, 31), min_size=1, max_size=3).map(lambda xs: ",".join(map(str, xs)))
)
weekdays = st.one_of(st.just("*"), st.integers(0, 7).map(str))


@settings(max_examples=60, deadline=None)
@given(st.tuples(minutes, hours, days, st.just("*"), weekdays).map(" ".join))
def test_what_is_accepted_never_fires_twice_within_five_minutes(expression: str) -> None:
    cron = parse_cron(expression)
    times = list(itertools.islice(cron.times_after(NOW, "UTC"), 300))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap > timedelta(0) for gap in gaps)
    assert min(gaps) >= timedelta(seconds=cron.shortest_gap_seconds(NOW.date()))
    assert all(matches(cron, one) for one in times)


def matches(cron: Cron, moment: datetime) -> bool:
    return cron.on(moment.date()) and moment.minute in cron.minutes and moment.hour in cron.hours and not moment.second


def test_ranges_are_runs_without_a_gap() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == [(1, 3), (5, 5), (7, 8)]
    assert ranges([]) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Mars/Olympus",
        "../../etc/passwd",
        "/etc/passwd",
        "Europe",
        "localtime",
        "Local",
        "posix/UTC",
        "UTC\0",
        "a" * 5_000,
        "+01:00",
        "é",
    ],
)
def test_what_is_no_time_zone_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_time_zone(name)
    assert refused.value.field == "timezone"
    assert len(refused.value.message) < 300


def test_a_moment_is_taken_in_its_offset_or_in_the_given_zone() -> None:
    for text in (
        "2030-01-31T09:00:00+01:00",
        "2030-01-31T08:00:00Z",
        "2030-01-31 08:00z",
        "2030-01-31T07:59:59.2+00:00",
    ):
        assert new_schedule("m", scheduled_at=text, now=NOW).scheduled_at == datetime(2030, 1, 31, 8, tzinfo=UTC)
    local = new_schedule("m", scheduled_at="2030-01-31T09:00", timezone="Europe/Berlin", now=NOW)
    assert local.scheduled_at == local.first_at == datetime(2030, 1, 31, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({}, "scheduled_at"),
        ({"scheduled_at": "2030-01-01T00:00:00Z", "cron_expression": "0 9 * * *"}, "scheduled_at"),
        ({"scheduled_at": "2026-11-21T12:00:29Z"}, "scheduled_at"),
        ({"scheduled_at": "1970-01-01T00:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": (NOW + MAX_AHEAD + timedelta(seconds=1)).isoformat()}, "scheduled_at"),
        ({"scheduled_at": "9999-12-31T23:59:59-14:00"}, "scheduled_at"),
        ({"scheduled_at": "0001-01-01T00:00:00+14:00"}, "scheduled_at"),
        ({"scheduled_at": "2030-02-30T00:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": "2030-01-01T25:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": "2030-01-01T00:00:00+99:99"}, "scheduled_at"),
        ({"scheduled_at": "tomorrow"}, "scheduled_at"),
        ({"scheduled_at": "2030-01-01"}, "scheduled_at"),
        ({"scheduled_at": "1893456000"}, "scheduled_at"),
        ({"cron_expression": "* * * * *"}, "cron_expression"),
        ({"cron_expression": "0 0 30 2 *"}, "cron_expression"),
        ({"cron_expression": "0 9 * * *", "timezone": "Mars/Olympus"}, "timezone"),
        ({"cron_expression": "0 9 * * *", "message": " \n"}, "message"),
        ({"cron_expression": "0 9 * * *", "message": "a\0b"}, "message"),
        ({"cron_expression": "0 9 * * *", "message": "\ud800"}, "message"),
        ({"cron_expression": "0 9 * * *", "message": "é" * (MESSAGE_MAX_BYTES // 2 + 1)}, "message"),
        ({"cron_expression": "0 9 * * *", "message": "a" * 1_000_000}, "message"),
    ],
)
def test_a_request_that_cannot_be_kept_is_refused_and_the_field_is_named(fields: dict[str, str], at_fault: str) -> None:
    given_fields = {"message": "m", **fields}
    with pytest.raises(InvalidInput) as refused:
        new_schedule(**given_fields, now=NOW)  # type: ignore[arg-type]
    assert refused.value.field == at_fault
    assert len(refused.value.message) < 400


def test_the_closest_times_that_are_allowed_are_allowed() -> None:
    assert parse_cron("*/5 * * * *").shortest_gap_seconds(date(2026, 11, 21)) == MIN_SPACING_SECONDS
    assert new_schedule("m", cron_expression=" */5 * * * * ", now=NOW).cron_expression == "*/5 * * * *"
    soon = new_schedule("m", scheduled_at="2026-11-21T12:00:30.5Z", now=NOW)
    assert soon.scheduled_at == NOW + timedelta(seconds=1), "never early"
