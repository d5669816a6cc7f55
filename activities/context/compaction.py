"""Keeps a reason step's prompt within what its model can read.

Proactive, before the call: when the estimate exceeds the configured share of the model's input limit, if that is known. Reactive:
when the provider refuses the prompt as too large, within the same attempt, each time more strongly. Either way down a cascade
until something helps:

    mask        a short text in place of long tool outputs, except the newest; silent, as nothing is lost that cannot be repeated
    native      the provider's own compaction, where the driver is a `NativeCompactor` and the result can be stored encrypted
    summarise   a text by a model
    trim        the oldest messages go; only while the prompt would be refused, and never the running turn's question

What comes out is a checkpoint, installed in one transaction with its event and its cost. Until then the one before it is in
force, so a stage that fails, a cancel or a crash leaves nothing half done; the next attempt after a crash finds what was
installed. The conversation in memory is cut by the same functions the next prompt is read with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID, uuid5

import msgspec
import structlog
from msgspec import Struct

from activities.capabilities.assembly import compaction_config
from activities.capabilities.registry import ResolvedCapabilities
from activities.context.notices import Figures, Notices
from activities.context.planning import (
    MASKING,
    NATIVE,
    SUMMARIZATION,
    TRIM,
    Goal,
    Meter,
    choose_cut,
    is_material,
    mask_before,
    proactive_goal,
    reactive_goal,
)
from activities.context.summary import TRIMMED, Summary, SummaryFailed, summarise, summary_request
from activities.step import ReasonStep
from domain.checkpoints import Checkpoint, checkpoint_message
from domain.conversation import Boundary, Conversation
from domain.events import CompactionStage, CompactionStep, GenerationCompaction, NewEvent, SkipReason, TokenUsage
from domain.ids import Prefix, parse_id
from domain.messages import Message, Role
from domain.model import ModelDriver, ModelError, ModelErrorKind, ModelRequest, NativeCompactor, ProviderState
from domain.model_profiles import with_cost
from domain.token_estimate import text_tokens
from domain.turns import ResolvedModel, TurnState

SUMMARY_INPUT_SHARE: Final = 0.8
"""Of the summarising model's input limit; the rest is for its instructions and for what the estimate is off."""

UNKNOWN_INPUT_SHARE: Final = 0.5
"""Of a prompt that was refused, where no limit is known."""

SUMMARY_TRIES: Final = 3
"""Each with half of the text, should even that be refused as too large."""

log = structlog.get_logger(__name__)


class _Draft(Struct, frozen=True, kw_only=True):
    """A checkpoint in the making, and the conversation as it would be under it."""

    conversation: Conversation
    checkpoint: Checkpoint
    steps: list[CompactionStep] = []

    @property
    def strategy(self) -> str:
        return "+".join(step.strategy for step in self.steps)


class ContextKeeper:
    """For one attempt of one reason step."""

    def __init__(
        self,
        state: TurnState,
        step: ReasonStep,
        model: ResolvedModel,
        driver: ModelDriver,
        resolved: ResolvedCapabilities,
        load_driver: Callable[[str], Awaitable[ModelDriver]],
        *,
        stall_seconds: float,
    ) -> None:
        briefing = step.briefing
        self._state = state
        self._ref = step.ref
        self._model = model
        self._driver = driver
        self._config = compaction_config(resolved)
        self._load_driver = load_driver
        self._stall_seconds = stall_seconds
        self._meter = Meter(ratio=briefing.token_ratio or 1.0)
        self._conversation = briefing.conversation
        self._installed = briefing.checkpoint
        self._can_keep_native = briefing.can_keep_native
        self._notices = Notices(
            ref=step.ref,
            input_message_id=briefing.input_message_id,
            model=model,
            driver=driver.name,
            strategy=self._config.strategy,
        )
        self._compactions = 0
        self._refusals = 0
        self._spent: TokenUsage | None = None
        self.result: GenerationCompaction | None = None
        """What was done for this call."""

    @property
    def native_tokens(self) -> int:
        """What the provider's own compaction adds to the prompt, beyond its messages."""
        return 0 if self._installed is None or self._installed.native is None else self._installed.native_tokens

    async def before_call(self, request: ModelRequest) -> ModelRequest:
        """The request, or a shorter one."""
        limit = self._model.input_limit
        if limit is None or not self._config.proactive or request.resume is not None:
            return request
        budget = limit * self._config.budget_percent
        tokens = self._tokens(request, self._conversation, self.native_tokens)
        if tokens <= budget:
            return request
        goal = proactive_goal(limit, self._fixed(request), self._config)
        if self._was_compacted_in_this_step():
            await self._skipped(goal, tokens, "cooldown_active")
            return request
        return await self._compact(request, goal, tokens) or request

    async def after_refusal(self, request: ModelRequest) -> ModelRequest | None:
        """A shorter request than the one that was refused as too large; None when nothing more can go."""
        while True:
            self._refusals += 1
            tokens = self._tokens(request, self._conversation, self.native_tokens)
            limit = self._model.input_limit
            goal = reactive_goal(self._refusals, tokens, self._fixed(request), limit, self._config)
            if goal is None:
                return None
            shorter = await self._compact(request, goal, tokens)
            if shorter is not None:
                return shorter

    # --- the cascade --------------------------------------------------------------------------------------------------

    async def _compact(self, request: ModelRequest, goal: Goal, before: int) -> ModelRequest | None:
        """None when nothing was gained."""
        started = time.monotonic()
        draft = self._new_draft()
        stages = goal.stages(self._config.strategy)
        if MASKING in stages:
            draft = self._masked(draft, goal)
            after = self._size(request, draft)
            if draft.steps and after <= goal.enough_tokens and is_material(before, after):
                return await self._install(request, goal, draft, before, started)
        announced = False
        for stage in stages:
            if stage == MASKING or (stage == TRIM and self._size(request, draft) <= goal.trim_above):
                continue
            cut = choose_cut(draft.conversation, self._meter, goal)
            if cut is None:
                break
            if not announced:
                announced = True
                await self._compacting(goal, before)
            shorter = await self._run(stage, request, draft, cut, goal, before)
            if shorter is None:
                continue
            if is_material(before, self._size(request, shorter)):
                return await self._install(request, goal, shorter, before, started)
            await self._skipped(goal, before, "no_material_reduction")
        if draft.steps and is_material(before, self._size(request, draft)):
            return await self._install(request, goal, draft, before, started)
        if not announced:
            strategic = (
                self._config.strategy == MASKING and choose_cut(draft.conversation, self._meter, goal) is not None
            )
            await self._skipped(goal, before, "strategy_excludes_native" if strategic else "no_material_reduction")
        return None

    def _new_draft(self) -> _Draft:
        """What is in force now, under a new id. A conversation is masked already as far as its checkpoint says."""
        exec_id = parse_id(Prefix.EXEC, self._ref.exec_id)
        new = _checkpoint_id(exec_id, self._ref.attempt, self._compactions)
        if self._installed is None:
            checkpoint = Checkpoint(id=new, source_sequence=0, strategy="")
        else:
            checkpoint = msgspec.structs.replace(self._installed, id=new)
        return _Draft(conversation=self._conversation, checkpoint=checkpoint)

    def _masked(self, draft: _Draft, goal: Goal) -> _Draft:
        before = mask_before(draft.conversation, goal.keep_recent)
        if before <= draft.checkpoint.masked_sequence:
            return draft
        started = time.monotonic()
        conversation = draft.conversation.masked(before)
        if conversation.messages == draft.conversation.messages:
            return draft
        return _Draft(
            conversation=conversation,
            checkpoint=msgspec.structs.replace(draft.checkpoint, masked_sequence=before),
            steps=[_step(MASKING, conversation, started)],
        )

    async def _run(
        self, stage: str, request: ModelRequest, draft: _Draft, cut: Boundary, goal: Goal, before: int
    ) -> _Draft | None:
        started = time.monotonic()
        checkpoint = msgspec.structs.replace(
            draft.checkpoint, source_sequence=cut.sequence, carried_sequences=cut.carried
        )
        if stage == NATIVE:
            native = await self._native(request, draft, cut, goal, before)
            if native is None:
                return None
            state, tokens = native
            checkpoint = msgspec.structs.replace(checkpoint, messages=[], native=state, native_tokens=tokens)
        elif stage == SUMMARIZATION:
            summary = await self._summary(request, draft, cut, goal, before)
            if summary is None:
                return None
            message = checkpoint_message(checkpoint.id, summary.text)
            checkpoint = msgspec.structs.replace(checkpoint, messages=[message], native=None, native_tokens=0)
        else:
            checkpoint = _trimmed(checkpoint, goal)
        conversation = draft.conversation.cut(cut, checkpoint.messages)
        return _Draft(
            conversation=conversation,
            checkpoint=checkpoint,
            steps=[*draft.steps, _step(stage, conversation, started)],
        )

    async def _native(
        self, request: ModelRequest, draft: _Draft, cut: Boundary, goal: Goal, before: int
    ) -> tuple[ProviderState, int] | None:
        if not isinstance(self._driver, NativeCompactor):
            if self._config.strategy == NATIVE:
                await self._skipped(goal, before, "driver_unsupported")
            return None
        if not self._can_keep_native:
            await self._skipped(goal, before, "checkpoint_store_unavailable")
            return None
        prefix = draft.conversation.messages[: cut.index]
        asked = msgspec.structs.replace(request, messages=[*_system(request), *prefix], resume=None)
        try:
            async with asyncio.timeout(self._stall_seconds):
                compacted = await self._driver.compact(asked)
        except TimeoutError:
            await self._failed(goal, before, "native_compaction", ModelErrorKind.TIMEOUT.value)
            return None
        except ModelError as error:
            log.warning("native compaction failed", model=self._model.name, kind=error.kind.value, error=error.message)
            await self._failed(goal, before, "native_compaction", error.kind.value)
            return None
        if compacted is None:
            await self._skipped(goal, before, "native_returned_none")
            return None
        self._spend(with_cost(compacted.usage, self._model.profile))
        state = ProviderState(
            provider_public_id=request.endpoint.provider_public_id,
            driver=self._driver.name,
            model=request.model,
            items=compacted.items,
        )
        return state, compacted.usage.output_tokens or text_tokens(msgspec.json.encode(compacted.items).decode())

    async def _summary(
        self, request: ModelRequest, draft: _Draft, cut: Boundary, goal: Goal, before: int
    ) -> Summary | None:
        prefix = draft.conversation.messages[: cut.index]
        driver, model, like = await self._summariser(request)
        limit = model.input_limit
        room = round(
            (before * UNKNOWN_INPUT_SHARE if limit is None else limit * SUMMARY_INPUT_SHARE) / self._meter.ratio
        )
        error: str = ModelErrorKind.CONTEXT_OVERFLOW.value
        for _ in range(SUMMARY_TRIES):
            asked = summary_request(
                like, prefix, self._config.summarization, max_tokens=goal.summary_tokens, room_tokens=room
            )
            try:
                summary = await summarise(driver, asked, stall_seconds=self._stall_seconds)
            except ModelError as failure:
                log.warning("summary failed", model=model.name, kind=failure.kind.value, error=failure.message)
                error = failure.kind.value
                if failure.kind is not ModelErrorKind.CONTEXT_OVERFLOW:
                    break
                room //= 2
            except SummaryFailed as failure:
                error = f"no_summary: {failure}"
                break
            else:
                self._spend(summary.usage)
                return summary
        await self._failed(goal, before, "summarization", error)
        return None

    async def _summariser(self, request: ModelRequest) -> tuple[ModelDriver, ResolvedModel, ModelRequest]:
        """The model that is configured for it, if it can be called; what a provider compacted only that provider can read."""
        wanted = self._config.summarization.model
        if wanted is not None and request.context is None:
            other = await self._state.find_model(self._ref, wanted)
            if other is not None:
                like = msgspec.structs.replace(
                    request, model=other.name, endpoint=other.endpoint, profile=other.profile, options=other.options
                )
                return await self._load_driver(other.provider_type), other, like
            log.warning("the model for summaries cannot be called; the conversation's own is used", wanted=wanted)
        return self._driver, self._model, request

    # --- outcomes -----------------------------------------------------------------------------------------------------

    async def _install(
        self, request: ModelRequest, goal: Goal, draft: _Draft, before: int, started: float
    ) -> ModelRequest:
        after = self._size(request, draft)
        duration_ms = round((time.monotonic() - started) * 1000)
        checkpoint = msgspec.structs.replace(draft.checkpoint, strategy=draft.strategy)
        events: list[NewEvent] = []
        if draft.strategy != MASKING:
            figures = Figures(
                messages_before=self._messages,
                messages_after=len(draft.conversation.messages),
                tokens_before=before,
                tokens_after=after,
                duration_ms=duration_ms,
            )
            events.append(self._notices.compacted(goal, checkpoint, draft.steps, figures, self._spent))
        await self._state.install_checkpoint(self._ref, checkpoint, events, self._spent)
        log.info("context compacted", strategy=draft.strategy, tokens_before=before, tokens_after=after)
        self.result = GenerationCompaction(
            compacted=True,
            input_tokens_before=before if self.result is None else self.result.input_tokens_before,
            input_tokens_after=after,
            duration_ms=duration_ms + (0 if self.result is None else self.result.duration_ms or 0),
            cost_usd=_sum(self.result and self.result.cost_usd, self._spent and self._spent.effective_cost_usd),
        )
        self._conversation, self._installed = draft.conversation, checkpoint
        self._compactions += 1
        self._spent = None
        return msgspec.structs.replace(
            request,
            messages=[*_system(request), *draft.conversation.messages],
            context=checkpoint.native,
            resume=None,
        )

    async def _compacting(self, goal: Goal, tokens: int) -> None:
        limit = self._model.input_limit
        left = None if limit is None else max(0, round(limit * self._config.budget_percent) - tokens)
        replaced = 0 if self._installed is None else self._installed.source_sequence
        event = self._notices.compacting(goal, self._messages, tokens, left, replaced or None)
        await self._state.install_checkpoint(self._ref, None, [event])

    async def _skipped(self, goal: Goal, tokens: int, reason: SkipReason) -> None:
        spent, self._spent = self._spent, None
        event = self._notices.skipped(goal, self._messages, tokens, reason, spent)
        await self._state.install_checkpoint(self._ref, None, [event], spent)

    async def _failed(self, goal: Goal, tokens: int, stage: CompactionStage, error: str) -> None:
        event = self._notices.failed(goal, self._messages, tokens, stage, error)
        await self._state.install_checkpoint(self._ref, None, [event])

    @property
    def _messages(self) -> int:
        return len(self._conversation.messages)

    # --- figures ------------------------------------------------------------------------------------------------------

    def _fixed(self, request: ModelRequest) -> int:
        return self._tokens(request, Conversation(messages=[]), 0)

    def _tokens(self, request: ModelRequest, conversation: Conversation, native_tokens: int) -> int:
        messages = [*_system(request), *conversation.messages]
        return self._meter.messages(messages) + self._meter.tools(request.tools) + native_tokens

    def _size(self, request: ModelRequest, draft: _Draft) -> int:
        native = draft.checkpoint.native_tokens if draft.checkpoint.native is not None else 0
        return self._tokens(request, draft.conversation, native)

    def _spend(self, usage: TokenUsage) -> None:
        self._spent = usage if self._spent is None else self._spent + usage

    def _was_compacted_in_this_step(self) -> bool:
        """By this attempt or by one before it."""
        if self._installed is None:
            return False
        exec_id = parse_id(Prefix.EXEC, self._ref.exec_id)
        return any(
            self._installed.id == _checkpoint_id(exec_id, attempt, number)
            for attempt in range(1, self._ref.attempt + 1)
            for number in range(_MOST_PER_ATTEMPT)
        )


_MOST_PER_ATTEMPT: Final = 8
"""More than a proactive compaction and one after each refusal."""


def _checkpoint_id(exec_id: UUID, attempt: int, number: int) -> UUID:
    """The same when the same attempt installs the same checkpoint again, because an answer was lost."""
    return uuid5(exec_id, f"checkpoint:{attempt}:{number}")


def _trimmed(checkpoint: Checkpoint, goal: Goal) -> Checkpoint:
    if goal.last_resort:
        checkpoint = msgspec.structs.replace(checkpoint, messages=[], native=None, native_tokens=0)
    if checkpoint.messages or checkpoint.native is not None:
        return checkpoint
    return msgspec.structs.replace(checkpoint, messages=[checkpoint_message(checkpoint.id, TRIMMED)])


def _step(strategy: str, conversation: Conversation, started: float) -> CompactionStep:
    return CompactionStep(
        strategy=strategy,
        messages_after=len(conversation.messages),
        duration_ms=round((time.monotonic() - started) * 1000),
    )


def _system(request: ModelRequest) -> list[Message]:
    return [message for message in request.messages[:1] if message.role is Role.SYSTEM]


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None and other is None else (one or 0.0) + (other or 0.0)
