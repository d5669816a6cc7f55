"""What turns know of MCP servers, from PostgreSQL: which there are, what they are called with, and the tools they have shown.

What a list of tools is kept under changes with everything it may depend on, so an edit needs no invalidation: the old entry is
just not found any more, and is removed when the new one is stored, or after a while.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

import asyncpg
import msgspec
import structlog

from db.mcp_grants import read_grant, renew_grant
from db.mcp_scoped import open_scoped, stored_servers
from db.mcp_servers import sealed_headers, target_of, targets_by_key
from domain.config import TurnConfig
from domain.errors import NotFound
from domain.ids import Prefix, parse_id
from domain.mcp import (
    SCOPED_PREFIX,
    Discovery,
    GrantRenewal,
    KnownTools,
    McpProblem,
    OAuthGrant,
    SecretRef,
    ServerCredentials,
    ServerTarget,
    StoredServer,
    TransportType,
    server_key,
)
from domain.secret import Secret
from infra.encryption import Keyring, UndecryptableSecret

KEPT_DAYS: Final = 30
"""How long the tools of a server that nobody asks for are kept."""

_KNOWN: Final = """
SELECT cache_key, discovery, problem,
       extract(epoch FROM clock_timestamp() - found_at)::float8 AS age,
       extract(epoch FROM clock_timestamp() - failed_at)::float8 AS failed
FROM mcp_discoveries WHERE cache_key = ANY($1::text[])
"""
_KEEP: Final = """
INSERT INTO mcp_discoveries (cache_key, org_id, server_id, discovery, found_at) VALUES ($1, $2, $3, $4, clock_timestamp())
ON CONFLICT (cache_key) DO UPDATE SET discovery = excluded.discovery, found_at = excluded.found_at, failed_at = NULL,
    problem = NULL, touched_at = clock_timestamp()
"""
_FORGET: Final = """DELETE FROM mcp_discoveries
    WHERE (server_id = $1 AND cache_key <> $2) OR touched_at < clock_timestamp() - $3 * interval '1 day'"""
_FAILED: Final = """
INSERT INTO mcp_discoveries (cache_key, org_id, server_id, failed_at, problem) VALUES ($1, $2, $3, clock_timestamp(), $4)
ON CONFLICT (cache_key) DO UPDATE SET failed_at = excluded.failed_at, problem = excluded.problem,
    touched_at = clock_timestamp()
"""
_UNREADABLE: Final = "Its stored credentials cannot be read; they have to be set again."

log = structlog.get_logger(__name__)


class DatabaseDirectory:
    """Serves the port `domain.mcp.McpDirectory`."""

    def __init__(self, pool: asyncpg.Pool, keyring: Keyring) -> None:
        self._pool = pool
        self._keyring = keyring

    async def targets(self, session_id: str, config: TurnConfig) -> list[ServerTarget]:
        keys = {ref.ref: key for ref in config.capabilities if (key := server_key(ref.ref)) is not None}
        scoped = stored_servers(config.mcp_servers)
        if not keys and not scoped:
            return []
        session = parse_id(Prefix.SESSION, session_id)
        rows = await targets_by_key(self._pool, session, list(keys.values())) if keys else {}
        targets = [target_of(rows[key], ref) for ref, key in keys.items() if key in rows]
        if scoped:
            org_id = await self._pool.fetchval("SELECT org_id FROM sessions WHERE id = $1", session)
            if org_id is not None:
                targets += [_scoped_target(name, server, org_id) for name, server in scoped.items()]
        return targets

    async def credentials(self, target: ServerTarget) -> ServerCredentials:
        try:
            if target.server_id is not None:
                return ServerCredentials(headers=await sealed_headers(self._pool, self._keyring, target))
            return await self._scoped_credentials(target)
        except UndecryptableSecret as error:
            raise _unreadable(error) from None
        except NotFound:
            raise McpProblem("The server has been deleted.") from None

    async def _scoped_credentials(self, target: ServerTarget) -> ServerCredentials:
        refs = [*target.header_refs.values(), *target.env_refs.values()]
        refs += [] if target.api_key_ref is None else [target.api_key_ref]
        if not refs:
            return ServerCredentials()
        opened = await open_scoped(self._pool, self._keyring, target.org_id, refs)
        if opened.keys() != set(refs):
            raise McpProblem(_UNREADABLE)
        headers = {name: opened[ref] for name, ref in target.header_refs.items()}
        if target.api_key_ref is not None:
            headers["Authorization"] = Secret(f"Bearer {opened[target.api_key_ref].reveal()}")
        return ServerCredentials(headers=headers, env={name: opened[ref] for name, ref in target.env_refs.items()})

    async def grant(self, target: ServerTarget) -> OAuthGrant | None:
        try:
            return await read_grant(self._pool, self._keyring, target)
        except UndecryptableSecret as error:
            raise _unreadable(error) from None

    async def renew(self, target: ServerTarget, spent: str, renewal: GrantRenewal) -> OAuthGrant | None:
        try:
            return await renew_grant(self._pool, self._keyring, target, spent, renewal)
        except UndecryptableSecret as error:
            raise _unreadable(error) from None

    async def known_tools(self, targets: Sequence[ServerTarget]) -> Mapping[str, KnownTools]:
        rows = await self._pool.fetch(_KNOWN, [target.cache_key for target in targets])
        return {
            row["cache_key"]: KnownTools(
                discovery=None if row["discovery"] is None else msgspec.json.decode(row["discovery"], type=Discovery),
                age_seconds=row["age"],
                failed_seconds_ago=row["failed"],
                problem=row["problem"],
            )
            for row in rows
        }

    async def keep_tools(self, target: ServerTarget, discovery: Discovery) -> None:
        key = None if target.server_id is None else parse_id(Prefix.MCP, target.server_id)
        encoded = msgspec.json.encode(discovery).decode()
        await self._pool.execute(_KEEP, target.cache_key, target.org_id, key, encoded)
        await self._pool.execute(_FORGET, key, target.cache_key, KEPT_DAYS)

    async def note_failure(self, target: ServerTarget, problem: str) -> None:
        key = None if target.server_id is None else parse_id(Prefix.MCP, target.server_id)
        await self._pool.execute(_FAILED, target.cache_key, target.org_id, key, problem)


def _unreadable(error: UndecryptableSecret) -> McpProblem:
    log.warning("stored credentials of an MCP server cannot be read", place=error.place, reason=error.reason)
    return McpProblem(_UNREADABLE)


def _scoped_target(name: str, server: StoredServer, org_id: int) -> ServerTarget:
    content = msgspec.json.encode([org_id, name, server], order="deterministic")
    return ServerTarget(
        capability_id=f"{SCOPED_PREFIX}{name}",
        name=name,
        org_id=org_id,
        cache_key=f"scoped:{hashlib.sha256(content).hexdigest()}",
        transport=server.type,
        url=server.url if server.type is TransportType.HTTP else None,
        protocol_mode=server.protocol_mode,
        description=server.description,
        header_refs=_ids(server.headers),
        env_refs=_ids(server.env),
        api_key_ref=None if server.api_key is None else server.api_key.secret,
        command=server.command,
        args=tuple(server.args or ()),
    )


def _ids(refs: Mapping[str, SecretRef] | None) -> dict[str, str]:
    return {name: ref.secret for name, ref in (refs or {}).items()}
