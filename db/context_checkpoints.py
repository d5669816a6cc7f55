"""Checkpoints in the database, and what a prompt is built from: the newest usable checkpoint and the log after it.

A provider's own compaction is readable for that provider alone, and only with the key it was encrypted under. Where it cannot be
used, because the turn has gone to another provider or the key is gone, the newest checkpoint anyone can read takes its place, or
else the log itself. That is why installing a native checkpoint keeps the readable one before it; all others are deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
import structlog
from msgspec import Struct

from db.event_log import SessionTransaction, read_at, read_latest_conversation
from domain.checkpoints import Checkpoint
from domain.conversation import Conversation, conversation_of, messages_of
from domain.ids import Prefix, parse_id
from domain.messages import Message
from domain.model import ProviderState
from domain.providers import PROVIDER_TYPES
from domain.turns import ResolvedModel
from infra.encryption import Keyring, UndecryptableSecret, bound_to

HISTORY_EVENTS: Final = 2_000
"""Log rows a prompt is built from at most, newest first: what keeps turn 10,000 as cheap as turn 1, come what may."""

_TABLE: Final = "context_checkpoints"
_COLUMNS: Final = "id, source_sequence, masked_sequence, messages, native, native_tokens, carried_sequences, strategy"
_NEWEST: Final = f"SELECT {_COLUMNS} FROM {_TABLE} WHERE session_id = $1 ORDER BY created_at DESC LIMIT 1"  # noqa: S608
_NEWEST_READABLE: Final = f"""SELECT {_COLUMNS} FROM {_TABLE} WHERE session_id = $1 AND native IS NULL
    ORDER BY created_at DESC LIMIT 1"""  # noqa: S608
_INSTALL: Final = f"""
INSERT INTO {_TABLE} (session_id, {_COLUMNS}, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, clock_timestamp())
ON CONFLICT (session_id, id) DO NOTHING
"""  # noqa: S608
_DELETE_OLDER: Final = f"""DELETE FROM {_TABLE} WHERE session_id = $1 AND id <> $2 AND (NOT $3 OR native IS NOT NULL)"""  # noqa: S608

_messages_decoder = msgspec.json.Decoder(list[Message])
_state_decoder = msgspec.json.Decoder(ProviderState)

log = structlog.get_logger(__name__)


class PromptSource(Struct, frozen=True, kw_only=True):
    """What the next prompt of a session is made of; the checkpoint is applied to the conversation already."""

    conversation: Conversation
    checkpoint: Checkpoint | None


async def install(work: SessionTransaction, keyring: Keyring, checkpoint: Checkpoint) -> bool:
    """Whether it is new. Raises `EncryptionNotConfigured` when it is native and there is no key."""
    native: str | None = None
    if checkpoint.native is not None:
        text = msgspec.json.encode(checkpoint.native).decode()
        native = keyring.encrypt(text, bound_to=bound_to(_TABLE, checkpoint.id, "native"))
    status = await work.connection.execute(
        _INSTALL,
        work.key,
        checkpoint.id,
        checkpoint.source_sequence,
        checkpoint.masked_sequence,
        msgspec.json.encode(checkpoint.messages).decode(),
        native,
        checkpoint.native_tokens,
        list(checkpoint.carried_sequences),
        checkpoint.strategy,
    )
    await work.connection.execute(_DELETE_OLDER, work.key, checkpoint.id, native is not None)
    return status == "INSERT 0 1"


async def read_prompt_source(
    connection: asyncpg.Connection,
    session_id: str,
    keyring: Keyring,
    model: ResolvedModel | None,
    question_sequences: Sequence[int],
) -> PromptSource:
    """Costs what came after the checkpoint costs. `question_sequences` are the inputs the running turn began with."""
    checkpoint = await _newest_usable(connection, parse_id(Prefix.SESSION, session_id), keyring, model)
    since = 0 if checkpoint is None else checkpoint.source_sequence
    events, truncated = await read_latest_conversation(connection, session_id, HISTORY_EVENTS, since=since)
    carried, asked = set(checkpoint.carried_sequences if checkpoint else ()), set(question_sequences)
    inputs = await read_at(connection, session_id, sorted(carried | asked)) if since or truncated else []
    read_already = {event.sequence for event in events}
    conversation = conversation_of(
        [*(one for one in inputs if one.sequence in carried - read_already), *events],
        truncated=truncated,
        question=messages_of(one for one in inputs if one.sequence in asked),
        lead=checkpoint.messages if checkpoint else (),
    )
    if checkpoint is not None:
        conversation = conversation.masked(checkpoint.masked_sequence)
    return PromptSource(conversation=conversation, checkpoint=checkpoint)


async def _newest_usable(
    connection: asyncpg.Connection, session: UUID, keyring: Keyring, model: ResolvedModel | None
) -> Checkpoint | None:
    row = await connection.fetchrow(_NEWEST, session)
    if row is None or row["native"] is None:
        return row and _checkpoint(row, None)
    native = _opened(row, keyring)
    if native is not None and model is not None and _understands(model, native):
        return _checkpoint(row, native)
    row = await connection.fetchrow(_NEWEST_READABLE, session)
    return row and _checkpoint(row, None)


def _opened(row: asyncpg.Record, keyring: Keyring) -> ProviderState | None:
    try:
        opened = keyring.decrypt(row["native"], bound_to=bound_to(_TABLE, row["id"], "native"))
    except UndecryptableSecret as error:
        log.warning("a compacted context cannot be read; the log is used instead", error=str(error))
        return None
    return _state_decoder.decode(opened.reveal())


def _understands(model: ResolvedModel, native: ProviderState) -> bool:
    known = PROVIDER_TYPES.get(model.provider_type)
    same_driver = known is not None and known.driver == native.driver
    return same_driver and model.provider_public_id == native.provider_public_id


def _checkpoint(row: asyncpg.Record, native: ProviderState | None) -> Checkpoint:
    return Checkpoint(
        id=row["id"],
        source_sequence=row["source_sequence"],
        masked_sequence=row["masked_sequence"],
        messages=_messages_decoder.decode(row["messages"]),
        native=native,
        native_tokens=row["native_tokens"],
        carried_sequences=tuple(row["carried_sequences"]),
        strategy=row["strategy"],
    )
