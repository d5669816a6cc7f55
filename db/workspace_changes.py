"""Changes to the files of one workspace, within one transaction that holds the workspace's lock.

The lock is the workspace's row in `workspace_usage`, so writers queue up: what they check (hashes, limits, what stands at a path)
holds until they commit. Readers do not wait. Paths are normal here (`domain.workspace.normal_path`). What is replaced or deleted
goes into `workspace_history` by a trigger, whoever changes it, and from there when the history is too large.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, Self
from uuid import UUID

import asyncpg

from db import workspace_blobs, workspace_history
from domain.clock import timestamp
from domain.ids import uuid7
from domain.limits import FILE_MAX_BYTES, WORKSPACE_HISTORY_MAX_BYTES, WORKSPACE_MAX_BYTES, WORKSPACE_MAX_ENTRIES
from domain.workspace import (
    PATH_MAX_BYTES,
    BadPath,
    DirectoryNotEmpty,
    FileConflict,
    FileEntry,
    FileExists,
    FileMissing,
    FileReadOnly,
    FileTooLarge,
    NewFile,
    NotThatKind,
    Receipt,
    ReceiptTaken,
    parents,
    shown,
)

COLUMNS: Final = "id, path, is_directory, is_readonly, blob_hash, size_bytes, encoding, created_at, updated_at"

OPEN_USAGE: Final = "INSERT INTO workspace_usage (workspace_id) VALUES ($1) ON CONFLICT DO NOTHING"
# Its moment is that of all changes of the transaction; see the migration that made `workspace_history`.
LOCK_USAGE: Final = """UPDATE workspace_usage
    SET changed_at = greatest(clock_timestamp(), changed_at + interval '1 microsecond')
    WHERE workspace_id = $1 RETURNING size_bytes, entry_count, known_since"""
# With it goes what is too old to be gone back to.
WRITE_USAGE: Final = """
WITH gone AS (
    DELETE FROM workspace_history WHERE workspace_id = $1
        AND total <= (SELECT max(total) FROM workspace_history WHERE workspace_id = $1) - $4
    RETURNING blob_hash, until
), written AS (
    UPDATE workspace_usage SET size_bytes = $2, entry_count = $3,
        known_since = greatest(known_since, (SELECT max(until) FROM gone))
    WHERE workspace_id = $1
)
SELECT DISTINCT blob_hash FROM gone WHERE blob_hash IS NOT NULL
"""
COUNT: Final = """SELECT count(*) AS entries, coalesce(sum(size_bytes), 0)::bigint AS size_bytes
    FROM workspace_entries WHERE workspace_id = $1"""
FORGET_HISTORY: Final = "DELETE FROM workspace_history WHERE workspace_id = $1 RETURNING blob_hash"

ENTRIES_AT: Final = f"SELECT {COLUMNS} FROM workspace_entries WHERE workspace_id = $1 AND path = ANY($2::text[])"  # noqa: S608
ENTRIES_FROM: Final = f"""SELECT {COLUMNS} FROM workspace_entries
    WHERE workspace_id = $1 AND (path = $2 OR (path > $3 AND path < $4)) ORDER BY path"""  # noqa: S608
INSERT: Final = f"""
INSERT INTO workspace_entries (workspace_id, org_id, path, id, is_directory, is_readonly, blob_hash, size_bytes, encoding,
                               created_at, updated_at)
SELECT $1, $2, n.path, n.id, n.blob_hash IS NULL, n.is_readonly, n.blob_hash, n.size_bytes, n.encoding, n.moment, n.moment
FROM (SELECT *, clock_timestamp() AS moment
      FROM unnest($3::text[], $4::uuid[], $5::boolean[], $6::bytea[], $7::bigint[], $8::text[])
           AS given(path, id, is_readonly, blob_hash, size_bytes, encoding)) AS n
ON CONFLICT (workspace_id, path) DO UPDATE SET blob_hash = excluded.blob_hash, size_bytes = excluded.size_bytes,
    encoding = excluded.encoding, is_readonly = excluded.is_readonly, updated_at = excluded.updated_at
RETURNING {COLUMNS}
"""  # noqa: S608
DELETE: Final = "DELETE FROM workspace_entries WHERE workspace_id = $1 AND path = ANY($2::text[])"
MOVE: Final = (
    "UPDATE workspace_entries SET path = $3 || substr(path, $4) WHERE workspace_id = $1 AND path = ANY($2::text[])"
)
SET_READONLY: Final = f"""UPDATE workspace_entries SET is_readonly = $3, updated_at = clock_timestamp()
    WHERE workspace_id = $1 AND path = $2 RETURNING {COLUMNS}"""  # noqa: S608


def entry_of(row: asyncpg.Record) -> FileEntry:
    return FileEntry(
        id=str(row["id"]),
        path=row["path"],
        is_directory=row["is_directory"],
        is_readonly=row["is_readonly"],
        size_bytes=row["size_bytes"],
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
        content_hash=None if row["blob_hash"] is None else f"sha256:{row['blob_hash'].hex()}",
    )


_KEEP_RECEIPT: Final = """INSERT INTO workspace_receipts (workspace_id, key, text) VALUES ($1, $2, $3)
    ON CONFLICT DO NOTHING"""


def below(path: str) -> tuple[str, str]:
    """Everything below a directory is greater than the first and less than the second, in the order of bytes."""
    return ("/", "0") if path == "/" else (f"{path}/", f"{path}0")


class WorkspaceChanges:
    """Use `opened`. Every method raises a `FileProblem` before it changes anything."""

    def __init__(self, connection: asyncpg.Connection, workspace: UUID, org_id: int, usage: asyncpg.Record) -> None:
        self._connection = connection
        self._workspace = workspace
        self._org_id = org_id
        self._size_bytes: int = usage["size_bytes"]
        self._entry_count: int = usage["entry_count"]
        self._known_since: datetime | None = usage["known_since"]
        self._freed: set[bytes] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, connection: asyncpg.Connection, workspace: UUID, org_id: int) -> AsyncIterator[Self]:
        """Inside a transaction of the caller's, who commits right after it: see `workspace_blobs.release`."""
        usage = await connection.fetchrow(LOCK_USAGE, workspace)
        if usage is None:
            await connection.execute(OPEN_USAGE, workspace)
            usage = await connection.fetchrow(LOCK_USAGE, workspace)
        assert usage is not None
        changes = cls(connection, workspace, org_id, usage)
        yield changes
        forgotten = await connection.fetch(
            WRITE_USAGE, workspace, changes._size_bytes, changes._entry_count, WORKSPACE_HISTORY_MAX_BYTES
        )
        changes._freed.update(row["blob_hash"] for row in forgotten)
        await workspace_blobs.release(connection, org_id, changes._freed)

    async def keep_receipt(self, receipt: Receipt) -> None:
        """Raises `ReceiptTaken`."""
        kept = await self._connection.execute(_KEEP_RECEIPT, self._workspace, receipt.key, receipt.text)
        if kept == "INSERT 0 0":
            raise ReceiptTaken

    async def entry(self, path: str) -> asyncpg.Record | None:
        return (await self._at([path])).get(path)

    async def check_hashes(self, expected: Mapping[str, str | None]) -> None:
        """None stands for what must not be there. Raises `FileConflict`."""
        found = {path: entry_of(row) for path, row in (await self._at(expected)).items()}
        changed = [
            path
            for path, content_hash in sorted(expected.items())
            if (path in found) != (content_hash is not None)
            or (path in found and found[path].content_hash != content_hash)
        ]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise FileConflict(f"{shown(changed[0])}{more} changed in the meantime")

    async def existing(self, paths: Sequence[str]) -> set[str]:
        return set(await self._at(paths))

    async def put(self, files: Mapping[str, NewFile]) -> dict[str, FileEntry]:
        """Create or replace files, with their parent directories. To be called once."""
        found = await self._at({*files, *(parent for path in files for parent in parents(path))})
        directories = self._missing_parents(files, found)
        for path, file in files.items():
            _check_file(path, file, found.get(path))
            if path in directories:
                raise NotThatKind(f"{shown(path)} is to be a file, and there are to be files below it")
        replaced = [found[path] for path in files if path in found]
        self._claim(
            size_bytes=sum(len(file.content) for file in files.values()) - sum(row["size_bytes"] for row in replaced),
            entries=len(directories) + len(files) - len(replaced),
            path=next(iter(files), "/"),
        )
        await workspace_blobs.store(self._connection, self._org_id, [file.content for file in files.values()])
        await self._insert([(path, None) for path in directories])
        rows = await self._insert(list(files.items()))
        return {row["path"]: entry_of(row) for row in rows}

    async def make_directory(self, path: str, *, is_readonly: bool) -> FileEntry:
        found = await self._at([path, *parents(path)])
        if path in found:
            raise FileExists(f"{shown(path)} exists already")
        directories = self._missing_parents([path], found)
        self._claim(entries=len(directories) + 1, path=path)
        rows = await self._insert([*((one, None) for one in directories), (path, None)])
        if not is_readonly:
            return next(entry_of(row) for row in rows if row["path"] == path)
        return await self.set_readonly(path, is_readonly=True)

    async def set_readonly(self, path: str, *, is_readonly: bool) -> FileEntry:
        row = await self._connection.fetchrow(SET_READONLY, self._workspace, path, is_readonly)
        if row is None:
            raise missing(path)
        return entry_of(row)

    async def delete(self, paths: Iterable[str], *, recursive: bool) -> int:
        """How many of the paths there were. What is below them goes too."""
        wanted = list(dict.fromkeys(paths))
        found = await self._at({*wanted, *(parent for path in wanted for parent in parents(path))})
        there = [path for path in wanted if path in found]
        rows: dict[str, asyncpg.Record] = {}
        for path in sorted(there):
            if not found[path]["is_directory"]:
                rows[path] = found[path]
            elif path not in rows:
                inside = await self._from(path)
                if not recursive and len(inside) > 1:
                    raise DirectoryNotEmpty(f"The directory {shown(path)} is not empty; delete it recursively")
                rows.update((row["path"], row) for row in inside)
        _check_not_readonly([*(found[one] for path in there for one in parents(path)), *rows.values()])
        await self._remove(list(rows.values()))
        return len(there)

    async def delete_everything(self) -> None:
        """Read-only files too, and what they were before: for when the workspace itself goes."""
        await self._remove(await self._from("/"))
        rows = await self._connection.fetch(FORGET_HISTORY, self._workspace)
        self._freed.update(row["blob_hash"] for row in rows if row["blob_hash"] is not None)

    async def restore(self, moment: datetime) -> None:
        """Make everything what it was at a moment of the past, read-only files too. Raises `HistoryGone`."""
        workspace_history.check_known(self._known_since, moment)
        await workspace_history.restore(self._connection, self._workspace, moment)
        counted = await self._connection.fetchrow(COUNT, self._workspace)
        assert counted is not None
        self._size_bytes, self._entry_count = counted["size_bytes"], counted["entries"]

    async def _remove(self, rows: Sequence[asyncpg.Record]) -> None:
        await self._connection.execute(DELETE, self._workspace, [row["path"] for row in rows])
        self._size_bytes -= sum(row["size_bytes"] for row in rows)
        self._entry_count -= len(rows)

    async def move(self, source: str, target: str) -> FileEntry:
        rows, directories = await self._transfer(source, target)
        above = await self._at(parents(source))
        _check_not_readonly([*above.values(), *rows])
        self._claim(entries=len(directories), path=target)
        await self._insert([(path, None) for path in directories])
        await self._connection.execute(MOVE, self._workspace, [row["path"] for row in rows], target, len(source) + 1)
        row = await self.entry(target)
        assert row is not None
        return entry_of(row)

    async def copy(self, source: str, target: str) -> FileEntry:
        rows, directories = await self._transfer(source, target)
        self._claim(
            size_bytes=sum(row["size_bytes"] for row in rows), entries=len(directories) + len(rows), path=target
        )
        await self._insert([(path, None) for path in directories])
        await self._insert_rows(
            [
                (target + row["path"][len(source) :], False, row["blob_hash"], row["size_bytes"], row["encoding"])
                for row in rows
            ]
        )
        row = await self.entry(target)
        assert row is not None
        return entry_of(row)

    async def _transfer(self, source: str, target: str) -> tuple[list[asyncpg.Record], list[str]]:
        """What stands at and below the source, and the directories that the target needs."""
        rows = await self._from(source)
        if not rows:
            raise missing(source)
        if target == source or target.startswith(f"{source}/"):
            raise BadPath(f"{shown(source)} cannot be put into itself, at {shown(target)}")
        found = await self._at([target, *parents(target)])
        if target in found:
            raise FileExists(f"{shown(target)} exists already; name a path that is free")
        longest = max(len(row["path"].encode()) for row in rows)
        if longest - len(source.encode()) + len(target.encode()) > PATH_MAX_BYTES:
            raise BadPath(f"Below {shown(target)} a path would be longer than {PATH_MAX_BYTES} bytes")
        return rows, self._missing_parents([target], found)

    def _missing_parents(self, paths: Iterable[str], found: Mapping[str, asyncpg.Record]) -> list[str]:
        """Directories that are to be made for these paths, outermost first."""
        absent: dict[str, None] = {}
        for path in paths:
            for parent in parents(path):
                row = found.get(parent)
                if row is None:
                    absent[parent] = None
                    continue
                if not row["is_directory"]:
                    raise NotThatKind(f"{shown(parent)} is a file, so there can be nothing below it")
                _check_not_readonly([row])
        return sorted(absent)

    def _claim(self, *, entries: int, path: str, size_bytes: int = 0) -> None:
        if entries > 0 and self._entry_count + entries > WORKSPACE_MAX_ENTRIES:
            raise FileTooLarge(
                f"With {shown(path)} the workspace would hold {self._entry_count + entries:,} files and directories; "
                f"{WORKSPACE_MAX_ENTRIES:,} are allowed"
            )
        if size_bytes > 0 and self._size_bytes + size_bytes > WORKSPACE_MAX_BYTES:
            raise FileTooLarge(
                f"With {shown(path)} the workspace would hold {self._size_bytes + size_bytes:,} bytes; "
                f"{WORKSPACE_MAX_BYTES:,} are allowed. Delete what is not needed"
            )
        self._entry_count += entries
        self._size_bytes += size_bytes

    async def _at(self, paths: Iterable[str]) -> dict[str, asyncpg.Record]:
        rows = await self._connection.fetch(ENTRIES_AT, self._workspace, list(paths))
        return {row["path"]: row for row in rows}

    async def _from(self, path: str) -> list[asyncpg.Record]:
        return await self._connection.fetch(ENTRIES_FROM, self._workspace, path, *below(path))

    async def _insert(self, items: Sequence[tuple[str, NewFile | None]]) -> list[asyncpg.Record]:
        """Files, and directories where there is None."""
        return await self._insert_rows(
            [
                (path, False, None, 0, "text")
                if file is None
                else (path, file.is_readonly, workspace_blobs.hash_of(file.content), len(file.content), file.encoding)
                for path, file in items
            ]
        )

    async def _insert_rows(self, rows: Sequence[tuple[str, bool, bytes | None, int, str]]) -> list[asyncpg.Record]:
        if not rows:
            return []
        columns = [list(column) for column in zip(*rows, strict=True)]
        ids = [uuid7() for _ in rows]
        return await self._connection.fetch(INSERT, self._workspace, self._org_id, columns[0], ids, *columns[1:])


def _check_not_readonly(rows: Iterable[asyncpg.Record]) -> None:
    held = next((row for row in rows if row["is_readonly"]), None)
    if held is None:
        return
    if held["is_directory"]:
        raise FileReadOnly(f"The directory {shown(held['path'])} is read-only, and so is everything in it")
    raise FileReadOnly(f"{shown(held['path'])} is read-only")


def missing(path: str) -> FileMissing:
    return FileMissing(f"There is no file or directory {shown(path)}")


def _check_file(path: str, file: NewFile, there: asyncpg.Record | None) -> None:
    if len(file.content) > FILE_MAX_BYTES:
        raise FileTooLarge(f"{shown(path)} would have {len(file.content):,} bytes; a file may have {FILE_MAX_BYTES:,}")
    if there is None:
        return
    if there["is_directory"]:
        raise NotThatKind(f"{shown(path)} is a directory")
    if there["is_readonly"]:
        raise FileReadOnly(f"{shown(path)} is read-only")
