"""Every error that may leave the engine, its machine-readable code and its HTTP status.

    EverrunsError                      500 internal_error
      InvalidInput                     400 invalid_input
        MalformedId                    400 malformed_id
        UnknownEventType               400 unknown_event_type
        UnknownCapability              400 unknown_capability
        UnknownModel                   400 unknown_model
        InputTooLarge                  400 input_too_large
        MalformedBody                  400 malformed_body
        InvalidChangeReason            400 invalid_change_reason
        TooManyRunning                 400 too_many_running
      Unauthenticated                  401 unauthenticated
      Forbidden                        403 forbidden
        ReadOnlyResource               403 read_only
      NotFound                         404 not_found
      MethodNotAllowed                 405 method_not_allowed
      Conflict                         409 conflict
        NameTaken                      409 name_taken
        AlreadyExists                  409 already_exists
        ContentChanged                 409 content_changed
        Archived                       409 archived
        NotWaitingForToolResults       409 not_waiting_for_tool_results
        NotWaitingForAnswers           409 not_waiting_for_answers
        NotWaitingForApprovals         409 not_waiting_for_approvals
        ResourceLimit                  409 resource_limit
        SessionBusy                    409 session_busy
        HistoryGone                    409 history_gone
        KeyRefused                     409 key_refused
      PayloadTooLarge                  413 payload_too_large
      UnsupportedMediaType             415 unsupported_media_type
      DatabaseLimit                    422 database_limit
      TooManyStreams                   429 sse_limit
      ProviderUnavailable              502 provider_unavailable
      McpServerUnavailable             502 mcp_server_unavailable
      DependencyUnavailable            503 dependency_unavailable
      EncryptionNotConfigured          503 encryption_not_configured

The class docstring is the default message. Texts are for users: no SQL, no host, no stack.
"""

from __future__ import annotations

import re
from typing import ClassVar


class EverrunsError(Exception):
    """Internal server error"""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str | None = None, *, field: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.field = field
        super().__init__(self.message)


class InvalidInput(EverrunsError):
    """The request is not valid"""

    code = "invalid_input"
    status = 400


class MalformedId(InvalidInput):
    """An id in the request is malformed"""

    code = "malformed_id"


class UnknownEventType(InvalidInput):
    """A filter names an event type that does not exist"""

    code = "unknown_event_type"


class UnknownCapability(InvalidInput):
    """A capability reference names no capability"""

    code = "unknown_capability"


class UnknownModel(InvalidInput):
    """A model id names no enabled model"""

    code = "unknown_model"


class InputTooLarge(InvalidInput):
    """Input exceeds allowed limits"""

    code = "input_too_large"


class MalformedBody(InvalidInput):
    """The request body cannot be read as JSON"""

    code = "malformed_body"


class InvalidChangeReason(InvalidInput):
    """The change reason is not acceptable"""

    code = "invalid_change_reason"


class TooManyRunning(InvalidInput):
    """Too many sessions or turns are running in this organization; retry later"""

    code = "too_many_running"


class Unauthenticated(EverrunsError):
    """Authentication is required"""

    code = "unauthenticated"
    status = 401


class Forbidden(EverrunsError):
    """This is not allowed"""

    code = "forbidden"
    status = 403


class ReadOnlyResource(Forbidden):
    """Built-in resources cannot be changed"""

    code = "read_only"


class NotFound(EverrunsError):
    """Not found"""

    code = "not_found"
    status = 404


class MethodNotAllowed(EverrunsError):
    """This method is not supported here"""

    code = "method_not_allowed"
    status = 405


class Conflict(EverrunsError):
    """The request conflicts with the current state"""

    code = "conflict"
    status = 409


class NameTaken(Conflict):
    """The name is already in use"""

    code = "name_taken"


class AlreadyExists(Conflict):
    """There is a file or a directory at this path already"""

    code = "already_exists"


class ContentChanged(Conflict):
    """The file is not what the caller has seen"""

    code = "content_changed"


class Archived(Conflict):
    """The resource is archived and cannot be edited or newly assigned"""

    code = "archived"


class NotWaitingForToolResults(Conflict):
    """Session is not waiting for tool results"""

    code = "not_waiting_for_tool_results"


class NotWaitingForAnswers(Conflict):
    """No question of this session is waiting for an answer"""

    code = "not_waiting_for_answers"


class NotWaitingForApprovals(Conflict):
    """No tool call of this session is waiting for a decision"""

    code = "not_waiting_for_approvals"


class ResourceLimit(Conflict):
    """The organization's limit for this resource is reached"""

    code = "resource_limit"


class SessionBusy(Conflict):
    """The session is at work; wait for the end of the turn, or cancel it"""

    code = "session_busy"


class HistoryGone(Conflict):
    """What files and values were at that event is not known any more; `files: false` does without"""

    code = "history_gone"


class KeyRefused(Conflict):
    """The AI provider did not accept the API key"""

    code = "key_refused"


class PayloadTooLarge(EverrunsError):
    """The request body is too large"""

    code = "payload_too_large"
    status = 413


class UnsupportedMediaType(EverrunsError):
    """This content type is not supported here"""

    code = "unsupported_media_type"
    status = 415


class DatabaseLimit(EverrunsError):
    """The session has as many databases as it may have"""

    code = "database_limit"
    status = 422


class InvalidSkill(EverrunsError):
    """The skill is not valid"""

    code = "invalid_skill"
    status = 422


class TooManyStreams(EverrunsError):
    """SSE connection limit reached"""

    code = "sse_limit"
    status = 429


class ProviderUnavailable(EverrunsError):
    """The AI provider could not be asked; try again shortly"""

    code = "provider_unavailable"
    status = 502


class McpServerUnavailable(EverrunsError):
    """The MCP server could not be asked"""

    code = "mcp_server_unavailable"
    status = 502


class DependencyUnavailable(EverrunsError):
    """A service that this request needs is not reachable right now"""

    code = "dependency_unavailable"
    status = 503


class EncryptionNotConfigured(EverrunsError):
    """Secrets cannot be stored: SECRETS_ENCRYPTION_KEY is not set"""

    code = "encryption_not_configured"
    status = 503


_FIELD_AT_FAULT = re.compile(r"Object (?:missing required|contains unknown) field `(.+)`")


def invalid_field(error: Exception, root: str) -> InvalidInput:
    """A msgspec `ValidationError` as an error that names the field, `root` being the name of what was decoded.

    msgspec reports the path to the enclosing object when a field is missing or unknown; the name is in the message.
    """
    message, _, path = str(error).partition(" - at `$")
    field = root + path.removesuffix("`")
    if match := _FIELD_AT_FAULT.fullmatch(message):
        field = f"{field}.{match[1]}"
    return InvalidInput(f"{field}: {message}", field=field)


def error_classes() -> list[type[EverrunsError]]:
    """Every class above, base first: what the documentation and the envelope test walk through."""
    found: list[type[EverrunsError]] = []
    waiting: list[type[EverrunsError]] = [EverrunsError]
    while waiting:
        cls = waiting.pop(0)
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found
