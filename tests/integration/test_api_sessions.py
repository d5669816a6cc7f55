"""`/v1/sessions`: creation in one transaction, what a client sees of a session, and its end."""

from __future__ import annotations

import httpx
import pytest
from litestar import Litestar

from api.services import Services
from db.database import Database
from db.event_log import EventLog
from domain.errors import DependencyUnavailable
from domain.events import InputMessage, NewEvent, OutputMessageCompleted
from domain.ids import Prefix, new_id, parse_id
from domain.messages import Message, Role, TextPart

API = "/api/v1"
SESSIONS = f"{API}/sessions"
GENERIC = "harness_01980000000070008000000000000202"
BASE = "harness_01980000000070008000000000000201"
MODEL = "model_01980000000070008000000000000102"


async def set_state(database: Database, session: dict, **columns: object) -> None:
    assignments = ", ".join(f"{column} = ${place}" for place, column in enumerate(columns, 2))
    await database.pool.execute(
        f"UPDATE session_state SET {assignments} WHERE session_id = $1",
        parse_id(Prefix.SESSION, session["id"]),
        *columns.values(),
    )


def message(role: Role, text: str) -> Message:
    return Message(
        id=new_id(Prefix.MESSAGE), role=role, content=[TextPart(text=text)], created_at="2026-01-01T00:00:00.000Z"
    )


async def test_an_empty_session_has_every_field_clients_insist_on(make_session, services: Services, publisher) -> None:
    session = await make_session()
    assert session["harness_id"] == GENERIC
    assert session["organization_id"] == "org_00000000000000000000000000000001"
    assert session["owner_principal_id"] == "principal_00000000000000000000000000000001"
    assert session["workspace_id"] == "wsp_" + session["id"].partition("_")[2]
    assert (session["status"], session["is_pinned"]) == ("started", False)
    assert session["features"] == ["file_system", "key_value", "secrets", "schedules"]
    assert session["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert session["capabilities"] == session["tools"] == session["tags"] == []
    events = await services.log.read(session["id"], after_sequence=0, limit=10)
    assert [event.type for event in events] == ["session.started"]
    assert [event.id for event in publisher.published] == [event.id for event in events]


async def test_a_session_is_served_as_it_was_created(client: httpx.AsyncClient, make_agent, make_session) -> None:
    agent = await make_agent(harness_name="base")
    sent = {
        "agent_name": "helper",
        "title": "Hello",
        "locale": "uk-UA",
        "model_id": MODEL,
        "system_prompt": "Be brief.",
        "capabilities": [{"ref": "test_math"}],
        "tools": [{"type": "client_side", "name": "ask", "description": "Asks", "parameters": {}}],
        "tags": ["a"],
        "hints": {"widgets": True},
        "max_iterations": 5,
        "mcp_servers": {"a": {"url": "https://example.com/mcp"}},
        "network_access": {"allowed": ["example.com"]},
        "parallel_tool_calls": True,
        "agent_identity_id": "identity_" + "a" * 32,
    }
    session = await make_session(**sent)
    assert (session["agent_id"], session["harness_id"]) == (agent["id"], BASE)
    assert session["mcpServers"] == sent["mcp_servers"]
    same = sent.keys() - {"agent_name", "mcp_servers"}
    assert {key: session[key] for key in same} == {key: sent[key] for key in same}
    assert (await client.get(f"{SESSIONS}/{session['id']}")).json() == session


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"harness_id": GENERIC, "harness_name": "base"}, 400, "harness_name"),
        ({"agent_id": "agent_" + "0" * 32, "agent_name": "x"}, 400, "agent_name"),
        ({"harness_id": "harness_" + "0" * 32}, 404, "harness_id"),
        ({"harness_name": "nope"}, 404, "harness_name"),
        ({"agent_id": "agent_" + "0" * 32}, 404, "agent_id"),
        ({"agent_name": "nope"}, 404, "agent_name"),
        ({"agent_id": "x"}, 400, "agent_id"),
        ({"model_id": "model_" + "0" * 32}, 400, "model_id"),
        ({"workspace_id": "wsp_" + "0" * 32}, 404, "workspace_id"),
        ({"locale": "not a locale"}, 400, "locale"),
        ({"capabilities": ["nope"]}, 400, "capabilities[0].ref"),
        ({"agent_identity_id": "me"}, 400, "agent_identity_id"),
        ({"title": "x" * 3000}, 400, "title"),
        ({"max_iterations": -1}, 400, "max_iterations"),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    client: httpx.AsyncClient, database: Database, body: dict, status: int, field: str
) -> None:
    response = await client.post(SESSIONS, json=body)
    assert (response.status_code, response.json().get("field")) == (status, field), response.text
    for table in ("sessions", "session_state", "workspaces", "events"):
        assert await database.pool.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_archived_agents_and_harnesses_take_no_new_sessions(
    client: httpx.AsyncClient, make_agent, make_harness, make_session
) -> None:
    harness = await make_harness()
    agent = await make_agent(harness_id=harness["id"])
    session = await make_session(agent_id=agent["id"])
    await client.delete(f"{API}/harnesses/{harness['id']}")
    for body in ({"harness_id": harness["id"]}, {"agent_id": agent["id"]}):
        response = await client.post(SESSIONS, json=body)
        assert (response.status_code, response.json()["code"]) == (409, "archived")
    await client.delete(f"{API}/agents/{agent['id']}")
    assert (await client.post(SESSIONS, json={"agent_id": agent["id"], "harness_id": GENERIC})).status_code == 409
    assert (await client.get(f"{SESSIONS}/{session['id']}")).json()["agent_id"] == agent["id"]


async def test_sessions_may_share_a_workspace(client: httpx.AsyncClient, make_session) -> None:
    first = await make_session()
    second = await make_session(workspace_id=first["workspace_id"])
    assert second["workspace_id"] == first["workspace_id"]
    assert second["id"] != first["id"]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("started", "started"),
        ("active", "active"),
        ("idle", "idle"),
        ("waiting_for_tool_results", "waitingfortoolresults"),
        ("paused", "idle"),
    ],
)
async def test_status_is_spelled_as_clients_accept_it(
    client: httpx.AsyncClient, make_session, database: Database, stored: str, shown: str
) -> None:
    session = await make_session()
    await set_state(database, session, status=stored)
    got = (await client.get(f"{SESSIONS}/{session['id']}")).json()
    assert got["status"] == shown
    assert ("cancel" in [action["rel"] for action in got["allowed_actions"]]) == (stored == "active")


async def test_totals_and_previews_come_from_the_state(client: httpx.AsyncClient, make_session, database) -> None:
    session = await make_session()
    await set_state(
        database, session, input_tokens=10, output_tokens=5, cache_read_tokens=3, preview="Hi", output_preview="Yes"
    )
    got = (await client.get(f"{SESSIONS}/{session['id']}")).json()
    assert got["usage"] == {"input_tokens": 10, "output_tokens": 5, "cache_read_tokens": 3}
    assert (got["preview"], got["output_preview"]) == ("Hi", "Yes")


async def test_the_list_is_newest_first_and_filters(client: httpx.AsyncClient, make_agent, make_session) -> None:
    agent = await make_agent()
    made = [await make_session(title=f"Talk {number}") for number in range(3)]
    mine = await make_session(agent_id=agent["id"], title="Own talk")

    async def ids(**query: str) -> list[str]:
        return [one["id"] for one in (await client.get(SESSIONS, params=query)).json()["data"]]

    assert await ids() == [mine["id"], *(one["id"] for one in reversed(made))]
    assert await ids(agent_id=agent["id"]) == [mine["id"]]
    assert await ids(agent_id="agent_" + "0" * 32) == []
    assert await ids(search="talk own") == [mine["id"]]
    assert await ids(search="%") == []
    page = (await client.get(SESSIONS, params={"limit": 1, "offset": 1, "search": "talk"})).json()
    assert (page["total"], len(page["data"])) == (4, 1)
    assert "search=talk" in page["next_url"]
    assert (await client.get(f"{SESSIONS}?agent_id=x")).status_code == 400


async def test_a_new_title_is_an_event(client: httpx.AsyncClient, make_session, services: Services) -> None:
    session = await make_session(title="Old", tags=["a"], locale="de")
    url = f"{SESSIONS}/{session['id']}"
    changed = (await client.patch(url, json={"title": "New"})).json()
    assert (changed["title"], changed["tags"], changed["locale"]) == ("New", ["a"], "de")
    assert changed["updated_at"] > session["updated_at"]
    await client.patch(url, json={"title": "New", "tags": ["b"]})
    cleared = (await client.patch(url, json={"title": None, "locale": None})).json()
    assert "title" not in cleared
    assert "locale" not in cleared
    events = await services.log.read(session["id"], after_sequence=1, limit=10)
    assert [event.data for event in events] == [
        b'{"title":"New","previous_title":"Old"}',
        b'{"title":"","previous_title":"New"}',
    ]
    assert (await client.patch(url, json={"locale": "?"})).status_code == 400


async def test_pins(client: httpx.AsyncClient, make_session) -> None:
    session = await make_session()
    url = f"{SESSIONS}/{session['id']}"
    headers = {"Content-Type": "application/json"}
    for pinned, method in ((True, client.put), (True, client.put), (False, client.delete), (False, client.delete)):
        assert (await method(f"{url}/pin", headers=headers)).status_code == 204
        assert (await client.get(url)).json()["is_pinned"] is pinned


async def test_deleting_hides_the_session_and_keeps_its_log(
    client: httpx.AsyncClient, make_session, services: Services, turns
) -> None:
    session = await make_session()
    url = f"{SESSIONS}/{session['id']}"
    assert (await client.delete(url)).status_code == 204
    assert turns.calls == []
    for response in (
        await client.get(url),
        await client.patch(url, json={"title": "x"}),
        await client.delete(url),
        await client.put(f"{url}/pin"),
        await client.get(f"{url}/export"),
    ):
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert (await client.get(SESSIONS)).json()["total"] == 0
    assert len(await services.log.read(session["id"], after_sequence=0, limit=10)) == 1


@pytest.mark.parametrize("status", ["active", "waiting_for_tool_results"])
async def test_deleting_a_busy_session_stops_its_turn_first(
    client: httpx.AsyncClient, make_session, database: Database, turns, status: str
) -> None:
    session = await make_session()
    await set_state(database, session, status=status)
    url = f"{SESSIONS}/{session['id']}"
    turns.failure = DependencyUnavailable()
    refused = await client.delete(url)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert (await client.get(url)).status_code == 200
    turns.failure = None
    assert (await client.delete(url)).status_code == 204
    assert turns.calls == [("cancel", session["id"], "The session was deleted")]


async def test_stats_count_by_status(client: httpx.AsyncClient, make_session, database: Database) -> None:
    sessions = [await make_session() for _ in range(4)]
    await set_state(database, sessions[0], status="active")
    await set_state(database, sessions[1], status="waiting_for_tool_results")
    await set_state(database, sessions[2], status="idle")
    assert (await client.get(f"{SESSIONS}/stats")).json() == {
        "started": 1,
        "active": 1,
        "idle": 1,
        "waiting_for_tool_results": 1,
        "total": 4,
    }


async def test_export_writes_one_message_a_line_across_pages(
    client: httpx.AsyncClient, app: Litestar, make_session, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.sessions.EXPORT_PAGE_EVENTS", 2)
    session = await make_session()
    sent = [message(Role.USER if number % 2 == 0 else Role.AGENT, f"Line\n{number}") for number in range(5)]
    log: EventLog = services.log
    for one in sent:
        kind = InputMessage if one.role is Role.USER else OutputMessageCompleted
        await log.append(session["id"], [NewEvent(data=kind(message=one))])
    response = await client.get(f"{SESSIONS}/{session['id']}/export")
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [httpx.Response(200, text=line).json()["id"] for line in response.text.splitlines()] == [
        one.id for one in sent
    ]
    assert (await client.get(f"{SESSIONS}/{session['id']}/export?format=atif")).status_code == 400


async def test_an_organization_has_at_most_10_000_sessions(
    client: httpx.AsyncClient, make_session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.sessions.MAX_SESSIONS_PER_ORG", 1)
    await make_session()
    response = await client.post(SESSIONS, json={})
    assert (response.status_code, response.json()["code"]) == (409, "resource_limit")
