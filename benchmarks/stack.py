"""Starts what is measured: `everruns dev` as a process of its own, workers and the bare comparison beside it.

Every cell has a stack of its own, so that none inherits another's memory, backlog or history.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import asyncpg
import msgspec

from benchmarks.client import Api, Json
from benchmarks.measurement import CpuClock, cpu_seconds, tree_cpu_seconds
from cli.run import DevAddresses
from db.event_log import EventLog
from domain.events import StoredEvent
from infra.child_processes import Child, ChildProcesses
from infra.network import LOOPBACK, free_port

EVERRUNS: Final = Path(sys.executable).with_name("everruns")
START_SECONDS: Final = 60.0
ENVIRONMENT: Final[Mapping[str, str]] = {
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "warning",
    "SSE_PER_SESSION_MAX": "2000",
    "SSE_PER_ORG_MAX": "5000",
    "SSE_GLOBAL_MAX": "5000",
}

ONE_TOOL_SCRIPT: Final[Json] = {
    "mode": "script",
    "turns": [{"text": "Let me add.", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}]}, {"text": "5"}],
}
"""reason → act → reason, without a delay anywhere."""


class NoReaders:
    """Publishes to nobody: what this process appends reaches readers by PostgreSQL's notification."""

    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        pass


class Stack:
    """`async with Stack() as stack`; `api` is a connection to its API, `log` its event log."""

    def __init__(self, *, worker: bool = True, environment: Mapping[str, str] | None = None) -> None:
        self._worker = worker
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._exit = contextlib.AsyncExitStack()
        self._extra: dict[str, Callable[[], float]] = {}
        self._started = 0

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everruns-bench-")))
            self._children = await stack.enter_async_context(ChildProcesses())
            ready = self._directory / "ready.json"
            arguments = ["dev", "--addr", f"{LOOPBACK}:{free_port()}", "--ready-file", str(ready)]
            dev = await self._start("dev", [*arguments, *([] if self._worker else ["--no-worker"])], {})
            deadline = time.monotonic() + START_SECONDS
            while not await asyncio.to_thread(ready.exists):
                if dev.exit_code is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"everruns dev did not start:\n{dev.log_tail()}")
                await asyncio.sleep(0.02)
            self.addresses = msgspec.json.decode(ready.read_bytes(), type=DevAddresses)
            self.pid = self.addresses.pid
            self.base = f"{self.addresses.api}/v1"
            self.api = await stack.enter_async_context(Api(self.base))
            self.pool = await stack.enter_async_context(
                asyncpg.create_pool(self.addresses.database_url, min_size=1, max_size=10)
            )
            self.log = EventLog(self.pool, NoReaders())
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._exit.aclose()

    async def start_worker(self) -> Child:
        return await self._start("worker", ["worker"], self.addresses.environment)

    async def _start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        self._started += 1
        log_path = self._directory / f"{name}-{self._started}.log"
        child = await self._children.start(
            name, [EVERRUNS, *arguments], env={**self._environment, **environment}, log_path=log_path, grace_seconds=15
        )
        pid = child.pid
        self._extra[f"{name}-{self._started}"] = lambda: cpu_seconds(pid)
        return child

    def count_in(self, name: str, pid: int) -> None:
        """Another process of ours, for the CPU account."""
        self._extra[name] = lambda: cpu_seconds(pid)

    async def another_api(self) -> Api:
        """A connection of its own, for a client beside the others; closed with the stack."""
        return await self._exit.enter_async_context(Api(self.base))

    def cpu_clock(self) -> CpuClock:
        temporal, postgres, own = self.addresses.temporal_pid, self.addresses.postgres_pid, os.getpid()
        return CpuClock(
            {
                "temporal": lambda: cpu_seconds(temporal),
                "postgres": lambda: tree_cpu_seconds(postgres),
                "everruns": lambda: cpu_seconds(self.pid),
                "client": lambda: cpu_seconds(own),
                **{name: read for name, read in self._extra.items() if name != "dev-1"},
            }
        )

    async def create_session_with(self, script: Json, name: str, **body: object) -> Json:
        """The body of a session whose model plays this script in every turn."""
        providers = msgspec.json.decode(await self.api.get("/providers"), type=dict)["data"]
        provider = next(one["id"] for one in providers if one["provider_type"] == "llmsim")
        model = {"model_id": name, "display_name": name, "options": {"script": script}}
        model_id = await self.api.create(f"/providers/{provider}/models", model)
        return {"harness_name": "base", "model_id": model_id, "capabilities": [{"ref": "test_math"}], **body}
