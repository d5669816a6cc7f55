"""Holding a process still at an exact place, by real means only: a row lock in PostgreSQL, and a wire that stops carrying.

A worker is stopped *inside* a commit by a lock on the row that the transaction writes last, and *between* a commit and
Temporal's learning of it by a proxy in front of Temporal that passes nothing on any more. No code of the product knows that
it is being tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

import asyncpg

from domain.ids import Prefix, parse_id

POLL_SECONDS: Final = 0.05
LOOPBACK: Final = "127.0.0.1"
CHUNK_BYTES: Final = 65_536


async def eventually(what: str, condition: Callable[[], Awaitable[bool]], *, within_seconds: float = 30) -> None:
    """Wait until the condition holds; `what` names it in the failure."""
    deadline = time.monotonic() + within_seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {what}"
        await asyncio.sleep(POLL_SECONDS)


class HeldRow:
    """A row locked by a transaction of ours: whoever wants to write it waits, in the middle of its own transaction."""

    def __init__(self, connection: asyncpg.Connection, what: str) -> None:
        self._connection = connection
        self._what = what
        self._pid = connection.get_server_pid()

    async def has_waiter(self) -> bool:
        # Within a transaction, PostgreSQL shows the activity of the moment it was first asked for.
        await self._connection.execute("SELECT pg_stat_clear_snapshot()")
        waiting = await self._connection.fetchval(
            """SELECT count(*) FROM pg_stat_activity
               WHERE wait_event_type = 'Lock' AND $1 = ANY(pg_blocking_pids(pid))""",
            self._pid,
        )
        return waiting != 0

    async def hit(self, *, within_seconds: float = 30) -> None:
        """Return once somebody waits for the row."""
        await eventually(f"a transaction waits for {self._what}", self.has_waiter, within_seconds=within_seconds)

    async def release(self) -> None:
        if not self._connection.is_closed():
            await self._connection.close()


class FaultPoints:
    """Places in the product's transactions where it can be made to wait."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._held: list[HeldRow] = []

    async def hold_turn(self, session_id: str) -> HeldRow:
        """The running turn's row: written last by the commit of a reason step and by the end of a turn."""
        query = "SELECT id FROM turns WHERE session_id = $1 AND status = 'running' FOR UPDATE"
        return await self._hold(f"the turn of {session_id}", query, parse_id(Prefix.SESSION, session_id))

    async def hold_call(self, session_id: str, call_id: str) -> HeldRow:
        """A tool call's row: written when the call settles. Deltas and other events pass."""
        query = "SELECT call_id FROM tool_calls WHERE session_id = $1 AND call_id = $2 FOR UPDATE"
        return await self._hold(f"the call {call_id}", query, parse_id(Prefix.SESSION, session_id), call_id)

    async def attempt_of(self, session_id: str, call_id: str) -> int:
        """The attempt of a call that runs now: a repeated call leaves no event before it is done."""
        connection = await asyncpg.connect(self._database_url)
        try:
            query = "SELECT attempt FROM tool_calls WHERE session_id = $1 AND call_id = $2"
            return await connection.fetchval(query, parse_id(Prefix.SESSION, session_id), call_id) or 0
        finally:
            await connection.close()

    async def _hold(self, what: str, query: str, *arguments: object) -> HeldRow:
        connection = await asyncpg.connect(self._database_url)
        row = HeldRow(connection, what)
        self._held.append(row)
        await connection.execute("BEGIN")
        assert await connection.fetchval(query, *arguments) is not None, f"nothing to hold: {what}"
        return row

    async def release_all(self) -> None:
        for row in self._held:
            await row.release()


@contextlib.asynccontextmanager
async def fault_points(database_url: str) -> AsyncIterator[FaultPoints]:
    points = FaultPoints(database_url)
    try:
        yield points
    finally:
        await points.release_all()


class Wire:
    """A TCP connection to a server that the test can stop in the middle: what is sent from then on arrives nowhere."""

    def __init__(self, target: str) -> None:
        address = urlsplit(f"//{target}")
        self._host, self._port = address.hostname, address.port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"{LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accepted, LOOPBACK, 0)

    def freeze(self) -> None:
        """Carry nothing any more, in either direction; connections stay open, as when a cable is pulled."""
        self._flowing.clear()

    async def cut(self) -> None:
        """End every connection and take no new ones. What was on its way is lost."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            far_reader, upstream = await asyncio.open_connection(self._host, self._port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, upstream))
                group.create_task(self._carry(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.write_eof()


@contextlib.asynccontextmanager
async def wire(target: str) -> AsyncIterator[Wire]:
    """A wire to `host:port`."""
    opened = Wire(target)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.cut()
