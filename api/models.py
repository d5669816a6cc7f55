"""`/v1/models`."""

from __future__ import annotations

from litestar import Router, delete, get, patch
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import models
from domain.resources import Model, ModelChanges, ModelSource, ModelWithProvider


class UpdateModel(Struct, frozen=True, kw_only=True):
    """Absent and null fields stay as they are. `provider_id` moves the model to another provider."""

    provider_id: str | UnsetType | None = UNSET
    model_id: str | UnsetType | None = UNSET
    display_name: str | UnsetType | None = UNSET
    capabilities: list[str] | UnsetType | None = UNSET
    enabled: bool | UnsetType | None = UNSET
    is_favorite: bool | UnsetType | None = UNSET
    options: dict[str, object] | UnsetType | None = UNSET


class ModelView(Model, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class ModelWithProviderView(ModelWithProvider, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelView]
    total: int


class ModelWithProviderList(Struct, frozen=True, kw_only=True):
    data: list[ModelWithProviderView]
    total: int


def _links(services: Services, model: Model) -> tuple[str, list[AllowedAction]]:
    url = self_url(services, f"models/{model.id}")
    return url, actions(
        url,
        ("self", "GET", "", "get_model"),
        ("update", "PATCH", "", "update_model"),
        ("delete", "DELETE", "", "delete_model"),
    )


def model_view(services: Services, model: Model) -> ModelView:
    url, allowed = _links(services, model)
    return view(ModelView, model, self_url=url, allowed_actions=allowed)


def model_with_provider_view(services: Services, model: ModelWithProvider) -> ModelWithProviderView:
    url, allowed = _links(services, model)
    return view(ModelWithProviderView, model, self_url=url, allowed_actions=allowed)


@get("/", operation_id="list_all_models", summary="List models", responses=declared())
async def list_models(
    services: NamedDependency[Services],
    source: FromQuery[ModelSource | None] = None,
    favorites_only: FromQuery[bool] = False,
    include_stale: FromQuery[bool] = True,
) -> ModelWithProviderList:
    """The models of every provider. Stale ones came from a provider's list that does not name them any more."""
    found = await models.list_models(
        keyed_types=services.settings.default_keys,
        source=source,
        favorites_only=favorites_only,
        include_stale=include_stale,
    )
    return ModelWithProviderList(data=[model_with_provider_view(services, model) for model in found], total=len(found))


@get("/config", operation_id="model_config", summary="Model policies", responses=declared())
async def model_config() -> ConfigView:
    """What the caller may do with models."""
    return resource_config("models")


@get("/{model_id:str}", operation_id="get_model", summary="Get a model", responses=declared())
async def get_model(services: NamedDependency[Services], model_id: FromPath[str]) -> ModelWithProviderView:
    """With its provider, its profile, and whether it can be used."""
    found = await models.get_model(model_id, keyed_types=services.settings.default_keys)
    return model_with_provider_view(services, found)


@patch("/{model_id:str}", operation_id="update_model", summary="Update a model", responses=declared(409, 413))
async def update_model(
    services: NamedDependency[Services], model_id: FromPath[str], data: JSONBody[UpdateModel]
) -> ModelView:
    """A disabled model is not selectable any more; sessions that name it have no model until they name another."""
    changes = ModelChanges(
        provider_id=present(data.provider_id),
        model_id=present(data.model_id),
        display_name=present(data.display_name),
        capabilities=present(data.capabilities),
        enabled=present(data.enabled),
        is_favorite=present(data.is_favorite),
        options=present(data.options),
    )
    changes.check()
    if changes.options is not UNSET or changes.provider_id is not UNSET:
        await _check_options(services, model_id, changes)
    return model_view(services, await models.update_model(model_id, changes))


async def _check_options(services: Services, model_id: str, changes: ModelChanges) -> None:
    """The options that the model would have, for the driver that it would have."""
    model = await models.get_model(model_id, keyed_types=())
    provider_type = model.provider_type
    if changes.provider_id is not UNSET:
        provider_type = (await models.target_provider(changes.provider_id)).provider_type
    services.check_model_options(provider_type, model.options if changes.options is UNSET else changes.options)


@delete("/{model_id:str}", operation_id="delete_model", summary="Delete a model", responses=declared())
async def delete_model(model_id: FromPath[str]) -> None:
    """Whatever named it as its model falls back to the next layer's, in the end to the organization's default."""
    await models.delete_model(model_id)


router = Router(
    "/models",
    tags=["Models"],
    route_handlers=[list_models, model_config, get_model, update_model, delete_model],
)
