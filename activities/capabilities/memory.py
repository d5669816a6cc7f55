"""Memories of the organization as tools: list, read, search, and write where the configuration allows it.

Tools and not a mount: a memory is shared by many sessions, so what goes into it should be a deliberate act with a name of its
own, and not a side effect of a shell command. A memory that the configuration does not name cannot be reached, and one that is
archived or not there is an error that says so; the session goes on.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.memory_access import OpenMemory
from domain.tools import SideEffect

CONCURRENCY_CLASS: Final = "memory"
TIMEOUT_SECONDS: Final = 60.0
READ_MAX_BYTES: Final = 48 * 1024
MAX_ENTRIES: Final = 500
MAX_MATCHES: Final = 200
LINE_MAX_CHARACTERS: Final = 300

PROMPT: Final = """\
Memories are files that outlive this session and that other sessions share. Look there before you ask or guess: `memory_search` \
finds, `memory_list` shows what there is, `memory_read` reads. Files of a memory are not in the workspace."""
WRITABLE_PROMPT: Final = """\
With `memory_write` keep what later sessions need to know: decisions, preferences, facts that took effort to find. Short and in \
the right file; no secrets, no logs."""

MemoryName = Annotated[str, Meta(min_length=1, max_length=128, description="Name of a memory.")]
FilePath = Annotated[str, Meta(min_length=1, description="Path in the memory, such as `/decisions/storage.md`.")]


class MemoryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memories: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=128)]],
        Meta(max_length=20, description="Names or ids of the memories that the model may use. Default: none."),
    ] = []
    writable: Annotated[bool, Meta(description="Whether the model may write into them. Default: false.")] = False


class MemoryList(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memory: MemoryName | None = None
    path: Annotated[str, Meta(description="A directory in the memory. Default: all of it.")] = "/"


class MemoryRead(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memory: MemoryName
    path: FilePath
    offset: Annotated[int, Meta(ge=1, description="First line to read, counted from 1.")] = 1


class MemorySearch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pattern: Annotated[str, Meta(min_length=1, description="Regular expression (RE2), matched line by line.")]
    memory: MemoryName | None = None
    path_pattern: Annotated[str, Meta(description="Glob such as `*.md`.")] | None = None


class MemoryWrite(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memory: MemoryName
    path: FilePath
    content: Annotated[str, Meta(description="The whole new content; it replaces what is there.")]


async def memory_list(context: ToolContext, arguments: MemoryList) -> dict[str, object]:
    config = _config(context)
    if arguments.memory is None:
        found = [(name, await context.memory(name)) for name in config.memories]
        return {"memories": [_described(name, memory, config) for name, memory in found]}
    memory = await _open(context, arguments.memory)
    entries = await memory.files.list(arguments.path, recursive=True)
    shown = [{"path": one.path, "size_bytes": one.size_bytes} for one in entries if not one.is_directory][:MAX_ENTRIES]
    count = sum(not one.is_directory for one in entries)
    result: dict[str, object] = {"memory": memory.name, "files": shown, "count": count}
    if count > len(shown):
        result["note"] = f"The first {len(shown)} of {count} files; name a directory in `path` to see others."
    return result


async def memory_read(context: ToolContext, arguments: MemoryRead) -> dict[str, object]:
    memory = await _open(context, arguments.memory)
    entry, content = await memory.files.read(arguments.path)
    try:
        lines = content.decode().splitlines(keepends=True)
    except UnicodeDecodeError:
        raise ToolError(f"`{entry.path}` is not text and cannot be shown.") from None
    if arguments.offset > max(1, len(lines)):
        raise ToolError(f"`{entry.path}` has {len(lines)} lines.")
    text = "".join(lines[arguments.offset - 1 :]).encode()
    result: dict[str, object] = {"memory": memory.name, "path": entry.path, "updated_at": entry.updated_at}
    if len(text) <= READ_MAX_BYTES:
        return {**result, "content": text.decode()}
    shown = text[:READ_MAX_BYTES].decode(errors="ignore")
    following = arguments.offset + max(1, shown.count("\n"))
    note = f"Cut after {len(shown)} characters; read on with `offset` {following}."
    return {**result, "content": shown, "truncated": True, "note": note}


async def memory_search(context: ToolContext, arguments: MemorySearch) -> dict[str, object]:
    names = _config(context).memories if arguments.memory is None else [arguments.memory]
    matches: list[dict[str, object]] = []
    missing: list[str] = []
    for name in names:
        memory = await context.memory(name) if arguments.memory is None else await _open(context, name)
        if memory is None:
            missing.append(name)
            continue
        for one in await memory.files.grep(arguments.pattern, path_pattern=arguments.path_pattern):
            line = one.line[:LINE_MAX_CHARACTERS]
            matches.append({"memory": memory.name, "path": one.path, "line_number": one.line_number, "line": line})
    result: dict[str, object] = {"matches": matches[:MAX_MATCHES], "count": len(matches)}
    return result if not missing else {**result, "unavailable": missing}


async def memory_write(context: ToolContext, arguments: MemoryWrite) -> dict[str, object]:
    memory = await _open(context, arguments.memory)
    if not _config(context).writable or memory.is_readonly:
        raise ToolError(f"The memory `{memory.name}` is read-only here.")
    try:
        content = arguments.content.encode()
    except UnicodeEncodeError:
        raise ToolError("`content` holds a lone surrogate, which is no character.") from None
    entry, created = await memory.files.write(arguments.path, content)
    return {"memory": memory.name, "path": entry.path, "created": created, "size_bytes": entry.size_bytes}


def _config(context: ToolContext) -> MemoryConfig:
    config = context.config
    assert isinstance(config, MemoryConfig), "the registry decodes it"
    return config


async def _open(context: ToolContext, wanted: str) -> OpenMemory:
    """One of those that the configuration names, by the name or the id it has there, or by its name."""
    config = _config(context)
    for named in config.memories:
        memory = await context.memory(named)
        if memory is not None and wanted in (named, memory.name):
            return memory
    if wanted in config.memories:
        raise ToolError(f"The memory `{wanted}` is not there any more, or archived.")
    raise ToolError(f"There is no memory `{wanted}` here; those are: {', '.join(config.memories) or 'none'}.")


def _described(name: str, memory: OpenMemory | None, config: MemoryConfig) -> dict[str, object]:
    if memory is None:
        return {"name": name, "available": False}
    found: dict[str, object] = {"name": memory.name, "writable": config.writable and not memory.is_readonly}
    return {**found, "description": memory.description} if memory.description else found


def prompt_for(config: Struct | None) -> str | None:
    if not isinstance(config, MemoryConfig):
        return None
    if not config.memories:
        return "No memory is configured for this session."
    named = "Memories of this session: " + ", ".join(f"`{name}`" for name in config.memories) + "."
    return f"{named} {WRITABLE_PROMPT}" if config.writable else f"{named} They are read-only."


def _tool(
    name: str, display_name: str, description: str, arguments: type[Struct], run: object, *, writes: bool
) -> Tool:
    return Tool(
        name=name,
        display_name=display_name,
        description=description,
        arguments=arguments,
        run=run,  # type: ignore[arg-type]  # each takes its own arguments
        side_effect=SideEffect.IDEMPOTENT if writes else SideEffect.PURE,
        concurrency_class=CONCURRENCY_CLASS,
        timeout_seconds=TIMEOUT_SECONDS,
        readonly=not writes,
    )


CAPABILITY = Capability(
    id="memory",
    name="Memory",
    description="Lets the model read, search and, where allowed, write memories of the organization, which outlive sessions.",
    category="Knowledge",
    icon="brain",
    risk_level="medium",
    system_prompt=PROMPT,
    config=MemoryConfig,
    config_prompt=prompt_for,
    tools=(
        _tool(
            "memory_list",
            "List memories",
            "List the memories of this session, or the files of one memory.",
            MemoryList,
            memory_list,
            writes=False,
        ),
        _tool("memory_read", "Read memory", "Read a text file of a memory.", MemoryRead, memory_read, writes=False),
        _tool(
            "memory_search",
            "Search memories",
            "Find lines in the text files of one memory or of all.",
            MemorySearch,
            memory_search,
            writes=False,
        ),
        _tool(
            "memory_write",
            "Write memory",
            "Create or replace a text file of a memory, for later sessions.",
            MemoryWrite,
            memory_write,
            writes=True,
        ),
    ),
)
