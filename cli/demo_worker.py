"""The demo's worker: a process of its own, so that it can be killed."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from cli.demo_story import DemoFailure
from infra.child_processes import Child, ChildProcesses


class Worker:
    """The one worker process; a supervisor owns it, so that it can't outlive the demo."""

    def __init__(self, children: ChildProcesses, environment: Mapping[str, str], log_path: Path) -> None:
        self._children = children
        self._environment = environment
        self._log_path = log_path
        self._child: Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    async def start(self) -> None:
        self._child = await self._children.start(
            "worker",
            [sys.executable, "-P", "-m", "cli.main", "worker"],
            env=self._environment,
            log_path=self._log_path,
            # Nothing in this stack outlives the demo, so there is nothing to end gracefully for.
            stop_signal=signal.SIGKILL,
            ends_by_itself=True,
        )
        self._watching = asyncio.create_task(self._watch(self._child))

    def unwatch(self) -> None:
        """From here on its end is expected."""
        if self._watching is not None:
            self._watching.cancel()

    async def kill(self) -> None:
        assert self._child is not None
        self.unwatch()
        self._child.send_signal(signal.SIGKILL)
        await self._child.wait()

    async def _watch(self, child: Child) -> None:
        code = await child.wait()
        if not self.failure.done():
            self.failure.set_exception(DemoFailure(f"the worker ended by itself (exit {code}).\n{child.log_tail()}"))
