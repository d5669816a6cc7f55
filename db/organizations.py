"""The organization. There is one, until accounts exist."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec import UNSET, UnsetType

from db.columns import read_resource
from db.harnesses import DEFAULT_HARNESS, ROWS, harness_of
from db.named_rows import require_model, transaction
from db.tables import Organization as OrganizationTable
from domain.errors import NotFound
from domain.ids import DEFAULT_ORG_ID, DEFAULT_ORG_PUBLIC_ID, Prefix, format_id, parse_id
from domain.limits import SHORT_TEXT_MAX_BYTES, check_id, check_text
from domain.resources import Organization


async def get_organization(organization_id: str) -> Organization:
    parse_id(Prefix.ORG, organization_id)
    if organization_id != DEFAULT_ORG_PUBLIC_ID:
        raise NotFound(f"There is no organization `{organization_id}`")
    row = await OrganizationTable.select().where(OrganizationTable.id == DEFAULT_ORG_ID).first()
    harness = await ROWS.find_by_name(DEFAULT_HARNESS, active_only=True)
    assert row is not None
    default_harness_id = harness and harness_of(harness).id
    model = row["default_model_id"]
    return read_resource(
        row,
        Organization,
        id=row["public_id"],
        default_model_id=None if model is None else format_id(Prefix.MODEL, model),
        default_provider_per_service={},
        default_harness_id=default_harness_id,
        base_harness_id=default_harness_id,
    )


async def update_organization(
    organization_id: str, *, name: str | UnsetType, default_model_id: str | UnsetType | None
) -> Organization:
    values: dict[str, object] = {}
    if name is not UNSET:
        check_text(name, "name", SHORT_TEXT_MAX_BYTES)
        values["name"] = name
    if default_model_id is not UNSET:
        if default_model_id is not None:
            check_id(Prefix.MODEL, default_model_id, "default_model_id")
        values["default_model_id"] = default_model_id and parse_id(Prefix.MODEL, default_model_id)
    await get_organization(organization_id)
    async with transaction():
        await require_model(values.get("default_model_id"), "default_model_id")
        values["updated_at"] = datetime.now(UTC)
        await OrganizationTable.update(values).where(OrganizationTable.id == DEFAULT_ORG_ID)  # type: ignore[arg-type]
    return await get_organization(organization_id)
