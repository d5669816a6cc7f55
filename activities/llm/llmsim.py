"""The simulated provider: a first-class driver whose every answer, delay and failure can be ordered with a script.

Anyone with curl can produce each failure the engine has to survive: the script travels in the metadata of a message. It is
looked for in the newest user message that has one, then in the model's own options, then in the model's name.

Nothing is remembered between calls. Which turn of a script plays follows from the conversation (how many agent messages stand
after the script), and every id from the step's idempotency key, so that another worker's attempt says exactly the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import cycle, islice
from typing import Literal

import msgspec
from msgspec import Struct

from activities.llm.llmsim_script import (
    DEFAULT_LOREM_TOKENS,
    SCRIPT_KEY,
    EchoScript,
    EmptyScript,
    ErrorSpec,
    FixedScript,
    LoremScript,
    Script,
    Timing,
    Turn,
    TurnsScript,
    parse_script,
    turn_at,
)
from domain.errors import InvalidInput
from domain.events import TokenUsage
from domain.messages import Message, Role, ToolCallPart, ToolResultPart
from domain.model import (
    Finished,
    ModelError,
    ModelErrorKind,
    ModelRequest,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallReady,
)
from domain.tools import ToolCall

__all__ = ["LlmSim", "Script", "parse_script"]

_CHARACTERS_PER_TOKEN = 4
_YIELD_EVERY_TOKENS = 64
"""Without delays a long answer never waits; a cancel must still get its turn on the loop."""

# Three letters and a space: N words are N tokens, in the stream and in the usage.
_LOREM = ("sit", "nec", "qui", "est", "non", "leo", "vel", "dui", "hac", "mus", "per", "dis", "aut", "sed", "nam")  # fmt: skip
_WORD = re.compile(r"\S+\s*|\s+")
_LOREM_MODEL = re.compile(r"llmsim-lorem(?:-([0-9]{1,9}))?")


class LlmSim:
    name = "llmsim"

    async def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        script, position = _script_of(request)
        index = sum(message.role is Role.AGENT for message in request.messages[position:])
        turn = _turn_of(script, index, request.messages)
        replay = index if isinstance(script, TurnsScript) and index >= len(script.turns) else None
        calls = _calls(turn, request, replay)
        fault = _fault_of(turn, request.attempt)
        usage = _usage(request.messages, turn, calls)
        if turn.overflow_above_tokens is not None and usage.input_tokens > turn.overflow_above_tokens:
            raise ModelError(
                ModelErrorKind.CONTEXT_OVERFLOW, f"Simulated error: {usage.input_tokens} tokens are too many"
            )

        if turn.first_token_delay_ms:
            await asyncio.sleep(turn.first_token_delay_ms / 1000)
        for sent, piece in enumerate(_pieces(turn, calls)):
            if fault is not None and sent >= fault.after_tokens:
                break
            if sent and turn.inter_token_delay_ms:
                await asyncio.sleep(turn.inter_token_delay_ms / 1000)
            elif sent % _YIELD_EVERY_TOKENS == _YIELD_EVERY_TOKENS - 1:
                await asyncio.sleep(0)
            yield piece

        # A fault placed beyond the end strikes here: one that was asked for always happens.
        if fault is not None:
            if fault.error is not None:
                raise fault.error.exception()
            if fault.kind == "stall":
                await asyncio.Event().wait()
            return
        yield Finished(
            reason=turn.finish_reason or ("tool_calls" if calls else "stop"),
            usage=usage,
            response_id=f"llmsim_{_digest(request, 'response')}",
        )


class _Fault(Struct, frozen=True, kw_only=True):
    kind: Literal["error", "cut", "stall"]
    after_tokens: int
    error: ErrorSpec | None = None


def _script_of(request: ModelRequest) -> tuple[Script, int]:
    """The script, and where in the messages counting begins."""
    newest_user = 0
    for position in range(len(request.messages) - 1, -1, -1):
        message = request.messages[position]
        if message.role is not Role.USER:
            continue
        newest_user = newest_user or position
        script = (message.metadata or {}).get(SCRIPT_KEY)
        if script is not None:
            return _parse(script, "metadata.llmsim"), position
    if "script" in request.options:
        return _parse(request.options["script"], "options.script"), newest_user
    return _script_of_name(request.model), newest_user


def _parse(script: object, root: str) -> Script:
    try:
        return parse_script(script, root=root)
    except InvalidInput as error:
        raise ModelError(ModelErrorKind.INVALID_REQUEST, f"Invalid llmsim script: {error.message}") from None


def _script_of_name(model: str) -> Script:
    if model == "llmsim-echo":
        return EchoScript()
    if match := _LOREM_MODEL.fullmatch(model):
        return _parse({"mode": "lorem", "tokens": int(match[1] or DEFAULT_LOREM_TOKENS)}, f"model `{model}`")
    return FixedScript()


def _turn_of(script: Script, index: int, messages: Sequence[Message]) -> Turn:
    """Every mode is one turn: what is left to tell apart is only where its text comes from."""
    match script:
        case TurnsScript():
            return turn_at(script, index)
        case EchoScript():
            text = "Echo: " + next((message.text for message in reversed(messages) if message.role is Role.USER), "")
        case LoremScript():
            text = " ".join(islice(cycle(_LOREM), script.tokens)) + "."
        case EmptyScript():
            text = ""
        case _:
            text = script.text
    return Turn(text=text, **{name: getattr(script, name) for name in Timing.__struct_fields__})


def _pieces(turn: Turn, calls: Sequence[ToolCall]) -> Iterator[StreamEvent]:
    for word in _WORD.finditer(turn.thinking or ""):
        yield ThinkingDelta(word[0])
    for word in _WORD.finditer(turn.text or ""):
        yield TextDelta(word[0])
    for call in calls:
        yield ToolCallReady(call)


def _calls(turn: Turn, request: ModelRequest, replay: int | None) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for number, call in enumerate(turn.tool_calls):
        if call.when is not None and not _prompt_contains(request.messages, call.when):
            continue
        if call.id is None:
            call_id = f"call_{_digest(request, f'call {number}')}"
        else:
            # A turn that plays again must not name an old call: the ledger would answer with that call's result.
            call_id = call.id if replay is None else f"{call.id}-{replay}"
        calls.append(ToolCall(id=call_id, name=call.name, arguments=call.arguments))
    return calls


def _digest(request: ModelRequest, what: str) -> str:
    seed = "\0".join((request.session_id, request.idempotency_key, what))
    return hashlib.sha256(seed.encode()).hexdigest()[:24]


def _fault_of(turn: Turn, attempt: int) -> _Fault | None:
    """The fault that strikes first; at the same token an error goes before a cut, a cut before a stall."""
    faults: list[_Fault] = []
    if turn.error is not None and turn.error.strikes(attempt):
        faults.append(_Fault(kind="error", after_tokens=turn.error_after_tokens or 0, error=turn.error))
    if turn.fault_attempts is None or attempt <= turn.fault_attempts:
        if turn.cut_after_tokens is not None:
            faults.append(_Fault(kind="cut", after_tokens=turn.cut_after_tokens))
        if turn.stall_after_tokens is not None:
            faults.append(_Fault(kind="stall", after_tokens=turn.stall_after_tokens))
    return min(faults, key=lambda fault: fault.after_tokens, default=None)


def _prompt_contains(messages: Sequence[Message], text: str) -> bool:
    """Looks at the newest user message and what came after it, so that an older turn cannot trigger a call again."""
    for message in reversed(messages):
        if any(text in written for written in _texts(message)):
            return True
        if message.role is Role.USER:
            return False
    return False


def _texts(message: Message) -> Iterator[str]:
    yield message.text
    for part in message.content:
        if isinstance(part, ToolCallPart):
            yield part.name + _json(part.arguments)
        elif isinstance(part, ToolResultPart):
            yield part.error or (part.result if isinstance(part.result, str) else _json(part.result))


def _usage(messages: Sequence[Message], turn: Turn, calls: Sequence[ToolCall]) -> TokenUsage:
    read = sum(len(text) for message in messages for text in _texts(message))
    written = len(turn.thinking or "") + len(turn.text or "")
    written += sum(len(call.name) + len(_json(call.arguments)) for call in calls)
    return TokenUsage(input_tokens=_tokens(read), output_tokens=_tokens(written))


def _tokens(characters: int) -> int:
    return max(1, -(-characters // _CHARACTERS_PER_TOKEN))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
