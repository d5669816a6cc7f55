"""`preview` and `analyze`: what is shown is what a turn would get, and nothing is refused that can be a finding."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from db.database import Database
from tests.conftest import API, Make

Json = dict[str, Any]


async def preview(client: httpx.AsyncClient, path: str = "agents/preview", **body: object) -> Json:
    response = await client.post(f"{API}/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_fragments_of_a_preview_are_its_prompt_in_order(client: httpx.AsyncClient, make_harness: Make):
    base = await make_harness(name="base-desk", system_prompt="BASE", capabilities=["session_storage"])
    harness = await make_harness(name="desk", system_prompt="DESK", parent_harness_id=base["id"])
    tool = {"type": "client_side", "name": "open_door", "description": "Opens.", "parameters": {"type": "object"}}
    found = await preview(
        client,
        system_prompt="OWN",
        capabilities=["web_fetch", {"ref": "current_time"}],
        tools=[tool],
        harness_id=harness["id"],
    )
    assert [one["source"] for one in found["fragments"]] == ["harness", "own", "session_storage", "web_fetch"]
    assert "\n\n".join(one["text"] for one in found["fragments"]) == found["system_prompt"]
    assert found["system_prompt"].startswith("BASE\n\nDESK\n\nOWN\n\n")
    assert [one["name"] for one in found["tools"]] == [
        "kv_store",
        "secret_store",
        "web_fetch",
        "get_current_time",
        "open_door",
    ]
    assert found["estimated_tokens"] > sum(one["tokens"] for one in found["fragments"])
    named = await preview(client, system_prompt="OWN", harness_name="desk")
    assert named["system_prompt"].startswith("BASE\n\nDESK\n\nOWN")


async def test_a_harness_is_shown_with_what_it_inherits(client: httpx.AsyncClient, make_harness: Make):
    parent = await make_harness(system_prompt="PARENT", capabilities=["current_time"])
    found = await preview(
        client, "harnesses/preview", system_prompt="CHILD", parent_harness_id=parent["id"], capabilities=["session"]
    )
    assert found["system_prompt"].startswith("PARENT\n\nCHILD")
    assert "get_current_time" in [one["name"] for one in found["tools"]]
    assert (await preview(client, "harnesses/preview"))["system_prompt"] == ""


async def test_rows_are_previewed_as_a_turn_would_have_them(client: httpx.AsyncClient):
    tool = {"name": "open_library", "description": "Opens.", "parameters": {"type": "object"}}
    definition = {"name": "pack", "system_prompt": "PACK", "dependencies": ["current_time"], "tools": [tool]}
    assert (await client.post(f"{API}/capabilities", json={"definition": definition})).status_code == 201
    found = await preview(
        client, system_prompt="OWN prompt of this agent, long enough to say something.", capabilities=["pack"]
    )
    assert [one["source"] for one in found["fragments"]] == ["own", "declarative:pack"]
    assert [one["name"] for one in found["tools"]] == ["get_current_time", "open_library"]
    assert found["findings"] == []


async def test_what_a_save_would_refuse_is_a_finding(client: httpx.AsyncClient):
    body: Json = {
        "system_prompt": "You are a librarian, and you help visitors to find their books.",
        "capabilities": ["nope", "declarative:nope", "mcp:nope", {"ref": "compaction", "config": {"x": 1}}],
        "tools": [{"name": 5}, {"type": "builtin", "name": "a", "description": "b", "parameters": {}}, {}],
        "network_access": {"allowed": ["ftp://x"]},
        "default_model_id": "nonsense",
    }
    found = (await preview(client, "agents/analyze", **body))["findings"]
    places = {(one["rule_id"], one["location"]["field"]) for one in found}
    assert places == {
        *(("capabilities.unknown", f"capabilities[{index}]") for index in range(3)),
        ("capabilities.invalid_config", "capabilities[3]"),
        *(("tools.invalid", f"tools[{index}]") for index in range(3)),
        ("network.malformed", "network_access.allowed[0]"),
    }
    for one in found:
        assert one["fix"]
        assert one["source"] == "builtin"
        assert one["severity"] in {"warning", "info", "suggestion"}
    assert (await preview(client, **body))["findings"] == found


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "system_prompt"),
        ({"system_prompt": "x" * (1024 * 1024 + 1)}, "system_prompt"),
        ({"system_prompt": "x", "harness_name": "nope"}, "harness_name"),
        ({"system_prompt": "x", "harness_id": f"harness_{9:032x}"}, "harness_id"),
        ({"system_prompt": "x", "tools": [{}] * 251}, "tools"),
        ({"system_prompt": "x", "capabilities": ["a"] * 251}, "capabilities"),
    ],
)
async def test_what_is_no_configuration_at_all_is_refused(client: httpx.AsyncClient, body: Json, field: str):
    for path in ("agents/preview", "agents/analyze"):
        response = await client.post(f"{API}/{path}", json=body)
        assert (response.status_code, response.json()["field"]) == (400, field)


async def test_nothing_is_stored(client: httpx.AsyncClient, database: Database):
    await preview(client, system_prompt="x", mcpServers={"a": {"url": "https://x", "headers": {"K": "secret"}}})
    assert (await client.get(f"{API}/agents")).json()["total"] == 0
    assert await database.pool.fetchval("SELECT count(*) FROM mcp_scoped_secrets") == 0


async def test_malformed_network_patterns_are_refused_on_every_write(
    client: httpx.AsyncClient, make_agent: Make, make_harness: Make
):
    agent, harness = await make_agent(), await make_harness()
    bad = {"network_access": {"blocked": ["ok.example", "b example"]}}
    named: Json = {"name": "x", "system_prompt": "x"}
    for method, path, body in (
        ("POST", "agents", {**named, **bad}),
        ("PATCH", f"agents/{agent['id']}", bad),
        ("PUT", f"agents/{agent['id']}", {**named, **bad}),
        ("POST", "harnesses", {**named, **bad}),
        ("PATCH", f"harnesses/{harness['id']}", bad),
        ("POST", "sessions", bad),
    ):
        response = await client.request(method, f"{API}/{path}", json=body)
        assert (response.status_code, response.json()["field"]) == (400, "network_access.blocked[1]"), path
