"""A turn's network access list: which URLs its patterns allow and block.

What a pattern means stands in `domain.network_patterns`. The rules are documented in
docs/capabilities/web_fetch.md. What is in doubt is refused: a malformed `blocked` pattern blocks everything, and a path that
servers may read in more than one way is inside of no allowed path and inside of every blocked one.
"""

from __future__ import annotations

from typing import Final

from activities.web.targets import Target
from domain.capabilities import ToolError
from domain.config import NetworkAccessList
from domain.network_patterns import Pattern, canonical_path, parse_pattern

_AMBIGUOUS: Final = ("%2e", "%2f", "%5c", "%25", ";")
"""Encoded dots, slashes and percent signs, and path parameters: servers differ in what they make of them."""


class NotAllowed(ToolError):
    """The turn's network access list does not let this URL be fetched"""


def check_access(target: Target, access: NetworkAccessList) -> None:
    """Raises `NotAllowed`."""
    for text in access.blocked or []:
        pattern = parse_pattern(text)
        if pattern is None:
            raise NotAllowed(
                f"Nothing can be fetched: `{text[:200]}`, one of the blocked patterns of this session, is malformed. "
                "Somebody who may configure it has to correct it."
            )
        if matches(pattern, target, in_doubt=True):
            raise NotAllowed(f"`{target.host}` is blocked by the network access list of this session.")
    if access.allowed is None:
        return
    patterns = filter(None, map(parse_pattern, access.allowed))
    if not any(matches(pattern, target, in_doubt=False) for pattern in patterns):
        shown = ", ".join(access.allowed[:20]) or "nothing"
        raise NotAllowed(
            f"`{target.host}` is not on the network access list of this session. What may be fetched: {shown[:1000]}."
        )


def matches(pattern: Pattern, target: Target, *, in_doubt: bool) -> bool:
    """`in_doubt` is the answer for a path that servers may read in more than one way."""
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
    return f"{canonical_path(raw)}/".startswith(f"{pattern.path}/")
