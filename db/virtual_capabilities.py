"""References to rows: declarative capabilities, skills of the registry and MCP servers, looked up in one organization.

What a turn pins, what a write checks and what the API lists are the same three lookups. A configuration that names no row costs
no query.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db.database import Database
from domain.config import CapabilityRef, DeclaredCapability, InitialFile, PinnedSkill, TurnConfig
from domain.declarative import DECLARATIVE, MCP, SKILL, DeclarativeDefinition
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id
from domain.tools import ToolDefinition

MAX_DECLARED: Final = 250
"""Rows one configuration may come to, those that others bring in included."""

DECLARED: Final = """
SELECT DISTINCT ON (name) name, status, CASE WHEN $3 THEN definition ELSE definition - 'files' END AS definition,
       CASE WHEN $3 THEN mounts ELSE '[]' END AS mounts
FROM declarative_capabilities
WHERE org_id = $1 AND name = ANY($2::text[]) AND status <> 'deleted'
ORDER BY name, array_position(ARRAY['active', 'disabled', 'archived'], status), updated_at DESC
"""
SKILLS: Final = """
SELECT id, name, description, status, disable_model_invocation FROM skills
WHERE org_id = $1 AND (name = ANY($2::text[]) OR id = ANY($3::uuid[])) AND status <> 'deleted'
ORDER BY array_position(ARRAY['active', 'disabled', 'archived'], status), updated_at DESC
"""
LISTED_DECLARED: Final = """SELECT name, status, definition - 'files' AS definition, '[]' AS mounts FROM declarative_capabilities
    WHERE org_id = $1 AND status = 'active' ORDER BY name"""
LISTED_SKILLS: Final = """SELECT id, name, description, status, disable_model_invocation FROM skills
    WHERE org_id = $1 AND status = 'active' ORDER BY name"""

UNKNOWN: Final = "there is no such capability any more"
DISABLED: Final = "it is disabled"

_SKILL_ID: Final = re.compile(r"skill_([0-9a-f]{32})")


class Pinned(Struct, frozen=True, kw_only=True):
    """A configuration with what its references to rows come to. `mounts` are files to be written, by the capability's ref."""

    config: TurnConfig
    mounts: dict[str, list[InitialFile]] = {}
    archived: frozenset[str] = frozenset()
    """References to what is archived: fit for those that have it, not to be newly assigned."""


class VirtualCapability(Struct, frozen=True, kw_only=True):
    """A row as a capability, for a list of all there are."""

    declared: DeclaredCapability
    tools: list[ToolDefinition] = []
    aliases: tuple[str, ...] = ()


class _Found(Struct, frozen=True, kw_only=True):
    declared: DeclaredCapability
    definition: DeclarativeDefinition | None = None
    mounts: list[InitialFile] = []
    archived: bool = False


def names_rows(refs: Iterable[str]) -> bool:
    return any(ref.startswith((DECLARATIVE, SKILL)) for ref in refs)


async def pinned(
    connection: asyncpg.Connection, org_id: int, config: TurnConfig, *, with_files: bool = False
) -> Pinned:
    """Look up what `config` names, and what that names in turn; without their files unless they are asked for.

    Layers go before what is declared: their MCP servers replace those of the same name, their tools come first.
    """
    refs = [ref.ref for ref in config.capabilities]
    if not names_rows(refs):
        return Pinned(config=config)
    found = await _closure(connection, org_id, refs, with_files=with_files)
    definitions = [one.definition for one in found.values() if one.definition is not None]
    servers = {name: server for one in definitions for name, server in one.mcp_servers.items()}
    tools: dict[str, ToolDefinition] = {}
    for tool in (*config.tools, *(tool for one in definitions for tool in one.tools)):
        tools.setdefault(tool.name, tool)
    # MCP servers are looked up by whoever calls them, among the references.
    brought = (ref for one in found.values() for ref in one.declared.dependencies if ref.startswith(MCP))
    server_refs = [CapabilityRef(ref=ref) for ref in dict.fromkeys(brought) if ref not in refs]
    return Pinned(
        config=msgspec.structs.replace(
            config,
            capabilities=[*config.capabilities, *server_refs],
            declared=[one.declared for one in found.values()],
            mcp_servers={**servers, **config.mcp_servers},
            tools=list(tools.values()),
        ),
        mounts={ref: one.mounts for ref, one in found.items() if one.mounts},
        archived=frozenset(ref for ref, one in found.items() if one.archived),
    )


async def declared_of(database: Database, refs: Sequence[CapabilityRef]) -> list[DeclaredCapability]:
    """In the API's organization, for references of whatever layers."""
    if not names_rows(ref.ref for ref in refs):
        return []
    async with database.pool.acquire() as connection:
        found = await pinned(connection, DEFAULT_ORG_ID, TurnConfig(capabilities=list(refs)))  # type: ignore[arg-type]
    return found.config.declared


async def named_declaratives(connection: asyncpg.Connection, org_id: int, names: Sequence[str]) -> frozenset[str]:
    """Those of `names` that are live declarative capabilities."""
    rows = await connection.fetch(
        """SELECT name FROM declarative_capabilities
           WHERE org_id = $1 AND name = ANY($2::text[]) AND status IN ('active', 'disabled')""",
        org_id,
        names,
    )
    return frozenset(row["name"] for row in rows)


async def list_virtual(connection: asyncpg.Connection, org_id: int) -> list[VirtualCapability]:
    """Active ones, by name: declarative capabilities, then skills."""
    declared = [
        _declared(row, f"{DECLARATIVE}{row['name']}") for row in await connection.fetch(LISTED_DECLARED, org_id)
    ]
    listed = [
        VirtualCapability(declared=one.declared, tools=list(one.definition.tools) if one.definition else [])
        for one in declared
    ]
    for row in await connection.fetch(LISTED_SKILLS, org_id):
        skill_id = format_id(Prefix.SKILL, row["id"])
        found = _skill(row, f"{SKILL}{skill_id}")
        aliases = (f"{SKILL}{row['name']}", f"{SKILL}{row['id']}")
        listed.append(VirtualCapability(declared=found.declared, aliases=aliases))
    return listed


async def _closure(
    connection: asyncpg.Connection, org_id: int, refs: Sequence[str], *, with_files: bool
) -> dict[str, _Found]:
    """Breadth first, in the order they are named."""
    found: dict[str, _Found] = {}
    waiting = _rows_of(refs, found)
    while waiting and len(found) < MAX_DECLARED:
        looked_up = await _look_up(connection, org_id, waiting, with_files=with_files)
        for ref in waiting:
            problem = DeclaredCapability(ref=ref, name=ref, problem=UNKNOWN)
            found[ref] = looked_up.get(ref) or _Found(declared=problem)
        waiting = _rows_of((name for ref in waiting for name in found[ref].declared.dependencies), found)
    return found


def _rows_of(refs: Iterable[str], found: dict[str, _Found]) -> list[str]:
    return [ref for ref in dict.fromkeys(refs) if names_rows([ref]) and ref not in found][: MAX_DECLARED - len(found)]


async def _look_up(
    connection: asyncpg.Connection, org_id: int, refs: Sequence[str], *, with_files: bool
) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    names = [ref.removeprefix(DECLARATIVE) for ref in refs if ref.startswith(DECLARATIVE)]
    if names:
        for row in await connection.fetch(DECLARED, org_id, names, with_files):
            ref = f"{DECLARATIVE}{row['name']}"
            found[ref] = _declared(row, ref)
    keys = {ref: row_key(ref.removeprefix(SKILL)) for ref in refs if ref.startswith(SKILL)}
    if keys:
        wanted = [key for key in keys.values() if isinstance(key, str)]
        ids = [key for key in keys.values() if isinstance(key, UUID)]
        rows = await connection.fetch(SKILLS, org_id, wanted, ids)
        for ref, key in keys.items():
            row = next((row for row in rows if key in (row["id"], row["name"])), None)
            if row is not None:
                found[ref] = _skill(row, ref)
    return found


def row_key(text: str) -> UUID | str:
    """What follows `skill:`: an id, a bare UUID, or a name."""
    if match := _SKILL_ID.fullmatch(text):
        return UUID(hex=match[1])
    try:
        return UUID(text) if len(text) in (32, 36) else text
    except ValueError:
        return text


def _declared(row: asyncpg.Record, ref: str) -> _Found:
    definition = msgspec.json.decode(row["definition"], type=DeclarativeDefinition)
    name = definition.display_name or definition.name
    if row["status"] == "disabled":
        return _Found(declared=DeclaredCapability(ref=ref, name=name, problem=DISABLED))
    mounts = msgspec.json.decode(row["mounts"], type=list[InitialFile])
    inline = ["skills"] if definition.inline_skills else []
    return _Found(
        declared=DeclaredCapability(
            ref=ref,
            name=name,
            description=definition.description,
            system_prompt=definition.system_prompt,
            risk_level=definition.risk_level,
            dependencies=list(dict.fromkeys([*definition.dependencies, *definition.skill_refs, *inline])),
            features=definition.features,
        ),
        definition=definition,
        mounts=mounts,
        archived=row["status"] == "archived",
    )


def _skill(row: asyncpg.Record, ref: str) -> _Found:
    if row["status"] == "disabled":
        return _Found(declared=DeclaredCapability(ref=ref, name=row["name"], problem=DISABLED))
    skill = PinnedSkill(
        id=format_id(Prefix.SKILL, row["id"]),
        name=row["name"],
        description=row["description"],
        disable_model_invocation=row["disable_model_invocation"],
    )
    declared = DeclaredCapability(
        ref=ref, name=row["name"], description=row["description"], dependencies=["skills"], skill=skill
    )
    return _Found(declared=declared, archived=row["status"] == "archived")
