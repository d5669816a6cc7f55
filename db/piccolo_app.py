"""The Piccolo app: which tables there are and where their migrations live."""

from __future__ import annotations

from pathlib import Path

from piccolo.conf.apps import AppConfig, table_finder

APP_CONFIG = AppConfig(
    app_name="everruns",
    migrations_folder_path=str(Path(__file__).parent / "migrations"),
    table_classes=table_finder(["db.tables"]),
    migration_dependencies=[],
    commands=[],
)
