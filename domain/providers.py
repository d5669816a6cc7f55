"""Provider types: which driver speaks to them, where they live, and what credentials they take.

A provider whose type is not listed here can be stored (an embedding application may bring its own driver), but no model of it
runs on this installation.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct


class CredentialField(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input of a provider's credential form."""

    name: str
    label: str
    field_type: Literal["password", "text", "url"]
    required: bool
    placeholder: str | None = None
    help_text: str | None = None
    default_value: str | None = None
    group: str | None = None


class CredentialSchema(Struct, frozen=True, kw_only=True):
    instructions_markdown: str
    fields: list[CredentialField]


class ProviderType(Struct, frozen=True, kw_only=True):
    """`driver` is a key of `activities.llm.DRIVERS`. `base_url` None means that a provider must bring its own.

    `default_key` is the setting whose key is used when a provider has none of its own.
    """

    driver: Literal["openai_responses", "openai_chat", "anthropic", "llmsim"]
    display_name: str
    instructions: str
    base_url: str | None
    needs_key: bool = True
    default_key: str | None = None
    lists_models: bool = True
    guarded: bool = True
    """Whether failures open circuit breakers; a model's option `circuit_breaker` overrides it."""
    generation_url_template: str | None = None
    session_url_template: str | None = None

    @property
    def credential_schema(self) -> CredentialSchema:
        fields = [
            CredentialField(
                name=API_KEY,
                label="API key",
                field_type="password",
                required=self.needs_key,
                placeholder="sk-…" if self.needs_key else None,
            )
        ]
        return CredentialSchema(
            instructions_markdown=self.instructions, fields=[] if self.driver == "llmsim" else fields
        )


API_KEY: Final = "api_key"

PROVIDER_TYPES: Final[dict[str, ProviderType]] = {
    "anthropic": ProviderType(
        driver="anthropic",
        display_name="Anthropic",
        instructions="Create a key in the [Anthropic Console](https://console.anthropic.com/settings/keys).",
        base_url="https://api.anthropic.com",
        default_key="DEFAULT_ANTHROPIC_API_KEY",
    ),
    "azure_openai": ProviderType(
        driver="openai_responses",
        display_name="Azure OpenAI",
        instructions="`base_url` is the v1 endpoint of your resource, `https://{resource}.openai.azure.com/openai/v1/`; "
        "a model's `model_id` is the name of its deployment.",
        base_url=None,
        lists_models=False,
    ),
    "fireworks": ProviderType(
        driver="openai_chat",
        display_name="Fireworks AI",
        instructions="Create a key in the Fireworks [dashboard](https://app.fireworks.ai/settings/users/api-keys).",
        base_url="https://api.fireworks.ai/inference/v1/",
    ),
    "gemini": ProviderType(
        driver="openai_chat",
        display_name="Google Gemini",
        instructions="Create a key in [Google AI Studio](https://aistudio.google.com/apikey).",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai/",
        default_key="DEFAULT_GEMINI_API_KEY",
    ),
    "llmsim": ProviderType(
        driver="llmsim",
        display_name="Simulated",
        instructions="The simulated model runs inside the worker and needs no key.",
        base_url="",
        needs_key=False,
        lists_models=False,
        guarded=False,  # its failures are orders, not outages
    ),
    "openai": ProviderType(
        driver="openai_responses",
        display_name="OpenAI",
        instructions="Create a key on the [OpenAI platform](https://platform.openai.com/api-keys).",
        base_url="https://api.openai.com/v1/",
        default_key="DEFAULT_OPENAI_API_KEY",
    ),
    "openai_completions": ProviderType(
        driver="openai_chat",
        display_name="OpenAI-compatible",
        instructions="Any server with `/chat/completions` (vLLM, Ollama, LM Studio, llama.cpp, …): give its address as "
        "`base_url`. Servers without authentication need no key.",
        base_url=None,
        needs_key=False,
    ),
    "openrouter": ProviderType(
        driver="openai_chat",
        display_name="OpenRouter",
        instructions="Create a key on [OpenRouter](https://openrouter.ai/settings/keys).",
        base_url="https://openrouter.ai/api/v1/",
        generation_url_template="https://openrouter.ai/logs?id={response_id}",
        session_url_template="https://openrouter.ai/logs",
    ),
}

PREDEFINED_MODELS: Final[dict[str, tuple[str, ...]]] = {
    "openai": ("gpt-6.1-sol", "gpt-6-astra", "gpt-6.1-terra", "gpt-6-luna"),
    "anthropic": ("claude-opus-5-5", "claude-fable-5-2", "claude-sonnet-5-5", "claude-haiku-5-5"),
    "gemini": ("gemini-3.8-flash", "gemini-3.1-pro-preview", "gemini-3.5-flash-lite"),
}
"""Models that a provider begins with when it is made for a default key, the one to answer with first."""
