"""Tools that are slow, fail, or leave a trace of every time they ran: for tests, and for watching the engine recover.

With the environment variable `EVERRUNS_TEST_EFFECTS_FILE`, each `test_effect_*` tool appends one line to that file per run, which
is how a test counts real effects instead of believing the log.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.clock import timestamp
from domain.tools import SideEffect

EFFECTS_FILE_VARIABLE = "EVERRUNS_TEST_EFFECTS_FILE"

MAX_SLEEP_SECONDS = 600
MAX_LARGE_BYTES = 10_000_000
_TIMEOUT_SECONDS = MAX_SLEEP_SECONDS + 60.0
_PROGRESS_EVERY_SECONDS = 1.0

Label = Annotated[str, Meta(max_length=200, description="Repeated in progress reports and in the result.")]


class Sleep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seconds: Annotated[float, Meta(ge=0, le=MAX_SLEEP_SECONDS, description="How long to sleep.")]
    label: Label | None = None


class Effect(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Names the effect in the file.")] = (
        "effect"
    )
    seconds: Annotated[
        float,
        Meta(ge=0, le=MAX_SLEEP_SECONDS / 2, description="How long to sleep before, and again after, the effect."),
    ] = 0


class Fail(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    message: Annotated[str, Meta(max_length=10_000, description="The error's text.")] = "Failed as asked."
    internal: Annotated[
        bool, Meta(description="Fail with an unexpected exception, whose text the model never sees.")
    ] = False


class Large(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bytes: Annotated[int, Meta(ge=0, le=MAX_LARGE_BYTES, description="Size of the result.")]


async def sleep(context: ToolContext, arguments: Sleep) -> dict[str, object]:
    clock = asyncio.get_running_loop().time
    began = clock()
    label = arguments.label or "sleeping"
    while (left := began + arguments.seconds - clock()) > 0:
        await asyncio.sleep(min(left, _PROGRESS_EVERY_SECONDS))
        if left > _PROGRESS_EVERY_SECONDS:
            await context.progress(f"{label}: {clock() - began:.0f} of {arguments.seconds:g} s")
    return {"label": arguments.label, "slept_seconds": arguments.seconds, "attempt": context.attempt}


async def effect(context: ToolContext, arguments: Effect) -> dict[str, object]:
    await _sleep(arguments.seconds)
    _record(f"{context.tool_call_id} {context.attempt} {arguments.name}\n")
    await _sleep(arguments.seconds)
    return {"name": arguments.name, "attempt": context.attempt, "idempotency_key": context.idempotency_key}


async def fail(_context: ToolContext, arguments: Fail) -> object:
    if arguments.internal:
        raise RuntimeError(arguments.message)
    raise ToolError(arguments.message)


async def large(_context: ToolContext, arguments: Large) -> str:
    line = "{:07}: the quick brown fox jumps over the lazy dog\n"
    lines = arguments.bytes // len(line.format(0)) + 1
    return "".join(line.format(number) for number in range(lines))[: arguments.bytes]


async def serial(_context: ToolContext, arguments: Sleep) -> dict[str, object]:
    began = timestamp(datetime.now(UTC))
    await _sleep(arguments.seconds)
    return {"label": arguments.label, "started_at": began, "ended_at": timestamp(datetime.now(UTC))}


async def _sleep(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds)


def _record(line: str) -> None:
    """One unbuffered append: what was written survives a kill of the process, and lines of several workers do not mix."""
    path = os.environ.get(EFFECTS_FILE_VARIABLE)
    if path:
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())


def _tool(
    name: str,
    description: str,
    arguments: type[Struct],
    run: Callable[..., Awaitable[object]],
    side_effect: SideEffect,
    concurrency_class: str | None = None,
) -> Tool:
    return Tool(
        name=name,
        display_name=name.replace("_", " ").capitalize(),
        description=description,
        arguments=arguments,
        run=run,
        side_effect=side_effect,
        concurrency_class=concurrency_class,
        timeout_seconds=_TIMEOUT_SECONDS,
    )


CAPABILITY = Capability(
    id="test_faults",
    name="Test Faults",
    description="Slow, failing and counting tools, for testing how the engine behaves. Not for production agents.",
    category="Testing",
    icon="bug",
    tools=(
        _tool("test_sleep", "Sleep, reporting progress every second.", Sleep, sleep, SideEffect.IDEMPOTENT),
        _tool("test_effect_pure", "Leave a trace; declared pure.", Effect, effect, SideEffect.PURE),
        _tool("test_effect_idempotent", "Leave a trace; declared idempotent.", Effect, effect, SideEffect.IDEMPOTENT),
        _tool("test_effect_once", "Leave a trace; declared at-most-once.", Effect, effect, SideEffect.AT_MOST_ONCE),
        _tool("test_fail", "Fail with the given text.", Fail, fail, SideEffect.PURE),
        _tool("test_large", "Return a text of the given size.", Large, large, SideEffect.PURE),
        _tool(
            "test_serial",
            "Sleep; calls of this tool run one after another.",
            Sleep,
            serial,
            SideEffect.IDEMPOTENT,
            "test_serial",
        ),
    ),
)
