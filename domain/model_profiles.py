"""What is known about current models: limits, prices, modalities, and which request options they take.

The data stands in `model_profiles.json` beside this module, by vendor. A profile is found by the vendor's own name for the model,
without a date or `-latest` suffix and without the routing prefix of an aggregator (`openai/gpt-…` at OpenRouter).

Prices are the vendor's list prices of its ordinary service tier. What another host of the same model takes is not known here; a
price that could not be confirmed is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.resources import files
from typing import Final, Literal

import msgspec
from msgspec import Struct

from domain.events import TokenUsage

Modality = Literal["text", "image", "audio", "video", "pdf"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

TOKENS_PER_PRICE: Final = 1_000_000

_SUFFIX: Final = re.compile(r"-(\d{4}-\d{2}-\d{2}|20\d{6}|\d{2}-20\d{2}|latest|preview|exp)$")
_P_FOR_DOT: Final = re.compile(r"(?<=\d)p(?=\d)")


class CostTier(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Prices for a whole request whose prompt is longer than `above_tokens`."""

    above_tokens: int
    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None


class ModelCost(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """US dollars per million tokens. Without `cache_read` a cached token costs as much as another; so with `cache_write`."""

    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None
    cost_tiers: list[CostTier] | None = None


class ModelLimits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens. `input` where it is less than `context` minus `output`."""

    context: int
    output: int
    input: int | None = None
    max_media: int | None = None


class ModelModalities(Struct, frozen=True, kw_only=True, omit_defaults=True):
    input: list[Modality]
    output: list[Modality]


class EffortValue(Struct, frozen=True, kw_only=True):
    name: str
    value: ReasoningEffort


class EffortConfig(Struct, frozen=True, kw_only=True):
    default: ReasoningEffort
    values: list[EffortValue]


class ModelProfile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Read-only facts about a model. `supported_parameters`: of temperature, top_p, verbosity, speed, parallel_tool_calls."""

    name: str
    family: str
    attachment: bool
    """Whether it takes images or files."""
    reasoning: bool
    temperature: bool
    tool_call: bool
    structured_output: bool
    open_weights: bool
    vendor: str
    description: str | None = None
    knowledge: str | None = None
    release_date: str | None = None
    last_updated: str | None = None
    cost: ModelCost | None = None
    limits: ModelLimits | None = None
    modalities: ModelModalities | None = None
    reasoning_effort: EffortConfig | None = None
    supported_parameters: list[str] | None = None
    supports_phases: bool | None = None
    tool_search: bool | None = None

    def takes(self, parameter: str) -> bool:
        return self.supported_parameters is None or parameter in self.supported_parameters

    @property
    def takes_images(self) -> bool:
        return self.modalities is None or "image" in self.modalities.input

    @property
    def capabilities(self) -> list[str]:
        """The tags of a model that nobody described by hand."""
        tags = {"tools": self.tool_call, "vision": self.attachment and self.takes_images, "thinking": self.reasoning}
        return ["text", *(tag for tag, has in tags.items() if has)]


@cache
def profiles() -> dict[str, ModelProfile]:
    """Every profile by the vendor's name for the model, in lower case."""
    text = files("domain").joinpath("model_profiles.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, ModelProfile])


@lru_cache(maxsize=4096)
def profile_of(model_id: str) -> ModelProfile | None:
    """The profile of a model as any provider names it, or None for a model nothing is known about."""
    known = profiles()
    return next((known[name] for name in _spellings(model_id) if name in known), None)


def _spellings(model_id: str) -> Iterator[str]:
    """The vendor's name for what a provider calls `model_id`, the likeliest first."""
    # `models/gemini-…`, `openai/gpt-…`, `accounts/fireworks/models/…`; `:free` and `:nitro` are routes, `:20b` is a size.
    name = model_id.lower().rpartition("/")[2]
    for spelled in (name, name.replace(":", "-"), name.partition(":")[0]):
        for undated in (spelled, _shortened(spelled)):
            yield undated
            # `claude-opus-5.5` at aggregators is `claude-opus-5-5`; a dot is `p` at Fireworks.
            yield undated.replace(".", "-")
            yield _P_FOR_DOT.sub(".", undated)


def _shortened(name: str) -> str:
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return name


def with_cost(usage: TokenUsage, profile: ModelProfile | None) -> TokenUsage:
    """The usage of one call with its cost: the provider's own figure when it gave one, the price list's estimate beside it."""
    estimated = None if profile is None or profile.cost is None else _estimate(usage, profile.cost)
    effective = estimated if usage.actual_cost_usd is None else usage.actual_cost_usd
    return msgspec.structs.replace(usage, estimated_cost_usd=estimated, effective_cost_usd=effective)


def _estimate(usage: TokenUsage, cost: ModelCost) -> float:
    """The tier is chosen by the whole prompt, cached tokens included, and its prices hold for the whole request."""
    reached = [tier for tier in cost.cost_tiers or () if usage.prompt_tokens > tier.above_tokens]
    price = max(reached, key=lambda tier: tier.above_tokens, default=cost)
    cache_read = price.input if price.cache_read is None else price.cache_read
    cache_write = price.input if price.cache_write is None else price.cache_write
    return (
        usage.input_tokens * price.input
        + usage.output_tokens * price.output
        + (usage.cache_read_tokens or 0) * cache_read
        + (usage.cache_creation_tokens or 0) * cache_write
    ) / TOKENS_PER_PRICE
