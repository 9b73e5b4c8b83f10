"""Profile runs: one measurement with the profiler on both sides."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from benchmarks.children import Child
from benchmarks.profiling import Clock
from benchmarks.workers import COMMIT_OPERATIONS, ReplicaWorker, ServerWorker

What = Literal["commit", "upload", "download"]


def profile(what: What, size: int, clock: Clock, folder: Path | None) -> str:
    """Return the tables of both sides."""
    with TemporaryDirectory(prefix="tidelog-profile-", dir=folder) as name:
        store, writer, reader = (str(Path(name, one)) for one in ("store", "writer", "reader"))
        with Child(ReplicaWorker, writer, None, clock if what == "commit" else None) as replica:
            replica.call("begin_profile")
            replica.call("create", 0, size, COMMIT_OPERATIONS)
            if what == "commit":
                return _titled(f"replica: {size:,} creations, {clock} time", replica.call("end_profile"))
        if what == "download":
            with Child(ServerWorker, store) as server, Child(ReplicaWorker, writer, server.call("address")) as replica:
                replica.call("synchronize")
        path = writer if what == "upload" else reader
        with (
            Child(ServerWorker, store, clock) as server,
            Child(ReplicaWorker, path, server.call("address"), clock) as replica,
        ):
            replica.call("begin_profile")
            replica.call("synchronize")
            title = f"{what} of {size:,} objects, {clock} time"
            return _titled(f"replica: {title}", replica.call("end_profile")) + _titled(
                f"server: {title}", server.call("end_profile")
            )


def _titled(title: str, table: str) -> str:
    return f"=== {title} ===\n{table.rstrip()}\n\n"
