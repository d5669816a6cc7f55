"""The engine's tables, the append function of the event log, indexes and keys Piccolo cannot express, and the first rows."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000002"
VERSION = "1.38.0"
DESCRIPTION = "engine tables, append function, first rows"

RESOURCE_CONSTRAINTS = """
ALTER TABLE agents ADD CONSTRAINT agents_public_id_key UNIQUE (org_id, public_id);
-- Names are unique among the rows that still can be used; archiving one frees its name.
CREATE UNIQUE INDEX agents_name_key ON agents (org_id, name) WHERE status = 'active';
CREATE UNIQUE INDEX harnesses_name_key ON harnesses (org_id, name) WHERE status = 'active';
CREATE UNIQUE INDEX models_name_key ON models (org_id, provider_id, model_id);
CREATE INDEX sessions_list_idx ON sessions (org_id, created_at DESC) WHERE deleted_at IS NULL;
CREATE INDEX sessions_agent_idx ON sessions (agent_id) WHERE agent_id IS NOT NULL;
CREATE INDEX sessions_harness_idx ON sessions (harness_id);
"""

ENGINE_TABLES = """
-- The one row a session's writers lock: event counter, status, running turn, fence of the running reason step, totals.
CREATE TABLE session_state (
    session_id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    status text NOT NULL DEFAULT 'started',
    last_sequence bigint NOT NULL DEFAULT 0,
    turn_id uuid,
    turn_count integer NOT NULL DEFAULT 0,
    step_exec_id uuid,
    step_attempt integer NOT NULL DEFAULT 0,
    step_starts integer NOT NULL DEFAULT 0,
    step_releases integer NOT NULL DEFAULT 0,
    step_failures integer NOT NULL DEFAULT 0,
    step_wait_ms integer NOT NULL DEFAULT 0,
    model_id uuid,
    preview text,
    output_preview text,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    active_ms bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    finished_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 60);
CREATE INDEX session_state_busy_idx ON session_state (updated_at) WHERE status IN ('active', 'waiting_for_tool_results');

CREATE TABLE session_pins (
    user_id uuid NOT NULL,
    session_id uuid NOT NULL,
    org_id integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, session_id)
);

-- Messages no reason step has read yet. A row goes in the transaction that writes the receipt.
CREATE TABLE inbox (
    session_id uuid NOT NULL,
    sequence bigint NOT NULL,
    org_id integer NOT NULL,
    message_id text NOT NULL,
    delivery text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (session_id, sequence)
);
CREATE INDEX inbox_age_idx ON inbox (created_at);

-- One turn: its pinned configuration, where it stands, and its totals.
CREATE TABLE turns (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    session_id uuid NOT NULL,
    agent_id uuid,
    agent_public_id text,
    harness_id uuid NOT NULL,
    status text NOT NULL DEFAULT 'running',
    iteration integer NOT NULL DEFAULT 0,
    config jsonb NOT NULL DEFAULT '{}',
    input_message_id text NOT NULL,
    input_sequences bigint[] NOT NULL,
    reasoning_effort text,
    timezone text,
    open_message_id text,
    open_exec_id uuid,
    last_result jsonb,
    last_error text,
    last_error_code text,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    llm_call_count integer NOT NULL DEFAULT 0,
    tool_call_count integer NOT NULL DEFAULT 0,
    time_to_first_token_ms integer,
    started_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
);
CREATE INDEX turns_session_idx ON turns (session_id, started_at);
CREATE INDEX turns_agent_idx ON turns (agent_id) WHERE agent_id IS NOT NULL;
CREATE INDEX turns_running_idx ON turns (org_id) WHERE status = 'running';

-- The tool-call ledger: requested -> running -> settled.
CREATE TABLE tool_calls (
    session_id uuid NOT NULL,
    call_id text NOT NULL,
    org_id integer NOT NULL,
    turn_id uuid NOT NULL,
    iteration integer NOT NULL,
    ordinal integer NOT NULL,
    name text NOT NULL,
    display_name text,
    arguments jsonb NOT NULL DEFAULT '{}',
    kind text NOT NULL,
    side_effect text NOT NULL,
    concurrency_class text,
    timeout_seconds double precision NOT NULL,
    status text NOT NULL DEFAULT 'requested',
    outcome text,
    attempt integer NOT NULL DEFAULT 0,
    starts integer NOT NULL DEFAULT 0,
    worker text,
    requested_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    settled_at timestamptz,
    PRIMARY KEY (session_id, call_id)
);
CREATE INDEX tool_calls_open_idx ON tool_calls (session_id) WHERE status <> 'settled';

-- The log. The key leads with the session, so the table can be hash-partitioned by it without a change of meaning.
CREATE TABLE events (
    session_id uuid NOT NULL,
    sequence bigint NOT NULL,
    id uuid NOT NULL,
    org_id integer NOT NULL,
    type text NOT NULL,
    ts timestamptz NOT NULL,
    turn_id uuid,
    exec_id uuid,
    -- json, not jsonb: payloads are served as they were written, byte for byte, and cost no parse on the way in.
    context json NOT NULL,
    data json NOT NULL,
    metadata json,
    tags text[],
    dedupe_key text,
    PRIMARY KEY (session_id, sequence)
);
CREATE UNIQUE INDEX events_id_key ON events (session_id, id);
CREATE UNIQUE INDEX events_dedupe_key ON events (session_id, dedupe_key) WHERE dedupe_key IS NOT NULL;
CREATE INDEX events_conversation_idx ON events (session_id, sequence)
    WHERE type IN ('input.message', 'output.message.completed', 'tool.completed',
                   'turn.started', 'reason.started', 'turn.cancelled');

CREATE FUNCTION events_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'events are append-only' USING ERRCODE = 'EV003';
END $$;
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events
    FOR EACH ROW EXECUTE FUNCTION events_are_append_only();
CREATE TRIGGER events_append_only_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION events_are_append_only();
"""

# Order comes from the session's counter, locked until commit: whoever reads rows in sequence order can never be overtaken by
# a row with a smaller number. A function, because each of its statements sees what the lock made it wait for; one statement
# with CTEs would look for duplicates in the snapshot from before the wait.
APPEND_FUNCTION = """
CREATE FUNCTION append_events_v1(
    p_session uuid,
    p_fence_exec uuid,
    p_fence_attempt integer,
    p_ids uuid[],
    p_types text[],
    p_turns uuid[],
    p_execs uuid[],
    p_contexts json[],
    p_datas json[],
    p_metadatas json[],
    p_tags jsonb[],
    p_dedupes text[]
) RETURNS TABLE (ordinal integer, sequence bigint, ts timestamptz) LANGUAGE plpgsql AS $$
DECLARE
    v_state session_state%ROWTYPE;
    v_now timestamptz;
    v_count integer;
BEGIN
    SELECT * INTO v_state FROM session_state s WHERE s.session_id = p_session FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no such session' USING ERRCODE = 'EV002';
    END IF;
    IF p_fence_exec IS NOT NULL
       AND (v_state.step_exec_id IS DISTINCT FROM p_fence_exec OR v_state.step_attempt <> p_fence_attempt) THEN
        RAISE EXCEPTION 'step overtaken' USING ERRCODE = 'EV001';
    END IF;
    v_now := clock_timestamp();
    RETURN QUERY
        WITH fresh AS (
            SELECT n.ord::integer AS ord, row_number() OVER (ORDER BY n.ord) AS place
            FROM unnest(p_dedupes) WITH ORDINALITY AS n(dedupe, ord)
            WHERE n.dedupe IS NULL
               OR NOT EXISTS (SELECT 1 FROM events e WHERE e.session_id = p_session AND e.dedupe_key = n.dedupe)
        )
        INSERT INTO events AS written
            (session_id, sequence, id, org_id, type, ts, turn_id, exec_id, context, data, metadata, tags, dedupe_key)
        SELECT p_session, v_state.last_sequence + f.place, p_ids[f.ord], v_state.org_id, p_types[f.ord], v_now,
               p_turns[f.ord], p_execs[f.ord], p_contexts[f.ord], p_datas[f.ord], p_metadatas[f.ord],
               CASE WHEN p_tags[f.ord] IS NULL THEN NULL
                    ELSE ARRAY(SELECT jsonb_array_elements_text(p_tags[f.ord])) END,
               p_dedupes[f.ord]
        FROM fresh f
        RETURNING array_position(p_ids, written.id), written.sequence, written.ts;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count > 0 THEN
        UPDATE session_state s SET last_sequence = s.last_sequence + v_count, updated_at = v_now
        WHERE s.session_id = p_session;
        PERFORM pg_notify('everruns_events', replace(p_session::text, '-', '') || ':' || (v_state.last_sequence + v_count));
    END IF;
END $$;
"""

FIRST_ROWS = """
INSERT INTO organizations (public_id, name) VALUES ('org_00000000000000000000000000000001', 'Default Organization');
INSERT INTO users (id, email, name, role)
    VALUES ('00000000-0000-0000-0000-000000000001', 'anonymous@local', 'Anonymous', 'admin');
INSERT INTO principals (id, org_id, kind, subject_id)
    VALUES ('00000000-0000-0000-0000-000000000001', 1, 'user', '00000000-0000-0000-0000-000000000001');
INSERT INTO providers (id, org_id, name, provider_type)
    VALUES ('01980000-0000-7000-8000-000000000001', 1, 'Simulated', 'llmsim');
INSERT INTO models (id, org_id, provider_id, model_id, display_name, capabilities, source) VALUES
    ('01980000-0000-7000-8000-000000000101', 1, '01980000-0000-7000-8000-000000000001',
     'llmsim-model', 'Simulated: fixed answer', '["text", "tools"]', 'predefined'),
    ('01980000-0000-7000-8000-000000000102', 1, '01980000-0000-7000-8000-000000000001',
     'llmsim-echo', 'Simulated: echo', '["text"]', 'predefined'),
    ('01980000-0000-7000-8000-000000000103', 1, '01980000-0000-7000-8000-000000000001',
     'llmsim-lorem', 'Simulated: filler text', '["text"]', 'predefined');
INSERT INTO harnesses (id, org_id, name, display_name, description, is_built_in) VALUES
    ('01980000-0000-7000-8000-000000000201', 1, 'base', 'Base', 'Nothing but the model.', true);
INSERT INTO harnesses (id, org_id, name, display_name, description, parent_harness_id, capabilities, is_built_in) VALUES
    ('01980000-0000-7000-8000-000000000202', 1, 'generic', 'Generic', 'A general-purpose agent with everyday tools.',
     '01980000-0000-7000-8000-000000000201', '[{"ref": "current_time"}, {"ref": "stateless_todo_list"}]', true);
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        for script in (RESOURCE_CONSTRAINTS, ENGINE_TABLES, APPEND_FUNCTION, FIRST_ROWS):
            transaction = DB.current_transaction.get()
            assert transaction is not None, "migrations run inside a transaction"
            await transaction.connection.execute(script)

    manager.add_raw(run)
    return manager
