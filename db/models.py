"""Models: what providers offer, as the organization has listed it."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from msgspec import UNSET

from db.columns import column_values, read_resource
from db.model_references import forget_breakers, forget_models
from db.named_rows import Row, transaction
from db.providers import get_provider, list_providers, provider_of, provider_row
from db.tables import Model as ModelTable
from domain.errors import InvalidInput, NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id, uuid7
from domain.model_profiles import profile_of
from domain.providers import PROVIDER_TYPES
from domain.resources import Model, ModelChanges, ModelSource, ModelWithProvider, Provider

VENDORS: Final = frozenset(
    {"openai", "anthropic", "google", "nvidia", "qwen", "microsoft", "minimax", "moonshot", "xai", "llmsim"}
)
"""What clients accept as `model_vendor`; any other value is left out."""


def model_of(row: Row) -> Model:
    return read_resource(row, Model, id=format_id(Prefix.MODEL, _uuid(row)))


def _model_with_provider(
    row: Row, provider: Provider, keyed_types: Collection[str], open_breakers: Collection[object]
) -> ModelWithProvider:
    profile = profile_of(str(row["model_id"]))
    vendor = provider.provider_type if profile is None else profile.vendor
    return read_resource(
        row,
        ModelWithProvider,
        id=format_id(Prefix.MODEL, _uuid(row)),
        provider_name=provider.name,
        provider_type=provider.provider_type,
        healthy=bool(row["enabled"]) and _is_ready(provider, keyed_types) and row["id"] not in open_breakers,
        model_vendor=vendor if vendor in VENDORS else None,
        profile=profile,
    )


def _is_ready(provider: Provider, keyed_types: Collection[str]) -> bool:
    known = PROVIDER_TYPES.get(provider.provider_type)
    if known is None or provider.status != "active":
        return False
    return provider.api_key_set or not known.needs_key or provider.provider_type in keyed_types


def _uuid(row: Row) -> UUID:
    key = row["id"]
    assert isinstance(key, UUID)
    return key


async def list_models(
    *,
    keyed_types: Collection[str],
    source: ModelSource | None = None,
    favorites_only: bool = False,
    include_stale: bool = True,
) -> list[ModelWithProvider]:
    """`keyed_types` are the provider types with a default key."""
    providers = {provider.id: provider for provider in await list_providers()}
    query = ModelTable.select().where(ModelTable.org_id == DEFAULT_ORG_ID).order_by(ModelTable.id)
    if source is not None:
        query = query.where(ModelTable.source == source)
    if favorites_only:
        query = query.where(ModelTable.is_favorite.eq(True))
    if not include_stale:
        query = query.where(ModelTable.stale.eq(False))
    rows = await query
    broken = await _open_breakers()
    with_providers = [(row, providers.get(format_id(Prefix.PROVIDER, row["provider_id"]))) for row in rows]
    # One that came between the two queries is not listed yet.
    return [_model_with_provider(row, provider, keyed_types, broken) for row, provider in with_providers if provider]


async def list_provider_models(provider_id: str) -> list[Model]:
    await get_provider(provider_id)
    rows = await (
        ModelTable.select()
        .where(ModelTable.provider_id == parse_id(Prefix.PROVIDER, provider_id))
        .order_by(ModelTable.id)
    )
    return [model_of(row) for row in rows]


async def get_model(model_id: str, *, keyed_types: Collection[str]) -> ModelWithProvider:
    row = await _row(model_id)
    provider = await get_provider(format_id(Prefix.PROVIDER, row["provider_id"]))  # type: ignore[arg-type]
    return _model_with_provider(row, provider, keyed_types, await _open_breakers())


async def create_model(provider_id: str, changes: ModelChanges) -> Model:
    changes.check()
    async with transaction():
        # Locked, so that the provider is not deleted meanwhile.
        await provider_row(provider_id, lock=True)
        values = column_values(changes)
        values["provider_id"] = parse_id(Prefix.PROVIDER, provider_id)
        row = ModelTable(id=uuid7(), org_id=DEFAULT_ORG_ID, **values)  # type: ignore[arg-type]
        rows = await ModelTable.insert(row).returning(*ModelTable.all_columns())
        return model_of(rows[0])


async def update_model(model_id: str, changes: ModelChanges) -> Model:
    changes.check()
    async with transaction():
        row = await _row(model_id, lock=True)
        values = column_values(changes)
        if values:
            if changes.provider_id is not UNSET and values["provider_id"] != row["provider_id"]:
                await target_provider(changes.provider_id, lock=True)
                await forget_breakers([_uuid(row)])
            values["updated_at"] = datetime.now(UTC)
            await ModelTable.update(values).where(ModelTable.id == row["id"])  # type: ignore[arg-type]
            row = await _row(model_id)
        return model_of(row)


async def target_provider(provider_id: str, *, lock: bool = False) -> Provider:
    """The provider that a model is to move to."""
    try:
        return provider_of(await provider_row(provider_id, lock=lock))
    except NotFound:
        raise InvalidInput("provider_id names no provider", field="provider_id") from None


async def delete_model(model_id: str) -> None:
    async with transaction():
        key = _uuid(await _row(model_id, lock=True))
        await forget_models([key])
        await ModelTable.delete().where(ModelTable.id == key)


async def _row(model_id: str, *, lock: bool = False) -> Row:
    query = ModelTable.select().where(
        ModelTable.org_id == DEFAULT_ORG_ID, ModelTable.id == parse_id(Prefix.MODEL, model_id)
    )
    if lock:
        query = query.lock_rows("UPDATE")
    rows = await query
    if not rows:
        raise NotFound(f"There is no model `{model_id}`")
    return rows[0]


async def _open_breakers() -> set[object]:
    query = "SELECT model_id FROM circuit_breakers WHERE org_id = {} AND state = 'open'"
    return {row["model_id"] for row in await ModelTable.raw(query, DEFAULT_ORG_ID)}
