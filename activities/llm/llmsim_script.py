"""The language of the simulated provider: a script says what the model answers, how fast, and how it fails.

    Script    FixedScript | EchoScript | LoremScript | EmptyScript | ErrorScript | TurnsScript
      Timing  what every mode and every turn shares: delays, stall, cut, error
      Turn    one model call of a TurnsScript

Every number has a bound: scripts come from clients, and a simulated hour must not occupy a worker for a day.
`docs/llmsim.md` documents every field; a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from domain.errors import InvalidInput, invalid_field
from domain.model import ModelError, ModelErrorKind

DEFAULT_TEXT = "Hello! I'm a simulated LLM response."
DEFAULT_LOREM_TOKENS = 200
SCRIPT_KEY = "llmsim"
"""Where a message's `metadata` holds its script."""

MAX_TOKENS = 100_000
MAX_TEXT_CHARACTERS = 4 * MAX_TOKENS
MAX_DELAY_MS = 10 * 60 * 1000
MAX_TURNS = 1000
MAX_TOOL_CALLS_PER_TURN = 128
"""Four times what a turn runs side by side, so that queueing can be shown."""
MAX_ATTEMPTS = 1000

Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Position = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
DelayMs = Annotated[int, Meta(ge=0, le=MAX_DELAY_MS)]
Attempts = Annotated[int, Meta(ge=1, le=MAX_ATTEMPTS)]


class ErrorClass(StrEnum):
    RATE_LIMIT = "rate_limit"
    TIMEOUT = "timeout"
    TRANSPORT = "transport"
    OVERLOADED = "overloaded"
    AUTHENTICATION = "authentication"
    QUOTA_EXHAUSTED = "quota_exhausted"
    UNSUPPORTED_MODEL = "unsupported_model"
    INVALID_RESPONSE = "invalid_response"
    INVALID_REQUEST = "invalid_request"
    CONTEXT_OVERFLOW = "context_overflow"
    INVALID_TOOL_SCHEMA = "invalid_tool_schema"
    SERVER_ERROR = "server_error"
    OTHER = "other"


ERROR_KINDS: dict[ErrorClass, ModelErrorKind] = {
    ErrorClass.RATE_LIMIT: ModelErrorKind.RATE_LIMITED,
    ErrorClass.TIMEOUT: ModelErrorKind.TIMEOUT,
    ErrorClass.TRANSPORT: ModelErrorKind.TRANSPORT,
    ErrorClass.OVERLOADED: ModelErrorKind.OVERLOADED,
    ErrorClass.AUTHENTICATION: ModelErrorKind.AUTHENTICATION,
    ErrorClass.QUOTA_EXHAUSTED: ModelErrorKind.QUOTA_EXHAUSTED,
    ErrorClass.UNSUPPORTED_MODEL: ModelErrorKind.UNSUPPORTED_MODEL,
    # A whole but unreadable answer would be unreadable again: not retried, unlike a stream that was cut.
    ErrorClass.INVALID_RESPONSE: ModelErrorKind.OTHER,
    ErrorClass.INVALID_REQUEST: ModelErrorKind.INVALID_REQUEST,
    ErrorClass.CONTEXT_OVERFLOW: ModelErrorKind.CONTEXT_OVERFLOW,
    ErrorClass.INVALID_TOOL_SCHEMA: ModelErrorKind.INVALID_TOOL_SCHEMA,
    ErrorClass.SERVER_ERROR: ModelErrorKind.SERVER_ERROR,
    ErrorClass.OTHER: ModelErrorKind.OTHER,
}


class ErrorSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A failure of the provider. With `attempts`, only the first N attempts of a step fail."""

    error_class: ErrorClass = field(name="class")
    message: Text | None = None
    retry_after_seconds: Annotated[float, Meta(ge=0, le=MAX_DELAY_MS / 1000)] | None = None
    attempts: Attempts | None = None

    def strikes(self, attempt: int) -> bool:
        return self.attempts is None or attempt <= self.attempts

    def exception(self) -> ModelError:
        return ModelError(
            ERROR_KINDS[self.error_class],
            self.message or f"Simulated error: {self.error_class}",
            retry_after_seconds=self.retry_after_seconds,
        )


class Timing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When tokens come and when they stop coming. A token here is one streamed piece: a word, or a tool call."""

    first_token_delay_ms: DelayMs | None = None
    inter_token_delay_ms: DelayMs | None = None
    stall_after_tokens: Position | None = None
    cut_after_tokens: Position | None = None
    fault_attempts: Attempts | None = None
    """With it, only the first N attempts of a step stall or are cut."""
    error: ErrorSpec | None = None
    error_after_tokens: Position | None = None
    overflow_above_tokens: Tokens | None = None
    """A longer prompt is refused as too large, as by a model whose context window nobody knows."""

    def __post_init__(self) -> None:
        if self.error_after_tokens is not None and self.error is None:
            raise ValueError("`error_after_tokens` needs an `error`")


class ScriptedToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: dict[str, object] = {}
    id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    when: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)] | None = None
    """Only called when the newest user message, or anything after it, contains this text."""


class Turn(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model call. Streams its thinking, then its text, then its tool calls."""

    text: Text | None = None
    thinking: Text | None = None
    tool_calls: Annotated[list[ScriptedToolCall], Meta(max_length=MAX_TOOL_CALLS_PER_TURN)] = []
    finish_reason: Literal["stop", "tool_calls", "length", "content_filter", "refusal"] | None = None


class FixedScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="fixed"):
    text: Text = DEFAULT_TEXT


class EchoScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="echo"):
    pass


class LoremScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="lorem"):
    tokens: Tokens = DEFAULT_LOREM_TOKENS


class EmptyScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="empty"):
    pass


class ErrorScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="error"):
    """Fails; when `error.attempts` is used up, answers with `text`."""

    error: ErrorSpec  # pyright: ignore[reportGeneralTypeIssues] # required here, optional in the other modes
    text: Text = DEFAULT_TEXT


class TurnsScript(Timing, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode", tag="script"):
    turns: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_TURNS)]
    on_exhausted: Literal["repeat_last", "error", "loop"] = "repeat_last"


Script = FixedScript | EchoScript | LoremScript | EmptyScript | ErrorScript | TurnsScript

_ACCEPTED: dict[str, tuple[str, ...]] = {
    "mode": ("fixed", "echo", "lorem", "empty", "error", "script"),
    "class": tuple(ErrorClass),
    "finish_reason": ("stop", "tool_calls", "length", "content_filter", "refusal"),
    "on_exhausted": ("repeat_last", "error", "loop"),
}


def parse_script(obj: object, *, root: str = "metadata.llmsim") -> Script:
    """Decode a script, or raise `InvalidInput` whose `field` is the full path of what is wrong."""
    try:
        return msgspec.convert(obj, Script)
    except msgspec.ValidationError as error:
        invalid = invalid_field(error, root)
        accepted = _ACCEPTED.get((invalid.field or "").rpartition(".")[2])
        if accepted is None:
            raise invalid from None
        raise InvalidInput(f"{invalid.message}; accepted: {', '.join(accepted)}", field=invalid.field) from None


def turn_at(script: TurnsScript, index: int) -> Turn:
    """The turn that model call number `index` plays, with the script's own timing where the turn sets none."""
    count = len(script.turns)
    if index >= count:
        if script.on_exhausted == "error":
            raise ModelError(ModelErrorKind.OTHER, f"The llmsim script has {count} turns and call {index + 1} was made")
        index = index % count if script.on_exhausted == "loop" else count - 1
    turn = script.turns[index]
    inherited = {
        name: getattr(script, name)
        for name in Timing.__struct_fields__
        # An error and its position belong together: a turn's own error does not strike where the script's would.
        if getattr(turn, name) is None and not (name == "error_after_tokens" and turn.error is not None)
    }
    return msgspec.structs.replace(turn, **inherited)
