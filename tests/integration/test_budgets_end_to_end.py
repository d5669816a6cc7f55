"""Budgets over the running engine: a pause costs nothing and loses nothing, and a used-up budget answers for itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.integration.test_turns import TOOLS, answers, call, calling, check_log_command, saying, script, types
from tests.stack import Json, Stack, of_type

SCRIPT = script(calling(call("add", "call_sum", a=2, b=3), text="Adding."), saying("It is 5."))


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as running:
        yield running


async def budget_for(stack: Stack, session: str, **fields: object) -> Json:
    body = {"subject_type": "session", "subject_id": session, "currency": "tokens", **fields}
    made = await stack.client.post("budgets", json=body)
    assert made.status_code == 201, made.text
    return made.json()


async def called(stack: Stack, method: str, path: str, **body: object) -> Json:
    answer = await stack.client.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def at_rest_in_temporal(stack: Stack, session: str) -> None:
    """No run of the session is open: waiting costs nothing there."""
    deadline = time.monotonic() + 30
    handle = (await stack.temporal()).get_workflow_handle(session)
    while (found := await handle.describe()).close_time is None:
        assert time.monotonic() < deadline, found.status
        await asyncio.sleep(0.05)


async def test_a_soft_limit_pauses_the_turn_and_a_resume_goes_on_with_it_and_with_what_came_meanwhile(
    stack: Stack,
) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    budget = await budget_for(stack, session, limit=1_000_000, soft_limit=1)
    await stack.post_message(session, "2 + 3?", llmsim=SCRIPT)
    await stack.wait_for_event(session, "budget.paused")
    await at_rest_in_temporal(stack, session)
    assert (await called(stack, "GET", f"sessions/{session}/budget-check"))["error_code"] == "budget_paused"
    meanwhile = await stack.post_message(session, "Are you there?")
    await at_rest_in_temporal(stack, session)
    code, printed = await check_log_command(stack, session)
    assert code == 0, printed
    log = await stack.check(session, finished=False)
    assert types(log, "reason.started", "turn.completed", "tool.completed") == ["reason.started", "tool.completed"]

    assert await called(stack, "POST", f"sessions/{session}/resume") == {"session_id": session, "resumed_budgets": 1}
    await stack.idle(session)
    log = await stack.check(session)
    assert types(log, "turn.started", "budget.paused", "budget.resumed", "turn.completed") == [
        "turn.started",
        "budget.paused",
        "budget.resumed",
        "turn.completed",
    ]
    assert [data["input_message_ids"] for data in of_type(log, "reason.started") if "input_message_ids" in data] == [
        [meanwhile["id"]]
    ]
    assert answers(log)[-1] == "It is 5."
    ledger = (await stack.client.get(f"budgets/{budget['id']}/ledger")).json()
    assert len(ledger) == len(of_type(log, "llm.generation")) == 2
    used = [data["metadata"]["usage"] for data in of_type(log, "llm.generation")]  # type: ignore[index]
    assert sum(entry["amount"] for entry in ledger) == sum(
        one["input_tokens"] + one["output_tokens"] + one.get("cache_read_tokens", 0) for one in used
    )
    again = await stack.ask(session, "Thanks", llmsim={"mode": "fixed", "text": "Welcome."})
    assert answers(again) == ["Welcome."]


async def test_a_used_up_budget_apologises_until_it_is_topped_up(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    budget = await budget_for(stack, session, limit=1)
    log = await stack.ask(session, "2 + 3?", llmsim=SCRIPT)
    assert types(log, "budget.exhausted", "turn.failed", "turn.completed") == ["budget.exhausted", "turn.failed"]
    assert of_type(log, "turn.failed")[0]["error_code"] == "budget_exhausted"
    log = await stack.ask(session, "Please?")
    assert types(log, "reason.started", "turn.failed") == ["turn.failed"]
    assert "used up" in answers(log)[-1]
    topped_up = await called(stack, "POST", f"budgets/{budget['id']}/top-up", amount=1_000_000)
    assert topped_up["status"] == "active"
    log = await stack.ask(session, "And now?", llmsim={"mode": "fixed", "text": "Now it works."})
    assert answers(log) == ["Now it works."]
    await stack.check(session)


async def test_a_paused_turn_can_be_cancelled_and_the_session_is_usable(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    budget = await budget_for(stack, session, limit=1_000_000, soft_limit=1)
    await stack.post_message(session, "2 + 3?", llmsim=SCRIPT)
    await stack.wait_for_event(session, "budget.paused")
    assert (await stack.cancel(session))["status"] == "cancelled"
    await stack.idle(session)
    await called(stack, "POST", f"budgets/{budget['id']}/top-up", amount=1_000_000)
    log = await stack.ask(session, "Again", llmsim={"mode": "fixed", "text": "Yes."})
    assert answers(log) == ["Yes."]
    assert types(await stack.check(session), "turn.cancelled", "turn.completed") == ["turn.cancelled", "turn.completed"]


async def test_a_period_that_ends_lets_a_paused_turn_go_on_by_itself(stack: Stack) -> None:
    session = await stack.create_session(capabilities=TOOLS)
    await budget_for(stack, session, limit=1_000_000, soft_limit=1, period={"type": "rolling", "window": "3s"})
    await stack.post_message(session, "2 + 3?", llmsim=SCRIPT)
    await stack.wait_for_event(session, "budget.paused")
    await stack.wait_for_event(session, "turn.completed")
    log = await stack.check(session, finished=False)
    assert answers(log)[-1] == "It is 5."
    assert types(log, "turn.started", "turn.completed") == ["turn.started", "turn.completed"]
