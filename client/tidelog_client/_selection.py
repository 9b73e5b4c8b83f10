"""
What a synchronization of mode selected covers.

The uploads are closed under what they need: earlier pending operations on the same
object, whole commit groups, and pending creations of referenced objects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tidelog._keys import ObjectKey, pack_object_key
from tidelog._operation import OperationKind, decode_operation
from tidelog._schema import Schema
from tidelog_client._report import Report, Skipped, SkipReason

if TYPE_CHECKING:
    from tidelog._environment import LmdbTransaction
    from tidelog_client._storage import PendingOperation, Storage


class Selection(NamedTuple):
    """
    What a synchronization of mode selected covers.

    Attributes:
        keys: The objects to be downloaded: those selected, and those that the closure added.
        seqs: The operations to be uploaded, ascending.
        leaves_earlier: Whether pending operations with lower seqs stay behind.
    """

    keys: Sequence[ObjectKey]
    seqs: Sequence[int]
    leaves_earlier: bool


def select(storage: Storage, schema: Schema, selected: dict[ObjectKey, bool], report: Report) -> Selection:
    """
    Work out what a selection covers.

    Args:
        storage: The replica's data.
        schema: Whose references are followed.
        selected: By key, whether the program holds the object as new, never committed.
        report: Takes what cannot be selected as skipped, and what the closure adds as added.
    """
    with storage.environment.read() as transaction:
        closure = _Closure(storage, transaction, schema)
        for key, is_new in selected.items():
            skipped = closure.why_not(key, is_new=is_new)
            if skipped is not None:
                report.skipped.append(skipped)
            else:
                closure.add(key)
        named = set(closure.keys)
        closure.complete()
        report.added.extend(key for key in closure.keys if key not in named)
        seqs = sorted(closure.seqs)
        return Selection(list(closure.keys), seqs, leaves_earlier=closure.leaves_earlier())


class _Closure:
    def __init__(self, storage: Storage, transaction: LmdbTransaction, schema: Schema) -> None:
        self._storage = storage
        self._transaction = transaction
        self._schema = schema
        self._never = storage.never(transaction)
        self.keys: dict[ObjectKey, None] = {}
        self.seqs: set[int] = set()
        # Objects whose pending operations are needed up to a seq (None: all of them).
        self._needed: deque[tuple[ObjectKey, int | None]] = deque()
        # What was looked at already, so that nothing is twice: how far an object's operations were taken in,
        # commit groups by their first seq, and the newest pending creation of objects referred to.
        self._taken_until: dict[ObjectKey, int] = {}
        self._groups: set[int] = set()
        self._creations: dict[ObjectKey, int] = {}

    def why_not(self, key: ObjectKey, *, is_new: bool) -> Skipped | None:
        """Return why an object cannot be selected, or None if it can."""
        if is_new:
            return Skipped(*key, SkipReason.UNCOMMITTED, "the object was never committed")
        packed = pack_object_key(*key)
        if self._storage.view.get(self._transaction, packed) is not None:
            return None
        # Where nothing else uploads an entity, a selection must be able to upload deletions too.
        if any(True for _ in self._pending_of(key)) and key[0] not in self._never:
            return Skipped(*key, SkipReason.DELETED, "the object is deleted here, and its deletion is pending")
        # Unknown here is no reason: it may be on the server, and selecting it fetches it.
        return None

    def add(self, key: ObjectKey) -> None:
        """Take in an object with all its pending operations."""
        self.keys[key] = None
        self._needed.append((key, None))

    def complete(self) -> None:
        """Take in what the operations taken in so far need."""
        while self._needed:
            key, until = self._needed.popleft()
            if until is not None and until <= self._taken_until.get(key, 0):
                continue
            for one in self._pending_of(key):
                if until is not None and one.seq > until:
                    break
                if one.seq not in self.seqs:
                    self.seqs.add(one.seq)
                    self.keys[key] = None
                    self._needed.extend(self._needs(one))
                self._taken_until[key] = one.seq

    def leaves_earlier(self) -> bool:
        """Tell whether operations stay behind that came before some that are taken in."""
        if not self.seqs:
            return False
        return self._storage.has_other_pending(self._transaction, self.seqs, below=max(self.seqs))

    def _needs(self, one: PendingOperation) -> Iterator[tuple[ObjectKey, int]]:
        first = one.seq - one.group_position
        if first not in self._groups:
            self._groups.add(first)
            members = [
                self._storage.pending_at(self._transaction, seq) for seq in range(first, first + one.group_size)
            ]
            yield from {member.key: member.seq for member in members if member is not None}.items()
        data = self._storage.log.get(self._transaction, one.seq)
        if data is None or not self._schema.references(one.key[0]):
            return
        patch = decode_operation(data).decoded_patch()
        for _attribute, target in self._schema.referenced(one.key[0], {**patch.set, **patch.add}):
            if target not in self._creations:
                self._creations[target] = self._last_creation(target)
            creation = self._creations[target]
            if creation:
                yield target, creation

    def _last_creation(self, key: ObjectKey) -> int:
        """Return the seq of the newest pending creation of an object, 0 if there is none."""
        for pending in reversed(self._pending_of(key)):
            data = self._storage.log.get(self._transaction, pending.seq)
            if data is not None and decode_operation(data).kind is OperationKind.CREATE:
                return pending.seq
        return 0

    def _pending_of(self, key: ObjectKey) -> list[PendingOperation]:
        return self._storage.pending_of(self._transaction, pack_object_key(*key))
