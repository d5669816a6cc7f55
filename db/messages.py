"""What clients put into a running session: messages, results of client-side tools, answers of the user, and the question whether
to cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from db import client_calls, elicitations, inbox, tool_approvals
from db.client_calls import SettledCalls
from db.event_log import EventLog, SessionTransaction
from db.turn_rows import StateRow, lock_state
from domain.approvals import ApprovalDecision, ApprovalRule, PendingApproval
from domain.clock import now_timestamp
from domain.errors import InvalidInput, NotFound, TooManyRunning, UnknownModel
from domain.events import InputMessage, NewEvent
from domain.ids import Prefix, new_id, parse_id
from domain.messages import ContentPart, Controls, Delivery, ExternalActor, InputPart, Message, Role, TextPart
from domain.ports import TurnLabels
from domain.questions import AnswerSubmission
from domain.tools import ClientToolResult
from domain.turns import SessionGone

MAX_ACTIVE_TURNS_PER_ORG: Final = 1_000
PREVIEW_CHARACTERS: Final = 200

_SESSION: Final = """SELECT s.title, o.public_id AS org_id, h.name AS harness, a.public_id AS agent_id,
    coalesce(a.display_name, a.name) AS agent_name
    FROM sessions s JOIN organizations o ON o.id = s.org_id JOIN harnesses h ON h.id = s.harness_id
    LEFT JOIN agents a ON a.id = s.agent_id
    WHERE s.id = $1 AND s.org_id = $2 AND s.deleted_at IS NULL"""
_EXISTING: Final = "SELECT data FROM events WHERE session_id = $1 AND dedupe_key = $2"
_MARK_ACTIVE: Final = """UPDATE session_state SET status = $2, preview = coalesce(preview, $3) WHERE session_id = $1"""
_ACTIVE: Final = """SELECT count(*) FROM session_state
    WHERE org_id = $1 AND status IN ('active', 'waiting_for_tool_results')"""
_MODEL_EXISTS: Final = "SELECT 1 FROM models WHERE org_id = $1 AND id = $2 AND enabled"
# A wait that ended by answers has left nobody to be asked: no call that waits, no question, and no client that has returned
# nothing. What is unread then was there before.
_STANDING: Final = """
SELECT s.session_id, s.status = 'active' AS active, EXISTS (
    SELECT 1 FROM inbox i WHERE i.session_id = s.session_id AND (i.delivery <> 'follow_up' OR s.turn_id IS NULL)) AS unread,
    s.turn_id IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM tool_calls c WHERE c.session_id = s.session_id AND c.turn_id = s.turn_id
        AND (c.status = 'waiting' OR c.status <> 'settled' AND c.kind = 'client' AND NOT EXISTS (
            SELECT 1 FROM tool_calls o WHERE o.session_id = c.session_id AND o.turn_id = c.turn_id
            AND o.iteration = c.iteration AND (o.kind = 'client' AND o.status = 'settled' OR o.wait_answer IS NOT NULL)))
    ) AS answered
FROM session_state s
"""
_STALE: Final = f"""{_STANDING}
WHERE (s.session_id IN (SELECT session_id FROM inbox WHERE created_at < now() - make_interval(secs => $1))
       AND s.status <> 'paused')
   OR (s.status IN ('active', 'waiting_for_tool_results') AND s.updated_at < now() - make_interval(secs => $2))
LIMIT $3
"""  # noqa: S608
_ONE: Final = f"{_STANDING} WHERE s.session_id = $1"

_input_decoder = msgspec.json.Decoder(InputMessage)


class NewMessage(Struct, frozen=True, kw_only=True):
    """A message to store. `message_id` makes storing it idempotent."""

    content: Sequence[InputPart]
    message_id: str | None = None
    delivery: Delivery = Delivery.STEER
    controls: Controls | None = None
    metadata: dict[str, object] | None = None
    external_actor: ExternalActor | None = None
    tags: list[str] | None = None


class PostedMessage(Struct, frozen=True, kw_only=True):
    """`steered` tells whether a turn was at work when the message came, `ends_wait` whether it ended a wait for the client."""

    message: Message
    steered: bool
    labels: TurnLabels
    ends_wait: bool = False


class StaleSession(Struct, frozen=True, kw_only=True):
    """`answered`: whatever the turn has waited for has come, so that it was no message that ended the wait."""

    session_id: UUID
    active: bool
    unread: bool
    answered: bool


class MessageStore:
    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def post(self, org_id: int, session_id: str, new: NewMessage) -> PostedMessage:
        """Store a message and leave it unread, in one transaction.

        Raises `NotFound`, `UnknownModel`, `TooManyRunning`.
        """
        async with self._log.transaction(session_id) as work:
            return await self.post_in(work, org_id, new)

    async def post_in(self, work: SessionTransaction, org_id: int, new: NewMessage) -> PostedMessage:
        """`post` as part of a transaction that does more. Raises what `post` raises."""
        if new.message_id is not None:
            parse_id(Prefix.MESSAGE, new.message_id)
        message = Message(
            id=new.message_id or new_id(Prefix.MESSAGE),
            role=Role.USER,
            content=_storable(new.content),
            created_at=now_timestamp(),
            controls=new.controls,
            metadata=new.metadata,
            external_actor=new.external_actor,
            tags=new.tags,
        )
        try:
            state = await lock_state(work)
        except SessionGone as error:
            raise NotFound("Session not found") from error
        session = await work.connection.fetchrow(_SESSION, work.key, org_id)
        if session is None:
            raise NotFound("Session not found")
        await self._check_controls(work.connection, org_id, new.controls)
        steered = state.status in ("active", "waiting_for_tool_results")
        if not steered and (await work.connection.fetchval(_ACTIVE, org_id) or 0) >= MAX_ACTIVE_TURNS_PER_ORG:
            raise TooManyRunning
        key = f"input.message:{message.id}"
        event = NewEvent(data=InputMessage(message=message), dedupe_key=key, tags=new.tags)
        stored = await work.append(event)
        if not stored:
            data: str = await work.connection.fetchval(_EXISTING, work.key, key)  # type: ignore[assignment]
            return PostedMessage(
                message=_input_decoder.decode(data).message, steered=steered, labels=_labels(session, state)
            )
        await inbox.put(work, org_id, stored[0].sequence, message.id, new.delivery)
        # A follow-up does not end a wait for the client; everything else makes the session work.
        waits = state.status == "waiting_for_tool_results" and new.delivery is Delivery.FOLLOW_UP
        # A paused session stays so: whether its budget still pauses it is for the run to find out.
        stays = waits or state.status == "paused"
        preview = message.text[:PREVIEW_CHARACTERS]
        await work.connection.execute(_MARK_ACTIVE, work.key, state.status if stays else "active", preview or None)
        return PostedMessage(
            message=message,
            steered=steered,
            labels=_labels(session, state),
            ends_wait=state.status == "waiting_for_tool_results" and not waits,
        )

    async def require(self, org_id: int, session_id: str) -> None:
        """Raises `NotFound` unless the session exists, `MalformedId` when its id can't."""
        key = parse_id(Prefix.SESSION, session_id)
        async with self._log.connection() as connection:
            if await connection.fetchrow(_SESSION, key, org_id) is None:
                raise NotFound("Session not found")

    async def record(
        self,
        session_id: str,
        message_id: str,
        content: Sequence[InputPart],
        delivery: Delivery,
        controls: Controls | None,
        metadata: dict[str, object] | None,
    ) -> None:
        """Store a message that came through Temporal: whoever may signal there acts for the session's own organization."""
        async with self._log.connection() as connection:
            query = "SELECT org_id FROM session_state WHERE session_id = $1"
            org_id = await connection.fetchval(query, parse_id(Prefix.SESSION, session_id))
        if org_id is None:
            raise SessionGone
        new = NewMessage(
            content=content, message_id=message_id, delivery=delivery, controls=controls, metadata=metadata
        )
        try:
            await self.post(org_id, session_id, new)
        except NotFound as error:
            raise SessionGone from error

    async def _check_controls(self, connection: asyncpg.Connection, org_id: int, controls: Controls | None) -> None:
        if controls is None or controls.model_id is None:
            return
        model = parse_id(Prefix.MODEL, controls.model_id)
        if not await connection.fetchval(_MODEL_EXISTS, org_id, model):
            raise UnknownModel(f"`{controls.model_id}` names no enabled model", field="controls.model_id")

    async def submit_tool_results(
        self, org_id: int, session_id: str, results: Sequence[ClientToolResult]
    ) -> SettledCalls:
        """Settle client-side calls. Sending the same results again is harmless.

        Raises `NotFound`, `InvalidInput`, `NotWaitingForToolResults`.
        """
        if not results:
            raise InvalidInput("`tool_results` must not be empty", field="tool_results")
        async with self._log.transaction(session_id) as work:
            return await client_calls.take_results(work, await self._lock_own(work, org_id), results)

    async def answer_questions(
        self, org_id: int, session_id: str, answers: AnswerSubmission, *, tool_call_id: str | None = None
    ) -> SettledCalls:
        """Settle a call of `ask_user`; without its id the only one that waits. Sending the same answer again is harmless.

        Raises `NotFound`, `InvalidInput`, `NotWaitingForAnswers`.
        """
        async with self._log.transaction(session_id) as work:
            return await client_calls.take_answers(work, await self._lock_own(work, org_id), answers, tool_call_id)

    async def answer_elicitation(
        self,
        org_id: int,
        session_id: str,
        tool_call_id: str | None,
        answer: dict[str, object],
        check: Callable[[Mapping[str, object]], None],
    ) -> elicitations.AnsweredCall:
        """Give a call what its tool asked a person for; without its id the only one that waits.

        Raises `NotFound`, `InvalidInput`, `NotWaitingForAnswers`.
        """
        async with self._log.transaction(session_id) as work:
            return await elicitations.take_answer(work, await self._lock_own(work, org_id), tool_call_id, answer, check)

    async def decide_approvals(
        self, org_id: int, session_id: str, decisions: Sequence[ApprovalDecision]
    ) -> tool_approvals.DecidedCalls:
        """Raises `NotFound`, `InvalidInput`, `NotWaitingForApprovals`."""
        if not decisions:
            raise InvalidInput("`decisions` must not be empty", field="decisions")
        async with self._log.transaction(session_id) as work:
            return await tool_approvals.take_decisions(work, await self._lock_own(work, org_id), decisions)

    async def approvals(self, org_id: int, session_id: str) -> tuple[list[PendingApproval], list[ApprovalRule]]:
        """What waits for a decision, and which decisions last. Raises `NotFound`."""
        async with self._log.transaction(session_id) as work:
            await self._lock_own(work, org_id)
            return await tool_approvals.pending_approvals(work), await tool_approvals.read_rules(work)

    async def drop_approval_rule(self, org_id: int, session_id: str, tool: str) -> None:
        """Raises `NotFound`."""
        async with self._log.transaction(session_id) as work:
            await self._lock_own(work, org_id)
            if not await tool_approvals.drop_rule(work, tool):
                raise NotFound("No decision about this tool lasts in this session")

    async def _lock_own(self, work: SessionTransaction, org_id: int) -> StateRow:
        try:
            state = await lock_state(work)
        except SessionGone as error:
            raise NotFound("Session not found") from error
        if await work.connection.fetchrow(_SESSION, work.key, org_id) is None:
            raise NotFound("Session not found")
        return state

    async def cancel_cursor(self, org_id: int, session_id: str) -> int | None:
        """The last sequence when there is something to cancel, None when the session rests. Raises `NotFound`."""
        async with self._log.connection() as connection:
            row = await connection.fetchrow(
                """SELECT st.status, st.last_sequence, st.status = 'paused' AND (st.turn_id IS NOT NULL
                       OR EXISTS (SELECT FROM inbox i WHERE i.session_id = st.session_id)) AS is_held
                   FROM session_state st JOIN sessions s ON s.id = st.session_id
                   WHERE st.session_id = $1 AND s.org_id = $2 AND s.deleted_at IS NULL""",
                parse_id(Prefix.SESSION, session_id),
                org_id,
            )
        if row is None:
            raise NotFound("Session not found")
        if row["is_held"] or row["status"] in ("active", "waiting_for_tool_results"):
            return row["last_sequence"]
        return None

    async def stale_sessions(
        self, *, unread_seconds: float, silent_seconds: float, limit: int = 200
    ) -> list[StaleSession]:
        """Sessions that may need a nudge: unread messages older than `unread_seconds`, or busy but silent for longer."""
        async with self._log.connection() as connection:
            rows = await connection.fetch(_STALE, unread_seconds, silent_seconds, limit)
        return [StaleSession(**dict(row)) for row in rows]

    async def standing(self, session: UUID) -> StaleSession | None:
        """How the log sees a session now."""
        async with self._log.connection() as connection:
            row = await connection.fetchrow(_ONE, session)
        return None if row is None else StaleSession(**dict(row))


def _labels(session: asyncpg.Record, state: StateRow) -> TurnLabels:
    return TurnLabels(
        org_id=session["org_id"],
        harness=session["harness"],
        turn_number=state.turn_count + 1,
        agent_id=session["agent_id"],
        agent_name=session["agent_name"],
        title=session["title"],
    )


def _storable(parts: Sequence[InputPart]) -> list[ContentPart]:
    """What the log will hold: PostgreSQL's text has no U+0000, and the answer must not show what was not stored."""
    return [
        TextPart(text=part.text.replace("\0", "\ufffd")) if isinstance(part, TextPart) and "\0" in part.text else part
        for part in parts
    ]
