"""What the person at the terminal sees of the demo."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.text import Text

from cli.demo_proof import Finding
from cli.demo_story import Kill, SeenEvent

_MARKS: Final[Mapping[bool | None, tuple[str, str]]] = {
    True: ("✓", "green"),
    False: ("✗", "bold red"),
    None: ("–", "yellow"),
}


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
                self._recovered(event)
            case "llm.generation" if event.part("metadata").get("success") is False:
                self.note(f"the call of the model failed: {event.part('metadata').get('error')}")
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

    def settled(self, kill: Kill) -> None:
        self._waiting_since = None
        if kill.recovered_seconds is None:
            self._line("alive", "the signal came too late: there was nothing left to interrupt", "dim")
        else:
            self._line("alive", f"{kill.how} after {kill.recovered_seconds:.1f} s", "bold green")

    def proof(self, found: Sequence[Finding]) -> None:
        for finding in found:
            mark, style = _MARKS[finding.holds]
            shown = finding.figures if finding.holds is not None else f"not shown: {finding.figures}"
            self._console.print(Text.assemble(("  " + mark, style), f" {finding.claim}: ", (shown, "dim")))

    def _recovered(self, event: SeenEvent) -> None:
        length = event.data.get("accumulated_len", 0)
        if event.text("mode") == "finalize":
            self.note(
                f"the next attempt keeps all {length} characters of the dead one: nothing is missing but their end"
            )
            return
        self.note(f"the next attempt takes back {length} characters of the dead one")
        self._text = self._thinking = ""

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
