"""Who is told what: sinks of a session, and nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import asyncpg
import pytest

from domain.events import StoredEvent
from infra.embedded_postgres import EmbeddedPostgres
from infra.event_bus import CHANNEL, EventBus
from infra.network import LOOPBACK, free_port
from tests.sse import until

SESSION, OTHER = "session_" + "a" * 32, "session_" + "b" * 32


@dataclass(eq=False)
class RecordingSink:
    events: list[StoredEvent] = field(default_factory=list)
    told: list[int | None] = field(default_factory=list)

    def committed(self, events: Sequence[StoredEvent]) -> None:
        self.events.extend(events)

    def advanced(self, sequence: int | None) -> None:
        self.told.append(sequence)


def event(sequence: int) -> StoredEvent:
    return StoredEvent(
        id="event_" + f"{sequence:032x}",
        type="input.message",
        ts=datetime(2026, 1, 1, tzinfo=UTC),
        session_id=SESSION,
        sequence=sequence,
        context=b"{}",
        data=b"{}",
    )


def test_every_sink_of_the_session_gets_committed_events_and_no_other_session_s() -> None:
    bus, one, two, stranger = EventBus(), RecordingSink(), RecordingSink(), RecordingSink()
    bus.attach(SESSION, one)
    bus.attach(SESSION, two)
    bus.attach(OTHER, stranger)
    bus.publish(SESSION, [event(1), event(2)])
    bus.publish(SESSION, [])
    assert one.events == two.events == [event(1), event(2)]
    assert stranger.events == []


def test_a_detached_sink_hears_nothing_and_the_others_still_do() -> None:
    bus, one, two = EventBus(), RecordingSink(), RecordingSink()
    bus.attach(SESSION, one)
    bus.attach(SESSION, two)
    bus.detach(SESSION, one)
    bus.detach(SESSION, one)
    bus.publish(SESSION, [event(1)])
    assert (one.events, two.events) == ([], [event(1)])
    bus.detach(SESSION, two)
    bus.publish(SESSION, [event(2)])
    assert two.events == [event(1)]


async def test_notifications_reach_their_session_and_nonsense_reaches_nobody(dsn: str) -> None:
    bus, sink, stranger = EventBus(), RecordingSink(), RecordingSink()
    bus.attach(SESSION, sink)
    bus.attach(OTHER, stranger)
    await bus.listen(dsn)
    connection = await asyncpg.connect(dsn)
    key = SESSION.removeprefix("session_")
    for payload in ("", "x", key, f"{key}:", f"{key}:-1", f"{key}:1.5", f"{key}:²", f"{key}:5", f"{key}:6"):
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
    await until(lambda: sink.told[-1:] == [6])
    assert sink.told == [5, 6]
    assert stranger.told == []
    await connection.close()
    await bus.close()


async def test_every_sink_is_told_to_look_once_a_lost_connection_is_back(dsn: str) -> None:
    bus, sink, stranger = EventBus(), RecordingSink(), RecordingSink()
    bus.attach(SESSION, sink)
    bus.attach(OTHER, stranger)
    await bus.listen(dsn)
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
           WHERE datname = current_database() AND application_name = 'everruns-listener'"""
    )
    await until(lambda: sink.told == [None] and stranger.told == [None])
    await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, SESSION.removeprefix("session_") + ":9")
    await until(lambda: sink.told == [None, 9])
    await connection.close()
    await bus.close()


async def test_the_listener_outlasts_a_server_that_refuses_it(dsn: str, postgres: EmbeddedPostgres) -> None:
    bus, sink = EventBus(), RecordingSink()
    bus.attach(SESSION, sink)
    await bus.listen(dsn)
    name = dsn.split("?")[0].rpartition("/")[2]
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    refused = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1"
    with pytest.raises(TimeoutError):  # Long enough for a few attempts, all of them refused.
        await until(lambda: bool(sink.told), 1)
    assert await admin.fetchval(refused, name) == 0
    await admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    await until(lambda: sink.told == [None])
    await admin.close()
    await bus.close()


async def test_a_first_connection_that_fails_is_the_caller_s_business() -> None:
    with pytest.raises(OSError):  # noqa: PT011  # which one is the system's choice
        await EventBus().listen(f"postgresql://nobody@{LOOPBACK}:{free_port()}/nothing")
