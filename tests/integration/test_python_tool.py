"""`run_python`: what code can do, what it cannot, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from activities.capabilities.python import capability
from activities.capabilities.tool_call import ToolOutcome, call_tool
from activities.python.code_run import CodeFailed, CodeRunner
from db.database import Database
from db.workspace_files import DatabaseFiles
from domain.limits import FILE_MAX_BYTES
from domain.messages import TextPart
from domain.workspace import FileEntry
from tests.conftest import Make
from tests.processes import descendants, eventually, is_alive, with_in_environment
from tests.stack import Stack, of_type
from tests.tool_context import PlainContext

HURRIED: Final = CodeRunner(seconds=1.5, wall_seconds=30)
PATIENT: Final = CodeRunner(seconds=30, wall_seconds=90)


class CodeContext(PlainContext):
    def __init__(self, files: DatabaseFiles | None = None) -> None:
        self._files = files
        self.streamed: list[tuple[str, str]] = []
        self.announced: list[tuple[str, bool]] = []

    @property
    def files(self) -> DatabaseFiles:
        assert self._files is not None
        return self._files

    async def output(self, text: str, stream: str = "stdout") -> None:
        self.streamed.append((stream, text))

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        self.announced.append((entry.path, created))


async def outcome_of(
    code: str, context: CodeContext | None = None, runner: CodeRunner = PATIENT, **inputs: Any
) -> ToolOutcome:
    (tool,) = capability(runner).tools
    return await call_tool(tool, context or CodeContext(), {"code": code, "inputs": inputs})


async def run(code: str, context: CodeContext | None = None, runner: CodeRunner = PATIENT, **inputs: Any) -> Any:
    outcome = await outcome_of(code, context, runner, **inputs)
    assert outcome.error is None, outcome.error
    assert outcome.result is not None
    (part,) = outcome.result
    assert isinstance(part, TextPart)
    return msgspec.json.decode(part.text)


# --- results ----------------------------------------------------------------------------------------------------------


async def test_output_and_the_value_of_the_last_line_come_back() -> None:
    context = CodeContext()
    assert await run("print('adding')\nsum(prices) * 2", context, prices=[1.5, 2]) == {
        "stdout": "adding\n",
        "result": 7.0,
    }
    assert context.streamed == [("stdout", "adding\n")]


async def test_an_error_names_the_line_and_keeps_what_was_printed() -> None:
    result = await run("print('before')\nx = 1\n\nx / 0")
    assert result["stdout"] == "before\n"
    assert "line 4" in result["error"]
    assert "ZeroDivisionError: division by zero" in result["error"]
    assert "line 2" in (await run("x = 1\ndef f(:"))["error"]


VALUES: Final = {
    "None": None,
    "(1, {2}, [True, 1.5])": [1, [2], [True, 1.5]],
    "b'ab'": {"base64": "YWI=", "bytes": 2},
    "{(1, 2): 'ü', 3: None}": {"(1, 2)": "ü", "3": None},
    "2**53 - 1": 2**53 - 1,
    "2**70": str(2**70),
    "[float('nan'), float('inf'), -float('inf')]": ["nan", "inf", "-inf"],
    "x = []\nx.append(x)\nx": ["[...]"],
    "'\\ud800'": "�",
    "'a\\0b'": "a\0b",
}


@pytest.mark.parametrize("code", VALUES)
async def test_every_value_is_json(code: str) -> None:
    assert (await run(code))["result"] == VALUES[code]


async def test_a_result_that_is_too_long_or_too_deep_is_cut() -> None:
    for code in ("'x' * 100000", "list(range(20000))", "2 ** 100000"):
        cut = await run(code)
        assert (cut["truncated"], cut["reason"], "characters left out" in cut["result"]) == (True, "size_cap", True), (
            code
        )
    deep = await run("x = []\nfor i in range(100000): x = [x]\nx")
    assert "…" in str(deep["result"])


async def test_calls_share_nothing() -> None:
    await run("left = 1")
    assert "NameError" in (await run("left"))["error"]


@pytest.mark.parametrize("name", ["1a", "a b", "", "class", "a;import os", "a\0"])
async def test_an_input_that_cannot_be_a_variable_runs_nothing(name: str) -> None:
    inputs: dict[str, Any] = {name: 1}
    outcome = await outcome_of("1", **inputs)
    assert "cannot be the name of a variable. Nothing was run." in (outcome.error or "")


async def test_code_that_is_no_text_or_too_long_runs_nothing() -> None:
    assert "half of a surrogate pair" in ((await outcome_of("'\ud800'")).error or "")
    assert "length <= 200000" in ((await outcome_of("1" * 10_000_000)).error or "")
    assert (await run("'a\0b'")) is not None


# --- what it cannot reach ---------------------------------------------------------------------------------------------

ESCAPES: Final = (
    "import os\nos.system('id')",
    "import os\nos.listdir('/')",
    "import os\nos.environ['PATH']",
    "import socket",
    "import subprocess",
    "import ctypes",
    "import importlib",
    "__import__('os').system('id')",
    "open('/etc/passwd').read()",
    "open('/workspace/a.txt').read()",
    "open('/tmp/everruns-python', 'w').write('x')",
    "import pathlib\npathlib.Path('/etc/passwd').read_text()",
    "().__class__.__bases__[0].__subclasses__()",
    "[].__class__.__mro__",
    "(lambda: 0).__globals__",
    "read_file.__globals__",
    "read_file.__closure__",
    "print.__self__",
    "import sys\nsys.modules['os']",
    "import sys\nsys._getframe()",
    "globals()['__builtins__']",
    "eval(\"__import__('os')\")",
    "exec('import socket')",
    "input()",
)


@pytest.mark.parametrize("code", ESCAPES)
async def test_the_host_cannot_be_reached(code: str) -> None:
    result = await run(code)
    assert result["error"] is not None
    assert "root:" not in str(result)
    assert not os.path.exists("/tmp/everruns-python")  # noqa: ASYNC240


BOMBS: Final = {
    "while True: pass": "time limit exceeded",
    "try:\n  while True: pass\nexcept BaseException:\n  while True: pass": "time limit exceeded",
    "sum(range(10**12))": "time limit exceeded",
    "import time\ntime.sleep(1000)": "sleep limit exceeded",
    "x = []\nwhile True: x.append('a' * 1000000)": "MemoryError",
    "'a' * 10**10": "MemoryError",
    "10 ** 10 ** 8": "MemoryError",
    "list(range(10**9))": "MemoryError",
    "def f(): return f()\nf()": "RecursionError",
    "import json\njson.loads('[' * 100000)": "recursion limit exceeded",
    "eval('(' * 50000 + ')' * 50000)": "Error",
    "while True: list_files(7)": "TypeError",
}


@pytest.mark.parametrize("code", BOMBS)
async def test_a_bomb_ends_at_its_limit(code: str) -> None:
    async with asyncio.timeout(60):
        result = await run(code, runner=HURRIED)
    assert BOMBS[code] in result["error"]
    assert result.get("timed_out", False) == ("time limit exceeded" in BOMBS[code])


async def test_a_flood_of_output_is_bounded_everywhere() -> None:
    context = CodeContext()
    result = await run("while True: print('x' * 100)", context, HURRIED)
    assert (result["timed_out"], result["truncated"], len(result["stdout"]) < 21_000) == (True, True, True)
    assert sum(len(text) for _, text in context.streamed) <= 256 * 1024
    assert len(context.streamed) <= 32


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def files(database: Database, make_session: Make) -> DatabaseFiles:
    return DatabaseFiles.of_session(database.pool, (await make_session())["id"])


async def test_code_reads_writes_and_lists_files(files: DatabaseFiles) -> None:
    await files.write("/data/größe.csv", "a,b\n1,ü\n".encode())
    await files.write("/raw.bin", b"\xff\x00")
    context = CodeContext(files)
    code = """
names = [one["path"] for one in list_files(recursive=True) if not one["is_directory"]]
text = read_file("/workspace/data/größe.csv")
n = write_file("out/copy.csv", text.upper())
write_file("/raw.bin", read_file("raw.bin", binary=True) + b"\\x01")
[names, n]
"""
    result = await run(code, context)
    assert result["result"] == [["/workspace/data/größe.csv", "/workspace/raw.bin"], 9]
    assert result["files_written"] == ["/workspace/out/copy.csv", "/workspace/raw.bin"]
    assert context.announced == [("/out/copy.csv", True), ("/raw.bin", False)]
    assert (await files.read("/out/copy.csv"))[1].decode() == "A,B\n1,Ü\n"
    assert (await files.read("/raw.bin"))[1] == b"\xff\x00\x01"


async def test_what_is_wrong_with_a_file_is_an_exception_that_code_can_catch(files: DatabaseFiles) -> None:
    await files.write("/fixed.txt", b"x", is_readonly=True)
    await files.write("/raw.bin", b"\xff")
    calls = {
        "read_file('nope.txt')": "FileNotFoundError",
        "read_file('../../etc/passwd')": "ValueError",
        "read_file('/etc/passwd')": "FileNotFoundError",
        "read_file('raw.bin')": "ValueError",
        "read_file('')": "ValueError",
        "write_file('fixed.txt', 'y')": "PermissionError",
        "write_file('a\\0b', 'y')": "ValueError",
        "write_file('a.txt', 7)": "TypeError",
        "write_file(7, 'y')": "TypeError",
        "list_files('/nope')": "FileNotFoundError",
    }
    for call, kind in calls.items():
        result = await run(
            f"try:\n  {call}\nexcept Exception as error:\n  print(type(error).__name__, error)", CodeContext(files)
        )
        assert result["stdout"].split()[:1] == [kind] or (kind == "ValueError" and "OSError" in result["stdout"]), (
            call,
            result,
        )
    assert [entry.path for entry in await files.list("/", recursive=True)] == ["/fixed.txt", "/raw.bin"]


async def test_a_file_over_the_limit_is_refused_and_the_code_goes_on(files: DatabaseFiles) -> None:
    big = f"write_file('big', 'x' * {FILE_MAX_BYTES + 1})"
    code = f"try:\n  {big}\nexcept OSError as error:\n  print(error)\nwrite_file('small', 'x')"
    result = await run(code, CodeContext(files))
    assert "bytes" in result["stdout"]
    assert result["files_written"] == ["/workspace/small"]


async def test_calls_of_functions_are_counted(files: DatabaseFiles) -> None:
    result = await run("while True: list_files()", CodeContext(files))
    assert "suspension limit" in result["error"]


async def test_code_that_fails_keeps_what_it_has_written_and_says_so(files: DatabaseFiles) -> None:
    result = await run("write_file('a.txt', 'x')\n1 / 0", CodeContext(files))
    assert result["files_written"] == ["/workspace/a.txt"]
    assert "ZeroDivisionError" in result["error"]


# --- processes --------------------------------------------------------------------------------------------------------


def processes(root: int) -> set[int]:
    """The client and the interpreter of a running call."""
    found: set[int] = set()
    for pid in descendants(root):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"python_child" in command or b"monty" in command:
                found.add(pid)
    return found


async def running(root: int) -> tuple[int, int]:
    await eventually(lambda: len(processes(root)) == 2, deadline_seconds=60, what="a client and its interpreter")
    client, interpreter = sorted(processes(root), key=lambda pid: b"monty" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return client, interpreter


async def gone(*pids: int) -> None:
    await eventually(
        lambda: not any(map(is_alive, pids)), deadline_seconds=30, what="the end of what a call has started"
    )


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_process_that_is_killed_is_a_result_and_takes_the_other_with_it(victim: int) -> None:
    call = asyncio.create_task(run("print('started')\nwhile True: pass", CodeContext()))
    pids = await running(os.getpid())
    os.kill(pids[victim], signal.SIGKILL)
    assert "ended" in (await call)["error"]
    await gone(*pids)


async def test_a_call_that_is_cancelled_leaves_no_process() -> None:
    call = asyncio.create_task(run("while True: pass"))
    pids = await running(os.getpid())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await gone(*pids)


async def test_a_call_that_hangs_is_killed_at_the_end_of_its_time() -> None:
    result = await run("while True: pass", runner=CodeRunner(seconds=60, wall_seconds=1))
    assert result["timed_out"]
    assert "took too long" in result["error"]
    assert not processes(os.getpid())


async def test_a_call_that_has_ended_leaves_no_process() -> None:
    assert (await run("1"))["result"] == 1
    assert not processes(os.getpid())


WORKER: Final = """
import asyncio
from activities.python.code_run import CodeRunner
asyncio.run(CodeRunner(seconds=300, wall_seconds=300).run("while True: pass", {}, print, print))
"""


async def test_nothing_outlives_a_worker_that_is_killed() -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, cwd=Path(__file__).parents[2])
    try:
        pids = await running(worker.pid)
    finally:
        worker.kill()
        await worker.wait()
    await gone(*pids)


@pytest.mark.parametrize("answer", ["b''", "b'abc'", "b'r' + bytes([255] * 4)", "b'x' + bytes(4)", "b'r' + bytes(4)"])
async def test_a_child_that_talks_nonsense_is_a_failure_of_its_call_only(tmp_path: Path, answer: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(f"import sys\nsys.stdout.buffer.write({answer})\nsys.stdout.buffer.flush()\n")

    async def never(_: object) -> Any:
        raise AssertionError

    with pytest.raises(CodeFailed):
        await CodeRunner(child=child, wall_seconds=20).run("1", {}, lambda _stream, _text: None, never)


async def test_the_environment_of_the_sandbox_holds_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRETS_ENCRYPTION_KEY", "planted-0123456789")
    call = asyncio.create_task(run("while True: pass", runner=HURRIED))
    pids = await running(os.getpid())
    assert not set(pids) & with_in_environment("planted-0123456789")
    await call


# --- in a turn --------------------------------------------------------------------------------------------------------


async def test_a_turn_runs_code_and_streams_its_output() -> None:
    async with Stack() as stack:
        session_id = await stack.create_session(capabilities=[{"ref": "python"}])
        code = "print('hello')\nwrite_file('a.txt', 'x')\n6 * 7"
        script = {
            "mode": "script",
            "turns": [{"tool_calls": [{"name": "run_python", "arguments": {"code": code}}]}, {"text": "Done."}],
        }
        log = await stack.ask(session_id, "go", llmsim=script)
        ((done),) = of_type(log, "tool.completed")
        assert done["success"], done
        assert '"result":42' in str(done["result"])
        assert [one["delta"] for one in of_type(log, "tool.output.delta")] == ["hello\n"]
        assert [one["path"] for one in of_type(log, "file.written")] == ["/a.txt"]
        await stack.check(session_id)
