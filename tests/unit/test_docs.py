"""Keeps the documentation true: what the code has is documented, and what a page names exists.

Examples are run by tests/integration/test_docs_examples.py.
"""

from __future__ import annotations

import ast
import html
import re
from datetime import timedelta
from pathlib import Path

import pytest
from litestar import Litestar
from msgspec import structs
from temporalio.common import RetryPolicy

from activities.capabilities.registry import builtin_registry
from cli.main import app as cli_app
from domain import events, messages
from domain.errors import error_classes
from domain.events import EPHEMERAL_TYPES, EVENT_TYPES, Accumulator
from domain.model import USER_ERROR_CODES, USER_ERRORS
from infra.settings import SETTINGS
from workflows import contract
from workflows.turn import Turn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
PREFIX = "/api"

EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)

NOT_SETTINGS = {
    "EVERRUNS_TEST_EFFECTS_FILE",  # the switch of one capability
    # Constants of the code that contributors are pointed to.
    "BUILTIN_MODULES",
    "EVENT_TYPES",
}


def text_of(name: str) -> str:
    return (DOCS / name).read_text()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row that begins with a code span or a method."""
    found = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in found]


def section(text: str, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    level = heading.count("#")
    start = text.index(f"{heading}\n") + len(heading)
    end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(text, start)
    return text[start : end.start() if end else None]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_documented() -> None:
    page = text_of("configuration.md")
    assert not [setting.name for setting in SETTINGS if f"| `{setting.name}`" not in page]


@EACH_PAGE
def test_a_page_names_no_setting_that_does_not_exist(page: Path) -> None:
    known = {name for setting in SETTINGS for name in (setting.name, *setting.aliases)} | NOT_SETTINGS
    named = re.findall(r"(?<![\w$.])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?!\w)", " ".join(code_spans(prose(page))))
    assert not [name for name in named if name not in known and not hasattr(contract, name)]


# --- events -----------------------------------------------------------------------------------------------------------


def test_every_written_event_is_documented_with_all_its_fields_and_no_other() -> None:
    page = text_of("events.md")
    for name, payload in events.payload_types().items():
        part = section(page, f"### `{name}`")
        documented = re.findall(r"^- `(\w+)(\??)`", part, re.MULTILINE)
        fields = {(field.encode_name, "" if field.required else "?") for field in structs.fields(payload)}
        if name in Accumulator.TYPES:
            fields.add(("accumulated", ""))
        assert set(documented) == fields, name
        assert EVENT_TYPES[name] in part, name
        assert ("Ephemeral." in part) == (name in EPHEMERAL_TYPES), name


def test_every_event_that_is_not_written_yet_is_listed_as_such() -> None:
    part = section(text_of("events.md"), "## Registered, not written yet")
    listed = {cells[0].strip("`"): cells[1] for cells in rows(part) if cells[0].startswith("`")}
    assert listed == {name: text for name, text in EVENT_TYPES.items() if name not in events.payload_types()}


def test_every_event_said_to_be_written_is_written_somewhere() -> None:
    used: set[str] = set()
    for room in ("api", "db", "activities"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text())
            imported = {
                alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
            }
            used |= imported & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {payload.__name__ for payload in events.payload_types().values()} - used


@EACH_PAGE
def test_a_page_names_no_event_that_does_not_exist(page: Path) -> None:
    families = {name.partition(".")[0] for name in EVENT_TYPES}
    # `reason.completed.error` is a field of an event, `message.content` one of a body, `workflow.patched` Temporal's.
    dotted = [span for span in code_spans(prose(page)) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span)]
    unknown = [
        span
        for span in dotted
        if span.partition(".")[0] in families
        and not any(
            span == name or (span.startswith(f"{name}.") and is_field(name, span.removeprefix(f"{name}.")))
            for name in EVENT_TYPES
        )
    ]
    assert not unknown


def is_field(event_type: str, name: str) -> bool:
    payload = events.payload_types().get(event_type)
    return payload is not None and name in payload.__struct_fields__


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_request_error_is_documented_with_its_status_and_text() -> None:
    part = section(text_of("errors.md"), "## Requests")
    listed = {tuple(cells[:3]) for cells in rows(part) if len(cells) == 4 and cells[1].isdigit()}
    assert listed == {(f"`{cls.code}`", str(cls.status), (cls.__doc__ or "").strip()) for cls in error_classes()}


def test_every_turn_error_is_documented_with_its_text() -> None:
    part = section(text_of("errors.md"), "## Turns")
    listed = {cells[0].strip("`"): cells[1] for cells in rows(part) if cells[0].startswith("`")}
    assert listed == USER_ERROR_CODES
    assert not [kind.value for kind in USER_ERRORS if f"`{kind.value}`" not in part]


# --- endpoints --------------------------------------------------------------------------------------------------------


def operations(app: Litestar) -> dict[tuple[str, str], str]:
    schema = app.openapi_schema.to_schema()
    return {
        (method.upper(), path.removeprefix(PREFIX)): operation["operationId"]
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }


async def test_every_endpoint_is_documented_and_every_documented_endpoint_exists(app: Litestar) -> None:
    listed = {
        (cells[0], cells[1].strip("`")): cells[2].strip("`")
        for cells in rows(text_of("api.md"))
        if cells[0] in ("GET", "POST", "PUT", "PATCH", "DELETE")
    }
    assert listed == operations(app)


async def test_pages_name_no_endpoint_that_does_not_exist(app: Litestar) -> None:
    known = set(operations(app))
    wrong: list[str] = []
    for page in PAGES:
        for method, path in re.findall(r"\b(GET|POST|PUT|PATCH|DELETE) (/[^\s`?)]*)", page.read_text()):
            if (method, path.removeprefix(PREFIX)) not in known:
                wrong.append(f"{page.name}: {method} {path}")
    assert not wrong


async def test_every_list_parameter_of_events_is_documented(app: Litestar) -> None:
    schema = app.openapi_schema.to_schema()
    parameters = schema["paths"][f"{PREFIX}/v1/sessions/{{session_id}}/events"]["get"]["parameters"]
    part = section(text_of("api.md"), "## Events")
    named = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
    assert named
    assert not [name for name in named if f"`{name}`" not in part]


# --- messages ---------------------------------------------------------------------------------------------------------


def test_every_field_of_a_message_every_delivery_and_every_control_is_documented() -> None:
    from api.messages import CreateMessage

    page = text_of("messages.md")
    names = [name for name in CreateMessage.__struct_fields__ if name != "message"]
    names += [delivery.value for delivery in messages.Delivery]
    names += [name for name in messages.Controls.__struct_fields__ if name != "reasoning"] + ["reasoning.effort"]
    assert not [name for name in names if f"`{name}`" not in page]


def test_every_capability_is_documented_and_linked() -> None:
    ids = [capability.id for capability in builtin_registry().list()]
    assert {path.stem for path in (DOCS / "capabilities").glob("*.md")} == set(ids)
    for page in ("tools.md", "index.md"):
        assert not [one for one in ids if f"(capabilities/{one}.md)" not in text_of(page)]


# --- Temporal ---------------------------------------------------------------------------------------------------------


def workflow_names() -> dict[str, str]:
    definition = getattr(Turn, "__temporal_workflow_definition")
    return {
        **{str(name): "signal" for name in definition.signals},
        **{str(name): "query" for name in definition.queries},
        **{str(name): "update" for name in definition.updates},
    }


def test_every_signal_query_and_update_is_documented_and_no_other() -> None:
    part = section(text_of("temporal.md"), "## Signals, query, update")
    listed = {cells[0].strip("`"): cells[1] for cells in rows(part) if cells[1] in ("signal", "query", "update")}
    assert listed == workflow_names()


def test_every_signal_query_and_update_has_an_example_with_the_command() -> None:
    part = section(text_of("temporal.md"), "## With the temporal command")
    for name in workflow_names():
        assert re.search(rf"--(signal-)?(name|type) {name}\b", part), name


def test_every_field_of_a_signal_is_documented() -> None:
    part = section(text_of("temporal.md"), "## Signals, query, update")
    described = {cells[0].strip("`"): cells[2] for cells in rows(part) if len(cells) == 4}
    for name, payload in {
        "message": contract.MessageSignal,
        "interrupt": contract.InterruptSignal,
        "cancel": contract.CancelSignal,
        "tool_results": contract.ToolResultsSignal,
        "approvals": contract.ApprovalsSignal,
        "answers": contract.AnswersSignal,
    }.items():
        assert not [field for field in payload.__struct_fields__ if f'"{field}"' not in described[name]], name
    answers = "".join(cells[3] for cells in rows(part) if len(cells) == 4)
    fields = (*contract.TurnStatusView.__struct_fields__, *contract.SendMessageReceipt.__struct_fields__)
    assert not [field for field in fields if f'"{field}"' not in answers]
    assert not [phase.value for phase in contract.TurnPhase if f"`{phase.value}`" not in answers]


def test_names_of_workflow_queues_activities_and_search_attributes_are_documented() -> None:
    page = text_of("temporal.md")
    names = [contract.TURN_WORKFLOW, contract.TURNS_QUEUE]
    names += [contract.REASON, contract.ACT, contract.FINISH, contract.RECORD_MESSAGE]
    names += [attribute.name for attribute in contract.SEARCH_ATTRIBUTES]
    assert not [name for name in names if f"`{name}`" not in page]
    known = {attribute.name for attribute in contract.SEARCH_ATTRIBUTES}
    assert set(re.findall(r"Everruns[A-Z]\w+", page)) == known
    inputs = [field for field in contract.TurnStart.__struct_fields__ if field not in ("turn_id", "iteration")]
    assert not [field for field in inputs if field not in page]


# --- operations -------------------------------------------------------------------------------------------------------


def commands() -> set[str]:
    return {name for name in cli_app if not name.startswith("-")}


def test_every_command_is_documented_and_no_other() -> None:
    part = section(text_of("operations.md"), "## Roles")
    assert {
        cells[0].strip("`").removeprefix("everruns ") for cells in rows(part) if "everruns" in cells[0]
    } == commands()


@EACH_PAGE
def test_a_page_names_no_command_that_does_not_exist(page: Path) -> None:
    named = re.findall(r"(?:`|^)everruns ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert not set(named) - commands()


def test_the_timeouts_in_the_table_are_those_of_the_contract() -> None:
    part = section(text_of("operations.md"), "## Timeouts")
    listed = {cells[2].strip("`"): cells[1] for cells in rows(part) if len(cells) == 3 and cells[2].startswith("`")}
    for name, shown in listed.items():
        value = getattr(contract, name)
        match value:
            case timedelta():
                value = value.total_seconds()
            case RetryPolicy():
                assert value.maximum_interval is not None
                value = value.maximum_interval.total_seconds()
        assert f"{value:g}" in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", shown), name
    timeouts = {name for name in vars(contract) if name.endswith(("_TIMEOUT", "_MARGIN", "_INTERVAL_SECONDS"))}
    limits = {"MAX_PARALLEL_TOOLS", "STEP_RETRY", "MODEL_ATTEMPTS", "LOST_ATTEMPTS_BEFORE_SEAL"}
    assert timeouts | limits == set(listed)


# --- links and examples -----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", html.unescape(heading)).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@EACH_PAGE
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached_from_the_index() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+\.md)\)", prose(index))}
    assert set(DOCS.rglob("*.md")) - {index} <= linked
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_the_example_in_the_readme_is_short() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


@EACH_PAGE
def test_every_fence_names_its_language_or_is_a_picture(page: Path) -> None:
    languages = re.findall(r"^```(\S*)\n(?:.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert set(languages) <= {"", "bash", "python", "json", "js", "text", "yaml"}


@EACH_PAGE
def test_every_json_example_is_json(page: Path) -> None:
    import msgspec

    for block in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        msgspec.json.decode(block)


@EACH_PAGE
def test_every_python_example_compiles(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")
