"""`/v1/providers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import structlog
from litestar import Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.links import actions, resource_config, self_url, view
from api.models import ModelList, ModelView, model_view
from api.problems import AllowedAction, declared
from api.requests import present
from api.services import Services
from db import model_sync, models, providers
from domain.errors import Conflict, KeyRefused, ProviderUnavailable
from domain.model import DiscoveredModel, ModelError, ModelErrorKind
from domain.providers import API_KEY, PROVIDER_TYPES, CredentialSchema
from domain.resources import ModelChanges, Provider, ProviderChanges, ProviderStatus
from domain.secret import Secret
from infra.encryption import UndecryptableSecret

KEY_PROBLEMS: Final = frozenset({ModelErrorKind.AUTHENTICATION, ModelErrorKind.ATTESTATION_REQUIRED})

log = structlog.get_logger("api.providers")


class TraceInput(Struct, frozen=True, kw_only=True):
    """`enabled` shows the links. A template that is null falls back to the provider type's, an absent one stays."""

    enabled: bool
    session_url_template: str | UnsetType | None = UNSET
    generation_url_template: str | UnsetType | None = UNSET

    def values(self) -> dict[str, object]:
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in given.items() if value is not UNSET}


class CreateProvider(Struct, frozen=True, kw_only=True):
    """`credentials` by the field names of `GET /v1/providers/config`; `api_key` is short for the field of that name.

    With both, `credentials` count. They are write-only.
    """

    name: str
    provider_type: str
    base_url: str | None = None
    api_key: str | None = None
    credentials: dict[str, str] | None = None
    trace: TraceInput | None = None

    def __repr__(self) -> str:
        return f"CreateProvider(name={self.name!r})"


class UpdateProvider(Struct, frozen=True, kw_only=True):
    """Absent fields stay as they are, and so do null ones, but for `base_url` and `trace`, which null gives back to the type.

    An empty `api_key` forgets the key; `credentials` replace what is stored as a whole.
    """

    name: str | UnsetType | None = UNSET
    provider_type: str | UnsetType | None = UNSET
    base_url: str | UnsetType | None = UNSET
    api_key: str | UnsetType | None = UNSET
    credentials: dict[str, str] | UnsetType | None = UNSET
    trace: TraceInput | UnsetType | None = UNSET
    status: ProviderStatus | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return f"UpdateProvider(name={self.name!r})"


class CreateModel(Struct, frozen=True, kw_only=True):
    """`options` belong to the provider's driver; llmsim takes `{"script": {…}}`."""

    model_id: str
    display_name: str
    capabilities: list[str] = []
    enabled: bool = True
    is_favorite: bool = False
    options: dict[str, object] = {}


class ProviderView(Provider, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class ProviderList(Struct, frozen=True, kw_only=True):
    data: list[ProviderView]
    total: int


class DriverCredentials(Struct, frozen=True, kw_only=True):
    """The credential form of a provider type."""

    driver: str
    supports_oauth: bool
    credential_schema: CredentialSchema


class ProvidersConfig(Struct, frozen=True, kw_only=True):
    policies: dict[str, bool]
    drivers: list[DriverCredentials]


class SyncedModels(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`created`, `updated` and `stale` count models; `not_supported` comes alone."""

    status: Literal["success", "not_supported"]
    created: int | None = None
    updated: int | None = None
    stale: int | None = None


def provider_view(services: Services, provider: Provider) -> ProviderView:
    url = self_url(services, f"providers/{provider.id}")
    allowed = actions(
        url,
        ("self", "GET", "", "get_provider"),
        ("update", "PATCH", "", "update_provider"),
        ("delete", "DELETE", "", "delete_provider"),
        ("models", "GET", "/models", "list_provider_models"),
        ("sync-models", "POST", "/sync-models", "sync_models"),
    )
    return view(ProviderView, provider, self_url=url, allowed_actions=allowed)


def _credentials(
    api_key: str | UnsetType | None, credentials: Mapping[str, str] | UnsetType | None
) -> dict[str, Secret] | UnsetType | None:
    if isinstance(credentials, Mapping):
        return {name: Secret(value) for name, value in credentials.items()}
    if not isinstance(api_key, str):
        return UNSET
    return {API_KEY: Secret(api_key)} if api_key.strip() else None


@get("/", operation_id="list_providers", summary="List providers", responses=declared())
async def list_providers(services: NamedDependency[Services]) -> ProviderList:
    """Where models run."""
    found = await providers.list_providers()
    return ProviderList(data=[provider_view(services, provider) for provider in found], total=len(found))


@post("/", operation_id="create_provider", summary="Create a provider", responses=declared(409, 413, 503))
async def create_provider(services: NamedDependency[Services], data: JSONBody[CreateProvider]) -> ProviderView:
    """Of a type that `GET /v1/providers/config` lists, or of any other, for which nothing here can run models."""
    changes = ProviderChanges(
        name=data.name,
        provider_type=data.provider_type,
        base_url=data.base_url or None,
        credentials=_credentials(data.api_key, data.credentials),
        trace=UNSET if data.trace is None else data.trace.values(),
    )
    return provider_view(services, await providers.create_provider(changes, services.keyring))


@get("/config", operation_id="provider_config", summary="Provider policies and forms", responses=declared())
async def provider_config() -> ProvidersConfig:
    """What the caller may do with providers, and the credentials that each provider type takes."""
    return ProvidersConfig(
        policies=resource_config("providers").policies,
        drivers=[
            DriverCredentials(driver=name, supports_oauth=False, credential_schema=known.credential_schema)
            for name, known in sorted(PROVIDER_TYPES.items())
        ],
    )


@get("/{provider_id:str}", operation_id="get_provider", summary="Get a provider", responses=declared())
async def get_provider(services: NamedDependency[Services], provider_id: FromPath[str]) -> ProviderView:
    """Keys are never shown."""
    return provider_view(services, await providers.get_provider(provider_id))


@patch(
    "/{provider_id:str}",
    operation_id="update_provider",
    summary="Update a provider",
    responses=declared(409, 413, 503),
)
async def update_provider(
    services: NamedDependency[Services], provider_id: FromPath[str], data: JSONBody[UpdateProvider]
) -> ProviderView:
    """Turns see the change from their next model call on. The models of a disabled provider are not called."""
    changes = ProviderChanges(
        name=present(data.name),
        provider_type=present(data.provider_type),
        base_url=data.base_url or None if data.base_url is not UNSET else UNSET,
        credentials=_credentials(data.api_key, data.credentials),
        trace=data.trace.values() if isinstance(data.trace, TraceInput) else data.trace,
        status=present(data.status),
    )
    return provider_view(services, await providers.update_provider(provider_id, changes, services.keyring))


@delete("/{provider_id:str}", operation_id="delete_provider", summary="Delete a provider", responses=declared())
async def delete_provider(provider_id: FromPath[str]) -> None:
    """With its models and its key. Whatever named one of its models falls back to the next layer's."""
    await providers.delete_provider(provider_id)


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
    provider = await providers.get_provider(provider_id)
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


@post(
    "/{provider_id:str}/sync-models",
    operation_id="sync_models",
    summary="Sync models with the provider's list",
    status_code=200,
    responses=declared(409, 502),
)
async def sync_models(services: NamedDependency[Services], provider_id: FromPath[str]) -> SyncedModels:
    """Adds the models the provider lists, and marks those that came from its list and are gone from it as stale."""
    found = await _discovered(services, provider_id)
    if found is None:
        return SyncedModels(status="not_supported")
    counts = await model_sync.record_models(services.database, provider_id, found)
    return SyncedModels(status="success", created=counts.created, updated=counts.updated, stale=counts.stale)


async def _discovered(services: Services, provider_id: str) -> list[DiscoveredModel] | None:
    """Raises `KeyRefused`, `Conflict` or `ProviderUnavailable`, in words of ours; the provider's are in the log."""
    try:
        endpoint = await providers.find_endpoint(provider_id, services.keyring, services.settings.default_keys)
        return await services.discover_models(endpoint)
    except UndecryptableSecret as error:
        log.warning("stored credentials cannot be read", provider_id=provider_id, reason=error.reason)
        raise Conflict("The provider's stored key cannot be read; set it again", field=API_KEY) from None
    except ModelError as error:
        log.warning("model list failed", provider_id=provider_id, kind=error.kind, error=error.message)
        if error.kind in KEY_PROBLEMS:
            raise KeyRefused from None
        if error.kind is ModelErrorKind.NOT_CONFIGURED:
            raise Conflict("The provider has no API key, or no address; set it first") from None
        raise ProviderUnavailable from None


router = Router(
    "/providers",
    tags=["Providers"],
    route_handlers=[
        list_providers,
        create_provider,
        provider_config,
        get_provider,
        update_provider,
        delete_provider,
        list_provider_models,
        create_model,
        sync_models,
    ],
)
