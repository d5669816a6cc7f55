"""The tools of `memory`: what a model reads and writes, what it cannot reach, and that sessions share it."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import pytest

from activities.capabilities.memory import CAPABILITY, READ_MAX_BYTES, MemoryConfig
from activities.capabilities.registry import call_tool
from activities.capabilities.tool_call import MAX_RESULT_BYTES
from db.database import Database
from db.session_resources import DatabaseResources
from domain.events import ToolStatus
from domain.ids import Prefix, parse_id
from domain.memory_access import OpenMemory
from domain.messages import TextPart
from infra.encryption import Keyring
from tests.conftest import API, Make
from tests.tool_context import PlainContext

TOOLS = {tool.name: tool for tool in CAPABILITY.tools}


class Remembering(PlainContext):
    def __init__(self, resources: DatabaseResources, session: str, config: MemoryConfig) -> None:
        self._resources = resources
        self.session_id = session
        self.config = config

    async def memory(self, id_or_name: str) -> OpenMemory | None:
        return await self._resources.memory(self.session_id, id_or_name)

    async def call(self, name: str, /, **arguments: object) -> dict[str, Any]:
        outcome = await call_tool(TOOLS[name], self, arguments)
        assert outcome.error is None, outcome.error
        assert outcome.result is not None
        text = cast(TextPart, outcome.result[0]).text
        assert len(text.encode()) < MAX_RESULT_BYTES
        return json.loads(text)

    async def refused(self, name: str, /, **arguments: object) -> str:
        outcome = await call_tool(TOOLS[name], self, arguments)
        assert (outcome.result, outcome.status) == (None, ToolStatus.ERROR)
        assert outcome.error is not None
        return outcome.error


@pytest.fixture
async def memory(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.post(f"{API}/memories", json={"name": "docs", "description": "Decisions"})).json()


@pytest.fixture
async def context(database: Database, keyring: Keyring, make_session: Make, memory: dict[str, Any]) -> Remembering:
    session = (await make_session())["id"]
    config = MemoryConfig(memories=["docs", "not there"], writable=True)
    return Remembering(DatabaseResources(database.pool, keyring), session, config)


async def test_what_one_session_writes_another_finds_and_people_read(
    context: Remembering, client: httpx.AsyncClient, memory: dict[str, Any], make_session: Make
) -> None:
    written = await context.call("memory_write", memory="docs", path="adr/1.md", content="Use PostgreSQL\nalways")
    assert written == {"memory": "docs", "path": "/adr/1.md", "created": True, "size_bytes": 21}
    served = await client.get(f"{API}/memories/{memory['id']}/fs/adr/1.md")
    assert served.json()["content"] == "Use PostgreSQL\nalways"
    config = MemoryConfig(memories=[memory["id"]])
    other = Remembering(context._resources, (await make_session())["id"], config)
    found = await other.call("memory_search", pattern="(?i)postgres")
    assert found["matches"] == [{"memory": "docs", "path": "/adr/1.md", "line_number": 1, "line": "Use PostgreSQL"}]
    assert (await other.call("memory_read", memory="docs", path="/adr/1.md", offset=2))["content"] == "always"
    assert (await other.call("memory_list", memory=memory["id"]))["files"] == [{"path": "/adr/1.md", "size_bytes": 21}]
    assert "read-only" in await other.refused("memory_write", memory="docs", path="x", content="x")


async def test_memories_are_listed_with_what_is_not_available(context: Remembering) -> None:
    assert await context.call("memory_list") == {
        "memories": [
            {"name": "docs", "writable": True, "description": "Decisions"},
            {"name": "not there", "available": False},
        ]
    }
    assert (await context.call("memory_search", pattern="x"))["unavailable"] == ["not there"]
    assert "not there any more" in await context.refused("memory_read", memory="not there", path="a")


async def test_a_memory_that_is_not_named_cannot_be_reached(
    context: Remembering, client: httpx.AsyncClient, database: Database, memory: dict[str, Any]
) -> None:
    await client.post(f"{API}/memories", json={"name": "private"})
    for name in ("memory_list", "memory_read", "memory_search", "memory_write"):
        given = {"memory": "private", "path": "a", "pattern": "x", "content": "x"}
        fields = {key: given[key] for key in TOOLS[name].arguments.__struct_fields__ if key in given}
        assert "no memory `private`" in await context.refused(name, **fields)
    await database.pool.execute("UPDATE memories SET org_id = 2 WHERE id = $1", parse_id(Prefix.MEMORY, memory["id"]))
    assert "not there any more" in await context.refused("memory_read", memory="docs", path="a")


async def test_an_archived_memory_is_gone_and_one_with_a_source_read_only(
    context: Remembering, client: httpx.AsyncClient, memory: dict[str, Any]
) -> None:
    url = f"{API}/memories/{memory['id']}"
    await client.patch(url, json={"source": {"url": "https://example.com/a.git"}})
    assert "read-only" in await context.refused("memory_write", memory="docs", path="x", content="x")
    await client.delete(url)
    assert "archived" in await context.refused("memory_read", memory="docs", path="x")


async def test_long_and_binary_files_and_bad_paths_have_answers(
    context: Remembering, client: httpx.AsyncClient, memory: dict[str, Any]
) -> None:
    lines = [f"line {number:06}" for number in range(1, 10_001)]
    await context.call("memory_write", memory="docs", path="long", content="\n".join(lines))
    read: list[str] = []
    offset = 1
    while True:
        part = await context.call("memory_read", memory="docs", path="long", offset=offset)
        assert len(part["content"].encode()) <= READ_MAX_BYTES
        whole = part["content"].splitlines()
        if not part.get("truncated"):
            read += whole
            break
        following = int(part["note"].rsplit(" ", 1)[1].rstrip("."))
        read += whole[: following - offset]
        offset = following
    assert read == lines
    await client.post(f"{API}/memories/{memory['id']}/fs/bin", json={"content": "/wA=", "encoding": "base64"})
    assert "not text" in await context.refused("memory_read", memory="docs", path="bin")
    for path in ("../x", "/a/../../b", "a\0b"):
        assert await context.refused("memory_write", memory="docs", path=path, content="x")
    assert await context.refused("memory_search", pattern="(")
    assert len((await context.call("memory_search", pattern="line"))["matches"]) == 200
