"""The log checker: legal logs of every shape pass, and for each rule there is a fault that breaks it and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.frames import event_json
from domain.clock import timestamp
from domain.events import (
    Accumulator,
    ActCompleted,
    ActStarted,
    EventContext,
    EventPayload,
    GenerationMetadata,
    GenerationOutput,
    InputMessage,
    LlmGeneration,
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
    SessionIdled,
    SessionRewound,
    SessionStarted,
    StoredEvent,
    ToolCallRequested,
    ToolCompleted,
    ToolProgress,
    ToolStarted,
    ToolStatus,
    TurnCancelled,
    TurnCompleted,
    TurnFailed,
    TurnStarted,
)
from domain.log_check import RULES, SEEN_RULES, check_log, check_seen
from domain.messages import Message, Role, TextPart, ToolCallPart
from domain.tools import ToolCall, ToolCallSummary

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SESSION = f"session_{1:032x}"
SYNTHETIC: dict[str, object] = {"synthetic": True}


@dataclass
class Writer:
    """Writes a log the way the engine does."""

    events: list[StoredEvent] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    turns: int = 0
    steps: int = 0
    calls: int = 0
    messages: int = 0
    turn: str | None = None

    def add(self, payload: EventPayload, *, step: str | None = None, turn: str | None = None) -> None:
        self.events.append(stored(len(self.events) + 1, payload, turn=turn or self.turn, step=step))

    def post(self) -> None:
        self.messages += 1
        message_id = f"message_user{self.messages}"
        self.unread.append(message_id)
        message = Message(id=message_id, role=Role.USER, content=[TextPart(text="hi")], created_at=timestamp(BEGIN))
        self.events.append(stored(len(self.events) + 1, InputMessage(message=message)))

    def start_turn(self) -> None:
        self.turns += 1
        self.turn = f"turn_{self.turns}"
        read, self.unread = self.unread, []
        self.add(SessionActivated(turn_id=self.turn, input_message_id=read[0]))
        self.add(TurnStarted(turn_id=self.turn, input_message_id=read[0], input_message_ids=read))

    def reason(
        self,
        pieces: list[str],
        *,
        thinking: list[str] | None = None,
        calls: int = 0,
        restart_after: int | None = None,
        interrupted: bool = False,
    ) -> list[str]:
        """One step; returns the ids of its calls."""
        self.steps += 1
        step, message_id = f"exec_r{self.steps}", f"message_agent{self.steps}"
        assert self.turn is not None
        read, self.unread = self.unread, []
        self.add(ReasonStarted(harness_id="h", input_message_ids=read or None), step=step)
        self.add(OutputMessageStarted(turn_id=self.turn, message_id=message_id), step=step)
        if restart_after is not None:
            void = self.deltas(pieces[:restart_after], message_id, step)
            if void:
                recovered = ReasonRecovered(
                    turn_id=self.turn, mode="restart", accumulated_len=len(void), message_id=message_id, attempt=2
                )
                self.add(recovered, step=step)
        offset = 0
        for piece in thinking or []:
            delta = ReasonThinkingDelta(turn_id=self.turn, message_id=message_id, delta=piece, offset=offset)
            self.add(delta, step=step)
            offset += len(piece)
        text = self.deltas(pieces, message_id, step)
        if thinking and not interrupted:
            self.add(ReasonThinkingCompleted(turn_id=self.turn, thinking="".join(thinking)), step=step)
        made = [] if interrupted else [f"call_{self.calls + number}" for number in range(1, calls + 1)]
        self.calls += len(made)
        content = [TextPart(text=text), *(ToolCallPart(id=key, name="t", arguments={}) for key in made)]
        message = Message(id=message_id, role=Role.AGENT, content=content, created_at=timestamp(BEGIN))
        self.add(OutputMessageCompleted(message=message), step=step)
        completed = ReasonCompleted(success=not interrupted, has_tool_calls=bool(made), tool_call_count=len(made))
        self.add(completed, step=step)
        return made

    def deltas(self, pieces: list[str], message_id: str, step: str) -> str:
        text = ""
        assert self.turn is not None
        for piece in pieces:
            delta = OutputMessageDelta(turn_id=self.turn, message_id=message_id, delta=piece, offset=len(text))
            self.add(delta, step=step)
            text += piece
        return text

    def act(self, calls: list[str], outcomes: list[ToolStatus], *, unstarted: int = 0) -> None:
        """A batch of server-side calls; the last `unstarted` are settled without having run."""
        step = f"exec_a{calls[0]}"
        running = calls[: len(calls) - unstarted]
        for call in running:
            if call == running[0]:
                self.add(ActStarted(tool_calls=[ToolCallSummary(id=key, name="t") for key in calls]), step=step)
            self.add(ToolStarted(tool_call=ToolCall(id=call, name="t", arguments={})), step=f"exec_{call}")
            self.add(ToolProgress(tool_call_id=call, tool_name="t", message="half"), step=f"exec_{call}")
        succeeded = 0
        for number, call in enumerate(calls):
            status = outcomes[number % len(outcomes)] if call in running else ToolStatus.CANCELLED
            self.settle(call, status)
            succeeded += status is ToolStatus.SUCCESS
        if running:
            counts = ActCompleted(completed=True, success_count=succeeded, error_count=len(calls) - succeeded)
            self.add(counts, step=step)

    def request(self, calls: list[str], outcomes: list[ToolStatus]) -> None:
        """Client-side calls and their results."""
        self.add(ToolCallRequested(tool_calls=[ToolCall(id=call, name="c", arguments={}) for call in calls]))
        for number, call in enumerate(calls):
            self.settle(call, outcomes[number % len(outcomes)])

    def settle(self, call: str, status: ToolStatus) -> None:
        result = ToolCompleted(tool_call_id=call, tool_name="t", success=status is ToolStatus.SUCCESS, status=status)
        self.add(result, step=f"exec_{call}")

    def end(self, how: str) -> None:
        assert self.turn is not None
        match how:
            case "failed":
                apology = Message(
                    id=f"message_sorry{self.turns}", role=Role.AGENT, content=[], created_at=timestamp(BEGIN)
                )
                self.add(OutputMessageCompleted(message=apology, error_code="processing_error"))
                self.add(TurnFailed(turn_id=self.turn, error="e"))
            case "cancelled":
                read, self.unread = self.unread, []
                self.add(TurnCancelled(turn_id=self.turn, input_message_ids=read or None))
                note = Message(
                    id="message_note", role=Role.USER, content=[], created_at=timestamp(BEGIN), metadata=SYNTHETIC
                )
                self.events.append(stored(len(self.events) + 1, InputMessage(message=note)))
                answer = Message(
                    id=f"message_stop{self.turns}",
                    role=Role.AGENT,
                    content=[],
                    created_at=timestamp(BEGIN),
                    metadata=SYNTHETIC,
                )
                self.add(OutputMessageCompleted(message=answer))
            case _:
                self.add(TurnCompleted(turn_id=self.turn, iterations=1))
        self.add(SessionIdled(turn_id=self.turn))
        self.turn = None


def stored(
    sequence: int, payload: EventPayload, *, turn: str | None = None, step: str | None = None, ms: int | None = None
) -> StoredEvent:
    return StoredEvent(
        id=f"event_{sequence}",
        type=payload.event_type,
        ts=BEGIN + timedelta(milliseconds=sequence if ms is None else ms),
        session_id=SESSION,
        sequence=sequence,
        context=msgspec.json.encode(EventContext(turn_id=turn, exec_id=step)),
        data=msgspec.json.encode(payload),
    )


pieces = st.lists(st.text(alphabet="abé\U0001f30d\n", min_size=1, max_size=4), max_size=4)
statuses = st.lists(st.sampled_from(ToolStatus), min_size=1, max_size=3)


@st.composite
def legal_logs(draw: st.DrawFn) -> list[StoredEvent]:
    writer = Writer()
    writer.events.append(stored(1, SessionStarted(harness_id="h")))
    for _ in range(draw(st.integers(0, 3))):
        for _ in range(draw(st.integers(0 if writer.unread else 1, 2))):
            writer.post()
        writer.start_turn()
        for _ in range(draw(st.integers(0, 3))):
            if draw(st.booleans()):
                writer.post()
            text = draw(pieces)
            calls = writer.reason(
                text,
                thinking=draw(st.none() | pieces.filter(bool)),
                calls=draw(st.integers(0, 3)),
                restart_after=draw(st.none() | st.integers(0, len(text))),
                interrupted=draw(st.booleans()),
            )
            server = calls[: draw(st.integers(0, len(calls)))]
            client = calls[len(server) :]
            if server:
                writer.act(server, draw(statuses), unstarted=draw(st.integers(0, len(server))))
            if client:
                writer.request(client, draw(statuses))
        how = draw(st.sampled_from(["completed", "failed", "cancelled"]))
        if how == "completed" and writer.unread:
            writer.reason(draw(pieces))
        if how == "cancelled" and draw(st.booleans()):
            writer.post()
        if how == "failed" and writer.unread:
            writer.reason([], interrupted=True)
        writer.end(how)
    return writer.events


def example_log() -> list[StoredEvent]:
    """One of everything."""
    writer = Writer()
    writer.events.append(stored(1, SessionStarted(harness_id="h")))
    writer.post()
    writer.start_turn()
    *server, client = writer.reason(["Let ", "me ", "look."], thinking=["Hm", "m."], calls=4, restart_after=1)
    writer.act(server, [ToolStatus.SUCCESS, ToolStatus.ERROR], unstarted=1)
    writer.request([client], [ToolStatus.SUCCESS])
    writer.post()
    writer.reason(["It ", "rains."])
    writer.end("completed")
    writer.post()
    writer.start_turn()
    writer.reason(["Wai"], interrupted=True)
    writer.request(writer.reason([], calls=1), [ToolStatus.CANCELLED])
    writer.post()
    writer.end("cancelled")
    return writer.events


@settings(max_examples=150, deadline=None)
@given(legal_logs())
def test_legal_logs_break_no_rule(log: list[StoredEvent]) -> None:
    assert check_log(log) == []


@settings(max_examples=60, deadline=None)
@given(legal_logs(), st.data())
def test_the_beginning_of_a_legal_log_is_legal_while_the_session_runs(
    log: list[StoredEvent], data: st.DataObject
) -> None:
    assert check_log(log[: data.draw(st.integers(0, len(log)))], finished=False) == []


# --- a fault for each rule --------------------------------------------------------------------------------------------

Log = list[StoredEvent]
Fault = Callable[[Log], Log]


def of(log: Log, event_type: str, number: int = 0) -> int:
    """Where the event of a type stands; negative numbers count from the end."""
    return [place for place, event in enumerate(log) if event.type == event_type][number]


def renumbered(log: Log) -> Log:
    return [
        msgspec.structs.replace(event, sequence=number, ts=BEGIN + timedelta(milliseconds=number))
        for number, event in enumerate(log, 1)
    ]


def lost(event_type: str, number: int = 0) -> Fault:
    def fault(log: Log) -> Log:
        place = of(log, event_type, number)
        return renumbered(log[:place] + log[place + 1 :])

    return fault


def twice(event_type: str, number: int = 0, *, after: int = 1) -> Fault:
    def fault(log: Log) -> Log:
        place = of(log, event_type, number)
        copy = msgspec.structs.replace(log[place], id="event_copy")
        return renumbered([*log[: place + after], copy, *log[place + after :]])

    return fault


def moved(event_type: str, number: int, *, before: str, other: int = 0, by: int = 0) -> Fault:
    """The event, moved to just before another one (`by` places later)."""

    def fault(log: Log) -> Log:
        place, target = of(log, event_type, number), of(log, before, other) + by
        rest = [event for event in log if event is not log[place]]
        target -= place < target
        return renumbered([*rest[:target], log[place], *rest[target:]])

    return fault


def extra(payload: EventPayload, *, before: str, number: int = 0, turn: str = "turn_1", step: str = "exec_x") -> Fault:
    def fault(log: Log) -> Log:
        place = of(log, before, number)
        return renumbered([*log[:place], stored(9_000, payload, turn=turn, step=step), *log[place:]])

    return fault


def edited(event_type: str, number: int = 0, **fields: object) -> Fault:
    def fault(log: Log) -> Log:
        place = of(log, event_type, number)
        data = msgspec.json.encode({**msgspec.json.decode(log[place].data), **fields})
        return [*log[:place], msgspec.structs.replace(log[place], data=data), *log[place + 1 :]]

    return fault


def replaced(place: int, **fields: object) -> Fault:
    """The event at a place, with other fields."""
    return lambda log: [
        msgspec.structs.replace(event, **fields) if number == place % len(log) else event
        for number, event in enumerate(log)
    ]


AGENT_MESSAGE = Message(id="message_x", role=Role.AGENT, content=[], created_at=timestamp(BEGIN))
GENERATION = LlmGeneration(messages=[], output=GenerationOutput(), metadata=GenerationMetadata(model="m", success=True))
PROGRESS = ToolProgress(tool_call_id="call_1", tool_name="t", message="m")


def start_of(call_id: str) -> ToolStarted:
    return ToolStarted(tool_call=ToolCall(id=call_id, name="t", arguments={}))


FAULTS: dict[str, dict[str, Fault]] = {
    "sequences_are_contiguous": {
        "a gap": replaced(-1, sequence=900),
        "not from 1": lambda log: log[1:],
    },
    "ids_are_unique": {"an id twice": lambda log: replaced(4, id=log[3].id)(log)},
    "timestamps_never_go_back": {"a step back": replaced(5, ts=BEGIN)},
    "payloads_are_readable": {
        "no payload": replaced(0, data=b"{}"),
        "a broken context": replaced(0, context=b'{"turn_id":1}'),
    },
    "messages_are_read_once": {
        "never read": edited("turn.cancelled", input_message_ids=[]),
        "read twice": edited("turn.cancelled", input_message_ids=["message_user4", "message_user3"]),
        "read unposted": edited("reason.started", 1, input_message_ids=["message_user2", "message_user9"]),
    },
    "rewinds_go_back": {
        "to what comes later": extra(SessionRewound(to_sequence=900, files=True), before="reason.started"),
    },
    "turns_do_not_overlap": {
        "a turn in a turn": lost("session.idled"),
        "an end without a beginning": extra(
            TurnCompleted(turn_id="turn_x", iterations=1), before="input.message", turn="turn_x"
        ),
    },
    "turns_end_once": {
        "two ends": twice("turn.completed"),
        "no end": lost("turn.completed"),
        "idled twice": twice("session.idled"),
    },
    "nothing_follows_a_turns_end": {
        "after": extra(GENERATION, before="turn.started", number=1),
        "before": extra(GENERATION, before="session.activated"),
    },
    "session_ends_idle": {"never idled": lost("session.idled", -1)},
    "reason_steps_pair": {
        "no completed": lost("reason.completed", -1),
        "two completed": twice("reason.completed"),
        "no started": lost("reason.started", -1),
        "one in another": moved("reason.completed", 0, before="reason.started", other=1, by=1),
    },
    "recoveries_are_retries": {
        "a first attempt": edited("reason.recovered", attempt=1),
        "a wrong length": edited("reason.recovered", accumulated_len=1),
        "no step": lambda log: replaced(of(log, "reason.recovered"), context=b'{"turn_id":"turn_1"}')(log),
    },
    "prompts_are_legal": {
        "answered too late": moved("tool.completed", 3, before="reason.completed", other=1),
    },
    "answers_complete_once": {
        "two completed": twice("output.message.completed", 1),
        "never completed": lost("output.message.completed", 1),
        "two beginnings": twice("output.message.started", 1),
        "no beginning": extra(OutputMessageCompleted(message=AGENT_MESSAGE), before="turn.completed"),
    },
    "deltas_stay_inside_their_message": {
        "text after the end": extra(
            OutputMessageDelta(turn_id="turn_1", message_id="message_agent1", delta="x", offset=0),
            before="reason.completed",
        ),
        "thinking after the end": extra(
            ReasonThinkingDelta(turn_id="turn_1", message_id="message_agent1", delta="x", offset=0),
            before="reason.completed",
        ),
    },
    "deltas_add_up": {
        "a delta lost": lost("output.message.delta", -3),
        "the last delta lost": lost("output.message.delta", -2),
        "the only delta lost": lost("output.message.delta", -1),
        "anew without a word": lost("reason.recovered"),
        "text after it was whole": edited("reason.recovered", mode="finalize"),
        "another text": edited("output.message.delta", -1, delta="Run"),
    },
    "thinking_adds_up": {
        "a thought lost": lost("reason.thinking.delta", 1),
        "a gap": edited("reason.thinking.delta", 1, offset=9),
    },
    "calls_have_one_result": {
        "two results": twice("tool.completed"),
        "no call": extra(
            ToolCompleted(tool_call_id="call_x", tool_name="t", success=False, status=ToolStatus.ERROR),
            before="turn.completed",
        ),
        "no result": lost("tool.completed", -1),
    },
    "calls_start_once": {
        "two starts": twice("tool.started"),
        "in no batch": extra(start_of("call_4"), before="tool.completed", number=3),
    },
    "settled_calls_rest": {
        "work after the result": extra(PROGRESS, before="act.completed"),
        "work before the start": extra(PROGRESS, before="act.started"),
        "a start after the result": extra(start_of("call_3"), before="act.completed"),
    },
    "successes_have_a_source": {
        "never requested": lost("tool.call_requested"),
        "requested again": twice("tool.call_requested"),
        "requested too late": twice("tool.call_requested", after=2),
    },
    "batches_pair": {
        "no completed": lost("act.completed"),
        "two completed": twice("act.completed"),
        "two started": twice("act.started"),
        "a wrong count": edited("act.completed", success_count=2),
        "before its calls": moved("act.completed", 0, before="tool.completed"),
    },
}


def test_the_example_is_legal() -> None:
    assert check_log(example_log()) == []


def test_every_rule_has_a_fault() -> None:
    assert list(FAULTS) == [rule.__name__ for rule in RULES]
    assert all(rule.__doc__ for rule in (*RULES, *SEEN_RULES))


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        pytest.param(rule, fault, id=f"{rule}-{name}")
        for rule, faults in FAULTS.items()
        for name, fault in faults.items()
    ],
)
def test_a_fault_breaks_its_rule_and_no_other(rule: str, fault: Fault) -> None:
    violations = check_log(fault(example_log()))
    assert {violation.rule for violation in violations} == {rule}, violations
    assert all(violation.session_id == SESSION and violation.message for violation in violations)


def test_a_replaced_message_may_differ_from_its_deltas_but_not_from_its_replacement() -> None:
    log = edited("output.message.delta", -2, delta="pours.")(example_log())
    assert [violation.rule for violation in check_log(log)] == ["deltas_add_up"]
    place = of(log, "output.message.completed", 1)
    completed = msgspec.json.decode(log[place].data)
    text = completed["message"]["content"][0]["text"]

    def with_replacement(replacement: str) -> Log:
        payload = OutputMessageReplaced(
            turn_id="turn_1",
            message_id="message_agent2",
            guardrail_capability_id="guardrails",
            guardrail_id="words",
            reason_code="guardrail.blocklist",
            replacement=replacement,
        )
        replaced = msgspec.structs.replace(
            stored(9_000, GENERATION, turn="turn_1"), type=payload.event_type, data=msgspec.json.encode(payload)
        )
        return renumbered([*log[:place], replaced, *log[place:]])

    assert check_log(with_replacement(text)) == []
    assert [violation.rule for violation in check_log(with_replacement("another text"))] == ["deltas_add_up"]


# --- what a client saw ------------------------------------------------------------------------------------------------


def wire(log: Log) -> list[dict[str, object]]:
    """The log as a client gets it, through the code that serves it."""
    accumulator = Accumulator()
    return [msgspec.json.decode(event_json(event, accumulator)) for event in log]


@settings(max_examples=60, deadline=None)
@given(legal_logs())
def test_a_client_that_saw_everything_saw_the_log(log: Log) -> None:
    assert check_seen(wire(log), log) == []


Seen = list[dict[str, object]]


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        pytest.param("seen_once_in_order", lambda seen: [*seen[:5], seen[4], *seen[5:]], id="twice"),
        pytest.param("seen_once_in_order", lambda seen: [*seen[:4], seen[5], seen[4], *seen[6:]], id="swapped"),
        pytest.param("seen_all_there_is", lambda seen: seen[:4] + seen[5:], id="gap"),
        pytest.param("seen_all_there_is", lambda seen: seen[:-1], id="end missing"),
        pytest.param(
            "seen_all_there_is", lambda seen: [*seen, {**seen[-1], "id": "event_x", "sequence": 999}], id="unknown"
        ),
        pytest.param("seen_as_stored", lambda seen: [{**seen[0], "ts": "2020-01-01T00:00:00Z"}, *seen[1:]], id="time"),
        pytest.param("seen_as_stored", lambda seen: [{**seen[0], "data": {}}, *seen[1:]], id="data"),
        pytest.param("seen_as_stored", lambda seen: [without_accumulated(one) for one in seen], id="accumulated"),
    ],
)
def test_what_a_client_missed_or_got_wrong_is_told(rule: str, fault: Callable[[Seen], Seen]) -> None:
    log = example_log()
    assert {violation.rule for violation in check_seen(fault(wire(log)), log)} == {rule}


def without_accumulated(event: dict[str, object]) -> dict[str, object]:
    data = event["data"]
    assert isinstance(data, dict)
    return {**event, "data": {key: value for key, value in data.items() if key != "accumulated"}}
