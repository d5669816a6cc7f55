"""The seam to language models: what a driver is given, what it yields, and how it fails.

A driver is one module in `activities/llm` behind `ModelDriver`. It yields the stream events below and raises `ModelError`;
nothing else of a provider's vocabulary leaves it. A stream that ends without `Finished` is a failure (`STREAM_CUT`), because
an early-closed connection looks exactly like a short answer otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from domain.events import TokenUsage
from domain.messages import Message
from domain.tools import ToolCall, ToolDefinition


class ModelRequest(Struct, frozen=True, kw_only=True):
    """One model call. `messages` starts with the system message when there is one.

    `attempt` counts from 1 over the tries of the same step; `idempotency_key` is the same for all of them.
    """

    model: str
    messages: list[Message]
    tools: list[ToolDefinition]
    session_id: str
    idempotency_key: str
    attempt: int = 1
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    options: dict[str, object] = {}
    """The model's own configuration, as stored with the model; its meaning belongs to the driver."""


class TextDelta(Struct, frozen=True):
    text: str


class ThinkingDelta(Struct, frozen=True):
    text: str


class ToolCallReady(Struct, frozen=True):
    """A complete tool call: arguments are only useful whole. `id` is the provider's."""

    call: ToolCall


class Finished(Struct, frozen=True, kw_only=True):
    """The terminal event. `reason` is one of stop, tool_calls, length, content_filter, refusal."""

    reason: str
    usage: TokenUsage
    response_id: str | None = None


StreamEvent = TextDelta | ThinkingDelta | ToolCallReady | Finished


class ModelErrorKind(StrEnum):
    """Why a model call failed; the table in `RETRYABLE` decides alone whether it is tried again."""

    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"
    TRANSPORT = "transport"
    STREAM_CUT = "stream_cut"
    SERVER_ERROR = "server_error"
    AUTHENTICATION = "authentication"
    QUOTA_EXHAUSTED = "quota_exhausted"
    UNSUPPORTED_MODEL = "unsupported_model"
    INVALID_REQUEST = "invalid_request"
    INVALID_TOOL_SCHEMA = "invalid_tool_schema"
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
    }
)

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
    ModelErrorKind.AUTHENTICATION: ("provider_misconfigured", _MISCONFIGURED),
    ModelErrorKind.QUOTA_EXHAUSTED: ("provider_quota_exhausted", _MISCONFIGURED),
    ModelErrorKind.UNSUPPORTED_MODEL: ("model_unavailable", _MISCONFIGURED),
    ModelErrorKind.INVALID_REQUEST: ("processing_error", _GENERIC),
    ModelErrorKind.INVALID_TOOL_SCHEMA: ("invalid_tool_schema", _MISCONFIGURED),
    ModelErrorKind.CONTEXT_OVERFLOW: ("request_too_large", "This conversation is too large for the model."),
    ModelErrorKind.NOT_CONFIGURED: ("model_not_configured", "No model is configured for this conversation."),
    ModelErrorKind.OTHER: ("processing_error", _GENERIC),
}
"""Error code and the text a user may see. A provider's own words stay in logs and in `reason.completed.error`."""

USER_ERROR_CODES: dict[str, str] = {
    **dict(USER_ERRORS.values()),
    "processing_error": _GENERIC,
    "max_iterations": "The turn reached its iteration limit.",
}


class ModelError(Exception):
    """A model call failed. The message is for operators; `USER_ERRORS` holds what users see."""

    def __init__(self, kind: ModelErrorKind, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    @property
    def retryable(self) -> bool:
        return self.kind in RETRYABLE


class ModelDriver(Protocol):
    def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        """Run one model call. Raises `ModelError`; cancelling the iteration must stop the call at the provider."""
        ...
