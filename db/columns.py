"""Between rows and values: JSONB is read and written as text; ids and timestamps are public in values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Struct
from piccolo.columns import Column
from piccolo.columns.combination import And, Or, Where, WhereRaw

from domain.clock import timestamp
from domain.ids import Prefix, format_id, parse_id
from domain.limits import MAX_SEARCH_TOKENS
from domain.mcp import masked_servers

T = TypeVar("T", bound=Struct)
Condition = And | Or | Where | WhereRaw

ID_COLUMNS: Final = {
    "default_model_id": Prefix.MODEL,
    "forked_from_session_id": Prefix.SESSION,
    "harness_id": Prefix.HARNESS,
    "parent_harness_id": Prefix.HARNESS,
    "owner_principal_id": Prefix.PRINCIPAL,
    "parent_session_id": Prefix.SESSION,
    "provider_id": Prefix.PROVIDER,
    "workspace_id": Prefix.WORKSPACE,
}
JSON_COLUMNS: Final = frozenset(
    {
        "capabilities",
        "embedder_metadata",
        "fallback_model_ids",
        "hints",
        "initial_files",
        "mcp_servers",
        "network_access",
        "options",
        "tags",
        "tools",
    }
)

_encode = msgspec.json.Encoder().encode


def read_resource(row: Mapping[str, object], kind: type[T], **given: object) -> T:
    """The resource a row holds; `given` are the fields that are not simply its columns."""
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        if field.name in given:
            values[field.encode_name] = given[field.name]
        elif field.name in row:
            values[field.encode_name] = _value(field.name, row[field.name])
    return msgspec.convert(values, kind)


def _value(column: str, stored: object) -> object:
    match stored:
        case UUID():
            return format_id(ID_COLUMNS[column], stored)
        case datetime():
            return timestamp(stored)
        case str() if column == "mcp_servers":
            return masked_servers(msgspec.json.decode(stored))
        case str() if column in JSON_COLUMNS:
            return msgspec.json.decode(stored)
        case _:
            return stored


def column_values(changes: Struct) -> dict[str, object]:
    """The fields of a `…Changes` that are set, as their columns hold them."""
    values: dict[str, object] = {}
    for name in changes.__struct_fields__:
        value = getattr(changes, name)
        if value is UNSET:
            continue
        if name == "tags":
            value = list(dict.fromkeys(value))
        if name in JSON_COLUMNS:
            values[name] = json_column(value)
        elif name in ID_COLUMNS and isinstance(value, str):
            values[name] = parse_id(ID_COLUMNS[name], value)
        else:
            values[name] = value
    return values


def json_column(value: object) -> str | None:
    return None if value is None else _encode(value).decode()


def like_patterns(search: str | None) -> list[str]:
    """One pattern per word, each of which must match; a blank search has none."""
    words = (search or "").split()[:MAX_SEARCH_TOKENS]
    return ["%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%" for word in words]


def search_conditions(search: str | None, columns: Sequence[Column]) -> list[Condition]:
    conditions: list[Condition] = []
    for pattern in like_patterns(search):
        either: Condition = columns[0].ilike(pattern)
        for column in columns[1:]:
            either = either | column.ilike(pattern)
        conditions.append(either)
    return conditions
