"""Where Piccolo finds its engine; `PICCOLO_CONF=db.piccolo_conf`. The address is set by `Database.open`."""

from __future__ import annotations

from piccolo.conf.apps import AppRegistry
from piccolo.engine.postgres import PostgresEngine


class _Engine(PostgresEngine):
    async def check_version(self) -> None:
        """Piccolo would connect when the engine is made, that is at import, before there is an address to connect to."""


DB = _Engine(config={}, extensions=())
APP_REGISTRY = AppRegistry(apps=["db.piccolo_app"])
