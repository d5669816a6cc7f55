"""From the log to messages: the list a client reads and the prompt a model reads.

The two differ in one thing. A client sees messages where they were posted. A model must see a steering message where it was
first *read*, otherwise it would stand between a tool call and its result, or before an answer that did not know it. The
receipts are the `input_message_ids` of `turn.started`, `reason.started` and `turn.cancelled`.
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


def conversation_of(
    events: Iterable[StoredEvent], *, truncated: bool = False, question: Sequence[Message] = ()
) -> list[Message]:
    """The legal history a model gets: each message where it was read, each tool result right after its call.

    With `truncated`, the events begin in the middle of a session: what comes before the first message whose receipt or whole
    answer is among them is left out, so that no result stands without its call. `question`, the messages the running turn
    began with, is put in front when it was left out.
    """
    unread: dict[str, Message] = {}
    results: dict[str, Message] = {}
    slots: list[Message | ToolCallPart] = []
    started = not truncated
    for event in events:
        match event.type:
            case "input.message":
                message = _input.decode(event.data).message
                if message.metadata is not None and message.metadata.get(SYNTHETIC):
                    if started:
                        slots.append(message)
                else:
                    unread[message.id] = message
            case "turn.started" | "reason.started" | "turn.cancelled":
                read = [unread.pop(key) for key in _receipt.decode(event.data).input_message_ids if key in unread]
                started = started or bool(read)
                slots.extend(read)
            case "output.message.completed":
                started = True
                message = _output.decode(event.data).message
                slots.append(message)
                slots.extend(message.tool_calls)
            case "tool.completed" if started:
                result = tool_result_message(event, "")
                part = result.content[0]
                if isinstance(part, ToolResultPart):
                    results[part.tool_call_id] = result
            case _:
                pass
    messages: list[Message] = []
    for slot in slots:
        if isinstance(slot, ToolCallPart):
            # Repair runs before every reason step, so a missing result means the call belongs to a step still open.
            messages.append(results.get(slot.id) or _missing_result(slot))
        elif slot.content:
            messages.append(slot)
    kept = {message.id for message in messages}
    return [*(message for message in question if message.id not in kept), *messages]


def _missing_result(call: ToolCallPart) -> Message:
    return Message(
        id="",
        role=Role.TOOL_RESULT,
        content=[ToolResultPart(tool_call_id=call.id, error="The status of this call is unknown. Do not repeat it.")],
        created_at="",
    )
