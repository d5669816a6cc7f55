"""Text as a reader sees it: without invisible characters, in one case, and compatible forms (ｆｕｌｌ ｗｉｄｔｈ) made plain.

Each folded character knows where it came from, so that a find can be told in the text's own positions. Letters of other alphabets
that only look alike stay what they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from msgspec import Struct


class FoldedText(Struct, frozen=True):
    """`places[i]` is where character `i` of `text` stands in the original, which has `length` characters."""

    text: str
    places: Sequence[int]
    length: int

    def place(self, index: int) -> int:
        return self.places[index] if index < len(self.places) else self.length

    def end_of(self, index: int) -> int:
        """Where the original of the folded text before `index` ends."""
        return self.places[index - 1] + 1 if index else 0


def folded(text: str, *, case_sensitive: bool = False, keep: Callable[[str], bool] | None = None) -> FoldedText:
    """`keep` says which folded characters count at all."""
    if keep is None and text.isascii():
        return FoldedText(text if case_sensitive else text.lower(), range(len(text)), len(text))
    characters: list[str] = []
    places: list[int] = []
    for place, original in enumerate(text):
        plain = original if original.isascii() else unicodedata.normalize("NFKC", original)
        for one in plain if case_sensitive else plain.casefold():
            if unicodedata.category(one) != "Cf" and (keep is None or keep(one)):
                characters.append(one)
                places.append(place)
    return FoldedText("".join(characters), places, len(text))


class Phrases:
    """Fixed texts to be found in folded text. Knows how much of a text's end may be the beginning of one."""

    def __init__(self, phrases: Sequence[str]) -> None:
        self._phrases = tuple(phrase for phrase in phrases if phrase)
        self._beginnings = {phrase[:end] for phrase in self._phrases for end in range(1, len(phrase))}
        self._longest = max((len(phrase) for phrase in self._phrases), default=0)

    def find(self, text: str) -> tuple[int, int] | None:
        """The first one, from where to where."""
        found = [(place, place + len(phrase)) for phrase in self._phrases if (place := text.find(phrase)) >= 0]
        return min(found, default=None)

    def open_from(self, text: str) -> int:
        """Where a phrase begins that the text's end may be a part of; the text's length when there is none."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                return len(text) - size
        return len(text)
