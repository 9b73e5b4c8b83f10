"""
A small session is cut after every byte, in either direction, by an end or a reset.

A server runs as a process of its own behind a proxy. Each cut has a replica and a tenant of
its own, with the same work to synchronize: commit groups, intents, a refused operation, a
deletion whose hook deletes and creates other objects, downloads and removals. In the end
everything has to be settled exactly once, and every replica as its tenant is.

python -m tests.cuts                                 every byte: some minutes
python -m tests.cuts --every 50 --seed 7             one in fifty, which ones is up to the seed
python -m tests.cuts --only down-713-reset           one cut
"""

# ruff: noqa: T201 - a program prints

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final, NamedTuple, Self

from tests.builders import contents, quick_folder
from tests.simulation import promises
from tests.simulation.processes import SCHEMA, start
from tests.simulation.records import Committed, ReplicaRecord, read_replica, read_server

from tidelog.testing import Proxy
from tidelog_client import Replica, _synchronizer
from tidelog_server import LmdbStore

# What varies in a session's length: acknowledgements and windows of the transport.
LENGTH_VARIES_BYTES: Final = 100
OPERATIONS: Final = 10
BACKOFF_SECONDS: Final = 0.002
UNCUT: Final = "uncut"


class Cut(NamedTuple):
    """
    Where a connection is cut.

    Attributes:
        way: "up" or "down".
        offset: How many bytes still pass in that direction.
        resets: Whether both ends see a reset instead of an orderly end.
    """

    way: str
    offset: int
    resets: bool

    def __str__(self) -> str:
        return f"{self.way}-{self.offset}-{'reset' if self.resets else 'end'}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote."""
        way, offset, kind = text.split("-")
        return cls(way, int(offset), kind == "reset")


class Trial(NamedTuple):
    """
    What became of one replica.

    Attributes:
        record: What its directory held in the end.
        attempts: How often it called the server in the session that was cut.
        bytes_passed: How many bytes that took, "up" and "down".
        was_cut: Whether the session came as far as to be cut.
    """

    record: ReplicaRecord
    attempts: int
    bytes_passed: dict[str, int]
    was_cut: bool


class Cuts:
    """
    A server in a process of its own, a proxy before it, and the trials that were made.

    Use it as a context manager; at its end no process is left.
    """

    def __init__(self, folder: Path) -> None:
        self.trials: dict[str, Trial] = {}
        self._folder = folder
        self._store = folder / "server"

    def __enter__(self) -> Self:
        self._server = start("serve_tenants", self._store, stdout=subprocess.PIPE)
        if self._server.stdout is None:
            raise AssertionError("the server has no output")
        self._address = self._server.stdout.readline().strip()
        self._proxy = Proxy(self._address)
        self._proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.__exit__(None, None, None)
        self._end_server()

    def lengths(self) -> dict[str, int]:
        """Make an uncut trial and return how many bytes its session takes in each direction, at most."""
        trial = self._made(UNCUT, lambda: None)
        return {way: count + LENGTH_VARIES_BYTES for way, count in trial.bytes_passed.items()}

    def make(self, cut: Cut) -> Trial:
        """Cut a session, let the replica synchronize, and check what its own side tells."""
        way = self._proxy.up if cut.way == "up" else self._proxy.down
        try:
            return self._made(str(cut), lambda: way.cut_after(cut.offset, resets=cut.resets))
        finally:
            way.mend()

    def check_all(self) -> None:
        """Kill the server and hold every replica's record against what the store has."""
        self._end_server()
        store = LmdbStore(self._store)
        try:
            for tenant, trial in self.trials.items():
                record = trial.record
                committed = {record.replica_id: Committed(record.log)}
                server = read_server(store, {record.replica_id: record.last_seq}, tenant=tenant)
                with _naming(tenant):
                    promises.check_everything(server, {record.replica_id: record}, committed)
                    promises.check_converged_when_quiet(server, record, not_ready=())
                    if len(server.failures) != 1:
                        raise AssertionError(
                            f"one operation was refused, {len(server.failures)} failures are recorded"
                        )
        finally:
            store.close()

    def _made(self, tenant: str, arm: Callable[[], None]) -> Trial:
        path, ways = self._folder / tenant, {"up": self._proxy.up, "down": self._proxy.down}
        with Replica(path, server=self._address, token=tenant, schema=SCHEMA) as replica:
            replica.create("Note", {"n": 0, "tags": []}, "counted")
            replica.create("Order", {"title": "an order"}, "order")
            replica.create("Line", {"order": "order"}, "line")
            replica.synchronize_all()
            _work(replica)
        before = {name: (way.byte_count, way.cut_count) for name, way in ways.items()}
        arm()
        with Replica(path, server=self._proxy.address, token=tenant, schema=SCHEMA) as replica, _naming(tenant):
            report = replica.synchronize_all()
            passed = {name: way.byte_count - before[name][0] for name, way in ways.items()}
            was_cut = any(way.cut_count > before[name][1] for name, way in ways.items())
            told = (report.applied, report.rejected, len(report.failures))
            if told != (OPERATIONS - 1, 1, 1):
                raise AssertionError(f"{OPERATIONS} operations, of which one is refused: {told}")
            again = replica.synchronize_all()
            if again.applied or again.rejected or again.downloaded or again.removed:
                raise AssertionError(f"there was something left to be done: {again}")
            _check_shown(replica)
            trial = Trial(read_replica(replica._storage), report.attempts, passed, was_cut)
            if trial.record.pending:
                raise AssertionError(f"still pending: {trial.record.pending}")
            if len(trial.record.failures) != 1:
                raise AssertionError(f"one operation was refused, {len(trial.record.failures)} failures are recorded")
        shutil.rmtree(path)
        self.trials[tenant] = trial
        return trial

    def _end_server(self) -> None:
        self._server.kill()
        self._server.wait()
        if self._server.stdout is not None:
            self._server.stdout.close()


def _work(replica: Replica) -> None:
    """Commit what the session is to settle: `OPERATIONS` operations, one of them refused."""
    with replica.transaction(atomic=True) as transaction:
        transaction.create("Note", {"of": "a group"}, "first")
        transaction.create("Note", {"of": "a group"}, "second")
        transaction.update("Note", "counted", increment={"n": 1}, add={"tags": ["a"]})
    replica.create("Task", {"title": ""}, "refused")
    replica.update("Note", "counted", increment={"n": 10}, add={"tags": ["b"]})
    replica.delete("Order", "order")
    replica.create("Task", {"title": "Counted", "counted": True, "tidy": True}, "task")
    with replica.transaction(atomic=True) as transaction:
        transaction.create("Note", {}, "gone soon")
        transaction.delete("Note", "gone soon")
    replica.update("Note", "counted", increment={"n": 100})


def _check_shown(replica: Replica) -> None:
    shown = {entity: contents(replica, entity) for entity in ("Note", "Order", "Line", "Task", "Counter", "Audit")}
    expected = {
        "Note": {
            "counted": {"n": 111, "tags": ["a", "b"]},
            "first": {"of": "a group"},
            "second": {"of": "a group"},
        },
        "Order": {},
        "Line": {},
        "Task": {"task": {"title": "Counted", "counted": True, "tidy": True, "slug": "counted"}},
        "Counter": {"task": {"count": 1}},
        "Audit": {"order": shown["Audit"].get("order", {"is": "not there"})},
    }
    if shown != expected or shown["Audit"]["order"].get("title") != "an order":
        raise AssertionError(f"shown is {shown}")


@contextmanager
def _naming(tenant: str) -> Iterator[None]:
    """Say with every finding how to see it again."""
    try:
        yield
    except Exception as error:
        error.add_note(f"python -m tests.cuts --only {tenant}")
        raise


@contextmanager
def impatient() -> Iterator[None]:
    """Let replicas of this process try again at once."""
    before = _synchronizer.BACKOFF_SECONDS_FIRST
    _synchronizer.BACKOFF_SECONDS_FIRST = BACKOFF_SECONDS  # type: ignore[misc]  # shorter, for a test
    try:
        yield
    finally:
        _synchronizer.BACKOFF_SECONDS_FIRST = before  # type: ignore[misc]


def every(lengths: dict[str, int]) -> list[Cut]:
    """Return all cuts there are."""
    return [
        Cut(way, offset, resets)
        for way, length in lengths.items()
        for offset in range(length + 1)
        for resets in (False, True)
    ]


def sample(cuts: Iterable[Cut], one_in: int, seed: int) -> list[Cut]:
    """Return one of every *one_in* that follow each other."""
    dice, cuts = Random(seed), list(cuts)
    return [dice.choice(cuts[first : first + one_in]) for first in range(0, len(cuts), one_in)]


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuts", description="Cut a session after every byte.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one cut in N (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--only", type=Cut.parse, metavar="CUT", help="make one cut: down-713-reset")
    options = parser.parse_args()
    with quick_folder() as folder, impatient(), Cuts(folder) as cuts:
        lengths = cuts.lengths()
        chosen = [options.only] if options.only else sample(every(lengths), options.every, options.seed)
        print(f"{len(chosen)} cuts of {lengths['up']} bytes up and {lengths['down']} bytes down", flush=True)
        attempts: Counter[int] = Counter()
        began = time.monotonic()
        for number, cut in enumerate(chosen, start=1):
            trial = cuts.make(cut)
            attempts[trial.attempts] += trial.was_cut
            if number % 1000 == 0:
                print(f"{number} made, {time.monotonic() - began:.0f} s", flush=True)
        cuts.check_all()
    print(f"{attempts.total()} sessions were cut; attempts that they took: {dict(sorted(attempts.items()))}")
    print("every operation was settled once, and every replica ended as its tenant")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
