"""A point of a session's past: the event a fork or a rewind goes back to, and what the conversation was by then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db.messages import PREVIEW_CHARACTERS
from domain.conversation import SYNTHETIC
from domain.errors import InvalidInput
from domain.events import InputMessage, OutputMessageCompleted
from domain.ids import Prefix
from domain.limits import check_id
from domain.messages import Message
from domain.rewinds import Range, Rewind, hidden_ranges

PREVIEWED: Final = 20
"""Newest answers that are looked through for one with text."""

_AT: Final = "SELECT sequence, ts FROM events WHERE session_id = $1 AND sequence = $2"
# Results of tools have no id of their own in the log: clients see that of their event.
_OF_MESSAGE: Final = """SELECT sequence, ts FROM events WHERE session_id = $1 AND (
        (type IN ('input.message', 'output.message.completed') AND data#>>'{message,id}' = $2)
        OR (type = 'tool.completed' AND id = $3))
    ORDER BY sequence LIMIT 1"""
_REWINDS: Final = """SELECT sequence, (data->>'to_sequence')::bigint AS to_sequence FROM events
    WHERE session_id = $1 AND type = 'session.rewound' AND sequence <= $2 ORDER BY sequence"""
_VISIBLE: Final = "session_id = $1 AND sequence <= $2 AND NOT sequence <@ $3::text::int8multirange"
_UNREAD: Final = f"""
SELECT data#>>'{{message,id}}' AS message_id FROM events
WHERE {_VISIBLE} AND type = 'input.message' AND data#>>'{{message,metadata,{SYNTHETIC}}}' IS DISTINCT FROM 'true'
    AND data#>>'{{message,id}}' NOT IN (
        SELECT json_array_elements_text(data->'input_message_ids') FROM events
        WHERE {_VISIBLE} AND type IN ('turn.started', 'reason.started', 'turn.cancelled', 'session.forked', 'session.rewound'))
ORDER BY sequence
"""  # noqa: S608
_FIRST_INPUT: Final = (
    f"""SELECT data FROM events WHERE {_VISIBLE} AND type = 'input.message' ORDER BY sequence LIMIT 1"""  # noqa: S608
)
_LAST_OUTPUTS: Final = f"""SELECT data FROM events WHERE {_VISIBLE} AND type = 'output.message.completed'
    ORDER BY sequence DESC LIMIT {PREVIEWED}"""  # noqa: S608

_input = msgspec.json.Decoder(InputMessage)
_output = msgspec.json.Decoder(OutputMessageCompleted)


class PointRequest(Struct, frozen=True, kw_only=True):
    """An event by its sequence, or the one that brought a message. With neither, the newest event."""

    sequence: int | None = None
    message_id: str | None = None

    @property
    def is_given(self) -> bool:
        return self.sequence is not None or self.message_id is not None

    def check(self) -> None:
        """Raises `InvalidInput`, naming the field."""
        if self.sequence is not None and self.message_id is not None:
            raise InvalidInput("Give either sequence or message_id, not both", field="message_id")
        if self.message_id is not None:
            check_id(Prefix.MESSAGE, self.message_id, "message_id")


class Point(Struct, frozen=True, kw_only=True):
    """`hidden` is what rewinds before it had taken out of the conversation by then, `unread` the messages without a receipt."""

    sequence: int
    moment: datetime
    hidden: list[Range]
    unread: list[str]
    preview: str | None
    output_preview: str | None


async def find_point(connection: asyncpg.Connection, session: UUID, request: PointRequest, last_sequence: int) -> Point:
    """Raises `InvalidInput` when there is no such event in this session up to `last_sequence`."""
    if request.message_id is not None:
        event = UUID(hex=request.message_id.partition("_")[2])
        row = await connection.fetchrow(_OF_MESSAGE, session, request.message_id, event)
        if row is None or row["sequence"] > last_sequence:
            raise InvalidInput("message_id names no message of this session", field="message_id")
    else:
        wanted = last_sequence if request.sequence is None else request.sequence
        row = await connection.fetchrow(_AT, session, wanted) if wanted <= last_sequence else None
        if row is None:
            raise InvalidInput(f"sequence must be between 1 and {last_sequence}", field="sequence")
    sequence = row["sequence"]
    hidden = hidden_ranges(await read_rewinds(connection, session, sequence), sequence)
    arguments = (session, sequence, multirange(hidden))
    return Point(
        sequence=sequence,
        moment=row["ts"],
        hidden=hidden,
        unread=[one["message_id"] for one in await connection.fetch(_UNREAD, *arguments)],
        preview=_preview(
            _input.decode(one["data"]).message for one in await connection.fetch(_FIRST_INPUT, *arguments)
        ),
        output_preview=_preview(
            _output.decode(one["data"]).message for one in await connection.fetch(_LAST_OUTPUTS, *arguments)
        ),
    )


async def read_rewinds(connection: asyncpg.Connection, session: UUID, last_sequence: int) -> list[Rewind]:
    rows = await connection.fetch(_REWINDS, session, last_sequence)
    return [(row["sequence"], row["to_sequence"]) for row in rows]


def multirange(ranges: Sequence[Range]) -> str:
    """As PostgreSQL reads an `int8multirange`."""
    return "{" + ",".join(f"[{first},{last}]" for first, last in ranges) + "}"


def _preview(messages: Iterable[Message]) -> str | None:
    return next((message.text[:PREVIEW_CHARACTERS] for message in messages if message.text), None)
