"""Reads the JSON that models mean: what they get wrong is read in the only way it can be meant, or not at all.

Forgiven are Markdown fences, an object inside a JSON string, the same object twice, single and typographic quotes around strings,
names without quotes, commas too many, Python's `True`, `False` and `None`, comments, and line breaks inside strings. A text that
simply ends is completed, and marked as cut off: what is missing there, nobody knows.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Struct

MAX_CHARACTERS: Final = 1_000_000
MAX_DEPTH: Final = 64

_FENCE: Final = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\n?(.*?)\n?```", re.DOTALL)
_SPACE: Final = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*.*?\*/)+", re.DOTALL)
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![A-Za-z0-9_.])")
_NAME: Final = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")
_LOW_HALF: Final = re.compile(r"\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
_QUOTES: Final = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_WORDS: Final[dict[str, object]] = {
    "true": True,
    "false": False,
    "null": None,
    "True": True,
    "False": False,
    "None": None,
}
_ESCAPES: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Salvaged(Struct, frozen=True, kw_only=True):
    value: dict[str, object]
    cut_off: bool


class _Unreadable(Exception):
    pass


def salvaged(text: str) -> Salvaged | None:
    """The object; None when there is none, or more than one reading."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.strip().removeprefix("\ufeff")
    if text.startswith("```"):
        fenced = _FENCE.fullmatch(text)
        text = (fenced[1] if fenced else text.partition("\n")[2]).strip()
    try:
        return _objects(text)
    except _Unreadable:
        return None


def _objects(text: str, *, inner: bool = False) -> Salvaged:
    reader = _Reader(text)
    values: list[object] = []
    while not reader.at_end():
        values.append(reader.value(0))
        # Between several objects a model may put a comma.
        reader.skip(",")
    if len(values) == 1 and isinstance(values[0], str) and not inner:
        return _objects(values[0].strip(), inner=True)
    # Some servers put an empty object in front of the one that was meant.
    full = [value for value in values if value != {}] or values[:1]
    if not full or any(value != full[0] for value in full):
        raise _Unreadable
    value = full[0]
    if not isinstance(value, dict):
        raise _Unreadable
    return Salvaged(value=value, cut_off=reader.cut_off)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self.cut_off = False

    def at_end(self) -> bool:
        self._skip_space()
        return self._place >= len(self._text)

    def skip(self, character: str) -> bool:
        self._skip_space()
        if not self._text.startswith(character, self._place):
            return False
        self._place += 1
        return True

    def value(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise _Unreadable
        if self.at_end():
            self.cut_off = True
            return None
        one = self._text[self._place]
        if one == "{":
            return self._object(depth)
        if one == "[":
            return self._array(depth)
        if one in _QUOTES:
            return self._string()
        if number := _NUMBER.match(self._text, self._place):
            self._place = number.end()
            # The last digits of a number may be missing without a trace.
            self.cut_off = self.cut_off or self._place >= len(self._text)
            return msgspec.json.decode(number[0])
        return self._word()

    def _object(self, depth: int) -> dict[str, object]:
        self._place += 1
        found: dict[str, object] = {}
        while True:
            while self.skip(","):
                pass
            if self._closed("}"):
                return found
            name = self._name()
            if not self.skip(":"):
                if not self.at_end():
                    raise _Unreadable
                self.cut_off = True
                return found
            if self.at_end():
                self.cut_off = True
                return found
            if name in found:
                raise _Unreadable
            found[name] = self.value(depth + 1)
            if not self._goes_on("}"):
                raise _Unreadable

    def _array(self, depth: int) -> list[object]:
        self._place += 1
        found: list[object] = []
        while True:
            while self.skip(","):
                pass
            if self._closed("]"):
                return found
            found.append(self.value(depth + 1))
            if not self._goes_on("]"):
                raise _Unreadable

    def _closed(self, end: str) -> bool:
        if self.at_end():
            self.cut_off = True
            return True
        return self.skip(end)

    def _goes_on(self, end: str) -> bool:
        return self.at_end() or self._text[self._place] in (",", end)

    def _name(self) -> str:
        if self._text[self._place] in _QUOTES:
            return self._string()
        name = _NAME.match(self._text, self._place)
        if name is None:
            raise _Unreadable
        self._place = name.end()
        return name[0]

    def _word(self) -> object:
        name = _NAME.match(self._text, self._place)
        if name is None or name[0] not in _WORDS:
            raise _Unreadable
        self._place = name.end()
        return _WORDS[name[0]]

    def _string(self) -> str:
        end = _QUOTES[self._text[self._place]]
        self._place += 1
        out: list[str] = []
        while self._place < len(self._text):
            one = self._text[self._place]
            self._place += 1
            if one == end:
                return "".join(out)
            out.append(self._escaped() if one == "\\" else one)
        self.cut_off = True
        return "".join(out)

    def _escaped(self) -> str:
        if self._place >= len(self._text):
            self.cut_off = True
            return ""
        one = self._text[self._place]
        self._place += 1
        if one == "u":
            return self._unicode()
        if one in "\"'\\/":
            return one
        if one not in _ESCAPES:
            # `\d` may be meant as it stands, or be a mistake for something else.
            raise _Unreadable
        return _ESCAPES[one]

    def _unicode(self) -> str:
        digits = self._text[self._place : self._place + 4]
        if not re.fullmatch("[0-9A-Fa-f]{4}", digits):
            raise _Unreadable
        self._place += 4
        code = int(digits, 16)
        low = _LOW_HALF.fullmatch(self._text[self._place : self._place + 6])
        if 0xD800 <= code <= 0xDBFF and low:
            self._place += 6
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00)
        if 0xD800 <= code <= 0xDFFF:
            raise _Unreadable
        return chr(code)

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._place)
        if space:
            self._place = space.end()
