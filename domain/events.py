"""Every event type, the payloads the engine writes, and the envelope clients read.

`EVENT_TYPES` is the published registry: filters accept exactly these names. A type with a payload class below is written
by this engine; the rest are registered names of the public contract whose feature is not built yet.

Deltas are stored with their `offset` (characters of the message before this delta) instead of the whole text so far, which
keeps a long answer linear in the log; `Accumulator` restores the documented `accumulated` field when an event is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Final, Literal

import msgspec
from msgspec import Struct

from domain.messages import ContentPart, Message, Phase
from domain.questions import QuestionSet
from domain.tasks import SessionTask, TaskMessage
from domain.tools import ToolCall, ToolCallSummary

EVENT_TYPES: Final[dict[str, str]] = {
    "input.message": "A message from the user (or a channel on the user's behalf) was stored.",
    "output.message.started": "The model began to write a message.",
    "output.message.delta": "A piece of a message's text.",
    "output.message.replaced": "A guardrail replaced a streamed message; clients drop its text.",
    "output.message.completed": "A whole agent message; it replaces every delta of its id.",
    "turn.started": "A turn began.",
    "turn.completed": "The turn ended with an answer.",
    "turn.failed": "The turn ended with an error.",
    "turn.sealed": "The turn was stopped for good because it made no progress or used up its budget.",
    "turn.cancelled": "The turn was cancelled.",
    "reason.started": "A reason step (one model call) began.",
    "reason.completed": "A reason step ended, well or not.",
    "reason.recovered": "A reason step took over from a worker that died; mode `restart` voids the partial text.",
    "reason.thinking.started": "The model began to think.",
    "reason.thinking.delta": "A piece of the model's thinking.",
    "reason.thinking.completed": "The whole thinking text of this step.",
    "reason.item": "A provider's opaque reasoning item.",
    "act.started": "A batch of tool calls began.",
    "act.completed": "Every tool call of the batch has ended.",
    "tool.started": "A tool call began to run.",
    "tool.completed": "A tool call ended; exactly one per call id.",
    "tool.progress": "A running tool reported progress.",
    "tool.output.delta": "A running tool produced output.",
    "tool.call_requested": "The turn waits: for results of client-side tools, for answers, or for leave to run calls.",
    "tool.approval_resolved": "A person allowed or rejected a tool call.",
    "tool.call_repaired": "Malformed tool arguments were repaired, or could not be.",
    "guardrail.triggered": "A guardrail found something; whether it blocked says `action`.",
    "tool.hosted_call": "A tool ran at the provider.",
    "transcript.repaired": "A tool call left open by a crash or a cancel got a result.",
    "capability.usage": "Which capabilities a turn used.",
    "capability.skipped": "References to capabilities that came to nothing; the turn goes on without them.",
    "llm.generation": "One call of a model: request, output, usage and timing.",
    "session.started": "The session was created.",
    "session.activated": "The session went to work.",
    "session.idled": "The session rests; carries the cumulative usage.",
    "session.title.updated": "The session's title changed.",
    "session.model.changed": "The model that was asked for explicitly changed.",
    "session.forked": "The session begins here, with a copy of another session's history.",
    "session.rewound": "The conversation went back to what it was at an earlier event.",
    "schedule.triggered": "A schedule fired.",
    "task.created": "A background task was created.",
    "task.updated": "A background task changed.",
    "task.message.sent": "A message was sent to a background task.",
    "task.message.received": "A message came from a background task.",
    "context.compacting": "The context is about to be compacted.",
    "context.compacted": "The context was compacted.",
    "context.compaction.skipped": "A compaction was skipped.",
    "context.compaction.failed": "A compaction failed; the context is unchanged.",
    "file.written": "A workspace file was written.",
    "budget.warning": "A budget is nearly used up.",
    "budget.paused": "A budget's soft limit paused the session.",
    "budget.exhausted": "A budget is used up.",
    "budget.resumed": "A paused budget was resumed.",
    "environment.instance_lost": "An execution environment was lost.",
    "environment.recovered": "An execution environment was replaced.",
    "voice.session.started": "A voice connection began.",
    "voice.input_transcript.delta": "A piece of the user's speech, transcribed.",
    "voice.input_transcript.completed": "The user's speech, transcribed.",
    "voice.output_transcript.delta": "A piece of the agent's speech, transcribed.",
    "voice.output_transcript.completed": "The agent's speech, transcribed.",
    "voice.session.ended": "A voice connection ended.",
    "voice.session.failed": "A voice connection failed.",
}

EPHEMERAL_TYPES: Final = frozenset({"output.message.delta", "reason.thinking.delta", "tool.output.delta"})
"""Superseded by a later event that carries the whole; never needed to rebuild a conversation."""

RECEIPT_TYPES: Final = ("turn.started", "reason.started", "turn.cancelled", "session.forked", "session.rewound")
"""Their `input_message_ids` say where each message was read, exactly once."""

CONVERSATION_TYPES: Final = ("input.message", "output.message.completed", "tool.completed", *RECEIPT_TYPES)
"""What a prompt is rebuilt from."""


class TokenUsage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts in disjoint buckets: `input_tokens` excludes what was read from or written to a cache.

    Costs are in US dollars: `actual` as the provider reported it, `estimated` from the model's price list, `effective` the better
    of the two, which is what totals add up. A cost that is not known is left out.
    """

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int | None = None
    cache_creation_tokens: int | None = None
    actual_cost_usd: float | None = None
    estimated_cost_usd: float | None = None
    effective_cost_usd: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.input_tokens + (self.cache_read_tokens or 0) + (self.cache_creation_tokens or 0)

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_read_tokens=(self.cache_read_tokens or 0) + (other.cache_read_tokens or 0) or None,
            cache_creation_tokens=(self.cache_creation_tokens or 0) + (other.cache_creation_tokens or 0) or None,
            actual_cost_usd=_sum(self.actual_cost_usd, other.actual_cost_usd),
            estimated_cost_usd=_sum(self.estimated_cost_usd, other.estimated_cost_usd),
            effective_cost_usd=_sum(self.effective_cost_usd, other.effective_cost_usd),
        )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None and other is None else (one or 0.0) + (other or 0.0)


class ModelMetadata(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`model` is the vendor's name; the ids are UUIDs with dashes."""

    model: str
    model_id: str | None = None
    provider_id: str | None = None


class EventContext(Struct, frozen=True, kw_only=True, omit_defaults=True):
    turn_id: str | None = None
    input_message_id: str | None = None
    exec_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None


class EventPayload(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all payloads; `event_type` is the name on the wire."""

    event_type: ClassVar[str]


class InputMessage(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "input.message"
    message: Message


class OutputMessageStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "output.message.started"
    turn_id: str
    message_id: str
    model: str | None = None
    iteration: int | None = None
    phase: Phase | None = None


class OutputMessageDelta(EventPayload, frozen=True, kw_only=True):
    event_type = "output.message.delta"
    turn_id: str
    message_id: str
    delta: str
    offset: int


class OutputMessageReplaced(EventPayload, frozen=True, kw_only=True):
    """The text streamed of this message is void. What the model wrote is stored nowhere as a whole."""

    event_type = "output.message.replaced"
    turn_id: str
    message_id: str
    guardrail_capability_id: str
    guardrail_id: str
    reason_code: str
    replacement: str


class GuardrailTriggered(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """Never with the text that was found."""

    event_type = "guardrail.triggered"
    turn_id: str
    capability_id: str
    check_id: str
    stage: Literal["output", "tool_use", "tool_output"]
    action: Literal["block", "log"]
    reason_code: str
    message_id: str | None = None
    tool_call_id: str | None = None


class ToolCallRepaired(EventPayload, frozen=True, kw_only=True):
    """`re-prompt`: the model reads what is wrong and may call again; `gave-up`: it has read that too often in this turn."""

    event_type = "tool.call_repaired"
    turn_id: str
    tool_call_id: str
    tool_name: str
    outcome: Literal["local-salvage", "re-prompt", "gave-up"]


class OutputMessageCompleted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "output.message.completed"
    message: Message
    metadata: ModelMetadata | None = None
    usage: TokenUsage | None = None
    error_code: str | None = None
    error_fields: dict[str, object] | None = None
    error_disclosure: str | None = None


class TurnStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`input_message_ids` are all the messages the turn began with: the receipt that each was read once."""

    event_type = "turn.started"
    turn_id: str
    input_message_id: str
    input_message_ids: list[str] | None = None
    input_content: list[ContentPart] | None = None
    agent_id: str | None = None
    agent_name: str | None = None
    agent_description: str | None = None


class TurnCompleted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "turn.completed"
    turn_id: str
    iterations: int
    status: Literal["completed"] | None = None
    duration_ms: int | None = None
    usage: TokenUsage | None = None
    final_message_id: str | None = None
    final_answer_preview: str | None = None
    time_to_first_token_ms: int | None = None
    tool_call_count: int | None = None
    llm_call_count: int | None = None
    stop_reason: str | None = None


class TurnFailed(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "turn.failed"
    turn_id: str
    error: str
    error_code: str | None = None
    error_fields: dict[str, object] | None = None
    error_disclosure: str | None = None


class TurnSealed(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "turn.sealed"
    turn_id: str
    reason: Literal["no_progress", "budget"]
    detail: str | None = None
    iterations: int | None = None
    usage: TokenUsage | None = None


class TurnCancelled(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`input_message_ids` are messages that were waiting to be read when the turn was cancelled; they become history."""

    event_type = "turn.cancelled"
    turn_id: str
    reason: str | None = None
    input_message_ids: list[str] | None = None
    usage: TokenUsage | None = None


class ReasonStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`input_message_ids` are the steering messages first read in this step: the receipt that each was read once."""

    event_type = "reason.started"
    harness_id: str
    agent_id: str | None = None
    metadata: ModelMetadata | None = None
    iteration: int | None = None
    input_message_ids: list[str] | None = None


class ReasonCompleted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "reason.completed"
    success: bool
    has_tool_calls: bool
    tool_call_count: int
    text_preview: str | None = None
    error: str | None = None
    duration_ms: int | None = None
    usage: TokenUsage | None = None
    attempts: int | None = None
    interrupted: bool | None = None


class ReasonRecovered(EventPayload, frozen=True, kw_only=True):
    event_type = "reason.recovered"
    turn_id: str
    mode: Literal["finalize", "restart"]
    accumulated_len: int
    message_id: str
    attempt: int


class ReasonThinkingStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "reason.thinking.started"
    turn_id: str
    model: str | None = None


class ReasonThinkingDelta(EventPayload, frozen=True, kw_only=True):
    event_type = "reason.thinking.delta"
    turn_id: str
    message_id: str
    delta: str
    offset: int


class ReasonThinkingCompleted(EventPayload, frozen=True, kw_only=True):
    event_type = "reason.thinking.completed"
    turn_id: str
    thinking: str


class ReasonItem(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """That a provider reasoned, and its summary; what it keeps encrypted never leaves the engine."""

    event_type = "reason.item"
    turn_id: str
    provider: str
    item_id: str
    model: str | None = None
    summary: list[str] | None = None
    token_count: int | None = None


class ActStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "act.started"
    tool_calls: list[ToolCallSummary]
    headline: str | None = None


class ActCompleted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "act.completed"
    completed: bool
    success_count: int
    error_count: int
    duration_ms: int | None = None


class ToolStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "tool.started"
    tool_call: ToolCall
    display_name: str | None = None
    narration: str | None = None
    tool_call_fingerprint: str | None = None


class ToolStatus(StrEnum):
    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class ToolCompleted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "tool.completed"
    tool_call_id: str
    tool_name: str
    success: bool
    status: ToolStatus
    result: list[ContentPart] | None = None
    error: str | None = None
    duration_ms: int | None = None
    capability_id: str | None = None
    capability_name: str | None = None
    display_name: str | None = None
    narration: str | None = None
    attempts: int | None = None


class ToolProgress(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "tool.progress"
    tool_call_id: str
    tool_name: str
    message: str
    display_name: str | None = None


class ToolOutputDelta(EventPayload, frozen=True, kw_only=True):
    event_type = "tool.output.delta"
    tool_call_id: str
    tool_name: str
    delta: str
    stream: str


class WaitingCall(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call that waits for a person. `kind` is `approval` or `elicitation`; `request` is what the person is to know."""

    tool_call: ToolCall
    kind: str
    request: dict[str, object]
    display_name: str | None = None


class ToolCallRequested(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`tool_calls` are for the client to run; `waiting` are ours to run, once a person has answered."""

    event_type = "tool.call_requested"
    tool_calls: list[ToolCall]
    tool_summaries: list[ToolCallSummary] | None = None
    headline: str | None = None
    questions: list[QuestionSet] | None = None
    waiting: list[WaitingCall] | None = None


class ToolApprovalResolved(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "tool.approval_resolved"
    tool_call_id: str
    tool_name: str
    decision: Literal["allow", "reject", "allow_always", "reject_always"]
    outcome: Literal["allowed", "rejected"]
    reason: str | None = None


class TranscriptRepaired(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "transcript.repaired"
    tool_call_id: str
    action: Literal["replay", "synthesize"]
    tool_name: str | None = None


class SkippedCapability(Struct, frozen=True, kw_only=True):
    """A reference, and why it came to nothing."""

    ref: str
    reason: str


class CapabilitySkipped(EventPayload, frozen=True, kw_only=True):
    """Once per turn, before its first model call."""

    event_type = "capability.skipped"
    turn_id: str
    refs: list[SkippedCapability]


class FileWritten(EventPayload, frozen=True, kw_only=True):
    event_type = "file.written"
    path: str
    operation: Literal["create", "update"]
    size_bytes: int
    created: bool


class TaskCreated(EventPayload, frozen=True, kw_only=True):
    event_type = "task.created"
    task: SessionTask


class TaskUpdated(EventPayload, frozen=True, kw_only=True):
    event_type = "task.updated"
    task: SessionTask


class TaskMessageSent(EventPayload, frozen=True, kw_only=True):
    event_type = "task.message.sent"
    task_id: str
    message: TaskMessage


class TaskMessageReceived(EventPayload, frozen=True, kw_only=True):
    event_type = "task.message.received"
    task_id: str
    message: TaskMessage


class ScheduleTriggered(EventPayload, frozen=True, kw_only=True):
    """A schedule has put its message, `message_id`, into the session. `scheduled_at` is the time it was due, RFC 3339."""

    event_type = "schedule.triggered"
    schedule_id: str
    message_id: str
    scheduled_at: str


class BudgetWarning(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """Amounts are in `currency`; `message` is for people. The same of all budget events."""

    event_type = "budget.warning"
    budget_id: str
    currency: str
    limit: float
    balance: float
    soft_limit: float | None = None
    message: str | None = None


class BudgetPaused(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "budget.paused"
    budget_id: str
    currency: str
    limit: float
    balance: float
    soft_limit: float | None = None
    message: str | None = None


class BudgetExhausted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "budget.exhausted"
    budget_id: str
    currency: str
    limit: float
    balance: float
    soft_limit: float | None = None
    message: str | None = None


class BudgetResumed(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "budget.resumed"
    budget_id: str
    currency: str
    limit: float
    balance: float
    soft_limit: float | None = None
    message: str | None = None


class GenerationOutput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    text: str | None = None
    tool_calls: list[ToolCall] | None = None


class GenerationTool(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    description: str
    display_name: str | None = None
    category: str | None = None
    capability_id: str | None = None
    capability_name: str | None = None


class RetryMetadata(Struct, frozen=True, kw_only=True):
    attempts: int
    total_wait_ms: int


class RequestOptions(Struct, frozen=True, kw_only=True, omit_defaults=True):
    temperature: float | None = None
    max_tokens: int | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    speed: str | None = None
    response_format: str | None = None
    stream: bool | None = None


class GenerationFallback(Struct, frozen=True, kw_only=True):
    """The model that was to answer, and why another one did."""

    model: str
    model_id: str
    reason: Literal["exhausted", "circuit_open"]


class GenerationCompaction(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What compacting the context for this call did. The tokens are estimates of the whole prompt; the cost is in US dollars."""

    compacted: bool
    input_tokens_before: int | None = None
    input_tokens_after: int | None = None
    duration_ms: int | None = None
    cost_usd: float | None = None


class GenerationMetadata(Struct, frozen=True, kw_only=True, omit_defaults=True):
    model: str
    success: bool
    provider: str | None = None
    usage: TokenUsage | None = None
    duration_ms: int | None = None
    time_to_first_token_ms: int | None = None
    error: str | None = None
    finish_reasons: list[str] | None = None
    response_id: str | None = None
    retry: RetryMetadata | None = None
    request_options: RequestOptions | None = None
    dropped_options: list[str] | None = None
    fallback: GenerationFallback | None = None
    compaction: GenerationCompaction | None = None


class LlmGeneration(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`messages` are those that this prompt adds to the one before; the system message stands in a turn's first.

    `prompt_message_count` counts the whole prompt. The messages in between are in the log already.
    """

    event_type = "llm.generation"
    prompt_message_count: int | None = None
    messages: list[Message]
    output: GenerationOutput
    metadata: GenerationMetadata
    tools: list[GenerationTool] | None = None


class SessionStarted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "session.started"
    harness_id: str
    agent_id: str | None = None
    model_id: str | None = None


class SessionActivated(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "session.activated"
    turn_id: str
    input_message_id: str


class SessionIdled(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "session.idled"
    turn_id: str
    iterations: int | None = None
    usage: TokenUsage | None = None


class SessionTitleUpdated(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "session.title.updated"
    title: str
    previous_title: str | None = None


class SessionModelChanged(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "session.model.changed"
    model_id: str
    model_name: str
    previous_model_id: str | None = None
    previous_model_name: str | None = None


class SessionForked(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """Everything before it is a copy, up to `source_sequence`, or ends the turn that ran there. `input_message_ids` are messages
    nobody had read by then; they become history."""

    event_type = "session.forked"
    source_session_id: str
    source_sequence: int
    input_message_ids: list[str] | None = None


class SessionRewound(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """What lies between event `to_sequence` and this one is not part of the conversation any more. `files` tells whether files
    and values are what they were then. `input_message_ids` are messages nobody had read by then; they become history."""

    event_type = "session.rewound"
    to_sequence: int
    files: bool
    input_message_ids: list[str] | None = None


CompactionReason = Literal["proactive_budget", "request_too_large", "manual"]
CompactionTrigger = Literal["context_budget", "cost_pressure"]
CompactionStage = Literal["native_compaction", "checkpoint_install", "summarization"]
SkipReason = Literal[
    "strategy_excludes_native",
    "driver_unsupported",
    "checkpoint_store_unavailable",
    "cooldown_active",
    "native_returned_none",
    "no_material_reduction",
    "guard_rejected",
]


class CompactionStep(Struct, frozen=True, kw_only=True):
    strategy: str
    messages_after: int
    duration_ms: int


class ContextCompacting(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """Messages and tokens are those of the prompt; tokens are estimates."""

    event_type = "context.compacting"
    reason: CompactionReason
    strategy: str
    messages_before: int
    trigger: CompactionTrigger | None = None
    model: str | None = None
    provider: str | None = None
    driver: str | None = None
    tokens_before: int | None = None
    budget_remaining_tokens: int | None = None
    source_sequence: int | None = None


class ContextCompacted(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`usage` is what the compaction itself took; it is in the totals of turn and session, but in no `llm.generation`."""

    event_type = "context.compacted"
    strategy_used: str
    messages_before: int
    messages_after: int
    duration_ms: int
    steps: list[CompactionStep] | None = None
    reason: CompactionReason | None = None
    trigger: CompactionTrigger | None = None
    model: str | None = None
    provider: str | None = None
    driver: str | None = None
    checkpoint_id: str | None = None
    source_sequence: int | None = None
    tokens_before: int | None = None
    tokens_after: int | None = None
    usage: TokenUsage | None = None


class ContextCompactionSkipped(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    event_type = "context.compaction.skipped"
    reason: CompactionReason
    trigger: CompactionTrigger
    skip_reason: SkipReason
    strategy: str
    model: str
    tokens_observed: int
    messages_observed: int
    provider: str | None = None
    driver: str | None = None
    usage: TokenUsage | None = None


class ContextCompactionFailed(EventPayload, frozen=True, kw_only=True, omit_defaults=True):
    """`error` is a kind of failure, never the provider's words."""

    event_type = "context.compaction.failed"
    reason: CompactionReason
    trigger: CompactionTrigger
    stage: CompactionStage
    error: str
    strategy: str
    model: str
    tokens_before: int
    messages_before: int
    provider: str | None = None
    driver: str | None = None


def payload_types() -> dict[str, type[EventPayload]]:
    """The payload class of every type this engine writes."""
    return {cls.event_type: cls for cls in EventPayload.__subclasses__()}


class NewEvent(Struct, frozen=True, kw_only=True):
    """An event about to be appended. A second append with the same `dedupe_key` in a session is a no-op."""

    data: EventPayload
    context: EventContext = EventContext()
    dedupe_key: str | None = None
    metadata: dict[str, object] | None = None
    tags: list[str] | None = None

    @property
    def type(self) -> str:
        return self.data.event_type


class StoredEvent(Struct, frozen=True, kw_only=True):
    """A row of the log; `context` and `data` are the stored JSON, untouched."""

    id: str
    type: str
    ts: datetime
    session_id: str
    sequence: int
    context: bytes
    data: bytes
    metadata: bytes | None = None
    tags: list[str] | None = None


class _DeltaFields(Struct, frozen=True):
    delta: str
    offset: int = 0
    message_id: str = ""


_delta_decoder = msgspec.json.Decoder(_DeltaFields)
_encode = msgspec.json.Encoder().encode


def delta_position(event: StoredEvent) -> tuple[str, int]:
    """The message id and offset of a message or thinking delta."""
    fields = _delta_decoder.decode(event.data)
    return fields.message_id, fields.offset


def joined_deltas(payloads: Iterable[bytes]) -> str:
    """The text that deltas of one message add up to, restarts taken into account."""
    text = ""
    for payload in payloads:
        fields = _delta_decoder.decode(payload)
        text = text[: fields.offset] + fields.delta
    return text


class Accumulator:
    """Restores `accumulated` on message and thinking deltas read in order.

    An offset that goes back (a restarted generation) drops the text after it, as `reason.recovered` tells clients to do.
    """

    TYPES: ClassVar = frozenset({"output.message.delta", "reason.thinking.delta"})

    def __init__(self) -> None:
        self._text: dict[tuple[str, str], str] = {}

    def knows(self, event: StoredEvent) -> bool:
        """Whether the text before this delta has been seen, so that `wire_data` will be whole."""
        message_id, offset = delta_position(event)
        return offset == 0 or len(self._text.get((event.type, message_id), "")) >= offset

    def prime(self, event: StoredEvent, text: str) -> None:
        """Tell the text before this delta, read from the log."""
        self._text[event.type, delta_position(event)[0]] = text

    def wire_data(self, event: StoredEvent) -> bytes:
        """The payload to serve for this event, deltas completed with `accumulated`."""
        if event.type not in self.TYPES:
            if event.type == "output.message.completed" or event.type.startswith("turn."):
                self._text.clear()
            return event.data
        fields = _delta_decoder.decode(event.data)
        key = (event.type, fields.message_id)
        text = self._text.get(key, "")[: fields.offset] + fields.delta
        self._text[key] = text
        return event.data[:-1] + b',"accumulated":' + _encode(text) + b"}"
