"""One contract for every driver: each behaviour is put to each of them, over HTTP, against a fake of its provider.

Drivers must not be told apart by what is above them. What a provider cannot be asked for stands in `subjects.SUBJECTS`, with the
reason; there are no other exceptions.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec
import pytest

from domain.messages import ImagePart, ResponseFormat, Role, TextPart, ToolCallPart, ToolResultPart
from domain.model import (
    Began,
    Finished,
    ModelError,
    ModelErrorKind,
    ProviderState,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.model_profiles import EffortConfig, EffortValue, ModelLimits, ModelModalities, ModelProfile
from domain.providers import API_KEY
from domain.secret import Secret
from infra.network import free_port
from tests.contract.subjects import (
    DEADLINE_SECONDS,
    FAILURES,
    KEY,
    OTHER_PROVIDER,
    SUBJECTS,
    Rig,
    Subject,
    message,
    rigged,
    strings,
    tool,
    user,
)
from tests.fakes.script import Answer, Call, Failure, Usage
from tests.fakes.server import Exchange, FakeProvider

STOPS_WITHIN_SECONDS = 1.0
"""How long a cancelled call may go on at the provider."""

SIGNIFICANT_CHARACTERS = 12
"""What is longer is no name of the wire format: it is a signature, an encrypted item, or words of the model."""

PIXEL = base64.b64encode(b"\x89PNG not really").decode()

LONG_TEXT = [f"word{number} " for number in range(500)]

ABLE = ModelProfile(
    name="Able",
    family="able",
    vendor="test",
    attachment=True,
    reasoning=True,
    temperature=True,
    tool_call=True,
    structured_output=True,
    open_weights=False,
    limits=ModelLimits(context=200_000, output=32_000),
    modalities=ModelModalities(input=["text", "image"], output=["text"]),
    reasoning_effort=EffortConfig(
        default="medium", values=[EffortValue(name="Medium", value="medium"), EffortValue(name="High", value="high")]
    ),
)
SPARTAN = ModelProfile(
    name="Spartan",
    family="spartan",
    vendor="test",
    attachment=False,
    reasoning=False,
    temperature=False,
    tool_call=True,
    structured_output=False,
    open_weights=False,
    modalities=ModelModalities(input=["text"], output=["text"]),
    supported_parameters=[],
)


@pytest.fixture(scope="module")
async def rigs() -> AsyncIterator[dict[str, Rig]]:
    async with AsyncExitStack() as servers:
        yield {subject.name: await servers.enter_async_context(rigged(subject)) for subject in SUBJECTS}


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def rig(rigs: dict[str, Rig], request: pytest.FixtureRequest) -> Rig:
    assert isinstance(request.node, pytest.Function)
    subject: Subject = request.param
    failure = request.node.callspec.params.get("failure")
    for name in (str(request.node.originalname), failure):
        if isinstance(name, str) and name in subject.cannot:
            pytest.skip(f"{subject.name}: {subject.cannot[name]}")
    rig = rigs[subject.name]
    if rig.fake is not None:
        rig.fake.requests.clear()
    return rig


def text_of(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def thinking_of(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ThinkingDelta))


def calls_of(events: list[StreamEvent]) -> list[ToolCallReady]:
    return [event for event in events if isinstance(event, ToolCallReady)]


def finish_of(events: list[StreamEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
    return events[-1]


async def outcome_of(rig: Rig, answer: Answer) -> tuple[list[StreamEvent], ModelError | None]:
    """Every event until the end of the stream or its failure."""
    rig.play(answer)
    events: list[StreamEvent] = []
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            async for event in rig.stream(rig.request(tools=[tool("get_weather")])):
                events.append(event)
    except ModelError as error:
        return events, error
    return events, None


async def failure_of(rig: Rig, answer: Answer) -> tuple[list[StreamEvent], ModelError]:
    events, error = await outcome_of(rig, answer)
    assert error is not None
    assert not any(isinstance(event, Finished) for event in events)
    return events, error


# --- what a model says ------------------------------------------------------------------------------------------------


async def test_text_comes_in_pieces_that_join_to_the_answer(rig: Rig) -> None:
    rig.play(Answer(text=["Grüße ", "aus ", "Lissabon ", "☀️"]))
    events = await rig.run()
    assert text_of(events) == "Grüße aus Lissabon ☀️"
    assert sum(isinstance(event, TextDelta) for event in events) == 4
    assert finish_of(events).reason == "stop"


async def test_thinking_stays_apart_from_text(rig: Rig) -> None:
    rig.play(Answer(thinking=["Let ", "me ", "see."], text=["Yes."]))
    events = await rig.run(reasoning_effort="medium")
    assert (thinking_of(events), text_of(events)) == ("Let me see.", "Yes.")


async def test_a_tool_call_comes_whole_and_ends_the_answer(rig: Rig) -> None:
    arguments = '{"city": "São Paulo", "days": 3, "deep": {"list": [1, 2.5, null, true]}}'
    rig.play(Answer(text=["Looking."], calls=[Call(name="get_weather", arguments=arguments, id="call_1")]))
    events = await rig.run(tools=[tool("get_weather")])
    [ready] = calls_of(events)
    assert (ready.call.name, ready.call.id, ready.problem) == ("get_weather", "call_1", None)
    assert ready.call.arguments == msgspec.json.decode(arguments)
    assert finish_of(events).reason == "tool_calls"


async def test_parallel_tool_calls_keep_their_order_and_arguments(rig: Rig) -> None:
    cities = ["Lisbon", "Porto", "Faro"]
    rig.play(Answer(calls=[Call(name="get_weather", arguments=f'{{"city": "{city}"}}') for city in cities]))
    events = await rig.run(tools=[tool("get_weather")])
    calls = calls_of(events)
    assert [ready.call.arguments["city"] for ready in calls] == cities
    assert len({ready.call.id for ready in calls}) == len(cities)
    assert finish_of(events).reason == "tool_calls"


async def test_a_call_without_arguments_has_an_empty_object(rig: Rig) -> None:
    rig.play(Answer(calls=[Call(name="get_time")]))
    [ready] = calls_of(await rig.run(tools=[tool("get_time")]))
    assert (ready.call.arguments, ready.problem) == ({}, None)


@pytest.mark.parametrize("arguments", ['{"city": "Lis', "[1, 2]"], ids=["cut short", "no object"])
async def test_malformed_arguments_are_a_problem_of_the_call(rig: Rig, arguments: str) -> None:
    rig.play(Answer(calls=[Call(name="get_weather", arguments=arguments)]))
    events = await rig.run(tools=[tool("get_weather")])
    [ready] = calls_of(events)
    assert ready.call.arguments == {}
    assert ready.problem is not None
    assert finish_of(events).reason == "tool_calls"


async def test_a_refusal_is_an_answer_with_its_text(rig: Rig) -> None:
    rig.play(Answer(refusal=["I ", "will ", "not."]))
    events = await rig.run()
    assert text_of(events) == "I will not."
    assert finish_of(events).reason == "refusal"


async def test_an_answer_that_hit_the_token_limit_says_so(rig: Rig) -> None:
    rig.play(Answer(text=["Once ", "upon"], finish=rig.subject.words.length))
    events = await rig.run()
    assert (text_of(events), finish_of(events).reason) == ("Once upon", "length")


async def test_an_answer_ended_by_a_content_filter_says_so(rig: Rig) -> None:
    rig.play(Answer(text=["Once "], finish=rig.subject.words.content_filter))
    assert finish_of(await rig.run()).reason == "content_filter"


async def test_usage_is_counted_in_disjoint_buckets(rig: Rig) -> None:
    rig.play(Answer(text=["Hi."], usage=Usage(input=100, output=20, cache_read=40)))
    usage = finish_of(await rig.run()).usage
    assert (usage.input_tokens, usage.cache_read_tokens, usage.output_tokens) == (100, 40, 20)
    assert not usage.cache_creation_tokens
    assert usage.prompt_tokens == 140


async def test_the_response_id_is_told_at_once_and_at_the_end(rig: Rig) -> None:
    rig.play(Answer(text=["Hi."], response_id="response-7"))
    events = await rig.run()
    assert isinstance(events[0], Began)
    assert events[0].response_id == "response-7"
    assert finish_of(events).response_id == "response-7"


async def test_calls_side_by_side_do_not_mix(rig: Rig) -> None:
    words = [f"answer{number} " for number in range(5)]
    requests = []
    for word in words:
        rig.play(Answer(text=[word] * 10, piece_delay_seconds=0.005))
        requests.append(rig.request())
    answers = [text_of(events) for events in await asyncio.gather(*map(rig.call, requests))]
    assert sorted(answers) == sorted(word * 10 for word in words)


# --- what is sent -----------------------------------------------------------------------------------------------------


async def test_images_reach_the_provider(rig: Rig) -> None:
    look = message(
        Role.USER,
        TextPart(text="What is this?"),
        ImagePart(url="https://images.test/cat.png"),
        ImagePart(base64=PIXEL, media_type="image/png"),
    )
    sent = msgspec.json.encode(await rig.body_of(look)).decode()
    assert "https://images.test/cat.png" in sent
    assert PIXEL in sent
    assert "image/png" in sent


async def test_a_conversation_with_tools_is_a_legal_request(rig: Rig) -> None:
    """The fake refuses what its provider would; the rest is that nothing was lost."""
    conversation = [
        message(Role.SYSTEM, TextPart(text="You are terse.")),
        user("Weather and time in Lisbon?"),
        message(
            Role.AGENT,
            TextPart(text="One moment."),
            ToolCallPart(id="call_1", name="get_weather", arguments={"city": "Lisbon"}),
            ToolCallPart(id="call_2", name="get_time", arguments={"city": "Lissabon"}),
        ),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_1", result={"sky": "blue", "degrees": 21})),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_2", error="The clock is broken.")),
        message(Role.AGENT, TextPart(text="It is fine.")),
        user("And tomorrow?"),
    ]
    rig.play(Answer(text=["Rain."]))
    events = await rig.run(*conversation, tools=[tool("get_time"), tool("get_weather")])
    assert text_of(events) == "Rain."
    sent = msgspec.json.encode(rig.bodies[-1]).decode()
    for said in ("You are terse.", "One moment.", "Lissabon", "degrees", "The clock is broken.", "And tomorrow?"):
        assert sent.count(said) == 1, said
    assert sent.count("call_1") == sent.count("call_2") == 2


async def test_a_message_between_call_and_result_is_a_legal_request(rig: Rig) -> None:
    conversation = [
        user("Weather?"),
        message(Role.AGENT, ToolCallPart(id="call_1", name="get_weather", arguments={"city": "Lisbon"})),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_1", result="sunny")),
        user("Quickly, please."),
        user("I am in a hurry."),
    ]
    rig.play(Answer(text=["Sunny."]))
    assert text_of(await rig.run(*conversation, tools=[tool("get_weather")])) == "Sunny."
    sent = list(strings(rig.bodies[-1]))
    assert any("Quickly, please." in said for said in sent)
    assert any("I am in a hurry." in said for said in sent)


async def thought(rig: Rig) -> tuple[list[dict[str, object]], list]:
    """The state of an answer that thought before its tool call, and the conversation after the call."""
    rig.play(
        Answer(
            thinking=["A place in the south, ", "I believe."],
            text=["Looking."],
            calls=[Call(name="get_weather", id="call_1")],
        )
    )
    ask = user("Weather?")
    events = await rig.run(ask, tools=[tool("get_weather")], reasoning_effort="medium")
    answer = message(Role.AGENT, TextPart(text="Looking."), ToolCallPart(id="call_1", name="get_weather", arguments={}))
    result = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_1", result="sunny"))
    return finish_of(events).state, [ask, answer, result]


async def test_opaque_state_comes_back_unmodified(rig: Rig) -> None:
    items, conversation = await thought(rig)
    assert items
    # It is stored as JSON in between.
    state = rig.state(msgspec.json.decode(msgspec.json.encode(items)))
    fields = {"tools": [tool("get_weather")], "reasoning_effort": "medium"}
    sent = await rig.body_of(*conversation, **fields, states={conversation[1].id: state})
    without = await rig.body_of(*conversation, **fields)
    added = set(strings(sent)) - set(strings(without))
    assert any(len(value) > SIGNIFICANT_CHARACTERS for value in added), "nothing of the state was sent"
    assert {value for value in added if len(value) > SIGNIFICANT_CHARACTERS} <= set(strings(items))


async def test_state_of_another_provider_or_driver_stays_out(rig: Rig) -> None:
    items, conversation = await thought(rig)
    fields = {"tools": [tool("get_weather")], "reasoning_effort": "medium"}
    without = await rig.body_of(*conversation, **fields)
    strangers: list[ProviderState] = [
        rig.state(items, provider_public_id=OTHER_PROVIDER),
        rig.state(items, driver="another"),
    ]
    for stranger in strangers:
        assert await rig.body_of(*conversation, **fields, states={conversation[1].id: stranger}) == without


async def test_what_a_model_does_not_take_is_listed_and_not_sent(rig: Rig) -> None:
    look = message(Role.USER, TextPart(text="What is this?"), ImagePart(base64=PIXEL, media_type="image/png"))
    asked = {
        "reasoning_effort": "high",
        "verbosity": "low",
        "speed": "fast",
        "parallel_tool_calls": False,
        "response_format": ResponseFormat(type="json_schema", schema={"type": "object", "properties": {}}),
        "options": {"temperature": 0.3, "top_p": 0.7},
    }
    fields = {"profile": SPARTAN, "tools": [tool("get_weather")]}
    plain = await rig.body_of(look, **fields)
    rig.wire.requests.clear()
    events = await rig.run(look, **fields, **asked)
    assert {**rig.bodies[-1], "prompt_cache_key": None} == {**plain, "prompt_cache_key": None}
    assert PIXEL not in msgspec.json.encode(plain).decode()
    dropped = finish_of(events).dropped_options
    assert sorted(dropped) == sorted(
        ["images", "parallel_tool_calls", "reasoning_effort", "response_format", "speed", "temperature", "top_p",
         "verbosity"]
    )  # fmt: skip


async def test_serial_tool_calls_are_asked_for_or_listed_as_dropped(rig: Rig) -> None:
    fields = {"profile": ABLE, "tools": [tool("get_weather")]}
    plain = await rig.body_of(**fields)
    finished = finish_of(await rig.run(**fields, parallel_tool_calls=False))
    assert (rig.bodies[-1] != plain) != ("parallel_tool_calls" in finished.dropped_options)


async def test_a_schema_for_the_answer_is_sent(rig: Rig) -> None:
    schema = {
        "type": "object",
        "properties": {"temperature_in_lisbon": {"type": "integer"}},
        "required": ["temperature_in_lisbon"],
        "additionalProperties": False,
    }
    rig.play(Answer(text=["{}"]))
    events = await rig.run(profile=ABLE, response_format=ResponseFormat(type="json_schema", schema=schema))
    assert b"temperature_in_lisbon" in msgspec.json.encode(rig.bodies[-1])
    assert finish_of(events).dropped_options == []


async def test_the_order_of_tools_does_not_change_the_request(rig: Rig) -> None:
    """A prompt cache holds a prefix, and tools are its beginning."""
    tools = [tool("b"), tool("c"), tool("a")]
    assert await rig.body_of(tools=tools) == await rig.body_of(tools=tools[::-1])


# --- how it fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_before_the_stream_is_the_same_kind_everywhere(rig: Rig, failure: Failure) -> None:
    events, error = await failure_of(rig, Answer(failure=failure))
    assert events == []
    assert error.kind is FAILURES[failure]
    assert 0 < len(error.message) <= 1000
    assert KEY not in error.message


@pytest.mark.parametrize("failure", ["rate_limit", "overloaded", "server_error"])
async def test_a_failure_tells_when_to_come_back(rig: Rig, failure: Failure) -> None:
    _, error = await failure_of(rig, Answer(failure=failure, retry_after_seconds=7))
    assert error.retry_after_seconds == 7
    assert error.retryable


@pytest.mark.parametrize("failure", ["rate_limit", "overloaded", "server_error", "quota", "overflow", "content_filter"])
async def test_a_failure_inside_the_stream_is_the_same_kind_everywhere(rig: Rig, failure: Failure) -> None:
    events, error = await failure_of(rig, Answer(text=["One ", "two ", "three"], failure=failure, after=2))
    assert text_of(events) == "One two "
    assert error.kind is FAILURES[failure]
    assert KEY not in error.message


async def test_a_clean_cut_is_no_answer(rig: Rig) -> None:
    rig.play(Answer(text=["One ", "two ", "three"], cut="clean", after=2))
    events = await rig.run()
    assert text_of(events) == "One two "
    assert not any(isinstance(event, Finished) for event in events)


async def test_an_abrupt_cut_is_no_answer(rig: Rig) -> None:
    events, error = await outcome_of(rig, Answer(text=["One ", "two ", "three"], cut="abrupt", after=2))
    assert not any(isinstance(event, Finished) for event in events)
    assert error is None or error.kind is ModelErrorKind.TRANSPORT


async def test_a_server_that_is_not_there_is_a_transport_error(rig: Rig) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError) as raised:
        await rig.run(endpoint=rig.endpoint(base_url=nobody + rig.wire.base_path))
    assert raised.value.kind is ModelErrorKind.TRANSPORT


async def test_a_missing_key_is_not_configured(rig: Rig) -> None:
    with pytest.raises(ModelError) as raised:
        await rig.run(endpoint=rig.endpoint(credentials={}))
    assert raised.value.kind is ModelErrorKind.NOT_CONFIGURED
    assert rig.wire.requests == []


async def test_a_key_with_a_line_break_is_not_repeated_in_an_error(rig: Rig) -> None:
    """HTTP libraries quote a header they cannot send."""
    with pytest.raises(ModelError) as raised:
        await rig.run(endpoint=rig.endpoint(credentials={API_KEY: Secret(f"{KEY}\r\nX-Injected: 1")}))
    assert KEY not in raised.value.message
    assert not raised.value.retryable
    assert rig.wire.requests == []


async def test_the_key_is_sent_and_repeated_nowhere(rig: Rig) -> None:
    events, error = await failure_of(rig, Answer(failure="auth"))
    [recorded] = rig.wire.requests
    assert any(KEY in value for value in recorded.headers.values())
    assert KEY not in recorded.path + recorded.query + msgspec.json.encode(recorded.body).decode()
    assert KEY not in f"{error!r} {error.fields} {events}"


class Unfriendly(FakeProvider):
    """A server that repeats the key in its errors, or sends its clients elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: str | None = None

    async def handle(self, exchange: Exchange) -> None:
        if self.elsewhere is not None:
            await exchange.json({}, status=307, headers={"location": self.elsewhere + exchange.request.path})
            return
        sent = " ".join(value for value in exchange.request.headers.values() if KEY in value)
        error = {"type": "authentication_error", "code": "invalid_api_key", "message": f"Who is `{sent}`?"}
        await exchange.json({"type": "error", "error": error}, status=401)


async def test_a_key_that_the_provider_repeats_is_masked(rig: Rig) -> None:
    async with Unfriendly().running() as server:
        with pytest.raises(ModelError) as raised:
            await rig.run(endpoint=rig.endpoint(base_url=server.url + rig.wire.base_path))
    assert raised.value.kind is ModelErrorKind.AUTHENTICATION
    assert "Who is" in raised.value.message
    assert KEY not in f"{raised.value!r} {raised.value.fields}"


async def test_a_redirect_is_not_followed_with_the_key(rig: Rig) -> None:
    async with Unfriendly().running() as server:
        assert isinstance(server, Unfriendly)
        server.elsewhere = rig.wire.origin
        with pytest.raises(ModelError):
            await rig.run(endpoint=rig.endpoint(base_url=server.url + rig.wire.base_path))
    assert rig.wire.requests == []


# --- how it ends early ------------------------------------------------------------------------------------------------


async def begun(rig: Rig, answer: Answer) -> AsyncIterator[StreamEvent]:
    """A stream that has just yielded its first text."""
    rig.play(answer)
    stream = rig.stream(rig.request())
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not isinstance(await anext(stream), TextDelta):
            pass
    return stream


async def until_gone(rig: Rig, before: int, since: float) -> None:
    """The fake has noticed that its client left."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while rig.wire.clients_gone == before:  # noqa: ASYNC110  # the fake only counts
            await asyncio.sleep(0.005)
    assert time.monotonic() - since < STOPS_WITHIN_SECONDS


async def cancel_while_waiting(rig: Rig, stream: AsyncIterator[StreamEvent]) -> None:
    before = rig.wire.clients_gone

    async def read() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)  # it waits for the next event now
    cancelled = time.monotonic()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until_gone(rig, before, cancelled)


async def test_cancelling_a_stalled_stream_closes_the_connection_within_a_second(rig: Rig) -> None:
    stream = await begun(rig, Answer(text=["One ", "two"], stall=True, after=1))
    await cancel_while_waiting(rig, stream)


async def test_cancelling_a_running_stream_closes_the_connection_within_a_second(rig: Rig) -> None:
    stream = await begun(rig, Answer(text=LONG_TEXT, piece_delay_seconds=0.01))
    await cancel_while_waiting(rig, stream)


async def test_closing_the_stream_closes_the_connection(rig: Rig) -> None:
    stream = await begun(rig, Answer(text=LONG_TEXT, piece_delay_seconds=0.01))
    before, closed = rig.wire.clients_gone, time.monotonic()
    await stream.aclose()  # type: ignore[attr-defined]  # drivers' streams are generators
    await until_gone(rig, before, closed)


async def test_a_driver_works_again_after_a_cancelled_call(rig: Rig) -> None:
    stream = await begun(rig, Answer(text=LONG_TEXT, piece_delay_seconds=0.01))
    await stream.aclose()  # type: ignore[attr-defined]
    rig.play(Answer(text=["Fine."]))
    assert text_of(await rig.run()) == "Fine."


# --- the exceptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_exception_names_a_behaviour(subject: Subject) -> None:
    behaviours = {name for name in globals() if name.startswith("test_")} | set(FAILURES)
    assert set(subject.cannot) <= behaviours
