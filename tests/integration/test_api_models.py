"""`/v1/models` beyond what a simulated model shows, and the circuit breakers of `/v1/durable`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest

from db.circuit_breakers import FAILURES_TO_OPEN, claim_try, note_failure
from db.database import Database

API = "/api/v1"
PROVIDERS = f"{API}/providers"
BREAKERS = f"{API}/durable/circuit-breakers"
SIMULATED = "provider_01980000000070008000000000000001"
SIMULATED_MODEL = "model_01980000000070008000000000000101"
NOBODY = "model_" + "0" * 32


async def provider_with_key(client: httpx.AsyncClient, provider_type: str = "openai") -> str:
    body = {"name": provider_type, "provider_type": provider_type, "api_key": "sk-of-this-test"}
    response = await client.post(PROVIDERS, json=body)
    assert response.status_code == 201, response.text
    return response.json()["id"]


async def add(client: httpx.AsyncClient, provider: str, model_id: str, **fields: object) -> dict[str, Any]:
    body = {"model_id": model_id, "display_name": model_id, **fields}
    response = await client.post(f"{PROVIDERS}/{provider}/models", json=body)
    assert response.status_code == 201, response.text
    return response.json()


async def get(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    return (await client.get(f"{API}/models/{model}")).json()


# --- models -----------------------------------------------------------------------------------------------------------


async def test_a_model_comes_with_its_profile_and_the_vendor_that_made_it(client: httpx.AsyncClient) -> None:
    router = await provider_with_key(client, "openrouter")
    known = await get(client, (await add(client, router, "anthropic/claude-opus-5.5"))["id"])
    assert (known["model_vendor"], known["provider_type"]) == ("anthropic", "openrouter")
    profile = known["profile"]
    assert (profile["name"], profile["limits"]["context"]) == ("Claude Opus 5.5", 1_000_000)
    assert profile["cost"]["output"] > profile["cost"]["input"] > profile["cost"]["cache_read"]
    assert "high" in [value["value"] for value in profile["reasoning_effort"]["values"]]
    other = await get(client, (await add(client, router, "meta-llama/llama-4-scout"))["id"])
    assert "model_vendor" not in other
    assert other["profile"]["open_weights"] is True
    unknown = await get(client, (await add(client, router, "somebody/something"))["id"])
    assert not {"profile", "model_vendor"} & unknown.keys()


async def test_a_model_is_healthy_while_everything_it_needs_is_there(client: httpx.AsyncClient) -> None:
    provider = await provider_with_key(client)
    model = (await add(client, provider, "gpt-5.5"))["id"]

    async def healthy() -> bool:
        listed = {one["id"]: one["healthy"] for one in (await client.get(f"{API}/models")).json()["data"]}
        assert listed[model] == (await get(client, model))["healthy"]
        return listed[model]

    assert await healthy() is True
    for url, worse, better in [
        (f"{API}/models/{model}", {"enabled": False}, {"enabled": True}),
        (f"{PROVIDERS}/{provider}", {"status": "disabled"}, {"status": "active"}),
        (f"{PROVIDERS}/{provider}", {"api_key": ""}, {"api_key": "sk-of-this-test"}),
        (f"{PROVIDERS}/{provider}", {"provider_type": "acme"}, {"provider_type": "openai"}),
    ]:
        await client.patch(url, json=worse)
        assert await healthy() is False, worse
        await client.patch(url, json=better)
        assert await healthy() is True, better
    await client.post(f"{BREAKERS}/{model}/open")
    assert await healthy() is False
    await client.post(f"{BREAKERS}/{model}/close")
    assert await healthy() is True


async def test_a_model_moves_to_another_provider_and_leaves_its_breaker_behind(client: httpx.AsyncClient) -> None:
    first, second = await provider_with_key(client), await provider_with_key(client, "anthropic")
    model = (await add(client, first, "m"))["id"]
    await client.post(f"{BREAKERS}/{model}/open")
    moved = (await client.patch(f"{API}/models/{model}", json={"provider_id": second})).json()
    assert moved["provider_id"] == second
    got = await get(client, model)
    assert (got["provider_type"], got["healthy"]) == ("anthropic", True)
    assert (await client.get(f"{BREAKERS}/{model}")).json()["state"] == "closed"

    await add(client, first, "m")
    taken = await client.patch(f"{API}/models/{model}", json={"provider_id": first})
    assert (taken.status_code, taken.json()["code"], taken.json()["field"]) == (409, "name_taken", "model_id")
    for provider_id in ("provider_" + "0" * 32, "provider_x", SIMULATED_MODEL):
        refused = await client.patch(f"{API}/models/{model}", json={"provider_id": provider_id})
        assert (refused.status_code, refused.json()["field"]) == (400, "provider_id")
    assert (await get(client, model))["provider_id"] == second


async def test_options_are_those_of_the_driver_the_model_is_called_by(client: httpx.AsyncClient) -> None:
    provider = await provider_with_key(client)
    options = {"temperature": 0.2, "max_output_tokens": 100}
    model = await add(client, provider, "gpt-4.1", options=options)
    assert model["options"] == options
    url = f"{API}/models/{model['id']}"
    for wrong, field in [({"temperature": 9}, "options.temperature"), ({"script": {}}, "options.script")]:
        refused = await client.patch(url, json={"options": wrong})
        assert (refused.status_code, refused.json()["field"]) == (400, field)
        refused = await client.post(
            f"{PROVIDERS}/{provider}/models", json={"model_id": "x", "display_name": "x", "options": wrong}
        )
        assert (refused.status_code, refused.json()["field"]) == (400, field)
    script = {"script": {"mode": "script", "turns": [{"text": "Hi"}]}}
    scripted = await add(client, SIMULATED, "scripted", options=script)
    moved = await client.patch(f"{API}/models/{scripted['id']}", json={"provider_id": provider})
    assert (moved.status_code, moved.json()["field"]) == (400, "options.script")
    both = await client.patch(f"{API}/models/{scripted['id']}", json={"provider_id": provider, "options": {}})
    assert (both.status_code, both.json()["provider_id"]) == (200, provider)


async def test_models_are_filtered_by_where_they_came_from_and_by_liking(client: httpx.AsyncClient) -> None:
    provider = await provider_with_key(client)
    liked = (await add(client, provider, "liked", is_favorite=True))["id"]
    plain = (await add(client, provider, "plain"))["id"]

    async def ids(query: str) -> list[str]:
        return [one["id"] for one in (await client.get(f"{API}/models?{query}")).json()["data"]]

    assert await ids("source=manual") == [liked, plain]
    assert await ids("favorites_only=true") == [liked]
    assert await ids("source=discovered") == []
    assert (await client.get(f"{API}/models?source=bought")).status_code == 400


# --- circuit breakers -------------------------------------------------------------------------------------------------


async def test_a_breaker_that_failures_opened_is_listed_and_can_be_closed(
    client: httpx.AsyncClient, database: Database
) -> None:
    assert (await client.get(BREAKERS)).json() == {"data": [], "total": 0}
    model = UUID(hex=SIMULATED_MODEL.removeprefix("model_"))
    for _ in range(FAILURES_TO_OPEN):
        await note_failure(database.pool, 1, model)
    (listed,) = (await client.get(BREAKERS)).json()["data"]
    assert (listed["key"], listed["state"], listed["failure_count"]) == (SIMULATED_MODEL, "open", FAILURES_TO_OPEN)
    assert {"opened_at", "half_open_at", "last_failure_at", "updated_at"} <= listed.keys()
    assert (listed["model"], listed["provider"]) == ("llmsim-model", "Simulated")
    assert (await client.get(f"{BREAKERS}/{SIMULATED_MODEL}")).json() == listed
    closed = await client.post(f"{BREAKERS}/{SIMULATED_MODEL}/close")
    assert closed.status_code == 200
    body = closed.json()
    assert (body["state"], body["failure_count"], body["success_count"]) == ("closed", 0, 0)
    assert not {"opened_at", "half_open_at"} & body.keys()


async def test_a_breaker_that_is_held_open_lets_no_call_try(client: httpx.AsyncClient, database: Database) -> None:
    held = await client.post(f"{BREAKERS}/{SIMULATED_MODEL}/open")
    assert (held.status_code, held.json()["state"]) == (200, "open")
    assert "half_open_at" not in held.json()
    opened_at = datetime.fromisoformat(held.json()["opened_at"])
    assert opened_at.astimezone(UTC) <= datetime.now(UTC)
    async with database.transaction() as connection:
        assert await claim_try(connection, UUID(hex=SIMULATED_MODEL.removeprefix("model_"))) is False
    again = await client.post(f"{BREAKERS}/{SIMULATED_MODEL}/open")
    assert (again.status_code, again.json()["state"]) == (200, "open")


async def test_a_model_that_never_failed_has_a_closed_breaker_and_resetting_returns_to_that(
    client: httpx.AsyncClient,
) -> None:
    untouched = (await client.get(f"{BREAKERS}/{SIMULATED_MODEL}")).json()
    assert (untouched["state"], untouched["failure_count"], untouched["success_count"]) == ("closed", 0, 0)
    await client.post(f"{BREAKERS}/{SIMULATED_MODEL}/open")
    reset = await client.delete(f"{BREAKERS}/{SIMULATED_MODEL}")
    assert (reset.status_code, reset.json()) == (200, untouched)
    assert (await client.get(BREAKERS)).json()["total"] == 0
    assert (await client.post(f"{BREAKERS}/{SIMULATED_MODEL}/close")).json() == untouched


@pytest.mark.parametrize(("key", "status"), [(NOBODY, 404), ("openai", 400), (SIMULATED, 400)])
async def test_a_breaker_is_addressed_by_the_id_of_a_model_that_exists(
    client: httpx.AsyncClient, key: str, status: int
) -> None:
    url = f"{BREAKERS}/{key}"
    answers = [await client.get(url), await client.delete(url)]
    answers += [await client.post(f"{url}/open"), await client.post(f"{url}/close")]
    assert [answer.status_code for answer in answers] == [status] * 4
    assert (await client.get(BREAKERS)).json()["total"] == 0


async def test_the_durable_engine_has_policies(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"{API}/durable/config")).json()["policies"]["org:durable:read"] is True
