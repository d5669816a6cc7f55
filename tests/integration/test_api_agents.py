"""`/v1/agents`: the upsert clients rely on, PATCH, life cycle, pages and files."""

from __future__ import annotations

import asyncio

import httpx
import pytest

API = "/api/v1"
AGENTS = f"{API}/agents"
ID = "agent_" + "ab" * 16


async def test_create_takes_the_generic_harness_and_bare_capability_names(make_agent) -> None:
    agent = await make_agent(capabilities=["current_time", {"ref": "test_math"}])
    assert agent["harness_id"] == "harness_01980000000070008000000000000202"
    assert agent["capabilities"] == [{"ref": "current_time"}, {"ref": "test_math"}]


async def test_posting_a_name_again_replaces_the_agent(client: httpx.AsyncClient, make_agent) -> None:
    first = await make_agent(description="old", tags=["a"], harness_name="base")
    second = await make_agent(system_prompt="New.")
    assert second["id"] == first["id"]
    assert second["system_prompt"] == "New."
    assert second["tags"] == []
    assert "description" not in second
    assert second["harness_id"] == first["harness_id"]
    assert (await client.get(AGENTS)).json()["total"] == 1


async def test_posting_an_id_creates_then_replaces_and_may_rename(client: httpx.AsyncClient, make_agent) -> None:
    assert (await make_agent(id=ID))["id"] == ID
    renamed = await make_agent(id=ID, name="renamed")
    assert (renamed["id"], renamed["name"]) == (ID, "renamed")
    other = await make_agent(name="other")
    clash = await client.post(AGENTS, json={"id": ID, "name": "other", "system_prompt": ""})
    assert (clash.status_code, clash.json()["code"]) == (409, "name_taken")
    assert (await client.get(f"{AGENTS}/other")).json()["id"] == other["id"]


async def test_racing_creates_of_one_name_make_one_agent(client: httpx.AsyncClient) -> None:
    body = {"name": "raced", "system_prompt": "x"}
    answers = await asyncio.gather(*(client.post(AGENTS, json=body) for _ in range(4)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_put_says_whether_it_created(client: httpx.AsyncClient) -> None:
    body = {"name": "put", "system_prompt": "x"}
    assert (await client.put(f"{AGENTS}/{ID}", json=body)).status_code == 201
    assert (await client.put(f"{AGENTS}/{ID}", json=body)).status_code == 200
    assert (await client.put(f"{AGENTS}/{ID}", json={**body, "id": "agent_" + "0" * 32})).status_code == 400
    assert (await client.put(f"{AGENTS}/put", json=body)).status_code == 400


async def test_patch_changes_what_it_names_only(client: httpx.AsyncClient, make_agent) -> None:
    agent = await make_agent(
        description="d", max_iterations=7, tags=["t"], mcp_servers={"a": {"url": "https://example.com/mcp"}}
    )
    assert agent["mcpServers"] == {"a": {"url": "https://example.com/mcp"}}
    changed = (await client.patch(f"{AGENTS}/{agent['id']}", json={"system_prompt": "Other."})).json()
    assert changed["system_prompt"] == "Other."
    assert (changed["description"], changed["max_iterations"], changed["tags"]) == ("d", 7, ["t"])
    cleared = (await client.patch(f"{AGENTS}/{agent['id']}", json={"max_iterations": None, "tags": []})).json()
    assert "max_iterations" not in cleared
    assert cleared["tags"] == []
    moved = (await client.patch(f"{AGENTS}/{agent['id']}", json={"harness_name": "base"})).json()
    assert moved["harness_id"].endswith("201")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"harness_id": "harness_" + "0" * 32}, "harness_id"),
        ({"harness_id": "nope"}, "harness_id"),
        ({"harness_name": "nope"}, "harness_name"),
        ({"harness_name": "base", "harness_id": "harness_01980000000070008000000000000202"}, "harness_name"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"max_iterations": 2**40}, "max_iterations"),
        ({"id": "agent_1"}, "id"),
        ({"tools": [{"name": "a b", "description": "", "parameters": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "parameters": {}}]}, "tools[0].description"),
        ({"capabilities": ["nope"]}, "capabilities[0].ref"),
    ],
)
async def test_a_bad_field_is_refused_by_name(client: httpx.AsyncClient, body: dict, field: str) -> None:
    response = await client.post(AGENTS, json={"name": "x", "system_prompt": "", **body})
    assert (response.status_code, response.json().get("field")) == (400, field), response.text


async def test_tools_that_would_run_on_our_side_are_dropped(make_agent) -> None:
    own = {"name": "ask", "description": "Asks", "parameters": {"type": "object"}}
    agent = await make_agent(tools=[{**own, "name": "rm", "type": "builtin"}, own, {**own, "name": "x", "type": "mcp"}])
    assert agent["tools"] == [{"type": "client_side", **own}]


async def test_archiving_frees_the_name_and_an_archived_id_takes_no_edit(client: httpx.AsyncClient, make_agent) -> None:
    old = await make_agent()
    await client.delete(f"{AGENTS}/{old['id']}")
    new = await make_agent()
    assert new["id"] != old["id"]
    edit = await client.post(AGENTS, json={"id": old["id"], "name": "helper", "system_prompt": ""})
    assert (edit.status_code, edit.json()["code"]) == (409, "archived")
    assert (await client.post(f"{AGENTS}/{new['id']}/delete")).status_code == 409
    assert (await client.post(f"{AGENTS}/{old['id']}/delete")).status_code == 204
    assert (await client.get(f"{AGENTS}/{old['id']}")).status_code == 404
    reuse = await client.post(AGENTS, json={"id": old["id"], "name": "again", "system_prompt": ""})
    assert (reuse.status_code, reuse.json()["code"]) == (409, "conflict")


async def test_an_archived_harness_is_not_assignable(client: httpx.AsyncClient, make_harness) -> None:
    harness = await make_harness()
    await client.delete(f"{API}/harnesses/{harness['id']}")
    response = await client.post(AGENTS, json={"name": "x", "system_prompt": "", "harness_id": harness["id"]})
    assert (response.status_code, response.json()["code"]) == (409, "archived")


async def test_pages_link_to_their_neighbours(client: httpx.AsyncClient, make_agent) -> None:
    for number in range(5):
        await make_agent(name=f"a-{number}")
    first = (await client.get(f"{AGENTS}?limit=2&search=a")).json()
    assert [agent["name"] for agent in first["data"]] == ["a-4", "a-3"]
    assert (first["total"], first["offset"], first["limit"]) == (5, 0, 2)
    assert "prev_url" not in first
    second = (await client.get(first["next_url"])).json()
    assert [agent["name"] for agent in second["data"]] == ["a-2", "a-1"]
    assert (await client.get(second["prev_url"])).json() == first
    assert (await client.get(f"{AGENTS}?limit=5000")).json()["limit"] == 100
    for bad in ("limit=0", "limit=x", "offset=-1", "offset=99999999999999999999"):
        assert (await client.get(f"{AGENTS}?{bad}")).status_code == 400


async def test_copies_are_numbered(client: httpx.AsyncClient, make_agent) -> None:
    agent = await make_agent(tags=["t"])
    copies = [(await client.post(f"{AGENTS}/{agent['id']}/copy", json={})).json() for _ in range(2)]
    assert [copy["name"] for copy in copies] == ["helper (copy)", "helper (copy 2)"]
    assert copies[0]["tags"] == ["t"]
    assert (await client.get(f"{AGENTS}/helper (copy)")).json()["id"] == copies[0]["id"]
    assert (await client.patch(f"{AGENTS}/{copies[0]['id']}", json={"tags": []})).status_code == 200


async def test_counts_usage_and_stats(client: httpx.AsyncClient, make_agent, make_session) -> None:
    agent = await make_agent()
    await make_session(agent_id=agent["id"])
    got = (await client.get(f"{AGENTS}/helper")).json()
    assert (got["session_count"], got["app_count"]) == (1, 0)
    assert got["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert (await client.get(f"{AGENTS}/{agent['id']}/stats")).json()["session_count"] == 1


async def test_export_and_import_bring_an_agent_back(client: httpx.AsyncClient, make_agent) -> None:
    tool = {"name": "ask", "description": "Asks", "parameters": {"type": "object"}}
    agent = await make_agent(
        system_prompt="---\nLine\r\n\n", tags=["2020-01-01", "yes"], tools=[tool], capabilities=["test_math"]
    )
    exported = await client.get(f"{AGENTS}/{agent['id']}/export")
    assert exported.headers["content-type"].startswith("text/markdown")
    await client.patch(f"{AGENTS}/{agent['id']}", json={"system_prompt": "changed", "tags": []})
    imported = await client.post(f"{AGENTS}/import", content=exported.content, headers={"Content-Type": "text/plain"})
    assert imported.status_code == 200
    assert {**imported.json(), "updated_at": ""} == {**agent, "updated_at": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nname: md\n---\nPrompt", {"name": "md", "system_prompt": "Prompt"}),
        ("name: yml\nsystem_prompt: |\n  Two\n  lines\n", {"name": "yml", "system_prompt": "Two\nlines\n"}),
        ('{"name": "js", "prompt": "P", "capabilities": ["test_math"]}', {"name": "js", "system_prompt": "P"}),
        ("You are kind.\nNote: be brief.\n", {"system_prompt": "You are kind.\nNote: be brief."}),
    ],
)
async def test_every_file_format_is_imported(client: httpx.AsyncClient, text: str, expected: dict) -> None:
    response = await client.post(f"{AGENTS}/import", content=text, headers={"Content-Type": "text/plain"})
    assert response.status_code == 201, response.text
    assert {key: response.json()[key] for key in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "---\nname: x\nno end",
        "---\nname: [\n---\n",
        "---\nname: x\nmax_iterations: many\n---\n",
        "---\nname: Not A Slug\n---\n",
        "---\na: &a [x]\nb: *a\n---\n",
        "name: &n x\ndescription: *n\n",
        '{"name": ',
        "",
        "---\nname: x\nsystem_prompt: one\n---\ntwo",
        "---\nname: x\nmax_iterations: 0\n---\n",
    ],
)
async def test_a_broken_file_is_refused(client: httpx.AsyncClient, text: str) -> None:
    response = await client.post(f"{AGENTS}/import", content=text, headers={"Content-Type": "text/plain"})
    assert response.status_code == 400, response.text


async def test_import_takes_examples_and_at_most_3_mb(client: httpx.AsyncClient) -> None:
    for name in ("dad-jokes-agent", "weather-agent"):
        response = await client.post(f"{AGENTS}/import?from-example={name}", headers={"Content-Type": "text/plain"})
        assert (response.status_code, response.json()["name"]) == (201, name)
    assert (await client.post(f"{AGENTS}/import?from-example=nope")).status_code == 404
    large = await client.post(f"{AGENTS}/import", content=b"x" * (3 * 1024 * 1024 + 1))
    assert large.status_code == 413
    assert "3145728" in large.json()["detail"]
    assert (await client.post(f"{AGENTS}/import", content=b"\xff")).status_code == 400
