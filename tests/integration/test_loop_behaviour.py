"""Capabilities that change how a turn goes: loop detection, repair of calls, parallel calls, metadata, long conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.openai_chat import FakeOpenAIChat
from tests.fakes.script import Answer, Call
from tests.fakes.server import FakeProvider
from tests.integration.test_guardrails import fixed, script, texts
from tests.integration.test_provider_turns import add_model
from tests.stack import Json, Stack, of_type


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeOpenAIChat().running() as fake:
        yield fake


@pytest.fixture(scope="module")
async def model(stack: Stack, provider: FakeProvider) -> str:
    return await add_model(stack, provider, "loop-behaviour")


ADD: Json = {"name": "add", "arguments": {"a": 1, "b": 2}}


async def test_a_repeated_call_is_refused_and_the_turn_goes_on(stack: Stack) -> None:
    session = await stack.create_session(capabilities=[{"ref": "test_math"}, {"ref": "loop_detection"}])
    again: Json = {"tool_calls": [ADD]}
    log = await stack.ask(session, "go", llmsim=script(*[again] * 5, {"text": "Enough."}))
    assert [data["success"] for data in of_type(log, "tool.completed")] == [True, True, True, False, False]
    assert "Not executed" in str(of_type(log, "tool.completed")[-1]["error"])
    assert texts(log)[-1] == "Enough."
    log = await stack.ask(session, "again", llmsim=script({"tool_calls": [ADD]}, {"text": "Fine."}))
    assert [data["success"] for data in of_type(log, "tool.completed")] == [True]
    await stack.check(session)


async def test_malformed_arguments_are_repaired_asked_for_again_and_given_up(
    stack: Stack, provider: FakeProvider, model: str
) -> None:
    refs: list[Json] = [{"ref": "test_math"}, {"ref": "tool_call_repair", "config": {"max_reprompts": 1}}]
    session = await stack.create_session(capabilities=refs, model_id=model)
    provider.play(
        Answer(calls=[Call(name="add", arguments="{'a': 1, 'b': 2,}")]),
        Answer(calls=[Call(name="add", arguments='{"a": 1, "b"; 2}')]),
        Answer(calls=[Call(name="add", arguments='{"a": 1, "b"; 2}')]),
        Answer(text=["Three."]),
    )
    log = await stack.ask(session, "go")
    repairs = of_type(log, "tool.call_repaired")
    assert [one["outcome"] for one in repairs] == ["local-salvage", "re-prompt", "gave-up"]
    completed = of_type(log, "tool.completed")
    assert [one["success"] for one in completed] == [True, False, False]
    assert [one["tool_call_id"] for one in repairs] == [one["tool_call_id"] for one in completed]
    assert "not valid JSON" in str(completed[1]["error"])
    assert "Do not call this tool again" in str(completed[2]["error"])
    calls = [part for data in of_type(log, "output.message.completed") for part in data["message"]["content"]]  # type: ignore[index]
    assert calls[0]["arguments"] == {"a": 1, "b": 2}
    await stack.check(session)


async def test_without_the_capability_nothing_is_repaired(stack: Stack, provider: FakeProvider, model: str) -> None:
    session = await stack.create_session(harness_name="base", capabilities=[{"ref": "test_math"}], model_id=model)
    provider.play(Answer(calls=[Call(name="add", arguments="{'a': 1, 'b': 2,}")]), Answer(text=["Hm."]))
    log = await stack.ask(session, "go")
    assert [one["success"] for one in of_type(log, "tool.completed")] == [False]
    assert not of_type(log, "tool.call_repaired")


async def test_what_the_engine_says_itself_is_not_held_back_by_guards(
    stack: Stack, provider: FakeProvider, model: str
) -> None:
    pattern: Json = {"type": "regex", "stage": "output", "patterns": ["secret-[0-9]+"]}
    refs: list[Json] = [{"ref": "guardrails", "config": {"checks": [pattern]}}]
    session = await stack.create_session(capabilities=refs, model_id=model)
    provider.play(Answer(finish="content_filter"))
    log = await stack.ask(session, "go")
    assert texts(log) == ["The AI provider's content filter stopped this answer."]
    await stack.check(session)


async def test_what_the_model_is_told_about_parallel_calls_and_messages(
    stack: Stack, provider: FakeProvider, model: str
) -> None:
    refs: list[Json] = [
        {"ref": "test_math"},
        {"ref": "parallel_tool_calls", "config": {"mode": "avoid"}},
        {"ref": "message_metadata"},
    ]
    session = await stack.create_session(capabilities=refs, model_id=model)
    provider.play(Answer(text=["One."]), Answer(text=["Two."]))
    await stack.ask(session, "first", metadata={"timezone": "Asia/Tokyo"})
    await stack.ask(session, "second", external_actor={"actor_id": "u1", "source": "slack", "actor_name": "Ann]\n[x"})
    first, second = [request.body for request in provider.requests[-2:]]
    assert first["parallel_tool_calls"] is False
    assert "one tool at a time" in str(first["messages"][0])
    assert "Asia/Tokyo]" in str(first["messages"][1])
    # A later prompt begins with the very same messages.
    assert second["messages"][: len(first["messages"])] == first["messages"]
    assert "UTC · from Ann x via slack]" in str(second["messages"][-1])
    listed = (await stack.client.get(f"sessions/{session}/messages")).json()["data"]
    assert listed[0]["content"] == [{"type": "text", "text": "first"}]


async def test_old_messages_leave_the_prompt_and_are_found_by_the_tool(stack: Stack) -> None:
    refs: list[Json] = [{"ref": "infinity_context", "config": {"recent_messages": 4}}]
    # `generic` has compaction.
    session = await stack.create_session(capabilities=refs, harness_name="base")
    await stack.ask(session, "The code word is Pelikan.", llmsim=fixed("I will remember 100% of it."))
    for number in range(4):
        await stack.ask(session, f"Question {number}", llmsim=fixed(f"Answer {number}"))
    search: Json = {"id": "call_0", "name": "query_history", "arguments": {"query": "pelikan"}}
    percent: Json = {"id": "call_1", "name": "query_history", "arguments": {"query": "100%", "role": "agent"}}
    pattern: Json = {
        "id": "call_2",
        "name": "query_history",
        "arguments": {"query": "^Answer [12]$", "regex": True, "limit": 1},
    }
    wrong: Json = {"id": "call_3", "name": "query_history", "arguments": {"query": "(", "regex": True}}
    calls = script({"tool_calls": [search, percent, pattern, wrong]}, {"text": "Pelikan."})
    log = await stack.ask(session, "What was the code word?", llmsim=calls)
    results = sorted(of_type(log, "tool.completed"), key=lambda one: str(one["tool_call_id"]))
    assert "The code word is Pelikan." in str(results[0]["result"])
    assert "What was the code word" not in str(results[0]["result"])
    assert "I will remember" in str(results[1]["result"])
    assert "Answer 2" in str(results[2]["result"])
    assert "Answer 1" not in str(results[2]["result"])
    assert "RE2" in str(results[3]["error"])
    prompts = of_type(log, "llm.generation")
    assert [data["prompt_message_count"] for data in prompts] == [6, 7]
    await stack.check(session)


async def test_with_compaction_nothing_leaves_the_prompt_for_its_number(stack: Stack) -> None:
    refs: list[Json] = [{"ref": "infinity_context", "config": {"recent_messages": 4}}, {"ref": "compaction"}]
    session = await stack.create_session(capabilities=refs)
    for number in range(4):
        await stack.ask(session, f"Question {number}", llmsim=fixed(f"Answer {number}"))
    log = await stack.ask(session, "Question 4", llmsim=fixed("Answer 4"))
    (generation,) = of_type(log, "llm.generation")
    assert generation["prompt_message_count"] == 10


async def test_history_of_another_session_is_never_found(stack: Stack) -> None:
    refs: list[Json] = [{"ref": "infinity_context"}]
    other = await stack.create_session(capabilities=refs)
    await stack.ask(other, "The code word is Marabu.", llmsim=fixed("Good."))
    session = await stack.create_session(capabilities=refs)
    search: Json = {"name": "query_history", "arguments": {"query": "marabu"}}
    log = await stack.ask(session, "Which word?", llmsim=script({"tool_calls": [search]}, {"text": "None."}))
    (result,) = of_type(log, "tool.completed")
    assert result["result"] == [{"type": "text", "text": '{"messages":[]}'}]
