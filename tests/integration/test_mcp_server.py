"""Our MCP server at `/mcp`, driven by the MCP package's own client in both revisions of the protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import mcp_types as types
import msgspec
import pytest
from mcp import Client

from tests.stack import Json, Stack, of_type

Mode = Literal["legacy", "2026-07-28"]
MODES: tuple[Mode, ...] = ("legacy", "2026-07-28")


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


@pytest.fixture
def url(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return f"http://{urlsplit(stack.api).netloc}/mcp"


async def call(url: str, name: str, *, mode: Mode = "2026-07-28", **arguments: object) -> Json:
    """The decoded result of a tool; its error as `{"error": text}`."""
    async with Client(url, mode=mode) as client:
        result = await client.call_tool(name, arguments)
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    return {"error": content.text} if result.is_error else msgspec.json.decode(content.text)


async def make_agent(stack: Stack, name: str, **more: object) -> Json:
    body = {"name": name, "system_prompt": "You are helpful.", **more}
    answer = await stack.client.post("agents", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


@pytest.mark.parametrize("mode", MODES)
async def test_the_tools_are_listed_with_schemas(url: str, mode: Mode) -> None:
    async with Client(url, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"agent_run", "session_send_message", "session_get_status", "discover", "query"}
    assert tools["agent_run"].input_schema["required"] == ["agent", "message"]
    assert [name for name, tool in tools.items() if tool.annotations and tool.annotations.read_only_hint] == [
        "session_get_status",
        "discover",
        "query",
    ]


@pytest.mark.parametrize("mode", MODES)
async def test_an_agent_is_run_and_gone_on_with(stack: Stack, url: str, mode: Mode) -> None:
    agent = await make_agent(stack, f"helper-{mode.replace('.', '-')}")
    run = await call(url, "agent_run", mode=mode, agent=agent["name"], message="Good morning")
    assert (run["status"], bool(run["answer"])) == ("completed", True)
    session = str(run["session_id"])
    again = await call(url, "session_send_message", mode=mode, session_id=session, message="And good night")
    assert (again["session_id"], again["status"]) == (session, "completed")
    assert len(of_type(await stack.check(session), "turn.completed")) == 2
    status = await call(url, "session_get_status", mode=mode, session_id=session)
    assert (status["status"], status["last_turn"]) == ("idle", {"status": "completed", "error": None})


async def test_progress_tells_which_tools_run(stack: Stack, url: str) -> None:
    session = await stack.create_session(capabilities=[{"ref": "test_faults"}, {"ref": "current_time"}])
    first: Json = {"id": "call_a", "name": "test_sleep", "arguments": {"seconds": 3}}
    second: Json = {"id": "call_b", "name": "get_current_time", "arguments": {}}
    script = {"mode": "script", "turns": [{"tool_calls": [first]}, {"tool_calls": [second]}, {"text": "Done."}]}
    await stack.post_message(session, "go", llmsim=script)
    await stack.wait_for_event(session, "tool.started")
    seen: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append(message)

    async with Client(url) as client:  # the message steers the running turn, which reads it before the second tool
        arguments = {"session_id": session, "message": "hurry"}
        result = await client.call_tool("session_send_message", arguments, progress_callback=on_progress)
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    assert msgspec.json.decode(content.text) == {"session_id": session, "status": "completed", "answer": "Done."}
    assert seen == ["get_current_time …"]
    assert len(of_type(await stack.check(session), "turn.completed")) == 1


async def test_a_session_that_waits_for_a_person_says_what_for(stack: Stack, url: str) -> None:
    session = await stack.create_session(capabilities=[{"ref": "session_storage"}, {"ref": "tool_approval"}])
    wanted: Json = {"id": "call_a", "name": "kv_store", "arguments": {"operation": "set", "key": "a", "value": "1"}}
    await stack.post_message(
        session, "go", llmsim={"mode": "script", "turns": [{"tool_calls": [wanted]}, {"text": "Done."}]}
    )
    await stack.wait_for_event(session, "tool.call_requested")
    status = await call(url, "session_get_status", session_id=session)
    assert status["status"] == "waitingfortoolresults"
    waiting: Any = status["waiting"]
    assert waiting["waiting"][0]["tool_call"]["id"] == "call_a"


async def test_a_turn_that_takes_longer_goes_on_by_itself(stack: Stack, url: str) -> None:
    agent = await make_agent(stack, "slow")
    run = await call(url, "agent_run", agent=agent["name"], message="x", wait_seconds=0)
    assert run["status"] == "running"
    await stack.idle(str(run["session_id"]))


async def test_what_can_be_read_is_found_and_read(stack: Stack, url: str) -> None:
    found: Any = await call(url, "discover", search="session messages")
    assert "/v1/sessions/{session_id}/messages" in [one["path"] for one in found["operations"]]
    everything: Any = await call(url, "discover")
    assert len(everything["operations"]) > 30
    assert not [one for one in everything["operations"] if one["path"].endswith("/sse")]
    agent = await make_agent(stack, "findable")
    read: Any = await call(url, "query", path="/v1/agents", parameters={"search": "findable"})
    assert [one["id"] for one in read["data"]] == [agent["id"]]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/agents/../../mcp", "discover"),
        ("/v1/agents/%2e%2e/%2e%2e/health", "discover"),
        ("http://169.254.169.254/v1/latest", "discover"),
        ("//evil.example/v1/agents", "discover"),
        ("/health", "discover"),
        ("/v1/agents?search=x", "parameters"),
        ("/v1/sessions/session_00000000000000000000000000000000/sse", "Streams"),
        ("/v1/agents/agent_nobody", "not"),
        ("/v1/no/such/thing", "Not"),
    ],
)
async def test_a_query_reads_the_api_and_nothing_else(url: str, path: str, words: str) -> None:
    assert words.lower() in str((await call(url, "query", path=path))["error"]).lower()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("agent_run", {"agent": "nobody-has-this-name", "message": "x"}, "agent"),
        ("agent_run", {"agent": "a/../../sessions", "message": "x"}, "slash"),
        ("session_get_status", {"session_id": "../agents/x"}, "slash"),
        ("agent_run", {"message": "x"}, "agent"),
        ("agent_run", {"agent": "a", "message": ""}, "message"),
        ("agent_run", {"agent": "a", "message": "x", "wait_seconds": 1e9}, "wait_seconds"),
        ("session_send_message", {"session_id": "session_x", "message": "x"}, "session"),
        ("session_get_status", {"session_id": "session_" + "0" * 32}, "session"),
        ("rm", {}, "no tool"),
    ],
)
async def test_a_call_that_cannot_be_done_is_answered_with_what_is_wrong(
    url: str, name: str, arguments: Json, words: str
) -> None:
    async with Client(url) as client:
        result = await client.call_tool(name, arguments)
    assert result.is_error
    assert words in str(result.content[0]).lower()


async def test_pages_of_strangers_are_kept_out(url: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"accept": "application/json, text/event-stream"}
    async with httpx.AsyncClient(trust_env=False) as client:
        refused = await client.post(url, json=body, headers={**headers, "origin": "https://evil.example"})
        rebound = await client.post(url, json=body, headers={**headers, "origin": "http://127.0.0.1.evil.example:9300"})
        elsewhere = await client.post(url, json=body, headers={**headers, "x-org-id": "org_other"})
    assert (refused.status_code, rebound.status_code, elsewhere.status_code) == (403, 403, 404)


async def test_malformed_requests_are_refused(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for content in (b"", b"{", b"[]", b"x" * 5_000_000):
            answer = await client.post(url, content=content, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, content[:10]
