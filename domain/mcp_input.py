"""What clients may write about MCP servers, those of the organization and scoped ones, checked before anything is stored.

No error repeats a value that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Struct, UnsetType

from domain.errors import InputTooLarge, InvalidInput, invalid_field
from domain.limits import DESCRIPTION_MAX_BYTES, check_count, check_text
from domain.mcp import AuthMode, McpServerStatus, ProtocolMode, TransportType
from domain.secret import Secret

MAX_SCOPED_SERVERS: Final = 32
MAX_HEADERS: Final = 50
NAME_MAX_CHARACTERS: Final = 64
URL_MAX_BYTES: Final = 4096
SECRET_MAX_BYTES: Final = 8 * 1024
MAX_ARGUMENTS: Final = 100
ARGUMENT_MAX_BYTES: Final = 4096

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")
_OURS: Final = frozenset({
    "accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "host", "last-event-id",
    "mcp-method", "mcp-name", "mcp-protocol-version", "mcp-session-id", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""Headers that belong to HTTP or to the protocol."""


class McpServerChanges(Struct, frozen=True, kw_only=True):
    """An `api_key` of None forgets the key; `headers` replace what is stored, where `MASKED` keeps a value."""

    name: str | UnsetType = UNSET
    url: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    transport_type: TransportType | UnsetType = UNSET
    auth_mode: AuthMode | UnsetType = UNSET
    protocol_mode: ProtocolMode | UnsetType = UNSET
    status: McpServerStatus | UnsetType = UNSET
    api_key: Secret | UnsetType | None = UNSET
    headers: dict[str, Secret] | UnsetType | None = UNSET
    oauth_client_id: str | UnsetType | None = UNSET
    oauth_client_secret: Secret | UnsetType | None = UNSET

    def check(self) -> None:
        """What can be checked without knowing what is stored."""
        if isinstance(self.name, str):
            check_server_name(self.name, "name")
        if isinstance(self.url, str):
            check_server_url(self.url, "url")
        if isinstance(self.description, str):
            check_text(self.description, "description", DESCRIPTION_MAX_BYTES)
        if self.transport_type is TransportType.STDIO:
            raise InvalidInput(
                "A server of the organization is reached over HTTP; stdio is for `mcpServers` in development",
                field="transport_type",
            )
        if isinstance(self.api_key, Secret):
            check_secret(self.api_key, "api_key")
        if isinstance(self.headers, Mapping):
            check_headers(self.headers, "headers")
        if isinstance(self.oauth_client_id, str):
            check_text(self.oauth_client_id, "oauth_client_id", 1024)
        if isinstance(self.oauth_client_secret, Secret):
            check_secret(self.oauth_client_secret, "oauth_client_secret")


class ScopedServer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An entry of `mcpServers` as clients write it. `args`, `env` and `command` belong to stdio, `url` and `headers` to http."""

    type: TransportType = TransportType.HTTP
    url: str | None = None
    headers: dict[str, str] | None = None
    api_key: str | None = None
    auth_mode: AuthMode | None = None
    protocol_mode: ProtocolMode = ProtocolMode.AUTO
    description: str | None = None
    oauth_provider_id: str | None = None
    tool_discovery: object = None
    act_as: Literal["none", "service"] | None = msgspec.field(name="actsAs", default=None)
    connect_in_chat: Literal["ask", "never"] | None = msgspec.field(name="connectInChat", default=None)
    deferred: bool | None = None
    command: str | None = None
    args: list[str] | None = None
    env: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"ScopedServer(type={self.type!r})"


def check_server_name(name: str, field: str) -> None:
    if len(name) > NAME_MAX_CHARACTERS:
        raise InputTooLarge(f"{field} may hold {NAME_MAX_CHARACTERS} characters", field=field)
    if not name.strip() or not name.isprintable():
        raise InvalidInput(f"{field} must be a name of printable characters", field=field)


def check_server_url(url: str, field: str) -> None:
    check_text(url, field, URL_MAX_BYTES)
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or not url.isprintable() or any(character.isspace() or character == "\\" for character in url):
        raise InvalidInput(f"{field} must be an http:// or https:// URL", field=field)
    if urlsplit(url).username is not None:
        raise InvalidInput(f"{field} must not carry a user name or password; use `headers`", field=field)


def same_origin(first: str | None, second: str | None) -> bool:
    if first is None or second is None:
        return first == second
    one, other = urlsplit(first), urlsplit(second)
    return (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)


def check_headers(headers: Mapping[str, Secret], field: str) -> None:
    check_count(list(headers), field, MAX_HEADERS)
    seen: set[str] = set()
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or name.lower() in seen:
            raise InvalidInput(f"{field} has a name that is no header name, or is there twice", field=field)
        if name.lower() in _OURS:
            raise InvalidInput(f"{field}: `{name.lower()}` is set by the protocol; leave it out", field=field)
        seen.add(name.lower())
        check_secret(value, f"{field}.{name}")


def check_secret(value: Secret, field: str) -> None:
    text = value.reveal()
    if len(text) > SECRET_MAX_BYTES:
        raise InputTooLarge(f"{field} may hold {SECRET_MAX_BYTES} bytes", field=field)
    if not _HEADER_VALUE.fullmatch(text):
        raise InvalidInput(f"{field} may only hold printable ASCII characters", field=field)


def parse_scoped_servers(servers: Mapping[str, object], *, allow_stdio: bool) -> dict[str, ScopedServer]:
    """Raises `InvalidInput`, naming the field; never with a value."""
    check_count(list(servers), "mcpServers", MAX_SCOPED_SERVERS)
    parsed: dict[str, ScopedServer] = {}
    for name, entry in servers.items():
        field = f"mcpServers.{name[:NAME_MAX_CHARACTERS]}"
        check_server_name(name, field)
        try:
            server = msgspec.convert(entry, ScopedServer)
        except msgspec.ValidationError as error:
            raise invalid_field(error, field) from None
        _check_scoped(server, field, allow_stdio=allow_stdio)
        parsed[name] = server
    return parsed


def _check_scoped(server: ScopedServer, field: str, *, allow_stdio: bool) -> None:
    if server.auth_mode is AuthMode.O_AUTH:
        raise InvalidInput(
            "OAuth needs a server of the organization: create it with POST /v1/mcp-servers and use `mcp:{id}`",
            field=f"{field}.auth_mode",
        )
    if server.type is TransportType.STDIO:
        _check_stdio(server, field, allow_stdio=allow_stdio)
        return
    if server.url is None:
        raise InvalidInput(f"{field}.url is required for a server of type `http`", field=f"{field}.url")
    check_server_url(server.url, f"{field}.url")
    for name in ("command", "args", "env"):
        if getattr(server, name) is not None:
            raise InvalidInput(f"{field}.{name} belongs to type `stdio`", field=f"{field}.{name}")
    headers = {name: Secret(value) for name, value in (server.headers or {}).items()}
    check_headers(headers, f"{field}.headers")
    if server.api_key is not None:
        check_secret(Secret(server.api_key), f"{field}.api_key")
        if any(name.lower() == "authorization" for name in headers):
            raise InvalidInput("Give either an api_key or an Authorization header", field=f"{field}.api_key")


def _check_stdio(server: ScopedServer, field: str, *, allow_stdio: bool) -> None:
    if not allow_stdio:
        raise InvalidInput(
            "Servers of type `stdio` run a program on the worker's machine; that is only possible in development, with "
            "MCP_ALLOW_STDIO=true",
            field=f"{field}.type",
        )
    if not server.command or not server.command.isprintable():
        raise InvalidInput(f"{field}.command is required for a server of type `stdio`", field=f"{field}.command")
    check_text(server.command, f"{field}.command", ARGUMENT_MAX_BYTES)
    check_count(server.args or [], f"{field}.args", MAX_ARGUMENTS)
    for index, argument in enumerate(server.args or []):
        check_text(argument, f"{field}.args[{index}]", ARGUMENT_MAX_BYTES)
    for name in ("url", "headers", "api_key"):
        if getattr(server, name) is not None:
            raise InvalidInput(f"{field}.{name} belongs to type `http`", field=f"{field}.{name}")
    check_count(list(server.env or {}), f"{field}.env", MAX_HEADERS)
    for name, value in (server.env or {}).items():
        if not _VARIABLE.fullmatch(name) or "\0" in value or len(value) > SECRET_MAX_BYTES:
            raise InvalidInput(f"{field}.env has a malformed name or value", field=f"{field}.env")
