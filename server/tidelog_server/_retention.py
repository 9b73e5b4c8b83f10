"""Retention: what a server forgets in time. A thread of its own collects it now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Final, NamedTuple, TypeVar

from tidelog._errors import InvalidValue, ResourceClosed
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._logging import get_logger
from tidelog_server import _collection as collection
from tidelog_server._failures import is_payload_due, without_payloads
from tidelog_server._files import FILE_GRACE_DEFAULT, RENEWALS, Files
from tidelog_server._indexes import left_up_to
from tidelog_server._records import ReplicaState, Writes
from tidelog_server._store import Reader, Store

HISTORY_RETENTION_DEFAULT: Final = timedelta(days=90)
REPLICA_RETENTION_DEFAULT: Final = timedelta(days=365)
FAILURE_RETENTION_DEFAULT: Final = timedelta(days=90)
COLLECT_SECONDS: Final = 3600.0
PAGE_FAILURES: Final = 500

T = TypeVar("T")

_log = get_logger("tidelog.retention")


class Periods(NamedTuple):
    """
    How long a server remembers.

    Attributes:
        history: Changes, tombstones, and what became of operations.
        replicas: Replicas that upload nothing; at least as long as history.
        failures: The payloads of settled failures.
        files: Contents of files that nothing refers to, or not yet.
    """

    history: timedelta = HISTORY_RETENTION_DEFAULT
    replicas: timedelta = REPLICA_RETENTION_DEFAULT
    failures: timedelta = FAILURE_RETENTION_DEFAULT
    files: timedelta = FILE_GRACE_DEFAULT

    def check(self) -> None:
        """Raise InvalidValue unless the periods make sense together."""
        if min(self) < timedelta(0):
            raise InvalidValue("a retention period cannot be negative")
        if self.replicas < self.history:
            raise InvalidValue(
                f"history is kept for {self.history}, so replicas cannot be retired after {self.replicas} already"
            )


class Collected(NamedTuple):
    """
    How much a server has forgotten.

    Attributes:
        changes: Changes of the change log.
        tombstones: Deleted objects of which no trace is left.
        outcomes: Operations of which it was known what became of them.
        replicas: Replicas that were retired.
        payloads: Failures without their payloads.
        contents: Contents of files that nothing referred to.
    """

    changes: int = 0
    tombstones: int = 0
    outcomes: int = 0
    replicas: int = 0
    payloads: int = 0
    contents: int = 0

    def plus(self, other: Collected) -> Collected:
        """Return the sum."""
        return Collected(*map(sum, zip(self, other, strict=True)))


class Retention:
    """
    Collects what is older than it is to be kept, in steps that keep nobody waiting who writes.

    Args:
        store: Where it is.
        periods: How long it is kept.
        clock: Returns the time in microseconds since 1970.
        files: The contents of files. None: there are none.
    """

    def __init__(self, store: Store, periods: Periods, clock: Callable[[], int], files: Files | None = None) -> None:
        self._files = files
        self._store = store
        self._periods = periods
        self._clock = clock
        self._stopped = threading.Event()
        self._alone = threading.Lock()
        self._thread = threading.Thread(target=self._collect_now_and_then, name="tidelog-retention", daemon=True)

    def start(self) -> None:
        """Begin to collect."""
        self._thread.start()

    def stop(self) -> None:
        """Stop collecting. Waits for the step that is under way."""
        self._stopped.set()
        self._thread.join()

    def collect(self) -> Collected:
        """
        Forget what is due, in all tenants. What cannot be forgotten keeps nothing else from going.

        Raises:
            ResourceClosed: Stopped meanwhile.
            Exception: Why something could not be forgotten, once all else was: it is out of reach, or damaged.
        """
        failures: list[Exception] = []
        with self._alone:
            total = Collected()
            for tenant, step in self._steps():
                try:
                    for counts in step(tenant):
                        total = total.plus(counts)
                        if self._stopped.is_set():
                            raise ResourceClosed("the server is stopping: the rest is collected later")
                except ResourceClosed:
                    raise
                except Exception as error:  # noqa: BLE001 - damaged data may raise anything
                    _log.warning("something could not be forgotten", tenant=tenant, detail=str(error))
                    failures.append(error)
        if any(total):
            _log.info("collected", **total._asdict())
        if failures:
            raise failures[0]
        return total

    def _steps(self) -> Iterator[tuple[str, Callable[[str], Iterator[Collected]]]]:
        tenants = self._store.tenants()
        steps = (self._history, self._left_entries, self._replicas, self._notes, self._payloads)
        yield from product(tenants, steps)
        # Last, because what keeps contents may be out of reach when nothing else is.
        yield from product(tenants, (self._grants, self._uploads, self._contents, self._unknown_contents))

    def _history(self, tenant: str) -> Iterator[Collected]:
        before_us = self._before(self._periods.history)
        while True:
            with self._store.read(tenant) as reader:
                past = collection.past_before(reader, before_us)
            if past is None:
                return
            tombstones = self._submit(tenant, partial(collection.without_past, past=past))
            yield Collected(changes=past.change_count, tombstones=tombstones)

    def _left_entries(self, tenant: str) -> Iterator[Collected]:
        after = b""
        more = True
        while more:
            with self._store.read(tenant) as reader:
                due, after = left_up_to(reader.collected(), after, reader.index_range, collection.STEP_ENTRIES)
            if due:
                self._submit(tenant, partial(collection.without_left_entries, entries=due))
            more = bool(after)
            yield Collected()

    def _replicas(self, tenant: str) -> Iterator[Collected]:
        before_us = self._before(self._periods.replicas)
        for replica, state in self._known_replicas(tenant):
            if collection.is_absent(state, before_us):
                retire = partial(collection.retired, replica=replica, before_us=before_us)
                yield Collected(replicas=self._submit(tenant, retire))
            yield from self._outcomes(tenant, replica)
            yield from self._refused_creations(tenant, replica)

    def _known_replicas(self, tenant: str) -> Iterator[tuple[bytes, ReplicaState]]:
        after = b""
        while True:
            with self._store.read(tenant) as reader:
                page = reader.replicas(after, collection.STEP_ENTRIES)
            if not page:
                return
            yield from page
            after = page[-1][0]

    def _outcomes(self, tenant: str, replica: bytes) -> Iterator[Collected]:
        before_us = self._before(self._periods.history)
        while True:
            with self._store.read(tenant) as reader:
                seqs = collection.settled_before(reader, replica, before_us)
            if not seqs:
                return
            forget = partial(collection.without_outcomes, replica=replica, seqs=seqs)
            yield Collected(outcomes=self._submit(tenant, forget))

    def _notes(self, tenant: str) -> Iterator[Collected]:
        """Forget what copies of replicas noted."""
        before_us = self._before(self._periods.history)
        after = b""
        more = True
        while more:
            with self._store.read(tenant) as reader:
                due, after = collection.old_notes(reader, after, before_us)
            count = self._submit(tenant, partial(collection.without_old_notes, notes=due)) if due else 0
            more = bool(after)
            yield Collected(outcomes=count)

    def _refused_creations(self, tenant: str, replica: bytes) -> Iterator[Collected]:
        """Forget what a retired replica could not create."""
        while True:
            with self._store.read(tenant) as reader:
                state = reader.replica(replica)
                keys = reader.refused_creations(replica, collection.STEP_ENTRIES)
            if state is None or not state.retired or not keys:
                return
            self._submit(tenant, partial(collection.without_refused_creations, replica=replica, keys=keys))
            yield Collected()

    def _payloads(self, tenant: str) -> Iterator[Collected]:
        settled_before_us = self._before(self._periods.failures)
        after = b""
        while True:
            with self._store.read(tenant) as reader:
                found = reader.failures(after, PAGE_FAILURES, PAGE_BYTES_MAX)
            if not found:
                return
            after = found[-1][0]
            # Those who write are kept waiting for what has to be written only.
            due = [failure_id for failure_id, data in found if is_payload_due(data, settled_before_us)]
            if due:
                self._submit(tenant, partial(_without_payloads, due=due))
            yield Collected(payloads=len(due))

    def _uploads(self, tenant: str) -> Iterator[Collected]:
        """Give up uploads that nobody goes on with."""
        if self._files is None:
            return
        for _ in self._files.collect_uploads(tenant, self._before(self._periods.files)):
            yield Collected()

    def _contents(self, tenant: str) -> Iterator[Collected]:
        """
        Delete contents that nobody refers to, as far as a store that was put back may know who does.

        Look at those, too, that were lost: somebody may have put them back.
        """
        if self._files is None:
            return
        before_us = self._files.note_timeline() - self._periods.files // timedelta(microseconds=1)
        after = b""
        more = True
        while more:
            with self._store.read(tenant) as reader:
                due, after = collection.contents_due(reader, after, before_us)
            for sha256 in due.unneeded:
                yield Collected(contents=self._files.collect(tenant, sha256, before_us))
            for sha256 in due.broken:
                self._files.mend(tenant, sha256)
                yield Collected()
            more = bool(after)
            yield Collected()

    def _unknown_contents(self, tenant: str) -> Iterator[Collected]:
        """Delete contents that are not on record, and what is left of uploads that nobody goes on with."""
        if self._files is None:
            return
        # First: what is put back may need the room.
        self._files.delete_leftovers(tenant, self._periods.files.total_seconds())
        for count in self._files.collect_unknown(tenant, self._before(self._periods.files)):
            yield Collected(contents=count)

    def _grants(self, tenant: str) -> Iterator[Collected]:
        # Who offers again what refers to a content has to have the right once more.
        sure_us = self._clock() if self._files is None else self._files.note_timeline()
        period = self._periods.files
        before_us = sure_us - (period + period // RENEWALS) // timedelta(microseconds=1)
        after = b""
        more = True
        while more:
            with self._store.read(tenant) as reader:
                old, after = collection.old_grants(reader, after, before_us)
            if old:
                self._submit(tenant, partial(collection.without_grants, keys=old, before_us=before_us))
            more = bool(after)
            yield Collected()

    def _before(self, period: timedelta) -> int:
        return self._clock() - period // timedelta(microseconds=1)

    def _submit(self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]]) -> T:
        future: Future[T] = self._store.submit(tenant, job)
        return future.result()

    def _collect_now_and_then(self) -> None:
        while True:
            try:
                self.collect()
            except ResourceClosed:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the next time will do
                # A full disk is told to those who write.
                _log.warning("not everything could be forgotten", detail=str(error))
            if self._stopped.wait(COLLECT_SECONDS):
                return


def _without_payloads(reader: Reader, due: list[bytes]) -> tuple[Writes, None]:
    return without_payloads(reader, due), None
