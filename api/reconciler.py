"""Heals what a crash left between two systems: messages that are stored but whose turn was never told, and turns that the
log believes in although Temporal has ended their workflow.

Every server runs one; the work is idempotent, so two of them do no harm.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import structlog

from db.messages import MessageStore
from domain.errors import EverrunsError
from domain.ids import Prefix, format_id
from domain.ports import TurnGateway
from workflows.contract import TurnPhase

INTERVAL_SECONDS: Final = 2.0
UNREAD_SECONDS: Final = 3.0
"""A message is read within milliseconds of its turn's start, or when the running step ends."""

SILENT_SECONDS: Final = 60.0
"""A busy session writes events all the time, except while it waits: then its workflow is asked before anything is done."""

log = structlog.get_logger(__name__)


class ObservableTurns(TurnGateway, Protocol):
    async def phase(self, session_id: str) -> TurnPhase | None:
        """Where the session's running turn stands; None when none runs."""
        ...


class Reconciler:
    def __init__(self, messages: MessageStore, turns: ObservableTurns) -> None:
        self._messages = messages
        self._turns = turns

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.once()
            except EverrunsError as error:
                log.warning("reconciling is put off", error=error.message)
            except Exception:
                log.exception("reconciling failed; it is tried again")

    async def once(self) -> int:
        """One round; returns how many sessions were nudged."""
        stale = await self._messages.stale_sessions(unread_seconds=UNREAD_SECONDS, silent_seconds=SILENT_SECONDS)
        nudged = 0
        for session in stale:
            session_id = format_id(Prefix.SESSION, session.session_id)
            phase = await self._turns.phase(session_id)
            if phase is None:
                await self._turns.wake(session_id)
            elif phase is not TurnPhase.WAITING_FOR_TOOL_RESULTS:
                # A turn at work reads its messages itself: between two steps, or at its end.
                continue
            elif not session.active:
                # Waiting, in the log as well: what is unread came before the wait and is read with the results.
                continue
            elif session.unread:
                await self._turns.wake(session_id, running=True, ends_wait=True)
            else:
                # The log is not waiting any more: the results are in, and the word of it was lost.
                await self._turns.tool_results(session_id, [])
            nudged += 1
            log.info("session nudged", session_id=session_id, unread=session.unread)
        return nudged
