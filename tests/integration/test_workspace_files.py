"""The files of a workspace in PostgreSQL: contents, kinds, protection, limits, searching, and writers that race."""

from __future__ import annotations

import asyncio
import hashlib
import time
import unicodedata
from collections.abc import Awaitable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db import workspace_changes, workspace_search
from db.database import Database
from db.workspace_files import DatabaseFiles
from domain import limits
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.limits import FILE_MAX_BYTES, GREP_LINE_MAX_CHARACTERS, GREP_MAX_MATCHES
from domain.workspace import (
    PATH_MAX_BYTES,
    BadPath,
    BadPattern,
    DirectoryNotEmpty,
    FileConflict,
    FileExists,
    FileMatch,
    FileMissing,
    FileProblem,
    FileReadOnly,
    FileTooLarge,
    NotThatKind,
    WorkspaceFiles,
    normal_path,
)
from infra.text_patterns import compile_glob

T = TypeVar("T")

DEADLINE_SECONDS = 60


async def new_workspace(database: Database) -> DatabaseFiles:
    key = uuid7()
    await database.pool.execute(
        "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, 'test')", key, DEFAULT_ORG_ID
    )
    return DatabaseFiles.of_workspace(database.pool, format_id(Prefix.WORKSPACE, key))


@pytest.fixture
async def files(database: Database) -> DatabaseFiles:
    return await new_workspace(database)


async def paths(files: DatabaseFiles, path: str = "/") -> list[str]:
    return [entry.path for entry in await files.list(path, recursive=True)]


async def blob_count(database: Database) -> int:
    return await database.pool.fetchval("SELECT count(*) FROM workspace_blobs")


async def check_usage(database: Database) -> None:
    """What the limits are checked against is what there is."""
    wrong = await database.pool.fetch(
        """SELECT workspace_id FROM workspace_usage u LEFT JOIN workspace_entries e USING (workspace_id)
           GROUP BY workspace_id, u.size_bytes, u.entry_count
           HAVING u.size_bytes <> coalesce(sum(e.size_bytes), 0) OR u.entry_count <> count(e.id)"""
    )
    assert not wrong


async def within_deadline(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, DEADLINE_SECONDS)


# --- reading and writing --------------------------------------------------------------------------------------------------


def test_it_serves_the_port(files: DatabaseFiles) -> None:
    port: WorkspaceFiles = files
    assert port is files


@pytest.mark.parametrize(
    "content",
    [b"", b"text\n", "Ж 日本 🦉\r\n".encode(), b"\0\xff\xfe\x80" * 100, bytes(range(256)), b"a\0b"],
    ids=["empty", "text", "unicode", "binary", "every byte", "nul in text"],
)
async def test_content_comes_back_byte_for_byte(files: DatabaseFiles, content: bytes) -> None:
    entry, created = await files.write("/a/b/file.bin", content)
    assert created
    assert entry.size_bytes == len(content)
    assert entry.content_hash == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert await files.read("a/b/file.bin") == (entry, content)
    assert await paths(files) == ["/a", "/a/b", "/a/b/file.bin"]


async def test_a_file_keeps_its_id_when_it_is_replaced(files: DatabaseFiles) -> None:
    first, _ = await files.write("/a", b"one")
    second, created = await files.write("/workspace/a", b"two")
    assert not created
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert (await files.read("/a"))[1] == b"two"


async def test_listing_shows_children_or_everything_below_in_the_order_of_paths(files: DatabaseFiles) -> None:
    for path in ("/b/x", "/b-c", "/b.txt", "/b/y/z", "/a", "/b0"):
        await files.write(path, b"")
    assert [entry.path for entry in await files.list()] == ["/a", "/b", "/b-c", "/b.txt", "/b0"]
    assert [entry.path for entry in await files.list("/b")] == ["/b/x", "/b/y"]
    assert await paths(files, "/workspace/b/") == ["/b/x", "/b/y", "/b/y/z"]
    assert [entry.name for entry in await files.list("/b")] == ["x", "y"]


async def test_wildcards_of_sql_are_ordinary_characters_of_names(files: DatabaseFiles) -> None:
    for path in ("/%/a", "/b/a", "/_x/a", "/xx/a", "/\\/a"):
        await files.write(path, b"")
    assert await paths(files, "/%") == ["/%/a"]
    assert await paths(files, "/_x") == ["/_x/a"]
    assert await files.delete("/\\", recursive=True)
    assert await files.delete("/%", recursive=True)
    assert await paths(files) == ["/_x", "/_x/a", "/b", "/b/a", "/xx", "/xx/a"]


async def test_the_root_is_a_directory_that_cannot_be_changed(files: DatabaseFiles) -> None:
    root = await files.stat("/")
    assert root is not None
    assert root.is_directory
    assert await files.list() == []
    with pytest.raises(BadPath):
        await files.delete("/workspace", recursive=True)
    with pytest.raises(BadPath):
        await files.write("", b"")
    with pytest.raises(BadPath):
        await files.move("/", "/a")
    with pytest.raises(NotThatKind):
        await files.read("/")


async def test_what_is_not_there(files: DatabaseFiles, database: Database) -> None:
    assert await files.stat("/nothing") is None
    assert not await files.delete("/nothing")
    for call in (
        files.read("/nothing"),
        files.list("/nothing"),
        files.move("/nothing", "/b"),
        files.copy("/nothing", "/b"),
        files.grep("x", path="/nothing"),
        files.write("/nothing", b"", expected_hash="sha256:00"),
        files.write("/nothing", b"", update_only=True),
        files.set_readonly("/nothing", is_readonly=True),
        DatabaseFiles.of_session(database.pool, format_id(Prefix.SESSION, uuid7())).list(),
    ):
        with pytest.raises(FileMissing):
            await call
    assert await paths(files) == []


# --- paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("a", "/a"),
        ("/a", "/a"),
        ("./a/./b/", "/a/b"),
        ("/workspace/a", "/a"),
        ("workspace/a", "/a"),
        ("/workspace", "/"),
        ("/workspace/", "/"),
        ("/workspaces", "/workspaces"),
        ("", "/"),
        (".", "/"),
        ("/", "/"),
        ("/a/workspace", "/a/workspace"),
        ("/a/_/b", "/a/_/b"),
        ("/__init__.py", "/__init__.py"),
        ("/ a ", "/ a "),
        ("/...", "/..."),
        ("/a\\..\\b", "/a\\..\\b"),
        ("/%2e%2e/a", "/%2e%2e/a"),
        ("/👩‍💻.txt", "/👩‍💻.txt"),
    ],
)
def test_a_path_has_one_spelling(path: str, normal: str) -> None:
    assert normal_path(path) == normal


@pytest.mark.parametrize(
    "path",
    [
        *(
            "..",
            "../a",
            "/..",
            "/a/..",
            "/a/../b",
            "a/../../b",
            "/workspace/../a",
            "./..",
            "//",
            "//a",
            "/a//b",
            "/a//",
            "///",
        ),
        *("/a\0b", "/a\nb", "/\x7f", "/\x85", "/\u2028", "/a\u202eb", "/\u2066", "/\ud800", "/\x1b[31m"),
        *("/_", "/_/move", "_/move", "/workspace/_/x", "./_/x", "/workspace/workspace", "/workspace/workspace/a"),
        *("/" + "x" * 256, "/" + "é" * 128, "/" + "a/" * 600, "x" * 1_000_000),
    ],
)
def test_a_path_that_could_mean_something_else_is_refused(path: str) -> None:
    with pytest.raises(BadPath) as refused:
        normal_path(path)
    assert len(str(refused.value)) < 400
    assert str(refused.value).isprintable()
    str(refused.value).encode()


def test_the_longest_paths_are_measured_in_bytes_of_their_normal_form() -> None:
    at_limit = "/" + "/".join(["x" * 255] * 3 + ["y" * 255])
    assert len(at_limit) == PATH_MAX_BYTES
    assert normal_path(f"/workspace{at_limit}") == at_limit
    with pytest.raises(BadPath):
        normal_path(at_limit + "/z")
    decomposed = unicodedata.normalize("NFD", "/" + "é" * 127)
    assert len(normal_path(decomposed).encode()) == 255


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["..", ".", "", "/", "_", "workspace", "a", "e\u0301"])).map("/".join)
)
def test_a_normal_path_is_its_own_normal_form_and_stays_inside(path: str) -> None:
    try:
        normal = normal_path(path)
    except BadPath:
        return
    assert normal_path(normal) == normal
    assert normal.startswith("/")
    assert not {"..", ".", ""} & set(normal.split("/")[1:]) or normal == "/"
    assert unicodedata.is_normalized("NFC", normal)


# --- names ----------------------------------------------------------------------------------------------------------------


async def test_two_spellings_of_one_name_are_one_file(files: DatabaseFiles) -> None:
    composed, decomposed = "/caf\u00e9", unicodedata.normalize("NFD", "/caf\u00e9")
    assert composed != decomposed
    first, _ = await files.write(composed, b"one")
    second, created = await files.write(decomposed, b"two")
    assert not created
    assert second.id == first.id
    assert second.path == composed
    with pytest.raises(FileExists):
        await files.write(decomposed, b"", create_only=True)


async def test_names_differ_by_case_and_look_alikes_are_other_names(files: DatabaseFiles) -> None:
    names = ["/a", "/A", "/а", "/ａ", "/．．", "/a／b", "/a∕b", "/..​"]
    for name in names:
        await files.write(name, name.encode(), create_only=True)
    assert sorted(await paths(files)) == sorted(names)
    for name in names:
        assert (await files.read(name))[1] == name.encode()


# --- kinds ----------------------------------------------------------------------------------------------------------------


async def test_a_file_is_no_directory_and_a_directory_no_file(files: DatabaseFiles) -> None:
    await files.write("/file", b"x")
    await files.make_directory("/dir/inner")
    for call in (
        files.write("/dir", b""),
        files.write("/file/below", b""),
        files.write("/file/deep/below", b""),
        files.make_directory("/file/below"),
        files.move("/dir", "/file/below"),
        files.copy("/dir", "/file/below"),
        files.read("/dir"),
        files.list("/file"),
        files.apply({"/a": b"", "/a/b": b""}, []),
    ):
        with pytest.raises(NotThatKind):
            await call
    with pytest.raises(FileExists):
        await files.make_directory("/dir")
    with pytest.raises(FileExists):
        await files.make_directory("/file")
    assert await paths(files) == ["/dir", "/dir/inner", "/file"]


async def test_a_directory_that_is_not_empty_is_deleted_only_with_what_is_in_it(files: DatabaseFiles) -> None:
    await files.write("/dir/a/b", b"x")
    await files.write("/dir-2", b"x")
    with pytest.raises(DirectoryNotEmpty):
        await files.delete("/dir")
    assert await files.delete("/dir", recursive=True)
    assert await paths(files) == ["/dir-2"]
    await files.make_directory("/empty")
    assert await files.delete("/empty")


# --- moving and copying -------------------------------------------------------------------------------------------------------


async def test_a_directory_moves_with_everything_in_it(files: DatabaseFiles, database: Database) -> None:
    await files.write("/from/é/b.txt", b"b")
    await files.write("/from-other", b"stays")
    moved = await files.move("/from", "/to/here")
    assert (moved.path, moved.is_directory) == ("/to/here", True)
    assert await paths(files) == ["/from-other", "/to", "/to/here", "/to/here/é", "/to/here/é/b.txt"]
    assert (await files.read("/to/here/é/b.txt"))[1] == b"b"
    await check_usage(database)


@pytest.mark.parametrize("target", ["/a", "/a/b", "/a/b/c", "/a/file/new"])
@pytest.mark.parametrize("way", ["move", "copy"])
async def test_nothing_goes_into_itself(files: DatabaseFiles, target: str, way: str) -> None:
    await files.write("/a/file", b"x")
    before = await files.list(recursive=True)
    with pytest.raises(BadPath):
        await getattr(files, way)("/a", target)
    assert await files.list(recursive=True) == before


@pytest.mark.parametrize("way", ["move", "copy"])
async def test_a_target_must_be_free_and_fit(files: DatabaseFiles, way: str) -> None:
    await files.write("/a/" + "x" * 200, b"")
    await files.write("/b", b"")
    await files.make_directory("/a2")
    for target in ("/b", "/a2"):
        with pytest.raises(FileExists):
            await getattr(files, way)("/a", target)
    long = "/" + "/".join(["y" * 200] * 4)
    assert len(long) + 201 < PATH_MAX_BYTES
    await getattr(files, way)("/a", long)
    with pytest.raises(BadPath):
        await getattr(files, way)(long, long.replace("y", "z") + "/" + "z" * 100)


async def test_copies_share_content_and_are_files_of_their_own(files: DatabaseFiles, database: Database) -> None:
    content = b"shared" * 1000
    original, _ = await files.write("/dir/a", content, is_readonly=True)
    copied = await files.copy("/dir", "/copies/one")
    assert copied.is_directory
    entry, read = await files.read("/copies/one/a")
    assert read == content
    assert entry.id != original.id
    assert not entry.is_readonly
    other = await new_workspace(database)
    await other.write("/elsewhere", content)
    assert await blob_count(database) == 1
    await files.write("/copies/one/a", b"changed")
    assert (await files.read("/dir/a"))[1] == content
    await check_usage(database)


async def test_content_goes_with_the_last_file_and_the_last_former_version_that_have_it(
    files: DatabaseFiles, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.write("/kept", b"kept for forks and rewinds")
    await files.delete("/kept")
    assert await blob_count(database) == 1
    monkeypatch.setattr("db.workspace_changes.WORKSPACE_HISTORY_MAX_BYTES", 0)
    other = await new_workspace(database)
    await files.write("/a", b"content")
    await other.write("/b", b"content")
    await files.write("/a", b"another")
    assert await blob_count(database) == 2
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_history") == 0
    assert (await other.read("/b"))[1] == b"content"
    await other.delete("/b")
    assert await blob_count(database) == 1
    await files.write("/a", b"another")
    assert (await files.read("/a"))[1] == b"another"
    await files.delete("/a")
    assert await blob_count(database) == 0


# --- protection -------------------------------------------------------------------------------------------------------------


async def test_a_read_only_file_cannot_be_written_moved_or_deleted(files: DatabaseFiles) -> None:
    await files.write("/dir/locked", b"x", is_readonly=True)
    for call in (
        files.write("/dir/locked", b"y"),
        files.write("/dir/locked", b"y", is_readonly=False),
        files.delete("/dir/locked"),
        files.delete("/dir", recursive=True),
        files.move("/dir/locked", "/b"),
        files.move("/dir", "/b"),
        files.apply({"/new": b"", "/dir/locked": b""}, []),
        files.apply({"/new": b""}, ["/dir"]),
    ):
        with pytest.raises(FileReadOnly, match="/dir/locked"):
            await call
    assert await paths(files) == ["/dir", "/dir/locked"]
    await files.set_readonly("/dir/locked", is_readonly=False)
    await files.write("/dir/locked", b"y")


async def test_a_read_only_directory_protects_everything_in_it(files: DatabaseFiles) -> None:
    await files.write("/dir/a/file", b"x")
    await files.write("/outside", b"x")
    assert (await files.set_readonly("/dir", is_readonly=True)).is_readonly
    for call in (
        files.write("/dir/new", b""),
        files.write("/dir/a/file", b""),
        files.write("/dir/a/deep/new", b""),
        files.make_directory("/dir/a/new"),
        files.delete("/dir/a/file"),
        files.delete("/dir", recursive=True),
        files.move("/dir/a/file", "/b"),
        files.move("/dir", "/b"),
        files.move("/outside", "/dir/outside"),
        files.copy("/outside", "/dir/outside"),
        files.apply({"/dir/a/file": b""}, []),
        files.apply({}, ["/dir/a"]),
    ):
        with pytest.raises(FileReadOnly, match="`/dir`"):
            await call
    assert (await files.make_directory("/born", is_readonly=True)).is_readonly
    copied = await files.copy("/dir", "/copy")
    assert not copied.is_readonly
    await files.write("/copy/a/file", b"y")


# --- hashes -----------------------------------------------------------------------------------------------------------------


async def test_only_what_the_caller_has_seen_is_replaced(files: DatabaseFiles) -> None:
    seen, _ = await files.write("/a", b"one")
    await files.write("/a", b"two", expected_hash=seen.content_hash)
    with pytest.raises(FileConflict, match="sha256:"):
        await files.write("/a", b"three", expected_hash=seen.content_hash)
    assert (await files.read("/a"))[1] == b"two"


async def test_of_writers_that_saw_the_same_file_one_wins(files: DatabaseFiles) -> None:
    seen, _ = await files.write("/a", b"start")

    async def edit(number: int) -> int | None:
        try:
            await files.write("/a", str(number).encode(), expected_hash=seen.content_hash)
        except FileConflict:
            return None
        return number

    results = await within_deadline(asyncio.gather(*(edit(number) for number in range(12))))
    (winner,) = [number for number in results if number is not None]
    assert (await files.read("/a"))[1] == str(winner).encode()


async def test_of_writers_that_create_the_same_file_one_does(files: DatabaseFiles, database: Database) -> None:
    async def create(number: int) -> bool:
        try:
            return (await files.write("/deep/in/a", str(number).encode(), create_only=True))[1]
        except FileExists:
            return False

    assert sum(await within_deadline(asyncio.gather(*(create(number) for number in range(12))))) == 1
    assert await blob_count(database) == 1
    await check_usage(database)


# --- many at once -----------------------------------------------------------------------------------------------------------


async def test_apply_deletes_and_writes_as_one(files: DatabaseFiles, database: Database) -> None:
    await files.write("/old/a", b"a")
    await files.write("/old/b", b"b")
    await files.write("/kind", b"a file")
    await files.make_directory("/was-dir/inner")
    entries = await files.apply(
        {"/new/x": b"x", "/kind/y": b"y", "/was-dir": b"a file now"}, ["/old/a", "/kind", "/was-dir", "/gone", "/old/a"]
    )
    assert [entry.path for entry in entries] == ["/new/x", "/kind/y", "/was-dir"]
    assert await paths(files) == ["/kind", "/kind/y", "/new", "/new/x", "/old", "/old/b", "/was-dir"]
    await check_usage(database)


@pytest.mark.parametrize(
    "bad", [{"/dir": b""}, {"/ok": b"x" * (FILE_MAX_BYTES + 1)}, {"/locked": b""}, {"/a/../b": b""}]
)
async def test_apply_does_nothing_when_it_cannot_do_all(
    files: DatabaseFiles, database: Database, bad: dict[str, bytes]
) -> None:
    await files.make_directory("/dir")
    await files.write("/locked", b"x", is_readonly=True)
    await files.write("/keep", b"x")
    before = await files.list(recursive=True)
    with pytest.raises(FileProblem):
        await files.apply({"/first": b"1", **bad, "/last": b"2"}, ["/keep"])
    assert await files.list(recursive=True) == before
    assert await blob_count(database) == 1
    await check_usage(database)


async def test_nothing_to_apply_is_fine(files: DatabaseFiles) -> None:
    assert await files.apply({}, []) == []
    assert await files.apply({}, ["/nothing"]) == []


# --- limits -----------------------------------------------------------------------------------------------------------------


async def test_a_file_at_the_limit_is_stored_and_one_byte_more_is_not(files: DatabaseFiles) -> None:
    await files.write("/limit", b"x" * FILE_MAX_BYTES)
    with pytest.raises(FileTooLarge, match="a file may have"):
        await files.write("/more", b"x" * (FILE_MAX_BYTES + 1))
    assert await paths(files) == ["/limit"]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_BYTES", 1000)
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_ENTRIES", 10)


@pytest.mark.usefixtures("small_limits")
async def test_a_workspace_holds_no_more_bytes_than_allowed(files: DatabaseFiles, database: Database) -> None:
    await files.write("/a", b"x" * 600)
    with pytest.raises(FileTooLarge, match="the workspace would hold"):
        await files.write("/b", b"x" * 401)
    with pytest.raises(FileTooLarge):
        await files.copy("/a", "/b")
    await files.write("/a", b"y" * 1000)
    await files.move("/a", "/c")
    await files.apply({"/b": b"x" * 999}, ["/c"])
    await files.write("/d", b"1")
    assert await paths(files) == ["/b", "/d"]
    await check_usage(database)


@pytest.mark.usefixtures("small_limits")
async def test_a_full_workspace_can_be_emptied_and_its_files_made_smaller(
    files: DatabaseFiles, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.write("/a", b"x" * 900)
    await files.write("/b", b"x" * 50)
    monkeypatch.setattr(workspace_changes, "WORKSPACE_MAX_BYTES", 100)
    await files.write("/a", b"x" * 800)
    await files.move("/a", "/c")
    assert await files.delete("/c")
    await check_usage(database)


@pytest.mark.usefixtures("small_limits")
async def test_a_workspace_holds_no_more_entries_than_allowed(files: DatabaseFiles, database: Database) -> None:
    for number in range(9):
        await files.write(f"/{number}", b"")
    with pytest.raises(FileTooLarge, match="files and directories"):
        await files.write("/dir/file", b"")
    with pytest.raises(FileTooLarge):
        await files.move("/0", "/dir/inner/0")
    await files.move("/0", "/dir/0")
    with pytest.raises(FileTooLarge):
        await files.make_directory("/one-more")
    with pytest.raises(FileTooLarge):
        await files.copy("/1", "/dir/1")
    await check_usage(database)


@pytest.mark.usefixtures("small_limits")
async def test_writers_that_race_do_not_exceed_the_limit_together(files: DatabaseFiles, database: Database) -> None:
    async def write(number: int) -> bool:
        try:
            await files.write(f"/{number}", b"x" * 199)
        except FileTooLarge:
            return False
        return True

    assert sum(await within_deadline(asyncio.gather(*(write(number) for number in range(20))))) == 5
    assert len(await files.list()) == 5
    await check_usage(database)


async def test_ten_thousand_files_are_written_listed_searched_copied_and_deleted(
    files: DatabaseFiles, database: Database
) -> None:
    many = {f"/d{number % 10}/file-{number}": b"x%d\n" % number for number in range(4990)}
    assert len(await within_deadline(files.apply(many, []))) == 4990
    assert len(await paths(files)) == 5000
    await files.move("/d0", "/all/d0")
    assert len(await paths(files, "/all/d0")) == 499
    assert [match.path for match in await within_deadline(files.grep("^x4321$"))] == ["/d1/file-4321"]
    for number in range(1, 10):
        await files.copy(f"/d{number}", f"/copy/d{number}")
    await files.apply({f"/rest/{number}": b"" for number in range(497)}, [])
    assert len(await paths(files)) == limits.WORKSPACE_MAX_ENTRIES
    with pytest.raises(FileTooLarge):
        await files.write("/one-too-many", b"")
    await within_deadline(files.apply({}, [*many, "/copy", "/all", "/rest"]))
    assert await paths(files) == [f"/d{number}" for number in range(1, 10)]
    await check_usage(database)


async def test_writers_of_the_same_contents_in_many_workspaces_do_not_lock_each_other_out(database: Database) -> None:
    """Content appears and goes while others want it, in every order."""
    workspaces = [await new_workspace(database) for _ in range(4)]
    contents = [b"one", b"two", b"three", b"four"]

    async def work(files: DatabaseFiles, shift: int) -> None:
        for turn in range(15):
            first, second = contents[(turn + shift) % 4], contents[(turn * 3 + shift) % 4]
            await files.apply({"/a": first, "/b": second}, ["/c"])
            await files.apply({"/c": second}, ["/a", "/b"])

    await within_deadline(asyncio.gather(*(work(files, shift) for shift, files in enumerate(workspaces))))
    for files in workspaces:
        assert (await files.read("/c"))[1] in contents
        await files.delete("/c")
    await check_usage(database)


# --- searching --------------------------------------------------------------------------------------------------------------


def found(matches: list[FileMatch]) -> list[tuple[str, int, str]]:
    return [(one.path, one.line_number, one.line) for one in matches]


async def test_grep_finds_lines_in_text_files_only(files: DatabaseFiles) -> None:
    await files.write("/a.txt", "ein Käse\r\nnoch einer\nKäse zum Schluss".encode())
    await files.write("/dir/b.md", b"needle\n\nno\n")
    await files.write("/binary", b"needle\0needle")
    await files.write("/latin", b"needle \xe4")
    assert found(await files.grep("K.se")) == [("/a.txt", 1, "ein Käse"), ("/a.txt", 3, "Käse zum Schluss")]
    assert found(await files.grep("needle")) == [("/dir/b.md", 1, "needle")]
    assert found(await files.grep("^$", path="/dir")) == [("/dir/b.md", 2, "")]
    assert found(await files.grep("(?i)NEEDLE", path="/dir/b.md")) == [("/dir/b.md", 1, "needle")]
    assert await files.grep("needle\n\nno") == []
    assert await files.grep("needle", path_pattern="*.txt") == []
    assert len(await files.grep("needle", path_pattern="/workspace/dir/*.md")) == 1


async def test_what_grep_finds_is_bounded(files: DatabaseFiles) -> None:
    await files.write("/many", b"x\n" * (GREP_MAX_MATCHES + 500))
    await files.write("/long", b"x" * 1_000_000 + b"\nx")
    matches = await files.grep("x")
    assert len(matches) == GREP_MAX_MATCHES
    assert len(matches[0].line) == GREP_LINE_MAX_CHARACTERS
    assert matches[1].line_number == 2


@pytest.mark.parametrize(
    "pattern", ["(", "a{1001}", "(?=a)", r"(a)\1", "", "x" * 2000, "\ud800", "((a{900}){900}){900}"]
)
async def test_an_expression_that_cannot_be_used_is_refused(files: DatabaseFiles, pattern: str) -> None:
    await files.write("/a", b"aa")
    with pytest.raises(BadPattern):
        await files.grep(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$b", r"(a|aa)+b", r"(a*)*b", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*a){20}z", r"(a?){300}a{300}b"]
)
async def test_expressions_that_explode_elsewhere_take_no_time(files: DatabaseFiles, pattern: str) -> None:
    await files.write("/a", (b"a" * 100_000 + b"\n") * 20)
    started = time.monotonic()
    assert await within_deadline(files.grep(pattern)) == []
    assert time.monotonic() - started < 10


async def test_the_slowest_expression_ends_at_the_deadline_and_holds_up_nobody(
    files: DatabaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its automaton has more states than memory, so RE2 goes on without one: linear still, but slow."""
    monkeypatch.setattr(workspace_search, "GREP_MAX_SECONDS", 0.5)
    digits = bytes(b"ab"[byte & 1] for byte in hashlib.shake_256(b"seed").digest(4_000_000))
    await files.write("/a", digits)
    await files.write("/b", b"\n".join(digits[at : at + 1000] for at in range(0, len(digits), 1000)))
    search = asyncio.create_task(files.grep("[ab]*a[ab]{300}c"))
    other = 0
    while not search.done():
        assert await files.stat("/a") is not None
        other += 1
    with pytest.raises(BadPattern, match="took longer"):
        await within_deadline(search)
    assert other > 5


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("*.py", "/a/b.py", True),
        ("/*.py", "/a/b.py", False),
        ("/*.py", "/b.py", True),
        ("a/*.py", "/a/c/b.py", False),
        ("**/b.py", "/b.py", True),
        ("**/b.py", "/a/c/b.py", True),
        ("a/**", "/a/b/c", True),
        ("a/**/c", "/a/c", True),
        ("{x,b}.py", "/a/b.py", True),
        ("[!b].py", "/b.py", False),
        ("[a-c].py", "/b.py", True),
        ("?.py", "/é.py", True),
        ("*.PY", "/b.py", False),
        ("caf\u0065\u0301", "/caf\u00e9", True),
        ("a.b", "/axb", False),
        ("(a|b)", "/a", False),
        ("[", "/[", True),
    ],
)
def test_globs(glob: str, path: str, expected: bool) -> None:
    assert compile_glob(glob)(path) is expected


def test_globs_that_explode_elsewhere_take_no_time() -> None:
    started = time.monotonic()
    assert not compile_glob("*a" * 200 + "b")("/" + "a" * 250)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("glob", ["", "{{a}", "x" * 1001])
def test_a_glob_that_cannot_be_used_is_refused(glob: str) -> None:
    with pytest.raises(BadPattern):
        compile_glob(glob)
