"""Findings: each rule fires on what it is for, stays silent on what is fine, and says what to do."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.capabilities.agent_checks import GivenTool, Shape, findings
from activities.capabilities.registry import builtin_registry
from domain.capabilities import Capability
from domain.config import CapabilityRef, ConfigLayer, NetworkAccessList, fold
from domain.findings import Finding
from domain.tools import ClientSideTool, ToolDefinition

GOOD = (
    "You are a librarian of a small town. Help visitors to find books, and say when the library does not have one.\n\n"
    "Answer in the visitor's language. Name author and title of each book."
)
REGISTRY = builtin_registry()


def check(
    prompt: str = GOOD,
    refs: list[str | CapabilityRef] | None = None,
    tools: list[GivenTool] | None = None,
    network: NetworkAccessList | None = None,
    base: ConfigLayer | None = None,
    others: list[Capability] | None = None,
    window: int | None = None,
    **more: Any,
) -> list[Finding]:
    capabilities = [CapabilityRef(ref=ref) if isinstance(ref, str) else ref for ref in refs or []]
    given_tools = tools or []
    client_tools: list[ToolDefinition] = [
        ClientSideTool(name=one.name, description=one.description, parameters=one.parameters)
        for one in given_tools
        if one.problem is None
    ]
    layer = ConfigLayer(
        system_prompt=prompt, capabilities=capabilities, tools=client_tools, network_access=network, **more
    )
    config = fold([base or ConfigLayer(), layer])
    resolved = REGISTRY.resolve(config.capabilities, others or [])
    return findings(
        Shape(
            prompt=prompt,
            refs=capabilities,
            tools=given_tools,
            network_access=network or NetworkAccessList(),
            config=config,
            resolved=resolved,
            context_window=window,
        )
    )


def rules(found: list[Finding]) -> list[str]:
    return [one.rule_id for one in found]


def test_a_good_configuration_has_no_findings():
    assert check() == []
    assert check(refs=["current_time", "session_file_system", "session_storage"]) == []


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("", "prompt.empty"),
        (" \n\t ", "prompt.empty"),
        ("Help.", "prompt.short"),
        (f"{GOOD}\n\n{GOOD}", "prompt.duplicate_paragraphs"),
        (f"{GOOD} Always cite sources. Never cite sources.", "prompt.contradiction"),
        (f"{GOOD}\n- You must greet first\n- Do not greet first", "prompt.contradiction"),
        (f"{GOOD} Be concise. Explain everything in great detail.", "prompt.contradiction"),
        (f"{GOOD} Today is 2026-11-21.", "prompt.volatile"),
        (f"{GOOD} The current date is Monday.", "prompt.volatile"),
        (f"{GOOD} You are called {{{{name}}}}.", "prompt.placeholder"),
        (f"{GOOD} TODO: say more.", "prompt.placeholder"),
        (f"{GOOD} The key is sk-abcdefghijklmnopqrstuv.", "prompt.secret"),
        (f"{GOOD} password: hunter2hunter2", "prompt.secret"),
        (f"{GOOD} Use the `search_books` tool.", "prompt.unknown_tool"),
        (f"{GOOD} Ask the search_books tool.", "prompt.unknown_tool"),
    ],
)
def test_each_rule_about_prompts_fires_and_says_what_to_do(prompt: str, rule: str):
    found = check(prompt)
    assert rule in rules(found)
    for one in found:
        assert one.fix
        assert one.location is not None
        assert one.location.field == "system_prompt"


def test_places_are_byte_offsets_into_the_prompt():
    prompt = f"Überprüfe jede Antwort für die Bücherei der Stadt. 🙂 {GOOD} TODO"
    (one,) = [one for one in check(prompt) if one.rule_id == "prompt.placeholder"]
    assert one.location is not None
    assert prompt.encode()[one.location.start : one.location.end] == b"TODO"


def test_a_secret_is_not_repeated():
    found = check(f"{GOOD} sk-abcdefghijklmnopqrstuv")
    assert "abcdefghijkl" not in str(found)


def test_tools_that_are_offered_are_known_and_near_names_are_suggested():
    prompt = f"{GOOD} Use `get_current_time` and call `open_library`; use `mcp_docs__search` for the rest."
    tools = [GivenTool(name="open_library", description="Opens.")]
    assert check(prompt, ["current_time"], tools) == []
    assert check(f"{GOOD} Run `pytest`, then use `git`.") == []
    (one,) = check(f"{GOOD} Use `get_curent_time`.", ["current_time"])
    assert one.fix is not None
    assert "`get_current_time`" in one.fix


@pytest.mark.parametrize(
    ("tools", "rule", "field"),
    [
        ([GivenTool(name="a", problem="no description")], "tools.invalid", "tools[0]"),
        ([GivenTool(name="a b", description="x")], "tools.name", "tools[0].name"),
        ([GivenTool(name="a", description="x"), GivenTool(name="a", description="y")], "tools.duplicate", "tools[0]"),
        ([GivenTool(name="get_current_time", description="x")], "tools.shadowed", "tools[0]"),
        ([GivenTool(name="a", description=" ")], "tools.description", "tools[0].description"),
        (
            [GivenTool(name="a", description="x", parameters={"type": "array"})],
            "tools.parameters",
            "tools[0].parameters",
        ),
    ],
)
def test_each_rule_about_tools_names_the_tool(tools: list[GivenTool], rule: str, field: str):
    found = check(refs=["current_time"], tools=tools)
    assert [(one.rule_id, one.location and one.location.field) for one in found] == [(rule, field)]


def test_references_that_do_nothing_are_named_with_their_reason():
    refs: list[str | CapabilityRef] = [
        "nope",
        "current_time",
        "current_time",
        CapabilityRef(ref="compaction", config={"x": 1}),
    ]
    found = check(refs=refs)
    assert [(one.rule_id, one.location and one.location.field) for one in found] == [
        ("capabilities.unknown", "capabilities[0]"),
        ("capabilities.invalid_config", "capabilities[3]"),
        ("capabilities.duplicate", "capabilities[1]"),
    ]


def test_a_missing_dependency_is_named_with_what_needs_it():
    needy = Capability(id="declarative:needy", name="Needy", description="", dependencies=("gone",))
    (one,) = check(refs=["declarative:needy"], others=[needy])
    assert (one.rule_id, "`declarative:needy`" in one.message, "`gone`" in one.message) == (
        "capabilities.missing_dependency",
        True,
        True,
    )


def test_web_access_with_secrets_and_no_list_is_the_stronger_warning():
    alone, together = check(refs=["web_fetch"]), check(refs=["web_fetch", "session_storage"])
    assert rules(alone) == ["capabilities.high_risk", "capabilities.no_approval", "safety.open_network"]
    assert "safety.secrets_and_open_network" in rules(together)
    listed = NetworkAccessList(allowed=["*.example.com"])
    assert not [
        rule for rule in rules(check(refs=["web_fetch", "session_storage"], network=listed)) if "network" in rule
    ]
    assert "capabilities.no_approval" not in rules(check(refs=["web_fetch", "tool_approval"], network=listed))


def test_network_patterns_that_are_malformed_or_leave_nothing_are_found():
    found = check(network=NetworkAccessList(allowed=["ftp://x", "a.example"], blocked=["b example"]))
    assert [one.location and one.location.field for one in found] == [
        "network_access.allowed[0]",
        "network_access.blocked[0]",
    ]
    base = ConfigLayer(network_access=NetworkAccessList(allowed=["a.example"]))
    assert "network.nothing_allowed" in rules(check(network=NetworkAccessList(allowed=["b.example"]), base=base))


def test_prompts_are_weighed_against_the_context_window():
    long = " ".join(f"word{number}" for number in range(10_000))
    assert "cost.large_prompt" in rules(check(long))
    assert "cost.large_prompt" in rules(check(long, window=100_000))
    assert "cost.does_not_fit" in rules(check(long, window=8_000))
    assert rules(check(long, window=1_000_000)) == []
    many = [GivenTool(name=f"tool_{number}", description="Does.") for number in range(70)]
    assert "cost.many_tools" in rules(check(tools=many))


@given(st.text(max_size=400))
def test_any_prompt_gives_the_same_findings_twice(prompt: str):
    assert check(prompt) == check(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a" * 1_000_000,
        "{{" * 500_000,
        "a \n" * 330_000,
        "`use " * 200_000,
        "always x. never x. " * 50_000,
        "- " * 500_000,
    ],
)
def test_a_megabyte_of_hostile_prompt_is_checked_in_seconds(prompt: str):
    started = time.process_time()
    found = check(prompt)
    assert time.process_time() - started < 5
    assert len(found) < 50
