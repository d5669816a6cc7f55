"""The event log: append, read, filter. Plain asyncpg, because these are the hottest statements of the system.

An append is one call of `append_events_v1` (see the second migration): it locks the session's counter, drops what an earlier
attempt has written already, numbers and inserts the rest, and notifies. Events committed through this process are also
handed to `EventBus.publish` so that local readers need not wait for PostgreSQL's notification.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import UUID

import asyncpg
import msgspec

from domain.events import NewEvent, StoredEvent, delta_position, joined_deltas
from domain.ids import Prefix, format_id, is_id, parse_id, uuid7
from domain.turns import SessionGone, StepFenced

MAX_EVENTS_PER_READ: Final = 10_000
MAX_SEQUENCE: Final = 2**63 - 1
MAX_TIMESTAMP_SECONDS: Final = 4_102_444_800  # the year 2100: a later "time" is no time but chance

APPEND: Final = "SELECT ordinal, sequence, ts FROM append_events_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
COLUMNS: Final = "id, type, ts, sequence, context, data, metadata, tags"
READ: Final = f"SELECT {COLUMNS} FROM events WHERE session_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3"  # noqa: S608
READ_TYPES: Final = f"""SELECT {COLUMNS} FROM events WHERE session_id = $1 AND sequence > $2 AND type = ANY($4)
    ORDER BY sequence LIMIT $3"""  # noqa: S608
READ_VISIBLE: Final = f"""SELECT {COLUMNS} FROM events WHERE session_id = $1 AND sequence > $2 AND type = ANY($4)
    AND NOT sequence <@ (SELECT hidden_events FROM session_state WHERE session_id = $1)
    ORDER BY sequence LIMIT $3"""  # noqa: S608
READ_LATEST_CONVERSATION: Final = f"""SELECT {COLUMNS} FROM events WHERE session_id = $1
    AND type IN ('input.message', 'output.message.completed', 'tool.completed',
                 'turn.started', 'reason.started', 'turn.cancelled', 'session.forked', 'session.rewound')
    AND sequence >= $3 AND NOT sequence <@ (SELECT hidden_events FROM session_state WHERE session_id = $1)
    ORDER BY sequence DESC LIMIT $2"""  # noqa: S608
READ_AT: Final = f"""SELECT {COLUMNS} FROM events WHERE session_id = $1 AND sequence = ANY($2::bigint[])
    ORDER BY sequence"""  # noqa: S608
SEQUENCE_OF: Final = "SELECT sequence FROM events WHERE session_id = $1 AND id = $2"
SEQUENCE_BEFORE_TIME: Final = """SELECT coalesce(max(sequence), 0) FROM events
    WHERE session_id = $1 AND ts <= $2"""
# From the newest beginning of the message on: looked for backwards, so that a long session costs no more than the message.
DELTAS_OF: Final = """SELECT data FROM events WHERE session_id = $1 AND sequence < $2 AND type = $3
    AND data->>'message_id' = $4 AND sequence >= coalesce((
        SELECT sequence FROM events WHERE session_id = $1 AND sequence < $2 AND type = $3
        AND data->>'message_id' = $4 AND data->>'offset' = '0' ORDER BY sequence DESC LIMIT 1), 0)
    ORDER BY sequence"""

REPLACEMENT_OF: Final = """SELECT CASE WHEN type = 'output.message.replaced' THEN data->>'replacement' END FROM events
    WHERE session_id = $1 AND type IN ('output.message.replaced', 'output.message.delta') AND data->>'message_id' = $2
    ORDER BY sequence DESC LIMIT 1"""

_encode = msgspec.json.Encoder().encode


class Publisher(Protocol):
    def publish(self, session_id: str, events: Sequence[StoredEvent]) -> None:
        """Hand events that are committed to readers in this process."""
        ...


class Prepared:
    """Events encoded for one append: the column arrays of `append_events_v1`, in call order."""

    __slots__ = ("contexts", "datas", "dedupes", "events", "execs", "ids", "metadatas", "tags", "turns", "types")

    def __init__(self, events: Sequence[NewEvent]) -> None:
        self.events = events
        self.ids = [uuid7() for _ in events]
        self.types = [event.type for event in events]
        self.contexts = [_json(event.context) for event in events]
        self.datas = [_json(event.data) for event in events]
        self.metadatas = [None if event.metadata is None else _json(event.metadata) for event in events]
        self.tags = [None if event.tags is None else _encode(event.tags).decode() for event in events]
        self.turns = [_uuid_or_none(Prefix.TURN, event.context.turn_id) for event in events]
        self.execs = [_uuid_or_none(Prefix.EXEC, event.context.exec_id) for event in events]
        self.dedupes = [event.dedupe_key for event in events]

    def stored(self, session_id: str, ordinal: int, sequence: int, ts: datetime) -> StoredEvent:
        """The row as a reader will see it; `ordinal` counts from 1."""
        place = ordinal - 1
        metadata = self.metadatas[place]
        return StoredEvent(
            id=format_id(Prefix.EVENT, self.ids[place]),
            type=self.types[place],
            ts=ts,
            session_id=session_id,
            sequence=sequence,
            context=self.contexts[place].encode(),
            data=self.datas[place].encode(),
            metadata=None if metadata is None else metadata.encode(),
            tags=self.events[place].tags,
        )


def _json(value: object) -> str:
    """JSON that PostgreSQL takes: its text type has no NUL, so one in a string becomes U+FFFD."""
    text = _encode(value).decode()
    if "\\u0000" in text:
        text = _encode(_without_nul(msgspec.json.decode(text))).decode()
    return text


def _without_nul(value: object) -> object:
    match value:
        case str():
            return value.replace("\0", "\ufffd")
        case list():
            return [_without_nul(item) for item in value]
        case dict():
            return {_without_nul(key): _without_nul(item) for key, item in value.items()}
        case _:
            return value


def _uuid_or_none(prefix: Prefix, text: str | None) -> UUID | None:
    return None if text is None else parse_id(prefix, text)


async def append_in(
    connection: asyncpg.Connection,
    session_id: str,
    events: Sequence[NewEvent],
    *,
    fence: tuple[UUID, int] | None = None,
) -> list[StoredEvent]:
    """Append inside the caller's transaction; returns what was new, in order. The caller publishes after its commit.

    `fence` is (exec id, attempt) of the running reason step. Raises `SessionGone` or `StepFenced`.
    """
    if not events:
        return []
    prepared = Prepared(events)
    fence_exec, fence_attempt = fence or (None, None)
    try:
        rows = await connection.fetch(
            APPEND,
            parse_id(Prefix.SESSION, session_id),
            fence_exec,
            fence_attempt,
            prepared.ids,
            prepared.types,
            prepared.turns,
            prepared.execs,
            prepared.contexts,
            prepared.datas,
            prepared.metadatas,
            prepared.tags,
            prepared.dedupes,
        )
    except asyncpg.PostgresError as error:
        if getattr(error, "sqlstate", None) == "EV001":
            raise StepFenced from error
        if getattr(error, "sqlstate", None) == "EV002":
            raise SessionGone from error
        raise
    return sorted(
        (prepared.stored(session_id, row["ordinal"], row["sequence"], row["ts"]) for row in rows),
        key=lambda event: event.sequence,
    )


@dataclass(frozen=True, kw_only=True)
class EventFilter:
    """The filters of `GET /events`. Cursors are exclusive, times inclusive; one of `tags` is enough."""

    types: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    after_sequence: int | None = None
    before_sequence: int | None = None
    from_ts: datetime | None = None
    to_ts: datetime | None = None
    turn_id: str | None = None
    exec_id: str | None = None
    trace_id: str | None = None
    tags: Sequence[str] = field(default_factory=tuple)
    tool_name: str | None = None
    q: str | None = None

    def where(self, session: UUID) -> tuple[str, list[object]]:
        """A WHERE clause and its arguments, the session first."""
        arguments: list[object] = [session]
        clauses = ["session_id = $1"]

        def add(clause: str, value: object) -> None:
            arguments.append(value)
            clauses.append(clause.format(f"${len(arguments)}"))

        if self.types:
            add("type = ANY({}::text[])", list(self.types))
        if self.exclude:
            add("type <> ALL({}::text[])", list(self.exclude))
        if self.after_sequence is not None:
            add("sequence > {}", self.after_sequence)
        if self.before_sequence is not None:
            add("sequence < {}", self.before_sequence)
        if self.from_ts is not None:
            add("ts >= {}", self.from_ts)
        if self.to_ts is not None:
            add("ts <= {}", self.to_ts)
        if self.turn_id is not None:
            add("turn_id = {}", parse_id(Prefix.TURN, self.turn_id))
        if self.exec_id is not None:
            add("exec_id = {}", parse_id(Prefix.EXEC, self.exec_id))
        if self.trace_id is not None:
            add("context->>'trace_id' = {}", self.trace_id)
        if self.tags:
            add("tags && {}::text[]", list(self.tags))
        if self.tool_name is not None:
            add("coalesce(data->>'tool_name', data#>>'{{tool_call,name}}') = {}", self.tool_name)
        if self.q:
            # As it stands in the stored JSON, where quotes, backslashes and control characters are escaped.
            needle = _encode(self.q)[1:-1].decode()
            escaped = needle.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            add("data::text ILIKE '%' || {} || '%'", escaped)
        return " AND ".join(clauses), arguments


class SessionTransaction:
    """A transaction over one session. What it appends is published when, and only when, it has committed."""

    def __init__(self, connection: asyncpg.Connection, session_id: str) -> None:
        self.connection = connection
        self.session_id = session_id
        self.key = parse_id(Prefix.SESSION, session_id)
        self.appended: list[StoredEvent] = []

    async def append(self, *events: NewEvent, fence: tuple[UUID, int] | None = None) -> list[StoredEvent]:
        stored = await append_in(self.connection, self.session_id, events, fence=fence)
        self.appended.extend(stored)
        return stored


class EventLog:
    def __init__(self, pool: asyncpg.Pool, publisher: Publisher) -> None:
        self.pool = pool
        self._publisher = publisher

    @contextlib.asynccontextmanager
    async def transaction(self, session_id: str) -> AsyncIterator[SessionTransaction]:
        async with self.pool.acquire() as connection:
            async with connection.transaction():
                work = SessionTransaction(connection, session_id)  # type: ignore[arg-type]  # a pool's proxy
                yield work
            # Before the connection goes back: PostgreSQL's notification is on its way, and a reader it reaches first would
            # fetch from the log what is handed over here.
            self._publisher.publish(session_id, work.appended)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection for reading."""
        async with self.pool.acquire() as connection:
            yield connection  # type: ignore[misc]  # a pool's proxy

    async def append(
        self, session_id: str, events: Sequence[NewEvent], *, fence: tuple[UUID, int] | None = None
    ) -> list[StoredEvent]:
        """Append in a transaction of its own: one round trip. Raises `SessionGone` or `StepFenced`."""
        async with self.pool.acquire() as connection:
            stored = await append_in(connection, session_id, events, fence=fence)  # type: ignore[arg-type]
            self._publisher.publish(session_id, stored)
        return stored

    async def read(
        self, session_id: str, *, after_sequence: int, limit: int, types: Sequence[str] | None = None
    ) -> list[StoredEvent]:
        """Events after a cursor, oldest first."""
        key = parse_id(Prefix.SESSION, session_id)
        if types is None:
            rows = await self.pool.fetch(READ, key, after_sequence, limit)
        else:
            rows = await self.pool.fetch(READ_TYPES, key, after_sequence, limit, list(types))
        return [stored_event(session_id, row) for row in rows]

    async def read_visible(
        self, session_id: str, *, after_sequence: int, limit: int, types: Sequence[str]
    ) -> list[StoredEvent]:
        """Like `read`, without what rewinds have taken out of the conversation."""
        key = parse_id(Prefix.SESSION, session_id)
        rows = await self.pool.fetch(READ_VISIBLE, key, after_sequence, limit, list(types))
        return [stored_event(session_id, row) for row in rows]

    async def find(
        self, session_id: str, wanted: EventFilter, *, limit: int = MAX_EVENTS_PER_READ, newest: bool = False
    ) -> list[StoredEvent]:
        """Filtered events, oldest first; with `newest` the last `limit` of them instead of the first."""
        where, arguments = wanted.where(parse_id(Prefix.SESSION, session_id))
        order = "DESC" if newest else "ASC"
        rows = await self.pool.fetch(
            f"SELECT {COLUMNS} FROM events WHERE {where} ORDER BY sequence {order} LIMIT {int(limit)}",  # noqa: S608
            *arguments,
        )
        found = [stored_event(session_id, row) for row in rows]
        return found[::-1] if newest else found

    async def count(self, session_id: str, wanted: EventFilter) -> int:
        where, arguments = wanted.where(parse_id(Prefix.SESSION, session_id))
        return await self.pool.fetchval(f"SELECT count(*) FROM events WHERE {where}", *arguments)  # noqa: S608

    async def last_sequence(self, session_id: str) -> int:
        """0 for a session without events."""
        query = "SELECT last_sequence FROM session_state WHERE session_id = $1"
        return await self.pool.fetchval(query, parse_id(Prefix.SESSION, session_id)) or 0

    async def sequence_of(self, session_id: str, event_id: str) -> int | None:
        """The sequence of a stored event of this session, if there is one."""
        if not is_id(Prefix.EVENT, event_id):
            return None
        return await self.pool.fetchval(
            SEQUENCE_OF, parse_id(Prefix.SESSION, session_id), parse_id(Prefix.EVENT, event_id)
        )

    async def cursor_from(self, session_id: str, event_id: str) -> int:
        """The sequence after which a client that last saw `event_id` goes on. Never fails.

        An id that is not stored (an ephemeral event, or another server's) still tells its time, being a UUIDv7: everything
        after that moment is sent. An id without a time sends everything.
        """
        found = await self.sequence_of(session_id, event_id)
        if found is not None:
            return found
        if not is_id(Prefix.EVENT, event_id):
            return 0
        value = parse_id(Prefix.EVENT, event_id)
        if value.version != 7:
            return 0
        seconds = (value.int >> 80) / 1000
        if seconds > MAX_TIMESTAMP_SECONDS:
            return 0
        moment = datetime.fromtimestamp(seconds, tz=UTC)
        return await self.pool.fetchval(SEQUENCE_BEFORE_TIME, parse_id(Prefix.SESSION, session_id), moment)

    async def text_before(self, event: StoredEvent) -> str:
        """The text of a message or thinking before one of its deltas, from the deltas stored so far."""
        message_id, offset = delta_position(event)
        rows = await self.pool.fetch(
            DELTAS_OF, parse_id(Prefix.SESSION, event.session_id), event.sequence, event.type, message_id
        )
        return joined_deltas(row["data"].encode() for row in rows)[:offset]

    async def summary(self, session_id: str) -> EventsSummary:
        rows = await self.pool.fetch(
            """SELECT type, count(*) AS n, min(ts) AS first, max(ts) AS last FROM events
               WHERE session_id = $1 GROUP BY type ORDER BY type""",
            parse_id(Prefix.SESSION, session_id),
        )
        return EventsSummary(
            by_type={row["type"]: row["n"] for row in rows},
            first_ts=min((row["first"] for row in rows), default=None),
            last_ts=max((row["last"] for row in rows), default=None),
        )


@dataclass(frozen=True, kw_only=True)
class EventsSummary:
    by_type: dict[str, int]
    first_ts: datetime | None
    last_ts: datetime | None


def stored_event(session_id: str, row: asyncpg.Record) -> StoredEvent:
    """A row of `COLUMNS`, taken apart by position: by name it takes a third longer, 2,000 times a model call."""
    event_id, event_type, ts, sequence, context, data, metadata, tags = row
    return StoredEvent(
        id="event_" + event_id.hex,
        type=event_type,
        ts=ts,
        session_id=session_id,
        sequence=sequence,
        context=context.encode(),
        data=data.encode(),
        metadata=None if metadata is None else metadata.encode(),
        tags=tags,
    )


async def read_latest_conversation(
    connection: asyncpg.Connection, session_id: str, limit: int, *, since: int = 0
) -> tuple[list[StoredEvent], bool]:
    """The newest events a prompt is built from, oldest first, from number `since` on; and whether some were left out for length.

    What rewinds have hidden is never among them.
    """
    rows = await connection.fetch(READ_LATEST_CONVERSATION, parse_id(Prefix.SESSION, session_id), limit + 1, since)
    return [stored_event(session_id, row) for row in reversed(rows[:limit])], len(rows) > limit


async def read_at(connection: asyncpg.Connection, session_id: str, sequences: Sequence[int]) -> list[StoredEvent]:
    """The events at these places, in the order of the log."""
    rows = await connection.fetch(READ_AT, parse_id(Prefix.SESSION, session_id), list(sequences))
    return [stored_event(session_id, row) for row in rows]


async def read_partial_text(
    connection: asyncpg.Connection, session_id: str, message_id: str, delta_type: str = "output.message.delta"
) -> str:
    """What has been streamed of a message, or of the thinking before it, so far."""
    key = parse_id(Prefix.SESSION, session_id)
    rows = await connection.fetch(DELTAS_OF, key, MAX_SEQUENCE, delta_type, message_id)
    return joined_deltas(row["data"].encode() for row in rows)


async def read_replacement(connection: asyncpg.Connection, session_id: str, message_id: str) -> str | None:
    """What a guardrail has put in place of a message's text, unless the message was begun anew since."""
    return await connection.fetchval(REPLACEMENT_OF, parse_id(Prefix.SESSION, session_id), message_id)
