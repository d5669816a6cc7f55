"""Lets a model send itself messages later.

`create_schedule` is idempotent: the schedule's id comes from the call, so a call repeated after a crash finds its schedule.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.capabilities import Capability, NoArguments, Tool, ToolContext, ToolError
from domain.cron import check_time_zone
from domain.errors import EverrunsError, InvalidInput
from domain.schedules import MAX_SCHEDULES_PER_SESSION, MIN_SPACING_SECONDS, Schedule, new_schedule
from domain.tools import SideEffect

CONCURRENCY_CLASS: Final = "session_schedule"
LISTED_MESSAGE_CHARACTERS: Final = 2_000
"""Of each message in a listing: five at their longest would not fit into a result."""


class CreateSchedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    message: Annotated[
        str,
        Meta(description="What you will be told then, as a message of the user. Say all you will need to know."),
    ]
    scheduled_at: (
        Annotated[
            str,
            Meta(
                description="For one time: RFC 3339, such as 2030-01-31T09:00:00+01:00. Without an offset it is in `timezone`."
            ),
        ]
        | None
    ) = None
    cron_expression: (
        Annotated[
            str,
            Meta(
                description="To repeat: minute, hour, day of the month, month, day of the week, in `timezone`. "
                "`30 9 * * 1-5` is 9:30 on working days. At least 5 minutes apart."
            ),
        ]
        | None
    ) = None
    timezone: (
        Annotated[str, Meta(description="IANA name such as Europe/Berlin. Default: the user's, or UTC.")] | None
    ) = None


class CancelSchedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schedule_id: Annotated[str, Meta(description="As `create_schedule` or `list_schedules` returned it: sched_…")]


class ListSchedules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


async def create_schedule(context: ToolContext, arguments: CreateSchedule) -> dict[str, object]:
    try:
        new = new_schedule(
            arguments.message,
            # Empty is what some models write into every parameter they don't need.
            scheduled_at=arguments.scheduled_at or None,
            cron_expression=arguments.cron_expression or None,
            timezone=arguments.timezone or _users_time_zone(context),
        )
        created = await context.schedules.create(new, idempotency_key=context.idempotency_key)
    except EverrunsError as error:
        raise ToolError(f"{error.message}. No schedule was created.") from error
    return _shown(created, whole=False)


async def cancel_schedule(context: ToolContext, arguments: CancelSchedule) -> dict[str, object]:
    try:
        ended = await context.schedules.cancel(arguments.schedule_id)
    except EverrunsError as error:
        raise ToolError(error.message) from error
    shown = _shown(ended, whole=False)
    if ended.end_reason != "cancelled":
        shown["note"] = "It had ended already."
    return shown


async def list_schedules(context: ToolContext, arguments: NoArguments) -> dict[str, object]:
    live = await context.schedules.live()
    return {"schedules": [_shown(one, whole=True) for one in live], "count": len(live)}


def _users_time_zone(context: ToolContext) -> str | None:
    """A client's wrong time zone is not the model's mistake."""
    if context.timezone is None:
        return None
    try:
        check_time_zone(context.timezone)
    except InvalidInput:
        return None
    return context.timezone


def _shown(schedule: Schedule, *, whole: bool) -> dict[str, object]:
    fields: dict[str, object | None] = {
        "schedule_id": schedule.id,
        # That the clock is still to be set concerns nobody but us.
        "status": "active" if schedule.status == "pending" else schedule.status,
        "next_trigger_at": schedule.next_trigger_at,
        "cron_expression": schedule.cron_expression,
        "timezone": schedule.timezone,
        "last_triggered_at": schedule.last_triggered_at,
        "message": _shortened(schedule.message) if whole else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _shortened(text: str) -> str:
    return text if len(text) <= LISTED_MESSAGE_CHARACTERS else f"{text[:LISTED_MESSAGE_CHARACTERS]}…"


CAPABILITY = Capability(
    id="session_schedule",
    name="Session Schedule",
    description="Lets the model schedule messages to itself: once, or again and again.",
    category="Automation",
    icon="calendar-clock",
    features=("schedules",),
    system_prompt=f"""\
You can have a message come back to you later with `create_schedule`: at one time (`scheduled_at`) or repeatedly \
(`cron_expression`, at least {MIN_SPACING_SECONDS // 60} minutes apart). It starts a turn of its own in this session, so this \
conversation will be known then. A session may have {MAX_SCHEDULES_PER_SESSION} active schedules; `list_schedules` shows them, \
`cancel_schedule` ends one. Use it when the user asks for a reminder or for recurring work, and never to wait for something \
within this turn.""",
    tools=(
        Tool(
            name="create_schedule",
            display_name="Create schedule",
            description="Schedule a message to yourself in this session: give either scheduled_at or cron_expression.",
            arguments=CreateSchedule,
            run=create_schedule,
            side_effect=SideEffect.IDEMPOTENT,
            concurrency_class=CONCURRENCY_CLASS,
            timeout_seconds=60.0,
        ),
        Tool(
            name="cancel_schedule",
            display_name="Cancel schedule",
            description="End a schedule of this session. Its message will not come any more.",
            arguments=CancelSchedule,
            run=cancel_schedule,
            side_effect=SideEffect.IDEMPOTENT,
            concurrency_class=CONCURRENCY_CLASS,
            timeout_seconds=60.0,
        ),
        Tool(
            name="list_schedules",
            display_name="List schedules",
            description="List this session's active schedules with their next times.",
            arguments=ListSchedules,
            run=list_schedules,
            side_effect=SideEffect.PURE,
            concurrency_class=CONCURRENCY_CLASS,
            timeout_seconds=30.0,
        ),
    ),
)
