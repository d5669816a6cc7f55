"""Forks and rewinds with the whole engine: what a provider is sent afterwards, and a fork in the middle of a turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest

from tests.fakes.openai_chat import FakeOpenAIChat
from tests.fakes.script import Answer, Call
from tests.fakes.server import FakeProvider
from tests.stack import Stack, of_type

FILES = [{"ref": "session_file_system"}]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Stack]:
    async with Stack() as stack:
        yield stack


@pytest.fixture(scope="module")
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeOpenAIChat().running() as running:
        yield running


@pytest.fixture(scope="module")
async def model(engine: Stack, fake: FakeProvider) -> str:
    body = {"name": "forks", "provider_type": fake.provider_type, "base_url": fake.url, "api_key": "sk-of-this-test"}
    provider = (await engine.client.post("providers", json=body)).json()["id"]
    made = await engine.client.post(f"providers/{provider}/models", json={"model_id": "m", "display_name": "m"})
    return made.json()["id"]


def sent(fake: FakeProvider) -> str:
    """The messages of the newest request."""
    return msgspec.json.encode(fake.requests[-1].body["messages"]).decode()


async def go_back(engine: Stack, session: str, action: str, **body: object) -> str:
    answer = await engine.client.post(f"sessions/{session}/{action}", json=body)
    assert answer.is_success, answer.text
    return answer.json()["id"]


async def test_a_provider_is_not_sent_what_was_rewound_and_a_fork_is_sent_what_it_has(
    engine: Stack, fake: FakeProvider, model: str
) -> None:
    session = await engine.create_session(model_id=model, capabilities=FILES)

    def write(text: str) -> Answer:
        arguments = msgspec.json.encode({"path": "/note", "content": text}).decode()
        return Answer(calls=[Call(name="write_file", arguments=arguments)])

    fake.play(write("first-content"), Answer(text=["first-answer"]))
    early = (await engine.ask(session, "first-question"))[-1].sequence
    fake.play(write("second-content"), Answer(text=["second-answer"]))
    await engine.ask(session, "second-question")
    late = await go_back(engine, session, "fork")
    await go_back(engine, session, "rewind", sequence=early)
    fake.play(Answer(text=["third-answer"]))
    log = await engine.ask(session, "third-question")
    prompt = sent(fake)
    assert "second" not in prompt
    assert prompt.index("first-question") < prompt.index("first-answer") < prompt.index("third-question")
    await engine.check(session)
    note = await engine.client.get(f"sessions/{session}/fs/note")
    assert note.json()["content"] == "first-content"

    fake.play(Answer(text=["fourth-answer"]))
    log = await engine.ask(late, "fourth-question")
    assert "second-answer" in sent(fake)
    assert "third" not in sent(fake)
    whole = await engine.check(late)
    assert (await engine.client.get(f"sessions/{late}/fs/note")).json()["content"] == "second-content"
    seen: list[int] = []
    async with aclosing(engine.stream(late, {"after_sequence": "0"})) as events:
        async for event in events:
            seen.append(event.sequence)
            if event.sequence >= log[-1].sequence:
                break
    assert seen == [one.sequence for one in whole], "a stream replays the copied events and those after"


async def test_a_session_that_waits_for_its_client_is_forked_into_one_that_rests(
    engine: Stack, fake: FakeProvider, model: str
) -> None:
    tool = {"name": "look", "description": "Looks", "parameters": {"type": "object"}, "type": "client_side"}
    session = await engine.create_session(model_id=model, tools=[tool])
    fake.play(Answer(calls=[Call(name="look", arguments="{}")]))
    await engine.post_message(session, "look around")
    await engine.wait_for_event(session, "tool.call_requested")
    forked = await go_back(engine, session, "fork")
    assert (await engine.session(forked))["status"] == "idle"
    refused = await engine.client.post(f"sessions/{session}/rewind", json={"sequence": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "session_busy")
    fake.play(Answer(text=["went on"]))
    await engine.ask(forked, "never mind")
    assert "forked before this call had returned" in sent(fake)
    await engine.check(forked)
    assert (await engine.session(session))["status"] == "waitingfortoolresults"
    log = await engine.read_log(session)
    call = of_type(log, "tool.call_requested")[0]["tool_calls"][0]["id"]  # type: ignore[index]
    fake.play(Answer(text=["seen"]))
    results = {"tool_results": [{"tool_call_id": call, "result": "a wall"}]}
    assert (await engine.client.post(f"sessions/{session}/tool-results", json=results)).is_success
    await engine.idle(session)
    assert "a wall" in sent(fake)
    await engine.check(session)
