"""The `everruns` command."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

from cyclopts import App, Parameter

from infra.settings import ListenAddress, Settings, SettingsError, load_settings

DEV_ADDRESS = ListenAddress(host="127.0.0.1", port=9300)
"""The origin of PUBLIC_APP_URL's default."""

T = TypeVar("T")

app = App(
    name="everruns",
    help="The headless, durable harness engine for AI agents.",
    help_epilogue="Begin with `everruns dev`: it needs nothing installed.",
    version=lambda: _version(),
    version_flags=["--version"],
)


@app.command
def dev(
    *,
    data_dir: Path | None = None,
    addr: str | None = None,
    worker: bool = True,
    ready_file: Path | None = None,
) -> None:
    """Start everything: PostgreSQL, Temporal with its Web UI, the API and a worker.

    Example: everruns dev --data-dir .data

    Parameters
    ----------
    data_dir:
        Keep all data in this directory; without it, everything is gone at exit.
    addr:
        Listen here instead of 127.0.0.1:9300 (or HTTP_ADDR, when that is set).
    worker:
        Run a worker in this process; with --no-worker, start `everruns worker` beside it.
    ready_file:
        Write the addresses to this file, as JSON, once everything is up.
    """
    from cli.run import run_dev

    address = _listen_address(addr) if addr else None
    if address is None and not (os.environ.get("HTTP_ADDR") or os.environ.get("ADDR")):
        address = DEV_ADDRESS
    if data_dir is not None:
        data_dir = data_dir.resolve()
        data_dir.mkdir(parents=True, exist_ok=True)
    _run(run_dev(os.environ, address=address, data_dir=data_dir, ready_file=ready_file, with_worker=worker))


@app.command
def server() -> None:
    """Serve the API and its event streams.

    With DEV_MODE=true it brings PostgreSQL, Temporal and a worker along, like `everruns dev`.

    Example: DATABASE_URL=… TEMPORAL_ADDRESS=temporal:7233 everruns server
    """
    settings = _settings()
    from cli.run import run_dev, run_server

    if settings.dev_mode:
        _run(run_dev(os.environ, address=None, data_dir=None, ready_file=None, with_worker=True))
    else:
        _run(run_server(settings))


@app.command
def worker() -> None:
    """Run turns and their steps. Start as many as you like, anywhere.

    Example: DATABASE_URL=… TEMPORAL_ADDRESS=temporal:7233 everruns worker
    """
    settings = _settings()
    from cli.run import run_worker

    _run(run_worker(settings))


@app.command
def promote(build_id: str, /) -> None:
    """Let new turns start on a version of the workers; running turns stay on theirs.

    Workers of that version (WORKER_BUILD_ID) must be running.

    Example: everruns promote 2026-11-21.1
    """
    settings = _settings()
    from cli.run import run_promote

    _run(run_promote(settings, build_id))
    print(f"New turns start on version {build_id}.")


@app.command
def migrate() -> None:
    """Bring the database schema up to date. Safe to run from several places at once.

    Example: DATABASE_URL=… everruns migrate
    """
    settings = _settings()
    from cli.run import run_migrate

    for line in _run(run_migrate(settings)) or []:
        print(line)


@app.command
def demo(
    *,
    model: str | None = None,
    provider: str | None = None,
    base_url: str | None = None,
    key_env: str | None = None,
    simulated: bool = False,
    keep: bool = False,
) -> None:
    """A conversation with tools whose worker is killed twice, and whose stream does not care.

    With DEFAULT_OPENAI_API_KEY, DEFAULT_ANTHROPIC_API_KEY or DEFAULT_GEMINI_API_KEY set, that provider's flagship answers;
    without a key, a simulated model.

    Example: everruns demo --keep

    Example: everruns demo --provider openai_completions --base-url http://localhost:11434/v1 --model qwen3

    Parameters
    ----------
    model:
        Name of a model to use instead of the default one.
    provider:
        Type of the provider to use: openai, anthropic, gemini, openrouter, openai_completions, …
    base_url:
        Address of the provider, if it is not the type's own. The key is sent there.
    key_env:
        Environment variable that holds the provider's key, instead of the type's DEFAULT_…_API_KEY.
    simulated:
        Use the simulated model, whatever keys there are.
    keep:
        Leave everything running afterwards, to look at the turn in the Temporal Web UI.
    """
    from cli.demo import run_demo
    from cli.demo_models import Wish

    wish = Wish(model=model, provider=provider, base_url=base_url, key_variable=key_env, simulated=simulated)
    sys.exit(_run(run_demo(os.environ, wish, keep=keep)))


@app.command
def config() -> None:
    """Show every setting: its value, where that comes from, and its default. Secrets are masked.

    Example: everruns config
    """
    from cli.config_command import print_config

    if not print_config(os.environ):
        sys.exit(2)


@app.command(name="check-log")
def check_log(
    session: Annotated[list[str] | None, Parameter(help="Session ids; without any, every session.")] = None,
    /,
) -> None:
    """Check the invariants of stored event logs: order, pairs, one answer per message, one result per tool call.

    Example: DATABASE_URL=… everruns check-log session_0199…
    """
    settings = _settings()
    from cli.check_log import run_check_log

    if not _run(run_check_log(settings, session or [])):
        sys.exit(1)


secrets = App(
    name="secrets",
    help="Keys of the secrets in the database: make one, rotate, check.\n\nExample: everruns secrets generate-key",
)
app.command(secrets)


@secrets.command(name="generate-key")
def generate_key(*, id: str = "kek-v1") -> None:
    """Print a new key, as a line for .env.

    Example: everruns secrets generate-key --id kek-v2 >> .env

    Parameters
    ----------
    id:
        Name of the key. It is stored with every secret, so each key needs its own.
    """
    from infra.encryption import CURRENT_KEY, EncryptionKeyError
    from infra.encryption import generate_key as new_key

    try:
        print(f"{CURRENT_KEY}={new_key(id).reveal()}")
    except EncryptionKeyError as error:
        sys.exit(f"everruns: --id was given `{id}`; {error}")


@secrets.command
def reencrypt() -> None:
    """Encrypt every stored secret with the current key. Safe while servers run, and to run again; exit code 1 if any is left.

    Example: DATABASE_URL=… SECRETS_ENCRYPTION_KEY=… SECRETS_ENCRYPTION_KEY_PREVIOUS=… everruns secrets reencrypt
    """
    settings = _settings()
    from cli.secrets_command import run_reencrypt

    if not _run(run_reencrypt(settings)):
        sys.exit(1)


@secrets.command
def check() -> None:
    """Decrypt every stored secret and list those that cannot be read; exit code 1 if there are any. It only reads.

    Example: DATABASE_URL=… SECRETS_ENCRYPTION_KEY=… everruns secrets check
    """
    settings = _settings()
    from cli.secrets_command import run_secrets_check

    if not _run(run_secrets_check(settings)):
        sys.exit(1)


def _version() -> str:
    from importlib.metadata import version

    return version("everruns")


def _settings() -> Settings:
    """Before the imports that take a second: a wrong setting is told at once."""
    from infra.logging import configure_logging

    try:
        settings = load_settings(os.environ)
    except SettingsError as error:
        sys.exit("\n".join(f"everruns: {problem}" for problem in error.problems))
    configure_logging(settings.log_level, settings.log_format)
    return settings


def _listen_address(text: str) -> ListenAddress:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        sys.exit(f"everruns: --addr was given `{text}`; accepted: HOST:PORT, for example 127.0.0.1:9300")
    return ListenAddress(host=host.strip("[]"), port=int(port))


def _run(command: Coroutine[object, object, T]) -> T:
    from cli.run import StartFailure
    from db.database import MigrationFailed
    from infra.child_processes import ChildStartError
    from infra.embedded_postgres import EmbeddedPostgresError
    from infra.encryption import EncryptionKeyError
    from infra.temporal_client import TemporalConnectionError
    from infra.temporal_server import TemporalServerError

    expected = (
        StartFailure,
        SettingsError,
        MigrationFailed,
        ChildStartError,
        EmbeddedPostgresError,
        EncryptionKeyError,
        TemporalServerError,
        TemporalConnectionError,
    )
    with _runner() as runner:
        try:
            return runner.run(command)
        except KeyboardInterrupt:
            sys.exit(130)
        except expected as error:
            _give_up(f"everruns: {error}")
        except BaseExceptionGroup as group:
            known, others = group.split(expected)
            if known is None or others is not None:
                raise
            _give_up("\n".join(f"everruns: {error}" for error in known.exceptions))


def _give_up(message: str) -> NoReturn:
    """Everything of ours has ended by now. Leaving the event loop in order would wait for Temporal's core, which takes half
    a minute to believe that its server is gone."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _runner() -> asyncio.Runner:
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
