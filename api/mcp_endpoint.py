"""`/mcp`: our MCP server over streamable HTTP, for clients of the current revision and of those before it.

Stateless: every request stands for itself, so that it does not matter which process it reaches. The protocol is the `mcp`
package's; it takes a second to import, which the first request does, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, cast
from urllib.parse import urlsplit

import msgspec
from litestar import Litestar, asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from activities.capabilities.tool_schema import struct_schema
from api.caller import check_caller
from api.mcp_tools import MAX_RESULT_BYTES, TOOLS, McpCall, McpTool, ToolFailure
from api.services import Services

PATH: Final = "/mcp"
INSTRUCTIONS: Final = """\
Everruns runs durable AI agents. Find agents with `query` on `/v1/agents`, give one a task with `agent_run`, and go on in the \
same session with `session_send_message`. When the status is `waiting`, the session needs a person or a client; when it is \
`running`, ask again later with `session_get_status`."""

LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class SessionManager(Protocol):
    """What we use of the package's."""

    @property
    def handle_request(self) -> object: ...

    def run(self) -> AbstractAsyncContextManager[None]: ...


class McpEndpoint:
    """Serves `/mcp`. `close` ends what the first request began."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._handler: asyncio.Future[Handler] | None = None
        self._running: asyncio.Task[None] | None = None

    def route(self) -> ASGIRouteHandler:
        @asgi(PATH, guards=[check_caller], copy_scope=True)
        async def mcp(scope: Scope, receive: Receive, send: Send) -> None:
            if not self._origin_allowed(scope):
                await _refuse(send)
                return
            handler = await self._ready(scope["litestar_app"])
            await handler(scope, receive, send)

        return mcp

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    def _origin_allowed(self, scope: Scope) -> bool:
        """Web pages may only come from where the API lets them: a page that has had its name point here must not get in."""
        origin = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), None)
        if origin is None or origin in self._services.settings.cors_allowed_origins:
            return True
        return urlsplit(origin).hostname in LOOPBACK_HOSTS

    async def _ready(self, app: Litestar) -> Handler:
        if self._handler is None:
            self._handler = asyncio.get_running_loop().create_future()
            self._running = asyncio.create_task(self._serve(app, self._handler))
        return await asyncio.shield(self._handler)

    async def _serve(self, app: Litestar, ready: asyncio.Future[Handler]) -> None:
        """The package's own tasks live in this one: they must end in the task they began in."""
        manager = await asyncio.to_thread(_load, self._services, app)
        async with manager.run():
            ready.set_result(cast("Handler", manager.handle_request))
            await asyncio.Event().wait()


def _load(services: Services, app: Litestar) -> SessionManager:
    import mcp_types as types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel.server import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    tools = {tool.name: tool for tool in TOOLS}

    async def list_tools(
        context: ServerRequestContext[Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.description,
                    input_schema=struct_schema(tool.arguments),
                    annotations=types.ToolAnnotations(read_only_hint=tool.readonly, open_world_hint=not tool.readonly),
                )
                for tool in TOOLS
            ]
        )

    async def call_tool(
        context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        steps = 0

        async def progress(message: str) -> None:
            nonlocal steps
            steps += 1
            await context.session.report_progress(steps, None, message)

        headers = {name.lower(): value for name, value in context.request.headers.items()} if context.request else {}
        call = McpCall(services=services, app=app, headers=headers, progress=progress)
        try:
            value = await _run(tools.get(params.name), params.name, params.arguments or {}, call)
        except ToolFailure as failure:
            return types.CallToolResult(content=[types.TextContent(text=str(failure))], is_error=True)
        return types.CallToolResult(content=[types.TextContent(text=value)])

    server: Server[Any] = Server(
        "everruns",
        version=services.version,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    return StreamableHTTPSessionManager(app=server, stateless=True)


async def _run(tool: McpTool | None, name: str, arguments: dict[str, object], call: McpCall) -> str:
    """Raises `ToolFailure`."""
    if tool is None:
        raise ToolFailure(f"There is no tool `{name[:100]}`; there are {', '.join(one.name for one in TOOLS)}")
    try:
        decoded = msgspec.convert(arguments, tool.arguments)
    except msgspec.ValidationError as error:
        raise ToolFailure(f"Invalid arguments: {error}") from None
    text = msgspec.json.encode(await tool.run(call, decoded))
    if len(text) > MAX_RESULT_BYTES:
        raise ToolFailure(
            f"The result has {len(text):,} bytes, {MAX_RESULT_BYTES:,} are allowed. Ask for less: `limit`, a filter, one id."
        )
    return text.decode()


async def _refuse(send: Send) -> None:
    body = b'{"title":"Forbidden","status":403,"detail":"Pages of this origin may not use the MCP server"}'
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
