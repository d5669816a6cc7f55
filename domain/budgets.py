"""What a budget is and what it decides: amounts, periods, limits. Pure; whoever stores budgets calls these rules.

Amounts are decimals and exact. `spent` is what was charged less what was added since the period began, so that the balance is
`limit - spent` and a top-up moves both limits away. A period is rolled over when somebody looks, never by a clock: every
function here takes a budget that is rolled (`rolled`) and gives one that is settled (`settled`).

A soft limit asks a person: the budget pauses until it is resumed, topped up or raised, which lets it go on to the hard limit
(`soft_limit_waived`) until the next period, or until enough is added that the soft limit lies ahead once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from typing import Final, Literal

import msgspec
from msgspec import Struct

from domain.errors import Conflict, InvalidInput
from domain.events import TokenUsage

AMOUNT_PLACES: Final = 12
"""A cached token of a cheap model costs some nano-dollars."""
AMOUNT_STEP: Final = Decimal(1).scaleb(-AMOUNT_PLACES)
MAX_AMOUNT: Final = Decimal(10) ** 15
"""With the places above still far within what PostgreSQL and a float of the API can say."""

WARN_SHARE: Final = Decimal("0.2")
"""Of the limit: with less than that left a budget warns."""

CREDIT_TOKENS: Final = 1_000
MAX_PERIOD_SECONDS: Final = 10 * 366 * 86_400
CURRENCY_MAX_CHARACTERS: Final = 32

MODEL_CALL: Final = "llm_generation"
COMPACTION: Final = "compaction"
TOP_UP: Final = "top_up"

_WINDOW = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_WINDOW_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_CURRENCY = re.compile(r"[a-z0-9][a-z0-9._-]*")


class SubjectType(StrEnum):
    SESSION = "session"
    AGENT = "agent"
    HARNESS = "harness"
    USER = "user"
    ORG = "org"


SUBJECT_ORDER: Final = tuple(SubjectType)
"""From the narrowest to the widest: of two budgets that decide the same, the narrower one speaks."""


class BudgetStatus(StrEnum):
    ACTIVE = "active"
    PAUSED = "paused"
    EXHAUSTED = "exhausted"
    DISABLED = "disabled"


class Action(StrEnum):
    """What a budget demands of a session, the mildest first."""

    CONTINUE = "continue"
    WARN = "warn"
    PAUSE = "pause"
    STOP = "stop"


SEVERITY: Final = {action: place for place, action in enumerate(Action)}


class DurationPeriod(Struct, frozen=True, kw_only=True, tag="duration", forbid_unknown_fields=True):
    """Periods of this length, one after the other since the budget was made."""

    seconds: int


class RollingPeriod(Struct, frozen=True, kw_only=True, tag="rolling", forbid_unknown_fields=True):
    """A window that opens with the first use and closes this much later (`5h`, `30d`); the next use opens the next one."""

    window: str


class CalendarPeriod(Struct, frozen=True, kw_only=True, tag="calendar", forbid_unknown_fields=True):
    """Hours, days, weeks (from Monday), months or years of UTC."""

    unit: Literal["hour", "day", "week", "month", "year"]


Period = DurationPeriod | RollingPeriod | CalendarPeriod


class Budget(Struct, frozen=True, kw_only=True):
    """`subject_id` is public. `warned`: the warning of this period is given."""

    id: str
    subject_type: SubjectType
    subject_id: str
    currency: str
    limit: Decimal
    soft_limit: Decimal | None = None
    spent: Decimal = Decimal(0)
    status: BudgetStatus = BudgetStatus.ACTIVE
    period: Period | None = None
    period_started_at: datetime | None = None
    warned: bool = False
    soft_limit_waived: bool = False

    @property
    def balance(self) -> Decimal:
        return self.limit - self.spent

    @property
    def soft_limit_passed(self) -> bool:
        return self.soft_limit is not None and self.spent > self.soft_limit

    @property
    def action(self) -> Action:
        if self.status is BudgetStatus.DISABLED:
            return Action.CONTINUE
        if self.balance <= 0:
            return Action.STOP
        if self.status is BudgetStatus.PAUSED:
            return Action.PAUSE
        if self.soft_limit_passed or is_low(self):
            return Action.WARN
        return Action.CONTINUE


class BudgetCheck(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of a check: what is demanded, and by which budget; without one, `continue` alone."""

    action: Action
    message: str | None = None
    budget_id: str | None = None
    balance: float | None = None
    currency: str | None = None
    error_code: str | None = None
    error_fields: dict[str, object] | None = None


# --- amounts ----------------------------------------------------------------------------------------------------------


def amount(value: float, field: str, *, positive: bool = True) -> Decimal:
    """An amount a client gave, exactly as it wrote it. Raises `InvalidInput`."""
    # A float of JSON prints as what was written, which `Decimal(value)` would not be.
    exact = Decimal(repr(value))
    if not exact.is_finite() or exact < 0 or exact > MAX_AMOUNT:
        raise InvalidInput(f"`{field}` must be a number from 0 to {MAX_AMOUNT}", field=field)
    exact = exact.quantize(AMOUNT_STEP, ROUND_HALF_EVEN)
    if positive and exact == 0:
        raise InvalidInput(f"`{field}` must be greater than 0", field=field)
    return exact


def charge_of(usage: TokenUsage, currency: str) -> Decimal:
    """What a model call costs in a currency; 0 for currencies that usage is not counted in, and for an unknown price."""
    match currency:
        case "usd":
            return Decimal(repr(usage.effective_cost_usd or 0.0)).quantize(AMOUNT_STEP, ROUND_HALF_EVEN)
        case "tokens":
            return Decimal(_tokens(usage))
        case "credits":
            return Decimal(_tokens(usage)) / CREDIT_TOKENS
        case _:
            return Decimal(0)


def _tokens(usage: TokenUsage) -> int:
    return usage.prompt_tokens + usage.output_tokens


def check_currency(currency: str) -> str:
    """`USD` and `usd` are the same. Raises `InvalidInput`."""
    name = currency.strip().lower()
    if len(name) > CURRENCY_MAX_CHARACTERS or not _CURRENCY.fullmatch(name):
        raise InvalidInput(
            "`currency` must be usd, tokens, credits or a name of your own: "
            f"up to {CURRENCY_MAX_CHARACTERS} letters, digits, dots, dashes and underscores",
            field="currency",
        )
    return name


def check_limits(limit: Decimal, soft_limit: Decimal | None) -> None:
    if soft_limit is not None and soft_limit > limit:
        raise InvalidInput("`soft_limit` must not exceed `limit`", field="soft_limit")


def subject_type(text: str) -> SubjectType:
    """Raises `InvalidInput`. Both names of the organization are in use."""
    try:
        return SubjectType("org" if text == "organization" else text)
    except ValueError:
        names = ", ".join(SubjectType)
        raise InvalidInput(f"`subject_type` must be one of {names}", field="subject_type") from None


# --- periods ----------------------------------------------------------------------------------------------------------


def check_period(period: Period) -> None:
    """Raises `InvalidInput`."""
    match period:
        case DurationPeriod(seconds=seconds):
            if not 1 <= seconds <= MAX_PERIOD_SECONDS:
                raise InvalidInput(f"`period.seconds` must be from 1 to {MAX_PERIOD_SECONDS}", field="period.seconds")
        case RollingPeriod(window=window):
            if not _WINDOW.fullmatch(window) or _window_seconds(window) > MAX_PERIOD_SECONDS:
                raise InvalidInput(
                    "`period.window` must be a number and one of s, m, h, d, w, such as 5h or 30d, of ten years at most",
                    field="period.window",
                )
        case CalendarPeriod():
            pass


def _window_seconds(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    assert match is not None, "checked when it was written"
    return int(match[1]) * _WINDOW_SECONDS[match[2]]


def first_period(period: Period | None, now: datetime) -> datetime | None:
    """When the period of a new budget began; None when it has not begun or there is none."""
    match period:
        case None | RollingPeriod():
            return None
        case DurationPeriod():
            return now
        case CalendarPeriod():
            return _calendar_start(period, now)


def period_start(period: Period | None, started_at: datetime | None, now: datetime) -> datetime | None:
    """When the period that `now` lies in began, given when an earlier one did."""
    match period:
        case None:
            return None
        case DurationPeriod(seconds=seconds):
            if started_at is None or now < started_at:
                return started_at or now
            length = timedelta(seconds=seconds)
            return started_at + ((now - started_at) // length) * length
        case RollingPeriod(window=window):
            over = started_at is None or now >= started_at + timedelta(seconds=_window_seconds(window))
            return None if over else started_at
        case CalendarPeriod():
            # A clock that was set back must not give a period twice.
            start = _calendar_start(period, now)
            return start if started_at is None else max(start, started_at)


def _calendar_start(period: CalendarPeriod, now: datetime) -> datetime:
    hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    match period.unit:
        case "hour":
            return hour
        case "day":
            return hour.replace(hour=0)
        case "week":
            return hour.replace(hour=0) - timedelta(days=hour.weekday())
        case "month":
            return hour.replace(hour=0, day=1)
        case "year":
            return hour.replace(hour=0, day=1, month=1)


def rolled(budget: Budget, now: datetime) -> Budget:
    """The budget in the period of `now`. A budget that a person paused, below its soft limit, stays paused."""
    start = period_start(budget.period, budget.period_started_at, now)
    if start == budget.period_started_at:
        return budget
    by_hand = budget.status is BudgetStatus.PAUSED and not budget.soft_limit_passed
    keeps = by_hand or budget.status is BudgetStatus.DISABLED
    return msgspec.structs.replace(
        budget,
        spent=Decimal(0),
        period_started_at=start,
        warned=False,
        soft_limit_waived=False,
        status=budget.status if keeps else BudgetStatus.ACTIVE,
    )


# --- changes ----------------------------------------------------------------------------------------------------------


def charged(budget: Budget, amount: Decimal, now: datetime) -> Budget:
    """After a use. The first one in a rolling period opens its window."""
    budget = rolled(budget, now)
    started_at = budget.period_started_at
    if isinstance(budget.period, RollingPeriod) and started_at is None:
        started_at = now
    return settled(msgspec.structs.replace(budget, spent=budget.spent + amount, period_started_at=started_at))


def topped_up(budget: Budget, amount: Decimal, now: datetime) -> Budget:
    budget = rolled(budget, now)
    if budget.balance + amount > MAX_AMOUNT:
        raise InvalidInput(f"`amount` would bring the balance above {MAX_AMOUNT}", field="amount")
    return reactivated(msgspec.structs.replace(budget, spent=budget.spent - amount))


def resumed(budget: Budget) -> Budget:
    """A person lets a paused budget go on, to its hard limit. Raises `Conflict` when nothing is left."""
    if budget.balance <= 0:
        raise Conflict("The budget is used up; top it up or raise its limit")
    return reactivated(msgspec.structs.replace(budget, status=BudgetStatus.ACTIVE))


def with_limits(budget: Budget, limit: Decimal, soft_limit: Decimal | None) -> Budget:
    """With limits that may have changed: a higher hard limit lets the budget go on, a new soft limit counts from now."""
    check_limits(limit, soft_limit)
    raised, soft_changed = limit > budget.limit, soft_limit != budget.soft_limit
    by_hand = budget.status is BudgetStatus.PAUSED and not budget.soft_limit_passed
    changed = msgspec.structs.replace(budget, limit=limit, soft_limit=soft_limit)
    if soft_changed:
        status = BudgetStatus.ACTIVE if changed.status is BudgetStatus.PAUSED and not by_hand else changed.status
        return settled(msgspec.structs.replace(changed, soft_limit_waived=False, status=status))
    return reactivated(changed) if raised else settled(changed)


def with_status(budget: Budget, status: BudgetStatus) -> Budget:
    """A status a person chose. Raises `InvalidInput` or `Conflict`."""
    match status:
        case BudgetStatus.EXHAUSTED:
            raise InvalidInput("`status` becomes exhausted by itself; set active, paused or disabled", field="status")
        case BudgetStatus.DISABLED:
            return msgspec.structs.replace(budget, status=status)
        case BudgetStatus.ACTIVE:
            return resumed(budget)
        case BudgetStatus.PAUSED:
            return settled(msgspec.structs.replace(budget, status=status))


def reactivated(budget: Budget) -> Budget:
    """As much at work as the balance lets it be; a passed soft limit does not pause it again."""
    if budget.status is BudgetStatus.DISABLED or budget.balance <= 0:
        return settled(budget)
    return settled(
        msgspec.structs.replace(budget, status=BudgetStatus.ACTIVE, soft_limit_waived=budget.soft_limit_passed)
    )


def settled(budget: Budget) -> Budget:
    """With the status and the flags that its numbers demand. A pause ends only when somebody ends it."""
    if budget.status is BudgetStatus.DISABLED:
        return budget
    status = BudgetStatus.PAUSED if budget.status is BudgetStatus.PAUSED else BudgetStatus.ACTIVE
    if budget.balance <= 0:
        status = BudgetStatus.EXHAUSTED
    elif budget.soft_limit_passed and not budget.soft_limit_waived:
        status = BudgetStatus.PAUSED
    return msgspec.structs.replace(
        budget,
        status=status,
        warned=budget.warned and is_low(budget),
        soft_limit_waived=budget.soft_limit_waived and budget.soft_limit_passed,
    )


def is_low(budget: Budget) -> bool:
    """Whether little is left. A soft limit that a person has waived is no news."""
    return budget.balance <= budget.limit * WARN_SHARE


# --- decisions --------------------------------------------------------------------------------------------------------


def deciding(budgets: Iterable[Budget]) -> Budget | None:
    """The budget whose demand is the most restrictive; None when none demands anything."""
    ordered = sorted(budgets, key=lambda budget: SUBJECT_ORDER.index(budget.subject_type))
    strictest = max(ordered, key=lambda budget: SEVERITY[budget.action], default=None)
    return None if strictest is None or strictest.action is Action.CONTINUE else strictest


def check_of(budgets: Sequence[Budget]) -> BudgetCheck:
    budget = deciding(budgets)
    if budget is None:
        return BudgetCheck(action=Action.CONTINUE)
    code = error_code(budget)
    return BudgetCheck(
        action=budget.action,
        message=message_of(budget),
        budget_id=budget.id,
        balance=float(budget.balance),
        currency=budget.currency,
        error_code=code,
        error_fields=None if code is None else error_fields(budget),
    )


def error_code(budget: Budget) -> str | None:
    match budget.action:
        case Action.STOP:
            return "budget_exhausted"
        case Action.PAUSE:
            return "budget_paused"
        case Action.WARN if budget.soft_limit_passed:
            return "soft_limit_reached"
        case _:
            return None


def error_fields(budget: Budget) -> dict[str, object]:
    fields: dict[str, object] = {
        "budget_id": budget.id,
        "currency": budget.currency,
        "limit": float(budget.limit),
        "balance": float(budget.balance),
    }
    return fields if budget.soft_limit is None else {**fields, "soft_limit": float(budget.soft_limit)}


def message_of(budget: Budget) -> str:
    """For people: what is the matter, and what helps."""
    name = f"The budget of this {'organization' if budget.subject_type is SubjectType.ORG else budget.subject_type}"
    of_limit = f"{shown(budget.limit)} {budget.currency}"
    left = f"{shown(max(budget.balance, Decimal(0)))} of {of_limit} are left"
    match budget.action:
        case Action.STOP:
            return f"{name} is used up ({of_limit}). Top it up or raise its limit to go on."
        case Action.PAUSE:
            reason = "has passed its soft limit" if budget.soft_limit_passed else "is paused"
            return f"{name} {reason}; {left}. Resume the session, or top the budget up, to go on."
        case Action.WARN if is_low(budget):
            return f"{name} is nearly used up: {left}."
        case Action.WARN:
            return f"{name} has passed its soft limit: {left}."
        case Action.CONTINUE:
            return f"{name}: {left}."


def shown(value: Decimal) -> str:
    return f"{value.normalize():f}"
