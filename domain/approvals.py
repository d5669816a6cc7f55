"""Decisions of a person about tool calls that may not run without one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.tools import ToolCall

MAX_DECISIONS: Final = 100
MAX_REASON_CHARACTERS: Final = 2_000


class Decision(StrEnum):
    """The last two also hold for later calls of the same tool in this session."""

    ALLOW = "allow"
    REJECT = "reject"
    ALLOW_ALWAYS = "allow_always"
    REJECT_ALWAYS = "reject_always"

    @property
    def allows(self) -> bool:
        return self in (Decision.ALLOW, Decision.ALLOW_ALWAYS)

    @property
    def lasts(self) -> bool:
        return self in (Decision.ALLOW_ALWAYS, Decision.REJECT_ALWAYS)


class ApprovalDecision(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`reason` is for the model, which reads it in the result of a rejected call."""

    tool_call_id: Annotated[str, Meta(min_length=1, max_length=200)]
    decision: Decision
    reason: Annotated[str, Meta(max_length=MAX_REASON_CHARACTERS)] | None = None


class ResolvedApproval(Struct, frozen=True, kw_only=True):
    """`outcome` is `allowed` or `rejected`."""

    tool_call_id: str
    tool: str
    outcome: str


class PendingApproval(Struct, frozen=True, kw_only=True):
    """A call that waits for a decision; `reason` says why it may not run without one."""

    tool_call: ToolCall
    reason: str


class ApprovalRule(Struct, frozen=True, kw_only=True):
    """A decision that holds for the rest of the session. `created_at` is RFC 3339."""

    tool: str
    decision: Decision
    created_at: str
