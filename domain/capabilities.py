"""What a capability is: a manifest and the tools it contributes.

A capability is one module in `activities/capabilities` that defines a `Capability`, registered the same public way for
built-ins and for anyone else's. Its tools are typed async functions: the JSON Schema a model sees comes from the argument
Struct, and arguments are checked against it before the function runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from msgspec import Struct

from domain.config import NetworkAccessList
from domain.session_info import SessionInfo
from domain.session_storage import SessionStorage
from domain.tools import SideEffect, ToolDefinition
from domain.workspace import FileEntry, WorkspaceFiles


class ToolError(Exception):
    """An expected failure of a tool: its text goes to the model. Any other exception becomes a generic text."""


class ToolContext(Protocol):
    """What a running tool may use of its surroundings."""

    @property
    def session_id(self) -> str: ...

    @property
    def turn_id(self) -> str: ...

    @property
    def tool_call_id(self) -> str: ...

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this call: pass it on to whatever has effects outside."""
        ...

    @property
    def attempt(self) -> int: ...

    @property
    def config(self) -> Struct | None:
        """The configuration of the tool's capability, decoded into its `config` Struct; None when it takes none."""
        ...

    @property
    def network_access(self) -> NetworkAccessList:
        """Which hosts the turn's configuration lets tools reach."""
        ...

    @property
    def files(self) -> WorkspaceFiles:
        """The session's workspace."""
        ...

    @property
    def storage(self) -> SessionStorage:
        """The session's own values and secrets."""
        ...

    @property
    def timezone(self) -> str | None:
        """The user's time zone (IANA name) when the message that started the turn names one."""
        ...

    async def progress(self, message: str) -> None:
        """Tell clients how far the tool is (`tool.progress`)."""
        ...

    async def output(self, text: str, stream: str = "stdout") -> None:
        """Stream output to clients (`tool.output.delta`)."""
        ...

    async def session_info(self) -> SessionInfo:
        """What this session is and has used so far."""
        ...

    async def set_title(self, title: str) -> None:
        """Rename the session (`session.title.updated`, unless that is its title already)."""
        ...

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        """Tell clients that a file of the workspace was written (`file.written`)."""
        ...


class Tool(Struct, frozen=True, kw_only=True):
    """A tool we define. `arguments` is the Struct its calls are decoded into; the function's result must be JSON-able."""

    name: str
    description: str
    arguments: type[Struct]
    run: Callable[..., Awaitable[object]]
    display_name: str | None = None
    side_effect: SideEffect = SideEffect.AT_MOST_ONCE
    concurrency_class: str | None = None
    timeout_seconds: float = 300.0
    readonly: bool | None = None
    answered_by: Literal["worker", "user"] = "worker"
    """Who gives a call its result: a worker that awaits `run`, or a person, over the API. Then no worker does anything: arguments
    are checked when the call is planned, the turn waits for it as for a client-side call, and `run` is never awaited."""


class Capability(Struct, frozen=True, kw_only=True):
    """A capability's manifest."""

    id: str
    name: str
    description: str
    aliases: tuple[str, ...] = ()
    """Other ids that references may use."""
    category: str | None = None
    icon: str | None = None
    status: Literal["available", "coming_soon", "deprecated"] = "available"
    risk_level: Literal["low", "medium", "high"] = "low"
    dependencies: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    system_prompt: str | None = None
    config: type[Struct] | None = None
    """Struct that `config` of a reference is decoded into; its JSON Schema is published as `config_schema`."""
    config_prompt: Callable[[Struct | None], str | None] | None = None
    """Prompt text that depends on the decoded configuration; it comes after `system_prompt`."""
    tools: tuple[Tool, ...] = ()


class CapabilityInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A capability as `GET /v1/capabilities` shows it."""

    id: str
    name: str
    description: str
    status: str
    icon: str | None = None
    category: str | None = None
    system_prompt: str | None = None
    tool_definitions: list[ToolDefinition] = []
    dependencies: list[str] = []
    features: list[str] = []
    risk_level: str | None = None
    is_mcp: bool = False
    is_skill: bool = False
    is_guardrail: bool | None = None
    config_schema: dict[str, object] | None = None
    config_ui_schema: dict[str, object] | None = None
    docs_slug: str | None = None
    agent_count: int | None = None
    harness_count: int | None = None
    localizations: dict[str, object] | None = None
