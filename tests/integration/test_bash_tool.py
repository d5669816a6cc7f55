"""The tool `bash`: what it does to a workspace in PostgreSQL, how it ends, and what a hostile script cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from activities.capabilities.bashkit_shell import capability
from activities.capabilities.registry import CapabilityRegistry, builtin_registry, call_tool
from activities.capabilities.tool_call import MAX_RESULT_BYTES
from activities.shell.output import PIECE_MAX_CHARACTERS, STREAMED_MAX_CHARACTERS
from activities.shell.script_run import Files, Report, Script, ScriptRunner, Stream
from db.database import Database
from db.workspace_files import DatabaseFiles
from domain.capabilities import Tool
from domain.config import CapabilityRef
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.tools import SideEffect
from domain.workspace import FileEntry
from tests.tool_context import PlainContext

(BASH,) = capability().tools
DEADLINE_SECONDS = 60


class Workspace(PlainContext):
    """A context with a workspace, which notes what clients would see."""

    def __init__(self, files: DatabaseFiles) -> None:
        self._files = files
        self.written: list[tuple[str, bool]] = []
        self.streamed: list[tuple[str, str]] = []
        self.something_streamed = asyncio.Event()
        self.calls = 0

    def retried(self) -> None:
        """The next call is the last one once more, after its worker was lost."""
        self.calls -= 1
        self.attempt = 2

    @property
    def files(self) -> DatabaseFiles:
        return self._files

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        self.written.append((entry.path, created))

    async def output(self, text: str, stream: str = "stdout") -> None:
        self.streamed.append((stream, text))
        self.something_streamed.set()

    async def bash(self, commands: str, /, tool: Tool = BASH, **arguments: object) -> dict[str, Any]:
        self.calls += 1
        self.idempotency_key = f"key_{self.calls}"
        async with asyncio.timeout(DEADLINE_SECONDS):
            outcome = await call_tool(tool, self, {"commands": commands, **arguments})
        assert outcome.error is None, outcome.error
        assert outcome.result is not None
        text = cast(Any, outcome.result[0]).text
        assert len(text.encode()) <= MAX_RESULT_BYTES
        return json.loads(text)

    async def refused(self, commands: str, /, tool: Tool = BASH, **arguments: object) -> str:
        async with asyncio.timeout(DEADLINE_SECONDS):
            outcome = await call_tool(tool, self, {"commands": commands, **arguments})
        assert outcome.error is not None
        assert "internal error" not in outcome.error
        return outcome.error

    async def tree(self) -> dict[str, bytes | None]:
        entries = await self.files.list(recursive=True)
        return {entry.path: None if entry.is_directory else (await self.files.read(entry.path))[1] for entry in entries}


@pytest.fixture
async def workspace(database: Database) -> Workspace:
    key = uuid7()
    await database.pool.execute(
        "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, 'test')", key, DEFAULT_ORG_ID
    )
    return Workspace(DatabaseFiles.of_workspace(database.pool, format_id(Prefix.WORKSPACE, key)))


def children() -> set[str]:
    """Processes of this test run that are shells of ours."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"bash_child.py" in process.read_bytes() and f"\nPPid:\t{os.getpid()}\n" in (
                process.with_name("status").read_text()
            ):
                found.add(process.parent.name)
        except OSError:
            continue
    return found


# --- the capability -------------------------------------------------------------------------------------------------------


def test_it_is_of_high_risk_brings_the_file_tools_and_has_its_old_name() -> None:
    registry = builtin_registry()
    resolved = registry.resolve([CapabilityRef(ref="virtual_bash"), CapabilityRef(ref="bashkit_shell")])
    assert [one.capability.id for one in resolved.capabilities] == ["session_file_system", "bashkit_shell"]
    assert resolved.missing == ()
    found = registry.get("virtual_bash")
    assert found is not None
    assert (found.id, found.risk_level) == ("bashkit_shell", "high")
    assert BASH.side_effect is SideEffect.IDEMPOTENT
    registry.check_refs([CapabilityRef(ref="virtual_bash")])


def test_an_alias_cannot_be_registered_twice() -> None:
    registry = CapabilityRegistry()
    registry.register(capability())
    with pytest.raises(ValueError, match="already registered"):
        registry.register(capability())


# --- once, whatever happens to workers --------------------------------------------------------------------------------------


async def test_a_script_whose_changes_are_stored_is_not_run_again(workspace: Workspace) -> None:
    first = await workspace.bash("echo x >> log; echo ran; exit 3")
    workspace.retried()
    again = await workspace.bash("echo x >> log; echo ran; exit 3")
    assert (again["exit_code"], again["stdout"]) == (first["exit_code"], first["stdout"]) == (3, "ran\n")
    assert "not run again" in again["notes"][0]
    assert await workspace.tree() == {"/log": b"x\n"}


async def test_a_script_whose_changes_were_not_stored_runs_again(workspace: Workspace) -> None:
    workspace.calls = 1
    workspace.retried()
    assert (await workspace.bash("echo x >> log"))["files_changed"] == [{"path": "/workspace/log", "change": "created"}]
    assert await workspace.tree() == {"/log": b"x\n"}


async def test_an_attempt_that_was_thought_lost_does_not_store_its_changes_over_those_of_the_next(
    workspace: Workspace,
) -> None:
    await workspace.bash("echo x >> log; echo first")
    workspace.calls -= 1  # the same call, its first attempt: it looked before the other one had stored anything
    late = await workspace.bash("echo y >> log; echo late")
    assert late["stdout"] == "first\n"
    assert await workspace.tree() == {"/log": b"x\n"}


async def test_a_file_that_somebody_changed_meanwhile_leaves_no_receipt(workspace: Workspace) -> None:
    await workspace.files.write("/locked", b"", is_readonly=True)
    assert "Nothing the script changed was kept" in (await workspace.bash("echo x > locked; echo y > free"))["notes"][0]
    workspace.retried()
    assert (await workspace.bash("echo y > free"))["files_changed"]


# --- the workspace --------------------------------------------------------------------------------------------------------


async def test_changes_are_written_back_and_told(workspace: Workspace) -> None:
    await workspace.files.write("/src/a.txt", b"one\n")
    await workspace.files.write("/gone.txt", b"x")
    await workspace.files.write("/same.txt", b"same")
    result = await workspace.bash(
        "echo two >> src/a.txt; rm gone.txt; mkdir -p new/empty; echo $((6*7)) > new/n; cat src/a.txt"
    )
    assert (result["exit_code"], result["stdout"], result["stderr"]) == (0, "one\ntwo\n", "")
    assert result["files_changed"] == [
        {"path": "/workspace/new/n", "change": "created"},
        {"path": "/workspace/src/a.txt", "change": "modified"},
        {"path": "/workspace/gone.txt", "change": "deleted"},
    ]
    assert await workspace.tree() == {
        "/new": None,
        "/new/empty": None,
        "/new/n": b"42\n",
        "/same.txt": b"same",
        "/src": None,
        "/src/a.txt": b"one\ntwo\n",
    }
    assert workspace.written == [("/new/n", True), ("/src/a.txt", False)]


async def test_binary_files_and_names_in_any_script_survive(workspace: Workspace) -> None:
    content = bytes(range(256)) * 50
    await workspace.files.write("/日本 🦉'é\"$x.bin", content)
    result = await workspace.bash('for f in *; do cp "$f" "копія $f"; done; ls')
    assert result["exit_code"] == 0
    assert await workspace.tree() == {"/日本 🦉'é\"$x.bin": content, "/копія 日本 🦉'é\"$x.bin": content}
    assert len(result["files_changed"]) == 1


async def test_a_file_can_become_a_directory_and_a_directory_a_file(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"a")
    await workspace.files.write("/d/x", b"x")
    result = await workspace.bash("rm a; mkdir a; echo in > a/in; rm -r d; echo file > d")
    assert "notes" not in result
    assert await workspace.tree() == {"/a": None, "/a/in": b"in\n", "/d": b"file\n"}


@pytest.mark.parametrize(
    "commands", ["rm -rf /workspace/* /workspace/.[a-z]*", "rm -rf /workspace", "mv /workspace /tmp/w"]
)
async def test_everything_can_be_deleted(workspace: Workspace, commands: str) -> None:
    await workspace.files.write("/a/b/c.txt", b"")
    await workspace.files.write("/.hidden", b"")
    result = await workspace.bash(commands)
    assert await workspace.tree() == {}
    assert [one["path"] for one in result["files_changed"]] == ["/workspace/.hidden", "/workspace/a/b/c.txt"]
    assert (await workspace.bash("echo new > x"))["exit_code"] == 0
    assert await workspace.tree() == {"/x": b"new\n"}


@pytest.mark.parametrize(
    "commands", ["echo x > a; echo y > b; echo out", "rm a; echo y > b; echo out", "rm -rf /workspace; echo out"]
)
async def test_when_a_read_only_file_is_touched_nothing_is_kept_and_the_answer_says_so(
    workspace: Workspace, commands: str
) -> None:
    await workspace.files.write("/a", b"protected", is_readonly=True)
    await workspace.files.write("/c", b"c")
    before = await workspace.tree()
    result = await workspace.bash(commands)
    assert result["stdout"] == "out\n"
    assert result["files_changed"] == []
    assert "`/a` is read-only" in result["notes"][0]
    assert "Nothing the script changed was kept" in result["notes"][0]
    assert await workspace.tree() == before
    assert workspace.written == []


class Meddler(ScriptRunner):
    """Somebody who writes while the script runs."""

    def __init__(self, workspace: Workspace, path: str) -> None:
        super().__init__()
        self._workspace = workspace
        self._path = path

    async def run(
        self, script: Script, files: Files, on_output: Callable[[Stream, str], None]
    ) -> tuple[Report, dict[str, bytes]]:
        ran = await super().run(script, files, on_output)
        await self._workspace.files.write(self._path, b"somebody else's")
        return ran


@pytest.mark.parametrize(
    "commands", ["echo mine > a", "rm a", "rm -r /workspace", "echo mine > new", "echo mine >> a; echo x > c"]
)
async def test_what_somebody_else_changed_meanwhile_is_never_overwritten(workspace: Workspace, commands: str) -> None:
    path = "/new" if "new" in commands else "/a"
    await workspace.files.write("/a", b"before")
    (tool,) = capability(Meddler(workspace, path)).tools
    result = await workspace.bash(commands, tool)
    assert result["files_changed"] == []
    assert f"`{path}` changed in the meantime" in result["notes"][0]
    assert (await workspace.files.read(path))[1] == b"somebody else's"
    assert "/c" not in await workspace.tree()


async def test_what_somebody_else_puts_into_a_deleted_directory_stays(workspace: Workspace) -> None:
    await workspace.files.write("/d/mine", b"")
    (tool,) = capability(Meddler(workspace, "/d/theirs")).tools
    await workspace.bash("rm -r d; touch other", tool)
    assert await workspace.tree() == {"/d": None, "/d/theirs": b"somebody else's", "/other": b""}


async def test_files_the_shell_cannot_hold_are_told_and_left_alone(workspace: Workspace) -> None:
    await workspace.files.write("/big.bin", b"x" * 10_400_000)
    await workspace.files.write("/small", b"")
    result = await workspace.bash("ls; rm -rf /workspace/*")
    assert result["stdout"] == "small\n"
    assert "/workspace/big.bin" in result["notes"][0]
    assert list(await workspace.tree()) == ["/big.bin"]
    result = await workspace.bash("echo x > big.bin")
    assert "changed in the meantime" in result["notes"][1]


async def test_links_are_not_kept_and_lead_nowhere(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"a")
    result = await workspace.bash("ln -s /etc/passwd p; ln -s . loop; ln -s a l; cat l; echo b > f")
    assert list(await workspace.tree()) == ["/a", "/f"]
    assert "/workspace/loop" in result["notes"][0]
    result = await workspace.bash("rm -rf /workspace; ln -s /etc /workspace")
    assert "no directory any more" in result["notes"][0]
    assert list(await workspace.tree()) == ["/a", "/f"]


@pytest.mark.parametrize("name", ["_/x", "workspace/x"])
async def test_a_name_the_workspace_refuses_keeps_everything_as_it_was(workspace: Workspace, name: str) -> None:
    result = await workspace.bash(f"mkdir -p $(dirname {name}); echo x > {name}; echo y > other")
    assert "Nothing the script changed was kept" in result["notes"][0]
    assert await workspace.tree() == {}


async def test_two_ways_to_write_one_name_are_refused(workspace: Workspace) -> None:
    await workspace.files.write("/\u00e9", b"kept")
    result = await workspace.bash("echo x > e\u0301")
    assert "two files" in result["notes"][0]
    assert await workspace.tree() == {"/\u00e9": b"kept"}


async def test_the_working_directory_is_one_of_the_workspace(workspace: Workspace) -> None:
    await workspace.files.write("/src/a", b"")
    for path in ("/workspace/src", "/src", "src"):
        assert (await workspace.bash("pwd", working_dir=path))["stdout"] == "/workspace/src\n"
    for path in ("/gone", "/src/a", "../etc", "/workspace/../etc"):
        await workspace.refused("pwd", working_dir=path)


# --- how it ends ----------------------------------------------------------------------------------------------------------


async def test_a_script_that_fails_is_a_result_and_its_changes_stay(workspace: Workspace) -> None:
    result = await workspace.bash("echo x > kept; echo oops >&2; exit 3")
    assert (result["exit_code"], result["stderr"]) == (3, "oops\n")
    assert "error" not in result
    assert await workspace.tree() == {"/kept": b"x\n"}


@pytest.mark.parametrize(
    ("commands", "error"),
    [
        ("echo out; echo x > kept; while true; do :; done", "maximum command count exceeded (1000)"),
        ("echo out; echo x > kept; f() { f; }; f", "function depth"),
        ("echo out; echo x > kept; x=a; for i in $(seq 60); do x=$x$x; done", "memory limit"),
        ("echo out; echo x > kept; sleep 100", "execution timeout"),
    ],
)
async def test_a_limit_ends_the_script_and_keeps_what_it_had_written(
    workspace: Workspace, commands: str, error: str
) -> None:
    started = time.monotonic()
    result = await workspace.bash(commands, timeout_ms=1500)
    assert time.monotonic() - started < 20
    assert error in result["error"]
    assert (result["exit_code"], result["stdout"]) == (1, "out\n")
    assert result.get("timed_out", False) == ("sleep" in commands)
    assert await workspace.tree() == {"/kept": b"x\n"}


@pytest.mark.parametrize(
    "commands",
    [
        ":(){ :|:& };:",
        "seq 1 100000 | xargs -n1 touch",
        "jq -n 'def f: f; f'",
        "awk 'BEGIN{for(i=0;i<9999;i++)for(j=0;j<9999;j++)x++}'",
        "awk 'BEGIN{s=\"x\"; while(1){s=s s}}'",
        "echo {1..100000000}",
        "printf '%1000000000s' x",
        "echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! | grep -E '(a+)+$'",
        "head -c 9000000 /dev/zero > z; for i in $(seq 40); do cp z z$i; tar czf $i.tgz z z$i; done; zip b.zip z*",
        "head -c 1000000 /dev/zero > z; zip z.zip z; for i in $(seq 200); do unzip -o z.zip -d o$i; done",
    ],
)
async def test_a_hostile_script_ends_in_time_and_leaves_no_process(workspace: Workspace, commands: str) -> None:
    started = time.monotonic()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await call_tool(BASH, workspace, {"commands": commands, "timeout_ms": 2000})
    assert time.monotonic() - started < 40
    assert not children()


async def test_a_syntax_error_is_told(workspace: Workspace) -> None:
    result = await workspace.bash("echo 'unclosed")
    assert "unexpected EOF" in result["error"]
    assert result["exit_code"] != 0


async def test_a_cancelled_script_is_gone_within_a_second_and_has_changed_nothing(workspace: Workspace) -> None:
    call = asyncio.create_task(call_tool(BASH, workspace, {"commands": "echo x > a; echo begun; sleep 50"}))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await workspace.something_streamed.wait()
    assert children()
    started = time.monotonic()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert time.monotonic() - started < 1
    assert not children()
    assert await workspace.tree() == {}


async def test_a_shell_that_hangs_or_dies_is_an_error_the_model_can_read(workspace: Workspace, tmp_path: Path) -> None:
    for source, expected in (
        ("import time\ntime.sleep(100)", "was killed"),
        ("raise SystemExit(1)", "ended without a result"),
        ("import sys\nsys.stdin.buffer.read(1)\nsys.stdout.buffer.write(b'r\\0\\0\\0\\2{}')", "ended without a result"),
        (
            "import sys\nsys.stdin.buffer.read(1)\nsys.stdout.buffer.write(b'o\\xff\\xff\\xff\\xff')",
            "ended without a result",
        ),
    ):
        child = tmp_path / "child.py"
        child.write_text(source)
        (tool,) = capability(ScriptRunner(child=child, kill_margin_seconds=0.3)).tools
        refusal = await workspace.refused("true", tool, timeout_ms=100)
        assert expected in refusal
        assert "Nothing" in refusal


async def test_the_event_loop_goes_on_while_a_script_works(workspace: Workspace) -> None:
    call = asyncio.create_task(workspace.bash("jq -n 'def f: f; f'", timeout_ms=1500))
    ticks = 0
    while not call.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 30


# --- output ---------------------------------------------------------------------------------------------------------------


async def test_output_is_streamed_as_it_comes_in_few_pieces(workspace: Workspace) -> None:
    call = asyncio.create_task(workspace.bash("echo first; sleep 3; for i in $(seq 300); do echo $i; done; echo e >&2"))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await workspace.something_streamed.wait()
    assert not call.done()
    assert workspace.streamed == [("stdout", "first\n")]
    result = await call
    for stream in ("stdout", "stderr"):
        assert "".join(text for one, text in workspace.streamed if one == stream) == result[stream]
    assert len(workspace.streamed) < 30


async def test_huge_output_is_cut_everywhere_and_says_so(workspace: Workspace) -> None:
    result = await workspace.bash("echo begin; head -c 5000000 /dev/zero | tr '\\0' 'a'; echo; echo error >&2; exit 1")
    assert result["truncated"]
    assert "> out.txt" in result["resume_hint"]
    assert result["stdout"].startswith("begin\naaa")
    assert result["stderr"] == "error\n"
    streamed = [text for _, text in workspace.streamed]
    assert sum(map(len, streamed)) <= STREAMED_MAX_CHARACTERS
    assert max(map(len, streamed)) <= PIECE_MAX_CHARACTERS


async def test_the_model_chooses_how_much_output_it_gets(workspace: Workspace) -> None:
    script = "for i in $(seq 400); do echo \"$i $(printf '%0200d' 0)\"; done"
    sizes = {
        mode: len((await workspace.bash(script, output=mode))["stdout"])
        for mode in ("silent", "concise", "normal", "verbose", "full")
    }
    assert sizes["silent"] == 0
    assert sizes["concise"] <= 2048 < sizes["normal"] <= 16384 < sizes["verbose"] <= 32768 < sizes["full"]
    result = await workspace.bash(script)
    assert result["stdout"].startswith("1 ")
    assert f"\n400 {'0' * 200}\n" in result["stdout"], "the end is shown too"
    assert "characters left out" in result["stdout"]


# --- isolation ------------------------------------------------------------------------------------------------------------


async def test_nothing_of_the_host_can_be_seen(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_SECRET", "planted-0123456789")
    result = await workspace.bash(
        "env; set; cat /proc/self/environ /proc/1/environ /proc/*/environ; cat /etc/passwd /etc/shadow; hostname; whoami; "
        "cat ../../../../../etc/hostname; ls /home /root /tmp; echo $PLANTED_SECRET; printenv PLANTED_SECRET",
        output="full",
    )
    seen = result["stdout"] + result["stderr"]
    assert "HOME=/workspace" in seen
    assert "planted" not in seen
    assert "PLANTED" not in seen.replace("PLANTED_SECRET: ", "")
    for secret in (os.environ.get("PATH", "-"), str(Path.cwd()), os.uname().nodename, str(Path.home())):
        assert len(secret) < 6 or secret not in seen


async def test_there_is_no_network_no_python_and_no_database(workspace: Workspace, unused_tcp_port: int) -> None:
    heard = asyncio.Event()

    async def hear(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted")
        writer.close()

    async with await asyncio.start_server(hear, "127.0.0.1", unused_tcp_port):
        url = f"http://127.0.0.1:{unused_tcp_port}/"
        for command in (
            f"curl {url}",
            f"wget {url}",
            f"http GET {url}",
            f"exec 3<>/dev/tcp/127.0.0.1/{unused_tcp_port}",
        ):
            result = await workspace.bash(f"{command}; cat <&3")
            assert "planted" not in result["stdout"]
        for command in (
            "python3 -c 'print(6*7)'",
            "python -c 'print(6*7)'",
            "sqlite3 :memory: 'select 6*7'",
            "node -e 'console.log(6*7)'",
        ):
            result = await workspace.bash(command)
            assert "42" not in result["stdout"]
            assert result["exit_code"] != 0
    assert not heard.is_set()


async def test_a_script_cannot_write_to_the_host(workspace: Workspace, tmp_path: Path) -> None:
    await workspace.bash(f"mkdir -p {tmp_path}; echo x > {tmp_path}/planted; echo x > /tmp/planted-by-a-script")
    assert os.listdir(tmp_path) == []
    assert "planted-by-a-script" not in os.listdir("/tmp")
    assert (await workspace.bash("ls /tmp"))["stdout"] == "", "a shell begins anew each time"


async def test_too_much_at_once_is_refused_as_a_whole(workspace: Workspace) -> None:
    await workspace.files.write("/mb", b"x" * 1_000_000)
    result = await workspace.bash("for i in $(seq 40); do cp mb c$i; done; echo done")
    assert result["stdout"] == "done\n"
    assert "33,554,432 bytes" in result["notes"][0]
    assert list(await workspace.tree()) == ["/mb"]


@pytest.mark.parametrize("arguments", [{"timeout_ms": 60_001}, {"timeout_ms": 0}, {"output": "loud"}, {"commands": ""}])
async def test_arguments_out_of_range_are_refused(workspace: Workspace, arguments: dict[str, object]) -> None:
    outcome = await call_tool(BASH, workspace, {"commands": "true", **arguments})
    assert outcome.error is not None
    assert f"`{next(iter(arguments))}`" in outcome.error
