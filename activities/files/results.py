"""What the file tools return.

Paths are shown below `/workspace`, because that is the spelling that file tools and the shell understand alike.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Struct

from domain.workspace import ROOT, FileEntry

RESULT_MAX_BYTES: Final = 48 * 1024
"""Of content in one result, as JSON. A result may hold 64 KiB; what is left is for the fields around the content."""

CutReason = Literal["size_cap", "line_cap", "row_cap", "exec_budget", "item_cap"]


class Cut(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a result says that does not hold everything. `next_offset` is the line to go on with."""

    truncated: bool = False
    reason: CutReason | None = None
    bytes_returned: int | None = None
    bytes_total: int | None = None
    next_offset: int | None = None
    resume_hint: str | None = None


class TextFile(Cut, frozen=True, kw_only=True, omit_defaults=True):
    """Content verbatim: line numbers in it would find their way into `old_text` of an edit. Lines count from 1."""

    path: str
    content_hash: str
    size_bytes: int
    total_lines: int
    start_line: int
    end_line: int
    content: str
    is_readonly: bool = False


class BinaryFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    content_hash: str
    size_bytes: int
    is_binary: Literal[True]
    content_type: str
    note: str
    is_readonly: bool = False


class UnreadFile(Struct, frozen=True, kw_only=True):
    path: str
    error: str


class ManyFiles(Struct, frozen=True, kw_only=True):
    files: list[TextFile | BinaryFile | UnreadFile]


class Written(Struct, frozen=True, kw_only=True):
    path: str
    created: bool
    size_bytes: int
    content_hash: str | None


class Edited(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    edits_applied: int
    size_bytes: int
    content_hash: str | None
    note: str | None = None


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    type: Literal["file", "directory"]
    size_bytes: int | None = None
    is_readonly: bool = False


class Listing(Cut, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    count: int
    entries: list[Entry]


class MatchedFile(Struct, frozen=True, kw_only=True):
    """`lines` is what `grep -n` prints: `12:` before a match, `11-` before its context, `--` between what is apart."""

    path: str
    match_count: int
    lines: str


class Matches(Cut, frozen=True, kw_only=True, omit_defaults=True):
    match_count: int
    files: list[MatchedFile]


class Paths(Cut, frozen=True, kw_only=True, omit_defaults=True):
    count: int
    paths: list[str]


class Deleted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    deleted: bool
    note: str | None = None


class Stat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    exists: bool
    type: Literal["file", "directory"] | None = None
    size_bytes: int | None = None
    content_hash: str | None = None
    is_readonly: bool | None = None
    created_at: str | None = None
    updated_at: str | None = None


def tool_path(path: str) -> str:
    """A normal path as tools show it."""
    return ROOT if path == "/" else ROOT + path


def entry_type(entry: FileEntry) -> Literal["file", "directory"]:
    return "directory" if entry.is_directory else "file"


def json_bytes(value: object) -> int:
    """How much of a result a value takes."""
    return len(msgspec.json.encode(value)) + 1
