"""`{{secret:NAME}}` in headers of `web_fetch`: where a secret goes, and that nobody else ever sees it."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec
import pytest

from activities.capabilities.registry import builtin_registry
from activities.capabilities.session_storage import SecretStore, secret_store
from activities.web.arguments import WebFetchConfig
from activities.web.fetch import Limits
from activities.web.header_secrets import MIN_SECRET_CHARACTERS, HeaderSecrets
from db.database import Database
from db.session_storage import DatabaseStorage
from domain.config import CapabilityRef
from domain.errors import InvalidInput
from domain.secret import Secret
from infra.encryption import Keyring
from tests.conftest import Make
from tests.integration.test_web_fetch import Browser, Context, Exchange, Names, Site, certificate_for

VALUE: Final = "s3cr+t/Value=&<9>"
BEARER: Final = {"Authorization": "Bearer {{secret:TOKEN}}"}
ELSEWHERE: Final = "93.184.215.14"


class Secrets:
    """A storage as far as `web_fetch` uses it."""

    def __init__(self, **secrets: str) -> None:
        self._secrets = secrets
        self.asked: list[str] = []

    async def get_secret(self, name: str) -> Secret | None:
        self.asked.append(name)
        return Secret(self._secrets[name]) if name in self._secrets else None


class SecretContext(Context):
    def __init__(self, *places: str, **secrets: str) -> None:
        super().__init__()
        self.storage = Secrets(**(secrets or {"TOKEN": VALUE}))
        self.config = WebFetchConfig(secrets={name: list(places) for name in secrets or ["TOKEN"]})


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site().running() as running:
        yield running


@pytest.fixture
def browser(site: Site) -> Browser:
    return Browser(site)


def place(site: Site, path: str = "") -> str:
    return f"http://site.test:{site.port}{path}"


# --- where it goes ----------------------------------------------------------------------------------------------------


async def test_a_secret_is_put_in_on_the_way_out_and_only_its_name_is_seen(site: Site, browser: Browser) -> None:
    site.reply("/", "welcome")
    context = SecretContext(place(site))
    headers = {**BEARER, "X-Both": "{{secret:TOKEN}}:{{secret:TOKEN}}"}
    result = await browser.get(site.url("/"), context, headers=headers)
    assert result["content"] == "welcome"
    (request,) = site.requests
    assert request.headers["authorization"] == f"Bearer {VALUE}"
    assert request.headers["x-both"] == f"{VALUE}:{VALUE}"
    assert context.storage.asked == ["TOKEN"]
    assert VALUE not in str(result)


async def test_a_secret_without_a_place_is_sent_nowhere_and_the_error_says_how_to_allow_it(
    site: Site, browser: Browser
) -> None:
    context = SecretContext()
    context.config = WebFetchConfig()
    error = await browser.failure(site.url("/"), context, headers=BEARER)
    assert f'{{"secrets": {{"TOKEN": ["https://site.test:{site.port}"]}}}}' in error
    assert VALUE not in error
    assert site.connections == 0


@pytest.mark.parametrize(
    "places",
    [
        ["https://other.test"],
        ["http://site.test:1"],
        ["http://site.test/private"],
        ["*"],
        ["*.test"],
        ["http://"],
    ],
)
async def test_a_place_counts_only_if_it_names_host_port_and_path(
    site: Site, browser: Browser, places: list[str]
) -> None:
    context = SecretContext()
    # As a stored configuration might have it: new ones with such patterns are refused.
    config = msgspec.json.decode(b"{}", type=WebFetchConfig)
    msgspec.structs.force_setattr(config, "secrets", {"TOKEN": places})
    context.config = config
    assert "may not be sent" in await browser.failure(site.url("/"), context, headers=BEARER)
    assert site.connections == 0


async def test_each_secret_has_places_of_its_own(site: Site, browser: Browser) -> None:
    context = SecretContext(FIRST=VALUE, SECOND=VALUE[::-1])
    context.config = WebFetchConfig(secrets={"FIRST": [place(site)], "SECOND": ["https://other.test"]})
    error = await browser.failure(site.url("/"), context, headers={"A": "{{secret:FIRST}}", "B": "{{secret:SECOND}}"})
    assert "`SECOND` may not be sent" in error
    assert site.connections == 0


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("header", ["authorization", "x-token", "user-agent", "accept", "accept-language"])
async def test_a_redirect_to_another_origin_does_not_take_a_secret_along(
    site: Site, browser: Browser, status: str, header: str
) -> None:
    site.redirect("/", site.url("/there", host="other.test"), status)
    site.reply("/there", "arrived")
    context = SecretContext(place(site), f"http://other.test:{site.port}")
    result = await browser.get(site.url("/"), context, headers={header: "{{secret:TOKEN}}"})
    assert result["content"] == "arrived"
    first, second = site.requests
    assert first.headers[header] == VALUE
    assert VALUE not in str(second.headers)
    assert "{{" not in str(second.headers)


async def test_a_redirect_within_an_origin_takes_it_along_only_to_allowed_paths(site: Site, browser: Browser) -> None:
    site.redirect("/api/a", "/api/b")
    site.reply("/api/b", "arrived")
    site.redirect("/api/out", "/elsewhere")
    context = SecretContext(place(site, "/api"))
    assert (await browser.get(site.url("/api/a"), context, headers=BEARER))["content"] == "arrived"
    assert [request.headers["authorization"] for request in site.requests] == [f"Bearer {VALUE}"] * 2
    assert "not to this path" in await browser.failure(site.url("/api/out"), context, headers=BEARER)
    assert "/elsewhere" not in [request.path for request in site.requests]


async def test_without_encryption_a_secret_goes_to_the_same_machine_only(site: Site) -> None:
    browser = Browser(site, names=Names(site_test=[[ELSEWHERE]], other_test=[["127.0.0.1", ELSEWHERE]]))
    context = SecretContext(place(site), f"http://other.test:{site.port}")
    for host in ("site.test", "other.test"):
        assert "https:// only" in await browser.failure(site.url("/", host=host), context, headers=BEARER)
    assert site.connections == 0


async def test_over_https_it_goes_to_its_host_and_not_on_to_http(tmp_path: Path) -> None:
    server, client = certificate_for("site.test", tmp_path)
    async with Site(server).running() as site:
        site.reply("/", "secure")
        context = SecretContext(f"site.test:{site.port}")
        url = site.url("/", scheme="https")
        assert (await Browser(site, tls=client).get(url, context, headers=BEARER))["content"] == "secure"
        assert site.requests[0].headers["authorization"] == f"Bearer {VALUE}"
        # A certificate that is not the host's: the handshake fails before anything is sent.
        context = SecretContext(f"other.test:{site.port}")
        error = await Browser(site, tls=client).failure(
            site.url("/", host="other.test", scheme="https"), context, headers=BEARER
        )
        assert "certificate" in error
        assert len(site.requests) == 1


# --- what is refused ----------------------------------------------------------------------------------------------------


async def test_an_unknown_secret_is_an_error_that_says_who_sets_it(site: Site, browser: Browser) -> None:
    error = await browser.failure(
        site.url("/"), SecretContext(place(site)), headers={"Authorization": "Bearer {{secret:OTHER}}"}
    )
    assert "no secret `OTHER`" in error
    assert "Ask the user" in error
    assert site.connections == 0


@pytest.mark.parametrize(
    "text", ["{{secret:}}", "{{ secret:TOKEN }}", "{{SECRET:TOKEN}}", "{{secret:A B}}", "{{secret:TOKEN}"]
)
async def test_a_name_that_is_not_written_properly_is_not_sent_as_it_stands(
    site: Site, browser: Browser, text: str
) -> None:
    assert "not named properly" in await browser.failure(
        site.url("/"), SecretContext(place(site)), headers={"X-Token": f"Bearer {text}"}
    )
    assert site.connections == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "/?token={{secret:TOKEN}}"},
        {"url": "/{{secret:TOKEN}}"},
        {"url": "/%7B%7Bsecret:TOKEN%7D%7D"},
        {"method": "POST", "body": "{{secret:TOKEN}}"},
        {"method": "POST", "json": {"a": ["{{secret:TOKEN}}"]}},
        {"method": "POST", "form": {"a": "{{secret:TOKEN}}"}},
        {"if_none_match": "{{secret:TOKEN}}"},
        {"save_to_file": "/{{secret:TOKEN}}"},
        {"headers": {"{{secret:TOKEN}}": "x"}},
    ],
)
async def test_a_secret_is_taken_in_header_values_and_nowhere_else(
    site: Site, browser: Browser, arguments: dict[str, object]
) -> None:
    url = site.url(str(arguments.get("url", "/")))
    rest = {name: value for name, value in arguments.items() if name != "url"}
    error = await browser.failure(url, SecretContext(place(site)), **rest)
    assert "only be used in the values of `headers`" in error
    assert site.connections == 0


@pytest.mark.parametrize(
    "value",
    [
        "token-0123\r\nX-Injected: 1",
        "token-0123\n",
        "token-0123\r",
        " token-0123",
        "token-0123 ",
        "token\0-0123",
        "tokén-0123",
        "token\x7f-0123",
    ],
)
async def test_a_value_that_would_break_a_header_is_refused_without_being_shown(
    site: Site, browser: Browser, value: str
) -> None:
    error = await browser.failure(site.url("/"), SecretContext(place(site), TOKEN=value), headers=BEARER)
    assert "can't stand in a header" in error
    assert "0123" not in error
    assert site.connections == 0


async def test_a_secret_too_short_to_be_hidden_or_too_long_for_a_header_is_refused(
    site: Site, browser: Browser
) -> None:
    short, long = "x" * (MIN_SECRET_CHARACTERS - 1), "x" * 16_000
    assert "too short" in await browser.failure(site.url("/"), SecretContext(place(site), TOKEN=short), headers=BEARER)
    assert "is longer than" in await browser.failure(
        site.url("/"), SecretContext(place(site), TOKEN=long), headers=BEARER
    )
    assert site.connections == 0


@pytest.mark.parametrize(
    "secrets",
    [
        {"TOKEN": ["*"]},
        {"TOKEN": ["*.example.com"]},
        {"TOKEN": ["https://example.com?x"]},
        {"TOKEN": []},
        {"not a name": ["example.com"]},
        {"TOKEN": "example.com"},
    ],
)
def test_a_configuration_that_would_not_work_is_refused_when_it_is_written(secrets: object) -> None:
    with pytest.raises(InvalidInput):
        builtin_registry().check_refs([CapabilityRef(ref="web_fetch", config={"secrets": secrets})])  # type: ignore[dict-item]


# --- what comes back ----------------------------------------------------------------------------------------------------

ECHOES: Final[dict[str, Callable[[str], str]]] = {
    "plain": lambda value: f"you sent Bearer {value}!",
    "upper case": lambda value: value.upper(),
    "lower case": lambda value: value.lower(),
    "percent-encoded": lambda value: quote(value, safe=""),
    "percent-encoded path": lambda value: quote(value),
    "percent-encoded twice": lambda value: quote(quote(value, safe=""), safe=""),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "base64 for URLs": lambda value: base64.urlsafe_b64encode(value.encode()).decode(),
    "base64 behind one": lambda value: base64.b64encode(f"u:{value}:".encode()).decode(),
    "base64 behind two": lambda value: base64.b64encode(f"user:{value}".encode()).decode(),
    "base64 behind three": lambda value: base64.b64encode(f"user::{value}!!".encode()).decode(),
    "hexadecimal": lambda value: value.encode().hex(),
    "JSON": lambda value: json.dumps({"headers": {"authorization": value}}),
    "HTML": lambda value: value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    "repeated": lambda value: value * 3,
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=list(ECHOES))
@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "text/html"])
async def test_an_echo_of_the_secret_reaches_neither_the_model_nor_a_file(
    site: Site, browser: Browser, echo: Callable[[str], str], content_type: str
) -> None:
    said = echo(VALUE)
    site.reply("/", f"before {said} after", content_type, etag=f'"{said}"', last_modified=said)
    context = SecretContext(place(site))
    result = await browser.get(site.url("/"), context, headers=BEARER, as_markdown=False, save_to_file="/a")
    saved = context.files.written["/a"].decode()
    for text in (result["content"], result["etag"], result["last_modified"], saved):
        assert "[secret TOKEN]" in text
        for part in (VALUE, VALUE.lower(), VALUE.upper(), said):
            assert part not in text
    assert saved.startswith("before ")
    assert saved.endswith(" after")


async def test_credentials_kept_in_base64_are_hidden_decoded_as_well(site: Site, browser: Browser) -> None:
    site.reply("/", "user: somebody, password: correct-horse (somebody:correct-horse)")
    value = base64.b64encode(b"somebody:correct-horse").decode()
    context = SecretContext(place(site), TOKEN=value)
    result = await browser.get(site.url("/"), context, headers={"Authorization": "Basic {{secret:TOKEN}}"})
    assert "correct-horse" not in result["content"]
    assert site.requests[0].headers["authorization"] == f"Basic {value}"


async def test_an_echo_that_a_conversion_puts_together_is_hidden(site: Site, browser: Browser) -> None:
    value = "token0123456789"
    site.reply("/", "<title>token0123&#52;56789</title><p>token<b></b>012345&#54;789</p>", "text/html")
    result = await browser.get(site.url("/"), SecretContext(place(site), TOKEN=value), headers=BEARER)
    assert value not in str(result)
    assert result["title"] == "[secret TOKEN]"


async def test_an_echo_in_utf_16_is_hidden(site: Site, browser: Browser) -> None:
    site.reply("/", f"a {VALUE} b".encode("utf-16-le"), "text/plain; charset=utf-16le")
    context = SecretContext(place(site))
    result = await browser.get(site.url("/"), context, headers=BEARER, save_to_file="/a")
    assert result["content"] == "a [secret TOKEN] b"
    assert VALUE not in context.files.written["/a"].decode("utf-16-le")


async def test_where_a_body_is_cut_no_part_of_a_secret_is_left(site: Site) -> None:
    for missing in range(1, len(VALUE)):
        body = "x" * 500 + VALUE
        site.reply("/", body)
        browser = Browser(site, limits=Limits(body_bytes=len(body) - missing))
        result = await browser.get(site.url("/"), SecretContext(place(site)), headers=BEARER)
        assert set(result["content"]) == {"x"}


async def test_a_redirect_that_carries_the_secret_in_its_address_does_not_show_it(site: Site, browser: Browser) -> None:
    site.redirect("/a", f"http://token0123456789.site.test:{site.port}/")
    site.redirect("/b", site.url("/c?token0123456789", host="other.test"))
    site.redirect("/d", "http://token0123456789@site.test/")
    site.reply("/c", "arrived")
    site.reply("/e", "made", status="302 Found", location=site.url("/token0123456789", host="other.test"))
    context = SecretContext(place(site), TOKEN="token0123456789")
    assert "[secret TOKEN].site.test" in await browser.failure(site.url("/a"), context, headers=BEARER)
    assert (await browser.get(site.url("/b"), context, headers=BEARER))["final_url"].endswith("[secret TOKEN]")
    assert "token0123456789" not in await browser.failure(site.url("/d"), context, headers=BEARER)
    unfollowed = await browser.get(site.url("/e"), context, headers=BEARER, method="PUT")
    assert unfollowed["location"].endswith("/[secret TOKEN]")


async def test_no_log_holds_the_secret_whatever_happens(
    site: Site, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    async def cut_off(exchange: Exchange) -> None:
        await exchange.raw(f"HTTP/1.1 200 {VALUE}\r\n{VALUE}\r\n\r\n".encode())

    site.replies["/"] = cut_off
    with caplog.at_level(logging.INFO):
        error = await browser.failure(site.url("/"), SecretContext(place(site)), headers=BEARER)
    assert VALUE not in error
    assert VALUE not in caplog.text


def test_a_page_of_five_megabytes_is_searched_in_a_moment() -> None:
    secrets = HeaderSecrets({"TOKEN": Secret(VALUE)}, {})
    body = (b"s3cr+t/Value=&<9 " * 300_000)[: 5 * 2**20]
    assert secrets.hidden(body) is body


# --- with what is stored ---------------------------------------------------------------------------------------------------


async def test_the_sessions_own_secret_is_used_and_the_tool_page_of_secrets_says_how(
    database: Database, keyring: Keyring, make_session: Make, site: Site, browser: Browser
) -> None:
    storage = DatabaseStorage(database.pool, keyring, (await make_session())["id"])
    await storage.set_secret("TOKEN", Secret(VALUE))
    context = SecretContext(place(site))
    context.storage = storage  # type: ignore[assignment]
    site.reply("/", "welcome")
    await browser.get(site.url("/"), context, headers=BEARER)
    assert site.requests[0].headers["authorization"] == f"Bearer {VALUE}"
    told = await secret_store(context, SecretStore(operation="get", name="TOKEN"))  # type: ignore[arg-type]
    assert "{{secret:TOKEN}}" in str(told["note"])
    assert VALUE not in str(told)
