"""`/v1/models` and `/v1/providers`."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import models
from domain.resources import Model, ModelChanges, ModelSource, ModelWithProvider, Provider


class CreateModel(Struct, frozen=True, kw_only=True):
    """`options` belong to the provider's driver; llmsim takes `{"script": {…}}`."""

    model_id: str
    display_name: str
    capabilities: list[str] = []
    enabled: bool = True
    is_favorite: bool = False
    options: dict[str, object] = {}


class UpdateModel(Struct, frozen=True, kw_only=True):
    """Absent and null fields stay as they are."""

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


class ProviderView(Provider, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelView]
    total: int


class ModelWithProviderList(Struct, frozen=True, kw_only=True):
    data: list[ModelWithProviderView]
    total: int


class ProviderList(Struct, frozen=True, kw_only=True):
    data: list[ProviderView]
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


def provider_view(services: Services, provider: Provider) -> ProviderView:
    return view(ProviderView, provider, self_url=self_url(services, f"providers/{provider.id}"))


@get("/", operation_id="list_all_models", summary="List models", responses=declared())
async def list_models(
    services: NamedDependency[Services],
    source: FromQuery[ModelSource | None] = None,
    favorites_only: FromQuery[bool] = False,
) -> ModelWithProviderList:
    """The models of every provider."""
    found = await models.list_models(source=source, favorites_only=favorites_only)
    return ModelWithProviderList(data=[model_with_provider_view(services, model) for model in found], total=len(found))


@get("/config", operation_id="model_config", summary="Model policies", responses=declared())
async def model_config() -> ConfigView:
    """What the caller may do with models."""
    return resource_config("models")


@get("/{model_id:str}", operation_id="get_model", summary="Get a model", responses=declared())
async def get_model(services: NamedDependency[Services], model_id: FromPath[str]) -> ModelWithProviderView:
    """With its provider and whether it can be used."""
    return model_with_provider_view(services, await models.get_model(model_id))


@patch("/{model_id:str}", operation_id="update_model", summary="Update a model", responses=declared(409, 413))
async def update_model(
    services: NamedDependency[Services], model_id: FromPath[str], data: JSONBody[UpdateModel]
) -> ModelView:
    """A disabled model is not selectable any more; sessions that name it have no model until they name another."""
    options = present(data.options)
    if options is not UNSET:
        services.check_model_options((await models.get_model(model_id)).provider_type, options)
    changes = ModelChanges(
        model_id=present(data.model_id),
        display_name=present(data.display_name),
        capabilities=present(data.capabilities),
        enabled=present(data.enabled),
        is_favorite=present(data.is_favorite),
        options=options,
    )
    return model_view(services, await models.update_model(model_id, changes))


@delete("/{model_id:str}", operation_id="delete_model", summary="Delete a model", responses=declared())
async def delete_model(model_id: FromPath[str]) -> None:
    """Whatever named it as its model falls back to the next layer's, in the end to the organization's default."""
    await models.delete_model(model_id)


@get("/", operation_id="list_providers", summary="List providers", responses=declared())
async def list_providers(services: NamedDependency[Services]) -> ProviderList:
    """Where models run."""
    found = await models.list_providers()
    return ProviderList(data=[provider_view(services, provider) for provider in found], total=len(found))


@get("/config", operation_id="provider_config", summary="Provider policies", responses=declared())
async def provider_config() -> ConfigView:
    """What the caller may do with providers."""
    return resource_config("providers")


@get("/{provider_id:str}", operation_id="get_provider", summary="Get a provider", responses=declared())
async def get_provider(services: NamedDependency[Services], provider_id: FromPath[str]) -> ProviderView:
    """Keys are never shown."""
    return provider_view(services, await models.get_provider(provider_id))


@get(
    "/{provider_id:str}/models",
    operation_id="list_provider_models",
    summary="List a provider's models",
    responses=declared(),
)
async def list_provider_models(services: NamedDependency[Services], provider_id: FromPath[str]) -> ModelList:
    """In the order they were added."""
    found = await models.list_provider_models(provider_id)
    return ModelList(data=[model_view(services, model) for model in found], total=len(found))


@post(
    "/{provider_id:str}/models",
    operation_id="create_model",
    summary="Add a model to a provider",
    responses=declared(409, 413),
)
async def create_model(
    services: NamedDependency[Services], provider_id: FromPath[str], data: JSONBody[CreateModel]
) -> ModelView:
    """`model_id` is the provider's name for the model and unique among its models."""
    provider = await models.get_provider(provider_id)
    services.check_model_options(provider.provider_type, data.options)
    changes = ModelChanges(
        model_id=data.model_id,
        display_name=data.display_name,
        capabilities=data.capabilities,
        enabled=data.enabled,
        is_favorite=data.is_favorite,
        options=data.options,
    )
    return model_view(services, await models.create_model(provider_id, changes))


models_router = Router(
    "/models",
    tags=["Models"],
    route_handlers=[list_models, model_config, get_model, update_model, delete_model],
)
providers_router = Router(
    "/providers",
    tags=["Providers"],
    route_handlers=[list_providers, provider_config, get_provider, list_provider_models, create_model],
)
