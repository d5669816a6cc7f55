"""Session storage: values and secrets of a session."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000005"
VERSION = "1.38.0"
DESCRIPTION = "session storage"

TABLES = """
CREATE TABLE session_values (
    session_id uuid NOT NULL,
    key text COLLATE "C" NOT NULL,
    value text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (session_id, key)
);

-- A row keeps its id when its secret is set anew: `value` is an envelope of `infra.encryption`, bound to that id.
CREATE TABLE session_secrets (
    id uuid PRIMARY KEY,
    session_id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    value text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (session_id, name)
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
