"""How large this run is, and what its cells share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from benchmarks.client import Conversation
from benchmarks.measurement import CpuClock
from benchmarks.stack import ONE_TOOL_SCRIPT, Stack


class Scope:
    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.clocks: list[CpuClock] = []

    def count(self, full: int, *, quick: int) -> int:
        return quick if self.quick else full

    def seconds(self, full: float, *, quick: float) -> float:
        return quick if self.quick else full

    def stack(self, *, worker: bool = True, environment: Mapping[str, str] | None = None) -> Stack:
        return Stack(worker=worker, environment=environment)

    @contextlib.asynccontextmanager
    async def measured(self, clock: CpuClock) -> AsyncIterator[CpuClock]:
        """Account for the CPU time of what runs inside; the cell's share of others is the mean of all of these."""
        clock.start()
        try:
            yield clock
        finally:
            clock.stop()
            self.clocks.append(clock)

    @property
    def foreign_share(self) -> float:
        seconds = sum(clock.seconds for clock in self.clocks)
        return sum(clock.foreign_share * clock.seconds for clock in self.clocks) / seconds if seconds else 0.0

    @contextlib.asynccontextmanager
    async def conversations(self, stack: Stack, model: str, count: int) -> AsyncIterator[list[Conversation]]:
        """Sessions of the one-tool script, each with a connection and a stream of its own, as clients have them."""
        body = await stack.create_session_with(ONE_TOOL_SCRIPT, model)
        opened: list[Conversation] = []
        try:
            for _ in range(count):
                opened.append(await Conversation.begin(await stack.another_api(), body))
            yield opened
        finally:
            for conversation in opened:
                conversation.close()
            # The server notices closed streams a moment later; the next measurement should not pay for it.
            await asyncio.sleep(0.1)
