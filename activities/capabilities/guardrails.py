"""Declared checks of answers, tool calls and tool results, run in this process.

What each stage looks at: `output` the text of an answer, and its thinking, as it is written; `tool_use` a call's name and its
arguments as JSON, before it runs; `tool_output` what a server-side tool returned or failed with, before anybody else sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import UNSET, Struct

from activities.guardrails.checks import AnyCheck, Guardrails, Stage, ToolPatternCheck, matcher_of
from activities.guardrails.examples import EXAMPLES, GuardrailExample
from activities.guardrails.output_checks import OutputChecks, hit, reason_code
from domain.capabilities import (
    CallCheck,
    Capability,
    CheckedResult,
    GuardrailHit,
    Noted,
    OutputGuard,
    Refused,
    ResultCheck,
    SessionView,
)

__all__ = ["CAPABILITY", "EXAMPLES", "DryRun", "DryRunHit", "GuardrailExample", "Guardrails", "Stage", "dry_run"]

ID: Final = "guardrails"
BLOCKED_CALL: Final = "This call is not allowed here ({check}). Do not repeat it; find another way or tell the user."
BLOCKED_RESULT: Final = "The result of this call was withheld by a content rule."
EXCERPT_CHARACTERS: Final = 120


class DryRunHit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`matched` is a short excerpt of what was found."""

    check_id: str
    check_index: int
    rule_type: str
    stage: str
    action: str
    reason_code: str
    matched: str | None = None
    replacement: str | None = None


class DryRun(Struct, frozen=True, kw_only=True):
    blocked: bool
    hits: list[DryRunHit]


def dry_run(config: Guardrails, stage: Stage, text: str, tool_name: str | None = None) -> DryRun:
    """What a configuration would find in a text, without a session."""
    hits = [
        DryRunHit(
            check_id=config.check_id(index),
            check_index=index,
            rule_type=check.type,
            stage=check.stage,
            action=config.action(check),
            reason_code=reason_code(check),
            matched=matched[:EXCERPT_CHARACTERS],
            replacement=None if check.replacement is UNSET else str(check.replacement),
        )
        for index, check, matched in _found(config, stage, text, tool_name)
    ]
    return DryRun(blocked=any(one.action == "block" for one in hits), hits=hits)


def check_call(check: CallCheck, config: Struct | None) -> Refused | Noted | None:
    assert isinstance(config, Guardrails)
    if not _has(config, "tool_use"):
        return None
    arguments = msgspec.json.encode(check.call.arguments).decode("utf-8", "replace")
    hits, blocking = _hits(config, "tool_use", arguments, check.call.name)
    if blocking is not None:
        named = config.checks[blocking].replacement
        text = BLOCKED_CALL.format(check=config.check_id(blocking)) if named is UNSET else str(named)
        return Refused(text=text, hits=hits)
    return Noted(hits=hits) if hits else None


def check_result(check: ResultCheck, config: Struct | None) -> CheckedResult | None:
    assert isinstance(config, Guardrails)
    if not _has(config, "tool_output"):
        return None
    hits, blocking = _hits(config, "tool_output", check.text, check.call.name)
    if blocking is None:
        return CheckedResult(hits=hits) if hits else None
    named = config.checks[blocking].replacement
    return CheckedResult(text=BLOCKED_RESULT if named is UNSET else str(named), hits=hits)


def guard_output(config: Struct | None, _session: SessionView) -> OutputGuard | None:
    assert isinstance(config, Guardrails)
    return OutputChecks(ID, config) if _has(config, "output") else None


def withholds_output(config: Struct | None) -> bool:
    assert isinstance(config, Guardrails)
    return any(check.stage == "tool_output" and config.action(check) == "block" for check in config.checks)


def _has(config: Guardrails, stage: Stage) -> bool:
    return any(check.stage == stage for check in config.checks)


def _hits(config: Guardrails, stage: Stage, text: str, tool_name: str) -> tuple[tuple[GuardrailHit, ...], int | None]:
    """All hits, and the first check that blocks."""
    hits = [(index, hit(ID, config, index)) for index, _, _ in _found(config, stage, text, tool_name)]
    blocking = next((index for index, one in hits if one.action == "block"), None)
    return tuple(one for _, one in hits), blocking


def _found(config: Guardrails, stage: Stage, text: str, tool_name: str | None) -> Iterator[tuple[int, AnyCheck, str]]:
    """The checks of a stage that find something, and what."""
    for index, check in enumerate(config.checks):
        if check.stage != stage:
            continue
        subject = tool_name or "" if isinstance(check, ToolPatternCheck) else text
        found = matcher_of(check).look(subject).found if subject else None
        if found is not None:
            yield index, check, subject[found.start : found.end]


CAPABILITY = Capability(
    id=ID,
    name="Guardrails",
    description="Checks answers, tool calls and tool results by rules: patterns, words, personal data, lengths, links, tools.",
    category="Safety",
    icon="shield",
    config=Guardrails,
    check_call=check_call,
    check_result=check_result,
    guard_output=guard_output,
    withholds_output=withholds_output,
    is_guardrail=True,
)
