"""Values that outlive a conversation's window, and a view of the session's secrets that shows none of them.

Why `secret_store` neither takes nor returns a value: a call's arguments and its result are events, and events are served to
every reader of the session for as long as it exists. A value that a model passes or sees has left the safe already. So people set
secrets over the API, the model knows them by name, and a tool that needs one takes its name and reads it through
`ToolContext.storage`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.tools import SideEffect

CONCURRENCY_CLASS: Final = "session_storage"
LISTING_MAX_BYTES: Final = 48 * 1024
"""Of keys in one listing: a result may hold 64 KiB, and 1,000 keys at their longest would be four times that."""

Operation = Literal["set", "get", "delete", "list"]


class KvStore(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    operation: Annotated[
        Operation,
        Meta(
            description="set: store `value` under `key`, replacing what is there. get: return the value of `key`. "
            "delete: remove `key`. list: return all keys, or those that begin with `key`."
        ),
    ]
    key: (
        Annotated[
            str, Meta(description="Up to 255 letters, digits, `.`, `_`, `:`, `/` or `-`, such as `project/status`.")
        ]
        | None
    ) = None
    value: (
        Annotated[str, Meta(description="For set: a text of up to 64 KiB. Write structured data as JSON.")] | None
    ) = None


class SecretStore(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A secret's value is never an argument: whatever stands in a call stays in the session's log. The user sets secrets."""

    operation: Annotated[
        Operation,
        Meta(
            description="list: the names of all secrets. get: whether there is a secret `name`; its value is not shown. "
            "delete: remove it. set: is always refused, the user sets secrets."
        ),
    ]
    name: (
        Annotated[str, Meta(description="The secret's name: letters, digits and `_`, such as `GITHUB_TOKEN`.")] | None
    ) = None


async def kv_store(context: ToolContext, arguments: KvStore) -> object:
    _check_parameters(arguments)
    storage, key, value = context.storage, arguments.key or "", arguments.value
    match arguments.operation:
        case "set":
            assert value is not None
            stored = await storage.set(key, value)
            return {"key": key, "stored": True, "size_bytes": len(stored.value.encode())}
        case "get":
            found = await storage.get(key)
            if found is None:
                raise ToolError(f"There is no value under `{key}`.")
            # As it is: in JSON a value at its limit would no longer fit into a result.
            return found.value
        case "delete":
            return {"key": key, "deleted": await storage.delete(key)}
        case "list":
            return _listing([one.key for one in await storage.keys() if one.key.startswith(key)])


async def secret_store(context: ToolContext, arguments: SecretStore) -> dict[str, object]:
    if arguments.operation == "set":
        raise ToolError(_how_to_set(context, arguments.name))
    storage = context.storage
    if arguments.operation == "list":
        return {"secrets": [secret.name for secret in await storage.secrets()]}
    if not arguments.name:
        raise ToolError(_missing("secret_store", arguments.operation, ["name"]))
    if arguments.operation == "delete":
        return {"name": arguments.name, "deleted": await storage.delete_secret(arguments.name)}
    exists = await storage.get_secret(arguments.name) is not None
    note = (
        f"Its value is not shown. Tools that need a secret take its name: `web_fetch` puts it into a header for "
        f"{{{{secret:{arguments.name}}}}}, at the hosts that its configuration allows for it."
        if exists
        else _how_to_set(context, arguments.name)
    )
    return {"name": arguments.name, "exists": exists, "note": note}


def _check_parameters(arguments: KvStore) -> None:
    needed = {"set": ["key", "value"], "list": []}.get(arguments.operation, ["key"])
    given = {"key": bool(arguments.key), "value": arguments.value is not None}
    missing = [name for name in needed if not given[name]]
    if missing:
        raise ToolError(_missing("kv_store", arguments.operation, missing))
    # An empty one is what some models write into every parameter they don't need.
    if arguments.operation != "set" and arguments.value:
        raise ToolError(f"`kv_store` with operation `{arguments.operation}` takes no `value`. Nothing was changed.")


def _missing(tool: str, operation: str, names: list[str]) -> str:
    return f"`{tool}` with operation `{operation}` needs {' and '.join(f'`{name}`' for name in names)}. Nothing was changed."


def _how_to_set(context: ToolContext, name: str | None) -> str:
    what = f"`{name}`" if name else "it"
    return (
        f"Secrets are set by people, not by tools, because whatever a tool is given stays in the session's log. "
        f"Ask the user to set {what} over the API (PUT /v1/sessions/{context.session_id}/storage/secrets), "
        f"and not to write its value into the conversation."
    )


def _listing(keys: list[str]) -> dict[str, object]:
    shown: list[str] = []
    left_bytes = LISTING_MAX_BYTES
    for key in keys:
        left_bytes -= len(msgspec.json.encode(key)) + 1
        if left_bytes < 0:
            break
        shown.append(key)
    listing: dict[str, object] = {"keys": shown, "count": len(keys)}
    if len(shown) < len(keys):
        listing["note"] = f"The first {len(shown)} are shown. List with the beginning of a key in `key` to see others."
    return listing


CAPABILITY = Capability(
    id="session_storage",
    name="Session Storage",
    description="Lets the model keep values for later, and know which secrets the session has without seeing them.",
    category="Storage",
    icon="database",
    features=("key_value", "secrets"),
    system_prompt="""\
You can keep values for later turns with `kv_store`: results, decisions, where you are in longer work. It is not for secrets.
Secrets such as API keys are set by the user and known to you by name only: `secret_store` lists the names. Never write a \
secret's value into a tool call or an answer.""",
    tools=(
        Tool(
            name="kv_store",
            display_name="Key-value store",
            description="Store, read, delete or list values of this session. They stay until they are deleted.",
            arguments=KvStore,
            run=kv_store,
            side_effect=SideEffect.IDEMPOTENT,
            concurrency_class=CONCURRENCY_CLASS,
            timeout_seconds=30.0,
        ),
        Tool(
            name="secret_store",
            display_name="Secret store",
            description="List the names of this session's secrets, check for one, or delete one. Values are never shown.",
            arguments=SecretStore,
            run=secret_store,
            side_effect=SideEffect.IDEMPOTENT,
            concurrency_class=CONCURRENCY_CLASS,
            timeout_seconds=30.0,
        ),
    ),
)
