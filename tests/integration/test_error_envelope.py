"""Every error, whatever raised it, is one problem document; every response carries a request id."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import structlog
from litestar import Litestar, get
from litestar.params import FromPath

from api.app import create_app
from api.services import Services
from domain.errors import EverrunsError, error_classes

API = "/api/v1"
CLASSES = {cls.__name__: cls for cls in error_classes()}


@get("/raise/{name:str}", operation_id="raise_error", summary="Raise", sync_to_thread=False)
def raise_error(name: FromPath[str]) -> None:
    if name in CLASSES:
        raise CLASSES[name]
    raise RuntimeError("the password is hunter2")


@pytest.fixture
async def faulty(services: Services, client_of) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(services, extra_handlers=[raise_error])) as client:
        yield client


def check_envelope(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() >= {"type", "title", "status", "code", "detail", "instance", "error"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["error"] == {"code": code, "message": body["detail"]}


@pytest.mark.parametrize("name", CLASSES)
async def test_every_error_class_has_the_envelope(faulty: httpx.AsyncClient, name: str) -> None:
    cls: type[EverrunsError] = CLASSES[name]
    response = await faulty.get(f"{API}/raise/{name}")
    check_envelope(response, cls.status, cls.code)
    assert response.json()["detail"] == (cls.__doc__ or "").strip()
    if cls.code == "encryption_not_configured":
        assert "retry-after" not in response.headers, "only an operator can change that"
    elif cls.status in (429, 503):
        assert response.headers["retry-after"] == str(response.json()["retry_after_seconds"])


async def test_an_unexpected_error_is_logged_and_says_nothing(faulty: httpx.AsyncClient) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        response = await faulty.get(f"{API}/raise/Nothing", headers={"X-Request-Id": "mine"})
    check_envelope(response, 500, "internal_error")
    assert response.json()["detail"] == "Internal server error"
    assert "hunter2" not in response.text
    (failure,) = [line for line in lines if line["log_level"] == "error"]
    assert isinstance(failure["exc_info"], RuntimeError)
    assert failure["request_id"] == "mine"


def operations(app: Litestar) -> list[tuple[str, str]]:
    schema = app.openapi_schema.to_schema()
    return [(method.upper(), path) for path, item in schema["paths"].items() for method in item]


async def test_every_route_answers_malformed_and_unknown_ids_with_the_envelope(
    client: httpx.AsyncClient, app: Litestar
) -> None:
    """No body, no query: whatever a route makes of that, it is an answer in the right shape and never a 500."""
    walked = 0
    for method, path in operations(app):
        if path.endswith("/sse"):
            continue
        for filler in ("session_zz", "%00", "x" * 300):
            concrete = "/".join(filler if part.startswith("{") else part for part in path.split("/"))
            response = await client.request(method, concrete, headers={"Content-Type": "application/json"})
            assert response.headers["x-request-id"]
            assert response.status_code < 500, (method, concrete, response.text)
            if response.status_code >= 400:
                check_envelope(response, response.status_code, response.json()["code"])
            walked += 1
    assert walked > 100


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", f"{API}/nowhere", 404, "not_found"),
        ("PUT", f"{API}/agents", 405, "method_not_allowed"),
        ("GET", f"{API}/agents/agent_{'0' * 32}", 404, "not_found"),
        ("GET", f"{API}/agents/agent_{'A' * 32}", 400, "malformed_id"),
        ("POST", f"{API}/agents", 400, "malformed_body"),
    ],
)
async def test_router_errors_have_the_envelope(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    check_envelope(await client.request(method, path), status, code)


@pytest.mark.parametrize(
    ("content", "code", "field"),
    [
        (b"{", "malformed_body", None),
        (b"\xff", "malformed_body", None),
        (b"[]", "invalid_input", None),
        (b"{}", "invalid_input", "system_prompt"),
        (b'{"name": "x", "system_prompt": 5}', "invalid_input", "system_prompt"),
        (b'{"name": "x", "system_prompt": "a\\u0000b"}', "invalid_input", None),
        (b'{"name": "x", "system_prompt": "", "mcpServers": {"a": "\\u0000"}}', "invalid_input", "mcpServers.a"),
        (b'{"name": "x", "system_prompt": "\\ud800"}', "malformed_body", None),
        (b'{"name": "x", "system_prompt": "", "mcpServers": {"a":' + b"[" * 5000 + b"]" * 5000 + b"}}", None, None),
        (b"[" * 200_000, "malformed_body", None),
    ],
)
async def test_a_bad_body_is_the_clients_fault(
    client: httpx.AsyncClient, content: bytes, code: str | None, field: str | None
) -> None:
    response = await client.post(f"{API}/agents", content=content, headers={"Content-Type": "application/json"})
    check_envelope(response, 400, code or response.json()["code"])
    assert response.json().get("field") == field


async def test_a_search_for_nul_is_the_clients_fault(client: httpx.AsyncClient) -> None:
    for path in ("agents", "sessions", "harnesses"):
        check_envelope(await client.get(f"{API}/{path}?search=a%00"), 400, "invalid_input")


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * 65_536


async def test_too_large_a_body_is_413_whether_announced_or_not(live_url: str) -> None:
    limit = 4 * 1024 * 1024
    async with httpx.AsyncClient(base_url=live_url, trust_env=False) as client:
        headers = {"Content-Type": "application/json"}
        announced = await client.post(f"{API}/agents", content=b" " * (limit + 1), headers=headers)
        chunked = await client.post(f"{API}/agents", content=chunks(66), headers=headers)
    for response in (announced, chunked):
        check_envelope(response, 413, "payload_too_large")
        assert str(limit) in response.json()["detail"]


async def test_request_ids_are_kept_when_sane(client: httpx.AsyncClient) -> None:
    async def answered(given: str) -> str:
        return (await client.get("/health", headers={"X-Request-Id": given})).headers["x-request-id"]

    assert await answered("abc-123") == "abc-123"
    for odd in ("", "x" * 129, "two words", "tab\tbed"):
        assert await answered(odd) not in ("", odd)


async def test_access_log_is_one_line_without_ids_or_secrets(client: httpx.AsyncClient, make_agent) -> None:
    agent = await make_agent()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        await client.get(f"{API}/agents/{agent['id']}?secret=1", headers={"Authorization": "evr_pat_secret"})
    (line,) = lines
    assert (line["method"], line["route"], line["status"]) == ("GET", f"{API}/agents/{{agent_id}}", 200)
    assert "secret" not in str(line)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("tidy%20up", 200),
        ("%F0%9F%92%A1%0Aline%09tab", 200),
        ("a" * 1000, 200),
        ("a" * 1001, 400),
        ("a%00b", 400),
        ("a%C2%85b", 400),
        ("%FF", 400),
        ("use%20evr_pat_0123456789abcdef", 400),
        ("token%3A%20abcdefgh", 400),
    ],
)
async def test_change_reasons(client: httpx.AsyncClient, reason: str, status: int) -> None:
    response = await client.get(f"{API}/agents", headers={"Everruns-Change-Reason": reason})
    assert response.status_code == status
    if status == 400:
        assert response.json()["code"] == "invalid_change_reason"


async def test_anybody_is_the_admin_of_the_default_organization_only(client: httpx.AsyncClient) -> None:
    for given in ("evr_pat_x", "Bearer x", "nonsense"):
        assert (await client.get(f"{API}/agents", headers={"Authorization": given})).status_code == 200
    default = "org_00000000000000000000000000000001"
    assert (await client.get(f"{API}/agents", headers={"X-Org-Id": default})).status_code == 200
    other = await client.get(f"{API}/agents", headers={"X-Org-Id": "org_" + "2" * 32})
    check_envelope(other, 404, "not_found")
