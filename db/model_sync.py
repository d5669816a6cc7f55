"""Brings the models of a provider in line with the list it gives of itself.

What people added or renamed stays as they left it: only rows that came from such a list before go stale, and a name is replaced
only where the list had none until now.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db.database import Database
from domain.errors import NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id, uuid7
from domain.limits import SHORT_TEXT_MAX_BYTES
from domain.model import DiscoveredModel
from domain.model_profiles import profile_of


class SyncCounts(Struct, frozen=True, kw_only=True):
    """`updated` counts models that came back or got a name, `stale` those that are newly missing from the list."""

    created: int
    updated: int
    stale: int


async def record_models(database: Database, provider_id: str, found: Sequence[DiscoveredModel]) -> SyncCounts:
    provider = parse_id(Prefix.PROVIDER, provider_id)
    listed = {model.model_id: model for model in found if 0 < len(model.model_id.encode()) <= SHORT_TEXT_MAX_BYTES}
    async with database.transaction() as connection:
        # Locked, so that two syncs do not both count the same models as new.
        locked = await connection.fetchval(
            "UPDATE providers SET last_synced_at = $3 WHERE id = $1 AND org_id = $2 RETURNING id",
            provider,
            DEFAULT_ORG_ID,
            datetime.now(UTC),
        )
        if locked is None:
            raise NotFound(f"There is no provider `{provider_id}`")
        rows = await connection.fetch(
            "SELECT id, model_id, display_name, source, stale FROM models WHERE provider_id = $1 FOR UPDATE", provider
        )
        known = {row["model_id"]: row for row in rows}
        new = [model for name, model in listed.items() if name not in known]
        await _insert(connection, provider, new)
        changed = [row for name, row in known.items() if name in listed and _has_news(row, listed[name])]
        for row in changed:
            await connection.execute(
                "UPDATE models SET stale = false, display_name = $2, updated_at = now() WHERE id = $1",
                row["id"],
                _display_name(listed[row["model_id"]]) if _is_unnamed(row) else row["display_name"],
            )
        missing = [row["id"] for row in rows if row["model_id"] not in listed and _can_go_stale(row)]
        await connection.execute(
            "UPDATE models SET stale = true, updated_at = now() WHERE id = ANY($1::uuid[])", missing
        )
    return SyncCounts(created=len(new), updated=len(changed), stale=len(missing))


def _has_news(row: asyncpg.Record, model: DiscoveredModel) -> bool:
    if row["source"] != "discovered":
        return False
    return row["stale"] or (_is_unnamed(row) and _display_name(model) != row["display_name"])


def _can_go_stale(row: asyncpg.Record) -> bool:
    return row["source"] == "discovered" and not row["stale"]


def _is_unnamed(row: asyncpg.Record) -> bool:
    return row["display_name"] == row["model_id"]


def _display_name(model: DiscoveredModel) -> str:
    profile = profile_of(model.model_id)
    name = model.display_name or (profile.name if profile else None) or model.model_id
    return name if len(name.encode()) <= SHORT_TEXT_MAX_BYTES else model.model_id


async def _insert(connection: asyncpg.Connection, provider: UUID, models: Sequence[DiscoveredModel]) -> None:
    profiles = [profile_of(model.model_id) for model in models]
    await connection.executemany(
        """INSERT INTO models (id, org_id, provider_id, model_id, display_name, capabilities, source)
           VALUES ($1, $2, $3, $4, $5, $6, 'discovered') ON CONFLICT DO NOTHING""",
        [
            (
                uuid7(),
                DEFAULT_ORG_ID,
                provider,
                model.model_id,
                _display_name(model),
                msgspec.json.encode(profile.capabilities if profile else ["text"]).decode(),
            )
            for model, profile in zip(models, profiles, strict=True)
        ],
    )
