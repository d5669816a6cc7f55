"""How many tokens a prompt will be, without a tokenizer: vendors' vocabularies cannot be had offline.

Raw estimates count kinds of characters, because bytes alone are off by a factor of two and more between prose, JSON, keys and
scripts other than Latin. What a session's provider counted for the last prompt calibrates them (`session_state.token_ratio`), so
that the error does not grow with the conversation. A megabyte takes about ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from domain.messages import ImageFilePart, ImagePart, Message, TextPart, ToolCallPart, ToolResultPart
from domain.tools import ToolDefinition

LETTERS_PER_TOKEN: Final = 3.8
"""Of words of the Latin alphabet, the space before them included."""
DIGITS_PER_TOKEN: Final = 2.0
SIGNS_PER_TOKEN: Final = 1.6
"""Punctuation: alone in prose, two or three together in JSON and code."""
DENSE_PER_TOKEN: Final = 1.7
"""Letters and digits that are no words: base64, keys, hashes."""
DENSE_RUN: Final = 24
"""Letters and digits between two breaks, on average, from which on a text holds no words."""
TOKENS_PER_TWO_BYTES: Final = 0.4
"""A character of two bytes: accented letters, Greek, Cyrillic, Hebrew, Arabic."""
TOKENS_PER_THREE_BYTES: Final = 0.8
"""Chinese, Japanese, Korean, the scripts of India and South East Asia."""
TOKENS_PER_FOUR_BYTES: Final = 2.0
"""Emoji and rare characters."""

_LETTER, _SPACE, _DIGIT, _SIGN, _TWO, _THREE, _FOUR, _CONTINUATION = range(8)


def _kind(byte: int) -> int:
    """Of a byte of UTF-8."""
    if byte >= 0x80:
        return _CONTINUATION if byte < 0xC0 else _TWO if byte < 0xE0 else _THREE if byte < 0xF0 else _FOUR
    character = chr(byte)
    if character.isalpha():
        return _LETTER
    if character.isspace():
        return _SPACE
    return _DIGIT if character.isdigit() else _SIGN


_KINDS: Final = bytes(_kind(byte) for byte in range(256))

MESSAGE_TOKENS: Final = 4
"""What a message costs besides its content."""

IMAGE_TOKENS: Final = 1_000
"""An image of about a megapixel; what it really costs depends on its size, which is not known here."""


def text_tokens(text: str) -> int:
    """At least 1, except for no text at all."""
    return _tokens(text.encode(errors="replace"))


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
    return text_tokens(value) if isinstance(value, str) else _tokens(msgspec.json.encode(value))


def _tokens(utf8: bytes) -> int:
    if not utf8:
        return 0
    kinds = utf8.translate(_KINDS)
    letters, digits = kinds.count(_LETTER), kinds.count(_DIGIT)
    spaces, signs = kinds.count(_SPACE), kinds.count(_SIGN)
    tokens = signs / SIGNS_PER_TOKEN
    if letters + digits > DENSE_RUN * (spaces + signs + 1):
        tokens += (letters + digits) / DENSE_PER_TOKEN
    else:
        tokens += letters / LETTERS_PER_TOKEN + digits / DIGITS_PER_TOKEN
    if letters + digits + spaces + signs < len(kinds):
        tokens += kinds.count(_TWO) * TOKENS_PER_TWO_BYTES
        tokens += kinds.count(_THREE) * TOKENS_PER_THREE_BYTES
        tokens += kinds.count(_FOUR) * TOKENS_PER_FOUR_BYTES
    return max(1, round(tokens))
