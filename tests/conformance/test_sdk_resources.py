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


@pytest.mark.filterwarnings("ignore:Everruns.sessions.create:DeprecationWarning")
async def test_session_secrets(sdk: Everruns, client: httpx.AsyncClient) -> None:
    session = await sdk.sessions.create(title="With secrets")
    await sdk.sessions.set_secrets(session.id, {"TOKEN": "first", "OTHER": "x"})
    await sdk.sessions.set_secrets(session.id, {"TOKEN": "second"})
    listed = await client.get(f"/api/v1/sessions/{session.id}/storage/secrets")
    assert [secret["name"] for secret in listed.json()["data"]] == ["OTHER", "TOKEN"]
    with pytest.raises(ApiError) as refused:
        await sdk.sessions.set_secrets(session.id, {"not a name": "x"})
    assert (refused.value.status_code, refused.value.code) == (400, "invalid_input")
    with pytest.raises(NotFoundError):
        await sdk.sessions.set_secrets(f"session_{1:032x}", {"TOKEN": "x"})


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


async def test_workspaces(sdk: Everruns) -> None:
    made = await sdk.workspaces.create("sdk-workspace", description="From the SDK")
    other = await sdk.workspaces.create("other")
    assert (made.status, made.description) == ("active", "From the SDK")
    assert [one.id for one in await sdk.workspaces.list()] == [other.id, made.id]
    assert [one.id for one in await sdk.workspaces.list(search="from sdk")] == [made.id]
    assert (await sdk.workspaces.update(made.id, name="renamed")).name == "renamed"
    await sdk.workspaces.delete(made.id)
    assert (await sdk.workspaces.get(made.id)).status == "archived"
    assert [one.id for one in await sdk.workspaces.list(include_archived=False)] == [other.id]
    assert len(await sdk.workspaces.list(include_archived=True)) == 2
    assert (await sdk.workspaces.update(made.id, status="active")).archived_at is None
    with pytest.raises(NotFoundError):
        await sdk.workspaces.get(f"wsp_{0:032x}")


async def test_workspace_files(sdk: Everruns) -> None:
    workspace = (await sdk.workspaces.create("files")).id
    files = sdk.workspace_files
    made = await files.create(workspace, "/notes/to do é.md", "# Plan\nship it\n", is_readonly=False)
    assert (made.path, made.name, made.encoding) == ("/notes/to do é.md", "to do é.md", "text")
    assert await files.read(workspace, "notes/to do é.md") == made
    assert (await files.create(workspace, "/b.bin", "AAH/", encoding="base64")).size_bytes == 3
    assert (await files.read(workspace, "/b.bin")).content == "AAH/"
    assert (await files.create_dir(workspace, "/empty")).is_directory
    assert [one.path for one in await files.list(workspace)] == ["/b.bin", "/empty", "/notes"]
    assert [one.path for one in await files.list(workspace, "/notes")] == ["/notes/to do é.md"]
    assert len(await files.list(workspace, recursive=True)) == 4
    (found,) = await files.grep(workspace, "^ship", path_pattern="*.md")
    assert [(match.line_number, match.line) for match in found.matches] == [(2, "ship it")]
    assert (await files.update(workspace, "/notes/to do é.md", "new")).content == "new"
    assert (await files.copy_file(workspace, "/notes", "/copy")).is_directory
    assert (await files.move_file(workspace, "/copy/to do é.md", "/moved.md")).path == "/moved.md"
    stat = await files.stat(workspace, "/moved.md")
    assert (stat.size_bytes, stat.is_directory, stat.is_readonly) == (3, False, False)
    assert (await files.delete(workspace, "/moved.md")).deleted
    assert not (await files.delete(workspace, "/moved.md")).deleted
    assert (await files.delete(workspace, "/notes", recursive=True)).deleted
    with pytest.raises(ApiError) as conflict:
        await files.create(workspace, "/b.bin", "")
    assert (conflict.value.status_code, conflict.value.code) == (409, "already_exists")
    await files.create(workspace, "/locked", "x", is_readonly=True)
    with pytest.raises(ApiError) as locked:
        await files.update(workspace, "/locked", "y")
    assert (locked.value.status_code, locked.value.code) == (403, "read_only")
    with pytest.raises(NotFoundError):
        await files.read(workspace, "/notes/to do é.md")


# The SDK asks applications to move to agent keys; management calls are what is tested here.
@pytest.mark.filterwarnings("ignore:Everruns.sessions.create:DeprecationWarning")
async def test_initial_files_are_in_the_sessions_workspace(sdk: Everruns) -> None:
    agent = await sdk.agents.create("with-files", "x", initial_files=[InitialFile(path="/workspace/a.md", content="a")])
    session = await sdk.sessions.create(agent_id=agent.id)
    assert session.workspace_id
    assert (await sdk.workspace_files.read(session.workspace_id, "a.md")).content == "a"
