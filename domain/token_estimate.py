"""How many tokens a prompt will be, without a tokenizer: vendors' vocabularies cannot be had offline.

Raw estimates count bytes. What a session's provider counted for the last prompt calibrates them (`session_state.token_ratio`),
so that the error does not grow with the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from domain.messages import ImageFilePart, ImagePart, Message, TextPart, ToolCallPart, ToolResultPart
from domain.tools import ToolDefinition

BYTES_PER_TOKEN: Final = 3.6
"""Of JSON and prose mixed, with today's vocabularies; code and other scripts than Latin deviate, hence the calibration."""

MESSAGE_TOKENS: Final = 4
"""What a message costs besides its content."""

IMAGE_TOKENS: Final = 1_000
"""An image of about a megapixel; what it really costs depends on its size, which is not known here."""


def text_tokens(text: str) -> int:
    return round(len(text.encode()) / BYTES_PER_TOKEN)


def message_tokens(message: Message) -> int:
    return MESSAGE_TOKENS + sum(_part_tokens(part) for part in message.content)


def tool_tokens(tool: ToolDefinition) -> int:
    return MESSAGE_TOKENS + text_tokens(tool.name + tool.description) + _json_tokens(tool.parameters)


def prompt_tokens(messages: Sequence[Message], tools: Sequence[ToolDefinition]) -> int:
    """The raw estimate of a whole request."""
    return sum(map(message_tokens, messages)) + sum(map(tool_tokens, tools))


def _part_tokens(part: object) -> int:
    match part:
        case TextPart():
            return text_tokens(part.text)
        case ImagePart() | ImageFilePart():
            return IMAGE_TOKENS
        case ToolCallPart():
            return text_tokens(part.name) + _json_tokens(part.arguments)
        case ToolResultPart():
            return text_tokens(part.error) if part.error else _json_tokens(part.result)
        case _:
            return 0


def _json_tokens(value: object) -> int:
    return round(len(msgspec.json.encode(value)) / BYTES_PER_TOKEN)
