"""A shorter form of the beginning of a conversation, for prompts only. The log and the list of messages never change.

A checkpoint replaces everything before one event of the log (`source_sequence`) by `messages`, or by `native`, which only the
provider that made it can read. Besides, it masks tool results before another event (`masked_sequence`): long outputs the model
has made use of already. Both are fixed when it is made, so that prompts stay the same, and stay in providers' caches, from one
compaction to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from msgspec import Struct

from domain.clock import now_timestamp
from domain.ids import Prefix, new_id
from domain.messages import Message, Role, TextPart
from domain.model import ProviderState

CHECKPOINT: Final = "checkpoint_id"
"""Metadata key of the messages a checkpoint brings into prompts."""


class Checkpoint(Struct, frozen=True, kw_only=True):
    """`carried_sequences` are inputs posted before `source_sequence` that are read after it; 0 there replaces nothing.

    `native_tokens` is what `native` counts for in a prompt, as the provider counts.
    """

    id: UUID
    source_sequence: int
    strategy: str
    masked_sequence: int = 0
    messages: list[Message] = []
    native: ProviderState | None = None
    native_tokens: int = 0
    carried_sequences: Sequence[int] = ()


def checkpoint_message(checkpoint: UUID, text: str) -> Message:
    """A message that stands for what a checkpoint replaces. Of the user's role: models take no other in this place."""
    return Message(
        id=new_id(Prefix.MESSAGE),
        role=Role.USER,
        content=[TextPart(text=text)],
        created_at=now_timestamp(),
        metadata={CHECKPOINT: str(checkpoint)},
    )


def is_checkpoint_message(message: Message) -> bool:
    return message.metadata is not None and CHECKPOINT in message.metadata
