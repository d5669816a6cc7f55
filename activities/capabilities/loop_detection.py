"""Refuses calls that have come to the same result again and again.

Looked at is the running turn: everything since the user's last message. A repetition is the same call with the same arguments and
the same result, or two or three calls in turn that do so. The turn does not end by this: the model reads what it does and usually
stops, and the iteration limit is there for one that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from domain.capabilities import CallCheck, Capability, Refused
from domain.messages import Message, Role, ToolResultPart
from domain.tools import ToolCall

MAX_PERIOD: Final = 3
"""Calls that take turns."""

REFUSED: Final = "Not executed: this call repeats itself"
_TEXTS: Final = (
    "{refused}. It has been made {times} times in this turn with the same result each time. Do something else: change the "
    "arguments, use another tool, or answer with what you have.",
    "{refused}, together with the calls before it: the same {period} calls have followed each other {times} times with the same "
    "results. Do something else, or answer with what you have.",
)


class LoopDetection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    threshold: Annotated[
        int, Meta(ge=2, le=100, description="So often a call may come to the same result in a row.")
    ] = 3
    exempt: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=128)]],
        Meta(
            max_length=100,
            description="Tools that may be repeated, such as those that wait; `*` and `?` are wildcards.",
        ),
    ] = msgspec.field(default_factory=lambda: ["wait_task"])


class _Made(Struct, frozen=True):
    """A call as far as it counts. No result: it stands in the same answer and has none yet."""

    name: str
    arguments: bytes
    result: bytes | None


def check_call(check: CallCheck, config: Struct | None) -> Refused | None:
    assert isinstance(config, LoopDetection)
    if any(fnmatchcase(check.call.name, pattern) for pattern in config.exempt):
        return None
    made = [*_calls_of_turn(check.history), *(_made(call, None) for call in check.earlier)]
    new = _made(check.call, None)
    for period in range(1, MAX_PERIOD + 1):
        if _repeats(made, new, period, config.threshold):
            text = _TEXTS[period > 1].format(refused=REFUSED, times=config.threshold, period=period)
            return Refused(text=text)
    return None


def _repeats(made: Sequence[_Made], new: _Made, period: int, times: int) -> bool:
    """Whether the last `times` rounds of `period` calls were the same, and `new` begins another."""
    rounds = made[-period * times :]
    if len(rounds) < period * times or not _same(rounds[-period], new):
        return False
    if period > 1 and all(_same(one, rounds[0]) for one in rounds):
        return False
    return all(_same(rounds[place], rounds[place - period]) for place in range(period, len(rounds)))


def _same(one: _Made, other: _Made) -> bool:
    if (one.name, one.arguments) != (other.name, other.arguments):
        return False
    return one.result is None or other.result is None or one.result == other.result


def _calls_of_turn(history: Sequence[Message]) -> list[_Made]:
    """In order. A refusal of ours has the result of the calls before it: it changes nothing."""
    begin = next((place for place in range(len(history), 0, -1) if history[place - 1].role is Role.USER), 0)
    results: dict[str, bytes] = {}
    for message in history[begin:]:
        for part in message.content:
            if isinstance(part, ToolResultPart) and not (part.error or "").startswith(REFUSED):
                results[part.tool_call_id] = msgspec.json.encode((part.result, part.error), order="deterministic")
    return [
        _made(ToolCall(id=part.id, name=part.name, arguments=part.arguments), results.get(part.id))
        for message in history[begin:]
        for part in message.tool_calls
    ]


def _made(call: ToolCall, result: bytes | None) -> _Made:
    return _Made(call.name, msgspec.json.encode(call.arguments, order="deterministic"), result)


CAPABILITY = Capability(
    id="loop_detection",
    name="Loop Detection",
    description="Notices calls that are repeated with the same result again and again, and tells the model to do something else.",
    category="Behaviour",
    icon="repeat",
    config=LoopDetection,
    check_call=check_call,
)
