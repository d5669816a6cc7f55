from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from activities.capabilities import test_faults as faults
from activities.capabilities.registry import ToolOutcome, builtin_registry, call_tool
from activities.capabilities.tool_call import INTERNAL_ERROR, MAX_RESULT_BYTES, truncated
from domain.capabilities import Tool, ToolContext, ToolError
from domain.events import ToolStatus
from domain.messages import TextPart
from domain.tools import SideEffect
from tests.tool_context import PlainContext

TOOLS = {tool.name: tool for capability in builtin_registry().list() for tool in capability.tools}


class Context(PlainContext):
    def __init__(self, timezone: str | None = None, attempt: int = 1) -> None:
        self.timezone = timezone
        self.attempt = attempt
        self.progress_reports: list[str] = []

    async def progress(self, message: str) -> None:
        self.progress_reports.append(message)


class Item(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    state: Literal["open", "done"]


class Arguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    days: Annotated[int, Meta(le=7)] = 1
    items: list[Item] = []


def tool(run: Callable[[ToolContext, Arguments], Awaitable[object]], **fields: object) -> Tool:
    return msgspec.structs.replace(Tool(name="probe", description="", arguments=Arguments, run=run), **fields)


def returning(value: object) -> Tool:
    async def run(_context: ToolContext, _arguments: Arguments) -> object:
        return value

    return tool(run)


def raising(error: BaseException) -> Tool:
    async def run(_context: ToolContext, _arguments: Arguments) -> object:
        raise error

    return tool(run)


def text(outcome: ToolOutcome) -> str:
    assert outcome.error is None, outcome.error
    assert outcome.result is not None
    (part,) = outcome.result
    assert isinstance(part, TextPart)
    return part.text


async def call(name: str, context: Context | None = None, /, **arguments: object) -> ToolOutcome:
    return await call_tool(TOOLS[name], context or Context(), arguments)


async def value(name: str, context: Context | None = None, /, **arguments: object) -> dict[str, object]:
    return json.loads(text(await call(name, context, **arguments)))


# call_tool


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (None, "null"),
        (Item(state="done"), '{"state":"done"}'),
    ],
)
async def test_a_result_becomes_one_text_part(given_value: object, expected: str):
    outcome = await call_tool(returning(given_value), Context(), {})
    assert text(outcome) == expected
    assert outcome.status is ToolStatus.SUCCESS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"days": "3"}, ["`days`", "Expected `int`, got `str`", '"maximum":7']),
        ({"days": 9}, ["`days`", "<= 7"]),
        ({"day": 1}, ["unknown field `day`", '"days"']),
        ({"items": [{"state": "open"}, {"state": "shut"}]}, ["`items[1].state`", "'shut'", '"enum":["done","open"]']),
        ({"items": [{}]}, ["`items[0]`", "missing required field `state`"]),
    ],
)
async def test_invalid_arguments_are_explained_to_the_model(arguments: dict[str, object], expected: list[str]):
    outcome = await call_tool(returning("never"), Context(), arguments)
    assert outcome.status is ToolStatus.ERROR
    assert outcome.result is None
    assert outcome.error is not None
    assert outcome.error.startswith("Invalid arguments for `probe`")
    for part in expected:
        assert part in outcome.error


async def test_an_expected_failure_shows_its_text():
    outcome = await call_tool(raising(ToolError("no such city")), Context(), {})
    assert (outcome.result, outcome.error, outcome.status) == (None, "no such city", ToolStatus.ERROR)


@pytest.mark.parametrize("error", [RuntimeError("secret"), TimeoutError("secret"), KeyError("secret")])
async def test_an_unexpected_failure_is_logged_and_hidden(error: Exception, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        outcome = await call_tool(raising(error), Context(), {})
    assert (outcome.error, outcome.status) == (INTERNAL_ERROR, ToolStatus.ERROR)
    assert "secret" in caplog.text


async def test_a_result_that_is_not_json_is_an_internal_failure():
    assert (await call_tool(returning(object()), Context(), {})).error == INTERNAL_ERROR


@pytest.mark.parametrize("side_effect", SideEffect)
async def test_a_timeout_stops_the_tool_and_says_what_is_known(side_effect: SideEffect):
    stopped = asyncio.Event()

    async def run(_context: ToolContext, _arguments: Arguments) -> object:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    outcome = await call_tool(tool(run, timeout_seconds=0.01, side_effect=side_effect), Context(), {})
    assert outcome.status is ToolStatus.TIMEOUT
    assert stopped.is_set()
    assert outcome.error is not None
    assert "0.01 seconds" in outcome.error
    assert ("may have taken effect" in outcome.error) == (side_effect is SideEffect.AT_MOST_ONCE)


async def test_cancellation_goes_through():
    running = asyncio.Event()

    async def run(_context: ToolContext, _arguments: Arguments) -> object:
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(call_tool(tool(run), Context(), {}))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@given(st.text(min_size=1, max_size=50), st.integers(min_value=0, max_value=3))
def test_a_long_text_is_cut_between_characters_and_fits(piece: str, slack: int):
    long = piece * (MAX_RESULT_BYTES // len(piece) + slack)
    cut = truncated(long)
    assert len(cut.encode()) <= MAX_RESULT_BYTES
    if len(long.encode()) <= MAX_RESULT_BYTES:
        assert cut == long
    else:
        kept, _, note = cut.rpartition("\n\n[Output truncated: ")
        assert long.startswith(kept)
        assert f"of {len(long.encode()):,} bytes" in note
        assert len(kept.encode()) > MAX_RESULT_BYTES - 300


def test_a_lone_surrogate_does_not_get_into_a_result():
    assert truncated("a\ud800b") == "a?b"


async def test_a_long_error_is_cut_too():
    outcome = await call_tool(raising(ToolError("x" * 100_000)), Context(), {})
    assert outcome.error is not None
    assert len(outcome.error) <= MAX_RESULT_BYTES


# current_time


async def test_time_in_each_format():
    before = int(time.time())
    unix = await value("get_current_time", timezone="Europe/Berlin", format="unix")
    assert before <= int(str(unix["current_time"])) <= time.time()
    iso = await value("get_current_time", timezone="Asia/Kolkata")
    assert str(iso["current_time"]).endswith("+05:30")
    assert iso["timezone"] == "Asia/Kolkata"
    human = await value("get_current_time", timezone="UTC", format="human")
    assert str(human["current_time"]).endswith("(UTC+00:00)")


@pytest.mark.parametrize(("users", "expected"), [("Asia/Tokyo", "Asia/Tokyo"), (None, "UTC"), ("Mars/Base", "UTC")])
async def test_default_time_zone_is_the_users_or_utc(users: str | None, expected: str):
    assert (await value("get_current_time", Context(timezone=users)))["timezone"] == expected


@pytest.mark.parametrize("zone", ["Mars/Base", "", "America", "../etc/passwd", "/etc/localtime", "ü", "a\0b"])
async def test_an_unknown_time_zone_tells_the_form(zone: str):
    outcome = await call("get_current_time", timezone=zone)
    assert outcome.error is not None
    assert "Area/City" in outcome.error


# stateless_todo_list


async def test_todos_are_counted_and_more_than_one_in_progress_is_noted():
    todos = [{"content": "a", "activeForm": "doing a", "status": "in_progress"}]
    one = await value("write_todos", todos=todos)
    assert (one["total"], one["pending"], one["in_progress"], one["completed"]) == (1, 0, 1, 0)
    assert "note" not in one
    assert "note" in await value("write_todos", todos=todos * 2)


async def test_a_todo_with_an_unknown_status_is_refused():
    outcome = await call("write_todos", todos=[{"content": "a", "activeForm": "b", "status": "done"}])
    assert outcome.error is not None
    assert "`todos[0].status`" in outcome.error


# test_math


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [("add", 2, 3, "5"), ("subtract", 2, 3.5, "-1.5"), ("multiply", 4, 2.5, "10"), ("divide", 1, 4, "0.25")],
)
async def test_arithmetic(name: str, a: float, b: float, expected: str):
    assert text(await call(name, a=a, b=b)) == f'{{"result":{expected}}}'


async def test_division_by_zero_and_overflow_are_told_to_the_model():
    assert (await call("divide", a=5, b=0)).error == "Cannot divide 5 by zero."
    assert (await call("multiply", a=1e308, b=10)).error == "The result is too large to be represented."


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_arithmetic_never_fails_unexpectedly(a: float, b: float):
    for name in ("add", "subtract", "multiply", "divide"):
        assert asyncio.run(call(name, a=a, b=b)).error != INTERNAL_ERROR


# test_weather


async def test_weather_is_the_same_for_the_same_place():
    first = await value("get_weather", location="Lisbon")
    again = await value("get_weather", location=" lisbon ")
    assert {**first, "location": ""} == {**again, "location": ""}
    fahrenheit = await value("get_weather", location="Lisbon", units="fahrenheit")
    assert fahrenheit["temperature"] == round(int(str(first["temperature"])) * 9 / 5 + 32)
    assert first != await value("get_weather", location="Oslo")


@pytest.mark.parametrize(("arguments", "days"), [({}, 3), ({"days": 7}, 7)])
async def test_forecast_has_the_days_asked_for(arguments: dict[str, object], days: int):
    forecast = (await value("get_forecast", location="Lisbon", **arguments))["forecast"]
    assert isinstance(forecast, list)
    assert [entry["day"] for entry in forecast] == list(range(1, days + 1))
    assert (await call("get_forecast", location="Lisbon", days=8)).status is ToolStatus.ERROR


# test_faults


async def test_sleep_reports_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "_PROGRESS_EVERY_SECONDS", 0.01)
    context = Context(attempt=2)
    slept = await value("test_sleep", context, seconds=0.05, label="nap")
    assert slept == {"label": "nap", "slept_seconds": 0.05, "attempt": 2}
    assert context.progress_reports
    assert all(report.startswith("nap: ") for report in context.progress_reports)


@pytest.mark.parametrize("name", ["test_effect_pure", "test_effect_idempotent", "test_effect_once"])
async def test_an_effect_leaves_one_line_per_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "effects"
    monkeypatch.setenv(faults.EFFECTS_FILE_VARIABLE, str(file))
    await value(name, Context(attempt=1), name="order")
    result = await value(name, Context(attempt=2), seconds=0.001)
    assert file.read_text() == "call_1 1 order\ncall_1 2 effect\n"
    assert result["idempotency_key"] == "key_1"


async def test_an_effect_without_a_file_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(faults.EFFECTS_FILE_VARIABLE, raising=False)
    assert (await call("test_effect_once")).status is ToolStatus.SUCCESS


def test_the_effect_tools_differ_in_their_side_effect_class_only():
    classes = [TOOLS[f"test_effect_{name}"].side_effect for name in ("pure", "idempotent", "once")]
    assert classes == [SideEffect.PURE, SideEffect.IDEMPOTENT, SideEffect.AT_MOST_ONCE]
    assert TOOLS["test_serial"].concurrency_class == "test_serial"


async def test_failures_as_ordered():
    assert (await call("test_fail", message="boom")).error == "boom"
    assert (await call("test_fail", message="boom", internal=True)).error == INTERNAL_ERROR


@pytest.mark.parametrize("size", [0, 1, 1000, MAX_RESULT_BYTES])
async def test_large_has_the_size_asked_for(size: int):
    assert len(text(await call("test_large", bytes=size))) == size


async def test_serial_tells_when_it_ran():
    ran = await value("test_serial", seconds=0.001, label="a")
    assert str(ran["started_at"]) <= str(ran["ended_at"])
