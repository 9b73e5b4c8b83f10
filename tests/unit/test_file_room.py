"""Whose turn it is to upload, where there is not room for everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Final

from tidelog_client._file_room import Awaited, FileRoom, cost_of
from tidelog_client._files import Needed
from tidelog_client._links import NO_LINKS, Links
from tidelog_client._storage import PendingOperation

ROOM_BYTES: Final = 60_000
SIZES: Final = (500, 7_000, 15_000, 25_000, 40_000, 70_000)


def content(number: int, size: int = 1_000) -> Needed:
    """Return a content."""
    return Needed(bytes([number]) * 32, size)


class Pending:
    """
    Operations that wait for contents, and a server that counts as it says.

    Attributes:
        groups: What the commit groups need, in the order of the log.
        there: What came and nothing refers to yet.
        under_way: What is on its way.
        failed: What cannot be read.
    """

    def __init__(self, groups: Iterable[set[Needed]], room_bytes: int = ROOM_BYTES) -> None:
        self.room_bytes = room_bytes
        self.groups = dict(enumerate(groups, start=1))
        self.there: set[Needed] = set()
        self.under_way: set[Needed] = set()
        self.failed: set[Needed] = set()
        self.links: dict[int, Links] = {}
        self.held: set[int] = set()

    def share(self) -> FileRoom:
        """Return whose turn it is in a synchronization that begins now."""
        room = FileRoom()
        room.bytes_max = self.room_bytes
        pending = {one for group in self.groups.values() for one in group}
        self.there &= pending
        for one in self.there:
            room.note_taking(one)
        self.held = set()
        awaited = Awaited(
            contents=lambda unit: self.groups[unit[0].seq],
            waiting=pending - self.there,
            failed=self.failed,
            under_way=self.under_way,
            pending=pending,
        )
        room.share(self._units(), awaited, lambda unit: self.held.update(one.seq for one in unit))
        return room

    def _units(self) -> Iterable[tuple[Sequence[PendingOperation], Links]]:
        return [
            ([PendingOperation(seq, 0, 0, ("Task", str(seq)))], self.links.get(seq, NO_LINKS)) for seq in self.groups
        ]

    def settle(self) -> None:
        """Let a session take what has all that it needs. What is referred to now takes no room."""
        settled = {one for group in self.groups.values() if group <= self.there for one in group}
        self.groups = {seq: group - settled for seq, group in self.groups.items() if not group <= self.there}
        self.there -= settled

    def fits(self, contents: set[Needed]) -> bool:
        """Tell whether the server would take all of these."""
        return len(contents) <= 1 or cost_of(contents) <= self.room_bytes


def test_wherever_it_is_cut_what_was_going_fits_the_next_time() -> None:
    """However many synchronizations are cut, each one that is not settles one group at least, until none fits."""
    for seed in range(500):
        random = Random(seed)
        contents = [content(number, random.choice(SIZES)) for number in range(9)]
        groups = [set(random.sample(contents, random.randint(1, 3))) for _ in range(random.randint(1, 9))]
        pending = Pending(groups)
        for _ in range(random.randint(0, 6)):
            going = sorted(pending.share().going)
            pending.there.update(random.sample(going, random.randint(0, len(going))))
            assert pending.fits(pending.there), seed
            if random.random() < 0.5:
                pending.settle()
            if random.random() < 0.3:
                new = set(random.sample(contents, random.randint(1, 2)))
                pending.groups[max(pending.groups, default=0) + 1] = new

        pending.settle()
        while any(pending.fits(group) for group in pending.groups.values()):
            before = len(pending.groups)
            pending.there |= pending.share().going
            pending.settle()
            assert len(pending.groups) < before, (seed, pending.groups, pending.there)


def test_what_needs_little_goes_first() -> None:
    """Where not all fit, those go that need least, and what is there of them does not count twice."""
    large, half, small = content(1, 30_000), content(2, 20_000), content(3, 20_000)
    pending = Pending([{large}, {half, small}])
    assert pending.share().going == {large}

    pending.there = {half}

    assert pending.share().going == {small}


def test_what_is_under_way_is_one_less_to_go() -> None:
    """What lacks least comes first: what is under way of a group goes on, and is not counted twice."""
    large, rest, other = content(1, 25_000), content(2, 15_000), content(3, 20_000)
    pending = Pending([{other}, {large, rest}])
    pending.under_way = {large}

    assert pending.share().going == {large, rest}


def test_one_alone_goes_however_large_it_is() -> None:
    """A content above all room goes once nothing else takes any; with others in a group it never does."""
    huge, small = content(1, 100_000), content(2)
    pending = Pending([{huge}, {small}, {huge, small}])

    room = pending.share()
    assert (room.going, set(room.exceeding), pending.held) == ({small}, {3}, {3})

    pending.groups = {1: {huge}}
    assert pending.share().going == {huge}


def test_what_cannot_be_read_takes_no_room() -> None:
    """A group of which one content was tried in vain does not go, and others do."""
    bad, its, other = content(1), content(2, 40_000), content(3, 40_000)
    pending = Pending([{bad, its}, {other}])
    pending.failed = {bad}

    assert (pending.share().going, pending.held) == ({other}, {1})


def test_what_refers_to_an_object_goes_after_its_files() -> None:
    """What an operation refers to whose creation waits goes before it, or with it."""
    parents, child = content(1, 40_000), content(2, 20_000)
    pending = Pending([{parents}, {child}])
    assert pending.share().going == {child}

    pending.links = {1: Links({("Task", "1")}, set()), 2: Links({("Task", "2")}, {("Task", "1")})}

    assert pending.share().going == {parents}
