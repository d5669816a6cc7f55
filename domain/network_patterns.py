"""Network access lists: what a pattern means, which are well-formed, and how the lists of several layers become one.

A pattern is `[scheme://]host[:port][/path]`; a part that is left out matches everything, and `*.` before a host means its
subdomains and not itself. A pattern is a product of independent parts, so two patterns intersect part by part, and lists, which
are unions, intersect pair by pair: a URL is allowed by the intersection exactly when every list allows it.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from urllib.parse import quote, unquote

from msgspec import Struct

SCHEMES: Final = ("http", "https")
PATTERN_MAX_CHARACTERS: Final = 2048
MAX_PATTERNS: Final = 250

_PATTERN = re.compile(
    r"(?:(?P<scheme>[A-Za-z]+)://)?"
    r"(?P<wild>\*\.)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^/:*?#\[\]@\s\\]+|\*)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#\s\\]*)?"
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DOTS = re.compile("[.\u3002\uff0e\uff61]")
"""What separates labels in a name that is not ASCII."""

Address = IPv4Address | IPv6Address


class Pattern(Struct, frozen=True, kw_only=True):
    host: str
    """Canonical; `*` for any."""
    subdomains_only: bool
    scheme: str | None
    port: int | None
    path: str
    """Canonical, without the trailing slash; empty for any."""

    def covers(self, other: Pattern) -> bool:
        """Whether every URL that `other` matches is matched by this one, too."""
        return intersection(self, other) == other

    @property
    def text(self) -> str:
        """A spelling that `parse_pattern` reads as this pattern."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "" if self.scheme is None else f"{self.scheme}://"
        port = "" if self.port is None else f":{self.port}"
        return f"{scheme}{'*.' if self.subdomains_only else ''}{host}{port}{quote(self.path, safe='/~')}"


def parse_pattern(text: str) -> Pattern | None:
    """None when it is malformed."""
    if len(text) > PATTERN_MAX_CHARACTERS:
        return None
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        return None
    scheme = match["scheme"].lower() if match["scheme"] else None
    port = int(match["port"]) if match["port"] else None
    if (scheme is not None and scheme not in SCHEMES) or (port is not None and not 1 <= port <= 65535):
        return None
    host = _pattern_host(match["host"])
    if host is None or (match["wild"] and (host == "*" or parse_address(host) is not None)):
        return None
    return Pattern(
        host=host,
        subdomains_only=bool(match["wild"]),
        scheme=scheme,
        port=port,
        path=canonical_path(match["path"] or "/").rstrip("/"),
    )


def problem_of(text: str) -> str | None:
    """Why a pattern is malformed, for a person to read."""
    if parse_pattern(text) is not None:
        return None
    if len(text) > PATTERN_MAX_CHARACTERS:
        return f"is longer than {PATTERN_MAX_CHARACTERS} characters"
    if "?" in text or "#" in text:
        return "has a query or a fragment; patterns end with the path"
    if "@" in text:
        return "has a user name; leave it out"
    if "://" in text and text.strip().partition("://")[0].lower() not in SCHEMES:
        return "has a scheme other than http and https"
    if "*" in text.partition("://")[-1].removeprefix("*.") or "*" in text.partition("://")[0].removeprefix("*."):
        return "has a `*` in the middle; `*` stands alone, or as `*.` before a host name"
    return "is not `[scheme://]host[:port][/path]`, such as `*.example.com` or `https://api.example.com/v1`"


def intersection(one: Pattern, other: Pattern) -> Pattern | None:
    """What both match; None when no URL can be."""
    if one.scheme and other.scheme and one.scheme != other.scheme:
        return None
    if one.port and other.port and one.port != other.port:
        return None
    host = _narrower_host(one, other)
    path = _narrower_path(one.path, other.path)
    if host is None or path is None:
        return None
    return Pattern(
        host=host.host,
        subdomains_only=host.subdomains_only,
        scheme=one.scheme or other.scheme,
        port=one.port or other.port,
        path=path,
    )


def intersect(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The patterns that match what a pattern of either list matches; without those that another one covers.

    Malformed patterns match nothing. What is a pattern of one of the lists keeps its spelling.
    """
    first, second = _parsed(one), _parsed(other)
    spelling = {**second, **first}
    found = {both: None for a in first for b in second if (both := intersection(a, b)) is not None}
    kept = [one for one in found if not any(wider is not one and wider.covers(one) for wider in found)]
    return [spelling.get(pattern) or pattern.text for pattern in kept]


def canonical_path(path: str) -> str:
    normal = posixpath.normpath(unquote(path).replace("\\", "/"))
    return "/" + normal.strip("/")


def parse_address(text: str) -> Address | None:
    """The address in its one canonical spelling, or None: no octal, hex, short or zoned forms."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id is not None else address


def canonical_host(host: str) -> tuple[str, Address | None]:
    """An ASCII host as it stands in a URL, without brackets. Raises `ValueError` that says what is wrong.

    A host whose last label is a number must be an address in its usual form: resolvers also take 127.1, 0x7f.0.0.1 and
    2130706433 for addresses, and a network list can't be expected to name them all.
    """
    host = host.lower().removesuffix(".")
    if address := parse_address(host):
        return str(address), address
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("Write the address in the URL as four decimal numbers, such as 192.0.2.1.")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("The URL has no valid host name.")
    return host, None


def ascii_host(host: str) -> str:
    """`Bücher.example` as it stands in a request. Raises `ValueError`.

    Lower case and punycode per label, which is what HTTP clients send for every name they accept; a name that they refuse stays
    one that no URL can have.
    """
    if host.isascii():
        return host
    lower = unicodedata.normalize("NFC", host.lower())
    return ".".join(
        label if label.isascii() else "xn--" + label.encode("punycode").decode("ascii") for label in _DOTS.split(lower)
    )


def _parsed(texts: Iterable[str]) -> dict[Pattern, str]:
    return {pattern: text for text in texts if (pattern := parse_pattern(text)) is not None}


def _pattern_host(text: str) -> str | None:
    if text == "*":
        return text
    try:
        return canonical_host(text[1:-1] if text.startswith("[") else ascii_host(text))[0]
    except (ValueError, UnicodeError):
        return None


def _narrower_host(one: Pattern, other: Pattern) -> Pattern | None:
    """The one of the two whose hosts are all hosts of the other."""
    return next((a for a, b in ((one, other), (other, one)) if _is_host_within(a, b)), None)


def _is_host_within(inner: Pattern, outer: Pattern) -> bool:
    if outer.host == "*":
        return True
    if outer.subdomains_only:
        below = inner.host.endswith(f".{outer.host}")
        return below or (inner.subdomains_only and inner.host == outer.host)
    return inner.host == outer.host and not inner.subdomains_only


def _narrower_path(one: str, other: str) -> str | None:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return longer if f"{longer}/".startswith(f"{shorter}/") else None
