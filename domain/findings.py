"""Advice about a configuration. Findings never keep anything from being saved."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Category = Literal["structure", "completeness", "effectiveness", "safety", "cost"]
Severity = Literal["warning", "info", "suggestion"]


class FindingLocation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`field` of the request. `start` and `end` are byte offsets into its text."""

    field: str
    start: int | None = None
    end: int | None = None


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`rule_id` is stable; `fix` says what to do about it."""

    rule_id: str
    category: Category
    severity: Severity
    message: str
    source: Literal["builtin", "llm", "health_check"]
    fix: str | None = None
    location: FindingLocation | None = None
