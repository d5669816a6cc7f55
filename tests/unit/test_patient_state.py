"""While PostgreSQL is away, steps wait; what a repetition may not do, it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import asyncpg
import pytest

from db.patient_state import PatientTurnState, is_away
from domain.events import EventPayload, NewEvent, ToolProgress
from domain.turns import ActResult, GenerationNote, StepFenced, StepRef, ToolSettlement, TurnState

REF = StepRef(session_id="session_1", turn_id="turn_1", iteration=1, exec_id="exec_1", attempt=1, worker="here:1")
SETTLEMENT = ToolSettlement(status="success")


class FailingState:
    """Fails with each of these in turn, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.calls = 0

    def _next(self) -> None:
        self.calls += 1
        if self._failures:
            raise self._failures.pop(0)

    async def settle_call(self, ref: StepRef, call_id: str, settlement: ToolSettlement) -> ActResult:
        self._next()
        return ActResult()

    async def append(self, ref: StepRef, events: Sequence[NewEvent], note: GenerationNote | None = None) -> None:
        self._next()

    async def append_tool_event(self, ref: StepRef, call_id: str, payload: EventPayload) -> None:
        self._next()


def patient(state: FailingState) -> PatientTurnState:
    return PatientTurnState(cast(TurnState, state))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError(),
        asyncpg.CannotConnectNowError(),
        asyncpg.AdminShutdownError(),
        asyncpg.CrashShutdownError(),
        asyncpg.TooManyConnectionsError(),
        asyncpg.InterfaceError("connection is closed"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_known_outcome_of_a_call_waits_for_the_database(error: Exception) -> None:
    state = FailingState(error)

    assert await patient(state).settle_call(REF, "call_1", SETTLEMENT) == ActResult()
    assert state.calls == 2


@pytest.mark.parametrize("error", [StepFenced(), asyncpg.UniqueViolationError(), ValueError()])
async def test_answer_of_the_database_is_not_asked_for_again(error: Exception) -> None:
    assert not is_away(error)
    state = FailingState(error)

    with pytest.raises(type(error)):
        await patient(state).settle_call(REF, "call_1", SETTLEMENT)
    assert state.calls == 1


async def test_fence_met_by_a_repetition_is_reported_as_the_loss_that_led_to_it() -> None:
    """The first try may have been committed; only the next attempt of the step can tell."""
    with pytest.raises(ConnectionResetError):
        await patient(FailingState(ConnectionResetError(), StepFenced())).settle_call(REF, "call_1", SETTLEMENT)


async def test_deltas_are_never_appended_twice() -> None:
    state = FailingState(ConnectionResetError())

    with pytest.raises(ConnectionResetError):
        await patient(state).append(REF, [])
    assert state.calls == 1


async def test_tool_does_not_fail_when_its_progress_cannot_be_told() -> None:
    progress = ToolProgress(tool_call_id="call_1", tool_name="dig", message="halfway")

    await patient(FailingState(ConnectionResetError())).append_tool_event(REF, "call_1", progress)
    with pytest.raises(StepFenced):
        await patient(FailingState(StepFenced())).append_tool_event(REF, "call_1", progress)
