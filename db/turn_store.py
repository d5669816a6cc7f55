"""Serves the port `domain.turns.TurnState` from PostgreSQL: every transition of a turn, one transaction each.

Each method locks the session's row first. That one lock orders everything that matters: a message that arrives is either
before the end of a turn, and the turn goes on, or after it, and gets a turn of its own; an attempt that was overtaken finds
another attempt's number and may write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import structlog
from msgspec import Struct

from db import budget_gate, context_checkpoints, generations, inbox, tool_ledger
from db.budget_events import paused_event
from db.call_notices import planned_notices, result_notices
from db.circuit_breakers import note_failure, note_success
from db.event_log import EventLog, SessionTransaction, read_partial_text
from db.model_choice import ModelChooser, is_guarded, keeps_state
from db.tool_ledger import OUTCOME_UNKNOWN
from db.turn_ending import close_partial_message, close_turn, end_turn
from db.turn_events import (
    after_step,
    generation_events,
    generation_failed_event,
    message_id_of,
    preview,
    reason_started_events,
    turn_completed_event,
)
from db.turn_opening import open_turn
from db.turn_rows import StateRow, TurnRow, fence, lock_state, read_turn, step_context, step_key, usage_columns
from domain.budgets import COMPACTION
from domain.checkpoints import Checkpoint
from domain.events import EventPayload, NewEvent, ReasonRecovered, ReasonThinkingDelta, TokenUsage
from domain.ids import Prefix, format_id, parse_id
from domain.messages import Delivery
from domain.model import BREAKER_FAILURES, RETRYABLE, USER_ERRORS, ModelErrorKind, ResumePoint
from domain.tools import SideEffect
from domain.turns import (
    ActResult,
    ArrivedAnswer,
    CallWait,
    FailureVerdict,
    FinishInput,
    FinishResult,
    GenerationNote,
    NoProgress,
    PlannedCall,
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
)
from infra.encryption import Keyring
from workflows.contract import LOST_ATTEMPTS_BEFORE_SEAL, MODEL_ATTEMPTS

log = structlog.get_logger(__name__)

_ENTER_STEP: Final = """
WITH opened AS (UPDATE turns SET open_message_id = $2, open_exec_id = $3 WHERE id = $1)
UPDATE session_state SET status = 'active', step_exec_id = $3, step_attempt = $4, step_starts = $5, step_releases = $6,
    step_failures = $7, step_wait_ms = $8, step_model_failures = $10
WHERE session_id = $9
"""
_COMMIT_STEP: Final = """
WITH stepped AS (
    UPDATE turns SET iteration = $2, last_result = $3, open_message_id = NULL, open_exec_id = NULL, llm_call_count = $4,
        tool_call_count = $5, time_to_first_token_ms = $6, input_tokens = $10, output_tokens = $11, cache_read_tokens = $12,
        cache_creation_tokens = $13, estimated_cost_usd = $14, actual_cost_usd = $15, effective_cost_usd = $16 WHERE id = $1
), over AS (
    DELETE FROM running_generations WHERE session_id = $7
)
UPDATE session_state SET output_preview = coalesce($8, output_preview), token_ratio = coalesce($9, token_ratio),
    input_tokens = $17, output_tokens = $18, cache_read_tokens = $19, cache_creation_tokens = $20,
    estimated_cost_usd = $21, actual_cost_usd = $22, effective_cost_usd = $23 WHERE session_id = $7
"""
_NOTE_FAILURE: Final = """UPDATE session_state SET step_failures = step_failures + 1, step_wait_ms = step_wait_ms + $2,
    step_model_failures = $3 WHERE session_id = $1"""
_COUNT_USAGE: Final = """
WITH counted AS (
    UPDATE turns SET input_tokens = input_tokens + $3, output_tokens = output_tokens + $4,
        cache_read_tokens = cache_read_tokens + $5, cache_creation_tokens = cache_creation_tokens + $6,
        estimated_cost_usd = estimated_cost_usd + $7, actual_cost_usd = actual_cost_usd + $8,
        effective_cost_usd = effective_cost_usd + $9 WHERE id = $2
)
UPDATE session_state SET input_tokens = input_tokens + $3, output_tokens = output_tokens + $4,
    cache_read_tokens = cache_read_tokens + $5, cache_creation_tokens = cache_creation_tokens + $6,
    estimated_cost_usd = estimated_cost_usd + $7, actual_cost_usd = actual_cost_usd + $8,
    effective_cost_usd = effective_cost_usd + $9 WHERE session_id = $1
"""
_NOTE_RELEASE: Final = "UPDATE session_state SET step_releases = step_releases + 1 WHERE session_id = $1"
_NOTE_ERROR: Final = """UPDATE turns SET last_error = $2, last_error_code = $3, last_error_fields = $4, model_index = $5
    WHERE id = $1"""

PERSON_WAIT_SECONDS: Final = 7 * 24 * 3600.0
"""How long a tool waits for a person's answer. Waiting costs nothing; a week is when nobody will answer any more."""

TOKEN_RATIO_RANGE: Final = (0.25, 4.0)
"""Beyond it a provider's count says more about something we did not estimate (an image) than about our estimate."""

RESUMABLE_FAILURES: Final = frozenset({ModelErrorKind.TRANSPORT, ModelErrorKind.STREAM_CUT, ModelErrorKind.TIMEOUT})
"""After these a generation may still run at its provider."""


class Recovery(Struct, frozen=True, kw_only=True):
    """What a lost attempt left that this one can use; the texts are those in the log."""

    answer: ArrivedAnswer | None = None
    resume: ResumePoint | None = None
    text: str = ""
    thinking: str = ""


class TurnStore:
    def __init__(self, log: EventLog, models: ModelChooser, keyring: Keyring) -> None:
        self._log = log
        self._models = models
        self._keyring = keyring

    # --- reason -------------------------------------------------------------------------------------------------------

    async def begin_reason(
        self, ref: StepRef, open_calls: Literal["interrupted", "timed_out"]
    ) -> ReasonBriefing | ReasonResult:
        async with self._log.transaction(ref.session_id) as work:
            state = await lock_state(work)
            turn = await read_turn(work, parse_id(Prefix.TURN, ref.turn_id))
            opening: list[NewEvent] = []
            read: list[str] = []
            if turn is None:
                held = await budget_gate.before_turn(work, state, ref)
                if held is not None:
                    return held
                opened = await open_turn(work, state, ref.turn_id)
                if opened is None:
                    return ReasonResult(next=ReasonNext.NOTHING)
                turn, opening = opened.turn, opened.events
            else:
                if turn.iteration >= ref.iteration and turn.last_result is not None:
                    return turn.last_result
                if turn.status == "paused":
                    return ReasonResult(next=ReasonNext.PAUSED)
                if turn.status != "running":
                    raise StepFenced
                if state.step_exec_id != step_key(ref):
                    resumed = await self._resumed_calls(work, turn, open_calls)
                    if resumed is not None:
                        return resumed
                    held = await budget_gate.before_step(work, state, turn, ref, open_calls)
                    if held is not None:
                        return held
                    read = await inbox.take_for_running_turn(work)
            choice = await self._models.choose(work.connection, state.org_id, turn.config, turn.model_index)
            recovery = Recovery()
            if not opening:
                recovery = await self._make_history_legal(work, turn, ref, choice.model, open_calls)
            await self._enter_step(work, state, turn, ref)
            await work.append(*opening, *reason_started_events(ref, turn, choice.model, read))
            source = await context_checkpoints.read_prompt_source(
                work.connection, ref.session_id, self._keyring, choice.model, turn.input_sequences
            )
            states = (
                await generations.read_states(work, source.conversation.messages) if keeps_state(choice.model) else {}
            )
        return ReasonBriefing(
            message_id=message_id_of(turn, ref.iteration),
            config=turn.config,
            conversation=source.conversation,
            model=choice.model,
            problem=choice.problem,
            input_message_id=turn.input_message_id,
            harness_id=format_id(Prefix.HARNESS, turn.harness_id),
            agent_id=turn.agent_public_id,
            controls=turn.controls,
            timezone=turn.timezone,
            states=states,
            answer=recovery.answer,
            resume=recovery.resume,
            partial_text=recovery.text,
            partial_thinking=recovery.thinking,
            checkpoint=source.checkpoint,
            token_ratio=state.token_ratio,
            can_keep_native=self._keyring.can_encrypt,
        )

    async def install_checkpoint(
        self,
        ref: StepRef,
        checkpoint: Checkpoint | None,
        events: Sequence[NewEvent],
        usage: TokenUsage | None = None,
    ) -> None:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_step(work, ref)
            is_new = checkpoint is not None and await context_checkpoints.install(work, self._keyring, checkpoint)
            is_new = bool(await work.append(*events)) or is_new
            if usage is not None and is_new:
                await work.connection.execute(_COUNT_USAGE, work.key, turn.id, *usage_columns(usage))
                spent_on = ("compaction", str(checkpoint.id) if checkpoint else work.appended[0].id)
                charged = await budget_gate.charge(
                    work, state, turn, usage, exec_id=ref.exec_id, meter=COMPACTION, ref=spent_on
                )
                await work.append(*charged.events)

    async def find_model(self, ref: StepRef, name: str) -> ResolvedModel | None:
        async with self._log.transaction(ref.session_id) as work:
            state, _ = await self._running_step(work, ref)
            choice = await self._models.choose_by_name(work.connection, state.org_id, name)
        return None if choice.problem is not None else choice.model

    async def commit_reason(self, ref: StepRef, outcome: ReasonOutcome) -> ReasonResult:
        result = await self._commit_reason(ref, outcome)
        if outcome.model.trying:
            await note_success(self._log.pool, parse_id(Prefix.MODEL, outcome.model.public_id))
        return result

    async def _commit_reason(self, ref: StepRef, outcome: ReasonOutcome) -> ReasonResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_step(work, ref)
            if turn.iteration >= ref.iteration and turn.last_result is not None:
                return turn.last_result
            planned = await tool_ledger.with_free_ids(work, outcome.answer.calls)
            unread = await inbox.unread(work)
            steered = not planned and any(item.for_running_turn for item in unread)
            calls = [item.call for item in planned]
            events = generation_events(ref, turn, state, outcome, calls, final=not planned and not steered)
            events += planned_notices(ref, turn, planned, message_id_of(turn, ref.iteration))
            if planned:
                # Before the ledger's own events: a call's message comes first.
                await work.append(*events)
                events = []
                result = await self._plan_calls(work, state, turn, ref, planned)
            else:
                result = ReasonResult(next=ReasonNext.AGAIN if steered else ReasonNext.DONE)
            done = result.next is ReasonNext.DONE
            budgets = await budget_gate.charge(work, state, turn, outcome.answer.usage, exec_id=ref.exec_id)
            events = [*events, *budgets.events]
            more = done and bool(unread) and budgets.pausing is None
            result = msgspec.structs.replace(result, more=more, model=outcome.model.name)
            turn = after_step(turn, outcome, len(planned))
            usage = state.usage + outcome.answer.usage
            await work.connection.execute(
                _COMMIT_STEP,
                turn.id,
                ref.iteration,
                msgspec.json.encode(result).decode(),
                turn.llm_call_count,
                turn.tool_call_count,
                turn.time_to_first_token_ms,
                work.key,
                preview(outcome.text),
                _token_ratio(outcome),
                *usage_columns(turn.usage),
                *usage_columns(usage),
            )
            if outcome.answer.state is not None:
                await generations.keep_state(work, message_id_of(turn, ref.iteration), outcome.answer.state)
            if not done:
                await work.append(*events)
                return result
            # The end of a turn rides along: "nothing unread" was read under the lock this transaction still holds.
            if budgets.pausing is not None:
                events.append(paused_event(turn, budgets.pausing))
            completed = turn_completed_event(turn, ref.iteration, outcome.text, at_limit=bool(planned))
            await end_turn(
                work,
                turn,
                "completed",
                [*events, completed],
                iterations=ref.iteration,
                usage=usage,
                more=more,
            )
            if budgets.pausing is not None:
                await budget_gate.pause_at_rest(work, budgets.pausing)
            return msgspec.structs.replace(result, ended_at=work.appended[-1].sequence)

    async def _plan_calls(
        self, work: SessionTransaction, state: StateRow, turn: TurnRow, ref: StepRef, planned: Sequence[PlannedCall]
    ) -> ReasonResult:
        """Enter calls into the ledger; at the iteration limit they get their result at once and the turn is done."""
        await tool_ledger.request_calls(work, state.org_id, turn, ref.iteration, planned)
        if ref.iteration >= turn.config.max_iterations:
            await tool_ledger.settle_open_calls(work, turn, "iteration_limit")
            return ReasonResult(next=ReasonNext.DONE)
        rows = await tool_ledger.read_open_calls(work)
        server = [row.ref() for row in rows if row.status == "requested" and row.kind == "server"]
        waits = ActResult()
        if not server:
            waits = await tool_ledger.request_answers(work, turn, rows)
        return ReasonResult(
            next=ReasonNext.ACT if server else ReasonNext.WAIT,
            calls=server,
            client_calls=[row.wake_id for row in rows if row.awaited],
            serial=turn.config.parallel_tool_calls is False,
            wait_seconds=waits.wait_seconds,
        )

    async def _resumed_calls(
        self, work: SessionTransaction, turn: TurnRow, open_calls: Literal["interrupted", "timed_out"]
    ) -> ReasonResult | None:
        """Calls that a person has answered go on before the model is asked again, unless somebody interrupted the turn. Where all
        were rejected, a client that still runs its calls is waited for.
        """
        rows = await tool_ledger.read_open_calls(work)
        unread = await inbox.unread(work) if rows else []
        if not rows or any(item.delivery == Delivery.INTERRUPT.value for item in unread):
            return None
        answered = [row for row in rows if row.answered]
        if not answered:
            if open_calls == "timed_out" or any(item.for_running_turn for item in unread):
                return None
            waits = await tool_ledger.wait_on(work, turn, rows)
            if not waits.waiting:
                return None
            return ReasonResult(
                next=ReasonNext.WAIT, client_calls=waits.waits, wait_seconds=waits.wait_seconds, resumed=True
            )
        if open_calls == "timed_out":
            # Or what nobody has answered in time would be waited for once more.
            await tool_ledger.settle_open_calls(work, turn, open_calls, [row for row in rows if row.awaited])
            rows = answered
        return ReasonResult(
            next=ReasonNext.ACT,
            calls=[row.ref() for row in answered],
            client_calls=[row.wake_id for row in rows if row.awaited],
            serial=turn.config.parallel_tool_calls is False,
            resumed=True,
        )

    async def fail_reason(self, ref: StepRef, failure: ReasonFailure) -> FailureVerdict:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_step(work, ref)
            failures = state.step_model_failures + 1
            verdict = FailureVerdict(retry=failure.kind in RETRYABLE and failures < MODEL_ATTEMPTS)
            index = turn.model_index
            if not verdict.retry:
                following = await self._models.next_after(work.connection, state.org_id, turn.config, index)
                if following is not None:
                    verdict, index, failures = FailureVerdict(retry=True, fallback=True), following, 0
            waited_ms = failure.retry_in_ms if verdict.retry and not verdict.fallback else 0
            await work.connection.execute(_NOTE_FAILURE, work.key, waited_ms, failures)
            code, _ = USER_ERRORS[failure.kind]
            fields = msgspec.json.encode(failure.fields).decode()
            await work.connection.execute(_NOTE_ERROR, turn.id, failure.error, code, fields, index)
            if failure.kind not in RESUMABLE_FAILURES or verdict.fallback:
                await generations.forget_running(work)
            await work.append(generation_failed_event(ref, turn, failure))
        if failure.model is not None and failure.kind in BREAKER_FAILURES and is_guarded(failure.model):
            model = parse_id(Prefix.MODEL, failure.model.public_id)
            if await note_failure(self._log.pool, state.org_id, model):
                log.warning("circuit breaker opened", model=failure.model.name, model_id=failure.model.public_id)
        return verdict

    async def release_step(self, ref: StepRef) -> None:
        async with self._log.transaction(ref.session_id) as work:
            await self._running_step(work, ref)
            await work.connection.execute(_NOTE_RELEASE, work.key)

    async def append(self, ref: StepRef, events: Sequence[NewEvent], note: GenerationNote | None = None) -> None:
        if note is None:
            await self._log.append(ref.session_id, events, fence=fence(ref))
            return
        async with self._log.transaction(ref.session_id) as work:
            await work.append(*events, fence=fence(ref))
            if await work.connection.execute(generations.NOTE, *generations.note_arguments(ref, note)) == "INSERT 0 0":
                raise StepFenced

    async def _enter_step(self, work: SessionTransaction, state: StateRow, turn: TurnRow, ref: StepRef) -> None:
        """Make this attempt the only one that may write. Raises `StepFenced` or `NoProgress`."""
        exec_id = step_key(ref)
        starts, releases, failures, model_failures, waited_ms = 0, 0, 0, 0, 0
        if state.step_exec_id == exec_id:
            if state.step_attempt > ref.attempt:
                raise StepFenced
            # This attempt once more: the answer to its beginning was lost, which is no second start.
            starts = state.step_starts - (state.step_attempt == ref.attempt)
            releases = state.step_releases
            failures, waited_ms = state.step_failures, state.step_wait_ms
            model_failures = state.step_model_failures
        # An attempt that began and left no word of its end went down with its worker. One that never got here does not
        # count: a database that is away is no reason to give a turn up.
        if starts - releases - failures >= LOST_ATTEMPTS_BEFORE_SEAL:
            raise NoProgress
        await work.connection.execute(
            _ENTER_STEP,
            turn.id,
            message_id_of(turn, ref.iteration),
            exec_id,
            ref.attempt,
            starts + 1,
            releases,
            failures,
            waited_ms,
            work.key,
            model_failures,
        )

    async def _make_history_legal(
        self,
        work: SessionTransaction,
        turn: TurnRow,
        ref: StepRef,
        model: ResolvedModel | None,
        open_calls: Literal["interrupted", "timed_out"],
    ) -> Recovery:
        """Before a model call: no call without a result, and no message left half written, unless it can be gone on with."""
        await tool_ledger.settle_open_calls(work, turn, open_calls)
        message_id = message_id_of(turn, ref.iteration)
        if turn.open_message_id != message_id:
            await close_partial_message(work, turn)
            return Recovery()
        text = await read_partial_text(work.connection, work.session_id, message_id)
        recovery = await _recovery(work, ref, model, message_id, text)
        if text and recovery.resume is None:
            recovered = ReasonRecovered(
                turn_id=ref.turn_id,
                mode="restart" if recovery.answer is None else "finalize",
                accumulated_len=len(text),
                message_id=message_id,
                attempt=ref.attempt,
            )
            context = step_context(turn, ref.exec_id)
            key = f"reason.recovered:{ref.exec_id}:{ref.attempt}"
            await work.append(NewEvent(data=recovered, context=context, dedupe_key=key))
        return recovery

    # --- act ----------------------------------------------------------------------------------------------------------

    async def begin_call(self, ref: StepRef, call_id: str) -> ToolClaim | ActResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None:
                raise StepFenced
            if row.status in ("settled", "waiting"):
                return await _after_batch(work, state)
            claim = ToolClaim(
                call=row.call,
                config=turn.config,
                side_effect=row.side_effect,
                timezone=turn.timezone,
                problem=row.problem,
                resumed=row.resumption,
            )
            if row.status == "running" and (row.attempt, row.worker) == (ref.attempt, ref.worker):
                # Claimed already, by this very attempt: the answer to its commit was lost, and nothing has run yet.
                return claim
            if row.status == "running" and row.attempt >= ref.attempt:
                raise StepFenced
            if row.status == "running" and row.side_effect is SideEffect.AT_MOST_ONCE:
                unknown = ToolSettlement(status="error", error=OUTCOME_UNKNOWN)
                await tool_ledger.settle_call(work, turn, row, unknown, attempts=ref.attempt)
                return await tool_ledger.close_batch(work, turn, row.iteration)
            if row.starts >= LOST_ATTEMPTS_BEFORE_SEAL:
                raise NoProgress
            await tool_ledger.start_call(work, turn, row, attempt=ref.attempt, worker=ref.worker)
        return claim

    async def settle_call(self, ref: StepRef, call_id: str, settlement: ToolSettlement) -> ActResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None or row.attempt != ref.attempt:
                raise StepFenced
            if row.status == "settled":
                return await _after_batch(work, state)
            await tool_ledger.settle_call(work, turn, row, settlement, attempts=ref.attempt)
            await work.append(*result_notices(turn, settlement.hits, call_id, ref.exec_id))
            return await tool_ledger.close_batch(work, turn, row.iteration)

    async def release_call(self, ref: StepRef, call_id: str) -> None:
        async with self._log.transaction(ref.session_id) as work:
            await self._running_turn(work, ref)
            await tool_ledger.release_call(work, call_id, attempt=ref.attempt)

    async def suspend_call(self, ref: StepRef, call_id: str, wait: CallWait) -> ActResult:
        async with self._log.transaction(ref.session_id) as work:
            state, turn = await self._running_turn(work, ref)
            row = await tool_ledger.read_call(work, call_id)
            if row is None or row.attempt != ref.attempt:
                raise StepFenced
            if row.status == "waiting":
                return await _after_batch(work, state)
            if row.status != "running":
                raise StepFenced
            await tool_ledger.suspend_call(work, row, wait, PERSON_WAIT_SECONDS)
            return await tool_ledger.close_batch(work, turn, row.iteration)

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
            if turn is None or turn.status == "paused":
                turn = await budget_gate.take_paused_turn(work, state)
            if turn is None:
                # Cancelled before its first step: the turn is opened in the log to be closed visibly.
                opened = await open_turn(work, state, input.turn_id)
                if opened is None:
                    return FinishResult()
                turn = opened.turn
                await work.append(*opened.events)
            if turn.status == "running":
                await close_turn(work, state, turn, input)
            ended_at = work.appended[-1].sequence if work.appended else None
            return FinishResult(more=bool(await inbox.unread(work)), ended_at=ended_at)

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


async def _after_batch(work: SessionTransaction, state: StateRow) -> ActResult:
    """For a retry of a call that is over: whether the turn waits, and what for."""
    return await tool_ledger.open_waits(work) if state.status == "waiting_for_tool_results" else ActResult()


async def _recovery(
    work: SessionTransaction, ref: StepRef, model: ResolvedModel | None, message_id: str, text: str
) -> Recovery:
    running = await generations.read_running(work, step_key(ref))
    if running is None or model is None or format_id(Prefix.MODEL, running.model) != model.public_id:
        return Recovery()
    thinking = await read_partial_text(work.connection, work.session_id, message_id, ReasonThinkingDelta.event_type)
    if running.answer is not None and running.answer.text_length == len(text):
        return Recovery(answer=running.answer, text=text, thinking=thinking)
    if running.resume is not None:
        return Recovery(resume=running.resume, text=text, thinking=thinking)
    return Recovery()


def _token_ratio(outcome: ReasonOutcome) -> float | None:
    """The provider's count of the prompt over our raw estimate of it."""
    counted = outcome.answer.usage.prompt_tokens
    if not outcome.estimated_prompt_tokens or not counted:
        return None
    low, high = TOKEN_RATIO_RANGE
    return min(high, max(low, counted / outcome.estimated_prompt_tokens))
