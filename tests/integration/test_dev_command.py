"""`everruns` at a terminal: it starts, says where things are, stops without a trace, and says in one line what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx
import pytest

from cli.main import app
from infra.embedded_postgres import EmbeddedPostgres
from infra.network import LOOPBACK, free_port
from tests.processes import START_SECONDS, Command, Dev, eventually, is_alive, run
from tests.stack import Json, message_body

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

READY_SECONDS = 30.0
"""It takes one and a half; this is a busy machine's."""

ORPHANS_SECONDS = 15.0
"""The supervisor gives orphans 2 s before SIGKILL; three times 5 for a busy machine."""

FAST_SECONDS = 20.0
"""A command that cannot work says so within this; the start of Python is a second of it."""

TALKING: Json = {"mode": "lorem", "tokens": 400, "inter_token_delay_ms": 50}
TURN_SECONDS = 60.0

COMMANDS = sorted(name for name in app if not name.startswith("-"))
ALONE = {"DEPLOYMENT_GRADE": "dev"}
NOWHERE = f"{LOOPBACK}:1"
"""Port 1 refuses connections."""


@contextlib.asynccontextmanager
async def client_of(dev: Dev) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{dev.api}/", timeout=30, trust_env=False) as client:
        yield client


async def start_talking(client: httpx.AsyncClient, script: Json) -> str:
    """A session whose model has begun to answer."""
    session = (await client.post("sessions", json={})).raise_for_status().json()["id"]
    body = message_body("talk", script)
    (await client.post(f"sessions/{session}/messages", json=body)).raise_for_status()
    async with asyncio.timeout(TURN_SECONDS), client.stream("GET", f"sessions/{session}/sse") as stream:
        async for line in stream.aiter_lines():
            if line == "event: output.message.delta":
                return session
    raise AssertionError("the stream ended before the model said anything")


async def types_until(client: httpx.AsyncClient, session: str, last: str) -> list[str]:
    types: list[str] = []
    async with asyncio.timeout(TURN_SECONDS), client.stream("GET", f"sessions/{session}/sse") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                types.append(line.removeprefix("event: "))
                if types[-1] == last:
                    break
    return types


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


@pytest.fixture
def data_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ev-data-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


# --- Starting -------------------------------------------------------------------------------------------------------


async def test_dev_is_ready_soon_and_every_address_it_prints_answers() -> None:
    started = time.monotonic()
    async with Dev() as dev, httpx.AsyncClient(timeout=30, trust_env=False, follow_redirects=True) as client:
        assert time.monotonic() - started < READY_SECONDS
        await dev.printed("Stop it:  Ctrl-C")
        where = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", dev.out, re.MULTILINE))
        assert where["API"] == dev.addresses.api
        docs = await client.get(where["API docs"])
        assert (docs.status_code, docs.headers["content-type"].split(";")[0]) == (200, "text/html")
        openapi = await client.get(f"{where['API docs']}/openapi.json")
        assert openapi.json()["openapi"].startswith("3.")
        temporal_ui = await client.get(where["Temporal Web UI"])
        assert (temporal_ui.status_code, "<html" in temporal_ui.text.lower()) == (200, True)
        host, _, port = where["Temporal"].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        health = await client.get(f"{dev.origin}/health")
        assert health.json()["status"] == "ok"
        agents = await client.get(f"{where['API']}/v1/models")
        assert agents.json()["data"][0]["self_url"].startswith(f"{dev.api}/"), "links lead to this server"
        dev.interrupt()
        assert await dev.wait() == 0
        assert "\x1b" not in dev.err + dev.out, "no colours when it is not a terminal"
        assert "uvicorn" not in dev.err
        await dev.nothing_left()


async def test_stacks_that_start_at_the_same_time_do_not_take_each_others_ports() -> None:
    async with contextlib.AsyncExitStack() as running, httpx.AsyncClient(timeout=30, trust_env=False) as client:
        stacks = await asyncio.gather(*(running.enter_async_context(Dev("--no-worker")) for _ in range(3)))
        pages = [stack.addresses.temporal_ui for stack in stacks]
        assert len(set(pages)) == 3, "each has its own"
        for stack, page in zip(stacks, pages, strict=True):
            assert page is not None
            assert "<html" in (await client.get(page)).text.lower()
            assert stack.running, stack.err


async def test_a_server_in_dev_mode_brings_everything_along() -> None:
    address = f"{LOOPBACK}:{free_port()}"
    async with Command("server", environment={"DEV_MODE": "true", "HTTP_ADDR": address}) as server:
        await server.printed(f"http://{address}/api")
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=30, trust_env=False) as client:
            assert (await client.get("/health")).json()["status"] == "ok"
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        await server.nothing_left()


# --- Stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
async def test_a_stop_ends_streams_a_running_turn_and_every_child(how: str) -> None:
    async with Dev() as dev, client_of(dev) as client:
        session = await start_talking(client, TALKING)
        async with (
            client.stream("GET", f"sessions/{session}/sse") as first,
            client.stream("GET", f"sessions/{session}/sse") as second,
        ):
            assert len(dev.everything()) >= 4, "itself, the supervisor, PostgreSQL and Temporal"
            if how == "ctrl-c":
                dev.interrupt()
            else:
                dev.send_signal(signal.SIGTERM)
            for stream in (first, second):
                text = (await stream.aread()).decode()
                assert text.rstrip().endswith('data: {"reason":"shutdown","retry_ms":100}'), text[-300:]
        assert await dev.wait() == 0, dev.err
        assert "Traceback" not in dev.err, dev.err
        await dev.nothing_left()


async def test_ctrl_c_in_the_middle_of_the_start_leaves_nothing() -> None:
    async with Command("dev", "--addr", f"{LOOPBACK}:0") as dev:
        await eventually(
            lambda: len(dev.everything()) >= 3, deadline_seconds=START_SECONDS, what="the first servers starting"
        )
        dev.interrupt()
        assert await dev.wait() in (0, 130), dev.err
        assert "Traceback" not in dev.err, dev.err
        await dev.nothing_left()


async def test_a_killed_dev_leaves_no_orphan() -> None:
    async with Dev() as dev:
        processes = dev.everything()
        assert {dev.addresses.postgres_pid, dev.addresses.temporal_pid} <= processes
        dev.send_signal(signal.SIGKILL)
        assert await dev.wait() == -signal.SIGKILL
        await dev.nothing_left(ORPHANS_SECONDS)


async def test_dev_ends_with_a_reason_when_one_of_its_servers_dies() -> None:
    async with Dev() as dev:
        os.kill(dev.addresses.temporal_pid, signal.SIGKILL)
        assert await dev.wait() == 1, dev.err
        assert "everruns: Temporal ended unexpectedly (exit -9)." in dev.err, dev.err
        assert "Traceback" not in dev.err, dev.err
        await dev.nothing_left()


# --- Keeping data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", ["everything", "dev"])
async def test_a_turn_that_was_running_when_everything_was_killed_finishes_after_the_restart(
    killed: str, data_dir: Path
) -> None:
    """`dev` alone: its supervisor gives the servers their stop signal; `everything`: nobody gets to stop in order."""
    script: Json = {"mode": "lorem", "tokens": 60, "inter_token_delay_ms": 50}
    async with Dev("--data-dir", data_dir) as dev, client_of(dev) as client:
        session = await start_talking(client, script)
        for pid in dev.everything() if killed == "everything" else [dev.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await dev.wait()
        await eventually(lambda: not dev.everything(), deadline_seconds=ORPHANS_SECONDS, what="all gone")
    async with Dev("--data-dir", data_dir) as dev, client_of(dev) as client:
        types = await types_until(client, session, "session.idled")
        assert types.count("turn.started") == 1
        assert types.count("turn.completed") == 1, types
        assert types.count("output.message.completed") == 1
        messages = (await client.get(f"sessions/{session}/messages")).raise_for_status().json()["data"]
        assert [message["role"] for message in messages] == ["user", "agent"]
        assert len(messages[1]["content"][0]["text"].split()) == 60, "the answer is whole"
        dev.interrupt()
        assert await dev.wait() == 0


async def test_data_in_use_is_not_opened_a_second_time(data_dir: Path) -> None:
    async with Dev("--data-dir", data_dir) as dev, client_of(dev) as client:
        session = await start_talking(client, {"mode": "lorem", "tokens": 20, "inter_token_delay_ms": 50})
        code, _, err = await run("dev", "--addr", f"{LOOPBACK}:0", "--data-dir", data_dir)
        assert code == 1
        assert err.startswith("everruns: ")
        assert "Traceback" not in err
        assert is_alive(dev.addresses.postgres_pid)
        types = await types_until(client, session, "session.idled")
        assert "turn.completed" in types, "the first one is undisturbed"
        assert "reason.recovered" not in types


# --- What can be wrong ----------------------------------------------------------------------------------------------


async def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        address = f"{LOOPBACK}:{taken.getsockname()[1]}"
        code, out, err = await run("dev", "--addr", address)
    assert (code, out) == (1, "")
    assert one_line(err).startswith(f"everruns: cannot listen on {address}: Address already in use")


async def test_two_starts_at_once_on_one_port_do_not_both_believe_they_have_it() -> None:
    with socket.socket() as bound:
        # Bound and not yet listening, as another start is for an instant.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOOPBACK, 0))
        address = f"{LOOPBACK}:{bound.getsockname()[1]}"
        async with Command("dev", "--addr", address) as first:
            await first.printed(f"http://{address}/api")
            code, _, err = await run("dev", "--addr", address)
    assert code == 1
    assert "Address already in use" in one_line(err)


@pytest.mark.parametrize("command", ["dev", "server", "worker", "migrate", "demo", "check-log"])
async def test_a_wrong_setting_is_told_in_one_line_that_names_it(command: str) -> None:
    wrong = {**ALONE, "DATABASE_URL": "postgres://u@db/x", "LOG_LEVEL": "loud"}
    code, out, err = await run(command, environment=wrong)
    assert (code, out) == (1, "")
    line = one_line(err)
    assert line.startswith("everruns: LOG_LEVEL: 'loud' is not accepted")
    assert "'debug'" in line


async def test_every_wrong_setting_is_told_at_once() -> None:
    wrong = {**ALONE, "LOG_LEVEL": "loud", "HTTP_ADDR": "here", "DATABASE_POOL_SIZE": "0"}
    code, _, err = await run("server", environment=wrong)
    assert code == 1
    named = {line.removeprefix("everruns: ").split(":")[0] for line in err.strip().splitlines()}
    assert named == {"LOG_LEVEL", "HTTP_ADDR", "DATABASE_POOL_SIZE", "DATABASE_URL"}


async def test_config_shows_every_setting_and_no_secret() -> None:
    secret = "hunter2"
    given = {**ALONE, "DATABASE_URL": f"postgres://u:{secret}@db/x", "TEMPORAL_API_KEY": secret, "LOG_LEVEL": "debug"}
    code, out, err = await run("config", environment=given)
    assert (code, err) == (0, "")
    assert secret not in out
    assert "DATABASE_URL=postgres://u:***@db/x" in out
    assert "TEMPORAL_API_KEY=***" in out
    assert "LOG_LEVEL=debug  # environment; default: info" in out


async def test_config_of_a_wrong_environment_says_what_is_wrong() -> None:
    code, out, _ = await run("config", environment={**ALONE, "DEV_MODE": "true", "LOG_LEVEL": "loud"})
    assert code == 2
    assert "# LOG_LEVEL: 'loud' is not accepted" in out


@pytest.mark.parametrize("command", ["server", "worker", "migrate", "check-log"])
async def test_an_unreachable_database_is_told_in_one_line_without_its_password(command: str) -> None:
    started = time.monotonic()
    nowhere = {**ALONE, "DATABASE_URL": f"postgres://u:hunter2@{NOWHERE}/x", "HTTP_ADDR": f"{LOOPBACK}:0"}
    code, out, err = await run(command, environment=nowhere)
    assert (code, out) == (1, "")
    line = one_line(err)
    assert line.startswith(f"everruns: DATABASE_URL: no connection to 'postgres://u:***@{NOWHERE}/x': ")
    assert time.monotonic() - started < FAST_SECONDS


@pytest.mark.parametrize("command", ["server", "worker"])
async def test_an_unreachable_temporal_is_told_in_one_line(command: str, dsn: str) -> None:
    started = time.monotonic()
    nowhere = {**ALONE, "DATABASE_URL": dsn, "TEMPORAL_ADDRESS": NOWHERE, "HTTP_ADDR": f"{LOOPBACK}:0"}
    code, out, err = await run(command, environment=nowhere)
    assert (code, out) == (1, "")
    assert one_line(err).startswith(f"everruns: TEMPORAL_ADDRESS: no connection to '{NOWHERE}' without TLS: ")
    assert time.monotonic() - started < FAST_SECONDS


@pytest.fixture
async def empty_dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute(f"CREATE DATABASE {name}")
    yield postgres.dsn(name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.mark.parametrize("command", ["server", "worker"])
async def test_a_database_without_schema_is_told_with_the_command_that_helps(command: str, empty_dsn: str) -> None:
    given = {**ALONE, "DATABASE_URL": empty_dsn, "TEMPORAL_ADDRESS": NOWHERE, "HTTP_ADDR": f"{LOOPBACK}:0"}
    code, _, err = await run(command, environment=given)
    assert code == 1
    assert one_line(err).endswith("has no schema yet; run `everruns migrate` first")


# --- Migrations and help --------------------------------------------------------------------------------------------


async def test_migrations_run_once_however_many_start_them(empty_dsn: str) -> None:
    environment = {**ALONE, "DATABASE_URL": empty_dsn}
    results = await asyncio.gather(*(run("migrate", environment=environment) for _ in range(3)))
    assert [(code, err) for code, _, err in results] == [(0, "")] * 3
    connection = await asyncpg.connect(empty_dsn)
    applied = await connection.fetch("SELECT name, count(*) FROM migration GROUP BY name ORDER BY name")
    tables = await connection.fetchval("SELECT count(*) FROM pg_class WHERE relname IN ('sessions', 'events')")
    assert applied
    assert {row["count"] for row in applied} == {1}
    assert tables == 2
    code, _, err = await run("migrate", environment=environment)
    assert (code, err) == (0, "")
    again = await connection.fetch("SELECT name, count(*) FROM migration GROUP BY name ORDER BY name")
    await connection.close()
    assert again == applied


@pytest.mark.parametrize("command", COMMANDS)
async def test_help_of_a_command_shows_an_example(command: str) -> None:
    code, out, err = await run(command, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"Example:\s(.*\s)?everruns {command}\b", out, re.DOTALL), out


async def test_help_lists_every_command_and_where_to_begin() -> None:
    code, out, err = await run("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^. {command} ", out, re.MULTILINE), command
    assert "Begin with everruns dev" in out


async def test_version_is_the_packages_own() -> None:
    code, out, _ = await run("--version")
    assert code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)
    assert out != "0.0.0\n"
