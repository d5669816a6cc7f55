"""`/v1/sessions`: everything but messages, events and the running turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from litestar import Request, Router, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import Stream
from msgspec import UNSET, UnsetType

from activities.capabilities.declared import capability_of, reached
from activities.capabilities.registry import CapabilityRegistry
from api.caller import Caller
from api.capability_refs import checked_refs
from api.links import (
    DEFAULT_LIMIT,
    ConfigView,
    Limit,
    Offset,
    Page,
    actions,
    capped,
    page_fields,
    resource_config,
    self_url,
    view,
)
from api.problems import AllowedAction, declared
from api.requests import LayerRequest, MaxIterations, ToolInput, client_tools, present
from api.scoped_servers import with_sealed_servers
from api.services import Services
from db import session_stats, sessions
from db.event_log import EventLog
from db.session_cleanup import Cleanup
from domain.conversation import messages_of
from domain.errors import InvalidInput
from domain.events import CONVERSATION_TYPES
from domain.resources import NewSession, Session, SessionChanges, SessionStats, SessionStatus

EXPORT_PAGE_EVENTS: Final = 500
"""Events read at a time: a long session is exported without ever being in memory."""


class CreateSession(LayerRequest, frozen=True, kw_only=True):
    """Harness and agent by id or by name, not both. Without a harness the agent's is used, without both the `generic` one."""

    harness_id: str | None = None
    harness_name: str | None = None
    agent_id: str | None = None
    agent_name: str | None = None
    agent_identity_id: str | None = None
    workspace_id: str | None = None
    title: str | None = None
    locale: str | None = None
    model_id: str | None = None
    tools: list[ToolInput] | None = None
    hints: dict[str, object] | None = None
    max_iterations: MaxIterations | None = None


class UpdateSession(msgspec.Struct, frozen=True, kw_only=True):
    """Absent fields stay as they are; null clears them."""

    title: str | UnsetType | None = UNSET
    locale: str | UnsetType | None = UNSET
    tags: list[str] | UnsetType | None = UNSET
    agent_identity_id: str | UnsetType | None = UNSET


class SessionView(Session, frozen=True, kw_only=True, omit_defaults=True):
    """`features` is what the capabilities of harness, agent and session together offer."""

    features: list[str]
    self_url: str
    allowed_actions: list[AllowedAction]


class SessionPage(Page, frozen=True, kw_only=True, omit_defaults=True):
    data: list[SessionView]


def session_view(services: Services, found: sessions.SessionInContext) -> SessionView:
    session = found.session
    url = self_url(services, f"sessions/{session.id}")
    items = [
        ("self", "GET", "", "get_session"),
        ("update", "PATCH", "", "update_session"),
        ("delete", "DELETE", "", "delete_session"),
        ("unpin", "DELETE", "/pin", "unpin_session") if session.is_pinned else ("pin", "PUT", "/pin", "pin_session"),
        ("events", "GET", "/events", "list_events"),
        ("stream", "GET", "/sse", "stream_events"),
    ]
    if session.status is SessionStatus.ACTIVE:
        items.append(("cancel", "POST", "/cancel", "cancel_session"))
    return view(
        SessionView,
        session,
        features=_features(services.capabilities, found),
        self_url=url,
        allowed_actions=actions(url, *items),
    )


def _features(registry: CapabilityRegistry, found: sessions.SessionInContext) -> list[str]:
    others = [capability_of(one) for one in reached(found.layered_capabilities, found.declared) if one.problem is None]
    resolved = registry.resolve(found.layered_capabilities, others).capabilities
    return list(dict.fromkeys(feature for one in resolved for feature in one.capability.features))


@get("/", operation_id="list_sessions", summary="List sessions", responses=declared())
async def list_sessions(
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    agent_id: FromQuery[str | None] = None,
    search: FromQuery[str | None] = None,
    offset: Offset = 0,
    limit: Limit = DEFAULT_LIMIT,
) -> SessionPage:
    """A page of sessions, newest first. Each word of `search` must occur in the title."""
    limit = capped(limit)
    found, total = await sessions.list_sessions(
        services.database, agent_id=agent_id, search=search, offset=offset, limit=limit
    )
    return SessionPage(
        data=[session_view(services, one) for one in found],
        **page_fields(request, total=total, offset=offset, limit=limit),
    )


@post("/", operation_id="create_session", summary="Create a session", responses=declared(409, 413))
async def create_session(
    services: NamedDependency[Services], caller: NamedDependency[Caller], data: JSONBody[CreateSession]
) -> SessionView:
    """Starts nothing yet: the first message does."""
    capabilities = data.refs()
    if capabilities is not UNSET:
        capabilities = await checked_refs(services, capabilities, caller)
    new = NewSession(
        harness_id=data.harness_id,
        harness_name=data.harness_name,
        agent_id=data.agent_id,
        agent_name=data.agent_name,
        agent_identity_id=data.agent_identity_id,
        workspace_id=data.workspace_id,
        title=data.title,
        locale=data.locale,
        model_id=data.model_id,
        tools=client_tools(data.tools) or [],
        hints=data.hints,
        max_iterations=data.max_iterations,
        system_prompt=data.system_prompt,
        capabilities=capabilities,
        initial_files=present(data.initial_files),
        tags=present(data.tags),
        mcp_servers=data.servers(),
        network_access=data.network_access,
        parallel_tool_calls=data.parallel_tool_calls,
    )
    new = await with_sealed_servers(services, new)
    return session_view(services, await sessions.create_session(services.database, services.log, new))


@get("/stats", operation_id="get_session_stats", summary="Session counts by status", responses=declared())
async def get_session_stats(services: NamedDependency[Services]) -> SessionStats:
    """Over all sessions that are not deleted."""
    return await session_stats.session_stats(services.database)


@get("/config", operation_id="session_config", summary="Session policies", responses=declared())
async def session_config() -> ConfigView:
    """What the caller may do with sessions."""
    return resource_config("sessions")


@get("/{session_id:str}", operation_id="get_session", summary="Get a session", responses=declared())
async def get_session(services: NamedDependency[Services], session_id: FromPath[str]) -> SessionView:
    """Its configuration, where it stands and what it has used."""
    return session_view(services, await sessions.get_session(services.database, session_id))


@patch("/{session_id:str}", operation_id="update_session", summary="Update a session", responses=declared(413))
async def update_session(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[UpdateSession]
) -> SessionView:
    """A new title is announced in the session's events."""
    changes = SessionChanges(
        title=data.title, locale=data.locale, tags=present(data.tags), agent_identity_id=data.agent_identity_id
    )
    updated = await sessions.update_session(services.database, services.log, session_id, changes)
    return session_view(services, updated)


@delete("/{session_id:str}", operation_id="delete_session", summary="Delete a session", responses=declared(503))
async def delete_session(services: NamedDependency[Services], session_id: FromPath[str]) -> None:
    """Stops the running turn. The session cannot be found any more, and what it stored is deleted; its log stays."""
    left = await sessions.delete_session(services.database, session_id, services.turns.cancel)
    services.background.start(_clear(services, left), "clear away files")


async def _clear(services: Services, workspaces: list[UUID]) -> None:
    await Cleanup(services.database).clear(workspaces)


@put(
    "/{session_id:str}/pin", operation_id="pin_session", summary="Pin a session", status_code=204, responses=declared()
)
async def pin_session(services: NamedDependency[Services], session_id: FromPath[str]) -> None:
    """For the calling user. Pinning twice is fine."""
    await sessions.pin_session(services.database, session_id)


@delete("/{session_id:str}/pin", operation_id="unpin_session", summary="Unpin a session", responses=declared())
async def unpin_session(services: NamedDependency[Services], session_id: FromPath[str]) -> None:
    """For the calling user. Fine when it is not pinned."""
    await sessions.unpin_session(services.database, session_id)


@get(
    "/{session_id:str}/export",
    operation_id="export_session_jsonl",
    summary="Export a session's messages",
    media_type="application/x-ndjson",
    responses=declared(),
)
async def export_session(
    services: NamedDependency[Services],
    session_id: FromPath[str],
    export_format: Annotated[str, QueryParameter(name="format", description="Only `jsonl`.")] = "jsonl",
) -> Stream:
    """One message per line, oldest first; no deltas."""
    if export_format != "jsonl":
        raise InvalidInput("format must be `jsonl`", field="format")
    await sessions.require_session(services.database, session_id)
    return Stream(
        _message_lines(services.log, session_id),
        media_type="application/x-ndjson",
        headers={"Content-Disposition": f'attachment; filename="{session_id}.jsonl"'},
    )


async def _message_lines(log: EventLog, session_id: str) -> AsyncIterator[bytes]:
    encode = msgspec.json.Encoder().encode
    after = 0
    while events := await log.read_visible(
        session_id, after_sequence=after, limit=EXPORT_PAGE_EVENTS, types=CONVERSATION_TYPES
    ):
        after = events[-1].sequence
        lines = b"".join(encode(message) + b"\n" for message in messages_of(events))
        if lines:
            yield lines


router = Router(
    "/sessions",
    tags=["Sessions"],
    route_handlers=[
        list_sessions,
        create_session,
        get_session_stats,
        session_config,
        get_session,
        update_session,
        delete_session,
        pin_session,
        unpin_session,
        export_session,
    ],
)
