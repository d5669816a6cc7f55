"""PostgreSQL and Temporal die under load and come back a few seconds later: every turn that was running gets its answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.production import ProductionStack
from tests.chaos.watched import (
    FAULTS,
    Watched,
    answers,
    call,
    effects,
    fresh_workers,
    lorem,
    ready_worker,
    results,
    tool_turn,
    watching,
)
from tests.stack import of_type

OUTAGE_SECONDS = 3.0
"""A failover: long enough for every retry that counts on a moment to be used up."""

STREAMS = 3


@pytest.mark.parametrize("server", ["PostgreSQL", "Temporal"])
async def test_every_turn_is_answered_after_a_dependency_was_killed_under_load(
    production: ProductionStack, effects_file: Path, server: str
) -> None:
    async with watching() as watch, fresh_workers(production):
        await asyncio.gather(ready_worker(production), ready_worker(production))
        streaming = [watch(await Watched.begin(production)) for _ in range(STREAMS)]
        once = watch(await Watched.begin(production, capabilities=FAULTS))
        again = watch(await Watched.begin(production, capabilities=FAULTS))
        for watched in streaming:
            await watched.say("talk", lorem(250, delay_ms=20))
        await once.say("act", tool_turn(call("test_effect_once", f"once-{server}", seconds=1)))
        await again.say("act", tool_turn(call("test_effect_idempotent", f"again-{server}", seconds=1)))
        for watched in streaming:
            await watched.until_seen("output.message.delta", 3)
        await once.until_seen("tool.started")
        await again.until_seen("tool.started")

        killed = production.postgres if server == "PostgreSQL" else production.temporal_server
        await production.outage(killed, seconds=OUTAGE_SECONDS)

        for watched in streaming:
            log = await watched.settle()
            [answer] = answers(log)
            assert answer.endswith(".")
            assert len(of_type(log, "turn.completed")) == 2
        log = await once.settle()
        # The call ended while the server was away. Its outcome is known, so it is kept, and the call is not run again.
        assert results(log)[f"once-{server}"]["success"] is True
        assert len(effects(effects_file, f"once-{server}")) == 1
        assert answers(log) == ["Done."]
        log = await again.settle()
        assert results(log)[f"again-{server}"]["success"] is True
        assert answers(log) == ["Done."]
