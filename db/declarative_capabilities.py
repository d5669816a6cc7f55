"""Declarative capabilities: CRUD, and what becomes of references when one is renamed."""

from __future__ import annotations

from typing import Final

import asyncpg
import msgspec
from msgspec import UNSET, UnsetType

from db.archivable_rows import LIVE, ArchivableRows
from db.database import Database
from domain.clock import timestamp
from domain.config import InitialFile
from domain.declarative import FIELD, DeclarativeCapability, DeclarativeDefinition, DeclarativeStatus
from domain.errors import Conflict, InvalidInput
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.limits import MAX_DECLARATIVE_CAPABILITIES_PER_ORG, check_initial_files
from domain.skills import MANIFEST, SkillProblem, skill_directory
from infra.skill_packages import read_skill_md

ROWS: Final = ArchivableRows(
    table="declarative_capabilities",
    prefix=Prefix.CAPABILITY,
    noun="declarative capability",
    maximum=MAX_DECLARATIVE_CAPABILITIES_PER_ORG,
    full=f"An organization may have {MAX_DECLARATIVE_CAPABILITIES_PER_ORG} of these; delete a declarative capability first",
    taken="There is another declarative capability of this name",
    name_field=f"{FIELD}.name",
)

RENAME: Final = """
UPDATE {table} SET capabilities = (
    SELECT jsonb_agg(CASE WHEN item->>'ref' = $2 THEN jsonb_set(item, '{{ref}}', to_jsonb($3::text)) ELSE item END ORDER BY place)
    FROM jsonb_array_elements(capabilities) WITH ORDINALITY AS items(item, place))
WHERE org_id = $1 AND capabilities @> jsonb_build_array(jsonb_build_object('ref', $2::text))
"""
RENAME_DEPENDENCIES: Final = """
UPDATE declarative_capabilities SET definition = jsonb_set(definition, '{dependencies}', (
    SELECT jsonb_agg(CASE WHEN item = to_jsonb($2::text) THEN to_jsonb($3::text) ELSE item END ORDER BY place)
    FROM jsonb_array_elements(definition->'dependencies') WITH ORDINALITY AS items(item, place)))
WHERE org_id = $1 AND definition->'dependencies' @> jsonb_build_array($2::text)
"""


def capability_of(row: asyncpg.Record) -> DeclarativeCapability:
    return DeclarativeCapability(
        id=format_id(Prefix.CAPABILITY, row["id"]),
        capability_id=f"declarative:{row['name']}",
        name=row["name"],
        display_name=row["display_name"],
        description=row["description"],
        status=DeclarativeStatus(row["status"]),
        definition=msgspec.json.decode(row["definition"], type=DeclarativeDefinition),
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
        archived_at=row["archived_at"] and timestamp(row["archived_at"]),
        deleted_at=row["deleted_at"] and timestamp(row["deleted_at"]),
    )


async def list_declarative(
    database: Database, *, search: str | None, include_archived: bool
) -> list[DeclarativeCapability]:
    rows = await ROWS.list(database.pool, search=search, include_archived=include_archived)
    return [capability_of(row) for row in rows]


async def get_declarative(database: Database, capability_id: str) -> DeclarativeCapability:
    return capability_of(await ROWS.get(database.pool, capability_id))


async def create_declarative(database: Database, definition: DeclarativeDefinition) -> DeclarativeCapability:
    """`definition` is checked, but for what is in its skills and whether all its files together are too many."""
    columns = _columns(definition)
    async with ROWS.writing(database) as connection:
        return capability_of(await ROWS.insert(connection, {"id": uuid7(), **columns}))


async def update_declarative(
    database: Database,
    capability_id: str,
    definition: DeclarativeDefinition | UnsetType,
    status: DeclarativeStatus | None,
) -> DeclarativeCapability:
    """A new name is written into the references of agents, harnesses, sessions and other declarative capabilities."""
    columns = {} if definition is UNSET else _columns(definition)
    async with ROWS.writing(database) as connection:
        row = await ROWS.get(connection, capability_id, lock=True)
        if columns and status is DeclarativeStatus.DELETED:
            raise Conflict("A capability cannot be edited and deleted at once", field="status")
        changed = await ROWS.change(connection, row, columns, status)
        if row["status"] in LIVE and changed["name"] != row["name"]:
            await _rename(connection, f"declarative:{row['name']}", f"declarative:{changed['name']}")
    return capability_of(changed)


async def archive_declarative(database: Database, capability_id: str) -> DeclarativeCapability:
    async with database.transaction() as connection:
        row = await ROWS.get(connection, capability_id, lock=True)
        return capability_of(await ROWS.archive(connection, row))


async def delete_declarative(database: Database, capability_id: str) -> DeclarativeCapability:
    async with database.transaction() as connection:
        row = await ROWS.get(connection, capability_id, lock=True)
        return capability_of(await ROWS.delete(connection, row))


async def _rename(connection: asyncpg.Connection, old: str, new: str) -> None:
    for table in ("harnesses", "agents", "sessions"):
        await connection.execute(RENAME.format(table=table), DEFAULT_ORG_ID, old, new)
    await connection.execute(RENAME_DEPENDENCIES, DEFAULT_ORG_ID, old, new)


def _columns(definition: DeclarativeDefinition) -> dict[str, object]:
    return {
        "name": definition.name,
        "display_name": definition.display_name,
        "description": definition.description,
        "definition": msgspec.json.encode(definition).decode(),
        "mounts": msgspec.json.encode(_mounts(definition)).decode(),
    }


def _mounts(definition: DeclarativeDefinition) -> list[InitialFile]:
    """Its files and those of its skills. Raises `InvalidInput`."""
    files = list(definition.files)
    for index, skill in enumerate(definition.skills):
        if isinstance(skill, str):
            continue
        field = f"{FIELD}.skills[{index}].skill_md"
        try:
            directory = skill_directory(read_skill_md(skill.skill_md).name)
        except SkillProblem as problem:
            raise InvalidInput(f"{field}: {problem}", field=field) from None
        files.append(InitialFile(path=f"{directory}/{MANIFEST}", content=skill.skill_md))
        files += [msgspec.structs.replace(file, path=f"{directory}/{file.path.lstrip('/')}") for file in skill.files]
    paths = [file.path for file in files]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InvalidInput(f"{FIELD}: `{twice[:200]}` would be written twice", field=f"{FIELD}.files")
    try:
        check_initial_files(files)
    except InvalidInput as error:
        raise type(error)(f"{FIELD}.skills: {error.message}", field=f"{FIELD}.skills") from None
    return files
