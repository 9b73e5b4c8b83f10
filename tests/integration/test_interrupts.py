"""
Ctrl-C at any place of tidelog's own code in a commit, a synchronization, opening and closing, and in the command line.

Every place, not only some:
TIDELOG_INTERRUPT_STRIDE=1 pytest tests/integration/test_interrupts.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Unfinished
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from tests.builders import quick_folder
from tests.interrupts import Interrupted, run_interrupted
from tests.simulation import promises
from tests.simulation.processes import wait_until
from tests.simulation.records import Committed, read_replica

from tidelog import ServerUnavailable
from tidelog_client import FileDownload, Replica, _file_exchange
from tidelog_client._commit import _Commit
from tidelog_server import Application, HookContext, HookObject, Server

pytestmark = pytest.mark.slow

# A prime: over the years, and in other versions of the code, other places have their turn.
STRIDE: Final = int(os.environ.get("TIDELOG_INTERRUPT_STRIDE", "37"))
# Of those at which it has to be found out whether a commit was made there are few.
LEADER_STRIDE: Final = 5
PLACES_MAX: Final = 100_000
# What does not come back in this time is taken to wait for ever.
HANG_SECONDS: Final = 20.0
TIDELOG: Final = shutil.which("tidelog", path=str(Path(sys.executable).parent)) or "tidelog"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder where a sync to disk costs nothing."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """Give a server."""
    with Server(Application(), store=folder / "server") as running:
        yield running


def places(stride: int = STRIDE) -> Iterator[int]:
    """Give the numbers of the places to be tried."""
    return iter(range(1, PLACES_MAX, stride))


def within(work: Callable[[], Any]) -> Any:
    """Do something in another thread, and fail if it never comes back."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(HANG_SECONDS)
    except Unfinished:
        raise AssertionError("it waits for ever") from None
    finally:
        pool.shutdown(wait=False)


def check(replica: Replica) -> None:
    """Check that a replica is whole, and that everything goes on: here, in other threads, and with the server."""
    record = read_replica(replica._storage)
    committed = Committed(record.log)
    promises.check_log(record, committed)
    promises.check_versions_shown(record, committed)
    within(lambda: replica.create("After", {}))
    replica.create("After", {})
    within(lambda: replica.synchronize_all(timeout=HANG_SECONDS))
    assert replica.pending_count() == 0
    assert list(replica.failures()) == []


@pytest.mark.timeout(600)
def test_a_commit_is_interrupted(folder: Path, server: Server) -> None:
    """An interrupted commit is there whole or not at all, and nothing waits for what it left."""
    for place in places():
        with Replica(folder / str(place), server=server.address) as replica:
            replica.create("Note", {"n": 0}, f"note-{place}")

            def commit(replica: Replica = replica, place: int = place) -> None:
                with replica.transaction(atomic=True) as transaction:
                    transaction.create("Note", {}, f"other-{place}")
                    transaction.update("Note", f"note-{place}", {"n": 1})

            # The exception lives on while it is checked, as it does where somebody handles it.
            error = run_interrupted(commit, place)
            assert error is None or isinstance(error, Interrupted), repr(error)
            note = replica.get("Note", f"note-{place}")
            assert note is not None
            assert (note["n"] == 1) == (replica.get("Note", f"other-{place}") is not None), f"a half: {error}"
            check(replica)
            if error is None:
                assert place > 2 * STRIDE, "hardly any place was tried"
                return


@pytest.mark.timeout(600)
def test_a_leader_of_commits_is_interrupted(folder: Path) -> None:
    """Commits that an interrupted thread had taken along are made all the same, each once."""
    for place in places(min(STRIDE, LEADER_STRIDE)):
        with Replica(folder / str(place)) as replica, ThreadPoolExecutor(3) as pool:
            followers: list[Future[Any]] = []
            replica._committer._write = partial(  # type: ignore[method-assign]
                _lead, replica, replica._committer._write, threading.current_thread(), followers, pool
            )
            error = run_interrupted(partial(replica.create, "Note", {}, "leader"), place)

            for follower in followers:
                follower.result(HANG_SECONDS)
            logged = sorted(one.operation.id for one in replica.log())
            assert [id_ for id_ in logged if id_ != "leader"] == [f"follower-{n}" for n in range(len(followers))]
            assert logged.count("leader") <= 1
            if error is None:
                assert "leader" in logged
                assert place > 2 * STRIDE, "hardly any place was tried"
                return


def _lead(  # noqa: PLR0917 - what is fixed, then what it is called with
    replica: Replica,
    write: Callable[[_Commit], None],
    leader: threading.Thread,
    followers: list[Future[Any]],
    pool: ThreadPoolExecutor,
    mine: _Commit,
) -> None:
    """Write commits; the leader waits before until it has followers."""
    if threading.current_thread() is leader:
        followers.extend(pool.submit(replica.create, "Note", {}, f"follower-{number}") for number in range(3))
        wait_until(lambda: len(replica._committer._waiting) == 4, "they do not come")
    write(mine)


def test_nothing_of_grpc_can_be_interrupted(folder: Path, server: Server) -> None:
    """
    No code of gRPC's runs in a thread to which an interrupt comes.

    There one may leave a lock taken that all later calls wait for, or end the process: gRPC uses what it has let go.
    """

    def synchronize(replica: Replica) -> None:
        replica.create("Note", {}, "note")
        replica.attach("Note", "note", "photo", b"bytes", name="photo")
        replica.synchronize_all(timeout=HANG_SECONDS)
        replica.synchronize_unsynchronized()
        replica.synchronize_selected([("Note", "note")])

    def work() -> None:
        with Replica(folder / "a", server=server.address) as replica:
            synchronize(replica)
        with Replica(folder / "b", server=server.address, files={"Note": FileDownload("lazy")}) as replica:
            replica.synchronize_all()
            with replica.open_file("Note", "note", "photo") as photo:
                assert photo.read() == b"bytes"
        with Replica(folder / "b", server="127.0.0.1:1") as replica, pytest.raises(ServerUnavailable):
            replica.synchronize_all(timeout=0.1)

    assert run_interrupted(work, 1, in_grpc=True) is None
    error = run_interrupted(lambda: grpc.insecure_channel("127.0.0.1:1").close(), 1, in_grpc=True)
    assert isinstance(error, Interrupted), "no place of gRPC's is seen"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["all", "unsynchronized", "selected"])
def test_a_synchronization_is_interrupted(folder: Path, server: Server, mode: str) -> None:
    """After an interrupted synchronization the replica is whole, its lock is free, and the next one settles it all."""
    with Replica(folder / "other", server=server.address) as other:
        other.create("Note", {}, "of another")
        other.synchronize_all()
    for place in places():
        with Replica(folder / str(place), server=server.address) as replica:
            for number in range(3):
                replica.create("Note", {}, f"{mode}-{place}-{number}")

            def synchronize(replica: Replica = replica, place: int = place) -> None:
                if mode == "all":
                    replica.synchronize_all(timeout=HANG_SECONDS)
                elif mode == "unsynchronized":
                    replica.synchronize_unsynchronized(timeout=HANG_SECONDS)
                else:
                    replica.synchronize_selected([("Note", f"{mode}-{place}-1")], timeout=HANG_SECONDS)

            error = run_interrupted(synchronize, place)
            assert error is None or isinstance(error, Interrupted), repr(error)
            check(replica)
            replica.synchronize_all()
            assert {one.id for one in replica.query("Note")} == {
                "of another",
                *(f"{mode}-{place}-{number}" for number in range(3)),
            }
            # The next replica is not to download ever more, at ever more places.
            for one in [*replica.query("Note"), *replica.query("After")]:
                if one.id != "of another":
                    replica.delete(one.entity, one.id)
            replica.synchronize_all()
            if error is None:
                assert place > 2 * STRIDE, "hardly any place was tried"
                return


@pytest.mark.timeout(600)
def test_opening_is_interrupted(folder: Path, server: Server) -> None:
    """A replica whose opening was interrupted can be opened at once."""
    for place in places():
        opened: list[Replica] = []

        def open_replica(opened: list[Replica] = opened, place: int = place) -> None:
            opened.append(Replica(folder / str(place), server=server.address))

        error = run_interrupted(open_replica, place)
        assert error is None or isinstance(error, Interrupted), repr(error)
        with closing(opened[0] if opened else Replica(folder / str(place), server=server.address)) as replica:
            check(replica)
        if error is None:
            assert place > 2 * STRIDE, "hardly any place was tried"
            return


@pytest.mark.timeout(600)
def test_closing_is_interrupted(folder: Path, server: Server) -> None:
    """A replica whose closing was interrupted can be closed again, and opened."""
    for place in range(1, PLACES_MAX):  # there are few
        replica = Replica(folder / str(place), server=server.address)
        replica.create("Note", {}, f"note-{place}")
        error = run_interrupted(replica.close, place)
        assert error is None or isinstance(error, Interrupted), repr(error)
        within(replica.close)
        with Replica(folder / str(place), server=server.address) as again:
            assert again.get("Note", f"note-{place}") is not None
            check(again)
        if error is None:
            assert place > 2, "hardly any place was tried"
            return


@pytest.mark.parametrize("at", [1, 600, 1_400])
def test_the_command_line_is_interrupted(folder: Path, at: int) -> None:
    """`tidelog sync` that gets SIGINT in the middle of its upload says so, and the next one does the rest."""
    processes: list[subprocess.Popen[str]] = []
    seen = 0
    app = Application()

    @app.before_commit("Note")
    def interrupt(note: HookObject, context: HookContext) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            wait_until(lambda: bool(processes), "it was not started")
            processes[0].send_signal(signal.SIGINT)

    path = folder / "replica"
    with Server(app, store=folder / "server") as server:
        with Replica(path) as replica, replica.transaction() as transaction:
            for number in range(1_500):
                transaction.create("Note", {}, str(number))
        command = [TIDELOG, "sync", "--replica", str(path), "--server", server.address]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        try:
            _output, errors = processes[0].communicate(timeout=60)
        finally:
            processes[0].kill()
        assert processes[0].returncode == 130, errors
        assert "Traceback" not in errors
        with Replica(path, server=server.address) as replica:
            check(replica)
            assert replica.count("Note") == 1_500


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["all", "selected"])
def test_a_synchronization_of_files_is_interrupted(
    folder: Path, server: Server, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interrupted synchronization of files everything agrees, and the next one brings all contents."""
    monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 10)
    with Replica(folder / "other", server=server.address) as other:
        other.create("Note", {"file": other.add_file(b"of another")}, "of another")
        other.synchronize_all()
    for place in places():
        content = b"a larger one %d" % place
        with Replica(folder / str(place), server=server.address) as replica:
            replica.create("Note", {"file": replica.add_file(b"small %d" % place)}, f"small-{place}")
            replica.create("Note", {"file": replica.add_file(content)}, f"large-{place}")

            def synchronize(replica: Replica = replica, place: int = place) -> None:
                if mode == "all":
                    replica.synchronize_all(timeout=HANG_SECONDS)
                else:
                    chosen = [("Note", f"large-{place}"), ("Note", "of another")]
                    replica.synchronize_selected(chosen, timeout=HANG_SECONDS)

            error = run_interrupted(synchronize, place)
            assert error is None or isinstance(error, Interrupted), repr(error)
            check(replica)
            assert within(partial(replica.synchronize_all, timeout=HANG_SECONDS)).skipped == []
            assert list(replica.verify()) == []
            for id_, expected in (("of another", b"of another"), (f"large-{place}", content)):
                with replica.open_file("Note", id_, "file") as file:
                    assert file.read() == expected
            # The next replica is not to download ever more, at ever more places.
            for one in [*replica.query("Note"), *replica.query("After")]:
                if one.id != "of another":
                    replica.delete(one.entity, one.id)
            replica.synchronize_all()
            if error is None:
                assert place > 2 * STRIDE, "hardly any place was tried"
                return


@pytest.mark.timeout(600)
# A file that was just opened, for whoever did not get it any more, is closed when it is forgotten.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_attaching_and_opening_are_interrupted(folder: Path, server: Server) -> None:
    """An interrupted attachment or download leaves nothing in the way of the next one."""
    with Replica(folder / "other", server=server.address) as other:
        other.create("Note", {"file": other.add_file(b"of another")}, "of another")
        other.synchronize_all()
    with Replica(folder / "replica", server=server.address, files={"Note": "lazy"}) as replica:
        replica.synchronize_all()
        for place in places(7):
            replica._storage.files.contents.delete(hashlib.sha256(b"of another").digest())

            def work(place: int = place) -> None:
                replica.attach("Note", "of another", "mine", b"mine %d" % place)
                replica.open_file("Note", "of another", "file", timeout=HANG_SECONDS).close()

            error = run_interrupted(work, place)
            assert error is None or isinstance(error, Interrupted), repr(error)
            within(partial(replica.attach, "Note", "of another", "mine", b"mine %d" % place))
            with within(lambda: replica.open_file("Note", "of another", "file", timeout=HANG_SECONDS)) as file:
                assert file.read() == b"of another"
            if error is None:
                assert place > 2 * STRIDE, "hardly any place was tried"
                break
        within(lambda: replica.synchronize_all(timeout=HANG_SECONDS))
        assert list(replica.verify()) == []
