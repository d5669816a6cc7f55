"""References to capabilities in a body: which exist, what they mean, and who may give them out. Every write goes through here."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, structs

from activities.capabilities.declared import declared_capabilities
from activities.capabilities.registry import ResolvedCapabilities
from api.caller import Caller, require_admin_for
from api.services import Services
from db.mcp_servers import list_servers
from db.virtual_capabilities import named_declaratives, pinned
from domain.capabilities import Capability
from domain.config import CapabilityRef, TurnConfig
from domain.declarative import DECLARATIVE, MCP
from domain.errors import Archived, UnknownCapability
from domain.ids import DEFAULT_ORG_ID
from domain.mcp import McpServer, server_key
from domain.resources import Lifecycle


class KnownRefs(Struct, frozen=True, kw_only=True):
    """References as they are to be stored, and the capabilities among them that are rows."""

    refs: list[CapabilityRef]
    config: TurnConfig
    others: list[Capability]
    archived: frozenset[str]


async def checked_refs(
    services: Services, refs: Sequence[CapabilityRef], caller: Caller, field: str = "capabilities"
) -> list[CapabilityRef]:
    """`refs` as they are to be stored: a bare name of a declarative capability becomes `declarative:{name}`.

    Raises `UnknownCapability`, `InvalidInput`, `Archived` and `Forbidden`, naming the field.
    """
    known = await known_refs(services, refs)
    for index, ref in enumerate(known.refs):
        if ref.ref in known.archived:
            raise Archived(f"`{ref.ref}` is archived and cannot be newly assigned", field=f"{field}[{index}].ref")
    services.capabilities.check_refs(known.refs, field, known.others)
    for index, ref in enumerate(known.refs):
        resolved = services.capabilities.resolve([ref], _for(known, ref))
        require_admin_for(caller, (one.capability for one in resolved.capabilities), f"{field}[{index}].ref")
    return known.refs


async def checked_dependencies(services: Services, names: Sequence[str], caller: Caller, field: str) -> list[str]:
    """The same for references without configuration, which stand in `field` as plain texts."""
    try:
        refs = await checked_refs(services, [CapabilityRef(ref=name) for name in names], caller, field)
    except (UnknownCapability, Archived) as error:
        raise type(error)(error.message, field=(error.field or field).removesuffix(".ref")) from None
    return [ref.ref for ref in refs]


async def known_refs(services: Services, refs: Sequence[CapabilityRef], base: TurnConfig | None = None) -> KnownRefs:
    """Raises nothing: what is unknown is in none of the answer's lists but `refs`. `base` is the rest of the configuration."""
    bare = [ref.ref for ref in refs if ":" not in ref.ref and services.capabilities.get(ref.ref) is None]
    async with services.database.pool.acquire() as connection:
        names = await named_declaratives(connection, DEFAULT_ORG_ID, bare) if bare else frozenset[str]()  # type: ignore[arg-type]
        full = [structs.replace(ref, ref=f"{DECLARATIVE}{ref.ref}") if ref.ref in names else ref for ref in refs]
        config = structs.replace(base or TurnConfig(), capabilities=full)
        found = await pinned(connection, DEFAULT_ORG_ID, config)  # type: ignore[arg-type]
        deep = [*(ref.ref for ref in full), *(ref for one in found.config.declared for ref in one.dependencies)]
        wanted = list(dict.fromkeys(ref for ref in deep if ref.startswith(MCP)))
        servers = await list_servers(connection, include_archived=True) if wanted else []  # type: ignore[arg-type]
    mcp = {ref: server for ref in wanted if (server := _server(ref, servers)) is not None}
    disabled = [
        Capability(id=one.ref, name=one.name, description="")
        for one in found.config.declared
        if one.problem is not None and one.name != one.ref
    ]
    archived = {ref for ref, server in mcp.items() if server.status == Lifecycle.ARCHIVED}
    return KnownRefs(
        refs=full,
        config=found.config,
        others=[
            *declared_capabilities(found.config),
            *disabled,
            *(server_capability(ref, server) for ref, server in mcp.items()),
        ],
        archived=found.archived | archived,
    )


def resolved_refs(services: Services, known: KnownRefs) -> ResolvedCapabilities:
    return services.capabilities.resolve(known.refs, known.others)


def server_capability(ref: str, server: McpServer) -> Capability:
    """Without its tools, which the server itself would have to be asked for."""
    return Capability(
        id=ref, name=server.name, description=server.description or "", category="MCP", risk_level="medium"
    )


def _server(ref: str, servers: Sequence[McpServer]) -> McpServer | None:
    key = server_key(ref)
    return next((server for server in servers if key is not None and server.id == f"mcp_{key.hex}"), None)


def _for(known: KnownRefs, ref: CapabilityRef) -> list[Capability]:
    """What one reference brings in: the registry would add all others, too."""
    by_id = {one.id: one for one in known.others}
    found: dict[str, Capability] = {}
    waiting = [ref.ref]
    while waiting:
        one = by_id.get(waiting.pop())
        if one is not None and one.id not in found:
            found[one.id] = one
            waiting += one.dependencies
    return list(found.values())
