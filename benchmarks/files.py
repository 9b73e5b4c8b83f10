"""
A large file on a slow path that is cut, with small objects committed beside it.

What a cut costs is what was on its way; what the file costs the others is no more than
their share of the path.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple, cast

from benchmarks.children import Child, status_bytes
from benchmarks.records import ENTITY
from benchmarks.workers import ServerWorker
from tidelog.testing import Proxy, Way
from tidelog_client import Phase, Progress, Replica

# How many small objects are committed while the file travels.
OBJECTS: Final = 20


class Travelled(NamedTuple):
    """
    What a file cost on its way.

    Attributes:
        way: "up" or "down".
        size: Its length in bytes.
        cuts: How often its connection was cut.
        path_bytes: Bytes that passed in this direction, those of the small objects included.
        seconds: How long it took.
        own_bytes: By how much the memory of the replica's process grew at the most, file pages not counted.
        waits: How many seconds each small object took from its commit to the server.
    """

    way: str
    size: int
    cuts: int
    path_bytes: int
    seconds: float
    own_bytes: int
    waits: list[float]


def measure_file(
    way: Literal["up", "down"], size: int, *, bytes_per_second: int, cuts: int, folder: Path | None = None
) -> Travelled:
    """Send a file of random bytes over a path of one speed, and cut it so many times."""
    with (
        tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name,
        Child(ServerWorker, f"{name}/server") as server,
        Proxy(server.call("address")) as proxy,
        Replica(f"{name}/author", server=proxy.address) as author,
        Replica(f"{name}/reader", server=proxy.address) as reader,
    ):
        author.create(ENTITY, {"file": author.add_file(cast("BinaryIO", _Noise(size)))})
        replica = author
        if way == "down":
            author.synchronize_all()
            replica = reader
        path: Way = getattr(proxy, way)
        path.bytes_per_second = bytes_per_second
        before_bytes, began = path.byte_count, time.perf_counter()
        observed = _Observed(replica, proxy, size, cuts)
        report = replica.synchronize_all(on_progress=observed)
        if report.skipped or replica.pending_count():
            raise RuntimeError(f"not everything went: {report.skipped}")
        seconds = time.perf_counter() - began
        return Travelled(
            way, size, observed.cut_count, path.byte_count - before_bytes, seconds, observed.own_bytes, observed.waits
        )


class _Observed:
    """Sees how far the file is: cuts its path, commits objects, and notes when these are on the server."""

    def __init__(self, replica: Replica, proxy: Proxy, size: int, cuts: int) -> None:
        self.cut_count = 0
        self.own_bytes = 0
        self.waits: list[float] = []
        self._replica = replica
        self._proxy = proxy
        self._cuts = [size * number // (cuts + 1) for number in range(1, cuts + 1)]
        self._commits = [size * number // (OBJECTS + 1) for number in range(1, OBJECTS + 1)]
        self._committed: dict[int, float] = {}
        self._first_bytes = _own_bytes()

    def __call__(self, progress: Progress) -> None:
        self.own_bytes = max(self.own_bytes, _own_bytes() - self._first_bytes)
        now = time.perf_counter()
        if self._committed:
            pending = {one.operation.seq for one in self._replica.pending()}
            for seq in self._committed.keys() - pending:
                self.waits.append(now - self._committed.pop(seq))
        if progress.phase is not Phase.FILES:
            return
        if self._commits and progress.done >= self._commits[0]:
            del self._commits[0]
            self._replica.create(ENTITY, {"number": len(self._commits)})
            *_, newest = self._replica.pending()
            self._committed[newest.operation.seq] = now
        if self._cuts and progress.done >= self._cuts[0]:
            del self._cuts[0]
            self.cut_count += 1
            self._proxy.cut(resets=self.cut_count % 2 == 0)


class _Noise:
    """A stream of random bytes."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        self._left -= size
        return os.urandom(size)


def _own_bytes() -> int:
    return status_bytes(Path("/proc/self/status"), "RssAnon")
