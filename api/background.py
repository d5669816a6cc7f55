"""Work that no request waits for, never silently failing: what outlives its request (kept referenced while it runs, waited for at
shutdown), and what every server does over and over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

import structlog

from domain.errors import EverrunsError

log = structlog.get_logger(__name__)


async def repeat(
    work: Callable[[], Awaitable[object]], name: str, *, interval_seconds: float, first_seconds: float | None = None
) -> None:
    """Until cancelled. What a round could not do is left to the next one; the first comes after an interval, too, unless told."""
    await asyncio.sleep(interval_seconds if first_seconds is None else first_seconds)
    while True:
        try:
            await work()
        except EverrunsError as error:
            log.warning("recurring work is put off", work=name, error=error.message)
        except Exception:
            log.exception("recurring work failed; it is tried again", work=name)
        await asyncio.sleep(interval_seconds)


class BackgroundTasks:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(self._logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Coroutine[object, object, None], name: str) -> None:
        try:
            await work
        except EverrunsError as error:
            log.warning("background work failed", work=name, error=error.message)
        except Exception:
            log.exception("background work failed", work=name)

    async def close(self, timeout: float) -> None:
        """Give what runs a last chance to end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
        for task in self._tasks:
            task.cancel()
