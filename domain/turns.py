"""One turn, step by step: what goes into a step, what comes out, and the port through which steps reach state.

The small Structs at the top also travel through Temporal (`workflows.contract` re-exports them), so they hold ids, flags and
counters only. The larger ones below stay inside a worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Literal, Protocol

from msgspec import Struct

from domain.budgets import Budget
from domain.capabilities import GuardrailHit, NeedsApproval, OutputReplacement, Resumption
from domain.checkpoints import Checkpoint
from domain.config import TurnConfig
from domain.conversation import Conversation
from domain.events import EventPayload, GenerationCompaction, NewEvent, TokenUsage
from domain.memory_access import OpenMemory
from domain.messages import ContentPart, Controls, Delivery, InputPart, Message, Phase
from domain.model import FinishReason, ModelEndpoint, ModelErrorKind, ProviderState, ReasoningItem, ResumePoint
from domain.model_profiles import ModelProfile
from domain.schedules import SessionSchedules
from domain.session_databases import SessionDatabases
from domain.session_info import SessionInfo
from domain.session_past import SessionPast
from domain.session_storage import SessionStorage
from domain.tasks import SessionTasks
from domain.tools import SideEffect, ToolCall, ToolDefinition
from domain.workspace import WorkspaceFiles


class CallRef(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call as the workflow needs it to schedule it: no arguments."""

    call_id: str
    name: str
    timeout_seconds: float
    concurrency_class: str | None = None


class ReasonInput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    session_id: str
    turn_id: str
    iteration: int
    open_calls: Literal["interrupted", "timed_out"] = "interrupted"
    """What to tell the model about client-side calls that are still open."""


class ReasonNext(StrEnum):
    DONE = "done"
    """The turn is over and closed in the log."""
    AGAIN = "again"
    """A message arrived while the model wrote: reason again."""
    ACT = "act"
    WAIT = "wait"
    """Only client-side tools were called: wait for their results."""
    NOTHING = "nothing"
    """No unread message: there is no turn to run."""
    PAUSED = "paused"
    """A budget pauses the turn, or lets none begin: the run ends, and a later one goes on."""
    TAKE_UP = "take_up"
    """A paused turn goes on: `turn_id` is its name, `iteration` its last one."""


class ReasonResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    next: ReasonNext
    calls: list[CallRef] = []
    client_calls: list[str] = []
    serial: bool = False
    more: bool = False
    """With `done`: another message waits for a turn of its own."""

    model: str | None = None
    """Name of the model that answered, for the summary of the next step in Temporal's Web UI."""

    ended_at: int | None = None
    """With `done`: the last sequence of the turn."""

    wait_seconds: float | None = None
    """How long to wait for `client_calls`, when it is not what is usual."""

    resumed: bool = False
    """No model was called: `calls` are of an earlier answer, and have got what they were waiting for."""

    turn_id: str | None = None
    iteration: int = 0

    ending: TurnEnding | None = None
    """With `done`: how the turn ended, if not with an answer."""


class ActInput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`idempotency_key` is the same for every attempt of the call."""

    session_id: str
    turn_id: str
    iteration: int
    call_id: str
    idempotency_key: str


class ActResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    waiting: bool = False
    """This was the last server-side call of the batch that can run now, and others wait for a client or a person."""

    waits: list[str] = []
    """With `waiting`: what the turn waits for, when that is not just what the reason step has named."""

    wait_seconds: float | None = None


class TurnEnding(StrEnum):
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    """A new message arrived while the turn waited for client-side tools; it gets a turn of its own."""
    SEALED = "sealed"


class FinishInput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    session_id: str
    turn_id: str
    iteration: int
    ending: TurnEnding
    error_code: str | None = None
    reason: str | None = None
    read_up_to: int | None = None
    """With `cancelled`: messages up to this sequence were waiting when the cancel was asked for; they become history."""


class FinishResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    more: bool = False
    """An unread message waits for the next turn."""

    ended_at: int | None = None
    """The last sequence of the turn."""


class StepRef(Struct, frozen=True, kw_only=True):
    """One attempt of one step. State written under a ref whose attempt has been overtaken is refused with `StepFenced`."""

    session_id: str
    turn_id: str
    iteration: int
    exec_id: str
    attempt: int
    worker: str


class StepFenced(Exception):
    """A later attempt of this step, or the end of its turn, has taken over; this attempt may write nothing more."""


class SessionGone(Exception):
    """The session of a step does not exist (any more)."""


class NoProgress(Exception):
    """Attempts of this step were lost one after the other without any progress; the turn is to be sealed."""


CONTEXT_WINDOW: Final = "context_window"
"""Option of a model (tokens): overrides what its profile says, or says it where there is no profile."""

MAX_OUTPUT_SHARE: Final = 0.5
"""Of a context window. Some models may write as much as they may read; a prompt needs room all the same."""

UNKNOWN_OUTPUT_SHARE: Final = 0.25


class ResolvedModel(Struct, frozen=True, kw_only=True):
    """The model a step calls. `public_id` is `model_…`; `options` are stored with the model and belong to its driver."""

    public_id: str
    name: str
    provider_public_id: str
    provider_type: str
    options: dict[str, object] = {}
    endpoint: ModelEndpoint = ModelEndpoint(provider_type="llmsim")
    profile: ModelProfile | None = None
    instead_of: FallbackFrom | None = None
    """Set when this is a fallback."""
    trying: bool = False
    """Its circuit breaker is half open: this call decides."""

    @property
    def context_window(self) -> int | None:
        """Tokens of prompt and answer together, as far as is known."""
        window = self.options.get(CONTEXT_WINDOW)
        if isinstance(window, int) and window > 0:
            return window
        return None if self.profile is None or self.profile.limits is None else self.profile.limits.context

    @property
    def input_limit(self) -> int | None:
        """Tokens a prompt may have: the model's own limit, or what its answer leaves of the window."""
        window, limits = self.context_window, self.profile and self.profile.limits
        if window is None:
            return None
        if CONTEXT_WINDOW not in self.options and limits is not None and limits.input is not None:
            return limits.input
        output = self.options.get("max_output_tokens")
        if not isinstance(output, int):
            output = round(window * UNKNOWN_OUTPUT_SHARE) if limits is None else limits.output
        return window - min(output, round(window * MAX_OUTPUT_SHARE))


class FallbackFrom(Struct, frozen=True, kw_only=True):
    """The model that was to be called, and why another one is."""

    model: str
    model_id: str
    reason: Literal["exhausted", "circuit_open"]


class ModelProblem(Struct, frozen=True, kw_only=True):
    """Why the model of a step cannot be called at all; for operators."""

    kind: ModelErrorKind
    message: str
    retry_after_seconds: float | None = None


class ArrivedAnswer(Struct, frozen=True, kw_only=True):
    """A model call that is over, all but its text, which is in the log: what a later attempt needs to finish it."""

    finish_reason: FinishReason
    usage: TokenUsage
    text_length: int
    duration_ms: int
    thinking: str = ""
    calls: list[PlannedCall] = []
    time_to_first_token_ms: int | None = None
    response_id: str | None = None
    phase: Phase | None = None
    state: ProviderState | None = None
    reasoning_items: list[ReasoningItem] = []
    dropped_options: list[str] = []
    compaction: GenerationCompaction | None = None
    """What was done to the context for this call."""
    replacement: OutputReplacement | None = None
    """Set when a guardrail has ended the answer: this is its text, and what is in the log of the model's own is void."""


class GenerationNote(Struct, frozen=True, kw_only=True):
    """How far a call of this model (`model_…`) has come, written with the text it belongs to."""

    model_id: str
    response_id: str | None = None
    cursor: int = 0
    answer: ArrivedAnswer | None = None


class ReasonBriefing(Struct, frozen=True, kw_only=True):
    """What a reason step starts from. `model` is None when nothing names one and there is no default.

    After an attempt that was lost in the middle, either `answer` is set (the whole answer had arrived: only its end is left to
    write), or `resume` (the generation may go on where it was), or neither (begin anew; the log has been told).
    `partial_text` and `partial_thinking` are what stands in the log in the first two cases.

    `conversation` has its `checkpoint` applied. `token_ratio` is what the session's provider counted for the last prompt over our
    estimate of it.
    """

    message_id: str
    config: TurnConfig
    conversation: Conversation
    model: ResolvedModel | None
    input_message_id: str
    harness_id: str
    problem: ModelProblem | None = None
    agent_id: str | None = None
    controls: Controls = Controls()
    timezone: str | None = None
    states: dict[str, ProviderState] = {}
    answer: ArrivedAnswer | None = None
    resume: ResumePoint | None = None
    partial_text: str = ""
    partial_thinking: str = ""
    checkpoint: Checkpoint | None = None
    token_ratio: float | None = None
    can_keep_native: bool = False
    """Whether a provider's own compaction could be stored: it takes a key to encrypt it with."""


RepairOutcome = Literal["local-salvage", "re-prompt", "gave-up"]


class PlannedCall(Struct, frozen=True, kw_only=True):
    """A tool call the model asked for, with what the ledger must know about its tool.

    `problem` is what was wrong with its arguments; such a call is answered with it and never runs.
    """

    call: ToolCall
    kind: Literal["server", "client"]
    side_effect: SideEffect
    timeout_seconds: float
    concurrency_class: str | None = None
    display_name: str | None = None
    problem: str | None = None
    approval: NeedsApproval | None = None
    hits: tuple[GuardrailHit, ...] = ()
    repair: RepairOutcome | None = None
    """Set when its arguments were malformed."""


class ReasonOutcome(Struct, frozen=True, kw_only=True):
    """Everything one model call produced. `offered_tools` and `prompt` are for the `llm.generation` record.

    `estimated_prompt_tokens` is the raw estimate of the prompt, which the provider's count calibrates.
    """

    model: ResolvedModel
    prompt: list[Message]
    offered_tools: list[ToolDefinition]
    text: str
    answer: ArrivedAnswer
    estimated_prompt_tokens: int = 0


class ReasonFailure(Struct, frozen=True, kw_only=True):
    """A model call that failed. `error` is for operators, `fields` are for clients."""

    kind: ModelErrorKind
    error: str
    model: ResolvedModel | None
    duration_ms: int
    retry_in_ms: int = 0
    fields: dict[str, object] = {}


class FailureVerdict(Struct, frozen=True, kw_only=True):
    """What is to happen after a failed model call. `fallback`: another model is next, and there is nothing to wait for."""

    retry: bool
    fallback: bool = False


class ToolClaim(Struct, frozen=True, kw_only=True):
    """Leave to run a call."""

    call: ToolCall
    config: TurnConfig
    side_effect: SideEffect
    timezone: str | None = None
    problem: str | None = None
    resumed: Resumption | None = None


class ToolSettlement(Struct, frozen=True, kw_only=True):
    """How a call ended: `result` on success, `error` (readable by the model) otherwise."""

    status: Literal["success", "error", "timeout", "cancelled"]
    result: list[ContentPart] | None = None
    error: str | None = None
    duration_ms: int | None = None
    capability_id: str | None = None
    capability_name: str | None = None
    hits: tuple[GuardrailHit, ...] = ()


class CallWait(Struct, frozen=True, kw_only=True):
    """A call that cannot go on without a person (`domain.capabilities.ToolWaits`)."""

    kind: str
    request: dict[str, object]
    state: dict[str, object]


class SessionResources(Protocol):
    """What tools of a session may use, by session; opened when a tool first asks for it."""

    def files(self, session_id: str) -> WorkspaceFiles: ...

    def storage(self, session_id: str) -> SessionStorage: ...

    def databases(self, session_id: str) -> SessionDatabases: ...

    def schedules(self, session_id: str) -> SessionSchedules: ...

    def tasks(self, session_id: str) -> SessionTasks: ...

    def past(self, session_id: str) -> SessionPast: ...

    async def memory(self, session_id: str, id_or_name: str) -> OpenMemory | None: ...

    async def session_info(self, session_id: str) -> SessionInfo:
        """Raises `SessionGone`, as `set_title` does."""
        ...

    async def set_title(self, session_id: str, title: str) -> None: ...

    async def budgets(self, session_id: str) -> Sequence[Budget]: ...


class TurnState(Protocol):
    """The narrow port through which steps reach state. Nothing behind it is known to `activities`.

    Every method is one transaction, idempotent under retries of its step, and raises `StepFenced` or `SessionGone`.
    """

    async def begin_reason(
        self, ref: StepRef, open_calls: Literal["interrupted", "timed_out"]
    ) -> ReasonBriefing | ReasonResult:
        """Open a reason step; a result instead of a briefing means an earlier attempt has finished it.

        Raises `NoProgress` after too many lost attempts.
        """
        ...

    async def commit_reason(self, ref: StepRef, outcome: ReasonOutcome) -> ReasonResult: ...

    async def fail_reason(self, ref: StepRef, failure: ReasonFailure) -> FailureVerdict:
        """Note a failed attempt, so that it does not count as a lost one, and decide what comes after it."""
        ...

    async def release_step(self, ref: StepRef) -> None:
        """Note that this attempt of a reason step ends on purpose, so that it does not count as a lost one."""
        ...

    async def begin_call(self, ref: StepRef, call_id: str) -> ToolClaim | ActResult:
        """Claim a call; a result instead of a claim means it is settled. Raises `NoProgress` like `begin_reason`."""
        ...

    async def settle_call(self, ref: StepRef, call_id: str, settlement: ToolSettlement) -> ActResult: ...

    async def release_call(self, ref: StepRef, call_id: str) -> None:
        """Note that this attempt of a call ends on purpose, so that it does not count as a lost one."""
        ...

    async def suspend_call(self, ref: StepRef, call_id: str, wait: CallWait) -> ActResult:
        """Put a running call to rest until a person has answered; it is claimed anew then."""
        ...

    async def finish(self, input: FinishInput) -> FinishResult: ...

    async def append(self, ref: StepRef, events: Sequence[NewEvent], note: GenerationNote | None = None) -> None:
        """Append events of a running reason step, and with them, in the same transaction, how far its call has come."""
        ...

    async def append_tool_event(self, ref: StepRef, call_id: str, payload: EventPayload) -> None:
        """Append an event of a running tool call."""
        ...

    async def install_checkpoint(
        self,
        ref: StepRef,
        checkpoint: Checkpoint | None,
        events: Sequence[NewEvent],
        usage: TokenUsage | None = None,
    ) -> None:
        """Make `checkpoint` what later prompts begin with, append what tells of it, and count what it took; all or nothing.

        None when a compaction came to nothing but its events and its cost, which counts if one of them is new to the log.
        """
        ...

    async def find_model(self, ref: StepRef, name: str) -> ResolvedModel | None:
        """Another model for a call of the engine's own, by id or by the vendor's name; None when it cannot be called now."""
        ...


class MessageRecorder(Protocol):
    async def record(
        self,
        session_id: str,
        message_id: str,
        content: Sequence[InputPart],
        delivery: Delivery,
        controls: Controls | None,
        metadata: dict[str, object] | None,
    ) -> None:
        """Store a message brought by a Temporal signal. Raises `SessionGone`."""
        ...
