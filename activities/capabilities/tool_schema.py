"""How a tool and a capability look from outside: JSON Schema out of Structs, definitions, `CapabilityInfo`.

Schemas are self-contained: providers differ in what they make of `$ref`, and none of them needs our Struct names.
"""

from __future__ import annotations

from typing import Literal, cast

import msgspec
from msgspec import Struct

from activities.capabilities.json_schema import harmless
from domain.capabilities import Capability, CapabilityInfo, Tool
from domain.tools import BuiltinTool, SideEffect, ToolHints

_VERBATIM = frozenset({"default", "enum", "const", "examples", "required"})
"""Keywords whose value is data, not a schema."""

_SIDE_EFFECT_CLASSES: dict[SideEffect, Literal["Pure", "Idempotent", "AtMostOnce"]] = {
    SideEffect.PURE: "Pure",
    SideEffect.IDEMPOTENT: "Idempotent",
    SideEffect.AT_MOST_ONCE: "AtMostOnce",
}


def struct_schema(struct: type[Struct]) -> dict[str, object]:
    """The Struct's JSON Schema, references inlined, unknown properties refused. `ValueError` for a recursive Struct."""
    schema = msgspec.json.schema(struct)
    definitions = cast("dict[str, object]", schema.pop("$defs", {}))
    return _inline(schema, definitions, ())


def tool_parameters(tool: Tool) -> dict[str, object]:
    """JSON Schema of the tool's arguments; one that is not ours is made harmless first."""
    return struct_schema(tool.arguments) if tool.parameters is None else harmless(tool.parameters)


def tool_definition(tool: Tool, capability: Capability) -> BuiltinTool:
    return BuiltinTool(
        name=tool.name,
        description=tool.description,
        parameters=tool_parameters(tool),
        display_name=tool.display_name,
        category=capability.category,
        policy="client_side" if tool.answered_by == "user" else "auto",
        hints=ToolHints(
            readonly=True if tool.readonly is None and tool.side_effect is SideEffect.PURE else tool.readonly,
            idempotent=tool.side_effect is not SideEffect.AT_MOST_ONCE,
            concurrency_class=tool.concurrency_class,
            side_effect_class=_SIDE_EFFECT_CLASSES[tool.side_effect],
            capability_id=capability.id,
            capability_name=capability.name,
        ),
    )


def capability_info(capability: Capability) -> CapabilityInfo:
    return CapabilityInfo(
        id=capability.id,
        name=capability.name,
        description=capability.description,
        status=capability.status,
        icon=capability.icon,
        category=capability.category,
        system_prompt=capability.system_prompt,
        tool_definitions=[tool_definition(tool, capability) for tool in capability.tools],
        dependencies=list(capability.dependencies),
        features=list(capability.features),
        risk_level=capability.risk_level,
        is_guardrail=capability.is_guardrail or None,
        config_schema=struct_schema(capability.config) if capability.config else None,
        docs_slug=f"capabilities/{capability.id}",
    )


def schema_at(schema: dict[str, object], path: str) -> dict[str, object] | None:
    """The part of a schema that a msgspec error path such as `$.todos[0].status` points at."""
    node: object = schema
    for step in path.replace("[", ".[").split(".")[1:]:
        if not isinstance(node, dict):
            return None
        inner = node if step.startswith("[") else cast("dict[str, object]", node.get("properties", {}))
        node = inner.get("items" if step.startswith("[") else step)
    return cast("dict[str, object]", node) if isinstance(node, dict) else None


def _inline(schema: dict[str, object], definitions: dict[str, object], inside: tuple[str, ...]) -> dict[str, object]:
    schema = dict(schema)
    reference = schema.pop("$ref", None)
    if isinstance(reference, str):
        if reference in inside:
            raise ValueError(f"arguments must not be recursive: {' → '.join((*inside, reference))}")
        target = cast("dict[str, object]", definitions[reference.removeprefix("#/$defs/")])
        return _inline(target, definitions, (*inside, reference)) | _inline(schema, definitions, inside)

    # msgspec's spelling of `X | None = None`. A model is told to leave it out, which it does more reliably than send null.
    options = schema.get("anyOf")
    if isinstance(options, list) and {"type": "null"} in options and schema.get("default", 0) is None:
        options = [option for option in options if option != {"type": "null"}]
        if len(options) == 1:
            del schema["anyOf"], schema["default"]
            return _inline(options[0], definitions, inside) | _inline(schema, definitions, inside)

    schema.pop("title", None)
    # It points at definitions, and says nothing that the constants of the tag do not.
    schema.pop("discriminator", None)
    result: dict[str, object] = {}
    for keyword, value in schema.items():
        if keyword in _VERBATIM:
            result[keyword] = value
        elif keyword == "properties":
            properties = cast("dict[str, dict[str, object]]", value)
            result[keyword] = {name: _inline(part, definitions, inside) for name, part in properties.items()}
        elif isinstance(value, dict):
            result[keyword] = _inline(value, definitions, inside)
        elif isinstance(value, list):
            result[keyword] = [_inline(part, definitions, inside) if isinstance(part, dict) else part for part in value]
        else:
            result[keyword] = value
    options = result.get("enum")
    if isinstance(options, list) and all(isinstance(option, str) for option in options):
        result.setdefault("type", "string")  # implied by the options, but there are providers that insist on it
    if "properties" in result:
        result["additionalProperties"] = False
    return result
