"""A script's output: streamed while it runs, in pieces of a reasonable size, and shown in its result."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final, Literal

from activities.files.reading import beginning
from activities.files.results import json_bytes
from activities.shell.script_run import Stream
from domain.capabilities import ToolContext

STREAM_INTERVAL_SECONDS: Final = 0.2
"""Each piece is an event that is stored: a loop of a thousand `echo` is to be a handful of them."""
PIECE_MAX_CHARACTERS: Final = 16 * 1024
STREAMED_MAX_CHARACTERS: Final = 256 * 1024
KEPT_MAX_CHARACTERS: Final = 1024 * 1024
"""Of each stream: bashkit's own limit, which counts for what its limits cut off too."""

OutputMode = Literal["auto", "silent", "concise", "normal", "verbose", "full"]
_SHOWN_BYTES: Final[dict[OutputMode, int]] = {
    "silent": 0,
    "concise": 2 * 1024,
    "normal": 16 * 1024,
    "verbose": 32 * 1024,
    "full": 44 * 1024,
}
_TAIL_SHARE: Final = 3
"""A third of what is shown is the end, where errors stand."""


class ScriptOutput:
    """Collects what a script writes, and passes it on while `streaming`."""

    def __init__(self, context: ToolContext) -> None:
        self._context = context
        self._kept: dict[Stream, list[str]] = {"stdout": [], "stderr": []}
        self._kept_characters: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self._pending: list[tuple[Stream, str]] = []
        self._left = STREAMED_MAX_CHARACTERS
        self._has_pending = asyncio.Event()
        self._is_done = asyncio.Event()

    def add(self, stream: Stream, text: str) -> None:
        kept = text[: KEPT_MAX_CHARACTERS - self._kept_characters[stream]]
        self._kept[stream].append(kept)
        self._kept_characters[stream] += len(kept)
        if self._left > 0:
            streamed = text[: self._left]
            self._left -= len(streamed)
            self._pending.append((stream, streamed))
            self._has_pending.set()

    def text(self, stream: Stream) -> str:
        return "".join(self._kept[stream])

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        passing_on = asyncio.create_task(self._pass_on())
        try:
            yield
        except asyncio.CancelledError:
            passing_on.cancel()
            raise
        finally:
            self._is_done.set()
            self._has_pending.set()
            await asyncio.wait([passing_on])
        passing_on.result()

    async def _pass_on(self) -> None:
        while self._pending or not self._is_done.is_set():
            await self._has_pending.wait()
            await self._flush()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_done.wait(), STREAM_INTERVAL_SECONDS)

    async def _flush(self) -> None:
        self._has_pending.clear()
        while self._pending:
            stream, text = self._next_piece()
            await self._context.output(text, stream)

    def _next_piece(self) -> tuple[Stream, str]:
        """As much as is of one stream, in the order in which it came."""
        stream = self._pending[0][0]
        texts: list[str] = []
        size = 0
        while self._pending and self._pending[0][0] == stream and size < PIECE_MAX_CHARACTERS:
            text = self._pending.pop(0)[1]
            taken = text[: PIECE_MAX_CHARACTERS - size]
            if len(taken) < len(text):
                self._pending.insert(0, (stream, text[len(taken) :]))
            texts.append(taken)
            size += len(taken)
        return stream, "".join(texts)


def shown_bytes(mode: OutputMode, *, failed: bool) -> int:
    if mode == "auto":
        mode = "verbose" if failed else "normal"
    return _SHOWN_BYTES[mode]


def shown(stdout: str, stderr: str, max_bytes: int) -> tuple[str, str]:
    """Both within `max_bytes` of JSON; errors may take half of it, or what output leaves."""
    half = max_bytes // 2
    errors = excerpt(stderr, max(half, max_bytes - json_bytes(stdout)))
    return excerpt(stdout, max_bytes - (json_bytes(errors) if errors else 0)), errors


def excerpt(text: str, max_bytes: int) -> str:
    """Beginning and end of a text that does not fit."""
    if json_bytes(text) <= max_bytes or not text:
        return text
    if max_bytes < 200:
        return ""
    room = max_bytes - 100
    tail = beginning(text[::-1], room // _TAIL_SHARE)[::-1]
    head = beginning(text[: len(text) - len(tail)], room - room // _TAIL_SHARE)
    return f"{head}\n[… {len(text) - len(head) - len(tail):,} characters left out …]\n{tail}"
