"""Schemas of strangers: made harmless, and checked with words a model can act on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from activities.capabilities.json_schema import ANY_OBJECT, MAX_SCHEMA_NODES, harmless, schema_problem
from activities.capabilities.tool_call import call_tool
from activities.capabilities.tool_schema import tool_parameters
from domain.capabilities import Tool, ToolContext
from domain.events import ToolStatus
from tests.tool_context import PlainContext


def doubling(levels: int) -> dict[str, Any]:
    """Twice as large with every level that is inlined."""
    definitions: dict[str, Any] = {
        f"d{level}": {"properties": {side: {"$ref": f"#/$defs/d{level + 1}"} for side in "ab"}}
        for level in range(levels)
    }
    definitions[f"d{levels}"] = {"type": "string"}
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": definitions}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        None,
        5,
        "object",
        [],
        {"type": "string"},
        {"type": "nonsense"},
        {"properties": 5},
        {"properties": {"x": {"type": 5}}},
        {"required": "x"},
        doubling(40),
        deep(200),
        deep(5000),
        {"description": "x" * 100_000},
        {"properties": {f"p{place}": {} for place in range(MAX_SCHEMA_NODES + 1)}},
    ],
    ids=range(14),
)
def test_what_is_no_usable_schema_of_an_object_accepts_any_object(schema: object) -> None:
    assert harmless(schema) == ANY_OBJECT


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"type": "object", "properties": {}}),
        ({"$ref": "#"}, {"type": "object", "properties": {}}),
        ({"type": ["object", "null"]}, {"type": "object", "properties": {}}),
        (
            {"properties": {"next": {"$ref": "#"}}},
            {"type": "object", "properties": {"next": {"properties": {"next": {}}}}},
        ),
        (
            {"properties": {"t": {"$ref": "#/$defs/T", "description": "d"}}, "$defs": {"T": {"type": "string"}}},
            {"type": "object", "properties": {"t": {"type": "string", "description": "d"}}},
        ),
        (
            {
                "properties": {"t": {"$ref": "#/$defs/T", "type": "string"}},
                "$defs": {"T": {"type": "string", "minLength": 1}},
            },
            {"type": "object", "properties": {"t": {"type": "string", "allOf": [{"type": "string", "minLength": 1}]}}},
        ),
        (
            {"$schema": "https://evil.example/meta", "$id": "https://evil.example/x", "properties": {}},
            {"type": "object", "properties": {}},
        ),
        (
            {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "integer"}}},
            {"type": "object", "properties": {"$ref": {"type": "string"}, "pattern": {"type": "integer"}}},
        ),
    ],
    ids=str,
)
def test_references_are_inlined_and_end_where_they_would_go_round(schema: object, expected: object) -> None:
    assert harmless(schema) == expected


@pytest.mark.parametrize(
    "reference",
    ["https://127.0.0.1:1/schema.json", "file:///etc/passwd", "other.json#/x", "#/nowhere", "#anchor", "#/%zz"],
)
def test_a_reference_that_leads_out_of_the_document_is_never_followed(reference: str) -> None:
    schema = harmless({"properties": {"x": {"$ref": reference}}})
    assert schema == {"type": "object", "properties": {"x": {}}}
    assert schema_problem(schema, {"x": "anything"}) is None


def test_a_catastrophic_pattern_takes_no_time() -> None:
    schema = harmless({"properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}})
    began = time.monotonic()
    assert "does not match" in (schema_problem(schema, {"x": "a" * 50_000 + "!"}) or "")
    assert time.monotonic() - began < 5


def test_a_pattern_that_cannot_run_in_linear_time_is_not_checked_but_the_rest_is() -> None:
    schema = harmless(
        {
            "properties": {"x": {"type": "string", "pattern": "(?=a)b"}, "pattern": {"type": "integer"}},
            "additionalProperties": False,
        }
    )
    assert schema_problem(schema, {"x": "c", "pattern": 1}) is None
    assert "`x`" in (schema_problem(schema, {"x": 1}) or "")
    assert "`pattern`" in (schema_problem(schema, {"pattern": "1"}) or "")


def test_a_problem_names_every_place_and_stays_short() -> None:
    schema = harmless({"properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["b"]})
    problem = schema_problem(schema, {"a": ["x" * 10_000, 1, *["y"] * 20]}) or ""
    assert "`a[0]`" in problem
    assert problem.endswith("and more")
    assert len(problem) < 4000


async def test_a_tool_with_a_raw_schema_gets_the_checked_object_itself() -> None:
    seen: list[object] = []

    async def run(context: ToolContext, arguments: dict[str, object]) -> str:
        seen.append(arguments)
        return "ok"

    tool = Tool(
        name="t",
        description="",
        run=run,
        parameters={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    )
    assert tool_parameters(tool)["required"] == ["n"]
    refused = await call_tool(tool, PlainContext(), {"n": "one"})
    assert refused.status is ToolStatus.ERROR
    assert refused.error is not None
    assert refused.error.startswith("Invalid arguments for `t`: `n`:")
    assert not seen
    outcome = await call_tool(tool, PlainContext(), {"n": 1, "more": [1]})
    assert outcome.status is ToolStatus.SUCCESS
    assert seen == [{"n": 1, "more": [1]}]
