"""Schedules in PostgreSQL and over the API; the clock beside them is a fake that only notes what it is told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import Struct

from activities.capabilities.session_schedule import CAPABILITY
from activities.capabilities.tool_call import call_tool
from activities.scheduled_message import ScheduledMessageActivity
from api.schedule_reconciler import ScheduleReconciler
from api.services import Services
from db.scheduling import OneSessionsSchedules, Scheduling
from domain.clock import timestamp
from domain.errors import DependencyUnavailable, NotFound, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id, parse_id
from domain.schedules import (
    MAX_SCHEDULES_PER_ORG,
    MAX_SCHEDULES_PER_SESSION,
    Delivery,
    NewSchedule,
    Schedule,
    Undelivered,
    new_schedule,
)
from tests.conftest import API, Make, RecordingTurns
from tests.fakes.schedule_clock import FakeClock
from tests.tool_context import PlainContext
from workflows.contract import DeliverScheduledInput

Json = dict[str, Any]

WEEKDAYS = "30 9 * * 1-5"
DUE = datetime(2026, 12, 1, 9, 30, tzinfo=UTC)


@pytest.fixture
def scheduling(services: Services) -> Scheduling:
    return services.scheduling


@pytest.fixture
async def session(make_session: Make) -> str:
    return (await make_session())["id"]


def repeating(message: str = "Look at the inbox.") -> NewSchedule:
    return new_schedule(message, cron_expression=WEEKDAYS)


def once(message: str = "Look at the inbox.", *, seconds: float = 3600) -> NewSchedule:
    return new_schedule(message, scheduled_at=timestamp(datetime.now(UTC) + timedelta(seconds=seconds)))


async def events(services: Services, session: str, event_type: str) -> list[Json]:
    log = await services.log.read(session, after_sequence=0, limit=1_000)
    return [msgspec.json.decode(event.data) for event in log if event.type == event_type]


async def deliver(scheduling: Scheduling, schedule: Schedule, due_at: datetime = DUE) -> Delivery:
    delivered = await scheduling.deliver(schedule.id, due_at)
    assert isinstance(delivered, Delivery)
    return delivered


async def read(services: Services) -> None:
    """As a turn does."""
    await services.database.pool.execute("DELETE FROM inbox")


async def age(services: Services, schedule: Schedule, **columns: timedelta) -> None:
    """Move times of a row into the past."""
    for column, by in columns.items():
        await services.database.pool.execute(
            f"UPDATE session_schedules SET {column} = now() - $2::interval WHERE id = $1",
            parse_id(Prefix.SCHEDULE, schedule.id),
            by,
        )


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_a_schedule_is_created_shown_listed_and_cancelled(
    client: httpx.AsyncClient, session: str, clock: FakeClock
) -> None:
    url = f"{API}/sessions/{session}/schedules"
    made = await client.post(url, json={"message": "hi", "cron_expression": WEEKDAYS, "timezone": "Europe/Berlin"})
    assert made.status_code == 201, made.text
    shown = made.json()
    assert shown["id"].startswith("sched_")
    assert shown["session_id"] == session
    assert (shown["status"], shown["message"], shown["cron_expression"]) == ("active", "hi", WEEKDAYS)
    assert (shown["timezone"], shown["trigger_count"]) == ("Europe/Berlin", 0)
    upcoming = datetime.fromisoformat(shown["next_trigger_at"])
    assert upcoming > datetime.now(UTC)
    assert upcoming.weekday() < 5
    assert list(clock.armed) == [shown["id"]]
    assert (await client.get(f"{url}/{shown['id']}")).json() == shown
    assert (await client.get(url)).json()["data"] == [shown]
    assert (await client.get(f"{API}/sessions/{session}")).json()["active_schedule_count"] == 1

    assert (await client.delete(f"{url}/{shown['id']}")).status_code == 204
    ended = (await client.get(f"{url}/{shown['id']}")).json()
    assert (ended["status"], ended["end_reason"]) == ("cancelled", "cancelled")
    assert "next_trigger_at" not in ended
    assert clock.armed == {}
    assert (await client.get(f"{API}/sessions/{session}")).json()["active_schedule_count"] == 0
    assert (await client.delete(f"{url}/{shown['id']}")).status_code == 204, "cancelling twice is fine"
    assert (await client.get(f"{url}/{shown['id']}")).json() == ended
    assert (await client.get(url, params={"status": "active"})).json()["total"] == 0
    assert (await client.get(url, params={"status": "cancelled"})).json()["data"] == [ended]


async def test_schedules_come_in_pages_newest_first(client: httpx.AsyncClient, session: str) -> None:
    url = f"{API}/sessions/{session}/schedules"
    made = [
        (await client.post(url, json={"message": f"m{n}", "scheduled_at": f"2030-01-0{n}T00:00:00Z"})).json()["id"]
        for n in (1, 2, 3)
    ]
    page = (await client.get(url, params={"limit": 2})).json()
    assert ([one["id"] for one in page["data"]], page["total"]) == (made[:0:-1], 3)
    rest = (await client.get(page["next_url"])).json()
    assert [one["id"] for one in rest["data"]] == made[:1]


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "invalid_input", "message"),
        ({"message": "m"}, "invalid_input", "scheduled_at"),
        ({"message": 5, "cron_expression": WEEKDAYS}, "invalid_input", "message"),
        ({"message": "m", "scheduled_at": "2001-01-01T00:00:00Z"}, "invalid_input", "scheduled_at"),
        ({"message": "m", "scheduled_at": "9999-01-01T00:00:00Z"}, "invalid_input", "scheduled_at"),
        ({"message": "m", "scheduled_at": 1893456000}, "invalid_input", "scheduled_at"),
        ({"message": "m", "cron_expression": "* * * * *"}, "invalid_input", "cron_expression"),
        ({"message": "m", "cron_expression": "0 0 30 2 *"}, "invalid_input", "cron_expression"),
        ({"message": "m", "cron_expression": "0 0 31 4,6,9,11 *"}, "invalid_input", "cron_expression"),
        ({"message": "m", "cron_expression": WEEKDAYS, "timezone": "../../etc/passwd"}, "invalid_input", "timezone"),
        ({"message": "a" * 1_048_576, "cron_expression": WEEKDAYS}, "input_too_large", "message"),
        ({"message": "a\0", "cron_expression": WEEKDAYS}, "invalid_input", "message"),
    ],
)
async def test_a_bad_request_names_the_field_and_schedules_nothing(
    client: httpx.AsyncClient, session: str, clock: FakeClock, body: Json, code: str, field: str
) -> None:
    url = f"{API}/sessions/{session}/schedules"
    answer = await client.post(url, json=body)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, code, field), answer.text
    assert (await client.get(url)).json()["data"] == []
    assert clock.armed == {}


async def test_a_time_zone_the_clock_does_not_know_is_refused(
    client: httpx.AsyncClient, session: str, clock: FakeClock
) -> None:
    clock.unknown_zones.add("Asia/Tokyo")
    url = f"{API}/sessions/{session}/schedules"
    answer = await client.post(url, json={"message": "m", "cron_expression": WEEKDAYS, "timezone": "Asia/Tokyo"})
    assert (answer.status_code, answer.json()["field"]) == (400, "timezone")
    (failed,) = (await client.get(url)).json()["data"]
    assert (failed["status"], failed["end_reason"]) == ("failed", "refused")


async def test_nobody_reaches_another_sessions_schedule(client: httpx.AsyncClient, make_session: Make) -> None:
    mine, theirs = (await make_session())["id"], (await make_session())["id"]
    made = (
        await client.post(f"{API}/sessions/{theirs}/schedules", json={"message": "m", "cron_expression": WEEKDAYS})
    ).json()["id"]
    for method in ("GET", "DELETE"):
        answer = await client.request(method, f"{API}/sessions/{mine}/schedules/{made}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        malformed = await client.request(method, f"{API}/sessions/{mine}/schedules/sched_1")
        assert (malformed.status_code, malformed.json()["field"]) == (400, "schedule_id")
        unknown = await client.request(method, f"{API}/sessions/{new_id(Prefix.SESSION)}/schedules/{made}")
        assert unknown.status_code == 404
    assert (await client.get(f"{API}/sessions/{theirs}/schedules/{made}")).json()["status"] == "active"
    gone = await client.post(
        f"{API}/sessions/{new_id(Prefix.SESSION)}/schedules", json={"message": "m", "cron_expression": WEEKDAYS}
    )
    assert gone.status_code == 404


async def test_another_organization_sees_and_ends_nothing(scheduling: Scheduling, session: str) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    other = DEFAULT_ORG_ID + 1
    with pytest.raises(NotFound):
        await scheduling.store.get(other, session, made.id)
    with pytest.raises(NotFound):
        await scheduling.cancel(other, session, made.id)
    with pytest.raises(NotFound):
        await scheduling.create(other, session, repeating())
    assert await scheduling.store.page(other, session, ("active",), offset=0, limit=10) == ([], 0)


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_a_session_has_at_most_five_active_schedules_however_many_ask_at_once(
    scheduling: Scheduling, session: str
) -> None:
    attempts = [scheduling.create(DEFAULT_ORG_ID, session, repeating(f"m{n}")) for n in range(8)]
    made = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [one for one in made if isinstance(one, ResourceLimit)]
    kept = [one for one in made if isinstance(one, Schedule)]
    assert (len(kept), len(refused)) == (MAX_SCHEDULES_PER_SESSION, 3)
    await scheduling.cancel(DEFAULT_ORG_ID, session, kept[0].id)
    await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    with pytest.raises(ResourceLimit, match="5 active"):
        await scheduling.create(DEFAULT_ORG_ID, session, repeating())


async def test_an_organization_has_at_most_a_hundred(services: Services, scheduling: Scheduling, session: str) -> None:
    await services.database.pool.execute(
        """INSERT INTO session_schedules (id, org_id, session_id, message, timezone, cron_expression, next_trigger_at)
           SELECT gen_random_uuid(), $1, gen_random_uuid(), 'm', 'UTC', '0 9 * * *', now() + interval '1 day'
           FROM generate_series(1, $2)""",
        DEFAULT_ORG_ID,
        MAX_SCHEDULES_PER_ORG - 1,
    )
    await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    with pytest.raises(ResourceLimit, match="100 active"):
        await scheduling.create(DEFAULT_ORG_ID, session, repeating())


# --- firing -----------------------------------------------------------------------------------------------------------


async def test_a_firing_puts_message_and_event_into_the_session_and_tells_its_turn(
    services: Services, scheduling: Scheduling, session: str, turns: RecordingTurns
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating("Look at the inbox."))
    step = ScheduledMessageActivity(scheduling, turns)
    result = await step.deliver_scheduled(DeliverScheduledInput(schedule_id=made.id, due_at=DUE.timestamp()))
    (message,) = [data["message"] for data in await events(services, session, "input.message")]
    assert (message["id"], message["role"]) == (result.message_id, "user")
    assert message["content"] == [{"type": "text", "text": "Look at the inbox."}]
    assert message["metadata"] == {"schedule_id": made.id, "scheduled_at": timestamp(DUE)}
    assert await events(services, session, "schedule.triggered") == [
        {"schedule_id": made.id, "message_id": result.message_id, "scheduled_at": timestamp(DUE)}
    ]
    assert turns.calls == [("wake", session)]
    after = await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)
    assert (after.status, after.trigger_count) == ("active", 1)
    assert after.last_triggered_at is not None
    assert after.next_trigger_at is not None
    assert datetime.fromisoformat(after.next_trigger_at) > DUE


async def test_firing_twice_for_one_time_delivers_once_and_the_next_time_delivers_again(
    services: Services, scheduling: Scheduling, session: str
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    both = await asyncio.gather(*(deliver(scheduling, made) for _ in range(2)))
    assert both[0].message_id == both[1].message_id
    assert len(await events(services, session, "input.message")) == 1
    await read(services)
    following = await deliver(scheduling, made, DUE + timedelta(days=1))
    assert following.message_id != both[0].message_id
    assert len(await events(services, session, "schedule.triggered")) == 2
    assert (await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)).trigger_count == 2


async def test_messages_of_a_schedule_do_not_pile_up_in_a_session_that_reads_none(
    services: Services, scheduling: Scheduling, session: str, turns: RecordingTurns, clock: FakeClock
) -> None:
    made, other = [await scheduling.create(DEFAULT_ORG_ID, session, repeating(text)) for text in ("a", "b")]
    step = ScheduledMessageActivity(scheduling, turns)
    for day in range(3):
        due_at = (DUE + timedelta(days=day)).timestamp()
        result = await step.deliver_scheduled(DeliverScheduledInput(schedule_id=made.id, due_at=due_at))
        assert result.undelivered == (None if day == 0 else "unread")
    await deliver(scheduling, other)
    assert len(await events(services, session, "input.message")) == 2, "each schedule counts for itself"
    assert turns.calls == [("wake", session)]
    after = await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)
    assert (after.status, after.trigger_count, made.id in clock.armed) == ("active", 1, True)
    assert after.next_trigger_at is not None
    assert datetime.fromisoformat(after.next_trigger_at) > DUE + timedelta(days=2)
    await read(services)
    await deliver(scheduling, made, DUE + timedelta(days=4))


async def test_a_one_shot_fires_once_whatever_time_it_is_fired_for_and_is_over(
    services: Services, scheduling: Scheduling, session: str, turns: RecordingTurns, clock: FakeClock
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, once())
    step = ScheduledMessageActivity(scheduling, turns)
    for due in (DUE, DUE + timedelta(days=400)):
        await step.deliver_scheduled(DeliverScheduledInput(schedule_id=made.id, due_at=due.timestamp()))
    assert len(await events(services, session, "input.message")) == 1
    assert [data["scheduled_at"] for data in await events(services, session, "schedule.triggered")] == [
        made.scheduled_at
    ]
    after = await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)
    assert (after.status, after.end_reason, after.trigger_count) == ("completed", "fired", 1)
    assert clock.armed == {}


async def test_a_lost_word_to_the_turn_is_made_up_for_by_the_retry(
    services: Services, scheduling: Scheduling, session: str, turns: RecordingTurns, clock: FakeClock
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, once())
    step = ScheduledMessageActivity(scheduling, turns)
    firing = DeliverScheduledInput(schedule_id=made.id, due_at=DUE.timestamp())
    turns.failure = DependencyUnavailable("gone")
    with pytest.raises(DependencyUnavailable):
        await step.deliver_scheduled(firing)
    assert len(await events(services, session, "input.message")) == 1
    assert made.id in clock.armed, "kept until the turn knows"
    turns.failure = None
    await step.deliver_scheduled(firing)
    assert turns.calls == [("wake", session)]
    assert len(await events(services, session, "input.message")) == 1
    assert clock.armed == {}


async def test_a_firing_waits_its_turn_instead_of_steering_the_one_that_runs(
    client: httpx.AsyncClient, services: Services, scheduling: Scheduling, session: str
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    body = {"message": {"content": [{"type": "text", "text": "hello"}]}}
    assert (await client.post(f"{API}/sessions/{session}/messages", json=body)).status_code == 201
    delivered = await deliver(scheduling, made)
    assert delivered.steered
    rows = await services.database.pool.fetch("SELECT message_id, delivery FROM inbox ORDER BY sequence")
    assert [row["delivery"] for row in rows] == ["steer", "follow_up"]


async def test_cancelled_first_means_never_delivered_and_fired_first_means_delivered(
    services: Services, scheduling: Scheduling, make_session: Make
) -> None:
    for number in range(6):
        session = (await make_session())["id"]
        made = await scheduling.create(DEFAULT_ORG_ID, session, once(f"m{number}"))
        delivered, ended = await asyncio.gather(
            scheduling.deliver(made.id, DUE), scheduling.cancel(DEFAULT_ORG_ID, session, made.id)
        )
        stored = await events(services, session, "input.message")
        said = isinstance(delivered, Delivery)
        assert len(stored) == (1 if said else 0)
        assert ended.status == ("completed" if said else "cancelled")


async def test_a_schedule_of_a_deleted_session_says_nothing_and_leaves_the_clock(
    client: httpx.AsyncClient,
    services: Services,
    scheduling: Scheduling,
    session: str,
    turns: RecordingTurns,
    clock: FakeClock,
) -> None:
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    assert (await client.delete(f"{API}/sessions/{session}")).status_code == 204
    assert await scheduling.deliver(made.id, DUE) is Undelivered.OVER
    assert made.id in clock.armed
    await age(services, made, checked_at=timedelta(seconds=10))
    await ScheduleReconciler(scheduling).once()
    assert clock.armed == {}
    assert await events(services, session, "input.message") == []
    assert turns.calls == []


@pytest.mark.parametrize("resource", ["agents", "harnesses"])
async def test_a_schedule_of_an_archived_agent_or_harness_ends_when_it_would_fire(
    client: httpx.AsyncClient,
    services: Services,
    scheduling: Scheduling,
    make_agent: Make,
    make_harness: Make,
    make_session: Make,
    turns: RecordingTurns,
    clock: FakeClock,
    resource: str,
) -> None:
    harness, agent = (await make_harness())["id"], (await make_agent())["id"]
    session = (await make_session(harness_id=harness, agent_id=agent))["id"]
    made = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    archived = agent if resource == "agents" else harness
    answer = await client.patch(f"{API}/{resource}/{archived}", json={"status": "archived"})
    assert answer.status_code == 200, answer.text
    step = ScheduledMessageActivity(scheduling, turns)
    result = await step.deliver_scheduled(DeliverScheduledInput(schedule_id=made.id, due_at=DUE.timestamp()))
    assert result.message_id is None
    assert (turns.calls, clock.armed) == ([], {})
    after = await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)
    assert (after.status, after.end_reason) == ("cancelled", f"{resource.removesuffix('s').removesuffix('e')}_archived")
    assert await events(services, session, "input.message") == []


async def test_a_clock_that_knows_more_than_the_database_is_corrected(
    scheduling: Scheduling, turns: RecordingTurns, clock: FakeClock
) -> None:
    stray = new_id(Prefix.SCHEDULE)
    clock.armed[stray] = None  # type: ignore[assignment]
    step = ScheduledMessageActivity(scheduling, turns)
    result = await step.deliver_scheduled(DeliverScheduledInput(schedule_id=stray, due_at=DUE.timestamp()))
    assert (result.message_id, clock.armed, turns.calls) == (None, {}, [])


# --- rows and clock ---------------------------------------------------------------------------------------------------


async def test_killed_between_commit_and_clock_the_schedule_is_armed_by_the_reconciler(
    services: Services, scheduling: Scheduling, session: str, clock: FakeClock
) -> None:
    # What is left of a process that died there: the row alone.
    made = await scheduling.store.create(DEFAULT_ORG_ID, session, repeating())
    assert (made.status, clock.armed) == ("pending", {})
    assert await scheduling.settle() == 0, "its creator may still be at it"
    await age(services, made, checked_at=timedelta(seconds=10))
    assert await scheduling.settle() == 1
    assert list(clock.armed) == [made.id]
    assert (await scheduling.store.get(DEFAULT_ORG_ID, session, made.id)).status == "active"
    await age(services, made, checked_at=timedelta(seconds=10))
    assert await scheduling.settle() == 0


async def test_with_the_clock_away_schedules_are_kept_and_cancelled_all_the_same(
    client: httpx.AsyncClient, services: Services, scheduling: Scheduling, session: str, clock: FakeClock
) -> None:
    clock.failure = DependencyUnavailable("gone")
    url = f"{API}/sessions/{session}/schedules"
    kept = (await client.post(url, json={"message": "m", "cron_expression": WEEKDAYS})).json()
    assert kept["status"] == "pending"
    clock.failure = None
    ended = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    clock.failure = DependencyUnavailable("gone")
    assert (await client.delete(f"{url}/{ended.id}")).status_code == 204
    reconciler = ScheduleReconciler(scheduling)
    with pytest.raises(DependencyUnavailable):
        await reconciler.once()
    clock.failure = None
    for one in (ended, await scheduling.store.get(DEFAULT_ORG_ID, session, kept["id"])):
        await age(services, one, checked_at=timedelta(seconds=10))
    await reconciler.once()
    assert list(clock.armed) == [kept["id"]]
    assert (await client.get(f"{url}/{kept['id']}")).json()["status"] == "active"


async def test_a_clock_that_does_not_list_what_it_knows_is_set_all_the_same(
    services: Services, scheduling: Scheduling, session: str, clock: FakeClock
) -> None:
    class Secretive(FakeClock):
        async def known(self) -> set[str]:
            raise DependencyUnavailable("not allowed")

    made = await scheduling.store.create(DEFAULT_ORG_ID, session, repeating())
    await age(services, made, checked_at=timedelta(seconds=10))
    secretive = Secretive()
    with pytest.raises(DependencyUnavailable):
        await ScheduleReconciler(Scheduling(scheduling.store, secretive)).once()
    assert list(secretive.armed) == [made.id]


async def test_ended_while_the_clock_was_being_told_the_schedule_does_not_stay_on_it(
    scheduling: Scheduling, session: str, clock: FakeClock
) -> None:
    class Slow(FakeClock):
        async def arm(self, timing: Any) -> bool:
            # Somebody else cancels, and tells the clock, before our word arrives.
            await Scheduling(scheduling.store, clock).cancel(DEFAULT_ORG_ID, session, timing.schedule_id)
            return await clock.arm(timing)

        async def disarm(self, schedule_id: str) -> None:
            await clock.disarm(schedule_id)

    made = await Scheduling(scheduling.store, Slow()).create(DEFAULT_ORG_ID, session, repeating())
    assert made.status == "cancelled"
    assert clock.armed == {}


async def test_a_clock_that_lost_its_memory_is_given_everything_again(
    services: Services, scheduling: Scheduling, make_session: Make, clock: FakeClock
) -> None:
    sessions = [(await make_session())["id"] for _ in range(2)]
    live = [await scheduling.create(DEFAULT_ORG_ID, one, new) for one in sessions for new in (once(), repeating())]
    ended = await scheduling.create(DEFAULT_ORG_ID, sessions[0], once())
    await scheduling.cancel(DEFAULT_ORG_ID, sessions[0], ended.id)
    kept = clock.armed.pop(live[0].id)
    clock.armed = {live[0].id: kept}
    await ScheduleReconciler(scheduling).once()
    assert set(clock.armed) == {one.id for one in live}


async def test_an_overdue_schedule_is_looked_into(
    services: Services, scheduling: Scheduling, session: str, clock: FakeClock
) -> None:
    lost, late, paused = [await scheduling.create(DEFAULT_ORG_ID, session, once(f"m{n}")) for n in range(3)]
    cron = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    fresh = await scheduling.create(DEFAULT_ORG_ID, session, repeating())
    del clock.armed[lost.id]
    clock.paused.add(paused.id)
    for one in (lost, late, paused, cron):
        await age(services, one, next_trigger_at=timedelta(minutes=5), checked_at=timedelta(minutes=2))
    assert await scheduling.settle() == 4
    assert lost.id in clock.armed
    assert clock.fired == [late.id], "neither the paused one nor the one that goes on by itself"
    postponed = await scheduling.store.get(DEFAULT_ORG_ID, session, cron.id)
    assert postponed.next_trigger_at == fresh.next_trigger_at
    assert await scheduling.settle() == 0, "not again at once"


# --- the tools --------------------------------------------------------------------------------------------------------


class Caller(PlainContext):
    def __init__(self, scheduling: Scheduling, session: str) -> None:
        self._scheduling = scheduling
        self.session_id = session

    @property
    def schedules(self) -> OneSessionsSchedules:
        return OneSessionsSchedules(self._scheduling, self.session_id)


class Answer(Struct):
    result: Json
    error: str


async def use(context: Caller, tool: str, key: str = "key", **arguments: object) -> Answer:
    (found,) = [one for one in CAPABILITY.tools if one.name == tool]
    context.idempotency_key = key
    outcome = await call_tool(found, context, arguments)
    text = "" if outcome.result is None else outcome.result[0].text  # type: ignore[union-attr]
    return Answer(result=msgspec.json.decode(text) if text else {}, error=outcome.error or "")


@pytest.fixture
def caller(scheduling: Scheduling, session: str) -> Caller:
    return Caller(scheduling, session)


async def test_a_model_creates_lists_and_cancels(caller: Caller, clock: FakeClock) -> None:
    caller.timezone = "Europe/Berlin"
    made = await use(
        caller, "create_schedule", "a", message="Good morning", cron_expression="0 9 * * *", scheduled_at=""
    )
    assert made.result["status"] == "active"
    assert made.result["timezone"] == "Europe/Berlin", "the user's"
    one = await use(caller, "create_schedule", "b", message="Call her", scheduled_at="2030-01-31T09:00", timezone="UTC")
    assert one.result["next_trigger_at"] == "2030-01-31T09:00:00.000Z"
    listed = (await use(caller, "list_schedules")).result
    assert listed["count"] == 2
    assert [one["message"] for one in listed["schedules"]] == ["Good morning", "Call her"]
    ended = await use(caller, "cancel_schedule", schedule_id=made.result["schedule_id"])
    assert ended.result["status"] == "cancelled"
    assert (await use(caller, "list_schedules")).result["count"] == 1
    assert list(clock.armed) == [one.result["schedule_id"]]


async def test_a_call_that_runs_again_after_a_crash_finds_its_schedule(caller: Caller, clock: FakeClock) -> None:
    first, second = [
        await use(caller, "create_schedule", "same", message="m", cron_expression=WEEKDAYS) for _ in range(2)
    ]
    assert first.result == second.result
    assert len(clock.armed) == 1
    other = await use(caller, "create_schedule", "other", message="m", cron_expression=WEEKDAYS)
    assert other.result["schedule_id"] != first.result["schedule_id"]


async def test_a_model_reads_what_is_wrong_with_its_call(
    caller: Caller, make_session: Make, scheduling: Scheduling
) -> None:
    wrong = await use(caller, "create_schedule", message="m", cron_expression="* * * * *")
    assert "300 seconds must lie between" in wrong.error
    assert "No schedule was created" in wrong.error
    assert (
        "is in the past; it is 20"
        in (await use(caller, "create_schedule", message="m", scheduled_at="2020-01-01T00:00:00Z")).error
    )
    assert "either scheduled_at" in (await use(caller, "create_schedule", message="m")).error
    assert (
        "`message` may hold 32768 bytes"
        in (await use(caller, "create_schedule", message="a" * 1_048_576, cron_expression=WEEKDAYS)).error
    )
    theirs = await scheduling.create(DEFAULT_ORG_ID, (await make_session())["id"], repeating())
    assert "no schedule" in (await use(caller, "cancel_schedule", schedule_id=theirs.id)).error
    assert "not a valid sched id" in (await use(caller, "cancel_schedule", schedule_id="1")).error
    for number in range(5):
        await use(caller, "create_schedule", f"k{number}", message="m", cron_expression=WEEKDAYS)
    assert (
        "5 active schedules"
        in (await use(caller, "create_schedule", "k6", message="m", cron_expression=WEEKDAYS)).error
    )


async def test_five_long_messages_fit_into_a_listing(caller: Caller) -> None:
    for number in range(5):
        made = await use(caller, "create_schedule", f"k{number}", message="é" * 16_000, cron_expression=WEEKDAYS)
        assert not made.error
    listed = await use(caller, "list_schedules")
    assert listed.result["count"] == 5


async def test_a_session_with_the_capability_shows_its_feature(client: httpx.AsyncClient, make_session: Make) -> None:
    made = await make_session(harness_name="base", capabilities=[{"ref": "session_schedule"}])
    assert "schedules" in made["features"]
