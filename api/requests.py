"""Parts of request bodies that several resources share, and how they become `…Changes`.

In a PATCH an absent field is left alone, and null clears a value that can be empty. Null for a list, a name or another value that
can't be empty is read as absent: clients that send every field they know mean it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
import structlog
from msgspec import UNSET, Meta, Struct, UnsetType, structs

from domain.config import CapabilityRef, InitialFile, NetworkAccessList
from domain.limits import MAX_ITERATIONS_CEILING
from domain.tools import ClientSideTool, ToolHints

T = TypeVar("T")

log = structlog.get_logger("api")

MaxIterations = Annotated[int, Meta(ge=1, le=MAX_ITERATIONS_CEILING)]


class ToolInput(Struct, frozen=True, kw_only=True):
    """A client-side tool: the model may call it, the client runs it. Definitions of another `type` are dropped."""

    name: str
    description: str
    parameters: dict[str, object]
    type: str = "client_side"
    display_name: str | None = None
    category: str | None = None
    deferrable: Literal["never", "automatic", "always"] | None = None
    full_parameters: dict[str, object] | None = None
    hints: ToolHints | None = None


class LayerRequest(Struct, frozen=True, kw_only=True):
    """What harnesses, agents and sessions have in common."""

    system_prompt: str | UnsetType | None = UNSET
    capabilities: list[CapabilityRef | str] | UnsetType | None = UNSET
    initial_files: list[InitialFile] | UnsetType | None = UNSET
    tags: list[str] | UnsetType | None = UNSET
    mcp_servers: dict[str, object] | UnsetType | None = msgspec.field(name="mcpServers", default=UNSET)
    mcp_servers_alias: dict[str, object] | UnsetType | None = msgspec.field(name="mcp_servers", default=UNSET)
    network_access: NetworkAccessList | UnsetType | None = UNSET
    parallel_tool_calls: bool | UnsetType | None = UNSET

    def refs(self) -> list[CapabilityRef] | UnsetType:
        return UNSET if not isinstance(self.capabilities, list) else capability_refs(self.capabilities)

    def servers(self) -> dict[str, object] | UnsetType | None:
        return self.mcp_servers_alias if self.mcp_servers is UNSET else self.mcp_servers


def present(value: T | UnsetType | None) -> T | UnsetType:
    """For values that can't be empty: null is read as absent."""
    return UNSET if value is None else value


def capability_refs(items: Sequence[CapabilityRef | str]) -> list[CapabilityRef]:
    return [CapabilityRef(ref=item) if isinstance(item, str) else item for item in items]


def client_tools(items: Sequence[ToolInput] | UnsetType | None) -> list[ClientSideTool] | UnsetType:
    """Only the client's own tools: what runs on our side comes from capabilities."""
    if not isinstance(items, Sequence):
        return UNSET
    dropped = [tool.name for tool in items if tool.type != "client_side"]
    if dropped:
        log.warning("tools dropped: not client_side", tools=dropped)
    return [
        ClientSideTool(**{name: value for name, value in structs.asdict(tool).items() if name != "type"})
        for tool in items
        if tool.type == "client_side"
    ]
