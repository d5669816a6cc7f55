"""Forks: a new session that begins with another's history, as it was at one of its events.

The log up to that event is copied under the same sequences, messages, turns and calls keep their ids, events get new ones. So are
the ledger of calls, providers' states of messages, checkpoints, values and secrets; of files only entries are copied, content is
shared. What the copy cuts off in the middle is brought to an end in the fork's own log: a half-written message is kept as
interrupted, open calls get a result that says so, the turn is cancelled. After that the two have nothing in common any more.

Everything happens in one transaction and a fixed number of statements, however long the history is. The source's log goes on
meanwhile; only writers of its files, values and settings wait.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import asyncpg
import msgspec
import structlog
from msgspec import Struct

from db import tool_ledger, value_history, workspace_history
from db.columns import json_column
from db.database import Database
from db.event_log import EventLog, SessionTransaction
from db.session_databases import copy_databases
from db.session_points import Point, PointRequest, find_point, multirange
from db.sessions import SessionInContext, find_model, find_named, get_session, session_not_found
from db.tool_ledger import act_exec_id
from db.turn_ending import close_partial_message
from db.turn_events import reason_aborted_event, turn_event
from db.turn_rows import TurnRow, read_turn, turn_context
from domain.errors import ResourceLimit
from domain.events import (
    NewEvent,
    OutputMessageCompleted,
    OutputMessageStarted,
    ReasonStarted,
    SessionForked,
    SessionIdled,
    TranscriptRepaired,
    TurnCancelled,
)
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, new_id, parse_id, uuid7
from domain.limits import (
    MAX_SESSIONS_PER_ORG,
    PROMPT_MAX_BYTES,
    SHORT_TEXT_MAX_BYTES,
    check_locale,
    check_tags,
    check_text,
)
from domain.turns import ToolSettlement
from infra.encryption import Keyring, UndecryptableSecret, bound_to

FORK_REASON: Final = "The session was forked while this turn ran"
CALL_CUT_OFF: Final = (
    "The conversation was forked before this call had returned. Whether it took effect is unknown; "
    "check before you repeat it."
)

_SOURCE: Final = """SELECT s.title, s.workspace_id, s.values_known_since, t.last_sequence, t.token_ratio
    FROM sessions s JOIN session_state t ON t.session_id = s.id
    WHERE s.org_id = $1 AND s.id = $2 AND s.deleted_at IS NULL FOR SHARE OF s"""
_COPY_SESSION: Final = """INSERT INTO sessions SELECT copied.*
    FROM sessions s, LATERAL jsonb_populate_record(s, $2::jsonb) AS copied WHERE s.id = $1"""
# What the source has used is not counted again; `started_at` tells that the conversation has begun.
_OPEN_STATE: Final = """
INSERT INTO session_state (session_id, org_id, status, last_sequence, hidden_events, preview, output_preview, token_ratio,
    model_id, started_at, finished_at)
SELECT $2, $3, CASE WHEN begun.ts IS NULL THEN 'started' ELSE 'idle' END, $4, $5::text::int8multirange, $6, $7, $8,
    (SELECT t.model_id FROM session_state t WHERE t.session_id = $1), begun.ts,
    CASE WHEN begun.ts IS NULL THEN NULL ELSE $9::timestamptz END
FROM (SELECT min(ts) AS ts FROM events WHERE session_id = $1 AND type = 'turn.started' AND sequence <= $4) AS begun
"""
_COPY_EVENTS: Final = """
INSERT INTO events (session_id, sequence, id, org_id, type, ts, turn_id, exec_id, context, data, metadata, tags, dedupe_key)
SELECT $2, sequence, another_id_v1(id), org_id, type, ts, turn_id, exec_id, context, data, metadata, tags, dedupe_key
FROM events WHERE session_id = $1 AND sequence <= $3
"""
# The ledger as it was at that event, told from the copied events: a call's own are found by their keys.
_COPY_CALLS: Final = """
INSERT INTO tool_calls SELECT copied.*
FROM tool_calls c
CROSS JOIN LATERAL (
    SELECT (SELECT e.data->>'status' FROM events e
            WHERE e.session_id = $2 AND e.dedupe_key = 'tool.completed:' || c.call_id) AS outcome,
           EXISTS (SELECT 1 FROM events e
            WHERE e.session_id = $2 AND e.dedupe_key = 'tool.started:' || c.call_id) AS started
) AS then_
CROSS JOIN LATERAL jsonb_populate_record(c, jsonb_build_object(
    'session_id', $2::uuid,
    'outcome', then_.outcome,
    'status', CASE WHEN then_.outcome IS NOT NULL THEN 'settled' WHEN then_.started THEN 'running' ELSE 'requested' END,
    'wait_answer', CASE WHEN then_.outcome IS NOT NULL THEN c.wait_answer END,
    'attempt', CASE WHEN then_.started THEN greatest(c.attempt, 1) ELSE 0 END,
    'requested_at', CASE WHEN then_.outcome IS NULL THEN clock_timestamp() ELSE c.requested_at END
)) AS copied
WHERE c.session_id = $1 AND c.call_id IN (
    SELECT part->>'id' FROM events e, json_array_elements(e.data#>'{message,content}') AS part
    WHERE e.session_id = $2 AND e.type = 'output.message.completed' AND part->>'type' = 'tool_call')
"""
_COPY_MESSAGE_STATES: Final = """
INSERT INTO message_states (session_id, message_id, state)
SELECT $2, m.message_id, m.state FROM message_states m WHERE m.session_id = $1 AND m.message_id IN (
    SELECT e.data#>>'{message,id}' FROM events e WHERE e.session_id = $2 AND e.type = 'output.message.completed')
"""
_CHECKPOINTS: Final = """SELECT id, native FROM context_checkpoints
    WHERE session_id = $1 AND source_sequence <= $2 AND NOT source_sequence <@ $3::text::int8multirange"""
_COPY_CHECKPOINT: Final = """
INSERT INTO context_checkpoints (session_id, id, source_sequence, masked_sequence, messages, native, native_tokens,
    carried_sequences, strategy, created_at)
SELECT $2, $4, source_sequence, masked_sequence, messages, $5, native_tokens, carried_sequences, strategy, created_at
FROM context_checkpoints WHERE session_id = $1 AND id = $3
"""
_SECRETS: Final = "SELECT id, name, value FROM session_secrets WHERE session_id = $1"
_COPY_SECRETS: Final = """INSERT INTO session_secrets (session_id, id, name, value)
    SELECT $1, n.id, n.name, n.value FROM unnest($2::uuid[], $3::text[], $4::text[]) AS n(id, name, value)"""
_LAST_TURN: Final = """SELECT sequence, turn_id FROM events WHERE session_id = $1 AND type = 'turn.started'
    ORDER BY sequence DESC LIMIT 1"""
_TURN_EVENTS: Final = """SELECT type, exec_id, data FROM events WHERE session_id = $1 AND sequence >= $2 AND turn_id = $3
    AND type IN ('reason.started', 'reason.completed', 'output.message.started', 'output.message.completed',
                 'turn.completed', 'turn.failed', 'turn.sealed', 'turn.cancelled', 'session.idled') ORDER BY sequence"""
# A batch is closed if one of its calls was tried; the event that opens it stands before the first of them.
_BATCH_WAS_OPENED: Final = """UPDATE tool_calls SET attempt = greatest(attempt, 1)
    WHERE session_id = $1 AND turn_id = $2 AND iteration = $3
    AND EXISTS (SELECT 1 FROM events WHERE session_id = $1 AND dedupe_key = $4)"""

_reason_started = msgspec.json.Decoder(ReasonStarted)
_message_started = msgspec.json.Decoder(OutputMessageStarted)
_message_completed = msgspec.json.Decoder(OutputMessageCompleted)

log = structlog.get_logger(__name__)


class NewFork(Struct, frozen=True, kw_only=True):
    """None stands for what the source has. Without `files`, files and values are those of now, whatever the point."""

    point: PointRequest
    files: bool = True
    title: str | None = None
    tags: list[str] | None = None
    locale: str | None = None
    system_prompt: str | None = None
    model_id: str | None = None
    agent_id: str | None = None

    def check(self) -> None:
        """Raises `InputTooLarge` or `InvalidInput`, naming the field."""
        self.point.check()
        if self.title is not None:
            check_text(self.title, "title", SHORT_TEXT_MAX_BYTES)
        if self.system_prompt is not None:
            check_text(self.system_prompt, "system_prompt", PROMPT_MAX_BYTES)
        if self.tags is not None:
            check_tags(self.tags)
        if self.locale is not None:
            check_locale(self.locale)


async def fork_session(
    database: Database, event_log: EventLog, keyring: Keyring, session_id: str, fork: NewFork
) -> SessionInContext:
    """Raises `NotFound`, `InvalidInput`, `Archived`, `UnknownModel`, `HistoryGone` or `ResourceLimit`."""
    fork.check()
    source = parse_id(Prefix.SESSION, session_id)
    fork_id = new_id(Prefix.SESSION)
    async with event_log.transaction(fork_id) as work:
        await _fork(work, keyring, source, session_id, fork)
    return await get_session(database, fork_id)


async def _fork(work: SessionTransaction, keyring: Keyring, source: UUID, session_id: str, fork: NewFork) -> None:
    connection = work.connection
    await _check_room(connection)
    found = await connection.fetchrow(_SOURCE, DEFAULT_ORG_ID, source)
    if found is None:
        raise session_not_found(session_id)
    point = await find_point(connection, source, fork.point, found["last_sequence"])
    moment = point.moment if fork.files and fork.point.is_given else None
    if moment is not None:
        workspace_history.check_known(found["values_known_since"], moment)
    await _copy_row(work, source, found, point, fork)
    await connection.execute(
        _OPEN_STATE,
        source,
        work.key,
        DEFAULT_ORG_ID,
        point.sequence,
        multirange(point.hidden),
        point.preview,
        point.output_preview,
        found["token_ratio"],
        point.moment,
    )
    await connection.execute(_COPY_EVENTS, source, work.key, point.sequence)
    await connection.execute(_COPY_CALLS, source, work.key)
    await connection.execute(_COPY_MESSAGE_STATES, source, work.key)
    await _copy_checkpoints(work, keyring, source, point)
    await value_history.copy(connection, source, work.key, moment)
    await copy_databases(connection, source, work.key, moment)
    await _copy_secrets(work, keyring, source)
    await workspace_history.copy(connection, found["workspace_id"], work.key, moment)
    await _end_open_turn(work)
    forked = SessionForked(
        source_session_id=session_id, source_sequence=point.sequence, input_message_ids=point.unread or None
    )
    await work.append(NewEvent(data=forked))


async def _check_room(connection: asyncpg.Connection) -> None:
    query = "SELECT count(*) FROM sessions WHERE org_id = $1 AND deleted_at IS NULL"
    if (await connection.fetchval(query, DEFAULT_ORG_ID) or 0) >= MAX_SESSIONS_PER_ORG:
        raise ResourceLimit(f"An organization may have {MAX_SESSIONS_PER_ORG} sessions; delete some first")


async def _copy_row(work: SessionTransaction, source: UUID, found: asyncpg.Record, point: Point, fork: NewFork) -> None:
    connection = work.connection
    agent = await find_named(connection, "agent", fork.agent_id, None)
    model = await find_model(connection, fork.model_id)
    title = fork.title or (found["title"] and f"{found['title']} (fork)")
    now = await connection.fetchval("SELECT now()")
    given: dict[str, object] = {
        "title": title,
        "tags": None if fork.tags is None else list(dict.fromkeys(fork.tags)),
        "locale": fork.locale,
        "system_prompt": fork.system_prompt,
        "model_id": model,
        "agent_id": agent and agent["id"],
    }
    new: dict[str, object] = {
        "id": work.key,
        "workspace_id": work.key,
        "parent_session_id": None,
        "forked_from_session_id": source,
        "forked_from_sequence": point.sequence,
        "created_at": now,
        "updated_at": now,
    }
    values = {**{name: value for name, value in given.items() if value is not None}, **new}
    await connection.execute(
        "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, $3)",
        work.key,
        DEFAULT_ORG_ID,
        title or work.session_id,
    )
    await connection.execute(_COPY_SESSION, source, json_column(values))


async def _copy_checkpoints(work: SessionTransaction, keyring: Keyring, source: UUID, point: Point) -> None:
    """Under new ids, to which what is sealed is sealed anew. One that cannot be read would not have been used either."""
    rows = await work.connection.fetch(_CHECKPOINTS, source, point.sequence, multirange(point.hidden))
    for row in rows:
        copied = uuid7()
        native = row["native"]
        if native is not None:
            native = _sealed_anew(keyring, native, "context_checkpoints", "native", row["id"], copied)
            if native is None:
                continue
        await work.connection.execute(_COPY_CHECKPOINT, source, work.key, row["id"], copied, native)


async def _copy_secrets(work: SessionTransaction, keyring: Keyring, source: UUID) -> None:
    """Those of now: secrets have no history. One that cannot be read with the keys there are is left out."""
    copies: list[tuple[UUID, str, str]] = []
    for row in await work.connection.fetch(_SECRETS, source):
        copied = uuid7()
        sealed = _sealed_anew(keyring, row["value"], "session_secrets", "value", row["id"], copied)
        if sealed is not None:
            copies.append((copied, row["name"], sealed))
    if copies:
        columns = [list(column) for column in zip(*copies, strict=True)]
        await work.connection.execute(_COPY_SECRETS, work.key, *columns)


def _sealed_anew(keyring: Keyring, envelope: str, table: str, column: str, row: UUID, copied: UUID) -> str | None:
    """The envelope for another row; None when this one cannot be opened. Raises `EncryptionNotConfigured`."""
    try:
        opened = keyring.decrypt(envelope, bound_to=bound_to(table, row, column))
    except UndecryptableSecret as error:
        log.warning("a sealed value was left out of a fork", place=error.place, reason=error.reason)
        return None
    return keyring.encrypt(opened.reveal(), bound_to=bound_to(table, copied, column))


# --- what was cut off --------------------------------------------------------------------------------------------------------


async def _end_open_turn(work: SessionTransaction) -> None:
    """End, in the fork's log, the turn in whose middle the copied events end. The source's rows of that turn stay as they are."""
    last = await work.connection.fetchrow(_LAST_TURN, work.key)
    if last is None:
        return
    rows = await work.connection.fetch(_TURN_EVENTS, work.key, last["sequence"], last["turn_id"])
    types = {row["type"] for row in rows}
    if "session.idled" in types:
        return
    found = await read_turn(work, last["turn_id"])
    assert found is not None, "turns are never deleted"
    turn = _as_it_was(found, rows)
    if not types & {"turn.completed", "turn.failed", "turn.sealed", "turn.cancelled"}:
        await close_partial_message(work, turn)
        if turn.open_message_id is None and turn.open_exec_id is not None:
            await work.append(reason_aborted_event(turn, format_id(Prefix.EXEC, turn.open_exec_id), None))
        await _settle_calls(work, turn)
        await work.append(turn_event(turn, TurnCancelled(turn_id=turn.public_id, reason=FORK_REASON)))
    await work.append(turn_event(turn, SessionIdled(turn_id=turn.public_id, iterations=turn.iteration)))


def _as_it_was(turn: TurnRow, rows: list[asyncpg.Record]) -> TurnRow:
    """The turn's row with where it stood after these events of it."""
    iteration = 0
    message_id: str | None = None
    exec_id: UUID | None = None
    for row in rows:
        match row["type"]:
            case "reason.started":
                iteration = _reason_started.decode(row["data"]).iteration or iteration
                exec_id = row["exec_id"]
            case "reason.completed" if row["exec_id"] == exec_id:
                exec_id = None
            case "output.message.started":
                message_id = _message_started.decode(row["data"]).message_id
            case "output.message.completed" if _message_completed.decode(row["data"]).message.id == message_id:
                message_id = None
            case _:
                pass
    return msgspec.structs.replace(turn, iteration=iteration, open_message_id=message_id, open_exec_id=exec_id)


async def _settle_calls(work: SessionTransaction, turn: TurnRow) -> None:
    for row in await tool_ledger.read_open_calls(work):
        await tool_ledger.settle_call(work, turn, row, ToolSettlement(status="cancelled", error=CALL_CUT_OFF))
        repaired = TranscriptRepaired(tool_call_id=row.call.id, tool_name=row.call.name, action="synthesize")
        key = f"transcript.repaired:{row.call.id}"
        await work.append(NewEvent(data=repaired, context=turn_context(turn), dedupe_key=key))
    await work.connection.execute(
        _BATCH_WAS_OPENED, work.key, turn.id, turn.iteration, f"act.started:{act_exec_id(turn, turn.iteration)}"
    )
    await tool_ledger.close_batch(work, turn, turn.iteration)
