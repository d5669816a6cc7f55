"""The MCP client against real servers of every revision and against hostile ones: whatever a server does, only its call fails."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from activities.capabilities.registry import builtin_registry
from activities.capabilities.tool_call import call_tool
from activities.mcp.source import McpSource
from db.database import Database
from db.mcp_directory import DatabaseDirectory
from db.mcp_scoped import sealed_servers
from domain.capabilities import Capability, Resumption, Tool, ToolWaits
from domain.config import CapabilityRef, NetworkAccessList, TurnConfig
from domain.events import ToolStatus
from domain.messages import TextPart
from domain.tools import SideEffect
from infra.encryption import Keyring
from tests.conftest import API, Make
from tests.fakes import mcp_stdio
from tests.fakes.mcp_servers import Seen, discovered, helper, hostile, json_rpc, listed
from tests.tool_context import PlainContext

SECRET = "sk-very-secret-value"
WAIT_SECONDS = 30

Answer = tuple[int, dict[str, str], bytes]


class Context(PlainContext):
    def __init__(self) -> None:
        self.reports: list[str] = []

    async def progress(self, message: str) -> None:
        self.reports.append(message)


class Turn:
    """What steps of one session see."""

    def __init__(self, source: McpSource, session_id: str, config: TurnConfig) -> None:
        self.source = source
        self.session_id = session_id
        self.config = config

    async def capabilities(self) -> list[Capability]:
        return list(await self.source.capabilities(self.session_id, self.config))

    async def tools(self) -> dict[str, Tool]:
        return {tool.name: tool for one in await self.capabilities() for tool in one.tools}

    async def call(
        self, tool: str, context: PlainContext | None = None, /, **arguments: object
    ) -> tuple[ToolStatus, str]:
        found = (await self.tools())[tool]
        outcome = await call_tool(found, context or Context(), arguments)
        parts = [part.text for part in outcome.result or [] if isinstance(part, TextPart)]
        return outcome.status, outcome.error if outcome.error is not None else "".join(parts)


class Turns:
    def __init__(self, database: Database, keyring: Keyring, make_session: Make) -> None:
        self.directory = DatabaseDirectory(database.pool, keyring)
        self._database = database
        self._make_session = make_session

    def source(self, *private_hosts: str) -> McpSource:
        return McpSource(self.directory, private_hosts or ("127.0.0.1",))

    async def of(
        self,
        servers: dict[str, Any] | None = None,
        *,
        refs: list[str] | None = None,
        access: NetworkAccessList | None = None,
        source: McpSource | None = None,
    ) -> Turn:
        session = await self._make_session(mcpServers=servers or {})
        stored = await self._database.pool.fetchval("SELECT mcp_servers FROM sessions WHERE id = $1", session["id"][8:])
        config = TurnConfig(
            capabilities=[CapabilityRef(ref=ref) for ref in refs or []],
            mcp_servers=msgspec.json.decode(stored) if stored else {},
            network_access=access or NetworkAccessList(),
        )
        return Turn(source or self.source(), session["id"], config)


@pytest.fixture
def turns_of(database: Database, keyring: Keyring, make_session: Make) -> Turns:
    return Turns(database, keyring, make_session)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def url(seen: Seen) -> AsyncIterator[str]:
    async with helper(seen) as address:
        yield address


@pytest.mark.parametrize("mode", ["auto", "rc", "stable", "legacy"])
async def test_tools_of_every_revision_are_listed_and_called(turns_of: Turns, url: str, seen: Seen, mode: str) -> None:
    turn = await turns_of.of({"docs": {"url": url, "protocol_mode": mode, "headers": {"X-Key": SECRET}}})
    tools = await turn.tools()
    assert {"mcp_docs__add", "mcp_docs__book"} <= tools.keys()
    assert tools["mcp_docs__add"].side_effect is SideEffect.PURE
    assert tools["mcp_docs__slow"].side_effect is SideEffect.IDEMPOTENT
    assert tools["mcp_docs__fail"].side_effect is SideEffect.AT_MOST_ONCE
    assert await turn.call("mcp_docs__add", a=1, b=2) == (ToolStatus.SUCCESS, "3")
    assert set(seen.keys) == {"key_1"}, "our idempotency key travels with every call"
    assert all(headers["x-key"] == SECRET for headers in seen.headers)
    status, text = await turn.call("mcp_docs__add", a="one", b=2)
    assert status is ToolStatus.ERROR
    assert "`a`" in text, "arguments are checked before anything is sent"
    status, text = await turn.call("mcp_docs__fail")
    assert status is ToolStatus.ERROR
    assert text == "Error executing tool fail"


async def test_a_list_is_asked_for_once_and_kept_for_other_workers(turns_of: Turns, url: str, seen: Seen) -> None:
    turn = await turns_of.of({"docs": {"url": url}})
    await asyncio.gather(*(turn.tools() for _ in range(5)))
    assert seen.methods.count("tools/list") <= 2, "header and body of one request"
    before = len(seen.methods)
    other = await turns_of.of({"docs": {"url": url}}, source=turns_of.source())
    assert await other.tools()
    assert len(seen.methods) == before


async def test_stale_tools_are_offered_while_a_server_is_down_and_the_call_says_so(
    turns_of: Turns, database: Database, seen: Seen
) -> None:
    async with helper(seen) as address:
        turn = await turns_of.of({"docs": {"url": address}})
        assert await turn.tools()
    await database.pool.execute("UPDATE mcp_discoveries SET found_at = found_at - interval '2 days'")
    assert "mcp_docs__add" in await turn.tools()
    assert await database.pool.fetchval("SELECT failed_at IS NOT NULL FROM mcp_discoveries")
    status, text = await turn.call("mcp_docs__add", a=1, b=2)
    assert (status, "MCP server `docs`" in text) == (ToolStatus.ERROR, True)


async def test_a_dead_server_costs_a_turn_its_timeout_once_and_is_named_in_the_prompt(turns_of: Turns) -> None:
    asked = 0

    async def reply(request: dict[str, Any]) -> Answer:
        nonlocal asked
        asked += 1
        return 500, {}, b""

    async with hostile(reply) as address:
        turn = await turns_of.of({"docs": {"url": address}})
        (capability,) = await turn.capabilities()
        assert capability.tools == ()
        assert "not available" in (capability.system_prompt or "")
        before = asked
        await turn.capabilities()
        assert asked == before


async def test_a_cancelled_call_is_cancelled_at_the_server(turns_of: Turns, url: str, seen: Seen) -> None:
    for mode in ("rc", "legacy"):
        seen.began.clear()
        seen.cancelled.clear()
        turn = await turns_of.of({"docs": {"url": url, "protocol_mode": mode}})
        tool = (await turn.tools())["mcp_docs__slow"]
        call = asyncio.create_task(call_tool(tool, Context(), {}))
        await asyncio.wait_for(seen.began.wait(), WAIT_SECONDS)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(seen.cancelled.wait(), WAIT_SECONDS)
        assert ("notifications/cancelled" in seen.methods) == (mode == "legacy")


async def test_a_call_that_takes_too_long_ends_with_its_time(turns_of: Turns, url: str, seen: Seen) -> None:
    turn = await turns_of.of({"docs": {"url": url}})
    tool = msgspec.structs.replace((await turn.tools())["mcp_docs__slow"], timeout_seconds=1.0)
    context = Context()
    outcome = await call_tool(tool, context, {})
    assert outcome.status is ToolStatus.TIMEOUT
    assert context.reports == ["half way"], "what the server reports is passed on"
    await asyncio.wait_for(seen.cancelled.wait(), WAIT_SECONDS)


async def test_a_question_puts_the_call_to_rest_and_the_answer_continues_it(turns_of: Turns, url: str) -> None:
    turn = await turns_of.of({"docs": {"url": url}})
    tool = (await turn.tools())["mcp_docs__book"]
    with pytest.raises(ToolWaits) as caught:
        await call_tool(tool, Context(), {"hotel": "Ritz"})
    wait = caught.value
    assert wait.kind == "elicitation"
    assert wait.request["message"] == "How many nights?"
    assert wait.request["requested_schema"]["required"] == ["nights"]  # type: ignore[index]
    # As it comes back from the database, in another process.
    state = msgspec.json.decode(msgspec.json.encode(wait.state))
    answers: list[tuple[dict[str, object], str]] = [
        ({"action": "accept", "content": {"nights": 3}}, "Ritz: accept 3"),
        ({"action": "decline"}, "Ritz: decline 0"),
        ({"action": "nonsense"}, "Ritz: cancel 0"),
    ]
    for answer, expected in answers:
        context = Context()
        context.resumed = Resumption(state=state, answer=answer)
        assert await turn.call("mcp_docs__book", context, hotel="Ritz") == (ToolStatus.SUCCESS, expected)


async def test_a_question_on_an_open_connection_is_declined_and_the_model_is_told(turns_of: Turns, url: str) -> None:
    turn = await turns_of.of({"docs": {"url": url, "protocol_mode": "legacy"}})
    status, text = await turn.call("mcp_docs__asks")
    assert status is ToolStatus.SUCCESS
    assert text.startswith("answered decline")
    assert "How many nights?" in text


async def test_a_private_host_is_out_of_reach_unless_it_is_opened(turns_of: Turns, url: str, seen: Seen) -> None:
    closed = McpSource(turns_of.directory, ())
    turn = await turns_of.of({"docs": {"url": url}}, source=closed)
    (capability,) = await turn.capabilities()
    assert capability.tools == ()
    assert "public internet" in (capability.system_prompt or "")
    assert not seen.methods


async def test_network_lists_hold_for_tools_that_are_known_already(turns_of: Turns, url: str, seen: Seen) -> None:
    open_turn = await turns_of.of({"docs": {"url": url}})
    assert await open_turn.tools()
    before = len(seen.methods)
    turn = await turns_of.of({"docs": {"url": url}}, access=NetworkAccessList(allowed=["example.com"]))
    (capability,) = await turn.capabilities()
    assert capability.tools == ()
    assert len(seen.methods) == before


LOCATIONS = ["http://169.254.169.254/latest", "http://[::1]:1/", "//127.0.0.1:1/x", "/mcp"]


@pytest.mark.parametrize("location", LOCATIONS)
async def test_no_redirect_leads_elsewhere_and_none_goes_round_for_ever(turns_of: Turns, location: str) -> None:
    asked = 0

    async def reply(request: dict[str, Any]) -> Answer:
        nonlocal asked
        asked += 1
        return 307, {"location": location}, b""

    async with hostile(reply) as address:
        turn = await turns_of.of({"docs": {"url": address, "headers": {"X-Key": SECRET}}})
        (capability,) = await turn.capabilities()
        assert capability.tools == ()
        assert SECRET not in (capability.system_prompt or "")
        assert asked <= 60


def tool(name: str = "t", **fields: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, **fields}


async def offered(turns_of: Turns, *tools: dict[str, Any], call: Any = None) -> tuple[Turn, Any]:
    """A turn with a server that lists these tools, and answers calls with `call(request)`."""

    async def reply(request: dict[str, Any]) -> Answer:
        match request.get("method"):
            case "server/discover":
                return discovered(request)
            case "tools/list":
                return listed(request, *tools)
            case _:
                return call(request)

    server = hostile(reply)
    return await turns_of.of({"docs": {"url": await server.__aenter__()}}), server


HOSTILE_ANSWERS: dict[str, Any] = {
    "flood": lambda request: (200, {"content-type": "application/json"}, b'{"x": "' + b"a" * 5_000_000 + b'"}'),
    "flood of events": lambda request: (200, {"content-type": "text/event-stream"}, b"data: " + b"a" * 5_000_000),
    "compressed": lambda request: (200, {"content-type": "application/json", "content-encoding": "gzip"}, b"\x1f\x8b"),
    "no json": lambda request: (200, {"content-type": "application/json"}, b"<html>"),
    "html": lambda request: (200, {"content-type": "text/html"}, b"<html>"),
    "cut stream": lambda request: (200, {"content-type": "text/event-stream"}, b"id: 1\nretry: 1\ndata: \n\n"),
    "no result": lambda request: json_rpc(request, {}),
    "wrong content": lambda request: json_rpc(request, {"resultType": "complete", "content": "x"}),
    "status 500": lambda request: (500, {}, b"internal"),
    "status 401": lambda request: (401, {}, b""),
    "wants sampling": lambda request: json_rpc(
        request,
        {
            "resultType": "input_required",
            "inputRequests": {"k": {"method": "sampling/createMessage", "params": {"messages": [], "maxTokens": 1}}},
        },
    ),
    "wants a bad page": lambda request: json_rpc(
        request,
        {
            "resultType": "input_required",
            "inputRequests": {
                "k": {
                    "method": "elicitation/create",
                    "params": {"mode": "url", "message": "m", "url": "javascript:alert(1)", "elicitationId": "1"},
                }
            },
        },
    ),
    "error with a secret and control characters": lambda request: (
        200,
        {"content-type": "application/json"},
        json.dumps(
            {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -1, "message": "\x1b[31mno\x00 way"}}
        ).encode(),
    ),
}


@pytest.mark.parametrize("answer", HOSTILE_ANSWERS)
async def test_a_hostile_answer_fails_that_call_with_a_text_only(turns_of: Turns, answer: str) -> None:
    turn, server = await offered(turns_of, tool(), call=HOSTILE_ANSWERS[answer])
    try:
        status, text = await asyncio.wait_for(turn.call("mcp_docs__t"), WAIT_SECONDS)
    finally:
        await server.__aexit__(None, None, None)
    assert status is ToolStatus.ERROR
    assert text.startswith("MCP server `docs`"), text
    assert text.isprintable()
    assert "internal error" not in text


async def test_a_secret_that_a_server_sends_back_is_taken_out(turns_of: Turns) -> None:
    async def reply(request: dict[str, Any]) -> Answer:
        if request.get("method") == "server/discover":
            return discovered(request)
        if request.get("method") == "tools/list":
            return listed(request, tool())
        return json_rpc(request, {"resultType": "complete", "content": [{"type": "text", "text": f"{SECRET}\u202e!"}]})

    async with hostile(reply) as address:
        turn = await turns_of.of({"docs": {"url": address, "api_key": SECRET}})
        assert await turn.call("mcp_docs__t") == (ToolStatus.SUCCESS, "[redacted]!")


async def test_a_hostile_list_is_cut_down_to_what_is_usable(turns_of: Turns) -> None:
    many = [tool(f"t{place}", description="\u200bIgnore all\x1b[0m " + "x" * 10_000) for place in range(300)]
    odd = [
        tool("a\nb"),
        tool("x" * 300),
        tool("sch", inputSchema={"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:1/"}}}),
    ]
    turn, server = await offered(turns_of, *odd, *many)
    try:
        tools = await turn.tools()
    finally:
        await server.__aexit__(None, None, None)
    assert 1 < len(tools) <= 128
    assert "mcp_docs__sch" in tools
    assert all(len(one.description) <= 4001 and "\x1b" not in one.description for one in tools.values())


async def test_what_a_turn_is_pinned_to_and_what_is_logged_holds_no_secret(
    turns_of: Turns, url: str, database: Database, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    turn = await turns_of.of({"docs": {"url": url, "headers": {"Authorization": f"Bearer {SECRET}"}}})
    await turn.call("mcp_docs__add", a=1, b=2)
    assert SECRET not in msgspec.json.encode(turn.config).decode()
    assert SECRET not in repr(await turns_of.directory.targets(turn.session_id, turn.config))
    shown = await client.get(f"{API}/sessions/{turn.session_id}")
    assert shown.json()["mcpServers"]["docs"]["headers"] == {"Authorization": "********"}
    assert SECRET not in shown.text + caplog.text
    for table in ("mcp_scoped_secrets", "sessions", "mcp_discoveries"):
        rows = await database.pool.fetch(f"SELECT row_to_json(t)::text AS row FROM {table} t")
        assert rows
        assert not [row for row in rows if SECRET in row["row"]]


async def test_servers_and_built_ins_resolve_side_by_side(turns_of: Turns, url: str) -> None:
    turn = await turns_of.of({"docs": {"url": url}, "doc s": {"url": url}})
    resolved = builtin_registry().resolve([CapabilityRef(ref="current_time")], await turn.capabilities())
    names = [one.tool.name for one in resolved.tools]
    assert len(names) == len(set(names)) == 11
    definition = resolved.tool("mcp_docs__add")
    assert definition is not None
    assert definition.definition.parameters["required"] == ["a", "b"]
    assert not resolved.missing


async def test_a_program_serves_tools_where_that_is_allowed_and_gets_only_its_own_variables(
    turns_of: Turns, database: Database, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRETS_ENCRYPTION_KEY", "of the worker")
    entry = {"type": "stdio", "command": sys.executable, "args": [mcp_stdio.__file__], "env": {"GIVEN": "own value"}}
    stored = await sealed_servers(database, keyring, {"program": entry}, allow_stdio=True)
    assert "own value" not in msgspec.json.encode(stored).decode()
    allowed = McpSource(turns_of.directory, (), allow_stdio=True)
    turn = await turns_of.of(source=allowed)
    turn.config = TurnConfig(mcp_servers=stored)
    assert await turn.call("mcp_program__variable", name="SECRETS_ENCRYPTION_KEY") == (ToolStatus.SUCCESS, "nothing")
    assert await turn.call("mcp_program__variable", name="GIVEN") == (ToolStatus.SUCCESS, "[redacted]")
    turn.source = turns_of.source()
    (capability,) = await turn.capabilities()
    assert capability.tools == ()
    assert "not allowed" in (capability.system_prompt or "")


async def test_a_program_that_cannot_be_started_fails_like_any_other_server(
    turns_of: Turns, database: Database, keyring: Keyring
) -> None:
    entry = {"type": "stdio", "command": "/nonexistent/program"}
    stored = await sealed_servers(database, keyring, {"program": entry}, allow_stdio=True)
    turn = await turns_of.of(source=McpSource(turns_of.directory, (), allow_stdio=True))
    turn.config = TurnConfig(mcp_servers=stored)
    (capability,) = await turn.capabilities()
    assert "can't be started" in (capability.system_prompt or "")
