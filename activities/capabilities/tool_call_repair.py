"""Tool calls whose arguments are not JSON: repaired where they can be meant in one way only, otherwise asked for again.

What comes out must fit the tool's schema. A call whose text was cut off is repaired for a tool that only computes something:
anything else could do half of what was meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from activities.capabilities.json_schema import harmless, schema_problem
from activities.capabilities.lenient_json import salvaged
from activities.capabilities.tool_call import arguments_problem
from domain.capabilities import Capability, Tool
from domain.messages import Message, Role, ToolResultPart
from domain.model import ToolCallReady
from domain.tools import ClientSideTool, SideEffect
from domain.turns import RepairOutcome

UNREADABLE: Final = "The arguments are not"
"""How the error begins that the model reads about arguments that could not be read."""

GAVE_UP: Final = (
    "The arguments are not valid JSON, and were not {times} times before in this turn. Do not call this tool again now; "
    "go on without it, or tell the user."
)


class ToolCallRepair(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_reprompts: Annotated[
        int,
        Meta(
            ge=0, le=100, description="After so many calls of a turn that could not be repaired, no more are asked for."
        ),
    ] = 3


def repaired(
    event: ToolCallReady,
    tool: Tool | ClientSideTool | None,
    config: ToolCallRepair,
    history: Sequence[Message],
    earlier_problems: int,
) -> tuple[ToolCallReady, RepairOutcome | None]:
    """The call as it should be taken. `earlier_problems` counts unreadable calls of the same answer."""
    if event.problem is None or event.raw is None:
        return event, None
    arguments = _arguments(event.raw, tool)
    if arguments is not None:
        return ToolCallReady(msgspec.structs.replace(event.call, arguments=arguments)), "local-salvage"
    times = earlier_problems + _problems_in_turn(history)
    if times < config.max_reprompts:
        return event, "re-prompt"
    return msgspec.structs.replace(event, problem=GAVE_UP.format(times=times)), "gave-up"


def _arguments(raw: str, tool: Tool | ClientSideTool | None) -> dict[str, object] | None:
    found = salvaged(raw)
    if found is None or tool is None:
        return None
    if isinstance(tool, ClientSideTool):
        # What a client's tool does is not known.
        sound = not found.cut_off and schema_problem(harmless(tool.parameters), found.value) is None
    else:
        sound = not (found.cut_off and tool.side_effect is not SideEffect.PURE)
        sound = sound and arguments_problem(tool, found.value) is None
    return found.value if sound else None


def _problems_in_turn(history: Sequence[Message]) -> int:
    count = 0
    for message in reversed(history):
        if message.role is Role.USER:
            break
        count += sum(
            isinstance(part, ToolResultPart) and (part.error or "").startswith(UNREADABLE) for part in message.content
        )
    return count


CAPABILITY = Capability(
    id="tool_call_repair",
    name="Tool Call Repair",
    description="Repairs tool calls whose arguments are malformed JSON, where there is one way only to read them.",
    category="Behaviour",
    icon="wrench",
    config=ToolCallRepair,
)
