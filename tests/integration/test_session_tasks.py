"""Tasks in the database and over the API: what is written in one transaction, what a retry finds, what is made up for later."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

from api.reconciler import Reconciler
from api.services import Services
from db.messages import NewMessage
from db.session_tasks import SessionTaskPort, TaskStore
from db.task_reports import ReportingLog
from db.task_upkeep import TaskUpkeep
from db.turn_store import TurnStore
from domain.errors import DependencyUnavailable
from domain.events import TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id, parse_id
from domain.messages import TextPart
from domain.tasks import SPAWN_AGENT, SessionTask, SpawnRequest, TaskLimits, TaskProblem, TaskState, WakePolicy
from domain.tools import SideEffect, ToolCall
from domain.turns import (
    ArrivedAnswer,
    FinishInput,
    PlannedCall,
    ReasonBriefing,
    ReasonOutcome,
    ResolvedModel,
    StepRef,
    ToolClaim,
    ToolSettlement,
    TurnEnding,
)
from tests.conftest import API, Make, RecordingPublisher, RecordingTurns, turn_store
from workflows.contract import TurnPhase

SECOND_ORG = 2
STORM_SECONDS = 60.0
LOOK = SpawnRequest(name="Look", instructions="Find out.")
WAITED_FOR = SpawnRequest(name="Look", instructions="Find out.", mode="foreground")


def model() -> ResolvedModel:
    return ResolvedModel(
        public_id=new_id(Prefix.MODEL), name="m", provider_public_id=new_id(Prefix.PROVIDER), provider_type="llmsim"
    )


def outcome(text: str, *calls: PlannedCall) -> ReasonOutcome:
    usage = TokenUsage(input_tokens=1, output_tokens=1)
    answer = ArrivedAnswer(finish_reason="stop", usage=usage, text_length=len(text), duration_ms=1, calls=list(calls))
    return ReasonOutcome(model=model(), prompt=[], offered_tools=[], text=text, answer=answer)


def planned(call_id: str, name: str = SPAWN_AGENT, kind: Any = "server") -> PlannedCall:
    call = ToolCall(id=call_id, name=name, arguments={})
    return PlannedCall(call=call, kind=kind, side_effect=SideEffect.IDEMPOTENT, timeout_seconds=5)


class PhasedTurns(RecordingTurns):
    async def phase(self, session_id: str) -> TurnPhase | None:
        return None


@dataclass
class Engine:
    """The state of an engine whose turns are moved by hand."""

    services: Services
    turns: RecordingTurns
    tasks: TaskStore
    store: TurnStore
    make_session: Make

    async def session(self, **fields: Any) -> str:
        return str((await self.make_session(**fields))["id"])

    async def work(self, session: str) -> StepRef:
        """Begin a turn on what is unread."""
        ref = step(session)
        assert isinstance(await self.store.begin_reason(ref, "interrupted"), ReasonBriefing)
        return ref

    async def parent(self, *call_ids: str, **fields: Any) -> tuple[str, StepRef]:
        """A session whose turn runs calls of `spawn_agent`."""
        session = await self.session(**fields)
        await self.services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text="hi")]))
        ref = await self.work(session)
        await self.store.commit_reason(ref, outcome("", *(planned(one) for one in call_ids or ("call_a",))))
        for call_id in call_ids or ("call_a",):
            assert isinstance(await self.store.begin_call(self.acting(ref), call_id), ToolClaim)
        return session, ref

    def acting(self, ref: StepRef) -> StepRef:
        return step(ref.session_id, turn_id=ref.turn_id)

    def port(self, session: str) -> SessionTaskPort:
        return SessionTaskPort(self.tasks, session)

    async def spawn(self, session: str, request: SpawnRequest = LOOK, call_id: str = "call_a") -> SessionTask:
        return await self.port(session).spawn(request, call_id=call_id, idempotency_key=f"key:{call_id}")

    async def answer(self, task: SessionTask, text: str = "Forty-two.") -> None:
        """The child's whole turn."""
        await self.store.commit_reason(await self.work(child_of(task)), outcome(text))

    async def finish(self, ref: StepRef, ending: TurnEnding, **fields: Any) -> None:
        await self.store.finish(
            FinishInput(session_id=ref.session_id, turn_id=ref.turn_id, iteration=1, ending=ending, **fields)
        )

    async def task(self, task: SessionTask) -> SessionTask:
        return (await self.port(task.session_id).get(task.id)).task

    async def events(self, session: str, event_type: str) -> list[dict[str, Any]]:
        found = await self.services.log.read(session, after_sequence=0, limit=1_000, types=[event_type])
        return [msgspec.json.decode(event.data) for event in found]

    async def told(self, session: str) -> list[str]:
        """What tasks have left unread or read in a session."""
        messages = [data["message"] for data in await self.events(session, "input.message")]
        return [one["content"][0]["text"] for one in messages if one.get("external_actor", {}).get("source") == "task"]

    async def execute(self, query: str, *arguments: object) -> None:
        await self.services.database.pool.execute(query, *arguments)


def step(session: str, *, turn_id: str | None = None) -> StepRef:
    return StepRef(
        session_id=session,
        turn_id=turn_id or new_id(Prefix.TURN),
        iteration=1,
        exec_id=new_id(Prefix.EXEC),
        attempt=1,
        worker="a",
    )


def child_of(task: SessionTask) -> str:
    assert task.links is not None
    assert task.links.child_session_id is not None
    return task.links.child_session_id


EngineOf = Callable[[TaskLimits], Engine]


@pytest.fixture
def engine_of(services: Services, turns: RecordingTurns, publisher: RecordingPublisher, make_session: Make) -> EngineOf:
    def build(limits: TaskLimits) -> Engine:
        tasks = TaskStore(services.log, turns, limits)
        log = ReportingLog(services.database.pool, publisher, tasks.follower, tasks.stop_orphan)
        return Engine(services, turns, tasks, turn_store(log), make_session)

    return build


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    return engine_of(TaskLimits(foreground_seconds=0.3, max_running=3))


# --- begin ------------------------------------------------------------------------------------------------------------


async def test_a_retried_spawn_finds_the_child_it_has_begun(engine: Engine) -> None:
    session, _ = await engine.parent()
    tasks = await asyncio.gather(*(engine.spawn(session) for _ in range(5)))
    assert len({task.id for task in tasks}) == 1
    assert len(await engine.events(session, "task.created")) == 1
    child = child_of(tasks[0])
    assert len(await engine.events(child, "session.started")) == 1
    (message,) = await engine.events(child, "input.message")
    assert message["message"]["content"] == [{"type": "text", "text": "Find out."}]
    assert [call for call in engine.turns.calls if call == ("wake", child)] == [("wake", child)]
    await engine.answer(tasks[0])
    assert (await engine.spawn(session)).state is TaskState.SUCCEEDED, "also after it has ended"


async def test_no_more_than_so_many_tasks_run_at_a_time(engine: Engine) -> None:
    session, _ = await engine.parent(*"abcd")
    tasks = [await engine.spawn(session, call_id=one) for one in "abc"]
    with pytest.raises(TaskProblem, match="3 tasks"):
        await engine.spawn(session, call_id="d")
    query = "SELECT count(*) FROM sessions WHERE parent_session_id = $1"
    assert await engine.services.database.pool.fetchval(query, parse_id(Prefix.SESSION, session)) == 3
    await engine.answer(tasks[0])
    await engine.spawn(session, call_id="d")
    with pytest.raises(TaskProblem, match="3 tasks"):
        await engine.port(session).send(tasks[0].id, "go on", idempotency_key="m")


async def test_a_call_that_has_ended_meanwhile_begins_nothing(engine: Engine) -> None:
    session, ref = await engine.parent()
    await engine.store.settle_call(engine.acting(ref), "call_a", ToolSettlement(status="cancelled", error="stopped"))
    with pytest.raises(TaskProblem, match="ended meanwhile"):
        await engine.spawn(session)
    assert await engine.events(session, "task.created") == []


async def test_agents_and_models_of_other_organizations_do_not_exist(engine: Engine, make_agent: Make) -> None:
    agent = await make_agent(name="expert")
    await engine.execute("UPDATE agents SET org_id = $1 WHERE name = 'expert'", SECOND_ORG)
    session, _ = await engine.parent()
    for wanted in ("expert", agent["id"], "agent_0", "'; --"):
        with pytest.raises(TaskProblem, match="no agent"):
            await engine.spawn(session, msgspec.structs.replace(LOOK, agent=wanted))
    row = await engine.services.database.pool.fetchval("SELECT id FROM models WHERE model_id = 'llmsim-echo'")
    await engine.execute("UPDATE models SET org_id = $1 WHERE id = $2", SECOND_ORG, row)
    for wanted in (f"model_{row.hex}", new_id(Prefix.MODEL), "model_1", ""):
        with pytest.raises(TaskProblem, match="no enabled model"):
            await engine.spawn(session, msgspec.structs.replace(LOOK, model_id=wanted))
    assert await engine.events(session, "task.created") == []


async def test_a_child_may_have_a_workspace_of_its_own(engine: Engine) -> None:
    session, _ = await engine.parent("a", "b")
    own = await engine.spawn(session, msgspec.structs.replace(LOOK, own_workspace=True), "a")
    shared = await engine.spawn(session, LOOK, "b")
    query = "SELECT workspace_id FROM sessions WHERE id = $1"
    pool = engine.services.database.pool
    keys = [parse_id(Prefix.SESSION, one) for one in (session, child_of(own), child_of(shared))]
    assert [await pool.fetchval(query, key) for key in keys] == [keys[0], keys[1], keys[0]]


# --- results ----------------------------------------------------------------------------------------------------------


async def test_a_result_reaches_the_parent_in_the_transaction_that_ends_the_child(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    engine.turns.calls.clear()
    # The word to the parent's workflow is lost.
    engine.turns.failure = DependencyUnavailable()
    await engine.answer(task)
    ended = await engine.task(task)
    assert (ended.state, ended.summary) == (TaskState.SUCCEEDED, "Forty-two.")
    (told,) = await engine.told(session)
    assert "Forty-two." in told
    assert [data["task"]["state"] for data in await engine.events(session, "task.updated")] == ["succeeded"]
    # Whoever looks for unread messages gives it again.
    key = parse_id(Prefix.SESSION, session)
    await engine.execute("UPDATE inbox SET created_at = now() - interval '1 minute' WHERE session_id = $1", key)
    turns = PhasedTurns()
    assert await Reconciler(engine.services.messages, turns).once() == 1
    assert turns.calls == [("wake", session)]


async def test_a_message_of_a_task_can_be_told_from_a_person_s(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    await engine.answer(task)
    message = (await engine.events(session, "input.message"))[-1]["message"]
    assert message["role"] == "user"
    assert message["external_actor"] == {"actor_id": task.id, "source": "task", "actor_name": "Look"}
    assert message["metadata"] == {
        "task": {"task_id": task.id, "state": "succeeded", "child_session_id": child_of(task)}
    }


async def test_a_wait_that_takes_too_long_leaves_the_task_in_the_background(engine: Engine) -> None:
    session, ref = await engine.parent()
    task = await engine.spawn(session, WAITED_FOR)
    waited = await engine.port(session).wait(task.id, call_id="call_a")
    assert waited.state is TaskState.RUNNING
    assert (await engine.port(session).detach(task.id)).state is TaskState.RUNNING
    settlement = ToolSettlement(status="success", result=[TextPart(text="It goes on.")])
    await engine.store.settle_call(engine.acting(ref), "call_a", settlement)
    await engine.answer(task)
    assert len(await engine.told(session)) == 1


async def test_a_result_that_comes_before_the_wait_is_given_up_is_told_once(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session, WAITED_FOR)
    await engine.answer(task)
    assert (await engine.port(session).detach(task.id)).state is TaskState.SUCCEEDED
    assert await engine.told(session) == []


async def test_a_retry_waits_for_what_is_left_only(engine_of: EngineOf) -> None:
    engine = engine_of(TaskLimits(foreground_seconds=3_600))
    session, _ = await engine.parent()
    task = await engine.spawn(session, WAITED_FOR)
    await engine.execute("UPDATE tool_calls SET started_at = now() - interval '2 hours'")
    async with asyncio.timeout(STORM_SECONDS):
        assert (await engine.port(session).wait(task.id, call_id="call_a")).state is TaskState.RUNNING


async def test_a_wait_ends_with_the_child(engine_of: EngineOf) -> None:
    engine = engine_of(TaskLimits())
    session, _ = await engine.parent()
    task = await engine.spawn(session, WAITED_FOR)
    waiting = asyncio.create_task(engine.port(session).wait(task.id, call_id="call_a"))
    await engine.answer(task)
    async with asyncio.timeout(STORM_SECONDS):
        assert (await waiting).summary == "Forty-two."


async def test_a_long_answer_is_cut_and_says_where_the_rest_is(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    await engine.answer(task, "x" * 40_000)
    summary = (await engine.task(task)).summary or ""
    assert summary.startswith("x" * 32_000 + "\n\n[")
    assert child_of(task) in summary


@pytest.mark.parametrize(
    ("ending", "fields", "state", "kind"),
    [
        (TurnEnding.FAILED, {"error_code": "budget_exhausted"}, TaskState.FAILED, "budget_exhausted"),
        (TurnEnding.FAILED, {}, TaskState.FAILED, "processing_error"),
        (TurnEnding.SEALED, {"reason": "lost"}, TaskState.FAILED, "no_progress"),
        (TurnEnding.CANCELLED, {"reason": "enough"}, TaskState.CANCELED, None),
    ],
)
async def test_a_turn_that_does_not_end_well_ends_its_task_the_same_way(
    engine: Engine, ending: TurnEnding, fields: dict[str, str], state: TaskState, kind: str | None
) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    await engine.finish(await engine.work(child_of(task)), ending, **fields)
    ended = await engine.task(task)
    assert (ended.state, ended.error and ended.error.kind) == (state, kind)
    assert len(await engine.told(session)) == 1


async def test_a_message_in_time_keeps_the_task_running(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    ref = await engine.work(child_of(task))
    await engine.port(session).send(task.id, "And this?", idempotency_key="m")
    await engine.finish(ref, TurnEnding.FAILED)
    assert (await engine.task(task)).state is TaskState.RUNNING, "another turn follows"
    await engine.answer(task, "Now I know.")
    assert (await engine.task(task)).summary == "Now I know."


async def test_a_child_that_waits_for_a_client_shows_it_until_it_goes_on(engine: Engine) -> None:
    session, _ = await engine.parent()
    request = msgspec.structs.replace(LOOK, wake_policy=WakePolicy.ON_ACTIVITY)
    task = await engine.spawn(session, request)
    child = child_of(task)
    ref = await engine.work(child)
    await engine.store.commit_reason(ref, outcome("", planned("held", "gate", "client")))
    waiting = await engine.task(task)
    assert waiting.state is TaskState.AWAITING_INPUT
    assert waiting.input_request is not None
    assert (waiting.input_request.id, waiting.input_request.prompt) == ("held", "Results of `gate`")
    assert len(await engine.told(session)) == 1
    again = msgspec.structs.replace(ref, iteration=2, exec_id=new_id(Prefix.EXEC))
    assert isinstance(await engine.store.begin_reason(again, "timed_out"), ReasonBriefing)
    going_on = await engine.task(task)
    assert (going_on.state, going_on.input_request) == (TaskState.RUNNING, None)


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [TurnEnding.CANCELLED, TurnEnding.FAILED, TurnEnding.SEALED])
async def test_a_turn_that_ends_cancels_the_child_its_call_waits_for_and_no_other(
    engine: Engine, ending: TurnEnding
) -> None:
    session, ref = await engine.parent("a", "b", "c")
    waited_for = await engine.spawn(session, WAITED_FOR, "a")
    beside = await engine.spawn(session, LOOK, "b")
    running = await engine.work(child_of(waited_for))
    await engine.finish(ref, ending)
    assert [call[1] for call in engine.turns.calls if call[0] == "cancel"] == [child_of(waited_for)]
    await engine.finish(running, TurnEnding.CANCELLED)
    assert (await engine.task(waited_for)).state is TaskState.CANCELED
    assert (await engine.task(beside)).state is TaskState.RUNNING
    assert await engine.told(session) == [], "nobody waits for it any more"


async def test_the_word_to_stop_is_repeated_when_it_was_lost(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    running = await engine.work(child_of(task))
    engine.turns.failure = DependencyUnavailable()
    asked = await engine.port(session).cancel(task.id)
    assert asked.cancel_requested_at is not None
    assert asked.state is TaskState.RUNNING
    engine.turns.failure = None
    upkeep = TaskUpkeep(engine.tasks)
    assert await upkeep.once() == 0, "it may still be on its way"
    await engine.execute(
        "UPDATE session_tasks SET cancel_requested_at = now() - interval '1 minute', updated_at = now() - interval '1 minute'"
    )
    engine.turns.calls.clear()
    assert await upkeep.once() == 1
    assert [call[:2] for call in engine.turns.calls] == [("cancel", child_of(task))]
    await engine.finish(running, TurnEnding.CANCELLED)
    assert (await engine.task(task)).state is TaskState.CANCELED


async def test_a_task_past_its_deadline_is_stopped_once_and_fails_with_timeout(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    running = await engine.work(child_of(task))
    await engine.execute("UPDATE session_tasks SET deadline_at = now() - interval '1 second'")
    assert await TaskUpkeep(engine.tasks).once() == 1
    assert await TaskUpkeep(engine.tasks).once() == 0
    asked = await engine.task(task)
    assert (asked.state, asked.error) == (TaskState.RUNNING, None), "until its turn has ended"
    await engine.finish(running, TurnEnding.CANCELLED)
    ended = await engine.task(task)
    assert (ended.state, ended.error and ended.error.kind) == (TaskState.FAILED, "timeout")
    assert "timeout" in (await engine.told(session))[0]


async def test_a_child_at_rest_is_cancelled_at_once_and_its_own_tasks_with_it(engine: Engine) -> None:
    session, _ = await engine.parent()
    middle = await engine.spawn(session)
    ref = await engine.work(child_of(middle))
    await engine.store.commit_reason(ref, outcome("", planned("below")))
    await engine.store.begin_call(engine.acting(ref), "below")
    below = await engine.spawn(child_of(middle), LOOK, "below")
    await engine.store.settle_call(engine.acting(ref), "below", ToolSettlement(status="success", result=[]))
    last = msgspec.structs.replace(ref, iteration=2, exec_id=new_id(Prefix.EXEC))
    await engine.store.begin_reason(last, "interrupted")
    await engine.store.commit_reason(last, outcome("I wait."))
    assert (await engine.task(middle)).state is TaskState.RUNNING
    running = await engine.work(child_of(below))
    stopped = await engine.port(session).cancel(middle.id)
    assert stopped.state is TaskState.CANCELED
    assert ("cancel", child_of(below)) in [call[:2] for call in engine.turns.calls]
    await engine.finish(running, TurnEnding.CANCELLED)
    assert (await engine.task(below)).state is TaskState.CANCELED
    assert await engine.told(child_of(middle)) == [], "it is not put to work again"
    await engine.execute("UPDATE sessions SET deleted_at = now() WHERE parent_session_id IS NOT NULL")
    with pytest.raises(TaskProblem, match="deleted"):
        await engine.port(session).send(middle.id, "Go on", idempotency_key="m")


async def test_a_child_begun_while_its_parent_was_deleted_is_stopped(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    key = parse_id(Prefix.SESSION, session)
    await engine.execute("UPDATE sessions SET deleted_at = now() WHERE id = $1", key)
    assert await TaskUpkeep(engine.tasks).once() == 1
    assert ("cancel", child_of(task)) in [call[:2] for call in engine.turns.calls]


async def test_parents_and_children_that_move_at_once_never_lock_each_other_out(engine_of: EngineOf) -> None:
    engine = engine_of(TaskLimits(max_running=50))
    calls = [f"call_{number}" for number in range(12)]
    session, ref = await engine.parent(*calls)
    modes = [WAITED_FOR if number % 3 == 0 else LOOK for number in range(len(calls))]
    tasks = [await engine.spawn(session, mode, call_id) for mode, call_id in zip(modes, calls, strict=True)]
    steps = [await engine.work(child_of(task)) for task in tasks]

    async def end(place: int) -> None:
        await engine.store.commit_reason(steps[place], outcome(f"answer {place}"))

    work: list[Awaitable[object]] = [end(place) for place in range(0, len(tasks), 2)]
    work += [engine.port(session).cancel(tasks[place].id) for place in range(1, len(tasks), 2)]
    work += [
        engine.services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text="and?")]))
        for _ in range(6)
    ]
    work += [
        engine.tasks.send(
            await engine.tasks.get(session, tasks[2].id), [], message=parse_id(Prefix.TASK, new_id(Prefix.TASK))
        )
        for _ in range(4)
    ]
    work.append(engine.finish(ref, TurnEnding.CANCELLED))
    work.append(TaskUpkeep(engine.tasks).once())
    async with asyncio.timeout(STORM_SECONDS):
        found = await asyncio.gather(*work, return_exceptions=True)
    assert [error for error in found if isinstance(error, BaseException) and not isinstance(error, TaskProblem)] == []
    for place in range(1, len(tasks), 2):
        await engine.finish(steps[place], TurnEnding.CANCELLED)
    states = {(await engine.task(task)).state for task in tasks}
    assert states <= {TaskState.SUCCEEDED, TaskState.CANCELED, TaskState.RUNNING}


async def test_steps_that_charge_the_same_budget_never_lock_each_other_out(
    engine_of: EngineOf, client: httpx.AsyncClient
) -> None:
    engine = engine_of(TaskLimits())
    calls = [f"call_{number}" for number in range(8)]
    session, ref = await engine.parent(*calls)
    budget = {"subject_type": "session", "subject_id": session, "currency": "tokens", "limit": 1_000_000}
    assert (await client.post(f"{API}/budgets", json=budget)).status_code == 201
    tasks = [await engine.spawn(session, LOOK, call_id) for call_id in calls]
    for call_id in calls:
        await engine.store.settle_call(engine.acting(ref), call_id, ToolSettlement(status="success", result=[]))
    steps = [await engine.work(child_of(task)) for task in tasks]
    own = msgspec.structs.replace(ref, iteration=2, exec_id=new_id(Prefix.EXEC))
    await engine.store.begin_reason(own, "interrupted")
    async with asyncio.timeout(STORM_SECONDS):
        # Each holds its session, charges the budget of them all, and has something to tell the parent, which charges too.
        await asyncio.gather(
            *(engine.store.commit_reason(one, outcome("Done.")) for one in steps[:4]),
            engine.store.commit_reason(own, outcome("Started.")),
            *(engine.store.commit_reason(one, outcome("Done.")) for one in steps[4:]),
        )
    assert {(await engine.task(task)).state for task in tasks} == {TaskState.SUCCEEDED}
    assert len(await engine.told(session)) == len(tasks)
    (charged,) = (await client.get(f"{API}/sessions/{session}/budgets")).json()
    assert charged["limit"] - charged["balance"] == 2 * (len(tasks) + 1), "the whole tree spends from it"


async def test_a_result_whose_worker_died_before_it_was_told_is_told_by_the_reconciler(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    ref = await engine.work(child_of(task))
    # A log that follows nobody: what a worker leaves that is lost right after its commit.
    await turn_store(engine.services.log).commit_reason(ref, outcome("Forty-two."))
    assert (await engine.task(task)).state is TaskState.RUNNING
    upkeep = TaskUpkeep(engine.tasks)
    assert await upkeep.once() == 0, "its worker may still be about to tell"
    await engine.execute("UPDATE session_tasks SET updated_at = now() - interval '1 minute'")
    await engine.execute("UPDATE session_state SET updated_at = now() - interval '1 minute'")
    engine.turns.calls.clear()
    assert await upkeep.once() == 1
    assert (await engine.task(task)).summary == "Forty-two."
    assert engine.turns.calls == [("wake", session)]
    assert len(await engine.told(session)) == 1
    assert await upkeep.once() == 0


# --- whose task it is -------------------------------------------------------------------------------------------------


async def test_tools_reach_tasks_of_their_own_session_only(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    other = engine.port(await engine.session())
    for task_id in (task.id, new_id(Prefix.TASK), "task_1", "", "x" * 500):
        attempts: list[Awaitable[object]] = [
            other.get(task_id),
            other.send(task_id, "hi", idempotency_key="m"),
            other.cancel(task_id),
            other.wait(task_id, call_id="c"),
            other.detach(task_id),
        ]
        for attempt in attempts:
            with pytest.raises(TaskProblem, match="There is no task"):
                await attempt
    assert await other.find() == []
    assert (await engine.task(task)).cancel_requested_at is None


async def test_tasks_of_other_organizations_do_not_exist(engine: Engine, client: httpx.AsyncClient) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    await engine.execute("UPDATE session_tasks SET org_id = $1", SECOND_ORG)
    base = f"{API}/sessions/{session}/tasks/{task.id}"
    assert (await client.get(base)).status_code == 404
    assert (await client.post(f"{base}/cancel")).status_code == 404
    assert (await client.post(f"{base}/messages", json={"text": "hi"})).status_code == 404
    assert (await client.get(f"{API}/tasks")).json() == []
    await engine.execute("UPDATE sessions SET org_id = $1", SECOND_ORG)
    assert (await client.get(f"{API}/sessions/{session}/tasks")).status_code == 404
    assert (await engine.task(task)).cancel_requested_at is None


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_lists_are_filtered(engine: Engine, client: httpx.AsyncClient) -> None:
    session, _ = await engine.parent("a", "b")
    first, second = [await engine.spawn(session, LOOK, one) for one in "ab"]
    await engine.answer(first)

    async def ids(path: str, **params: str) -> list[str]:
        answer = await client.get(f"{API}/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return [one["id"] for one in answer.json()]

    own = f"sessions/{session}/tasks"
    assert await ids(own) == [second.id, first.id]
    assert await ids(own, state="succeeded") == [first.id]
    assert await ids(own, kind="subagent", state="running") == [second.id]
    assert await ids(own, kind="monitor") == []
    assert await ids("tasks", root_session_id=session, limit="1") == [second.id]
    assert await ids("tasks", root_session_id=new_id(Prefix.SESSION)) == []
    assert await ids("tasks", created_after=second.created_at.replace("Z", "+00:00")) in ([], [second.id])
    assert await ids("tasks", created_after="2000-01-01T00:00:00Z") == [second.id, first.id]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("tasks?state=lost", "state"),
        ("tasks?created_after=yesterday", "created_after"),
        ("tasks?limit=0", "limit"),
        ("tasks?root_session_id=session_1", "session_id"),
        ("sessions/session_1/tasks", "session_id"),
    ],
)
async def test_a_filter_that_makes_no_sense_is_refused_by_name(
    client: httpx.AsyncClient, path: str, field: str
) -> None:
    answer = await client.get(f"{API}/{path}")
    assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": "a", "content": [{"type": "text", "text": "b"}]}, "content"),
        ({"text": ""}, "text"),
        ({"content": []}, "content"),
        ({"content": [{"type": "image"}]}, "content[0].type"),
        ({"text": "x" * 32_001}, "text"),
        ({"text": "a", "in_reply_to": "held"}, "in_reply_to"),
    ],
)
async def test_a_message_that_makes_no_sense_is_refused_by_name(
    engine: Engine, client: httpx.AsyncClient, body: dict[str, object], field: str
) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    answer = await client.post(f"{API}/sessions/{session}/tasks/{task.id}/messages", json=body)
    assert (answer.status_code, answer.json().get("field")) == (400, field), answer.text


async def test_messages_are_kept_in_order_and_told(engine: Engine, client: httpx.AsyncClient) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    base = f"{API}/sessions/{session}/tasks/{task.id}"
    ids = []
    for body in ({"text": "one"}, {"content": [{"type": "data", "data": {"n": 2}}]}, {"text": "three"}):
        answer = await client.post(f"{base}/messages", json=body)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["direction"], answer.json()["task_id"]) == ("inbound", task.id)
        ids.append(answer.json()["id"])
    assert [data["message"]["id"] for data in await engine.events(session, "task.message.sent")] == ids
    texts = [data["message"]["content"][0]["text"] for data in await engine.events(child_of(task), "input.message")]
    assert texts == ["Find out.", "one", '{"n":2}', "three"]

    async def thread(**params: object) -> list[str]:
        answer = await client.get(base, params={name: str(value) for name, value in params.items()})
        assert answer.json()["task"]["id"] == task.id
        return [one["id"] for one in answer.json()["messages"]]

    assert await thread() == ids
    assert await thread(limit=2) == ids[1:]
    assert await thread(after_id=ids[0]) == ids[1:]
    assert await thread(after_id=ids[0], limit=1) == ids[1:2]
    assert (await client.get(base, params={"after_id": "tmsg_1"})).status_code == 400


async def test_a_retried_message_is_said_once(engine: Engine) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    await asyncio.gather(*(engine.port(session).send(task.id, "once", idempotency_key="m") for _ in range(4)))
    assert len(await engine.events(child_of(task), "input.message")) == 2
    assert len(await engine.events(session, "task.message.sent")) == 1


async def test_what_a_task_waits_for_can_be_answered_through_it(engine: Engine, client: httpx.AsyncClient) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    child = child_of(task)
    await engine.store.commit_reason(await engine.work(child), outcome("", planned("held", "gate", "client")))
    answer = await client.post(
        f"{API}/sessions/{session}/tasks/{task.id}/messages", json={"text": "yes", "in_reply_to": "held"}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["in_reply_to"] == "held"
    (completed,) = await engine.events(child, "tool.completed")
    assert completed["result"] == [{"type": "text", "text": "yes"}]
    assert ("tool_results", child, "held") in engine.turns.calls
    assert len(await engine.events(child, "input.message")) == 1, "an answer is no message"


async def test_cancelling_over_the_api_tells_the_parent(engine: Engine, client: httpx.AsyncClient) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    running = await engine.work(child_of(task))
    base = f"{API}/sessions/{session}/tasks/{task.id}"
    assert (await client.post(f"{base}/cancel")).json()["cancel_requested_at"]
    refused = await client.post(f"{base}/messages", json={"text": "wait"})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    await engine.finish(running, TurnEnding.CANCELLED)
    assert len(await engine.told(session)) == 1
    assert (await client.post(f"{base}/cancel")).json()["state"] == "canceled"


async def test_cancelling_a_session_at_rest_stops_its_tasks(engine: Engine, client: httpx.AsyncClient) -> None:
    session, ref = await engine.parent()
    task = await engine.spawn(session)
    await engine.work(child_of(task))
    await engine.finish(ref, TurnEnding.FAILED)
    engine.turns.calls.clear()
    assert (await client.post(f"{API}/sessions/{session}/cancel", json={})).json()["status"] == "cancelled"
    assert [call[:2] for call in engine.turns.calls] == [("cancel", child_of(task))]


async def test_deleting_a_session_hides_the_whole_tree_and_ends_its_tasks(
    engine: Engine, client: httpx.AsyncClient
) -> None:
    session, _ = await engine.parent()
    task = await engine.spawn(session)
    child = child_of(task)
    await engine.work(child)
    assert (await client.delete(f"{API}/sessions/{session}")).status_code == 204
    for one in (session, child):
        assert (await client.get(f"{API}/sessions/{one}")).status_code == 404
        assert ("cancel", one) in [call[:2] for call in engine.turns.calls]
    assert (await client.get(f"{API}/tasks")).json() == []
    assert (await engine.task(task)).state is TaskState.CANCELED
