"""The tools of `session_storage` and `session`: what a model gets to read, against a storage in memory."""

from __future__ import annotations

import json
from typing import cast

import pytest

from activities.capabilities import session, session_storage, stateless_todo_list
from activities.capabilities.registry import CapabilityRegistry, ToolOutcome, call_tool
from activities.capabilities.session_storage import LISTING_MAX_BYTES
from activities.capabilities.tool_call import MAX_RESULT_BYTES
from domain.capabilities import ToolContext
from domain.config import CapabilityRef
from domain.errors import EverrunsError
from domain.events import TokenUsage, ToolStatus
from domain.limits import MAX_VALUES_PER_SESSION, VALUE_KEY_MAX_CHARACTERS, VALUE_MAX_BYTES
from domain.messages import TextPart
from domain.secret import Secret
from domain.session_info import SessionInfo
from domain.session_storage import (
    StorageProblem,
    StoredSecret,
    StoredValue,
    check_key,
    check_secret_name,
    check_secrets,
    check_value,
)
from domain.tools import SideEffect

PLANTED = "sk-planted-0123456789"
SESSION = f"session_{7:032x}"
TOOLS = {tool.name: tool for module in (session_storage, session) for tool in module.CAPABILITY.tools}


def registry() -> CapabilityRegistry:
    made = CapabilityRegistry()
    for module in (stateless_todo_list, session_storage, session):
        made.register(module.CAPABILITY)
    return made


class MemoryStorage:
    """The port with its rules, but no database."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.sealed: dict[str, Secret] = {}
        self.calls = 0

    def _check(self, key: str, value: str = "") -> None:
        self.calls += 1
        try:
            check_key(key)
            check_value(value)
        except EverrunsError as error:
            raise StorageProblem(error.message) from None

    async def get(self, key: str) -> StoredValue | None:
        self._check(key)
        return None if key not in self.values else self._stored(key)

    async def set(self, key: str, value: str) -> StoredValue:
        self._check(key, value)
        self.values[key] = value
        return self._stored(key)

    async def delete(self, key: str) -> bool:
        self._check(key)
        return self.values.pop(key, None) is not None

    async def keys(self) -> list[StoredValue]:
        return [self._stored(key) for key in sorted(self.values)]

    async def get_secret(self, name: str) -> Secret | None:
        try:
            check_secret_name(name)
        except EverrunsError as error:
            raise StorageProblem(error.message) from None
        return self.sealed.get(name)

    async def set_secret(self, name: str, value: Secret) -> StoredSecret:
        check_secrets({name: value})
        self.sealed[name] = value
        return StoredSecret(name=name, created_at="", updated_at="")

    async def delete_secret(self, name: str) -> bool:
        return self.sealed.pop(name, None) is not None

    async def secrets(self) -> list[StoredSecret]:
        return [StoredSecret(name=name, created_at="", updated_at="") for name in sorted(self.sealed)]

    def _stored(self, key: str) -> StoredValue:
        return StoredValue(key=key, value=self.values[key], created_at="", updated_at="")


class Context:
    session_id = SESSION
    turn_id = "turn_1"
    tool_call_id = "call_1"

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        self.titles: list[str] = []

    async def session_info(self) -> SessionInfo:
        usage = TokenUsage(input_tokens=3, output_tokens=4)
        return SessionInfo(id=SESSION, harness="Generic", created_at="2026-01-01", turn_count=2, usage=usage)

    async def set_title(self, title: str) -> None:
        self.titles.append(title)


@pytest.fixture
def context() -> Context:
    return Context()


async def call(context: Context, tool: str, /, **arguments: object) -> ToolOutcome:
    return await call_tool(TOOLS[tool], cast(ToolContext, context), arguments)


async def text(context: Context, tool: str, /, **arguments: object) -> str:
    outcome = await call(context, tool, **arguments)
    assert (outcome.error, outcome.status) == (None, ToolStatus.SUCCESS)
    assert outcome.result is not None
    (part,) = outcome.result
    assert isinstance(part, TextPart)
    return part.text


async def value(context: Context, tool: str, /, **arguments: object) -> dict[str, object]:
    return json.loads(await text(context, tool, **arguments))


async def error(context: Context, tool: str, /, **arguments: object) -> str:
    outcome = await call(context, tool, **arguments)
    assert (outcome.result, outcome.status) == (None, ToolStatus.ERROR)
    assert outcome.error is not None
    return outcome.error


# --- kv_store ---------------------------------------------------------------------------------------------------------


async def test_a_value_is_kept_replaced_listed_and_deleted(context: Context) -> None:
    stored = await value(context, "kv_store", operation="set", key="report/status", value="größer")
    assert stored == {"key": "report/status", "stored": True, "size_bytes": 8}
    await value(context, "kv_store", operation="set", key="report/status", value='{"done": 2}')
    assert await text(context, "kv_store", operation="get", key="report/status") == '{"done": 2}'
    await value(context, "kv_store", operation="set", key="other", value="")
    assert await text(context, "kv_store", operation="get", key="other") == ""
    assert await value(context, "kv_store", operation="list") == {"keys": ["other", "report/status"], "count": 2}
    assert await value(context, "kv_store", operation="list", key="rep") == {"keys": ["report/status"], "count": 1}
    assert await value(context, "kv_store", operation="delete", key="other") == {"key": "other", "deleted": True}
    assert await value(context, "kv_store", operation="delete", key="other") == {"key": "other", "deleted": False}
    assert await error(context, "kv_store", operation="get", key="other") == "There is no value under `other`."


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"operation": "set"}, ["`key`", "`value`"]),
        ({"operation": "set", "key": "a"}, ["`value`"]),
        ({"operation": "set", "key": "a", "value": None}, ["`value`"]),
        ({"operation": "set", "value": "x"}, ["`key`"]),
        ({"operation": "set", "key": "", "value": "x"}, ["`key`"]),
        ({"operation": "get"}, ["`key`"]),
        ({"operation": "delete", "key": None}, ["`key`"]),
    ],
)
async def test_what_an_operation_lacks_is_named_and_nothing_is_done(
    context: Context, arguments: dict[str, object], missing: list[str]
) -> None:
    told = await error(context, "kv_store", **arguments)
    assert told == (
        f"`kv_store` with operation `{arguments['operation']}` needs {' and '.join(missing)}. Nothing was changed."
    )
    assert context.storage.calls == 0


@pytest.mark.parametrize("operation", ["get", "delete", "list"])
async def test_a_value_where_none_belongs_is_refused_before_anything_is_lost(context: Context, operation: str) -> None:
    context.storage.values["a"] = "kept"
    told = await error(context, "kv_store", operation=operation, key="a", value="meant for set")
    assert "takes no `value`" in told
    assert context.storage.values == {"a": "kept"}
    # What models fill in that write something into every parameter.
    await text(context, "kv_store", operation=operation, key="a", value="")


async def test_an_unknown_operation_lists_the_known_ones(context: Context) -> None:
    told = await error(context, "kv_store", operation="increment", key="a")
    assert '"enum":["delete","get","list","set"]' in told


async def test_a_value_that_is_no_text_is_explained(context: Context) -> None:
    told = await error(context, "kv_store", operation="set", key="a", value={"a": 1})
    assert "`value`" in told
    assert "Write structured data as JSON" in told


async def test_a_value_at_its_limit_comes_back_whole(context: Context) -> None:
    largest = '"\n' * (VALUE_MAX_BYTES // 2)
    assert MAX_RESULT_BYTES >= VALUE_MAX_BYTES
    await value(context, "kv_store", operation="set", key="a", value=largest)
    assert await text(context, "kv_store", operation="get", key="a") == largest
    assert f"{VALUE_MAX_BYTES} bytes" in await error(context, "kv_store", operation="set", key="a", value=largest + "x")
    assert context.storage.values["a"] == largest


async def test_a_listing_of_the_longest_keys_fits_and_tells_how_to_see_the_rest(context: Context) -> None:
    for number in range(MAX_VALUES_PER_SESSION):
        key = f"{number:03}".ljust(VALUE_KEY_MAX_CHARACTERS, "x")
        context.storage.values[key] = ""
    listing = await text(context, "kv_store", operation="list")
    assert len(listing) < LISTING_MAX_BYTES + 1000
    decoded = json.loads(listing)
    assert decoded["count"] == MAX_VALUES_PER_SESSION
    assert 0 < len(decoded["keys"]) < MAX_VALUES_PER_SESSION
    assert "beginning of a key" in decoded["note"]
    rest = await value(context, "kv_store", operation="list", key="99")
    assert (rest["count"], "note" in rest) == (10, False)


# --- secret_store -----------------------------------------------------------------------------------------------------


async def test_no_operation_shows_or_takes_the_value_of_a_secret(context: Context) -> None:
    context.storage.sealed["TOKEN"] = Secret(PLANTED)
    answers = [
        await text(context, "secret_store", operation="list"),
        await text(context, "secret_store", operation="get", name="TOKEN"),
        await error(context, "secret_store", operation="set", name="TOKEN"),
        await error(context, "secret_store", operation="get"),
        await error(context, "secret_store", operation="get", name=f"{PLANTED} with a blank"),
        await error(context, "secret_store", operation="set", name="TOKEN", value=PLANTED),
        await text(context, "secret_store", operation="delete", name="TOKEN"),
    ]
    assert not [answer for answer in answers if PLANTED in answer]
    assert json.loads(answers[0]) == {"secrets": ["TOKEN"]}
    found = json.loads(answers[1])
    assert (found["name"], found["exists"]) == ("TOKEN", True)
    assert json.loads(answers[6]) == {"name": "TOKEN", "deleted": True}
    assert context.storage.sealed == {}


async def test_the_schema_offers_no_place_for_a_secrets_value(context: Context) -> None:
    definition = next(
        tool.definition
        for tool in registry().resolve([CapabilityRef(ref="session_storage")]).tools
        if tool.tool.name == "secret_store"
    )
    assert set(cast("dict[str, object]", definition.parameters["properties"])) == {"operation", "name"}
    refused = await error(context, "secret_store", operation="set", name="TOKEN", value="x")
    assert "A secret's value is never an argument" in refused


@pytest.mark.parametrize("arguments", [{"name": "TOKEN"}, {}])
async def test_set_is_refused_and_says_how_a_person_does_it(context: Context, arguments: dict[str, object]) -> None:
    told = await error(context, "secret_store", operation="set", **arguments)
    assert f"PUT /v1/sessions/{SESSION}/storage/secrets" in told
    assert context.storage.sealed == {}


async def test_a_secret_that_is_not_there_says_how_it_gets_there(context: Context) -> None:
    found = await value(context, "secret_store", operation="get", name="TOKEN")
    assert found["exists"] is False
    assert "Ask the user to set `TOKEN`" in str(found["note"])
    assert await value(context, "secret_store", operation="delete", name="TOKEN") == {"name": "TOKEN", "deleted": False}


@pytest.mark.parametrize("operation", ["get", "delete"])
async def test_a_secret_without_a_name_is_a_precise_error(context: Context, operation: str) -> None:
    told = await error(context, "secret_store", operation=operation)
    assert told == f"`secret_store` with operation `{operation}` needs `name`. Nothing was changed."


def test_calls_of_the_storage_run_one_after_another_and_again_after_a_crash() -> None:
    tools = session_storage.CAPABILITY.tools
    assert {(tool.concurrency_class, tool.side_effect) for tool in tools} == {
        ("session_storage", SideEffect.IDEMPOTENT)
    }
    assert session_storage.CAPABILITY.features == ("key_value", "secrets")


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", " ", "a b", "a\n", "a\0", "ключ", "a" * 256, "a\\b", "'; DROP TABLE events; --", "a%", "{a}", "\ud800"]
)
def test_a_key_outside_the_alphabet_is_refused(key: str) -> None:
    with pytest.raises(EverrunsError, match="letters, digits") as caught:
        check_key(key)
    assert caught.value.field == "key"


@pytest.mark.parametrize("key", ["a", "../../etc/passwd", "A-1.b_c:d/e", "x" * 255, "__proto__"])
def test_a_key_of_the_alphabet_is_a_key(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A\n", "É", "A" * 129, "A.B", "$A", PLANTED])
def test_a_malformed_name_of_a_secret_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(EverrunsError) as caught:
        check_secrets({name: Secret("x")})
    assert caught.value.field == "secrets"
    assert len(name) < 3 or name not in caught.value.message


@pytest.mark.parametrize("unstorable", ["a\0b", "\ud800", "a\udfff"])
def test_text_that_the_database_cannot_hold_is_refused_without_being_repeated(unstorable: str) -> None:
    with pytest.raises(EverrunsError) as caught:
        check_value(unstorable)
    assert caught.value.field == "value"
    with pytest.raises(EverrunsError) as caught:
        check_secrets({"A": Secret(f"{PLANTED}{unstorable}")})
    assert caught.value.field == "secrets.A"
    assert PLANTED not in caught.value.message


# --- session ----------------------------------------------------------------------------------------------------------


async def test_session_info_leaves_out_what_is_not_known(context: Context) -> None:
    assert await value(context, "get_session_info") == {
        "id": SESSION,
        "harness": "Generic",
        "created_at": "2026-01-01",
        "turn_count": 2,
        "usage": {"input_tokens": 3, "output_tokens": 4},
    }


async def test_a_title_is_one_line(context: Context) -> None:
    assert await value(context, "write_session_title", title="  A\n title\0\tof  lines ") == {
        "title": "A title of lines"
    }
    assert context.titles == ["A title of lines"]


@pytest.mark.parametrize("title", ["", "   ", "\n\0", "x" * 201])
async def test_a_title_that_is_none_is_refused(context: Context, title: str) -> None:
    assert "title" in await error(context, "write_session_title", title=title)
    assert context.titles == []


@pytest.mark.parametrize(
    ("config", "asked"), [(None, False), ({}, False), ({"auto_title": False}, False), ({"auto_title": True}, True)]
)
def test_the_prompt_asks_for_a_title_when_it_is_wanted(config: dict[str, object] | None, asked: bool) -> None:
    resolved = registry().resolve(
        [CapabilityRef(ref="stateless_todo_list"), CapabilityRef(ref="session", config=config)]
    )
    assert ("write_session_title" in resolved.prompt) == asked
    assert resolved.prompt.startswith("You can keep a to-do list")


def test_the_tools_of_a_session_may_run_again() -> None:
    assert [tool.side_effect for tool in session.CAPABILITY.tools] == [SideEffect.PURE, SideEffect.IDEMPOTENT]
