"""The transitions of a turn in the database: who may write, what a retry finds, and what counts as lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from api.services import Services
from db.messages import NewMessage
from db.turn_store import TurnStore
from domain.events import NewEvent, OutputMessageDelta, TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id
from domain.messages import TextPart
from domain.tools import SideEffect, ToolCall
from domain.turns import (
    ActResult,
    ArrivedAnswer,
    GenerationNote,
    NoProgress,
    PlannedCall,
    ReasonBriefing,
    ReasonNext,
    ReasonOutcome,
    ReasonResult,
    ResolvedModel,
    StepFenced,
    StepRef,
    ToolClaim,
    ToolSettlement,
)
from tests.conftest import turn_store
from workflows.contract import LOST_ATTEMPTS_BEFORE_SEAL

MODEL = ResolvedModel(
    public_id=new_id(Prefix.MODEL), name="m", provider_public_id=new_id(Prefix.PROVIDER), provider_type="llmsim"
)


@pytest.fixture
def store(services: Services) -> TurnStore:
    return turn_store(services.log)


async def posted(services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]) -> str:
    session = str((await make_session())["id"])
    await services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text="hi")]))
    return session


def step(session: str, *, attempt: int = 1, **fields: str) -> StepRef:
    return StepRef(
        session_id=session,
        turn_id=fields.get("turn_id") or new_id(Prefix.TURN),
        iteration=1,
        exec_id=fields.get("exec_id") or new_id(Prefix.EXEC),
        attempt=attempt,
        worker=fields.get("worker", "a"),
    )


async def events_of(services: Services, session: str, event_type: str) -> list[dict[str, object]]:
    events = await services.log.read(session, after_sequence=0, limit=1_000, types=[event_type])
    return [msgspec.json.decode(event.data) for event in events]


def again(ref: StepRef, attempt: int, worker: str = "b") -> StepRef:
    return step(ref.session_id, attempt=attempt, turn_id=ref.turn_id, exec_id=ref.exec_id, worker=worker)


def outcome(*calls: PlannedCall) -> ReasonOutcome:
    return ReasonOutcome(
        model=MODEL,
        prompt=[],
        offered_tools=[],
        text="done",
        answer=ArrivedAnswer(
            finish_reason="stop",
            usage=TokenUsage(input_tokens=1, output_tokens=1),
            text_length=len("done"),
            duration_ms=1,
            calls=list(calls),
        ),
    )


def planned(side_effect: SideEffect) -> PlannedCall:
    call = ToolCall(id="call_a", name="tool", arguments={})
    return PlannedCall(call=call, kind="server", side_effect=side_effect, timeout_seconds=5)


async def acting(
    store: TurnStore,
    services: Services,
    make_session: Callable[..., Awaitable[dict[str, object]]],
    side_effect: SideEffect,
) -> StepRef:
    """A turn whose model has called one tool; the ref of the call's first attempt."""
    ref = step(await posted(services, make_session))
    await store.begin_reason(ref, "interrupted")
    assert (await store.commit_reason(ref, outcome(planned(side_effect)))).next is ReasonNext.ACT
    return step(ref.session_id, turn_id=ref.turn_id)


async def test_an_attempt_that_was_overtaken_can_write_nothing(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    old = step(await posted(services, make_session))
    briefing = await store.begin_reason(old, "interrupted")
    assert isinstance(briefing, ReasonBriefing)
    new = again(old, attempt=2)
    await store.begin_reason(new, "interrupted")
    before = await services.log.last_sequence(old.session_id)
    delta = OutputMessageDelta(turn_id=old.turn_id, message_id=briefing.message_id, delta="late", offset=0)
    for write in (
        store.append(old, [NewEvent(data=delta)]),
        store.commit_reason(old, outcome()),
        store.release_step(old),
        store.begin_reason(old, "interrupted"),
    ):
        with pytest.raises(StepFenced):
            await write
    assert await services.log.last_sequence(old.session_id) == before
    assert (await store.commit_reason(new, outcome())).next is ReasonNext.DONE


async def test_a_retry_of_a_finished_step_gets_its_stored_result(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    ref = step(await posted(services, make_session))
    await store.begin_reason(ref, "interrupted")
    await store.commit_reason(ref, outcome())
    before = await services.log.last_sequence(ref.session_id)
    found = await store.begin_reason(again(ref, attempt=2), "interrupted")
    assert isinstance(found, ReasonResult)
    assert found.next is ReasonNext.DONE
    assert await services.log.last_sequence(ref.session_id) == before


async def test_a_run_without_anything_unread_makes_no_turn(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    session = str((await make_session())["id"])
    before = await services.log.last_sequence(session)
    assert await store.begin_reason(step(session), "interrupted") == ReasonResult(next=ReasonNext.NOTHING)
    assert await services.log.last_sequence(session) == before


async def test_only_attempts_that_began_count_as_lost(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    ref = step(await posted(services, make_session))
    # Temporal may count high while the database is away: the first attempt that gets here is the first.
    attempts = range(40, 40 + LOST_ATTEMPTS_BEFORE_SEAL)
    for attempt in attempts:
        assert isinstance(await store.begin_reason(again(ref, attempt), "interrupted"), ReasonBriefing)
    with pytest.raises(NoProgress):
        await store.begin_reason(again(ref, attempts[-1] + 1), "interrupted")


async def test_attempts_handed_over_do_not_count_as_lost(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    ref = step(await posted(services, make_session))
    for attempt in range(1, 3 * LOST_ATTEMPTS_BEFORE_SEAL):
        await store.begin_reason(again(ref, attempt), "interrupted")
        await store.release_step(again(ref, attempt))


async def test_calls_handed_over_do_not_count_as_lost_and_lost_ones_do(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    first = await acting(store, services, make_session, SideEffect.IDEMPOTENT)
    for attempt in range(1, 3 * LOST_ATTEMPTS_BEFORE_SEAL):
        assert isinstance(await store.begin_call(again(first, attempt), "call_a"), ToolClaim)
        await store.release_call(again(first, attempt), "call_a")
        # Of an attempt that has been overtaken since: says nothing about the one that runs.
        await store.release_call(again(first, attempt - 1), "call_a")
    for attempt in range(20, 20 + LOST_ATTEMPTS_BEFORE_SEAL):
        assert isinstance(await store.begin_call(again(first, attempt), "call_a"), ToolClaim)
    with pytest.raises(NoProgress):
        await store.begin_call(again(first, 30), "call_a")


async def test_a_call_with_effects_is_not_run_again_after_its_worker_was_lost(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    first = await acting(store, services, make_session, SideEffect.AT_MOST_ONCE)
    assert isinstance(await store.begin_call(first, "call_a"), ToolClaim)
    assert isinstance(await store.begin_call(again(first, attempt=2), "call_a"), ActResult)
    with pytest.raises(StepFenced):
        await store.settle_call(again(first, attempt=3), "call_a", ToolSettlement(status="success", result=[]))


async def test_a_claim_whose_answer_was_lost_is_the_same_claim(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    ref = await acting(store, services, make_session, SideEffect.AT_MOST_ONCE)
    claimed = await store.begin_call(ref, "call_a")
    before = await services.log.last_sequence(ref.session_id)
    assert await store.begin_call(ref, "call_a") == claimed
    assert await services.log.last_sequence(ref.session_id) == before
    with pytest.raises(StepFenced):
        await store.begin_call(again(ref, attempt=1, worker="another"), "call_a")


@pytest.mark.parametrize("side_effect", [SideEffect.PURE, SideEffect.IDEMPOTENT])
async def test_a_repeatable_call_runs_again_and_its_first_worker_is_fenced(
    store: TurnStore,
    services: Services,
    make_session: Callable[..., Awaitable[dict[str, object]]],
    side_effect: SideEffect,
) -> None:
    first = await acting(store, services, make_session, side_effect)
    await store.begin_call(first, "call_a")
    second = again(first, attempt=2)
    assert isinstance(await store.begin_call(second, "call_a"), ToolClaim)
    done = ToolSettlement(status="success", result=[TextPart(text="1")])
    with pytest.raises(StepFenced):
        await store.settle_call(first, "call_a", done)
    assert await store.settle_call(second, "call_a", done) == ActResult()
    # Settled: whoever asks again gets the result, and nothing runs.
    assert await store.begin_call(again(first, attempt=3), "call_a") == ActResult()


async def test_an_answer_that_had_arrived_whole_is_finished_by_the_next_attempt_without_another_call(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    model = await services.database.pool.fetchval("SELECT id FROM models WHERE model_id = 'llmsim-model'")
    await services.database.pool.execute("UPDATE organizations SET default_model_id = $1", model)
    first = step(await posted(services, make_session))
    briefing = await store.begin_reason(first, "interrupted")
    assert isinstance(briefing, ReasonBriefing)
    assert briefing.model is not None
    answer = msgspec.structs.replace(outcome(planned(SideEffect.PURE)).answer, text_length=len("all of it"))
    for delta, offset, note in (
        ("all of", 0, None),
        (" it", 6, GenerationNote(model_id=briefing.model.public_id, answer=answer)),
    ):
        event = OutputMessageDelta(turn_id=first.turn_id, message_id=briefing.message_id, delta=delta, offset=offset)
        await store.append(first, [NewEvent(data=event)], note)
    second = again(first, attempt=2)
    found = await store.begin_reason(second, "interrupted")
    assert isinstance(found, ReasonBriefing)
    assert (found.answer, found.partial_text, found.resume) == (answer, "all of it", None)
    recovered = await events_of(services, first.session_id, "reason.recovered")
    assert [(one["mode"], one["accumulated_len"]) for one in recovered] == [("finalize", 9)]
    whole = msgspec.structs.replace(outcome(planned(SideEffect.PURE)), text=found.partial_text, answer=answer)
    assert (await store.commit_reason(second, whole)).next is ReasonNext.ACT
    # What was noted is gone with the step: the next one begins with nothing.
    assert await services.database.pool.fetchval("SELECT count(*) FROM running_generations") == 0


async def test_a_note_about_an_answer_that_does_not_match_the_log_is_not_trusted(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    model = await services.database.pool.fetchval("SELECT id FROM models WHERE model_id = 'llmsim-model'")
    await services.database.pool.execute("UPDATE organizations SET default_model_id = $1", model)
    first = step(await posted(services, make_session))
    briefing = await store.begin_reason(first, "interrupted")
    assert isinstance(briefing, ReasonBriefing)
    assert briefing.model is not None
    answer = msgspec.structs.replace(outcome().answer, text_length=1_000)
    event = OutputMessageDelta(turn_id=first.turn_id, message_id=briefing.message_id, delta="half", offset=0)
    await store.append(first, [NewEvent(data=event)], GenerationNote(model_id=briefing.model.public_id, answer=answer))
    found = await store.begin_reason(again(first, attempt=2), "interrupted")
    assert isinstance(found, ReasonBriefing)
    assert found.answer is None
    recovered = await events_of(services, first.session_id, "reason.recovered")
    assert [one["mode"] for one in recovered] == ["restart"]


async def test_an_overtaken_attempt_can_leave_no_note(
    store: TurnStore, services: Services, make_session: Callable[..., Awaitable[dict[str, object]]]
) -> None:
    old = step(await posted(services, make_session))
    await store.begin_reason(old, "interrupted")
    await store.begin_reason(again(old, attempt=2), "interrupted")
    with pytest.raises(StepFenced):
        await store.append(old, [], GenerationNote(model_id=MODEL.public_id, response_id="resp_1", cursor=3))
    assert await services.database.pool.fetchval("SELECT count(*) FROM running_generations") == 0
