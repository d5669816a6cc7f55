"""Rewinds: a session goes on from what it was at one of its events.

The log is not cut. A rewind appends `session.rewound`, notes in `session_state.hidden_events` what is no part of the conversation
any more, so that prompts and lists of messages leave it out with one comparison, and drops checkpoints that know of it. A rewind
can go back to what another one has hidden.
"""

from __future__ import annotations

from typing import Final

from db import inbox, value_history, workspace_history
from db.database import Database
from db.event_log import EventLog, SessionTransaction
from db.session_points import PointRequest, find_point, multirange, read_rewinds
from db.sessions import BUSY, SessionInContext, get_session, session_not_found
from db.turn_rows import lock_state
from db.workspace_changes import WorkspaceChanges
from domain.errors import Conflict, SessionBusy
from domain.events import NewEvent, SessionRewound
from domain.ids import DEFAULT_ORG_ID
from domain.rewinds import hidden_ranges

_LOCK: Final = """SELECT workspace_id, values_known_since FROM sessions
    WHERE org_id = $1 AND id = $2 AND deleted_at IS NULL FOR NO KEY UPDATE"""
# Sub-agents of this session worked for it, and their files are its own.
_SHARED: Final = """SELECT EXISTS (SELECT 1 FROM sessions WHERE workspace_id = $1 AND id <> $2 AND deleted_at IS NULL
    AND parent_session_id IS DISTINCT FROM $2)"""
_HIDE: Final = """UPDATE session_state SET hidden_events = $2::text::int8multirange, preview = $3, output_preview = $4
    WHERE session_id = $1"""
_DROP_CHECKPOINTS: Final = """DELETE FROM context_checkpoints
    WHERE session_id = $1 AND (source_sequence > $2 OR source_sequence <@ $3::text::int8multirange)"""


async def rewind_session(
    database: Database, log: EventLog, session_id: str, request: PointRequest, *, files: bool
) -> SessionInContext:
    """Files and values become what they were, too, unless `files` is false; secrets stay.

    Raises `NotFound`, `InvalidInput`, `SessionBusy`, `HistoryGone`, and `Conflict` for files that other sessions share.
    """
    request.check()
    async with log.transaction(session_id) as work:
        await _rewind(work, request, files=files)
    return await get_session(database, session_id)


async def _rewind(work: SessionTransaction, request: PointRequest, *, files: bool) -> None:
    connection = work.connection
    session = await connection.fetchrow(_LOCK, DEFAULT_ORG_ID, work.key)
    if session is None:
        raise session_not_found(work.session_id)
    state = await lock_state(work)
    if state.turn_id is not None or state.status in BUSY or await inbox.unread(work):
        raise SessionBusy
    point = await find_point(connection, work.key, request, state.last_sequence)
    if files:
        workspace = session["workspace_id"]
        if await connection.fetchval(_SHARED, workspace, work.key):
            raise Conflict("Other sessions work on the same files; rewind with `files: false`", field="files")
        workspace_history.check_known(session["values_known_since"], point.moment)
        # Before the event, so that a later fork at the event finds what was restored.
        await value_history.restore(connection, work.key, point.moment)
        async with WorkspaceChanges.opened(connection, workspace, DEFAULT_ORG_ID) as changes:
            await changes.restore(point.moment)
    rewound = SessionRewound(to_sequence=point.sequence, files=files, input_message_ids=point.unread or None)
    (event,) = await work.append(NewEvent(data=rewound))
    rewinds = await read_rewinds(connection, work.key, event.sequence)
    hidden = multirange(hidden_ranges(rewinds, event.sequence))
    await connection.execute(_HIDE, work.key, hidden, point.preview, point.output_preview)
    await connection.execute(_DROP_CHECKPOINTS, work.key, point.sequence, multirange(point.hidden))
