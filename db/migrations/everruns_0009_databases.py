"""SQLite databases of sessions, and which writes to them have taken effect."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000009"
VERSION = "1.38.0"
DESCRIPTION = "session databases"

TABLES = """
CREATE TABLE session_databases (
    id uuid PRIMARY KEY,
    session_id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    content bytea NOT NULL,
    size_bytes bigint NOT NULL,
    page_count integer NOT NULL,
    tables json NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (session_id, name)
);
-- It is deflated already.
ALTER TABLE session_databases ALTER COLUMN content SET STORAGE EXTERNAL;

-- A row is written in the transaction that replaces the image, so it says whether a call has taken effect. It outlives its
-- database: a call that is tried again must not make anew what was deleted meanwhile.
CREATE TABLE session_database_writes (
    id uuid PRIMARY KEY,
    session_id uuid NOT NULL,
    idempotency_key text NOT NULL,
    database_id uuid NOT NULL,
    version bigint NOT NULL,
    result text NOT NULL,
    UNIQUE (session_id, idempotency_key)
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
