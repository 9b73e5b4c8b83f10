"""
File room: what a server takes of a user's files that no operation of his refers to yet, and whose turn it is. No I/O.

The room is that of all devices of a user. What a whole commit group needs goes before
anything of the next one begins: else parts of several groups would fill the room, and none
of them would ever go.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, NamedTuple

from tidelog._limits import FILE_COST_BYTES

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._files import Needed
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
        offered: The operations that a session might have taken.
    """

    contents: Callable[[Unit], AbstractSet[Needed]]
    waiting: AbstractSet[Needed]
    failed: AbstractSet[Needed]
    under_way: AbstractSet[Needed]
    pending: AbstractSet[Needed]
    offered: Container[int]


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
        return self.bytes_max is None or cost_of(waiting | self._taking) <= self.bytes_max

    def open(self, waiting: AbstractSet[Needed]) -> None:
        """Let everything go."""
        self.going, self.exceeding = set(waiting), {}

    def share(self, units: Iterable[Unit], awaited: Awaited, hold_back: Callable[[Unit], None]) -> None:
        """
        Find out what goes for the next session: all that whole commit groups need, as far as there is room.

        What is there already of pending operations takes room too, whoever brought it and when; a group needs what
        those before it on the same objects need; and one that cannot go takes no room. What needs little comes first.
        Where nothing fits, and no session makes room, that is tried all the same: the server may count less.

        Args:
            units: Operations that may go: commit groups, and single ones.
            awaited: How what they refer to stands.
            hold_back: Called with what cannot go, before the next unit is asked for.
        """
        self.open(awaited.waiting)
        if self.bytes_max is None:
            return
        admitted = set(awaited.waiting & awaited.under_way)
        taken = admitted | (self._taking & awaited.pending)
        is_any_going = False
        groups: list[set[Needed]] = []
        before: dict[ObjectKey, set[Needed]] = {}
        for unit in units:
            contents = awaited.contents(unit)
            needed = awaited.waiting & contents
            whole = needed | (self._taking & contents)
            exceeds = len(whole) > 1 and cost_of(whole) > self.bytes_max
            group = set(needed).union(*(before.get(one.key, ()) for one in unit))
            if not group:
                # What a session might have taken, and did not, makes no room by itself.
                is_going = not all(one.seq in awaited.offered for one in unit)
                is_any_going = is_any_going or (is_going and not contents.isdisjoint(taken))
            elif not exceeds and needed.isdisjoint(awaited.failed) and self._may_fit(group):
                groups.append(group)
                before |= dict.fromkeys((one.key for one in unit), group)
            else:
                if exceeds:
                    self.exceeding |= dict.fromkeys((one.seq for one in unit), cost_of(whole))
                hold_back(unit)
        groups.sort(key=lambda group: cost_of(group - taken))
        cost = cost_of(taken)
        for group in groups:
            if cost + (more := cost_of(group - taken)) <= self.bytes_max:
                admitted.update(group)
                taken.update(group)
                cost += more
        if not admitted and not is_any_going and groups:
            admitted.update(groups[0])
        self.going = admitted

    def _may_fit(self, group: AbstractSet[Needed]) -> bool:
        return self.bytes_max is None or len(group) == 1 or cost_of(group) <= self.bytes_max


def cost_of(contents: Iterable[Needed]) -> int:
    """Return what contents count for in the room."""
    return sum(one.size + FILE_COST_BYTES for one in contents)
