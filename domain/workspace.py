"""Workspaces: the files of a session, which several sessions may share. The port through which tools reach them.

Paths are absolute in the workspace (`/notes/today.md`); tools and people may write them under `/workspace`, which is the same
place. `normal_path` is the only way in: it refuses what could mean a place outside, and what no file system of ours can hold.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final, Literal, Protocol

from msgspec import Struct

ROOT: Final = "/workspace"

PATH_MAX_BYTES: Final = 1024
SEGMENT_MAX_BYTES: Final = 255
"""What common file systems take for one name."""

ACTIONS: Final = "_"
"""First segment of the API's action routes (`/fs/_/move`): a file below it could not be reached over the API."""

_SHOWN_CHARACTERS: Final = 120
_BIDIRECTIONAL: Final = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, lone surrogates (which have no place in UTF-8), line and paragraph separators."""


class FileEntry(Struct, frozen=True, kw_only=True):
    """A file or a directory. `content_hash` is `sha256:` and 64 hex digits, and None for a directory. Times are RFC 3339."""

    id: str
    path: str
    is_directory: bool
    is_readonly: bool
    size_bytes: int
    created_at: str
    updated_at: str
    content_hash: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


Encoding = Literal["text", "base64"]


class NewFile(Struct, frozen=True, kw_only=True):
    """Content to be stored. `encoding` is how it was handed over, and how it will be shown if it can be."""

    content: bytes
    encoding: Encoding = "text"
    is_readonly: bool = False


class StoredFile(Struct, frozen=True, kw_only=True):
    """A file with its content; `encoding` is the form it is to be shown in. What is not UTF-8 is base64 in any case."""

    entry: FileEntry
    content: bytes
    encoding: Encoding


class Receipt(Struct, frozen=True, kw_only=True):
    """Proof that changes were made, for whoever retries them: `key` is theirs in this workspace, `text` is kept for them."""

    key: str
    text: str


class ReceiptTaken(Exception):
    """The changes of this receipt were made before"""


class FileProblem(Exception):
    """A file operation that cannot be done; the text names the path and says what to do, and is fit for a model to read."""


class FileMissing(FileProblem):
    """There is no such file or directory"""


class FileExists(FileProblem):
    """Something is there already"""


class FileReadOnly(FileProblem):
    """The file, or one below the directory, is read-only"""


class FileConflict(FileProblem):
    """The file is not what the caller has seen: its hash differs"""


class FileTooLarge(FileProblem):
    """The file, or the workspace with it, would be larger than allowed"""


class NotThatKind(FileProblem):
    """There is a directory where a file is needed, or a file where a directory is needed"""


class DirectoryNotEmpty(FileProblem):
    """The directory is not empty, and may only be deleted with what is in it"""


class BadPath(FileProblem):
    """The path cannot be the name of a file"""


class BadPattern(FileProblem):
    """The regular expression or the glob cannot be used"""


def normal_path(path: str) -> str:
    """The one spelling of a path: absolute, without `/workspace`, in NFC, without `.` segments or a slash at its end.

    A path without a slash at its beginning is relative to the root. So that every normal path is its own normal form, nothing in
    the root may be called `workspace`. Letters are told apart by case, and look-alikes of `/` and `.` are ordinary characters:
    NFC keeps them as they are. Raises `BadPath`.
    """
    if len(path) > PATH_MAX_BYTES * 2 or len(path.encode("utf-8", "replace")) > PATH_MAX_BYTES * 2:
        raise _bad_path(path, f"is too long; {PATH_MAX_BYTES} bytes are allowed")
    text = unicodedata.normalize("NFC", path)
    if any(one in _BIDIRECTIONAL or unicodedata.category(one) in _REFUSED_CATEGORIES for one in text):
        raise _bad_path(path, "contains a control character")
    segments = [segment for segment in _segments(path, text) if segment != "."]
    if segments and segments[0] == ROOT[1:]:
        del segments[0]
    _check_first(path, segments)
    for segment in segments:
        if len(segment.encode()) > SEGMENT_MAX_BYTES:
            raise _bad_path(path, f"has a name that is too long; {SEGMENT_MAX_BYTES} bytes are allowed")
    normal = "/" + "/".join(segments)
    if len(normal.encode()) > PATH_MAX_BYTES:
        raise _bad_path(path, f"is too long; {PATH_MAX_BYTES} bytes are allowed")
    return normal


def file_path(path: str) -> str:
    """`normal_path` of something that is not the root. Raises `BadPath`."""
    normal = normal_path(path)
    if normal == "/":
        raise _bad_path(path, "is the root of the workspace; name a file or a directory in it")
    return normal


def parents(path: str) -> list[str]:
    """The directories above a normal path, outermost first, without the root."""
    segments = path.split("/")[1:-1]
    return ["/" + "/".join(segments[: depth + 1]) for depth in range(len(segments))]


def _segments(path: str, text: str) -> list[str]:
    inner = text.removeprefix("/").removesuffix("/")
    if not inner:
        if text not in ("", "/"):
            raise _bad_path(path, "has an empty segment")
        return []
    segments = inner.split("/")
    if "" in segments:
        raise _bad_path(path, "has an empty segment")
    if ".." in segments:
        raise _bad_path(path, "contains `..`; write the path from the root of the workspace")
    return segments


def _check_first(path: str, segments: Sequence[str]) -> None:
    if segments and segments[0] == ROOT[1:]:
        raise _bad_path(path, f"names something called `{ROOT[1:]}` in the root; that name stands for the root itself")
    if segments and segments[0] == ACTIONS:
        raise _bad_path(path, f"begins with `/{ACTIONS}`, which is reserved")


def _bad_path(path: str, why: str) -> BadPath:
    return BadPath(f"The path {shown(path)} {why}")


def shown(path: str) -> str:
    """A path as it may stand in a message: not too long, and without characters that would break it."""
    cut = path if len(path) <= _SHOWN_CHARACTERS else path[:_SHOWN_CHARACTERS] + "…"
    return "`" + "".join(one if one.isprintable() else "�" for one in cut) + "`"


class FileMatch(Struct, frozen=True, kw_only=True):
    """A line found by `grep`; `line_number` counts from 1."""

    path: str
    line_number: int
    line: str


class WorkspaceFiles(Protocol):
    """The files of one workspace. Every method is one transaction and raises a `FileProblem` that says what is wrong."""

    async def stat(self, path: str) -> FileEntry | None: ...

    async def list(self, path: str = "/", *, recursive: bool = False) -> list[FileEntry]:
        """Children of a directory in the order of their paths, or everything below it."""
        ...

    async def read(self, path: str) -> tuple[FileEntry, bytes]: ...

    async def read_many(self, paths: Sequence[str]) -> list[tuple[FileEntry, bytes]]:
        """All of them in memory at once, in the order of their paths. What is no file is left out."""
        ...

    async def write(
        self,
        path: str,
        content: bytes,
        *,
        expected_hash: str | None = None,
        create_only: bool = False,
        is_readonly: bool | None = None,
    ) -> tuple[FileEntry, bool]:
        """Create or replace a file, with its parent directories; the second value tells whether it is new.

        With `expected_hash` only what the caller has seen is replaced. A file that is read-only, or stands below a read-only
        directory, is refused.
        """
        ...

    async def make_directory(self, path: str) -> FileEntry:
        """With its parent directories. Raises `FileExists` when there is something already."""
        ...

    async def delete(self, path: str, *, recursive: bool = False) -> bool:
        """Whether there was something to delete. A directory that is not empty needs `recursive` (`DirectoryNotEmpty`)."""
        ...

    async def move(self, source: str, target: str) -> FileEntry:
        """Give a file or a directory another path, whole and free: `target` is not the directory to put it into."""
        ...

    async def copy(self, source: str, target: str) -> FileEntry:
        """Like `move`. The copies of read-only files can be written."""
        ...

    async def grep(self, pattern: str, *, path: str = "/", path_pattern: str | None = None) -> list[FileMatch]:
        """Lines that match a regular expression, in text files at or below `path` whose path matches `path_pattern`.

        RE2 syntax: no look-around, no back-references. A glob without a slash is matched against names, one with a slash
        against whole paths; `**` crosses directories. What is found is cut at the limits in `domain.limits`. Raises
        `BadPattern`.
        """
        ...

    async def apply(
        self,
        written: Mapping[str, bytes],
        deleted: Sequence[str],
        *,
        expected: Mapping[str, str | None] | None = None,
        receipt: Receipt | None = None,
    ) -> list[FileEntry]:
        """Many changes at once or none; what a shell left behind. Returns the entries that were written.

        With a `receipt` the changes are made once: it is stored with them, and refused (`ReceiptTaken`) when it is there already.

        Deletes first, directories with what is in them; what is not there any more is no problem. `expected` holds the hashes
        that files must have for that, with None for what must not be there; otherwise `FileConflict`.
        """
        ...

    async def receipt(self, key: str) -> str | None:
        """The text of a receipt that was stored with changes; None when they were not made."""
        ...
