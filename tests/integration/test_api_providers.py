"""`/v1/providers`: their keys, their addresses, their lists of models."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
import pytest
import structlog
from litestar import Litestar
from msgspec import structs

from api.app import create_app
from api.services import Services
from db.database import Database
from db.dev_models import choose_models
from db.providers import find_endpoint
from domain.providers import PREDEFINED_MODELS, PROVIDER_TYPES
from domain.secret import Secret
from infra.embedded_postgres import EmbeddedPostgres
from infra.encryption import Keyring, generate_key
from infra.network import free_port
from tests.conftest import ClientOf
from tests.fakes.server import Exchange, FakeProvider

API = "/api/v1"
PROVIDERS = f"{API}/providers"
ORG = f"{API}/orgs/org_{1:032x}"
SIMULATED = "provider_01980000000070008000000000000001"
NOBODY = "provider_" + "0" * 32
PLANTED = "sk-planted-0123456789abcdefghij"
OPENAI = {"name": "OpenAI", "provider_type": "openai"}


class ListingProvider(FakeProvider):
    """Knows `GET /v1/models` and one key."""

    provider_type = "openai_completions"
    base_path = "/v1/"

    def __init__(self) -> None:
        super().__init__()
        self.models: list[dict[str, Any]] = []
        self.status = 200

    async def handle(self, exchange: Exchange) -> None:
        assert (exchange.request.method, exchange.request.path) == ("GET", "/v1/models")
        if self.status != 200:
            error = {"message": f"words of the provider about {PLANTED}", "type": None, "code": None}
            await exchange.json({"error": error}, status=self.status)
        elif exchange.request.headers["authorization"] != f"Bearer {PLANTED}":
            await exchange.json({"error": {"message": "no such key", "code": "invalid_api_key"}}, status=401)
        else:
            await exchange.json({"object": "list", "data": self.models})


@pytest.fixture
async def listing() -> AsyncIterator[ListingProvider]:
    fake = ListingProvider()
    async with fake.running():
        yield fake


async def made(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post(PROVIDERS, json={**OPENAI, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def credentials_of(services: Services, provider_id: str) -> dict[str, str]:
    endpoint = await find_endpoint(provider_id, services.keyring, services.settings.default_keys)
    return {name: secret.reveal() for name, secret in endpoint.credentials.items()}


# --- create, read, change, delete -------------------------------------------------------------------------------------


async def test_a_provider_is_created_changed_and_deleted(client: httpx.AsyncClient) -> None:
    provider = await made(client, api_key=PLANTED)
    url = f"{PROVIDERS}/{provider['id']}"
    assert (provider["name"], provider["provider_type"], provider["status"]) == ("OpenAI", "openai", "active")
    assert provider["api_key_set"] is True
    assert provider["self_url"].endswith(provider["id"])
    assert "base_url" not in provider
    assert (await client.get(url)).json() == provider
    listed = (await client.get(PROVIDERS)).json()
    assert [one["id"] for one in listed["data"]] == [SIMULATED, provider["id"]]

    changes = {"name": "Renamed", "status": "disabled", "base_url": "http://localhost:11434/v1", "provider_type": None}
    changed = (await client.patch(url, json=changes)).json()
    assert (changed["name"], changed["status"], changed["base_url"]) == ("Renamed", "disabled", changes["base_url"])
    assert (changed["provider_type"], changed["api_key_set"]) == ("openai", True)
    assert "base_url" not in (await client.patch(url, json={"base_url": None})).json()

    assert (await client.delete(url)).status_code == 204
    for gone in (await client.get(url), await client.patch(url, json={}), await client.delete(url)):
        assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


async def test_deleting_a_provider_deletes_its_models_and_whatever_named_them_forgets_them(
    client: httpx.AsyncClient, make_agent, make_harness, make_session
) -> None:
    provider = await made(client)
    models = [
        (
            await client.post(f"{PROVIDERS}/{provider['id']}/models", json={"model_id": name, "display_name": name})
        ).json()
        for name in ("one", "two")
    ]
    first, second = (model["id"] for model in models)
    kept = (await client.get(f"{PROVIDERS}/{SIMULATED}/models")).json()["data"][0]["id"]
    agent = await make_agent(default_model_id=first, fallback_model_ids=[second, kept])
    harness = await make_harness(default_model_id=second, fallback_model_ids=[first])
    session = await make_session(model_id=first)
    await client.patch(ORG, json={"default_model_id": second})
    await client.post(f"{API}/durable/circuit-breakers/{first}/open")

    assert (await client.delete(f"{PROVIDERS}/{provider['id']}")).status_code == 204
    agent = (await client.get(f"{API}/agents/{agent['id']}")).json()
    assert ("default_model_id" in agent, agent["fallback_model_ids"]) == (False, [kept])
    harness = (await client.get(f"{API}/harnesses/{harness['id']}")).json()
    assert ("default_model_id" in harness, harness.get("fallback_model_ids", [])) == (False, [])
    assert "model_id" not in (await client.get(f"{API}/sessions/{session['id']}")).json()
    assert "default_model_id" not in (await client.get(ORG)).json()
    assert (await client.get(f"{API}/durable/circuit-breakers")).json()["data"] == []
    assert [
        model["id"] for model in (await client.get(f"{API}/models")).json()["data"] if model["id"] in (first, second)
    ] == []


REFUSED: Final[list[tuple[dict[str, object], str]]] = [
    ({"name": " "}, "name"),
    ({"name": "x" * 3000}, "name"),
    ({"provider_type": ""}, "provider_type"),
    ({"provider_type": "two words"}, "provider_type"),
    ({"provider_type": "azure_openai"}, "base_url"),
    ({"provider_type": "openai_completions"}, "base_url"),
    ({"base_url": "localhost:11434"}, "base_url"),
    ({"base_url": "ftp://models.example.com"}, "base_url"),
    ({"base_url": "https://user:hunter2@models.example.com"}, "base_url"),
    ({"base_url": "https://models.example.com/v1?key=hunter2"}, "base_url"),
    ({"base_url": "https://models.example.com/\tv1"}, "base_url"),
    ({"base_url": "https://[models"}, "base_url"),
    ({"base_url": "https://models.example.com:99999"}, "base_url"),
    ({"credentials": {}}, "credentials.api_key"),
    ({"credentials": {"api_key": "  "}}, "credentials.api_key"),
    ({"credentials": {"api_key": "hunter2", "region": "hunter2"}}, "credentials.region"),
    ({"credentials": {"sk-hunter2": "x"}}, "credentials"),
    ({"api_key": "hunter2\nX-Other: y"}, "credentials.api_key"),
    ({"api_key": "hunter2-ключ"}, "credentials.api_key"),
    ({"api_key": "hunter2" * 2000}, "credentials.api_key"),
    ({"provider_type": "llmsim", "api_key": "hunter2"}, "credentials.api_key"),
    ({"status": "asleep"}, "status"),
    ({"trace": {"enabled": True, "session_url_template": "javascript:alert(1)"}}, "trace.session_url_template"),
    (
        {"trace": {"enabled": True, "session_url_template": "https://x.example/{user}"}},
        "trace.session_url_template",
    ),
]


@pytest.mark.parametrize("method", ["post", "patch"])
async def test_what_a_provider_cannot_be_is_refused_by_field_and_not_repeated(
    client: httpx.AsyncClient, method: str
) -> None:
    provider = await made(client)
    for body, field in REFUSED:
        if method == "patch":
            response = await client.patch(f"{PROVIDERS}/{provider['id']}", json=body)
        elif "status" in body:
            # A new provider is active: the field is not known there.
            continue
        else:
            response = await client.post(PROVIDERS, json={**OPENAI, **body})
        assert (response.status_code, response.json().get("field")) == (400, field), (body, response.text)
        assert "hunter2" not in response.text
    assert (await client.get(f"{PROVIDERS}/{provider['id']}")).json() == provider
    assert (await client.get(PROVIDERS)).json()["total"] == 2


async def test_an_organization_has_so_many_providers_and_no_more(client: httpx.AsyncClient, database: Database) -> None:
    await database.pool.execute(
        """INSERT INTO providers (id, org_id, name, provider_type)
           SELECT gen_random_uuid(), 1, 'p' || n, 'openai' FROM generate_series(1, 99) n"""
    )
    refused = await client.post(PROVIDERS, json=OPENAI)
    assert (refused.status_code, refused.json()["code"]) == (409, "resource_limit")


async def test_a_type_of_somebody_elses_can_be_stored_but_runs_nothing_here(
    client: httpx.AsyncClient, services: Services
) -> None:
    provider = await made(client, provider_type="acme-cloud", credentials={"region": "north", "token": PLANTED})
    assert await credentials_of(services, provider["id"]) == {"region": "north", "token": PLANTED}
    url = f"{PROVIDERS}/{provider['id']}/models"
    model = await client.post(url, json={"model_id": "acme-1", "display_name": "Acme", "options": {"any": "thing"}})
    assert model.status_code == 201
    assert (await client.get(f"{API}/models/{model.json()['id']}")).json()["healthy"] is False
    synced = await client.post(f"{PROVIDERS}/{provider['id']}/sync-models")
    assert (synced.status_code, synced.json()) == (200, {"status": "not_supported"})


async def test_the_config_lists_the_form_of_every_provider_type(client: httpx.AsyncClient) -> None:
    config = (await client.get(f"{PROVIDERS}/config")).json()
    assert config["policies"]["org:providers:create"] is True
    assert [one["driver"] for one in config["drivers"]] == sorted(PROVIDER_TYPES)
    by_driver = {one["driver"]: one for one in config["drivers"]}
    (field,) = by_driver["anthropic"]["credential_schema"]["fields"]
    assert (field["name"], field["field_type"], field["required"]) == ("api_key", "password", True)
    assert by_driver["openai_completions"]["credential_schema"]["fields"][0]["required"] is False
    assert by_driver["llmsim"]["credential_schema"]["fields"] == []
    assert {one["supports_oauth"] for one in config["drivers"]} == {False}


async def test_trace_links_are_the_types_with_the_providers_own_on_top(client: httpx.AsyncClient) -> None:
    assert "trace" not in await made(client)
    provider = await made(client, provider_type="openrouter")
    defaults = provider["trace"]
    assert defaults["enabled"] is False
    assert "{response_id}" in defaults["generation_url_template"]
    url = f"{PROVIDERS}/{provider['id']}"
    own = "https://traces.example.com/{session_id}?turn={turn_id}&model={model}"
    changed = (await client.patch(url, json={"trace": {"enabled": True, "session_url_template": own}})).json()["trace"]
    assert changed == {**defaults, "enabled": True, "session_url_template": own}
    again = (await client.patch(url, json={"trace": {"enabled": False}})).json()["trace"]
    assert again == {**changed, "enabled": False}
    back = (await client.patch(url, json={"trace": {"enabled": True, "session_url_template": None}})).json()["trace"]
    assert back == {**defaults, "enabled": True}
    assert (await client.patch(url, json={"trace": None})).json()["trace"] == defaults


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_is_kept_by_absent_and_null_and_forgotten_by_an_empty_one(
    client: httpx.AsyncClient, services: Services
) -> None:
    provider = await made(client, api_key=f"  {PLANTED}\n")
    url = f"{PROVIDERS}/{provider['id']}"
    for body in ({"name": "x"}, {"api_key": None}, {"credentials": None}):
        assert (await client.patch(url, json=body)).json()["api_key_set"] is True
        assert await credentials_of(services, provider["id"]) == {"api_key": PLANTED}
    await client.patch(url, json={"api_key": "ignored", "credentials": {"api_key": "other"}})
    assert await credentials_of(services, provider["id"]) == {"api_key": "other"}
    assert (await client.patch(url, json={"api_key": ""})).json()["api_key_set"] is False
    assert await credentials_of(services, provider["id"]) == {}


async def test_without_an_encryption_key_a_provider_is_stored_but_no_secret_is(
    services: Services, client_of: ClientOf
) -> None:
    bare = dataclasses.replace(services, keyring=Keyring.of(None, None))
    async with client_of(create_app(bare)) as client:
        refused = await client.post(PROVIDERS, json={**OPENAI, "api_key": PLANTED})
        assert (refused.status_code, refused.json()["code"]) == (503, "encryption_not_configured")
        assert len((await client.get(PROVIDERS)).json()["data"]) == 1
        provider = await made(client)
        assert provider["api_key_set"] is False
        kept = await client.patch(f"{PROVIDERS}/{provider['id']}", json={"name": "x", "api_key": PLANTED})
        assert kept.status_code == 503
        assert (await client.get(f"{PROVIDERS}/{provider['id']}")).json() == provider


async def test_a_planted_key_is_in_no_answer_no_log_line_and_nowhere_in_the_database(
    client: httpx.AsyncClient,
    listing: ListingProvider,
    database: Database,
    postgres: EmbeddedPostgres,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    answers: list[httpx.Response] = []
    with structlog.testing.capture_logs() as lines:
        provider = await made(client, provider_type="openai_completions", base_url=listing.url, api_key=PLANTED)
        url = f"{PROVIDERS}/{provider['id']}"
        listing.models = [{"id": "gpt-5.5"}]
        answers.append(await client.post(f"{url}/sync-models"))
        for status in (401, 429, 500):
            listing.status = status
            answers.append(await client.post(f"{url}/sync-models"))
        answers.append(await client.patch(url, json={"api_key": PLANTED, "status": "asleep"}))
        answers.append(await client.patch(url, json={"api_key": [PLANTED]}))
        answers.append(await client.patch(url, json={"credentials": {PLANTED: PLANTED}}))
        answers.append(await client.post(PROVIDERS, json={"api_key": PLANTED}))
        answers.append(
            await client.post(
                PROVIDERS, content=f'{{"api_key": "{PLANTED}"', headers={"Content-Type": "application/json"}
            )
        )
        answers.extend([await client.get(PROVIDERS), await client.get(url), await client.get(f"{API}/models")])
    assert {answer.status_code for answer in answers} == {200, 400, 409, 502}
    assert any(request.headers["authorization"] == f"Bearer {PLANTED}" for request in listing.requests)
    assert not [answer.text for answer in answers if PLANTED in answer.text]
    assert not [line for line in lines if PLANTED in str(line)]
    assert PLANTED not in caplog.text
    assert PLANTED not in await dump(database)


async def dump(database: Database) -> str:
    """Every row of every table, as text."""
    tables = await database.pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    rows = [await database.pool.fetch(f'SELECT t::text FROM "{table["tablename"]}" t') for table in tables]
    text = "\n".join(row[0] for found in rows for row in found)
    assert "OpenAI" in text
    return text


# --- default keys -----------------------------------------------------------------------------------------------------


def with_default_keys(services: Services, **keys: str) -> Services:
    fields = {f"default_{name}_api_key": Secret(key) for name, key in keys.items()}
    return dataclasses.replace(services, settings=structs.replace(services.settings, **fields))


async def test_a_default_key_is_for_providers_of_its_type_that_have_none(
    services: Services, client_of: ClientOf
) -> None:
    keyed = with_default_keys(services, openai="sk-default-openai-key")
    async with client_of(create_app(keyed)) as client:
        openai, own = await made(client), await made(client, api_key=PLANTED)
        anthropic = await made(client, provider_type="anthropic")
        assert openai["api_key_set"] is False
        assert await credentials_of(keyed, openai["id"]) == {"api_key": "sk-default-openai-key"}
        assert await credentials_of(keyed, own["id"]) == {"api_key": PLANTED}
        assert await credentials_of(keyed, anthropic["id"]) == {}
        health = {}
        for provider in (openai, own, anthropic):
            model = {"model_id": "m", "display_name": "m"}
            await client.post(f"{PROVIDERS}/{provider['id']}/models", json=model)
        for model in (await client.get(f"{API}/models")).json()["data"]:
            health[model["provider_id"]] = model["healthy"]
        assert [health[one["id"]] for one in (openai, own, anthropic)] == [True, True, False]


async def test_default_keys_bring_providers_with_current_models_and_the_organizations_model(
    client: httpx.AsyncClient, database: Database
) -> None:
    keys = {"gemini": Secret("a"), "anthropic": Secret("b")}
    await asyncio.gather(*(choose_models(database, keys) for _ in range(3)))
    providers = {one["provider_type"]: one for one in (await client.get(PROVIDERS)).json()["data"]}
    assert set(providers) == {"llmsim", "anthropic", "gemini"}
    assert len((await client.get(PROVIDERS)).json()["data"]) == 3
    models = (await client.get(f"{API}/models?source=predefined")).json()["data"]
    named = [(model["provider_type"], model["model_id"]) for model in models if model["provider_type"] != "llmsim"]
    assert sorted(named) == sorted((kind, name) for kind in keys for name in PREDEFINED_MODELS[kind])
    chosen = (await client.get(ORG)).json()["default_model_id"]
    assert [model["model_id"] for model in models if model["id"] == chosen] == [PREDEFINED_MODELS["anthropic"][0]]


async def test_default_keys_change_nothing_that_somebody_chose(client: httpx.AsyncClient, database: Database) -> None:
    await made(client, provider_type="openai", name="Ours")
    simulated = (await client.get(f"{PROVIDERS}/{SIMULATED}/models")).json()["data"][0]["id"]
    await client.patch(ORG, json={"default_model_id": simulated})
    await choose_models(database, {"openai": Secret("a")})
    listed = (await client.get(PROVIDERS)).json()["data"]
    assert [one["name"] for one in listed if one["provider_type"] == "openai"] == ["Ours"]
    assert (await client.get(f"{API}/models?source=predefined")).json()["total"] == 3
    assert (await client.get(ORG)).json()["default_model_id"] == simulated


async def test_without_a_default_key_the_simulated_model_answers(client: httpx.AsyncClient, database: Database) -> None:
    await choose_models(database, {})
    chosen = (await client.get(ORG)).json()["default_model_id"]
    assert (await client.get(f"{API}/models/{chosen}")).json()["model_id"] == "llmsim-model"


# --- sync -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def synced(client: httpx.AsyncClient, listing: ListingProvider) -> str:
    provider = await made(client, provider_type="openai_completions", base_url=listing.url, api_key=PLANTED)
    return f"{PROVIDERS}/{provider['id']}"


async def sync(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    response = await client.post(f"{url}/sync-models")
    assert response.status_code == 200, response.text
    return response.json()


def counts(created: int, updated: int, stale: int) -> dict[str, Any]:
    return {"status": "success", "created": created, "updated": updated, "stale": stale}


async def test_sync_adds_what_is_new_and_marks_what_is_gone(
    client: httpx.AsyncClient, listing: ListingProvider, synced: str
) -> None:
    mine = {"model_id": "mine", "display_name": "Mine"}
    await client.post(f"{synced}/models", json=mine)
    listing.models = [{"id": "gpt-5.5"}, {"id": "local", "name": "Local Model"}, {"id": "plain"}, {"id": "mine"}]
    assert await sync(client, synced) == counts(3, 0, 0)
    assert "last_synced_at" in (await client.get(synced)).json()
    models = {one["model_id"]: one for one in (await client.get(f"{synced}/models")).json()["data"]}
    names = {name: (one["display_name"], one["source"]) for name, one in models.items()}
    assert names == {
        "mine": ("Mine", "manual"),
        "gpt-5.5": ("GPT-5.5", "discovered"),
        "local": ("Local Model", "discovered"),
        "plain": ("plain", "discovered"),
    }
    assert models["gpt-5.5"]["capabilities"] == ["text", "tools", "vision", "thinking"]

    await client.patch(f"{API}/models/{models['local']['id']}", json={"display_name": "Renamed"})
    listing.models = [{"id": "local", "name": "Local Model"}, {"id": "plain", "name": "Has a name now"}]
    assert await sync(client, synced) == counts(0, 1, 1)
    fresh = (await client.get(f"{API}/models?include_stale=false")).json()["data"]
    everything = (await client.get(f"{API}/models")).json()["data"]
    assert {one["model_id"] for one in everything} - {one["model_id"] for one in fresh} == {"gpt-5.5"}
    shown = {one["model_id"]: one["display_name"] for one in fresh}
    assert (shown["local"], shown["plain"], shown["mine"]) == ("Renamed", "Has a name now", "Mine")

    listing.models.append({"id": "gpt-5.5"})
    assert await sync(client, synced) == counts(0, 1, 0)
    assert await sync(client, synced) == counts(0, 0, 0)
    assert (await client.get(f"{API}/models?include_stale=false")).json()["total"] == len(everything)


async def test_syncs_side_by_side_add_each_model_once(
    client: httpx.AsyncClient, listing: ListingProvider, synced: str
) -> None:
    listing.models = [{"id": f"m{number}"} for number in range(20)]
    done = await asyncio.gather(*(sync(client, synced) for _ in range(4)))
    assert sorted(one["created"] for one in done) == [0, 0, 0, 20]
    assert len((await client.get(f"{synced}/models")).json()["data"]) == 20


@pytest.mark.parametrize(
    ("status", "answer", "code"),
    [
        (401, 409, "key_refused"),
        (403, 409, "key_refused"),
        (429, 502, "provider_unavailable"),
        (500, 502, "provider_unavailable"),
    ],
)
async def test_a_list_the_provider_does_not_give_changes_nothing_and_its_words_stay_with_us(
    client: httpx.AsyncClient, listing: ListingProvider, synced: str, status: int, answer: int, code: str
) -> None:
    listing.models = [{"id": "m"}]
    await sync(client, synced)
    before = (await client.get(synced)).json()
    listing.status = status
    failed = await client.post(f"{synced}/sync-models")
    assert (failed.status_code, failed.json()["code"]) == (answer, code)
    assert "words of the provider" not in failed.text
    assert (await client.get(synced)).json() == before
    assert (await client.get(f"{API}/models?include_stale=false")).json()["total"] == 4


async def test_a_provider_that_is_not_there_is_unavailable(
    client: httpx.AsyncClient, listing: ListingProvider, synced: str
) -> None:
    await client.patch(synced, json={"base_url": f"http://127.0.0.1:{free_port()}/v1/"})
    failed = await client.post(f"{synced}/sync-models")
    assert (failed.status_code, failed.json()["code"]) == (502, "provider_unavailable")
    assert "127.0.0.1" not in failed.text


async def test_a_sync_needs_a_key_that_can_be_read(
    services: Services, client: httpx.AsyncClient, client_of: ClientOf
) -> None:
    keyless = await made(client)
    missing = await client.post(f"{PROVIDERS}/{keyless['id']}/sync-models")
    assert (missing.status_code, missing.json()["code"]) == (409, "conflict")
    keyed = await made(client, api_key=PLANTED)
    other = dataclasses.replace(services, keyring=Keyring.of(generate_key("kek-other"), None))
    async with client_of(create_app(other)) as lost:
        unreadable = await lost.post(f"{PROVIDERS}/{keyed['id']}/sync-models")
    assert (unreadable.status_code, unreadable.json()["field"]) == (409, "api_key")
    assert (await client.post(f"{PROVIDERS}/{NOBODY}/sync-models")).status_code == 404


@pytest.mark.parametrize("provider_type", ["llmsim", "azure_openai"])
async def test_a_type_without_a_list_says_so(client: httpx.AsyncClient, provider_type: str) -> None:
    base_url = None if provider_type == "llmsim" else "https://x.openai.azure.com/openai/v1/"
    provider = await made(client, provider_type=provider_type, base_url=base_url)
    assert await sync(client, f"{PROVIDERS}/{provider['id']}") == {"status": "not_supported"}
    assert "last_synced_at" not in (await client.get(f"{PROVIDERS}/{provider['id']}")).json()


def test_every_route_is_described_without_a_place_for_keys(app: Litestar) -> None:
    schemas = app.openapi_schema.to_schema()["components"]["schemas"]
    views = [schema for name, schema in schemas.items() if name.endswith("ProviderView")]
    assert views
    assert not [view for view in views if {"api_key", "credentials"} & view["properties"].keys()]
