"""`/v1/sessions/{session_id}/schedules`: messages that come to a session later, whoever schedules them."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Request, Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import Struct

from api.links import DEFAULT_LIMIT, Limit, Offset, Page, capped, page_fields
from api.problems import declared
from api.services import Services
from db import sessions
from domain.ids import DEFAULT_ORG_ID
from domain.schedules import ALL_STATUSES, Schedule, ScheduleStatus, new_schedule


class CreateSchedule(Struct, frozen=True, kw_only=True):
    """Either `scheduled_at`, for one time, or `cron_expression`, to repeat. `timezone` is an IANA name, by default `UTC`."""

    message: str
    scheduled_at: str | None = None
    cron_expression: str | None = None
    timezone: str | None = None


class SchedulePage(Page, frozen=True, kw_only=True, omit_defaults=True):
    data: list[Schedule]


@get("/", operation_id="list_session_schedules", summary="List schedules", responses=declared())
async def list_session_schedules(
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    session_id: FromPath[str],
    status: FromQuery[
        Annotated[ScheduleStatus | None, QueryParameter(description="Only those with this status; by default all.")]
    ] = None,
    offset: Offset = 0,
    limit: Limit = DEFAULT_LIMIT,
) -> SchedulePage:
    """A page, newest first; those that have ended are among them."""
    await sessions.require_session(services.database, session_id)
    limit = capped(limit)
    found, total = await services.scheduling.store.page(
        DEFAULT_ORG_ID, session_id, ALL_STATUSES if status is None else (status,), offset=offset, limit=limit
    )
    return SchedulePage(data=found, **page_fields(request, total=total, offset=offset, limit=limit))


@post("/", operation_id="create_session_schedule", summary="Schedule a message", responses=declared(409, 413))
async def create_session_schedule(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[CreateSchedule]
) -> Schedule:
    """The message will come as a user's, with a turn of its own. It is safe when this has answered, whatever happens then."""
    await sessions.require_session(services.database, session_id)
    new = new_schedule(
        data.message,
        scheduled_at=data.scheduled_at,
        cron_expression=data.cron_expression,
        timezone=data.timezone,
    )
    return await services.scheduling.create(DEFAULT_ORG_ID, session_id, new)


@get("/{schedule_id:str}", operation_id="get_session_schedule", summary="Get a schedule", responses=declared())
async def get_session_schedule(
    services: NamedDependency[Services], session_id: FromPath[str], schedule_id: FromPath[str]
) -> Schedule:
    """What it says, when it fires next, and how it ended."""
    await sessions.require_session(services.database, session_id)
    return await services.scheduling.store.get(DEFAULT_ORG_ID, session_id, schedule_id)


@delete("/{schedule_id:str}", operation_id="cancel_session_schedule", summary="Cancel a schedule", responses=declared())
async def cancel_session_schedule(
    services: NamedDependency[Services], session_id: FromPath[str], schedule_id: FromPath[str]
) -> None:
    """Its message does not come any more. It stays in the list; one that has ended already stays as it ended."""
    await services.scheduling.cancel(DEFAULT_ORG_ID, session_id, schedule_id)


router = Router(
    path="/sessions/{session_id:str}/schedules",
    route_handlers=[list_session_schedules, create_session_schedule, get_session_schedule, cancel_session_schedule],
    tags=["Schedules"],
)
