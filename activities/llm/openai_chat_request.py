"""A model call in the form of Chat Completions, in the dialect of the server it goes to.

What a dialect does not know is not sent, for some servers refuse fields they do not know: it is dropped and named instead. Only
`extra_body` of the model's options goes out as it is, over everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from activities.llm.options import ModelOptions, options_of
from domain.messages import ImageFilePart, ImagePart, InputPart, Message, ResponseFormat, Role, TextPart, ToolResultPart
from domain.model import ModelEndpoint, ModelRequest, ProviderState

DRIVER: Final = "openai_chat"

Json = dict[str, object]

_MAX_CACHE_KEY_CHARACTERS: Final = 64
_EPHEMERAL: Final = {"type": "ephemeral"}

_UNSIGNED: Final = {"google": {"thought_signature": "skip_thought_signature_validator"}}
"""Gemini 3 refuses tool calls it has not signed, and documents this value for those that another model made."""

_GEMINI_LEVELS: Final = {"minimal": "minimal", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
_GEMINI_2_BUDGET_TOKENS: Final = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 24576}
"""What Gemini's endpoint itself makes of `reasoning_effort` for models that know no levels."""


class Dialect(Struct, frozen=True, kw_only=True):
    name: Literal["plain", "openai", "openrouter", "gemini", "fireworks"]
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    service_tiers: Mapping[str, str] = {}
    verbosity: bool = False
    prompt_cache_key: bool = False
    parallel_tool_calls: bool = True


_OPENAI: Final = Dialect(
    name="openai",
    max_tokens_field="max_completion_tokens",
    service_tiers={"flex": "flex", "default": "default", "priority": "priority", "fast": "fast"},
    verbosity=True,
    prompt_cache_key=True,
)
_PLAIN: Final = Dialect(name="plain")
_BY_PROVIDER_TYPE: Final = {
    "openai": _OPENAI,
    "azure_openai": _OPENAI,
    "openrouter": Dialect(name="openrouter", verbosity=True),
    "gemini": Dialect(name="gemini", parallel_tool_calls=False),
    "fireworks": Dialect(name="fireworks"),
}
_OPENAI_HOSTS: Final = ("api.openai.com", ".openai.azure.com")


def dialect_of(endpoint: ModelEndpoint) -> Dialect:
    """By provider type; OpenAI's own servers are known by their address as well."""
    host = urlsplit(endpoint.base_url or "").hostname or ""
    if host.endswith(_OPENAI_HOSTS):
        return _OPENAI
    return _BY_PROVIDER_TYPE.get(endpoint.provider_type, _PLAIN)


class Prepared(Struct, frozen=True, kw_only=True):
    body: Json
    dropped: list[str]


def prepare(request: ModelRequest) -> Prepared:
    """Raises `ModelError` for options that cannot be read."""
    options = options_of(request)
    dialect = dialect_of(request.endpoint)
    dropped: list[str] = []
    body: Json = {
        "model": request.model,
        "messages": _messages(request, dialect, dropped),
        "stream": True,
        "stream_options": {"include_usage": True},
        **_tools(request, dialect, dropped),
        **_reasoning(request, options, dialect, dropped),
        **_wishes(request, options, dialect, dropped),
        **_sampling(request, options, dropped),
    }
    max_tokens = request.max_output_tokens or options.max_output_tokens
    if max_tokens:
        body[dialect.max_tokens_field] = max_tokens
    if request.response_format is not None:
        if request.profile is None or request.profile.structured_output:
            body["response_format"] = _response_format(request.response_format)
        else:
            dropped.append("response_format")
    if request.prompt_cache and dialect.prompt_cache_key:
        body["prompt_cache_key"] = request.session_id[:_MAX_CACHE_KEY_CHARACTERS]
    body.update(options.extra_body or {})
    return Prepared(body=body, dropped=list(dict.fromkeys(dropped)))


# --- options ----------------------------------------------------------------------------------------------------------


def _tools(request: ModelRequest, dialect: Dialect, dropped: list[str]) -> Json:
    if not request.tools:
        return {}
    if request.profile is not None and not request.profile.tool_call:
        dropped.append("tools")
        return {}
    sent: Json = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": {"type": "object", "properties": {}, **tool.parameters},
                },
            }
            for tool in sorted(request.tools, key=lambda tool: tool.name)
        ]
    }
    if request.parallel_tool_calls is not None:
        if dialect.parallel_tool_calls and (request.profile is None or request.profile.takes("parallel_tool_calls")):
            sent["parallel_tool_calls"] = request.parallel_tool_calls
        else:
            dropped.append("parallel_tool_calls")
    return sent


def _reasoning(request: ModelRequest, options: ModelOptions, dialect: Dialect, dropped: list[str]) -> Json:
    effort = request.reasoning_effort or options.reasoning_effort
    if effort is None:
        return {}
    profile = request.profile
    known = profile.reasoning_effort if profile else None
    if profile is not None and (
        not profile.reasoning or (known is not None and effort not in {value.value for value in known.values})
    ):
        dropped.append("reasoning_effort")
        return {}
    if dialect.name == "openrouter":
        return {"reasoning": {"effort": effort}}
    if dialect.name == "gemini" and effort != "none":
        return {"extra_body": {"google": {"thinking_config": _thinking_config(request.model, effort)}}}
    return {"reasoning_effort": effort}


def _thinking_config(model: str, effort: str) -> Json:
    """Instead of `reasoning_effort`, which means the same but cannot be sent together with the wish to see the thoughts."""
    if re.match(r"gemini-[12][.\-]", model):
        depth: Json = {"thinking_budget": _GEMINI_2_BUDGET_TOKENS.get(effort, -1)}
    else:
        depth = {"thinking_level": _GEMINI_LEVELS.get(effort, effort)}
    return {**depth, "include_thoughts": True}


def _wishes(request: ModelRequest, options: ModelOptions, dialect: Dialect, dropped: list[str]) -> Json:
    sent: Json = {}
    profile = request.profile
    if verbosity := request.verbosity or options.verbosity:
        if dialect.verbosity and (profile is None or profile.takes("verbosity")):
            sent["verbosity"] = verbosity
        else:
            dropped.append("verbosity")
    speed = request.speed or options.speed
    if speed is not None and speed in dialect.service_tiers and (profile is None or profile.takes("speed")):
        sent["service_tier"] = dialect.service_tiers[speed]
    elif speed is not None and speed != "default":
        dropped.append("speed")
    return sent


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


def _response_format(wanted: ResponseFormat) -> Json:
    if wanted.type == "json_object" or wanted.schema is None:
        return {"type": "json_object"}
    described: Json = {"name": wanted.name, "schema": wanted.schema}
    if _is_strict(wanted.schema):
        described["strict"] = True
    return {"type": "json_schema", "json_schema": described}


def _is_strict(schema: object) -> bool:
    """Whether a schema keeps the rules without which strict output is refused: closed objects, every property required."""
    if isinstance(schema, list):
        return all(_is_strict(part) for part in schema)
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, dict):
        names = set(properties) if isinstance(properties, dict) else set()
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != names:
            return False
    return all(_is_strict(part) for part in schema.values() if isinstance(part, dict | list))


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages(request: ModelRequest, dialect: Dialect, dropped: list[str]) -> list[Json]:
    images = request.profile is None or request.profile.takes_images
    newest_user = max((at for at, m in enumerate(request.messages) if m.role is Role.USER), default=-1)
    sent: list[Json] = []
    for at, message in enumerate(request.messages):
        match message.role:
            case Role.SYSTEM:
                sent.append({"role": "system", "content": message.text})
            case Role.USER:
                sent.append({"role": "user", "content": _user_content(message.content, images, dropped)})
            case Role.AGENT:
                state = _own_state(request, dialect, message)
                sent += _agent_message(message, state, dialect, request.model, in_loop=at > newest_user)
            case Role.TOOL_RESULT:
                sent += _result_messages(message, dropped)
    if request.prompt_cache and dialect.name == "openrouter" and request.model.startswith("anthropic/"):
        _mark_for_cache(sent)
    return sent


def _user_content(parts: Sequence[object], images: bool, dropped: list[str]) -> str | list[Json]:
    content: list[Json] = []
    for part in parts:
        match part:
            case TextPart():
                content.append({"type": "text", "text": part.text})
            case ImagePart():
                url = _image_url(part) if images else None
                if url is None:
                    dropped.append("images")
                    content.append({"type": "text", "text": "[image]"})
                else:
                    content.append({"type": "image_url", "image_url": {"url": url}})
            case ImageFilePart():
                content.append({"type": "text", "text": f"[image {part.filename or part.image_id}]"})
            case _:
                pass
    if all(part["type"] == "text" for part in content):
        return "\n".join(str(part["text"]) for part in content)
    return content


def _image_url(image: ImagePart) -> str | None:
    if image.url:
        return image.url
    return f"data:{image.media_type or 'image/png'};base64,{image.base64}" if image.base64 else None


def _agent_message(
    message: Message, state: ProviderState | None, dialect: Dialect, model: str, *, in_loop: bool
) -> Iterator[Json]:
    calls: list[Json] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()},
        }
        for call in message.tool_calls
    ]
    if not calls and not message.text:
        return
    sent: Json = {"role": "assistant", "content": message.text or None}
    if calls:
        sent["tool_calls"] = calls
    if state is not None:
        _echo(state, sent, calls, in_loop=in_loop)
    if calls and dialect.name == "gemini" and not re.match(r"gemini-[12][.\-]", model):
        calls[0].setdefault("extra_content", _UNSIGNED)
    yield sent


def _own_state(request: ModelRequest, dialect: Dialect, message: Message) -> ProviderState | None:
    state = request.states.get(message.id)
    if state is None or state.driver != DRIVER or state.provider_public_id != request.endpoint.provider_public_id:
        return None
    # Behind OpenRouter every model has a provider of its own, which cannot read another's reasoning.
    return None if dialect.name == "openrouter" and state.model != request.model else state


def _echo(state: ProviderState, sent: Json, calls: Sequence[Json], *, in_loop: bool) -> None:
    """Put what `openai_chat_stream` kept back where it came from, unmodified."""
    for item in state.items:
        match item.get("type"):
            case "message":
                sent["extra_content"] = item["extra_content"]
            case "tool_call":
                for call in calls:
                    if call["id"] == item["id"]:
                        call["extra_content"] = item["extra_content"]
            case "reasoning_details":
                sent["reasoning_details"] = item["reasoning_details"]
            case "reasoning_content" if in_loop:
                # DeepSeek and Kimi want it back while the tool loop runs, and advise against it later.
                sent["reasoning_content"] = item["reasoning_content"]
            case _:
                pass


def _result_messages(message: Message, dropped: list[str]) -> Iterator[Json]:
    for part in message.content:
        if isinstance(part, ToolResultPart):
            yield {"role": "tool", "tool_call_id": part.tool_call_id, "content": _result_text(part, dropped)}


def _result_text(part: ToolResultPart, dropped: list[str]) -> str:
    """A tool's message is text here; an image in it becomes a placeholder."""
    if part.error is not None:
        return f"Error: {part.error}"
    if isinstance(part.result, str):
        return part.result
    try:
        parts = msgspec.convert(part.result, list[InputPart])
    except msgspec.ValidationError:
        return msgspec.json.encode(part.result).decode()
    content = _user_content(parts, images=False, dropped=dropped)
    return content if isinstance(content, str) else msgspec.json.encode(content).decode()


def _mark_for_cache(sent: Sequence[Json]) -> None:
    """Anthropic caches what stands before a breakpoint; OpenRouter hands breakpoints on."""
    system = next((message for message in sent if message["role"] == "system"), None)
    newest = next((message for message in reversed(sent) if message["role"] == "user"), None)
    for message in (system, newest):
        if message is None:
            continue
        content = message["content"]
        parts: list[Json] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = [part for part in parts if part["type"] == "text" and part["text"]]
        if texts:
            texts[-1]["cache_control"] = _EPHEMERAL
            message["content"] = parts
