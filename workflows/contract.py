"""Everything that crosses the determinism boundary: names, queues, inputs, outputs, signals and retry policies.

Payloads carry ids, flags and counters, never content, with one exception: a caller of Temporal's own SDK may bring a message's
content in a `message` signal or a `send_message` update, and the first step records it in the log. Fields are only ever added,
with defaults: a running turn may meet payloads of the version before.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Final

from msgspec import Struct
from temporalio.common import RetryPolicy, SearchAttributeKey

from domain.messages import Controls, Delivery, InputPart
from domain.turns import (
    ActInput,
    ActResult,
    CallRef,
    FinishInput,
    FinishResult,
    ReasonInput,
    ReasonNext,
    ReasonResult,
    TurnEnding,
)

__all__ = [
    "ActInput",
    "ActResult",
    "CallRef",
    "FinishInput",
    "FinishResult",
    "ReasonInput",
    "ReasonNext",
    "ReasonResult",
    "TurnEnding",
]

TURN_WORKFLOW: Final = "Turn"
SCHEDULED_MESSAGE_WORKFLOW: Final = "ScheduledMessage"
TURNS_QUEUE: Final = "everruns-turns"
DEPLOYMENT: Final = "everruns"
"""Name of the Worker Deployment that versioned workers belong to."""

REASON: Final = "reason"
ACT: Final = "act"
FINISH: Final = "finish"
RECORD_MESSAGE: Final = "record_message"
DELIVER_SCHEDULED: Final = "deliver_scheduled"

ORG_ATTRIBUTE: Final = SearchAttributeKey.for_keyword("EverrunsOrg")
AGENT_ATTRIBUTE: Final = SearchAttributeKey.for_keyword("EverrunsAgent")
HARNESS_ATTRIBUTE: Final = SearchAttributeKey.for_keyword("EverrunsHarness")
TURN_STATUS_ATTRIBUTE: Final = SearchAttributeKey.for_keyword("EverrunsTurnStatus")
SCHEDULED_START_ATTRIBUTE: Final = SearchAttributeKey.for_datetime("TemporalScheduledStartTime")
"""Temporal's own: the time for which a schedule started a workflow."""
SEARCH_ATTRIBUTES: Final = (ORG_ATTRIBUTE, AGENT_ATTRIBUTE, HARNESS_ATTRIBUTE, TURN_STATUS_ATTRIBUTE)

HEARTBEAT_INTERVAL_SECONDS: Final = 0.7
HEARTBEAT_TIMEOUT: Final = timedelta(seconds=3)
"""A worker that is gone is noticed within this time; a busy one beats four times in it."""

REASON_TIMEOUT: Final = timedelta(minutes=15)
ACT_TIMEOUT_MARGIN: Final = timedelta(seconds=15)
"""The tool's own timeout ends a call first, with a result the model can read; Temporal's is the backstop behind it."""

DATABASE_STEP_TIMEOUT: Final = timedelta(seconds=20)
CLIENT_TOOL_TIMEOUT: Final = timedelta(minutes=5)
MAX_PARALLEL_TOOLS: Final = 32

MODEL_ATTEMPTS: Final = 5
"""Failed model calls before a step is given up."""

STEP_RETRY: Final = RetryPolicy(
    # Only what says nothing about its own delay waits this long: a lost worker, a database that is away. Provider errors
    # bring `next_retry_delay`.
    initial_interval=timedelta(milliseconds=100),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(seconds=10),
    # Without a limit of Temporal's: a step gives up by what happened to it (`MODEL_ATTEMPTS`, `LOST_ATTEMPTS_BEFORE_SEAL`).
)
DATABASE_STEP_RETRY: Final = RetryPolicy(
    initial_interval=timedelta(milliseconds=200),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(seconds=10),
    # Without a limit: these steps are idempotent and a turn must not be left half ended.
)

LOST_ATTEMPTS_BEFORE_SEAL: Final = 3

NO_PROGRESS: Final = "no_progress"
MODEL_FAILED: Final = "model_failed"
STEP_FENCED: Final = "step_fenced"
SESSION_GONE: Final = "session_gone"
WORKER_STOPPING: Final = "worker_stopping"
STEP_FAILED: Final = "step_failed"
"""Types of the `ApplicationError`s our steps raise; raiser and handler share them here."""


class CancelSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`read_up_to` is the log's last sequence when the cancel was asked for; see `FinishInput`."""

    reason: str | None = None
    read_up_to: int | None = None


class TurnStart(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Input of the `Turn` workflow. A caller gives `session_id` alone; the rest is carried over a continue-as-new."""

    session_id: str
    turn_id: str | None = None
    iteration: int = 0
    client_tool_timeout_seconds: float = CLIENT_TOOL_TIMEOUT.total_seconds()
    reason_timeout_seconds: float = REASON_TIMEOUT.total_seconds()
    max_parallel_tools: int = MAX_PARALLEL_TOOLS
    steps_queue: str | None = None
    """None runs the steps on the turn's own queue: Temporal then hands a step to the worker that just scheduled it."""

    search_attributes: bool = False
    cancel: CancelSignal | None = None
    """A cancel that was asked for before this run began."""


class TurnResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`ending` is `nothing_to_do` when the run was started but every message had been read already."""

    ending: str
    turn_id: str
    iterations: int = 0


class MessageSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`message_id` alone names a message that is already stored; `content` brings a new one."""

    message_id: str | None = None
    content: list[InputPart] | None = None
    delivery: Delivery = Delivery.STEER
    controls: Controls | None = None
    metadata: dict[str, object] | None = None
    ends_wait: bool | None = None
    """Whether the message came after the log began to wait for client-side tools, if the sender knows."""


class InterruptSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    message_id: str | None = None
    reason: str | None = None


class ToolResultsSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tool_call_ids: list[str] = []


class ApprovalsSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tool_call_ids: list[str] = []


class AnswersSignal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tool_call_id: str | None = None


class SendMessageReceipt(Struct, frozen=True, kw_only=True):
    """Answer of the `send_message` update. `steered` tells whether a turn was already at work."""

    message_id: str
    turn_id: str
    steered: bool


class TurnPhase(StrEnum):
    STARTING = "starting"
    REASONING = "reasoning"
    ACTING = "acting"
    WAITING_FOR_TOOL_RESULTS = "waiting_for_tool_results"
    ENDING = "ending"


class TurnStatusView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of the `status` query."""

    turn_id: str
    phase: TurnPhase
    iteration: int
    pending_messages: int
    waiting_for: list[str] = []


class RecordMessageInput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    session_id: str
    message_id: str
    message: MessageSignal


class ScheduledMessageStart(Struct, frozen=True, kw_only=True):
    """Input of the `ScheduledMessage` workflow, fixed when its Temporal Schedule is created."""

    schedule_id: str


class DeliverScheduledInput(Struct, frozen=True, kw_only=True):
    """`due_at` is the time it fires for, in seconds since 1970."""

    schedule_id: str
    due_at: float


class DeliveryResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`message_id`, or why nothing was delivered: the schedule is `over`, or its last message is still `unread`."""

    message_id: str | None = None
    undelivered: str | None = None
