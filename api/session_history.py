"""`/v1/sessions/{session_id}/fork` and `/rewind`: back to an event, in a new session or in the same one."""

from __future__ import annotations

from typing import Annotated

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from api.problems import declared
from api.services import Services
from api.sessions import SessionView, session_view
from db.event_log import MAX_SEQUENCE
from db.session_forks import NewFork, fork_session
from db.session_points import PointRequest
from db.session_rewinds import rewind_session
from domain.errors import InvalidInput
from domain.ids import Prefix
from domain.limits import check_id

Sequence = Annotated[int, Meta(ge=1, le=MAX_SEQUENCE)]


class ForkSession(Struct, frozen=True, kw_only=True):
    """`sequence` or `message_id` name the event to fork at, by default the newest. Everything else that is left out is what the
    source has; tags replace its tags. With `files: false` the fork gets the files and values of now."""

    sequence: Sequence | None = None
    message_id: str | None = None
    files: bool = True
    title: str | None = None
    tags: list[str] | None = None
    locale: str | None = None
    system_prompt: str | None = None
    model_id: str | None = None
    agent_id: str | None = None


class RewindSession(Struct, frozen=True, kw_only=True):
    """The event to go back to, by its `sequence` or by the message it brought. With `files: false` files and values stay."""

    sequence: Sequence | None = None
    message_id: str | None = None
    files: bool = True


@post("/fork", operation_id="fork_session", summary="Fork a session", responses=declared(409, 413, 503))
async def fork(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[ForkSession | None] = None
) -> SessionView:
    """A new session with the history up to an event, and the files and values of that moment. After that they are independent."""
    wanted = data or ForkSession()
    if wanted.model_id is not None:
        check_id(Prefix.MODEL, wanted.model_id, "model_id")
    new = NewFork(
        point=PointRequest(sequence=wanted.sequence, message_id=wanted.message_id),
        files=wanted.files,
        title=wanted.title,
        tags=wanted.tags,
        locale=wanted.locale,
        system_prompt=wanted.system_prompt,
        model_id=wanted.model_id,
        agent_id=wanted.agent_id,
    )
    made = await fork_session(services.database, services.log, services.keyring, session_id, new)
    return session_view(services, made)


@post(
    "/rewind",
    operation_id="rewind_session",
    summary="Rewind a session",
    status_code=200,
    responses=declared(409, 413),
)
async def rewind(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[RewindSession]
) -> SessionView:
    """Go back to what the session was at an event. What came after stays in the log, and no model and no list of messages
    shows it any more.
    """
    point = PointRequest(sequence=data.sequence, message_id=data.message_id)
    if not point.is_given:
        raise InvalidInput("sequence or message_id is required", field="sequence")
    rewound = await rewind_session(services.database, services.log, session_id, point, files=data.files)
    return session_view(services, rewound)


router = Router("/sessions/{session_id:str}", tags=["Sessions"], route_handlers=[fork, rewind])
