"""What went wrong in a call of the Messages API: its error type first, its status second, its words last.

Type and status alone are not enough. Errors inside a stream come with status 200; a spend limit has the type of a rate limit;
a prompt that is too long, a refused tool schema, an empty account and blocked content are all `invalid_request_error`. The API
gives a code (`error.details.error_code`) for some of these; for the rest there are only its words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import msgspec

from activities.llm.failures import kind_of_status, retry_after_seconds
from domain.model import ModelError, ModelErrorKind

MAX_MESSAGE_CHARACTERS: Final = 1000
"""A gateway's error page must not become an event."""

_BY_TYPE: Final = {
    "api_error": ModelErrorKind.SERVER_ERROR,
    "authentication_error": ModelErrorKind.AUTHENTICATION,
    "billing_error": ModelErrorKind.QUOTA_EXHAUSTED,
    "not_found_error": ModelErrorKind.UNSUPPORTED_MODEL,
    "overloaded_error": ModelErrorKind.OVERLOADED,
    "permission_error": ModelErrorKind.AUTHENTICATION,
    "rate_limit_error": ModelErrorKind.RATE_LIMITED,
    "request_too_large": ModelErrorKind.CONTEXT_OVERFLOW,
    "timeout_error": ModelErrorKind.TIMEOUT,
}

_BY_CODE: Final = {
    "contract_spend_limit_reached": ModelErrorKind.USAGE_LIMIT,
    "enforced_spend_limit_reached": ModelErrorKind.USAGE_LIMIT,
    "linked_organization_billing_unavailable": ModelErrorKind.QUOTA_EXHAUSTED,
    "linked_organization_spend_limit_reached": ModelErrorKind.USAGE_LIMIT,
    "organization_on_hold": ModelErrorKind.AUTHENTICATION,
}

_BY_WORDS: Final = (
    (re.compile(r"content filtering policy", re.IGNORECASE), ModelErrorKind.CONTENT_FILTERED),
    (re.compile(r"prompt is too long|exceeds? (the )?context (limit|window)", re.IGNORECASE), ModelErrorKind.CONTEXT_OVERFLOW),
    (re.compile(r"credit balance is too low", re.IGNORECASE), ModelErrorKind.QUOTA_EXHAUSTED),
    (re.compile(r"reached your specified (workspace )?API usage limits", re.IGNORECASE), ModelErrorKind.USAGE_LIMIT),
)  # fmt: skip

_TOOL_SCHEMA: Final = re.compile(r"tools\.(\d+)\.(?:[\w.]*\.)?input_schema[\w.$/-]*")
_RESETS: Final = re.compile(r"regain access on (\d{4}-\d{2}-\d{2}) at (\d{2}:\d{2}) UTC")
_THINKING_REFUSED: Final = re.compile(
    r"invalid `?signature`? in `?thinking`?|expected `?thinking`? or `?redacted_thinking`?"
    r"|`?(?:redacted_)?thinking`? .*cannot be modified",
    re.IGNORECASE,
)


class _Details(msgspec.Struct, frozen=True):
    error_code: str | None = None


class _Error(msgspec.Struct, frozen=True):
    type: str | None = None
    message: str | None = None
    details: _Details | None = None


class _Body(msgspec.Struct, frozen=True):
    error: _Error
    request_id: str | None = None


def api_error(
    body: object, *, status: int, headers: Mapping[str, str], tool_names: Sequence[str] = (), secrets: Sequence[str] = ()
) -> ModelError:  # fmt: skip
    """The error for an error response, or for an `error` event in a stream. `tool_names` are in the order they were sent."""
    try:
        told = msgspec.convert(body, _Body)
    except msgspec.ValidationError:
        # Not the API's own words: a gateway in between, or a server that only resembles it.
        text = body if isinstance(body, str) else msgspec.json.encode(body, enc_hook=str).decode()
        told = _Body(error=_Error(message=text))
    message = told.error.message or "no message"
    kind = _kind(told.error, message, status)
    where = [part for part in (told.error.type, f"HTTP {status}", told.request_id or headers.get("request-id")) if part]
    return ModelError(
        kind,
        readable(f"Anthropic: {message}", secrets, suffix=f" ({', '.join(where)})"),
        retry_after_seconds=retry_after_seconds(headers),
        fields=_fields(kind, message, tool_names),
    )


def readable(text: str, secrets: Sequence[str], *, suffix: str = "") -> str:
    """Bounded, and without a key: providers repeat keys in their errors, and so do HTTP libraries."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text[: MAX_MESSAGE_CHARACTERS - len(suffix)] + suffix


def refuses_thinking(error: ModelError) -> bool:
    """Whether the API does not want the thinking blocks of earlier messages, so that the call may work without them.

    Their signatures hold for a model, an account and, on newer models, for everything that was said before them.
    """
    return error.kind is ModelErrorKind.INVALID_REQUEST and _THINKING_REFUSED.search(error.message) is not None


def _kind(error: _Error, message: str, status: int) -> ModelErrorKind:
    code = error.details.error_code if error.details else None
    if code in _BY_CODE:
        return _BY_CODE[code]
    if error.type in _BY_TYPE:
        return _BY_TYPE[error.type]
    if error.type in ("invalid_request_error", None):
        for words, kind in _BY_WORDS:
            if words.search(message):
                return kind
        if _TOOL_SCHEMA.search(message):
            return ModelErrorKind.INVALID_TOOL_SCHEMA
    if error.type == "invalid_request_error":
        return kind_of_status(status) if status >= 400 else ModelErrorKind.INVALID_REQUEST
    # A type nobody knows inside a stream whose request was accepted: the fault is not the request's.
    return kind_of_status(status) if status >= 400 else ModelErrorKind.SERVER_ERROR


def _fields(kind: ModelErrorKind, message: str, tool_names: Sequence[str]) -> dict[str, object]:
    if kind is ModelErrorKind.INVALID_TOOL_SCHEMA and (found := _TOOL_SCHEMA.search(message)):
        position = int(found[1])
        tool = {"tool": tool_names[position]} if position < len(tool_names) else {}
        return {"path": found[0][:200], **tool}
    if kind is ModelErrorKind.USAGE_LIMIT and (found := _RESETS.search(message)):
        with suppress(ValueError):
            resets = datetime.strptime(f"{found[1]} {found[2]}", "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
            return {"resets_at": int(resets.timestamp())}
    return {}
