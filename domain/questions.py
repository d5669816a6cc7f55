"""Questions a model asks its user, and what makes an answer to them acceptable.

A question set is the arguments of a call of `ask_user`, and the call's result is the answer. Nothing else is stored: what was
asked is read from the call again when an answer comes, so the two can't disagree. A client's own tool of that name, called with
the same arguments, is answered the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from domain.errors import InvalidInput
from domain.tools import ToolCall

ASK_USER: Final = "ask_user"
"""Name of the tool."""

MAX_QUESTIONS: Final = 4
"""More is a form, which nobody fills in while a turn waits."""

MAX_SELECTED: Final = 6
MAX_ID_CHARACTERS: Final = 64
MAX_OTHER_TEXT_CHARACTERS: Final = 10_000

AnswerStatus = Literal["answered", "declined"]


class QuestionOption(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    label: Annotated[
        str,
        Meta(min_length=1, max_length=200, description="What the user picks: one to five words, unlike the others."),
    ]
    description: (
        Annotated[str, Meta(max_length=1_000, description="What picking it means, if the label does not say so.")]
        | None
    ) = None


class Question(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    question: Annotated[str, Meta(min_length=1, max_length=2_000, description="A whole sentence that can be answered.")]
    options: Annotated[
        list[QuestionOption],
        Meta(
            min_length=2,
            max_length=MAX_SELECTED,
            description="Do not add one for other answers: the user can always write their own.",
        ),
    ]
    id: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=MAX_ID_CHARACTERS,
                description="Name of this question in the answer. Default: q1, q2 and so on.",
            ),
        ]
        | None
    ) = None
    header: Annotated[str, Meta(max_length=80, description="One or two words above the question.")] | None = None
    multi_select: Annotated[bool, Meta(description="Whether several options may be picked. Default: false.")] = False

    def __post_init__(self) -> None:
        labels = [option.label for option in self.options]
        if len(set(labels)) < len(labels):
            raise ValueError("The labels of a question's options must differ")
        if not self.question.strip() or not all(label.strip() for label in labels):
            raise ValueError("Questions and labels must not be blank")


class AskUser(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    questions: Annotated[list[Question], Meta(min_length=1, max_length=MAX_QUESTIONS)]

    def __post_init__(self) -> None:
        ids = [question.id for question in self.questions if question.id is not None]
        if len(set(ids)) < len(ids):
            raise ValueError("The ids of questions must differ")


class AskedQuestion(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A question as clients see it: with an id, whether or not the model gave it one."""

    id: str
    question: str
    options: list[QuestionOption]
    multi_select: bool
    header: str | None = None

    def label_allowed(self, label: str) -> bool:
        return any(option.label == label for option in self.options)


class QuestionSet(Struct, frozen=True, kw_only=True):
    """The questions of one call. They are answered together."""

    tool_call_id: str
    questions: list[AskedQuestion]


class QuestionAnswer(Struct, frozen=True, kw_only=True):
    """Labels of options, the user's own words, or both."""

    id: Annotated[str, Meta(max_length=MAX_ID_CHARACTERS)]
    selected: Annotated[list[str], Meta(max_length=MAX_SELECTED)] = []
    other_text: Annotated[str, Meta(max_length=MAX_OTHER_TEXT_CHARACTERS)] | None = None


class AnswerSubmission(Struct, frozen=True, kw_only=True):
    """What the user says to one question set."""

    status: AnswerStatus
    answers: Sequence[QuestionAnswer] = ()


class GivenAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    question: str
    selected: list[str]
    other_text: str | None = None


class AskUserResult(Struct, frozen=True, kw_only=True):
    """What the model reads."""

    status: AnswerStatus
    answers: list[GivenAnswer]


def asked_by(call: ToolCall) -> QuestionSet | None:
    """The questions of a call; None when it is a call of something else."""
    if call.name != ASK_USER:
        return None
    try:
        asked = msgspec.convert(call.arguments, AskUser)
    except msgspec.ValidationError:
        return None
    taken = {question.id for question in asked.questions if question.id is not None}
    free = (name for number in range(1, 2 * MAX_QUESTIONS + 1) if (name := f"q{number}") not in taken)
    return QuestionSet(
        tool_call_id=call.id,
        questions=[
            AskedQuestion(
                id=question.id or next(free),
                question=question.question,
                options=question.options,
                multi_select=question.multi_select,
                header=question.header,
            )
            for question in asked.questions
        ],
    )


def answer_to(asked: QuestionSet, given: AnswerSubmission) -> AskUserResult:
    """The call's result, its answers in the order of the questions. Raises `InvalidInput`, which names the field."""
    if given.status == "declined":
        if given.answers:
            raise InvalidInput("`answers` must be empty when the questions are declined", field="answers")
        return AskUserResult(status="declined", answers=[])
    questions = {question.id: question for question in asked.questions}
    answers: dict[str, GivenAnswer] = {}
    for index, answer in enumerate(given.answers):
        field = f"answers[{index}]"
        question = questions.get(answer.id)
        if question is None:
            raise InvalidInput(f"{field}.id: there is no question `{answer.id}`", field=f"{field}.id")
        if answer.id in answers:
            raise InvalidInput(f"{field}.id: question `{answer.id}` is answered twice", field=f"{field}.id")
        answers[answer.id] = _answer(question, answer, field)
    missing = [question_id for question_id in questions if question_id not in answers]
    if missing:
        raise InvalidInput(f"`answers` leaves out: {', '.join(missing)}", field="answers")
    return AskUserResult(status="answered", answers=[answers[question_id] for question_id in questions])


def _answer(question: AskedQuestion, given: QuestionAnswer, field: str) -> GivenAnswer:
    for index, label in enumerate(given.selected):
        place = f"{field}.selected[{index}]"
        if not question.label_allowed(label):
            raise InvalidInput(f"{place}: question `{question.id}` has no option `{label[:200]}`", field=place)
        if label in given.selected[:index]:
            raise InvalidInput(f"{place}: `{label}` is selected twice", field=place)
    if len(given.selected) > 1 and not question.multi_select:
        raise InvalidInput(
            f"{field}.selected: question `{question.id}` takes one option only", field=f"{field}.selected"
        )
    other = given.other_text or ""
    if "\0" in other:
        raise InvalidInput(f"{field}.other_text must not contain U+0000", field=f"{field}.other_text")
    if not given.selected and not other.strip():
        raise InvalidInput(f"{field}: select an option or give `other_text`", field=field)
    return GivenAnswer(
        id=question.id,
        question=question.question,
        selected=list(given.selected),
        other_text=other if other.strip() else None,
    )
