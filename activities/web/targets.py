"""Where a URL leads: its parts in one canonical spelling, or a refusal that says what is wrong with it.

Everything that decides (network lists, the address guard) and everything that connects uses the `Target`, never the URL's text:
two readings of one text can't disagree.
"""

from __future__ import annotations

from typing import Final

import httpx2
from msgspec import Struct

from activities.web.addresses import Address
from domain import network_patterns
from domain.capabilities import ToolError

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
MAX_URL_CHARACTERS: Final = 8192


class UnusableUrl(ToolError):
    """A URL that is not fetched whatever it leads to"""


class Target(Struct, frozen=True, kw_only=True):
    """`host` is lower case, without a trailing dot, and punycode where needed; an IPv6 address has no brackets."""

    url: httpx2.URL
    scheme: str
    host: str
    port: int
    address: Address | None
    """The host, when it is an address and not a name."""

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def target_of(text: str | httpx2.URL) -> Target:
    """Raises `UnusableUrl`."""
    if len(str(text)) > MAX_URL_CHARACTERS:
        raise UnusableUrl(f"The URL is longer than {MAX_URL_CHARACTERS:,} characters.")
    if "\\" in str(text) or any(character.isspace() for character in str(text)):
        raise UnusableUrl("The URL contains a backslash or white space. Percent-encode what does not belong there.")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, UnicodeError):
        raise UnusableUrl("That is not a valid URL. Expected something like https://example.com/page.") from None
    if url.scheme not in DEFAULT_PORTS:
        raise UnusableUrl("Only http:// and https:// URLs can be fetched.")
    if url.userinfo:
        raise UnusableUrl("The URL carries a user name or password. Leave them out, or use an Authorization header.")
    port = DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    if not 1 <= port <= 65535:
        raise UnusableUrl("The port of the URL is not between 1 and 65535.")
    host, address = canonical_host(url.raw_host.decode("ascii", "replace"))
    return Target(url=url.copy_with(host=host, fragment=None), scheme=url.scheme, host=host, port=port, address=address)


def canonical_host(host: str) -> tuple[str, Address | None]:
    """A host as it stands in a URL, without brackets. Raises `UnusableUrl`."""
    try:
        return network_patterns.canonical_host(host)
    except ValueError as error:
        raise UnusableUrl(str(error)) from None
