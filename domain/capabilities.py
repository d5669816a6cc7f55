"""What a capability is: a manifest and the tools it contributes.

A capability is one module in `activities/capabilities` that defines a `Capability`, registered the same public way for
built-ins and for anyone else's. Its tools are typed async functions: the JSON Schema a model sees comes from the argument
Struct, and arguments are checked against it before the function runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from domain.budgets import Budget
from domain.config import NetworkAccessList, TurnConfig
from domain.memory_access import OpenMemory
from domain.messages import Message
from domain.schedules import SessionSchedules
from domain.session_databases import SessionDatabases
from domain.session_info import SessionInfo
from domain.session_past import SessionPast
from domain.session_storage import SessionStorage
from domain.tasks import SessionTasks
from domain.tools import SideEffect, ToolCall, ToolDefinition
from domain.workspace import FileEntry, WorkspaceFiles


class ToolError(Exception):
    """An expected failure of a tool: its text goes to the model. Any other exception becomes a generic text."""


class ToolWaits(Exception):
    """Raised by a tool that cannot go on without a person. The call is put to rest, which costs nothing for days; once
    somebody has answered over the API it is run again, and finds `state` and the answer in `ToolContext.resumed`.

    `kind` names the endpoint that takes the answer; `request` is what clients are shown (JSON-able), `state` is the tool's own
    and stays in PostgreSQL. Neither may hold a secret.
    """

    def __init__(self, kind: str, request: dict[str, object], state: dict[str, object]) -> None:
        super().__init__(f"waits for {kind}")
        self.kind = kind
        self.request = request
        self.state = state


class Resumption(Struct, frozen=True, kw_only=True):
    """Why a call that was put to rest runs again."""

    state: dict[str, object]
    answer: dict[str, object]


class ToolContext(Protocol):
    """What a running tool may use of its surroundings."""

    @property
    def session_id(self) -> str: ...

    @property
    def turn_id(self) -> str: ...

    @property
    def tool_call_id(self) -> str: ...

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this call: pass it on to whatever has effects outside."""
        ...

    @property
    def attempt(self) -> int: ...

    @property
    def resumed(self) -> Resumption | None:
        """Set when the call goes on after it had raised `ToolWaits`."""
        ...

    @property
    def config(self) -> Struct | None:
        """The configuration of the tool's capability, decoded into its `config` Struct; None when it takes none."""
        ...

    @property
    def network_access(self) -> NetworkAccessList:
        """Which hosts the turn's configuration lets tools reach."""
        ...

    @property
    def files(self) -> WorkspaceFiles:
        """The session's workspace."""
        ...

    @property
    def storage(self) -> SessionStorage:
        """The session's own values and secrets."""
        ...

    @property
    def schedules(self) -> SessionSchedules:
        """Messages that come back to the session later."""
        ...

    @property
    def tasks(self) -> SessionTasks:
        """Work that goes on beside the session's turn."""
        ...

    @property
    def databases(self) -> SessionDatabases:
        """The session's SQLite databases."""
        ...

    @property
    def past(self) -> SessionPast:
        """All messages of the session, also those that prompts do not show any more."""
        ...

    @property
    def timezone(self) -> str | None:
        """The user's time zone (IANA name) when the message that started the turn names one."""
        ...

    async def memory(self, id_or_name: str) -> OpenMemory | None:
        """An active memory of the session's organization; None when there is none of that name or id."""
        ...

    async def progress(self, message: str) -> None:
        """Tell clients how far the tool is (`tool.progress`)."""
        ...

    async def output(self, text: str, stream: str = "stdout") -> None:
        """Stream output to clients (`tool.output.delta`)."""
        ...

    async def session_info(self) -> SessionInfo:
        """What this session is and has used so far."""
        ...

    async def set_title(self, title: str) -> None:
        """Rename the session (`session.title.updated`, unless that is its title already)."""
        ...

    async def budgets(self) -> Sequence[Budget]:
        """Those the session is charged to, its own first."""
        ...

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        """Tell clients that a file of the workspace was written (`file.written`)."""
        ...


class NoArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a tool that takes none."""


class Tool(Struct, frozen=True, kw_only=True):
    """A tool we define. `arguments` is the Struct its calls are decoded into; the function's result must be JSON-able."""

    name: str
    description: str
    run: Callable[..., Awaitable[object]]
    arguments: type[Struct] = NoArguments
    parameters: dict[str, object] | None = None
    """JSON Schema of arguments that no Struct of ours describes (a tool of an MCP server). `run` then gets the checked object
    itself, a dict, and `arguments` means nothing."""
    display_name: str | None = None
    side_effect: SideEffect = SideEffect.AT_MOST_ONCE
    concurrency_class: str | None = None
    timeout_seconds: float = 300.0
    readonly: bool | None = None
    answered_by: Literal["worker", "user"] = "worker"
    """Who gives a call its result: a worker that awaits `run`, or a person, over the API. Then no worker does anything: arguments
    are checked when the call is planned, the turn waits for it as for a client-side call, and `run` is never awaited."""


class SessionView(Protocol):
    """What a capability may look at while a prompt is put together."""

    @property
    def session_id(self) -> str: ...

    @property
    def files(self) -> WorkspaceFiles: ...

    @property
    def storage(self) -> SessionStorage: ...


class CallCheck(Struct, frozen=True, kw_only=True):
    """A call the model has just asked for. `earlier` are those before it in the same answer, `history` is the prompt's.

    `tool` is None for a client's tool and for one that nobody offers.
    """

    call: ToolCall
    tool: Tool | None
    capability_id: str | None
    earlier: Sequence[ToolCall]
    history: Sequence[Message]
    session_id: str = ""


class GuardrailHit(Struct, frozen=True, kw_only=True):
    """A check that found something (`guardrail.triggered`). What it found is in no field."""

    capability_id: str
    check_id: str
    stage: Literal["output", "tool_use", "tool_output"]
    action: Literal["block", "log"]
    reason_code: str


class Refused(Struct, frozen=True, kw_only=True):
    """The call does not run; `text` is its result, for the model to act on."""

    text: str
    hits: tuple[GuardrailHit, ...] = ()
    keeps_arguments: bool = True
    """False: the arguments themselves must not be known to anybody, and are gone."""


class Noted(Struct, frozen=True, kw_only=True):
    """The call may run, as far as this capability is concerned; what it found goes into the log."""

    hits: tuple[GuardrailHit, ...]


class NeedsApproval(Struct, frozen=True, kw_only=True):
    """The call runs only after a person has allowed it. `reason` is shown to that person."""

    reason: str
    wait_seconds: float


class ResultCheck(Struct, frozen=True, kw_only=True):
    """The text a tool returned or failed with, before anybody else sees it."""

    call: ToolCall
    text: str


class CheckedResult(Struct, frozen=True, kw_only=True):
    """What a check made of a result: another text, if `text` is one, and what it found."""

    text: str | None = None
    hits: tuple[GuardrailHit, ...] = ()


class OutputReplacement(Struct, frozen=True, kw_only=True):
    """What is shown instead of a model's text (`output.message.replaced`)."""

    capability_id: str
    guardrail_id: str
    reason_code: str
    replacement: str


class OutputVerdict(Struct, frozen=True, kw_only=True):
    """`shown` counts the characters, from the beginning of the answer, that may be shown by now; it never goes back.

    `hits` are those not told before. A replacement ends the answer: nothing beyond `shown` is ever seen.
    """

    shown: int
    hits: tuple[GuardrailHit, ...] = ()
    replacement: OutputReplacement | None = None


class OutputGuard(Protocol):
    """Watches one text of a model while it is written; made anew for each call."""

    def feed(self, piece: str, *, finished: bool = False) -> OutputVerdict:
        """The next piece of the text; with `finished`, the last. May take a second: called in a thread, never side by side."""
        ...


class Capability(Struct, frozen=True, kw_only=True):
    """A capability's manifest."""

    id: str
    name: str
    description: str
    aliases: tuple[str, ...] = ()
    """Other ids that references may use."""
    category: str | None = None
    icon: str | None = None
    status: Literal["available", "coming_soon", "deprecated"] = "available"
    risk_level: Literal["low", "medium", "high"] = "low"
    dependencies: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    system_prompt: str | None = None
    config: type[Struct] | None = None
    """Struct that `config` of a reference is decoded into; its JSON Schema is published as `config_schema`."""
    config_prompt: Callable[[Struct | None], str | None] | None = None
    """Prompt text that depends on the decoded configuration; it comes after `system_prompt`."""
    tools: tuple[Tool, ...] = ()
    session_prompt: Callable[[SessionView, Struct | None], Awaitable[str | None]] | None = None
    """Prompt text that depends on the session, asked for before each model call; it comes after `config_prompt`."""
    arrange_messages: Callable[[list[Message], Struct | None], list[Message]] | None = None
    """What a prompt's conversation looks like to the model; the log stays as it is. Pure, and must keep calls and results
    together."""
    prompt_is_secret: bool = False
    """Whether `session_prompt` is left out of the record of a call (`llm.generation`)."""
    check_call: Callable[[CallCheck, Struct | None], Refused | NeedsApproval | Noted | None] | None = None
    """Asked about every call before it is entered into the ledger. The first capability that refuses has the word."""
    check_result: Callable[[ResultCheck, Struct | None], str | CheckedResult | None] | None = None
    """Asked about every result of a server-side tool before it is stored; a text replaces it."""
    withholds_output: Callable[[Struct | None], bool] | None = None
    """Whether what a tool streams while it runs (`tool.output.delta`) must not be shown, because its result may be replaced."""
    guard_output: Callable[[Struct | None, SessionView], OutputGuard | None] | None = None
    """Watches what the model writes, thinking included; a guard of its own for each text. None costs nothing."""
    is_guardrail: bool = False
    """Whether it constrains what agents do instead of adding to it; for user interfaces."""


class CapabilitySource(Protocol):
    """Where capabilities come from that are not built in: those of a session's own configuration."""

    async def capabilities(self, session_id: str, config: TurnConfig) -> Sequence[Capability]:
        """Those that `config` names, each under the id its reference has (`mcp:…`, `declarative:…`, `skill:…`), and those it
        has without a reference (scoped MCP servers).

        Never raises for what somebody else is to blame for (a server that is down): that capability has a tool or a prompt that
        says so, or is left out.
        """
        ...


class CapabilityInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A capability as `GET /v1/capabilities` shows it."""

    id: str
    name: str
    description: str
    status: str
    icon: str | None = None
    category: str | None = None
    system_prompt: str | None = None
    tool_definitions: list[ToolDefinition] = []
    dependencies: list[str] = []
    features: list[str] = []
    risk_level: str | None = None
    is_mcp: bool = False
    is_skill: bool = False
    is_guardrail: bool | None = None
    config_schema: dict[str, object] | None = None
    config_ui_schema: dict[str, object] | None = None
    docs_slug: str | None = None
    agent_count: int | None = None
    harness_count: int | None = None
    localizations: dict[str, object] | None = None
