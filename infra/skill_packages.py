"""Skill packages as they arrive: a SKILL.md, or an archive with one in it. Nothing is written to disk.

An archive is input from strangers: sizes are counted while it is unpacked, whatever its headers say; links, devices and paths
that lead out of the package are refused, and so is an archive whose members stand for each other (equal but for case).
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Final

from domain.skills import (
    MANIFEST,
    SKILL_MD_MAX_BYTES,
    SKILLS_DIRECTORY,
    SkillFile,
    SkillManifest,
    SkillPackage,
    SkillProblem,
    manifest_of,
)
from domain.workspace import BadPath, file_path, parents, shown
from infra.front_matter import FrontMatterProblem, split_front_matter

ARCHIVE_MAX_BYTES: Final = 10 * 1024 * 1024
"""Of an archive as it is uploaded."""
PACKAGE_MAX_BYTES: Final = 10 * 1024 * 1024
"""Of everything in it, unpacked."""
MAX_FILES: Final = 200
MAX_MEMBERS: Final = 1000
"""Entries that are looked at, directories and what is left out among them."""

_CHUNK: Final = 64 * 1024
_LEFT_OUT: Final = ("__MACOSX", ".git", ".DS_Store")
"""What packing programs add and no skill means."""
_ZIP_LINK: Final = 0o120000
_ZIP_TYPE_MASK: Final = 0o170000


def read_skill_md(text: str, *, directory: str | None = None) -> SkillManifest:
    """Raises `SkillProblem`."""
    if len(text.encode("utf-8", "replace")) > SKILL_MD_MAX_BYTES:
        raise SkillProblem(f"{MANIFEST} may have {SKILL_MD_MAX_BYTES} bytes")
    if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
        raise SkillProblem(f"{MANIFEST} is not UTF-8 text")
    try:
        fields, body = split_front_matter(text)
    except FrontMatterProblem as problem:
        raise SkillProblem(str(problem)) from None
    return manifest_of(fields, body, directory=directory)


def read_archive(archive: bytes) -> SkillPackage:
    """A zip or tar.gz archive; SKILL.md stands in its root, or in its only directory. Raises `SkillProblem`."""
    if len(archive) > ARCHIVE_MAX_BYTES:
        raise SkillProblem(f"the archive may have {ARCHIVE_MAX_BYTES} bytes")
    if archive.startswith(b"PK"):
        members = _zip_members(archive)
    elif archive.startswith(b"\x1f\x8b"):
        members = _tar_members(archive)
    else:
        raise SkillProblem("the upload is neither a zip nor a tar.gz archive")
    try:
        return _package(_collected(members))
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SkillProblem(f"the archive cannot be unpacked: {_cause(error)}") from None
    except (OSError, ValueError, OverflowError):
        raise SkillProblem("the archive cannot be unpacked") from None


def _collected(members: Iterator[tuple[str, IO[bytes] | None]]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    spellings: dict[str, str] = {}
    left = PACKAGE_MAX_BYTES
    for count, (name, stream) in enumerate(members, 1):
        if count > MAX_MEMBERS:
            raise SkillProblem(f"the archive has more than {MAX_MEMBERS} entries")
        path = _member_path(name)
        if stream is None or path is None:
            continue
        if (other := spellings.setdefault(path.casefold(), path)) != path or path in files:
            raise SkillProblem(
                f"the archive holds {shown(path)} twice" + (f", also as {shown(other)}" if other != path else "")
            )
        if len(files) >= MAX_FILES:
            raise SkillProblem(f"a skill may have {MAX_FILES} files")
        content = _read_limited(stream, left)
        left -= len(content)
        files[path] = content
    return files


def _member_path(name: str) -> str | None:
    """Without a slash at the beginning; None for what is left out. Raises `SkillProblem`."""
    if name.startswith(("/", "\\")) or "\\" in name or ":" in name.partition("/")[0]:
        raise SkillProblem(f"the archive holds a path that is not relative: {shown(name)}")
    try:
        path = file_path(f"{SKILLS_DIRECTORY}/x/{name.removeprefix('./').removesuffix('/')}").removeprefix(
            f"{SKILLS_DIRECTORY}/x"
        )
    except BadPath as problem:
        if name.rstrip("/") in ("", "."):
            return None
        raise SkillProblem(f"the archive holds a path that cannot be used: {problem}") from None
    relative = path.lstrip("/")
    return None if not relative or any(part in _LEFT_OUT for part in relative.split("/")) else relative


def _read_limited(stream: IO[bytes], maximum: int) -> bytes:
    content = bytearray()
    while chunk := stream.read(_CHUNK):
        content += chunk
        if len(content) > maximum:
            raise SkillProblem(f"the archive holds more than {PACKAGE_MAX_BYTES} bytes")
    return bytes(content)


def _zip_members(archive: bytes) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for info in opened.infolist():
            kind = (info.external_attr >> 16) & _ZIP_TYPE_MASK
            if kind == _ZIP_LINK:
                raise SkillProblem(f"the archive holds a link, {shown(info.filename)}; links are not supported")
            if info.flag_bits & 0x1:
                raise SkillProblem("the archive is encrypted")
            if info.is_dir():
                yield info.filename, None
                continue
            with opened.open(info) as stream:
                yield info.filename, stream


def _tar_members(archive: bytes) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(fileobj=_Counted(archive), mode="r|") as opened:
        for info in opened:
            if info.isdir():
                yield info.name, None
            elif info.isreg():
                yield info.name, opened.extractfile(info)
            else:
                raise SkillProblem(
                    f"the archive holds a link or a device, {shown(info.name)}; only files are supported"
                )


class _Counted(gzip.GzipFile):
    """Counts what is unpacked, headers and members that are skipped included: those cost time, too."""

    def __init__(self, archive: bytes) -> None:
        super().__init__(fileobj=io.BytesIO(archive), mode="rb")
        self._left = PACKAGE_MAX_BYTES + MAX_MEMBERS * 2 * tarfile.BLOCKSIZE

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(min(self._left + 1, _CHUNK if size is None or size < 0 else size))
        self._left -= len(content)
        if self._left < 0:
            raise SkillProblem(f"the archive holds more than {PACKAGE_MAX_BYTES} bytes")
        return content


def _package(files: dict[str, bytes]) -> SkillPackage:
    root = _root_of(files)
    inner = {path.removeprefix(root): content for path, content in files.items() if path.startswith(root)}
    try:
        skill_md = inner.pop(MANIFEST).decode()
    except UnicodeDecodeError:
        raise SkillProblem(f"{MANIFEST} is not UTF-8 text") from None
    directories = {directory.lstrip("/") for path in inner for directory in parents(f"/{path}")}
    if clash := next((path for path in inner if path in directories), None):
        raise SkillProblem(f"the archive holds {shown(clash)} both as a file and as a directory")
    return SkillPackage(
        skill_md=skill_md,
        manifest=read_skill_md(skill_md),
        files=tuple(SkillFile(path=path, content=content) for path, content in sorted(inner.items())),
    )


def _root_of(files: dict[str, bytes]) -> str:
    """Empty, or the one directory everything is in with a slash."""
    if MANIFEST in files:
        return ""
    roots = [path.removesuffix(MANIFEST) for path in files if path.count("/") == 1 and path.endswith(f"/{MANIFEST}")]
    if len(roots) != 1:
        raise SkillProblem(f"the archive must hold one {MANIFEST}, in its root or in its only directory")
    if outside := next((path for path in files if not path.startswith(roots[0])), None):
        raise SkillProblem(f"the archive holds {shown(outside)} outside of the skill's directory")
    return roots[0]


def _cause(error: Exception) -> str:
    return "it is encrypted" if "encrypted" in str(error) else "it is damaged, or packed in a way that is not supported"
