"""Keeps the house in order: reads every module's syntax tree, so that not even a lazy or type-only import slips through.

The table is the one of ARCHITECTURE.md, which is compared with it here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

ROOT = Path(__file__).parents[2]

ALLOWED: dict[str, tuple[str, ...]] = {
    "cli": ("cli", "api", "db", "activities", "workflows", "infra", "domain"),
    "api": ("api", "db", "activities.capabilities", "workflows.contract", "infra", "domain"),
    "db": ("db", "workflows.contract", "infra", "domain"),
    "activities": ("activities", "workflows.contract", "infra", "domain"),
    "infra": ("infra", "workflows.contract", "domain"),
    "workflows": ("workflows", "domain"),
    "domain": ("domain",),
}
"""Room -> what its modules may import of ours."""

PURE_ROOMS = {"workflows": {"temporalio", "msgspec"}, "domain": {"msgspec"}}
"""Room -> the only packages of others it may import, besides the standard library."""

PROVIDER_SDKS = {"openai", "anthropic", "mcp", "google", "cohere", "mistralai"}
"""Slow to import: only inside the function that needs them."""

GRAB_BAGS = re.compile(r"(^|_)(utils?|helpers?|managers?|base|common|misc)($|_)")


class Import(Struct, frozen=True):
    target: str
    line: int
    at_module_level: bool


def modules(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def all_modules() -> list[Path]:
    return [path for room in ALLOWED for path in modules(room)]


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import of a module, with what it names: `from db import event_log` is an import of `db.event_log`."""
    tree = ast.parse(source)
    inside_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            origin = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (origin, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            # A name that is computed cannot be judged here; none of our rooms needs one.
            names = [str(argument.value)] if isinstance(argument, ast.Constant) else ["<computed>"]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) not in inside_functions)


def imports_in(path: Path) -> Iterator[Import]:
    return imports_of(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))


def is_ours(target: str) -> bool:
    return target.partition(".")[0] in ALLOWED


def allowed(room: str, target: str) -> bool:
    return any(target == floor or target.startswith(f"{floor}.") for floor in ALLOWED[room])


def place(path: Path, found: Import) -> str:
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.target}"


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    wrong = [
        place(path, found)
        for path in modules(room)
        for found in imports_in(path)
        if is_ours(found.target) and not allowed(room, found.target)
    ]
    assert not wrong


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_a_pure_room_imports_nothing_else_of_others(room: str) -> None:
    wrong = [
        place(path, found)
        for path in modules(room)
        for found in imports_in(path)
        if not is_ours(found.target)
        and found.target.partition(".")[0] not in PURE_ROOMS[room] | set(sys.stdlib_module_names)
    ]
    assert not wrong


def test_nothing_imports_the_tests_or_the_benchmarks() -> None:
    wrong = [
        place(path, found)
        for path in all_modules()
        for found in imports_in(path)
        if found.target.partition(".")[0] in ("tests", "benchmarks", "conftest")
    ]
    assert not wrong


def test_provider_sdks_are_imported_on_first_use_only() -> None:
    wrong = [
        place(path, found)
        for path in all_modules()
        for found in imports_in(path)
        if found.at_module_level and found.target.partition(".")[0] in PROVIDER_SDKS
    ]
    assert not wrong


def test_no_module_is_computed_at_run_time() -> None:
    assert not [
        place(path, found) for path in all_modules() for found in imports_in(path) if found.target == "<computed>"
    ]


def test_no_module_is_a_grab_bag() -> None:
    names = [path.parent.name if path.name == "__init__.py" else path.stem for path in all_modules()]
    assert not [name for name in names if GRAB_BAGS.search(name)]


def test_every_module_has_a_docstring() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in all_modules()
        if (source := path.read_text()).strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert not without


def test_every_room_is_known_and_has_modules() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages == set(ALLOWED)
    assert all(modules(room) for room in ALLOWED)


def test_the_table_in_the_architecture_page_is_this_one() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    written: dict[str, set[str]] = {}
    for rooms, floors in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+) \|$", page, re.MULTILINE):
        # What is said in brackets is about packages of others.
        named = set(re.findall(r"`([\w.]+)`", re.sub(r"\(.*?\)", "", floors)))
        for room in re.findall(r"`(\w+)`", rooms):
            if room in ALLOWED:
                written[room] = set(ALLOWED) if floors == "everything" else named | {room}
    assert written == {room: set(floors) for room, floors in ALLOWED.items()}


@pytest.mark.parametrize(
    ("source", "package", "target", "at_module_level"),
    [
        ("import db.event_log", "api", "db.event_log", True),
        ("from db import event_log", "api", "db.event_log", True),
        ("from . import problems", "api", "api.problems", True),
        ("from .. import problems", "api.inner", "api.problems", True),
        ("def late():\n    import openai", "activities.llm", "openai", False),
        ("if TYPE_CHECKING:\n    from cli import run", "api", "cli.run", True),
        ("import importlib\nimportlib.import_module('db.tables')", "api", "db.tables", True),
        ("class Driver:\n    from anthropic import Client", "activities.llm", "anthropic.Client", True),
    ],
)
def test_the_reader_sees_every_way_to_import(source: str, package: str, target: str, at_module_level: bool) -> None:
    found = {(one.target, one.at_module_level) for one in imports_of(source, package)}
    assert (target, at_module_level) in found


def test_the_rule_refuses_what_it_should() -> None:
    assert not allowed("db", "activities.act")
    assert not allowed("api", "activities.reason")
    assert not allowed("api", "workflows.turn")
    assert not allowed("infra", "workflows")
    assert not allowed("domain", "infra.settings")
    assert not allowed("api", "dbx"), "a name that only begins like a room is not that room"
    assert allowed("api", "activities.capabilities.registry")
