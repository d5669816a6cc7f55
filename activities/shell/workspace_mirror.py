"""The workspace in a shell's memory, and what the shell has changed back in the workspace: all of it or nothing.

Everything is copied at the beginning. bashkit can ask for files as they are needed, but only for texts, and it holds 100 MB at
most anyway. What it cannot hold (a few names, the largest files) is left out, told to the model, and never taken for deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from activities.shell.script_run import CHANGED_MAX_BYTES, Report
from domain.workspace import (
    ROOT,
    BadPath,
    DirectoryNotEmpty,
    FileEntry,
    FileExists,
    FileMissing,
    FileProblem,
    FileReadOnly,
    FileTooLarge,
    NotThatKind,
    Receipt,
    WorkspaceFiles,
    file_path,
    parents,
    shown,
)

BATCH_MAX_BYTES: Final = 8 * 1024 * 1024
BATCH_MAX_FILES: Final = 200


class WorkspaceMirror:
    """Use `opened`; then `files` once, and `write_back` once."""

    def __init__(self, files: WorkspaceFiles, entries: Sequence[FileEntry]) -> None:
        self._files = files
        self._entries = [entry for entry in entries if not entry.is_directory]
        self._directories = {entry.path for entry in entries if entry.is_directory}
        self._copied: dict[str, str | None] = {}

    @classmethod
    async def opened(cls, files: WorkspaceFiles) -> WorkspaceMirror:
        return cls(files, await files.list("/", recursive=True))

    @property
    def directories(self) -> list[str]:
        return [ROOT + path for path in sorted(self._directories)]

    async def contents(self) -> AsyncIterator[tuple[str, bytes]]:
        """A file that has gone meanwhile is left out; one that has changed is copied as it is now."""
        for batch in _batches(self._entries):
            for entry, content in await self._files.read_many([entry.path for entry in batch]):
                self._copied[entry.path] = entry.content_hash
                yield ROOT + entry.path, content

    async def write_back(
        self, report: Report, contents: dict[str, bytes], receipt: Receipt
    ) -> list[tuple[FileEntry, bool]]:
        """What was written, and whether it is new. Raises `FileProblem` and `ReceiptTaken`; then nothing has changed.

        A run that changes no file leaves no receipt: it can be run again.
        """
        if report.is_root_replaced:
            raise NotThatKind(f"`{ROOT}` is no directory any more")
        if report.is_too_much:
            raise FileTooLarge(f"It is more than {CHANGED_MAX_BYTES:,} bytes in one run")
        for path in report.unseen:
            self._copied.pop(_inner(path), None)
        written = self._written(contents)
        replaced = [path for path in map(_inner, report.removed_directories) if path in written]
        deleted = [_inner(path) for path in report.deleted]
        expected = {path: self._copied.get(path) for path in written if path not in replaced}
        expected |= {path: self._copied[path] for path in deleted}
        if not written and not deleted:
            return []
        entries = await self._files.apply(written, [*deleted, *replaced], expected=expected, receipt=receipt)
        return [(entry, entry.path not in self._copied) for entry in entries]

    async def write_back_directories(self, report: Report) -> list[str]:
        """Those without files, one by one: what others have put in meanwhile stays. Returns the shell's paths that failed."""
        with_files = {one for path in report.written for one in parents(_inner(path))}
        failed: list[str] = []
        for path in report.made_directories:
            try:
                if _inner(path) not in with_files:
                    await self._files.make_directory(path)
            except FileExists:
                continue
            except FileProblem:
                failed.append(path)
        written = set(report.written)
        for path in sorted(report.removed_directories, key=len, reverse=True):
            try:
                if path not in written:
                    await self._files.delete(_inner(path))
            except (DirectoryNotEmpty, FileMissing):
                continue
            except FileReadOnly:
                failed.append(path)
        return failed

    def _written(self, contents: dict[str, bytes]) -> dict[str, bytes]:
        written: dict[str, bytes] = {}
        for path, content in contents.items():
            # With the root: below it, a directory `workspace` would be taken for the root itself.
            normal = file_path(path)
            # To a shell the two ways to write an accent are two names.
            if normal in written or (normal != _inner(path) and normal in self._copied):
                raise BadPath(f"There are two files whose names are both written {shown(normal)}")
            written[normal] = content
        return written


def _inner(path: str) -> str:
    return path.removeprefix(ROOT)


def _batches(entries: Sequence[FileEntry]) -> Iterator[list[FileEntry]]:
    batch: list[FileEntry] = []
    size_bytes = 0
    for entry in entries:
        if batch and (size_bytes + entry.size_bytes > BATCH_MAX_BYTES or len(batch) == BATCH_MAX_FILES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(entry)
        size_bytes += entry.size_bytes
    if batch:
        yield batch
