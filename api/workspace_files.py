"""`/v1/workspaces/{workspace_id}/fs…`, and the same routes under `/v1/sessions/{session_id}/fs…` for the session's workspace.

One set of handlers under two routers. What they work on comes as a dependency: `tree` to read, `editable_tree` to change, which
an archived workspace is not; a session, though, goes on with the workspace it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from litestar import Response, Router, delete, get, post, put
from litestar.di import NamedDependency, Provide
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.types import Method
from litestar.types.internal_types import PathParameterDefinition

from api.file_bodies import (
    CreateFile,
    DeletedFile,
    FileInfo,
    FileList,
    FileStat,
    FileView,
    GrepRequest,
    GrepResult,
    GrepResults,
    StatRequest,
    TwoPaths,
    UpdateFile,
)
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
from db.sessions import require_session
from db.workspace_files import DatabaseFiles
from db.workspaces import get_workspace
from domain.ids import Prefix, parse_id
from domain.limits import FILE_BODY_MAX_BYTES
from domain.workspace import (
    Encoding,
    FileEntry,
    file_path,
)


@dataclass(frozen=True)
class Tree:
    """The files, and the UUID that stands for their owner in answers."""

    files: DatabaseFiles
    owner: str

    def info(self, entry: FileEntry) -> FileInfo:
        return FileInfo(id=entry.id, session_id=self.owner, **_stat_fields(entry))

    def view(self, entry: FileEntry, content: bytes | None = None, encoding: Encoding | None = None) -> FileView:
        text = None if content is None else shown_content(content, encoding or "text")
        return FileView(id=entry.id, session_id=self.owner, content=text, encoding=encoding, **_stat_fields(entry))


async def session_tree(services: NamedDependency[Services], session_id: FromPath[str]) -> Tree:
    key = await require_session(services.database, session_id)
    return Tree(DatabaseFiles.of_session(services.database.pool, session_id), str(key))


async def editable_session_tree(services: NamedDependency[Services], session_id: FromPath[str]) -> Tree:
    """Litestar takes a provider under one name only."""
    return await session_tree(services, session_id)


async def workspace_tree(services: NamedDependency[Services], workspace_id: FromPath[str]) -> Tree:
    await get_workspace(services.database, workspace_id)
    return _workspace(services, workspace_id)


async def editable_workspace_tree(services: NamedDependency[Services], workspace_id: FromPath[str]) -> Tree:
    await get_workspace(services.database, workspace_id, editable=True)
    return _workspace(services, workspace_id)


def _workspace(services: Services, workspace_id: str) -> Tree:
    files = DatabaseFiles.of_workspace(services.database.pool, workspace_id)
    return Tree(files, str(parse_id(Prefix.WORKSPACE, workspace_id)))


def _stat_fields(entry: FileEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in FileStat.__struct_fields__}


def operation(name: str) -> Callable[[HTTPRouteHandler, Method, list[str | PathParameterDefinition]], str]:
    """The published operation id for workspaces; sessions have their own."""

    def of(_handler: HTTPRouteHandler, _method: Method, components: list[str | PathParameterDefinition]) -> str:
        return f"session_{name}" if "sessions" in components else name

    return of


@get("/", operation_id=operation("get_root"), summary="List the root", responses=declared(409))
async def get_root(tree: NamedDependency[Tree], recursive: FromQuery[bool] = False) -> FileList:
    """Files and directories in the root, or with `recursive` all of them, in the order of their paths."""
    return FileList(data=[tree.info(entry) for entry in await tree.files.list(recursive=recursive)])


@get(
    "/{path:path}",
    operation_id=operation("get_path"),
    summary="Read a file or list a directory",
    responses=declared(409),
)
async def get_path(
    tree: NamedDependency[Tree], path: FromPath[str], recursive: FromQuery[bool] = False
) -> FileView | FileList:
    """A file with its content, or what is in a directory."""
    with problems("path"):
        entry = await tree.files.stat(path)
        if entry is None or not entry.is_directory:
            stored = await tree.files.read_stored(path)
            return tree.view(stored.entry, stored.content, stored.encoding)
        return FileList(data=[tree.info(one) for one in await tree.files.list(path, recursive=recursive)])


@post(
    "/{path:path}",
    operation_id=operation("create_path"),
    summary="Create a file or a directory",
    request_max_body_size=FILE_BODY_MAX_BYTES,
    responses=declared(403, 409, 413),
)
async def create_path(
    editable_tree: NamedDependency[Tree], path: FromPath[str], data: JSONBody[CreateFile]
) -> FileView:
    """Where there is nothing yet."""
    files = editable_tree.files
    if data.is_directory:
        with problems("path"):
            return editable_tree.view(await files.make_directory(path, is_readonly=bool(data.is_readonly)))
    content = file_content(data.content, data.encoding)
    with problems_of_write():
        entry, _ = await files.write(
            path, content, create_only=True, is_readonly=data.is_readonly, encoding=data.encoding or "text"
        )
    return editable_tree.view(entry, content, data.encoding or "text")


@put(
    "/{path:path}",
    operation_id=operation("update_path"),
    summary="Update a file",
    request_max_body_size=FILE_BODY_MAX_BYTES,
    responses=declared(403, 409, 413),
)
async def update_path(
    editable_tree: NamedDependency[Tree], path: FromPath[str], data: JSONBody[UpdateFile]
) -> FileView:
    """Replaces the content of a file that is there. With `is_readonly` and without `content` it locks or unlocks it."""
    files = editable_tree.files
    if data.content is None and data.is_readonly is not None:
        with problems("path"):
            return editable_tree.view(await files.set_readonly(path, is_readonly=data.is_readonly))
    content = file_content(data.content, data.encoding)
    with problems_of_write():
        entry, _ = await files.write(
            path,
            content,
            expected_hash=data.expected_hash,
            is_readonly=data.is_readonly,
            update_only=True,
            encoding=data.encoding or "text",
        )
    return editable_tree.view(entry, content, data.encoding or "text")


@delete(
    "/{path:path}",
    operation_id=operation("delete_path"),
    summary="Delete a file or a directory",
    status_code=200,
    responses=declared(403, 409),
)
async def delete_path(
    editable_tree: NamedDependency[Tree], path: FromPath[str], recursive: FromQuery[bool] = False
) -> DeletedFile:
    """A directory that is not empty needs `recursive`. `deleted` is false when there was nothing."""
    with problems("path"):
        return DeletedFile(deleted=await editable_tree.files.delete(path, recursive=recursive))


@post(
    "/_/move",
    operation_id=operation("move_file"),
    summary="Move a file or a directory",
    status_code=200,
    responses=declared(403, 409, 413),
)
async def move_file(editable_tree: NamedDependency[Tree], data: JSONBody[TwoPaths]) -> FileView:
    """A directory moves with everything in it. `dst_path` must be free; its parent directories are created."""
    _check_paths(data)
    with problems("dst_path"):
        return editable_tree.view(await editable_tree.files.move(data.src_path, data.dst_path))


@post(
    "/_/copy",
    operation_id=operation("copy_file"),
    summary="Copy a file or a directory",
    responses=declared(403, 409, 413),
)
async def copy_file(editable_tree: NamedDependency[Tree], data: JSONBody[TwoPaths]) -> FileView:
    """Like a move. Copies of read-only files can be written."""
    _check_paths(data)
    with problems("dst_path"):
        return editable_tree.view(await editable_tree.files.copy(data.src_path, data.dst_path))


@post(
    "/_/grep",
    operation_id=operation("grep_files"),
    summary="Search files",
    status_code=200,
    responses=declared(413),
)
async def grep_files(tree: NamedDependency[Tree], data: JSONBody[GrepRequest]) -> GrepResults:
    """Lines that match, by file, in the order of their paths; at most 1,000. Files that are not text are passed over."""
    by_file = groupby(await found_matches(tree.files, data), lambda match: match.path)
    return GrepResults(data=[GrepResult(path=path, matches=list(found)) for path, found in by_file])


@post(
    "/_/stat",
    operation_id=operation("stat_file"),
    summary="Get a file's metadata",
    status_code=200,
    responses=declared(413),
)
async def stat_file(tree: NamedDependency[Tree], data: JSONBody[StatRequest]) -> FileStat:
    """Of a file or a directory, the root among them."""
    return FileStat(**_stat_fields(await found_entry(tree.files, data.path)))


@get(
    "/_/download/{path:path}",
    operation_id=operation("download_path"),
    summary="Download a file",
    media_type=OCTET_STREAM,
    responses=DOWNLOAD_RESPONSES,
    response_headers=DOWNLOAD_HEADERS,
)
async def download_path(tree: NamedDependency[Tree], path: FromPath[str]) -> Response[bytes]:
    """As an attachment of no particular type, whatever it is: agents write files, and a browser is not to run them."""
    return await download(tree.files, path)


def _check_paths(data: TwoPaths) -> None:
    with problems("src_path"):
        file_path(data.src_path)
    with problems("dst_path"):
        file_path(data.dst_path)


HANDLERS: Final = [
    get_root,
    get_path,
    create_path,
    update_path,
    delete_path,
    move_file,
    copy_file,
    grep_files,
    stat_file,
    download_path,
]

session_router = Router(
    "/sessions/{session_id:str}/fs",
    tags=["Session files"],
    dependencies={"tree": Provide(session_tree), "editable_tree": Provide(editable_session_tree)},
    route_handlers=HANDLERS,
)
workspace_router = Router(
    "/workspaces/{workspace_id:str}/fs",
    tags=["Workspace files"],
    dependencies={"tree": Provide(workspace_tree), "editable_tree": Provide(editable_workspace_tree)},
    route_handlers=HANDLERS,
)
