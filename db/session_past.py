"""Searches a session's log for messages, newest first. Serves `domain.session_past.SessionPast`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import asyncpg
import msgspec

from db.event_log import COLUMNS, stored_event
from domain.clock import timestamp
from domain.conversation import messages_of
from domain.events import StoredEvent
from domain.ids import Prefix, parse_id
from domain.messages import Message, ToolResultPart
from domain.session_past import PastMessage, PastMessages, PastQuery
from infra.text_patterns import compile_line_pattern

PAGE_ROWS: Final = 200
MAX_ROWS: Final = 5_000
MAX_SECONDS: Final = 5.0
EXCERPT_CHARACTERS: Final = 2_000
SHORT_EXCERPT_CHARACTERS: Final = 500
"""Of each message when there are more than a few."""
FEW: Final = 10

_TYPES: Final = {
    "user": ["input.message"],
    "agent": ["output.message.completed"],
    "tool_result": ["tool.completed"],
    None: ["input.message", "output.message.completed", "tool.completed"],
}
# A running step sees no message that came after it began, and neither does its history.
_READ: Final = f"""SELECT {COLUMNS} FROM events WHERE session_id = $1 AND type = ANY($2) AND sequence < $3 AND sequence > $4
    AND NOT sequence <@ (SELECT hidden_events FROM session_state WHERE session_id = $1)
    AND sequence < coalesce((SELECT max(sequence) FROM events WHERE session_id = $1 AND type = 'reason.started'), $3)
    AND ($5::text IS NULL OR data::text ILIKE $5) ORDER BY sequence DESC LIMIT $6"""  # noqa: S608

Place = Callable[[str], int | None]
"""Where a text has what is looked for."""


class StoredPast:
    def __init__(self, pool: asyncpg.Pool, session_id: str) -> None:
        self._pool = pool
        self._session_id = session_id

    async def find(self, query: PastQuery) -> PastMessages:
        place_of = _place_finder(query)
        deadline = time.monotonic() + MAX_SECONDS
        before, rows = query.before or 2**62, 0
        found: list[PastMessage] = []
        excerpt = EXCERPT_CHARACTERS if query.limit <= FEW else SHORT_EXCERPT_CHARACTERS
        while len(found) < query.limit:
            if rows >= MAX_ROWS or time.monotonic() > deadline:
                return PastMessages(messages=found[::-1], searched_back_to=before)
            page = await self._page(query, before)
            if page:
                wanted = query.limit - len(found)
                found += await asyncio.to_thread(_matching, page, place_of, wanted, excerpt, deadline)
                before = page[-1].sequence
            rows += len(page)
            if len(page) < PAGE_ROWS:
                break
        return PastMessages(messages=found[::-1])

    async def _page(self, query: PastQuery, before: int) -> list[StoredEvent]:
        rows = await self._pool.fetch(
            _READ,
            parse_id(Prefix.SESSION, self._session_id),
            _TYPES[query.role],
            before,
            query.after or 0,
            None if query.text is None else _like(query.text),
            PAGE_ROWS,
            timeout=MAX_SECONDS,
        )
        return [stored_event(self._session_id, row) for row in rows]


def _like(text: str) -> str:
    """As it stands in the stored JSON. Only narrows down: an ILIKE takes longer than the text it finds."""
    needle = msgspec.json.encode(text)[1:-1].decode()
    escaped = needle.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _place_finder(query: PastQuery) -> Place:
    if query.pattern is not None:
        pattern = compile_line_pattern(query.pattern)

        def matched(text: str) -> int | None:
            data = text.encode("utf-8", "replace")
            match = pattern.search(data)
            return None if match is None else len(data[: match.start()].decode("utf-8", "replace"))

        return matched
    needle = (query.text or "").lower()

    def contained(text: str) -> int | None:
        place = text.lower().find(needle)
        return None if place < 0 else place

    return contained


def _matching(
    events: Iterable[StoredEvent], place_of: Place, limit: int, excerpt: int, deadline: float
) -> list[PastMessage]:
    found: list[PastMessage] = []
    for event in events:
        if len(found) >= limit or time.monotonic() > deadline:
            break
        for message in messages_of([event]):
            text = _text_of(message)
            place = place_of(text) if text else None
            if place is not None:
                found.append(_shown(event, message, text, place, excerpt))
    return found


def _text_of(message: Message) -> str:
    """With what was called, and what came of it."""
    parts = [message.text]
    for part in message.content:
        if isinstance(part, ToolResultPart):
            value: object = part.result if part.error is None else f"Error: {part.error}"
            parts.append(value if isinstance(value, str) else msgspec.json.encode(value).decode())
    parts += [f"{call.name}({msgspec.json.encode(call.arguments).decode()})" for call in message.tool_calls]
    return "\n".join(part for part in parts if part)


def _shown(event: StoredEvent, message: Message, text: str, place: int, excerpt: int) -> PastMessage:
    begin = max(0, min(place - excerpt // 4, len(text) - excerpt))
    shown = text[begin : begin + excerpt]
    return PastMessage(
        sequence=event.sequence,
        role=message.role.value,
        sent_at=timestamp(event.ts),
        text=f"{'…' if begin else ''}{shown}{'…' if begin + excerpt < len(text) else ''}",
        tool=_Tool.decode(event.data).tool_name,
        characters=len(text) if len(shown) < len(text) else None,
    )


class _ToolName(msgspec.Struct, frozen=True):
    tool_name: str | None = None


_Tool: Final = msgspec.json.Decoder(_ToolName)
