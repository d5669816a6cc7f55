"""The demo's two stories: one whose model is scripted, so that the same thing happens every time, and one for a real model.

A real model does what it likes: it may call no tool, or write too little to be interrupted. Its story therefore says what
would show that a kill came too late, and claims nothing about it then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from msgspec import Struct

from cli.run import StartFailure

AnyJson = dict[str, object]

STORED_SECONDS: Final = 0.2
"""What a dead worker had handed to PostgreSQL may still be stored this much later; it is no sign of recovery."""

CAPABILITIES: Final = ("test_weather", "test_faults", "current_time")
EFFECT_TOOL: Final = "test_effect_once"


class DemoFailure(StartFailure):
    """The demo could not be told to its end"""


class SeenEvent(Struct, frozen=True, kw_only=True):
    """An event as the client got it."""

    id: str
    type: str
    ts: datetime
    sequence: int
    data: AnyJson
    context: Mapping[str, str] = {}
    whole: AnyJson = {}
    """All that came."""

    def text(self, name: str) -> str:
        return str(self.data.get(name) or "")

    def part(self, name: str) -> AnyJson:
        """An object inside of the data; empty when there is none."""
        part = self.data.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def subject(self) -> str:
        """The message or tool call it is about, if it is about one."""
        return self.text("message_id") or self.text("tool_call_id") or str(self.part("message").get("id") or "")


class Kill(Struct, kw_only=True):
    """A moment at which the worker is killed, and how long the stream then stood still."""

    where: str
    due: Callable[[SeenEvent], bool]
    recovered_by: Mapping[str, str]
    """Types of events that show that the work goes on, and what they show."""
    over_by: str
    """The type of the event that ends what was to be interrupted."""
    subject: str = ""
    at: float | None = None
    too_late: bool = False
    how: str = ""
    recovered_seconds: float | None = None

    @property
    def landed(self) -> bool:
        return self.at is not None and not self.too_late

    def aim(self, event: SeenEvent, at: float) -> None:
        self.subject, self.at = event.subject, at

    def is_settled_by(self, event: SeenEvent) -> bool:
        """Whether this event tells what became of what was interrupted; it is noted then."""
        if self.at is None or event.subject != self.subject:
            return False
        after_seconds = event.ts.timestamp() - self.at
        if after_seconds <= STORED_SECONDS:
            self.too_late = event.type == self.over_by
        elif event.type in self.recovered_by:
            self.how, self.recovered_seconds = self.recovered_by[event.type], after_seconds
        return self.too_late or self.recovered_seconds is not None


class Story(Struct, frozen=True, kw_only=True):
    system_prompt: str
    question: str
    script: Mapping[str, object] | None = None
    """For the simulated model."""
    kill_after_characters: int
    """Of a message; far from the end of the long one."""
    taken_over_by: Mapping[str, str]
    """See `Kill.recovered_by`, for the model's answer."""
    seconds: float
    """Far more than it takes: a busy machine may be slow, a hang must not last."""

    def kills(self) -> list[Kill]:
        return [
            Kill(
                where="in the middle of the model's answer",
                due=self._is_in_the_answer,
                recovered_by=self.taken_over_by,
                over_by="output.message.completed",
            ),
            Kill(
                where="in the middle of a tool",
                due=_is_in_a_tool,
                recovered_by=dict.fromkeys(("tool.started", "tool.progress", "tool.completed"), "the tool runs again"),
                over_by="tool.completed",
            ),
        ]

    def _is_in_the_answer(self, event: SeenEvent) -> bool:
        return event.type == "output.message.delta" and len(event.text("accumulated")) >= self.kill_after_characters


def _is_in_a_tool(event: SeenEvent) -> bool:
    return event.type == "tool.progress"


HINTS: Final = {
    "provider_misconfigured": "The provider refused the key{key}: is it right, and may it use this model?",
    "provider_quota_exhausted": "The account of the key{key} has nothing left to spend.",
    "provider_unavailable": "The provider{address} cannot be reached from here, or is in trouble.",
    "provider_rate_limited": "The provider asks for less; try again in a minute.",
    "model_unavailable": "This account does not have the model; --model names another.",
}
"""What a person at a terminal can do about an error code, beside the text that any user sees."""


class Teller(Struct, frozen=True, kw_only=True):
    """A story and the model that tells it."""

    story: Story
    model_id: str | None = None
    """Its public id; None for the organization's default."""
    model: str = ""
    """The provider's name for it."""
    provider: str = ""
    address: str | None = None
    """Where that is, if it is not the provider's own address."""
    key_variable: str | None = None
    background: bool = False
    """Whether a generation outlives the worker that asked for it."""
    is_priced: bool = False

    @property
    def is_real(self) -> bool:
        return self.story.script is None

    @property
    def name(self) -> str:
        return f"{self.provider} · {self.model}"

    def failure(self, failed: SeenEvent) -> DemoFailure:
        """Of a `turn.failed`, in words that any user may read and with its code."""
        code = failed.text("error_code")
        hint = HINTS.get(code, "").format(
            key=f" in {self.key_variable}" if self.key_variable else "",
            address=f" at {self.address}" if self.address else "",
        )
        return DemoFailure(f"{self.name}: {failed.text('error')} ({code}) {hint}".rstrip())


class Told(Struct, frozen=True, kw_only=True):
    """What the client has to show at the end."""

    session_id: str
    seen: list[SeenEvent]
    kills: list[Kill]
    seconds: float


SIMULATED: Final = Story(
    system_prompt="You plan picnics.",
    question="Ghent or Amsterdam for the team picnic? Compare the weather, then book a table and send the invitation.",
    script={
        "mode": "script",
        "inter_token_delay_ms": 40,
        "turns": [
            {
                "thinking": "Two cities and a date: these three questions do not depend on each other.",
                "text": "I ask for both cities at once.",
                "tool_calls": [
                    {"name": "get_weather", "arguments": {"location": "Ghent"}},
                    {"name": "get_weather", "arguments": {"location": "Amsterdam"}},
                    {"name": "get_current_time", "arguments": {"timezone": "Europe/Brussels"}},
                ],
            },
            {
                "text": (
                    "Amsterdam has 17 degrees and heavy rain, Ghent has 23 degrees, sunshine and hardly any wind. A picnic "
                    "wants a dry meadow and air that is warm enough for people who sit still, so this is Ghent's day. I "
                    "ask the restaurant there for a table now, while the invitation goes out."
                ),
                "tool_calls": [
                    {
                        "name": "test_sleep",
                        "arguments": {"seconds": 3, "label": "the restaurant is looking for a table"},
                    },
                    {"name": EFFECT_TOOL, "arguments": {"name": "invitation"}},
                ],
            },
            {"text": "Done: the table is booked and the invitation is out. It was sent exactly once."},
        ],
    },
    kill_after_characters=90,
    taken_over_by={"output.message.delta": "the answer streams again"},
    seconds=60.0,
)

REAL: Final = Story(
    system_prompt="You plan picnics. You do what you are asked to with the tools you have, and invent nothing.",
    question=(
        "Ghent or Amsterdam for the team picnic? Look up the weather in both with get_weather. Then, both at once, book a "
        "table with test_sleep (4 seconds, label 'the restaurant is looking for a table') and send the invitation with "
        f"{EFFECT_TOOL} (name 'invitation'). Write nothing until all of that is done. Then tell the team in about 300 words "
        "which city it is, what the weather is like in both, how they get there, and what to bring."
    ),
    # More than what models say before they call a tool, which would be over before the signal comes.
    kill_after_characters=200,
    taken_over_by={
        "output.message.delta": "the same generation goes on",
        "reason.recovered": "another worker takes it over",
        "output.message.completed": "another worker writes its end",
    },
    # Models think for a minute, and a provider may ask for patience.
    seconds=600.0,
)
