"""What went wrong at a server that speaks OpenAI's dialect, as a `ModelError`.

Dozens of servers write OpenAI's error object in their own hand, so a failure is recognised by what it says before by its HTTP
status: error code, then words, then type, then status. Inside a stream there is no status to go by at all.

No key gets into a message: providers echo parts of it ("Incorrect API key provided: sk-ab***yz"), so whatever looks like one is
masked, and any eight characters in a row of the key that was really sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from activities.llm.failures import kind_of_status, retry_after_seconds
from domain.model import ModelError, ModelErrorKind

MAX_MESSAGE_CHARACTERS: Final = 1000
_MAX_PATH_CHARACTERS: Final = 200
_KEY_PIECE_CHARACTERS: Final = 8
"""Long enough that ordinary words do not hit a key, short enough that what remains of one is of no use."""

_MASK: Final = "[key]"
_KEY_LIKE: Final = re.compile(
    r"\b(?:sk|rk|gsk|fw|xai|nvapi|hf|csk|tgp)[-_][\w*.…-]{4,}|\bAIza[\w*.…-]{4,}|\bbearer\s+[^\s,;'\"]+|[\w.-]*\*{3,}[\w.*-]*",
    re.IGNORECASE,
)

_BY_CODE: Final = {
    name: kind
    for kind, names in {
        ModelErrorKind.QUOTA_EXHAUSTED: "insufficient_quota billing_hard_limit_reached billing_not_active"
        " insufficient_credits insufficient_balance payment_required",
        ModelErrorKind.USAGE_LIMIT: "usage_limit_reached usage_limit_exceeded usage_not_included",
        ModelErrorKind.RATE_LIMITED: "rate_limit_exceeded rate_limit_error rate_limit too_many_requests ratelimiterror"
        " requests tokens resource_exhausted",
        ModelErrorKind.CONTEXT_OVERFLOW: "context_length_exceeded context_window_exceeded exceed_context_size_error"
        " string_above_max_length request_too_large",
        ModelErrorKind.INVALID_TOOL_SCHEMA: "invalid_function_parameters",
        ModelErrorKind.CONTENT_FILTERED: "content_filter content_policy_violation responsibleaipolicyviolation"
        " invalid_prompt image_content_policy_violation",
        ModelErrorKind.UNSUPPORTED_MODEL: "model_not_found deploymentnotfound unsupported_model model_not_available"
        " model_not_supported notfounderror not_found_error not_found",
        ModelErrorKind.AUTHENTICATION: "invalid_api_key authentication_error unauthenticated invalid_authentication"
        " authenticationerror permission_denied permission_error permissiondeniederror account_deactivated api_key_invalid",
        ModelErrorKind.OVERLOADED: "overloaded_error overloaded server_overloaded engine_overloaded slow_down unavailable"
        " service_unavailable provider_overloaded",
        ModelErrorKind.TIMEOUT: "timeout request_timeout deadline_exceeded timeout_error",
        ModelErrorKind.SERVER_ERROR: "server_error internal_error internal_server_error internalservererror api_error"
        " internal bad_gateway provider_unavailable",
        ModelErrorKind.INVALID_REQUEST: "invalid_request_error badrequesterror invalid_argument failed_precondition"
        " unprocessable_entity unsupported_parameter unsupported_value",
    }.items()
    for name in names.split()
}

_UNSPECIFIC: Final = frozenset(
    {
        ModelErrorKind.INVALID_REQUEST,
        ModelErrorKind.RATE_LIMITED,
        ModelErrorKind.SERVER_ERROR,
        ModelErrorKind.AUTHENTICATION,
        ModelErrorKind.UNSUPPORTED_MODEL,
    }
)
"""Kinds that a code or type names when the words beside it may still say something narrower."""

_BY_WORDS: Final = (
    (ModelErrorKind.ATTESTATION_REQUIRED, r"organization must be verified"),
    (
        ModelErrorKind.CONTEXT_OVERFLOW,
        r"maximum context length|context length exceeded|prompt is too long|input is too long|exceeds? the (?:model'?s )?"
        r"(?:available |maximum )?context|exceeds? the (?:maximum|max) number of tokens|input token count.*exceeds"
        r"|request too large for|context[ _](?:window|length|size).*exceeded|longer than the (?:model'?s )?context",
    ),
    (
        ModelErrorKind.INVALID_TOOL_SCHEMA,
        r"invalid schema for function|invalid 'tools?\[\d+\]|function_declarations\[\d+\]|tool schema",
    ),
    (
        ModelErrorKind.CONTENT_FILTERED,
        r"content management policy|requires moderation|flagged as potentially violating",
    ),
    (
        ModelErrorKind.AUTHENTICATION,
        r"api[ _]key not valid|api_key_invalid|(?:incorrect|invalid) api key|insufficient permissions",
    ),
    (
        ModelErrorKind.QUOTA_EXHAUSTED,
        r"exceeded your current quota|insufficient (?:quota|balance|credits|funds)|requires more credits|billing hard limit",
    ),
    (
        ModelErrorKind.UNSUPPORTED_MODEL,
        r"not a valid model|model .{0,200}(?:does not exist|not found)|models/\S+ is not found",
    ),
    (ModelErrorKind.OVERLOADED, r"\boverloaded|\bslow down\b"),
)
_WORDS: Final = tuple((kind, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for kind, pattern in _BY_WORDS)

_URL: Final = re.compile(r"https?://[^\s)\]>\"']+")
_FUNCTION: Final = re.compile(r"invalid schema for function '([^']{1,128})'", re.IGNORECASE)
_CONTEXT: Final = re.compile(r"in context=\(([^)]*)\)", re.IGNORECASE)
_DECLARATION: Final = re.compile(r"\btools?\[\d+\][\w.\[\]]*|function_declarations\[\d+\][\w.\[\]]*")
_TRY_AGAIN: Final = re.compile(r"(?:try again|retry) in ([\d.]+)\s?(ms|s)\b", re.IGNORECASE)
_DURATION: Final = re.compile(r"([\d.]+)s")


class Reported(Struct, frozen=True, kw_only=True):
    """An error object as some server wrote it. `code` and `type` are lower case; a numeric code has become the status."""

    code: str = ""
    type: str = ""
    param: str = ""
    message: str = ""
    status: int | None = None
    facts: Mapping[str, object] = {}


def model_error(error: Exception) -> ModelError:
    """For whatever the SDK or its HTTP library raised. A `ModelError` passes through."""
    import httpx2
    import openai

    match error:
        case ModelError():
            return error
        case openai.APITimeoutError() | httpx2.TimeoutException() | TimeoutError():
            return _plain(ModelErrorKind.TIMEOUT, error)
        case openai.APIConnectionError():
            cause = error.__cause__
            # A wrong address stays wrong: only a connection that could work is tried again.
            refused = isinstance(cause, httpx2.UnsupportedProtocol | httpx2.InvalidURL | httpx2.LocalProtocolError)
            return _plain(ModelErrorKind.INVALID_REQUEST if refused else ModelErrorKind.TRANSPORT, error)
        case openai.APIResponseValidationError():
            return _plain(ModelErrorKind.SERVER_ERROR, error)
        case openai.APIStatusError():
            reported = read_error(error.body, error.message, error.status_code)
            return _classified(reported, headers=error.response.headers, keys=_keys_of(error))
        case openai.APIError():
            return _classified(read_error(error.body, error.message), keys=_keys_of(error))
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return _plain(ModelErrorKind.INVALID_REQUEST, error)
        case httpx2.TransportError() | OSError():
            return _plain(ModelErrorKind.TRANSPORT, error)
        case ValueError():  # among them JSONDecodeError: the server sent something that is no event
            return _plain(ModelErrorKind.SERVER_ERROR, error)
        case _:
            return _plain(ModelErrorKind.OTHER, error)


def error_of(
    code: object, error_type: object, message: object, status: int | None = None, *, keys: Iterable[str] = ()
) -> ModelError:
    """For an error inside a stream, where the HTTP status (200) says nothing. `keys` are masked in the message."""
    body = {"code": code, "type": error_type, "message": message}
    return _classified(read_error(body, "", status), keys=keys)


def error_in(body: object, *, keys: Iterable[str] = ()) -> ModelError:
    """For an error object inside a stream, with all it tells."""
    return _classified(read_error(body, "The provider reported an error"), keys=keys)


def read_error(body: object, fallback: str, status: int | None = None) -> Reported:
    """Find code, type and message in any of the shapes servers send; `fallback` when the body has no message."""
    # Gemini's endpoint answers with a list of one.
    found = body[0] if isinstance(body, list) and body else body
    if isinstance(found, dict) and isinstance(found.get("error"), dict | str):
        found = found["error"]
    if isinstance(found, str):
        return Reported(message=found or fallback, status=status)
    if not isinstance(found, dict):
        return Reported(message=fallback, status=status)
    code, kind = found.get("code"), found.get("type") or found.get("status")
    if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()):
        status, code = status or int(code), None
    message = found.get("message") or found.get("detail") or fallback
    return Reported(
        code=_lower(code),
        type=_lower(kind),
        param=found["param"] if isinstance(found.get("param"), str) else "",
        message=(message if isinstance(message, str) else str(message)) + _upstream(found),
        status=status,
        facts=found,
    )


def masked(text: str, keys: Iterable[str] = ()) -> str:
    """Bounded, and without anything that is or looks like a key."""
    for key in keys:
        text = _without(text, key)
    return _KEY_LIKE.sub(_MASK, text)[:MAX_MESSAGE_CHARACTERS]


def _classified(
    reported: Reported, *, headers: Mapping[str, str] | None = None, keys: Iterable[str] = ()
) -> ModelError:
    kind = _kind(reported)
    told = " ".join(part for part in (str(reported.status or ""), reported.code or reported.type) if part)
    return ModelError(
        kind,
        masked(f"{told}: {reported.message}" if told else reported.message, keys),
        retry_after_seconds=_retry_after(reported, headers or {}),
        fields=_fields(kind, reported, keys),
    )


def _kind(reported: Reported) -> ModelErrorKind:
    code, kind = _BY_CODE.get(reported.code), _BY_CODE.get(reported.type)
    if code is not None and code not in _UNSPECIFIC:
        return code
    if kind is not None and kind not in _UNSPECIFIC:
        return kind
    said = next((kind for kind, words in _WORDS if words.search(reported.message)), None)
    if said is ModelErrorKind.QUOTA_EXHAUSTED and _will_refill(reported):
        return ModelErrorKind.RATE_LIMITED
    if said is not None:
        return said
    if reported.status == 403 and _mapping(reported.facts.get("metadata")).get("reasons"):
        return ModelErrorKind.CONTENT_FILTERED  # OpenRouter's moderation
    told = code or kind
    if told is not None and told is not ModelErrorKind.INVALID_REQUEST:
        return told
    # OpenAI calls nearly every 4xx an invalid request: the status knows better.
    if reported.status:
        return kind_of_status(reported.status)
    # What breaks an answer off and says nothing about why is the server's trouble.
    return told or ModelErrorKind.SERVER_ERROR


def _will_refill(reported: Reported) -> bool:
    """Gemini says the same words of a quota per minute and of one per day; its details tell which, and when to try again."""
    details = [_mapping(detail) for detail in _list(reported.facts.get("details"))]
    daily = any(
        "PerDay" in str(_mapping(violation).get("quotaId"))
        for detail in details
        for violation in _list(detail.get("violations"))
    )
    return not daily and any("retryDelay" in detail for detail in details)


def _fields(kind: ModelErrorKind, reported: Reported, keys: Iterable[str]) -> dict[str, object]:
    match kind:
        case ModelErrorKind.USAGE_LIMIT:
            resets_at = reported.facts.get("resets_at")
            return {"resets_at": int(resets_at)} if isinstance(resets_at, int | float) else {}
        case ModelErrorKind.ATTESTATION_REQUIRED:
            url = _URL.search(reported.message)
            gates: dict[str, object] = {"gate_types": ["organization_verification"]}
            return ({"url": masked(url[0].rstrip(".,;"), keys)} if url else {}) | gates
        case ModelErrorKind.INVALID_TOOL_SCHEMA:
            path = _schema_path(reported)
            return {"path": masked(path, keys)[:_MAX_PATH_CHARACTERS]} if path else {}
        case _:
            return {}


def _schema_path(reported: Reported) -> str:
    """The tool's name and, where it is told, the way into its schema."""
    function, context = _FUNCTION.search(reported.message), _CONTEXT.search(reported.message)
    if function:
        inside = re.findall(r"[\w$-]+", context[1]) if context else []
        return ".".join([function[1], *inside])
    declaration = _DECLARATION.search(reported.message)
    return reported.param or (declaration[0] if declaration else "")


def _retry_after(reported: Reported, headers: Mapping[str, str]) -> float | None:
    told = retry_after_seconds(headers)
    if told is not None:
        return told
    for detail in _list(reported.facts.get("details")):
        if delay := _DURATION.fullmatch(str(_mapping(detail).get("retryDelay"))):
            return _number(delay[1])
    if words := _TRY_AGAIN.search(reported.message):
        seconds = _number(words[1])
        return None if seconds is None else seconds / (1000 if words[2].lower() == "ms" else 1)
    return None


def _upstream(found: Mapping[str, object]) -> str:
    """OpenRouter hides what the model's own provider said in `metadata.raw`."""
    raw = _mapping(found.get("metadata")).get("raw")
    return f" ({raw})" if isinstance(raw, str) and raw else ""


def _plain(kind: ModelErrorKind, error: Exception) -> ModelError:
    cause = error.__cause__
    text = str(error) or type(error).__name__
    if cause is not None and str(cause) and str(cause) not in text:
        text += f" ({cause})"
    return ModelError(kind, masked(text, _keys_of(error)))


def _keys_of(error: Exception) -> list[str]:
    """What the failed request was sent with."""
    try:
        headers = getattr(error, "request").headers  # noqa: B009  # not every exception that has it has a request
    except (AttributeError, RuntimeError):
        return []
    return [headers.get("authorization", "").removeprefix("Bearer "), headers.get("api-key", "")]


def _without(text: str, key: str) -> str:
    """Mask every run of characters that also stands in the key."""
    size = _KEY_PIECE_CHARACTERS
    pieces = {key[at : at + size] for at in range(len(key) - size + 1)}
    if not pieces:
        return text
    kept: list[str] = []
    hidden_until = -1
    for at, character in enumerate(text):
        if text[at : at + size] in pieces:
            if hidden_until < at:
                kept.append(_MASK)
            hidden_until = at + size
        if at >= hidden_until:
            kept.append(character)
    return "".join(kept)


def _lower(value: object) -> str:
    return value.strip().lower() if isinstance(value, str) else ""


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
