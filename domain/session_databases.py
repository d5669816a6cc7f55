"""SQLite databases of a session: what is stored of them, and the port through which tools reach them.

A database is stored whole, as one image, and replaced whole: an image that was read is replaced only if nobody else has replaced
it meanwhile. So whatever happens to whoever works on it, it is in a state that a whole script has left.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from domain.errors import InvalidInput
from domain.limits import DATABASE_NAME_MAX_CHARACTERS
from domain.session_storage import StorageProblem

_NAME: Final = re.compile(rf"[A-Za-z0-9_]{{1,{DATABASE_NAME_MAX_CHARACTERS}}}")


class DatabaseInfo(Struct, frozen=True, kw_only=True):
    """A database of a session. `size_bytes` is that of the SQLite file, not what it takes in PostgreSQL. Times are RFC 3339."""

    name: str
    size_bytes: int
    page_count: int
    created_at: str
    updated_at: str


class ColumnSchema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`type` is as declared, and may be empty. `primary_key` is the column's place in the key, from 1; 0 when it is not in it."""

    name: str
    type: str
    not_null: bool = False
    default: str | None = None
    primary_key: int = 0
    generated: bool = False


class IndexSchema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`columns` holds null where an expression is indexed."""

    name: str
    columns: list[str | None]
    unique: bool = False


class ForeignKeySchema(Struct, frozen=True, kw_only=True):
    """`to` holds null where the other table's primary key is meant."""

    columns: list[str]
    table: str
    to: list[str | None]


class TableSchema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A table or a view. `sql` is the statement that made it; `row_count` is left out for views."""

    name: str
    type: str
    sql: str | None
    columns: list[ColumnSchema]
    row_count: int | None = None
    indexes: list[IndexSchema] = []
    foreign_keys: list[ForeignKeySchema] = []
    triggers: list[str] = []


EMPTY_SCHEMA: Final[list[TableSchema]] = []


class DatabaseImage(Struct, frozen=True, kw_only=True):
    """A database as it was read. `content` is what SQLite serializes, deflated (zlib); empty for a database without a page.

    `id` and `version` together are given once, also when a name is used again.
    """

    id: str
    version: int
    content: bytes


class NewImage(Struct, frozen=True, kw_only=True):
    """What a script has made of a database."""

    content: bytes
    size_bytes: int
    page_count: int
    tables: msgspec.Raw
    """JSON of a list of `TableSchema`: it goes to the database as it comes from the process that wrote it."""


class DatabaseProblem(StorageProblem):
    """An operation on a session's databases that cannot be done; the text is fit for a model to read."""


class DatabaseChanged(DatabaseProblem):
    """The image to be replaced is not the current one any more; whoever wrote it begins again with the one that is"""


class SessionDatabases(Protocol):
    """The databases of one session. Every method is one transaction and raises `DatabaseProblem`."""

    async def list(self) -> list[DatabaseInfo]:
        """In the order of their names."""
        ...

    async def load(self, name: str) -> DatabaseImage | None: ...

    async def schema(self, name: str) -> list[TableSchema] | None: ...

    async def result_of(self, idempotency_key: str) -> str | None:
        """What was stored with the write of that key; None when it has not taken effect, or so long ago that it is forgotten."""
        ...

    async def store(
        self, name: str, image: NewImage, *, replaces: DatabaseImage | None, idempotency_key: str, result: str
    ) -> str:
        """Replace an image, or create a database when it replaces none; the result is stored with it.

        Returns `result`, or that of an earlier write with the same key, and then changes nothing: a write takes effect once.
        Raises `DatabaseChanged`.
        """
        ...


def check_database_name(name: str, field: str = "name") -> None:
    """Raises `InvalidInput`."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{field} must be 1 to {DATABASE_NAME_MAX_CHARACTERS} letters, digits or `_`", field=field)
