"""Messages into a session, messages out of it, results of client-side tools, and cancel."""

from __future__ import annotations

from typing import Annotated, Literal

from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from api.problems import declared
from api.services import Services
from db.messages import NewMessage
from domain.conversation import messages_of
from domain.errors import InvalidInput
from domain.ids import DEFAULT_ORG_ID, Prefix, parse_id
from domain.messages import Controls, Delivery, ExternalActor, InputPart, Message
from domain.resources import SessionStatus
from domain.tools import ClientToolResult

MESSAGE_TYPES = ("input.message", "output.message.completed", "tool.completed")
PAGE_EVENTS = 1_000
MAX_PARTS = 100
MAX_TOOL_RESULTS = 250


class InputMessageBody(Struct, frozen=True, kw_only=True):
    """What the user says: text and images. Only users write messages; agents and tools answer."""

    content: Annotated[list[InputPart], Meta(min_length=1, max_length=MAX_PARTS)]
    role: Literal["user"] = "user"


class CreateMessage(Struct, frozen=True, kw_only=True):
    """`delivery` says what the message does to a turn that is already running; see the guide to messages."""

    message: InputMessageBody
    controls: Controls | None = None
    metadata: dict[str, object] | None = None
    tags: list[str] | None = None
    external_actor: ExternalActor | None = None
    addressed_participant_id: str | None = None
    delivery: Delivery = Delivery.STEER


class MessageList(Struct, frozen=True, kw_only=True):
    data: list[Message]


class SubmitToolResults(Struct, frozen=True, kw_only=True):
    tool_results: Annotated[list[ClientToolResult], Meta(max_length=MAX_TOOL_RESULTS)]


class ToolResultsAccepted(Struct, frozen=True, kw_only=True):
    accepted: int
    status: str


class CancelRequest(Struct, frozen=True, kw_only=True):
    reason: Annotated[str, Meta(max_length=1_000)] | None = None


class CancelResult(Struct, frozen=True, kw_only=True):
    """`cancelled` when a turn ran or waited, or tasks did, `no_op` otherwise. They end a moment later; their events tell."""

    status: Literal["cancelled", "no_op"]
    message: str


@post("/messages", operation_id="create_message", summary="Send a message", responses=declared(409, 413))
async def create_message(
    session_id: FromPath[str], data: JSONBody[CreateMessage], services: NamedDependency[Services]
) -> Message:
    """Store a user message and start a turn, or steer the running one. Answers as soon as the message is stored."""
    parse_id(Prefix.SESSION, session_id)
    if data.addressed_participant_id is not None:
        raise InvalidInput("This session has no other participants to address", field="addressed_participant_id")
    if data.metadata is not None:
        services.check_message_metadata(data.metadata)
    posted = await services.messages.post(
        DEFAULT_ORG_ID,
        session_id,
        NewMessage(
            content=data.message.content,
            delivery=data.delivery,
            controls=data.controls,
            metadata=data.metadata,
            external_actor=data.external_actor,
            tags=data.tags,
        ),
    )
    # The message is safe. If the engine can't be told right now, the reconciler tells it.
    services.background.start(
        services.turns.wake(
            session_id,
            message_id=posted.message.id,
            delivery=data.delivery,
            running=posted.steered,
            ends_wait=posted.ends_wait,
            labels=posted.labels,
        ),
        "wake turn",
    )
    return posted.message


@get("/messages", operation_id="list_messages", summary="List messages", responses=declared())
async def list_messages(session_id: FromPath[str], services: NamedDependency[Services]) -> MessageList:
    """Every message of the session in the order of the log: user, agent and tool results. Those before a rewind are left out."""
    await services.messages.require(DEFAULT_ORG_ID, session_id)
    messages: list[Message] = []
    cursor = 0
    while True:
        page = await services.log.read_visible(
            session_id, after_sequence=cursor, limit=PAGE_EVENTS, types=MESSAGE_TYPES
        )
        messages.extend(messages_of(page))
        if len(page) < PAGE_EVENTS:
            return MessageList(data=messages)
        cursor = page[-1].sequence


@post(
    "/tool-results",
    operation_id="submit_tool_results",
    summary="Return results of client-side tools",
    status_code=200,
    responses=declared(409, 413),
)
async def submit_tool_results(
    session_id: FromPath[str], data: JSONBody[SubmitToolResults], services: NamedDependency[Services]
) -> ToolResultsAccepted:
    """Results or errors of the calls of a `tool.call_requested` event. Calls left out are told to the model as interrupted.

    While a question of `ask_user` is open the session goes on waiting, and calls left out may still be returned.
    """
    parse_id(Prefix.SESSION, session_id)
    settled = await services.messages.submit_tool_results(DEFAULT_ORG_ID, session_id, data.tool_results)
    if settled.ends_wait:
        services.background.start(services.turns.tool_results(session_id, settled.call_ids), "deliver tool results")
    status = SessionStatus.ACTIVE if settled.ends_wait else SessionStatus.WAITING_FOR_TOOL_RESULTS
    return ToolResultsAccepted(accepted=len(settled.call_ids), status=status)


@post(
    "/cancel",
    operation_id="cancel_session",
    summary="Cancel the running turn",
    status_code=200,
    responses=declared(413, 503),
)
async def cancel_session(
    session_id: FromPath[str],
    services: NamedDependency[Services],
    data: JSONBody[CancelRequest | None] = None,
) -> CancelResult:
    """Stop the running turn: its model call and tools are stopped, the session is idle and usable afterwards.

    All its sub-agents are stopped with it, those in the background too, whether or not a turn runs here.
    """
    cursor = await services.messages.cancel_cursor(DEFAULT_ORG_ID, session_id)
    if cursor is not None:
        await services.turns.cancel(session_id, data.reason if data else None, read_up_to=cursor)
    tasks = await services.tasks.stop_below(session_id, reason="the session was cancelled")
    if cursor is not None:
        return CancelResult(status="cancelled", message="The turn is being cancelled")
    if tasks:
        return CancelResult(status="cancelled", message="The session's tasks are being cancelled")
    return CancelResult(status="no_op", message="No turn is running")


router = Router(
    path="/sessions/{session_id:str}",
    route_handlers=[create_message, list_messages, submit_tool_results, cancel_session],
    tags=["Messages"],
)
