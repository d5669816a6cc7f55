"""Which capabilities exist, and what a list of references to them amounts to.

Built-ins are registered by `builtin_registry()` through the same `register` that anyone else's capability goes through; importing
a capability's module registers nothing. Everything that can be wrong with a capability is found when it is registered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

import msgspec
from msgspec import Struct

from activities.capabilities import (
    ask_user,
    bashkit_shell,
    compaction,
    current_time,
    error_disclosure,
    prompt_caching,
    session,
    session_file_system,
    session_storage,
    stateless_todo_list,
    test_faults,
    test_math,
    test_weather,
    web_fetch,
)
from activities.capabilities.tool_call import ToolOutcome, call_tool
from activities.capabilities.tool_schema import capability_info, tool_definition
from domain.capabilities import Capability, Tool
from domain.config import CapabilityRef
from domain.errors import InvalidInput, UnknownCapability, invalid_field
from domain.tools import BuiltinTool

__all__ = [
    "CapabilityRegistry",
    "ResolvedCapabilities",
    "ResolvedCapability",
    "ResolvedTool",
    "ToolOutcome",
    "builtin_registry",
    "call_tool",
    "capability_info",
    "tool_definition",
]

BUILTIN_MODULES: tuple[ModuleType, ...] = (
    current_time,
    stateless_todo_list,
    ask_user,
    error_disclosure,
    prompt_caching,
    compaction,
    session_file_system,
    session_storage,
    session,
    test_math,
    test_weather,
    test_faults,
)
"""Each holds its manifest in `CAPABILITY`; the order is that of `GET /v1/capabilities`."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What the strictest providers accept."""


class ResolvedTool(Struct, frozen=True, kw_only=True):
    tool: Tool
    capability: Capability
    definition: BuiltinTool


class ResolvedCapability(Struct, frozen=True, kw_only=True):
    capability: Capability
    config: Struct | None
    """The reference's configuration, decoded; None when the capability takes none."""

    @property
    def prompt(self) -> str:
        """Its piece of the system prompt, which may be empty."""
        depending = self.capability.config_prompt and self.capability.config_prompt(self.config)
        return "\n\n".join(text.strip() for text in (self.capability.system_prompt, depending) if text)


class ResolvedCapabilities(Struct, frozen=True, kw_only=True):
    prompt: str
    tools: tuple[ResolvedTool, ...]
    capabilities: tuple[ResolvedCapability, ...]
    missing: tuple[str, ...]
    """References that came to nothing: unknown, not available yet, or with a stored config that is no longer valid."""

    def tool(self, name: str) -> ResolvedTool | None:
        return next((tool for tool in self.tools if tool.tool.name == name), None)

    def config_of(self, capability_id: str) -> Struct | None:
        return next((one.config for one in self.capabilities if one.capability.id == capability_id), None)


class CapabilityRegistry:
    def __init__(self) -> None:
        self._capabilities: dict[str, Capability] = {}
        self._tools: dict[str, tuple[ResolvedTool, ...]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, capability: Capability) -> None:
        """Add a capability; `ValueError` when its id is taken or one of its tools could not be offered to a model."""
        ids = (capability.id, *capability.aliases)
        if taken := [one for one in ids if one in self._capabilities or one in self._aliases or ids.count(one) > 1]:
            raise ValueError(f"capability `{taken[0]}` is already registered")
        names = [tool.name for tool in capability.tools]
        for name in names:
            if not _TOOL_NAME.fullmatch(name) or names.count(name) > 1:
                raise ValueError(f"capability `{capability.id}`: tool name `{name}` is malformed or used twice")
        self._tools[capability.id] = tuple(
            ResolvedTool(tool=tool, capability=capability, definition=tool_definition(tool, capability))
            for tool in capability.tools
        )
        self._capabilities[capability.id] = capability
        self._aliases.update(dict.fromkeys(capability.aliases, capability.id))

    def get(self, capability_id: str) -> Capability | None:
        """By its id or one of its aliases."""
        return self._capabilities.get(self._id_of(capability_id))

    def _id_of(self, ref: str) -> str:
        return self._aliases.get(ref, ref)

    def list(self) -> tuple[Capability, ...]:
        return tuple(self._capabilities.values())

    def check_refs(self, refs: Sequence[CapabilityRef], field: str = "capabilities") -> None:
        """Refuse, on a write, what `resolve` would only be able to skip."""
        for index, ref in enumerate(refs):
            capability = self.get(ref.ref)
            if capability is None:
                raise UnknownCapability(f"Unknown capability `{ref.ref}`", field=f"{field}[{index}].ref")
            if capability.status == "coming_soon":
                raise InvalidInput(f"Capability `{ref.ref}` is not available yet", field=f"{field}[{index}].ref")
            _decode_config(capability, ref.config, f"{field}[{index}].config")

    def resolve(self, refs: Sequence[CapabilityRef]) -> ResolvedCapabilities:
        """Dependencies come before what needs them, otherwise the order of `refs` is kept; it is the order of the prompt."""
        configs = {self._id_of(ref.ref): ref.config for ref in refs}
        resolved: dict[str, ResolvedCapability] = {}
        missing: dict[str, None] = {}
        entered: set[str] = set()  # also what ends a circle of dependencies

        def add(ref: str) -> None:
            capability_id = self._id_of(ref)
            if capability_id in entered:
                return
            entered.add(capability_id)
            capability = self.get(capability_id)
            if capability is None or capability.status == "coming_soon":
                missing[capability_id] = None
                return
            for dependency in capability.dependencies:
                add(dependency)
            try:
                config = _decode_config(capability, configs.get(capability_id), "config")
            except InvalidInput:
                missing[capability_id] = None
                return
            resolved[capability_id] = ResolvedCapability(capability=capability, config=config)

        for ref in refs:
            add(ref.ref)

        tools: dict[str, ResolvedTool] = {}
        for capability_id in resolved:
            for tool in self._tools[capability_id]:
                tools.setdefault(tool.tool.name, tool)
        return ResolvedCapabilities(
            prompt="\n\n".join(one.prompt for one in resolved.values() if one.prompt),
            tools=tuple(tools.values()),
            capabilities=tuple(resolved.values()),
            missing=tuple(missing),
        )


def builtin_registry(private_hosts: Sequence[str] = ()) -> CapabilityRegistry:
    """A new registry with every built-in capability. `private_hosts` are those that `web_fetch` may reach nevertheless."""
    registry = CapabilityRegistry()
    for module in BUILTIN_MODULES:
        registry.register(module.CAPABILITY)
    registry.register(bashkit_shell.capability())
    registry.register(web_fetch.capability(private_hosts))
    return registry


def _decode_config(capability: Capability, config: object, field: str) -> Struct | None:
    if config is not None and not isinstance(config, dict):
        raise InvalidInput(f"{field} must be an object", field=field)
    if capability.config is None:
        if config:
            raise InvalidInput(f"Capability `{capability.id}` takes no configuration", field=field)
        return None
    try:
        return msgspec.convert(config or {}, capability.config)
    except msgspec.ValidationError as error:
        raise invalid_field(error, field) from None
