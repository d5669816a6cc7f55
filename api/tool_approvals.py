"""Decisions about tool calls that may not run without one. A turn that waits for them costs nothing, for days."""

from __future__ import annotations

from typing import Annotated

from litestar import Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from api.problems import declared
from api.services import Services
from domain.approvals import MAX_DECISIONS, ApprovalDecision, ApprovalRule, PendingApproval, ResolvedApproval
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.resources import SessionStatus


class SubmitApprovals(Struct, frozen=True, kw_only=True):
    """All of them take effect, or, when one is refused, none."""

    decisions: Annotated[list[ApprovalDecision], Meta(max_length=MAX_DECISIONS)]


class ApprovalsResolved(Struct, frozen=True, kw_only=True):
    """`status` is the session's: it goes on waiting while a person has something left to decide."""

    resolved: list[ResolvedApproval]
    status: SessionStatus


class ApprovalList(Struct, frozen=True, kw_only=True):
    """`data` are the calls that wait; `rules` are the decisions that hold for the rest of the session."""

    data: list[PendingApproval]
    rules: list[ApprovalRule]


@get(operation_id="list_tool_approvals", summary="List calls that wait for a decision", responses=declared())
async def list_tool_approvals(session_id: FromPath[str], services: NamedDependency[Services]) -> ApprovalList:
    """With their arguments, and the lasting decisions made before."""
    parse_id(Prefix.SESSION, session_id)
    pending, rules = await services.messages.approvals(DEFAULT_ORG_ID, session_id)
    return ApprovalList(data=pending, rules=rules)


@post(
    operation_id="submit_tool_approvals",
    summary="Allow or reject tool calls",
    status_code=200,
    responses=declared(409, 413),
)
async def submit_tool_approvals(
    session_id: FromPath[str], data: JSONBody[SubmitApprovals], services: NamedDependency[Services]
) -> ApprovalsResolved:
    """The turn goes on when nothing is left to decide. Sending the same decision again is harmless."""
    parse_id(Prefix.SESSION, session_id)
    decided = await services.messages.decide_approvals(DEFAULT_ORG_ID, session_id, data.decisions)
    if decided.ends_wait:
        services.background.start(services.turns.tool_results(session_id, decided.wake_ids), "deliver approvals")
    status = SessionStatus.WAITING_FOR_TOOL_RESULTS if decided.waits else SessionStatus.IDLE
    return ApprovalsResolved(resolved=decided.resolved, status=SessionStatus.ACTIVE if decided.ends_wait else status)


@delete(
    "/rules/{tool:str}",
    operation_id="delete_tool_approval_rule",
    summary="Take back a lasting decision",
    responses=declared(),
)
async def delete_tool_approval_rule(
    session_id: FromPath[str], tool: FromPath[str], services: NamedDependency[Services]
) -> None:
    """The next call of the tool waits for a decision again."""
    parse_id(Prefix.SESSION, session_id)
    await services.messages.drop_approval_rule(DEFAULT_ORG_ID, session_id, tool)


router = Router(
    path="/sessions/{session_id:str}/tool-approvals",
    route_handlers=[list_tool_approvals, submit_tool_approvals, delete_tool_approval_rule],
    tags=["Messages"],
)
