"""Tells the model when each message of the user was sent, and by whom.

What is put in front of a message depends on that message alone: later prompts begin with the same text, and caches stay good. The
log, and what clients see, has the message as it was sent.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Annotated, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta, Struct

from domain.capabilities import Capability
from domain.messages import Message, Role, TextPart

NAME_MAX_CHARACTERS: Final = 100

PROMPT: Final = (
    "Messages of the user begin with a line in square brackets, written by the system: when the message was sent, and by whom if "
    "that is known. Use it to tell times and people apart; do not write such lines yourself."
)


class MessageMetadata(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    time: Annotated[bool, Meta(description="When, in the time zone the message's metadata names, or UTC.")] = True
    sender: Annotated[bool, Meta(description="Who, when the message came through a channel.")] = True


def arrange_messages(messages: list[Message], config: Struct | None) -> list[Message]:
    assert isinstance(config, MessageMetadata)
    return [_described(message, config) if message.role is Role.USER else message for message in messages]


def _described(message: Message, config: MessageMetadata) -> Message:
    facts = [_time(message) if config.time else None, _sender(message) if config.sender else None]
    line = " · ".join(fact for fact in facts if fact)
    if not line:
        return message
    return msgspec.structs.replace(message, content=[TextPart(text=f"[{line}]\n"), *message.content])


def _time(message: Message) -> str | None:
    try:
        moment = datetime.fromisoformat(message.created_at)
    except ValueError:
        return None
    name = (message.metadata or {}).get("timezone")
    zone = None
    if isinstance(name, str) and name:
        with contextlib.suppress(ZoneInfoNotFoundError, ValueError, OSError):
            zone = ZoneInfo(name)
    return f"{moment.astimezone(zone or UTC):%a %Y-%m-%d %H:%M} {name if zone else 'UTC'}"


def _sender(message: Message) -> str | None:
    actor = message.external_actor
    if actor is None:
        return None
    return f"from {_plain(actor.actor_name or actor.actor_id)} via {_plain(actor.source)}"


def _plain(text: str) -> str:
    """A name that cannot end the line or look like another one: people choose their names themselves."""
    shown = "".join(one if one.isprintable() and one not in "[]·" else " " for one in text)
    return " ".join(shown.split())[:NAME_MAX_CHARACTERS] or "somebody"


CAPABILITY = Capability(
    id="message_metadata",
    name="Message Metadata",
    description="Tells the model when each message was sent, and by whom.",
    category="Behaviour",
    icon="tag",
    system_prompt=PROMPT,
    config=MessageMetadata,
    arrange_messages=arrange_messages,
)
