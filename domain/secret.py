"""A value that must not be seen: it has no readable representation and no encoder takes it."""

from __future__ import annotations

from typing import final


@final
class Secret:
    """Holds a text. `reveal` is the only way to it, so that every use can be found by searching for that word."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret is not to be pickled")
