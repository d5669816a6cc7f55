"""`/v1/workspaces`; the files are in `api.workspace_files`."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import actions, self_url, view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import workspaces
from domain.resources import Lifecycle, Workspace, WorkspaceChanges


class CreateWorkspace(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None


class UpdateWorkspace(Struct, frozen=True, kw_only=True):
    """Absent fields stay as they are; null clears the description. `status` archives, reactivates and deletes."""

    name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    status: Lifecycle | UnsetType | None = UNSET


class WorkspaceView(Workspace, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class WorkspaceList(Struct, frozen=True, kw_only=True):
    data: list[WorkspaceView]


def workspace_view(services: Services, workspace: Workspace) -> WorkspaceView:
    url = self_url(services, f"workspaces/{workspace.id}")
    items = [("self", "GET", "", "get_workspace"), ("files", "GET", "/fs", "get_root")]
    if workspace.status is Lifecycle.ARCHIVED:
        items.append(("unarchive", "PATCH", "", "update_workspace"))
    elif workspace.status is Lifecycle.ACTIVE:
        items += [("update", "PATCH", "", "update_workspace"), ("delete", "DELETE", "", "delete_workspace")]
    return view(WorkspaceView, workspace, self_url=url, allowed_actions=actions(url, *items))


@get("/", operation_id="list_workspaces", summary="List workspaces", responses=declared())
async def list_workspaces(
    services: NamedDependency[Services], search: FromQuery[str | None] = None, include_archived: FromQuery[bool] = False
) -> WorkspaceList:
    """Newest first, without those that belong to one session. Each word of `search` must occur in name or description."""
    found = await workspaces.list_workspaces(services.database, search=search, include_archived=include_archived)
    return WorkspaceList(data=[workspace_view(services, workspace) for workspace in found])


@post("/", operation_id="create_workspace", summary="Create a workspace", responses=declared(409, 413))
async def create_workspace(services: NamedDependency[Services], data: JSONBody[CreateWorkspace]) -> WorkspaceView:
    """Empty. Sessions that are created with its id share its files."""
    changes = WorkspaceChanges(name=data.name, description=data.description)
    return workspace_view(services, await workspaces.create_workspace(services.database, changes))


@get("/{workspace_id:str}", operation_id="get_workspace", summary="Get a workspace", responses=declared())
async def get_workspace(services: NamedDependency[Services], workspace_id: FromPath[str]) -> WorkspaceView:
    """A session's own workspace can be read like any other."""
    return workspace_view(services, await workspaces.get_workspace(services.database, workspace_id))


@patch(
    "/{workspace_id:str}", operation_id="update_workspace", summary="Update a workspace", responses=declared(409, 413)
)
async def update_workspace(
    services: NamedDependency[Services], workspace_id: FromPath[str], data: JSONBody[UpdateWorkspace]
) -> WorkspaceView:
    """An archived workspace only takes a `status`; `deleted` is for good."""
    changes = WorkspaceChanges(name=present(data.name), description=data.description, status=present(data.status))
    return workspace_view(services, await workspaces.update_workspace(services.database, workspace_id, changes))


@delete("/{workspace_id:str}", operation_id="delete_workspace", summary="Archive a workspace", responses=declared())
async def delete_workspace(services: NamedDependency[Services], workspace_id: FromPath[str]) -> None:
    """It takes no new sessions, and its files no changes over the API; the sessions that have it go on."""
    await workspaces.archive_workspace(services.database, workspace_id)


router = Router(
    "/workspaces",
    tags=["Workspaces"],
    route_handlers=[list_workspaces, create_workspace, get_workspace, update_workspace, delete_workspace],
)
