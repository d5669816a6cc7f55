"""What both OpenAI drivers share: clients with their connections, the errors of `openai_errors`, and the list of models.

A client, and with it its pool of connections, is kept per address and key. The SDK's own retries are off (there is one retry
table, and the SDK would retry an exhausted quota), and what it would take from the environment of an OpenAI user (organization,
project, extra headers) does not reach other people's servers. Proxies from the environment are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Final

from activities.llm.openai_errors import error_of, masked, model_error
from domain.model import DiscoveredModel, ModelEndpoint, ModelError, ModelErrorKind
from domain.providers import API_KEY, PROVIDER_TYPES
from domain.secret import Secret

__all__ = ["client_of", "error_of", "key_of", "list_models", "masked", "model_error"]

_MAX_CLIENTS: Final = 64
"""A process serves many organizations' keys. A client is made in a moment; what is worth keeping is in `_connections`."""

_CONNECT_TIMEOUT_SECONDS: Final = 10.0
_READ_TIMEOUT_SECONDS: Final = 600.0
"""Only a last resort: the engine gives up on a silent stream long before."""

_NO_KEY: Final = "no-key"
"""For servers without authentication: the SDK insists on sending something."""

_NOT_FOR_CHAT: Final = re.compile(
    r"(?:^|[-_/.:])(?:embed\w*|bge|whisper|tts|dall-e|gpt-image|image|imagen|veo|sora|lyria|moderation|transcribe|realtime"
    r"|live|audio|speech|rerank\w*|aqa|davinci|babbage)(?:$|[-_/.:\d])",
    re.IGNORECASE,
)


def key_of(endpoint: ModelEndpoint) -> Secret | None:
    """The endpoint's key, or None where none is needed. Raises `ModelError` when a required one is missing."""
    secret = endpoint.credentials.get(API_KEY)
    if secret is not None and secret.reveal().strip():
        return secret
    known = PROVIDER_TYPES.get(endpoint.provider_type)
    if known is not None and not known.needs_key:
        return None
    name = known.display_name if known else endpoint.provider_type
    which = f"{name} `{endpoint.provider_public_id}`" if endpoint.provider_public_id else name
    raise ModelError(ModelErrorKind.NOT_CONFIGURED, f"The provider {which} has no API key")


def client_of(endpoint: ModelEndpoint):
    """The endpoint's `AsyncOpenAI`. Raises `ModelError` when it has no address that can be used, or lacks its key.

    The type is inferred: to name it would import the SDK with this module.
    """
    known = PROVIDER_TYPES.get(endpoint.provider_type)
    base_url = endpoint.base_url or (known.base_url if known else None)
    if not base_url:
        raise ModelError(
            ModelErrorKind.NOT_CONFIGURED,
            f"The provider `{endpoint.provider_public_id or endpoint.provider_type}` has no base_url",
        )
    key = key_of(endpoint)
    try:
        return _client(base_url, key, endpoint.provider_type == "azure_openai")
    except Exception as error:
        raise model_error(error) from None


@cache
def _connections():
    """One pool for all keys, so that a client that falls out of the cache has nothing to close, and a stream on it goes on."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    import httpx2
    from openai import DefaultAsyncHttpxClient

    def one_key(request: httpx2.Request) -> httpx2.Request:
        if "api-key" in request.headers:
            # Azure takes a bearer token for one of Entra ID, and refuses it although the key beside it is right. The SDK insists
            # on sending one.
            request.headers.pop("authorization", None)
        return request

    return DefaultAsyncHttpxClient(
        timeout=_timeout(),
        auth=one_key,
        # What a server sets for one key must not go along with another.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        # A redirect would carry the conversation, and a key in a header of its own, to an address nobody has configured.
        follow_redirects=False,
    )


def _timeout():
    from openai import Timeout

    return Timeout(_READ_TIMEOUT_SECONDS, connect=_CONNECT_TIMEOUT_SECONDS)


@lru_cache(maxsize=_MAX_CLIENTS)
def _client(base_url: str, key: Secret | None, key_in_own_header: bool):
    from openai import AsyncOpenAI

    text = key.reveal().strip() if key else _NO_KEY
    client = AsyncOpenAI(
        api_key=text,
        admin_api_key="",
        base_url=base_url,
        max_retries=0,
        timeout=_timeout(),
        # An explicit header goes before one of OPENAI_CUSTOM_HEADERS.
        default_headers={"Authorization": f"Bearer {text}", **({"api-key": text} if key_in_own_header else {})},
        http_client=_connections(),
    )
    client.organization = None
    client.project = None
    return client


async def list_models(endpoint: ModelEndpoint) -> list[DiscoveredModel]:
    """The server's own list, without the models that cannot chat. Raises `ModelError`."""
    client = client_of(endpoint)
    try:
        answer = await client.get("/models", cast_to=object)
    except Exception as error:
        raise model_error(error) from None
    found = answer.get("data") or answer.get("models") if isinstance(answer, dict) else answer
    if not isinstance(found, list):
        raise ModelError(ModelErrorKind.SERVER_ERROR, "The provider's list of models could not be read")
    return list({model.model_id: model for model in _chat_models(found)}.values())


def _chat_models(entries: Iterable[object]) -> Iterable[DiscoveredModel]:
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
            continue
        model_id = entry["id"].removeprefix("models/")
        if _NOT_FOR_CHAT.search(model_id) or not _writes_text(entry):
            continue
        name = entry.get("name") or entry.get("display_name")
        yield DiscoveredModel(model_id=model_id, display_name=name if isinstance(name, str) else None)


def _writes_text(entry: Mapping[str, object]) -> bool:
    """OpenRouter tells each model's modalities; whoever tells nothing lists models that write text."""
    architecture = entry.get("architecture")
    modalities = architecture.get("output_modalities") if isinstance(architecture, Mapping) else None
    return not isinstance(modalities, list) or "text" in modalities
