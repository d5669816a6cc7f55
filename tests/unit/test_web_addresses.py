"""Where `web_fetch` may go: addresses, URLs, network access lists and redirects, without a network."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.web.addresses import Reach, reach
from activities.web.fetch import PrivateHosts
from activities.web.network_rules import NotAllowed, check_access
from activities.web.redirects import Request, next_request
from activities.web.targets import UnusableUrl, target_of
from domain.config import NetworkAccessList
from domain.network_patterns import parse_address, parse_pattern
from infra.settings import SettingsError, load_settings

V4 = st.ip_addresses(v=4)
V6 = st.ip_addresses(v=6)

PRIVATE = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "100.64.0.0/10", "fc00::/7", "::1/128"]
NEVER = [
    "0.0.0.0/8",
    "169.254.0.0/16",
    "192.0.0.0/24",
    "198.18.0.0/15",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::/96",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
    "100::/64",
    "2001::/32",
    "2001:db8::/32",
    "2002::/16",
    "64:ff9b:1::/48",
    "fd00:ec2::/32",
]
METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::a9fe:a9fe",
]


def inside(networks: list[str]) -> st.SearchStrategy[IPv4Address | IPv6Address]:
    return st.sampled_from(networks).flatmap(lambda network: st.ip_addresses(network=network))


# Addresses


@pytest.mark.parametrize("text", ["1.1.1.1", "8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:80b::200e"])
def test_addresses_of_the_internet_are_public(text: str) -> None:
    assert reach(ipaddress.ip_address(text)) is Reach.PUBLIC


@pytest.mark.parametrize("text", METADATA)
def test_no_setting_opens_a_metadata_address(text: str) -> None:
    assert reach(ipaddress.ip_address(text)) is Reach.NEVER


@given(inside(PRIVATE))
def test_private_networks_are_not_public(address: IPv4Address | IPv6Address) -> None:
    assert reach(address) is not Reach.PUBLIC


@given(inside(NEVER))
def test_special_networks_are_never_reached(address: IPv4Address | IPv6Address) -> None:
    # `::1` lies in the range of IPv4-compatible addresses, and is what it is: somebody's own host.
    assert reach(address) is Reach.NEVER or address == IPv6Address("::1")


@given(V4 | V6)
def test_what_python_does_not_call_global_is_not_public(address: IPv4Address | IPv6Address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    if not (mapped or address).is_global:
        assert reach(address) is not Reach.PUBLIC


@given(V4 | inside(PRIVATE[:5]) | inside(NEVER[:7]))
def test_an_ipv4_address_in_ipv6_clothes_is_judged_as_itself(address: IPv4Address) -> None:
    number = int(address)
    assert reach(IPv6Address((0xFFFF << 32) | number)) is reach(address)
    assert reach(IPv6Address((0x64FF9B << 96) | number)) is reach(address)


@given(V4)
def test_old_transition_formats_are_refused_whatever_they_hide(address: IPv4Address) -> None:
    number = int(address)
    six_to_four = IPv6Address((0x2002 << 112) | (number << 80) | 1)
    teredo = IPv6Address((0x20010000 << 96) | (number ^ 0xFFFF_FFFF))
    isatap = IPv6Address((0x2606_4700 << 96) | (0x5EFE << 32) | number)
    for disguised in (six_to_four, teredo, isatap):
        assert reach(disguised) is Reach.NEVER
    compatible = IPv6Address(number)
    assert reach(compatible) is not Reach.PUBLIC


@pytest.mark.parametrize("text", ["127.1", "0177.0.0.1", "0x7f.0.0.1", "2130706433", "fe80::1%eth0", "::1%lo", "", "a"])
def test_only_the_canonical_spelling_is_an_address(text: str) -> None:
    assert parse_address(text) is None


# URLs


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("HTTP://Example.COM/a", "example.com", 80),
        ("https://example.com./", "example.com", 443),
        ("https://example.com:8443/", "example.com", 8443),
        ("http://bücher.de/", "xn--bcher-kva.de", 80),
        ("http://127。0。0。1/", "127.0.0.1", 80),
        ("http://[0:0:0:0:0:ffff:1.2.3.4]/", "::ffff:102:304", 80),
        ("http://a_b.example/", "a_b.example", 80),
    ],
)
def test_hosts_get_one_spelling(url: str, host: str, port: int) -> None:
    target = target_of(url)
    assert (target.host, target.port) == (host, port)
    assert target.url.raw_host.decode() == host


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "http:example.com",
        "http:///x",
        "ftp://example.com/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "gopher://example.com:70/_x",
        "http://user@example.com/",
        "http://user:secret@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://127.0.0.1\\.example.com/",
        "http://exa mple.com/",
        "http://example.com\t/",
        "http://example.com/\r\nHost: x",
        "http://exa%6dple.com/",
        "http://example..com/",
        "http://.example.com/",
        "http://example.com../",
        "http://-example.com/",
        "http://example.com:0/",
        "http://example.com:99999/",
        "http://example.com:8o/",
        "http://[fe80::1%25eth0]/",
        "http://[::1]x/",
        "http://[v1.x]/",
        "http://１２７.０.０.１/",
        "http://0x7f.0.0.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1.1/",
        "http://256.1.1.1/",
        "http://example.0x1/",
        "http://" + "a" * 64 + ".com/",
        "http://" + ".".join(["abcdefgh"] * 40) + "/",
        "http://example.com/" + "a" * 9000,
    ],
)
def test_urls_that_could_be_read_in_two_ways_are_refused(url: str) -> None:
    with pytest.raises(UnusableUrl):
        target_of(url)


def test_a_refusal_never_repeats_a_password() -> None:
    with pytest.raises(UnusableUrl) as caught:
        target_of("http://user:hunter2@example.com/")
    assert "hunter2" not in str(caught.value)


@given(V4, st.sampled_from(["{}", "0x{:x}", "0{:o}"]), st.booleans())
def test_other_spellings_of_an_address_are_no_url(address: IPv4Address, style: str, dotted: bool) -> None:
    numbers = list(address.packed) if dotted else [int(address)]
    host = ".".join(style.format(number) for number in numbers)
    if host == str(address):
        assert target_of(f"http://{host}/").address == address
    elif parse_address(host) is None:
        with pytest.raises(UnusableUrl):
            target_of(f"http://{host}/")


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    for url in (text, f"http://{text}/", f"https://example.com{text}"):
        try:
            target = target_of(url)
        except UnusableUrl:
            continue
        assert target.scheme in ("http", "https")
        assert target.url.raw_host.decode() == target.host
        assert target.address is not None or all(c.isascii() and (c.isalnum() or c in ".-_") for c in target.host)


# Network access lists


def permits(access: NetworkAccessList, url: str) -> bool:
    try:
        check_access(target_of(url), access)
    except NotAllowed:
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("example.com", ["http://example.com/", "https://EXAMPLE.com.:8443/x"], ["http://www.example.com/", "http://example.org/"]),
        ("*.example.com", ["http://a.example.com/", "http://a.b.example.com/"], ["http://example.com/", "http://badexample.com/"]),
        ("*", ["http://example.com/", "http://[::1]/"], []),
        ("https://example.com", ["https://example.com:99/"], ["http://example.com/"]),
        ("example.com:8080", ["http://example.com:8080/"], ["http://example.com/", "http://example.com:8081/"]),
        ("http://example.com:80/docs", ["http://example.com/docs", "http://example.com/docs/a?b"], ["http://example.com/docs2", "http://example.com/"]),
        ("example.com/docs/", ["http://example.com/docs", "http://example.com/x/../docs/a"], ["http://example.com/docs/../a"]),
        ("example.com/a%20b", ["http://example.com/a%20b/c"], ["http://example.com/a"]),
        ("1.2.3.4", ["http://1.2.3.4/"], ["http://1.2.3.40/"]),
        ("[2001:DB8::1]", ["http://[2001:db8:0::1]:81/"], ["http://[2001:db8::2]/"]),
        ("Bücher.example.", ["http://xn--bcher-kva.example/"], ["http://bucher.example/"]),
        ("  example.com ", ["http://example.com/"], []),
    ],
)  # fmt: skip
def test_a_pattern_allows_and_blocks_the_same_urls(pattern: str, matching: list[str], other: list[str]) -> None:
    for url in matching:
        assert permits(NetworkAccessList(allowed=["other.example", pattern]), url), url
        assert not permits(NetworkAccessList(blocked=["other.example", pattern]), url), url
    for url in other:
        assert not permits(NetworkAccessList(allowed=[pattern]), url), url
        assert permits(NetworkAccessList(blocked=[pattern]), url), url


def test_no_list_allows_everything_and_an_empty_one_nothing() -> None:
    assert permits(NetworkAccessList(), "http://example.com/")
    assert permits(NetworkAccessList(blocked=[]), "http://example.com/")
    assert not permits(NetworkAccessList(allowed=[]), "http://example.com/")


def test_blocked_wins_over_allowed() -> None:
    access = NetworkAccessList(allowed=["*.example.com"], blocked=["secret.example.com"])
    assert permits(access, "http://www.example.com/")
    assert not permits(access, "http://secret.example.com/")


@pytest.mark.parametrize(
    "path",
    [
        "/docs/%2e%2e/admin",
        "/docs/%2E./admin",
        "/docs%2fadmin",
        "/docs/%5c..%5cadmin",
        "/docs/%252e%252e/a",
        "/docs/..;/admin",
    ],
)
def test_a_path_that_servers_read_differently_is_in_no_allowed_and_in_every_blocked_path(path: str) -> None:
    url = f"http://example.com{path}"
    assert not permits(NetworkAccessList(allowed=["example.com/docs"]), url)
    assert not permits(NetworkAccessList(blocked=["example.com/other"]), url)
    assert permits(NetworkAccessList(allowed=["example.com"]), url)


def test_an_encoded_letter_does_not_get_around_a_blocked_path() -> None:
    assert not permits(NetworkAccessList(blocked=["example.com/admin"]), "http://example.com/%61dmin/x")
    assert not permits(NetworkAccessList(blocked=["example.com/admin"]), "http://example.com//admin")


@pytest.mark.parametrize(
    "pattern",
    ["", "a b", "api.*.com", "*example.com", "**", "*.*", "*.1.2.3.4", "ftp://example.com", "example.com:0", "example.com:70000",
     "user@example.com", "example.com?x", "example.com#x", "[::1", "127.1", "exa%6dple.com", "http://", "/path", "a..b"],
)  # fmt: skip
def test_a_malformed_pattern_allows_nothing_and_blocks_everything(pattern: str) -> None:
    assert parse_pattern(pattern) is None
    assert not permits(NetworkAccessList(allowed=[pattern]), "http://example.com/")
    assert not permits(NetworkAccessList(blocked=[pattern]), "http://example.com/")


@given(st.text(max_size=40))
def test_any_text_can_stand_in_a_list(text: str) -> None:
    permits(NetworkAccessList(allowed=[text], blocked=[text]), "http://example.com/")


# Redirects


def request(method: str = "GET", url: str = "https://a.example/x", **headers: str) -> Request:
    given_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    return Request(target=target_of(url), method=method, headers=given_headers, body=body)


@pytest.mark.parametrize(
    ("method", "status", "expected"),
    [("GET", 301, "GET"), ("HEAD", 303, "HEAD"), ("POST", 301, "GET"), ("POST", 302, "GET"), ("PUT", 303, "GET"),
     ("PUT", 302, "PUT"), ("POST", 307, "POST"), ("DELETE", 308, "DELETE")],
)  # fmt: skip
def test_the_method_changes_as_the_standard_says(method: str, status: int, expected: str) -> None:
    following = next_request(request(method, content_type="application/json"), status, "/y")
    assert following is not None
    assert following.method == expected
    assert (following.body is not None) == (expected in ("POST", "PUT"))
    assert ("content-type" in following.headers) == (expected == method)


@pytest.mark.parametrize("status", [200, 204, 300, 304, 305, 404])
def test_other_statuses_are_no_redirects(status: int) -> None:
    assert next_request(request(), status, "/y") is None


@pytest.mark.parametrize(
    "location",
    ["https://b.example/", "http://a.example/", "https://a.example:444/", "//b.example/x", "https://A.example.evil/"],
)
def test_the_callers_headers_stay_at_their_origin(location: str) -> None:
    secret = request(authorization="Bearer x", cookie="a=b", x_api_key="k", accept="text/plain")
    following = next_request(secret, 302, location)
    assert following is not None
    assert following.headers == {"accept": "text/plain"}


@pytest.mark.parametrize("location", ["/y", "https://A.example./y", "https://a.example:443/y", "?q", "//a.example"])
def test_the_callers_headers_are_kept_within_an_origin(location: str) -> None:
    following = next_request(request(authorization="Bearer x"), 302, location)
    assert following is not None
    assert following.headers == {"authorization": "Bearer x"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_change_is_not_repeated_at_another_origin(method: str) -> None:
    assert next_request(request(method), 307, "https://b.example/") is None


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "http://user:pw@b.example/", "http://2130706433/", "http://[", "\\\\b\\x"]
)
def test_a_redirect_to_an_unusable_url_fails(location: str) -> None:
    with pytest.raises(UnusableUrl, match=r"a\.example"):
        next_request(request(), 302, location)


# Hosts the operator opens


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("", ()),
        (" Wiki.Internal. , 10.0.0.7:8080,", ("wiki.internal", "10.0.0.7:8080")),
        ("[FD00:0:0::7], [::1]:080", ("[fd00::7]", "[::1]:80")),
        ("a.test,a.test", ("a.test",)),
    ],
)
def test_opened_hosts_are_read_in_the_spelling_they_are_compared_in(given_text: str, expected: tuple[str, ...]) -> None:
    settings = load_settings({"DEV_MODE": "true", "WEB_FETCH_ALLOW_PRIVATE_HOSTS": given_text})
    assert settings.web_fetch_allow_private_hosts == expected
    for host in expected:
        assert PrivateHosts(expected).opens(target_of(f"http://{host}/"))


@pytest.mark.parametrize(
    "given_text",
    ["*", "*.internal", "http://wiki", "10.0.0.0/8", "a:0", "a:70000", "a/b", "[10.0.0.1]", "127.1", "u@h", "a b"],
)
def test_a_malformed_opened_host_stops_the_start(given_text: str) -> None:
    with pytest.raises(SettingsError, match="WEB_FETCH_ALLOW_PRIVATE_HOSTS"):
        load_settings({"DEV_MODE": "true", "WEB_FETCH_ALLOW_PRIVATE_HOSTS": given_text})


def test_an_opened_host_opens_nothing_else() -> None:
    opened = PrivateHosts(["wiki.internal:8080", "10.0.0.7"])
    assert opened.opens(target_of("http://WIKI.internal.:8080/"))
    assert opened.opens(target_of("https://10.0.0.7:9/"))
    for url in (
        "http://wiki.internal/",
        "http://x.wiki.internal:8080/",
        "http://10.0.0.70/",
        "http://[::ffff:10.0.0.7]/",
    ):
        assert not opened.opens(target_of(url))
