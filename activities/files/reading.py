"""Parts of files that fit into a result, and what to say of files that are not text."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from activities.files.results import BinaryFile, CutReason, TextFile, json_bytes, tool_path
from domain.capabilities import ToolError
from domain.workspace import FileEntry

_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"SQLite format 3\0", "application/vnd.sqlite3"),
    (b"\x7fELF", "application/x-executable"),
    (b"\xff\xfe", "text/plain; charset=utf-16le"),
    (b"\xfe\xff", "text/plain; charset=utf-16be"),
)


def text_of(content: bytes) -> str | None:
    """None for what is not text: as in a search, that is everything but UTF-8 without NUL."""
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def described(entry: FileEntry, content: bytes) -> BinaryFile:
    content_type = next((name for start, name in _SIGNATURES if content.startswith(start)), "application/octet-stream")
    return BinaryFile(
        path=tool_path(entry.path),
        content_hash=entry.content_hash or "",
        size_bytes=entry.size_bytes,
        is_binary=True,
        content_type=content_type,
        note="The file is not UTF-8 text, so its content is not shown and cannot be edited as text.",
        is_readonly=entry.is_readonly,
    )


class _Part(Struct, frozen=True):
    text: str
    line_count: int
    reason: CutReason | None
    is_line_cut: bool = False


def excerpt(entry: FileEntry, text: str, *, offset: int, limit: int, max_bytes: int) -> TextFile:
    """Whole lines from `offset` on, as many as fit. Of a line that alone is too long the beginning is shown.

    Raises `ToolError` when the file has fewer lines than `offset`.
    """
    path = tool_path(entry.path)
    lines = text.split("\n")
    lines = [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    if offset > max(len(lines), 1):
        raise ToolError(f"`offset` {offset} is behind the end of `{path}`, which has {len(lines)} lines.")
    part = _part(lines[offset - 1 :], limit, max_bytes)
    end_line = offset - 1 + part.line_count
    whole = TextFile(
        path=path,
        content_hash=entry.content_hash or "",
        size_bytes=entry.size_bytes,
        total_lines=len(lines),
        start_line=offset if lines else 0,
        end_line=end_line,
        content=part.text,
        is_readonly=entry.is_readonly,
    )
    if part.reason is None:
        return whole
    return TextFile(
        **{name: getattr(whole, name) for name in ("path", "content_hash", "size_bytes", "total_lines", "start_line")},
        end_line=end_line,
        content=part.text,
        is_readonly=entry.is_readonly,
        truncated=True,
        reason=part.reason,
        bytes_returned=len(part.text.encode()),
        bytes_total=entry.size_bytes,
        next_offset=end_line + 1 if end_line < len(lines) else None,
        resume_hint=_resume_hint(part, end_line, len(lines)),
    )


def _part(lines: list[str], limit: int, max_bytes: int) -> _Part:
    left = max_bytes
    for index, line in enumerate(lines[:limit]):
        left -= json_bytes(line) - 3  # the quotes, and what separates values
        if left < 0:
            if index == 0:
                return _Part(beginning(line, max_bytes), 1, "size_cap", is_line_cut=True)
            return _Part("".join(lines[:index]), index, "size_cap")
    shown = lines[:limit]
    return _Part("".join(shown), len(shown), "line_cap" if len(shown) < len(lines) else None)


def beginning(text: str, max_bytes: int) -> str:
    """As much of a text as has room in `max_bytes` of JSON."""
    shown = text[:max_bytes]
    while (size := json_bytes(shown)) > max_bytes:
        shown = shown[: max(0, min(len(shown) - 1, len(shown) * max_bytes // size))]
    return shown


def _resume_hint(part: _Part, end_line: int, total_lines: int) -> str:
    hints: list[str] = []
    if part.is_line_cut:
        hints.append(f"Only the beginning of line {end_line} is shown, which is too long for one result.")
    if end_line < total_lines:
        hints.append(f"Call read_file with `offset` {end_line + 1} to go on; the file has {total_lines} lines.")
    return " ".join(hints)
