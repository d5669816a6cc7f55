"""Fixtures that most tests share: one PostgreSQL a run, one database a test, and the API on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from uuid import uuid4

import asyncpg
import httpx
import pytest
import uvicorn
from litestar import Litestar

from activities.capabilities.registry import builtin_registry
from activities.mcp.authorization import McpAuthorization
from activities.mcp.source import McpSource
from api.app import create_app
from api.background import BackgroundTasks
from api.services import Services
from api.streams import StreamHub, StreamLimits, StreamTiming
from cli.engine import check_message_metadata, check_model_options, discover_models
from db.database import Database
from db.event_log import EventLog
from db.mcp_directory import DatabaseDirectory
from db.messages import MessageStore
from db.model_choice import ModelChooser
from db.providers import endpoint_of
from db.schedules import ScheduleStore
from db.scheduling import Scheduling
from db.session_tasks import TaskStore
from db.turn_store import TurnStore
from domain.events import StoredEvent
from domain.messages import Delivery
from domain.ports import TurnLabels
from infra.child_processes import ChildProcesses
from infra.embedded_postgres import EmbeddedPostgres
from infra.encryption import Keyring, generate_key
from infra.event_bus import EventBus
from infra.settings import Settings, load_settings
from tests.fakes.schedule_clock import FakeClock

TEMPLATE = "everruns_template"
POOL_SIZE = 5

API = "/api/v1"


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    async with ChildProcesses() as children, EmbeddedPostgres(children) as server:
        admin = await asyncpg.connect(server.dsn("postgres"))
        await admin.execute(f"CREATE DATABASE {TEMPLATE}")
        await admin.close()
        async with Database.opened(server.dsn(TEMPLATE), pool_size=2) as database:
            await database.migrate()
        yield server


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A migrated database of this test alone."""
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    # Copying files takes a third of the time of copying through the log, which is PostgreSQL's default.
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    yield postgres.dsn(name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    async with Database.opened(dsn, pool_size=POOL_SIZE) as opened:
        yield opened


@dataclass
class RecordingPublisher:
    """What was handed to local readers, in order."""

    published: list[StoredEvent] = field(default_factory=list)

    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        self.published.extend(events)


@dataclass
class RecordingTurns:
    """A turn gateway that notes its calls; with `failure` it raises instead."""

    calls: list[tuple[str, ...]] = field(default_factory=list)
    failure: Exception | None = None

    def _note(self, *call: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append(call)

    async def wake(
        self,
        session_id: str,
        *,
        message_id: str | None = None,
        delivery: Delivery = Delivery.STEER,
        running: bool = False,
        ends_wait: bool | None = None,
        labels: TurnLabels | None = None,
    ) -> None:
        self._note("wake", session_id)

    async def cancel(self, session_id: str, reason: str | None, *, read_up_to: int | None = None) -> None:
        self._note("cancel", session_id, reason or "")

    async def interrupt(self, session_id: str, message_id: str | None) -> None:
        self._note("interrupt", session_id, message_id or "")

    async def tool_results(self, session_id: str, tool_call_ids: Sequence[str]) -> None:
        self._note("tool_results", session_id, *tool_call_ids)


@pytest.fixture
def settings(dsn: str) -> Settings:
    return load_settings({"DEV_MODE": "true", "DATABASE_URL": dsn})


@pytest.fixture
def turns() -> RecordingTurns:
    return RecordingTurns()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def publisher() -> RecordingPublisher:
    return RecordingPublisher()


@pytest.fixture
def keyring() -> Keyring:
    return Keyring.of(generate_key("kek-test"), None)


@pytest.fixture
def services(
    settings: Settings,
    database: Database,
    turns: RecordingTurns,
    publisher: RecordingPublisher,
    keyring: Keyring,
    clock: FakeClock,
) -> Services:
    log = EventLog(database.pool, publisher)
    return Services(
        settings=settings,
        database=database,
        log=log,
        capabilities=builtin_registry(),
        turns=turns,
        messages=MessageStore(log),
        scheduling=Scheduling(ScheduleStore(log, MessageStore(log)), clock),
        tasks=TaskStore(log, turns),
        streams=StreamHub(
            log,
            EventBus(),
            StreamLimits(everywhere=100, per_session=5, per_org=50),
            StreamTiming(cycle_seconds=60, heartbeat_seconds=30),
            asyncio.Event(),
        ),
        background=BackgroundTasks(),
        keyring=keyring,
        discover_models=discover_models,
        discover_mcp_tools=McpSource(DatabaseDirectory(database.pool, keyring), ("127.0.0.1",)).discover,
        mcp_authorizer=McpAuthorization(("127.0.0.1",)),
        check_model_options=check_model_options,
        check_message_metadata=check_message_metadata,
        version="0.0.0",
    )


@pytest.fixture(scope="session")
def made_apps() -> list[Litestar]:
    """The one application of all tests: to make one takes a third of a second, which is more than most tests take."""
    return []


@pytest.fixture
def app(services: Services, made_apps: list[Litestar]) -> Litestar:
    if not made_apps:
        made_apps.append(create_app(services))
    made_apps[0].state.services = services
    return made_apps[0]


def turn_store(log: EventLog, keyring: Keyring | None = None) -> TurnStore:
    """The engine's state, with providers that need no key unless one is stored under `keyring`."""
    keys = keyring or Keyring.of(None, None)
    return TurnStore(log, ModelChooser(lambda row: endpoint_of(row, keys, {})), keys)


ClientOf = Callable[[Litestar], httpx.AsyncClient]


@pytest.fixture
def client_of() -> ClientOf:
    """In this event loop, unlike Litestar's test client, whose portal thread could not use the pool. Not for endless SSE."""

    def connect(app: Litestar) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(cast(Any, app), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://testserver.local")

    return connect


@pytest.fixture
async def client(app: Litestar, client_of: ClientOf) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as connected:
        yield connected


@contextlib.asynccontextmanager
async def served(
    app: Litestar, *, lifespan: Literal["auto", "on", "off"] = "auto", ends_at_once: bool = False
) -> AsyncIterator[str]:
    """The app on a real socket; yields its base URL. `ends_at_once` is for apps whose streams never end by themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(cast(Any, app), log_config=None, timeout_graceful_shutdown=1, lifespan=lifespan)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 # uvicorn tells nobody
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            server.force_exit = ends_at_once
            await serving


@pytest.fixture
async def live_url(app: Litestar) -> AsyncIterator[str]:
    async with served(app) as url:
        yield url


Make = Callable[..., Awaitable[dict[str, Any]]]


def _maker(client: httpx.AsyncClient, path: str, defaults: dict[str, Any]) -> Make:
    async def make(**fields: Any) -> dict[str, Any]:
        response = await client.post(f"{API}/{path}", json={**defaults, **fields})
        assert response.status_code == 201, response.text
        return response.json()

    return make


@pytest.fixture
def make_harness(client: httpx.AsyncClient) -> Make:
    return _maker(client, "harnesses", {"name": "support-desk"})


@pytest.fixture
def make_agent(client: httpx.AsyncClient) -> Make:
    return _maker(client, "agents", {"name": "helper", "system_prompt": "You help."})


@pytest.fixture
def make_session(client: httpx.AsyncClient) -> Make:
    return _maker(client, "sessions", {})
