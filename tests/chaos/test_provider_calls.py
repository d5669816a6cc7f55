"""Workers that die or leave in the middle of a provider's stream: nothing is lost, doubled or billed twice.

Each scene has a provider of its own. One SIGKILL hits the worker that streams all of them; then one scene is looked at per test.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from domain.events import StoredEvent
from tests.chaos.watched import STILL_HERE, Watched, answers, fresh_workers, of, ready_worker, watching
from tests.fakes.anthropic_messages import FakeAnthropic
from tests.fakes.openai_chat import FakeOpenAIChat
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer, Call
from tests.fakes.server import FakeProvider
from tests.integration.test_provider_turns import add_model
from tests.stack import Stack, of_type

PIECES = [f"word{number} " for number in range(60)]
LONG = "".join(PIECES)
PIECE_SECONDS = 0.15
"""Nine seconds of streaming: a worker is killed in the middle of it, however slow the machine is."""


@dataclass
class Scene:
    watched: Watched
    fake: FakeProvider
    log: list[StoredEvent] | None = None

    async def settle(self) -> list[StoredEvent]:
        """The log of the session after it has been used once more, checked; only once."""
        if self.log is None:
            await self.watched.stack.idle(self.watched.session)
            self.fake.play(Answer(text=[STILL_HERE]))
            self.log = await self.watched.settle()
        return self.log


async def begin(
    stack: AsyncExitStack, engine: Stack, fake: FakeProvider, *script: Answer, model_id: str, background: bool = False
) -> Scene:
    await stack.enter_async_context(fake.running())
    fake.play(*script)
    model = await add_model(engine, fake, model_id, background=background)
    watched = await Watched.begin(engine, model_id=model, capabilities=[{"ref": "test_math"}])
    await engine.post_message(watched.session, "Tell me.")
    return Scene(watched, fake)


@pytest.fixture(scope="module")
async def crash(engine: Stack) -> AsyncIterator[dict[str, Scene]]:
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(watching())
        await stack.enter_async_context(fresh_workers(engine))
        victim = await ready_worker(engine)
        slow = Answer(text=PIECES, piece_delay_seconds=PIECE_SECONDS)
        tool = Answer(
            thinking=["Let me", " see. "],
            text=PIECES,
            calls=[Call(name="add", arguments='{"a": 1, "b": 2}')],
            piece_delay_seconds=PIECE_SECONDS,
        )
        done = Answer(text=["Three."])
        scenes = {
            "background": await begin(
                stack, engine, FakeOpenAIResponses(), slow, model_id="gpt-5.2-chat", background=True
            ),
            "background with a tool": await begin(
                stack, engine, FakeOpenAIResponses(), tool, done, model_id="gpt-5.2", background=True
            ),
            "not resumable": await begin(stack, engine, FakeOpenAIResponses(), slow, slow, model_id="gpt-5.2"),
            "anthropic": await begin(stack, engine, FakeAnthropic(), slow, slow, model_id="claude-sonnet-4-5"),
            "chat": await begin(stack, engine, FakeOpenAIChat(), slow, slow, model_id="some-model"),
        }
        for scene in scenes.values():
            watch(scene.watched)
            await scene.watched.until_seen("output.message.delta", 3)
        await engine.kill(victim)
        await ready_worker(engine)
        yield scenes


@pytest.mark.parametrize("name", ["background", "background with a tool"])
async def test_a_background_generation_is_resumed_without_a_token_lost_or_doubled_and_billed_once(
    crash: dict[str, Scene], name: str
) -> None:
    scene = crash[name]
    log = await scene.settle()
    first = of_type(log, "output.message.completed")[0]["message"]
    assert first["content"][0]["text"] == LONG  # type: ignore[index]
    assert not of_type(log, "reason.recovered"), "clients were told to drop text that was still good"
    calls = len(of_type(log, "llm.generation"))
    assert isinstance(scene.fake, FakeOpenAIResponses)
    assert scene.fake.generations_started == calls, "a generation was started that no turn shows"
    resumed = [one for one in scene.fake.requests if "starting_after" in one.query]
    assert len(resumed) >= 1
    seen = "".join(str(one.data["delta"]) for one in of(scene.watched.seen, "output.message.delta"))
    assert seen.startswith(LONG)


async def test_thinking_tools_and_state_of_a_resumed_generation_are_whole(crash: dict[str, Scene]) -> None:
    scene = crash["background with a tool"]
    log = await scene.settle()
    assert of_type(log, "reason.thinking.completed")[0]["thinking"] == "Let me see. "
    (result,) = of_type(log, "tool.completed")
    assert result["status"] == "success"
    assert answers(log) == ["Three."]
    # The reasoning that came before the crash goes back with the call that follows the tool.
    after_tool = next(
        one
        for one in scene.fake.requests
        if any(item.get("type") == "function_call_output" for item in one.body.get("input", []))
    )
    assert [item for item in after_tool.body["input"] if item.get("type") == "reasoning"]


@pytest.mark.parametrize("name", ["not resumable", "anthropic", "chat"])
async def test_what_cannot_be_resumed_begins_anew_and_clients_are_told(crash: dict[str, Scene], name: str) -> None:
    log = await crash[name].settle()
    assert answers(log) == [LONG]
    recovered = of_type(log, "reason.recovered")
    assert [one["mode"] for one in recovered] == ["restart"]
    assert recovered[0]["accumulated_len"]


async def test_a_worker_that_is_stopped_hands_a_background_generation_over(engine: Stack) -> None:
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(watching())
        await stack.enter_async_context(fresh_workers(engine))
        leaving = await ready_worker(engine)
        fake = FakeOpenAIResponses()
        slow = Answer(text=PIECES, piece_delay_seconds=PIECE_SECONDS)
        scene = await begin(stack, engine, fake, slow, model_id="gpt-5.1", background=True)
        watch(scene.watched)
        await scene.watched.until_seen("output.message.delta", 3)
        await ready_worker(engine)
        engine.workers.remove(leaving)
        leaving.stopping = True
        leaving.send_signal(signal.SIGTERM)
        await asyncio.wait_for(leaving.wait(), 30)
        log = await scene.settle()
        assert answers(log) == [LONG]
        assert not of_type(log, "reason.recovered")
        assert fake.generations_started == len(of_type(log, "llm.generation"))
        assert not [one for one in fake.requests if one.path.endswith("/cancel")]
