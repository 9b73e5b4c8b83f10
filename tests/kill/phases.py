"""
Kills in the middle of one thing: a group commit, a publication in steps, trimming, a migration.

Each phase is first measured, uninterrupted, on a copy of the same data; then kills fall
anywhere in that time, again and again, until what is left of it ends by itself.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from tests.builders import contents
from tests.kill.children import Child
from tests.kill.data import Data, contents_at
from tests.kill.load import check_acknowledged
from tests.kill.roles import OLD_SCHEMA, commit_together, make_shop, migrate, publish, trim
from tests.simulation import promises
from tests.simulation.processes import Journal
from tests.simulation.records import Committed, History, read_replica, read_server, read_shown

from tidelog._environment import MAP_BYTES_DEFAULT
from tidelog_client import Replica
from tidelog_client._report import PublishedCounts
from tidelog_client._storage import Storage
from tidelog_server import Application, Server

COMMIT_SECONDS = 0.4
TRANSACTION_OPERATIONS = 1_000
TRIMMED_OPERATIONS = 6_000
PENDING_OPERATIONS = 5
MIGRATED_OBJECTS = 3_000
KNOWN_OBJECTS = 5_000
NEW_OBJECTS = 101_000
EDITED_EVERY = 500
CHANGED_EVERY = 4
DELETED_EVERY = 50


class GroupCommit:
    """Commits of many threads at the same moment: what was acknowledged is there, whole."""

    name = "group commit"

    def __init__(self, folder: Path, dice: Random, data: Data) -> None:
        self.kills: Counter[str] = Counter()
        self._dice = dice
        self._directory, self._journal = folder / "replica", Journal(folder / "journal")

    def run(self) -> None:
        """Commit, kill, and look into the log."""
        child = Child(commit_together, str(self._directory), str(self._journal.path))
        time.sleep(self._dice.uniform(0, COMMIT_SECONDS))
        if child.kill():
            self.kills[self.name] += 1
        with Replica(self._directory) as replica:
            record = read_replica(replica._storage)
        committed = Committed(record.log)
        promises.check_log(record, committed)
        promises.check_view(History(), record, committed)
        check_acknowledged(record, self._journal)
        marks = Counter(str(operation.decoded_patch().set["mark"])[:-1] for operation in committed.operations.values())
        if halves := [mark for mark, parts in marks.items() if parts % 2]:
            raise AssertionError(f"half a transaction is in the log: {halves}")

    def finish(self) -> None:
        """Nothing more than after each round."""


class _Phase:
    """Work on a copy of what was prepared, killed until it is done."""

    name = ""

    def __init__(self, folder: Path, dice: Random, data: Data) -> None:
        self.kills: Counter[str] = Counter()
        self._dice = dice
        self._data = data
        self._template, self._copy = folder / "template", folder / "copy"
        self.prepare(self._template)
        self._seconds = self._measured()

    def prepare(self, template: Path) -> None:
        """Make what the phase works on."""
        raise NotImplementedError

    def start(self, directory: Path) -> Child:
        """Start the phase, or go on with it."""
        raise NotImplementedError

    def check(self, directory: Path, *, done: bool) -> None:
        """Check what a kill, or the end, left."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Let the phase have before it what was prepared."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._template, self._copy)

    def run(self) -> None:
        """Kill the phase once at least, then until it comes to its end between two kills."""
        killed = False
        while True:
            child = self.start(self._copy)
            time.sleep(self._dice.uniform(0, self._seconds))
            if not child.kill():
                self._begin_again()
                if killed:
                    return
                continue
            killed = True
            self.kills[self.name] += 1
            self.check(self._copy, done=False)
            if self._dice.random() < 0.5:  # otherwise let another kill come upon it
                return

    def finish(self) -> None:
        """Let it come to its end, and check that."""
        self.start(self._copy).wait()
        self.check(self._copy, done=True)

    def _begin_again(self) -> None:
        self.check(self._copy, done=True)
        self.put_back()

    def _measured(self) -> float:
        """Return how long it takes. The first process of all takes longer."""
        self.put_back()
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            self.start(self._copy).wait()
            seconds.append(time.monotonic() - began)
            self._begin_again()
        return min(seconds)


class Publication(_Phase):
    """A download of more than 100,000 objects on its way into the view: all of it shows, or nothing."""

    name = "publication"

    def prepare(self, template: Path) -> None:
        """Download everything, and stop before the first step."""
        store = template.with_name("server")
        with Server(Application(), store=store) as server:
            tenant = server.tenant()
            _in_transactions(KNOWN_OBJECTS, tenant, lambda one, n: one.create("Note", {"n": n}, _id(n)))
            with Replica(template, server=server.address) as replica:
                replica.synchronize_all()
                for number in range(0, KNOWN_OBJECTS, EDITED_EVERY):
                    replica.update("Note", _id(number), {"mine": number})
                changed = KNOWN_OBJECTS // CHANGED_EVERY
                _in_transactions(changed, tenant, lambda one, n: one.update("Note", _id(n * CHANGED_EVERY), {"n": -1}))
                deleted = KNOWN_OBJECTS // DELETED_EVERY
                _in_transactions(deleted, tenant, lambda one, n: one.delete("Note", _id(n * DELETED_EVERY + 1)))
                _in_transactions(
                    NEW_OBJECTS, tenant, lambda one, n: one.create("Note", {"n": n}, _id(KNOWN_OBJECTS + n))
                )
                self._cursor = replica._storage.meta("cursor")
                _stop_before_publishing(replica)
                for number in range(2, KNOWN_OBJECTS, EDITED_EVERY):
                    replica.update("Note", _id(number), {"pending": number})
                expected = {found.id: dict(found.attributes) for found in tenant.query("Note")}
                for number in range(2, KNOWN_OBJECTS, EDITED_EVERY):
                    expected[_id(number)] |= {"pending": number}
        shutil.rmtree(store)
        self._pending_count = len(range(2, KNOWN_OBJECTS, EDITED_EVERY))
        with _unopened(template) as storage:
            self._old, self._page_count = read_shown(storage), _page_count(storage)
        ended = template.with_name("ended")
        shutil.copytree(template, ended)
        self.start(ended).wait()
        with Replica(ended) as replica:
            if contents(replica, "Note") != expected:
                raise AssertionError("the publication is over, and shown is something else than was downloaded")
            self._new = read_shown(replica._storage)

    def start(self, directory: Path) -> Child:
        """Go on with the publication."""
        return Child(publish, str(directory))

    def check(self, directory: Path, *, done: bool) -> None:
        """It shows what it showed before until all is there; the cursor moves with that."""
        with _unopened(directory) as storage:
            shown, cursor, pending_count = read_shown(storage), storage.meta("cursor"), storage.pending_count()
            is_under_way, page_count = storage.publication.is_under_way(), _page_count(storage)
        if 0 < page_count < self._page_count:
            self.kills["between two steps"] += 1
        if is_under_way and done:
            raise AssertionError("the publication came to no end")
        if is_under_way is not (cursor == self._cursor):
            raise AssertionError("the cursor and the data it stands for changed apart from each other")
        if pending_count != self._pending_count:
            raise AssertionError(f"{pending_count} operations are pending")
        expected = self._old if is_under_way else self._new
        if wrong := [key for key in {**shown, **expected} if shown.get(key) != expected.get(key)]:
            when = "is under way" if is_under_way else "is over"
            raise AssertionError(f"the publication {when}, and shown as something else: {wrong[:5]}")


class Trimming(_Phase):
    """Settled operations leave the log: the oldest first, none that is needed, and the view stays as it is."""

    name = "trimming"

    def prepare(self, template: Path) -> None:
        """Settle many operations, and leave some pending."""
        store = template.with_name("server")
        with Server(Application(), store=store) as server, Replica(template, server=server.address) as replica:
            _in_transactions(TRIMMED_OPERATIONS, replica, lambda one, n: one.create("Note", {"n": n}, _id(n)))
            replica.synchronize_all()
            for number in range(PENDING_OPERATIONS):
                replica.update("Note", _id(number), {"n": -1})
            self._record = read_replica(replica._storage)
            self._committed = Committed(self._record.log)
        shutil.rmtree(store)

    def start(self, directory: Path) -> Child:
        """Trim what there is to be trimmed."""
        return Child(trim, str(directory))

    def check(self, directory: Path, *, done: bool) -> None:
        """What is left is the end of the log, with all that is pending."""
        with Replica(directory) as replica:
            record = read_replica(replica._storage)
            with replica._storage.environment.read() as transaction:
                newest = replica._storage.newest_settled(transaction)
        promises.check_log(record, self._committed)
        seqs = sorted(record.log)
        if seqs != list(range(seqs[0], TRIMMED_OPERATIONS + PENDING_OPERATIONS + 1)):
            raise AssertionError(f"there is a gap between {seqs[0]} and {seqs[-1]}")
        if done and seqs[0] != TRIMMED_OPERATIONS + 1:
            raise AssertionError(f"the log still begins at {seqs[0]}")
        if len(record.pending) != PENDING_OPERATIONS or newest[0] != TRIMMED_OPERATIONS:
            raise AssertionError(f"{len(record.pending)} are pending, the newest settled is {newest}")
        if (record.view, record.base, record.unconfirmed) != (
            self._record.view,
            self._record.base,
            self._record.unconfirmed,
        ):
            raise AssertionError("the view has changed")
        if set(record.outcomes) != set(record.log) - set(record.pending):
            raise AssertionError("outcomes and log do not agree")


class Migration(_Phase):
    """A server's store gets a new schema: it is the old one or the new one, and no object is migrated twice."""

    name = "migration"

    def prepare(self, template: Path) -> None:
        """Fill a store by the old schema."""
        contents = contents_at(self._data.contents_url, self._data.endpoint)
        with Server(make_shop(OLD_SCHEMA), store=self._data.place, contents=contents) as server:
            _in_transactions(
                MIGRATED_OBJECTS, server.tenant(), lambda one, n: one.create("Task", {"price": n % 9 + 1}, _id(n))
            )
        self._data.keep()

    def put_back(self) -> None:
        """Let the server have its data as they were."""
        self._data.put_back()

    def start(self, directory: Path) -> Child:
        """Start the server with the new schema."""
        return Child(migrate, self._data.place, self._data.contents_url, self._data.endpoint)

    def check(self, directory: Path, *, done: bool) -> None:
        """The change log makes the objects, and each has its price in the one currency or the other."""
        with closing(self._data.open()) as store:
            record = read_server(store, {})
        promises.check_server(record, {})
        visible = {key[1]: attributes["price"] for key, (_, attributes) in record.visible().items()}
        old = {_id(number): number % 9 + 1 for number in range(MIGRATED_OBJECTS)}
        if visible.keys() != old.keys():
            raise AssertionError("objects are lost")
        unmigrated = {} if done else old
        if wrong := [id_ for id_, price in visible.items() if price not in (100 * old[id_], unmigrated.get(id_))]:
            raise AssertionError(f"prices are neither old nor new: {wrong[:5]}")


def _in_transactions(total: int, store: Any, change: Callable[[Any, int], object]) -> None:
    for first in range(0, total, TRANSACTION_OPERATIONS):
        with store.transaction() as transaction:
            for number in range(first, min(first + TRANSACTION_OPERATIONS, total)):
                change(transaction, number)


def _id(number: int) -> str:
    return f"{number:06}"


def _unopened(directory: Path) -> closing[Storage]:
    """Give a replica's data as they are: whoever opens the replica goes on with what was begun."""
    return closing(Storage(directory, relaxed=False, map_bytes=MAP_BYTES_DEFAULT))


def _page_count(storage: Storage) -> int:
    """Return how many pages are still on their way into the view."""
    with storage.environment.read() as transaction:
        return int(transaction.stat(storage.environment.database("incoming"))["entries"])


class _Stopped(Exception):
    pass


def _stop_before_publishing(replica: Replica) -> None:
    """Synchronize until nothing is missing but the publication."""
    publication = replica._storage.publication

    def stop() -> PublishedCounts:
        if publication._meta.read("publishing"):
            raise _Stopped
        return PublishedCounts()

    publication.finish = stop  # type: ignore[method-assign]
    try:
        replica.synchronize_all()
    except _Stopped:
        return
    raise AssertionError("the download is too small to be published in steps")
