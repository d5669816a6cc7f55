"""From a row of the log to the bytes a client gets: the event's JSON, and its SSE frame.

The JSON is put together from the stored bytes; only deltas are touched, to fill in `accumulated`. SSE readers split lines on
more characters than the standard names, so those that JSON allows inside a string are escaped.
"""

from __future__ import annotations

from typing import Final

import msgspec

from domain.clock import timestamp
from domain.events import Accumulator, StoredEvent

RETRY_MS: Final = 100

_LINE_ENDS: Final = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
_encode = msgspec.json.Encoder().encode

HEARTBEAT: Final = b": heartbeat\n\n"
CONNECTED: Final = b'event: connected\nretry: %d\ndata: {"status":"connected"}\n\n' % RETRY_MS


def disconnecting(reason: str, retry_ms: int = RETRY_MS) -> bytes:
    """The last frame of a stream the server ends. Reasons: connection_cycle, shutdown, error."""
    return b'event: disconnecting\ndata: {"reason":"%s","retry_ms":%d}\n\n' % (reason.encode(), retry_ms)


def event_json(event: StoredEvent, accumulator: Accumulator) -> bytes:
    """The event as clients read it, on one line."""
    parts = [
        b'{"id":"',
        event.id.encode(),
        b'","type":"',
        event.type.encode(),
        b'","ts":"',
        timestamp(event.ts).encode(),
        b'","session_id":"',
        event.session_id.encode(),
        b'","sequence":',
        str(event.sequence).encode(),
        b',"context":',
        event.context,
        b',"data":',
        accumulator.wire_data(event),
    ]
    if event.metadata is not None:
        parts += [b',"metadata":', event.metadata]
    if event.tags is not None:
        parts += [b',"tags":', _encode(event.tags)]
    parts.append(b"}")
    return b"".join(parts)


def sse_frame(event: StoredEvent, accumulator: Accumulator) -> bytes:
    data = event_json(event, accumulator)
    for raw, escaped in _LINE_ENDS:
        if raw in data:
            data = data.replace(raw, escaped)
    head = f"event: {event.type}\nid: {event.id}\nretry: {RETRY_MS}\ndata: ".encode()
    return b"".join((head, data, b"\n\n"))
