"""Turns on real drivers, end to end: API, Temporal, worker, and a provider that speaks its own wire format."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from domain.events import StoredEvent
from tests.chaos.fault_points import eventually
from tests.fakes.anthropic_messages import FakeAnthropic
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer, Call, Usage
from tests.fakes.server import FakeProvider
from tests.stack import Json, Stack, of_type

KEY = "sk-planted-0123456789abcdef0123456789abcdef"
WEATHER = [{"ref": "test_weather"}, {"ref": "test_math"}]
PRICED_MODEL = "claude-sonnet-4-5"


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Stack]:
    async with Stack() as stack:
        yield stack


@pytest.fixture(scope="module")
async def anthropic() -> AsyncIterator[FakeProvider]:
    async with FakeAnthropic().running() as fake:
        yield fake


@pytest.fixture(scope="module")
async def openai() -> AsyncIterator[FakeProvider]:
    async with FakeOpenAIResponses().running() as fake:
        yield fake


async def add_model(
    engine: Stack, fake: FakeProvider, model_id: str, *, key: str | None = KEY, background: bool = False
) -> str:
    """A provider of its own, so that what happens to its model (a breaker, a sync) stays in one test."""
    body: Json = {"name": model_id, "provider_type": fake.provider_type, "base_url": fake.url}
    if key is not None:
        body["api_key"] = key
    provider = await engine.client.post("providers", json=body)
    assert provider.status_code == 201, provider.text
    model = await engine.client.post(
        f"providers/{provider.json()['id']}/models",
        json={"model_id": model_id, "display_name": model_id, "options": {"background": background}},
    )
    assert model.status_code == 201, model.text
    return model.json()["id"]


def final_text(log: list[StoredEvent]) -> str:
    message = of_type(log, "output.message.completed")[-1]["message"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")  # type: ignore[index]


async def streamed(engine: Stack, session: str, *, up_to: int) -> str:
    """All that the session's stream carries up to this event."""
    text = ""
    async with aclosing(engine.stream(session, {})) as events:
        async for event in events:
            text += msgspec.json.encode(event.raw).decode()
            if event.sequence >= up_to:
                break
    return text


@asynccontextmanager
async def streaming(engine: Stack, session: str, text: str) -> AsyncIterator[None]:
    """Inside, a message was posted and its first delta is in the log."""
    await engine.post_message(session, text)
    await engine.wait_for_event(session, "output.message.delta")
    yield


# What a turn is made of


async def test_thinking_tools_and_the_answer_make_one_turn_whose_state_goes_back_and_is_never_shown(
    engine: Stack, anthropic: FakeProvider
) -> None:
    model = await add_model(engine, anthropic, "claude-sonnet-4-5-20250929")
    session = await engine.create_session(model_id=model, capabilities=WEATHER)
    anthropic.play(
        Answer(
            thinking=["Two", " cities."],
            text=["Looking."],
            calls=[
                Call(name="get_weather", arguments='{"location": "Lisbon"}'),
                Call(name="get_weather", arguments='{"location": "Oslo"}'),
            ],
        ),
        Answer(text=["Both", " mild."]),
    )
    log = await engine.ask(session, "Weather in Lisbon and Oslo?", controls={"reasoning": {"effort": "high"}})
    await engine.check(session)
    assert final_text(log) == "Both mild."
    assert [one["tool_name"] for one in of_type(log, "tool.completed")] == ["get_weather"] * 2
    assert of_type(log, "reason.thinking.completed")[0]["thinking"] == "Two cities."

    # The second call carries the first one's thinking block, signature and all.
    again = anthropic.requests[-1].body
    blocks = [block for message in again["messages"] if message["role"] == "assistant" for block in message["content"]]
    signatures = [block["signature"] for block in blocks if block["type"] == "thinking"]
    assert len(signatures) == 1
    assert len([block for block in blocks if block["type"] == "tool_use"]) == 2
    shown = [
        (await engine.client.get(f"sessions/{session}/events")).text,
        (await engine.client.get(f"sessions/{session}/messages")).text,
        (await engine.client.get(f"sessions/{session}")).text,
        await streamed(engine, session, up_to=log[-1].sequence),
    ]
    assert not [text for text in shown if signatures[0] in text]


async def test_arguments_that_are_not_json_are_answered_and_the_turn_goes_on(
    engine: Stack, openai: FakeProvider
) -> None:
    model = await add_model(engine, openai, "gpt-5.2")
    session = await engine.create_session(model_id=model, capabilities=WEATHER)
    openai.play(Answer(calls=[Call(name="add", arguments='{"a": 1,')]), Answer(text=["Sorry."]))
    log = await engine.ask(session, "1+1?")
    await engine.check(session)
    (result,) = of_type(log, "tool.completed")
    assert result["status"] == "error"
    assert "not valid JSON" in str(result["error"])
    assert final_text(log) == "Sorry."


async def test_cost_is_on_the_usage_of_the_call_the_turn_the_session_and_the_agent(
    engine: Stack, anthropic: FakeProvider
) -> None:
    model = await add_model(engine, anthropic, PRICED_MODEL)
    agent = await engine.client.post(
        "agents", json={"name": "priced", "system_prompt": "Help.", "default_model_id": model}
    )
    session = await engine.create_session(agent_id=agent.json()["id"])
    anthropic.play(Answer(text=["Hi."], usage=Usage(input=1_000_000, output=100_000, cache_read=1_000_000)))
    log = await engine.ask(session, "hello")
    # Sonnet 4.5 above 200,000 tokens of prompt: 6 in, 22.50 out, 0.60 read from cache, in dollars per million tokens.
    usage = of_type(log, "llm.generation")[0]["metadata"]["usage"]  # type: ignore[index]
    assert usage["estimated_cost_usd"] == pytest.approx(6 + 2.25 + 0.6)
    for total in (
        of_type(log, "turn.completed")[0]["usage"],
        (await engine.client.get(f"sessions/{session}")).json()["usage"],
        (await engine.client.get(f"agents/{agent.json()['id']}")).json()["usage"],
    ):
        assert total["effective_cost_usd"] == pytest.approx(8.85)  # type: ignore[index]
    stats = (await engine.client.get(f"agents/{agent.json()['id']}/stats")).json()
    assert stats["total_cost_usd"] == pytest.approx(8.85)


async def test_a_refusal_and_a_filtered_answer_end_the_turn_with_words(engine: Stack, openai: FakeProvider) -> None:
    session = await engine.create_session(model_id=await add_model(engine, openai, "gpt-5.1"))
    openai.play(Answer(refusal=["I can't", " help."]))
    assert final_text(await engine.ask(session, "bad")) == "I can't help."
    openai.play(Answer(finish="content_filter"))
    log = await engine.ask(session, "worse")
    assert final_text(log) == "The AI provider's content filter stopped this answer."
    assert of_type(log, "turn.completed")
    await engine.check(session)


async def test_what_a_model_does_not_take_is_dropped_and_named(engine: Stack, anthropic: FakeProvider) -> None:
    session = await engine.create_session(model_id=await add_model(engine, anthropic, "claude-haiku-4-5"))
    log = await engine.ask(session, "hi", controls={"verbosity": "low"})
    metadata = of_type(log, "llm.generation")[0]["metadata"]
    assert "verbosity" in metadata["dropped_options"]  # type: ignore[index]
    assert metadata["request_options"]["verbosity"] == "low"  # type: ignore[index]


# Failures


@pytest.mark.parametrize(
    ("level", "narrowed", "code", "fields"),
    [
        (None, None, "provider_usage_limit_reached", {"resets_at"}),
        ("detailed", None, "provider_usage_limit_reached", {"resets_at", "detail"}),
        ("detailed", "standard", "provider_usage_limit_reached", {"resets_at"}),
        ("standard", "detailed", "provider_usage_limit_reached", {"resets_at"}),
        ("detailed", "generic", "processing_error", set()),
    ],
)
async def test_a_failed_turn_tells_what_its_disclosure_level_allows(
    engine: Stack, anthropic: FakeProvider, level: str | None, narrowed: str | None, code: str, fields: set[str]
) -> None:
    refs = [] if level is None else [{"ref": "error_disclosure", "config": {"level": level}}]
    model = await add_model(engine, anthropic, "claude-opus-4-5")
    session = await engine.create_session(model_id=model, capabilities=refs)
    anthropic.play(Answer(failure="usage_limit"))
    log = await engine.ask(session, "hi", controls={} if narrowed is None else {"error_disclosure": narrowed})
    await engine.check(session)
    (failed,) = of_type(log, "turn.failed")
    (apology,) = of_type(log, "output.message.completed")
    for told in (failed, apology):
        assert told["error_code"] == code
        assert set(told.get("error_fields") or {}) == fields  # type: ignore[call-overload]
    assert apology["message"]["metadata"]["source_error_code"] == "provider_usage_limit_reached"  # type: ignore[index]
    # Raw text is for operators, whatever the level.
    assert "usage limits" in str(of_type(log, "reason.completed")[0]["error"])
    assert ("usage limits" in str(failed)) is ("detail" in fields)


async def test_without_a_key_the_turn_fails_at_once_with_the_documented_text(
    engine: Stack, anthropic: FakeProvider
) -> None:
    model = await add_model(engine, anthropic, "claude-opus-4-5", key=None)
    session = await engine.create_session(model_id=model)
    log = await engine.ask(session, "hi")
    (failed,) = of_type(log, "turn.failed")
    assert failed["error_code"] == "provider_misconfigured"
    assert failed["error"] == "There is a misconfiguration with the AI provider. Please contact support."
    assert len(of_type(log, "llm.generation")) == 1
    await engine.check(session)


async def test_an_exhausted_model_gives_way_to_its_fallback_for_the_turn_and_is_first_again_in_the_next(
    engine: Stack, anthropic: FakeProvider, openai: FakeProvider
) -> None:
    first = await add_model(engine, anthropic, "claude-opus-4-1")
    second = await add_model(engine, openai, "gpt-5-mini")
    agent = await engine.client.post(
        "agents",
        json={
            "name": "careful",
            "system_prompt": "Help.",
            "default_model_id": first,
            "fallback_model_ids": [second],
            "capabilities": WEATHER,
        },
    )
    assert agent.json()["fallback_model_ids"] == [second]
    session = await engine.create_session(agent_id=agent.json()["id"])
    anthropic.play(Answer(failure="auth"))
    openai.play(Answer(calls=[Call(name="add", arguments='{"a": 1, "b": 2}')]), Answer(text=["Three."]))
    log = await engine.ask(session, "1+2?")
    await engine.check(session)
    assert final_text(log) == "Three."
    generations = [one["metadata"] for one in of_type(log, "llm.generation")]
    assert [(one["model"], one["success"]) for one in generations] == [  # type: ignore[index]
        ("claude-opus-4-1", False),
        ("gpt-5-mini", True),
        ("gpt-5-mini", True),
    ]
    for one in generations[1:]:
        assert one["fallback"] == {"model": "claude-opus-4-1", "model_id": first, "reason": "exhausted"}  # type: ignore[index]
    anthropic.play(Answer(text=["Back."]))
    log = await engine.ask(session, "and now?")
    assert final_text(log) == "Back."
    assert of_type(log, "llm.generation")[0]["metadata"]["model"] == "claude-opus-4-1"  # type: ignore[index]


async def test_the_providers_retry_after_is_kept_to(engine: Stack, openai: FakeProvider) -> None:
    session = await engine.create_session(model_id=await add_model(engine, openai, "gpt-5-nano"))
    openai.play(Answer(failure="rate_limit", retry_after_seconds=3), Answer(text=["Now."]))
    started = time.monotonic()
    log = await engine.ask(session, "hi")
    assert time.monotonic() - started >= 3
    assert final_text(log) == "Now."
    assert of_type(log, "llm.generation")[-1]["metadata"]["retry"]["total_wait_ms"] == 3_000  # type: ignore[index]


async def test_an_open_breaker_is_visible_makes_the_model_unhealthy_and_can_be_closed_by_hand(
    engine: Stack, openai: FakeProvider
) -> None:
    model = await add_model(engine, openai, "gpt-4.1")
    openai.play(*[Answer(failure="overloaded")] * 5)
    sessions = [await engine.create_session(model_id=model) for _ in range(5)]
    for session in sessions:
        await engine.post_message(session, "hi")
    breaker = f"durable/circuit-breakers/{model}"

    async def is_open() -> bool:
        return (await engine.client.get(breaker)).json()["state"] == "open"

    await eventually("five failures open the breaker", is_open)
    assert (await engine.client.get(f"models/{model}")).json()["healthy"] is False
    asked = len(openai.requests)
    blocked = await engine.create_session(model_id=model)
    await engine.post_message(blocked, "hi")
    await engine.wait_for_event(blocked, "llm.generation")
    assert len(openai.requests) == asked, "an open breaker let a call through"
    assert (await engine.client.post(f"{breaker}/close")).is_success
    assert (await engine.client.get(f"models/{model}")).json()["healthy"] is True
    for session in [*sessions, blocked]:
        await engine.cancel(session)


# Stopping


async def test_a_cancel_in_the_middle_of_a_stream_closes_it_within_a_second(
    engine: Stack, anthropic: FakeProvider
) -> None:
    session = await engine.create_session(model_id=await add_model(engine, anthropic, "claude-sonnet-4-0"))
    anthropic.play(Answer(text=["Once", " upon"], after=2, stall=True))
    gone = anthropic.clients_gone
    async with streaming(engine, session, "a story"):
        started = time.monotonic()
        await engine.cancel(session)

        async def closed() -> bool:
            return anthropic.clients_gone > gone

        await eventually("the provider's connection is closed", closed)
        assert time.monotonic() - started < 1.0 + 2.0, "a second, and what a busy machine adds"
    await engine.idle(session)
    await engine.check(session)


async def test_a_cancelled_background_generation_is_stopped_at_the_provider(
    engine: Stack, openai: FakeProvider
) -> None:
    session = await engine.create_session(model_id=await add_model(engine, openai, "gpt-5-pro", background=True))
    openai.play(Answer(text=["Once", " upon"], after=2, stall=True))
    async with streaming(engine, session, "a story"):
        await engine.cancel(session)

        async def stopped() -> bool:
            return any(one.path.endswith("/cancel") for one in openai.requests)

        await eventually("the response is cancelled", stopped)
    await engine.idle(session)
    await engine.check(session)


# Secrets


async def test_a_key_is_in_no_log_event_answer_or_temporal_history_and_not_in_the_database_in_clear(
    engine: Stack, anthropic: FakeProvider, openai: FakeProvider
) -> None:
    model = await add_model(engine, anthropic, "claude-opus-4-6")
    session = await engine.create_session(model_id=model, capabilities=WEATHER)
    anthropic.play(
        Answer(calls=[Call(name="add", arguments='{"a": 1, "b": 2}')]),
        Answer(text=["3"], after=1, failure="overloaded"),
        Answer(failure="auth"),
    )
    await engine.ask(session, "go")
    assert any(KEY in str(request.headers) for request in anthropic.requests), "the key never reached the provider"
    temporal = await engine.temporal()
    found: list[str] = []
    async for workflow in temporal.list_workflows():
        history = await temporal.get_workflow_handle(workflow.id, run_id=workflow.run_id).fetch_history()
        if KEY in history.to_json():
            found.append(f"history of {workflow.id}")
    tables = await engine.pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    for (table,) in tables:
        rows = await engine.pool.fetch(f'SELECT t::text FROM "{table}" t')
        found += [f"table {table}" for (row,) in rows if KEY in row]
    for path in ("providers", "models", f"sessions/{session}/events", f"sessions/{session}/messages"):
        if KEY in (await engine.client.get(path)).text:
            found.append(path)
    for file in engine.directory.glob("*.log"):
        if KEY in file.read_text():
            found.append(file.name)
    assert not found
