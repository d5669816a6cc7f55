"""Records the histories that `test_replay.py` replays. Run it when the workflow gets a new shape, never to make a test pass.

    python -m tests.replay.record 2026-11

writes `histories/<release>-<shape>.json` for every shape below. Histories of earlier releases stay: turns that began on them
may still be running somewhere.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from tests.stack import Json, Stack

HISTORIES: Final = Path(__file__).parent / "histories"

TOOL: Final[Json] = {"name": "get_current_time", "arguments": {}}
CLIENT_TOOL: Final[Json] = {
    "type": "client_side",
    "name": "ask_app",
    "description": "Ask the app",
    "parameters": {"type": "object"},
}
LONG: Final[Json] = {"mode": "lorem", "tokens": 5_000, "inter_token_delay_ms": 20}


async def answer(stack: Stack) -> str:
    session = await stack.create_session()
    await stack.ask(session, "hello")
    return session


async def tools(stack: Stack) -> str:
    session = await stack.create_session()
    turns = [{"text": "a moment", "tool_calls": [TOOL, TOOL]}, {"text": "done"}]
    await stack.ask(session, "what time?", llmsim={"mode": "script", "turns": turns})
    return session


async def client_tools(stack: Stack) -> str:
    session = await stack.create_session(tools=[CLIENT_TOOL])
    call = {"name": "ask_app", "arguments": {}}
    await stack.post_message(
        session, "go", llmsim={"mode": "script", "turns": [{"tool_calls": [call, TOOL]}, {"text": "done"}]}
    )
    requested = (await stack.wait_for_event(session, "tool.call_requested"))[0]
    calls = requested.data["tool_calls"]
    assert isinstance(calls, list)
    results = [{"tool_call_id": call["id"], "result": 1} for call in calls]
    await stack.client.post(f"sessions/{session}/tool-results", json={"tool_results": results})
    await stack.idle(session)
    return session


async def cancelled(stack: Stack) -> str:
    session = await stack.create_session()
    await stack.post_message(session, "long", llmsim=LONG)
    await stack.wait_for_event(session, "output.message.delta")
    await stack.cancel(session)
    await stack.idle(session)
    return session


async def interrupted(stack: Stack) -> str:
    session = await stack.create_session()
    await stack.post_message(session, "long", llmsim=LONG)
    await stack.wait_for_event(session, "output.message.delta")
    await stack.post_message(session, "stop", llmsim={"mode": "echo"}, delivery="interrupt")
    await stack.idle(session)
    return session


async def failed(stack: Stack) -> str:
    session = await stack.create_session()
    await stack.ask(session, "x", llmsim={"mode": "error", "error": {"class": "authentication"}})
    return session


async def steered(stack: Stack) -> str:
    session = await stack.create_session()
    await stack.post_message(session, "one", llmsim={"mode": "lorem", "tokens": 40, "inter_token_delay_ms": 20})
    await stack.wait_for_event(session, "output.message.delta")
    await stack.post_message(session, "two", llmsim={"mode": "echo"})
    await stack.idle(session)
    return session


SHAPES: Final[dict[str, Callable[[Stack], Awaitable[str]]]] = {
    shape.__name__: shape for shape in (answer, tools, client_tools, cancelled, interrupted, failed, steered)
}


def without_places(value: object) -> object:
    """The history without what tells where it was recorded."""
    match value:
        case dict():
            return {
                key: "" if key in ("identity", "stackTrace") else without_places(item) for key, item in value.items()
            }
        case list():
            return [without_places(item) for item in value]
        case str() if "@" in value:  # a worker's own (sticky) queue
            return "sticky"
        case _:
            return value


async def record(release: str) -> None:
    HISTORIES.mkdir(exist_ok=True)
    async with Stack() as stack:
        client = await stack.temporal()
        for name, shape in SHAPES.items():
            handle = client.get_workflow_handle(await shape(stack))
            await handle.result()
            history = await handle.fetch_history()
            anonymous = json.dumps(without_places(json.loads(history.to_json())), indent=1)
            (HISTORIES / f"{release}-{name}.json").write_text(anonymous)
            print(f"{release}-{name}: {len(history.events)} events")


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1]))
