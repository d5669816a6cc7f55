"""The registry of skills over the API."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import httpx
import pytest

from db.database import Database
from db.skills import DatabaseSkills
from domain.ids import Prefix, new_id
from tests.conftest import API, Make

Json = dict[str, Any]

GOOD = "---\nname: pdf-forms\ndescription: Fills in PDF forms.\nlicense: MIT\nmetadata: {author: me}\n---\nDo it.\n"
SKILLS = f"{API}/skills"


def zipped(**files: bytes | str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_md", ".md"), content)
    return packed.getvalue()


async def create(client: httpx.AsyncClient, skill_md: str = GOOD) -> Json:
    response = await client.post(SKILLS, json={"skill_md": skill_md})
    assert response.status_code == 201, response.text
    return response.json()


def problem(response: httpx.Response, status: int, code: str, field: str | None = None) -> str:
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field), body
    return body["detail"]


async def test_a_skill_is_created_from_its_text_and_read_back(client: httpx.AsyncClient):
    made = await create(client)
    assert made["id"].startswith("skill_")
    assert (made["name"], made["description"], made["license"]) == ("pdf-forms", "Fills in PDF forms.", "MIT")
    assert (made["source_type"], made["status"], made["metadata"]) == ("markdown", "active", {"author": "me"})
    assert (await client.get(f"{SKILLS}/{made['id']}")).json() == made
    assert (await client.get(f"{SKILLS}/{made['id']}/content")).json() == {"skill_md": GOOD, "files": []}
    assert [one["id"] for one in (await client.get(SKILLS, params={"search": "pdf FORMS"})).json()["data"]] == [
        made["id"]
    ]
    assert (await client.get(SKILLS, params={"search": "%"})).json()["data"] == []
    assert all((await client.get(f"{SKILLS}/config")).json()["policies"].values())


@pytest.mark.parametrize("as_form", [True, False])
async def test_an_archive_is_uploaded_with_its_files(client: httpx.AsyncClient, as_form: bool):
    archive = zipped(pdf__SKILL_md=GOOD, pdf__scripts__run="#!/bin/sh", pdf__logo=b"\xff\x00")
    if as_form:
        response = await client.post(f"{SKILLS}/upload", files={"file": ("skill.zip", archive, "application/zip")})
    else:
        response = await client.post(f"{SKILLS}/upload", content=archive, headers={"Content-Type": "application/zip"})
    assert response.status_code == 201, response.text
    made = response.json()
    assert (made["name"], made["source_type"]) == ("pdf-forms", "archive")
    content = (await client.get(f"{SKILLS}/{made['id']}/content")).json()
    assert content["files"] == [
        {"path": "logo", "content": "/wA=", "encoding": "base64"},
        {"path": "scripts/run", "content": "#!/bin/sh"},
    ]


async def test_a_bad_skill_is_refused_with_everything_that_is_wrong(client: httpx.AsyncClient):
    detail = problem(
        await client.post(SKILLS, json={"skill_md": "---\nname: A\n---\n"}), 422, "invalid_skill", "skill_md"
    )
    assert "`name`" in detail
    assert "`description`" in detail
    for body in (b"no archive", zipped(readme="x"), zipped(SKILL_md=GOOD, **{"..__evil": "x"})):
        response = await client.post(f"{SKILLS}/upload", content=body, headers={"Content-Type": "application/zip"})
        problem(response, 422, "invalid_skill", "file")
    problem(
        await client.post(f"{SKILLS}/upload", headers={"Content-Type": "application/zip"}), 400, "invalid_input", "file"
    )
    problem(await client.post(f"{SKILLS}/upload", files={}, data={"a": "b"}), 422, "invalid_skill", "file")
    assert (await client.get(SKILLS)).json()["data"] == []


async def test_an_upload_beyond_the_limit_is_refused(client: httpx.AsyncClient):
    body = b"PK" + bytes(11 * 1024 * 1024)
    response = await client.post(f"{SKILLS}/upload", content=body, headers={"Content-Type": "application/zip"})
    problem(response, 413, "payload_too_large")


async def test_validation_says_what_creating_would_find_and_stores_nothing(client: httpx.AsyncClient):
    good = (await client.post(f"{SKILLS}/validate", json={"skill_md": GOOD})).json()
    assert good == {"valid": True, "name": "pdf-forms", "description": "Fills in PDF forms."}
    bad = (await client.post(f"{SKILLS}/validate", json={"skill_md": "---\nname: A\n---\n"})).json()
    assert bad["valid"] is False
    assert len(bad["errors"]) == 2
    odd = (await client.post(f"{SKILLS}/validate", json={"skill_md": GOOD.replace("license", "licence")})).json()
    assert (odd["valid"], len(odd["warnings"])) == (True, 1)
    assert (await client.get(SKILLS)).json()["total"] == 0


async def test_names_are_unique_until_a_skill_is_archived(client: httpx.AsyncClient):
    made = await create(client)
    problem(await client.post(SKILLS, json={"skill_md": GOOD}), 409, "name_taken", "skill_md")
    assert (await client.delete(f"{SKILLS}/{made['id']}")).status_code == 204
    assert (await client.get(SKILLS)).json()["data"] == []
    again = await create(client)
    problem(await client.patch(f"{SKILLS}/{made['id']}", json={"status": "active"}), 409, "name_taken", "skill_md")
    problem(await client.patch(f"{SKILLS}/{made['id']}", json={"skill_md": GOOD}), 409, "archived")
    problem(await client.patch(f"{SKILLS}/{again['id']}", json={"status": "deleted"}), 409, "conflict", "status")
    deleted = await client.patch(f"{SKILLS}/{made['id']}", json={"status": "deleted"})
    assert deleted.json()["status"] == "deleted"
    problem(await client.get(f"{SKILLS}/{made['id']}"), 404, "not_found")


async def test_an_update_changes_the_text_and_keeps_the_files(client: httpx.AsyncClient):
    archive = zipped(SKILL_md=GOOD, notes="n")
    made = (await client.post(f"{SKILLS}/upload", content=archive, headers={"Content-Type": "application/zip"})).json()
    url = f"{SKILLS}/{made['id']}"
    changed = await client.patch(url, json={"skill_md": GOOD.replace("Fills in", "Completes"), "status": "disabled"})
    assert (changed.json()["description"], changed.json()["status"]) == ("Completes PDF forms.", "disabled")
    assert [file["path"] for file in (await client.get(f"{url}/content")).json()["files"]] == ["notes"]
    problem(await client.patch(url, json={"skill_md": "broken"}), 422, "invalid_skill", "skill_md")


async def test_usage_counts_agents_and_harnesses_by_every_spelling(
    client: httpx.AsyncClient, make_agent: Make, make_harness: Make
):
    made = await create(client)
    await create(client, GOOD.replace("pdf-forms", "unused"))
    await make_agent(name="one", capabilities=[f"skill:{made['id']}", "skill:pdf-forms"])
    await make_agent(name="two", capabilities=["skill:pdf-forms"])
    await make_harness(capabilities=["skill:pdf-forms"])
    assert (await client.get(f"{SKILLS}/usage")).json() == {made["id"]: {"agents": 2, "harnesses": 1}}


async def test_skills_of_another_organization_do_not_exist(
    client: httpx.AsyncClient, database: Database, make_session: Make
):
    made, session = await create(client), await make_session()
    port = DatabaseSkills(database.pool)
    found = await port.package(session["id"], made["id"])
    assert found is not None
    assert found.manifest.name == "pdf-forms"
    await database.pool.execute("UPDATE skills SET org_id = 2")
    assert await port.package(session["id"], made["id"]) is None
    assert await port.package(new_id(Prefix.SESSION), made["id"]) is None
    problem(await client.get(f"{SKILLS}/{made['id']}"), 404, "not_found")
    problem(await client.get(f"{SKILLS}/{made['id']}/content"), 404, "not_found")
    body = {"capabilities": [f"skill:{made['id']}"]}
    problem(await client.post(f"{API}/sessions", json=body), 400, "unknown_capability", "capabilities[0].ref")


async def test_malformed_ids_and_bodies_are_refused(client: httpx.AsyncClient):
    problem(await client.get(f"{SKILLS}/nope"), 400, "malformed_id", "skill_id")
    problem(await client.post(SKILLS, json={}), 400, "invalid_input", "skill_md")
    problem(await client.get(f"{SKILLS}/skill_{5:032x}"), 404, "not_found")
