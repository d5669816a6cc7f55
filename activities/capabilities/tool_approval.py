"""Calls that may not run before a person has allowed them.

The check only decides which calls those are, when the model asks for them; the wait is the turn's, and costs nothing. A tool
that only reads needs no leave unless the configuration says so.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.capabilities import CallCheck, Capability, NeedsApproval
from domain.tools import SideEffect

HOUR_SECONDS: Final = 3_600.0

PROMPT: Final = """\
Some tools run only after the user has allowed the call. Ask for such a call when the task needs it; the question is put to the \
user for you. When a call is rejected, do not repeat it: find another way, or ask the user what they want."""

ToolPattern = Annotated[str, Meta(min_length=1, max_length=128)]


class ToolApproval(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names of tools, `*` and `?` allowed."""

    tools: Annotated[
        list[ToolPattern], Meta(max_length=100, description="Tools that need leave, also if they only read.")
    ] = []
    exempt: Annotated[list[ToolPattern], Meta(max_length=100, description="Tools that never need leave.")] = []
    effects: Annotated[
        bool, Meta(description="Whether tools with effects need leave although `tools` does not name them.")
    ] = True
    wait_hours: Annotated[
        float, Meta(gt=0, le=720, description="Nobody decides within this time: the call is not executed.")
    ] = 168.0


def check_call(check: CallCheck, config: Struct | None) -> NeedsApproval | None:
    assert isinstance(config, ToolApproval)
    tool = check.tool
    if tool is None or tool.answered_by == "user" or _named(tool.name, config.exempt):
        return None
    wait_seconds = config.wait_hours * HOUR_SECONDS
    if _named(tool.name, config.tools):
        return NeedsApproval(reason=f"`{tool.name}` needs your approval in this session.", wait_seconds=wait_seconds)
    reads_only = tool.side_effect is SideEffect.PURE if tool.readonly is None else tool.readonly
    if reads_only or not config.effects:
        return None
    return NeedsApproval(reason=f"`{tool.name}` can change something.", wait_seconds=wait_seconds)


def _named(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


CAPABILITY = Capability(
    id="tool_approval",
    name="Tool Approval",
    description="Tools with effects run only after a person has allowed the call; the turn waits, for days if it must.",
    category="Safety",
    icon="shield-check",
    system_prompt=PROMPT,
    config=ToolApproval,
    check_call=check_call,
)
