"""`/v1/sessions/{session_id}/databases`: the SQLite databases that a session's tools work on.

Their content is written and read by tools only. Sizes and schema were stored with it, so no route here opens a database.
"""

from __future__ import annotations

from litestar import Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from api.problems import declared
from api.services import Services
from db import session_databases, sessions
from domain.session_databases import DatabaseInfo, TableSchema


class CreateDatabase(Struct, frozen=True, kw_only=True):
    """`name` is 1 to 64 letters, digits or `_`."""

    name: str


class DatabaseList(Struct, frozen=True, kw_only=True):
    data: list[DatabaseInfo]


class DatabaseSchema(Struct, frozen=True, kw_only=True):
    """Tables and views, by name."""

    database: str
    tables: list[TableSchema]


@get("/", operation_id="list_databases", summary="List databases", responses=declared())
async def list_databases(services: NamedDependency[Services], session_id: FromPath[str]) -> DatabaseList:
    """By name."""
    await sessions.require_session(services.database, session_id)
    return DatabaseList(data=await session_databases.list_databases(services.database.pool, session_id))


@post("/", operation_id="create_database", summary="Create a database", responses=declared(409, 413, 422))
async def create_database(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[CreateDatabase]
) -> DatabaseInfo:
    """An empty one. Tools also make the databases they write to."""
    return await session_databases.create_database(services.database.pool, session_id, data.name)


@get("/{name:str}", operation_id="get_database", summary="Get a database", responses=declared())
async def get_database(
    services: NamedDependency[Services], session_id: FromPath[str], name: FromPath[str]
) -> DatabaseInfo:
    """Its name, its size, and when it was changed."""
    await sessions.require_session(services.database, session_id)
    return await session_databases.get_database(services.database.pool, session_id, name)


@delete("/{name:str}", operation_id="delete_database", summary="Delete a database", responses=declared())
async def delete_database(services: NamedDependency[Services], session_id: FromPath[str], name: FromPath[str]) -> None:
    """With everything in it."""
    await session_databases.delete_database(services.database.pool, session_id, name)


@get("/{name:str}/schema", operation_id="get_schema", summary="Get a database's schema", responses=declared())
async def get_schema(
    services: NamedDependency[Services], session_id: FromPath[str], name: FromPath[str]
) -> DatabaseSchema:
    """Tables and views with their columns, keys, indexes and numbers of rows."""
    await sessions.require_session(services.database, session_id)
    tables = await session_databases.get_tables(services.database.pool, session_id, name)
    return DatabaseSchema(database=name, tables=tables)


router = Router(
    path="/sessions/{session_id:str}/databases",
    route_handlers=[list_databases, create_database, get_database, delete_database, get_schema],
    tags=["Session databases"],
)
