"""The parent's side of `bash_child`: one process per script, killed when it overstays or nobody waits any more."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from domain.workspace import ROOT
from infra.tool_processes import tool_process

CHILD: Final = Path(__file__).with_name("bash_child.py")
KILL_MARGIN_SECONDS: Final = 5.0
"""Between a script's own time limit, at which what it has changed is kept, and the end of its process."""
SEEDING_SECONDS: Final = 30.0
MAX_RUNS: Final = 4
"""At the same time in one worker: each may take a core, and the memory of a workspace."""
MAX_COMMANDS: Final = 1000
MAX_LOOP_ITERATIONS: Final = 10_000
MEMORY_BYTES: Final = 10_000_000
"""Of a script's variables."""
CHANGED_MAX_BYTES: Final = 32 * 1024 * 1024
"""What one script may write: the worker holds all of it to store it at once."""
_FRAME_MAX_BYTES: Final = 64 * 1024 * 1024

Stream = Literal["stdout", "stderr"]
_STREAMS: Final[dict[bytes, Stream]] = {b"o": "stdout", b"e": "stderr"}


class ShellFailed(Exception):
    """The shell came to an end without a result"""


class ShellTookTooLong(ShellFailed):
    """The shell was killed because it did not end in time"""


class Script(Struct, frozen=True, kw_only=True):
    """`working_dir` and `directories` are paths as the shell sees them."""

    commands: str
    working_dir: str
    timeout_seconds: float
    directories: Sequence[str] = ()


class Report(Struct, frozen=True, kw_only=True):
    """Paths are those of the shell. `unseen` is what it could not hold, `others` are links and the like."""

    exit_code: int
    error: str | None
    is_output_cut: bool
    written: list[str]
    deleted: list[str]
    made_directories: list[str]
    removed_directories: list[str]
    others: list[str]
    unseen: list[str]
    is_too_much: bool
    is_root_replaced: bool


Files = AsyncIterator[tuple[str, bytes]]


class ScriptRunner:
    def __init__(self, *, child: Path = CHILD, kill_margin_seconds: float = KILL_MARGIN_SECONDS) -> None:
        self._child = child
        self._kill_margin_seconds = kill_margin_seconds
        self._slots = asyncio.Semaphore(MAX_RUNS)

    async def run(
        self, script: Script, files: Files, on_output: Callable[[Stream, str], None]
    ) -> tuple[Report, dict[str, bytes]]:
        """The report and the contents of `written`. Raises `ShellFailed`."""
        async with self._slots:
            try:
                async with tool_process(self._child) as child:
                    return await self._talk(child, script, files, on_output)
            except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
                raise ShellFailed from None

    async def _talk(
        self,
        child: asyncio.subprocess.Process,
        script: Script,
        files: Files,
        on_output: Callable[[Stream, str], None],
    ) -> tuple[Report, dict[str, bytes]]:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            async with asyncio.timeout(SEEDING_SECONDS):
                await _send(child.stdin, script, files)
            async with asyncio.timeout(script.timeout_seconds + self._kill_margin_seconds):
                return await _receive(child.stdout, on_output)
        except TimeoutError:
            raise ShellTookTooLong from None


async def _send(stdin: asyncio.StreamWriter, script: Script, files: Files) -> None:
    request = msgspec.json.encode(
        {
            "commands": script.commands,
            "root": ROOT,
            "directories": script.directories,
            "changed_max_bytes": CHANGED_MAX_BYTES,
            "options": {
                "username": "agent",
                "hostname": "sandbox",
                "cwd": script.working_dir,
                "env": {"HOME": ROOT, "LANG": "C.UTF-8"},
                "max_commands": MAX_COMMANDS,
                "max_loop_iterations": MAX_LOOP_ITERATIONS,
                "max_memory": MEMORY_BYTES,
                "timeout_seconds": script.timeout_seconds,
            },
        }
    )
    # It stays open: the child takes its end for ours.
    stdin.write(struct.pack("!I", len(request)) + request)
    async for path, content in files:
        name = path.encode()
        stdin.write(struct.pack("!II", len(name), len(content)) + name)
        stdin.write(content)
        await stdin.drain()
    stdin.write(struct.pack("!II", 0, 0))
    await stdin.drain()


async def _receive(
    stdout: asyncio.StreamReader, on_output: Callable[[Stream, str], None]
) -> tuple[Report, dict[str, bytes]]:
    while True:
        kind, payload = await _frame(stdout)
        if kind in _STREAMS:
            on_output(_STREAMS[kind], payload.decode("utf-8", "replace"))
            continue
        if kind != b"r":
            raise ShellFailed
        report = msgspec.json.decode(payload, type=Report)
        contents = {path: (await _frame(stdout))[1] for path in report.written}
        return report, contents


async def _frame(stdout: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind, size = struct.unpack("!cI", await stdout.readexactly(5))
    if size > _FRAME_MAX_BYTES:
        raise ShellFailed
    return kind, await stdout.readexactly(size)
