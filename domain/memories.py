"""Memories: stores of files that belong to an organization and outlive sessions."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from domain.errors import InvalidInput
from domain.limits import DESCRIPTION_MAX_BYTES, SHORT_TEXT_MAX_BYTES, check_text
from domain.resources import Lifecycle

MEMORY_NAME_MAX_CHARACTERS: Final = 128
SYNC_NOT_SUPPORTED: Final = (
    "This server cannot fetch git repositories. Nothing was changed; use a memory without a source."
)
MIN_SYNC_SECONDS: Final = 300
MAX_SYNC_SECONDS: Final = 604_800

SourceType = Literal["manual", "github", "git"]
SyncStatus = Literal["idle", "syncing", "succeeded", "failed"]

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}/[A-Za-z0-9_.-]{1,100}")
_CREDENTIALS_IN_URL: Final = re.compile(r"[a-z+]+://[^/@]*:[^/@]*@", re.IGNORECASE)


class ManualSource(Struct, frozen=True, kw_only=True, tag_field="provider", tag="manual"):
    """Files are written over the API and by tools."""


class GitHubSource(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="provider", tag="github"):
    repository: str
    branch: str
    root_folder: str | None = None
    sync_interval_secs: int | None = None


class GitSource(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="provider", tag="git"):
    url: str
    branch: str
    root_folder: str | None = None
    sync_interval_secs: int | None = None


MemorySource = ManualSource | GitHubSource | GitSource


class SourceInput(Struct, frozen=True, kw_only=True):
    """`type` may be left out: a `repository` means `github`, a `url` means `git`."""

    type: SourceType | None = None
    repository: str | None = None
    url: str | None = None
    branch: str | None = None
    root_folder: str | None = None
    sync_interval_secs: Annotated[int, Meta(ge=0, le=MAX_SYNC_SECONDS)] | None = None

    @property
    def source_type(self) -> SourceType:
        if self.type is not None:
            return self.type
        return "github" if self.repository is not None else "git" if self.url is not None else "manual"

    def stored(self) -> dict[str, object]:
        names = {"github": "repository", "git": "url"}
        name = names.get(self.source_type)
        if name is None:
            return {}
        values = {name: getattr(self, name), "branch": self.branch or "main"}
        optional = {"root_folder": self.root_folder, "sync_interval_secs": self.sync_interval_secs}
        return {**values, **{key: value for key, value in optional.items() if value is not None}}

    def check(self) -> None:
        """Raises `InvalidInput` or `InputTooLarge`, naming the field."""
        for name in ("repository", "url", "branch", "root_folder"):
            value = getattr(self, name)
            if value is not None:
                check_text(value, f"source.{name}", SHORT_TEXT_MAX_BYTES)
        if self.repository is not None and self.url is not None:
            raise InvalidInput("A source has either a repository or a url, not both", field="source.url")
        match self.source_type:
            case "github":
                if self.repository is None or not _REPOSITORY.fullmatch(self.repository):
                    raise InvalidInput("source.repository must be `owner/repo`", field="source.repository")
            case "git":
                if self.url is None or not self.url.strip():
                    raise InvalidInput("source.url is required", field="source.url")
                if _CREDENTIALS_IN_URL.match(self.url):
                    raise InvalidInput(
                        "source.url must not hold credentials: it is shown to everybody", field="source.url"
                    )
            case "manual":
                if self.repository is not None or self.url is not None:
                    raise InvalidInput("A manual memory has no repository and no url", field="source.type")
        if self.sync_interval_secs and self.sync_interval_secs < MIN_SYNC_SECONDS:
            raise InvalidInput(
                f"source.sync_interval_secs must be 0, or {MIN_SYNC_SECONDS} and more",
                field="source.sync_interval_secs",
            )


def source_of(source_type: str, stored: dict[str, object]) -> MemorySource:
    return msgspec.convert({"provider": source_type, **stored}, MemorySource)  # type: ignore[arg-type]  # a tagged union


class Memory(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`is_readonly` tells that files come from a source and are not written otherwise."""

    id: str
    name: str
    source: MemorySource
    source_type: SourceType
    status: Lifecycle
    sync_status: SyncStatus
    is_readonly: bool
    created_at: str
    updated_at: str
    description: str | None = None
    last_synced_at: str | None = None
    last_sync_error: str | None = None
    archived_at: str | None = None
    deleted_at: str | None = None


class MemoryChanges(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    source: SourceInput | UnsetType = UNSET
    status: Lifecycle | UnsetType = UNSET

    def check(self) -> None:
        """Raises `InputTooLarge` or `InvalidInput`, naming the field."""
        if isinstance(self.name, str):
            if not self.name.strip() or self.name != self.name.strip() or not self.name.isprintable():
                raise InvalidInput("name must be printable text in one line, not blank", field="name")
            if len(self.name) > MEMORY_NAME_MAX_CHARACTERS:
                raise InvalidInput(f"name may have {MEMORY_NAME_MAX_CHARACTERS} characters", field="name")
        if isinstance(self.description, str):
            check_text(self.description, "description", DESCRIPTION_MAX_BYTES)
        if isinstance(self.source, SourceInput):
            self.source.check()
