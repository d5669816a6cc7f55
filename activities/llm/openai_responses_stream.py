"""From the events of the Responses API to ours.

Events are read as JSON, not as the SDK's types: an event or an item that is newer than the SDK must neither break a stream nor
change on its way into the opaque state.

Whatever arrives, something is yielded for it, for silence is how the engine tells that a provider has stalled. Calls, state and
usage come from the response object of the terminal event, which is whole even when the stream was taken up in its middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from activities.llm.failures import parse_arguments
from activities.llm.openai_responses_request import BETWEEN_MESSAGES, StateItem
from activities.llm.openai_sdk import error_of, model_error
from domain.events import TokenUsage
from domain.messages import Phase
from domain.model import (
    Alive,
    Began,
    Finished,
    FinishReason,
    ModelError,
    ReasoningItem,
    ResumePoint,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.tools import ToolCall

_REFUSED_STATE: Final = ("encrypted content", "items are not persisted", "required following item", "'reasoning' item")
"""Words in which OpenAI and those who speak its dialect refuse reasoning that goes back to them."""

Json = Mapping[str, Any]


class ProviderFailure(Exception):
    """The provider reported an error inside a stream. No text of its own: it is not to be shown, `model_error` is.

    `raised` is what the SDK made of it, if it did: it knows one of the ways in which errors are reported.
    """

    def __init__(self, error: Json, raised: Exception | None = None) -> None:
        super().__init__()
        self._error = error
        self._raised = raised

    def model_error(self, key: str | None) -> ModelError:
        if self._raised is not None:
            return model_error(self._raised)
        error = self._error
        return error_of(error.get("code"), error.get("type"), error.get("message"), keys=[key] if key else [])

    @property
    def refuses_state(self) -> bool:
        return refuses_state(self._error.get("code"), self._error.get("message"))


def refuses_state(code: object, message: object) -> bool:
    words = str(message).lower()
    return code == "invalid_encrypted_content" or any(known in words for known in _REFUSED_STATE)


class ResponseReader:
    """Reads one response, over as many connections as it takes. With `resume`, from there on."""

    def __init__(self, dropped: list[str], *, resumable: bool, resume: ResumePoint | None = None) -> None:
        self.response_id: str | None = resume.response_id if resume else None
        self.resumable: Final = resumable
        self.cursor: int = resume.cursor if resume else -1
        """Sequence number of the last event that was read."""
        self.delivered = False
        """Whether anything was yielded that a new generation would make void."""
        self.finished = False
        self._dropped = dropped
        self._resumed = resume is not None
        self._began = False
        self._items: dict[int, Json] = {}
        self._announced: list[Json] = []
        """Calls in the order in which they were yielded, which is the order the message has them in."""
        self._added: set[str] = set()
        self._writing: str | None = None
        self._thinking: tuple[str, object] | None = None
        self._unseparated: str | None = None

    def read(self, event: Json) -> list[StreamEvent]:
        """Raises `ProviderFailure`."""
        number = event.get("sequence_number")
        if isinstance(number, int):
            if self.resumable and number <= self.cursor:
                return [Alive()]  # a server that counts otherwise sent it twice
            self.cursor = number
        response = event.get("response")
        if self.response_id is None and isinstance(response, Mapping) and isinstance(response.get("id"), str):
            self.response_id = response["id"]
        events = self._events(event, response if isinstance(response, Mapping) else {})
        self.delivered = self.delivered or any(not isinstance(said, Alive) for said in events)
        if not self._began and self.response_id is not None:
            self._began = True
            events.insert(0, Began(response_id=self.response_id, resumable=self.resumable))
        return events or [Alive()]

    def _events(self, event: Json, response: Json) -> list[StreamEvent]:
        match event.get("type"):
            case "response.output_text.delta" | "response.refusal.delta":
                return self._text(event)
            case "response.reasoning_summary_text.delta":
                return self._thought(event, event.get("summary_index"))
            case "response.reasoning_text.delta":
                return self._thought(event, event.get("content_index"))
            case "response.output_item.added":
                self._added.add(str(event.get("item", {}).get("id")))
            case "response.output_item.done":
                return self._done(event)
            case "response.completed" | "response.incomplete":
                return self._finish(response)
            case "response.failed" | "response.cancelled":
                raise ProviderFailure(response.get("error") or {"message": f"response {response.get('status')}"})
            case "error":
                raise ProviderFailure(event["error"] if isinstance(event.get("error"), Mapping) else event)
            case _:
                pass
        return []

    def _text(self, event: Json) -> list[StreamEvent]:
        delta, item_id = event.get("delta"), str(event.get("item_id"))
        if not delta:
            return []
        if item_id != self._writing:
            if self._writing is not None:
                delta = BETWEEN_MESSAGES + delta
            elif self._resumed and item_id in self._added:
                # Whether a message came before it, only who read the beginning knew.
                self._unseparated = item_id
            self._writing = item_id
        return [TextDelta(delta, event.get("sequence_number"))]

    def _thought(self, event: Json, part: object) -> list[StreamEvent]:
        delta, place = event.get("delta"), (str(event.get("item_id")), part)
        if not delta:
            return []
        if self._thinking is not None and self._thinking != place:
            delta = BETWEEN_MESSAGES + delta
        self._thinking = place
        return [ThinkingDelta(delta, event.get("sequence_number"))]

    def _done(self, event: Json) -> list[StreamEvent]:
        item = event.get("item")
        if not isinstance(item, Mapping):
            return []
        self._items[event.get("output_index", len(self._items))] = item
        # Calls from before the cursor must come first, and only the terminal event knows them.
        return [] if self._resumed else self._announce([item])

    def _announce(self, items: Iterable[Json]) -> list[StreamEvent]:
        """Calls that were not yielded yet. One that was broken off is none."""
        ready: list[StreamEvent] = []
        for item in items:
            if item.get("type") != "function_call" or item.get("status") == "incomplete":
                continue
            if any(_same(item, known) for known in self._announced):
                continue
            self._announced.append(item)
            arguments, problem = parse_arguments(item.get("arguments") or "")
            call = ToolCall(id=str(item.get("call_id")), name=str(item.get("name")), arguments=arguments)
            ready.append(ToolCallReady(call, problem, item.get("arguments") if problem else None))
        return ready

    # --- the end ---

    def _finish(self, response: Json) -> list[StreamEvent]:
        output: list[Json] = response.get("output") or [self._items[index] for index in sorted(self._items)]
        calls = self._announce(output)
        usage = response.get("usage") or {}
        self.finished = True
        finished = Finished(
            reason=self._reason(response, output),
            usage=_usage(usage),
            response_id=self.response_id,
            phase=_phase(output),
            state=self._state(output),
            reasoning_items=_reasoning_items(output, usage),
            dropped_options=self._dropped,
        )
        return [*calls, finished]

    def _reason(self, response: Json, output: list[Json]) -> FinishReason:
        if response.get("status") == "incomplete":
            why = (response.get("incomplete_details") or {}).get("reason")
            return "content_filter" if why == "content_filter" else "length"
        if any(part.get("type") == "refusal" for item in output for part in _parts(item)):
            return "refusal"
        return "tool_calls" if self._announced else "stop"

    def _state(self, output: list[Json]) -> list[dict[str, object]]:
        """Nothing when there is nothing that text and calls of the message would not say by themselves."""
        kept: list[StateItem] = []
        messages = 0
        for item in output:
            match item.get("type"):
                case "function_call":
                    index = next((at for at, known in enumerate(self._announced) if _same(item, known)), None)
                    if index is not None:
                        kept.append(StateItem(call=index, id=item.get("id")))
                case "message":
                    pieces = [(str(part["type"]), len(text)) for part in _parts(item) if (text := _written(part))]
                    if pieces:
                        skip = len(BETWEEN_MESSAGES) if messages and item.get("id") != self._unseparated else 0
                        kept.append(StateItem(parts=pieces, skip=skip, id=item.get("id"), phase=item.get("phase")))
                        messages += 1
                case "reasoning":
                    if item.get("encrypted_content"):
                        kept.append(StateItem(item=_echo(item)))
                case _:
                    kept.append(StateItem(item=dict(item)))
        telling = messages > 1 or any(
            entry.item is not None or any(kind == "refusal" for kind, _ in entry.parts or []) for entry in kept
        )
        return [msgspec.to_builtins(entry) for entry in kept] if telling else []


def _same(one: Json, other: Json) -> bool:
    """Only the call's own id is sure to be there, and the same in every event."""
    return one.get("call_id") == other.get("call_id")


def _parts(item: Json) -> list[Json]:
    return (item.get("content") or []) if item.get("type") == "message" else []


def _written(part: Json) -> str:
    return part.get("text") or part.get("refusal") or ""


def _echo(item: Json) -> dict[str, Any]:
    """What a reasoning item may go back with: its status, for one, is refused when it is null."""
    names = ("type", "id", "summary", "content", "encrypted_content")
    return {"summary": []} | {name: item[name] for name in names if item.get(name) is not None}


def _phase(output: list[Json]) -> Phase | None:
    last = next((item for item in reversed(output) if item.get("type") == "message"), {})
    return Phase(last["phase"]) if last.get("phase") in set(Phase) else None


def _reasoning_items(output: list[Json], usage: Json) -> list[ReasoningItem]:
    items = [item for item in output if item.get("type") == "reasoning"]
    tokens = (usage.get("output_tokens_details") or {}).get("reasoning_tokens") if len(items) == 1 else None
    return [
        ReasoningItem(
            item_id=str(item.get("id")),
            summary=[part.get("text") or "" for part in item.get("summary") or []],
            token_count=tokens,
        )
        for item in items
    ]


def _usage(usage: Json) -> TokenUsage:
    """Theirs counts what was read from and written to the cache as input, too."""
    details = usage.get("input_tokens_details") or {}
    read, written = details.get("cached_tokens") or 0, details.get("cache_write_tokens") or 0
    cost = usage.get("cost")  # OpenRouter tells
    return TokenUsage(
        input_tokens=max(0, (usage.get("input_tokens") or 0) - read - written),
        output_tokens=usage.get("output_tokens") or 0,
        cache_read_tokens=read or None,
        cache_creation_tokens=written or None,
        actual_cost_usd=float(cost) if isinstance(cost, int | float) else None,
    )


def usage_of(usage: object) -> TokenUsage:
    return _usage(usage if isinstance(usage, Mapping) else {})
