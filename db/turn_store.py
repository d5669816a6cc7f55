"""Serves the port `domain.turns.TurnState` from PostgreSQL: every transition of a turn, one transaction each.

Each method locks the session's row first. That one lock orders everything that matters: a message that arrives is either
before the end of a turn, and the turn goes on, or after it, and gets a turn of its own; an attempt that was overtaken finds
another attempt's number and may write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

import msgspec

from db import tool_ledger
from db.event_log import EventLog, SessionTransaction, read_latest_conversation, read_partial_text
from db.tool_ledger import OUTCOME_UNKNOWN
from db.turn_config import read_session_layers, resolve_model
from db.turn_rows import (
    StateRow,
    TurnRow,
    fence,
    lock_state,
    read_turn,
    step_context,
    step_key,
    turn_context,
)
from domain.clock import now_timestamp
from domain.config import controls_layer, fold
from domain.conversation import SYNTHETIC, conversation_of
from domain.events import (
    EventPayload,
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
    ReasonRecovered,
    ReasonStarted,
    ReasonThinkingCompleted,
    RequestOptions,
    RetryMetadata,
    SessionActivated,
    SessionIdled,
    SessionModelChanged,
    TurnCancelled,
    TurnCompleted,
    TurnFailed,
    TurnSealed,
    TurnStarted,
)
from domain.ids import Prefix, derived_id, format_id, new_id, parse_id
from domain.messages import Controls, ImageFilePart, ImagePart, Message, Phase, Role, TextPart, ToolCallPart
from domain.model import USER_ERROR_CODES, USER_ERRORS
from domain.tools import BuiltinTool, SideEffect, ToolCall, ToolDefinition
from domain.turns import (
    ActResult,
    FinishInput,
    FinishResult,
    NoProgress,
    ReasonBriefing,
    ReasonFailure,
    ReasonNext,
    ReasonOutcome,
    ReasonResult,
    ResolvedModel,
    StepFenced,
    StepRef,
    ToolClaim,
    ToolSettlement,
    TurnEnding,
)
from workflows.contract import LOST_ATTEMPTS_BEFORE_SEAL

HISTORY_EVENTS: Final = 2_000
"""Log rows a prompt is built from, newest first: what keeps turn 10,000 as cheap as turn 1. Older rows are left out."""

PREVIEW_CHARACTERS: Final = 200

CANCEL_NOTE: Final = "User requested to cancel the work."
CANCEL_ANSWER: Final = "Work was cancelled by user."
SEALED_ANSWER: Final = "I stopped because this turn made no progress after several attempts."
LOST_TURN_REASON: Final = "The workflow of this turn ended without closing it"

_ENTER_STEP: Final = """UPDATE session_state SET step_exec_id = $2, step_attempt = $3, step_failures = $4, step_wait_ms = $5
    WHERE session_id = $1"""
_NOTE_FAILURE: Final = """UPDATE session_state SET step_failures = step_failures + 1, step_wait_ms = step_wait_ms + $2
    WHERE session_id = $1"""
_NOTE_ERROR: Final = "UPDATE turns SET last_error = $2, last_error_code = $3 WHERE id = $1"
_UNREAD: Final = "SELECT sequence, message_id, delivery FROM inbox WHERE session_id = $1 ORDER BY sequence"
_READ_MESSAGES: Final = "DELETE FROM inbox WHERE session_id = $1 AND sequence = ANY($2::bigint[])"
_INPUT_DATA: Final = "SELECT data FROM events WHERE session_id = $1 AND sequence = ANY($2::bigint[]) ORDER BY sequence"
_OPEN_TURN: Final = """INSERT INTO turns (id, org_id, session_id, agent_id, agent_public_id, harness_id, config,
    input_message_id, reasoning_effort, timezone) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"""
_ACTIVATE: Final = """UPDATE session_state SET status = 'active', turn_id = $2, turn_count = turn_count + 1, model_id = $3,
    started_at = coalesce(started_at, clock_timestamp()), finished_at = NULL WHERE session_id = $1"""
_OPEN_MESSAGE: Final = "UPDATE turns SET open_message_id = $2 WHERE id = $1"
_COMMIT_STEP: Final = """UPDATE turns SET iteration = $2, last_result = $3, open_message_id = NULL,
    input_tokens = input_tokens + $4, output_tokens = output_tokens + $5, cache_read_tokens = cache_read_tokens + $6,
    cache_creation_tokens = cache_creation_tokens + $7, llm_call_count = llm_call_count + 1,
    tool_call_count = tool_call_count + $8, time_to_first_token_ms = coalesce(time_to_first_token_ms, $9) WHERE id = $1"""
_ADD_USAGE: Final = """UPDATE session_state SET input_tokens = input_tokens + $2, output_tokens = output_tokens + $3,
    cache_read_tokens = cache_read_tokens + $4, cache_creation_tokens = cache_creation_tokens + $5,
    output_preview = coalesce($6, output_preview), status = 'active' WHERE session_id = $1"""
_END_TURN: Final = "UPDATE turns SET status = $2, ended_at = clock_timestamp(), open_message_id = NULL WHERE id = $1"
_IDLE: Final = """UPDATE session_state SET status = $2, turn_id = NULL, step_exec_id = NULL, step_attempt = 0,
    active_ms = active_ms + $3, finished_at = clock_timestamp() WHERE session_id = $1"""

_REST: Final = """UPDATE session_state SET status = 'idle' WHERE session_id = $1 AND turn_id IS NULL
    AND status IN ('active', 'waiting_for_tool_results')"""

_input_decoder = msgspec.json.Decoder(InputMessage)


class _Unread(msgspec.Struct, frozen=True):
    sequence: int
    message_id: str
    delivery: str


class TurnStore:
    def __init__(self, log: EventLog) -> None:
        self._log = log

    # --- reason -------------------------------------------------------------------------------------------------------

    async def begin_reason(
        self, ref: StepRef, open_calls: Literal["interrupted", "timed_out"]
    ) -> ReasonBriefing | ReasonResult:
        async with self._log.transaction(ref.session_id) as work:
            state = await lock_state(work)
            turn = await read_turn(work, parse_id(Prefix.TURN, ref.turn_id))
            if turn is None:
                turn = await self._open_turn(work, state, ref.turn_id)
                if turn is None:
                    return ReasonResult(next=ReasonNext.NOTHING)
                read: list[str] = []
            else:
                if turn.iteration >= ref.iteration and turn.last_result is not None:
                    return turn.last_result
                if turn.status != "running":
                    raise StepFenced
                read = await self._drain(work) if ref.attempt == 1 or state.step_exec_id != step_key(ref) else []
            await self._enter_step(work, state, ref)
            message_id = derived_id(Prefix.MESSAGE, turn.id, f"message:{ref.iteration}")
            await self._make_history_legal(work, turn, ref, message_id, open_calls)
            model = await resolve_model(work.connection, state.org_id, turn.config)
            context = step_context(turn, ref.exec_id)
            await work.append(
                NewEvent(
                    data=ReasonStarted(
                        harness_id=format_id(Prefix.HARNESS, turn.harness_id),
                        agent_id=turn.agent_public_id,
                        metadata=_model_metadata(model),
                        iteration=ref.iteration,
                        input_message_ids=read or None,
                    ),
                    context=context,
                    dedupe_key=f"reason.started:{ref.exec_id}",
                ),
                NewEvent(
                    data=OutputMessageStarted(
                        turn_id=ref.turn_id,
                        message_id=message_id,
                        model=model and model.name,
                        iteration=ref.iteration,
                    ),
                    context=context,
                    dedupe_key=f"output.message.started:{message_id}",
                ),
            )
            await work.connection.execute(_OPEN_MESSAGE, turn.id, message_id)
            events, truncated = await read_latest_conversation(work.connection, ref.session_id, HISTORY_EVENTS)
        return ReasonBriefing(
            message_id=message_id,
            config=turn.config,
            history=conversation_of(events, truncated=truncated).messages,
            model=model,
            input_message_id=turn.input_message_id,
            harness_id=format_id(Prefix.HARNESS, turn.harness_id),
            agent_id=turn.agent_public_id,
            reasoning_effort=turn.reasoning_effort,
            timezone=turn.timezone,
        )

    async def commit_reason(self, ref: StepRef, outcome: ReasonOutcome) -> ReasonResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_step(work, ref)
            planned = await tool_ledger.with_free_ids(work, outcome.calls)
            await work.append(*_generation_events(ref, turn, state, outcome, [item.call for item in planned]))
            usage = outcome.usage
            buckets = (
                usage.input_tokens,
                usage.output_tokens,
                usage.cache_read_tokens or 0,
                usage.cache_creation_tokens or 0,
            )
            preview = outcome.text[:PREVIEW_CHARACTERS] or None
            await work.connection.execute(_ADD_USAGE, work.key, *buckets, preview)
            await tool_ledger.request_calls(work, state.org_id, turn, ref.iteration, planned)
            at_limit = bool(planned) and ref.iteration >= turn.config.max_iterations
            steered = False
            if not planned:
                steered = any(item.delivery != "follow_up" for item in await self._unread(work))
            if at_limit:
                await tool_ledger.settle_open_calls(work, turn, "iteration_limit")
            result = ReasonResult(next=ReasonNext.AGAIN if steered else ReasonNext.DONE)
            if planned and not at_limit:
                rows = await tool_ledger.read_open_calls(work)
                server = [row.ref() for row in rows if row.kind == "server"]
                client = [row for row in rows if row.kind == "client"]
                if not server:
                    await tool_ledger.request_client_calls(work, turn, client)
                result = ReasonResult(
                    next=ReasonNext.ACT if server else ReasonNext.WAIT,
                    calls=server,
                    client_calls=[row.call.id for row in client],
                    serial=turn.config.parallel_tool_calls is False,
                )
            first_token = outcome.time_to_first_token_ms
            if first_token is not None:
                waited = (datetime.now(UTC) - turn.started_at).total_seconds() * 1000
                first_token = max(0, round(waited - outcome.duration_ms + first_token))
            if result.next is ReasonNext.DONE:
                result = msgspec.structs.replace(result, more=await self._has_unread(work))
            await work.connection.execute(
                _COMMIT_STEP,
                turn.id,
                ref.iteration,
                msgspec.json.encode(result).decode(),
                *buckets,
                len(planned),
                first_token,
            )
            if result.next is ReasonNext.DONE:
                ended = await read_turn(work, turn.id)
                assert ended is not None, "the row was written a statement ago"
                message_id = derived_id(Prefix.MESSAGE, turn.id, f"message:{ref.iteration}")
                completed = TurnCompleted(
                    turn_id=ref.turn_id,
                    iterations=ref.iteration,
                    status="completed",
                    duration_ms=_duration_ms(ended),
                    usage=ended.usage,
                    final_message_id=message_id,
                    final_answer_preview=preview,
                    time_to_first_token_ms=ended.time_to_first_token_ms,
                    tool_call_count=ended.tool_call_count,
                    llm_call_count=ended.llm_call_count,
                    stop_reason="max_iterations" if at_limit else None,
                )
                await self._end_turn(work, ended, "completed", [completed], iterations=ref.iteration)
        return result

    async def fail_reason(self, ref: StepRef, failure: ReasonFailure) -> None:
        async with self._log.transaction(ref.session_id) as work:
            _, turn = await self._running_step(work, ref)
            await work.connection.execute(_NOTE_FAILURE, work.key, failure.retry_in_ms)
            code, _ = USER_ERRORS[failure.kind]
            await work.connection.execute(_NOTE_ERROR, turn.id, failure.error, code)
            await work.append(
                NewEvent(
                    data=LlmGeneration(
                        messages=[],
                        output=GenerationOutput(),
                        metadata=GenerationMetadata(
                            model=failure.model,
                            success=False,
                            provider=failure.provider_type,
                            duration_ms=failure.duration_ms,
                            error=USER_ERRORS[failure.kind][0],
                            finish_reasons=["error"],
                        ),
                    ),
                    context=step_context(turn, ref.exec_id),
                    dedupe_key=f"llm.generation:{ref.exec_id}:{ref.attempt}",
                )
            )

    async def release_step(self, ref: StepRef) -> None:
        async with self._log.transaction(ref.session_id) as work:
            await self._running_step(work, ref)
            await work.connection.execute(_NOTE_FAILURE, work.key, 0)

    async def append(self, ref: StepRef, events: Sequence[NewEvent]) -> None:
        await self._log.append(ref.session_id, events, fence=fence(ref))

    # --- act ----------------------------------------------------------------------------------------------------------

    async def begin_call(self, ref: StepRef, call_id: str) -> ToolClaim | ActResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None:
                raise StepFenced
            if row.status == "settled":
                return ActResult(waiting=state.status == "waiting_for_tool_results")
            if row.attempt >= ref.attempt and row.status == "running":
                raise StepFenced
            if row.status == "running" and row.side_effect is SideEffect.AT_MOST_ONCE:
                unknown = ToolSettlement(status="error", error=OUTCOME_UNKNOWN)
                await tool_ledger.settle_call(work, turn, row, unknown, attempts=ref.attempt)
                return ActResult(waiting=await tool_ledger.close_batch(work, turn, row.iteration))
            if ref.attempt > LOST_ATTEMPTS_BEFORE_SEAL:
                raise NoProgress
            await tool_ledger.start_call(work, turn, row, attempt=ref.attempt, worker=ref.worker)
        return ToolClaim(call=row.call, config=turn.config, side_effect=row.side_effect, timezone=turn.timezone)

    async def settle_call(self, ref: StepRef, call_id: str, settlement: ToolSettlement) -> ActResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None or row.attempt != ref.attempt:
                raise StepFenced
            if row.status == "settled":
                return ActResult(waiting=state.status == "waiting_for_tool_results")
            await tool_ledger.settle_call(work, turn, row, settlement, attempts=ref.attempt)
            return ActResult(waiting=await tool_ledger.close_batch(work, turn, row.iteration))

    async def append_tool_event(self, ref: StepRef, call_id: str, payload: EventPayload) -> None:
        async with self._log.transaction(ref.session_id) as work:
            _, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None or row.status != "running" or row.attempt != ref.attempt:
                raise StepFenced
            exec_id = tool_ledger.call_exec_id(turn, call_id)
            parent = tool_ledger.act_exec_id(turn, row.iteration)
            await work.append(NewEvent(data=payload, context=step_context(turn, exec_id, parent=parent)))

    # --- finish -------------------------------------------------------------------------------------------------------

    async def finish(self, input: FinishInput) -> FinishResult:
        async with self._log.transaction(input.session_id) as work:
            state = await lock_state(work)
            turn = await read_turn(work, parse_id(Prefix.TURN, input.turn_id))
            if turn is None:
                turn = await self._open_turn(work, state, input.turn_id)
                if turn is None:
                    return FinishResult()
            if turn.status == "running":
                await self._close(work, state, turn, input)
            return FinishResult(more=await self._has_unread(work))

    async def _close(self, work: SessionTransaction, state: StateRow, turn: TurnRow, input: FinishInput) -> None:
        read = await self._drain(work, up_to=input.read_up_to) if input.ending is TurnEnding.CANCELLED else []
        iterations = max(turn.iteration, input.iteration)
        match input.ending:
            case TurnEnding.CANCELLED:
                await self._close_partial_message(work, state, turn)
                await tool_ledger.settle_open_calls(work, turn, "cancelled")
                note = _synthetic_message(Role.USER, CANCEL_NOTE)
                answer = _synthetic_message(Role.AGENT, CANCEL_ANSWER)
                cancelled = TurnCancelled(
                    turn_id=turn.public_id, reason=input.reason, input_message_ids=read or None, usage=turn.usage
                )
                payloads = [cancelled, InputMessage(message=note), OutputMessageCompleted(message=answer)]
            case TurnEnding.SUPERSEDED:
                await self._close_partial_message(work, state, turn)
                await tool_ledger.settle_open_calls(work, turn, "superseded")
                payloads = [
                    TurnCancelled(turn_id=turn.public_id, reason="superseded by a new message", usage=turn.usage)
                ]
            case TurnEnding.FAILED:
                payloads = await self._failure(work, state, turn, input)
            case TurnEnding.SEALED:
                await self._close_partial_message(work, state, turn)
                await tool_ledger.settle_open_calls(work, turn, "interrupted")
                payloads = [
                    OutputMessageCompleted(message=_synthetic_message(Role.AGENT, SEALED_ANSWER)),
                    TurnSealed(
                        turn_id=turn.public_id,
                        reason="no_progress",
                        detail=input.reason,
                        iterations=iterations,
                        usage=turn.usage,
                    ),
                ]
        await self._end_turn(work, turn, input.ending.value, payloads, iterations=iterations)

    async def _failure(
        self, work: SessionTransaction, state: StateRow, turn: TurnRow, input: FinishInput
    ) -> list[EventPayload]:
        code = input.error_code or turn.last_error_code or "processing_error"
        text = USER_ERROR_CODES.get(code, USER_ERROR_CODES["processing_error"])
        await tool_ledger.settle_open_calls(work, turn, "interrupted")
        message = Message(
            # The message that was being written becomes the apology, so that no client is left with half a text.
            id=turn.open_message_id or new_id(Prefix.MESSAGE),
            role=Role.AGENT,
            content=[TextPart(text=text)],
            created_at=now_timestamp(),
            phase=Phase.FINAL_ANSWER,
            metadata={"error_code": code, "error_disclosure": "standard", "source_error_code": code},
        )
        await work.append(
            NewEvent(
                data=OutputMessageCompleted(message=message, error_code=code, error_disclosure="standard"),
                context=turn_context(turn),
                dedupe_key=f"output.message.completed:{message.id}",
            )
        )
        if turn.open_message_id is not None:
            await self._close_step(work, state, turn, error=turn.last_error or code)
        return [TurnFailed(turn_id=turn.public_id, error=text, error_code=code, error_disclosure="standard")]

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _running_turn(self, work: SessionTransaction, ref: StepRef) -> tuple[StateRow, TurnRow]:
        state = await lock_state(work)
        turn = await read_turn(work, parse_id(Prefix.TURN, ref.turn_id))
        if turn is None or turn.status != "running":
            raise StepFenced
        return state, turn

    async def _running_step(self, work: SessionTransaction, ref: StepRef) -> tuple[StateRow, TurnRow]:
        state, turn = await self._running_turn(work, ref)
        if (state.step_exec_id, state.step_attempt) != fence(ref):
            raise StepFenced
        return state, turn

    async def _enter_step(self, work: SessionTransaction, state: StateRow, ref: StepRef) -> None:
        """Make this attempt the only one that may write. Raises `StepFenced` or `NoProgress`."""
        exec_id = step_key(ref)
        failures, waited_ms = 0, 0
        if state.step_exec_id == exec_id:
            if state.step_attempt > ref.attempt:
                raise StepFenced
            failures, waited_ms = state.step_failures, state.step_wait_ms
        if ref.attempt - 1 - failures >= LOST_ATTEMPTS_BEFORE_SEAL:
            raise NoProgress
        await work.connection.execute(_ENTER_STEP, work.key, exec_id, ref.attempt, failures, waited_ms)

    async def _unread(self, work: SessionTransaction) -> list[_Unread]:
        rows = await work.connection.fetch(_UNREAD, work.key)
        return [_Unread(row["sequence"], row["message_id"], row["delivery"]) for row in rows]

    async def _has_unread(self, work: SessionTransaction) -> bool:
        return bool(await self._unread(work))

    async def _drain(self, work: SessionTransaction, *, up_to: int | None = None) -> list[str]:
        """Read every message meant for a running turn; the caller writes the receipt in this transaction."""
        taken = [
            item
            for item in await self._unread(work)
            if item.delivery != "follow_up" and (up_to is None or item.sequence <= up_to)
        ]
        if taken:
            await work.connection.execute(_READ_MESSAGES, work.key, [item.sequence for item in taken])
        return [item.message_id for item in taken]

    async def _open_turn(self, work: SessionTransaction, state: StateRow, turn_id: str) -> TurnRow | None:
        """Begin a turn with the messages that wait, or return None when none does."""
        key = parse_id(Prefix.TURN, turn_id)
        if state.turn_id is not None and state.turn_id != key:
            await self._close_lost_turn(work, state, state.turn_id)
            state = await lock_state(work)
        unread = await self._unread(work)
        if not unread:
            await work.connection.execute(_REST, work.key)
            return None
        first = [item for item in unread if item.delivery != "follow_up"] or unread[:1]
        sequences = [item.sequence for item in first]
        inputs = [
            _input_decoder.decode(row["data"]).message
            for row in await work.connection.fetch(_INPUT_DATA, work.key, sequences)
        ]
        layers = await read_session_layers(work.connection, work.key)
        if layers is None:
            await work.connection.execute(_READ_MESSAGES, work.key, [item.sequence for item in unread])
            return None
        await work.connection.execute(_READ_MESSAGES, work.key, sequences)
        controls = next((message.controls for message in reversed(inputs) if message.controls is not None), None)
        config = fold([*layers.layers, controls_layer(controls)])
        message_ids = [item.message_id for item in first]
        effort = controls.reasoning.effort if controls is not None and controls.reasoning is not None else None
        timezone = next((_text(message.metadata, "timezone") for message in reversed(inputs) if message.metadata), None)
        await work.connection.execute(
            _OPEN_TURN,
            key,
            state.org_id,
            work.key,
            layers.agent_row_id,
            layers.agent_id,
            layers.harness_id,
            msgspec.json.encode(config).decode(),
            message_ids[0],
            effort,
            timezone,
        )
        turn = await read_turn(work, key)
        assert turn is not None, "the row was written a statement ago"
        changed = await self._model_change(work, state, controls)
        model_key = changed[0] if changed else state.model_id
        await work.connection.execute(_ACTIVATE, work.key, key, model_key)
        content = [part for part in inputs[0].content if isinstance(part, (TextPart, ImagePart, ImageFilePart))]
        payloads: list[EventPayload] = [
            SessionActivated(turn_id=turn_id, input_message_id=message_ids[0]),
            TurnStarted(
                turn_id=turn_id,
                input_message_id=message_ids[0],
                input_message_ids=message_ids,
                input_content=content,  # type: ignore[arg-type]  # list is invariant
                agent_id=layers.agent_id,
                agent_name=layers.agent_name,
                agent_description=layers.agent_description,
            ),
        ]
        if changed and changed[1]:
            payloads.append(changed[1])
        await work.append(*(_turn_event(turn, payload) for payload in payloads))
        return turn

    async def _model_change(
        self, work: SessionTransaction, state: StateRow, controls: Controls | None
    ) -> tuple[UUID, SessionModelChanged | None] | None:
        """The explicitly asked-for model, with an event when another one had been asked for explicitly before."""
        if controls is None or controls.model_id is None:
            return None
        wanted = parse_id(Prefix.MODEL, controls.model_id)
        if state.model_id is None or state.model_id == wanted:
            return wanted, None
        names = {
            row["id"]: row["model_id"]
            for row in await work.connection.fetch(
                "SELECT id, model_id FROM models WHERE id = ANY($1::uuid[])", [wanted, state.model_id]
            )
        }
        return wanted, SessionModelChanged(
            model_id=controls.model_id,
            model_name=names.get(wanted, controls.model_id),
            previous_model_id=format_id(Prefix.MODEL, state.model_id),
            previous_model_name=names.get(state.model_id),
        )

    async def _close_lost_turn(self, work: SessionTransaction, state: StateRow, key: UUID) -> None:
        """Close a turn whose workflow is gone, terminated by an operator for example."""
        turn = await read_turn(work, key)
        if turn is None or turn.status != "running":
            return
        await self._close_partial_message(work, state, turn)
        await tool_ledger.settle_open_calls(work, turn, "interrupted")
        lost = TurnCancelled(turn_id=turn.public_id, reason=LOST_TURN_REASON, usage=turn.usage)
        await self._end_turn(work, turn, "cancelled", [lost], iterations=turn.iteration)

    async def _make_history_legal(
        self,
        work: SessionTransaction,
        turn: TurnRow,
        ref: StepRef,
        message_id: str,
        open_calls: Literal["interrupted", "timed_out"],
    ) -> None:
        """Before a model call: no call without a result, and no message left half written."""
        await tool_ledger.settle_open_calls(work, turn, open_calls)
        if turn.open_message_id is None:
            return
        if turn.open_message_id != message_id:
            await self._close_partial_message(work, None, turn)
            return
        partial = await read_partial_text(work.connection, work.session_id, message_id)
        if partial:
            await work.append(
                NewEvent(
                    data=ReasonRecovered(
                        turn_id=ref.turn_id,
                        mode="restart",
                        accumulated_len=len(partial),
                        message_id=message_id,
                        attempt=ref.attempt,
                    ),
                    context=step_context(turn, ref.exec_id),
                    dedupe_key=f"reason.recovered:{ref.exec_id}:{ref.attempt}",
                )
            )

    async def _close_partial_message(self, work: SessionTransaction, state: StateRow | None, turn: TurnRow) -> None:
        """Keep what was streamed of a message that will never be finished: clients have seen it."""
        if turn.open_message_id is None:
            return
        text = await read_partial_text(work.connection, work.session_id, turn.open_message_id)
        message = Message(
            id=turn.open_message_id,
            role=Role.AGENT,
            content=[TextPart(text=text)] if text else [],
            created_at=now_timestamp(),
            phase=Phase.COMMENTARY,
            metadata={"interrupted": True},
        )
        await work.append(
            NewEvent(
                data=OutputMessageCompleted(message=message),
                context=turn_context(turn),
                dedupe_key=f"output.message.completed:{message.id}",
            )
        )
        await self._close_step(work, state, turn, error=None)

    async def _close_step(
        self, work: SessionTransaction, state: StateRow | None, turn: TurnRow, *, error: str | None
    ) -> None:
        """Append the `reason.completed` of a step that ends without its own commit."""
        row = await work.connection.fetchrow(
            """SELECT exec_id FROM events WHERE session_id = $1 AND turn_id = $2 AND type = 'reason.started'
               ORDER BY sequence DESC LIMIT 1""",
            work.key,
            turn.id,
        )
        exec_key = state.step_exec_id if state is not None else None
        if exec_key is None and row is not None:
            exec_key = row["exec_id"]
        if exec_key is None:
            return
        exec_id = format_id(Prefix.EXEC, exec_key)
        await work.append(
            NewEvent(
                data=ReasonCompleted(
                    success=False,
                    has_tool_calls=False,
                    tool_call_count=0,
                    error=error,
                    interrupted=True if error is None else None,
                ),
                context=step_context(turn, exec_id),
                dedupe_key=f"reason.completed:{exec_id}",
            )
        )

    async def _end_turn(
        self,
        work: SessionTransaction,
        turn: TurnRow,
        status: str,
        payloads: Sequence[EventPayload],
        *,
        iterations: int,
    ) -> None:
        """Close the turn and rest the session, in the caller's transaction. The caller has decided that it is over."""
        await work.connection.execute(_END_TURN, turn.id, status)
        more = await self._has_unread(work)
        await work.connection.execute(_IDLE, work.key, "active" if more else "idle", _duration_ms(turn))
        state = await lock_state(work)
        idled = SessionIdled(turn_id=turn.public_id, iterations=iterations, usage=state.usage)
        await work.append(*(_turn_event(turn, payload) for payload in [*payloads, idled]))


def _turn_event(turn: TurnRow, payload: EventPayload) -> NewEvent:
    context = turn_context(turn)
    if isinstance(payload, InputMessage):
        return NewEvent(data=payload)
    return NewEvent(data=payload, context=context, dedupe_key=f"{payload.event_type}:{turn.id.hex}:{_part(payload)}")


def _part(payload: EventPayload) -> str:
    return payload.message.id if isinstance(payload, OutputMessageCompleted) else ""


def _model_metadata(model: ResolvedModel | None) -> ModelMetadata | None:
    if model is None:
        return None
    return ModelMetadata(
        model=model.name,
        model_id=str(parse_id(Prefix.MODEL, model.public_id)),
        provider_id=str(parse_id(Prefix.PROVIDER, model.provider_public_id)),
    )


def _duration_ms(turn: TurnRow) -> int:
    return max(0, round((datetime.now(UTC) - turn.started_at).total_seconds() * 1000))


def _synthetic_message(role: Role, text: str) -> Message:
    return Message(
        id=new_id(Prefix.MESSAGE),
        role=role,
        content=[TextPart(text=text)],
        created_at=now_timestamp(),
        phase=Phase.FINAL_ANSWER if role is Role.AGENT else None,
        metadata={SYNTHETIC: True},
    )


def _text(metadata: dict[str, object], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


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


def _new_in_prompt(prompt: list[Message], *, first: bool) -> list[Message]:
    """What this call's prompt adds to the one before it: the whole of every prompt would grow the log quadratically."""
    last_answer = max((place for place, message in enumerate(prompt) if message.role is Role.AGENT), default=-1)
    system = [message for message in prompt[:1] if first and message.role is Role.SYSTEM]
    return system + [message for message in prompt[last_answer + 1 :] if message.role is not Role.SYSTEM]


def _generation_events(
    ref: StepRef, turn: TurnRow, state: StateRow, outcome: ReasonOutcome, calls: list[ToolCall]
) -> list[NewEvent]:
    """What one successful model call leaves in the log."""
    context = step_context(turn, ref.exec_id)
    message_id = derived_id(Prefix.MESSAGE, turn.id, f"message:{ref.iteration}")
    message = Message(
        id=message_id,
        role=Role.AGENT,
        content=[
            *([TextPart(text=outcome.text)] if outcome.text or not calls else []),
            *(ToolCallPart(id=call.id, name=call.name, arguments=call.arguments) for call in calls),
        ],
        created_at=now_timestamp(),
        phase=Phase.COMMENTARY if calls else Phase.FINAL_ANSWER,
    )
    retry = (
        RetryMetadata(attempts=state.step_failures, total_wait_ms=state.step_wait_ms) if state.step_failures else None
    )
    generation = LlmGeneration(
        messages=_new_in_prompt(outcome.prompt, first=ref.iteration == 1),
        prompt_message_count=len(outcome.prompt),
        tools=_generation_tools(outcome.offered_tools) or None,
        output=GenerationOutput(text=outcome.text or None, tool_calls=calls or None),
        metadata=GenerationMetadata(
            model=outcome.model.name,
            success=True,
            provider=outcome.model.provider_type,
            usage=outcome.usage,
            duration_ms=outcome.duration_ms,
            time_to_first_token_ms=outcome.time_to_first_token_ms,
            finish_reasons=[outcome.finish_reason],
            response_id=outcome.response_id,
            retry=retry,
            request_options=RequestOptions(reasoning_effort=turn.reasoning_effort, stream=True),
        ),
    )
    completed = ReasonCompleted(
        success=True,
        has_tool_calls=bool(calls),
        tool_call_count=len(calls),
        text_preview=outcome.text[:PREVIEW_CHARACTERS] or None,
        duration_ms=outcome.duration_ms,
        usage=outcome.usage,
        attempts=ref.attempt if ref.attempt > 1 else None,
    )
    output = OutputMessageCompleted(message=message, metadata=_model_metadata(outcome.model), usage=outcome.usage)
    events = [
        NewEvent(data=generation, context=context, dedupe_key=f"llm.generation:{ref.exec_id}:{ref.attempt}"),
        NewEvent(data=output, context=context, dedupe_key=f"output.message.completed:{message_id}"),
        NewEvent(data=completed, context=context, dedupe_key=f"reason.completed:{ref.exec_id}"),
    ]
    if outcome.thinking:
        thought = ReasonThinkingCompleted(turn_id=ref.turn_id, thinking=outcome.thinking)
        events.insert(
            0,
            NewEvent(data=thought, context=context, dedupe_key=f"reason.thinking.completed:{ref.exec_id}"),
        )
    return events
