"""The `mcpServers` of a request on their way into a resource: checked, and without their secrets."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct, structs

from api.services import Services
from db.mcp_scoped import Owner, sealed_servers

T = TypeVar("T", bound=Struct)


async def with_sealed_servers(
    services: Services,
    changes: T,
    owner: Owner | None = None,
    *,
    owner_id: str | None = None,
    owner_name: str | None = None,
) -> T:
    """`changes` with scoped servers as they are stored. `owner` is whose stored secrets a masked value may stand for."""
    servers = getattr(changes, "mcp_servers", None)
    if not isinstance(servers, dict):
        return changes
    stored = await sealed_servers(
        services.database,
        services.keyring,
        servers,
        allow_stdio=services.settings.mcp_allow_stdio,
        owner=owner,
        owner_id=owner_id,
        owner_name=owner_name,
    )
    return structs.replace(changes, mcp_servers=stored)
