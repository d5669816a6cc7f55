"""`preview` and `analyze`: what a configuration comes to before it is saved, and what is to be said about it.

Put together by the functions that put prompts together. What a save would refuse is a finding here: these are asked while
somebody is still writing. What depends on a session (files in its workspace, tools of MCP servers) is not in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated
from uuid import UUID

import asyncpg
import msgspec
from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Meta, Struct

from activities.capabilities.agent_checks import GivenTool, Shape, findings
from activities.capabilities.assembly import offered_tools, system_prompt
from activities.capabilities.registry import ResolvedCapabilities
from api.capability_refs import known_refs, resolved_refs
from api.problems import declared
from api.requests import ToolInput, capability_refs
from api.services import Services
from db.harnesses import ROWS as HARNESSES
from db.model_choice import ModelChooser
from db.turn_config import read_harness_layers
from domain.config import CapabilityRef, ConfigLayer, NetworkAccessList, TurnConfig, fold
from domain.errors import InvalidInput, NotFound
from domain.findings import Finding
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id
from domain.limits import MAX_TOOLS, PROMPT_MAX_BYTES, check_capability_refs, check_count, check_text
from domain.model import ModelEndpoint
from domain.token_estimate import text_tokens, tool_tokens
from domain.tools import ClientSideTool, ToolDefinition


class PreviewAgent(Struct, frozen=True, kw_only=True):
    """The parts of an agent that its prompt and tools come from. With a harness its layers come first, as they do in a turn."""

    system_prompt: str
    capabilities: list[CapabilityRef | str] = []
    tools: list[dict[str, object]] = []
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    default_model_id: str | None = None
    harness_id: str | None = None
    harness_name: str | None = None


class PreviewHarness(Struct, frozen=True, kw_only=True):
    system_prompt: str | None = None
    capabilities: list[CapabilityRef | str] = []
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    parent_harness_id: str | None = None


class PromptFragment(Struct, frozen=True, kw_only=True):
    """A piece of the prompt. `source` is `harness`, `own` or the id of a capability."""

    source: str
    label: str
    text: str
    tokens: Annotated[int, Meta(description="An estimate.")]


class Preview(Struct, frozen=True, kw_only=True):
    """`fragments` in their order, with blank lines between them, are the `system_prompt`."""

    system_prompt: str
    tools: list[ToolDefinition]
    fragments: list[PromptFragment]
    estimated_tokens: int
    findings: list[Finding]


class Analysis(Struct, frozen=True, kw_only=True):
    findings: list[Finding]


class _Previewed(Struct, frozen=True, kw_only=True):
    own_prompt: str
    harness_prompt: str
    config: TurnConfig
    resolved: ResolvedCapabilities
    shape: Shape


async def _previewed(
    services: Services, data: PreviewAgent | PreviewHarness, harness: UUID | None, tools: Sequence[dict[str, object]]
) -> _Previewed:
    own = data.system_prompt or ""
    check_text(own, "system_prompt", PROMPT_MAX_BYTES)
    check_count(tools, "tools", MAX_TOOLS)
    refs = capability_refs(data.capabilities)
    check_capability_refs(refs)
    given = [_given_tool(tool) for tool in tools]
    layer = ConfigLayer(
        system_prompt=own or None,
        capabilities=refs,
        tools=[
            ClientSideTool(name=tool.name, description=tool.description, parameters=tool.parameters)
            for tool in given
            if tool.problem is None
        ],
        mcp_servers=data.mcp_servers,
        network_access=data.network_access,
        model_id=data.default_model_id if isinstance(data, PreviewAgent) else None,
    )
    async with services.database.pool.acquire() as connection:
        base = [] if harness is None else await read_harness_layers(connection, DEFAULT_ORG_ID, harness)  # type: ignore[arg-type]
    folded = fold([*base, layer])
    known = await known_refs(services, folded.capabilities, folded)
    config = known.config
    resolved = resolved_refs(services, known)
    own_refs = (await known_refs(services, refs)).refs
    shape = Shape(
        prompt=own,
        refs=own_refs,
        tools=given,
        network_access=data.network_access or NetworkAccessList(),
        config=config,
        resolved=resolved,
        context_window=await _context_window(services, config),
    )
    return _Previewed(
        own_prompt=own,
        harness_prompt=fold(base).system_prompt,
        config=config,
        resolved=resolved,
        shape=shape,
    )


async def _previewed_agent(services: Services, data: PreviewAgent) -> _Previewed:
    harness = await _harness_of(data.harness_id, data.harness_name, "harness_id" if data.harness_id else "harness_name")
    return await _previewed(services, data, harness, data.tools)


def _given_tool(tool: dict[str, object]) -> GivenTool:
    name = tool.get("name")
    try:
        read = msgspec.convert(tool, ToolInput)
    except msgspec.ValidationError as error:
        return GivenTool(name=name if isinstance(name, str) else "", problem=str(error))
    if read.type != "client_side":
        return GivenTool(
            name=read.name, problem=f"its type is `{read.type[:40]}`, and only `client_side` tools can be defined"
        )
    return GivenTool(name=read.name, description=read.description, parameters=read.parameters)


async def _context_window(services: Services, config: TurnConfig) -> int | None:
    models = ModelChooser(_endpoint, system_model=services.settings.default_model)
    async with services.database.pool.acquire() as connection:
        try:
            model = await models.configured(connection, DEFAULT_ORG_ID, config, 0)  # type: ignore[arg-type]
        except InvalidInput:
            return None
    return model and model.context_window


def _endpoint(row: asyncpg.Record) -> ModelEndpoint:
    """Without credentials: nothing is called."""
    return ModelEndpoint(
        provider_type=row["provider_type"], provider_public_id=format_id(Prefix.PROVIDER, row["provider_id"])
    )


async def _harness_of(harness_id: str | None, harness_name: str | None, field: str) -> UUID | None:
    """Raises `InvalidInput`, naming the field."""
    if harness_id is not None and harness_name is not None:
        raise InvalidInput("Give either harness_id or harness_name, not both", field="harness_name")
    key = harness_id if harness_id is not None else harness_name
    if key is None:
        return None
    try:
        row = await HARNESSES.get(key)
    except NotFound:
        raise InvalidInput(f"{field} names no harness", field=field) from None
    found = row["id"]
    assert isinstance(found, UUID)
    return found


def _fragments(previewed: _Previewed) -> list[PromptFragment]:
    texts = [
        ("harness", "Harness", previewed.harness_prompt),
        ("own", "System prompt", previewed.own_prompt),
        *((one.capability.id, one.capability.name, one.prompt) for one in previewed.resolved.capabilities),
    ]
    return [
        PromptFragment(source=source, label=label, text=text, tokens=text_tokens(text))
        for source, label, text in texts
        if text
    ]


async def _preview(previewed: _Previewed) -> Preview:
    tools = offered_tools(previewed.config, previewed.resolved)
    text = system_prompt(previewed.config, previewed.resolved)
    return Preview(
        system_prompt=text,
        tools=tools,
        fragments=_fragments(previewed),
        estimated_tokens=text_tokens(text) + sum(tool_tokens(tool) for tool in tools),
        # A megabyte of prompt takes its time.
        findings=await asyncio.to_thread(findings, previewed.shape),
    )


@post(
    "/agents/preview",
    operation_id="preview_agent",
    summary="Preview an agent",
    status_code=200,
    responses=declared(413),
    tags=["Agents"],
)
async def preview_agent(services: NamedDependency[Services], data: JSONBody[PreviewAgent]) -> Preview:
    """The prompt and the tools a turn would begin with, where each piece comes from, and findings. Nothing is stored."""
    return await _preview(await _previewed_agent(services, data))


@post(
    "/agents/analyze",
    operation_id="analyze_agent",
    summary="Analyze an agent",
    status_code=200,
    responses=declared(413),
    tags=["Agents"],
)
async def analyze_agent(services: NamedDependency[Services], data: JSONBody[PreviewAgent]) -> Analysis:
    """Advice by rules: the same input gives the same findings, and none of them keeps an agent from being saved."""
    previewed = await _previewed_agent(services, data)
    return Analysis(findings=await asyncio.to_thread(findings, previewed.shape))


@post(
    "/harnesses/preview",
    operation_id="preview_harness",
    summary="Preview a harness",
    status_code=200,
    responses=declared(413),
    tags=["Harnesses"],
)
async def preview_harness(services: NamedDependency[Services], data: JSONBody[PreviewHarness]) -> Preview:
    """What a harness and those it inherits from come to together. Nothing is stored."""
    parent = await _harness_of(data.parent_harness_id, None, "parent_harness_id")
    return await _preview(await _previewed(services, data, parent, []))


router = Router("/", route_handlers=[preview_agent, analyze_agent, preview_harness])
