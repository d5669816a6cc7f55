"""A session with a client that reads its stream from the first event to the last, and what has to be true of it at the end.

Whatever was done to the processes in between, `Watched.settle` asks the same: what the client saw is the log, the log breaks
no rule, the session rests, and another message gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final, Self

import httpx
import msgspec

from domain.events import OutputMessageCompleted, StoredEvent
from domain.log_check import check_log, check_seen
from domain.messages import Phase
from infra.child_processes import Child
from tests.chaos.fault_points import eventually
from tests.stack import RECONNECT_SECONDS, Json, SeenEvent, Stack, assert_legal, payload

TURN_ENDINGS: Final = frozenset({"turn.completed", "turn.failed", "turn.cancelled", "turn.sealed"})
WAIT_SECONDS: Final = 60.0
"""Covers the 20 s after which a database step of a lost worker is tried again, on a busy machine."""

FAULTS: Final[list[Json]] = [{"ref": "test_faults"}, {"ref": "test_math"}]
STILL_HERE: Final = "Still here."


def lorem(tokens: int, *, delay_ms: int = 0, stall_after: int | None = None) -> Json:
    """Filler text. With `stall_after` the first attempt hangs after so many tokens and the second comes through: a step that is
    to be caught in the act does not end before, however slow the machine is.
    """
    script: Json = {"mode": "lorem", "tokens": tokens, "inter_token_delay_ms": delay_ms}
    if stall_after is not None:
        script |= {"stall_after_tokens": stall_after, "fault_attempts": 1}
    return script


def tool_turn(*calls: Json, before_ms: int = 0) -> Json:
    """One batch of tool calls, then an answer."""
    first: Json = {"text": "One moment please.", "tool_calls": list(calls), "inter_token_delay_ms": before_ms}
    return {"mode": "script", "turns": [first, {"text": "Done."}]}


def call(tool: str, call_id: str, **arguments: object) -> Json:
    return {"name": tool, "id": call_id, "arguments": arguments}


class Watched:
    """`seen` is what the client got, each event with the moment it came; reconnects resume after the last event."""

    def __init__(self, stack: Stack, session: str, *, api: str | None = None) -> None:
        self.stack = stack
        self.session = session
        self.seen: list[SeenEvent] = []
        self.at: list[float] = []
        self._api = api
        self._more = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, stack: Stack, *, api: str | None = None, **session: object) -> Self:
        watched = cls(stack, await stack.create_session(**session), api=api)
        watched._reading = asyncio.create_task(watched._read())
        return watched

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _read(self) -> None:
        while True:
            cursor = {"since_id": self.seen[-1].id} if self.seen else {}
            # An API that has lost its database answers with an error; a client comes back, as after a lost connection.
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                async with contextlib.aclosing(self.stack.stream(self.session, cursor, api=self._api)) as events:
                    async for event in events:
                        self.seen.append(event)
                        self.at.append(time.monotonic())
                        self._more.set()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def say(self, text: str, llmsim: Json, **body: object) -> None:
        await self.stack.post_message(self.session, text, llmsim=llmsim, **body)

    async def until(
        self, what: str, condition: Callable[[list[SeenEvent]], bool], *, within_seconds: float = WAIT_SECONDS
    ) -> None:
        """Wait until the condition holds for what was seen."""
        try:
            async with asyncio.timeout(within_seconds):
                while True:
                    self._more.clear()
                    if condition(self.seen):
                        return
                    await self._more.wait()
        except TimeoutError:
            lines = "\n".join(f"{one.sequence:5} {one.type} {str(one.data)[:160]}" for one in self.seen[-40:])
            raise AssertionError(f"{self.session}: not within {within_seconds} s: {what}\n{lines}") from None

    async def until_seen(self, event_type: str, count: int = 1, *, within_seconds: float = WAIT_SECONDS) -> None:
        await self.until(
            f"{count} {event_type}", lambda seen: len(of(seen, event_type)) >= count, within_seconds=within_seconds
        )

    async def until_turns_ended(self, count: int, *, within_seconds: float = WAIT_SECONDS) -> None:
        await self.until(
            f"{count} turns ended",
            lambda seen: sum(one.type in TURN_ENDINGS for one in seen) >= count and seen[-1].type == "session.idled",
            within_seconds=within_seconds,
        )

    def came_at(self, condition: Callable[[SeenEvent], bool], *, after: float) -> float:
        """When the first such event after that moment came; `inf` when none did."""
        moments = (at for one, at in zip(self.seen, self.at, strict=True) if at > after and condition(one))
        return next(moments, float("inf"))

    async def settle(self, *, within_seconds: float = WAIT_SECONDS) -> list[StoredEvent]:
        """The session is usable, its log is legal, and the client saw all of it. Returns the log."""
        await self.stack.idle(self.session, timeout=within_seconds)
        turns = sum(one.type in TURN_ENDINGS for one in await self.stack.read_log(self.session))
        await self.say("Are you there?", {"mode": "fixed", "text": STILL_HERE})
        await self.stack.idle(self.session, after_sequence=await self._sequence_of_ending(turns + 1, within_seconds))
        log = await self.stack.read_log(self.session)
        last = log[-1].sequence
        await self.until("the whole log", lambda seen: bool(seen) and seen[-1].sequence >= last)
        assert_legal([*check_log(log, finished=True), *check_seen([one.raw for one in self.seen], log)], log)
        answers = [one for one in log if one.type == "output.message.completed" and STILL_HERE in one.data.decode()]
        assert len(answers) == 1, f"the session was not usable: {len(answers)} answers"
        return log

    async def _sequence_of_ending(self, number: int, within_seconds: float) -> int:
        """The sequence just before the end of the nth turn."""
        endings = await self.stack.wait_for_event(self.session, TURN_ENDINGS, number, timeout=within_seconds)
        return endings[-1].sequence - 1


def of(seen: list[SeenEvent], event_type: str) -> list[SeenEvent]:
    return [one for one in seen if one.type == event_type]


def results(log: list[StoredEvent]) -> dict[str, Json]:
    """`tool.completed` by call id; fails when a call has two."""
    found: dict[str, Json] = {}
    for event in log:
        if event.type == "tool.completed":
            completed = payload(event)
            call_id = str(completed["tool_call_id"])
            assert call_id not in found, f"{call_id} completed twice"
            found[call_id] = completed
    return found


@contextlib.asynccontextmanager
async def watching() -> AsyncIterator[Callable[[Watched], Watched]]:
    """Ends the clients that were given to it."""
    watched: list[Watched] = []

    def add(one: Watched) -> Watched:
        watched.append(one)
        return one

    try:
        yield add
    finally:
        await asyncio.gather(*(one.close() for one in watched))


async def ready_worker(engine: Stack, environment: Mapping[str, str] | None = None) -> Child:
    """A worker that takes work."""
    worker = await engine.start_worker(environment)

    async def is_ready() -> bool:
        assert worker.exit_code is None, worker.log_tail()
        return "worker is ready" in worker.log_tail(50)

    await eventually("the worker is ready", is_ready, within_seconds=60)
    return worker


async def stop_worker(engine: Stack, worker: Child) -> None:
    """Gracefully, even one that sleeps."""
    if worker in engine.workers:
        engine.workers.remove(worker)
        worker.send_signal(signal.SIGCONT)
        await worker.stop()


@contextlib.asynccontextmanager
async def fresh_workers(engine: Stack) -> AsyncIterator[None]:
    """Whatever workers the block starts are gone after it."""
    try:
        yield
    finally:
        await asyncio.gather(*(stop_worker(engine, worker) for worker in list(engine.workers)))


def effects(path: Path, call_id: str) -> list[str]:
    """One entry per time the tool really ran."""
    return [line for line in path.read_text().splitlines() if line.split(" ")[0] == call_id]


async def ran(path: Path, call_id: str) -> None:
    async def has_line() -> bool:
        return bool(effects(path, call_id))

    await eventually(f"{call_id} has had its effect", has_line)


def answers(log: list[StoredEvent]) -> list[str]:
    """Texts of the final answers, without the one that `settle` asked for."""
    found: list[str] = []
    for event in log:
        if event.type == "output.message.completed":
            message = msgspec.json.decode(event.data, type=OutputMessageCompleted).message
            if message.phase is Phase.FINAL_ANSWER and message.text != STILL_HERE:
                found.append(message.text)
    return found
