"""Tool calls that wait for a person, and receipts of changes to files."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000006"
VERSION = "1.38.0"
DESCRIPTION = "tool calls that wait for a person"

TABLES = """
-- `wait_number` counts the waits of a call, so that the word that ended one cannot end the next; `asked_number` is the wait
-- clients have been told of.
ALTER TABLE tool_calls
    ADD COLUMN wait_kind text,
    ADD COLUMN wait_number integer NOT NULL DEFAULT 0,
    ADD COLUMN asked_number integer NOT NULL DEFAULT 0,
    ADD COLUMN wait_seconds double precision,
    ADD COLUMN wait_request jsonb,
    ADD COLUMN wait_state jsonb,
    ADD COLUMN wait_answer jsonb;

-- Changes of files that are made once, whoever retries them: what was kept with them.
CREATE TABLE workspace_receipts (
    workspace_id uuid NOT NULL,
    key text COLLATE "C" NOT NULL,
    text text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (workspace_id, key)
);

-- What a person decided once and for all: calls of this tool are allowed, or refused, for the rest of the session.
CREATE TABLE tool_approval_rules (
    session_id uuid NOT NULL,
    tool_name text COLLATE "C" NOT NULL,
    decision text NOT NULL CHECK (decision IN ('allow_always', 'reject_always')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (session_id, tool_name)
);
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(TABLES)

    manager.add_raw(run)
    return manager
