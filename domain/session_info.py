"""What a tool may know of the session it runs in."""

from __future__ import annotations

from msgspec import Struct

from domain.events import TokenUsage


class SessionInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`model` is the name of the one that answered last. `turn_count` includes the running turn; `created_at` is RFC 3339."""

    id: str
    harness: str
    created_at: str
    turn_count: int
    usage: TokenUsage
    title: str | None = None
    agent: str | None = None
    agent_id: str | None = None
    model: str | None = None
    locale: str | None = None
