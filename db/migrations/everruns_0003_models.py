"""Real providers: credentials, fallback models, what a model call leaves behind for the next one, circuit breakers, costs."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000003"
VERSION = "1.38.0"
DESCRIPTION = "providers, model calls, checkpoints, circuit breakers, costs"

RESOURCES = """
-- `credentials` is an envelope of `infra.encryption`: JSON text, bound to this row and column.
ALTER TABLE providers ADD COLUMN credentials text, ADD COLUMN trace jsonb, ADD COLUMN last_synced_at timestamptz;
-- A discovered model that its provider's list no longer names.
ALTER TABLE models ADD COLUMN stale boolean NOT NULL DEFAULT false;
ALTER TABLE harnesses ADD COLUMN fallback_model_ids jsonb NOT NULL DEFAULT '[]';
ALTER TABLE agents ADD COLUMN fallback_model_ids jsonb NOT NULL DEFAULT '[]';
"""

TURNS = """
ALTER TABLE turns
    -- Which of the turn's models is in use: 0 is the chosen one, 1 the first fallback.
    ADD COLUMN model_index integer NOT NULL DEFAULT 0,
    ADD COLUMN controls jsonb,
    ADD COLUMN last_error_fields jsonb,
    ADD COLUMN estimated_cost_usd double precision NOT NULL DEFAULT 0,
    ADD COLUMN actual_cost_usd double precision NOT NULL DEFAULT 0,
    ADD COLUMN effective_cost_usd double precision NOT NULL DEFAULT 0;
ALTER TABLE session_state
    -- Failures of the running step with the model in use; `step_failures` counts those of all its models.
    ADD COLUMN step_model_failures integer NOT NULL DEFAULT 0,
    -- Prompt tokens as the provider counted them, over our raw estimate of the same prompt; NULL before the first answer.
    ADD COLUMN token_ratio double precision,
    ADD COLUMN estimated_cost_usd double precision NOT NULL DEFAULT 0,
    ADD COLUMN actual_cost_usd double precision NOT NULL DEFAULT 0,
    ADD COLUMN effective_cost_usd double precision NOT NULL DEFAULT 0;
-- Why the arguments of a call could not be read; the call gets this as its error and never runs.
ALTER TABLE tool_calls ADD COLUMN problem text;
"""

MODEL_CALLS = """
-- The model call a session's running step makes: what another worker needs to go on with it.
CREATE TABLE running_generations (
    session_id uuid PRIMARY KEY,
    exec_id uuid NOT NULL,
    model_id uuid NOT NULL,
    response_id text,
    -- The provider's position of the last event whose text is in the log.
    cursor bigint NOT NULL DEFAULT 0,
    -- Set once the whole answer has arrived: everything about it but its text, which is in the log.
    outcome jsonb
);

-- What a provider wants back with a message it wrote. Never served.
CREATE TABLE message_states (
    session_id uuid NOT NULL,
    message_id text NOT NULL,
    state jsonb NOT NULL,
    PRIMARY KEY (session_id, message_id)
);

-- A shorter form of the beginning of a conversation, for prompts only: the log stays as it is. The newest counts.
CREATE TABLE context_checkpoints (
    session_id uuid NOT NULL,
    id uuid NOT NULL,
    -- Everything read before this event of the log is replaced by `messages`, or by `native` at its provider.
    source_sequence bigint NOT NULL,
    -- Tool results before this event are masked.
    masked_sequence bigint NOT NULL DEFAULT 0,
    messages jsonb NOT NULL DEFAULT '[]',
    -- An envelope of `infra.encryption` around a provider's own compaction.
    native text,
    -- What `native` counts for in a prompt, as its provider counts.
    native_tokens integer NOT NULL DEFAULT 0,
    -- Inputs that were in the log at `source_sequence` but not read yet.
    carried_sequences bigint[] NOT NULL DEFAULT '{}',
    strategy text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (session_id, id)
);
CREATE INDEX context_checkpoints_newest_idx ON context_checkpoints (session_id, created_at DESC);

-- One per model (which is one provider's), shared by all workers. No row is a closed breaker without failures.
CREATE TABLE circuit_breakers (
    model_id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    state text NOT NULL DEFAULT 'closed' CHECK (state IN ('closed', 'open', 'half_open')),
    failure_count integer NOT NULL DEFAULT 0,
    success_count integer NOT NULL DEFAULT 0,
    window_started_at timestamptz,
    opened_at timestamptz,
    -- When the next call may try; NULL while closed, and while an operator holds it open.
    half_open_at timestamptz,
    last_failure_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now()
);
"""


CAPABILITIES = """
UPDATE harnesses SET capabilities = capabilities || '[{"ref": "compaction"}]'
    WHERE is_built_in AND name = 'generic' AND NOT capabilities @> '[{"ref": "compaction"}]';
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        for script in (RESOURCES, TURNS, MODEL_CALLS, CAPABILITIES):
            transaction = DB.current_transaction.get()
            assert transaction is not None, "migrations run inside a transaction"
            await transaction.connection.execute(script)

    manager.add_raw(run)
    return manager
