"""Models and their providers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from db.columns import column_values, read_resource
from db.named_rows import Row, transaction
from db.tables import Agent, Harness, Organization, Session
from db.tables import Model as ModelTable
from db.tables import Provider as ProviderTable
from domain.errors import NotFound
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id, uuid7
from domain.resources import Model, ModelChanges, ModelSource, ModelWithProvider, Provider

VENDORS: Final = frozenset(
    {"openai", "anthropic", "google", "nvidia", "qwen", "microsoft", "minimax", "moonshot", "xai", "llmsim"}
)
"""What clients accept as `model_vendor`; any other value is left out."""

KEYLESS_PROVIDERS: Final = frozenset({"llmsim"})
"""Provider types that need no API key."""


def _provider_of(row: Row) -> Provider:
    return read_resource(row, Provider, id=format_id(Prefix.PROVIDER, _uuid(row)), api_key_set=False)


def _model_of(row: Row) -> Model:
    return read_resource(row, Model, id=format_id(Prefix.MODEL, _uuid(row)))


def _model_with_provider(row: Row, provider: Provider) -> ModelWithProvider:
    ready = provider.api_key_set or provider.provider_type in KEYLESS_PROVIDERS
    return read_resource(
        row,
        ModelWithProvider,
        id=format_id(Prefix.MODEL, _uuid(row)),
        provider_name=provider.name,
        provider_type=provider.provider_type,
        healthy=bool(row["enabled"]) and provider.status == "active" and ready,
        model_vendor=provider.provider_type if provider.provider_type in VENDORS else None,
    )


def _uuid(row: Row) -> UUID:
    key = row["id"]
    assert isinstance(key, UUID)
    return key


async def list_providers() -> list[Provider]:
    rows = await ProviderTable.select().where(ProviderTable.org_id == DEFAULT_ORG_ID).order_by(ProviderTable.id)
    return [_provider_of(row) for row in rows]


async def get_provider(provider_id: str) -> Provider:
    row = await (
        ProviderTable.select()
        .where(ProviderTable.org_id == DEFAULT_ORG_ID, ProviderTable.id == parse_id(Prefix.PROVIDER, provider_id))
        .first()
    )
    if row is None:
        raise NotFound(f"There is no provider `{provider_id}`")
    return _provider_of(row)


async def list_models(*, source: ModelSource | None = None, favorites_only: bool = False) -> list[ModelWithProvider]:
    providers = {provider.id: provider for provider in await list_providers()}
    query = ModelTable.select().where(ModelTable.org_id == DEFAULT_ORG_ID).order_by(ModelTable.id)
    if source is not None:
        query = query.where(ModelTable.source == source)
    if favorites_only:
        query = query.where(ModelTable.is_favorite.eq(True))
    return [_model_with_provider(row, providers[format_id(Prefix.PROVIDER, row["provider_id"])]) for row in await query]


async def list_provider_models(provider_id: str) -> list[Model]:
    await get_provider(provider_id)
    rows = await (
        ModelTable.select()
        .where(ModelTable.provider_id == parse_id(Prefix.PROVIDER, provider_id))
        .order_by(ModelTable.id)
    )
    return [_model_of(row) for row in rows]


async def get_model(model_id: str) -> ModelWithProvider:
    row = await _row(model_id)
    provider = await get_provider(format_id(Prefix.PROVIDER, row["provider_id"]))  # type: ignore[arg-type]
    return _model_with_provider(row, provider)


async def create_model(provider_id: str, changes: ModelChanges) -> Model:
    changes.check()
    async with transaction():
        await get_provider(provider_id)
        values = column_values(changes)
        row = ModelTable(
            id=uuid7(),
            org_id=DEFAULT_ORG_ID,
            provider_id=parse_id(Prefix.PROVIDER, provider_id),
            **values,  # type: ignore[arg-type]
        )
        rows = await ModelTable.insert(row).returning(*ModelTable.all_columns())
        return _model_of(rows[0])


async def update_model(model_id: str, changes: ModelChanges) -> Model:
    changes.check()
    async with transaction():
        row = await _row(model_id, lock=True)
        values = column_values(changes)
        if values:
            values["updated_at"] = datetime.now(UTC)
            await ModelTable.update(values).where(ModelTable.id == row["id"])  # type: ignore[arg-type]
            row = await _row(model_id)
        return _model_of(row)


async def delete_model(model_id: str) -> None:
    """Whatever named the model as its own falls back to the next layer's."""
    async with transaction():
        key = _uuid(await _row(model_id, lock=True))
        for column in (
            Agent.default_model_id,
            Harness.default_model_id,
            Session.model_id,
            Organization.default_model_id,
        ):
            table = column._meta.table
            await table.update({column: None}).where(column == key)
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
