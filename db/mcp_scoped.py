"""The secrets of scoped MCP servers: values of headers, keys and variables in the `mcpServers` of a resource.

A value becomes a row of its own, sealed to that row, and the resource's column holds the row's id in its place. Rows are never
changed and may be shared by copies of a resource. Written before the resource is: what a failed write leaves behind is a row that
nobody names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal
from uuid import UUID

import asyncpg
import msgspec

from db.database import Database
from domain.errors import InvalidInput
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id, uuid7
from domain.mcp import MASKED, SECRET_FIELDS, SECRET_MAPS, StoredServer
from domain.mcp_input import ScopedServer, parse_scoped_servers, same_origin
from domain.secret import Secret
from infra.encryption import Keyring, bound_to

Owner = Literal["harnesses", "agents", "declarative_capabilities"]

_STORED: Final[dict[Owner, str]] = {
    "harnesses": "SELECT mcp_servers FROM harnesses WHERE org_id = $1 AND id = $2",
    "agents": "SELECT mcp_servers FROM agents WHERE org_id = $1 AND public_id = $2",
    "declarative_capabilities": """SELECT definition->'mcpServers' FROM declarative_capabilities
        WHERE org_id = $1 AND id = $2""",
}
_STORED_BY_NAME: Final = """SELECT mcp_servers FROM agents WHERE org_id = $1 AND name = $2 AND status = 'active'"""


async def sealed_servers(
    database: Database,
    keyring: Keyring,
    servers: Mapping[str, object],
    *,
    allow_stdio: bool,
    owner: Owner | None = None,
    owner_id: str | None = None,
    owner_name: str | None = None,
) -> dict[str, object]:
    """`servers` as they are to be stored. A masked value keeps the one that the owner has at the same place.

    Raises `InvalidInput` and `EncryptionNotConfigured`.
    """
    parsed = parse_scoped_servers(servers, allow_stdio=allow_stdio)
    kept: Mapping[str, StoredServer] = {}
    if owner is not None and any(_has_masked(server) for server in parsed.values()):
        kept = await _stored(database, owner, owner_id, owner_name)
    sealing = _Sealing(keyring)
    stored: dict[str, object] = {
        name: sealing.entry(name, server, kept.get(name), servers[name]) for name, server in parsed.items()
    }
    if sealing.rows:
        await database.pool.executemany(
            "INSERT INTO mcp_scoped_secrets (id, org_id, value) VALUES ($1, $2, $3)",
            [(key, DEFAULT_ORG_ID, envelope) for key, envelope in sealing.rows],
        )
    return stored


class _Sealing:
    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self.rows: list[tuple[UUID, str]] = []

    def entry(self, name: str, server: ScopedServer, kept: StoredServer | None, given: object) -> dict[str, object]:
        if kept is not None and not (same_origin(kept.url, server.url) and kept.command == server.command):
            # A secret is for whom it was given: whoever cannot read it must not be able to have it sent elsewhere.
            kept = None
        # As it was given, so that it is shown as it was given.
        entry = dict(given) if isinstance(given, Mapping) else {}
        for field in SECRET_MAPS:
            values = getattr(server, field)
            if values is not None:
                earlier = getattr(kept, field, None) or {}
                entry[field] = {
                    key: self._ref(value, earlier.get(key), f"mcpServers.{name}.{field}.{key}")
                    for key, value in values.items()
                }
        for field in SECRET_FIELDS:
            value = getattr(server, field)
            if value is not None:
                entry[field] = self._ref(value, getattr(kept, field, None), f"mcpServers.{name}.{field}")
        return entry

    def _ref(self, value: str, earlier: object, field: str) -> object:
        if value == MASKED:
            if earlier is None:
                raise InvalidInput("A masked value stands only for one that is stored for this server", field=field)
            return msgspec.to_builtins(earlier)
        key = uuid7()
        self.rows.append((key, self._keyring.encrypt(value, bound_to=_place(key))))
        return {"secret": str(key)}


def _has_masked(server: ScopedServer) -> bool:
    values = [*(server.headers or {}).values(), *(server.env or {}).values(), server.api_key]
    return MASKED in values


async def _stored(
    database: Database, owner: Owner, owner_id: str | None, owner_name: str | None
) -> dict[str, StoredServer]:
    if owner_id is None:
        text = await database.pool.fetchval(_STORED_BY_NAME, DEFAULT_ORG_ID, owner_name)
    else:
        prefixes = {"harnesses": Prefix.HARNESS, "declarative_capabilities": Prefix.CAPABILITY}
        key = parse_id(prefixes[owner], owner_id) if owner in prefixes else owner_id
        text = await database.pool.fetchval(_STORED[owner], DEFAULT_ORG_ID, key)
    return stored_servers({} if text is None else msgspec.json.decode(text, type=dict[str, object]))


def stored_servers(servers: Mapping[str, object]) -> dict[str, StoredServer]:
    """Those that can be read; what an older version stored without looking at it may be anything."""
    found: dict[str, StoredServer] = {}
    for name, entry in servers.items():
        try:
            found[name] = msgspec.convert(entry, StoredServer)
        except msgspec.ValidationError:
            continue
    return found


async def open_scoped(pool: asyncpg.Pool, keyring: Keyring, org_id: int, refs: list[str]) -> dict[str, Secret]:
    """By id. One that is not there any more is left out. Raises `UndecryptableSecret`."""
    rows = await pool.fetch(
        "SELECT id, value FROM mcp_scoped_secrets WHERE org_id = $1 AND id = ANY($2::uuid[])",
        org_id,
        [UUID(ref) for ref in refs],
    )
    return {str(row["id"]): keyring.decrypt(row["value"], bound_to=_place(row["id"])) for row in rows}


def _place(row: UUID) -> str:
    return bound_to("mcp_scoped_secrets", row, "value")
