"""The step an activity is running: what the mirror opened in the log, found by the activity's body through a context variable.

Temporal hands an activity its input only. The body of a step needs what opening it loaded, and must not be able to open or
close it by itself: that is the mirror's (`activities.mirror`).
"""

from __future__ import annotations

from contextvars import ContextVar

from msgspec import Struct

from domain.turns import ReasonBriefing, StepRef, ToolClaim


class ReasonStep(Struct, frozen=True, kw_only=True):
    ref: StepRef
    briefing: ReasonBriefing


class CallStep(Struct, frozen=True, kw_only=True):
    ref: StepRef
    claim: ToolClaim


_current: ContextVar[ReasonStep | CallStep] = ContextVar("everruns_step")


def enter(step: ReasonStep | CallStep) -> None:
    _current.set(step)


def reason_step() -> ReasonStep:
    step = _current.get()
    if not isinstance(step, ReasonStep):
        raise TypeError("this activity is not running as a reason step")
    return step


def call_step() -> CallStep:
    step = _current.get()
    if not isinstance(step, CallStep):
        raise TypeError("this activity is not running as a tool call")
    return step
