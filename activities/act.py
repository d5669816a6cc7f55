"""The act step: one tool call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from msgspec import Struct
from temporalio import activity

from activities.capabilities.long_results import within_limit
from activities.capabilities.registry import call_tool
from activities.capabilities.result_checks import checked_outcome, withholds_output
from activities.capabilities.turn_capabilities import TurnCapabilities
from activities.step import call_step
from domain.budgets import Budget
from domain.capabilities import Resumption, ToolWaits
from domain.config import NetworkAccessList
from domain.events import FileWritten, ToolOutputDelta, ToolProgress
from domain.memory_access import OpenMemory
from domain.schedules import SessionSchedules
from domain.session_databases import SessionDatabases
from domain.session_info import SessionInfo
from domain.session_past import SessionPast
from domain.session_storage import SessionStorage
from domain.tasks import SessionTasks
from domain.turns import ActInput, CallWait, SessionResources, StepRef, ToolSettlement, TurnState
from domain.workspace import FileEntry, WorkspaceFiles
from workflows import contract


class ActActivity:
    def __init__(self, state: TurnState, capabilities: TurnCapabilities, resources: SessionResources) -> None:
        self._state = state
        self._capabilities = capabilities
        self._resources = resources

    @activity.defn(name=contract.ACT)
    async def act(self, input: ActInput) -> ToolSettlement | CallWait:
        """Run one tool call. The mirror claims and settles it; its result is an `ActResult`."""
        step = call_step()
        claim = step.claim
        if claim.problem is not None:
            return ToolSettlement(status="error", error=claim.problem)
        resolved = await self._capabilities.resolve(step.ref.session_id, claim.config)
        tool = resolved.tool(claim.call.name)
        if tool is None:
            names = ", ".join(sorted(one.tool.name for one in resolved.tools)) or "none"
            error = f"Unknown tool `{claim.call.name}`. Available tools: {names}."
            return ToolSettlement(status="error", error=error)
        context = RunningCall(
            state=self._state,
            ref=step.ref,
            tool_name=claim.call.name,
            tool_call_id=claim.call.id,
            idempotency_key=input.idempotency_key,
            timezone=claim.timezone,
            config=resolved.config_of(tool.capability.id),
            network_access=claim.config.network_access,
            resources=self._resources,
            resumed=claim.resumed,
            withholds_output=withholds_output(resolved),
        )
        started = time.monotonic()
        try:
            outcome = await call_tool(tool.tool, context, claim.call.arguments)
        except ToolWaits as wait:
            return CallWait(kind=wait.kind, request=wait.request, state=wait.state)
        outcome = await within_limit(
            await asyncio.to_thread(checked_outcome, outcome, claim.call, resolved),
            claim.call.id,
            context,
            can_read_files=resolved.tool("read_file") is not None,
        )
        return ToolSettlement(
            status=outcome.status.value,
            result=outcome.result,
            error=outcome.error,
            duration_ms=round((time.monotonic() - started) * 1000),
            capability_id=tool.capability.id,
            capability_name=tool.capability.name,
            hits=outcome.hits,
        )


class RunningCall(Struct, frozen=True, kw_only=True):
    """The `ToolContext` of a call."""

    state: TurnState
    ref: StepRef
    tool_name: str
    tool_call_id: str
    idempotency_key: str
    timezone: str | None
    config: Struct | None
    network_access: NetworkAccessList
    resources: SessionResources
    resumed: Resumption | None = None
    withholds_output: bool = False
    """A guardrail may replace the result: what the tool streams is not shown."""

    @property
    def session_id(self) -> str:
        return self.ref.session_id

    @property
    def turn_id(self) -> str:
        return self.ref.turn_id

    @property
    def attempt(self) -> int:
        return self.ref.attempt

    @property
    def files(self) -> WorkspaceFiles:
        return self.resources.files(self.ref.session_id)

    @property
    def storage(self) -> SessionStorage:
        return self.resources.storage(self.ref.session_id)

    @property
    def databases(self) -> SessionDatabases:
        return self.resources.databases(self.ref.session_id)

    @property
    def schedules(self) -> SessionSchedules:
        return self.resources.schedules(self.ref.session_id)

    @property
    def tasks(self) -> SessionTasks:
        return self.resources.tasks(self.ref.session_id)

    @property
    def past(self) -> SessionPast:
        return self.resources.past(self.ref.session_id)

    async def memory(self, id_or_name: str) -> OpenMemory | None:
        return await self.resources.memory(self.ref.session_id, id_or_name)

    async def progress(self, message: str) -> None:
        payload = ToolProgress(tool_call_id=self.tool_call_id, tool_name=self.tool_name, message=message)
        await self.state.append_tool_event(self.ref, self.tool_call_id, payload)

    async def output(self, text: str, stream: str = "stdout") -> None:
        if self.withholds_output:
            return
        payload = ToolOutputDelta(tool_call_id=self.tool_call_id, tool_name=self.tool_name, delta=text, stream=stream)
        await self.state.append_tool_event(self.ref, self.tool_call_id, payload)

    async def session_info(self) -> SessionInfo:
        return await self.resources.session_info(self.ref.session_id)

    async def set_title(self, title: str) -> None:
        await self.resources.set_title(self.ref.session_id, title)

    async def budgets(self) -> Sequence[Budget]:
        return await self.resources.budgets(self.ref.session_id)

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        operation = "create" if created else "update"
        payload = FileWritten(path=entry.path, operation=operation, size_bytes=entry.size_bytes, created=created)
        await self.state.append_tool_event(self.ref, self.tool_call_id, payload)
