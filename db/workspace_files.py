"""The files of a workspace in PostgreSQL: the port `domain.workspace.WorkspaceFiles`, for tools and for the API.

Entries (`workspace_entries`) have paths and refer to content by its hash (`workspace_blobs`), so copying a file, a directory or a
whole workspace copies no content. Changes are in `db.workspace_changes`, searching in `db.workspace_search`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Self
from uuid import UUID

import asyncpg

from db import workspace_search
from db.workspace_changes import COLUMNS, WorkspaceChanges, below, entry_of, missing
from domain.clock import timestamp
from domain.ids import Prefix, parse_id
from domain.workspace import (
    Encoding,
    FileConflict,
    FileEntry,
    FileExists,
    FileMatch,
    FileMissing,
    NewFile,
    NotThatKind,
    Receipt,
    StoredFile,
    file_path,
    normal_path,
    shown,
)

OF_SESSION: Final = """SELECT w.id, w.org_id, w.created_at, w.updated_at FROM workspaces w
    JOIN sessions s ON s.workspace_id = w.id WHERE s.id = $1 AND s.deleted_at IS NULL"""
OF_WORKSPACE: Final = "SELECT id, org_id, created_at, updated_at FROM workspaces WHERE id = $1 AND status <> 'deleted'"

STAT: Final = f"SELECT {COLUMNS} FROM workspace_entries WHERE workspace_id = $1 AND path = $2"  # noqa: S608
LIST: Final = f"""SELECT {COLUMNS} FROM workspace_entries WHERE workspace_id = $1 AND path > $2 AND path < $3
    AND ($4 OR position('/' IN substr(path, length($2) + 1)) = 0) ORDER BY path"""  # noqa: S608
READ: Final = """SELECT e.*, b.content, b.is_text FROM workspace_entries e
    LEFT JOIN workspace_blobs b ON b.org_id = e.org_id AND b.hash = e.blob_hash
    WHERE e.workspace_id = $1 AND e.path = $2"""

READ_MANY: Final = """SELECT e.*, b.content FROM workspace_entries e
    JOIN workspace_blobs b ON b.org_id = e.org_id AND b.hash = e.blob_hash
    WHERE e.workspace_id = $1 AND e.path = ANY($2::text[]) ORDER BY e.path"""

_RECEIPT: Final = "SELECT text FROM workspace_receipts WHERE workspace_id = $1 AND key = $2"


class DatabaseFiles:
    """Use `of_session` or `of_workspace`. Whether the caller may is checked before; tools go on in an archived workspace."""

    def __init__(self, pool: asyncpg.Pool, query: str, key: UUID) -> None:
        self._pool = pool
        self._query = query
        self._key = key
        self._row: asyncpg.Record | None = None

    @classmethod
    def of_session(cls, pool: asyncpg.Pool, session_id: str) -> Self:
        return cls(pool, OF_SESSION, parse_id(Prefix.SESSION, session_id))

    @classmethod
    def of_workspace(cls, pool: asyncpg.Pool, workspace_id: str) -> Self:
        return cls(pool, OF_WORKSPACE, parse_id(Prefix.WORKSPACE, workspace_id))

    async def stat(self, path: str) -> FileEntry | None:
        normal = normal_path(path)
        async with self._reading() as (connection, workspace):
            return await _stat(connection, workspace, normal)

    async def list(self, path: str = "/", *, recursive: bool = False) -> list[FileEntry]:
        normal = normal_path(path)
        async with self._reading() as (connection, workspace):
            entry = await _stat(connection, workspace, normal)
            if entry is None:
                raise missing(normal)
            if not entry.is_directory:
                raise NotThatKind(f"{shown(normal)} is a file; only directories can be listed")
            return [entry_of(row) for row in await connection.fetch(LIST, workspace["id"], *below(normal), recursive)]

    async def read(self, path: str) -> tuple[FileEntry, bytes]:
        stored = await self.read_stored(path)
        return stored.entry, stored.content

    async def read_many(self, paths: Sequence[str]) -> list[tuple[FileEntry, bytes]]:
        normal = [normal_path(path) for path in paths]
        async with self._reading() as (connection, workspace):
            rows = await connection.fetch(READ_MANY, workspace["id"], normal)
        return [(entry_of(row), row["content"]) for row in rows]

    async def read_stored(self, path: str) -> StoredFile:
        normal = normal_path(path)
        async with self._reading() as (connection, workspace):
            row = await connection.fetchrow(READ, workspace["id"], normal)
        if normal == "/" or (row is not None and row["is_directory"]):
            raise NotThatKind(f"{shown(normal)} is a directory; only files can be read")
        if row is None:
            raise missing(normal)
        # NUL is no text to a search, but JSON can show it.
        showable = row["is_text"] or _is_utf8(row["content"])
        return StoredFile(
            entry=entry_of(row), content=row["content"], encoding=row["encoding"] if showable else "base64"
        )

    async def write(
        self,
        path: str,
        content: bytes,
        *,
        expected_hash: str | None = None,
        create_only: bool = False,
        is_readonly: bool | None = None,
        update_only: bool = False,
        encoding: Encoding = "text",
    ) -> tuple[FileEntry, bool]:
        """`update_only` raises `FileMissing` instead of creating; `encoding` is how clients want to see the file."""
        normal = file_path(path)
        async with self._changing() as changes:
            there = await changes.entry(normal)
            if create_only and there is not None:
                raise FileExists(f"{shown(normal)} exists already")
            if there is None and (update_only or expected_hash is not None):
                raise missing(normal)
            if there is not None and expected_hash is not None and not there["is_directory"]:
                actual = entry_of(there).content_hash
                if actual != expected_hash:
                    raise FileConflict(f"{shown(normal)} has changed since it was read; its hash is {actual} now")
            file = NewFile(content=content, encoding=encoding, is_readonly=bool(is_readonly))
            return (await changes.put({normal: file}))[normal], there is None

    async def make_directory(self, path: str, *, is_readonly: bool = False) -> FileEntry:
        """Nothing in a read-only directory can be created, changed or deleted."""
        normal = file_path(path)
        async with self._changing() as changes:
            return await changes.make_directory(normal, is_readonly=is_readonly)

    async def set_readonly(self, path: str, *, is_readonly: bool) -> FileEntry:
        """For people, not for tools: it is what takes the protection away."""
        normal = file_path(path)
        async with self._changing() as changes:
            return await changes.set_readonly(normal, is_readonly=is_readonly)

    async def delete(self, path: str, *, recursive: bool = False) -> bool:
        normal = file_path(path)
        async with self._changing() as changes:
            return await changes.delete([normal], recursive=recursive) > 0

    async def move(self, source: str, target: str) -> FileEntry:
        from_path, to_path = file_path(source), file_path(target)
        async with self._changing() as changes:
            return await changes.move(from_path, to_path)

    async def copy(self, source: str, target: str) -> FileEntry:
        from_path, to_path = file_path(source), file_path(target)
        async with self._changing() as changes:
            return await changes.copy(from_path, to_path)

    async def grep(self, pattern: str, *, path: str = "/", path_pattern: str | None = None) -> list[FileMatch]:
        normal = normal_path(path)
        async with self._reading() as (connection, workspace):
            if await _stat(connection, workspace, normal) is None:
                raise missing(normal)
        return await workspace_search.grep(
            self._pool, workspace["org_id"], workspace["id"], pattern, normal, path_pattern
        )

    async def apply(
        self,
        written: Mapping[str, bytes],
        deleted: Sequence[str],
        *,
        expected: Mapping[str, str | None] | None = None,
        receipt: Receipt | None = None,
    ) -> list[FileEntry]:
        files = {file_path(path): NewFile(content=content) for path, content in written.items()}
        gone = [file_path(path) for path in deleted]
        async with self._changing() as changes:
            if receipt is not None:
                await changes.keep_receipt(receipt)
            await changes.check_hashes(
                {file_path(path): content_hash for path, content_hash in (expected or {}).items()}
            )
            await changes.delete(gone, recursive=True)
            entries = await changes.put(files)
            return [entries[path] for path in files]

    async def receipt(self, key: str) -> str | None:
        async with self._reading() as (connection, workspace):
            return await connection.fetchval(_RECEIPT, workspace["id"], key)

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[tuple[asyncpg.Connection, asyncpg.Record]]:
        async with self._pool.acquire() as connection:
            yield connection, await self._workspace(connection)  # type: ignore[misc]  # asyncpg's proxy

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[WorkspaceChanges]:
        async with self._pool.acquire() as connection, connection.transaction():
            workspace = await self._workspace(connection)  # type: ignore[arg-type]
            async with WorkspaceChanges.opened(connection, workspace["id"], workspace["org_id"]) as changes:  # type: ignore[arg-type]
                # Once more, behind the lock: while we waited for it, everything may have been cleared away for good.
                self._row = None
                await self._workspace(connection)  # type: ignore[arg-type]
                yield changes

    async def _workspace(self, connection: asyncpg.Connection) -> asyncpg.Record:
        if self._row is None:
            self._row = await connection.fetchrow(self._query, self._key)
            if self._row is None:
                raise FileMissing("There is no such workspace; it, or the session it belongs to, was deleted")
        return self._row


async def _stat(connection: asyncpg.Connection, workspace: asyncpg.Record, path: str) -> FileEntry | None:
    if path == "/":
        return FileEntry(
            id=str(workspace["id"]),
            path="/",
            is_directory=True,
            is_readonly=False,
            size_bytes=0,
            created_at=timestamp(workspace["created_at"]),
            updated_at=timestamp(workspace["updated_at"]),
        )
    row = await connection.fetchrow(STAT, workspace["id"], path)
    return None if row is None else entry_of(row)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
