"""Listings and searches as results of bounded size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Final

from activities.files.reading import text_of
from activities.files.results import (
    RESULT_MAX_BYTES,
    Entry,
    Listing,
    MatchedFile,
    Matches,
    Paths,
    entry_type,
    json_bytes,
    tool_path,
)
from domain.limits import GREP_MAX_MATCHES, GREP_MAX_SECONDS
from domain.workspace import BadPattern, FileEntry, FileMatch, FileProblem, WorkspaceFiles

SHOWN_LINE_CHARACTERS: Final = 500
MAX_ITEMS: Final = 1000


def listing(path: str, entries: Sequence[FileEntry]) -> Listing:
    shown: list[Entry] = []
    left = RESULT_MAX_BYTES
    for entry in entries[:MAX_ITEMS]:
        one = Entry(
            path=tool_path(entry.path),
            type=entry_type(entry),
            size_bytes=None if entry.is_directory else entry.size_bytes,
            is_readonly=entry.is_readonly,
        )
        left -= json_bytes(one)
        if left < 0:
            break
        shown.append(one)
    if len(shown) == len(entries):
        return Listing(path=tool_path(path), count=len(entries), entries=shown)
    return Listing(
        path=tool_path(path),
        count=len(entries),
        entries=shown,
        truncated=True,
        reason="item_cap",
        resume_hint=f"The first {len(shown):,} of {len(entries):,} entries are shown. Use glob with `path` and a pattern "
        "to see others.",
    )


def matching_paths(entries: Sequence[FileEntry], matches: Callable[[str], bool], base: str) -> Paths:
    """`matches` takes paths as seen from `base`. Runs in a thread; raises `BadPattern` when it takes too long."""
    ends_at = time.monotonic() + GREP_MAX_SECONDS
    found: list[str] = []
    prefix = "" if base == "/" else base
    for entry in entries:
        if time.monotonic() > ends_at:
            raise BadPattern(f"The search took longer than {GREP_MAX_SECONDS:g} seconds; use a simpler glob")
        if not entry.is_directory and matches(entry.path[len(prefix) :]):
            found.append(tool_path(entry.path))
    shown: list[str] = []
    left = RESULT_MAX_BYTES
    for path in found[:MAX_ITEMS]:
        left -= json_bytes(path)
        if left < 0:
            break
        shown.append(path)
    if len(shown) == len(found):
        return Paths(count=len(found), paths=shown)
    return Paths(
        count=len(found),
        paths=shown,
        truncated=True,
        reason="item_cap",
        resume_hint=f"The first {len(shown):,} of {len(found):,} files are shown. Use a narrower pattern, or `path`.",
    )


async def matched_files(files: WorkspaceFiles, found: Sequence[FileMatch], before: int, after: int) -> Matches:
    """The matches with the lines around them. A file that has changed meanwhile is shown without those."""
    shown: list[MatchedFile] = []
    left = RESULT_MAX_BYTES
    for path, group in groupby(found, key=lambda match: match.path):
        matches = list(group)
        around = await _lines(files, path) if before or after else []
        rows: list[str] = []
        count = 0
        left -= json_bytes(MatchedFile(path=tool_path(path), match_count=len(matches), lines=""))
        for row, is_match in _rows(matches, around, before, after):
            left -= json_bytes(row)
            if left < 0:
                break
            rows.append(row)
            count += is_match
        if count:
            shown.append(MatchedFile(path=tool_path(path), match_count=count, lines="\n".join(rows)))
        if left < 0:
            break
    if left >= 0 and len(found) < GREP_MAX_MATCHES:
        return Matches(match_count=len(found), files=shown)
    count = sum(one.match_count for one in shown)
    at_least = "at least " if len(found) == GREP_MAX_MATCHES else ""
    return Matches(
        match_count=len(found),
        files=shown,
        truncated=True,
        reason="size_cap" if left < 0 else "row_cap",
        resume_hint=f"{count:,} of {at_least}{len(found):,} matches are shown. Use a narrower `pattern` or `path`"
        + (", or less context." if before or after else "."),
    )


async def _lines(files: WorkspaceFiles, path: str) -> list[str]:
    try:
        _, content = await files.read(path)
    except FileProblem:
        return []
    return (text_of(content) or "").split("\n")


def _rows(matches: Sequence[FileMatch], lines: Sequence[str], before: int, after: int) -> Iterator[tuple[str, bool]]:
    """Each line once, and whether it is a match."""
    matched = {match.line_number: match.line for match in matches}
    shown_to = 0
    for match in matches:
        number = match.line_number
        first = max(1, number - before) if number <= len(lines) else number
        last = max(number, min(len(lines), number + after))
        if shown_to and first > shown_to + 1 and lines:
            yield "--", False
        for at in range(max(first, shown_to + 1), last + 1):
            yield _row(at, matched[at] if at in matched else lines[at - 1], at in matched), at in matched
        shown_to = max(shown_to, last)


def _row(number: int, line: str, is_match: bool) -> str:
    text = line.removesuffix("\r")
    cut = text if len(text) <= SHOWN_LINE_CHARACTERS else text[:SHOWN_LINE_CHARACTERS] + "…"
    return f"{number}{':' if is_match else '-'}{cut}"
