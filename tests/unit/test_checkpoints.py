"""Checkpoints: what a replica shows a server that was put back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.builders import REPLICA_B, TENANT, TIME_US, Lab, MemoryStore, collect, create, update

from tidelog_server._checkpoints import COMMITS_MAX, Checkpoints
from tidelog_server._runs import RUNS_MAX, Moment, lacks, present


class Desk:
    """A store, and copies of it."""

    def __init__(self) -> None:
        self.disk: dict[str, Any] = {}
        self.lab = Lab(store=MemoryStore(self.disk))
        self.seq = 0

    def commit(self, count: int = 1) -> None:
        """Apply operations, each in a commit of its own."""
        for _ in range(count):
            self.seq += 1
            self.lab.settle(create(self.seq, f"t{self.seq}"))

    def copied(self) -> Desk:
        """Return what this is now, to go on from there."""
        found = Desk()
        found.disk = copy.deepcopy(self.disk)
        found.lab = Lab(store=MemoryStore(found.disk))
        found.seq = self.seq
        return found

    def checkpoints(self, tenant: str = TENANT) -> Checkpoints:
        """Return the checkpoints of a replica."""
        return Checkpoints(self.lab.store, tenant)

    def checkpoint(self) -> bytes:
        """Return the checkpoint of now."""
        found = self.checkpoints()
        with self.lab.store.read(TENANT) as reader:
            found.begin(reader)
            return found.at(reader.identity(), reader.head(), present(reader.index))

    def contradicts(self, checkpoint: bytes, tenant: str = TENANT) -> bool:
        """Tell whether the store lacks what a checkpoint names."""
        with self.lab.store.read(tenant) as reader:
            return self.checkpoints(tenant).contradicts(reader, checkpoint)

    def common_version(self, checkpoint: bytes) -> int:
        """Return up to where the store and a checkpoint are the same."""
        with self.lab.store.read(TENANT) as reader:
            return self.checkpoints().common_version(reader, checkpoint)


@pytest.fixture
def desk() -> Desk:
    """Give a store in which something was done."""
    found = Desk()
    found.checkpoints()  # makes the key, as every server does when it starts
    found.commit()
    return found


def test_a_store_that_went_on(desk: Desk) -> None:
    """A store that has everything contradicts no checkpoint, and shares all of it."""
    early = desk.checkpoint()
    desk.commit(10)

    assert not desk.contradicts(early)
    assert desk.common_version(early) == 1
    assert not desk.contradicts(desk.checkpoint())


def test_a_store_that_ends_earlier(desk: Desk) -> None:
    """A store whose history ends below a checkpoint was put back."""
    backup = desk.copied()
    desk.commit()

    assert backup.contradicts(desk.checkpoint())


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_store_that_went_on_elsewhere(desk: Desk, more: int) -> None:
    """A store that has another commit at a checkpoint's version was put back, however far it has come since."""
    backup = desk.copied()
    desk.commit(3)
    checkpoint = desk.checkpoint()
    for number in range(3 + more):
        backup.lab.settle(create(number + 1, f"x{number}"), replica=REPLICA_B)

    assert backup.contradicts(checkpoint)


def test_a_store_that_committed_more_at_once(desk: Desk) -> None:
    """A store that passed a checkpoint's version in the middle of a commit was put back."""
    backup = desk.copied()
    desk.commit()
    checkpoint = desk.checkpoint()
    backup.lab.settle(create(1, "x"), create(2, "y"), replica=REPLICA_B)

    assert backup.contradicts(checkpoint)


def test_a_refusal_that_was_lost(desk: Desk) -> None:
    """A store in which fewer operations of the replica are settled was put back, though no version is missing."""
    backup = desk.copied()
    desk.lab.settle(update(desk.seq + 1, "never there"))
    checkpoint = desk.checkpoint()

    assert backup.contradicts(checkpoint)
    assert not desk.contradicts(checkpoint)


def test_a_copy_in_the_place_of_what_was_lost(desk: Desk) -> None:
    """What was lost is missed although a copy of the replica has settled something else in its place."""
    backup = desk.copied()
    desk.lab.settle(update(desk.seq + 1, "never there"))
    checkpoint = desk.checkpoint()
    backup.lab.settle(update(backup.seq + 1, "not there either", nonce=9))

    assert backup.contradicts(checkpoint)
    assert not backup.contradicts(backup.checkpoint())


def test_a_refusal_in_the_place_of_another_ones(desk: Desk) -> None:
    """A refusal that was lost is missed although the store has refused more since, and forgotten all of it."""
    backup = desk.copied()
    desk.lab.settle(update(desk.seq + 1, "never there"))
    checkpoint = desk.checkpoint()
    for number in range(4):
        backup.lab.settle(update(number + 1, "never there"), replica=REPLICA_B)
    assert collect(backup.lab.store, TIME_US + 10**13).outcomes

    assert backup.contradicts(checkpoint)
    assert backup.copied().contradicts(checkpoint)
    assert not backup.contradicts(backup.checkpoint())


def test_a_store_that_was_opened_very_often(desk: Desk) -> None:
    """Of a run that is remembered nothing contradicts; of one that is forgotten nobody can tell any more."""
    checkpoints = [desk.checkpoint()]
    moments = []
    for number in range(RUNS_MAX + 2):
        desk.lab.store = MemoryStore(desk.disk)
        desk.lab.settle(update(number + 2, "never there"))
        checkpoints.append(desk.checkpoint())
        with desk.lab.store.read(TENANT) as reader:
            moments.append(present(reader.index))
    with desk.lab.store.read(TENANT) as reader:
        assert not any(lacks(reader, moment) for moment in moments)
        assert lacks(reader, Moment(RUNS_MAX, moments[0].run))
        assert not lacks(reader, Moment(1, b"another run"))
        assert len(reader.index_range(b"n", b"n", 2 * RUNS_MAX)) == RUNS_MAX

    assert not any(desk.contradicts(checkpoint) for checkpoint in checkpoints)


def test_another_timeline_or_store_is_no_contradiction(desk: Desk) -> None:
    """A checkpoint of another timeline says nothing against this one, nor does one that was made up or altered."""
    backup = desk.copied()
    desk.commit()
    checkpoint = desk.checkpoint()
    backup.disk["identity"] = backup.lab.store.identity._replace(timeline="second")
    restored = backup.copied()

    assert not restored.contradicts(checkpoint)
    assert restored.common_version(checkpoint) == 1
    for data in (b"", b"x", checkpoint[:-1], checkpoint[:-1] + bytes([checkpoint[-1] ^ 1])):
        assert not desk.contradicts(data)
        assert desk.common_version(data) == 0
    assert Desk().common_version(checkpoint) == 0


def test_another_tenants_checkpoint(desk: Desk) -> None:
    """A checkpoint of one tenant cannot be shown for another one."""
    assert not desk.contradicts(desk.checkpoint(), "other")


@pytest.mark.parametrize("lost", [1, 2, 7, 50, 300])
def test_what_is_common_is_underestimated_by_half_of_what_was_lost(desk: Desk, lost: int) -> None:
    """Commits at growing distances are named: few enough to travel with each batch, near enough to be of use."""
    desk.commit(400)
    backup = desk.copied()
    common = desk.lab.version()
    desk.commit(lost)

    found = backup.common_version(desk.checkpoint())

    assert common - lost // 2 - 1 <= found <= common
    with desk.lab.store.read(TENANT) as reader:
        checkpoints = desk.checkpoints()
        checkpoints.begin(reader)
    assert len(desk.checkpoint()) < 2_000
    assert COMMITS_MAX < 50
