"""What the log is told about compactions. Kinds of failure only: a provider's own words are for logs."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from activities.context.planning import Goal
from domain.checkpoints import Checkpoint
from domain.events import (
    CompactionStage,
    CompactionStep,
    ContextCompacted,
    ContextCompacting,
    ContextCompactionFailed,
    ContextCompactionSkipped,
    EventContext,
    EventPayload,
    NewEvent,
    SkipReason,
    TokenUsage,
)
from domain.turns import ResolvedModel, StepRef


class Figures(Struct, frozen=True, kw_only=True):
    messages_before: int
    messages_after: int
    tokens_before: int
    tokens_after: int
    duration_ms: int


class Notices:
    """For one attempt of a step."""

    def __init__(
        self, *, ref: StepRef, input_message_id: str, model: ResolvedModel, driver: str, strategy: str
    ) -> None:
        self._ref = ref
        self._model = model
        self._driver = driver
        self._strategy = strategy
        self._count = 0
        self._context = EventContext(
            turn_id=ref.turn_id,
            input_message_id=input_message_id,
            exec_id=ref.exec_id,
            trace_id=ref.turn_id,
            parent_span_id=ref.exec_id,
        )

    def compacting(
        self, goal: Goal, messages: int, tokens: int, budget_left: int | None, replaced_up_to: int | None
    ) -> NewEvent:
        return self._event(
            ContextCompacting(
                reason=goal.reason,
                strategy=self._strategy,
                messages_before=messages,
                trigger="context_budget",
                model=self._model.name,
                provider=self._model.provider_type,
                driver=self._driver,
                tokens_before=tokens,
                budget_remaining_tokens=budget_left,
                source_sequence=replaced_up_to,
            )
        )

    def compacted(
        self,
        goal: Goal,
        checkpoint: Checkpoint,
        steps: Sequence[CompactionStep],
        figures: Figures,
        usage: TokenUsage | None,
    ) -> NewEvent:
        compacted = ContextCompacted(
            strategy_used=checkpoint.strategy,
            messages_before=figures.messages_before,
            messages_after=figures.messages_after,
            duration_ms=figures.duration_ms,
            steps=list(steps),
            reason=goal.reason,
            trigger="context_budget",
            model=self._model.name,
            provider=self._model.provider_type,
            driver=self._driver,
            checkpoint_id=str(checkpoint.id),
            source_sequence=checkpoint.source_sequence,
            tokens_before=figures.tokens_before,
            tokens_after=figures.tokens_after,
            usage=usage,
        )
        return self._event(compacted, f"{compacted.event_type}:{checkpoint.id}")

    def skipped(self, goal: Goal, messages: int, tokens: int, reason: SkipReason, usage: TokenUsage | None) -> NewEvent:
        skipped = ContextCompactionSkipped(
            reason=goal.reason,
            trigger="context_budget",
            skip_reason=reason,
            strategy=self._strategy,
            model=self._model.name,
            tokens_observed=tokens,
            messages_observed=messages,
            provider=self._model.provider_type,
            driver=self._driver,
            usage=usage,
        )
        # What prevents a compaction holds for every step of a turn: it is said once, unless it cost something.
        key = f"{skipped.event_type}:{self._ref.turn_id}:{reason}" if usage is None else None
        return self._event(skipped, key)

    def failed(self, goal: Goal, messages: int, tokens: int, stage: CompactionStage, error: str) -> NewEvent:
        return self._event(
            ContextCompactionFailed(
                reason=goal.reason,
                trigger="context_budget",
                stage=stage,
                error=error,
                strategy=self._strategy,
                model=self._model.name,
                tokens_before=tokens,
                messages_before=messages,
                provider=self._model.provider_type,
                driver=self._driver,
            )
        )

    def _event(self, payload: EventPayload, key: str | None = None) -> NewEvent:
        self._count += 1
        key = key or f"{payload.event_type}:{self._ref.exec_id}:{self._ref.attempt}:{self._count}"
        return NewEvent(data=payload, context=self._context, dedupe_key=key)
