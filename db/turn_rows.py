"""The rows a turn lives in, and the statements that read and write them. Lock order: `session_state` first, always."""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db.event_log import SessionTransaction
from domain.config import TurnConfig
from domain.events import EventContext, TokenUsage
from domain.ids import Prefix, format_id, parse_id
from domain.messages import Controls
from domain.turns import ReasonResult, SessionGone, StepRef

_LOCK_STATE: Final = """
SELECT org_id, status, last_sequence, turn_id, turn_count, step_exec_id, step_attempt, step_starts, step_releases,
       step_failures, step_model_failures, step_wait_ms, model_id, token_ratio,
       input_tokens, output_tokens, cache_read_tokens, cache_creation_tokens,
       estimated_cost_usd, actual_cost_usd, effective_cost_usd, paused_by,
       EXISTS (SELECT FROM budgets b WHERE b.org_id = session_state.org_id AND b.status <> 'disabled') AS has_budgets
FROM session_state WHERE session_id = $1 FOR NO KEY UPDATE
"""
TURN_COLUMNS: Final = """id, status, iteration, input_sequences, harness_id, agent_public_id, config, input_message_id,
    controls, timezone, open_message_id, open_exec_id, last_result, last_error, last_error_code, last_error_fields,
    model_index, input_tokens, output_tokens, cache_read_tokens, cache_creation_tokens,
    estimated_cost_usd, actual_cost_usd, effective_cost_usd, llm_call_count, tool_call_count, time_to_first_token_ms,
    started_at"""
_READ_TURN: Final = f"SELECT {TURN_COLUMNS} FROM turns WHERE id = $1"  # noqa: S608


class StateRow(Struct, frozen=True, kw_only=True):
    org_id: int
    status: str
    last_sequence: int
    turn_id: UUID | None
    turn_count: int
    step_exec_id: UUID | None
    step_attempt: int
    step_starts: int
    step_releases: int
    step_failures: int
    step_model_failures: int
    step_wait_ms: int
    model_id: UUID | None
    token_ratio: float | None
    usage: TokenUsage
    paused_by: UUID | None
    """The budget a paused session waits for; means nothing with another status."""
    has_budgets: bool
    """Whether the organization has any: without one nothing else is asked of them."""


class TurnRow(Struct, frozen=True, kw_only=True):
    id: UUID
    status: str
    iteration: int
    harness_id: UUID
    agent_public_id: str | None
    config: TurnConfig
    input_message_id: str
    input_sequences: list[int]
    timezone: str | None
    controls: Controls
    open_message_id: str | None
    open_exec_id: UUID | None
    last_result: ReasonResult | None
    last_error: str | None
    last_error_code: str | None
    last_error_fields: dict[str, object]
    model_index: int
    usage: TokenUsage
    llm_call_count: int
    tool_call_count: int
    time_to_first_token_ms: int | None
    started_at: datetime

    @property
    def public_id(self) -> str:
        return format_id(Prefix.TURN, self.id)


def _usage(row: asyncpg.Record) -> TokenUsage:
    return TokenUsage(
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        cache_read_tokens=row["cache_read_tokens"] or None,
        cache_creation_tokens=row["cache_creation_tokens"] or None,
        estimated_cost_usd=row["estimated_cost_usd"] or None,
        actual_cost_usd=row["actual_cost_usd"] or None,
        effective_cost_usd=row["effective_cost_usd"] or None,
    )


def usage_columns(usage: TokenUsage) -> tuple[int | float, ...]:
    """In the order of the columns: input, output, cache read, cache creation; estimated, actual, effective cost."""
    return (
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens or 0,
        usage.cache_creation_tokens or 0,
        usage.estimated_cost_usd or 0.0,
        usage.actual_cost_usd or 0.0,
        usage.effective_cost_usd or 0.0,
    )


async def lock_state(work: SessionTransaction) -> StateRow:
    """Lock the session. Raises `SessionGone`."""
    row = await work.connection.fetchrow(_LOCK_STATE, work.key)
    if row is None:
        raise SessionGone
    return StateRow(
        org_id=row["org_id"],
        status=row["status"],
        last_sequence=row["last_sequence"],
        turn_id=row["turn_id"],
        turn_count=row["turn_count"],
        step_exec_id=row["step_exec_id"],
        step_attempt=row["step_attempt"],
        step_starts=row["step_starts"],
        step_releases=row["step_releases"],
        step_failures=row["step_failures"],
        step_model_failures=row["step_model_failures"],
        step_wait_ms=row["step_wait_ms"],
        model_id=row["model_id"],
        token_ratio=row["token_ratio"],
        usage=_usage(row),
        paused_by=row["paused_by"],
        has_budgets=row["has_budgets"],
    )


async def read_turn(work: SessionTransaction, turn: UUID) -> TurnRow | None:
    row = await work.connection.fetchrow(_READ_TURN, turn)
    return None if row is None else turn_row(row)


def turn_row(row: asyncpg.Record) -> TurnRow:
    """A row of `TURN_COLUMNS`."""
    result, controls, fields = row["last_result"], row["controls"], row["last_error_fields"]
    return TurnRow(
        id=row["id"],
        status=row["status"],
        iteration=row["iteration"],
        harness_id=row["harness_id"],
        agent_public_id=row["agent_public_id"],
        config=msgspec.json.decode(row["config"], type=TurnConfig),
        input_message_id=row["input_message_id"],
        input_sequences=row["input_sequences"],
        controls=Controls() if controls is None else msgspec.json.decode(controls, type=Controls),
        timezone=row["timezone"],
        open_message_id=row["open_message_id"],
        open_exec_id=row["open_exec_id"],
        last_result=None if result is None else msgspec.json.decode(result, type=ReasonResult),
        last_error=row["last_error"],
        last_error_code=row["last_error_code"],
        last_error_fields={} if fields is None else msgspec.json.decode(fields),
        model_index=row["model_index"],
        usage=_usage(row),
        llm_call_count=row["llm_call_count"],
        tool_call_count=row["tool_call_count"],
        time_to_first_token_ms=row["time_to_first_token_ms"],
        started_at=row["started_at"],
    )


def turn_context(turn: TurnRow) -> EventContext:
    """Context of the turn's own events: the root span."""
    return EventContext(
        turn_id=turn.public_id,
        input_message_id=turn.input_message_id,
        trace_id=turn.public_id,
        span_id=turn.public_id,
    )


def step_context(turn: TurnRow, exec_id: str, *, parent: str | None = None) -> EventContext:
    """Context of a step's events; started and completed share the span."""
    return EventContext(
        turn_id=turn.public_id,
        input_message_id=turn.input_message_id,
        exec_id=exec_id,
        trace_id=turn.public_id,
        span_id=exec_id,
        parent_span_id=parent or turn.public_id,
    )


def step_key(ref: StepRef) -> UUID:
    return parse_id(Prefix.EXEC, ref.exec_id)


def fence(ref: StepRef) -> tuple[UUID, int]:
    return step_key(ref), ref.attempt
