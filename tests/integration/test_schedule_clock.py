"""Schedules on a real Temporal server, with a worker: firing, its faults, and whether the clock and we mean the same times."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.workflowservice.v1 import ListScheduleMatchingTimesRequest
from temporalio.client import Client, ScheduleActionExecutionStartWorkflow, WorkflowExecutionStatus
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from activities.scheduled_message import ScheduledMessageActivity
from api.schedule_reconciler import ScheduleReconciler
from api.services import Services
from cli.run import choose_dev_model
from db.scheduling import Scheduling
from db.session_resources import DatabaseResources
from domain.clock import timestamp
from domain.cron import parse_cron
from domain.errors import DependencyUnavailable
from domain.events import StoredEvent
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, new_id, parse_id, uuid7
from domain.log_check import check_log
from domain.schedules import NewSchedule, Schedule, ScheduleRefused, Timing, new_schedule
from infra.child_processes import ChildProcesses
from infra.schedule_clock import TemporalScheduleClock
from infra.temporal_client import DATA_CONVERTER
from infra.temporal_server import TemporalDevServer
from infra.turn_gateway import TemporalTurns, TurnOptions
from tests.conftest import API, Make
from tests.stack import Stack
from tests.turn_workers import turn_worker
from workflows import contract
from workflows.scheduled_message import ScheduledMessage

WAIT_SECONDS = 60.0
"""On a busy machine; each wait here takes a few seconds at most."""

WEEKDAYS = "30 9 * * 1-5"
DUE = datetime(2026, 12, 1, 9, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
async def temporal() -> AsyncIterator[Client]:
    async with ChildProcesses() as children, TemporalDevServer(children, ui=False) as server:
        yield await Client.connect(server.address, data_converter=DATA_CONVERTER)


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not await condition():  # noqa: ASYNC110  # neither server announces it
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_SECONDS:g} s: {what}") from None


class Forgetful(TemporalTurns):
    """A turn gateway whose first words get lost."""

    lost = 0

    async def wake(self, session_id: str, **arguments: Any) -> None:
        if self.lost:
            self.lost -= 1
            raise DependencyUnavailable("lost on the way")
        await super().wake(session_id, **arguments)


class Engine:
    """A database, a queue of its own on the shared Temporal server, and, inside `working()`, a worker."""

    def __init__(self, services: Services, client: Client) -> None:
        self.services = services
        self.client = client
        self.queue = f"test-{uuid4().hex}"
        self.clock = TemporalScheduleClock(client, self.queue)
        self.scheduling = Scheduling(services.scheduling.store, self.clock)
        self.turns = Forgetful(client, TurnOptions(turns_queue=self.queue))

    @contextlib.asynccontextmanager
    async def working(self, *, lost_words: int = 0, sandboxed: bool = False) -> AsyncIterator[None]:
        services = self.services
        resources = DatabaseResources(services.database.pool, services.keyring, self.scheduling)
        self.turns.lost = lost_words
        async with turn_worker(
            self.client,
            self.queue,
            services.log,
            resources,
            keyring=services.keyring,
            workflows=[ScheduledMessage],
            activities=[ScheduledMessageActivity(self.scheduling, self.turns).deliver_scheduled],
            runner=SandboxedWorkflowRunner() if sandboxed else None,
        ):
            yield

    async def create(self, session: str, new: NewSchedule) -> Schedule:
        return await self.scheduling.create(DEFAULT_ORG_ID, session, new)

    async def get(self, schedule: Schedule) -> Schedule:
        return await self.scheduling.store.get(DEFAULT_ORG_ID, schedule.session_id, schedule.id)

    async def trigger(self, schedule: Schedule) -> None:
        await self.client.get_schedule_handle(schedule.id).trigger()

    async def log(self, session: str) -> list[StoredEvent]:
        return await self.services.log.read(session, after_sequence=0, limit=1_000)

    async def events(self, session: str, event_type: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(one.data) for one in await self.log(session) if one.type == event_type]

    async def seen(self, session: str, event_type: str, count: int = 1) -> None:
        async def there() -> bool:
            return len(await self.events(session, event_type)) >= count

        await until(there, f"{count} {event_type}")

    async def gone(self, schedule: Schedule) -> None:
        async def forgotten() -> bool:
            return await self.clock.is_paused(schedule.id) is None

        await until(forgotten, "Temporal has forgotten the schedule")


@pytest.fixture
async def engine(services: Services, temporal: Client) -> Engine:
    await choose_dev_model(services.database, services.settings)
    return Engine(services, temporal)


@pytest.fixture
async def session(make_session: Make) -> str:
    return (await make_session(harness_name="base", capabilities=[{"ref": "session_schedule"}]))["id"]


def soon() -> NewSchedule:
    """Due at once: a second is the clock's unit, and it keeps two of margin."""
    return new_schedule("Time to stretch.", scheduled_at=timestamp(datetime.now(UTC) + timedelta(seconds=1)))


def repeating() -> NewSchedule:
    return new_schedule("Look at the inbox.", cron_expression=WEEKDAYS)


async def test_a_one_shot_fires_the_session_answers_and_the_schedule_is_over(engine: Engine, session: str) -> None:
    async with engine.working(sandboxed=True):
        made = await engine.create(session, soon())
        await engine.seen(session, "session.idled")
        await engine.gone(made)
    log = await engine.log(session)
    assert check_log(log) == []
    order = ["input.message", "schedule.triggered", "turn.started", "output.message.completed", "turn.completed"]
    assert [event.type for event in log if event.type in order] == order
    (triggered,) = await engine.events(session, "schedule.triggered")
    assert (triggered["schedule_id"], triggered["scheduled_at"]) == (made.id, made.scheduled_at)
    (started,) = await engine.events(session, "turn.started")
    assert started["input_message_id"] == triggered["message_id"]
    after = await engine.get(made)
    assert (after.status, after.end_reason) == ("completed", "fired")
    assert after.last_triggered_at is not None
    assert made.scheduled_at is not None
    assert after.last_triggered_at >= made.scheduled_at, "never early"


async def test_a_model_schedules_a_message_to_itself_and_answers_it_later(
    engine: Engine, session: str, client: httpx.AsyncClient
) -> None:
    at = timestamp(datetime.now(UTC) + timedelta(seconds=3))
    arguments = {"message": "Say hello.", "scheduled_at": at}
    script = {
        "mode": "script",
        "turns": [
            {"text": "", "tool_calls": [{"name": "create_schedule", "arguments": arguments}]},
            {"text": "I will."},
        ],
    }
    body = {
        "message": {"content": [{"type": "text", "text": "Remind me"}]},
        "metadata": {"llmsim": script},
    }
    async with engine.working():
        assert (await client.post(f"{API}/sessions/{session}/messages", json=body)).status_code == 201
        await engine.turns.wake(session)
        await engine.seen(session, "turn.completed", 2)
        await engine.seen(session, "session.idled", 2)
    (called,) = await engine.events(session, "tool.completed")
    assert called["success"], called
    log = await engine.log(session)
    assert check_log(log) == []
    messages = [one["message"]["content"][0]["text"] for one in await engine.events(session, "input.message")]
    assert messages == ["Remind me", "Say hello."]


async def test_a_repeating_schedule_fires_when_triggered_and_goes_on(engine: Engine, session: str) -> None:
    made = await engine.create(session, repeating())
    async with engine.working():
        await engine.trigger(made)
        await engine.seen(session, "turn.completed")
        await engine.seen(session, "session.idled")
    after = await engine.get(made)
    assert (after.status, after.trigger_count, after.next_trigger_at) == ("active", 1, made.next_trigger_at)
    described = await engine.client.get_schedule_handle(made.id).describe()
    assert described.info.next_action_times[0] == datetime.fromisoformat(str(made.next_trigger_at))
    action = described.info.recent_actions[0].action
    assert isinstance(action, ScheduleActionExecutionStartWorkflow)
    history = str(await engine.client.get_workflow_handle(action.workflow_id).fetch_history())
    assert made.id in history
    assert "inbox" not in history, "what a message says stays in the database"
    assert "inbox" not in str(described.raw_description)


async def test_a_word_that_is_lost_on_the_way_to_the_turn_is_repeated_and_delivers_once(
    engine: Engine, session: str
) -> None:
    made = await engine.create(session, repeating())
    async with engine.working(lost_words=2):
        await engine.trigger(made)
        await engine.seen(session, "session.idled")
    assert len(await engine.events(session, "input.message")) == 1
    assert len(await engine.events(session, "schedule.triggered")) == 1
    assert len(await engine.events(session, "turn.completed")) == 1


async def test_two_firings_for_one_time_deliver_once(engine: Engine, session: str) -> None:
    made = await engine.create(session, repeating())
    firing = contract.DeliverScheduledInput(schedule_id=made.id, due_at=DUE.timestamp())
    step = ScheduledMessageActivity(engine.scheduling, engine.turns)
    async with engine.working():
        results = await asyncio.gather(*(step.deliver_scheduled(firing) for _ in range(3)))
        await engine.seen(session, "session.idled")
    assert len({result.message_id for result in results}) == 1
    assert len(await engine.events(session, "input.message")) == 1
    assert len(await engine.events(session, "turn.completed")) == 1


async def test_a_firing_waits_for_a_worker_and_later_ones_are_skipped_meanwhile(engine: Engine, session: str) -> None:
    made = await engine.create(session, repeating())
    handle = engine.client.get_schedule_handle(made.id)
    await handle.trigger()

    async def under_way() -> bool:
        return bool((await handle.describe()).info.running_actions)

    await until(under_way, "the firing is under way")
    await engine.clock.fire_now(made.id)

    async def skipped() -> bool:
        return (await handle.describe()).info.num_actions_skipped_overlap > 0

    await until(skipped, "the second firing is skipped")
    async with engine.working():
        await engine.seen(session, "session.idled")
    assert len(await engine.events(session, "input.message")) == 1


async def test_cancelled_while_it_fires_nothing_comes_and_the_firing_ends_well(engine: Engine, session: str) -> None:
    made = await engine.create(session, repeating())
    handle = engine.client.get_schedule_handle(made.id)
    await handle.trigger()

    async def under_way() -> bool:
        return bool((await handle.describe()).info.running_actions)

    await until(under_way, "the firing is under way")
    workflow_id = (await handle.describe()).info.running_actions[0].workflow_id  # type: ignore[union-attr]
    await engine.scheduling.cancel(DEFAULT_ORG_ID, session, made.id)
    async with engine.working():
        result = await engine.client.get_workflow_handle(workflow_id).result()
    assert result == {"undelivered": "over"}
    assert (await engine.client.get_workflow_handle(workflow_id).describe()).status is WorkflowExecutionStatus.COMPLETED
    assert await engine.events(session, "input.message") == []
    await engine.gone(made)


async def test_deleting_a_session_takes_its_schedules_off_the_clock(
    engine: Engine, session: str, client: httpx.AsyncClient
) -> None:
    made = [await engine.create(session, new) for new in (repeating(), repeating())]
    assert (await client.delete(f"{API}/sessions/{session}")).status_code == 204
    await engine.scheduling.settle(pending_seconds=0)
    for one in made:
        await engine.gone(one)


async def test_killed_between_commit_and_clock_the_schedule_fires_all_the_same(engine: Engine, session: str) -> None:
    # What is left of a process that died there: the row, which is due long before somebody finds it.
    made = await engine.services.scheduling.store.create(DEFAULT_ORG_ID, session, soon())
    await engine.services.database.pool.execute(
        "UPDATE session_schedules SET scheduled_at = $2, next_trigger_at = $2, checked_at = $2 WHERE id = $1",
        parse_id(Prefix.SCHEDULE, made.id),
        datetime(2026, 1, 1, tzinfo=UTC),
    )
    async with engine.working():
        await ScheduleReconciler(engine.scheduling).once()
        await engine.seen(session, "session.idled")
        await engine.gone(made)
    (triggered,) = await engine.events(session, "schedule.triggered")
    assert triggered["scheduled_at"] == "2026-01-01T00:00:00.000Z"
    assert (await engine.get(made)).status == "completed"


async def test_a_clock_that_lost_its_memory_catches_up_what_it_missed(engine: Engine, session: str) -> None:
    every_five_minutes = new_schedule("Tick.", cron_expression="*/5 * * * *")
    made = await engine.create(session, every_five_minutes)
    await engine.clock.disarm(made.id)
    missed = datetime.now(UTC) - timedelta(minutes=8)
    await engine.services.database.pool.execute(
        "UPDATE session_schedules SET next_trigger_at = $2, checked_at = $2 WHERE id = $1",
        parse_id(Prefix.SCHEDULE, made.id),
        missed,
    )
    async with engine.working():
        await engine.scheduling.settle()
        await engine.seen(session, "session.idled")
    for one in await engine.events(session, "schedule.triggered"):
        due = datetime.fromisoformat(one["scheduled_at"])
        assert (due.minute % 5, due.second) == (0, 0)
        assert missed - timedelta(seconds=2) <= due <= datetime.now(UTC)


async def test_a_schedule_without_a_row_takes_itself_off_the_clock(engine: Engine) -> None:
    stray = format_id(Prefix.SCHEDULE, uuid7())
    cron = parse_cron(WEEKDAYS)
    await engine.clock.arm(Timing(schedule_id=stray, timezone="UTC", next_at=DUE, cron=cron))
    await engine.client.get_schedule_handle(stray).trigger()
    async with engine.working():

        async def forgotten() -> bool:
            return await engine.clock.is_paused(stray) is None

        await until(forgotten, "Temporal has forgotten the schedule")


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(temporal: Client) -> TemporalScheduleClock:
    return TemporalScheduleClock(temporal)


def proto(moment: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(moment.astimezone(UTC).replace(tzinfo=None))
    return made


@pytest.mark.parametrize(
    ("expression", "zone"),
    [
        ("30 9 * * 1-5", "UTC"),
        ("*/20 8-17/3 * * *", "Asia/Kolkata"),
        ("0 0 13 * 5", "UTC"),
        ("0 0 */2 * 5", "UTC"),
        ("15 4 1-7 */3 mon", "Australia/Lord_Howe"),
        ("0 12 31 * *", "America/New_York"),
        ("0 0 29 2 *", "Europe/London"),
        # On 28 March 2027 there is no 2:30.
        ("30 2 * 1-6 *", "Europe/Berlin"),
    ],
)
async def test_temporal_fires_at_the_times_that_are_shown(
    temporal: Client, clock: TemporalScheduleClock, expression: str, zone: str
) -> None:
    start, end = datetime(2027, 1, 1, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC)
    cron, schedule_id = parse_cron(expression), new_id(Prefix.SCHEDULE)
    await clock.arm(Timing(schedule_id=schedule_id, timezone=zone, next_at=end, cron=cron))
    theirs: list[datetime] = []
    while True:
        answer = await temporal.workflow_service.list_schedule_matching_times(
            ListScheduleMatchingTimesRequest(
                namespace=temporal.namespace,
                schedule_id=schedule_id,
                start_time=proto(theirs[-1] if theirs else start),
                end_time=proto(end),
            )
        )
        page = [one.ToDatetime().replace(tzinfo=UTC) for one in answer.start_time]
        if not page or page[-1] in theirs:
            break
        theirs.extend(one for one in page if one not in theirs)
    ours = list(itertools.takewhile(lambda one: one <= end, cron.times_after(start, zone)))
    assert ours
    assert theirs == ours
    await clock.disarm(schedule_id)


async def test_the_clock_takes_every_word_twice(clock: TemporalScheduleClock) -> None:
    timing = Timing(schedule_id=new_id(Prefix.SCHEDULE), timezone="UTC", next_at=DUE, cron=parse_cron(WEEKDAYS))
    assert await clock.is_paused(timing.schedule_id) is None
    await clock.fire_now(timing.schedule_id)
    await clock.disarm(timing.schedule_id)
    assert await clock.arm(timing)
    assert not await clock.arm(timing)
    assert await clock.is_paused(timing.schedule_id) is False

    async def listed() -> bool:
        return timing.schedule_id in await clock.known()

    await until(listed, "Temporal lists the schedule")
    await clock.disarm(timing.schedule_id)
    await clock.disarm(timing.schedule_id)
    assert await clock.is_paused(timing.schedule_id) is None


async def test_a_time_zone_temporal_does_not_know_is_refused_for_good(clock: TemporalScheduleClock) -> None:
    timing = Timing(
        schedule_id=new_id(Prefix.SCHEDULE), timezone="Mars/Olympus", next_at=DUE, cron=parse_cron(WEEKDAYS)
    )
    with pytest.raises(ScheduleRefused):
        await clock.arm(timing)


# --- the whole engine -------------------------------------------------------------------------------------------------


async def test_the_engine_as_it_ships_fires_and_a_server_that_starts_restores_the_clock() -> None:
    async with Stack() as stack:
        session = await stack.create_session()
        url = f"sessions/{session}/schedules"
        at = timestamp(datetime.now(UTC) + timedelta(seconds=1))
        assert (await stack.client.post(url, json={"message": "Now.", "scheduled_at": at})).status_code == 201
        made = (await stack.client.post(url, json={"message": "Later.", "cron_expression": WEEKDAYS})).json()
        await stack.idle(session)
        assert [event.type for event in await stack.check(session) if event.type == "schedule.triggered"]
        assert (await stack.session(session))["active_schedule_count"] == 1

        client = await stack.temporal()
        await client.get_schedule_handle(made["id"]).delete()
        listing = TemporalScheduleClock(client)

        async def forgotten() -> bool:
            return made["id"] not in await listing.known()

        await until(forgotten, "Temporal no longer lists the schedule")
        await stack.start_server()

        async def restored() -> bool:
            return await listing.is_paused(made["id"]) is False

        await until(restored, "the new server has put the schedule back")
