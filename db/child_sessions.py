"""Sessions of sub-agents: how they are made, how deep they are, and how a message gets into one that is locked.

A child begins with what its parent runs with: owner, harness, agent, and the parent session's own configuration. One for another
agent of the organization gets that agent's harness and configuration instead. Two things come along in every case, because a
child must not be a way around them: what the parent's turn may reach in the network, and the depth.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db import inbox
from db.event_log import SessionTransaction
from db.messages import MAX_ACTIVE_TURNS_PER_ORG, PREVIEW_CHARACTERS
from db.task_rows import OPEN
from db.turn_config import read_session_layers
from db.turn_rows import StateRow
from domain.clock import now_timestamp
from domain.config import CapabilityRef, NetworkAccessList, TurnConfig, fold
from domain.events import InputMessage, NewEvent, SessionStarted
from domain.ids import Prefix, format_id, is_id, new_id, parse_id
from domain.limits import MAX_SESSIONS_PER_ORG
from domain.messages import Delivery, ExternalActor, Message, Role, TextPart
from domain.ports import TurnLabels
from domain.tasks import SUBAGENTS, SpawnRequest, TaskLimits, TaskProblem
from domain.turns import SessionGone

MAX_WALK: Final = 32
"""Steps towards the root: far more than depths that are allowed, should one ever be circular."""

_PARENT: Final = """
SELECT s.org_id, s.workspace_id, s.harness_id, s.agent_id, s.deleted_at IS NOT NULL AS deleted, t.config
FROM sessions s JOIN session_state st ON st.session_id = s.id LEFT JOIN turns t ON t.id = st.turn_id WHERE s.id = $1
"""
_ANCESTORS: Final = f"""
WITH RECURSIVE line AS (
    SELECT id, parent_session_id, 0 AS depth FROM sessions WHERE id = $1
    UNION ALL
    SELECT s.id, s.parent_session_id, line.depth + 1 FROM sessions s JOIN line ON s.id = line.parent_session_id
    WHERE line.depth < {MAX_WALK}
)
SELECT id, depth FROM line ORDER BY depth DESC LIMIT 1
"""  # noqa: S608
_AGENT: Final = """
SELECT id, public_id, harness_id, status FROM agents WHERE org_id = $1 AND status <> 'deleted' AND (public_id = $2 OR name = $2)
ORDER BY status, created_at DESC LIMIT 1 FOR SHARE
"""
_MODEL: Final = "SELECT 1 FROM models WHERE org_id = $1 AND id = $2 AND enabled"
_COUNTS: Final = """
SELECT (SELECT count(*) FROM sessions WHERE org_id = $1 AND deleted_at IS NULL) AS sessions,
       (SELECT count(*) FROM session_state WHERE org_id = $1 AND status IN ('active', 'waiting_for_tool_results')) AS active
"""
_STATE: Final = (
    "INSERT INTO session_state (session_id, org_id) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING session_id"
)
_SESSION: Final = """
INSERT INTO sessions (id, org_id, workspace_id, harness_id, agent_id, agent_identity_id, owner_principal_id, parent_session_id,
    title, locale, system_prompt, model_id, capabilities, tools, initial_files, tags, mcp_servers, network_access, hints,
    max_iterations, parallel_tool_calls)
SELECT $2, org_id, $3, $4, $5, agent_identity_id, owner_principal_id, id, $6, locale, CASE WHEN $7 THEN system_prompt END, $8,
    CASE WHEN $7 THEN capabilities ELSE '[]' END, CASE WHEN $7 THEN tools ELSE '[]' END, '[]', '[]',
    CASE WHEN $7 THEN mcp_servers END, $9, hints, coalesce($10, CASE WHEN $7 THEN max_iterations END),
    CASE WHEN $7 THEN parallel_tool_calls END
FROM sessions WHERE id = $1
"""
_MARK_ACTIVE: Final = "UPDATE session_state SET status = $2, preview = coalesce(preview, $3) WHERE session_id = $1"
_LABELS: Final = """SELECT s.title, o.public_id AS org_id, h.name AS harness, a.public_id AS agent_id,
    coalesce(a.display_name, a.name) AS agent_name
    FROM sessions s JOIN organizations o ON o.id = s.org_id JOIN harnesses h ON h.id = s.harness_id
    LEFT JOIN agents a ON a.id = s.agent_id WHERE s.id = $1"""


_BELOW: Final = f"""
WITH RECURSIVE below AS (
    SELECT id, 1 AS depth FROM sessions WHERE parent_session_id = $1
    UNION ALL
    SELECT s.id, below.depth + 1 FROM sessions s JOIN below ON s.parent_session_id = below.id WHERE below.depth < {MAX_WALK}
), deleted AS (
    UPDATE sessions SET deleted_at = now(), updated_at = now() WHERE id IN (SELECT id FROM below) AND deleted_at IS NULL
    RETURNING id
), ended AS (
    UPDATE session_tasks SET state = 'canceled', input_request = NULL, finished_at = clock_timestamp(),
        updated_at = clock_timestamp()
    WHERE child_session_id IN (SELECT id FROM below) AND {OPEN}
)
SELECT d.id, t.status IN ('active', 'waiting_for_tool_results', 'paused') AS busy
FROM deleted d JOIN session_state t ON t.session_id = d.id
"""  # noqa: S608


class DeletedChild(Struct, frozen=True, kw_only=True):
    """`busy`: its turn is to be stopped."""

    key: UUID
    busy: bool


class Child(Struct, frozen=True, kw_only=True):
    """`agent_id` is public. `has_new_files`: its initial files are to be put into its workspace, once all sessions are locked."""

    org_id: int
    root: UUID
    agent_id: str | None
    workspace: UUID
    has_new_files: bool


class _Agent(Struct, frozen=True, kw_only=True):
    """What a child runs as: the parent's, or, with `public_id`, one that was asked for."""

    harness_id: UUID
    row_id: UUID | None
    public_id: str | None = None


async def create_child(
    child: SessionTransaction, parent: UUID, request: SpawnRequest, limits: TaskLimits
) -> Child | None:
    """Session, state row and `session.started` of a child, in the caller's transaction, which holds no lock yet.

    None when it is there already. Raises `TaskProblem` or `SessionGone`.
    """
    connection = child.connection
    above = await connection.fetchrow(_PARENT, parent)
    if above is None or above["deleted"] or above["config"] is None:
        raise SessionGone
    line = await connection.fetchrow(_ANCESTORS, parent)
    assert line is not None, "the parent was found"
    org_id: int = above["org_id"]
    if line["depth"] >= limits.max_depth:
        raise TaskProblem(f"A sub-agent at depth {limits.max_depth} cannot spawn others. Do the work yourself.")
    await _check_room(connection, org_id)
    config = msgspec.json.decode(above["config"], type=TurnConfig)
    agent = await _agent(connection, org_id, request.agent) or _Agent(
        harness_id=above["harness_id"], row_id=above["agent_id"]
    )
    model = await _model(connection, org_id, request.model_id)
    if await connection.fetchval(_STATE, child.key, org_id) is None:
        return None
    other = agent.public_id is not None
    workspace: UUID = child.key if request.own_workspace else above["workspace_id"]
    if request.own_workspace:
        query = "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, $3)"
        await connection.execute(query, workspace, org_id, request.name)
    access = config.network_access
    await connection.execute(
        _SESSION,
        parent,
        child.key,
        workspace,
        agent.harness_id,
        agent.row_id,
        request.name,
        not other,
        model or (None if other or config.model_id is None else parse_id(Prefix.MODEL, config.model_id)),
        None if access == NetworkAccessList() else msgspec.json.encode(access).decode(),
        request.max_iterations,
    )
    if other and model is None:
        await _fall_back_on_model(connection, child.key, config)
    started = SessionStarted(
        harness_id=format_id(Prefix.HARNESS, agent.harness_id), agent_id=agent.public_id, model_id=request.model_id
    )
    await child.append(NewEvent(data=started))
    return Child(
        org_id=org_id,
        root=line["id"],
        agent_id=agent.public_id,
        workspace=workspace,
        has_new_files=other or request.own_workspace,
    )


async def _check_room(connection: asyncpg.Connection, org_id: int) -> None:
    counts = await connection.fetchrow(_COUNTS, org_id)
    assert counts is not None, "an aggregate has one row"
    if counts["sessions"] >= MAX_SESSIONS_PER_ORG or counts["active"] >= MAX_ACTIVE_TURNS_PER_ORG:
        raise TaskProblem(
            "The organization has too many sessions at the moment. Do the work yourself, or try again later."
        )


async def _agent(connection: asyncpg.Connection, org_id: int, wanted: str | None) -> _Agent | None:
    if wanted is None:
        return None
    row = await connection.fetchrow(_AGENT, org_id, wanted)
    if row is None:
        raise TaskProblem(f"There is no agent `{wanted[:80]}`.")
    if row["status"] != "active":
        raise TaskProblem(f"The agent `{wanted[:80]}` is archived.")
    return _Agent(harness_id=row["harness_id"], row_id=row["id"], public_id=row["public_id"])


async def _model(connection: asyncpg.Connection, org_id: int, wanted: str | None) -> UUID | None:
    if wanted is None:
        return None
    if not is_id(Prefix.MODEL, wanted) or not await connection.fetchval(
        _MODEL, org_id, key := parse_id(Prefix.MODEL, wanted)
    ):
        raise TaskProblem(f"`{wanted[:80]}` names no enabled model.")
    return key


async def _fall_back_on_model(connection: asyncpg.Connection, child: UUID, parent: TurnConfig) -> None:
    """An agent that names no model runs on the parent's."""
    found = await read_session_layers(connection, child)
    if found is None or parent.model_id is None or fold(found.layers).model_id is not None:
        return
    await connection.execute(
        "UPDATE sessions SET model_id = $2 WHERE id = $1", child, parse_id(Prefix.MODEL, parent.model_id)
    )


async def without_spawning(
    connection: asyncpg.Connection, session: UUID, config: TurnConfig, max_depth: int = TaskLimits().max_depth
) -> TurnConfig:
    """The configuration of a turn whose session is too deep in its tree to have children: it is not offered what would fail, by
    whatever reference. `config` has its rows pinned.
    """
    if not any(ref.ref == SUBAGENTS for ref in config.capabilities) and not any(
        SUBAGENTS in one.dependencies for one in config.declared
    ):
        return config
    line = await connection.fetchrow(_ANCESTORS, session)
    if line is None or line["depth"] < max_depth:
        return config
    left: list[CapabilityRef] = [ref for ref in config.capabilities if ref.ref != SUBAGENTS]
    declared = [
        msgspec.structs.replace(one, dependencies=[name for name in one.dependencies if name != SUBAGENTS])
        for one in config.declared
    ]
    return msgspec.structs.replace(config, capabilities=left, declared=declared)


async def delete_below(connection: asyncpg.Connection, session: UUID) -> list[DeletedChild]:
    """Hide the sub-agents of a session that is being deleted, and end their tasks: nobody is left to hear of them."""
    rows = await connection.fetch(_BELOW, session)
    return [DeletedChild(key=row["id"], busy=row["busy"]) for row in rows]


async def is_deleted(connection: asyncpg.Connection, session: UUID) -> bool:
    return await connection.fetchval("SELECT deleted_at IS NOT NULL FROM sessions WHERE id = $1", session) is not False


async def put_message(
    work: SessionTransaction, state: StateRow, text: str, actor: ExternalActor, **known: object
) -> str:
    """Leave a message unread in a session that the caller has locked; returns its id. `known` goes into its metadata.

    Unlike a person's it does not end a wait for the client: it is read with the results. A budget's pause goes on.
    """
    message = Message(
        id=new_id(Prefix.MESSAGE),
        role=Role.USER,
        content=[TextPart(text=text)],
        created_at=now_timestamp(),
        metadata=known or None,
        external_actor=actor,
    )
    (stored,) = await work.append(
        NewEvent(data=InputMessage(message=message), dedupe_key=f"input.message:{message.id}")
    )
    await inbox.put(work, state.org_id, stored.sequence, message.id, Delivery.STEER)
    status = state.status if state.status in ("waiting_for_tool_results", "paused") else "active"
    await work.connection.execute(_MARK_ACTIVE, work.key, status, text[:PREVIEW_CHARACTERS] or None)
    return message.id


async def turn_labels(connection: asyncpg.Connection, session: UUID, turn_number: int) -> TurnLabels | None:
    row = await connection.fetchrow(_LABELS, session)
    return None if row is None else TurnLabels(turn_number=turn_number, **dict(row))
