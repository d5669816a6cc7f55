"""Declarative capabilities over the API: their life, what references to them mean, and who may give them out."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx
import pytest

from api.caller import Caller, require_admin_for
from api.capability_refs import checked_refs
from api.services import Services
from db.database import Database
from domain.config import CapabilityRef
from domain.errors import Forbidden
from tests.conftest import API, Make

Json = dict[str, Any]

DEFINITION: Json = {
    "name": "research_pack",
    "display_name": "Research Pack",
    "description": "Instructions and files for research.",
    "system_prompt": "Cite every source.",
    "dependencies": ["current_time"],
    "features": ["citations"],
    "files": [{"path": "/templates/report.md", "content": "# Report"}],
    "tools": [{"name": "open_library", "description": "Opens the library.", "parameters": {"type": "object"}}],
}


async def create(client: httpx.AsyncClient, **fields: Any) -> Json:
    response = await client.post(f"{API}/capabilities", json={"definition": {**DEFINITION, **fields}})
    assert response.status_code == 201, response.text
    return response.json()


async def problem(response: httpx.Response, status: int, code: str, field: str | None = None) -> Json:
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field), body
    return body


async def test_a_capability_is_created_read_listed_and_found(client: httpx.AsyncClient):
    made = await create(client)
    assert made["id"].startswith("cap_")
    assert made["capability_id"] == "declarative:research_pack"
    assert (made["name"], made["display_name"], made["status"]) == ("research_pack", "Research Pack", "active")
    url = f"{API}/capabilities/declarative"
    assert (await client.get(f"{url}/{made['id']}")).json() == made
    assert [one["id"] for one in (await client.get(url, params={"search": "research"})).json()["data"]] == [made["id"]]
    assert (await client.get(url, params={"search": "poetry"})).json()["data"] == []
    assert all((await client.get(f"{url}/config")).json()["policies"].values())


async def test_the_life_of_a_capability_ends_in_a_tombstone(client: httpx.AsyncClient, make_agent: Make):
    made = await create(client)
    url = f"{API}/capabilities/declarative/{made['id']}"
    await problem(await client.post(f"{url}/delete"), 409, "conflict")
    archived = await client.delete(url)
    assert (archived.status_code, archived.json()["status"]) == (200, "archived")
    assert "archived_at" in archived.json()
    assert (await client.get(f"{API}/capabilities/declarative")).json()["data"] == []
    listed = await client.get(f"{API}/capabilities/declarative", params={"include_archived": True})
    assert len(listed.json()["data"]) == 1
    await problem(await client.patch(url, json={"definition": DEFINITION}), 409, "archived")
    body = {"name": "a", "system_prompt": "x", "capabilities": ["declarative:research_pack"]}
    await problem(await client.post(f"{API}/agents", json=body), 409, "archived", "capabilities[0].ref")
    assert (await client.patch(url, json={"status": "active"})).json()["status"] == "active"
    await make_agent(capabilities=["declarative:research_pack"])
    await client.delete(url)
    deleted = (await client.post(f"{url}/delete")).json()
    assert (deleted["status"], "deleted_at" in deleted) == ("deleted", True)
    await problem(await client.get(url), 404, "not_found")
    await problem(await client.patch(url, json={"status": "active"}), 404, "not_found")


async def test_a_name_is_free_again_when_its_owner_is_archived(client: httpx.AsyncClient):
    made = await create(client)
    again = await client.post(f"{API}/capabilities", json={"definition": DEFINITION})
    await problem(again, 409, "name_taken", "definition.name")
    await client.delete(f"{API}/capabilities/declarative/{made['id']}")
    await create(client)
    back = await client.patch(f"{API}/capabilities/declarative/{made['id']}", json={"status": "active"})
    await problem(back, 409, "name_taken", "definition.name")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "Not A Name"}, "definition.name"),
        ({"name": "web_fetch"}, "definition.name"),
        ({"name": "x" * 65}, "definition.name"),
        ({"name": "\u0430bc"}, "definition.name"),
        ({"nmae": "typo"}, "definition.nmae"),
        ({"description": "x" * 1_000_000}, "definition.description"),
        ({"description": 5}, "definition.description"),
        ({"risk_level": "extreme"}, "definition.risk_level"),
        ({"dependencies": ["nope"]}, "definition.dependencies[0]"),
        ({"dependencies": ["current_time", "declarative:nope"]}, "definition.dependencies[1]"),
        ({"dependencies": ["research_pack"]}, "definition.dependencies"),
        ({"dependencies": ["mcp:00000000-0000-7000-8000-000000000001"]}, "definition.dependencies[0]"),
        ({"skills": ["nope"]}, "definition.skills[0]"),
        ({"skills": [{"skill_md": "no front matter"}]}, "definition.skills[0].skill_md"),
        ({"files": [{"path": "../../etc/passwd", "content": ""}]}, "definition.files[0].path"),
        ({"files": [{"path": "/a", "content": "%%%", "encoding": "base64"}]}, "definition.files[0].content"),
        ({"files": [], "mounts": []}, "definition.mounts"),
        ({"tools": [{"name": "a b", "description": "", "parameters": {}}]}, "definition.tools[0].name"),
        ({"mcpServers": {"a": "http://x"}}, "definition.mcpServers.a"),
    ],
)
async def test_a_definition_that_cannot_work_is_refused_naming_the_field(
    client: httpx.AsyncClient, fields: Json, field: str
):
    response = await client.post(f"{API}/capabilities", json={"definition": {**DEFINITION, **fields}})
    assert (response.status_code, response.json()["field"]) == (400, field), response.text


async def test_a_bare_name_is_stored_as_a_reference_to_the_capability(client: httpx.AsyncClient, make_agent: Make):
    await create(client)
    agent = await make_agent(capabilities=["research_pack", "current_time"])
    assert agent["capabilities"] == [{"ref": "declarative:research_pack"}, {"ref": "current_time"}]


@pytest.mark.parametrize("ref", ["declarative:nope", "skill:nope", "mcp:nope", "nope", f"skill:skill_{7:032x}"])
@pytest.mark.parametrize("resource", ["agents", "harnesses", "sessions", "agents/import"])
async def test_a_reference_to_nothing_is_refused_wherever_it_is_written(
    client: httpx.AsyncClient, resource: str, ref: str
):
    body: Json = {"name": "helper", "system_prompt": "You help.", "capabilities": ["current_time", {"ref": ref}]}
    if resource == "sessions":
        body = {"capabilities": body["capabilities"]}
    if resource == "agents/import":
        text = f"---\nname: helper\ncapabilities: [current_time, '{ref}']\n---\nYou help.\n"
        response = await client.post(f"{API}/{resource}", content=text, headers={"Content-Type": "text/plain"})
    else:
        response = await client.post(f"{API}/{resource}", json=body)
    await problem(response, 400, "unknown_capability", "capabilities[1].ref")


async def test_a_declarative_capability_takes_no_configuration(client: httpx.AsyncClient):
    await create(client)
    body = {"capabilities": [{"ref": "declarative:research_pack", "config": {"a": 1}}]}
    await problem(await client.post(f"{API}/sessions", json=body), 400, "invalid_input", "capabilities[0].config")


async def test_a_new_name_is_followed_by_what_refers_to_it(
    client: httpx.AsyncClient, make_agent: Make, make_harness: Make, make_session: Make
):
    made = await create(client)
    other = await create(client, name="other", dependencies=["research_pack"])
    refs = ["current_time", "declarative:research_pack"]
    agent, harness = await make_agent(capabilities=refs), await make_harness(capabilities=refs)
    session = await make_session(capabilities=refs)
    url = f"{API}/capabilities/declarative"
    renamed = await client.patch(f"{url}/{made['id']}", json={"definition": {**DEFINITION, "name": "study"}})
    assert renamed.json()["capability_id"] == "declarative:study"
    for path in (f"agents/{agent['id']}", f"harnesses/{harness['id']}", f"sessions/{session['id']}"):
        found = (await client.get(f"{API}/{path}")).json()["capabilities"]
        assert found == [{"ref": "current_time"}, {"ref": "declarative:study"}], path
    definition = (await client.get(f"{url}/{other['id']}")).json()["definition"]
    assert definition["dependencies"] == ["declarative:study"]


async def test_rows_are_listed_as_capabilities_with_their_counts(client: httpx.AsyncClient, make_agent: Make):
    await create(client)
    skill_md = "---\nname: pdf-forms\ndescription: Fills in forms.\n---\nDo it."
    skill = (await client.post(f"{API}/skills", json={"skill_md": skill_md})).json()
    await make_agent(capabilities=["research_pack", "skill:pdf-forms"])
    listed = (await client.get(f"{API}/capabilities", params={"limit": 100})).json()
    assert listed["total"] == len(listed["data"])
    by_id = {one["id"]: one for one in listed["data"]}
    declared = by_id["declarative:research_pack"]
    assert (declared["name"], declared["agent_count"]) == ("Research Pack", 1)
    assert declared["dependencies"] == ["current_time"]
    assert [tool["name"] for tool in declared["tool_definitions"]] == ["open_library"]
    found = by_id[f"skill:{skill['id']}"]
    assert (found["is_skill"], found["agent_count"], found["dependencies"]) == (True, 1, ["skills"])
    for ref in ("skill:pdf-forms", f"skill:{skill['id']}", "declarative:research_pack", "virtual_bash"):
        assert (await client.get(f"{API}/capabilities/{ref}")).status_code == 200, ref
    await problem(await client.get(f"{API}/capabilities/declarative:nope"), 404, "not_found")


async def test_an_mcp_server_is_a_capability_under_each_of_its_spellings(
    client: httpx.AsyncClient, make_agent: Make, make_session: Make
):
    body = {"name": "docs", "url": "https://mcp.example/mcp", "description": "Finds documents."}
    server = (await client.post(f"{API}/mcp-servers", json=body)).json()
    key = str(UUID(server["id"].removeprefix("mcp_")))
    await make_agent(capabilities=[f"mcp:{server['id']}"])
    for ref in (f"mcp:{key}", f"mcp:{server['id']}"):
        await make_session(capabilities=[ref])
        found = (await client.get(f"{API}/capabilities/{ref}")).json()
        assert (found["id"], found["is_mcp"], found["agent_count"]) == (f"mcp:{key}", True, 1)
    await client.delete(f"{API}/mcp-servers/{server['id']}")
    refused = await client.post(f"{API}/sessions", json={"capabilities": [f"mcp:{key}"]})
    await problem(refused, 409, "archived", "capabilities[0].ref")


async def test_a_sessions_features_include_those_of_rows_and_of_what_they_bring_in(
    client: httpx.AsyncClient, make_session: Make
):
    await create(client, dependencies=["session_file_system"])
    with_rows = await make_session(harness_name="base", capabilities=["research_pack"])
    without = await make_session(harness_name="base")
    assert with_rows["features"] == ["file_system", "citations"]
    listed = (await client.get(f"{API}/sessions")).json()["data"]
    assert {one["id"]: one["features"] for one in listed} == {
        with_rows["id"]: ["file_system", "citations"],
        without["id"]: without["features"],
    }
    assert "citations" not in without["features"]


async def test_secrets_of_its_mcp_servers_are_sealed_and_shown_masked(client: httpx.AsyncClient, database: Database):
    servers = {"docs": {"type": "http", "url": "https://mcp.example/mcp", "headers": {"X-Key": "very-secret-value"}}}
    made = await create(client, mcpServers=servers)
    assert "very-secret-value" not in str(made)
    stored = await database.pool.fetchval("SELECT definition::text FROM declarative_capabilities")
    assert "very-secret-value" not in stored
    url = f"{API}/capabilities/declarative/{made['id']}"
    kept = await client.patch(url, json={"definition": made["definition"]})
    assert kept.status_code == 200, kept.text
    assert await database.pool.fetchval("SELECT definition::text FROM declarative_capabilities") == stored


async def test_rows_of_another_organization_do_not_exist(client: httpx.AsyncClient, database: Database):
    made = await create(client)
    await database.pool.execute("UPDATE declarative_capabilities SET org_id = 2")
    await problem(await client.get(f"{API}/capabilities/declarative/{made['id']}"), 404, "not_found")
    body = {"capabilities": ["declarative:research_pack"]}
    await problem(await client.post(f"{API}/sessions", json=body), 400, "unknown_capability", "capabilities[0].ref")
    assert (await client.get(f"{API}/capabilities/declarative")).json()["data"] == []


# Who may give out what


MEMBER, ADMIN = Caller(role="member"), Caller(role="admin")


async def test_only_an_admin_gives_out_high_risk_even_behind_a_dependency(
    client: httpx.AsyncClient, services: Services
):
    await create(client, name="browsing", dependencies=["web_fetch"])
    for name in ("web_fetch", "browsing"):
        refs = [CapabilityRef(ref="current_time"), CapabilityRef(ref=name)]
        with pytest.raises(Forbidden, match="web_fetch") as refused:
            await checked_refs(services, refs, MEMBER)
        assert refused.value.field == "capabilities[1].ref"
        assert len(await checked_refs(services, refs, ADMIN)) == 2
    assert await checked_refs(services, [CapabilityRef(ref="current_time")], MEMBER)


def test_an_owner_is_an_admin_and_a_member_is_not():
    risky = [type("Risky", (), {"risk_level": "high", "id": "web_fetch"})()]
    require_admin_for(Caller(role="owner"), risky, "x")  # type: ignore[arg-type]
    with pytest.raises(Forbidden):
        require_admin_for(MEMBER, risky, "x")  # type: ignore[arg-type]
