"""One HTTP request on behalf of a model, redirects included, that can't reach into our own network.

The guard holds because nothing is looked up twice: each hop's name is resolved here, every address of it is checked, and the
connection goes to one of exactly these addresses, with the name only in `Host`, in SNI and in the check of the certificate.
Proxies, cookies and credentials of the environment are not used. Each hop has a connection of its own, closed before the next.

The published tool gives a server one second for its first byte. That fails on ordinary pages that are made on demand, so a
server may be silent for ten here; what bounds the call is the limit of the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Final

import httpx2
import msgspec
from msgspec import Struct

from activities.web.addresses import Reach, reach
from activities.web.header_secrets import HeaderSecrets
from activities.web.network_rules import check_access
from activities.web.redirects import Request, next_request
from activities.web.targets import Target
from domain.capabilities import ToolError
from domain.config import NetworkAccessList
from domain.network_patterns import parse_address

USER_AGENT: Final = "Everruns-WebFetch/1.0"
MAX_REDIRECTS: Final = 5
MAX_ADDRESSES_TRIED: Final = 3

_CODINGS: Final = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})
"""What we ask for: their decoders give bounded pieces."""

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a name, as texts; an empty list or an `OSError` when there are none."""


class FetchFailed(ToolError):
    """No usable answer"""


class Limits(Struct, frozen=True, kw_only=True):
    connect_seconds: float = 5.0
    """For the name and the connection together, and again for the TLS handshake."""
    silence_seconds: float = 10.0
    total_seconds: float = 30.0
    body_bytes: int = 5 * 1024 * 1024
    """After decompression."""


class Page(Struct, frozen=True, kw_only=True):
    """An answer. `body` holds what fits the limit; `is_cut` tells that there was more."""

    target: Target
    status: int
    headers: httpx2.Headers
    body: bytes
    is_cut: bool


class PrivateHosts:
    """Hosts the operator has opened although their addresses are private: names or addresses, each with or without a port."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)

    def opens(self, target: Target) -> bool:
        host = f"[{target.host}]" if ":" in target.host else target.host
        return host in self._hosts or f"{host}:{target.port}" in self._hosts


async def system_resolver(host: str) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Fetcher:
    def __init__(
        self,
        *,
        private_hosts: PrivateHosts | None = None,
        resolve: Resolver = system_resolver,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._private_hosts = private_hosts or PrivateHosts()
        self._resolve = resolve
        self._limits = limits or Limits()
        self._given_tls = tls

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """Made at the first use: reading the system's certificates takes a while."""
        return self._given_tls or httpx2.create_ssl_context()

    async def fetch(self, request: Request, access: NetworkAccessList, secrets: HeaderSecrets | None = None) -> Page:
        """Raises a `ToolError` when there is no answer. An answer with an error status is a `Page`.

        `secrets` are those that the request's headers name; neither page nor error holds any of them.
        """
        secrets = secrets or HeaderSecrets({}, {})
        deadline = asyncio.timeout(self._limits.total_seconds)
        try:
            async with deadline:
                return await self._follow(request, access, secrets)
        except TimeoutError:
            raise FetchFailed(
                f"`{request.target.host}` did not send its whole answer within {self._limits.total_seconds:g} seconds."
            ) from None
        except ToolError as error:
            # A redirect can put a secret into a host name, and errors name hosts.
            hidden = secrets.hidden_text(str(error))
            if hidden == str(error):
                raise
            raise FetchFailed(hidden) from None

    async def _follow(self, request: Request, access: NetworkAccessList, secrets: HeaderSecrets) -> Page:
        for _ in range(MAX_REDIRECTS + 1):
            check_access(request.target, access)
            addresses = await self.checked_addresses(request.target)
            secrets.check(request.target, addresses, request.headers)
            async with self._answer(request, addresses, secrets) as response:
                following = next_request(request, response.status_code, response.headers.get("location"))
                if following is None:
                    return _without_secrets(await self._read(request.target, response), secrets)
            request = following
        raise FetchFailed(f"More than {MAX_REDIRECTS} redirects, the last one by `{request.target.host}`.")

    async def checked_addresses(self, target: Target) -> list[str]:
        """One bad address spoils a name: who mixes public and private ones is trying to get past this."""
        if target.address is not None:
            found = [str(target.address)]
        else:
            try:
                async with asyncio.timeout(self._limits.connect_seconds):
                    found = list(await self._resolve(target.host))
            except (OSError, UnicodeError):  # a TimeoutError is an OSError
                found = []
        accepted = {Reach.PUBLIC, Reach.PRIVATE} if self._private_hosts.opens(target) else {Reach.PUBLIC}
        parsed = [parse_address(address) for address in found]
        if not parsed or any(address is None or reach(address) not in accepted for address in parsed):
            # The same text for a name that doesn't exist and for one of our own network: the difference is nobody's business.
            raise FetchFailed(
                f"`{target.host}` can't be fetched: it has no address on the public internet. Check the spelling; hosts of "
                "private networks are out of reach."
            )
        return [str(address) for address in parsed[:MAX_ADDRESSES_TRIED]]

    @contextlib.asynccontextmanager
    async def _answer(
        self, request: Request, addresses: Sequence[str], secrets: HeaderSecrets
    ) -> AsyncIterator[httpx2.Response]:
        with _told(request.target, self._limits):
            async with httpx2.AsyncHTTPTransport(
                verify=self.tls, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0)
            ) as transport:
                response = await self._send(transport, request, addresses, secrets)
                try:
                    yield response
                finally:
                    await response.aclose()

    async def _send(
        self, transport: httpx2.AsyncHTTPTransport, request: Request, addresses: Sequence[str], secrets: HeaderSecrets
    ) -> httpx2.Response:
        """To the first address that takes the connection; once it is there, nothing is sent a second time."""
        for left in range(len(addresses) - 1, -1, -1):
            try:
                return await transport.handle_async_request(
                    self._pinned(
                        request,
                        addresses[-1 - left],
                        secrets,
                        connect_seconds=self._limits.connect_seconds / (left + 1),
                    )
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not left:
                    raise
        raise AssertionError("there is at least one address")

    def _pinned(
        self, request: Request, address: str, secrets: HeaderSecrets, *, connect_seconds: float
    ) -> httpx2.Request:
        """The request for one address: the connection goes there and nowhere else."""
        target = request.target
        silence = self._limits.silence_seconds
        headers = {
            "user-agent": USER_AGENT,
            "accept": "text/html,application/xhtml+xml,text/markdown,application/json;q=0.9,*/*;q=0.8",
            **secrets.filled(request.headers),
            "accept-encoding": "gzip, deflate",
            "host": target.host_header,
            "connection": "close",
        }
        return httpx2.Request(
            request.method,
            target.url.copy_with(host=address),
            headers=headers,
            content=request.body,
            extensions={
                "sni_hostname": target.host,
                "timeout": {"connect": connect_seconds, "read": silence, "write": silence, "pool": connect_seconds},
            },
        )

    async def _read(self, target: Target, response: httpx2.Response) -> Page:
        limit = self._limits.body_bytes
        body = bytearray()
        is_cut = False
        async with aclosing(response.aiter_bytes()) as pieces:
            async for piece in pieces:
                _check_codings(target, response)
                body += piece[: limit - len(body) + 1]
                if is_cut := len(body) > limit:
                    break
        return Page(
            target=target,
            status=response.status_code,
            headers=response.headers,
            body=bytes(body[:limit]),
            is_cut=is_cut,
        )


def _without_secrets(page: Page, secrets: HeaderSecrets) -> Page:
    longest = secrets.longest_form_bytes
    if not longest:
        return page
    body = page.body[:-longest] if page.is_cut else page.body
    headers = [(name, secrets.hidden_text(value)) for name, value in page.headers.multi_items()]
    return msgspec.structs.replace(page, headers=httpx2.Headers(headers), body=secrets.hidden(body))


def _check_codings(target: Target, response: httpx2.Response) -> None:
    """Once there is a body: what can't be decoded would be taken for text."""
    codings = {coding.strip() for coding in response.headers.get("content-encoding", "").lower().split(",")}
    if unasked := codings - _CODINGS:
        raise FetchFailed(
            f"`{target.host}` compressed its answer in a way that was not asked for: {min(unasked)[:40]}."
        )


@contextlib.contextmanager
def _told(target: Target, limits: Limits) -> Iterator[None]:
    """Failures of the transport, told without what the system says about them: that names addresses."""
    try:
        yield
    except httpx2.TransportError as error:
        raise FetchFailed(_explained(error, target.host, limits)) from None
    except httpx2.DecodingError:
        raise FetchFailed(f"The compressed answer of `{target.host}` is damaged.") from None


def _explained(error: httpx2.TransportError, host: str, limits: Limits) -> str:
    match error:
        case httpx2.ConnectTimeout():
            return f"`{host}` did not accept a connection within {limits.connect_seconds:g} seconds."
        case httpx2.ConnectError():
            return _refused(error, host)
        case httpx2.ReadTimeout() | httpx2.WriteTimeout():
            return f"`{host}` was silent for {limits.silence_seconds:g} seconds in the middle of the exchange."
        case httpx2.RemoteProtocolError():
            return f"The answer of `{host}` ended early or is not valid HTTP."
        case httpx2.LocalProtocolError():
            return "The request can't be sent: one of its headers is not valid."
        case _:
            return f"The connection to `{host}` was lost."


def _refused(error: BaseException, host: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"The certificate of `{host}` is not valid: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"No secure connection to `{host}`: the TLS handshake failed."
        cause = cause.__cause__ or cause.__context__
    return f"`{host}` does not accept connections on that port, or can't be reached."
