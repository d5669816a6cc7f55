"""The long-running commands: server, worker, and dev, which is both plus everything they need."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg
import msgspec
import structlog
from msgspec import Struct
from rich.console import Console
from temporalio.service import RPCError

from cli.engine import (
    SEARCH_ATTRIBUTE_TYPES,
    Foundation,
    choose_dev_model,
    foundation,
    keyring_of,
    server_role,
    worker_role,
)
from cli.keys import dev_key, missing_keys, write_private
from db.database import Database
from infra.child_processes import Child, ChildProcesses
from infra.embedded_postgres import EmbeddedPostgres
from infra.encryption import CURRENT_KEY, PREVIOUS_KEY
from infra.http_server import bind
from infra.logging import configure_logging
from infra.settings import ListenAddress, Settings, load_settings, mask_passwords
from infra.temporal_client import CORE_LOGGER, configure_temporal_logging, connect_temporal
from infra.temporal_server import TemporalDevServer
from infra.temporal_worker import promote

DEV_ENVIRONMENT: Final = {"DEV_MODE": "true"}

CONNECT_SECONDS: Final = 10.0
"""How long a database may take to answer before a command gives up; a firewall that drops packets never answers."""

WILDCARD_HOSTS: Final = ("0.0.0.0", "::")

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
    """Variables under which `everruns worker` and `everruns server` join this stack; empty ones undo what may be set.

    They hold the key to the stack's secrets."""

    def __repr__(self) -> str:
        return f"DevAddresses(api={self.api!r}, pid={self.pid})"


class DevStack(Struct, frozen=True, kw_only=True):
    """A running dev stack and its parts; `failures` are futures that fail when one of them does."""

    addresses: DevAddresses
    children: ChildProcesses
    foundation: Foundation
    failures: list[asyncio.Future[None]]


def in_progress(what: str) -> contextlib.AbstractContextManager[object]:
    """Shows on a terminal that something goes on; writes nothing elsewhere."""
    return Console(stderr=True).status(what)


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


def spare_the_collector() -> None:
    """Take what start-up made out of the garbage collector's rounds, and let these come less often.

    A full round walks every module and type there is; with the default thresholds they came with every few turns and showed
    in the 99th percentile (270 -> 113 ms measured with long histories).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def until(stop: asyncio.Event, *failures: asyncio.Future[None]) -> None:
    """Wait for the stop event; a part that fails ends the wait with its error."""
    spare_the_collector()
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


async def check_database(settings: Settings, *, migrated: bool = True) -> None:
    """Say in one line what is wrong with the database, before anything else is started. Raises `StartFailure`."""
    assert settings.database_url is not None, "load_settings refuses a missing DATABASE_URL outside dev mode"
    shown = mask_passwords(settings.database_url)
    try:
        async with asyncio.timeout(CONNECT_SECONDS), Database.opened(settings.database_url, pool_size=1) as database:
            if migrated and not await database.applied_migrations():
                raise StartFailure(f"DATABASE_URL: {shown!r} has no schema yet; run `everruns migrate` first")
    except asyncpg.UndefinedTableError:
        raise StartFailure(f"DATABASE_URL: {shown!r} has no schema yet; run `everruns migrate` first") from None
    except TimeoutError as error:
        raise StartFailure(f"DATABASE_URL: no answer from {shown!r} within {CONNECT_SECONDS:.0f} s") from error
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartFailure(f"DATABASE_URL: no connection to {shown!r}: {error or type(error).__name__}") from error


async def check_keys(settings: Settings) -> None:
    """Refuse to start without the keys to what is stored: it would come out in the middle of a turn. Raises `StartFailure`."""
    assert settings.database_url is not None, "load_settings refuses a missing DATABASE_URL outside dev mode"
    try:
        async with Database.opened(settings.database_url, pool_size=1) as database:
            problem = await missing_keys(database, keyring_of(settings))
    except (asyncpg.UndefinedColumnError, asyncpg.UndefinedTableError):
        shown = mask_passwords(settings.database_url)
        raise StartFailure(f"DATABASE_URL: {shown!r} has an older schema; run `everruns migrate` first") from None
    if problem is not None:
        raise StartFailure(problem)


async def run_server(settings: Settings) -> None:
    """API and streams, until a signal comes."""
    listener = bound(settings.http_addr)
    configure_temporal_logging()
    with stop_on_signals() as stop:
        await check_database(settings)
        await check_keys(settings)
        async with foundation(settings) as base, server_role(base, listener, eager=False):
            if settings.deployment_grade == "dev":
                await choose_dev_model(base.database, settings)
            log.info("server is ready", address=str(settings.http_addr))
            await until(stop)
            log.info("server is stopping")


async def run_worker(settings: Settings) -> None:
    """Turns and steps, until a signal comes."""
    configure_temporal_logging()
    with stop_on_signals() as stop:
        await check_database(settings)
        await check_keys(settings)
        async with foundation(settings) as base, worker_role(base) as failure:
            log.info("worker is ready", turns=settings.temporal_turns_queue, steps=settings.temporal_steps_queue)
            await until(stop, failure)
            log.info("worker is stopping")


async def run_promote(settings: Settings, build_id: str) -> None:
    client = await connect_temporal(settings)
    try:
        await promote(client, build_id)
    except RPCError as error:
        raise StartFailure(f"version `{build_id}` cannot become current: {error.message}") from error


async def run_migrate(settings: Settings) -> list[str]:
    await check_database(settings, migrated=False)
    assert settings.database_url is not None, "load_settings refuses a missing DATABASE_URL outside dev mode"
    async with Database.opened(settings.database_url, pool_size=2) as database:
        with in_progress("Bringing the schema up to date"):
            printed = await database.migrate()
        if settings.deployment_grade == "dev":
            await choose_dev_model(database, settings)
    return printed


@contextlib.asynccontextmanager
async def embedded_stack(
    environ: Mapping[str, str], *, data_dir: Path | None, died: asyncio.Future[None]
) -> AsyncIterator[tuple[Settings, ChildProcesses, EmbeddedPostgres, TemporalDevServer]]:
    """PostgreSQL and Temporal as our children, and settings that point at them. Raises `StartFailure`."""

    def child_died(child: Child) -> None:
        if not died.done():
            # At once: stopping the rest takes a while, and that is when the reason would come.
            log.error("stopping, because a server ended unexpectedly", server=child.name, exit_code=child.exit_code)
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
            starting = group.create_task(postgres.start())
            if data_dir is not None and (data_dir / "postgres").exists():
                # It refuses a directory in use; Temporal would take the running server's work over.
                await starting
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
                secrets_encryption_key=settings.secrets_encryption_key or dev_key(data_dir),
            ),
            children,
            postgres,
            temporal,
        )


@contextlib.asynccontextmanager
async def dev_stack(
    environ: Mapping[str, str], listener: socket.socket, *, data_dir: Path | None, with_worker: bool
) -> AsyncIterator[DevStack]:
    """Embedded servers, schema, API on the bound socket and, unless it runs elsewhere, a worker. Raises `StartFailure`."""
    started = time.monotonic()
    host, port = listener.getsockname()[:2]
    origin = f"http://{ListenAddress(host='localhost' if host in WILDCARD_HOSTS else host, port=port)}"
    # Links have to lead to this server, wherever it was told to listen.
    environ = {"PUBLIC_APP_URL": origin, **{name: value for name, value in environ.items() if value.strip()}}
    died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with contextlib.AsyncExitStack() as stack:
        settings, children, postgres, temporal = await stack.enter_async_context(
            embedded_stack(environ, data_dir=data_dir, died=died)
        )
        assert settings.database_url is not None, "the embedded server has an address"
        async with Database.opened(settings.database_url, pool_size=2) as database:
            await database.migrate()
            await choose_dev_model(database, settings)
            problem = await missing_keys(database, keyring_of(settings))
            if problem is not None:
                # Here a refusal would be a dead end: nothing else can open this database to set the secrets anew.
                log.warning(problem)
        base = await stack.enter_async_context(foundation(settings))
        failures: list[asyncio.Future[None]] = [died]
        if with_worker:
            failures.append(await stack.enter_async_context(worker_role(base)))
        await stack.enter_async_context(server_role(base, listener, eager=with_worker))
        yield DevStack(
            addresses=DevAddresses(
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
                    "DEV_MODE": "",
                    "DEPLOYMENT_GRADE": "dev",
                    "DATABASE_URL": settings.database_url,
                    "DATABASE_UNPOOLED_URL": "",
                    "TEMPORAL_ADDRESS": temporal.address,
                    "TEMPORAL_NAMESPACE": settings.temporal_namespace,
                    "TEMPORAL_TURNS_QUEUE": settings.temporal_turns_queue,
                    "TEMPORAL_STEPS_QUEUE": settings.temporal_steps_queue,
                    "TEMPORAL_API_KEY": "",
                    "TEMPORAL_TLS": "",
                    "TEMPORAL_TLS_CERT": "",
                    "TEMPORAL_TLS_KEY": "",
                    "TEMPORAL_TLS_CA": "",
                    **_keys_of(settings),
                },
            ),
            children=children,
            foundation=base,
            failures=failures,
        )


async def run_dev(
    environ: Mapping[str, str],
    *,
    address: ListenAddress | None,
    data_dir: Path | None,
    ready_file: Path | None,
    with_worker: bool,
) -> None:
    """Everything in one command, until a signal comes or a part fails."""
    environ = {**environ, **DEV_ENVIRONMENT}
    settings = load_settings(environ)
    configure_logging(settings.log_level, settings.log_format)
    listener = bound(address or settings.http_addr)
    configure_temporal_logging()
    with stop_on_signals() as stop:
        async with contextlib.AsyncExitStack() as running:
            with in_progress("Starting PostgreSQL, Temporal and the API"):
                stack = await running.enter_async_context(
                    dev_stack(environ, listener, data_dir=data_dir, with_worker=with_worker)
                )
            if ready_file is not None:
                write_private(ready_file, json.dumps(msgspec.to_builtins(stack.addresses)))
            _announce(stack.addresses, data_dir)
            try:
                await until(stop, *stack.failures)
            finally:
                print("\nStopping …", flush=True)
                # What the SDK says about a server that is being stopped under it is of no use to anybody.
                CORE_LOGGER.setLevel(logging.CRITICAL)


def _keys_of(settings: Settings) -> dict[str, str]:
    keys = {CURRENT_KEY: settings.secrets_encryption_key, PREVIOUS_KEY: settings.secrets_encryption_key_previous}
    return {name: "" if key is None else key.reveal() for name, key in keys.items()}


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
