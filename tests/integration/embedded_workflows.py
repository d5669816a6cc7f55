"""Workflows that show what the embedded Temporal server does; alone in a module, which the sandbox imports again."""

import asyncio
from datetime import timedelta

import msgspec
from temporalio import activity, workflow


class Ping(msgspec.Struct, frozen=True, kw_only=True):
    count: int


@activity.defn
async def ping(value: Ping) -> Ping:
    return Ping(count=value.count + 1)


@activity.defn
async def hang(started_at: Ping) -> None:
    while True:
        # Sent at most every 0.8 x heartbeat timeout: a cancel that arrives sooner was pushed by the server.
        activity.heartbeat(started_at)
        await asyncio.sleep(0.05)


@workflow.defn
class Timers:
    @workflow.run
    async def run(self, count: int) -> None:
        for _ in range(count):
            await workflow.sleep(0.001)


@workflow.defn
class Steps:
    @workflow.run
    async def run(self, value: Ping) -> Ping:
        for _ in range(3):
            value = await workflow.execute_activity(ping, value, start_to_close_timeout=timedelta(seconds=10))
        return value


@workflow.defn
class Hanging:
    @workflow.run
    async def run(self) -> None:
        await workflow.execute_activity(
            hang,
            Ping(count=0),
            start_to_close_timeout=timedelta(minutes=5),
            heartbeat_timeout=timedelta(seconds=60),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )
