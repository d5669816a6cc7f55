"""Short-lived processes for what a tool runs: a script of ours per call, and nothing of it left when the call ends.

Such a script gets its work through stdin and answers through stdout. It leads a process group, so that whatever it has started
ends with it. It is told nothing of ours: its environment is empty, because ours holds keys. When this process is killed, nobody
is left to end a child: stdin stays open as long as we live, and a script takes its end for ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path


@contextlib.asynccontextmanager
async def tool_process(script: Path, *, options: Sequence[str] = ()) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs `script` with `options` for Python, isolated (`-I`). At the end of the block the process and its group are gone,
    however it ends; a block that needs the exit code awaits `wait()` itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        *options,
        str(script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Not `process.kill()`: it asks for the exit status first. When the child has just ended by itself, that takes the status
        # away from asyncio, which warns of an unknown child. The group may also have members when its leader has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _environment() -> dict[str, str]:
    """Fewer arenas, because scripts limit their address space. Windows can't start Python without its own variable."""
    return {"MALLOC_ARENA_MAX": "2"} | {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
