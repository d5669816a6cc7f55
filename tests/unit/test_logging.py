import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from infra.logging import CHATTY_LOGGERS, configure_logging, mask_secrets
from infra.settings import MASK, load_settings


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """Logging as it was, afterwards: it is global."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in CHATTY_LOGGERS}
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old_level in levels.items():
        logging.getLogger(name).setLevel(old_level)
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(output: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_our_lines_and_those_of_libraries_have_the_same_format_and_carry_the_ids(output: io.StringIO) -> None:
    configure_logging("info", "json", stream=output)
    with structlog.contextvars.bound_contextvars(request_id="req", session_id="session_1", turn_id="turn_1"):
        structlog.get_logger("ours").info("hello %s", "there", count=3)
        logging.getLogger("temporalio.worker").warning("careful %s", "now", extra={"run": "r"})
    ours, theirs = lines(output)
    ids = {"request_id": "req", "session_id": "session_1", "turn_id": "turn_1"}
    assert {"event": "hello there", "level": "info", "logger": "ours", "count": 3, **ids}.items() <= ours.items()
    wanted = {"event": "careful now", "level": "warning", "logger": "temporalio.worker", "run": "r", **ids}
    assert wanted.items() <= theirs.items()
    assert ours.keys() - {"count"} == theirs.keys() - {"run"}


def test_console_lines_are_readable_and_masked_too(output: io.StringIO) -> None:
    configure_logging("debug", "console", stream=output)
    structlog.get_logger("ours").info("hello", token="hunter2", session_id="session_1")
    shown = output.getvalue()
    assert "hello" in shown
    assert "session_id=session_1" in shown
    assert "hunter2" not in shown
    assert "\x1b" not in shown, "no colours when it is not a terminal"


def test_chatty_libraries_only_warn_and_the_level_holds(output: io.StringIO) -> None:
    configure_logging("debug", "json", stream=output)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).info("a request")
        logging.getLogger(f"{name}.child").info("a request")
    assert output.getvalue() == ""
    configure_logging("error", "json", stream=output)
    logging.getLogger("httpx").warning("a warning")
    structlog.get_logger("ours").warning("a warning")
    assert output.getvalue() == ""


def test_uvicorn_does_not_write_a_second_copy(output: io.StringIO) -> None:
    own = io.StringIO()
    logging.getLogger("uvicorn.access").addHandler(logging.StreamHandler(own))
    configure_logging("info", "json", stream=output)
    logging.getLogger("uvicorn.access").warning("GET /")
    assert own.getvalue() == ""
    assert [line["event"] for line in lines(output)] == ["GET /"]


def test_what_libraries_attach_for_their_own_formatters_is_left_out(output: io.StringIO) -> None:
    configure_logging("info", "json", stream=output)
    logging.getLogger("uvicorn.error").warning("bad request", extra={"color_message": "\x1b[1mbad request\x1b[0m"})
    (line,) = lines(output)
    assert line["event"] == "bad request"
    assert "color_message" not in line


def test_a_traceback_shows_neither_local_variables_nor_passwords_in_urls(output: io.StringIO) -> None:
    configure_logging("info", "json", stream=output)
    try:
        local_secret = "hunter2"
        raise ValueError(f"no connection to postgresql://u:{local_secret}@db/x")
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    (line,) = lines(output)
    assert "ValueError: no connection to postgresql://u:***@db/x" in str(line["exception"])
    assert "hunter2" not in output.getvalue()


def test_logging_the_settings_does_not_leak_them(output: io.StringIO) -> None:
    configure_logging("info", "json", stream=output)
    settings = load_settings(
        {"DEV_MODE": "1", "DATABASE_URL": "postgres://u:hunter2@h/x", "TEMPORAL_API_KEY": "hunter3"}
    )
    structlog.get_logger("ours").info("started", settings=settings, nested=[{"it": settings}])
    assert "hunter" not in output.getvalue()
    assert "everruns-turns" in output.getvalue()


SECRET_KEYS = [
    "authorization",
    "Authorization",
    "api_key",
    "apiKey",
    "OPENAI_API_KEY",
    "x-api-key",
    "password",
    "db_password",
    "token",
    "access_token",
    "refreshToken",
    "client_secret",
    "private_key",
    "set-cookie",
    "credentials",
]


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_values_of_secret_looking_keys_are_masked_at_any_depth(key: str) -> None:
    assert mask_secrets(None, "info", {key: "hunter2"}) == {key: MASK}
    assert mask_secrets(None, "info", {"headers": [{key: "hunter2"}]}) == {"headers": [{key: MASK}]}


HARMLESS = {
    "input_tokens": 12,
    "token_count": 12,
    "tokens": "many",
    "api_key_set": True,
    "password": None,
    "key": "session_1",
    "idempotency_key": "call_1",
    "secretary": "Ann",
    "event": "at 12:30 a@b.c wrote",
}


def test_harmless_values_are_left_alone() -> None:
    assert mask_secrets(None, "info", dict(HARMLESS)) == HARMLESS
