"""
Records: what a store holds, as plain values.

Every store keeps the same records; how it spells them in bytes or columns is its
own business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from tidelog._keys import ObjectKey
from tidelog._operation import OperationKind

REPLICA_ID_BYTES: Final = 16
# Greater than any version or seq.
MAX_POSITION: Final = 1 << 63
COMMIT_ID_BYTES: Final = 8
RUN_BYTES: Final = 16

# The writer of what no replica wrote: the service itself.
NO_REPLICA: Final = bytes(REPLICA_ID_BYTES)

_NO_ENTRIES: Final[Mapping[bytes, bytes | None]] = MappingProxyType({})
_NO_TOMBSTONES: Final[Mapping[ObjectKey, int]] = MappingProxyType({})


class ObjectState(NamedTuple):
    """
    An object as it is, or the tombstone of one that was deleted.

    Attributes:
        version: Version of the change that led here.
        created: Version at which its present incarnation began.
        creator: Id of the replica that created the incarnation.
        deleted: Whether this is a tombstone.
        sole_writer: Whether nobody but the creator ever wrote to it, hooks
            included, and the creator's own operations say what it holds.
        attributes: Encoded attributes; empty for a tombstone.
    """

    version: int
    created: int
    creator: bytes
    deleted: bool
    sole_writer: bool
    attributes: bytes


class Change(NamedTuple):
    """
    One applied change in the change log.

    Attributes:
        version: Its place in the tenant's history.
        key: Key of the object.
        kind: What it did.
        patch: What it did to the attributes, encoded; empty for a deletion.
        before: What it replaced: for an update the encoded list [values that
            were there by attribute, attributes that were not], for a deletion
            the encoded attributes, for a creation nothing.
        previous: Version of the change to the same object before this one. 0: none.
        replica: Id of the replica whose operation caused it.
        seq: Seq of that operation.
        by_hook: Whether a hook made the change while that operation was applied.
        user_id: The principal it is attributed to.
        time_us: The server's clock in microseconds since 1970. Information only.
        failure: Id of the synchronization failure whose retry made it; empty otherwise.
        new_names: The names that a migration gave to attributes, by their former ones.
            None: no migration made the change.
        moved_from: Version of the deletion by which a migration took the object away
            from its former key, to create it under this one. 0: it did not.
        former_version: Version of the operation that caused it before the store was put
            back from a backup, if it was applied anew since. 0: it was not.
        former_timeline: The timeline that this version is of; empty: it is not known.
    """

    version: int
    key: ObjectKey
    kind: OperationKind
    patch: bytes
    before: bytes
    previous: int
    replica: bytes
    seq: int
    by_hook: bool
    user_id: str
    time_us: int
    failure: bytes = b""
    new_names: Mapping[str, str] | None = None
    moved_from: int = 0
    former_version: int = 0
    former_timeline: str = ""


class Settled(NamedTuple):
    """
    What became of an operation, for good.

    Attributes:
        nonce: The operation's nonce.
        version: The version it was applied at; 0 if it was refused.
        changed_by_server: Whether more of its object changed than it said.
        failure_id: The failure's id in 16 bytes; empty if it was applied.
        culprit: Whether the failure is about this operation itself, not about
            another one of its commit group.
    """

    nonce: int
    version: int
    changed_by_server: bool
    failure_id: bytes
    culprit: bool


class ReplicaState(NamedTuple):
    """
    What the server knows of a replica.

    Attributes:
        session_number: Number of its newest uploading session.
        user_id: The principal it belongs to.
        newest_seq: Its newest settled operation. 0: none.
        newest_nonce: That operation's nonce.
        settled_ranges: Ranges (first, last) of settled seqs, ascending.
        heard_us: The server's clock when the replica last began to upload. 0: not known.
        retired: Whether it was away for so long that what became of its operations is forgotten.
        common_seqs: Up to where what is settled under former ids is surely of its own log, by these ids.
    """

    session_number: int
    user_id: str
    newest_seq: int
    newest_nonce: int
    settled_ranges: tuple[tuple[int, int], ...]
    heard_us: int = 0
    retired: bool = False
    common_seqs: tuple[tuple[bytes, int], ...] = ()

    @property
    def watermark(self) -> int:
        """The seq up to which everything is settled."""
        return self.settled_ranges[0][1] if self.settled_ranges and self.settled_ranges[0][0] == 1 else 0

    def has_settled(self, seq: int) -> bool:
        """Tell whether an operation is settled, also if nobody knows any more how."""
        place = bisect_right(self.settled_ranges, (seq, MAX_POSITION)) - 1
        return place >= 0 and seq <= self.settled_ranges[place][1]


class Head(NamedTuple):
    """
    Where a tenant's history stands.

    Attributes:
        version: Newest version. 0: nothing was ever applied.
        commit_id: Random id of the commit that ended at it.
    """

    version: int
    commit_id: bytes


class Identity(NamedTuple):
    """
    Which store this is.

    Attributes:
        epoch: Names the store.
        timeline: Names the run of its history since it was made or last restored.
    """

    epoch: str
    timeline: str


class FailureRecord(NamedTuple):
    """
    A synchronization failure on its way into a store.

    Attributes:
        id: Its id in 16 bytes.
        data: The serialized `tidelog.v1.SynchronizationFailure`.
        replica: Id of the replica that sent the operation.
        refused_creations: Keys of the objects that were not created because of it.
    """

    id: bytes
    data: bytes
    replica: bytes
    refused_creations: tuple[ObjectKey, ...]


class Forgotten(NamedTuple):
    """
    What goes for good.

    Attributes:
        version: The highest version that is collected after this, never lower than before:
            changes up to it go, and the ids of commits below it.
        tombstones: Keys of tombstones, with their versions.
        settled: Outcomes, by replica and seq.
        refused_creations: What is known of creations that were refused, by replica and key.
    """

    version: int = 0
    tombstones: Mapping[ObjectKey, int] = _NO_TOMBSTONES
    settled: Sequence[tuple[bytes, int]] = ()
    refused_creations: Sequence[tuple[bytes, ObjectKey]] = ()


class Writes(NamedTuple):
    """
    What one batch writes: all of it in one transaction, or none.

    Attributes:
        objects: New states, with the version of the state they replace (0: none).
        changes: New changes, in version order without gaps.
        replica: Id and new state of the replica, or None to leave it.
        settled: Outcomes of the replica's operations by seq.
        failures: Failures, new ones and those that changed.
        version: The tenant's newest version after this.
        index_entries: What changes in the table of indexes: new values by key, None to remove.
        timeline: The timeline that the whole store begins with this; empty: it goes on.
        forgotten: What goes for good.
    """

    objects: dict[ObjectKey, tuple[ObjectState, int]]
    changes: list[Change]
    replica: tuple[bytes, ReplicaState] | None
    settled: list[tuple[int, Settled]]
    failures: list[FailureRecord]
    version: int
    index_entries: Mapping[bytes, bytes | None] = _NO_ENTRIES
    timeline: str = ""
    forgotten: Forgotten = Forgotten()


def merged_ranges(ranges: tuple[tuple[int, int], ...], seqs: list[int]) -> tuple[tuple[int, int], ...]:
    """Return *ranges* with ascending *seqs* added: ascending, neither overlapping nor adjacent."""
    if not seqs:
        return ranges
    if seqs[-1] - seqs[0] == len(seqs) - 1 and (not ranges or seqs[0] > ranges[-1][1]):
        # The ordinary case: a run of new operations at the end.
        if ranges and ranges[-1][1] == seqs[0] - 1:
            return (*ranges[:-1], (ranges[-1][0], seqs[-1]))
        return (*ranges, (seqs[0], seqs[-1]))
    merged: list[tuple[int, int]] = []
    for first, last in sorted([*ranges, *((seq, seq) for seq in seqs)]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def with_settled(known: ReplicaState, settled: Sequence[tuple[int, Settled]]) -> ReplicaState:
    """Return a replica's state with what was settled, in the order of its seqs."""
    newest_seq, newest = settled[-1]
    newest_nonce = newest.nonce
    if newest_seq <= known.newest_seq:
        newest_seq, newest_nonce = known.newest_seq, known.newest_nonce
    ranges = merged_ranges(known.settled_ranges, [seq for seq, _ in settled])
    return known._replace(newest_seq=newest_seq, newest_nonce=newest_nonce, settled_ranges=ranges)
