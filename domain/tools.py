"""Tools as the model, the ledger and a client see them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct


class SideEffect(StrEnum):
    """What running a tool twice would do; decides what happens to a call whose worker died.

    `pure` and `idempotent` calls run again. An `at_most_once` call does not: its outcome is unknown and the model is told so.
    """

    PURE = "pure"
    IDEMPOTENT = "idempotent"
    AT_MOST_ONCE = "at_most_once"


class ToolHints(Struct, frozen=True, kw_only=True, omit_defaults=True):
    readonly: bool | None = None
    destructive: bool | None = None
    idempotent: bool | None = None
    open_world: bool | None = None
    long_running: bool | None = None
    cpu_bound: bool | None = None
    requires_secrets: bool | None = None
    supports_background: bool | None = None
    persist_output: bool | None = None
    concurrency_class: str | None = None
    """Calls that share a class run one after another; others run side by side."""
    side_effect_class: Literal["Pure", "Idempotent", "AtMostOnce"] | None = None
    capability_id: str | None = None
    capability_name: str | None = None
    narration_noun: str | None = None


class _ToolFields(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    description: str
    parameters: dict[str, object]
    """JSON Schema of the arguments object."""
    display_name: str | None = None
    category: str | None = None
    deferrable: Literal["never", "automatic", "always"] | None = None
    full_parameters: dict[str, object] | None = None
    hints: ToolHints | None = None


class BuiltinTool(_ToolFields, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="builtin"):
    """Runs on our workers."""

    policy: Literal["auto", "requires_approval", "client_side"] | None = None


class ClientSideTool(_ToolFields, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="client_side"):
    """Runs in the client: the turn waits until the client posts the result."""


ToolDefinition = BuiltinTool | ClientSideTool


class ToolCall(Struct, frozen=True, kw_only=True):
    """A call the model asked for. `arguments` is the decoded JSON object."""

    id: str
    name: str
    arguments: dict[str, object]


class ToolCallSummary(Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    name: str
    display_name: str | None = None
    narration: str | None = None


class ClientToolResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tool_call_id: str
    result: object = None
    error: str | None = None
