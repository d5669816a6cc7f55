"""`/v1/harnesses`: names, inheritance, life cycle, and what built-in ones refuse."""

from __future__ import annotations

import asyncio

import httpx
import pytest

API = "/api/v1"
HARNESSES = f"{API}/harnesses"
GENERIC = "harness_01980000000070008000000000000202"


async def test_a_harness_is_served_as_it_was_created(client: httpx.AsyncClient, make_harness) -> None:
    sent = {
        "name": "full",
        "display_name": "Full",
        "description": "Everything set",
        "system_prompt": "Be kind.",
        "parent_harness_id": GENERIC,
        "default_model_id": "model_01980000000070008000000000000102",
        "capabilities": [{"ref": "test_math"}],
        "initial_files": [{"path": "/workspace/a.txt", "content": "a"}],
        "tags": ["b", "a", "b"],
        "mcpServers": {"docs": {"type": "http", "url": "https://example.com/mcp"}},
        "network_access": {"allowed": ["example.com"]},
        "parallel_tool_calls": False,
        "embedder_metadata": {"team": "x"},
    }
    made = await make_harness(**sent)
    assert made["tags"] == ["b", "a"]
    assert {key: made[key] for key in sent if key not in ("tags", "initial_files")} == {
        key: value for key, value in sent.items() if key not in ("tags", "initial_files")
    }
    assert made["status"] == "active"
    assert made["is_built_in"] is False

    for key in (made["id"], "full"):
        got = (await client.get(f"{HARNESSES}/{key}")).json()
        assert got["session_count"] == 0
        assert got["id"] == made["id"]


async def test_built_in_harnesses_are_read_only_and_can_be_copied(client: httpx.AsyncClient) -> None:
    for response in (
        await client.patch(f"{HARNESSES}/{GENERIC}", json={"description": "mine"}),
        await client.delete(f"{HARNESSES}/{GENERIC}"),
        await client.post(f"{HARNESSES}/{GENERIC}/delete"),
    ):
        assert response.status_code == 403
        assert response.json()["code"] == "read_only"
    copies = [(await client.post(f"{HARNESSES}/{GENERIC}/copy", json={})).json() for _ in range(3)]
    assert [copy["name"] for copy in copies] == ["generic (copy)", "generic (copy 2)", "generic (copy 3)"]
    assert copies[0]["is_built_in"] is False
    original = (await client.get(f"{HARNESSES}/{GENERIC}")).json()
    assert copies[0]["capabilities"] == original["capabilities"]
    assert {"session_file_system", "ask_user", "compaction"} <= {one["ref"] for one in original["capabilities"]}
    assert (await client.patch(f"{HARNESSES}/{copies[0]['id']}", json={"description": "mine"})).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({"name": "Not A Slug"}, "name", "invalid_input"),
        ({"name": "a" * 65}, "name", "input_too_large"),
        ({}, "name", "invalid_input"),
        ({"name": "x", "description": "é" * 5_121}, "description", "input_too_large"),
        ({"name": "x", "system_prompt": "a" * (1024 * 1024 + 1)}, "system_prompt", "input_too_large"),
        ({"name": "x", "capabilities": ["test_math"] * 251}, "capabilities", "input_too_large"),
        ({"name": "x", "capabilities": ["test_math", "nope"]}, "capabilities[1].ref", "unknown_capability"),
        (
            {"name": "x", "capabilities": [{"ref": "test_math", "config": []}]},
            "capabilities[0].config",
            "invalid_input",
        ),
        ({"name": "x", "default_model_id": "model_" + "0" * 32}, "default_model_id", "unknown_model"),
        ({"name": "x", "default_model_id": "gpt"}, "default_model_id", "malformed_id"),
        ({"name": "x", "parent_harness_id": "harness_" + "0" * 32}, "parent_harness_id", "invalid_input"),
        ({"name": "x", "initial_files": [{"path": "../a", "content": ""}]}, "initial_files[0].path", "invalid_input"),
        (
            {"name": "x", "initial_files": [{"path": "a", "content": "%", "encoding": "base64"}]},
            "initial_files[0].content",
            "invalid_input",
        ),
        ({"name": "x", "tags": ["a" * 300]}, "tags[0]", "input_too_large"),
        ({"name": "x", "initial_files": [{"path": "a"}]}, "initial_files[0].content", "invalid_input"),
    ],
)
async def test_a_bad_field_is_refused_by_name(client: httpx.AsyncClient, body: dict, field: str, code: str) -> None:
    response = await client.post(HARNESSES, json=body)
    problem = response.json()
    assert (response.status_code, problem.get("field"), problem["code"]) == (400, field, code)
    if code == "input_too_large":
        assert "Input exceeds allowed limits" in problem["detail"]
        assert field in problem["detail"]


async def test_a_name_is_unique_among_active_harnesses_only(client: httpx.AsyncClient, make_harness) -> None:
    first = await make_harness(name="desk")
    taken = await client.post(HARNESSES, json={"name": "desk"})
    assert (taken.status_code, taken.json()["code"], taken.json()["field"]) == (409, "name_taken", "name")
    assert taken.json()["allowed_actions"][0]["rel"] == "get-existing"
    check = f"{HARNESSES}/check-name?name=desk"
    assert (await client.get(check)).json() == {"available": False}
    assert (await client.get(f"{check}&exclude_id={first['id']}")).json() == {"available": True}

    await client.delete(f"{HARNESSES}/{first['id']}")
    assert (await client.get(check)).json() == {"available": True}
    second = await make_harness(name="desk")
    assert (await client.get(f"{HARNESSES}/desk")).json()["id"] == second["id"]
    back = await client.patch(f"{HARNESSES}/{first['id']}", json={"status": "active"})
    assert (back.status_code, back.json()["code"]) == (409, "name_taken")


async def test_active_archived_deleted(client: httpx.AsyncClient, make_harness) -> None:
    url = f"{HARNESSES}/{(await make_harness())['id']}"
    early = await client.post(f"{url}/delete")
    assert (early.status_code, early.json()["code"]) == (409, "conflict")

    assert (await client.delete(url)).status_code == 204
    assert (await client.delete(url)).status_code == 204
    archived = (await client.get(url)).json()
    assert archived["status"] == "archived"
    assert archived["archived_at"]
    edit = await client.patch(url, json={"description": "x"})
    assert (edit.status_code, edit.json()["code"]) == (409, "archived")
    names = [one["name"] for one in (await client.get(HARNESSES)).json()["data"]]
    assert "support-desk" not in names
    names = [one["name"] for one in (await client.get(f"{HARNESSES}?include_archived=true")).json()["data"]]
    assert "support-desk" in names

    again = (await client.patch(url, json={"status": "active", "description": "back"})).json()
    assert (again["status"], again["description"]) == ("active", "back")
    assert "archived_at" not in again

    await client.delete(url)
    assert (await client.post(f"{url}/delete")).status_code == 204
    for response in (await client.get(url), await client.delete(url), await client.post(f"{url}/copy")):
        assert response.status_code == 404
    assert len((await client.get(f"{HARNESSES}?include_archived=true")).json()["data"]) == 2


async def test_inheritance_refuses_cycles_and_ends_with_null(client: httpx.AsyncClient, make_harness) -> None:
    top = await make_harness(name="top")
    middle = await make_harness(name="middle", parent_harness_id=top["id"])
    leaf = await make_harness(name="leaf", parent_harness_id=middle["id"])
    for parent in (leaf, middle, top):
        refused = await client.patch(f"{HARNESSES}/{top['id']}", json={"parent_harness_id": parent["id"]})
        assert (refused.status_code, refused.json()["field"]) == (400, "parent_harness_id")
    changed = (await client.patch(f"{HARNESSES}/{leaf['id']}", json={"parent_harness_id": None})).json()
    assert "parent_harness_id" not in changed
    kept = (await client.patch(f"{HARNESSES}/{middle['id']}", json={"description": "x"})).json()
    assert kept["parent_harness_id"] == top["id"]


async def test_racing_edits_cannot_make_a_cycle(client: httpx.AsyncClient, make_harness) -> None:
    one, two = await make_harness(name="one"), await make_harness(name="two")
    answers = await asyncio.gather(
        client.patch(f"{HARNESSES}/{one['id']}", json={"parent_harness_id": two["id"]}),
        client.patch(f"{HARNESSES}/{two['id']}", json={"parent_harness_id": one["id"]}),
    )
    assert sorted(answer.status_code for answer in answers) == [200, 400]


async def test_an_archived_parent_is_not_assignable(client: httpx.AsyncClient, make_harness) -> None:
    parent = await make_harness(name="parent")
    await client.delete(f"{HARNESSES}/{parent['id']}")
    response = await client.post(HARNESSES, json={"name": "child", "parent_harness_id": parent["id"]})
    assert (response.status_code, response.json()["code"]) == (409, "archived")


async def test_null_clears_what_can_be_empty_and_is_ignored_elsewhere(client: httpx.AsyncClient, make_harness) -> None:
    made = await make_harness(description="d", tags=["t"], network_access={"blocked": ["x"]})
    body = {"name": None, "tags": None, "status": None, "description": None, "network_access": None}
    changed = (await client.patch(f"{HARNESSES}/{made['id']}", json=body)).json()
    assert (changed["name"], changed["tags"], changed["status"]) == ("support-desk", ["t"], "active")
    assert "description" not in changed
    assert "network_access" not in changed


async def test_every_word_of_a_search_must_match_literally(client: httpx.AsyncClient, make_harness) -> None:
    await make_harness(name="refunds", description="Handles 100% of Refund_cases")
    await make_harness(name="shipping", description="Handles parcels")

    async def found(search: str) -> list[str]:
        response = await client.get(HARNESSES, params={"search": search})
        return [one["name"] for one in response.json()["data"] if not one["is_built_in"]]

    assert await found("HANDLES") == ["shipping", "refunds"]
    assert await found("handles refund") == ["refunds"]
    assert await found("100%") == ["refunds"]
    assert await found("_cases") == ["refunds"]
    assert await found("h%s") == []
    assert await found("  ") == ["shipping", "refunds"]


async def test_an_organization_has_at_most_50_harnesses(client: httpx.AsyncClient, make_harness) -> None:
    for number in range(50):
        await make_harness(name=f"h-{number}")
    response = await client.post(HARNESSES, json={"name": "one-more"})
    assert (response.status_code, response.json()["code"]) == (409, "resource_limit")


async def test_examples_are_a_bare_array_and_can_be_imported(client: httpx.AsyncClient) -> None:
    examples = (await client.get(f"{API}/harness-examples")).json()
    assert isinstance(examples, list)
    for example in examples:
        made = await client.post(f"{HARNESSES}/import", params={"from-example": example["name"]})
        assert made.status_code == 201
        assert made.json()["capabilities"] == example["capabilities"]
    missing = await client.post(f"{HARNESSES}/import?from-example=nope")
    assert missing.status_code == 404


async def test_stats_and_config(client: httpx.AsyncClient, make_session) -> None:
    await make_session(harness_id=GENERIC)
    stats = (await client.get(f"{HARNESSES}/generic/stats")).json()
    assert (stats["session_count"], stats["execution_count"]) == (1, 0)
    assert (await client.get(f"{HARNESSES}/config")).json()["policies"]
