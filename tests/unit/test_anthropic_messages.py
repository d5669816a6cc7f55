"""The Messages driver where it differs from the others; `tests/contract` has what it shares with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from activities.llm.anthropic_errors import MAX_MESSAGE_CHARACTERS, api_error, readable, refuses_thinking
from activities.llm.anthropic_messages import AnthropicMessages
from activities.llm.anthropic_request import FAST_MODE_BETA, Prepared, prepare
from activities.llm.anthropic_thinking import Thinking, thinking_of
from domain.messages import (
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
    DiscoveredModel,
    Finished,
    ModelEndpoint,
    ModelError,
    ModelErrorKind,
    ModelLister,
    ModelRequest,
    ProviderState,
    StreamEvent,
    TextDelta,
    ToolCallReady,
)
from domain.model_profiles import EffortConfig, EffortValue, ModelLimits, ModelModalities, ModelProfile
from domain.providers import API_KEY
from domain.secret import Secret
from domain.tools import BuiltinTool
from tests.fakes.anthropic_messages import BAD_SIGNATURE, FakeAnthropic, problems
from tests.fakes.script import Answer, Call
from tests.fakes.server import Exchange, FakeProvider, Json

KEY = "test-key-77aa"
ADAPTIVE = "claude-opus-4-6"
BUDGET = "claude-haiku-4-5"
ALWAYS = "claude-opus-5-5"


def profile(**changes: Any) -> ModelProfile:
    fields: dict[str, Any] = {
        "name": "Claude", "family": "claude", "vendor": "anthropic", "attachment": True, "reasoning": True,
        "temperature": True, "tool_call": True, "structured_output": True, "open_weights": False, **changes,
    }  # fmt: skip
    return ModelProfile(**fields)


def message(role: Role, *parts: Any, id: str = "message_1") -> Message:
    return Message(id=id, role=role, content=list(parts), created_at="2026-01-01T00:00:00.000Z")


def user(text: str) -> Message:
    return message(Role.USER, TextPart(text=text))


def agent(*parts: Any, id: str = "message_a") -> Message:
    return message(Role.AGENT, *parts, id=id)


def call(call_id: str, name: str = "look", **arguments: object) -> ToolCallPart:
    return ToolCallPart(id=call_id, name=name, arguments=arguments)


def result(call_id: str, value: object = "seen", error: str | None = None) -> Message:
    return message(Role.TOOL_RESULT, ToolResultPart(tool_call_id=call_id, result=value, error=error))


def tool(name: str) -> BuiltinTool:
    return BuiltinTool(name=name, description=f"{name}!", parameters={"properties": {}})


def request(*messages: Message, **changes: Any) -> ModelRequest:
    fields: dict[str, Any] = {
        "model": ADAPTIVE,
        "messages": list(messages) or [user("Hello?")],
        "tools": [],
        "session_id": "session_1",
        "idempotency_key": "step_1",
        "endpoint": ModelEndpoint(provider_type="anthropic", provider_public_id="provider_1"),
        "prompt_cache": False,
        **changes,
    }
    return ModelRequest(**fields)


def prepared(*messages: Message, **changes: Any) -> Prepared:
    """Whatever is asked, the API has nothing to refuse in it."""
    done = prepare(request(*messages, **changes))
    assert list(problems({**done.body, **(done.body.get("extra_body") or {})})) == []  # type: ignore[dict-item]
    return done


def turns(done: Prepared) -> list[Any]:
    messages: Any = done.body["messages"]
    return messages


def state(*items: dict[str, object]) -> ProviderState:
    return ProviderState(provider_public_id="provider_1", driver="anthropic", model=ADAPTIVE, items=list(items))


THOUGHT: dict[str, object] = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
HIDDEN: dict[str, object] = {"type": "redacted_thinking", "data": "b3BhcXVl"}


def text_of(characters: int) -> dict[str, object]:
    return {"type": "text", "characters": characters}


def call_of(index: int) -> dict[str, object]:
    return {"type": "tool_use", "index": index}


# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("claude-3-5-sonnet-20241022", Thinking.NEVER),
        ("claude-3-haiku-20240307", Thinking.NEVER),
        ("claude-3-7-sonnet-latest", Thinking.BUDGET),
        ("claude-opus-4-20250514", Thinking.BUDGET),
        ("claude-4-opus-20250514", Thinking.BUDGET),
        ("claude-haiku-4-5-20251001", Thinking.BUDGET),
        ("claude-opus-4-6", Thinking.ON_REQUEST),
        ("anthropic/claude-opus-4.8", Thinking.ON_REQUEST),
        ("anthropic.claude-sonnet-4-6-v1:0", Thinking.ON_REQUEST),
        ("claude-sonnet-5", Thinking.UNLESS_OFF),
        ("claude-opus-5", Thinking.UNLESS_OFF),
        ("claude-haiku-5-5", Thinking.UNLESS_OFF),
        ("claude-sonnet-5-5", Thinking.UNLESS_BETWEEN_TOOLS),
        ("claude-opus-5-5", Thinking.ALWAYS),
        ("claude-opus-6", Thinking.ALWAYS),
        ("claude-fable-5", Thinking.ALWAYS),
        ("claude-mythos-preview", Thinking.ALWAYS),
        ("our-favourite", Thinking.UNKNOWN),
    ],
)
def test_how_a_model_thinks_follows_from_its_name(name: str, mode: Thinking) -> None:
    assert thinking_of(name, None) is mode


def test_a_profile_tells_what_a_name_does_not() -> None:
    assert thinking_of("our-favourite", profile(name="Claude Opus 4.6")) is Thinking.ON_REQUEST
    assert thinking_of(ADAPTIVE, profile(reasoning=False)) is Thinking.NEVER


@pytest.mark.parametrize(
    ("model", "effort", "thinking", "sent_effort", "dropped"),
    [
        (ADAPTIVE, "medium", {"type": "adaptive", "display": "summarized"}, "medium", False),
        (ADAPTIVE, "minimal", {"type": "adaptive", "display": "summarized"}, "low", False),
        (ADAPTIVE, "xhigh", {"type": "adaptive", "display": "summarized"}, "high", False),
        (ALWAYS, "xhigh", {"type": "adaptive", "display": "summarized"}, "xhigh", False),
        ("our-favourite", "high", {"type": "adaptive", "display": "summarized"}, "high", False),
        (BUDGET, "low", {"type": "enabled", "budget_tokens": 2048}, None, False),
        (BUDGET, "high", {"type": "enabled", "budget_tokens": 6144}, None, False),
        ("claude-3-haiku", "high", None, None, True),
        ("claude-3-haiku", "none", None, None, False),
        (BUDGET, "none", {"type": "disabled"}, None, False),
        (ADAPTIVE, "none", {"type": "disabled"}, None, False),
        ("claude-opus-5", "none", {"type": "disabled"}, None, False),
        ("claude-sonnet-5-5", "none", {"type": "between_tools"}, None, False),
        (ALWAYS, "none", {"type": "adaptive", "display": "summarized"}, "low", True),
        (ALWAYS, None, {"type": "adaptive", "display": "summarized"}, None, False),
        (ADAPTIVE, None, None, None, False),
        (BUDGET, None, None, None, False),
        ("our-favourite", None, None, None, False),
    ],
)
def test_effort_is_sent_in_the_form_the_model_accepts(
    model: str, effort: str | None, thinking: Json | None, sent_effort: str | None, dropped: bool
) -> None:
    done = prepared(model=model, reasoning_effort=effort)
    assert done.body.get("thinking") == thinking
    assert done.body.get("output_config") == ({"effort": sent_effort} if sent_effort else None)
    assert done.dropped == (["reasoning_effort"] if dropped else [])


def test_a_profile_decides_about_the_highest_effort() -> None:
    values = [EffortValue(name="High", value="high"), EffortValue(name="Highest", value="xhigh")]
    able = profile(reasoning_effort=EffortConfig(default="high", values=values))
    assert prepared(reasoning_effort="xhigh", profile=able).body["output_config"] == {"effort": "xhigh"}


def test_a_budget_leaves_room_for_an_answer_or_is_dropped() -> None:
    small = prepared(model=BUDGET, reasoning_effort="high", max_output_tokens=1500)
    assert small.body.get("thinking") == {"type": "enabled", "budget_tokens": 1125}
    tiny = prepared(model=BUDGET, reasoning_effort="high", max_output_tokens=1200)
    assert (tiny.body.get("thinking"), tiny.dropped) == (None, ["reasoning_effort"])


def test_a_tool_loop_that_began_without_thinking_goes_on_without_where_the_api_insists() -> None:
    loop = [user("Look."), agent(call("c1")), result("c1"), agent(call("c2"), id="message_b"), result("c2")]
    without = prepared(*loop, model=BUDGET, reasoning_effort="high", tools=[tool("look")])
    assert (without.body.get("thinking"), without.dropped) == (None, ["reasoning_effort"])
    # Only the loop's first message must begin with it.
    kept = prepared(
        *loop, model=BUDGET, reasoning_effort="high", tools=[tool("look")], states={"message_a": state(THOUGHT, call_of(0))}
    )  # fmt: skip
    assert (kept.body["thinking"], kept.dropped) == ({"type": "enabled", "budget_tokens": 6144}, [])
    # A loop that is over says nothing about the next one, and adaptive models do not mind.
    over = prepared(*loop, agent(TextPart(text="Done.")), user("Again."), model=BUDGET, reasoning_effort="high",
                    tools=[tool("look")])  # fmt: skip
    assert over.body["thinking"] == {"type": "enabled", "budget_tokens": 6144}
    assert "thinking" in prepared(*loop, reasoning_effort="high", tools=[tool("look")]).body


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_puts_thinking_back_in_its_place_around_text_and_renamed_calls() -> None:
    answer = agent(TextPart(text="First.Second."), call("engine-1"), call("engine-2", name="touch"))
    items = state(THOUGHT, text_of(6), HIDDEN, call_of(0), text_of(7), {**THOUGHT, "thinking": ""}, call_of(1))
    done = prepared(
        user("Go."), answer, result("engine-1"), result("engine-2"), user("And?"),
        tools=[tool("look"), tool("touch")], reasoning_effort="low", states={answer.id: items},
    )  # fmt: skip
    assert turns(done)[1]["content"] == [
        THOUGHT,
        {"type": "text", "text": "First."},
        HIDDEN,
        {"type": "tool_use", "id": "engine-1", "name": "look", "input": {}},
        {"type": "text", "text": "Second."},
        {**THOUGHT, "thinking": ""},
        {"type": "tool_use", "id": "engine-2", "name": "touch", "input": {}},
    ]
    assert done.echoes


@pytest.mark.parametrize(
    "items",
    [
        state(THOUGHT, text_of(3)),
        state(THOUGHT, text_of(50)),
        state(THOUGHT, text_of(8), call_of(0)),
        state(text_of(8), THOUGHT),
    ],
    ids=["less text", "more text", "a call that is gone", "nothing after the thinking"],
)
def test_state_of_a_message_that_was_changed_is_left_out(items: ProviderState) -> None:
    answer = agent(TextPart(text="Replaced"))
    done = prepared(user("Go."), answer, user("And?"), reasoning_effort="low", states={answer.id: items})
    assert turns(done)[1]["content"] == [{"type": "text", "text": "Replaced"}]
    assert not done.echoes


@pytest.mark.parametrize(("model", "effort"), [(ADAPTIVE, "none"), (ADAPTIVE, None), (BUDGET, None)])
def test_a_call_that_does_not_think_brings_no_thinking_along(model: str, effort: str | None) -> None:
    answer = agent(TextPart(text="Yes."))
    done = prepared(
        user("Go."), answer, user("And?"), model=model, reasoning_effort=effort,
        states={answer.id: state(THOUGHT, text_of(4))},
    )  # fmt: skip
    assert not done.echoes


# --- messages ---------------------------------------------------------------------------------------------------------


def test_turns_alternate_with_results_first_and_no_empty_text() -> None:
    done = prepared(
        message(Role.SYSTEM, TextPart(text="Be terse.")),
        user("One."),
        user("  \n"),
        user("Two."),
        agent(TextPart(text="")),
        agent(TextPart(text=" "), call("c1"), call("c2")),
        user("Hurry."),
        result("c2"),
        result("c1", error="Broken."),
        tools=[tool("look")],
    )
    assert done.body["system"] == [{"type": "text", "text": "Be terse."}]
    assert [turn["role"] for turn in turns(done)] == ["user", "assistant", "user"]
    assert turns(done)[0]["content"] == [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    assert turns(done)[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c2", "content": "seen"},
        {"type": "tool_result", "tool_use_id": "c1", "content": "Broken.", "is_error": True},
        {"type": "text", "text": "Hurry."},
    ]


@pytest.mark.parametrize(
    "conversation", [[agent(TextPart(text="Hello."))], [user(" ")], [message(Role.SYSTEM, TextPart(text="Be terse."))]]
)
def test_a_conversation_begins_and_ends_with_the_user(conversation: list[Message]) -> None:
    done = prepared(*conversation)
    assert (turns(done)[0]["role"], turns(done)[-1]["role"]) == ("user", "user")


def test_ids_of_other_providers_become_legal_and_stay_different() -> None:
    done = prepared(
        user("Go."), agent(call("a:1"), call("a.1"), call("a_1")), result("a:1"), result("a.1"), result("a_1"),
        tools=[tool("look")],
    )  # fmt: skip
    ids = [block["id"] for block in turns(done)[1]["content"]]
    assert len(set(ids)) == 3
    assert ids == [block["tool_use_id"] for block in turns(done)[2]["content"]]
    assert ids[2] == "a_1"


def test_images_become_sources_and_what_cannot_be_shown_is_said() -> None:
    done = prepared(
        message(
            Role.USER,
            ImagePart(url="https://images.test/a.png"),
            ImagePart(url="data:image/webp;base64,AAAA"),
            ImagePart(base64="BBBB", media_type="image/jpg"),
            ImagePart(base64="CCCC", media_type="image/tiff"),
            ImageFilePart(image_id="image_1", filename="cat.png"),
        )
    )
    assert turns(done)[0]["content"] == [
        {"type": "image", "source": {"type": "url", "url": "https://images.test/a.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/webp", "data": "AAAA"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "BBBB"}},
        {"type": "text", "text": "[image]"},
        {"type": "text", "text": "[image cat.png]"},
    ]
    assert done.dropped == ["images"]


def test_a_model_without_eyes_gets_a_placeholder() -> None:
    blind = profile(modalities=ModelModalities(input=["text"], output=["text"]))
    done = prepared(message(Role.USER, ImagePart(base64="BBBB", media_type="image/png")), profile=blind)
    assert (turns(done)[0]["content"], done.dropped) == ([{"type": "text", "text": "[image]"}], ["images"])


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        ({"a": 1}, '{"a":1}'),
        (
            [{"type": "text", "text": "Here:"}, {"type": "image", "base64": "AAAA", "media_type": "image/png"}],
            [
                {"type": "text", "text": "Here:"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            ],
        ),
        (None, None),
        ("", None),
    ],
)
def test_results_of_tools_keep_their_form(value: object, content: object) -> None:
    done = prepared(user("Go."), agent(call("c1")), result("c1", value), tools=[tool("look")])
    assert turns(done)[2]["content"][0].get("content") == content


# --- everything else in a request -------------------------------------------------------------------------------------


def marked(done: Prepared) -> list[str]:
    """Where the cache breakpoints are."""
    body: Any = done.body
    places = [f"tool {block['name']}" for block in body.get("tools", []) if "cache_control" in block]
    places += [f"system {block['text']}" for block in body.get("system", []) if "cache_control" in block]
    return places + [
        f"{turn['role']} {block.get('text') or block['tool_use_id']}"
        for turn in body["messages"]
        for block in turn["content"]
        if "cache_control" in block
    ]


def test_what_one_call_wrote_to_the_cache_the_next_one_reads() -> None:
    system = message(Role.SYSTEM, TextPart(text="Be terse."))
    fields: dict[str, Any] = {"tools": [tool("b"), tool("a")], "prompt_cache": True}
    first = prepared(system, user("One."), **fields)
    assert marked(first) == ["tool b", "system Be terse.", "user One."]
    second = prepared(system, user("One."), agent(call("c1", "a")), result("c1"), **fields)
    assert marked(second) == ["tool b", "system Be terse.", "user One.", "user c1"]
    third = prepared(
        system, user("One."), agent(call("c1", "a")), result("c1"), agent(call("c2", "b")), result("c2"), **fields
    )
    assert marked(third) == ["tool b", "system Be terse.", "user c1", "user c2"]
    assert marked(prepared(system, user("One."), tools=[tool("a")], prompt_cache=False)) == []


def test_tools_that_were_called_are_declared_even_if_none_may_be_called() -> None:
    done = prepared(user("Go."), agent(call("c1")), result("c1"), user("Summarise."))
    assert done.body["tools"] == [{"name": "look", "input_schema": {"type": "object"}}]
    assert done.body["tool_choice"] == {"type": "none"}


def test_serial_calls_and_closed_schemas_are_asked_for() -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
    done = prepared(
        tools=[tool("look")],
        parallel_tool_calls=False,
        response_format=ResponseFormat(type="json_schema", schema=schema),
    )
    assert done.body["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    output: Any = done.body["output_config"]
    assert output["format"]["schema"]["additionalProperties"] is False
    assert output["format"]["schema"]["properties"]["n"]["type"] == "integer"
    assert done.dropped == []


def test_any_json_object_is_no_format_here() -> None:
    done = prepared(response_format=ResponseFormat(type="json_object"), verbosity="low")
    assert "output_config" not in done.body
    assert done.dropped == ["response_format", "verbosity"]


@pytest.mark.parametrize(
    ("speed", "sent", "headers", "dropped"),
    [
        ("fast", {"speed": "fast"}, {"anthropic-beta": FAST_MODE_BETA}, []),
        ("priority", {"service_tier": "auto"}, {}, []),
        ("default", {}, {}, []),
        ("flex", {}, {}, ["speed"]),
    ],
)
def test_speed_is_what_the_api_has_of_it(speed: str, sent: Json, headers: dict[str, str], dropped: list[str]) -> None:
    done = prepared(speed=speed)
    assert {name: done.body[name] for name in ("speed", "service_tier") if name in done.body} == sent
    assert (done.headers, done.dropped) == (headers, dropped)


def test_sampling_options_go_only_where_they_are_taken() -> None:
    both: dict[str, Any] = {"options": {"temperature": 0.2, "top_p": 0.9}}
    done = prepared(**both)
    assert (done.body["extra_body"], done.dropped) == ({"temperature": 0.2}, ["top_p"])
    assert prepared(**both, reasoning_effort="low").dropped == ["temperature", "top_p"]
    assert prepared(**both, model=ALWAYS).dropped == ["temperature", "top_p"]
    assert prepared(**both, profile=profile(temperature=False)).dropped == ["temperature", "top_p"]


def test_extra_body_has_the_last_word() -> None:
    done = prepared(options={"temperature": 0.2, "extra_body": {"temperature": 0.5, "inference_geo": "eu"}})
    assert done.body["extra_body"] == {"temperature": 0.5, "inference_geo": "eu"}


def test_options_that_cannot_be_read_are_an_invalid_request() -> None:
    with pytest.raises(ModelError) as raised:
        prepare(request(options={"temperature": "hot"}))
    assert raised.value.kind is ModelErrorKind.INVALID_REQUEST


def test_the_answer_is_as_long_as_asked_for_and_as_the_model_can() -> None:
    limited = profile(limits=ModelLimits(context=200_000, output=64_000))
    options = {"max_output_tokens": 2000}
    assert prepared().body["max_tokens"] == 8192
    assert prepared(profile=limited).body["max_tokens"] == 64_000
    assert prepared(profile=limited, options=options).body["max_tokens"] == 2000
    assert prepared(profile=limited, options=options, max_output_tokens=500).body["max_tokens"] == 500
    assert prepared(profile=limited, max_output_tokens=100_000).body["max_tokens"] == 64_000


# --- errors -----------------------------------------------------------------------------------------------------------


def error_of(kind: str | None, message: str = "…", *, status: int = 400, code: str | None = None) -> ModelError:
    error: Json = {"type": kind, "message": message}
    if code:
        error["details"] = {"error_code": code}
    return api_error({"type": "error", "error": error}, status=status, headers={}, tool_names=["look", "touch"])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (error_of("overloaded_error", status=200), ModelErrorKind.OVERLOADED),
        (error_of("api_error", status=200), ModelErrorKind.SERVER_ERROR),
        (error_of("timeout_error", status=504), ModelErrorKind.TIMEOUT),
        (error_of("billing_error", status=402), ModelErrorKind.QUOTA_EXHAUSTED),
        (error_of(None, status=402), ModelErrorKind.QUOTA_EXHAUSTED),
        (error_of("request_too_large", status=413), ModelErrorKind.CONTEXT_OVERFLOW),
        (error_of("rate_limit_error", status=429, code="enforced_spend_limit_reached"), ModelErrorKind.USAGE_LIMIT),
        (error_of("rate_limit_error", status=429, code="ramp_limit_exceeded"), ModelErrorKind.RATE_LIMITED),
        (
            error_of("billing_error", status=402, code="linked_organization_spend_limit_reached"),
            ModelErrorKind.USAGE_LIMIT,
        ),
        (
            error_of("invalid_request_error", "input length and `max_tokens` exceed context limit: 9 + 1 > 9"),
            ModelErrorKind.CONTEXT_OVERFLOW,
        ),
        (error_of("invalid_request_error", status=200), ModelErrorKind.INVALID_REQUEST),
        (error_of("conflict_error", status=409), ModelErrorKind.SERVER_ERROR),
        (error_of("brand_new_error", status=200), ModelErrorKind.SERVER_ERROR),
        (error_of("brand_new_error", status=418), ModelErrorKind.INVALID_REQUEST),
        (error_of("brand_new_error", status=503), ModelErrorKind.OVERLOADED),
    ],
)
def test_an_error_is_known_by_its_code_then_type_then_words_then_status(
    error: ModelError, kind: ModelErrorKind
) -> None:
    assert error.kind is kind


def test_an_error_page_of_a_gateway_is_bounded() -> None:
    error = api_error("<html>" + "x" * 5000, status=502, headers={"request-id": "req_7"})
    assert error.kind is ModelErrorKind.SERVER_ERROR
    assert len(error.message) == MAX_MESSAGE_CHARACTERS
    assert error.message.endswith("(HTTP 502, req_7)")


def test_a_spend_limit_tells_when_it_ends() -> None:
    words = "You have reached your specified API usage limits. You will regain access on 2027-02-01 at 00:00 UTC."
    error = error_of("invalid_request_error", words)
    assert (error.kind, error.fields) == (ModelErrorKind.USAGE_LIMIT, {"resets_at": 1801440000})


def test_a_refused_schema_is_named_with_its_tool() -> None:
    error = error_of("invalid_request_error", "tools.1.custom.input_schema.properties.x: JSON schema is invalid.")
    assert error.kind is ModelErrorKind.INVALID_TOOL_SCHEMA
    assert error.fields == {"path": "tools.1.custom.input_schema.properties.x", "tool": "touch"}


def test_a_key_is_never_readable() -> None:
    assert KEY not in readable(f"Illegal header value b'Bearer {KEY}'", [KEY])


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (BAD_SIGNATURE, True),
        ("messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to a different conversation.", True),
        ("messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `text`.", True),
        ("messages.3.content.0: `thinking` or `redacted_thinking` blocks in the latest message cannot be modified.", True),
        ('"thinking.type.enabled" is not supported for this model.', False),
    ],
)  # fmt: skip
def test_thinking_that_is_not_accepted_any_more_is_recognised(words: str, refused: bool) -> None:
    assert refuses_thinking(error_of("invalid_request_error", words)) is refused


# --- over HTTP --------------------------------------------------------------------------------------------------------


class Wire(FakeProvider):
    """Sends these events, whatever is asked."""

    provider_type = "anthropic"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    async def handle(self, exchange: Exchange) -> None:
        async with exchange.stream():
            for event in self.events:
                await exchange.event(event, event=event["type"] if isinstance(event, dict) else "message")


@pytest.fixture(scope="module")
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeAnthropic().running() as running:
        yield running


@pytest.fixture(scope="module")
async def wire() -> AsyncIterator[FakeProvider]:
    async with Wire().running() as running:
        yield running


@pytest.fixture(scope="module")
def driver() -> AnthropicMessages:
    return AnthropicMessages()


def endpoint(provider: FakeProvider, *, path: str = "", key: str = KEY) -> ModelEndpoint:
    return ModelEndpoint(
        provider_type="anthropic",
        provider_public_id="provider_1",
        base_url=provider.url + path,
        credentials={API_KEY: Secret(key)},
    )


async def run(
    driver: AnthropicMessages, provider: FakeProvider, *messages: Message, **changes: Any
) -> list[StreamEvent]:
    asked = request(*messages, **{"endpoint": endpoint(provider), **changes})
    async with asyncio.timeout(30):
        return [event async for event in driver.stream(asked)]


async def heard(driver: AnthropicMessages, wire: FakeProvider, *events: object) -> list[StreamEvent]:
    assert isinstance(wire, Wire)
    wire.events = list(events)
    return await run(driver, wire)


def begin(**usage: int) -> Json:
    return {
        "type": "message_start",
        "message": {"id": "msg_1", "usage": {"input_tokens": 5, "output_tokens": 1, **usage}},
    }


def block(index: int, content: Json, *deltas: Json) -> list[Json]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def end(reason: str | None, **delta: object) -> list[Json]:
    usage = {"output_tokens": 9}
    return [
        {"type": "message_delta", "delta": {"stop_reason": reason, **delta}, "usage": usage},
        {"type": "message_stop"},
    ]


async def test_refused_thinking_is_left_out_in_one_second_try(driver: AnthropicMessages, fake: FakeProvider) -> None:
    assert isinstance(fake, FakeAnthropic)
    fake.requests.clear()
    fake.refuse_thinking = BAD_SIGNATURE
    try:
        fake.play(Answer(text=["Fine."]))
        answer = agent(TextPart(text="Yes."))
        fields: dict[str, Any] = {"reasoning_effort": "low", "states": {answer.id: state(THOUGHT, text_of(4))}}
        events = await run(driver, fake, user("Go."), answer, user("And?"), **fields)
    finally:
        fake.refuse_thinking = None
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["Fine."]
    assert len(fake.requests) == 2
    assert THOUGHT in fake.requests[0].body["messages"][1]["content"]
    assert fake.requests[1].body["messages"][1]["content"] == [{"type": "text", "text": "Yes."}]


async def test_other_refusals_are_not_tried_again(driver: AnthropicMessages, fake: FakeProvider) -> None:
    fake.requests.clear()
    fake.play(Answer(failure="invalid_request"))
    answer = agent(TextPart(text="Yes."))
    with pytest.raises(ModelError):
        await run(driver, fake, user("Go."), answer, user("And?"), reasoning_effort="low",
                  states={answer.id: state(THOUGHT, text_of(4))})  # fmt: skip
    assert len(fake.requests) == 1


async def test_a_state_holds_every_block_in_its_order(driver: AnthropicMessages, wire: FakeProvider) -> None:
    events = await heard(
        driver,
        wire,
        begin(),
        *block(0, {"type": "thinking", "thinking": "", "signature": ""},
               {"type": "thinking_delta", "thinking": "H"}, {"type": "thinking_delta", "thinking": "m"},
               {"type": "signature_delta", "signature": "ab"}, {"type": "signature_delta", "signature": "cd"}),
        *block(1, {"type": "redacted_thinking", "data": "xyz"}),
        *block(2, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Grüße"}),
        *block(3, {"type": "tool_use", "id": "t1", "name": "look", "input": {}}),
        *end("tool_use"),
    )  # fmt: skip
    assert isinstance(events[-1], Finished)
    assert events[-1].state == [
        {"type": "thinking", "thinking": "Hm", "signature": "abcd"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "characters": 5},
        {"type": "tool_use", "index": 0},
    ]


async def test_an_answer_without_thinking_needs_no_state(driver: AnthropicMessages, fake: FakeProvider) -> None:
    fake.play(Answer(text=["Hi."], calls=[Call(name="look")]))
    events = await run(driver, fake, tools=[tool("look")])
    assert isinstance(events[-1], Finished)
    assert events[-1].state == []


async def test_pings_and_unknown_events_are_signs_of_life(driver: AnthropicMessages, wire: FakeProvider) -> None:
    events = await heard(driver, wire, begin(), {"type": "ping"}, {"type": "brand_new"}, *end("end_turn"))
    assert events[1:3] == [Alive(), Alive()]


async def test_later_counts_are_totals(driver: AnthropicMessages, wire: FakeProvider) -> None:
    events = await heard(
        driver, wire, begin(cache_read_input_tokens=7, cache_creation_input_tokens=3), *end("end_turn")
    )
    assert isinstance(events[-1], Finished)
    usage = events[-1].usage
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_creation_tokens) == (
        5,
        9,
        7,
        3,
    )


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "refusal"),
        ("brand_new", "stop"),
    ],
)
async def test_every_stop_reason_has_a_meaning(
    driver: AnthropicMessages, wire: FakeProvider, reason: str, finish: str
) -> None:
    events = await heard(driver, wire, begin(), *end(reason))
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == finish


async def test_a_refusal_without_a_word_is_explained(driver: AnthropicMessages, wire: FakeProvider) -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "This is not for me."}
    events = await heard(driver, wire, begin(), *end("refusal", stop_details=details))
    assert TextDelta("This is not for me.") in events


async def test_arguments_may_come_whole_or_be_cut_short(driver: AnthropicMessages, wire: FakeProvider) -> None:
    events = await heard(
        driver,
        wire,
        begin(),
        *block(0, {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "sea"}}),
        *block(1, {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
               {"type": "input_json_delta", "partial_json": '{"at": "se'}),
        *end("max_tokens"),
    )  # fmt: skip
    whole, cut = [event for event in events if isinstance(event, ToolCallReady)]
    assert (whole.call.arguments, whole.problem) == ({"at": "sea"}, None)
    assert cut.call.arguments == {}
    assert cut.problem is not None
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "length"


@pytest.mark.parametrize("garbage", ["{", "[1]", '"x"'])
async def test_what_is_no_event_is_the_servers_error(
    driver: AnthropicMessages, wire: FakeProvider, garbage: str
) -> None:
    with pytest.raises(ModelError) as raised:
        await heard(driver, wire, begin(), garbage)
    assert raised.value.kind is ModelErrorKind.SERVER_ERROR


async def test_a_key_repeated_inside_a_stream_is_masked(driver: AnthropicMessages, wire: FakeProvider) -> None:
    with pytest.raises(ModelError) as raised:
        await heard(
            driver, wire, begin(), {"type": "error", "error": {"type": "api_error", "message": f"{KEY} is slow"}}
        )
    assert raised.value.kind is ModelErrorKind.SERVER_ERROR
    assert "*** is slow" in raised.value.message


async def test_an_address_may_end_with_the_version(driver: AnthropicMessages, fake: FakeProvider) -> None:
    for path in ("/v1", "/v1/", "/"):
        assert await run(driver, fake, endpoint=endpoint(fake, path=path))


async def test_every_key_has_its_own_client(driver: AnthropicMessages, fake: FakeProvider) -> None:
    fake.requests.clear()
    for key in ("test-key-one", "test-key-two", "test-key-one"):
        await run(driver, fake, endpoint=endpoint(fake, key=key))
    assert [recorded.headers["authorization"][-3:] for recorded in fake.requests] == ["one", "two", "one"]


async def test_models_are_listed_over_all_pages_without_retired_ones(
    driver: AnthropicMessages, fake: FakeProvider
) -> None:
    assert isinstance(driver, ModelLister)
    fake.requests.clear()
    assert await driver.list_models(endpoint(fake)) == [
        DiscoveredModel(model_id="claude-opus-5-5", display_name="Claude Opus 5.5")
    ]
    assert len(fake.requests) == 2


async def test_a_list_that_is_refused_is_a_model_error(driver: AnthropicMessages, fake: FakeProvider) -> None:
    fake.play(Answer(failure="auth"))
    with pytest.raises(ModelError) as raised:
        await driver.list_models(endpoint(fake))
    assert raised.value.kind is ModelErrorKind.AUTHENTICATION
