"""Python code, in a sandbox without access to the host or a network.

Decisions:
- The interpreter is Monty: a part of Python, without packages and with some modules of the standard library. What it lacks it
  says, and the model does without.
- Files of the workspace are reached by three functions the code calls. Each write is stored at once, as a file tool's would be,
  so code that fails later has written what it has written; the result lists it.
- `at_most_once`, because of those writes.
- Code that fails is a result, with its output and a traceback: that is what the model needs to correct it.
"""

from __future__ import annotations

import keyword
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from activities.files.results import Cut, json_bytes, tool_path
from activities.python.code_run import (
    CODE_SECONDS,
    CodeFailed,
    CodeReport,
    CodeRunner,
    CodeTookTooLong,
    HostAnswer,
    HostCall,
)
from activities.shell.output import ScriptOutput, excerpt
from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.tools import SideEffect
from domain.workspace import ROOT, BadPath, FileMissing, FileProblem, FileReadOnly

CONCURRENCY_CLASS: Final = "session_workspace"
TOOL_TIMEOUT_SECONDS: Final = 150.0
"""Longer than a call may wait for a slot and run, so that its own errors show."""
MAX_CODE_CHARACTERS: Final = 200_000
MAX_INPUTS: Final = 100
STDOUT_SHOWN_BYTES: Final = 20 * 1024
RESULT_SHOWN_BYTES: Final = 16 * 1024
ERROR_SHOWN_BYTES: Final = 8 * 1024
MAX_LISTED: Final = 2000
MAX_WRITTEN_LISTED: Final = 100


class RunPython(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    code: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_CODE_CHARACTERS,
            description="The code. The value of its last line is the result.",
        ),
    ]
    inputs: Annotated[dict[str, Any], Meta(description="Variables the code finds, by name.")] = {}


class PythonResult(Cut, frozen=True, kw_only=True, omit_defaults=True):
    """`error` is the traceback that ended the code, or the limit. `result` is the value of the last line, as JSON."""

    stdout: str
    result: object
    stderr: str = ""
    error: str | None = None
    timed_out: bool = False
    files_written: list[str] | None = None


class Python:
    def __init__(self, runner: CodeRunner | None = None) -> None:
        self._runner = runner or CodeRunner()

    async def run(self, context: ToolContext, arguments: RunPython) -> PythonResult:
        _check(arguments)
        output = ScriptOutput(context)
        files = _Files(context)
        try:
            async with output.streaming():
                report = await self._runner.run(arguments.code, arguments.inputs, output.add, files.answer)
        except CodeTookTooLong:
            report = _ended("It took too long and was stopped. Work on less at once.", timed_out=True)
        except CodeFailed:
            report = _ended("The sandbox ended without a result, most likely for want of memory. Work on less at once.")
        return _result(report, output, files.written)


class _Files:
    """The functions by which code reaches the workspace."""

    def __init__(self, context: ToolContext) -> None:
        self._context = context
        self.written: list[str] = []

    async def answer(self, call: HostCall) -> HostAnswer:
        try:
            match call.name:
                case "read_file":
                    return HostAnswer(value=(await self._context.files.read(call.path))[1])
                case "write_file":
                    return HostAnswer(value=await self._write(call))
                case "list_files":
                    return HostAnswer(value=await self._list(call))
        except FileMissing as problem:
            return HostAnswer(error="FileNotFoundError", message=str(problem))
        except FileReadOnly as problem:
            return HostAnswer(error="PermissionError", message=str(problem))
        except BadPath as problem:
            return HostAnswer(error="ValueError", message=str(problem))
        except FileProblem as problem:
            return HostAnswer(error="OSError", message=str(problem))

    async def _write(self, call: HostCall) -> None:
        entry, created = await self._context.files.write(call.path, call.content)
        await self._context.file_written(entry, created=created)
        if (path := tool_path(entry.path)) not in self.written:
            self.written.append(path)

    async def _list(self, call: HostCall) -> list[dict[str, object]]:
        entries = await self._context.files.list(call.path, recursive=call.recursive)
        return [
            {"path": tool_path(entry.path), "is_directory": entry.is_directory, "size_bytes": entry.size_bytes}
            for entry in entries[:MAX_LISTED]
        ]


def _check(arguments: RunPython) -> None:
    if len(arguments.inputs) > MAX_INPUTS:
        raise ToolError(f"`inputs` may hold {MAX_INPUTS} variables. Nothing was run.")
    for name in arguments.inputs:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ToolError(f"`inputs`: {name[:80]!r} cannot be the name of a variable. Nothing was run.")
    try:
        arguments.code.encode()
    except UnicodeEncodeError as error:
        raise ToolError(
            f"`code` holds half of a surrogate pair at character {error.start + 1}, which is no text. Nothing was run."
        ) from None


def _ended(error: str, *, timed_out: bool = False) -> CodeReport:
    return CodeReport(result=None, result_text=None, error=error, timed_out=timed_out, is_output_cut=False)


def _result(report: CodeReport, output: ScriptOutput, written: list[str]) -> PythonResult:
    all_stdout, all_stderr = output.text("stdout"), output.text("stderr")
    stdout, stderr = excerpt(all_stdout, STDOUT_SHOWN_BYTES), excerpt(all_stderr, ERROR_SHOWN_BYTES)
    result, is_result_cut = report.result, report.result_text is not None
    if report.result_text is not None:
        result = excerpt(report.result_text, RESULT_SHOWN_BYTES)
    elif json_bytes(result) > RESULT_SHOWN_BYTES:
        text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
        result, is_result_cut = excerpt(text, RESULT_SHOWN_BYTES), True
    is_cut = is_result_cut or report.is_output_cut or (stdout, stderr) != (all_stdout, all_stderr)
    return PythonResult(
        stdout=stdout,
        stderr=stderr,
        result=result,
        error=excerpt(report.error, ERROR_SHOWN_BYTES) if report.error is not None else None,
        timed_out=report.timed_out,
        files_written=written[:MAX_WRITTEN_LISTED] or None,
        truncated=is_cut,
        reason="size_cap" if is_cut else None,
        resume_hint="Print less, or write it to a file with write_file() and read that in parts." if is_cut else None,
    )


def capability(runner: CodeRunner | None = None) -> Capability:
    return Capability(
        id="python",
        name="Python",
        description="Runs Python code in a sandbox without network or access to the host.",
        category="Development",
        icon="code",
        risk_level="high",
        system_prompt=f"""\
You can run Python with `run_python`, for calculations and for working on data and text. It is a sandboxed part of Python 3: no \
packages, no network; of the standard library modules such as math, re, json, datetime, \
random, itertools, functools, collections, csv, decimal, hashlib. Each call starts anew: variables are gone afterwards. Use \
print() for output, or end with an expression. Files are reached by functions only, not by open(): \
read_file(path, binary=False), write_file(path, content), list_files(path="{ROOT}", recursive=False).""",
        tools=(
            Tool(
                name="run_python",
                display_name="Run Python",
                description="Run Python code in a sandbox. Returns what it printed, the value of its last line, and on failure "
                f"a traceback with line numbers. At most {CODE_SECONDS:g} seconds.",
                arguments=RunPython,
                run=Python(runner).run,
                side_effect=SideEffect.AT_MOST_ONCE,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=TOOL_TIMEOUT_SECONDS,
            ),
        ),
    )
