"""What harnesses and agents share: they are addressed by id or by name, and live through active → archived → deleted.

Written with Piccolo on the pool that `Database.open` opened, so nothing here is handed a connection. Writers lock the row they
change; names are kept unique by partial indexes over the active rows, whose violations become `NameTaken`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from piccolo.columns import Column

from db.columns import Condition, search_conditions
from db.piccolo_conf import DB
from db.tables import Agent, Harness, Model, Organization
from domain.errors import Archived, Conflict, NameTaken, NotFound, UnknownModel
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.resources import Lifecycle

Row = dict[str, object]

MAX_COPIES: Final = 1000
"""Numbered copies of one name that are looked for; organizations hold fewer rows than that."""

NAME_CONSTRAINTS: Final = {"agents_name_key": "name", "harnesses_name_key": "name", "models_name_key": "model_id"}


class NamedRows:
    def __init__(self, table: type[Agent] | type[Harness], prefix: Prefix) -> None:
        self.table = table
        self.prefix = prefix

    def _key(self, public_id: str) -> Condition:
        value = parse_id(self.prefix, public_id)
        return Agent.public_id == public_id if self.table is Agent else self.table.id == value  # type: ignore[return-value]

    def not_found(self, key: str) -> NotFound:
        return NotFound(f"There is no {self.prefix} `{key[:80]}`")

    async def find_by_id(self, public_id: str, *, lock: bool = False) -> Row | None:
        """The row in whatever state it is, deleted included."""
        query = self.table.select().where(self.table.org_id == DEFAULT_ORG_ID, self._key(public_id))
        if lock:
            query = query.lock_rows("NO KEY UPDATE")
        rows = await query
        return rows[0] if rows else None

    async def find_by_name(self, name: str, *, active_only: bool = False, lock: bool = False) -> Row | None:
        """Archived rows may share a name with an active one, which then wins, as the youngest wins among themselves."""
        states = [Lifecycle.ACTIVE] if active_only else [Lifecycle.ACTIVE, Lifecycle.ARCHIVED]
        query = (
            self.table.select()
            .where(self.table.org_id == DEFAULT_ORG_ID, self.table.name == name, self.table.status.is_in(states))
            .order_by(self.table.status)
            .order_by(self.table.created_at, ascending=False)
            .limit(1)
        )
        if lock:
            query = query.lock_rows("NO KEY UPDATE")
        rows = await query
        return rows[0] if rows else None

    async def get(self, key: str) -> Row:
        """By id or by name. Whatever begins like an id is read as one."""
        if key.startswith(f"{self.prefix}_"):
            row = await self.find_by_id(key)
        else:
            row = await self.find_by_name(key)
        if row is None or row["status"] == Lifecycle.DELETED:
            raise self.not_found(key)
        return row

    async def locked(self, public_id: str) -> Row:
        row = await self.find_by_id(public_id, lock=True)
        if row is None or row["status"] == Lifecycle.DELETED:
            raise self.not_found(public_id)
        return row

    async def page(
        self, *, search: str | None, include_archived: bool, offset: int = 0, limit: int | None = None
    ) -> tuple[list[Row], int]:
        states = [Lifecycle.ACTIVE, Lifecycle.ARCHIVED] if include_archived else [Lifecycle.ACTIVE]
        columns: list[Column] = [self.table.name, self.table.description]
        conditions = [
            self.table.org_id == DEFAULT_ORG_ID,
            self.table.status.is_in(states),
            *search_conditions(search, columns),
        ]
        query = self.table.select().where(*conditions)
        query = query.order_by(self.table.created_at, ascending=False).order_by(self.table.id, ascending=False)
        if limit is not None:
            query = query.offset(offset).limit(limit)
        rows = await query
        return rows, len(rows) if limit is None else await self.table.count().where(*conditions)

    async def count(self) -> int:
        """Rows that count against the organization's limit."""
        conditions = [self.table.org_id == DEFAULT_ORG_ID, self.table.status != Lifecycle.DELETED]
        if self.table is Harness:
            conditions.append(Harness.is_built_in.eq(False))
        return await self.table.count().where(*conditions)

    async def name_is_free(self, name: str, *, exclude_id: str | None = None) -> bool:
        row = await self.find_by_name(name, active_only=True)
        if row is None or exclude_id is None:
            return row is None
        excluded = await self.find_by_id(exclude_id)
        return excluded is not None and excluded["id"] == row["id"]

    async def copy_name(self, name: str) -> str:
        """`name (copy)`, then `name (copy 2)` and so on."""
        rows = await self.table.select(self.table.name).where(
            self.table.org_id == DEFAULT_ORG_ID, self.table.status == Lifecycle.ACTIVE
        )
        taken = {row["name"] for row in rows}
        candidates = (f"{name} (copy)" if number == 1 else f"{name} (copy {number})" for number in range(1, MAX_COPIES))
        free = next((candidate for candidate in candidates if candidate not in taken), None)
        if free is None:
            raise Conflict("There are too many copies of this name")
        return free

    async def insert(self, values: Row) -> Row:
        rows = await self.table.insert(self.table(**values)).returning(*self.table.all_columns())  # type: ignore[arg-type]
        return rows[0]

    async def update(self, row: Row, values: Row) -> Row:
        rows = await (
            self.table.update({**values, "updated_at": datetime.now(UTC)})  # type: ignore[arg-type]
            .where(self.table.id == row["id"])
            .returning(*self.table.all_columns())
        )
        return rows[0]

    async def edit(self, row: Row, values: Row) -> Row:
        """Apply a PATCH. An archived row takes no edit but the one that makes it active again."""
        wanted = Lifecycle(str(values.get("status", row["status"])))
        if row["status"] == Lifecycle.ARCHIVED and wanted is Lifecycle.ARCHIVED and values.keys() - {"status"}:
            raise Archived
        if wanted is Lifecycle.DELETED:
            return await self.delete(row)
        return await self.update(row, {**values, **_archived_at(row, wanted)})

    async def archive(self, row: Row) -> Row:
        if row["status"] == Lifecycle.ARCHIVED:
            return row
        return await self.update(row, {"status": Lifecycle.ARCHIVED, **_archived_at(row, Lifecycle.ARCHIVED)})

    async def delete(self, row: Row) -> Row:
        """The row stays, for the sessions that go on with it, but no request finds it again."""
        if row["status"] != Lifecycle.ARCHIVED:
            raise Conflict("Only an archived resource can be deleted; archive it first")
        return await self.update(row, {"status": Lifecycle.DELETED, "deleted_at": datetime.now(UTC)})


def _archived_at(row: Row, wanted: Lifecycle) -> Row:
    if wanted == row["status"]:
        return {}
    return {"archived_at": datetime.now(UTC) if wanted is Lifecycle.ARCHIVED else None}


@contextlib.asynccontextmanager
async def transaction() -> AsyncIterator[None]:
    """One transaction around Piccolo queries; a name that somebody else took first is `NameTaken`."""
    try:
        async with DB.transaction():
            yield
    except asyncpg.UniqueViolationError as error:
        field = NAME_CONSTRAINTS.get(getattr(error, "constraint_name", None) or "")
        if field is not None:
            raise NameTaken(field=field) from None
        raise Conflict("This id is already in use", field="id") from None


async def lock_organization() -> None:
    """Writers that need to see each other's rows (harness parents, the place of a cycle) queue up here."""
    await Organization.select(Organization.id).where(Organization.id == DEFAULT_ORG_ID).lock_rows("NO KEY UPDATE")


async def require_fallback_models(encoded: object) -> None:
    """`encoded` is the column's value. Raises `UnknownModel` unless each is an enabled model."""
    if isinstance(encoded, str):
        for index, model_id in enumerate(msgspec.json.decode(encoded, type=list[str])):
            await require_model(parse_id(Prefix.MODEL, model_id), f"fallback_model_ids[{index}]")


async def require_model(model: object, field: str) -> None:
    """Raises `UnknownModel` unless it is None or the row id of an enabled model."""
    if isinstance(model, UUID) and not await Model.exists().where(
        Model.org_id == DEFAULT_ORG_ID, Model.id == model, Model.enabled.eq(True)
    ):
        raise UnknownModel(f"{field} names no enabled model", field=field)
