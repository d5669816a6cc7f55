"""`/v1/mcp-servers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import UNSET, Struct, UnsetType

from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import mcp_grants, mcp_servers
from db.mcp_directory import DatabaseDirectory
from domain.config import NetworkAccessList
from domain.errors import Conflict, InvalidInput, McpServerUnavailable
from domain.mcp import (
    AuthMode,
    DiscoveredTool,
    Discovery,
    McpProblem,
    McpServer,
    McpServerStatus,
    OAuthFlow,
    ProtocolMode,
    ServerTarget,
    TransportType,
)
from domain.mcp_input import McpServerChanges
from domain.secret import Secret


class CreateMcpServer(Struct, frozen=True, kw_only=True):
    """`api_key` and the values of `headers` are write-only. `auth_mode` is `api_key` when there is a key, otherwise `none`.

    `oauth_client_id` and `oauth_client_secret` are for authorization servers at which clients can't register themselves.
    """

    name: str
    url: str
    description: str | None = None
    transport_type: TransportType = TransportType.HTTP
    auth_mode: AuthMode | None = None
    protocol_mode: ProtocolMode | None = None
    api_key: str | None = None
    headers: dict[str, str] | None = None
    oauth_client_id: str | None = None
    oauth_client_secret: str | None = None

    def __repr__(self) -> str:
        return f"CreateMcpServer(name={self.name!r})"


class UpdateMcpServer(Struct, frozen=True, kw_only=True):
    """Absent and null fields stay as they are, but for `description`, which null clears. An empty `api_key` forgets the key.

    `headers` replace those that are stored; a value sent back masked is kept. An archived server takes `status` only.
    """

    name: str | UnsetType | None = UNSET
    url: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    transport_type: TransportType | UnsetType | None = UNSET
    auth_mode: AuthMode | UnsetType | None = UNSET
    protocol_mode: ProtocolMode | UnsetType | None = UNSET
    status: McpServerStatus | UnsetType | None = UNSET
    api_key: str | UnsetType | None = UNSET
    headers: dict[str, str] | UnsetType | None = UNSET
    oauth_client_id: str | UnsetType | None = UNSET
    oauth_client_secret: str | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return f"UpdateMcpServer(name={self.name!r})"


class McpServerView(McpServer, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    view_url: str
    ui_link: str
    allowed_actions: list[AllowedAction]


class McpServerList(Struct, frozen=True, kw_only=True):
    data: list[McpServerView]
    total: int


class AuthorizationBegun(Struct, frozen=True, kw_only=True):
    authorization_url: str
    expires_in_seconds: int


class McpToolList(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`age_seconds` is how old the list is. `left_out` counts tools that are too many, too large or malformed."""

    data: list[DiscoveredTool]
    total: int
    age_seconds: float
    left_out: int = 0
    problem: str | None = None
    """Why there is no newer list, when there should be."""


def server_view(services: Services, server: McpServer) -> McpServerView:
    url = self_url(services, f"mcp-servers/{server.id}")
    items = [
        ("self", "GET", "", "get_mcp_server"),
        ("update", "PATCH", "", "update_mcp_server"),
        ("delete", "DELETE", "", "delete_mcp_server"),
        ("tools", "GET", "/tools", "list_mcp_server_tools"),
    ]
    if server.status is McpServerStatus.ACTIVE:
        items.append(("refresh", "POST", "/refresh", "refresh_mcp_server"))
    page = f"{services.settings.public_app_url}/mcp-servers/{server.id}"
    return view(McpServerView, server, self_url=url, view_url=page, ui_link=page, allowed_actions=actions(url, *items))


def _secret(value: str | UnsetType | None) -> Secret | UnsetType | None:
    if not isinstance(value, str):
        return UNSET
    return Secret(value.strip()) if value.strip() else None


def _headers(value: Mapping[str, str] | UnsetType | None) -> dict[str, Secret] | UnsetType:
    if not isinstance(value, Mapping):
        return UNSET
    return {name: Secret(text) for name, text in value.items()}


def changes_of(data: CreateMcpServer | UpdateMcpServer) -> McpServerChanges:
    return McpServerChanges(
        name=present(data.name),
        url=present(data.url),
        description=data.description,
        transport_type=present(data.transport_type),
        auth_mode=present(data.auth_mode),
        protocol_mode=present(data.protocol_mode),
        status=present(data.status) if isinstance(data, UpdateMcpServer) else UNSET,
        api_key=_secret(data.api_key),
        headers=_headers(data.headers),
        oauth_client_id=present(data.oauth_client_id),
        oauth_client_secret=_secret(data.oauth_client_secret),
    )


@get("/", operation_id="list_mcp_servers", summary="List MCP servers", responses=declared())
async def list_mcp_servers(
    services: NamedDependency[Services], search: FromQuery[str | None] = None, include_archived: FromQuery[bool] = False
) -> McpServerList:
    """Newest first. Each word of `search` must occur in the name or the description."""
    found = await mcp_servers.list_servers(services.database.pool, search=search, include_archived=include_archived)
    return McpServerList(data=[server_view(services, server) for server in found], total=len(found))


@post("/", operation_id="create_mcp_server", summary="Create an MCP server", responses=declared(409, 413, 503))
async def create_mcp_server(services: NamedDependency[Services], data: JSONBody[CreateMcpServer]) -> McpServerView:
    """Not contacted yet: the first turn that uses it asks for its tools, and so does `…/refresh`."""
    created = await mcp_servers.create_server(services.database, services.keyring, changes_of(data))
    return server_view(services, created)


@get("/config", operation_id="mcp_server_config", summary="MCP server policies", responses=declared())
async def mcp_server_config() -> ConfigView:
    """What the caller may do with MCP servers."""
    return resource_config("mcp-servers")


@get("/{server_id:str}", operation_id="get_mcp_server", summary="Get an MCP server", responses=declared())
async def get_mcp_server(services: NamedDependency[Services], server_id: FromPath[str]) -> McpServerView:
    """Keys, tokens and the values of headers are never shown."""
    return server_view(services, await mcp_servers.get_server(services.database, server_id))


@patch(
    "/{server_id:str}",
    operation_id="update_mcp_server",
    summary="Update an MCP server",
    responses=declared(409, 413, 503),
)
async def update_mcp_server(
    services: NamedDependency[Services], server_id: FromPath[str], data: JSONBody[UpdateMcpServer]
) -> McpServerView:
    """Steps that begin afterwards see the change, and ask the server for its tools anew."""
    changed = await mcp_servers.update_server(services.database, services.keyring, server_id, changes_of(data))
    return server_view(services, changed)


@delete("/{server_id:str}", operation_id="delete_mcp_server", summary="Delete an MCP server", responses=declared())
async def delete_mcp_server(services: NamedDependency[Services], server_id: FromPath[str]) -> None:
    """Archives it: sessions that use it go on. An archived one is deleted for good, with its secrets."""
    await mcp_servers.archive_server(services.database, server_id)


@get(
    "/{server_id:str}/tools",
    operation_id="list_mcp_server_tools",
    summary="List an MCP server's tools",
    responses=declared(409, 502),
)
async def list_mcp_server_tools(services: NamedDependency[Services], server_id: FromPath[str]) -> McpToolList:
    """Those known from the last time it was asked, which may be a day ago; a server that is not known yet is asked."""
    target = await mcp_servers.find_target(services.database, server_id)
    known = (await DatabaseDirectory(services.database.pool, services.keyring).known_tools([target])).get(
        target.cache_key
    )
    if known is None or known.discovery is None:
        return _tool_list(await _asked(services, target))
    return _tool_list(known.discovery, age_seconds=known.age_seconds or 0.0, problem=known.problem)


@post(
    "/{server_id:str}/refresh",
    operation_id="refresh_mcp_server",
    summary="Ask an MCP server for its tools",
    status_code=200,
    responses=declared(409, 502),
)
async def refresh_mcp_server(services: NamedDependency[Services], server_id: FromPath[str]) -> McpToolList:
    """Connects now, which also shows whether address and credentials are right; what is answered replaces the stored list."""
    return _tool_list(await _asked(services, await mcp_servers.find_target(services.database, server_id)))


@post(
    "/{server_id:str}/oauth/authorize",
    operation_id="authorize_mcp_server",
    summary="Begin to authorize an MCP server",
    status_code=200,
    responses=declared(409, 502, 503),
)
async def authorize_mcp_server(services: NamedDependency[Services], server_id: FromPath[str]) -> AuthorizationBegun:
    """For auth mode `o_auth`: a person opens `authorization_url` in a browser, logs in and comes back to the callback."""
    target = await mcp_servers.find_target(services.database, server_id)
    if target.auth_mode is not AuthMode.O_AUTH:
        raise Conflict("The server's auth_mode is not `o_auth`; set it first", field="auth_mode")
    client = await mcp_grants.oauth_client(services.database, services.keyring, target)
    try:
        begun = await services.mcp_authorizer.begin(target, _callback_url(services), client)
    except McpProblem as problem:
        raise McpServerUnavailable(str(problem)) from None
    await mcp_grants.begin_flow(services.database, services.keyring, target, begun.state, begun.flow)
    return AuthorizationBegun(authorization_url=begun.url, expires_in_seconds=mcp_grants.FLOW_SECONDS)


@get(
    "/oauth/callback",
    operation_id="finish_mcp_authorization",
    summary="Finish the authorization of an MCP server",
    media_type="text/plain",
    responses=declared(409, 502, 503),
)
async def finish_mcp_authorization(
    services: NamedDependency[Services],
    oauth_state: Annotated[str, QueryParameter(name="state", max_length=512)],
    code: FromQuery[str | None] = None,
    error: FromQuery[str | None] = None,
    iss: FromQuery[str | None] = None,
) -> str:
    """Where the authorization server sends the person's browser back to. Each `state` works once, for 15 minutes."""
    begun = await mcp_grants.end_flow(services.database, services.keyring, oauth_state)
    if begun is None:
        raise InvalidInput(
            "This authorization was not begun here, has ended, or took too long; begin again", field="state"
        )
    if code is None or error is not None:
        raise InvalidInput("The authorization was not granted", field="error")
    target, flow = begun
    try:
        grant = await services.mcp_authorizer.finish(msgspec.json.decode(flow, type=OAuthFlow), code, iss)
    except McpProblem as problem:
        raise McpServerUnavailable(str(problem)) from None
    await mcp_grants.write_grant(services.database, services.keyring, target, grant)
    return f"MCP server {target.name} is connected. You can close this page."


@delete(
    "/{server_id:str}/oauth",
    operation_id="disconnect_mcp_server",
    summary="Forget an MCP server's authorization",
    responses=declared(409),
)
async def disconnect_mcp_server(services: NamedDependency[Services], server_id: FromPath[str]) -> None:
    """Its tokens are deleted here. Calls fail until somebody authorizes it again."""
    target = await mcp_servers.find_target(services.database, server_id)
    await mcp_grants.write_grant(services.database, services.keyring, target, None)


def _callback_url(services: Services) -> str:
    return self_url(services, "mcp-servers/oauth/callback")


async def _asked(services: Services, target: ServerTarget) -> Discovery:
    try:
        return await services.discover_mcp_tools(target, NetworkAccessList())
    except McpProblem as problem:
        raise McpServerUnavailable(str(problem)) from None


def _tool_list(discovery: Discovery, *, age_seconds: float = 0.0, problem: str | None = None) -> McpToolList:
    return McpToolList(
        data=discovery.tools,
        total=len(discovery.tools),
        left_out=discovery.left_out,
        age_seconds=round(age_seconds, 3),
        problem=problem,
    )


router = Router(
    "/mcp-servers",
    tags=["MCP servers"],
    route_handlers=[
        list_mcp_servers,
        create_mcp_server,
        mcp_server_config,
        get_mcp_server,
        update_mcp_server,
        delete_mcp_server,
        list_mcp_server_tools,
        refresh_mcp_server,
        authorize_mcp_server,
        finish_mcp_authorization,
        disconnect_mcp_server,
    ],
)
