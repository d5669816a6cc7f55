"""`tool_call_repair`: arguments are read in the one way they can be meant, fit the schema afterwards, or are asked for again."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from activities.capabilities.lenient_json import salvaged
from activities.capabilities.tool_call_repair import GAVE_UP, ToolCallRepair, repaired
from activities.llm.failures import parse_arguments
from domain.capabilities import Tool, ToolContext
from domain.messages import Message, Role, TextPart, ToolResultPart
from domain.model import ToolCallReady
from domain.tools import ClientSideTool, SideEffect, ToolCall


class Arguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    lines: int | None = None
    tags: list[str] = []


async def nothing(_context: ToolContext, _arguments: Struct) -> str:
    return ""


def tool(side_effect: SideEffect = SideEffect.AT_MOST_ONCE) -> Tool:
    return Tool(name="read", description="", arguments=Arguments, run=nothing, side_effect=side_effect)


def event(raw: str) -> ToolCallReady:
    arguments, problem = parse_arguments(raw)
    assert problem is not None, "this is no malformed text"
    return ToolCallReady(ToolCall(id="call_1", name="read", arguments=arguments), problem, raw)


def outcome(raw: str, of: Tool | ClientSideTool | None = None, history: list[Message] | None = None, earlier: int = 0):
    return repaired(event(raw), of or tool(), ToolCallRepair(), history or [], earlier)


@pytest.mark.parametrize(
    "raw",
    [
        '{"path": "a", "lines": 3,}',
        "{'path': 'a', 'lines': 3}",
        '{path: "a", lines: 3}',
        '```json\n{"path": "a", "lines": 3}\n```',
        '{"path": "a", "lines": 3}{"path": "a", "lines": 3}',
        '{}{"path": "a", "lines": 3}',
        '"{\\"path\\": \\"a\\", \\"lines\\": 3}"',
        '{"path": "a", /* where */ "lines": 3} // done',
        '{“path”: “a”, "lines": 3}',
        '\ufeff{"path": "a", "lines": 3}',
        '{,"path": "a",, "lines": 3}',
    ],
)
def test_what_can_be_meant_in_one_way_is_read_that_way(raw: str) -> None:
    call, how = outcome(raw)
    assert how == "local-salvage"
    assert call.problem is None
    assert call.call.arguments == {"path": "a", "lines": 3}


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        ('{"path": "two\nlines"}', {"path": "two\nlines"}),
        ("{'path': \"it's\"}", {"path": "it's"}),
        ("{'path': 'a', 'lines': None}", {"path": "a", "lines": None}),
        ('{"path": "\\ud83d\\ude00",}', {"path": "😀"}),
        ('{"path": "a", "tags": ["x", "y",],}', {"path": "a", "tags": ["x", "y"]}),
        ('{"path": "http://a/b#c",}', {"path": "http://a/b#c"}),
    ],
)
def test_values_keep_their_meaning(raw: str, arguments: dict[str, object]) -> None:
    call, how = outcome(raw)
    assert (how, call.call.arguments) == ("local-salvage", arguments)


@pytest.mark.parametrize(
    "raw",
    [
        '{"path": "a"}{"path": "b"}',  # which one?
        '{"path": "a", "path": "b",}',
        '{"path": a b}',
        "path = a",
        "[1, 2",
        '{"path": "C:\\dir",}',
        '{"path": "\\ud83d",}',
        '{"path": "a" "lines": 3}',
        "{" * 100_000,
        "[" * 500 + "]" * 499,
        "<function=read>",
        '{"path": NaN}',
    ],
)
def test_what_can_be_meant_in_several_ways_or_none_is_asked_for_again(raw: str) -> None:
    before = event(raw)
    call, how = outcome(raw)
    assert how == "re-prompt"
    assert call == before


@pytest.mark.parametrize("raw", ['{"file": "a",}', '{"path": 3,}', '{"path": "a", "more": 1,}', "{}{}"])
def test_nothing_is_repaired_into_what_the_schema_refuses(raw: str) -> None:
    assert outcome(raw)[1] == "re-prompt"


@pytest.mark.parametrize(
    "raw", ['{"path": "/workspace/no', '{"path": "a"', '{"path": "a", "li', '```json\n{"path": "a"']
)
def test_a_text_that_was_cut_off_is_completed_only_for_tools_without_effects(raw: str) -> None:
    assert outcome(raw)[1] == "re-prompt"
    assert outcome(raw, tool(SideEffect.IDEMPOTENT))[1] == "re-prompt"
    assert outcome(raw, tool(SideEffect.PURE))[1] == "local-salvage"


def test_calls_of_a_clients_tool_must_fit_its_schema() -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    client = ClientSideTool(name="read", description="", parameters=parameters)
    assert outcome('{"n": 3,}', client)[1] == "local-salvage"
    assert outcome('{"n": "three",}', client)[1] == "re-prompt"
    assert outcome('{"n": 3', client)[1] == "re-prompt"


def message(role: Role, *parts: TextPart | ToolResultPart) -> Message:
    return Message(id="", role=role, content=list(parts), created_at="")


def test_after_some_failures_of_a_turn_no_more_are_asked_for() -> None:
    _, problem = parse_arguments("{nonsense")
    failed = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="c", error=problem))
    asked = message(Role.USER, TextPart(text="hi"))
    assert outcome("{nonsense", history=[failed, failed, failed, asked, failed, failed])[1] == "re-prompt"
    call, how = outcome("{nonsense", history=[asked, failed, failed, failed])
    assert (how, call.problem) == ("gave-up", GAVE_UP.format(times=3))
    assert outcome("{nonsense", history=[asked, failed, failed], earlier=1)[1] == "gave-up"


def test_a_tool_that_nobody_offers_is_not_guessed_at() -> None:
    assert repaired(event('{"path": "a",}'), None, ToolCallRepair(), [], 0)[1] == "re-prompt"


objects = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(objects)
def test_sound_json_means_the_same(value: dict[str, object]) -> None:
    found = salvaged(msgspec.json.encode(value).decode())
    assert found is not None
    assert (found.value, found.cut_off) == (value, False)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}[]\"',:ab1 \\\n", max_size=60))
def test_any_text_is_read_or_refused_and_never_fails(text: str) -> None:
    salvaged(text)


@settings(max_examples=80, deadline=None)
@given(objects, st.data())
def test_a_prefix_is_never_taken_for_a_whole(value: dict[str, object], data: st.DataObject) -> None:
    text = msgspec.json.encode(value).decode()
    found = salvaged(text[: data.draw(st.integers(0, len(text) - 1))])
    assert found is None or found.cut_off
