"""What surrounds the routes: the OpenAPI description, its offline page, the alias, health and CORS."""

from __future__ import annotations

import dataclasses
import re

import httpx
from msgspec import structs

from api.app import create_app
from api.services import Services

API = "/api/v1"


async def test_every_operation_is_named_summarized_and_declares_its_errors(client: httpx.AsyncClient) -> None:
    response = await client.get("/api-doc/openapi.json")
    schema = response.json()
    assert schema["openapi"].startswith("3.1")
    seen: list[str] = []
    for path, item in schema["paths"].items():
        assert path.startswith(f"{API}/") or path == "/health"
        for method, operation in item.items():
            where = f"{method} {path}"
            seen.append(operation["operationId"])
            assert operation["summary"], where
            assert operation["description"], where
            for status in ("400", "404", "500"):
                content = operation["responses"][status]["content"]
                assert content.keys() == {"application/problem+json"}, where
                assert content["application/problem+json"]["schema"]["$ref"].endswith("Problem"), where
            if "requestBody" in operation and operation["tags"] != ["Messages"]:
                assert "413" in operation["responses"], where
    assert len(seen) == len(set(seen))
    assert "text/plain" in schema["paths"][f"{API}/agents/import"]["post"]["requestBody"]["content"]
    assert len(seen) > 50


async def test_links_name_operations_that_exist(
    client: httpx.AsyncClient, make_agent, make_session, make_harness
) -> None:
    schema = (await client.get("/api-doc/openapi.json")).json()
    known = {
        (operation["operationId"], method.upper())
        for item in schema["paths"].values()
        for method, operation in item.items()
    }
    for made in (await make_agent(), await make_session(), await make_harness()):
        assert made["self_url"].endswith(made["id"])
        for action in made["allowed_actions"]:
            assert (action["operation_id"], action["method"]) in known
            assert action["href"].startswith(made["self_url"])


async def test_the_documentation_page_needs_no_network(client: httpx.AsyncClient) -> None:
    page = await client.get("/api-doc")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?://|[\"']//", page.text)
    assets = re.findall(r'(?:href|src)="(/[^"]+)"', page.text)
    assert len(assets) == 2
    for asset in assets:
        response = await client.get(asset)
        assert response.status_code == 200
        assert "max-age" in response.headers["cache-control"]


async def test_the_bare_prefix_serves_the_same_api(client: httpx.AsyncClient, services: Services, client_of) -> None:
    assert (await client.get("/v1/models")).json() == (await client.get(f"{API}/models")).json()
    async with client_of(create_app(with_settings(services, api_prefix=""))) as other:
        assert (await other.get("/v1/models")).status_code == 200


def with_settings(services: Services, **settings: object) -> Services:
    return dataclasses.replace(services, settings=structs.replace(services.settings, **settings))


async def test_health(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok", "version": "0.0.0", "auth_mode": "None"}


async def test_empty_json_bodies_are_fine_where_none_is_expected(client: httpx.AsyncClient, make_agent) -> None:
    agent = await make_agent()
    headers = {"Content-Type": "application/json"}
    assert (await client.get(f"{API}/agents", headers=headers)).status_code == 200
    assert (await client.post(f"{API}/agents/{agent['id']}/copy", headers=headers)).status_code == 201
    assert (await client.delete(f"{API}/agents/{agent['id']}", headers=headers)).status_code == 204


async def test_unknown_query_parameters_and_fields_are_ignored(client: httpx.AsyncClient, make_agent) -> None:
    await make_agent(nonsense=1)
    assert (await client.get(f"{API}/agents?nonsense=1&include_stale=true")).json()["total"] == 1


async def test_cors_answers_listed_origins_with_credentials(services: Services, client_of) -> None:
    origin = "https://app.example.com"
    app = create_app(with_settings(services, cors_allowed_origins=(origin,)))
    async with client_of(app) as client:
        preflight = await client.options(
            f"{API}/agents",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,x-org-id,everruns-change-reason",
            },
        )
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-credentials"] == "true"
        for path in (f"{API}/agents", f"{API}/nowhere"):
            response = await client.get(path, headers={"Origin": origin})
            assert response.headers["access-control-allow-origin"] == origin
            assert "X-Request-Id" in response.headers["access-control-expose-headers"]
        refused = await client.get(f"{API}/agents", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
