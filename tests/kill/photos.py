"""
Kills while contents of files travel: replicas attach, replace and delete photos, and synchronize all the time.

A round starts everybody, kills somebody at a random instant, starts those again, kills
everybody at once at another random instant, and verifies what they left on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from random import Random

from tests.kill.children import Child, kill_at_once
from tests.kill.load import free_port
from tests.kill.roles import serve_photos, take_photos
from tests.simulation.processes import Journal

from tidelog import OperationKind
from tidelog._file_reference import file_references
from tidelog.testing import ManualClock
from tidelog_client import FileState, Replica
from tidelog_server import Application, Server, verify_store
from tidelog_server._content_store import MARK_NAME
from tidelog_server._sightings import UNKNOWN_KEPT

REPLICA_COUNT = 2
PHASE_SECONDS = 0.8


class Photos:
    """A world of photos, from its first round to the last."""

    name = "photos"

    def __init__(self, folder: Path, dice: Random) -> None:
        self.kills: Counter[str] = Counter()
        self._dice = dice
        self._server_directory = folder / "server"
        self._directories = [folder / f"replica-{number}" for number in range(REPLICA_COUNT)]
        self._journals = [Journal(folder / f"journal-{number}") for number in range(REPLICA_COUNT)]
        self._address = f"127.0.0.1:{free_port()}"

    def run(self) -> None:
        """Run a round and verify what it left."""
        children: list[Child] = [self._serve(), *map(self._work, range(REPLICA_COUNT))]
        try:
            victims = self._dice.choice([[0], [1], [2], [0, 1, 2]])
            time.sleep(self._dice.uniform(0, PHASE_SECONDS))
            kill_at_once(*(children[victim] for victim in victims))
            self.kills["server and replicas" if len(victims) > 1 else "replica" if victims[0] else "server"] += 1
            for victim in victims:
                children[victim] = self._work(victim - 1) if victim else self._serve()
            time.sleep(self._dice.uniform(0, PHASE_SECONDS))
        finally:
            kill_at_once(*children)
        self.kills["server and replicas"] += 1
        _check_nothing(list(verify_store(self._server_directory)), "the server's store")
        for path, journal in zip(self._directories, self._journals, strict=True):
            with Replica(path) as replica:
                _check_nothing(list(replica.verify()), path.name)
                _check_acknowledged(replica, journal)

    def finish(self) -> None:
        """Let everybody synchronize in peace, and check that each has each content, and nobody one too many."""
        clock = ManualClock()
        with Server(Application(), store=self._server_directory, file_grace=timedelta(0), clock=clock) as server:
            replicas = [Replica(path, server=server.address) for path in self._directories]
            try:
                for replica in replicas * 2:
                    if (report := replica.synchronize_all()).skipped:
                        raise AssertionError(f"nothing has to wait: {report.skipped}")
                shown = [{one.id: one["file"]["sha256"] for one in replica.query("Photo")} for replica in replicas]
                if any(one != shown[0] for one in shown):
                    raise AssertionError("the replicas do not agree")
                for replica in replicas:
                    _check_contents(replica)
                failed = {sha256 for replica in replicas for sha256 in _of_failures(replica)}
            finally:
                for replica in replicas:
                    replica.close()
            server.collect()
            # What a kill left that nobody knows is kept for as long as a store may have been put back.
            clock.advance(UNKNOWN_KEPT + timedelta(days=1))
            server.collect()
        files = [path.name for path in (self._server_directory / "files").rglob("*") if path.is_file()]
        kept = [name.partition("-")[0] for name in files if name != MARK_NAME]
        expected = {sha256.hex() for sha256 in (*shown[0].values(), *failed)}
        if sorted(kept) != sorted(expected):
            raise AssertionError(f"{len(kept)} contents are kept where {len(expected)} are referred to")

    def _serve(self) -> Child:
        return Child(serve_photos, str(self._server_directory), self._address)

    def _work(self, number: int) -> Child:
        seed = str(self._dice.random())
        return Child(
            take_photos, str(self._directories[number]), self._address, seed, str(self._journals[number].path)
        )


def _check_nothing(findings: list[object], what: str) -> None:
    if findings:
        raise AssertionError(f"{what} is not as it should be: {findings[:3]}")


def _check_acknowledged(replica: Replica, journal: Journal) -> None:
    """Check that each photo that a process took is in the log, and its content here or at the server."""
    logged = {one.operation.id for one in replica.log() if one.operation.kind is OperationKind.CREATE}
    lines = journal.lines()
    if errors := [line for line in lines if line.startswith("error")]:
        raise AssertionError(f"something failed for no reason: {errors}")
    taken = [line.split()[1] for line in lines]
    if lost := [one for one in taken if one not in logged]:
        raise AssertionError(f"Durable: {len(lost)} of {len(taken)} photos are not in the log")


def _check_contents(replica: Replica) -> None:
    for photo in replica.query("Photo"):
        if photo.file_state("file") != FileState.AVAILABLE:
            raise AssertionError(f"the content of {photo.id} is not there")
        with replica.open_file("Photo", photo.id, "file") as file:
            if hashlib.sha256(file.read()).digest() != photo["file"]["sha256"]:
                raise AssertionError(f"the content of {photo.id} is another one")


def _of_failures(replica: Replica) -> set[bytes]:
    return {
        reference.sha256
        for failure in replica.failures()
        if failure.operation is not None
        for _, reference in file_references(failure.operation.decoded_patch().set)
    }
