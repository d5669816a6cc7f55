"""One tool call: check the arguments, run the tool within its time, turn whatever happens into a text for the model.

Nothing a tool does may fail a turn, so nothing but a cancellation and the wish to wait leave `call_tool`.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec
from msgspec import Struct

from activities.capabilities.json_schema import schema_problem
from activities.capabilities.tool_schema import schema_at, struct_schema, tool_parameters
from domain.capabilities import GuardrailHit, Tool, ToolContext, ToolError, ToolWaits
from domain.events import ToolStatus
from domain.messages import ContentPart, TextPart
from domain.session_storage import StorageProblem
from domain.tasks import TaskProblem
from domain.tools import SideEffect
from domain.workspace import FileProblem

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 64 * 1024
"""The hard limit of a result in a conversation, note included."""

_NOTE_BYTES = 200
INTERNAL_ERROR = "The tool failed because of an internal error. Its details are in the server's log."


class ToolOutcome(Struct, frozen=True, kw_only=True):
    """`result` on success, however long it is, `error` otherwise."""

    result: list[ContentPart] | None
    error: str | None
    status: ToolStatus
    hits: tuple[GuardrailHit, ...] = ()


async def call_tool(tool: Tool, context: ToolContext, arguments: dict[str, object]) -> ToolOutcome:
    problem = arguments_problem(tool, arguments)
    if problem is not None:
        return _failed(problem)
    decoded = arguments if tool.parameters is not None else msgspec.convert(arguments, tool.arguments)
    deadline = asyncio.timeout(tool.timeout_seconds)
    try:
        async with deadline:
            value = await tool.run(context, decoded)
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        # A lone surrogate has no place in UTF-8 and would only fail later, where the result is stored.
        text = text.encode("utf-8", "replace").decode()
        return ToolOutcome(result=[TextPart(text=text)], error=None, status=ToolStatus.SUCCESS)
    except ToolWaits:
        raise
    except (ToolError, FileProblem, StorageProblem, TaskProblem) as error:
        return _failed(str(error) or "The tool failed.")
    except TimeoutError:
        # A tool's own TimeoutError (a socket, say) is just one of its failures.
        if deadline.expired():
            return _failed(_timeout_text(tool), ToolStatus.TIMEOUT)
        logger.exception("tool failed", extra=_log_fields(tool, context))
        return _failed(INTERNAL_ERROR)
    except Exception:
        logger.exception("tool failed", extra=_log_fields(tool, context))
        return _failed(INTERNAL_ERROR)


def arguments_problem(tool: Tool, arguments: dict[str, object]) -> str | None:
    """What the model is told about arguments that don't fit; None when they do."""
    if tool.parameters is not None:
        problem = schema_problem(tool_parameters(tool), arguments)
        return None if problem is None else truncated(f"Invalid arguments for `{tool.name}`: {problem}.")
    try:
        msgspec.convert(arguments, tool.arguments)
    except msgspec.ValidationError as error:
        return truncated(_explain(tool, error))
    return None


def truncated(text: str) -> str:
    """The text, or as much of its beginning as fits, cut between characters and followed by a note."""
    # A lone surrogate has no place in UTF-8 and would only fail later, where the result is stored.
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_RESULT_BYTES:
        return data.decode()
    shown = cut(data, MAX_RESULT_BYTES - _NOTE_BYTES)
    return (
        f"{shown.decode()}\n\n[Output truncated: the first {len(shown):,} of {len(data):,} bytes are shown. "
        "Ask for less or for a part of it to see the rest.]"
    )


def cut(data: bytes, limit: int) -> bytes:
    """The beginning of UTF-8 text, at most `limit` bytes, ending between characters."""
    return data[:limit].decode("utf-8", "ignore").encode()


def _failed(text: str, status: ToolStatus = ToolStatus.ERROR) -> ToolOutcome:
    return ToolOutcome(result=None, error=truncated(text), status=status)


def _timeout_text(tool: Tool) -> str:
    text = f"`{tool.name}` did not finish within {tool.timeout_seconds:g} seconds and was stopped."
    if tool.side_effect is SideEffect.AT_MOST_ONCE:
        text += " It may have taken effect in part: find out before calling it again."
    return text


def _explain(tool: Tool, error: msgspec.ValidationError) -> str:
    """What is wrong, where, and what is accepted there."""
    message, _, path = str(error).partition(" - at `")
    path = path.removesuffix("`") or "$"
    schema = struct_schema(tool.arguments)
    where = "the arguments" if path == "$" else f"`{path.removeprefix('$.')}`"
    text = f"Invalid arguments for `{tool.name}`, in {where}: {message}."
    accepted = schema_at(schema, path)
    if accepted is not None:
        text += f" Accepted there: {msgspec.json.encode(accepted).decode()}"
    return text


def _log_fields(tool: Tool, context: ToolContext) -> dict[str, object]:
    return {
        "tool": tool.name,
        "session_id": context.session_id,
        "turn_id": context.turn_id,
        "tool_call_id": context.tool_call_id,
    }
