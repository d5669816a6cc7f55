"""Questions of a model and the answers to them: which are accepted, and what the model is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from activities.capabilities.ask_user import CAPABILITY
from activities.capabilities.assembly import planned
from activities.capabilities.registry import ResolvedCapabilities, builtin_registry
from domain.capabilities import Capability, Tool, ToolContext
from domain.config import CapabilityRef, TurnConfig
from domain.errors import InvalidInput
from domain.questions import (
    ASK_USER,
    MAX_QUESTIONS,
    AnswerStatus,
    AnswerSubmission,
    QuestionAnswer,
    QuestionSet,
    answer_to,
    asked_by,
)
from domain.tools import SideEffect, ToolCall
from domain.turns import PlannedCall

Json = dict[str, Any]


def options(*labels: str) -> list[Json]:
    return [{"label": label} for label in labels]


def question(text: str = "Which one?", *labels: str, **fields: object) -> Json:
    return {"question": text, "options": options(*(labels or ("A", "B"))), **fields}


def call(*questions: Json, name: str = ASK_USER) -> ToolCall:
    return ToolCall(id="call_1", name=name, arguments={"questions": list(questions)})


def asked(*questions: Json) -> QuestionSet:
    found = asked_by(call(*questions))
    assert found is not None
    return found


def resolved() -> ResolvedCapabilities:
    return builtin_registry().resolve([CapabilityRef(ref="ask_user")])


def plan(tool_call: ToolCall, problem: str | None = None) -> PlannedCall:
    return planned(tool_call, resolved(), TurnConfig(), problem=problem)


# Asking


def test_questions_without_an_id_get_one_that_no_other_has():
    found = asked(question(), question(id="q1"), question(), question(id="size"))
    assert [one.id for one in found.questions] == ["q2", "q1", "q3", "size"]


def test_the_same_call_is_always_read_as_the_same_questions():
    assert asked(question(), question()) == asked(question(), question())


def test_a_call_of_another_tool_asks_nothing():
    assert asked_by(call(question(), name="add")) is None


def test_a_well_formed_call_is_the_user_s_to_answer():
    found = plan(call(question(header="Size", multi_select=True)))
    assert (found.kind, found.problem, found.side_effect) == ("client", None, SideEffect.AT_MOST_ONCE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "questions"),
        ({"questions": []}, "`questions`"),
        ({"questions": [question() for _ in range(MAX_QUESTIONS + 1)]}, "`questions`"),
        ({"questions": [question("Sure?", "Yes")]}, "`questions[0].options`"),
        ({"questions": [question("?", *"ABCDEFG")]}, "`questions[0].options`"),
        ({"questions": [question("?", "A", "A")]}, "must differ"),
        ({"questions": [question("  ", "A", "B")]}, "blank"),
        ({"questions": [question("?", "A", " ")]}, "blank"),
        ({"questions": [question(id="x"), question(id="x")]}, "ids of questions must differ"),
        ({"questions": [{"question": "?", "options": ["A", "B"]}]}, "`questions[0].options[0]`"),
        ({"questions": [question(multiSelect=True)]}, "multiSelect"),
        ({"questions": "Which one?"}, "`questions`"),
    ],
)
def test_malformed_questions_reach_the_model_and_not_the_user(arguments: Json, told: str):
    found = plan(ToolCall(id="call_1", name=ASK_USER, arguments=arguments))
    assert found.kind == "server"
    assert found.problem is not None
    assert told in found.problem
    assert "ask_user" in found.problem
    assert asked_by(found.call) is None


def test_what_was_wrong_with_unreadable_arguments_is_kept():
    found = plan(call(question()), problem="cut off in the middle")
    assert (found.kind, found.problem) == ("server", "cut off in the middle")


def test_only_tools_that_say_so_are_answered_by_the_user():
    async def run(_context: ToolContext, _arguments: msgspec.Struct) -> str:
        return ""

    registry = builtin_registry()
    tool = Tool(name="confirm", description="", arguments=CAPABILITY.tools[0].arguments, run=run, answered_by="user")
    registry.register(Capability(id="confirm", name="Confirm", description="", tools=(tool,)))
    found = registry.resolve([CapabilityRef(ref="confirm"), CapabilityRef(ref="test_math")])
    calls: dict[str, Json] = {"confirm": {"questions": [question()]}, "add": {"a": 1, "b": 2}}
    kinds = {
        name: planned(ToolCall(id="c", name=name, arguments=arguments), found, TurnConfig()).kind
        for name, arguments in calls.items()
    }
    assert kinds == {"confirm": "client", "add": "server"}
    policies = {one.tool.name: one.definition.policy for one in found.tools}
    assert (policies["confirm"], policies["add"]) == ("client_side", "auto")


def test_a_model_is_offered_a_schema_with_all_limits():
    (tool,) = resolved().tools
    questions: Any = tool.definition.parameters["properties"]
    item = questions["questions"]["items"]
    assert (questions["questions"]["minItems"], questions["questions"]["maxItems"]) == (1, 4)
    assert (item["properties"]["options"]["minItems"], item["properties"]["options"]["maxItems"]) == (2, 6)
    assert set(item["required"]) == {"question", "options"}
    assert item["additionalProperties"] is False


# Answering

SET = asked(
    question("Which size?", "S", "M", id="size"), question("Which toppings?", "Basil", "Olives", multi_select=True)
)


def submission(*answers: Json, status: AnswerStatus = "answered") -> AnswerSubmission:
    return AnswerSubmission(status=status, answers=msgspec.convert(answers, list[QuestionAnswer]))


def test_the_model_reads_the_answers_in_the_order_of_its_questions():
    given = submission({"id": "q1", "selected": ["Olives", "Basil"]}, {"id": "size", "other_text": "XL, please"})
    assert msgspec.to_builtins(answer_to(SET, given)) == {
        "status": "answered",
        "answers": [
            {"id": "size", "question": "Which size?", "selected": [], "other_text": "XL, please"},
            {"id": "q1", "question": "Which toppings?", "selected": ["Olives", "Basil"]},
        ],
    }


def test_a_label_and_own_words_go_together():
    given = submission({"id": "size", "selected": ["S"], "other_text": "or M"}, {"id": "q1", "selected": ["Basil"]})
    assert answer_to(SET, given).answers[0].other_text == "or M"


def test_declining_needs_no_answers():
    assert msgspec.to_builtins(answer_to(SET, submission(status="declined"))) == {"status": "declined", "answers": []}


SIZE: Json = {"id": "size", "selected": ["S"]}
TOPPINGS: Json = {"id": "q1", "selected": ["Basil"]}


@pytest.mark.parametrize(
    ("answers", "field"),
    [
        ([SIZE], "answers"),
        ([], "answers"),
        ([SIZE, {"id": "q2", "selected": ["Basil"]}], "answers[1].id"),
        ([SIZE, SIZE, TOPPINGS], "answers[1].id"),
        ([{"id": "size", "selected": ["XL"]}, TOPPINGS], "answers[0].selected[0]"),
        ([{"id": "size", "selected": ["s"]}, TOPPINGS], "answers[0].selected[0]"),
        ([{"id": "size", "selected": ["S", "M"]}, TOPPINGS], "answers[0].selected"),
        ([SIZE, {"id": "q1", "selected": ["Basil", "Basil"]}], "answers[1].selected[1]"),
        ([SIZE, {"id": "q1"}], "answers[1]"),
        ([SIZE, {"id": "q1", "other_text": " \n"}], "answers[1]"),
        ([SIZE, {"id": "q1", "other_text": "a\0b"}], "answers[1].other_text"),
    ],
)
def test_an_answer_that_does_not_fit_names_the_field(answers: list[Json], field: str):
    with pytest.raises(InvalidInput) as refused:
        answer_to(SET, submission(*answers))
    assert refused.value.field == field
    assert field in refused.value.message


def test_who_declines_answers_nothing():
    with pytest.raises(InvalidInput) as refused:
        answer_to(SET, submission(SIZE, TOPPINGS, status="declined"))
    assert refused.value.field == "answers"
