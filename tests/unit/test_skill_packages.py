"""Skills as they arrive: what a SKILL.md may say, and what an archive must not do."""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import tarfile
import time
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.skills import SkillProblem
from infra.skill_packages import PACKAGE_MAX_BYTES, read_archive, read_skill_md

GOOD = "---\nname: pdf-forms\ndescription: Fills in PDF forms.\n---\n\n# How\n\nDo it.\n"


def zipped(*files: tuple[str, bytes | str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def skill_md(**fields: str) -> str:
    lines = {"name": "pdf-forms", "description": "Fills in PDF forms.", **fields}
    return "---\n" + "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in lines.items()) + "---\nDo it.\n"


# SKILL.md


def test_a_manifest_is_read_with_every_field():
    text = skill_md(
        license="MIT",
        compatibility="Needs Python",
        allowed_tools="[bash, read_file]",
        metadata="{author: me, version: 2.1, day: 2026-01-01}",
        disable_model_invocation="true",
        user_invocable="false",
    )
    read = read_skill_md(text)
    assert (read.name, read.description, read.body) == ("pdf-forms", "Fills in PDF forms.", "Do it.")
    assert (read.license, read.compatibility, read.allowed_tools) == ("MIT", "Needs Python", "bash, read_file")
    assert read.metadata == {"author": "me", "version": 2.1, "day": "2026-01-01"}
    assert (read.version, read.disable_model_invocation, read.user_invocable) == ("2.1", True, False)
    assert read.warnings == ()


def test_the_body_is_what_stands_below_the_front_matter_to_the_character():
    assert read_skill_md(GOOD).body == "# How\n\nDo it."
    assert read_skill_md(GOOD.replace("\n", "\r\n")).body == "# How\r\n\r\nDo it."
    assert "---" in read_skill_md(GOOD + "\n---\nmore\n").body


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(SkillProblem) as refused:
        read_skill_md("---\nname: Not A Slug\ndescription: ''\nlicense: [1]\n---\n")
    assert len(refused.value.problems) == 3
    assert all(
        any(f"`{field}`" in one for one in refused.value.problems) for field in ("name", "description", "license")
    )


def test_a_skill_in_a_directory_has_the_directorys_name():
    assert read_skill_md(GOOD, directory="pdf-forms").name == "pdf-forms"
    with pytest.raises(SkillProblem, match="`other`"):
        read_skill_md(GOOD, directory="other")


def test_what_is_unusual_is_a_warning():
    warnings = read_skill_md("---\nname: a\ndescription: b\nauthor: me\n---\n").warnings
    assert any("no instructions" in one for one in warnings)
    assert any("`author`" in one for one in warnings)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no front matter"),
        ("# A title", "no front matter"),
        ("---\nname: a\n", "no end"),
        ("---\n- a\n---\n", "fields"),
        ("---\n1: a\n---\n", "fields"),
        ("---\nname: [\n---\n", "line"),
        (f"---\n{ALIASES}---\n", "aliases"),
        ("---\nname: !!python/object/apply:os.system ['true']\n---\n", "tags"),
        ("---\nname: !!binary aGFsbG8=\n---\n", "tags"),
        ("---\nmetadata: " + "[" * 5000 + "]" * 5000 + "\n---\n", "deep"),
        ("---\nmetadata: {a: .nan}\nname: a\ndescription: " + "d" * 2_000_000 + "\n---\n", "bytes|characters"),
        ("---\nname: a\ndescription: " + "d" * 2_000 + "\n---\n", "1024"),
        ("---\nname: 1_000_000\ndescription: [a]\n---\n", "must be text"),
        ("---\nname: \u0430bc\ndescription: Cyrillic look-alike\n---\n", "lower-case"),
        ("---\nname: a\x00b\ndescription: b\n---\n", "UTF-8"),
        ("---\nname: a\ndescription: \ud800\n---\n", "UTF-8"),
        ("---\nname: a\ndescription: b\nmetadata: {x: " + "y" * 20_000 + "}\n---\n", "metadata"),
    ],
)
def test_a_hostile_or_broken_manifest_is_refused_with_a_reason(text: str, why: str):
    with pytest.raises(SkillProblem, match=why):
        read_skill_md(text)


def test_a_description_becomes_one_line_without_invisible_characters():
    read = read_skill_md('---\nname: a\ndescription: "one\\n\\n## Heading\\e[31m\\u202e two"\n---\nx')
    assert read.description == "one ## Heading [31m two"


@given(st.text(max_size=300))
def test_no_text_does_anything_but_be_read_or_refused(text: str):
    for candidate in (text, f"---\n{text}\n---\n", f"---\nname: a\ndescription: {text}\n---\n{text}"):
        try:
            read = read_skill_md(candidate)
        except SkillProblem:
            continue
        assert read.description.isprintable()


# Archives


@pytest.mark.parametrize("prefix", ["", "pdf-forms/", "./"])
def test_an_archive_is_read_with_its_files(prefix: str):
    package = read_archive(
        zipped((f"{prefix}SKILL.md", GOOD), (f"{prefix}scripts/run.sh", "#!"), (f"{prefix}a.bin", b"\xff"))
    )
    assert package.manifest.name == "pdf-forms"
    assert [(file.path, file.content) for file in package.files] == [("a.bin", b"\xff"), ("scripts/run.sh", b"#!")]


def test_a_tar_is_read_and_what_packers_add_is_left_out():
    package = read_archive(
        tarred(
            (tarfile.TarInfo("x/SKILL.md"), GOOD.encode()),
            (tarfile.TarInfo("x/.DS_Store"), b"junk"),
            (tarfile.TarInfo("__MACOSX/x"), b"junk"),
            (tarfile.TarInfo("x/Über.md"), b"text"),
        )
    )
    assert [file.path for file in package.files] == ["Über.md"]


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/../../evil", "C:/evil", "..\\evil", "a//b", "a\nb", "x" * 300, "..", "a/../SKILL.md"],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leads_elsewhere_is_refused(name: str, kind: str):
    files = (("SKILL.md", GOOD.encode()), (name, b"x"))
    archive = zipped(*files) if kind == "zip" else tarred(*((tarfile.TarInfo(path), data) for path, data in files))
    with pytest.raises(SkillProblem, match="path"):
        read_archive(archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = kind, "/etc/passwd"
    with pytest.raises(SkillProblem, match="link"):
        read_archive(tarred((tarfile.TarInfo("SKILL.md"), GOOD.encode()), (link, b"")))


def test_a_link_in_a_zip_is_refused():
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("SKILL.md", GOOD)
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SkillProblem, match="link"):
        read_archive(packed.getvalue())


@pytest.mark.parametrize("where", ["big.bin", "__MACOSX/big.bin"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str, where: str):
    zeros = bytes(200 * 1024 * 1024)
    files = (("SKILL.md", GOOD.encode()), (where, zeros))
    archive = zipped(*files) if kind == "zip" else tarred(*((tarfile.TarInfo(path), data) for path, data in files))
    assert len(archive) < PACKAGE_MAX_BYTES
    started = time.process_time()
    if (kind, where) == ("zip", "__MACOSX/big.bin"):
        read_archive(archive)  # never looked into
    else:
        with pytest.raises(SkillProblem, match="more than"):
            read_archive(archive)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((("readme.md", "x"),), "must hold one SKILL.md"),
        ((("a/SKILL.md", GOOD), ("b/SKILL.md", GOOD)), "must hold one SKILL.md"),
        ((("a/SKILL.md", GOOD), ("b/x", "")), "outside"),
        ((("a/b/SKILL.md", GOOD),), "must hold one SKILL.md"),
        ((("SKILL.md", GOOD), ("skill.MD", "x")), "twice"),
        ((("SKILL.md", GOOD), ("a", "x"), ("a/b", "x")), "both"),
        ((("SKILL.md", b"\xff\xfe"),), "UTF-8"),
        ((("SKILL.md", "---\nname: a\n---\n"),), "description"),
        ((("SKILL.md", GOOD), *((f"f{n}", "") for n in range(250))), "200 files"),
        ((("SKILL.md", GOOD), *((f"d{n}/", "") for n in range(1100))), "1000 entries"),
    ],
)
def test_an_archive_that_is_no_skill_is_refused_with_the_reason(files: tuple[tuple[str, bytes | str], ...], why: str):
    with pytest.raises(SkillProblem, match=why):
        read_archive(zipped(*files))


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        b"hello",
        b"PK\x03\x04",
        b"PK" + bytes(1000),
        b"\x1f\x8b",
        gzip.compress(b"no tar"),
        gzip.compress(bytes(2048)),
        zipped(("SKILL.md", GOOD))[:-30],
        zipped(("SKILL.md", GOOD * 50)).replace(b"\x02", b"\x09"),
        tarred((tarfile.TarInfo("SKILL.md"), GOOD.encode()))[:60],
    ],
    ids=[
        "empty",
        "text",
        "zip-start",
        "zip-zeros",
        "gzip-start",
        "no-tar",
        "zeros",
        "zip-cut",
        "zip-broken",
        "tar-cut",
    ],
)
def test_damaged_archives_are_refused(archive: bytes):
    with pytest.raises(SkillProblem):
        read_archive(archive)


@given(st.integers(0, 5000), st.binary(min_size=1, max_size=8))
def test_a_zip_with_bytes_changed_is_read_or_refused(place: int, bytes_: bytes):
    archive = bytearray(zipped(("SKILL.md", GOOD), ("a.txt", "text" * 100)))
    place %= len(archive)
    archive[place : place + len(bytes_)] = bytes_
    with contextlib.suppress(SkillProblem):
        assert read_archive(bytes(archive)).manifest.name
