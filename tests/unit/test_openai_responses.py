"""The driver for the Responses API, against a server that speaks it. What all drivers have in common is in `tests/contract`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, cast, get_args

import msgspec
import pytest

from activities.llm import driver_for
from activities.llm.openai_responses import OpenAIResponses
from activities.llm.openai_responses_request import prepare
from activities.llm.openai_responses_stream import ProviderFailure, ResponseReader
from activities.llm.options import parse_options
from domain.errors import InvalidInput
from domain.events import TokenUsage
from domain.messages import (
    ContentPart,
    ImageFilePart,
    ImagePart,
    Message,
    Phase,
    ResponseFormat,
    Role,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from domain.model import (
    Alive,
    Began,
    Finished,
    ModelEndpoint,
    ModelError,
    ModelErrorKind,
    ModelLister,
    ModelRequest,
    NativeCompactor,
    ProviderState,
    ReasoningItem,
    ResponseStopper,
    ResumePoint,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.model_profiles import EffortConfig, EffortValue, ModelModalities, ModelProfile
from domain.providers import API_KEY
from domain.secret import Secret
from domain.tools import BuiltinTool
from infra.network import free_port
from tests.contract.subjects import FAILURES
from tests.fakes.openai_responses import FakeOpenAIResponses, Generation, encrypted
from tests.fakes.script import Answer, Call, Failure, Usage

KEY = "sk-test-Zq7Wm3Xk9Lp2Rt5Vb8Nc"
PROVIDER = "provider_00000000000000000000000000000001"
DEADLINE_SECONDS = 10.0
BACKGROUND: dict[str, object] = {"background": True}

REASONER = ModelProfile(
    name="Reasoner",
    family="test",
    vendor="openai",
    attachment=True,
    reasoning=True,
    temperature=False,
    tool_call=True,
    structured_output=True,
    open_weights=False,
    supports_phases=True,
    supported_parameters=["verbosity", "speed", "parallel_tool_calls"],
    reasoning_effort=EffortConfig(
        default="medium", values=[EffortValue(name="None", value="none"), EffortValue(name="High", value="high")]
    ),
)
TALKER = msgspec.structs.replace(
    REASONER,
    reasoning=False,
    reasoning_effort=None,
    temperature=True,
    supports_phases=None,
    supported_parameters=["temperature", "top_p"],
)
SPARTAN = msgspec.structs.replace(
    TALKER,
    temperature=False,
    tool_call=False,
    structured_output=False,
    modalities=ModelModalities(input=["text"], output=["text"]),
    supported_parameters=[],
)
LOOKUP = BuiltinTool(name="lookup", description="Looks up", parameters={"type": "object", "properties": {"q": {}}})

_ids = itertools.count(1)


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAIResponses]:
    async with FakeOpenAIResponses().running() as running:
        assert isinstance(running, FakeOpenAIResponses)
        yield running


@pytest.fixture
def driver() -> OpenAIResponses:
    return OpenAIResponses(reconnect_delays_seconds=(0.01, 0.02, 0.05))


def message(role: Role, *parts: ContentPart, **fields: Any) -> Message:
    return Message(
        id=f"message_{next(_ids):032x}", role=role, content=list(parts), created_at="2026-01-01T00:00:00.000Z", **fields
    )


def user(text: str) -> Message:
    return message(Role.USER, TextPart(text=text))


def request_for(fake: FakeOpenAIResponses | None, *messages: Message, **fields: Any) -> ModelRequest:
    endpoint = ModelEndpoint(
        provider_type="openai",
        provider_public_id=PROVIDER,
        base_url=fake.url if fake else "http://127.0.0.1:1/v1/",
        credentials={API_KEY: Secret(KEY)},
    )
    defaults: dict[str, Any] = {
        "model": "gpt-5.4",
        "messages": list(messages) or [user("Hello?")],
        "tools": [],
        "session_id": "session_00000000000000000000000000000001",
        "idempotency_key": "exec_1",
        "endpoint": endpoint,
    }
    return ModelRequest(**defaults | fields)


async def run(driver: OpenAIResponses, request: ModelRequest) -> list[StreamEvent]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [event async for event in driver.stream(request)]


async def failure_of(driver: OpenAIResponses, request: ModelRequest) -> tuple[list[StreamEvent], ModelError]:
    events: list[StreamEvent] = []
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            async for event in driver.stream(request):
                events.append(event)
    except ModelError as error:
        return events, error
    pytest.fail(f"no failure, but {events}")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 # the fake has no event for each of them
            await asyncio.sleep(0.005)


def body_of(*messages: Message, **fields: Any) -> dict[str, Any]:
    return prepare(request_for(None, *messages, **fields)).body


def text_of(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def finish_of(events: Sequence[StreamEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def calls_of(events: Sequence[StreamEvent]) -> list[str]:
    return [event.call.id for event in events if isinstance(event, ToolCallReady)]


def state_of(items: list[dict[str, object]], **changes: Any) -> ProviderState:
    fields: dict[str, Any] = {"provider_public_id": PROVIDER, "driver": "openai_responses", "model": "gpt-5.4"}
    # As stored: through JSON.
    return ProviderState(**fields | {"items": msgspec.json.decode(msgspec.json.encode(items))} | changes)


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_driver_is_the_one_of_openai_with_all_it_can_do() -> None:
    for provider_type in ("openai", "azure_openai"):
        driver = driver_for(provider_type)
        assert isinstance(driver, OpenAIResponses)
        assert isinstance(driver, ModelLister)
        assert isinstance(driver, NativeCompactor)
        assert isinstance(driver, ResponseStopper)


async def test_a_full_request_is_what_the_sdk_would_send(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    """The body is JSON of our own; the SDK's parameter types say whether it is one of theirs."""
    from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
    from pydantic import TypeAdapter

    fake.play(Answer(thinking=["Hm."], text=["Well."], calls=[Call(name="lookup", id="call_1")]))
    ask = message(Role.USER, TextPart(text="Hi"), ImagePart(url="https://images.test/a.png"))
    first = await run(driver, request_for(fake, ask, profile=REASONER, tools=[LOOKUP]))
    answer = message(Role.AGENT, TextPart(text="Well."), ToolCallPart(id="call_1", name="lookup", arguments={}))
    result = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_1", result="found"))
    await run(
        driver,
        request_for(
            fake,
            message(Role.SYSTEM, TextPart(text="Be brief.")),
            ask,
            answer,
            result,
            profile=REASONER,
            tools=[LOOKUP],
            states={answer.id: state_of(finish_of(first).state)},
            reasoning_effort="high",
            verbosity="low",
            speed="flex",
            parallel_tool_calls=False,
            max_output_tokens=1000,
            response_format=ResponseFormat(type="json_schema", schema={"type": "object"}),
            options=BACKGROUND,
        ),
    )
    body = fake.requests[-1].body
    TypeAdapter(ResponseCreateParamsStreaming).validate_python(body)
    assert fake.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert body["instructions"] == "Be brief."
    assert body["reasoning"] == {"effort": "high", "summary": "auto"}
    assert body["include"] == ["reasoning.encrypted_content"]
    assert body["text"]["verbosity"] == "low"
    assert body["service_tier"] == "flex"
    assert body["parallel_tool_calls"] is False
    assert body["max_output_tokens"] == 1000
    assert (body["stream"], body["background"], body["store"]) == (True, True, True)
    assert "temperature" not in body


def test_the_least_request_keeps_nothing_at_the_provider() -> None:
    assert body_of(user("Hello?")) == {
        "model": "gpt-5.4",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello?"}]}],
        "store": False,
        "stream": True,
        "prompt_cache_key": "session_00000000000000000000000000000001",
    }


def test_images_go_as_address_or_data_and_files_as_words() -> None:
    look = message(
        Role.USER,
        ImagePart(url="https://images.test/a.png"),
        ImagePart(base64="AAAA", media_type="image/jpeg"),
        ImageFilePart(image_id="image_1", filename="plan.png"),
        ImagePart(),
    )
    prepared = prepare(request_for(None, look))
    content = prepared.body["input"][0]["content"]
    assert [part.get("image_url") for part in content[:2]] == [
        "https://images.test/a.png",
        "data:image/jpeg;base64,AAAA",
    ]
    assert [part.get("text") for part in content[2:]] == ["[image plan.png]", "[image]"]
    assert prepared.dropped == ["images"]


def test_results_are_text_json_images_or_a_readable_error() -> None:
    pixel = {"type": "image", "base64": "AAAA", "media_type": "image/png"}
    results = [
        ToolResultPart(tool_call_id="1", result="plain"),
        ToolResultPart(tool_call_id="2", result={"rows": [1, None]}),
        ToolResultPart(tool_call_id="3", result=[{"type": "text", "text": "See:"}, pixel]),
        ToolResultPart(tool_call_id="4", error="The clock is broken."),
        ToolResultPart(tool_call_id="5", result=[]),
        ToolResultPart(tool_call_id="6"),
    ]
    outputs = [item["output"] for item in body_of(message(Role.TOOL_RESULT, *results))["input"]]
    assert outputs[0] == "plain"
    assert msgspec.json.decode(outputs[1]) == {"rows": [1, None]}
    assert [part["type"] for part in outputs[2]] == ["input_text", "input_image"]
    assert outputs[3:] == ["Error: The clock is broken.", "[]", ""]


def test_an_answer_without_state_goes_back_as_text_and_calls_with_its_phase() -> None:
    answer = message(
        Role.AGENT,
        ToolCallPart(id="call_1", name="lookup", arguments={"q": 1}),
        TextPart(text="Looking."),
        phase=Phase.COMMENTARY,
    )
    said, call = body_of(answer, profile=REASONER)["input"]
    assert said == {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Looking.", "annotations": []}],
        "phase": "commentary",
    }
    assert call == {"type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": '{"q":1}'}
    assert "phase" not in body_of(answer, profile=TALKER)["input"][0]
    assert "phase" not in body_of(answer)["input"][0]


def test_call_ids_that_are_too_long_are_shortened_alike_in_call_and_result() -> None:
    long = "x" * 80
    call = message(Role.AGENT, ToolCallPart(id=long, name="lookup", arguments={}))
    other = message(Role.AGENT, ToolCallPart(id=long + "y", name="lookup", arguments={}))
    result = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id=long, result="found"))
    ids = [item["call_id"] for item in body_of(call, other, result)["input"]]
    assert ids[0] == ids[2] != ids[1]
    assert max(map(len, ids)) <= 64


def test_tools_are_declared_by_name_and_not_strict() -> None:
    tools = [
        BuiltinTool(name="b", description="B", parameters={}),
        BuiltinTool(name="a", description="A", parameters=LOOKUP.parameters),
    ]
    assert body_of(tools=tools)["tools"] == [
        {"type": "function", "name": "a", "description": "A", "parameters": LOOKUP.parameters, "strict": False},
        {
            "type": "function",
            "name": "b",
            "description": "B",
            "parameters": {"type": "object", "properties": {}},
            "strict": False,
        },
    ]


@pytest.mark.parametrize(
    ("profile", "effort", "reasoning"),
    [
        (REASONER, None, {"summary": "auto"}),
        (REASONER, "high", {"effort": "high", "summary": "auto"}),
        (REASONER, "none", {"effort": "none"}),
        (TALKER, None, None),
        (None, None, None),
        (None, "low", {"effort": "low", "summary": "auto"}),
    ],
)
def test_only_models_that_reason_are_asked_how(
    profile: ModelProfile | None, effort: str | None, reasoning: object
) -> None:
    body = body_of(profile=profile, reasoning_effort=effort)
    assert body.get("reasoning") == reasoning
    assert ("include" in body) == (reasoning is not None)


CLOSED = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (CLOSED, True),
        (CLOSED | {"required": []}, False),
        (CLOSED | {"additionalProperties": True}, False),
        (CLOSED | {"properties": {"a": {"type": "object"}}}, False),
        (CLOSED | {"properties": {"a": {"type": "array", "items": {"type": "object"}}}}, False),
        (CLOSED | {"properties": {"a": {"oneOf": []}}}, False),
        (CLOSED | {"properties": {"not": {"type": "string"}}, "required": ["not"]}, True),
        (CLOSED | {"$defs": {"b": CLOSED}}, True),
    ],
)
def test_a_schema_is_strict_where_the_api_allows_it(schema: dict[str, object], strict: bool) -> None:
    wanted = ResponseFormat(type="json_schema", name="weather", schema=schema)
    assert body_of(response_format=wanted)["text"]["format"] == {
        "type": "json_schema",
        "name": "weather",
        "schema": schema,
        "strict": strict,
    }


def test_json_without_a_schema_is_mentioned_for_it_would_be_refused() -> None:
    anything = ResponseFormat(type="json_object")
    body = body_of(user("Hello?"), response_format=anything)
    assert body["text"]["format"] == {"type": "json_object"}
    assert "JSON" in body["input"][-1]["content"]
    assert len(body_of(user("Say it in JSON"), response_format=anything)["input"]) == 1


def test_options_are_sent_and_requests_win_over_them() -> None:
    options: dict[str, object] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 500,
        "reasoning_effort": "low",
        "verbosity": "high",
        "speed": "priority",
        "extra_body": {"truncation": "auto", "stream": False},
    }
    body = body_of(options=options)
    assert (body["temperature"], body["top_p"], body["max_output_tokens"]) == (0.5, 0.9, 500)
    assert (body["reasoning"]["effort"], body["text"]["verbosity"], body["service_tier"]) == ("low", "high", "priority")
    assert (body["truncation"], body["stream"]) == ("auto", True)
    body = body_of(options=options, reasoning_effort="high", verbosity="low", speed="flex", max_output_tokens=5)
    assert (body["reasoning"]["effort"], body["text"]["verbosity"], body["service_tier"]) == ("high", "low", "flex")
    assert body["max_output_tokens"] == 16, "fewer are refused"


def test_no_cache_key_when_caching_is_off() -> None:
    assert "prompt_cache_key" not in body_of(prompt_cache=False)


async def test_what_a_model_does_not_take_is_dropped_and_named(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    look = message(Role.USER, TextPart(text="Look"), ImagePart(base64="AAAA"))
    events = await run(
        driver,
        request_for(
            fake,
            look,
            profile=SPARTAN,
            tools=[LOOKUP],
            reasoning_effort="high",
            verbosity="low",
            speed="flex",
            parallel_tool_calls=True,
            response_format=ResponseFormat(type="json_object"),
            options={"temperature": 0.1, "top_p": 0.2},
        ),
    )
    assert set(fake.requests[-1].body) == {"model", "input", "store", "stream", "prompt_cache_key"}
    assert sorted(finish_of(events).dropped_options) == [
        "images", "reasoning_effort", "response_format", "speed", "temperature", "tools", "top_p", "verbosity",
    ]  # fmt: skip


def test_an_effort_the_model_does_not_know_and_serial_calls_it_cannot_make_are_dropped() -> None:
    assert prepare(request_for(None, profile=REASONER, reasoning_effort="minimal")).dropped == ["reasoning_effort"]
    prepared = prepare(request_for(None, profile=TALKER, tools=[LOOKUP], parallel_tool_calls=False))
    assert prepared.dropped == ["parallel_tool_calls"]
    assert prepare(request_for(None, profile=TALKER, speed="default")).dropped == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temprature": 1}, "options.temprature"),
        ({"temperature": 3}, "options.temperature"),
        ({"speed": "warp"}, "options.speed"),
        ({"max_output_tokens": 0}, "options.max_output_tokens"),
        ({"extra_body": []}, "options.extra_body"),
    ],
)
async def test_bad_options_are_named_and_never_sent(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_options(options)
    assert caught.value.field == field
    events, error = await failure_of(driver, request_for(fake, options=options))
    assert (events, error.kind, fake.requests) == ([], ModelErrorKind.INVALID_REQUEST, [])
    assert field in error.message


def test_azure_stores_what_it_takes_reasoning_back_by() -> None:
    azure = msgspec.structs.replace(request_for(None).endpoint, provider_type="azure_openai")
    assert body_of(endpoint=azure, profile=REASONER)["store"] is True
    assert body_of(endpoint=azure, profile=TALKER)["store"] is False


# --- what comes back --------------------------------------------------------------------------------------------------


async def test_the_fake_speaks_the_wire_format_of_the_sdk(fake: FakeOpenAIResponses) -> None:
    """Everything else here stands on it."""
    from openai.types.responses import Response, ResponseStreamEvent
    from pydantic import TypeAdapter

    event_type = TypeAdapter[object](ResponseStreamEvent)
    answers = [
        Answer(thinking=["Hm."], text=["A", "B"], calls=[Call(name="lookup")], phase="commentary"),
        Answer(refusal=["No."]),
        Answer(text=["A"], finish="length"),
        Answer(text=["A"], failure="server_error", after=1),
    ]
    bodies = [{"model": "gpt-5.4", "input": [], "include": ["reasoning.encrypted_content"]}] * len(answers)
    bodies[0] = bodies[0] | {"background": True, "store": True}
    fake.reports = "response.failed"
    seen: set[str] = set()
    for body, answer in zip(bodies, answers, strict=True):
        generation = fake.begin(body, answer)
        await until(lambda generation=generation: generation.is_over and bool(generation.events[-1].get("response")))
        for event in generation.events:
            event_type.validate_python(event)
            seen.add(event["type"])
        assert [event["sequence_number"] for event in generation.events] == list(range(len(generation.events)))
    TypeAdapter(Response).validate_python(next(iter(fake.generations.values())).response())
    assert {"response.failed", "response.incomplete", "response.refusal.delta", "response.queued"} <= seen


async def test_a_whole_answer_comes_in_order(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(
        Answer(
            thinking=["First ", "this."],
            text=["Looking", "."],
            calls=[
                Call(name="lookup", arguments='{"q": 1}', id="call_a"),
                Call(name="lookup", arguments="{", id="call_b"),
            ],
            usage=Usage(input=100, output=30, cache_read=40, cache_write=10, reasoning=20, cost_usd=0.5),
            phase="commentary",
            response_id="resp_7",
        )
    )
    events = await run(driver, request_for(fake, profile=REASONER, tools=[LOOKUP]))
    kinds = [
        type(event).__name__
        for event, _ in itertools.groupby(event for event in events if not isinstance(event, Alive))
    ]
    assert kinds == [
        "Began", "ThinkingDelta", "ThinkingDelta", "TextDelta", "TextDelta", "ToolCallReady", "ToolCallReady", "Finished",
    ]  # fmt: skip
    assert events[0] == Began(response_id="resp_7")
    cursors = [event.cursor for event in events if isinstance(event, TextDelta | ThinkingDelta)]
    assert cursors == sorted({cursor for cursor in cursors if cursor is not None})
    good, bad = [event for event in events if isinstance(event, ToolCallReady)]
    assert (good.call.id, good.call.arguments, good.problem) == ("call_a", {"q": 1}, None)
    assert (bad.call.id, bad.call.arguments) == ("call_b", {})
    assert bad.problem is not None
    finished = finish_of(events)
    assert finished.reason == "tool_calls"
    assert finished.phase is Phase.COMMENTARY
    assert finished.response_id == "resp_7"
    assert finished.usage == TokenUsage(
        input_tokens=100, output_tokens=30, cache_read_tokens=40, cache_creation_tokens=10, actual_cost_usd=0.5
    )
    assert finished.reasoning_items == [ReasoningItem(item_id="rs_0002", summary=["First this."], token_count=20)]


async def test_every_event_of_the_provider_says_that_it_is_alive(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(Answer(thinking=["Hm."], text=["A"], calls=[Call(name="lookup")]))
    events = await run(driver, request_for(fake, options=BACKGROUND))
    [generation] = fake.generations.values()
    assert len(events) == len(generation.events)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(text=["A"]), "stop"),
        (Answer(refusal=["I ", "will not."]), "refusal"),
        (Answer(text=["A"], finish="max_output_tokens"), "length"),
        (Answer(text=["A"], finish="content_filter"), "content_filter"),
        (Answer(text=["A"], calls=[Call(name="lookup")]), "tool_calls"),
    ],
)
async def test_answers_say_how_they_ended(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, answer: Answer, reason: str
) -> None:
    fake.play(answer)
    events = await run(driver, request_for(fake))
    assert finish_of(events).reason == reason
    assert text_of(events) == "".join((*answer.text, *answer.refusal))


async def test_an_answer_without_usage_is_an_answer(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(Answer(text=["A"], usage=None))
    assert finish_of(await run(driver, request_for(fake))).usage == TokenUsage(input_tokens=0, output_tokens=0)


async def test_a_connection_is_used_again(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    ports: set[int] = set()
    app = fake.__call__

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            ports.add(scope["client"][1])
        await app(scope, receive, send)

    from tests.conftest import served

    async with served(cast(Any, noting)) as origin:
        endpoint = msgspec.structs.replace(request_for(fake).endpoint, base_url=f"{origin}/v1/")
        for _ in range(3):
            await run(driver, request_for(fake, endpoint=endpoint))
    assert len(ports) == 1


# --- reading ----------------------------------------------------------------------------------------------------------


def read_all(*events: dict[str, Any], reader: ResponseReader | None = None) -> list[StreamEvent]:
    reader = reader or ResponseReader([], resumable=False)
    numbered = [{"sequence_number": number, **event} for number, event in enumerate(events)]
    return [said for event in numbered for said in reader.read(event)]


def text_delta(item_id: str, delta: str, **fields: Any) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "item_id": item_id, "delta": delta, **fields}


def completed(*output: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": list(output)}}


def wrote(item_id: str, text: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "id": item_id, "content": content, **fields}


def thought(item_id: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": item_id, "summary": [], "status": None, "encrypted_content": encrypted(item_id)}


def called(call_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{call_id}",
        "call_id": call_id,
        "name": "lookup",
        "arguments": "{}",
    } | fields


def test_two_messages_of_one_turn_are_one_text_with_a_blank_line_and_come_back_as_two() -> None:
    events = read_all(
        text_delta("msg_1", "Let me "),
        text_delta("msg_1", "see."),
        text_delta("msg_2", "It "),
        text_delta("msg_2", "is."),
        completed(
            wrote("msg_1", "Let me see.", phase="commentary"),
            thought("rs_1"),
            wrote("msg_2", "It is.", phase="final_answer"),
        ),
    )
    assert text_of(events) == "Let me see.\n\nIt is."
    answer = message(Role.AGENT, TextPart(text=text_of(events)))
    assert finish_of(events).phase is Phase.FINAL_ANSWER
    state = state_of(finish_of(events).state)
    items = body_of(user("?"), answer, user("!"), states={answer.id: state}, profile=REASONER)["input"][1:-1]
    assert [(item["type"], item["id"], item.get("phase")) for item in items] == [
        ("message", "msg_1", "commentary"),
        ("reasoning", "rs_1", None),
        ("message", "msg_2", "final_answer"),
    ]
    assert [item["content"][0]["text"] for item in items if item["type"] == "message"] == ["Let me see.", "It is."]


def test_parts_of_thinking_are_paragraphs() -> None:
    kind = "response.reasoning_summary_text.delta"
    events = read_all(
        {"type": kind, "item_id": "rs_1", "summary_index": 0, "delta": "One"},
        {"type": kind, "item_id": "rs_1", "summary_index": 0, "delta": "."},
        {"type": kind, "item_id": "rs_1", "summary_index": 1, "delta": "Two."},
        {"type": "response.reasoning_text.delta", "item_id": "rs_2", "content_index": 0, "delta": "Three."},
    )
    assert "".join(event.text for event in events if isinstance(event, ThinkingDelta)) == "One.\n\nTwo.\n\nThree."


def test_unknown_events_and_items_neither_break_nor_change() -> None:
    novelty = {"type": "telepathy_call", "id": "tp_1", "thoughts": {"deep": [1]}}
    events = read_all(
        {"type": "response.telepathy.started", "anything": None},
        {"type": "response.output_item.done", "output_index": 0, "item": None},
        {},
        completed(novelty, wrote("msg_1", "A")),
    )
    assert all(isinstance(event, Alive) for event in events[:3])
    answer = message(Role.AGENT, TextPart(text="A"))
    state = state_of(finish_of(events).state)
    assert body_of(answer, states={answer.id: state})["input"][0] == novelty


def test_items_of_the_stream_stand_in_for_a_terminal_event_without_output() -> None:
    events = read_all(
        {"type": "response.output_item.done", "output_index": 1, "item": called("call_1")},
        {"type": "response.output_item.done", "output_index": 0, "item": thought("rs_1")},
        completed(),
    )
    assert calls_of(events) == ["call_1"]
    assert [set(item) for item in finish_of(events).state] == [{"item"}, {"call", "id"}]


def test_a_call_that_was_broken_off_is_none() -> None:
    broken = called("call_2", status="incomplete", arguments='{"q')
    end = completed(called("call_1"), broken)
    end["type"], end["response"]["status"] = "response.incomplete", "incomplete"
    events = read_all(end)
    assert calls_of(events) == ["call_1"]
    assert finish_of(events).reason == "length"


def test_nothing_is_kept_of_a_turn_that_its_message_tells_whole() -> None:
    events = read_all(
        completed(wrote("msg_1", "A"), called("call_1"), {"type": "reasoning", "id": "rs_1", "summary": []})
    )
    assert finish_of(events).state == []


@pytest.mark.parametrize("kind", ["response.failed", "response.cancelled"])
def test_a_failure_without_words_is_a_failure(kind: str) -> None:
    with pytest.raises(ProviderFailure) as caught:
        read_all({"type": kind, "response": {"id": "resp_1", "status": "failed", "error": None}})
    assert caught.value.model_error(KEY).retryable


# --- opaque state -----------------------------------------------------------------------------------------------------


def rebuilt(state: list[dict[str, object]], answer: Message, **changes: Any) -> list[dict[str, Any]]:
    request = request_for(None, user("?"), answer, user("!"), states={answer.id: state_of(state, **changes)})
    return prepare(request).body["input"][1:-1]


async def test_a_turn_goes_back_as_the_model_wrote_it_under_the_ids_calls_have_here(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(Answer(thinking=["Hm."], text=["Looking."], calls=[Call(name="lookup"), Call(name="lookup")]))
    ask = user("?")
    first = await run(driver, request_for(fake, ask, profile=REASONER, tools=[LOOKUP]))
    answer = message(
        Role.AGENT,
        TextPart(text="Looking."),
        *(ToolCallPart(id=f"renamed_{number}", name="lookup", arguments={}) for number in (1, 2)),
    )
    results = [
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id=f"renamed_{number}", result="found")) for number in (1, 2)
    ]
    state = state_of(finish_of(first).state)
    request = request_for(fake, ask, answer, *results, profile=REASONER, tools=[LOOKUP], states={answer.id: state})
    assert text_of(await run(driver, request)) == "Hello there."
    reasoning, said, *calls = fake.requests[-1].body["input"][1:5]
    reasoning_id = finish_of(first).reasoning_items[0].item_id
    assert reasoning == {
        "type": "reasoning",
        "id": reasoning_id,
        "summary": [{"type": "summary_text", "text": "Hm."}],
        "encrypted_content": encrypted(reasoning_id),
    }
    assert (said["content"][0]["text"], said["id"][:4]) == ("Looking.", "msg_")
    assert [call["call_id"] for call in calls] == ["renamed_1", "renamed_2"]


def test_order_between_text_reasoning_and_calls_is_kept() -> None:
    events = read_all(
        completed(thought("rs_1"), called("call_1"), thought("rs_2"), wrote("msg_1", "A"), called("call_2"))
    )
    answer = message(
        Role.AGENT,
        TextPart(text="A"),
        *(ToolCallPart(id=call_id, name="lookup", arguments={}) for call_id in calls_of(events)),
    )
    items = rebuilt(finish_of(events).state, answer)
    assert [item["type"] for item in items] == ["reasoning", "function_call", "reasoning", "message", "function_call"]
    assert [item.get("call_id") for item in items if item["type"] == "function_call"] == ["call_1", "call_2"]


@pytest.mark.parametrize(
    "answer",
    [
        message(Role.AGENT, TextPart(text="Something else.")),
        message(Role.AGENT, TextPart(text="A")),
        message(
            Role.AGENT, TextPart(text="A"), *[ToolCallPart(id=f"{n}", name="lookup", arguments={}) for n in (1, 2)]
        ),
    ],
    ids=["other text", "a call too few", "a call too many"],
)
def test_a_message_that_was_changed_goes_back_without_its_state(answer: Message) -> None:
    events = read_all(completed(thought("rs_1"), wrote("msg_1", "A"), called("call_1")))
    items = rebuilt(finish_of(events).state, answer)
    assert "reasoning" not in [item["type"] for item in items]
    assert items[0]["content"][0]["text"] == answer.text


@pytest.mark.parametrize("changes", [{"provider_public_id": "provider_2"}, {"driver": "anthropic"}])
def test_a_state_that_is_not_ours_to_read_is_left_out(changes: dict[str, Any]) -> None:
    state = finish_of(read_all(completed(thought("rs_1"), wrote("msg_1", "A")))).state
    items = rebuilt(state, message(Role.AGENT, TextPart(text="A")), **changes)
    assert [item["type"] for item in items] == ["message"]


@pytest.mark.parametrize("state", [{"call": "first"}, {"call": 0}, {"parts": [["output_text", 5]]}, {"parts": 1}])
def test_a_state_that_makes_no_sense_is_left_out(state: dict[str, object]) -> None:
    items = rebuilt([state], message(Role.AGENT, TextPart(text="A")))
    assert [item["content"][0]["text"] for item in items] == ["A"]


def test_reasoning_that_nothing_followed_stays_away() -> None:
    events = read_all(completed(wrote("msg_1", "A"), thought("rs_1")))
    items = rebuilt(finish_of(events).state, message(Role.AGENT, TextPart(text="A")))
    assert [item["type"] for item in items] == ["message"]


async def with_state(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> ModelRequest:
    """A request that brings reasoning back."""
    fake.play(Answer(thinking=["Hm."], text=["A"]))
    first = await run(driver, request_for(fake, profile=REASONER))
    answer = message(Role.AGENT, TextPart(text="A"))
    states = {answer.id: state_of(finish_of(first).state)}
    fake.requests.clear()
    return request_for(fake, user("?"), answer, user("!"), profile=REASONER, states=states)


@pytest.mark.parametrize("reports", ["error", "nested error", "response.failed"])
async def test_refused_reasoning_is_left_out_and_the_call_made_once_more(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, reports: Any
) -> None:
    request = await with_state(fake, driver)
    fake.refuses_states = True
    assert text_of(await run(driver, request)) == "Hello there."
    first, second = fake.requests
    assert "reasoning" in [item["type"] for item in first.body["input"]]
    assert "reasoning" not in [item["type"] for item in second.body["input"]]
    fake.refuses_states, fake.refuses_states_in_stream, fake.reports = False, True, reports
    assert text_of(await run(driver, request)) == "Hello there."
    assert len(fake.requests) == 4


async def test_a_refusal_that_is_not_about_reasoning_is_not_tried_again(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    request = await with_state(fake, driver)
    fake.play(Answer(failure="overflow"))
    _, error = await failure_of(driver, request)
    assert (error.kind, len(fake.requests)) == (ModelErrorKind.CONTEXT_OVERFLOW, 1)


async def test_an_organization_that_may_see_no_summaries_gets_its_answer(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.refuses_summaries = True
    events = await run(driver, request_for(fake, profile=REASONER, reasoning_effort="high"))
    assert text_of(events) == "Hello there."
    assert [recorded.body["reasoning"] for recorded in fake.requests] == [
        {"effort": "high", "summary": "auto"},
        {"effort": "high"},
    ]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", get_args(Failure))
async def test_a_failure_before_the_stream_is_classified_and_not_tried_again(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, failure: Failure
) -> None:
    fake.play(Answer(failure=failure, retry_after_seconds=3))
    events, error = await failure_of(driver, request_for(fake, options=BACKGROUND))
    assert (events, error.kind, len(fake.requests)) == ([], FAILURES[failure], 1)
    assert error.retry_after_seconds == 3


@pytest.mark.parametrize("reports", ["error", "nested error", "response.failed"])
@pytest.mark.parametrize(
    "failure", ["rate_limit", "overloaded", "server_error", "quota", "usage_limit", "overflow", "content_filter"]
)
async def test_a_failure_inside_the_stream_is_classified_however_it_is_told(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, failure: Failure, reports: Any
) -> None:
    fake.reports = reports
    fake.play(Answer(text=["One ", "two"], failure=failure, after=1, retry_after_seconds=5))
    events, error = await failure_of(driver, request_for(fake, options=BACKGROUND))
    assert (text_of(events), error.kind, len(fake.requests)) == ("One ", FAILURES[failure], 1)
    assert error.retry_after_seconds == 5


@pytest.mark.parametrize("reports", ["error", "nested error", "response.failed"])
async def test_no_error_repeats_the_key(fake: FakeOpenAIResponses, driver: OpenAIResponses, reports: Any) -> None:
    fake.reports = reports
    reader = ResponseReader([], resumable=False)
    with pytest.raises(ProviderFailure) as caught:
        reader.read({"type": "error", "code": "server_error", "message": f"while serving {KEY[3:]}"})
    assert "Zq7Wm3Xk" not in caught.value.model_error(KEY).message
    assert KEY not in repr(caught.value) + str(caught.value)
    fake.play(Answer(text=["One"], failure="auth", after=0))
    _, error = await failure_of(driver, request_for(fake))
    assert "1234" not in error.message


@pytest.mark.parametrize("options", [{}, BACKGROUND], ids=["plain", "background"])
async def test_a_server_that_is_not_there_is_a_transport_error(
    driver: OpenAIResponses, options: dict[str, object]
) -> None:
    endpoint = msgspec.structs.replace(request_for(None).endpoint, base_url=f"http://127.0.0.1:{free_port()}/v1/")
    _, error = await failure_of(driver, request_for(None, endpoint=endpoint, options=options))
    assert error.kind is ModelErrorKind.TRANSPORT


async def test_a_plain_stream_that_ends_early_just_ends(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(Answer(text=["One ", "two"], cut="clean", after=1))
    events = await run(driver, request_for(fake))
    assert text_of(events) == "One "
    assert not any(isinstance(event, Finished) for event in events)
    assert len(fake.requests) == 1


async def test_a_plain_connection_that_breaks_is_a_transport_error(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(Answer(text=["One ", "two"], cut="abrupt", after=1))
    events, error = await failure_of(driver, request_for(fake))
    assert (text_of(events), error.kind) == ("One ", ModelErrorKind.TRANSPORT)
    assert len(fake.requests) == 1


async def test_leaving_a_plain_stream_ends_it_at_the_provider(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(Answer(text=["One ", "two"], stall=True, after=1))
    async with aclosing(cast(Any, driver.stream(request_for(fake)))) as stream:
        async with asyncio.timeout(DEADLINE_SECONDS):
            async for event in stream:
                if isinstance(event, TextDelta):
                    break
    await until(lambda: fake.clients_gone == 1 and fake.open_streams == 0)


# --- background -------------------------------------------------------------------------------------------------------

LONG = Answer(
    thinking=["Think", "ing."],
    text=[f"word{number} " for number in range(8)],
    calls=[Call(name="lookup", id="call_1"), Call(name="lookup", id="call_2")],
)


async def leave_after(
    driver: OpenAIResponses, request: ModelRequest, pieces: int
) -> tuple[list[StreamEvent], ResumePoint]:
    """What a worker had read of a generation when it was lost, and where the next one goes on."""
    events: list[StreamEvent] = []
    cursor = 0
    async with aclosing(cast(Any, driver.stream(request))) as stream, asyncio.timeout(DEADLINE_SECONDS):
        async for event in stream:
            events.append(event)
            if isinstance(event, TextDelta | ThinkingDelta):
                pieces -= 1
                cursor = event.cursor or cursor
            if pieces == 0 and not isinstance(event, Alive):
                break
    [began] = [event for event in events if isinstance(event, Began)]
    assert began.resumable
    return events, ResumePoint(response_id=began.response_id, cursor=cursor)


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 7, 10])
async def test_a_generation_is_resumed_without_loss_or_repetition_and_billed_once(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, pieces: int
) -> None:
    fake.play(msgspec.structs.replace(LONG, piece_delay_seconds=0.002))
    request = request_for(fake, profile=REASONER, tools=[LOOKUP], options=BACKGROUND)
    before, point = await leave_after(driver, request, pieces)
    after = await run(OpenAIResponses(), msgspec.structs.replace(request, resume=point))
    both = [*before, *after]
    assert text_of(both) == "".join(LONG.text)
    assert "".join(event.text for event in both if isinstance(event, ThinkingDelta)) == "Thinking."
    assert after[0] == Began(response_id=point.response_id, resumable=True)
    assert calls_of(after) == ["call_1", "call_2"]
    assert finish_of(after).reason == "tool_calls"
    assert [next(iter(item)) for item in finish_of(after).state] == ["item", "parts", "call", "call"]
    assert finish_of(after).usage.output_tokens == 7
    assert (fake.generations_started, fake.stopped) == (1, [])
    assert f"starting_after={point.cursor}" in fake.requests[-1].query


async def test_calls_from_before_the_cursor_are_in_the_answer(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(LONG)
    request = request_for(fake, options=BACKGROUND)
    first = await run(driver, request)
    [generation] = fake.generations.values()
    last_call_done = max(
        number for number, event in enumerate(generation.events) if event["type"].endswith("item.done")
    )
    resumed = msgspec.structs.replace(request, resume=ResumePoint(response_id=generation.id, cursor=last_call_done))
    after = await run(driver, resumed)
    assert text_of(after) == ""
    assert calls_of(after) == calls_of(first) == ["call_1", "call_2"]
    assert finish_of(after) == finish_of(first)


@pytest.mark.parametrize("cut", ["clean", "abrupt"])
@pytest.mark.parametrize("after", [0, 1, 5, None])
async def test_a_broken_connection_to_a_background_response_is_mended(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, cut: Any, after: int | None
) -> None:
    fake.play(msgspec.structs.replace(LONG, cut=cut, after=after))
    events = await run(driver, request_for(fake, options=BACKGROUND))
    assert text_of(events) == "".join(LONG.text)
    assert calls_of(events) == ["call_1", "call_2"]
    assert sum(isinstance(event, Began) for event in events) == 1
    assert finish_of(events).reason == "tool_calls"
    assert fake.generations_started == 1
    assert [recorded.method for recorded in fake.requests] == ["POST", "GET"]


async def test_mending_waits_for_a_server_that_is_overloaded(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(msgspec.structs.replace(LONG, cut="abrupt", after=3))
    fake.refuses_connections = 2
    assert text_of(await run(driver, request_for(fake, options=BACKGROUND))) == "".join(LONG.text)
    assert (len(fake.requests), fake.generations_started) == (4, 1)


async def test_mending_ends_after_three_tries_with_an_error_that_another_worker_can_mend(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(msgspec.structs.replace(LONG, cut="abrupt", after=3))
    fake.refuses_connections = 3
    request = request_for(fake, options=BACKGROUND)
    events, error = await failure_of(driver, request)
    assert error.retryable
    assert len(fake.requests) == 4
    [began] = [event for event in events if isinstance(event, Began)]
    cursor = max(event.cursor or 0 for event in events if isinstance(event, TextDelta | ThinkingDelta))
    resumed = msgspec.structs.replace(request, resume=ResumePoint(response_id=began.response_id, cursor=cursor))
    assert text_of([*events, *await run(driver, resumed)]) == "".join(LONG.text)
    assert fake.generations_started == 1


async def test_resuming_waits_out_an_overloaded_server_as_an_error_of_its_own(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    """The engine tries again with the same point; a new generation would be billed a second time."""
    fake.play(LONG)
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 3)
    fake.refuses_connections = 1
    _, error = await failure_of(driver, msgspec.structs.replace(request, resume=point))
    assert (error.kind, fake.generations_started) == (ModelErrorKind.OVERLOADED, 1)


async def test_a_response_that_is_gone_begins_anew_under_another_id(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    fake.play(LONG, Answer(text=["Anew."]))
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 4)
    del fake.generations[point.response_id]
    events = await run(driver, msgspec.structs.replace(request, resume=point))
    assert isinstance(events[0], Began)
    assert events[0].resumable
    assert events[0].response_id != point.response_id
    assert text_of(events) == "Anew."
    assert fake.generations_started == 2


@pytest.mark.parametrize("reports", ["error", "nested error", "response.failed"])
async def test_a_response_that_failed_meanwhile_begins_anew(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, reports: Any
) -> None:
    fake.reports = reports
    fake.play(msgspec.structs.replace(LONG, failure="server_error", after=4), Answer(text=["Anew."]))
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 4)
    events = await run(driver, msgspec.structs.replace(request, resume=point))
    assert isinstance(events[0], Began)
    assert events[0].response_id != point.response_id
    assert text_of(events) == "Anew."


async def test_a_response_that_fails_behind_resumed_text_is_an_error(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    """Its text was yielded already: the next attempt finds nothing but the failure, and can begin anew cleanly."""
    fake.play(msgspec.structs.replace(LONG, failure="server_error", after=6))
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 4)
    events, error = await failure_of(driver, msgspec.structs.replace(request, resume=point))
    assert text_of(events) == "word2 word3 "
    assert error.kind is ModelErrorKind.SERVER_ERROR


async def test_a_response_that_was_stopped_begins_anew(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(msgspec.structs.replace(LONG, stall=True, after=4), Answer(text=["Anew."]))
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 4)
    await driver.stop(request.endpoint, point.response_id)
    events = await run(driver, msgspec.structs.replace(request, resume=point))
    assert text_of(events) == "Anew."


async def test_only_stop_ends_a_background_response(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(msgspec.structs.replace(LONG, stall=True, after=4))
    request = request_for(fake, options=BACKGROUND)
    _, point = await leave_after(driver, request, 4)
    await until(lambda: fake.open_streams == 0)
    generation: Generation = fake.generations[point.response_id]
    assert not generation.is_over
    await driver.stop(request.endpoint, point.response_id)
    assert (generation.status, fake.stopped) == ("cancelled", [point.response_id])
    assert fake.requests[-1].path == f"/v1/responses/{point.response_id}/cancel"
    await driver.stop(request.endpoint, point.response_id)


async def test_stopping_what_is_unknown_or_not_in_the_background_is_no_failure(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    endpoint = request_for(fake).endpoint
    await driver.stop(endpoint, "resp_unknown/../../models")
    assert fake.requests[-1].path.startswith("/v1/responses/resp_unknown")
    fake.play(LONG)
    events = await run(driver, request_for(fake, options={"extra_body": {"store": True}}))
    assert isinstance(events[0], Began)
    await driver.stop(endpoint, events[0].response_id)
    assert fake.stopped == []


async def test_a_stop_that_does_not_reach_the_provider_says_so(driver: OpenAIResponses) -> None:
    endpoint = msgspec.structs.replace(request_for(None).endpoint, base_url=f"http://127.0.0.1:{free_port()}/v1/")
    with pytest.raises(ModelError) as caught:
        await driver.stop(endpoint, "resp_1")
    assert caught.value.kind is ModelErrorKind.TRANSPORT


# --- compaction and models --------------------------------------------------------------------------------------------


async def test_a_compaction_stands_for_what_it_compacted(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.play(Answer(usage=Usage(input=500, output=50, cache_read=100)))
    request = request_for(fake, message(Role.SYSTEM, TextPart(text="Be brief.")), user("Hello?"))
    compaction = await driver.compact(request)
    assert compaction is not None
    body = fake.requests[-1].body
    assert (body["instructions"], body["model"], fake.requests[-1].path) == (
        "Be brief.",
        "gpt-5.4",
        "/v1/responses/compact",
    )
    assert [item["type"] for item in compaction.items] == ["message", "compaction"]
    assert compaction.usage == TokenUsage(input_tokens=500, output_tokens=50, cache_read_tokens=100)

    later = request_for(fake, message(Role.SYSTEM, TextPart(text="Be brief.")), user("And now?"))
    await run(driver, msgspec.structs.replace(later, context=state_of(compaction.items)))
    sent = fake.requests[-1].body["input"]
    assert sent[:2] == compaction.items
    assert sent[2]["content"][0]["text"] == "And now?"
    stranger = state_of(compaction.items, provider_public_id="provider_2")
    assert len(body_of(user("And now?"), context=stranger)["input"]) == 1


async def test_who_cannot_compact_says_none(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    fake.compacts = False
    assert await driver.compact(request_for(fake)) is None
    fake.compacts = True
    fake.play(Answer(failure="invalid_request"))
    assert await driver.compact(request_for(fake)) is None


@pytest.mark.parametrize("failure", ["rate_limit", "auth", "server_error", "overflow"])
async def test_a_compaction_that_fails_says_why(
    fake: FakeOpenAIResponses, driver: OpenAIResponses, failure: Failure
) -> None:
    fake.play(Answer(failure=failure))
    with pytest.raises(ModelError) as caught:
        await driver.compact(request_for(fake))
    assert caught.value.kind is FAILURES[failure]


async def test_a_compaction_goes_without_reasoning_that_is_refused(
    fake: FakeOpenAIResponses, driver: OpenAIResponses
) -> None:
    request = await with_state(fake, driver)
    fake.refuses_states = True
    assert await driver.compact(request) is not None
    assert len(fake.requests) == 2


async def test_only_models_that_chat_are_listed(fake: FakeOpenAIResponses, driver: OpenAIResponses) -> None:
    found = await driver.list_models(request_for(fake).endpoint)
    assert [model.model_id for model in found] == ["gpt-5.4", "gpt-5.4-mini"]
