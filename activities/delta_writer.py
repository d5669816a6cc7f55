"""Writes a model's stream into the log: small batches, in order, the first piece at once."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from domain.events import (
    EventContext,
    EventPayload,
    NewEvent,
    OutputMessageDelta,
    ReasonThinkingDelta,
    ReasonThinkingStarted,
)
from domain.turns import StepRef, TurnState

BATCH_SECONDS: Final = 0.03
"""Between two writes: below what a reader notices, and a tenth of the writes of one row per token."""

BATCH_CHARACTERS: Final = 1_024


class DeltaWriter:
    """Collects pieces while an earlier batch is being written. Leaving the block writes the rest, even on a cancel."""

    def __init__(self, state: TurnState, ref: StepRef, message_id: str, model: str) -> None:
        self._state = state
        self._ref = ref
        self._message_id = message_id
        self._model = model
        self._context = EventContext(turn_id=ref.turn_id, exec_id=ref.exec_id)
        self._pending: dict[type[OutputMessageDelta] | type[ReasonThinkingDelta], list[str]] = {}
        self._pending_characters = 0
        self._offsets: dict[type[OutputMessageDelta] | type[ReasonThinkingDelta], int] = {}
        self._text: list[str] = []
        self._thinking: list[str] = []
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

    def add_text(self, piece: str) -> None:
        self._text.append(piece)
        self._add(OutputMessageDelta, piece)

    def add_thinking(self, piece: str) -> None:
        self._thinking.append(piece)
        self._add(ReasonThinkingDelta, piece)

    def _add(self, kind: type[OutputMessageDelta] | type[ReasonThinkingDelta], piece: str) -> None:
        if self._task is not None and self._task.done():
            self._task.result()  # raises what ended it
        self._pending.setdefault(kind, []).append(piece)
        self._pending_characters += len(piece)
        self._something.set()
        if self._pending_characters >= BATCH_CHARACTERS:
            self._enough.set()

    async def _write_batches(self) -> None:
        while True:
            await self._something.wait()
            events = self._take()
            if events:
                await self._state.append(self._ref, events)
            elif self._closing:
                return
            if self._closing:
                continue
            try:
                async with asyncio.timeout(BATCH_SECONDS):
                    await self._enough.wait()
            except TimeoutError:
                pass

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
                started = ReasonThinkingStarted(turn_id=self._ref.turn_id, model=self._model)
                events.append(self._event(started))
            events.append(
                self._event(kind(turn_id=self._ref.turn_id, message_id=self._message_id, delta=delta, offset=offset))
            )
        return events

    def _event(self, payload: EventPayload) -> NewEvent:
        return NewEvent(data=payload, context=self._context)
