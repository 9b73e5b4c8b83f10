"""Threads and processes on one replica, and many replicas on one server, at the same time."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.simulation import promises
from tests.simulation.processes import start, wait_until
from tests.simulation.records import Committed, read_replica, read_server

from tidelog import (
    ObjectExists,
    ResourceClosed,
    ServerUnavailable,
    StorageError,
    SynchronizationInProgress,
    TidelogError,
)
from tidelog_client import Phase, Progress, Replica, Report
from tidelog_server import Application, HookContext, HookObject, LmdbStore, Server

pytestmark = pytest.mark.slow

SIMULTANEOUS = (
    "Performing simultaneous synchronizations is not supported. "
    "Please try again after the current synchronization is completed."
)
SMALL_MAP_BYTES = 256 * 1024
RESULT_SECONDS_MAX = 60.0


class HeldServer:
    """A server whose hook waits, so that a synchronization stays under way as long as a test needs it."""

    def __init__(self, directory: Path) -> None:
        self.store = LmdbStore(directory / "server")
        self.reached = threading.Event()
        self.released = threading.Event()
        app = Application()

        @app.before_commit("Slow")
        def waits(thing: HookObject, context: HookContext) -> None:
            self.reached.set()
            assert self.released.wait(RESULT_SECONDS_MAX)

        self.server = Server(app, store=self.store)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.server.address


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldServer]:
    """A server that holds on in the middle of a session until it is released."""
    server = HeldServer(tmp_path)
    try:
        with server.server:
            yield server
            server.released.set()
    finally:
        server.released.set()
        server.store.close()


# --- one replica, many writers ----------------------------------------------------------


def test_threads_commit_without_gaps(tmp_path: Path) -> None:
    """Operations committed by many threads are all in the log, in consecutive positions."""
    threads, commits = 16, 40
    with Replica(tmp_path / "replica", map_bytes=SMALL_MAP_BYTES) as replica:

        def write(name: int) -> None:
            for number in range(commits):
                with replica.transaction(atomic=number % 2 == 0) as transaction:
                    transaction.create("Note", {"number": number}, f"{name}-{number}")
                    transaction.create("Other", {"number": number}, f"{name}-{number}")

        _together([partial(write, name) for name in range(threads)])

        operations = [logged.operation for logged in replica.log()]
        assert [one.seq for one in operations] == list(range(1, 2 * threads * commits + 1))
        assert {one.key for one in operations} == {
            (entity, f"{name}-{number}")
            for entity in ("Note", "Other")
            for name in range(threads)
            for number in range(commits)
        }
        # A commit's operations are neighbours, whoever else committed at that moment.
        assert all(one.id == other.id for one, other in zip(operations[::2], operations[1::2], strict=True))
        assert replica.count("Note") == threads * commits
        _check_alone(replica)


def test_threads_that_compete_for_an_id_get_it_once(tmp_path: Path) -> None:
    """Of many threads that create the same object, one succeeds and the others learn that it exists."""
    with Replica(tmp_path / "replica") as replica:
        barrier = threading.Barrier(8)

        def create() -> bool:
            barrier.wait()
            try:
                replica.create("Note", {}, "same")
            except ObjectExists:
                return False
            return True

        assert sum(_together([create] * 8)) == 1
        assert replica.pending_count() == 1


def test_increments_of_threads_add_up(tmp_path: Path) -> None:
    """No increment of any thread gets lost in the view."""
    with Replica(tmp_path / "replica", durability="relaxed") as replica:
        replica.create("Counter", {}, "c")

        def increment() -> None:
            for _ in range(50):
                replica.update("Counter", "c", increment={"n": 1})

        _together([increment] * 8)
        counter = replica.get("Counter", "c")
        assert counter is not None
        assert counter["n"] == 400
        _check_alone(replica)


def test_processes_write_to_one_replica(tmp_path: Path) -> None:
    """Two processes and this one write to one directory whose map has to grow several times; all is there."""
    count, directory = 300, tmp_path / "replica"
    with Replica(directory, map_bytes=SMALL_MAP_BYTES) as replica:
        others = [start("write", directory, name, count, SMALL_MAP_BYTES) for name in ("first", "second")]
        try:
            seen = 0
            for number in range(count):
                replica.create("Note", {"by": "parent", "number": number, "text": "x" * 500}, f"parent-{number}")
                seen = max(seen, replica.count("Note"))
            for process in others:
                assert process.wait(RESULT_SECONDS_MAX) == 0
        finally:
            _end(others)
        assert [logged.operation.seq for logged in replica.log()] == list(range(1, 3 * count + 1))
        assert replica.count("Note") == 3 * count
        assert {one.id for one in replica.query("Note")} == {
            f"{name}-{number}" for name in ("first", "second", "parent") for number in range(count)
        }
        _check_alone(replica)


def test_map_grows_under_readers(tmp_path: Path) -> None:
    """A small map grows while other threads are in the middle of reading."""
    with Replica(tmp_path / "replica", map_bytes=SMALL_MAP_BYTES, durability="relaxed") as replica:
        replica.create("Note", {"text": "x"}, "first")
        stop = threading.Event()

        def read() -> int:
            rounds = 0
            while not stop.is_set():
                assert any(one["text"] for one in replica.query("Note"))
                assert sum(1 for _ in replica.log()) >= 1
                rounds += 1
            return rounds

        def write() -> None:
            try:
                for number in range(100):
                    replica.create("Note", {"text": "x" * 20_000}, str(number))
            finally:
                stop.set()

        _together([read, read, write])
        assert replica.count("Note") == 101
        _check_alone(replica)


def test_large_commit_in_small_map(tmp_path: Path) -> None:
    """A single commit larger than the whole map is simply committed."""
    with Replica(tmp_path / "replica", map_bytes=SMALL_MAP_BYTES) as replica:
        with replica.transaction(atomic=True) as transaction:
            for number in range(100):
                transaction.create("Note", {"text": "x" * 15_000}, str(number))
        assert replica.count("Note") == 100
        _check_alone(replica)


def test_a_forked_child_is_told(tmp_path: Path) -> None:
    """In a forked child every use raises InheritedEnvironment; opened there anew, the replica works in both."""
    process = start("fork", tmp_path / "replica", stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=RESULT_SECONDS_MAX)
    finally:
        _end([process])
    assert process.returncode == 0
    assert output.splitlines() == [
        *(f"{use} refused" for use in ("get", "create", "query", "pending", "handle")),
        "child ['before', 'child']",
        "parent ['after', 'before', 'child']",
    ]


def test_a_forked_child_of_a_server_is_told(tmp_path: Path) -> None:
    """A server, its store and a replica refuse to work in a forked child; the parent goes on with all of them."""
    output = _output("fork_server", tmp_path)
    assert output == [
        *(f"{use} refused" for use in ("synchronize", "read", "write", "submit", "note")),
        "child done",
        "parent ['after', 'before', 'by the service']",
    ]


def test_children_of_multiprocessing_write(tmp_path: Path) -> None:
    """Children that were forked or spawned open the replica anew, and write to it like their parent."""
    assert _output("spawn_both", tmp_path / "replica") == ["fork 0 6", "spawn 0 12"]


def test_a_process_killed_in_a_transaction_leaves_nothing(tmp_path: Path) -> None:
    """A process that is killed while it writes has written nothing, and keeps nobody from writing."""
    with Replica(tmp_path / "replica") as replica:
        process = start("commit_and_stay", tmp_path / "replica", stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "inside\n"
            waiting = threading.Thread(target=partial(replica.create, "Note", {}, "behind it"))
            waiting.start()
        finally:
            _end([process])
        waiting.join(RESULT_SECONDS_MAX)
        assert not waiting.is_alive(), "it waits for the dead"
        replica.create("Note", {}, "after it")
        assert [one.operation.id for one in replica.log()] == ["committed", "behind it", "after it"]
        _check_alone(replica)


def test_a_process_reads_while_the_map_grows(tmp_path: Path) -> None:
    """A process that reads all the time is not disturbed by another one that makes the map grow."""
    count, directory = 400, tmp_path / "replica"
    with Replica(directory, map_bytes=SMALL_MAP_BYTES, durability="relaxed") as replica:
        reading = start("read", directory, count, SMALL_MAP_BYTES, stdout=subprocess.PIPE)
        try:
            assert reading.stdout is not None
            assert reading.stdout.readline() == "reading\n"
            for number in range(count):
                replica.create("Note", {"text": "x" * 5_000}, str(number))
            assert reading.wait(RESULT_SECONDS_MAX) == 0
        finally:
            _end([reading])
        assert (directory / "data.mdb").stat().st_size > 4 * SMALL_MAP_BYTES
        _check_alone(replica)


def test_closing_while_others_work(tmp_path: Path) -> None:
    """Threads that commit, read, iterate and look at handles are told once the replica is closed; none hangs."""
    replica = Replica(tmp_path / "replica", durability="relaxed")
    for number in range(600):
        replica.create("Note", {"n": number}, f"note-{number}")
    handle = replica.get("Note", "note-0")
    assert handle is not None
    rounds: list[int] = []

    def increment() -> None:
        handle["n"] = handle["n"] + 1
        handle.commit()

    works: list[Callable[[], Any]] = [
        lambda: replica.create("Note", {}),
        lambda: replica.count("Note"),
        lambda: [one["n"] for one in replica.query("Note", order_by="-n", limit=10)],
        lambda: list(replica.log(after=500)),
        lambda: list(replica.pending()),
        increment,
    ]

    def until_closed(work: Callable[[], Any]) -> type[Exception]:
        while True:
            try:
                work()
            except TidelogError as error:
                return type(error)
            rounds.append(1)

    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(until_closed, work) for work in works]
        wait_until(lambda: len(rounds) >= 60, "they do nothing")
        replica.close()
        assert {run.result(RESULT_SECONDS_MAX) for run in running} == {ResourceClosed}
    with Replica(tmp_path / "replica") as again:
        _check_alone(again)


# --- one synchronization at a time ------------------------------------------------------


def test_one_synchronization_at_a_time(held: HeldServer, tmp_path: Path) -> None:
    """A second synchronization, from a thread or another process, fails at once with the promised message."""
    directory = tmp_path / "replica"
    with Replica(directory, server=held.address) as replica, _synchronizing(replica, held) as first:
        calls: list[Callable[[], Report]] = [
            replica.synchronize_all,
            replica.synchronize_unsynchronized,
            partial(replica.synchronize_selected, [("Note", "a")]),
        ]
        for call in calls:
            with pytest.raises(SynchronizationInProgress) as caught:
                call()
            assert str(caught.value) == SIMULTANEOUS
        with (
            Replica(directory, server=held.address) as same,
            pytest.raises(SynchronizationInProgress, match="not supported"),
        ):
            same.synchronize_all()

        process = start("synchronize", directory, held.address, stdout=subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=RESULT_SECONDS_MAX)
        finally:
            _end([process])
        seconds, _, message = output.strip().partition(" ")
        assert message == SIMULTANEOUS
        assert float(seconds) < 5, "it fails at once"

        assert not first.done()
        held.released.set()
        assert first.result(RESULT_SECONDS_MAX).applied == 1
        assert replica.synchronize_all().applied == 0, "afterwards the next one may run"


def test_a_lock_of_a_killed_process_is_free(held: HeldServer, tmp_path: Path) -> None:
    """A process that is killed in the middle of a synchronization leaves its lock to the next one."""
    directory = tmp_path / "replica"
    with Replica(directory, server=held.address) as replica:
        replica.create("Slow", {}, "slow")
        process = start("synchronize", directory, held.address, stdout=subprocess.DEVNULL)
        try:
            assert held.reached.wait(RESULT_SECONDS_MAX)
            with pytest.raises(SynchronizationInProgress):
                replica.synchronize_all()
        finally:
            _end([process])
            held.released.set()
        replica.synchronize_all(timeout=RESULT_SECONDS_MAX)
        assert [logged.status for logged in replica.log()] == ["applied"]
        _check_synchronized(held.store, [replica])


def test_another_process_writes_during_a_synchronization(held: HeldServer, tmp_path: Path) -> None:
    """What another process commits while this one synchronizes is neither held up nor lost."""
    directory = tmp_path / "replica"
    with Replica(directory, server=held.address) as replica, _synchronizing(replica, held) as first:
        process = start("write", directory, "other", 50, SMALL_MAP_BYTES)
        try:
            assert process.wait(RESULT_SECONDS_MAX) == 0
        finally:
            _end([process])
        assert not first.done()
        assert replica.count("Note") == 50
        held.released.set()
        first.result(RESULT_SECONDS_MAX)
        replica.synchronize_all(timeout=RESULT_SECONDS_MAX)
        assert replica.pending_count() == 0
        _check_synchronized(held.store, [replica])


# --- calls from within ------------------------------------------------------------------


def test_a_callback_works_on_its_replica(held: HeldServer, tmp_path: Path) -> None:
    """A progress callback reads and commits; a synchronization from it is refused, and the one under way goes on."""
    held.released.set()
    refused: list[str] = []
    with Replica(tmp_path / "replica", server=held.address) as replica:

        def on_progress(progress: Progress) -> None:
            with pytest.raises(SynchronizationInProgress) as caught:
                replica.synchronize_all()
            refused.append(str(caught.value))
            replica.create("Note", {"phase": str(progress.phase)})
            assert sum(1 for _ in replica.query("Note")) == len(refused) + 1
            assert replica.pending_count() >= len(refused)
            replica.trim_log()

        replica.create("Note", {}, "first")
        report = replica.synchronize_all(on_progress=on_progress)
        assert report.applied == 1
        assert len(refused) >= 4, "it is called in each phase"
        assert set(refused) == {SIMULTANEOUS}
        assert replica.synchronize_all().applied == len(refused)
        _check_synchronized(held.store, [replica])


@pytest.mark.parametrize("phase", list(Phase))
def test_a_callback_closes_its_replica(held: HeldServer, tmp_path: Path, phase: Phase) -> None:
    """A progress callback that closes the replica ends the synchronization with an error that says so."""
    held.released.set()
    directory = tmp_path / "replica"
    replica = Replica(directory, server=held.address)
    replica.create("Note", {"file": replica.add_file(b"a file")}, "first")

    def on_progress(progress: Progress) -> None:
        if progress.phase is phase and not (phase is Phase.PUBLISH and progress.done):
            replica.close()

    with pytest.raises(ResourceClosed):
        replica.synchronize_all(on_progress=on_progress)
    with Replica(directory, server=held.address) as again:
        again.synchronize_all()
        assert [logged.status for logged in again.log()] == ["applied"]
        _check_synchronized(held.store, [again])


def test_closing_ends_a_synchronization(held: HeldServer, tmp_path: Path) -> None:
    """A replica that is closed while another thread synchronizes it ends that, and loses nothing."""
    with Replica(tmp_path / "replica", server=held.address) as replica, _synchronizing(replica, held) as first:
        replica.close()
        assert isinstance(first.exception(RESULT_SECONDS_MAX), ResourceClosed)
    held.released.set()
    with Replica(tmp_path / "replica", server=held.address) as again:
        again.synchronize_all(timeout=RESULT_SECONDS_MAX)
        assert [logged.status for logged in again.log()] == ["applied"]


def test_a_hook_calls_what_would_wait_for_it(tmp_path: Path) -> None:
    """A hook that writes past its context, or has to wait for the server it runs in, gets an error; all goes on."""
    store = LmdbStore(tmp_path / "server")
    app = Application()
    errors: dict[str, Exception] = {}
    inner = Replica(tmp_path / "inner")

    @app.before_commit("Note")
    def hook(note: HookObject, context: HookContext) -> None:
        inner.create("Note", {}, note.id)
        assert server.tenant().get("Note", "none") is None
        for name, call in (
            ("tenant", lambda: server.tenant().create("Other", {})),
            ("store", lambda: store.submit("default", lambda reader: (None, None)).result()),
            ("replica", lambda: inner_synchronizing.synchronize_all(timeout=0.5)),
        ):
            try:
                call()
            except TidelogError as error:
                errors[name] = error

    with (
        inner,
        Server(app, store=store) as server,
        Replica(tmp_path / "inner", server=server.address) as inner_synchronizing,
        Replica(tmp_path / "replica", server=server.address) as replica,
    ):
        replica.create("Note", {}, "note")
        assert replica.synchronize_all().applied == 1
        assert {name: type(error) for name, error in errors.items()} == {
            "tenant": StorageError,
            "store": StorageError,
            "replica": ServerUnavailable,
        }
        assert inner.pending_count() == 1
        replica.create("Other", {}, "other")
        assert replica.synchronize_all().applied == 1
        _check_synchronized(store, [replica])
    store.close()


def test_local_work_goes_on_during_a_synchronization(held: HeldServer, tmp_path: Path) -> None:
    """While the server makes a synchronization wait, everything local works, and none of it is lost."""
    with Replica(tmp_path / "replica", server=held.address) as replica:
        replica.create("Note", {"n": 1}, "before")
        with _synchronizing(replica, held) as first:
            replica.create("Note", {"n": 1}, "meanwhile")
            replica.update("Note", "before", increment={"n": 1})
            replica.delete("Slow", "slow")
            assert not first.done(), "none of this had to wait for the server"
            held.released.set()
            first.result(RESULT_SECONDS_MAX)
        assert replica.get("Slow", "slow") is None
        assert replica.pending_count() == 3
        before = replica.get("Note", "before")
        assert before is not None
        assert before["n"] == 2
        assert replica.synchronize_all().applied == 3
        _check_synchronized(held.store, [replica])


def test_writers_and_synchronizations_side_by_side(tmp_path: Path) -> None:
    """Two replicas are written to by threads while both synchronize all the time; in the end all agree."""
    store = LmdbStore(tmp_path / "server")
    with Server(Application(), store=store) as server:
        replicas = [Replica(tmp_path / name, server=server.address, durability="relaxed") for name in ("a", "b")]
        try:
            for replica in replicas:
                replica.create("Counter", {}, f"of {replica.path.name}")
            done = threading.Event()

            def write(replica: Replica) -> None:
                for number in range(150):
                    replica.create("Note", {"n": number}, f"{replica.path.name}-{number}")
                    replica.update("Counter", f"of {replica.path.name}", increment={"n": 1})
                    if number % 3 == 0:
                        replica.delete("Note", f"{replica.path.name}-{number}")

            def synchronize(replica: Replica) -> None:
                while not done.is_set():
                    replica.synchronize_all()

            with ThreadPoolExecutor() as pool:
                synchronizing = [pool.submit(synchronize, replica) for replica in replicas]
                try:
                    _together([partial(write, replica) for replica in replicas])
                finally:
                    done.set()
                for one in synchronizing:
                    one.result(RESULT_SECONDS_MAX)
            for replica in (*replicas, *replicas):
                replica.synchronize_all()
            for replica in replicas:
                assert replica.count("Note") == 200
                assert [one["n"] for one in replica.query("Counter")] == [150, 150]
            _check_synchronized(store, replicas)
        finally:
            for replica in replicas:
                replica.close()
    store.close()


# --- many sessions on one server --------------------------------------------------------


def test_many_sessions_upload_at_once(tmp_path: Path) -> None:
    """A dozen replicas upload and download at the same moment; each operation is applied once, and all agree."""
    store = LmdbStore(tmp_path / "server", map_bytes=SMALL_MAP_BYTES)
    with Server(Application(), store=store) as server:
        replicas = [
            Replica(tmp_path / str(number), server=server.address, durability="relaxed") for number in range(12)
        ]
        try:
            for replica in replicas:
                with replica.transaction() as transaction:
                    for number in range(120):
                        transaction.create("Note", {"text": "x" * 200}, f"{replica.path.name}-{number}")
                replica.create("Counter", {}, "shared")
                replica.update("Counter", "shared", increment={"n": 1})
            reports = _together([replica.synchronize_all for replica in replicas])
            # One of them created the counter; for the others it was there already, or was another one's.
            assert sum(report.applied for report in reports) == 12 * 120 + 2
            assert sum(report.rejected for report in reports) == 11 * 2
            _together([replica.synchronize_all for replica in replicas])
            assert {replica.count("Note") for replica in replicas} == {12 * 120}
            _check_synchronized(store, replicas)
        finally:
            for replica in replicas:
                replica.close()
    store.close()


def test_waiting_sessions_share_a_commit(held: HeldServer, tmp_path: Path) -> None:
    """Sessions that wait for the writer at the same moment are committed together: one sync to disk for all."""
    waiting = [Replica(tmp_path / f"waiting-{number}", server=held.address) for number in range(6)]
    try:
        for replica in waiting:
            replica.create("Note", {}, replica.path.name)
        with Replica(tmp_path / "slow", server=held.address) as slow, _synchronizing(slow, held) as first:
            with ThreadPoolExecutor() as pool:
                calls = [pool.submit(replica.synchronize_all) for replica in waiting]
                wait_until(lambda: held.store._jobs.qsize() >= len(waiting), "the sessions do not arrive")
                held.released.set()
                for call in calls:
                    assert call.result(RESULT_SECONDS_MAX).applied == 1
            first.result(RESULT_SECONDS_MAX)
        with held.store.read("default") as reader:
            versions = reader.head().version
            commits = [version for version in range(1, versions + 1) if reader.commit_id(version) is not None]
        assert versions == len(waiting) + 1
        assert len(commits) < versions, "several sessions ended in one commit"
        _together([replica.synchronize_all for replica in waiting])
        _check_synchronized(held.store, waiting)
    finally:
        held.released.set()
        for replica in waiting:
            replica.close()


def test_a_vanishing_client_disturbs_nobody(held: HeldServer, tmp_path: Path) -> None:
    """A client that goes away in the middle of a batch does not keep others from being served."""
    with (
        Replica(tmp_path / "leaving", server=held.address) as leaving,
        Replica(tmp_path / "other", server=held.address) as other,
    ):
        leaving.create("Slow", {}, "slow")
        with pytest.raises(ServerUnavailable, match="could not be reached, or broke off"):
            leaving.synchronize_all(timeout=0.5)
        assert held.reached.is_set()
        held.released.set()
        other.create("Note", {}, "note")
        assert other.synchronize_all(timeout=RESULT_SECONDS_MAX).applied == 1
        assert leaving.synchronize_all(timeout=RESULT_SECONDS_MAX).applied == 1
        other.synchronize_all()
        _check_synchronized(held.store, [leaving, other])


# --- helpers ----------------------------------------------------------------------------


@contextmanager
def _synchronizing(replica: Replica, held: HeldServer) -> Iterator[Future[Any]]:
    """Synchronize in a thread that the server keeps waiting in the middle of the upload."""
    replica.create("Slow", {}, "slow")
    phases: list[Phase] = []

    def on_progress(progress: Progress) -> None:
        phases.append(progress.phase)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(replica.synchronize_all, on_progress=on_progress)
        try:
            assert held.reached.wait(RESULT_SECONDS_MAX)
            yield call
        finally:
            held.released.set()
            call.exception(RESULT_SECONDS_MAX)


def _together(works: list[Callable[[], Any]]) -> list[Any]:
    """Run functions in threads, all at the same time, and return what they return."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [run.result(RESULT_SECONDS_MAX) for run in [pool.submit(work) for work in works]]


def _output(role: str, directory: Path) -> list[str]:
    """Run a process to its end, and return the lines that it printed."""
    process = start(role, directory, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=RESULT_SECONDS_MAX)
    finally:
        _end([process])
    assert process.returncode == 0
    return output.splitlines()


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """End processes that should have ended by themselves."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _check_alone(replica: Replica) -> None:
    """Check what holds of a replica that never met a server."""
    record = read_replica(replica._storage)
    committed = Committed(record.log)
    assert list(record.pending) == list(committed.data)
    promises.check_log(record, committed)
    promises.check_versions_shown(record, committed)


def _check_synchronized(store: LmdbStore, replicas: list[Replica]) -> None:
    """Check all promises of replicas that have nothing left to synchronize."""
    records = [read_replica(replica._storage) for replica in replicas]
    committed = {record.replica_id: Committed(record.log) for record in records}
    server = read_server(store, {record.replica_id: record.last_seq for record in records})
    promises.check_by_version(server)
    promises.check_settled_marks(server)
    promises.check_change_log(server)
    for record in records:
        promises.check_replica(server, record, committed[record.replica_id])
        promises.check_converged_when_quiet(server, record, not_ready=())
