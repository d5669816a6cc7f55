"""`/v1/harnesses` and `/v1/harness-examples`."""

from __future__ import annotations

from typing import Annotated

from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import UNSET, Struct, UnsetType

from api.caller import Caller
from api.capability_refs import checked_refs
from api.examples import HARNESS_EXAMPLES, HarnessExample
from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.requests import LayerRequest, present
from api.scoped_servers import with_sealed_servers
from api.services import Services
from db import harnesses, session_stats
from domain.errors import NotFound
from domain.limits import check_name
from domain.resources import Harness, HarnessChanges, Lifecycle, ResourceStats


class CreateHarness(LayerRequest, frozen=True, kw_only=True):
    """`name` is a slug, unique among the organization's active harnesses."""

    name: str
    display_name: str | None = None
    description: str | None = None
    default_model_id: str | None = None
    fallback_model_ids: list[str] | None = None
    parent_harness_id: str | None = None
    embedder_metadata: dict[str, str] | None = None


class UpdateHarness(LayerRequest, frozen=True, kw_only=True):
    """Absent fields stay as they are. `parent_harness_id: null` ends the inheritance; `status` archives and reactivates."""

    name: str | UnsetType | None = UNSET
    display_name: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    default_model_id: str | UnsetType | None = UNSET
    fallback_model_ids: list[str] | UnsetType | None = UNSET
    parent_harness_id: str | UnsetType | None = UNSET
    embedder_metadata: dict[str, str] | UnsetType | None = UNSET
    status: Lifecycle | UnsetType | None = UNSET


class HarnessView(Harness, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]
    session_count: int | None = None
    app_count: int | None = None


class HarnessList(Struct, frozen=True, kw_only=True):
    data: list[HarnessView]
    total: int


class NameAvailability(Struct, frozen=True, kw_only=True):
    available: bool


async def changes_of(services: Services, data: CreateHarness | UpdateHarness, caller: Caller) -> HarnessChanges:
    """The body as changes; a blank prompt is no prompt."""
    capabilities = data.refs()
    if capabilities is not UNSET:
        capabilities = await checked_refs(services, capabilities, caller)
    prompt = data.system_prompt
    return HarnessChanges(
        name=present(data.name),
        display_name=data.display_name,
        description=data.description,
        system_prompt=None if isinstance(prompt, str) and not prompt.strip() else prompt,
        default_model_id=data.default_model_id,
        fallback_model_ids=present(data.fallback_model_ids),
        parent_harness_id=data.parent_harness_id,
        embedder_metadata=data.embedder_metadata,
        capabilities=capabilities,
        initial_files=present(data.initial_files),
        tags=present(data.tags),
        mcp_servers=data.servers(),
        network_access=data.network_access,
        parallel_tool_calls=data.parallel_tool_calls,
        status=present(data.status) if isinstance(data, UpdateHarness) else UNSET,
    )


def harness_view(services: Services, harness: Harness, session_count: int | None = None) -> HarnessView:
    url = self_url(services, f"harnesses/{harness.id}")
    items = [("self", "GET", "", "get_harness"), ("copy", "POST", "/copy", "copy_harness")]
    if harness.status is Lifecycle.ARCHIVED:
        items += [("unarchive", "PATCH", "", "update_harness"), ("delete", "POST", "/delete", "purge_harness")]
    elif not harness.is_built_in:
        items += [("update", "PATCH", "", "update_harness"), ("delete", "DELETE", "", "delete_harness")]
    return view(
        HarnessView,
        harness,
        self_url=url,
        allowed_actions=actions(url, *items),
        session_count=session_count,
        app_count=None if session_count is None else 0,
    )


@get("/", operation_id="list_harnesses", summary="List harnesses", responses=declared())
async def list_harnesses(
    services: NamedDependency[Services],
    search: FromQuery[str | None] = None,
    include_archived: FromQuery[bool] = False,
) -> HarnessList:
    """Every harness, newest first. Each word of `search` must occur in the name or the description."""
    found = await harnesses.list_harnesses(search=search, include_archived=include_archived)
    counts = await session_stats.sessions_by_harness(services.database)
    views = [harness_view(services, harness, counts.get(harness.id, 0)) for harness in found]
    return HarnessList(data=views, total=len(views))


@post("/", operation_id="create_harness", summary="Create a harness", responses=declared(409, 413))
async def create_harness(
    services: NamedDependency[Services], caller: NamedDependency[Caller], data: JSONBody[CreateHarness]
) -> HarnessView:
    """The server assigns the id."""
    changes = await with_sealed_servers(services, await changes_of(services, data, caller))
    return harness_view(services, await harnesses.create_harness(changes))


@get("/check-name", operation_id="check_harness_name", summary="Check a harness name", responses=declared())
async def check_harness_name(name: FromQuery[str], exclude_id: FromQuery[str | None] = None) -> NameAvailability:
    """Whether an active harness other than `exclude_id` has this name."""
    check_name(name)
    return NameAvailability(available=await harnesses.harness_name_is_free(name, exclude_id))


@get("/config", operation_id="harness_config", summary="Harness policies", responses=declared())
async def harness_config() -> ConfigView:
    """What the caller may do with harnesses."""
    return resource_config("harnesses")


@post("/import", operation_id="import_harness", summary="Create a harness from an example", responses=declared(409))
async def import_harness(
    services: NamedDependency[Services],
    example_name: Annotated[str, QueryParameter(name="from-example", description="Name of a harness example.")],
) -> HarnessView:
    """A harness of the organization with the content of a built-in example."""
    example = next((example for example in HARNESS_EXAMPLES if example.name == example_name), None)
    if example is None:
        raise NotFound(f"There is no harness example `{example_name[:80]}`")
    parent = await harnesses.get_harness(example.parent_name) if example.parent_name else None
    created = await harnesses.create_harness(
        HarnessChanges(
            name=example.name,
            display_name=example.display_name,
            description=example.description,
            capabilities=example.capabilities,
            tags=example.tags,
            parent_harness_id=parent.id if parent else None,
        )
    )
    return harness_view(services, created)


@get("/{harness_id:str}", operation_id="get_harness", summary="Get a harness", responses=declared())
async def get_harness(services: NamedDependency[Services], harness_id: FromPath[str]) -> HarnessView:
    """By id or by name."""
    harness = await harnesses.get_harness(harness_id)
    counts = await session_stats.sessions_by_harness(services.database)
    return harness_view(services, harness, counts.get(harness.id, 0))


@patch(
    "/{harness_id:str}", operation_id="update_harness", summary="Update a harness", responses=declared(403, 409, 413)
)
async def update_harness(
    services: NamedDependency[Services],
    caller: NamedDependency[Caller],
    harness_id: FromPath[str],
    data: JSONBody[UpdateHarness],
) -> HarnessView:
    """Sessions see the change at their next turn."""
    changes = await changes_of(services, data, caller)
    changes = await with_sealed_servers(services, changes, "harnesses", owner_id=harness_id)
    return harness_view(services, await harnesses.update_harness(harness_id, changes))


@delete("/{harness_id:str}", operation_id="delete_harness", summary="Archive a harness", responses=declared(403))
async def delete_harness(harness_id: FromPath[str]) -> None:
    """Archived harnesses take no new sessions; the sessions that have it go on."""
    await harnesses.archive_harness(harness_id)


@post(
    "/{harness_id:str}/delete",
    operation_id="purge_harness",
    summary="Delete an archived harness",
    status_code=204,
    responses=declared(403, 409),
)
async def purge_harness(harness_id: FromPath[str]) -> None:
    """For good: no request finds it again."""
    await harnesses.delete_harness(harness_id)


@post("/{harness_id:str}/copy", operation_id="copy_harness", summary="Copy a harness", responses=declared(409))
async def copy_harness(services: NamedDependency[Services], harness_id: FromPath[str]) -> HarnessView:
    """The copy is called `{name} (copy)` and can be edited, even when the original is built in."""
    return harness_view(services, await harnesses.copy_harness(harness_id))


@get("/{harness_id:str}/stats", operation_id="get_harness_stats", summary="Harness statistics", responses=declared())
async def get_harness_stats(services: NamedDependency[Services], harness_id: FromPath[str]) -> ResourceStats:
    """Sessions, turns and tokens over all sessions of the harness."""
    harness = await harnesses.get_harness(harness_id)
    return await session_stats.resource_stats(services.database, "harness_id", harness.id)


@get(
    "/harness-examples",
    operation_id="list_harness_examples",
    summary="List harness examples",
    tags=["Harnesses"],
    responses=declared(),
)
async def list_harness_examples() -> list[HarnessExample]:
    """Built-in examples; `POST /v1/harnesses/import?from-example=` makes one your own."""
    return HARNESS_EXAMPLES


router = Router(
    "/harnesses",
    tags=["Harnesses"],
    route_handlers=[
        list_harnesses,
        create_harness,
        check_harness_name,
        harness_config,
        import_harness,
        get_harness,
        update_harness,
        delete_harness,
        purge_harness,
        copy_harness,
        get_harness_stats,
    ],
)
