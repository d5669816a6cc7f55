"""`/v1/sessions/{session_id}/tasks` and `/v1/tasks`: what goes on beside a session's turn."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import Meta, Struct

from api.problems import declared
from api.services import Services
from db import task_admin
from domain.errors import InvalidInput
from domain.ids import DEFAULT_ORG_ID
from domain.tasks import (
    MESSAGE_MAX_CHARACTERS,
    SessionTask,
    SessionTaskDetail,
    TaskMessage,
    TaskMessagePart,
    TaskState,
    TaskTextPart,
)

MAX_PARTS: Final = 100
MAX_LISTED: Final = 1_000
MAX_LIMIT: Final = 100

# Litestar keeps the name `state` of a handler's parameter to itself, and would name ours in its errors: checked here instead.
StateFilter = Annotated[
    str | None,
    QueryParameter(name="state", description=f"Only tasks in this state: {', '.join(TaskState)}."),
]
KindFilter = Annotated[str | None, QueryParameter(name="kind", description="Only tasks of this kind (`subagent`).")]


class PostTaskMessage(Struct, frozen=True, kw_only=True):
    """Either `text` or `content`. With `in_reply_to`, the answer to what the task waits for."""

    text: Annotated[str, Meta(min_length=1, max_length=MESSAGE_MAX_CHARACTERS)] | None = None
    content: Annotated[list[TaskMessagePart], Meta(min_length=1, max_length=MAX_PARTS)] | None = None
    in_reply_to: str | None = None

    def parts(self) -> list[TaskMessagePart]:
        """Raises `InvalidInput`."""
        if (self.text is None) is (self.content is None):
            raise InvalidInput("Give either `text` or `content`", field="text" if self.text is None else "content")
        return [TaskTextPart(text=self.text)] if self.text is not None else self.content or []


def _state(name: str | None) -> TaskState | None:
    """Raises `InvalidInput`."""
    try:
        return None if name is None else TaskState(name)
    except ValueError:
        raise InvalidInput(f"state must be one of {', '.join(TaskState)}", field="state") from None


@get("/", operation_id="list_session_tasks", summary="List a session's tasks", responses=declared())
async def list_session_tasks(
    services: NamedDependency[Services],
    session_id: FromPath[str],
    in_state: StateFilter = None,
    kind: KindFilter = None,
) -> list[SessionTask]:
    """Newest first, at most 1,000."""
    return await task_admin.list_tasks(
        services.tasks, DEFAULT_ORG_ID, session_id=session_id, state=_state(in_state), kind=kind, limit=MAX_LISTED
    )


@get("/{task_id:str}", operation_id="get_session_task", summary="Get a task", responses=declared())
async def get_session_task(
    services: NamedDependency[Services],
    session_id: FromPath[str],
    task_id: FromPath[str],
    after_id: Annotated[
        str | None, QueryParameter(name="after_id", description="A message (`tmsg_…`): only those after it.")
    ] = None,
    limit: Annotated[
        int, QueryParameter(ge=1, description=f"Messages; more than {MAX_LIMIT} is read as {MAX_LIMIT}.")
    ] = 50,
) -> SessionTaskDetail:
    """With the newest messages of its thread, oldest first."""
    return await task_admin.get_task(
        services.tasks, DEFAULT_ORG_ID, session_id, task_id, after_id=after_id, limit=min(limit, MAX_LIMIT)
    )


@post(
    "/{task_id:str}/cancel",
    operation_id="cancel_session_task",
    summary="Cancel a task",
    status_code=200,
    responses=declared(413),
)
async def cancel_session_task(
    services: NamedDependency[Services], session_id: FromPath[str], task_id: FromPath[str]
) -> SessionTask:
    """And everything below it. A running sub-agent ends a moment later; an event tells. No harm to one that has ended."""
    return await task_admin.cancel_task(services.tasks, DEFAULT_ORG_ID, session_id, task_id)


@post(
    "/{task_id:str}/messages",
    operation_id="post_session_task_message",
    summary="Send a message to a task",
    status_code=200,
    responses=declared(409, 413),
)
async def post_session_task_message(
    services: NamedDependency[Services],
    session_id: FromPath[str],
    task_id: FromPath[str],
    data: JSONBody[PostTaskMessage],
) -> TaskMessage:
    """A running sub-agent reads it at its next step; one that has ended goes to work again."""
    content = data.parts()
    if data.in_reply_to is None:
        return await task_admin.send(services.tasks, DEFAULT_ORG_ID, session_id, task_id, content)
    return await task_admin.answer(
        services.tasks,
        services.messages,
        services.turns,
        DEFAULT_ORG_ID,
        session_id,
        task_id,
        content,
        in_reply_to=data.in_reply_to,
    )


@get(
    "/tasks",
    operation_id="list_org_tasks",
    summary="List the organization's tasks",
    tags=["Tasks"],
    responses=declared(),
)
async def list_org_tasks(
    services: NamedDependency[Services],
    in_state: StateFilter = None,
    kind: KindFilter = None,
    created_after: Annotated[
        datetime | None, QueryParameter(name="created_after", description="Only tasks that are younger.")
    ] = None,
    root_session_id: Annotated[
        str | None,
        QueryParameter(name="root_session_id", description="Only tasks in the tree of this session."),
    ] = None,
    limit: Annotated[
        int, QueryParameter(ge=1, description=f"Items; more than {MAX_LIMIT} is read as {MAX_LIMIT}.")
    ] = 50,
) -> list[SessionTask]:
    """Of all sessions, newest first."""
    return await task_admin.list_tasks(
        services.tasks,
        DEFAULT_ORG_ID,
        state=_state(in_state),
        kind=kind,
        created_after=created_after,
        root_session_id=root_session_id,
        limit=min(limit, MAX_LIMIT),
    )


router = Router(
    "/sessions/{session_id:str}/tasks",
    tags=["Tasks"],
    route_handlers=[list_session_tasks, get_session_task, cancel_session_task, post_session_task_message],
)
