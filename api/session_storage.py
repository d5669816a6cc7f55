"""`/v1/sessions/{session_id}/storage`: what a session's tools keep, and the secrets people give them.

Secrets go in and never come out: there is no route that reads one.
"""

from __future__ import annotations

from litestar import Router, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from api.problems import declared
from api.services import Services
from db import session_storage, sessions
from domain.secret import Secret
from domain.session_storage import StoredSecret, StoredValue


class ValueList(Struct, frozen=True, kw_only=True):
    data: list[StoredValue]


class SecretList(Struct, frozen=True, kw_only=True):
    data: list[StoredSecret]


class SetSecrets(Struct, frozen=True, kw_only=True):
    """Values by name. What is there under a name is replaced, other names stay."""

    secrets: dict[str, str]

    def __repr__(self) -> str:
        return "SetSecrets(***)"


class SecretsSet(Struct, frozen=True, kw_only=True):
    """How many secrets the request has stored."""

    count: int


@get("/keys", operation_id="list_keys", summary="List stored values", responses=declared())
async def list_keys(services: NamedDependency[Services], session_id: FromPath[str]) -> ValueList:
    """What the session's tools have stored with `kv_store`, by key."""
    await sessions.require_session(services.database, session_id)
    return ValueList(data=await session_storage.list_values(services.database.pool, session_id))


@get("/secrets", operation_id="list_secrets", summary="List secrets, without their values", responses=declared())
async def list_secrets(services: NamedDependency[Services], session_id: FromPath[str]) -> SecretList:
    """By name. Values are never shown."""
    await sessions.require_session(services.database, session_id)
    return SecretList(data=await session_storage.list_secrets(services.database.pool, session_id))


@put("/secrets", operation_id="batch_set_secrets", summary="Set secrets", responses=declared(409, 413, 503))
async def batch_set_secrets(
    services: NamedDependency[Services], session_id: FromPath[str], data: JSONBody[SetSecrets]
) -> SecretsSet:
    """All of them or, when one is refused, none. They are encrypted before they are stored."""
    secrets = {name: Secret(value) for name, value in data.secrets.items()}
    stored = await session_storage.set_secrets(services.database.pool, services.keyring, session_id, secrets)
    return SecretsSet(count=len(stored))


router = Router(
    path="/sessions/{session_id:str}/storage",
    route_handlers=[list_keys, list_secrets, batch_set_secrets],
    tags=["Session storage"],
)
