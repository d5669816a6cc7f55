"""Writes a model's stream into the log: small batches, in order, the first piece at once."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

import msgspec

from domain.events import (
    EventContext,
    EventPayload,
    NewEvent,
    OutputMessageDelta,
    ReasonRecovered,
    ReasonThinkingDelta,
    ReasonThinkingStarted,
)
from domain.turns import ArrivedAnswer, GenerationNote, ResolvedModel, StepRef, TurnState

BATCH_SECONDS: Final = 0.03
"""Between two writes: below what a reader notices, and a tenth of the writes of one row per token."""

BATCH_CHARACTERS: Final = 1_024


class DeltaWriter:
    """Collects pieces while an earlier batch is being written. Leaving the block writes the rest, even on a cancel.

    `text` and `thinking` are what is in the log already, when a generation is resumed. With each batch goes how far the call has
    come, if there is something to say: `began` for a generation that can be resumed, `arrived` for one that is over.
    """

    def __init__(
        self,
        state: TurnState,
        ref: StepRef,
        message_id: str,
        model: ResolvedModel,
        *,
        text: str = "",
        thinking: str = "",
    ) -> None:
        self._state = state
        self._ref = ref
        self._message_id = message_id
        self._model = model
        self._context = EventContext(turn_id=ref.turn_id, exec_id=ref.exec_id)
        self._pending: dict[type[OutputMessageDelta] | type[ReasonThinkingDelta], list[str]] = {}
        self._pending_characters = 0
        self._offsets: dict[type[OutputMessageDelta] | type[ReasonThinkingDelta], int] = {
            OutputMessageDelta: len(text),
            ReasonThinkingDelta: len(thinking),
        }
        self._text = [text]
        self._thinking = [thinking]
        self._response_id: str | None = None
        self._cursor = 0
        self._answer: ArrivedAnswer | None = None
        self._something = asyncio.Event()
        self._enough = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DeltaWriter:
        self._task = asyncio.create_task(self._write_batches())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._closing = True
        self._something.set()
        self._enough.set()
        # Shielded: what a cancelled step has streamed so far is part of the conversation.
        await asyncio.shield(self._task)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def thinking(self) -> str:
        return "".join(self._thinking)

    async def began(self, response_id: str, cursor: int) -> None:
        """A generation that another worker can resume; stored at once, so that none is ever started twice."""
        self._response_id = response_id
        self._cursor = cursor
        await self._state.append(self._ref, [], self._note())

    async def restart(self) -> None:
        """What was to be resumed is gone: the text so far is void, and clients are told."""
        void = len(self.text)
        self._text, self._thinking = [], []
        self._pending, self._pending_characters, self._cursor = {}, 0, 0
        self._offsets = {OutputMessageDelta: 0, ReasonThinkingDelta: 0}
        if not void:
            return
        recovered = ReasonRecovered(
            turn_id=self._ref.turn_id,
            mode="restart",
            accumulated_len=void,
            message_id=self._message_id,
            attempt=self._ref.attempt,
        )
        key = f"reason.recovered:{self._ref.exec_id}:{self._ref.attempt}"
        context = msgspec.structs.replace(self._context, span_id=self._ref.exec_id)
        await self._state.append(self._ref, [NewEvent(data=recovered, context=context, dedupe_key=key)])

    def arrived(self, answer: ArrivedAnswer) -> None:
        """The answer is whole; the note goes with the last batch, if there is one left to write."""
        self._answer = answer

    def add_text(self, piece: str, cursor: int | None = None) -> None:
        self._text.append(piece)
        self._add(OutputMessageDelta, piece, cursor)

    def add_thinking(self, piece: str, cursor: int | None = None) -> None:
        self._thinking.append(piece)
        self._add(ReasonThinkingDelta, piece, cursor)

    def _add(self, kind: type[OutputMessageDelta] | type[ReasonThinkingDelta], piece: str, cursor: int | None) -> None:
        if self._task is not None and self._task.done():
            self._task.result()  # raises what ended it
        self._pending.setdefault(kind, []).append(piece)
        self._cursor = cursor or self._cursor
        self._pending_characters += len(piece)
        self._something.set()
        if self._pending_characters >= BATCH_CHARACTERS:
            self._enough.set()

    async def _write_batches(self) -> None:
        while True:
            await self._something.wait()
            events = self._take()
            if events:
                await self._state.append(self._ref, events, self._note())
            elif self._closing:
                return
            if self._closing:
                continue
            try:
                async with asyncio.timeout(BATCH_SECONDS):
                    await self._enough.wait()
            except TimeoutError:
                pass

    def _note(self) -> GenerationNote | None:
        if self._response_id is None and self._answer is None:
            return None
        return GenerationNote(
            model_id=self._model.public_id, response_id=self._response_id, cursor=self._cursor, answer=self._answer
        )

    def _take(self) -> list[NewEvent]:
        pending, self._pending = self._pending, {}
        self._pending_characters = 0
        self._something.clear()
        if self._closing:
            self._something.set()
        else:
            self._enough.clear()
        events: list[NewEvent] = []
        for kind, pieces in pending.items():
            delta = "".join(pieces)
            if not delta:
                continue
            offset = self._offsets.get(kind, 0)
            self._offsets[kind] = offset + len(delta)
            if kind is ReasonThinkingDelta and offset == 0:
                started = ReasonThinkingStarted(turn_id=self._ref.turn_id, model=self._model.name)
                events.append(self._event(started))
            events.append(
                self._event(kind(turn_id=self._ref.turn_id, message_id=self._message_id, delta=delta, offset=offset))
            )
        return events

    def _event(self, payload: EventPayload) -> NewEvent:
        return NewEvent(data=payload, context=self._context)
