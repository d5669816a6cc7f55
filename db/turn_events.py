"""The events that transitions of a turn write, built from rows and outcomes. No database here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from db.turn_rows import StateRow, TurnRow, step_context, turn_context
from domain.checkpoints import is_checkpoint_message
from domain.clock import now_timestamp
from domain.conversation import SYNTHETIC
from domain.events import (
    EventPayload,
    GenerationFallback,
    GenerationMetadata,
    GenerationOutput,
    GenerationTool,
    InputMessage,
    LlmGeneration,
    ModelMetadata,
    NewEvent,
    OutputMessageCompleted,
    OutputMessageStarted,
    ReasonCompleted,
    ReasonItem,
    ReasonStarted,
    ReasonThinkingCompleted,
    RequestOptions,
    RetryMetadata,
    TurnCompleted,
)
from domain.ids import Prefix, derived_id, format_id, new_id, parse_id
from domain.messages import Controls, Message, Phase, Role, TextPart, ToolCallPart
from domain.model import USER_ERRORS, ReasoningItem
from domain.tools import BuiltinTool, ToolCall, ToolDefinition
from domain.turns import ReasonFailure, ReasonOutcome, ResolvedModel, StepRef

PREVIEW_CHARACTERS: Final = 200


def message_id_of(turn: TurnRow, iteration: int) -> str:
    """The id of the message a reason step writes: the same for every attempt."""
    return derived_id(Prefix.MESSAGE, turn.id, f"message:{iteration}")


def duration_ms(turn: TurnRow) -> int:
    return max(0, round((datetime.now(UTC) - turn.started_at).total_seconds() * 1000))


def preview(text: str) -> str | None:
    return text[:PREVIEW_CHARACTERS] or None


def synthetic_message(role: Role, text: str) -> Message:
    """A message the engine writes itself, to tell what happened."""
    return Message(
        id=new_id(Prefix.MESSAGE),
        role=role,
        content=[TextPart(text=text)],
        created_at=now_timestamp(),
        phase=Phase.FINAL_ANSWER if role is Role.AGENT else None,
        metadata={SYNTHETIC: True},
    )


def turn_event(turn: TurnRow, payload: EventPayload) -> NewEvent:
    """An event of the turn itself; each happens once in a turn."""
    if isinstance(payload, InputMessage):
        return NewEvent(data=payload)
    part = payload.message.id if isinstance(payload, OutputMessageCompleted) else turn.id.hex
    return NewEvent(data=payload, context=turn_context(turn), dedupe_key=f"{payload.event_type}:{part}")


def model_metadata(model: ResolvedModel | None) -> ModelMetadata | None:
    if model is None:
        return None
    return ModelMetadata(
        model=model.name,
        model_id=str(parse_id(Prefix.MODEL, model.public_id)),
        provider_id=str(parse_id(Prefix.PROVIDER, model.provider_public_id)),
    )


def reason_started_events(
    ref: StepRef, turn: TurnRow, model: ResolvedModel | None, read: Sequence[str]
) -> list[NewEvent]:
    context = step_context(turn, ref.exec_id)
    message_id = message_id_of(turn, ref.iteration)
    started = ReasonStarted(
        harness_id=format_id(Prefix.HARNESS, turn.harness_id),
        agent_id=turn.agent_public_id,
        metadata=model_metadata(model),
        iteration=ref.iteration,
        input_message_ids=list(read) or None,
    )
    output = OutputMessageStarted(
        turn_id=ref.turn_id, message_id=message_id, model=model and model.name, iteration=ref.iteration
    )
    return [
        NewEvent(data=started, context=context, dedupe_key=f"reason.started:{ref.exec_id}"),
        NewEvent(data=output, context=context, dedupe_key=f"output.message.started:{message_id}"),
    ]


def reason_aborted_event(turn: TurnRow, exec_id: str, error: str | None) -> NewEvent:
    """The `reason.completed` of a step that ends without its own commit: failed with an error, interrupted without one."""
    aborted = ReasonCompleted(
        success=False,
        has_tool_calls=False,
        tool_call_count=0,
        error=error,
        interrupted=True if error is None else None,
    )
    return NewEvent(data=aborted, context=step_context(turn, exec_id), dedupe_key=f"reason.completed:{exec_id}")


def generation_failed_event(ref: StepRef, turn: TurnRow, failure: ReasonFailure) -> NewEvent:
    code, _ = USER_ERRORS[failure.kind]
    model = failure.model
    generation = LlmGeneration(
        messages=[],
        output=GenerationOutput(),
        metadata=GenerationMetadata(
            model=model.name if model else "",
            success=False,
            provider=model.provider_type if model else None,
            duration_ms=failure.duration_ms,
            error=code,
            finish_reasons=["error"],
            fallback=model and _fallback(model),
        ),
    )
    return NewEvent(
        data=generation,
        context=step_context(turn, ref.exec_id),
        dedupe_key=f"llm.generation:{ref.exec_id}:{ref.attempt}",
    )


def generation_events(
    ref: StepRef, turn: TurnRow, state: StateRow, outcome: ReasonOutcome, calls: list[ToolCall], *, final: bool
) -> list[NewEvent]:
    """What one successful model call leaves in the log."""
    context = step_context(turn, ref.exec_id)
    message_id = message_id_of(turn, ref.iteration)
    answer, model = outcome.answer, outcome.model
    message = Message(
        id=message_id,
        role=Role.AGENT,
        content=[
            *([TextPart(text=outcome.text)] if outcome.text or not calls else []),
            *(ToolCallPart(id=call.id, name=call.name, arguments=call.arguments) for call in calls),
        ],
        created_at=now_timestamp(),
        # A provider that tells phases apart knows better than we do, except that a turn's end is its answer.
        phase=Phase.FINAL_ANSWER if final else answer.phase or Phase.COMMENTARY,
    )
    retry = (
        RetryMetadata(attempts=state.step_failures, total_wait_ms=state.step_wait_ms) if state.step_failures else None
    )
    generation = LlmGeneration(
        messages=_new_in_prompt(outcome.prompt, first=ref.iteration == 1, compacted=answer.compaction is not None),
        prompt_message_count=len(outcome.prompt),
        # Once a turn: with the tools of a dozen capabilities they would be most of the log.
        tools=(_generation_tools(outcome.offered_tools) or None) if ref.iteration == 1 else None,
        output=GenerationOutput(text=outcome.text or None, tool_calls=calls or None),
        metadata=GenerationMetadata(
            model=model.name,
            success=True,
            provider=model.provider_type,
            usage=answer.usage,
            duration_ms=answer.duration_ms,
            time_to_first_token_ms=answer.time_to_first_token_ms,
            finish_reasons=[answer.finish_reason],
            response_id=answer.response_id,
            retry=retry,
            request_options=_request_options(turn.controls),
            dropped_options=answer.dropped_options or None,
            fallback=_fallback(model),
            compaction=answer.compaction,
        ),
    )
    output = OutputMessageCompleted(message=message, metadata=model_metadata(model), usage=answer.usage)
    completed = ReasonCompleted(
        success=True,
        has_tool_calls=bool(calls),
        tool_call_count=len(calls),
        text_preview=preview(outcome.text),
        duration_ms=answer.duration_ms,
        usage=answer.usage,
        attempts=ref.attempt if ref.attempt > 1 else None,
    )
    thought = ReasonThinkingCompleted(turn_id=ref.turn_id, thinking=answer.thinking) if answer.thinking else None
    keyed: list[tuple[EventPayload | None, str]] = [
        (thought, f"reason.thinking.completed:{ref.exec_id}"),
        *(
            (_reason_item(ref, model, item), f"reason.item:{ref.exec_id}:{item.item_id}")
            for item in answer.reasoning_items
        ),
        (generation, f"llm.generation:{ref.exec_id}:{ref.attempt}"),
        (output, f"output.message.completed:{message_id}"),
        (completed, f"reason.completed:{ref.exec_id}"),
    ]
    return [NewEvent(data=data, context=context, dedupe_key=key) for data, key in keyed if data is not None]


def _reason_item(ref: StepRef, model: ResolvedModel, item: ReasoningItem) -> ReasonItem:
    return ReasonItem(
        turn_id=ref.turn_id,
        provider=model.provider_type,
        item_id=item.item_id,
        model=model.name,
        summary=item.summary or None,
        token_count=item.token_count,
    )


def _request_options(controls: Controls) -> RequestOptions:
    """What was asked for; `dropped_options` names what of it was not sent."""
    return RequestOptions(
        reasoning_effort=controls.reasoning and controls.reasoning.effort,
        verbosity=controls.verbosity,
        speed=controls.speed,
        response_format=controls.response_format and controls.response_format.type,
        stream=True,
    )


def _fallback(model: ResolvedModel) -> GenerationFallback | None:
    left = model.instead_of
    return left and GenerationFallback(model=left.model, model_id=left.model_id, reason=left.reason)


def turn_completed_event(turn: TurnRow, iteration: int, text: str, *, at_limit: bool) -> NewEvent:
    completed = TurnCompleted(
        turn_id=turn.public_id,
        iterations=iteration,
        status="completed",
        duration_ms=duration_ms(turn),
        usage=turn.usage,
        final_message_id=message_id_of(turn, iteration),
        final_answer_preview=preview(text),
        time_to_first_token_ms=turn.time_to_first_token_ms,
        tool_call_count=turn.tool_call_count,
        llm_call_count=turn.llm_call_count,
        stop_reason="max_iterations" if at_limit else None,
    )
    return turn_event(turn, completed)


def after_step(turn: TurnRow, outcome: ReasonOutcome, calls: int) -> TurnRow:
    """The turn's totals with this step in them. The first token's delay counts from the beginning of the turn."""
    first_token = turn.time_to_first_token_ms
    answer = outcome.answer
    if first_token is None and answer.time_to_first_token_ms is not None:
        first_token = max(0, duration_ms(turn) - answer.duration_ms + answer.time_to_first_token_ms)
    return msgspec.structs.replace(
        turn,
        usage=turn.usage + answer.usage,
        llm_call_count=turn.llm_call_count + 1,
        tool_call_count=turn.tool_call_count + calls,
        time_to_first_token_ms=first_token,
    )


def _generation_tools(tools: Sequence[ToolDefinition]) -> list[GenerationTool]:
    return [
        GenerationTool(
            name=tool.name,
            description=tool.description,
            display_name=tool.display_name,
            category=tool.category,
            capability_id=tool.hints.capability_id if isinstance(tool, BuiltinTool) and tool.hints else None,
            capability_name=tool.hints.capability_name if isinstance(tool, BuiltinTool) and tool.hints else None,
        )
        for tool in tools
    ]


def _new_in_prompt(prompt: list[Message], *, first: bool, compacted: bool) -> list[Message]:
    """What this call's prompt adds to the one before it: the whole of every prompt would grow the log quadratically."""
    last_answer = max((place for place, message in enumerate(prompt) if message.role is Role.AGENT), default=-1)
    system = [message for message in prompt[:1] if first and message.role is Role.SYSTEM]
    summaries = [message for message in prompt[: last_answer + 1] if compacted and is_checkpoint_message(message)]
    return system + summaries + [message for message in prompt[last_answer + 1 :] if message.role is not Role.SYSTEM]
