"""`/v1/capabilities/declarative`, and `POST /v1/capabilities`: capabilities that an organization writes itself."""

from __future__ import annotations

import asyncio

from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType, structs

from api.caller import Caller, require_admin_for
from api.capability_refs import checked_dependencies
from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.services import Services
from db import declarative_capabilities as rows
from db.mcp_scoped import sealed_servers
from domain.capabilities import Capability
from domain.declarative import (
    FIELD,
    DeclarativeCapability,
    DeclarativeDefinition,
    DeclarativeStatus,
    InlineSkill,
    read_definition,
)
from domain.errors import InvalidInput
from domain.mcp import masked_servers


class CreateDeclarativeCapability(Struct, frozen=True, kw_only=True):
    """`definition` holds `name` and whatever the capability is to bring: see the documentation."""

    definition: dict[str, object]


class UpdateDeclarativeCapability(Struct, frozen=True, kw_only=True):
    """A `definition` replaces the stored one as a whole. `status` disables, archives and reactivates."""

    definition: dict[str, object] | UnsetType | None = UNSET
    status: DeclarativeStatus | UnsetType | None = UNSET


class DeclarativeCapabilityView(DeclarativeCapability, frozen=True, kw_only=True, omit_defaults=True):
    """Secrets of its MCP servers are masked."""

    self_url: str
    allowed_actions: list[AllowedAction]


class DeclarativeCapabilityList(Struct, frozen=True, kw_only=True):
    data: list[DeclarativeCapabilityView]
    total: int


def capability_view(services: Services, capability: DeclarativeCapability) -> DeclarativeCapabilityView:
    url = self_url(services, f"capabilities/declarative/{capability.id}")
    items = [("self", "GET", "", "get_declarative_capability")]
    if capability.status is DeclarativeStatus.ARCHIVED:
        items += [
            ("unarchive", "PATCH", "", "update_declarative_capability"),
            ("delete", "POST", "/delete", "delete_declarative_capability"),
        ]
    elif capability.status is not DeclarativeStatus.DELETED:
        items += [
            ("update", "PATCH", "", "update_declarative_capability"),
            ("delete", "DELETE", "", "archive_declarative_capability"),
        ]
    masked = masked_servers(capability.definition.mcp_servers) or {}
    shown = structs.replace(capability, definition=structs.replace(capability.definition, mcp_servers=masked))
    return view(DeclarativeCapabilityView, shown, self_url=url, allowed_actions=actions(url, *items))


async def _definition_of(
    services: Services, given: dict[str, object], caller: Caller, capability_id: str | None = None
) -> DeclarativeDefinition:
    """Checked, with references as they are stored, and secrets sealed."""
    # Files in base64 and long texts take their time.
    definition = await asyncio.to_thread(read_definition, given)
    if services.capabilities.get(definition.name) is not None:
        raise InvalidInput(f"`{definition.name}` is a built-in capability", field=f"{FIELD}.name")
    own = Capability(id=definition.ref, name=definition.name, description="", risk_level=definition.risk_level)
    require_admin_for(caller, [own], f"{FIELD}.risk_level")
    dependencies = await checked_dependencies(services, definition.dependencies, caller, f"{FIELD}.dependencies")
    skills = await _skills(services, definition, caller)
    servers = definition.mcp_servers
    if servers:
        servers = await sealed_servers(
            services.database,
            services.keyring,
            servers,
            allow_stdio=services.settings.mcp_allow_stdio,
            owner="declarative_capabilities",
            owner_id=capability_id,
        )
    return structs.replace(definition, dependencies=dependencies, skills=skills, mcp_servers=servers)


async def _skills(services: Services, definition: DeclarativeDefinition, caller: Caller) -> list[str | InlineSkill]:
    """Raises what names the skill at fault by its place among all of them."""
    checked: list[str | InlineSkill] = []
    references = iter(definition.skill_refs)
    for index, skill in enumerate(definition.skills):
        if isinstance(skill, InlineSkill):
            checked.append(skill)
            continue
        ref = next(references)
        field = f"{FIELD}.skills[{index}]"
        try:
            checked += await checked_dependencies(services, [ref], caller, field)
        except InvalidInput as error:
            raise type(error)(error.message, field=field) from None
    return checked


@post(
    "/capabilities",
    operation_id="create_declarative_capability",
    summary="Create a declarative capability",
    responses=declared(403, 409, 413),
)
async def create_declarative_capability(
    services: NamedDependency[Services], caller: NamedDependency[Caller], data: JSONBody[CreateDeclarativeCapability]
) -> DeclarativeCapabilityView:
    """Agents, harnesses and sessions refer to it as `declarative:{name}`."""
    definition = await _definition_of(services, data.definition, caller)
    return capability_view(services, await rows.create_declarative(services.database, definition))


@get(
    "/capabilities/declarative",
    operation_id="list_declarative_capabilities",
    summary="List declarative capabilities",
    responses=declared(),
)
async def list_declarative_capabilities(
    services: NamedDependency[Services],
    search: FromQuery[str | None] = None,
    include_archived: FromQuery[bool] = False,
) -> DeclarativeCapabilityList:
    """Newest first. Each word of `search` must occur in the name or the description."""
    found = await rows.list_declarative(services.database, search=search, include_archived=include_archived)
    return DeclarativeCapabilityList(data=[capability_view(services, one) for one in found], total=len(found))


@get(
    "/capabilities/declarative/config",
    operation_id="declarative_capability_config",
    summary="Declarative capability policies",
    responses=declared(),
)
async def declarative_capability_config() -> ConfigView:
    """What the caller may do with declarative capabilities."""
    return resource_config("capabilities")


@get(
    "/capabilities/declarative/{capability_id:str}",
    operation_id="get_declarative_capability",
    summary="Get a declarative capability",
    responses=declared(),
)
async def get_declarative_capability(
    services: NamedDependency[Services], capability_id: FromPath[str]
) -> DeclarativeCapabilityView:
    """With its definition."""
    return capability_view(services, await rows.get_declarative(services.database, capability_id))


@patch(
    "/capabilities/declarative/{capability_id:str}",
    operation_id="update_declarative_capability",
    summary="Update a declarative capability",
    responses=declared(403, 409, 413),
)
async def update_declarative_capability(
    services: NamedDependency[Services],
    caller: NamedDependency[Caller],
    capability_id: FromPath[str],
    data: JSONBody[UpdateDeclarativeCapability],
) -> DeclarativeCapabilityView:
    """Turns see it when they begin. What refers to it follows a new name."""
    definition: DeclarativeDefinition | UnsetType = UNSET
    if isinstance(data.definition, dict):
        definition = await _definition_of(services, data.definition, caller, capability_id)
    status = data.status if isinstance(data.status, DeclarativeStatus) else None
    updated = await rows.update_declarative(services.database, capability_id, definition, status)
    return capability_view(services, updated)


@delete(
    "/capabilities/declarative/{capability_id:str}",
    operation_id="archive_declarative_capability",
    summary="Archive a declarative capability",
    status_code=200,
    responses=declared(),
)
async def archive_declarative_capability(
    services: NamedDependency[Services], capability_id: FromPath[str]
) -> DeclarativeCapabilityView:
    """It gives up its name and cannot be newly assigned; what refers to it goes on."""
    return capability_view(services, await rows.archive_declarative(services.database, capability_id))


@post(
    "/capabilities/declarative/{capability_id:str}/delete",
    operation_id="delete_declarative_capability",
    summary="Delete an archived declarative capability",
    status_code=200,
    responses=declared(409),
)
async def delete_declarative_capability(
    services: NamedDependency[Services], capability_id: FromPath[str]
) -> DeclarativeCapabilityView:
    """For good. What refers to it goes on without it, and says so in its events."""
    return capability_view(services, await rows.delete_declarative(services.database, capability_id))


router = Router(
    "/",
    tags=["Capabilities"],
    route_handlers=[
        create_declarative_capability,
        list_declarative_capabilities,
        declarative_capability_config,
        get_declarative_capability,
        update_declarative_capability,
        archive_declarative_capability,
        delete_declarative_capability,
    ],
)
