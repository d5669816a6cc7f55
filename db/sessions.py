"""Sessions: what was asked for (`sessions`), joined with what happens to it (`session_state`).

Plain asyncpg, unlike the other resources: a session is created in one transaction with the first event of its log, and every read
joins tables Piccolo does not know.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET, Struct

from db.child_sessions import delete_below
from db.columns import column_values, like_patterns, read_resource
from db.database import Database
from db.event_log import EventLog, SessionTransaction
from db.harnesses import DEFAULT_HARNESS
from db.initial_files import put_initial_files
from db.schedules import END_OF_SESSION
from db.session_cleanup import forget_sessions
from db.session_stats import usage_columns
from db.virtual_capabilities import declared_of
from domain.clock import timestamp
from domain.config import CapabilityRef, DeclaredCapability
from domain.errors import Archived, InvalidInput, NotFound, ResourceLimit, UnknownModel
from domain.events import NewEvent, SessionStarted, SessionTitleUpdated
from domain.ids import (
    ANONYMOUS_PRINCIPAL_ID,
    ANONYMOUS_USER_ID,
    DEFAULT_ORG_ID,
    DEFAULT_ORG_PUBLIC_ID,
    Prefix,
    format_id,
    new_id,
    parse_id,
)
from domain.limits import MAX_SESSIONS_PER_ORG
from domain.resources import (
    Lifecycle,
    NewSession,
    Session,
    SessionChanges,
    SessionStatus,
)

MAX_HARNESS_DEPTH: Final = 32
"""Writes refuse cycles; this bounds the walk should one ever be in the data."""

STATUS_ON_THE_WIRE: Final = {
    "started": SessionStatus.STARTED,
    "active": SessionStatus.ACTIVE,
    "waiting_for_tool_results": SessionStatus.WAITING_FOR_TOOL_RESULTS,
}
"""Everything else, a paused session among it, is shown as idle: clients know no other word."""

BUSY: Final = frozenset({"active", "waiting_for_tool_results"})

SELECT: Final = """
SELECT s.*, t.status, t.preview, t.output_preview, t.input_tokens, t.output_tokens, t.cache_read_tokens,
       t.cache_creation_tokens, t.estimated_cost_usd, t.actual_cost_usd, t.effective_cost_usd,
       t.started_at, t.finished_at, t.updated_at AS state_updated_at,
       a.public_id AS agent_public_id, a.capabilities AS agent_capabilities, p.session_id IS NOT NULL AS is_pinned,
       (SELECT count(*) FROM session_schedules x WHERE x.session_id = s.id AND x.ended_at IS NULL) AS active_schedule_count
FROM sessions s
JOIN session_state t ON t.session_id = s.id
LEFT JOIN agents a ON a.id = s.agent_id
LEFT JOIN session_pins p ON p.session_id = s.id AND p.user_id = $1
WHERE s.org_id = $2 AND s.deleted_at IS NULL
"""

HARNESS_CAPABILITIES: Final = f"""
WITH RECURSIVE chain AS (
    SELECT h.id AS leaf, h.parent_harness_id, h.capabilities, 0 AS depth FROM harnesses h WHERE h.id = ANY($1::uuid[])
    UNION ALL
    SELECT chain.leaf, h.parent_harness_id, h.capabilities, chain.depth + 1
    FROM harnesses h JOIN chain ON h.id = chain.parent_harness_id WHERE chain.depth < {MAX_HARNESS_DEPTH}
)
SELECT leaf, capabilities FROM chain ORDER BY leaf, depth DESC
"""  # noqa: S608

INSERT_SESSION: Final = """
INSERT INTO sessions (id, org_id, workspace_id, harness_id, agent_id, agent_identity_id, owner_principal_id, title, locale,
    system_prompt, model_id, capabilities, tools, initial_files, tags, mcp_servers, network_access, hints, max_iterations,
    parallel_tool_calls)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
"""


class SessionInContext(Struct, frozen=True, kw_only=True):
    """A session, and the capabilities of all its layers, base first."""

    session: Session
    layered_capabilities: list[CapabilityRef]
    declared: list[DeclaredCapability] = []
    """What references to rows come to, those of other sessions of the same page among them."""


async def create_session(database: Database, log: EventLog, new: NewSession) -> SessionInContext:
    """Workspace, session, initial files, state row and `session.started` in one transaction.

    Raises `NotFound`, `Archived`, `UnknownModel`, `InvalidInput` or `ResourceLimit`.
    """
    new.check()
    _one_of("harness_id", new.harness_id, "harness_name", new.harness_name)
    _one_of("agent_id", new.agent_id, "agent_name", new.agent_name)
    session_id = new_id(Prefix.SESSION)
    async with log.transaction(session_id) as work:
        await _insert(work, new)
    return await get_session(database, session_id)


async def _insert(work: SessionTransaction, new: NewSession) -> None:
    connection = work.connection
    count = await connection.fetchval(
        "SELECT count(*) FROM sessions WHERE org_id = $1 AND deleted_at IS NULL", DEFAULT_ORG_ID
    )
    if (count or 0) >= MAX_SESSIONS_PER_ORG:
        raise ResourceLimit(f"An organization may have {MAX_SESSIONS_PER_ORG} sessions; delete some first")
    agent = await find_named(connection, "agent", new.agent_id, new.agent_name)
    harness = await _harness(connection, new, agent)
    model = await find_model(connection, new.model_id)
    workspace = await _workspace(work, new.workspace_id, new.title)
    columns = column_values(new)
    await connection.execute(
        INSERT_SESSION,
        work.key,
        DEFAULT_ORG_ID,
        workspace,
        harness["id"],
        agent and agent["id"],
        new.agent_identity_id,
        ANONYMOUS_PRINCIPAL_ID,
        new.title,
        new.locale,
        columns.get("system_prompt"),
        model,
        columns.get("capabilities", "[]"),
        columns.get("tools", "[]"),
        columns.get("initial_files", "[]"),
        columns.get("tags", "[]"),
        columns.get("mcp_servers"),
        columns.get("network_access"),
        columns.get("hints"),
        new.max_iterations,
        columns.get("parallel_tool_calls"),
    )
    await connection.execute("INSERT INTO session_state (session_id, org_id) VALUES ($1, $2)", work.key, DEFAULT_ORG_ID)
    await put_initial_files(connection, work.key, workspace)
    started = SessionStarted(
        harness_id=format_id(Prefix.HARNESS, harness["id"]),
        agent_id=None if agent is None else agent["public_id"],
        model_id=new.model_id,
    )
    await work.append(NewEvent(data=started))


def _one_of(first: str, first_value: object, second: str, second_value: object) -> None:
    if first_value is not None and second_value is not None:
        raise InvalidInput(f"Give either {first} or {second}, not both", field=second)


async def find_named(
    connection: asyncpg.Connection, kind: Literal["agent", "harness"], public_id: str | None, name: str | None
) -> asyncpg.Record | None:
    """The active row a request names, locked against being archived meanwhile; None when it names none."""
    if public_id is None and name is None:
        return None
    table = {"agent": "agents", "harness": "harnesses"}[kind]
    if public_id is None:
        condition, value = "name = $2", name
    elif kind == "agent":
        condition, value = "public_id = $2", public_id
    else:
        condition, value = "id = $2", parse_id(Prefix.HARNESS, public_id)
    row = await connection.fetchrow(
        f"SELECT * FROM {table} WHERE org_id = $1 AND {condition} AND status <> 'deleted' "  # noqa: S608
        "ORDER BY status, created_at DESC LIMIT 1 FOR SHARE",
        DEFAULT_ORG_ID,
        value,
    )
    field = f"{kind}_name" if public_id is None else f"{kind}_id"
    if row is None:
        raise NotFound(f"There is no {kind} `{(public_id or name or '')[:80]}`", field=field)
    if row["status"] == Lifecycle.ARCHIVED:
        raise Archived(f"The {kind} is archived and takes no new sessions", field=field)
    return row


async def _harness(connection: asyncpg.Connection, new: NewSession, agent: asyncpg.Record | None) -> asyncpg.Record:
    if agent is not None and new.harness_id is None and new.harness_name is None:
        row = await find_named(connection, "harness", format_id(Prefix.HARNESS, agent["harness_id"]), None)
    elif new.harness_id is not None:
        row = await find_named(connection, "harness", new.harness_id, None)
    else:
        row = await find_named(connection, "harness", None, new.harness_name or DEFAULT_HARNESS)
    assert row is not None
    return row


async def find_model(connection: asyncpg.Connection, model_id: str | None) -> UUID | None:
    if model_id is None:
        return None
    key = parse_id(Prefix.MODEL, model_id)
    if not await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM models WHERE org_id = $1 AND id = $2 AND enabled)", DEFAULT_ORG_ID, key
    ):
        raise UnknownModel("model_id names no enabled model", field="model_id")
    return key


async def _workspace(work: SessionTransaction, workspace_id: str | None, title: str | None) -> UUID:
    """The workspace that was asked for, or a new one with the session's own UUID."""
    if workspace_id is None:
        await work.connection.execute(
            "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, $3)",
            work.key,
            DEFAULT_ORG_ID,
            title or work.session_id,
        )
        return work.key
    key = parse_id(Prefix.WORKSPACE, workspace_id)
    status = await work.connection.fetchval(
        "SELECT status FROM workspaces WHERE org_id = $1 AND id = $2 FOR SHARE", DEFAULT_ORG_ID, key
    )
    if status is None or status == Lifecycle.DELETED:
        raise NotFound("There is no such workspace", field="workspace_id")
    if status == Lifecycle.ARCHIVED:
        raise Archived("The workspace is archived and takes no new sessions", field="workspace_id")
    return key


async def get_session(database: Database, session_id: str) -> SessionInContext:
    found = await _select(database, "AND s.id = $3", [parse_id(Prefix.SESSION, session_id)])
    if not found:
        raise session_not_found(session_id)
    return found[0]


async def list_sessions(
    database: Database, *, agent_id: str | None, search: str | None, offset: int, limit: int
) -> tuple[list[SessionInContext], int]:
    """A page, newest first, and how many there are."""
    arguments: list[object] = []
    condition = ""
    if agent_id is not None:
        parse_id(Prefix.AGENT, agent_id)
        arguments.append(agent_id)
        condition += " AND s.agent_id = (SELECT id FROM agents WHERE org_id = $2 AND public_id = $3)"
    for pattern in like_patterns(search):
        arguments.append(pattern)
        condition += f" AND s.title ILIKE ${len(arguments) + 2}"
    total = await database.pool.fetchval(
        f"SELECT count(*) FROM sessions s WHERE $1::uuid IS NOT NULL AND s.org_id = $2 AND s.deleted_at IS NULL {condition}",  # noqa: S608
        ANONYMOUS_USER_ID,
        DEFAULT_ORG_ID,
        *arguments,
    )
    page = f" ORDER BY s.created_at DESC, s.id DESC OFFSET {int(offset)} LIMIT {int(limit)}"
    return await _select(database, condition + page, arguments), total


async def _select(database: Database, condition: str, arguments: Sequence[object]) -> list[SessionInContext]:
    rows = await database.pool.fetch(SELECT + condition, ANONYMOUS_USER_ID, DEFAULT_ORG_ID, *arguments)
    if not rows:
        return []
    chains: dict[UUID, list[CapabilityRef]] = {}
    for row in await database.pool.fetch(HARNESS_CAPABILITIES, list({row["harness_id"] for row in rows})):
        chains.setdefault(row["leaf"], []).extend(_refs(row["capabilities"]))
    found = [
        SessionInContext(
            session=_session_of(row),
            layered_capabilities=[
                *chains.get(row["harness_id"], []),
                *_refs(row["agent_capabilities"]),
                *_refs(row["capabilities"]),
            ],
        )
        for row in rows
    ]
    refs = [ref for one in found for ref in one.layered_capabilities]
    declared = await declared_of(database, refs)
    return [msgspec.structs.replace(one, declared=declared) for one in found] if declared else found


def _refs(text: str | None) -> list[CapabilityRef]:
    return [] if text is None else msgspec.json.decode(text, type=list[CapabilityRef])


def _session_of(row: asyncpg.Record) -> Session:
    return read_resource(
        dict(row),
        Session,
        id=format_id(Prefix.SESSION, row["id"]),
        organization_id=DEFAULT_ORG_PUBLIC_ID,
        agent_id=row["agent_public_id"],
        model_id=None if row["model_id"] is None else format_id(Prefix.MODEL, row["model_id"]),
        status=STATUS_ON_THE_WIRE.get(row["status"], SessionStatus.IDLE),
        updated_at=timestamp(max(row["updated_at"], row["state_updated_at"])),
        usage=usage_columns(dict(row)),
    )


async def update_session(
    database: Database, log: EventLog, session_id: str, changes: SessionChanges
) -> SessionInContext:
    """A change of title is an event of the session."""
    changes.check()
    async with log.transaction(session_id) as work:
        row = await _locked(work.connection, work.key, session_id)
        values = column_values(changes)
        if values:
            assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(values, 2))
            await work.connection.execute(
                f"UPDATE sessions SET {assignments}, updated_at = now() WHERE id = $1",  # noqa: S608
                work.key,
                *values.values(),
            )
        if changes.title is not UNSET and changes.title != row["title"]:
            updated = SessionTitleUpdated(title=changes.title or "", previous_title=row["title"])
            await work.append(NewEvent(data=updated))
    return await get_session(database, session_id)


async def delete_session(
    database: Database, session_id: str, stop: Callable[[str, str | None], Awaitable[None]]
) -> list[UUID]:
    """Hide a session for good, and those of its sub-agents with it; their logs stay. Running turns are stopped first.

    Returns their workspaces: those that nobody has any more are to be cleared away (`db.session_cleanup`).
    The stop is asked for inside the transaction: when it fails, the session is still there and the request can be repeated.
    """
    key = parse_id(Prefix.SESSION, session_id)
    async with database.transaction() as connection:
        await _locked(connection, key, session_id)
        status = await connection.fetchval("SELECT status FROM session_state WHERE session_id = $1", key)
        if status in BUSY or status == "paused":
            await stop(session_id, "The session was deleted")
        await connection.execute("UPDATE sessions SET deleted_at = now(), updated_at = now() WHERE id = $1", key)
        await connection.execute(END_OF_SESSION, key)
        children = await delete_below(connection, key)
        for child in children:
            await connection.execute(END_OF_SESSION, child.key)
            if child.busy:
                await stop(format_id(Prefix.SESSION, child.key), "The session was deleted")
        deleted = [key, *(child.key for child in children)]
        await forget_sessions(connection, deleted)
        query = "SELECT DISTINCT workspace_id FROM sessions WHERE id = ANY($1::uuid[]) AND workspace_id IS NOT NULL"
        return [row["workspace_id"] for row in await connection.fetch(query, deleted)]


async def pin_session(database: Database, session_id: str) -> None:
    key = await require_session(database, session_id)
    await database.pool.execute(
        "INSERT INTO session_pins (user_id, session_id, org_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        ANONYMOUS_USER_ID,
        key,
        DEFAULT_ORG_ID,
    )


async def unpin_session(database: Database, session_id: str) -> None:
    key = await require_session(database, session_id)
    await database.pool.execute(
        "DELETE FROM session_pins WHERE user_id = $1 AND session_id = $2", ANONYMOUS_USER_ID, key
    )


async def require_session(database: Database, session_id: str) -> UUID:
    """The row id of a session that exists and is not deleted. Raises `MalformedId` or `NotFound`."""
    key = parse_id(Prefix.SESSION, session_id)
    found = await database.pool.fetchval(
        "SELECT 1 FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL", DEFAULT_ORG_ID, key
    )
    if found is None:
        raise session_not_found(session_id)
    return key


def session_not_found(session_id: str) -> NotFound:
    return NotFound(f"There is no session `{session_id[:80]}`")


async def _locked(connection: asyncpg.Connection, key: UUID, session_id: str) -> asyncpg.Record:
    row = await connection.fetchrow(
        "SELECT title FROM sessions WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL FOR NO KEY UPDATE",
        DEFAULT_ORG_ID,
        key,
    )
    if row is None:
        raise session_not_found(session_id)
    return row
