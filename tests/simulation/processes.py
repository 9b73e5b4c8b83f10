"""
Servers and replicas as processes of their own, to be killed or to get in each other's way.

python -m tests.simulation.processes ROLE ARGUMENT...

Each process tells its parent how far it is in lines, appended to a file or printed:
what was written is there even if the process is killed right behind it.
"""

# ruff: noqa: T201 - a program prints

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TextIO

from tests.builders import references_schema
from tests.simulation.application import REFERENCES, Weather, make_application

from tidelog import (
    InheritedEnvironment,
    InvalidValue,
    ObjectExists,
    ObjectNotFound,
    ServerUnavailable,
    SynchronizationInProgress,
    TidelogError,
)
from tidelog_client import Progress, Replica, Transaction
from tidelog_server import Application, Credentials, HookContext, HookObject, LmdbStore, Principal, Server
from tidelog_server._principal import DEFAULT_TENANT

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = references_schema(REFERENCES)
POLL_SECONDS = 0.002
WAIT_SECONDS_MAX = 60.0
DEADLY_EXIT_CODE = 77

# How much a working replica may write per synchronization: edits and sessions go on side by side all its life.
COMMITS_PER_SYNCHRONIZATION = 25
SYNCHRONIZE_TIMEOUT_SECONDS = 5.0


def start(role: str, *arguments: object, stdout: int | TextIO | None = None) -> subprocess.Popen[str]:
    """Start a process in a role."""
    roots = [ROOT, *(ROOT / root for root in ("changelog", "server", "client"))]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation.processes", role, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        stdout=stdout,
        text=True,
    )


def free_port() -> int:
    """Return a port that nobody listened on a moment ago, for a server that is started again and again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = WAIT_SECONDS_MAX) -> None:
    """Wait until a condition holds. Raises AssertionError when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} seconds in vain: {what}")
        time.sleep(POLL_SECONDS)


class Journal:
    """A file of lines that outlives the process that appends them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, line: str) -> None:
        """Append a line in one write."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)

    def lines(self) -> list[str]:
        """Return the lines; one that a kill cut short is left out."""
        try:
            return self.path.read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []


# --- roles ------------------------------------------------------------------------------


def serve(directory: str, address: str) -> None:
    """Serve the simulated application until killed."""
    with Server(make_application(Weather(), schema_version=1), store=directory, listen=address):
        print("listening", flush=True)
        threading.Event().wait()


def serve_deadly(directory: str, address: str) -> None:
    """Serve an application whose hook ends the process where an object says so."""
    application = Application()

    @application.before_commit("Note")
    def deadly(note: HookObject, context: HookContext) -> None:
        if note["deadly"]:
            os._exit(DEADLY_EXIT_CODE)

    with Server(application, store=directory, listen=address):
        print("listening", flush=True)
        threading.Event().wait()


class TokensAreTenants:
    """Takes each token for the name of a tenant: worlds apart in one server."""

    def authenticate(self, credentials: Credentials) -> Principal:
        """Return somebody of the tenant that the token names."""
        return Principal("ann", tenant=credentials.token or DEFAULT_TENANT)


def serve_tenants(directory: str) -> None:
    """Serve the simulated application until killed, each token's tenant apart from the others."""
    application = make_application(Weather(), schema_version=1)
    with Server(application, store=directory, authenticator=TokensAreTenants()) as server:
        print(server.address, flush=True)
        threading.Event().wait()


def work(directory: str, address: str, seed: str, journal_path: str) -> None:
    """Edit in one thread, synchronize in another, until killed."""
    random, journal = Random(seed), Journal(Path(journal_path))
    journal.append("started")
    allowance = threading.Semaphore(COMMITS_PER_SYNCHRONIZATION)
    with Replica(directory, server=address, schema=SCHEMA, map_bytes=random.choice([2**18, 2**40])) as replica:
        threading.Thread(
            target=_edit, args=(replica, Random(random.random()), journal, allowance), daemon=True
        ).start()
        while True:
            _synchronize(replica, random, journal)
            allowance.release(COMMITS_PER_SYNCHRONIZATION)


def write(directory: str, name: str, count: str, map_bytes: str) -> None:
    """Create *count* objects, as fast as one commit after the other goes."""
    with Replica(directory, map_bytes=int(map_bytes)) as replica:
        for number in range(int(count)):
            replica.create("Note", {"by": name, "number": number, "text": "x" * 500}, f"{name}-{number}")


def synchronize(directory: str, address: str) -> None:
    """Synchronize once and print what came of it."""
    with Replica(directory, server=address) as replica:
        began = time.monotonic()
        try:
            replica.synchronize_all(timeout=WAIT_SECONDS_MAX)
        except SynchronizationInProgress as error:
            print(f"{time.monotonic() - began:.3f} {error}")
        else:
            print("done")


def commit_and_stay(directory: str) -> None:
    """Commit once, then wait inside a second write transaction until killed."""
    replica = Replica(directory)
    replica.create("Note", {}, "committed")

    def never(transaction: object) -> None:
        print("inside", flush=True)
        threading.Event().wait()

    replica._storage.environment.write(never)


def read(directory: str, count: str, map_bytes: str) -> None:
    """Read everything again and again until there are *count* objects; never fewer than before."""
    with Replica(directory, map_bytes=int(map_bytes)) as replica:
        seen = 0
        print("reading", flush=True)
        while seen < int(count):
            now = sum(1 for note in replica.query("Note") if note["text"])
            if now < seen:
                raise AssertionError(f"{now} objects after {seen}")
            seen = now


def fork_server(directory: str) -> None:
    """Use a server, its store and a replica that synchronized in a forked child; print what came of each."""
    store = LmdbStore(f"{directory}/server")
    with (
        Server(Application(), store=store) as server,
        Replica(f"{directory}/replica", server=server.address) as replica,
    ):
        replica.create("Note", {}, "before")
        replica.synchronize_all()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            server.tenant().create("Note", {}, "by the service")
            replica.create("Note", {}, "after")
            replica.synchronize_all()
            print(f"parent {sorted(one.id for one in replica.query('Note'))}", flush=True)
            return
        uses: dict[str, Callable[[], Any]] = {
            "synchronize": replica.synchronize_all,
            "read": lambda: server.tenant().get("Note", "before"),
            "write": lambda: server.tenant().create("Note", {}),
            "submit": lambda: store.submit("default", lambda reader: (None, None)).result(),
            "note": lambda: store.set_note("x", b""),
        }
        for name, use in uses.items():
            try:
                use()
            except InheritedEnvironment:
                print(f"{name} refused", flush=True)
        server.stop()
        store.close()
        replica.close()
        print("child done", flush=True)
        os._exit(0)


def spawn_both(directory: str) -> None:
    """Write to one replica from children that `multiprocessing` forks and spawns, and from this process."""
    forking, spawning = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
    with Replica(directory) as replica:
        for method, context in (("fork", forking), ("spawn", spawning)):
            child = context.Process(target=write, args=(directory, method, "5", str(2**40)))
            child.start()
            child.join()
            replica.create("Note", {}, f"beside-{method}")
            print(f"{method} {child.exitcode} {replica.count('Note')}", flush=True)


def fork(directory: str) -> None:
    """Use a replica in a forked child, and open it there anew; print what came of each."""
    replica = Replica(directory)
    replica.create("Note", {}, "before")
    handle = replica.get("Note", "before")
    if handle is None:
        raise AssertionError("the object is not there")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        replica.create("Note", {}, "after")
        print(f"parent {sorted(one.id for one in replica.query('Note'))}", flush=True)
        return
    uses: dict[str, Callable[[], Any]] = {
        "get": lambda: replica.get("Note", "before"),
        "create": lambda: replica.create("Note", {}),
        "query": lambda: list(replica.query("Note")),
        "pending": lambda: list(replica.pending()),
        "handle": lambda: handle["x"],
    }
    for name, use in uses.items():
        try:
            use()
        except InheritedEnvironment:
            print(f"{name} refused", flush=True)
    replica.close()
    with Replica(directory) as own:
        own.create("Note", {}, "child")
        print(f"child {sorted(one.id for one in own.query('Note'))}", flush=True)
    os._exit(0)


def _edit(replica: Replica, random: Random, journal: Journal, allowance: threading.Semaphore) -> None:
    while allowance.acquire():
        marks: list[str] = []
        with contextlib.suppress(ObjectExists, ObjectNotFound, InvalidValue):
            with replica.transaction(atomic=random.random() < 0.3) as transaction:
                for _ in range(random.choice([1, 1, 1, 2, 5])):
                    _change(transaction, random, marks)
            # Committed, as far as this process knows: from here on nothing may lose it.
            journal.append(f"committed {' '.join(marks)}")


def _change(transaction: Transaction, random: Random, marks: list[str]) -> None:
    entity = random.choice(["Note", "Task", "Order", "Line", "Node"])
    id_ = str(random.randrange(30))
    mark = f"{random.getrandbits(64):x}"
    attributes: dict[str, Any] = {"mark": mark, "text": "x" * random.choice([1, 1, 100, 3_000])}
    if entity in {"Task", "Order"}:
        attributes["title"] = random.choices(["a", ""], [9, 1])[0]
    if entity == "Task":
        attributes |= {"counted": random.random() < 0.2, "tidy": random.random() < 0.2}
    if entity == "Line":
        attributes["order"] = str(random.randrange(30))
    if entity == "Node":
        attributes["next"] = str(random.randrange(30))
    if transaction.get(entity, id_) is None:
        transaction.create(entity, attributes, id_)
    elif random.random() < 0.2:
        transaction.delete(entity, id_)
        return
    else:
        transaction.update(entity, id_, attributes, increment={"n": 1}, add={"tags": [random.randrange(5)]})
    marks.append(mark)


def _synchronize(replica: Replica, random: Random, journal: Journal) -> None:
    def on_progress(progress: Progress) -> None:
        journal.append(f"{progress.phase} {progress.done}")

    mode = random.choice(["all", "all", "unsynchronized", "selected"])
    try:
        if mode == "all":
            replica.synchronize_all(timeout=SYNCHRONIZE_TIMEOUT_SECONDS, on_progress=on_progress)
        elif mode == "unsynchronized":
            replica.synchronize_unsynchronized(timeout=SYNCHRONIZE_TIMEOUT_SECONDS, on_progress=on_progress)
        else:
            keys = [(entity, str(random.randrange(30))) for entity in ("Note", "Line", "Node") for _ in range(3)]
            replica.synchronize_selected(keys, timeout=SYNCHRONIZE_TIMEOUT_SECONDS, on_progress=on_progress)
        journal.append("synchronized")
    except ServerUnavailable:
        journal.append("unavailable")
    except TidelogError as error:
        journal.append(f"error {type(error).__name__} {error}")
        raise


ROLES: dict[str, Callable[..., None]] = {
    "serve": serve,
    "serve_deadly": serve_deadly,
    "serve_tenants": serve_tenants,
    "work": work,
    "write": write,
    "synchronize": synchronize,
    "fork": fork,
    "fork_server": fork_server,
    "spawn_both": spawn_both,
    "commit_and_stay": commit_and_stay,
    "read": read,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
