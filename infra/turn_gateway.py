"""Starts and signals turns. Temporal allows one open run per workflow id, which is the session id: that is the whole lock."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from msgspec import Struct
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from domain.errors import DependencyUnavailable
from domain.messages import Delivery
from domain.ports import TurnLabels
from workflows import contract

RPC_TIMEOUT: Final = timedelta(seconds=5)
START_OR_SIGNAL_ROUNDS: Final = 10
"""A run may end between "already started" and the signal, and another start in between; each round has made progress."""


class TurnOptions(Struct, frozen=True, kw_only=True):
    """What every turn this process starts is given. `eager` needs a worker on the same client."""

    turns_queue: str = contract.TURNS_QUEUE
    steps_queue: str | None = None
    client_tool_timeout_seconds: float = contract.CLIENT_TOOL_TIMEOUT.total_seconds()
    reason_timeout_seconds: float = contract.REASON_TIMEOUT.total_seconds()
    max_parallel_tools: int = contract.MAX_PARALLEL_TOOLS
    search_attributes: bool = False
    eager: bool = False


class TemporalTurns:
    def __init__(self, client: Client, options: TurnOptions) -> None:
        self._client = client
        self._options = options

    async def wake(
        self,
        session_id: str,
        *,
        message_id: str | None = None,
        delivery: Delivery = Delivery.STEER,
        running: bool = False,
        ends_wait: bool | None = None,
        labels: TurnLabels | None = None,
    ) -> None:
        signal = contract.MessageSignal(message_id=message_id, delivery=delivery, ends_wait=ends_wait)
        for round_number in range(START_OR_SIGNAL_ROUNDS):
            if (running or round_number > 0) and await self._signal(session_id, "message", signal):
                return
            if await self._start(session_id, labels):
                return
        raise DependencyUnavailable("The session's turn could not be reached")

    async def cancel(self, session_id: str, reason: str | None, *, read_up_to: int | None = None) -> None:
        # With start: the message may be stored while its turn has not been started yet.
        await self._signal_with_start(session_id, "cancel", contract.CancelSignal(reason=reason, read_up_to=read_up_to))

    async def interrupt(self, session_id: str, message_id: str | None) -> None:
        signal = contract.InterruptSignal(message_id=message_id)
        if not await self._signal(session_id, "interrupt", signal):
            await self.wake(session_id, message_id=message_id)

    async def tool_results(self, session_id: str, tool_call_ids: Sequence[str]) -> None:
        await self._signal(session_id, "tool_results", contract.ToolResultsSignal(tool_call_ids=list(tool_call_ids)))

    async def phase(self, session_id: str) -> contract.TurnPhase | None:
        """Where the session's running turn stands; None when none runs."""
        handle = self._client.get_workflow_handle(session_id)
        try:
            found = await handle.describe(rpc_timeout=RPC_TIMEOUT)
            if found.close_time is not None:
                return None
            status = await handle.query("status", result_type=contract.TurnStatusView, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise DependencyUnavailable from error
        return status.phase

    def _input(self, session_id: str) -> contract.TurnStart:
        options = self._options
        return contract.TurnStart(
            session_id=session_id,
            client_tool_timeout_seconds=options.client_tool_timeout_seconds,
            reason_timeout_seconds=options.reason_timeout_seconds,
            max_parallel_tools=options.max_parallel_tools,
            steps_queue=None if options.steps_queue == options.turns_queue else options.steps_queue,
            search_attributes=options.search_attributes,
        )

    async def _start(self, session_id: str, labels: TurnLabels | None) -> bool:
        try:
            await self._client.start_workflow(
                contract.TURN_WORKFLOW,
                self._input(session_id),
                id=session_id,
                task_queue=self._options.turns_queue,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                request_eager_start=self._options.eager,
                static_summary=_summary(labels),
                memo=_memo(labels),
                search_attributes=self._search_attributes(labels),
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError:
            return False
        except RPCError as error:
            raise DependencyUnavailable from error
        return True

    async def _signal(self, session_id: str, name: str, argument: object) -> bool:
        try:
            await self._client.get_workflow_handle(session_id).signal(name, argument, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise DependencyUnavailable from error
        return True

    async def _signal_with_start(self, session_id: str, name: str, argument: object) -> None:
        try:
            await self._client.start_workflow(
                contract.TURN_WORKFLOW,
                self._input(session_id),
                id=session_id,
                task_queue=self._options.turns_queue,
                start_signal=name,
                start_signal_args=[argument],
                rpc_timeout=RPC_TIMEOUT,
            )
        except RPCError as error:
            raise DependencyUnavailable from error

    def _search_attributes(self, labels: TurnLabels | None) -> TypedSearchAttributes | None:
        if labels is None or not self._options.search_attributes:
            return None
        pairs = [
            SearchAttributePair(contract.ORG_ATTRIBUTE, labels.org_id),
            SearchAttributePair(contract.HARNESS_ATTRIBUTE, labels.harness),
            SearchAttributePair(contract.TURN_STATUS_ATTRIBUTE, "running"),
        ]
        if labels.agent_id is not None:
            pairs.append(SearchAttributePair(contract.AGENT_ATTRIBUTE, labels.agent_id))
        return TypedSearchAttributes(pairs)


def _summary(labels: TurnLabels | None) -> str | None:
    if labels is None:
        return None
    return f"{labels.agent_name or labels.harness} · turn {labels.turn_number}"


def _memo(labels: TurnLabels | None) -> dict[str, object] | None:
    if labels is None:
        return None
    return {"title": labels.title, "agent_name": labels.agent_name}
