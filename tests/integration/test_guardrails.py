"""`guardrails`: what a rule forbids reaches no reader, whole or in part, and runs no tool; kills in between change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import msgspec
import pytest

from domain.events import StoredEvent
from tests.chaos.fault_points import fault_points
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer
from tests.integration.test_provider_turns import add_model
from tests.stack import Json, Stack, of_type, payload

WORD = "thunderstruck"
BLOCK_WORD: Json = {
    "type": "blocklist",
    "id": "words",
    "stage": "output",
    "words": [WORD],
    "replacement": "No comment.",
}


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


def guarded(*checks: Json, others: tuple[str, ...] = (), **fields: object) -> list[Json]:
    return [{"ref": "guardrails", "config": {"checks": list(checks), **fields}}, *({"ref": one} for one in others)]


def fixed(text: str, **fields: object) -> Json:
    return {"mode": "fixed", "text": text, **fields}


def script(*turns: Json) -> Json:
    return {"mode": "script", "turns": list(turns)}


async def engines_words(stack: Stack, session: str) -> str:
    """Everything in the log but what the test itself has posted: the message holds the simulated model's script."""
    kept: list[str] = []
    for event in await stack.check(session):
        data = payload(event)
        if event.type == "input.message":
            continue
        data.pop("input_content", None)
        data.pop("messages", None)
        kept.append(msgspec.json.encode(data).decode())
    return "\n".join(kept).casefold()


def texts(log: Sequence[StoredEvent]) -> list[str]:
    return [
        "".join(part.get("text", "") for part in data["message"]["content"])  # type: ignore[index]
        for data in of_type(log, "output.message.completed")
    ]


async def test_a_blocked_word_is_in_no_event_and_the_completed_message_is_the_replacement(stack: Stack) -> None:
    session = await stack.create_session(capabilities=guarded(BLOCK_WORD))
    answer = f"Well, I was {WORD[:6].upper()}{WORD[6:]} by it, and so on."
    log = await stack.ask(session, "hi", llmsim=fixed(answer, inter_token_delay_ms=5))
    (replaced,) = of_type(log, "output.message.replaced")
    assert {
        key: replaced[key] for key in ("guardrail_capability_id", "guardrail_id", "reason_code", "replacement")
    } == {
        "guardrail_capability_id": "guardrails",
        "guardrail_id": "words",
        "reason_code": "guardrail.blocklist",
        "replacement": "No comment.",
    }
    assert texts(log) == ["No comment."]
    (hit,) = of_type(log, "guardrail.triggered")
    assert (hit["stage"], hit["action"], hit["check_id"]) == ("output", "block", "words")
    assert hit["message_id"] == replaced["message_id"]
    (generation,) = of_type(log, "llm.generation")
    assert generation["metadata"]["finish_reasons"] == ["content_filter"]  # type: ignore[index]
    assert generation["metadata"]["usage"]["input_tokens"] > 0  # type: ignore[index]
    assert [data["status"] for data in of_type(log, "turn.completed")] == ["completed"]
    kept = await engines_words(stack, session)
    assert "and so on" not in kept
    assert WORD[:5] not in kept
    listed = (await stack.client.get(f"sessions/{session}/messages")).json()["data"]
    assert listed[-1]["content"] == [{"type": "text", "text": "No comment."}]


async def test_text_that_cannot_become_a_match_any_more_is_streamed_at_once(stack: Stack) -> None:
    session = await stack.create_session(capabilities=guarded(BLOCK_WORD))
    sent = {"mode": "fixed", "text": "one two three", "stall_after_tokens": 2, "inter_token_delay_ms": 1}
    await stack.post_message(session, "hi", llmsim=sent)
    (delta,) = await stack.wait_for_event(session, "output.message.delta")
    assert str(delta.data["delta"]).startswith("one ")
    await stack.cancel(session)
    await stack.idle(session)
    await stack.check(session)


async def test_an_answer_without_a_match_is_streamed_whole(stack: Stack) -> None:
    regex: Json = {"type": "regex", "stage": "output", "patterns": ["secret-[0-9]+"]}
    session = await stack.create_session(capabilities=guarded(BLOCK_WORD, regex, {"type": "pii", "stage": "output"}))
    text = "A thunder. " * 100
    log = await stack.ask(session, "hi", llmsim=fixed(text))
    assert texts(log) == [text]
    assert "".join(str(data["delta"]) for data in of_type(log, "output.message.delta")) == text
    assert not of_type(log, "output.message.replaced", "guardrail.triggered")
    await stack.check(session)


async def test_the_calls_of_a_blocked_answer_do_not_run(stack: Stack) -> None:
    session = await stack.create_session(capabilities=guarded(BLOCK_WORD, others=("session_storage",)))
    call: Json = {"name": "kv_store", "arguments": {"operation": "set", "key": "a", "value": "1"}}
    log = await stack.ask(
        session, "hi", llmsim=script({"text": f"I am {WORD}", "tool_calls": [call]}, {"text": "Done."})
    )
    assert texts(log) == ["No comment."]
    assert not of_type(log, "tool.started", "tool.completed")
    assert (await stack.client.get(f"sessions/{session}/storage/keys")).json()["data"] == []
    await stack.check(session)


async def test_thinking_that_breaks_a_rule_is_not_shown_and_the_answer_goes_on(stack: Stack) -> None:
    session = await stack.create_session(capabilities=guarded(BLOCK_WORD))
    turn: Json = {"thinking": f"They want me to say {WORD}. I will not.", "text": "Hello."}
    log = await stack.ask(session, "hi", llmsim=script(turn))
    assert texts(log) == ["Hello."]
    assert not of_type(log, "output.message.replaced")
    assert [data["action"] for data in of_type(log, "guardrail.triggered")] == ["block"]
    assert WORD[:5] not in await engines_words(stack, session)


async def test_advisory_mode_and_log_only_tell_without_the_text(stack: Stack) -> None:
    for capabilities in (guarded(BLOCK_WORD, mode="advisory"), guarded({**BLOCK_WORD, "on_fail": "log"})):
        session = await stack.create_session(capabilities=capabilities)
        log = await stack.ask(session, "hi", llmsim=fixed(f"I am {WORD}."))
        assert texts(log) == [f"I am {WORD}."]
        (hit,) = of_type(log, "guardrail.triggered")
        assert hit["action"] == "log"
        assert WORD not in str(hit)
        await stack.check(session)


async def test_a_call_that_a_rule_forbids_is_refused_and_the_model_is_told(stack: Stack) -> None:
    checks: list[Json] = [
        {"type": "tool_pattern", "id": "tools", "stage": "tool_use", "tools": ["kv_*"], "replacement": "Not here."},
        {"type": "regex", "id": "noted", "stage": "tool_use", "patterns": ["Europe"], "on_fail": "log"},
    ]
    session = await stack.create_session(capabilities=guarded(*checks, others=("session_storage", "current_time")))
    calls: list[Json] = [
        {"id": "call_a", "name": "kv_store", "arguments": {"operation": "set", "key": "a", "value": "1"}},
        {"id": "call_b", "name": "get_current_time", "arguments": {"timezone": "Europe/Berlin"}},
    ]
    log = await stack.ask(session, "hi", llmsim=script({"tool_calls": calls}, {"text": "Done."}))
    results = {str(data["tool_call_id"]): data for data in of_type(log, "tool.completed")}
    assert (results["call_a"]["success"], results["call_a"]["error"]) == (False, "Not here.")
    assert results["call_b"]["success"] is True
    hits = of_type(log, "guardrail.triggered")
    assert [(one["tool_call_id"], one["check_id"], one["action"]) for one in hits] == [
        ("call_a", "tools", "block"),
        ("call_b", "noted", "log"),
    ]
    assert (await stack.client.get(f"sessions/{session}/storage/keys")).json()["data"] == []
    await stack.check(session)


async def test_a_result_that_breaks_a_rule_is_replaced_before_anybody_sees_it(stack: Stack) -> None:
    card = "4111 1111 1111 1111"
    checks: list[Json] = [
        {"type": "pii", "id": "cards", "stage": "tool_output", "kinds": ["credit_card"], "replacement": "Withheld."}
    ]
    session = await stack.create_session(capabilities=guarded(*checks, others=("bashkit_shell",)))
    echo: Json = {"id": "call_a", "name": "bash", "arguments": {"commands": "echo 4111 1111 1111 $((1000+111))"}}
    log = await stack.ask(session, "hi", llmsim=script({"tool_calls": [echo]}, {"text": "Done."}))
    (completed,) = of_type(log, "tool.completed")
    assert completed["result"] == [{"type": "text", "text": "Withheld."}]
    assert [(one["tool_call_id"], one["stage"]) for one in of_type(log, "guardrail.triggered")] == [
        ("call_a", "tool_output")
    ]
    assert not of_type(log, "tool.output.delta")
    assert card not in await engines_words(stack, session)


async def test_a_worker_killed_before_the_commit_of_a_blocked_answer_changes_nothing() -> None:
    async with Stack(no_worker=True) as stack, fault_points(stack.database_url) as points:
        worker = await stack.start_worker()
        session = await stack.create_session(capabilities=guarded(BLOCK_WORD, others=("test_math",)))
        sent = script({"text": f"One two. I am {WORD}", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]})
        sent["turns"][0]["first_token_delay_ms"] = 1_500  # type: ignore[index]
        await stack.post_message(session, "hi", llmsim=sent)
        await stack.wait_for_event(session, "output.message.started")
        held = await points.hold_turn(session)
        await held.hit()
        await stack.kill(worker)
        await held.release()
        await stack.start_worker()
        await stack.idle(session, timeout=90)
        log = await stack.check(session)
        assert texts(log) == ["No comment."]
        assert len(of_type(log, "output.message.replaced")) == 1
        assert len(of_type(log, "guardrail.triggered")) == 1
        assert not of_type(log, "tool.completed")
        assert WORD[:5] not in await engines_words(stack, session)


async def test_a_generation_resumed_by_another_worker_is_watched_from_where_it_was_left() -> None:
    pieces = [*(f"word{number} " for number in range(60)), "I am thunder", "struck", " and so on"]
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(Stack(no_worker=True))
        fake = await exits.enter_async_context(FakeOpenAIResponses().running())
        worker = await stack.start_worker()
        model = await add_model(stack, fake, "gpt-5.2-chat", background=True)
        fake.play(Answer(text=pieces, piece_delay_seconds=0.1))
        pattern: Json = {"type": "regex", "stage": "output", "patterns": ["thunderst[a-z]+"]}
        session = await stack.create_session(model_id=model, capabilities=guarded(pattern, hold_back_characters=40))
        await stack.post_message(session, "hi")
        await stack.wait_for_event(session, "output.message.delta", 2)
        await stack.kill(worker)
        await stack.start_worker()
        await stack.idle(session, timeout=120)
        log = await stack.check(session)
        (answer,) = texts(log)
        assert answer == of_type(log, "output.message.replaced")[0]["replacement"]
        deltas = of_type(log, "output.message.delta")
        shown = "".join(str(data["delta"]) for data in deltas)
        assert "".join(pieces).startswith(shown)
        assert [data["offset"] for data in deltas] == [
            sum(len(str(one["delta"])) for one in deltas[:place]) for place in range(len(deltas))
        ]
        assert not of_type(log, "reason.recovered")
        assert "thunder" not in await engines_words(stack, session)
