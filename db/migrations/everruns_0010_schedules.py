"""Schedules: messages that come back to a session later."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000010"
VERSION = "1.38.0"
DESCRIPTION = "session schedules"

TABLES = """
CREATE TABLE session_schedules (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    session_id uuid NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'active', 'completed', 'cancelled', 'failed')),
    message text NOT NULL,
    timezone text NOT NULL,
    scheduled_at timestamptz,
    cron_expression text,
    trigger_count bigint NOT NULL DEFAULT 0,
    -- When it is due next; with a live schedule, a time that is long past is a reason to look into the clock.
    next_trigger_at timestamptz,
    last_triggered_at timestamptz,
    -- What it delivered last; while that is unread, nothing more is delivered.
    last_message_id text,
    end_reason text,
    ended_at timestamptz,
    -- Whether Temporal may know it. Set before Temporal is told, cleared after it has forgotten.
    in_clock boolean NOT NULL DEFAULT true,
    -- When the reconciler last looked at it.
    checked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((scheduled_at IS NULL) <> (cron_expression IS NULL)),
    CHECK ((status IN ('pending', 'active')) = (ended_at IS NULL))
);
CREATE INDEX session_schedules_session_idx ON session_schedules (session_id, created_at);
CREATE INDEX session_schedules_live_idx ON session_schedules (org_id) WHERE ended_at IS NULL;
CREATE INDEX session_schedules_due_idx ON session_schedules (next_trigger_at) WHERE ended_at IS NULL;
CREATE INDEX session_schedules_forget_idx ON session_schedules (checked_at) WHERE in_clock AND ended_at IS NOT NULL;
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(TABLES)

    manager.add_raw(run)
    return manager
