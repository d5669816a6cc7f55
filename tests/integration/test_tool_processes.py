"""The processes that tools run in: none outlives its call or its worker, and none is ended behind asyncio's back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from activities.shell.script_run import CHILD, Report, Script, ScriptRunner
from activities.web.html_conversion import HtmlConverter
from infra.tool_processes import tool_process
from tests.processes import descendants, eventually, is_alive

ENDLESS_COMMANDS: Final = "echo running; while true; do sleep 1; done"
BUSY_COMMANDS: Final = "echo running; jq -n 'last(range(1e12))'"
"""One command, and the interpreter looks at its own limits between commands."""

HOST: Final = """
import asyncio
from activities.shell.script_run import Script, ScriptRunner

async def files():
    yield "/workspace/a.txt", b"a"

script = Script(commands={commands!r}, working_dir="/workspace", timeout_seconds=300)
asyncio.run(ScriptRunner().run(script, files(), lambda stream, text: print(text, end="", flush=True)))
"""

GROUP: Final = """
import subprocess, sys
other = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(600)"])
sys.stdout.write(f"{other.pid}\\n")
sys.stdout.flush()
sys.stdin.buffer.read()
"""


async def no_files():
    for nothing in ():
        yield nothing


async def shell(commands: str, *, timeout_seconds: float = 60) -> Report:
    script = Script(commands=commands, working_dir="/workspace", timeout_seconds=timeout_seconds)
    report, _ = await ScriptRunner().run(script, no_files(), lambda _stream, _text: None)
    return report


def started(of: int, script: str) -> Callable[[], set[int]]:
    def found() -> set[int]:
        pids: set[int] = set()
        for pid in descendants(of):
            with contextlib.suppress(OSError):
                if script.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.add(pid)
        return pids

    return found


@pytest.mark.parametrize("commands", [ENDLESS_COMMANDS, BUSY_COMMANDS], ids=["sleeping", "busy"])
async def test_a_shell_does_not_outlive_a_worker_that_is_killed(commands: str) -> None:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST.format(commands=commands), cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    )
    try:
        find = started(worker.pid, CHILD.name)
        await eventually(find, deadline_seconds=60, what="a process for the script")
        (child,) = find()
        # The script itself, not the loading of the interpreter, which reads stdin as it goes. What it prints first says so.
        assert worker.stdout is not None
        async with asyncio.timeout(60):
            assert await worker.stdout.readline() == b"running\n"
    finally:
        worker.kill()
        await worker.wait()
    await eventually(lambda: not is_alive(child), deadline_seconds=30, what="the end of the worker's child")


async def test_a_script_gets_all_its_input_although_stdin_stays_open() -> None:
    assert (await shell("cat; echo done")).exit_code == 0


async def test_a_call_that_is_cancelled_leaves_no_process() -> None:
    running = asyncio.create_task(shell(ENDLESS_COMMANDS))
    find = started(os.getpid(), CHILD.name)
    await eventually(find, deadline_seconds=60, what="a process for the script")
    (child,) = find()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_alive(child)


async def test_what_a_script_has_started_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    async with tool_process(script) as process:
        assert process.stdout is not None
        other = int(await process.stdout.readline())
        assert is_alive(other)
    await eventually(lambda: not is_alive(other), deadline_seconds=30, what="the end of the group")


async def test_a_process_that_ends_while_it_is_killed_causes_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio says "Unknown child process" in its log when somebody else has asked for the exit status."""
    script = tmp_path / "short.py"
    script.write_text("import os\nos.write(1, b'.')\nos._exit(0)\n")
    with caplog.at_level(logging.WARNING):
        for pause_seconds in (0, 0.0002, 0.001, 0.003, 0.01) * 6:
            async with tool_process(script) as process:
                assert process.stdout is not None
                await process.stdout.read(1)
                await asyncio.sleep(pause_seconds)  # so that it ends before, during and after
    assert [record.getMessage() for record in caplog.records] == []


async def test_the_tools_themselves_cause_no_warning_either(caplog: pytest.LogCaptureFixture) -> None:
    converter = HtmlConverter()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            page = "<html><title>T</title><body><p>text</p></body></html>"
            converted = await converter.convert(page, markdown=True, main_only=False, base_url="http://example.com/")
            assert converted.content == "text"
            assert (await shell("echo x")).exit_code == 0
    assert [record.getMessage() for record in caplog.records] == []
