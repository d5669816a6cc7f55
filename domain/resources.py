"""Harnesses, agents, sessions, workspaces, models, providers and organizations, as read and as written.

The resource Structs are what is served: ids are public, timestamps are RFC 3339. A `…Changes` Struct is what a write brings, with
`UNSET` for what it leaves alone (on a create: for what gets its default); None clears a value that can be empty.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from domain.config import CapabilityRef, InitialFile, NetworkAccessList
from domain.errors import InvalidInput
from domain.events import TokenUsage
from domain.ids import Prefix
from domain.limits import (
    DESCRIPTION_MAX_BYTES,
    PROMPT_MAX_BYTES,
    SHORT_TEXT_MAX_BYTES,
    check_capability_refs,
    check_fallback_models,
    check_id,
    check_identity,
    check_initial_files,
    check_locale,
    check_name,
    check_network_access,
    check_tags,
    check_text,
    check_tools,
)
from domain.model_profiles import ModelProfile
from domain.provider_input import check_base_url, check_provider_type
from domain.secret import Secret
from domain.tools import ClientSideTool, ToolDefinition


class Lifecycle(StrEnum):
    """`active` → `archived` → `deleted`; only the last step cannot be undone."""

    ACTIVE = "active"
    ARCHIVED = "archived"
    DELETED = "deleted"


class SessionStatus(StrEnum):
    """As served. Clients accept exactly these spellings; the database says `waiting_for_tool_results`."""

    STARTED = "started"
    ACTIVE = "active"
    IDLE = "idle"
    WAITING_FOR_TOOL_RESULTS = "waitingfortoolresults"


class Harness(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base behaviour of sessions: prompt, capabilities and limits that agents and sessions build on."""

    id: str
    name: str
    status: Lifecycle
    is_built_in: bool
    capabilities: list[CapabilityRef]
    initial_files: list[InitialFile]
    tags: list[str]
    created_at: str
    updated_at: str
    display_name: str | None = None
    description: str | None = None
    system_prompt: str | None = None
    parent_harness_id: str | None = None
    default_model_id: str | None = None
    fallback_model_ids: list[str] = []
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    parallel_tool_calls: bool | None = None
    embedder_metadata: dict[str, str] | None = None
    archived_at: str | None = None


class Agent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A configured assistant on top of a harness."""

    id: str
    name: str
    system_prompt: str
    harness_id: str
    status: Lifecycle
    capabilities: list[CapabilityRef]
    tools: list[ToolDefinition]
    initial_files: list[InitialFile]
    tags: list[str]
    created_at: str
    updated_at: str
    display_name: str | None = None
    description: str | None = None
    default_model_id: str | None = None
    fallback_model_ids: list[str] = []
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    max_iterations: int | None = None
    parallel_tool_calls: bool | None = None
    archived_at: str | None = None


class Session(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One conversation. `usage` adds up every turn; `preview` begins with the first message, `output_preview` with the last."""

    id: str
    organization_id: str
    workspace_id: str
    harness_id: str
    owner_principal_id: str
    status: SessionStatus
    capabilities: list[CapabilityRef]
    tools: list[ToolDefinition]
    initial_files: list[InitialFile]
    tags: list[str]
    is_pinned: bool
    usage: TokenUsage
    created_at: str
    updated_at: str
    agent_id: str | None = None
    agent_identity_id: str | None = None
    parent_session_id: str | None = None
    forked_from_session_id: str | None = None
    forked_from_sequence: int | None = None
    title: str | None = None
    preview: str | None = None
    output_preview: str | None = None
    locale: str | None = None
    system_prompt: str | None = None
    model_id: str | None = None
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    hints: dict[str, object] | None = None
    max_iterations: int | None = None
    parallel_tool_calls: bool | None = None
    active_schedule_count: int | None = None
    started_at: str | None = None
    finished_at: str | None = None


class Workspace(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The files that one or several sessions work on. Every session has one; its own has the session's UUID."""

    id: str
    name: str
    status: Lifecycle
    created_at: str
    updated_at: str
    description: str | None = None
    archived_at: str | None = None
    deleted_at: str | None = None


class TraceConfig(Struct, frozen=True, kw_only=True):
    """Links from a conversation to the provider's own dashboard. Templates hold `{response_id}` and the like."""

    enabled: bool
    session_url_template: str | UnsetType = UNSET
    generation_url_template: str | UnsetType = UNSET


ProviderStatus = Literal["active", "disabled"]


class Provider(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where models run. Keys are write-only; `api_key_set` tells whether there is one."""

    id: str
    name: str
    provider_type: str
    api_key_set: bool
    status: ProviderStatus
    created_at: str
    updated_at: str
    base_url: str | None = None
    trace: TraceConfig | None = None
    last_synced_at: str | None = None


ModelSource = Literal["manual", "discovered", "predefined"]


class Model(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model of a provider; `model_id` is the provider's name for it."""

    id: str
    provider_id: str
    model_id: str
    display_name: str
    capabilities: list[str]
    enabled: bool
    is_favorite: bool
    source: ModelSource
    created_at: str
    updated_at: str
    options: dict[str, object] = {}


class ModelWithProvider(Model, frozen=True, kw_only=True, omit_defaults=True):
    """`healthy`: enabled, its provider active, with a driver and the key it needs, and its circuit breaker not open."""

    provider_name: str
    provider_type: str
    healthy: bool
    model_vendor: str | None = None
    profile: ModelProfile | None = None


class CircuitBreaker(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The breaker of one model. Open without `half_open_at`: an operator holds it open."""

    key: str
    state: Literal["closed", "open", "half_open"]
    failure_count: int
    success_count: int
    updated_at: str
    model: str
    provider: str
    opened_at: str | None = None
    half_open_at: str | None = None
    last_failure_at: str | None = None


class Organization(Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    name: str
    default_provider_per_service: dict[str, str]
    created_at: str
    updated_at: str
    default_model_id: str | None = None
    default_harness_id: str | None = None
    base_harness_id: str | None = None


class ResourceStats(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sessions, turns, tokens and US dollars of a harness or an agent. Token counts are disjoint; an unknown cost counts 0."""

    session_count: int
    started_session_count: int
    active_session_count: int
    idle_session_count: int
    waiting_for_tool_results_session_count: int
    execution_count: int
    total_input_tokens: int
    total_output_tokens: int
    total_cache_read_tokens: int
    total_cache_creation_tokens: int
    total_session_duration_ms: int
    total_cost_usd: float
    total_estimated_cost_usd: float
    total_actual_cost_usd: float
    avg_session_duration_ms: int | None = None
    first_session_at: str | None = None
    last_session_at: str | None = None
    last_execution_at: str | None = None


class SessionStats(Struct, frozen=True, kw_only=True):
    """How many sessions are in which status."""

    started: int
    active: int
    idle: int
    waiting_for_tool_results: int
    total: int


class LayerChanges(Struct, frozen=True, kw_only=True):
    """What harnesses, agents and sessions have in common."""

    system_prompt: str | UnsetType | None = UNSET
    capabilities: list[CapabilityRef] | UnsetType = UNSET
    initial_files: list[InitialFile] | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET
    mcp_servers: dict[str, object] | UnsetType | None = UNSET
    network_access: NetworkAccessList | UnsetType | None = UNSET
    parallel_tool_calls: bool | UnsetType | None = UNSET

    def check(self) -> None:
        """Raises `InputTooLarge`, `InvalidInput` or `MalformedId`, naming the field."""
        _text(self.system_prompt, "system_prompt", PROMPT_MAX_BYTES)
        if self.capabilities is not UNSET:
            check_capability_refs(self.capabilities)
        if self.initial_files is not UNSET:
            check_initial_files(self.initial_files)
        if self.tags is not UNSET:
            check_tags(self.tags)
        if isinstance(self.network_access, NetworkAccessList):
            check_network_access(self.network_access)


class NamedChanges(LayerChanges, frozen=True, kw_only=True):
    """What harnesses and agents have in common."""

    name: str | UnsetType = UNSET
    display_name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    default_model_id: str | UnsetType | None = UNSET
    fallback_model_ids: list[str] | UnsetType = UNSET
    status: Lifecycle | UnsetType = UNSET

    def check(self) -> None:
        super().check()
        if self.name is not UNSET:
            check_name(self.name)
        _text(self.display_name, "display_name", SHORT_TEXT_MAX_BYTES)
        _text(self.description, "description", DESCRIPTION_MAX_BYTES)
        _id(Prefix.MODEL, self.default_model_id, "default_model_id")
        if self.fallback_model_ids is not UNSET:
            check_fallback_models(self.fallback_model_ids)


class HarnessChanges(NamedChanges, frozen=True, kw_only=True):
    parent_harness_id: str | UnsetType | None = UNSET
    embedder_metadata: dict[str, str] | UnsetType | None = UNSET

    def check(self) -> None:
        super().check()
        _id(Prefix.HARNESS, self.parent_harness_id, "parent_harness_id")


class AgentChanges(NamedChanges, frozen=True, kw_only=True):
    """The harness is given by id or by name, not both."""

    harness_id: str | UnsetType = UNSET
    harness_name: str | UnsetType = UNSET
    tools: list[ClientSideTool] | UnsetType = UNSET
    max_iterations: int | UnsetType | None = UNSET

    def check(self) -> None:
        super().check()
        _id(Prefix.HARNESS, self.harness_id, "harness_id")
        if self.tools is not UNSET:
            check_tools(self.tools)


class NewSession(LayerChanges, frozen=True, kw_only=True):
    """Harness and agent are given by id or by name, not both; without a harness the agent's or the default one is used."""

    harness_id: str | None = None
    harness_name: str | None = None
    agent_id: str | None = None
    agent_name: str | None = None
    agent_identity_id: str | None = None
    workspace_id: str | None = None
    title: str | None = None
    locale: str | None = None
    model_id: str | None = None
    tools: list[ClientSideTool] = []
    hints: dict[str, object] | None = None
    max_iterations: int | None = None

    def check(self) -> None:
        super().check()
        check_session_texts(self.title, self.locale, self.agent_identity_id)
        check_tools(self.tools)
        _id(Prefix.HARNESS, self.harness_id, "harness_id")
        _id(Prefix.AGENT, self.agent_id, "agent_id")
        _id(Prefix.MODEL, self.model_id, "model_id")
        _id(Prefix.WORKSPACE, self.workspace_id, "workspace_id")


class SessionChanges(Struct, frozen=True, kw_only=True):
    title: str | UnsetType | None = UNSET
    locale: str | UnsetType | None = UNSET
    tags: list[str] | UnsetType = UNSET
    agent_identity_id: str | UnsetType | None = UNSET

    def check(self) -> None:
        check_session_texts(self.title, self.locale, self.agent_identity_id)
        if self.tags is not UNSET:
            check_tags(self.tags)


class WorkspaceChanges(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    status: Lifecycle | UnsetType = UNSET

    def check(self) -> None:
        """Raises `InputTooLarge` or `InvalidInput`, naming the field."""
        _text(self.name, "name", SHORT_TEXT_MAX_BYTES)
        if isinstance(self.name, str) and not self.name.strip():
            raise InvalidInput("name must not be blank", field="name")
        _text(self.description, "description", DESCRIPTION_MAX_BYTES)


class ProviderChanges(Struct, frozen=True, kw_only=True):
    """`credentials` replace what is stored as a whole, None forgets it. `trace` is laid over what is stored."""

    name: str | UnsetType = UNSET
    provider_type: str | UnsetType = UNSET
    base_url: str | UnsetType | None = UNSET
    credentials: dict[str, Secret] | UnsetType | None = UNSET
    trace: dict[str, object] | UnsetType | None = UNSET
    status: ProviderStatus | UnsetType = UNSET

    def check(self) -> None:
        """What can be checked without knowing what is stored."""
        if isinstance(self.name, str):
            check_text(self.name, "name", SHORT_TEXT_MAX_BYTES)
            if not self.name.strip():
                raise InvalidInput("name must not be blank", field="name")
        if isinstance(self.provider_type, str):
            check_provider_type(self.provider_type)
        if isinstance(self.base_url, str):
            check_base_url(self.base_url)


class ModelChanges(Struct, frozen=True, kw_only=True):
    """With `provider_id` the model moves to another provider."""

    provider_id: str | UnsetType = UNSET
    model_id: str | UnsetType = UNSET
    display_name: str | UnsetType = UNSET
    capabilities: list[str] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    is_favorite: bool | UnsetType = UNSET
    options: dict[str, object] | UnsetType = UNSET

    def check(self) -> None:
        _id(Prefix.PROVIDER, self.provider_id, "provider_id")
        _text(self.model_id, "model_id", SHORT_TEXT_MAX_BYTES)
        _text(self.display_name, "display_name", SHORT_TEXT_MAX_BYTES)


def check_session_texts(
    title: str | UnsetType | None, locale: str | UnsetType | None, identity: str | UnsetType | None
) -> None:
    _text(title, "title", SHORT_TEXT_MAX_BYTES)
    if isinstance(locale, str):
        check_locale(locale)
    if isinstance(identity, str):
        check_identity(identity)


def _text(text: str | UnsetType | None, field: str, max_bytes: int) -> None:
    if isinstance(text, str):
        check_text(text, field, max_bytes)


def _id(prefix: Prefix, text: str | UnsetType | None, field: str) -> None:
    if isinstance(text, str):
        check_id(prefix, text, field)
