"""A session's SQLite databases: over the API, through the port, by their tools, and what hostile SQL comes to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from activities.capabilities.session_sql_database import capability
from activities.capabilities.tool_call import ToolOutcome, call_tool
from activities.sql.script_run import MAX_ROWS, Outcome, SqlFailed, SqlRunner
from api.services import Services
from db.database import Database
from db.messages import NewMessage
from db.session_databases import WRITES_REMEMBERED, StoredDatabases, copy_databases
from db.session_resources import DatabaseResources
from domain.capabilities import Capability
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id, parse_id
from domain.limits import DATABASE_MAX_BYTES, MAX_DATABASES_PER_SESSION
from domain.messages import TextPart
from domain.session_databases import DatabaseChanged, DatabaseImage, DatabaseProblem, NewImage
from domain.tools import SideEffect
from infra.encryption import Keyring
from tests.conftest import API, Make
from tests.processes import descendants, eventually, is_alive
from tests.stack import Stack, of_type
from tests.tool_context import PlainContext

SQL: Final = capability(SqlRunner(seconds=20, kill_margin_seconds=10))
HURRIED: Final = capability(SqlRunner(seconds=1.0, kill_margin_seconds=1.0))


class SqlContext(PlainContext):
    def __init__(self, databases: StoredDatabases, idempotency_key: str) -> None:
        self._databases = databases
        self.idempotency_key = idempotency_key

    @property
    def databases(self) -> StoredDatabases:
        return self._databases


Call = Callable[..., Awaitable[Any]]


@pytest.fixture
async def session(make_session: Make) -> str:
    return (await make_session())["id"]


@pytest.fixture
def databases(database: Database, session: str) -> StoredDatabases:
    return StoredDatabases(database.pool, session)


async def outcome_of(
    databases: StoredDatabases, name: str, arguments: dict[str, object], *, key: str | None = None, of: Capability = SQL
) -> ToolOutcome:
    (tool,) = [one for one in of.tools if one.name == name]
    return await call_tool(tool, SqlContext(databases, key or new_id(Prefix.EVENT)), arguments)


async def call(databases: StoredDatabases, name: str, sql: str | None = None, **given: Any) -> Any:
    """The result of a tool on the database `d`; fails when the tool does."""
    options = {one: given.pop(one) for one in ("key", "of") if one in given}
    arguments = {"database": "d", **({} if sql is None else {"sql": sql}), **given}
    outcome = await outcome_of(databases, name, arguments, **options)
    assert outcome.error is None, outcome.error
    assert outcome.result is not None
    (part,) = outcome.result
    assert isinstance(part, TextPart)
    return msgspec.json.decode(part.text)


async def error_of(databases: StoredDatabases, name: str, sql: str, **options: Any) -> str:
    outcome = await outcome_of(databases, name, {"database": "d", "sql": sql}, **options)
    assert outcome.error is not None, outcome.result
    return outcome.error


async def rows(databases: StoredDatabases, sql: str) -> list[list[Any]]:
    return (await call(databases, "sql_query", sql))["rows"]


def url(session_id: str, rest: str = "") -> str:
    return f"{API}/sessions/{session_id}/databases{rest}"


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_a_database_is_created_listed_shown_and_deleted(client: httpx.AsyncClient, session: str) -> None:
    assert (await client.get(url(session))).json() == {"data": []}
    made = await client.post(url(session), json={"name": "refund_history"})
    assert made.status_code == 201, made.text
    assert set(made.json()) == {"name", "size_bytes", "page_count", "created_at", "updated_at"}
    assert (made.json()["size_bytes"], made.json()["page_count"]) == (0, 0)
    assert (await client.get(url(session))).json() == {"data": [made.json()]}
    assert (await client.get(url(session, "/refund_history"))).json() == made.json()
    schema = await client.get(url(session, "/refund_history/schema"))
    assert schema.json() == {"database": "refund_history", "tables": []}
    assert (await client.delete(url(session, "/refund_history"))).status_code == 204
    assert (await client.delete(url(session, "/refund_history"))).status_code == 404
    assert (await client.get(url(session))).json() == {"data": []}


async def test_tools_work_on_a_database_of_the_api_and_the_api_shows_what_they_made(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases
) -> None:
    await client.post(url(session), json={"name": "d"})
    assert await rows(databases, "SELECT 1") == [[1]]
    await call(
        databases,
        "sql_execute",
        """CREATE TABLE a (id INTEGER PRIMARY KEY, name TEXT NOT NULL DEFAULT 'x', twice AS (id * 2));
        CREATE TABLE b (a_id REFERENCES a (id), n); CREATE UNIQUE INDEX by_n ON b (n, lower(n)); CREATE VIEW v AS SELECT n FROM b;
        CREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1; SELECT 2; END;
        INSERT INTO a (name) VALUES ('p'), ('q');""",
    )
    shown = (await client.get(url(session, "/d"))).json()
    assert shown["size_bytes"] == shown["page_count"] * 4096 > 0
    tables = {table["name"]: table for table in (await client.get(url(session, "/d/schema"))).json()["tables"]}
    assert [(name, table["type"], table.get("row_count")) for name, table in tables.items()] == [
        ("a", "table", 2),
        ("b", "table", 0),
        ("v", "view", None),
    ]
    assert tables["a"]["columns"] == [
        {"name": "id", "type": "INTEGER", "primary_key": 1},
        {"name": "name", "type": "TEXT", "not_null": True, "default": "'x'"},
        {"name": "twice", "type": "", "generated": True},
    ]
    assert tables["a"]["triggers"] == ["t"]
    assert tables["b"]["indexes"] == [{"name": "by_n", "unique": True, "columns": ["n", None]}]
    assert tables["b"]["foreign_keys"] == [{"columns": ["a_id"], "table": "a", "to": ["id"]}]
    assert (await call(databases, "sql_schema"))["tables"] == list(tables.values())
    assert (await call(databases, "sql_schema", table="A"))["tables"] == [tables["a"]]


BAD_NAMES: Final = (
    "",
    "a b",
    "a/b",
    "../../etc/passwd",
    "/etc/passwd",
    "a.db",
    ":memory:",
    "file:x",
    "größe",
    "a\0",
    "a" * 65,
    "а",
)


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_name_that_is_none_is_refused_everywhere(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases, name: str
) -> None:
    refused = await client.post(url(session), json={"name": name})
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (400, "invalid_input", "name")
    assert refused.headers["content-type"] == "application/problem+json"
    for tool, arguments in (
        ("sql_execute", {"sql": "CREATE TABLE t (a)"}),
        ("sql_query", {"sql": "SELECT 1"}),
        ("sql_schema", {}),
    ):
        outcome = await outcome_of(databases, tool, {"database": name, **arguments})
        assert outcome.error == "`database` must be 1 to 64 letters, digits or `_`. Nothing was run."
    assert await databases.list() == []


@pytest.mark.parametrize("name", ["nope", "a%2Fb", "..%2F..%2Fetc%2Fpasswd", "%00", "gr%C3%B6%C3%9Fe"])
async def test_a_database_that_is_not_there_is_not_found(client: httpx.AsyncClient, session: str, name: str) -> None:
    for method, rest in (("GET", f"/{name}"), ("DELETE", f"/{name}"), ("GET", f"/{name}/schema")):
        answer = await client.request(method, url(session, rest))
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, rest)


async def test_bodies_without_a_usable_name_say_so(client: httpx.AsyncClient, session: str) -> None:
    for body in ({}, {"name": 7}, {"name": None}):
        refused = await client.post(url(session), json=body)
        assert (refused.status_code, refused.json()["field"]) == (400, "name")


async def test_a_name_is_taken_once_and_a_session_is_full_at_its_limit(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases
) -> None:
    answers = await asyncio.gather(*(client.post(url(session), json={"name": "same"}) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"name_taken"}
    more = await asyncio.gather(
        *(client.post(url(session), json={"name": f"n{n}"}) for n in range(MAX_DATABASES_PER_SESSION))
    )
    assert sorted(answer.status_code for answer in more) == [201] * (MAX_DATABASES_PER_SESSION - 1) + [422]
    assert [answer.json()["code"] for answer in more if answer.status_code == 422] == ["database_limit"]
    assert "10 databases" in await error_of(databases, "sql_execute", "CREATE TABLE t (a)")
    assert len(await databases.list()) == MAX_DATABASES_PER_SESSION


async def test_a_session_that_is_not_there_has_no_databases(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases
) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    assert (await client.delete(f"{API}/sessions/{session}")).status_code == 204
    requests = [("GET", ""), ("POST", ""), ("GET", "/d"), ("DELETE", "/d"), ("GET", "/d/schema")]
    for method, rest in requests:
        body = {"name": "d"} if method == "POST" else None
        for missing in (new_id(Prefix.SESSION), session):
            assert (await client.request(method, url(missing, rest), json=body)).status_code == 404, (method, rest)
        assert (await client.request(method, url("nope", rest), json=body)).json()["code"] == "malformed_id"
    assert await databases.list() == []
    assert "no database" in await error_of(databases, "sql_query", "SELECT 1")
    assert "no session" in await error_of(databases, "sql_execute", "CREATE TABLE t (a)")


async def test_a_session_sees_no_database_of_another(
    database: Database, databases: StoredDatabases, make_session: Make
) -> None:
    await call(databases, "sql_execute", "CREATE TABLE mine (a)")
    other = StoredDatabases(database.pool, (await make_session())["id"])
    assert (await other.list(), await other.load("d"), await other.schema("d")) == ([], None, None)
    await call(other, "sql_execute", "CREATE TABLE theirs (a)")
    assert [table["name"] for table in (await call(databases, "sql_schema"))["tables"]] == ["mine"]


async def test_the_capability_gives_the_session_its_feature(make_session: Make) -> None:
    with_it = await make_session(harness_name="base", capabilities=[{"ref": "session_sql_database"}])
    assert with_it["features"] == ["sql_database"]
    assert (await make_session(harness_name="base", capabilities=[{"ref": "noop"}]))["features"] == []


# --- values -----------------------------------------------------------------------------------------------------------


async def test_every_kind_of_value_comes_back_as_documented(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    (row,) = await rows(
        databases,
        """SELECT NULL, 7, 9007199254740991, 9007199254740992, -9223372036854775808, 1.5, 9e999, -9e999, 'Ünï', '',
        x'00ff', CAST(x'ff' AS TEXT), '2026-01-05', char(0), true""",
    )
    assert row == [
        *(None, 7, 9007199254740991, {"integer": "9007199254740992"}, {"integer": "-9223372036854775808"}, 1.5),
        *({"real": "Infinity"}, {"real": "-Infinity"}, "Ünï", "", {"base64": "AP8=", "bytes": 2}),
        *({"base64": "/w==", "bytes": 1}, "2026-01-05", "\0", 1),
    ]
    ((text, blob),) = await rows(databases, "SELECT printf('%.*c', 100000, 'ü'), zeroblob(100000)")
    assert (text["text"], text["bytes"], text["truncated"]) == ("ü" * 4096, 200_000, True)
    assert (blob["bytes"], blob["truncated"]) == (100_000, True)


async def test_equal_column_names_lose_no_value(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    result = await call(databases, "sql_query", 'SELECT 1 AS a, 2 AS a, 3 AS "größe"')
    assert (result["columns"], result["rows"]) == (["a", "a", "größe"], [[1, 2, 3]])


async def test_what_does_not_fit_is_cut_and_says_so(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    endless = "WITH RECURSIVE r (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT "
    many = await call(databases, "sql_query", f"{endless} x FROM r")
    assert (many["row_count"], len(many["rows"]), many["reason"]) == (MAX_ROWS, MAX_ROWS, "row_cap")
    wide = await call(databases, "sql_query", f"{endless} printf('%.*c', 5000, 'ü') FROM r")
    assert (wide["truncated"], wide["reason"], wide["row_count"]) == (True, "size_cap", 5)
    exact = await call(databases, "sql_query", f"{endless} x FROM r LIMIT {MAX_ROWS}")
    assert (exact["row_count"], "truncated" in exact) == (MAX_ROWS, False)


# --- scripts ----------------------------------------------------------------------------------------------------------


async def test_a_script_is_all_or_nothing_and_the_error_names_the_statement(databases: StoredDatabases) -> None:
    made = await call(
        databases, "sql_execute", "CREATE TABLE t (a UNIQUE); INSERT INTO t VALUES (1), (2) RETURNING a, a + 1 AS b;"
    )
    assert (made["statements"], made["rows_changed"], made["note"]) == (2, 2, "The database `d` is new.")
    assert made["returned"] == {"columns": ["a", "b"], "rows": [[1, 2], [2, 3]], "row_count": 2}
    before = await databases.load("d")
    error = await error_of(
        databases,
        "sql_execute",
        "INSERT INTO t VALUES (3);\n-- again; and\nDROP TABLE t;\n\n INSERT INTO t VALUES (1);",
    )
    assert error == (
        "Statement 3 (line 5) failed: no such table: t. The statement: INSERT INTO t VALUES (1); Nothing was changed."
    )
    assert await databases.load("d") == before
    error = await error_of(
        databases, "sql_execute", "BEGIN; INSERT INTO t VALUES (4); COMMIT; INSERT INTO t VALUES (1)"
    )
    assert "Statement 4" in error
    assert "UNIQUE constraint failed" in error
    assert await databases.load("d") == before
    assert "ends inside a transaction" in await error_of(databases, "sql_execute", "BEGIN; INSERT INTO t VALUES (5)")
    assert await databases.load("d") == before


async def test_semicolons_in_texts_comments_and_triggers_split_nothing(databases: StoredDatabases) -> None:
    script = """/* one; */ CREATE TABLE "a;b" ([c;d] TEXT, `e;f`); -- two; three
    CREATE TEMP TABLE gone (a);
    CREATE TRIGGER tr AFTER INSERT ON "a;b" BEGIN UPDATE "a;b" SET "e;f" = 'x;''y;'; DELETE FROM "a;b" WHERE 0; END;
    ;; INSERT INTO "a;b" ("c;d") VALUES ('it''s; ok') """
    assert (await call(databases, "sql_execute", script))["statements"] == 4
    assert await rows(databases, 'SELECT * FROM "a;b"') == [["it's; ok", "x;'y;"]]


async def test_a_script_that_changes_nothing_stores_nothing(databases: StoredDatabases) -> None:
    for sql in ("SELECT 1", "-- nothing", "CREATE TEMP TABLE t (a)"):
        assert "no such database yet" in (await call(databases, "sql_execute", sql))["note"]
    assert await databases.list() == []
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    before = await databases.load("d")
    assert (await call(databases, "sql_execute", "UPDATE t SET a = 1"))["note"] == "This has changed nothing."
    assert await databases.load("d") == before


async def test_a_query_changes_nothing(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    before = await databases.load("d")
    writes = (
        "DELETE FROM t",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
        "INSERT INTO t VALUES (2) RETURNING a",
        "CREATE TABLE u (a)",
        "CREATE TEMP TABLE u (a)",
        "DROP TABLE t",
        "PRAGMA user_version = 7",
        "PRAGMA query_only = OFF",
        "BEGIN IMMEDIATE",
        "ALTER TABLE t ADD COLUMN b",
        "ANALYZE",
        "EXPLAIN DELETE FROM t",
    )
    for sql in writes:
        assert "failed: " in await error_of(databases, "sql_query", sql), sql
    assert "is one statement" in await error_of(databases, "sql_query", "SELECT 1; DELETE FROM t")
    assert "no statement" in await error_of(databases, "sql_query", " -- nothing")
    assert await databases.load("d") == before
    assert await rows(databases, "SELECT * FROM t; -- end") == [[1]]


async def test_a_missing_database_or_table_says_what_there_is(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    outcome = await outcome_of(databases, "sql_query", {"database": "D", "sql": "SELECT 1"})
    assert "There is no database `D`. There are: `d`." in (outcome.error or "")
    outcome = await outcome_of(databases, "sql_schema", {"database": "d", "table": "nope"})
    assert "It has: `t`." in (outcome.error or "")


async def test_foreign_keys_are_enforced(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE a (id INTEGER PRIMARY KEY); CREATE TABLE b (a REFERENCES a)")
    assert "FOREIGN KEY constraint failed" in await error_of(databases, "sql_execute", "INSERT INTO b VALUES (1)")


# --- hostile SQL ------------------------------------------------------------------------------------------------------

ESCAPES: Final = {
    "ATTACH '/etc/passwd' AS p": "cannot be attached",
    "ATTACH ':memory:' AS p": "cannot be attached",
    "ATTACH 'file:/etc/passwd?mode=ro' AS p": "cannot be attached",
    "DETACH main": "no attached databases",
    "VACUUM": "not needed",
    "VACUUM INTO '/tmp/everruns-stolen.db'": "cannot be attached",
    "SELECT load_extension('/lib/x86_64-linux-gnu/libc.so.6')": "`load_extension` is not available",
    "CREATE VIEW z AS SELECT load_extension('x'); SELECT * FROM z": "unsafe use of load_extension()",
    "SELECT writefile('/tmp/x', 'y')": "no such function",
    "SELECT readfile('/etc/passwd')": "no such function",
    "SELECT * FROM pragma_database_list": "PRAGMA database_list is not available",
    "PRAGMA writable_schema = ON": "PRAGMA writable_schema is not available",
    "PRAGMA temp_store_directory = '/tmp'": "not available",
    "PRAGMA journal_mode = WAL": "not available",
    "PRAGMA max_page_count = 1000000": "not available",
    "PRAGMA hard_heap_limit = 0": "not available",
    "PRAGMA trusted_schema = ON": "not available",
    "PRAGMA mmap_size = 1000000000": "not available",
    "CREATE VIRTUAL TABLE f USING fts5 (a)": "virtual tables",
    "CREATE VIRTUAL TABLE c USING csv (filename = '/etc/passwd')": "virtual tables",
    "SELECT fts3_tokenizer('simple', x'4141414141414141')": "failed: ",
    "UPDATE sqlite_master SET sql = 'x'": "may not be modified",
    "DELETE FROM sqlite_schema": "may not be modified",
}


@pytest.mark.parametrize("sql", ESCAPES)
async def test_nothing_leads_out_of_the_database(databases: StoredDatabases, sql: str) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    before = await databases.load("d")
    error = await error_of(databases, "sql_execute", sql)
    assert ESCAPES[sql] in error
    assert "root:" not in error
    if ";" not in sql:
        assert "failed: " in await error_of(databases, "sql_query", sql)
    assert await databases.load("d") == before
    assert not os.path.exists("/tmp/everruns-stolen.db")  # noqa: ASYNC240


BOMBS: Final = {
    "SELECT zeroblob(1000000000)": "a single value may hold",
    "SELECT hex(zeroblob(4000000))": "a single value may hold",
    "SELECT replace(hex(zeroblob(1000000)), '0', hex(zeroblob(1000000)))": "a single value may hold",
    f"SELECT {'(' * 5000}1{')' * 5000}": "parser stack overflow",
    f"SELECT {'-' * 0}{' + '.join(['1'] * 1000)}": "Expression tree is too large",
    "SELECT " + " UNION ALL SELECT ".join(["1"] * 1000): "too many terms in compound SELECT",
    "SELECT '" + "x" * 4_000_000: "expected `str` of length <= 1000000",
    "SELECT 'a\0b'": "`sql` holds U+0000 at character 10",
    "SELECT '\ud800'": "half of a surrogate pair",
    "SELECT '": "unrecognized token",
}


@pytest.mark.parametrize("sql", BOMBS, ids=lambda sql: sql[:40])
async def test_what_is_too_large_is_refused_in_words(databases: StoredDatabases, sql: str) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    for tool in ("sql_query", "sql_execute"):
        assert BOMBS[sql].lower() in (await error_of(databases, tool, sql)).lower()


ENDLESS: Final = (
    "WITH RECURSIVE r (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r",
    "WITH RECURSIVE r (x) AS (SELECT 1 UNION SELECT random() FROM r) SELECT max(x) FROM r",
    "SELECT count(*) FROM " + ", ".join(f"t AS t{n}" for n in range(30)),
    # One step of SQLite's machine: its own limit is never looked at.
    "SELECT instr(printf('%.*c', 4000000, 'a'), printf('%.*c', 2000000, 'a') || 'b')",
)


@pytest.mark.parametrize("sql", ENDLESS, ids=lambda sql: sql[:40])
async def test_what_does_not_end_is_stopped(databases: StoredDatabases, sql: str) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a); INSERT INTO t VALUES (1), (2), (3), (4)")
    before = await databases.load("d")
    async with asyncio.timeout(30):
        for tool in ("sql_query", "sql_execute"):
            error = await error_of(databases, tool, sql, of=HURRIED)
            assert "did not end within 1 seconds" in error or "took too long and was stopped" in error
    assert await databases.load("d") == before


async def test_a_bomb_of_memory_ends_its_own_process_only(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    bomb = """WITH RECURSIVE r (n, x) AS (SELECT 1, randomblob(3000000) UNION ALL SELECT n + 1, randomblob(3000000) FROM r)
        SELECT n FROM r ORDER BY x"""
    assert "memory" in await error_of(databases, "sql_query", bomb)
    assert await rows(databases, "SELECT 1") == [[1]]


async def test_a_database_stops_at_its_quota_and_what_is_deleted_counts_no_more(databases: StoredDatabases) -> None:
    fill = """WITH RECURSIVE r (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT {})
        INSERT INTO t SELECT randomblob(1000000) FROM r"""
    await call(databases, "sql_execute", f"CREATE TABLE t (a); {fill.format(14)}")
    before = await databases.load("d")
    error = await error_of(databases, "sql_execute", fill.format(5))
    assert f"larger than {DATABASE_MAX_BYTES:,} bytes" in error
    assert await databases.load("d") == before
    await call(databases, "sql_execute", "DELETE FROM t")
    ((info),) = await databases.list()
    assert info.size_bytes < 100_000
    await call(databases, "sql_execute", fill.format(5))


async def test_a_schema_is_bounded_too(databases: StoredDatabases) -> None:
    tables = ";".join(f"CREATE TABLE t{n} (a)" for n in range(201))
    assert "200 tables" in await error_of(databases, "sql_execute", tables)
    long = ";".join(f"CREATE TABLE t{n} (a CHECK (a <> '{'x' * 9000}'))" for n in range(100))
    assert "512" in await error_of(databases, "sql_execute", long) or "schema" in await error_of(
        databases, "sql_execute", long
    )
    assert await databases.list() == []
    wide = ";".join(f"CREATE TABLE t{n} ({', '.join(f'c{m}' for m in range(30))})" for n in range(60))
    await call(databases, "sql_execute", wide)
    cut = await call(databases, "sql_schema")
    assert (cut["reason"], len(cut["tables"]), cut["tables"][0]) == ("size_cap", 60, "t0")


# --- crashes and races ------------------------------------------------------------------------------------------------


async def test_a_call_that_is_tried_again_takes_effect_once(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    first = await call(databases, "sql_execute", "INSERT INTO t VALUES (1) RETURNING a", key="turn:call")
    await call(databases, "sql_execute", "INSERT INTO t VALUES (2)")
    again = await call(databases, "sql_execute", "INSERT INTO t VALUES (1) RETURNING a", key="turn:call")
    assert again == first
    assert await rows(databases, "SELECT a FROM t ORDER BY a") == [[1], [2]]
    assert {tool.name: tool.side_effect for tool in SQL.tools}["sql_execute"] is SideEffect.IDEMPOTENT


async def test_two_attempts_of_one_call_at_the_same_time_take_effect_once(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    results = await asyncio.gather(
        *(call(databases, "sql_execute", "INSERT INTO t VALUES (1)", key="turn:call") for _ in range(4))
    )
    assert all(result == results[0] for result in results)
    assert await rows(databases, "SELECT count(*) FROM t") == [[1]]


async def test_concurrent_scripts_lose_no_write(database: Database, session: str, databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    others = [StoredDatabases(database.pool, session) for _ in range(4)]
    await asyncio.gather(*(call(one, "sql_execute", f"INSERT INTO t VALUES ({n})") for n, one in enumerate(others)))
    assert await rows(databases, "SELECT a FROM t ORDER BY a") == [[0], [1], [2], [3]]


async def test_an_image_replaces_only_the_one_it_was_made_from(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases
) -> None:
    image = NewImage(content=b"x", size_bytes=4096, page_count=1, tables=msgspec.Raw(b"[]"))

    async def store(replaces: DatabaseImage | None, key: str) -> str:
        return await databases.store("d", image, replaces=replaces, idempotency_key=key, result=key)

    await store(None, "1")
    with pytest.raises(DatabaseChanged):
        await store(None, "2")
    read = await databases.load("d")
    await store(read, "3")
    with pytest.raises(DatabaseChanged):
        await store(read, "4")
    current = await databases.load("d")
    await client.delete(url(session, "/d"))
    with pytest.raises(DatabaseChanged):
        await store(current, "5")
    await store(None, "6")
    with pytest.raises(DatabaseChanged):
        await store(read, "7")
    assert await store(None, "3") == "3"
    assert [await databases.result_of(key) for key in "1234567"] == ["1", None, "3", None, None, "6", None]


async def test_a_call_tried_again_does_not_make_anew_what_was_deleted(
    client: httpx.AsyncClient, session: str, databases: StoredDatabases
) -> None:
    first = await call(databases, "sql_execute", "CREATE TABLE t (a)", key="turn:call")
    await client.delete(url(session, "/d"))
    assert await call(databases, "sql_execute", "CREATE TABLE t (a)", key="turn:call") == first
    assert await databases.list() == []


async def test_writes_are_forgotten_in_their_order(database: Database, databases: StoredDatabases) -> None:
    image = NewImage(content=b"", size_bytes=0, page_count=0, tables=msgspec.Raw(b"[]"))
    for number in range(WRITES_REMEMBERED + 5):
        replaces = await databases.load("d")
        await databases.store("d", image, replaces=replaces, idempotency_key=str(number), result="{}")
    assert await database.pool.fetchval("SELECT count(*) FROM session_database_writes") == WRITES_REMEMBERED
    assert await databases.result_of("4") is None
    assert await databases.result_of("5") == "{}"


def children() -> set[int]:
    found: set[int] = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if b"sqlite_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


async def running_child() -> int:
    await eventually(children, deadline_seconds=30, what="a process for the script")
    (pid,) = children()
    return pid


ENDLESS_INSERT: Final = f"INSERT INTO t VALUES (1); {ENDLESS[0]}"


async def test_a_child_that_is_killed_changes_nothing_and_is_an_error_to_the_model(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    before = await databases.load("d")
    running = asyncio.create_task(error_of(databases, "sql_execute", ENDLESS_INSERT))
    os.kill(await running_child(), signal.SIGKILL)
    assert "ended without a result" in await running
    assert await databases.load("d") == before


async def test_a_call_that_is_cancelled_kills_its_child(databases: StoredDatabases) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a)")
    before = await databases.load("d")
    running = asyncio.create_task(error_of(databases, "sql_execute", ENDLESS_INSERT))
    pid = await running_child()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_alive(pid)
    assert await databases.load("d") == before


WORKER: Final = f"""
import asyncio
from activities.sql.script_run import SqlRunner
asyncio.run(SqlRunner(seconds=300).run("query", {ENDLESS[0]!r}, b""))
"""


async def test_a_child_does_not_outlive_a_worker_that_is_killed() -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, cwd=Path(__file__).parents[2])
    try:
        await eventually(lambda: descendants(worker.pid), deadline_seconds=60, what="a process for the query")
        (child,) = descendants(worker.pid)
    finally:
        worker.kill()
        await worker.wait()
    await eventually(lambda: not is_alive(child), deadline_seconds=30, what="the end of the worker's child")


LIAR: Final = """
import struct, sys
sys.stdout.buffer.write({answer})
sys.stdout.buffer.flush()
sys.stdin.buffer.read(1)
"""


@pytest.mark.parametrize(
    "answer", ["b''", "b'abc'", "struct.pack('!I', 2**31)", "struct.pack('!I', 2) + b'{}' + bytes(4)"]
)
async def test_a_child_that_talks_nonsense_is_a_failure_of_its_call_only(tmp_path: Path, answer: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(LIAR.format(answer=answer))
    with pytest.raises(SqlFailed):
        await SqlRunner(child=child, seconds=2, kill_margin_seconds=0).run("query", "SELECT 1", b"")


async def test_an_image_that_is_damaged_is_an_error_and_nothing_else() -> None:
    for image in (b"nonsense", b"x\x9c\x03\x00\x00\x00\x00\x01"):
        try:
            outcome: Outcome | None = await SqlRunner().run("query", "SELECT 1", image)
        except SqlFailed:
            outcome = None
        assert outcome is None or outcome.image is None


# --- forks ------------------------------------------------------------------------------------------------------------


async def test_copies_are_independent_of_what_they_were_copied_from(
    database: Database, session: str, databases: StoredDatabases, make_session: Make
) -> None:
    await call(databases, "sql_execute", "CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    target = (await make_session())["id"]
    async with database.transaction() as connection:
        await copy_databases(connection, parse_id(Prefix.SESSION, session), parse_id(Prefix.SESSION, target))
    copies = StoredDatabases(database.pool, target)
    assert await copies.list() == await databases.list()
    assert await copies.schema("d") == await databases.schema("d")
    await call(copies, "sql_execute", "INSERT INTO t VALUES (2)")
    await call(databases, "sql_execute", "DELETE FROM t")
    assert await rows(copies, "SELECT a FROM t ORDER BY a") == [[1], [2]]
    assert await rows(databases, "SELECT a FROM t") == []


async def test_a_fork_has_the_databases_that_are_as_they_were(
    client: httpx.AsyncClient, database: Database, services: Services, session: str, databases: StoredDatabases
) -> None:
    async def forked(**point: object) -> list[list[object]] | None:
        answer = await client.post(f"{API}/sessions/{session}/fork", json=point)
        assert answer.status_code == 201, answer.text
        copies = StoredDatabases(database.pool, answer.json()["id"])
        return await rows(copies, "SELECT a FROM t") if await copies.list() else None

    await call(databases, "sql_execute", "CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    await services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text="hi")]))
    sequence = await services.log.last_sequence(session)
    assert await forked(sequence=sequence) == [[1]]
    await call(databases, "sql_execute", "INSERT INTO t VALUES (2)")
    assert await forked() == [[1], [2]]
    assert await forked(sequence=sequence) is None
    assert await forked(sequence=sequence, files=False) == [[1], [2]]


def test_resources_serve_the_databases_of_a_session(database: Database, keyring: Keyring, session: str) -> None:
    assert isinstance(DatabaseResources(database.pool, keyring).databases(session), StoredDatabases)


async def test_a_stored_image_over_the_quota_is_refused(databases: StoredDatabases) -> None:
    image = NewImage(content=b"", size_bytes=DATABASE_MAX_BYTES + 1, page_count=1, tables=msgspec.Raw(b"[]"))
    with pytest.raises(DatabaseProblem, match="may hold"):
        await databases.store("d", image, replaces=None, idempotency_key="1", result="{}")


# --- in a turn --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


async def test_a_turn_makes_a_database_and_the_next_one_finds_it(stack: Stack) -> None:
    session_id = await stack.create_session(capabilities=[{"ref": "session_sql_database"}, {"ref": "noop"}])

    async def ask(*calls: tuple[str, str]) -> list[Any]:
        made = [{"name": name, "arguments": {"database": "d", "sql": sql}} for name, sql in calls]
        script = {"mode": "script", "turns": [{"tool_calls": made}, {"text": "Done."}]}
        log = await stack.ask(session_id, "go", llmsim=script)
        return of_type(log, "tool.completed")[-len(calls) :]

    first = await ask(("sql_execute", "CREATE TABLE t (a)"), ("sql_execute", "INSERT INTO t VALUES (1), (2)"))
    assert [one["success"] for one in first] == [True, True]
    ((second),) = await ask(("sql_query", "SELECT sum(a) FROM t"))
    assert '"rows":[[3]]' in str(second["result"])
    listed = (await stack.client.get(f"sessions/{session_id}/databases")).json()["data"]
    assert [one["name"] for one in listed] == ["d"]
    await stack.check(session_id)
