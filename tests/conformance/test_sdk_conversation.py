"""The official SDK, unchanged, against the whole engine: conversations, streams that break, client-side tools, errors.

Whatever the SDK parses here comes from the server as it is; a value its models refuse raises and fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import httpx
import pytest
from everruns_sdk import (
    ApiError,
    AuthenticationError,
    ContentPart,
    Controls,
    Event,
    Everruns,
    NotFoundError,
    RateLimitError,
    ToolDefinition,
    extract_tool_calls,
    generate_agent_id,
)
from everruns_sdk.models import AgentCapabilityConfig, ListResponse
from everruns_sdk.sse import EventStream, StreamOptions

from domain.events import EVENT_TYPES
from domain.ids import Prefix, new_id
from tests.conformance.cutting_proxy import CuttingProxy
from tests.sse import SseConnection, until
from tests.stack import Json, Stack

pytestmark = pytest.mark.filterwarnings("ignore:.*personal access token is deprecated.*:DeprecationWarning")

ORG = f"org_{1:032x}"
TURN_SECONDS = 40.0


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


@pytest.fixture
async def sdk(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Everruns]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with Everruns("evr_pat_test", base_url=stack.addresses.api, org_id=ORG) as client:
        yield client


@pytest.fixture
async def scripted(stack: Stack) -> Callable[[Json], Awaitable[str]]:
    """Makes a model that follows a script: the SDK's messages carry no metadata."""

    async def make(script: Json) -> str:
        provider = (await stack.client.get("providers")).json()["data"][0]["id"]
        name = f"scripted-{new_id(Prefix.MESSAGE)[-8:]}"
        body = {"model_id": name, "display_name": name, "options": {"script": script}}
        created = await stack.client.post(f"providers/{provider}/models", json=body)
        assert created.status_code == 201, created.text
        return created.json()["id"]

    return make


Scripted = Callable[[Json], Awaitable[str]]


async def until_idle(stream: EventStream) -> list[Event]:
    """Events up to the end of the turn."""
    seen: list[Event] = []
    iterator = stream.__aiter__()
    try:
        async with asyncio.timeout(TURN_SECONDS):
            async for event in iterator:
                seen.append(event)
                if event.type == "session.idled":
                    break
    finally:
        stream.stop()
        await iterator.aclose()  # type: ignore[attr-defined]  # a generator
        await stream.aclose()
    return seen


def text_of(events: list[Event]) -> str:
    """The text of the last agent message."""
    completed = [event for event in events if event.type == "output.message.completed"]
    return "".join(part.get("text", "") for part in completed[-1].data["message"]["content"])


# --- one conversation -----------------------------------------------------------------------------------------------------


async def test_a_conversation_from_harness_to_export(sdk: Everruns, scripted: Scripted) -> None:
    model = await scripted(
        {
            "mode": "script",
            "turns": [
                {
                    "thinking": "The weather is asked for.",
                    "text": "One moment. \U0001f327",
                    "tool_calls": [{"name": "get_weather", "arguments": {"location": "Львів"}}],
                },
                {"text": "Take an umbrella.\u2028Really."},
            ],
        }
    )
    harness = await sdk.harnesses.create("conversation", "Be brief.", tags=["conformance"])
    agent = await sdk.agents.create(
        "forecaster",
        "You know the weather.",
        harness_id=harness.id,
        default_model_id=model,
        capabilities=[AgentCapabilityConfig(ref="test_weather")],
    )
    session = await sdk.sessions.create(agent_name="forecaster", title="Umbrella?", tags=["wet"], locale="uk-UA")
    assert (session.title, session.tags, session.locale) == ("Umbrella?", ["wet"], "uk-UA")
    assert (session.agent_id, session.harness_id, session.status) == (agent.id, harness.id, "started")

    message = await sdk.messages.create(session.id, "Чи буде дощ?", Controls(hints={"channel": "test"}))
    assert (message.role, message.content[0].text) == ("user", "Чи буде дощ?")
    events = await until_idle(sdk.events.stream(session.id))

    types = [event.type for event in events]
    assert types[:2] == ["session.started", "input.message"]
    assert types[-2:] == ["turn.completed", "session.idled"]
    assert set(types) <= set(EVENT_TYPES)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert text_of(events) == "Take an umbrella.\u2028Really."
    calls = [
        call for event in events if event.type == "output.message.completed" for call in extract_tool_calls(event.data)
    ]
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"location": "Львів"})]
    assert {event.context.turn_id for event in events if event.type.startswith(("turn.", "reason.", "tool."))} == {
        events[-1].data["turn_id"]
    }

    listed = await sdk.events.list(session.id)
    assert [event.model_dump() for event in listed] == [event.model_dump() for event in events]
    messages = await sdk.messages.list(session.id)
    assert [one.role for one in messages] == ["user", "agent", "tool_result", "agent"]
    assert messages[0] == message
    assert [one.phase for one in messages] == [None, "commentary", None, "final_answer"]
    assert messages[1].content[1].is_tool_call()
    assert messages[2].content[0].tool_call_id == calls[0].id
    exported = [json.loads(line) for line in (await sdk.sessions.export(session.id)).split("\n") if line]
    assert [line["id"] for line in exported] == [one.id for one in messages]

    again = await sdk.sessions.get(session.id)
    assert again.status == "idle"
    assert again.usage is not None
    assert again.usage.output_tokens > 0
    stats = await sdk.agents.stats(agent.id)
    assert (stats.session_count, stats.idle_session_count, stats.execution_count) == (1, 1, 1)
    assert stats.total_output_tokens == again.usage.output_tokens

    assert again.is_pinned is False
    await sdk.sessions.pin(session.id)
    assert (await sdk.sessions.get(session.id)).is_pinned is True
    await sdk.sessions.unpin(session.id)
    assert (await sdk.sessions.get(session.id)).is_pinned is False

    assert [one.id for one in await sdk.sessions.list(agent.id, search="UMBRELLA")] == [session.id]
    assert await sdk.sessions.list(agent.id, search="sunshine") == []


async def test_a_second_message_goes_on_where_the_first_ended(sdk: Everruns) -> None:
    model = next(one.id for one in await sdk.models.list() if one.model_id == "llmsim-echo")
    session = await sdk.sessions.create(model_id=model)
    first = await sdk.messages.create(session.id, "one")
    events = await until_idle(sdk.events.stream(session.id))
    second = await sdk.messages.create(session.id, "two")
    more = await until_idle(sdk.events.stream(session.id, since_id=events[-1].id))
    assert more[0].data["message"]["id"] == second.id
    assert [text_of(events), text_of(more)] == ["Echo: one", "Echo: two"]
    assert [message.id for message in await sdk.messages.list(session.id) if message.role == "user"] == [
        first.id,
        second.id,
    ]


async def test_per_message_model_is_taken_from_controls(sdk: Everruns) -> None:
    echo = next(one.id for one in await sdk.models.list() if one.model_id == "llmsim-echo")
    session = await sdk.sessions.create()
    await sdk.messages.create(session.id, "which?", Controls(model_id=echo, reasoning={"effort": "low"}))
    assert text_of(await until_idle(sdk.events.stream(session.id))) == "Echo: which?"


async def test_a_failing_model_is_told_in_terms_the_sdk_reads(sdk: Everruns, scripted: Scripted) -> None:
    model = await scripted({"mode": "error", "error": {"class": "authentication", "message": "secret detail"}})
    session = await sdk.sessions.create(model_id=model)
    await sdk.messages.create(session.id, "hello")
    events = await until_idle(sdk.events.stream(session.id))
    failed = next(event for event in events if event.type == "turn.failed")
    assert failed.data["error_code"] == "provider_misconfigured"
    assert "secret detail" not in failed.data["error"]
    messages = await sdk.messages.list(session.id)
    assert messages[-1].role == "agent"
    assert (await sdk.sessions.get(session.id)).status == "idle"


async def test_cancel_ends_the_turn_and_the_session_goes_on(sdk: Everruns, scripted: Scripted) -> None:
    model = await scripted({"mode": "lorem", "tokens": 1000, "inter_token_delay_ms": 100})
    session = await sdk.sessions.create(model_id=model)
    await sdk.messages.create(session.id, "talk")
    stream = sdk.events.stream(session.id)
    iterator = stream.__aiter__()
    async with asyncio.timeout(TURN_SECONDS):
        async for event in iterator:
            if event.type == "output.message.delta":
                break
        assert (await sdk.sessions.get(session.id)).status == "active"
        await sdk.sessions.cancel(session.id)
        rest = [event async for event in _up_to(iterator, "session.idled")]
    stream.stop()
    await iterator.aclose()  # type: ignore[attr-defined]  # a generator
    await stream.aclose()
    assert "turn.cancelled" in [event.type for event in rest]
    await sdk.sessions.cancel(session.id)
    echo = next(one.id for one in await sdk.models.list() if one.model_id == "llmsim-echo")
    await sdk.messages.create(session.id, "and now?", Controls(model_id=echo))
    assert text_of(await until_idle(sdk.events.stream(session.id, since_id=rest[-1].id))) == "Echo: and now?"


async def _up_to(iterator: AsyncIterator[Event], last: str) -> AsyncIterator[Event]:
    async for event in iterator:
        yield event
        if event.type == last:
            return


# --- streams that break ---------------------------------------------------------------------------------------------------


async def test_a_stream_cut_at_any_byte_misses_nothing_and_repeats_nothing(
    stack: Stack, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    chance = random.Random(20_261_121)
    # In the head, inside `connected`, inside frames; the SDK comes back after a second each time, so they are few.
    cuts = [chance.randint(230, 300), *(chance.randint(600, 6_000) for _ in range(5))]
    text = " ".join(f"\U0001f9ec{number}ü" for number in range(250))
    model = await scripted({"mode": "fixed", "text": text, "inter_token_delay_ms": 15})
    address = urlsplit(stack.addresses.api)
    assert address.hostname is not None
    assert address.port is not None
    async with CuttingProxy(address.hostname, address.port, iter(cuts)) as proxy:
        async with Everruns("evr_pat_test", base_url=stack.addresses.api, org_id=ORG) as direct:
            session = await direct.sessions.create(model_id=model)
            await direct.messages.create(session.id, "go")
            stored = direct.events
            async with Everruns("evr_pat_test", base_url=proxy.origin + address.path, org_id=ORG) as sdk:
                events = await until_idle(sdk.events.stream(session.id))
            log = await stored.list(session.id)
        assert proxy.cut == len(cuts)
        assert proxy.connections > len(cuts)
    assert [event.id for event in events] == [event.id for event in log]
    told = ""
    for event in events:
        if event.type == "output.message.delta":
            told += event.data["delta"]
            assert event.data["accumulated"] == told
    assert told == text == text_of(events)


async def test_a_stream_that_the_server_cycles_is_one_stream_to_the_user(
    stack: Stack, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server, url = await stack.start_server({"SSE_REALTIME_CYCLE_SECS": "1"})
    model = await scripted({"mode": "lorem", "tokens": 100, "inter_token_delay_ms": 30})
    async with Everruns("evr_pat_test", base_url=url.removesuffix("/v1"), org_id=ORG) as sdk:
        session = await sdk.sessions.create(model_id=model)
        await sdk.messages.create(session.id, "talk")
        stream = sdk.events.stream(session.id)
        events = await until_idle(stream)
        assert stream.retry_count == 0
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    await stack.kill(server)


async def test_stream_filters_as_the_sdk_sends_them(sdk: Everruns) -> None:
    session = await sdk.sessions.create()
    await sdk.messages.create(session.id, "hi")
    everything = await until_idle(sdk.events.stream(session.id))
    types = ["input.message", "session.idled", "output.message.delta"]
    some = await until_idle(sdk.events.stream(session.id, types=types, exclude=["output.message.delta"]))
    assert [event.type for event in some] == ["input.message", "session.idled"]
    quiet = EventStream(sdk, session.id, StreamOptions.exclude_deltas())
    assert [event.id for event in await until_idle(quiet)] == [
        event.id for event in everything if not event.type.endswith(".delta")
    ]


# --- the log --------------------------------------------------------------------------------------------------------------


async def test_every_filter_of_events_list(sdk: Everruns, stack: Stack) -> None:
    session = await stack.create_session(capabilities=[{"ref": "test_math"}])
    script: Json = {
        "mode": "script",
        "turns": [{"tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}, {"text": "3"}],
    }
    await stack.ask(session, "50% _of_ six", llmsim=script, tags=["sums"])
    whole = await sdk.events.list(session)
    numbers = [event.sequence or 0 for event in whole]
    assert numbers == list(range(1, len(whole) + 1))
    last = len(whole)
    tool = next(event for event in whole if event.type == "tool.completed")
    step = next(event.context.exec_id for event in whole if event.type == "reason.started")
    turn = whole[-1].data["turn_id"]

    async def found(**filters: object) -> list[int]:
        return [event.sequence or 0 for event in await sdk.events.list(session, **filters)]  # type: ignore[arg-type]

    assert await found(since_id=whole[-3].id) == numbers[-2:]
    assert await found(types=["tool.started", "tool.completed"], exclude=["tool.started"]) == [tool.sequence]
    assert (await found(limit=2))[-2:] == numbers[-2:]
    assert await found(before_sequence=3) == [1, 2]
    assert await found(after_sequence=last - 1) == [last]
    middle = numbers[len(numbers) // 2]
    assert await found(around=whole[middle - 1].id, window=1) == [middle - 1, middle, middle + 1]
    assert await found(from_ts=whole[0].ts, to_ts="2999-01-01T00:00:00Z") == numbers
    assert await found(to_ts="2020-01-01T00:00:00+02:00") == []
    assert await found(turn_id=turn) == [event.sequence for event in whole if event.context.turn_id == turn]
    assert await found(exec_id=step) == [event.sequence for event in whole if event.context.exec_id == step]
    trace = tool.context.trace_id
    assert trace is not None
    assert await found(trace_id=trace) == [event.sequence for event in whole if event.context.trace_id == trace]
    assert await found(tags=["sums", "other"]) == [2]
    assert tool.sequence in await found(tool_name="add")
    assert 2 in await found(q="50% _OF_")
    assert await found(q="50%%_of_") == []
    assert await found(order_desc=True) == numbers[::-1]


# --- client-side tools ----------------------------------------------------------------------------------------------------

LOOK = ToolDefinition(
    name="look",
    description="Look out of the window.",
    parameters={"type": "object", "properties": {}},
    type="client_side",
)


async def test_client_side_tools_are_run_by_the_client(sdk: Everruns, scripted: Scripted) -> None:
    model = await scripted(
        {
            "mode": "script",
            "turns": [
                {
                    "tool_calls": [
                        {"name": "look", "arguments": {"where": "north"}},
                        {"name": "look"},
                        {"name": "add", "arguments": {"a": 1, "b": 1}},
                    ]
                },
                {"text": "It rains."},
            ],
        }
    )
    session = await sdk.sessions.create(
        model_id=model, tools=[LOOK], capabilities=[AgentCapabilityConfig(ref="test_math")]
    )
    assert [tool.name for tool in session.tools or []] == ["look"]
    await sdk.messages.create(session.id, "What is the weather?")
    stream = sdk.events.stream(session.id)
    iterator = stream.__aiter__()
    async with asyncio.timeout(TURN_SECONDS):
        before = [event async for event in _up_to(iterator, "tool.call_requested")]
        calls = extract_tool_calls(before[-1].data)
        assert [(call.name, call.arguments) for call in calls] == [("look", {"where": "north"}), ("look", {})]
        assert (await sdk.sessions.get(session.id)).status == "waitingfortoolresults"
        answers = [
            ContentPart.make_tool_result(calls[0].id, {"sky": "grey \u2028"}),
            ContentPart.make_tool_error(calls[1].id, "the blinds are down"),
        ]
        accepted = await sdk.messages.create_tool_results(session.id, answers)
        assert (accepted.accepted, accepted.status) == (2, "active")
        rest = [event async for event in _up_to(iterator, "session.idled")]
    stream.stop()
    await iterator.aclose()  # type: ignore[attr-defined]  # a generator
    await stream.aclose()
    assert text_of(rest) == "It rains."
    completed = {event.data["tool_call_id"]: event.data for event in rest if event.type == "tool.completed"}
    assert [completed[call.id]["success"] for call in calls] == [True, False]
    results = [
        part for one in await sdk.messages.list(session.id) for part in one.content if part.type == "tool_result"
    ]
    assert {part.tool_call_id: part.error for part in results}[calls[1].id] == "the blinds are down"
    # The same results once more do no harm.
    assert (await sdk.messages.create_tool_results(session.id, answers)).accepted == 2


async def test_results_sent_before_the_session_waits_are_retried_by_the_sdk(sdk: Everruns, scripted: Scripted) -> None:
    model = await scripted(
        {
            "mode": "script",
            "turns": [
                {"tool_calls": [{"name": "look", "id": "call_early"}], "first_token_delay_ms": 1_000},
                {"text": "Thanks."},
            ],
        }
    )
    session = await sdk.sessions.create(model_id=model, tools=[LOOK])
    await sdk.messages.create(session.id, "go")
    # The first tries are answered with 409; the SDK goes on for three seconds.
    accepted = await sdk.messages.create_tool_results(session.id, [ContentPart.make_tool_result("call_early", "sun")])
    assert accepted.accepted == 1
    assert text_of(await until_idle(sdk.events.stream(session.id))) == "Thanks."


# --- errors ---------------------------------------------------------------------------------------------------------------


async def test_errors_have_the_sdk_s_class_a_code_and_a_message_for_people(sdk: Everruns) -> None:
    nobody = new_id(Prefix.SESSION)
    session = await sdk.sessions.create()
    with pytest.raises(NotFoundError) as missing:
        await sdk.messages.create(nobody, "hi")
    assert (missing.value.code, missing.value.message) == ("not_found", "Session not found")
    with pytest.raises(ApiError) as malformed:
        await sdk.sessions.get("session_1")
    assert (malformed.value.status_code, malformed.value.code) == (400, "malformed_id")
    assert "session_1" in malformed.value.message
    with pytest.raises(ApiError) as unknown:
        await sdk.events.list(session.id, types=["turn.exploded"])
    assert (unknown.value.status_code, unknown.value.code) == (400, "unknown_event_type")
    assert "turn.exploded" in unknown.value.message
    with pytest.raises(ApiError) as conflict:
        await sdk.messages.create_tool_results(session.id, [ContentPart.make_tool_result("call_1", "x")])
    assert (conflict.value.status_code, conflict.value.code) == (409, "not_waiting_for_tool_results")
    assert conflict.value.message == "Session is not waiting for tool results (current status: started)"
    with pytest.raises(ApiError) as reason:
        await sdk.with_reason("password: hunter2hunter2").sessions.delete(session.id)
    assert (reason.value.status_code, reason.value.code) == (400, "invalid_change_reason")
    assert (await sdk.with_reason("tidying up ✓").sessions.get(session.id)).id == session.id
    async with Everruns("evr_pat_test", base_url=str(sdk._base_url), org_id="org_" + "9" * 32) as stranger:
        with pytest.raises(NotFoundError) as elsewhere:
            await stranger.sessions.list()
    assert "organization" in elsewhere.value.message


async def test_too_many_streams_is_the_sdk_s_rate_limit_error(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server, url = await stack.start_server({"SSE_PER_SESSION_MAX": "1"})
    session = await stack.create_session()
    async with SseConnection(f"{url}/sessions/{session}/sse") as first:
        await first.take(1)
        refused = await stack.client.get(f"{url}/sessions/{session}/sse")
        error = ApiError.from_response(refused.status_code, refused.json())
        assert isinstance(error, RateLimitError)
        assert (error.code, error.message) == ("sse_limit", "per-session SSE connection limit reached")
        # The SDK's stream takes it for a broken connection and tries again; without retries it raises.
        async with Everruns("evr_pat_test", base_url=url.removesuffix("/v1")) as sdk:
            stream = EventStream(sdk, session, StreamOptions(max_retries=0))
            with pytest.raises(httpx.TransportError):
                await until_idle(stream)
    await stack.kill(server)


async def test_any_key_is_accepted_without_authentication(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with Everruns("whatever", base_url=stack.addresses.api) as sdk:
        assert await sdk.harnesses.list()
    assert issubclass(AuthenticationError, ApiError)


# --- completeness ---------------------------------------------------------------------------------------------------------

LATER = {
    "agents.list_health_checks": "health checks: scripted conversations with a verdict",
    "agents.trigger_health_check": "health checks",
    "agents.get_health_check": "health checks",
    "agents.list_versions": "agent versions",
    "agents.create_version": "agent versions",
    "agents.set_default_version": "agent versions",
    "agents.diff_versions": "agent versions",
    "agents.fork_version": "agent versions",
    "agents.rollback_version": "agent versions",
}
"""What the SDK can call and this server does not have yet, with what it belongs to."""

GIT: dict[str, object] = {"url": "https://example.com/docs.git"}

GROUPS = (
    *("agents", "sessions", "messages", "events", "capabilities", "harnesses", "models"),
    *("workspaces", "workspace_files", "memories", "connections", "budgets"),
)


def sdk_methods() -> set[str]:
    properties = {name for name, value in vars(Everruns).items() if isinstance(value, property)}
    assert properties == set(GROUPS), "the SDK has another resource"
    client = Everruns("evr_pat_test", base_url="http://127.0.0.1/api")
    return {
        f"{group}.{name}"
        for group in GROUPS
        for name, _ in inspect.getmembers(type(getattr(client, group)), inspect.isfunction)
        if not name.startswith("_")
    }


async def test_every_sdk_method_works_or_is_listed_as_later_work(sdk: Everruns, scripted: Scripted) -> None:
    """Each with the smallest call that makes sense, in an order in which they can all succeed."""
    model = await scripted(
        {"mode": "script", "turns": [{"tool_calls": [{"name": "look", "id": "call_all"}]}, {"text": "ok"}]}
    )
    harness = await sdk.harnesses.create("complete", "Hello.")
    agent = await sdk.agents.create("complete", "Hello.", harness_id=harness.id, default_model_id=model)
    session = await sdk.sessions.create(agent_id=agent.id, tools=[LOOK])
    other_id = generate_agent_id()
    workspace = await sdk.workspaces.create("complete")
    memory = await sdk.memories.create("complete")

    async def sync_memory() -> object:
        remote = next(one for one in await sdk.memories.list() if one.source_type == "git")
        return await sdk.memories.sync(remote.id)

    budget = await sdk.budgets.create("session", session.id, "usd", 10)

    async def tool_results() -> object:
        await sdk.messages.create(session.id, "go")
        return await sdk.messages.create_tool_results(session.id, [ContentPart.make_tool_result("call_all", 1)])

    async def stream() -> list[Event]:
        return await until_idle(sdk.events.stream(session.id))

    works: dict[str, Callable[[], Awaitable[object]]] = {
        "harnesses.create": lambda: sdk.harnesses.create("complete-2", ""),
        "harnesses.list": sdk.harnesses.list,
        "harnesses.search": lambda: sdk.harnesses.search("complete"),
        "harnesses.get": lambda: sdk.harnesses.get(harness.id),
        "harnesses.update": lambda: sdk.harnesses.update(harness.id, description="d", status="active"),
        "harnesses.list_examples": sdk.harnesses.list_examples,
        "models.list": sdk.models.list,
        "models.get": lambda: sdk.models.get(model),
        "capabilities.list": lambda: sdk.capabilities.list(search="time", offset=0, limit=5),
        "capabilities.list_page": lambda: sdk.capabilities.list_page(limit=1),
        "agents.analyze": lambda: sdk.agents.analyze("Help.", capabilities=[AgentCapabilityConfig(ref="current_time")]),
        "capabilities.get": lambda: sdk.capabilities.get("current_time"),
        "capabilities.list_guardrail_examples": sdk.capabilities.list_guardrail_examples,
        "capabilities.dry_run_guardrails": lambda: sdk.capabilities.dry_run_guardrails({}, "output", "x"),
        "agents.create": lambda: sdk.agents.create("complete-2", "x"),
        "agents.apply": lambda: sdk.agents.apply(other_id, "complete-3", "x"),
        "agents.apply_by_name": lambda: sdk.agents.apply_by_name("complete-3", "y"),
        "agents.list": lambda: sdk.agents.list(search="complete"),
        "agents.get": lambda: sdk.agents.get("complete"),
        "agents.copy": lambda: sdk.agents.copy(agent.id),
        "agents.export": lambda: sdk.agents.export(agent.id),
        "agents.import_agent": lambda: sdk.agents.import_agent("---\nname: imported\n---\nHello."),
        "agents.import_example": lambda: sdk.agents.import_example("dad-jokes-agent"),
        "agents.stats": lambda: sdk.agents.stats(agent.id),
        "sessions.create": lambda: sdk.sessions.create(harness_name="generic"),
        "sessions.list": sdk.sessions.list,
        "sessions.get": lambda: sdk.sessions.get(session.id),
        "sessions.pin": lambda: sdk.sessions.pin(session.id),
        "sessions.unpin": lambda: sdk.sessions.unpin(session.id),
        "budgets.create": lambda: sdk.budgets.create("session", session.id, "usd", 1),
        "budgets.list": lambda: sdk.budgets.list(subject_type="session", subject_id=session.id),
        "budgets.get": lambda: sdk.budgets.get(budget.id),
        "budgets.update": lambda: sdk.budgets.update(budget.id, limit=20),
        "budgets.top_up": lambda: sdk.budgets.top_up(budget.id, 5, description="more"),
        "budgets.ledger": lambda: sdk.budgets.ledger(budget.id, limit=10, offset=0),
        "budgets.check": lambda: sdk.budgets.check(budget.id),
        "sessions.budgets": lambda: sdk.sessions.budgets(session.id),
        "sessions.budget_check": lambda: sdk.sessions.budget_check(session.id),
        "sessions.resume": lambda: sdk.sessions.resume(session.id),
        "budgets.delete": lambda: sdk.budgets.delete(budget.id),
        "sessions.set_secrets": lambda: sdk.sessions.set_secrets(session.id, {"TOKEN": "of this test"}),
        "messages.create_tool_results": tool_results,
        "events.stream": stream,
        "events.list": lambda: sdk.events.list(session.id),
        "messages.list": lambda: sdk.messages.list(session.id),
        "sessions.export": lambda: sdk.sessions.export(session.id),
        "messages.create": lambda: sdk.messages.create(session.id, "again"),
        "sessions.cancel": lambda: sdk.sessions.cancel(session.id),
        "workspaces.create": lambda: sdk.workspaces.create("complete-2"),
        "workspaces.list": lambda: sdk.workspaces.list(search="complete", include_archived=True),
        "workspaces.get": lambda: sdk.workspaces.get(workspace.id),
        "workspaces.update": lambda: sdk.workspaces.update(workspace.id, description="d"),
        "workspace_files.create": lambda: sdk.workspace_files.create(workspace.id, "/a.txt", "a"),
        "workspace_files.create_dir": lambda: sdk.workspace_files.create_dir(workspace.id, "dir"),
        "workspace_files.list": lambda: sdk.workspace_files.list(workspace.id, recursive=True),
        "workspace_files.read": lambda: sdk.workspace_files.read(workspace.id, "a.txt"),
        "workspace_files.update": lambda: sdk.workspace_files.update(workspace.id, "a.txt", "b"),
        "workspace_files.stat": lambda: sdk.workspace_files.stat(workspace.id, "a.txt"),
        "workspace_files.grep": lambda: sdk.workspace_files.grep(workspace.id, "b", path_pattern="*.txt"),
        "workspace_files.copy_file": lambda: sdk.workspace_files.copy_file(workspace.id, "/a.txt", "/dir/c.txt"),
        "workspace_files.move_file": lambda: sdk.workspace_files.move_file(workspace.id, "/a.txt", "/d.txt"),
        "workspace_files.delete": lambda: sdk.workspace_files.delete(workspace.id, "dir", recursive=True),
        "memories.create": lambda: sdk.memories.create("complete-2", source=GIT),
        "memories.list": lambda: sdk.memories.list(search="complete", include_archived=True),
        "memories.get": lambda: sdk.memories.get(memory.id),
        "memories.update": lambda: sdk.memories.update(memory.id, description="d"),
        "memories.create_file": lambda: sdk.memories.create_file(memory.id, "/a.txt", "a"),
        "memories.create_dir": lambda: sdk.memories.create_dir(memory.id, "dir"),
        "memories.list_files": lambda: sdk.memories.list_files(memory.id),
        "memories.read_file": lambda: sdk.memories.read_file(memory.id, "a.txt"),
        "memories.update_file": lambda: sdk.memories.update_file(memory.id, "a.txt", "b"),
        "memories.download_file": lambda: sdk.memories.download_file(memory.id, "a.txt"),
        "memories.grep_files": lambda: sdk.memories.grep_files(memory.id, "b", path_pattern="*.txt"),
        "memories.stat_file": lambda: sdk.memories.stat_file(memory.id, "a.txt"),
        "memories.delete_file": lambda: sdk.memories.delete_file(memory.id, "a.txt"),
        "memories.sync": sync_memory,
        "memories.delete": lambda: sdk.memories.delete(memory.id),
        "connections.set": lambda: sdk.connections.set("brave", "of this test"),
        "connections.list": sdk.connections.list,
        "connections.remove": lambda: sdk.connections.remove("brave"),
        "workspaces.delete": lambda: sdk.workspaces.delete(workspace.id),
        "sessions.delete": lambda: sdk.sessions.delete(session.id),
        "agents.delete": lambda: sdk.agents.delete(agent.id),
        "harnesses.delete": lambda: sdk.harnesses.delete(harness.id),
    }
    assert set(works) | set(LATER) == sdk_methods()
    assert not set(works) & set(LATER)
    assert isinstance(await sdk.capabilities.list_page(), ListResponse)
    for name, call in works.items():
        try:
            await call()
        except Exception as error:
            raise AssertionError(f"{name} does not work: {error!r}") from error


async def test_what_is_listed_as_later_work_is_not_there_yet(sdk: Everruns) -> None:
    """When one of these begins to work, it leaves the list and gets a test."""
    agent = await sdk.agents.create("later", "x")
    session = await sdk.sessions.create(agent_id=agent.id)
    ids = {"agent_id": agent.id, "session_id": session.id, "workspace_id": session.workspace_id}
    with pytest.raises(NotFoundError) as no_route:
        await sdk._get("/there-is-no-such-route")
    for name in LATER:
        group, _, method = name.partition(".")
        call = getattr(getattr(sdk, group), method)
        required = [
            one for one in inspect.signature(call).parameters.values() if one.default is inspect.Parameter.empty
        ]
        arguments = {one.name: ids.get(one.name, _plausible(one)) for one in required}
        with pytest.raises(ApiError) as refused:
            await call(**arguments)
        answer = (refused.value.status_code, refused.value.message)
        assert answer in ((404, no_route.value.message), (405, "This method is not supported here")), (
            f"{name} is there: {answer}"
        )


def _plausible(parameter: inspect.Parameter) -> object:
    annotation = str(parameter.annotation)
    if parameter.name == "stage":
        return "output"
    if annotation.startswith(("dict", "Dict")):
        return {"A": "b"}
    if annotation == "float":
        return 1.0
    return "x1"


async def test_the_streams_of_these_tests_are_all_closed(stack: Stack) -> None:
    """An SDK stream that is left behind would hold a slot; the server knows of none."""
    session = await stack.create_session()
    server_log = stack.directory / "dev-1.log"

    def open_streams() -> int:
        text = server_log.read_text()
        return text.count('"stream opened"') - text.count('"stream closed"')

    async with SseConnection(f"{stack.api}/sessions/{session}/sse") as stream:
        await stream.take(1)
        await until(lambda: open_streams() == 1)
    with contextlib.suppress(TimeoutError):
        await until(lambda: open_streams() == 0)
    assert open_streams() == 0
