"""What a redirect asks for next (RFC 9110, section 15.4), and what is not carried along."""

from __future__ import annotations

from typing import Final

import httpx2
import msgspec
from msgspec import Struct

from activities.web.header_secrets import mentions_secret
from activities.web.targets import Target, UnusableUrl, target_of

STATUSES: Final = frozenset({301, 302, 303, 307, 308})

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HARMLESS_HEADERS: Final = frozenset({"accept", "accept-language", "user-agent"})
_BODY_HEADERS: Final = frozenset({"content-type", "content-language", "content-encoding", "content-location"})


class Request(Struct, frozen=True, kw_only=True):
    target: Target
    method: str = "GET"
    headers: dict[str, str] = {}
    """Names are lower case."""
    body: bytes | None = None


def next_request(request: Request, status: int, location: str | None) -> Request | None:
    """None when the redirect is not followed and is itself the result. Raises `UnusableUrl`.

    Nothing is changed at an origin that the caller has not named. It doesn't get the caller's headers either, whatever they are
    called: credentials also travel in headers that only their server knows.
    """
    if status not in STATUSES or location is None:
        return None
    try:
        target = target_of(request.target.url.join(location))
    except (httpx2.InvalidURL, ValueError):
        raise UnusableUrl(f"`{request.target.host}` redirects to something that is not a valid URL.") from None
    except UnusableUrl as error:
        raise UnusableUrl(f"`{request.target.host}` redirects to a URL that can't be fetched. {error}") from None
    is_elsewhere = target.origin != request.target.origin
    if _turns_into_get(request.method, status):
        request = msgspec.structs.replace(
            request, method="GET", body=None, headers=_without(request.headers, _BODY_HEADERS)
        )
    elif is_elsewhere and request.method not in _SAFE_METHODS:
        return None
    if is_elsewhere:
        kept = {
            name: value
            for name, value in request.headers.items()
            if name in _HARMLESS_HEADERS and not mentions_secret(value)
        }
        request = msgspec.structs.replace(request, headers=kept)
    return msgspec.structs.replace(request, target=target)


def _turns_into_get(method: str, status: int) -> bool:
    return (status == 303 and method not in ("GET", "HEAD")) or (status in (301, 302) and method == "POST")


def _without(headers: dict[str, str], names: frozenset[str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}
