"""Whether and how a Claude model thinks: what its name says about the `thinking` parameter it accepts.

The API refuses a wrong value instead of ignoring it, and what is wrong changed with nearly every generation. So the rule, by
line and version as they stand in the model's name (or, for a name that tells nothing, in its profile's):

    Opus, Sonnet, Haiku before 3.7          does not think
    3.7 up to 4.5                           thinks with a budget of tokens, when asked to
    4.6 up to 4.8                           decides itself (`adaptive`), when asked to
    Opus 5, Sonnet 5, Haiku 5.5             decides itself, unless that is switched off
    Sonnet 5.5                              the same; the switch is called `between_tools`
    Fable, Mythos, Opus 5.5, all newer ones always; effort is the only control

A name without a Claude line in it is a model nothing is known about: it gets what was asked for, in the current form. A profile
without `reasoning` wins over all of it.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from msgspec import Struct

from domain.model_profiles import ModelProfile

MIN_BUDGET_TOKENS: Final = 1024
"""The API's own minimum."""

_BUDGET_TOKENS: Final = {"low": 2_048, "medium": 8_192, "high": 24_576, "xhigh": 32_768}
"""Beyond 32k, the vendor says, there is little more to gain."""

_BUDGET_SHARE: Final = 0.75
"""Of `max_tokens`, which thinking and answer share: an answer must fit in, however long the thinking was."""

_LINE_FIRST: Final = re.compile(r"claude-(opus|sonnet|haiku|fable|mythos)(?:-(\d)(?:[-.](\d)(?!\d))?(?!\d))?")
_VERSION_FIRST: Final = re.compile(r"claude-(\d)(?:[-.](\d)(?!\d))?-(opus|sonnet|haiku)")


class Thinking(Enum):
    NEVER = auto()
    BUDGET = auto()
    ON_REQUEST = auto()
    UNLESS_OFF = auto()
    UNLESS_BETWEEN_TOOLS = auto()
    ALWAYS = auto()
    UNKNOWN = auto()


class ThinkingPlan(Struct, frozen=True, kw_only=True):
    """`thinking` and `effort` go into the request as they are. `on` None: not known, since nothing is known about the model."""

    on: bool | None
    thinking: dict[str, object] | None = None
    effort: str | None = None
    dropped: bool = False
    """The effort that was asked for could not be sent."""


def thinking_of(model: str, profile: ModelProfile | None) -> Thinking:
    if profile is not None and not profile.reasoning:
        return Thinking.NEVER
    named = _line_and_version(model)
    if named is None and profile is not None:
        named = _line_and_version(profile.name)
    if named is None:
        return Thinking.UNKNOWN
    line, version = named
    if line in ("fable", "mythos"):
        return Thinking.ALWAYS
    if version < (3, 7):
        return Thinking.NEVER
    if version < (4, 6):
        return Thinking.BUDGET
    if version < (5, 0):
        return Thinking.ON_REQUEST
    if version == (5, 5) and line == "sonnet":
        return Thinking.UNLESS_BETWEEN_TOOLS
    if version < (5, 5) or (version == (5, 5) and line == "haiku"):
        return Thinking.UNLESS_OFF
    return Thinking.ALWAYS


def plan_thinking(
    model: str, profile: ModelProfile | None, effort: str | None, *, max_tokens: int, loop_has_thinking: bool
) -> ThinkingPlan:
    """`loop_has_thinking` False: a tool loop is running whose first message has no thinking block to begin with.

    With a budget, the API refuses such a loop, so the call goes without thinking. Adaptive models take it.
    """
    mode = thinking_of(model, profile)
    if mode is Thinking.NEVER:
        return ThinkingPlan(on=False, dropped=effort not in (None, "none"))
    if effort is None:
        return _unasked(mode)
    if effort == "none":
        return _off(mode)
    if mode is Thinking.BUDGET:
        budget = min(_BUDGET_TOKENS[_level(effort, beyond_high=True)], int(max_tokens * _BUDGET_SHARE))
        if budget < MIN_BUDGET_TOKENS or not loop_has_thinking:
            return ThinkingPlan(on=False, dropped=True)
        return ThinkingPlan(on=True, thinking={"type": "enabled", "budget_tokens": budget})
    return ThinkingPlan(on=True, thinking=_ADAPTIVE, effort=_level(effort, beyond_high=_takes_xhigh(model, profile)))


_ADAPTIVE: Final[dict[str, object]] = {"type": "adaptive", "display": "summarized"}
"""Newer models send signatures without a text unless they are asked for one."""


def _unasked(mode: Thinking) -> ThinkingPlan:
    match mode:
        case Thinking.UNKNOWN:
            return ThinkingPlan(on=None)
        case Thinking.BUDGET | Thinking.ON_REQUEST:
            return ThinkingPlan(on=False)
        case _:
            return ThinkingPlan(on=True, thinking=_ADAPTIVE)


def _off(mode: Thinking) -> ThinkingPlan:
    match mode:
        case Thinking.ALWAYS:
            return ThinkingPlan(on=True, thinking=_ADAPTIVE, effort="low", dropped=True)
        case Thinking.UNLESS_BETWEEN_TOOLS:
            return ThinkingPlan(on=True, thinking={"type": "between_tools"})
        case _:
            return ThinkingPlan(on=False, thinking={"type": "disabled"})


def _level(effort: str, *, beyond_high: bool) -> str:
    if effort == "minimal":
        return "low"
    if effort == "xhigh" and not beyond_high:
        return "high"
    return effort if effort in _BUDGET_TOKENS else "high"


def _takes_xhigh(model: str, profile: ModelProfile | None) -> bool:
    """As the profile says; 4.6 does not take it yet."""
    if profile is not None and profile.reasoning_effort is not None:
        return any(choice.value == "xhigh" for choice in profile.reasoning_effort.values)
    named = _line_and_version(model)
    return named is None or named[0] in ("fable", "mythos") or named[1] > (4, 6)


def _line_and_version(name: str) -> tuple[str, tuple[int, int]] | None:
    """`claude-opus-4-6-20260101` is Opus 4.6, `claude-opus-4-20250514` Opus 4.0, `claude-3-7-sonnet-latest` Sonnet 3.7."""
    text = name.lower().replace(" ", "-")
    if found := _VERSION_FIRST.search(text):
        return found[3], (int(found[1]), int(found[2] or 0))
    if (found := _LINE_FIRST.search(text)) and (found[2] or found[1] in ("fable", "mythos")):
        return found[1], (int(found[2] or 0), int(found[3] or 0))
    return None
