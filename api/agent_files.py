"""Agents as files: Markdown whose front matter is YAML and whose body is the prompt; also YAML, JSON and plain text.

Exporting and importing again gives the same agent, to the character: the body is what stands between one line break after the
front matter and one at the end of the file.

YAML is read without aliases (a few lines of them expand to gigabytes) and without timestamps (JSON has none).
"""

from __future__ import annotations

import re
from typing import Any, Final
from uuid import uuid4

import msgspec
import yaml
from msgspec import UNSET, Struct, UnsetType

from api.requests import ToolInput
from domain.config import CapabilityRef, InitialFile, NetworkAccessList
from domain.errors import InvalidInput, invalid_field
from domain.resources import Agent
from domain.tools import ToolDefinition

FRONT_MATTER: Final = re.compile(
    r"\A---[ \t]*(?P<line_break>\r?\n)(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)(?P<body>.*)\Z", re.DOTALL | re.MULTILINE
)


class AgentFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of an agent file. `prompt` is accepted for `system_prompt`."""

    id: str | None = None
    name: str | None = None
    display_name: str | None = None
    description: str | None = None
    harness_id: str | None = None
    harness_name: str | None = None
    default_model_id: str | None = None
    fallback_model_ids: list[str] = []
    max_iterations: int | None = None
    parallel_tool_calls: bool | None = None
    tags: list[str] = []
    capabilities: list[CapabilityRef | str] = []
    tools: list[ToolInput] = []
    initial_files: list[InitialFile] = []
    mcp_servers: dict[str, object] | None = msgspec.field(name="mcpServers", default=None)
    network_access: NetworkAccessList | None = None
    system_prompt: str | UnsetType = UNSET


_FIELDS: Final = frozenset(field.encode_name for field in msgspec.structs.fields(AgentFile))
_LOOKS_LIKE_YAML: Final = re.compile(rf"\A(?:\s*#[^\n]*\n|\s*\n)*(?:{'|'.join(_FIELDS)})[ \t]*:", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # YAML 1.1 folds these line breaks, too; only a double-quoted scalar can escape them.
        style = '"' if any(line_break in data for line_break in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def parse_agent_file(text: str) -> AgentFile:
    """Raises `InvalidInput`."""
    if match := FRONT_MATTER.match(text):
        body = match["body"].removeprefix(match["line_break"])
        parsed = _fields(_load_yaml(match["yaml"]) or {})
        if parsed.system_prompt is not UNSET and body.strip():
            raise InvalidInput("The prompt stands both in the front matter and below it", field="system_prompt")
        prompt = parsed.system_prompt if parsed.system_prompt is not UNSET else body.removesuffix(match["line_break"])
        return _named(msgspec.structs.replace(parsed, system_prompt=prompt))
    if text.startswith("---"):
        raise InvalidInput("The front matter has no end: a line of `---` is missing")
    if text.lstrip().startswith("{"):
        return _named(_fields(_load_json(text)))
    if _LOOKS_LIKE_YAML.match(text):
        return _named(_fields(_load_yaml(text)))
    if not text.strip():
        raise InvalidInput("There is nothing to import")
    return _named(AgentFile(system_prompt=text.strip()))


def _named(file: AgentFile) -> AgentFile:
    return file if file.name is not None else msgspec.structs.replace(file, name=f"imported-{uuid4().hex[:8]}")


def _load_yaml(text: str) -> object:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 # a SafeLoader that refuses more
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not valid"
        raise InvalidInput(f"The YAML cannot be read{where}: {problem}") from None


def _load_json(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(f"The JSON cannot be read: {error}") from None


def _fields(content: object) -> AgentFile:
    if not isinstance(content, dict):
        raise InvalidInput("An agent file holds fields such as `name` and `system_prompt`")
    fields: dict[Any, Any] = dict(content)
    for alias, name in (("mcp_servers", "mcpServers"), ("prompt", "system_prompt")):
        if alias in fields:
            fields.setdefault(name, fields.pop(alias))
    try:
        return msgspec.convert(fields, AgentFile)
    except msgspec.ValidationError as error:
        invalid = invalid_field(error, "file")
        raise InvalidInput(invalid.message, field=invalid.field) from None


def export_agent_file(agent: Agent) -> str:
    tools: list[ToolDefinition] = agent.tools
    file = AgentFile(
        id=agent.id,
        name=agent.name,
        display_name=agent.display_name,
        description=agent.description,
        harness_id=agent.harness_id,
        default_model_id=agent.default_model_id,
        max_iterations=agent.max_iterations,
        parallel_tool_calls=agent.parallel_tool_calls,
        tags=agent.tags,
        capabilities=list(agent.capabilities),
        initial_files=agent.initial_files,
        mcp_servers=agent.mcp_servers,
        network_access=agent.network_access,
    )
    fields = msgspec.to_builtins(file)
    if tools:
        fields["tools"] = msgspec.to_builtins(tools)
    front_matter = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return f"---\n{front_matter}---\n\n{agent.system_prompt}\n"
