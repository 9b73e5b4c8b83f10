"""
Lineage: the ids that a replica has had, and the histories of the server that its states are of.

    reoffers     seq            -> (to be offered again to a server that was put back) object key if it
                                   was applied, nothing if it was refused

A directory that was copied, or put back from a copy, goes on under an id of its own: the
other one may have used the next positions of the log for something else. What is pending
keeps its seq and nonce, and names the former id, so that nothing is applied twice.

A server that was put back from a backup begins a new timeline, whose versions do not
compare with those of the old one. The replica *rebases*: it offers again what the server
has lost, reconciles, and adopts the timeline with the data. Until then, and for what is
pending after it, the server is told that base versions are of the old timeline.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast

import msgpack

from tidelog._environment import put_many
from tidelog._keys import pack_position, unpack_position
from tidelog.v1 import sync_pb2

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbTransaction
    from tidelog_client._meta import Meta

# As many as a server takes. Copies that know of no newer id in common parted long ago.
FORMER_IDENTITIES_MAX: Final = 100

# While a replica rebases, whatever it commits is made on a state of the old timeline.
_EVERYTHING: Final = (1 << 63) - 1


class Lineage:
    """What a replica remembers of its former ids and of the server's histories."""

    def __init__(self, environment: Environment, meta: Meta) -> None:
        self._environment = environment
        self._meta = meta
        self._reoffers = environment.database("reoffers")
        environment.write(self._make_replica_id)

    @property
    def replica_id(self) -> str:
        """The present id. Another process may have changed it."""
        return self._meta.read("replica_id").decode()

    @property
    def is_rebasing(self) -> bool:
        """Whether the server has begun another timeline than the one that the replica's state is of."""
        return bool(self._meta.read("next_timeline"))

    @property
    def epoch(self) -> str:
        """The server's store, as far as the replica knows it; empty before the first contact."""
        return (self._meta.read("next_epoch") or self._meta.read("epoch")).decode()

    def knows_store(self, epoch: str) -> bool:
        """Tell whether the replica is one of this store, or on its way there."""
        return epoch.encode() in {self._meta.read("epoch"), self._meta.read("next_epoch")}

    @property
    def timeline(self) -> str:
        """The server's timeline, as far as the replica knows it; empty before the first contact."""
        return (self._meta.read("next_timeline") or self._meta.read("timeline")).decode()

    def introduce(self, start: sync_pb2.SessionStart, *, first_seq: int, first_kept: int) -> None:
        """
        Say at the start of a session who this is.

        Args:
            start: Gets it.
            first_seq: The oldest operation that may be uploaded. 0: nothing will.
            first_kept: The oldest operation in the log, that may be offered again one day. 0: there is none.
        """
        with self._environment.read() as transaction:
            get = self._meta.get
            start.replica_id = get(transaction, "replica_id").decode()
            start.timeline = (get(transaction, "next_timeline") or get(transaction, "timeline")).decode()
            start.checkpoint = get(transaction, "checkpoint")
            through_seq = unpack_position(get(transaction, "old_bases_through"))
            if through_seq == _EVERYTHING or 0 < first_seq <= through_seq:
                start.old_bases.through_seq = through_seq
                start.old_bases.checkpoint = get(transaction, "old_bases_checkpoint")
                start.old_bases.timeline = get(transaction, "old_bases_timeline").decode()
            newest_seq = unpack_position(get(transaction, "last_seq"))
            formers = self._formers(transaction)[-FORMER_IDENTITIES_MAX:]
            for place, (replica_id, known_seq, settled_seq, nonce) in enumerate(formers, start=1):
                # Until the server's state was taken in under the new id, all is committed on that of the former one.
                is_looked_at = place == len(formers) and get(transaction, "state_lost")
                last_seq = newest_seq if is_looked_at else known_seq
                if first_seq and 0 < first_kept <= last_seq:
                    start.former_identities.add(
                        replica_id=replica_id, last_seq=last_seq, settled_seq=settled_seq, settled_nonce=nonce
                    )

    def note_checkpoint(self, transaction: LmdbTransaction, checkpoint: bytes) -> None:
        """Remember what the server said of its history."""
        if checkpoint:
            self._meta.put(transaction, checkpoint=checkpoint)

    # --- forks ----------------------------------------------------------------

    def fork(self, transaction: LmdbTransaction, *, last_seq: int, newest_settled: tuple[int, int]) -> str:
        """Take a new id, because another copy of the directory goes on under the present one. Returns the former."""
        former = self._meta.get(transaction, "replica_id").decode()
        formers = [*self._formers(transaction), (former, last_seq, *newest_settled)]
        self._meta.put(
            transaction, replica_id=str(uuid.uuid4()).encode(), former_identities=cast("bytes", msgpack.packb(formers))
        )
        return former

    def take_in_state(self, transaction: LmdbTransaction) -> None:
        """Note that the replica has the server's state under its present id, and looks at the former one's no more."""
        formers = self._formers(transaction)
        if formers:
            replica_id, _, settled_seq, nonce = formers[-1]
            formers[-1] = (replica_id, unpack_position(self._meta.get(transaction, "last_seq")), settled_seq, nonce)
            self._meta.put(transaction, former_identities=cast("bytes", msgpack.packb(formers)))

    def _formers(self, transaction: LmdbTransaction) -> list[tuple[str, int, int, int]]:
        """Return id, newest seq, and seq and nonce of the newest settled operation, of each former id."""
        data = self._meta.get(transaction, "former_identities")
        # Replicas of older versions did not note the nonce.
        listed = [(*one, 0) for one in msgpack.unpackb(data)] if data else []
        return [(replica_id, last_seq, settled_seq, nonce) for replica_id, last_seq, settled_seq, nonce, *_ in listed]

    def _make_replica_id(self, transaction: LmdbTransaction) -> None:
        if not self._meta.get(transaction, "replica_id"):
            self._meta.put(transaction, replica_id=str(uuid.uuid4()).encode())

    # --- timelines ------------------------------------------------------------

    def begin_rebase(
        self, transaction: LmdbTransaction, *, epoch: str, timeline: str, lost: Iterable[tuple[int, bytes]]
    ) -> None:
        """
        Note that the server has begun another timeline, or is another one.

        Args:
            transaction: The caller's.
            epoch: The server's store.
            timeline: Its timeline.
            lost: The operations that are settled here and that the server does not know: seq, and object key
                if it was applied, nothing if it was refused.
        """
        get, put = self._meta.get, self._meta.put
        if self._has_old_bases(transaction):
            put(transaction, old_bases_timeline=b"")
        else:
            put(
                transaction,
                old_bases_checkpoint=get(transaction, "checkpoint"),
                old_bases_timeline=get(transaction, "timeline"),
            )
        put_many(transaction, self._reoffers, [(pack_position(seq), key) for seq, key in lost])
        put(
            transaction,
            next_epoch=epoch.encode(),
            next_timeline=timeline.encode(),
            checkpoint=b"",
            old_bases_through=pack_position(_EVERYTHING),
        )

    def _has_old_bases(self, transaction: LmdbTransaction) -> bool:
        """Tell whether operations may be left that were made on a state of a timeline still older."""
        return bool(unpack_position(self._meta.get(transaction, "old_bases_through")))

    def adopt(self, transaction: LmdbTransaction) -> None:
        """Note that the replica's state is of the new timeline from now on."""
        get = self._meta.get
        self._meta.put(
            transaction,
            epoch=get(transaction, "next_epoch"),
            timeline=get(transaction, "next_timeline"),
            next_epoch=b"",
            next_timeline=b"",
            old_bases_through=get(transaction, "last_seq"),
        )

    def forget_old_bases(self, first_seq: int) -> None:
        """Forget which operations were made on an older timeline if none is left from *first_seq* on (0: at all)."""
        through_seq = unpack_position(self._meta.read("old_bases_through"))
        if through_seq and not 0 < first_seq <= through_seq and not self.is_rebasing:
            self._meta.write(old_bases_through=b"", old_bases_checkpoint=b"", old_bases_timeline=b"")

    # --- what is offered again ------------------------------------------------

    def reoffer_count(self, transaction: LmdbTransaction) -> int:
        """Return how many operations are to be offered again."""
        return int(transaction.stat(self._reoffers)["entries"])

    def first_reoffer(self, transaction: LmdbTransaction) -> int:
        """Return the first seq that is to be offered again, 0 if there is none."""
        cursor = transaction.cursor(self._reoffers)
        return unpack_position(cursor.key()) if cursor.first() else 0

    def reoffers(self, transaction: LmdbTransaction, after: int) -> Iterator[int]:
        """Iterate over the seqs above *after* that are to be offered again."""
        cursor = transaction.cursor(self._reoffers)
        if cursor.set_range(pack_position(after + 1)):
            for key in cursor.iternext(keys=True, values=False):
                yield unpack_position(key)

    def waiting(self, transaction: LmdbTransaction) -> Iterator[tuple[int, bytes]]:
        """Iterate over the operations that were applied and are to be offered again: seq and object key."""
        for seq, key in transaction.cursor(self._reoffers):
            if key:
                yield unpack_position(seq), key

    def is_reoffered(self, transaction: LmdbTransaction, seq: int) -> bool:
        """Tell whether an operation is to be offered again."""
        return transaction.get(pack_position(seq), db=self._reoffers) is not None

    def note_reoffered(self, transaction: LmdbTransaction, seq: int) -> bytes | None:
        """
        Note that an operation is not to be offered again, or not any more.

        Returns its object key if it was applied, nothing if it was refused; None if it was not to be offered again.
        """
        return transaction.pop(pack_position(seq), db=self._reoffers)
