"""`/v1/user/connections`: keys of the calling user for outside services. They are write-only."""

from __future__ import annotations

import re
from typing import Final, Literal

from litestar import Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from api.problems import declared
from api.services import Services
from db import user_connections
from db.user_connections import UserConnection
from domain.errors import InvalidInput
from domain.limits import SECRET_MAX_BYTES, check_text
from domain.secret import Secret

_PROVIDER: Final = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
PROVIDER_MAX_CHARACTERS: Final = 64


class SetConnection(Struct, frozen=True, kw_only=True):
    api_key: str

    def __repr__(self) -> str:
        return "SetConnection()"


class ConnectionView(UserConnection, frozen=True, kw_only=True):
    """`connected_at` is `created_at`, under the name that some clients read."""

    connected_at: str
    connection_type: Literal["api_key"] = "api_key"


class ConnectionList(Struct, frozen=True, kw_only=True):
    data: list[ConnectionView]


def _view(connection: UserConnection) -> ConnectionView:
    return ConnectionView(
        provider=connection.provider,
        created_at=connection.created_at,
        updated_at=connection.updated_at,
        connected_at=connection.created_at,
    )


def _check_provider(provider: str) -> None:
    if len(provider) > PROVIDER_MAX_CHARACTERS or not _PROVIDER.fullmatch(provider):
        raise InvalidInput(
            f"provider must be up to {PROVIDER_MAX_CHARACTERS} lower-case letters and digits, in words joined by `-` or `_`",
            field="provider",
        )


@get("/", operation_id="list_connections", summary="List connections", responses=declared())
async def list_connections(services: NamedDependency[Services]) -> ConnectionList:
    """Of the calling user, by provider; never with keys."""
    return ConnectionList(data=[_view(one) for one in await user_connections.list_connections(services.database)])


@post(
    "/{provider:str}",
    operation_id="set_connection",
    summary="Connect to a service",
    status_code=200,
    responses=declared(409, 413, 503),
)
async def set_connection(
    services: NamedDependency[Services], provider: FromPath[str], data: JSONBody[SetConnection]
) -> ConnectionView:
    """Stores the key, encrypted, in place of the one that was there. It cannot be read back."""
    _check_provider(provider)
    if not data.api_key.strip():
        raise InvalidInput("api_key must not be blank", field="api_key")
    check_text(data.api_key, "api_key", SECRET_MAX_BYTES)
    stored = await user_connections.set_connection(
        services.database, services.keyring, provider, Secret(data.api_key.strip())
    )
    return _view(stored)


@delete("/{provider:str}", operation_id="remove_connection", summary="Remove a connection", responses=declared())
async def remove_connection(services: NamedDependency[Services], provider: FromPath[str]) -> None:
    """With its key."""
    _check_provider(provider)
    await user_connections.remove_connection(services.database, provider)


router = Router(
    "/user/connections",
    tags=["Connections"],
    route_handlers=[list_connections, set_connection, remove_connection],
)
