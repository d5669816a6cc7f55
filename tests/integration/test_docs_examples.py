"""Runs the examples of the documentation, as they stand there, against a running engine.

Python blocks run as scripts of their own; `curl` and `temporal` commands are taken from the bash blocks of the pages below. Only
addresses and `$VARIABLES` are replaced. A page's `$SESSION` is a new session with every capability, so a block needs no other.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from msgspec import Struct

from infra.temporal_server import find_program
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
EXAMPLE_SECONDS = 60.0
"""Starting an interpreter and a turn, on a busy machine; an example takes about one."""

PYTHON_PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/streaming.md",
    "docs/tools.md",
    "docs/temporal.md",
    "docs/mcp-server.md",
)
CURL_PAGES = (
    "docs/quickstart.md",
    "docs/messages.md",
    "docs/streaming.md",
    "docs/llmsim.md",
    "docs/models.md",
    "docs/workspaces.md",
    "docs/fork-and-rewind.md",
    "docs/memories.md",
    "docs/capabilities/test_faults.md",
    "docs/capabilities/session.md",
    "docs/capabilities/session_storage.md",
    "docs/capabilities/memory.md",
    "docs/capabilities/guardrails.md",
    "docs/capabilities/prompt_canary_guardrail.md",
    "docs/capabilities/loop_detection.md",
    "docs/capabilities/tool_call_repair.md",
    "docs/capabilities/parallel_tool_calls.md",
    "docs/capabilities/message_metadata.md",
    "docs/capabilities/infinity_context.md",
    "docs/capabilities/session_sql_database.md",
    "docs/capabilities/python.md",
    "docs/capabilities/noop.md",
    "docs/capabilities/session_tasks.md",
    "docs/capabilities/skills.md",
    "docs/capabilities/agent_instructions.md",
    "docs/declarative-capabilities.md",
    "docs/mcp.md",
    "docs/capabilities/subagents.md",
    "docs/capabilities/session_schedule.md",
    "docs/schedules.md",
    "docs/budgets.md",
    "docs/capabilities/budgeting.md",
)
CAPABILITIES = [
    {"ref": name} for name in ("test_weather", "test_math", "current_time", "test_faults", "session", "subagents")
]
CAPABILITIES += [{"ref": "session_schedule"}, {"ref": "session_sql_database"}, {"ref": "python"}]

EXPECTED_OUTPUT = {
    "README.md": "turn.completed after",
    "docs/quickstart.md": "agent [",
    "docs/streaming.md": "session.idled",
    "docs/tools.md": "accepted 1",
    "docs/temporal.md": "ended {'turn_id'",
    "docs/mcp-server.md": "session_send_message",
}


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str, program: str) -> list[str]:
    """Every command of a page that begins with a program's name, continued over lines and quotes; its comment removed."""
    found: list[str] = []
    for block in blocks(page, "bash"):
        pending = ""
        for line in block.splitlines(keepends=True):
            pending += line
            try:
                shlex.split(pending.replace("\\\n", " "), comments=True)
            except ValueError:  # a quote is open
                continue
            if not pending.endswith("\\\n"):
                found.append(pending.replace("\\\n", " ").strip())
                pending = ""
        assert not pending.strip(), f"{page}: an unfinished command: {pending}"
    return [command for command in found if command.startswith(f"{program} ")]


class Request(Struct, frozen=True, kw_only=True):
    method: str
    url: str
    headers: dict[str, str]
    body: str | None
    streams: bool


def curl_request(command: str, variables: dict[str, str]) -> Request:
    """What a simple curl command sends. An option that is not known here fails, so that no example goes unchecked."""
    words = shlex.split(_filled(command, variables), comments=True)
    assert words.pop(0) == "curl"
    method, url, body, streams = "", "", None, False
    headers: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = words.pop(0)
        elif re.fullmatch(r"-[sN]+", word):
            streams = streams or "N" in word
        elif word.startswith("-"):
            raise AssertionError(f"this test does not know the option {word} of: {command}")
        else:
            assert not url, f"two addresses in: {command}"
            url = word
    return Request(
        method=method or ("GET" if body is None else "POST"), url=url, headers=headers, body=body, streams=streams
    )


def _filled(text: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    left = re.search(r"\$[A-Z]\w*", text)
    assert left is None, f"nobody gives {left.group()} a value in: {text}" if left else ""
    return text


def ids(pages: tuple[str, ...], program: str) -> list[tuple[str, str]]:
    return [(page, command) for page in pages for command in commands(page, program)]


# --- python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PYTHON_PAGES)
async def test_the_python_examples_run_as_they_stand(page: str, stack: Stack, tmp_path: Path) -> None:
    examples = blocks(page, "python")
    assert len(examples) == 1
    api = urlsplit(stack.api)
    script = tmp_path / "example.py"
    text = examples[0].replace("127.0.0.1:9300", api.netloc).replace("127.0.0.1:7233", stack.addresses.temporal)
    script.write_text(text)
    # Not in our directory: an example uses what a user has installed, no module of ours.
    output = await _run([sys.executable, "-I", str(script)], cwd=tmp_path)
    assert EXPECTED_OUTPUT[page] in output


async def _run(command: list[str], *, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "EVERRUNS_"))}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(EXAMPLE_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


# --- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", CURL_PAGES)
async def test_the_curl_examples_are_accepted(page: str, stack: Stack) -> None:
    examples = commands(page, "curl")
    assert examples
    model = (await stack.client.get("models")).json()["data"][0]
    origin = f"http://{urlsplit(stack.api).netloc}"
    workspace = (await stack.client.post("workspaces", json={"name": "examples"})).json()["id"]
    memory = (await stack.client.post("memories", json={"name": f"examples of {page}"})).json()["id"]
    for command in examples:
        # Each in a session of its own: some scripts of llmsim run until they are cancelled.
        session = await _new_session(stack)
        values = {
            "API": f"{origin}/api/v1",
            "SESSION": session,
            "MODEL": model["id"],
            "PROVIDER": model["provider_id"],
            "WORKSPACE": workspace,
            "MEMORY": memory,
        }
        request = curl_request(command, values)
        url = request.url.replace("http://127.0.0.1:9300", origin)
        if request.streams:
            async with stack.client.stream(request.method, url, headers=request.headers) as response:
                assert response.status_code == 200, command
                first = await anext(response.aiter_lines())
                assert first == "event: connected"
            continue
        answer = await stack.client.request(request.method, url, headers=request.headers, content=request.body)
        assert answer.is_success, f"{command}\n{answer.status_code} {answer.text}"
        if url.endswith("/messages") and request.body:
            await stack.wait_for_event(session, "turn.started")
            await stack.cancel(session)


async def _new_session(stack: Stack) -> str:
    return await stack.create_session(capabilities=CAPABILITIES)


def test_commands_are_found_over_lines_and_quotes() -> None:
    found = commands("docs/llmsim.md", "curl")
    assert len(found) > 8
    assert all(curl_request(command, {"API": "a", "SESSION": "s", "MODEL": "m"}).url for command in found)


def test_an_example_with_an_option_nobody_checks_is_noticed() -> None:
    with pytest.raises(AssertionError, match="--fail"):
        curl_request("curl --fail http://example.invalid", {})
    with pytest.raises(AssertionError, match="WHAT"):
        curl_request("curl $WHAT", {})


# --- temporal ---------------------------------------------------------------------------------------------------------


async def test_the_temporal_commands_run_in_their_order(stack: Stack) -> None:
    session = await _new_session(stack)
    examples = commands("docs/temporal.md", "temporal")
    assert len(examples) > 8
    outputs: dict[str, str] = {}
    for command in examples:
        words = shlex.split(_filled(command, {"SESSION": session}), comments=True)[1:]
        if "signal-with-start" in words and outputs:
            # The follow-up's turn, to which the story's script applies as well, would take another 20 seconds.
            await stack.wait_for_event(session, "turn.started", 2)
            await stack.cancel(session)
            await stack.idle(session)
        outputs[command] = await _run([str(find_program()), "--address", stack.addresses.temporal, *words])
    shown = "\n".join(outputs.values())
    assert '"phase":"reasoning"' in shown
    assert "steered:true" in shown
    types = [event.type for event in await stack.read_log(session)]
    assert types.count("turn.started") == types.count("turn.cancelled") + types.count("turn.completed")
    assert "turn.cancelled" in types


async def test_the_filters_of_the_web_ui_find_turns(stack: Stack) -> None:
    session = await _new_session(stack)
    await stack.post_message(session, "hello", llmsim={"mode": "lorem", "tokens": 50, "inter_token_delay_ms": 20})
    await stack.idle(session)
    client = await stack.temporal()
    query = f"WorkflowType = 'Turn' AND WorkflowId = '{session}' AND EverrunsTurnStatus = 'completed'"
    async with asyncio.timeout(EXAMPLE_SECONDS):
        # Visibility is updated a moment after the run has ended.
        while not [run async for run in client.list_workflows(query)]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # nothing announces it
