"""A whole running engine for tests: `everruns dev` as a process of its own, more workers and servers beside it, and a client.

Processes belong to `infra.child_processes`, so none survives the test run, however it ends. Nothing here looks into the
engine, except `read_log`, which reads the stored log for the invariant checker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import asyncpg
import httpx
import msgspec
from temporalio.client import Client

from cli.run import DevAddresses
from db.event_log import EventLog
from domain.events import StoredEvent
from domain.log_check import Violation, check_log
from infra.child_processes import Child, ChildProcesses
from infra.network import LOOPBACK, free_port
from infra.temporal_client import DATA_CONVERTER

EVERRUNS: Final = Path(__file__).parents[1] / ".venv" / "bin" / "everruns"

START_SECONDS: Final = 60.0
WAIT_SECONDS: Final = 30.0
"""Deadlines of a busy machine: a pass takes a fraction, and a failure may take its time."""

RECONNECT_SECONDS: Final = 0.1
READ_EVENTS: Final = 5_000

Json = dict[str, object]

TESTING: Final[Mapping[str, str]] = {
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "info",
    "SSE_PER_SESSION_MAX": "50",
    "SSE_PER_ORG_MAX": "1000",
}


class SeenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event as a client got it; `raw` is the whole JSON."""

    id: str
    type: str
    sequence: int
    data: Json
    raw: Json = {}


class _Nobody:
    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        pass


class Stack:
    """`async with Stack() as stack`. Every process writes to a file in `directory`, which is kept until the end."""

    def __init__(
        self,
        *,
        no_worker: bool = False,
        data_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._no_worker = no_worker
        self._data_dir = data_dir
        self._environment = {**os.environ, **TESTING, **(environment or {})}
        self._exit = contextlib.AsyncExitStack()
        self._started = 0
        self.workers: list[Child] = []

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everruns-stack-")))
            self._children = await stack.enter_async_context(ChildProcesses())
            ready = self.directory / "ready.json"
            arguments = ["dev", "--addr", f"{LOOPBACK}:{free_port()}", "--ready-file", str(ready)]
            if self._no_worker:
                arguments.append("--no-worker")
            if self._data_dir is not None:
                arguments += ["--data-dir", str(self._data_dir)]
            self.dev = await self._start("dev", arguments, self._environment)
            await self._until_exists(ready, self.dev)
            self.addresses = msgspec.json.decode(ready.read_bytes(), type=DevAddresses)
            self.api = f"{self.addresses.api}/v1"
            self.pid = self.addresses.pid
            self.database_url = self.addresses.database_url
            self.client = await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=self.api + "/",
                    timeout=httpx.Timeout(WAIT_SECONDS),
                    limits=httpx.Limits(max_connections=None),
                    trust_env=False,
                )
            )
            self.pool = await stack.enter_async_context(asyncpg.create_pool(self.database_url, min_size=1, max_size=4))
            self.log = EventLog(self.pool, _Nobody())
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._exit.aclose()

    # --- processes ----------------------------------------------------------------------------------------------------

    async def start_worker(self, environment: Mapping[str, str] | None = None) -> Child:
        """Another worker; its `pid` may be signalled, `stop` ends it gracefully."""
        child = await self._start(
            "worker", ["worker"], {**self._environment, **self.addresses.environment, **(environment or {})}
        )
        self.workers.append(child)
        return child

    async def start_server(self, environment: Mapping[str, str] | None = None) -> tuple[Child, str]:
        """Another API process and its base URL, ready to answer."""
        port = free_port()
        child = await self._start(
            "server",
            ["server"],
            {
                **self._environment,
                **self.addresses.environment,
                "HTTP_ADDR": f"{LOOPBACK}:{port}",
                **(environment or {}),
            },
        )
        origin = f"http://{LOOPBACK}:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            if child.exit_code is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{child.log_tail()}")
            with contextlib.suppress(httpx.TransportError):
                if (await self.client.get(f"{origin}/health")).is_success:
                    return child, origin + httpx.URL(self.api).path
            await asyncio.sleep(0.02)

    async def kill(self, child: Child) -> None:
        """SIGKILL, and wait until it is gone."""
        child.stopping = True
        child.send_signal(signal.SIGKILL)
        await child.wait()
        if child in self.workers:
            self.workers.remove(child)

    async def restart_worker(self, child: Child) -> Child:
        """SIGKILL this worker and start another."""
        await self.kill(child)
        return await self.start_worker()

    async def _start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        self._started += 1
        log_path = self.directory / f"{name}-{self._started}.log"
        return await self._children.start(
            name, [EVERRUNS, *arguments], env=environment, log_path=log_path, grace_seconds=15
        )

    async def _until_exists(self, path: Path, child: Child) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await asyncio.to_thread(path.exists):
            if child.exit_code is not None or time.monotonic() > deadline:
                raise AssertionError(f"{child.name} did not start:\n{child.log_tail()}")
            await asyncio.sleep(0.02)

    async def temporal(self) -> Client:
        """A Temporal client like any caller's."""
        return await Client.connect(self.addresses.temporal, data_converter=DATA_CONVERTER)

    # --- what a client does -------------------------------------------------------------------------------------------

    async def create_session(self, **body: object) -> str:
        created = await self.client.post("sessions", json=body)
        assert created.status_code == 201, created.text
        return created.json()["id"]

    async def post_message(self, session: str, text: str, *, llmsim: Json | None = None, **body: object) -> Json:
        """Post and return the stored message. `llmsim` scripts the simulated model; `body` adds fields (`delivery`, …)."""
        posted = await self.client.post(f"sessions/{session}/messages", json=message_body(text, llmsim, **body))
        assert posted.status_code == 201, posted.text
        return posted.json()

    async def cancel(self, session: str, reason: str | None = None) -> Json:
        answer = await self.client.post(f"sessions/{session}/cancel", json={} if reason is None else {"reason": reason})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def session(self, session: str) -> Json:
        answer = await self.client.get(f"sessions/{session}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def events(
        self,
        session: str,
        *,
        types: Collection[str] = (),
        after_sequence: int = 0,
        api: str | None = None,
    ) -> AsyncGenerator[SeenEvent]:
        """Events as they come, over as many connections as it takes. Endless: the caller leaves."""
        cursor: str | None = None
        while True:
            parameters: dict[str, str | list[str]] = {"since_id": cursor} if cursor else {}
            if not cursor and after_sequence:
                parameters["after_sequence"] = str(after_sequence)
            if types:
                parameters["types"] = list(types)
            with contextlib.suppress(httpx.TransportError):
                async with contextlib.aclosing(self.stream(session, parameters, api=api)) as connection:
                    async for event in connection:
                        cursor = event.id
                        yield event
            await asyncio.sleep(RECONNECT_SECONDS)

    async def stream(
        self, session: str, parameters: Mapping[str, str | list[str]] | None = None, *, api: str | None = None
    ) -> AsyncGenerator[SeenEvent]:
        """Events of one SSE connection, until it ends."""
        url = f"{api or self.api}/sessions/{session}/sse"
        async with self.client.stream("GET", url, params=parameters, timeout=httpx.Timeout(120)) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith('data: {"id":'):
                    raw: Json = msgspec.json.decode(line[6:])
                    yield msgspec.convert({**raw, "raw": raw}, SeenEvent)

    async def wait_for_event(
        self,
        session: str,
        types: str | Collection[str],
        count: int = 1,
        *,
        after_sequence: int = 0,
        timeout: float = WAIT_SECONDS,
    ) -> list[SeenEvent]:
        """The first `count` events of these types. Fails with the session's log when they do not come."""
        wanted = [types] if isinstance(types, str) else list(types)
        found: list[SeenEvent] = []
        try:
            async with (
                asyncio.timeout(timeout),
                contextlib.aclosing(self.events(session, types=wanted, after_sequence=after_sequence)) as stream,
            ):
                async for event in stream:
                    found.append(event)
                    if len(found) >= count:
                        break
        except TimeoutError:
            log = await self.read_log(session)
            lines = "\n".join(f"{event.sequence:5} {event.type} {event.data[:200].decode()}" for event in log[-60:])
            raise AssertionError(
                f"{len(found)} of {count} {wanted} within {timeout} s in {session}:\n{lines}\n{self.dev.log_tail(30)}"
            ) from None
        return found

    async def idle(self, session: str, *, after_sequence: int = 0, timeout: float = WAIT_SECONDS) -> None:
        """Until the session rests after a turn that ended after `after_sequence`."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.1, deadline - time.monotonic())
            idled = await self.wait_for_event(session, "session.idled", after_sequence=after_sequence, timeout=left)
            if (await self.session(session))["status"] == "idle":
                return
            after_sequence = idled[0].sequence

    async def ask(self, session: str, text: str, *, llmsim: Json | None = None, **body: object) -> list[StoredEvent]:
        """Post to a session that rests, wait until it rests again; the log from the message on."""
        log = await self.read_log(session)
        before = log[-1].sequence if log else 0
        await self.post_message(session, text, llmsim=llmsim, **body)
        await self.idle(session, after_sequence=before)
        return [event for event in await self.read_log(session) if event.sequence > before]

    # --- the log ------------------------------------------------------------------------------------------------------

    async def read_log(self, session: str) -> list[StoredEvent]:
        """The stored log, from the database."""
        events: list[StoredEvent] = []
        while True:
            after = events[-1].sequence if events else 0
            page = await self.log.read(session, after_sequence=after, limit=READ_EVENTS)
            events.extend(page)
            if len(page) < READ_EVENTS:
                return events

    async def check(self, session: str, *, finished: bool = True) -> list[StoredEvent]:
        """The log, which breaks no invariant."""
        log = await self.read_log(session)
        assert_legal(check_log(log, finished=finished), log)
        return log


def message_body(text: str, llmsim: Json | None = None, **body: object) -> Json:
    """The body of POST messages."""
    metadata = body.pop("metadata", None)
    if llmsim is not None:
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "llmsim": llmsim}
    if metadata is not None:
        body["metadata"] = metadata
    return {"message": {"content": [{"type": "text", "text": text}]}, **body}


def assert_legal(violations: Sequence[Violation], log: Sequence[StoredEvent]) -> None:
    if violations:
        broken = "\n".join(f"{one.rule} at {one.sequence}: {one.message}" for one in violations)
        lines = "\n".join(f"{event.sequence:5} {event.type} {event.data[:160].decode()}" for event in log[-80:])
        raise AssertionError(f"{broken}\n{lines}")


def payload(event: StoredEvent) -> Json:
    return msgspec.json.decode(event.data, type=Json)


def of_type(log: Sequence[StoredEvent], *types: str) -> list[Json]:
    """The payloads of these types, in order."""
    return [payload(event) for event in log if event.type in types]
