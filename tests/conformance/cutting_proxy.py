"""A TCP proxy on loopback that cuts connections where a test wants: after so many bytes, with a FIN or with an RST."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Self

from infra.network import LOOPBACK


class CuttingProxy:
    """`cuts` yields, per connection, after how many bytes from the server it is cut; when it is used up nothing is cut."""

    def __init__(self, host: str, port: int, cuts: Iterator[int]) -> None:
        self._target = (host, port)
        self._cuts = cuts
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.cut = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, LOOPBACK, 0)
        self.origin = f"http://{LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        left = next(self._cuts, None)
        upstream, server = await asyncio.open_connection(*self._target)
        asking = asyncio.create_task(self._forward(reader, server))
        try:
            while piece := await upstream.read(4_096):
                if left is not None and len(piece) >= left:
                    writer.write(piece[:left])
                    await writer.drain()
                    self.cut += 1
                    if self.cut % 2:
                        connection: socket.socket = writer.get_extra_info("socket")
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                if left is not None:
                    left -= len(piece)
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            asking.cancel()
            for side in (writer, server):
                side.close()
                with contextlib.suppress(OSError):
                    await side.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4_096):
                writer.write(piece)
                await writer.drain()
