"""`/v1/memories/{memory_id}/fs…`: what workspaces have, in the shapes that clients of memories read."""

from __future__ import annotations

from typing import Any

from litestar import Response, Router, delete, get, post, put
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import Struct

from api.file_bodies import GrepRequest, StatRequest
from api.file_operations import (
    DOWNLOAD_HEADERS,
    DOWNLOAD_RESPONSES,
    OCTET_STREAM,
    download,
    file_content,
    found_entry,
    found_matches,
    problems,
    problems_of_write,
    shown_content,
)
from api.problems import declared
from api.services import Services
from db.memories import get_memory, memory_files
from db.workspace_files import DatabaseFiles
from domain.errors import InvalidInput, NotFound, ReadOnlyResource
from domain.limits import FILE_BODY_MAX_BYTES
from domain.workspace import Encoding, FileEntry, StoredFile


class MemoryFileInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    is_directory: bool
    size_bytes: int
    created_at: str
    updated_at: str
    content_hash: str | None = None


class MemoryFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    path: str
    content: str
    encoding: Encoding
    size_bytes: int
    created_at: str
    updated_at: str
    content_hash: str | None = None


class MemoryFileList(Struct, frozen=True, kw_only=True):
    data: list[MemoryFileInfo]


class MemoryGrepResult(Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int


class MemoryGrepResults(Struct, frozen=True, kw_only=True):
    data: list[MemoryGrepResult]


class CreateMemoryFile(Struct, frozen=True, kw_only=True):
    """A file, empty without `content`, or a directory. Parent directories are created."""

    content: str | None = None
    encoding: Encoding | None = None
    is_directory: bool | None = None


class UpdateMemoryFile(Struct, frozen=True, kw_only=True):
    content: str | None = None
    encoding: Encoding | None = None


async def memory_tree(services: NamedDependency[Services], memory_id: FromPath[str]) -> DatabaseFiles:
    await get_memory(services.database, memory_id)
    return memory_files(services.database.pool, memory_id)


async def editable_memory_tree(services: NamedDependency[Services], memory_id: FromPath[str]) -> DatabaseFiles:
    memory = await get_memory(services.database, memory_id, editable=True)
    if memory.is_readonly:
        raise ReadOnlyResource("The files of this memory come from its source and cannot be changed here")
    return memory_files(services.database.pool, memory_id)


def _info(entry: FileEntry) -> MemoryFileInfo:
    return MemoryFileInfo(**_fields(entry), is_directory=entry.is_directory)


def _file(stored: StoredFile) -> MemoryFile:
    text = shown_content(stored.content, stored.encoding)
    return MemoryFile(**_fields(stored.entry), content=text, encoding=stored.encoding)


def _fields(entry: FileEntry) -> dict[str, Any]:
    names = ("path", "size_bytes", "created_at", "updated_at", "content_hash")
    return {name: getattr(entry, name) for name in names}


@get("/", operation_id="list_memory_root", summary="List the root of a memory", responses=declared())
async def list_root(tree: NamedDependency[DatabaseFiles], recursive: FromQuery[bool] = False) -> MemoryFileList:
    """Files and directories in the root, or with `recursive` all of them, in the order of their paths."""
    return MemoryFileList(data=[_info(entry) for entry in await tree.list(recursive=recursive)])


@get(
    "/{path:path}",
    operation_id="get_memory_file",
    summary="Read a file of a memory, or list a directory",
    responses=declared(),
)
async def get_file(
    tree: NamedDependency[DatabaseFiles], path: FromPath[str], recursive: FromQuery[bool] = False
) -> MemoryFile | MemoryFileList:
    """A file with its content, or what is in a directory."""
    with problems("path"):
        entry = await tree.stat(path)
        if entry is None or not entry.is_directory:
            return _file(await tree.read_stored(path))
        return MemoryFileList(data=[_info(one) for one in await tree.list(path, recursive=recursive)])


@post(
    "/{path:path}",
    operation_id="create_memory_file",
    summary="Create a file or a directory in a memory",
    request_max_body_size=FILE_BODY_MAX_BYTES,
    responses=declared(403, 409, 413),
)
async def create_file(
    editable_tree: NamedDependency[DatabaseFiles], path: FromPath[str], data: JSONBody[CreateMemoryFile]
) -> MemoryFileInfo:
    """Where there is nothing yet."""
    if data.is_directory:
        if data.content is not None:
            raise InvalidInput("A directory has no content", field="content")
        with problems("path"):
            return _info(await editable_tree.make_directory(path))
    content = file_content(data.content or "", data.encoding)
    with problems_of_write():
        entry, _ = await editable_tree.write(path, content, create_only=True, encoding=data.encoding or "text")
    return _info(entry)


@put(
    "/{path:path}",
    operation_id="update_memory_file",
    summary="Update a file of a memory",
    request_max_body_size=FILE_BODY_MAX_BYTES,
    responses=declared(403, 409, 413),
)
async def update_file(
    editable_tree: NamedDependency[DatabaseFiles], path: FromPath[str], data: JSONBody[UpdateMemoryFile]
) -> MemoryFile:
    """Replaces the content of a file that is there."""
    content, encoding = file_content(data.content, data.encoding), data.encoding or "text"
    with problems_of_write():
        entry, _ = await editable_tree.write(path, content, update_only=True, encoding=encoding)
    return _file(StoredFile(entry=entry, content=content, encoding=encoding))


@delete(
    "/{path:path}",
    operation_id="delete_memory_file",
    summary="Delete a file or a directory of a memory",
    responses=declared(403, 409),
)
async def delete_file(
    editable_tree: NamedDependency[DatabaseFiles], path: FromPath[str], recursive: FromQuery[bool] = False
) -> None:
    """A directory that is not empty needs `recursive`."""
    with problems("path"):
        if not await editable_tree.delete(path, recursive=recursive):
            raise NotFound(f"There is no file or directory at {path[:120]!r}", field="path")


@post(
    "/_/grep",
    operation_id="grep_memory_files",
    summary="Search the files of a memory",
    status_code=200,
    responses=declared(413),
)
async def grep_files(tree: NamedDependency[DatabaseFiles], data: JSONBody[GrepRequest]) -> MemoryGrepResults:
    """Files with a line that matches, in the order of their paths. Files that are not text are passed over."""
    matches = await found_matches(tree, data)
    sizes = {entry.path: entry.size_bytes for entry in await tree.list(recursive=True)}
    found = dict.fromkeys(match.path for match in matches)
    return MemoryGrepResults(
        data=[MemoryGrepResult(path=path, size_bytes=sizes[path]) for path in found if path in sizes]
    )


@post(
    "/_/stat",
    operation_id="stat_memory_file",
    summary="Get the metadata of a file of a memory",
    status_code=200,
    responses=declared(413),
)
async def stat_file(tree: NamedDependency[DatabaseFiles], data: JSONBody[StatRequest]) -> MemoryFileInfo:
    """Of a file or a directory, the root among them."""
    return _info(await found_entry(tree, data.path))


@get(
    "/_/download/{path:path}",
    operation_id="download_memory_file",
    summary="Download a file of a memory",
    media_type=OCTET_STREAM,
    responses=DOWNLOAD_RESPONSES,
    response_headers=DOWNLOAD_HEADERS,
)
async def download_file(tree: NamedDependency[DatabaseFiles], path: FromPath[str]) -> Response[bytes]:
    """As an attachment of no particular type, whatever it is."""
    return await download(tree, path)


router = Router(
    "/memories/{memory_id:str}/fs",
    tags=["Memory files"],
    dependencies={"tree": Provide(memory_tree), "editable_tree": Provide(editable_memory_tree)},
    route_handlers=[
        list_root,
        get_file,
        create_file,
        update_file,
        delete_file,
        grep_files,
        stat_file,
        download_file,
    ],
)
