"""A model call in the form of the Responses API: instructions, a flat list of input items, and options.

Nothing is kept at OpenAI by default (`store` is false): what a turn needs of an earlier one goes along with every call, the
model's reasoning in encrypted form. An assistant turn with a state is rebuilt from it item by item, as the model wrote it:
reasoning that stands before another item than the one it led to is refused, or not understood. The state holds no text and no
call, only where they stood, because the log is the truth about both (a guardrail may have replaced the text, and calls have
other ids here than at the provider).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from activities.llm.options import ModelOptions, options_of
from domain.messages import (
    ImageFilePart,
    ImagePart,
    InputPart,
    Message,
    ResponseFormat,
    Role,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from domain.model import ModelRequest, ProviderState
from domain.model_profiles import ModelProfile
from domain.tools import ToolDefinition

DRIVER: Final = "openai_responses"
ENCRYPTED_REASONING: Final = "reasoning.encrypted_content"
BETWEEN_MESSAGES: Final = "\n\n"
"""A model may write several messages in one turn; ours has one text."""

_MAX_ID_CHARACTERS: Final = 64
"""Of `call_id` and `prompt_cache_key`; longer ones are refused."""

_MIN_OUTPUT_TOKENS: Final = 16
_NOT_IN_STRICT: Final = frozenset(
    {"allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "patternProperties"}
    | {"unevaluatedProperties", "propertyNames", "contains", "uniqueItems", "default"}
)

_SAY_JSON: Final = "Answer with one JSON object."

Json = dict[str, Any]


class StateItem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of an assistant turn, in `ProviderState.items`. Exactly one of `item`, `call` and `parts` is set."""

    item: Json | None = None
    """Goes back as it is: reasoning, and what else a provider wrote that is neither text nor a call of ours."""
    call: int | None = None
    """Position among the message's tool calls."""
    parts: list[tuple[str, int]] | None = None
    """Pieces of the message's text: content type and number of characters."""
    skip: int = 0
    """Characters before the pieces that are ours (`BETWEEN_MESSAGES`)."""
    id: str | None = None
    phase: str | None = None


class Prepared(Struct, frozen=True, kw_only=True):
    """`echoes`: earlier reasoning goes along, which the provider may refuse. `summarizes`: so may it the wish to see some."""

    body: Json
    dropped: list[str]
    echoes: bool
    summarizes: bool
    background: bool


def prepare(request: ModelRequest, *, with_states: bool = True, with_summary: bool = True) -> Prepared:
    """The body of `POST /responses`. Raises `ModelError` for options that cannot be read."""
    options = options_of(request)
    dropped: list[str] = []
    items, echoes = input_items(request, dropped, with_states=with_states)
    reasoning = _reasoning(request, options, dropped, with_summary=with_summary)
    text = _text(request, options, dropped)
    if text.get("format") == {"type": "json_object"} and not _mentions_json(items):
        # Refused otherwise: a model that nobody tells of JSON might write blanks for ever.
        items.append({"type": "message", "role": "developer", "content": _SAY_JSON})
    body: Json = {
        "model": request.model,
        "input": items,
        "store": options.background or _stores_anyway(request, reasoning),
        **_present("instructions", instructions(request)),
        **_tools(request, dropped),
        **_present("reasoning", reasoning),
        **({"include": [ENCRYPTED_REASONING]} if reasoning is not None else {}),
        **_present("text", text),
        **_speed(request, options, dropped),
        **_sampling(request, options, dropped),
        **cache_key(request),
    }
    if max_tokens := request.max_output_tokens or options.max_output_tokens:
        body["max_output_tokens"] = max(max_tokens, _MIN_OUTPUT_TOKENS)
    body.update(options.extra_body)
    body["stream"] = True
    if options.background:
        body.update(background=True, store=True)
    return Prepared(
        body=body,
        dropped=list(dict.fromkeys(dropped)),
        echoes=echoes,
        summarizes="summary" in (reasoning or {}),
        background=options.background,
    )


def instructions(request: ModelRequest) -> str:
    return "\n\n".join(message.text for message in request.messages if message.role is Role.SYSTEM)


def cache_key(request: ModelRequest) -> Json:
    """Calls with the same key go to where the prefix is cached."""
    return {"prompt_cache_key": request.session_id[:_MAX_ID_CHARACTERS]} if request.prompt_cache else {}


# --- messages ---------------------------------------------------------------------------------------------------------


def input_items(request: ModelRequest, dropped: list[str], *, with_states: bool) -> tuple[list[Json], bool]:
    """The conversation, and whether earlier reasoning is in it."""
    images = request.profile is None or request.profile.takes_images
    phases = bool(request.profile and request.profile.supports_phases)
    states = {key: state for key, state in request.states.items() if with_states and _is_own(state, request)}
    items: list[Json] = []
    echoes = False
    if request.context is not None and _is_own(request.context, request):
        items.extend(request.context.items)
    for message in request.messages:
        match message.role:
            case Role.SYSTEM:
                continue
            case Role.USER:
                if content := _content(message.content, images, dropped):
                    items.append({"type": "message", "role": "user", "content": content})
            case Role.TOOL_RESULT:
                items.extend(_results(message, images, dropped))
            case Role.AGENT:
                state = states.get(message.id)
                rebuilt = _rebuilt(message, state, phases) if state else None
                echoes = echoes or rebuilt is not None
                items.extend(_plain(message, phases) if rebuilt is None else rebuilt)
    return items, echoes


def _is_own(state: ProviderState, request: ModelRequest) -> bool:
    return state.driver == DRIVER and state.provider_public_id == request.endpoint.provider_public_id


def _content(parts: Sequence[object], images: bool, dropped: list[str]) -> list[Json]:
    content: list[Json] = []
    for part in parts:
        match part:
            case TextPart() if part.text:
                content.append(_input_text(part.text))
            case ImagePart():
                url = _image_url(part)
                if url is not None and images:
                    content.append({"type": "input_image", "detail": "auto", "image_url": url})
                else:
                    dropped.append("images")
                    content.append(_input_text("[image]"))
            case ImageFilePart():
                content.append(_input_text(f"[image {part.filename or part.image_id}]"))
            case _:
                pass
    return content


def _input_text(text: str) -> Json:
    return {"type": "input_text", "text": text}


def _image_url(image: ImagePart) -> str | None:
    if image.url:
        return image.url
    return f"data:{image.media_type or 'image/png'};base64,{image.base64}" if image.base64 else None


def _results(message: Message, images: bool, dropped: list[str]) -> list[Json]:
    return [
        {
            "type": "function_call_output",
            "call_id": _call_id(part.tool_call_id),
            "output": _output(part, images, dropped),
        }
        for part in message.content
        if isinstance(part, ToolResultPart)
    ]


def _output(part: ToolResultPart, images: bool, dropped: list[str]) -> str | list[Json]:
    if part.error is not None:
        return f"Error: {part.error}"  # the API has no mark for a failed call
    if isinstance(part.result, str) or part.result is None:
        return part.result or ""
    try:
        parts = msgspec.convert(part.result, list[InputPart])
    except msgspec.ValidationError:
        parts = []
    return _content(parts, images, dropped) or msgspec.json.encode(part.result).decode()


def _plain(message: Message, phases: bool) -> list[Json]:
    said = (
        [_assistant([_output_text(message.text)], None, message.phase if phases else None)]
        if message.text.strip()
        else []
    )
    return said + [_call(call, None) for call in message.tool_calls]


def _assistant(content: list[Json], item_id: str | None, phase: str | None) -> Json:
    item: Json = {"type": "message", "role": "assistant", "content": content}
    # With an id it is a whole output item of theirs, and those have a status.
    return item | _present("phase", phase) | ({"id": item_id, "status": "completed"} if item_id else {})


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": []}


def _call(call: ToolCallPart, item_id: str | None) -> Json:
    arguments = msgspec.json.encode(call.arguments).decode()
    item: Json = {"type": "function_call", "call_id": _call_id(call.id), "name": call.name, "arguments": arguments}
    return item | _present("id", item_id)


def _call_id(call_id: str) -> str:
    if len(call_id) <= _MAX_ID_CHARACTERS:
        return call_id
    return f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:32]}"


def _rebuilt(message: Message, state: ProviderState, phases: bool) -> list[Json] | None:
    """The turn as the model wrote it; None when the message is not that turn any more."""
    try:
        kept = msgspec.convert(state.items, list[StateItem])
    except msgspec.ValidationError:
        return None
    items: list[Json] = []
    text, calls = message.text, message.tool_calls
    position, used = 0, 0
    for entry in kept:
        if entry.item is not None:
            items.append(entry.item)
        elif entry.call is not None:
            if entry.call >= len(calls):
                return None
            items.append(_call(calls[entry.call], entry.id))
            used += 1
        else:
            position += entry.skip
            content: list[Json] = []
            for kind, characters in entry.parts or []:
                piece = text[position : position + characters]
                content.append({"type": kind, "refusal": piece} if kind == "refusal" else _output_text(piece))
                position += characters
            items.append(_assistant(content, entry.id, entry.phase if phases else None))
    if position != len(text) or used != len(calls):
        return None
    while items and items[-1].get("type") == "reasoning":
        items.pop()  # refused when nothing follows that it led to
    return items


def _mentions_json(items: Sequence[Mapping[str, object]]) -> bool:
    return any("json" in str(item.get("content")).lower() for item in items if item.get("type") == "message")


# --- options ----------------------------------------------------------------------------------------------------------


def _tools(request: ModelRequest, dropped: list[str]) -> Json:
    if not request.tools:
        return {}
    profile = request.profile
    if profile is not None and not profile.tool_call:
        dropped.append("tools")
        return {}
    # By name: a prefix that is to be cached must not depend on the order in which capabilities were resolved.
    sent: Json = {"tools": [_tool(tool) for tool in sorted(request.tools, key=lambda tool: tool.name)]}
    if request.parallel_tool_calls is not None:
        if profile is None or profile.takes("parallel_tool_calls"):
            sent["parallel_tool_calls"] = request.parallel_tool_calls
        else:
            dropped.append("parallel_tool_calls")
    return sent


def _tool(tool: ToolDefinition) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": {"type": "object", "properties": {}, **tool.parameters},
        # Left out it means true, and the API would rewrite the schema until nothing in it is optional.
        "strict": False,
    }


def _reasoning(request: ModelRequest, options: ModelOptions, dropped: list[str], *, with_summary: bool) -> Json | None:
    """None for a model that does not reason, or of which nothing is known and no effort is asked: it might refuse the field."""
    profile = request.profile
    effort = request.reasoning_effort or options.reasoning_effort
    if effort is not None and not _takes_effort(profile, effort):
        dropped.append("reasoning_effort")
        effort = None
    if effort is None and (profile is None or not profile.reasoning):
        return None
    summary = {"summary": "auto"} if with_summary and effort != "none" else {}
    return _present("effort", effort) | summary


def _takes_effort(profile: ModelProfile | None, effort: str) -> bool:
    if profile is None:
        return True
    known = profile.reasoning_effort
    return profile.reasoning and (known is None or effort in {value.value for value in known.values})


def _stores_anyway(request: ModelRequest, reasoning: Json | None) -> bool:
    """Azure takes reasoning back only by ids it has stored: with ids but without `store` it looks for them in vain."""
    return request.endpoint.provider_type == "azure_openai" and reasoning is not None


def _text(request: ModelRequest, options: ModelOptions, dropped: list[str]) -> Json:
    sent: Json = {}
    profile = request.profile
    if request.response_format is not None:
        if profile is None or profile.structured_output:
            sent["format"] = _format(request.response_format)
        else:
            dropped.append("response_format")
    if verbosity := request.verbosity or options.verbosity:
        if profile is None or profile.takes("verbosity"):
            sent["verbosity"] = verbosity
        else:
            dropped.append("verbosity")
    return sent


def _format(wanted: ResponseFormat) -> Json:
    if wanted.type == "json_object" or wanted.schema is None:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "name": wanted.name,
        "schema": wanted.schema,
        "strict": _is_strict(wanted.schema),
    }


def _is_strict(schema: object) -> bool:
    """Whether a schema keeps the rules without which strict output is refused: closed objects, every property required."""
    if isinstance(schema, list):
        return all(_is_strict(part) for part in schema)
    if not isinstance(schema, dict):
        return True
    if _NOT_IN_STRICT & schema.keys():
        return False
    named = [schema[key] for key in ("properties", "$defs", "definitions") if isinstance(schema.get(key), dict)]
    if schema.get("type") == "object" or "properties" in schema:
        properties = schema.get("properties") or {}
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != set(properties):
            return False
    inner = [value for key, value in schema.items() if key in ("items", "prefixItems", "anyOf")]
    return all(_is_strict(part) for part in [*inner, *(part for parts in named for part in parts.values())])


def _speed(request: ModelRequest, options: ModelOptions, dropped: list[str]) -> Json:
    """Our names of speeds are the API's names of service tiers."""
    speed = request.speed or options.speed
    if speed is None:
        return {}
    if request.profile is None or request.profile.takes("speed"):
        return {"service_tier": speed}
    if speed != "default":
        dropped.append("speed")
    return {}


def _sampling(request: ModelRequest, options: ModelOptions, dropped: list[str]) -> Json:
    sent: Json = {}
    profile = request.profile
    for name, value in (("temperature", options.temperature), ("top_p", options.top_p)):
        if value is None:
            continue
        if profile is None or (profile.temperature and profile.takes(name)):
            sent[name] = value
        else:
            dropped.append(name)
    return sent


def _present(name: str, value: object) -> Json:
    return {name: value} if value else {}
