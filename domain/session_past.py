"""What a tool may look up in a session's whole past, which prompts show only a part of."""

from __future__ import annotations

from typing import Literal, Protocol

from msgspec import Struct

PastRole = Literal["user", "agent", "tool_result"]


class PastQuery(Struct, frozen=True, kw_only=True):
    """`text` is found anywhere, whatever its case; `pattern` is an RE2 expression, matched line by line. `before` and `after` are
    sequences of the log, both exclusive.
    """

    limit: int
    text: str | None = None
    pattern: str | None = None
    before: int | None = None
    after: int | None = None
    role: PastRole | None = None


class PastMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`text` may be shortened, around what was found; then `characters` says how long it is."""

    sequence: int
    role: str
    sent_at: str
    text: str
    tool: str | None = None
    characters: int | None = None


class PastMessages(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Oldest first, the newest that match. `searched_back_to` is set when older messages were not looked at."""

    messages: list[PastMessage]
    searched_back_to: int | None = None


class SessionPast(Protocol):
    async def find(self, query: PastQuery) -> PastMessages:
        """Raises `BadPattern`. Never longer than a few seconds, however long the session is."""
        ...
