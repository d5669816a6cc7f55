"""The composition root: builds the engine's parts from settings and runs them. Nothing else knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import asyncpg
import structlog
from msgspec import Struct
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.client import Client

from activities.act import ActActivity
from activities.bookkeeping import BookkeepingActivities
from activities.capabilities.declared import DeclaredCapabilities
from activities.capabilities.registry import builtin_registry
from activities.capabilities.turn_capabilities import TurnCapabilities
from activities.llm import load_driver
from activities.llm.llmsim import parse_script
from activities.llm.options import parse_options
from activities.mcp.authorization import McpAuthorization
from activities.mcp.source import McpSource
from activities.mirror import EventMirror
from activities.reason import ReasonActivity
from activities.scheduled_message import ScheduledMessageActivity
from api.app import create_app
from api.background import BackgroundTasks, repeat
from api.reconciler import Reconciler
from api.schedule_reconciler import ScheduleReconciler
from api.services import Services
from api.streams import StreamHub, StreamLimits, StreamTiming
from db.budget_gate import release_all
from db.database import Database
from db.dev_models import choose_models
from db.event_log import EventLog
from db.mcp_directory import DatabaseDirectory
from db.messages import MessageStore
from db.model_choice import ModelChooser
from db.patient_state import PatientTurnState
from db.providers import endpoint_of
from db.schedules import ScheduleStore
from db.scheduling import Scheduling
from db.session_cleanup import Cleanup
from db.session_resources import DatabaseResources
from db.session_tasks import TaskStore
from db.skills import DatabaseSkills
from db.task_reports import ReportingLog
from db.task_upkeep import TaskUpkeep
from db.turn_store import TurnStore
from domain.model import DiscoveredModel, ModelEndpoint, ModelError, ModelErrorKind, ModelLister
from domain.providers import PROVIDER_TYPES
from domain.turns import CONTEXT_WINDOW
from infra.encryption import Keyring
from infra.event_bus import EventBus
from infra.http_server import HttpServer
from infra.schedule_clock import TemporalScheduleClock
from infra.settings import Settings
from infra.temporal_client import connect_temporal, ensure_search_attributes
from infra.temporal_worker import WorkerOptions, running_workers
from infra.turn_gateway import TemporalTurns, TurnOptions
from workflows import contract
from workflows.scheduled_message import ScheduledMessage
from workflows.turn import Turn

SEARCH_ATTRIBUTE_TYPES: Final = {
    key.name: IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD for key in contract.SEARCH_ATTRIBUTES
}
BACKGROUND_GRACE_SECONDS: Final = 3.0
RECONCILE_SECONDS: Final = 2.0
CLEANUP_SECONDS: Final = 600.0
"""It looks through all workspaces. What is deleted while servers run is cleared away right then."""
CLEANUP_FIRST_SECONDS: Final = 10.0
MODEL_LIST_SECONDS: Final = 30.0
"""A person waits for the answer."""

log = structlog.get_logger(__name__)


def package_version() -> str:
    try:
        return version("everruns")
    except PackageNotFoundError:
        return "0.0.0"


def worker_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


class Foundation(Struct, frozen=True, kw_only=True):
    """What both roles stand on: state and the engine that moves it."""

    settings: Settings
    database: Database
    bus: EventBus
    log: EventLog
    keyring: Keyring
    temporal: Client
    search_attributes: bool


def keyring_of(settings: Settings) -> Keyring:
    return Keyring.of(settings.secrets_encryption_key, settings.secrets_encryption_key_previous)


def canary_key_of(settings: Settings) -> bytes:
    """The same on all workers. Without an encryption key the database's address, its password included, has to do."""
    key = settings.secrets_encryption_key
    source = settings.database_url or "" if key is None else key.reveal()
    return hashlib.sha256(f"prompt canary:{source}".encode()).digest()


@contextlib.asynccontextmanager
async def foundation(settings: Settings) -> AsyncIterator[Foundation]:
    """Connections to PostgreSQL and Temporal. Raises what their clients raise when they can't be reached."""
    assert settings.database_url is not None, "load_settings refuses a missing DATABASE_URL outside dev mode"
    async with Database.opened(settings.database_url, pool_size=settings.database_pool_size) as database:
        bus = EventBus()
        temporal = await connect_temporal(settings)
        yield Foundation(
            settings=settings,
            database=database,
            bus=bus,
            log=EventLog(database.pool, bus),
            keyring=keyring_of(settings),
            temporal=temporal,
            search_attributes=await _search_attributes(temporal),
        )


async def _search_attributes(client: Client) -> bool:
    """Register our attributes. Without them turns run the same; only the Web UI's filters are missing."""
    try:
        await ensure_search_attributes(client, SEARCH_ATTRIBUTE_TYPES)
    except Exception:
        log.exception("search attributes could not be registered; turns start without them")
        return False
    return True


def model_chooser(base: Foundation) -> ModelChooser:
    def endpoint(row: asyncpg.Record) -> ModelEndpoint:
        return endpoint_of(row, base.keyring, base.settings.default_keys)

    return ModelChooser(endpoint, system_model=base.settings.default_model)


def turns_of(base: Foundation, *, eager: bool) -> TemporalTurns:
    settings = base.settings
    return TemporalTurns(
        base.temporal,
        TurnOptions(
            turns_queue=settings.temporal_turns_queue,
            steps_queue=settings.temporal_steps_queue,
            client_tool_timeout_seconds=settings.client_tool_timeout_seconds,
            reason_timeout_seconds=settings.reason_timeout_seconds,
            max_parallel_tools=settings.act_max_tool_concurrency,
            search_attributes=base.search_attributes,
            eager=eager,
        ),
    )


def scheduling_of(base: Foundation) -> Scheduling:
    clock = TemporalScheduleClock(base.temporal, base.settings.temporal_turns_queue)
    return Scheduling(ScheduleStore(base.log, MessageStore(base.log)), clock)


def mcp_source(base: Foundation) -> McpSource:
    settings = base.settings
    return McpSource(
        DatabaseDirectory(base.database.pool, base.keyring),
        settings.mcp_allow_private_hosts,
        allow_stdio=settings.mcp_allow_stdio,
    )


@contextlib.asynccontextmanager
async def worker_role(base: Foundation) -> AsyncIterator[asyncio.Future[None]]:
    """Workers for turns and steps; the future fails when they do."""
    settings = base.settings
    turns = turns_of(base, eager=False)
    tasks = TaskStore(base.log, turns)
    reporting = ReportingLog(base.database.pool, base.bus, tasks.follower, tasks.stop_orphan)
    state = PatientTurnState(TurnStore(reporting, model_chooser(base), base.keyring))
    scheduling = scheduling_of(base)
    resources = DatabaseResources(base.database.pool, base.keyring, scheduling, tasks)
    capabilities = TurnCapabilities(
        builtin_registry(settings.web_fetch_allow_private_hosts, canary_key=canary_key_of(settings)),
        resources,
        [DeclaredCapabilities(DatabaseSkills(base.database.pool)), mcp_source(base)],
    )
    bookkeeping = BookkeepingActivities(state, MessageStore(base.log))
    options = WorkerOptions(
        turns_queue=settings.temporal_turns_queue,
        steps_queue=settings.temporal_steps_queue,
        max_concurrent_steps=settings.worker_max_concurrent_steps,
        build_id=settings.worker_build_id,
    )
    async with running_workers(
        base.temporal,
        options,
        workflows=[Turn, ScheduledMessage],
        activities=[
            ReasonActivity(state, capabilities, load_driver, stall_seconds=settings.reason_stall_seconds).reason,
            ActActivity(state, capabilities, resources).act,
            bookkeeping.finish,
            bookkeeping.record_message,
            ScheduledMessageActivity(scheduling, turns_of(base, eager=False)).deliver_scheduled,
        ],
        interceptors=[EventMirror(state, worker=worker_name())],
    ) as failure:
        preloading = asyncio.create_task(_preload_drivers(base.database))
        try:
            yield failure
        finally:
            preloading.cancel()


async def _preload_drivers(database: Database) -> None:
    """What the first turn would otherwise wait seconds for: the SDKs of the providers that are in use."""
    try:
        rows = await database.pool.fetch(
            """SELECT DISTINCT provider_type FROM providers p WHERE status = 'active'
               AND EXISTS (SELECT FROM models m WHERE m.provider_id = p.id AND m.enabled)"""
        )
        for row in rows:
            if row["provider_type"] in PROVIDER_TYPES:
                await load_driver(row["provider_type"])
    except Exception as error:
        log.warning("drivers could not be loaded ahead of their first use", error=type(error).__name__)


@contextlib.asynccontextmanager
async def server_role(base: Foundation, listener: socket.socket, *, eager: bool) -> AsyncIterator[HttpServer]:
    """The API on a bound socket; `eager` when a worker runs on the same Temporal client."""
    settings = base.settings
    assert settings.database_unpooled_url is not None, "settings derive it from DATABASE_URL"
    drain = asyncio.Event()
    messages = MessageStore(base.log)
    turns = turns_of(base, eager=eager)
    scheduling = scheduling_of(base)
    tasks = TaskStore(base.log, turns)
    background = BackgroundTasks()
    streams = StreamHub(
        base.log,
        base.bus,
        StreamLimits(
            everywhere=settings.sse_global_max,
            per_session=settings.sse_per_session_max,
            per_org=settings.sse_per_org_max,
        ),
        StreamTiming(
            cycle_seconds=settings.sse_realtime_cycle_seconds,
            heartbeat_seconds=settings.sse_heartbeat_interval_seconds,
        ),
        drain,
    )
    services = Services(
        settings=settings,
        database=base.database,
        log=base.log,
        capabilities=builtin_registry(),
        turns=turns,
        messages=messages,
        scheduling=scheduling,
        tasks=tasks,
        streams=streams,
        background=background,
        keyring=base.keyring,
        discover_models=discover_models,
        discover_mcp_tools=mcp_source(base).discover,
        mcp_authorizer=McpAuthorization(settings.mcp_allow_private_hosts),
        check_model_options=check_model_options,
        check_message_metadata=check_message_metadata,
        version=package_version(),
    )
    await base.bus.listen(settings.database_unpooled_url)
    server = HttpServer(create_app(services), drain)
    serving = asyncio.create_task(server.serve_on(listener))

    async def release_paused() -> list[str]:
        return await release_all(base.log)

    reconciler = Reconciler(messages, turns, release_paused)
    schedules, task_upkeep, cleanup = ScheduleReconciler(scheduling), TaskUpkeep(tasks), Cleanup(base.database)
    upkeep = [
        repeat(reconciler.once, "reconciling", interval_seconds=RECONCILE_SECONDS),
        repeat(schedules.once, "settling schedules", interval_seconds=RECONCILE_SECONDS, first_seconds=0.0),
        repeat(task_upkeep.once, "looking after tasks", interval_seconds=RECONCILE_SECONDS),
        repeat(cleanup.once, "clearing away", interval_seconds=CLEANUP_SECONDS, first_seconds=CLEANUP_FIRST_SECONDS),
    ]
    upkeeping = [asyncio.create_task(work) for work in upkeep]
    try:
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
        yield server
    finally:
        for task in upkeeping:
            task.cancel()
        server.stop()
        await serving
        await background.close(BACKGROUND_GRACE_SECONDS)
        await base.bus.close()


def check_model_options(provider_type: str, options: Mapping[str, object]) -> None:
    known = PROVIDER_TYPES.get(provider_type)
    if known is None:
        # Whoever brings the driver knows its options.
        return
    if known.driver != "llmsim":
        parse_options(options, root="options")
        return
    if "script" in options:
        parse_script(options["script"], root="options.script")
    parse_options({key: options[key] for key in (CONTEXT_WINDOW,) if key in options}, root="options")


async def discover_models(endpoint: ModelEndpoint) -> list[DiscoveredModel] | None:
    known = PROVIDER_TYPES.get(endpoint.provider_type)
    if known is None or not known.lists_models:
        return None
    driver = await load_driver(endpoint.provider_type)
    if not isinstance(driver, ModelLister):
        return None
    try:
        async with asyncio.timeout(MODEL_LIST_SECONDS):
            return await driver.list_models(endpoint)
    except TimeoutError:
        raise ModelError(ModelErrorKind.TIMEOUT, f"no list of models within {MODEL_LIST_SECONDS:.0f} s") from None


def check_message_metadata(metadata: Mapping[str, object]) -> None:
    if "llmsim" in metadata:
        parse_script(metadata["llmsim"])


async def choose_dev_model(database: Database, settings: Settings) -> None:
    """In dev an organization without a default model answers through the simulated one, or the one a default key is for."""
    await choose_models(database, settings.default_keys)
