"""The built-in harness `generic` gets the everyday capabilities."""

from __future__ import annotations

from typing import Final

from piccolo.apps.migrations.auto.migration_manager import MigrationManager

from db.piccolo_conf import DB

ID = "2026-11-21T00:00:00:000014"
VERSION = "1.38.0"
DESCRIPTION = "capabilities of the generic harness"

REFS: Final = """[
    {"ref": "current_time"},
    {"ref": "session_file_system"},
    {"ref": "bashkit_shell"},
    {"ref": "web_fetch"},
    {"ref": "session_storage"},
    {"ref": "session"},
    {"ref": "session_schedule"},
    {"ref": "stateless_todo_list"},
    {"ref": "ask_user"},
    {"ref": "agent_instructions"},
    {"ref": "skills"},
    {"ref": "infinity_context"},
    {"ref": "compaction"},
    {"ref": "budgeting"},
    {"ref": "parallel_tool_calls", "config": {"mode": "prefer"}},
    {"ref": "loop_detection"},
    {"ref": "tool_call_repair"}
]"""

CAPABILITIES: Final = f"UPDATE harnesses SET capabilities = '{REFS}' WHERE is_built_in AND name = 'generic'"  # noqa: S608


async def forwards() -> MigrationManager:
    manager = MigrationManager(migration_id=ID, app_name="everruns", description=DESCRIPTION)

    async def run() -> None:
        transaction = DB.current_transaction.get()
        assert transaction is not None, "migrations run inside a transaction"
        await transaction.connection.execute(CAPABILITIES)

    manager.add_raw(run)
    return manager
