"""PostgreSQL for tests: a cluster of their own, run by the programs that this machine has, and databases in it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, TypedDict
from uuid import uuid4

import psycopg
import pytest

# CI sets it: what would be skipped otherwise fails.
REQUIRED_VARIABLE: Final = "TIDELOG_REQUIRE_POSTGRES"

# Debian keeps them out of the search path, a folder for each version.
DEBIAN_PROGRAMS: Final = Path("/usr/lib/postgresql")
# PostgreSQL refuses to run as root.
UNPRIVILEGED_USERS: Final = ("postgres", "nobody")

START_SECONDS: Final = 60
START_ATTEMPTS: Final = 5
STOP_SECONDS: Final = 60
POLL_SECONDS: Final = 0.02

# From this version on a database may sort by ICU from the start.
ICU_SINCE: Final = 15

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # A deadlock that a test makes is found soon.
    "deadlock_timeout": "100ms",
}
# Processes may be killed all the same; only a power cut would lose something.
_WITHOUT_SYNC: Final = {"fsync": "off", "full_page_writes": "off"}

StopMode = Literal["fast", "immediate"]
_STOP_SIGNALS: Final[dict[StopMode, signal.Signals]] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class _Account(TypedDict, total=False):
    """As whom a child process runs; with nothing in it, as this process does."""

    user: int
    group: int
    extra_groups: list[int]


class PostgresMissing(Exception):
    """PostgreSQL is not installed here, or nobody is there to run it."""


class Cluster:
    """
    A PostgreSQL server, a child of this process, that takes part in nothing else on this machine.

    It listens on the loopback interface and lets everybody in. Text sorts as people would
    sort it and not by bytes, as in most databases out there.

    Args:
        directory: For its data: empty, of the user that PostgreSQL is to run as.
        durable: Whether it waits for the disk when it commits.

    Raises:
        PostgresMissing: There is nothing that could be run.
    """

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self._programs = find_programs()
        self._data = directory / "data"
        self._log = directory / "log"
        self._settings = _SETTINGS if durable else _SETTINGS | _WITHOUT_SYNC
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._make()

    @property
    def port(self) -> int:
        """Where it listens: a free port from the first start on, always the same."""
        return self._port

    def conninfo(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start it, and return once it answers."""
        known = self._port
        for _ in range(START_ATTEMPTS):
            self._port = known or _free_port()
            if self._comes_up():
                return
            self.stop("immediate")
        raise AssertionError(f"PostgreSQL does not start:\n{self._log.read_text()}")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it: in good order, or as if it had crashed. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(_STOP_SIGNALS[mode])
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()

    def kill_backend(self, pid: int) -> bool:
        """
        Kill one of the processes that run statements, and return once the database answers again.

        The database ends all the others and recovers, because it cannot know what the dead one has left in their
        memory. Return False if the process had ended already.
        """
        with psycopg.connect(self.conninfo()) as witness:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
            with contextlib.suppress(psycopg.OperationalError):
                witness.execute("SELECT pg_sleep(%s)", [START_SECONDS])
        until = time.monotonic() + START_SECONDS
        while not self._answers():
            assert time.monotonic() < until, f"PostgreSQL does not come back:\n{self._log.read_text()}"
            time.sleep(POLL_SECONDS)
        return True

    @contextlib.contextmanager
    def halted(self, pid: int) -> Iterator[None]:
        """Let one of the processes that run statements stand still meanwhile, though connections to it stand."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement in a database, named or by its address, and return its rows."""
        with psycopg.connect(self.conninfo(database.rpartition("/")[2]), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    @contextlib.contextmanager
    def database(self, *, template: str = "template0") -> Iterator[str]:
        """
        Make a database, empty or as another one that nobody is connected to; give its address; remove it in the end.

        Args:
            template: The other one, by its name or address.
        """
        name = f"test_{uuid4().hex}"
        self.copy_database(template, name)
        try:
            yield self.conninfo(name)
        finally:
            self.drop_database(name)

    def create_database(self, name: str) -> None:
        """Make an empty database."""
        self.copy_database("template0", name)

    def copy_database(self, template: str, name: str) -> None:
        """Make a database as another one that nobody is connected to."""
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template.rpartition('/')[2]}")

    def drop_database(self, name: str) -> None:
        """Remove a database, if it is there, whoever is still connected."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def load(self, database: str, script: str) -> None:
        """Run a script, such as a dump, in a database, named or by its address. All of it, or nothing."""
        self.run(
            "psql",
            "--quiet",
            "--no-psqlrc",
            "--set=ON_ERROR_STOP=1",
            "--single-transaction",
            self.conninfo(database.rpartition("/")[2]),
            given=script.encode(),
        )

    def run(self, program: str, *arguments: str | Path, given: bytes = b"") -> bytes:
        """Run one of PostgreSQL's programs, such as `pg_dump`, with something to read, and return what it prints."""
        command = [self._programs / program, *arguments]
        done = subprocess.run(command, check=False, input=given, capture_output=True, cwd="/", **_unprivileged())
        assert done.returncode == 0, f"{program} failed: {done.stderr.decode()}"
        return done.stdout

    def _make(self) -> None:
        major = int(self.run("initdb", "--version").split()[2].partition(b".")[0])
        order = ["--locale-provider=icu", "--icu-locale=en-US"] if major >= ICU_SINCE else []
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self.run("initdb", *options, *order, f"--pgdata={self._data}")

    def _comes_up(self) -> bool:
        """Start it, and say whether it answers. It does not if somebody was faster to take the port."""
        settings = [f"--{name}={value}" for name, value in (self._settings | {"port": str(self._port)}).items()]
        with self._log.open("ab") as log:
            process = self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **_unprivileged(),
            )
        until = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < until:
            if self._answers():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.conninfo()).close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def running_cluster(*, durable: bool) -> Iterator[Cluster]:
    """
    Run a cluster in a temporary folder, and leave nothing of it.

    Raises:
        PostgresMissing: There is nothing that could be run.
    """
    # A folder of pytest's would not do: those above it are closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="tidelog-postgres-", ignore_cleanup_errors=True) as directory:
        account = _unprivileged()
        os.chown(directory, account.get("user", -1), account.get("group", -1))
        cluster = Cluster(Path(directory), durable=durable)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def find_programs() -> Path:
    """
    Return the folder of PostgreSQL's programs: the newest that Debian has, else those in the search path.

    Raises:
        PostgresMissing: There are none, or only root, who may not run them.
    """
    _unprivileged()
    versions = sorted(DEBIAN_PROGRAMS.glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which("postgres")
    if found is None:
        raise PostgresMissing("PostgreSQL is not installed: Debian has it in the package postgresql")
    return Path(found).parent


def _unprivileged() -> _Account:
    """Return as whom PostgreSQL may run."""
    if os.geteuid() != 0:
        return {}
    for name in UNPRIVILEGED_USERS:
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise PostgresMissing(f"PostgreSQL does not run as root, and none of {UNPRIVILEGED_USERS} is a user here")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    """Run a cluster that does not wait for the disk, for all tests of this process; skip them if there is none."""
    try:
        with running_cluster(durable=False) as cluster:
            yield cluster
    except PostgresMissing as error:
        if REQUIRED_VARIABLE in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture
def postgres_database(postgres_cluster: Cluster) -> Iterator[str]:
    """Give the address of an empty database."""
    with postgres_cluster.database() as conninfo:
        yield conninfo
