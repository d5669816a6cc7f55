"""SQLite databases that belong to a session.

Decisions:
- A call works on a copy, in a process without access to the host (`activities.sql`). Only when its whole script has succeeded is
  the copy stored, in one transaction, and only over the image it was made from. If that has been replaced meanwhile, the script
  runs again on the new one: it has had no effect but on its copy.
- `sql_execute` is idempotent although `INSERT` is not: the call's idempotency key is stored together with the image, so an
  attempt after a crash finds out whether the one before it has taken effect, and returns its result.
- There is no tool that creates a database: what a script is to be run on is there once the script has put something into it.
- Virtual tables are not available: their shadow tables can be written to, and then they read what nobody has checked.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from activities.files.results import Cut, json_bytes
from activities.sql.script_run import (
    RESULT_MAX_BYTES,
    Mode,
    Outcome,
    Rows,
    SqlFailed,
    SqlRefused,
    SqlRunner,
    SqlTookTooLong,
)
from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.errors import InvalidInput
from domain.limits import DATABASE_MAX_BYTES, DATABASE_NAME_MAX_CHARACTERS, MAX_DATABASES_PER_SESSION
from domain.session_databases import DatabaseChanged, DatabaseImage, TableSchema, check_database_name
from domain.tools import SideEffect

CONCURRENCY_CLASS: Final = "session_sql"
TOOL_TIMEOUT_SECONDS: Final = 120.0
"""Four runs at their limit and their ends: after a conflict a script runs again."""
MAX_RUNS_OF_A_SCRIPT: Final = 4
MAX_SQL_CHARACTERS: Final = 1_000_000
RETURNED_MAX_ROWS: Final = 100
RETURNED_MAX_BYTES: Final = 16 * 1024
"""Of what a script has returned: it is stored with the image."""
_STATEMENT_SHOWN_CHARACTERS: Final = 120

DatabaseName = Annotated[
    str,
    Meta(
        description=f"The database's name: up to {DATABASE_NAME_MAX_CHARACTERS} letters, digits or `_`, such as `orders`."
    ),
]


class SqlExecute(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    database: DatabaseName
    sql: Annotated[
        str,
        Meta(
            min_length=1, max_length=MAX_SQL_CHARACTERS, description="One or more SQLite statements, separated by `;`."
        ),
    ]


class SqlQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    database: DatabaseName
    sql: Annotated[str, Meta(min_length=1, max_length=MAX_SQL_CHARACTERS, description="One statement that only reads.")]


class SqlSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    database: DatabaseName
    table: Annotated[str, Meta(description="Only this table or view.")] | None = None


class Found(Cut, frozen=True, kw_only=True, omit_defaults=True):
    columns: list[str]
    rows: list[list[object]]
    row_count: int


class Executed(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`rows_changed` counts those changed by triggers and cascades too; `returned` is of the last statement with rows."""

    database: str
    statements: int
    rows_changed: int
    size_bytes: int | None = None
    returned: Found | None = None
    note: str | None = None


class Schema(Cut, frozen=True, kw_only=True, omit_defaults=True):
    database: str
    tables: list[TableSchema] | list[str]


class Sql:
    def __init__(self, runner: SqlRunner | None = None) -> None:
        self._runner = runner or SqlRunner()

    async def execute(self, context: ToolContext, arguments: SqlExecute) -> str:
        name = _checked(arguments.database, arguments.sql)
        databases = context.databases
        earlier = await databases.result_of(context.idempotency_key)
        if earlier is not None:
            return earlier
        for _ in range(MAX_RUNS_OF_A_SCRIPT):
            image = await databases.load(name)
            outcome = await self._run("execute", arguments.sql, image)
            result = msgspec.json.encode(_executed(name, outcome, existed=image is not None)).decode()
            if outcome.image is None:
                return result
            try:
                return await databases.store(
                    name, outcome.image, replaces=image, idempotency_key=context.idempotency_key, result=result
                )
            except DatabaseChanged:
                continue
        raise ToolError(
            f"The database `{name}` is being changed by somebody else all the time. Nothing was changed; try again."
        )

    async def query(self, context: ToolContext, arguments: SqlQuery) -> Found:
        name = _checked(arguments.database, arguments.sql)
        image = await context.databases.load(name)
        if image is None:
            raise await _missing(context, name)
        outcome = await self._run("query", arguments.sql, image)
        return _found(outcome.found or Rows(columns=[], rows=[]))

    async def _run(self, mode: Mode, sql: str, image: DatabaseImage | None) -> Outcome:
        content = b"" if image is None else image.content
        unchanged = " Nothing was changed." if mode == "execute" else ""
        try:
            if mode == "query":
                return await self._runner.run(mode, sql, content)
            return await self._runner.run(
                mode, sql, content, max_rows=RETURNED_MAX_ROWS, result_max_bytes=RETURNED_MAX_BYTES
            )
        except SqlRefused as refused:
            raise ToolError(f"{_explained(refused)}{unchanged}") from None
        except SqlTookTooLong:
            raise ToolError(f"The SQL took too long and was stopped.{unchanged} Work on less at once.") from None
        except SqlFailed:
            raise ToolError(
                f"The SQL ended without a result, most likely for want of memory.{unchanged} Work on less at once."
            ) from None


async def schema(context: ToolContext, arguments: SqlSchema) -> Schema:
    name = _checked(arguments.database, "")
    tables = await context.databases.schema(name)
    if tables is None:
        raise await _missing(context, name)
    if arguments.table is not None:
        # SQLite takes names for the same whose ASCII letters differ in case.
        named = [table for table in tables if table.name.lower() == arguments.table.lower()]
        if not named:
            raise ToolError(
                f"The database `{name}` has no table or view of that name. It has: {_listed([table.name for table in tables])}."
            )
        tables = named
    if json_bytes(tables) <= RESULT_MAX_BYTES:
        return Schema(database=name, tables=tables)
    if arguments.table is not None:
        sql = (tables[0].sql or "")[:2000]
        return Schema(
            database=name,
            tables=[TableSchema(name=tables[0].name, type=tables[0].type, sql=sql, columns=[])],
            truncated=True,
            reason="size_cap",
            resume_hint="Query `pragma_table_xinfo('table')` for its columns, in parts.",
        )
    return Schema(
        database=name,
        tables=[table.name[:200] for table in tables],
        truncated=True,
        reason="size_cap",
        resume_hint="These are the names only. Ask for a single one with `table`.",
    )


def _checked(name: str, sql: str) -> str:
    try:
        check_database_name(name, "database")
        sql.encode()
    except InvalidInput as error:
        raise ToolError(
            f"`{error.message.partition(' ')[0]}` {error.message.partition(' ')[2]}. Nothing was run."
        ) from None
    except UnicodeEncodeError as error:
        raise ToolError(
            f"`sql` holds half of a surrogate pair at character {error.start + 1}, which is no text. Nothing was run."
        ) from None
    if "\0" in sql:
        raise ToolError(
            f"`sql` holds U+0000 at character {sql.index(chr(0)) + 1}. Write it as `char(0)`, or as a blob such as x'00'. "
            "Nothing was run."
        )
    return name


async def _missing(context: ToolContext, name: str) -> ToolError:
    names = [database.name for database in await context.databases.list()]
    return ToolError(
        f"There is no database `{name}`. There are: {_listed(names)}. "
        "`sql_execute` makes a new one of any name with its first CREATE TABLE."
    )


def _explained(refused: SqlRefused) -> str:
    error = refused.error[:1000]
    if refused.statement is None or refused.line is None:
        return f"That failed: {error}."
    text = " ".join((refused.text or "").split())
    if len(text) > _STATEMENT_SHOWN_CHARACTERS:
        text = text[:_STATEMENT_SHOWN_CHARACTERS] + "…"
    return f"Statement {refused.statement} (line {refused.line}) failed: {error}. The statement: {text}"


def _executed(name: str, outcome: Outcome, *, existed: bool) -> Executed:
    note = None
    if outcome.image is None:
        note = "This has changed nothing." if existed else "This has changed nothing, so there is no such database yet."
    elif not existed:
        note = f"The database `{name}` is new."
    return Executed(
        database=name,
        statements=outcome.statements,
        rows_changed=outcome.changed,
        size_bytes=outcome.image.size_bytes if outcome.image is not None else None,
        returned=_found(outcome.found) if outcome.found is not None else None,
        note=note,
    )


_HINTS: Final[dict[Literal["row_cap", "size_cap"], str]] = {
    "row_cap": "There are more rows. Use WHERE, aggregates, or LIMIT and OFFSET.",
    "size_cap": "There are more rows than fit. Select fewer columns, shorten values with substr(), or use LIMIT and OFFSET.",
}


def _found(found: Rows) -> Found:
    return Found(
        columns=found.columns,
        rows=found.rows,
        row_count=len(found.rows),
        truncated=found.reason is not None,
        reason=found.reason,
        resume_hint=_HINTS[found.reason] if found.reason is not None else None,
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name[:64]}`" for name in names[:20]) or "none"
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def capability(runner: SqlRunner | None = None) -> Capability:
    sql = Sql(runner)
    return Capability(
        id="session_sql_database",
        name="SQL Databases",
        description="SQLite databases of the session's own, for data the model collects, joins and counts.",
        category="Storage",
        icon="table",
        features=("sql_database",),
        system_prompt="""\
You have SQLite databases of your own, which stay for the whole session: write with `sql_execute`, read with `sql_query`, see \
what is there with `sql_schema`. Use them for data that is to be filtered, joined or counted. A script of `sql_execute` is all \
or nothing. Foreign keys are enforced. Other databases and virtual tables (FTS) are not available.""",
        tools=(
            Tool(
                name="sql_execute",
                display_name="Execute SQL",
                description="Run one or more SQLite statements that change a database: all of them or, when one fails, none. A "
                f"database that does not exist is made. Up to {MAX_DATABASES_PER_SESSION} databases of "
                f"{DATABASE_MAX_BYTES // 1024 // 1024} MB each.",
                arguments=SqlExecute,
                run=sql.execute,
                side_effect=SideEffect.IDEMPOTENT,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=TOOL_TIMEOUT_SECONDS,
            ),
            Tool(
                name="sql_query",
                display_name="Query SQL",
                description="Run one SQLite statement that only reads. Returns columns and rows, 1,000 at most.",
                arguments=SqlQuery,
                run=sql.query,
                side_effect=SideEffect.PURE,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=TOOL_TIMEOUT_SECONDS,
                readonly=True,
            ),
            Tool(
                name="sql_schema",
                display_name="SQL schema",
                description="Tables and views of a database: columns, keys, indexes and numbers of rows.",
                arguments=SqlSchema,
                run=schema,
                side_effect=SideEffect.PURE,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=30.0,
                readonly=True,
            ),
        ),
    )
