"""
A server whose process is ended from within, by an operation, or from outside, by a signal, again and again.

More of it: TIDELOG_DEADLY_KILLS=500 TIDELOG_DEADLY_SEED=7 pytest tests/integration/test_deadly_operations.py
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest
from tests.simulation.processes import DEADLY_EXIT_CODE, free_port, start, wait_until

from tidelog import FailureReason, ServerUnavailable
from tidelog_client import Replica
from tidelog_server import LmdbStore
from tidelog_server._attempts import ATTEMPTS_MAX
from tidelog_server._records import Change

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TIDELOG_DEADLY_KILLS", "5"))
SEED = os.environ.get("TIDELOG_DEADLY_SEED", "1")
SECONDS_PER_KILL_MAX = 10


class Supervised:
    """A server that is started again whenever its process has ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self.exit_codes: list[int] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._process = self._start()
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    def kill(self) -> None:
        """End the process from outside, wherever it is."""
        with self._lock:
            self._process.kill()

    def has_died(self, times: int) -> bool:
        """Tell whether it was started again as many times."""
        return len(self.exit_codes) >= times

    def end(self) -> None:
        """Stop it and start it no more."""
        self._ended.set()
        self.kill()
        self._supervisor.join()

    def _start(self) -> subprocess.Popen[str]:
        return start("serve_deadly", self.directory, self.address, stdout=subprocess.DEVNULL)

    def _supervise(self) -> None:
        while True:
            code = self._process.wait()
            with self._lock:
                if self._ended.is_set():
                    return
                self.exit_codes.append(code)
                self._process = self._start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Supervised]:
    """A server that may die."""
    supervised = Supervised(tmp_path / "server")
    try:
        yield supervised
    finally:
        supervised.end()


def test_an_operation_that_ends_the_process_becomes_a_failure(server: Supervised, tmp_path: Path) -> None:
    """After six deaths it is refused with its payload; before, behind and beside it all is applied exactly once."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(Replica(tmp_path / name, server=server.address)) for name in ("a", "b", "c")]
        for replica in replicas:
            for number in range(30):
                replica.create("Note", {"text": "x"}, f"{replica.path.name}-{number}")
        deadly = replicas[0]
        deadly.create("Note", {"deadly": True, "text": "the payload"}, "deadly")
        deadly.update("Note", "deadly", {"text": "behind it"})
        with deadly.transaction(atomic=True) as transaction:
            transaction.create("Note", {"text": "x"}, "grouped")
            transaction.create("Note", {"deadly": True}, "deadly too")
        deadly.create("Note", {"text": "x"}, "a-30")

        with ThreadPoolExecutor() as pool:
            for call in [pool.submit(_synchronize, replica) for replica in replicas]:
                call.result()

        # Once together with others, then each of the two alone until it is given up.
        assert server.exit_codes == [DEADLY_EXIT_CODE] * (2 * ATTEMPTS_MAX + 1)
        assert [replica.pending_count() for replica in replicas] == [0, 0, 0]
        first, behind, grouped = deadly.failures()
        assert first.reason is FailureReason.HOOK_ERROR
        assert first.attributes == {"deadly": True, "text": "the payload"}
        assert behind.reason is FailureReason.DEPENDENCY_FAILED
        assert grouped.reason is FailureReason.HOOK_ERROR
        assert [logged.status for logged in deadly.log(after=30)] == ["failed"] * 4 + ["applied"]
        for replica in replicas:
            _synchronize(replica)
        assert {replica.count("Note") for replica in replicas} == {91}
    server.end()
    created = [change.key[1] for change in _changes(server.directory)]
    assert sorted(created) == sorted([*(f"{name}-{number}" for name in "abc" for number in range(30)), "a-30"])


@pytest.mark.timeout(120 + KILLS * SECONDS_PER_KILL_MAX)
def test_kills_from_outside_refuse_nobody(server: Supervised, tmp_path: Path) -> None:
    """However often a server is killed at random in the middle of its work, no operation is given up."""
    random = Random(SEED)
    done = threading.Event()

    def work(replica: Replica, dice: Random) -> None:
        number = 0
        while not done.is_set():
            with replica.transaction(atomic=dice.random() < 0.2) as transaction:
                for _ in range(dice.choice([1, 20, 200])):
                    transaction.create("Note", {"text": "x" * 100}, f"{replica.path.name}-{number}")
                    number += 1
            _synchronize(replica)

    with ExitStack() as stack:
        replicas = [
            stack.enter_context(Replica(tmp_path / name, server=server.address, durability="relaxed"))
            for name in "abc"
        ]
        with ThreadPoolExecutor() as pool:
            workers = [pool.submit(work, replica, Random(random.random())) for replica in replicas]
            try:
                for kill in range(KILLS):
                    watched = random.choice(replicas)
                    target = _last_seq(watched) + random.randint(1, 300)
                    wait_until(partial(_has_reached, watched, target), "no progress")
                    server.kill()
                    wait_until(partial(server.has_died, kill + 1), "it does not die")
            finally:
                done.set()
            for worker in workers:
                worker.result(60)
        committed = 0
        for replica in replicas:
            _synchronize(replica)
            assert {logged.status for logged in replica.log()} == {"applied"}
            committed += _last_seq(replica)
    server.end()
    assert len(_changes(server.directory)) == committed


def _synchronize(replica: Replica) -> None:
    """Synchronize until it succeeds."""
    while True:
        with suppress(ServerUnavailable):
            replica.synchronize_all(timeout=60)
            return


def _last_seq(replica: Replica) -> int:
    with replica._storage.environment.read() as transaction:
        return replica._storage.last_seq(transaction)


def _has_reached(replica: Replica, seq: int) -> bool:
    return _last_seq(replica) >= seq


def _changes(directory: Path) -> list[Change]:
    store = LmdbStore(directory)
    try:
        with store.read("default") as reader:
            return reader.changes(0, 1_000_000, 1 << 40)
    finally:
        store.close()
