"""Questions of an MCP server: one after another, and none more once the person has said no."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from activities.mcp.elicitation import MAX_ROUNDS, continued, question_of
from domain.capabilities import Resumption, ToolError, ToolWaits
from domain.mcp import ServerTarget

TARGET = ServerTarget(capability_id="mcp:x", name="docs", org_id=1, cache_key="k", url="https://example.com/mcp")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def form(message: str) -> dict[str, Any]:
    return {"method": "elicitation/create", "params": {"message": message, "requestedSchema": SCHEMA}}


def interrupted(**questions: Any) -> dict[str, Any]:
    return {"resultType": "input_required", "inputRequests": questions, "requestState": "opaque"}


def asked(result: dict[str, Any], rounds: int = 0) -> ToolWaits:
    wait = question_of(result, TARGET, rounds)
    assert wait is not None
    return wait


def after(wait: ToolWaits, **answer: Any) -> Resumption:
    # As it comes back from the database.
    return Resumption(state=msgspec.json.decode(msgspec.json.encode(wait.state)), answer=answer)


def test_a_call_that_has_ended_asks_nothing() -> None:
    assert question_of({"resultType": "complete", "content": []}, TARGET, 0) is None
    assert question_of({"content": []}, TARGET, 0) is None
    assert continued(None) == (None, None, 0)


def test_several_questions_are_asked_one_after_another() -> None:
    first = asked(interrupted(a=form("A?"), b=form("B?")))
    assert (first.request["key"], first.request["message"], first.request["server"]) == ("a", "A?", "docs")
    with pytest.raises(ToolWaits) as caught:
        continued(after(first, action="accept", content={"n": 1}))
    second = caught.value
    assert (second.request["key"], second.request["message"]) == ("b", "B?")
    answers, state, rounds = continued(after(second, action="accept", content={"n": 2}))
    assert answers == {
        "a": {"action": "accept", "content": {"n": 1}},
        "b": {"action": "accept", "content": {"n": 2}},
    }
    assert (state, rounds) == ("opaque", 1)


@pytest.mark.parametrize("action", ["decline", "cancel", "nonsense"])
def test_after_a_refusal_nothing_more_is_asked(action: str) -> None:
    answers, _, _ = continued(after(asked(interrupted(a=form("A?"), b=form("B?"))), action=action, content={"n": 1}))
    assert answers == {"a": {"action": "decline" if action == "decline" else "cancel"}, "b": {"action": "cancel"}}


def test_a_page_to_visit_is_shown_only_with_a_safe_address() -> None:
    def page(url: object) -> dict[str, Any]:
        return interrupted(a={"method": "elicitation/create", "params": {"mode": "url", "message": "m", "url": url}})

    assert asked(page("https://example.com/login")).request["url"] == "https://example.com/login"
    for url in ("javascript:alert(1)", "http://example.com", "https://example.com/\n", None, "https://" + "x" * 5000):
        with pytest.raises(ToolError, match="docs"):
            question_of(page(url), TARGET, 0)


@pytest.mark.parametrize(
    "result",
    [
        interrupted(),
        {"resultType": "input_required", "requestState": "only"},
        {"resultType": "input_required", "inputRequests": "x"},
        interrupted(a={"method": "sampling/createMessage", "params": {"messages": []}}),
        interrupted(a={"method": "roots/list"}),
        interrupted(a="x"),
        interrupted(**{f"q{place}": form("?") for place in range(11)}),
        {**interrupted(a=form("A?")), "requestState": "x" * 300_000},
    ],
    ids=range(8),
)
def test_what_cannot_be_asked_ends_the_call(result: dict[str, Any]) -> None:
    with pytest.raises(ToolError, match="docs"):
        question_of(result, TARGET, 0)


def test_a_server_cannot_ask_for_ever() -> None:
    with pytest.raises(ToolError, match="too often"):
        question_of(interrupted(a=form("A?")), TARGET, MAX_ROUNDS)
