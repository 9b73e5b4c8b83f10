"""
The upload of a session: what is pending or selected, but for what stays behind.

Operations stay behind whose entity the session does not upload, and those that refer to
the content of a file which the server does not have yet. With them stays what must not be
parted from them: the rest of their commit group, and later operations on the objects that
those are about.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._keys import ObjectKey
from tidelog_client._report import Skipped, SkipReason

if TYPE_CHECKING:
    from tidelog_client._storage import PendingOperation, Storage


class FilePlan(NamedTuple):
    """
    What a session has to know of the contents that operations refer to.

    Attributes:
        until: Position in the log up to where that is known. None: as far as the log goes.
        held: The operations that refer to a content which the server does not have yet.
        lost: The contents that operations refer to and that nobody has any more, by seq.
    """

    until: int | None = None
    held: Collection[int] = frozenset()
    lost: Mapping[int, Sequence[bytes]] = {}

    def lost_in(self, seqs: Iterable[int]) -> list[bytes]:
        """Return the lost contents that some operations refer to."""
        return sorted({sha256 for seq in seqs for sha256 in self.lost.get(seq, ())}) if self.lost else []


NO_FILES: Final = FilePlan()


class Cause(enum.Enum):
    """Why an operation stays behind."""

    EXCLUDED = enum.auto()
    FILE = enum.auto()


class Sieve:
    """
    Decides of pending operations whether they stay behind.

    Asked in log order, of a whole commit group at once. May be asked again.

    Args:
        excluded: The entities that are not uploaded.
        held: The operations that are not.
    """

    def __init__(self, excluded: Collection[str], held: Container[int] = ()) -> None:
        self._excluded = excluded
        self._held = held
        # Objects of other entities on which something stays behind.
        self._blocked: dict[ObjectKey, Cause] = {}

    def holds_back(self, unit: Sequence[PendingOperation]) -> Cause | None:
        """Tell why the operations of a group, or a single one, stay behind; None: they do not."""
        cause = self._cause(unit)
        if cause is not None:
            for one in unit:
                if one.key[0] not in self._excluded:
                    self._blocked.setdefault(one.key, cause)
        return cause

    def _cause(self, unit: Sequence[PendingOperation]) -> Cause | None:
        if any(one.key[0] in self._excluded for one in unit):
            return Cause.EXCLUDED
        if any(one.seq in self._held for one in unit):
            return Cause.FILE
        return next((self._blocked[one.key] for one in unit if one.key in self._blocked), None)


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


def upload_of(
    storage: Storage,
    excluded: Collection[str],
    *,
    until: int,
    seqs: Sequence[int] | None = None,
    held: Collection[int] = (),
) -> Upload:
    """
    Work out what a session uploads.

    Args:
        storage: The replica's data.
        excluded: The entities that are not uploaded.
        until: Position in the log to end at.
        seqs: Ascending positions to choose from, disregarding *excluded* and *until*. None: all.
        held: The operations that refer to a content which the server does not have yet.
    """
    left_behind: Counter[str] = Counter()
    if seqs is not None:
        excluded = ()
    if not excluded and not held:
        count = storage.pending_count() if seqs is None else len(seqs)
        return Upload(count, leaves_earlier=False, left_behind=left_behind)
    operation_count = 0
    is_any_behind = leaves_earlier = False
    for unit, cause in sifted(storage, Sieve(excluded, held), until=until, seqs=seqs):
        if cause is None:
            operation_count += len(unit)
            leaves_earlier = leaves_earlier or is_any_behind
        else:
            is_any_behind = True
            if cause is Cause.EXCLUDED:
                left_behind.update(one.key[0] for one in unit)
    return Upload(operation_count, leaves_earlier, left_behind)


def sifted(
    storage: Storage, sieve: Sieve, *, until: int, seqs: Sequence[int] | None = None
) -> Iterator[tuple[list[PendingOperation], Cause | None]]:
    """Iterate over pending operations, the members of a commit group together, with why they stay behind."""
    unit: list[PendingOperation] = []
    for pending in storage.pending(until=until) if seqs is None else storage.pending_among(seqs):
        unit.append(pending)
        if len(unit) >= pending.group_size:
            yield unit, sieve.holds_back(unit)
            unit = []
