"""What the file tools take."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.workspace import ROOT

DEFAULT_LINES: Final = 2000
MAX_EDITS: Final = 100

Path = Annotated[str, Meta(min_length=1, description="Such as `/workspace/notes/plan.md` or `notes/plan.md`.")]
Where = Annotated[str, Meta(description="A directory. Default: the whole workspace.")]


class ReadFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Path
    offset: Annotated[int, Meta(ge=1, description="First line to read, counted from 1.")] = 1
    limit: Annotated[int, Meta(ge=1, le=100_000, description="How many lines to read at most.")] = DEFAULT_LINES


class ReadManyFiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    paths: Annotated[list[Path], Meta(min_length=2, max_length=10)]


class WriteFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Path
    content: Annotated[str, Meta(description="The whole new content; it replaces what is there.")]


class Edit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    old_text: Annotated[
        str, Meta(min_length=1, description="Text exactly as it stands in the file, where it must occur exactly once.")
    ]
    new_text: Annotated[str, Meta(description="What replaces it; empty to delete it.")]


class EditFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Path
    expected_hash: Annotated[str, Meta(description="`content_hash` of the file as you last saw it: `sha256:…`.")]
    edits: Annotated[
        list[Edit],
        Meta(min_length=1, max_length=MAX_EDITS, description="Applied in this order, each to what the last one left."),
    ]


class ListDirectory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Where = ROOT


class GrepFiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pattern: Annotated[
        str,
        Meta(
            min_length=1,
            description="A regular expression (RE2: no look-around, no back-references), matched line by line. "
            "`(?i)` at its beginning ignores case.",
        ),
    ]
    path: Annotated[
        str,
        Meta(
            description="A file, a directory, or a glob such as `*.py` or `src/**/*.py`. Default: the whole workspace."
        ),
    ] = ROOT
    before_context: Annotated[int, Meta(ge=0, le=20, description="Lines to show before each match.")] = 0
    after_context: Annotated[int, Meta(ge=0, le=20, description="Lines to show after each match.")] = 0


class Glob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pattern: Annotated[
        str,
        Meta(
            min_length=1,
            description="`*.md` is compared with names; `docs/**/*.md`, with a slash, with paths from `path` on. "
            "`*`, `?`, `**`, `[a-z]`, `{one,two}`.",
        ),
    ]
    path: Where = ROOT


class DeleteFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Path
    recursive: Annotated[bool, Meta(description="Needed for a directory that is not empty.")] = False


class StatFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Path
