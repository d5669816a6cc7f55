"""Fills a log with copies of a turn that really ran, through `EventLog.append`: the log of a long session in seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from db.event_log import EventLog
from domain.events import EventContext, NewEvent, StoredEvent, payload_types
from domain.ids import Prefix, new_id

EVENTS_PER_APPEND: Final = 200

_IDS: Final = re.compile(rb"(?:turn|message|exec|call)_[0-9a-f]{32}")
_context = msgspec.json.Decoder(EventContext)


class TurnTemplate:
    """Each copy has ids of its own, consistent within the copy."""

    def __init__(self, turn: Sequence[StoredEvent]) -> None:
        self._ids = sorted({found for event in turn for found in _IDS.findall(event.data + event.context)})
        self._events = [
            (msgspec.json.Decoder(payload_types()[event.type]), event.data, event.context) for event in turn
        ]
        self.length = len(turn)

    def copy(self) -> list[NewEvent]:
        renamed = [(old, new_id(Prefix(old.partition(b"_")[0].decode())).encode()) for old in self._ids]

        def rename(text: bytes) -> bytes:
            for old, new in renamed:
                text = text.replace(old, new)
            return text

        return [
            NewEvent(data=decoder.decode(rename(data)), context=_context.decode(rename(context)))
            for decoder, data, context in self._events
        ]


async def fill(log: EventLog, session: str, template: TurnTemplate, turns: int) -> int:
    """Append so many copies; returns how many events that were."""
    waiting: list[NewEvent] = []
    for number in range(turns):
        waiting += template.copy()
        if len(waiting) >= EVENTS_PER_APPEND or number == turns - 1:
            await log.append(session, waiting)
            waiting = []
    return turns * template.length
