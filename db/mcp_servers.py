"""MCP servers of the organization: CRUD, and what they are called with. Their tokens are in `db.mcp_grants`.

Plain asyncpg. Every query names the organization. `api_key`, `headers`, `oauth_client` and `oauth_grant` hold envelopes bound to
their row and column. `updated_at` changes with what a person edits, never with a token: it is part of the key under which a
server's tools are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET

from db.archivable_rows import ArchivableRows
from db.database import Database
from domain.clock import timestamp
from domain.errors import Archived, Conflict, InvalidInput
from domain.ids import Prefix, format_id, parse_id, uuid7
from domain.mcp import (
    MASKED,
    MAX_SERVERS_PER_ORG,
    AuthMode,
    McpServer,
    McpServerStatus,
    RegisteredClient,
    ServerTarget,
    TransportType,
)
from domain.mcp_input import McpServerChanges, same_origin
from domain.secret import Secret
from infra.encryption import Keyring, bound_to

TABLE: Final = "mcp_servers"
ONE: Final = "SELECT * FROM mcp_servers WHERE org_id = $1 AND id = $2 AND status <> 'deleted'"
ROWS: Final = ArchivableRows(
    table=TABLE,
    prefix=Prefix.MCP,
    noun="MCP server",
    maximum=MAX_SERVERS_PER_ORG,
    full=f"An organization may have {MAX_SERVERS_PER_ORG} MCP servers; delete one first",
)

_FORGET_SECRETS: Final = """UPDATE mcp_servers SET api_key = NULL, headers = NULL, header_names = '{}', oauth_client = NULL,
    oauth_grant = NULL WHERE id = $1 RETURNING *"""


def server_of(row: Mapping[str, object] | asyncpg.Record) -> McpServer:
    def moment(column: str) -> str | None:
        value = row[column]
        return None if value is None else timestamp(value)  # type: ignore[arg-type]

    return msgspec.convert(
        {
            **{name: row[name] for name in ("name", "url", "description", "status")},
            **{name: row[name] for name in ("transport_type", "auth_mode", "protocol_mode")},
            "id": format_id(Prefix.MCP, row["id"]),  # type: ignore[arg-type]
            "api_key_set": row["api_key"] is not None,
            "oauth_connected": row["auth_mode"] == AuthMode.O_AUTH and row["oauth_grant"] is not None,
            "headers": dict.fromkeys(row["header_names"], MASKED),  # type: ignore[call-overload]
            "created_at": moment("created_at"),
            "updated_at": moment("updated_at"),
            "archived_at": moment("archived_at"),
        },
        McpServer,
    )


def target_of(row: Mapping[str, object] | asyncpg.Record, capability_id: str) -> ServerTarget:
    server = server_of(row)
    edited = row["updated_at"].isoformat()  # type: ignore[union-attr]
    return ServerTarget(
        capability_id=capability_id,
        name=server.name,
        org_id=row["org_id"],  # type: ignore[arg-type]
        cache_key=f"{server.id}:{edited}",
        transport=TransportType.HTTP,
        url=server.url,
        protocol_mode=server.protocol_mode,
        auth_mode=server.auth_mode,
        description=server.description,
        server_id=server.id,
    )


async def list_servers(
    connection: asyncpg.Connection | asyncpg.Pool, *, search: str | None = None, include_archived: bool = False
) -> list[McpServer]:
    """Newest first; each word of `search` must occur in the name or the description."""
    rows = await ROWS.list(connection, search=search, include_archived=include_archived)
    return [server_of(row) for row in rows]


async def get_server(database: Database, server_id: str) -> McpServer:
    return server_of(await ROWS.get(database.pool, server_id))


async def find_target(database: Database, server_id: str) -> ServerTarget:
    """The server as the API asks it for its tools. Raises `NotFound`, and `Conflict` for one that is not in use."""
    row = await ROWS.get(database.pool, server_id)
    if row["status"] == McpServerStatus.DISABLED:
        raise Conflict("The server is disabled; enable it first")
    return target_of(row, f"mcp:{row['id']}")


async def create_server(database: Database, keyring: Keyring, changes: McpServerChanges) -> McpServer:
    """Raises `NameTaken`, `ResourceLimit` and `EncryptionNotConfigured`."""
    changes.check()
    key = uuid7()
    values = _values(changes, key, None, keyring)
    if "auth_mode" not in values:
        values["auth_mode"] = AuthMode.API_KEY if values.get("api_key") else AuthMode.NONE
    _check_auth(values)
    async with ROWS.writing(database) as connection:
        row = await ROWS.insert(connection, {"id": key, **values})
    return server_of(row)


async def update_server(database: Database, keyring: Keyring, server_id: str, changes: McpServerChanges) -> McpServer:
    """Raises what `create_server` raises, and `Archived`. Steps that begin afterwards see the change."""
    changes.check()
    key = parse_id(Prefix.MCP, server_id)
    async with ROWS.writing(database) as connection:
        row = await ROWS.get(connection, server_id, lock=True)
        if changes.status is McpServerStatus.DELETED:
            return server_of(await _delete(connection, row, field="status"))
        values = _values(changes, key, row, keyring)
        wanted = McpServerStatus(values.get("status", row["status"]))
        if (
            row["status"] == McpServerStatus.ARCHIVED
            and wanted is McpServerStatus.ARCHIVED
            and values.keys() - {"status"}
        ):
            raise Archived
        if (
            "api_key" in values
            and values["api_key"]
            and "auth_mode" not in values
            and row["auth_mode"] == AuthMode.NONE
        ):
            values["auth_mode"] = AuthMode.API_KEY
        after = {**dict(row), **values}
        _check_auth(after)
        is_other = not same_origin(row["url"], after["url"]) or after["auth_mode"] != AuthMode.O_AUTH
        if row["oauth_grant"] is not None and (is_other or "oauth_client" in values):
            # A token belongs to the server it was given for.
            values["oauth_grant"] = None
        assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(values, 2))
        row = await connection.fetchrow(
            f"""UPDATE mcp_servers SET {assignments}, updated_at = clock_timestamp(),
                    archived_at = CASE WHEN {_status_after(values)} = 'archived'
                        THEN coalesce(archived_at, clock_timestamp()) END
                WHERE id = $1 RETURNING *"""  # noqa: S608
            if values
            else "SELECT * FROM mcp_servers WHERE id = $1",
            key,
            *values.values(),
        )
    assert row is not None
    return server_of(row)


def _status_after(values: Mapping[str, object]) -> str:
    return f"${list(values).index('status') + 2}" if "status" in values else "status"


async def archive_server(database: Database, server_id: str) -> None:
    """An active one is archived: sessions that use it go on. An archived one is deleted, with its secrets."""
    async with database.transaction() as connection:
        row = await ROWS.get(connection, server_id, lock=True)
        if row["status"] == McpServerStatus.ARCHIVED:
            await _delete(connection, row)
        else:
            await ROWS.archive(connection, row)


async def _delete(connection: asyncpg.Connection, row: asyncpg.Record, *, field: str | None = None) -> asyncpg.Record:
    """With its secrets. Raises `Conflict` for one that is not archived."""
    await ROWS.delete(connection, row, field=field)
    await connection.execute("DELETE FROM mcp_discoveries WHERE server_id = $1", row["id"])
    await connection.execute("DELETE FROM mcp_oauth_flows WHERE server_id = $1", row["id"])
    deleted = await connection.fetchrow(_FORGET_SECRETS, row["id"])
    assert deleted is not None
    return deleted


def _values(changes: McpServerChanges, key: UUID, row: asyncpg.Record | None, keyring: Keyring) -> dict[str, object]:
    """The changed columns."""
    plain = ("name", "url", "description", "transport_type", "auth_mode", "protocol_mode", "status")
    values: dict[str, object] = {name: value for name in plain if (value := getattr(changes, name)) is not UNSET}
    if row is not None and "url" in values and not same_origin(row["url"], str(values["url"])):
        _check_secrets_given_again(changes, row)
    if changes.api_key is not UNSET:
        values["api_key"] = (
            None if changes.api_key is None else sealed(keyring, key, "api_key", changes.api_key.reveal())
        )
    if changes.headers is not UNSET:
        headers = _merged_headers(changes.headers or {}, key, row, keyring)
        values["header_names"] = list(headers)
        values["headers"] = sealed(keyring, key, "headers", msgspec.json.encode(headers).decode()) if headers else None
    if changes.oauth_client_id is not UNSET:
        client = _client(changes)
        values["oauth_client"] = (
            None if client is None else sealed(keyring, key, "oauth_client", msgspec.json.encode(client).decode())
        )
    return values


def _check_secrets_given_again(changes: McpServerChanges, row: asyncpg.Record) -> None:
    """Whoever may edit a server, but not read its secrets, must not be able to have them sent elsewhere."""
    if row["api_key"] is not None and changes.api_key is UNSET:
        raise InvalidInput("The URL leads to another server: give the api_key again, or an empty one", field="api_key")
    kept = changes.headers is UNSET or any(value.reveal() == MASKED for value in (changes.headers or {}).values())
    if row["headers"] is not None and kept:
        raise InvalidInput("The URL leads to another server: give the headers again", field="headers")


def _merged_headers(
    given: Mapping[str, Secret], key: UUID, row: asyncpg.Record | None, keyring: Keyring
) -> dict[str, str]:
    headers = {name: value.reveal() for name, value in given.items()}
    kept = [name for name, value in headers.items() if value == MASKED]
    if not kept:
        return headers
    stored = _opened_headers(keyring, key, row["headers"]) if row is not None and row["headers"] is not None else {}
    for name in kept:
        if name not in stored:
            raise InvalidInput("A masked value stands only for a header that is stored", field=f"headers.{name}")
        headers[name] = stored[name]
    return headers


def _client(changes: McpServerChanges) -> RegisteredClient | None:
    if not isinstance(changes.oauth_client_id, str) or not changes.oauth_client_id:
        return None
    secret = changes.oauth_client_secret
    return RegisteredClient(
        client_id=changes.oauth_client_id, client_secret=secret.reveal() if isinstance(secret, Secret) else None
    )


def _check_auth(after: Mapping[str, object]) -> None:
    if after.get("auth_mode") == AuthMode.API_KEY and not after.get("api_key"):
        raise InvalidInput("auth_mode `api_key` needs an api_key", field="api_key")


def sealed(keyring: Keyring, key: UUID, column: str, text: str) -> str:
    return keyring.encrypt(text, bound_to=bound_to(TABLE, key, column))


def _opened_headers(keyring: Keyring, key: UUID, envelope: str) -> dict[str, str]:
    opened = keyring.decrypt(envelope, bound_to=bound_to(TABLE, key, "headers"))
    return msgspec.json.decode(opened.reveal(), type=dict[str, str])


# --- What is sent ------------------------------------------------------------------------------------------------------


async def sealed_headers(
    connection: asyncpg.Connection | asyncpg.Pool, keyring: Keyring, target: ServerTarget
) -> dict[str, Secret]:
    """The headers of a server of the organization, its key among them. Raises `UndecryptableSecret`, `NotFound`."""
    key = key_of(target)
    row = await connection.fetchrow(
        "SELECT auth_mode, api_key, headers FROM mcp_servers WHERE org_id = $1 AND id = $2 AND status <> 'deleted'",
        target.org_id,
        key,
    )
    if row is None:
        raise ROWS.not_found(target.server_id or "")
    headers: dict[str, Secret] = {}
    if row["headers"] is not None:
        headers = {name: Secret(value) for name, value in _opened_headers(keyring, key, row["headers"]).items()}
    if row["api_key"] is not None and row["auth_mode"] == AuthMode.API_KEY:
        api_key = keyring.decrypt(row["api_key"], bound_to=bound_to(TABLE, key, "api_key"))
        headers["Authorization"] = Secret(f"Bearer {api_key.reveal()}")
    return headers


def key_of(target: ServerTarget) -> UUID:
    assert target.server_id is not None, "only servers of the organization have rows"
    return parse_id(Prefix.MCP, target.server_id)


async def targets_by_key(
    connection: asyncpg.Connection | asyncpg.Pool, session: UUID, keys: Sequence[UUID]
) -> dict[UUID, asyncpg.Record]:
    """The usable servers among these, of the session's organization."""
    rows = await connection.fetch(
        """SELECT * FROM mcp_servers WHERE id = ANY($2::uuid[]) AND status IN ('active', 'archived')
           AND org_id = (SELECT org_id FROM sessions WHERE id = $1)""",
        session,
        list(keys),
    )
    return {row["id"]: row for row in rows}
