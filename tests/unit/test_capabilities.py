from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from activities.capabilities.registry import (
    CapabilityRegistry,
    ResolvedCapabilities,
    builtin_registry,
    capability_info,
    tool_definition,
)
from domain.capabilities import Capability, Tool, ToolContext
from domain.config import CapabilityRef
from domain.errors import InvalidInput, UnknownCapability
from domain.tools import SideEffect

DOCS = Path(__file__).parents[2] / "docs" / "capabilities"


class NoArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    most: int = 10


async def do_nothing(_context: ToolContext, _arguments: Struct) -> str:
    return ""


def tool(name: str, arguments: type[Struct] = NoArguments, **fields: object) -> Tool:
    return msgspec.structs.replace(Tool(name=name, description="", arguments=arguments, run=do_nothing), **fields)


def capability(capability_id: str, *dependencies: str, tools: tuple[str, ...] = (), **fields: object) -> Capability:
    made = Capability(
        id=capability_id,
        name=capability_id.upper(),
        description="",
        dependencies=dependencies,
        system_prompt=f"prompt of {capability_id}",
        tools=tuple(tool(name) for name in tools),
    )
    return msgspec.structs.replace(made, **fields)


def registry(*capabilities: Capability) -> CapabilityRegistry:
    made = CapabilityRegistry()
    for one in capabilities:
        made.register(one)
    return made


def refs(*ids: str) -> list[CapabilityRef]:
    return [CapabilityRef(ref=capability_id) for capability_id in ids]


def ids(resolved: ResolvedCapabilities) -> list[str]:
    return [one.capability.id for one in resolved.capabilities]


# Registering


def test_registry_keeps_order_and_finds_by_id():
    made = registry(capability("b"), capability("a"))
    assert [one.id for one in made.list()] == ["b", "a"]
    assert made.get("a") is made.list()[1]
    assert made.get("c") is None


@pytest.mark.parametrize(
    "bad",
    [
        capability("a"),
        capability("b", tools=("one", "one")),
        capability("b", tools=("with space",)),
    ],
)
def test_what_could_not_be_offered_is_refused_when_it_is_registered(bad: Capability):
    with pytest.raises(ValueError, match="capability"):
        registry(capability("a"), bad)


class Tree(Struct, frozen=True, kw_only=True):
    children: list[Tree]


def test_recursive_arguments_are_refused_when_registered():
    with pytest.raises(ValueError, match="recursive"):
        registry(capability("a", tools=("t",)), msgspec.structs.replace(capability("b"), tools=(tool("t", Tree),)))


# Resolving


def test_order_of_refs_is_order_of_prompt_and_tools():
    made = registry(capability("a", tools=("ta",)), capability("b", tools=("tb",)))
    resolved = made.resolve(refs("b", "a"))
    assert resolved.prompt == "prompt of b\n\nprompt of a"
    assert [one.tool.name for one in resolved.tools] == ["tb", "ta"]


def test_dependencies_are_added_before_what_needs_them_and_only_once():
    made = registry(capability("a", "b", "c"), capability("b", "c"), capability("c"), capability("d", "c"))
    assert ids(made.resolve(refs("d", "a", "b"))) == ["c", "d", "b", "a"]


def test_a_circle_of_dependencies_ends():
    made = registry(capability("a", "b"), capability("b", "a"))
    assert ids(made.resolve(refs("a"))) == ["b", "a"]


def test_unknown_refs_and_dependencies_are_collected_not_raised():
    made = registry(capability("a", "gone"), capability("later", status="coming_soon"))
    resolved = made.resolve(refs("nope", "a", "later", "nope"))
    assert ids(resolved) == ["a"]
    assert resolved.missing == ("nope", "gone", "later")


def test_first_capability_wins_a_clash_of_tool_names():
    made = registry(capability("a", tools=("same",)), capability("b", tools=("same", "own")))
    resolved = made.resolve(refs("b", "a"))
    assert [(one.tool.name, one.capability.id) for one in resolved.tools] == [("same", "b"), ("own", "b")]
    found = resolved.tool("same")
    assert found is not None
    assert found.definition.hints is not None
    assert found.definition.hints.capability_id == "b"
    assert resolved.tool("nope") is None


def test_config_is_decoded_also_for_a_ref_that_an_earlier_one_depends_on():
    made = registry(capability("a", "b"), capability("b", config=Limits))
    resolved = made.resolve([CapabilityRef(ref="a"), CapabilityRef(ref="b", config={"most": 3})])
    assert [one.config for one in resolved.capabilities] == [Limits(most=3), None]
    assert made.resolve(refs("b")).capabilities[0].config == Limits()


def test_stored_config_that_is_no_longer_valid_skips_the_capability():
    made = registry(capability("b", config=Limits))
    assert made.resolve([CapabilityRef(ref="b", config={"least": 1})]).missing == ("b",)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefghxyz"), max_size=4)), st.data())
def test_resolving_is_total_and_topological(graph: dict[str, list[str]], data: st.DataObject):
    # Edges only to later letters make the graph free of circles; x, y and z are never registered.
    made = registry(*(capability(name, *(need for need in needs if need > name)) for name, needs in graph.items()))
    wanted = data.draw(st.lists(st.sampled_from("abcdefghxyz")))
    resolved = made.resolve(refs(*wanted))
    order = ids(resolved)
    assert len(order) == len(set(order))
    assert set(order).isdisjoint(resolved.missing)
    assert set(wanted) <= set(order) | set(resolved.missing)
    for position, name in enumerate(order):
        known = [
            need for need in made.list()[[one.id for one in made.list()].index(name)].dependencies if need in graph
        ]
        assert all(order.index(need) < position for need in known)


# Checking on writes


def test_check_refs_names_the_unknown_ref():
    with pytest.raises(UnknownCapability, match="`nope`") as caught:
        registry(capability("a")).check_refs(refs("a", "nope"))
    assert caught.value.field == "capabilities[1].ref"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"most": "ten"}, "capabilities[0].config.most"),
        ({"least": 1}, "capabilities[0].config.least"),
        (["most"], "capabilities[0].config"),
        ("most", "capabilities[0].config"),
    ],
)
def test_check_refs_names_the_bad_config(config: dict[str, object], field: str):
    with pytest.raises(InvalidInput) as caught:
        registry(capability("a", config=Limits)).check_refs([CapabilityRef(ref="a", config=config)])
    assert caught.value.field == field


def test_check_refs_refuses_config_that_nobody_reads_and_capabilities_that_do_not_exist_yet():
    made = registry(capability("a"), capability("later", status="coming_soon"))
    made.check_refs([CapabilityRef(ref="a", config={})])
    with pytest.raises(InvalidInput):
        made.check_refs([CapabilityRef(ref="a", config={"x": 1})])
    with pytest.raises(InvalidInput):
        made.check_refs(refs("later"))


# Definitions


class Inner(Struct, frozen=True, kw_only=True):
    """An inner thing."""

    title: str
    note: str | None = None


class Outer(Struct, frozen=True, kw_only=True):
    first: Inner
    more: list[Inner] = []
    side_effect: SideEffect = SideEffect.PURE
    by_name: dict[str, int] = {}
    either: int | str | None = None


def test_schema_is_self_contained_and_closed():
    parameters = tool_definition(tool("t", Outer), capability("a")).parameters
    inner = {
        "type": "object",
        "description": "An inner thing.",
        "properties": {"title": {"type": "string"}, "note": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    assert parameters["type"] == "object"
    assert parameters["additionalProperties"] is False
    properties = parameters["properties"]
    assert isinstance(properties, dict)
    assert properties["first"] == inner
    assert properties["more"] == {"type": "array", "items": inner, "default": []}
    assert properties["by_name"] == {"type": "object", "additionalProperties": {"type": "integer"}, "default": {}}
    assert properties["side_effect"]["type"] == "string"


@pytest.mark.parametrize(
    ("side_effect", "readonly", "idempotent", "side_effect_class"),
    [
        (SideEffect.PURE, True, True, "Pure"),
        (SideEffect.IDEMPOTENT, None, True, "Idempotent"),
        (SideEffect.AT_MOST_ONCE, None, False, "AtMostOnce"),
    ],
)
def test_hints_follow_the_side_effect(
    side_effect: SideEffect, readonly: bool | None, idempotent: bool, side_effect_class: str
):
    made = tool("t", side_effect=side_effect, concurrency_class="lane")
    hints = tool_definition(made, capability("a")).hints
    assert hints is not None
    assert (hints.readonly, hints.idempotent, hints.side_effect_class) == (readonly, idempotent, side_effect_class)
    assert (hints.concurrency_class, hints.capability_id, hints.capability_name) == ("lane", "a", "A")


def test_capability_info_publishes_the_config_schema_and_tools():
    info = capability_info(capability("a", "b", tools=("t",), config=Limits, features=("file_system",)))
    assert info.config_schema is not None
    assert info.config_schema["properties"] == {"most": {"type": "integer", "default": 10}}
    assert [definition.name for definition in info.tool_definitions] == ["t"]
    assert (info.dependencies, info.features, info.risk_level) == (["b"], ["file_system"], "low")


# Built-ins

BUILTINS = builtin_registry().list()


@pytest.mark.parametrize("builtin", BUILTINS, ids=lambda builtin: builtin.id)
def test_every_builtin_has_a_page_that_names_its_tools_and_their_arguments(builtin: Capability):
    page = (DOCS / f"{builtin.id}.md").read_text()
    assert page.startswith(f"# {builtin.name} (`{builtin.id}`)\n")
    for one in builtin.tools:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{one.name}` |"))
        for field in msgspec.structs.fields(one.arguments):
            assert re.search(rf"`{field.encode_name}\??`", row), f"{one.name}: {field.encode_name}"


@pytest.mark.parametrize("builtin", BUILTINS, ids=lambda builtin: builtin.id)
def test_every_builtin_tool_is_described_and_refuses_unknown_arguments(builtin: Capability):
    for one in builtin.tools:
        assert one.description
        assert one.arguments.__struct_config__.forbid_unknown_fields


def test_no_page_is_left_over():
    assert {page.stem for page in DOCS.glob("*.md")} == {builtin.id for builtin in BUILTINS}


def test_builtins_resolve_together_without_clash_or_missing_dependency():
    resolved = builtin_registry().resolve([CapabilityRef(ref=builtin.id) for builtin in BUILTINS])
    assert resolved.missing == ()
    assert len(resolved.tools) == sum(len(builtin.tools) for builtin in BUILTINS)


def test_registries_are_independent():
    first = builtin_registry()
    first.register(capability("extra"))
    assert builtin_registry().get("extra") is None
