"""A worker for turns inside the test's process, for tests that need other parts in it than a deployed one has."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from temporalio.client import Client
from temporalio.worker import WorkflowRunner

from activities.act import ActActivity
from activities.bookkeeping import BookkeepingActivities
from activities.capabilities.registry import CapabilityRegistry, builtin_registry
from activities.capabilities.turn_capabilities import TurnCapabilities
from activities.llm import load_driver
from activities.mirror import EventMirror
from activities.reason import ReasonActivity
from db.event_log import EventLog
from db.messages import MessageStore
from db.session_resources import DatabaseResources
from infra.encryption import Keyring
from infra.temporal_worker import WorkerOptions, running_workers
from tests.conftest import turn_store
from workflows.turn import Turn


@contextlib.asynccontextmanager
async def turn_worker(
    client: Client,
    queue: str,
    log: EventLog,
    resources: DatabaseResources,
    *,
    keyring: Keyring | None = None,
    registry: CapabilityRegistry | None = None,
    workflows: Sequence[type] = (),
    activities: Sequence[Callable[..., object]] = (),
    runner: WorkflowRunner | None = None,
) -> AsyncIterator[None]:
    """`workflows` and `activities` are what it does besides turns."""
    state = turn_store(log, keyring)
    capabilities = TurnCapabilities(registry or builtin_registry(), resources)
    bookkeeping = BookkeepingActivities(state, MessageStore(log))
    async with running_workers(
        client,
        WorkerOptions(turns_queue=queue),
        workflows=[Turn, *workflows],
        activities=[
            ReasonActivity(state, capabilities, load_driver).reason,
            ActActivity(state, capabilities, resources).act,
            bookkeeping.finish,
            bookkeeping.record_message,
            *activities,
        ],
        interceptors=[EventMirror(state, worker="test")],
        runner=runner,
    ):
        yield
