"""Writes a model's stream into the log: small batches, in order, the first piece at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final

import msgspec

from activities.output_gate import OutputGate, Piece
from domain.capabilities import GuardrailHit, OutputReplacement
from domain.events import (
    EventContext,
    EventPayload,
    GuardrailTriggered,
    NewEvent,
    OutputMessageDelta,
    OutputMessageReplaced,
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

    With a gate, what it holds back is not written; `settle` is then due before the answer is put together.
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
        make_gate: Callable[[str], OutputGate] | None = None,
    ) -> None:
        self._make_gate = make_gate
        self._gate = make_gate(text) if make_gate else None
        self._told: list[NewEvent] = []
        """To be written with the next batch, after its text."""
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

    @property
    def replacement(self) -> OutputReplacement | None:
        """Set once a guard has ended the answer."""
        return None if self._gate is None else self._gate.replacement

    def may_be_shown(self, text: str) -> bool:
        return self._gate is None or self._gate.is_blameless(text)

    async def settle(self) -> None:
        """Nothing more comes: let out what was held back, or nothing of it."""
        await self._pass_gate(finished=True)

    async def began(self, response_id: str, cursor: int) -> None:
        """A generation that another worker can resume; stored at once, so that none is ever started twice."""
        self._response_id = response_id
        self._cursor = cursor
        await self._state.append(self._ref, [], self._note())

    async def restart(self) -> None:
        """What was to be resumed is gone: the text so far is void, and clients are told."""
        void = len(self.text)
        self._text, self._thinking = [], []
        self._gate = self._make_gate("") if self._make_gate else None
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
        if answer.replacement is not None:
            # With the note, in one transaction: either both are known to the next attempt, or neither.
            key = f"output.message.replaced:{self._message_id}:{self._ref.attempt}"
            self._tell(self._replaced(answer.replacement), key)

    def add_text(self, piece: str, cursor: int | None = None) -> None:
        self._take_in(Piece("text", piece, cursor))

    def add_own_text(self, text: str) -> None:
        """Text of the engine, not of the model."""
        self._let_out(Piece("text", text, None))

    def add_thinking(self, piece: str, cursor: int | None = None) -> None:
        self._take_in(Piece("thinking", piece, cursor))

    def _take_in(self, piece: Piece) -> None:
        if self._gate is None:
            self._let_out(piece)
            return
        self._raise_failure()
        self._gate.add(piece)
        self._something.set()

    async def _pass_gate(self, *, finished: bool = False) -> None:
        if self._gate is None:
            return
        released = await self._gate.release(finished=finished)
        for piece in released.pieces:
            self._let_out(piece)
        for hit in released.hits:
            self._tell(
                self._triggered(hit), f"guardrail.triggered:{self._ref.exec_id}:{hit.capability_id}:{hit.check_id}"
            )

    def _let_out(self, piece: Piece) -> None:
        if piece.kind == "text":
            self._text.append(piece.text)
            self._add(OutputMessageDelta, piece.text, piece.cursor)
        else:
            self._thinking.append(piece.text)
            self._add(ReasonThinkingDelta, piece.text, piece.cursor)

    def _tell(self, payload: EventPayload, dedupe_key: str) -> None:
        self._told.append(NewEvent(data=payload, context=self._context, dedupe_key=dedupe_key))
        self._something.set()
        self._enough.set()

    def _replaced(self, replacement: OutputReplacement) -> OutputMessageReplaced:
        return OutputMessageReplaced(
            turn_id=self._ref.turn_id,
            message_id=self._message_id,
            guardrail_capability_id=replacement.capability_id,
            guardrail_id=replacement.guardrail_id,
            reason_code=replacement.reason_code,
            replacement=replacement.replacement,
        )

    def _triggered(self, hit: GuardrailHit) -> GuardrailTriggered:
        return GuardrailTriggered(
            turn_id=self._ref.turn_id,
            capability_id=hit.capability_id,
            check_id=hit.check_id,
            stage=hit.stage,
            action=hit.action,
            reason_code=hit.reason_code,
            message_id=self._message_id,
        )

    def _raise_failure(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()  # raises what ended it

    def _add(self, kind: type[OutputMessageDelta] | type[ReasonThinkingDelta], piece: str, cursor: int | None) -> None:
        self._raise_failure()
        self._pending.setdefault(kind, []).append(piece)
        self._cursor = cursor or self._cursor
        self._pending_characters += len(piece)
        self._something.set()
        if self._pending_characters >= BATCH_CHARACTERS:
            self._enough.set()

    async def _write_batches(self) -> None:
        while True:
            await self._something.wait()
            if not self._closing:
                await self._pass_gate()
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
        told, self._told = self._told, []
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
        return [*events, *told]

    def _event(self, payload: EventPayload) -> NewEvent:
        return NewEvent(data=payload, context=self._context)
