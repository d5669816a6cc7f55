"""How many agents and harnesses refer to each capability."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from db.database import Database
from domain.ids import DEFAULT_ORG_ID

COUNTS: Final = """
SELECT ref, count(*) FILTER (WHERE kind = 'agent') AS agents, count(*) FILTER (WHERE kind = 'harness') AS harnesses
FROM (
    SELECT 'agent' AS kind, jsonb_array_elements(capabilities)->>'ref' AS ref FROM agents
    WHERE org_id = $1 AND status = 'active'
    UNION ALL
    SELECT 'harness', jsonb_array_elements(capabilities)->>'ref' FROM harnesses WHERE org_id = $1 AND status = 'active'
) AS used
GROUP BY ref
"""


class CapabilityCounts(Struct, frozen=True, kw_only=True):
    agents: int = 0
    harnesses: int = 0


async def capability_counts(database: Database) -> dict[str, CapabilityCounts]:
    """By capability id; one that nothing refers to is left out."""
    rows = await database.pool.fetch(COUNTS, DEFAULT_ORG_ID)
    return {row["ref"]: CapabilityCounts(agents=row["agents"], harnesses=row["harnesses"]) for row in rows}
