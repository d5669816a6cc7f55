"""Rewinds: what the model, the lists of messages and the files show afterwards, and that the log keeps everything."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from api.services import Services
from db.context_checkpoints import install
from db.database import Database
from domain import limits
from domain.checkpoints import Checkpoint
from domain.conversation import REWOUND_RESULT
from domain.ids import Prefix, parse_id, uuid7
from domain.log_check import check_log
from domain.messages import Message, Role, TextPart, ToolResultPart
from infra.encryption import Keyring
from tests.conftest import API, Make
from tests.played_turns import Player


@pytest.fixture
async def player(services: Services, make_session: Make) -> Player:
    return Player(services, str((await make_session(title="Source"))["id"]))


async def rewind(client: httpx.AsyncClient, session: str, **body: Any) -> dict[str, Any]:
    response = await client.post(f"{API}/sessions/{session}/rewind", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def shown(client: httpx.AsyncClient, session: str) -> list[str]:
    """Texts of the messages clients see."""
    found = (await client.get(f"{API}/sessions/{session}/messages")).json()["data"]
    return [one["content"][0].get("text", one["role"]) for one in found]


async def prompt_of(player: Player, text: str) -> list[Message]:
    """What the model is shown after the user has said something; the turn is ended."""
    await player.say(text)
    ref, briefing = await player.begin(new_turn=True)
    await player.answer(ref, briefing, f"answer to {text}")
    return briefing.conversation.messages


async def place(player: Player) -> int:
    return await player.log.last_sequence(player.session)


async def test_after_a_rewind_neither_model_nor_client_is_shown_what_came_after(
    client: httpx.AsyncClient, player: Player
) -> None:
    await player.turn_with_tools("one", ["call_a1"])
    early, state = await place(player), await player.state()
    await player.turn_with_tools("two", ["call_b2"], ["call_c3"])
    before = await player.events()
    rewound = await rewind(client, player.session, sequence=early)
    assert (rewound["status"], rewound["output_preview"]) == ("idle", "answer to one")
    assert await player.state() == state
    assert await shown(client, player.session) == ["one", "let me see", "tool_result", "answer to one"]
    prompt = await prompt_of(player, "other")
    assert [one.text for one in prompt if one.role is Role.USER] == ["one", "other"]
    assert "answer to two" not in [one.text for one in prompt]
    log = await player.events()
    assert log[: len(before)] == before
    assert log[len(before)].type == "session.rewound"
    assert check_log(log) == []
    exported = (await client.get(f"{API}/sessions/{player.session}/export")).text
    assert "answer to two" not in exported
    assert "answer to other" in exported


async def test_a_rewind_to_every_event_is_legal_and_can_be_undone(client: httpx.AsyncClient, player: Player) -> None:
    await player.say("one")
    ref, briefing = await player.begin(new_turn=True)
    await player.answer(ref, briefing, "let me see", "call_a1", "call_b2")
    await player.run_call("call_a1")
    await player.say("steer")
    await player.run_call("call_b2")
    ref, briefing = await player.begin()
    await player.answer(ref, briefing, "done")
    end = await place(player)
    whole, files = await shown(client, player.session), await player.state()
    recorded = await player.events()
    for event in recorded:
        await rewind(client, player.session, sequence=event.sequence)
        texts = await shown(client, player.session)
        assert texts == whole[: len(texts)]
        prompt = await prompt_of(player, "next")
        called = [call.id for one in prompt for call in one.tool_calls]
        answered = [part.tool_call_id for one in prompt for part in one.content if isinstance(part, ToolResultPart)]
        assert answered == called, f"at {event.sequence}, {event.type}"
        assert all(one.created_at for one in prompt)
        await rewind(client, player.session, sequence=end)
        assert await shown(client, player.session) == whole
        assert await player.state() == files
    assert check_log(await player.events()) == []


async def test_calls_without_a_result_are_told_to_the_model_as_unknown(
    client: httpx.AsyncClient, player: Player
) -> None:
    await player.turn_with_tools("one", ["call_a1", "call_b2"])
    called = next(one.sequence for one in await player.events() if one.type == "tool.started")
    await rewind(client, player.session, sequence=called)
    prompt = await prompt_of(player, "next")
    errors = [part.error for one in prompt for part in one.content if isinstance(part, ToolResultPart)]
    assert errors == [REWOUND_RESULT, REWOUND_RESULT]


async def test_a_message_is_a_place_to_go_back_to(client: httpx.AsyncClient, player: Player) -> None:
    first = await player.turn_with_tools("one")
    await player.turn_with_tools("two")
    found = (await client.get(f"{API}/sessions/{player.session}/messages")).json()["data"]
    await rewind(client, player.session, message_id=found[1]["id"])
    assert await shown(client, player.session) == ["one", "answer to one"]
    await rewind(client, player.session, message_id=first)
    assert await shown(client, player.session) == ["one"]
    prompt = await prompt_of(player, "again")
    assert [one.text for one in prompt] == ["one", "again"], "the message is read, and only once"
    assert check_log(await player.events()) == []


async def test_files_and_values_stay_when_that_is_asked_for(client: httpx.AsyncClient, player: Player) -> None:
    await player.turn_with_tools("one", ["call_a1"])
    early = await place(player)
    await player.turn_with_tools("two", ["call_b2"])
    state = await player.state()
    await rewind(client, player.session, sequence=early, files=False)
    assert await player.state() == state
    assert await shown(client, player.session) == ["one", "let me see", "tool_result", "answer to one"]


async def test_a_fork_of_a_rewound_session_is_rewound_too(client: httpx.AsyncClient, player: Player) -> None:
    await player.turn_with_tools("one")
    early = await place(player)
    await player.turn_with_tools("two")
    late = await place(player)
    await rewind(client, player.session, sequence=early)
    for sequence, expected in (
        (None, ["one", "answer to one"]),
        (late, ["one", "answer to one", "two", "answer to two"]),
    ):
        body = {} if sequence is None else {"sequence": sequence}
        made = (await client.post(f"{API}/sessions/{player.session}/fork", json=body)).json()
        assert await shown(client, made["id"]) == expected
        fork = Player(player.services, made["id"])
        assert [one.text for one in await prompt_of(fork, "more")] == [*expected, "more"]
        assert check_log(await fork.events()) == []


@pytest.mark.parametrize("unread", [True, False], ids=["unread message", "running turn"])
async def test_a_session_at_work_is_not_rewound(client: httpx.AsyncClient, player: Player, unread: bool) -> None:
    await player.turn_with_tools("one")
    await player.say("two")
    if not unread:
        await player.begin(new_turn=True)
    response = await client.post(f"{API}/sessions/{player.session}/rewind", json={"sequence": 1})
    assert (response.status_code, response.json()["code"]) == (409, "session_busy")
    assert (await player.events())[-1].type != "session.rewound"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "sequence"),
        ({"sequence": 2}, "sequence"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": "one"}, "sequence"),
        ({"sequence": 1, "message_id": f"message_{1:032x}"}, "message_id"),
        ({"message_id": f"message_{1:032x}"}, "message_id"),
    ],
)
async def test_a_bad_rewind_names_the_field(
    client: httpx.AsyncClient, player: Player, body: dict[str, Any], field: str
) -> None:
    response = await client.post(f"{API}/sessions/{player.session}/rewind", json=body)
    assert (response.status_code, response.json().get("field")) == (400, field), response.text


async def test_files_that_others_work_on_are_not_taken_back(
    client: httpx.AsyncClient, player: Player, make_session: Make
) -> None:
    workspace = (await client.get(f"{API}/sessions/{player.session}")).json()["workspace_id"]
    await make_session(workspace_id=workspace)
    response = await client.post(f"{API}/sessions/{player.session}/rewind", json={"sequence": 1})
    assert (response.status_code, response.json()["field"]) == (409, "files")
    await rewind(client, player.session, sequence=1, files=False)


async def test_a_checkpoint_that_knows_what_was_rewound_is_not_used(
    client: httpx.AsyncClient, player: Player, keyring: Keyring
) -> None:
    await player.turn_with_tools("one")
    early = await place(player)
    await player.turn_with_tools("two")
    await player.turn_with_tools("three")
    opened = [one.sequence for one in await player.events() if one.type == "turn.started"]
    summary = Message(id="", role=Role.USER, content=[TextPart(text="one and two, in short")], created_at="x")
    checkpoint = Checkpoint(id=uuid7(), source_sequence=opened[2], messages=[summary], strategy="summary")
    async with player.log.transaction(player.session) as work:
        await install(work, keyring, checkpoint)
    assert (await prompt_of(player, "four"))[0].text == "one and two, in short"
    made = (await client.post(f"{API}/sessions/{player.session}/fork", json={"sequence": early})).json()
    late = (await client.post(f"{API}/sessions/{player.session}/fork", json={})).json()
    assert (await prompt_of(Player(player.services, made["id"]), "x"))[0].text == "one"
    assert (await prompt_of(Player(player.services, late["id"]), "x"))[0].text == summary.text
    await rewind(client, player.session, sequence=early)
    assert [one.text for one in await prompt_of(player, "five")] == ["one", "answer to one", "five"]


async def test_what_is_older_than_the_history_is_refused_and_not_guessed(
    client: httpx.AsyncClient, player: Player, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await player.turn_with_tools("one", ["call_a1"])
    early = await place(player)
    monkeypatch.setattr("db.workspace_changes.WORKSPACE_HISTORY_MAX_BYTES", 3 * 1024)
    for number in range(5):
        await player.files.write("/shared.txt", b"version %d" % number)
    kept = await database.pool.fetchval("SELECT count(*) FROM workspace_history")
    assert 1 <= kept <= 3
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_blobs") <= kept + 2
    for action in ("fork", "rewind"):
        url = f"{API}/sessions/{player.session}/{action}"
        response = await client.post(url, json={"sequence": early})
        assert (response.status_code, response.json()["code"]) == (409, "history_gone")
        assert (await client.post(url, json={"sequence": early, "files": False})).status_code in (200, 201)
    assert limits.WORKSPACE_HISTORY_MAX_BYTES > 3 * 1024


async def test_the_history_of_values_is_limited_too(
    client: httpx.AsyncClient, player: Player, database: Database
) -> None:
    await player.storage.set("key", "first")
    await player.turn_with_tools("one")
    early = await place(player)
    await player.storage.set("key", "second")
    await player.storage.set("key", "third")
    # As if what was replaced last had been 64 MiB.
    await database.pool.execute(
        "UPDATE session_value_history SET total = total + 67108864 WHERE session_id = $1 AND value = 'second'",
        parse_id(Prefix.SESSION, player.session),
    )
    await player.storage.set("key", "fourth")
    assert await database.pool.fetchval("SELECT count(*) FROM session_value_history") == 2
    response = await client.post(f"{API}/sessions/{player.session}/rewind", json={"sequence": early})
    assert (response.status_code, response.json()["code"]) == (409, "history_gone")
