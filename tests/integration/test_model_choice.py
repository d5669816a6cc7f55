"""Which model a step calls: the order of resolution, fallbacks, circuit breakers, and what makes a model unusable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from db.circuit_breakers import FAILURES_TO_OPEN, note_failure, note_success
from db.database import Database
from db.model_choice import ModelChoice, ModelChooser, is_guarded
from db.providers import endpoint_of
from domain.config import TurnConfig
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, new_id, parse_id, uuid7
from domain.model import ModelErrorKind
from domain.secret import Secret
from infra.encryption import Keyring, bound_to, generate_key

KEYRING = Keyring.of(generate_key("kek-v1"), None)


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    async with database.pool.acquire() as acquired:
        yield acquired  # type: ignore[misc]  # a pool's proxy


async def add_provider(connection: asyncpg.Connection, provider_type: str = "openai", key: str | None = "sk-1") -> UUID:
    row = uuid7()
    sealed = KEYRING.encrypt(f'{{"api_key":"{key}"}}', bound_to=bound_to("providers", row, "credentials"))
    await connection.execute(
        "INSERT INTO providers (id, org_id, name, provider_type, credentials) VALUES ($1, 1, 'P', $2, $3)",
        row,
        provider_type,
        sealed if key else None,
    )
    return row


async def add_model(connection: asyncpg.Connection, name: str, provider: UUID | None = None, **fields: object) -> str:
    row = uuid7()
    await connection.execute(
        "INSERT INTO models (id, org_id, provider_id, model_id, display_name, enabled) VALUES ($1, 1, $2, $3, $3, $4)",
        row,
        provider or await add_provider(connection),
        name,
        fields.get("enabled", True),
    )
    return format_id(Prefix.MODEL, row)


def chooser(*, system: str | None = None, default_keys: dict[str, Secret] | None = None) -> ModelChooser:
    return ModelChooser(lambda row: endpoint_of(row, KEYRING, default_keys or {}), system_model=system)


async def choose(connection: asyncpg.Connection, config: TurnConfig, first: int = 0, **options: object) -> ModelChoice:
    return await chooser(**options).choose(connection, DEFAULT_ORG_ID, config, first)  # type: ignore[arg-type]


def name_of(choice: ModelChoice) -> str | None:
    return choice.model and choice.model.name


async def open_breaker(database: Database, model_id: str) -> None:
    for _ in range(FAILURES_TO_OPEN):
        await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, model_id))


async def rewind(connection: asyncpg.Connection, model_id: str, by: timedelta) -> None:
    """As if the breaker's times lay this much further back."""
    await connection.execute(
        """UPDATE circuit_breakers SET half_open_at = half_open_at - $2::interval,
           window_started_at = window_started_at - $2::interval WHERE model_id = $1""",
        parse_id(Prefix.MODEL, model_id),
        by,
    )


async def state_of(connection: asyncpg.Connection, model_id: str) -> str | None:
    return await connection.fetchval(
        "SELECT state FROM circuit_breakers WHERE model_id = $1", parse_id(Prefix.MODEL, model_id)
    )


# Order


async def test_configuration_goes_before_the_organizations_default_and_that_before_the_installations(
    connection: asyncpg.Connection,
) -> None:
    configured, of_org = await add_model(connection, "configured"), await add_model(connection, "of-org")
    await add_model(connection, "of-system")
    assert name_of(await choose(connection, TurnConfig())) is None
    assert name_of(await choose(connection, TurnConfig(), system="of-system")) == "of-system"
    await connection.execute("UPDATE organizations SET default_model_id = $1", parse_id(Prefix.MODEL, of_org))
    assert name_of(await choose(connection, TurnConfig(), system="of-system")) == "of-org"
    assert name_of(await choose(connection, TurnConfig(model_id=configured), system="of-system")) == "configured"


async def test_the_installations_model_is_skipped_while_it_is_disabled(connection: asyncpg.Connection) -> None:
    await add_model(connection, "off", enabled=False)
    assert name_of(await choose(connection, TurnConfig(), system="off")) is None


async def test_a_model_that_does_not_exist_or_is_disabled_gives_way_to_its_fallback(
    connection: asyncpg.Connection,
) -> None:
    disabled, second = await add_model(connection, "off", enabled=False), await add_model(connection, "second")
    for missing in (disabled, new_id(Prefix.MODEL)):
        choice = await choose(connection, TurnConfig(model_id=missing, fallback_model_ids=[second]))
        assert name_of(choice) == "second"
        assert name_of(await choose(connection, TurnConfig(model_id=missing))) is None


async def test_a_turn_that_left_its_model_stays_with_the_fallback_and_says_why(connection: asyncpg.Connection) -> None:
    first, second = await add_model(connection, "first"), await add_model(connection, "second")
    choice = await choose(connection, TurnConfig(model_id=first, fallback_model_ids=[second]), 1)
    assert choice.model is not None
    assert choice.model.instead_of is not None
    assert (choice.model.name, choice.model.instead_of.model, choice.model.instead_of.reason) == (
        "second",
        "first",
        "exhausted",
    )


async def test_the_next_model_after_one_is_the_next_that_exists(connection: asyncpg.Connection) -> None:
    first, third = await add_model(connection, "first"), await add_model(connection, "third")
    config = TurnConfig(model_id=first, fallback_model_ids=[new_id(Prefix.MODEL), third])
    assert await chooser().next_after(connection, DEFAULT_ORG_ID, config, 0) == 2
    assert await chooser().next_after(connection, DEFAULT_ORG_ID, config, 2) is None


# Keys


async def test_a_key_of_the_provider_goes_before_the_default_key_of_its_type(connection: asyncpg.Connection) -> None:
    own = await add_model(connection, "own", await add_provider(connection, key="sk-own"))
    none = await add_model(connection, "none", await add_provider(connection, key=None))
    defaults = {"openai": Secret("sk-default"), "anthropic": Secret("sk-other")}
    for model_id, expected in ((own, "sk-own"), (none, "sk-default")):
        choice = await choose(connection, TurnConfig(model_id=model_id), default_keys=defaults)
        assert choice.problem is None
        assert choice.model is not None
        assert choice.model.endpoint.credentials["api_key"].reveal() == expected
        assert expected not in repr(choice)


async def test_a_provider_without_a_key_is_a_problem_that_names_it_and_is_not_retried(
    connection: asyncpg.Connection,
) -> None:
    model_id = await add_model(connection, "m", await add_provider(connection, key=None))
    choice = await choose(connection, TurnConfig(model_id=model_id))
    assert choice.problem is not None
    assert choice.problem.kind is ModelErrorKind.AUTHENTICATION
    assert choice.problem.message == "provider `P` has no API key"


async def test_credentials_that_cannot_be_read_are_a_problem_without_their_content(
    connection: asyncpg.Connection,
) -> None:
    provider = await add_provider(connection, key="sk-planted")
    model_id = await add_model(connection, "m", provider)
    other = await add_provider(connection, key="sk-elsewhere")
    # A ciphertext moved to another row.
    await connection.execute(
        "UPDATE providers SET credentials = (SELECT credentials FROM providers WHERE id = $2) WHERE id = $1",
        provider,
        other,
    )
    choice = await choose(connection, TurnConfig(model_id=model_id))
    assert choice.problem is not None
    assert choice.problem.kind is ModelErrorKind.AUTHENTICATION
    assert "sk-" not in choice.problem.message


# Circuit breakers


async def test_five_failures_within_a_minute_open_the_breaker_and_the_fallback_is_called(
    database: Database, connection: asyncpg.Connection
) -> None:
    first, second = await add_model(connection, "first"), await add_model(connection, "second")
    config = TurnConfig(model_id=first, fallback_model_ids=[second])
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, first))
    assert name_of(await choose(connection, config)) == "first"
    assert await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, first))
    choice = await choose(connection, config)
    assert choice.model is not None
    assert choice.model.name == "second"
    assert choice.model.instead_of is not None
    assert choice.model.instead_of.reason == "circuit_open"


async def test_failures_that_are_further_apart_than_a_minute_do_not_add_up(
    database: Database, connection: asyncpg.Connection
) -> None:
    model_id = await add_model(connection, "m")
    for _ in range(FAILURES_TO_OPEN * 2):
        await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, model_id))
        if await state_of(connection, model_id) == "open":
            raise AssertionError("old failures were counted")
        await rewind(connection, model_id, timedelta(seconds=61))


async def test_without_a_fallback_an_open_breaker_fails_fast_and_says_how_long_to_wait(
    database: Database, connection: asyncpg.Connection
) -> None:
    model_id = await add_model(connection, "m")
    await open_breaker(database, model_id)
    choice = await choose(connection, TurnConfig(model_id=model_id))
    assert choice.problem is not None
    assert choice.problem.kind is ModelErrorKind.CIRCUIT_OPEN
    assert choice.problem.retry_after_seconds is not None
    assert 25 < choice.problem.retry_after_seconds <= 30


async def test_half_open_lets_one_call_try_and_two_successes_close_it(
    database: Database, connection: asyncpg.Connection
) -> None:
    model_id = await add_model(connection, "m")
    config, key = TurnConfig(model_id=model_id), parse_id(Prefix.MODEL, model_id)
    await open_breaker(database, model_id)
    await rewind(connection, model_id, timedelta(seconds=31))
    trying = await choose(connection, config)
    assert trying.problem is None
    assert trying.model is not None
    assert trying.model.trying
    # Somebody is trying: nobody else may.
    assert (await choose(connection, config)).problem is not None
    await note_success(database.pool, key)
    assert await state_of(connection, model_id) == "half_open"
    assert (await choose(connection, config)).problem is None
    await note_success(database.pool, key)
    assert await state_of(connection, model_id) == "closed"
    free = await choose(connection, config)
    assert free.model is not None
    assert not free.model.trying


async def test_a_failure_while_half_open_opens_it_again(database: Database, connection: asyncpg.Connection) -> None:
    model_id = await add_model(connection, "m")
    await open_breaker(database, model_id)
    await rewind(connection, model_id, timedelta(seconds=31))
    assert (await choose(connection, TurnConfig(model_id=model_id))).problem is None
    assert await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, model_id))
    assert await state_of(connection, model_id) == "open"
    assert (await choose(connection, TurnConfig(model_id=model_id))).problem is not None


async def test_a_worker_that_died_trying_does_not_keep_the_breaker_from_closing(
    database: Database, connection: asyncpg.Connection
) -> None:
    model_id = await add_model(connection, "m")
    await open_breaker(database, model_id)
    await rewind(connection, model_id, timedelta(seconds=31))
    await choose(connection, TurnConfig(model_id=model_id))
    await rewind(connection, model_id, timedelta(seconds=31))
    assert (await choose(connection, TurnConfig(model_id=model_id))).problem is None


async def test_a_breaker_held_open_by_an_operator_stays_open(
    database: Database, connection: asyncpg.Connection
) -> None:
    model_id = await add_model(connection, "m")
    await open_breaker(database, model_id)
    await connection.execute("UPDATE circuit_breakers SET half_open_at = NULL")
    choice = await choose(connection, TurnConfig(model_id=model_id))
    assert choice.problem is not None
    assert choice.problem.retry_after_seconds == 30
    assert not await note_failure(database.pool, DEFAULT_ORG_ID, parse_id(Prefix.MODEL, model_id))
    assert await state_of(connection, model_id) == "open"


@pytest.mark.parametrize(
    ("provider_type", "options", "guarded"),
    [
        ("openai", "{}", True),
        ("openai", '{"circuit_breaker": false}', False),
        ("llmsim", "{}", False),
        ("llmsim", '{"circuit_breaker": true}', True),
    ],
)
async def test_failures_count_unless_the_model_is_simulated_or_its_options_say_otherwise(
    connection: asyncpg.Connection, provider_type: str, options: str, guarded: bool
) -> None:
    model_id = await add_model(connection, "m", await add_provider(connection, provider_type))
    await connection.execute("UPDATE models SET options = $1 WHERE model_id = 'm'", options)
    choice = await choose(connection, TurnConfig(model_id=model_id))
    assert choice.model is not None
    assert is_guarded(choice.model) is guarded
