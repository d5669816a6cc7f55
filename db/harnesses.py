"""Harnesses: CRUD, single inheritance, and the rules of built-in ones."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from msgspec import UNSET

from db.columns import column_values, read_resource
from db.named_rows import NamedRows, Row, lock_organization, require_fallback_models, require_model, transaction
from db.tables import Harness as HarnessTable
from domain.errors import Archived, InvalidInput, ReadOnlyResource, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.limits import MAX_HARNESSES_PER_ORG
from domain.resources import Harness, HarnessChanges, Lifecycle

ROWS: Final = NamedRows(HarnessTable, Prefix.HARNESS)

DEFAULT_HARNESS: Final = "generic"
"""The built-in harness of agents and sessions that name none."""

NOT_COPIED: Final = frozenset(
    {"id", "name", "is_built_in", "status", "created_at", "updated_at", "archived_at", "deleted_at"}
)


def harness_of(row: Row) -> Harness:
    return read_resource(row, Harness, id=format_id(Prefix.HARNESS, _uuid(row)))


def _uuid(row: Row) -> UUID:
    key = row["id"]
    assert isinstance(key, UUID)
    return key


async def list_harnesses(*, search: str | None, include_archived: bool) -> list[Harness]:
    rows, _ = await ROWS.page(search=search, include_archived=include_archived)
    return [harness_of(row) for row in rows]


async def get_harness(key: str) -> Harness:
    """By id or name."""
    return harness_of(await ROWS.get(key))


async def create_harness(changes: HarnessChanges) -> Harness:
    changes.check()
    async with transaction():
        return harness_of(await _insert(column_values(changes)))


async def update_harness(harness_id: str, changes: HarnessChanges) -> Harness:
    changes.check()
    async with transaction():
        if changes.parent_harness_id is not UNSET:
            await lock_organization()
        row = await _editable(harness_id)
        values = column_values(changes)
        await _check_references(values, _uuid(row))
        return harness_of(await ROWS.edit(row, values))


async def archive_harness(harness_id: str) -> None:
    async with transaction():
        await ROWS.archive(await _editable(harness_id))


async def delete_harness(harness_id: str) -> None:
    async with transaction():
        await ROWS.delete(await _editable(harness_id))


async def copy_harness(harness_id: str) -> Harness:
    """Copies belong to the organization, whatever they were copied from."""
    async with transaction():
        row = await ROWS.locked(harness_id)
        values = {name: value for name, value in row.items() if name not in NOT_COPIED}
        return harness_of(await _insert({**values, "name": await ROWS.copy_name(str(row["name"]))}))


async def _insert(values: Row) -> Row:
    if await ROWS.count() >= MAX_HARNESSES_PER_ORG:
        raise ResourceLimit(f"An organization may have {MAX_HARNESSES_PER_ORG} harnesses; delete one first")
    await _check_references(values, None)
    return await ROWS.insert({"id": uuid7(), "org_id": DEFAULT_ORG_ID, **values})


async def _editable(harness_id: str) -> Row:
    row = await ROWS.locked(harness_id)
    if row["is_built_in"]:
        raise ReadOnlyResource("Built-in harnesses cannot be changed; copy it instead")
    return row


async def _check_references(values: Row, own_id: UUID | None) -> None:
    await require_model(values.get("default_model_id"), "default_model_id")
    await require_fallback_models(values.get("fallback_model_ids"))
    parent = values.get("parent_harness_id")
    if isinstance(parent, UUID):
        await _check_parent(parent, own_id)


async def _check_parent(parent: UUID, own_id: UUID | None) -> None:
    field = "parent_harness_id"
    row = await _one(parent)
    if row is None or row["status"] == Lifecycle.DELETED:
        raise InvalidInput(f"{field} names no harness", field=field)
    if row["status"] == Lifecycle.ARCHIVED:
        raise Archived("The parent harness is archived", field=field)
    ancestor: UUID | None = parent
    while ancestor is not None:
        if ancestor == own_id:
            raise InvalidInput(f"{field} would make the harness inherit from itself", field=field)
        above = await _one(ancestor)
        ancestor = above["parent_harness_id"] if above else None  # type: ignore[assignment]


async def _one(key: UUID) -> Row | None:
    columns = (HarnessTable.status, HarnessTable.parent_harness_id)
    return await HarnessTable.select(*columns).where(HarnessTable.id == key).first()


async def assignable_harness(harness_id: str | None, harness_name: str | None) -> UUID:
    """The row id of the active harness an agent is to be built on: by id, by name, or the default one."""
    if harness_id is not None and harness_name is not None:
        raise InvalidInput("Give either harness_id or harness_name, not both", field="harness_name")
    field = "harness_id" if harness_id is not None else "harness_name"
    if harness_id is not None:
        row = await ROWS.find_by_id(harness_id)
    else:
        row = await ROWS.find_by_name(DEFAULT_HARNESS if harness_name is None else harness_name)
    if row is None or row["status"] == Lifecycle.DELETED:
        raise InvalidInput(f"{field} names no harness", field=field)
    if row["status"] == Lifecycle.ARCHIVED:
        raise Archived("The harness is archived and cannot be newly assigned", field=field)
    return _uuid(row)


async def harness_name_is_free(name: str, exclude_id: str | None) -> bool:
    return await ROWS.name_is_free(name, exclude_id=exclude_id)
