"""The resource tables, through Piccolo: what clients create and edit. Every one that belongs to a tenant has `org_id`.

The engine's own tables (session state, inbox, turns, tool-call ledger, events) have composite keys, triggers and functions
that Piccolo cannot express; they stand in SQL in the second migration and are read and written with plain asyncpg.
Keys are UUIDv7 made by `domain.ids.uuid7` in the application, never by a column default. JSONB columns read as text.
"""

from __future__ import annotations

from piccolo.columns import (
    JSONB,
    UUID,
    Boolean,
    Integer,
    Serial,
    Text,
    Timestamptz,
)
from piccolo.columns.defaults.timestamptz import TimestamptzNow
from piccolo.table import Table


class Organization(Table, tablename="organizations"):
    id = Serial(primary_key=True)
    public_id = Text(unique=True)
    name = Text()
    default_model_id = UUID(null=True, default=None)
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())


class User(Table, tablename="users"):
    id = UUID(primary_key=True, default=None)
    email = Text(unique=True)
    name = Text()
    role = Text()
    created_at = Timestamptz(default=TimestamptzNow())


class Principal(Table, tablename="principals"):
    """Who owns a session: a user, an agent identity or the system."""

    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    kind = Text()
    subject_id = UUID(null=True, default=None)


class Provider(Table, tablename="providers"):
    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    name = Text()
    provider_type = Text()
    base_url = Text(null=True, default=None)
    credentials = Text(null=True, default=None, secret=True)
    trace = JSONB(null=True, default=None)
    status = Text(default="active")
    last_synced_at = Timestamptz(null=True, default=None)
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())


class Model(Table, tablename="models"):
    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    provider_id = UUID(default=None)
    model_id = Text()
    display_name = Text()
    capabilities = JSONB(default="[]")
    options = JSONB(default="{}")
    enabled = Boolean(default=True)
    is_favorite = Boolean(default=False)
    source = Text(default="manual")
    stale = Boolean(default=False)
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())


class Workspace(Table, tablename="workspaces"):
    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    name = Text()
    description = Text(null=True, default=None)
    status = Text(default="active")
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())
    archived_at = Timestamptz(null=True, default=None)
    deleted_at = Timestamptz(null=True, default=None)


class Harness(Table, tablename="harnesses"):
    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    name = Text()
    display_name = Text(null=True, default=None)
    description = Text(null=True, default=None)
    system_prompt = Text(null=True, default=None)
    parent_harness_id = UUID(null=True, default=None)
    default_model_id = UUID(null=True, default=None)
    fallback_model_ids = JSONB(default="[]")
    capabilities = JSONB(default="[]")
    initial_files = JSONB(default="[]")
    tags = JSONB(default="[]")
    mcp_servers = JSONB(null=True, default=None)
    network_access = JSONB(null=True, default=None)
    parallel_tool_calls = Boolean(null=True, default=None)
    embedder_metadata = JSONB(null=True, default=None)
    is_built_in = Boolean(default=False)
    status = Text(default="active")
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())
    archived_at = Timestamptz(null=True, default=None)
    deleted_at = Timestamptz(null=True, default=None)


class Agent(Table, tablename="agents"):
    """`public_id` may come from the client, so it is unique per organization and apart from the key."""

    id = UUID(primary_key=True, default=None)
    public_id = Text()
    org_id = Integer()
    name = Text()
    display_name = Text(null=True, default=None)
    description = Text(null=True, default=None)
    system_prompt = Text()
    harness_id = UUID(default=None)
    default_model_id = UUID(null=True, default=None)
    fallback_model_ids = JSONB(default="[]")
    capabilities = JSONB(default="[]")
    tools = JSONB(default="[]")
    initial_files = JSONB(default="[]")
    tags = JSONB(default="[]")
    mcp_servers = JSONB(null=True, default=None)
    network_access = JSONB(null=True, default=None)
    max_iterations = Integer(null=True, default=None)
    parallel_tool_calls = Boolean(null=True, default=None)
    status = Text(default="active")
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())
    archived_at = Timestamptz(null=True, default=None)
    deleted_at = Timestamptz(null=True, default=None)


class Session(Table, tablename="sessions"):
    """What was asked for. What happens to a session stands in `session_state`: a narrow row, because it is hot."""

    id = UUID(primary_key=True, default=None)
    org_id = Integer()
    workspace_id = UUID(default=None)
    harness_id = UUID(default=None)
    agent_id = UUID(null=True, default=None)
    agent_identity_id = Text(null=True, default=None)
    owner_principal_id = UUID(default=None)
    parent_session_id = UUID(null=True, default=None)
    title = Text(null=True, default=None)
    locale = Text(null=True, default=None)
    system_prompt = Text(null=True, default=None)
    model_id = UUID(null=True, default=None)
    capabilities = JSONB(default="[]")
    tools = JSONB(default="[]")
    initial_files = JSONB(default="[]")
    tags = JSONB(default="[]")
    mcp_servers = JSONB(null=True, default=None)
    network_access = JSONB(null=True, default=None)
    hints = JSONB(null=True, default=None)
    max_iterations = Integer(null=True, default=None)
    parallel_tool_calls = Boolean(null=True, default=None)
    created_at = Timestamptz(default=TimestamptzNow())
    updated_at = Timestamptz(default=TimestamptzNow())
    deleted_at = Timestamptz(null=True, default=None)
