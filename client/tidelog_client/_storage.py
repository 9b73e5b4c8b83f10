"""
Storage: the replica's data on disk.

    log          seq            -> the operation, as the wire carries it
    pending      seq            -> place in its commit group, object key
    outcomes     seq            -> what became of a settled operation
    failures     failure id     -> serialized SynchronizationFailure
    incoming     page number    -> downloaded page, as it came (mode all, until it is published)
    merging      page number    -> the same for the other modes
    seen         object key     -> (while a reconciliation is published) it was in the download
    ahead        object key     -> its state came without the cursor, and is newer
    meta         replica id, last seq, cursor, epoch, ...

and the view (see `_view`). What belongs together changes in one transaction: log and
view, outcome and view, cursor and the data that it stands for.
"""

from __future__ import annotations

import struct
import uuid
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._environment import Environment, put_many
from tidelog._errors import InvalidValue, LogCorrupt
from tidelog._keys import (
    POSITION_BYTES,
    ObjectKey,
    pack_object_key,
    pack_position,
    unpack_object_key,
    unpack_position,
)
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._log import OperationLog
from tidelog._operation import Operation, decode_operation
from tidelog.v1 import failure_pb2, operation_pb2, sync_pb2
from tidelog_client._report import PublishedCounts
from tidelog_client._view import StateLost, View, ViewRecord

if TYPE_CHECKING:
    from tidelog._environment import LmdbDatabase, LmdbTransaction

FORMAT: Final = "tidelog-replica-1"

PUBLISH_OBJECTS_MAX: Final = 100_000
PUBLISH_BYTES_MAX: Final = 128 * 1024 * 1024
PUBLISH_STEP_PAGES: Final = 20
MERGE_STEP_PAGES: Final = PUBLISH_OBJECTS_MAX // PAGE_OBJECTS_MAX
READ_PAGE_ENTRIES: Final = 500

_PLACE: Final = struct.Struct(">HH")  # of a pending operation in its commit group: position, size
_NO_GROUP: Final = _PLACE.pack(0, 0)
_END: Final = struct.Struct(">Q??")

_APPLIED: Final = b"\x01"
_FAILED: Final = b"\x02"


class PendingOperation(NamedTuple):
    """An operation to be sent: its seq, its place in its commit group (size 0: none), its object."""

    seq: int
    group_position: int
    group_size: int
    key: ObjectKey


class Outcome(NamedTuple):
    """What became of an operation: applied at a version, or refused with a failure id."""

    version: int
    failure_id: str


class SettledCounts(NamedTuple):
    """What a set of results brought: how many were applied, how many refused, and the failures."""

    applied: int
    rejected: int
    failures: list[failure_pb2.SynchronizationFailure]


class Storage:
    """A replica directory. Safe to use from many threads and from several processes."""

    def __init__(self, path: Path, *, relaxed: bool, map_bytes: int) -> None:
        self.environment = Environment.open(path, format_name=FORMAT, relaxed=relaxed, map_bytes=map_bytes)
        self.log = OperationLog(self.environment)
        self.view = View(self.environment, self.log)
        database = self.environment.database
        self._pending = database("pending")
        self._outcomes = database("outcomes")
        self._failures = database("failures")
        self._incoming = database("incoming")
        self._merging = database("merging")
        self._seen = database("seen")
        self._ahead = database("ahead")
        self._meta = database("meta")
        self.replica_id = self.environment.write(self._load_replica_id)

    def close(self) -> None:
        """Close the directory."""
        self.environment.close()

    # --- meta -----------------------------------------------------------------

    def meta(self, name: str) -> bytes:
        """Return a remembered value; empty if there is none."""
        with self.environment.read() as transaction:
            return self._get_meta(transaction, name)

    def set_meta(self, **values: bytes) -> None:
        """Remember values."""
        self.environment.write(lambda transaction: self._put_meta(transaction, **values))

    def _get_meta(self, transaction: LmdbTransaction, name: str) -> bytes:
        return transaction.get(name.encode(), b"", db=self._meta)

    def _put_meta(self, transaction: LmdbTransaction, **values: bytes) -> None:
        for name, value in values.items():
            transaction.put(name.encode(), value, db=self._meta)

    def _load_replica_id(self, transaction: LmdbTransaction) -> str:
        known = self._get_meta(transaction, "replica_id")
        if not known:
            known = str(uuid.uuid4()).encode()
            self._put_meta(transaction, replica_id=known)
        return known.decode()

    def last_seq(self, transaction: LmdbTransaction) -> int:
        """Return the position of the newest operation ever logged, 0 if there is none."""
        return unpack_position(self._get_meta(transaction, "last_seq"))

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
                    page.append(_unpack_pending(seq, value))
                    found = cursor.next()
            yield from page
            if len(page) < READ_PAGE_ENTRIES:
                return
            position = page[-1].seq

    def upload_batch(
        self, *, after: int, until: int, seqs: Sequence[int] | None, count_max: int, bytes_max: int
    ) -> list[tuple[int, bytes]]:
        """
        Return the next pending operations, (seq, serialized) in log order, empty at the end.

        A commit group is whole; it, or a single operation, may alone exceed the bounds.

        Args:
            after: Position to start above.
            until: Position to end at.
            seqs: Ascending positions to choose from, disregarding *until*. None: all.
            count_max: How many operations at the most.
            bytes_max: How many bytes at the most.

        Raises:
            LogCorrupt: The log lacks one of them, or it fails its check.
        """
        batch: list[tuple[int, bytes]] = []
        batch_bytes = 0
        unit: list[tuple[int, bytes]] = []
        unit_bytes = 0
        with self.environment.read() as transaction:
            for seq, group_size in self._upload_places(transaction, after, until, seqs):
                data = self.log.get(transaction, seq)
                if data is None:
                    raise LogCorrupt(f"the pending operation at seq {seq} is not in the log", seq=seq)
                unit.append((seq, data))
                unit_bytes += len(data)
                if len(unit) < group_size:
                    continue
                if batch and (len(batch) + len(unit) > count_max or batch_bytes + unit_bytes > bytes_max):
                    break
                batch += unit
                batch_bytes += unit_bytes
                unit, unit_bytes = [], 0
        return batch

    def _upload_places(
        self, transaction: LmdbTransaction, after: int, until: int, seqs: Sequence[int] | None
    ) -> Iterator[tuple[int, int]]:
        """Yield (seq, size of its commit group) of pending operations, from *seqs* or all up to *until*."""
        if seqs is None:
            cursor = transaction.cursor(self._pending)
            if cursor.set_range(pack_position(after + 1)):
                for key, value in cursor:
                    seq = unpack_position(key)
                    if seq > until:
                        return
                    yield seq, _PLACE.unpack_from(value)[1]
            return
        for seq in islice(seqs, bisect_right(seqs, after), None):
            place = transaction.get(pack_position(seq), db=self._pending)
            if place is not None:
                yield seq, _PLACE.unpack_from(place)[1]

    def pending_of(self, transaction: LmdbTransaction, key: bytes) -> list[PendingOperation]:
        """Return the pending operations on one object in log order."""
        found = []
        for seq, version in self.view.unconfirmed(transaction, key):
            if version == 0:
                value = transaction.get(pack_position(seq), db=self._pending)
                if value is not None:
                    found.append(_unpack_pending(seq, value))
        return found

    def pending_at(self, transaction: LmdbTransaction, seq: int) -> PendingOperation | None:
        """Return the pending operation at *seq*, or None if it is settled."""
        value = transaction.get(pack_position(seq), db=self._pending)
        return None if value is None else _unpack_pending(seq, value)

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
        if value is None:
            return None
        if value[:1] == _APPLIED:
            return Outcome(unpack_position(value[1:]), "")
        return Outcome(0, value[1:].decode())

    def failure(self, failure_id: str) -> failure_pb2.SynchronizationFailure | None:
        """Return a recorded failure, or None."""
        with self.environment.read() as transaction:
            value = transaction.get(failure_id.encode(), db=self._failures)
        return None if value is None else failure_pb2.SynchronizationFailure.FromString(value)

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
                yield failure_pb2.SynchronizationFailure.FromString(value)
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
        self.log.append(transaction, zip((one.seq for one in operations), encoded, strict=True))
        put_many(transaction, self._pending, pending)
        self.view.write_commit(transaction, keyed, changes)
        self._put_meta(transaction, last_seq=pack_position(operations[-1].seq))

    # --- settling -------------------------------------------------------------

    def settle(self, results: Sequence[operation_pb2.OperationResult]) -> SettledCounts:
        """
        Take in final results in one transaction. What was settled before is passed over.

        Refused operations leave the view; their failure records are kept with the payload.
        """
        return self.environment.write(lambda transaction: self._settle(transaction, results))

    def _settle(self, transaction: LmdbTransaction, results: Sequence[operation_pb2.OperationResult]) -> SettledCounts:
        outcomes = []
        applied: list[tuple[bytes, int, int]] = []
        refused: dict[str, list[tuple[operation_pb2.OperationResult, bytes]]] = {}
        for result in results:
            position = pack_position(result.seq)
            value = transaction.pop(position, db=self._pending)
            if value is None:
                continue
            key = value[_PLACE.size :]
            if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
                outcomes.append((position, _APPLIED + pack_position(result.version)))
                applied.append((key, result.seq, result.version))
            else:
                outcomes.append((position, _FAILED + result.failure_id.encode()))
                refused.setdefault(result.failure_id, []).append((result, key))
        put_many(transaction, self._outcomes, outcomes)
        self.view.settle_applied(transaction, applied)
        members = [member for group in refused.values() for member in group]
        self.view.settle_refused(transaction, [(key, result.seq) for result, key in members])
        failures = [self._record_failure(transaction, group) for group in refused.values()]
        self._note_newest_settled(transaction, max((result.seq for result in results), default=0))
        return SettledCounts(len(applied), len(members), failures)

    def _note_newest_settled(self, transaction: LmdbTransaction, seq: int) -> None:
        """Remember the newest settled operation's seq and nonce: they outlive its entry in the log."""
        data = self.log.get(transaction, seq) if seq > self.newest_settled(transaction)[0] else None
        if data is not None:
            nonce = decode_operation(data).nonce
            self._put_meta(transaction, newest_settled=pack_position(seq) + pack_position(nonce))

    def newest_settled(self, transaction: LmdbTransaction) -> tuple[int, int]:
        """Return (seq, nonce) of the newest operation that was settled, zeros if none was."""
        value = self._get_meta(transaction, "newest_settled")
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
            replica_id=self.replica_id,
            entity=entity,
            object_id=object_id,
            reason=culprit.reason,
            message=culprit.message,
            operation=self.log.get(transaction, culprit.seq) or b"",
            group_operations=payloads if len(payloads) > 1 else [],
            status=failure_pb2.FAILURE_STATUS_OPEN,
        )
        failure.create_time.GetCurrentTime()
        transaction.put(failure.id.encode(), failure.SerializeToString(), db=self._failures)
        return failure

    # --- download -------------------------------------------------------------

    def stage(self, pages: Sequence[bytes], object_count: int, resume_token: bytes) -> None:
        """Keep downloaded pages on disk, and where the download can go on."""

        def work(transaction: LmdbTransaction) -> None:
            _append_pages(transaction, self._incoming, pages)
            count = object_count + unpack_position(self._get_meta(transaction, "staged_count"))
            size_bytes = sum(map(len, pages)) + unpack_position(self._get_meta(transaction, "staged_bytes"))
            self._put_meta(
                transaction,
                staged_count=pack_position(count),
                staged_bytes=pack_position(size_bytes),
                resume_token=resume_token,
            )

        self.environment.write(work)

    def discard_staged(self) -> None:
        """Forget pages that were kept."""
        with self.environment.read() as transaction:
            if not transaction.stat(self._incoming)["entries"] and not self._get_meta(transaction, "resume_token"):
                return

        def work(transaction: LmdbTransaction) -> None:
            transaction.drop(self._incoming, delete=False)
            self._put_meta(transaction, staged_count=b"", staged_bytes=b"", resume_token=b"")

        self.environment.write(work)

    def publish(
        self, pages: Sequence[bytes], object_count: int, *, cursor: bytes, version: int, reconcile: bool
    ) -> PublishedCounts:
        """
        Put the staged pages, then *pages*, into the view, and the cursor with them.

        Up to 100,000 objects and 128 MiB change in one transaction. More are published
        in steps, which are taken up again after a crash by `finish_publishing`.

        Raises:
            StateLost: A confirmation has nothing to confirm. Nothing was published.
        """
        if not pages and self._stands_at(cursor):
            return PublishedCounts()
        staged_count = unpack_position(self.meta("staged_count"))
        staged_bytes = unpack_position(self.meta("staged_bytes"))
        end = _PublishingEnd(cursor, version, reconcile, track_seen=reconcile and self._has_objects())
        if staged_count + object_count <= PUBLISH_OBJECTS_MAX and staged_bytes <= PUBLISH_BYTES_MAX:
            return self.environment.write(lambda transaction: self._publish_at_once(transaction, pages, end))
        self.stage(pages, object_count, b"")
        self.set_meta(publishing=end.pack())
        return self.finish_publishing()

    def finish_publishing(self) -> PublishedCounts:
        """Go on with a publication that was begun. Does nothing if there is none."""
        counts = PublishedCounts()
        while packed := self.meta("publishing"):
            end = _PublishingEnd.unpack(packed)
            counts = counts.plus(self.environment.write(partial(self._publish_step, end=end)))
        return counts

    def stage_merge(self, pages: Sequence[bytes]) -> None:
        """Keep pages of a download without a cursor on disk until it is complete."""
        self.environment.write(lambda transaction: _append_pages(transaction, self._merging, pages))

    def discard_merge(self) -> None:
        """Forget pages that `stage_merge` kept for a download that was not completed."""
        with self.environment.read() as transaction:
            if not transaction.stat(self._merging)["entries"]:
                return
        self.environment.write(lambda transaction: transaction.drop(self._merging, delete=False))

    def merge(self, pages: Sequence[bytes]) -> PublishedCounts:
        """
        Put the pages that `stage_merge` kept, then *pages*, into the view without moving the cursor.

        Up to 100,000 objects and 128 MiB change in one transaction.
        """
        counts = PublishedCounts()
        more = True
        while more:
            step, more = self.environment.write(lambda transaction: self._merge_step(transaction, pages))
            counts = counts.plus(step)
        return counts

    def _merge_step(self, transaction: LmdbTransaction, pages: Sequence[bytes]) -> tuple[PublishedCounts, bool]:
        counts = PublishedCounts()
        cursor = transaction.cursor(self._merging)
        room_bytes = PUBLISH_BYTES_MAX
        for _ in range(MERGE_STEP_PAGES):
            if room_bytes <= 0:
                break
            if not cursor.first():
                for page in pages:
                    counts = counts.plus(self._merge(transaction, sync_pb2.SnapshotPage.FromString(page)))
                return counts, False
            page = cursor.value()
            counts = counts.plus(self._merge(transaction, sync_pb2.SnapshotPage.FromString(page)))
            room_bytes -= len(page)
            cursor.delete()
        return counts, True

    def start_over(self) -> None:
        """Forget where the server's state is known up to, so that all of it is sent again."""

        def work(transaction: LmdbTransaction) -> None:
            transaction.drop(self._incoming, delete=False)
            transaction.drop(self._seen, delete=False)
            self._put_meta(
                transaction,
                cursor=b"",
                state_lost=b"1",
                staged_count=b"",
                staged_bytes=b"",
                resume_token=b"",
                publishing=b"",
            )

        self.environment.write(work)

    def _stands_at(self, cursor: bytes) -> bool:
        """Tell whether a download that brought nothing and ends at *cursor* changes nothing at all."""
        with self.environment.read() as transaction:
            return (
                self._get_meta(transaction, "cursor") == cursor
                and self.view.all_clean(transaction)
                and not transaction.stat(self._incoming)["entries"]
            )

    def _has_objects(self) -> bool:
        with self.environment.read() as transaction:
            return not self.view.is_empty(transaction)

    def _merge(self, transaction: LmdbTransaction, page: sync_pb2.SnapshotPage) -> PublishedCounts:
        # The server tells of a deletion only what was there at the cursor. What this page brings from
        # beyond it is remembered, for the next download to bring again or to be removed after it.
        cursor_version = unpack_position(self._get_meta(transaction, "cursor_version"))
        newer = [pack_object_key(one.entity, one.id) for one in page.snapshots if one.version > cursor_version]
        newer += [pack_object_key(one.entity, one.id) for one in page.confirmations if one.version > cursor_version]
        publisher = self._publisher(transaction, _MERGE)
        counts = publisher.apply(page)
        publisher.check()
        if self._get_meta(transaction, "resume_token"):
            # An interrupted download would later put older states over these: it starts over.
            transaction.drop(self._incoming, delete=False)
            self._put_meta(transaction, staged_count=b"", staged_bytes=b"", resume_token=b"")
        put_many(transaction, self._ahead, [(key, b"") for key in newer])
        return counts

    def _publisher(self, transaction: LmdbTransaction, end: _PublishingEnd) -> _Publisher:
        return _Publisher(self.view, self._seen, self._ahead, transaction, end)

    def _publish_at_once(
        self, transaction: LmdbTransaction, pages: Sequence[bytes], end: _PublishingEnd
    ) -> PublishedCounts:
        publisher = self._publisher(transaction, end)
        counts = PublishedCounts()
        staged = (page for _, page in transaction.cursor(self._incoming))
        for page in chain(staged, pages):
            counts = counts.plus(publisher.apply(sync_pb2.SnapshotPage.FromString(page)))
        publisher.check()
        return counts.plus(self._end_publishing(transaction, publisher, end))

    def _publish_step(self, transaction: LmdbTransaction, end: _PublishingEnd) -> PublishedCounts:
        publisher = self._publisher(transaction, end)
        counts = PublishedCounts()
        cursor = transaction.cursor(self._incoming)
        for _ in range(PUBLISH_STEP_PAGES):
            if not cursor.first():
                return counts.plus(self._end_publishing(transaction, publisher, end))
            counts = counts.plus(publisher.apply(sync_pb2.SnapshotPage.FromString(cursor.value())))
            publisher.check()
            cursor.delete()
        return counts

    def _end_publishing(
        self, transaction: LmdbTransaction, publisher: _Publisher, end: _PublishingEnd
    ) -> PublishedCounts:
        counts = publisher.end()
        transaction.drop(self._incoming, delete=False)
        transaction.drop(self._seen, delete=False)
        transaction.drop(self._ahead, delete=False)
        self._put_meta(
            transaction,
            cursor=end.cursor,
            cursor_version=pack_position(end.version),
            staged_count=b"",
            staged_bytes=b"",
            resume_token=b"",
            publishing=b"",
            state_lost=b"",
        )
        return counts

    # --- retention ------------------------------------------------------------

    def trim(self, oldest_us: float, size_bytes_max: int, *, count_max: int) -> int:
        """
        Remove settled operations from the oldest on, at most *count_max*, and return how many went.

        Those go that were made before *oldest_us*, and any while the log is larger
        than *size_bytes_max*. The first one that must stay ends it.
        """

        def work(transaction: LmdbTransaction) -> list[int]:
            trimmed = self.log.trim(
                transaction, may_go=self._trimmable(transaction, oldest_us, size_bytes_max), count_max=count_max
            )
            for seq in trimmed:
                transaction.delete(pack_position(seq), db=self._outcomes)
            return trimmed

        with self.environment.read() as transaction:
            oldest = self.log.first(transaction)
            if oldest is None or not self._trimmable(transaction, oldest_us, size_bytes_max)(*oldest):
                return 0
        return len(self.environment.write(work))

    def _trimmable(
        self, transaction: LmdbTransaction, oldest_us: float, size_bytes_max: int
    ) -> Callable[[int, bytes], bool]:
        size_bytes = self.log.size_bytes(transaction)
        excess_bytes = size_bytes - size_bytes_max
        share_bytes = size_bytes // max(1, self.log.entry_count(transaction))

        def may_go(seq: int, data: bytes) -> bool:
            nonlocal excess_bytes
            try:
                operation = decode_operation(data)
            except InvalidValue as error:
                raise LogCorrupt(f"the operation at seq {seq} cannot be read: {error}", seq=seq) from error
            if excess_bytes <= 0 and operation.client_time_us >= oldest_us:
                return False
            excess_bytes -= share_bytes
            return not self.view.is_needed(transaction, pack_object_key(*operation.key), seq)

        return may_go


class _PublishingEnd(NamedTuple):
    """
    How a publication ends.

    Attributes:
        cursor: What to remember as the cursor.
        version: The version it stands for.
        reconcile: Whether everything visible was downloaded.
        track_seen: Whether what the download lacks is removed. An empty replica has
            nothing to remove; decided before the first object is written.
    """

    cursor: bytes
    version: int
    reconcile: bool
    track_seen: bool

    def pack(self) -> bytes:
        return _END.pack(self.version, self.reconcile, self.track_seen) + self.cursor

    @classmethod
    def unpack(cls, data: bytes) -> _PublishingEnd:
        return cls(data[_END.size :], *_END.unpack_from(data))


# A page that comes without a cursor ends nothing.
_MERGE: Final = _PublishingEnd(b"", 0, reconcile=False, track_seen=False)


class _Publisher:
    """Puts pages into the view, in one transaction."""

    def __init__(
        self,
        view: View,
        seen: LmdbDatabase,
        ahead: LmdbDatabase,
        transaction: LmdbTransaction,
        end: _PublishingEnd,
    ) -> None:
        self._view = view
        self._seen = seen
        self._ahead = ahead
        self._transaction = transaction
        self._end = end
        self._all_clean = view.all_clean(transaction)
        self._lost: set[bytes] = set()
        self._any_ahead = transaction.stat(ahead)["entries"] > 0

    def apply(self, page: sync_pb2.SnapshotPage) -> PublishedCounts:
        """Put one page into the view."""
        view, transaction = self._view, self._transaction
        snapshots = [(pack_object_key(one.entity, one.id), one.version, one.attributes) for one in page.snapshots]
        confirmations = [(pack_object_key(one.entity, one.id), one.version) for one in page.confirmations]
        removals = [(pack_object_key(one.entity, one.id), one.version) for one in page.removals]
        if self._end.track_seen:
            put_many(transaction, self._seen, [(key, b"") for key, _, _ in snapshots])
            put_many(transaction, self._seen, [(key, b"") for key, _ in confirmations])
            for key, _ in removals:  # sent by an earlier page, deleted since
                transaction.delete(key, db=self._seen)
        if self._any_ahead:
            for key in [*(one[0] for one in snapshots), *(one[0] for one in (*confirmations, *removals))]:
                transaction.delete(key, db=self._ahead)
        # What a reconciliation brings may be of another timeline, whose versions do not compare.
        force = self._end.reconcile
        if self._all_clean:
            view.put_clean_snapshots(transaction, snapshots, force=force)
        else:
            for key, version, attributes in snapshots:
                view.put_snapshot(transaction, key, version, attributes, force=force)
        for key, version in confirmations:
            try:
                view.confirm(transaction, key, version)
            except StateLost:
                self._lost.add(key)
        if self._lost:
            # A later page may tell that the object is gone, or bring it whole.
            self._lost.difference_update(key for key, _ in removals)
            self._lost.difference_update(key for key, _, _ in snapshots)
        removed = sum(view.remove(transaction, key, version, force=force) for key, version in removals)
        return PublishedCounts(len(snapshots), len(confirmations), removed)

    def check(self) -> None:
        """Raise StateLost if a confirmation had nothing to confirm. Before the transaction is committed."""
        if self._lost:
            raise StateLost(next(iter(self._lost)))

    def end(self) -> PublishedCounts:
        """End a download of everything: settle what it left open, remove what it did not bring."""
        view, transaction, version = self._view, self._transaction, self._end.version
        view.drop_stale(transaction, version)
        gone = dict.fromkeys(transaction.cursor(self._ahead).iternext(keys=True, values=False))
        if self._end.track_seen:
            gone.update(
                dict.fromkeys(key for key in view.keys(transaction) if transaction.get(key, db=self._seen) is None)
            )
        return PublishedCounts(removed=sum(view.remove(transaction, key, version, force=True) for key in gone))


def _append_pages(transaction: LmdbTransaction, database: LmdbDatabase, pages: Sequence[bytes]) -> None:
    cursor = transaction.cursor(database)
    number = unpack_position(cursor.key()) + 1 if cursor.last() else 1
    for offset, page in enumerate(pages):
        transaction.put(pack_position(number + offset), page, db=database, append=True)


def _unpack_pending(seq: int, value: bytes) -> PendingOperation:
    position, size = _PLACE.unpack_from(value)
    return PendingOperation(seq, position, size, unpack_object_key(value[_PLACE.size :]))
