"""Between a model and the log: what guards have not seen yet, or hold back, is not written.

Pieces leave in the order they came and whole, because a piece carries the provider's cursor: a generation that is resumed gets
again exactly what was not written. What is held back when a step is cut short is never shown.

Thinking is watched like text, by guards of its own for each stretch of it. When they object, that thinking is not shown any
further; the answer goes on, as it may well be blameless.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal

from msgspec import Struct

from domain.capabilities import GuardrailHit, OutputGuard, OutputReplacement

THREAD_CHARACTERS: Final = 4_096
"""Longer pieces are looked at in a thread: the slowest patterns get through half a megabyte a second."""

Kind = Literal["text", "thinking"]


class Piece(Struct, frozen=True):
    kind: Kind
    text: str
    cursor: int | None


class Released(Struct, frozen=True, kw_only=True):
    pieces: Sequence[Piece]
    hits: Sequence[GuardrailHit] = ()


class _Watched:
    """One text and its guards."""

    def __init__(self, guards: Sequence[OutputGuard]) -> None:
        self._guards = guards
        self.length = 0
        self.shown = 0
        self.replacement: OutputReplacement | None = None

    async def feed(self, piece: str, *, finished: bool = False) -> list[GuardrailHit]:
        if self.replacement is not None:
            return []
        self.length += len(piece)
        if finished or len(piece) > THREAD_CHARACTERS:
            return await asyncio.to_thread(self._feed, piece, finished)
        return self._feed(piece, finished)

    def _feed(self, piece: str, finished: bool) -> list[GuardrailHit]:
        hits: list[GuardrailHit] = []
        shown = self.length
        for guard in self._guards:
            verdict = guard.feed(piece, finished=finished)
            hits += verdict.hits
            shown = min(shown, verdict.shown)
            if verdict.replacement is not None:
                self.replacement = verdict.replacement
                break
        self.shown = max(self.shown, shown if self.replacement is None else self.shown)
        return hits


class OutputGate:
    """For one call of a model. `shown` is what stands in the log already, when a generation is resumed."""

    def __init__(self, make_guards: Callable[[], list[OutputGuard]], shown: str = "") -> None:
        self._make_guards = make_guards
        self._text = _Watched(make_guards())
        self._thinking = _Watched(make_guards())
        self._arrived: deque[Piece] = deque()
        self._held: deque[tuple[Piece, _Watched, int]] = deque()
        self._before = shown
        self._lock = asyncio.Lock()

    @property
    def replacement(self) -> OutputReplacement | None:
        return self._text.replacement

    def add(self, piece: Piece) -> None:
        self._arrived.append(piece)

    async def release(self, *, finished: bool = False) -> Released:
        """What may be written by now; with `finished`, nothing more comes."""
        async with self._lock:
            hits: list[GuardrailHit] = []
            if self._before:
                before, self._before = self._before, ""
                hits += await self._text.feed(before)
            while run := self._run():
                hits += await self._look(run)
            if finished:
                hits += await self._thinking.feed("", finished=True)
                hits += await self._text.feed("", finished=True)
            return Released(pieces=self._leaving(), hits=hits)

    def is_blameless(self, text: str) -> bool:
        """Of a text that is shown apart from the answer."""
        return all(guard.feed(text, finished=True).replacement is None for guard in self._make_guards())

    def _run(self) -> list[Piece]:
        """Arrived pieces of one kind."""
        run: list[Piece] = []
        while self._arrived and (not run or self._arrived[0].kind == run[0].kind):
            run.append(self._arrived.popleft())
        return run

    async def _look(self, run: list[Piece]) -> list[GuardrailHit]:
        hits: list[GuardrailHit] = []
        if run[0].kind == "text" and self._thinking.length:
            hits += await self._thinking.feed("", finished=True)
            self._thinking = _Watched(self._make_guards())
        watched = self._text if run[0].kind == "text" else self._thinking
        place = watched.length
        for piece in run:
            place += len(piece.text)
            self._held.append((piece, watched, place))
        return hits + await watched.feed("".join(piece.text for piece in run))

    def _leaving(self) -> list[Piece]:
        leaving: list[Piece] = []
        while self._held:
            piece, watched, end = self._held[0]
            if end > watched.shown:
                if watched.replacement is None or piece.kind == "text":
                    break
                # Thinking that was objected to is gone, and holds nothing else up.
                piece = Piece(piece.kind, "", piece.cursor)
            self._held.popleft()
            leaving.append(piece)
        return leaving
