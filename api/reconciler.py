"""Heals what a crash left between two systems: messages that are stored but whose turn was never told, and turns that the
log believes in although Temporal has ended their workflow.

Every server runs one; the work is idempotent, so two of them do no harm.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog

from db.messages import MessageStore, StaleSession
from domain.ids import Prefix, format_id
from domain.ports import TurnGateway
from workflows.contract import TurnPhase

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
    def __init__(
        self,
        messages: MessageStore,
        turns: ObservableTurns,
        release_paused: Callable[[], Awaitable[list[str]]] | None = None,
    ) -> None:
        """`release_paused` sets sessions free that no budget pauses any longer, and names them."""
        self._messages = messages
        self._turns = turns
        self._release_paused = release_paused

    async def once(self) -> int:
        """One round; returns how many sessions were nudged."""
        released = [] if self._release_paused is None else await self._release_paused()
        for session_id in released:
            await self._turns.wake(session_id)
            log.info("paused session goes on", session_id=session_id)
        nudged = len(released)
        stale = await self._messages.stale_sessions(unread_seconds=UNREAD_SECONDS, silent_seconds=SILENT_SECONDS)
        for session in stale:
            if await self._nudged(session):
                nudged += 1
                log.info(
                    "session nudged", session_id=format_id(Prefix.SESSION, session.session_id), unread=session.unread
                )
        return nudged

    async def _nudged(self, session: StaleSession) -> bool:
        session_id = format_id(Prefix.SESSION, session.session_id)
        phase = await self._turns.phase(session_id)
        if phase is None:
            await self._turns.wake(session_id)
            return True
        if phase is not TurnPhase.WAITING_FOR_TOOL_RESULTS:
            # A turn at work reads its messages itself: between two steps, or at its end.
            return False
        # Looked at once more: the log begins a wait before the workflow does, so this is about the wait that was just seen, and
        # not about what went on before it.
        standing = await self._messages.standing(session.session_id)
        if standing is None or not standing.active:
            # Waiting, in the log as well: what is unread came before the wait and is read with the results.
            return False
        if standing.unread and not standing.answered:
            await self._turns.wake(session_id, running=True, ends_wait=True)
        else:
            # The log is not waiting any more: the results are in, and the word of it was lost.
            await self._turns.tool_results(session_id, [])
        return True
