"""From the log to prompts: where a conversation may be cut, what survives a cut, and how tool outputs are masked."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.clock import timestamp
from domain.conversation import UNMASKED_CHARACTERS, Conversation, conversation_of, messages_of
from domain.events import (
    EventPayload,
    InputMessage,
    OutputMessageCompleted,
    ReasonStarted,
    StoredEvent,
    ToolCompleted,
    ToolStatus,
    TurnStarted,
)
from domain.messages import Message, Role, TextPart, ToolCallPart, ToolResultPart

NOW = datetime(2026, 11, 21, tzinfo=UTC)
SUMMARY = Message(id="summary", role=Role.USER, content=[TextPart(text="so far")], created_at="")
LONG = "word " * 100


class LogBuilder:
    """A legal log, as the engine writes it: of its events only those that prompts are made of."""

    def __init__(self) -> None:
        self.events: list[StoredEvent] = []
        self.unread: list[str] = []
        self.turn_inputs: list[str] = []
        self.open_calls: list[str] = []
        self._count = 0

    def _append(self, payload: EventPayload) -> int:
        sequence = len(self.events) + 1
        self.events.append(
            StoredEvent(
                id=f"event_{sequence:032x}",
                type=payload.event_type,
                ts=NOW,
                session_id="session",
                sequence=sequence,
                context=b"{}",
                data=msgspec.json.encode(payload),
            )
        )
        return sequence

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def post(self, text: str = "hello") -> str:
        message = Message(
            id=self._name("input"), role=Role.USER, content=[TextPart(text=text)], created_at=timestamp(NOW)
        )
        self._append(InputMessage(message=message))
        self.unread.append(message.id)
        return message.id

    def start_turn(self, taken: int = 1) -> None:
        taken = max(1, taken)
        while len(self.unread) < taken:
            self.post()
        read, self.unread = self.unread[:taken], self.unread[taken:]
        self.turn_inputs = read
        self._append(TurnStarted(turn_id="turn", input_message_id=read[0], input_message_ids=read))

    def start_step(self, *, reads: bool = False) -> None:
        read = self.unread if reads else []
        self.unread = [] if reads else self.unread
        self._append(ReasonStarted(harness_id="harness", input_message_ids=read or None))

    def answer(self, text: str = "fine", calls: int = 0) -> None:
        parts = [ToolCallPart(id=self._name("call"), name="look", arguments={}) for _ in range(calls)]
        self.open_calls = [part.id for part in parts]
        message = Message(
            id=self._name("output"),
            role=Role.AGENT,
            content=[TextPart(text=text), *parts],
            created_at=timestamp(NOW),
        )
        self._append(OutputMessageCompleted(message=message))

    def settle(self, text: str = LONG, *, error: bool = False) -> None:
        for call in self.open_calls:
            self._append(
                ToolCompleted(
                    tool_call_id=call,
                    tool_name="look",
                    success=not error,
                    status=ToolStatus.ERROR if error else ToolStatus.SUCCESS,
                    result=None if error else [TextPart(text=text)],
                    error=text if error else None,
                )
            )
        self.open_calls = []


@st.composite
def logs(draw: st.DrawFn) -> LogBuilder:
    """Turns of several steps, with calls, steering and messages that wait for a later turn."""
    log = LogBuilder()
    small = st.integers(0, 2)
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(small)):
            log.post()
        log.start_turn(draw(st.integers(1, 2)))
        for step in range(draw(st.integers(1, 3))):
            log.start_step(reads=step > 0 and draw(st.booleans()))
            for _ in range(draw(small)):
                log.post()
            log.answer(calls=draw(small))
            log.settle(error=draw(st.booleans()))
    log.start_turn(draw(st.integers(1, 2)))
    for step in range(draw(st.integers(0, 2))):
        log.start_step(reads=step > 0 and draw(st.booleans()))
        log.answer(calls=draw(small))
        log.settle()
    log.start_step(reads=draw(st.booleans()))
    return log


def inputs(log: LogBuilder, ids: list[str]) -> list[Message]:
    return [message for message in messages_of(log.events) if message.id in ids]


def assert_legal(messages: list[Message]) -> None:
    """Each call is answered at once, by its own result; there is no result without a call."""
    waiting: list[str] = []
    for message in messages:
        if message.role is Role.TOOL_RESULT:
            part = message.content[0]
            assert isinstance(part, ToolResultPart)
            assert waiting
            assert part.tool_call_id == waiting.pop(0)
            assert message.created_at
            continue
        assert waiting == []
        waiting = [call.id for call in message.tool_calls]
    assert waiting == []


@given(logs())
def test_a_cut_never_separates_a_call_from_its_result_and_keeps_the_question(log: LogBuilder) -> None:
    conversation = conversation_of(log.events)
    assert_legal(conversation.messages)
    assert conversation.boundaries
    for boundary in conversation.boundaries:
        cut = conversation.cut(boundary, [SUMMARY])
        assert cut.messages[0] == SUMMARY
        assert_legal(cut.messages)
        ids = [message.id for message in cut.messages if message.id]
        assert len(ids) == len(set(ids))
        assert set(log.turn_inputs) <= set(ids)


@given(logs())
@settings(max_examples=50)
def test_what_is_read_after_a_cut_is_what_the_cut_made_in_memory(log: LogBuilder) -> None:
    conversation = conversation_of(log.events)
    question = inputs(log, log.turn_inputs)
    for boundary in conversation.boundaries:
        cut = conversation.cut(boundary, [SUMMARY])
        carried = [event for event in log.events if event.sequence in boundary.carried]
        later = [event for event in log.events if event.sequence >= boundary.sequence]
        read = conversation_of([*carried, *later], question=question, lead=[SUMMARY])
        assert read.messages == cut.messages
        assert read.lead == cut.lead
        assert [one.sequence for one in read.boundaries if one.index > read.lead] == [
            one.sequence for one in cut.boundaries if one.index > cut.lead
        ]
        # And once more: checkpoints build on each other.
        for again in cut.boundaries:
            assert read.cut(again, [SUMMARY]).messages == cut.cut(again, [SUMMARY]).messages


@given(logs(), st.integers(0, 60))
def test_masks_hide_only_what_stands_before_them_and_never_change_again(log: LogBuilder, before: int) -> None:
    conversation = conversation_of(log.events)
    masked = conversation.masked(before)
    assert_legal(masked.messages)
    for message, hidden in zip(conversation.messages, masked.messages, strict=True):
        if message.role is not Role.TOOL_RESULT:
            assert hidden == message
            continue
        part, covered = message.content[0], hidden.content[0]
        assert isinstance(part, ToolResultPart)
        assert isinstance(covered, ToolResultPart)
        assert (covered == part) == (conversation.results[part.tool_call_id] >= before)
        assert (covered.error is None) == (part.error is None)
    assert masked.masked(before).messages == masked.messages
    if conversation.boundaries:
        last = conversation.boundaries[-1]
        assert masked.cut(last, []).messages == conversation.cut(last, []).masked(before).messages


def test_a_message_posted_before_the_cut_and_read_after_it_survives() -> None:
    log = LogBuilder()
    log.post("first")
    log.start_turn()
    log.start_step()
    log.post("steering")
    log.answer()
    log.start_step(reads=True)
    conversation = conversation_of(log.events)
    boundary = conversation.boundaries[-1]
    assert [message.text for message in conversation.messages] == ["first", "fine", "steering"]
    assert boundary.carried == (4,)
    cut = conversation.cut(boundary, [SUMMARY])
    assert [message.text for message in cut.messages] == ["so far", "first", "steering"]


def test_there_is_no_boundary_while_a_call_is_open() -> None:
    log = LogBuilder()
    log.start_turn()
    log.start_step()
    log.answer(calls=1)
    log.start_step()
    assert [one.sequence for one in conversation_of(log.events).boundaries] == [3]


def test_a_boundary_at_the_beginning_of_a_turn_says_so() -> None:
    log = LogBuilder()
    for _ in range(2):
        log.start_turn()
        log.start_step()
        log.answer()
    found = [(one.index, one.opens_turn) for one in conversation_of(log.events).boundaries]
    assert found == [(1, False), (2, True), (3, False)]


def test_a_mask_names_the_tool_and_the_size_and_short_outputs_stay() -> None:
    log = LogBuilder()
    log.start_turn()
    log.start_step()
    log.answer(calls=1)
    log.settle("x" * (UNMASKED_CHARACTERS + 1))
    log.start_step()
    log.answer(calls=1)
    log.settle("x" * UNMASKED_CHARACTERS)
    masked = conversation_of(log.events).masked(1_000)
    first, second = (message.content[0] for message in masked.messages if message.role is Role.TOOL_RESULT)
    assert isinstance(first, ToolResultPart)
    assert isinstance(second, ToolResultPart)
    assert first.result == (
        "[The output of look (201 characters) was removed to save space. Call the tool again if it is needed.]"
    )
    assert second.result == "x" * UNMASKED_CHARACTERS


def test_a_truncated_log_keeps_checkpoint_question_and_boundaries_in_order() -> None:
    log = LogBuilder()
    log.post("question")
    log.start_turn()
    log.start_step()
    log.answer(calls=1)
    log.settle()
    log.start_step()
    log.answer("more", calls=1)
    log.settle()
    log.start_step()
    kept = [event for event in log.events if event.sequence >= 5]
    read = conversation_of(kept, truncated=True, question=inputs(log, log.turn_inputs), lead=[SUMMARY])
    assert [message.text for message in read.messages] == ["so far", "question", "more", ""]
    assert read.lead == 2
    assert [(one.index, one.sequence) for one in read.boundaries] == [(4, 9)]
    assert_legal(read.messages)


def test_an_empty_log_is_an_empty_conversation() -> None:
    assert conversation_of([]) == Conversation(messages=[])
