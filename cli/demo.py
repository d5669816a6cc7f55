"""`everruns demo`: a conversation with tools whose worker is killed twice with SIGKILL, and a client that loses nothing.

It runs against the stack of `everruns dev` with its worker in a process of its own. At the end it reads the stored log and
compares it with what the client saw; only when they agree is the exit code 0. Without a provider's key the model is scripted, so
that the same thing happens every time; what is slow then is a promise to the eye, not the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence

import httpx
from rich.console import Console

from activities.capabilities.test_faults import EFFECTS_FILE_VARIABLE
from cli.demo_client import READ_TIMEOUT_SECONDS, tell
from cli.demo_models import Wish, choose, without_default_keys
from cli.demo_proof import findings, read_log
from cli.demo_screen import Screen
from cli.demo_story import DemoFailure, Teller, Told
from cli.demo_worker import Worker
from cli.run import DEV_ENVIRONMENT, DevAddresses, DevStack, bound, dev_stack, in_progress, stop_on_signals, until
from infra.logging import configure_logging
from infra.network import LOOPBACK
from infra.settings import ListenAddress, load_settings
from infra.temporal_client import configure_temporal_logging


async def run_demo(environ: Mapping[str, str], wish: Wish, *, keep: bool = False) -> int:
    """The exit code: 0 when no claim that was put to the test fails, 1 when one does, 130 when it was interrupted before its end.

    Raises `DemoFailure`, also for a wish that cannot be fulfilled.
    """
    environ = {**environ, **DEV_ENVIRONMENT}
    if wish.simulated:
        environ = without_default_keys(environ)
    settings = load_settings(environ)
    wish.check(settings.default_keys, environ)
    configure_logging(settings.log_level if environ.get("LOG_LEVEL") else "error", settings.log_format)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    listener = bound(ListenAddress(host=LOOPBACK, port=0))
    configure_temporal_logging()
    with stop_on_signals() as stop:
        async with contextlib.AsyncExitStack() as stack:
            with in_progress("Starting PostgreSQL, Temporal and the API"):
                dev = await stack.enter_async_context(dev_stack(environ, listener, data_dir=None, with_worker=False))
            _welcome(console, dev.addresses)
            playing = asyncio.ensure_future(_play(environ, dev, console, wish))
            stack.push_async_callback(_cancelled, playing)
            await _first(stop, playing, dev.failures)
            if not playing.done():
                console.print("interrupted; everything is stopped", style="yellow")
                return 130
            session_id, holds = playing.result()
            _farewell(console, dev.addresses, session_id, keep=keep)
            if keep:
                await until(stop, *dev.failures)
    return 0 if holds else 1


async def _first(
    stop: asyncio.Event, playing: asyncio.Future[tuple[str, bool]], failures: Sequence[asyncio.Future[None]]
) -> None:
    """Until the story has been told, a signal comes or a server is lost, which raises."""

    async def over() -> None:
        await asyncio.wait({playing})

    await until(stop, asyncio.ensure_future(over()), *failures)


async def _cancelled(task: asyncio.Future[tuple[str, bool]]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def _play(environ: Mapping[str, str], dev: DevStack, console: Console, wish: Wish) -> tuple[str, bool]:
    """The session, and whether every claim that was put to the test holds. Raises `DemoFailure`."""
    directory = dev.children.temporary_directory("everruns-demo-")
    effects = directory / "effects"
    worker = Worker(
        dev.children,
        {**environ, **dev.addresses.environment, EFFECTS_FILE_VARIABLE: str(effects), "LOG_FORMAT": "console"},
        directory / "worker.log",
    )
    screen = Screen(console)
    async with httpx.AsyncClient(
        base_url=f"{dev.addresses.api}/v1/", timeout=READ_TIMEOUT_SECONDS, trust_env=False
    ) as client:
        teller = await choose(client, wish, keyed_types=dev.foundation.settings.default_keys, environ=environ)
        _introduce(screen, teller)
        await worker.start()
        screen.note(f"worker {worker.pid} is a process of its own")
        with screen.open():
            told = await _told(worker, asyncio.ensure_future(tell(client, worker, screen, teller)), teller)
    log = await read_log(dev.foundation.log, told.session_id)
    sent = effects.read_text().splitlines() if effects.exists() else []
    found = findings(told, log, sent, teller)
    by = f" by {teller.name}" if teller.is_real else ""
    console.print(f"\nThe proof, after {told.seconds:.0f} s{by}:")
    screen.proof(found)
    return told.session_id, all(finding.holds is not False for finding in found)


async def _told(worker: Worker, telling: asyncio.Future[Told], teller: Teller) -> Told:
    """Raises `DemoFailure` when the worker ends by itself or the story has no end."""
    try:
        await asyncio.wait({telling, worker.failure}, timeout=teller.story.seconds, return_when=asyncio.FIRST_COMPLETED)
        if worker.failure.done():
            worker.failure.result()
        if not telling.done():
            raise DemoFailure(f"the turn did not end within {teller.story.seconds:.0f} s")
        return telling.result()
    finally:
        telling.cancel()
        worker.unwatch()


def _introduce(screen: Screen, teller: Teller) -> None:
    if not teller.is_real:
        return
    where = f" at {teller.address}" if teller.address else ""
    mode = ", as a background generation that another worker can resume" if teller.background else ""
    screen.note(f"{teller.name} answers{where}{mode}")
    screen.note("that costs what the provider takes; `everruns demo --simulated` needs none")


def _welcome(console: Console, addresses: DevAddresses) -> None:
    console.print(f"Everruns is up after {addresses.ready_seconds:.1f} s")
    console.print(f"  API              {addresses.api}")
    console.print(f"  Temporal Web UI  {addresses.temporal_ui}\n")


def _farewell(console: Console, addresses: DevAddresses, session_id: str, *, keep: bool) -> None:
    link = f"{addresses.temporal_ui}/namespaces/default/workflows/{session_id}"
    if keep:
        console.print(f"\nThe turn in the Temporal Web UI, with its lost attempts:\n  {link}")
        console.print(f"Its events:\n  {addresses.api}/v1/sessions/{session_id}/events\nCtrl-C stops everything.")
    else:
        console.print("\nTo look at the turn in the Temporal Web UI, run `everruns demo --keep`.")
