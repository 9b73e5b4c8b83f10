"""Workers: a tidelog server and a tidelog replica, to be put into processes of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, Final

from benchmarks.profiling import Clock, Profiler
from benchmarks.records import ENTITY, tasks
from benchmarks.work import Stopwatch, Work
from tidelog._values import encode
from tidelog_client import Replica
from tidelog_server import Application, ObjectStoreContents, Server, ServerLimits
from tidelog_server._stores import is_database
from tidelog_server.commands import spare_the_collector

COMMIT_OPERATIONS: Final = 1_000


class ServerWorker:
    """A server without rules of its own; profiled if a clock is given."""

    def __init__(self, store: str, clock: Clock | None = None, limits: ServerLimits | None = None) -> None:
        self._profiler = Profiler(clock) if clock is not None else None
        self._open = ExitStack()
        spare_the_collector()  # as `tidelog serve` does
        # Nothing that is measured with a database has files.
        contents = ObjectStoreContents("memory:///") if is_database(store) else None
        self._server = self._open.enter_context(Server(Application(), store=store, limits=limits, contents=contents))

    def address(self) -> str:
        return self._server.address

    def put_off_count(self) -> int:
        return self._server.load.put_off_count

    def fill(self, objects: int, attributes: Callable[[int, int], Iterator[dict[str, Any]]]) -> None:
        """Create so many objects."""
        made, tenant = attributes(0, objects), self._server.tenant()
        while batch := list(islice(made, COMMIT_OPERATIONS)):
            with tenant.transaction() as transaction:
                for one in batch:
                    transaction.create(ENTITY, one)

    def end_profile(self) -> str:
        """Stop the server and return what took the time."""
        self.close()
        return self._profiler.table() if self._profiler is not None else ""

    def close(self) -> None:
        self._open.close()


class ReplicaWorker:
    """A replica with durable commits; profiled if a clock is given."""

    def __init__(self, path: str, server: str | None = None, clock: Clock | None = None) -> None:
        self._profiler = Profiler(clock) if clock is not None else None
        self._open = ExitStack()
        self._replica = self._open.enter_context(Replica(path, server=server))

    def create(self, first: int, last: int, per_transaction: int) -> Work:
        """Create the tasks from *first* to before *last*, so many in each transaction."""
        attributes = tasks(first, last)
        stopwatch = Stopwatch()
        while batch := list(islice(attributes, per_transaction)):
            with stopwatch, self._replica.transaction() as transaction:
                for one in batch:
                    transaction.create(ENTITY, one)
        return Work(last - first, stopwatch.seconds, stopwatch.cpu_seconds)

    def update_every(self, step: int) -> int:
        """Update each *step*-th object, and return how many that were."""
        chosen = [one.id for one in islice(self._replica.query(ENTITY), 0, None, step)]
        for first in range(0, len(chosen), COMMIT_OPERATIONS):
            with self._replica.transaction() as transaction:
                for id_ in chosen[first : first + COMMIT_OPERATIONS]:
                    transaction.update(ENTITY, id_, {"status": "done", "done": True})
        return len(chosen)

    def exchange(self, count: int) -> None:
        """Delete the oldest objects and create as many."""
        oldest = [one.id for one in islice(self._replica.query(ENTITY), count)]
        with self._replica.transaction() as transaction:
            for id_ in oldest:
                transaction.delete(ENTITY, id_)
            for one in tasks(0, count):
                transaction.create(ENTITY, one)

    def synchronize(self) -> Work:
        """
        Synchronize everything.

        Raises:
            RuntimeError: The server refused something, which no benchmark asks for.
        """
        with Stopwatch() as stopwatch:
            report = self._replica.synchronize_all()
        if report.rejected:
            raise RuntimeError(f"{report.rejected} operations were refused: {report.failures[0].message}")
        return Work(
            report.applied + report.downloaded,
            stopwatch.seconds,
            stopwatch.cpu_seconds,
            report.sent_bytes,
            report.received_bytes,
            report.upload_seconds,
        )

    def state(self) -> str:
        """Return a hash of all that the replica shows."""
        digest = hashlib.sha256()
        for one in self._replica.query(ENTITY):
            digest.update(encode([one.id, one.to_dict()]))
        return digest.hexdigest()

    def begin_profile(self) -> None:
        """Forget what the profiler saw of the opening."""
        if self._profiler is not None:
            self._profiler.restart()

    def end_profile(self) -> str:
        """Close the replica and return what took the time."""
        self.close()
        return self._profiler.table() if self._profiler is not None else ""

    def close(self) -> None:
        self._open.close()
