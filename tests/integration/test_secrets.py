"""Stored secrets as a whole: counted, moved to another key while servers write, checked, and missed at the start."""

from __future__ import annotations

import asyncio
import re
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
from piccolo.columns import Column
from piccolo.table import Table

from cli.keys import DEV_KEY_FILE, missing_keys
from cli.run import DevAddresses, StartFailure, check_keys
from db import tables
from db.database import Database
from db.secret_columns import (
    PAGE_ROWS,
    SECRET_COLUMNS,
    Unreadable,
    check_secrets,
    count_by_key,
    reencrypt,
)
from domain.errors import EncryptionNotConfigured
from domain.ids import DEFAULT_ORG_ID, uuid7
from domain.secret import Secret
from infra.encryption import CURRENT_KEY, PREVIOUS_KEY, Keyring, bound_to, generate_key
from infra.network import LOOPBACK
from infra.settings import Settings, load_settings
from tests.processes import Command, run

KEY_1: Final = generate_key("kek-v1")
KEY_2: Final = generate_key("kek-v2")
OLD: Final = Keyring.of(KEY_1, None)
BOTH: Final = Keyring.of(KEY_2, KEY_1)
NEW: Final = Keyring.of(KEY_2, None)

PLANTED: Final = "sk-planted-secret"
DEADLINE_SECONDS: Final = 30.0
NOWHERE: Final = f"{LOOPBACK}:1"
"""Port 1 refuses connections: who gets as far as Temporal says so."""


def nothing() -> None:
    pass


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    opened = await asyncpg.connect(dsn)
    yield opened
    await opened.close()


async def put_provider(connection: asyncpg.Connection, keyring: Keyring, text: str = PLANTED) -> UUID:
    row = uuid7()
    await connection.execute(
        "INSERT INTO providers (id, org_id, name, provider_type, credentials) VALUES ($1, $2, $3, 'openai', $4)",
        row,
        DEFAULT_ORG_ID,
        f"provider {row}",
        keyring.encrypt(text, bound_to=bound_to("providers", row, "credentials")),
    )
    return row


async def put_checkpoint(connection: asyncpg.Connection, keyring: Keyring, text: str = PLANTED) -> UUID:
    row = uuid7()
    await connection.execute(
        "INSERT INTO context_checkpoints (session_id, id, source_sequence, native, strategy) VALUES ($1, $2, 1, $3, 'x')",
        # Not in the order of `id`: the key of this table has two columns.
        uuid4(),
        row,
        keyring.encrypt(text, bound_to=bound_to("context_checkpoints", row, "native")),
    )
    return row


async def stored_at(connection: asyncpg.Connection, row: UUID) -> str | None:
    return await connection.fetchval("SELECT credentials FROM providers WHERE id = $1", row)


async def store_at(connection: asyncpg.Connection, row: UUID, stored: str | None) -> None:
    await connection.execute("UPDATE providers SET credentials = $2 WHERE id = $1", row, stored)


async def secret_at(connection: asyncpg.Connection, row: UUID, keyring: Keyring) -> str:
    stored = await stored_at(connection, row)
    assert stored is not None
    return keyring.decrypt(stored, bound_to=bound_to("providers", row, "credentials")).reveal()


# --- The list of columns ----------------------------------------------------------------------------------------------


def test_every_column_that_is_declared_secret_is_in_the_list() -> None:
    declared = {
        (table._meta.tablename, column._meta.name)
        for table in vars(tables).values()
        if isinstance(table, type) and issubclass(table, Table)
        for column in table._meta.columns
        if isinstance(column, Column) and column._meta.secret
    }
    assert declared
    assert declared <= {(column.table, column.column) for column in SECRET_COLUMNS}


@pytest.mark.parametrize("column", SECRET_COLUMNS, ids=lambda column: column.table)
async def test_a_listed_column_exists_with_its_primary_key(column, connection: asyncpg.Connection) -> None:
    kind = await connection.fetchval(
        "SELECT data_type FROM information_schema.columns WHERE table_name = $1 AND column_name = $2",
        column.table,
        column.column,
    )
    key = await connection.fetch(
        "SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey) "
        "WHERE indisprimary AND indrelid = $1::text::regclass",
        column.table,
    )
    assert kind == "text"
    assert {row["attname"] for row in key} == set(column.key_columns)
    assert column.id_column in column.key_columns


# --- Counting ---------------------------------------------------------------------------------------------------------


async def test_secrets_are_counted_by_key_over_all_columns(database: Database, connection: asyncpg.Connection) -> None:
    assert await count_by_key(database) == {}
    await put_provider(connection, OLD)
    await put_checkpoint(connection, OLD, "x" * 100_000)
    await put_checkpoint(connection, NEW)
    longest = generate_key("k" * 64)
    await put_provider(connection, Keyring.of(longest, None))
    clear = [await put_provider(connection, OLD) for _ in range(3)]
    await store_at(connection, clear[0], PLANTED)
    await store_at(connection, clear[1], f'{{"api_key": "{PLANTED}", "key_id": "{PLANTED}"}}')
    await store_at(connection, clear[2], None)
    assert await count_by_key(database) == {"kek-v1": 2, "kek-v2": 1, "k" * 64: 1, None: 2}


# --- Moving to another key --------------------------------------------------------------------------------------------


async def test_reencryption_moves_everything_to_the_current_key_and_a_second_run_finds_nothing_to_do(
    database: Database, connection: asyncpg.Connection
) -> None:
    pages = 2 * PAGE_ROWS + 1
    for number in range(pages):
        await put_checkpoint(connection, OLD, f"context {number}")
    providers = [await put_provider(connection, OLD, f"key {number}") for number in range(3)]
    current = await put_provider(connection, NEW, "current")
    untouched = await stored_at(connection, current)

    told: list[None] = []
    done = await reencrypt(database, BOTH, lambda: told.append(None))
    assert (done.reencrypted, done.already_current, done.unreadable, done.left) == (pages + 3, 1, (), {})
    assert len(told) == pages + 4
    assert [await secret_at(connection, row, NEW) for row in providers] == ["key 0", "key 1", "key 2"]
    assert await stored_at(connection, current) == untouched
    contexts = {
        NEW.decrypt(row["native"], bound_to=bound_to("context_checkpoints", row["id"], "native")).reveal()
        for row in await connection.fetch("SELECT id, native FROM context_checkpoints")
    }
    assert contexts == {f"context {number}" for number in range(pages)}

    before = await stored_at(connection, providers[0])
    again = await reencrypt(database, BOTH, nothing)
    assert (again.reencrypted, again.already_current, again.left) == (0, pages + 4, {})
    assert await stored_at(connection, providers[0]) == before


async def test_an_interrupted_reencryption_leaves_everything_readable_and_goes_on_when_run_again(
    database: Database, connection: asyncpg.Connection
) -> None:
    rows = [await put_provider(connection, OLD, f"key {number}") for number in range(10)]
    seen: list[None] = []

    def interrupt() -> None:
        seen.append(None)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await reencrypt(database, BOTH, interrupt)
    assert await count_by_key(database) == {"kek-v1": 6, "kek-v2": 4}
    assert [await secret_at(connection, row, BOTH) for row in rows] == [f"key {number}" for number in range(10)]

    done = await reencrypt(database, BOTH, nothing)
    assert (done.reencrypted, done.already_current, done.left) == (6, 4, {})
    assert [await secret_at(connection, row, NEW) for row in rows] == [f"key {number}" for number in range(10)]


async def waits_for_a_lock(connection: asyncpg.Connection) -> None:
    """Until another connection to this database waits for one."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await connection.fetchval(  # noqa: ASYNC110 # PostgreSQL tells nobody
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.01)


Write = Callable[[asyncpg.Connection, UUID], Awaitable[None]]


def writing(keyring: Keyring, text: str) -> Write:
    async def write(connection: asyncpg.Connection, row: UUID) -> None:
        await store_at(connection, row, keyring.encrypt(text, bound_to=bound_to("providers", row, "credentials")))

    return write


async def _delete(connection: asyncpg.Connection, row: UUID) -> None:
    await connection.execute("DELETE FROM providers WHERE id = $1", row)


async def _clear(connection: asyncpg.Connection, row: UUID) -> None:
    await store_at(connection, row, None)


@pytest.mark.parametrize(
    ("write", "after"),
    [
        (writing(OLD, "newer"), "newer"),
        (writing(BOTH, "newer"), "newer"),
        (_clear, None),
        (_delete, None),
    ],
    ids=["with the old key", "with the new key", "removed", "row deleted"],
)
async def test_what_is_written_between_reading_and_writing_a_row_wins(
    write: Write, after: str | None, dsn: str, database: Database, connection: asyncpg.Connection
) -> None:
    row = await put_provider(connection, OLD, "older")
    writer = await asyncpg.connect(dsn)
    try:
        transaction = writer.transaction()
        await transaction.start()
        await write(writer, row)
        running = asyncio.create_task(reencrypt(database, BOTH, nothing))
        await waits_for_a_lock(connection)
        await transaction.commit()
        done = await running
    finally:
        await writer.close()
    assert (done.unreadable, done.left) == ((), {})
    if after is None:
        assert await stored_at(connection, row) is None
    else:
        assert await secret_at(connection, row, NEW) == after


async def test_runs_side_by_side_with_writers_lose_no_write(database: Database, connection: asyncpg.Connection) -> None:
    rows = [await put_provider(connection, OLD, "0") for _ in range(20)]

    async def write(keyring: Keyring, mine: list[UUID]) -> None:
        for number in range(1, 6):
            for row in mine:
                envelope = keyring.encrypt(str(number), bound_to=bound_to("providers", row, "credentials"))
                await database.pool.execute("UPDATE providers SET credentials = $2 WHERE id = $1", row, envelope)

    await asyncio.gather(
        write(OLD, rows[:10]),
        write(BOTH, rows[10:]),
        reencrypt(database, BOTH, nothing),
        reencrypt(database, BOTH, nothing),
    )
    done = await reencrypt(database, BOTH, nothing)
    assert (done.unreadable, done.left) == ((), {})
    assert {await secret_at(connection, row, NEW) for row in rows} == {"5"}


async def test_what_a_server_with_the_old_key_writes_behind_a_run_is_reported_as_left(
    dsn: str, database: Database, connection: asyncpg.Connection
) -> None:
    row = await put_provider(connection, OLD)
    checkpoint = await put_checkpoint(connection, OLD)
    writer = await asyncpg.connect(dsn)
    try:
        async with writer.transaction():
            await writer.execute("SELECT FROM context_checkpoints WHERE id = $1 FOR UPDATE", checkpoint)
            running = asyncio.create_task(reencrypt(database, BOTH, nothing))
            await waits_for_a_lock(connection)
            # The run has been at the providers before.
            assert await secret_at(connection, row, NEW) == PLANTED
            await writing(OLD, "late")(connection, row)
        done = await running
    finally:
        await writer.close()
    assert done.reencrypted == 2
    assert done.left == {"kek-v1": 1}


async def test_what_cannot_be_read_stays_as_it_is_and_is_reported_without_its_content(
    database: Database, connection: asyncpg.Connection
) -> None:
    lost = await put_provider(connection, Keyring.of(generate_key("kek-v0"), None))
    fine = await put_provider(connection, OLD)
    clear = await put_provider(connection, OLD)
    await store_at(connection, clear, PLANTED)
    before = [await stored_at(connection, row) for row in (lost, clear)]

    done = await reencrypt(database, BOTH, nothing)
    assert [await stored_at(connection, row) for row in (lost, clear)] == before
    assert await secret_at(connection, fine, NEW) == PLANTED
    assert done.reencrypted == 1
    assert [(one.table, one.row, one.column) for one in done.unreadable] == [
        ("providers", lost, "credentials"),
        ("providers", clear, "credentials"),
    ]
    assert "`kek-v0`" in done.unreadable[0].problem
    assert done.left == {"kek-v0": 1, None: 1}
    assert PLANTED not in repr(done)


async def test_reencryption_without_a_key_is_refused(database: Database, connection: asyncpg.Connection) -> None:
    row = await put_provider(connection, OLD)
    with pytest.raises(EncryptionNotConfigured):
        await reencrypt(database, Keyring.of(None, None), nothing)
    assert await secret_at(connection, row, OLD) == PLANTED


# --- Checking ---------------------------------------------------------------------------------------------------------


async def test_a_check_finds_swapped_rows_and_damage_that_the_key_id_does_not_show(
    database: Database, connection: asyncpg.Connection
) -> None:
    one, two, damaged, fine = [await put_provider(connection, OLD, f"{PLANTED} {number}") for number in range(4)]
    first, second, third = [await stored_at(connection, row) for row in (one, two, damaged)]
    assert third is not None
    await store_at(connection, one, second)
    await store_at(connection, two, first)
    await store_at(connection, damaged, re.sub('"ciphertext":".{4}', '"ciphertext":"AAAA', third))

    checked = await check_secrets(database, OLD, nothing)
    assert (checked.readable, checked.by_key) == (1, {"kek-v1": 4})
    assert [one.row for one in checked.unreadable] == [one, two, damaged]
    assert {type(one) for one in checked.unreadable} == {Unreadable}
    assert PLANTED not in repr(checked)
    assert await secret_at(connection, fine, OLD) == f"{PLANTED} 3"


def environment(dsn: str, current: Secret | None = None, previous: Secret | None = None) -> dict[str, str]:
    return {
        "DEPLOYMENT_GRADE": "dev",
        "DATABASE_URL": dsn,
        "TEMPORAL_ADDRESS": NOWHERE,
        "HTTP_ADDR": f"{LOOPBACK}:0",
        CURRENT_KEY: current.reveal() if current else "",
        PREVIOUS_KEY: previous.reveal() if previous else "",
    }


async def test_the_commands_check_rotate_and_say_what_is_left(dsn: str, connection: asyncpg.Connection) -> None:
    row = await put_provider(connection, OLD)
    await put_checkpoint(connection, OLD)
    lost = await put_provider(connection, Keyring.of(generate_key("kek-v0"), None))

    unreadable = f"providers {lost} credentials: it was encrypted with key `kek-v0`, which is not configured\n"
    code, out, err = await run("secrets", "check", environment=environment(dsn, KEY_1))
    assert (code, err) == (1, "")
    assert out == f"{unreadable}Checked 3 secrets: 1 cannot be read.\nEncrypted: 2 with `kek-v1`, 1 with `kek-v0`.\n"

    code, out, err = await run("secrets", "reencrypt", environment=environment(dsn, KEY_2, KEY_1))
    assert (code, err) == (1, "")
    assert out.startswith(
        f"{unreadable}Encrypted 2 secrets with key `kek-v2`; 0 needed nothing; 1 cannot be read.\n"
        "Left under another key: 1 with `kek-v0`."
    )

    await connection.execute("DELETE FROM providers WHERE id = $1", lost)
    code, out, err = await run("secrets", "reencrypt", environment=environment(dsn, KEY_2, KEY_1))
    assert (code, err) == (0, "")
    assert out == (
        "Encrypted 0 secrets with key `kek-v2`; 2 needed nothing; 0 cannot be read.\n"
        "Nothing is left under another key: SECRETS_ENCRYPTION_KEY_PREVIOUS can be removed.\n"
    )
    code, out, err = await run("secrets", "check", environment=environment(dsn, KEY_2))
    assert (code, err) == (0, "")
    assert out == "Checked 2 secrets: all of them can be read.\nEncrypted: 2 with `kek-v2`.\n"
    assert await secret_at(connection, row, NEW) == PLANTED


async def test_a_generated_key_is_a_line_for_the_environment() -> None:
    code, out, err = await run("secrets", "generate-key", "--id", "kek-v7")
    assert (code, err) == (0, "")
    name, _, key = out.strip().partition("=")
    assert name == CURRENT_KEY
    assert Keyring.of(Secret(key), None).key_ids == ("kek-v7",)
    code, out, err = await run("secrets", "generate-key", "--id", "two words")
    assert (code, out) == (1, "")
    assert err.startswith("everruns: --id was given `two words`; a key id is ")


async def test_reencrypt_without_a_key_names_the_setting(dsn: str) -> None:
    code, out, err = await run("secrets", "reencrypt", environment=environment(dsn))
    assert (code, out) == (1, "")
    assert err.startswith("everruns: SECRETS_ENCRYPTION_KEY: it is not set; ")


# --- Starting ---------------------------------------------------------------------------------------------------------


def settings_of(dsn: str, current: Secret | None = None, previous: Secret | None = None) -> Settings:
    return load_settings({"LOG_FORMAT": "json", **environment(dsn, current, previous)})


async def test_nothing_needs_a_key_before_there_is_a_secret(dsn: str) -> None:
    await check_keys(settings_of(dsn))


async def test_a_start_with_every_key_that_is_needed_is_not_refused(dsn: str, connection: asyncpg.Connection) -> None:
    await put_provider(connection, OLD)
    await put_checkpoint(connection, NEW)
    await check_keys(settings_of(dsn, KEY_1, KEY_2))
    await check_keys(settings_of(dsn, KEY_2, KEY_1))


async def test_a_start_without_any_key_names_the_setting_what_is_stored_and_under_which_keys(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await put_provider(connection, OLD)
    await put_provider(connection, OLD)
    await put_checkpoint(connection, NEW)
    with pytest.raises(StartFailure) as caught:
        await check_keys(settings_of(dsn))
    assert str(caught.value) == (
        "SECRETS_ENCRYPTION_KEY: it is not set, and the database holds secrets encrypted with keys that are not given: "
        "2 with `kek-v1`, 1 with `kek-v2`. `everruns secrets check` lists them"
    )


async def test_a_start_without_one_of_the_keys_names_that_key_and_the_command_that_lists(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await put_provider(connection, OLD)
    await put_checkpoint(connection, NEW)
    with pytest.raises(StartFailure) as caught:
        await check_keys(settings_of(dsn, KEY_2))
    assert "1 with `kek-v1`. Given is `kek-v2`; set the missing one, here or as " in str(caught.value)
    assert "kek-v2`, 1" not in str(caught.value)
    assert "`everruns secrets check`" in str(caught.value)


async def test_a_schema_without_the_columns_is_told_with_the_command_that_helps(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("ALTER TABLE providers DROP COLUMN credentials")
    with pytest.raises(StartFailure, match="has an older schema; run `everruns migrate` first"):
        await check_keys(settings_of(dsn))


async def test_a_damaged_row_stops_no_start(database: Database, connection: asyncpg.Connection) -> None:
    row = await put_provider(connection, OLD)
    await store_at(connection, row, PLANTED)
    assert await missing_keys(database, OLD) is None
    assert await missing_keys(database, Keyring.of(None, None)) is None


@pytest.mark.parametrize("command", ["server", "worker"])
async def test_a_role_without_the_key_refuses_to_start_in_one_line(
    command: str, dsn: str, connection: asyncpg.Connection
) -> None:
    await put_provider(connection, OLD)
    code, out, err = await run(command, environment=environment(dsn))
    assert (code, out) == (1, "")
    (line,) = err.strip().splitlines()
    assert line.startswith("everruns: SECRETS_ENCRYPTION_KEY: it is not set, and the database holds secrets")


# --- Dev --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    """Open to the account PostgreSQL runs as, which pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="ev-data-", ignore_cleanup_errors=True) as path:
        Path(path).chmod(0o755)
        yield Path(path)


def read_private(ready: Path) -> DevAddresses:
    assert stat.S_IMODE(ready.stat().st_mode) == 0o600
    return msgspec.json.decode(ready.read_bytes(), type=DevAddresses)


async def dev_addresses(ready: Path, *arguments: str | Path) -> DevAddresses:
    """Of a dev stack that was started, stored a secret (or reads the one that is there), and was stopped."""
    arguments = ("dev", "--addr", f"{LOOPBACK}:0", "--no-worker", "--ready-file", ready, *arguments)
    async with Command(*arguments) as dev:
        await dev.printed("Stop it:  Ctrl-C")
        addresses = read_private(ready)
        keyring = Keyring.of(Secret(addresses.environment[CURRENT_KEY]), None)
        connection = await asyncpg.connect(addresses.database_url)
        stored = await connection.fetchval("SELECT id FROM providers WHERE credentials IS NOT NULL")
        if stored is None:
            await put_provider(connection, keyring)
        else:
            assert await secret_at(connection, stored, keyring) == PLANTED
        await connection.close()
        code, out, err = await run("secrets", "check", environment=addresses.environment)
        assert (code, err) == (0, "")
        assert out.startswith("Checked 1 secret: all of them can be read.")
        assert addresses.environment[CURRENT_KEY].partition(":")[2] not in dev.out + dev.err
        dev.interrupt()
        assert await dev.wait() == 0
    return addresses


async def test_dev_makes_a_key_that_its_workers_get_and_that_a_restart_still_has(directory: Path) -> None:
    with_data = ("--data-dir", directory / "data")
    first = await dev_addresses(directory / "ready.json", *with_data)
    second = await dev_addresses(directory / "ready.json", *with_data)
    assert first.environment[CURRENT_KEY] == second.environment[CURRENT_KEY]
    kept = directory / "data" / DEV_KEY_FILE
    assert (kept.read_text(), stat.S_IMODE(kept.stat().st_mode)) == (first.environment[CURRENT_KEY], 0o600)
