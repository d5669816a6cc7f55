"""OAuth of MCP servers: tokens, and the authorizations that are under way.

A grant is an envelope in its server's row. Whoever renews one holds that row, because a refresh token often works once only. An
authorization that was begun waits in a table, under a key derived from the state that comes back with the browser: the state is
what proves that it is the same person, so it is stored nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import asyncpg
import msgspec

from db.database import Database
from db.mcp_servers import ONE, TABLE, key_of, sealed, target_of
from domain.mcp import AuthMode, OAuthGrant, RegisteredClient, ServerTarget
from infra.encryption import Keyring, bound_to

FLOW_SECONDS: Final = 15 * 60
"""How long a person may take to log in."""

_GRANT: Final = "SELECT oauth_grant FROM mcp_servers WHERE org_id = $1 AND id = $2"
_GRANT_LOCKED: Final = "SELECT oauth_grant FROM mcp_servers WHERE org_id = $1 AND id = $2 FOR NO KEY UPDATE"


async def oauth_client(database: Database, keyring: Keyring, target: ServerTarget) -> RegisteredClient | None:
    key = key_of(target)
    envelope = await database.pool.fetchval(
        "SELECT oauth_client FROM mcp_servers WHERE org_id = $1 AND id = $2", target.org_id, key
    )
    if envelope is None:
        return None
    opened = keyring.decrypt(envelope, bound_to=bound_to(TABLE, key, "oauth_client"))
    return msgspec.json.decode(opened.reveal(), type=RegisteredClient)


async def read_grant(
    connection: asyncpg.Connection | asyncpg.Pool, keyring: Keyring, target: ServerTarget, *, lock: bool = False
) -> OAuthGrant | None:
    """Raises `UndecryptableSecret`."""
    key = key_of(target)
    envelope = await connection.fetchval(_GRANT_LOCKED if lock else _GRANT, target.org_id, key)
    if envelope is None:
        return None
    opened = keyring.decrypt(envelope, bound_to=bound_to(TABLE, key, "oauth_grant"))
    return msgspec.json.decode(opened.reveal(), type=OAuthGrant)


async def renew_grant(
    pool: asyncpg.Pool,
    keyring: Keyring,
    target: ServerTarget,
    spent: str,
    renewal: Callable[[OAuthGrant], Awaitable[OAuthGrant | None]],
) -> OAuthGrant | None:
    """The row is locked while the authorization server is asked: the next worker then finds the new grant."""
    async with pool.acquire() as connection, connection.transaction():
        grant = await read_grant(connection, keyring, target, lock=True)  # type: ignore[arg-type]  # a pool's proxy
        if grant is None or grant.access_token != spent:
            return grant
        renewed = await renewal(grant)
        await _write_grant(connection, keyring, target, renewed)  # type: ignore[arg-type]
        return renewed


async def write_grant(database: Database, keyring: Keyring, target: ServerTarget, grant: OAuthGrant | None) -> None:
    async with database.transaction() as connection:
        await _write_grant(connection, keyring, target, grant)


async def _write_grant(
    connection: asyncpg.Connection, keyring: Keyring, target: ServerTarget, grant: OAuthGrant | None
) -> None:
    key = key_of(target)
    envelope = None if grant is None else sealed(keyring, key, "oauth_grant", msgspec.json.encode(grant).decode())
    await connection.execute(
        "UPDATE mcp_servers SET oauth_grant = $3 WHERE org_id = $1 AND id = $2 AND status <> 'deleted'",
        target.org_id,
        key,
        envelope,
    )


def _flow_key(state: str) -> UUID:
    return UUID(bytes=hashlib.sha256(state.encode("utf-8", "replace")).digest()[:16])


async def begin_flow(database: Database, keyring: Keyring, target: ServerTarget, state: str, flow: bytes) -> None:
    key = _flow_key(state)
    async with database.transaction() as connection:
        await connection.execute("DELETE FROM mcp_oauth_flows WHERE expires_at < clock_timestamp()")
        await connection.execute(
            """INSERT INTO mcp_oauth_flows (id, org_id, server_id, value, expires_at)
               VALUES ($1, $2, $3, $4, clock_timestamp() + $5 * interval '1 second')""",
            key,
            target.org_id,
            key_of(target),
            keyring.encrypt(flow.decode(), bound_to=bound_to("mcp_oauth_flows", key, "value")),
            FLOW_SECONDS,
        )


async def end_flow(database: Database, keyring: Keyring, state: str) -> tuple[ServerTarget, bytes] | None:
    """The authorization that this state began, once; None when there is none, or it took too long."""
    key = _flow_key(state)
    async with database.transaction() as connection:
        flow = await connection.fetchrow(
            """DELETE FROM mcp_oauth_flows WHERE id = $1
               RETURNING server_id, org_id, value, expires_at > clock_timestamp() AS live""",
            key,
        )
        if flow is None or not flow["live"]:
            return None
        row = await connection.fetchrow(ONE, flow["org_id"], flow["server_id"])
    if row is None or row["auth_mode"] != AuthMode.O_AUTH:
        return None
    opened = keyring.decrypt(flow["value"], bound_to=bound_to("mcp_oauth_flows", key, "value"))
    return target_of(row, f"mcp:{row['id']}"), opened.reveal().encode()
