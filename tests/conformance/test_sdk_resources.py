"""The official SDK, unchanged, against a live server: harnesses, agents, sessions, models and capabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from everruns_sdk import ApiError, Everruns, NotFoundError
from everruns_sdk.models import AgentCapabilityConfig, InitialFile, NetworkAccessList, ToolDefinition

from domain.model_profiles import profiles


@pytest.fixture(params=["/api", ""], ids=["prefixed", "bare"])
async def sdk(
    live_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Everruns]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with Everruns("evr_pat_test", base_url=live_url + request.param, org_id=f"org_{1:032x}") as client:
        yield client


async def test_harnesses(sdk: Everruns) -> None:
    made = await sdk.harnesses.create(
        "sdk-harness",
        "Be kind.",
        description="From the SDK",
        capabilities=[AgentCapabilityConfig(ref="test_math")],
        initial_files=[InitialFile(path="/workspace/a", content="a")],
        network_access=NetworkAccessList(allowed=["example.com"]),
        tags=["sdk"],
    )
    assert made.capabilities == [AgentCapabilityConfig(ref="test_math")]
    assert {harness.name for harness in await sdk.harnesses.list()} == {"base", "generic", "sdk-harness"}
    assert [harness.id for harness in await sdk.harnesses.search("from sdk")] == [made.id]
    assert (await sdk.harnesses.get("sdk-harness")).id == made.id
    child = await sdk.harnesses.create("child", "", parent_harness_id=made.id)
    assert child.parent_harness_id == made.id
    assert (await sdk.harnesses.update(made.id, description="New")).description == "New"
    await sdk.harnesses.delete(made.id)
    assert (await sdk.harnesses.get(made.id)).status == "archived"
    assert await sdk.harnesses.list_examples()
    with pytest.raises(ApiError) as refused:
        await sdk.harnesses.update((await sdk.harnesses.get("generic")).id, description="x")
    assert (refused.value.status_code, refused.value.code) == (403, "read_only")


async def test_agents(sdk: Everruns) -> None:
    made = await sdk.agents.create(
        "sdk-agent",
        "You help.",
        capabilities=[AgentCapabilityConfig(ref="current_time")],
        tools=[ToolDefinition(name="ask", description="Asks", parameters={"type": "object"})],
        tags=["sdk"],
    )
    assert made.status == "active"
    applied = await sdk.agents.apply(made.id, "sdk-agent", "You help more.")
    assert (applied.id, applied.system_prompt) == (made.id, "You help more.")
    assert (await sdk.agents.apply_by_name("sdk-agent", "By name.")).id == made.id
    assert (await sdk.agents.get("sdk-agent")).system_prompt == "By name."
    assert [agent.id for agent in await sdk.agents.list(search="sdk")] == [made.id]
    copy = await sdk.agents.copy(made.id)
    assert copy.name == "sdk-agent (copy)"
    exported = await sdk.agents.export(made.id)
    assert (await sdk.agents.import_agent(exported)).id == made.id
    assert (await sdk.agents.import_example("dad-jokes-agent")).name == "dad-jokes-agent"
    assert (await sdk.agents.stats(made.id)).session_count == 0
    await sdk.with_reason("not used any more").agents.delete(made.id)
    assert (await sdk.agents.get(made.id)).status == "archived"
    with pytest.raises(NotFoundError) as missing:
        await sdk.agents.get("no-such-agent")
    assert missing.value.code == "not_found"
    with pytest.raises(ApiError) as refused:
        await sdk.with_reason("evr_pat_0123456789abcdef").agents.list()
    assert refused.value.code == "invalid_change_reason"


# The SDK asks applications to move to agent keys; management calls are what is tested here.
@pytest.mark.filterwarnings("ignore:Everruns.sessions.create:DeprecationWarning")
async def test_sessions(sdk: Everruns) -> None:
    agent = await sdk.agents.create("sdk-agent", "You help.")
    made = await sdk.sessions.create(agent_id=agent.id, title="From the SDK", locale="en", tags=["a"])
    assert (made.status, made.agent_id, made.title) == ("started", agent.id, "From the SDK")
    by_name = await sdk.sessions.create(harness_name="base", agent_name="sdk-agent")
    assert by_name.agent_id == agent.id
    assert (await sdk.sessions.get(made.id)).workspace_id == made.workspace_id
    assert [session.id for session in await sdk.sessions.list(search="sdk")] == [made.id]
    await sdk.sessions.pin(made.id)
    assert (await sdk.sessions.get(made.id)).is_pinned is True
    await sdk.sessions.unpin(made.id)
    assert await sdk.sessions.export(made.id) == ""
    await sdk.sessions.delete(made.id)
    with pytest.raises(NotFoundError):
        await sdk.sessions.get(made.id)


async def test_models_of_real_providers(sdk: Everruns, client: httpx.AsyncClient) -> None:
    body = {"name": "Router", "provider_type": "openrouter", "api_key": "sk-or-of-this-test"}
    provider = (await client.post("/api/v1/providers", json=body)).json()["id"]
    for name in profiles():
        made = await client.post(f"/api/v1/providers/{provider}/models", json={"model_id": name, "display_name": name})
        assert made.status_code == 201
    by_name = {model.model_id: model for model in await sdk.models.list()}
    assert set(profiles()) < set(by_name)
    for name, profile in profiles().items():
        shown = by_name[name].profile
        assert shown is not None
        assert shown.limits is not None
        assert profile.limits is not None
        assert (shown.name, shown.limits.context) == (profile.name, profile.limits.context)
    opus = await sdk.models.get(by_name["claude-opus-5-5"].id)
    assert (opus.healthy, opus.model_vendor, opus.provider_type) == (True, "anthropic", "openrouter")
    assert by_name["deepseek-v4-pro"].model_vendor is None


async def test_models_and_capabilities(sdk: Everruns) -> None:
    models = await sdk.models.list()
    assert {model.model_vendor for model in models} == {"llmsim"}
    assert (await sdk.models.get(models[0].id)).healthy is True
    capabilities = await sdk.capabilities.list()
    assert "current_time" in [capability.id for capability in capabilities]
    assert (await sdk.capabilities.get("test_weather")).tool_definitions
