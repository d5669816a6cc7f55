"""`/v1/mcp-servers`: what a client may write, what nobody reads back, asking for tools, and OAuth in two halves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from activities.mcp.source import McpSource
from db.database import Database
from db.mcp_directory import DatabaseDirectory
from domain.config import CapabilityRef, TurnConfig
from infra.encryption import Keyring
from tests.conftest import API, Make, served
from tests.fakes.mcp_servers import Seen, discovered, helper, json_rpc, listed

SECRET = "sk-very-secret-value"
SERVERS = f"{API}/mcp-servers"
BODY = {"name": "docs", "url": "https://example.com/mcp"}


async def made(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(SERVERS, json={**BODY, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def test_a_server_is_served_as_it_was_created_but_for_its_secrets(
    client: httpx.AsyncClient, database: Database
) -> None:
    server = await made(client, description="d", api_key=SECRET, headers={"X-Team": SECRET}, protocol_mode="rc")
    assert server["id"].startswith("mcp_")
    assert {
        key: server[key] for key in (*BODY, "description", "protocol_mode", "auth_mode", "api_key_set", "status")
    } == {
        **BODY,
        "description": "d",
        "protocol_mode": "rc",
        "auth_mode": "api_key",
        "api_key_set": True,
        "status": "active",
    }
    assert server["headers"] == {"X-Team": "********"}
    assert (await client.get(f"{SERVERS}/{server['id']}")).json() == server
    assert (await client.get(SERVERS)).json()["data"] == [server]
    assert (await client.get(SERVERS, params={"search": "nothing"})).json()["data"] == []
    row = await database.pool.fetchval("SELECT row_to_json(s)::text FROM mcp_servers s")
    assert SECRET not in row
    assert (await client.get(f"{SERVERS}/config")).json()["policies"]["org:mcp-servers:create"] is True


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": " "}, "name"),
        ({"url": "ftp://example.com"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "https://a:b@example.com"}, "url"),
        ({"transport_type": "stdio"}, "transport_type"),
        ({"auth_mode": "api_key"}, "api_key"),
        ({"headers": {"Host": "x"}}, "headers"),
        ({"headers": {"X": "a\nb"}}, "headers.X"),
        ({"headers": {"X": "********"}}, "headers.X"),
        ({"api_key": "a\nb"}, "api_key"),
        ({"protocol_mode": "future"}, "protocol_mode"),
    ],
)
async def test_bad_input_is_refused_by_field(client: httpx.AsyncClient, fields: dict[str, Any], field: str) -> None:
    response = await client.post(SERVERS, json={**BODY, **fields})
    assert (response.status_code, response.json()["field"]) == (400, field), response.text
    assert (await client.get(SERVERS)).json()["data"] == []


async def test_an_edit_keeps_what_it_does_not_name_and_masked_values(client: httpx.AsyncClient) -> None:
    server = await made(client, api_key=SECRET, headers={"A": "1", "B": "2"})
    path = f"{SERVERS}/{server['id']}"
    edited = (await client.patch(path, json={"description": "new", "headers": {"A": "********", "C": "3"}})).json()
    assert (edited["description"], edited["headers"], edited["api_key_set"]) == (
        "new",
        {"A": "********", "C": "********"},
        True,
    )
    assert (await client.patch(path, json={"headers": {"B": "********"}})).status_code == 400
    assert (await client.patch(path, json={"api_key": ""})).json()["field"] == "api_key"
    bare = (await client.patch(path, json={"api_key": "", "auth_mode": "none", "headers": {}})).json()
    assert (bare["api_key_set"], bare["auth_mode"]) == (False, "none")
    assert "headers" not in bare


async def test_secrets_do_not_follow_a_server_to_another_host(client: httpx.AsyncClient) -> None:
    server = await made(client, api_key=SECRET, headers={"A": "1"})
    path = f"{SERVERS}/{server['id']}"
    elsewhere = {"url": "https://evil.example/mcp"}
    assert (await client.patch(path, json={"url": "https://example.com/v2/mcp"})).status_code == 200
    assert (await client.patch(path, json=elsewhere)).json()["field"] == "api_key"
    assert (await client.patch(path, json={**elsewhere, "api_key": "new"})).json()["field"] == "headers"
    kept = {**elsewhere, "api_key": "new", "headers": {"A": "********"}}
    assert (await client.patch(path, json=kept)).json()["field"] == "headers"
    assert (await client.patch(path, json={**elsewhere, "api_key": "new", "headers": {"A": "2"}})).status_code == 200


async def test_names_are_unique_and_a_server_is_archived_before_it_is_deleted(client: httpx.AsyncClient) -> None:
    server = await made(client, api_key=SECRET)
    taken = await client.post(SERVERS, json=BODY)
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    path = f"{SERVERS}/{server['id']}"
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(SERVERS)).json()["data"] == []
    archived = (await client.get(SERVERS, params={"include_archived": True})).json()["data"]
    assert [one["status"] for one in archived] == ["archived"]
    assert (await client.patch(path, json={"description": "x"})).json()["code"] == "archived"
    await made(client)
    assert (await client.patch(path, json={"status": "active"})).json()["code"] == "name_taken"
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(path)).status_code == 404
    assert (await client.delete(path)).status_code == 404


@pytest.mark.parametrize("way", ["delete", "patch"])
async def test_whichever_way_a_server_is_deleted_its_secrets_go_with_it(
    client: httpx.AsyncClient, database: Database, way: str
) -> None:
    server = await made(client, api_key=SECRET, headers={"A": "1"})
    path = f"{SERVERS}/{server['id']}"
    refused = await client.patch(path, json={"status": "deleted"})
    assert (refused.status_code, refused.json()["field"]) == (409, "status")
    await client.delete(path)
    deleted = await (client.delete(path) if way == "delete" else client.patch(path, json={"status": "deleted"}))
    assert deleted.is_success, deleted.text
    row = await database.pool.fetchrow("SELECT * FROM mcp_servers")
    assert row is not None
    kept = {name for name in ("api_key", "headers", "oauth_client", "oauth_grant") if row[name] is not None}
    assert (kept, row["header_names"], row["status"]) == (set(), [], "deleted")
    assert row["deleted_at"] is not None


async def test_tools_are_asked_for_kept_and_asked_for_again(client: httpx.AsyncClient) -> None:
    seen = Seen()
    async with helper(seen, token=SECRET) as url:
        server = await made(client, url=url, api_key="wrong")
        path = f"{SERVERS}/{server['id']}"
        refused = await client.post(f"{path}/refresh")
        assert (refused.status_code, refused.json()["code"]) == (502, "mcp_server_unavailable")
        await client.patch(path, json={"api_key": SECRET})
        listed_tools = (await client.get(f"{path}/tools")).json()
        assert "add" in [tool["name"] for tool in listed_tools["data"]]
        before = len(seen.methods)
        again = (await client.get(f"{path}/tools")).json()
        assert again["age_seconds"] > 0
        assert len(seen.methods) == before
        assert (await client.post(f"{path}/refresh")).json()["total"] == listed_tools["total"]
        assert len(seen.methods) > before
    gone = await client.post(f"{path}/refresh")
    assert gone.status_code == 502
    still = (await client.get(f"{path}/tools")).json()
    assert (still["total"], bool(still["problem"])) == (listed_tools["total"], True)
    await client.patch(path, json={"status": "disabled"})
    assert (await client.post(f"{path}/refresh")).status_code == 409


async def test_only_usable_servers_of_the_own_organization_reach_a_turn(
    client: httpx.AsyncClient, database: Database, keyring: Keyring, make_session: Make
) -> None:
    server, session = await made(client), await make_session()
    directory = DatabaseDirectory(database.pool, keyring)
    key = server["id"].removeprefix("mcp_")
    config = TurnConfig(capabilities=[CapabilityRef(ref=f"mcp:{key}"), CapabilityRef(ref="mcp:" + "0" * 32)])

    async def found() -> list[str]:
        return [target.capability_id for target in await directory.targets(session["id"], config)]

    assert await found() == [f"mcp:{key}"]
    await client.delete(f"{SERVERS}/{server['id']}")
    assert await found() == [f"mcp:{key}"], "sessions go on with an archived server"
    await database.pool.execute("UPDATE mcp_servers SET status = 'disabled'")
    assert await found() == []
    await database.pool.execute("UPDATE mcp_servers SET status = 'active', org_id = 2")
    assert await found() == []
    assert (await client.get(f"{SERVERS}/{server['id']}")).status_code == 404


async def test_scoped_secrets_survive_a_round_trip_but_not_a_change_of_host(
    client: httpx.AsyncClient, database: Database, make_agent: Make
) -> None:
    entry = {"type": "http", "url": "https://example.com/mcp", "headers": {"Authorization": f"Bearer {SECRET}"}}
    agent = await make_agent(mcpServers={"docs": entry})
    shown = agent["mcpServers"]
    assert shown == {"docs": {**entry, "headers": {"Authorization": "********"}}}
    before = await database.pool.fetchval("SELECT mcp_servers::text FROM agents")
    path = f"{API}/agents/{agent['id']}"
    assert (await client.patch(path, json={"mcpServers": shown})).json()["mcpServers"] == shown
    assert await database.pool.fetchval("SELECT mcp_servers::text FROM agents") == before
    moved = {"docs": {**shown["docs"], "url": "https://evil.example/mcp"}}
    refused = await client.patch(path, json={"mcpServers": moved})
    assert (refused.status_code, refused.json()["field"]) == (400, "mcpServers.docs.headers.Authorization")
    secret = await database.pool.fetchval("SELECT id::text FROM mcp_scoped_secrets")
    stolen = {"docs": {**entry, "headers": {"A": {"secret": secret}}}}
    assert (await client.patch(path, json={"mcpServers": stolen})).status_code == 400
    exported = await client.get(f"{path}/export")
    assert SECRET not in exported.text


# --- OAuth -------------------------------------------------------------------------------------------------------------


class AuthorizedServer:
    """An MCP server and its authorization server in one."""

    def __init__(self) -> None:
        self.url = ""
        self.access = "access-1"
        self.refreshes = 0
        self.takes_refresh = True
        self.forms: list[dict[str, str]] = []
        self.challenge = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        status, content = self._answer(scope, body)
        headers = [(b"content-type", b"application/json")]
        if status == 401:
            metadata = f'Bearer resource_metadata="{self.url}/.well-known/oauth-protected-resource"'
            headers.append((b"www-authenticate", metadata.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _answer(self, scope: Any, body: bytes) -> tuple[int, bytes]:
        match scope["path"]:
            case "/.well-known/oauth-protected-resource":
                return 200, json.dumps({"resource": f"{self.url}/mcp", "authorization_servers": [self.url]}).encode()
            case "/.well-known/oauth-authorization-server":
                return 200, json.dumps(self._metadata()).encode()
            case "/register":
                return 201, json.dumps(
                    {**json.loads(body), "client_id": "client-1", "token_endpoint_auth_method": "none"}
                ).encode()
            case "/token":
                return self._token({name: values[0] for name, values in parse_qs(body.decode()).items()})
            case "/mcp":
                return self._mcp(dict(scope["headers"]).get(b"authorization", b"").decode(), json.loads(body or b"{}"))
        return 404, b"{}"

    def _metadata(self) -> dict[str, object]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "registration_endpoint": f"{self.url}/register",
            "response_types_supported": ["code"],
            "code_challenge_methods_supported": ["S256"],
        }

    def _token(self, form: dict[str, str]) -> tuple[int, bytes]:
        self.forms.append(form)
        if form["grant_type"] == "refresh_token":
            if not self.takes_refresh or form["refresh_token"] != f"refresh-{self.refreshes}":
                return 400, b'{"error": "invalid_grant"}'
            self.refreshes += 1
            self.access = f"access-refreshed-{self.refreshes}"
        token = {
            "access_token": self.access,
            "token_type": "Bearer",
            "expires_in": 3600,
            "refresh_token": f"refresh-{self.refreshes}",
        }
        return 200, json.dumps(token).encode()

    def _mcp(self, authorization: str, request: dict[str, Any]) -> tuple[int, bytes]:
        if authorization != f"Bearer {self.access}":
            return 401, b"{}"
        match request["method"]:
            case "server/discover":
                answer = discovered(request)
            case "tools/list":
                answer = listed(request, {"name": "t", "inputSchema": {"type": "object"}})
            case _:
                answer = json_rpc(request, {"resultType": "complete", "content": [{"type": "text", "text": "done"}]})
        return answer[0], answer[2]


@contextlib.asynccontextmanager
async def authorized_server() -> AsyncIterator[AuthorizedServer]:
    server = AuthorizedServer()
    async with served(server, lifespan="off", ends_at_once=True) as url:  # type: ignore[arg-type]  # any ASGI app
        server.url = url
        yield server


async def connected(client: httpx.AsyncClient, server: AuthorizedServer) -> str:
    """The path of a server that a person has authorized."""
    resource = await made(client, url=f"{server.url}/mcp", auth_mode="o_auth")
    path = f"{SERVERS}/{resource['id']}"
    begun = await client.post(f"{path}/oauth/authorize")
    assert begun.status_code == 200, begun.text
    query = {name: values[0] for name, values in parse_qs(urlsplit(begun.json()["authorization_url"]).query).items()}
    assert (query["client_id"], query["code_challenge_method"]) == ("client-1", "S256")
    assert query["redirect_uri"].endswith("/v1/mcp-servers/oauth/callback")
    finished = await client.get(f"{SERVERS}/oauth/callback", params={"state": query["state"], "code": "code-1"})
    assert finished.status_code == 200, finished.text
    again = await client.get(f"{SERVERS}/oauth/callback", params={"state": query["state"], "code": "code-1"})
    assert (again.status_code, again.json()["field"]) == (400, "state")
    return path


async def test_a_person_authorizes_a_server_and_tokens_are_renewed_without_the_person(
    client: httpx.AsyncClient, database: Database, keyring: Keyring
) -> None:
    async with authorized_server() as server:
        path = await connected(client, server)
        assert (await client.get(path)).json()["oauth_connected"] is True
        form = server.forms[0]
        assert (form["grant_type"], form["code"], form["resource"]) == (
            "authorization_code",
            "code-1",
            f"{server.url}/mcp",
        )
        assert len(form["code_verifier"]) >= 43
        assert (await client.post(f"{path}/refresh")).json()["total"] == 1
        row = await database.pool.fetchval("SELECT row_to_json(s)::text FROM mcp_servers s")
        assert not any(secret in row for secret in ("access-1", "refresh-0", "client-1"))
        server.access = "revoked"  # what is stored is not taken any more
        assert (await client.post(f"{path}/refresh")).json()["total"] == 1
        assert server.refreshes == 1
        server.access, server.takes_refresh = "revoked again", False
        refused = await client.post(f"{path}/refresh")
        assert refused.status_code == 502
        assert f"{path.rpartition('/')[2]}/oauth/authorize" in refused.json()["detail"]
        assert (await client.get(path)).json().get("oauth_connected", False) is False


async def test_a_call_without_a_token_says_where_to_connect(
    client: httpx.AsyncClient, database: Database, keyring: Keyring, make_session: Make
) -> None:
    async with authorized_server() as server:
        resource = await made(client, url=f"{server.url}/mcp", auth_mode="o_auth")
        session = await make_session()
        config = TurnConfig(capabilities=[CapabilityRef(ref=f"mcp:{resource['id'][4:]}")])
        source = McpSource(DatabaseDirectory(database.pool, keyring), ("127.0.0.1",))
        (capability,) = await source.capabilities(session["id"], config)
        assert f"/v1/mcp-servers/{resource['id']}/oauth/authorize" in (capability.system_prompt or "")


async def test_an_authorization_that_was_not_begun_here_or_not_granted_stores_nothing(
    client: httpx.AsyncClient,
) -> None:
    callback = f"{SERVERS}/oauth/callback"
    assert (await client.get(callback, params={"state": "made-up", "code": "x"})).status_code == 400
    async with authorized_server() as server:
        resource = await made(client, url=f"{server.url}/mcp", auth_mode="o_auth")
        path = f"{SERVERS}/{resource['id']}"
        begun = (await client.post(f"{path}/oauth/authorize")).json()
        (state,) = parse_qs(urlsplit(begun["authorization_url"]).query)["state"]
        denied = await client.get(callback, params={"state": state, "error": "access_denied"})
        assert (denied.status_code, denied.json()["field"]) == (400, "error")
        begun = (await client.post(f"{path}/oauth/authorize")).json()
        (state,) = parse_qs(urlsplit(begun["authorization_url"]).query)["state"]
        mixed = await client.get(callback, params={"state": state, "code": "c", "iss": "https://evil.example"})
        assert mixed.status_code == 502
        assert not server.forms
        assert (await client.get(path)).json().get("oauth_connected", False) is False


async def test_moving_or_disconnecting_a_server_forgets_its_token(client: httpx.AsyncClient) -> None:
    async with authorized_server() as server:
        path = await connected(client, server)
        assert (await client.patch(path, json={"description": "x"})).json()["oauth_connected"] is True
        assert (await client.delete(f"{path}/oauth")).status_code == 204
        assert (await client.get(path)).json().get("oauth_connected", False) is False
    none = await client.patch(path, json={"auth_mode": "none"})
    assert none.json()["auth_mode"] == "none"
    assert (await client.post(f"{path}/oauth/authorize")).status_code == 409
