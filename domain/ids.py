"""Public identifiers: `{prefix}_{32 lower-case hex}`, the hex being a UUID without dashes.

Rows and everything ordered carry UUIDv7, so that keys are close together in an index. Message ids are UUIDv4: they live
inside event payloads that clients may pass on, and must not tell when they were made. Python before 3.14 has no `uuid7`,
hence the small generator here (RFC 9562, section 5.7, method 1: a monotonic counter in `rand_a`).
"""

from __future__ import annotations

import os
import re
import threading
import time
from enum import StrEnum
from typing import Final
from uuid import UUID, uuid4, uuid5

from domain.errors import MalformedId

_HEX = re.compile(r"[0-9a-f]{32}")


class Prefix(StrEnum):
    """What a public id names."""

    ORG = "org"
    AGENT = "agent"
    HARNESS = "harness"
    SESSION = "session"
    MESSAGE = "message"
    EVENT = "event"
    TURN = "turn"
    EXEC = "exec"
    PROVIDER = "provider"
    MODEL = "model"
    PRINCIPAL = "principal"
    WORKSPACE = "wsp"
    MEMORY = "mem"
    USER = "user"
    MCP = "mcp"
    BUDGET = "bdgt"
    LEDGER_ENTRY = "ledger"
    SCHEDULE = "sched"
    TASK = "task"
    TASK_MESSAGE = "tmsg"
    SKILL = "skill"
    CAPABILITY = "cap"


DEFAULT_ORG_ID: Final = 1
DEFAULT_ORG_PUBLIC_ID: Final = f"{Prefix.ORG}_{1:032x}"
ANONYMOUS_USER_ID: Final = UUID(int=1)
ANONYMOUS_PRINCIPAL_ID: Final = UUID(int=1)

_lock = threading.Lock()
_last_ms = 0
_counter = 0


def uuid7() -> UUID:
    """A time-ordered UUID, strictly increasing within this process."""
    global _last_ms, _counter
    with _lock:
        now_ms = time.time_ns() // 1_000_000
        if now_ms > _last_ms:
            _last_ms = now_ms
            # Half of the counter's range is left for the rest of this millisecond.
            _counter = int.from_bytes(os.urandom(2), "big") & 0x7FF
        else:
            _counter += 1
            if _counter > 0xFFF:
                _last_ms += 1
                _counter = 0
        millisecond, counter = _last_ms, _counter
    tail = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
    return UUID(int=(millisecond << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | tail)


def format_id(prefix: Prefix, value: UUID) -> str:
    return f"{prefix}_{value.hex}"


def new_id(prefix: Prefix) -> str:
    """A fresh public id: UUIDv4 for messages, UUIDv7 for everything else."""
    return format_id(prefix, uuid4() if prefix is Prefix.MESSAGE else uuid7())


def derived_id(prefix: Prefix, namespace: UUID, name: str) -> str:
    """The same id for the same inputs: what an activity's retry must not invent anew."""
    return format_id(prefix, uuid5(namespace, name))


def parse_id(prefix: Prefix, text: str) -> UUID:
    """The UUID inside a public id.

    Raises `MalformedId` unless the text is exactly the prefix, an underscore and 32 lower-case hex digits.
    """
    head, _, tail = text.partition("_")
    if head != prefix or not _HEX.fullmatch(tail):
        raise MalformedId(
            f"`{text[:80]}` is not a valid {prefix} id; expected `{prefix}_` followed by 32 lower-case hex digits",
            field=f"{prefix}_id",
        )
    return UUID(hex=tail)


def is_id(prefix: Prefix, text: str) -> bool:
    head, _, tail = text.partition("_")
    return head == prefix and _HEX.fullmatch(tail) is not None
