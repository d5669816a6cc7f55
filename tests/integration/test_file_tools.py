"""The tools of `session_file_system`, on a workspace in PostgreSQL: what a model gets to read, and what hostile calls come to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.capabilities.registry import call_tool
from activities.capabilities.session_file_system import CAPABILITY
from activities.capabilities.tool_call import MAX_RESULT_BYTES
from activities.files.arguments import Edit
from activities.files.edits import apply_edits, are_applied
from db.database import Database
from db.workspace_files import DatabaseFiles
from domain.capabilities import ToolError
from domain.events import ToolStatus
from domain.ids import DEFAULT_ORG_ID, Prefix, format_id, uuid7
from domain.limits import FILE_MAX_BYTES, GREP_MAX_MATCHES
from domain.messages import TextPart
from domain.tools import SideEffect
from domain.workspace import FileEntry
from tests.tool_context import PlainContext

TOOLS = {tool.name: tool for tool in CAPABILITY.tools}
READING = {"read_file", "read_many_files", "list_directory", "grep_files", "glob", "stat_file"}


class Workspace(PlainContext):
    """A context with a workspace, which notes the files it was told of."""

    def __init__(self, files: DatabaseFiles) -> None:
        self._files = files
        self.written: list[tuple[str, bool]] = []

    @property
    def files(self) -> DatabaseFiles:
        return self._files

    async def file_written(self, entry: FileEntry, *, created: bool) -> None:
        self.written.append((entry.path, created))

    async def call(self, name: str, /, **arguments: object) -> dict[str, Any]:
        outcome = await call_tool(TOOLS[name], self, arguments)
        assert outcome.error is None, outcome.error
        assert outcome.result is not None
        text = cast(TextPart, outcome.result[0]).text
        assert len(text.encode()) <= MAX_RESULT_BYTES
        return json.loads(text)

    async def refused(self, name: str, /, **arguments: object) -> str:
        outcome = await call_tool(TOOLS[name], self, arguments)
        assert outcome.result is None
        assert outcome.status is ToolStatus.ERROR
        assert outcome.error is not None
        assert "internal error" not in outcome.error
        return outcome.error


@pytest.fixture
async def workspace(database: Database) -> Workspace:
    key = uuid7()
    await database.pool.execute(
        "INSERT INTO workspaces (id, org_id, name) VALUES ($1, $2, 'test')", key, DEFAULT_ORG_ID
    )
    return Workspace(DatabaseFiles.of_workspace(database.pool, format_id(Prefix.WORKSPACE, key)))


def hash_of(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_tools_that_change_nothing_are_pure_and_all_others_can_run_twice() -> None:
    assert {name for name, tool in TOOLS.items() if tool.side_effect is SideEffect.PURE} == READING
    assert {tool.side_effect for name, tool in TOOLS.items() if name not in READING} == {SideEffect.IDEMPOTENT}
    assert {tool.concurrency_class for tool in TOOLS.values()} == {"session_workspace"}


# --- reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n", "a", "a\n", "a\nb", "ä\r\n日本\r\n", "\x1b[0m\ttab\u2028x\x0b\n\n"])
async def test_a_text_is_read_verbatim_with_its_hash(workspace: Workspace, content: str) -> None:
    await workspace.files.write("/a/b.txt", content.encode())
    read = await workspace.call("read_file", path="a/b.txt")
    assert read["content"] == content
    assert read["content_hash"] == hash_of(content)
    assert read["path"] == "/workspace/a/b.txt"
    assert read["total_lines"] == read["end_line"] == len(content.split("\n")) - (content[-1:] in ("", "\n"))
    assert "truncated" not in read


async def test_a_long_file_is_read_in_parts_that_join_to_the_whole(workspace: Workspace) -> None:
    content = "".join(f'{number} \\ " \x01 ж 日本\n' for number in range(7000)) + "the end, without a line break"
    await workspace.files.write("/long.txt", content.encode())
    parts, offset = [], 1
    while True:
        read = await workspace.call("read_file", path="/workspace/long.txt", offset=offset)
        parts.append(read["content"])
        assert read["start_line"] == offset
        if "truncated" not in read:
            break
        assert read["reason"] in ("line_cap", "size_cap")
        assert read["bytes_returned"] == len(read["content"].encode())
        assert read["bytes_total"] == len(content.encode())
        assert str(read["next_offset"]) in read["resume_hint"]
        offset = read["next_offset"]
    assert "".join(parts) == content
    assert len(parts) > 3


async def test_limit_gives_the_lines_asked_for_and_says_where_to_go_on(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"1\n2\n3\n4\n")
    read = await workspace.call("read_file", path="/a", offset=2, limit=2)
    assert (read["content"], read["start_line"], read["end_line"], read["next_offset"]) == ("2\n3\n", 2, 3, 4)
    assert read["reason"] == "line_cap"
    last = await workspace.call("read_file", path="/a", offset=4, limit=1)
    assert (last["content"], "truncated" in last) == ("4\n", False)


async def test_a_line_longer_than_a_result_shows_its_beginning_and_the_next_line_can_be_read(
    workspace: Workspace,
) -> None:
    await workspace.files.write("/min.js", b"\x01" * 3_000_000 + b"\nshort\n")
    read = await workspace.call("read_file", path="/min.js")
    assert read["content"] == "\x01" * len(read["content"])
    assert (read["reason"], read["next_offset"], read["end_line"]) == ("size_cap", 2, 1)
    assert "beginning of line 1" in read["resume_hint"]
    assert (await workspace.call("read_file", path="/min.js", offset=2))["content"] == "short\n"


async def test_reading_behind_the_end_says_how_many_lines_there_are(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"1\n2\n")
    assert "has 2 lines" in await workspace.refused("read_file", path="/a", offset=3)


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "image/png"),
        (b"\xff\xfeh\0i\0", "text/plain; charset=utf-16le"),
        (b"text\0", "application/octet-stream"),
        (b"\xc3", "application/octet-stream"),
    ],
)
async def test_what_is_not_text_is_described_and_not_shown(
    workspace: Workspace, content: bytes, content_type: str
) -> None:
    entry, _ = await workspace.files.write("/b.bin", content)
    read = await workspace.call("read_file", path="/b.bin")
    assert (read["is_binary"], read["content_type"], read["size_bytes"]) == (True, content_type, len(content))
    assert read["content_hash"] == entry.content_hash
    assert "content" not in read
    refusal = await workspace.refused(
        "edit_file", path="/b.bin", expected_hash=entry.content_hash, edits=[{"old_text": "t", "new_text": "x"}]
    )
    assert "not UTF-8 text" in refusal


async def test_a_wrong_name_is_answered_with_names_like_it(workspace: Workspace) -> None:
    await workspace.files.write("/src/settings.py", b"")
    assert "`/workspace/src/settings.py`" in await workspace.refused("read_file", path="/src/setting.py")
    assert "Neither is there a directory" in await workspace.refused("read_file", path="/nowhere/settings.py")
    assert "list_directory" in await workspace.refused("read_file", path="/src")


async def test_many_files_share_a_result_and_one_that_fails_leaves_the_others(workspace: Workspace) -> None:
    await workspace.files.write("/small", b"small\n")
    await workspace.files.write("/large", b"line\n" * 100_000)
    await workspace.files.write("/bin", b"\0")
    paths = ["/large", "/gone", "../etc/passwd", "/small", "/bin", "/large"]
    first, gone, outside, small, binary, again = (await workspace.call("read_many_files", paths=paths))["files"]
    assert first["truncated"]
    assert "no file" in gone["error"]
    assert "`..`" in outside["error"]
    assert small["content"] == "small\n"
    assert binary["is_binary"]
    assert len(again["content"]) > len(first["content"]), "what others leave is used"


@pytest.mark.parametrize("count", [1, 11])
async def test_many_files_are_two_to_ten(workspace: Workspace, count: int) -> None:
    assert "`paths`" in await workspace.refused("read_many_files", paths=["/a"] * count)


# --- writing --------------------------------------------------------------------------------------------------------------


async def test_writing_creates_and_replaces_and_clients_hear_of_it(workspace: Workspace) -> None:
    first = await workspace.call("write_file", path="notes/a.md", content="one 🦉")
    second = await workspace.call("write_file", path="/workspace/notes/a.md", content="two")
    assert (first["path"], first["created"], first["size_bytes"]) == ("/workspace/notes/a.md", True, 8)
    assert (second["created"], second["content_hash"]) == (False, hash_of("two"))
    assert workspace.written == [("/notes/a.md", True), ("/notes/a.md", False)]


@pytest.mark.parametrize(
    "path", ["../x", "/workspace/../../etc/passwd", "a/../b", "", "/", "/workspace", "a\0b", "a\nb", "/_/x", "x" * 2000]
)
async def test_paths_that_lead_outside_or_nowhere_are_refused_by_every_tool_that_changes(
    workspace: Workspace, path: str
) -> None:
    await workspace.files.write("/kept", b"kept")
    await workspace.refused("write_file", path=path, content="x")
    await workspace.refused("delete_file", path=path, recursive=True)
    await workspace.refused(
        "edit_file", path=path, expected_hash=hash_of("kept"), edits=[{"old_text": "kept", "new_text": "x"}]
    )
    assert [entry.path for entry in await workspace.files.list(recursive=True)] == ["/kept"]
    assert workspace.written == []


async def test_text_that_is_no_unicode_and_a_file_too_large_are_refused(workspace: Workspace) -> None:
    assert "character 2" in await workspace.refused("write_file", path="/a", content="x\ud800")
    assert "10,485,760" in await workspace.refused("write_file", path="/a", content="x" * (FILE_MAX_BYTES + 1))
    assert await workspace.files.list() == []


async def test_a_read_only_file_cannot_be_written_edited_or_deleted(workspace: Workspace) -> None:
    await workspace.files.write("/d/a", b"text", is_readonly=True)
    edits = [{"old_text": "text", "new_text": "x"}]
    assert "read-only" in await workspace.refused("write_file", path="/d/a", content="x")
    assert "read-only" in await workspace.refused("edit_file", path="/d/a", expected_hash=hash_of("text"), edits=edits)
    assert "read-only" in await workspace.refused("delete_file", path="/d", recursive=True)
    assert (await workspace.call("read_file", path="/d/a"))["is_readonly"]
    assert workspace.written == []


# --- editing --------------------------------------------------------------------------------------------------------------


async def edit(workspace: Workspace, text: str, *edits: tuple[str, str]) -> str:
    """What an edit of this text is refused with."""
    await workspace.files.write("/a.py", text.encode())
    refusal = await workspace.refused(
        "edit_file",
        path="/a.py",
        expected_hash=hash_of(text),
        edits=[{"old_text": old, "new_text": new} for old, new in edits],
    )
    assert (await workspace.files.read("/a.py"))[1] == text.encode(), "all edits or none"
    assert workspace.written == []
    return refusal


async def test_edits_are_made_in_order_and_the_new_hash_serves_the_next_edit(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"one two\r\n")
    edits = [{"old_text": "one", "new_text": "three"}, {"old_text": "three two", "new_text": "2"}]
    first = await workspace.call("edit_file", path="/a", expected_hash=hash_of("one two\r\n"), edits=edits)
    assert (first["edits_applied"], first["content_hash"]) == (2, hash_of("2\r\n"))
    await workspace.call(
        "edit_file", path="/a", expected_hash=first["content_hash"], edits=[{"old_text": "2\r\n", "new_text": ""}]
    )
    assert (await workspace.files.read("/a"))[1] == b""
    assert workspace.written == [("/a", False), ("/a", False)]


async def test_text_that_occurs_more_than_once_is_refused_with_the_places(workspace: Workspace) -> None:
    refusal = await edit(workspace, "x\ny\nx\n", ("y", "z"), ("x", "z"))
    assert "Edit 2 of 2" in refusal
    assert "occurs 2 times, on lines 1, 3" in refusal
    assert "2 times" in await edit(workspace, "aaa", ("aa", "b")), "overlapping ones count"
    assert "more than 1,000 times" in await edit(workspace, "a" * 100_000, ("a", "b"))


async def test_text_that_does_not_occur_is_refused_with_what_is_nearest(workspace: Workspace) -> None:
    source = "def total(items):\n    return sum(item.price for item in items)\n"
    refusal = await edit(workspace, source, ("def total(items):\n  return sum(item.price for item in items)", "x"))
    assert "line 1" in refusal
    assert "White space differs" in refusal
    refusal = await edit(workspace, source, ("    return sum(item.cost for item in items)", "x"))
    assert '2: "    return sum(item.price for item in items)"' in refusal
    assert "\\r\\n" in await edit(workspace, "a = 1\r\nb = 2\r\n", ("a = 1\nb = 2", "x"))
    assert "Nothing similar" in await edit(workspace, source, ("class Engine:", "x"))
    assert "changes nothing" in await edit(workspace, source, ("total", "total"))


async def test_looking_for_what_is_nearest_takes_no_time_in_a_hostile_file(workspace: Workspace) -> None:
    started = time.monotonic()
    await edit(workspace, ("a b c " * 50 + "\n") * 20_000, ("a b c " * 5000 + "d", "x"))
    assert time.monotonic() - started < 20


async def test_a_file_that_has_changed_is_not_edited_and_the_answer_holds_its_hash(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"somebody else's")
    refusal = await workspace.refused(
        "edit_file", path="/a", expected_hash=hash_of("mine"), edits=[{"old_text": "else", "new_text": "x"}]
    )
    assert hash_of("somebody else's") in refusal
    assert "Read it again" in refusal
    assert "64 hex digits" in await workspace.refused(
        "edit_file", path="/a", expected_hash="abc", edits=[{"old_text": "else", "new_text": "x"}]
    )


@pytest.mark.parametrize(
    "edits",
    [
        [("beta", "gamma")],
        [("beta", "")],
        [("alpha", "b"), ("beta", "b"), ("b\nb", "alpha\nalpha")],
        [("alpha\nbeta\n", "")],
    ],
)
async def test_an_edit_that_runs_again_after_a_crash_finds_that_it_is_done(
    workspace: Workspace, edits: list[tuple[str, str]]
) -> None:
    source = "alpha\nbeta\n"
    await workspace.files.write("/a", source.encode())
    arguments: dict[str, object] = {
        "path": "/a",
        "expected_hash": hash_of(source),
        "edits": [{"old_text": old, "new_text": new} for old, new in edits],
    }
    first = await workspace.call("edit_file", **arguments)
    again = await workspace.call("edit_file", **arguments)
    assert again.pop("note")
    assert again == first
    assert len(workspace.written) == 1


async def test_of_two_edits_at_the_same_time_one_is_told_that_the_file_has_changed(workspace: Workspace) -> None:
    await workspace.files.write("/a", b"one two")
    calls = [
        call_tool(
            TOOLS["edit_file"],
            workspace,
            {"path": "/a", "expected_hash": hash_of("one two"), "edits": [{"old_text": old, "new_text": "x"}]},
        )
        for old in ("one", "two")
    ]
    outcomes = await asyncio.gather(*calls)
    assert sorted(outcome.error is None for outcome in outcomes) == [False, True]
    assert (await workspace.files.read("/a"))[1] in (b"x two", b"one x")


def test_recognizing_edits_gives_up_before_it_takes_long() -> None:
    started = time.monotonic()
    edits = [Edit(old_text=f"{number}", new_text="") for number in range(10)]
    assert not are_applied(b"x" * 1_000_000, edits, hash_of("something else"))
    assert time.monotonic() - started < 20


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n", max_size=12), st.lists(st.tuples(st.text("ab\n", min_size=1), st.text("ab\n")), max_size=3))
def test_edits_that_were_made_are_always_recognized_in_small_files(source: str, pairs: list[tuple[str, str]]) -> None:
    edits = [Edit(old_text=old, new_text=new) for old, new in pairs]
    try:
        edited = apply_edits(source, edits, "a")
    except ToolError:
        return
    assert are_applied(edited.encode(), edits, hash_of(source))


# --- listing and searching ------------------------------------------------------------------------------------------------


async def test_a_directory_is_listed_without_what_is_below_it(workspace: Workspace) -> None:
    await workspace.files.write("/src/app/main.py", b"12345")
    await workspace.files.write("/read me.txt", b"", is_readonly=True)
    listed = await workspace.call("list_directory")
    assert listed["path"] == "/workspace"
    assert listed["entries"] == [
        {"path": "/workspace/read me.txt", "type": "file", "size_bytes": 0, "is_readonly": True},
        {"path": "/workspace/src", "type": "directory"},
    ]
    assert (await workspace.call("list_directory", path="src"))["count"] == 1
    assert "no file or directory" in await workspace.refused("list_directory", path="/gone")
    assert "is a file" in await workspace.refused("list_directory", path="/src/app/main.py")


async def test_a_large_directory_is_cut_and_says_how_much_there_is(workspace: Workspace) -> None:
    await workspace.files.apply({f"/{number:04}{'n' * 200}": b"" for number in range(1500)}, [])
    listed = await workspace.call("list_directory")
    assert (listed["count"], listed["reason"]) == (1500, "item_cap")
    assert 100 < len(listed["entries"]) < 1000
    found = await workspace.call("glob", pattern="*")
    assert (found["count"], found["truncated"]) == (1500, True)


async def test_grep_prints_matches_with_numbers_and_context_and_each_line_once(workspace: Workspace) -> None:
    await workspace.files.write("/src/a.py", b"".join(b"line %d\r\n" % number for number in range(1, 21)))
    await workspace.files.write("/b.txt", b"line 5\0")
    found = await workspace.call("grep_files", pattern="line (3|5|15)\\b", before_context=1, after_context=1)
    (file,) = found["files"]
    assert file["path"] == "/workspace/src/a.py"
    assert file["match_count"] == found["match_count"] == 3
    assert file["lines"] == ("2-line 2\n3:line 3\n4-line 4\n5:line 5\n6-line 6\n--\n14-line 14\n15:line 15\n16-line 16")
    plain = await workspace.call("grep_files", pattern="(?i)LINE 2", path="src")
    assert plain["files"][0]["lines"] == "2:line 2\n20:line 20"


@pytest.mark.parametrize("path", ["/src/*.py", "*.py", "src/**", "/workspace/src/a.py", "/src", "workspace"])
async def test_grep_takes_a_file_a_directory_or_a_glob(workspace: Workspace, path: str) -> None:
    await workspace.files.write("/src/a.py", b"needle\n")
    found = await workspace.call("grep_files", pattern="needle", path=path)
    assert [file["path"] for file in found["files"]] == ["/workspace/src/a.py"]


async def test_a_name_with_the_signs_of_a_glob_is_meant_itself(workspace: Workspace) -> None:
    await workspace.files.write("/[a].txt", b"needle\n")
    await workspace.files.write("/a.txt", b"needle\n")
    found = await workspace.call("grep_files", pattern="needle", path="/[a].txt")
    assert [file["path"] for file in found["files"]] == ["/workspace/[a].txt"]


@pytest.mark.parametrize("context", [0, 20])
async def test_a_search_that_finds_too_much_is_cut_and_says_so(workspace: Workspace, context: int) -> None:
    await workspace.files.write("/a", b"x" * 300 + b"\n" + b"x\n" * 5000)
    found = await workspace.call("grep_files", pattern="x", after_context=context)
    assert (found["truncated"], found["match_count"]) == (True, GREP_MAX_MATCHES)
    assert "at least 1,000" in found["resume_hint"]
    long = await workspace.call("grep_files", pattern="y|^x{300}")
    assert long["match_count"] == 1


async def test_a_search_with_long_lines_fits_into_a_result(workspace: Workspace) -> None:
    await workspace.files.write("/a", ("\x01" * 100_000 + "\n").encode() * 50)
    found = await workspace.call("grep_files", pattern=".", before_context=20, after_context=20)
    assert (found["reason"], found["truncated"]) == ("size_cap", True)
    assert found["files"][0]["lines"].endswith("…")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", "(?:a?){500}a{500}", ".*.*.*.*=.*"])
async def test_an_expression_made_to_run_for_ever_does_not(workspace: Workspace, pattern: str) -> None:
    await workspace.files.write("/a", b"a" * 200_000 + b"!\n")
    started = time.monotonic()
    await call_tool(TOOLS["grep_files"], workspace, {"pattern": pattern})
    assert time.monotonic() - started < 30


async def test_an_expression_that_cannot_be_used_is_explained(workspace: Workspace) -> None:
    assert "look-around" in await workspace.refused("grep_files", pattern="(?=x)")
    assert "cannot be used" in await workspace.refused("grep_files", pattern="(")
    assert "`before_context`" in await workspace.refused("grep_files", pattern="x", before_context=21)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.md", "/workspace", ["/docs/a.md", "/docs/deep/ä.md", "/top.md"]),
        ("*.md", "/docs/deep", ["/docs/deep/ä.md"]),
        ("docs/*.md", "/", ["/docs/a.md"]),
        ("**/*.md", "docs", ["/docs/a.md", "/docs/deep/ä.md"]),
        ("/docs/**/a.md", "/docs/deep", ["/docs/a.md"]),
        ("/workspace/docs/*", "/workspace", ["/docs/a.md"]),
        ("../*", "/docs", []),
        ("{top,a}.md", "/", ["/docs/a.md", "/top.md"]),
    ],
)
async def test_glob_finds_files_from_a_directory_on(
    workspace: Workspace, pattern: str, path: str, expected: list[str]
) -> None:
    for name in ("/docs/a.md", "/docs/deep/ä.md", "/top.md", "/docs.txt"):
        await workspace.files.write(name, b"")
    found = await workspace.call("glob", pattern=pattern, path=path)
    assert found["paths"] == [f"/workspace{one}" for one in expected]


async def test_delete_says_whether_there_was_something_and_needs_recursive_for_more(workspace: Workspace) -> None:
    await workspace.files.write("/d/a", b"")
    assert "recursive" in await workspace.refused("delete_file", path="/d")
    assert (await workspace.call("delete_file", path="/d", recursive=True))["deleted"]
    again = await workspace.call("delete_file", path="/d", recursive=True)
    assert (again["deleted"], again["path"]) == (False, "/workspace/d")
    assert again["note"]


async def test_stat_answers_whether_there_is_a_file(workspace: Workspace) -> None:
    entry, _ = await workspace.files.write("/d/a", b"12")
    stat = await workspace.call("stat_file", path="d/a")
    assert (stat["exists"], stat["type"], stat["size_bytes"], stat["content_hash"]) == (
        True,
        "file",
        2,
        entry.content_hash,
    )
    assert (await workspace.call("stat_file", path="/d"))["type"] == "directory"
    assert (await workspace.call("stat_file", path="/workspace"))["type"] == "directory"
    assert await workspace.call("stat_file", path="/gone") == {"path": "/workspace/gone", "exists": False}


async def test_names_in_any_script_are_one_name_in_both_ways_to_write_accents(workspace: Workspace) -> None:
    await workspace.call("write_file", path="/e\u0301té 日本 🦉.txt", content="x")
    assert (await workspace.call("read_file", path="/\u00e9té 日本 🦉.txt"))["content"] == "x"
