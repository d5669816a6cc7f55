"""Temporal's own cancel, from its Web UI or CLI, means what our cancel means."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import pytest

from tests.stack import Json, Stack, of_type

SLEEP: Final[Json] = {"name": "test_sleep", "arguments": {"seconds": 60}}
ASK_APP: Final[Json] = {
    "type": "client_side",
    "name": "ask_app",
    "description": "Ask the app",
    "parameters": {"type": "object"},
}

PHASES: Final[dict[str, tuple[Json, str, int]]] = {
    "reason": ({"mode": "lorem", "tokens": 3_000, "inter_token_delay_ms": 20}, "output.message.delta", 1),
    "act": ({"mode": "script", "turns": [{"tool_calls": [SLEEP, SLEEP]}, {"text": "done"}]}, "tool.started", 2),
    "wait": (
        {"mode": "script", "turns": [{"tool_calls": [{"name": "ask_app", "arguments": {}}]}, {"text": "done"}]},
        "tool.call_requested",
        1,
    ),
}


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_through_temporal_ends_the_turn_and_leaves_a_usable_session(stack: Stack, phase: str) -> None:
    script, reached, count = PHASES[phase]
    session = await stack.create_session(capabilities=[{"ref": "test_faults"}], tools=[ASK_APP])
    await stack.post_message(session, "go", llmsim=script)
    await stack.wait_for_event(session, reached, count)
    handle = (await stack.temporal()).get_workflow_handle(session)
    await handle.cancel()
    await stack.idle(session)
    assert (await handle.result())["ending"] == "cancelled"
    cancelled = of_type(await stack.check(session), "turn.cancelled")
    assert [one["reason"] for one in cancelled] == ["cancelled through Temporal"]
    await stack.ask(session, "and now?", llmsim={"mode": "echo"})
    assert len(of_type(await stack.check(session), "turn.completed")) == 1
