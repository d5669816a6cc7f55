"""What capabilities have to say about a tool's result, before anybody else sees it."""

from __future__ import annotations

import msgspec

from activities.capabilities.registry import ResolvedCapabilities, ToolOutcome
from domain.capabilities import CheckedResult, GuardrailHit, ResultCheck
from domain.messages import TextPart
from domain.tools import ToolCall


def checked_outcome(outcome: ToolOutcome, call: ToolCall, resolved: ResolvedCapabilities) -> ToolOutcome:
    """The outcome with every text the capabilities have replaced. An error stays an error."""
    checks = [one for one in resolved.capabilities if one.capability.check_result is not None]
    if not checks:
        return outcome

    hits: list[GuardrailHit] = []

    def checked(text: str) -> str:
        for one in checks:
            if one.capability.check_result is not None:
                verdict = one.capability.check_result(ResultCheck(call=call, text=text), one.config)
                if isinstance(verdict, CheckedResult):
                    hits.extend(verdict.hits)
                    verdict = verdict.text
                text = text if verdict is None else verdict
        return text

    if outcome.error is not None:
        error = checked(outcome.error)
        return msgspec.structs.replace(outcome, error=error, hits=tuple(hits))
    parts = [TextPart(text=checked(part.text)) if isinstance(part, TextPart) else part for part in outcome.result or []]
    return msgspec.structs.replace(outcome, result=parts, hits=tuple(hits))


def withholds_output(resolved: ResolvedCapabilities) -> bool:
    """Whether a tool's output must not be streamed while it runs, because its result may be replaced."""
    return any(
        one.capability.withholds_output is not None and one.capability.withholds_output(one.config)
        for one in resolved.capabilities
    )
