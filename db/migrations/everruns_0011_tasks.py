"""Session tasks: sub-agents, which are child sessions, and what is said between them and their parents."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000011"
VERSION = "1.38.0"
DESCRIPTION = "session tasks"

TABLES = """
-- `session_id` is the parent. `call_id` is the call that waits for the task while `mode` is foreground. `quiet`: nobody wants to
-- hear of its end any more. With `cancel_requested_at`, `error` is what the task is to end with.
CREATE TABLE session_tasks (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    session_id uuid NOT NULL,
    root_session_id uuid NOT NULL,
    child_session_id uuid NOT NULL UNIQUE,
    kind text NOT NULL,
    display_name text NOT NULL,
    mode text NOT NULL CHECK (mode IN ('foreground', 'background')),
    call_id text,
    state text NOT NULL CHECK (state IN ('queued', 'running', 'awaiting_input', 'succeeded', 'failed', 'canceled')),
    state_detail text,
    summary text,
    spec jsonb NOT NULL DEFAULT '{}',
    input_request jsonb,
    error jsonb,
    wake_policy text NOT NULL,
    quiet boolean NOT NULL DEFAULT false,
    attempt integer NOT NULL DEFAULT 1,
    deadline_at timestamptz NOT NULL,
    cancel_requested_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX session_tasks_session_idx ON session_tasks (session_id, created_at);
CREATE INDEX session_tasks_org_idx ON session_tasks (org_id, created_at);
CREATE INDEX session_tasks_open_idx ON session_tasks (updated_at) WHERE state IN ('queued', 'running', 'awaiting_input');

CREATE TABLE session_task_messages (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    task_id uuid NOT NULL,
    direction text NOT NULL CHECK (direction IN ('inbound', 'outbound')),
    content jsonb NOT NULL,
    in_reply_to text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX session_task_messages_task_idx ON session_task_messages (task_id, created_at, id);

CREATE INDEX sessions_parent_idx ON sessions (parent_session_id) WHERE parent_session_id IS NOT NULL;
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(TABLES)

    manager.add_raw(run)
    return manager
