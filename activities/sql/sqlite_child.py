"""SQL over one SQLite database, in a process of its own. Run as a script, so that nothing of ours is imported with it.

SQLite runs inside the process that calls it, and a statement of ten words can keep it busy for ever: here it takes neither the
worker's time nor its memory, and can be killed at any moment. The database is in memory only, so nothing is left behind either.
What a statement may do is a list of what is allowed (`Gate`); whatever a new SQLite can do besides is refused.

Input, on stdin: a request (JSON) and an image (zlib), each behind its length. Stdin stays open: its end means that the worker
has gone, and ends the process. Output, on stdout: a report (JSON) and an image, each behind its length. Lengths are 4 bytes,
big-endian.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import struct
import sys
import threading
import time
import zlib

ADDRESS_SPACE_BYTES = 768 * 1024 * 1024
CPU_SECONDS = 60
OPEN_FILES = 32
HEAP_BYTES = 256 * 1024 * 1024
PAGE_BYTES = 4096
VALUE_MAX_BYTES = 4 * 1024 * 1024
PROGRESS_STEPS = 2000
"""Instructions of SQLite's machine between two looks at the clock: a fraction of a millisecond."""
SAFE_INTEGER = 2**53 - 1
SCHEMA_MAX_BYTES = 512 * 1024
MAX_TABLES = 200

LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: VALUE_MAX_BYTES,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 200,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 5_000_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}

READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_PRAGMA,
}
WRITING = READING | {
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_SAVEPOINT,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_CREATE_TRIGGER,
    sqlite3.SQLITE_CREATE_TEMP_TABLE,
    sqlite3.SQLITE_CREATE_TEMP_INDEX,
    sqlite3.SQLITE_CREATE_TEMP_VIEW,
    sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_DROP_TRIGGER,
    sqlite3.SQLITE_DROP_TEMP_TABLE,
    sqlite3.SQLITE_DROP_TEMP_INDEX,
    sqlite3.SQLITE_DROP_TEMP_VIEW,
    sqlite3.SQLITE_DROP_TEMP_TRIGGER,
    sqlite3.SQLITE_ALTER_TABLE,
    sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_ANALYZE,
}
REFUSED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "lsmode", "sqlite_dbpage"}
READ_PRAGMAS = {
    "table_info",
    "table_xinfo",
    "table_list",
    "index_list",
    "index_info",
    "index_xinfo",
    "foreign_key_list",
    "foreign_key_check",
    "integrity_check",
    "quick_check",
    "collation_list",
    "function_list",
}
"""Those whose argument says what to look at."""
SET_PRAGMAS = {"user_version", "application_id", "foreign_keys", "defer_foreign_keys", "recursive_triggers"}
SHOWN_PRAGMAS = SET_PRAGMAS | {"page_count", "page_size", "freelist_count", "encoding", "max_page_count"}
"""Shown, and those of `SET_PRAGMAS` also set in scripts."""

REFUSALS = {
    sqlite3.SQLITE_ATTACH: "other databases cannot be attached, and VACUUM is not needed: free pages are given back anyway",
    sqlite3.SQLITE_DETACH: "there are no attached databases",
    sqlite3.SQLITE_CREATE_VTABLE: "virtual tables (FTS, R-Tree) are not available",
    sqlite3.SQLITE_DROP_VTABLE: "virtual tables (FTS, R-Tree) are not available",
}

TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|;", re.DOTALL)
TRIGGER = re.compile(r"(?:explain\s+(?:query\s+plan\s+)?)?create\s+(?:temp\s+|temporary\s+)?trigger\b", re.IGNORECASE)
COMMENT = re.compile(r"\s+|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z)", re.DOTALL)


class Refused(Exception):
    """What the model is told; `line` counts from 1."""

    def __init__(
        self, error: str, statement: int | None = None, line: int | None = None, text: str | None = None
    ) -> None:
        super().__init__(error)
        self.report = {"error": error, "statement": statement, "line": line, "text": text}


class Gate:
    """The authorizer: asked for every table, function and pragma when a statement is compiled."""

    def __init__(self, allowed: set[int], *, can_write: bool) -> None:
        self._allowed = allowed
        self._can_write = can_write
        self.why: str | None = None

    def __call__(self, action: int, first: str | None, second: str | None, _database: object, _trigger: object) -> int:
        why = self._refusal(action, first, second)
        if why is None:
            return sqlite3.SQLITE_OK
        self.why = why
        return sqlite3.SQLITE_DENY

    def _refusal(self, action: int, first: str | None, second: str | None) -> str | None:
        if action not in self._allowed:
            if action in REFUSALS:
                return REFUSALS[action]
            return (
                "this is not available here"
                if self._can_write
                else "queries only read; use `sql_execute` to change anything"
            )
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in REFUSED_FUNCTIONS:
            return f"the function `{second}` is not available"
        if action == sqlite3.SQLITE_PRAGMA:
            return self._pragma_refusal((first or "").lower(), second)
        return None

    def _pragma_refusal(self, name: str, argument: str | None) -> str | None:
        if name in READ_PRAGMAS or (name in SHOWN_PRAGMAS and argument is None):
            return None
        if name in SET_PRAGMAS:
            return None if self._can_write else "queries only read; use `sql_execute` to change anything"
        return f"PRAGMA {name} is not available"


def limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file of the host grows by anything that happens here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def received() -> bytes:
    (size,) = struct.unpack("!I", exactly(4))
    return exactly(size)


def exactly(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) != size:
        raise SystemExit(1)  # the parent has gone
    return data


def end_with_parent() -> None:
    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def opened(image: bytes, max_bytes: int) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
    if image:
        connection.deserialize(image)
    else:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = FULL")  # so that what is deleted does not count against the quota
    connection.execute("PRAGMA journal_mode = MEMORY")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute(f"PRAGMA max_page_count = {max_bytes // PAGE_BYTES}")
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.text_factory = bytes
    return connection


def statements(script: str):
    """Each with the line it begins on. What cannot be split is left to SQLite, which says what is wrong with it."""
    start, line = 0, 1
    for token in TOKEN.finditer(script):
        if token[0] != ";":
            continue
        end = token.end()
        text = script[start:end]
        body = without_leading_comments(text)
        if TRIGGER.match(body) and not sqlite3.complete_statement(body):
            continue
        if body.strip(" \t\r\n\f;"):
            yield body, line + text[: len(text) - len(body)].count("\n")
        line += text.count("\n")
        start = end
    text = script[start:]
    body = without_leading_comments(text)
    if body.strip():
        yield body, line + text[: len(text) - len(body)].count("\n")


def without_leading_comments(text: str) -> str:
    position = 0
    while match := COMMENT.match(text, position):
        position = match.end()
    return text[position:]


class Run:
    def __init__(self, request: dict, connection: sqlite3.Connection) -> None:
        self._request = request
        self._connection = connection
        self._deadline = time.monotonic() + request["seconds"]
        self._can_write = request["mode"] == "execute"
        self._gate = Gate(WRITING if self._can_write else READING, can_write=self._can_write)

    def run(self) -> dict:
        connection = self._connection
        if not self._can_write:
            connection.execute("PRAGMA query_only = ON")
        connection.set_authorizer(self._gate)
        connection.set_progress_handler(lambda: time.monotonic() > self._deadline, PROGRESS_STEPS)
        before = connection.total_changes
        found: dict | None = None
        count = 0
        try:
            for count, (text, line) in enumerate(self._statements(), 1):
                found = self._one(text, line, count) or found
            if connection.in_transaction:
                raise Refused(
                    "the script ends inside a transaction: add COMMIT, or leave BEGIN out, a script is all or nothing anyway"
                )
        finally:
            connection.set_authorizer(None)
            connection.set_progress_handler(None, 0)
        return {"statements": count, "changed": connection.total_changes - before, "found": found}

    def _statements(self):
        script = self._request["sql"]
        if not self._can_write:
            found = []
            for one in statements(script):
                found.append(one)
                if len(found) > 1:
                    raise Refused("a query is one statement; this is more than one", 2, one[1], one[0][:200])
            if not found:
                raise Refused("there is no statement in it")
            return found
        return statements(script)

    def _one(self, text: str, line: int, number: int) -> dict | None:
        self._gate.why = None
        cursor = self._connection.cursor()
        try:
            cursor.execute(text)
            return None if cursor.description is None else self._rows(cursor)
        except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, MemoryError) as error:
            raise Refused(self._explained(error), number, line, text[:200]) from None
        finally:
            cursor.close()

    def _explained(self, error: Exception) -> str:
        message = str(error)
        if self._gate.why is not None:
            return self._gate.why
        if "full" in message:
            return f"the database would be larger than {self._request['max_bytes']:,} bytes: delete something first"
        if message == "interrupted":
            return f"it did not end within {self._request['seconds']:g} seconds"
        if isinstance(error, MemoryError) or "out of memory" in message:
            return "it needs more memory than there is: work on less at once"
        if "string or blob too big" in message:
            return f"a single value may hold {VALUE_MAX_BYTES:,} bytes"
        return message

    def _rows(self, cursor: sqlite3.Cursor) -> dict:
        columns = [name[0] for name in cursor.description]
        rows: list[list[object]] = []
        left = self._request["result_max_bytes"]
        reason = None
        while (row := cursor.fetchone()) is not None:
            if len(rows) == self._request["max_rows"]:
                reason = "row_cap"
                break
            shown = [self._shown(value) for value in row]
            left -= len(json.dumps(shown, ensure_ascii=False).encode()) + 1
            if left < 0:
                reason = "size_cap"
                break
            rows.append(shown)
        return {"columns": columns, "rows": rows, "reason": reason}

    def _shown(self, value: object) -> object:
        """A value in JSON. What JSON has no word for is an object that names its kind."""
        most = self._request["value_max_bytes"]
        if isinstance(value, int):
            return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else {"integer": str(value)}
        if isinstance(value, float):
            return value if abs(value) != float("inf") else {"real": "Infinity" if value > 0 else "-Infinity"}
        if isinstance(value, Text):
            return self._shown_text(value, most)
        if isinstance(value, bytes):
            return encoded(value, most)
        return None

    def _shown_text(self, value: bytes, most: int) -> object:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return encoded(value, most)
        if len(value) <= most:
            return text
        return {"text": value[:most].decode("utf-8", "ignore"), "bytes": len(value), "truncated": True}


class Text(bytes):
    """A TEXT as SQLite holds it, which need not be UTF-8; told apart from a BLOB by its type."""


def encoded(value: bytes, most: int) -> dict:
    shown = {"base64": base64.b64encode(value[:most]).decode(), "bytes": len(value)}
    return shown if len(value) <= most else {**shown, "truncated": True}


def tables_of(connection: sqlite3.Connection) -> list[dict]:
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    names = connection.execute(
        "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        "ORDER BY name"
    ).fetchall()
    if len(names) > MAX_TABLES:
        raise Refused(f"a database may have {MAX_TABLES} tables and views")
    triggers: dict[str, list[str]] = {}
    for table, name in connection.execute(
        "SELECT tbl_name, name FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
    ):
        triggers.setdefault(table, []).append(name)
    return [table_of(connection, name, kind, sql, triggers.get(name, [])) for name, kind, sql in names]


def table_of(connection: sqlite3.Connection, name: str, kind: str, sql: str | None, triggers: list[str]) -> dict:
    quoted = '"' + name.replace('"', '""') + '"'
    table: dict = {"name": name, "type": kind, "sql": sql, "triggers": triggers}
    try:
        rows = connection.execute(f"PRAGMA table_xinfo({quoted})").fetchall()
    except sqlite3.Error:  # a view over something that is not there any more
        rows = []
    table["columns"] = [
        {
            "name": row[1],
            "type": row[2],
            "not_null": bool(row[3]),
            "default": row[4],
            "primary_key": row[5],
            "generated": row[6] in (2, 3),
        }
        for row in rows
    ]
    if kind == "table":
        table["row_count"] = connection.execute(f"SELECT count(*) FROM {quoted}").fetchone()[0]  # noqa: S608
        table["indexes"] = [
            {
                "name": index[1],
                "unique": bool(index[2]),
                "columns": [row[2] for row in connection.execute("SELECT * FROM pragma_index_info(?)", (index[1],))],
            }
            for index in connection.execute(f"PRAGMA index_list({quoted})").fetchall()
        ]
        table["foreign_keys"] = foreign_keys_of(connection, quoted)
    return table


def foreign_keys_of(connection: sqlite3.Connection, quoted: str) -> list[dict]:
    keys: dict[int, dict] = {}
    for row in connection.execute(f"PRAGMA foreign_key_list({quoted})").fetchall():
        key = keys.setdefault(row[0], {"columns": [], "table": row[2], "to": []})
        key["columns"].append(row[3])
        key["to"].append(row[4])
    return list(keys.values())


def answer(request: dict, image: bytes) -> tuple[dict, bytes]:
    connection = opened(image, request["max_bytes"])
    before = image or connection.serialize()
    connection.text_factory = Text
    report = Run(request, connection).run()
    if request["mode"] == "query":
        return {"done": report}, b""
    left = connection.serialize()
    report["is_changed"] = left != before
    if not report["is_changed"]:
        return {"done": report}, b""
    tables = tables_of(connection)
    if len(json.dumps(tables)) > SCHEMA_MAX_BYTES:
        raise Refused(
            f"the schema of a database may take {SCHEMA_MAX_BYTES:,} bytes: make fewer tables or shorter statements"
        )
    report["tables"] = tables
    report["size_bytes"] = len(left)
    report["page_count"] = len(left) // PAGE_BYTES
    if len(left) > request["max_bytes"]:
        raise Refused(f"the database would be larger than {request['max_bytes']:,} bytes: delete something first")
    return {"done": report}, zlib.compress(left, 1)


def main() -> None:
    limit_resources()
    request = json.loads(received())
    image = received()
    end_with_parent()
    try:
        report, left = answer(request, zlib.decompress(image) if image else b"")
    except Refused as refused:
        report, left = {"refused": refused.report}, b""
    except MemoryError:
        report, left = {"refused": Refused("it needs more memory than there is: work on less at once").report}, b""
    for payload in (json.dumps(report).encode(), left):
        sys.stdout.buffer.write(struct.pack("!I", len(payload)))
        sys.stdout.buffer.write(payload)
    sys.stdout.buffer.flush()
    os._exit(0)  # closing takes time, and a thread waits for the parent's end


if __name__ == "__main__":
    main()
