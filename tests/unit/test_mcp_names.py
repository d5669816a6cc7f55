"""Names of MCP tools, texts of strangers, and which references mean a server."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.mcp.cleaning import clean, one_line, without_secrets
from activities.mcp.naming import tool_name
from domain.errors import InvalidInput
from domain.mcp import MASKED, masked_servers, server_key
from domain.mcp_input import parse_scoped_servers
from infra.settings import SettingsError, load_settings

names = st.text(min_size=1, max_size=90)


@given(names, names)
def test_every_name_is_one_that_providers_take_and_is_stable(server: str, tool: str) -> None:
    name = tool_name(server, tool)
    assert re.fullmatch(r"mcp_[A-Za-z0-9_-]{1,60}", name)
    assert name == tool_name(server, tool)


@given(st.lists(st.tuples(names, names), unique=True, max_size=20))
def test_different_tools_have_different_names(pairs: list[tuple[str, str]]) -> None:
    assert len({tool_name(*pair) for pair in pairs}) == len(pairs)


def test_an_ordinary_name_is_readable() -> None:
    assert tool_name("docs", "search-pages") == "mcp_docs__search-pages"


@pytest.mark.parametrize(
    ("one", "other"), [(("a__b", "c"), ("a", "b__c")), (("a_", "b"), ("a", "_b")), (("a b", "c"), ("a_b", "c"))]
)
def test_no_name_can_be_read_as_another_servers(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert tool_name(*one) != tool_name(*other)


def test_texts_lose_what_tricks_readers() -> None:
    assert clean("a\x1b[31mb\u202ec\u200bd\U000e0041e\r\nf\tg\ud800") == "a[31mbcde\nf\tg"
    assert one_line("a\n\n b") == "a b"
    assert clean("x" * 10, 5) == "xxxxx…"
    assert without_secrets("key sk-1 and sk-1", ["sk-1"]) == "key [redacted] and [redacted]"


@pytest.mark.parametrize(
    ("ref", "key"),
    [
        ("mcp:00000000-0000-7000-8000-000000000001", UUID("00000000-0000-7000-8000-000000000001")),
        ("mcp:00000000000070008000000000000001", UUID("00000000-0000-7000-8000-000000000001")),
        ("mcp_00000000000070008000000000000001", UUID("00000000-0000-7000-8000-000000000001")),
        ("mcp:mcp_00000000000070008000000000000001", UUID("00000000-0000-7000-8000-000000000001")),
        ("mcp:", None),
        ("mcp:docs", None),
        ("mcp_", None),
        ("00000000-0000-7000-8000-000000000001", None),
        ("current_time", None),
    ],
)
def test_references_to_servers(ref: str, key: UUID | None) -> None:
    assert server_key(ref) == key


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ("x", "mcpServers.s"),
        ({}, "mcpServers.s.url"),
        ({"url": "ftp://example.com"}, "mcpServers.s.url"),
        ({"url": "https://user:pass@example.com"}, "mcpServers.s.url"),
        ({"url": "https://example.com/a b"}, "mcpServers.s.url"),
        ({"url": "https://example.com", "nonsense": 1}, "mcpServers.s.nonsense"),
        ({"url": "https://example.com", "headers": {"Host": "x"}}, "mcpServers.s.headers"),
        ({"url": "https://example.com", "headers": {"X y": "x"}}, "mcpServers.s.headers"),
        ({"url": "https://example.com", "headers": {"X": "a\r\nY: b"}}, "mcpServers.s.headers.X"),
        ({"url": "https://example.com", "headers": {"X": {"secret": "id"}}}, "mcpServers.s.headers[...]"),
        ({"url": "https://example.com", "api_key": "k", "headers": {"authorization": "x"}}, "mcpServers.s.api_key"),
        ({"url": "https://example.com", "auth_mode": "o_auth"}, "mcpServers.s.auth_mode"),
        ({"url": "https://example.com", "command": "sh"}, "mcpServers.s.command"),
        ({"type": "stdio", "command": "sh"}, "mcpServers.s.type"),
        ({"type": "sse", "url": "https://example.com"}, "mcpServers.s.type"),
    ],
)
def test_a_scoped_server_that_cannot_work_is_refused_by_field(entry: object, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_scoped_servers({"s": entry}, allow_stdio=False)
    assert caught.value.field == field
    assert "pass@" not in caught.value.message


def test_reads_show_no_secret() -> None:
    stored = {
        "s": {"url": "u", "headers": {"A": {"secret": "1"}}, "env": {"B": {"secret": "2"}}, "api_key": {"secret": "3"}}
    }
    assert masked_servers(stored) == {
        "s": {"url": "u", "headers": {"A": MASKED}, "env": {"B": MASKED}, "api_key": MASKED}
    }


def test_programs_are_allowed_in_grade_dev_only() -> None:
    assert load_settings({"DEV_MODE": "true", "MCP_ALLOW_STDIO": "true"}).mcp_allow_stdio is True
    with pytest.raises(SettingsError, match="MCP_ALLOW_STDIO"):
        load_settings({"DEV_MODE": "true", "DEPLOYMENT_GRADE": "prod", "MCP_ALLOW_STDIO": "true"})
