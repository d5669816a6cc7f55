"""Agents: CRUD and the upsert that clients rely on.

An agent's public id may come from the client, so it stands in a column of its own; everything else refers to the row id.
"""

from __future__ import annotations

import contextlib
from typing import Final

from msgspec import UNSET, Struct, structs

from db.columns import column_values, read_resource
from db.harnesses import assignable_harness
from db.named_rows import NamedRows, Row, require_fallback_models, require_model, transaction
from db.tables import Agent as AgentTable
from domain.errors import Conflict, NameTaken, ResourceLimit
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.limits import MAX_AGENTS_PER_ORG, check_id
from domain.resources import Agent, AgentChanges, Lifecycle

ROWS: Final = NamedRows(AgentTable, Prefix.AGENT)

NOT_COPIED: Final = frozenset(
    {"id", "public_id", "name", "status", "created_at", "updated_at", "archived_at", "deleted_at"}
)


class Saved(Struct, frozen=True, kw_only=True):
    """What an upsert did."""

    agent: Agent
    created: bool


def agent_of(row: Row) -> Agent:
    return read_resource(row, Agent, id=row["public_id"])


async def list_agents(
    *, search: str | None, include_archived: bool, offset: int, limit: int
) -> tuple[list[Agent], int]:
    """A page, newest first, and how many there are."""
    rows, total = await ROWS.page(search=search, include_archived=include_archived, offset=offset, limit=limit)
    return [agent_of(row) for row in rows], total


async def get_agent(key: str) -> Agent:
    """By id or name."""
    return agent_of(await ROWS.get(key))


async def save_agent(changes: AgentChanges, public_id: str | None = None) -> Saved:
    """Create, or replace the agent that has this id or, without an id, this name.

    Replacing takes every field from `changes`: what it leaves out gets its default, as on a create.
    """
    changes.check()
    if public_id is not None:
        check_id(Prefix.AGENT, public_id, "id")
    # Of two racing creates one finds the name or the id taken; its second try sees the row and updates it.
    with contextlib.suppress(NameTaken, Conflict):
        return await _save(changes, public_id)
    return await _save(changes, public_id)


async def _save(changes: AgentChanges, public_id: str | None) -> Saved:
    async with transaction():
        if public_id is not None:
            row = await ROWS.find_by_id(public_id, lock=True)
        else:
            row = await ROWS.find_by_name(str(changes.name), active_only=True, lock=True)
        if row is not None and row["status"] == Lifecycle.DELETED:
            raise Conflict("This id belonged to an agent that was deleted", field="id")
        values = await _values(_complete(changes))
        if row is not None:
            return Saved(agent=agent_of(await ROWS.edit(row, values)), created=False)
        return Saved(agent=agent_of(await _insert(values, public_id)), created=True)


async def update_agent(agent_id: str, changes: AgentChanges) -> Agent:
    changes.check()
    async with transaction():
        row = await ROWS.locked(agent_id)
        return agent_of(await ROWS.edit(row, await _values(changes)))


async def archive_agent(agent_id: str) -> None:
    async with transaction():
        await ROWS.archive(await ROWS.locked(agent_id))


async def delete_agent(agent_id: str) -> None:
    async with transaction():
        await ROWS.delete(await ROWS.locked(agent_id))


async def copy_agent(agent_id: str) -> Agent:
    async with transaction():
        row = await ROWS.locked(agent_id)
        values = {name: value for name, value in row.items() if name not in NOT_COPIED}
        return agent_of(await _insert({**values, "name": await ROWS.copy_name(str(row["name"]))}, None))


async def agent_name_is_free(name: str, exclude_id: str | None) -> bool:
    return await ROWS.name_is_free(name, exclude_id=exclude_id)


def _complete(changes: AgentChanges) -> AgentChanges:
    """With the default for everything that is not set."""
    defaults = AgentChanges(
        system_prompt="",
        capabilities=[],
        initial_files=[],
        tags=[],
        mcp_servers=None,
        network_access=None,
        parallel_tool_calls=None,
        display_name=None,
        description=None,
        default_model_id=None,
        fallback_model_ids=[],
        tools=[],
        max_iterations=None,
    )
    given = {name: value for name, value in structs.asdict(changes).items() if value is not UNSET}
    return structs.replace(defaults, **given)


async def _values(changes: AgentChanges) -> Row:
    values = column_values(changes)
    values.pop("harness_name", None)
    if changes.harness_id is not UNSET or changes.harness_name is not UNSET:
        values["harness_id"] = await assignable_harness(changes.harness_id or None, changes.harness_name or None)
    await require_model(values.get("default_model_id"), "default_model_id")
    await require_fallback_models(values.get("fallback_model_ids"))
    return values


async def _insert(values: Row, public_id: str | None) -> Row:
    if await ROWS.count() >= MAX_AGENTS_PER_ORG:
        raise ResourceLimit(f"An organization may have {MAX_AGENTS_PER_ORG} agents; delete one first")
    key = uuid7()
    if "harness_id" not in values:
        values["harness_id"] = await assignable_harness(None, None)
    return await ROWS.insert(
        {"id": key, "public_id": public_id or format_id(Prefix.AGENT, key), "org_id": DEFAULT_ORG_ID, **values}
    )
