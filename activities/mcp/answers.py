"""What a server says, as what the model reads: tools out of a list, a text out of a result.

Decoded here from plain JSON and not by the client library, whose own check of results runs regular expressions of strangers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from activities.capabilities.json_schema import harmless
from activities.mcp.cleaning import MAX_DESCRIPTION_CHARACTERS, clean, one_line
from domain.capabilities import ToolError
from domain.mcp import DiscoveredTool

MAX_TOOLS: Final = 128
MAX_TOOL_NAME_CHARACTERS: Final = 256
MAX_LIST_BYTES: Final = 1024 * 1024
"""Of all tools of a server together, as they are stored and shown to a model."""

HEADER_KEYWORD: Final = "x-mcp-header"


def discovered_tools(listed: Sequence[object]) -> tuple[list[DiscoveredTool], int]:
    """The usable tools, and how many are not."""
    tools: dict[str, DiscoveredTool] = {}
    size = 0
    for entry in listed:
        tool = _tool(entry)
        if tool is None or tool.name in tools or len(tools) == MAX_TOOLS:
            continue
        size += len(msgspec.json.encode(tool))
        if size > MAX_LIST_BYTES:
            break
        tools[tool.name] = tool
    return list(tools.values()), len(listed) - len(tools)


def _tool(entry: object) -> DiscoveredTool | None:
    if not isinstance(entry, Mapping):
        return None
    name, schema = entry.get("name"), entry.get("inputSchema")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TOOL_NAME_CHARACTERS or name != one_line(name):
        return None
    hints = entry.get("annotations")
    hints = hints if isinstance(hints, Mapping) else {}
    title = entry.get("title") or hints.get("title")
    description = entry.get("description")
    return DiscoveredTool(
        name=name,
        title=one_line(title, 100) if isinstance(title, str) else None,
        description=clean(description, MAX_DESCRIPTION_CHARACTERS) if isinstance(description, str) else "",
        parameters=_cleaned(harmless(schema)),
        read_only=hints.get("readOnlyHint") is True,
        idempotent=hints.get("idempotentHint") is True,
        has_header_parameters=HEADER_KEYWORD in str(schema),
    )


def _cleaned(node: Any) -> Any:
    """Texts inside of a schema reach the model just as a description does."""
    if isinstance(node, dict):
        return {clean(key): _cleaned(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_cleaned(value) for value in node]
    return clean(node, MAX_DESCRIPTION_CHARACTERS) if isinstance(node, str) else node


def result_text(result: Mapping[str, object]) -> str:
    """A tool's result as text; raises `ToolError` with that text when the server calls it an error."""
    content = result.get("content")
    parts = [text for part in (content if isinstance(content, list) else []) if (text := _part(part))]
    structured = result.get("structuredContent")
    if not parts and structured is not None:
        parts.append(msgspec.json.encode(structured).decode())
    text = clean("\n\n".join(parts))
    if result.get("isError") is True:
        raise ToolError(text or "The tool failed without saying why.")
    return text


def _part(part: object) -> str:
    if not isinstance(part, Mapping):
        return ""
    match part.get("type"):
        case "text":
            text = part.get("text")
            return text if isinstance(text, str) else ""
        case "resource":
            return _resource(part.get("resource"))
        case "resource_link":
            return f"[Resource {one_line(str(part.get('name') or ''), 200)}: {one_line(str(part.get('uri') or ''))}]"
        case "image" | "audio" as kind:
            data = part.get("data")
            size = len(data) * 3 // 4 if isinstance(data, str) else 0
            return f"[{kind} of type {one_line(str(part.get('mimeType')), 100)}, {size:,} bytes: not shown]"
        case other:
            return f"[content of type {one_line(str(other), 100)}: not shown]"


def _resource(resource: object) -> str:
    if not isinstance(resource, Mapping):
        return ""
    uri, text = one_line(str(resource.get("uri") or "")), resource.get("text")
    if isinstance(text, str):
        return f"[Resource {uri}]\n{text}"
    return f"[Resource {uri}: binary, not shown]"
