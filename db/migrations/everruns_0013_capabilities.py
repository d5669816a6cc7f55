"""Capabilities that are data: declarative ones, and skills with their files."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000013"
VERSION = "1.38.0"
DESCRIPTION = "declarative capabilities and skills"

TABLES = """
CREATE TABLE declarative_capabilities (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    name text NOT NULL,
    display_name text,
    description text NOT NULL DEFAULT '',
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    definition jsonb NOT NULL,
    -- Every file the definition brings, those of its skills included, as a turn writes them.
    mounts jsonb NOT NULL DEFAULT '[]',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz
);
-- Archived ones give up their name.
CREATE UNIQUE INDEX declarative_capabilities_name_key ON declarative_capabilities (org_id, name)
    WHERE status IN ('active', 'disabled');
CREATE INDEX declarative_capabilities_org_idx ON declarative_capabilities (org_id, name);

CREATE TABLE skills (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    name text NOT NULL,
    description text NOT NULL,
    version text NOT NULL,
    license text,
    compatibility text,
    allowed_tools text,
    metadata jsonb NOT NULL DEFAULT '{}',
    disable_model_invocation boolean NOT NULL DEFAULT false,
    user_invocable boolean NOT NULL DEFAULT true,
    source_type text NOT NULL CHECK (source_type IN ('markdown', 'archive')),
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    skill_md text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX skills_name_key ON skills (org_id, name) WHERE status IN ('active', 'disabled');
CREATE INDEX skills_org_idx ON skills (org_id, name);

CREATE TABLE skill_files (
    skill_id uuid NOT NULL REFERENCES skills (id) ON DELETE CASCADE,
    path text COLLATE "C" NOT NULL,
    content bytea NOT NULL,
    PRIMARY KEY (skill_id, path)
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
