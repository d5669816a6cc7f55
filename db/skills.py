"""The organization's skills: what is served, what is stored, and what a session may activate."""

from __future__ import annotations

from typing import Final, Literal

import asyncpg
import msgspec
from msgspec import Struct

from db.archivable_rows import ArchivableRows
from db.database import Database
from domain.clock import timestamp
from domain.errors import Conflict
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, parse_id, uuid7
from domain.limits import MAX_SKILLS_PER_ORG
from domain.skills import Skill, SkillFile, SkillPackage, SkillStatus
from infra.skill_packages import read_skill_md

ROWS: Final = ArchivableRows(
    table="skills",
    prefix=Prefix.SKILL,
    noun="skill",
    maximum=MAX_SKILLS_PER_ORG,
    full=f"An organization may have {MAX_SKILLS_PER_ORG} of these; delete a skill first",
    taken="There is another skill of this name",
    name_field="skill_md",
)

FILES: Final = "SELECT path, content FROM skill_files WHERE skill_id = $1 ORDER BY path"
OF_SESSION: Final = """SELECT k.id, k.skill_md FROM skills k JOIN sessions s ON s.org_id = k.org_id
    WHERE s.id = $1 AND k.id = $2 AND k.status <> 'deleted'"""
USAGE: Final = """
WITH used AS (
    SELECT 'agent' AS kind, id, jsonb_array_elements(capabilities)->>'ref' AS ref FROM agents
    WHERE org_id = $1 AND status = 'active'
    UNION ALL
    SELECT 'harness', id, jsonb_array_elements(capabilities)->>'ref' FROM harnesses
    WHERE org_id = $1 AND status = 'active'
)
SELECT k.id, count(DISTINCT u.id) FILTER (WHERE u.kind = 'agent') AS agents,
       count(DISTINCT u.id) FILTER (WHERE u.kind = 'harness') AS harnesses
FROM skills k JOIN used u
    ON u.ref IN ('skill:' || k.name, 'skill:' || k.id, 'skill:skill_' || replace(k.id::text, '-', ''))
WHERE k.org_id = $1 AND k.status IN ('active', 'disabled')
GROUP BY k.id
"""


class SkillUsage(Struct, frozen=True, kw_only=True):
    """How many active agents and harnesses refer to a skill."""

    agents: int
    harnesses: int


def skill_of(row: asyncpg.Record) -> Skill:
    return Skill(
        id=format_id(Prefix.SKILL, row["id"]),
        name=row["name"],
        description=row["description"],
        version=row["version"],
        source_type=row["source_type"],
        status=SkillStatus(row["status"]),
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
        license=row["license"],
        compatibility=row["compatibility"],
        allowed_tools=row["allowed_tools"],
        metadata=msgspec.json.decode(row["metadata"]),
        disable_model_invocation=row["disable_model_invocation"],
        user_invocable=row["user_invocable"],
        archived_at=row["archived_at"] and timestamp(row["archived_at"]),
        deleted_at=row["deleted_at"] and timestamp(row["deleted_at"]),
    )


async def list_skills(database: Database, *, search: str | None, include_archived: bool) -> list[Skill]:
    rows = await ROWS.list(database.pool, search=search, include_archived=include_archived)
    return [skill_of(row) for row in rows]


async def get_skill(database: Database, skill_id: str) -> Skill:
    return skill_of(await ROWS.get(database.pool, skill_id))


async def create_skill(database: Database, package: SkillPackage, source_type: Literal["markdown", "archive"]) -> Skill:
    async with ROWS.writing(database) as connection:
        row = await ROWS.insert(connection, {"id": uuid7(), "source_type": source_type, **_columns(package)})
        rows = [(row["id"], file.path, file.content) for file in package.files]
        await connection.executemany("INSERT INTO skill_files (skill_id, path, content) VALUES ($1, $2, $3)", rows)
    return skill_of(row)


async def update_skill(
    database: Database, skill_id: str, package: SkillPackage | None, status: SkillStatus | None
) -> Skill:
    """A new SKILL.md keeps the package's files."""
    async with ROWS.writing(database) as connection:
        row = await ROWS.get(connection, skill_id, lock=True)
        if package is not None and status is SkillStatus.DELETED:
            raise Conflict("A skill cannot be edited and deleted at once", field="status")
        row = await ROWS.change(connection, row, _columns(package) if package else {}, status)
    return skill_of(row)


async def archive_skill(database: Database, skill_id: str) -> None:
    async with database.transaction() as connection:
        await ROWS.archive(connection, await ROWS.get(connection, skill_id, lock=True))


async def skill_package(database: Database, skill_id: str) -> SkillPackage:
    row = await ROWS.get(database.pool, skill_id)
    return await _package(database.pool, row)


async def skill_usage(database: Database) -> dict[str, SkillUsage]:
    """By skill id; without those that nothing refers to."""
    rows = await database.pool.fetch(USAGE, DEFAULT_ORG_ID)
    return {
        format_id(Prefix.SKILL, row["id"]): SkillUsage(agents=row["agents"], harnesses=row["harnesses"]) for row in rows
    }


class DatabaseSkills:
    """Serves the port `domain.skills.SkillRegistry`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def package(self, session_id: str, skill_id: str) -> SkillPackage | None:
        keys = parse_id(Prefix.SESSION, session_id), parse_id(Prefix.SKILL, skill_id)
        row = await self._pool.fetchrow(OF_SESSION, *keys)
        return None if row is None else await _package(self._pool, row)


async def _package(connection: asyncpg.Pool, row: asyncpg.Record) -> SkillPackage:
    files = await connection.fetch(FILES, row["id"])
    return SkillPackage(
        skill_md=row["skill_md"],
        manifest=read_skill_md(row["skill_md"]),
        files=tuple(SkillFile(path=file["path"], content=file["content"]) for file in files),
    )


def _columns(package: SkillPackage) -> dict[str, object]:
    manifest = package.manifest
    return {
        "name": manifest.name,
        "description": manifest.description,
        "version": manifest.version,
        "license": manifest.license,
        "compatibility": manifest.compatibility,
        "allowed_tools": manifest.allowed_tools,
        "metadata": msgspec.json.encode(manifest.metadata).decode(),
        "disable_model_invocation": manifest.disable_model_invocation,
        "user_invocable": manifest.user_invocable,
        "skill_md": package.skill_md,
    }
