"""What a deleted session leaves: its log, and nothing else that anybody stored in it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import msgspec
import pytest

from api.services import Services
from db.database import Database
from db.session_cleanup import BATCH_ROWS, Cleanup
from db.session_databases import StoredDatabases
from db.workspace_files import DatabaseFiles
from domain.ids import Prefix, format_id, parse_id
from domain.limits import WORKSPACE_MAX_ENTRIES
from domain.secret import Secret
from domain.session_databases import NewImage
from domain.session_storage import StorageProblem
from domain.workspace import FileMissing
from tests.conftest import API, Make
from tests.played_turns import Player

TABLES: Final = (
    "session_values",
    "session_value_history",
    "session_secrets",
    "session_databases",
    "session_database_writes",
    "tool_approval_rules",
)
FILE_TABLES: Final = ("workspace_entries", "workspace_history", "workspace_receipts", "workspace_usage")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """About work in the background, which tells nobody."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class World:
    def __init__(self, client: httpx.AsyncClient, services: Services) -> None:
        self.client = client
        self.services = services
        self.pool = services.database.pool
        self.cleanup = Cleanup(services.database)

    async def filled(self, session: str) -> Player:
        """Something of every kind, and a history of it."""
        player = Player(self.services, session)
        for content in (b"first", b"second"):
            await player.files.write("/notes/a.txt", content)
            await player.storage.set("key", content.decode())
        await player.storage.set_secret("TOKEN", Secret("the-token-itself"))
        image = NewImage(content=b"x", size_bytes=1, page_count=1, tables=msgspec.Raw(b"[]"))
        databases = StoredDatabases(self.pool, session)
        await databases.store("d", image, replaces=None, idempotency_key="1", result="{}")
        await self.pool.execute(
            "INSERT INTO tool_approval_rules (session_id, tool_name, decision) VALUES ($1, 'x', 'allow_always')",
            parse_id(Prefix.SESSION, session),
        )
        await self.pool.execute(
            "INSERT INTO workspace_receipts (workspace_id, key, text) VALUES ($1, $2, 'x')",
            await self.workspace(session),
            session,
        )
        return player

    async def workspace(self, session: str) -> UUID:
        return await self.pool.fetchval(
            "SELECT workspace_id FROM sessions WHERE id = $1", parse_id(Prefix.SESSION, session)
        )

    async def delete(self, session: str) -> None:
        response = await self.client.delete(f"{API}/sessions/{session}")
        assert response.status_code == 204, response.text

    async def rows(self, session: str) -> dict[str, int]:
        """How many there are in each table that has any."""
        key = parse_id(Prefix.SESSION, session)
        counts = {
            table: await self.pool.fetchval(f"SELECT count(*) FROM {table} WHERE session_id = $1", key)
            for table in TABLES
        }
        return {table: count for table, count in counts.items() if count}

    async def files(self, workspace: UUID) -> dict[str, int]:
        counts = {
            table: await self.pool.fetchval(f"SELECT count(*) FROM {table} WHERE workspace_id = $1", workspace)
            for table in FILE_TABLES
        }
        return {table: count for table, count in counts.items() if count}

    async def blobs(self) -> int:
        return await self.pool.fetchval("SELECT count(*) FROM workspace_blobs")

    async def cleared(self, workspace: UUID) -> None:
        async def is_empty() -> bool:
            return not await self.files(workspace)

        await until(is_empty)


@pytest.fixture
def world(client: httpx.AsyncClient, services: Services) -> World:
    return World(client, services)


async def of(make_session: Make, **fields: Any) -> str:
    return (await make_session(**fields))["id"]


async def test_everything_a_session_stored_goes_with_it_and_its_log_stays(world: World, make_session: Make) -> None:
    session = await of(make_session)
    workspace = await world.workspace(session)
    player = await world.filled(session)
    assert set(await world.rows(session)) == set(TABLES)
    assert set(await world.files(workspace)) == set(FILE_TABLES)
    assert await world.blobs() == 2
    events = len(await player.events())
    assert events
    await world.delete(session)
    assert await world.rows(session) == {}
    await world.cleared(workspace)
    assert await world.blobs() == 0
    assert len(await player.events()) == events
    assert (await world.client.delete(f"{API}/sessions/{session}")).status_code == 404
    public = format_id(Prefix.WORKSPACE, workspace)
    assert (await world.client.get(f"{API}/workspaces/{public}")).status_code == 404
    assert (await world.client.post(f"{API}/sessions", json={"workspace_id": public})).status_code == 404


async def test_other_sessions_keep_what_is_theirs(world: World, make_session: Make) -> None:
    gone, kept = await of(make_session), await of(make_session)
    await world.filled(gone)
    player = await world.filled(kept)
    before = await world.rows(kept), await world.files(await world.workspace(kept)), await player.state()
    await world.delete(gone)
    await world.cleared(await world.workspace(gone))
    assert await world.cleanup.once() == 0
    assert (await world.rows(kept), await world.files(await world.workspace(kept)), await player.state()) == before
    assert await world.blobs() == 2, "the content that both had"
    secret = await player.storage.get_secret("TOKEN")
    assert secret is not None
    assert secret.reveal() == "the-token-itself"


async def test_a_shared_workspace_stays_until_its_last_session_goes_whoever_made_it(
    world: World, make_session: Make
) -> None:
    first = await of(make_session)
    workspace = await world.workspace(first)
    second = await of(make_session, workspace_id=format_id(Prefix.WORKSPACE, workspace))
    await world.filled(first)
    await world.delete(first)
    await world.cleanup.once()
    files = DatabaseFiles.of_session(world.pool, second)
    assert (await files.read("/notes/a.txt"))[1] == b"second"
    await files.write("/more.txt", b"still there")
    await world.delete(second)
    await world.cleared(workspace)
    assert await world.blobs() == 0


async def test_a_workspace_that_was_made_as_such_outlives_its_sessions(world: World, make_session: Make) -> None:
    made = (await world.client.post(f"{API}/workspaces", json={"name": "shared"})).json()["id"]
    session = await of(make_session, workspace_id=made)
    await world.filled(session)
    await world.delete(session)
    await world.cleanup.once()
    files = DatabaseFiles.of_workspace(world.pool, made)
    assert (await files.read("/notes/a.txt"))[1] == b"second"
    assert (await world.client.get(f"{API}/workspaces/{made}")).json()["status"] == "active"


async def test_a_workspace_deleted_while_a_session_had_it_goes_with_that_session(
    world: World, make_session: Make
) -> None:
    made = (await world.client.post(f"{API}/workspaces", json={"name": "shared"})).json()["id"]
    session = await of(make_session, workspace_id=made)
    player = await world.filled(session)
    for status in ("archived", "deleted"):
        response = await world.client.patch(f"{API}/workspaces/{made}", json={"status": status})
        assert response.status_code == 200
    await world.cleanup.once()
    await player.files.write("/goes-on.txt", b"x")
    workspace = await world.workspace(session)
    await world.delete(session)
    await world.cleared(workspace)
    assert await world.blobs() == 0


async def test_forks_and_their_sources_are_independent_in_death_as_well(world: World, make_session: Make) -> None:
    source = await of(make_session)
    await world.filled(source)
    fork, late = [(await world.client.post(f"{API}/sessions/{source}/fork", json={})).json()["id"] for _ in range(2)]
    await world.delete(source)
    await world.cleared(await world.workspace(source))
    player = Player(world.services, fork)
    assert await player.state() == await Player(world.services, late).state()
    assert (await player.files.read("/notes/a.txt"))[1] == b"second"
    secret = await player.storage.get_secret("TOKEN")
    assert secret is not None
    assert secret.reveal() == "the-token-itself"
    await world.delete(fork)
    await world.cleared(await world.workspace(fork))
    assert (await Player(world.services, late).files.read("/notes/a.txt"))[1] == b"second"
    await world.delete(late)
    await world.cleared(await world.workspace(late))
    assert await world.blobs() == 0


async def test_sub_agents_go_with_their_parent_and_leave_nothing_either(world: World, make_session: Make) -> None:
    parent, sharing, apart = [await of(make_session) for _ in range(3)]
    keys = [parse_id(Prefix.SESSION, one) for one in (parent, sharing, apart)]
    query = "UPDATE sessions SET parent_session_id = $2 WHERE id = ANY($1::uuid[])"
    await world.pool.execute(query, keys[1:], keys[0])
    await world.pool.execute("UPDATE sessions SET workspace_id = $2 WHERE id = $1", keys[1], keys[0])
    for session in (parent, sharing, apart):
        await world.filled(session)
    # A child alone does not take along what is its parent's.
    await world.delete(sharing)
    await world.cleanup.once()
    assert (await Player(world.services, parent).files.read("/notes/a.txt"))[1] == b"second"
    await world.delete(parent)
    assert [await world.rows(one) for one in (parent, sharing, apart)] == [{}, {}, {}]
    for key in (keys[0], keys[2]):
        await world.cleared(key)
    assert await world.blobs() == 0


async def test_a_tool_of_a_turn_that_still_runs_is_told_and_stores_nothing(world: World, make_session: Make) -> None:
    session = await of(make_session)
    workspace = await world.workspace(session)
    player = await world.filled(session)
    await player.turn_with_tools("hello", ["call_a1"])
    await player.say("go on")
    await player.begin(new_turn=True)
    await player.files.read("/notes/a.txt")  # which is why it knows its workspace
    await world.delete(session)
    await world.cleared(workspace)
    fresh = DatabaseFiles.of_session(world.pool, session)
    for files in (player.files, fresh):
        with pytest.raises(FileMissing, match="deleted"):
            await files.write("/late.txt", b"x")
        with pytest.raises(FileMissing):
            await files.read("/notes/a.txt")
    with pytest.raises(StorageProblem, match="no session"):
        await player.storage.set("late", "x")
    with pytest.raises(StorageProblem, match="no session"):
        await player.storage.set_secret("LATE", Secret("x"))
    assert await player.storage.get_secret("TOKEN") is None
    assert await world.rows(session) == {}
    assert await world.files(workspace) == {}
    assert await world.blobs() == 0


async def test_writers_and_the_deletion_of_their_session_do_not_lock_each_other_out(
    world: World, make_session: Make
) -> None:
    session = await of(make_session)
    workspace = await world.workspace(session)
    player = await world.filled(session)

    async def write(number: int) -> int:
        done = 0
        try:
            while True:
                await DatabaseFiles.of_session(world.pool, session).write(f"/{number}/{done}.txt", b"%d" % done)
                await player.storage.set(f"{number}/{done}", "x")
                done += 1
        except (FileMissing, StorageProblem):
            return done

    async def written() -> bool:
        return (await world.files(workspace)).get("workspace_entries", 0) >= 30

    async with asyncio.timeout(60):
        writers = [asyncio.create_task(write(number)) for number in range(3)]
        await until(written)
        await world.delete(session)
        assert min(await asyncio.gather(*writers)) > 0
    await world.cleared(workspace)
    assert await world.rows(session) == {}
    await world.cleanup.once()
    assert await world.files(workspace) == {}


async def fill_with_files(world: World, workspace: UUID, count: int) -> None:
    files = DatabaseFiles.of_workspace(world.pool, format_id(Prefix.WORKSPACE, workspace))
    await files.apply({f"/many/{number}.txt": b"content %d" % number for number in range(count)}, [])
    await files.apply({f"/many/{number}.txt": b"again %d" % number for number in range(0, count, 4)}, [])


async def test_as_many_files_as_there_can_be_keep_nobody_waiting(world: World, make_session: Make) -> None:
    session, other = await of(make_session), await of(make_session)
    workspace = await world.workspace(session)
    await fill_with_files(world, workspace, WORKSPACE_MAX_ENTRIES - 1)  # and their directory
    started = time.monotonic()
    await world.delete(session)
    request_seconds = time.monotonic() - started
    longest = 0.0
    files = DatabaseFiles.of_session(world.pool, other)
    async with asyncio.timeout(120):
        while await world.files(workspace):
            began = time.monotonic()
            await files.write("/same.txt", b"content 1")  # the very bytes that are being deleted
            longest = max(longest, time.monotonic() - began)
    total_seconds = time.monotonic() - started
    print(f"request {request_seconds:.3f} s, all {total_seconds:.2f} s, longest wait {longest:.3f} s")
    assert request_seconds < 5
    assert longest < 10
    assert await world.blobs() == 1
    assert (await files.read("/same.txt"))[1] == b"content 1"


HOST: Final = """
import asyncio, sys
from db.database import Database
from db.session_cleanup import Cleanup

async def main():
    async with Database.opened(sys.argv[1]) as database:
        while True:
            await Cleanup(database).once()

asyncio.run(main())
"""


async def test_what_a_killed_server_has_begun_the_next_one_ends(world: World, make_session: Make, dsn: str) -> None:
    session = await of(make_session)
    workspace = await world.workspace(session)
    count = BATCH_ROWS * 12
    await fill_with_files(world, workspace, count)
    # As a server that dies in the request leaves it.
    await world.pool.execute("UPDATE sessions SET deleted_at = now() WHERE id = $1", workspace)

    async def begun() -> bool:
        return (await world.files(workspace)).get("workspace_entries", 0) <= count - BATCH_ROWS

    server = await asyncio.create_subprocess_exec(sys.executable, "-c", HOST, dsn, cwd=Path(__file__).parents[2])
    try:
        await until(begun)
    finally:
        server.kill()
        await server.wait()
    left = await world.files(workspace)
    assert 0 < left.get("workspace_entries", 0) < count
    assert await asyncio.gather(world.cleanup.once(), Cleanup(world.services.database).once()) != [0, 0]
    assert await world.files(workspace) == {}
    assert await world.blobs() == 0


async def test_rows_that_older_versions_have_left_behind_are_found(
    world: World, make_session: Make, database: Database
) -> None:
    session, kept = await of(make_session), await of(make_session)
    await world.filled(session)
    await world.filled(kept)
    before = await world.rows(kept)
    await database.pool.execute(
        "UPDATE sessions SET deleted_at = now() WHERE id = $1", parse_id(Prefix.SESSION, session)
    )
    assert await world.cleanup.once() == 1
    assert await world.rows(session) == {}
    assert await world.files(await world.workspace(session)) == {}
    assert await world.rows(kept) == before


async def test_a_session_that_joins_at_the_last_moment_keeps_the_files(world: World, make_session: Make) -> None:
    """A new session locks the workspace before anything is cleared away, and is seen by whoever waits for that lock."""
    session = await of(make_session)
    workspace = await world.workspace(session)
    await world.filled(session)
    other = await of(make_session)
    await world.pool.execute("UPDATE sessions SET deleted_at = now() WHERE id = $1", workspace)

    async def waiting() -> bool:
        return bool(await world.pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    async with world.services.database.transaction() as joining:
        await joining.execute("SELECT 1 FROM workspaces WHERE id = $1 FOR SHARE", workspace)
        query = "UPDATE sessions SET workspace_id = $2 WHERE id = $1"
        await joining.execute(query, parse_id(Prefix.SESSION, other), workspace)
        clearing = asyncio.create_task(world.cleanup.clear([workspace]))
        await until(waiting)
    assert await clearing == 0
    assert (await DatabaseFiles.of_session(world.pool, other).read("/notes/a.txt"))[1] == b"second"
