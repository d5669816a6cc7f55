"""The reason step: one call of a model, streamed into the log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from temporalio import activity

from activities.capabilities.registry import CapabilityRegistry, ResolvedCapabilities
from activities.delta_writer import DeltaWriter
from activities.step import reason_step
from domain.clock import now_timestamp
from domain.messages import Message, Role, TextPart
from domain.model import (
    Finished,
    ModelDriver,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.tools import ClientSideTool, SideEffect, ToolCall, ToolDefinition
from domain.turns import PlannedCall, ReasonBriefing, ReasonInput, ReasonOutcome, TurnState
from workflows import contract

STALL_SECONDS: Final = 120.0
"""Longest silence of a model in the middle of a call; reasoning models may think for a minute without a byte."""

UNKNOWN_TOOL_TIMEOUT_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class ReasonActivity:
    def __init__(
        self,
        state: TurnState,
        capabilities: CapabilityRegistry,
        driver_for: Callable[[str], ModelDriver],
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._state = state
        self._capabilities = capabilities
        self._driver_for = driver_for
        self._stall_seconds = stall_seconds

    @activity.defn(name=contract.REASON)
    async def reason(self, input: ReasonInput) -> ReasonOutcome:
        """Call the model and stream what it says. The mirror opens and closes the step; its result is a `ReasonResult`."""
        step = reason_step()
        briefing = step.briefing
        if briefing.model is None:
            raise ModelError(ModelErrorKind.NOT_CONFIGURED, "no enabled model is chosen and there is no default")
        resolved = self._capabilities.resolve(briefing.config.capabilities)
        if resolved.missing:
            log.warning("capabilities skipped", missing=list(resolved.missing))
        tools = offered_tools(briefing, resolved)
        request = ModelRequest(
            model=briefing.model.name,
            messages=prompt(briefing, resolved),
            tools=tools,
            session_id=step.ref.session_id,
            idempotency_key=step.ref.exec_id,
            attempt=step.ref.attempt,
            reasoning_effort=briefing.reasoning_effort,
            parallel_tool_calls=briefing.config.parallel_tool_calls,
            options=briefing.model.options,
        )
        driver = self._driver_for(briefing.model.provider_type)
        calls: list[ToolCall] = []
        finished: Finished | None = None
        first_token_ms: int | None = None
        started = time.monotonic()
        async with DeltaWriter(self._state, step.ref, briefing.message_id, briefing.model.name) as writer:
            try:
                async with (
                    asyncio.timeout(self._stall_seconds) as stall,
                    contextlib.aclosing(driver.stream(request)) as stream,  # type: ignore[type-var]  # a generator
                ):
                    async for event in stream:
                        now = time.monotonic()
                        stall.reschedule(asyncio.get_running_loop().time() + self._stall_seconds)
                        if first_token_ms is None:
                            first_token_ms = round((now - started) * 1000)
                        match event:
                            case TextDelta():
                                writer.add_text(event.text)
                            case ThinkingDelta():
                                writer.add_thinking(event.text)
                            case ToolCallReady():
                                calls.append(event.call)
                            case Finished():
                                finished = event
            except TimeoutError as error:
                raise ModelError(ModelErrorKind.TIMEOUT, f"no byte for {self._stall_seconds:.0f} s") from error
            if finished is None:
                raise ModelError(ModelErrorKind.STREAM_CUT, "the stream ended without its terminal event")
        return ReasonOutcome(
            model=briefing.model,
            prompt=request.messages,
            offered_tools=tools,
            text=writer.text,
            thinking=writer.thinking,
            calls=[planned(call, resolved, briefing) for call in calls],
            usage=finished.usage,
            finish_reason=finished.reason,
            duration_ms=round((time.monotonic() - started) * 1000),
            time_to_first_token_ms=first_token_ms,
            response_id=finished.response_id,
        )


def prompt(briefing: ReasonBriefing, resolved: ResolvedCapabilities) -> list[Message]:
    """System message (configured prompt, then capabilities in their order) and history."""
    text = "\n\n".join(part for part in (briefing.config.system_prompt, resolved.prompt) if part)
    if not text:
        return briefing.history
    system = Message(id="", role=Role.SYSTEM, content=[TextPart(text=text)], created_at=now_timestamp())
    return [system, *briefing.history]


def offered_tools(briefing: ReasonBriefing, resolved: ResolvedCapabilities) -> list[ToolDefinition]:
    """Server-side tools first and in a stable order, which keeps provider caches warm; a name is offered once."""
    offered: dict[str, ToolDefinition] = {tool.tool.name: tool.definition for tool in resolved.tools}
    for tool in briefing.config.tools:
        if isinstance(tool, ClientSideTool):
            offered.setdefault(tool.name, tool)
    return list(offered.values())


def planned(call: ToolCall, resolved: ResolvedCapabilities, briefing: ReasonBriefing) -> PlannedCall:
    """What the ledger must know about a call. A call of a tool nobody offered is run too: its result says so."""
    tool = resolved.tool(call.name)
    if tool is not None:
        return PlannedCall(
            call=call,
            kind="server",
            side_effect=tool.tool.side_effect,
            timeout_seconds=tool.tool.timeout_seconds,
            concurrency_class=tool.tool.concurrency_class,
            display_name=tool.tool.display_name,
        )
    client = _client_tool(briefing.config.tools, call.name)
    return PlannedCall(
        call=call,
        kind="server" if client is None else "client",
        side_effect=SideEffect.PURE if client is None else SideEffect.AT_MOST_ONCE,
        timeout_seconds=UNKNOWN_TOOL_TIMEOUT_SECONDS,
        display_name=client and client.display_name,
    )


def _client_tool(tools: Sequence[ToolDefinition], name: str) -> ClientSideTool | None:
    return next((tool for tool in tools if isinstance(tool, ClientSideTool) and tool.name == name), None)
