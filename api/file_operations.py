"""What requests for files do alike, whatever tree the files are in: problems become errors that name the field."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote

from litestar import Response
from litestar.datastructures import ResponseHeader
from litestar.openapi import ResponseSpec

from api.file_bodies import GrepRequest
from api.problems import declared
from db.workspace_files import DatabaseFiles
from domain.errors import (
    AlreadyExists,
    Conflict,
    ContentChanged,
    EverrunsError,
    InputTooLarge,
    InvalidInput,
    NotFound,
    ReadOnlyResource,
)
from domain.workspace import (
    BadPath,
    BadPattern,
    DirectoryNotEmpty,
    Encoding,
    FileConflict,
    FileEntry,
    FileExists,
    FileMatch,
    FileMissing,
    FileProblem,
    FileReadOnly,
    FileTooLarge,
    NotThatKind,
)
from infra.text_patterns import compile_glob

ERRORS: Final[dict[type[FileProblem], type[EverrunsError]]] = {
    BadPath: InvalidInput,
    BadPattern: InvalidInput,
    DirectoryNotEmpty: Conflict,
    FileConflict: ContentChanged,
    FileExists: AlreadyExists,
    FileMissing: NotFound,
    FileReadOnly: ReadOnlyResource,
    FileTooLarge: InputTooLarge,
    NotThatKind: Conflict,
}

OCTET_STREAM: Final = "application/octet-stream"
DOWNLOAD_RESPONSES: Final = {
    200: ResponseSpec(bytes, description="The file's bytes", media_type=OCTET_STREAM, generate_examples=False),
    **declared(409),
}
DOWNLOAD_HEADERS: Final = [ResponseHeader(name="X-Content-Type-Options", value="nosniff")]


@contextlib.contextmanager
def problems(field: str) -> Iterator[None]:
    """What a file operation has against the request, as an error that names the field."""
    try:
        yield
    except FileProblem as problem:
        raise ERRORS.get(type(problem), InvalidInput)(str(problem), field=field) from None


@contextlib.contextmanager
def problems_of_write() -> Iterator[None]:
    with problems("path"):
        try:
            yield
        except FileTooLarge as problem:
            raise InputTooLarge(str(problem), field="content") from None
        except FileConflict as problem:
            raise ContentChanged(str(problem), field="expected_hash") from None


def file_content(content: str | None, encoding: Encoding | None) -> bytes:
    if content is None:
        raise InvalidInput("content is required", field="content")
    if encoding != "base64":
        return content.encode()
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("content is not valid base64", field="content") from None


def shown_content(content: bytes, encoding: Encoding) -> str:
    return base64.b64encode(content).decode() if encoding == "base64" else content.decode()


async def found_entry(files: DatabaseFiles, path: str) -> FileEntry:
    """Raises `NotFound`, naming the field."""
    with problems("path"):
        entry = await files.stat(path)
        if entry is None:
            raise FileMissing(f"There is no file or directory at {path[:120]!r}")
        return entry


async def found_matches(files: DatabaseFiles, data: GrepRequest) -> list[FileMatch]:
    if data.path_pattern:
        with problems("path_pattern"):
            compile_glob(data.path_pattern)
    with problems("pattern"):
        return await files.grep(data.pattern, path_pattern=data.path_pattern)


async def download(files: DatabaseFiles, path: str) -> Response[bytes]:
    """As an attachment of no particular type, whatever it is: agents write files, and a browser is not to run them."""
    with problems("path"):
        entry, content = await files.read(path)
    disposition = f"attachment; filename*=UTF-8''{quote(entry.name, safe='')}"
    return Response(content, media_type=OCTET_STREAM, headers={"Content-Disposition": disposition})
