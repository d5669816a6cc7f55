"""Agents as files: importing an export gives the same agent, to the character."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.agent_files import export_agent_file, parse_agent_file
from api.requests import capability_refs, client_tools
from domain.config import CapabilityRef, InitialFile, NetworkAccessList
from domain.errors import InvalidInput
from domain.resources import Agent, Lifecycle
from domain.tools import ClientSideTool, ToolHints

# Surrogates cannot come over JSON, and PostgreSQL takes no U+0000.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
lines = st.lists(st.one_of(texts, st.sampled_from(["---", "  indented", "name: x", "# comment", "\r", ""]))).map(
    "\n".join
)
json_objects = st.dictionaries(
    texts,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)
tools = st.builds(
    ClientSideTool,
    name=st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
    description=texts,
    parameters=json_objects,
    display_name=st.none() | texts,
    hints=st.none() | st.builds(ToolHints, readonly=st.none() | st.booleans()),
)
agents = st.builds(
    Agent,
    id=st.just("agent_" + "0" * 32),
    name=st.from_regex(r"[a-z0-9]{1,10}( \(copy\))?", fullmatch=True),
    system_prompt=lines,
    harness_id=st.just("harness_" + "0" * 32),
    status=st.just(Lifecycle.ACTIVE),
    capabilities=st.lists(st.builds(CapabilityRef, ref=texts, config=st.none() | json_objects), max_size=3),
    tools=st.lists(tools, max_size=2),
    initial_files=st.lists(st.builds(InitialFile, path=texts, content=lines, is_readonly=st.booleans()), max_size=2),
    tags=st.lists(texts, max_size=3),
    created_at=st.just(""),
    updated_at=st.just(""),
    display_name=st.none() | texts,
    description=st.none() | lines,
    default_model_id=st.none() | texts,
    mcp_servers=st.none() | json_objects,
    network_access=st.none() | st.builds(NetworkAccessList, allowed=st.none() | st.lists(texts, max_size=2)),
    max_iterations=st.none() | st.integers(1, 10_000),
    parallel_tool_calls=st.none() | st.booleans(),
)


@given(agents)
def test_importing_an_export_gives_the_same_agent(agent: Agent) -> None:
    file = parse_agent_file(export_agent_file(agent))
    for field in (
        "id",
        "name",
        "display_name",
        "description",
        "system_prompt",
        "harness_id",
        "default_model_id",
        "max_iterations",
        "parallel_tool_calls",
        "tags",
        "initial_files",
        "mcp_servers",
        "network_access",
    ):
        assert getattr(file, field) == getattr(agent, field), field
    assert capability_refs(file.capabilities) == agent.capabilities
    assert client_tools(file.tools) == agent.tools


@given(st.text(max_size=200) | st.text("-\n: {}[]&*abname", max_size=60).map("---\n".__add__))
def test_any_text_is_an_agent_or_a_clear_refusal(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert parse_agent_file(text).name is not None


@pytest.mark.parametrize("opening", ["---\n", "---  \r\n"])
def test_a_file_written_by_hand_needs_no_blank_line(opening: str) -> None:
    file = parse_agent_file(f"{opening}name: x\ntags: [2020-01-01]\n---\nPrompt.")
    assert (file.name, file.system_prompt, file.tags) == ("x", "Prompt.", ["2020-01-01"])


def test_plain_text_gets_a_name_that_is_a_slug() -> None:
    file = parse_agent_file("You are kind.")
    assert file.name is not None
    assert file.name.startswith("imported-")


def test_aliases_are_refused_before_they_expand() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(InvalidInput, match="aliases"):
        parse_agent_file(f"---\n{bomb}---\n")


def test_json_is_read_as_json() -> None:
    assert parse_agent_file(json.dumps({"name": "x", "system_prompt": "a\tb"})).system_prompt == "a\tb"
