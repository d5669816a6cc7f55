"""`loop_detection`: repetitions with the same result are refused, and nothing else is."""

from __future__ import annotations

import pytest

from activities.capabilities.loop_detection import REFUSED, LoopDetection, check_call
from domain.capabilities import CallCheck
from domain.messages import ContentPart, Message, Role, TextPart, ToolCallPart, ToolResultPart
from domain.tools import ToolCall

Step = tuple[str, str]
"""What was called, with its only argument, and what it returned."""

USER = Message(id="", role=Role.USER, content=[TextPart(text="hi")], created_at="")


def history(*steps: Step) -> list[Message]:
    messages = [USER]
    for number, (name, result) in enumerate(steps):
        call = ToolCallPart(id=f"call_{number}", name=name.partition(":")[0], arguments={"x": name})
        refused = result.startswith(REFUSED)
        answer: ContentPart = ToolResultPart(
            tool_call_id=call.id, result=None if refused else result, error=result if refused else None
        )
        messages.append(Message(id="", role=Role.AGENT, content=[call], created_at=""))
        messages.append(Message(id="", role=Role.TOOL_RESULT, content=[answer], created_at=""))
    return messages


def refused(
    name: str, *steps: Step, config: LoopDetection | None = None, earlier: int = 0, before: list[Message] | None = None
) -> bool:
    call = ToolCall(id="new", name=name.partition(":")[0], arguments={"x": name})
    check = CallCheck(
        call=call,
        tool=None,
        capability_id=None,
        earlier=[call] * earlier,
        history=[*(before or []), *history(*steps)],
    )
    return check_call(check, config or LoopDetection()) is not None


A, B, C = ("a", "same"), ("b", "other"), ("c", "third")


def test_a_call_with_the_same_result_is_refused_after_the_threshold() -> None:
    assert not refused("a", A, A)
    assert refused("a", A, A, A)
    assert refused("a", C, B, A, A, A)
    assert not refused("a", A, A, A, config=LoopDetection(threshold=4))


@pytest.mark.parametrize(
    "steps",
    [
        [A, ("a", "new"), A],
        [("a", "1"), ("a", "2"), ("a", "3")],
        [("a:1", "same"), ("a:2", "same"), ("a:3", "same")],
        [A, A, B, A],
        [],
    ],
)
def test_what_changes_anything_goes_on(steps: list[Step]) -> None:
    assert not refused("a", *steps)


def test_a_refused_call_is_refused_again_until_something_else_is_done() -> None:
    told = ("a", f"{REFUSED}. It …")
    assert refused("a", A, A, A, told)
    assert refused("a", A, A, A, told, told, told, told)
    assert not refused("b", A, A, A, told)
    assert not refused("a", A, A, A, told, B)


def test_two_and_three_calls_in_turn_are_found() -> None:
    assert refused("a", A, B, A, B, A, B)
    assert not refused("b", A, B, A, B, A, B)
    assert not refused("a", A, B, A, B)
    assert not refused("a", A, B, A, ("b", "new"), A, B)
    assert refused("a", A, B, C, A, B, C, A, B, C)


def test_the_same_call_many_times_in_one_answer_is_a_repetition() -> None:
    assert not refused("a", earlier=2)
    assert refused("a", earlier=3)
    assert refused("a", A, A, earlier=1)


def test_an_earlier_turn_does_not_count() -> None:
    assert not refused("a", A, before=history(A, A, A))


def test_some_tools_may_be_repeated() -> None:
    assert not refused("wait_task", *[("wait_task", "not yet")] * 9)
    assert not refused("a", A, A, A, config=LoopDetection(exempt=["a*"]))
