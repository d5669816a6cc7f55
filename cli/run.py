"""The long-running commands: server, worker, and dev, which is both plus everything they need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog
from msgspec import Struct

from cli.engine import SEARCH_ATTRIBUTE_TYPES, choose_dev_model, foundation, server_role, worker_role
from db.database import Database
from infra.child_processes import Child, ChildProcesses
from infra.embedded_postgres import EmbeddedPostgres
from infra.http_server import bind
from infra.logging import configure_logging
from infra.settings import ListenAddress, Settings, load_settings
from infra.temporal_server import TemporalDevServer

DEV_ENVIRONMENT: Final = {"DEV_MODE": "true"}

log = structlog.get_logger(__name__)


class StartFailure(Exception):
    """A command could not start; the message is for the person at the terminal."""


class DevAddresses(Struct, frozen=True, kw_only=True):
    """Where the parts of a running dev stack are; what `--ready-file` holds."""

    api: str
    docs: str
    temporal: str
    temporal_ui: str | None
    database_url: str
    pid: int
    ready_seconds: float
    postgres_pid: int
    temporal_pid: int
    environment: dict[str, str]
    """Variables under which `everruns worker` and `everruns server` join this stack."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set. A second signal is left to do what it does by itself."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def asked(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def until(stop: asyncio.Event, *failures: asyncio.Future[None]) -> None:
    """Wait for the stop event; a part that fails ends the wait with its error."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *failures}, return_when=asyncio.FIRST_COMPLETED)
        for future in done - {stopping}:
            await future
    finally:
        stopping.cancel()


def bound(address: ListenAddress) -> socket.socket:
    try:
        return bind(address.host, address.port)
    except OSError as error:
        raise StartFailure(
            f"cannot listen on {address}: {error.strerror or error}. Set HTTP_ADDR to another address."
        ) from error


async def run_server(settings: Settings) -> None:
    """API and streams, until a signal comes."""
    listener = bound(settings.http_addr)
    with stop_on_signals() as stop:
        async with foundation(settings) as base, server_role(base, listener, eager=False):
            if settings.deployment_grade == "dev":
                await choose_dev_model(base.database)
            log.info("server is ready", address=str(settings.http_addr))
            await until(stop)
            log.info("server is stopping")


async def run_worker(settings: Settings) -> None:
    """Turns and steps, until a signal comes."""
    with stop_on_signals() as stop:
        async with foundation(settings) as base, worker_role(base) as failure:
            log.info("worker is ready", turns=settings.temporal_turns_queue, steps=settings.temporal_steps_queue)
            await until(stop, failure)
            log.info("worker is stopping")


async def run_migrate(settings: Settings) -> list[str]:
    assert settings.database_url is not None, "load_settings refuses a missing DATABASE_URL outside dev mode"
    async with Database.opened(settings.database_url, pool_size=2) as database:
        printed = await database.migrate()
        if settings.deployment_grade == "dev":
            await choose_dev_model(database)
    return printed


@contextlib.asynccontextmanager
async def embedded_stack(
    environ: Mapping[str, str], *, data_dir: Path | None, died: asyncio.Future[None]
) -> AsyncIterator[tuple[Settings, EmbeddedPostgres, TemporalDevServer]]:
    """PostgreSQL and Temporal as our children, and settings that point at them. Raises `StartFailure`."""

    def child_died(child: Child) -> None:
        if not died.done():
            died.set_exception(
                StartFailure(f"{child.name} ended unexpectedly (exit {child.exit_code}).\n{child.log_tail()}")
            )

    async with ChildProcesses(on_unexpected_exit=child_died) as children:
        postgres = EmbeddedPostgres(children, None if data_dir is None else data_dir / "postgres")
        temporal = TemporalDevServer(
            children,
            None if data_dir is None else data_dir / "temporal.db",
            search_attributes=dict.fromkeys(SEARCH_ATTRIBUTE_TYPES, "Keyword"),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(postgres.start())
            group.create_task(temporal.start())
        settings = load_settings(environ)
        yield (
            msgspec.structs.replace(
                settings,
                database_url=postgres.dsn(),
                database_unpooled_url=postgres.dsn(),
                temporal_address=temporal.address,
                temporal_namespace="default",
                temporal_api_key=None,
                temporal_tls=False,
            ),
            postgres,
            temporal,
        )


async def run_dev(
    environ: Mapping[str, str],
    *,
    address: ListenAddress | None,
    data_dir: Path | None,
    ready_file: Path | None,
    with_worker: bool,
    announce: bool = True,
) -> None:
    """Everything in one command, until a signal comes or a part fails."""
    started = time.monotonic()
    environ = {**environ, **DEV_ENVIRONMENT}
    settings = load_settings(environ)
    configure_logging(settings.log_level, settings.log_format)
    where = address or settings.http_addr
    listener = bound(where)
    with stop_on_signals() as stop:
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:
            settings, postgres, temporal = await stack.enter_async_context(
                embedded_stack(environ, data_dir=data_dir, died=died)
            )
            assert settings.database_url is not None, "the embedded server has an address"
            async with Database.opened(settings.database_url, pool_size=2) as database:
                await database.migrate()
                await choose_dev_model(database)
            base = await stack.enter_async_context(foundation(settings))
            failures: list[asyncio.Future[None]] = [died]
            if with_worker:
                failures.append(await stack.enter_async_context(worker_role(base)))
            await stack.enter_async_context(server_role(base, listener, eager=with_worker))
            origin = f"http://{ListenAddress(host=where.host, port=listener.getsockname()[1])}"
            addresses = DevAddresses(
                api=f"{origin}{settings.api_prefix}",
                docs=f"{origin}/api-doc",
                temporal=temporal.address,
                temporal_ui=temporal.ui_url,
                database_url=settings.database_url,
                pid=os.getpid(),
                ready_seconds=round(time.monotonic() - started, 2),
                postgres_pid=postgres.child.pid,
                temporal_pid=temporal.child.pid,
                environment={
                    "DEPLOYMENT_GRADE": "dev",
                    "DATABASE_URL": settings.database_url,
                    "TEMPORAL_ADDRESS": temporal.address,
                },
            )
            if ready_file is not None:
                _write_whole(ready_file, addresses)
            if announce:
                _announce(addresses, data_dir)
            try:
                await until(stop, *failures)
            finally:
                if announce:
                    print("\nStopping …", flush=True)


def _write_whole(path: Path, addresses: DevAddresses) -> None:
    """A reader sees the whole file or none."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(msgspec.to_builtins(addresses)))
    unfinished.replace(path)


def _announce(addresses: DevAddresses, data_dir: Path | None) -> None:
    kept = f"kept in {data_dir}" if data_dir is not None else "gone when this stops (--data-dir DIR keeps it)"
    rows = [
        ("API", addresses.api),
        ("API docs", addresses.docs),
        ("Temporal Web UI", addresses.temporal_ui or "off"),
        ("Temporal", addresses.temporal),
        ("Data", kept),
    ]
    print(f"\nEverruns is ready after {addresses.ready_seconds:.1f} s\n")
    for name, value in rows:
        print(f"  {name:<16} {value}")
    host = urlsplit(addresses.api).netloc
    print(f"\n  Try it:  curl -s {host}/health    Stop it:  Ctrl-C\n", flush=True)
