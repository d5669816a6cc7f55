"""Checks of a text that is still being written.

Checks that block look at every piece, and at what came shortly before it; all checks look at the whole text once it is finished.
Shown is what no open match reaches into: a match that blocks is found before its beginning is shown, if it was open all along.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET

from activities.guardrails.checks import Check, Guardrails, Matcher, matcher_of
from domain.capabilities import GuardrailHit, OutputReplacement, OutputVerdict

CONTEXT_CHARACTERS: Final = 2_000
"""How far back a piece is looked at together with what stood before it; the whole text is looked at in the end."""

BLOCKED_OUTPUT: Final = "This answer was withheld by a content rule."


def hit(capability_id: str, config: Guardrails, index: int) -> GuardrailHit:
    check = config.checks[index]
    return GuardrailHit(
        capability_id=capability_id,
        check_id=config.check_id(index),
        stage=check.stage,
        action=config.action(check),
        reason_code=reason_code(check),
    )


def reason_code(check: Check) -> str:
    return f"guardrail.{check.type}"


class OutputChecks:
    """An `OutputGuard` out of a configuration's checks of the stage `output`."""

    def __init__(self, capability_id: str, config: Guardrails) -> None:
        self._capability_id = capability_id
        self._config = config
        self._checks: list[tuple[int, Matcher]] = [
            (index, matcher_of(check, hold_back=config.hold_back_characters))
            for index, check in enumerate(config.checks)
            if check.stage == "output"
        ]
        self._pieces: list[str] = []
        self._tail = ""
        self._base = 0
        """Where the tail begins in the text."""
        self._shown = 0

    def feed(self, piece: str, *, finished: bool = False) -> OutputVerdict:
        self._pieces.append(piece)
        if finished:
            return self._whole("".join(self._pieces))
        self._tail += piece
        open_from = len(self._tail)
        # One character of context keeps the beginning of the tail from being taken for that of a line or a word.
        start = min(1, self._base)
        for index, matcher in self._blocking():
            looked = matcher.look(self._tail, start=start, before=self._base, finished=False)
            if looked.found is not None:
                return self._blocked(index)
            open_from = min(open_from, looked.open_from)
        self._shown = max(self._shown, self._base + open_from)
        self._trim()
        return OutputVerdict(shown=self._shown)

    def _blocking(self) -> list[tuple[int, Matcher]]:
        return [one for one in self._checks if self._config.action(self._config.checks[one[0]]) == "block"]

    def _whole(self, text: str) -> OutputVerdict:
        hits: list[GuardrailHit] = []
        for index, matcher in self._checks:
            if matcher.look(text).found is None:
                continue
            one = hit(self._capability_id, self._config, index)
            if one.action == "block":
                return OutputVerdict(shown=self._shown, hits=(*hits, one), replacement=self._replacement(index))
            hits.append(one)
        return OutputVerdict(shown=len(text), hits=tuple(hits))

    def _blocked(self, index: int) -> OutputVerdict:
        one = hit(self._capability_id, self._config, index)
        return OutputVerdict(shown=self._shown, hits=(one,), replacement=self._replacement(index))

    def _replacement(self, index: int) -> OutputReplacement:
        check = self._config.checks[index]
        return OutputReplacement(
            capability_id=self._capability_id,
            guardrail_id=self._config.check_id(index),
            reason_code=reason_code(check),
            replacement=BLOCKED_OUTPUT if check.replacement is UNSET else str(check.replacement),
        )

    def _trim(self) -> None:
        gone = self._shown - self._base - CONTEXT_CHARACTERS
        # Not at every piece: cutting copies the tail.
        if gone > CONTEXT_CHARACTERS:
            self._tail = self._tail[gone:]
            self._base += gone
