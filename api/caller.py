"""Who calls, on behalf of which organization, and why: the headers every API route understands.

With `AUTH_MODE=none` every caller is the anonymous admin and whatever stands in `Authorization` is accepted unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal
from urllib.parse import unquote_to_bytes

import structlog
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from msgspec import Struct

from domain.capabilities import Capability
from domain.errors import Forbidden, InvalidChangeReason, NotFound
from domain.ids import DEFAULT_ORG_PUBLIC_ID

CHANGE_REASON: Final = "Everruns-Change-Reason"
CHANGE_REASON_MAX_CHARACTERS: Final = 1000

_CREDENTIAL: Final = re.compile(
    r"""evr_[A-Za-z0-9_]{8,} | \bsk-[A-Za-z0-9_-]{16,} | \bgh[opsur]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}
    | \bAKIA[0-9A-Z]{16}\b | \bxox[abprs]-[A-Za-z0-9-]{10,} | \bAIza[0-9A-Za-z_-]{30,} | \bglpat-[\w-]{16,}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\. | -----BEGIN[ ] | \b(?:bearer|basic)\s+[\w.~+/=-]{16,}
    | \b(?:password|passwd|secret|api[_-]?key|token)\s*[:=]\s*\S{6,}""",
    re.IGNORECASE | re.VERBOSE,
)
"""Well-known shapes of secrets. A reason is kept with the change for everybody to read."""


Role = Literal["owner", "admin", "member"]


class Caller(Struct, frozen=True, kw_only=True):
    """Who calls, as far as rules depend on it."""

    role: Role

    @property
    def is_admin(self) -> bool:
        return self.role in ("owner", "admin")


def caller_of(request: Request[Any, Any, Any]) -> Caller:
    """Everybody is the anonymous owner as long as there is no other authentication."""
    del request
    return Caller(role="owner")


def require_admin_for(caller: Caller, capabilities: Iterable[Capability], field: str) -> None:
    """Capabilities of high risk are given out by admins only. Raises `Forbidden`, naming the first of them."""
    if caller.is_admin:
        return
    risky = next((one for one in capabilities if one.risk_level == "high"), None)
    if risky is not None:
        raise Forbidden(f"Only an admin may give out `{risky.id}`, a capability of high risk", field=field)


def check_caller(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """A guard of every API route."""
    organization = connection.headers.get("X-Org-Id")
    if organization is not None and organization != DEFAULT_ORG_PUBLIC_ID:
        raise NotFound("There is no such organization")
    reason = connection.headers.get(CHANGE_REASON)
    if reason is not None:
        check_change_reason(reason)
    session_id = connection.path_params.get("session_id")
    if session_id is not None:
        structlog.contextvars.bind_contextvars(session_id=session_id)


def check_change_reason(encoded: str) -> None:
    """Changes have no history to keep the reason in yet, so a good one is dropped; a bad one is refused all the same."""
    try:
        reason = unquote_to_bytes(encoded.encode("latin-1")).decode().strip()
    except UnicodeError:
        raise InvalidChangeReason(f"{CHANGE_REASON} must be percent-encoded UTF-8") from None
    if len(reason) > CHANGE_REASON_MAX_CHARACTERS:
        raise InvalidChangeReason(f"{CHANGE_REASON} may hold {CHANGE_REASON_MAX_CHARACTERS} characters")
    if any(
        (ord(character) < 0x20 and character not in "\n\t") or 0x7F <= ord(character) < 0xA0 for character in reason
    ):
        raise InvalidChangeReason(f"{CHANGE_REASON} must not contain control characters")
    if _CREDENTIAL.search(reason):
        raise InvalidChangeReason(f"{CHANGE_REASON} looks as if it contained a credential")
