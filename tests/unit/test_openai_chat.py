"""The driver for OpenAI-compatible servers, against servers that speak their dialects."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast, get_args

import msgspec
import pytest

from activities.llm import driver_for, openai_errors, openai_sdk
from activities.llm.openai_chat import OpenAIChat
from activities.llm.openai_chat_request import dialect_of, prepare
from activities.llm.openai_chat_stream import ChatStream
from activities.llm.openai_sdk import client_of, error_of, model_error
from domain.events import TokenUsage
from domain.messages import (
    ContentPart,
    ImageFilePart,
    ImagePart,
    Message,
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
    ModelDriver,
    ModelEndpoint,
    ModelError,
    ModelErrorKind,
    ModelLister,
    ModelRequest,
    ProviderState,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.model_profiles import EffortConfig, EffortValue, ModelModalities, ModelProfile
from domain.secret import Secret
from domain.tools import BuiltinTool
from tests.conftest import served
from tests.contract.subjects import FAILURES
from tests.fakes.openai_chat import (
    GEMINI_RETRY_SECONDS,
    MODEL,
    RESETS_AT,
    VERIFY_URL,
    FakeGemini,
    FakeOpenAIChat,
    FakeOpenRouter,
)
from tests.fakes.script import Answer, Call, Failure, Usage
from tests.fakes.server import FakeProvider

KEY = "sk-test-Zq7Wm3Xk9Lp2Rt5Vb8Nc"
DEADLINE_SECONDS = 10.0

LOOKUP = BuiltinTool(
    name="lookup",
    description="Looks something up",
    parameters={"type": "object", "properties": {"rows": {"type": "array"}}},
)
PLAIN_PROFILE = ModelProfile(
    name="Old",
    family="old",
    attachment=False,
    reasoning=False,
    temperature=False,
    tool_call=True,
    structured_output=False,
    open_weights=True,
    vendor="test",
    modalities=ModelModalities(input=["text"], output=["text"]),
    supported_parameters=[],
)

_ids = itertools.count(1)


def message(role: Role, *parts: ContentPart, id: str | None = None) -> Message:
    return Message(
        id=id or f"message_{next(_ids):04d}", role=role, content=list(parts), created_at="2026-01-01T00:00:00.000Z"
    )


def user(text: str) -> Message:
    return message(Role.USER, TextPart(text=text))


def request(endpoint: ModelEndpoint | None = None, **fields: Any) -> ModelRequest:
    given: dict[str, Any] = {
        "model": MODEL,
        "messages": [message(Role.SYSTEM, TextPart(text="Be brief.")), user("Hi")],
        "tools": [],
        "session_id": "session_1",
        "idempotency_key": "step_1",
        "endpoint": endpoint or ModelEndpoint(provider_type="openai_completions", base_url="http://127.0.0.1:9/v1/"),
    }
    return ModelRequest(**(given | fields))


def endpoint_of(fake: FakeProvider, key: str | None = KEY) -> ModelEndpoint:
    return ModelEndpoint(
        provider_type=fake.provider_type,
        provider_public_id="provider_1",
        base_url=fake.url,
        credentials={"api_key": Secret(key)} if key else {},
    )


async def events_of(call: ModelRequest) -> list[StreamEvent]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [event async for event in OpenAIChat().stream(call)]


async def failure_of(call: ModelRequest) -> ModelError:
    with pytest.raises(ModelError) as raised:
        await events_of(call)
    return raised.value


def text_of(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def thinking_of(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ThinkingDelta))


def calls_of(events: Sequence[StreamEvent]) -> list[ToolCallReady]:
    return [event for event in events if isinstance(event, ToolCallReady)]


def end_of(events: Sequence[StreamEvent]) -> Finished:
    [end] = [event for event in events if isinstance(event, Finished)]
    assert events[-1] is end
    return end


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAIChat]:
    async with FakeOpenAIChat().running() as running:
        yield cast(FakeOpenAIChat, running)


@pytest.fixture
async def gemini() -> AsyncIterator[FakeGemini]:
    async with FakeGemini().running() as running:
        yield cast(FakeGemini, running)


@pytest.fixture
async def openrouter() -> AsyncIterator[FakeOpenRouter]:
    async with FakeOpenRouter().running() as running:
        yield cast(FakeOpenRouter, running)


def state_of(end: Finished, call: ModelRequest) -> ProviderState:
    return ProviderState(
        provider_public_id=call.endpoint.provider_public_id, driver="openai_chat", model=call.model, items=end.state
    )


# --- requests ---------------------------------------------------------------------------------------------------------


def endpoint(provider_type: str, base_url: str | None = None) -> ModelEndpoint:
    return ModelEndpoint(provider_type=provider_type, base_url=base_url, credentials={"api_key": Secret(KEY)})


def body_of(provider_type: str, base_url: str | None = None, **fields: Any) -> dict[str, Any]:
    return cast(dict[str, Any], prepare(request(endpoint(provider_type, base_url), **fields)).body)


def test_the_driver_of_compatible_servers_is_found_and_lists_models() -> None:
    driver = driver_for("openai_completions")
    checked: ModelDriver = OpenAIChat()
    assert isinstance(driver, OpenAIChat)
    assert isinstance(driver, ModelLister)
    assert checked.name == driver.name == "openai_chat"


def test_a_conversation_takes_the_roles_of_chat_completions() -> None:
    conversation = [
        message(Role.SYSTEM, TextPart(text="Be brief.")),
        message(
            Role.USER,
            TextPart(text="What is this?"),
            ImagePart(base64="QUJD", media_type="image/jpeg"),
            ImagePart(url="https://pictures.example/a.png"),
            ImageFilePart(image_id="image_1", filename="scan.png"),
        ),
        message(
            Role.AGENT,
            ToolCallPart(id="call_1", name="lookup", arguments={"rows": [1]}),
            ToolCallPart(id="call_2", name="lookup", arguments={}),
        ),
        message(
            Role.TOOL_RESULT,
            ToolResultPart(tool_call_id="call_1", result={"found": 2}),
            ToolResultPart(tool_call_id="call_2", error="no such row"),
        ),
        message(Role.AGENT),
        message(Role.AGENT, TextPart(text="Two.")),
    ]
    body = body_of("openai_completions", "http://127.0.0.1:9/v1", messages=conversation)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,QUJD"}},
                {"type": "image_url", "image_url": {"url": "https://pictures.example/a.png"}},
                {"type": "text", "text": "[image scan.png]"},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": '{"rows":[1]}'}},
                {"id": "call_2", "type": "function", "function": {"name": "lookup", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"found":2}'},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: no such row"},
        {"role": "assistant", "content": "Two."},
    ]


def test_a_picture_in_a_tool_result_becomes_a_placeholder_and_not_its_bytes() -> None:
    result = [{"type": "text", "text": "A page"}, {"type": "image", "base64": "QUJD", "media_type": "image/png"}]
    prepared = prepare(
        request(messages=[user("Go"), message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="c", result=result))])
    )
    assert cast(Any, prepared.body["messages"])[-1]["content"] == "A page\n[image]"
    assert prepared.dropped == ["images"]


def test_tools_stand_in_a_stable_order_and_parallel_calls_are_only_spoken_of_with_tools() -> None:
    other = BuiltinTool(name="another", description="", parameters={})
    with_tools = body_of("openai_completions", tools=[LOOKUP, other], parallel_tool_calls=False)
    assert [tool["function"]["name"] for tool in with_tools["tools"]] == ["another", "lookup"]
    assert with_tools["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert with_tools["parallel_tool_calls"] is False
    assert "tool_choice" not in with_tools
    without = body_of("openai_completions", parallel_tool_calls=False)
    assert "parallel_tool_calls" not in without
    assert "tools" not in without


@pytest.mark.parametrize(
    ("provider_type", "base_url", "expected"),
    [
        ("openai_completions", "http://127.0.0.1:9/v1", {"max_tokens": 99, "reasoning_effort": "high"}),
        ("fireworks", None, {"max_tokens": 99, "reasoning_effort": "high"}),
        ("openrouter", None, {"max_tokens": 99, "reasoning": {"effort": "high"}, "verbosity": "low"}),
        (
            "openai_completions",
            "https://api.openai.com/v1/",
            {
                "max_completion_tokens": 99,
                "reasoning_effort": "high",
                "verbosity": "low",
                "service_tier": "flex",
                "prompt_cache_key": "session_1",
            },
        ),
        (
            "gemini",
            None,
            {
                "max_tokens": 99,
                "extra_body": {"google": {"thinking_config": {"thinking_level": "high", "include_thoughts": True}}},
            },
        ),
    ],
)
def test_each_dialect_gets_its_own_fields_and_the_rest_is_dropped_visibly(
    provider_type: str, base_url: str | None, expected: dict[str, object]
) -> None:
    call = request(
        endpoint(provider_type, base_url), max_output_tokens=99, reasoning_effort="high", verbosity="low", speed="flex"
    )
    prepared = prepare(call)
    always = {"model", "messages", "stream", "stream_options"}
    assert {name: value for name, value in prepared.body.items() if name not in always} == expected
    told = {"verbosity": "verbosity" in expected, "speed": "service_tier" in expected}
    assert prepared.dropped == [name for name, sent in told.items() if not sent]


def test_older_gemini_models_get_a_budget_and_reasoning_can_be_switched_off() -> None:
    body = body_of("gemini", model="gemini-2.5-flash", reasoning_effort="medium")
    assert body["extra_body"]["google"]["thinking_config"] == {"thinking_budget": 8192, "include_thoughts": True}
    off = body_of("gemini", model="gemini-2.5-flash", reasoning_effort="none")
    assert off["reasoning_effort"] == "none"
    assert "extra_body" not in off


def test_what_a_profile_does_not_take_is_dropped_and_named_but_never_sent() -> None:
    call = request(
        endpoint("openai", "https://api.openai.com/v1/"),
        profile=PLAIN_PROFILE,
        messages=[message(Role.USER, TextPart(text="See"), ImagePart(url="https://pictures.example/a.png"))],
        tools=[LOOKUP],
        parallel_tool_calls=True,
        reasoning_effort="high",
        verbosity="high",
        speed="priority",
        response_format=ResponseFormat(type="json_object"),
        options={"temperature": 0.5, "top_p": 0.5},
    )
    prepared = prepare(call)
    assert set(prepared.body) == {"model", "messages", "stream", "stream_options", "tools", "prompt_cache_key"}
    assert prepared.body["messages"] == [{"role": "user", "content": "See\n[image]"}]
    assert sorted(prepared.dropped) == [
        "images",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "speed",
        "temperature",
        "top_p",
        "verbosity",
    ]


def test_an_effort_the_model_does_not_know_and_tools_it_cannot_call_are_dropped() -> None:
    efforts = EffortConfig(default="low", values=[EffortValue(name="Low", value="low")])
    profile = msgspec.structs.replace(PLAIN_PROFILE, reasoning=True, reasoning_effort=efforts, tool_call=False)
    call = request(profile=profile, reasoning_effort="xhigh", tools=[LOOKUP])
    assert prepare(call).dropped == ["tools", "reasoning_effort"]
    known = prepare(msgspec.structs.replace(call, reasoning_effort="low", tools=[]))
    assert known.body["reasoning_effort"] == "low"
    assert known.dropped == []


def test_the_models_own_options_are_sent_and_the_calls_own_go_before_them() -> None:
    options: dict[str, object] = {
        "temperature": 0.2,
        "top_p": 0.9,
        "max_output_tokens": 10,
        "reasoning_effort": "low",
        "extra_body": {"top_k": 5, "temperature": 0.3},
    }
    body = body_of("openai_completions", options=options, max_output_tokens=7, reasoning_effort="high")
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.3, 0.9, 5)
    assert (body["max_tokens"], body["reasoning_effort"]) == (7, "high")


def test_a_schema_is_only_promised_to_be_strict_when_it_can_be_kept_strictly() -> None:
    closed = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    open_ended = {"type": "object", "properties": {"name": {"type": "string"}, "list": {"type": "array"}}}

    def sent(schema: dict[str, object]) -> Any:
        wanted = ResponseFormat(type="json_schema", name="person", schema=schema)
        return body_of("openai_completions", response_format=wanted)["response_format"]

    assert sent(closed) == {
        "type": "json_schema",
        "json_schema": {"name": "person", "schema": closed, "strict": True},
    }
    assert "strict" not in sent(open_ended)["json_schema"]
    assert "strict" not in sent({**closed, "properties": {"name": open_ended}})["json_schema"]


def test_claude_behind_openrouter_gets_cache_breakpoints_unless_caching_is_off() -> None:
    conversation = [message(Role.SYSTEM, TextPart(text="Be brief.")), user("One"), user("Two")]
    marked = body_of("openrouter", model="anthropic/claude-test", messages=conversation)["messages"]
    cached = {"type": "ephemeral"}
    assert marked[0]["content"] == [{"type": "text", "text": "Be brief.", "cache_control": cached}]
    assert marked[1]["content"] == "One"
    assert marked[2]["content"] == [{"type": "text", "text": "Two", "cache_control": cached}]
    for fields in ({"model": "anthropic/claude-test", "prompt_cache": False}, {"model": "openai/gpt-test"}):
        assert "cache_control" not in str(body_of("openrouter", messages=conversation, **fields))


# --- streams over HTTP ------------------------------------------------------------------------------------------------


async def test_thinking_text_and_usage_arrive_in_pieces_and_in_order(fake: FakeOpenAIChat) -> None:
    usage = Usage(input=10, output=5, cache_read=30, cache_write=4)
    fake.play(Answer(thinking=["Hm", "m."], text=["Hel", "lo"], usage=usage, response_id="chatcmpl-7"))
    events = await events_of(request(endpoint_of(fake)))
    told = [event for event in events if not isinstance(event, Alive)]
    assert told[:-1] == [
        Began(response_id="chatcmpl-7"),
        ThinkingDelta("Hm"),
        ThinkingDelta("m."),
        TextDelta("Hel"),
        TextDelta("lo"),
    ]
    end = end_of(events)
    assert (end.reason, end.response_id, end.dropped_options) == ("stop", "chatcmpl-7", [])
    assert end.usage == TokenUsage(input_tokens=10, output_tokens=5, cache_read_tokens=30, cache_creation_tokens=4)
    [sent] = fake.requests
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.body["stream_options"] == {"include_usage": True}


async def test_parallel_tool_calls_in_pieces_become_whole_calls(fake: FakeOpenAIChat) -> None:
    asked = [Call(name="lookup", arguments='{"rows": [1, 2]}', id="call_a"), Call(name="lookup", id="call_b")]
    fake.play(Answer(text=["Looking."], calls=asked))
    events = await events_of(request(endpoint_of(fake), tools=[LOOKUP]))
    assert [(ready.call.id, ready.call.arguments, ready.problem) for ready in calls_of(events)] == [
        ("call_a", {"rows": [1, 2]}, None),
        ("call_b", {}, None),
    ]
    assert end_of(events).reason == "tool_calls"


async def test_unreadable_arguments_are_a_problem_of_their_call_and_no_failure(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(calls=[Call(name="lookup", arguments='{"rows": [1,'), Call(name="lookup", arguments="[1]")]))
    first, second = calls_of(await events_of(request(endpoint_of(fake), tools=[LOOKUP])))
    assert first.call.arguments == second.call.arguments == {}
    assert "not valid JSON" in (first.problem or "")
    assert "not a JSON object" in (second.problem or "")


async def test_a_refusal_is_a_result(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(refusal=["I cannot", " do that."]))
    events = await events_of(request(endpoint_of(fake)))
    assert text_of(events) == "I cannot do that."
    assert end_of(events).reason == "refusal"


async def test_without_any_usage_it_is_estimated(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(text=["four " * 95], usage=None))
    conversation = [user("four " * 950)]
    usage = end_of(await events_of(request(endpoint_of(fake), messages=conversation))).usage
    assert usage.output_tokens == pytest.approx(100, rel=0.3)
    assert usage.input_tokens == pytest.approx(1000, rel=0.3)


async def test_a_servers_comments_are_signs_of_life() -> None:
    """Gateways send them while a model thinks in silence."""
    said = b': PROCESSING\n\n: PROCESSING\n\ndata: {"id": "c1",\ndata: "choices": []}\n\n'
    end = b'data:{"choices": [{"delta": {"content": "Hi", "p": NaN}, "finish_reason": "stop"}]}\r\n\r\ndata: [DONE]\n\n'
    events = await answered_with("text/event-stream; charset=utf-8", said + end)
    assert events[:4] == [Alive(), Alive(), Began(response_id="c1"), Alive()]
    assert text_of(events) == "Hi"


async def test_an_answer_that_is_not_streamed_is_read_as_a_whole() -> None:
    made = {"id": "call_a", "type": "function", "function": {"name": "lookup", "arguments": '{"rows": []}'}}
    choice = {"message": {"role": "assistant", "content": "Hi", "tool_calls": [made]}, "finish_reason": "tool_calls"}
    whole = {"id": "c1", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    events = await answered_with("application/json", msgspec.json.encode(whole))
    assert text_of(events) == "Hi"
    assert [ready.call.id for ready in calls_of(events)] == ["call_a"]
    assert end_of(events).usage == TokenUsage(input_tokens=3, output_tokens=2)


async def test_an_event_that_is_no_json_is_the_servers_failure_and_half_an_event_is_a_cut_stream() -> None:
    with pytest.raises(ModelError) as raised:
        await answered_with("text/event-stream", b"data: <html>\n\n")
    assert raised.value.kind is ModelErrorKind.SERVER_ERROR
    half = await answered_with("text/event-stream", b'data: {"choices": [{"delta": {}, "finish_reason": "stop"')
    assert half == []


async def answered_with(content_type: str, body: bytes) -> list[StreamEvent]:
    """What the driver makes of these very bytes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-type", content_type.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async with served(cast(Any, app)) as origin:
        return await events_of(request(ModelEndpoint(provider_type="openai_completions", base_url=origin)))


@pytest.mark.parametrize("after", [0, 1])
async def test_a_stream_that_ends_early_has_no_end_event(fake: FakeOpenAIChat, after: int) -> None:
    fake.play(Answer(text=["Hel", "lo"], calls=[Call(name="lookup")], after=after, cut="clean"))
    events = await events_of(request(endpoint_of(fake)))
    assert not [event for event in events if isinstance(event, Finished | ToolCallReady)]


async def test_a_dropped_connection_is_a_transport_failure(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(text=["Hel", "lo"], after=1, cut="abrupt"))
    assert (await failure_of(request(endpoint_of(fake)))).kind is ModelErrorKind.TRANSPORT


async def test_cancelling_closes_the_stream_at_the_server_at_once(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(text=["Hel", "lo"], after=1, stall=True))
    began = asyncio.Event()

    async def consume() -> None:
        async for event in OpenAIChat().stream(request(endpoint_of(fake))):
            if isinstance(event, TextDelta):
                began.set()

    consuming = asyncio.create_task(consume())
    async with asyncio.timeout(DEADLINE_SECONDS):
        await began.wait()
        consuming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consuming
        await until(lambda: fake.clients_gone == 1)


async def test_closing_the_iterator_closes_the_stream_at_the_server(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(text=["Hel", "lo"], after=1, stall=True))
    stream = cast(Any, OpenAIChat().stream(request(endpoint_of(fake))))
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for event in stream:
            if isinstance(event, TextDelta):
                break
        await stream.aclose()
        await until(lambda: fake.clients_gone == 1)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 # the fake counts, it does not signal
        await asyncio.sleep(0.01)


async def test_calls_to_one_server_share_a_connection_whatever_their_key_and_it_outlives_their_clients() -> None:
    relay = Relay()
    async with FakeOpenAIChat().running() as fake, relay.to(fake.origin) as origin:
        there = ModelEndpoint(
            provider_type="openai_completions",
            base_url=f"{origin}{fake.base_path}",
            credentials={"api_key": Secret(KEY)},
        )
        assert client_of(there) is client_of(msgspec.structs.replace(there, provider_public_id="another"))
        for _ in range(2):
            assert text_of(await events_of(request(there))) == "Hello there."
        assert (relay.opened, relay.closed) == (1, 0)
        other_key = msgspec.structs.replace(there, credentials={"api_key": Secret("sk-other")})
        assert client_of(other_key) is not client_of(there)

        openai_sdk._client.cache_clear()
        for again in (there, other_key):
            assert text_of(await events_of(request(again))) == "Hello there."
        assert (relay.opened, relay.closed) == (1, 0)


class Relay:
    """Between a client and a server; sees connections come and go, which a fake does not."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    @asynccontextmanager
    async def to(self, origin: str) -> AsyncIterator[str]:
        host, _, port = origin.removeprefix("http://").partition(":")

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            finally:
                writer.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.opened += 1
            there, back = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
            self.closed += 1

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


async def test_openrouter_tells_the_cost_and_gets_its_reasoning_back_unmodified(openrouter: FakeOpenRouter) -> None:
    there = endpoint_of(openrouter)
    call = request(there, model="anthropic/claude-test", tools=[LOOKUP])
    asked = [Call(name="lookup", id="call_a")]
    openrouter.play(Answer(thinking=["Look", " it up."], calls=asked, usage=Usage(cost_usd=0.0125)))
    events = await events_of(call)
    end = end_of(events)
    assert thinking_of(events) == "Look it up."
    assert end.usage.actual_cost_usd == 0.0125

    conversation = [
        *call.messages,
        message(Role.AGENT, ToolCallPart(id="call_a", name="lookup", arguments={}), id="answer_1"),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_a", result="found")),
    ]
    states = {"answer_1": state_of(end, call)}
    again = msgspec.structs.replace(call, messages=conversation, states=states)
    await events_of(again)
    await events_of(msgspec.structs.replace(again, model="openai/gpt-test"))
    same_model, other_model = openrouter.requests[1:]
    assert same_model.body["messages"][2]["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "text": "Look it up.",
            "format": "anthropic-claude-v1",
            "index": 0,
            "signature": "signature-of-the-thinking",
        }
    ]
    assert "reasoning_details" not in str(other_model.body)


async def test_geminis_thoughts_come_without_their_tags_and_count_as_output(gemini: FakeGemini) -> None:
    usage = Usage(input=10, output=50, reasoning=40, cache_read=5)
    gemini.play(Answer(thinking=["I thi", "nk."], text=["So", " so."], usage=usage))
    events = await events_of(request(endpoint_of(gemini), model="gemini-test", reasoning_effort="low"))
    assert (thinking_of(events), text_of(events)) == ("I think.", "So so.")
    assert end_of(events).usage == TokenUsage(input_tokens=10, output_tokens=50, cache_read_tokens=5)


async def test_gemini_signatures_go_back_unmodified_where_they_came_from(gemini: FakeGemini) -> None:
    there = endpoint_of(gemini)
    call = request(there, model="gemini-test", tools=[LOOKUP])
    asked = [Call(name="lookup", id="call_a"), Call(name="lookup", arguments='{"rows": [1]}', id="call_b")]
    gemini.play(Answer(calls=asked), Answer(text=["Done."]))
    first = await events_of(call)
    assert [ready.call.id for ready in calls_of(first)] == ["call_a", "call_b"]
    assert end_of(first).reason == "tool_calls"

    conversation = [
        *call.messages,
        message(
            Role.AGENT,
            ToolCallPart(id="call_a", name="lookup", arguments={}),
            ToolCallPart(id="call_b", name="lookup", arguments={"rows": [1]}),
            id="answer_1",
        ),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_a", result="a")),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_b", result="b")),
    ]
    states = {"answer_1": state_of(end_of(first), call)}
    second = await events_of(msgspec.structs.replace(call, messages=conversation, states=states))
    states["answer_2"] = state_of(end_of(second), call)
    conversation += [message(Role.AGENT, TextPart(text="Done."), id="answer_2"), user("More")]
    await events_of(msgspec.structs.replace(call, messages=conversation, states=states))

    _, tool_loop, next_turn = gemini.requests
    signed, unsigned = tool_loop.body["messages"][2]["tool_calls"]
    assert signed["extra_content"] == {"google": {"thought_signature": "signature-of-the-calls"}}
    assert "extra_content" not in unsigned
    answer = next_turn.body["messages"][5]
    assert answer["extra_content"] == {"google": {"thought_signature": "signature-of-the-text"}}


async def test_calls_that_another_provider_made_are_sent_to_gemini_without_being_refused(gemini: FakeGemini) -> None:
    call = request(endpoint_of(gemini), model="gemini-test")
    foreign = ProviderState(
        provider_public_id="provider_2",
        driver="openai_chat",
        model="gemini-test",
        items=[{"type": "tool_call", "id": "call_a", "extra_content": {"google": {"thought_signature": "foreign"}}}],
    )
    conversation = [
        *call.messages,
        message(Role.AGENT, ToolCallPart(id="call_a", name="lookup", arguments={}), id="answer_1"),
        message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="call_a", result="a")),
    ]
    other_driver = msgspec.structs.replace(foreign, provider_public_id="provider_1", driver="anthropic")
    for state in (foreign, other_driver):
        await events_of(msgspec.structs.replace(call, messages=conversation, states={"answer_1": state}))
    assert len(gemini.requests) == 2
    assert "foreign" not in str([sent.body for sent in gemini.requests])


async def test_models_are_listed_without_those_that_cannot_chat(
    fake: FakeOpenAIChat, gemini: FakeGemini, openrouter: FakeOpenRouter
) -> None:
    listed = {
        server.provider_type: [
            (model.model_id, model.display_name) for model in await OpenAIChat().list_models(endpoint_of(server))
        ]
        for server in (fake, gemini, openrouter)
    }
    assert listed == {
        "openai_completions": [(MODEL, None)],
        "gemini": [("gemini-test", "Gemini Test")],
        "openrouter": [("anthropic/claude-test", "Anthropic: Claude Test")],
    }


# --- streams as other servers write them ------------------------------------------------------------------------------


def read(*chunks: object, provider_type: str = "openai_completions", **fields: Any) -> list[StreamEvent]:
    call = request(endpoint(provider_type), **fields)
    answer = ChatStream(call, dialect_of(call.endpoint), [], KEY)
    return [*(event for chunk in chunks for event in answer.read(chunk)), *answer.finish()]


def chunk(delta: dict[str, object] | None = None, finish: str | None = None, **fields: object) -> dict[str, object]:
    return {"id": "c1", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **fields}


def call_chunk(*pieces: dict[str, object]) -> dict[str, object]:
    return chunk({"tool_calls": list(pieces)})


def piece(name: str | None = None, arguments: object = None, **fields: object) -> dict[str, object]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"function": function, **fields}


TWO_CALLS = [("call_a", "first", {"a": 1}), ("call_b", "second", {"b": 2})]


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(
            [
                call_chunk(piece("first", '{"a": 1}', id="call_a"), piece("second", '{"b": 2}', id="call_b")),
            ],
            id="whole, without index",
        ),
        pytest.param(
            [
                call_chunk(piece("first", '{"a"', id="call_a", index=0)),
                call_chunk(piece(None, ": 1}", id="call_a", index=0)),
                call_chunk(piece("second", '{"b"', id="call_b", index=0)),
                call_chunk(piece(None, ": 2}", id="call_b", index=0)),
            ],
            id="index always zero, id in every piece",
        ),
        pytest.param(
            [
                call_chunk(piece("first", "", id="call_a", index=0), piece("second", "", id="call_b", index=1)),
                call_chunk(piece(None, '{"b"', index=1), piece(None, '{"a"', index=0)),
                call_chunk(piece(None, ": 1}", index=0), piece(None, ": 2}", index=1)),
            ],
            id="interleaved",
        ),
        pytest.param(
            [
                call_chunk(piece("first", '{"a"', id="call_a")),
                call_chunk(piece(None, ": 1}")),
                call_chunk(piece("second", {"b": 2}, id="call_b")),
            ],
            id="without index, in pieces, arguments as an object",
        ),
        pytest.param(
            [
                call_chunk(piece("first", '{"a"', id="call_a", index=0)),
                call_chunk(piece(None, ": 1}", id="fresh", index=0)),
                call_chunk(piece("", "", id="call_b", index=1)),
                call_chunk(piece("second", '{"b": 2}', index=1)),
            ],
            id="a fresh id in a later piece, a name in a later piece",
        ),
    ],
)
def test_tool_calls_are_put_together_however_they_are_sent(chunks: list[object]) -> None:
    ready = calls_of(read(*chunks, chunk(finish="tool_calls")))
    assert [(made.call.id, made.call.name, made.call.arguments) for made in ready] == TWO_CALLS


def test_calls_without_an_id_or_with_an_old_one_get_the_same_new_one_in_every_attempt() -> None:
    old = message(Role.AGENT, ToolCallPart(id="call_0", name="first", arguments={}))
    conversation = [user("Go"), old]
    chunks = [
        call_chunk(piece("first", "{}", index=0), piece("second", "{}", index=1, id="call_0")),
        chunk(finish="stop"),
    ]
    variants: list[dict[str, Any]] = [{"attempt": 1}, {"attempt": 2}, {"idempotency_key": "step_2"}]
    ids = [[made.call.id for made in calls_of(read(*chunks, messages=conversation, **fields))] for fields in variants]
    assert ids[0] == ids[1]
    assert not set(ids[0]) & {*ids[2], "call_0"}
    assert len(set(ids[0])) == 2


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([chunk({"content": "x"}), chunk(finish="stop"), {"choices": [], "usage": True}], id="own chunk"),
        pytest.param([chunk({"content": "x"}), chunk(finish="stop", usage=True)], id="last chunk"),
        pytest.param([chunk({"content": "x"}, usage={"prompt_tokens": 1}), chunk(finish="stop", usage=True)], id="all"),
    ],
)
def test_usage_is_found_wherever_it_is_sent(chunks: list[dict[str, Any]]) -> None:
    told = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_cache_hit_tokens": 60}
    chunks = [{**one, "usage": told} if one.get("usage") is True else one for one in chunks]
    usage = end_of(read(*chunks)).usage
    assert usage == TokenUsage(input_tokens=40, output_tokens=7, cache_read_tokens=60)
    assert usage.prompt_tokens == 100


def test_with_a_key_of_ones_own_behind_openrouter_the_upstreams_bill_is_part_of_the_cost() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.01, "is_byok": True}
    told = usage | {"cost_details": {"upstream_inference_cost": 0.2}}
    end = end_of(read(chunk({"content": "x"}, "stop", usage=told), provider_type="openrouter"))
    assert end.usage.actual_cost_usd == pytest.approx(0.21)
    elsewhere = end_of(read(chunk({"content": "x"}, "stop", usage=told)))
    assert elsewhere.usage.actual_cost_usd is None


@pytest.mark.parametrize(
    ("told", "calls", "expected"),
    [
        ("stop", False, "stop"),
        ("end_turn", False, "stop"),
        ("stop", True, "tool_calls"),
        ("tool_calls", False, "stop"),
        ("length", False, "length"),
        ("length", True, "length"),
        ("content_filter", False, "content_filter"),
        ("content_filter: SAFETY", False, "content_filter"),
    ],
)
def test_finish_reasons_are_told_in_our_words(told: str, calls: bool, expected: str) -> None:
    made = [call_chunk(piece("first", "{}", id="call_a"))] if calls else []
    assert end_of(read(*made, chunk(finish=told))).reason == expected


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning_content": "Hm.", "reasoning": "Hm."},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm.", "index": 0}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]},
    ],
)
def test_thinking_is_found_in_every_field_servers_use_and_told_once(delta: dict[str, object]) -> None:
    events = read(chunk(delta), chunk({"content": [{"type": "text", "text": "So."}]}, "stop"))
    assert (thinking_of(events), text_of(events)) == ("Hm.", "So.")


def test_reasoning_content_goes_back_while_its_tool_loop_runs_and_not_later() -> None:
    end = end_of(
        read(
            chunk({"reasoning_content": "Look "}),
            chunk({"reasoning_content": "it up."}),
            call_chunk(piece("first", "{}", id="call_a")),
            chunk(finish="tool_calls"),
        )
    )
    call = request()
    answer = message(Role.AGENT, ToolCallPart(id="call_a", name="first", arguments={}), id="answer_1")
    states = {"answer_1": state_of(end, call)}
    in_loop = prepare(request(messages=[user("Go"), answer], states=states)).body["messages"]
    later = prepare(request(messages=[user("Go"), answer, user("And?")], states=states)).body["messages"]
    assert cast(Any, in_loop)[1]["reasoning_content"] == "Look it up."
    assert "reasoning_content" not in cast(Any, later)[1]


def test_thought_and_answer_in_one_gemini_chunk_are_told_apart() -> None:
    both = {"content": "<thought>Hm.</thought>So.", "extra_content": {"google": {"thought": True}}}
    events = read(chunk(both), chunk({"content": " <thought> is a tag"}, "stop"), provider_type="gemini")
    assert (thinking_of(events), text_of(events)) == ("Hm.", "So. <thought> is a tag")


def test_a_chunk_that_says_nothing_is_a_sign_of_life() -> None:
    assert read(chunk({"role": "assistant", "content": ""})) == [Began(response_id="c1"), Alive()]
    assert read({"choices": []}, "noise", None) == [Alive(), Alive(), Alive()]


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (chunk(finish="error"), ModelErrorKind.SERVER_ERROR),
        (chunk(finish="function_call_filter: MALFORMED_FUNCTION_CALL"), ModelErrorKind.SERVER_ERROR),
        ({"choices": [{"error": {"code": 429, "message": "slow"}}]}, ModelErrorKind.RATE_LIMITED),
        ({"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, ModelErrorKind.INVALID_REQUEST),
        ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], ModelErrorKind.OVERLOADED),
        ({"error": "out of memory"}, ModelErrorKind.SERVER_ERROR),
    ],
)
def test_an_error_is_found_wherever_servers_put_it_into_a_stream(found: object, kind: ModelErrorKind) -> None:
    with pytest.raises(ModelError) as raised:
        read(chunk({"content": "x"}), found)
    assert raised.value.kind is kind


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [FakeOpenAIChat, FakeOpenRouter, FakeGemini])
async def test_every_failure_has_its_kind_before_a_stream_and_inside_one(server: type[FakeProvider]) -> None:
    async with server().running() as fake:
        call = request(endpoint_of(fake), tools=[LOOKUP])
        seen: dict[str, tuple[ModelErrorKind, ModelErrorKind]] = {}
        for failure in get_args(Failure):
            fake.play(Answer(failure=failure), Answer(text=["Hel", "lo"], failure=failure, after=1))
            before, inside = await failure_of(call), await failure_of(call)
            seen[failure] = (before.kind, inside.kind)
            assert KEY not in before.message + inside.message
    assert seen == {failure: (kind, kind) for failure, kind in FAILURES.items()}


async def test_failures_carry_what_a_client_can_act_on(fake: FakeOpenAIChat, gemini: FakeGemini) -> None:
    fake.play(*(Answer(failure=failure) for failure in ("usage_limit", "attestation", "tool_schema")))
    gemini.play(Answer(failure="tool_schema"))
    call = request(endpoint_of(fake))
    assert (await failure_of(call)).fields == {"resets_at": RESETS_AT}
    assert (await failure_of(call)).fields == {"url": VERIFY_URL, "gate_types": ["organization_verification"]}
    assert (await failure_of(call)).fields == {"path": "lookup.properties.rows"}
    refused = await failure_of(request(endpoint_of(gemini)))
    assert refused.fields == {"path": "tools[0].function_declarations[0].parameters.properties[rows].items"}


async def test_the_time_to_wait_is_read_from_headers_details_and_words(
    fake: FakeOpenAIChat, gemini: FakeGemini
) -> None:
    fake.play(Answer(failure="rate_limit", retry_after_seconds=7))
    gemini.play(Answer(failure="rate_limit"))
    assert (await failure_of(request(endpoint_of(fake)))).retry_after_seconds == 7
    assert (await failure_of(request(endpoint_of(gemini)))).retry_after_seconds == GEMINI_RETRY_SECONDS
    assert error_of("rate_limit_exceeded", "tokens", "Please try again in 250ms.").retry_after_seconds == 0.25


async def test_no_part_of_the_key_gets_into_an_error(fake: FakeOpenAIChat) -> None:
    fake.play(Answer(failure="auth"), Answer(failure="auth", text=["x"], after=1))
    for _ in range(2):
        failure = await failure_of(request(endpoint_of(fake)))
        assert failure.kind is ModelErrorKind.AUTHENTICATION
        assert "Incorrect API key provided: [key]" in failure.message
        for text in (failure.message, str(failure), repr(failure)):
            assert not any(part in text for part in (KEY[:8], KEY[-4:], KEY))


def test_whatever_looks_like_a_key_is_masked_and_messages_are_bounded() -> None:
    said = "Denied: sk-proj-abcdefghijk, Bearer abcdef, AIzaSyA1234567890, key ab***yz and Zq7Wm3Xk9Lp2 of " + KEY
    masked = openai_errors.masked(said, [KEY])
    assert masked == "Denied: [key], [key], [key], key [key] and [key] of [key]"
    failure = error_of("server_error", None, "x" * 5000)
    assert len(failure.message) == openai_errors.MAX_MESSAGE_CHARACTERS


async def test_a_required_key_that_is_missing_is_told_without_a_call(gemini: FakeGemini) -> None:
    for key in (None, " "):
        failure = await failure_of(request(endpoint_of(gemini, key)))
        assert failure.kind is ModelErrorKind.NOT_CONFIGURED
        assert "Google Gemini `provider_1`" in failure.message
    assert gemini.requests == []


async def test_a_server_without_authentication_needs_no_key(fake: FakeOpenAIChat) -> None:
    assert text_of(await events_of(request(endpoint_of(fake, key=None)))) == "Hello there."


async def test_azure_gets_the_key_in_its_own_header_alone(fake: FakeOpenAIChat) -> None:
    there = msgspec.structs.replace(endpoint_of(fake), provider_type="azure_openai")
    await client_of(there).get("/models", cast_to=object)
    headers = fake.requests[0].headers
    assert headers["api-key"] == KEY
    assert "authorization" not in headers


async def test_the_environment_of_an_openai_user_does_not_reach_other_servers(
    fake: FakeOpenAIChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer private")
    await events_of(request(endpoint_of(fake)))
    assert "private" not in str(fake.requests[0].headers)
    assert fake.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_an_address_nobody_answers_at_is_a_transport_failure_and_one_that_is_none_is_not() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        there = endpoint("openai_completions", f"http://127.0.0.1:{unused.getsockname()[1]}/v1/")
        assert (await failure_of(request(there))).kind is ModelErrorKind.TRANSPORT
    for address in ("127.0.0.1:9/v1", "gopher://127.0.0.1/v1"):
        failure = await failure_of(request(endpoint("openai_completions", address)))
        assert failure.kind is ModelErrorKind.INVALID_REQUEST
    failure = await failure_of(request(endpoint("openai_completions")))
    assert failure.kind is ModelErrorKind.NOT_CONFIGURED


@pytest.mark.parametrize(
    ("code", "kind", "words", "status", "expected"),
    [
        ("billing_hard_limit_reached", None, "Billing hard limit", 400, ModelErrorKind.QUOTA_EXHAUSTED),
        (None, "exceed_context_size_error", "too many", 400, ModelErrorKind.CONTEXT_OVERFLOW),
        (None, "invalid_request_error", "prompt is too long: 9 tokens", 400, ModelErrorKind.CONTEXT_OVERFLOW),
        (None, None, "the request exceeds the available context size", 500, ModelErrorKind.CONTEXT_OVERFLOW),
        (None, "BadRequestError", "Input exceeds the context window", 400, ModelErrorKind.CONTEXT_OVERFLOW),
        (
            "rate_limit_exceeded",
            "tokens",
            "Request too large for gpt-test on tokens per min (TPM)",
            429,
            ModelErrorKind.CONTEXT_OVERFLOW,
        ),
        (400, "BadRequestError", "bad", None, ModelErrorKind.INVALID_REQUEST),
        ("429", None, "slow", None, ModelErrorKind.RATE_LIMITED),
        (None, "invalid_request_error", "slow", 429, ModelErrorKind.RATE_LIMITED),
        (None, "NotFoundError", "The model `x` does not exist.", 404, ModelErrorKind.UNSUPPORTED_MODEL),
        (None, None, "Insufficient Balance", 402, ModelErrorKind.QUOTA_EXHAUSTED),
        (None, "invalid_request_error", "bad", None, ModelErrorKind.INVALID_REQUEST),
        ("content_policy_violation", None, "no", 400, ModelErrorKind.CONTENT_FILTERED),
        (None, None, None, None, ModelErrorKind.SERVER_ERROR),
        (None, None, "teapot", 418, ModelErrorKind.INVALID_REQUEST),
    ],
)
def test_a_failure_is_known_by_what_it_says_before_its_status(
    code: object, kind: str | None, words: str | None, status: int | None, expected: ModelErrorKind
) -> None:
    assert error_of(code, kind, words, status).kind is expected


def test_failures_of_the_sdk_and_its_http_library_have_a_kind() -> None:
    import httpx2
    import openai

    sent = httpx2.Request("POST", "http://127.0.0.1/v1", headers={"authorization": f"Bearer {KEY}"})
    expected: list[tuple[Exception, ModelErrorKind]] = [
        (openai.APITimeoutError(sent), ModelErrorKind.TIMEOUT),
        (openai.APIConnectionError(request=sent), ModelErrorKind.TRANSPORT),
        (httpx2.ReadTimeout("slow"), ModelErrorKind.TIMEOUT),
        (httpx2.RemoteProtocolError("cut"), ModelErrorKind.TRANSPORT),
        (ConnectionResetError("reset"), ModelErrorKind.TRANSPORT),
        (ValueError("no JSON"), ModelErrorKind.SERVER_ERROR),
        (KeyError("bug"), ModelErrorKind.OTHER),
        (openai.APIError(f"wrong: {KEY}", sent, body=None), ModelErrorKind.SERVER_ERROR),
        (ModelError(ModelErrorKind.STREAM_CUT, "cut"), ModelErrorKind.STREAM_CUT),
    ]
    for error, kind in expected:
        mapped = model_error(error)
        assert mapped.kind is kind, error
        assert KEY not in mapped.message
