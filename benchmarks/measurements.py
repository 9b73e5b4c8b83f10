"""
Measurements: one run through everything at one size, tidelog and the bare pipe in turn.

Each phase has fresh processes on both sides, so that its peak memory is its own, and
works on what the phase before left on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.children import Child, Usage
from benchmarks.pipe import BareLog, PipeClient, PipeServer, copy_records
from benchmarks.work import Work
from benchmarks.workers import COMMIT_OPERATIONS, ReplicaWorker, ServerWorker

SINGLE_COMMITS_MAX: Final = 1_000
DELTA_STEP: Final = 100
NO_OP_TIMES: Final = 20


class Sample(NamedTuple):
    """
    One side of a measurement: the work, and what both processes used.

    Attributes:
        work: What the client did, and what it took.
        client: What the client's process has used at the end.
        server: What the server's process used: its peaks, and its processor time for this.
            None if there is no server.
    """

    work: Work
    client: Usage
    server: Usage | None


class Pair(NamedTuple):
    """A measurement of tidelog and, right before or after it, of the bare pipe."""

    name: str
    tidelog: Sample
    bare: Sample


def measure(size: int, folder: Path, *, store: str | None = None) -> Iterator[Pair]:
    """Run through everything with *size* objects in an empty folder, the server's data there too or in a database."""
    run = _Run(size, folder, store)
    yield from run.commits()
    yield run.upload()
    yield run.download()
    yield run.delta()
    yield run.no_op()


class _Run:
    def __init__(self, size: int, folder: Path, store: str | None) -> None:
        self._size = size
        self._folder = folder
        self._store = store or self._path("store")
        self._writer, self._reader = self._path("writer"), self._path("reader")

    def commits(self) -> Iterator[Pair]:
        """Create all objects: most with 1,000 to a transaction, the last with one."""
        size = self._size
        bulk = size - min(SINGLE_COMMITS_MAX, size // 10)
        parts = ((0, bulk, COMMIT_OPERATIONS), (bulk, size, 1))
        ours = []
        for part in parts:
            with Child(ReplicaWorker, self._writer) as replica:
                ours.append(_sample(replica, None, "create", *part))
        records = self._path("operations")
        copy_records(self._writer, "log", records)
        for part, sample in zip(parts, ours, strict=True):
            with Child(BareLog, self._path(f"log-{part[-1]}"), records) as log:
                yield Pair(f"commit, {part[-1]:,} to a transaction", sample, _sample(log, None, "append", *part))

    def upload(self) -> Pair:
        with self._tidelog(self._writer) as (client, server):
            ours = _sample(client, server, "synchronize")
        with self._pipe(client="operations", server="uploaded") as (client, server):
            bare = _sample(client, server, "upload")
            arrived = server.call("count")
        if arrived != self._size:
            raise RuntimeError(f"{arrived} of {self._size} records arrived at the bare pipe's server")
        return self._checked("first upload", ours, bare, self._size)

    def download(self) -> Pair:
        with self._tidelog(self._reader) as (client, server):
            ours = _sample(client, server, "synchronize")
        copy_records(self._reader, "objects", self._path("objects"), with_keys=True)
        with self._pipe(client="downloaded", server="objects") as (client, server):
            return self._checked("initial download", ours, _sample(client, server, "download"), self._size)

    def delta(self) -> Pair:
        with self._tidelog(self._reader) as (client, server):
            client.call("synchronize")  # connects
            with Child(ReplicaWorker, self._writer, server.call("address")) as other:
                changed = other.call("update_every", DELTA_STEP)
                other.call("synchronize")
            ours = _sample(client, server, "synchronize")
        copy_records(self._reader, "objects", self._path("changed"), step=DELTA_STEP, with_keys=True)
        with self._pipe(client="delta", server="changed") as (client, server):
            client.call("connect")
            return self._checked("1 % delta", ours, _sample(client, server, "download"), changed)

    def no_op(self) -> Pair:
        """Of the bare pipe: open a stream, move nothing, close it."""
        with self._tidelog(self._reader) as (client, server):
            client.call("synchronize")
            ours = _median_sample(client, server, "synchronize")
        with self._pipe(client="nothing", server="nowhere") as (client, server):
            client.call("connect")
            return self._checked("no-op", ours, _median_sample(client, server, "upload"), 0)

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    @contextmanager
    def _tidelog(self, replica: str) -> Iterator[tuple[Child[ReplicaWorker], Child[ServerWorker]]]:
        with (
            Child(ServerWorker, self._store) as server,
            Child(ReplicaWorker, replica, server.call("address")) as client,
        ):
            yield client, server

    @contextmanager
    def _pipe(self, *, client: str, server: str) -> Iterator[tuple[Child[PipeClient], Child[PipeServer]]]:
        with (
            Child(PipeServer, self._path(server)) as at_server,
            Child(PipeClient, self._path(client), at_server.call("address")) as at_client,
        ):
            yield at_client, at_server

    def _checked(self, name: str, ours: Sample, bare: Sample, operations: int) -> Pair:
        """Make sure that both moved what they should have."""
        moved = (ours.work.operations, bare.work.operations)
        if moved != (operations, operations):
            raise RuntimeError(f"{name}: {operations} expected, tidelog and the bare pipe moved {moved}")
        return Pair(name, ours, bare)


def _sample(client: Child[Any], server: Child[Any] | None, method: str, *arguments: Any) -> Sample:
    if server is None:
        return Sample(client.call(method, *arguments), client.usage(), None)
    before = server.usage()
    work = client.call(method, *arguments)
    return Sample(work, client.usage(), server.usage().since(before))


def _median_sample(client: Child[Any], server: Child[Any], method: str) -> Sample:
    samples = [_sample(client, server, method) for _ in range(NO_OP_TIMES)]
    return sorted(samples, key=lambda sample: sample.work.seconds)[NO_OP_TIMES // 2]
