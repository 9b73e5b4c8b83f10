"""
Storage: the replica's data on disk, and what a view is made of.

    log          seq                 -> the operation, as the wire carries it
    pending      seq                 -> place in its commit group, object key
    unconfirmed  object key NUL seq  -> version it was applied at, 0 while pending
    objects      object key          -> version, dirty mark, attributes: the view
    base         object key          -> version, attributes: the server's state, only while dirty
    outcomes     seq                 -> what became of a settled operation
    failures     failure id          -> serialized SynchronizationFailure
    incoming     page number         -> downloaded page, as it came
    seen         object key          -> (while a reconciliation is published) it was in the download
    meta         replica id, last seq, cursor, epoch, ...

The view of an object is its base with every operation replayed that is pending, or
applied at a version above the base's. An object is dirty as long as it has such an
operation in `unconfirmed`; then its base is kept beside its view (there is no base
entry if the server has no such object). Everything that changes one of the two
changes the other in the same transaction.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tidelog._environment import Environment, put_many
from tidelog._errors import InvalidValue, LogCorrupt
from tidelog._keys import (
    POSITION_BYTES,
    ObjectKey,
    entity_prefix,
    pack_object_key,
    pack_position,
    unpack_object_key,
    unpack_position,
)
from tidelog._log import OperationLog
from tidelog._operation import Operation, OperationKind, decode_operation
from tidelog._values import EMPTY_MAP, Attributes, decode_trusted, encode
from tidelog.v1 import failure_pb2, operation_pb2, sync_pb2

if TYPE_CHECKING:
    import lmdb

FORMAT: Final = "tidelog-replica-1"

PUBLISH_OBJECTS_MAX: Final = 100_000
PUBLISH_STEP_PAGES: Final = 20
QUERY_PAGE_OBJECTS: Final = 500

_RECORD: Final = struct.Struct(">QB")
_PENDING: Final = struct.Struct(">HH")
_DIRTY: Final = 1
_STILL_PENDING: Final = bytes(8)

_APPLIED: Final = b"\x01"
_FAILED: Final = b"\x02"


class StateLost(Exception):  # noqa: N818 - tells the synchronizer to start over, never leaves the package
    """The server confirmed a state that the replica does not have: all states must be sent again."""


class ViewRecord(NamedTuple):
    """
    An object in the view.

    Attributes:
        version: Version of its base; 0: the server has no such object yet.
        dirty: Whether operations are replayed on top of the base.
        attributes: Its attributes, encoded.
    """

    version: int
    dirty: bool
    attributes: bytes


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


class PublishedCounts(NamedTuple):
    """What a download brought: how many objects were written, confirmed and removed."""

    downloaded: int = 0
    confirmed: int = 0
    removed: int = 0

    def plus(self, other: PublishedCounts) -> PublishedCounts:
        """Return the sums."""
        return PublishedCounts(*map(sum, zip(self, other, strict=True)))


class Storage:
    """A replica directory. Safe to use from many threads and from several processes."""

    def __init__(self, path: Path, *, relaxed: bool, map_bytes: int) -> None:
        self.environment = Environment.open(path, format_name=FORMAT, relaxed=relaxed, map_bytes=map_bytes)
        self.log = OperationLog(self.environment)
        database = self.environment.database
        self._pending = database("pending")
        self._unconfirmed = database("unconfirmed")
        self._objects = database("objects")
        self._base = database("base")
        self._outcomes = database("outcomes")
        self._failures = database("failures")
        self._incoming = database("incoming")
        self._seen = database("seen")
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

    def _get_meta(self, transaction: lmdb.Transaction, name: str) -> bytes:
        return transaction.get(name.encode(), b"", db=self._meta)

    def _put_meta(self, transaction: lmdb.Transaction, **values: bytes) -> None:
        for name, value in values.items():
            transaction.put(name.encode(), value, db=self._meta)

    def _load_replica_id(self, transaction: lmdb.Transaction) -> str:
        known = self._get_meta(transaction, "replica_id")
        if not known:
            known = str(uuid.uuid4()).encode()
            self._put_meta(transaction, replica_id=known)
        return known.decode()

    def last_seq(self, transaction: lmdb.Transaction) -> int:
        """Return the position of the newest operation ever logged, 0 if there is none."""
        return unpack_position(self._get_meta(transaction, "last_seq"))

    # --- reading --------------------------------------------------------------

    def view(self, transaction: lmdb.Transaction, key: bytes) -> ViewRecord | None:
        """Return an object as the replica shows it, or None."""
        value = transaction.get(key, db=self._objects)
        return None if value is None else _unpack_record(value)

    def entity_objects(self, entity: str) -> Iterator[tuple[str, ViewRecord]]:
        """
        Iterate over (id, record) of an entity in id order.

        Each page is read in a transaction of its own, so a slow reader holds nothing.
        """
        prefix = entity_prefix(entity)
        start = prefix
        while True:
            page = []
            with self.environment.read() as transaction:
                cursor = transaction.cursor(self._objects)
                found = cursor.set_range(start)
                while found and len(page) < QUERY_PAGE_OBJECTS:
                    key, value = cursor.item()
                    if not key.startswith(prefix):
                        break
                    page.append((key, _unpack_record(value)))
                    found = cursor.next()
            for key, record in page:
                yield key[len(prefix) :].decode(), record
            if len(page) < QUERY_PAGE_OBJECTS:
                return
            start = page[-1][0] + b"\0"

    def pending(self, *, after: int = 0, until: int | None = None) -> Iterator[PendingOperation]:
        """Iterate over the pending operations with *after* < seq <= *until* in log order, page by page."""
        position = after
        while True:
            page = []
            with self.environment.read() as transaction:
                cursor = transaction.cursor(self._pending)
                found = cursor.set_range(pack_position(position + 1))
                while found and len(page) < QUERY_PAGE_OBJECTS:
                    key, value = cursor.item()
                    seq = unpack_position(key)
                    if until is not None and seq > until:
                        break
                    page.append(_unpack_pending(seq, value))
                    found = cursor.next()
            yield from page
            if len(page) < QUERY_PAGE_OBJECTS:
                return
            position = page[-1].seq

    def pending_of(self, transaction: lmdb.Transaction, key: bytes) -> list[PendingOperation]:
        """Return the pending operations on one object in log order."""
        found = []
        for seq, version in self._unconfirmed_of(transaction, key):
            if version == 0:
                value = transaction.get(pack_position(seq), db=self._pending)
                if value is not None:
                    found.append(_unpack_pending(seq, value))
        return found

    def pending_at(self, transaction: lmdb.Transaction, seq: int) -> PendingOperation | None:
        """Return the pending operation at *seq*, or None if it is settled."""
        value = transaction.get(pack_position(seq), db=self._pending)
        return None if value is None else _unpack_pending(seq, value)

    def has_other_pending(self, transaction: lmdb.Transaction, seqs: Container[int], *, below: int) -> bool:
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

    def outcome(self, transaction: lmdb.Transaction, seq: int) -> Outcome | None:
        """Return what became of an operation, or None while it is pending (or forgotten)."""
        value = transaction.get(pack_position(seq), db=self._outcomes)
        if value is None:
            return None
        if value[:1] == _APPLIED:
            return Outcome(unpack_position(value[1:]), "")
        return Outcome(0, value[1:].decode())

    def failures(self) -> Iterator[failure_pb2.SynchronizationFailure]:
        """Iterate over the recorded failures, oldest first."""
        start = b""
        while True:
            with self.environment.read() as transaction:
                cursor = transaction.cursor(self._failures)
                found = cursor.set_range(start) if start else cursor.first()
                page = []
                while found and len(page) < QUERY_PAGE_OBJECTS:
                    page.append(cursor.item())
                    found = cursor.next()
            for _key, value in page:
                yield failure_pb2.SynchronizationFailure.FromString(value)
            if len(page) < QUERY_PAGE_OBJECTS:
                return
            start = page[-1][0] + b"\0"

    # --- local commits --------------------------------------------------------

    def write_commit(
        self,
        transaction: lmdb.Transaction,
        operations: Sequence[Operation],
        encoded: Sequence[bytes],
        views: dict[bytes, tuple[ViewRecord | None, ViewRecord | None]],
    ) -> None:
        """
        Append operations and change the view with them.

        Args:
            operations: The operations, with the next positions of the log.
            encoded: Their bytes.
            views: For each object, its record before and after all of them.
        """
        pending, unconfirmed = [], []
        for operation in operations:
            position = pack_position(operation.seq)
            key = pack_object_key(operation.entity, operation.id)
            group = operation.group
            place = _PENDING.pack(group.position, group.size) if group is not None else _PENDING.pack(0, 0)
            pending.append((position, place + key))
            unconfirmed.append((key + b"\0" + position, _STILL_PENDING))
        self.log.append(transaction, zip((one.seq for one in operations), encoded, strict=True))
        put_many(transaction, self._pending, pending)
        put_many(transaction, self._unconfirmed, unconfirmed)
        objects = []
        for key, (before, after) in views.items():
            if before is not None and not before.dirty:
                transaction.put(key, _RECORD.pack(before.version, 0) + before.attributes, db=self._base)
            if after is not None:
                objects.append((key, _RECORD.pack(after.version, _DIRTY) + after.attributes))
            elif before is not None:
                transaction.delete(key, db=self._objects)
        put_many(transaction, self._objects, objects)
        self._put_meta(transaction, last_seq=pack_position(operations[-1].seq))

    def base_version(self, transaction: lmdb.Transaction, key: bytes) -> int:
        """Return the server version that a locally deleted object has, 0 if the server has none."""
        value = transaction.get(key, db=self._base)
        return 0 if value is None else _unpack_record(value).version

    # --- settling -------------------------------------------------------------

    def settle(self, results: Sequence[operation_pb2.OperationResult]) -> SettledCounts:
        """
        Take in final results in one transaction. What was settled before is passed over.

        Refused operations leave the view; their failure records are kept with the payload.
        """
        return self.environment.write(lambda transaction: self._settle(transaction, results))

    def _settle(
        self, transaction: lmdb.Transaction, results: Sequence[operation_pb2.OperationResult]
    ) -> SettledCounts:
        applied = 0
        outcomes, confirmed = [], []
        changed: dict[bytes, None] = {}
        refused: dict[str, list[tuple[operation_pb2.OperationResult, bytes]]] = {}
        for result in results:
            position = pack_position(result.seq)
            value = transaction.pop(position, db=self._pending)
            if value is None:
                continue
            key = value[_PENDING.size :]
            if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
                applied += 1
                version = pack_position(result.version)
                outcomes.append((position, _APPLIED + version))
                base = transaction.get(key, db=self._base)
                if base is not None and base[:POSITION_BYTES] >= version:
                    # A snapshot that contains it came before this answer did.
                    transaction.delete(key + b"\0" + position, db=self._unconfirmed)
                    changed[key] = None
                else:
                    confirmed.append((key + b"\0" + position, version))
            else:
                outcomes.append((position, _FAILED + result.failure_id.encode()))
                transaction.delete(key + b"\0" + position, db=self._unconfirmed)
                changed[key] = None
                refused.setdefault(result.failure_id, []).append((result, key))
        put_many(transaction, self._outcomes, outcomes)
        put_many(transaction, self._unconfirmed, confirmed)
        for key in changed:
            self._rebuild(transaction, key)
        failures = [self._record_failure(transaction, members) for members in refused.values()]
        return SettledCounts(applied, sum(map(len, refused.values())), failures)

    def _record_failure(
        self, transaction: lmdb.Transaction, members: list[tuple[operation_pb2.OperationResult, bytes]]
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

        def work(transaction: lmdb.Transaction) -> None:
            cursor = transaction.cursor(self._incoming)
            number = unpack_position(cursor.key()) + 1 if cursor.last() else 1
            for offset, page in enumerate(pages):
                transaction.put(pack_position(number + offset), page, db=self._incoming, append=True)
            count = object_count + unpack_position(self._get_meta(transaction, "staged_count"))
            self._put_meta(transaction, staged_count=pack_position(count), resume_token=resume_token)

        self.environment.write(work)

    def discard_staged(self) -> None:
        """Forget pages that were kept."""

        def work(transaction: lmdb.Transaction) -> None:
            transaction.drop(self._incoming, delete=False)
            self._put_meta(transaction, staged_count=b"", resume_token=b"")

        self.environment.write(work)

    def publish(
        self, pages: Sequence[bytes], object_count: int, *, cursor: bytes, version: int, reconcile: bool
    ) -> PublishedCounts:
        """
        Put the staged pages, then *pages*, into the view, and the cursor with them.

        Up to 100,000 objects change in one transaction. More are published in steps,
        which are taken up again after a crash by `finish_publishing`.

        Raises:
            StateLost: A confirmation has nothing to confirm. Nothing was published.
        """
        staged = unpack_position(self.meta("staged_count"))
        end = _PublishingEnd(cursor, version, reconcile)
        if staged + object_count <= PUBLISH_OBJECTS_MAX:
            return self.environment.write(lambda transaction: self._publish_at_once(transaction, pages, end))
        self.stage(pages, object_count, b"")
        self.set_meta(publishing=end.pack())
        return self.finish_publishing()

    def finish_publishing(self) -> PublishedCounts:
        """Go on with a publication that was begun. Does nothing if there is none."""
        counts = PublishedCounts()
        while packed := self.meta("publishing"):
            end = _PublishingEnd.unpack(packed)
            counts = counts.plus(self.environment.write(lambda txn, end=end: self._publish_step(txn, end)))
        return counts

    def merge(self, page: bytes) -> PublishedCounts:
        """Put one page into the view without moving the cursor (modes unsynchronized and selected)."""
        message = sync_pb2.SnapshotPage.FromString(page)
        return self.environment.write(
            lambda transaction: _Publisher(self, transaction, reconcile=False).apply(message)
        )

    def _publish_at_once(
        self, transaction: lmdb.Transaction, pages: Sequence[bytes], end: _PublishingEnd
    ) -> PublishedCounts:
        publisher = _Publisher(self, transaction, reconcile=end.reconcile)
        counts = PublishedCounts()
        staged = [page for _, page in transaction.cursor(self._incoming)]
        for page in (*staged, *pages):
            counts = counts.plus(publisher.apply(sync_pb2.SnapshotPage.FromString(page)))
        return counts.plus(self._end_publishing(transaction, publisher, end))

    def _publish_step(self, transaction: lmdb.Transaction, end: _PublishingEnd) -> PublishedCounts:
        publisher = _Publisher(self, transaction, reconcile=end.reconcile)
        counts = PublishedCounts()
        cursor = transaction.cursor(self._incoming)
        for _ in range(PUBLISH_STEP_PAGES):
            if not cursor.first():
                return counts.plus(self._end_publishing(transaction, publisher, end))
            counts = counts.plus(publisher.apply(sync_pb2.SnapshotPage.FromString(cursor.value())))
            cursor.delete()
        return counts

    def _end_publishing(
        self, transaction: lmdb.Transaction, publisher: _Publisher, end: _PublishingEnd
    ) -> PublishedCounts:
        removed = publisher.sweep(end.version)
        transaction.drop(self._incoming, delete=False)
        transaction.drop(self._seen, delete=False)
        self._put_meta(
            transaction, cursor=end.cursor, staged_count=b"", resume_token=b"", publishing=b"", state_lost=b""
        )
        return PublishedCounts(removed=removed)

    # --- the view -------------------------------------------------------------

    def _unconfirmed_of(self, transaction: lmdb.Transaction, key: bytes) -> list[tuple[int, int]]:
        """Return (seq, version applied at) of the operations replayed on top of an object's base."""
        prefix = key + b"\0"
        cursor = transaction.cursor(self._unconfirmed)
        found = []
        if cursor.set_range(prefix):
            for entry, version in cursor:
                if not entry.startswith(prefix):
                    break
                found.append((unpack_position(entry[len(prefix) :]), unpack_position(version)))
        return found

    def _rebuild(self, transaction: lmdb.Transaction, key: bytes) -> None:
        """Make the view of an object anew from its base and what is replayed on top."""
        unconfirmed = self._unconfirmed_of(transaction, key)
        base = transaction.get(key, db=self._base)
        if not unconfirmed:
            if base is None:
                transaction.delete(key, db=self._objects)
            else:
                transaction.put(key, base, db=self._objects)
                transaction.delete(key, db=self._base)
            return
        record = None if base is None else _unpack_record(base)
        attributes = None if record is None else decode_trusted(record.attributes)
        attributes = self._replayed(transaction, attributes, [seq for seq, _ in unconfirmed])
        if attributes is None:
            transaction.delete(key, db=self._objects)
        else:
            version = 0 if record is None else record.version
            transaction.put(key, _RECORD.pack(version, _DIRTY) + _encoded(attributes), db=self._objects)

    def _replayed(
        self, transaction: lmdb.Transaction, attributes: Attributes | None, seqs: Sequence[int]
    ) -> Attributes | None:
        for seq in seqs:
            data = self.log.get(transaction, seq)
            if data is None:
                raise LogCorrupt(f"the operation at seq {seq} is still needed and not in the log", seq=seq)
            attributes = replay(attributes, decode_operation(data))
        return attributes

    def trim(self, may_go: Any, count_max: int) -> int:
        """Trim settled operations from the oldest on while *may_go* (operation) holds; return how many went."""

        def work(transaction: lmdb.Transaction) -> int:
            def dispensable(seq: int, data: bytes) -> bool:
                operation = decode_operation(data)
                entry = pack_object_key(*operation.key) + b"\0" + pack_position(seq)
                return transaction.get(entry, db=self._unconfirmed) is None and bool(may_go(operation))

            trimmed = self.log.trim(transaction, may_go=dispensable, count_max=count_max)
            for seq in trimmed:
                transaction.delete(pack_position(seq), db=self._outcomes)
            return len(trimmed)

        return self.environment.write(work)


class _PublishingEnd(NamedTuple):
    """How a publication ends: what to remember, and whether what the download lacks is removed."""

    cursor: bytes
    version: int
    reconcile: bool

    def pack(self) -> bytes:
        return _RECORD.pack(self.version, self.reconcile) + self.cursor

    @classmethod
    def unpack(cls, data: bytes) -> _PublishingEnd:
        version, reconcile = _RECORD.unpack_from(data)
        return cls(data[_RECORD.size :], version, bool(reconcile))


class _Publisher:
    """Puts pages into the view, in one transaction."""

    def __init__(self, storage: Storage, transaction: lmdb.Transaction, *, reconcile: bool) -> None:
        self._storage = storage
        self._transaction = transaction
        self._reconcile = reconcile
        stat = transaction.stat
        self._all_clean = stat(storage._unconfirmed)["entries"] == 0
        # A reconciliation removes what it did not bring. An empty replica has nothing to remove.
        self._track_seen = reconcile and bool(
            stat(storage._seen)["entries"] or stat(storage._objects)["entries"] or stat(storage._base)["entries"]
        )

    def apply(self, page: sync_pb2.SnapshotPage) -> PublishedCounts:
        """Put one page into the view."""
        removed = 0
        clean = []
        seen = []
        for snapshot in page.snapshots:
            key = pack_object_key(snapshot.entity, snapshot.id)
            if self._track_seen:
                seen.append((key, b""))
            record = _RECORD.pack(snapshot.version, 0) + snapshot.attributes
            if self._all_clean:
                if self._is_news(key, record, self._storage._objects):
                    clean.append((key, record))
            else:
                self._apply_snapshot(key, snapshot.version, record)
        put_many(self._transaction, self._storage._objects, clean)
        for confirmation in page.confirmations:
            key = pack_object_key(confirmation.entity, confirmation.id)
            if self._track_seen:
                seen.append((key, b""))
            self._confirm(key, confirmation.version)
        for removal in page.removals:
            removed += self._remove(pack_object_key(removal.entity, removal.id), removal.version)
        put_many(self._transaction, self._storage._seen, seen)
        return PublishedCounts(len(page.snapshots), len(page.confirmations), removed)

    def sweep(self, version: int) -> int:
        """
        End a download of everything up to *version*: settle what it left open, and return how many objects went.

        An operation applied at or below *version* whose object did not come has left
        no trace on the server (created and deleted in between, say): it is replayed no more.
        """
        storage, transaction = self._storage, self._transaction
        stale: dict[bytes, list[bytes]] = {}
        for entry, applied in transaction.cursor(storage._unconfirmed):
            if _STILL_PENDING < applied <= pack_position(version):
                stale.setdefault(entry[: -POSITION_BYTES - 1], []).append(entry)
        for key, entries in stale.items():
            for entry in entries:
                transaction.delete(entry, db=storage._unconfirmed)
            storage._rebuild(transaction, key)
        if not self._track_seen:
            return 0
        unseen: dict[bytes, None] = {}
        for database in (storage._objects, storage._base):
            for key in transaction.cursor(database).iternext(keys=True, values=False):
                if transaction.get(key, db=storage._seen) is None:
                    unseen[key] = None
        return sum(self._remove(key, version) for key in unseen)

    def _is_news(self, key: bytes, record: bytes, database: lmdb._Database) -> bool:
        """Tell whether the record is no older than the one that is there."""
        if self._reconcile:
            return True  # perhaps of another timeline, whose versions do not compare
        present = self._transaction.get(key, db=database)
        return present is None or present[:POSITION_BYTES] <= record[:POSITION_BYTES]

    def _apply_snapshot(self, key: bytes, version: int, record: bytes) -> None:
        storage, transaction = self._storage, self._transaction
        unconfirmed = storage._unconfirmed_of(transaction, key)
        if not unconfirmed:
            if self._is_news(key, record, storage._objects):
                transaction.put(key, record, db=storage._objects)
        elif self._is_news(key, record, storage._base):
            self._drop_confirmed(key, unconfirmed, version)
            transaction.put(key, record, db=storage._base)
            storage._rebuild(transaction, key)

    def _remove(self, key: bytes, version: int) -> int:
        storage, transaction = self._storage, self._transaction
        unconfirmed = storage._unconfirmed_of(transaction, key)
        was_there = transaction.get(key, db=storage._objects) is not None
        if not unconfirmed:
            return int(transaction.delete(key, db=storage._objects))
        self._drop_confirmed(key, unconfirmed, version)
        transaction.delete(key, db=storage._base)
        storage._rebuild(transaction, key)
        return int(was_there and transaction.get(key, db=storage._objects) is None)

    def _confirm(self, key: bytes, version: int) -> None:
        """Take the state that the replica's own operations led to as the server's."""
        storage, transaction = self._storage, self._transaction
        unconfirmed = storage._unconfirmed_of(transaction, key)
        confirmed = [seq for seq, applied in unconfirmed if 0 < applied <= version]
        view = transaction.get(key, db=storage._objects)
        if not unconfirmed:
            if view is None or _unpack_record(view).version < version:
                raise StateLost(key)
            return
        if len(confirmed) == len(unconfirmed):
            # Nothing else is replayed: the view is what is confirmed.
            if view is None:
                raise StateLost(key)
            self._drop_confirmed(key, unconfirmed, version)
            transaction.put(key, _RECORD.pack(version, 0) + view[_RECORD.size :], db=storage._objects)
            transaction.delete(key, db=storage._base)
            return
        base = transaction.get(key, db=storage._base)
        attributes = None if base is None else decode_trusted(_unpack_record(base).attributes)
        attributes = storage._replayed(transaction, attributes, confirmed)
        if attributes is None:
            raise StateLost(key)
        self._drop_confirmed(key, unconfirmed, version)
        transaction.put(key, _RECORD.pack(version, 0) + _encoded(attributes), db=storage._base)
        storage._rebuild(transaction, key)

    def _drop_confirmed(self, key: bytes, unconfirmed: list[tuple[int, int]], version: int) -> None:
        for seq, applied in unconfirmed:
            if 0 < applied <= version:
                self._transaction.delete(key + b"\0" + pack_position(seq), db=self._storage._unconfirmed)


def replay(attributes: Attributes | None, operation: Operation) -> Attributes | None:
    """
    Return what an operation makes of an object (None: there is none).

    An operation that does not fit, because the server's state is no longer what its
    author saw, changes nothing here; the server decides about it.
    """
    if operation.kind is OperationKind.DELETE:
        return None
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return patch.set
    if attributes is None:
        return None
    try:
        return patch.apply(attributes)
    except InvalidValue:
        return attributes




def _unpack_record(value: bytes) -> ViewRecord:
    version, flags = _RECORD.unpack_from(value)
    return ViewRecord(version, bool(flags & _DIRTY), value[_RECORD.size :])


def _unpack_pending(seq: int, value: bytes) -> PendingOperation:
    position, size = _PENDING.unpack_from(value)
    return PendingOperation(seq, position, size, unpack_object_key(value[_PENDING.size :]))


def _encoded(attributes: Attributes) -> bytes:
    return encode(attributes) if attributes else EMPTY_MAP

