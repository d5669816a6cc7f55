"""The interceptor that mirrors steps into the event log.

It keeps the heartbeat of every activity. Around the body of every `reason` and `act` it opens the step (fence, `*.started`,
and what the body needs) and closes it with the body's outcome (`*.completed` and the turn's transition, one transaction). A
body cannot forget an event because it writes none of these; a retry of a step that was closed already returns the stored
result without running the body.

How a step can end, and what the log gets:

    body returns               completed events and transition; the stored result goes to the workflow
    model error                `llm.generation` with success false; Temporal retries or fails the step by our table
    cancelled by the workflow  a call is settled as cancelled; a message stays open, and the next step or the end of the
                               turn closes it with the text streamed so far
    worker shutting down       the step moves to another worker at once; an at-most-once call may use the grace period
    worker lost                nothing: the next attempt finds the step open and knows what that means
    attempt overtaken          nothing: the fence refuses every write
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Final

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from activities.step import CallStep, ReasonStep, enter
from domain.ids import Prefix, derived_id, parse_id
from domain.model import ModelError
from domain.tools import SideEffect
from domain.turns import (
    ActInput,
    ActResult,
    CallWait,
    NoProgress,
    ReasonBriefing,
    ReasonFailure,
    ReasonInput,
    ReasonOutcome,
    ReasonResult,
    SessionGone,
    StepFenced,
    StepRef,
    ToolClaim,
    ToolSettlement,
    TurnState,
)
from workflows import contract

FIRST_RETRY_SECONDS: Final = 1.0
MAX_RETRY_SECONDS: Final = 60.0
RETRY_JITTER: Final = 0.1

CANCELLED: Final = "Cancelled while it was running."
CANCELLED_OUTCOME_UNKNOWN: Final = (
    "Cancelled while it was running. Whether the call took effect is unknown. "
    "Do not repeat it without checking or asking first."
)

HAND_OVER_DELAY: Final = timedelta(milliseconds=50)
"""Time for the leaving worker's polls to end: a step that is offered again at once might be offered to them."""

AT_ONCE: Final = timedelta(milliseconds=1)
"""Temporal takes no delay at all for a delay that was not given."""

log = structlog.get_logger(__name__)

Body = Callable[[], Awaitable[object]]


class EventMirror(Interceptor):
    def __init__(self, state: TurnState, *, worker: str) -> None:
        self._state = state
        self._worker = worker

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _MirroredActivity(next, self._state, self._worker)


class _MirroredActivity(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, state: TurnState, worker: str) -> None:
        super().__init__(next)
        self._state = state
        self._worker = worker

    async def execute_activity(self, input: ExecuteActivityInput) -> object:
        step_input = input.args[0] if input.args else None
        info = activity.info()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(step=info.activity_type, attempt=info.attempt)

        async def body() -> object:
            return await self.next.execute_activity(input)

        # Opening and closing a step may have to wait for a lock or a slow database: that, too, is a sign of life.
        with _as_application_error(), _heartbeats():
            match step_input:
                case ReasonInput():
                    ref = self._ref(step_input, f"reason:{step_input.iteration}")
                    return await self._reason(step_input, ref, body)
                case ActInput():
                    ref = self._ref(step_input, f"call:{step_input.call_id}")
                    return await self._call(step_input, ref, body)
                case _:
                    return await body()

    def _ref(self, input: ReasonInput | ActInput, name: str) -> StepRef:
        structlog.contextvars.bind_contextvars(session_id=input.session_id, turn_id=input.turn_id)
        return StepRef(
            session_id=input.session_id,
            turn_id=input.turn_id,
            iteration=input.iteration,
            # The same for every attempt, so that retries find what earlier ones wrote.
            exec_id=derived_id(Prefix.EXEC, parse_id(Prefix.TURN, input.turn_id), name),
            attempt=activity.info().attempt,
            worker=self._worker,
        )

    async def _reason(self, input: ReasonInput, ref: StepRef, body: Body) -> ReasonResult:
        opened = await self._state.begin_reason(ref, input.open_calls)
        if isinstance(opened, ReasonResult):
            return opened
        enter(ReasonStep(ref=ref, briefing=opened))
        started = time.monotonic()
        try:
            outcome = await _unless_stopping(body)
        except ModelError as error:
            # Without its cause: Temporal would store the provider's words with it.
            raise await self._failed(ref, opened, error, started) from None
        except _WorkerStopping:
            await self._state.release_step(ref)
            raise
        if not isinstance(outcome, ReasonOutcome):
            raise TypeError(f"a reason body returned {type(outcome).__name__}")
        return await self._state.commit_reason(ref, outcome)

    async def _failed(
        self, ref: StepRef, briefing: ReasonBriefing, error: ModelError, started: float
    ) -> ApplicationError:
        delay = retry_delay_seconds(error, ref.attempt)
        verdict = await self._state.fail_reason(
            ref,
            ReasonFailure(
                kind=error.kind,
                error=error.message,
                model=briefing.model,
                duration_ms=round((time.monotonic() - started) * 1000),
                retry_in_ms=round(delay * 1000) if error.retryable else 0,
                fields=error.fields,
            ),
        )
        log.warning(
            "model call failed",
            model=briefing.model and briefing.model.name,
            kind=error.kind.value,
            error=error.message,
            retry=verdict.retry,
            fallback=verdict.fallback,
            retry_in_seconds=delay if verdict.retry else None,
        )
        return ApplicationError(
            # Only the class of the failure: histories hold no provider text.
            f"model call failed: {error.kind.value}",
            type=contract.MODEL_FAILED,
            # Decided by us: Temporal's count holds hand-overs and lost workers too.
            non_retryable=not verdict.retry,
            next_retry_delay=AT_ONCE if verdict.fallback else timedelta(seconds=delay),
        )

    async def _call(self, input: ActInput, ref: StepRef, body: Body) -> ActResult:
        opened = await self._state.begin_call(ref, input.call_id)
        if not isinstance(opened, ToolClaim):
            return opened
        enter(CallStep(ref=ref, claim=opened))
        # Stopped halfway, an at-most-once call has an unknown outcome; when the worker stops it may use the grace period.
        finish_first = opened.side_effect is SideEffect.AT_MOST_ONCE
        try:
            settlement = await (body() if finish_first else _unless_stopping(body))
        except _WorkerStopping:
            await self._state.release_call(ref, input.call_id)
            raise
        except asyncio.CancelledError:
            details = activity.cancellation_details()
            if details is not None and details.cancel_requested:
                text = CANCELLED_OUTCOME_UNKNOWN if finish_first else CANCELLED
                stopped = ToolSettlement(status="cancelled", error=text)
                await asyncio.shield(self._state.settle_call(ref, input.call_id, stopped))
            raise
        if isinstance(settlement, CallWait):
            return await self._state.suspend_call(ref, input.call_id, settlement)
        if not isinstance(settlement, ToolSettlement):
            raise TypeError(f"an act body returned {type(settlement).__name__}")
        return await self._state.settle_call(ref, input.call_id, settlement)


def retry_delay_seconds(error: ModelError, attempt: int) -> float:
    """Exponential with jitter; a provider's Retry-After is kept to, whatever it says."""
    delay = min(FIRST_RETRY_SECONDS * 2 ** (attempt - 1), MAX_RETRY_SECONDS)
    delay *= 1 + random.uniform(-RETRY_JITTER, RETRY_JITTER)  # noqa: S311  # spreads load, guards nothing
    return max(delay, error.retry_after_seconds or 0.0)


class _WorkerStopping(Exception):
    """The worker is shutting down and this step can be run again elsewhere"""


@contextlib.contextmanager
def _as_application_error() -> Iterator[None]:
    """Every failure in words of our own: histories hold no provider text, no SQL and no content.

    Our own outcomes are not retried; anything unforeseen (a database away, a bug) is logged here and retried.
    """
    try:
        yield
    except (ApplicationError, asyncio.CancelledError):
        raise
    except StepFenced:
        raise ApplicationError("overtaken by a later attempt", type=contract.STEP_FENCED, non_retryable=True) from None
    except SessionGone:
        raise ApplicationError("the session does not exist", type=contract.SESSION_GONE, non_retryable=True) from None
    except NoProgress:
        raise ApplicationError("no progress", type=contract.NO_PROGRESS, non_retryable=True) from None
    except _WorkerStopping:
        raise ApplicationError(
            "worker is stopping", type=contract.WORKER_STOPPING, next_retry_delay=HAND_OVER_DELAY
        ) from None
    except Exception as error:
        log.exception("step failed")
        raise ApplicationError(f"step failed: {type(error).__name__}", type=contract.STEP_FAILED) from None


async def _unless_stopping(body: Body) -> object:
    """Run the body; when the worker begins to shut down first, stop it and raise `_WorkerStopping`."""
    running = asyncio.ensure_future(body())
    stopping = asyncio.ensure_future(activity.wait_for_worker_shutdown())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise _WorkerStopping
    finally:
        stopping.cancel()
        if not running.done():
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running


@contextlib.contextmanager
def _heartbeats() -> Iterator[None]:
    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(contract.HEARTBEAT_INTERVAL_SECONDS)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
