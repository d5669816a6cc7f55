"""How much of a conversation has to go, and where it may be cut. Pure functions over estimates; nothing is called here.

Every compaction aims well below the point that triggered it: one that only just gets there would be due again with the next
message, and each one costs a model call and the provider's cache. The newest messages are kept word for word. A refused prompt
tells that the real limit lies below our estimate of that prompt, whatever a profile says; each further refusal in the same
attempt aims lower, and the last resort keeps only what the running turn asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from msgspec import Struct

from activities.capabilities.compaction import Compaction, Strategy
from domain.conversation import Boundary, Conversation
from domain.events import CompactionReason
from domain.messages import Message
from domain.token_estimate import message_tokens, tool_tokens
from domain.tools import ToolDefinition

MASKING: Final = "observation_masking"
NATIVE: Final = "native"
SUMMARIZATION: Final = "summarization"
TRIM: Final = "trim"

STAGES: Final[dict[Strategy, tuple[str, ...]]] = {
    "auto": (MASKING, NATIVE, SUMMARIZATION, TRIM),
    "native": (NATIVE, TRIM),
    "observation_masking": (MASKING, TRIM),
    "summarization": (SUMMARIZATION, TRIM),
}

PROACTIVE_ENOUGH: Final = 0.8
PROACTIVE_TARGET: Final = 0.5
"""Of what the budget leaves for the conversation: what masking must reach to be enough, what anything stronger aims for."""

REACTIVE_TARGETS: Final = (0.6, 0.3, 0.1)
"""Of the conversation that was refused, by round."""

MATERIAL_SHARE: Final = 0.05
MATERIAL_TOKENS: Final = 32
"""A result that saves less than both is not worth a new prompt."""

SUMMARY_SHARE: Final = 0.25
MIN_SUMMARY_TOKENS: Final = 64
MAX_SUMMARY_TOKENS: Final = 4_000


class Meter(Struct, frozen=True, kw_only=True):
    """Estimates, corrected by what the session's provider counted for the last prompt."""

    ratio: float = 1.0

    def messages(self, messages: Sequence[Message]) -> int:
        return round(self.ratio * sum(map(message_tokens, messages)))

    def tools(self, tools: Sequence[ToolDefinition]) -> int:
        return round(self.ratio * sum(map(tool_tokens, tools)))


class Goal(Struct, frozen=True, kw_only=True):
    """One compaction's purpose. Figures are tokens of the whole prompt, `fixed_tokens` those that never go: of the system prompt
    and the tools.

    `trim_above`: messages may be dropped without a summary while the prompt has more than this. `keeps_last_step`: what the model
    did last stays word for word. `last_resort`: what earlier compactions left goes as well, and no model is called any more.
    """

    reason: CompactionReason
    enough_tokens: int
    target_tokens: int
    fixed_tokens: int
    trim_above: int
    keep_recent: int
    keeps_last_step: bool = True
    last_resort: bool = False

    @property
    def summary_tokens(self) -> int:
        share = round((self.target_tokens - self.fixed_tokens) * SUMMARY_SHARE)
        return max(MIN_SUMMARY_TOKENS, min(MAX_SUMMARY_TOKENS, share))

    @property
    def room_tokens(self) -> int:
        """For messages that stay word for word."""
        return self.target_tokens - self.fixed_tokens - self.summary_tokens

    def stages(self, strategy: Strategy) -> tuple[str, ...]:
        if self.last_resort:
            return (MASKING, TRIM)
        return STAGES[strategy]


def proactive_goal(input_limit: int, fixed_tokens: int, config: Compaction) -> Goal:
    left = max(0, round(input_limit * config.budget_percent) - fixed_tokens)
    return Goal(
        reason="proactive_budget",
        enough_tokens=fixed_tokens + round(left * PROACTIVE_ENOUGH),
        target_tokens=fixed_tokens + round(left * PROACTIVE_TARGET),
        fixed_tokens=fixed_tokens,
        trim_above=input_limit,
        keep_recent=config.observation_masking.keep_recent_tool_outputs,
    )


def reactive_goal(
    refusals: int, refused_tokens: int, fixed_tokens: int, input_limit: int | None, config: Compaction
) -> Goal | None:
    """After so many refusals in this attempt; None when there is nothing stronger to try."""
    if refusals > len(REACTIVE_TARGETS):
        return None
    limit = refused_tokens if input_limit is None else min(refused_tokens, input_limit)
    target = fixed_tokens + round(max(0, limit - fixed_tokens) * REACTIVE_TARGETS[refusals - 1])
    return Goal(
        reason="request_too_large",
        enough_tokens=target,
        target_tokens=target,
        fixed_tokens=fixed_tokens,
        trim_above=0,
        keep_recent=config.observation_masking.keep_recent_tool_outputs if refusals == 1 else 0,
        keeps_last_step=refusals == 1,
        last_resort=refusals == len(REACTIVE_TARGETS),
    )


def mask_before(conversation: Conversation, keep_recent: int) -> int:
    """The event before which tool results are masked, so that the newest `keep_recent` are not."""
    places = sorted(conversation.results.values())
    if len(places) <= keep_recent:
        return 0
    return places[-keep_recent] if keep_recent else places[-1] + 1


def choose_cut(conversation: Conversation, meter: Meter, goal: Goal) -> Boundary | None:
    """Where to cut so that what is kept fits the goal's room, or else as little is kept as may be. None: nothing can go.

    Between turns rather than inside one, unless that would drop more than half of what could be kept.
    """
    first = _first_to_drop(conversation)
    candidates = [one for one in conversation.boundaries if one.index > first]
    if goal.keeps_last_step:
        # The last boundary is where the running step began: everything stands before it.
        candidates = [one for one in candidates if one.sequence < conversation.boundaries[-1].sequence]
    if not candidates:
        return None
    sizes = [meter.messages([message]) for message in conversation.messages]
    total = sum(sizes)
    before = [0, *accumulate(sizes)]
    kept = {one.index: total - before[one.index] for one in candidates}
    fitting = [one for one in candidates if kept[one.index] <= goal.room_tokens]
    if not fitting:
        return candidates[-1]
    between_turns = next((one for one in fitting if one.opens_turn), None)
    if between_turns is not None and kept[between_turns.index] * 2 >= kept[fitting[0].index]:
        return between_turns
    return fitting[0]


def _first_to_drop(conversation: Conversation) -> int:
    """The first message that a cut would not put back in front."""
    question = {message.id for message in conversation.question}
    after_lead = range(conversation.lead, len(conversation.messages))
    droppable = (index for index in after_lead if conversation.messages[index].id not in question)
    return next(droppable, len(conversation.messages))


def is_material(before: int, after: int) -> bool:
    saved = before - after
    return saved >= MATERIAL_TOKENS or (saved > 0 and saved >= before * MATERIAL_SHARE)
