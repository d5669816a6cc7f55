"""Providers: where models run, and the credentials to call them with.

Credentials are one envelope per provider around a JSON object of its fields. They are decrypted for calls only, never to be
shown; whether there are any is told by the column not being empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET

from db.columns import json_column, read_resource
from db.model_references import forget_models
from db.named_rows import Row, transaction
from db.tables import Model as ModelTable
from db.tables import Provider as ProviderTable
from domain.errors import NotFound, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id, uuid7
from domain.limits import MAX_PROVIDERS_PER_ORG
from domain.model import ModelEndpoint
from domain.provider_input import check_address, check_credentials, check_trace_template, resolved_trace
from domain.providers import API_KEY
from domain.resources import Provider, ProviderChanges, TraceConfig
from domain.secret import Secret
from infra.encryption import Keyring, bound_to


def endpoint_of(
    row: Mapping[str, object] | asyncpg.Record, keyring: Keyring, default_keys: Mapping[str, Secret]
) -> ModelEndpoint:
    """How to reach the provider of a row with `provider_id`, `provider_type`, `base_url` and `credentials`.

    A provider without credentials of its own uses the default key of its type. Raises `UndecryptableSecret`.
    """
    provider_id, provider_type = row["provider_id"], str(row["provider_type"])
    stored, base_url = row["credentials"], row["base_url"]
    assert isinstance(provider_id, UUID)
    credentials: dict[str, Secret] = {}
    if isinstance(stored, str):
        opened = keyring.decrypt(stored, bound_to=_place(provider_id))
        fields = msgspec.json.decode(opened.reveal(), type=dict[str, str])
        credentials = {name: Secret(value) for name, value in fields.items()}
    elif provider_type in default_keys:
        credentials = {API_KEY: default_keys[provider_type]}
    return ModelEndpoint(
        provider_type=provider_type,
        provider_public_id=format_id(Prefix.PROVIDER, provider_id),
        base_url=base_url if isinstance(base_url, str) else None,
        credentials=credentials,
    )


def provider_of(row: Row) -> Provider:
    provider_type = str(row["provider_type"])
    trace = resolved_trace(provider_type, _stored_trace(row))
    return read_resource(
        row,
        Provider,
        id=format_id(Prefix.PROVIDER, _uuid(row)),
        api_key_set=row["credentials"] is not None,
        trace=None if trace is None else msgspec.convert(trace, TraceConfig),
    )


def _uuid(row: Row) -> UUID:
    key = row["id"]
    assert isinstance(key, UUID)
    return key


def _place(provider: UUID) -> str:
    return bound_to("providers", provider, "credentials")


def _stored_trace(row: Row) -> dict[str, object]:
    stored = row["trace"]
    return msgspec.json.decode(stored, type=dict[str, object]) if isinstance(stored, str) else {}


async def list_providers() -> list[Provider]:
    rows = await ProviderTable.select().where(ProviderTable.org_id == DEFAULT_ORG_ID).order_by(ProviderTable.id)
    return [provider_of(row) for row in rows]


async def get_provider(provider_id: str) -> Provider:
    return provider_of(await provider_row(provider_id))


async def provider_row(provider_id: str, *, lock: bool = False) -> Row:
    query = ProviderTable.select().where(
        ProviderTable.org_id == DEFAULT_ORG_ID, ProviderTable.id == parse_id(Prefix.PROVIDER, provider_id)
    )
    rows = await (query.lock_rows("UPDATE") if lock else query)
    if not rows:
        raise NotFound(f"There is no provider `{provider_id}`")
    return rows[0]


async def find_endpoint(provider_id: str, keyring: Keyring, default_keys: Mapping[str, Secret]) -> ModelEndpoint:
    """Raises `NotFound` and `UndecryptableSecret`."""
    row = await provider_row(provider_id)
    return endpoint_of({**row, "provider_id": row["id"]}, keyring, default_keys)


async def create_provider(changes: ProviderChanges, keyring: Keyring) -> Provider:
    """Raises `EncryptionNotConfigured` when there is a credential to store and no key to encrypt it with."""
    changes.check()
    async with transaction():
        if await ProviderTable.count().where(ProviderTable.org_id == DEFAULT_ORG_ID) >= MAX_PROVIDERS_PER_ORG:
            raise ResourceLimit(f"An organization may have {MAX_PROVIDERS_PER_ORG} providers; delete one first")
        key = uuid7()
        empty: Row = {"id": key, "provider_type": "", "base_url": None, "trace": None}
        row = ProviderTable(org_id=DEFAULT_ORG_ID, id=key, **_values(changes, empty, keyring))  # type: ignore[arg-type]
        rows = await ProviderTable.insert(row).returning(*ProviderTable.all_columns())
        return provider_of(rows[0])


async def update_provider(provider_id: str, changes: ProviderChanges, keyring: Keyring) -> Provider:
    """Raises what `create_provider` raises. Turns see the change from their next model call on."""
    changes.check()
    async with transaction():
        row = await provider_row(provider_id, lock=True)
        values = _values(changes, row, keyring)
        if values:
            values["updated_at"] = datetime.now(UTC)
            await ProviderTable.update(values).where(ProviderTable.id == row["id"])  # type: ignore[arg-type]
            row = await provider_row(provider_id)
        return provider_of(row)


async def delete_provider(provider_id: str) -> None:
    """With its models; whatever named one of them falls back to the next layer's."""
    async with transaction():
        key = _uuid(await provider_row(provider_id, lock=True))
        rows = await ModelTable.select(ModelTable.id).where(ModelTable.provider_id == key).lock_rows("UPDATE")
        await forget_models([_uuid(row) for row in rows])
        await ModelTable.delete().where(ModelTable.provider_id == key)
        await ProviderTable.delete().where(ProviderTable.id == key)


def _values(changes: ProviderChanges, row: Row, keyring: Keyring) -> Row:
    """The changed columns, checked against what the row would hold then."""
    given = {name: getattr(changes, name) for name in ("name", "provider_type", "base_url", "status")}
    values: Row = {name: value for name, value in given.items() if value is not UNSET}
    after = {**row, **values}
    provider_type = str(after["provider_type"])
    if "provider_type" in values or "base_url" in values:
        base_url = after["base_url"]
        check_address(provider_type, None if base_url is None else str(base_url))
    if changes.credentials is None:
        values["credentials"] = None
    elif changes.credentials is not UNSET:
        values["credentials"] = _envelope(_uuid(row), check_credentials(provider_type, changes.credentials), keyring)
    if changes.trace is None:
        values["trace"] = None
    elif changes.trace is not UNSET:
        values["trace"] = json_column(_merged_trace(_stored_trace(row), changes.trace))
    return values


def _envelope(provider: UUID, credentials: Mapping[str, Secret], keyring: Keyring) -> str | None:
    if not credentials:
        return None
    document = msgspec.json.encode({name: secret.reveal() for name, secret in credentials.items()}).decode()
    return keyring.encrypt(document, bound_to=_place(provider))


def _merged_trace(stored: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    for name, value in given.items():
        if isinstance(value, str):
            check_trace_template(value, f"trace.{name}")
    return {name: value for name, value in {**stored, **given}.items() if value is not None}
