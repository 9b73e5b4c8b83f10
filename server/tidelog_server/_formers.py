"""
Former ids of a replica: what was settled under them, and is settled under them too.

Copies of one directory share an id until they learn of each other, and use the same
positions of the log for operations of their own. What is settled under a former id
stands in its place there; where the place is another operation's, it stands beside it,
by its nonce. So a copy of an operation is recognized whichever copy of the directory
it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgpack

from tidelog_server._author import FormerIdentity
from tidelog_server._indexes import IndexWrites, twin_key
from tidelog_server._records import FormerSettled, ReplicaState, Settled, with_settled
from tidelog_server._store import Reader


class Formers:
    """
    The former ids of one replica.

    Args:
        identities: The ids.
        user_id: Whose replica it is.
        reader: What the store holds.
    """

    def __init__(self, identities: Sequence[FormerIdentity], user_id: str, reader: Reader) -> None:
        self._identities = identities
        self._user_id = user_id
        self._reader = reader

    def settled(self, nonces: Mapping[int, int]) -> dict[int, Settled]:
        """Return which operations were settled under a former id, given their nonces by seq."""
        found: dict[int, Settled] = {}
        for identity in self._identities:
            seqs = [seq for seq in nonces if 0 < seq <= identity.last_seq and seq not in found]
            standing = self._reader.settled(identity.replica, seqs)
            for seq in seqs:
                one = standing.get(seq)
                if one is not None and one.nonce == nonces[seq]:
                    found[seq] = one
                elif twin := self._reader.index(twin_key(identity.replica, seq, nonces[seq])):
                    found[seq] = Settled._make(msgpack.unpackb(twin))
        return found

    def is_forgotten(self, seq: int) -> bool:
        """Tell whether an operation may have been settled under a former id, with no trace left of how."""
        return any(
            0 < seq <= identity.last_seq
            and (state := self._reader.replica(identity.replica)) is not None
            and state.has_settled(seq)
            and not self._reader.settled(identity.replica, (seq,))
            for identity in self._identities
        )

    def writes(self, settled: Sequence[tuple[int, Settled]]) -> tuple[list[FormerSettled], IndexWrites]:
        """Return what is written so that what is settled, in the order of its seqs, is known under the former ids."""
        records: list[FormerSettled] = []
        twins: IndexWrites = {}
        for identity in self._identities:
            common = [one for one in settled if 0 < one[0] <= identity.last_seq]
            standing = self._reader.settled(identity.replica, [seq for seq, _ in common])
            state = self._reader.replica(identity.replica) or ReplicaState(0, self._user_id, 0, 0, ())
            free = []
            for seq, one in common:
                if not state.has_settled(seq):
                    free.append((seq, one))
                elif seq not in standing or standing[seq].nonce != one.nonce:
                    twins[twin_key(identity.replica, seq, one.nonce)] = msgpack.packb(one)
            if free:
                records.append(FormerSettled(identity.replica, with_settled(state, free), free))
        return records, twins
