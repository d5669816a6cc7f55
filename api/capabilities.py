"""`/v1/capabilities`: what the registry holds, and what rows of the organization add to it."""

from __future__ import annotations

from typing import Any

from litestar import Request, Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from msgspec import Struct, structs

from activities.capabilities.declared import capability_of
from activities.capabilities.registry import capability_info
from api.capability_refs import server_capability
from api.links import DEFAULT_LIMIT, Limit, Offset, Page, capped, page_fields, self_url, view
from api.problems import declared
from api.services import Services
from db.capability_counts import CapabilityCounts, capability_counts
from db.mcp_servers import list_servers
from db.virtual_capabilities import list_virtual
from domain.capabilities import CapabilityInfo
from domain.declarative import MCP
from domain.errors import NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.limits import MAX_SEARCH_TOKENS


class CapabilityView(CapabilityInfo, frozen=True, kw_only=True, omit_defaults=True):
    """`agent_count` and `harness_count` are the active ones that refer to it."""

    self_url: str


class CapabilityPage(Page, frozen=True, kw_only=True, omit_defaults=True):
    data: list[CapabilityView]


class _Listed(Struct, frozen=True, kw_only=True):
    """A capability with what references may call it."""

    info: CapabilityInfo
    refs: tuple[str, ...]


def _view(services: Services, listed: _Listed, counts: dict[str, CapabilityCounts]) -> CapabilityView:
    used = [counts[ref] for ref in listed.refs if ref in counts]
    info = structs.replace(
        listed.info,
        agent_count=sum(one.agents for one in used),
        harness_count=sum(one.harnesses for one in used),
    )
    return view(CapabilityView, info, self_url=self_url(services, f"capabilities/{info.id}"))


async def _all(services: Services) -> list[_Listed]:
    """Built-in ones first, then declarative ones, skills and MCP servers."""
    listed = [_Listed(info=capability_info(one), refs=(one.id, *one.aliases)) for one in services.capabilities.list()]
    async with services.database.pool.acquire() as connection:
        rows = await list_virtual(connection, DEFAULT_ORG_ID)  # type: ignore[arg-type]  # a pool's proxy
        servers = await list_servers(connection)  # type: ignore[arg-type]
    for row in rows:
        info = structs.replace(
            capability_info(capability_of(row.declared)),
            is_skill=row.declared.skill is not None,
            tool_definitions=row.tools,
        )
        listed.append(_Listed(info=info, refs=(row.declared.ref, *row.aliases)))
    for server in servers:
        key = parse_id(Prefix.MCP, server.id)
        info = structs.replace(capability_info(server_capability(f"{MCP}{key}", server)), is_mcp=True)
        listed.append(_Listed(info=info, refs=(info.id, f"{MCP}{server.id}", f"{MCP}{key.hex}")))
    return listed


def _matches(info: CapabilityInfo, search: str | None) -> bool:
    text = f"{info.name} {info.description}".lower()
    return all(word in text for word in (search or "").lower().split()[:MAX_SEARCH_TOKENS])


@get("/", operation_id="list_capabilities", summary="List capabilities", responses=declared())
async def list_capabilities(
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    search: FromQuery[str | None] = None,
    offset: Offset = 0,
    limit: Limit = DEFAULT_LIMIT,
) -> CapabilityPage:
    """A page of everything that references can name. Each word of `search` must occur in the name or the description."""
    limit = capped(limit)
    found = [listed for listed in await _all(services) if _matches(listed.info, search)]
    counts = await capability_counts(services.database)
    return CapabilityPage(
        data=[_view(services, one, counts) for one in found[offset : offset + limit]],
        **page_fields(request, total=len(found), offset=offset, limit=limit),
    )


@get("/{capability_id:str}", operation_id="get_capability", summary="Get a capability", responses=declared())
async def get_capability(services: NamedDependency[Services], capability_id: FromPath[str]) -> CapabilityView:
    """By whatever references may call it; with its tools, its prompt and the schema of its configuration."""
    found = next((one for one in await _all(services) if capability_id in one.refs), None)
    if found is None:
        raise NotFound(f"There is no capability `{capability_id[:80]}`")
    return _view(services, found, await capability_counts(services.database))


router = Router("/capabilities", tags=["Capabilities"], route_handlers=[list_capabilities, get_capability])
