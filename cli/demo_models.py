"""Which model tells the demo's story: the one that was asked for, the flagship of a default key, or the simulated one.

The stack is the demo's own and gone at its end, so providers and models are added to it, and options changed, as needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import httpx
import msgspec
from msgspec import Struct

from cli.demo_client import call
from cli.demo_story import REAL, SIMULATED, AnyJson, DemoFailure, Teller
from db.dev_models import SIMULATED_MODEL
from domain.errors import InvalidInput
from domain.model_profiles import profile_of
from domain.provider_input import check_address, check_base_url
from domain.providers import API_KEY, PREDEFINED_MODELS, PROVIDER_TYPES

SIMULATION: Final = "llmsim"
RESUMABLE_DRIVER: Final = "openai_responses"
"""Its generations can go on at the provider without us, with the model's option `background`."""


class Wish(Struct, frozen=True, kw_only=True):
    """What the command line asked for. `key_variable` names the environment variable with the provider's key."""

    model: str | None = None
    provider: str | None = None
    base_url: str | None = None
    key_variable: str | None = None
    simulated: bool = False

    def check(self, keyed_types: Collection[str], environ: Mapping[str, str]) -> None:
        """Before anything is started. `keyed_types` are those with a default key. Raises `DemoFailure`."""
        if self.provider is None:
            self._check_without_provider()
            return
        known = PROVIDER_TYPES.get(self.provider)
        if known is None:
            raise DemoFailure(f"--provider was given `{self.provider}`; accepted: {', '.join(PROVIDER_TYPES)}")
        if self.simulated:
            raise DemoFailure("--simulated and --provider exclude each other")
        if self.key_variable is not None:
            if not environ.get(self.key_variable, "").strip():
                raise DemoFailure(f"--key-env was given `{self.key_variable}`, which is not set")
        elif known.needs_key and self.provider not in keyed_types:
            way = f"set {known.default_key}" if known.default_key else "name the variable that holds it with --key-env"
            raise DemoFailure(f"--provider {self.provider} needs a key; {way}")
        if self.model is None and self.provider not in PREDEFINED_MODELS and self.provider != SIMULATION:
            raise DemoFailure(f"--provider {self.provider} needs a --model, by the provider's name for it")
        try:
            if self.base_url is not None:
                check_base_url(self.base_url, "--base-url")
            check_address(self.provider, self.base_url)
        except InvalidInput as error:
            raise DemoFailure(error.message.replace("base_url", "--base-url")) from None

    def _check_without_provider(self) -> None:
        for option, given in (("--base-url", self.base_url), ("--key-env", self.key_variable)):
            if given is not None:
                raise DemoFailure(f"{option} needs a --provider; accepted: {', '.join(PROVIDER_TYPES)}")


def without_default_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which nothing but the simulated model answers."""
    variables = {known.default_key for known in PROVIDER_TYPES.values()}
    return {name: value for name, value in environ.items() if name not in variables}


async def choose(
    client: httpx.AsyncClient, wish: Wish, *, keyed_types: Collection[str], environ: Mapping[str, str]
) -> Teller:
    """Of a wish that was checked. Raises `DemoFailure`."""
    if wish.provider is not None:
        return await _of_provider(client, wish, wish.provider, environ)
    if wish.model is not None:
        return await _named(client, wish.model)
    vendor = next((name for name in PREDEFINED_MODELS if name in keyed_types), None)
    if vendor is None:
        return Teller(story=SIMULATED)
    return await _of_provider(client, wish, vendor, environ)


async def _named(client: httpx.AsyncClient, name: str) -> Teller:
    models = {str(model["model_id"]): model for model in await _models(client)}
    if name not in models:
        known = ", ".join(sorted(models))
        raise DemoFailure(f"there is no model `{name}`; there are {known}. --provider TYPE adds it to a provider")
    return await _teller(client, models[name])


async def _of_provider(client: httpx.AsyncClient, wish: Wish, provider_type: str, environ: Mapping[str, str]) -> Teller:
    """The wished model, or the flagship, on the provider of this type that is there, unless it has to be one of its own."""
    name = wish.model or PREDEFINED_MODELS.get(provider_type, (SIMULATED_MODEL,))[0]
    its_own = wish.base_url is not None or wish.key_variable is not None
    listed = [] if its_own else [one for one in await _models(client) if one["provider_type"] == provider_type]
    model = next((one for one in listed if one["model_id"] == name), None)
    if model is None:
        provider = listed[0]["provider_id"] if listed else await _add_provider(client, wish, provider_type, environ)
        profile = profile_of(name)
        body: AnyJson = {"model_id": name, "display_name": name if profile is None else profile.name}
        added = await call(client, "POST", f"providers/{provider}/models", body)
        model = await call(client, "GET", f"models/{added['id']}")
    return await _teller(client, model, wish)


async def _add_provider(client: httpx.AsyncClient, wish: Wish, provider_type: str, environ: Mapping[str, str]) -> str:
    body: AnyJson = {"name": PROVIDER_TYPES[provider_type].display_name, "provider_type": provider_type}
    if wish.base_url is not None:
        body["base_url"] = wish.base_url
    if wish.key_variable is not None:
        body[API_KEY] = environ[wish.key_variable]
    return str((await call(client, "POST", "providers", body))["id"])


async def _models(client: httpx.AsyncClient) -> list[AnyJson]:
    return msgspec.convert((await call(client, "GET", "models"))["data"], list[AnyJson])


async def _teller(client: httpx.AsyncClient, model: AnyJson, wish: Wish | None = None) -> Teller:
    provider_type, name = str(model["provider_type"]), str(model["model_id"])
    known = PROVIDER_TYPES[provider_type]
    if known.driver == SIMULATION:
        return Teller(story=SIMULATED, model_id=str(model["id"]))
    resumable = known.driver == RESUMABLE_DRIVER
    if resumable:
        await call(client, "PATCH", f"models/{model['id']}", {"options": {"background": True}})
    profile = profile_of(name)
    return Teller(
        story=REAL,
        model_id=str(model["id"]),
        model=name,
        provider=str(model["provider_name"]),
        address=wish and wish.base_url,
        key_variable=(wish and wish.key_variable) or known.default_key,
        background=resumable,
        is_priced=profile is not None and profile.cost is not None,
    )
