"""The API dies: messages it has accepted are answered, and open streams go on where they were."""

from __future__ import annotations

import asyncio
import signal

from tests.chaos.fault_points import wire
from tests.chaos.production import ProductionStack
from tests.chaos.watched import Watched, answers, fresh_workers, lorem, ready_worker, watching
from tests.stack import of_type

STREAMS = 4


async def test_message_accepted_right_before_the_api_is_killed_is_answered_after_its_restart(
    production: ProductionStack,
) -> None:
    async with wire(production.addresses.temporal) as to_temporal, watching() as watch, fresh_workers(production):
        await ready_worker(production)
        await production.restart_api({"TEMPORAL_ADDRESS": to_temporal.address})
        watched = watch(await Watched.begin(production))

        # The message is stored and accepted; Temporal never hears of it.
        to_temporal.freeze()
        await watched.say("hello", {"mode": "fixed", "text": "Hello to you."})
        await production.kill(production.dev)
        await to_temporal.cut()
        assert of_type(await production.read_log(watched.session), "turn.started") == []

        await production.start_api()
        log = await watched.settle()
        assert answers(log) == ["Hello to you."]
        assert len(of_type(log, "turn.started")) == 2


async def test_streams_resume_without_gap_or_duplicate_after_the_api_is_killed(production: ProductionStack) -> None:
    async with watching() as watch, fresh_workers(production):
        await ready_worker(production)
        streams = [watch(await Watched.begin(production)) for _ in range(STREAMS)]
        for watched in streams:
            await watched.say("talk", lorem(180, delay_ms=20))
        for watched in streams:
            await watched.until_seen("output.message.delta", 3)

        await production.restart_api()

        for watched in streams:
            log = await watched.settle()
            assert len(answers(log)) == 1
            # The worker did not notice: the answer was written in one go.
            assert of_type(log, "reason.recovered") == []


async def test_streams_resume_without_gap_or_duplicate_after_the_api_is_told_to_stop(
    production: ProductionStack,
) -> None:
    async with watching() as watch, fresh_workers(production):
        await ready_worker(production)
        streams = [watch(await Watched.begin(production)) for _ in range(STREAMS)]
        for watched in streams:
            await watched.say("talk", lorem(180, delay_ms=20))
        for watched in streams:
            await watched.until_seen("output.message.delta", 3)

        production.dev.stopping = True
        production.dev.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            # Open streams do not hold it up.
            assert await production.dev.wait() == 0
        await production.start_api()

        for watched in streams:
            log = await watched.settle()
            assert len(answers(log)) == 1
