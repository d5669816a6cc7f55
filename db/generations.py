"""What a model call leaves behind besides events: how far a running one has come, and what its provider wants back later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import msgspec
from msgspec import Struct

from db.event_log import SessionTransaction
from domain.ids import Prefix, parse_id
from domain.messages import Message, Role
from domain.model import ProviderState, ResumePoint
from domain.turns import ArrivedAnswer, GenerationNote, StepRef

STATES_PER_PROMPT: Final = 100
"""Newest agent messages whose provider states go into a prompt; providers make no use of older ones."""

# Runs after the append it stands beside, so that locks are taken in one order: the session's row first.
NOTE: Final = """
INSERT INTO running_generations AS g (session_id, exec_id, model_id, response_id, cursor, outcome)
SELECT $1, $2, $4, $5, $6, $7 FROM session_state WHERE session_id = $1 AND step_exec_id = $2 AND step_attempt = $3
ON CONFLICT (session_id) DO UPDATE SET exec_id = excluded.exec_id, model_id = excluded.model_id,
    response_id = excluded.response_id, cursor = excluded.cursor, outcome = excluded.outcome
"""
_READ: Final = """SELECT model_id, response_id, cursor, outcome FROM running_generations
    WHERE session_id = $1 AND exec_id = $2"""
_FORGET: Final = "DELETE FROM running_generations WHERE session_id = $1"
_KEEP_STATE: Final = """INSERT INTO message_states (session_id, message_id, state) VALUES ($1, $2, $3)
    ON CONFLICT (session_id, message_id) DO UPDATE SET state = excluded.state"""
_STATES: Final = "SELECT message_id, state FROM message_states WHERE session_id = $1 AND message_id = ANY($2::text[])"

_answer_decoder = msgspec.json.Decoder(ArrivedAnswer)
_state_decoder = msgspec.json.Decoder(ProviderState)


class RunningGeneration(Struct, frozen=True, kw_only=True):
    model: UUID
    resume: ResumePoint | None
    answer: ArrivedAnswer | None


def note_arguments(ref: StepRef, note: GenerationNote) -> tuple[object, ...]:
    """The arguments of `NOTE`."""
    return (
        parse_id(Prefix.SESSION, ref.session_id),
        parse_id(Prefix.EXEC, ref.exec_id),
        ref.attempt,
        parse_id(Prefix.MODEL, note.model_id),
        note.response_id,
        note.cursor,
        None if note.answer is None else msgspec.json.encode(note.answer).decode(),
    )


async def read_running(work: SessionTransaction, step: UUID) -> RunningGeneration | None:
    """The call an earlier attempt of this step made."""
    row = await work.connection.fetchrow(_READ, work.key, step)
    if row is None:
        return None
    response_id, outcome = row["response_id"], row["outcome"]
    return RunningGeneration(
        model=row["model_id"],
        resume=None if response_id is None else ResumePoint(response_id=response_id, cursor=row["cursor"]),
        answer=None if outcome is None else _answer_decoder.decode(outcome),
    )


async def forget_running(work: SessionTransaction) -> None:
    await work.connection.execute(_FORGET, work.key)


async def keep_state(work: SessionTransaction, message_id: str, state: ProviderState) -> None:
    await work.connection.execute(_KEEP_STATE, work.key, message_id, msgspec.json.encode(state).decode())


async def read_states(work: SessionTransaction, history: Sequence[Message]) -> dict[str, ProviderState]:
    """By message id, for the newest agent messages of a prompt."""
    ids = [message.id for message in history if message.role is Role.AGENT][-STATES_PER_PROMPT:]
    if not ids:
        return {}
    rows = await work.connection.fetch(_STATES, work.key, ids)
    return {row["message_id"]: _state_decoder.decode(row["state"]) for row in rows}
