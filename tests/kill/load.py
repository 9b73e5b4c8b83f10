"""
Kills under load: servers and replicas that edit and synchronize all the time.

A round starts everybody, kills somebody at a random instant, and perhaps what the servers
need, starts those again, kills everybody at once at another random instant, and checks
what they left on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.kill.crew import Crew
from tests.kill.data import Data, contents_at
from tests.kill.roles import serve, work
from tests.simulation import promises
from tests.simulation.application import Weather, make_application
from tests.simulation.processes import SCHEMA, Journal
from tests.simulation.records import Committed, ReplicaRecord, ServerRecord, read_replica, read_server

from tidelog_client import Replica
from tidelog_server import Server
from tidelog_server._store import Store

REPLICA_COUNT = 3


class Load:
    """A world under load, from its first round to the last."""

    name = "load"

    def __init__(self, folder: Path, dice: Random, data: Data) -> None:
        self._data = data
        self._crew = Crew(folder, dice, data, replica_count=REPLICA_COUNT, serve=serve, work=work)
        self.kills = self._crew.kills

    def run(self) -> None:
        """Run a round and check what it left."""
        self._crew.work()
        with self._opened() as (store, replicas):
            server, records, committed = _read(store, replicas)
            promises.check_server(server, committed)
            for record, journal in zip(records, self._crew.journals, strict=True):
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
            replicas = [Replica(path, server=server.address, schema=SCHEMA) for path in self._crew.directories]
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
        replicas = [Replica(path) for path in self._crew.directories]
        try:
            yield store, replicas
        finally:
            for replica in replicas:
                replica.close()
            store.close()


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
