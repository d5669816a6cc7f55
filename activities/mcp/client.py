"""One conversation with a server: connect, ask, leave. Nothing is kept between two calls but what is in PostgreSQL.

Decisions the code can't show:
- The stateless revision (2026-07-28) needs one request per call. With an older server each call begins with its handshake: a
  session held open across calls would tie a turn to one worker.
- Requests are sent through the library's session, results are read by `activities.mcp.answers`. The library's own `call_tool`
  lists the server's tools anew before each result and checks the result against a schema that a stranger wrote.
- An elicitation of an older server is declined: it would have to be answered while the connection stands, and a person may take
  days.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import httpx2
from msgspec import Struct

from activities.mcp.answers import discovered_tools
from activities.mcp.cleaning import clean, one_line, without_secrets
from activities.mcp.guarded_http import CONNECT_SECONDS, GuardedTransport
from activities.mcp.tokens import access_token
from activities.web.fetch import Fetcher
from domain.capabilities import ToolError
from domain.config import NetworkAccessList
from domain.mcp import (
    Discovery,
    McpDirectory,
    McpProblem,
    ProtocolMode,
    ServerCredentials,
    ServerTarget,
    TransportType,
)
from domain.secret import Secret

MODERN: Final = "2026-07-28"
IDEMPOTENCY_KEY: Final = "com.everruns/idempotency-key"
DISCOVERY_TIMEOUT_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 300.0
MAX_PAGES: Final = 20
MAX_ERROR_CHARACTERS: Final = 2_000
MALFORMED: Final = "Its answer does not follow the protocol."

Progress = Callable[[str], Awaitable[None]]


class Call(Struct, frozen=True, kw_only=True):
    """`answers` and `request_state` continue a call that the server had interrupted to ask for something."""

    tool: str
    arguments: dict[str, object]
    idempotency_key: str
    is_modern: bool | None = None
    """What is known of the server's revision."""
    has_header_parameters: bool = False
    answers: dict[str, object] | None = None
    request_state: str | None = None


class Answer(Struct, frozen=True, kw_only=True):
    """`result` as the server sent it. `declined` are the questions it asked on the open connection."""

    result: Mapping[str, object]
    declined: list[str]
    secrets: list[str]

    def __repr__(self) -> str:
        return "Answer(...)"


class McpClient:
    def __init__(self, directory: McpDirectory, fetcher: Fetcher, *, allow_stdio: bool = False) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._allow_stdio = allow_stdio

    async def discover(self, target: ServerTarget, access: NetworkAccessList) -> Discovery:
        """Raises `McpProblem`."""
        try:
            async with asyncio.timeout(DISCOVERY_TIMEOUT_SECONDS):
                return await self._authorized(target, access, lambda token: self._list(target, access, token))
        except TimeoutError:
            raise McpProblem(f"It did not list its tools within {DISCOVERY_TIMEOUT_SECONDS:g} seconds.") from None
        except ToolError as error:
            raise McpProblem(str(error)) from None

    async def call(self, target: ServerTarget, call: Call, access: NetworkAccessList, progress: Progress) -> Answer:
        """Raises `ToolError`, and `McpProblem` before anything was sent."""
        return await self._authorized(target, access, lambda token: self._call(target, call, access, progress, token))

    async def _authorized(
        self, target: ServerTarget, access: NetworkAccessList, run: Callable[[Secret | None], Awaitable[Any]]
    ) -> Any:
        """With a token where one is needed; once more with a new one when the server does not take it any longer."""
        token = await access_token(self._directory, self._fetcher, target, access)
        try:
            return await run(token)
        except Unauthorized as error:
            if token is None:
                raise
            renewed = await access_token(self._directory, self._fetcher, target, access, spent=token)
            if renewed is None:
                raise error from None
            return await run(renewed)

    async def _list(self, target: ServerTarget, access: NetworkAccessList, token: Secret | None) -> Discovery:
        from mcp_types import ListToolsRequest, PaginatedRequestParams

        async with self._connected(target, access, token) as connection:
            listed: list[object] = []
            cursor: str | None = None
            for _ in range(MAX_PAGES):
                page = await connection.ask(ListToolsRequest(params=PaginatedRequestParams(cursor=cursor)))
                tools, following = page.get("tools"), page.get("nextCursor")
                listed += tools if isinstance(tools, list) else []
                if not isinstance(following, str) or following == cursor:
                    break
                cursor = following
            is_modern = connection.client.protocol_version == MODERN
        found, left_out = discovered_tools(listed)
        return Discovery(tools=found, is_modern=is_modern, left_out=left_out)

    async def _call(
        self, target: ServerTarget, call: Call, access: NetworkAccessList, progress: Progress, token: Secret | None
    ) -> Answer:
        from mcp_types import CallToolRequest, CallToolRequestParams

        async def on_progress(done: float, total: float | None, message: str | None) -> None:
            share = f"{done:g}" if total is None else f"{done:g} of {total:g}"
            await progress(one_line(without_secrets(message or share, connection.secrets)))

        async with self._connected(target, access, token, call.is_modern) as connection:
            if call.has_header_parameters and connection.client.protocol_version == MODERN:
                # Reads from the list which arguments travel as headers.
                await connection.client.session.list_tools()
            request = CallToolRequest(
                params=CallToolRequestParams.model_validate(
                    {
                        "name": call.tool,
                        "arguments": call.arguments,
                        "inputResponses": call.answers,
                        "requestState": call.request_state,
                        "_meta": {IDEMPOTENCY_KEY: call.idempotency_key},
                    }
                )
            )
            result = await connection.ask(request, on_progress)
            return Answer(result=result, declined=connection.declined, secrets=connection.secrets)

    @contextlib.asynccontextmanager
    async def _connected(
        self, target: ServerTarget, access: NetworkAccessList, token: Secret | None, is_modern: bool | None = None
    ) -> AsyncIterator[_Connection]:
        await asyncio.to_thread(_load)
        from mcp.client import Client
        from mcp_types import ElicitResult

        declined: list[str] = []

        async def decline(context: object, params: Any) -> ElicitResult:
            declined.append(one_line(str(getattr(params, "message", ""))))
            return ElicitResult(action="decline")

        credentials = await self._directory.credentials(target)
        secrets = [*credentials.secrets(), *([] if token is None else [token.reveal()])]
        async with contextlib.AsyncExitStack() as stack:
            with _told(target, secrets) as told:
                if target.transport is TransportType.STDIO:
                    channel = self._stdio(target, credentials)
                else:
                    told.transport = GuardedTransport(self._fetcher, access)
                    http = await stack.enter_async_context(_http_client(told.transport, credentials, token))
                    channel = _http_channel(target, http)
                client = Client(
                    channel, mode=_mode(target, is_modern), cache=None, elicitation_callback=decline, client_info=_us()
                )
                async with client:
                    yield _Connection(client, declined, secrets)

    def _stdio(self, target: ServerTarget, credentials: ServerCredentials) -> Any:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        if not self._allow_stdio:
            raise ToolError("Servers of type `stdio` are not allowed on this installation.")
        environment = {name: value.reveal() for name, value in credentials.env.items()}
        parameters = StdioServerParameters(command=target.command or "", args=list(target.args), env=environment)
        return _quiet(lambda errors: stdio_client(parameters, errlog=errors))


class Unauthorized(ToolError):
    """The server wants other credentials"""


class _Connection:
    """`client` is the library's; its type would have to be imported here."""

    def __init__(self, client: Any, declined: list[str], secrets: list[str]) -> None:
        self.client = client
        self.declined = declined
        self.secrets = secrets

    async def ask(self, request: Any, progress: Any = None) -> Mapping[str, object]:
        from pydantic import TypeAdapter

        answer: TypeAdapter[Any] = TypeAdapter(dict[str, Any])
        return await self.client.session.send_request(request, answer, progress_callback=progress)


def _load() -> None:
    import mcp.client
    import mcp.client.stdio
    import mcp.client.streamable_http  # noqa: F401

    # Its lines quote what servers send, headers and results among it. What matters is told by the error of the call.
    logging.getLogger("mcp").setLevel(logging.CRITICAL)


async def preload() -> None:
    """Import the library ahead of the first call."""
    await asyncio.to_thread(_load)


def _us() -> Any:
    from mcp_types import Implementation

    return Implementation(name="everruns", version="1")


def _mode(target: ServerTarget, is_modern: bool | None) -> str:
    match target.protocol_mode:
        case ProtocolMode.LEGACY | ProtocolMode.STABLE:
            return "legacy"
        case ProtocolMode.RC:
            return MODERN
        case _ if target.transport is TransportType.STDIO or is_modern is None:
            return "auto"
    return MODERN if is_modern else "legacy"


def _http_client(
    transport: GuardedTransport, credentials: ServerCredentials, token: Secret | None
) -> httpx2.AsyncClient:
    headers = {name: value.reveal() for name, value in credentials.headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token.reveal()}"
    timeout = httpx2.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS, write=SILENCE_SECONDS)
    return httpx2.AsyncClient(transport=transport, headers=headers, timeout=timeout, trust_env=False)


def _http_channel(target: ServerTarget, http: httpx2.AsyncClient) -> Any:
    from mcp.client.streamable_http import streamable_http_client

    return streamable_http_client(target.url or "", http_client=http)


@contextlib.asynccontextmanager
async def _quiet(channel: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """A program's standard error is not for our logs: it may hold what it was given."""
    with open(os.devnull, "w") as errors:  # noqa: ASYNC230  # a device, not a file
        async with channel(errors) as streams:
            yield streams


class _Told:
    """What has to be known to tell why a conversation failed."""

    transport: GuardedTransport | None = None


@contextlib.contextmanager
def _told(target: ServerTarget, secrets: list[str]) -> Any:
    """Failures in words of ours; those of the server are quoted, cleaned and without what it must not repeat."""
    told = _Told()
    try:
        yield told
    except Exception as error:
        transport = told.transport
        if transport is not None and transport.failure is not None:
            raise ToolError(f"MCP server `{target.name}`: {transport.failure}") from None
        if transport is not None and transport.last_status in (401, 403):
            raise Unauthorized(_unauthorized(target)) from None
        raise ToolError(f"MCP server `{target.name}`: {_explained(_leaf(error), secrets)}") from None


def _unauthorized(target: ServerTarget) -> str:
    if target.server_id is None:
        return f"MCP server `{target.name}` does not accept its credentials. Somebody has to correct its `headers`."
    return (
        f"MCP server `{target.name}` does not accept its credentials. Somebody has to set them again, or to connect: "
        f"POST /v1/mcp-servers/{target.server_id}/oauth/authorize."
    )


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _explained(error: BaseException, secrets: list[str]) -> str:
    import mcp_types
    from mcp.shared.exceptions import MCPError
    from pydantic import ValidationError

    match error:
        case ToolError():
            return str(error)
        case MCPError(code=mcp_types.PARSE_ERROR):
            return MALFORMED
        case MCPError():
            return (
                clean(without_secrets(error.message, secrets), MAX_ERROR_CHARACTERS) or "It refused without a reason."
            )
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return "It does not accept connections, or can't be reached."
        case httpx2.TimeoutException():
            return "It was silent for too long."
        case httpx2.HTTPError():
            return "The connection was lost, or its answer is not valid HTTP."
        case ValidationError():
            return MALFORMED
        case FileNotFoundError() | PermissionError():
            return "Its program can't be started."
        case _:
            return f"The exchange failed ({type(error).__name__})."
