"""`everruns` commands as processes of their own, what they print, and whether anything of them is left.

Unlike `tests.stack`, whose processes have a supervisor: here the command is on its own, as at a terminal, and how it ends is the
question. Linux only, because it looks into /proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Self

import msgspec

from cli.run import DevAddresses

EVERRUNS: Final = Path(__file__).parents[1] / ".venv" / "bin" / "everruns"

START_SECONDS: Final = 60.0
END_SECONDS: Final = 30.0
"""Deadlines of a busy machine; both take about two seconds."""

SETTINGS_FROM_OUTSIDE: Final = (
    "DATABASE_",
    "DEFAULT_",
    "TEMPORAL_",
    "DEPLOYMENT_",
    "DEV_MODE",
    "HTTP_ADDR",
    "ADDR",
    "LOG_",
    "SECRETS_",
)


async def eventually(condition: Callable[[], object], *, deadline_seconds: float, what: str) -> float:
    """How long it took; the condition is about other processes, which send no notice."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > deadline_seconds:
            raise AssertionError(f"not within {deadline_seconds} s: {what}")
        await asyncio.sleep(0.01)
    return time.monotonic() - started


def is_alive(pid: int) -> bool:
    try:
        # A zombie has ended; nobody has asked for its exit code yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= {int(child)} | descendants(int(child))
    return found


def with_in_environment(text: str) -> set[int]:
    """Processes that were started with this text in their environment, whoever their parent is by now."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "environ").read_bytes() and is_alive(int(entry.name)):
                    found.add(int(entry.name))
    return found


class Command:
    """`async with Command("dev", …) as dev`. It has a temporary directory of its own, which names everything it starts."""

    def __init__(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        self._arguments = arguments
        self._given = environment or {}
        self._known: set[int] = set()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            # Short, and open to the account PostgreSQL runs as: pytest's own directories are neither.
            self.tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ev-", ignore_cleanup_errors=True)))
            self.tmp.chmod(0o755)
            self._logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ev-logs-")))
            kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_FROM_OUTSIDE)}
            with (self._logs / "out").open("wb") as out, (self._logs / "err").open("wb") as err:
                self._process = await asyncio.create_subprocess_exec(
                    EVERRUNS,
                    *self._arguments,
                    env={**kept, **self._given, "TMPDIR": str(self.tmp)},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    # A process group of its own, which a Ctrl-C reaches as a whole.
                    start_new_session=True,
                )
            stack.push_async_callback(self._end)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._exit.aclose()

    async def _end(self) -> None:
        for pid in self.everything():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def out(self) -> str:
        return (self._logs / "out").read_text()

    @property
    def err(self) -> str:
        return (self._logs / "err").read_text()

    def everything(self) -> set[int]:
        """Every process it ever was seen to have started and that is alive, itself included."""
        self._known |= {self.pid} | descendants(self.pid) | with_in_environment(f"TMPDIR={self.tmp}\0")
        return {pid for pid in self._known if is_alive(pid)}

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the foreground process group."""
        self.everything()
        os.killpg(self.pid, signal.SIGINT)

    def send_signal(self, number: signal.Signals) -> None:
        self.everything()
        self._process.send_signal(number)

    async def wait(self, seconds: float = END_SECONDS) -> int:
        try:
            async with asyncio.timeout(seconds):
                return await self._process.wait()
        except TimeoutError:
            raise AssertionError(f"still running after {seconds} s\n{self.out}\n{self.err}") from None

    async def nothing_left(self, seconds: float = END_SECONDS) -> float:
        """Until no process and no temporary file is left; how long that took."""
        started = time.monotonic()
        await eventually(lambda: not self.everything(), deadline_seconds=seconds, what=f"all gone: {self.everything()}")
        await eventually(lambda: not list(self.tmp.iterdir()), deadline_seconds=seconds, what="temporary files gone")
        return time.monotonic() - started

    async def printed(self, text: str, seconds: float = START_SECONDS) -> None:
        """Until the text stands on standard output."""
        started = time.monotonic()
        while text not in self.out:
            if not self.running or time.monotonic() - started > seconds:
                raise AssertionError(f"{text!r} was not printed\n{self.out}\n{self.err}")
            await asyncio.sleep(0.01)


class Dev(Command):
    """`everruns dev` on a port the system picks; ready inside the block."""

    def __init__(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__("dev", "--addr", "127.0.0.1:0", *arguments, environment=environment)

    async def __aenter__(self) -> Self:
        with tempfile.TemporaryDirectory(prefix="ev-ready-") as directory:
            ready = Path(directory) / "ready.json"
            self._arguments = (*self._arguments, "--ready-file", ready)
            await super().__aenter__()
            try:
                await eventually(
                    lambda: ready.exists() or not self.running, deadline_seconds=START_SECONDS, what="ready"
                )
                assert ready.exists(), f"it ended instead of starting:\n{self.err}"
                self.addresses = msgspec.json.decode(ready.read_bytes(), type=DevAddresses)
            except BaseException:
                await self.__aexit__()
                raise
        self.everything()
        return self

    @property
    def api(self) -> str:
        return f"{self.addresses.api}/v1"

    @property
    def origin(self) -> str:
        return self.addresses.api.removesuffix("/api")


async def run(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """A command that ends by itself: exit code, standard output and standard error."""
    async with Command(*arguments, environment=environment) as command:
        code = await command.wait()
        return code, command.out, command.err
