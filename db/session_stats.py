"""Counts and sums over sessions: by status, by agent and by harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from db.columns import read_resource
from db.database import Database
from domain.events import TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id
from domain.resources import ResourceStats, SessionStats

STATS: Final = """
SELECT count(*) AS session_count,
       count(*) FILTER (WHERE t.turn_count > 0) AS started_session_count,
       count(*) FILTER (WHERE t.status = 'active') AS active_session_count,
       count(*) FILTER (WHERE t.status NOT IN ('started', 'active', 'waiting_for_tool_results')) AS idle_session_count,
       count(*) FILTER (WHERE t.status = 'waiting_for_tool_results') AS waiting_for_tool_results_session_count,
       coalesce(sum(t.turn_count), 0)::bigint AS execution_count,
       coalesce(sum(t.input_tokens), 0)::bigint AS total_input_tokens,
       coalesce(sum(t.output_tokens), 0)::bigint AS total_output_tokens,
       coalesce(sum(t.cache_read_tokens), 0)::bigint AS total_cache_read_tokens,
       coalesce(sum(t.cache_creation_tokens), 0)::bigint AS total_cache_creation_tokens,
       coalesce(sum(t.effective_cost_usd), 0) AS total_cost_usd,
       coalesce(sum(t.estimated_cost_usd), 0) AS total_estimated_cost_usd,
       coalesce(sum(t.actual_cost_usd), 0) AS total_actual_cost_usd,
       coalesce(sum(t.active_ms), 0)::bigint AS total_session_duration_ms,
       min(s.created_at) AS first_session_at,
       max(s.created_at) AS last_session_at,
       (SELECT max(u.started_at) FROM turns u JOIN sessions v ON v.id = u.session_id WHERE v.{column} = $1) AS last_execution_at
FROM sessions s JOIN session_state t ON t.session_id = s.id WHERE s.{column} = $1
"""


class Usage(Struct, frozen=True, kw_only=True):
    """What uses a resource: live sessions and, over all sessions ever, tokens."""

    session_count: int
    tokens: TokenUsage


UNUSED: Final = Usage(session_count=0, tokens=TokenUsage(input_tokens=0, output_tokens=0))


def usage_columns(row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "input_tokens": row["input_tokens"],
        "output_tokens": row["output_tokens"],
        "cache_read_tokens": row["cache_read_tokens"] or None,
        "cache_creation_tokens": row["cache_creation_tokens"] or None,
        "estimated_cost_usd": row["estimated_cost_usd"] or None,
        "actual_cost_usd": row["actual_cost_usd"] or None,
        "effective_cost_usd": row["effective_cost_usd"] or None,
    }


async def session_stats(database: Database) -> SessionStats:
    rows = await database.pool.fetch(
        """SELECT t.status, count(*) AS n FROM sessions s JOIN session_state t ON t.session_id = s.id
           WHERE s.org_id = $1 AND s.deleted_at IS NULL GROUP BY t.status""",
        DEFAULT_ORG_ID,
    )
    counts = {row["status"]: row["n"] for row in rows}
    started, active = counts.pop("started", 0), counts.pop("active", 0)
    waiting, idle = counts.pop("waiting_for_tool_results", 0), sum(counts.values())
    return SessionStats(
        started=started,
        active=active,
        idle=idle,
        waiting_for_tool_results=waiting,
        total=started + active + waiting + idle,
    )


async def resource_stats(
    database: Database, column: Literal["harness_id", "agent_id"], public_id: str
) -> ResourceStats:
    """Over every session the resource ever had, deleted ones included. The caller knows that the resource exists."""
    key = await _row_id(database, column, public_id)
    row = await database.pool.fetchrow(STATS.format(column=column), key)
    assert row is not None
    count = row["session_count"]
    return read_resource(
        dict(row),
        ResourceStats,
        avg_session_duration_ms=row["total_session_duration_ms"] // count if count else None,
    )


async def _row_id(database: Database, column: str, public_id: str) -> UUID:
    if column == "harness_id":
        return parse_id(Prefix.HARNESS, public_id)
    return await database.pool.fetchval(
        "SELECT id FROM agents WHERE org_id = $1 AND public_id = $2", DEFAULT_ORG_ID, public_id
    )


async def usage_by_agent(database: Database, public_ids: Sequence[str]) -> dict[str, Usage]:
    rows = await database.pool.fetch(
        """SELECT a.public_id, count(*) FILTER (WHERE s.deleted_at IS NULL) AS sessions,
                  sum(t.input_tokens)::bigint AS input_tokens, sum(t.output_tokens)::bigint AS output_tokens,
                  sum(t.cache_read_tokens)::bigint AS cache_read_tokens,
                  sum(t.cache_creation_tokens)::bigint AS cache_creation_tokens,
                  sum(t.estimated_cost_usd) AS estimated_cost_usd, sum(t.actual_cost_usd) AS actual_cost_usd,
                  sum(t.effective_cost_usd) AS effective_cost_usd
           FROM agents a JOIN sessions s ON s.agent_id = a.id JOIN session_state t ON t.session_id = s.id
           WHERE a.org_id = $1 AND a.public_id = ANY($2::text[]) GROUP BY a.public_id""",
        DEFAULT_ORG_ID,
        list(public_ids),
    )
    return {
        row["public_id"]: Usage(
            session_count=row["sessions"], tokens=msgspec.convert(usage_columns(dict(row)), TokenUsage)
        )
        for row in rows
    }


async def sessions_by_harness(database: Database) -> dict[str, int]:
    """How many live sessions each harness has; harnesses without any are left out."""
    rows = await database.pool.fetch(
        "SELECT harness_id, count(*) AS n FROM sessions WHERE org_id = $1 AND deleted_at IS NULL GROUP BY harness_id",
        DEFAULT_ORG_ID,
    )
    return {format_id(Prefix.HARNESS, row["harness_id"]): row["n"] for row in rows}
