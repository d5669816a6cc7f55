"""`/v1/capabilities`, `/v1/models`, `/v1/providers` and `/v1/orgs`."""

from __future__ import annotations

import httpx
import pytest

from activities.capabilities.registry import builtin_registry
from api.agent_files import parse_agent_file
from api.examples import AGENT_EXAMPLES, HARNESS_EXAMPLES
from api.requests import capability_refs

API = "/api/v1"
PROVIDER = "provider_01980000000070008000000000000001"
MODELS = f"{API}/providers/{PROVIDER}/models"
ORG = f"{API}/orgs/org_00000000000000000000000000000001"
NEW_MODEL = {"model_id": "scripted", "display_name": "Scripted"}


async def test_capabilities_are_paged_searched_and_counted(client: httpx.AsyncClient, make_agent) -> None:
    await make_agent(capabilities=["test_weather"])
    page = (await client.get(f"{API}/capabilities?limit=2&offset=1")).json()
    known = [capability.id for capability in builtin_registry().list()]
    assert (page["total"], [one["id"] for one in page["data"]]) == (len(known), known[1:3])
    found = (await client.get(f"{API}/capabilities?search=weather")).json()["data"]
    assert [one["id"] for one in found] == ["test_weather"]
    one = (await client.get(f"{API}/capabilities/test_weather")).json()
    assert (one["agent_count"], one["harness_count"]) == (1, 0)
    assert one["tool_definitions"]
    assert (await client.get(f"{API}/capabilities/nope")).status_code == 404


def test_examples_refer_to_capabilities_that_exist() -> None:
    registry = builtin_registry()
    for example in HARNESS_EXAMPLES:
        registry.check_refs(example.capabilities)
    for name, text in AGENT_EXAMPLES.items():
        file = parse_agent_file(text)
        assert file.name == name
        registry.check_refs(capability_refs(file.capabilities))


async def test_a_scripted_model_is_added_changed_and_deleted(
    client: httpx.AsyncClient, make_agent, make_session
) -> None:
    script = {"mode": "script", "turns": [{"text": "Hi"}]}
    made = await client.post(MODELS, json={**NEW_MODEL, "options": {"script": script}})
    assert made.status_code == 201
    model = made.json()
    assert (model["source"], model["options"]) == ("manual", {"script": script})
    url = f"{API}/models/{model['id']}"
    got = (await client.get(url)).json()
    assert (got["provider_type"], got["healthy"], got["model_vendor"]) == ("llmsim", True, "llmsim")
    assert model["id"] in [one["id"] for one in (await client.get(MODELS)).json()["data"]]

    changed = (await client.patch(url, json={"display_name": "Other", "is_favorite": True, "enabled": None})).json()
    assert (changed["display_name"], changed["is_favorite"], changed["enabled"]) == ("Other", True, True)
    favorites = (await client.get(f"{API}/models?favorites_only=true&source=manual")).json()["data"]
    assert [one["id"] for one in favorites] == [model["id"]]

    agent = await make_agent(default_model_id=model["id"])
    session = await make_session(model_id=model["id"])
    assert (await client.delete(url)).status_code == 204
    assert (await client.get(url)).status_code == 404
    assert "default_model_id" not in (await client.get(f"{API}/agents/{agent['id']}")).json()
    assert "model_id" not in (await client.get(f"{API}/sessions/{session['id']}")).json()


@pytest.mark.parametrize("method", ["post", "patch"])
async def test_a_script_that_could_not_play_is_refused(client: httpx.AsyncClient, method: str) -> None:
    options = {"script": {"mode": "script", "turns": [{"text": 5}]}}
    if method == "post":
        response = await client.post(MODELS, json={**NEW_MODEL, "options": options})
    else:
        url = f"{API}/models/model_01980000000070008000000000000101"
        response = await client.patch(url, json={"options": options})
    assert (response.status_code, response.json()["field"]) == (400, "options.script.turns[0].text")


async def test_a_models_name_is_unique_at_its_provider(client: httpx.AsyncClient) -> None:
    await client.post(MODELS, json=NEW_MODEL)
    again = await client.post(MODELS, json=NEW_MODEL)
    assert (again.status_code, again.json()["code"], again.json()["field"]) == (409, "name_taken", "model_id")


async def test_a_disabled_model_is_not_selectable(client: httpx.AsyncClient) -> None:
    model = (await client.post(MODELS, json={**NEW_MODEL, "enabled": False})).json()
    for path in ("agents", "harnesses", "sessions"):
        field = "model_id" if path == "sessions" else "default_model_id"
        body = {"name": "x", "system_prompt": "", field: model["id"]}
        response = await client.post(f"{API}/{path}", json=body)
        assert (response.status_code, response.json()["field"]) == (400, field)
    refused = await client.patch(ORG, json={"default_model_id": model["id"]})
    assert (refused.status_code, refused.json()["code"]) == (400, "unknown_model")


async def test_providers(client: httpx.AsyncClient) -> None:
    (listed,) = (await client.get(f"{API}/providers")).json()["data"]
    assert (await client.get(f"{API}/providers/{PROVIDER}")).json() == listed
    assert (listed["provider_type"], listed["api_key_set"]) == ("llmsim", False)
    unknown = "provider_" + "0" * 32
    assert (await client.get(f"{API}/providers/{unknown}")).status_code == 404
    assert (await client.get(f"{API}/providers/{unknown}/models")).status_code == 404
    assert (await client.post(f"{API}/providers/{unknown}/models", json=NEW_MODEL)).status_code == 404
    assert (await client.get(f"{API}/providers/x")).status_code == 400


async def test_the_organization_has_a_default_model(client: httpx.AsyncClient) -> None:
    model = "model_01980000000070008000000000000102"
    changed = (await client.patch(ORG, json={"default_model_id": model, "name": "Ours"})).json()
    assert (changed["default_model_id"], changed["name"]) == (model, "Ours")
    assert (await client.get(f"{API}/orgs")).json()["data"] == [changed]
    cleared = (await client.patch(ORG, json={"default_model_id": None, "name": None})).json()
    assert cleared["name"] == "Ours"
    assert "default_model_id" not in cleared
    assert (await client.get(f"{API}/orgs/org_{'0' * 31}2")).status_code == 404
    assert (await client.get(f"{API}/orgs/x")).status_code == 400
