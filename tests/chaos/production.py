"""The engine in its production shape: PostgreSQL, Temporal, API and workers are processes of their own, each to be killed alone.

`everruns dev` ends with an error when PostgreSQL or Temporal dies under it, because they are its own. Here somebody else
brings them back, at the same addresses and with their data, as a cluster or an operator would.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import asyncpg
import httpx

from cli.engine import SEARCH_ATTRIBUTE_TYPES
from cli.run import DevAddresses
from db.event_log import EventLog
from infra.child_processes import Child, ChildProcesses
from infra.embedded_postgres import EmbeddedPostgres
from infra.network import LOOPBACK, free_port
from infra.temporal_server import TemporalDevServer
from tests.stack import START_SECONDS, WAIT_SECONDS, Stack, _Nobody


class ProductionStack(Stack):
    """`dev` is the API process; it can be killed and started again at its address."""

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everruns-chaos-")))
            self._children = await stack.enter_async_context(ChildProcesses())
            data_dir = self._children.temporary_directory("everruns-data-")
            # Started by root, PostgreSQL runs as another account, which has to get in.
            data_dir.chmod(0o755)
            self.postgres = EmbeddedPostgres(self._children, data_dir / "postgres", listen_port=0)
            self.temporal_server = TemporalDevServer(
                self._children,
                data_dir / "temporal" / "temporal.db",
                ui=False,
                search_attributes=dict.fromkeys(SEARCH_ATTRIBUTE_TYPES, "Keyword"),
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(self.postgres.start())
                group.create_task(self.temporal_server.start())
            port = free_port()
            self.database_url = self.postgres.dsn()
            self.addresses = DevAddresses(
                api=f"http://{LOOPBACK}:{port}/api",
                docs="",
                temporal=self.temporal_server.address,
                temporal_ui=None,
                database_url=self.database_url,
                pid=os.getpid(),
                ready_seconds=0,
                postgres_pid=self.postgres.child.pid,
                temporal_pid=self.temporal_server.child.pid,
                environment={
                    "DEPLOYMENT_GRADE": "dev",
                    "DATABASE_URL": self.database_url,
                    "TEMPORAL_ADDRESS": self.temporal_server.address,
                    "HTTP_ADDR": f"{LOOPBACK}:{port}",
                },
            )
            self.api = f"{self.addresses.api}/v1"
            migrating = await self._start("migrate", ["migrate"], {**self._environment, **self.addresses.environment})
            assert await migrating.wait() == 0, migrating.log_tail()
            self.client = await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=self.api + "/",
                    timeout=httpx.Timeout(WAIT_SECONDS),
                    limits=httpx.Limits(max_connections=None),
                    trust_env=False,
                )
            )
            await self.start_api()
            self._pool = await stack.enter_async_context(asyncpg.create_pool(self.database_url, min_size=1, max_size=4))
            self.log = EventLog(self._pool, _Nobody())
            self._exit = stack.pop_all()
        return self

    async def start_api(self, environment: Mapping[str, str] | None = None) -> None:
        self.dev = await self._start(
            "server", ["server"], {**self._environment, **self.addresses.environment, **(environment or {})}
        )
        self.pid = self.dev.pid
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.dev.exit_code is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{self.dev.log_tail()}")
            with contextlib.suppress(httpx.TransportError):
                if (await self.client.get(f"{self.addresses.api.removesuffix('/api')}/health")).is_success:
                    return
            await asyncio.sleep(0.02)

    async def restart_api(self, environment: Mapping[str, str] | None = None) -> None:
        """SIGKILL, then a new process at the same address."""
        await self.kill(self.dev)
        await self.start_api(environment)

    async def outage(self, server: EmbeddedPostgres | TemporalDevServer, *, seconds: float) -> None:
        """SIGKILL a server and bring it back, with its data, after so long."""
        await _killed(server.child)
        await server.stop()
        await asyncio.sleep(seconds)  # what is simulated is exactly this: time that passes without it
        await server.start()


async def _killed(child: Child) -> None:
    child.stopping = True
    child.send_signal(signal.SIGKILL)
    await child.wait()
