"""A tool's surroundings for tests of tools that need none of them; a test gives what its tool uses."""

from __future__ import annotations

from msgspec import Struct

from domain.config import NetworkAccessList
from domain.session_info import SessionInfo
from domain.session_storage import SessionStorage
from domain.workspace import FileEntry, WorkspaceFiles


class PlainContext:
    session_id = "session_1"
    turn_id = "turn_1"
    tool_call_id = "call_1"
    idempotency_key = "key_1"
    attempt = 1
    timezone: str | None = None
    config: Struct | None = None
    network_access = NetworkAccessList()

    @property
    def files(self) -> WorkspaceFiles:
        raise AssertionError("this test has no workspace")

    @property
    def storage(self) -> SessionStorage:
        raise AssertionError("this test has no storage")

    async def progress(self, message: str) -> None:
        pass

    async def output(self, text: str, stream: str = "stdout") -> None:
        pass

    async def session_info(self) -> SessionInfo:
        raise AssertionError("this test has no session")

    async def set_title(self, title: str) -> None:
        raise AssertionError("this test has no session")

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        raise AssertionError("this test has no workspace")
