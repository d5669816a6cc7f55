"""A provider that falls silent in the middle of a stream: the call is given up, closed, and made again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.anthropic_messages import FakeAnthropic
from tests.fakes.openai_chat import FakeGemini, FakeOpenAIChat
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer
from tests.fakes.server import FakeProvider
from tests.integration.test_provider_turns import add_model, final_text
from tests.stack import Stack, of_type

STALL_SECONDS = 2


@pytest.fixture(scope="module")
async def impatient() -> AsyncIterator[Stack]:
    async with Stack(environment={"REASON_STALL_SECS": str(STALL_SECONDS)}) as stack:
        yield stack


@pytest.mark.parametrize(
    ("kind", "model_id"),
    [
        (FakeOpenAIResponses, "gpt-5.2"),
        (FakeOpenAIChat, "some-model"),
        (FakeGemini, "gemini-2.5-pro"),
        (FakeAnthropic, "claude-sonnet-4-5"),
    ],
)
async def test_a_silent_stream_is_given_up_and_the_next_try_answers_from_the_beginning(
    impatient: Stack, kind: type[FakeProvider], model_id: str
) -> None:
    async with kind().running() as fake:
        session = await impatient.create_session(model_id=await add_model(impatient, fake, model_id))
        fake.play(Answer(text=["Half", " of it"], after=2, stall=True), Answer(text=["All", " of it."]))
        log = await impatient.ask(session, "Tell me.")
        await impatient.check(session)
        assert final_text(log) == "All of it."
        first, second = (one["metadata"] for one in of_type(log, "llm.generation"))
        assert (first["success"], first["error"]) == (False, "provider_unavailable")  # type: ignore[index]
        assert STALL_SECONDS * 1_000 <= first["duration_ms"] < 30_000  # type: ignore[index]
        assert second["success"] is True  # type: ignore[index]
        assert [one["mode"] for one in of_type(log, "reason.recovered")] == ["restart"]
        assert fake.clients_gone == 1


async def test_a_slow_stream_is_waited_for_as_long_as_pieces_come(impatient: Stack) -> None:
    async with FakeAnthropic().running() as fake:
        session = await impatient.create_session(model_id=await add_model(impatient, fake, "claude-opus-4-5"))
        fake.play(Answer(text=["one ", "two ", "three ", "four"], piece_delay_seconds=STALL_SECONDS * 0.6))
        log = await impatient.ask(session, "Slowly.")
        assert final_text(log) == "one two three four"
        assert len(of_type(log, "llm.generation")) == 1
