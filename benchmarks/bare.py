"""The comparison: the same three steps as a plain Temporal workflow, with the same server, worker options and eager settings.

A process of its own, like `everruns dev` is, with worker and client in it. It reads one JSON order per line and answers with
one line; it ends when its standard input does, so that it never outlives the benchmark.

Two variants: steps that write nothing, and steps that write as many event rows as ours do, each with one awaited
`INSERT` and `pg_notify`, which is what one would write first.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Self
from uuid import uuid4

import asyncpg
import msgspec
from msgspec import Struct
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy

from infra.temporal_client import DATA_CONVERTER, configure_temporal_logging
from infra.temporal_worker import WorkerOptions, running_workers

QUEUE: Final = "benchmark-bare"
REASON: Final = "bare-reason"
ACT: Final = "bare-act"
WORKFLOW: Final = "BareTurn"

TABLE: Final = """CREATE TABLE IF NOT EXISTS benchmark_rows
    (session_id uuid NOT NULL, sequence bigserial, type text NOT NULL, data json NOT NULL, PRIMARY KEY (session_id, sequence))"""
NAIVE_APPEND: Final = """WITH written AS
    (INSERT INTO benchmark_rows (session_id, type, data) VALUES ($1, $2, $3) RETURNING session_id, sequence)
    SELECT pg_notify('benchmark_rows', session_id::text || ':' || sequence) FROM written"""


class Order(Struct, frozen=True, kw_only=True):
    """`rows`: how many a message, a reason, an act and a last reason write. Without `in_flight` one turn, else a closed loop."""

    rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    row_bytes: int = 500
    in_flight: int = 0
    seconds: float = 0.0


class Answer(Struct, frozen=True, kw_only=True):
    """From the call that starts the run to its result, and to the end of its last step."""

    result_ms: float = 0.0
    last_step_ms: float = 0.0
    turns: int = 0
    seconds: float = 0.0


class StepInput(Struct, frozen=True, kw_only=True):
    session: str
    rows: int
    row_bytes: int


class TurnInput(Struct, frozen=True, kw_only=True):
    session: str
    rows: tuple[int, int, int]
    row_bytes: int


class Steps:
    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.ended: dict[str, float] = {}

    @activity.defn(name=REASON)
    async def reason(self, step: StepInput) -> str:
        return await self._run(step)

    @activity.defn(name=ACT)
    async def act(self, step: StepInput) -> str:
        return await self._run(step)

    async def _run(self, step: StepInput) -> str:
        await self.write(step)
        self.ended[step.session] = time.monotonic()
        return "done"

    async def write(self, step: StepInput) -> None:
        data = msgspec.json.encode({"text": "x" * step.row_bytes}).decode()
        for _ in range(step.rows):
            await self._pool.execute(NAIVE_APPEND, step.session, "step.event", data)


@workflow.defn(name=WORKFLOW)
class BareTurn:
    @workflow.run
    async def run(self, turn: TurnInput) -> str:
        result = ""
        for name, rows in zip((REASON, ACT, REASON), turn.rows, strict=True):
            result = await workflow.execute_activity(
                name,
                StepInput(session=turn.session, rows=rows, row_bytes=turn.row_bytes),
                result_type=str,
                start_to_close_timeout=timedelta(minutes=15),
                heartbeat_timeout=timedelta(seconds=3),
                retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=6),
                summary=name,
            )
        return result


async def one_turn(client: Client, steps: Steps, order: Order) -> Answer:
    session = str(uuid4())
    began = time.monotonic()
    before, *rest = order.rows
    await steps.write(StepInput(session=session, rows=before, row_bytes=order.row_bytes))
    handle = await client.start_workflow(
        WORKFLOW,
        TurnInput(session=session, rows=(rest[0], rest[1], rest[2]), row_bytes=order.row_bytes),
        id=f"bare-{session}",
        task_queue=QUEUE,
        request_eager_start=True,
        rpc_timeout=timedelta(seconds=10),
        result_type=str,
    )
    await handle.result()
    ended = time.monotonic()
    return Answer(result_ms=(ended - began) * 1000, last_step_ms=(steps.ended.pop(session) - began) * 1000)


async def closed_loop(client: Client, steps: Steps, order: Order) -> Answer:
    began = time.monotonic()
    turns = 0

    async def lane() -> None:
        nonlocal turns
        while time.monotonic() - began < order.seconds:
            await one_turn(client, steps, order)
            turns += 1

    await asyncio.gather(*(lane() for _ in range(order.in_flight)))
    return Answer(turns=turns, seconds=time.monotonic() - began)


async def serve(address: str, dsn: str) -> None:
    configure_temporal_logging()
    client = await Client.connect(address, data_converter=DATA_CONVERTER)
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with asyncpg.create_pool(dsn, min_size=2, max_size=10) as pool:
        await pool.execute(TABLE)
        steps = Steps(pool)
        async with running_workers(
            client,
            WorkerOptions(turns_queue=QUEUE),
            workflows=[BareTurn],
            activities=[steps.reason, steps.act],
            interceptors=[],
        ):
            print("ready", flush=True)
            async for line in lines:
                order = msgspec.json.decode(line, type=Order)
                answer = await (closed_loop if order.in_flight else one_turn)(client, steps, order)
                print(msgspec.json.encode(answer).decode(), flush=True)


class Bare:
    """The other end of the pipe. `async with Bare(address, dsn) as bare: await bare.ask(Order())`"""

    def __init__(self, address: str, dsn: str) -> None:
        self._arguments: Sequence[str] = (sys.executable, "-m", "benchmarks.bare", address, dsn)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.pid = self._process.pid
        if (await self._line()).strip() != b"ready":
            raise RuntimeError("the bare comparison did not start")
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                async with asyncio.timeout(15):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def ask(self, order: Order) -> Answer:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return msgspec.json.decode(await self._line(), type=Answer)

    async def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return await self._process.stdout.readline()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1], sys.argv[2]))
