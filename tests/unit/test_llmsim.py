from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.llm import driver_for, llmsim_script
from activities.llm.llmsim import LlmSim, parse_script
from activities.llm.llmsim_script import DEFAULT_TEXT, ERROR_KINDS, ErrorClass
from domain.errors import InvalidInput
from domain.messages import ContentPart, Message, Role, TextPart, ToolCallPart, ToolResultPart
from domain.model import (
    RETRYABLE,
    USER_ERRORS,
    Finished,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.providers import PROVIDER_TYPES
from domain.tools import ToolCall

DOCS = Path(__file__).parents[2] / "docs"
DOC = (DOCS / "llmsim.md").read_text()


def message(role: Role, *content: ContentPart | str, script: object = None) -> Message:
    return Message(
        id="message_1",
        role=role,
        content=[TextPart(text=part) if isinstance(part, str) else part for part in content],
        created_at="2026-01-01T00:00:00.000Z",
        metadata=None if script is None else {"llmsim": script},
    )


def user(text: str = "hi", script: object = None) -> Message:
    return message(Role.USER, text, script=script)


def agent(*content: ContentPart | str) -> Message:
    return message(Role.AGENT, *(content or ("…",)))


def request(
    *messages: Message,
    model: str = "llmsim-model",
    attempt: int = 1,
    key: str = "step-1",
    options: dict[str, object] | None = None,
) -> ModelRequest:
    return ModelRequest(
        model=model,
        messages=list(messages) or [user()],
        tools=[],
        session_id="session_1",
        idempotency_key=key,
        attempt=attempt,
        options=options or {},
    )


def scripted(script: object, *later: Message, attempt: int = 1, key: str = "step-1") -> ModelRequest:
    return request(user(script=script), *later, attempt=attempt, key=key)


def turns(*turns: Mapping[str, object], **fields: object) -> dict[str, object]:
    return {"mode": "script", "turns": list(turns), **fields}


async def play(req: ModelRequest) -> list[StreamEvent]:
    return [event async for event in LlmSim().stream(req)]


async def play_until_error(req: ModelRequest) -> tuple[list[StreamEvent], ModelError]:
    events: list[StreamEvent] = []
    try:
        async for event in LlmSim().stream(req):
            events.append(event)
    except ModelError as error:
        return events, error
    pytest.fail("the call did not fail")


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def calls(events: list[StreamEvent]) -> list[ToolCall]:
    return [event.call for event in events if isinstance(event, ToolCallReady)]


def finished(events: list[StreamEvent]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


# Where the script comes from


def test_every_registered_provider_type_has_a_driver_and_others_are_not_configured():
    for provider_type in PROVIDER_TYPES:
        assert driver_for(provider_type)
    with pytest.raises(ModelError) as caught:
        driver_for("nobody")
    assert caught.value.kind is ModelErrorKind.NOT_CONFIGURED


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llmsim-model", DEFAULT_TEXT),
        ("llmsim-test", DEFAULT_TEXT),
        ("llmsim-lorem-many", DEFAULT_TEXT),
        ("llmsim-echo", "Echo: hi"),
        ("llmsim-lorem-3", "sit nec qui."),
    ],
)
async def test_model_name_decides_when_there_is_no_script(model: str, expected: str):
    events = await play(request(user("hi"), model=model))
    assert text(events) == expected
    assert finished(events).reason == "stop"


async def test_llmsim_lorem_has_200_tokens_in_stream_and_usage():
    events = await play(request(model="llmsim-lorem"))
    assert sum(isinstance(event, TextDelta) for event in events) == 200
    assert finished(events).usage.output_tokens == 200


async def test_message_script_wins_over_model_script_and_model_script_over_name():
    options: dict[str, object] = {"script": {"mode": "fixed", "text": "from options"}}
    assert text(await play(request(model="llmsim-echo", options=options))) == "from options"
    carried = user(script={"mode": "fixed", "text": "from message"})
    assert text(await play(request(carried, model="llmsim-echo", options=options))) == "from message"


async def test_newest_script_wins_and_stays_in_force_for_later_messages():
    old = user(script={"mode": "fixed", "text": "old"})
    new = user(script={"mode": "fixed", "text": "new"})
    assert text(await play(request(old, agent(), new, agent(), user("plain")))) == "new"


@pytest.mark.parametrize("model", ["llmsim-lorem-0", "llmsim-lorem-100001"])
async def test_lorem_model_out_of_bounds_is_an_invalid_request(model: str):
    _, error = await play_until_error(request(model=model))
    assert error.kind is ModelErrorKind.INVALID_REQUEST


async def test_bad_script_is_an_invalid_request_that_names_the_field():
    _, error = await play_until_error(scripted(turns({"text": 5})))
    assert error.kind is ModelErrorKind.INVALID_REQUEST
    assert "metadata.llmsim.turns[0].text" in error.message
    _, error = await play_until_error(request(options={"script": {"mode": "lorem", "tokens": 0}}))
    assert "options.script.tokens" in error.message


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ("fixed", "metadata.llmsim"),
        ({}, "metadata.llmsim.mode"),
        ({"mode": "nope"}, "metadata.llmsim.mode"),
        ({"mode": "fixed", "txt": "a"}, "metadata.llmsim.txt"),
        ({"mode": "error"}, "metadata.llmsim.error"),
        ({"mode": "error", "error": {"class": "nope"}}, "metadata.llmsim.error.class"),
        ({"mode": "error", "error": {"class": "other", "attempts": 0}}, "metadata.llmsim.error.attempts"),
        ({"mode": "echo", "first_token_delay_ms": 600_001}, "metadata.llmsim.first_token_delay_ms"),
        ({"mode": "echo", "error_after_tokens": 1}, "metadata.llmsim"),
        ({"mode": "lorem", "tokens": 100_001}, "metadata.llmsim.tokens"),
        (turns(), "metadata.llmsim.turns"),
        (turns(*[{}] * 1001), "metadata.llmsim.turns"),
        (turns({}, {"tool_calls": [{}]}), "metadata.llmsim.turns[1].tool_calls[0].name"),
        (turns({}, on_exhausted="stop"), "metadata.llmsim.on_exhausted"),
    ],
)
def test_parse_script_refuses_and_names_the_field(script: object, field: str):
    with pytest.raises(InvalidInput) as caught:
        parse_script(script)
    assert caught.value.field == field
    assert caught.value.message.startswith(field)


def test_an_unknown_choice_is_told_what_is_accepted():
    with pytest.raises(InvalidInput, match="accepted: fixed, echo, lorem, empty, error, script"):
        parse_script({"mode": "nope"})


# Modes


async def test_fixed_and_empty():
    assert text(await play(scripted({"mode": "fixed", "text": "a b"}))) == "a b"
    assert text(await play(scripted({"mode": "fixed"}))) == DEFAULT_TEXT
    events = await play(scripted({"mode": "empty"}))
    assert len(events) == 1
    assert finished(events).usage.output_tokens == 1


async def test_echo_repeats_the_newest_user_message_even_if_an_older_one_holds_the_script():
    assert text(await play(scripted({"mode": "echo"}, agent(), user("and now?")))) == "Echo: and now?"


@pytest.mark.parametrize("tokens", [1, 16, 17, 5000])
async def test_lorem_has_exactly_the_tokens_asked_for(tokens: int):
    events = await play(scripted({"mode": "lorem", "tokens": tokens}))
    assert sum(isinstance(event, TextDelta) for event in events) == tokens
    assert finished(events).usage.output_tokens == tokens


async def test_turn_streams_thinking_then_text_then_calls():
    script = turns({"thinking": "hm hm", "text": "let me see", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]})
    events = await play(scripted(script))
    kinds = [type(event) for event in events]
    assert kinds == [ThinkingDelta] * 2 + [TextDelta] * 3 + [ToolCallReady, Finished]
    assert calls(events)[0].arguments == {"a": 1}
    assert finished(events).reason == "tool_calls"


async def test_finish_reason_can_be_ordered():
    assert finished(await play(scripted(turns({"text": "no", "finish_reason": "refusal"})))).reason == "refusal"


@given(st.text(max_size=300), st.text(max_size=100))
def test_deltas_concatenate_to_the_text(answer: str, thinking: str):
    events = asyncio.run(play(scripted(turns({"text": answer, "thinking": thinking}))))
    assert text(events) == answer
    assert "".join(event.text for event in events if isinstance(event, ThinkingDelta)) == thinking
    assert finished(events).usage.output_tokens == max(1, -(-(len(answer) + len(thinking)) // 4))


async def test_usage_counts_every_message_of_the_prompt():
    result = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="c", result={"sum": 5}))
    events = await play(request(user("x" * 40), agent(ToolCallPart(id="c", name="add", arguments={})), result))
    assert finished(events).usage.input_tokens == -(-(40 + len("add{}") + len('{"sum":5}')) // 4)


# Which turn plays


async def test_turn_index_is_the_number_of_agent_messages_after_the_script():
    script = turns({"text": "one"}, {"text": "two"}, {"text": "three"})
    before = (user("earlier"), agent(), agent())
    result = message(Role.TOOL_RESULT, ToolResultPart(tool_call_id="c", result="5"))
    assert text(await play(request(*before, user(script=script)))) == "one"
    assert text(await play(request(*before, user(script=script), agent(), result))) == "two"
    # A steering message does not start the script over.
    assert text(await play(request(*before, user(script=script), agent(), user("steer"), agent()))) == "three"


async def test_model_script_counts_from_the_last_user_message():
    options: dict[str, object] = {"script": turns({"text": "one"}, {"text": "two"})}
    assert text(await play(request(user(), agent(), agent(), user(), options=options))) == "one"
    assert text(await play(request(user(), agent(), agent(), user(), agent(), options=options))) == "two"


async def test_exhausted_script_repeats_loops_or_fails():
    two = ({"text": "one"}, {"text": "two"})
    later = (agent(), agent(), agent(), agent())
    assert text(await play(scripted(turns(*two), *later))) == "two"
    assert text(await play(scripted(turns(*two, on_exhausted="loop"), *later))) == "one"
    _, error = await play_until_error(scripted(turns(*two, on_exhausted="error"), *later))
    assert error.kind is ModelErrorKind.OTHER


async def test_attempts_of_one_step_say_exactly_the_same():
    script = turns({"text": "a b", "tool_calls": [{"name": "add"}, {"name": "add"}]})
    first, second = await play(scripted(script)), await play(scripted(script, attempt=2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


async def test_tool_call_ids_differ_within_a_turn_and_between_steps():
    script = turns({"tool_calls": [{"name": "add"}, {"name": "add"}, {"name": "add", "id": "mine"}]})
    ids = [call.id for call in calls(await play(scripted(script)))]
    ids += [call.id for call in calls(await play(scripted(script, agent(), key="step-2")))]
    assert ids[2] == "mine"
    assert len(set(ids)) == 6, "a replayed turn must not reuse an id, not even a given one"


@pytest.mark.parametrize(
    ("later", "expected"),
    [((), []), ((agent("magic"),), ["add"]), ((user("magic"),), ["add"]), ((user("magic"), user("none")), [])],
)
async def test_conditional_call_looks_from_the_newest_user_message_on(later: tuple[Message, ...], expected: list[str]):
    script = turns({"tool_calls": [{"name": "add", "when": "magic"}]})
    events = await play(scripted(script, *later))
    assert [call.name for call in calls(events)] == expected
    assert finished(events).reason == ("tool_calls" if expected else "stop")


async def test_conditional_call_sees_tool_results():
    script = turns({"tool_calls": [{"name": "add", "when": "needle"}]})
    for part in (
        ToolResultPart(tool_call_id="c", result={"found": "needle"}),
        ToolResultPart(tool_call_id="c", error="no needle"),
    ):
        events = await play(scripted(script, agent(), message(Role.TOOL_RESULT, part)))
        assert len(calls(events)) == 1


# Faults


@pytest.mark.parametrize("error_class", ErrorClass)
async def test_every_error_class_is_raised_before_the_first_token(error_class: ErrorClass):
    spec = {"class": error_class.value, "message": "words", "retry_after_seconds": 1.5}
    for script in ({"mode": "error", "error": spec}, {"mode": "fixed", "error": spec}, turns({"error": spec})):
        events, error = await play_until_error(scripted(script))
        assert events == []
        assert (error.kind, error.message, error.retry_after_seconds) == (ERROR_KINDS[error_class], "words", 1.5)


async def test_error_strikes_only_the_first_attempts():
    script = {"mode": "error", "error": {"class": "overloaded", "attempts": 2}, "text": "recovered"}
    await play_until_error(scripted(script, attempt=1))
    await play_until_error(scripted(script, attempt=2))
    assert text(await play(scripted(script, attempt=3))) == "recovered"


async def test_error_in_the_middle_of_the_stream():
    script = {"mode": "fixed", "text": "a b c d", "error": {"class": "transport"}, "error_after_tokens": 2}
    events, error = await play_until_error(scripted(script))
    assert text(events) == "a b "
    assert error.kind is ModelErrorKind.TRANSPORT


async def test_a_cut_stream_ends_without_a_terminal_event_then_recovers():
    script = {"mode": "fixed", "text": "a b c", "cut_after_tokens": 1, "fault_attempts": 1}
    events = await play(scripted(script))
    assert events == [TextDelta("a ")]
    assert text(await play(scripted(script, attempt=2))) == "a b c"


async def test_a_fault_beyond_the_end_strikes_before_the_terminal_event():
    events = await play(scripted({"mode": "fixed", "text": "a b", "cut_after_tokens": 50}))
    assert text(events) == "a b"
    assert not any(isinstance(event, Finished) for event in events)
    assert await play(scripted({"mode": "empty", "cut_after_tokens": 0})) == []


async def test_the_earliest_fault_strikes():
    script = {"mode": "fixed", "text": "a b c", "cut_after_tokens": 1, "stall_after_tokens": 2}
    assert len(await play(scripted(script))) == 1
    script = {
        "mode": "fixed",
        "text": "a b c",
        "cut_after_tokens": 1,
        "error": {"class": "other"},
        "error_after_tokens": 1,
    }
    await play_until_error(scripted(script))


async def test_a_stall_lasts_until_it_is_cancelled():
    seen: list[StreamEvent] = []
    stalled = asyncio.Event()

    async def consume() -> None:
        async for event in LlmSim().stream(scripted({"mode": "fixed", "text": "a b c", "stall_after_tokens": 2})):
            seen.append(event)
            if len(seen) == 2:
                stalled.set()

    task = asyncio.create_task(consume())
    await stalled.wait()
    _, pending = await asyncio.wait({task}, timeout=0.02)
    assert pending == {task}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert text(seen) == "a b "


async def test_a_stall_can_be_limited_to_the_first_attempt():
    script = {"mode": "fixed", "text": "a b", "stall_after_tokens": 0, "fault_attempts": 1}
    assert text(await play(scripted(script, attempt=2))) == "a b"


async def test_a_long_answer_without_delays_can_be_cancelled():
    task = asyncio.create_task(play(scripted({"mode": "lorem", "tokens": 100_000})))
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_without_delays_no_timer_is_used(monkeypatch: pytest.MonkeyPatch):
    naps = _record_sleeps(monkeypatch)
    await play(scripted({"mode": "lorem", "tokens": 500}))
    assert set(naps) == {0}


async def test_delays_come_before_the_first_and_between_all_tokens(monkeypatch: pytest.MonkeyPatch):
    naps = _record_sleeps(monkeypatch)
    script = {"mode": "fixed", "text": "a b c", "first_token_delay_ms": 400, "inter_token_delay_ms": 20}
    await play(scripted(script))
    assert naps == [0.4, 0.02, 0.02]


async def test_a_turn_overrides_the_timing_of_its_script(monkeypatch: pytest.MonkeyPatch):
    naps = _record_sleeps(monkeypatch)
    script = turns(
        {"text": "a"},
        {"text": "b", "first_token_delay_ms": 0},
        {"text": "c", "first_token_delay_ms": 7},
        first_token_delay_ms=5,
    )
    await play(scripted(script))
    await play(scripted(script, agent()))
    await play(scripted(script, agent(), agent()))
    assert naps == [0.005, 0.007]


async def test_a_turns_own_error_does_not_take_the_position_of_its_scripts_error():
    script = turns(
        {"text": "a b", "error": {"class": "timeout"}},
        {"text": "a b"},
        error={"class": "overloaded"},
        error_after_tokens=1,
    )
    events, error = await play_until_error(scripted(script))
    assert (events, error.kind) == ([], ModelErrorKind.TIMEOUT)
    events, error = await play_until_error(scripted(script, agent()))
    assert (text(events), error.kind) == ("a ", ModelErrorKind.OVERLOADED)


def _record_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    naps: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        naps.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return naps


# Documentation


def test_every_documented_script_is_valid():
    pages = "".join(page.read_text() for page in sorted(DOCS.rglob("*.md")))
    bodies = re.findall(r"-d '(\{[^']*\"llmsim\"[^']*\})'", pages)
    scripts = [json.loads(body)["metadata"]["llmsim"] for body in bodies]
    for script in scripts:
        parse_script(script)
    assert {script["mode"] for script in scripts} == {"fixed", "echo", "lorem", "empty", "error", "script"}


def test_every_field_is_documented():
    structs = (
        *llmsim_script.Script.__args__,
        llmsim_script.Turn,
        llmsim_script.ScriptedToolCall,
        llmsim_script.ErrorSpec,
    )
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            assert f"`{field.encode_name}`" in DOC, f"{struct.__name__}.{field.name}"


@pytest.mark.parametrize("error_class", ErrorClass)
def test_every_error_class_is_documented_with_its_consequences(error_class: ErrorClass):
    kind = ERROR_KINDS[error_class]
    retried = "yes" if kind in RETRYABLE else "no"
    assert f"| `{error_class}` | {retried} | `{USER_ERRORS[kind][0]}` |" in DOC
