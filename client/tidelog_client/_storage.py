"""
Storage: the replica's data on disk.

    log          seq            -> the operation, as the wire carries it
    pending      seq            -> place in its commit group, object key
    outcomes     seq            -> what became of a settled operation
    failures     failure id     -> serialized SynchronizationFailure
    meta         replica id, last seq, cursor, epoch, ...

and the view (see `_view`) with what is on its way into it (see `_publication`), and the
files that all this refers to (see `_files`). What belongs together changes in one
transaction: log and view, outcome and view, cursor and the data that it stands for.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import uuid_utils
from google.protobuf.message import DecodeError

from tidelog._clock import Clock, system_time_us
from tidelog._downloads import DownloadMode
from tidelog._environment import Environment, put_many
from tidelog._errors import InvalidValue, LogCorrupt, damaged
from tidelog._keys import (
    POSITION_BYTES,
    ObjectKey,
    pack_object_key,
    pack_position,
    unpack_object_key,
    unpack_position,
)
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._log import OperationLog
from tidelog._operation import Operation, decode_operation
from tidelog.v1 import failure_pb2, operation_pb2, sync_pb2
from tidelog_client._files import Files
from tidelog_client._lineage import Lineage
from tidelog_client._meta import Meta
from tidelog_client._plans import Plans
from tidelog_client._publication import Publication
from tidelog_client._view import View, ViewRecord

if TYPE_CHECKING:
    from tidelog._environment import LmdbTransaction
    from tidelog_client._upload import Sieve

FORMAT: Final = "tidelog-replica-1"

READ_PAGE_ENTRIES: Final = 500

_PLACE: Final = struct.Struct(">HH")  # of a pending operation in its commit group: position, size
_NO_GROUP: Final = _PLACE.pack(0, 0)

_SEQ_MAX: Final = 1 << 63

_APPLIED: Final = b"\x01"
_FAILED: Final = b"\x02"


class PendingOperation(NamedTuple):
    """An operation to be sent: its seq, its place in its commit group (size 0: none), its object."""

    seq: int
    group_position: int
    group_size: int
    key: ObjectKey


class Reoffer(NamedTuple):
    """A settled operation that is offered again: its seq, its bytes, and the serialized `FormerOutcome`."""

    seq: int
    data: bytes
    former_outcome: bytes


class Outcome(NamedTuple):
    """What became of an operation: applied at a version, or refused with a failure id."""

    version: int
    failure_id: str


class SettledCounts(NamedTuple):
    """
    What a set of results brought.

    Attributes:
        applied: How many pending operations were applied.
        rejected: How many operations the failures are about, settled again or not.
        reoffered: How many operations were settled again.
        failures: The failures that the replica did not have.
    """

    applied: int
    rejected: int
    reoffered: int
    failures: list[failure_pb2.SynchronizationFailure]


class Storage:
    """
    A replica directory. Safe to use from many threads and from several processes.

    Attributes:
        clock: The device's clock.
    """

    def __init__(self, path: Path, *, relaxed: bool, map_bytes: int, clock: Clock = system_time_us) -> None:
        self.clock = clock
        self.environment = Environment.open(path, format_name=FORMAT, relaxed=relaxed, map_bytes=map_bytes)
        try:
            self.log = OperationLog(self.environment)
            self.view = View(self.environment, self.log)
            self.files = Files(self.environment, self.view, clock)
            database = self.environment.database
            self._pending = database("pending")
            self._outcomes = database("outcomes")
            self._failures = database("failures")
            self._meta = Meta(self.environment)
            self.lineage = Lineage(self.environment, self._meta)
            self.publication = Publication(self.environment, self.view, self._meta, self.lineage)
        except BaseException:
            self.environment.close()
            raise

    def close(self) -> None:
        """Close the directory."""
        self.environment.close()

    # --- meta -----------------------------------------------------------------

    def meta(self, name: str) -> bytes:
        """Return a remembered value; empty if there is none."""
        return self._meta.read(name)

    def set_meta(self, **values: bytes) -> None:
        """Remember values."""
        self._meta.write(**values)

    def last_seq(self, transaction: LmdbTransaction) -> int:
        """Return the position of the newest operation ever logged, 0 if there is none."""
        return unpack_position(self._meta.get(transaction, "last_seq"))

    def first_unsettled(self, transaction: LmdbTransaction) -> int:
        """Return the oldest operation that is pending or to be offered again, 0 if there is none."""
        cursor = transaction.cursor(self._pending)
        first = unpack_position(cursor.key()) if cursor.first() else 0
        return min(filter(None, (first, self.lineage.first_reoffer(transaction))), default=0)

    def has_reoffers(self) -> bool:
        """Tell whether operations are to be offered again."""
        with self.environment.read() as transaction:
            return self.lineage.reoffer_count(transaction) > 0

    def never(self, transaction: LmdbTransaction) -> set[str]:
        """Return the entities of which the server said that they are neither uploaded nor downloaded."""
        return set(Plans.decode(self._meta.get(transaction, "plans")).in_mode(DownloadMode.NEVER))

    # --- reading --------------------------------------------------------------

    def pending(self, *, after: int = 0, until: int | None = None) -> Iterator[PendingOperation]:
        """Iterate over the pending operations with *after* < seq <= *until* in log order, page by page."""
        position = after
        while True:
            page: list[PendingOperation] = []
            with self.environment.read() as transaction:
                cursor = transaction.cursor(self._pending)
                found = cursor.set_range(pack_position(position + 1))
                while found and len(page) < READ_PAGE_ENTRIES:
                    key, value = cursor.item()
                    seq = unpack_position(key)
                    if until is not None and seq > until:
                        break
                    page.append(unpack_pending(seq, value))
                    found = cursor.next()
            yield from page
            if len(page) < READ_PAGE_ENTRIES:
                return
            position = page[-1].seq

    def pending_among(self, seqs: Sequence[int]) -> Iterator[PendingOperation]:
        """Iterate over the pending operations at some positions, in their order."""
        for first in range(0, len(seqs), READ_PAGE_ENTRIES):
            with self.environment.read() as transaction:
                page = [self.pending_at(transaction, seq) for seq in seqs[first : first + READ_PAGE_ENTRIES]]
            yield from filter(None, page)

    def upload_batch(
        self,
        *,
        after: int,
        until: int,
        seqs: Sequence[int] | None,
        sieve: Sieve | None,
        count_max: int,
        bytes_max: int,
    ) -> list[tuple[int, bytes]]:
        """
        Return the next pending operations, (seq, serialized) in log order, empty at the end.

        A commit group is whole; it, or a single operation, may alone exceed the bounds.

        Args:
            after: Position to start above.
            until: Position to end at.
            seqs: Ascending positions to choose from, disregarding *until*. None: all.
            sieve: Decides what stays behind. None: nothing does.
            count_max: How many operations at the most.
            bytes_max: How many bytes at the most.

        Raises:
            LogCorrupt: The log lacks one of them, or it fails its check.
        """
        batch: list[tuple[int, bytes]] = []
        batch_bytes = 0
        with self.environment.read() as transaction:
            for places in _units(self._places(transaction, after, until, seqs)):
                if sieve is not None and sieve.holds_back([unpack_pending(*place) for place in places]):
                    continue
                unit: list[tuple[int, bytes]] = []
                unit_bytes = 0
                for seq, _ in places:
                    data = self.log.get(transaction, seq)
                    if data is None:
                        raise LogCorrupt(f"the pending operation at seq {seq} is not in the log", seq=seq)
                    unit.append((seq, data))
                    unit_bytes += len(data)
                if batch and (len(batch) + len(unit) > count_max or batch_bytes + unit_bytes > bytes_max):
                    break
                batch += unit
                batch_bytes += unit_bytes
        return batch

    def _places(
        self, transaction: LmdbTransaction, after: int, until: int, seqs: Sequence[int] | None
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (seq, what is noted of it) of pending operations, from *seqs* or all up to *until*."""
        if seqs is None:
            cursor = transaction.cursor(self._pending)
            if cursor.set_range(pack_position(after + 1)):
                for key, value in cursor:
                    seq = unpack_position(key)
                    if seq > until:
                        return
                    yield seq, value
            return
        for seq in islice(seqs, bisect_right(seqs, after), None):
            place = transaction.get(pack_position(seq), db=self._pending)
            if place is not None:
                yield seq, place

    def pending_of(self, transaction: LmdbTransaction, key: bytes) -> list[PendingOperation]:
        """Return the pending operations on one object in log order."""
        found = []
        for seq, version in self.view.unconfirmed(transaction, key):
            if version == 0:
                value = transaction.get(pack_position(seq), db=self._pending)
                if value is not None:
                    found.append(unpack_pending(seq, value))
        return found

    def pending_at(self, transaction: LmdbTransaction, seq: int) -> PendingOperation | None:
        """Return the pending operation at *seq*, or None if it is settled."""
        value = transaction.get(pack_position(seq), db=self._pending)
        return None if value is None else unpack_pending(seq, value)

    def has_other_pending(self, transaction: LmdbTransaction, seqs: Container[int], *, below: int) -> bool:
        """Tell whether operations below a seq are pending that are not among *seqs*."""
        cursor = transaction.cursor(self._pending)
        for key in cursor.iternext(keys=True, values=False):
            seq = unpack_position(key)
            if seq >= below:
                return False
            if seq not in seqs:
                return True
        return False

    def pending_count(self) -> int:
        """Return how many operations are pending."""
        with self.environment.read() as transaction:
            return int(transaction.stat(self._pending)["entries"])

    def outcome(self, transaction: LmdbTransaction, seq: int) -> Outcome | None:
        """Return what became of an operation, or None while it is pending (or forgotten)."""
        value = transaction.get(pack_position(seq), db=self._outcomes)
        return None if value is None else unpack_outcome(value)

    def failure(self, failure_id: str) -> failure_pb2.SynchronizationFailure | None:
        """Return a recorded failure, or None."""
        with self.environment.read() as transaction:
            value = transaction.get(failure_id.encode(), db=self._failures)
        return None if value is None else _unpack_failure(value)

    def failures(self) -> Iterator[failure_pb2.SynchronizationFailure]:
        """Iterate over the recorded failures, oldest first."""
        start = b""
        while True:
            with self.environment.read() as transaction:
                cursor = transaction.cursor(self._failures)
                found = cursor.set_range(start) if start else cursor.first()
                page: list[tuple[bytes, bytes]] = []
                room_bytes = PAGE_BYTES_MAX
                while found and len(page) < READ_PAGE_ENTRIES and room_bytes > 0:
                    page.append(cursor.item())
                    room_bytes -= len(page[-1][1])
                    found = cursor.next()
            for _key, value in page:
                yield _unpack_failure(value)
            if not page:
                return
            start = page[-1][0] + b"\0"

    # --- local commits --------------------------------------------------------

    def write_commit(
        self,
        transaction: LmdbTransaction,
        operations: Sequence[Operation],
        encoded: Sequence[bytes],
        changes: dict[bytes, tuple[ViewRecord | None, ViewRecord | None]],
    ) -> None:
        """
        Append operations and show them.

        Args:
            transaction: The commit's.
            operations: The operations, with the next positions of the log.
            encoded: Their bytes.
            changes: For each object, its record before and after all of them.
        """
        pending = []
        keyed = []
        for operation in operations:
            key = pack_object_key(operation.entity, operation.id)
            group = operation.group
            place = _PLACE.pack(group.position, group.size) if group is not None else _NO_GROUP
            pending.append((pack_position(operation.seq), place + key))
            keyed.append((key, operation.seq))
        entries = list(zip((one.seq for one in operations), encoded, strict=True))
        self.log.append(transaction, entries)
        self.files.note_operations(transaction, entries)
        put_many(transaction, self._pending, pending)
        self.view.write_commit(transaction, keyed, changes)
        self._meta.put(transaction, last_seq=pack_position(operations[-1].seq))

    # --- settling -------------------------------------------------------------

    def settle(self, results: Sequence[operation_pb2.OperationResult], checkpoint: bytes) -> SettledCounts:
        """
        Take in final results in one transaction, with the checkpoint that came with them.

        What was settled before is passed over, unless it was to be offered again. Refused
        operations leave the view; their failure records are kept with the payload.
        """
        return self.environment.write(lambda transaction: self._settle(transaction, results, checkpoint))

    def _settle(
        self, transaction: LmdbTransaction, results: Sequence[operation_pb2.OperationResult], checkpoint: bytes
    ) -> SettledCounts:
        outcomes = []
        applied: list[tuple[bytes, int, int]] = []
        refused: dict[str, list[tuple[operation_pb2.OperationResult, bytes]]] = {}
        reoffered_count = 0
        again: dict[str, list[tuple[operation_pb2.OperationResult, bytes]]] = {}
        # Of what is settled again, what waited for it in the view.
        shown: list[tuple[bytes, int, int]] = []
        taken_back: list[tuple[bytes, int]] = []
        self.lineage.note_checkpoint(transaction, checkpoint)
        any_files = self.files.any_uploads(transaction)
        for result in results:
            position = pack_position(result.seq)
            value = transaction.pop(position, db=self._pending)
            if any_files:
                is_applied = result.status == operation_pb2.OPERATION_STATUS_APPLIED
                self.files.settle_operation(transaction, result.seq, applied=is_applied)
            if value is None:
                key = self.lineage.note_reoffered(transaction, result.seq)
                if key is not None:
                    # Otherwise the view gets what became of it with the download of the new timeline.
                    if key and self.view.is_open(transaction, key, result.seq):
                        if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
                            shown.append((key, result.seq, result.version))
                        else:
                            taken_back.append((key, result.seq))
                    reoffered_count += 1
                    self._forget_failure(transaction, result)
                    outcomes.append((position, _packed_outcome(result)))
                    if result.failure_id and transaction.get(result.failure_id.encode(), db=self._failures) is None:
                        again.setdefault(result.failure_id, []).append(
                            (result, key or self._logged_key(transaction, result.seq))
                        )
                continue
            key = value[_PLACE.size :]
            outcomes.append((position, _packed_outcome(result)))
            if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
                applied.append((key, result.seq, result.version))
            else:
                refused.setdefault(result.failure_id, []).append((result, key))
        put_many(transaction, self._outcomes, outcomes)
        self.view.settle_applied(transaction, [*applied, *shown], rebasing=self.lineage.is_rebasing)
        members = [member for group in refused.values() for member in group]
        self.view.settle_refused(transaction, [*((key, result.seq) for result, key in members), *taken_back])
        groups = [*refused.values(), *again.values()]
        failures = [self._record_failure(transaction, group) for group in groups]
        self._note_newest_settled(transaction, max((result.seq for result in results), default=0))
        return SettledCounts(len(applied), sum(map(len, groups)), reoffered_count, failures)

    def _forget_failure(self, transaction: LmdbTransaction, result: operation_pb2.OperationResult) -> None:
        """Forget the failure that an operation was until now, if something else has become of it."""
        former = self.outcome(transaction, result.seq)
        if former is not None and former.failure_id not in {"", result.failure_id}:
            transaction.delete(former.failure_id.encode(), db=self._failures)

    def _logged_key(self, transaction: LmdbTransaction, seq: int) -> bytes:
        return pack_object_key(*decode_operation(self.log.get(transaction, seq) or b"").key)

    def _note_newest_settled(self, transaction: LmdbTransaction, seq: int) -> None:
        """Remember the newest settled operation's seq and nonce: they outlive its entry in the log."""
        data = self.log.get(transaction, seq) if seq > self.newest_settled(transaction)[0] else None
        if data is not None:
            nonce = decode_operation(data).nonce
            self._meta.put(transaction, newest_settled=pack_position(seq) + pack_position(nonce))

    def newest_settled(self, transaction: LmdbTransaction) -> tuple[int, int]:
        """Return (seq, nonce) of the newest operation that was settled, zeros if none was."""
        value = self._meta.get(transaction, "newest_settled")
        return unpack_position(value[:POSITION_BYTES]), unpack_position(value[POSITION_BYTES:])

    def _record_failure(
        self, transaction: LmdbTransaction, members: list[tuple[operation_pb2.OperationResult, bytes]]
    ) -> failure_pb2.SynchronizationFailure:
        """Keep one failure, of one operation or of the members of a commit group."""
        culprit, key = next(
            (member for member in members if member[0].reason != operation_pb2.FAILURE_REASON_GROUP_REJECTED),
            members[0],
        )
        entity, object_id = unpack_object_key(key)
        payloads = [self.log.get(transaction, result.seq) or b"" for result, _ in members]
        failure = failure_pb2.SynchronizationFailure(
            id=culprit.failure_id,
            replica_id=self.lineage.replica_id,
            entity=entity,
            object_id=object_id,
            reason=culprit.reason,
            message=culprit.message,
            code=culprit.code,
            operation=self.log.get(transaction, culprit.seq) or b"",
            group_operations=payloads if len(payloads) > 1 else [],
            status=failure_pb2.FAILURE_STATUS_OPEN,
        )
        failure.create_time.FromMicroseconds(self.clock())
        transaction.put(failure.id.encode(), failure.SerializeToString(), db=self._failures)
        return failure

    # --- forks and rebases ----------------------------------------------------

    def fork(self) -> str:
        """Go on under another replica id, and have all states sent again. Returns the former id."""

        def work(transaction: LmdbTransaction) -> str:
            former = self.lineage.fork(
                transaction,
                last_seq=self.last_seq(transaction),
                newest_settled=self.newest_settled(transaction),
            )
            self.publication.forget_states(transaction)
            return former

        return self.environment.write(work)

    def begin_rebase(self, *, epoch: str, timeline: str, settled_ranges: Sequence[tuple[int, int]]) -> int:
        """
        Prepare for a server that has begun another timeline, or is another one.

        What is settled here and not among what it has settled is to be offered again.
        Returns how many operations that are.
        """

        def work(transaction: LmdbTransaction) -> int:
            lost = list(self._settled_outside(transaction, settled_ranges))
            keys = [self._logged_key(transaction, seq) if is_applied else b"" for seq, is_applied in lost]
            seqs = [seq for seq, _ in lost]
            self.lineage.begin_rebase(
                transaction, epoch=epoch, timeline=timeline, lost=list(zip(seqs, keys, strict=True))
            )
            self.files.note_operations(transaction, ((seq, self.log.get(transaction, seq) or b"") for seq in seqs))
            self.publication.forget_states(transaction)
            return self.lineage.reoffer_count(transaction)

        return self.environment.write(work)

    def _settled_outside(
        self, transaction: LmdbTransaction, ranges: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, bool]]:
        """Yield the seqs of what is settled here and not in some ranges, with whether it was applied."""
        # Of what was set aside nothing is left to be offered.
        set_aside = self._meta.positions(transaction, "set_aside")
        for key, value in transaction.cursor(self._outcomes):
            seq = unpack_position(key)
            if not _is_among(seq, ranges) and seq not in set_aside:
                yield seq, not unpack_outcome(value).failure_id

    def keep_settled(self, formers: Sequence[sync_pb2.FormerSettled]) -> int:
        """
        Offer nothing again that a server still has as it was settled under a former id.

        It may have forgotten by now what became of it, and could only refuse it.

        Args:
            formers: What is settled under each former id.

        Returns:
            How many operations are not offered again after all.
        """

        def work(transaction: LmdbTransaction) -> int:
            kept: set[int] = set()
            for former in formers:
                ranges = [(one.first, one.last) for one in former.ranges]
                reoffers = self.lineage.reoffers(transaction, 0)
                kept.update(seq for seq in reoffers if seq <= former.common_seq and _is_among(seq, ranges))
            for seq in kept:
                key = self.lineage.note_reoffered(transaction, seq)
                self.files.settle_operation(transaction, seq, applied=bool(key))
                if key and self.view.is_open(transaction, key, seq):
                    # It comes with the next data of the new timeline, whose versions are not those of its outcome, and
                    # stays in view until then.
                    self.view.settle_applied(transaction, [(key, seq, 1)], rebasing=True)
            return len(kept)

        return self.environment.write(work) if formers else 0

    def reoffer_batch(self, *, after: int, count_max: int, bytes_max: int) -> list[Reoffer]:
        """
        Return the next settled operations that are to be offered again, in log order, empty at the end.

        What is kept of a commit group is together; it, or a single operation, may alone
        exceed the bounds.
        """
        batch: list[Reoffer] = []
        batch_bytes = 0
        with self.environment.read() as transaction:
            for unit in self._reoffered_units(transaction, after):
                unit_bytes = sum(len(one.data) for one in unit)
                if batch and (len(batch) + len(unit) > count_max or batch_bytes + unit_bytes > bytes_max):
                    break
                batch += unit
                batch_bytes += unit_bytes
        return batch

    def _reoffered_units(self, transaction: LmdbTransaction, after: int) -> Iterator[list[Reoffer]]:
        unit: list[Reoffer] = []
        group_id = 0
        for seq in self.lineage.reoffers(transaction, after):
            data = self.log.get(transaction, seq)
            if data is None:
                raise LogCorrupt(f"the operation at seq {seq}, to be offered again, is not in the log", seq=seq)
            group = decode_operation(data).group
            if unit and (group is None or group.id != group_id):
                yield unit
                unit = []
            unit.append(Reoffer(seq, data, self._former_outcome(transaction, seq)))
            group_id = group.id if group is not None else 0
            if group is None:
                yield unit
                unit = []
        if unit:
            yield unit

    def _former_outcome(self, transaction: LmdbTransaction, seq: int) -> bytes:
        outcome = self.outcome(transaction, seq)
        if outcome is None or not outcome.failure_id:
            return sync_pb2.FormerOutcome(version=outcome.version if outcome is not None else 0).SerializeToString()
        value = transaction.get(outcome.failure_id.encode(), b"", db=self._failures)
        failure = failure_pb2.SynchronizationFailure.FromString(value)
        is_culprit = failure.operation == self.log.get(transaction, seq)
        return sync_pb2.FormerOutcome(
            failure_id=outcome.failure_id,
            reason=failure.reason if is_culprit else operation_pb2.FAILURE_REASON_GROUP_REJECTED,
            message=failure.message,
            code=failure.code if is_culprit else "",
        ).SerializeToString()

    # --- damage ---------------------------------------------------------------

    def set_aside(self, transaction: LmdbTransaction, seqs: Collection[int], message: str) -> list[str]:
        """
        Take operations out of the log that cannot be read there, and return the failures that they became.

        Those that were pending fail here and now, for the server will never see them: the
        whole commit group, for no part of it may be applied. The others keep their outcome.
        """
        pending = [one for seq in seqs if (one := self.pending_at(transaction, seq)) is not None]
        groups = {one.seq - one.group_position: one for one in reversed(pending)}
        lost = self.view.replaying(transaction, seqs)
        failures = []
        for first, broken in sorted(groups.items()):
            failure = failure_pb2.SynchronizationFailure(
                id=str(uuid_utils.uuid7()),
                replica_id=self.lineage.replica_id,
                entity=broken.key[0],
                object_id=broken.key[1],
                reason=operation_pb2.FAILURE_REASON_MALFORMED,
                message=message,
                status=failure_pb2.FAILURE_STATUS_OPEN,
            )
            failure.create_time.FromMicroseconds(self.clock())
            members = range(first, first + max(1, broken.group_size))
            payloads = [self.log.stored(transaction, seq) for seq in members]
            failure.operation = payloads[broken.group_position]
            failure.group_operations.extend(payloads if len(payloads) > 1 else ())
            transaction.put(failure.id.encode(), failure.SerializeToString(), db=self._failures)
            for seq in members:
                value = transaction.pop(pack_position(seq), db=self._pending)
                self.files.settle_operation(transaction, seq, applied=False)
                if value is not None:
                    transaction.put(pack_position(seq), _FAILED + failure.id.encode(), db=self._outcomes)
                    lost.append((value[_PLACE.size :], seq))
            failures.append(failure.id)
        for seq in seqs:
            self.log.remove(transaction, seq)
            self.lineage.note_reoffered(transaction, seq)
            self.files.settle_operation(transaction, seq, applied=False)
        self.view.settle_refused(transaction, list(dict.fromkeys(lost)))
        known = self._meta.get(transaction, "set_aside")
        self._meta.put(transaction, set_aside=known + b"".join(map(pack_position, sorted(seqs))))
        return failures

    # --- retention ------------------------------------------------------------

    def trim(self, oldest_us: float, size_bytes_max: int, *, count_max: int) -> int:
        """
        Remove settled operations from the oldest on, about *count_max* at most, and return how many went.

        Those go that were made before *oldest_us*, and any while the log is larger
        than *size_bytes_max*. The first one that must stay ends it. A commit group
        goes whole: a part of it could not be offered again to a server that lost it.
        """

        def work(transaction: LmdbTransaction) -> int:
            trimmed = self.log.trim(
                transaction, going=self._trimmable(transaction, oldest_us, size_bytes_max), count_max=count_max
            )
            for seq, data in trimmed:
                self.files.forget_operation(transaction, seq, data)
                transaction.delete(pack_position(seq), db=self._outcomes)
            return len(trimmed)

        with self.environment.read() as transaction:
            oldest = self.log.first(transaction)
            if oldest is None or not self._trimmable(transaction, oldest_us, size_bytes_max)(*oldest):
                return 0
        return self.environment.write(work)

    def _trimmable(
        self, transaction: LmdbTransaction, oldest_us: float, size_bytes_max: int
    ) -> Callable[[int, bytes], int]:
        size_bytes = self.log.size_bytes(transaction)
        excess_bytes = size_bytes - size_bytes_max
        share_bytes = size_bytes // max(1, self.log.entry_count(transaction))

        def going(seq: int, data: bytes) -> int:
            nonlocal excess_bytes
            operation = _decoded(seq, data)
            if excess_bytes <= 0 and operation.client_time_us >= oldest_us:
                return 0
            members = {seq: operation}
            if operation.group is not None:
                behind = range(seq + 1, seq + operation.group.size - operation.group.position)
                members |= {at: _decoded(at, stored) for at in behind if (stored := self.log.stored(transaction, at))}
            excess_bytes -= share_bytes * len(members)
            return 0 if any(must_stay(*one) for one in members.items()) else len(members)

        def must_stay(seq: int, operation: Operation) -> bool:
            key = pack_object_key(*operation.key)
            return self.lineage.is_reoffered(transaction, seq) or self.view.is_needed(transaction, key, seq)

        return going


def _decoded(seq: int, data: bytes) -> Operation:
    try:
        return decode_operation(data)
    except InvalidValue as error:
        raise LogCorrupt(f"the operation at seq {seq} cannot be read: {error}", seq=seq) from error


def _is_among(seq: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a seq is in one of some ascending ranges."""
    place = bisect_right(ranges, (seq, _SEQ_MAX)) - 1
    return place >= 0 and seq <= ranges[place][1]


def _packed_outcome(result: operation_pb2.OperationResult) -> bytes:
    if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
        return _APPLIED + pack_position(result.version)
    return _FAILED + result.failure_id.encode()


def _units(places: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Put together what is of one commit group; an operation of none is alone."""
    unit: list[tuple[int, bytes]] = []
    for place in places:
        unit.append(place)
        if len(unit) >= _PLACE.unpack_from(place[1])[1]:
            yield unit
            unit = []


def unpack_pending(seq: int, value: bytes) -> PendingOperation:
    """Return what is noted of a pending operation. Raises StorageError."""
    try:
        position, size = _PLACE.unpack_from(value)
        return PendingOperation(seq, position, size, unpack_object_key(value[_PLACE.size :]))
    except (struct.error, UnicodeDecodeError) as error:
        raise damaged(f"the record of the pending operation at seq {seq}") from error


def unpack_outcome(value: bytes) -> Outcome:
    """Return what is noted of a settled operation. Raises StorageError."""
    if value[:1] == _APPLIED:
        return Outcome(unpack_position(value[1:]), "")
    try:
        return Outcome(0, value[1:].decode())
    except UnicodeDecodeError as error:
        raise damaged("the record of an outcome") from error


def _unpack_failure(value: bytes) -> failure_pb2.SynchronizationFailure:
    try:
        return failure_pb2.SynchronizationFailure.FromString(value)
    except DecodeError as error:
        raise damaged("the record of a synchronization failure") from error
