"""Every setting: its name, type, default and meaning, in one place.

A field of `Settings` is the whole declaration; `SETTINGS` is read off the fields, and the loader, `everruns config`
and the test of the documentation walk it. A new setting is a new field (plus its line in docs/configuration.md and
.env.example, which a test asks for).

Decisions the code can't show:
- An empty or blank variable counts as unset, so that `NAME=` in a compose file means "the default".
- All problems are collected and reported together, one line each, naming the variable.
- Fields are resolved in the order they are declared: a derived default may only look at fields above it.
- Nothing is read from the process environment here; the composition root passes it in.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlsplit

import msgspec

from domain.providers import PROVIDER_TYPES
from domain.secret import Secret
from infra import encryption

MASK = "***"

Grade = Literal["dev", "poc", "preview", "prod"]
AuthMode = Literal["none"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["json", "console"]


class SettingsError(Exception):
    """One or more settings are wrong; each problem is one line that names its variable."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ListenAddress(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# --- Masking -------------------------------------------------------------------------------------------------------

# Greedy up to the last "@": a password may itself contain "@", "/" or "#" when somebody forgot to encode it, and
# hiding too much of a malformed URL is better than showing the tail of a password.
_URL_PASSWORD = re.compile(r"((?:^|(?<=[\s'\"=(,]))(?:[A-Za-z][\w+.-]*://)?[^\s:/@'\"]*):(?!//)\S*@")
_PASSWORD_PARAMETER = re.compile(r"(?i)\b(password|passwd|pwd|sslpassword|api_?key|token)=('[^']*'|[^&\s]+)")


def mask_passwords(text: str) -> str:
    """Hide the passwords of every URL (`user:password@host`) and `password=` parameter inside a text."""
    if "@" in text:
        text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    return _PASSWORD_PARAMETER.sub(rf"\1={MASK}", text)


# --- Kinds: how a text becomes a value -----------------------------------------------------------------------------


class _Refused(ValueError):
    """A ValueError whose text is fit to be shown: those of the standard library may repeat the value, secrets included."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """`parse` raises ValueError, or `_Refused` when there is more to say than what is accepted."""

    accepts: str
    parse: Callable[[str], object]


_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError from None


def _integer(minimum: int, maximum: int) -> Kind:
    def parse(text: str) -> int:
        # int() alone would also take "1_000", "٣" and a leading "+".
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ValueError
        number = int(text)
        if not minimum <= number <= maximum:
            raise ValueError
        return number

    return Kind(accepts=f"a whole number from {minimum} to {maximum}", parse=parse)


def _choice(options: tuple[str, ...]) -> Kind:
    def parse(text: str) -> str:
        if text.lower() not in options:
            raise ValueError
        return text.lower()

    return Kind(accepts=" or ".join(f"'{option}'" for option in options), parse=parse)


def _api_prefix(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", text):
        raise ValueError
    return text.rstrip("/")


def _web_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    if parts.username is not None:
        raise _Refused("it must not carry a user name or password")
    # urlsplit drops line breaks silently; `port` raises ValueError when it is not a port number.
    if any(character.isspace() for character in text) or parts.port == 0:
        raise ValueError
    return text.rstrip("/")


def _origins(text: str) -> tuple[str, ...]:
    origins: dict[str, None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        if "*" in item:
            raise _Refused("'*' is refused because credentials are allowed; list each origin")
        if urlsplit(_web_url(item)).path.strip("/"):
            raise _Refused("an origin has no path")
        origins[item.rstrip("/").lower()] = None
    return tuple(origins)


def _listen_address(text: str) -> ListenAddress:
    match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError
    if match["six"]:
        ipaddress.IPv6Address(match["six"])  # AddressValueError is a ValueError
    return ListenAddress(host=match["six"] or match["name"], port=int(match["port"]))


def _server_address(text: str) -> str:
    if _listen_address(text).port == 0:
        raise ValueError
    return text


def _opened_hosts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_opened_host(item) for item in map(str.strip, text.split(",")) if item))


def _opened_host(text: str) -> str:
    """In the spelling that hosts of URLs are compared in: lower case, an IPv6 address in brackets and as short as it gets."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?", text)
    if match is None or not 1 <= int(match["port"] or 1) <= 65535:
        raise _Refused("each is 'host' or 'host:port', without a scheme, path, range or '*'")
    if match["six"]:
        host = f"[{ipaddress.IPv6Address(match['six'])}]"
    else:
        host = match["name"].lower().removesuffix(".")
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
            host = str(ipaddress.IPv4Address(host))
    return f"{host}:{int(match['port'])}" if match["port"] else host


def _database_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("postgresql", "postgres") or any(character.isspace() for character in text):
        raise ValueError
    return text


def _encryption_key(text: str) -> Secret:
    key = Secret(text)
    try:
        encryption.key_id_of(key)
    except encryption.EncryptionKeyError as error:
        raise _Refused(str(error)) from None
    return key


def _existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise _Refused("there is no such file")
    return path


BOOLEAN = Kind(accepts="'true' or 'false'", parse=_boolean)
TEXT = Kind(accepts="a text", parse=str)
WEB_URL = Kind(accepts="an http:// or https:// URL, e.g. 'https://agents.example.com'", parse=_web_url)
PORT_ADDRESS = Kind(accepts="'host:port', e.g. '0.0.0.0:9000' or '[::1]:9000'", parse=_listen_address)
SERVER_ADDRESS = Kind(accepts="'host:port', e.g. 'localhost:7233'", parse=_server_address)
DATABASE_URL = Kind(accepts="'postgresql://user:password@host:5432/database'", parse=_database_url)
SECRET_TEXT = Kind(accepts="a text", parse=Secret)
ENCRYPTION_KEY = Kind(
    accepts="'key-id:base64 of 32 bytes', as `everruns secrets generate-key` prints it", parse=_encryption_key
)
EXISTING_FILE = Kind(accepts="the path of a readable file", parse=_existing_file)
API_PATH = Kind(accepts="a path such as '/api', or '/' for none", parse=_api_prefix)
ORIGINS = Kind(accepts="a comma-separated list of origins, e.g. 'https://app.example.com'", parse=_origins)
OPENED_HOSTS = Kind(accepts="a comma-separated list of hosts, e.g. 'wiki.internal,10.0.0.7:8080'", parse=_opened_hosts)
SECONDS = _integer(1, 86_400)
COUNT = _integer(1, 1_000_000)


# --- Declarations --------------------------------------------------------------------------------------------------

Values = Mapping[str, object]


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """A default that is worked out from settings above it, and the words that say how."""

    words: str
    compute: Callable[[Values], object]


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a field's annotation says about its setting."""

    name: str
    group: str
    meaning: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    default: str | Derived | None = None
    secret: bool = False


class Setting(About, frozen=True, kw_only=True):
    """One environment variable, as `everruns config`, the documentation and its test see it."""

    field: str

    @property
    def default_words(self) -> str:
        """The default as a person reads it; empty when the setting has none."""
        return self.default.words if isinstance(self.default, Derived) else self.default or ""


def _default_grade(values: Values) -> object:
    return "dev" if values["dev_mode"] else "prod"


def _default_log_format(values: Values) -> object:
    return "console" if values["deployment_grade"] == "dev" else "json"


def _default_temporal_tls(values: Values) -> object:
    return any(
        values[field] is not None
        for field in ("temporal_api_key", "temporal_tls_cert", "temporal_tls_key", "temporal_tls_ca")
    )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded settings. `repr` masks secrets, so that a log line or a traceback can't leak them."""

    dev_mode: Annotated[
        bool,
        About(
            name="DEV_MODE",
            group="Deployment",
            kind=BOOLEAN,
            default="false",
            meaning="Run everything in one process with embedded PostgreSQL and Temporal servers.",
        ),
    ]
    deployment_grade: Annotated[
        Grade,
        About(
            name="DEPLOYMENT_GRADE",
            group="Deployment",
            kind=_choice(get_args(Grade)),
            default=Derived(words="`dev` with DEV_MODE, otherwise `prod`", compute=_default_grade),
            meaning="How serious this deployment is; `dev` allows shortcuts that are refused elsewhere.",
        ),
    ]
    public_app_url: Annotated[
        str,
        About(
            name="PUBLIC_APP_URL",
            group="HTTP",
            kind=WEB_URL,
            default="http://localhost:9300",
            meaning="The address people and clients reach this deployment at.",
        ),
    ]
    frontend_url: Annotated[
        str,
        About(
            name="FRONTEND_URL",
            group="HTTP",
            kind=WEB_URL,
            default=Derived(words="PUBLIC_APP_URL", compute=lambda values: values["public_app_url"]),
            meaning="The address of the management UI, for links and redirects.",
        ),
    ]
    api_prefix: Annotated[
        str,
        About(
            name="API_PREFIX",
            group="HTTP",
            kind=API_PATH,
            default="/api",
            meaning="The path every API route is served below; `/` for none.",
        ),
    ]
    http_addr: Annotated[
        ListenAddress,
        About(
            name="HTTP_ADDR",
            aliases=("ADDR",),
            group="HTTP",
            kind=PORT_ADDRESS,
            default="0.0.0.0:9000",
            meaning="The address and port the API listens on.",
        ),
    ]
    cors_allowed_origins: Annotated[
        tuple[str, ...],
        About(
            name="CORS_ALLOWED_ORIGINS",
            group="HTTP",
            kind=ORIGINS,
            default="",
            meaning="Origins of browser pages that may call the API with credentials, comma-separated.",
        ),
    ]
    auth_mode: Annotated[
        AuthMode,
        About(
            name="AUTH_MODE",
            group="Authentication",
            kind=_choice(get_args(AuthMode)),
            default="none",
            meaning="Who may call the API; `none` makes every caller an anonymous admin and needs grade `dev`.",
        ),
    ]
    auth_base_url: Annotated[
        str,
        About(
            name="AUTH_BASE_URL",
            group="Authentication",
            kind=WEB_URL,
            default=Derived(
                words="PUBLIC_APP_URL followed by API_PREFIX",
                compute=lambda values: f"{values['public_app_url']}{values['api_prefix']}",
            ),
            meaning="The address sign-in pages and callbacks are served at.",
        ),
    ]
    database_url: Annotated[
        str | None,
        About(
            name="DATABASE_URL",
            group="Database",
            kind=DATABASE_URL,
            meaning="The PostgreSQL 18 database; required unless DEV_MODE embeds one.",
        ),
    ]
    database_unpooled_url: Annotated[
        str | None,
        About(
            name="DATABASE_UNPOOLED_URL",
            group="Database",
            kind=DATABASE_URL,
            default=Derived(words="DATABASE_URL", compute=lambda values: values["database_url"]),
            meaning="A direct connection to the same database for LISTEN, which transaction poolers break.",
        ),
    ]
    database_pool_size: Annotated[
        int,
        About(
            name="DATABASE_POOL_SIZE",
            group="Database",
            kind=_integer(1, 1000),
            default="10",
            meaning="The largest number of pooled database connections a process opens.",
        ),
    ]
    default_model: Annotated[
        str | None,
        About(
            name="DEFAULT_MODEL",
            group="Models",
            kind=TEXT,
            meaning="The model of conversations for which nothing else names one, by its provider's name for it.",
        ),
    ]
    default_openai_api_key: Annotated[
        Secret | None,
        About(
            name="DEFAULT_OPENAI_API_KEY",
            group="Models",
            kind=SECRET_TEXT,
            secret=True,
            meaning="Used for OpenAI providers that have no key of their own.",
        ),
    ]
    default_anthropic_api_key: Annotated[
        Secret | None,
        About(
            name="DEFAULT_ANTHROPIC_API_KEY",
            group="Models",
            kind=SECRET_TEXT,
            secret=True,
            meaning="Used for Anthropic providers that have no key of their own.",
        ),
    ]
    default_gemini_api_key: Annotated[
        Secret | None,
        About(
            name="DEFAULT_GEMINI_API_KEY",
            group="Models",
            kind=SECRET_TEXT,
            secret=True,
            meaning="Used for Google Gemini providers that have no key of their own.",
        ),
    ]
    secrets_encryption_key: Annotated[
        Secret | None,
        About(
            name=encryption.CURRENT_KEY,
            group="Secrets",
            kind=ENCRYPTION_KEY,
            secret=True,
            meaning="The key that encrypts secrets in the database, as `kek-v1:<base64 of 32 bytes>`.",
        ),
    ]
    secrets_encryption_key_previous: Annotated[
        Secret | None,
        About(
            name=encryption.PREVIOUS_KEY,
            group="Secrets",
            kind=ENCRYPTION_KEY,
            secret=True,
            meaning="The key before that one, while a rotation lasts: it still decrypts.",
        ),
    ]
    sse_realtime_cycle_seconds: Annotated[
        int,
        About(
            name="SSE_REALTIME_CYCLE_SECS",
            group="Streaming",
            kind=SECONDS,
            default="300",
            meaning="How long a session stream lives before the client is asked to reconnect.",
        ),
    ]
    sse_monitoring_cycle_seconds: Annotated[
        int,
        About(
            name="SSE_MONITORING_CYCLE_SECS",
            group="Streaming",
            kind=SECONDS,
            default="600",
            meaning="How long a monitoring stream lives before the client is asked to reconnect.",
        ),
    ]
    sse_heartbeat_interval_seconds: Annotated[
        int,
        About(
            name="SSE_HEARTBEAT_INTERVAL_SECS",
            group="Streaming",
            kind=SECONDS,
            default="30",
            meaning="The pause between heartbeat comments on a silent stream.",
        ),
    ]
    sse_global_max: Annotated[
        int,
        About(
            name="SSE_GLOBAL_MAX",
            group="Streaming",
            kind=COUNT,
            default="10000",
            meaning="Open streams an API process accepts.",
        ),
    ]
    sse_per_session_max: Annotated[
        int,
        About(
            name="SSE_PER_SESSION_MAX",
            group="Streaming",
            kind=COUNT,
            default="5",
            meaning="Open streams per session in an API process.",
        ),
    ]
    sse_per_org_max: Annotated[
        int,
        About(
            name="SSE_PER_ORG_MAX",
            group="Streaming",
            kind=COUNT,
            default="1000",
            meaning="Open streams per organization in an API process.",
        ),
    ]
    temporal_address: Annotated[
        str,
        About(
            name="TEMPORAL_ADDRESS",
            group="Temporal",
            kind=SERVER_ADDRESS,
            default="localhost:7233",
            meaning="The Temporal frontend.",
        ),
    ]
    temporal_namespace: Annotated[
        str,
        About(
            name="TEMPORAL_NAMESPACE",
            group="Temporal",
            kind=TEXT,
            default="default",
            meaning="The Temporal namespace that holds our workflows.",
        ),
    ]
    temporal_api_key: Annotated[
        str | None,
        About(
            name="TEMPORAL_API_KEY",
            group="Temporal",
            kind=TEXT,
            secret=True,
            meaning="The API key for Temporal Cloud.",
        ),
    ]
    temporal_tls_cert: Annotated[
        Path | None,
        About(
            name="TEMPORAL_TLS_CERT",
            group="Temporal",
            kind=EXISTING_FILE,
            meaning="The client certificate file (PEM) for mutual TLS; goes with TEMPORAL_TLS_KEY.",
        ),
    ]
    temporal_tls_key: Annotated[
        Path | None,
        About(
            name="TEMPORAL_TLS_KEY",
            group="Temporal",
            kind=EXISTING_FILE,
            meaning="The private key file (PEM) of TEMPORAL_TLS_CERT.",
        ),
    ]
    temporal_tls_ca: Annotated[
        Path | None,
        About(
            name="TEMPORAL_TLS_CA",
            group="Temporal",
            kind=EXISTING_FILE,
            meaning="The file (PEM) of the authority that signed the server's certificate, when it is a private one.",
        ),
    ]
    temporal_tls_server_name: Annotated[
        str | None,
        About(
            name="TEMPORAL_TLS_SERVER_NAME",
            group="Temporal",
            kind=TEXT,
            meaning="The name the server's certificate carries, when it differs from the host in TEMPORAL_ADDRESS.",
        ),
    ]
    temporal_tls: Annotated[
        bool,
        About(
            name="TEMPORAL_TLS",
            group="Temporal",
            kind=BOOLEAN,
            default=Derived(
                words="`true` when an API key or a TLS file is given, otherwise `false`",
                compute=_default_temporal_tls,
            ),
            meaning="Encrypt the connection to Temporal.",
        ),
    ]
    temporal_turns_queue: Annotated[
        str,
        About(
            name="TEMPORAL_TURNS_QUEUE",
            group="Temporal",
            kind=TEXT,
            default="everruns-turns",
            meaning="The task queue of turn workflows.",
        ),
    ]
    temporal_steps_queue: Annotated[
        str,
        About(
            name="TEMPORAL_STEPS_QUEUE",
            group="Temporal",
            kind=TEXT,
            default=Derived(words="TEMPORAL_TURNS_QUEUE", compute=lambda values: values["temporal_turns_queue"]),
            meaning="The task queue of step activities; a queue of its own lets steps scale apart, for a hop more per step.",
        ),
    ]
    worker_max_concurrent_steps: Annotated[
        int,
        About(
            name="WORKER_MAX_CONCURRENT_STEPS",
            group="Worker",
            kind=COUNT,
            default="100",
            meaning="Steps a worker process runs at the same time.",
        ),
    ]
    worker_build_id: Annotated[
        str | None,
        About(
            name="WORKER_BUILD_ID",
            group="Worker",
            kind=TEXT,
            meaning="The version of this worker's code. With it, a running turn stays on the version it began with.",
        ),
    ]
    reason_stall_seconds: Annotated[
        int,
        About(
            name="REASON_STALL_SECS",
            group="Worker",
            kind=SECONDS,
            default="120",
            meaning="The longest silence in the middle of a model call before it is tried again.",
        ),
    ]
    reason_timeout_seconds: Annotated[
        int,
        About(
            name="REASON_TIMEOUT_SECS",
            group="Worker",
            kind=SECONDS,
            default="900",
            meaning="The longest a single model call may take.",
        ),
    ]
    client_tool_timeout_seconds: Annotated[
        int,
        About(
            name="CLIENT_TOOL_TIMEOUT_SECS",
            group="Worker",
            kind=SECONDS,
            default="300",
            meaning="How long a turn waits for the result of a client-side tool.",
        ),
    ]
    act_max_tool_concurrency: Annotated[
        int,
        About(
            name="ACT_MAX_TOOL_CONCURRENCY",
            group="Worker",
            kind=_integer(1, 1000),
            default="32",
            meaning="Tool calls of one turn that run at the same time.",
        ),
    ]
    web_fetch_allow_private_hosts: Annotated[
        tuple[str, ...],
        About(
            name="WEB_FETCH_ALLOW_PRIVATE_HOSTS",
            group="Worker",
            kind=OPENED_HOSTS,
            default="",
            meaning="Hosts, as `host` or `host:port`, that `web_fetch` may reach although their addresses are private.",
        ),
    ]
    mcp_allow_private_hosts: Annotated[
        tuple[str, ...],
        About(
            name="MCP_ALLOW_PRIVATE_HOSTS",
            group="Worker",
            kind=OPENED_HOSTS,
            default="",
            meaning="Hosts, as `host` or `host:port`, that MCP servers may be at although their addresses are private.",
        ),
    ]
    mcp_allow_stdio: Annotated[
        bool,
        About(
            name="MCP_ALLOW_STDIO",
            group="Worker",
            kind=BOOLEAN,
            default="false",
            meaning="Let `mcpServers` of type `stdio` run programs on the worker's machine; only in grade `dev`.",
        ),
    ]
    log_level: Annotated[
        LogLevel,
        About(
            name="LOG_LEVEL",
            group="Logging",
            kind=_choice(get_args(LogLevel)),
            default="info",
            meaning="The least serious log lines that are written.",
        ),
    ]
    log_format: Annotated[
        LogFormat,
        About(
            name="LOG_FORMAT",
            group="Logging",
            kind=_choice(get_args(LogFormat)),
            default=Derived(words="`console` in grade `dev`, otherwise `json`", compute=_default_log_format),
            meaning="One JSON object per line, or lines for people.",
        ),
    ]

    @property
    def default_keys(self) -> dict[str, Secret]:
        """The keys of providers that have none of their own, by provider type."""
        keys = {
            name: getattr(self, known.default_key.lower())
            for name, known in PROVIDER_TYPES.items()
            if known.default_key
        }
        return {name: key for name, key in keys.items() if key is not None}

    def __repr__(self) -> str:
        shown = (f"{setting.field}={display(setting, getattr(self, setting.field))!r}" for setting in SETTINGS)
        return f"Settings({', '.join(shown)})"

    __str__ = __repr__


def _declared_settings() -> Iterator[Setting]:
    for field, hint in get_type_hints(Settings, include_extras=True).items():
        assert get_origin(hint) is Annotated
        about = next(extra for extra in get_args(hint)[1:] if isinstance(extra, About))
        yield Setting(field=field, **msgspec.structs.asdict(about))


SETTINGS: tuple[Setting, ...] = tuple(_declared_settings())


def display(setting: Setting, value: object) -> str:
    """A value as it would be written in the environment, with what must stay secret masked; empty for none."""
    if value is None:
        return ""
    if setting.secret:
        return MASK
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return mask_passwords(str(value))


# --- Loading -------------------------------------------------------------------------------------------------------


class Source(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["environment", "default", "derived", "unset", "invalid"]
    """`unset`: the setting has no default. `invalid`: see the problems."""
    variable: str = ""
    """The variable that was read: the setting's name or one of its aliases."""

    def __str__(self) -> str:
        return f"{self.kind} {self.variable}".rstrip()


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    setting: Setting
    source: Source
    shown: str


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about an environment, also when it is wrong: `everruns config` explains both."""

    rows: tuple[Resolved, ...]
    problems: tuple[str, ...]
    settings: Settings | None


def load_settings(environ: Mapping[str, str]) -> Settings:
    resolution = resolve_settings(environ)
    if resolution.settings is None:
        raise SettingsError(resolution.problems)
    return resolution.settings


def resolve_settings(environ: Mapping[str, str]) -> Resolution:
    values: dict[str, object] = {}
    sources: dict[str, Source] = {}
    problems: list[str] = []
    for setting in SETTINGS:
        variable, text = _given(setting, environ)
        try:
            if variable:
                values[setting.field] = setting.kind.parse(text)
                source = Source(kind="environment", variable=variable)
            elif isinstance(setting.default, Derived):
                # A KeyError means that a setting it derives from is wrong, which has been reported already.
                values[setting.field] = setting.default.compute(values)
                source = Source(kind="derived" if values[setting.field] is not None else "unset")
            elif setting.default is not None:
                values[setting.field] = setting.kind.parse(setting.default)
                source = Source(kind="default")
            else:
                values[setting.field] = None
                source = Source(kind="unset")
        except ValueError as error:
            problems.append(_problem(setting, variable, text, error))
            source = Source(kind="invalid", variable=variable)
        except KeyError:
            source = Source(kind="invalid")
        sources[setting.field] = source
    problems.extend(_contradictions(values, sources))
    return Resolution(
        rows=tuple(
            Resolved(
                setting=setting,
                source=sources[setting.field],
                shown=display(setting, values.get(setting.field)),
            )
            for setting in SETTINGS
        ),
        problems=tuple(problems),
        settings=None if problems else msgspec.convert(values, Settings),
    )


def _given(setting: Setting, environ: Mapping[str, str]) -> tuple[str, str]:
    """The first variable that holds something, the name before its aliases."""
    for variable in (setting.name, *setting.aliases):
        text = environ.get(variable, "").strip()
        if text:
            return variable, text
    return "", ""


def _quoted(setting: Setting, text: str) -> str:
    """What was given, on one line, short, and without secrets."""
    if setting.secret:
        return MASK
    # Masked before it is cut: the "@" that ends a password may lie behind the cut.
    masked = mask_passwords(text)
    return repr(masked if len(masked) <= 120 else masked[:117] + "...")


def _problem(setting: Setting, variable: str, text: str, error: ValueError) -> str:
    reason = f" ({error})" if isinstance(error, _Refused) else ""
    return f"{variable}: {_quoted(setting, text)} is not accepted{reason}; expected {setting.kind.accepts}"


# --- Settings that do not go together ------------------------------------------------------------------------------


def _contradictions(values: Values, sources: Mapping[str, Source]) -> Iterator[str]:
    if values.get("dev_mode") is False and "database_url" in values and values["database_url"] is None:
        yield f"DATABASE_URL: it is not set; expected {DATABASE_URL.accepts}, or DEV_MODE=true for an embedded one"

    if (listener_url := values.get("database_unpooled_url")) is not None:
        sign = pooler_sign(str(listener_url))
        if sign is not None:
            shown = mask_passwords(str(listener_url))
            given = "it is not set and DATABASE_URL" if sources["database_unpooled_url"].kind == "derived" else "it"
            yield (
                f"DATABASE_UNPOOLED_URL: {given} is {shown!r}, which looks pooled ({sign}), and LISTEN is lost behind a "
                "transaction pooler; expected a direct connection to the same database (usually port 5432)"
            )

    grade = values.get("deployment_grade")
    if values.get("auth_mode") == "none" and grade is not None and grade != "dev":
        yield (
            f"AUTH_MODE: 'none' makes every caller an anonymous admin and is refused in grade '{grade}'; for local "
            "development set DEPLOYMENT_GRADE=dev, or DEV_MODE=true without DEPLOYMENT_GRADE"
        )

    if values.get("mcp_allow_stdio") is True and grade is not None and grade != "dev":
        yield (
            f"MCP_ALLOW_STDIO: 'true' lets every caller of the API run programs on the workers and is refused in grade "
            f"'{grade}'; expected 'false'"
        )

    yield from _contradicting_keys(values)

    tls_files = ("temporal_tls_cert", "temporal_tls_key", "temporal_tls_ca")
    if all(field in values for field in tls_files):
        certificate, key, _ = (values[field] for field in tls_files)
        if (certificate is None) != (key is None):
            missing, present = (
                ("TEMPORAL_TLS_CERT", "TEMPORAL_TLS_KEY")
                if certificate is None
                else ("TEMPORAL_TLS_KEY", "TEMPORAL_TLS_CERT")
            )
            yield f"{missing}: it is not set although {present} is; expected both files or neither"
        if values.get("temporal_tls") is False and any(values[field] is not None for field in tls_files):
            yield "TEMPORAL_TLS: 'false' contradicts the TLS files that are set; expected 'true', or no TLS files"


def _contradicting_keys(values: Values) -> Iterator[str]:
    """Each key is known to be well-formed by now, or is not among the values."""
    fields = ("secrets_encryption_key", "secrets_encryption_key_previous")
    if not all(field in values for field in fields):
        return
    current, previous = (value if isinstance(value, Secret) else None for value in map(values.get, fields))
    try:
        encryption.Keyring.of(current, previous)
    except encryption.EncryptionKeyError as error:
        yield f"{error}; expected two different keys, or only {encryption.CURRENT_KEY}"


def pooler_sign(database_url: str) -> str | None:
    """What makes a URL look like a connection pooler's, or None."""
    parts = urlsplit(database_url)
    hosts = parts.netloc.rpartition("@")[2].lower().split(",")
    parameters = [(name.lower(), value.lower()) for name, value in parse_qsl(parts.query)]
    hosts += [host for name, value in parameters if name == "host" for host in value.split(",")]
    for host in hosts:
        for word in ("pooler", "pgbouncer"):
            if word in host:
                return f"its host contains '{word}'"
    if any(host.endswith(":6432") for host in hosts) or ("port", "6432") in parameters:
        return "port 6432 is PgBouncer's"
    if ("pgbouncer", "true") in parameters:
        return "it says pgbouncer=true"
    return None
