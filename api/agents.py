"""`/v1/agents`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from litestar import Request, Response, Router, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from api.agent_files import AgentFile, export_agent_file, parse_agent_file
from api.caller import Caller
from api.capability_refs import checked_refs
from api.examples import AGENT_EXAMPLES
from api.harnesses import NameAvailability
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
from api.requests import LayerRequest, MaxIterations, ToolInput, capability_refs, client_tools, present
from api.scoped_servers import with_sealed_servers
from api.services import Services
from db import agents, session_stats
from domain.errors import InvalidInput, NotFound
from domain.events import TokenUsage
from domain.ids import Prefix, parse_id
from domain.limits import IMPORT_MAX_BYTES, MAX_ITERATIONS_CEILING, check_name
from domain.resources import Agent, AgentChanges, Lifecycle, ResourceStats


class _AgentFields(LayerRequest, frozen=True, kw_only=True):
    display_name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    default_model_id: str | UnsetType | None = UNSET
    fallback_model_ids: list[str] | UnsetType | None = UNSET
    harness_id: str | UnsetType | None = UNSET
    harness_name: str | UnsetType | None = UNSET
    tools: list[ToolInput] | UnsetType | None = UNSET
    max_iterations: MaxIterations | UnsetType | None = UNSET


class CreateAgent(_AgentFields, frozen=True, kw_only=True):
    """Without a harness the `generic` one is used. An agent that has the given `id`, or else the `name`, is replaced."""

    name: str
    system_prompt: str  # pyright: ignore[reportGeneralTypeIssues] # required here, optional in a PATCH
    id: str | None = None


class UpdateAgent(_AgentFields, frozen=True, kw_only=True):
    """Absent fields stay as they are; null clears what can be empty. `status` archives and reactivates."""

    name: str | UnsetType | None = UNSET
    status: Lifecycle | UnsetType | None = UNSET


class AgentView(Agent, frozen=True, kw_only=True, omit_defaults=True):
    """`usage` adds up every session of the agent."""

    self_url: str
    allowed_actions: list[AllowedAction]
    usage: TokenUsage | None = None
    session_count: int | None = None
    app_count: int | None = None


class AgentPage(Page, frozen=True, kw_only=True, omit_defaults=True):
    data: list[AgentView]


async def changes_of(services: Services, data: CreateAgent | UpdateAgent, caller: Caller) -> AgentChanges:
    capabilities = data.refs()
    if capabilities is not UNSET:
        capabilities = await checked_refs(services, capabilities, caller)
    return AgentChanges(
        name=present(data.name),
        display_name=data.display_name,
        description=data.description,
        system_prompt=present(data.system_prompt),
        default_model_id=data.default_model_id,
        fallback_model_ids=present(data.fallback_model_ids),
        harness_id=present(data.harness_id),
        harness_name=present(data.harness_name),
        capabilities=capabilities,
        tools=client_tools(data.tools),
        initial_files=present(data.initial_files),
        tags=present(data.tags),
        mcp_servers=data.servers(),
        network_access=data.network_access,
        max_iterations=data.max_iterations,
        parallel_tool_calls=data.parallel_tool_calls,
        status=present(data.status) if isinstance(data, UpdateAgent) else UNSET,
    )


async def changes_of_file(services: Services, file: AgentFile, caller: Caller) -> AgentChanges:
    capabilities = await checked_refs(services, capability_refs(file.capabilities), caller)
    if file.max_iterations is not None and not 1 <= file.max_iterations <= MAX_ITERATIONS_CEILING:
        raise InvalidInput(f"max_iterations must be 1 to {MAX_ITERATIONS_CEILING}", field="max_iterations")
    return AgentChanges(
        name=file.name or UNSET,
        display_name=file.display_name,
        description=file.description,
        system_prompt=file.system_prompt or "",
        default_model_id=file.default_model_id,
        fallback_model_ids=file.fallback_model_ids,
        harness_id=present(file.harness_id),
        harness_name=present(file.harness_name),
        capabilities=capabilities,
        tools=client_tools(file.tools),
        initial_files=file.initial_files,
        tags=file.tags,
        mcp_servers=file.mcp_servers,
        network_access=file.network_access,
        max_iterations=file.max_iterations,
        parallel_tool_calls=file.parallel_tool_calls,
    )


def agent_view(services: Services, agent: Agent, usage: session_stats.Usage | None = None) -> AgentView:
    url = self_url(services, f"agents/{agent.id}")
    items = [
        ("self", "GET", "", "get_agent"),
        ("copy", "POST", "/copy", "copy_agent"),
        ("export", "GET", "/export", "export_agent"),
    ]
    if agent.status is Lifecycle.ARCHIVED:
        items += [("unarchive", "PATCH", "", "update_agent"), ("delete", "POST", "/delete", "purge_agent")]
    else:
        items += [("update", "PATCH", "", "update_agent"), ("delete", "DELETE", "", "delete_agent")]
    return view(
        AgentView,
        agent,
        self_url=url,
        allowed_actions=actions(url, *items),
        usage=usage.tokens if usage else None,
        session_count=usage.session_count if usage else None,
        app_count=0 if usage else None,
    )


async def counted_views(services: Services, found: list[Agent]) -> list[AgentView]:
    usage = await session_stats.usage_by_agent(services.database, [agent.id for agent in found])
    return [agent_view(services, agent, usage.get(agent.id, session_stats.UNUSED)) for agent in found]


def saved_response(services: Services, saved: agents.Saved) -> Response[AgentView]:
    return Response(agent_view(services, saved.agent), status_code=201 if saved.created else 200)


@get("/", operation_id="list_agents", summary="List agents", responses=declared())
async def list_agents(
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    search: FromQuery[str | None] = None,
    include_archived: FromQuery[bool] = False,
    offset: Offset = 0,
    limit: Limit = DEFAULT_LIMIT,
) -> AgentPage:
    """A page of agents, newest first. Each word of `search` must occur in the name or the description."""
    limit = capped(limit)
    found, total = await agents.list_agents(
        search=search, include_archived=include_archived, offset=offset, limit=limit
    )
    return AgentPage(
        data=await counted_views(services, found), **page_fields(request, total=total, offset=offset, limit=limit)
    )


@post("/", operation_id="create_agent", summary="Create or replace an agent", responses=declared(409, 413))
async def create_agent(
    services: NamedDependency[Services], caller: NamedDependency[Caller], data: JSONBody[CreateAgent]
) -> AgentView:
    """An agent that has the given id, or without an id the given name, is replaced; otherwise one is created."""
    changes = await changes_of(services, data, caller)
    changes = await with_sealed_servers(services, changes, "agents", owner_id=data.id, owner_name=data.name)
    saved = await agents.save_agent(changes, data.id)
    return agent_view(services, saved.agent)


@get("/check-name", operation_id="check_agent_name", summary="Check an agent name", responses=declared())
async def check_agent_name(name: FromQuery[str], exclude_id: FromQuery[str | None] = None) -> NameAvailability:
    """Whether an active agent other than `exclude_id` has this name."""
    check_name(name)
    return NameAvailability(available=await agents.agent_name_is_free(name, exclude_id))


@get("/config", operation_id="agent_config", summary="Agent policies", responses=declared())
async def agent_config() -> ConfigView:
    """What the caller may do with agents."""
    return resource_config("agents")


@dataclass
class _TakesFile(Operation):
    """The body is read as it is, so Litestar cannot describe it."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            content={"text/plain": OpenAPIMediaType(schema=Schema(type=OpenAPIType.STRING))},
            description="Markdown with YAML front matter, YAML, JSON, or the bare prompt.",
        )


@post(
    "/import",
    operation_id="import_agent",
    summary="Import an agent file",
    operation_class=_TakesFile,
    request_max_body_size=IMPORT_MAX_BYTES,
    responses={200: ResponseSpec(AgentView, description="An agent was replaced"), **declared(409, 413)},
)
async def import_agent(
    services: NamedDependency[Services],
    caller: NamedDependency[Caller],
    request: Request[Any, Any, Any],
    example_name: Annotated[
        str | None, QueryParameter(name="from-example", description="Name of a built-in example; the body is ignored.")
    ] = None,
) -> Response[AgentView]:
    """201 when the file made a new agent, 200 when it replaced the one that has its id or name."""
    if example_name is None:
        try:
            text = (await request.body()).decode()
        except UnicodeDecodeError:
            raise InvalidInput("The file is not UTF-8 text") from None
    elif example_name in AGENT_EXAMPLES:
        text = AGENT_EXAMPLES[example_name]
    else:
        raise NotFound(f"There is no agent example `{example_name[:80]}`")
    # Three megabytes of YAML take seconds to read.
    file = await asyncio.to_thread(parse_agent_file, text)
    changes = await changes_of_file(services, file, caller)
    changes = await with_sealed_servers(services, changes, "agents", owner_id=file.id, owner_name=file.name)
    return saved_response(services, await agents.save_agent(changes, file.id))


@get("/{agent_id:str}", operation_id="get_agent", summary="Get an agent", responses=declared())
async def get_agent(services: NamedDependency[Services], agent_id: FromPath[str]) -> AgentView:
    """By id or by name."""
    return (await counted_views(services, [await agents.get_agent(agent_id)]))[0]


@put(
    "/{agent_id:str}",
    operation_id="upsert_agent",
    summary="Create or replace an agent under an id",
    responses={201: ResponseSpec(AgentView, description="The agent was created"), **declared(409, 413)},
)
async def upsert_agent(
    services: NamedDependency[Services],
    caller: NamedDependency[Caller],
    agent_id: FromPath[str],
    data: JSONBody[CreateAgent],
) -> Response[AgentView]:
    """The id in the path counts; one in the body must be the same."""
    parse_id(Prefix.AGENT, agent_id)
    if data.id not in (None, agent_id):
        raise InvalidInput("id differs from the id in the path", field="id")
    changes = await changes_of(services, data, caller)
    changes = await with_sealed_servers(services, changes, "agents", owner_id=agent_id)
    return saved_response(services, await agents.save_agent(changes, agent_id))


@patch("/{agent_id:str}", operation_id="update_agent", summary="Update an agent", responses=declared(409, 413))
async def update_agent(
    services: NamedDependency[Services],
    caller: NamedDependency[Caller],
    agent_id: FromPath[str],
    data: JSONBody[UpdateAgent],
) -> AgentView:
    """Sessions see the change at their next turn."""
    changes = await changes_of(services, data, caller)
    changes = await with_sealed_servers(services, changes, "agents", owner_id=agent_id)
    return agent_view(services, await agents.update_agent(agent_id, changes))


@delete("/{agent_id:str}", operation_id="delete_agent", summary="Archive an agent", responses=declared())
async def delete_agent(agent_id: FromPath[str]) -> None:
    """Archived agents take no new sessions and give up their name; the sessions that have them go on."""
    await agents.archive_agent(agent_id)


@post(
    "/{agent_id:str}/delete",
    operation_id="purge_agent",
    summary="Delete an archived agent",
    status_code=204,
    responses=declared(409),
)
async def purge_agent(agent_id: FromPath[str]) -> None:
    """For good: no request finds it again."""
    await agents.delete_agent(agent_id)


@post("/{agent_id:str}/copy", operation_id="copy_agent", summary="Copy an agent", responses=declared(409))
async def copy_agent(services: NamedDependency[Services], agent_id: FromPath[str]) -> AgentView:
    """The copy is called `{name} (copy)`."""
    return agent_view(services, await agents.copy_agent(agent_id))


@get(
    "/{agent_id:str}/export",
    operation_id="export_agent",
    summary="Export an agent as a file",
    media_type="text/markdown",
    responses=declared(),
)
async def export_agent(agent_id: FromPath[str]) -> Response[str]:
    """Markdown with YAML front matter; importing it gives the same agent."""
    agent = await agents.get_agent(agent_id)
    return Response(
        export_agent_file(agent),
        media_type="text/markdown",
        headers={"Content-Disposition": f'attachment; filename="{agent.id}.md"'},
    )


@get("/{agent_id:str}/stats", operation_id="get_agent_stats", summary="Agent statistics", responses=declared())
async def get_agent_stats(services: NamedDependency[Services], agent_id: FromPath[str]) -> ResourceStats:
    """Sessions, turns and tokens over all sessions of the agent."""
    agent = await agents.get_agent(agent_id)
    return await session_stats.resource_stats(services.database, "agent_id", agent.id)


router = Router(
    "/agents",
    tags=["Agents"],
    route_handlers=[
        list_agents,
        create_agent,
        check_agent_name,
        agent_config,
        import_agent,
        get_agent,
        upsert_agent,
        update_agent,
        delete_agent,
        purge_agent,
        copy_agent,
        export_agent,
        get_agent_stats,
    ],
)
