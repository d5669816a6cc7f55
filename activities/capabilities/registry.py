"""Which capabilities exist, and what a list of references to them amounts to.

Built-ins are registered by `builtin_registry()` through the same `register` that anyone else's capability goes through; importing
a capability's module registers nothing. Everything that can be wrong with a capability is found when it is registered.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import msgspec
from msgspec import Struct

from activities.capabilities import (
    agent_instructions,
    ask_user,
    bashkit_shell,
    budgeting,
    compaction,
    current_time,
    error_disclosure,
    guardrails,
    infinity_context,
    loop_detection,
    memory,
    message_metadata,
    noop,
    parallel_tool_calls,
    prompt_caching,
    prompt_canary_guardrail,
    python,
    session,
    session_file_system,
    session_schedule,
    session_sql_database,
    session_storage,
    session_tasks,
    skills,
    stateless_todo_list,
    subagents,
    test_faults,
    test_math,
    test_weather,
    tool_approval,
    tool_call_repair,
    web_fetch,
)
from activities.capabilities.tool_call import ToolOutcome, call_tool
from activities.capabilities.tool_schema import capability_info, tool_definition
from domain.capabilities import Capability, Tool
from domain.config import CapabilityRef
from domain.errors import InvalidInput, UnknownCapability, invalid_field
from domain.events import SkippedCapability
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
    budgeting,
    guardrails,
    loop_detection,
    tool_call_repair,
    parallel_tool_calls,
    message_metadata,
    infinity_context,
    session_file_system,
    session_storage,
    memory,
    session_schedule,
    session,
    tool_approval,
    subagents,
    session_tasks,
    skills,
    agent_instructions,
    test_math,
    test_weather,
    test_faults,
    noop,
)
"""Each holds its manifest in `CAPABILITY`; the order is that of `GET /v1/capabilities`."""

UNKNOWN: Final = "there is no such capability"
NOT_AVAILABLE: Final = "it is not available yet"

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
    session_prompt: str | None = None
    """What it says about this session; read before a model call, None elsewhere."""

    @property
    def prompt(self) -> str:
        """Its piece of the system prompt, which may be empty."""
        depending = self.capability.config_prompt and self.capability.config_prompt(self.config)
        texts = (self.capability.system_prompt, depending, self.session_prompt)
        return "\n\n".join(text.strip() for text in texts if text)


class ResolvedCapabilities(Struct, frozen=True, kw_only=True):
    tools: tuple[ResolvedTool, ...]
    capabilities: tuple[ResolvedCapability, ...]
    skipped: tuple[SkippedCapability, ...] = ()
    """References that came to nothing: unknown, not available yet, or with a stored config that is no longer valid."""

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(one.ref for one in self.skipped)

    @property
    def prompt(self) -> str:
        return "\n\n".join(prompt for one in self.capabilities if (prompt := one.prompt))

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
        self._tools[capability.id] = _resolved_tools(capability)
        self._capabilities[capability.id] = capability
        self._aliases.update(dict.fromkeys(capability.aliases, capability.id))

    def get(self, capability_id: str) -> Capability | None:
        """By its id or one of its aliases."""
        return self._capabilities.get(self._id_of(capability_id))

    def _id_of(self, ref: str) -> str:
        return self._aliases.get(ref, ref)

    def list(self) -> tuple[Capability, ...]:
        return tuple(self._capabilities.values())

    def check_refs(
        self, refs: Sequence[CapabilityRef], field: str = "capabilities", others: Sequence[Capability] = ()
    ) -> None:
        """Refuse, on a write, what `resolve` would only be able to skip."""
        own = {capability.id: capability for capability in others}
        for index, ref in enumerate(refs):
            capability = own.get(ref.ref) or self.get(ref.ref)
            if capability is None:
                raise UnknownCapability(f"Unknown capability `{ref.ref}`", field=f"{field}[{index}].ref")
            if capability.status == "coming_soon":
                raise InvalidInput(f"Capability `{ref.ref}` is not available yet", field=f"{field}[{index}].ref")
            _decode_config(capability, ref.config, f"{field}[{index}].config")

    def resolve(self, refs: Sequence[CapabilityRef], others: Sequence[Capability] = ()) -> ResolvedCapabilities:
        """Dependencies come before what needs them, otherwise the order of `refs` is kept; it is the order of the prompt.

        `others` are capabilities of this session that are not registered. Those that no reference names come last.
        """
        own = {capability.id: capability for capability in others}
        configs = {self._id_of(ref.ref): ref.config for ref in refs}
        resolved: dict[str, ResolvedCapability] = {}
        missing: dict[str, str] = {}
        entered: set[str] = set()  # also what ends a circle of dependencies

        def add(ref: str) -> None:
            capability_id = self._id_of(ref)
            if capability_id in entered:
                return
            entered.add(capability_id)
            capability = own.get(capability_id) or self.get(capability_id)
            if capability is None or capability.status == "coming_soon":
                missing[capability_id] = UNKNOWN if capability is None else NOT_AVAILABLE
                return
            for dependency in capability.dependencies:
                add(dependency)
            try:
                config = _decode_config(capability, configs.get(capability_id), "config")
            except InvalidInput as error:
                missing[capability_id] = f"its configuration is not valid: {error.message}"
                return
            resolved[capability_id] = ResolvedCapability(capability=capability, config=config)

        for ref in (*(ref.ref for ref in refs), *own):
            add(ref)

        tools: dict[str, ResolvedTool] = {}
        for capability_id, one in resolved.items():
            registered = None if capability_id in own else self._tools.get(capability_id)
            for tool in _resolved_tools(one.capability) if registered is None else registered:
                tools.setdefault(tool.tool.name, tool)
        return ResolvedCapabilities(
            tools=tuple(tools.values()),
            capabilities=tuple(resolved.values()),
            skipped=tuple(SkippedCapability(ref=ref, reason=reason) for ref, reason in missing.items()),
        )


def builtin_registry(private_hosts: Sequence[str] = (), *, canary_key: bytes | None = None) -> CapabilityRegistry:
    """A new registry with every built-in capability. `private_hosts` are those that `web_fetch` may reach nevertheless;
    `canary_key` is needed where models are called, the same on all workers.
    """
    registry = CapabilityRegistry()
    for module in BUILTIN_MODULES:
        registry.register(module.CAPABILITY)
    registry.register(prompt_canary_guardrail.capability(canary_key or secrets.token_bytes(32)))
    registry.register(bashkit_shell.capability())
    registry.register(session_sql_database.capability())
    registry.register(python.capability())
    registry.register(web_fetch.capability(private_hosts))
    return registry


def _resolved_tools(capability: Capability) -> tuple[ResolvedTool, ...]:
    return tuple(
        ResolvedTool(tool=tool, capability=capability, definition=tool_definition(tool, capability))
        for tool in capability.tools
    )


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
