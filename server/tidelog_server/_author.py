"""
The author of operations: a replica, whatever ids it has had, and the states that it looked at.

A replica whose directory was copied goes on under another id; what it committed before
is its own nonetheless. A server that was put back from a backup numbers what it applies
from then on anew; what the author saw before cannot be told by the numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tidelog._operation import Operation
from tidelog_server._records import Change, ObjectState


class FormerIdentity(NamedTuple):
    """
    An id that a replica has given up.

    Attributes:
        replica: The id in 16 bytes.
        last_seq: The newest seq committed under it.
        settled_seq: The newest seq settled under it, as far as the replica knows.
            Beyond it, another copy may have gone on under the id.
        settled_nonce: That operation's nonce. 0: not known.
    """

    replica: bytes
    last_seq: int
    settled_seq: int
    settled_nonce: int = 0


class OldBases(NamedTuple):
    """
    Operations that were made on a state of an older timeline.

    Attributes:
        through_seq: The newest of them.
        common_version: A version up to which that timeline and the present one are the same.
        timeline: That timeline; empty: they are of several.
    """

    through_seq: int
    common_version: int
    timeline: str = ""


class Sight(NamedTuple):
    """
    What the author of an operation had seen of its object.

    Attributes:
        base_version: The version, in the numbers of the present timeline.
        former_version: What was applied anew after a restore is known to the author if it had been
            applied up to this version before. 0: nothing was.
        timeline: The timeline that this version is of; empty: it cannot be told.
    """

    base_version: int
    former_version: int = 0
    timeline: str = ""

    def covers(self, change: Change) -> bool:
        """Tell whether a change is one that was applied anew and that the author had seen before."""
        if not 0 < change.former_version <= self.former_version:
            return False
        return bool(self.timeline) and change.former_timeline == self.timeline


def _nothing(_seq: int, _version: int) -> bool:
    return False


class Author(NamedTuple):
    """
    A replica as the author of operations.

    Attributes:
        replica: Its id in 16 bytes.
        formers: The ids that it had before.
        old_bases: Which of its operations were made on a state of an older timeline.
        has_applied: Tells whether it was the replica's own operation at a seq that was applied at a
            version, whichever copy of the replica brought it.
    """

    replica: bytes
    formers: tuple[FormerIdentity, ...] = ()
    old_bases: OldBases | None = None
    has_applied: Callable[[int, int], bool] = _nothing

    def may_have_created(self, state: ObjectState) -> bool:
        """Tell whether the author, or another copy of it, created the present incarnation of an object."""
        return state.creator == self.replica or any(state.creator == one.replica for one in self.formers)

    def wrote(self, change: Change) -> bool:
        """Tell whether a change is the author's."""
        if change.replica == self.replica:
            return True
        return bool(self.formers) and (
            any(change.replica == one.replica and change.seq <= one.settled_seq for one in self.formers)
            or self.has_applied(change.seq, change.version)
        )

    def sight(self, operation: Operation, former_version: int = 0) -> Sight:
        """
        Return what an operation's author had seen.

        Args:
            operation: The operation.
            former_version: The version that it was applied at before the server was put back; 0: it was not.
        """
        base_version = operation.base_version
        bases = self.old_bases
        if former_version:
            common_version = bases.common_version if bases is not None else 0
            timeline = bases.timeline if bases is not None else ""
            return Sight(min(base_version, common_version), former_version - 1, timeline)
        if bases is None or operation.seq > bases.through_seq:
            return Sight(base_version)
        return Sight(min(base_version, bases.common_version), base_version, bases.timeline)
