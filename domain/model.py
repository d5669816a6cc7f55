"""The seam to language models: what a driver is given, what it yields, and how it fails.

A driver is one module in `activities/llm` behind `ModelDriver`. It yields the stream events below and raises `ModelError`;
nothing else of a provider's vocabulary leaves it. A stream that ends without `Finished` is a failure (`STREAM_CUT`), because
an early-closed connection looks exactly like a short answer otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from msgspec import Struct

from domain.events import TokenUsage
from domain.messages import Message, Phase, ResponseFormat
from domain.model_profiles import ModelProfile
from domain.secret import Secret
from domain.tools import ToolCall, ToolDefinition


class ModelEndpoint(Struct, frozen=True, kw_only=True):
    """Where a model is called, and with what. `credentials` are by the field names of the provider type (`domain.providers`)."""

    provider_type: str
    provider_public_id: str = ""
    base_url: str | None = None
    """None is the provider type's own address."""
    credentials: Mapping[str, Secret] = {}


class ProviderState(Struct, frozen=True, kw_only=True):
    """What a provider wants back unmodified with a message it wrote: signed thinking, encrypted reasoning.

    `items` are JSON in the driver's own form, which only the driver that wrote them reads. They are never served. A state is
    good for the provider it came from (`provider_public_id`: reasoning is encrypted for an account) and the driver that wrote it.
    """

    provider_public_id: str
    driver: str
    model: str
    items: list[dict[str, object]]


class ResumePoint(Struct, frozen=True, kw_only=True):
    """A generation that may still run at the provider, and the cursor of the last event whose text is in the log."""

    response_id: str
    cursor: int


class ModelRequest(Struct, frozen=True, kw_only=True):
    """One model call. `messages` starts with the system message when there is one.

    `attempt` counts from 1 over the tries of the same step; `idempotency_key` is the same for all of them. What a model cannot do
    by its `profile` is dropped by the driver and named in `Finished.dropped_options`, never sent to fail.
    """

    model: str
    messages: list[Message]
    tools: list[ToolDefinition]
    session_id: str
    idempotency_key: str
    endpoint: ModelEndpoint = ModelEndpoint(provider_type="llmsim")
    attempt: int = 1
    profile: ModelProfile | None = None
    """None for a model nothing is known about: everything is sent as asked for."""
    reasoning_effort: str | None = None
    verbosity: str | None = None
    speed: str | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    """Overrides the model's options; for calls the engine makes itself."""
    prompt_cache: bool = True
    options: dict[str, object] = {}
    """The model's own configuration, as stored with the model; its meaning belongs to the driver."""
    states: Mapping[str, ProviderState] = {}
    """By message id; those of other providers are among them."""
    context: ProviderState | None = None
    """A provider-native compaction that stands for everything before the first message that is not the system message."""
    resume: ResumePoint | None = None


class Began(Struct, frozen=True, kw_only=True):
    """The provider took the request. With `resumable`, `ModelRequest.resume` can take it up again on another worker."""

    response_id: str
    resumable: bool = False


class TextDelta(Struct, frozen=True):
    """`cursor` is the provider's position after this piece, for `ResumePoint`; increasing."""

    text: str
    cursor: int | None = None


class ThinkingDelta(Struct, frozen=True):
    text: str
    cursor: int | None = None


class ToolCallReady(Struct, frozen=True):
    """A complete tool call: arguments are only useful whole. `id` is the provider's.

    `problem` says what was wrong with arguments that could not be read; they are empty then, and the call gets this as its error.
    `raw` is what the model wrote instead.
    """

    call: ToolCall
    problem: str | None = None
    raw: str | None = None


class Alive(Struct, frozen=True):
    """The provider sent something that says nothing (a ping, a step of silent reasoning): it has not stalled."""


class ReasoningItem(Struct, frozen=True, kw_only=True):
    """A provider's opaque reasoning item as clients may know of it: never its content."""

    item_id: str
    summary: list[str] = []
    token_count: int | None = None


FinishReason = Literal["stop", "tool_calls", "length", "content_filter", "refusal"]


class Finished(Struct, frozen=True, kw_only=True):
    """The terminal event. Disjoint usage: what a cache gave or took is not in `input_tokens`."""

    reason: FinishReason
    usage: TokenUsage
    response_id: str | None = None
    phase: Phase | None = None
    """Where the provider tells; otherwise the engine decides by whether tools were called."""
    state: list[dict[str, object]] = []
    """See `ProviderState.items`."""
    reasoning_items: list[ReasoningItem] = []
    dropped_options: list[str] = []
    """Names of request fields that this model does not take and that were therefore not sent."""


StreamEvent = Began | TextDelta | ThinkingDelta | ToolCallReady | Alive | Finished


class ModelErrorKind(StrEnum):
    """Why a model call failed; the table in `RETRYABLE` decides alone whether it is tried again."""

    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"
    TRANSPORT = "transport"
    STREAM_CUT = "stream_cut"
    SERVER_ERROR = "server_error"
    CIRCUIT_OPEN = "circuit_open"
    AUTHENTICATION = "authentication"
    QUOTA_EXHAUSTED = "quota_exhausted"
    USAGE_LIMIT = "usage_limit"
    ATTESTATION_REQUIRED = "attestation_required"
    UNSUPPORTED_MODEL = "unsupported_model"
    INVALID_REQUEST = "invalid_request"
    INVALID_TOOL_SCHEMA = "invalid_tool_schema"
    CONTENT_FILTERED = "content_filtered"
    CONTEXT_OVERFLOW = "context_overflow"
    NOT_CONFIGURED = "not_configured"
    OTHER = "other"


RETRYABLE = frozenset(
    {
        ModelErrorKind.RATE_LIMITED,
        ModelErrorKind.OVERLOADED,
        ModelErrorKind.TIMEOUT,
        ModelErrorKind.TRANSPORT,
        ModelErrorKind.STREAM_CUT,
        ModelErrorKind.SERVER_ERROR,
        ModelErrorKind.CIRCUIT_OPEN,
    }
)

BREAKER_FAILURES = RETRYABLE - {ModelErrorKind.CIRCUIT_OPEN, ModelErrorKind.RATE_LIMITED}
"""Failures that count against a model's circuit breaker. A rate limit is none: it is an answer, and says when to come back."""

_GENERIC = "I encountered an error while processing your request. Please try again later."
_RATE_LIMITED = "Rate limited by the AI provider. Please wait a moment."
_MISCONFIGURED = "There is a misconfiguration with the AI provider. Please contact support."
_UNAVAILABLE = "The AI provider is experiencing issues. Please try again shortly."

USER_ERRORS: dict[ModelErrorKind, tuple[str, str]] = {
    ModelErrorKind.RATE_LIMITED: ("provider_rate_limited", _RATE_LIMITED),
    ModelErrorKind.OVERLOADED: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.TIMEOUT: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.TRANSPORT: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.STREAM_CUT: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.SERVER_ERROR: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.CIRCUIT_OPEN: ("provider_unavailable", _UNAVAILABLE),
    ModelErrorKind.AUTHENTICATION: ("provider_misconfigured", _MISCONFIGURED),
    ModelErrorKind.QUOTA_EXHAUSTED: (
        "provider_quota_exhausted",
        "The AI provider's quota is used up. Please contact support.",
    ),
    ModelErrorKind.USAGE_LIMIT: (
        "provider_usage_limit_reached",
        "The AI provider's usage limit is reached. Please try again later.",
    ),
    ModelErrorKind.ATTESTATION_REQUIRED: (
        "provider_attestation_required",
        "The AI provider asks for a verification before this model can be used. Please contact support.",
    ),
    ModelErrorKind.UNSUPPORTED_MODEL: (
        "model_unavailable",
        "The chosen model is not available. Please choose another one.",
    ),
    ModelErrorKind.INVALID_REQUEST: ("processing_error", _GENERIC),
    ModelErrorKind.INVALID_TOOL_SCHEMA: ("invalid_tool_schema", _MISCONFIGURED),
    ModelErrorKind.CONTENT_FILTERED: ("content_filtered", "The AI provider's content filter refused this request."),
    ModelErrorKind.CONTEXT_OVERFLOW: ("request_too_large", "This conversation is too large for the model."),
    ModelErrorKind.NOT_CONFIGURED: ("model_not_configured", "No model is configured for this conversation."),
    ModelErrorKind.OTHER: ("processing_error", _GENERIC),
}
"""Error code and the text a user may see. A provider's own words stay in logs and in `reason.completed.error`."""

USER_ERROR_CODES: dict[str, str] = {
    **dict(USER_ERRORS.values()),
    "processing_error": _GENERIC,
    "max_iterations": "The turn reached its iteration limit.",
    "budget_exhausted": "The budget for this conversation is used up. It has to be topped up, or its limit raised, to go on.",
}


class ModelError(Exception):
    """A model call failed. The message is for operators; `USER_ERRORS` holds what users see.

    `fields` are for clients (`error_fields`): facts such as `resets_at` (Unix seconds) or the path of a refused schema.
    """

    def __init__(
        self,
        kind: ModelErrorKind,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.fields = dict(fields or {})

    @property
    def retryable(self) -> bool:
        return self.kind in RETRYABLE


class DiscoveredModel(Struct, frozen=True, kw_only=True):
    """A model as a provider's own list names it."""

    model_id: str
    display_name: str | None = None


class ModelDriver(Protocol):
    """One object per process and provider type; calls run side by side on it."""

    @property
    def name(self) -> str:
        """What `ProviderState.driver` says: drivers that understand each other's states share it."""
        ...

    def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        """Run one model call. Raises `ModelError`; cancelling the iteration must stop the call at the provider."""
        ...


@runtime_checkable
class ModelLister(Protocol):
    async def list_models(self, endpoint: ModelEndpoint) -> list[DiscoveredModel]:
        """The provider's own list, of models that can chat. Raises `ModelError`."""
        ...


@runtime_checkable
class ResponseStopper(Protocol):
    async def stop(self, endpoint: ModelEndpoint, response_id: str) -> None:
        """End a generation that goes on at the provider without us. Ending the iteration of `stream` does not."""
        ...


class NativeCompaction(Struct, frozen=True, kw_only=True):
    """`items` go into `ModelRequest.context` of later calls."""

    items: list[dict[str, object]]
    usage: TokenUsage


@runtime_checkable
class NativeCompactor(Protocol):
    async def compact(self, request: ModelRequest) -> NativeCompaction | None:
        """Have the provider compact the conversation of `request`; None when it will not. Raises `ModelError`."""
        ...
