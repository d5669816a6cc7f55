"""From stored events to bytes: JSON on one line for every parser, and `accumulated` filled in."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from api.frames import CONNECTED, HEARTBEAT, disconnecting, event_json, sse_frame
from domain.events import Accumulator, StoredEvent

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def stored(type_: str = "input.message", data: object = None, **fields: object) -> StoredEvent:
    return msgspec.structs.replace(
        StoredEvent(
            id="event_" + "a" * 32,
            type=type_,
            ts=datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC),
            session_id="session_" + "b" * 32,
            sequence=7,
            context=b"{}",
            data=msgspec.json.encode({} if data is None else data),
        ),
        **fields,
    )


def delta(text: str, offset: int, message: str = "message_1", type_: str = "output.message.delta") -> StoredEvent:
    return stored(type_, {"turn_id": "turn_1", "message_id": message, "delta": text, "offset": offset})


def accumulated(event: StoredEvent, accumulator: Accumulator) -> object:
    return msgspec.json.decode(event_json(event, accumulator))["data"]["accumulated"]


@given(data=st.dictionaries(TEXT, JSON, max_size=3), metadata=st.none() | st.dictionaries(TEXT, JSON, max_size=2))
def test_a_frame_is_its_four_lines_and_its_data_the_event_whatever_the_payload(
    data: dict[str, object], metadata: dict[str, object] | None
) -> None:
    event = stored(data=data, metadata=None if metadata is None else msgspec.json.encode(metadata), tags=["t"])
    frame = sse_frame(event, Accumulator()).decode()
    assert frame.endswith("\n\n")
    # `splitlines` knows more line breaks than any SSE parser.
    lines = frame.splitlines()
    assert lines[:3] == [f"event: {event.type}", f"id: {event.id}", "retry: 100"]
    assert lines[4:] == [""]
    decoded = msgspec.json.decode(lines[3].removeprefix("data: "))
    expected = {
        "id": event.id,
        "type": event.type,
        "ts": "2026-01-02T03:04:05.678Z",
        "session_id": event.session_id,
        "sequence": 7,
        "context": {},
        "data": data,
        "tags": ["t"],
    }
    assert decoded == (expected if metadata is None else {**expected, "metadata": metadata})


def test_what_is_absent_is_left_out() -> None:
    decoded = msgspec.json.decode(event_json(stored(), Accumulator()))
    assert set(decoded) == {"id", "type", "ts", "session_id", "sequence", "context", "data"}


@given(st.lists(TEXT.filter(bool), min_size=1, max_size=8))
def test_accumulated_is_the_text_up_to_and_with_each_delta(pieces: list[str]) -> None:
    accumulator = Accumulator()
    text = ""
    for piece in pieces:
        event = delta(piece, len(text))
        assert accumulator.knows(event)
        text += piece
        assert accumulated(event, accumulator) == text


def test_a_delta_whose_beginning_was_not_seen_is_primed_with_it() -> None:
    accumulator = Accumulator()
    event = delta("c", 2)
    assert not accumulator.knows(event)
    accumulator.prime(event, "ab")
    assert accumulator.knows(event)
    assert accumulated(event, accumulator) == "abc"
    assert accumulated(delta("d", 3), accumulator) == "abcd"


def test_an_offset_that_goes_back_drops_the_text_after_it() -> None:
    accumulator = Accumulator()
    for event, expected in (
        (delta("ab", 0), "ab"),
        (delta("c", 2), "abc"),
        (delta("x", 0), "x"),
        (delta("y", 1), "xy"),
    ):
        assert accumulated(event, accumulator) == expected


def test_messages_and_kinds_of_delta_do_not_mix() -> None:
    accumulator = Accumulator()
    assert accumulated(delta("a", 0), accumulator) == "a"
    assert accumulated(delta("t", 0, type_="reason.thinking.delta"), accumulator) == "t"
    assert accumulated(delta("b", 0, message="message_2"), accumulator) == "b"
    assert accumulated(delta("c", 1), accumulator) == "ac"


def test_texts_are_forgotten_when_the_message_or_the_turn_is_over() -> None:
    for end in ("output.message.completed", "turn.completed", "turn.cancelled"):
        accumulator = Accumulator()
        event_json(delta("ab", 0), accumulator)
        event_json(stored(end), accumulator)
        assert not accumulator.knows(delta("c", 2))


def test_lifecycle_frames() -> None:
    assert CONNECTED == b'event: connected\nretry: 100\ndata: {"status":"connected"}\n\n'
    assert HEARTBEAT == b": heartbeat\n\n"
    ending = disconnecting("connection_cycle")
    assert ending == b'event: disconnecting\ndata: {"reason":"connection_cycle","retry_ms":100}\n\n'
