"""A sandboxed shell over the session's workspace.

Decisions:
- A script runs in memory, in a process without access to the host or a network (`activities.shell`). Its only effect is what it
  leaves below `/workspace`, stored in one transaction when it has ended: a script that is cancelled has changed nothing.
- Somebody else may write to the workspace meanwhile. Then nothing is stored, and the model is told what has changed: running a
  script again costs nothing, and a lost change may cost a lot.
- `idempotent`: once its changes are stored, the script would run on its own results (`echo x >> log`). So a receipt with its
  output is stored with them, by which a retry knows, and which is all a second attempt returns.
- A script that fails, or runs into a limit, is a result, with what it has written; like a real shell's, its changes stay.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from activities.files.results import Cut
from activities.shell.output import OutputMode, ScriptOutput, shown, shown_bytes
from activities.shell.script_run import Report, Script, ScriptRunner, ShellFailed, ShellTookTooLong
from activities.shell.workspace_mirror import WorkspaceMirror
from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.tools import SideEffect
from domain.workspace import ROOT, FileEntry, FileProblem, Receipt, ReceiptTaken, normal_path

CONCURRENCY_CLASS: Final = "session_workspace"
TOOL_TIMEOUT_SECONDS: Final = 150.0
"""Longer than copying (30), the longest script (60), its end (5) and storing take together, so that their own errors show."""
DEFAULT_TIMEOUT_MS: Final = 30_000
MAX_TIMEOUT_MS: Final = 60_000
MAX_SCRIPT_CHARACTERS: Final = 1_000_000
MAX_LISTED: Final = 100
MAX_ANNOUNCED: Final = 1000
"""Files that clients hear of one by one."""

DONE_BEFORE: Final = (
    "The worker was lost after the script's changes had been stored, so it was not run again. "
    "Which files changed is not known."
)


class BashArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    commands: Annotated[str, Meta(min_length=1, max_length=MAX_SCRIPT_CHARACTERS, description="The script.")]
    working_dir: Annotated[str, Meta(description="A directory of the workspace to run it in.")] = ROOT
    timeout_ms: Annotated[int, Meta(ge=100, le=MAX_TIMEOUT_MS, description="Most it may take, in milliseconds.")] = (
        DEFAULT_TIMEOUT_MS
    )
    output: Annotated[
        OutputMode,
        Meta(
            description="How much of the output to show: silent (nothing), concise (2 KB), normal (16 KB), verbose (32 KB), full "
            "(44 KB); auto: normal, and verbose when the script fails."
        ),
    ] = "auto"


class ChangedFile(Struct, frozen=True, kw_only=True):
    path: str
    change: Literal["created", "modified", "deleted"]


class BashResult(Cut, frozen=True, kw_only=True, omit_defaults=True):
    """`error` is the limit or the syntax error that ended the script."""

    exit_code: int
    stdout: str
    stderr: str
    error: str | None = None
    timed_out: bool = False
    files_changed: list[ChangedFile]
    files_changed_count: int | None = None
    notes: list[str] | None = None


class Shell:
    def __init__(self, runner: ScriptRunner | None = None) -> None:
        self._runner = runner or ScriptRunner()

    async def run(self, context: ToolContext, arguments: BashArguments) -> BashResult:
        if context.attempt > 1 and (done := await _done_before(context)):
            return done
        try:
            return await self._run(context, arguments)
        except ReceiptTaken:
            # An attempt that was thought lost has come to its end meanwhile.
            done = await _done_before(context)
            assert done is not None
            return done

    async def _run(self, context: ToolContext, arguments: BashArguments) -> BashResult:
        working_dir = await _working_dir(context, arguments.working_dir)
        mirror = await WorkspaceMirror.opened(context.files)
        script = Script(
            commands=_checked(arguments.commands),
            working_dir=working_dir,
            timeout_seconds=arguments.timeout_ms / 1000,
            directories=mirror.directories,
        )
        output = ScriptOutput(context)
        try:
            async with output.streaming():
                report, contents = await self._runner.run(script, mirror.contents(), output.add)
        except ShellTookTooLong:
            raise ToolError(
                f"The script did not end within {arguments.timeout_ms:,} ms and was killed. Nothing it changed was kept."
            ) from None
        except ShellFailed:
            raise ToolError(
                "The shell ended without a result, most likely for want of memory. Nothing the script changed was kept. "
                "Work on less data at once."
            ) from None
        ran = _result(arguments, report, output, [], [])
        receipt = Receipt(key=context.idempotency_key, text=msgspec.json.encode(ran).decode())
        changed, notes = await _kept(context, mirror, report, contents, receipt)
        return _result(arguments, report, output, changed, notes)


async def _done_before(context: ToolContext) -> BashResult | None:
    text = await context.files.receipt(context.idempotency_key)
    if text is None:
        return None
    return msgspec.structs.replace(msgspec.json.decode(text, type=BashResult), notes=[DONE_BEFORE])


async def _working_dir(context: ToolContext, path: str) -> str:
    normal = normal_path(path)
    entry = await context.files.stat(normal)
    if entry is None or not entry.is_directory:
        raise ToolError(f"`working_dir`: there is no directory `{ROOT}{normal}` in the workspace. Nothing was run.")
    return ROOT if normal == "/" else ROOT + normal


def _checked(commands: str) -> str:
    try:
        commands.encode()
    except UnicodeEncodeError as error:
        raise ToolError(
            f"`commands` holds half of a surrogate pair at character {error.start + 1}, which is no text. Nothing was run."
        ) from None
    return commands


async def _kept(
    context: ToolContext, mirror: WorkspaceMirror, report: Report, contents: dict[str, bytes], receipt: Receipt
) -> tuple[list[ChangedFile], list[str]]:
    """What has changed in the workspace, and what the model should know of it."""
    notes: list[str] = []
    if report.unseen:
        notes.append(f"The shell could not hold, and did not see: {_listed(report.unseen)}.")
    try:
        written = await mirror.write_back(report, contents, receipt)
    except FileProblem as problem:
        notes.append(
            f"Nothing the script changed was kept, neither this nor other files: {problem}. "
            "Correct that, or look at the file again, and run the script again."
        )
        return [], notes
    failed = await mirror.write_back_directories(report)
    if failed:
        notes.append(f"These directories stayed as they were: {_listed(failed)}.")
    if report.others:
        notes.append(f"Links and pipes are not kept: {_listed(report.others)}.")
    if len(written) > MAX_ANNOUNCED:
        notes.append(f"The user was told of the first {MAX_ANNOUNCED:,} files only.")
    for entry, created in written[:MAX_ANNOUNCED]:
        await context.file_written(entry, created=created)
    return _changes(written, report), notes


def _changes(written: list[tuple[FileEntry, bool]], report: Report) -> list[ChangedFile]:
    changes = [
        ChangedFile(path=ROOT + entry.path, change="created" if created else "modified") for entry, created in written
    ]
    return changes + [ChangedFile(path=path, change="deleted") for path in report.deleted]


def _result(
    arguments: BashArguments, report: Report, output: ScriptOutput, changed: list[ChangedFile], notes: list[str]
) -> BashResult:
    all_stdout, all_stderr = output.text("stdout"), output.text("stderr")
    limit = shown_bytes(arguments.output, failed=report.exit_code != 0)
    stdout, stderr = shown(all_stdout, all_stderr, limit)
    is_cut = report.is_output_cut or (stdout, stderr) != (all_stdout, all_stderr)
    error = report.error.removeprefix("resource limit exceeded: ")[:1000] if report.error else None
    return BashResult(
        exit_code=report.exit_code,
        stdout=stdout,
        stderr=stderr,
        error=error,
        timed_out=error is not None and error.startswith("execution timeout"),
        files_changed=changed[:MAX_LISTED],
        files_changed_count=len(changed) if len(changed) > MAX_LISTED else None,
        notes=notes or None,
        truncated=is_cut,
        reason="size_cap" if is_cut else None,
        bytes_returned=len(stdout.encode()) + len(stderr.encode()) if is_cut else None,
        bytes_total=len(all_stdout.encode()) + len(all_stderr.encode())
        if is_cut and not report.is_output_cut
        else None,
        resume_hint="Send the output to a file (`command > out.txt`) and read it in parts, or filter it."
        if is_cut
        else None,
    )


def _listed(paths: list[str]) -> str:
    named = ", ".join(f"`{path[:100]}`" for path in paths[:5])
    return f"{named} and {len(paths) - 5} more" if len(paths) > 5 else named


def capability(runner: ScriptRunner | None = None) -> Capability:
    return Capability(
        id="bashkit_shell",
        aliases=("virtual_bash",),
        name="Bash Shell",
        description="Runs shell scripts over the files of the workspace, in a sandbox without network or access to the host.",
        category="Files",
        icon="terminal",
        risk_level="high",
        dependencies=("session_file_system",),
        system_prompt="""\
You can run shell scripts with `bash`. It is a sandboxed Bash with the usual text tools (grep, sed, awk, jq, sort, find, tar, \
diff and more), without network, Python, Git or package managers. Each call starts a new shell: only files under `/workspace` \
stay, everything else (variables, `cd`, `/tmp`) is gone afterwards.""",
        tools=(
            Tool(
                name="bash",
                display_name="Bash",
                description="Run a Bash script in a sandbox that has the workspace at `/workspace`. Returns exit code, output "
                "and which files changed. Files it changes are stored when it has ended, all or none.",
                arguments=BashArguments,
                run=Shell(runner).run,
                side_effect=SideEffect.IDEMPOTENT,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=TOOL_TIMEOUT_SECONDS,
            ),
        ),
    )
