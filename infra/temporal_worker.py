"""Our Temporal workers: one for turns, one for steps, tuned by measurement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Final

import structlog
from msgspec import Struct
from temporalio.api.workflowservice.v1 import SetWorkerDeploymentCurrentVersionRequest
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import (
    Interceptor,
    PollerBehaviorSimpleMaximum,
    UnsandboxedWorkflowRunner,
    Worker,
    WorkerDeploymentConfig,
    WorkflowRunner,
)

from workflows import contract

STICKY_TIMEOUT: Final = timedelta(seconds=1)
"""How long a workflow waits for a worker that may be gone; Temporal's default of 10 s would be the real recovery time."""

HEARTBEAT_THROTTLE: Final = timedelta(milliseconds=500)
"""Upper bound between two beats sent to the server, which is also how a cancel reaches a step on a stock server."""

POLLERS: Final = 20
GRACE: Final = timedelta(seconds=8)
FAREWELL_SECONDS: Final = 2.0
"""For the last words to Temporal. Without a limit the SDK waits for a server that is gone for as long as it is gone."""


log = structlog.get_logger(__name__)


class WorkerOptions(Struct, frozen=True, kw_only=True):
    turns_queue: str = contract.TURNS_QUEUE
    steps_queue: str | None = None
    max_concurrent_steps: int = 100
    build_id: str | None = None


@contextlib.asynccontextmanager
async def running_workers(
    client: Client,
    options: WorkerOptions,
    *,
    workflows: Sequence[type],
    activities: Sequence[Callable[..., object]],
    interceptors: Sequence[Interceptor],
    runner: WorkflowRunner | None = None,
) -> AsyncIterator[asyncio.Future[None]]:
    """Both workers, running inside the block; the future fails when one of them does.

    Without the sandbox: it re-imports modules for every run, and a run is one turn (8.7 ms of 21 ms worker CPU measured).
    The tests run the same workflows inside it, and stored histories are replayed, so determinism is checked there.
    """
    pollers = PollerBehaviorSimpleMaximum(POLLERS)
    turns = Worker(
        client,
        task_queue=options.turns_queue,
        workflows=workflows,
        # Steps on the queue of their turn: Temporal hands a step back in the very answer that scheduled it, which saves a
        # hop through its queues (a turn with a tool took 69 instead of 92 ms).
        activities=activities,
        interceptors=interceptors,
        max_concurrent_activities=options.max_concurrent_steps,
        activity_task_poller_behavior=pollers,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        default_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        workflow_runner=runner or UnsandboxedWorkflowRunner(),
        workflow_task_poller_behavior=pollers,
        sticky_queue_schedule_to_start_timeout=STICKY_TIMEOUT,
        graceful_shutdown_timeout=GRACE,
        deployment_config=_deployment(options.build_id),
    )
    workers = [turns]
    if options.steps_queue not in (None, options.turns_queue):
        workers.insert(0, _steps_worker(client, options, activities, interceptors, pollers))
    failure: asyncio.Future[None] = asyncio.ensure_future(_run_all(workers))
    try:
        yield failure
    finally:
        try:
            async with asyncio.timeout(GRACE.total_seconds() + FAREWELL_SECONDS):
                # Steps first: they hand their work over while turns can still be told about it.
                for worker in workers:
                    await worker.shutdown()
        except TimeoutError:
            log.warning("Temporal does not answer; this worker's tasks are taken over as after a crash")
            failure.cancel()
        # Bounded too: the SDK's core takes half a minute to give up a server that is gone.
        await asyncio.wait({failure}, timeout=FAREWELL_SECONDS)
        if failure.done() and not failure.cancelled():
            failure.exception()  # Whoever waited for it has had it; asked for here so that nobody is told it was not.


async def _run_all(workers: Sequence[Worker]) -> None:
    await asyncio.gather(*(worker.run() for worker in workers))


def _steps_worker(
    client: Client,
    options: WorkerOptions,
    activities: Sequence[Callable[..., object]],
    interceptors: Sequence[Interceptor],
    pollers: PollerBehaviorSimpleMaximum,
) -> Worker:
    return Worker(
        client,
        task_queue=options.steps_queue or options.turns_queue,
        activities=activities,
        interceptors=interceptors,
        max_concurrent_activities=options.max_concurrent_steps,
        activity_task_poller_behavior=pollers,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        default_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=GRACE,
        deployment_config=_deployment(options.build_id),
    )


def _deployment(build_id: str | None) -> WorkerDeploymentConfig | None:
    """Both queues belong to one version: a turn pinned to it finds its steps there too."""
    if build_id is None:
        return None
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(contract.DEPLOYMENT, build_id),
        use_worker_versioning=True,
        default_versioning_behavior=VersioningBehavior.PINNED,
    )


async def promote(client: Client, build_id: str) -> None:
    """Make a version the one new turns start on; running turns stay where they are.

    Raises `RPCError` when no worker of that version has been seen.
    """
    await client.workflow_service.set_worker_deployment_current_version(
        SetWorkerDeploymentCurrentVersionRequest(
            namespace=client.namespace, deployment_name=contract.DEPLOYMENT, build_id=build_id
        )
    )
