"""MCP tools in whole turns: on workers, over a crash, and with a person who is asked in the middle of a call."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from tests.fakes.mcp_servers import Seen, helper
from tests.stack import Json, Stack, of_type

SECRET = "sk-very-secret-value"


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(no_worker=True, environment={"MCP_ALLOW_PRIVATE_HOSTS": "127.0.0.1"}) as running:
        await running.start_worker()
        yield running


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with helper(Seen()) as address:
        yield address


def script(*turns: Json) -> Json:
    return {"mode": "script", "turns": list(turns)}


def calling(name: str, call_id: str = "call_1", **arguments: object) -> Json:
    return {"tool_calls": [{"id": call_id, "name": name, "arguments": arguments}]}


async def answer(stack: Stack, session: str, **fields: object) -> httpx.Response:
    return await stack.client.post(f"sessions/{session}/elicitation-answers", json=fields)


async def asked(stack: Stack, url: str, name: str = "docs") -> str:
    """A session whose turn waits for a person's answer to a server."""
    session = await stack.create_session(mcpServers={name: {"url": url}})
    await stack.post_message(
        session, "go", llmsim=script(calling(f"mcp_{name}__book", hotel="Ritz"), {"text": "Done."})
    )
    await stack.wait_for_event(session, "tool.call_requested")
    return session


def results(log: list[Json] | object) -> str:
    return msgspec.json.encode([one["result"] for one in of_type(log, "tool.completed")]).decode()  # type: ignore[arg-type]


async def test_a_server_of_the_organization_and_a_scoped_one_serve_the_same_turn(stack: Stack, url: str) -> None:
    created = await stack.client.post("mcp-servers", json={"name": "org", "url": url, "api_key": SECRET})
    assert created.status_code == 201, created.text
    session = await stack.create_session(
        capabilities=[{"ref": f"mcp:{created.json()['id'].removeprefix('mcp_')}"}],
        mcpServers={"own": {"url": url, "headers": {"X-Key": SECRET}}},
    )
    turns = script(calling("mcp_org__add", "c1", a=1, b=2), calling("mcp_own__add", "c2", a=3, b=4), {"text": "Done."})
    await stack.post_message(session, "go", llmsim=turns)
    await stack.idle(session)
    log = await stack.check(session)
    assert [one["success"] for one in of_type(log, "tool.completed")] == [True, True]
    assert '"3"' in results(log)
    assert '"7"' in results(log)
    stored = await stack.pool.fetchval(
        "SELECT string_agg(row_to_json(t)::text, '') FROM turns t WHERE session_id = $1",
        session.removeprefix("session_"),
    )
    assert SECRET not in stored + msgspec.json.encode(log).decode()


async def test_a_question_is_answered_after_its_worker_was_killed(stack: Stack, url: str) -> None:
    session = await asked(stack, url)
    (requested,) = of_type(await stack.read_log(session), "tool.call_requested")
    (waiting,) = requested["waiting"]  # type: ignore[misc]
    assert waiting["kind"] == "elicitation"
    assert waiting["request"]["message"] == "How many nights?"
    await stack.kill(stack.workers[-1])
    await stack.start_worker()
    wrong = await answer(stack, session, action="accept", content={"nights": "three"})
    assert (wrong.status_code, wrong.json()["field"]) == (400, "content")
    assert (await answer(stack, session, action="accept")).status_code == 400
    assert (await answer(stack, session, action="decline", content={"nights": 1})).status_code == 400
    unknown = await answer(stack, session, action="decline", tool_call_id="call_x")
    assert (unknown.status_code, unknown.json()["field"]) == (400, "tool_call_id")
    taken = await answer(stack, session, action="accept", content={"nights": 3})
    assert (taken.status_code, taken.json()) == (200, {"tool_call_id": "call_1", "status": "active"})
    await stack.idle(session)
    log = await stack.check(session)
    assert "Ritz: accept 3" in results(log)
    late = await answer(stack, session, action="decline", tool_call_id="call_1")
    assert (late.status_code, late.json()["code"]) == (409, "not_waiting_for_answers")


async def test_a_declined_question_ends_the_call_as_the_server_decides(stack: Stack, url: str) -> None:
    session = await asked(stack, url)
    assert (await answer(stack, session, action="decline", tool_call_id="call_1")).json()["status"] == "active"
    await stack.idle(session)
    assert "Ritz: decline 0" in results(await stack.check(session))


async def test_an_answer_to_nobody_is_refused(stack: Stack) -> None:
    session = await stack.create_session()
    refused = await answer(stack, session, action="decline")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_waiting_for_answers")


async def test_a_dead_server_fails_no_turn(stack: Stack) -> None:
    session = await stack.create_session(mcpServers={"dead": {"url": "http://127.0.0.1:9/mcp"}})
    await stack.post_message(session, "go", llmsim=script(calling("mcp_dead__add", a=1), {"text": "Done."}))
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, "turn.completed")) == 1
    assert [one["success"] for one in of_type(log, "tool.completed")] == [False]
