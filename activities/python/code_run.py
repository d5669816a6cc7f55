"""The parent's side of `python_child`: one process group per call, killed whole when the call ends, however it ends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from infra.tool_processes import tool_process

CHILD: Final = Path(__file__).with_name("python_child.py")
CODE_SECONDS: Final = 20.0
"""Of running; waiting for files does not count."""
WALL_SECONDS: Final = 60.0
"""Of everything: starting, files, output, and the end of what the other limits did not end."""
MEMORY_BYTES: Final = 64 * 1024 * 1024
MAX_RECURSION: Final = 200
MAX_HOST_CALLS: Final = 500
MAX_SLEEP_SECONDS: Final = 5.0
MAX_RUNS: Final = 4
"""At the same time in one worker: each may take a core."""
_FRAME_MAX_BYTES: Final = 32 * 1024 * 1024
"""A file at its limit, in base64 and JSON."""

Stream = Literal["stdout", "stderr"]
_STREAMS: Final[dict[bytes, Stream]] = {b"o": "stdout", b"e": "stderr"}


class CodeFailed(Exception):
    """The sandbox came to an end without a result"""


class CodeTookTooLong(CodeFailed):
    """The sandbox was killed because it did not end in time"""


class HostCall(Struct, frozen=True, kw_only=True):
    """A call of one of our functions. `content` is base64."""

    name: Literal["read_file", "write_file", "list_files"]
    path: str
    content: bytes = b""
    recursive: bool = False


class HostAnswer(Struct, frozen=True, kw_only=True):
    """`error` is the Python exception that the code sees, with its `message`."""

    value: object = None
    error: str | None = None
    message: str | None = None


class CodeReport(Struct, frozen=True, kw_only=True):
    """`result` is the value of the last line; `result_text` the beginning of its JSON, when that is too long."""

    result: object
    result_text: str | None
    error: str | None
    timed_out: bool
    is_output_cut: bool


class CodeRunner:
    def __init__(
        self, *, child: Path = CHILD, seconds: float = CODE_SECONDS, wall_seconds: float = WALL_SECONDS
    ) -> None:
        self._child = child
        self._seconds = seconds
        self._wall_seconds = wall_seconds
        self._slots = asyncio.Semaphore(MAX_RUNS)

    async def run(
        self,
        code: str,
        inputs: dict[str, object],
        on_output: Callable[[Stream, str], None],
        on_call: Callable[[HostCall], Awaitable[HostAnswer]],
    ) -> CodeReport:
        """Raises `CodeFailed`."""
        async with self._slots:
            try:
                async with tool_process(self._child) as child, asyncio.timeout(self._wall_seconds):
                    return await self._talk(child, code, inputs, on_output, on_call)
            except TimeoutError:
                raise CodeTookTooLong from None
            except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
                raise CodeFailed from None

    async def _talk(
        self,
        child: asyncio.subprocess.Process,
        code: str,
        inputs: dict[str, object],
        on_output: Callable[[Stream, str], None],
        on_call: Callable[[HostCall], Awaitable[HostAnswer]],
    ) -> CodeReport:
        assert child.stdin is not None
        assert child.stdout is not None
        limits = {
            "max_feed_duration_secs": self._seconds,
            "max_memory": MEMORY_BYTES,
            "max_recursion_depth": MAX_RECURSION,
            "max_suspensions": MAX_HOST_CALLS,
            "max_total_sleep_secs": MAX_SLEEP_SECONDS,
        }
        request = {"code": code, "inputs": inputs, "limits": limits, "cpu_seconds": int(self._seconds)}
        await _send(child.stdin, request)
        while True:
            kind, payload = await _frame(child.stdout)
            if kind in _STREAMS:
                on_output(_STREAMS[kind], payload.decode("utf-8", "replace"))
            elif kind == b"c":
                await _send(child.stdin, await on_call(msgspec.json.decode(payload, type=HostCall)))
            elif kind == b"r":
                return msgspec.json.decode(payload, type=CodeReport)
            else:
                raise CodeFailed


async def _send(stdin: asyncio.StreamWriter, value: object) -> None:
    payload = msgspec.json.encode(value)
    stdin.write(struct.pack("!I", len(payload)) + payload)
    await stdin.drain()


async def _frame(stdout: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind, size = struct.unpack("!cI", await stdout.readexactly(5))
    if size > _FRAME_MAX_BYTES:
        raise CodeFailed
    return kind, await stdout.readexactly(size)
