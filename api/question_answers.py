"""Answers to the questions that `ask_user` asks. They end the call the way a client's tool results end theirs."""

from __future__ import annotations

from typing import Annotated

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from api.problems import declared
from api.services import Services
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.questions import MAX_QUESTIONS, AnswerStatus, AnswerSubmission, QuestionAnswer
from domain.resources import SessionStatus


class AnswerQuestions(Struct, frozen=True, kw_only=True):
    """Answers to every question of one call, or none when the user declines. `tool_call_id` is needed when several calls wait."""

    status: AnswerStatus
    answers: Annotated[list[QuestionAnswer], Meta(max_length=MAX_QUESTIONS)] = []
    tool_call_id: str | None = None


class QuestionsAnswered(Struct, frozen=True, kw_only=True):
    """`status` is the session's: it goes on waiting while other questions or client-side tools are open."""

    tool_call_id: str
    status: SessionStatus


@post(
    "/question-answers",
    operation_id="answer_questions",
    summary="Answer the model's questions",
    status_code=200,
    responses=declared(409, 413),
)
async def answer_questions(
    session_id: FromPath[str], data: JSONBody[AnswerQuestions], services: NamedDependency[Services]
) -> QuestionsAnswered:
    """Answer or decline the questions of a `tool.call_requested` event. Sending the same answer again is harmless."""
    parse_id(Prefix.SESSION, session_id)
    settled = await services.messages.answer_questions(
        DEFAULT_ORG_ID,
        session_id,
        AnswerSubmission(status=data.status, answers=data.answers),
        tool_call_id=data.tool_call_id,
    )
    if settled.ends_wait:
        services.background.start(services.turns.tool_results(session_id, settled.call_ids), "deliver answers")
    status = SessionStatus.ACTIVE if settled.ends_wait else SessionStatus.WAITING_FOR_TOOL_RESULTS
    return QuestionsAnswered(tool_call_id=settled.call_ids[0], status=status)


router = Router(path="/sessions/{session_id:str}", route_handlers=[answer_questions], tags=["Messages"])
