"""Workspaces and their files over HTTP: life cycle, files of sessions, and what is refused, with the field that is at fault."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any
from uuid import UUID

import httpx
import pytest

from db import workspace_changes
from db.database import Database
from db.workspace_files import DatabaseFiles
from domain.limits import FILE_BODY_MAX_BYTES, FILE_MAX_BYTES, GREP_MAX_MATCHES
from tests.conftest import API, Make


@pytest.fixture
async def workspace(client: httpx.AsyncClient) -> dict[str, Any]:
    return await make_workspace(client)


@pytest.fixture
def fs(workspace: dict[str, Any]) -> str:
    return f"{API}/workspaces/{workspace['id']}/fs"


async def make_workspace(client: httpx.AsyncClient, name: str = "research", **fields: Any) -> dict[str, Any]:
    response = await client.post(f"{API}/workspaces", json={"name": name, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def create(client: httpx.AsyncClient, fs: str, path: str, content: str = "x", **fields: Any) -> dict[str, Any]:
    response = await client.post(f"{fs}{path}", json={"content": content, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def paths(client: httpx.AsyncClient, fs: str) -> list[str]:
    return [entry["path"] for entry in (await client.get(fs, params={"recursive": "true"})).json()["data"]]


def refused(response: httpx.Response, status: int, code: str, field: str | None) -> str:
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field), response.text
    return body["detail"]


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


# --- workspaces -------------------------------------------------------------------------------------------------------------


async def test_a_workspace_is_created_listed_read_and_edited(client: httpx.AsyncClient) -> None:
    made = await make_workspace(client, "Team research", description="Shared for Q4")
    other = await make_workspace(client, "other")
    url = f"{API}/workspaces/{made['id']}"
    assert made["id"].startswith("wsp_")
    assert made["status"] == "active"
    assert (await client.get(url)).json() == made
    listed = (await client.get(f"{API}/workspaces")).json()["data"]
    assert [one["id"] for one in listed] == [other["id"], made["id"]]
    found = (await client.get(f"{API}/workspaces", params={"search": "q4 TEAM"})).json()["data"]
    assert [one["id"] for one in found] == [made["id"]]
    edited = (await client.patch(url, json={"name": "Renamed", "description": None})).json()
    assert edited["name"] == "Renamed"
    assert "description" not in edited
    assert (await client.patch(url, json={})).json() == edited


async def test_a_workspace_is_archived_reactivated_and_deleted_with_its_files(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, database: Database
) -> None:
    url = f"{API}/workspaces/{workspace['id']}"
    await create(client, fs, "/locked", is_readonly=True)
    assert refused(await client.patch(url, json={"status": "deleted"}), 409, "conflict", "status")
    for _ in range(2):
        assert (await client.delete(url)).status_code == 204
    archived = (await client.get(url)).json()
    assert (archived["status"], "archived_at" in archived) == ("archived", True)
    assert (await client.get(f"{API}/workspaces")).json()["data"] == []
    listed = (await client.get(f"{API}/workspaces", params={"include_archived": "true"})).json()["data"]
    assert [one["id"] for one in listed] == [workspace["id"]]
    refused(await client.patch(url, json={"name": "x"}), 409, "archived", None)
    refused(await client.post(f"{fs}/new", json={"content": ""}), 409, "archived", None)
    refused(
        await client.post(f"{API}/sessions", json={"workspace_id": workspace["id"]}), 409, "archived", "workspace_id"
    )
    assert (await client.get(f"{fs}/locked")).json()["content"] == "x"
    back = (await client.patch(url, json={"status": "active"})).json()
    assert back["status"] == "active"
    assert "archived_at" not in back
    await client.delete(url)
    assert (await client.patch(url, json={"status": "deleted"})).json()["status"] == "deleted"
    for response in (await client.get(url), await client.get(fs), await client.delete(url)):
        refused(response, 404, "not_found", None)
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_blobs") == 0


async def test_sessions_go_on_with_an_archived_and_a_deleted_workspace(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, make_session: Make
) -> None:
    session = await make_session(workspace_id=workspace["id"])
    await create(client, fs, "/a", "kept")
    url = f"{API}/workspaces/{workspace['id']}"
    await client.delete(url)
    of_session = f"{API}/sessions/{session['id']}/fs"
    await create(client, of_session, "/b")
    await client.patch(url, json={"status": "deleted"})
    assert await paths(client, of_session) == ["/a", "/b"]
    await create(client, of_session, "/c")


async def test_a_sessions_own_workspace_can_be_read_but_is_not_listed(
    client: httpx.AsyncClient, make_session: Make
) -> None:
    session = await make_session(title="Mine")
    assert (await client.get(f"{API}/workspaces")).json()["data"] == []
    own = (await client.get(f"{API}/workspaces/{session['workspace_id']}")).json()
    assert (own["name"], own["id"]) == ("Mine", session["id"].replace("session_", "wsp_"))


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "invalid_input", "name"),
        ({"name": "  "}, "invalid_input", "name"),
        ({"name": "x" * 3000}, "input_too_large", "name"),
        ({"name": "x", "description": "x" * 20_000}, "input_too_large", "description"),
        ({"name": "x\0"}, "invalid_input", None),
    ],
)
async def test_a_workspace_that_cannot_be_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], code: str, field: str | None
) -> None:
    refused(await client.post(f"{API}/workspaces", json=body), 400, code, field)


# --- files ------------------------------------------------------------------------------------------------------------------


async def test_a_file_is_created_read_changed_and_deleted(client: httpx.AsyncClient, fs: str) -> None:
    made = await create(client, fs, "/notes/Käse.md", "# Käse\n")
    assert UUID(made["id"]).version == 7
    assert (made["path"], made["name"], made["size_bytes"]) == ("/notes/Käse.md", "Käse.md", 8)
    assert (made["content"], made["encoding"], made["is_readonly"]) == ("# Käse\n", "text", False)
    assert (await client.get(f"{fs}/notes/Käse.md")).json() == made
    changed = (await client.put(f"{fs}/workspace/notes/Käse.md", json={"content": "new"})).json()
    assert (changed["id"], changed["content"], changed["created_at"]) == (made["id"], "new", made["created_at"])
    assert (await client.delete(f"{fs}/notes/Käse.md")).json() == {"deleted": True}
    assert (await client.delete(f"{fs}/notes/Käse.md")).json() == {"deleted": False}
    refused(await client.get(f"{fs}/notes/Käse.md"), 404, "not_found", "path")
    refused(await client.put(f"{fs}/notes/Käse.md", json={"content": ""}), 404, "not_found", "path")


async def test_directories_are_made_and_listed(client: httpx.AsyncClient, fs: str) -> None:
    made = await client.post(f"{fs}/a/b", json={"is_directory": True})
    assert made.status_code == 201
    assert made.json()["is_directory"]
    assert "content" not in made.json()
    await create(client, fs, "/a/c.txt")
    listed = (await client.get(f"{fs}/a")).json()["data"]
    assert [(one["path"], one["is_directory"], one["size_bytes"]) for one in listed] == [
        ("/a/b", True, 0),
        ("/a/c.txt", False, 1),
    ]
    assert await paths(client, fs) == ["/a", "/a/b", "/a/c.txt"]
    assert [one["path"] for one in (await client.get(fs)).json()["data"]] == ["/a"]
    refused(await client.delete(f"{fs}/a"), 409, "conflict", "path")
    assert (await client.delete(f"{fs}/a", params={"recursive": "true"})).json() == {"deleted": True}
    assert await paths(client, fs) == []


@pytest.mark.parametrize(
    ("content", "encoding", "shown"),
    [
        ("aé\0\U0001f989", "text", "text"),
        (b64(b"plain"), "base64", "base64"),
        (b64(b"\xff\x00\xfe"), "base64", "base64"),
        ("", None, "text"),
    ],
)
async def test_content_is_shown_as_it_was_given(
    client: httpx.AsyncClient, fs: str, content: str, encoding: str | None, shown: str
) -> None:
    fields = {} if encoding is None else {"encoding": encoding}
    made = await create(client, fs, "/file", content, **fields)
    assert (made["content"], made["encoding"]) == (content, shown)
    assert (await client.get(f"{fs}/file")).json() == made


async def test_bytes_that_are_no_text_are_base64_whatever_was_written_before(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, database: Database
) -> None:
    await create(client, fs, "/file", "text")
    files = DatabaseFiles.of_workspace(database.pool, workspace["id"])
    await files.write("/file", b"\xff\xfe")
    read = (await client.get(f"{fs}/file")).json()
    assert (read["encoding"], base64.b64decode(read["content"])) == ("base64", b"\xff\xfe")


async def test_a_download_is_the_bytes_as_an_attachment(client: httpx.AsyncClient, fs: str) -> None:
    html = b"<script>alert(1)</script>\xff"
    await create(client, fs, '/d/a "b"\u00e9;x=y.html', b64(html), encoding="base64")
    response = await client.get(f"{fs}/_/download/d/a%20%22b%22%C3%A9%3Bx%3Dy.html")
    assert response.status_code == 200
    assert response.content == html
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"
    expected = "attachment; filename*=UTF-8''a%20%22b%22%C3%A9%3Bx%3Dy.html"
    assert response.headers["content-disposition"] == expected
    refused(await client.get(f"{fs}/_/download/d"), 409, "conflict", "path")
    refused(await client.get(f"{fs}/_/download/none"), 404, "not_found", "path")


async def test_files_and_directories_are_moved_and_copied(client: httpx.AsyncClient, fs: str) -> None:
    made = await create(client, fs, "/src/a.txt", "a")
    moved = await client.post(f"{fs}/_/move", json={"src_path": "src", "dst_path": "/workspace/new/dst"})
    assert (moved.status_code, moved.json()["path"], moved.json()["is_directory"]) == (200, "/new/dst", True)
    copied = await client.post(f"{fs}/_/copy", json={"src_path": "/new/dst/a.txt", "dst_path": "b.txt"})
    assert (copied.status_code, copied.json()["path"]) == (201, "/b.txt")
    assert copied.json()["id"] != made["id"]
    assert (await client.get(f"{fs}/new/dst/a.txt")).json()["id"] == made["id"]
    for action in ("move", "copy"):
        body = {"src_path": "/new", "dst_path": "/new/dst/in"}
        refused(await client.post(f"{fs}/_/{action}", json=body), 400, "invalid_input", "dst_path")
        body = {"src_path": "/../etc", "dst_path": "/x"}
        refused(await client.post(f"{fs}/_/{action}", json=body), 400, "invalid_input", "src_path")
        body = {"src_path": "/b.txt", "dst_path": "/new"}
        refused(await client.post(f"{fs}/_/{action}", json=body), 409, "already_exists", "dst_path")
        body = {"src_path": "/none", "dst_path": "/x"}
        refused(await client.post(f"{fs}/_/{action}", json=body), 404, "not_found", "dst_path")


async def test_grep_groups_matches_by_file(client: httpx.AsyncClient, fs: str) -> None:
    await create(client, fs, "/a.md", "one\ntwo two\n")
    await create(client, fs, "/b.txt", "two\n")
    found = (await client.post(f"{fs}/_/grep", json={"pattern": "t.o"})).json()["data"]
    assert found == [
        {"path": "/a.md", "matches": [{"path": "/a.md", "line_number": 2, "line": "two two"}]},
        {"path": "/b.txt", "matches": [{"path": "/b.txt", "line_number": 1, "line": "two"}]},
    ]
    narrowed = await client.post(f"{fs}/_/grep", json={"pattern": "two", "path_pattern": "*.txt"})
    assert [one["path"] for one in narrowed.json()["data"]] == ["/b.txt"]
    refused(await client.post(f"{fs}/_/grep", json={"pattern": "("}), 400, "invalid_input", "pattern")
    body = {"pattern": "x", "path_pattern": "{{a}"}
    refused(await client.post(f"{fs}/_/grep", json=body), 400, "invalid_input", "path_pattern")
    await create(client, fs, "/many", "two\n" * (GREP_MAX_MATCHES * 2))
    found = (await client.post(f"{fs}/_/grep", json={"pattern": "two"})).json()["data"]
    assert sum(len(one["matches"]) for one in found) == GREP_MAX_MATCHES


async def test_stat_tells_of_files_and_directories(client: httpx.AsyncClient, fs: str) -> None:
    made = await create(client, fs, "/a/b", "xyz", is_readonly=True)
    stat = (await client.post(f"{fs}/_/stat", json={"path": "workspace/a/b"})).json()
    assert stat == {
        name: value for name, value in made.items() if name not in ("id", "session_id", "content", "encoding")
    }
    assert (await client.post(f"{fs}/_/stat", json={"path": "/a/"})).json()["is_directory"]
    assert (await client.post(f"{fs}/_/stat", json={"path": ""})).json()["path"] == "/"
    refused(await client.post(f"{fs}/_/stat", json={"path": "/none"}), 404, "not_found", "path")
    refused(await client.post(f"{fs}/_/stat", json={"path": "/a/../b"}), 400, "invalid_input", "path")


# --- refusals -----------------------------------------------------------------------------------------------------------------


async def test_what_is_there_is_not_created_again(client: httpx.AsyncClient, fs: str) -> None:
    await create(client, fs, "/a/b")
    for path, body in (("/a/b", {"content": "y"}), ("/a", {"is_directory": True}), ("/a/b", {"is_directory": True})):
        refused(await client.post(f"{fs}{path}", json=body), 409, "already_exists", "path")
    refused(await client.post(f"{fs}/a/b/c", json={"content": "y"}), 409, "conflict", "path")
    refused(await client.put(f"{fs}/a", json={"content": "y"}), 409, "conflict", "path")
    assert (await client.get(f"{fs}/a/b")).json()["content"] == "x"


async def test_a_read_only_file_is_protected_until_it_is_unlocked(client: httpx.AsyncClient, fs: str) -> None:
    await create(client, fs, "/a/locked", is_readonly=True)
    for response in (
        await client.put(f"{fs}/a/locked", json={"content": "y"}),
        await client.put(f"{fs}/a/locked", json={"content": "y", "is_readonly": False}),
        await client.delete(f"{fs}/a/locked"),
        await client.delete(f"{fs}/a", params={"recursive": "true"}),
    ):
        assert "/a/locked" in refused(response, 403, "read_only", "path")
    body = {"src_path": "/a", "dst_path": "/b"}
    refused(await client.post(f"{fs}/_/move", json=body), 403, "read_only", "dst_path")
    unlocked = await client.put(f"{fs}/a/locked", json={"is_readonly": False})
    assert (unlocked.status_code, unlocked.json()["is_readonly"]) == (200, False)
    assert (await client.put(f"{fs}/a/locked", json={"content": "y"})).status_code == 200


async def test_a_read_only_directory_protects_what_is_in_it(client: httpx.AsyncClient, fs: str) -> None:
    made = await client.post(f"{fs}/d", json={"is_directory": True, "is_readonly": True})
    assert made.json()["is_readonly"]
    refused(await client.post(f"{fs}/d/x", json={"content": ""}), 403, "read_only", "path")
    refused(await client.delete(f"{fs}/d"), 403, "read_only", "path")
    await client.put(f"{fs}/d", json={"is_readonly": False})
    await create(client, fs, "/d/x")


async def test_content_is_replaced_only_if_it_is_what_the_caller_has_seen(client: httpx.AsyncClient, fs: str) -> None:
    seen = (await create(client, fs, "/a", "one"))["content_hash"]
    assert (await client.put(f"{fs}/a", json={"content": "two", "expected_hash": seen})).status_code == 200
    body = {"content": "three", "expected_hash": seen}
    refused(await client.put(f"{fs}/a", json=body), 409, "content_changed", "expected_hash")
    assert (await client.get(f"{fs}/a")).json()["content"] == "two"


TRAVERSALS = [
    *(
        "/%2e%2e/etc/passwd",
        "/..%2fetc",
        "/..%2F..%2F..%2Fetc%2Fpasswd",
        "/a/%2E%2E/%2e%2e/b",
        "/%2e%2e%2f",
        "/a%2F..%2Fb",
    ),
    *(
        "/workspace%2F..%2Fx",
        "/.%2f..%2fx",
        "/a%00",
        "/a%0d%0ab",
        "/%C2%85",
        "/%E2%80%AEtxt",
        "/_%2Fx%2e%2e",
    ),
]


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_paths_that_lead_elsewhere_are_refused_in_every_spelling(
    client: httpx.AsyncClient, fs: str, path: str
) -> None:
    for method, body in (
        ("GET", None),
        ("POST", {"content": "x"}),
        ("PUT", {"content": "x"}),
        ("DELETE", None),
    ):
        response = await client.request(method, f"{fs}{path}", json=body)
        assert response.status_code in (400, 404, 405), response.text
        if response.status_code == 400:
            refused(response, 400, "invalid_input", "path")
    assert await paths(client, fs) == []


@pytest.mark.parametrize(
    "path", ["/%252e%252e/etc", "/..%5c..%5cetc", "/%EF%BC%8E%EF%BC%8E/a", "/~/a", "/$HOME", "/C:%5Ca"]
)
async def test_what_only_looks_like_another_place_is_a_name_like_any_other(
    client: httpx.AsyncClient, fs: str, path: str
) -> None:
    made = await create(client, fs, path, "inside")
    assert (await client.get(f"{fs}{path}")).json()["path"] == made["path"]
    assert ".." not in made["path"].split("/")
    assert made["path"] in await paths(client, fs)


async def test_both_forms_of_an_accent_are_one_file(client: httpx.AsyncClient, fs: str) -> None:
    await create(client, fs, "/caf%C3%A9")
    refused(await client.post(f"{fs}/cafe%CC%81", json={"content": ""}), 409, "already_exists", "path")
    assert await paths(client, fs) == ["/café"]


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "invalid_input", "content"),
        ({"content": None}, "invalid_input", "content"),
        ({"content": "x", "encoding": "hex"}, "invalid_input", "encoding"),
        ({"content": "no base64!", "encoding": "base64"}, "invalid_input", "content"),
        ({"content": "Zm9v\n", "encoding": "base64"}, "invalid_input", "content"),
        ({"content": "é", "encoding": "base64"}, "invalid_input", "content"),
        ({"content": 5}, "invalid_input", "content"),
        ({"content": "x", "is_readonly": "yes"}, "invalid_input", "is_readonly"),
    ],
)
async def test_a_file_that_cannot_be_is_refused(
    client: httpx.AsyncClient, fs: str, body: dict[str, Any], code: str, field: str
) -> None:
    refused(await client.post(f"{fs}/a", json=body), 400, code, field)
    refused(await client.put(f"{fs}/a", json=body), 400, code, field)


async def test_a_lone_surrogate_is_no_content(client: httpx.AsyncClient, fs: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post(f"{fs}/a", content=b'{"content": "\\ud800"}', headers=headers)
    refused(response, 400, "malformed_body", None)


async def test_a_file_at_its_limit_is_taken_in_both_encodings_and_one_byte_more_in_none(
    client: httpx.AsyncClient, fs: str
) -> None:
    content = b"\n" * FILE_MAX_BYTES
    for path, body in (
        ("/text", {"content": content.decode()}),
        ("/base64", {"content": b64(content), "encoding": "base64"}),
    ):
        assert (await client.post(f"{fs}{path}", json=body)).json()["size_bytes"] == FILE_MAX_BYTES
        read = await client.get(f"{fs}{path}")
        assert len(read.json()["content"]) >= FILE_MAX_BYTES
    more = content + b"x"
    for body in ({"content": more.decode()}, {"content": b64(more), "encoding": "base64"}):
        refused(await client.post(f"{fs}/more", json=body), 400, "input_too_large", "content")
    too_large = json.dumps({"content": "x" * FILE_BODY_MAX_BYTES}).encode()
    headers = {"Content-Type": "application/json"}
    refused(await client.post(f"{fs}/more", content=too_large, headers=headers), 413, "payload_too_large", None)
    assert await paths(client, fs) == ["/base64", "/text"]


async def test_a_full_workspace_says_so(client: httpx.AsyncClient, fs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_BYTES", 10)
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_ENTRIES", 3)
    await create(client, fs, "/a", "x" * 8)
    assert "workspace" in refused(
        await client.post(f"{fs}/b", json={"content": "xyz"}), 400, "input_too_large", "content"
    )
    body = {"src_path": "/a", "dst_path": "/b"}
    refused(await client.post(f"{fs}/_/copy", json=body), 400, "input_too_large", "dst_path")
    refused(await client.post(f"{fs}/1/2/3", json={"is_directory": True}), 400, "input_too_large", "path")


async def test_unknown_and_malformed_owners_are_refused(client: httpx.AsyncClient) -> None:
    missing = "0" * 32
    for owner in (f"workspaces/wsp_{missing}", f"sessions/session_{missing}"):
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/a", None),
            ("POST", "/a", {"content": ""}),
            ("DELETE", "/a", None),
            ("POST", "/_/stat", {"path": "/"}),
        ):
            refused(await client.request(method, f"{API}/{owner}/fs{path}", json=body), 404, "not_found", None)
    response = await client.get(f"{API}/workspaces/session_{missing}/fs")
    refused(response, 400, "malformed_id", "wsp_id")


# --- sessions -----------------------------------------------------------------------------------------------------------------


async def test_a_session_shows_the_files_of_its_workspace(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, make_session: Make
) -> None:
    first, second = await make_session(workspace_id=workspace["id"]), await make_session(workspace_id=workspace["id"])
    one, two = (f"{API}/sessions/{session['id']}/fs" for session in (first, second))
    made = await create(client, one, "/shared", "both")
    assert made["session_id"] == str(UUID(first["id"].removeprefix("session_")))
    assert (await client.get(f"{two}/shared")).json()["content"] == "both"
    assert (await client.get(f"{fs}/shared")).json()["session_id"] == str(UUID(workspace["id"].removeprefix("wsp_")))
    await client.delete(f"{API}/sessions/{first['id']}")
    refused(await client.get(one), 404, "not_found", None)
    assert await paths(client, two) == ["/shared"]


async def test_a_session_begins_with_the_files_of_its_layers_later_ones_first(
    client: httpx.AsyncClient, make_harness: Make, make_agent: Make, make_session: Make
) -> None:
    def file(path: str, content: str, **fields: Any) -> dict[str, Any]:
        return {"path": path, "content": content, **fields}

    parent = await make_harness(name="parent", initial_files=[file("/a", "parent"), file("/p", "parent")])
    child = await make_harness(
        name="child",
        parent_harness_id=parent["id"],
        initial_files=[file("/workspace/a", "child"), file("h", "harness")],
    )
    agent = await make_agent(
        harness_id=child["id"],
        initial_files=[file("./h", "agent", is_readonly=True), file("/bin", "AAE=", encoding="base64")],
    )
    session = await make_session(agent_id=agent["id"], initial_files=[file("/dir/s", "session"), file("/p", "session")])
    fs = f"{API}/sessions/{session['id']}/fs"
    assert await paths(client, fs) == ["/a", "/bin", "/dir", "/dir/s", "/h", "/p"]
    read = {path: (await client.get(f"{fs}{path}")).json() for path in ("/a", "/h", "/p", "/bin", "/dir/s")}
    assert [read[path]["content"] for path in read] == ["child", "agent", "session", "AAE=", "session"]
    assert [path for path in read if read[path]["is_readonly"]] == ["/h"]
    assert read["/bin"]["encoding"] == "base64"


async def test_a_shared_workspace_keeps_what_it_has(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, make_session: Make
) -> None:
    await create(client, fs, "/a", "mine", is_readonly=True)
    await client.post(f"{fs}/d", json={"is_directory": True, "is_readonly": True})
    files = [{"path": "/a", "content": "theirs"}, {"path": "/b", "content": "new"}, {"path": "/d", "content": "no"}]
    for _ in range(2):
        await make_session(workspace_id=workspace["id"], initial_files=files)
    assert (await client.get(f"{fs}/a")).json()["content"] == "mine"
    assert await paths(client, fs) == ["/a", "/b", "/d"]
    await client.put(f"{fs}/b", json={"content": "edited"})
    await make_session(workspace_id=workspace["id"], initial_files=files)
    assert (await client.get(f"{fs}/b")).json()["content"] == "edited"


async def test_sessions_that_begin_at_once_in_one_workspace_all_begin(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str
) -> None:
    def body(number: int) -> dict[str, Any]:
        files = [{"path": path, "content": str(number)} for path in ("/a", f"/own/{number}", "/b")]
        return {"workspace_id": workspace["id"], "initial_files": files if number % 2 else files[::-1]}

    work = asyncio.gather(*(client.post(f"{API}/sessions", json=body(number)) for number in range(8)))
    responses = await asyncio.wait_for(work, 60)
    assert [response.status_code for response in responses] == [201] * 8
    assert await paths(client, fs) == ["/a", "/b", "/own", *(f"/own/{number}" for number in range(8))]
    first, second = [(await client.get(f"{fs}{path}")).json()["content"] for path in ("/a", "/b")]
    assert first == second


@pytest.mark.parametrize("path", ["/../a", "", "/", "/workspace", "/a\0b", "/a//b", "/_/a", "/" + "x" * 300])
async def test_initial_files_with_paths_that_cannot_be_are_refused_when_they_are_written(
    client: httpx.AsyncClient, path: str
) -> None:
    for resource in (
        ("harnesses", {"name": "h"}),
        ("agents", {"name": "a", "system_prompt": ""}),
        ("sessions", {}),
    ):
        body = {**resource[1], "initial_files": [{"path": "/ok", "content": ""}, {"path": path, "content": ""}]}
        response = await client.post(f"{API}/{resource[0]}", json=body)
        refused(response, 400, "invalid_input", "initial_files[1].path")


async def test_initial_files_that_do_not_fit_together_are_refused_and_leave_nothing(
    client: httpx.AsyncClient, make_agent: Make, database: Database
) -> None:
    files = [{"path": "/a", "content": ""}, {"path": "/a/b", "content": ""}]
    response = await client.post(f"{API}/sessions", json={"initial_files": files})
    refused(response, 400, "invalid_input", "initial_files[0].path")
    agent = await make_agent(initial_files=files[:1])
    response = await client.post(f"{API}/sessions", json={"agent_id": agent["id"], "initial_files": files[1:]})
    assert "/a" in refused(response, 400, "invalid_input", "initial_files")
    for table in ("sessions", "workspaces", "workspace_entries", "workspace_blobs"):
        assert await database.pool.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_initial_files_that_do_not_fit_into_a_shared_workspace_are_refused(
    client: httpx.AsyncClient, workspace: dict[str, Any], fs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(client, fs, "/a", "x" * 90)
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_BYTES", 100)
    body = {"workspace_id": workspace["id"], "initial_files": [{"path": "/b", "content": "x" * 11}]}
    refused(await client.post(f"{API}/sessions", json=body), 400, "input_too_large", "initial_files")
