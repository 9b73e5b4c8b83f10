"""
Kills while contents of files travel: replicas attach, replace and delete photos, and synchronize all the time.

A round starts everybody, kills somebody at a random instant, starts those again, kills
everybody at once at another random instant, and verifies what they left on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from random import Random

from tests.kill.crew import Crew
from tests.kill.data import Data, contents_at
from tests.kill.roles import serve_photos, take_photos
from tests.simulation.processes import Journal

from tidelog import OperationKind
from tidelog._file_reference import file_references
from tidelog.testing import ManualClock
from tidelog_client import FileState, Replica
from tidelog_server import Application, Server
from tidelog_server._sightings import UNKNOWN_KEPT

REPLICA_COUNT = 2


class Photos:
    """A world of photos, from its first round to the last."""

    name = "photos"

    def __init__(self, folder: Path, dice: Random, data: Data) -> None:
        self._data = data
        self._crew = Crew(folder, dice, data, replica_count=REPLICA_COUNT, serve=serve_photos, work=take_photos)
        self.kills = self._crew.kills

    def run(self) -> None:
        """Run a round and verify what it left."""
        self._crew.work()
        _check_nothing(self._data.verify(), "the server's store")
        for path, journal in zip(self._crew.directories, self._crew.journals, strict=True):
            with Replica(path) as replica:
                _check_nothing(list(replica.verify()), path.name)
                _check_acknowledged(replica, journal)

    def finish(self) -> None:
        """Let everybody synchronize in peace, and check that each has each content, and nobody one too many."""
        clock, contents = ManualClock(), contents_at(self._data.contents_url, self._data.endpoint)
        with Server(
            Application(), store=self._data.place, file_grace=timedelta(0), contents=contents, clock=clock
        ) as server:
            replicas = [Replica(path, server=server.address) for path in self._crew.directories]
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
        kept = [name.partition("-")[0] for name in self._data.content_names()]
        expected = {sha256.hex() for sha256 in (*shown[0].values(), *failed)}
        if sorted(kept) != sorted(expected):
            missing = {sha256.hex()[:8] for sha256 in failed if sha256.hex() not in kept}
            raise AssertionError(
                f"{len(kept)} contents are kept where {len(expected)} are referred to: "
                f"missing {expected - set(kept)}, of failures {missing}; unneeded {set(kept) - expected}"
            )


def _check_nothing(findings: Sequence[object], what: str) -> None:
    if findings:
        raise AssertionError(f"{what} is not as it should be: {findings[:3]}")


def _check_acknowledged(replica: Replica, journal: Journal) -> None:
    """Check that each photo that a process took is in the log, and its content here or at the server."""
    logged = {one.operation.id for one in replica.log() if one.operation.kind is OperationKind.CREATE}
    lines = journal.lines()
    if errors := [line for line in lines if line.startswith("error")]:
        raise AssertionError(f"something failed for no reason: {errors}")
    taken = [line.split()[1] for line in lines if line.startswith("committed")]
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
