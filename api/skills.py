"""`/v1/skills`: the organization's registry of skills."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any, Final

from litestar import Request, Router, delete, get, patch, post
from litestar.datastructures import UploadFile
from litestar.di import NamedDependency
from litestar.openapi.spec import OpenAPIFormat, OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import Struct

from api.links import ConfigView, actions, resource_config, self_url, view
from api.problems import AllowedAction, declared
from api.services import Services
from db import skills
from domain.errors import InvalidInput, InvalidSkill
from domain.skills import Skill, SkillFile, SkillPackage, SkillProblem, SkillStatus
from infra.skill_packages import ARCHIVE_MAX_BYTES, read_archive, read_skill_md

UPLOAD_MAX_BYTES: Final = ARCHIVE_MAX_BYTES + 64 * 1024
"""With the lines that a form adds."""
FIELD: Final = "skill_md"


class CreateSkill(Struct, frozen=True, kw_only=True):
    skill_md: str


class UpdateSkill(Struct, frozen=True, kw_only=True):
    """A new `skill_md` keeps the package's other files. `status` disables, archives and reactivates."""

    skill_md: str | None = None
    status: SkillStatus | None = None


class ValidateSkill(Struct, frozen=True, kw_only=True):
    skill_md: str


class SkillValidation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`errors` are there exactly when it is not `valid`."""

    valid: bool
    errors: list[str] = []
    warnings: list[str] = []
    name: str | None = None
    description: str | None = None


class SkillView(Skill, frozen=True, kw_only=True, omit_defaults=True):
    self_url: str
    allowed_actions: list[AllowedAction]


class SkillList(Struct, frozen=True, kw_only=True):
    data: list[SkillView]
    total: int


class SkillFileEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`encoding` is `base64` for what is not UTF-8 text."""

    path: str
    content: str
    encoding: str = "text"


class SkillContent(Struct, frozen=True, kw_only=True):
    skill_md: str
    files: list[SkillFileEntry]


def skill_view(services: Services, skill: Skill) -> SkillView:
    url = self_url(services, f"skills/{skill.id}")
    items = [("self", "GET", "", "get_skill"), ("content", "GET", "/content", "get_skill_content")]
    if skill.status is SkillStatus.ARCHIVED:
        items.append(("unarchive", "PATCH", "", "update_skill"))
    else:
        items += [("update", "PATCH", "", "update_skill"), ("delete", "DELETE", "", "delete_skill")]
    return view(SkillView, skill, self_url=url, allowed_actions=actions(url, *items))


def _markdown(text: str) -> SkillPackage:
    try:
        return SkillPackage(skill_md=text, manifest=read_skill_md(text))
    except SkillProblem as problem:
        raise InvalidSkill(f"{FIELD}: {problem}", field=FIELD) from None


@get("/", operation_id="list_skills", summary="List skills", responses=declared())
async def list_skills(
    services: NamedDependency[Services],
    search: FromQuery[str | None] = None,
    include_archived: FromQuery[bool] = False,
) -> SkillList:
    """Newest first. Each word of `search` must occur in the name or the description."""
    found = await skills.list_skills(services.database, search=search, include_archived=include_archived)
    return SkillList(data=[skill_view(services, skill) for skill in found], total=len(found))


@post("/", operation_id="create_skill", summary="Create a skill", responses=declared(409, 413, 422))
async def create_skill(services: NamedDependency[Services], data: JSONBody[CreateSkill]) -> SkillView:
    """From a SKILL.md alone."""
    package = await asyncio.to_thread(_markdown, data.skill_md)
    return skill_view(services, await skills.create_skill(services.database, package, "markdown"))


@dataclass
class _TakesArchive(Operation):
    """The body is read as it is, so Litestar cannot describe it."""

    def __post_init__(self) -> None:
        file = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
        form = Schema(type=OpenAPIType.OBJECT, properties={"file": file}, required=["file"])
        self.request_body = RequestBody(
            content={
                "multipart/form-data": OpenAPIMediaType(schema=form),
                "application/zip": OpenAPIMediaType(schema=file),
                "application/gzip": OpenAPIMediaType(schema=file),
            },
            description="A zip or tar.gz archive, as a form's file or bare.",
            required=True,
        )


@post(
    "/upload",
    operation_id="upload_skill",
    summary="Create a skill from an archive",
    operation_class=_TakesArchive,
    request_max_body_size=UPLOAD_MAX_BYTES,
    responses=declared(409, 413, 422),
)
async def upload_skill(services: NamedDependency[Services], request: Request[Any, Any, Any]) -> SkillView:
    """Its SKILL.md stands in the archive's root or in its only directory."""
    archive = await _archive_of(request)
    try:
        package = await asyncio.to_thread(read_archive, archive)
    except SkillProblem as problem:
        raise InvalidSkill(str(problem), field="file") from None
    return skill_view(services, await skills.create_skill(services.database, package, "archive"))


async def _archive_of(request: Request[Any, Any, Any]) -> bytes:
    if request.content_type[0] != "multipart/form-data":
        archive = await request.body()
        if not archive:
            raise InvalidInput("An archive is required", field="file")
        return archive
    files = [value for value in (await request.form()).values() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise InvalidInput("The form must hold one file", field="file")
    return await files[0].read()


@get("/config", operation_id="skill_config", summary="Skill policies", responses=declared())
async def skill_config() -> ConfigView:
    """What the caller may do with skills."""
    return resource_config("skills")


@get("/usage", operation_id="skill_usage", summary="Where skills are used", responses=declared())
async def skill_usage(services: NamedDependency[Services]) -> dict[str, skills.SkillUsage]:
    """By skill id: how many active agents and harnesses refer to it. Without those that nothing refers to."""
    return await skills.skill_usage(services.database)


@post("/validate", operation_id="validate_skill", summary="Validate a skill", status_code=200, responses=declared(413))
async def validate_skill(data: JSONBody[ValidateSkill]) -> SkillValidation:
    """What creating it would find. Nothing is stored."""
    try:
        manifest = await asyncio.to_thread(read_skill_md, data.skill_md)
    except SkillProblem as problem:
        return SkillValidation(valid=False, errors=list(problem.problems))
    return SkillValidation(
        valid=True, warnings=list(manifest.warnings), name=manifest.name, description=manifest.description
    )


@get("/{skill_id:str}", operation_id="get_skill", summary="Get a skill", responses=declared())
async def get_skill(services: NamedDependency[Services], skill_id: FromPath[str]) -> SkillView:
    """What its SKILL.md says about it; the instructions are in its content."""
    return skill_view(services, await skills.get_skill(services.database, skill_id))


@get("/{skill_id:str}/content", operation_id="get_skill_content", summary="Get a skill's files", responses=declared())
async def get_skill_content(services: NamedDependency[Services], skill_id: FromPath[str]) -> SkillContent:
    """The SKILL.md and every other file of the package."""
    package = await skills.skill_package(services.database, skill_id)
    return SkillContent(skill_md=package.skill_md, files=[_entry(file) for file in package.files])


def _entry(file: SkillFile) -> SkillFileEntry:
    try:
        text = file.content.decode()
    except UnicodeDecodeError:
        return SkillFileEntry(path=file.path, content=base64.b64encode(file.content).decode(), encoding="base64")
    return SkillFileEntry(path=file.path, content=text)


@patch("/{skill_id:str}", operation_id="update_skill", summary="Update a skill", responses=declared(409, 413, 422))
async def update_skill(
    services: NamedDependency[Services], skill_id: FromPath[str], data: JSONBody[UpdateSkill]
) -> SkillView:
    """Turns see the change from their next activation on. Workspaces that have the skill keep their copy."""
    package = None if data.skill_md is None else await asyncio.to_thread(_markdown, data.skill_md)
    updated = await skills.update_skill(services.database, skill_id, package, data.status)
    return skill_view(services, updated)


@delete("/{skill_id:str}", operation_id="delete_skill", summary="Archive a skill", responses=declared())
async def delete_skill(services: NamedDependency[Services], skill_id: FromPath[str]) -> None:
    """It gives up its name and cannot be newly assigned; what refers to it goes on."""
    await skills.archive_skill(services.database, skill_id)


router = Router(
    "/skills",
    tags=["Skills"],
    route_handlers=[
        list_skills,
        create_skill,
        upload_skill,
        skill_config,
        skill_usage,
        validate_skill,
        get_skill,
        get_skill_content,
        update_skill,
        delete_skill,
    ],
)
