"""The rules of budgets: amounts are exact, periods roll over, and every change leaves a budget that says what its numbers say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.capabilities.budgeting import CAPABILITY
from activities.capabilities.tool_call import call_tool
from domain import budgets as rules
from domain.budgets import (
    SEVERITY,
    Action,
    Budget,
    BudgetStatus,
    CalendarPeriod,
    DurationPeriod,
    Period,
    RollingPeriod,
    SubjectType,
)
from domain.errors import Conflict, InvalidInput
from domain.events import TokenUsage, ToolStatus
from tests.tool_context import PlainContext

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)  # a Wednesday

AMOUNTS = st.decimals(min_value=0, max_value=10_000, places=4)
MOMENTS = st.integers(0, 20 * 365 * 86_400).map(
    lambda seconds: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
)
PERIODS = st.one_of(
    st.builds(DurationPeriod, seconds=st.integers(1, 10_000_000)),
    st.builds(RollingPeriod, window=st.sampled_from(["1s", "5h", "30d", "2w", "15m"])),
    st.builds(CalendarPeriod, unit=st.sampled_from(["hour", "day", "week", "month", "year"])),
)


@st.composite
def changed_budgets(draw: st.DrawFn) -> Budget:
    """A budget after any history of charges, top-ups, resumes and new limits."""
    limit = draw(AMOUNTS.filter(lambda amount: amount > 0))
    soft = draw(st.none() | st.decimals(min_value=0, max_value=limit, places=4))
    budget = made(limit=limit, soft_limit=soft)
    for _ in range(draw(st.integers(0, 6))):
        budget = draw(st.sampled_from([charged, topped_up, resumed, raised]))(budget, draw(AMOUNTS))
    return budget


def made(**fields: object) -> Budget:
    return msgspec.structs.replace(
        Budget(id="bdgt_1", subject_type=SubjectType.SESSION, subject_id="s", currency="tokens", limit=Decimal(100)),
        **fields,
    )


def charged(budget: Budget, amount: Decimal) -> Budget:
    return rules.charged(budget, amount, NOW)


def topped_up(budget: Budget, amount: Decimal) -> Budget:
    return rules.topped_up(budget, amount, NOW)


def resumed(budget: Budget, _amount: Decimal) -> Budget:
    return budget if budget.balance <= 0 else rules.resumed(budget)


def raised(budget: Budget, amount: Decimal) -> Budget:
    return rules.with_limits(budget, budget.limit + amount, budget.soft_limit)


# --- what a budget says -----------------------------------------------------------------------------------------------


@given(changed_budgets())
def test_status_and_action_say_what_the_numbers_say(budget: Budget) -> None:
    assert (budget.status is BudgetStatus.EXHAUSTED) == (budget.balance <= 0) == (budget.action is Action.STOP)
    if budget.status is BudgetStatus.PAUSED:
        assert budget.soft_limit_passed
        assert not budget.soft_limit_waived
        assert budget.action is Action.PAUSE
    if budget.soft_limit_waived:
        assert budget.soft_limit_passed
    assert rules.settled(budget) == budget


@given(changed_budgets(), AMOUNTS)
def test_a_charge_never_makes_a_budget_milder(budget: Budget, amount: Decimal) -> None:
    after = charged(budget, amount)
    assert after.balance == budget.balance - amount
    assert SEVERITY[after.action] >= SEVERITY[budget.action]


@given(changed_budgets(), AMOUNTS)
def test_a_top_up_or_a_higher_limit_sets_a_budget_free_if_anything_is_left(budget: Budget, amount: Decimal) -> None:
    added, limited = topped_up(budget, amount), raised(budget, amount)
    assert added.balance == limited.balance == budget.balance + amount
    for after in (added, *([limited] if amount else [])):
        assert (after.action in (Action.PAUSE, Action.STOP)) == (after.balance <= 0)
        assert SEVERITY[after.action] <= SEVERITY[budget.action] or after.action is Action.WARN


@given(changed_budgets(), st.lists(AMOUNTS, max_size=8))
def test_amounts_are_exact_in_any_order(budget: Budget, amounts: list[Decimal]) -> None:
    forth, back = budget, budget
    for amount in amounts:
        forth = charged(forth, amount)
    for amount in reversed(amounts):
        back = charged(back, amount)
    assert forth.spent == back.spent == budget.spent + sum(amounts)


def test_a_soft_limit_pauses_once_and_again_when_it_lies_ahead_again() -> None:
    budget = charged(made(soft_limit=Decimal(50)), Decimal(51))
    assert budget.status is BudgetStatus.PAUSED
    budget = charged(rules.resumed(budget), Decimal(10))
    assert (budget.status, budget.action) == (BudgetStatus.ACTIVE, Action.WARN)
    assert rules.check_of([budget]).error_code == "soft_limit_reached"
    budget = topped_up(budget, Decimal(30))
    assert (budget.soft_limit_waived, budget.action) == (False, Action.CONTINUE)
    assert charged(budget, Decimal(20)).status is BudgetStatus.PAUSED
    assert charged(budget, Decimal(19)).status is BudgetStatus.ACTIVE


def test_reaching_a_soft_limit_is_not_passing_it_and_reaching_the_hard_one_is_the_end() -> None:
    assert charged(made(soft_limit=Decimal(50)), Decimal(50)).action is Action.CONTINUE
    assert charged(made(), Decimal("99.99")).action is Action.WARN
    assert charged(made(), Decimal(80)).action is Action.WARN
    assert charged(made(), Decimal("79.99")).action is Action.CONTINUE
    assert charged(made(), Decimal(100)).action is Action.STOP


def test_a_person_can_pause_a_budget_but_not_exhaust_it_nor_resume_an_empty_one() -> None:
    paused = rules.with_status(made(period=CalendarPeriod(unit="day"), period_started_at=NOW), BudgetStatus.PAUSED)
    assert paused.action is Action.PAUSE
    assert rules.rolled(paused, NOW + timedelta(days=3)).status is BudgetStatus.PAUSED
    assert rules.with_status(paused, BudgetStatus.ACTIVE).action is Action.CONTINUE
    with pytest.raises(InvalidInput, match="status"):
        rules.with_status(paused, BudgetStatus.EXHAUSTED)
    with pytest.raises(Conflict):
        rules.with_status(charged(made(), Decimal(100)), BudgetStatus.ACTIVE)
    disabled = rules.with_status(charged(made(), Decimal(100)), BudgetStatus.DISABLED)
    assert disabled.action is Action.CONTINUE
    assert charged(disabled, Decimal(5)).status is BudgetStatus.DISABLED


def test_a_lower_limit_counts_at_once() -> None:
    budget = charged(made(), Decimal(60))
    assert rules.with_limits(budget, Decimal(60), None).status is BudgetStatus.EXHAUSTED
    assert rules.with_limits(budget, Decimal(100), Decimal(50)).status is BudgetStatus.PAUSED
    with pytest.raises(InvalidInput) as refused:
        rules.with_limits(budget, Decimal(40), Decimal(50))
    assert refused.value.field == "soft_limit"


@given(st.lists(changed_budgets(), max_size=5))
def test_the_most_restrictive_budget_decides(budgets: list[Budget]) -> None:
    strictest = max((SEVERITY[budget.action] for budget in budgets), default=0)
    check = rules.check_of(budgets)
    assert SEVERITY[check.action] == strictest
    assert (check.budget_id is None) == (check.action is Action.CONTINUE)


def test_of_two_that_decide_the_same_the_narrower_one_speaks() -> None:
    spent = {name: charged(made(id=name, subject_type=name), Decimal(100)) for name in SubjectType}
    assert rules.check_of([spent[SubjectType.ORG], spent[SubjectType.AGENT]]).budget_id == "agent"
    message = rules.check_of([spent[SubjectType.ORG]]).message
    assert message is not None
    assert "organization is used up (100 tokens)" in message


# --- periods ----------------------------------------------------------------------------------------------------------


@given(PERIODS, MOMENTS, st.timedeltas(timedelta(0), timedelta(days=4_000)))
def test_a_period_holds_its_moment_and_is_the_same_for_whoever_looks(
    period: Period, made_at: datetime, later: timedelta
) -> None:
    now = made_at + later
    budget = made(period=period, period_started_at=rules.first_period(period, made_at), spent=Decimal(7))
    rolled = rules.rolled(budget, now)
    assert rules.rolled(rolled, now) == rolled
    start = rolled.period_started_at
    assert start is None or start <= now
    if start is not None:
        assert rules.period_start(period, start, start) == start
    changed = start != budget.period_started_at
    assert rolled.spent == (0 if changed else 7)
    assert rules.charged(budget, Decimal(1), now).spent == rolled.spent + 1


@given(st.integers(1, 100_000), MOMENTS, st.timedeltas(timedelta(0), timedelta(days=400)))
def test_duration_periods_follow_one_another_without_a_gap(seconds: int, made_at: datetime, later: timedelta) -> None:
    start = rules.period_start(DurationPeriod(seconds=seconds), made_at, made_at + later)
    assert start is not None
    assert made_at + later - start < timedelta(seconds=seconds)
    assert (start - made_at) % timedelta(seconds=seconds) == timedelta(0)


@pytest.mark.parametrize(
    ("unit", "start"),
    [
        ("hour", datetime(2026, 3, 4, 5, tzinfo=UTC)),
        ("day", datetime(2026, 3, 4, tzinfo=UTC)),
        ("week", datetime(2026, 3, 2, tzinfo=UTC)),
        ("month", datetime(2026, 3, 1, tzinfo=UTC)),
        ("year", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_calendar_periods_are_those_of_utc(unit: str, start: datetime) -> None:
    period = msgspec.convert({"type": "calendar", "unit": unit}, Period)
    assert rules.first_period(period, NOW) == start
    elsewhere = NOW.astimezone(datetime.fromisoformat("2026-01-01T00:00:00+11:00").tzinfo)
    assert rules.first_period(period, elsewhere) == start
    assert rules.period_start(period, start, start - timedelta(seconds=1)) == start, (
        "a clock set back gives no second one"
    )


def test_a_rolling_window_opens_with_the_first_use() -> None:
    budget = made(period=RollingPeriod(window="5h"))
    assert rules.rolled(budget, NOW).period_started_at is None
    used = rules.charged(budget, Decimal(100), NOW)
    assert (used.period_started_at, used.status) == (NOW, BudgetStatus.EXHAUSTED)
    assert rules.rolled(used, NOW + timedelta(hours=5, seconds=-1)).action is Action.STOP
    closed = rules.rolled(used, NOW + timedelta(hours=5))
    assert (closed.action, closed.period_started_at) == (Action.CONTINUE, None)


def test_a_period_that_ends_lifts_a_pause_and_gives_the_soft_limit_back() -> None:
    period = DurationPeriod(seconds=60)
    budget = charged(made(period=period, period_started_at=NOW, soft_limit=Decimal(10)), Decimal(20))
    assert budget.status is BudgetStatus.PAUSED
    waived = rules.resumed(budget)
    for before in (budget, waived):
        after = rules.rolled(before, NOW + timedelta(seconds=60))
        assert (after.status, after.spent, after.soft_limit_waived) == (BudgetStatus.ACTIVE, 0, False)


@pytest.mark.parametrize("window", ["", "0h", "5", "h", "-5h", "5 h", "5y", "1.5h", "99999999w", "٥h"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        rules.check_period(RollingPeriod(window=window))
    assert refused.value.field == "period.window"


@pytest.mark.parametrize("seconds", [0, -1, 10**12])
def test_a_duration_that_is_none_is_refused(seconds: int) -> None:
    with pytest.raises(InvalidInput) as refused:
        rules.check_period(DurationPeriod(seconds=seconds))
    assert refused.value.field == "period.seconds"


# --- amounts ----------------------------------------------------------------------------------------------------------


def test_usage_is_charged_in_the_currencies_it_is_counted_in() -> None:
    usage = TokenUsage(
        input_tokens=10, output_tokens=20, cache_read_tokens=300, cache_creation_tokens=4, effective_cost_usd=0.1
    )
    assert rules.charge_of(usage, "tokens") == 334
    assert rules.charge_of(usage, "credits") == Decimal("0.334")
    assert rules.charge_of(usage, "usd") == Decimal("0.1"), "as it was written, not as a float holds it"
    assert rules.charge_of(usage, "seats") == 0
    assert rules.charge_of(TokenUsage(input_tokens=1, output_tokens=1), "usd") == 0


@given(st.floats(min_value=0.001, max_value=1e9))
def test_an_amount_comes_back_as_it_was_given(value: float) -> None:
    assert float(rules.amount(value, "amount")) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e16, 0.0, 1e-20])
def test_an_amount_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(InvalidInput) as refused:
        rules.amount(value, "limit")
    assert refused.value.field == "limit"


def test_a_balance_has_a_ceiling() -> None:
    with pytest.raises(InvalidInput, match="amount"):
        topped_up(made(), rules.MAX_AMOUNT)


@pytest.mark.parametrize("currency", ["", " ", "-", "a b", "x" * 33, "€", "usd\0"])
def test_a_currency_that_is_no_name_is_refused(currency: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        rules.check_currency(currency)
    assert refused.value.field == "currency"


def test_currencies_are_the_same_whatever_their_case() -> None:
    assert rules.check_currency(" USD ") == "usd"


# --- the model's view -------------------------------------------------------------------------------------------------


class BudgetContext(PlainContext):
    def __init__(self, *budgets: Budget) -> None:
        self._budgets = budgets

    async def budgets(self) -> tuple[Budget, ...]:
        return self._budgets


async def checked(*budgets: Budget) -> dict[str, object]:
    (tool,) = CAPABILITY.tools
    outcome = await call_tool(tool, BudgetContext(*budgets), {})
    assert outcome.status is ToolStatus.SUCCESS
    assert outcome.result is not None
    return msgspec.json.decode(msgspec.to_builtins(outcome.result)[0]["text"])


async def test_a_model_is_told_what_is_left_of_each_budget() -> None:
    budget = charged(made(soft_limit=Decimal(90)), Decimal(85))
    assert await checked(budget) == {
        "action": "warn",
        "budgets": [
            {"for": "session", "currency": "tokens", "limit": 100, "spent": 85, "left": 15, "pauses_after": 90}
        ],
        "message": "The budget of this session is nearly used up: 15 of 100 tokens are left.",
    }


async def test_a_model_is_told_when_nothing_limits_it() -> None:
    assert await checked() == {"action": "continue", "budgets": [], "message": "No budget limits this session."}
