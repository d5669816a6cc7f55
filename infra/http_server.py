"""uvicorn, stopped in the right order.

Litestar's shutdown hooks run only after uvicorn has waited for open connections, and an open event stream never ends by
itself. So the signal handler sets a drain event first: every stream says `disconnecting` and ends, and then there is
nothing left to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Final

import uvicorn

GRACE_SECONDS: Final = 5
BACKLOG: Final = 2048
KEEP_ALIVE_SECONDS: Final = 75
"""Longer than any usual client or load balancer keeps an idle connection (httpx and Node 5 s, proxies 60 s). With uvicorn's
default, which is also 5 s, a request may be sent just when the server hangs up, and be lost without an answer."""


class HttpServer(uvicorn.Server):
    """Serves one application. `drain` is set when the server begins to stop."""

    def __init__(self, app: object, drain: asyncio.Event) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            backlog=BACKLOG,
            server_header=False,
            lifespan="on",
        )
        super().__init__(config)
        self._drain = drain
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the command that runs us: it decides what stops in which order."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._drain.set()
        self.should_exit = True

    async def serve_on(self, listener: socket.socket) -> None:
        await self.serve(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError` when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # At once: with SO_REUSEADDR a second process could bind too, as long as nobody listens.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
