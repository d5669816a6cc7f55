"""`grep` over the files of a workspace.

Content is read in batches of bounded size, one after the other, and matched in a thread: the event loop goes on, and neither many
files nor large ones are in memory at once. A search that takes too long fails with a text that says what to do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from uuid import UUID

import asyncpg

from db.workspace_changes import below
from domain.limits import GREP_LINE_MAX_CHARACTERS, GREP_MAX_MATCHES, GREP_MAX_SECONDS
from domain.workspace import BadPattern, FileMatch
from infra.text_patterns import Pattern, compile_glob, compile_line_pattern, matching_lines

BATCH_MAX_BYTES: Final = 16 * 1024 * 1024
BATCH_MAX_FILES: Final = 500

CANDIDATES: Final = """
SELECT e.path, e.blob_hash, e.size_bytes FROM workspace_entries e
JOIN workspace_blobs b ON b.org_id = e.org_id AND b.hash = e.blob_hash
WHERE e.workspace_id = $1 AND (e.path = $2 OR (e.path > $3 AND e.path < $4)) AND b.is_text ORDER BY e.path
"""
CONTENTS: Final = "SELECT hash, content FROM workspace_blobs WHERE org_id = $1 AND hash = ANY($2::bytea[])"


async def grep(
    pool: asyncpg.Pool, org_id: int, workspace: UUID, pattern: str, path: str, path_pattern: str | None
) -> list[FileMatch]:
    """`path` is normal. Raises `BadPattern`.

    No connection is held while matching. Files are found as they were when the search began; one whose content is gone by the
    time it would be read is passed over.
    """
    compiled = compile_line_pattern(pattern)
    wanted = compile_glob(path_pattern) if path_pattern else None
    candidates = await pool.fetch(CANDIDATES, workspace, path, *below(path))
    if wanted is not None:
        candidates = [row for row in candidates if wanted(row["path"])]
    search = _Search(compiled)
    # A thread of its own: searches that are slow on purpose must not keep the shared ones from others.
    thread = ThreadPoolExecutor(1, "grep")
    try:
        for batch in _batches(candidates):
            rows = await pool.fetch(CONTENTS, org_id, [row["blob_hash"] for row in batch])
            contents = {row["hash"]: row["content"] for row in rows}
            files = [(row["path"], contents[row["blob_hash"]]) for row in batch if row["blob_hash"] in contents]
            if await asyncio.get_running_loop().run_in_executor(thread, search.run, files):
                break
    finally:
        search.abandoned.set()
        thread.shutdown(wait=False)
    return search.found


def _batches(candidates: Sequence[asyncpg.Record]) -> Iterator[list[asyncpg.Record]]:
    batch: list[asyncpg.Record] = []
    size_bytes = 0
    for row in candidates:
        if batch and (size_bytes + row["size_bytes"] > BATCH_MAX_BYTES or len(batch) == BATCH_MAX_FILES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(row)
        size_bytes += row["size_bytes"]
    if batch:
        yield batch


class _Search:
    """What runs in the thread."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._ends_at = time.monotonic() + GREP_MAX_SECONDS
        self.found: list[FileMatch] = []
        self.abandoned = threading.Event()

    def run(self, files: Sequence[tuple[str, bytes]]) -> bool:
        """Whether enough was found."""
        for path, content in files:
            for line in matching_lines(self._pattern, content):
                if time.monotonic() > self._ends_at:
                    raise BadPattern(
                        f"The search took longer than {GREP_MAX_SECONDS:g} seconds; "
                        "search fewer files, or with a simpler expression"
                    )
                if self.abandoned.is_set():
                    return True
                if line is None:
                    continue
                number, text = line
                shown = text.decode("utf-8", "replace").removesuffix("\r")[:GREP_LINE_MAX_CHARACTERS]
                self.found.append(FileMatch(path=path, line_number=number, line=shown))
                if len(self.found) == GREP_MAX_MATCHES:
                    return True
        return False
