"""A memory as tools reach it."""

from __future__ import annotations

from msgspec import Struct

from domain.workspace import WorkspaceFiles


class OpenMemory(Struct, frozen=True, kw_only=True):
    """`is_readonly` is the memory's own state, whatever a capability's configuration allows."""

    name: str
    description: str | None
    is_readonly: bool
    files: WorkspaceFiles
