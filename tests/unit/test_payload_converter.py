import dataclasses
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.common import RawValue

from infra.temporal_client import DATA_CONVERTER, MsgspecPayloadConverter, PayloadError

converter = MsgspecPayloadConverter()


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Text(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    text: str


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    id: uuid.UUID
    at: datetime
    arguments: dict[str, int | str | None] = {}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    colour: Colour
    parts: tuple[Text | Call, ...] = ()
    note: str | None = None


@dataclasses.dataclass
class Plain:
    name: str
    children: list["Plain"] = dataclasses.field(default_factory=list)


calls = st.builds(
    Call,
    id=st.uuids(),
    at=st.datetimes(timezones=st.just(UTC)),
    arguments=st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
)
steps = st.builds(
    Step,
    number=st.integers(),
    colour=st.sampled_from(Colour),
    parts=st.lists(st.builds(Text, text=st.text()) | calls).map(tuple),
    note=st.none() | st.text(),
)
plain_values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def round_trip(value: object, hint: Any = None) -> object:
    (payload,) = DATA_CONVERTER.payload_converter.to_payloads([value])
    (result,) = DATA_CONVERTER.payload_converter.from_payloads([payload], None if hint is None else [hint])
    return result


@given(steps)
def test_structs_round_trip(step: Step) -> None:
    assert round_trip(step, Step) == step


@given(st.lists(steps, max_size=3))
def test_lists_of_structs_round_trip(many: list[Step]) -> None:
    assert round_trip(many, list[Step]) == many
    assert round_trip(many, Sequence[Step]) == many


@given(st.recursive(st.builds(Plain, name=st.text()), lambda inner: st.builds(Plain, st.text(), st.lists(inner))))
def test_dataclasses_round_trip(value: Plain) -> None:
    assert round_trip(value, Plain) == value


@given(plain_values)
def test_plain_values_round_trip_without_a_type_hint(value: object) -> None:
    assert round_trip(value) == value
    assert round_trip(value, object) == value


@given(st.binary())
def test_bytes_round_trip_unchanged(value: bytes) -> None:
    (payload,) = converter.to_payloads([value])
    assert payload.metadata["encoding"] == b"binary/plain"
    assert round_trip(value, bytes) == value


def test_none_is_a_null_payload_whatever_the_hint() -> None:
    (payload,) = converter.to_payloads([None])
    assert payload.metadata["encoding"] == b"binary/null"
    assert round_trip(None) is None
    assert round_trip(None, Step) is None


def test_protobuf_messages_stay_json_protobuf() -> None:
    message = WorkflowExecution(workflow_id="session_1", run_id="run")
    (payload,) = converter.to_payloads([message])
    assert payload.metadata["encoding"] == b"json/protobuf"
    assert round_trip(message, WorkflowExecution) == message


def test_raw_values_pass_through() -> None:
    raw = RawValue(Payload(metadata={"encoding": b"json/plain"}, data=b"1"))
    (result,) = converter.from_payloads(converter.to_payloads([raw]), [RawValue])  # type: ignore[list-item]
    assert isinstance(result, RawValue)
    assert result.payload == raw.payload


def test_payloads_are_plain_json_that_other_workers_and_the_web_ui_can_read() -> None:
    (payload,) = converter.to_payloads([Step(number=1, colour=Colour.RED)])
    assert payload.metadata == {"encoding": b"json/plain"}
    assert payload.data == b'{"number":1,"colour":"red","parts":[],"note":null}'


def test_unknown_fields_are_ignored_so_that_old_code_reads_new_histories() -> None:
    payload = Payload(metadata={"encoding": b"json/plain"}, data=b'{"number":1,"colour":"red","added_later":true}')
    assert converter.from_payloads([payload], [Step]) == [Step(number=1, colour=Colour.RED)]


@pytest.mark.parametrize(
    ("data", "hint", "words"),
    [
        (b'{"number":"1","colour":"red"}', Step, "read as Step: Expected `int`, got `str` - at `$.number`"),
        (b'{"number":1}', Step, "missing required field `colour`"),
        (b"{", Step, "read as Step: "),
        (b'"green"', Literal["red", "blue"], "read as typing.Literal"),
        (b"[" * 100_000, list, "read as list: "),
    ],
)
def test_a_payload_that_does_not_fit_says_what_where_and_as_what(data: bytes, hint: Any, words: str) -> None:
    payload = Payload(metadata={"encoding": b"json/plain"}, data=data)
    with pytest.raises(PayloadError) as caught:
        converter.from_payloads([payload], [hint])
    assert words in str(caught.value)


def test_a_type_msgspec_can_not_decode_is_named() -> None:
    payload = Payload(metadata={"encoding": b"json/plain"}, data=b"1")
    with pytest.raises(PayloadError, match=r"read as MsgspecPayloadConverter"):
        converter.from_payloads([payload], [MsgspecPayloadConverter])


@pytest.mark.parametrize("value", [object(), {1, object()}, "\ud800", lambda: None])
def test_a_value_that_can_not_be_sent_is_named(value: object) -> None:
    with pytest.raises(PayloadError, match="can't be sent through Temporal"):
        converter.to_payloads([value])


def test_an_unhashable_type_hint_is_decoded_too() -> None:
    hint = Annotated[int, msgspec.Meta(extra={"unhashable": []}), ["unhashable"]]
    with pytest.raises(TypeError):
        hash(hint)
    assert round_trip(3, hint) == 3


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(KeyError, match="json/unknown"):
        converter.from_payloads([Payload(metadata={"encoding": b"json/unknown"}, data=b"1")])
