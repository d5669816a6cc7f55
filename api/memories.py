"""`/v1/memories`; the files are in `api.memory_files`."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import actions, self_url, view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import memories
from domain.memories import Memory, MemoryChanges, SourceInput
from domain.resources import Lifecycle


class CreateMemory(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    source: SourceInput | None = None


class UpdateMemory(Struct, frozen=True, kw_only=True):
    """Absent fields stay as they are; null clears the description. `status` archives, reactivates and deletes."""

    name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    source: SourceInput | UnsetType | None = UNSET
    status: Lifecycle | UnsetType | None = UNSET


class MemoryView(Memory, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class MemoryList(Struct, frozen=True, kw_only=True):
    data: list[MemoryView]


def memory_view(services: Services, memory: Memory) -> MemoryView:
    url = self_url(services, f"memories/{memory.id}")
    items = [("self", "GET", "", "get_memory"), ("files", "GET", "/fs", "list_memory_root")]
    if memory.status is Lifecycle.ARCHIVED:
        items.append(("unarchive", "PATCH", "", "update_memory"))
    elif memory.status is Lifecycle.ACTIVE:
        items += [("update", "PATCH", "", "update_memory"), ("delete", "DELETE", "", "delete_memory")]
    return view(MemoryView, memory, self_url=url, allowed_actions=actions(url, *items))


@get("/", operation_id="list_memories", summary="List memories", responses=declared())
async def list_memories(
    services: NamedDependency[Services], search: FromQuery[str | None] = None, include_archived: FromQuery[bool] = False
) -> MemoryList:
    """Newest first. Each word of `search` must occur in name or description."""
    found = await memories.list_memories(services.database, search=search, include_archived=include_archived)
    return MemoryList(data=[memory_view(services, memory) for memory in found])


@post("/", operation_id="create_memory", summary="Create a memory", responses=declared(409, 413))
async def create_memory(services: NamedDependency[Services], data: JSONBody[CreateMemory]) -> MemoryView:
    """Empty. With a `source` it is read-only; see `sync`."""
    changes = MemoryChanges(
        name=data.name, description=data.description, source=UNSET if data.source is None else data.source
    )
    return memory_view(services, await memories.create_memory(services.database, changes))


@get("/{memory_id:str}", operation_id="get_memory", summary="Get a memory", responses=declared())
async def get_memory(services: NamedDependency[Services], memory_id: FromPath[str]) -> MemoryView:
    """Without its files."""
    return memory_view(services, await memories.get_memory(services.database, memory_id))


@patch("/{memory_id:str}", operation_id="update_memory", summary="Update a memory", responses=declared(409, 413))
async def update_memory(
    services: NamedDependency[Services], memory_id: FromPath[str], data: JSONBody[UpdateMemory]
) -> MemoryView:
    """An archived memory only takes a `status`; `deleted` is for good."""
    changes = MemoryChanges(
        name=present(data.name),
        description=data.description,
        source=present(data.source),
        status=present(data.status),
    )
    return memory_view(services, await memories.update_memory(services.database, memory_id, changes))


@delete("/{memory_id:str}", operation_id="delete_memory", summary="Archive a memory", responses=declared())
async def delete_memory(services: NamedDependency[Services], memory_id: FromPath[str]) -> None:
    """Its files stay readable; agents do not see it any more."""
    await memories.archive_memory(services.database, memory_id)


@post(
    "/{memory_id:str}/sync",
    operation_id="sync_memory_now",
    summary="Sync a memory with its source",
    status_code=200,
    responses=declared(409),
)
async def sync_memory_now(services: NamedDependency[Services], memory_id: FromPath[str]) -> MemoryView:
    """This server cannot fetch git repositories: `sync_status` is `failed` afterwards, and `last_sync_error` says why."""
    return memory_view(services, await memories.sync_memory(services.database, memory_id))


router = Router(
    "/memories",
    tags=["Memories"],
    route_handlers=[list_memories, create_memory, get_memory, update_memory, delete_memory, sync_memory_now],
)
