import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli.config_command import print_config
from infra.settings import (
    MASK,
    SETTINGS,
    TEXT,
    Derived,
    ListenAddress,
    Setting,
    Settings,
    SettingsError,
    load_settings,
    mask_passwords,
    pooler_sign,
    resolve_settings,
)

ROOT = Path(__file__).resolve().parents[2]
DEV = {"DEV_MODE": "true"}
PROD_DATABASE = {"DATABASE_URL": "postgresql://everruns:hunter2@db:5432/everruns"}


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    return caught.value.problems


def problem(environ: dict[str, str]) -> str:
    (only,) = problems(DEV | environ)
    return only


# --- Values ---------------------------------------------------------------------------------------------------------


def test_dev_mode_alone_is_enough_to_start() -> None:
    settings = load_settings(DEV)
    assert settings.deployment_grade == "dev"
    assert settings.database_url is None
    assert settings.log_format == "console"
    assert str(settings.http_addr) == "0.0.0.0:9000"
    assert settings.auth_base_url == "http://localhost:9300/api"


def test_an_empty_or_blank_variable_counts_as_unset() -> None:
    blank = {setting.name: " \t" for setting in SETTINGS}
    assert load_settings(DEV | {name: text for name, text in blank.items() if name != "DEV_MODE"}) == load_settings(DEV)


def test_derived_defaults_follow_the_settings_they_are_derived_from() -> None:
    settings = load_settings(
        DEV
        | PROD_DATABASE
        | {"PUBLIC_APP_URL": "https://agents.example.com/", "API_PREFIX": "/", "TEMPORAL_API_KEY": "key"}
    )
    assert settings.frontend_url == "https://agents.example.com"
    assert settings.auth_base_url == "https://agents.example.com"
    assert settings.database_unpooled_url == settings.database_url
    assert settings.temporal_tls is True
    assert load_settings(DEV | {"DEPLOYMENT_GRADE": "dev", "TEMPORAL_TLS": "off"}).temporal_tls is False


def test_log_format_is_json_outside_grade_dev() -> None:
    rows = {row.setting.name: row for row in resolve_settings(PROD_DATABASE).rows}
    assert rows["LOG_FORMAT"].shown == "json"
    assert rows["DEPLOYMENT_GRADE"].shown == "prod"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:9000", "::1", 9000), ("my-host.local:0", "my-host.local", 0)],
)
def test_listen_address_is_read_and_written_back(text: str, host: str, port: int) -> None:
    address = load_settings(DEV | {"HTTP_ADDR": text}).http_addr
    assert address == ListenAddress(host=host, port=port)
    assert str(address) == text


@given(st.ip_addresses(v=6), st.integers(0, 65535))
def test_every_ipv6_listen_address_round_trips(address: object, port: int) -> None:
    assert str(load_settings(DEV | {"HTTP_ADDR": f"[{address}]:{port}"}).http_addr) == f"[{address}]:{port}"


def test_an_alias_is_read_and_named_as_the_source_and_the_real_name_wins() -> None:
    (row,) = (row for row in resolve_settings(DEV | {"ADDR": "[::1]:1"}).rows if row.setting.name == "HTTP_ADDR")
    assert (row.shown, row.source.kind, row.source.variable) == ("[::1]:1", "environment", "ADDR")
    assert load_settings(DEV | {"ADDR": "a:1", "HTTP_ADDR": "b:2"}).http_addr.host == "b"


def test_every_source_kind_is_told_apart() -> None:
    resolution = resolve_settings(DEV | {"SSE_GLOBAL_MAX": "x"})
    kinds = {row.setting.name: row.source.kind for row in resolution.rows}
    assert kinds["DEV_MODE"] == "environment"
    assert kinds["API_PREFIX"] == "default"
    assert kinds["DEPLOYMENT_GRADE"] == "derived"
    assert kinds["TEMPORAL_API_KEY"] == "unset"
    assert kinds["SSE_GLOBAL_MAX"] == "invalid"


def test_origins_are_split_normalised_and_never_a_wildcard() -> None:
    settings = load_settings(DEV | {"CORS_ALLOWED_ORIGINS": "https://A.example.com/, http://localhost:9300,,"})
    assert settings.cors_allowed_origins == ("https://a.example.com", "http://localhost:9300")
    assert load_settings(DEV).cors_allowed_origins == ()
    assert "'*' is refused because credentials are allowed" in problem({"CORS_ALLOWED_ORIGINS": "*"})
    assert "an origin has no path" in problem({"CORS_ALLOWED_ORIGINS": "https://a.example.com/app"})


# --- Problems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DEPLOYMENT_GRADE", "production"),
        ("AUTH_MODE", "full"),
        ("LOG_LEVEL", "loud"),
        ("HTTP_ADDR", "9000"),
        ("HTTP_ADDR", "::1:9000"),
        ("HTTP_ADDR", "[fe80::1::2]:9000"),
        ("HTTP_ADDR", "localhost:65536"),
        ("TEMPORAL_ADDRESS", "localhost:0"),
        ("SSE_GLOBAL_MAX", "1_000"),
        ("SSE_GLOBAL_MAX", "0"),
        ("SSE_GLOBAL_MAX", "9" * 5000),
        ("DATABASE_POOL_SIZE", "ten"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("PUBLIC_APP_URL", "agents.example.com"),
        ("PUBLIC_APP_URL", "https://user:hunter2@agents.example.com"),
        ("PUBLIC_APP_URL", "https://host:99999"),
        ("API_PREFIX", "api"),
        ("TEMPORAL_TLS_CA", "/does/not/exist.pem"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable_and_what_is_accepted(variable: str, text: str) -> None:
    line = problem({variable: text})
    assert line.startswith(f"{variable}: ")
    assert "expected" in line
    assert "\n" not in line
    assert len(line) < 400
    assert "hunter2" not in line


def test_all_problems_are_reported_together_one_line_each() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"SSE_GLOBAL_MAX": "x", "LOG_LEVEL": "y"})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "SSE_GLOBAL_MAX",
        "LOG_LEVEL",
        "DATABASE_URL",
        "AUTH_MODE",
    ]


def test_a_wrong_setting_is_not_reported_again_by_those_derived_from_it() -> None:
    assert problem({"PUBLIC_APP_URL": "nonsense"}).startswith("PUBLIC_APP_URL")
    assert [line.partition(":")[0] for line in problems({"DEV_MODE": "perhaps"})] == ["DEV_MODE"]


def test_anonymous_admin_is_refused_outside_grade_dev_and_the_way_out_is_named() -> None:
    (line,) = problems(PROD_DATABASE)
    assert line.startswith("AUTH_MODE: 'none'")
    assert "DEPLOYMENT_GRADE=dev" in line
    assert "DEV_MODE=true" in line
    assert load_settings(PROD_DATABASE | {"DEPLOYMENT_GRADE": "dev"}).auth_mode == "none"


def test_a_database_is_required_unless_dev_mode_embeds_one() -> None:
    (line,) = problems({"DEPLOYMENT_GRADE": "dev"})
    assert line.startswith("DATABASE_URL: it is not set")
    assert "DEV_MODE=true" in line


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@db:6432/x",
        "postgresql://u:hunter2@ep-1-pooler.eu.example.com/x",
        "postgresql://u:hunter2@pgbouncer/x",
        "postgresql://u:hunter2@db/x?sslmode=require&pgbouncer=true",
        "postgresql:///x?host=db&port=6432",
    ],
)
def test_a_pooled_listener_url_is_refused_with_guidance(url: str) -> None:
    given_directly = problem({"DATABASE_UNPOOLED_URL": url})
    given_by_default = problem({"DATABASE_URL": url})
    for line in (given_directly, given_by_default):
        assert line.startswith("DATABASE_UNPOOLED_URL: ")
        assert "expected a direct connection" in line
        assert "hunter2" not in line
    assert "DATABASE_URL" in given_by_default
    assert load_settings(DEV | {"DATABASE_URL": url, "DATABASE_UNPOOLED_URL": "postgresql://db:5432/x"})


@pytest.mark.parametrize("url", ["postgresql://pooler:pgbouncer@db:5432/x", "postgres://[::1]:5432/x", "postgres:///x"])
def test_a_direct_url_does_not_look_pooled(url: str) -> None:
    assert pooler_sign(url) is None


def test_tls_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.write_text("pem")
    assert problem({"TEMPORAL_TLS_CERT": str(file)}).startswith("TEMPORAL_TLS_KEY: it is not set")
    assert problem({"TEMPORAL_TLS_KEY": str(file)}).startswith("TEMPORAL_TLS_CERT: it is not set")
    assert problem({"TEMPORAL_TLS_CA": str(file), "TEMPORAL_TLS": "false"}).startswith("TEMPORAL_TLS: 'false'")
    assert load_settings(DEV | {"TEMPORAL_TLS_CA": str(file)}).temporal_tls is True


@given(st.dictionaries(st.sampled_from([setting.name for setting in SETTINGS]), st.text(), max_size=6))
def test_any_environment_either_loads_or_is_explained_line_by_line(environ: dict[str, str]) -> None:
    resolution = resolve_settings(environ)
    assert (resolution.settings is None) == bool(resolution.problems)
    assert len(resolution.rows) == len(SETTINGS)
    variables = {setting.name for setting in SETTINGS}
    for line in resolution.problems:
        assert len(line.splitlines()) == 1
        assert line.partition(":")[0] in variables


# --- Secrets --------------------------------------------------------------------------------------------------------


# Starts with something that is nowhere else, so that it can't be found by chance.
passwords = st.text(st.characters(min_codepoint=33, max_codepoint=126)).map("hunter2".__add__)


@given(
    passwords,
    st.sampled_from(["postgresql", "mysql", "https", ""]),
)
def test_no_password_of_a_url_is_ever_shown(password: str, scheme: str) -> None:
    url = f"{scheme}://user:{password}@host:5432/database" if scheme else f"user:{password}@host/database"
    assert password not in mask_passwords(url)
    resolution = resolve_settings(DEV | {"DATABASE_URL": url, "PUBLIC_APP_URL": url})
    assert password not in " ".join([*resolution.problems, *(row.shown for row in resolution.rows)])


@given(passwords)
def test_no_secret_is_ever_shown(secret: str) -> None:
    environ = DEV | {setting.name: secret for setting in SETTINGS if setting.secret and setting.kind is TEXT}
    output = io.StringIO()
    assert print_config(environ, console=Console(file=output))
    assert secret not in output.getvalue()
    settings = load_settings(environ)
    assert settings.temporal_api_key == secret
    assert secret not in repr(settings)
    assert secret not in str(settings)
    assert MASK in repr(settings)


@pytest.mark.parametrize("text", ["at 12:30 bob@example.com wrote", "http://localhost:9300/api", "a:b", ""])
def test_masking_leaves_ordinary_text_alone(text: str) -> None:
    assert mask_passwords(text) == text


# --- Listing --------------------------------------------------------------------------------------------------------


def test_config_prints_every_setting_one_per_line_when_not_a_terminal() -> None:
    output = io.StringIO()
    assert not print_config(PROD_DATABASE, console=Console(file=output, width=20))
    lines = output.getvalue().splitlines()
    assert [line.partition("=")[0] for line in lines[: len(SETTINGS)]] == [setting.name for setting in SETTINGS]
    assert lines[-1].startswith("# AUTH_MODE: ")
    assert f"DATABASE_URL=postgresql://everruns:{MASK}@db:5432/everruns  # environment; default: –" in lines


def test_config_prints_tables_on_a_terminal() -> None:
    output = io.StringIO()
    assert print_config(DEV | {"ADDR": "[::1]:9"}, console=Console(file=output, force_terminal=True, width=160))
    shown = output.getvalue()
    assert all(setting.name in shown for setting in SETTINGS)
    assert "environment ADDR" in shown
    assert "[::1]:9" in shown


# --- Completeness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_documented_with_its_default(setting: Setting) -> None:
    names = " or ".join(f"`{name}`" for name in (setting.name, *setting.aliases))
    derived = isinstance(setting.default, Derived)
    default = setting.default_words if derived or not setting.default_words else f"`{setting.default_words}`"
    row = f"| {names} | {default or '–'} | {setting.meaning}{' Secret.' if setting.secret else ''} |"
    assert row in (ROOT / "docs" / "configuration.md").read_text(), "docs/configuration.md"

    example = f"# {setting.name}={'' if derived else setting.default_words}"
    assert example in (ROOT / ".env.example").read_text().splitlines(), ".env.example"


def test_nothing_is_documented_that_does_not_exist() -> None:
    known = {setting.name for setting in SETTINGS}
    documented = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    example = re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert set(documented) == known
    assert set(example) == known


def test_settings_are_declared_soundly() -> None:
    names = [name for setting in SETTINGS for name in (setting.name, *setting.aliases)]
    assert len(names) == len(set(names))
    assert [setting.field for setting in SETTINGS] == list(Settings.__struct_fields__)
    for setting in SETTINGS:
        assert setting.meaning.endswith(".")
        assert setting.name == re.sub("_SECONDS$", "_SECS", setting.field.upper())
