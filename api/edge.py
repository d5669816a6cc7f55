"""Around every request, unknown routes and errors included: request id, access log, and the unprefixed alias of the API.

Litestar's own middleware starts behind its router, too late for a 404; so this wraps the application's outermost handler.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Final
from uuid import uuid4

import structlog
from litestar.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID: Final = "X-Request-Id"
_REQUEST_ID_KEY: Final = REQUEST_ID.lower().encode()
READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_SANE_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")

log = structlog.get_logger("api.access")


class Edge:
    def __init__(self, app: ASGIApp, api_prefix: str) -> None:
        self._app = app
        self._prefix = api_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._prefix and (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
            # Some clients take the bare host for the base URL: `/v1` is the same API, at its real address from here on.
            scope["path"] = self._prefix + scope["path"]
            scope["raw_path"] = self._prefix.encode() + scope["raw_path"]
        request_id = _request_id(scope)
        started = time.perf_counter()
        status = 0
        streams = False

        def line(event: str) -> None:
            # The template, not the path: ids in it would make every line unique, and the session's is bound by the route.
            route = scope.get("path_template") or "unknown"
            elapsed_ms = round((time.perf_counter() - started) * 1000, 1)
            # Reads that succeed are what clients poll with: at INFO they would bury the lines about turns.
            level = logging.DEBUG if event == "request" and scope["method"] in READS and status < 400 else logging.INFO
            log.log(level, event, method=scope["method"], route=route, status=status, ms=elapsed_ms)

        async def send_with_request_id(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message["headers"])
                headers.append((_REQUEST_ID_KEY, request_id))
                message["headers"] = headers
                streams = (b"content-type", b"text/event-stream") in [(key, value[:17]) for key, value in headers]
                if streams:
                    line("stream opened")
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id.decode())
        try:
            await self._app(scope, receive, send_with_request_id)
        finally:
            line("stream closed" if streams else "request")


def _request_id(scope: Scope) -> bytes:
    for key, value in scope["headers"]:
        if key == _REQUEST_ID_KEY and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return uuid4().hex.encode()
