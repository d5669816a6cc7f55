"""What a model is told and offered: the configuration, the capabilities and the conversation put together.

Everything here is a pure function of a turn's configuration, so that the context report can show what the next call will see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from activities.capabilities import (
    compaction,
    infinity_context,
    parallel_tool_calls,
    prompt_caching,
    tool_call_repair,
)
from activities.capabilities.registry import ResolvedCapabilities
from activities.capabilities.tool_call import arguments_problem
from domain.capabilities import CallCheck, NeedsApproval, Noted, OutputGuard, Refused, SessionView
from domain.clock import now_timestamp
from domain.config import TurnConfig
from domain.messages import Message, Role, TextPart
from domain.model import ToolCallReady
from domain.tools import ClientSideTool, SideEffect, ToolCall, ToolDefinition
from domain.turns import PlannedCall, RepairOutcome

UNKNOWN_TOOL_TIMEOUT_SECONDS: Final = 10.0
UNRECORDED: Final = "[not recorded]"


def system_prompt(config: TurnConfig, resolved: ResolvedCapabilities) -> str:
    """The configured prompt, then the capabilities' in their order."""
    return "\n\n".join(part for part in (config.system_prompt, resolved.prompt) if part)


def prompt(config: TurnConfig, resolved: ResolvedCapabilities, history: list[Message]) -> list[Message]:
    """System message and history."""
    text = system_prompt(config, resolved)
    if not text:
        return history
    system = Message(id="", role=Role.SYSTEM, content=[TextPart(text=text)], created_at=now_timestamp())
    return [system, *history]


def arranged(messages: list[Message], resolved: ResolvedCapabilities) -> list[Message]:
    """A prompt's messages as its capabilities want the model to see them; the system message stays in front."""
    system = messages[:1] if messages and messages[0].role is Role.SYSTEM else []
    rest = messages[len(system) :]
    for one in resolved.capabilities:
        if one.capability.id == infinity_context.ID and _has(resolved, compaction.CAPABILITY.id):
            continue
        if one.capability.arrange_messages is not None:
            rest = one.capability.arrange_messages(rest, one.config)
    return [*system, *rest]


def repaired(
    event: ToolCallReady,
    resolved: ResolvedCapabilities,
    config: TurnConfig,
    earlier: Sequence[PlannedCall],
    history: Sequence[Message],
) -> tuple[ToolCallReady, RepairOutcome | None]:
    """The call as `tool_call_repair` would have it; as it came without that capability."""
    repair = resolved.config_of(tool_call_repair.CAPABILITY.id)
    if not isinstance(repair, tool_call_repair.ToolCallRepair):
        return event, None
    found = resolved.tool(event.call.name)
    tool = found.tool if found is not None else _client_tool(config.tools, event.call.name)
    problems = sum(one.repair in ("re-prompt", "gave-up") for one in earlier)
    return tool_call_repair.repaired(event, tool, repair, history, problems)


def recorded(messages: list[Message], resolved: ResolvedCapabilities) -> list[Message]:
    """A prompt as the log keeps it: without the pieces that only the model may know."""
    secrets = [one.session_prompt for one in resolved.capabilities if one.capability.prompt_is_secret]
    if not messages or messages[0].role is not Role.SYSTEM or not any(secrets):
        return messages
    text = messages[0].text
    for secret in secrets:
        if secret:
            text = text.replace(secret.strip(), UNRECORDED)
    return [msgspec.structs.replace(messages[0], content=[TextPart(text=text)]), *messages[1:]]


def output_guards(resolved: ResolvedCapabilities, view: SessionView) -> Callable[[], list[OutputGuard]] | None:
    """What makes the guards of a text; None when nobody watches."""

    def make() -> list[OutputGuard]:
        made = [
            one.capability.guard_output and one.capability.guard_output(one.config, view)
            for one in resolved.capabilities
        ]
        return [guard for guard in made if guard is not None]

    return make if make() else None


def checked(
    item: PlannedCall,
    resolved: ResolvedCapabilities,
    earlier: Sequence[ToolCall],
    history: Sequence[Message],
    session_id: str,
) -> PlannedCall:
    """The call after all capabilities have looked at it: as it was, refused, or in need of somebody's leave."""
    tool = resolved.tool(item.call.name)
    check = CallCheck(
        call=item.call,
        tool=tool and tool.tool,
        capability_id=tool and tool.capability.id,
        earlier=earlier,
        history=history,
        session_id=session_id,
    )
    for one in resolved.capabilities:
        verdict = one.capability.check_call and one.capability.check_call(check, one.config)
        match verdict:
            case Refused():
                item = _refused(item, verdict)
            case Noted(hits=hits):
                item = msgspec.structs.replace(item, hits=(*item.hits, *hits))
            case NeedsApproval() if item.kind == "server" and tool is not None and item.problem is None:
                # Nobody is asked about a call that could not run anyway.
                if wrong := arguments_problem(tool.tool, item.call.arguments):
                    item = msgspec.structs.replace(item, side_effect=SideEffect.PURE, problem=wrong)
                else:
                    item = msgspec.structs.replace(item, approval=verdict)
            case _:
                pass
    return item


def _refused(item: PlannedCall, verdict: Refused) -> PlannedCall:
    """Answered by the ledger, even if it is a client's call: nobody is to run it."""
    call = item.call if verdict.keeps_arguments else msgspec.structs.replace(item.call, arguments={})
    return msgspec.structs.replace(
        item,
        call=call,
        kind="server",
        side_effect=SideEffect.PURE,
        problem=item.problem or verdict.text,
        approval=None,
        hits=(*item.hits, *verdict.hits),
    )


def offered_tools(config: TurnConfig, resolved: ResolvedCapabilities) -> list[ToolDefinition]:
    """Server-side tools first and in a stable order, which keeps provider caches warm; a name is offered once."""
    offered: dict[str, ToolDefinition] = {tool.tool.name: tool.definition for tool in resolved.tools}
    for tool in config.tools:
        if isinstance(tool, ClientSideTool):
            offered.setdefault(tool.name, tool)
    return list(offered.values())


def prompt_cache_wanted(resolved: ResolvedCapabilities) -> bool:
    configs = [one.config for one in resolved.capabilities if one.capability.id == prompt_caching.CAPABILITY.id]
    return all(config.enabled for config in configs if isinstance(config, prompt_caching.PromptCaching))


def compaction_config(resolved: ResolvedCapabilities) -> compaction.Compaction:
    """The capability's, or the defaults when nobody configures it."""
    configs = [one.config for one in resolved.capabilities if one.capability.id == compaction.CAPABILITY.id]
    # A window of recent messages makes room by itself; what is refused all the same is compacted.
    default = compaction.Compaction(proactive=not _has(resolved, infinity_context.ID))
    return next((config for config in configs if isinstance(config, compaction.Compaction)), default)


def parallel_calls_wanted(config: TurnConfig, resolved: ResolvedCapabilities) -> bool | None:
    """What the provider is told; None leaves it to the provider, which usually allows them."""
    wish = resolved.config_of(parallel_tool_calls.CAPABILITY.id)
    avoided = isinstance(wish, parallel_tool_calls.ParallelToolCalls) and wish.mode == "avoid"
    return False if avoided and config.parallel_tool_calls is None else config.parallel_tool_calls


def _has(resolved: ResolvedCapabilities, capability_id: str) -> bool:
    return any(one.capability.id == capability_id for one in resolved.capabilities)


def planned(
    call: ToolCall, resolved: ResolvedCapabilities, config: TurnConfig, *, problem: str | None = None
) -> PlannedCall:
    """What the ledger must know about a call. A call of a tool nobody offered is run too: its result says so.

    So is a call whose arguments could not be read, even of a client's tool: nobody could run it. A tool that the user answers is
    the client's to the ledger, once its arguments are known to be right: nobody is asked nonsense.
    """
    tool = resolved.tool(call.name)
    by_user = tool is not None and tool.tool.answered_by == "user"
    if tool is not None and by_user and problem is None:
        problem = arguments_problem(tool.tool, call.arguments)
    if tool is not None:
        return PlannedCall(
            call=call,
            kind="client" if by_user and problem is None else "server",
            side_effect=tool.tool.side_effect if problem is None else SideEffect.PURE,
            timeout_seconds=tool.tool.timeout_seconds,
            concurrency_class=tool.tool.concurrency_class,
            display_name=tool.tool.display_name,
            problem=problem,
        )
    client = _client_tool(config.tools, call.name) if problem is None else None
    return PlannedCall(
        call=call,
        kind="server" if client is None else "client",
        side_effect=SideEffect.PURE if client is None else SideEffect.AT_MOST_ONCE,
        timeout_seconds=UNKNOWN_TOOL_TIMEOUT_SECONDS,
        display_name=client and client.display_name,
        problem=problem,
    )


def _client_tool(tools: Sequence[ToolDefinition], name: str) -> ClientSideTool | None:
    return next((tool for tool in tools if isinstance(tool, ClientSideTool) and tool.name == name), None)
