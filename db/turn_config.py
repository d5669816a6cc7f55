"""Reads the configuration layers of a session, base first, for the turn that is about to begin."""

from __future__ import annotations

from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from domain.config import CapabilityRef, ConfigLayer, InitialFile, NetworkAccessList
from domain.ids import Prefix, format_id
from domain.tools import ToolDefinition

T = TypeVar("T")

MAX_HARNESS_DEPTH: Final = 32
"""Writes refuse cycles; this bounds the walk should one ever be in the data."""

_LAYER_COLUMNS = "system_prompt, capabilities, initial_files, mcp_servers, network_access, parallel_tool_calls"

SESSION_LAYERS: Final = f"""
WITH RECURSIVE chain AS (
    SELECT h.*, 0 AS depth FROM harnesses h WHERE h.id = (SELECT harness_id FROM sessions WHERE id = $1)
    UNION ALL
    SELECT h.*, chain.depth + 1 FROM harnesses h JOIN chain ON h.id = chain.parent_harness_id
    WHERE chain.depth < {MAX_HARNESS_DEPTH}
)
SELECT 0 AS kind, -depth AS place, NULL AS name, NULL AS public_id, NULL AS description, id AS row_id,
       default_model_id AS model_id, fallback_model_ids, NULL::jsonb AS tools, NULL::integer AS max_iterations,
       NULL AS locale, NULL::jsonb AS hints,
       {_LAYER_COLUMNS}
FROM chain
UNION ALL
SELECT 1, 0, coalesce(a.display_name, a.name), a.public_id, a.description, a.id, a.default_model_id,
       a.fallback_model_ids, a.tools, a.max_iterations, NULL, NULL,
       a.system_prompt, a.capabilities, a.initial_files, a.mcp_servers, a.network_access, a.parallel_tool_calls
FROM agents a JOIN sessions s ON s.agent_id = a.id WHERE s.id = $1
UNION ALL
SELECT 2, 0, title, NULL, NULL, id, model_id, NULL, tools, max_iterations, locale, hints, {_LAYER_COLUMNS}
FROM sessions WHERE id = $1 AND deleted_at IS NULL
ORDER BY kind, place
"""  # noqa: S608


HARNESS_LAYERS: Final = f"""
WITH RECURSIVE chain AS (
    SELECT h.*, 0 AS depth FROM harnesses h WHERE h.org_id = $1 AND h.id = $2 AND h.status <> 'deleted'
    UNION ALL
    SELECT h.*, chain.depth + 1 FROM harnesses h JOIN chain ON h.id = chain.parent_harness_id
    WHERE chain.depth < {MAX_HARNESS_DEPTH}
)
SELECT default_model_id AS model_id, fallback_model_ids, NULL::jsonb AS tools, NULL::integer AS max_iterations,
       NULL AS locale, NULL::jsonb AS hints,
       {_LAYER_COLUMNS}
FROM chain ORDER BY depth DESC
"""  # noqa: S608


class SessionLayers(Struct, frozen=True, kw_only=True):
    layers: list[ConfigLayer]
    harness_id: UUID
    agent_row_id: UUID | None = None
    agent_id: str | None = None
    agent_name: str | None = None
    agent_description: str | None = None


def decode_column(value: str | None, kind: type[T], default: T) -> T:
    """A JSONB column, which asyncpg reads as text."""
    return default if value is None else msgspec.json.decode(value, type=kind)


async def read_session_layers(connection: asyncpg.Connection, session: UUID) -> SessionLayers | None:
    """Harness chain, agent and session, base first; None when the session is gone."""
    rows = await connection.fetch(SESSION_LAYERS, session)
    if not rows or rows[-1]["kind"] != 2:
        return None
    agent = next((row for row in rows if row["kind"] == 1), None)
    harnesses = [row for row in rows if row["kind"] == 0]
    return SessionLayers(
        layers=[_layer(row) for row in rows],
        harness_id=harnesses[-1]["row_id"],
        agent_row_id=agent and agent["row_id"],
        agent_id=agent and agent["public_id"],
        agent_name=agent and agent["name"],
        agent_description=agent and agent["description"],
    )


async def read_harness_layers(connection: asyncpg.Connection, org_id: int, harness: UUID) -> list[ConfigLayer]:
    """Of a harness and what it inherits from, base first; none when it is not there."""
    return [_layer(row) for row in await connection.fetch(HARNESS_LAYERS, org_id, harness)]


def _layer(row: asyncpg.Record) -> ConfigLayer:
    model = row["model_id"]
    return ConfigLayer(
        system_prompt=row["system_prompt"],
        capabilities=decode_column(row["capabilities"], list[CapabilityRef], []),
        tools=decode_column(row["tools"], list[ToolDefinition], []),
        initial_files=decode_column(row["initial_files"], list[InitialFile], []),
        mcp_servers=decode_column(row["mcp_servers"], dict[str, object], {}),
        network_access=decode_column(row["network_access"], NetworkAccessList, NetworkAccessList()),
        model_id=None if model is None else format_id(Prefix.MODEL, model),
        fallback_model_ids=decode_column(row["fallback_model_ids"], list[str], []),
        max_iterations=row["max_iterations"],
        parallel_tool_calls=row["parallel_tool_calls"],
        locale=row["locale"],
        hints=decode_column(row["hints"], dict[str, object], {}),
    )
