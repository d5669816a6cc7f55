"""The HTTP that a server is spoken to with: every request goes through the guards that `web_fetch` has.

Each hop's host is checked against the turn's network access list and looked up once; the connection goes to an address that was
checked then. Answers are bounded, compressed ones are refused. What failed is remembered, because the client library turns
exceptions inside of a stream into its own, and tries again.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Final

import httpx2

from activities.web.fetch import Fetcher
from activities.web.network_rules import check_access
from activities.web.targets import Target, target_of
from domain.capabilities import ToolError
from domain.config import NetworkAccessList

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
"""Of one answer, a stream of events included."""
MAX_REQUESTS: Final = 60
"""Of one conversation with a server: a list of tools in pages, an authorization with its discovery."""
CONNECT_SECONDS: Final = 5.0
USER_AGENT: Final = "Everruns-MCP/1.0"


class GuardedTransport(httpx2.AsyncBaseTransport):
    def __init__(self, fetcher: Fetcher, access: NetworkAccessList, tls: ssl.SSLContext | None = None) -> None:
        self._fetcher = fetcher
        self._access = access
        self._addresses: dict[str, list[str]] = {}
        self._requests = 0
        self._inner = httpx2.AsyncHTTPTransport(verify=tls or fetcher.tls, trust_env=False)
        self.failure: ToolError | None = None
        self.last_status: int | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.failure is not None:
            raise self.failure
        try:
            return await self._guarded(request)
        except ToolError as error:
            self.failure = error
            raise

    async def _guarded(self, request: httpx2.Request) -> httpx2.Response:
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            raise ToolError("The server kept asking for more requests.")
        target = target_of(request.url)
        check_access(target, self._access)
        addresses = self._addresses.get(target.host)
        if addresses is None:
            addresses = self._addresses[target.host] = await self._fetcher.checked_addresses(target)
        response = await self._send(request, target, addresses)
        self.last_status = response.status_code
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            await response.aclose()
            raise ToolError("The server compressed its answer although it was asked not to.")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_Bounded(response.stream, self),
            extensions=response.extensions,
        )

    async def _send(self, request: httpx2.Request, target: Target, addresses: list[str]) -> httpx2.Response:
        """To the first address that takes the connection; once it is there, nothing is sent a second time."""
        for left in range(len(addresses) - 1, -1, -1):
            try:
                return await self._inner.handle_async_request(self._pinned(request, target, addresses[-1 - left]))
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not left:
                    raise
        raise AssertionError("there is at least one address")

    @staticmethod
    def _pinned(request: httpx2.Request, target: Target, address: str) -> httpx2.Request:
        headers = httpx2.Headers(request.headers)
        headers["host"] = target.host_header
        headers["user-agent"] = USER_AGENT
        headers["accept-encoding"] = "identity"
        return httpx2.Request(
            request.method,
            target.url.copy_with(host=address),
            headers=headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": target.host},
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, transport: GuardedTransport) -> None:
        self._inner = inner
        self._transport = transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ANSWER_BYTES
        async for piece in self._inner:
            left -= len(piece)
            if left < 0:
                error = ToolError(f"The server's answer is longer than {MAX_ANSWER_BYTES // (1024 * 1024)} MiB.")
                self._transport.failure = error
                raise error
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
