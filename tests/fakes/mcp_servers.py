"""MCP servers on loopback: a real one in both revisions, and hand-written ones that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Elicit, ElicitationResult, Resolve
from mcp_types import ToolAnnotations
from pydantic import BaseModel

from tests.conftest import served
from tests.fakes.server import received


class Room(BaseModel):
    nights: int


async def nights() -> Elicit[Room]:
    return Elicit("How many nights?", Room)


class Seen:
    """What reached the server."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.methods: list[str] = []
        self.keys: list[str] = []
        self.cancelled = asyncio.Event()
        self.began = asyncio.Event()


def helpful_server(seen: Seen) -> MCPServer:
    server = MCPServer("helper", log_level="CRITICAL")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    @server.tool(annotations=ToolAnnotations(idempotent_hint=True))
    async def slow(context: Context) -> str:
        """Never ends."""
        await context.report_progress(1, 2, "half way")
        seen.began.set()
        try:
            await asyncio.Event().wait()
        except BaseException:
            seen.cancelled.set()
            raise
        return "unreachable"

    @server.tool()
    def fail() -> str:
        """Always fails."""
        raise ValueError("the disk is on fire")

    @server.tool()
    async def asks(context: Context) -> str:
        """Asks on the open connection."""
        answer = await context.elicit("How many nights?", Room)
        return f"answered {answer.action}"

    @server.tool()
    async def book(hotel: str, room: Annotated[ElicitationResult[Room], Resolve(nights)]) -> str:
        """Book a room."""
        return f"{hotel}: {room.action} {room.data.nights if room.action == 'accept' else 0}"

    return server


async def _app_of(server: MCPServer, seen: Seen, *, token: str | None = None) -> Any:
    inner = server.streamable_http_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        seen.headers.append(headers)
        seen.methods.append(headers.get("mcp-method", scope["method"]))
        if token is not None and headers.get("authorization") != f"Bearer {token}":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def noted() -> Any:
            message = await receive()
            with contextlib.suppress(ValueError, AttributeError):
                body = json.loads(message.get("body") or b"{}")
                seen.methods.append(body.get("method", ""))
                key = body.get("params", {}).get("_meta", {}).get("com.everruns/idempotency-key")
                if key is not None:
                    seen.keys.append(key)
            return message

        await inner(scope, noted, send)

    return app


@contextlib.asynccontextmanager
async def helper(seen: Seen, *, token: str | None = None) -> AsyncIterator[str]:
    """URL of a server that speaks every revision."""
    async with served(await _app_of(helpful_server(seen), seen, token=token), lifespan="on", ends_at_once=True) as url:
        yield f"{url}/mcp"


Reply = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, str], bytes]]]


@contextlib.asynccontextmanager
async def hostile(reply: Reply) -> AsyncIterator[str]:
    """URL of a server that answers each JSON-RPC message (an empty one for a request without) with what `reply` says."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = await received(receive)
        status, headers, content = await reply(
            {"path": scope["path"], **(json.loads(body) if body[:1] == b"{" else {})}
        )
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})

    async with served(app, lifespan="off", ends_at_once=True) as url:  # type: ignore[arg-type]  # any ASGI app
        yield f"{url}/mcp"


def json_rpc(request: dict[str, Any], result: object) -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"jsonrpc": "2.0", "id": request.get("id"), "result": result}).encode()
    return 200, {"content-type": "application/json"}, body


def discovered(request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """The answer to `server/discover` of the stateless revision."""
    return json_rpc(
        request,
        {
            "resultType": "complete",
            "supportedVersions": ["2026-07-28"],
            "capabilities": {"tools": {}},
            "ttlMs": 0,
            "cacheScope": "private",
        },
    )


def listed(request: dict[str, Any], *tools: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return json_rpc(request, {"resultType": "complete", "tools": list(tools), "ttlMs": 0, "cacheScope": "private"})
