"""The example of every capability's page, run as it stands, its commands one after another in one session.

The session has the capabilities that the example shows, on a harness with none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.integration.test_docs_examples import blocks, commands, curl_request
from tests.stack import Json, Stack, of_type

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(f"docs/capabilities/{path.name}" for path in (ROOT / "docs/capabilities").glob("*.md"))

SITE: Final = "https://example.com/"
"""Of examples that need one; a page of this test stands in for it."""

ENDS_BADLY: Final = {"docs/capabilities/error_disclosure.md": "turn.failed"}
"""Pages whose example shows something else than a turn that ends well."""

PAGE: Final = b"<html><head><title>Example Domain</title></head><body><main><h1>Example</h1></main></body></html>"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {len(PAGE)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + PAGE)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(environment={"WEB_FETCH_ALLOW_PRIVATE_HOSTS": "127.0.0.1"}) as running:
        yield running


def shown_capabilities(page: str) -> list[Json]:
    """Those of the page's first JSON block that has any; a page may also make its session with a command."""
    for block in blocks(page, "json"):
        shown = msgspec.json.decode(block)
        if isinstance(shown, dict) and "capabilities" in shown:
            assert Path(page).stem in [one["ref"] for one in shown["capabilities"]]
            return shown["capabilities"]
    return [{"ref": Path(page).stem}]


@pytest.mark.parametrize("page", PAGES)
async def test_the_example_of_a_capability_s_page_runs(page: str, stack: Stack, site: str) -> None:
    examples = commands(page, "curl")
    assert examples, f"{page} has no example to run"
    session = await stack.create_session(capabilities=shown_capabilities(page), harness_name="base")
    origin = f"http://{urlsplit(stack.api).netloc}"
    turns = 0
    for command in examples:
        request = curl_request(command, {"API": f"{origin}/api/v1", "SESSION": session})
        body = request.body and request.body.replace(SITE, site)
        url = request.url.replace("http://127.0.0.1:9300", origin)
        before = max((event.sequence for event in await stack.read_log(session)), default=0)
        answer = await stack.client.request(request.method, url, headers=request.headers, content=body)
        assert answer.is_success, f"{command}\n{answer.status_code} {answer.text}"
        if url.endswith("/sessions") and body:
            session = answer.json()["id"]
        if url.endswith("/messages") and body:
            turns += 1
            await _at_rest(stack, session, before)
    if not turns:  # the example only makes a session: one that works
        turns += 1
        await stack.ask(session, "Good morning", llmsim={"mode": "fixed", "text": "Good morning."})
    await stack.idle(session)
    log = await stack.check(session)
    assert len(of_type(log, ENDS_BADLY.get(page, "turn.completed"))) >= turns
    failed = [one for one in of_type(log, "tool.completed") if not one["success"]]
    assert not failed


async def _at_rest(stack: Stack, session: str, after_sequence: int) -> None:
    """Until the turn has ended, or waits for what the next command of the page brings."""
    ended = asyncio.create_task(stack.wait_for_event(session, "session.idled", after_sequence=after_sequence))
    waits = asyncio.create_task(stack.wait_for_event(session, "tool.call_requested", after_sequence=after_sequence))
    done, pending = await asyncio.wait({ended, waits}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
