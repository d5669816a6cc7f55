"""What can be said about a prompt by its text alone. Deterministic and linear in its length; places are byte offsets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Final

from domain.findings import Finding, FindingLocation

FIELD: Final = "system_prompt"
SHORT_CHARACTERS: Final = 40
"""Below it a prompt says hardly more than a name."""
PARAGRAPH_CHARACTERS: Final = 40
"""Shorter paragraphs repeat for good reasons: headings, separators."""
MAX_PER_RULE: Final = 5
"""More of the same kind add nothing."""

_PARAGRAPH: Final = re.compile(r"\S[^\n]*(?:\n[^\n\S]*\S[^\n]*)*")
_SENTENCE: Final = re.compile(r"[^.!?\n;]+")
_DO: Final = re.compile(
    r"^(?:you (?:must|should|have to) )?always (?P<what>.+)$|^you (?:must|should|have to) (?P<what2>.+)$"
)
_DO_NOT: Final = re.compile(r"^(?:you (?:must|should) )?(?:never|do not|don't|not) (?P<what>.+)$")
_OPPOSITES: Final = (
    (
        r"\b(?:be|answer|keep (?:it|answers)|stay) (?:very )?(?:brief|concise|short|terse)\b",
        r"\b(?:be (?:very )?(?:verbose|exhaustive)|in (?:great|full|much) detail|as detailed as possible)\b",
    ),
    (
        r"\bonly (?:answer|reply|respond) in english\b",
        r"\b(?:answer|reply|respond) in the (?:user's|language of the user)\b",
    ),
    (r"\bask (?:the user )?before\b", r"\bnever ask\b|\bwithout asking\b"),
)
_VOLATILE: Final = (
    (re.compile(r"\b(?:19|20)\d\d-\d\d-\d\d(?:[T ]\d\d:\d\d)?"), "a date"),
    (
        re.compile(r"\b(?:today is|the current (?:date|time) is|it is now|as of today)\b", re.IGNORECASE),
        "the current date or time",
    ),
    (re.compile(r"\b\d{1,2}:\d\d(?::\d\d)?\s?(?:am|pm|utc)\b", re.IGNORECASE), "a time of day"),
)
_PLACEHOLDER: Final = re.compile(
    r"\{\{[^{}\n]{1,80}\}\}|\$\{[A-Za-z_][\w.]{0,60}\}|<%[^%\n]{1,80}%>|\bTODO\b|\bFIXME\b|\bLorem ipsum\b"
)
_SECRET: Final = re.compile(
    r"\bsk-[A-Za-z0-9_-]{16,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bevr_[A-Za-z0-9_]{16,}|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----|\bAIza[0-9A-Za-z_-]{30,}"
    r"|\b(?:password|api[_ -]?key|secret)\s*[:=]\s*[^\s`'\"<{$]{8,}",
    re.IGNORECASE,
)
_TOOL: Final = re.compile(
    r"\b(?:use|call|calling|invoke|run|with)\s+(?:the\s+)?(?:tool\s+)?`(?P<a>[A-Za-z][\w-]{2,63})`|`(?P<b>[A-Za-z][\w-]{2,63})`\s+tool\b"
    r"|\bthe\s+(?P<c>[a-z]+_[a-z_]{2,60})\s+tool\b",
    re.IGNORECASE,
)


def prompt_findings(prompt: str, tool_names: frozenset[str]) -> Iterator[Finding]:
    if not prompt.strip():
        yield _finding(
            "prompt.empty",
            "completeness",
            "warning",
            "The prompt is empty: the model knows nothing of its task.",
            "Say who the agent is, what it is for, and how it is to answer.",
        )
        return
    if len(prompt.strip()) < SHORT_CHARACTERS:
        yield _finding(
            "prompt.short",
            "completeness",
            "suggestion",
            f"The prompt has only {len(prompt.strip())} characters.",
            "Say what the agent is to do, what it must not do, and what a good answer looks like.",
        )
    for rule in (_duplicates, _contradictions, _volatile, _placeholders, _secrets):
        yield from rule(prompt)
    yield from _unknown_tools(prompt, tool_names)


def _finding(
    rule: str, category: str, severity: str, message: str, fix: str, span: tuple[str, int, int] | None = None
) -> Finding:
    location = FindingLocation(field=FIELD)
    if span is not None:
        text, start, end = span
        before = len(text[:start].encode())
        location = FindingLocation(field=FIELD, start=before, end=before + len(text[start:end].encode()))
    return Finding(
        rule_id=rule,
        category=category,  # type: ignore[arg-type]  # literals of this module
        severity=severity,  # type: ignore[arg-type]
        source="builtin",
        message=message,
        fix=fix,
        location=location,
    )


def _duplicates(prompt: str) -> Iterator[Finding]:
    first: dict[str, int] = {}
    found = 0
    for match in _PARAGRAPH.finditer(prompt):
        text = _plain(match[0])
        if len(text) < PARAGRAPH_CHARACTERS:
            continue
        if text in first and found < MAX_PER_RULE:
            found += 1
            yield _finding(
                "prompt.duplicate_paragraphs",
                "structure",
                "warning",
                f"This paragraph stands twice: “{_shown(match[0])}”.",
                "Keep one of the two. What is said twice costs tokens twice, and the copies drift apart.",
                (prompt, match.start(), match.end()),
            )
        first.setdefault(text, match.start())


def _contradictions(prompt: str) -> Iterator[Finding]:
    wanted: dict[str, re.Match[str]] = {}
    unwanted: dict[str, re.Match[str]] = {}
    for match in _SENTENCE.finditer(prompt):
        text = _plain(match[0]).lstrip("-*•0123456789) ")
        if (forbidden := _DO_NOT.match(text)) is not None:
            unwanted.setdefault(forbidden["what"], match)
        elif (demanded := _DO.match(text)) is not None:
            wanted.setdefault(demanded["what"] or demanded["what2"], match)
    for what in [what for what in wanted if what in unwanted][:MAX_PER_RULE]:
        later = max(wanted[what], unwanted[what], key=lambda match: match.start())
        yield _finding(
            "prompt.contradiction",
            "effectiveness",
            "warning",
            f"The prompt both demands and forbids: “{_shown(what)}”.",
            "Keep the one that is meant, or say when each of them holds.",
            (prompt, later.start(), later.end()),
        )
    lower = prompt.lower() if len(prompt.lower()) == len(prompt) else prompt
    for one, other in _OPPOSITES:
        first, second = re.search(one, lower), re.search(other, lower)
        if first and second:
            yield _finding(
                "prompt.contradiction",
                "effectiveness",
                "warning",
                f"“{_shown(first[0])}” and “{_shown(second[0])}” contradict each other.",
                "Keep the one that is meant, or say when each of them holds.",
                (prompt, second.start(), second.end()),
            )


def _volatile(prompt: str) -> Iterator[Finding]:
    for pattern, what in _VOLATILE:
        match = pattern.search(prompt)
        if match is not None:
            yield _finding(
                "prompt.volatile",
                "cost",
                "suggestion",
                f"“{_shown(match[0])}” looks like {what}. With every change of it providers read the whole prompt anew.",
                "Leave it out of the prompt; the capability `current_time` tells the model when it needs to know.",
                (prompt, match.start(), match.end()),
            )


def _placeholders(prompt: str) -> Iterator[Finding]:
    for _, match in zip(range(MAX_PER_RULE), _PLACEHOLDER.finditer(prompt), strict=False):
        yield _finding(
            "prompt.placeholder",
            "completeness",
            "warning",
            f"“{_shown(match[0])}” is a placeholder; nothing fills it in, the model reads it as it stands.",
            "Write what is meant.",
            (prompt, match.start(), match.end()),
        )


def _secrets(prompt: str) -> Iterator[Finding]:
    match = _SECRET.search(prompt)
    if match is not None:
        # Not repeated: findings are shown and logged.
        yield _finding(
            "prompt.secret",
            "safety",
            "warning",
            "The prompt seems to hold a secret. It goes to the model's provider with every call, and users can have it repeated.",
            "Remove and revoke it. Tools that need a secret take it from the session's secrets.",
            (prompt, match.start(), match.end()),
        )


def _unknown_tools(prompt: str, tool_names: frozenset[str]) -> Iterator[Finding]:
    seen: set[str] = set()
    for match in _TOOL.finditer(prompt):
        name = match["a"] or match["b"] or match["c"]
        # Tools of MCP servers are known once a server has been asked.
        if name in tool_names or name in seen or name.startswith("mcp_") or len(seen) >= MAX_PER_RULE:
            continue
        near = get_close_matches(name, sorted(tool_names), n=1)
        if match["a"] and "_" not in name and not near:
            # A command, a file or a class is used, run and called as well.
            continue
        seen.add(name)
        hint = f"Did you mean `{near[0]}`? Otherwise add" if near else "Add"
        yield _finding(
            "prompt.unknown_tool",
            "effectiveness",
            "warning",
            f"The prompt names the tool `{name}`, which this configuration does not offer.",
            f"{hint} the capability that brings it, or take it out of the prompt.",
            (prompt, match.start(), match.end()),
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _shown(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 80 else plain[:79] + "…"
