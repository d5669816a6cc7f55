"""Files of workspaces: entries by path, and their content by its hash."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000004"
VERSION = "1.38.0"
DESCRIPTION = "workspace files"

FILES = """
-- Content, once per organization however many files have it. Deleted with the last entry that refers to it.
CREATE TABLE workspace_blobs (
    org_id integer NOT NULL,
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    content bytea NOT NULL,
    -- UTF-8 without NUL: what a search looks into.
    is_text boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (org_id, hash)
);

-- Files and directories; the root has no row. In the order of bytes, so that what is below a directory is one range.
CREATE TABLE workspace_entries (
    workspace_id uuid NOT NULL,
    path text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    org_id integer NOT NULL,
    is_directory boolean NOT NULL,
    is_readonly boolean NOT NULL DEFAULT false,
    blob_hash bytea,
    size_bytes bigint NOT NULL DEFAULT 0,
    encoding text NOT NULL DEFAULT 'text' CHECK (encoding IN ('text', 'base64')),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace_id, path),
    CHECK (is_directory = (blob_hash IS NULL)),
    FOREIGN KEY (org_id, blob_hash) REFERENCES workspace_blobs (org_id, hash)
);
CREATE INDEX workspace_entries_blob_idx ON workspace_entries (org_id, blob_hash) WHERE blob_hash IS NOT NULL;

-- The row that writers of a workspace lock, and what the limits are checked against.
CREATE TABLE workspace_usage (
    workspace_id uuid PRIMARY KEY,
    size_bytes bigint NOT NULL DEFAULT 0,
    entry_count integer NOT NULL DEFAULT 0
) WITH (fillfactor = 60);
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(FILES)

    manager.add_raw(run)
    return manager
