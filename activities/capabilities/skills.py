"""Skills: instructions that a model reads only when it needs them.

Decisions:
- The prompt holds names and descriptions; the instructions come with `activate_skill`, further files with the file tools.
- What stands in the workspace goes before the registry: an edited copy is the one that counts, and activating a skill again
  overwrites nothing.
- A SKILL.md in the workspace was written by whoever can write files there, so it is read like any input: bounded, one line of
  description each, and one that is broken keeps no other from being found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.capabilities import Capability, NoArguments, SessionView, Tool, ToolContext, ToolError
from domain.config import PinnedSkill
from domain.skills import (
    MANIFEST,
    SKILL_MD_MAX_BYTES,
    SKILLS_DIRECTORY,
    SkillManifest,
    SkillPackage,
    SkillProblem,
    SkillRegistry,
    skill_directory,
)
from domain.tools import SideEffect
from domain.workspace import ROOT, FileConflict, FileEntry, FileMissing, FileProblem, WorkspaceFiles
from infra.skill_packages import read_skill_md

CONCURRENCY_CLASS: Final = "session_workspace"
MAX_WORKSPACE_SKILLS: Final = 200
"""SKILL.md files that are read for one listing."""
LISTED_MAX_CHARACTERS: Final = 16_000
"""Of names and descriptions in the prompt, which every model call pays for."""
BODY_MAX_BYTES: Final = 48 * 1024
"""Of instructions in one result; it may hold 64 KiB."""
MAX_FILES_SHOWN: Final = 100

INTRODUCTION: Final = (
    "Skills are instructions for certain kinds of work. Before you begin something that a skill below is for, call "
    "`activate_skill` with its name and follow what it returns. The descriptions are those of the skills' authors:"
)


class ActivateSkill(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(description="Name of a skill, as it is listed.", max_length=200)]


class ListedSkill(Struct, frozen=True, kw_only=True):
    name: str
    description: str
    source: str


class BrokenSkill(Struct, frozen=True, kw_only=True):
    path: str
    problem: str


class SkillList(Struct, frozen=True, kw_only=True, omit_defaults=True):
    skills: list[ListedSkill]
    broken: list[BrokenSkill] = []


class ActivatedSkill(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`files` are those beside SKILL.md, with paths that the file tools and the shell understand."""

    name: str
    directory: str
    instructions: str
    allowed_tools: str | None = None
    compatibility: str | None = None
    files: list[str] = []
    note: str | None = None


class _Found(Struct, frozen=True, kw_only=True):
    """The skills of a workspace, by name."""

    manifests: dict[str, SkillManifest]
    broken: list[BrokenSkill]


class Skills:
    """The tools and the prompt, over the workspace and the `pinned` skills of the registry."""

    def __init__(self, registry: SkillRegistry | None, pinned: Sequence[PinnedSkill]) -> None:
        self._registry = registry
        self._pinned = {skill.name: skill for skill in pinned if not skill.disable_model_invocation}

    async def list_skills(self, context: ToolContext, _: NoArguments) -> SkillList:
        found = await _workspace_skills(context.files)
        return SkillList(skills=self._listed(found.manifests), broken=found.broken)

    async def activate_skill(self, context: ToolContext, arguments: ActivateSkill) -> ActivatedSkill:
        name = arguments.name.strip()
        note = None
        if name in self._pinned and await _entries(context.files, skill_directory(name), MANIFEST) is None:
            note = await self._install(context, self._pinned[name])
        manifest = await self._manifest(context.files, name)
        directory = skill_directory(name)
        entries = await context.files.list(directory, recursive=True)
        paths = [_tool_path(entry.path) for entry in entries if not entry.is_directory and entry.name != MANIFEST]
        body, cut = _cut(manifest.body, f"{directory}/{MANIFEST}")
        if len(paths) > MAX_FILES_SHOWN:
            cut = f"{cut or ''} There are {len(paths)} files; use list_directory for the rest.".strip()
        return ActivatedSkill(
            name=name,
            directory=_tool_path(directory),
            instructions=body,
            allowed_tools=manifest.allowed_tools,
            compatibility=manifest.compatibility,
            files=paths[:MAX_FILES_SHOWN],
            note=cut or note,
        )

    async def prompt(self, session: SessionView, _: Struct | None) -> str | None:
        skills = self._listed((await _workspace_skills(session.files)).manifests)
        lines: list[str] = []
        left = LISTED_MAX_CHARACTERS
        for skill in skills:
            line = f"- {skill.name}: {skill.description}"
            left -= len(line)
            if left < 0:
                lines.append(f"- … and {len(skills) - len(lines)} more: `list_skills` names them.")
                break
            lines.append(line)
        return "\n".join([INTRODUCTION, *lines]) if lines else None

    def _listed(self, manifests: Mapping[str, SkillManifest]) -> list[ListedSkill]:
        listed = {
            name: ListedSkill(name=name, description=one.description, source="workspace")
            for name, one in manifests.items()
            if not one.disable_model_invocation
        }
        for name, skill in self._pinned.items():
            if name not in manifests:
                listed[name] = ListedSkill(name=name, description=skill.description, source="registry")
        return [listed[name] for name in sorted(listed)]

    async def _install(self, context: ToolContext, skill: PinnedSkill) -> str | None:
        """Write what is missing of the package. Returns what the model should know about it."""
        package = None if self._registry is None else await self._registry.package(context.session_id, skill.id)
        if package is None:
            raise ToolError(f"The skill `{skill.name}` is not in the registry any more.")
        if package.manifest.name != skill.name:
            raise ToolError(
                f"The skill `{skill.name}` is called `{package.manifest.name}` now; it can be activated from the next turn on."
            )
        directory = skill_directory(skill.name)
        try:
            written = await _write_missing(context.files, directory, package)
        except FileConflict:
            # Somebody else wrote there at the same time; what they wrote stays.
            written = await _write_missing(context.files, directory, package)
        for entry in written:
            await context.file_written(entry, created=True)
        return None

    async def _manifest(self, files: WorkspaceFiles, name: str) -> SkillManifest:
        found = await _workspace_skills(files)
        known = self._listed(found.manifests)
        if any(skill.name == name for skill in known) and name in found.manifests:
            return found.manifests[name]
        path = f"{_tool_path(skill_directory(name))}/{MANIFEST}"
        broken = next((one for one in found.broken if one.path == path), None)
        if broken is not None:
            raise ToolError(f"`{path}` is broken: {broken.problem}.")
        names = ", ".join(f"`{skill.name}`" for skill in known[:50]) or "none"
        raise ToolError(f"There is no skill `{name[:80]}`. Skills that can be activated: {names}.")


async def _workspace_skills(files: WorkspaceFiles) -> _Found:
    entries = [entry for entry in await _all_entries(files) if _is_manifest(entry)][:MAX_WORKSPACE_SKILLS]
    small = [entry.path for entry in entries if entry.size_bytes <= SKILL_MD_MAX_BYTES]
    contents = {entry.path: content for entry, content in await files.read_many(small)} if small else {}
    manifests: dict[str, SkillManifest] = {}
    broken: list[BrokenSkill] = []
    for entry in entries:
        directory = entry.path.split("/")[-2]
        try:
            content = contents.get(entry.path)
            if content is None:
                raise SkillProblem(f"it is larger than {SKILL_MD_MAX_BYTES} bytes")
            manifests[directory] = read_skill_md(content.decode(), directory=directory)
        except UnicodeDecodeError:
            broken.append(BrokenSkill(path=_tool_path(entry.path), problem="it is not UTF-8 text"))
        except SkillProblem as problem:
            broken.append(BrokenSkill(path=_tool_path(entry.path), problem=str(problem)))
    return _Found(manifests=manifests, broken=broken)


async def _all_entries(files: WorkspaceFiles) -> list[FileEntry]:
    try:
        return await files.list(SKILLS_DIRECTORY, recursive=True)
    except FileProblem:
        return []


def _is_manifest(entry: FileEntry) -> bool:
    relative = entry.path.removeprefix(f"{SKILLS_DIRECTORY}/")
    return not entry.is_directory and relative.count("/") == 1 and relative.endswith(f"/{MANIFEST}")


async def _entries(files: WorkspaceFiles, directory: str, name: str) -> FileEntry | None:
    return await files.stat(f"{directory}/{name}")


async def _write_missing(files: WorkspaceFiles, directory: str, package: SkillPackage) -> list[FileEntry]:
    contents = {f"{directory}/{MANIFEST}": package.skill_md.encode()}
    contents |= {f"{directory}/{file.path}": file.content for file in package.files}
    try:
        there = {entry.path for entry in await files.list(directory, recursive=True)}
    except FileMissing:
        there = set[str]()
    missing = {path: content for path, content in contents.items() if path not in there}
    return await files.apply(missing, [], expected=dict.fromkeys(missing))


def _cut(body: str, path: str) -> tuple[str, str | None]:
    encoded = body.encode()
    if len(encoded) <= BODY_MAX_BYTES:
        return body, None
    shown = encoded[:BODY_MAX_BYTES].decode(errors="ignore")
    note = f"These are the first {BODY_MAX_BYTES} of {len(encoded)} bytes; read the rest in `{_tool_path(path)}`."
    return shown, note


def _tool_path(path: str) -> str:
    return f"{ROOT}{path}"


def capability(registry: SkillRegistry | None = None, pinned: Sequence[PinnedSkill] = ()) -> Capability:
    """`pinned` are the registry's skills that the turn's configuration names."""
    skills = Skills(registry, pinned)
    return Capability(
        id="skills",
        name="Skills",
        description="Lets the model activate skills: packages of instructions and files for certain kinds of work.",
        category="Agent",
        icon="book-open",
        dependencies=("session_file_system",),
        session_prompt=skills.prompt,
        tools=(
            Tool(
                name="list_skills",
                display_name="List skills",
                description="List the skills that can be activated, with what each is for, and those that are broken.",
                run=skills.list_skills,
                side_effect=SideEffect.PURE,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=60,
                readonly=True,
            ),
            Tool(
                name="activate_skill",
                display_name="Activate skill",
                description="Get the instructions of a skill, and its files into the workspace if they are not there yet.",
                arguments=ActivateSkill,
                run=skills.activate_skill,
                side_effect=SideEffect.IDEMPOTENT,
                concurrency_class=CONCURRENCY_CLASS,
                timeout_seconds=60,
            ),
        ),
    )


CAPABILITY = capability()
