"""The demo's client. It uses what any client uses: the HTTP API and one SSE stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final

import httpx
import msgspec

from cli.demo_screen import Screen
from cli.demo_story import CAPABILITIES, AnyJson, DemoFailure, Kill, SeenEvent, Teller, Told
from cli.demo_worker import Worker

READ_TIMEOUT_SECONDS: Final = 60.0
"""Twice the heartbeat of a silent stream."""

RECONNECT_SECONDS: Final = 0.1


async def tell(client: httpx.AsyncClient, worker: Worker, screen: Screen, teller: Teller) -> Told:
    """The conversation, from the agent's creation to the idle session, with the kills in between.

    Raises `DemoFailure`, also when a provider refuses to tell it.
    """
    started = time.monotonic()
    session_id = await _open_session(client, screen, teller)
    seen: list[SeenEvent] = []
    kills = teller.story.kills()
    waiting = list(kills)
    current: Kill | None = None
    async with contextlib.aclosing(follow(client, session_id)) as events:  # type: ignore[type-var]  # a generator
        await call(client, "POST", f"sessions/{session_id}/messages", _message(teller))
        async for event in events:
            seen.append(event)
            if current is not None and current.is_settled_by(event):
                screen.settled(current)
                current = None
            screen.show(event)
            due = next((kill for kill in waiting if kill.due(event)), None) if current is None else None
            if due is not None:
                current = due
                waiting.remove(due)
                await _kill(worker, due, event, screen)
            if event.type == "turn.failed" and teller.is_real:
                raise teller.failure(event)
            if event.type == "session.idled":
                break
    return Told(session_id=session_id, seen=seen, kills=kills, seconds=time.monotonic() - started)


async def follow(client: httpx.AsyncClient, session_id: str) -> AsyncIterator[SeenEvent]:
    """The session's events over one stream, which goes on where it was when a connection ends."""
    cursor: str | None = None
    while True:
        parameters = {"since_id": cursor} if cursor else {}
        with contextlib.suppress(httpx.TransportError):
            async with client.stream("GET", f"sessions/{session_id}/sse", params=parameters) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise DemoFailure(f"the stream was refused: {response.status_code} {response.text}")
                async for line in response.aiter_lines():
                    # Frames of the stream itself (connected, disconnecting) carry no event.
                    if line.startswith('data: {"id":'):
                        whole = msgspec.json.decode(line.removeprefix("data: "), type=AnyJson)
                        event = msgspec.convert({**whole, "whole": whole}, SeenEvent)
                        cursor = event.id
                        yield event
        await asyncio.sleep(RECONNECT_SECONDS)


async def call(client: httpx.AsyncClient, method: str, path: str, body: AnyJson | None = None) -> AnyJson:
    """Raises `DemoFailure`."""
    answer = await client.request(method, path, json=body)
    if answer.is_error:
        raise DemoFailure(f"{method} {path}: {answer.status_code} {answer.text}")
    return answer.json()


async def _kill(worker: Worker, kill: Kill, event: SeenEvent, screen: Screen) -> None:
    dead = worker.pid
    kill.aim(event, time.time())
    await worker.kill()
    await worker.start()
    screen.killed(kill, dead=dead, successor=worker.pid)


async def _open_session(client: httpx.AsyncClient, screen: Screen, teller: Teller) -> str:
    references = [{"ref": name} for name in CAPABILITIES]
    agent = await call(
        client,
        "POST",
        "agents",
        {"name": "picnic-planner", "system_prompt": teller.story.system_prompt, "capabilities": references},
    )
    session = await call(
        client,
        "POST",
        "sessions",
        {"agent_id": agent["id"], "title": "Picnic", **({"model_id": teller.model_id} if teller.model_id else {})},
    )
    screen.note(f"agent {agent['id']} with the tools of {', '.join(CAPABILITIES)}")
    screen.note(f"session {session['id']}, followed over one SSE stream")
    return str(session["id"])


def _message(teller: Teller) -> AnyJson:
    body: AnyJson = {"message": {"content": [{"type": "text", "text": teller.story.question}]}}
    return body if teller.story.script is None else {**body, "metadata": {"llmsim": teller.story.script}}
