"""The parent's side of `sqlite_child`: one process per call, killed when it overstays or nobody waits any more."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from domain.limits import DATABASE_MAX_BYTES
from domain.session_databases import NewImage
from infra.tool_processes import tool_process

CHILD: Final = Path(__file__).with_name("sqlite_child.py")
SQL_SECONDS: Final = 20.0
KILL_MARGIN_SECONDS: Final = 5.0
"""Between the time limit that SQLite looks at, which is a readable error, and the end of its process."""
MAX_RUNS: Final = 4
"""At the same time in one worker: each may take a core, and some copies of a database."""
MAX_ROWS: Final = 1000
RESULT_MAX_BYTES: Final = 44 * 1024
"""Of rows in one result, as JSON. A result may hold 64 KiB; what is left is for names of columns."""
VALUE_SHOWN_MAX_BYTES: Final = 8 * 1024
_REPORT_MAX_BYTES: Final = 8 * 1024 * 1024
_IMAGE_MAX_BYTES: Final = DATABASE_MAX_BYTES + DATABASE_MAX_BYTES // 100 + 1024
"""What does not get smaller gets a little larger when it is deflated."""

Mode = Literal["execute", "query"]


class SqlFailed(Exception):
    """The process came to an end without a result"""


class SqlTookTooLong(SqlFailed):
    """The process was killed because it did not end in time"""


class SqlRefused(Exception):
    """A statement failed or is not allowed; then nothing has changed. `line` counts from 1."""

    def __init__(self, error: str, statement: int | None, line: int | None, text: str | None) -> None:
        super().__init__(error)
        self.error = error
        self.statement = statement
        self.line = line
        self.text = text


class Rows(Struct, frozen=True, kw_only=True):
    """`reason` tells why there are more than these."""

    columns: list[str]
    rows: list[list[object]]
    reason: Literal["row_cap", "size_cap"] | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """`found` is what the last statement with rows has found, `image` what is to be stored, None when nothing has changed."""

    statements: int
    changed: int
    found: Rows | None
    image: NewImage | None = None


class _Refusal(Struct, frozen=True, kw_only=True):
    error: str
    statement: int | None
    line: int | None
    text: str | None


class _Done(Struct, frozen=True, kw_only=True):
    statements: int
    changed: int
    found: Rows | None
    is_changed: bool = False
    size_bytes: int = 0
    page_count: int = 0
    tables: msgspec.Raw = msgspec.Raw(b"[]")


class _Report(Struct, frozen=True, kw_only=True):
    done: _Done | None = None
    refused: _Refusal | None = None


class SqlRunner:
    def __init__(
        self, *, child: Path = CHILD, seconds: float = SQL_SECONDS, kill_margin_seconds: float = KILL_MARGIN_SECONDS
    ) -> None:
        self._child = child
        self._seconds = seconds
        self._kill_margin_seconds = kill_margin_seconds
        self._slots = asyncio.Semaphore(MAX_RUNS)

    async def run(
        self, mode: Mode, sql: str, image: bytes, *, max_rows: int = MAX_ROWS, result_max_bytes: int = RESULT_MAX_BYTES
    ) -> Outcome:
        """`image` as in `DatabaseImage.content`. Raises `SqlRefused` and `SqlFailed`."""
        request = msgspec.json.encode(
            {
                "mode": mode,
                "sql": sql,
                "seconds": self._seconds,
                "max_bytes": DATABASE_MAX_BYTES,
                "max_rows": max_rows,
                "result_max_bytes": result_max_bytes,
                "value_max_bytes": VALUE_SHOWN_MAX_BYTES,
            }
        )
        async with self._slots:
            try:
                async with (
                    tool_process(self._child, options=("-S",)) as child,
                    asyncio.timeout(self._seconds + self._kill_margin_seconds),
                ):
                    return await _talk(child, request, image)
            except TimeoutError:
                raise SqlTookTooLong from None
            except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
                raise SqlFailed from None


async def _talk(child: asyncio.subprocess.Process, request: bytes, image: bytes) -> Outcome:
    assert child.stdin is not None
    assert child.stdout is not None
    # It stays open: the child takes its end for ours.
    for payload in (request, image):
        child.stdin.write(struct.pack("!I", len(payload)))
        child.stdin.write(payload)
    await child.stdin.drain()
    report = msgspec.json.decode(await _payload(child.stdout, _REPORT_MAX_BYTES), type=_Report)
    left = await _payload(child.stdout, _IMAGE_MAX_BYTES)
    if report.refused is not None:
        refused = report.refused
        raise SqlRefused(refused.error, refused.statement, refused.line, refused.text)
    done = report.done
    if done is None:
        raise SqlFailed
    new = None
    if done.is_changed:
        new = NewImage(content=left, size_bytes=done.size_bytes, page_count=done.page_count, tables=done.tables)
    return Outcome(statements=done.statements, changed=done.changed, found=done.found, image=new)


async def _payload(stdout: asyncio.StreamReader, max_bytes: int) -> bytes:
    (size,) = struct.unpack("!I", await stdout.readexactly(4))
    if size > max_bytes:
        raise SqlFailed
    return await stdout.readexactly(size)
