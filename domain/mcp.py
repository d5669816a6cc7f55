"""MCP servers: the resource, the servers that a configuration brings along, and the ports between those who store and who call.

Two kinds. A server of the organization is a resource of its own, and `mcp:{id}` in a list of capabilities uses it. A scoped one
stands in the `mcpServers` of a harness, an agent or a session. Neither shows its secrets: values of headers, keys and tokens are
write-only, and read as `MASKED`. A configuration that a turn is pinned to names the secrets of its scoped servers by id only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal, Protocol
from uuid import UUID

from msgspec import Struct

from domain.config import NetworkAccessList, TurnConfig
from domain.errors import MalformedId
from domain.ids import Prefix, parse_id
from domain.secret import Secret

REF_PREFIX: Final = "mcp:"
SCOPED_PREFIX: Final = "mcp:scoped:"
MASKED: Final = "********"
"""What a stored secret reads as. Sent back, it keeps what is stored."""

MAX_SERVERS_PER_ORG: Final = 200
DISCOVERY_SECONDS: Final = 24 * 60 * 60
"""How long a list of tools counts as fresh."""
FAILURE_SECONDS: Final = 60
"""How long a server that failed is left alone."""


class AuthMode(StrEnum):
    NONE = "none"
    API_KEY = "api_key"
    O_AUTH = "o_auth"


class ProtocolMode(StrEnum):
    """`legacy` and `stable` are the revisions that begin with a handshake, `rc` is the stateless one (2026-07-28)."""

    AUTO = "auto"
    LEGACY = "legacy"
    STABLE = "stable"
    RC = "rc"


class TransportType(StrEnum):
    HTTP = "http"
    STDIO = "stdio"


class McpServerStatus(StrEnum):
    ACTIVE = "active"
    DISABLED = "disabled"
    ARCHIVED = "archived"
    DELETED = "deleted"


class McpServer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A server of the organization. The values of `headers` are masked."""

    id: str
    name: str
    url: str
    transport_type: TransportType
    auth_mode: AuthMode
    protocol_mode: ProtocolMode
    api_key_set: bool
    status: McpServerStatus
    created_at: str
    updated_at: str
    headers: dict[str, str] = {}
    description: str | None = None
    oauth_connected: bool = False
    """Whether there is a token to call it with; only ever true in auth mode `o_auth`."""
    archived_at: str | None = None


class SecretRef(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a value of a stored scoped server is kept."""

    secret: str


class StoredServer(Struct, frozen=True, kw_only=True):
    """An entry of `mcpServers` as it is stored, with the place of each secret."""

    type: TransportType = TransportType.HTTP
    url: str | None = None
    headers: dict[str, SecretRef] | None = None
    api_key: SecretRef | None = None
    protocol_mode: ProtocolMode = ProtocolMode.AUTO
    description: str | None = None
    command: str | None = None
    args: list[str] | None = None
    env: dict[str, SecretRef] | None = None


SECRET_MAPS: Final = ("headers", "env")
SECRET_FIELDS: Final = ("api_key",)


class ServerTarget(Struct, frozen=True, kw_only=True):
    """A server that a turn may call: where it is and how it is spoken to. Holds no secret, only where they are."""

    capability_id: str
    name: str
    org_id: int
    cache_key: str
    """Changes with everything that a list of tools may depend on."""
    transport: TransportType = TransportType.HTTP
    url: str | None = None
    protocol_mode: ProtocolMode = ProtocolMode.AUTO
    auth_mode: AuthMode = AuthMode.NONE
    description: str | None = None
    server_id: str | None = None
    """Public id of a server of the organization."""
    header_refs: dict[str, str] = {}
    env_refs: dict[str, str] = {}
    api_key_ref: str | None = None
    command: str | None = None
    args: tuple[str, ...] = ()


class OAuthGrant(Struct, frozen=True, kw_only=True):
    """What is needed to call a server in a person's name, and to renew that without the person. Never shown."""

    access_token: str
    token_endpoint: str
    client_id: str
    client_secret: str | None = None
    client_auth: Literal["none", "client_secret_post", "client_secret_basic"] = "none"
    refresh_token: str | None = None
    expires_at: float | None = None
    """Seconds since the epoch."""
    resource: str | None = None
    scope: str | None = None

    def __repr__(self) -> str:
        return "OAuthGrant(***)"


class RegisteredClient(Struct, frozen=True, kw_only=True):
    """A client that was registered with the authorization server by hand."""

    client_id: str
    client_secret: str | None = None

    def __repr__(self) -> str:
        return "RegisteredClient(***)"


class OAuthFlow(Struct, frozen=True, kw_only=True):
    """What the second half of an authorization needs. `grant` has no token yet."""

    grant: OAuthGrant
    verifier: str
    redirect_uri: str
    issuer: str | None = None
    is_issuer_required: bool = False

    def __repr__(self) -> str:
        return "OAuthFlow(***)"


class BegunAuthorization(Struct, frozen=True, kw_only=True):
    """`url` is for the person's browser. `flow` is an encoded `OAuthFlow`, to be kept where only `state` leads to it."""

    url: str
    state: str
    flow: bytes

    def __repr__(self) -> str:
        return "BegunAuthorization(***)"


class ServerCredentials(Struct, frozen=True, kw_only=True):
    headers: dict[str, Secret] = {}
    env: dict[str, Secret] = {}

    def secrets(self) -> list[str]:
        """Everything that must not come back in a server's answer."""
        values = [*self.headers.values(), *self.env.values()]
        return [secret.reveal().removeprefix("Bearer ") for secret in values if len(secret.reveal()) >= 6]


class DiscoveredTool(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`name` is the server's own. Texts and schema are cleaned."""

    name: str
    description: str
    parameters: dict[str, object]
    title: str | None = None
    read_only: bool = False
    idempotent: bool = False
    has_header_parameters: bool = False
    """Some arguments travel as headers too, which the client library reads from the server's list."""


class Discovery(Struct, frozen=True, kw_only=True):
    tools: list[DiscoveredTool]
    is_modern: bool
    """Whether the server speaks the stateless revision."""
    left_out: int = 0
    """Tools that are too many, too large or malformed."""


class KnownTools(Struct, frozen=True, kw_only=True):
    """What is stored about a server's tools; ages in seconds, None for what never happened."""

    discovery: Discovery | None = None
    age_seconds: float | None = None
    failed_seconds_ago: float | None = None
    problem: str | None = None

    @property
    def is_fresh(self) -> bool:
        return self.age_seconds is not None and self.age_seconds < DISCOVERY_SECONDS

    @property
    def rests(self) -> bool:
        return self.failed_seconds_ago is not None and self.failed_seconds_ago < FAILURE_SECONDS


class McpProblem(Exception):
    """A server cannot be used; the text is fit for a model and for people, and holds no secret."""


class McpDirectory(Protocol):
    """What steps know of servers; served by the database."""

    async def targets(self, session_id: str, config: TurnConfig) -> Sequence[ServerTarget]:
        """The servers that a session's configuration uses, in its order; without those that are gone or disabled."""
        ...

    async def credentials(self, target: ServerTarget) -> ServerCredentials:
        """Raises `McpProblem`."""
        ...

    async def grant(self, target: ServerTarget) -> OAuthGrant | None:
        """Raises `McpProblem` when it cannot be read."""
        ...

    async def renew(self, target: ServerTarget, spent: str, renewal: GrantRenewal) -> OAuthGrant | None:
        """The grant after the one whose access token is `spent`: renewed by somebody else meanwhile, or now, by `renewal`.

        Nobody else renews at the same time, because a refresh token often works once only.
        """
        ...

    async def known_tools(self, targets: Sequence[ServerTarget]) -> Mapping[str, KnownTools]:
        """By cache key."""
        ...

    async def keep_tools(self, target: ServerTarget, discovery: Discovery) -> None: ...

    async def note_failure(self, target: ServerTarget, problem: str) -> None: ...


class GrantRenewal(Protocol):
    async def __call__(self, grant: OAuthGrant) -> OAuthGrant | None:
        """None when the server wants the person again."""
        ...


class McpAuthorizer(Protocol):
    """Both raise `McpProblem`."""

    async def begin(
        self, target: ServerTarget, redirect_uri: str, client: RegisteredClient | None
    ) -> BegunAuthorization: ...

    async def finish(self, flow: OAuthFlow, code: str, issuer: str | None) -> OAuthGrant: ...


class ToolDiscovery(Protocol):
    async def __call__(self, target: ServerTarget, access: NetworkAccessList) -> Discovery:
        """Ask a server for its tools. Raises `McpProblem`."""
        ...


def server_key(ref: str) -> UUID | None:
    """The server that a capability reference names: `mcp:{uuid}`, `mcp:mcp_{hex}` or `mcp_{hex}`; None for any other text."""
    text = ref.removeprefix(REF_PREFIX)
    try:
        if text.startswith(f"{Prefix.MCP}_"):
            return parse_id(Prefix.MCP, text)
        return UUID(text) if ref.startswith(REF_PREFIX) and len(text) in (32, 36) else None
    except (MalformedId, ValueError):
        return None


def masked_servers(servers: Mapping[str, object] | None) -> dict[str, object] | None:
    """Stored scoped servers as they are shown."""
    if servers is None:
        return None
    return {name: _masked(entry) if isinstance(entry, dict) else entry for name, entry in servers.items()}


def _masked(entry: Mapping[str, object]) -> dict[str, object]:
    shown = dict(entry)
    for field in SECRET_MAPS:
        values = shown.get(field)
        if isinstance(values, dict):
            shown[field] = dict.fromkeys(values, MASKED)
    for field in SECRET_FIELDS:
        if shown.get(field) is not None:
            shown[field] = MASKED
    return shown
