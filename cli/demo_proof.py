"""What the demo claims, and whether the stored log and what the client saw bear it out.

A claim is about something that has to have happened first. When a real model did not do it, the claim is not shown, and that
is said; it is no failure. What was put to the test and does not hold always is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from cli.demo_story import EFFECT_TOOL, Kill, SeenEvent, Teller, Told
from db.event_log import EventLog
from domain.events import StoredEvent, TokenUsage
from domain.log_check import Violation, check_log, check_seen

PAGE_EVENTS: Final = 5_000
NO_CALL: Final = "the model called no tool"


class Finding(Struct, frozen=True, kw_only=True):
    """`holds` None: nothing happened that could show it; `figures` say why."""

    holds: bool | None
    claim: str
    figures: str


def findings(told: Told, log: Sequence[StoredEvent], effects: Sequence[str], teller: Teller) -> list[Finding]:
    """Each claim of the demo with what was counted; all of them have to hold, but for those that a real model kept from
    being shown."""
    return _of_real_model(told, log, effects, teller) if teller.is_real else _of_script(told, log, effects)


async def read_log(log: EventLog, session_id: str) -> list[StoredEvent]:
    events: list[StoredEvent] = []
    while page := await log.read(session_id, after_sequence=events[-1].sequence if events else 0, limit=PAGE_EVENTS):
        events.extend(page)
    return events


def _of_script(told: Told, log: Sequence[StoredEvent], effects: Sequence[str]) -> list[Finding]:
    recovered = [kill for kill in told.kills if kill.recovered_seconds is not None]
    return [
        Finding(
            holds=len(recovered) == len(told.kills),
            claim="the worker was killed twice, the turn went on",
            figures=", ".join(f"{kill.how} after {kill.recovered_seconds:.1f} s" for kill in recovered) or "not once",
        ),
        *_same_as_log(told, log),
        _messages_are_whole(told),
        _one_result_per_call(told),
        Finding(
            holds=len(effects) == 1,
            claim="the invitation was sent once",
            figures=f"{len(effects)} line(s) in the file that stands for the world",
        ),
        _log_is_sound(log),
    ]


def _of_real_model(told: Told, log: Sequence[StoredEvent], effects: Sequence[str], teller: Teller) -> list[Finding]:
    in_answer, in_tool = told.kills
    called = _one_result_per_call(told)
    idle = "no tool ran long enough to be caught in" if _asked(told) else NO_CALL
    return [
        _went_on(in_answer, f"no text grew past {teller.story.kill_after_characters} characters"),
        *([_one_generation(told, in_answer)] if teller.background else []),
        _went_on(in_tool, idle),
        *_same_as_log(told, log),
        _messages_are_whole(told),
        called if _asked(told) else Finding(holds=None, claim=called.claim, figures=NO_CALL),
        _nothing_sent_twice(told, effects),
        _answered(told),
        _cost_is_told(told, teller),
        _log_is_sound(log),
    ]


# --- What both stories claim -----------------------------------------------------------------------------------------


def _same_as_log(told: Told, log: Sequence[StoredEvent]) -> list[Finding]:
    missing = {event.id for event in log} - {event.id for event in told.seen}
    doubled = len(told.seen) - len({event.id for event in told.seen})
    differences = check_seen([event.whole for event in told.seen], log)
    return [
        Finding(
            holds=not missing,
            claim="nothing lost",
            figures=f"{len(log) - len(missing)} of the {len(log)} stored events reached the client",
        ),
        Finding(
            holds=not doubled and not differences,
            claim="nothing doubled, same order, same content",
            figures=_words(differences) or f"{len(told.seen)} events compared with the log, {doubled} came twice",
        ),
    ]


def _messages_are_whole(told: Told) -> Finding:
    messages = [_shown_and_stored(told.seen, event) for event in told.seen if event.type == "output.message.completed"]
    return Finding(
        holds=bool(messages) and all(shown == kept for shown, kept in messages),
        claim="every streamed message is whole",
        figures=f"{sum(shown == kept for shown, kept in messages)} of {len(messages)} add up to the stored text",
    )


def _one_result_per_call(told: Told) -> Finding:
    asked = _asked(told)
    answered = Counter(event.text("tool_call_id") for event in told.seen if event.type == "tool.completed")
    return Finding(
        holds=bool(asked) and asked == answered and set(answered.values()) == {1},
        claim="one result per tool call",
        figures=f"{sum(answered.values())} results for {len(asked)} calls",
    )


def _log_is_sound(log: Sequence[StoredEvent]) -> Finding:
    broken = check_log(log)
    return Finding(
        holds=not broken,
        claim="the log breaks no rule",
        figures=_words(broken) or "order, pairs, receipts and results checked",
    )


# --- What is claimed of a real model alone ---------------------------------------------------------------------------


def _went_on(kill: Kill, without: str) -> Finding:
    claim = f"the worker was killed {kill.where}, the turn went on"
    if not kill.landed:
        return Finding(
            holds=None, claim=claim, figures="it was over when the signal came" if kill.too_late else without
        )
    if kill.recovered_seconds is None:
        return Finding(holds=False, claim=claim, figures="nothing of it came afterwards")
    return Finding(holds=True, claim=claim, figures=f"{kill.how} after {kill.recovered_seconds:.1f} s")


def _one_generation(told: Told, kill: Kill) -> Finding:
    """The engine takes text back whenever it comes to another response: where none was, it stayed with the same one."""
    claim = "one generation, no text taken back"
    if not kill.landed:
        return Finding(holds=None, claim=claim, figures="none was interrupted")
    about = [event for event in told.seen if event.subject == kill.subject]
    deltas = [event for event in about if event.type == "output.message.delta"]
    void = [event for event in about if event.type == "reason.recovered" and event.text("mode") != "finalize"]
    steps = {event.context.get("exec_id") for event in deltas}
    calls = [one for one in told.seen if one.type == "llm.generation" and one.context.get("exec_id") in steps]
    ends = [len(event.text("accumulated")) for event in deltas]
    response = calls[0].part("metadata").get("response_id") if calls else None
    before = sum(event.ts.timestamp() <= (kill.at or 0) for event in deltas)
    return Finding(
        holds=not void and len(calls) == 1 and ends == sorted(set(ends)),
        claim=claim,
        figures=f"response {response}: {before} pieces before the kill, {len(deltas) - before} after it, "
        f"{len(void)} times taken back",
    )


def _nothing_sent_twice(told: Told, effects: Sequence[str]) -> Finding:
    """Each effect is a line that begins with its tool call's id. A call whose outcome is unknown may have left none."""
    claim = "no invitation was sent twice"
    calls = [
        event
        for event in told.seen
        if event.type == "tool.started" and event.part("tool_call").get("name") == EFFECT_TOOL
    ]
    if not calls:
        return Finding(holds=None, claim=claim, figures="the model sent none")
    times = Counter(line.split()[0] for line in effects)
    return Finding(
        holds=max(times.values(), default=0) <= 1,
        claim=claim,
        figures=f"{len(effects)} line(s) in the file that stands for the world, for {len(calls)} call(s)",
    )


def _answered(told: Told) -> Finding:
    ended = [event for event in told.seen if event.type == "turn.completed"]
    messages = [event for event in told.seen if event.type == "output.message.completed"]
    text = _stored_text(messages[-1]) if messages else ""
    iterations = ended[-1].data.get("iterations") if ended else 0
    return Finding(
        holds=len(ended) == 1 and bool(text.strip()),
        claim="the turn ended with an answer",
        figures=f"{len(text)} characters after {iterations} iterations",
    )


def _cost_is_told(told: Told, teller: Teller) -> Finding:
    claim = "the turn tells what it cost"
    usage = _usage(told)
    if usage is None:
        return Finding(holds=False, claim=claim, figures="it ended without a usage")
    figures = _tokens(usage)
    if usage.effective_cost_usd is None:
        figures += "; no price is known for this model"
        return Finding(holds=False if teller.is_priced else None, claim=claim, figures=figures)
    source = "as the provider says" if usage.actual_cost_usd is not None else "by the price list"
    figures = f"${usage.effective_cost_usd:.4f} {source}, {figures}"
    if _restarted(told):
        figures += "; what the provider takes for the answer that was cut off is not in it"
    return Finding(holds=True, claim=claim, figures=figures)


def _usage(told: Told) -> TokenUsage | None:
    ended = [event for event in told.seen if event.type == "turn.completed" and event.part("usage")]
    return msgspec.convert(ended[-1].part("usage"), TokenUsage) if ended else None


def _tokens(usage: TokenUsage) -> str:
    cached = f" ({usage.cache_read_tokens:,} from the cache)" if usage.cache_read_tokens else ""
    return f"{usage.prompt_tokens:,} tokens in{cached}, {usage.output_tokens:,} out"


def _restarted(told: Told) -> bool:
    return any(event.type == "reason.recovered" and event.text("mode") != "finalize" for event in told.seen)


def _words(violations: Sequence[Violation]) -> str:
    return "; ".join(f"{one.rule} at {one.sequence}: {one.message}" for one in violations[:3])


def _asked(told: Told) -> Counter[str]:
    return Counter(call for event in told.seen for call in _calls(event))


def _calls(event: SeenEvent) -> list[str]:
    if event.type != "act.started":
        return []
    calls = event.data["tool_calls"]
    assert isinstance(calls, list)
    return [str(call["id"]) for call in calls]


def _shown_and_stored(seen: Sequence[SeenEvent], completed: SeenEvent) -> tuple[str, str]:
    """What the deltas of a message added up to on the client's screen, and the message as it is stored."""
    deltas = [event for event in seen if event.type == "output.message.delta" and event.subject == completed.subject]
    return deltas[-1].text("accumulated") if deltas else "", _stored_text(completed)


def _stored_text(completed: SeenEvent) -> str:
    content = completed.part("message")["content"]
    assert isinstance(content, list)
    return "".join(part["text"] for part in content if part["type"] == "text")
