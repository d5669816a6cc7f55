"""What a model is told and offered: the configuration, the capabilities and the conversation put together.

Everything here is a pure function of a turn's configuration, so that the context report can show what the next call will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from activities.capabilities import compaction, prompt_caching
from activities.capabilities.registry import ResolvedCapabilities
from activities.capabilities.tool_call import arguments_problem
from domain.clock import now_timestamp
from domain.config import TurnConfig
from domain.messages import Message, Role, TextPart
from domain.tools import ClientSideTool, SideEffect, ToolCall, ToolDefinition
from domain.turns import PlannedCall

UNKNOWN_TOOL_TIMEOUT_SECONDS: Final = 10.0


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
    return next((config for config in configs if isinstance(config, compaction.Compaction)), compaction.Compaction())


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
