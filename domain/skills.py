"""Skills: a SKILL.md with instructions for one kind of work, and the files that belong to it.

The rules follow the open SKILL.md format: `name` and `description` are required, the rest is optional. A skill stands in the
workspace under `/.agents/skills/{name}/`; the registry keeps packages that are copied there when a model activates them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Literal, Protocol

import msgspec
from msgspec import Struct

SKILLS_DIRECTORY: Final = "/.agents/skills"
MANIFEST: Final = "SKILL.md"

NAME_MAX_CHARACTERS: Final = 64
DESCRIPTION_MAX_CHARACTERS: Final = 1024
COMPATIBILITY_MAX_CHARACTERS: Final = 500
TEXT_MAX_CHARACTERS: Final = 2048
"""`license`, `version` and `allowed-tools`."""
METADATA_MAX_BYTES: Final = 16 * 1024
SKILL_MD_MAX_BYTES: Final = 256 * 1024
ADVISED_BODY_LINES: Final = 500
"""A model reads the whole body when it activates the skill; what is longer belongs into files beside it."""

_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_KNOWN: Final = frozenset(
    {
        "name",
        "description",
        "license",
        "compatibility",
        "metadata",
        "allowed-tools",
        "version",
        "disable-model-invocation",
        "user-invocable",
    }
)


class SkillManifest(Struct, frozen=True, kw_only=True):
    """A SKILL.md, read. `body` are the instructions."""

    name: str
    description: str
    body: str
    version: str = "1.0.0"
    license: str | None = None
    compatibility: str | None = None
    allowed_tools: str | None = None
    metadata: dict[str, object] = {}
    disable_model_invocation: bool = False
    user_invocable: bool = True
    warnings: tuple[str, ...] = ()


class SkillFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of a package besides its SKILL.md. `path` is relative to the skill's directory."""

    path: str
    content: bytes


class SkillPackage(Struct, frozen=True, kw_only=True):
    """`manifest` is what `skill_md` says."""

    skill_md: str
    manifest: SkillManifest
    files: tuple[SkillFile, ...] = ()


class SkillStatus(StrEnum):
    """A disabled skill can be read and edited, but no turn gets it."""

    ACTIVE = "active"
    DISABLED = "disabled"
    ARCHIVED = "archived"
    DELETED = "deleted"


class Skill(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A skill of the registry, as served; its content is served apart."""

    id: str
    name: str
    description: str
    version: str
    source_type: Literal["markdown", "archive"]
    status: SkillStatus
    created_at: str
    updated_at: str
    license: str | None = None
    compatibility: str | None = None
    allowed_tools: str | None = None
    metadata: dict[str, object] = {}
    disable_model_invocation: bool = False
    user_invocable: bool = True
    archived_at: str | None = None
    deleted_at: str | None = None


class SkillProblem(Exception):
    """A package that is no skill; `problems` are all that was found, fit for a person or a model to read."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class SkillRegistry(Protocol):
    """Skills that are kept for an organization."""

    async def package(self, session_id: str, skill_id: str) -> SkillPackage | None:
        """The newest content of a skill of the session's organization; None when it is deleted or was never there."""
        ...


def manifest_of(fields: Mapping[str, object], body: str, *, directory: str | None = None) -> SkillManifest:
    """Front matter and body as a manifest. `directory` is the name of the directory it stands in, which must be the skill's.

    Raises `SkillProblem` with everything that is wrong.
    """
    problems: list[str] = []
    warnings: list[str] = []

    def text(field: str, maximum: int, default: str | None = None, *, required: bool = False) -> str | None:
        value = fields.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and field == "version":
            value = str(value)  # what YAML makes of `version: 1.0`
        if isinstance(value, list) and field == "allowed-tools" and all(isinstance(one, str) for one in value):
            value = ", ".join(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            if required:
                problems.append(f"`{field}` is required and must not be empty")
            return default
        if not isinstance(value, str):
            problems.append(f"`{field}` must be text")
            return default
        if len(value) > maximum:
            problems.append(f"`{field}` may have {maximum} characters; it has {len(value)}")
            return default
        return value.strip()

    def flag(field: str, *, default: bool) -> bool:
        value = fields.get(field, default)
        if isinstance(value, bool):
            return value
        problems.append(f"`{field}` must be true or false")
        return default

    name = text("name", NAME_MAX_CHARACTERS, required=True) or ""
    if name and not _NAME.fullmatch(name):
        problems.append("`name` must be lower-case letters and digits, in words joined by `-`")
    elif name and directory is not None and name != directory:
        problems.append(f"`name` must be that of the directory the skill stands in, `{directory[:80]}`")
    description = text("description", DESCRIPTION_MAX_CHARACTERS, required=True) or ""
    metadata = _metadata(fields.get("metadata"), problems)
    version = text("version", TEXT_MAX_CHARACTERS) or _version_of(metadata)
    manifest = SkillManifest(
        name=name,
        description=one_line(description),
        body=body.strip("\r\n"),
        version=version,
        license=text("license", TEXT_MAX_CHARACTERS),
        compatibility=text("compatibility", COMPATIBILITY_MAX_CHARACTERS),
        allowed_tools=text("allowed-tools", TEXT_MAX_CHARACTERS),
        metadata=metadata,
        disable_model_invocation=flag("disable-model-invocation", default=False),
        user_invocable=flag("user-invocable", default=True),
    )
    if problems:
        raise SkillProblem(*problems)
    if not body.strip():
        warnings.append("there are no instructions below the front matter")
    if body.count("\n") > ADVISED_BODY_LINES:
        warnings.append(
            f"the instructions have more than {ADVISED_BODY_LINES} lines; move details into files beside them"
        )
    warnings += [f"the field `{field[:60]}` means nothing here" for field in fields if field not in _KNOWN]
    return msgspec.structs.replace(manifest, warnings=tuple(warnings))


def one_line(text: str) -> str:
    """Text of strangers as a part of a line: no line breaks, no characters that cannot be seen."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def skill_directory(name: str) -> str:
    return f"{SKILLS_DIRECTORY}/{name}"


def _metadata(value: object, problems: list[str]) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        problems.append("`metadata` must hold fields")
        return {}
    try:
        if len(msgspec.json.encode(value)) <= METADATA_MAX_BYTES:
            return dict(value)
        problems.append(f"`metadata` may hold {METADATA_MAX_BYTES} bytes")
    except (TypeError, ValueError, RecursionError):
        problems.append("`metadata` holds what JSON cannot")
    return {}


def _version_of(metadata: Mapping[str, object]) -> str:
    version = metadata.get("version")
    return str(version)[:100] if isinstance(version, str | int | float) and version != "" else "1.0.0"
