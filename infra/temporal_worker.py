"""Our Temporal workers: one for turns, one for steps, tuned by measurement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Final

from msgspec import Struct
from temporalio.client import Client
from temporalio.worker import (
    Interceptor,
    PollerBehaviorSimpleMaximum,
    UnsandboxedWorkflowRunner,
    Worker,
    WorkflowRunner,
)

from workflows import contract

STICKY_TIMEOUT: Final = timedelta(seconds=1)
"""How long a workflow waits for a worker that may be gone; Temporal's default of 10 s would be the real recovery time."""

HEARTBEAT_THROTTLE: Final = timedelta(milliseconds=500)
"""Upper bound between two beats sent to the server, which is also how a cancel reaches a step on a stock server."""

POLLERS: Final = 20
GRACE: Final = timedelta(seconds=8)


class WorkerOptions(Struct, frozen=True, kw_only=True):
    turns_queue: str = contract.TURNS_QUEUE
    steps_queue: str = contract.STEPS_QUEUE
    max_concurrent_steps: int = 100


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
        workflow_runner=runner or UnsandboxedWorkflowRunner(),
        workflow_task_poller_behavior=pollers,
        sticky_queue_schedule_to_start_timeout=STICKY_TIMEOUT,
        graceful_shutdown_timeout=GRACE,
    )
    steps = Worker(
        client,
        task_queue=options.steps_queue,
        activities=activities,
        interceptors=interceptors,
        max_concurrent_activities=options.max_concurrent_steps,
        activity_task_poller_behavior=pollers,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        default_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=GRACE,
    )
    failure: asyncio.Future[None] = asyncio.ensure_future(_run_both(turns, steps))
    try:
        yield failure
    finally:
        # Steps first: they hand their work over while turns can still be told about it.
        await steps.shutdown()
        await turns.shutdown()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await failure


async def _run_both(turns: Worker, steps: Worker) -> None:
    await asyncio.gather(turns.run(), steps.run())
