"""Memories and connections over HTTP: life cycle, files, sources, isolation, and what is refused, with the field at fault."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
import structlog

from db.database import Database
from db.secret_columns import check_secrets
from domain.ids import Prefix, new_id, parse_id
from domain.memories import SYNC_NOT_SUPPORTED
from infra.encryption import Keyring
from tests.conftest import API

PLANTED = "sk-planted-0123456789"


async def make(client: httpx.AsyncClient, name: str = "Design docs", **fields: Any) -> dict[str, Any]:
    response = await client.post(f"{API}/memories", json={"name": name, **fields})
    assert response.status_code == 201, response.text
    return response.json()


def refused(response: httpx.Response, status: int, code: str, field: str | None = None) -> None:
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field), response.text


async def test_a_memory_lives_from_active_to_archived_to_deleted_with_its_files(
    client: httpx.AsyncClient, database: Database
) -> None:
    made = await make(client, description="What we decided")
    url = f"{API}/memories/{made['id']}"
    assert (made["status"], made["source"], made["source_type"], made["sync_status"], made["is_readonly"]) == (
        *("active", {"provider": "manual"}, "manual", "idle", False),
    )
    assert (await client.get(url)).json() == made
    refused(await client.post(f"{API}/memories", json={"name": "Design docs"}), 409, "name_taken", "name")
    other = await make(client, "other")
    refused(
        await client.patch(f"{API}/memories/{other['id']}", json={"name": "Design docs"}), 409, "name_taken", "name"
    )
    found = (await client.get(f"{API}/memories", params={"search": "DECIDED what"})).json()["data"]
    assert [one["id"] for one in found] == [made["id"]]
    assert (await client.post(f"{url}/fs/a.md", json={"content": "x"})).status_code == 201
    refused(await client.patch(url, json={"status": "deleted"}), 409, "conflict", "status")
    assert (await client.delete(url)).status_code == 204
    assert (await client.delete(url)).status_code == 204
    assert [one["id"] for one in (await client.get(f"{API}/memories")).json()["data"]] == [other["id"]]
    refused(await client.patch(url, json={"name": "x"}), 409, "archived")
    refused(await client.post(f"{url}/fs/b.md", json={"content": "x"}), 409, "archived")
    assert (await client.get(f"{url}/fs/a.md")).json()["content"] == "x"
    assert (await client.patch(url, json={"status": "active"})).json()["status"] == "active"
    await client.delete(url)
    assert (await client.patch(url, json={"status": "deleted"})).json()["status"] == "deleted"
    refused(await client.get(url), 404, "not_found")
    refused(await client.get(f"{url}/fs"), 404, "not_found")
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_blobs") == 0


async def test_files_of_a_memory_are_written_read_searched_and_deleted(client: httpx.AsyncClient) -> None:
    fs = f"{API}/memories/{(await make(client))['id']}/fs"
    made = (await client.post(f"{fs}/notes/a.md", json={"content": "alpha\nbeta"})).json()
    assert (made["path"], made["is_directory"], made["size_bytes"]) == ("/notes/a.md", False, 10)
    assert "content" not in made
    binary = base64.b64encode(b"\xff\x00").decode()
    await client.post(f"{fs}/bin", json={"content": binary, "encoding": "base64"})
    read = (await client.get(f"{fs}/bin")).json()
    assert (read["content"], read["encoding"]) == (binary, "base64")
    assert (await client.post(f"{fs}/empty", json={})).json()["size_bytes"] == 0
    assert (await client.post(f"{fs}/dir", json={"is_directory": True})).json()["is_directory"]
    assert [one["path"] for one in (await client.get(fs)).json()["data"]] == ["/bin", "/dir", "/empty", "/notes"]
    assert [one["path"] for one in (await client.get(f"{fs}/notes")).json()["data"]] == ["/notes/a.md"]
    grep = (await client.post(f"{fs}/_/grep", json={"pattern": "^b.ta$", "path_pattern": "*.md"})).json()["data"]
    assert grep == [{"path": "/notes/a.md", "size_bytes": 10}]
    assert (await client.post(f"{fs}/_/stat", json={"path": "/notes/a.md"})).json() == made
    assert (await client.get(f"{fs}/_/download/bin")).content == b"\xff\x00"
    assert (await client.put(f"{fs}/notes/a.md", json={"content": "new"})).json()["content"] == "new"
    refused(await client.put(f"{fs}/missing", json={"content": "x"}), 404, "not_found", "path")
    refused(await client.put(f"{fs}/notes/a.md", json={}), 400, "invalid_input", "content")
    refused(await client.post(f"{fs}/notes/a.md", json={"content": "x"}), 409, "already_exists", "path")
    refused(await client.post(f"{fs}/x", json={"content": "%", "encoding": "base64"}), 400, "invalid_input", "content")
    refused(await client.post(f"{fs}/x", json={"content": "a", "is_directory": True}), 400, "invalid_input", "content")
    refused(await client.post(f"{fs}/_/grep", json={"pattern": "("}), 400, "invalid_input", "pattern")
    refused(await client.delete(f"{fs}/notes"), 409, "conflict", "path")
    assert (await client.delete(f"{fs}/notes", params={"recursive": "true"})).status_code == 204
    refused(await client.delete(f"{fs}/notes"), 404, "not_found", "path")
    for bad in ("%2e%2e/x", "a/%2e%2e/%2e%2e/x", "a%00b"):
        response = await client.post(f"{fs}/{bad}", json={"content": "x"})
        assert response.status_code in (400, 404), (bad, response.text)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (
            {"repository": "acme/design-docs", "root_folder": "docs/"},
            {"provider": "github", "repository": "acme/design-docs", "branch": "main", "root_folder": "docs/"},
        ),
        (
            {"type": "git", "url": "https://example.com/a.git", "branch": "dev", "sync_interval_secs": 300},
            {"provider": "git", "url": "https://example.com/a.git", "branch": "dev", "sync_interval_secs": 300},
        ),
    ],
)
async def test_a_remote_source_is_kept_and_syncing_it_says_that_it_cannot(
    client: httpx.AsyncClient, source: dict[str, Any], shown: dict[str, Any]
) -> None:
    made = await make(client, source=source)
    assert (made["source"], made["source_type"], made["is_readonly"]) == (shown, shown["provider"], True)
    url = f"{API}/memories/{made['id']}"
    synced = (await client.post(f"{url}/sync", json={})).json()
    assert (synced["sync_status"], synced["last_sync_error"]) == ("failed", SYNC_NOT_SUPPORTED)
    assert "last_synced_at" not in synced
    refused(await client.post(f"{url}/fs/a", json={"content": "x"}), 403, "read_only")
    assert (await client.get(f"{url}/fs")).json() == {"data": []}
    manual = (await client.patch(url, json={"source": {"type": "manual"}})).json()
    assert (manual["is_readonly"], manual["sync_status"], "last_sync_error" in manual) == (False, "idle", False)
    refused(await client.post(f"{url}/sync", json={}), 400, "invalid_input")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 200}, "name"),
        ({"name": "x", "description": "d" * 20_000}, "description"),
        ({"name": "x", "source": {"repository": "no slash"}}, "source.repository"),
        ({"name": "x", "source": {"type": "github"}}, "source.repository"),
        ({"name": "x", "source": {"type": "git"}}, "source.url"),
        ({"name": "x", "source": {"url": "https://me:secret@example.com/a"}}, "source.url"),
        ({"name": "x", "source": {"repository": "a/b", "url": "c"}}, "source.url"),
        ({"name": "x", "source": {"repository": "a/b", "sync_interval_secs": 5}}, "source.sync_interval_secs"),
        ({"name": "x", "source": {"type": "svn"}}, "source.type"),
    ],
)
async def test_a_bad_memory_names_the_field(client: httpx.AsyncClient, body: dict[str, Any], field: str) -> None:
    response = await client.post(f"{API}/memories", json=body)
    assert (response.status_code, response.json()["field"]) == (400, field), response.text


async def test_a_memory_of_another_organization_is_not_there(client: httpx.AsyncClient, database: Database) -> None:
    made = await make(client)
    await database.pool.execute("UPDATE memories SET org_id = 2 WHERE id = $1", parse_id(Prefix.MEMORY, made["id"]))
    for memory in (made["id"], new_id(Prefix.MEMORY)):
        url = f"{API}/memories/{memory}"
        for response in (
            await client.get(url),
            await client.patch(url, json={"name": "x"}),
            await client.delete(url),
            await client.post(f"{url}/sync", json={}),
            await client.get(f"{url}/fs"),
            await client.get(f"{url}/fs/a"),
            await client.post(f"{url}/fs/a", json={"content": "x"}),
            await client.post(f"{url}/fs/_/grep", json={"pattern": "x"}),
        ):
            assert response.status_code == 404, response.text
    assert (await client.get(f"{API}/memories")).json() == {"data": []}


# --- connections ------------------------------------------------------------------------------------------------------------


async def test_a_connection_is_set_replaced_listed_and_removed_and_its_key_never_shown(
    client: httpx.AsyncClient, database: Database, keyring: Keyring
) -> None:
    url = f"{API}/user/connections"
    with structlog.testing.capture_logs() as lines:
        answers = [
            await client.post(f"{url}/brave", json={"api_key": PLANTED}),
            await client.post(f"{url}/brave", json={"api_key": f"{PLANTED}-2"}),
            await client.post(f"{url}/brave", json={"api_key": [PLANTED]}),
            await client.get(url),
        ]
    first, second = answers[0].json(), answers[1].json()
    assert (first["provider"], first["connection_type"]) == ("brave", "api_key")
    assert (first["created_at"], first["connected_at"]) == (second["created_at"], second["created_at"])
    assert second["updated_at"] >= first["updated_at"]
    assert answers[3].json() == {"data": [second]}
    stored = await database.pool.fetch("SELECT * FROM user_connections")
    assert len(stored) == 1
    assert PLANTED not in str(stored) + "".join(one.text for one in answers) + str(lines)
    assert (await check_secrets(database, keyring, lambda: None)).readable == 1
    assert (await client.delete(f"{url}/brave")).status_code == 204
    refused(await client.delete(f"{url}/brave"), 404, "not_found")
    assert (await client.get(url)).json() == {"data": []}


async def test_bad_connections_are_refused(client: httpx.AsyncClient) -> None:
    url = f"{API}/user/connections"
    refused(await client.post(f"{url}/brave", json={"api_key": " "}), 400, "invalid_input", "api_key")
    refused(await client.post(f"{url}/brave", json={"api_key": "x" * 20_000}), 400, "input_too_large", "api_key")
    refused(await client.post(f"{url}/Not%20One", json={"api_key": "x"}), 400, "invalid_input", "provider")
    refused(await client.post(f"{url}/{'x' * 65}", json={"api_key": "x"}), 400, "invalid_input", "provider")
