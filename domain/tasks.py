"""Tasks: work that goes on beside a session's turn. Today that is a sub-agent, a child session with turns of its own.

A task belongs to the session that began it, its parent. Its row follows the child: `running` while a turn is at work or about to
be, `awaiting_input` while the child waits for a person or a client, and one of the three last states when the child rests with
nothing left to do. Time-outs are errors of a `failed` task, and a wish to cancel is a flag: the task ends when its child has.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Literal, Protocol

from msgspec import Struct

SUBAGENTS: Final = "subagents"
"""Id of the capability that spawns; a session at the greatest depth is not offered it."""

SPAWN_AGENT: Final = "spawn_agent"
"""Name of the tool: a call of it that ends before its foreground child cancels the child."""

SUBAGENT_KIND: Final = "subagent"
TASK_SOURCE: Final = "task"
"""`external_actor.source` of messages that a task wrote into its parent's session."""

SUMMARY_MAX_CHARACTERS: Final = 32_000
"""Of a child's answer: it is read as a tool result or as a message, next to everything else in the parent's context."""

MESSAGE_MAX_CHARACTERS: Final = 32_000


class TaskState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    AWAITING_INPUT = "awaiting_input"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES: Final = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED})


class WakePolicy(StrEnum):
    """What of a background task puts a message into its parent's session, which starts or steers the parent's turn."""

    SILENT = "silent"
    ON_TERMINAL = "on_terminal"
    ON_ACTIVITY = "on_activity"
    """Its end, and each time it begins to wait for input."""


TaskMode = Literal["foreground", "background"]


class TaskError(Struct, frozen=True, kw_only=True):
    """`kind` is `timeout`, `orphaned`, or the error code of the child's turn."""

    kind: str
    message: str


class TaskInputRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a task waits for. `id` is the tool call in the child's session that takes the answer."""

    id: str
    prompt: str
    expected: dict[str, object] | None = None


class TaskLinks(Struct, frozen=True, kw_only=True, omit_defaults=True):
    child_session_id: str | None = None
    remote_task_id: str | None = None
    resource_ids: list[str] = []


class SessionTask(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As served and as told in events. Timestamps are RFC 3339."""

    id: str
    session_id: str
    kind: str
    display_name: str
    state: TaskState
    created_at: str
    updated_at: str
    state_detail: str | None = None
    summary: str | None = None
    spec: dict[str, object] | None = None
    input_request: TaskInputRequest | None = None
    links: TaskLinks | None = None
    error: TaskError | None = None
    wake_policy: WakePolicy | None = None
    attempt: int | None = None
    cancel_requested_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None


class TaskTextPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class TaskDataPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="data"):
    data: dict[str, object]


TaskMessagePart = TaskTextPart | TaskDataPart
TaskDirection = Literal["inbound", "outbound"]


class TaskMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`inbound` goes from the session to the task."""

    id: str
    task_id: str
    direction: TaskDirection
    content: list[TaskMessagePart]
    created_at: str
    in_reply_to: str | None = None


class SessionTaskDetail(Struct, frozen=True, kw_only=True):
    task: SessionTask
    messages: list[TaskMessage]


class TaskLimits(Struct, frozen=True, kw_only=True):
    """What keeps a tree of sub-agents small."""

    max_depth: int = 2
    """Of children below a session that nobody spawned."""
    max_running: int = 20
    """Tasks of one session at a time."""
    foreground_seconds: float = 300.0
    background_seconds: float = 6 * 3600.0


class SpawnRequest(Struct, frozen=True, kw_only=True):
    """`agent` is an id or a name of the organization's agents; None for an agent like the one that spawns.

    `model_id` (`model_…`) overrides the model, `max_iterations` the limit of a turn.
    """

    name: str
    instructions: str
    mode: TaskMode = "background"
    agent: str | None = None
    model_id: str | None = None
    max_iterations: int | None = None
    own_workspace: bool = False
    wake_policy: WakePolicy = WakePolicy.ON_TERMINAL


class TaskProblem(Exception):
    """Why a task could not be begun, found or reached, in words for the model."""


class SessionTasks(Protocol):
    """The tasks of one session, for its tools. All raise `TaskProblem`."""

    async def spawn(self, request: SpawnRequest, *, call_id: str, idempotency_key: str) -> SessionTask:
        """Begin a sub-agent. The same key finds the same child again."""
        ...

    async def wait(
        self, task_id: str, *, call_id: str, seconds: float | None = None, until_input: bool = False
    ) -> SessionTask:
        """The task when it has ended, or as it is after `seconds` (never more than a foreground wait may take) since the call
        first began: a retry goes on waiting for what is left. With `until_input` also when it begins to wait for a person.
        """
        ...

    async def detach(self, task_id: str) -> SessionTask:
        """Let a foreground task that has not ended go on in the background; its result will come as a message."""
        ...

    async def find(self, *, only_open: bool = False) -> Sequence[SessionTask]:
        """Newest first."""
        ...

    async def get(self, task_id: str) -> SessionTaskDetail: ...

    async def send(self, task_id: str, text: str, *, idempotency_key: str) -> SessionTask:
        """Say something to a sub-agent: a running one reads it at its next step, one that has ended goes to work again."""
        ...

    async def cancel(self, task_id: str) -> SessionTask: ...
