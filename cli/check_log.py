"""`everruns check-log`: the invariants of `domain.log_check` over stored logs, one line per violation."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.run import StartFailure, check_database
from db import sessions
from db.budgets import is_paused
from db.database import Database
from db.event_log import EventLog
from domain.errors import EverrunsError, NotFound
from domain.events import StoredEvent
from domain.log_check import check_log
from domain.resources import SessionStatus
from infra.event_bus import EventBus
from infra.settings import Settings

PAGE_EVENTS: Final = 5_000
PAGE_SESSIONS: Final = 100
POOL_SIZE: Final = 2
AT_REST: Final = (SessionStatus.IDLE, SessionStatus.STARTED)


async def run_check_log(settings: Settings, session_ids: Sequence[str]) -> bool:
    """Check the logs of these sessions, or of all that are not deleted; returns whether every rule holds."""
    if settings.database_url is None:
        raise StartFailure("check-log needs DATABASE_URL: the database whose logs it is to check")
    await check_database(settings)
    broken = checked = counted = 0
    async with Database.opened(settings.database_url, pool_size=POOL_SIZE) as database:
        log = EventLog(database.pool, EventBus())
        try:
            total = len(session_ids) or (await _page(database, 0, 1))[1]
            with _progress() as progress:
                task = progress.add_task("Checking", total=total)
                async for session_id in _each(database, session_ids):
                    try:
                        events, finished = await _read(database, log, session_id)
                    except NotFound:
                        if session_ids:
                            raise
                        continue  # deleted since it was listed
                    for violation in check_log(events, finished=finished):
                        broken += 1
                        progress.console.print(
                            f"{violation.session_id} {violation.sequence} {violation.rule}: {violation.message}",
                            markup=False,
                            highlight=False,
                            soft_wrap=True,
                        )
                    checked += 1
                    counted += len(events)
                    progress.advance(task)
        except EverrunsError as error:
            raise StartFailure(error.message) from error
    verdict = "every rule holds" if not broken else f"{broken:,} violation{'s' if broken > 1 else ''}"
    print(f"Checked {checked:,} session{'s' if checked != 1 else ''} with {counted:,} events: {verdict}.")
    return not broken


def _progress() -> Progress:
    """A bar on a terminal; lines only, where the output goes to a file or a program."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sessions"),
        TimeRemainingColumn(),
        console=Console(),
        transient=True,
        disable=not sys.stdout.isatty(),
    )


async def _each(database: Database, session_ids: Sequence[str]) -> AsyncIterator[str]:
    """Every session once, newest first; those that begin meanwhile move the pages, hence the set."""
    if session_ids:
        for session_id in dict.fromkeys(session_ids):
            yield session_id
        return
    known: set[str] = set()
    offset = 0
    while True:
        found, _ = await _page(database, offset, PAGE_SESSIONS)
        for one in found:
            if one.session.id not in known:
                known.add(one.session.id)
                yield one.session.id
        if len(found) < PAGE_SESSIONS:
            return
        offset += PAGE_SESSIONS


async def _page(database: Database, offset: int, limit: int) -> tuple[list[sessions.SessionInContext], int]:
    return await sessions.list_sessions(database, agent_id=None, search=None, offset=offset, limit=limit)


async def _read(database: Database, log: EventLog, session_id: str) -> tuple[list[StoredEvent], bool]:
    """The log, and whether the session rested when it was read: judged from a status no event came after."""
    events: list[StoredEvent] = []
    while True:
        after = events[-1].sequence if events else 0
        page = await log.read(session_id, after_sequence=after, limit=PAGE_EVENTS)
        events.extend(page)
        if len(page) < PAGE_EVENTS:
            break
    status = (await sessions.get_session(database, session_id)).session.status
    # Shown as idle, but messages may be unread and a turn open.
    paused = await is_paused(database, session_id)
    unchanged = await log.last_sequence(session_id) == (events[-1].sequence if events else 0)
    return events, unchanged and status in AT_REST and not paused
