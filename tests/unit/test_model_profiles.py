"""What is known about models: found under every spelling, sound in itself, and priced right."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from domain.events import TokenUsage
from domain.model_profiles import CostTier, Modality, ModelCost, ModelProfile, profile_of, profiles, with_cost
from domain.providers import PREDEFINED_MODELS, PROVIDER_TYPES

PARAMETERS = {"temperature", "top_p", "verbosity", "speed", "parallel_tool_calls"}
ACCEPTED_VENDORS = {"openai", "anthropic", "google", "nvidia", "qwen", "microsoft", "minimax", "moonshot", "xai"}


def profile(cost: ModelCost | None) -> ModelProfile:
    return structs.replace(profiles()["gpt-5"], cost=cost)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_every_vendor_that_clients_know_has_current_models() -> None:
    assert {one.vendor for one in profiles().values()} >= ACCEPTED_VENDORS
    assert len(profiles()) >= 60


@pytest.mark.parametrize("name", sorted(profiles()))
def test_a_profile_does_not_contradict_itself(name: str) -> None:
    one = profiles()[name]
    assert name == name.lower()
    assert one.limits is not None
    assert one.modalities is not None
    assert 0 < one.limits.output <= one.limits.context
    assert (one.limits.input or 0) <= one.limits.context
    assert set(one.modalities.input) <= set(get_args(Modality))
    assert one.attachment == (set(one.modalities.input) != {"text"})
    assert set(one.supported_parameters or ()) <= PARAMETERS
    assert one.takes("temperature") == one.temperature
    if one.reasoning_effort is not None:
        assert one.reasoning
        assert one.reasoning_effort.default in [value.value for value in one.reasoning_effort.values]
    if one.cost is not None:
        bounds = [tier.above_tokens for tier in one.cost.cost_tiers or ()]
        assert bounds == sorted(set(bounds))
        assert (one.cost.cache_read or 0) <= one.cost.input < one.cost.output
        assert all(tier.input > one.cost.input for tier in one.cost.cost_tiers or ())


def test_the_models_a_default_key_brings_are_described_and_called_by_a_driver() -> None:
    for provider_type, names in PREDEFINED_MODELS.items():
        assert PROVIDER_TYPES[provider_type].default_key is not None
        for name in names:
            one = profiles()[name]
            assert one.tool_call, name
            assert one.cost is not None, name
    assert set(PREDEFINED_MODELS) == {name for name, known in PROVIDER_TYPES.items() if known.default_key}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("gpt-5.5", "gpt-5.5"),
        ("gpt-5.5-2026-04-23", "gpt-5.5"),
        ("openai/gpt-5.5", "gpt-5.5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-opus-4-6-latest", "claude-opus-4-6"),
        ("anthropic/claude-opus-5.5", "claude-opus-5-5"),
        ("models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("gemini-2.5-flash-preview-09-2025", "gemini-2.5-flash"),
        ("google/gemini-3.1-pro-preview", "gemini-3.1-pro-preview"),
        ("openai/gpt-oss-120b:free", "gpt-oss-120b"),
        ("gpt-oss:20b", "gpt-oss-20b"),
        ("accounts/fireworks/models/glm-4p6", "glm-4.6"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("MiniMax-M3", "minimax-m3"),
    ],
)
def test_a_model_is_known_under_the_names_that_providers_give_it(spelled: str, name: str) -> None:
    assert profile_of(spelled) == profiles()[name]


@pytest.mark.parametrize(
    "name", ["", "/", "gpt-55", "gpt-5.5-turbo", "my-deployment", "llmsim-model", "latest", "-preview"]
)
def test_a_model_nothing_is_known_about_has_no_profile(name: str) -> None:
    assert profile_of(name) is None


@given(st.text(max_size=40))
def test_any_name_may_be_looked_up(name: str) -> None:
    assert profile_of(name) in (None, *profiles().values())


# --- costs ------------------------------------------------------------------------------------------------------------

counts = st.integers(0, 5_000_000)
prices = st.floats(0, 1_000, allow_nan=False)
usages = st.builds(
    TokenUsage,
    input_tokens=counts,
    output_tokens=counts,
    cache_read_tokens=st.none() | counts,
    cache_creation_tokens=st.none() | counts,
    actual_cost_usd=st.none() | st.floats(0, 100, allow_nan=False),
)
tiers = st.builds(CostTier, above_tokens=counts, input=prices, output=prices, cache_read=st.none() | prices)
costs = st.builds(
    ModelCost,
    input=prices,
    output=prices,
    cache_read=st.none() | prices,
    cache_write=st.none() | prices,
    cost_tiers=st.none() | st.lists(tiers, max_size=3),
)


def test_each_bucket_costs_its_own_price() -> None:
    cost = ModelCost(input=4, output=20, cache_read=0.2, cache_write=5)
    usage = TokenUsage(
        input_tokens=1_000_000, output_tokens=100_000, cache_read_tokens=500_000, cache_creation_tokens=10_000
    )
    assert with_cost(usage, profile(cost)).estimated_cost_usd == pytest.approx(4 + 2 + 0.1 + 0.05)


def test_a_cache_without_a_price_costs_what_input_costs() -> None:
    usage = TokenUsage(input_tokens=0, output_tokens=0, cache_read_tokens=300_000, cache_creation_tokens=700_000)
    assert with_cost(usage, profile(ModelCost(input=2, output=8))).estimated_cost_usd == pytest.approx(2)


@pytest.mark.parametrize(("prompt", "usd"), [(200_000, 0.2), (200_001, 0.400002), (500_000, 1.0), (500_001, 5.00001)])
def test_the_tier_of_the_whole_prompt_prices_the_whole_request(prompt: int, usd: float) -> None:
    cost = ModelCost(
        input=1,
        output=1,
        cost_tiers=[
            CostTier(above_tokens=500_000, input=10, output=1),
            CostTier(above_tokens=200_000, input=2, output=1),
        ],
    )
    cached = TokenUsage(input_tokens=1, output_tokens=0, cache_read_tokens=prompt - 1)
    assert with_cost(cached, profile(cost)).estimated_cost_usd == pytest.approx(usd)


@given(usages, st.none() | costs)
def test_what_the_provider_says_counts_and_the_estimate_stands_beside_it(
    usage: TokenUsage, cost: ModelCost | None
) -> None:
    priced = with_cost(usage, profile(cost))
    assert priced.actual_cost_usd == usage.actual_cost_usd
    assert (priced.estimated_cost_usd is None) == (cost is None)
    expected = priced.estimated_cost_usd if usage.actual_cost_usd is None else usage.actual_cost_usd
    assert priced.effective_cost_usd == expected
    assert priced.prompt_tokens == usage.prompt_tokens


@given(usages, costs)
def test_an_estimate_lies_between_the_lowest_and_the_highest_price(usage: TokenUsage, cost: ModelCost) -> None:
    rows = [cost, *(cost.cost_tiers or ())]
    all_prices = [
        price for row in rows for price in (row.input, row.output, row.cache_read, row.cache_write) if price is not None
    ]
    tokens = (usage.prompt_tokens + usage.output_tokens) / 1_000_000
    estimated = with_cost(usage, profile(cost)).estimated_cost_usd
    assert estimated is not None
    assert min(all_prices) * tokens <= estimated + 1e-6
    assert estimated <= max(all_prices) * tokens + 1e-6


def test_a_model_without_profile_has_no_estimate() -> None:
    usage = TokenUsage(input_tokens=1, output_tokens=1, actual_cost_usd=0.5)
    assert with_cost(usage, None) == structs.replace(usage, effective_cost_usd=0.5)
    unknown = with_cost(structs.replace(usage, actual_cost_usd=None), None)
    assert (unknown.estimated_cost_usd, unknown.effective_cost_usd) == (None, None)
