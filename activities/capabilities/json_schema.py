"""JSON Schemas that somebody else wrote: made harmless once, then used to check a call's arguments.

Decisions the code can't show:
- A schema of a stranger is hostile input. References are resolved inside the document and inlined, so that nothing is ever
  fetched; a recursive one ends in "anything", and so does one that leads out of the document. What grows too large while it is
  inlined is replaced as a whole by "any object": whoever wrote it checks the arguments itself.
- The check runs in a library whose regular expressions are linear in the text; patterns it cannot run that way (look-around,
  back-references) are not checked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

if TYPE_CHECKING:
    import jsonschema_rs

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_NODES: Final = 3_000
"""Objects and arrays after inlining: `$ref`s may double a schema's size per level."""
MAX_SCHEMA_DEPTH: Final = 40
MAX_PATTERN_BYTES: Final = 1_000
MAX_PROBLEMS: Final = 5
MAX_PROBLEM_CHARACTERS: Final = 500

ANY_OBJECT: Final[Mapping[str, object]] = {"type": "object", "additionalProperties": True}

_DROPPED: Final = frozenset({
    "$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$vocabulary",
    "$comment", "$defs", "definitions",
})  # fmt: skip
"""Keywords that only matter for resolving references, which has been done."""
_DATA: Final = frozenset({"default", "enum", "const", "examples", "required", "dependentRequired"})
"""Keywords whose value is data, not a schema."""
_NAMED: Final = frozenset({"properties", "patternProperties", "dependentSchemas"})
"""Keywords whose value maps names to schemas."""
_PATTERNS: Final = frozenset({"pattern", "patternProperties"})

_COMPILED_REGEX_BYTES: Final = 1024 * 1024


class _TooLarge(Exception):
    pass


def harmless(schema: object) -> dict[str, object]:
    """A self-contained schema of an object, at most as strict as `schema`. The result is shared: it must not be changed."""
    try:
        encoded = msgspec.json.encode(schema)
    except (RecursionError, msgspec.MsgspecError, TypeError, ValueError):
        return dict(ANY_OBJECT)
    return dict(ANY_OBJECT) if len(encoded) > MAX_SCHEMA_BYTES else _harmless(encoded)


@lru_cache(maxsize=512)
def _harmless(encoded: bytes) -> dict[str, object]:
    schema = msgspec.json.decode(encoded)
    if not isinstance(schema, dict):
        return dict(ANY_OBJECT)
    try:
        inlined = _Inliner(cast("dict[str, object]", schema)).run()
        is_too_large = len(msgspec.json.encode(inlined)) > MAX_SCHEMA_BYTES
    except (_TooLarge, RecursionError, msgspec.MsgspecError):
        return dict(ANY_OBJECT)
    kind = inlined.get("type", "object")
    if is_too_large or (kind != "object" and not (isinstance(kind, list) and "object" in kind)):
        return dict(ANY_OBJECT)
    inlined["type"] = "object"
    if not isinstance(inlined.setdefault("properties", {}), dict):
        return dict(ANY_OBJECT)
    return inlined if _validator(msgspec.json.encode(inlined)) is not None else dict(ANY_OBJECT)


def schema_problem(schema: Mapping[str, object], value: object) -> str | None:
    """What is wrong with a value, in words that name the places; None when it fits, or nobody can tell."""
    validator = _validator(msgspec.json.encode(schema))
    if validator is None:
        return None
    problems: list[str] = []
    for error in validator.iter_errors(value):
        if len(problems) == MAX_PROBLEMS:
            problems.append("and more")
            break
        problems.append(_told(list(error.instance_path), str(error.message)))
    return "; ".join(problems) or None


def _told(path: list[object], message: str) -> str:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    text = f"`{where}`: {message}" if where else message
    if len(text) <= MAX_PROBLEM_CHARACTERS:
        return text
    # The value stands first in a message, what is wrong with it last.
    return f"{text[: MAX_PROBLEM_CHARACTERS // 2]}…{text[-MAX_PROBLEM_CHARACTERS // 2 :]}"


@lru_cache(maxsize=512)
def _validator(encoded: bytes) -> jsonschema_rs.Draft202012Validator | None:
    """None for what is no schema. Without the patterns when one of them does not compile."""
    import jsonschema_rs

    options = jsonschema_rs.RegexOptions(size_limit=_COMPILED_REGEX_BYTES, dfa_size_limit=_COMPILED_REGEX_BYTES)
    schema = msgspec.json.decode(encoded)
    candidates: tuple[Any, ...] = (schema, _without_patterns(schema))
    for candidate in candidates:
        try:
            return jsonschema_rs.Draft202012Validator(
                candidate, pattern_options=options, validate_formats=False, offline=True
            )
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError):
            continue
    return None


def _without_patterns(node: object) -> object:
    if isinstance(node, list):
        return [_without_patterns(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept: dict[str, object] = {}
    for key, value in cast("dict[str, object]", node).items():
        if key in _PATTERNS:
            continue
        if key in _DATA:
            kept[key] = value
        elif key in _NAMED and isinstance(value, dict):
            # Names of properties, which may be called like a keyword.
            kept[key] = {name: _without_patterns(part) for name, part in value.items()}
        else:
            kept[key] = _without_patterns(value)
    return kept


class _Inliner:
    def __init__(self, root: dict[str, object]) -> None:
        self._root = root
        self._nodes = 0

    def run(self) -> dict[str, object]:
        result = self._schema(self._root, (), 0)
        return result if isinstance(result, dict) else dict(ANY_OBJECT)

    def _count(self, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_SCHEMA_NODES or depth > MAX_SCHEMA_DEPTH:
            raise _TooLarge

    def _schema(self, node: object, inside: tuple[str, ...], depth: int) -> object:
        """A schema; whatever else stands where one belongs is left for the check to complain about."""
        self._count(depth)
        if isinstance(node, list):
            return [self._schema(part, inside, depth + 1) for part in node]
        if not isinstance(node, dict):
            return node
        schema = cast("dict[str, object]", node)
        reference = schema.get("$ref")
        result = {
            key: self._keyword(key, value, inside, depth) for key, value in schema.items() if self._kept(key, value)
        }
        if isinstance(reference, str) and reference not in inside:
            target = self._schema(self._target(reference), (*inside, reference), depth + 1)
            return _both(target, result)
        return result

    @staticmethod
    def _kept(key: str, value: object) -> bool:
        if key == "pattern" and isinstance(value, str):
            return len(value.encode("utf-8", "replace")) <= MAX_PATTERN_BYTES
        return key != "$ref" and key not in _DROPPED

    def _keyword(self, key: str, value: object, inside: tuple[str, ...], depth: int) -> object:
        if key in _DATA:
            return copy.deepcopy(value)
        if key in _NAMED and isinstance(value, dict):
            self._count(depth + 1)
            return {
                name: self._schema(part, inside, depth + 2)
                for name, part in value.items()
                if key != "patternProperties" or len(name) <= MAX_PATTERN_BYTES
            }
        return self._schema(value, inside, depth + 1) if isinstance(value, dict | list) else value

    def _target(self, reference: str) -> object:
        """Where a JSON pointer into this document leads; an empty schema for everything else."""
        if reference != "#" and not reference.startswith("#/"):
            return {}
        node: object = self._root
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isascii() and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            else:
                return {}
        return node if isinstance(node, dict | bool) else {}


def _both(target: object, beside: dict[str, object]) -> object:
    """What a reference leads to, and what stands beside it; merged where that is the same."""
    if not beside or target is False:
        return target
    if not isinstance(target, dict):
        return beside
    if target.keys().isdisjoint(beside):
        return {**target, **beside}
    earlier = beside.get("allOf")
    return {**beside, "allOf": [*(earlier if isinstance(earlier, list) else []), target]}
