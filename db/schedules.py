"""Schedules as rows: created, cancelled and delivered under their session's lock, so that each is before or after the others.

The clock is not told here: see `db.scheduling`. Lock order: `session_state`, then the schedule.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
from msgspec import Struct

from db.event_log import EventLog, SessionTransaction
from db.messages import MessageStore, NewMessage
from db.turn_rows import lock_state
from domain.clock import timestamp
from domain.cron import parse_cron
from domain.errors import NotFound, ResourceLimit
from domain.events import NewEvent, ScheduleTriggered
from domain.ids import Prefix, derived_id, format_id, new_id, parse_id
from domain.limits import check_id
from domain.messages import Delivery as MessageDelivery
from domain.messages import TextPart
from domain.resources import Lifecycle
from domain.schedules import (
    MAX_SCHEDULES_PER_ORG,
    MAX_SCHEDULES_PER_SESSION,
    Delivery,
    EndReason,
    NewSchedule,
    Schedule,
    ScheduleStatus,
    Timing,
    Undelivered,
)
from domain.turns import SessionGone

PENDING_SECONDS: Final = 3.0
"""Whoever creates or ends a schedule tells the clock within this time, or did not live to do it."""

OVERDUE_SECONDS: Final = 30.0
RECHECK_SECONDS: Final = 60.0

_SESSION: Final = """
SELECT s.org_id, s.deleted_at IS NOT NULL AS deleted, a.status AS agent_status, h.status AS harness_status
FROM sessions s JOIN harnesses h ON h.id = s.harness_id LEFT JOIN agents a ON a.id = s.agent_id WHERE s.id = $1
"""
_COUNTS: Final = """
SELECT count(*) FILTER (WHERE session_id = $2) AS of_session, count(*) AS of_org
FROM session_schedules WHERE org_id = $1 AND ended_at IS NULL
"""
_INSERT: Final = """
INSERT INTO session_schedules (id, org_id, session_id, message, timezone, scheduled_at, cron_expression, next_trigger_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING *
"""
_LOCK: Final = "SELECT * FROM session_schedules WHERE id = $1 FOR NO KEY UPDATE"
_END: Final = """
UPDATE session_schedules SET status = $2, end_reason = $3, next_trigger_at = NULL, ended_at = clock_timestamp(),
    updated_at = clock_timestamp(), checked_at = clock_timestamp()
WHERE id = $1 AND ended_at IS NULL RETURNING *
"""
END_OF_SESSION: Final = """
UPDATE session_schedules SET status = 'cancelled', end_reason = 'session_deleted', next_trigger_at = NULL,
    ended_at = clock_timestamp(), updated_at = clock_timestamp()
WHERE session_id = $1 AND ended_at IS NULL
"""
"""Part of deleting a session. The reconciler takes them off the clock."""

_ARMED: Final = """
UPDATE session_schedules SET status = 'active', updated_at = clock_timestamp()
WHERE id = $1 AND status = 'pending'
"""
_TRIGGERED: Final = """
UPDATE session_schedules SET status = 'active', trigger_count = trigger_count + 1, last_triggered_at = clock_timestamp(),
    next_trigger_at = $2, last_message_id = $3, updated_at = clock_timestamp()
WHERE id = $1
"""
_UNREAD: Final = "SELECT 1 FROM inbox WHERE session_id = $1 AND message_id = $2"
_POSTPONE: Final = """
UPDATE session_schedules SET next_trigger_at = $2, updated_at = clock_timestamp()
WHERE id = $1 AND ended_at IS NULL AND next_trigger_at < $2
"""
_DELIVERED: Final = "SELECT 1 FROM events WHERE session_id = $1 AND dedupe_key = $2"
_CLAIM_UNSETTLED: Final = """
UPDATE session_schedules SET checked_at = clock_timestamp() WHERE id IN (
    SELECT id FROM session_schedules
    WHERE (status = 'pending' AND ended_at IS NULL AND checked_at < now() - make_interval(secs => $1))
       OR (in_clock AND ended_at IS NOT NULL AND checked_at < now() - make_interval(secs => $1))
       OR (status = 'active' AND ended_at IS NULL AND next_trigger_at < now() - make_interval(secs => $2)
           AND checked_at < now() - make_interval(secs => $3))
    ORDER BY checked_at LIMIT $4 FOR UPDATE SKIP LOCKED)
RETURNING *
"""


class UnsettledSchedule(Struct, frozen=True, kw_only=True):
    """A schedule about which clock and log may disagree. `timing` is None when it has ended."""

    id: str
    timing: Timing | None
    pending: bool = False


class ScheduleStore:
    def __init__(self, log: EventLog, messages: MessageStore) -> None:
        self._log = log
        self._messages = messages

    async def create(
        self, org_id: int, session_id: str, new: NewSchedule, *, schedule_id: str | None = None
    ) -> Schedule:
        """Store it as pending. With an id that exists in this session, the schedule it names.

        Raises `NotFound` or `ResourceLimit`.
        """
        schedule_id = schedule_id or new_id(Prefix.SCHEDULE)
        key = parse_id(Prefix.SCHEDULE, schedule_id)
        async with self._log.transaction(session_id) as work:
            await _lock_session(work, org_id)
            found = await _locked(work, key)
            if found is None:
                await _check_limits(work, org_id)
                found = await work.connection.fetchrow(
                    _INSERT,
                    key,
                    org_id,
                    work.key,
                    new.message,
                    new.timezone,
                    new.scheduled_at,
                    new.cron_expression,
                    new.first_at,
                )
            assert found is not None
            return _schedule_of(found)

    async def cancel(self, org_id: int, session_id: str, schedule_id: str) -> Schedule:
        """One that has ended already stays as it ended. Raises `NotFound`."""
        key = _given_id(schedule_id)
        async with self._log.transaction(session_id) as work:
            await _lock_session(work, org_id)
            row = await _locked(work, key)
            if row is None:
                raise schedule_not_found(schedule_id)
            return _schedule_of(await work.connection.fetchrow(_END, key, "cancelled", "cancelled") or row)

    async def get(self, org_id: int, session_id: str, schedule_id: str) -> Schedule:
        """Raises `NotFound`."""
        row = await self._log.pool.fetchrow(
            "SELECT * FROM session_schedules WHERE id = $1 AND session_id = $2 AND org_id = $3",
            _given_id(schedule_id),
            parse_id(Prefix.SESSION, session_id),
            org_id,
        )
        if row is None:
            raise schedule_not_found(schedule_id)
        return _schedule_of(row)

    async def page(
        self, org_id: int, session_id: str, statuses: tuple[ScheduleStatus, ...], *, offset: int, limit: int
    ) -> tuple[list[Schedule], int]:
        """A page, newest first, and how many there are."""
        where = "org_id = $1 AND session_id = $2 AND status = ANY($3::text[])"
        arguments = (org_id, parse_id(Prefix.SESSION, session_id), list(statuses))
        total = await self._log.pool.fetchval(f"SELECT count(*) FROM session_schedules WHERE {where}", *arguments)  # noqa: S608
        rows = await self._log.pool.fetch(
            f"SELECT * FROM session_schedules WHERE {where} ORDER BY created_at DESC, id DESC OFFSET $4 LIMIT $5",  # noqa: S608
            *arguments,
            offset,
            limit,
        )
        return [_schedule_of(row) for row in rows], total

    async def org_of(self, session_id: str) -> int:
        """Raises `SessionGone`."""
        found = await self._log.pool.fetchval(
            "SELECT org_id FROM sessions WHERE id = $1 AND deleted_at IS NULL", parse_id(Prefix.SESSION, session_id)
        )
        if found is None:
            raise SessionGone
        return found

    async def deliver(self, schedule_id: str, due_at: datetime) -> Delivery | Undelivered:
        """The message, `schedule.triggered` and what it means for the schedule, in one transaction.

        The message's id comes from the schedule and the time, so a firing that is repeated finds its message there; it is
        returned again, because whoever repeats does not know whether the turn was told. Raises `TooManyRunning`.
        """
        key = parse_id(Prefix.SCHEDULE, schedule_id)
        session = await self._log.pool.fetchval("SELECT session_id FROM session_schedules WHERE id = $1", key)
        if session is None:
            return Undelivered.OVER
        try:
            async with self._log.transaction(format_id(Prefix.SESSION, session)) as work:
                await lock_state(work)
                row = await work.connection.fetchrow(_LOCK, key)
                return Undelivered.OVER if row is None else await self._deliver(work, row, due_at)
        except (SessionGone, NotFound):
            return Undelivered.OVER

    async def _deliver(self, work: SessionTransaction, row: asyncpg.Record, due_at: datetime) -> Delivery | Undelivered:
        due_at = row["scheduled_at"] or due_at
        message_id = derived_id(Prefix.MESSAGE, row["id"], str(int(due_at.timestamp())))
        delivered = await work.connection.fetchval(_DELIVERED, work.key, f"input.message:{message_id}") is not None
        if not delivered:
            if row["ended_at"] is not None:
                return Undelivered.OVER
            reason = await _why_over(work)
            if reason is not None:
                await work.connection.execute(_END, row["id"], "cancelled", reason)
                return Undelivered.OVER
            if await work.connection.fetchval(_UNREAD, work.key, row["last_message_id"]):
                await _go_on(work, row, due_at)
                return Undelivered.UNREAD
        schedule_id = format_id(Prefix.SCHEDULE, row["id"])
        posted = await self._messages.post_in(
            work,
            row["org_id"],
            NewMessage(
                content=[TextPart(text=row["message"])],
                message_id=message_id,
                # A turn of its own: nobody is there to see a running one steered, or an open question passed over.
                delivery=MessageDelivery.FOLLOW_UP,
                metadata={"schedule_id": schedule_id, "scheduled_at": timestamp(due_at)},
            ),
        )
        over = row["ended_at"] is not None
        if not delivered:
            event = ScheduleTriggered(schedule_id=schedule_id, message_id=message_id, scheduled_at=timestamp(due_at))
            await work.append(NewEvent(data=event, dedupe_key=f"schedule.triggered:{message_id}"))
            over = await _note_firing(work, row, due_at, message_id)
        return Delivery(
            session_id=work.session_id,
            message_id=message_id,
            steered=posted.steered,
            ends_wait=posted.ends_wait,
            labels=posted.labels,
            over=over,
        )

    async def armed(self, schedule_id: str) -> bool:
        """Note that the clock knows it; false when the schedule has ended meanwhile."""
        key = parse_id(Prefix.SCHEDULE, schedule_id)
        await self._log.pool.execute(_ARMED, key)
        query = "SELECT 1 FROM session_schedules WHERE id = $1 AND ended_at IS NULL"
        return await self._log.pool.fetchval(query, key) is not None

    async def forgotten(self, schedule_id: str) -> None:
        """Note that the clock does not know it any more."""
        query = "UPDATE session_schedules SET in_clock = false WHERE id = $1 AND ended_at IS NOT NULL"
        await self._log.pool.execute(query, parse_id(Prefix.SCHEDULE, schedule_id))

    async def end(self, schedule_id: str, status: ScheduleStatus, reason: EndReason) -> None:
        await self._log.pool.execute(_END, parse_id(Prefix.SCHEDULE, schedule_id), status, reason)

    async def postpone(self, schedule_id: str, next_at: datetime) -> None:
        """The times before `next_at` are not made up for any more."""
        await self._log.pool.execute(_POSTPONE, parse_id(Prefix.SCHEDULE, schedule_id), next_at)

    async def claim_unsettled(
        self,
        *,
        pending_seconds: float = PENDING_SECONDS,
        overdue_seconds: float = OVERDUE_SECONDS,
        recheck_seconds: float = RECHECK_SECONDS,
        limit: int = 100,
    ) -> list[UnsettledSchedule]:
        """Schedules to look into; nobody else gets them for the next seconds."""
        rows = await self._log.pool.fetch(_CLAIM_UNSETTLED, pending_seconds, overdue_seconds, recheck_seconds, limit)
        return [_unsettled(row) for row in rows]

    async def live(self) -> list[UnsettledSchedule]:
        """All that will fire, of every organization."""
        return [
            _unsettled(row)
            for row in await self._log.pool.fetch("SELECT * FROM session_schedules WHERE ended_at IS NULL")
        ]


def _given_id(schedule_id: str) -> UUID:
    check_id(Prefix.SCHEDULE, schedule_id, "schedule_id")
    return parse_id(Prefix.SCHEDULE, schedule_id)


async def _lock_session(work: SessionTransaction, org_id: int) -> None:
    """Raises `NotFound`."""
    try:
        await lock_state(work)
    except SessionGone as error:
        raise NotFound("Session not found") from error
    row = await work.connection.fetchrow(_SESSION, work.key)
    if row is None or row["deleted"] or row["org_id"] != org_id:
        raise NotFound("Session not found")


async def _locked(work: SessionTransaction, key: UUID) -> asyncpg.Record | None:
    """A schedule of this session; another session's is as good as none."""
    row = await work.connection.fetchrow(_LOCK, key)
    return row if row is not None and row["session_id"] == work.key else None


async def _check_limits(work: SessionTransaction, org_id: int) -> None:
    row = await work.connection.fetchrow(_COUNTS, org_id, work.key)
    assert row is not None
    if row["of_session"] >= MAX_SCHEDULES_PER_SESSION:
        raise ResourceLimit(f"A session may have {MAX_SCHEDULES_PER_SESSION} active schedules; cancel one first")
    if row["of_org"] >= MAX_SCHEDULES_PER_ORG:
        raise ResourceLimit(f"An organization may have {MAX_SCHEDULES_PER_ORG} active schedules; cancel some first")


async def _why_over(work: SessionTransaction) -> EndReason | None:
    """Why nobody is to be woken any more."""
    row = await work.connection.fetchrow(_SESSION, work.key)
    if row is None or row["deleted"]:
        return "session_deleted"
    if row["agent_status"] not in (None, Lifecycle.ACTIVE):
        return "agent_archived"
    if row["harness_status"] != Lifecycle.ACTIVE:
        return "harness_archived"
    return None


async def _note_firing(work: SessionTransaction, row: asyncpg.Record, due_at: datetime, message_id: str) -> bool:
    """Whether that was the last time."""
    next_at = _next_time(row, due_at)
    await work.connection.execute(_TRIGGERED, row["id"], next_at, message_id)
    if next_at is None:
        reason: EndReason = "fired" if row["cron_expression"] is None else "no_more_times"
        await work.connection.execute(_END, row["id"], "completed", reason)
    return next_at is None


async def _go_on(work: SessionTransaction, row: asyncpg.Record, due_at: datetime) -> None:
    next_at = _next_time(row, due_at)
    if next_at is not None:
        await work.connection.execute(_POSTPONE, row["id"], next_at)


def _next_time(row: asyncpg.Record, due_at: datetime) -> datetime | None:
    if row["cron_expression"] is None:
        return None
    return parse_cron(row["cron_expression"]).next_after(max(due_at, datetime.now(UTC)), row["timezone"])


def _unsettled(row: asyncpg.Record) -> UnsettledSchedule:
    return UnsettledSchedule(
        id=format_id(Prefix.SCHEDULE, row["id"]),
        timing=None if row["ended_at"] is not None else timing_of(_schedule_of(row)),
        pending=row["status"] == "pending",
    )


def timing_of(schedule: Schedule) -> Timing:
    """Of a schedule that has not ended."""
    assert schedule.next_trigger_at is not None, "every live schedule has one"
    expression, once = schedule.cron_expression, schedule.scheduled_at
    return Timing(
        schedule_id=schedule.id,
        timezone=schedule.timezone,
        next_at=datetime.fromisoformat(schedule.next_trigger_at),
        scheduled_at=None if once is None else datetime.fromisoformat(once),
        cron=None if expression is None else parse_cron(expression),
    )


def _schedule_of(row: asyncpg.Record) -> Schedule:
    def moment(column: str) -> str | None:
        return None if row[column] is None else timestamp(row[column])

    return Schedule(
        id=format_id(Prefix.SCHEDULE, row["id"]),
        session_id=format_id(Prefix.SESSION, row["session_id"]),
        status=row["status"],
        message=row["message"],
        timezone=row["timezone"],
        trigger_count=row["trigger_count"],
        created_at=timestamp(row["created_at"]),
        updated_at=timestamp(row["updated_at"]),
        scheduled_at=moment("scheduled_at"),
        cron_expression=row["cron_expression"],
        next_trigger_at=moment("next_trigger_at"),
        last_triggered_at=moment("last_triggered_at"),
        ended_at=moment("ended_at"),
        end_reason=row["end_reason"],
    )


def schedule_not_found(schedule_id: str) -> NotFound:
    return NotFound(f"There is no schedule `{schedule_id[:80]}` in this session", field="schedule_id")
