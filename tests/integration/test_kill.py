"""
Processes are killed, at any moment, again and again; nothing is lost and nothing happens twice.

A server and several replicas run as processes under load. Dice, thrown from a seed, say
who is killed next and after how much progress. In the end the data that the killed
processes left are checked as they lie on disk, then synchronized and checked again.

More of it: TIDELOG_KILLS=1000 TIDELOG_KILL_SEED=7 pytest tests/integration/test_kill.py
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from tests.simulation import promises
from tests.simulation.application import Weather, make_application
from tests.simulation.processes import SCHEMA, Journal, free_port, start, wait_until
from tests.simulation.records import Committed, ReplicaRecord, ServerRecord, read_replica, read_server

from tidelog_client import Replica
from tidelog_server import LmdbStore, Server

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TIDELOG_KILLS", "24"))
SEED = os.environ.get("TIDELOG_KILL_SEED", "1")
REPLICA_COUNT = 3
PROGRESS_LINES_MAX = 150
# What a kill may take, on a slow machine.
SECONDS_PER_KILL_MAX = 10


class Killing:
    """The processes, their data, and the dice."""

    def __init__(self, directory: Path, seed: str) -> None:
        self.server_directory = directory / "server"
        self.replica_directories = [directory / f"replica-{number}" for number in range(REPLICA_COUNT)]
        self.journals = [Journal(directory / f"journal-{number}") for number in range(REPLICA_COUNT)]
        self._random = Random(seed)
        self._address = f"127.0.0.1:{free_port()}"
        self._server: subprocess.Popen[str] | None = None
        self._workers: list[subprocess.Popen[str] | None] = [None] * REPLICA_COUNT

    def start(self) -> None:
        """Start everybody who is not there."""
        if self._server is None:
            self._server = start("serve", self.server_directory, self._address, stdout=subprocess.PIPE)
        for number, worker in enumerate(self._workers):
            if worker is None:
                self._workers[number] = start(
                    "work",
                    self.replica_directories[number],
                    self._address,
                    self._random.random(),
                    self.journals[number].path,
                )

    def kill_next(self) -> str:
        """Wait for some progress and kill somebody. Returns what was done, for a message."""
        watched = self._random.randrange(REPLICA_COUNT)
        lines = len(self.journals[watched].lines())
        more = self._random.randint(1, PROGRESS_LINES_MAX)
        wait_until(
            lambda: len(self.journals[watched].lines()) >= lines + more,
            f"replica {watched} makes no progress: {self._describe()}",
        )
        victim = self._random.randrange(-1, REPLICA_COUNT)
        if victim < 0:
            _kill(self._server)
            self._server = None
        else:
            _kill(self._workers[victim])
            self._workers[victim] = None
        self.start()
        return f"{'the server' if victim < 0 else f'replica {victim}'} after {more} lines of replica {watched}"

    def kill_all(self) -> None:
        """Kill everybody."""
        for process in (self._server, *self._workers):
            _kill(process)

    def _describe(self) -> str:
        codes = [worker.poll() if worker is not None else "none" for worker in self._workers]
        return f"exit codes {codes}, last lines {[journal.lines()[-3:] for journal in self.journals]}"


@pytest.fixture
def killing(tmp_path: Path) -> Iterator[Killing]:
    """Processes to be killed; none outlives the test."""
    processes = Killing(tmp_path, SEED)
    try:
        yield processes
    finally:
        processes.kill_all()


@pytest.mark.timeout(300 + KILLS * SECONDS_PER_KILL_MAX)
def test_nothing_is_lost_when_processes_are_killed(killing: Killing) -> None:
    """After SIGKILL at any moment, every operation is pending, applied once or failed with a record."""
    killing.start()
    kills = [killing.kill_next() for _ in range(KILLS)]
    killing.kill_all()

    store = LmdbStore(killing.server_directory)
    replicas: list[Replica] = []
    try:
        with Server(make_application(Weather(), schema_version=1), store=store) as server:
            replicas.extend(
                Replica(path, server=server.address, schema=SCHEMA) for path in killing.replica_directories
            )
            _check_left_behind(store, replicas, killing)
            reports = [replica.synchronize_all() for _ in range(2) for replica in replicas]
            server_record, records, committed = _read(store, replicas)
            promises.check_server(server_record, committed)
            for record, report in zip(records, reports[-REPLICA_COUNT:], strict=True):
                assert not report.skipped, f"nothing has to wait: {report.skipped} after {kills}"
                promises.check_replica(server_record, record, committed[record.replica_id])
                promises.check_converged_when_quiet(server_record, record, not_ready=())
    finally:
        for replica in replicas:
            replica.close()
        store.close()


def _check_left_behind(store: LmdbStore, replicas: list[Replica], killing: Killing) -> None:
    """Check what holds at any moment, of the data as the killed processes left them."""
    server_record, records, committed = _read(store, replicas)
    promises.check_server(server_record, committed)
    for record, journal in zip(records, killing.journals, strict=True):
        promises.check_replica(server_record, record, committed[record.replica_id])
        _check_acknowledged(committed[record.replica_id], journal)


def _check_acknowledged(committed: Committed, journal: Journal) -> None:
    """Check that what a process once took for committed is in the log."""
    lines = journal.lines()
    assert not [line for line in lines if line.startswith("error")], "a synchronization failed for no reason"
    logged = {operation.decoded_patch().set.get("mark") for operation in committed.operations.values()}
    acknowledged = [mark for line in lines if line.startswith("committed") for mark in line.split()[1:]]
    lost = [mark for mark in acknowledged if mark not in logged]
    assert acknowledged, "nothing was committed at all"
    assert not lost, f"Durable: {len(lost)} of {len(acknowledged)} acknowledged operations are not in the log"


def _read(store: LmdbStore, replicas: list[Replica]) -> tuple[ServerRecord, list[ReplicaRecord], dict[str, Committed]]:
    records = [read_replica(replica._storage) for replica in replicas]
    server_record = read_server(store, {record.replica_id: record.last_seq for record in records})
    return server_record, records, {record.replica_id: Committed(record.log) for record in records}


def _kill(process: subprocess.Popen[str] | None) -> None:
    """Kill one of our own processes and wait until it is gone."""
    if process is None:
        return
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
