"""The beginning of a turn: which messages it takes, and the configuration that is pinned for it."""

from __future__ import annotations

from typing import Final
from uuid import UUID

import msgspec
from msgspec import Struct

from db import inbox
from db.child_sessions import without_spawning
from db.event_log import SessionTransaction
from db.initial_files import put_missing_files
from db.turn_config import read_session_layers
from db.turn_ending import close_lost_turn
from db.turn_events import turn_event
from db.turn_rows import TURN_COLUMNS, StateRow, TurnRow, lock_state, turn_row
from db.virtual_capabilities import pinned
from domain.config import TurnConfig, controls_layer, fold
from domain.events import EventPayload, NewEvent, SessionActivated, SessionModelChanged, TurnStarted
from domain.ids import Prefix, format_id, parse_id
from domain.messages import Controls, ImageFilePart, ImagePart, Message, TextPart
from domain.workspace import FileProblem

_REST: Final = """UPDATE session_state SET status = 'idle' WHERE session_id = $1 AND turn_id IS NULL
    AND status IN ('active', 'waiting_for_tool_results')"""
_OPEN: Final = f"""
WITH active AS (
    UPDATE session_state SET status = 'active', turn_id = $1, turn_count = turn_count + 1, model_id = $12,
        started_at = coalesce(started_at, clock_timestamp()), finished_at = NULL
    WHERE session_id = $3
)
INSERT INTO turns (id, org_id, session_id, agent_id, agent_public_id, harness_id, config, input_message_id,
    controls, timezone, input_sequences)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING {TURN_COLUMNS}
"""  # noqa: S608


class OpenedTurn(Struct, frozen=True, kw_only=True):
    """`events` are for the caller to append, before anything else of the turn."""

    turn: TurnRow
    events: list[NewEvent]


async def open_turn(work: SessionTransaction, state: StateRow, turn_id: str) -> OpenedTurn | None:
    """Begin a turn with the messages that wait, or return None when none does.

    It takes everything meant for a running turn, or else the oldest follow-up alone.
    """
    key = parse_id(Prefix.TURN, turn_id)
    if state.turn_id is not None and state.turn_id != key:
        await close_lost_turn(work, state, state.turn_id)
        state = await lock_state(work)
    waiting = await inbox.unread(work)
    if not waiting:
        await work.connection.execute(_REST, work.key)
        return None
    first = [item for item in waiting if item.for_running_turn] or waiting[:1]
    sequences = [item.sequence for item in first]
    inputs = await inbox.messages_at(work, sequences)
    layers = await read_session_layers(work.connection, work.key)
    if layers is None:  # The session was deleted: its messages will not be answered.
        await inbox.take(work, waiting)
        return None
    message_ids = await inbox.take(work, first)
    controls = next((message.controls for message in reversed(inputs) if message.controls is not None), None)
    config = await _with_rows(work, state, fold([*layers.layers, controls_layer(controls)]))
    config = await without_spawning(work.connection, work.key, config)
    model_key, model_changed = await _wanted_model(work, state, controls)
    row = await work.connection.fetchrow(
        _OPEN,
        key,
        state.org_id,
        work.key,
        layers.agent_row_id,
        layers.agent_id,
        layers.harness_id,
        msgspec.json.encode(config).decode(),
        message_ids[0],
        None if controls is None else msgspec.json.encode(controls).decode(),
        _timezone(inputs),
        sequences,
        model_key,
    )
    assert row is not None, "INSERT … RETURNING returns the row"
    turn = turn_row(row)
    payloads: list[EventPayload | None] = [
        SessionActivated(turn_id=turn_id, input_message_id=message_ids[0]),
        TurnStarted(
            turn_id=turn_id,
            input_message_id=message_ids[0],
            input_message_ids=message_ids,
            input_content=[
                part for part in inputs[0].content if isinstance(part, TextPart | ImagePart | ImageFilePart)
            ],
            agent_id=layers.agent_id,
            agent_name=layers.agent_name,
            agent_description=layers.agent_description,
        ),
        model_changed,
    ]
    return OpenedTurn(turn=turn, events=[turn_event(turn, payload) for payload in payloads if payload is not None])


async def _with_rows(work: SessionTransaction, state: StateRow, config: TurnConfig) -> TurnConfig:
    """With the rows the configuration names, and their files in the workspace."""
    found = await pinned(work.connection, state.org_id, config, with_files=True)
    problems: dict[str, str] = {}
    for ref, files in found.mounts.items():
        try:
            await put_missing_files(work.connection, work.key, state.org_id, files)
        except FileProblem as problem:
            problems[ref] = f"its files cannot be written: {problem}"
    if not problems:
        return found.config
    declared = [
        msgspec.structs.replace(one, problem=problems.get(one.ref, one.problem)) for one in found.config.declared
    ]
    return msgspec.structs.replace(found.config, declared=declared)


async def _wanted_model(
    work: SessionTransaction, state: StateRow, controls: Controls | None
) -> tuple[UUID | None, SessionModelChanged | None]:
    """The model asked for explicitly, now or before; with an event when it replaces another explicit choice."""
    if controls is None or controls.model_id is None:
        return state.model_id, None
    wanted = parse_id(Prefix.MODEL, controls.model_id)
    if state.model_id is None or state.model_id == wanted:
        return wanted, None
    query = "SELECT id, model_id FROM models WHERE id = ANY($1::uuid[])"
    names = {row["id"]: row["model_id"] for row in await work.connection.fetch(query, [wanted, state.model_id])}
    return wanted, SessionModelChanged(
        model_id=controls.model_id,
        model_name=names.get(wanted, controls.model_id),
        previous_model_id=format_id(Prefix.MODEL, state.model_id),
        previous_model_name=names.get(state.model_id),
    )


def _timezone(inputs: list[Message]) -> str | None:
    """The newest message's `metadata.timezone`, an IANA name."""
    for message in reversed(inputs):
        value = (message.metadata or {}).get("timezone")
        if isinstance(value, str):
            return value
    return None
