"""Work that outlives its request: kept referenced while it runs, waited for at shutdown, never silently failing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from domain.errors import EverrunsError

log = structlog.get_logger(__name__)


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
