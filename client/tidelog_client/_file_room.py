"""
File room: what a server takes of a user's files that no operation of his refers to yet, and whose turn it is. No I/O.

The room is that of all devices of a user. What a whole commit group needs goes before
anything of the next one begins: else parts of several groups would fill the room, and none
of them would ever go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from tidelog._limits import FILE_COST_BYTES

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._files import Needed
    from tidelog_client._links import Links
    from tidelog_client._storage import PendingOperation

Unit = Sequence["PendingOperation"]


class Awaited(NamedTuple):
    """
    How the contents stand that operations refer to.

    Attributes:
        contents: What the operations of a unit refer to.
        waiting: What is to be uploaded.
        failed: What of it was tried in vain.
        under_way: What of it is going up.
        pending: What operations refer to that are not settled.
    """

    contents: Callable[[Unit], AbstractSet[Needed]]
    waiting: AbstractSet[Needed]
    failed: AbstractSet[Needed]
    under_way: AbstractSet[Needed]
    pending: AbstractSet[Needed]


class _Turn:
    """
    What a commit group, or a single operation, needs, and when it may go.

    Attributes:
        needed: The contents.
        after: The turns, by their identity, that come before it.
        next: Those that come after it.
    """

    __slots__ = ("after", "needed", "next")

    def __init__(self, needed: AbstractSet[Needed], after: dict[int, _Turn]) -> None:
        self.needed = needed
        self.after = after
        self.next: list[_Turn] = []


class FileRoom:
    """
    The room, as far as the server says.

    Attributes:
        bytes_max: How much there is. None: as much as anybody likes.
        going: The contents whose turn it is. The others have to wait until there is room.
        exceeding: By operation, how much those need that need more with their commit group than there is.
    """

    def __init__(self) -> None:
        self.bytes_max: int | None = None
        self.going: AbstractSet[Needed] = frozenset()
        self.exceeding: dict[int, int] = {}
        self._taking: set[Needed] = set()

    def note_taking(self, content: Needed) -> None:
        """Note that a content takes room: it came, or began to, and no operation refers to it yet."""
        self._taking.add(content)

    def note_settled(self, contents: Iterable[Needed]) -> None:
        """Note that contents take none: an operation that refers to them is settled."""
        self._taking.difference_update(contents)

    def is_enough_for(self, waiting: AbstractSet[Needed]) -> bool:
        """Tell whether everything fits, however much of it is somebody else's turn."""
        return self._fits(waiting | self._taking)

    def open(self, waiting: AbstractSet[Needed]) -> None:
        """Let everything go."""
        self.going, self.exceeding = set(waiting), {}

    def share(self, units: Iterable[tuple[Unit, Links]], awaited: Awaited, hold_back: Callable[[Unit], None]) -> None:
        """
        Find out what goes for the next session: all that whole commit groups need, as far as there is room.

        What is there already of pending operations takes room too, whoever brought it and when; a group has its turn
        after those before it on the same objects, and after those that create what it refers to; and one that cannot
        go takes no room. What needs little comes first.

        Every group that fits alone gets its turn, unless another device of the user takes the room: after each call
        what takes room fits together with what goes. So, wherever a synchronization is cut, whatever has come by
        then, a group that was going fits the next time, and the room that it takes is free once a session has settled
        it. If all of these were settled, that holds for what was going the time before, and so on; where nothing is
        there, everything fits that fits alone. So each synchronization that is not cut settles one group at least, and
        in fact one after the other, for the room is shared anew after each session. What has come of a group that is
        then held up by something else takes its part of the room until that is over, or the server lets go of it: a
        reference to what is not there, say, which the server does not refuse while earlier operations stay behind.

        Args:
            units: Operations that may go: commit groups, and single ones, in the order of the log.
            awaited: How what they refer to stands.
            hold_back: Called with what cannot go, before the next unit is asked for.
        """
        self.exceeding = {}
        turns: list[_Turn] = []
        # The newest turns of what is about an object, and of what creates it.
        latest: dict[ObjectKey, _Turn] = {}
        creating: dict[ObjectKey, _Turn] = {}
        for unit, links in units:
            contents = awaited.contents(unit)
            needed = awaited.waiting & contents
            whole = needed | (self._taking & contents)
            if needed and not self._fits(whole):
                self.exceeding |= dict.fromkeys((one.seq for one in unit), cost_of(whole))
                hold_back(unit)
                continue
            if not needed.isdisjoint(awaited.failed):
                hold_back(unit)
                continue
            before = [latest.get(one.key) for one in unit] + [creating.get(key) for key in links.referenced]
            turn = _Turn(needed, {id(one): one for one in before if one is not None})
            if needed or turn.after:
                turns.append(turn)
                latest |= dict.fromkeys((one.key for one in unit), turn)
                creating |= dict.fromkeys(links.created, turn)
        self.going = self._going(turns, awaited)

    def _going(self, turns: Sequence[_Turn], awaited: Awaited) -> set[Needed]:
        """Return the contents of those that have their turn."""
        going = set(awaited.waiting & awaited.under_way)
        taken = going | (self._taking & awaited.pending)
        cost = cost_of(taken)
        for turn in turns:
            for one in turn.after.values():
                one.next.append(turn)
        order = count()
        due = [(cost_of(turn.needed - taken), next(order), turn) for turn in turns if not turn.after]
        heapify(due)
        while due:
            _, _, turn = heappop(due)
            more = turn.needed - taken
            if self.bytes_max is not None and cost + cost_of(more) > self.bytes_max and len(taken) + len(more) > 1:
                continue  # nor has what comes behind it
            going |= turn.needed
            taken |= more
            cost += cost_of(more)
            for one in turn.next:
                del one.after[id(turn)]
                if not one.after:
                    heappush(due, (cost_of(one.needed - taken), next(order), one))
        return going

    def _fits(self, contents: AbstractSet[Needed]) -> bool:
        """Tell whether there is room for all of these, if for nothing else. One alone always may go."""
        return self.bytes_max is None or len(contents) <= 1 or cost_of(contents) <= self.bytes_max


def cost_of(contents: Iterable[Needed]) -> int:
    """Return what contents count for in the room."""
    return sum(one.size + FILE_COST_BYTES for one in contents)
