"""Texts of a server before anybody reads them: bounded, and without what tricks a terminal or a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

MAX_DESCRIPTION_CHARACTERS: Final = 4_000
MAX_LINE_CHARACTERS: Final = 500
REDACTED: Final = "[redacted]"

# Control characters but for tab and line feed, characters that change the direction of a line, invisible ones that hide text
# from people (tags, zero width, variation selectors' supplement), and lone surrogates.
_UNWANTED: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)


def clean(text: str, most: int | None = None) -> str:
    text = _UNWANTED.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text if most is None or len(text) <= most else f"{text[:most]}…"


def one_line(text: str, most: int = MAX_LINE_CHARACTERS) -> str:
    return clean(" ".join(text[: 4 * most].split()), most)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """A server may send back what it was sent."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return text
