"""Network access lists folded over layers, held against the matcher that decides about every request."""

from __future__ import annotations

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.web.network_rules import NotAllowed, check_access
from activities.web.targets import Target, UnusableUrl, target_of
from domain.config import ConfigLayer, NetworkAccessList, fold
from domain.errors import InvalidInput
from domain.limits import check_network_access
from domain.network_patterns import ascii_host, intersect, parse_pattern

HOSTS = [
    "a.example",
    "api.a.example",
    "x.api.a.example",
    "ba.example",
    "b.test",
    "192.0.2.1",
    "[2001:db8::1]",
    "bücher.example",
]
PATHS = ["", "/", "/v1", "/v1/", "/v1/x", "/v10", "/v1/../v2", "/%76%31", "/a b".replace(" ", "%20"), "/v1%2fx", "/V1"]
SCHEMES = ["", "http://", "https://"]
PORTS = ["", ":80", ":443", ":8080"]

hosts = st.sampled_from([*HOSTS, *(f"*.{host}" for host in HOSTS if host[0] not in "1["), "*", "*.example"])
patterns = st.builds(
    lambda scheme, host, port, path: scheme + host + port + path,
    st.sampled_from(SCHEMES),
    hosts,
    st.sampled_from(PORTS),
    st.sampled_from(PATHS),
)
anything = patterns | st.sampled_from(["", "*x", "ftp://a.example", "a.example?q", "a..example", ":80"])
lists = st.lists(anything, min_size=1, max_size=4)
urls = st.builds(
    lambda scheme, host, port, path: target_of(scheme + host + port + path),
    st.sampled_from(["http://", "https://"]),
    st.sampled_from(HOSTS),
    st.sampled_from(PORTS),
    st.sampled_from([*PATHS, "/v1/x?q=/v2", "/v1;x/y"]),
)


def is_allowed(target: Target, access: NetworkAccessList) -> bool:
    try:
        check_access(target, access)
    except NotAllowed:
        return False
    return True


def folded(*layers: NetworkAccessList | None) -> NetworkAccessList:
    return fold([ConfigLayer(network_access=layer) for layer in layers]).network_access


access_lists = st.builds(
    NetworkAccessList, allowed=st.none() | lists, blocked=st.none() | st.lists(anything, max_size=2)
)


@given(st.lists(access_lists, min_size=1, max_size=4), st.lists(urls, min_size=1, max_size=5))
def test_a_url_is_allowed_by_the_fold_exactly_when_every_layer_allows_it(
    layers: list[NetworkAccessList], targets: list[Target]
) -> None:
    access = folded(*layers)
    for target in targets:
        assert is_allowed(target, access) == all(is_allowed(target, layer) for layer in layers)


@given(patterns)
def test_a_pattern_has_a_spelling_that_is_read_as_itself(text: str) -> None:
    pattern = parse_pattern(text)
    assert pattern is not None
    assert parse_pattern(pattern.text) == pattern


@given(lists, lists)
def test_an_intersection_holds_nothing_that_another_of_its_patterns_covers(one: list[str], other: list[str]) -> None:
    found = [parse_pattern(text) for text in intersect(one, other)]
    for index, pattern in enumerate(found):
        assert pattern is not None
        assert not any(wider is not None and wider.covers(pattern) for wider in found[:index] + found[index + 1 :])


@given(st.text(min_size=1, max_size=20))
def test_a_host_name_is_read_as_the_http_client_reads_it(text: str) -> None:
    host = text + ".example"
    try:
        sent = httpx2.URL(f"http://{host}/")
        wanted = target_of(sent).host
    except (httpx2.InvalidURL, UnusableUrl, UnicodeError, ValueError):
        return
    if sent.raw_host.decode() == "" or any(character in host for character in "/?#@:\\[]*") or host != host.strip():
        return
    assert ascii_host(host).lower().removesuffix(".") == wanted


@pytest.mark.parametrize(
    ("above", "below", "both"),
    [
        (["*.example.com"], ["api.example.com"], ["api.example.com"]),
        (["api.example.com"], ["*.example.com"], ["api.example.com"]),
        (["*.example.com"], ["*.api.example.com", "example.com"], ["*.api.example.com"]),
        (["https://example.com"], ["example.com/v1"], ["https://example.com/v1"]),
        (["*"], ["example.com:8080"], ["example.com:8080"]),
        (["example.com"], ["example.org"], []),
        (["Example.COM"], ["example.com"], ["Example.COM"]),
    ],
)
def test_layers_narrow_each_other(above: list[str], below: list[str], both: list[str]) -> None:
    access = folded(NetworkAccessList(allowed=above), None, NetworkAccessList(allowed=below))
    assert access.allowed == both


def test_lists_with_nothing_in_common_allow_nothing_and_further_layers_cannot_undo_it() -> None:
    access = folded(*(NetworkAccessList(allowed=[host]) for host in ("a.example", "b.test", "a.example")))
    assert access.allowed == []
    assert not is_allowed(target_of("http://a.example/"), access)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("ftp://a.example", "scheme"),
        ("a.example/x?y", "query"),
        ("me@a.example", "user name"),
        ("api.*.example", "middle"),
        ("a.example:0", "host"),
        ("", "host"),
        ("a b", "host"),
        ("127.1", "host"),
        ("a" * 3000, "longer"),
    ],
)
def test_a_malformed_pattern_is_refused_on_write_naming_its_place_and_why(pattern: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as refused:
        check_network_access(NetworkAccessList(allowed=["a.example"], blocked=["b.example", pattern]))
    assert refused.value.field == "network_access.blocked[1]"
