"""What a client may write into a resource: sizes, names and formats, checked before anything is stored.

Texts are measured in UTF-8 bytes, because that is what storage and prompts pay for.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Final

from domain.config import CapabilityRef, InitialFile, NetworkAccessList
from domain.errors import InputTooLarge, InvalidInput, MalformedId
from domain.ids import Prefix, parse_id
from domain.network_patterns import MAX_PATTERNS, problem_of
from domain.tools import ClientSideTool
from domain.workspace import PATH_MAX_BYTES, BadPath, file_path, parents, shown

NAME_MAX_CHARACTERS: Final = 64
SHORT_TEXT_MAX_BYTES: Final = 2 * 1024
"""Display names and titles."""
DESCRIPTION_MAX_BYTES: Final = 10 * 1024
PROMPT_MAX_BYTES: Final = 1024 * 1024
MAX_CAPABILITIES: Final = 250
MAX_TOOLS: Final = 250
MAX_FALLBACK_MODELS: Final = 8
MAX_TAGS: Final = 100
TAG_MAX_BYTES: Final = 256
MAX_INITIAL_FILES: Final = 250
INITIAL_FILES_MAX_BYTES: Final = 2 * 1024 * 1024
"""All starter files of one resource together, paths included: they are copied into every new session."""
MAX_ITERATIONS_CEILING: Final = 10_000

IMPORT_MAX_BYTES: Final = 3 * 1024 * 1024
BODY_MAX_BYTES: Final = 4 * 1024 * 1024
"""A prompt of 1 MB and the starter files at their limit, with room for JSON escapes."""

FILE_MAX_BYTES: Final = 10 * 1024 * 1024
"""One file of a workspace: it is read and written as a whole, in memory."""
FILE_BODY_MAX_BYTES: Final = 21 * 1024 * 1024
"""A file at its limit in base64, or as text of which every character is escaped."""
WORKSPACE_MAX_BYTES: Final = 100 * 1024 * 1024
WORKSPACE_HISTORY_MAX_BYTES: Final = 256 * 1024 * 1024
"""Replaced and deleted files of one workspace that are kept, to go back to; 1 KiB more for each of them."""
WORKSPACE_MAX_ENTRIES: Final = 10_000
"""Files and directories of one workspace: listings and searches look at all of them."""
GREP_PATTERN_MAX_BYTES: Final = 1000
GREP_MAX_MATCHES: Final = 1000
GREP_LINE_MAX_CHARACTERS: Final = 2000
GREP_MAX_SECONDS: Final = 10.0
"""Most of which is reading: the matching itself is linear in the text."""

MAX_HARNESSES_PER_ORG: Final = 50
MAX_AGENTS_PER_ORG: Final = 500
MAX_SESSIONS_PER_ORG: Final = 10_000
MAX_PROVIDERS_PER_ORG: Final = 100
MAX_WORKSPACES_PER_ORG: Final = 1_000
MAX_MEMORIES_PER_ORG: Final = 1_000
MAX_CONNECTIONS_PER_USER: Final = 100
MAX_SKILLS_PER_ORG: Final = 500
MAX_DECLARATIVE_CAPABILITIES_PER_ORG: Final = 500
"""Rows that are not deleted. Counted without a lock: requests that race may overshoot by their number, which harms nobody."""

VALUE_KEY_MAX_CHARACTERS: Final = 255
VALUE_MAX_BYTES: Final = 64 * 1024
"""One value of a session's storage: what a tool result can carry, so that a model gets back all it has stored."""
VALUES_MAX_BYTES: Final = 8 * 1024 * 1024
"""All values of a session together: one answer of the API lists them."""
MAX_VALUES_PER_SESSION: Final = 1_000
SECRET_NAME_MAX_CHARACTERS: Final = 128
SECRET_MAX_BYTES: Final = 16 * 1024
MAX_SECRETS_PER_SESSION: Final = 100

DATABASE_NAME_MAX_CHARACTERS: Final = 64
DATABASE_MAX_BYTES: Final = 16 * 1024 * 1024
"""One SQLite database of a session: every call reads it whole, and one that writes stores it whole."""
MAX_DATABASES_PER_SESSION: Final = 10

MAX_SEARCH_TOKENS: Final = 8

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LOCALE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,4}")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IDENTITY = re.compile(r"identity_[0-9a-f]{32}")


def check_text(text: str, field: str, max_bytes: int) -> None:
    # A character takes one to four bytes: only texts in between need to be encoded to know.
    if len(text) > max_bytes or (len(text) * 4 > max_bytes and len(text.encode()) > max_bytes):
        raise InputTooLarge(f"Input exceeds allowed limits: `{field}` may hold {max_bytes} bytes", field=field)


def check_count(items: Sequence[object], field: str, maximum: int) -> None:
    if len(items) > maximum:
        raise InputTooLarge(f"Input exceeds allowed limits: `{field}` may hold {maximum} items", field=field)


def check_name(name: str, field: str = "name") -> None:
    """The addressable name of a harness or an agent."""
    if len(name) > NAME_MAX_CHARACTERS:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `{field}` may hold {NAME_MAX_CHARACTERS} characters", field=field
        )
    if not _SLUG.fullmatch(name):
        raise InvalidInput(f"{field} must be lower-case letters and digits, in words joined by `-`", field=field)


def check_locale(locale: str, field: str = "locale") -> None:
    if not _LOCALE.fullmatch(locale):
        raise InvalidInput(f"{field} must be a BCP 47 language tag, e.g. `uk-UA`", field=field)


def check_identity(identity: str, field: str = "agent_identity_id") -> None:
    if not _IDENTITY.fullmatch(identity):
        raise MalformedId(f"{field} must be `identity_` followed by 32 lower-case hex digits", field=field)


def check_id(prefix: Prefix, text: str, field: str) -> None:
    """`parse_id` whose error names the field the id stands in."""
    try:
        parse_id(prefix, text)
    except MalformedId as error:
        raise MalformedId(f"{field}: {error.message}", field=field) from None


def check_tags(tags: Sequence[str]) -> None:
    check_count(tags, "tags", MAX_TAGS)
    for index, tag in enumerate(tags):
        check_text(tag, f"tags[{index}]", TAG_MAX_BYTES)


def check_capability_refs(refs: Sequence[CapabilityRef]) -> None:
    """Sizes only: which capabilities exist is the registry's knowledge."""
    check_count(refs, "capabilities", MAX_CAPABILITIES)


def check_network_access(access: NetworkAccessList, field: str = "network_access") -> None:
    for name, patterns in (("allowed", access.allowed), ("blocked", access.blocked)):
        check_count(patterns or [], f"{field}.{name}", MAX_PATTERNS)
        for index, pattern in enumerate(patterns or []):
            if (problem := problem_of(pattern)) is not None:
                place = f"{field}.{name}[{index}]"
                raise InvalidInput(f"{place}: the pattern {problem}", field=place)


def check_fallback_models(model_ids: Sequence[str]) -> None:
    check_count(model_ids, "fallback_model_ids", MAX_FALLBACK_MODELS)
    for index, model_id in enumerate(model_ids):
        check_id(Prefix.MODEL, model_id, f"fallback_model_ids[{index}]")
        if model_id in model_ids[:index]:
            raise InvalidInput(
                f"fallback_model_ids[{index}]: `{model_id}` is listed twice", field=f"fallback_model_ids[{index}]"
            )


def check_tools(tools: Sequence[ClientSideTool]) -> None:
    check_count(tools, "tools", MAX_TOOLS)
    for index, tool in enumerate(tools):
        # What the strictest providers accept: a name they refuse would fail every turn.
        if not _TOOL_NAME.fullmatch(tool.name):
            field = f"tools[{index}].name"
            raise InvalidInput(f"{field} must be 1 to 64 letters, digits, `_` or `-`", field=field)


def check_initial_files(files: Sequence[InitialFile]) -> None:
    check_count(files, "initial_files", MAX_INITIAL_FILES)
    total_bytes = 0
    paths: list[str] = []
    for index, file in enumerate(files):
        path = f"initial_files[{index}].path"
        check_text(file.path, path, PATH_MAX_BYTES)
        try:
            paths.append(file_path(file.path))
        except BadPath as problem:
            raise InvalidInput(f"{path}: {problem}", field=path) from None
        if file.encoding == "base64":
            try:
                base64.b64decode(file.content, validate=True)
            except (binascii.Error, ValueError):
                field = f"initial_files[{index}].content"
                raise InvalidInput(f"{field} is not valid base64", field=field) from None
        elif file.encoding != "text":
            field = f"initial_files[{index}].encoding"
            raise InvalidInput(f"{field} must be `text` or `base64`", field=field)
        total_bytes += len(file.path.encode()) + len(file.content.encode())
    directories = {directory for path in paths for directory in parents(path)}
    for index, path in enumerate(paths):
        if path in directories:
            field = f"initial_files[{index}].path"
            raise InvalidInput(f"{field}: there are to be files below {shown(path)}, so it cannot be one", field=field)
    if total_bytes > INITIAL_FILES_MAX_BYTES:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `initial_files` may hold {INITIAL_FILES_MAX_BYTES} bytes in total",
            field="initial_files",
        )
