"""
The upload of a session of mode all or unsynchronized: what is pending, but for what stays behind.

Operations stay behind whose entity the session does not upload. With them stays what
must not be parted from them: the rest of their commit group, and later operations on
the objects that those are about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tidelog._keys import ObjectKey
from tidelog_client._report import Skipped, SkipReason

if TYPE_CHECKING:
    from tidelog_client._storage import PendingOperation, Storage


class Sieve:
    """
    Decides of pending operations whether they stay behind.

    Asked in log order, of a whole commit group at once. May be asked again.

    Args:
        excluded: The entities that are not uploaded.
    """

    def __init__(self, excluded: Collection[str]) -> None:
        self._excluded = excluded
        # Objects of other entities on which something stays behind.
        self._blocked: set[ObjectKey] = set()

    def holds_back(self, keys: Sequence[ObjectKey]) -> bool:
        """Tell whether the operations of a group, or a single one, stay behind; *keys* are their objects."""
        if not any(key[0] in self._excluded or key in self._blocked for key in keys):
            return False
        self._blocked.update(key for key in keys if key[0] not in self._excluded)
        return True


class Upload(NamedTuple):
    """
    What a session uploads.

    Attributes:
        operation_count: How many operations.
        leaves_earlier: Whether operations with lower seqs stay behind.
        left_behind: How many operations stay behind, by entity.
    """

    operation_count: int
    leaves_earlier: bool
    left_behind: Mapping[str, int]

    def begins_like(self, other: Upload) -> bool:
        """Tell whether a session with this upload begins with the same message as one with *other*."""
        return (self.operation_count > 0, self.leaves_earlier) == (other.operation_count > 0, other.leaves_earlier)

    def skipped(self) -> list[Skipped]:
        """Return what stays behind in the words of the report."""
        return [
            Skipped(
                entity,
                "",
                SkipReason.NEVER,
                f"operations that wait to be selected: {count}; otherwise the server does not take them, "
                "or not what they belong to",
                count=count,
            )
            for entity, count in self.left_behind.items()
        ]


def upload_of(storage: Storage, excluded: Collection[str], *, until: int) -> Upload:
    """
    Work out what a session uploads.

    Args:
        storage: The replica's data.
        excluded: The entities that are not uploaded.
        until: Position in the log to end at.
    """
    left_behind: Counter[str] = Counter()
    if not excluded:
        return Upload(storage.pending_count(), leaves_earlier=False, left_behind=left_behind)
    sieve = Sieve(excluded)
    operation_count = 0
    leaves_earlier = False
    unit: list[PendingOperation] = []
    for pending in storage.pending(until=until):
        unit.append(pending)
        if len(unit) < pending.group_size:
            continue
        if sieve.holds_back([one.key for one in unit]):
            left_behind.update(one.key[0] for one in unit)
        else:
            operation_count += len(unit)
            leaves_earlier = leaves_earlier or bool(left_behind)
        unit = []
    return Upload(operation_count, leaves_earlier, left_behind)
