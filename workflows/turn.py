"""The story of one turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from temporalio import workflow
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    import msgspec

    from domain.ids import Prefix
    from domain.messages import Delivery
    from workflows import contract
    from workflows.contract import (
        ActInput,
        ActResult,
        CallRef,
        FinishInput,
        FinishResult,
        ReasonInput,
        ReasonNext,
        ReasonResult,
        TurnEnding,
        TurnPhase,
    )

Result = TypeVar("Result")


@workflow.defn(name=contract.TURN_WORKFLOW)
class Turn:
    """One run is one turn of the session whose id is the workflow id: reason, act, reason … until there is an answer.

    What survives a crash: everything. Messages, answers and tool results are in the event log before anyone sees them; this
    workflow holds ids, counters and intentions, and Temporal rebuilds it on any worker. What is retried: a reason step by the
    retry table of its provider, a tool call by its side-effect class, and both when their worker is lost; three losses in a
    row without progress seal the turn. What a person may signal: `message`, `interrupt`, `cancel`, `tool_results`, and
    `resume`; `approvals` and `answers` end the waits of their kinds. Handlers only note what is wanted; `run` acts on it.
    """

    @workflow.init
    def __init__(self, start: contract.TurnStart) -> None:
        self._start = start
        # A turn is named after its first run. A run continued as new inside the turn carries the name along.
        self._turn_id = start.turn_id or f"{Prefix.TURN}_{workflow.info().run_id.replace('-', '')}"
        self._iteration = start.iteration
        self._phase = TurnPhase.STARTING
        # Messages that a running turn reads, and those that want a turn of their own. Counted, because the log knows the rest.
        self._messages = 0
        self._follow_ups = 0
        self._to_record: list[contract.RecordMessageInput] = []
        self._cancel = start.cancel
        self._interrupted = False
        self._wait_ended = False
        self._returned: set[str] = set()
        self._waiting_for: list[str] = []
        self._model: str | None = None

    @workflow.run
    async def run(self, start: contract.TurnStart) -> contract.TurnResult:
        open_calls = "interrupted"
        while True:
            await self._take_in_messages()
            if self._cancel is not None:
                return await self._finish(TurnEnding.CANCELLED, reason=self._cancel.reason)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(self._carried_on())
            self._iteration += 1
            self._messages = 0
            self._interrupted = False
            self._wait_ended = False
            try:
                step = await self._reason(open_calls)
            except ActivityError as error:
                return await self._finish_after(error)
            open_calls = "interrupted"
            self._model = step.model if step is not None else self._model
            if step is None:  # Stopped by a cancel or an interrupt; the next round sees which.
                continue
            match step.next:
                case ReasonNext.NOTHING:
                    return await self._end("nothing_to_do", more=False)
                case ReasonNext.DONE:
                    ending = step.ending.value if step.ending else "completed"
                    return await self._end(ending, more=step.more, ended_at=step.ended_at)
                case ReasonNext.PAUSED:
                    await self._take_in_messages()
                    if self._cancel is not None:  # It came while the pause was being written.
                        return await self._finish(TurnEnding.CANCELLED, reason=self._cancel.reason)
                    return await self._end("paused", more=False)
                case ReasonNext.TAKE_UP:
                    # A turn keeps its name over a pause, whichever run goes on with it.
                    self._turn_id, self._iteration = step.turn_id or self._turn_id, step.iteration
                    continue
                case ReasonNext.AGAIN:
                    continue
                case ReasonNext.ACT:
                    if step.resumed:  # The model was not called: there is no new iteration.
                        self._iteration -= 1
                    try:
                        waits = await self._act(step)
                    except ActivityError as error:
                        return await self._finish_after(error)
                case ReasonNext.WAIT:
                    if step.resumed:
                        self._iteration -= 1
                    waits = ActResult(waiting=True)
            if waits is not None:
                outcome = await self._wait_for_client(
                    waits.waits or step.client_calls, waits.wait_seconds or step.wait_seconds
                )
                if outcome == "superseded":
                    return await self._finish(TurnEnding.SUPERSEDED)
                if outcome == "timed_out":
                    open_calls = "timed_out"

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _reason(self, open_calls: str) -> ReasonResult | None:
        self._phase = TurnPhase.REASONING
        return await self._stoppable(
            workflow.start_activity(
                contract.REASON,
                ReasonInput(
                    session_id=self._start.session_id,
                    turn_id=self._turn_id,
                    iteration=self._iteration,
                    open_calls="timed_out" if open_calls == "timed_out" else "interrupted",
                ),
                result_type=ReasonResult,
                task_queue=self._start.steps_queue,
                start_to_close_timeout=timedelta(seconds=self._start.reason_timeout_seconds),
                heartbeat_timeout=contract.HEARTBEAT_TIMEOUT,
                retry_policy=contract.STEP_RETRY,
                cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                summary=" · ".join(filter(None, ("reason", self._model, f"iteration {self._iteration}"))),
            )
        )

    async def _act(self, step: ReasonResult) -> ActResult | None:
        """Run a batch of tool calls; returns a result when others of the batch are to be waited for."""
        self._phase = TurnPhase.ACTING
        slots = asyncio.Semaphore(1 if step.serial else self._start.max_parallel_tools)
        try:
            lanes = await asyncio.gather(
                *(self._act_in_order(lane, slots) for lane in _lanes(step.calls)), return_exceptions=True
            )
        except asyncio.CancelledError:
            self._cancel_through_temporal()
            return None
        waits: ActResult | None = None
        for lane in lanes:
            if isinstance(lane, BaseException):
                raise lane
            waits = waits or lane
        return None if self._stop_requested() else waits

    async def _act_in_order(self, calls: Sequence[CallRef], slots: asyncio.Semaphore) -> ActResult | None:
        waits: ActResult | None = None
        for call in calls:
            async with slots:
                if self._stop_requested():
                    return None
                result = await self._call(call)
                waits = waits or (result if result is not None and result.waiting else None)
        return waits

    async def _call(self, call: CallRef) -> ActResult | None:
        return await self._stoppable(
            workflow.start_activity(
                contract.ACT,
                ActInput(
                    session_id=self._start.session_id,
                    turn_id=self._turn_id,
                    iteration=self._iteration,
                    call_id=call.call_id,
                    idempotency_key=f"{self._turn_id}:{call.call_id}",
                ),
                result_type=ActResult,
                task_queue=self._start.steps_queue,
                start_to_close_timeout=timedelta(seconds=call.timeout_seconds) + contract.ACT_TIMEOUT_MARGIN,
                heartbeat_timeout=contract.HEARTBEAT_TIMEOUT,
                retry_policy=contract.STEP_RETRY,
                cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                summary=f"act · {call.name}",
            )
        )

    async def _wait_for_client(self, call_ids: list[str], seconds: float | None) -> str:
        self._phase = TurnPhase.WAITING_FOR_TOOL_RESULTS
        self._waiting_for = call_ids
        self._show_status("waiting")
        workflow.set_current_details(f"Waiting for results or answers of: {', '.join(call_ids)}")
        try:
            await workflow.wait_condition(
                lambda: self._has_results() or self._wait_ended or self._stop_requested(),
                timeout=timedelta(seconds=seconds or self._start.client_tool_timeout_seconds),
                timeout_summary="client-side tool results",
            )
        except TimeoutError:
            return "timed_out"
        except asyncio.CancelledError:
            self._cancel_through_temporal()
        finally:
            returned = self._has_results()
            self._waiting_for = []
            workflow.set_current_details("")
            self._show_status("running")
        if self._cancel is not None:
            return "cancelled"
        return "results" if returned else "superseded"

    def _has_results(self) -> bool:
        # By id: the word of results may come before the wait has begun, or twice.
        return not self._returned.isdisjoint(self._waiting_for)

    async def _take_in_messages(self) -> None:
        """Store messages whose content came by signal, and let updates store theirs; from then on they are like any other.

        When this returns there is nothing left that a continue-as-new could lose, and a turn that an update begins finds the
        update's message in the log.
        """
        while self._to_record or not workflow.all_handlers_finished():
            while self._to_record:
                await self._record(self._to_record[0])
                self._to_record.pop(0)
            try:
                await workflow.wait_condition(lambda: bool(self._to_record) or workflow.all_handlers_finished())
            except asyncio.CancelledError:
                self._cancel_through_temporal()

    async def _record(self, brought: contract.RecordMessageInput) -> None:
        await _to_the_end(
            workflow.start_activity(
                contract.RECORD_MESSAGE,
                brought,
                task_queue=self._start.steps_queue,
                start_to_close_timeout=contract.DATABASE_STEP_TIMEOUT,
                heartbeat_timeout=contract.HEARTBEAT_TIMEOUT,
                retry_policy=contract.DATABASE_STEP_RETRY,
                summary="record a message brought by signal",
            )
        )

    async def _stoppable(self, step: workflow.ActivityHandle[Result]) -> Result | None:
        """Wait for a step; a cancel or an interrupt stops it, and the result is None."""
        try:
            await workflow.wait_condition(lambda: step.done() or self._stop_requested())
        except asyncio.CancelledError:
            self._cancel_through_temporal()
        if not step.done():
            step.cancel()
        try:
            return await step
        except ActivityError as error:
            if self._stop_requested() and is_cancelled_exception(error):
                return None
            raise

    def _cancel_through_temporal(self) -> None:
        """Temporal's own cancel (its Web UI, `temporal workflow cancel`) means what our signal means."""
        self._cancel = self._cancel or contract.CancelSignal(reason="cancelled through Temporal")

    def _stop_requested(self) -> bool:
        return self._interrupted or self._cancel is not None

    # --- ending -------------------------------------------------------------------------------------------------------

    async def _finish_after(self, error: ActivityError) -> contract.TurnResult:
        cause = error.cause
        kind = cause.type if isinstance(cause, ApplicationError) else None
        if kind == contract.NO_PROGRESS:
            return await self._finish(TurnEnding.SEALED, reason="the workers running this step were lost repeatedly")
        if kind == contract.SESSION_GONE:
            return contract.TurnResult(ending="session_gone", turn_id=self._turn_id, iterations=self._iteration)
        return await self._finish(
            TurnEnding.FAILED, error_code=None if kind == contract.MODEL_FAILED else "processing_error"
        )

    async def _finish(
        self, ending: TurnEnding, *, reason: str | None = None, error_code: str | None = None
    ) -> contract.TurnResult:
        self._phase = TurnPhase.ENDING
        result = await _to_the_end(
            workflow.start_activity(
                contract.FINISH,
                FinishInput(
                    session_id=self._start.session_id,
                    turn_id=self._turn_id,
                    iteration=self._iteration,
                    ending=ending,
                    reason=reason,
                    error_code=error_code,
                    read_up_to=self._cancel.read_up_to if self._cancel is not None else None,
                ),
                result_type=FinishResult,
                task_queue=self._start.steps_queue,
                start_to_close_timeout=contract.DATABASE_STEP_TIMEOUT,
                heartbeat_timeout=contract.HEARTBEAT_TIMEOUT,
                retry_policy=contract.DATABASE_STEP_RETRY,
                summary=f"finish · {ending.value}",
            )
        )
        return await self._end(ending.value, more=result.more, ended_at=result.ended_at)

    async def _end(self, ending: str, *, more: bool, ended_at: int | None = None) -> contract.TurnResult:
        """Close the run, or go on with the next turn when a message arrived after this one was closed in the log."""
        await self._take_in_messages()
        self._show_status(ending)
        # A signal that came after the turn was closed in the log leaves no other trace here, so any of them starts a look;
        # when the log holds nothing unread, the next run ends at once without a turn.
        if more or self._messages > 0 or self._follow_ups > 0:
            workflow.continue_as_new(
                self._next_turn(ended_at), search_attributes=self._attributes_with_status("running")
            )
        return contract.TurnResult(ending=ending, turn_id=self._turn_id, iterations=self._iteration)

    def _attributes_with_status(self, status: str) -> TypedSearchAttributes | None:
        if not self._start.search_attributes:
            return None
        pair = SearchAttributePair(contract.TURN_STATUS_ATTRIBUTE, status)
        return workflow.info().typed_search_attributes.updated(pair)

    def _show_status(self, status: str) -> None:
        """Keep the Web UI's filter true. Only when the starter registered the attributes: an unknown one fails the run."""
        if self._start.search_attributes:
            workflow.upsert_search_attributes([contract.TURN_STATUS_ATTRIBUTE.value_set(status)])

    def _carried_on(self) -> contract.TurnStart:
        return msgspec.structs.replace(
            self._start, turn_id=self._turn_id, iteration=self._iteration, cancel=self._cancel
        )

    def _next_turn(self, ended_at: int | None) -> contract.TurnStart:
        """The next turn's input. A cancel that was asked for after this turn had ended is meant for that one."""
        cancel = self._cancel
        if cancel is None or ended_at is None or cancel.read_up_to is None or cancel.read_up_to < ended_at:
            cancel = None
        return msgspec.structs.replace(self._start, turn_id=None, iteration=0, cancel=cancel)

    # --- what a person or a program may ask for -----------------------------------------------------------------------

    @workflow.signal
    def message(self, signal: contract.MessageSignal) -> None:
        """A message for this session: stored already (`message_id`), or brought along (`content`)."""
        if signal.content is not None:
            self._to_record.append(self._brought(signal))
        self._note(signal)

    @workflow.signal
    def interrupt(self, signal: contract.InterruptSignal) -> None:
        """Stop the running step, keep a legal history, and read what waits."""
        self._messages += 1
        self._interrupted = True

    @workflow.signal
    def cancel(self, signal: contract.CancelSignal) -> None:
        self._cancel = signal

    @workflow.signal
    def tool_results(self, signal: contract.ToolResultsSignal) -> None:
        """Results are in the log: of these calls, or, without ids, of those the turn is waiting for."""
        self._returned.update(signal.tool_call_ids or self._waiting_for)

    @workflow.signal
    def approvals(self, signal: contract.ApprovalsSignal) -> None:
        self._returned.update(signal.tool_call_ids or self._waiting_for)

    @workflow.signal
    def answers(self, signal: contract.AnswersSignal) -> None:
        self._returned.update([signal.tool_call_id] if signal.tool_call_id else self._waiting_for)

    @workflow.signal
    def resume(self) -> None:
        """Have the log looked at once more for messages when this turn ends."""
        self._follow_ups += 1

    @workflow.query
    def status(self) -> contract.TurnStatusView:
        return contract.TurnStatusView(
            turn_id=self._turn_id,
            phase=self._phase,
            iteration=self._iteration,
            pending_messages=self._messages,
            waiting_for=self._waiting_for,
        )

    @workflow.update
    async def send_message(self, signal: contract.MessageSignal) -> contract.SendMessageReceipt:
        """Store a message and answer with its id. A turn that is at work reads it; otherwise it begins one."""
        steered = self._phase is not TurnPhase.STARTING
        brought = self._brought(signal)
        await self._record(brought)
        self._note(signal)
        return contract.SendMessageReceipt(message_id=brought.message_id, turn_id=self._turn_id, steered=steered)

    @send_message.validator
    def _check_message(self, signal: contract.MessageSignal) -> None:
        if not signal.content:
            raise ValueError("`content` must hold at least one part")

    def _note(self, signal: contract.MessageSignal) -> None:
        if signal.delivery is Delivery.FOLLOW_UP:
            self._follow_ups += 1
            return
        self._messages += 1
        self._interrupted = self._interrupted or signal.delivery is Delivery.INTERRUPT
        # A message from before the wait steers: it is read with the results. One that came after ends the wait. The API knows
        # which, from the transaction that stored it; its word may arrive in either order.
        waiting = self._phase is TurnPhase.WAITING_FOR_TOOL_RESULTS
        self._wait_ended = self._wait_ended or (waiting if signal.ends_wait is None else signal.ends_wait)

    def _brought(self, signal: contract.MessageSignal) -> contract.RecordMessageInput:
        # Deterministic under replay, so that a retried record step stores one message.
        message_id = signal.message_id or f"{Prefix.MESSAGE}_{workflow.uuid4().hex}"
        return contract.RecordMessageInput(session_id=self._start.session_id, message_id=message_id, message=signal)


async def _to_the_end(step: workflow.ActivityHandle[Result]) -> Result:
    """Wait for a step that must not be stopped, whatever is asked in the meantime."""
    while True:
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            if step.cancelled():
                raise


def _lanes(calls: Sequence[CallRef]) -> list[list[CallRef]]:
    """Calls that may run side by side, each with those of its concurrency class behind it."""
    lanes: dict[str, list[CallRef]] = {}
    for call in calls:
        key = f"class:{call.concurrency_class}" if call.concurrency_class else f"call:{call.call_id}"
        lanes.setdefault(key, []).append(call)
    return list(lanes.values())
