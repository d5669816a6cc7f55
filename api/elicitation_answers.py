"""Answers to what an MCP server asks in the middle of a call. The turn that waits for one costs nothing, for days."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec
from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Struct

from activities.capabilities.json_schema import schema_problem
from api.problems import declared
from api.services import Services
from domain.errors import InputTooLarge, InvalidInput
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.resources import SessionStatus

CONTENT_MAX_BYTES: Final = 64 * 1024


class AnswerElicitation(Struct, frozen=True, kw_only=True):
    """`content` comes with `accept` only and fits the requested schema. `tool_call_id` is needed when several calls wait.

    `decline` tells the server no; `cancel` that there will be no answer.
    """

    action: Literal["accept", "decline", "cancel"]
    content: dict[str, object] | None = None
    tool_call_id: str | None = None


class ElicitationAnswered(Struct, frozen=True, kw_only=True):
    """`status` is the session's: it goes on waiting while something else is open."""

    tool_call_id: str
    status: SessionStatus


@post(
    "/elicitation-answers",
    operation_id="answer_elicitation",
    summary="Answer an MCP server's question",
    status_code=200,
    responses=declared(409, 413),
)
async def answer_elicitation(
    session_id: FromPath[str], data: JSONBody[AnswerElicitation], services: NamedDependency[Services]
) -> ElicitationAnswered:
    """Answer the `elicitation` of a `tool.call_requested` event. Sending the same answer again is harmless."""
    parse_id(Prefix.SESSION, session_id)
    answer: dict[str, object] = {"action": data.action}
    if data.action == "accept" and data.content is not None:
        answer["content"] = data.content
    settled = await services.messages.answer_elicitation(
        DEFAULT_ORG_ID, session_id, data.tool_call_id, answer, lambda request: _check(data, request)
    )
    if settled.ends_wait:
        services.background.start(services.turns.tool_results(session_id, settled.wake_ids), "deliver answers")
    status = SessionStatus.WAITING_FOR_TOOL_RESULTS if settled.waits else SessionStatus.IDLE
    return ElicitationAnswered(
        tool_call_id=settled.call_id, status=SessionStatus.ACTIVE if settled.ends_wait else status
    )


def _check(data: AnswerElicitation, request: Mapping[str, object]) -> None:
    if data.action != "accept":
        if data.content is not None:
            raise InvalidInput("content goes with the action `accept` only", field="content")
        return
    schema = request.get("requested_schema")
    if not isinstance(schema, dict):
        if data.content:
            raise InvalidInput("The server asked for a page to be opened, not for content", field="content")
        return
    if len(msgspec.json.encode(data.content)) > CONTENT_MAX_BYTES:
        raise InputTooLarge(f"content may hold {CONTENT_MAX_BYTES} bytes", field="content")
    problem = schema_problem(schema, data.content or {})
    if problem is not None:
        raise InvalidInput(f"content does not fit the requested schema: {problem}", field="content")
    for name, value in (data.content or {}).items():
        if not (value is None or isinstance(value, str | int | float | bool) or _is_texts(value)):
            raise InvalidInput("content may hold texts, numbers, booleans and lists of texts", field=f"content.{name}")


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


router = Router(path="/sessions/{session_id:str}", route_handlers=[answer_elicitation], tags=["Messages"])
