"""The retry table's first half: what an HTTP status means, whichever provider says it.

A provider's own error type or code comes first (a stream reports errors with status 200); this is for what it leaves open.
`domain.model.RETRYABLE` is the second half.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from domain.model import ModelErrorKind

_BY_STATUS: Final = {
    401: ModelErrorKind.AUTHENTICATION,
    402: ModelErrorKind.QUOTA_EXHAUSTED,
    403: ModelErrorKind.AUTHENTICATION,
    404: ModelErrorKind.UNSUPPORTED_MODEL,
    408: ModelErrorKind.TIMEOUT,
    409: ModelErrorKind.SERVER_ERROR,
    413: ModelErrorKind.CONTEXT_OVERFLOW,
    425: ModelErrorKind.SERVER_ERROR,
    429: ModelErrorKind.RATE_LIMITED,
    503: ModelErrorKind.OVERLOADED,
    529: ModelErrorKind.OVERLOADED,
}


def kind_of_status(status: int) -> ModelErrorKind:
    """For an HTTP error whose type says no more. Every other 4xx is an invalid request."""
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return ModelErrorKind.SERVER_ERROR if status >= 500 else ModelErrorKind.INVALID_REQUEST


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, or `Retry-After` in seconds or as an HTTP date (RFC 9110, 10.2.3); None when there is none to read."""
    milliseconds = headers.get("retry-after-ms")
    text = headers.get("retry-after")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        if text is None:
            return None
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def parse_arguments(text: str) -> tuple[dict[str, object], str | None]:
    """A tool call's arguments as the model wrote them, and what is wrong with them if they are not a JSON object."""
    if not text.strip():
        return {}, None
    try:
        arguments = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        return {}, f"The arguments are not valid JSON ({error}). Call the tool again with a JSON object."
    if not isinstance(arguments, dict):
        return {}, "The arguments are not a JSON object. Call the tool again with one."
    return arguments, None
