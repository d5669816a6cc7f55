"""What a session keeps besides files: plain values by key, and secrets by name. The port through which tools reach it.

No error repeats a secret, nor a name that is not one: it may be a secret in the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Protocol

from msgspec import Struct

from domain.errors import InputTooLarge, InvalidInput
from domain.limits import (
    MAX_SECRETS_PER_SESSION,
    SECRET_MAX_BYTES,
    SECRET_NAME_MAX_CHARACTERS,
    VALUE_KEY_MAX_CHARACTERS,
    VALUE_MAX_BYTES,
    check_text,
)
from domain.secret import Secret

_KEY: Final = re.compile(rf"[A-Za-z0-9._:/-]{{1,{VALUE_KEY_MAX_CHARACTERS}}}")
_SECRET_NAME: Final = re.compile(rf"[A-Za-z_][A-Za-z0-9_]{{0,{SECRET_NAME_MAX_CHARACTERS - 1}}}")
_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")
"""What PostgreSQL's text, or UTF-8, cannot hold."""


class StoredValue(Struct, frozen=True, kw_only=True):
    """Times are RFC 3339."""

    key: str
    value: str
    created_at: str
    updated_at: str


class StoredSecret(Struct, frozen=True, kw_only=True):
    """A secret as it may be shown: never its value."""

    name: str
    created_at: str
    updated_at: str


class StorageProblem(Exception):
    """A storage operation that cannot be done; the text is fit for a model to read and holds no secret."""


class SessionStorage(Protocol):
    """One session's storage. Every method is one transaction and raises `StorageProblem`."""

    async def get(self, key: str) -> StoredValue | None: ...

    async def set(self, key: str, value: str) -> StoredValue: ...

    async def delete(self, key: str) -> bool:
        """Whether there was something to delete."""
        ...

    async def keys(self) -> list[StoredValue]:
        """In the order of their keys."""
        ...

    async def get_secret(self, name: str) -> Secret | None:
        """For a tool to use, not to return: results are events, which clients read for ever."""
        ...

    async def set_secret(self, name: str, value: Secret) -> StoredSecret: ...

    async def delete_secret(self, name: str) -> bool: ...

    async def secrets(self) -> list[StoredSecret]:
        """In the order of their names."""
        ...


def check_key(key: str, field: str = "key") -> None:
    """Raises `InvalidInput`."""
    if not _KEY.fullmatch(key):
        raise InvalidInput(
            f"{field} must be 1 to {VALUE_KEY_MAX_CHARACTERS} letters, digits, `.`, `_`, `:`, `/` or `-`", field=field
        )


def check_value(value: str, field: str = "value") -> None:
    """Raises `InvalidInput`."""
    _check_storable(value, field)
    check_text(value, field, VALUE_MAX_BYTES)


def check_secret_name(name: str, field: str = "name") -> None:
    """Raises `InvalidInput`."""
    if not _SECRET_NAME.fullmatch(name):
        raise InvalidInput(
            f"{field}: a secret's name is 1 to {SECRET_NAME_MAX_CHARACTERS} letters, digits or `_`, not beginning with a digit",
            field=field,
        )


def check_secrets(secrets: Mapping[str, Secret], field: str = "secrets") -> None:
    """Raises `InvalidInput`, naming the secret at fault as `secrets.NAME`."""
    if len(secrets) > MAX_SECRETS_PER_SESSION:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `{field}` may hold {MAX_SECRETS_PER_SESSION} items", field=field
        )
    for name, secret in secrets.items():
        check_secret_name(name, field)
        path, text = f"{field}.{name}", secret.reveal()
        if not text:
            raise InvalidInput(f"{path} must not be empty", field=path)
        _check_storable(text, path)
        check_text(text, path, SECRET_MAX_BYTES)


def _check_storable(text: str, field: str) -> None:
    if _NOT_STORABLE.search(text):
        raise InvalidInput(f"{field} must not contain U+0000 or half of a surrogate pair", field=field)
