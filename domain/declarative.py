"""Declarative capabilities: data instead of code. An organization writes them over the API; a turn pins those it names.

What one contributes is what a layer can: prompt text, files, client-side tools, MCP servers; and it may bring in other
capabilities and skills. It cannot run code of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from domain.config import InitialFile
from domain.errors import EverrunsError, InputTooLarge, InvalidInput, invalid_field
from domain.limits import (
    DESCRIPTION_MAX_BYTES,
    MAX_CAPABILITIES,
    NAME_MAX_CHARACTERS,
    PROMPT_MAX_BYTES,
    SHORT_TEXT_MAX_BYTES,
    check_count,
    check_initial_files,
    check_text,
    check_tools,
)
from domain.tools import ClientSideTool

DECLARATIVE: Final = "declarative:"
SKILL: Final = "skill:"
MCP: Final = "mcp:"
"""What references to rows begin with."""

FIELD: Final = "definition"
MAX_INLINE_SKILLS: Final = 50
METADATA_MAX_BYTES: Final = 16 * 1024
MAX_MCP_SERVERS: Final = 50

_NAME: Final = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
_ALIASES: Final = {"mounts": "files", "mcp_servers": "mcpServers"}

T = TypeVar("T")


class InlineSkill(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A skill that comes with the capability: its SKILL.md, and files with paths relative to the skill's directory."""

    skill_md: str
    files: list[InitialFile] = []


class DeclarativeDefinition(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """`files` are written into the workspace when they are missing. `skills` are names or ids of the registry, or inline.

    `mounts` is accepted for `files`, `mcp_servers` for `mcpServers`.
    """

    name: str
    display_name: str | None = None
    description: str = ""
    category: str | None = None
    icon: str | None = None
    system_prompt: str | None = None
    risk_level: Literal["low", "medium", "high"] = "low"
    dependencies: list[str] = []
    features: list[str] = []
    tools: list[ClientSideTool] = []
    mcp_servers: dict[str, object] = msgspec.field(name="mcpServers", default_factory=dict)
    files: list[InitialFile] = []
    skills: list[str | InlineSkill] = []
    metadata: dict[str, object] = {}

    @property
    def ref(self) -> str:
        return f"{DECLARATIVE}{self.name}"

    @property
    def skill_refs(self) -> list[str]:
        return [
            skill if skill.startswith(SKILL) else f"{SKILL}{skill}" for skill in self.skills if isinstance(skill, str)
        ]

    @property
    def inline_skills(self) -> list[InlineSkill]:
        return [skill for skill in self.skills if isinstance(skill, InlineSkill)]

    def check(self) -> None:
        """Raises `InputTooLarge` or `InvalidInput`, naming the field. Not checked here: what only the database knows."""
        if len(self.name) > NAME_MAX_CHARACTERS or not _NAME.fullmatch(self.name):
            field = f"{FIELD}.name"
            rule = f"up to {NAME_MAX_CHARACTERS} lower-case letters and digits, in words joined by `_` or `-`"
            raise InvalidInput(f"{field} must be {rule}", field=field)
        for field in ("display_name", "category", "icon"):
            check_text(getattr(self, field) or "", f"{FIELD}.{field}", SHORT_TEXT_MAX_BYTES)
        check_text(self.description, f"{FIELD}.description", DESCRIPTION_MAX_BYTES)
        check_text(self.system_prompt or "", f"{FIELD}.system_prompt", PROMPT_MAX_BYTES)
        for field in ("dependencies", "features", "skills"):
            check_count(getattr(self, field), f"{FIELD}.{field}", MAX_CAPABILITIES)
        for field in ("dependencies", "features"):
            for index, text in enumerate(getattr(self, field)):
                check_text(text, f"{FIELD}.{field}[{index}]", 256)
        check_count(self.inline_skills, f"{FIELD}.skills", MAX_INLINE_SKILLS)
        if self.ref in self.dependencies or self.name in self.dependencies:
            raise InvalidInput("A capability cannot depend on itself", field=f"{FIELD}.dependencies")
        self._check_servers()
        _placed(lambda: check_tools(self.tools), "tools", f"{FIELD}.tools")
        _placed(lambda: check_initial_files(self.files), "initial_files", f"{FIELD}.files")
        if len(msgspec.json.encode(self.metadata)) > METADATA_MAX_BYTES:
            field = f"{FIELD}.metadata"
            raise InputTooLarge(
                f"Input exceeds allowed limits: `{field}` may hold {METADATA_MAX_BYTES} bytes", field=field
            )

    def _check_servers(self) -> None:
        check_count(list(self.mcp_servers), f"{FIELD}.mcpServers", MAX_MCP_SERVERS)
        for name, server in self.mcp_servers.items():
            field = f"{FIELD}.mcpServers.{name[:80]}"
            if not isinstance(server, dict):
                raise InvalidInput(f"{field} must be an object", field=field)


class DeclarativeStatus(StrEnum):
    """A disabled capability can be read and edited, but no turn gets it."""

    ACTIVE = "active"
    DISABLED = "disabled"
    ARCHIVED = "archived"
    DELETED = "deleted"


class DeclarativeCapability(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A declarative capability as served. `capability_id` is what references use."""

    id: str
    capability_id: str
    name: str
    description: str
    status: DeclarativeStatus
    definition: DeclarativeDefinition
    created_at: str
    updated_at: str
    display_name: str | None = None
    archived_at: str | None = None
    deleted_at: str | None = None


def read_definition(given: Mapping[str, object]) -> DeclarativeDefinition:
    """Checked. Raises `InvalidInput` or `InputTooLarge`."""
    fields = dict(given)
    for alias, name in _ALIASES.items():
        if alias in fields:
            if name in fields:
                raise InvalidInput(f"Give either {FIELD}.{alias} or {FIELD}.{name}, not both", field=f"{FIELD}.{alias}")
            fields[name] = fields.pop(alias)
    try:
        definition = msgspec.convert(
            {key: value for key, value in fields.items() if value is not None}, DeclarativeDefinition
        )
    except msgspec.ValidationError as error:
        raise invalid_field(error, FIELD) from None
    definition.check()
    return definition


def _placed(check: Callable[[], T], name: str, place: str) -> T:
    """Run a check that names a field of another resource, and name ours."""
    try:
        return check()
    except EverrunsError as error:
        field = (error.field or name).replace(name, place, 1)
        raise type(error)(error.message.replace(name, place, 1), field=field) from None
