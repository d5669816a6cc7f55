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

from activities.capabilities.assembly import offered_tools, planned, prompt, prompt_cache_wanted
from activities.capabilities.registry import CapabilityRegistry, ResolvedCapabilities
from activities.context.compaction import ContextKeeper
from activities.delta_writer import DeltaWriter
from activities.step import ReasonStep, reason_step
from domain.model import (
    Alive,
    Began,
    Finished,
    ModelDriver,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    ProviderState,
    ResponseStopper,
    ResumePoint,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.model_profiles import with_cost
from domain.token_estimate import prompt_tokens
from domain.turns import (
    ArrivedAnswer,
    PlannedCall,
    ReasonBriefing,
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
        capabilities: CapabilityRegistry,
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
        resolved = self._capabilities.resolve(briefing.config.capabilities)
        if resolved.missing:
            log.warning("capabilities skipped", missing=list(resolved.missing))
        request = model_request(step, briefing.model, resolved)
        if briefing.answer is not None:
            # The whole answer arrived before the worker was lost: only its end was left to write.
            return outcome(briefing.model, request, briefing.partial_text, briefing.answer)
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
        async with DeltaWriter(
            self._state,
            step.ref,
            briefing.message_id,
            briefing.model,
            text=briefing.partial_text,
            thinking=briefing.partial_thinking,
        ) as writer:
            while True:
                call = _Call(driver, request, briefing, resolved)
                try:
                    answer = await call.run(writer, self._stall_seconds)
                except ModelError as error:
                    request = await _shorter(request, error, call, writer, keeper)
                else:
                    break
            answer = msgspec.structs.replace(answer, compaction=keeper.result)
            writer.arrived(answer)
        return outcome(briefing.model, request, writer.text, answer, native_tokens=keeper.native_tokens)


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
        parallel_tool_calls=briefing.config.parallel_tool_calls,
        prompt_cache=prompt_cache_wanted(resolved),
        options=model.options,
        states=briefing.states,
        context=briefing.checkpoint and briefing.checkpoint.native,
        resume=briefing.resume,
    )


def outcome(
    model: ResolvedModel, request: ModelRequest, text: str, answer: ArrivedAnswer, *, native_tokens: int = 0
) -> ReasonOutcome:
    """`native_tokens` are in the prompt besides its messages, in a form that only the provider can read."""
    return ReasonOutcome(
        model=model,
        prompt=request.messages,
        offered_tools=request.tools,
        text=text,
        answer=answer,
        estimated_prompt_tokens=prompt_tokens(request.messages, request.tools) + native_tokens,
    )


class _Call:
    """One call of a driver, from its first event to its terminal one."""

    def __init__(
        self, driver: ModelDriver, request: ModelRequest, briefing: ReasonBriefing, resolved: ResolvedCapabilities
    ) -> None:
        self._driver = driver
        self._request = request
        self._briefing = briefing
        self._resolved = resolved
        self._calls: list[PlannedCall] = []
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
        return self._answer(finished, writer)

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
                self._calls.append(planned(event.call, self._resolved, self._briefing.config, problem=event.problem))
            case Alive():
                pass
            case Finished():
                return event
        return None

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
        if not writer.text and not self._calls and finished.reason in ("content_filter", "refusal"):
            writer.add_text(STOPPED_BY_FILTER if finished.reason == "content_filter" else REFUSED)
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
            state=state if finished.state else None,
            reasoning_items=finished.reasoning_items,
            dropped_options=finished.dropped_options,
        )
