"""`everruns demo`: a conversation with tools whose worker is killed twice with SIGKILL, and a client that loses nothing.

It uses what any client uses: the HTTP API and one SSE stream, against the stack of `everruns dev` with its worker in a process
of its own. At the end it reads the stored log and compares it with what the client saw; only when they agree is the exit code 0.
The model is scripted, so that the same thing happens every time; what is slow is a promise to the eye, not the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import httpx
import msgspec
from msgspec import Struct
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.text import Text

from activities.capabilities.test_faults import EFFECTS_FILE_VARIABLE
from cli.run import (
    DEV_ENVIRONMENT,
    DevAddresses,
    DevStack,
    StartFailure,
    bound,
    dev_stack,
    in_progress,
    stop_on_signals,
    until,
)
from db.event_log import EventLog
from domain.events import StoredEvent
from domain.log_check import Violation, check_log, check_seen
from infra.child_processes import Child, ChildProcesses
from infra.logging import configure_logging
from infra.network import LOOPBACK
from infra.settings import ListenAddress, load_settings
from infra.temporal_client import configure_temporal_logging

STORY_SECONDS: Final = 60.0
"""Far more than it takes (about 20 s): a busy machine may be slow, a hang must not last."""

STORED_SECONDS: Final = 0.2
"""What a dead worker had handed to PostgreSQL may still be stored this much later; it is no sign of recovery."""

READ_TIMEOUT_SECONDS: Final = 60.0
"""Twice the heartbeat of a silent stream."""

RECONNECT_SECONDS: Final = 0.1
PAGE_EVENTS: Final = 5_000
KILL_AFTER_CHARACTERS: Final = 90
"""Of a message: past the short first one, far from the end of the long second one."""

CAPABILITIES: Final = ("test_weather", "test_faults", "current_time")
QUESTION: Final = (
    "Ghent or Amsterdam for the team picnic? Compare the weather, then book a table and send the invitation."
)

SCRIPT: Final[Mapping[str, object]] = {
    "mode": "script",
    "inter_token_delay_ms": 40,
    "turns": [
        {
            "thinking": "Two cities and a date: these three questions do not depend on each other.",
            "text": "I ask for both cities at once.",
            "tool_calls": [
                {"name": "get_weather", "arguments": {"location": "Ghent"}},
                {"name": "get_weather", "arguments": {"location": "Amsterdam"}},
                {"name": "get_current_time", "arguments": {"timezone": "Europe/Brussels"}},
            ],
        },
        {
            "text": (
                "Amsterdam has 17 degrees and heavy rain, Ghent has 23 degrees, sunshine and hardly any wind. A picnic "
                "wants a dry meadow and air that is warm enough for people who sit still, so this is Ghent's day. I ask "
                "the restaurant there for a table now, while the invitation goes out."
            ),
            "tool_calls": [
                {"name": "test_sleep", "arguments": {"seconds": 3, "label": "the restaurant is looking for a table"}},
                {"name": "test_effect_once", "arguments": {"name": "invitation"}},
            ],
        },
        {"text": "Done: the table is booked and the invitation is out. It was sent exactly once."},
    ],
}

AnyJson = dict[str, object]


class DemoFailure(StartFailure):
    """The demo could not be told to its end"""


# --- What happens ----------------------------------------------------------------------------------------------------


class SeenEvent(Struct, frozen=True, kw_only=True):
    """An event as the client got it."""

    id: str
    type: str
    ts: datetime
    sequence: int
    data: AnyJson
    whole: AnyJson = {}
    """All that came."""

    def text(self, name: str) -> str:
        return str(self.data.get(name) or "")


class Kill(Struct, kw_only=True):
    """A moment at which the worker is killed, and how long the stream then stood still."""

    where: str
    due: Callable[[SeenEvent], bool]
    again: str
    recovered_by: tuple[str, ...]
    at: float | None = None
    recovered_seconds: float | None = None


def _in_the_answer(event: SeenEvent) -> bool:
    return event.type == "output.message.delta" and len(event.text("accumulated")) >= KILL_AFTER_CHARACTERS


def _in_the_tool(event: SeenEvent) -> bool:
    return event.type == "tool.progress"


def planned_kills() -> list[Kill]:
    return [
        Kill(
            where="in the middle of the model's answer",
            due=_in_the_answer,
            again="the answer streams again",
            recovered_by=("output.message.delta",),
        ),
        Kill(
            where="in the middle of a tool",
            due=_in_the_tool,
            again="the tool runs again",
            recovered_by=("tool.started", "tool.progress", "tool.completed"),
        ),
    ]


class Worker:
    """The one worker process; a supervisor owns it, so that it can't outlive the demo."""

    def __init__(self, children: ChildProcesses, environment: Mapping[str, str], log_path: Path) -> None:
        self._children = children
        self._environment = environment
        self._log_path = log_path
        self._child: Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    async def start(self) -> None:
        self._child = await self._children.start(
            "worker",
            [sys.executable, "-P", "-m", "cli.main", "worker"],
            env=self._environment,
            log_path=self._log_path,
            # Nothing in this stack outlives the demo, so there is nothing to end gracefully for.
            stop_signal=signal.SIGKILL,
            ends_by_itself=True,
        )
        self._watching = asyncio.create_task(self._watch(self._child))

    def unwatch(self) -> None:
        """From here on its end is expected."""
        if self._watching is not None:
            self._watching.cancel()

    async def kill(self) -> None:
        assert self._child is not None
        self.unwatch()
        self._child.send_signal(signal.SIGKILL)
        await self._child.wait()

    async def _watch(self, child: Child) -> None:
        code = await child.wait()
        if not self.failure.done():
            self.failure.set_exception(DemoFailure(f"the worker ended by itself (exit {code}).\n{child.log_tail()}"))


async def follow(client: httpx.AsyncClient, session_id: str) -> AsyncIterator[SeenEvent]:
    """The session's events over one stream, which goes on where it was when a connection ends."""
    cursor: str | None = None
    while True:
        parameters = {"since_id": cursor} if cursor else {}
        with contextlib.suppress(httpx.TransportError):
            async with client.stream("GET", f"sessions/{session_id}/sse", params=parameters) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise DemoFailure(f"the stream was refused: {response.status_code} {response.text}")
                async for line in response.aiter_lines():
                    # Frames of the stream itself (connected, disconnecting) carry no event.
                    if line.startswith('data: {"id":'):
                        whole = msgspec.json.decode(line.removeprefix("data: "), type=AnyJson)
                        event = msgspec.convert({**whole, "whole": whole}, SeenEvent)
                        cursor = event.id
                        yield event
        await asyncio.sleep(RECONNECT_SECONDS)


class Told(Struct, frozen=True, kw_only=True):
    """What the client has to show at the end."""

    session_id: str
    seen: list[SeenEvent]
    kills: list[Kill]
    seconds: float


async def tell(client: httpx.AsyncClient, worker: Worker, screen: Screen, model: str | None) -> Told:
    """The conversation, from the agent's creation to the idle session, with the kills in between."""
    started = time.monotonic()
    session_id = await _open_session(client, screen, model)
    seen: list[SeenEvent] = []
    kills = planned_kills()
    waiting = list(kills)
    current: Kill | None = None
    async with contextlib.aclosing(follow(client, session_id)) as events:  # type: ignore[type-var]  # a generator
        await _post(client, f"sessions/{session_id}/messages", _message())
        async for event in events:
            seen.append(event)
            if current is not None and _shows_recovery(current, event):
                current.recovered_seconds = event.ts.timestamp() - (current.at or 0)
                screen.recovered(current)
                current = None
            screen.show(event)
            if waiting and current is None and waiting[0].due(event):
                current = waiting.pop(0)
                await _kill(worker, current, screen)
            if event.type == "session.idled":
                break
    return Told(session_id=session_id, seen=seen, kills=kills, seconds=time.monotonic() - started)


def _shows_recovery(kill: Kill, event: SeenEvent) -> bool:
    return kill.at is not None and event.type in kill.recovered_by and event.ts.timestamp() - kill.at > STORED_SECONDS


async def _kill(worker: Worker, kill: Kill, screen: Screen) -> None:
    dead = worker.pid
    kill.at = time.time()
    await worker.kill()
    await worker.start()
    screen.killed(kill, dead=dead, successor=worker.pid)


async def _open_session(client: httpx.AsyncClient, screen: Screen, model: str | None) -> str:
    model_id = await _model_id(client, model) if model else None
    references = [{"ref": name} for name in CAPABILITIES]
    agent = await _post(
        client,
        "agents",
        {"name": "picnic-planner", "system_prompt": "You plan picnics.", "capabilities": references},
    )
    session = await _post(
        client,
        "sessions",
        {"agent_id": agent["id"], "title": "Picnic", **({"model_id": model_id} if model_id else {})},
    )
    screen.note(f"agent {agent['id']} with the tools of {', '.join(CAPABILITIES)}")
    screen.note(f"session {session['id']}, followed over one SSE stream")
    return str(session["id"])


async def _model_id(client: httpx.AsyncClient, name: str) -> str:
    answer = await client.get("models")
    names = {str(model["model_id"]): str(model["id"]) for model in answer.raise_for_status().json()["data"]}
    if name not in names:
        raise DemoFailure(f"there is no model `{name}`; there are {', '.join(sorted(names))}")
    return names[name]


def _message() -> AnyJson:
    return {"message": {"content": [{"type": "text", "text": QUESTION}]}, "metadata": {"llmsim": SCRIPT}}


async def _post(client: httpx.AsyncClient, path: str, body: AnyJson) -> AnyJson:
    answer = await client.post(path, json=body)
    if answer.is_error:
        raise DemoFailure(f"POST {path}: {answer.status_code} {answer.text}")
    return answer.json()


# --- The proof -------------------------------------------------------------------------------------------------------


class Finding(Struct, frozen=True, kw_only=True):
    holds: bool
    claim: str
    figures: str


def findings(told: Told, log: Sequence[StoredEvent], effects: Sequence[str]) -> list[Finding]:
    """Each claim of the demo with what was counted; all of them have to hold."""
    missing = {event.id for event in log} - {event.id for event in told.seen}
    doubled = len(told.seen) - len({event.id for event in told.seen})
    differences = check_seen([event.whole for event in told.seen], log)
    broken = check_log(log)
    asked = Counter(call for event in told.seen for call in _calls(event))
    answered = Counter(event.text("tool_call_id") for event in told.seen if event.type == "tool.completed")
    messages = [_shown_and_stored(told.seen, event) for event in told.seen if event.type == "output.message.completed"]
    recovered = [kill for kill in told.kills if kill.recovered_seconds is not None]
    return [
        Finding(
            holds=len(recovered) == len(told.kills),
            claim="the worker was killed twice, the turn went on",
            figures=", ".join(f"{kill.again} after {kill.recovered_seconds:.1f} s" for kill in recovered) or "not once",
        ),
        Finding(
            holds=not missing,
            claim="nothing lost",
            figures=f"{len(log) - len(missing)} of the {len(log)} stored events reached the client",
        ),
        Finding(
            holds=not doubled and not differences,
            claim="nothing doubled, same order, same content",
            figures=_words(differences) or f"{len(told.seen)} events compared with the log, {doubled} came twice",
        ),
        Finding(
            holds=bool(messages) and all(shown == kept for shown, kept in messages),
            claim="every streamed message is whole",
            figures=f"{sum(shown == kept for shown, kept in messages)} of {len(messages)} add up to the stored text",
        ),
        Finding(
            holds=bool(asked) and asked == answered and set(answered.values()) == {1},
            claim="one result per tool call",
            figures=f"{sum(answered.values())} results for {len(asked)} calls",
        ),
        Finding(
            holds=len(effects) == 1,
            claim="the invitation was sent once",
            figures=f"{len(effects)} line(s) in the file that stands for the world",
        ),
        Finding(
            holds=not broken,
            claim="the log breaks no rule",
            figures=_words(broken) or "order, pairs, receipts and results checked",
        ),
    ]


def _words(violations: Sequence[Violation]) -> str:
    return "; ".join(f"{one.rule} at {one.sequence}: {one.message}" for one in violations[:3])


def _calls(event: SeenEvent) -> list[str]:
    if event.type != "act.started":
        return []
    calls = event.data["tool_calls"]
    assert isinstance(calls, list)
    return [str(call["id"]) for call in calls]


def _shown_and_stored(seen: Sequence[SeenEvent], completed: SeenEvent) -> tuple[str, str]:
    """What the deltas of a message added up to on the client's screen, and the message as it is stored."""
    message = completed.data["message"]
    assert isinstance(message, dict)
    deltas = [
        event for event in seen if event.type == "output.message.delta" and event.text("message_id") == message["id"]
    ]
    shown = deltas[-1].text("accumulated") if deltas else ""
    return shown, "".join(part["text"] for part in message["content"] if part["type"] == "text")


async def read_log(log: EventLog, session_id: str) -> list[StoredEvent]:
    events: list[StoredEvent] = []
    while page := await log.read(session_id, after_sequence=events[-1].sequence if events else 0, limit=PAGE_EVENTS):
        events.extend(page)
    return events


# --- The screen ------------------------------------------------------------------------------------------------------


class Screen:
    """On a terminal, what is under way lives below the lines that are settled; elsewhere there are only those lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._thinking = ""
        self._text = ""
        self._tools: dict[str, str] = {}
        self._progress: dict[str, str] = {}
        self._waiting_since: float | None = None
        self._live = Live(
            get_renderable=self._under_way,
            console=console,
            refresh_per_second=15,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @contextlib.contextmanager
    def open(self):
        """Everything under way is wiped at the end, whatever ends it."""
        if not self._console.is_terminal:
            yield
            return
        with self._live:
            yield

    def note(self, text: str) -> None:
        self._line("·", text, "dim")

    def show(self, event: SeenEvent) -> None:
        match event.type:
            case "input.message":
                self._line("you", _content(event.data["message"]), "bold")
            case "reason.thinking.delta":
                self._thinking = event.text("accumulated")
            case "reason.thinking.completed":
                self._line("thinks", event.text("thinking"), "italic dim")
                self._thinking = ""
            case "output.message.delta":
                self._text = event.text("accumulated")
            case "reason.recovered":
                self.note(
                    f"the next attempt takes back {event.data.get('accumulated_len', 0)} characters of the dead one"
                )
                self._text = self._thinking = ""
            case "output.message.completed":
                self._line("agent", _content(event.data["message"]), "cyan")
                self._text = self._thinking = ""
            case "tool.started":
                call = event.data["tool_call"]
                assert isinstance(call, dict)
                self._tools[str(call["id"])] = f"{call['name']} {json.dumps(call['arguments'])}"
            case "tool.progress":
                self._progress[event.text("tool_call_id")] = event.text("message")
                self._line("tool", event.text("message"), "dim")
            case "tool.completed":
                self._completed(event)
            case "turn.completed":
                usage = event.data.get("iterations")
                self.note(f"turn completed after {usage} iterations")
            case "turn.failed" | "turn.cancelled" | "turn.sealed":
                self._line("failed", event.text("error") or event.type, "bold red")

    def killed(self, kill: Kill, *, dead: int, successor: int) -> None:
        self._waiting_since = time.monotonic()
        self._line("SIGKILL", f"worker {dead} dies {kill.where}; worker {successor} starts", "bold red")

    def recovered(self, kill: Kill) -> None:
        self._waiting_since = None
        self._line("alive", f"{kill.again} after {kill.recovered_seconds:.1f} s", "bold green")

    def proof(self, found: Sequence[Finding]) -> None:
        for finding in found:
            mark, style = ("✓", "green") if finding.holds else ("✗", "bold red")
            self._console.print(Text.assemble(("  " + mark, style), f" {finding.claim}: ", (finding.figures, "dim")))

    def _completed(self, event: SeenEvent) -> None:
        call_id = event.text("tool_call_id")
        call = self._tools.pop(call_id, event.text("tool_name"))
        self._progress.pop(call_id, None)
        result = event.text("error") or _content({"content": event.data.get("result") or []})
        attempts = event.data.get("attempts")
        again = f" (attempt {attempts})" if isinstance(attempts, int) and attempts > 1 else ""
        mark, style = ("✓", "green") if event.data.get("success") else ("✗", "red")
        self._line("tool", Text.assemble((f"{mark} {call}", style), f"{again} → {result}"))

    def _line(self, who: str, text: str | Text, style: str = "") -> None:
        self._console.print(Text.assemble((f"{who:>8}  ", "dim"), text if isinstance(text, Text) else (text, style)))

    def _under_way(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._thinking and not self._text:
            parts.append(Text(f"          {self._thinking}▌", style="italic dim"))
        if self._text:
            parts.append(Panel(Text(self._text + "▌", style="cyan"), title="agent", title_align="left", style="dim"))
        for call_id, call in self._tools.items():
            doing = self._progress.get(call_id, "running")
            parts.append(Spinner("dots", Text.assemble((call, "yellow"), f"  {doing}")))
        if self._waiting_since is not None:
            waited = time.monotonic() - self._waiting_since
            parts.append(Spinner("point", Text(f"no worker has it: {waited:.1f} s", style="red")))
        return Group(*parts)


def _content(message: object) -> str:
    assert isinstance(message, dict)
    return " ".join(str(part.get("text", "")) for part in message["content"] if part.get("type") == "text")


# --- The command -----------------------------------------------------------------------------------------------------


async def run_demo(environ: Mapping[str, str], *, model: str | None = None, keep: bool = False) -> int:
    """The exit code: 0 when every claim holds, 1 when one does not, 130 when it was interrupted before its end."""
    environ = {**environ, **DEV_ENVIRONMENT}
    settings = load_settings(environ)
    configure_logging(settings.log_level if environ.get("LOG_LEVEL") else "error", settings.log_format)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    listener = bound(ListenAddress(host=LOOPBACK, port=0))
    configure_temporal_logging()
    with stop_on_signals() as stop:
        async with contextlib.AsyncExitStack() as stack:
            with in_progress("Starting PostgreSQL, Temporal and the API"):
                dev = await stack.enter_async_context(dev_stack(environ, listener, data_dir=None, with_worker=False))
            _welcome(console, dev.addresses)
            playing = asyncio.ensure_future(_play(environ, dev, console, model))
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


async def _play(environ: Mapping[str, str], dev: DevStack, console: Console, model: str | None) -> tuple[str, bool]:
    """The session, and whether every claim holds. Raises `DemoFailure`."""
    directory = dev.children.temporary_directory("everruns-demo-")
    effects = directory / "effects"
    worker = Worker(
        dev.children,
        {**environ, **dev.addresses.environment, EFFECTS_FILE_VARIABLE: str(effects), "LOG_FORMAT": "console"},
        directory / "worker.log",
    )
    await worker.start()
    screen = Screen(console)
    screen.note(f"worker {worker.pid} is a process of its own")
    async with httpx.AsyncClient(
        base_url=f"{dev.addresses.api}/v1/", timeout=READ_TIMEOUT_SECONDS, trust_env=False
    ) as client:
        with screen.open():
            telling = asyncio.ensure_future(tell(client, worker, screen, model))
            try:
                await asyncio.wait(
                    {telling, worker.failure}, timeout=STORY_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if worker.failure.done():
                    worker.failure.result()
                if not telling.done():
                    raise DemoFailure(f"the turn did not end within {STORY_SECONDS:.0f} s")
                told = telling.result()
            finally:
                telling.cancel()
                worker.unwatch()
    log = await read_log(dev.foundation.log, told.session_id)
    sent = effects.read_text().splitlines() if effects.exists() else []
    found = findings(told, log, sent)
    console.print(f"\nThe proof, after {told.seconds:.0f} s:")
    screen.proof(found)
    return told.session_id, all(finding.holds for finding in found)


def _welcome(console: Console, addresses: DevAddresses) -> None:
    console.print(f"Everruns is up after {addresses.ready_seconds:.1f} s")
    console.print(f"  API              {addresses.api}")
    console.print(f"  Temporal Web UI  {addresses.temporal_ui}\n")


def _farewell(console: Console, addresses: DevAddresses, session_id: str, *, keep: bool) -> None:
    link = f"{addresses.temporal_ui}/namespaces/default/workflows/{session_id}"
    if keep:
        console.print(f"\nThe turn in the Temporal Web UI, with both lost attempts:\n  {link}")
        console.print(f"Its events:\n  {addresses.api}/v1/sessions/{session_id}/events\nCtrl-C stops everything.")
    else:
        console.print("\nTo look at the turn in the Temporal Web UI, run `everruns demo --keep`.")
