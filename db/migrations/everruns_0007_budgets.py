"""Budgets, their ledger, and what pauses a session."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000007"
VERSION = "1.38.0"
DESCRIPTION = "budgets"

TABLES = """
-- `subject_id` is what clients see, `subject_key` the row (of the organization: the UUID in its public id).
-- `spent` is debits less credits of the running period: the balance is `limit_amount - spent`.
CREATE TABLE budgets (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    subject_type text NOT NULL CHECK (subject_type IN ('session', 'agent', 'harness', 'user', 'org')),
    subject_id text NOT NULL,
    subject_key uuid NOT NULL,
    currency text NOT NULL,
    limit_amount numeric(30, 12) NOT NULL CHECK (limit_amount > 0),
    soft_limit numeric(30, 12) CHECK (soft_limit >= 0 AND soft_limit <= limit_amount),
    spent numeric(30, 12) NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused', 'exhausted', 'disabled')),
    period jsonb,
    period_started_at timestamptz,
    warned boolean NOT NULL DEFAULT false,
    soft_limit_waived boolean NOT NULL DEFAULT false,
    metadata jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 60);
CREATE INDEX budgets_subject_idx ON budgets (org_id, subject_type, subject_key) WHERE status <> 'disabled';

-- What was spent (+) and added (-). `session_id` is forgotten with its session, nothing else ever changes.
CREATE TABLE budget_ledger (
    id uuid PRIMARY KEY,
    budget_id uuid NOT NULL REFERENCES budgets (id),
    org_id integer NOT NULL,
    amount numeric(30, 12) NOT NULL,
    meter_source text NOT NULL,
    ref_type text,
    ref_id text,
    session_id uuid REFERENCES sessions (id) ON DELETE SET NULL,
    description text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX budget_ledger_list_idx ON budget_ledger (budget_id, id DESC);
CREATE INDEX budget_ledger_session_idx ON budget_ledger (session_id) WHERE session_id IS NOT NULL;
-- The last guard against a charge that is made twice: a step or a compaction is charged to a budget once.
CREATE UNIQUE INDEX budget_ledger_ref_key ON budget_ledger (budget_id, meter_source, ref_id) WHERE ref_id IS NOT NULL;

CREATE FUNCTION budget_ledger_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.session_id IS NULL
       AND to_jsonb(NEW) - 'session_id' = to_jsonb(OLD) - 'session_id' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'the budget ledger is append-only' USING ERRCODE = 'EV003';
END $$;
CREATE TRIGGER budget_ledger_append_only BEFORE UPDATE OR DELETE ON budget_ledger
    FOR EACH ROW EXECUTE FUNCTION budget_ledger_is_append_only();

-- The budget a session with status `paused` waits for; means nothing with any other status.
ALTER TABLE session_state ADD COLUMN paused_by uuid;
CREATE INDEX session_state_paused_idx ON session_state (paused_by) WHERE status = 'paused';
-- The turn id of the run that took a paused turn up again: what makes a repeated taking up find the same answer.
ALTER TABLE turns ADD COLUMN resumed_by uuid;
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(TABLES)

    manager.add_raw(run)
    return manager
