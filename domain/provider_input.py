"""What a client may write into a provider: addresses, credentials by the type's form, templates of links.

No error repeats a credential, nor anything that may be one in the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from domain.errors import InputTooLarge, InvalidInput
from domain.providers import API_KEY, PROVIDER_TYPES
from domain.secret import Secret

CREDENTIAL_MAX_CHARACTERS: Final = 10 * 1024
URL_MAX_CHARACTERS: Final = 2 * 1024
TRACE_PLACEHOLDERS: Final = ("model", "response_id", "session_id", "turn_id")

_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CREDENTIAL_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PLACEHOLDER: Final = re.compile(r"{(" + "|".join(TRACE_PLACEHOLDERS) + r")}")


def check_provider_type(provider_type: str) -> None:
    if not _TYPE.fullmatch(provider_type):
        field = "provider_type"
        raise InvalidInput(f"{field} must be 1 to 64 letters, digits, `.`, `_` or `-`", field=field)


def check_base_url(url: str, field: str = "base_url") -> None:
    """Plain `http` is fine: that is what a model server on one's own machine speaks."""
    _check_url(url, field)
    if "?" in url or "#" in url:
        raise InvalidInput(f"{field} must not have a query or a fragment", field=field)


def check_address(provider_type: str, base_url: str | None) -> None:
    """Refuse a provider that has no address, neither of its own nor its type's; raises `InvalidInput`."""
    known = PROVIDER_TYPES.get(provider_type)
    if not base_url and known is not None and known.base_url is None:
        raise InvalidInput(f"base_url is required for a provider of type `{provider_type}`", field="base_url")


def check_credentials(provider_type: str, given: Mapping[str, Secret]) -> dict[str, Secret]:
    """The fields that are filled in, as the type's form wants them; of a type that is not listed, any fields are.

    Raises `InvalidInput`, naming the field as `credentials.…`.
    """
    known = PROVIDER_TYPES.get(provider_type)
    form = None if known is None else {field.name: field for field in known.credential_schema.fields}
    kept: dict[str, Secret] = {}
    for name, secret in given.items():
        if not _CREDENTIAL_NAME.fullmatch(name):
            # The name is not repeated: it may be a key in the wrong place.
            raise InvalidInput("credentials: a name is letters, digits and `_`, at most 64", field="credentials")
        path = f"credentials.{name}"
        if form is not None and name not in form:
            raise InvalidInput(f"{path}: a provider of type `{provider_type}` has no such credential", field=path)
        if tidy := _credential(name, secret.reveal(), path):
            kept[name] = Secret(tidy)
    missing = next((name for name, field in (form or {}).items() if field.required and name not in kept), None)
    if missing is not None:
        path = f"credentials.{missing}"
        raise InvalidInput(f"{path} is required for a provider of type `{provider_type}`", field=path)
    return kept


def _credential(name: str, text: str, path: str) -> str:
    if len(text) > CREDENTIAL_MAX_CHARACTERS:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `{path}` may hold {CREDENTIAL_MAX_CHARACTERS} characters", field=path
        )
    # A key is pasted, often with a line break at its end, and goes into an HTTP header, which takes nothing else.
    text = text.strip()
    if name == API_KEY and not (text.isascii() and text.isprintable()):
        raise InvalidInput(f"{path} must be printable ASCII", field=path)
    return text


def check_trace_template(template: str, field: str) -> None:
    """A template becomes a link in other people's browsers."""
    link = _PLACEHOLDER.sub("x", template)
    if "{" in link or "}" in link:
        allowed = ", ".join(f"{{{name}}}" for name in TRACE_PLACEHOLDERS)
        raise InvalidInput(f"{field} may hold the placeholders {allowed} and no other braces", field=field)
    _check_url(link, field)


def resolved_trace(provider_type: str, stored: Mapping[str, object] | None) -> dict[str, object] | None:
    """A provider's own trace configuration laid over its type's; None when neither has any."""
    known = PROVIDER_TYPES.get(provider_type)
    defaults = {
        "session_url_template": known and known.session_url_template,
        "generation_url_template": known and known.generation_url_template,
    }
    templates = {name: template for name, template in defaults.items() if template is not None}
    return {"enabled": False, **templates, **(stored or {})} if templates or stored else None


def _check_url(url: str, field: str) -> None:
    if len(url) > URL_MAX_CHARACTERS:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `{field}` may hold {URL_MAX_CHARACTERS} characters", field=field
        )
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    # urlsplit drops tabs and line breaks silently, so they have to be looked for in the text.
    if not sound or not url.isprintable() or " " in url:
        raise InvalidInput(f"{field} must be an http:// or https:// URL", field=field)
    if "@" in urlsplit(url).netloc:
        raise InvalidInput(f"{field} must not carry a user name or password", field=field)
