"""The invariants of a session's event log, as code: what must hold however often a worker, a server or a network died.

One function per rule; its name is the rule's name and its docstring says what it demands. The same check serves the tests,
the chaos runs and the `everruns check-log` command. Rules look at nothing but the events, so they hold for any engine that
writes this log. A rule about something missing at the end applies to a `finished` log only, one of a session at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from domain.clock import timestamp
from domain.conversation import SYNTHETIC, conversation_of
from domain.events import (
    CONVERSATION_TYPES,
    Accumulator,
    ActCompleted,
    ActStarted,
    EventContext,
    EventPayload,
    InputMessage,
    OutputMessageCompleted,
    OutputMessageDelta,
    OutputMessageReplaced,
    OutputMessageStarted,
    ReasonCompleted,
    ReasonRecovered,
    ReasonStarted,
    ReasonThinkingCompleted,
    ReasonThinkingDelta,
    SessionActivated,
    SessionForked,
    SessionIdled,
    SessionRewound,
    StoredEvent,
    ToolCallRequested,
    ToolCompleted,
    ToolOutputDelta,
    ToolProgress,
    ToolStarted,
    TurnCancelled,
    TurnCompleted,
    TurnFailed,
    TurnSealed,
    TurnStarted,
    payload_types,
)
from domain.messages import Message, Role, ToolResultPart
from domain.rewinds import Rewind, hidden_ranges, is_hidden

REBUILT_PROMPTS: Final = 200
"""Prompts rebuilt per log, spread evenly: each reads the log from its beginning, which is quadratic in a long session."""

TurnEnd = TurnCompleted | TurnFailed | TurnCancelled | TurnSealed
Problem = tuple[int, str]
"""A sequence number and what is wrong there."""

T = TypeVar("T")


class Violation(Struct, frozen=True, kw_only=True):
    """A broken rule, and the event that shows it."""

    rule: str
    session_id: str
    sequence: int
    message: str


class Entry(Struct, frozen=True, kw_only=True):
    """An event with its payload; `data` is None for types this engine does not write, and for what cannot be read."""

    event: StoredEvent
    context: EventContext
    data: EventPayload | None
    unreadable: str | None = None

    @property
    def sequence(self) -> int:
        return self.event.sequence


class Log(Struct, frozen=True, kw_only=True):
    entries: Sequence[Entry]
    finished: bool


Rule = Callable[[Log], Iterator[Problem]]

_decoders: Final = {name: msgspec.json.Decoder(cls) for name, cls in payload_types().items()}
_context = msgspec.json.Decoder(EventContext)


def check_log(events: Sequence[StoredEvent], *, finished: bool = True) -> list[Violation]:
    """Every broken rule of one session's whole log. `finished`: the session rests and nothing is unread."""
    log = Log(entries=[_entry(event) for event in events], finished=finished)
    return [
        Violation(rule=rule.__name__, session_id=_session_of(events), sequence=sequence, message=message)
        for rule in RULES
        for sequence, message in rule(log)
    ]


def check_seen(seen: Sequence[Mapping[str, object]], log: Sequence[StoredEvent]) -> list[Violation]:
    """Whether what a client got, over all its connections and in the order it came, is the log: nothing more, less or else."""
    return [
        Violation(rule=rule.__name__, session_id=_session_of(log), sequence=sequence, message=message)
        for rule in SEEN_RULES
        for sequence, message in rule(seen, log)
    ]


def _session_of(events: Sequence[StoredEvent]) -> str:
    return events[0].session_id if events else ""


def _entry(event: StoredEvent) -> Entry:
    try:
        context = _context.decode(event.context)
        decoder = _decoders.get(event.type)
        data = None if decoder is None else decoder.decode(event.data)
    except msgspec.DecodeError as error:
        return Entry(event=event, context=EventContext(), data=None, unreadable=str(error))
    return Entry(event=event, context=context, data=data)


# --- the log itself ---------------------------------------------------------------------------------------------------


def sequences_are_contiguous(log: Log) -> Iterator[Problem]:
    """The first event is number 1 and each next one the number after it."""
    expected = 1
    for entry in log.entries:
        if entry.sequence != expected:
            yield entry.sequence, f"follows {expected - 1}"
        expected = entry.sequence + 1


def ids_are_unique(log: Log) -> Iterator[Problem]:
    """No two events have the same id."""
    seen: set[str] = set()
    for entry in log.entries:
        if entry.event.id in seen:
            yield entry.sequence, f"{entry.event.id} occurs twice"
        seen.add(entry.event.id)


def timestamps_never_go_back(log: Log) -> Iterator[Problem]:
    """Events are as old as those before them, or younger."""
    for before, entry in zip(log.entries, log.entries[1:], strict=False):
        if entry.event.ts < before.event.ts:
            yield entry.sequence, f"{entry.event.ts} comes after {before.event.ts}"


def payloads_are_readable(log: Log) -> Iterator[Problem]:
    """Every payload and context is what the type says."""
    for entry in log.entries:
        if entry.unreadable is not None:
            yield entry.sequence, f"{entry.event.type}: {entry.unreadable}"


# --- messages in ------------------------------------------------------------------------------------------------------


def messages_are_read_once(log: Log) -> Iterator[Problem]:
    """Each posted message has exactly one receipt, not before it was posted; no receipt names anything else.

    After a rewind, what was posted or read in the part that is hidden counts no more, until another rewind brings it back.
    """
    posted: dict[str, int] = {}
    read: dict[str, set[int]] = {}
    rewinds: list[Rewind] = []
    for entry in log.entries:
        match entry.data:
            case InputMessage(message=message) if not _synthetic(message):
                posted[message.id] = entry.sequence
            case TurnStarted() | ReasonStarted() | TurnCancelled() | SessionForked() | SessionRewound():
                if isinstance(entry.data, SessionRewound):
                    rewinds.append((entry.sequence, entry.data.to_sequence))
                hidden = hidden_ranges(rewinds, entry.sequence)
                for message_id in entry.data.input_message_ids or ():
                    if message_id not in posted or is_hidden(hidden, posted[message_id]):
                        yield entry.sequence, f"{message_id} is read before it was posted"
                    elif any(not is_hidden(hidden, place) for place in read.get(message_id, ())):
                        yield entry.sequence, f"{message_id} is read twice"
                    read.setdefault(message_id, set()).add(entry.sequence)
            case _:
                pass
    if log.finished and log.entries:
        hidden = hidden_ranges(rewinds, log.entries[-1].sequence)
        for key, place in posted.items():
            if not is_hidden(hidden, place) and all(is_hidden(hidden, one) for one in read.get(key, ())):
                yield place, f"{key} was never read"


def rewinds_go_back(log: Log) -> Iterator[Problem]:
    """A rewind names an earlier event."""
    for entry in log.entries:
        if isinstance(entry.data, SessionRewound) and not 1 <= entry.data.to_sequence < entry.sequence:
            yield entry.sequence, f"goes to {entry.data.to_sequence}"


# --- turns ------------------------------------------------------------------------------------------------------------


def turns_do_not_overlap(log: Log) -> Iterator[Problem]:
    """A turn begins when the one before it has idled the session, and only the running turn ends."""
    running: str | None = None
    known: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case TurnStarted(turn_id=turn):
                if running is not None:
                    yield entry.sequence, f"{turn} begins inside {running}"
                if turn in known:
                    yield entry.sequence, f"{turn} begins twice"
                known.add(turn)
                running = turn
            case TurnCompleted() | TurnFailed() | TurnCancelled() | TurnSealed():
                if entry.data.turn_id not in known:
                    yield entry.sequence, f"{entry.data.turn_id} ends without having begun"
            case SessionIdled(turn_id=turn):
                running = None if turn == running else running
            case _:
                pass


def turns_end_once(log: Log) -> Iterator[Problem]:
    """A turn has one end, and the session idles once after it."""
    ended: set[str] = set()
    idled: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case TurnCompleted() | TurnFailed() | TurnCancelled() | TurnSealed():
                if entry.data.turn_id in ended:
                    yield entry.sequence, f"{entry.data.turn_id} ends twice"
                ended.add(entry.data.turn_id)
            case SessionIdled(turn_id=turn):
                if turn not in ended:
                    yield entry.sequence, f"the session idles before {turn} ended"
                if turn in idled:
                    yield entry.sequence, f"the session idles twice after {turn}"
                idled.add(turn)
            case _:
                pass


def nothing_follows_a_turns_end(log: Log) -> Iterator[Problem]:
    """Events of a turn lie between its start and its end; only the notes of a cancel and the idling come after."""
    started: set[str] = set()
    ended: set[str] = set()
    for entry in log.entries:
        turn = entry.context.turn_id
        if turn is None:
            continue
        match entry.data:
            case TurnStarted() | SessionActivated() | SessionIdled():
                started.add(turn)
            case TurnCompleted() | TurnFailed() | TurnCancelled() | TurnSealed():
                ended.add(turn)
            case OutputMessageCompleted(message=message) if _synthetic(message):
                pass
            case _:
                if turn in ended:
                    yield entry.sequence, f"{entry.event.type} after the end of {turn}"
                elif turn not in started:
                    yield entry.sequence, f"{entry.event.type} before {turn} began"


def session_ends_idle(log: Log) -> Iterator[Problem]:
    """In a finished log the last turn has idled the session."""
    running: Entry | None = None
    for entry in log.entries:
        match entry.data:
            case TurnStarted():
                running = entry
            case SessionIdled():
                running = None
            case _:
                pass
    if log.finished and running is not None:
        yield running.sequence, f"{running.context.turn_id} never idled the session"


# --- reason -----------------------------------------------------------------------------------------------------------


def reason_steps_pair(log: Log) -> Iterator[Problem]:
    """One step at a time: each `reason.started` has one `reason.completed` of its exec id."""
    running: dict[str | None, int] = {}
    done: set[str | None] = set()
    for entry in log.entries:
        step = entry.context.exec_id
        match entry.data:
            case ReasonStarted():
                if step in running or step in done:
                    yield entry.sequence, f"{step} starts twice"
                elif running:
                    yield entry.sequence, f"{step} starts inside {next(iter(running))}"
                running[step] = entry.sequence
            case ReasonCompleted():
                if running.pop(step, None) is None:
                    yield entry.sequence, f"{step} completes {'twice' if step in done else 'without having started'}"
                done.add(step)
            case _:
                pass
    if log.finished:
        yield from ((place, f"{step} never completed") for step, place in running.items())


def recoveries_are_retries(log: Log) -> Iterator[Problem]:
    """`reason.recovered` belongs to a running step, to a later attempt each time, and tells how much text is void."""
    running: set[str | None] = set()
    attempts: dict[str | None, int] = {}
    lengths: dict[str, int] = {}
    for entry in log.entries:
        step = entry.context.exec_id
        match entry.data:
            case ReasonStarted():
                running.add(step)
            case ReasonCompleted():
                running.discard(step)
            case OutputMessageDelta(message_id=message_id, offset=offset, delta=delta):
                lengths[message_id] = offset + len(delta)
            case ReasonRecovered(message_id=message_id, attempt=attempt, accumulated_len=length):
                if step not in running:
                    yield entry.sequence, f"{step} is not running"
                if attempt <= attempts.get(step, 1):
                    yield entry.sequence, f"attempt {attempt} of {step} is no retry"
                if length != lengths.get(message_id, 0):
                    yield entry.sequence, f"{length} characters are void, {lengths.get(message_id, 0)} were sent"
                attempts[step] = attempt
            case _:
                pass


def prompts_are_legal(log: Log) -> Iterator[Problem]:
    """At each reason step: every call before it answered, every answer after its call, every message read so far in it."""
    told = [entry.event for entry in log.entries if entry.event.type in CONVERSATION_TYPES and not entry.unreadable]
    steps = [place for place, event in enumerate(told) if event.type == "reason.started"]
    rewinds = [
        (entry.sequence, entry.data.to_sequence) for entry in log.entries if isinstance(entry.data, SessionRewound)
    ]
    stride = max(1, -(-len(steps) // REBUILT_PROMPTS))
    for place in steps[::-stride]:
        hidden = hidden_ranges(rewinds, told[place].sequence)
        seen = [event for event in told[: place + 1] if not is_hidden(hidden, event.sequence)]
        prompt = conversation_of(seen).messages
        yield from ((told[place].sequence, problem) for problem in _illegal(prompt))


def _illegal(prompt: Sequence[Message]) -> Iterator[str]:
    waiting: set[str] = set()
    for message in prompt:
        if message.role is Role.TOOL_RESULT:
            for part in message.content:
                if not isinstance(part, ToolResultPart):
                    yield "a tool message holds something else than a result"
                elif part.tool_call_id not in waiting:
                    yield f"a result of {part.tool_call_id} without its call"
                elif not message.created_at:  # what the projection puts where the log has none
                    yield f"{part.tool_call_id} is not answered"
                else:
                    waiting.discard(part.tool_call_id)
            continue
        if waiting:
            yield f"{message.role.value} message before the results of {', '.join(sorted(waiting))}"
        waiting = {call.id for call in message.tool_calls}


# --- messages out -----------------------------------------------------------------------------------------------------


def answers_complete_once(log: Log) -> Iterator[Problem]:
    """Each agent message begins once and completes once. Only notes of the engine and apologies may complete unbegun."""
    begun: dict[str, int] = {}
    completed: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case OutputMessageStarted(message_id=message_id):
                if message_id in begun:
                    yield entry.sequence, f"{message_id} begins twice"
                begun[message_id] = entry.sequence
            case OutputMessageCompleted(message=message, error_code=error_code):
                if message.id in completed:
                    yield entry.sequence, f"{message.id} completes twice"
                elif message.id not in begun and not _synthetic(message) and error_code is None:
                    yield entry.sequence, f"{message.id} completes without having begun"
                completed.add(message.id)
            case _:
                pass
    if log.finished:
        yield from ((place, f"{key} never completed") for key, place in begun.items() if key not in completed)


def deltas_stay_inside_their_message(log: Log) -> Iterator[Problem]:
    """A delta comes after its message began and before it completed."""
    open_messages: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case OutputMessageStarted(message_id=message_id):
                open_messages.add(message_id)
            case OutputMessageCompleted(message=message):
                open_messages.discard(message.id)
            case OutputMessageDelta(message_id=message_id) | ReasonThinkingDelta(message_id=message_id):
                if message_id not in open_messages:
                    yield entry.sequence, f"{message_id} is not being written"
            case _:
                pass


def deltas_add_up(log: Log) -> Iterator[Problem]:
    """Deltas leave no gap, begin anew only after a `reason.recovered` with mode `restart`, and add up to the completed text.

    With mode `finalize` the text is whole: nothing may follow it. Of a replaced message the replacement is the whole text.

    Exempt are messages whose text was given up: those that end as an apology.
    """
    texts: dict[str, str] = {}
    void: set[str] = set()
    whole: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case OutputMessageStarted(message_id=message_id):
                texts.setdefault(message_id, "")
            case ReasonRecovered(message_id=message_id, mode="finalize"):
                whole.add(message_id)
            case ReasonRecovered(message_id=message_id):
                void.add(message_id)
                whole.discard(message_id)
            case OutputMessageDelta(message_id=message_id, offset=offset, delta=delta):
                text = texts.get(message_id, "")
                if message_id in whole:
                    yield entry.sequence, f"a delta of {message_id}, which was whole"
                if offset != (0 if message_id in void else len(text)):
                    yield entry.sequence, f"a delta of {message_id} at {offset} after {len(text)} characters"
                void.discard(message_id)
                texts[message_id] = text[:offset] + delta
            case OutputMessageCompleted(message=message, error_code=None) if message.id in texts:
                text = texts.pop(message.id)
                # A text that is void but was not begun anew when its turn was stopped is kept: it is what clients have seen.
                if message.text != text and not (message.id in void and not message.text):
                    yield entry.sequence, f"{message.id} holds {message.text[:80]!r}, its deltas {text[:80]!r}"
            case OutputMessageReplaced(message_id=message_id, replacement=replacement):
                texts[message_id] = replacement
                whole.add(message_id)
            case _:
                pass


def thinking_adds_up(log: Log) -> Iterator[Problem]:
    """Thinking deltas of a step leave no gap, may begin anew, and add up to the step's completed thinking."""
    texts: dict[str | None, str] = {}
    for entry in log.entries:
        step = entry.context.exec_id
        match entry.data:
            case ReasonThinkingDelta(offset=offset, delta=delta):
                text = texts.get(step, "")
                if offset not in (0, len(text)):
                    yield entry.sequence, f"thinking of {step} at {offset} after {len(text)} characters"
                texts[step] = text[:offset] + delta
            case ReasonThinkingCompleted(thinking=thinking) if thinking != texts.get(step, ""):
                yield entry.sequence, f"{step} thought {thinking[:80]!r}, its deltas say {texts.get(step, '')[:80]!r}"
            case _:
                pass


# --- tool calls -------------------------------------------------------------------------------------------------------


def calls_have_one_result(log: Log) -> Iterator[Problem]:
    """Each call of a completed agent message has exactly one `tool.completed`; there is none without a call."""
    calls: dict[str, int] = {}
    answered: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case OutputMessageCompleted(message=message):
                for call in message.tool_calls:
                    if call.id in calls:
                        yield entry.sequence, f"{call.id} is called twice"
                    calls[call.id] = entry.sequence
            case ToolCompleted(tool_call_id=call_id):
                if call_id not in calls:
                    yield entry.sequence, f"{call_id} was never called"
                if call_id in answered:
                    yield entry.sequence, f"{call_id} has two results"
                answered.add(call_id)
            case _:
                pass
    if log.finished:
        yield from ((place, f"{key} has no result") for key, place in calls.items() if key not in answered)


def calls_start_once(log: Log) -> Iterator[Problem]:
    """A call is started once in the log, however many attempts it takes, and within a batch that lists it."""
    started: set[str] = set()
    listed: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case ActStarted(tool_calls=summaries):
                listed.update(summary.id for summary in summaries)
            case ToolStarted(tool_call=call):
                if call.id in started:
                    yield entry.sequence, f"{call.id} starts twice"
                if call.id not in listed:
                    yield entry.sequence, f"{call.id} starts outside of a batch"
                started.add(call.id)
            case _:
                pass


def settled_calls_rest(log: Log) -> Iterator[Problem]:
    """What a call does, it does between its start and its result: a call that is settled never runs again."""
    running: set[str] = set()
    settled: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case ToolStarted(tool_call=call):
                if call.id in settled:
                    yield entry.sequence, f"{call.id} starts after its result"
                running.add(call.id)
            case ToolCompleted(tool_call_id=call_id):
                settled.add(call_id)
                running.discard(call_id)
            case ToolProgress(tool_call_id=call_id) | ToolOutputDelta(tool_call_id=call_id):
                if call_id not in running:
                    yield entry.sequence, f"{entry.event.type} of {call_id}, which is not running"
            case _:
                pass


def successes_have_a_source(log: Log) -> Iterator[Problem]:
    """A call that succeeded was started by a worker, or requested from the client, before; a request comes once, unanswered."""
    sources: set[str] = set()
    requested: set[str] = set()
    settled: set[str] = set()
    for entry in log.entries:
        match entry.data:
            case ToolStarted(tool_call=call):
                sources.add(call.id)
            case ToolCallRequested(tool_calls=calls):
                for call in calls:
                    if call.id in requested or call.id in settled:
                        yield entry.sequence, f"{call.id} is requested again"
                    requested.add(call.id)
            case ToolCompleted(tool_call_id=call_id, success=success):
                if success and call_id not in sources | requested:
                    yield entry.sequence, f"{call_id} succeeded without having run"
                settled.add(call_id)
            case _:
                pass


def batches_pair(log: Log) -> Iterator[Problem]:
    """Each `act.started` has one `act.completed` of its exec id, after the results of all its calls, which it counts."""
    open_batches: dict[str | None, Entry] = {}
    done: set[str | None] = set()
    outcomes: dict[str, bool] = {}
    for entry in log.entries:
        step = entry.context.exec_id
        match entry.data:
            case ActStarted():
                if step in open_batches or step in done:
                    yield entry.sequence, f"{step} starts twice"
                open_batches[step] = entry
            case ToolCompleted(tool_call_id=call_id, success=success):
                outcomes[call_id] = success
            case ActCompleted(success_count=succeeded, error_count=failed):
                batch = open_batches.pop(step, None)
                if batch is None or not isinstance(batch.data, ActStarted):
                    yield entry.sequence, f"{step} completes {'twice' if step in done else 'without having started'}"
                    continue
                done.add(step)
                results = [outcomes.get(summary.id) for summary in batch.data.tool_calls]
                if None in results:
                    yield entry.sequence, f"{step} completes before its calls"
                elif (succeeded, failed) != (results.count(True), results.count(False)):
                    yield entry.sequence, f"{step} counts {succeeded} and {failed}, its results differ"
            case _:
                pass
    if log.finished:
        yield from ((batch.sequence, f"{step} never completed") for step, batch in open_batches.items())


def _synthetic(message: Message) -> bool:
    return bool(message.metadata and message.metadata.get(SYNTHETIC))


RULES: Final[tuple[Rule, ...]] = (
    sequences_are_contiguous,
    ids_are_unique,
    timestamps_never_go_back,
    payloads_are_readable,
    messages_are_read_once,
    rewinds_go_back,
    turns_do_not_overlap,
    turns_end_once,
    nothing_follows_a_turns_end,
    session_ends_idle,
    reason_steps_pair,
    recoveries_are_retries,
    prompts_are_legal,
    answers_complete_once,
    deltas_stay_inside_their_message,
    deltas_add_up,
    thinking_adds_up,
    calls_have_one_result,
    calls_start_once,
    settled_calls_rest,
    successes_have_a_source,
    batches_pair,
)


# --- what a client saw ------------------------------------------------------------------------------------------------

Seen = Sequence[Mapping[str, object]]


def seen_once_in_order(seen: Seen, log: Sequence[StoredEvent]) -> Iterator[Problem]:
    """Each event came once, after all those before it."""
    last = 0
    for event in seen:
        sequence = event.get("sequence")
        if not isinstance(sequence, int):
            yield last, f"an event without a sequence came after {last}"
            continue
        if sequence <= last:
            yield sequence, f"came after {last}"
        last = max(last, sequence)


def seen_all_there_is(seen: Seen, log: Sequence[StoredEvent]) -> Iterator[Problem]:
    """No event of the log is missing, and none came that the log does not hold."""
    ids = {event.get("id") for event in seen}
    stored = {event.id for event in log}
    yield from ((event.sequence, f"{event.type} {event.id} was not seen") for event in log if event.id not in ids)
    yield from ((0, f"{key} is not in the log") for key in sorted(str(key) for key in ids - stored))


def seen_as_stored(seen: Seen, log: Sequence[StoredEvent]) -> Iterator[Problem]:
    """Every field is what the log holds; deltas carry, in addition, the whole text so far."""
    accumulator = Accumulator()
    expected = {event.id: _wire(event, accumulator) for event in log}
    for event in seen:
        wanted = expected.get(str(event.get("id")))
        if wanted is not None and wanted != event:
            fields = sorted(key for key in wanted.keys() | event.keys() if wanted.get(key) != event.get(key))
            yield _place(wanted), f"{wanted['type']} differs in {', '.join(fields)}"


def _wire(event: StoredEvent, accumulator: Accumulator) -> dict[str, object]:
    wire: dict[str, object] = {
        "id": event.id,
        "type": event.type,
        "ts": timestamp(event.ts),
        "session_id": event.session_id,
        "sequence": event.sequence,
        "context": msgspec.json.decode(event.context),
        "data": msgspec.json.decode(accumulator.wire_data(event)),
    }
    if event.metadata is not None:
        wire["metadata"] = msgspec.json.decode(event.metadata)
    if event.tags is not None:
        wire["tags"] = event.tags
    return wire


def _place(wire: Mapping[str, object]) -> int:
    sequence = wire["sequence"]
    return sequence if isinstance(sequence, int) else 0


SEEN_RULES: Final = (seen_once_in_order, seen_all_there_is, seen_as_stored)
