"""A turn's network access list: which URLs its patterns allow and block.

A pattern is `[scheme://]host[:port][/path]`; a part that is left out matches everything. The rules are documented in
docs/capabilities/web_fetch.md. What is in doubt is refused: a malformed `blocked` pattern blocks everything, and a path that
servers may read in more than one way is inside of no allowed path and inside of every blocked one.
"""

from __future__ import annotations

import posixpath
import re
from typing import Final
from urllib.parse import unquote

import httpx2
from msgspec import Struct

from activities.web.targets import DEFAULT_PORTS, Target, UnusableUrl, canonical_host
from domain.capabilities import ToolError
from domain.config import NetworkAccessList

_PATTERN = re.compile(
    r"(?:(?P<scheme>[A-Za-z]+)://)?"
    r"(?P<wild>\*\.)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^/:*?#\[\]@\s\\]+|\*)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#\s\\]*)?"
)
_AMBIGUOUS: Final = ("%2e", "%2f", "%5c", "%25", ";")
"""Encoded dots, slashes and percent signs, and path parameters: servers differ in what they make of them."""


class NotAllowed(ToolError):
    """The turn's network access list does not let this URL be fetched"""


class Pattern(Struct, frozen=True, kw_only=True):
    host: str
    """Canonical; `*` for any."""
    subdomains_only: bool
    scheme: str | None
    port: int | None
    path: str
    """Canonical, without the trailing slash; empty for any."""


def check_access(target: Target, access: NetworkAccessList) -> None:
    """Raises `NotAllowed`."""
    for text in access.blocked or []:
        pattern = parse_pattern(text)
        if pattern is None:
            raise NotAllowed(
                f"Nothing can be fetched: `{text[:200]}`, one of the blocked patterns of this session, is malformed. "
                "Somebody who may configure it has to correct it."
            )
        if _matches(pattern, target, in_doubt=True):
            raise NotAllowed(f"`{target.host}` is blocked by the network access list of this session.")
    if access.allowed is None:
        return
    patterns = filter(None, map(parse_pattern, access.allowed))
    if not any(_matches(pattern, target, in_doubt=False) for pattern in patterns):
        shown = ", ".join(access.allowed[:20]) or "nothing"
        raise NotAllowed(
            f"`{target.host}` is not on the network access list of this session. What may be fetched: {shown[:1000]}."
        )


def parse_pattern(text: str) -> Pattern | None:
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        return None
    scheme = match["scheme"].lower() if match["scheme"] else None
    port = int(match["port"]) if match["port"] else None
    if (scheme is not None and scheme not in DEFAULT_PORTS) or (port is not None and not 1 <= port <= 65535):
        return None
    host = _pattern_host(match["host"])
    if host is None or (match["wild"] and (host == "*" or _is_address(host))):
        return None
    return Pattern(
        host=host,
        subdomains_only=bool(match["wild"]),
        scheme=scheme,
        port=port,
        path=_canonical_path(match["path"] or "/").rstrip("/"),
    )


def _pattern_host(text: str) -> str | None:
    if text == "*":
        return text
    try:
        # Through the same steps as the host of a URL, so that `Bücher.example.` means what it means there.
        raw = text[1:-1] if text.startswith("[") else httpx2.URL(f"http://{text}/").raw_host.decode("ascii")
        return canonical_host(raw)[0]
    except (UnusableUrl, httpx2.InvalidURL, UnicodeError):
        return None


def _is_address(host: str) -> bool:
    return canonical_host(host)[1] is not None


def _matches(pattern: Pattern, target: Target, *, in_doubt: bool) -> bool:
    if pattern.scheme not in (None, target.scheme) or pattern.port not in (None, target.port):
        return False
    if pattern.subdomains_only:
        if not target.host.endswith(f".{pattern.host}"):
            return False
    elif pattern.host not in ("*", target.host):
        return False
    if not pattern.path:
        return True
    raw = target.url.raw_path.decode("ascii").partition("?")[0]
    if any(mark in raw.lower() for mark in _AMBIGUOUS):
        return in_doubt
    return f"{_canonical_path(raw)}/".startswith(f"{pattern.path}/")


def _canonical_path(path: str) -> str:
    normal = posixpath.normpath(unquote(path).replace("\\", "/"))
    return "/" + normal.strip("/")
