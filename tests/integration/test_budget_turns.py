"""Where budgets meet turns, in the database: what is charged, what pauses, what ends, and what a retry finds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import msgspec
import pytest

from api.services import Services
from db import budget_gate, budgets
from db.budgets import NewBudget
from db.database import Database
from db.messages import NewMessage
from db.turn_store import TurnStore
from domain.budgets import BudgetStatus, DurationPeriod, SubjectType
from domain.events import ContextCompactionSkipped, NewEvent, StoredEvent, TokenUsage
from domain.ids import DEFAULT_ORG_ID, DEFAULT_ORG_PUBLIC_ID, Prefix, derived_id, new_id, parse_id
from domain.log_check import check_log
from domain.messages import TextPart
from domain.tools import SideEffect, ToolCall
from domain.turns import (
    ArrivedAnswer,
    FinishInput,
    PlannedCall,
    ReasonBriefing,
    ReasonNext,
    ReasonOutcome,
    ReasonResult,
    StepFenced,
    StepRef,
    ToolClaim,
    ToolSettlement,
    TurnEnding,
)
from tests.conftest import turn_store
from tests.integration.test_turn_store import MODEL

MakeSession = Callable[..., Awaitable[dict[str, object]]]
TOKENS_PER_CALL = 100
A_CALL = PlannedCall(
    call=ToolCall(id="call_a", name="tool", arguments={}),
    kind="server",
    side_effect=SideEffect.PURE,
    timeout_seconds=5,
)


@pytest.fixture
def store(services: Services) -> TurnStore:
    return turn_store(services.log)


def step(session: str, turn_id: str | None = None, iteration: int = 1, attempt: int = 1) -> StepRef:
    turn = turn_id or new_id(Prefix.TURN)
    exec_id = derived_id(Prefix.EXEC, parse_id(Prefix.TURN, turn), f"reason:{iteration}")
    return StepRef(session_id=session, turn_id=turn, iteration=iteration, exec_id=exec_id, attempt=attempt, worker="a")


def outcome(*calls: PlannedCall, usage: TokenUsage | None = None) -> ReasonOutcome:
    """Without a text, which would need deltas."""
    return ReasonOutcome(
        model=MODEL,
        prompt=[],
        offered_tools=[],
        text="",
        answer=ArrivedAnswer(
            finish_reason="stop",
            usage=usage or TokenUsage(input_tokens=60, output_tokens=40),
            text_length=0,
            duration_ms=1,
            calls=list(calls),
        ),
    )


async def post(services: Services, session: str, text: str = "hi") -> str:
    posted = await services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text=text)]))
    return posted.message.id


async def budget_for(
    services: Services, session: str, limit: int, soft_limit: int | None = None, **fields: object
) -> str:
    new = NewBudget(
        **{
            "subject_type": SubjectType.SESSION,
            "subject_id": session,
            "currency": "tokens",
            "limit": Decimal(limit),
            "soft_limit": None if soft_limit is None else Decimal(soft_limit),
            **fields,
        }  # type: ignore[arg-type]
    )
    return (await budgets.create_budget(services.database, new)).budget.id


async def begun(store: TurnStore, ref: StepRef) -> ReasonBriefing:
    briefing = await store.begin_reason(ref, "interrupted")
    assert isinstance(briefing, ReasonBriefing), briefing
    return briefing


async def held(store: TurnStore, ref: StepRef) -> ReasonResult:
    result = await store.begin_reason(ref, "interrupted")
    assert isinstance(result, ReasonResult), "a model call was allowed"
    return result


async def answered(store: TurnStore, services: Services, session: str) -> ReasonResult:
    """A whole turn of one call."""
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    return await store.commit_reason(ref, outcome())


async def tool_run(store: TurnStore, ref: StepRef) -> None:
    call = StepRef(**{**msgspec.structs.asdict(ref), "exec_id": new_id(Prefix.EXEC)})
    assert isinstance(await store.begin_call(call, "call_a"), ToolClaim)
    await store.settle_call(call, "call_a", ToolSettlement(status="success", result=[TextPart(text="5")]))


async def log_of(services: Services, session: str, *, finished: bool = True) -> list[StoredEvent]:
    """The log, which breaks no invariant."""
    log = await services.log.read(session, after_sequence=0, limit=1_000)
    assert check_log(log, finished=finished) == []
    return log


def types(log: list[StoredEvent], *beginnings: str) -> list[str]:
    return [event.type for event in log if event.type.startswith(beginnings)]


async def status_of(database: Database, session: str) -> str:
    query = "SELECT status FROM session_state WHERE session_id = $1"
    return await database.pool.fetchval(query, parse_id(Prefix.SESSION, session))


async def spent(services: Services, budget: str) -> Decimal:
    """Of the budget's row, which must be what its ledger says."""
    stored = (await budgets.get_budget(services.database, budget)).budget
    ledger = await budgets.read_ledger(services.database, budget, limit=100, offset=0)
    assert float(stored.spent) == pytest.approx(sum(entry.amount for entry in ledger))
    return stored.spent


# --- charging ---------------------------------------------------------------------------------------------------------


async def test_a_call_is_charged_once_however_often_its_commit_is_repeated(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000)
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    first = await store.commit_reason(ref, outcome(A_CALL))
    assert first.next is ReasonNext.ACT
    assert await store.commit_reason(ref, outcome(A_CALL)) == first
    assert await spent(services, budget) == TOKENS_PER_CALL
    (entry,) = await budgets.read_ledger(services.database, budget, limit=10, offset=0)
    assert (entry.meter_source, entry.ref_type, entry.ref_id) == ("llm_generation", "exec", ref.exec_id)
    assert (entry.amount, entry.session_id) == (TOKENS_PER_CALL, session)


async def test_an_attempt_that_was_overtaken_is_not_charged(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000)
    await post(services, session)
    old = step(session)
    await begun(store, old)
    new = step(session, old.turn_id, attempt=2)
    await begun(store, new)
    with pytest.raises(StepFenced):
        await store.commit_reason(old, outcome())
    assert await spent(services, budget) == 0
    await store.commit_reason(new, outcome())
    assert await spent(services, budget) == TOKENS_PER_CALL


async def test_a_compactions_own_call_is_charged_once(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000)
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    skipped = ContextCompactionSkipped(
        reason="proactive_budget",
        trigger="context_budget",
        skip_reason="no_material_reduction",
        strategy="auto",
        model="m",
        tokens_observed=1,
        messages_observed=1,
    )
    event = NewEvent(data=skipped, dedupe_key="compaction:1")
    for _ in range(2):
        await store.install_checkpoint(ref, None, [event], TokenUsage(input_tokens=5, output_tokens=2))
    assert await spent(services, budget) == 7
    await store.commit_reason(ref, outcome())
    assert await spent(services, budget) == 7 + TOKENS_PER_CALL


async def test_every_budget_above_a_session_is_charged_in_its_own_currency(
    store: TurnStore, services: Services, make_session: MakeSession, make_agent: MakeSession
) -> None:
    agent = await make_agent()
    root = str((await make_session())["id"])
    session = str((await make_session(agent_id=agent["id"]))["id"])
    stranger = str((await make_session())["id"])
    await services.database.pool.execute(
        "UPDATE sessions SET parent_session_id = $2 WHERE id = $1",
        parse_id(Prefix.SESSION, session),
        parse_id(Prefix.SESSION, root),
    )
    kinds = {
        "own": (SubjectType.SESSION, session, "tokens"),
        "root": (SubjectType.SESSION, root, "credits"),
        "agent": (SubjectType.AGENT, str(agent["id"]), "usd"),
        "harness": (SubjectType.HARNESS, str(agent["harness_id"]), "tokens"),
        "user": (SubjectType.USER, f"user_{1:032x}", "tokens"),
        "org": (SubjectType.ORG, DEFAULT_ORG_PUBLIC_ID, "tokens"),
        "own_currency": (SubjectType.SESSION, session, "seats"),
        "stranger": (SubjectType.SESSION, stranger, "tokens"),
    }
    made = {
        name: await budget_for(services, session, 1_000, subject_type=kind, subject_id=subject, currency=currency)
        for name, (kind, subject, currency) in kinds.items()
    }
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    usage = TokenUsage(input_tokens=50, output_tokens=40, cache_read_tokens=10, effective_cost_usd=0.000123)
    await store.commit_reason(ref, outcome(usage=usage))
    assert {name: await spent(services, budget) for name, budget in made.items()} == {
        "own": 100,
        "root": Decimal("0.1"),
        "agent": Decimal("0.000123"),
        "harness": 100,
        "user": 100,
        "org": 100,
        "own_currency": 0,
        "stranger": 0,
    }


async def test_sessions_that_spend_from_the_same_budgets_neither_deadlock_nor_lose_a_charge(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    turns = 4
    sessions = [str((await make_session())["id"]) for _ in range(4)]
    shared = [
        await budget_for(services, "", 10_000, subject_type=kind, subject_id=subject)
        for kind, subject in (
            (SubjectType.ORG, DEFAULT_ORG_PUBLIC_ID),
            (SubjectType.USER, f"user_{1:032x}"),
            (SubjectType.ORG, DEFAULT_ORG_PUBLIC_ID),
        )
    ]

    async def work(session: str) -> None:
        for _ in range(turns):
            await answered(store, services, session)

    async def tend() -> None:
        for _ in range(turns):
            for budget in shared:
                await budgets.top_up(services.database, services.log, budget, Decimal(1), None)
            await budgets.resume_session(services.database, services.log, sessions[0])

    async with asyncio.timeout(60):
        await asyncio.gather(tend(), *(work(session) for session in sessions))
    expected = len(sessions) * turns * TOKENS_PER_CALL - turns
    assert [await spent(services, budget) for budget in shared] == [expected] * len(shared)


async def test_the_ledger_survives_its_session_and_changes_in_nothing_else(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000)
    await answered(store, services, session)
    pool = services.database.pool
    for tampering in (
        "UPDATE budget_ledger SET amount = 0",
        "UPDATE budget_ledger SET session_id = NULL, amount = 0",
        "DELETE FROM budget_ledger",
    ):
        with pytest.raises(Exception, match="append-only"):
            await pool.execute(tampering)
    await pool.execute("DELETE FROM sessions WHERE id = $1", parse_id(Prefix.SESSION, session))
    (entry,) = await budgets.read_ledger(services.database, budget, limit=10, offset=0)
    assert (entry.amount, entry.session_id) == (TOKENS_PER_CALL, None)


async def test_a_budget_warns_once_when_little_is_left(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 500)
    for _ in range(5):
        await answered(store, services, session)
    log = await log_of(services, session)
    assert types(log, "budget.") == ["budget.warning", "budget.exhausted"]
    (warning,) = [msgspec.json.decode(event.data) for event in log if event.type == "budget.warning"]
    assert warning == {
        "budget_id": budget,
        "currency": "tokens",
        "limit": 500,
        "balance": 100,
        "message": "The budget of this session is nearly used up: 100 of 500 tokens are left.",
    }


# --- pausing ----------------------------------------------------------------------------------------------------------


async def paused_in_the_middle(
    store: TurnStore, services: Services, session: str, *, soft_limit: int = 50, limit: int = 1_000
) -> tuple[str, StepRef]:
    """A turn whose first call has passed the soft limit and whose tool has run; its budget, and the step that was not made."""
    budget = await budget_for(services, session, limit, soft_limit)
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    assert (await store.commit_reason(ref, outcome(A_CALL))).next is ReasonNext.ACT
    await tool_run(store, ref)
    second = step(session, ref.turn_id, iteration=2)
    assert (await held(store, second)).next is ReasonNext.PAUSED
    return budget, second


async def test_a_turn_pauses_between_two_calls_and_a_retry_finds_it_paused(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    _, second = await paused_in_the_middle(store, services, session)
    before = await log_of(services, session, finished=False)
    assert await status_of(database, session) == "paused"
    assert types(before, "budget.", "turn.", "session.idled") == ["turn.started", "budget.paused"]
    assert (await held(store, second)).next is ReasonNext.PAUSED
    with pytest.raises(StepFenced):
        await store.commit_reason(second, outcome())
    assert len(await log_of(services, session, finished=False)) == len(before)


async def test_a_paused_turn_goes_on_under_its_own_name_after_a_resume(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    budget, second = await paused_in_the_middle(store, services, session)
    unread = await post(services, session, "And hurry.")
    assert await status_of(database, session) == "paused"
    assert (await held(store, step(session))).next is ReasonNext.PAUSED, "a message does not end a pause"

    resumed = await budgets.resume_session(services.database, services.log, session)
    assert (resumed.budgets, resumed.woken) == (1, [session])
    assert await status_of(database, session) == "active"
    run = step(session)
    taken_up = await held(store, run)
    assert taken_up == ReasonResult(next=ReasonNext.TAKE_UP, turn_id=second.turn_id, iteration=1)
    assert await held(store, run) == taken_up, "the answer was lost and is asked for again"
    briefing = await begun(store, second)
    assert [message.text for message in briefing.conversation.messages if message.id == unread] == ["And hurry."]
    assert (await store.commit_reason(second, outcome())).next is ReasonNext.DONE
    log = await log_of(services, session)
    assert types(log, "budget.", "turn.", "session.idled") == [
        "turn.started",
        "budget.paused",
        "budget.resumed",
        "turn.completed",
        "session.idled",
    ]
    assert (await budgets.get_budget(services.database, budget)).budget.status is BudgetStatus.ACTIVE
    assert await status_of(database, session) == "idle", "a soft limit that was waived pauses no more"


async def test_a_session_pauses_with_its_last_answer_and_keeps_what_comes_meanwhile(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000, 50)
    assert (await answered(store, services, session)).next is ReasonNext.DONE
    assert await status_of(database, session) == "paused"
    message = await post(services, session, "later")
    assert (await held(store, step(session))).next is ReasonNext.PAUSED
    changed = await budgets.top_up(services.database, services.log, budget, Decimal(10), "more")
    assert changed.woken == [session]
    ref = step(session)
    assert (await begun(store, ref)).input_message_id == message
    await store.commit_reason(ref, outcome())
    log = await log_of(services, session)
    assert types(log, "budget.", "turn.") == [
        "turn.started",
        "budget.paused",
        "turn.completed",
        "budget.resumed",
        "turn.started",
        "turn.completed",
    ]


async def test_a_period_that_ends_sets_paused_sessions_free_without_anybody(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 1_000, 50, period=DurationPeriod(seconds=3_600))
    await answered(store, services, session)
    await post(services, session)
    assert await budget_gate.release_all(services.log) == []
    await database.pool.execute(
        "UPDATE budgets SET period_started_at = period_started_at - interval '2 hours' WHERE id = $1",
        parse_id(Prefix.BUDGET, budget),
    )
    assert await budget_gate.release_all(services.log) == [session]
    ref = step(session)
    await begun(store, ref)
    await store.commit_reason(ref, outcome())
    assert (await budgets.get_budget(services.database, budget)).budget.spent == TOKENS_PER_CALL


async def test_a_resume_that_was_killed_halfway_is_finished_by_the_reconciler(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    budget, second = await paused_in_the_middle(store, services, session)
    # As `resume_session` leaves it when it is killed between its transactions.
    await database.pool.execute(
        "UPDATE budgets SET status = 'active', soft_limit_waived = true WHERE id = $1", parse_id(Prefix.BUDGET, budget)
    )
    assert await budget_gate.release_all(services.log) == [session]
    assert (await held(store, step(session))).turn_id == second.turn_id


@pytest.mark.parametrize("by_its_own_run", [True, False])
async def test_a_paused_turn_can_be_cancelled(
    by_its_own_run: bool, store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    _, second = await paused_in_the_middle(store, services, session)
    assert await services.messages.cancel_cursor(DEFAULT_ORG_ID, session) is not None
    run = second.turn_id if by_its_own_run else new_id(Prefix.TURN)
    await store.finish(FinishInput(session_id=session, turn_id=run, iteration=0, ending=TurnEnding.CANCELLED))
    log = await log_of(services, session)
    assert types(log, "turn.", "session.idled") == ["turn.started", "turn.cancelled", "session.idled"]
    assert await status_of(database, session) == "idle"
    assert await services.messages.cancel_cursor(DEFAULT_ORG_ID, session) is None


async def test_another_session_of_a_paused_organization_pauses_before_its_turn(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    spender, other = [str((await make_session())["id"]) for _ in range(2)]
    await budget_for(services, "", 1_000, 50, subject_type=SubjectType.ORG, subject_id=DEFAULT_ORG_PUBLIC_ID)
    await answered(store, services, spender)
    await post(services, other)
    assert (await held(store, step(other))).next is ReasonNext.PAUSED
    assert await status_of(database, other) == "paused"
    assert types(await log_of(services, other, finished=False), "budget.", "turn.") == ["budget.paused"]
    resumed = await budgets.resume_session(services.database, services.log, spender)
    assert resumed.woken == [other], "the other one has nothing to do"
    await begun(store, step(other))


async def test_two_budgets_that_pause_have_both_to_be_lifted(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    first = await budget_for(services, session, 1_000, 50)
    second = await budget_for(services, session, 1_000, 60)
    await answered(store, services, session)
    await post(services, session)
    assert (await budgets.top_up(services.database, services.log, first, Decimal(1), None)).woken == []
    assert await status_of(database, session) == "paused"
    assert (await budgets.disable_budget(services.database, services.log, second)) == [session]


# --- used up ----------------------------------------------------------------------------------------------------------


async def test_a_used_up_budget_ends_the_turn_before_its_next_call(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 100)
    await post(services, session)
    ref = step(session)
    await begun(store, ref)
    await store.commit_reason(ref, outcome(A_CALL))
    await tool_run(store, ref)
    second = step(session, ref.turn_id, iteration=2)
    result = await held(store, second)
    assert (result.next, result.ending, result.more) == (ReasonNext.DONE, TurnEnding.FAILED, False)
    assert await held(store, second) == result
    log = await log_of(services, session)
    assert types(log, "budget.", "turn.", "session.idled") == [
        "turn.started",
        "budget.exhausted",
        "turn.failed",
        "session.idled",
    ]
    failed = next(msgspec.json.decode(event.data) for event in log if event.type == "turn.failed")
    assert failed["error_code"] == "budget_exhausted"
    assert failed["error_fields"] == {"budget_id": budget, "currency": "tokens", "limit": 100, "balance": 0}
    apology = [msgspec.json.decode(event.data) for event in log if event.type == "output.message.completed"][-1]
    assert apology["message"]["metadata"]["error_code"] == "budget_exhausted"
    assert "topped up" in apology["message"]["content"][0]["text"]


async def test_messages_to_a_used_up_budget_are_answered_with_an_apology_until_it_is_topped_up(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    budget = await budget_for(services, session, 100)
    await answered(store, services, session)
    for _ in range(2):
        await post(services, session)
        run = step(session)
        result = await held(store, run)
        assert (result.next, result.ending) == (ReasonNext.DONE, TurnEnding.FAILED)
        assert await held(store, run) == result
    await budgets.top_up(services.database, services.log, budget, Decimal(500), None)
    assert (await answered(store, services, session)).next is ReasonNext.DONE
    log = await log_of(services, session)
    assert types(log, "turn.completed", "turn.failed") == [
        "turn.completed",
        "turn.failed",
        "turn.failed",
        "turn.completed",
    ]


async def test_a_budget_that_is_used_up_while_it_pauses_a_turn_ends_that_turn(
    store: TurnStore, services: Services, make_session: MakeSession, database: Database
) -> None:
    session = str((await make_session())["id"])
    budget, second = await paused_in_the_middle(store, services, session, limit=1_000)
    changes = budgets.BudgetChanges(limit=Decimal(60))
    assert (await budgets.update_budget(services.database, services.log, budget, changes)).woken == [session]
    assert (await held(store, step(session))).ending is TurnEnding.FAILED
    log = await log_of(services, session)
    assert types(log, "turn.") == ["turn.started", "turn.failed"]
    assert next(msgspec.json.decode(e.data) for e in log if e.type == "turn.failed")["turn_id"] == second.turn_id
    assert await status_of(database, session) == "idle"


async def test_a_paused_session_is_left_alone_and_one_whose_wake_was_lost_is_found(
    store: TurnStore, services: Services, make_session: MakeSession
) -> None:
    session = str((await make_session())["id"])
    await paused_in_the_middle(store, services, session)
    await post(services, session, "unread")

    async def stale() -> list[str]:
        found = await services.messages.stale_sessions(unread_seconds=-1, silent_seconds=-1)
        return [f"session_{one.session_id.hex}" for one in found]

    assert await stale() == []
    await budgets.resume_session(services.database, services.log, session)
    assert await stale() == [session]
