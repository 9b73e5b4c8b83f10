from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.builders import REPLICA_A, TENANT
from tests.contract.store_contract import (
    UNBOUNDED,
    Refusal,
    StoreContract,
    failing,
    ids_of,
    recording,
    task,
    writing,
)

from tidelog import DiskFull, FormatUnsupported, ResourceClosed, StorageError, StoreInUse
from tidelog_client import Replica
from tidelog_server import LmdbStore
from tidelog_server import _lmdb_store as lmdb_store
from tidelog_server._attempts import Attempt, decode_under_way
from tidelog_server._records import FailureRecord, Settled, Writes
from tidelog_server._store import Reader
from tidelog_server._survivor import Survivor


class TestLmdbStore(StoreContract):
    def open(self, folder: Path) -> LmdbStore:
        """Open the store in a folder."""
        return LmdbStore(folder)


def run_of(store: LmdbStore) -> bytes:
    """Return which life of the store this is."""
    with store.read(TENANT) as reader:
        return reader.run()


def test_another_opening_is_another_run(tmp_path: Path) -> None:
    """Between two openings somebody may have put an older directory in the place of this one."""
    runs = set()
    for _ in range(3):
        with closing(LmdbStore(tmp_path / "store")) as store:
            runs.add(run_of(store))

    assert len(runs) == 3


class Gate:
    """A job that holds the writer up, so that those submitted behind it come together."""

    def __init__(self, store: LmdbStore) -> None:
        entered = threading.Event()
        self._release = threading.Event()

        def holds(reader: Reader) -> tuple[None, None]:
            entered.set()
            self._release.wait(10)
            return None, None

        self.held = store.submit(TENANT, holds)
        assert entered.wait(10)

    def open(self) -> None:
        """Let the writer go on."""
        self._release.set()
        self.held.result(10)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Give an empty store on a real disk."""
    opened = LmdbStore(tmp_path / "store")
    yield opened
    opened.close()


def commit_ids(store: LmdbStore, versions: range) -> list[bytes]:
    """Return the ids of the commits that ended at some versions."""
    with store.read(TENANT) as reader:
        return [id_ for version in versions if (id_ := reader.commit_id(version)) is not None]


class TestUnderWay:
    """What the next process would find if this one died now."""

    def test_a_group_is_under_way_together(self, store: LmdbStore) -> None:
        """What is committed together is under way together; what asks for it is alone, and nothing is afterwards."""
        seen: dict[str, list[int]] = {}

        def looking(name: str) -> Callable[[Reader], tuple[None, None]]:
            def look(reader: Reader) -> tuple[None, None]:
                seen[name] = _under_way(store.path)
                return None, None

            return look

        gate = Gate(store)
        store.submit(TENANT, looking("first"), Attempt(REPLICA_A, 1))
        store.submit(TENANT, looking("second"), Attempt(REPLICA_A, 2))
        store.submit(TENANT, looking("alone"), Attempt(REPLICA_A, 3, 1, alone=True))
        store.submit(TENANT, looking("nothing to tell"))
        last = store.submit(TENANT, looking("last"), Attempt(REPLICA_A, 4))
        gate.open()
        last.result(10)

        assert seen == {"first": [1, 2], "second": [1, 2], "alone": [3], "nothing to tell": [4], "last": [4]}
        assert _under_way(store.path) == []

    def test_a_death_leaves_it(self, store: LmdbStore, tmp_path: Path) -> None:
        """A process that dies in a job leaves what was under way, as it was announced last, until it is forgotten."""
        attempt = Attempt(REPLICA_A, 9, 4)
        script = textwrap.dedent(f"""
            import os, sys
            from tidelog_server import LmdbStore
            from tidelog_server._attempts import Attempt

            store = LmdbStore(sys.argv[1])

            def job(reader):
                store.announce("other", Attempt({REPLICA_A!r}, 9, 4))
                os._exit(3)

            store.submit("other", job, Attempt({REPLICA_A!r}, 12, alone=True)).result()
        """)
        directory = tmp_path / "dying"
        assert subprocess.run([sys.executable, "-c", script, str(directory)], check=False, timeout=60).returncode == 3

        for _ in range(2):
            following = LmdbStore(directory)
            assert following.left_under_way() == [("other", attempt)]
            following.close()
        following = LmdbStore(directory)
        following.forget_under_way()
        assert list(following.left_under_way()) == []
        following.close()
        following = LmdbStore(directory)
        assert following.left_under_way() == []
        following.close()


def _under_way(path: Path) -> list[int]:
    with closing(Survivor(path / "under-way")) as survivor:
        return [attempt.seq for _tenant, attempt in decode_under_way(survivor.read())]


class TestGroupCommit:
    def test_jobs_that_wait_are_committed_together(self, store: LmdbStore) -> None:
        """Jobs that queue up while the writer is busy are one commit: one id, at the last of their versions."""
        gate = Gate(store)
        futures = [store.submit(TENANT, writing(task(f"t{number}"), result=number)) for number in range(1, 21)]
        gate.open()

        assert [future.result(10) for future in futures] == list(range(1, 21))
        with store.read(TENANT) as reader:
            head = reader.head()
            assert (head.version, reader.commit_id(20)) == (20, head.commit_id)
        assert commit_ids(store, range(1, 21)) == [head.commit_id]

    def test_jobs_that_come_one_by_one_are_not(self, store: LmdbStore) -> None:
        """Jobs that come after each other are commits of their own."""
        for number in range(1, 6):
            store.submit(TENANT, writing(task(f"t{number}"))).result(10)

        assert len(set(commit_ids(store, range(1, 6)))) == 5

    def test_several_tenants_in_one_commit(self, store: LmdbStore) -> None:
        """A commit may serve several tenants; each gets its head and its commit id."""
        gate = Gate(store)
        futures = [store.submit(tenant, writing(task("t1"), task("t2"))) for tenant in ("one", "two", "one")]
        gate.open()
        for future in futures:
            future.result(10)

        for tenant, version in (("one", 4), ("two", 2)):
            with store.read(tenant) as reader:
                assert reader.head().version == version
                assert reader.commit_id(version) == reader.head().commit_id
                assert reader.commit_id(version // 2) is None or version == 2

    def test_a_group_is_bounded(self, store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """More jobs than a group may have are several commits."""
        monkeypatch.setattr(lmdb_store, "GROUP_JOBS_MAX", 4)
        gate = Gate(store)
        futures = [store.submit(TENANT, writing(task(f"t{number}"))) for number in range(10)]
        gate.open()
        for future in futures:
            future.result(10)

        assert len(commit_ids(store, range(1, 11))) >= 3

    def test_a_job_that_fails_among_others(self, store: LmdbStore) -> None:
        """A job that fails leaves no gap in the versions of those that share its commit."""

        def fails(reader: Reader) -> tuple[Writes, None]:
            raise Refusal("no")

        gate = Gate(store)
        before = store.submit(TENANT, writing(task("t1")))
        failed = store.submit(TENANT, fails)
        after = store.submit(TENANT, writing(task("t2")))
        gate.open()

        before.result(10)
        after.result(10)
        assert isinstance(failed.exception(10), Refusal)
        with store.read(TENANT) as reader:
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [1, 2]

    def test_nobody_can_cancel_a_job_that_waits(self, store: LmdbStore) -> None:
        """A job that still waits for the writer cannot be cancelled, and neither can the one that runs."""
        gate = Gate(store)
        waits = store.submit(TENANT, writing(task("t1"), result="done"))

        assert not waits.cancel()
        assert not gate.held.cancel()
        gate.open()
        assert waits.result(10) == "done"

    def test_a_commit_that_fails(self, store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the commit fails so do all its jobs; nothing of them is written, and the next ones go on."""
        store.submit(TENANT, writing(task("t0"))).result(10)
        with store.read(TENANT) as reader:
            head = reader.head()
        write = store._environment.write
        gate = Gate(store)

        def runs_and_fails(work: Callable[[Any], Any]) -> Any:
            def all_but_commit(transaction: Any) -> None:
                work(transaction)
                raise DiskFull("no room left")

            return write(all_but_commit)

        monkeypatch.setattr(store._environment, "write", runs_and_fails)
        futures: list[Future[Any]] = [
            store.submit(TENANT, writing(task("t1"))),
            store.submit(TENANT, recording((1, Settled(1, 1, False, b"", False)))),
            store.submit(TENANT, failing(FailureRecord(b"1" * 16, b"x", bytes(16), (task("t9"),)))),
        ]
        gate.open()
        errors = [future.exception(10) for future in futures]
        monkeypatch.undo()

        assert [type(error) for error in errors] == [DiskFull] * 3
        with store.read(TENANT) as reader:
            assert reader.head() == head
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t0"]
            assert reader.failures(b"", 10, 1 << 30) == []
        store.submit(TENANT, writing(task("t2"))).result(10)
        with store.read(TENANT) as reader:
            assert reader.head().version == 2

    def test_a_job_that_cannot_be_written(self, store: LmdbStore) -> None:
        """Writes that make no sense harm neither the store nor whoever comes later."""
        nonsense: Any = Writes({task("t1"): (None, 0)}, [], None, [], [], 1)  # type: ignore[dict-item]

        assert store.submit(TENANT, lambda reader: (nonsense, None)).exception(10) is not None

        store.submit(TENANT, writing(task("t2"))).result(10)
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t2"]

    def test_a_job_may_run_again(self, tmp_path: Path) -> None:
        """When the map has to grow in the middle, jobs run again, and each is written once."""
        store = LmdbStore(tmp_path / "small", map_bytes=256 * 1024)
        runs: list[int] = []

        def job(number: int) -> Callable[[Reader], Any]:
            def work(reader: Reader) -> Any:
                runs.append(number)
                return writing(task(f"t{number}"), attributes=b"x" * 100_000)(reader)

            return work

        futures = [store.submit(TENANT, job(number)) for number in range(40)]
        for future in futures:
            future.result(10)

        assert len(runs) > 40
        with store.read(TENANT) as reader:
            assert reader.head().version == 40
            assert len(reader.entity_objects("Task", "", 100, UNBOUNDED).objects) == 40
            assert len(reader.changes(0, 100, UNBOUNDED)) == 40
        store.close()


class TestOpening:
    def test_one_server_a_store(self, store: LmdbStore) -> None:
        """A store that is open cannot be opened again, and can once it is closed."""
        with pytest.raises(StoreInUse):
            LmdbStore(store.path)

        store.submit(TENANT, writing(task("t1"))).result(10)
        store.close()
        again = LmdbStore(store.path)
        with again.read(TENANT) as reader:
            assert reader.head().version == 1
        again.close()

    @pytest.mark.slow
    def test_one_server_a_store_over_processes(self, store: LmdbStore) -> None:
        """Another process cannot open it either."""
        script = """
            import sys
            from tidelog import StoreInUse
            from tidelog_server import LmdbStore
            try:
                LmdbStore(sys.argv[1])
            except StoreInUse as error:
                print("in use")
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(store.path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

        assert done.stdout.strip() == "in use"

    def test_a_directory_of_something_else(self, tmp_path: Path) -> None:
        """The directory of a replica is refused, and can still be used as one."""
        Replica(tmp_path / "a").close()

        with pytest.raises(FormatUnsupported):
            LmdbStore(tmp_path / "a")

        Replica(tmp_path / "a").close()

    def test_what_is_no_directory(self, tmp_path: Path) -> None:
        """A path that cannot be a directory is a typed error."""
        (tmp_path / "file").write_text("x")

        with pytest.raises(StorageError):
            LmdbStore(tmp_path / "file")

    def test_what_comes_in_the_instant_of_closing(self, store: LmdbStore) -> None:
        """While a store is being closed, what was submitted before is done, and what comes later is refused."""
        gate = Gate(store)
        submitted = store.submit(TENANT, writing(task("t1"), result="done"))
        closing = threading.Thread(target=store.close)
        closing.start()
        while not store._closing:
            pass
        with pytest.raises(ResourceClosed):
            store.submit(TENANT, writing(task("t2")))
        gate.open()
        closing.join(10)

        assert submitted.result(0) == "done"
