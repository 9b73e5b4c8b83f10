"""
Replicas of a server that forgets, against those of one that does not.

The same users do the same in two worlds, with real replicas and the real server code.
Synchronizations are cut anywhere, answers get lost, replicas stay away for any time. In
one of the worlds everything but the last few changes is forgotten now and then, also in
the middle of a download. To its users that makes no difference but one: what nobody can
tell any more becomes a failure.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from tests.builders import TENANT, MemoryStore, collect, contents, quick_folder
from tests.simulation.link import PAGES_AHEAD_MAX, ServerEnd

from tidelog import OperationKind
from tidelog._keys import ObjectKey
from tidelog._values import decode_trusted
from tidelog_client import Replica, Report, _publication, _synchronization
from tidelog_client._selection import select
from tidelog_client._synchronization import Mode, Synchronization
from tidelog_client._view import StateLost
from tidelog_server import Application, Principal, _collection, _download
from tidelog_server._attempts import Attempt
from tidelog_server._errors import HistoryCollected, SessionSuperseded
from tidelog_server._records import Change, Writes
from tidelog_server._store import Reader

pytestmark = pytest.mark.slow

SEEDS = 16
ACTIONS = 150
IDS = [f"t{number}" for number in range(5)]
NAMES = ["ann", "bob", "eve"]
MOVES_MAX = 2_000

Attributes = dict[str, Any]


class World:
    """A server and its replicas."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        self.application = Application()
        self.replicas = {name: Replica(folder / name, durability="relaxed") for name in NAMES}
        self.changes: list[Change] = []
        self.time_us = 1
        submit = self.store.submit

        def recorded(tenant: str, job: Any, attempt: Attempt | None = None) -> Any:
            def work(reader: Reader) -> tuple[Writes | None, Any]:
                writes, result = job(reader)
                self.changes += writes.changes if writes is not None else ()
                return writes, result

            return submit(tenant, work, attempt)

        self.store.submit = recorded  # type: ignore[method-assign]

    def close(self) -> None:
        """Close the replicas."""
        for replica in self.replicas.values():
            replica.close()

    def objects(self) -> dict[str, tuple[int, Attributes]]:
        """Return the objects on the server, with their versions."""
        with self.store.read(TENANT) as reader:
            found = reader.objects(("Task", id_) for id_ in IDS).items()
            return {key[1]: (one.version, decode_trusted(one.attributes)) for key, one in found if not one.deleted}

    def refused(self) -> set[tuple[str, int]]:
        """Return the operations that are recorded as failures, deletions left out, by replica and seq."""
        return {
            (name, failure.operation.seq)
            for name, replica in self.replicas.items()
            for failure in replica.failures()
            if failure.operation is not None and failure.operation.kind is not OperationKind.DELETE
        }

    def forget(self, but: int) -> None:
        """Forget the history but for some changes, as far as they were made by then."""
        with self.store.read(TENANT) as reader:
            head = reader.head().version
            oldest = reader.change(max(1, head - but))
        collect(self.store, oldest.time_us if oldest is not None else self.time_us)

    def synchronize(
        self, name: str, mode: Mode, keys: list[ObjectKey], cut: int | None, forgets: tuple[int, int] | None
    ) -> bool:
        """
        Synchronize a replica; tell whether it was completed.

        Args:
            name: The replica.
            mode: What is synchronized.
            keys: The objects to select.
            cut: After so many messages the network fails. None: it does not.
            forgets: After how many messages the server forgets, and what it does not. None: it does not.
        """
        replica = self.replicas[name]
        storage = replica._storage
        moves = 0
        while moves < MOVES_MAX:
            storage.publication.finish()
            report = Report()
            selection = (
                select(storage, replica._known_schema(), dict.fromkeys(keys, False), report)
                if mode is Mode.SELECTED
                else None
            )
            attempt = Synchronization(storage, mode, report, lambda _: None, selection=selection)
            link = Link(attempt, ServerEnd(self.application, self.store, Principal(f"user-{name}"), self._clock))
            try:
                while not attempt.done and link.move():
                    moves += 1
                    if forgets is not None and moves == forgets[0]:
                        self.forget(forgets[1])
                    if cut is not None and moves >= cut:
                        return False
            except StateLost:
                storage.publication.start_over()
            if attempt.done:
                return True
        raise AssertionError("the synchronization does not end")

    def _clock(self) -> int:
        self.time_us += 1
        return self.time_us


class Link:
    """Carries the messages of one attempt, one at a time."""

    def __init__(self, attempt: Synchronization, server: ServerEnd) -> None:
        self._attempt = attempt
        self._server = server
        self._to_server: deque[bytes | None] = deque(attempt.begin())
        self._to_client: deque[bytes] = deque()
        self._is_broken = False

    def move(self) -> bool:
        """Let a message arrive, or a page be read; False: nothing more will come."""
        try:
            if not self._is_broken and self._to_server:
                if (answer := self._server.receive(self._to_server.popleft())) is not None:
                    self._to_client.append(answer)
                return True
            if not self._is_broken and self._server.has_pages and len(self._to_client) < PAGES_AHEAD_MAX:
                self._to_client.append(self._server.next_page())
                return True
        except (HistoryCollected, SessionSuperseded):
            self._is_broken = True
            return True
        if self._to_client:
            self._to_server.extend(self._attempt.receive(self._to_client.popleft()))
            return True
        return False


class Worlds:
    """Two worlds in which the same is done. The second one forgets."""

    def __init__(self, folder: Path) -> None:
        self.remembering = World(folder / "remembering")
        self.forgetting = World(folder / "forgetting")
        self.both = (self.remembering, self.forgetting)

    def act(self, random: Random) -> None:
        """Let something happen."""
        name = random.choice(NAMES)
        kind = random.choices(["change", "synchronize", "forget"], [6, 3, 1])[0]
        if kind == "change":
            self._change(random, name)
        elif kind == "forget":
            self.forgetting.forget(random.choice([0, 0, 2, 10]))
        else:
            self._synchronize(random, name)

    def _change(self, random: Random, name: str) -> None:
        id_, value = random.choice(IDS), random.randrange(100)
        change = random.choice(["set", "set", "increment", "delete"])
        attribute = random.choice("xy")
        there = [world.replicas[name].get("Task", id_) is not None for world in self.both]
        if there[0] is not there[1]:
            return  # one has downloaded it, the other has not yet
        for world in self.both:
            replica = world.replicas[name]
            if not there[0]:
                replica.create("Task", {attribute: value}, id_)
            elif change == "set":
                replica.update("Task", id_, {attribute: value})
            elif change == "increment":
                replica.update("Task", id_, increment={"n": value})
            else:
                replica.delete("Task", id_)

    def _synchronize(self, random: Random, name: str) -> None:
        mode = random.choices([Mode.ALL, Mode.UNSYNCHRONIZED, Mode.SELECTED], [4, 1, 1])[0]
        keys: list[ObjectKey] = [("Task", id_) for id_ in random.sample(IDS, 2)]
        cut = random.choice([None, None, random.randrange(1, 20)])
        forgets = random.choice([None, (random.randrange(1, 16), random.choice([0, 2]))])
        # Uploads are alike in both worlds, so a cut leaves both servers with the same part of them.
        completed = [
            self.remembering.synchronize(name, mode, keys, cut, None),
            self.forgetting.synchronize(name, mode, keys, cut, forgets),
        ]
        if not any(completed):
            return
        for world, is_complete in zip(self.both, completed, strict=True):
            # Downloads are not alike. What users see, and go by, must be.
            assert is_complete or world.synchronize(name, mode, keys, None, None)
            if mode is Mode.ALL:
                self._check_replica(world, name)

    def _check_replica(self, world: World, name: str) -> None:
        """Compare what a replica shows after a synchronization of everything with what is on the server."""
        replica = world.replicas[name]
        assert replica.pending_count() == 0
        assert contents(replica) == {id_: attributes for id_, (_, attributes) in world.objects().items()}
        with replica._storage.environment.read() as transaction:
            for leftover in ("incoming", "merging", "seen", "ahead", "unconfirmed", "base"):
                assert not transaction.stat(replica._storage.environment.database(leftover))["entries"], leftover

    def check(self) -> None:
        """Compare the worlds."""
        remembering, forgetting = self.both
        assert forgetting.objects() == remembering.objects()
        assert forgetting.changes == [
            one._replace(replica=other.replica, time_us=other.time_us, previous=other.previous)
            for one, other in zip(remembering.changes, forgetting.changes, strict=True)
        ]

    def end(self) -> None:
        """Synchronize everything, and compare what became of each operation."""
        for name in (*NAMES, *NAMES):
            for world in self.both:
                assert world.synchronize(name, Mode.ALL, [], None, None)
                self._check_replica(world, name)
            self.check()
        remembering, forgetting = self.both
        assert forgetting.refused() >= remembering.refused()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_forgetting_makes_no_difference(seed: int) -> None:
    """Whatever is forgotten, replicas show what the server has, nothing comes back, and no operation is lost."""
    random = Random(seed)
    with quick_folder() as folder, ExitStack() as stack:
        for module, name, value in (
            (_download, "PAGE_OBJECTS_MAX", random.choice([1, 2, 1_000])),
            (_collection, "STEP_ENTRIES", random.choice([1, 2, 500])),
            (_synchronization, "STAGE_BYTES", random.choice([1, 8 * 1024 * 1024])),
            (_publication, "PUBLISH_OBJECTS_MAX", random.choice([0, 2, 100_000])),
            (_publication, "END_STEP_OBJECTS", random.choice([1, 100_000])),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        worlds = Worlds(folder)
        for world in worlds.both:
            stack.callback(world.close)
        for _ in range(ACTIONS):
            worlds.act(random)
            worlds.check()
        worlds.end()
