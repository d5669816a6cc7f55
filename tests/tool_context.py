"""A tool's surroundings for tests of tools that need none of them; a test gives what its tool uses."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from domain.budgets import Budget
from domain.capabilities import Resumption
from domain.config import NetworkAccessList
from domain.memory_access import OpenMemory
from domain.schedules import SessionSchedules
from domain.session_databases import SessionDatabases
from domain.session_info import SessionInfo
from domain.session_past import SessionPast
from domain.session_storage import SessionStorage
from domain.tasks import SessionTasks
from domain.workspace import FileEntry, WorkspaceFiles


class PlainContext:
    session_id = "session_1"
    turn_id = "turn_1"
    tool_call_id = "call_1"
    idempotency_key: str = "key_1"
    attempt: int = 1
    timezone: str | None = None
    config: Struct | None = None
    resumed: Resumption | None = None
    network_access = NetworkAccessList()

    @property
    def files(self) -> WorkspaceFiles:
        raise AssertionError("this test has no workspace")

    @property
    def storage(self) -> SessionStorage:
        raise AssertionError("this test has no storage")

    @property
    def databases(self) -> SessionDatabases:
        raise AssertionError("this test has no databases")

    @property
    def schedules(self) -> SessionSchedules:
        raise AssertionError("this test has no schedules")

    @property
    def tasks(self) -> SessionTasks:
        raise AssertionError("this test has no tasks")

    @property
    def past(self) -> SessionPast:
        raise AssertionError("this test has no past")

    async def memory(self, id_or_name: str) -> OpenMemory | None:
        raise AssertionError("this test has no memories")

    async def progress(self, message: str) -> None:
        pass

    async def output(self, text: str, stream: str = "stdout") -> None:
        pass

    async def session_info(self) -> SessionInfo:
        raise AssertionError("this test has no session")

    async def budgets(self) -> Sequence[Budget]:
        raise AssertionError("this test has no budgets")

    async def set_title(self, title: str) -> None:
        raise AssertionError("this test has no session")

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        raise AssertionError("this test has no workspace")
