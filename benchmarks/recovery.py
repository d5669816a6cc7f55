"""kill -9 of the worker that runs a step, in each phase, with another worker standing by.

In every round one worker holds three steps: one that waits for its first token, one in the middle of its stream, one in a tool.
Then a second worker is started, the first is killed, and the second is the victim of the next round. So each round is one
independent kill, and each phase is measured in it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import defaultdict
from typing import Final

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client

from benchmarks.client import Api, Conversation, EventStream, Json, message
from benchmarks.measurement import Figure, p50
from benchmarks.scope import Scope
from benchmarks.stack import Stack
from domain.ids import Prefix, parse_id
from infra.temporal_client import DATA_CONVERTER
from workflows import contract

POLL_SECONDS: Final = 0.01
STEP_SECONDS: Final = 60.0
TOKENS: Final = 12
TOOL_SECONDS: Final = 300

FIRST: Final = "before the first token"
STREAM: Final = "in the middle of the stream"
TOOL: Final = "in a tool"

STALLED_AT_ONCE: Final[Json] = {"mode": "lorem", "tokens": TOKENS, "stall_after_tokens": 0, "fault_attempts": 1}
STALLED: Final[Json] = {"mode": "lorem", "tokens": TOKENS, "stall_after_tokens": TOKENS // 2, "fault_attempts": 1}
LONG_TOOL: Final[Json] = {
    "mode": "script",
    "turns": [
        {"tool_calls": [{"name": "test_sleep", "arguments": {"seconds": TOOL_SECONDS}}]},
        {"text": "Done."},
    ],
}
SCRIPTS: Final = {FIRST: STALLED_AT_ONCE, STREAM: STALLED, TOOL: LONG_TOOL}


class Phase:
    """A session with a step in one phase, followed by a client. Moments are `time.time()`."""

    def __init__(self) -> None:
        self.arrived: dict[str, list[float]] = defaultdict(list)
        self._more = asyncio.Event()

    def event(self, kind: bytes, frame: bytes, at: float) -> None:
        self.arrived[kind.decode()].append(at)
        self._more.set()

    async def first(self, kind: str, *, after: float = 0.0) -> float:
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                self._more.clear()
                if came := [at for at in self.arrived[kind] if at > after]:
                    return came[0]
                await self._more.wait()


async def recovery(scope: Scope) -> list[Figure]:
    taken: dict[str, list[float]] = defaultdict(list)
    async with scope.stack(worker=False) as stack:
        temporal = await Client.connect(stack.addresses.temporal, data_converter=DATA_CONVERTER)
        victim = await stack.start_worker()
        await _polling(stack, temporal, victim.pid)
        async with scope.measured(stack.cpu_clock()):
            for _ in range(scope.count(5, quick=2)):
                phases = {name: await _begin(stack.api, script) for name, script in SCRIPTS.items()}
                await phases[FIRST][2].first("reason.started")
                await phases[STREAM][2].first("output.message.delta")
                await _running(stack, phases[TOOL][0], attempt=1)
                standby = await stack.start_worker()
                await _polling(stack, temporal, standby.pid)
                victim.stopping = True
                killed = time.time()
                victim.send_signal(signal.SIGKILL)
                tool = asyncio.create_task(_running(stack, phases[TOOL][0], attempt=2))
                for name in (FIRST, STREAM):
                    at = await phases[name][2].first("output.message.delta", after=killed)
                    taken[name].append(at - killed)
                    await phases[name][2].first("session.idled", after=killed)
                taken[TOOL].append(await tool - killed)
                await stack.api.post(f"/sessions/{phases[TOOL][0]}/cancel", b"{}")
                await phases[TOOL][2].first("session.idled", after=killed)
                for _, stream, _ in phases.values():
                    stream.close()
                await victim.wait()
                victim = standby
    figures: list[Figure] = []
    ends = {FIRST: "first delta", STREAM: "next delta", TOOL: "the tool runs again"}
    for name, seconds in taken.items():
        what = f"killed {name} → {ends[name]}"
        figures += [
            Figure(name=f"{what}, p50", value=p50(seconds), unit="s", n=len(seconds), aim=None if name == TOOL else 4),
            Figure(name=f"{what}, max", value=max(seconds), unit="s", n=len(seconds)),
        ]
    return figures


async def _begin(api: Api, script: Json) -> tuple[str, EventStream, Phase]:
    session = await api.create("/sessions", {"harness_name": "base", "capabilities": [{"ref": "test_faults"}]})
    phase = Phase()
    stream = await EventStream.open(api, session, phase.event)
    await Conversation(api, session).api.post(f"/sessions/{session}/messages", message("go", script))
    return session, stream, phase


async def _running(stack: Stack, session: str, *, attempt: int) -> float:
    """When this attempt of the session's tool call had begun: asked of the ledger, because a client is not told."""
    query = "SELECT 1 FROM tool_calls WHERE session_id = $1 AND status = 'running' AND attempt = $2"
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            if await stack.pool.fetchval(query, parse_id(Prefix.SESSION, session), attempt):
                return time.time()
            await asyncio.sleep(POLL_SECONDS)


async def _polling(stack: Stack, temporal: Client, pid: int) -> None:
    """Until Temporal has seen this worker ask for steps and for turns."""
    async with asyncio.timeout(STEP_SECONDS):
        for kind in (TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW):
            while True:
                seen = await temporal.workflow_service.describe_task_queue(
                    DescribeTaskQueueRequest(
                        namespace=temporal.namespace,
                        task_queue=TaskQueue(name=contract.TURNS_QUEUE),
                        task_queue_type=kind,
                    )
                )
                if any(poller.identity.startswith(f"{pid}@") for poller in seen.pollers):
                    break
                await asyncio.sleep(POLL_SECONDS)
