"""A session's values and secrets: over the API, through the port that tools use, and at rest."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import asyncpg
import httpx
import msgspec
import pytest
import structlog

from api.app import create_app
from api.services import Services
from db.database import Database
from db.event_log import EventLog
from db.secret_columns import check_secrets, count_by_key
from db.session_resources import DatabaseResources
from db.session_storage import DatabaseStorage
from domain.ids import Prefix, new_id, parse_id
from domain.limits import (
    MAX_SECRETS_PER_SESSION,
    MAX_VALUES_PER_SESSION,
    SECRET_MAX_BYTES,
    VALUE_MAX_BYTES,
    VALUES_MAX_BYTES,
)
from domain.secret import Secret
from domain.session_storage import StorageProblem
from domain.turns import SessionGone
from infra.encryption import CURRENT_KEY, PREVIOUS_KEY, Keyring, generate_key
from infra.network import LOOPBACK
from tests.conftest import API, ClientOf, Make
from tests.processes import run
from tests.stack import Stack, of_type

PLANTED: Final = "sk-planted-0123456789abcdefghij"
NO_KEYS: Final = Keyring.of(None, None)


@pytest.fixture
async def session(make_session: Make) -> str:
    return (await make_session())["id"]


@pytest.fixture
def storage(database: Database, keyring: Keyring, session: str) -> DatabaseStorage:
    return DatabaseStorage(database.pool, keyring, session)


def url(session_id: str, what: str = "secrets") -> str:
    return f"{API}/sessions/{session_id}/storage/{what}"


async def put(client: httpx.AsyncClient, session_id: str, **secrets: str) -> httpx.Response:
    return await client.put(url(session_id), json={"secrets": secrets})


async def names(client: httpx.AsyncClient, session_id: str) -> list[str]:
    response = await client.get(url(session_id))
    assert response.status_code == 200, response.text
    return [secret["name"] for secret in response.json()["data"]]


async def dump(pool: asyncpg.Pool) -> str:
    """Every row of every table, as text."""
    tables = await pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    rows = [await pool.fetch(f'SELECT t::text FROM "{table["tablename"]}" t') for table in tables]
    text = "\n".join(row[0] for found in rows for row in found)
    assert "session_secrets" in {table["tablename"] for table in tables}
    assert "ciphertext" in text
    return text


def nothing() -> None:
    pass


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_secrets_are_set_replaced_and_listed_by_name_only(
    client: httpx.AsyncClient, session: str, storage: DatabaseStorage
) -> None:
    assert (await client.get(url(session))).json() == {"data": []}
    first = await put(client, session, TOKEN="first", _other9="x")
    assert (first.status_code, first.json()) == (200, {"count": 2})
    before = {secret["name"]: secret for secret in (await client.get(url(session))).json()["data"]}
    assert {frozenset(secret) for secret in before.values()} == {frozenset({"name", "created_at", "updated_at"})}
    assert (await put(client, session, TOKEN="second")).json() == {"count": 1}
    after = {secret["name"]: secret for secret in (await client.get(url(session))).json()["data"]}
    assert list(after) == ["TOKEN", "_other9"]
    assert after["_other9"] == before["_other9"]
    assert after["TOKEN"]["created_at"] == before["TOKEN"]["created_at"]
    assert after["TOKEN"]["updated_at"] > before["TOKEN"]["created_at"]
    assert await storage.get_secret("TOKEN") == Secret("second")
    assert (await put(client, session)).json() == {"count": 0}


async def test_values_are_listed_with_their_keys(
    client: httpx.AsyncClient, session: str, storage: DatabaseStorage
) -> None:
    await storage.set("b", "größer")
    await storage.set("B/1", '{"a": 1}')
    listed = (await client.get(url(session, "keys"))).json()["data"]
    assert [(one["key"], one["value"]) for one in listed] == [("B/1", '{"a": 1}'), ("b", "größer")]
    assert set(listed[0]) == {"key", "value", "created_at", "updated_at"}


async def test_the_capability_gives_the_session_its_features(make_session: Make) -> None:
    made = await make_session(harness_name="base", capabilities=[{"ref": "session_storage"}, {"ref": "session"}])
    assert made["features"] == ["key_value", "secrets"]


@pytest.mark.parametrize(
    ("secrets", "field", "code"),
    [
        ({"not a name": "x"}, "secrets", "invalid_input"),
        ({"1A": "x"}, "secrets", "invalid_input"),
        ({"A" * 129: "x"}, "secrets", "invalid_input"),
        ({"A": ""}, "secrets.A", "invalid_input"),
        ({"A": "a\0b"}, "secrets.A", "invalid_input"),
        ({"A": "x" * (SECRET_MAX_BYTES + 1)}, "secrets.A", "input_too_large"),
        ({"A": "ü" * (SECRET_MAX_BYTES // 2 + 1)}, "secrets.A", "input_too_large"),
        ({f"A{n}": "x" for n in range(MAX_SECRETS_PER_SESSION + 1)}, "secrets", "input_too_large"),
        ({"A": 17}, "secrets[...]", "invalid_input"),
        ({"A": None}, "secrets[...]", "invalid_input"),
        ([], "secrets", "invalid_input"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_one_bad_secret_stores_none_and_the_error_names_the_field(
    client: httpx.AsyncClient, session: str, secrets: Any, field: str, code: str
) -> None:
    if isinstance(secrets, dict):
        secrets = {"FINE": "x", **secrets}
    refused = await client.put(url(session), json={"secrets": secrets})
    problem = refused.json()
    assert (refused.status_code, problem["code"], problem["field"]) == (400, code, field)
    assert refused.headers["content-type"] == "application/problem+json"
    assert await names(client, session) == []


async def test_a_body_without_secrets_names_what_is_missing(client: httpx.AsyncClient, session: str) -> None:
    refused = await client.put(url(session), json={})
    assert (refused.status_code, refused.json()["field"]) == (400, "secrets")


async def test_the_largest_secret_is_stored(client: httpx.AsyncClient, session: str, storage: DatabaseStorage) -> None:
    largest = "ü" * (SECRET_MAX_BYTES // 2)
    assert (await put(client, session, **{"A" * 128: largest})).status_code == 200
    assert await storage.get_secret("A" * 128) == Secret(largest)


async def test_a_full_session_takes_no_other_secret_but_replaces_what_it_has(
    client: httpx.AsyncClient, session: str
) -> None:
    full = {f"A{number}": "x" for number in range(MAX_SECRETS_PER_SESSION)}
    assert (await put(client, session, **full)).json() == {"count": MAX_SECRETS_PER_SESSION}
    assert (await put(client, session, **full)).status_code == 200
    refused = await put(client, session, A1="y", OTHER="x")
    assert (refused.status_code, refused.json()["code"]) == (409, "resource_limit")
    assert "OTHER" not in await names(client, session)


@pytest.mark.parametrize(("method", "what"), [("GET", "keys"), ("GET", "secrets"), ("PUT", "secrets")])
async def test_a_session_that_is_not_there_has_no_storage(
    client: httpx.AsyncClient, session: str, method: str, what: str
) -> None:
    body = {"secrets": {"A": "x"}} if method == "PUT" else None
    assert (await client.delete(f"{API}/sessions/{session}")).status_code == 204
    for missing in (new_id(Prefix.SESSION), session):
        gone = await client.request(method, url(missing, what), json=body)
        assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
    malformed = await client.request(method, url("nope", what), json=body)
    assert (malformed.status_code, malformed.json()["code"]) == (400, "malformed_id")


async def test_without_a_key_secrets_are_refused_and_nothing_is_stored(
    services: Services, client_of: ClientOf, session: str
) -> None:
    async with client_of(create_app(dataclasses.replace(services, keyring=NO_KEYS))) as keyless:
        refused = await put(keyless, session, TOKEN=PLANTED)
        assert (refused.status_code, refused.json()["code"]) == (503, "encryption_not_configured")
        assert PLANTED not in refused.text
        assert await names(keyless, session) == []


async def test_a_planted_secret_is_in_no_answer_log_or_table(
    client: httpx.AsyncClient,
    database: Database,
    session: str,
    storage: DatabaseStorage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        answers = [
            await put(client, session, TOKEN=PLANTED),
            await put(client, session, TOKEN=PLANTED, OTHER=f"{PLANTED}\0"),
            await put(client, session, TOKEN=PLANTED * SECRET_MAX_BYTES),
            await put(client, session, **{PLANTED: PLANTED}),
            await put(client, new_id(Prefix.SESSION), TOKEN=PLANTED),
            await client.put(url(session), json={"secrets": PLANTED}),
            await client.put(url(session), json={"secrets": {"TOKEN": [PLANTED]}}),
            await client.put(url(session), json={"secrets": [PLANTED]}),
            await client.put(
                url(session),
                content=f'{{"secrets": {{"TOKEN": "{PLANTED}"',
                headers={"Content-Type": "application/json"},
            ),
            await client.put(url(session), content=PLANTED, headers={"Content-Type": "text/plain"}),
            await client.get(url(session)),
            await client.get(url(session, "keys")),
            await client.get(f"{API}/sessions/{session}"),
            await client.get(f"{API}/sessions/{session}/events"),
        ]
        assert repr(await storage.get_secret("TOKEN")) == "Secret(***)"
        with pytest.raises(StorageProblem) as unreadable:
            await DatabaseStorage(database.pool, NO_KEYS, session).get_secret("TOKEN")
    assert [answer.status_code for answer in answers] == [200, *[400] * 3, 404, *[400] * 5, *[200] * 4]
    assert not [answer.text for answer in answers if PLANTED in answer.text]
    assert not [line for line in lines if PLANTED in str(line)]
    assert PLANTED not in caplog.text
    assert PLANTED not in f"{unreadable.value!r} {unreadable.value.__cause__!r}"
    assert PLANTED not in await dump(database.pool)


# --- the port: values -------------------------------------------------------------------------------------------------


async def test_a_value_is_set_read_replaced_and_deleted(storage: DatabaseStorage) -> None:
    assert await storage.get("a") is None
    first = await storage.set("a", "1")
    second = await storage.set("a", "")
    assert (second.key, second.value, second.created_at) == ("a", "", first.created_at)
    assert second.updated_at >= first.updated_at
    assert await storage.get("a") == second
    assert await storage.keys() == [second]
    assert (await storage.delete("a"), await storage.delete("a")) == (True, False)
    assert await storage.keys() == []


async def test_a_session_sees_nothing_of_another(
    database: Database, keyring: Keyring, storage: DatabaseStorage, make_session: Make
) -> None:
    await storage.set("a", "mine")
    await storage.set_secret("A", Secret("mine"))
    other = DatabaseStorage(database.pool, keyring, (await make_session())["id"])
    assert (await other.get("a"), await other.keys(), await other.get_secret("A"), await other.secrets()) == (
        None,
        [],
        None,
        [],
    )
    assert (await other.delete("a"), await other.delete_secret("A")) == (False, False)
    await other.set("a", "theirs")
    await other.set_secret("A", Secret("theirs"))
    found = await storage.get("a")
    assert found is not None
    assert (found.value, await storage.get_secret("A")) == ("mine", Secret("mine"))


@pytest.mark.parametrize("key", ["", "a b", "a\0", "ключ", "a" * 256, "a%", "\ud800"])
async def test_a_malformed_key_is_a_problem_of_every_operation(storage: DatabaseStorage, key: str) -> None:
    for attempt in (storage.get(key), storage.set(key, "x"), storage.delete(key)):
        with pytest.raises(StorageProblem, match="key must be 1 to 255"):
            await attempt
    assert await storage.keys() == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [("x" * (VALUE_MAX_BYTES + 1), "65536 bytes"), ("ü" * VALUE_MAX_BYTES, "65536 bytes"), ("a\0", "U+0000")],
)
async def test_a_value_that_cannot_be_stored_is_a_problem(storage: DatabaseStorage, value: str, problem: str) -> None:
    await storage.set("a", "kept")
    with pytest.raises(StorageProblem) as caught:
        await storage.set("a", value)
    assert problem in str(caught.value)
    found = await storage.get("a")
    assert found is not None
    assert found.value == "kept"


async def fill(database: Database, session_id: str, count: int, size_bytes: int) -> None:
    await database.pool.execute(
        "INSERT INTO session_values (session_id, key, value) SELECT $1, 'k' || n, repeat('x', $3) FROM generate_series(1, $2) n",
        parse_id(Prefix.SESSION, session_id),
        count,
        size_bytes,
    )


async def test_a_session_full_of_keys_takes_no_other_but_replaces_what_it_has(
    database: Database, session: str, storage: DatabaseStorage
) -> None:
    await fill(database, session, MAX_VALUES_PER_SESSION, 1)
    assert (await storage.set("k1", "new")).value == "new"
    with pytest.raises(StorageProblem, match=f"may hold {MAX_VALUES_PER_SESSION} values"):
        await storage.set("other", "x")
    await storage.delete("k1")
    await storage.set("other", "x")


async def test_a_session_full_of_bytes_takes_what_is_left_and_no_more(
    database: Database, session: str, storage: DatabaseStorage
) -> None:
    await fill(database, session, VALUES_MAX_BYTES // VALUE_MAX_BYTES, VALUE_MAX_BYTES)
    await storage.set("k1", "x" * (VALUE_MAX_BYTES - 2))
    with pytest.raises(StorageProblem, match=f"{VALUES_MAX_BYTES} bytes together"):
        await storage.set("a", "xyz")
    await storage.set("a", "ü")


async def test_concurrent_sets_of_one_key_leave_one_value_that_somebody_wrote(storage: DatabaseStorage) -> None:
    written = await asyncio.gather(*(storage.set("a", str(number)) for number in range(10)))
    assert sorted(one.value for one in written) == [str(number) for number in range(10)]
    (left,) = await storage.keys()
    assert left.value in {one.value for one in written}
    assert left.updated_at == max(one.updated_at for one in written)


async def test_concurrent_sets_do_not_get_past_the_limit(
    database: Database, session: str, storage: DatabaseStorage
) -> None:
    await fill(database, session, MAX_VALUES_PER_SESSION - 2, 1)
    outcomes = await asyncio.gather(*(storage.set(f"new{n}", "x") for n in range(8)), return_exceptions=True)
    assert len([one for one in outcomes if isinstance(one, StorageProblem)]) == 6
    assert len(await storage.keys()) == MAX_VALUES_PER_SESSION


# --- the port: secrets ------------------------------------------------------------------------------------------------


async def test_a_tool_sets_reads_and_deletes_a_secret(storage: DatabaseStorage) -> None:
    stored = await storage.set_secret("TOKEN", Secret(PLANTED))
    assert await storage.secrets() == [stored]
    assert await storage.get_secret("TOKEN") == Secret(PLANTED)
    assert (await storage.delete_secret("TOKEN"), await storage.delete_secret("TOKEN")) == (True, False)
    assert await storage.get_secret("TOKEN") is None


async def test_concurrent_sets_of_one_secret_leave_one_that_can_be_read(
    client: httpx.AsyncClient, session: str, storage: DatabaseStorage
) -> None:
    answers = await asyncio.gather(*(put(client, session, A=str(number), B=str(number)) for number in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert await names(client, session) == ["A", "B"]
    left = await storage.get_secret("A")
    assert left is not None
    assert left.reveal() in {str(number) for number in range(8)}
    assert await storage.get_secret("B") == left


async def test_without_a_key_a_tool_learns_why_in_words_without_the_secret(
    database: Database, session: str, storage: DatabaseStorage
) -> None:
    keyless = DatabaseStorage(database.pool, NO_KEYS, session)
    with pytest.raises(StorageProblem, match="SECRETS_ENCRYPTION_KEY is not set") as caught:
        await keyless.set_secret("TOKEN", Secret(PLANTED))
    assert PLANTED not in repr(caught.value)
    await storage.set_secret("TOKEN", Secret(PLANTED))
    with structlog.testing.capture_logs() as lines, pytest.raises(StorageProblem, match="has to be set again"):
        await keyless.get_secret("TOKEN")
    (line,) = lines
    assert (line["reason"], line["place"].partition(":")[0]) == ("unknown_key", "session_secrets")
    assert [secret.name for secret in await keyless.secrets()] == ["TOKEN"]


async def test_a_sealed_value_opens_in_no_row_but_its_own(
    database: Database, keyring: Keyring, session: str, storage: DatabaseStorage, make_session: Make
) -> None:
    other_session = (await make_session())["id"]
    other = DatabaseStorage(database.pool, keyring, other_session)
    await storage.set_secret("A", Secret("of a"))
    await storage.set_secret("B", Secret("of b"))
    await other.set_secret("A", Secret("of other"))
    move = """UPDATE session_secrets SET value = (SELECT value FROM session_secrets WHERE session_id = $1 AND name = 'A')
        WHERE session_id = $2 AND name = $3"""
    key, other_key = parse_id(Prefix.SESSION, session), parse_id(Prefix.SESSION, other_session)
    await database.pool.execute(move, key, key, "B")
    await database.pool.execute(move, key, other_key, "A")
    for place, name in ((storage, "B"), (other, "A")):
        with pytest.raises(StorageProblem, match="cannot be read"):
            await place.get_secret(name)
    assert await storage.get_secret("A") == Secret("of a")
    checked = await check_secrets(database, keyring, nothing)
    assert (checked.readable, {(one.table, one.column) for one in checked.unreadable}, len(checked.unreadable)) == (
        1,
        {("session_secrets", "value")},
        2,
    )
    await storage.set_secret("B", Secret("again"))
    assert await storage.get_secret("B") == Secret("again")


async def test_a_secret_set_again_keeps_its_row_and_gets_a_new_envelope(
    database: Database, storage: DatabaseStorage
) -> None:
    rows: list[asyncpg.Record] = []
    for _ in range(2):
        await storage.set_secret("A", Secret("same"))
        rows += await database.pool.fetch("SELECT id, value FROM session_secrets")
    assert rows[0]["id"] == rows[1]["id"]
    assert rows[0]["value"] != rows[1]["value"]


async def test_the_commands_check_and_reencrypt_the_secrets_of_sessions(
    dsn: str, database: Database, session: str
) -> None:
    old, new = generate_key("kek-v1"), generate_key("kek-v2")
    await DatabaseStorage(database.pool, Keyring.of(old, None), session).set_secret("TOKEN", Secret(PLANTED))
    environment = {
        "DEPLOYMENT_GRADE": "dev",
        "DATABASE_URL": dsn,
        "TEMPORAL_ADDRESS": f"{LOOPBACK}:1",
        "HTTP_ADDR": f"{LOOPBACK}:0",
    }
    keys = {CURRENT_KEY: new.reveal(), PREVIOUS_KEY: old.reveal()}
    code, out, err = await run("secrets", "check", environment={**environment, **keys})
    assert (code, err) == (0, "")
    assert out == "Checked 1 secret: all of them can be read.\nEncrypted: 1 with `kek-v1`.\n"
    code, out, err = await run("secrets", "reencrypt", environment={**environment, **keys})
    assert (code, err) == (0, "")
    assert out.startswith("Encrypted 1 secret with key `kek-v2`")
    moved = DatabaseStorage(database.pool, Keyring.of(new, None), session)
    assert await moved.get_secret("TOKEN") == Secret(PLANTED)


# --- a deleted session ------------------------------------------------------------------------------------------------


async def test_nothing_is_left_of_the_storage_of_a_deleted_session_and_nothing_can_be_stored(
    client: httpx.AsyncClient, database: Database, keyring: Keyring, session: str, storage: DatabaseStorage
) -> None:
    await storage.set("a", "1")
    await storage.set_secret("A", Secret("x"))
    await client.delete(f"{API}/sessions/{session}")
    assert (await storage.get("a"), await storage.keys()) == (None, [])
    assert (await storage.get_secret("A"), await storage.secrets()) == (None, [])
    attempts = (
        storage.set("a", "2"),
        storage.delete("a"),
        storage.set_secret("A", Secret("y")),
        storage.delete_secret("A"),
    )
    for attempt in attempts:
        with pytest.raises(StorageProblem, match="no session"):
            await attempt
    assert await database.pool.fetchval("SELECT count(*) FROM session_values") == 0
    assert await count_by_key(database) == {}
    assert (await check_secrets(database, keyring, nothing)).readable == 0


async def test_a_write_that_waited_for_the_delete_finds_the_session_gone(
    database: Database, session: str, storage: DatabaseStorage
) -> None:
    async with database.transaction() as connection:
        await connection.execute(
            "UPDATE sessions SET deleted_at = now() WHERE id = $1", parse_id(Prefix.SESSION, session)
        )
        writing = asyncio.create_task(storage.set("a", "1"))
        async with asyncio.timeout(30):
            while not await connection.fetchval(  # noqa: ASYNC110 # PostgreSQL tells nobody
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
            ):
                await asyncio.sleep(0.01)
    with pytest.raises(StorageProblem, match="no session"):
        await writing
    assert await database.pool.fetchval("SELECT count(*) FROM session_values") == 0


# --- what a session is ------------------------------------------------------------------------------------------------


@pytest.fixture
def resources(database: Database, keyring: Keyring) -> DatabaseResources:
    return DatabaseResources(database.pool, keyring)


async def titles(services: Services, session_id: str) -> list[dict[str, Any]]:
    log: EventLog = services.log
    events = await log.read(session_id, after_sequence=0, limit=100, types=["session.title.updated"])
    return [msgspec.json.decode(event.data) for event in events]


async def test_a_title_is_set_once_and_told_once(
    client: httpx.AsyncClient, services: Services, resources: DatabaseResources, make_session: Make
) -> None:
    session_id = (await make_session(title="Old"))["id"]
    await asyncio.gather(*(resources.set_title(session_id, "New") for _ in range(4)))
    assert (await client.get(f"{API}/sessions/{session_id}")).json()["title"] == "New"
    assert await titles(services, session_id) == [{"title": "New", "previous_title": "Old"}]


async def test_session_info_names_agent_and_harness(
    resources: DatabaseResources, make_agent: Make, make_session: Make
) -> None:
    agent = await make_agent(name="helper", display_name="The Helper")
    made = await make_session(agent_id=agent["id"], title="A title", locale="uk-UA")
    info = await resources.session_info(made["id"])
    assert (info.id, info.title, info.locale, info.created_at) == (made["id"], "A title", "uk-UA", made["created_at"])
    assert (info.agent, info.agent_id, info.harness) == ("The Helper", agent["id"], "Generic")
    assert (info.model, info.turn_count, info.usage.input_tokens) == (None, 0, 0)


async def test_a_deleted_session_has_no_title_to_set(
    client: httpx.AsyncClient, services: Services, resources: DatabaseResources, session: str
) -> None:
    await client.delete(f"{API}/sessions/{session}")
    with pytest.raises(SessionGone):
        await resources.set_title(session, "New")
    with pytest.raises(SessionGone):
        await resources.session_info(session)
    assert await titles(services, session) == []


# --- in a turn --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(environment={"LOG_LEVEL": "debug"}) as running:
        yield running


async def test_a_turn_with_every_operation_leaves_the_secret_in_no_event_log_file_or_table(stack: Stack) -> None:
    session_id = await stack.create_session(
        title="Old", capabilities=[{"ref": "session_storage"}, {"ref": "session", "config": {"auto_title": True}}]
    )
    answer = await stack.client.put(
        f"sessions/{session_id}/storage/secrets", json={"secrets": {"TOKEN": PLANTED, "OTHER": f"{PLANTED}-2"}}
    )
    assert answer.json() == {"count": 2}
    calls = [
        ("kv_store", {"operation": "set", "key": "a", "value": "one"}),
        ("kv_store", {"operation": "get", "key": "a"}),
        ("kv_store", {"operation": "list"}),
        ("kv_store", {"operation": "delete", "key": "b"}),
        ("secret_store", {"operation": "list"}),
        ("secret_store", {"operation": "get", "name": "TOKEN"}),
        ("secret_store", {"operation": "set", "name": "TOKEN"}),
        ("secret_store", {"operation": "delete", "name": "OTHER"}),
        ("get_session_info", {}),
        ("write_session_title", {"title": "New"}),
    ]
    tool_calls = [{"id": f"call_{n}", "name": name, "arguments": given} for n, (name, given) in enumerate(calls)]
    script = {"mode": "script", "turns": [{"tool_calls": tool_calls}, {"text": "Done."}]}
    log = await stack.ask(session_id, "go", llmsim=script)
    done = {data["tool_call_id"]: data for data in of_type(log, "tool.completed")}
    failed = [call_id for call_id, data in done.items() if not data["success"]]
    assert failed == ["call_6"]
    assert f"/v1/sessions/{session_id}/storage/secrets" in str(done["call_6"]["error"])

    def result(number: int) -> Any:
        (part,) = done[f"call_{number}"]["result"]  # type: ignore[misc]
        return part["text"]  # type: ignore[index]

    assert result(1) == "one"
    assert msgspec.json.decode(result(2)) == {"keys": ["a"], "count": 1}
    assert msgspec.json.decode(result(4)) == {"secrets": ["OTHER", "TOKEN"]}
    assert msgspec.json.decode(result(5))["exists"] is True
    info = msgspec.json.decode(result(8))
    assert (info["id"], info["turn_count"], info["model"]) == (session_id, 1, "llmsim-model")
    assert info["usage"]["output_tokens"] > 0
    assert of_type(log, "session.title.updated") == [{"title": "New", "previous_title": "Old"}]
    assert (await stack.session(session_id))["title"] == "New"

    left = (await stack.client.get(f"sessions/{session_id}/storage/secrets")).json()["data"]
    assert [secret["name"] for secret in left] == ["TOKEN"]
    assert not [event for event in await stack.check(session_id) if PLANTED.encode() in event.data + event.context]
    assert PLANTED not in await dump(stack.pool)
    written = [path for path in stack.directory.rglob("*") if path.is_file()]
    assert any("everruns" in path.read_text(errors="replace") for path in written)
    assert not [path for path in written if PLANTED in path.read_text(errors="replace")]
