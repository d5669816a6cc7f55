"""From the log to messages: the list a client reads and the prompt a model reads.

The two differ in one thing. A client sees messages where they were posted. A model must see a steering message where it was
first *read*, otherwise it would stand between a tool call and its result, or before an answer that did not know it. The
receipts are the `input_message_ids` of `turn.started`, `reason.started` and `turn.cancelled`; where a session was forked or
rewound, those of `session.forked` and `session.rewound`. What a rewind has hidden (`domain.rewinds`) is not among the events that
the functions here are given.

A prompt may also begin in the middle of the log, after a checkpoint (`domain.checkpoints`). It may be cut at `boundaries` only:
events at which every call so far has its result, so that a call and its result are kept or dropped together by construction. What
is read through `conversation_of` after a cut is exactly what `cut` made of it in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from domain.clock import timestamp
from domain.events import InputMessage, OutputMessageCompleted, StoredEvent, ToolCompleted
from domain.messages import Message, Role, TextPart, ToolCallPart, ToolResultPart

SYNTHETIC: Final = "synthetic"
"""Metadata key of messages the engine wrote itself (the notes around a cancel): they have no receipt."""

UNMASKED_CHARACTERS: Final = 200
"""A mask is about half as long: shorter results stay as they are, and so does a mask that is masked again."""

REWOUND_RESULT: Final = (
    "The conversation was taken back to a moment before this call had returned. Whether it took effect is unknown; "
    "check before you repeat it."
)

_input = msgspec.json.Decoder(InputMessage)
_output = msgspec.json.Decoder(OutputMessageCompleted)
_tool = msgspec.json.Decoder(ToolCompleted)


class _Receipt(Struct, frozen=True):
    input_message_ids: list[str] = []


_receipt = msgspec.json.Decoder(_Receipt)


def tool_result_message(event: StoredEvent, message_id: str) -> Message:
    completed = _tool.decode(event.data)
    result: object = None
    error = completed.error
    if completed.success:
        parts = completed.result or []
        only = parts[0] if len(parts) == 1 else None
        result = only.text if isinstance(only, TextPart) else msgspec.to_builtins(parts)
        error = None
    elif error is None:
        error = "The tool failed without a message."
    return Message(
        id=message_id,
        role=Role.TOOL_RESULT,
        content=[ToolResultPart(tool_call_id=completed.tool_call_id, result=result, error=error)],
        created_at=timestamp(event.ts),
    )


def messages_of(events: Iterable[StoredEvent]) -> list[Message]:
    """Every message in log order. Ids of tool results are derived from their event."""
    found: list[Message] = []
    for event in events:
        match event.type:
            case "input.message":
                found.append(_input.decode(event.data).message)
            case "output.message.completed":
                found.append(_output.decode(event.data).message)
            case "tool.completed":
                found.append(tool_result_message(event, "message_" + event.id.partition("_")[2]))
            case _:
                pass
    return found


class Boundary(Struct, frozen=True, kw_only=True):
    """Where a conversation may be cut: messages from number `index` on stand at or after event `sequence` of the log.

    `carried` are the inputs that were posted before that event and had not been read by then.
    """

    index: int
    sequence: int
    opens_turn: bool
    carried: tuple[int, ...] = ()


class Conversation(Struct, frozen=True, kw_only=True):
    """The legal history a model gets: each message where it was read, each tool result right after its call.

    `lead` counts the messages in front that do not stand there in the log: those of a checkpoint, and the question of the
    running turn when it was left out. `question` is what that turn began with. `results` says where in the log each tool result
    stands, by call id.
    """

    messages: list[Message]
    boundaries: list[Boundary] = []
    lead: int = 0
    question: list[Message] = []
    results: dict[str, int] = {}

    def cut(self, boundary: Boundary, lead: Sequence[Message]) -> Conversation:
        """Without the messages before the boundary; `lead` and the running turn's question stand for them."""
        rest = self.messages[boundary.index :]
        front = _in_front(lead, self.question, rest)
        moved = len(front) - boundary.index
        return Conversation(
            messages=[*front, *rest],
            boundaries=[
                msgspec.structs.replace(one, index=one.index + moved)
                for one in self.boundaries
                if one.index > boundary.index
            ],
            lead=len(front),
            question=self.question,
            results=self.results,
        )

    def masked(self, before: int) -> Conversation:
        """With a short text in place of every long tool result that stands before event `before` of the log."""
        if not any(place < before for place in self.results.values()):
            return self
        names: dict[str, str] = {}
        messages: list[Message] = []
        for message in self.messages:
            if message.role is Role.AGENT:
                names.update((call.id, call.name) for call in message.tool_calls)
            elif message.role is Role.TOOL_RESULT:
                message = _masked(message, names, self.results, before)
            messages.append(message)
        return msgspec.structs.replace(self, messages=messages)


class _Slot(Struct, frozen=True):
    """A boundary before it is known which slots become messages."""

    place: int
    sequence: int
    opens_turn: bool
    carried: tuple[int, ...]


def conversation_of(
    events: Iterable[StoredEvent],
    *,
    truncated: bool = False,
    question: Sequence[Message] = (),
    lead: Sequence[Message] = (),
) -> Conversation:
    """The conversation that these events, in the order of the log, amount to.

    With `truncated`, they begin somewhere in the middle of a session: what comes before the first message whose receipt or whole
    answer is among them is left out, so that no result stands without its call. `question`, the messages the running turn began
    with, is put in front when it was left out, and `lead` before that.
    """
    unread: dict[str, tuple[int, Message]] = {}
    results: dict[str, Message] = {}
    places: dict[str, int] = {}
    open_calls: set[str] = set()
    slots: list[Message | ToolCallPart] = []
    boundaries: list[_Slot] = []
    opening: list[Message] = []
    started = not truncated
    for event in events:
        match event.type:
            case "input.message":
                message = _input.decode(event.data).message
                if message.metadata is not None and message.metadata.get(SYNTHETIC):
                    if started:
                        slots.append(message)
                else:
                    unread[message.id] = event.sequence, message
            case "turn.started" | "reason.started" | "turn.cancelled" | "session.forked" | "session.rewound":
                opens_turn = event.type == "turn.started"
                if slots and not open_calls and event.type in ("turn.started", "reason.started"):
                    carried = tuple(sequence for sequence, _ in unread.values())
                    boundaries.append(_Slot(len(slots), event.sequence, opens_turn, carried))
                read = [unread.pop(key)[1] for key in _receipt.decode(event.data).input_message_ids if key in unread]
                started = started or bool(read)
                slots.extend(read)
                if opens_turn:
                    opening = read
                if event.type == "session.rewound":
                    # Their results are hidden: the conversation went back to a moment before they were there.
                    for call_id in open_calls:
                        results[call_id] = _rewound_result(call_id, event)
                        places[call_id] = event.sequence
                    open_calls.clear()
            case "output.message.completed":
                started = True
                message = _output.decode(event.data).message
                slots.append(message)
                calls = message.tool_calls
                slots.extend(calls)
                open_calls.update(call.id for call in calls)
            case "tool.completed" if started:
                result = tool_result_message(event, "")
                part = result.content[0]
                if isinstance(part, ToolResultPart):
                    results[part.tool_call_id] = result
                    places[part.tool_call_id] = event.sequence
                    open_calls.discard(part.tool_call_id)
            case _:
                pass
    return _put_together(slots, boundaries, results, places, list(question) or opening, lead)


def _put_together(
    slots: Sequence[Message | ToolCallPart],
    boundaries: Sequence[_Slot],
    results: dict[str, Message],
    places: dict[str, int],
    question: list[Message],
    lead: Sequence[Message],
) -> Conversation:
    messages: list[Message] = []
    counts: list[int] = []
    for slot in slots:
        counts.append(len(messages))
        if isinstance(slot, ToolCallPart):
            # Repair runs before every reason step, so a missing result means the call belongs to a step still open.
            messages.append(results.get(slot.id) or _missing_result(slot))
        elif slot.content:
            messages.append(slot)
    counts.append(len(messages))
    front = _in_front(lead, question, messages)
    return Conversation(
        messages=[*front, *messages],
        boundaries=[
            Boundary(
                index=len(front) + counts[one.place],
                sequence=one.sequence,
                opens_turn=one.opens_turn,
                carried=one.carried,
            )
            for one in boundaries
        ],
        lead=len(front),
        question=question,
        results=places,
    )


def _in_front(lead: Sequence[Message], question: Sequence[Message], rest: Sequence[Message]) -> list[Message]:
    kept = {message.id for message in rest}
    return [*lead, *(message for message in question if message.id not in kept)]


def _missing_result(call: ToolCallPart) -> Message:
    return Message(
        id="",
        role=Role.TOOL_RESULT,
        content=[ToolResultPart(tool_call_id=call.id, error="The status of this call is unknown. Do not repeat it.")],
        created_at="",
    )


def _rewound_result(call_id: str, event: StoredEvent) -> Message:
    return Message(
        id="",
        role=Role.TOOL_RESULT,
        content=[ToolResultPart(tool_call_id=call_id, error=REWOUND_RESULT)],
        created_at=timestamp(event.ts),
    )


def _masked(message: Message, names: dict[str, str], places: dict[str, int], before: int) -> Message:
    parts = [
        _masked_part(part, names.get(part.tool_call_id, "the tool"))
        if isinstance(part, ToolResultPart) and places.get(part.tool_call_id, before) < before
        else part
        for part in message.content
    ]
    return msgspec.structs.replace(message, content=parts)


def _masked_part(part: ToolResultPart, name: str) -> ToolResultPart:
    """The same for the same result, whenever it is made: providers' caches live on prompts that do not change."""
    value: object = part.result if part.error is None else part.error
    size = len(value) if isinstance(value, str) else len(msgspec.json.encode(value))
    if size <= UNMASKED_CHARACTERS:
        return part
    text = f"[The output of {name} ({size} characters) was removed to save space. Call the tool again if it is needed.]"
    failed = part.error is not None
    return ToolResultPart(
        tool_call_id=part.tool_call_id, result=None if failed else text, error=text if failed else None
    )
