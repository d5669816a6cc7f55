"""Streams that break: connections cut at any byte, and the API's own wake-up line to PostgreSQL. Nothing is missed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncGenerator
from urllib.parse import urlencode, urlsplit

import asyncpg
import msgspec

from domain.ids import Prefix, new_id
from domain.log_check import check_log, check_seen
from tests.chaos.fault_points import eventually
from tests.chaos.watched import Watched, answers, fresh_workers, lorem, ready_worker, watching
from tests.stack import Json, Stack, assert_legal

CUTS = 200
MAX_BYTES_PER_CONNECTION = 6_000
"""From less than the response's head to a few events."""

SILENCE_SECONDS = 0.5
"""A stream that has nothing to say for so long is cut as well."""

UNKNOWN_EVERY = 20
"""Every so many reconnects come with an id this server has never given out."""


async def raw_stream(url: str, query: Json, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    """The bytes of one SSE response as they come, head and chunk sizes included."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        target = f"{address.path}?{urlencode(query)}"
        head = [f"GET {target} HTTP/1.1", f"Host: {address.netloc}", "Accept: text/event-stream"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode())
        while data := await reader.read(65_536):
            yield data
    finally:
        writer.transport.abort()


async def read_at_most(url: str, query: Json, headers: dict[str, str], *, limit: int) -> bytes:
    """So many bytes of a response, or what came before it fell silent."""
    response = b""
    async with contextlib.aclosing(raw_stream(url, query, headers)) as stream:
        with contextlib.suppress(TimeoutError):
            while len(response) < limit:
                async with asyncio.timeout(SILENCE_SECONDS):
                    data = await anext(stream, b"")
                if not data:
                    break
                response += data
    return response[:limit]


def whole_events(response: bytes) -> list[Json]:
    """The events that arrived whole; what the cut left of the next one is dropped, as every SSE client does."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert not head or head.startswith(b"HTTP/1.1 200") or len(head) < 12, head[:200]
    text = b""
    while (size := body.partition(b"\r\n"))[1]:
        length = int(size[0], 16)
        chunk, body = size[2][:length], size[2][length + 2 :]
        text += chunk
        if len(chunk) < length:
            break
    events: list[Json] = []
    for frame in text.split(b"\n\n")[:-1]:
        fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if not line.startswith(b":"))
        if b"id" in fields:
            event = msgspec.json.decode(fields[b"data"], type=Json)
            assert event["id"] == fields[b"id"].decode()
            events.append(event)
    return events


class CutClient:
    """Reads a stream over connections that are cut at random, and keeps what is new. Its seed is in every failure."""

    def __init__(self, url: str, seed: int) -> None:
        self.seen: list[Json] = []
        self.cuts = 0
        self.repeated = 0
        self._url = url
        self._ids: set[object] = set()
        self._random = random.Random(seed)

    async def read_until_cut(self) -> None:
        """One connection, resumed where the last one was cut."""
        limit = self._random.randrange(1, MAX_BYTES_PER_CONNECTION)
        response = await read_at_most(self._url, *self._cursor(), limit=limit)
        self.cuts += 1
        for event in whole_events(response):
            if event["id"] in self._ids:
                self.repeated += 1
            else:
                self._ids.add(event["id"])
                self.seen.append(event)

    def _cursor(self) -> tuple[Json, dict[str, str]]:
        if not self.seen:
            return {}, {}
        last = self.seen[-1]
        if self.cuts % UNKNOWN_EVERY == UNKNOWN_EVERY - 1:
            # Without a time in it everything is sent again; it would never end if every reconnect did this.
            return {"since_id": f"{Prefix.EVENT}_{self._random.getrandbits(128):032x}"}, {}
        match self._random.randrange(3):
            case 0:
                return {"since_id": last["id"]}, {}
            case 1:
                return {}, {"Last-Event-ID": str(last["id"])}
            case _:
                return {"after_sequence": last["sequence"]}, {}


async def test_client_cut_two_hundred_times_at_any_byte_sees_exactly_the_log(engine: Stack) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"\nseed {seed}")
    async with fresh_workers(engine):
        await ready_worker(engine)
        # Without tools: an event that lists them is longer than most of the connections.
        session = await engine.create_session(harness_name="base")
        client = CutClient(f"{engine.api}/sessions/{session}/sse", seed)

        async def converse() -> list[str]:
            asked: list[str] = []
            while client.cuts < CUTS:
                asked.append(f"turn {len(asked)}")
                await engine.ask(session, asked[-1], llmsim=lorem(200, delay_ms=8))
            return asked

        conversation = asyncio.create_task(converse())
        while not conversation.done():
            await client.read_until_cut()
        asked = await conversation
        log = await engine.read_log(session)
        while len(client.seen) < len(log):
            assert client.cuts < 10 * CUTS, f"seed {seed}: {len(client.seen)} of {len(log)} events"
            await client.read_until_cut()

    violations = [*check_log(log), *check_seen(client.seen, log)]
    print(f"{client.cuts} cuts, {len(log)} events, {client.repeated} came again")
    assert_legal(violations, log)
    assert len(answers(log)) == len(asked)
    assert client.repeated > 0, "no unknown id ever made the server begin again"


async def test_reconnect_with_an_id_that_is_not_of_this_log_loses_nothing(engine: Stack) -> None:
    async with fresh_workers(engine):
        await ready_worker(engine)
        one, other = await engine.create_session(), await engine.create_session()
        await engine.ask(one, "hello", llmsim=lorem(20))
        [*_, foreign] = await engine.ask(other, "hello", llmsim=lorem(20))
        log = await engine.read_log(one)
        url = f"{engine.api}/sessions/{one}/sse"

        async def after(event_id: str) -> list[object]:
            response = await read_at_most(url, {"since_id": event_id}, {}, limit=1_000_000)
            return [event["id"] for event in whole_events(response)]

        everything = [event.id for event in log]
        from_elsewhere, from_now, without_time, senseless = await asyncio.gather(
            after(foreign.id), after(new_id(Prefix.EVENT)), after(f"{Prefix.EVENT}_{0:032x}"), after("not-an-id")
        )
        # Both tell their time, and it is later than everything here.
        assert from_elsewhere == from_now == []
        assert without_time == senseless == everything


async def test_nothing_is_missed_when_the_listener_connection_is_cut_while_streaming(engine: Stack) -> None:
    async with watching() as watch, fresh_workers(engine):
        await ready_worker(engine)
        watched = watch(await Watched.begin(engine))
        await watched.say("talk", lorem(300, delay_ms=10))
        admin = await asyncpg.connect(engine.database_url)

        async def cut() -> int:
            return (
                await admin.fetchval(
                    """SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE application_name = 'everruns-listener'"""
                )
                or 0
            )

        async def cut_one() -> bool:
            return await cut() > 0

        try:
            for cuts in range(4):
                await watched.until_seen("output.message.delta", 5 * (cuts + 1))
                await eventually("the listener is back and is cut again", cut_one)
            # The last cut falls into silence: what was committed meanwhile has to be found without a notification.
            await watched.until_turns_ended(1)
        finally:
            await admin.close()
        log = await watched.settle()
        assert len(answers(log)) == 1
