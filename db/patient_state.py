"""`TurnState` for workers that outlive their database: while PostgreSQL is away, a step waits instead of failing.

Without it a failover of three seconds uses up every attempt of every running step, turns are sealed for a fault that is not
theirs, and the known outcome of an at-most-once call becomes an unknown one. The step's heartbeat goes on meanwhile, and a
cancel or the worker's end interrupts the wait.

A connection that breaks in the middle leaves open whether the transaction was committed. That is harmless where a repetition
finds its own result; where it is refused instead (`StepFenced`), the lost connection is what is reported, and the next
attempt of the step finds out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, TypeVar

import asyncpg
import structlog

from domain.checkpoints import Checkpoint
from domain.events import EventPayload, NewEvent, TokenUsage
from domain.turns import (
    ActResult,
    CallWait,
    FailureVerdict,
    FinishInput,
    FinishResult,
    GenerationNote,
    ReasonBriefing,
    ReasonFailure,
    ReasonOutcome,
    ReasonResult,
    ResolvedModel,
    StepFenced,
    StepRef,
    ToolClaim,
    ToolSettlement,
    TurnState,
)

AWAY_SQLSTATES: Final = ("08", "53", "57P")
"""PostgreSQL is restarting, gone, or out of connections."""

FIRST_WAIT_SECONDS: Final = 0.1
MAX_WAIT_SECONDS: Final = 1.0
"""Between two looks: a second of a turn is the price of a busier recovery."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


def is_away(error: Exception) -> bool:
    """Whether this says that PostgreSQL cannot be reached, as opposed to something it answered."""
    if isinstance(error, (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return True
    return str(getattr(error, "sqlstate", None) or "").startswith(AWAY_SQLSTATES)


class PatientTurnState:
    def __init__(self, state: TurnState) -> None:
        self._state = state

    async def begin_reason(
        self, ref: StepRef, open_calls: Literal["interrupted", "timed_out"]
    ) -> ReasonBriefing | ReasonResult:
        return await _patiently(lambda: self._state.begin_reason(ref, open_calls))

    async def commit_reason(self, ref: StepRef, outcome: ReasonOutcome) -> ReasonResult:
        return await _patiently(lambda: self._state.commit_reason(ref, outcome))

    async def fail_reason(self, ref: StepRef, failure: ReasonFailure) -> FailureVerdict:
        return await _patiently(lambda: self._state.fail_reason(ref, failure))

    async def release_step(self, ref: StepRef) -> None:
        # The worker is leaving; a note is not worth its grace period.
        await self._state.release_step(ref)

    async def begin_call(self, ref: StepRef, call_id: str) -> ToolClaim | ActResult:
        return await _patiently(lambda: self._state.begin_call(ref, call_id))

    async def settle_call(self, ref: StepRef, call_id: str, settlement: ToolSettlement) -> ActResult:
        return await _patiently(lambda: self._state.settle_call(ref, call_id, settlement))

    async def release_call(self, ref: StepRef, call_id: str) -> None:
        # As for `release_step`.
        await self._state.release_call(ref, call_id)

    async def suspend_call(self, ref: StepRef, call_id: str, wait: CallWait) -> ActResult:
        return await _patiently(lambda: self._state.suspend_call(ref, call_id, wait))

    async def finish(self, input: FinishInput) -> FinishResult:
        return await _patiently(lambda: self._state.finish(input))

    async def append(self, ref: StepRef, events: Sequence[NewEvent], note: GenerationNote | None = None) -> None:
        # Deltas are told apart by nothing: after a broken connection they might be there already. The next attempt restarts.
        await self._state.append(ref, events, note)

    async def install_checkpoint(
        self,
        ref: StepRef,
        checkpoint: Checkpoint | None,
        events: Sequence[NewEvent],
        usage: TokenUsage | None = None,
    ) -> None:
        await _patiently(lambda: self._state.install_checkpoint(ref, checkpoint, events, usage))

    async def find_model(self, ref: StepRef, name: str) -> ResolvedModel | None:
        return await _patiently(lambda: self._state.find_model(ref, name))

    async def append_tool_event(self, ref: StepRef, call_id: str, payload: EventPayload) -> None:
        try:
            await self._state.append_tool_event(ref, call_id, payload)
        except Exception as error:
            if not is_away(error):
                raise
            # A tool does not fail because nobody could be told how far it is.
            log.warning("tool event dropped, state is away", type=payload.event_type, error=type(error).__name__)


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    wait = FIRST_WAIT_SECONDS
    away: Exception | None = None
    while True:
        try:
            return await call()
        except StepFenced:
            # Refused what an earlier try of this very call may have done.
            raise away or StepFenced from None
        except Exception as error:
            if not is_away(error):
                raise
            if away is None:
                log.warning("state is away, the step waits", error=type(error).__name__)
            away = error
        await asyncio.sleep(wait)
        wait = min(wait * 2, MAX_WAIT_SECONDS)
