"""
Steady: what a server and replicas hold in memory that synchronize small changes again and again.

Each round one replica creates a few objects, deletes as many and synchronizes, and another one takes that in.
The number of objects stays the same, so memory that follows the number of rounds would be a leak.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.children import Child, status_bytes
from benchmarks.workers import ReplicaWorker, ServerWorker

OBJECTS: Final = 1_000
CHANGES: Final = 5
SAMPLES: Final = 6


class Held(NamedTuple):
    """
    What the processes hold after so many rounds, without pages of files.

    Attributes:
        rounds: How many rounds there were.
        server_bytes: Memory of the server's process.
        writer_bytes: Memory of the replica's that makes the changes.
        reader_bytes: Memory of the replica's that takes them in.
    """

    rounds: int
    server_bytes: int
    writer_bytes: int
    reader_bytes: int


def measure_steady(folder: Path, rounds: int) -> Iterator[Held]:
    """Measure memory at even distances, the first time after a sixth of the rounds, when all is warm."""
    with Child(ServerWorker, str(folder / "store")) as server:
        address = server.call("address")
        with (
            Child(ReplicaWorker, str(folder / "writer"), address) as writer,
            Child(ReplicaWorker, str(folder / "reader"), address) as reader,
        ):
            writer.call("create", 0, OBJECTS, OBJECTS)
            for number in range(1, rounds + 1):
                writer.call("exchange", CHANGES)
                writer.call("synchronize")
                if reader.call("synchronize").operations < CHANGES:
                    raise RuntimeError("what the writer changed did not come to the reader")
                if number % (rounds // SAMPLES) == 0:
                    yield Held(number, *(_own_bytes(child.pid) for child in (server, writer, reader)))


def _own_bytes(pid: int | None) -> int:
    return status_bytes(Path(f"/proc/{pid}/status"), "RssAnon")
