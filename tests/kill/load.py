"""
Kills under load: servers and replicas that edit and synchronize all the time.

A round starts everybody, kills somebody at a random instant, and perhaps what the servers
need, starts those again, kills everybody at once at another random instant, and checks
what they left on disk.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from tests.balancer import Balancer
from tests.kill.children import Child, kill_at_once
from tests.kill.data import Data, contents_at
from tests.kill.roles import serve, work
from tests.simulation import promises
from tests.simulation.application import Weather, make_application
from tests.simulation.processes import SCHEMA, Journal, wait_until
from tests.simulation.records import Committed, ReplicaRecord, ServerRecord, read_replica, read_server

from tidelog_client import Replica
from tidelog_server import Server
from tidelog_server._store import Store

REPLICA_COUNT = 3
PHASE_SECONDS = 0.6
# So many phases begin once somebody has synchronized; in the others processes are killed that have just started.
STARTS_WATCHED = 0.7
START_SECONDS_MAX = 20.0


class Load:
    """A world under load, from its first round to the last."""

    name = "load"

    def __init__(self, folder: Path, dice: Random, data: Data) -> None:
        self.kills: Counter[str] = Counter()
        self._dice = dice
        self._data = data
        self._directories = [folder / f"replica-{number}" for number in range(REPLICA_COUNT)]
        self._journals = [Journal(folder / f"journal-{number}") for number in range(REPLICA_COUNT)]
        self._addresses = [f"127.0.0.1:{free_port()}" for _ in range(data.server_count)]

    def run(self) -> None:
        """Run a round and check what it left."""
        count = len(self._addresses)
        with Balancer(self._addresses) as balancer:

            def start(number: int) -> Child:
                return self._serve(number) if number < count else self._work(number - count, balancer.address)

            children = [start(number) for number in range(count + REPLICA_COUNT)]
            try:
                victims = self._dice.choice(
                    [[0], [count], [count + 1], [count + 2], [0, count], list(range(len(children)))]
                )
                let_work(self._journals, self._dice, PHASE_SECONDS)
                kill_at_once(*(children[victim] for victim in victims))
                kind = "server" if victims[0] < count else "replica"
                self.kills["server and replicas" if len(victims) > 1 else kind] += 1
                if struck := self._data.strike(self._dice):
                    self.kills[struck] += 1
                for victim in victims:
                    children[victim] = start(victim)
                let_work(self._journals, self._dice, PHASE_SECONDS)
            finally:
                kill_at_once(*children)
        self.kills["server and replicas"] += 1
        with self._opened() as (store, replicas):
            server, records, committed = _read(store, replicas)
            promises.check_server(server, committed)
            for record, journal in zip(records, self._journals, strict=True):
                promises.check_replica(server, record, committed[record.replica_id])
                check_acknowledged(record, journal)

    def finish(self) -> None:
        """Let everybody synchronize in peace, and check that all agree."""
        with (
            self._opened() as (store, _),
            Server(
                make_application(Weather(), schema_version=1),
                store=store,
                contents=contents_at(self._data.contents_url, self._data.endpoint),
            ) as server,
        ):
            replicas = [Replica(path, server=server.address, schema=SCHEMA) for path in self._directories]
            try:
                reports = [replica.synchronize_all() for _ in range(2) for replica in replicas]
                record, records, committed = _read(store, replicas)
            finally:
                for replica in replicas:
                    replica.close()
        promises.check_server(record, committed)
        for one, report in zip(records, reports[-REPLICA_COUNT:], strict=True):
            if report.skipped:
                raise AssertionError(f"nothing has to wait: {report.skipped}")
            promises.check_replica(record, one, committed[one.replica_id])
            promises.check_converged_when_quiet(record, one, not_ready=())

    @contextmanager
    def _opened(self) -> Iterator[tuple[Store, list[Replica]]]:
        store = self._data.open()
        replicas = [Replica(path) for path in self._directories]
        try:
            yield store, replicas
        finally:
            for replica in replicas:
                replica.close()
            store.close()

    def _serve(self, number: int) -> Child:
        data = self._data
        return Child(serve, data.place, self._addresses[number], data.contents_url, data.endpoint)

    def _work(self, number: int, address: str) -> Child:
        seed = str(self._dice.random())
        return Child(work, str(self._directories[number]), address, seed, str(self._journals[number].path))


def let_work(journals: Iterable[Journal], dice: Random, seconds_max: float) -> None:
    """Let everybody work for a while: as a rule from the moment on at which somebody has synchronized."""

    def synchronized_count() -> int:
        return sum(journal.lines().count("synchronized") for journal in journals)

    before = synchronized_count()
    if dice.random() < STARTS_WATCHED:
        with suppress(AssertionError):  # on a busy machine everything may take as long
            wait_until(lambda: synchronized_count() > before, "nobody synchronizes", seconds=START_SECONDS_MAX)
    time.sleep(dice.uniform(0, seconds_max))


def check_acknowledged(record: ReplicaRecord, journal: Journal) -> None:
    """Check that what a process once took for committed is in the log, and that it met no error."""
    lines = journal.lines()
    if errors := [line for line in lines if line.startswith("error")]:
        raise AssertionError(f"a synchronization failed for no reason: {errors}")
    operations = Committed(record.log).operations.values()
    logged = {operation.decoded_patch().set.get("mark") for operation in operations}
    acknowledged = [mark for line in lines if line.startswith("committed") for mark in line.split()[1:]]
    if lost := [mark for mark in acknowledged if mark not in logged]:
        raise AssertionError(f"Durable: {len(lost)} of {len(acknowledged)} acknowledged operations are not in the log")


def _read(store: Store, replicas: list[Replica]) -> tuple[ServerRecord, list[ReplicaRecord], dict[str, Committed]]:
    records = [read_replica(replica._storage) for replica in replicas]
    server = read_server(store, {record.replica_id: record.last_seq for record in records})
    return server, records, {record.replica_id: Committed(record.log) for record in records}


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
