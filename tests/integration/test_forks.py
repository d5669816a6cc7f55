"""Forks of sessions: at every event of a recorded conversation with tools and files, and how the two stay apart."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from api.services import Services
from db.database import Database
from db.secret_columns import check_secrets
from db.session_cleanup import Cleanup
from db.session_resources import DatabaseResources
from domain.conversation import messages_of
from domain.events import StoredEvent
from domain.ids import Prefix, new_id, parse_id
from domain.log_check import check_log
from domain.messages import Message, Role, ToolResultPart
from domain.secret import Secret
from infra.encryption import Keyring
from tests.conftest import API, Make, RecordingTurns
from tests.played_turns import Player, state_of


@pytest.fixture
async def player(services: Services, make_session: Make) -> Player:
    return Player(services, str((await make_session(title="Source"))["id"]))


async def fork(client: httpx.AsyncClient, session: str, **body: Any) -> dict[str, Any]:
    response = await client.post(f"{API}/sessions/{session}/fork", json=body)
    assert response.status_code == 201, response.text
    return response.json()


async def messages(client: httpx.AsyncClient, session: str) -> list[dict[str, Any]]:
    response = await client.get(f"{API}/sessions/{session}/messages")
    assert response.status_code == 200, response.text
    return response.json()["data"]


async def log_of(services: Services, session: str) -> list[StoredEvent]:
    return await services.log.read(session, after_sequence=0, limit=10_000)


def without_event_ids(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of tool results are named after their events, of which a fork has its own."""
    return [{**one, "id": None} if one["role"] == "tool_result" else one for one in found]


def as_served(found: list[Message]) -> list[dict[str, Any]]:
    return without_event_ids(json.loads(msgspec.json.encode(found)))


async def test_a_fork_at_every_event_is_legal_and_has_the_messages_and_files_of_that_event(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    states: dict[int, dict[str, object]] = {}

    async def note() -> None:
        states[(await player.log.last_sequence(player.session))] = await player.state()

    await note()
    await player.files.write("/shared.txt", b"from the user")
    await player.say("first")
    await note()
    ref, briefing = await player.begin(new_turn=True)
    await player.answer(ref, briefing, "let me see", "call_a1", "call_b2")
    await note()
    await player.run_call("call_a1")
    await note()
    await player.say("steer")
    await player.run_call("call_b2")
    await note()
    ref, briefing = await player.begin()
    await player.answer(ref, briefing, "once more", "call_c3")
    await player.run_call("call_c3")
    await note()
    ref, briefing = await player.begin()
    await player.answer(ref, briefing, "the answer")
    await note()
    await player.turn_with_tools("second", ["call_d1"])
    await note()
    source = await player.events()
    assert check_log(source) == []
    for event in source:
        made = await fork(client, player.session, sequence=event.sequence)
        copied = await log_of(services, made["id"])
        assert check_log(copied, finished=True) == [], f"at {event.sequence}, {event.type}"
        assert made["forked_from_session_id"] == player.session
        assert made["forked_from_sequence"] == event.sequence
        assert made["status"] == ("idle" if any(one.type == "turn.started" for one in copied) else "started")
        assert [(one.type, one.data, one.ts) for one in copied[: event.sequence]] == [
            (one.type, one.data, one.ts) for one in source[: event.sequence]
        ]
        assert copied[-1].type == "session.forked"
        assert not {one.id for one in copied} & {one.id for one in source}
        served = without_event_ids(await messages(client, made["id"]))
        expected = as_served(messages_of(source[: event.sequence]))
        assert served[: len(expected)] == expected
        assert all(one["role"] == "tool_result" or one["metadata"]["interrupted"] for one in served[len(expected) :])
        if event.type in ("session.idled", "session.started"):
            assert served == expected
        if event.sequence in states:
            assert await state_of(services, made["id"]) == states[event.sequence], f"at {event.sequence}"
        again = Player(services, made["id"])
        await again.say("go on")
        _, briefing = await again.begin(new_turn=True)
        prompt = briefing.conversation.messages
        assert [one.text for one in prompt if one.role is Role.USER][-1] == "go on"
        texts = [one["content"][0]["text"] for one in expected if one["role"] == "user"]
        assert [one.text for one in prompt if one.role is Role.USER] == [*texts, "go on"]


async def test_a_fork_without_a_point_has_everything_of_now(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    await player.turn_with_tools("hi", ["call_a1"])
    await player.files.write("/after-the-last-event", b"x")
    made = await fork(client, player.session)
    assert made["title"] == "Source (fork)"
    assert made["forked_from_sequence"] == await player.log.last_sequence(player.session)
    assert await state_of(services, made["id"]) == await player.state()
    assert made["workspace_id"] != (await client.get(f"{API}/sessions/{player.session}")).json()["workspace_id"]


async def test_changes_after_a_fork_stay_apart_in_both_directions(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    await player.turn_with_tools("hi", ["call_a1"])
    made = Player(services, (await fork(client, player.session))["id"])
    before, log = await player.state(), await player.events()
    await made.turn_with_tools("in the fork", ["call_b2"])
    await made.files.write("/shared.txt", b"of the fork")
    assert await player.state() == before
    assert await player.events() == log
    mine = await made.state()
    await player.turn_with_tools("in the source", ["call_z1", "call_z3"])
    assert await made.state() == mine
    assert check_log(await made.events()) == []
    assert check_log(await player.events()) == []


async def test_a_fork_of_a_fork_goes_back_to_what_was_before_the_first_fork(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    await player.turn_with_tools("one", ["call_a1"])
    early, place = await player.state(), await player.log.last_sequence(player.session)
    await player.turn_with_tools("two", ["call_b2"])
    made = Player(services, (await fork(client, player.session))["id"])
    await made.turn_with_tools("three", ["call_c3"])
    second = await fork(client, made.session, sequence=place)
    assert await state_of(services, second["id"]) == early
    assert check_log(await log_of(services, second["id"])) == []


async def test_a_fork_outlives_its_source_with_its_files(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    await player.turn_with_tools("hi", ["call_a1"])
    expected, expected_messages = await player.state(), await messages(client, player.session)
    made = await fork(client, player.session)
    assert (await client.delete(f"{API}/sessions/{player.session}")).status_code == 204
    await Cleanup(services.database).once()
    assert await state_of(services, made["id"]) == expected
    assert without_event_ids(await messages(client, made["id"])) == without_event_ids(expected_messages)
    assert (await client.get(f"{API}/sessions/{made['id']}")).json()["forked_from_session_id"] == player.session


async def test_secrets_can_be_read_in_a_fork_and_are_sealed_to_their_own_rows(
    client: httpx.AsyncClient, services: Services, player: Player, database: Database, keyring: Keyring
) -> None:
    await player.storage.set_secret("TOKEN", Secret("s3cret"))
    made = await fork(client, player.session)
    storage = DatabaseResources(database.pool, keyring).storage(made["id"])
    found = await storage.get_secret("TOKEN")
    assert found is not None
    assert found.reveal() == "s3cret"
    assert (await check_secrets(database, keyring, lambda: None)).readable == 2
    await storage.set_secret("TOKEN", Secret("other"))
    kept = await player.storage.get_secret("TOKEN")
    assert kept is not None
    assert kept.reveal() == "s3cret"


async def test_a_fork_while_a_tool_runs_tells_the_model_and_leaves_the_source_alone(
    client: httpx.AsyncClient, services: Services, player: Player
) -> None:
    await player.say("hi")
    ref, briefing = await player.begin(new_turn=True)
    await player.answer(ref, briefing, "", "call_a1", "call_b2")
    running = player.ref()
    await player.store.begin_call(running, "call_a1")
    before = await player.events()
    made = Player(services, (await fork(client, player.session))["id"])
    assert (await client.get(f"{API}/sessions/{made.session}")).json()["status"] == "idle"
    assert check_log(await made.events()) == []
    assert await player.events() == before
    await made.say("go on")
    _, briefing = await made.begin(new_turn=True)
    parts = [part for one in briefing.conversation.messages for part in one.content if isinstance(part, ToolResultPart)]
    assert [part.tool_call_id for part in parts] == ["call_a1", "call_b2"]
    assert all(part.error and "forked" in part.error for part in parts)
    await player.run_call("call_b2")
    assert (await player.store.begin_call(player.ref(), "call_a1")) is not None


async def test_what_is_given_replaces_what_the_source_has(
    client: httpx.AsyncClient, player: Player, make_agent: Make, make_session: Make
) -> None:
    agent = await make_agent()
    source = await make_session(title="T", tags=["a"], locale="uk-UA", system_prompt="old", hints={"k": 1})
    kept = await fork(client, source["id"])
    assert {name: kept[name] for name in ("tags", "locale", "system_prompt", "hints", "harness_id")} == {
        name: source[name] for name in ("tags", "locale", "system_prompt", "hints", "harness_id")
    }
    model = (await client.get(f"{API}/models")).json()["data"][0]["id"]
    given = {"title": "mine", "tags": ["b", "b"], "locale": "de", "system_prompt": "new", "model_id": model}
    made = await fork(client, source["id"], agent_id=agent["id"], **given)
    assert {name: made[name] for name in given} == {**given, "tags": ["b"]}
    assert made["agent_id"] == agent["id"]
    assert (await client.get(f"{API}/sessions/{source['id']}")).json()["tags"] == ["a"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"sequence": 0}, 400, "sequence"),
        ({"sequence": 2}, 400, "sequence"),
        ({"sequence": 2**63}, 400, "sequence"),
        ({"sequence": 1, "message_id": f"message_{1:032x}"}, 400, "message_id"),
        ({"message_id": f"message_{1:032x}"}, 400, "message_id"),
        ({"message_id": "x"}, 400, "message_id"),
        ({"model_id": f"model_{1:032x}"}, 400, "model_id"),
        ({"model_id": "x"}, 400, "model_id"),
        ({"agent_id": f"agent_{1:032x}"}, 404, "agent_id"),
        ({"locale": "no locale!"}, 400, "locale"),
        ({"tags": ["x" * 300]}, 400, "tags[0]"),
        ({"title": "x" * 3000}, 400, "title"),
        ({"files": "yes"}, 400, "files"),
    ],
)
async def test_a_bad_fork_names_the_field_and_makes_nothing(
    client: httpx.AsyncClient, player: Player, body: dict[str, Any], status: int, field: str
) -> None:
    response = await client.post(f"{API}/sessions/{player.session}/fork", json=body)
    assert (response.status_code, response.json()["field"]) == (status, field), response.text
    assert (await client.get(f"{API}/sessions")).json()["total"] == 1


async def test_a_session_of_another_organization_is_not_there_to_be_forked_or_rewound(
    client: httpx.AsyncClient, player: Player, database: Database
) -> None:
    await database.pool.execute(
        "UPDATE sessions SET org_id = 2 WHERE id = $1", parse_id(Prefix.SESSION, player.session)
    )
    for session in (player.session, new_id(Prefix.SESSION)):
        for action, body in (("fork", {}), ("rewind", {"sequence": 1})):
            assert (await client.post(f"{API}/sessions/{session}/{action}", json=body)).status_code == 404


async def test_usage_of_the_source_is_not_counted_twice(client: httpx.AsyncClient, player: Player) -> None:
    await player.turn_with_tools("hi")
    made = await fork(client, player.session)
    assert (made["usage"]["input_tokens"], made["usage"]["output_tokens"]) == (0, 0)
    assert made["preview"] == "hi"
    assert made["output_preview"] == "answer to hi"


async def test_a_message_to_a_fork_starts_a_turn_of_the_fork(
    client: httpx.AsyncClient, services: Services, player: Player, turns: RecordingTurns
) -> None:
    await player.turn_with_tools("hi", ["call_a1"])
    made = await fork(client, player.session)
    body = {"message": {"content": [{"type": "text", "text": "more"}]}}
    assert (await client.post(f"{API}/sessions/{made['id']}/messages", json=body)).status_code == 201
    fresh = Player(services, made["id"])
    ref, briefing = await fresh.begin(new_turn=True)
    result = await fresh.answer(ref, briefing, "", "call_a1")
    assert [call.call_id for call in result.calls] != ["call_a1"], "an id of the copied history is taken"


async def statement_count(database: Database) -> int:
    """How many statements have inserted into `events` a thousand rows or more, told from the transaction each row is of."""
    return await database.pool.fetchval(
        """SELECT count(*) FROM (
            SELECT session_id, cmin::text, xmin::text FROM events GROUP BY 1, 2, 3 HAVING count(*) > 1000) AS n"""
    )


async def test_ten_thousand_events_are_forked_in_a_moment(
    client: httpx.AsyncClient, services: Services, player: Player, database: Database
) -> None:
    await player.turn_with_tools("hi", ["call_a1"])
    last = await player.log.last_sequence(player.session)
    await database.pool.execute(
        """WITH grown AS (
            INSERT INTO events (session_id, sequence, id, org_id, type, ts, context, data)
            SELECT $1, $2 + n, gen_random_uuid(), 1, 'session.title.updated', clock_timestamp(), '{}', '{"title": "x"}'
            FROM generate_series(1, 10000) AS n)
        UPDATE session_state SET last_sequence = $2 + 10000 WHERE session_id = $1""",
        parse_id(Prefix.SESSION, player.session),
        last,
    )
    statements = await statement_count(database)
    made = await fork(client, player.session)
    assert await statement_count(database) == statements + 1, "one statement copies all events"
    assert await services.log.last_sequence(made["id"]) == last + 10_001
