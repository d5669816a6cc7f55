"""Workers that are told to stop, sleep, or die again and again: one worker at a time, so that it is known who does what."""

from __future__ import annotations

import asyncio
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path

from domain.events import StoredEvent
from tests.chaos.fault_points import eventually, fault_points
from tests.chaos.watched import (
    FAULTS,
    Watched,
    answers,
    call,
    effects,
    fresh_workers,
    lorem,
    of,
    ran,
    ready_worker,
    results,
    stop_worker,
    tool_turn,
    watching,
)
from tests.stack import Stack, of_type, payload

EFFECT_SECONDS = 8.0

HANDOVER_SECONDS = 2.5
"""Less than the heartbeat timeout: a step that moved later than this was timed out, not handed over."""


async def test_worker_that_is_told_to_stop_hands_its_steps_over_at_once(
    engine: Stack, effects_file: Path, record_property: Callable[[str, object], None]
) -> None:
    async with watching() as watch, fresh_workers(engine):
        leaving = await ready_worker(engine)
        streaming = watch(await Watched.begin(engine, capabilities=FAULTS))
        calling = watch(await Watched.begin(engine, capabilities=FAULTS))
        await streaming.say("talk", lorem(200, delay_ms=20, stall_after=190))
        await calling.say("act", tool_turn(call("test_effect_once", "leaving-once", seconds=4)))
        await streaming.until_seen("output.message.delta", 3)
        await calling.until_seen("tool.started")
        await ready_worker(engine)

        told_at = time.monotonic()
        await stop_worker(engine, leaving)

        await streaming.until_seen("reason.recovered")
        again = streaming.came_at(lambda one: one.type == "reason.recovered", after=told_at) - told_at
        record_property("handover_seconds", round(again, 2))
        print(f"\nstreaming again after SIGTERM: {again:.2f} s")
        assert again < HANDOVER_SECONDS
        log = await streaming.settle()
        assert len(answers(log)) == 1
        log = await calling.settle()
        # An at-most-once call is not interrupted: it may use the grace period.
        assert results(log)["leaving-once"]["success"] is True
        assert len(effects(effects_file, "leaving-once")) == 1


async def test_worker_that_was_frozen_past_its_heartbeat_writes_nothing_when_it_wakes(
    engine: Stack, effects_file: Path
) -> None:
    async with watching() as watch, fresh_workers(engine):
        frozen = await ready_worker(engine)
        streaming = watch(await Watched.begin(engine, capabilities=FAULTS))
        once = watch(await Watched.begin(engine, capabilities=FAULTS))
        again = watch(await Watched.begin(engine, capabilities=FAULTS))
        await streaming.say("talk", lorem(400, delay_ms=20, stall_after=390))
        await once.say("act", tool_turn(call("test_effect_once", "frozen-once", seconds=EFFECT_SECONDS)))
        await again.say("act", tool_turn(call("test_effect_idempotent", "frozen-again", seconds=3)))
        await streaming.until_seen("output.message.delta", 3)
        await once.until_seen("tool.started")
        # Due while the worker sleeps, even if the standby takes its time to start; it happens when the worker wakes.
        due_at = time.monotonic() + EFFECT_SECONDS
        await again.until_seen("tool.started")
        standby = await ready_worker(engine)

        frozen.send_signal(signal.SIGSTOP)
        await streaming.until_seen("reason.recovered")
        await once.until_seen("tool.completed")
        taken_over = len(streaming.seen)
        await streaming.until(
            "the standby streams", lambda seen: len(of(seen[taken_over:], "output.message.delta")) > 5
        )
        await asyncio.sleep(due_at - time.monotonic())
        frozen.send_signal(signal.SIGCONT)
        # The call goes on where it was and has its effect, which the ledger called unknown; its result comes too late.
        await ran(effects_file, "frozen-once")

        await again.until_turns_ended(1)
        await streaming.until_turns_ended(1)
        await stop_worker(engine, standby)
        # Only the one that was frozen is left, and it works.
        log = await streaming.settle()
        assert len(answers(log)) == 1
        assert len(of_type(log, "reason.recovered")) == 1
        assert one_writer_after_recovery(log)
        log = await once.settle()
        assert "unknown" in str(results(log)["frozen-once"]["error"])
        assert len(effects(effects_file, "frozen-once")) == 1
        log = await again.settle()
        assert results(log)["frozen-again"]["success"] is True


def one_writer_after_recovery(log: list[StoredEvent]) -> bool:
    """Every delta after the recovery begins where the one before it ended."""
    recovered = next(place for place, one in enumerate(log) if one.type == "reason.recovered")
    end = 0
    for one in log[recovered:]:
        if one.type == "output.message.completed":
            return True
        if one.type == "output.message.delta":
            delta = payload(one)
            assert delta["offset"] == end, f"{one.sequence}: two workers wrote"
            end += len(str(delta["delta"]))
    return False


async def test_step_that_loses_three_workers_in_a_row_is_sealed_and_the_session_lives(
    engine: Stack, effects_file: Path
) -> None:
    async with watching() as watch, fresh_workers(engine), fault_points(engine.database_url) as points:
        reasoning = watch(await Watched.begin(engine, capabilities=FAULTS))
        acting = watch(await Watched.begin(engine, capabilities=FAULTS))
        worker = await ready_worker(engine)
        await reasoning.say("hang", {"mode": "lorem", "tokens": 20, "stall_after_tokens": 5})
        await acting.say("hang", tool_turn(call("test_effect_pure", "deadly", seconds=60)))

        async def attempt_runs(attempt: int) -> bool:
            return await points.attempt_of(acting.session, "deadly") == attempt

        for attempt in range(1, 4):
            await reasoning.until_seen("output.message.delta", attempt)
            await eventually(f"attempt {attempt} of the call", functools.partial(attempt_runs, attempt))
            await engine.kill(worker)
            worker = await ready_worker(engine)

        for watched in (reasoning, acting):
            await watched.until_seen("turn.sealed")
            log = await watched.settle()
            assert len(of_type(log, "turn.sealed")) == 1
            assert len(of_type(log, "turn.completed")) == 1
        assert results(await engine.read_log(acting.session))["deadly"]["success"] is False
        assert effects(effects_file, "deadly") == []
