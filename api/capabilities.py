"""`/v1/capabilities`: what the registry holds."""

from __future__ import annotations

from typing import Any

from litestar import Request, Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from msgspec import structs

from activities.capabilities.registry import capability_info
from api.links import DEFAULT_LIMIT, Limit, Offset, Page, capped, page_fields, self_url, view
from api.problems import declared
from api.services import Services
from db.capability_counts import CapabilityCounts, capability_counts
from domain.capabilities import Capability, CapabilityInfo
from domain.errors import NotFound
from domain.limits import MAX_SEARCH_TOKENS


class CapabilityView(CapabilityInfo, frozen=True, kw_only=True, omit_defaults=True):
    """`agent_count` and `harness_count` are the active ones that refer to it."""

    self_url: str


class CapabilityPage(Page, frozen=True, kw_only=True, omit_defaults=True):
    data: list[CapabilityView]


def capability_view(services: Services, capability: Capability, counts: dict[str, CapabilityCounts]) -> CapabilityView:
    used = counts.get(capability.id, CapabilityCounts())
    info = structs.replace(capability_info(capability), agent_count=used.agents, harness_count=used.harnesses)
    return view(CapabilityView, info, self_url=self_url(services, f"capabilities/{capability.id}"))


def _matches(capability: Capability, search: str | None) -> bool:
    text = f"{capability.name} {capability.description}".lower()
    return all(word in text for word in (search or "").lower().split()[:MAX_SEARCH_TOKENS])


@get("/", operation_id="list_capabilities", summary="List capabilities", responses=declared())
async def list_capabilities(
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    search: FromQuery[str | None] = None,
    offset: Offset = 0,
    limit: Limit = DEFAULT_LIMIT,
) -> CapabilityPage:
    """A page of capabilities. Each word of `search` must occur in the name or the description."""
    limit = capped(limit)
    found = [capability for capability in services.capabilities.list() if _matches(capability, search)]
    counts = await capability_counts(services.database)
    return CapabilityPage(
        data=[capability_view(services, one, counts) for one in found[offset : offset + limit]],
        **page_fields(request, total=len(found), offset=offset, limit=limit),
    )


@get("/{capability_id:str}", operation_id="get_capability", summary="Get a capability", responses=declared())
async def get_capability(services: NamedDependency[Services], capability_id: FromPath[str]) -> CapabilityView:
    """With its tools, its prompt and the schema of its configuration."""
    capability = services.capabilities.get(capability_id)
    if capability is None:
        raise NotFound(f"There is no capability `{capability_id[:80]}`")
    return capability_view(services, capability, await capability_counts(services.database))


router = Router("/capabilities", tags=["Capabilities"], route_handlers=[list_capabilities, get_capability])
