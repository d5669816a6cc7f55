"""Steps that only touch the database: the end of a turn that did not end by itself, and messages brought by signal."""

from __future__ import annotations

from temporalio import activity

from domain.turns import FinishInput, FinishResult, MessageRecorder, TurnState
from workflows import contract


class BookkeepingActivities:
    def __init__(self, state: TurnState, messages: MessageRecorder) -> None:
        self._state = state
        self._messages = messages

    @activity.defn(name=contract.FINISH)
    async def finish(self, input: FinishInput) -> FinishResult:
        return await self._state.finish(input)

    @activity.defn(name=contract.RECORD_MESSAGE)
    async def record_message(self, input: contract.RecordMessageInput) -> None:
        brought = input.message
        await self._messages.record(
            input.session_id,
            input.message_id,
            brought.content or [],
            brought.delivery,
            brought.controls,
            brought.metadata,
        )
