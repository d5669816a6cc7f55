"""The files a session begins with: those of its harness chain, its agent and itself, later ones instead of earlier ones."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from uuid import UUID

import asyncpg

from db.turn_config import read_session_layers
from db.workspace_changes import WorkspaceChanges
from domain.config import InitialFile
from domain.errors import InputTooLarge, InvalidInput
from domain.ids import DEFAULT_ORG_ID
from domain.workspace import FileProblem, FileTooLarge, NewFile, file_path

FIELD = "initial_files"

_COUNT = "SELECT count(*) FROM workspace_entries WHERE workspace_id = $1 AND path = ANY($2::text[])"


async def put_initial_files(connection: asyncpg.Connection, session: UUID, workspace: UUID) -> None:
    """To be called in the transaction that creates the session, when its row is there.

    What a shared workspace has already stays as it is. Raises `InvalidInput` or `InputTooLarge`.
    """
    found = await read_session_layers(connection, session)
    if found is None:
        return
    try:
        files = _by_path(file for layer in found.layers for file in layer.initial_files)
        if not files:
            return
        async with WorkspaceChanges.opened(connection, workspace, DEFAULT_ORG_ID) as changes:
            there = await changes.existing(list(files))
            await changes.put({path: file for path, file in files.items() if path not in there})
    except FileTooLarge as problem:
        raise InputTooLarge(f"{FIELD}: {problem}", field=FIELD) from None
    except FileProblem as problem:
        raise InvalidInput(f"{FIELD}: {problem}", field=FIELD) from None


async def put_missing_files(
    connection: asyncpg.Connection, session: UUID, org_id: int, files: Sequence[InitialFile]
) -> None:
    """Into the session's workspace, in a savepoint of the caller's transaction. Raises `FileProblem`.

    The workspace's lock is taken only when something is missing, which is so in a session's first turn.
    """
    by_path = _by_path(files)
    workspace: UUID | None = await connection.fetchval("SELECT workspace_id FROM sessions WHERE id = $1", session)
    if workspace is None or await connection.fetchval(_COUNT, workspace, list(by_path)) == len(by_path):
        return
    async with connection.transaction(), WorkspaceChanges.opened(connection, workspace, org_id) as changes:
        there = await changes.existing(list(by_path))
        await changes.put({path: file for path, file in by_path.items() if path not in there})


def _by_path(files: Iterable[InitialFile]) -> dict[str, NewFile]:
    return {file_path(file.path): _new_file(file) for file in files}


def _new_file(file: InitialFile) -> NewFile:
    if file.encoding == "base64":
        return NewFile(content=base64.b64decode(file.content), encoding="base64", is_readonly=file.is_readonly)
    return NewFile(content=file.content.encode(), is_readonly=file.is_readonly)
