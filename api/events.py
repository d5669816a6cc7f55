"""The event log over HTTP: filtered lists, a summary, and the live stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Final

from litestar import Response, Router, get
from litestar.background_tasks import BackgroundTask
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery, HeaderParameter, QueryParameter
from litestar.response import Stream
from litestar.types import Method
from litestar.types.internal_types import PathParameterDefinition
from msgspec import Struct

from api.frames import event_json
from api.problems import declared
from api.services import Services
from api.streams import Selection
from db.event_log import MAX_EVENTS_PER_READ, MAX_SEQUENCE, EventFilter
from domain.clock import timestamp
from domain.errors import InvalidInput, UnknownEventType
from domain.events import EPHEMERAL_TYPES, EVENT_TYPES, Accumulator, EventContext, StoredEvent
from domain.ids import DEFAULT_ORG_ID, Prefix
from domain.limits import check_id

MAX_FILTER_NAMES: Final = 64
MAX_LIMIT: Final = 1_000
SEARCH_LIMIT: Final = 1_000
DEFAULT_WINDOW: Final = 50
MAX_WINDOW: Final = 500
MAX_SNAP_EVENTS: Final = 500
"""How far a page may reach back beyond its limit to begin at a turn's beginning."""

STREAM_HEADERS: Final = {"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"}

Cursor = Annotated[int | None, QueryParameter(ge=0, le=MAX_SEQUENCE)]


class EventView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event. `data` depends on `type`; see the event reference."""

    id: str
    type: str
    ts: str
    session_id: str
    sequence: int
    context: EventContext
    data: dict[str, object]
    metadata: dict[str, object] | None = None
    tags: list[str] | None = None


class EventList(Struct, frozen=True, kw_only=True):
    data: list[EventView]


class EventTypeCount(Struct, frozen=True, kw_only=True):
    event_type: str
    count: int


class EventsSummaryView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    total: int
    turn_count: int
    error_count: int
    by_type: list[EventTypeCount]
    first_ts: str | None = None
    last_ts: str | None = None


def known_types(names: Sequence[str] | None, parameter: str) -> list[str] | None:
    """Filter names, checked. Raises `UnknownEventType` or `InvalidInput`."""
    if not names:
        return None
    if len(names) > MAX_FILTER_NAMES:
        raise InvalidInput(f"`{parameter}` takes at most {MAX_FILTER_NAMES} names", field=parameter)
    for name in names:
        if name not in EVENT_TYPES:
            raise UnknownEventType(f"`{name[:80]}` is not an event type", field=parameter)
    return list(names)


@get(
    "/events",
    operation_id="list_events",
    summary="List events",
    responses={200: ResponseSpec(EventList, description="Events", generate_examples=False), **declared()},
)
async def list_events(
    session_id: FromPath[str],
    services: NamedDependency[Services],
    types: FromQuery[list[str] | None] = None,
    exclude: FromQuery[list[str] | None] = None,
    since_id: FromQuery[str | None] = None,
    after_sequence: Cursor = None,
    before_sequence: Cursor = None,
    limit: Annotated[int | None, QueryParameter(ge=1, le=MAX_LIMIT)] = None,
    around: FromQuery[str | None] = None,
    window: Annotated[int, QueryParameter(ge=1, le=MAX_WINDOW)] = DEFAULT_WINDOW,
    from_ts: FromQuery[datetime | None] = None,
    to_ts: FromQuery[datetime | None] = None,
    turn_id: FromQuery[str | None] = None,
    exec_id: FromQuery[str | None] = None,
    trace_id: FromQuery[str | None] = None,
    tags: FromQuery[list[str] | None] = None,
    tool_name: FromQuery[str | None] = None,
    q: FromQuery[str | None] = None,
    order_desc: FromQuery[bool] = False,
) -> Response[bytes]:
    """Events of the session, oldest first.

    Without `limit` everything, at most 10,000. With it the newest ones, beginning where a turn begins; with a cursor
    (`since_id`, `after_sequence`) the first ones after it. `X-Total-Count` counts without deltas. `around` gives `window`
    events on each side of one event, and goes with no other cursor.
    """
    await services.messages.require(DEFAULT_ORG_ID, session_id)
    _check_texts(trace_id=trace_id, tool_name=tool_name, q=q, **{f"tags[{n}]": tag for n, tag in enumerate(tags or ())})
    if around is not None and (since_id is not None or after_sequence is not None or before_sequence is not None):
        raise InvalidInput("`around` goes with no other cursor", field="around")
    if since_id is not None:
        after_sequence = max(after_sequence or 0, await services.log.cursor_from(session_id, since_id))
    wanted = EventFilter(
        types=known_types(types, "types"),
        exclude=known_types(exclude, "exclude"),
        after_sequence=after_sequence,
        before_sequence=before_sequence,
        from_ts=_utc(from_ts, "from_ts"),
        to_ts=_utc(to_ts, "to_ts"),
        turn_id=turn_id,
        exec_id=exec_id,
        trace_id=trace_id,
        tags=tags or (),
        tool_name=tool_name,
        q=q,
    )
    if around is not None:
        events = await _around(services, session_id, around, window, wanted)
    elif limit is None:
        cap = SEARCH_LIMIT if q or tool_name else MAX_EVENTS_PER_READ
        events = await services.log.find(session_id, wanted, limit=cap)
    elif after_sequence is not None:
        events = await services.log.find(session_id, wanted, limit=limit)
    else:
        events = await services.log.find(session_id, wanted, limit=limit, newest=True)
        if not (types or exclude or turn_id or exec_id or trace_id or tags or tool_name or q or from_ts or to_ts):
            events = await _snapped_to_turn(services, session_id, events)
    headers = {}
    if limit is not None:
        counted = replace(
            wanted, exclude=[*(wanted.exclude or ()), *EPHEMERAL_TYPES], after_sequence=None, before_sequence=None
        )
        headers["X-Total-Count"] = str(await services.log.count(session_id, counted))
    accumulator = Accumulator()
    encoded: list[bytes] = []
    for event in events:
        if event.type in Accumulator.TYPES and not accumulator.knows(event):
            accumulator.prime(event, await services.log.text_before(event))
        encoded.append(event_json(event, accumulator))
    if order_desc:
        encoded.reverse()
    return Response(
        b'{"data":[' + b",".join(encoded) + b"]}", media_type="application/json", headers=headers, status_code=200
    )


async def _around(
    services: Services, session_id: str, event_id: str, window: int, wanted: EventFilter
) -> list[StoredEvent]:
    """The event, which is there even if the filters leave it out, and `window` filtered ones on each side."""
    check_id(Prefix.EVENT, event_id, "around")
    center = await services.log.sequence_of(session_id, event_id)
    if center is None:
        raise InvalidInput("`around` names no event of this session", field="around")
    before = await services.log.find(session_id, replace(wanted, before_sequence=center), limit=window, newest=True)
    after = await services.log.find(session_id, replace(wanted, after_sequence=center), limit=window)
    return [*before, *await services.log.read(session_id, after_sequence=center - 1, limit=1), *after]


def _check_texts(**texts: str | None) -> None:
    """PostgreSQL's text has no U+0000: such a search could match nothing, and the database would refuse it."""
    for name, text in texts.items():
        if text is not None and "\0" in text:
            raise InvalidInput(f"`{name}` must not contain the character U+0000", field=name)


def _utc(moment: datetime | None, parameter: str) -> datetime | None:
    """The moment in UTC, which a time without an offset is taken for."""
    if moment is None:
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:  # Next to the first or the last representable year, an offset leads out of it.
        raise InvalidInput(f"`{parameter}` is out of range", field=parameter) from None


async def _snapped_to_turn(services: Services, session_id: str, events: list[StoredEvent]) -> list[StoredEvent]:
    """Let a page begin with its first turn's beginning, so that a client can render it."""
    if not events or events[0].sequence == 1 or events[0].type == "turn.started":
        return events
    before = EventFilter(types=["turn.started"], before_sequence=events[0].sequence)
    starts = await services.log.find(session_id, before, limit=1, newest=True)
    first = starts[0].sequence if starts else 1
    if events[0].sequence - first > MAX_SNAP_EVENTS:
        return events
    earlier = EventFilter(after_sequence=first - 1, before_sequence=events[0].sequence)
    return await services.log.find(session_id, earlier) + events


@get("/events/summary", operation_id="summarize_events", summary="Count events by type", responses=declared())
async def summarize_events(session_id: FromPath[str], services: NamedDependency[Services]) -> EventsSummaryView:
    """How many events of each type there are, and when the first and the last were."""
    await services.messages.require(DEFAULT_ORG_ID, session_id)
    summary = await services.log.summary(session_id)
    counts = summary.by_type
    return EventsSummaryView(
        total=sum(counts.values()),
        turn_count=counts.get("turn.started", 0),
        error_count=sum(count for name, count in counts.items() if name.endswith((".failed", ".error"))),
        by_type=[EventTypeCount(event_type=name, count=count) for name, count in counts.items()],
        first_ts=None if summary.first_ts is None else timestamp(summary.first_ts),
        last_ts=None if summary.last_ts is None else timestamp(summary.last_ts),
    )


def _stream_operation_id(handler: HTTPRouteHandler, method: Method, path: list[str | PathParameterDefinition]) -> str:
    """One handler at two addresses: operation ids have to be unique, or there is no OpenAPI description at all."""
    return "stream_events" if path[-1] == "sse" else "stream_events_alias"


@get(
    ["/sse", "/events/stream"],
    operation_id=_stream_operation_id,
    summary="Stream events",
    media_type="text/event-stream",
    responses={
        200: ResponseSpec(
            EventView,
            description="Server-sent events; the data of each is one event. See the guide to streaming.",
            media_type="text/event-stream",
            generate_examples=False,
        ),
        **declared(429),
    },
)
async def stream_events(
    session_id: FromPath[str],
    services: NamedDependency[Services],
    types: FromQuery[list[str] | None] = None,
    exclude: FromQuery[list[str] | None] = None,
    since_id: FromQuery[str | None] = None,
    after_sequence: Cursor = None,
    last_event_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID")] = None,
) -> Stream:
    """Everything after the cursor, then live: same order, no gap, no duplicate. Without a cursor from the first event.

    A browser's `Last-Event-ID` is newer than the address it reconnects to, so it wins over the query.
    """
    if since_id is not None and after_sequence is not None:
        raise InvalidInput("Give either `since_id` or `after_sequence`, not both", field="after_sequence")
    kinds = known_types(types, "types")
    selection = Selection(frozenset(kinds) if kinds else None, frozenset(known_types(exclude, "exclude") or ()))
    await services.messages.require(DEFAULT_ORG_ID, session_id)
    event_id = last_event_id or since_id
    cursor = after_sequence or 0
    if event_id:
        cursor = await services.log.cursor_from(session_id, event_id)
    stream = services.streams.open(DEFAULT_ORG_ID, session_id, cursor=cursor, selection=selection)
    return Stream(
        stream,
        media_type="text/event-stream",
        headers=STREAM_HEADERS,
        status_code=200,
        # Runs after a disconnect too, and frees the slot at once, whoever still refers to the stream.
        background=BackgroundTask(stream.aclose),
    )


router = Router(
    path="/sessions/{session_id:str}",
    route_handlers=[list_events, summarize_events, stream_events],
    tags=["Events"],
)
