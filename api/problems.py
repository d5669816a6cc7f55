"""Every error response: RFC 9457 problem details plus the `error` member that the SDKs read. One handler, one envelope.

Whatever is raised becomes an `EverrunsError` first; its class alone decides on code and status. What we did not expect is logged
with its traceback under the request's id and answered with a text that says nothing.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Final

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, SerializationException, ValidationException
from litestar.openapi import ResponseSpec
from msgspec import Struct

from db.patient_state import is_away
from domain.errors import (
    DependencyUnavailable,
    EverrunsError,
    Forbidden,
    InvalidInput,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)

log = structlog.get_logger("api")

MEDIA_TYPE: Final = "application/problem+json"

RETRY_AFTER_SECONDS: Final = {"sse_limit": 5, "dependency_unavailable": 5, "too_many_running": 30}
"""Long enough for a stream or a turn to end, or for a restarted dependency to be back."""

NUL_SQLSTATES: Final = frozenset({"22021", "22P05"})
"""PostgreSQL's text holds every character but U+0000."""
NESTING_SQLSTATE: Final = "54001"

_MISSING: Final = re.compile(r"Object missing required field `(.+)`")

_BY_STATUS: Final[dict[int, type[EverrunsError]]] = {
    400: InvalidInput,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
}


class AllowedAction(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A follow-up the caller can take."""

    rel: str
    href: str | None = None
    method: str | None = None
    operation_id: str | None = None
    hint: str | None = None


class ErrorSummary(Struct, frozen=True, kw_only=True):
    """The same error once more, in the shape the SDKs read."""

    code: str
    message: str


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error. `code` is stable and machine-readable; `field` is the path of the input at fault."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str
    error: ErrorSummary
    field: str | None = None
    allowed_actions: list[AllowedAction] | None = None
    retry_after_seconds: int | None = None


_ACTIONS: Final[dict[str, AllowedAction]] = {
    "name_taken": AllowedAction(rel="get-existing", hint="Read or update the resource that has this name."),
    "archived": AllowedAction(rel="unarchive", hint='PATCH the archived resource with {"status": "active"}.'),
    "too_many_running": AllowedAction(rel="retry-later"),
    "sse_limit": AllowedAction(rel="retry-later"),
    "dependency_unavailable": AllowedAction(rel="retry-later"),
    "provider_unavailable": AllowedAction(rel="retry-later"),
}


def declared(*statuses: int) -> dict[int, ResponseSpec]:
    """The error responses of an operation, for its OpenAPI description."""
    return {
        status: ResponseSpec(
            Problem, description=HTTPStatus(status).phrase, media_type=MEDIA_TYPE, generate_examples=False
        )
        for status in sorted({*statuses, 400, 404, 500})
    }


def problem_response(request: Request[Any, Any, Any], raised: Exception) -> Response[Problem]:
    error = as_error(request, raised)
    if error.status >= 500 and not isinstance(raised, EverrunsError):
        log.error("request failed", exc_info=raised)
    headers = dict(getattr(raised, "headers", None) or {})
    retry_after = RETRY_AFTER_SECONDS.get(error.code)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    action = _ACTIONS.get(error.code)
    problem = Problem(
        type="about:blank",
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        code=error.code,
        detail=error.message,
        instance=request.scope["path"],
        error=ErrorSummary(code=error.code, message=error.message),
        field=error.field,
        allowed_actions=[action] if action else None,
        retry_after_seconds=retry_after,
    )
    return Response(problem, status_code=error.status, media_type=MEDIA_TYPE, headers=headers)


def as_error(request: Request[Any, Any, Any], raised: Exception) -> EverrunsError:
    match raised:
        case EverrunsError():
            # The message of a 5xx may be meant for operators, unless its class was made for callers.
            return raised if type(raised) is not EverrunsError else EverrunsError()
        case ValidationException():
            return _invalid(raised)
        case SerializationException():
            return MalformedBody()
        case HTTPException() if raised.status_code == 413:
            limit = request.route_handler.resolve_request_max_body_size()  # type: ignore[attr-defined]
            return PayloadTooLarge(f"The request body is too large: the limit here is {limit} bytes")
        case HTTPException() if raised.status_code == 400 and isinstance(raised.__cause__, SerializationException):
            return MalformedBody()
        case HTTPException() if raised.status_code in _BY_STATUS:
            return _BY_STATUS[raised.status_code]()
        case RecursionError():
            return MalformedBody("The request body is nested too deeply")
        case _ if is_away(raised):
            return DependencyUnavailable()
        case _ if (state := getattr(raised, "sqlstate", None)) in NUL_SQLSTATES:
            return InvalidInput("Text must not contain the character U+0000")
        case _ if state == NESTING_SQLSTATE:
            return MalformedBody("The request body is nested too deeply")
        case _:
            return EverrunsError()


def _invalid(raised: ValidationException) -> InvalidInput:
    """Litestar's list of what is wrong, as one sentence per field; the first field is `field`."""
    extra = raised.extra if isinstance(raised.extra, list) else []
    found = [_place(str(item.get("key") or ""), str(item.get("message") or "")) for item in extra]
    if not found:
        return InvalidInput()
    if found[0] == ("", "'data'"):
        return MalformedBody("A JSON body is required")
    text = "; ".join(f"{field}: {message}" if field else message for field, message in found)
    return InvalidInput(text, field=found[0][0] or None)


def _place(key: str, message: str) -> tuple[str, str]:
    """`data` is the body's name in our handlers, not in the request; a missing field is named in the message only."""
    field = "" if key == "data" else key
    if match := _MISSING.fullmatch(message):
        field = f"{field}.{match[1]}" if field else match[1]
    return field, message
