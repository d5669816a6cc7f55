"""Long conversations on a real database: they go on, the log stays whole, and each prompt is what its checkpoint says.

Most tests run reason steps in this process, without Temporal: what matters is what stands in the database between them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import msgspec
import pytest

from activities.capabilities.registry import builtin_registry
from activities.capabilities.turn_capabilities import TurnCapabilities
from activities.llm import load_driver
from activities.llm.llmsim import LlmSim
from activities.reason import ReasonActivity
from activities.step import ReasonStep, enter
from api.services import Services
from db.messages import NewMessage
from db.session_resources import DatabaseResources
from db.turn_store import TurnStore
from domain.events import StoredEvent, TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, derived_id, new_id, parse_id
from domain.log_check import check_log
from domain.messages import ContentPart, Delivery, Message, Role, TextPart, ToolResultPart
from domain.model import ModelDriver, ModelError, ModelErrorKind, ModelRequest, StreamEvent
from domain.token_estimate import prompt_tokens
from domain.turns import ReasonBriefing, ReasonInput, ReasonNext, ReasonResult, StepFenced, StepRef, ToolSettlement
from infra.encryption import Keyring, generate_key
from tests.conftest import API, Make, turn_store
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer, Usage
from tests.fakes.server import FakeProvider
from tests.stack import Json, Stack, of_type

SIMULATED = "provider_01980000000070008000000000000001"
WORDS = "word " * 60
"""About 70 tokens."""


class Recorder:
    """The simulated model, and every request that reached it. With `fails`, the next call is lost with its worker."""

    name = "llmsim"

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []
        self.fails = False
        self._model = LlmSim()

    @property
    def prompts(self) -> list[ModelRequest]:
        """Without the calls for summaries."""
        return [one for one in self.requests if not one.idempotency_key.endswith(":summary")]

    async def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        self.requests.append(request)
        if self.fails and not request.idempotency_key.endswith(":summary"):
            raise ConnectionResetError("the worker died")
        async for event in self._model.stream(request):
            yield event


class Engine:
    """A worker without Temporal: reason steps and tool calls of one turn after the other."""

    def __init__(self, services: Services, client: httpx.AsyncClient, make_session: Make, keyring: Keyring) -> None:
        self.services = services
        self.client = client
        self.store = turn_store(services.log, keyring)
        self.model = Recorder()
        self.outputs: list[str] = []
        """What the next tool calls answer."""
        self._make_session = make_session

    async def add_model(self, provider: str = SIMULATED, model_id: str = "llmsim-small", **options: object) -> str:
        body = {"model_id": model_id, "display_name": "m", "options": options}
        answer = await self.client.post(f"{API}/providers/{provider}/models", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    async def session(self, **fields: object) -> str:
        return str((await self._make_session(**{"harness_name": "base", **fields}))["id"])

    async def post(self, session: str, text: str, *, delivery: Delivery = Delivery.STEER, script: object = None) -> str:
        metadata: dict[str, object] | None = None if script is None else {"llmsim": script}
        message = NewMessage(content=[TextPart(text=text)], delivery=delivery, metadata=metadata)
        return (await self.services.messages.post(DEFAULT_ORG_ID, session, message)).message.id

    async def ask(self, session: str, text: str, *, script: object = None) -> list[StoredEvent]:
        """Post, run the turn, and return what it wrote."""
        before = await self.services.log.last_sequence(session)
        await self.post(session, text, script=script)
        await self.run_turn(session)
        return [event for event in await self.log(session) if event.sequence > before]

    async def run_turn(self, session: str) -> None:
        turn, iteration = new_id(Prefix.TURN), 0
        while True:
            iteration += 1
            result = await self.run_step(step(session, turn, iteration))
            for call in result.calls:
                ref = msgspec.structs.replace(step(session, turn, iteration), exec_id=new_id(Prefix.EXEC))
                await self.store.begin_call(ref, call.call_id)
                output: list[ContentPart] = [TextPart(text=self.outputs.pop(0) if self.outputs else "ok")]
                await self.store.settle_call(ref, call.call_id, ToolSettlement(status="success", result=output))
            if result.next not in (ReasonNext.ACT, ReasonNext.AGAIN):
                return

    async def run_step(self, ref: StepRef) -> ReasonResult:
        briefing = await self.store.begin_reason(ref, "interrupted")
        assert isinstance(briefing, ReasonBriefing)
        enter(ReasonStep(ref=ref, briefing=briefing))

        async def load(provider_type: str) -> ModelDriver:
            return cast(ModelDriver, self.model) if provider_type == "llmsim" else await load_driver(provider_type)

        resources = DatabaseResources(self.services.database.pool, self.services.keyring)
        capabilities = TurnCapabilities(builtin_registry(), resources)
        activity = ReasonActivity(self.store, capabilities, load, stall_seconds=20)
        outcome = await activity.reason(
            ReasonInput(session_id=ref.session_id, turn_id=ref.turn_id, iteration=ref.iteration)
        )
        return await self.store.commit_reason(ref, outcome)

    async def log(self, session: str) -> list[StoredEvent]:
        return await self.services.log.read(session, after_sequence=0, limit=10_000)

    async def checked_log(self, session: str) -> list[StoredEvent]:
        log = await self.log(session)
        assert check_log(log) == []
        return log

    async def messages(self, session: str) -> list[Json]:
        return (await self.client.get(f"{API}/sessions/{session}/messages")).json()["data"]

    async def report(self, session: str) -> dict[str, Any]:
        answer = await self.client.get(f"{API}/sessions/{session}/context-report")
        assert answer.status_code == 200, answer.text
        return answer.json()


def step(session: str, turn: str, iteration: int, attempt: int = 1) -> StepRef:
    return StepRef(
        session_id=session,
        turn_id=turn,
        iteration=iteration,
        exec_id=derived_id(Prefix.EXEC, parse_id(Prefix.TURN, turn), f"reason:{iteration}"),
        attempt=attempt,
        worker=f"w{attempt}",
    )


@pytest.fixture
def engine(services: Services, client: httpx.AsyncClient, make_session: Make, keyring: Keyring) -> Engine:
    return Engine(services, client, make_session, keyring)


def texts(request: ModelRequest) -> list[str]:
    return [message.text for message in request.messages if message.role is not Role.SYSTEM]


def outputs(messages: list[Message]) -> list[str]:
    parts = [part for message in messages for part in message.content if isinstance(part, ToolResultPart)]
    return [str(part.result) for part in parts]


def told(log: list[StoredEvent]) -> list[str]:
    return [event.type for event in log if event.type.startswith("context.")]


SUMMARY = "Hello! I'm a simulated LLM response."
"""What `llmsim-model` makes of every request, that for a summary included."""


# --- before a call ----------------------------------------------------------------------------------------------------


async def test_a_long_session_keeps_answering_and_its_log_and_messages_stay_whole(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    kept: list[StoredEvent] = []
    log: list[StoredEvent] = []
    for number in range(36):
        await engine.ask(session, f"Question {number}. {WORDS}")
        log = await engine.checked_log(session)
        assert log[: len(kept)] == kept, "nothing that was in the log has changed"
        kept = log
    compacted = of_type(log, "context.compacted")
    assert len(compacted) >= 2, "checkpoints build on each other"
    assert len(of_type(log, "turn.completed")) == 36
    assert of_type(log, "turn.failed") == []
    listed = await engine.messages(session)
    assert [one["role"] for one in listed] == ["user", "agent"] * 36
    assert "checkpoint_id" not in str(listed)
    sizes = [prompt_tokens(one.messages, one.tools) for one in engine.model.prompts]
    assert max(sizes) <= 1_500
    last = texts(engine.model.prompts[-1])
    assert SUMMARY in last[0]
    assert "Summary of the earlier part" in last[0]
    assert last[-1].startswith("Question 35.")
    assert len(await engine.services.database.pool.fetch("SELECT 1 FROM context_checkpoints")) == 1


async def test_a_prompt_after_a_checkpoint_is_stable_and_read_from_the_checkpoint_on(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    log: list[StoredEvent] = []
    while "context.compacted" not in told(log):
        log = await engine.ask(session, WORDS)
    first = texts(engine.model.prompts[-1])
    await engine.ask(session, "And more?")
    second = texts(engine.model.prompts[-1])
    assert second[: len(first)] == first, "the prompt only grows, which is what providers' caches need"
    (row,) = await engine.services.database.pool.fetch("SELECT source_sequence FROM context_checkpoints")
    (event,) = of_type(log, "context.compacted")
    assert event["source_sequence"] == row["source_sequence"]
    assert len(second) < len(await engine.messages(session))


async def test_what_a_compaction_took_counts_once_and_the_call_says_what_was_done(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    log: list[StoredEvent] = []
    while "context.compacted" not in told(log):
        log = await engine.ask(session, WORDS)
    assert told(log) == ["context.compacting", "context.compacted"]
    (compacted,) = of_type(log, "context.compacted")
    (generation,) = of_type(log, "llm.generation")
    (completed,) = of_type(log, "turn.completed")
    took = msgspec.convert(compacted["usage"], TokenUsage)
    called = msgspec.convert(cast(Json, generation["metadata"])["usage"], TokenUsage)
    assert took.input_tokens > 0
    assert msgspec.convert(completed["usage"], TokenUsage) == took + called
    done = cast(dict[str, Any], cast(Json, generation["metadata"])["compaction"])
    assert done["compacted"] is True
    assert done["input_tokens_after"] < done["input_tokens_before"]
    assert done["input_tokens_before"] == compacted["tokens_before"]
    assert "Summary of the earlier part" in str(generation["messages"])
    everything = of_type(await engine.log(session), "context.compacted", "llm.generation")
    spent = [one.get("usage") or cast(Json, one["metadata"])["usage"] for one in everything]
    total = sum(cast(Json, one)["input_tokens"] for one in spent)  # type: ignore[misc]
    shown = (await engine.client.get(f"{API}/sessions/{session}")).json()
    assert shown["usage"]["input_tokens"] == total


async def test_old_tool_outputs_are_masked_in_prompts_and_nowhere_else(engine: Engine) -> None:
    model = await engine.add_model(context_window=1_500, max_output_tokens=10)
    session = await engine.session(model_id=model, capabilities=[{"ref": "test_weather"}])
    calls = [{"tool_calls": [{"name": "get_weather", "arguments": {"location": "Oslo"}}]} for _ in range(6)]
    engine.outputs = [f"Output {number}: {WORDS * 4}" for number in range(6)]
    script = {"mode": "script", "turns": [*calls, {"text": "Cold."}]}
    log = await engine.ask(session, "Weather?", script=script)
    assert told(log) == [], "nothing is lost, so nothing is said"
    await engine.checked_log(session)
    seen = outputs(engine.model.prompts[-1].messages)
    assert len(seen) == 6
    masked = [one for one in seen if "was removed to save space" in one]
    assert 0 < len(masked) <= 4
    assert [one[:8] for one in seen[len(masked) :]] == [f"Output {number}" for number in range(len(masked), 6)]
    assert seen[-1].startswith("Output 5")
    assert len(engine.model.requests) == 7, "no model was asked for a summary"
    listed = [one for one in await engine.messages(session) if one["role"] == "tool_result"]
    assert "was removed" not in str(listed)
    whole = [one for prompt in engine.model.prompts for one in outputs(prompt.messages)]
    assert {one[:8] for one in whole if one.startswith("Output")} == {f"Output {number}" for number in range(6)}


async def test_messages_that_wait_survive_a_compaction_and_are_read_once(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    later = await engine.post(session, "Much later.", delivery=Delivery.FOLLOW_UP)
    log: list[StoredEvent] = []
    while told(log).count("context.compacted") < 2:
        await engine.post(session, WORDS)
        await engine.run_turn(session)
        log = await engine.log(session)
    assert not any("Much later." in texts(one) for one in engine.model.prompts)
    await engine.run_turn(session)
    assert texts(engine.model.prompts[-1])[-1] == "Much later."
    receipts = [event for event in await engine.checked_log(session) if event.type == "turn.started"]
    assert [later in str(event.data) for event in receipts].count(True) == 1


# --- after a refusal --------------------------------------------------------------------------------------------------


async def test_a_refused_prompt_is_shortened_and_answered_within_the_same_attempt(engine: Engine) -> None:
    script = {"mode": "fixed", "text": "Still here.", "overflow_above_tokens": 500}
    session = await engine.session(model_id=await engine.add_model(script=script))
    for number in range(12):
        log = await engine.ask(session, f"Question {number}. {WORDS}")
        assert [one["final_answer_preview"] for one in of_type(log, "turn.completed")] == ["Still here."]
        assert [cast(Json, one["metadata"])["success"] for one in of_type(log, "llm.generation")] == [True]
        assert "attempts" not in of_type(log, "reason.completed")[0]
    everything = await engine.checked_log(session)
    reasons = {one["reason"] for one in of_type(everything, "context.compacted")}
    assert reasons == {"request_too_large"}
    assert of_type(everything, "turn.failed") == []


async def test_a_question_that_never_fits_fails_with_the_documented_error(engine: Engine) -> None:
    script = {"mode": "fixed", "text": "Still here.", "overflow_above_tokens": 200}
    session = await engine.session(model_id=await engine.add_model(script=script))
    await engine.ask(session, "Short.")
    await engine.post(session, WORDS * 20)
    with pytest.raises(ModelError) as refused:
        await engine.run_turn(session)
    assert refused.value.kind is ModelErrorKind.CONTEXT_OVERFLOW


# --- crashes and fences -----------------------------------------------------------------------------------------------


async def test_an_attempt_after_a_crash_finds_the_checkpoint_and_sends_the_same_prompt(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    await _almost_full(engine, session)
    turn = new_id(Prefix.TURN)
    await engine.post(session, WORDS * 4)
    engine.model.fails = True
    with pytest.raises(ConnectionResetError):
        await engine.run_step(step(session, turn, 1))
    lost = engine.model.prompts[-1]
    asked = len(engine.model.requests)
    engine.model.fails = False
    assert (await engine.run_step(step(session, turn, 1, attempt=2))).next is ReasonNext.DONE
    assert engine.model.prompts[-1].messages[1:] == lost.messages[1:]
    assert len(engine.model.requests) == asked + 1, "it was not summarised again"
    log = await engine.checked_log(session)
    assert told(log) == ["context.compacting", "context.compacted"]


async def test_an_attempt_that_was_overtaken_installs_nothing(engine: Engine) -> None:
    session = await engine.session(model_id=await engine.add_model(context_window=1_600, max_output_tokens=100))
    await _almost_full(engine, session)
    await engine.post(session, WORDS * 4)
    turn = new_id(Prefix.TURN)
    old = await engine.store.begin_reason(step(session, turn, 1), "interrupted")
    await engine.store.begin_reason(step(session, turn, 1, attempt=2), "interrupted")
    assert isinstance(old, ReasonBriefing)
    enter(ReasonStep(ref=step(session, turn, 1), briefing=old))

    async def load(provider_type: str) -> ModelDriver:
        return cast(ModelDriver, engine.model)

    resources = DatabaseResources(engine.services.database.pool, engine.services.keyring)
    activity = ReasonActivity(engine.store, TurnCapabilities(builtin_registry(), resources), load)
    with pytest.raises(StepFenced):
        await activity.reason(ReasonInput(session_id=session, turn_id=turn, iteration=1))
    assert await engine.services.database.pool.fetch("SELECT 1 FROM context_checkpoints") == []
    assert told(await engine.log(session)) == []


async def test_installing_a_checkpoint_twice_counts_its_cost_once(engine: Engine) -> None:
    class Twice:
        """Loses the answer to every installation, as a broken connection would."""

        def __init__(self, store: TurnStore) -> None:
            self._store = store

        def __getattr__(self, name: str) -> object:
            return getattr(self._store, name)

        async def install_checkpoint(self, *arguments: Any) -> None:
            await self._store.install_checkpoint(*arguments)
            await self._store.install_checkpoint(*arguments)

    engine.store = cast(TurnStore, Twice(engine.store))
    await test_what_a_compaction_took_counts_once_and_the_call_says_what_was_done(engine)


async def _almost_full(engine: Engine, session: str) -> None:
    for number in range(12):
        await engine.ask(session, f"Question {number}. {WORDS}")
    assert told(await engine.log(session)) == []


# --- the provider's own compaction ------------------------------------------------------------------------------------


@pytest.fixture
async def openai() -> AsyncIterator[FakeProvider]:
    async with FakeOpenAIResponses().running() as fake:
        yield fake


async def _openai_model(engine: Engine, fake: FakeProvider, name: str) -> str:
    body = {"name": name, "provider_type": fake.provider_type, "base_url": fake.url, "api_key": "sk-fake"}
    provider = await engine.client.post(f"{API}/providers", json=body)
    assert provider.status_code == 201, provider.text
    options: dict[str, object] = {"context_window": 1_600, "max_output_tokens": 100}
    return await engine.add_model(provider.json()["id"], "gpt-5.2", **options)


async def _until_compacted(engine: Engine, session: str) -> list[StoredEvent]:
    log: list[StoredEvent] = []
    while "context.compacted" not in told(log):
        log = await engine.ask(session, WORDS)
    return log


def compactions(fake: FakeProvider) -> list[Json]:
    return [one.body for one in fake.requests if one.path.endswith("/compact")]


async def test_the_providers_own_compaction_is_kept_encrypted_and_goes_back_to_it(
    engine: Engine, openai: FakeProvider
) -> None:
    # Counts as high as the estimate's, so that the ratio stays near 1.
    for _ in range(40):
        openai.play(Answer(text=[SUMMARY], usage=Usage(input=500, output=10)))
    session = await engine.session(model_id=await _openai_model(engine, openai, "own"))
    log = await _until_compacted(engine, session)
    (event,) = of_type(log, "context.compacted")
    assert event["strategy_used"] == "native"
    assert len(compactions(openai)) == 1
    sent = openai.requests[-1].body["input"]
    items = [item["type"] for item in sent]
    assert items.count("compaction") == 1
    (row,) = await engine.services.database.pool.fetch("SELECT native, messages FROM context_checkpoints")
    opaque = next(item for item in sent if item["type"] == "compaction")["encrypted_content"]
    assert opaque not in row["native"]
    assert row["messages"] == "[]"
    shown = str(await engine.report(session)) + (await engine.client.get(f"{API}/sessions/{session}/events")).text
    assert opaque not in shown
    await engine.ask(session, "More?")
    assert openai.requests[-1].body["input"][: len(sent) - 1] == sent[:-1]
    await engine.checked_log(session)


async def test_another_provider_and_a_lost_key_get_the_log_instead(engine: Engine, openai: FakeProvider) -> None:
    for _ in range(40):
        openai.play(Answer(text=[SUMMARY], usage=Usage(input=500, output=10)))
    session = await engine.session(model_id=await _openai_model(engine, openai, "own"))
    await _until_compacted(engine, session)
    before = len(await engine.messages(session))
    other = await engine.add_model(context_window=100_000)
    message = NewMessage(
        content=[TextPart(text="Who are you?")], controls=msgspec.convert({"model_id": other}, type=_controls())
    )
    await engine.services.messages.post(DEFAULT_ORG_ID, session, message)
    await engine.run_turn(session)
    asked = engine.model.prompts[-1]
    assert asked.context is None
    assert len(texts(asked)) == before + 1
    # The same provider, but the key that encrypted it is gone.
    lost = turn_store(engine.services.log, Keyring.of(generate_key("kek-other"), None))
    await engine.post(session, "Again?")
    ref = step(session, new_id(Prefix.TURN), 1)
    briefing = await lost.begin_reason(ref, "interrupted")
    assert isinstance(briefing, ReasonBriefing)
    assert briefing.checkpoint is None
    assert len(briefing.conversation.messages) == len(await engine.messages(session))


async def test_without_a_native_compaction_at_the_provider_a_summary_does(engine: Engine, openai: FakeProvider) -> None:
    cast(FakeOpenAIResponses, openai).compacts = False
    for _ in range(40):
        openai.play(Answer(text=[SUMMARY], usage=Usage(input=500, output=10)))
    session = await engine.session(model_id=await _openai_model(engine, openai, "own"))
    log = await _until_compacted(engine, session)
    assert [one["skip_reason"] for one in of_type(log, "context.compaction.skipped")] == ["native_returned_none"]
    assert of_type(log, "context.compacted")[0]["strategy_used"] == "summarization"
    await engine.checked_log(session)


def _controls() -> type:
    from domain.messages import Controls

    return Controls


# --- the report -------------------------------------------------------------------------------------------------------


async def test_the_report_shows_what_the_next_call_reads(engine: Engine) -> None:
    model = await engine.add_model(context_window=1_600, max_output_tokens=100)
    session = await engine.session(
        model_id=model, system_prompt="You are terse.", capabilities=[{"ref": "stateless_todo_list"}]
    )
    await _until_compacted(engine, session)
    await engine.ask(session, "Short one?")
    report = await engine.report(session)
    await engine.ask(session, "Next.")
    sent = engine.model.prompts[-1]
    history = [message for message in sent.messages if message.role is not Role.SYSTEM]
    sections = {one["key"]: one for one in report["sections"]}
    assert sections["tools"]["items"] == len(sent.tools)
    assert {"system_prompt", "checkpoint", "history_user", "history_agent"} <= set(sections)
    shown = [one["source_id"] for one in report["contributions"] if one["section_key"] in HISTORY_KEYS]
    assert shown == [message.id for message in history[:-1]]
    assert report["estimated_input_tokens"] == sum(one["tokens"] for one in report["sections"])
    for section in report["sections"]:
        parts = [one["tokens"] for one in report["contributions"] if one["section_key"] == section["key"]]
        assert (sum(parts), len(parts)) == (section["tokens"], section["items"])
    assert report["model"] == "llmsim-small"
    assert report["context_window_tokens"] == 1_600
    assert report["cumulative_usage"]["input_tokens"] > 0
    assert report["session_id"] == session


HISTORY_KEYS = ("checkpoint", "history_user", "history_agent", "history_tool_results")


async def test_the_report_of_a_new_session_and_of_an_unknown_one(engine: Engine) -> None:
    session = await engine.session()
    report = await engine.report(session)
    assert [one["key"] for one in report["sections"]] == ["tools"] or "history_user" not in str(report["sections"])
    assert "context_window_tokens" not in report
    for unknown, status in ((new_id(Prefix.SESSION), 404), ("session_x", 400)):
        answer = await engine.client.get(f"{API}/sessions/{unknown}/context-report")
        assert answer.status_code == status


# --- with everything running ------------------------------------------------------------------------------------------


async def test_a_cancel_stops_a_summary_and_the_session_goes_on() -> None:
    async with Stack() as stack:

        async def add_model(model_id: str, **options: object) -> str:
            body = {"model_id": model_id, "display_name": "m", "options": options}
            answer = await stack.client.post(f"providers/{SIMULATED}/models", json=body)
            assert answer.status_code == 201, answer.text
            return answer.json()["id"]

        hanging = await add_model("llmsim-hanging", script={"mode": "lorem", "tokens": 20, "stall_after_tokens": 3})
        model = await add_model("llmsim-small", context_window=1_600, max_output_tokens=100)
        compaction = {"ref": "compaction", "config": {"summarization": {"model": hanging}}}
        session = await stack.create_session(harness_name="base", model_id=model, capabilities=[compaction])
        for number in range(12):
            await stack.ask(session, f"Question {number}. {WORDS}")
        await stack.post_message(session, WORDS * 4)
        await stack.wait_for_event(session, "context.compacting")
        before = (await stack.read_log(session))[-1].sequence
        await stack.cancel(session)
        await stack.idle(session, after_sequence=before)
        log = await stack.check(session)
        assert len(of_type(log, "turn.cancelled")) == 1
        assert told(log) == ["context.compacting"]
        # The model that hangs fails again at the next turn, unless nobody asks it: the session answers all the same.
        await stack.ask(session, "Short.", controls={"model_id": await add_model("llmsim-large")})
        log = await stack.check(session)
        assert len(of_type(log, "turn.completed")) == 13
