"""The reason step: one call of a model, streamed into the log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog
from temporalio import activity

from activities.capabilities.assembly import (
    arranged,
    checked,
    offered_tools,
    output_guards,
    parallel_calls_wanted,
    planned,
    prompt,
    prompt_cache_wanted,
    recorded,
    repaired,
)
from activities.capabilities.registry import ResolvedCapabilities
from activities.capabilities.turn_capabilities import TurnCapabilities
from activities.context.compaction import ContextKeeper
from activities.delta_writer import DeltaWriter
from activities.output_gate import OutputGate
from activities.step import ReasonStep, reason_step
from domain.capabilities import OutputReplacement
from domain.events import CapabilitySkipped, EventContext, NewEvent, TokenUsage
from domain.model import (
    Alive,
    Began,
    Finished,
    ModelDriver,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    ProviderState,
    ReasoningItem,
    ResponseStopper,
    ResumePoint,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.model_profiles import with_cost
from domain.token_estimate import prompt_tokens, text_tokens
from domain.turns import (
    ArrivedAnswer,
    PlannedCall,
    ReasonInput,
    ReasonOutcome,
    ResolvedModel,
    TurnState,
)
from workflows import contract

STALL_SECONDS: Final = 120.0
"""Longest silence of a model in the middle of a call; reasoning models may think for a minute without a byte."""

STOP_SECONDS: Final = 5.0
"""For telling a provider that a generation is not wanted any more."""

STOPPED_BY_FILTER: Final = "The AI provider's content filter stopped this answer."
REFUSED: Final = "The model refused to answer."

log = structlog.get_logger(__name__)


class ReasonActivity:
    def __init__(
        self,
        state: TurnState,
        capabilities: TurnCapabilities,
        load_driver: Callable[[str], Awaitable[ModelDriver]],
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._state = state
        self._capabilities = capabilities
        self._load_driver = load_driver
        self._stall_seconds = stall_seconds

    @activity.defn(name=contract.REASON)
    async def reason(self, input: ReasonInput) -> ReasonOutcome:
        """Call the model and stream what it says. The mirror opens and closes the step; its result is a `ReasonResult`."""
        step = reason_step()
        briefing = step.briefing
        if briefing.problem is not None:
            problem = briefing.problem
            raise ModelError(problem.kind, problem.message, retry_after_seconds=problem.retry_after_seconds)
        if briefing.model is None:
            raise ModelError(ModelErrorKind.NOT_CONFIGURED, "no enabled model is chosen and there is no default")
        resolved = await self._capabilities.resolve_for_prompt(step.ref.session_id, briefing.config)
        if resolved.skipped:
            await self._state.append(step.ref, [_skipped(step, resolved)])
        request = model_request(step, briefing.model, resolved)
        if briefing.answer is not None:
            # The whole answer arrived before the worker was lost: only its end was left to write.
            request = shown(request, resolved)
            return outcome(briefing.model, request, briefing.partial_text, briefing.answer, resolved)
        driver = await self._load_driver(briefing.model.provider_type)
        keeper = ContextKeeper(
            self._state,
            step,
            briefing.model,
            driver,
            resolved,
            self._load_driver,
            stall_seconds=self._stall_seconds,
        )
        request = await keeper.before_call(request)
        guards = output_guards(resolved, self._capabilities.view(step.ref.session_id))
        async with DeltaWriter(
            self._state,
            step.ref,
            briefing.message_id,
            briefing.model,
            text=briefing.partial_text,
            thinking=briefing.partial_thinking,
            make_gate=(lambda text: OutputGate(guards, text)) if guards else None,
        ) as writer:
            while True:
                call = _Call(driver, shown(request, resolved), step, resolved)
                try:
                    answer = await call.run(writer, self._stall_seconds)
                except ModelError as error:
                    request = await _shorter(request, error, call, writer, keeper)
                else:
                    break
            answer = msgspec.structs.replace(answer, compaction=keeper.result)
            writer.arrived(answer)
        request = shown(request, resolved)
        return outcome(briefing.model, request, writer.text, answer, resolved, native_tokens=keeper.native_tokens)


async def _shorter(
    request: ModelRequest, error: ModelError, call: _Call, writer: DeltaWriter, keeper: ContextKeeper
) -> ModelRequest:
    """What to try after a failed call within the same attempt. Raises the failure unless a shorter prompt may help."""
    if error.kind is not ModelErrorKind.CONTEXT_OVERFLOW or call.has_streamed or writer.text or writer.thinking:
        raise error
    shorter = await keeper.after_refusal(request)
    if shorter is None:
        raise error
    return shorter


def model_request(step: ReasonStep, model: ResolvedModel, resolved: ResolvedCapabilities) -> ModelRequest:
    briefing, controls = step.briefing, step.briefing.controls
    return ModelRequest(
        model=model.name,
        messages=prompt(briefing.config, resolved, briefing.conversation.messages),
        tools=offered_tools(briefing.config, resolved),
        session_id=step.ref.session_id,
        idempotency_key=step.ref.exec_id,
        endpoint=model.endpoint,
        attempt=step.ref.attempt,
        profile=model.profile,
        reasoning_effort=controls.reasoning and controls.reasoning.effort,
        verbosity=controls.verbosity,
        speed=controls.speed,
        response_format=controls.response_format,
        parallel_tool_calls=parallel_calls_wanted(briefing.config, resolved),
        prompt_cache=prompt_cache_wanted(resolved),
        options=model.options,
        states=briefing.states,
        context=briefing.checkpoint and briefing.checkpoint.native,
        resume=briefing.resume,
    )


def _skipped(step: ReasonStep, resolved: ResolvedCapabilities) -> NewEvent:
    """One per turn, whichever of its steps comes first."""
    ref = step.ref
    return NewEvent(
        data=CapabilitySkipped(turn_id=ref.turn_id, refs=list(resolved.skipped)),
        context=EventContext(turn_id=ref.turn_id, exec_id=ref.exec_id, trace_id=ref.turn_id),
        dedupe_key=f"{CapabilitySkipped.event_type}:{ref.turn_id}",
    )


def shown(request: ModelRequest, resolved: ResolvedCapabilities) -> ModelRequest:
    """The request as it goes to the model: last of all, capabilities arrange its messages."""
    return msgspec.structs.replace(request, messages=arranged(request.messages, resolved))


def outcome(
    model: ResolvedModel,
    request: ModelRequest,
    text: str,
    answer: ArrivedAnswer,
    resolved: ResolvedCapabilities,
    *,
    native_tokens: int = 0,
) -> ReasonOutcome:
    """`text` is what was streamed. `native_tokens` are in the prompt besides its messages, in a form that only the provider can
    read.
    """
    return ReasonOutcome(
        model=model,
        prompt=recorded(request.messages, resolved),
        offered_tools=request.tools,
        text=text if answer.replacement is None else answer.replacement.replacement,
        answer=answer,
        estimated_prompt_tokens=prompt_tokens(request.messages, request.tools) + native_tokens,
    )


class _Call:
    """One call of a driver, from its first event to its terminal one."""

    def __init__(
        self, driver: ModelDriver, request: ModelRequest, step: ReasonStep, resolved: ResolvedCapabilities
    ) -> None:
        self._driver = driver
        self._request = request
        self._session_id = step.ref.session_id
        self._briefing = step.briefing
        self._resolved = resolved
        self._calls: list[PlannedCall] = []
        self._emptied = False
        """The arguments of a call are gone, and must not come back in what the provider keeps of it."""
        self._running: str | None = request.resume and request.resume.response_id
        """The response that goes on at the provider without us, if any."""
        self._first_token_ms: int | None = None
        self._started = time.monotonic()

    @property
    def has_streamed(self) -> bool:
        return self._first_token_ms is not None

    async def run(self, writer: DeltaWriter, stall_seconds: float) -> ArrivedAnswer:
        """Raises `ModelError`."""
        if self._request.resume is not None:
            # This attempt's own note: the next one must find the cursor even if nothing more arrives.
            await writer.began(self._request.resume.response_id, self._request.resume.cursor)
        finished: Finished | None = None
        try:
            async with (
                asyncio.timeout(stall_seconds) as stall,
                contextlib.aclosing(self._driver.stream(self._request)) as stream,  # type: ignore[type-var]  # a generator
            ):
                async for event in stream:
                    stall.reschedule(asyncio.get_running_loop().time() + stall_seconds)
                    finished = await self._take(event, writer) or finished
                    if writer.replacement is not None and finished is None:
                        finished = await self._cut_short(writer)
                        break
        except TimeoutError as error:
            # A generation that goes on at the provider is left to: the next attempt takes it up again.
            raise ModelError(ModelErrorKind.TIMEOUT, f"nothing came for {stall_seconds:.0f} s") from error
        except asyncio.CancelledError:
            details = activity.cancellation_details()
            if details is not None and details.cancel_requested:
                # Asked for by a person. A worker that only leaves lets the generation run: the next one resumes it.
                await asyncio.shield(self._stop_generation())
            raise
        if finished is None:
            raise ModelError(ModelErrorKind.STREAM_CUT, "the stream ended without its terminal event")
        await writer.settle()
        return self._answer(finished, writer)

    async def _cut_short(self, writer: DeltaWriter) -> Finished:
        """What stands for the end of a generation that a guardrail has ended. What it took is estimated: nobody says."""
        await self._stop_generation()
        written = f"{writer.thinking}{writer.text}"
        usage = TokenUsage(
            input_tokens=prompt_tokens(self._request.messages, self._request.tools),
            output_tokens=text_tokens(written),
        )
        return Finished(reason="content_filter", usage=usage, response_id=self._running)

    async def _take(self, event: StreamEvent, writer: DeltaWriter) -> Finished | None:
        match event:
            case Began(response_id=response_id, resumable=resumable):
                await self._begin(response_id, resumable, writer)
            case TextDelta():
                self._note_first_token()
                writer.add_text(event.text, event.cursor)
            case ThinkingDelta():
                self._note_first_token()
                writer.add_thinking(event.text, event.cursor)
            case ToolCallReady():
                self._note_first_token()
                self._calls.append(await asyncio.to_thread(self._plan, event))
            case Alive():
                pass
            case Finished():
                return event
        return None

    def _plan(self, event: ToolCallReady) -> PlannedCall:
        history = self._briefing.conversation.messages
        event, repair = repaired(event, self._resolved, self._briefing.config, self._calls, history)
        item = planned(event.call, self._resolved, self._briefing.config, problem=event.problem)
        item = msgspec.structs.replace(item, repair=repair)
        earlier = [one.call for one in self._calls]
        item = checked(item, self._resolved, earlier, history, self._session_id)
        self._emptied = self._emptied or (bool(event.call.arguments) and not item.call.arguments)
        return item

    async def _begin(self, response_id: str, resumable: bool, writer: DeltaWriter) -> None:
        resume: ResumePoint | None = self._request.resume
        if resume is not None and resume.response_id == response_id:
            return
        if resume is not None:
            await writer.restart()
        self._running = response_id if resumable else None
        if resumable:
            await writer.began(response_id, 0)

    def _note_first_token(self) -> None:
        if self._first_token_ms is None:
            self._first_token_ms = round((time.monotonic() - self._started) * 1000)

    async def _stop_generation(self) -> None:
        if self._running is None or not isinstance(self._driver, ResponseStopper):
            return
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._driver.stop(self._request.endpoint, self._running)
        except Exception as error:
            log.warning("a generation could not be stopped at its provider", error=type(error).__name__)

    def _answer(self, finished: Finished, writer: DeltaWriter) -> ArrivedAnswer:
        if writer.replacement is not None:
            return self._replaced_answer(finished, writer, writer.replacement)
        if not writer.text and not self._calls and finished.reason in ("content_filter", "refusal"):
            writer.add_own_text(STOPPED_BY_FILTER if finished.reason == "content_filter" else REFUSED)
        endpoint = self._request.endpoint
        state = ProviderState(
            provider_public_id=endpoint.provider_public_id,
            driver=self._driver.name,
            model=self._request.model,
            items=finished.state,
        )
        return ArrivedAnswer(
            finish_reason=finished.reason,
            usage=with_cost(finished.usage, self._request.profile),
            text_length=len(writer.text),
            duration_ms=round((time.monotonic() - self._started) * 1000),
            thinking=writer.thinking,
            calls=self._calls,
            time_to_first_token_ms=self._first_token_ms,
            response_id=finished.response_id,
            phase=finished.phase,
            state=state if finished.state and not self._emptied else None,
            reasoning_items=[_shown_item(item, writer) for item in finished.reasoning_items],
            dropped_options=finished.dropped_options,
        )

    def _replaced_answer(
        self, finished: Finished, writer: DeltaWriter, replacement: OutputReplacement
    ) -> ArrivedAnswer:
        """Of what the model said nothing is kept but what was shown of its thinking; nothing it called is run."""
        return ArrivedAnswer(
            finish_reason="content_filter",
            usage=with_cost(finished.usage, self._request.profile),
            text_length=len(writer.text),
            duration_ms=round((time.monotonic() - self._started) * 1000),
            thinking=writer.thinking,
            time_to_first_token_ms=self._first_token_ms,
            response_id=finished.response_id,
            dropped_options=finished.dropped_options,
            replacement=replacement,
        )


def _shown_item(item: ReasoningItem, writer: DeltaWriter) -> ReasoningItem:
    if not item.summary or writer.may_be_shown("\n".join(item.summary)):
        return item
    return msgspec.structs.replace(item, summary=[])
