"""Child processes that can't outlive us, however we end: PostgreSQL and Temporal of `everruns dev`, a demo's worker.

The children belong to a small supervisor process (`reaper.py`, which explains how it works). It ends them and deletes
the temporary directories when this process stops, exits without a word, or is killed with SIGKILL.
"""

import asyncio
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

REAPER_SCRIPT = Path(__file__).with_name("reaper.py")

# A stop that takes longer than this is a hang: a Temporal dev server needs 1.1 s, PostgreSQL 0.1 s.
DEFAULT_GRACE_SECONDS = 5.0


class ChildStartError(Exception):
    """A child process could not be started."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """The user a child runs as, for an owner that is root."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> Self:
        return cls.of(pwd.getpwnam(name))

    @classmethod
    def numbered(cls, uid: int) -> Self:
        return cls.of(pwd.getpwuid(uid))

    @classmethod
    def of(cls, entry: pwd.struct_passwd) -> Self:
        return cls(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


class Child:
    """A running child. `exit_code` is negative for the signal that ended it, as in `subprocess`."""

    def __init__(self, children: "ChildProcesses", number: int, name: str, log_path: Path | None) -> None:
        self.name = name
        self.log_path = log_path
        self.pid = 0
        self.stopping = False
        self._children = children
        self._number = number
        self._started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def exit_code(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def stop(self) -> int:
        """Send the stop signal, after the grace SIGKILL, and wait for the end."""
        if self.exit_code is None:
            self.stopping = True
            self._children._order({"do": "stop", "id": self._number})
        return await self.wait()

    def send_signal(self, number: signal.Signals) -> None:
        self._children._order({"do": "signal", "id": self._number, "signal": int(number)})

    def log_tail(self, lines: int = 20) -> str:
        """The end of the log, for error messages."""
        if self.log_path is None:
            return ""
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        return ""


class ChildProcesses:
    """Starts children and ends them together. `on_unexpected_exit` is told about a child nobody stopped.

    The owner stops its own parts first (workers, API) and this last: by then nothing uses the servers, so they all get
    their stop signal at the same time.
    """

    def __init__(self, *, on_unexpected_exit: Callable[[Child], None] | None = None) -> None:
        self._on_unexpected_exit = on_unexpected_exit
        self._children: dict[int, Child] = {}
        self._directories: list[Path] = []
        self._last_number = 0
        self._reaper: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._stopping = False
        self._reaper = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(REAPER_SCRIPT),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C must not reach it: see reaper.py
        )
        self._listener = asyncio.create_task(self._listen(self._reaper), name="child processes")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def supervisor_pid(self) -> int:
        return self._running_reaper().pid

    async def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        user: Account | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_seconds: float = DEFAULT_GRACE_SECONDS,
        cwd: Path | None = None,
        log_path: Path | None = None,
        ends_by_itself: bool = False,
    ) -> Child:
        """Without `env` the child gets ours; without `log_path` it writes to our standard error.

        A child that `ends_by_itself` is a command, not a server: its end is not reported as unexpected.
        """
        if self._listener is None or self._listener.done():
            raise ChildStartError(f"{name} could not be started: the supervisor is not running")
        self._last_number += 1
        child = Child(self, self._last_number, name, log_path)
        child.stopping = ends_by_itself
        self._children[self._last_number] = child
        self._order(
            {
                "do": "start",
                "id": self._last_number,
                "argv": [str(argument) for argument in argv],
                "env": dict(os.environ if env is None else env),
                "cwd": None if cwd is None else str(cwd),
                "uid": None if user is None else user.uid,
                "gid": None if user is None else user.gid,
                "log_path": None if log_path is None else str(log_path),
                "stop_signal": int(stop_signal),
                "grace_seconds": grace_seconds,
            }
        )
        child.pid = await asyncio.shield(child._started)
        return child

    def temporary_directory(self, prefix: str) -> Path:
        """A private directory that is gone when we are. Its path is short: sockets in it have 107 bytes in all."""
        path = Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(4)}"
        # Registered before it exists: a SIGKILL in between leaves nothing behind.
        self._directories.append(path)
        self._order({"do": "remove", "path": str(path)})
        path.mkdir(mode=0o700)
        return path

    async def stop(self) -> None:
        """End every child and delete the temporary directories; harmless when repeated."""
        if self._reaper is None or self._listener is None:
            return
        self._stopping = True
        for child in self._children.values():
            child.stopping = True
        reaper, self._reaper = self._reaper, None
        assert reaper.stdin is not None
        with contextlib.suppress(ConnectionError):
            reaper.stdin.write(b'{"do": "finish"}\n')
            reaper.stdin.close()
        # A cancelled caller must not leave the reaper's end unawaited: it happens on its own, but so would a warning.
        await asyncio.shield(asyncio.gather(reaper.wait(), self._listener))
        # The reaper has done this unless it was killed itself.
        await asyncio.to_thread(_remove_directories, tuple(self._directories))

    async def _listen(self, reaper: asyncio.subprocess.Process) -> None:
        assert reaper.stdout is not None
        async for line in reaper.stdout:
            self._note(msgspec.json.decode(line, type=_Report))
        # Whatever has not reported its end by now never will. A dead reaper takes the children with it.
        for child in self._children.values():
            if not child._started.done():
                child._started.set_exception(
                    ChildStartError(f"{child.name} could not be started: the supervisor ended")
                )
            self._ended(child, -int(signal.SIGKILL))

    def _note(self, report: "_Report") -> None:
        child = self._children[report.id]
        if report.error is not None:
            del self._children[report.id]
            child._started.set_exception(ChildStartError(f"{child.name} could not be started: {report.error}"))
        elif report.pid is not None:
            child._started.set_result(report.pid)
        elif report.exit_code is not None:
            del self._children[report.id]
            self._ended(child, report.exit_code)

    def _ended(self, child: Child, exit_code: int) -> None:
        if child._ended.done():
            return
        child._ended.set_result(exit_code)
        if not child.stopping and self._on_unexpected_exit is not None:
            self._on_unexpected_exit(child)

    def _order(self, order: Mapping[str, object]) -> None:
        stdin = self._running_reaper().stdin
        assert stdin is not None
        stdin.write(json.dumps(order).encode() + b"\n")

    def _running_reaper(self) -> asyncio.subprocess.Process:
        if self._reaper is None:
            raise RuntimeError("ChildProcesses is not running; use it with `async with`")
        return self._reaper


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    pid: int | None = None
    error: str | None = None
    exit_code: int | None = None


def _remove_directories(directories: Sequence[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
