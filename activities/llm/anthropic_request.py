"""A model call in the form of the Messages API.

The API is strict where other providers are lenient: turns alternate and begin and end with the user, results of tools come
first in the turn after their calls, no text is empty, tools that were ever called are declared. Conversations here are not
always like that (a message steers a running turn, an old part was dropped, another provider named the calls), so they are put
into that form; nothing is left for the API to refuse.

Caching reads the prompt as tools, system, messages, and a breakpoint caches everything before it: hence tools in a stable order,
and breakpoints on the last tool, on the system prompt, and on the two newest user turns, the older of which is the end of what
the call before this one has written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from activities.llm.anthropic_thinking import plan_thinking
from activities.llm.options import ModelOptions, options_of
from domain.messages import ImageFilePart, ImagePart, InputPart, Message, Role, TextPart, ToolCallPart, ToolResultPart
from domain.model import ModelRequest, ProviderState
from domain.model_profiles import ModelProfile

DRIVER: Final = "anthropic"
DEFAULT_MAX_TOKENS: Final = 8192
FAST_MODE_BETA: Final = "fast-mode-2026-02-01"

_IMAGE_TYPES: Final = ("image/jpeg", "image/png", "image/gif", "image/webp")
_DATA_URL: Final = re.compile(r"data:(?P<media_type>[\w.+/-]+);base64,(?P<data>.+)", re.DOTALL)
_NO_ID_CHARACTER: Final = re.compile(r"[^a-zA-Z0-9_-]")
_EPHEMERAL: Final = {"type": "ephemeral"}
_BEGINNING_LEFT_OUT: Final = "(The beginning of this conversation is left out.)"
_GO_ON: Final = "(Please go on.)"

Block = dict[str, object]


class Turn(Struct):
    role: str
    content: list[Block]


class Prepared(Struct, frozen=True, kw_only=True):
    """`echoes`: earlier thinking goes along, which the API may refuse."""

    body: dict[str, object]
    headers: dict[str, str]
    dropped: list[str]
    tool_names: list[str]
    echoes: bool


def prepare(request: ModelRequest, *, with_states: bool = True) -> Prepared:
    """Raises `ModelError` for options that cannot be read."""
    profile = request.profile
    options = options_of(request)
    dropped: list[str] = []
    max_tokens = _max_tokens(request, options, profile)

    states = _own_states(request) if with_states else {}
    turns, system = _turns(request, states, dropped)
    plan = plan_thinking(
        request.model,
        profile,
        request.reasoning_effort or options.reasoning_effort,
        max_tokens=max_tokens,
        loop_has_thinking=_loop_has_thinking(turns),
    )
    if plan.dropped:
        dropped.append("reasoning_effort")
    if plan.on is False and states:
        # Thinking in a call that does not think: refused in the last place, ignored in others.
        states = {}
        turns, system = _turns(request, states, [])

    tools, tool_choice = _tools(request, turns, dropped)
    output_config: dict[str, object] = {"effort": plan.effort} if plan.effort else {}
    output_format = _output_format(request, dropped)
    if output_format:
        output_config["format"] = output_format
    speed, headers = _speed(request, options, dropped)
    if request.verbosity or options.verbosity:
        dropped.append("verbosity")
    if request.prompt_cache:
        _mark_for_cache(tools, system, turns)

    body: dict[str, object] = {
        "model": request.model,
        "max_tokens": max_tokens,
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
    }
    parts: dict[str, object] = {
        "system": system,
        "tools": tools,
        "tool_choice": tool_choice,
        "thinking": plan.thinking,
        "output_config": output_config,
        **speed,
    }
    body.update({name: value for name, value in parts.items() if value})
    extra = {**_sampling(options, profile, plan.on, dropped), **options.extra_body}
    if extra:
        body["extra_body"] = extra
    return Prepared(
        body=body,
        headers=headers,
        dropped=list(dict.fromkeys(dropped)),
        tool_names=[str(tool["name"]) for tool in tools],
        echoes=any(block["type"] in _OPAQUE for turn in turns for block in turn.content),
    )


def _max_tokens(request: ModelRequest, options: ModelOptions, profile: ModelProfile | None) -> int:
    limit = profile.limits.output if profile and profile.limits else None
    wanted = request.max_output_tokens or options.max_output_tokens or limit or DEFAULT_MAX_TOKENS
    return min(wanted, limit) if limit else wanted


# --- messages ---------------------------------------------------------------------------------------------------------

_OPAQUE: Final = ("thinking", "redacted_thinking")


def _own_states(request: ModelRequest) -> dict[str, ProviderState]:
    return {
        message_id: state
        for message_id, state in request.states.items()
        if state.driver == DRIVER and state.provider_public_id == request.endpoint.provider_public_id
    }


def _turns(
    request: ModelRequest, states: Mapping[str, ProviderState], dropped: list[str]
) -> tuple[list[Turn], list[Block]]:
    """Alternating turns, and the blocks of the system prompt."""
    images = request.profile is None or request.profile.takes_images
    system: list[Block] = []
    turns: list[Turn] = []
    for message in request.messages:
        match message.role:
            case Role.SYSTEM:
                system.extend(_text_blocks(message.text))
                continue
            case Role.AGENT:
                role, blocks = "assistant", _agent_blocks(message, states.get(message.id))
            case Role.USER:
                role, blocks = "user", _input_blocks(message.content, images, dropped)
            case Role.TOOL_RESULT:
                role, blocks = "user", _result_blocks(message, images, dropped)
        if not blocks:
            continue
        if turns and turns[-1].role == role:
            turns[-1].content.extend(blocks)
        else:
            turns.append(Turn(role, blocks))
    if not turns or turns[0].role != "user":
        turns.insert(0, Turn("user", _text_blocks(_BEGINNING_LEFT_OUT)))
    if turns[-1].role != "user":
        turns.append(Turn("user", _text_blocks(_GO_ON)))
    for turn in turns:
        # Stable: only results come forward, for they must stand directly behind their calls.
        turn.content.sort(key=lambda block: block["type"] != "tool_result")
    return turns, system


def _text_blocks(text: str) -> list[Block]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _input_blocks(parts: Sequence[object], images: bool, dropped: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for part in parts:
        match part:
            case TextPart():
                blocks += _text_blocks(part.text)
            case ImagePart():
                source = _image_source(part) if images else None
                if source is None:
                    dropped.append("images")
                    blocks += _text_blocks("[image]")
                else:
                    blocks.append({"type": "image", "source": source})
            case ImageFilePart():
                blocks += _text_blocks(f"[image {part.filename or part.image_id}]")
            case _:
                pass
    return blocks


def _image_source(image: ImagePart) -> Block | None:
    """None for an image that the API does not read."""
    data, media_type = image.base64, image.media_type
    if image.url and (inline := _DATA_URL.fullmatch(image.url)):
        data, media_type = inline["data"], inline["media_type"]
    elif image.url:
        return {"type": "url", "url": image.url}
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type or "image/png"
    if not data or media_type not in _IMAGE_TYPES:
        return None
    return {"type": "base64", "media_type": media_type, "data": data}


def _result_blocks(message: Message, images: bool, dropped: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for part in message.content:
        if not isinstance(part, ToolResultPart):
            continue
        block: Block = {"type": "tool_result", "tool_use_id": _call_id(part.tool_call_id)}
        content = _result_content(part, images, dropped)
        if content:
            block["content"] = content
        if part.error is not None:
            block["is_error"] = True
        blocks.append(block)
    return blocks


def _result_content(part: ToolResultPart, images: bool, dropped: list[str]) -> str | list[Block]:
    if part.error is not None:
        return part.error
    if isinstance(part.result, str) or part.result is None:
        return part.result or ""
    try:
        parts = msgspec.convert(part.result, list[InputPart])
    except msgspec.ValidationError:
        return msgspec.json.encode(part.result).decode()
    return _input_blocks(parts, images, dropped)


def _agent_blocks(message: Message, state: ProviderState | None) -> list[Block]:
    calls: list[Block] = [_call_block(call) for call in message.tool_calls]
    if state is not None and (placed := _placed(state.items, message.text, calls)) is not None:
        return placed
    return [*_text_blocks(message.text), *calls]


def _call_block(call: ToolCallPart) -> Block:
    return {"type": "tool_use", "id": _call_id(call.id), "name": call.name, "input": call.arguments}


def _call_id(call_id: str) -> str:
    """Other providers' ids may have characters that are refused here; different ids stay different."""
    legal = _NO_ID_CHARACTER.sub("_", call_id)
    return legal if legal == call_id else f"{legal}_{hashlib.sha256(call_id.encode()).hexdigest()[:8]}"


def _placed(items: Sequence[Mapping[str, object]], text: str, calls: Sequence[Block]) -> list[Block] | None:
    """The message as the model wrote it; None when it is not that message any more (a guardrail replaced its text)."""
    blocks: list[Block] = []
    written = used = 0
    for item in items:
        match item.get("type"), item.get("characters"), item.get("index"):
            case "text", int(characters), _:
                blocks += _text_blocks(text[written : written + characters])
                written += characters
            case "tool_use", _, int(index):
                if index >= len(calls):
                    return None
                blocks.append(calls[index])
                used += 1
            case _:
                blocks.append(dict(item))
    if written != len(text) or used != len(calls):
        return None
    # Thinking that nothing followed is no message: the API refuses it as the end of one.
    return None if blocks and blocks[-1]["type"] in _OPAQUE else blocks


def _loop_has_thinking(turns: Sequence[Turn]) -> bool:
    """Whether the first message of the running tool loop begins with thinking; True when no loop is running."""
    first: Turn | None = None
    for answered, turn in _backwards(turns):
        if not any(block["type"] == "tool_result" for block in answered.content):
            break
        first = turn
    return first is None or first.content[0]["type"] in _OPAQUE


def _backwards(turns: Sequence[Turn]) -> Iterator[tuple[Turn, Turn]]:
    """User turns with the assistant turns before them, from the newest."""
    for position in range(len(turns) - 1, 0, -2):
        yield turns[position], turns[position - 1]


# --- everything else --------------------------------------------------------------------------------------------------


def _tools(
    request: ModelRequest, turns: Sequence[Turn], dropped: list[str]
) -> tuple[list[Block], dict[str, object] | None]:
    definitions = list(request.tools)
    if definitions and request.profile is not None and not request.profile.tool_call:
        dropped.append("tools")
        definitions = []
    tools: list[Block] = []
    for tool in sorted(definitions, key=lambda tool: tool.name):
        described = {"description": tool.description} if tool.description else {}
        tools.append({"name": tool.name, **described, "input_schema": {"type": "object", **tool.parameters}})
    if not tools:
        # A call that is to use none (a summary) over a conversation that has some: they must be declared nevertheless.
        called = {str(block["name"]) for turn in turns for block in turn.content if block["type"] == "tool_use"}
        tools = [{"name": name, "input_schema": {"type": "object"}} for name in sorted(called)]
        return tools, {"type": "none"} if tools else None
    if request.parallel_tool_calls is False:
        if request.profile is None or request.profile.takes("parallel_tool_calls"):
            return tools, {"type": "auto", "disable_parallel_tool_use": True}
        dropped.append("parallel_tool_calls")
    return tools, None


def _output_format(request: ModelRequest, dropped: list[str]) -> dict[str, object] | None:
    wanted = request.response_format
    if wanted is None:
        return None
    able = request.profile is None or request.profile.structured_output
    if wanted.type != "json_schema" or wanted.schema is None or not able:
        dropped.append("response_format")
        return None
    return {"type": "json_schema", "schema": _strict(wanted.schema)}


def _strict(schema: dict[str, object]) -> dict[str, object]:
    """The API takes a subset of JSON Schema (objects are closed, no ranges); the SDK knows it and writes the rest as words."""
    from anthropic import transform_schema

    try:
        return transform_schema(schema)
    except (AssertionError, AttributeError, TypeError, ValueError):
        return schema  # not a schema the SDK can read: what is wrong with it, the API says best


def _speed(
    request: ModelRequest, options: ModelOptions, dropped: list[str]
) -> tuple[dict[str, object], dict[str, str]]:
    wanted = request.speed or options.speed
    if wanted is None or wanted == "default":
        return {}, {}
    if request.profile is None or request.profile.takes("speed"):
        if wanted == "fast":
            return {"speed": "fast"}, {"anthropic-beta": FAST_MODE_BETA}
        if wanted == "priority":
            return {"service_tier": "auto"}, {}
    dropped.append("speed")
    return {}, {}


def _sampling(
    options: ModelOptions, profile: ModelProfile | None, thinking: bool | None, dropped: list[str]
) -> dict[str, object]:
    """For `extra_body`: the SDK has no parameters for them any more. Refused by newer models, and with thinking."""
    wanted = {"temperature": options.temperature, "top_p": options.top_p}
    sent: dict[str, object] = {}
    for name, value in wanted.items():
        if value is None:
            continue
        able = profile is None or (profile.temperature and profile.takes(name))
        # One or the other: models since 4.5 refuse both at once.
        if thinking or not able or sent:
            dropped.append(name)
        else:
            sent[name] = value
    return sent


def _mark_for_cache(tools: list[Block], system: list[Block], turns: Sequence[Turn]) -> None:
    newest = [turn.content[-1:] for turn in turns if turn.role == "user"][-2:]
    for blocks in (tools[-1:], system[-1:], *newest):
        for block in blocks:
            block["cache_control"] = _EPHEMERAL
