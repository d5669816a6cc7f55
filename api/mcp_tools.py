"""What our MCP server offers: run agents, talk to sessions, look things up.

Every tool goes through the REST API, inside this process, with the caller's own headers. So each rule of the API holds here too,
and a tool can do nothing that its caller could not do with a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import quote, unquote, urlsplit

import httpx2
import msgspec
from litestar import Litestar
from msgspec import Meta, Struct

from api.services import Services
from domain.events import EventContext, StoredEvent

MAX_WAIT_SECONDS: Final = 600.0
MAX_RESULT_BYTES: Final = 64 * 1024
FORWARDED: Final = ("authorization", "x-org-id", "x-project-id", "end-user", "everruns-change-reason", "x-request-id")
ENDINGS: Final[dict[str, Literal["completed", "failed", "cancelled"]]] = {
    "turn.completed": "completed",
    "turn.failed": "failed",
    "turn.sealed": "failed",
    "turn.cancelled": "cancelled",
}
READ: Final = ("turn.started", "reason.started", "turn.cancelled")
"""Events that say which messages a turn has read."""

WATCHED: Final = (*ENDINGS, *READ, "tool.started", "tool.call_requested", "output.message.completed")

WaitSeconds = Annotated[
    float,
    Meta(
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="How long to wait for the answer; after that the turn goes on without you.",
    ),
]
Text = Annotated[str, Meta(min_length=1, max_length=1_000_000)]

Progress = Callable[[str], Awaitable[None]]


class ToolFailure(Exception):
    """What a tool's caller is told instead of a result."""


class AgentRun(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    agent: Annotated[str, Meta(min_length=1, max_length=200, description="Name or id of the agent.")]
    message: Annotated[Text, Meta(description="What the agent is to do.")]
    title: Annotated[str, Meta(max_length=200)] | None = None
    wait_seconds: WaitSeconds = 120.0


class SendMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    session_id: Annotated[str, Meta(min_length=1, max_length=100)]
    message: Text
    wait_seconds: WaitSeconds = 120.0


class GetStatus(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    session_id: Annotated[str, Meta(min_length=1, max_length=100)]


class Discover(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    search: (
        Annotated[str, Meta(max_length=200, description="Words that path, name or summary contain. All when left out.")]
        | None
    ) = None


class Query(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[
        str, Meta(min_length=4, max_length=2_000, description="A path that `discover` lists, such as `/v1/agents`.")
    ]
    parameters: Annotated[
        dict[str, str | int | float | bool | list[str]], Meta(description="Query parameters by name.")
    ] = {}


class McpTool(Struct, frozen=True, kw_only=True):
    name: str
    description: str
    arguments: type[Struct]
    run: Callable[[McpCall, Any], Awaitable[dict[str, object]]]
    readonly: bool


class McpCall(Struct, frozen=True, kw_only=True):
    """One call's surroundings. `headers` are the caller's, lower case."""

    services: Services
    app: Litestar
    headers: Mapping[str, str]
    progress: Progress

    async def request(
        self, method: str, path: str, *, body: object = None, parameters: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """An API request. Raises `ToolFailure` with the problem's own words."""
        headers = {name: value for name, value in self.headers.items() if name in FORWARDED}
        transport = httpx2.ASGITransport(app=cast("Any", self.app))
        base = f"http://127.0.0.1{self.services.settings.api_prefix}"
        async with httpx2.AsyncClient(transport=transport, base_url=base, headers=headers) as client:
            content = None if body is None else msgspec.json.encode(body)
            sent = {"content-type": "application/json"} if body is not None else {}
            answer = await client.request(
                method, path, content=content, headers=sent, params=cast("Any", dict(parameters or {}))
            )
        try:
            decoded = msgspec.json.decode(answer.content) if answer.content else {}
        except msgspec.DecodeError:
            raise ToolFailure(f"`{path}` is not served as JSON and cannot be read here") from None
        if not answer.is_success:
            problem = cast("dict[str, object]", decoded) if isinstance(decoded, dict) else {}
            raise ToolFailure(
                str(problem.get("detail") or problem.get("title") or f"refused with {answer.status_code}")
            )
        return cast("dict[str, object]", decoded) if isinstance(decoded, dict) else {"data": decoded}


async def agent_run(call: McpCall, arguments: AgentRun) -> dict[str, object]:
    agent = await call.request("GET", f"/v1/agents/{_segment(arguments.agent)}")
    session = await call.request("POST", "/v1/sessions", body={"agent_id": agent["id"], "title": arguments.title})
    return await _send(call, str(session["id"]), arguments.message, arguments.wait_seconds)


async def session_send_message(call: McpCall, arguments: SendMessage) -> dict[str, object]:
    await call.request("GET", f"/v1/sessions/{_segment(arguments.session_id)}")
    return await _send(call, arguments.session_id, arguments.message, arguments.wait_seconds)


async def session_get_status(call: McpCall, arguments: GetStatus) -> dict[str, object]:
    session = await call.request("GET", f"/v1/sessions/{_segment(arguments.session_id)}")
    newest = await call.request(
        "GET",
        f"/v1/sessions/{_segment(arguments.session_id)}/events",
        parameters={"types": list(ENDINGS), "limit": 1, "order_desc": "true"},
    )
    endings = cast("list[dict[str, Any]]", newest["data"])
    shown = {
        key: session[key]
        for key in ("id", "title", "status", "agent_id", "output_preview", "usage", "updated_at")
        if session.get(key) is not None
    }
    if endings:
        shown["last_turn"] = {"status": ENDINGS[endings[0]["type"]], "error": endings[0]["data"].get("error")}
    if session["status"] == "waitingfortoolresults":
        shown["waiting"] = await _waiting(call, arguments.session_id)
    return shown


async def discover(call: McpCall, arguments: Discover) -> dict[str, object]:
    words = (arguments.search or "").lower().split()
    found: list[dict[str, object]] = []
    for path, item in (call.app.openapi_schema.paths or {}).items():
        operation = item.get
        short = path.removeprefix(call.services.settings.api_prefix)
        if operation is None or not short.startswith("/v1/") or short.endswith("/sse"):
            continue
        text = f"{short} {operation.operation_id} {operation.summary}".lower()
        if all(word in text for word in words):
            parameters = [
                cast("Any", one).name for one in operation.parameters or [] if cast("Any", one).param_in == "query"
            ]
            found.append({"path": short, "summary": operation.summary, "parameters": parameters})
    return {"operations": found}


async def query(call: McpCall, arguments: Query) -> dict[str, object]:
    path = urlsplit(arguments.path)
    if path.scheme or path.netloc or not path.path.startswith("/v1/") or ".." in unquote(path.path):
        raise ToolFailure("`path` must be one of those that `discover` lists, such as `/v1/agents`")
    if path.path.endswith("/sse"):
        raise ToolFailure("Streams cannot be read here; read `/v1/sessions/{session_id}/events` instead")
    given = dict(arguments.parameters)
    if path.query:
        raise ToolFailure("Give query parameters in `parameters`, not in `path`")
    return await call.request("GET", path.path, parameters=given)


async def _send(call: McpCall, session_id: str, text: str, wait_seconds: float) -> dict[str, object]:
    """Send a message and wait for the turn that reads it."""
    before = await call.services.log.last_sequence(session_id)
    body = {"message": {"role": "user", "content": [{"type": "text", "text": text}]}}
    async with call.services.streams.watch(session_id) as grown:
        message = await call.request("POST", f"/v1/sessions/{session_id}/messages", body=body)
        seen = _SentMessage(session_id=session_id, message_id=str(message["id"]), cursor=before)
        try:
            async with asyncio.timeout(wait_seconds):
                while not seen.over:
                    grown.clear()
                    await seen.read(call)
                    if not seen.over:
                        await grown.wait()
        except TimeoutError:
            pass
    if seen.waits:
        return {**seen.result("waiting"), "waiting": await _waiting(call, session_id)}
    return seen.result(seen.status or "running")


class _SentMessage(Struct, kw_only=True):
    """What the log says of the turn that reads a message."""

    session_id: str
    message_id: str
    cursor: int
    turn_id: str | None = None
    status: str | None = None
    waits: bool = False
    answer: str | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.status is not None or self.waits

    def result(self, status: str) -> dict[str, object]:
        found = {"session_id": self.session_id, "status": status, "answer": self.answer, "error": self.error}
        return {key: value for key, value in found.items() if value is not None}

    async def read(self, call: McpCall) -> None:
        events = await call.services.log.read(self.session_id, after_sequence=self.cursor, limit=1_000, types=WATCHED)
        for event in events:
            self.cursor = event.sequence
            await self._take(event, call)

    async def _take(self, event: StoredEvent, call: McpCall) -> None:
        data = msgspec.json.decode(event.data, type=dict[str, Any])
        turn_id = msgspec.json.decode(event.context, type=EventContext).turn_id
        if event.type in READ and self.message_id in (data.get("input_message_ids") or []):
            # The turn it began, or one that was at work already.
            self.turn_id = turn_id
        if self.turn_id is None or turn_id != self.turn_id:
            return
        match event.type:
            case "tool.started":
                await call.progress(f"{data['tool_call']['name']} …")
            case "tool.call_requested":
                self.waits = True
            case "output.message.completed":
                parts = data["message"]["content"]
                self.answer = "".join(part["text"] for part in parts if part["type"] == "text") or self.answer
            case ending if ending in ENDINGS:
                self.status = ENDINGS[ending]
                self.error = data.get("error") or data.get("detail")
            case _:
                pass


async def _waiting(call: McpCall, session_id: str) -> dict[str, object]:
    """What the newest request asks of a client or a person."""
    newest = await call.request(
        "GET",
        f"/v1/sessions/{session_id}/events",
        parameters={"types": ["tool.call_requested"], "limit": 1, "order_desc": "true"},
    )
    events = cast("list[dict[str, Any]]", newest["data"])
    data = events[0]["data"] if events else {}
    return {key: data[key] for key in ("tool_calls", "questions", "waiting") if data.get(key)}


def _segment(value: str) -> str:
    """One segment of a path. Raises `ToolFailure`: an encoded slash is a slash again where paths are matched."""
    if "/" in value or value in (".", ".."):
        raise ToolFailure("Not found: names and ids of agents and sessions have no slash in them")
    return quote(value, safe="")


TOOLS: Final = (
    McpTool(
        name="agent_run",
        description="Begin a session with an agent, give it a task and wait for its answer. The session can be gone on with.",
        arguments=AgentRun,
        run=agent_run,
        readonly=False,
    ),
    McpTool(
        name="session_send_message",
        description="Send a message to a session and wait for the answer. A turn that is at work reads the message too.",
        arguments=SendMessage,
        run=session_send_message,
        readonly=False,
    ),
    McpTool(
        name="session_get_status",
        description="What a session is doing, how its last turn ended, and what it waits for.",
        arguments=GetStatus,
        run=session_get_status,
        readonly=True,
    ),
    McpTool(
        name="discover",
        description="List what `query` can read: agents, sessions, events, files, models and so on.",
        arguments=Discover,
        run=discover,
        readonly=True,
    ),
    McpTool(
        name="query",
        description="Read from the API: one of the paths that `discover` lists, with ids filled in.",
        arguments=Query,
        run=query,
        readonly=True,
    ),
)
