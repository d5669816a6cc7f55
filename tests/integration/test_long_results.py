"""Results over 64 KiB: kept whole in the workspace, their beginning in the conversation."""

from __future__ import annotations

import httpx
import pytest

from activities.capabilities.long_results import HEAD_BYTES, within_limit
from activities.capabilities.tool_call import MAX_RESULT_BYTES, ToolOutcome
from api.services import Services
from db.session_resources import DatabaseResources
from domain.events import ToolStatus
from domain.limits import FILE_MAX_BYTES
from domain.messages import TextPart
from domain.workspace import FileEntry, WorkspaceFiles
from tests.conftest import API, Make
from tests.tool_context import PlainContext


class Context(PlainContext):
    def __init__(self, files: WorkspaceFiles) -> None:
        self._files = files
        self.written: list[str] = []

    @property
    def files(self) -> WorkspaceFiles:
        return self._files

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        self.written.append(entry.path)


@pytest.fixture
async def context(services: Services, make_session: Make) -> tuple[Context, str]:
    session = str((await make_session())["id"])
    return Context(DatabaseResources(services.database.pool, services.keyring).files(session)), session


def success(text: str) -> ToolOutcome:
    return ToolOutcome(result=[TextPart(text=text)], error=None, status=ToolStatus.SUCCESS)


def text_of(outcome: ToolOutcome) -> str:
    (part,) = outcome.result or []
    assert isinstance(part, TextPart)
    return part.text


async def test_a_long_result_is_kept_whole_and_its_beginning_shown(
    context: tuple[Context, str], client: httpx.AsyncClient
) -> None:
    tool, session = context
    whole = "".join(f"line {number} ✓\n" for number in range(20_000))
    shown = text_of(await within_limit(success(whole), "call_1", tool, can_read_files=True))
    head, _, note = shown.rpartition("\n\n[Output cut: ")
    assert whole.startswith(head)
    assert HEAD_BYTES - 4 < len(head.encode()) <= HEAD_BYTES
    assert "/outputs/call_1.stdout" in note
    assert "`read_file`" in note
    assert tool.written == ["/outputs/call_1.stdout"]
    read = await client.get(f"{API}/sessions/{session}/fs/outputs/call_1.stdout")
    assert read.json()["content"] == whole


async def test_without_file_tools_as_much_as_fits_is_shown(context: tuple[Context, str]) -> None:
    shown = text_of(await within_limit(success("é" * 100_000), "call_1", context[0], can_read_files=False))
    assert MAX_RESULT_BYTES - 1_000 < len(shown.encode()) <= MAX_RESULT_BYTES
    assert "read_file" not in shown


async def test_a_result_that_fits_is_left_alone(context: tuple[Context, str]) -> None:
    outcome = success("x" * MAX_RESULT_BYTES)
    assert await within_limit(outcome, "call_1", context[0], can_read_files=True) == outcome
    assert not context[0].written


async def test_a_retried_call_writes_the_same_file_again(context: tuple[Context, str]) -> None:
    first = await within_limit(success("x" * 100_000), "call_1", context[0], can_read_files=True)
    assert await within_limit(success("x" * 100_000), "call_1", context[0], can_read_files=True) == first


@pytest.mark.parametrize("call_id", ["../../etc/passwd", "a/b\x00c", "_", "\u202e", "x" * 500])
async def test_a_hostile_call_id_stays_in_its_directory(context: tuple[Context, str], call_id: str) -> None:
    await within_limit(success("x" * 100_000), call_id, context[0], can_read_files=True)
    (path,) = context[0].written
    assert path.startswith("/outputs/")
    assert path.count("/") == 2


async def test_more_than_a_file_may_hold_is_kept_as_far_as_it_fits(context: tuple[Context, str]) -> None:
    shown = text_of(await within_limit(success("x" * (FILE_MAX_BYTES + 1)), "call_1", context[0], can_read_files=True))
    assert f"({FILE_MAX_BYTES:,} bytes)" in shown


async def test_a_workspace_that_is_full_costs_only_the_rest_of_the_result(context: tuple[Context, str]) -> None:
    tool, _ = context
    for number in range(10):
        await tool.files.write(f"/full/{number}", bytes([number]) * FILE_MAX_BYTES)
    shown = text_of(await within_limit(success("x" * 100_000), "call_1", tool, can_read_files=True))
    assert "[Output truncated: " in shown
    assert len(shown.encode()) <= MAX_RESULT_BYTES
