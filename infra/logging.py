"""Logs: one JSON object per line in production, lines for people in dev; ours and every library's in the same format.

Decisions the code can't show:
- Everything passes through the standard library's root logger, on standard error; standard output belongs to commands.
- What is bound with `structlog.contextvars.bind_contextvars` (request_id, session_id, turn_id) is on every line of that
  task, library lines included.
- Secrets are masked in the last step, when every part of a line has been put together. Tracebacks are rendered without
  local variables for the same reason.
"""

import logging
import re
import sys
from collections.abc import Mapping
from typing import TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from infra.settings import MASK, LogFormat, LogLevel, mask_passwords

# Clients log every request at INFO, model calls included; uvicorn and the worker every step of their start and stop,
# which our own lines already tell.
CHATTY_LOGGERS = (
    "httpx2",
    "httpx",
    "httpcore2",
    "httpcore",
    "openai",
    "anthropic",
    "mcp",
    "uvicorn",
    "temporalio.worker",
)

# Attributes that libraries put on their records for their own formatters and filters: the same text with terminal
# colours in it, and a mark.
FORMATTER_EXTRAS = ("color_message", "__temporal_error_identifier")

# uvicorn configures its own handlers; a line must not come out twice, in two formats.
SELF_CONFIGURED_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar")

_SECRET_WORDS = frozenset(
    {"authorization", "password", "passwd", "token", "secret", "credential", "credentials", "cookie"}
)
_SECRET_NAMES = frozenset({"api_key", "apikey", "private_key", "encryption_key", "access_key", "set_cookie"})
_WORD_BREAK = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")


def configure_logging(level: LogLevel, log_format: LogFormat, *, stream: TextIO | None = None) -> None:
    """Set logging up for this process; a second call replaces the first."""
    output: TextIO = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        # A person at a terminal knows what day it is.
        structlog.processors.TimeStamper(fmt="iso", utc=True)
        if log_format == "json"
        else structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer(serializer=_to_json)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), tidy_extras],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, mask_secrets, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in SELF_CONFIGURED_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def tidy_extras(logger: WrappedLogger, method_name: str, event: EventDict) -> EventDict:
    """The structlog processor for what libraries attach to their lines."""
    for name in FORMATTER_EXTRAS:
        event.pop(name, None)
    # Temporal's Rust core attaches its whole entry, most of which the line has already.
    if fields := getattr(event.pop("temporal_log", None), "fields", None):
        event["fields"] = fields
    return event


def mask_secrets(logger: WrappedLogger, method_name: str, event: EventDict) -> EventDict:
    """The structlog processor: hides the values of secret-looking keys, at any depth, and passwords inside texts."""
    for key, value in event.items():
        event[key] = MASK if _is_secret(key, value) else _masked(value)
    return event


def _masked(value: object) -> object:
    if isinstance(value, str):
        return mask_passwords(value) if "@" in value or "=" in value else value
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(str(key), item) else _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    # Not left to the encoder: it would write out every field of a Struct, where a repr may be careful (Settings is).
    return mask_passwords(repr(value))


def _is_secret(key: str, value: object) -> bool:
    # Numbers are counts (`token_count`) and flags (`api_key_set`), never the secret itself.
    if value is None or isinstance(value, bool | int | float):
        return False
    words = [word.lower() for word in _WORD_BREAK.split(key) if word]
    if not _SECRET_WORDS.isdisjoint(words):
        return True
    name = "_".join(words)
    return any(name == secret or name.endswith(f"_{secret}") for secret in _SECRET_NAMES)


def _to_json(event: EventDict, **_: object) -> str:
    return msgspec.json.encode(event).decode()
