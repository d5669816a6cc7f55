"""Two hundred sessions at once, each disturbed at random: no invariant breaks, and every session is usable afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest

from domain.log_check import check_log
from tests.chaos.fault_points import eventually
from tests.stack import Json, Stack, assert_legal, of_type

SEED: Final = 20261121
"""Another seed is another storm; what one found stays a test by its seed."""

SESSIONS: Final = 200
DISTURBANCES: Final = 2
LONGEST_PAUSE_SECONDS: Final = 1.5
DEADLINE_SECONDS: Final = 240.0
"""For a busy machine; an idle one with two cores needs a third of it."""

LONG_SECONDS: Final = 60.0

CLIENT_TOOL: Final[Json] = {
    "type": "client_side",
    "name": "ask_client",
    "description": "Nobody answers.",
    "parameters": {"type": "object"},
}


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(environment={"CLIENT_TOOL_TIMEOUT_SECS": "1"}) as running:
        yield running


# --- what a model may do ----------------------------------------------------------------------------------------------


def answer(dice: random.Random) -> Json:
    return {"mode": "lorem", "tokens": dice.randint(1, 40), "inter_token_delay_ms": dice.choice([0, 5, 20])}


def tools(dice: random.Random) -> Json:
    """One to three rounds of calls, of which some fail, some are unknown, some take a while, and some are the client's."""
    rounds = [
        {"text": dice.choice(["", "Let me see."]), "tool_calls": [tool(dice) for _ in range(dice.randint(1, 3))]}
        for _ in range(dice.randint(1, 3))
    ]
    return {"mode": "script", "turns": [*rounds, {"text": "Done."}]}


def tool(dice: random.Random) -> Json:
    return dice.choice(
        [
            {"name": "add", "arguments": {"a": 1, "b": dice.randint(1, 9)}},
            {"name": "add", "arguments": {"a": "one"}},
            {"name": "test_fail", "arguments": {"internal": dice.random() < 0.5}},
            {"name": "test_sleep", "arguments": {"seconds": dice.choice([0, 0.1, 0.5])}},
            {"name": "test_serial", "arguments": {"seconds": dice.choice([0, 0.1])}},
            {"name": "test_effect_once", "arguments": {"seconds": dice.choice([0, 0.2])}},
            {"name": "no_such_tool"},
            {"name": "ask_client", "id": "call_1"},
        ]
    )


def fault(dice: random.Random) -> Json:
    return dice.choice(
        [
            {"mode": "lorem", "tokens": 20, "cut_after_tokens": dice.randint(0, 19), "fault_attempts": 1},
            {"mode": "error", "error": {"class": "overloaded", "attempts": 1}, "text": "At last."},
            {"mode": "error", "error": {"class": "invalid_request"}},
            {"mode": "empty"},
        ]
    )


MODELS: Final[list[Callable[[random.Random], Json]]] = [answer, answer, tools, tools, tools, fault]


# --- what a client may do ---------------------------------------------------------------------------------------------


async def disturb(stack: Stack, session: str, dice: random.Random) -> str:
    """One random act; returns its name."""
    act = dice.choice(["steer", "steer", "follow_up", "interrupt", "interrupt", "cancel", "steer and cancel"])
    if act != "cancel":
        delivery = act.partition(" ")[0]
        await stack.post_message(session, act, delivery=delivery, llmsim=dice.choice(MODELS)(dice))
    if act.endswith("cancel"):
        # A storm may be too much for Temporal within the API's deadline: 503 means later, to any client.
        await eventually("a cancel is taken", lambda: cancelled(stack, session), within_seconds=LONG_SECONDS)
    return act


async def cancelled(stack: Stack, session: str) -> bool:
    answer = await stack.client.post(f"sessions/{session}/cancel")
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


async def weather(stack: Stack, number: int) -> tuple[str, list[str]]:
    """A session from its first message through its disturbances to its rest, and what was done to it."""
    dice = random.Random(f"{SEED}:{number}")
    session = await stack.create_session(
        capabilities=[{"ref": "test_faults"}, {"ref": "test_math"}],
        tools=[CLIENT_TOOL],
        parallel_tool_calls=dice.random() < 0.7,
    )
    await stack.post_message(session, "begin", llmsim=dice.choice(MODELS)(dice))
    done: list[str] = []
    for _ in range(DISTURBANCES):
        await asyncio.sleep(dice.uniform(0, LONGEST_PAUSE_SECONDS))  # when it strikes is part of the storm
        done.append(await disturb(stack, session, dice))
    await stack.idle(session, timeout=DEADLINE_SECONDS)
    return session, done


async def test_two_hundred_disturbed_sessions_keep_every_invariant_and_stay_usable(stack: Stack) -> None:
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE_SECONDS):
        async with asyncio.TaskGroup() as group:
            storms = [group.create_task(weather(stack, number)) for number in range(SESSIONS)]
        weathered = [storm.result() for storm in storms]
        rested = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for session, _ in weathered:
                group.create_task(stack.ask(session, "Still there?", llmsim={"mode": "fixed", "text": "Yes."}))
    endings: Counter[str] = Counter()
    for session, done in weathered:
        log = await stack.read_log(session)
        violations = check_log(log)
        if violations:
            print(f"seed {SEED}, {session} after {', '.join(done)}")
        assert_legal(violations, log)
        assert of_type(log, "output.message.completed")[-1]["message"]["content"] == [  # type: ignore[index]
            {"type": "text", "text": "Yes."}
        ]
        endings.update(event.type for event in log if event.type.startswith("turn.") and event.type != "turn.started")
    print(f"{dict(endings)}, at rest after {rested - began:.0f} s, all after {time.monotonic() - began:.0f} s")
    assert endings.keys() >= {"turn.completed", "turn.failed", "turn.cancelled"}
    assert "turn.sealed" not in endings
    assert endings.total() >= 2 * SESSIONS
