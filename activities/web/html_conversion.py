"""The parent's side of `html_child`: one short-lived process per page, killed when it takes too long or nobody waits any more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from infra.tool_processes import tool_process

CHILD: Final = Path(__file__).with_name("html_child.py")
CONVERSION_SECONDS: Final = 10.0
MAX_CONVERSIONS: Final = 4
"""At the same time in one worker; a page of 5 MiB takes a core for some seconds."""


class ConversionFailed(Exception):
    """The page could not be converted within the limits"""


class Converted(Struct, frozen=True, kw_only=True):
    title: str | None
    content: str
    is_cut: bool


class HtmlConverter:
    def __init__(self, *, seconds: float = CONVERSION_SECONDS, child: Path = CHILD) -> None:
        self._seconds = seconds
        self._child = child
        self._slots = asyncio.Semaphore(MAX_CONVERSIONS)

    async def convert(self, page: str, *, markdown: bool, main_only: bool, base_url: str) -> Converted:
        """Raises `ConversionFailed`."""
        request = msgspec.json.encode(
            {"page": page, "markdown": markdown, "main_only": main_only, "base_url": base_url}
        )
        try:
            async with asyncio.timeout(self._seconds), self._slots:
                answer = await self._run(request)
            return msgspec.json.decode(answer, type=Converted)
        except (TimeoutError, OSError, msgspec.MsgspecError):
            raise ConversionFailed from None

    async def _run(self, request: bytes) -> bytes:
        async with tool_process(self._child) as child:
            answer, _ = await child.communicate(request)
        if child.returncode != 0:
            raise ConversionFailed
        return answer
