"""Tells this process's readers that a session's log has grown.

Two sources. Events committed by this process are handed over directly, contents included. Everything else comes as
PostgreSQL notifications, which carry `session:sequence` only, through one dedicated connection that survives being cut: after
every reconnect each reader is told to look for itself, because notifications of the meantime are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final, Protocol

import asyncpg
import structlog

from domain.events import StoredEvent
from domain.ids import Prefix

CHANNEL: Final = "everruns_events"
RECONNECT_FIRST_SECONDS: Final = 0.1
RECONNECT_MAX_SECONDS: Final = 5.0
CONNECTION_ERRORS: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What a server that is down, starting, stopping or gone in the middle of a sentence makes asyncpg raise."""
PROBE_SECONDS: Final = 15.0
"""A connection that died without a word (a NAT entry gone) is found out by a query this often."""

log = structlog.get_logger(__name__)


class Sink(Protocol):
    """A reader of one session."""

    def committed(self, events: Sequence[StoredEvent]) -> None:
        """These events were committed, in this order. Others may have been committed before them."""
        ...

    def advanced(self, sequence: int | None) -> None:
        """The log reaches at least this sequence; None when anything may have happened."""
        ...


class EventBus:
    def __init__(self) -> None:
        self._sinks: dict[str, list[Sink]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._connection: asyncpg.Connection | None = None

    def attach(self, session_id: str, sink: Sink) -> None:
        self._sinks.setdefault(session_id, []).append(sink)

    def detach(self, session_id: str, sink: Sink) -> None:
        sinks = self._sinks.get(session_id, [])
        with contextlib.suppress(ValueError):
            sinks.remove(sink)
        if not sinks:
            self._sinks.pop(session_id, None)

    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        if events:
            for sink in self._sinks.get(session_id, ()):
                sink.committed(events)

    async def listen(self, dsn: str) -> None:
        """Open the notification connection and keep it open until `close`. Raises when the first attempt fails."""
        connection = await self._connect(dsn)
        self._listener = asyncio.create_task(self._keep_listening(dsn, connection))

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener

    async def _connect(self, dsn: str) -> asyncpg.Connection:
        connection = await asyncpg.connect(dsn, timeout=10, server_settings={"application_name": "everruns-listener"})
        try:
            await connection.add_listener(CHANNEL, self._notified)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _keep_listening(self, dsn: str, connection: asyncpg.Connection) -> None:
        delay = RECONNECT_FIRST_SECONDS
        while True:
            try:
                await self._until_lost(connection)
                log.warning("event listener lost its connection")
            finally:
                connection.terminate()
            while True:
                try:
                    connection = await self._connect(dsn)
                except CONNECTION_ERRORS as error:
                    log.warning("event listener cannot connect", error=type(error).__name__, retry_in_seconds=delay)
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, RECONNECT_MAX_SECONDS)
                else:
                    break
            delay = RECONNECT_FIRST_SECONDS
            log.info("event listener is back")
            for sinks in list(self._sinks.values()):
                for sink in sinks:
                    sink.advanced(None)

    async def _until_lost(self, connection: asyncpg.Connection) -> None:
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        while not lost.is_set() and not connection.is_closed():
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await lost.wait()
            except TimeoutError:
                try:
                    await connection.fetchval("SELECT 1", timeout=PROBE_SECONDS)
                except CONNECTION_ERRORS:
                    return

    def _notified(self, connection: object, pid: int, channel: str, payload: object) -> None:
        session, _, sequence = str(payload).partition(":")
        sinks = self._sinks.get(f"{Prefix.SESSION}_{session}")
        if sinks and sequence.isdecimal():
            for sink in sinks:
                sink.advanced(int(sequence))
