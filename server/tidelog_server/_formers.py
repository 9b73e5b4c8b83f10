"""
Former ids of a replica: what was settled under them, and what copies of it settled under others.

Copies of one directory share an id until they learn of each other, and may use the same
positions of the log for operations of their own. So what is settled under a new id is
noted for each former one by its nonce, beside whatever stands in its place there. By
these notes an operation that several copies hold is recognized, whichever sends it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgpack

from tidelog._keys import POSITION_BYTES, pack_position, unpack_position
from tidelog_server._author import FormerIdentity
from tidelog_server._indexes import IndexWrites, twin_key, twins_prefix
from tidelog_server._records import REPLICA_ID_BYTES, ReplicaState, Settled
from tidelog_server._store import Reader


class Formers:
    """
    What is known of a replica's operations under other ids than its present one.

    Args:
        replica: The present id in 16 bytes.
        identities: The former ones.
        reader: What the store holds.
    """

    def __init__(self, replica: bytes, identities: Sequence[FormerIdentity], reader: Reader) -> None:
        self._replica = replica
        self._identities = identities
        self._reader = reader
        self._has_copies = bool(reader.index_range(twins_prefix(replica), b"", 1))
        self._last_seq = max((one.last_seq for one in identities), default=0)

    @property
    def exist(self) -> bool:
        """Whether there may be anything."""
        return self._has_copies or bool(self._identities)

    def concern(self, seq: int) -> bool:
        """Tell whether there may be anything about an operation."""
        return self._has_copies or seq <= self._last_seq

    def settled(self, nonces: Mapping[int, int]) -> dict[int, Settled]:
        """Return which operations were settled under another id, given their nonces by seq."""
        return {seq: one for seq, nonce in nonces.items() if (one := self._settled(seq, nonce)) is not None}

    def is_forgotten(self, seq: int) -> bool:
        """Tell whether an operation may have been settled under a former id, with no trace left of how."""
        return any(
            seq <= _forgotten_through(self._reader, replica) for replica in (self._replica, *self._formers_of(seq))
        ) or any(
            (state := self._reader.replica(former)) is not None
            and state.has_settled(seq)
            and not self._reader.settled(former, (seq,))
            for former in self._formers_of(seq)
        )

    def notes(self, settled: Sequence[tuple[int, Settled]]) -> IndexWrites:
        """Return what is written so that what is settled now is recognized under the former ids."""
        return {
            twin_key(former, seq, one.nonce): msgpack.packb(one)
            for seq, one in settled
            for former in self._formers_of(seq)
        }

    def _settled(self, seq: int, nonce: int) -> Settled | None:
        for former in self._formers_of(seq):
            one = self._reader.settled(former, (seq,)).get(seq)
            if one is not None and one.nonce == nonce:
                return one
        for replica in (self._replica, *self._formers_of(seq)):
            twin = self._reader.index(twin_key(replica, seq, nonce))
            if twin is not None:
                return Settled._make(msgpack.unpackb(twin))
        return None

    def _formers_of(self, seq: int) -> Iterator[bytes]:
        return (identity.replica for identity in self._identities if 0 < seq <= identity.last_seq)


def common_seqs(reader: Reader, known: ReplicaState, formers: Sequence[FormerIdentity]) -> dict[bytes, int]:
    """
    Return up to where what is settled under former ids of a replica is surely of its own log.

    Copies of a log part for good, and each uploads under an id only on top of what it has itself. So
    where one operation is the same, all before it are. The operation may be forgotten later: what was
    found out is noted with the replica, and holds for those that went by its id before them.
    """
    states = {former.replica: reader.replica(former.replica) for former in formers}
    noted: dict[bytes, int] = {}
    for state in (known, *filter(None, states.values())):
        for replica, seq in state.common_seqs:
            noted[replica] = max(seq, noted.get(replica, 0))
    for replica, _last_seq, seq, nonce in formers:
        settled = states[replica]
        if settled is not None and nonce and _nonce_at(reader, replica, settled, seq) == nonce:
            noted[replica] = max(seq, noted.get(replica, 0))
    return {replica: noted[replica] for replica in states if replica in noted}


def _nonce_at(reader: Reader, replica: bytes, state: ReplicaState, seq: int) -> int | None:
    if seq == state.newest_seq:
        return state.newest_nonce
    settled = reader.settled(replica, (seq,)).get(seq)
    return settled.nonce if settled is not None else None


class Note(NamedTuple):
    """
    What a copy of a replica noted of an operation.

    Attributes:
        replica: The replica in 16 bytes.
        seq: The operation's place in its log.
        settled: What became of it.
    """

    replica: bytes
    seq: int
    settled: Settled


def read_note(key: bytes, value: bytes) -> Note | None:
    """Return what a copy noted under a key of the table of indexes, or None if that is none."""
    try:
        one = Settled._make(msgpack.unpackb(value))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    note = Note(key[1 : 1 + REPLICA_ID_BYTES], unpack_position(key[1 + REPLICA_ID_BYTES : -POSITION_BYTES]), one)
    return note if key == twin_key(note.replica, note.seq, one.nonce) else None


def is_note_of_forgotten(key: bytes, value: bytes) -> bool:
    """Tell whether an entry says up to which seq the notes about a replica are forgotten."""
    return len(key) == 1 + REPLICA_ID_BYTES and len(value) == POSITION_BYTES


def without_notes(reader: Reader, notes: Iterable[Note]) -> IndexWrites:
    """Return what is written to forget notes: who repeats what they were about is told that nobody knows any more."""
    removed: IndexWrites = {}
    through: dict[bytes, int] = {}
    for replica, seq, settled in notes:
        removed[twin_key(replica, seq, settled.nonce)] = None
        through[replica] = max(seq, through.get(replica, 0), _forgotten_through(reader, replica))
    return removed | {twins_prefix(replica): pack_position(seq) for replica, seq in through.items()}


def _forgotten_through(reader: Reader, replica: bytes) -> int:
    noted = reader.index(twins_prefix(replica))
    return unpack_position(noted) if noted is not None else 0
