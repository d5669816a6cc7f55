"""MCP servers: those of the organization, the secrets of scoped ones, and what is known of their tools."""

from __future__ import annotations

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000012"
VERSION = "1.38.0"
DESCRIPTION = "mcp servers"

TABLES = """
-- `api_key`, `headers`, `oauth_client` and `oauth_grant` are envelopes of `infra.encryption`, bound to the row and the column.
-- `header_names` stands beside `headers` so that a read need not decrypt.
CREATE TABLE mcp_servers (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    name text NOT NULL,
    url text NOT NULL,
    description text,
    transport_type text NOT NULL DEFAULT 'http' CHECK (transport_type = 'http'),
    auth_mode text NOT NULL DEFAULT 'none' CHECK (auth_mode IN ('none', 'api_key', 'o_auth')),
    protocol_mode text NOT NULL DEFAULT 'auto' CHECK (protocol_mode IN ('auto', 'legacy', 'stable', 'rc')),
    api_key text,
    header_names text[] NOT NULL DEFAULT '{}',
    headers text,
    oauth_client text,
    oauth_grant text,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    archived_at timestamptz,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX mcp_servers_name_key ON mcp_servers (org_id, name) WHERE status IN ('active', 'disabled');
CREATE INDEX mcp_servers_org_idx ON mcp_servers (org_id, created_at);

-- Values of scoped servers' headers, keys and variables. The `mcp_servers` column of a harness, an agent or a session names
-- them by id; a copy of such a row shares them, and they are never changed.
CREATE TABLE mcp_scoped_secrets (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    value text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Begun and not yet finished authorizations; `id` is derived from the state that the authorization server hands back.
CREATE TABLE mcp_oauth_flows (
    id uuid PRIMARY KEY,
    org_id integer NOT NULL,
    server_id uuid NOT NULL,
    value text NOT NULL,
    expires_at timestamptz NOT NULL
);

CREATE TABLE mcp_discoveries (
    cache_key text COLLATE "C" PRIMARY KEY,
    org_id integer NOT NULL,
    server_id uuid,
    discovery text,
    found_at timestamptz,
    failed_at timestamptz,
    problem text,
    touched_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX mcp_discoveries_server_idx ON mcp_discoveries (server_id) WHERE server_id IS NOT NULL;
CREATE INDEX mcp_discoveries_touched_idx ON mcp_discoveries (touched_at);
"""


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(TABLES)

    manager.add_raw(run)
    return manager
