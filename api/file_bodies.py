"""What requests for files of a workspace bring, and what they are answered."""

from __future__ import annotations

from msgspec import Struct

from domain.workspace import Encoding, FileMatch


class CreateFile(Struct, frozen=True, kw_only=True):
    """A file with `content`, or a directory. Parent directories are created."""

    content: str | None = None
    encoding: Encoding | None = None
    is_directory: bool | None = None
    is_readonly: bool | None = None


class UpdateFile(Struct, frozen=True, kw_only=True):
    """`content` replaces the file's, only if it has `expected_hash` when that is given. `is_readonly` alone (un)locks."""

    content: str | None = None
    encoding: Encoding | None = None
    is_readonly: bool | None = None
    expected_hash: str | None = None


class TwoPaths(Struct, frozen=True, kw_only=True):
    """`dst_path` is the new path itself, not a directory to put something into."""

    src_path: str
    dst_path: str


class GrepRequest(Struct, frozen=True, kw_only=True):
    """`pattern` is a regular expression in RE2 syntax, `path_pattern` a glob."""

    pattern: str
    path_pattern: str | None = None


class StatRequest(Struct, frozen=True, kw_only=True):
    path: str


class FileStat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    name: str
    is_directory: bool
    is_readonly: bool
    size_bytes: int
    created_at: str
    updated_at: str
    content_hash: str | None = None


class FileInfo(FileStat, frozen=True, kw_only=True, omit_defaults=True):
    """`session_id` is a UUID: the session's, or the workspace's where no session was named."""

    id: str
    session_id: str


class FileView(FileInfo, frozen=True, kw_only=True, omit_defaults=True):
    """`content` is missing for directories, and in answers that tell of a move or a copy."""

    content: str | None = None
    encoding: Encoding | None = None


class FileList(Struct, frozen=True, kw_only=True):
    data: list[FileInfo]


class DeletedFile(Struct, frozen=True, kw_only=True):
    deleted: bool


class GrepResult(Struct, frozen=True, kw_only=True):
    path: str
    matches: list[FileMatch]


class GrepResults(Struct, frozen=True, kw_only=True):
    data: list[GrepResult]
