"""Forks and rewinds of sessions, and the history of files and values they need; memories; connections of users."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000008"
VERSION = "1.38.0"
DESCRIPTION = "forks, rewinds, history of files and values, memories, connections"

FORKS = """
ALTER TABLE sessions ADD COLUMN forked_from_session_id uuid, ADD COLUMN forked_from_sequence bigint;
-- What rewinds have taken out of the conversation; the log itself keeps everything.
ALTER TABLE session_state ADD COLUMN hidden_events int8multirange NOT NULL DEFAULT '{}';

DROP INDEX events_conversation_idx;
CREATE INDEX events_conversation_idx ON events (session_id, sequence)
    WHERE type IN ('input.message', 'output.message.completed', 'tool.completed',
                   'turn.started', 'reason.started', 'turn.cancelled', 'session.forked', 'session.rewound');

-- Another id of the same moment: the first half of a UUIDv7 is its time and a counter, the second is random.
CREATE FUNCTION another_id_v1(p_id uuid) RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(substring(uuid_send(p_id) FROM 1 FOR 8) || substring(uuid_send(gen_random_uuid()) FROM 9 FOR 8), 'hex')::uuid
$$;
"""

# Versions are put in order by time, because a workspace may belong to several sessions, each with sequences of its own. All
# times are this server's: an event's is taken when it is appended, a change's (`changed_at`) when its transaction has the
# workspace's lock, and never twice or backwards in one workspace. Only what is replaced or deleted costs a row.
FILE_HISTORY = """
ALTER TABLE workspace_usage
    ADD COLUMN changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Before this moment some versions are not known any more, or never were; NULL when all are.
    ADD COLUMN known_since timestamptz;
UPDATE workspace_usage SET known_since = clock_timestamp();
ALTER TABLE workspace_entries ADD COLUMN since timestamptz;
UPDATE workspace_entries SET since = updated_at;
ALTER TABLE workspace_entries ALTER COLUMN since SET NOT NULL;

-- What an entry was, from `since` on and before `until`. `total` adds up sizes, so that one comparison says what is too old.
CREATE TABLE workspace_history (
    workspace_id uuid NOT NULL,
    total bigint NOT NULL,
    since timestamptz NOT NULL,
    until timestamptz NOT NULL,
    path text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    org_id integer NOT NULL,
    is_directory boolean NOT NULL,
    is_readonly boolean NOT NULL,
    blob_hash bytea,
    size_bytes bigint NOT NULL,
    encoding text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (workspace_id, total),
    FOREIGN KEY (org_id, blob_hash) REFERENCES workspace_blobs (org_id, hash)
);
CREATE INDEX workspace_history_blob_idx ON workspace_history (org_id, blob_hash) WHERE blob_hash IS NOT NULL;

CREATE FUNCTION keep_workspace_version() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    v_moment timestamptz;
BEGIN
    IF TG_OP = 'INSERT' AND NEW.since IS NOT NULL THEN
        RETURN NEW;
    END IF;
    SELECT u.changed_at INTO v_moment FROM workspace_usage u
    WHERE u.workspace_id = CASE WHEN TG_OP = 'INSERT' THEN NEW.workspace_id ELSE OLD.workspace_id END;
    v_moment := coalesce(v_moment, clock_timestamp());
    IF TG_OP <> 'INSERT' AND OLD.since < v_moment THEN
        -- 1024 for the row itself: versions of empty files must not be free.
        INSERT INTO workspace_history (workspace_id, total, since, until, path, id, org_id, is_directory, is_readonly,
                                       blob_hash, size_bytes, encoding, created_at, updated_at)
        SELECT OLD.workspace_id, coalesce(max(h.total), 0) + OLD.size_bytes + 1024, OLD.since, v_moment, OLD.path, OLD.id,
               OLD.org_id, OLD.is_directory, OLD.is_readonly, OLD.blob_hash, OLD.size_bytes, OLD.encoding,
               OLD.created_at, OLD.updated_at
        FROM workspace_history h WHERE h.workspace_id = OLD.workspace_id;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    NEW.since := v_moment;
    RETURN NEW;
END $$;
CREATE TRIGGER workspace_entries_history BEFORE INSERT OR UPDATE OR DELETE ON workspace_entries
    FOR EACH ROW EXECUTE FUNCTION keep_workspace_version();
"""

# 64 MiB of former values per session, eight times what its present ones may hold.
VALUE_HISTORY = """
ALTER TABLE sessions ADD COLUMN values_known_since timestamptz;
UPDATE sessions SET values_known_since = clock_timestamp();
ALTER TABLE session_values ADD COLUMN since timestamptz NOT NULL DEFAULT clock_timestamp();

CREATE TABLE session_value_history (
    session_id uuid NOT NULL,
    total bigint NOT NULL,
    since timestamptz NOT NULL,
    until timestamptz NOT NULL,
    key text COLLATE "C" NOT NULL,
    value text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (session_id, total)
);

CREATE FUNCTION keep_value_version() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    v_moment timestamptz := greatest(clock_timestamp(), OLD.since + interval '1 microsecond');
    v_total bigint;
    v_known timestamptz;
BEGIN
    SELECT coalesce(max(h.total), 0) + octet_length(OLD.value) + 1024 INTO v_total
    FROM session_value_history h WHERE h.session_id = OLD.session_id;
    INSERT INTO session_value_history (session_id, total, since, until, key, value, created_at, updated_at)
    VALUES (OLD.session_id, v_total, OLD.since, v_moment, OLD.key, OLD.value, OLD.created_at, OLD.updated_at);
    WITH gone AS (
        DELETE FROM session_value_history h WHERE h.session_id = OLD.session_id AND h.total <= v_total - 67108864
        RETURNING h.until
    )
    SELECT max(until) INTO v_known FROM gone;
    IF v_known IS NOT NULL THEN
        UPDATE sessions SET values_known_since = greatest(values_known_since, v_known) WHERE id = OLD.session_id;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    NEW.since := v_moment;
    RETURN NEW;
END $$;
CREATE TRIGGER session_values_history BEFORE UPDATE OR DELETE ON session_values
    FOR EACH ROW EXECUTE FUNCTION keep_value_version();
"""

MEMORIES = """
-- Files of a memory are workspace entries under the memory's own id.
CREATE TABLE memories (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    name text NOT NULL,
    description text,
    source_type text NOT NULL DEFAULT 'manual' CHECK (source_type IN ('manual', 'github', 'git')),
    source jsonb NOT NULL DEFAULT '{}',
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived', 'deleted')),
    sync_status text NOT NULL DEFAULT 'idle' CHECK (sync_status IN ('idle', 'syncing', 'succeeded', 'failed')),
    last_synced_at timestamptz,
    last_sync_error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX memories_name_key ON memories (org_id, name) WHERE status = 'active';
CREATE INDEX memories_list_idx ON memories (org_id, created_at DESC) WHERE status <> 'deleted';
"""

CONNECTIONS = """
-- `api_key` is an envelope of `infra.encryption`, bound to the row's id, which stays when the key is set anew.
CREATE TABLE user_connections (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    user_id uuid NOT NULL,
    provider text NOT NULL,
    api_key text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (org_id, user_id, provider)
);
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        for script in (FORKS, FILE_HISTORY, VALUE_HISTORY, MEMORIES, CONNECTIONS):
            transaction = DB.current_transaction.get()
            assert transaction is not None, "migrations run inside a transaction"
            await transaction.connection.execute(script)

    manager.add_raw(run)
    return manager
