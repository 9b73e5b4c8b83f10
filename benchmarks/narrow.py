"""
A replica that sees a few objects of a large tenant: with an index over what it follows, and without.

With an index the cost of a first synchronization and of a later one must follow what
the replica sees. So the table compares tenants of different sizes, of which a replica
sees equally much.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from tidelog import Entity, Integer, Schema, String, attribute
from tidelog_client import Replica
from tidelog_server import Application, Server

SEEN_OBJECTS: Final = 500
CHANGED_OBJECTS: Final = 50
TRANSACTION_OBJECTS: Final = 5_000


class Narrow(NamedTuple):
    """
    What a replica took that sees a few objects.

    Attributes:
        objects: Objects of the tenant.
        is_indexed: Whether the schema indexes what the replica follows.
        first_seconds: Its first synchronization.
        delta_seconds: A later one, after a few objects that it sees were changed, and many that it does not.
    """

    objects: int
    is_indexed: bool
    first_seconds: float
    delta_seconds: float


def measure_narrow(sizes: list[int], repeat: int, folder: Path | None) -> Iterator[Narrow]:
    """Yield the medians for each size, with and without an index."""
    for size in sizes:
        for is_indexed in (True, False):
            with tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name:
                yield _measure(size, repeat, Path(name), is_indexed=is_indexed)


def _measure(size: int, repeat: int, folder: Path, *, is_indexed: bool) -> Narrow:
    indexes = ["region"] if is_indexed else []
    entity = Entity("Order", {"region": String(), "n": Integer(), "note": String()}, indexes=indexes)
    first, delta = [], []
    with Server(Application(schema=Schema([entity])), store=folder / "server") as server:
        tenant = server.tenant()
        for start in range(0, size, TRANSACTION_OBJECTS):
            with tenant.transaction() as transaction:
                for number in range(start, min(start + TRANSACTION_OBJECTS, size)):
                    region = "here" if number % (size // SEEN_OBJECTS) == 0 else "elsewhere"
                    transaction.create(
                        "Order", {"region": region, "n": number, "note": "x" * 200}, id=f"order-{number:09}"
                    )
        for round_ in range(repeat):
            wanted = {"Order": attribute("region") == "here"}
            with Replica(folder / f"replica-{round_}", server=server.address, download=wanted) as replica:
                first.append(_timed(replica, SEEN_OBJECTS))
                with tenant.transaction() as transaction:
                    step = size // SEEN_OBJECTS
                    for number in range(0, CHANGED_OBJECTS * step, step):
                        transaction.update("Order", f"order-{number:09}", {"n": round_})
                for start in range(0, size, TRANSACTION_OBJECTS):
                    with tenant.transaction() as transaction:
                        for number in range(start, min(start + TRANSACTION_OBJECTS, size)):
                            if number % step and number % 2:
                                transaction.update("Order", f"order-{number:09}", {"n": round_})
                delta.append(_timed(replica, CHANGED_OBJECTS))
    return Narrow(size, is_indexed, median(first), median(delta))


def _timed(replica: Replica, expected: int) -> float:
    start = time.perf_counter()
    report = replica.synchronize_all()
    seconds = time.perf_counter() - start
    if report.downloaded != expected:
        raise RuntimeError(f"{report.downloaded} objects came, expected {expected}")
    return seconds
