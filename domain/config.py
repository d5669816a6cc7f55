"""Folding of the configuration layers into what one turn runs with.

Layers, first to last: harness chain (root first), agent, session, message controls. Later wins, except where a setting can
only grow or only narrow: prompts are concatenated base first, tools add up, allowed hosts intersect and blocked hosts unite.
The result is pinned when a turn begins; an edit takes effect at the next turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeVar

from msgspec import Struct

from domain.messages import Controls
from domain.network_patterns import intersect
from domain.tools import ToolDefinition

T = TypeVar("T")
D = TypeVar("D")

DEFAULT_MAX_ITERATIONS = 500
"""Model calls per turn; a guard against loops, far above any useful turn."""

Disclosure = Literal["generic", "standard", "detailed"]
"""How much of a failure is told: that there was one; its code and fields; also the provider's words."""

DISCLOSURES: Final[tuple[Disclosure, ...]] = ("generic", "standard", "detailed")
ERROR_DISCLOSURE: Final = "error_disclosure"
"""Id of the capability that sets the level."""


class CapabilityRef(Struct, frozen=True, kw_only=True, omit_defaults=True):
    ref: str
    config: dict[str, object] | None = None


class InitialFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    content: str
    encoding: str = "text"
    is_readonly: bool = False


class NetworkAccessList(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Host or URL patterns. No `allowed` means every host; an empty list after an intersection means none."""

    allowed: list[str] | None = None
    blocked: list[str] | None = None


class PinnedSkill(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A skill of the registry that a turn may activate. `id` is public (`skill_…`)."""

    id: str
    name: str
    description: str
    disable_model_invocation: bool = False


class DeclaredCapability(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A capability that is a row (`declarative:…`, `skill:…`), as it was when the turn began; `ref` is what names it.

    Its tools, MCP servers and files are in the configuration already. With `problem` it could not be used, and that is why.
    """

    ref: str
    name: str = ""
    description: str = ""
    system_prompt: str | None = None
    risk_level: Literal["low", "medium", "high"] = "low"
    dependencies: list[str] = []
    features: list[str] = []
    skill: PinnedSkill | None = None
    problem: str | None = None


class ConfigLayer(Struct, frozen=True, kw_only=True):
    """What a harness, an agent, a session or a message contributes."""

    system_prompt: str | None = None
    capabilities: list[CapabilityRef] = []
    tools: list[ToolDefinition] = []
    initial_files: list[InitialFile] = []
    mcp_servers: dict[str, object] | None = None
    network_access: NetworkAccessList | None = None
    model_id: str | None = None
    fallback_model_ids: list[str] = []
    max_iterations: int | None = None
    parallel_tool_calls: bool | None = None
    locale: str | None = None
    hints: dict[str, object] | None = None
    error_disclosure: Disclosure | None = None


class TurnConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The folded configuration. `model_id` is a public id (`model_…`) or None for the organization's default.

    `fallback_model_ids` are tried in order when the model before them is exhausted or its circuit breaker is open.
    """

    system_prompt: str = ""
    capabilities: list[CapabilityRef] = []
    tools: list[ToolDefinition] = []
    initial_files: list[InitialFile] = []
    mcp_servers: dict[str, object] = {}
    network_access: NetworkAccessList = NetworkAccessList()
    model_id: str | None = None
    fallback_model_ids: list[str] = []
    error_disclosure: Disclosure = "standard"
    max_iterations: int = DEFAULT_MAX_ITERATIONS
    parallel_tool_calls: bool | None = None
    locale: str | None = None
    hints: dict[str, object] = {}
    declared: list[DeclaredCapability] = []
    """What references to rows came to; pinned with the rest."""


def controls_layer(controls: Controls | None) -> ConfigLayer:
    if controls is None:
        return ConfigLayer()
    return ConfigLayer(
        model_id=controls.model_id,
        locale=controls.locale,
        hints=controls.hints,
        error_disclosure=controls.error_disclosure,
    )


def fold(layers: Sequence[ConfigLayer]) -> TurnConfig:
    """Fold layers, base first."""
    capabilities = _merge((ref.ref, ref) for layer in layers for ref in layer.capabilities)
    return TurnConfig(
        system_prompt="\n\n".join(layer.system_prompt for layer in layers if layer.system_prompt),
        capabilities=capabilities,
        tools=_first_wins((tool.name, tool) for layer in layers for tool in layer.tools),
        initial_files=_merge((file.path, file) for layer in layers for file in layer.initial_files),
        mcp_servers={key: server for layer in layers for key, server in (layer.mcp_servers or {}).items()},
        network_access=_fold_network([layer.network_access for layer in layers if layer.network_access]),
        model_id=_last([layer.model_id for layer in layers], None),
        fallback_model_ids=_last([layer.fallback_model_ids or None for layer in layers], []),
        error_disclosure=_disclosure(capabilities, [layer.error_disclosure for layer in layers]),
        max_iterations=_last([layer.max_iterations for layer in layers], DEFAULT_MAX_ITERATIONS),
        parallel_tool_calls=_last([layer.parallel_tool_calls for layer in layers], None),
        locale=_last([layer.locale for layer in layers], None),
        hints={key: hint for layer in layers for key, hint in (layer.hints or {}).items()},
    )


def _last(values: Sequence[T | None], default: D) -> T | D:
    return next((value for value in reversed(values) if value is not None), default)


def _merge(pairs: Iterable[tuple[str, T]]) -> list[T]:
    """A later value replaces an earlier one in its place, so that prompt fragments keep their order."""
    return list(dict(pairs).values())


def _first_wins(pairs: Iterable[tuple[str, T]]) -> list[T]:
    merged: dict[str, T] = {}
    for key, value in pairs:
        merged.setdefault(key, value)
    return list(merged.values())


def _disclosure(capabilities: Sequence[CapabilityRef], wishes: Sequence[Disclosure | None]) -> Disclosure:
    """The capability sets the level; wishes, which come with messages, may only narrow it."""
    config = next((ref.config for ref in capabilities if ref.ref == ERROR_DISCLOSURE), None) or {}
    level = next((one for one in DISCLOSURES if one == config.get("level")), "standard")
    return min([level, *(wish for wish in wishes if wish is not None)], key=DISCLOSURES.index)


def _fold_network(lists: Sequence[NetworkAccessList]) -> NetworkAccessList:
    allowed: list[str] | None = None
    blocked: dict[str, None] = {}
    for access in lists:
        if access.allowed:
            allowed = access.allowed if allowed is None else intersect(allowed, access.allowed)
        blocked.update(dict.fromkeys(access.blocked or []))
    return NetworkAccessList(allowed=allowed, blocked=list(blocked) or None)
