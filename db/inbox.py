"""Messages no reason step has read yet. A row leaves in the transaction that writes its receipt, so each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from db.event_log import SessionTransaction
from domain.events import InputMessage
from domain.messages import Delivery, Message

_PUT: Final = "INSERT INTO inbox (session_id, sequence, org_id, message_id, delivery) VALUES ($1, $2, $3, $4, $5)"
_UNREAD: Final = "SELECT sequence, message_id, delivery FROM inbox WHERE session_id = $1 ORDER BY sequence"
_TAKE: Final = "DELETE FROM inbox WHERE session_id = $1 AND sequence = ANY($2::bigint[])"
_INPUTS: Final = "SELECT data FROM events WHERE session_id = $1 AND sequence = ANY($2::bigint[]) ORDER BY sequence"

_input_decoder = msgspec.json.Decoder(InputMessage)


class Unread(Struct, frozen=True):
    sequence: int
    message_id: str
    delivery: str

    @property
    def for_running_turn(self) -> bool:
        return self.delivery != Delivery.FOLLOW_UP.value


async def put(work: SessionTransaction, org_id: int, sequence: int, message_id: str, delivery: Delivery) -> None:
    await work.connection.execute(_PUT, work.key, sequence, org_id, message_id, delivery.value)


async def unread(work: SessionTransaction) -> list[Unread]:
    """Oldest first."""
    rows = await work.connection.fetch(_UNREAD, work.key)
    return [Unread(row["sequence"], row["message_id"], row["delivery"]) for row in rows]


async def take(work: SessionTransaction, items: Sequence[Unread]) -> list[str]:
    """Mark as read; the caller writes the receipt in this transaction. Returns the message ids."""
    if items:
        await work.connection.execute(_TAKE, work.key, [item.sequence for item in items])
    return [item.message_id for item in items]


async def take_for_running_turn(work: SessionTransaction, *, up_to: int | None = None) -> list[str]:
    return await take(
        work,
        [item for item in await unread(work) if item.for_running_turn and (up_to is None or item.sequence <= up_to)],
    )


async def messages_at(work: SessionTransaction, sequences: Sequence[int]) -> list[Message]:
    """The messages of these `input.message` events."""
    rows = await work.connection.fetch(_INPUTS, work.key, sequences)
    return [_input_decoder.decode(row["data"]).message for row in rows]
