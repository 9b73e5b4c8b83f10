"""
Verification of a replica: whether what it keeps agrees with itself.

Everything stands on the operation log, whose entries have check sums: what is pending
or settled, and what is shown, is worked out once more from it and compared. One object
at a time is in memory.
"""

from __future__ import annotations

import heapq
import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from tidelog._environment import Environment
from tidelog._errors import LogCorrupt, StorageError, TidelogError, damaged, quoted
from tidelog._file_reference import may_refer_to_files
from tidelog._finding import Finding, FindingKind
from tidelog._keys import POSITION_BYTES, pack_object_key, pack_position, unpack_object_key, unpack_position
from tidelog._log import OperationLog, checked
from tidelog._operation import Operation, OperationKind, decode_operation, identity_of
from tidelog._values import Attributes, decode_map, equal
from tidelog.v1 import failure_pb2, sync_pb2
from tidelog_client._file_verification import FileVerification
from tidelog_client._meta import Meta
from tidelog_client._plans import Plans
from tidelog_client._storage import FORMAT, Outcome, PendingOperation, unpack_outcome, unpack_pending
from tidelog_client._view import View, ViewRecord, replay

# What reading something damaged may raise, whichever part of it is damaged.
_UNDECODABLE: Final = (TidelogError, ValueError, TypeError, LookupError, struct.error)

_LOG, _PENDING, _OUTCOMES = range(3)

Counts = Counter[str]


def verify_replica(path: str | Path, *, counts: Counts | None = None) -> Iterator[Finding]:
    """
    Yield what is wrong in a replica's directory. Nothing is written; programs may have it open.

    It is read as of one moment: as long as that takes, the file grows by what is written meanwhile.

    Args:
        path: The directory.
        counts: Gets how many operations, objects and so on were looked at.

    Raises:
        FormatUnsupported: The directory holds something else.
        StorageError: There is nothing in it, or it cannot be opened.
    """
    with closing(Environment.open_read_only(Path(path), format_name=FORMAT)) as environment:
        yield from findings(environment, counts)


def findings(environment: Environment, counts: Counts | None = None) -> Iterator[Finding]:
    """Yield what is wrong in an open replica."""
    try:
        yield from _Verification(environment, Counter() if counts is None else counts).run()
    except StorageError as error:
        yield Finding(FindingKind.FILE_DAMAGED, str(environment.path), "tables that can be read", str(error))


class _Verification:
    def __init__(self, environment: Environment, counts: Counts) -> None:
        database = environment.database
        self._environment = environment
        self._counts = counts
        self._log = OperationLog(environment)
        self._view = View(environment, self._log)
        self._meta = Meta(environment)
        self._positions = (database("log"), database("pending"), database("outcomes"))
        self._failures_table = database("failures")
        self._reoffers = database("reoffers")
        self._incoming = database("incoming")
        self._merging = database("merging")
        self._seen = database("seen")
        self._curtain = database("curtain")
        self._files = FileVerification(environment, self._view, counts)
        # Operations that may refer to files, by seq: those to be uploaded, and those that failed.
        self._to_upload: dict[int, bytes] = {}
        self._failed: dict[int, bytes] = {}

    def run(self) -> Iterator[Finding]:
        with self._environment.read() as transaction:
            self._transaction = transaction
            # Of an empty log all entries have left it.
            self._first = self._log_end(last=False) or self._last_seq() + 1
            self._set_aside = self._meta.positions(transaction, "set_aside")
            outcomes = map(self._outcome_at, self._set_aside)
            self._own_failures = {one.failure_id for one in outcomes if one is not None and one.failure_id}
            yield from self._operations()
            yield from self._objects()
            yield from self._failures()
            yield from self._offered_again()
            yield from self._remembered()
            yield from self._staged()
            yield from self._files.run(
                transaction,
                to_upload=self._to_upload,
                failed=self._failed,
                is_set_aside=self._was_set_aside,
            )

    # --- the log, and what became of it ---------------------------------------

    def _operations(self) -> Iterator[Finding]:
        """Go through log, pending and outcomes side by side."""
        expected_seq = self._first
        unit: list[PendingOperation] = []
        entries = heapq.merge(*map(self._at_positions, range(len(self._positions))))
        for seq, group in groupby(entries, key=itemgetter(0)):
            found = {table: value for _, table, value in group}
            if seq > expected_seq:
                where = _operations_text(expected_seq, seq - 1)
                yield _finding(FindingKind.LOG_GAP, where, "to be logged", "none")
            expected_seq = max(expected_seq, seq + 1)
            operation = None
            if _LOG in found:
                self._counts["operations"] += 1
                operation, problem = _read(seq, found[_LOG])
                if problem:
                    yield _finding(FindingKind.LOG_DAMAGED, f"operation {seq}", "as it was logged", problem)
            elif _PENDING in found or seq not in self._set_aside:
                yield _finding(FindingKind.LOG_GAP, f"operation {seq}", "to be logged", "none")
            if _PENDING in found:
                self._counts["pending"] += 1
                self._note_files(seq)
                yield from self._pending(seq, found[_PENDING], operation, unit)
            if (_PENDING in found) == (_OUTCOMES in found):
                what = "both" if _PENDING in found else "neither"
                yield _finding(FindingKind.OUTCOME_WRONG, f"operation {seq}", "either pending or settled", what)
            elif _OUTCOMES in found:
                yield from self._outcome(seq, found[_OUTCOMES])
        if unit:
            yield from _broken_group(unit[0])

    def _at_positions(self, table: int) -> Iterator[tuple[int, int, bytes]]:
        for key, value in self._transaction.cursor(self._positions[table]):
            yield unpack_position(key), table, value

    def _pending(
        self, seq: int, value: bytes, operation: Operation | None, unit: list[PendingOperation]
    ) -> Iterator[Finding]:
        where = f"pending operation {seq}"
        try:
            pending = unpack_pending(seq, value)
        except _UNDECODABLE as error:
            yield _finding(FindingKind.ENTRY_UNREADABLE, where, "its place and its object", repr(error))
            return
        if operation is not None:
            group = operation.group
            place = (group.position, group.size) if group is not None else (0, 0)
            if (*place, operation.key) != pending[1:]:
                expected = f"place {place} on {_name(operation.key)}, as in the log"
                found = f"place {pending[1:3]} on {_name(pending.key)}"
                yield _finding(FindingKind.PENDING_WRONG, where, expected, found)
        key = pack_object_key(*pending.key)
        if not self._view.is_needed(self._transaction, key, seq):
            yield _finding(FindingKind.REPLAY_WRONG, where, f"to be replayed on {_name(pending.key)}", "not")
        # Members of a commit group follow each other, from the first to the last.
        if unit and (pending.seq, *pending[1:3]) != (
            unit[-1].seq + 1,
            unit[-1].group_position + 1,
            unit[-1].group_size,
        ):
            yield from _broken_group(unit[0])
            unit.clear()
        if not unit and pending.group_position:
            yield from _broken_group(pending)
            return
        if pending.group_size:
            unit.append(pending)
        if pending.group_position + 1 >= pending.group_size:
            unit.clear()

    def _outcome(self, seq: int, value: bytes) -> Iterator[Finding]:
        where = f"outcome of operation {seq}"
        try:
            outcome = unpack_outcome(value)
        except _UNDECODABLE as error:
            yield _finding(FindingKind.ENTRY_UNREADABLE, where, "a version or a failure", repr(error))
            return
        if outcome.failure_id:
            if self._transaction.get(outcome.failure_id.encode(), db=self._failures_table) is None:
                yield _finding(FindingKind.OUTCOME_WRONG, where, f"the failure {outcome.failure_id}", "none")
        elif not outcome.version:
            yield _finding(FindingKind.OUTCOME_WRONG, where, "a version or a failure", "neither")

    # --- objects --------------------------------------------------------------

    def _objects(self) -> Iterator[Finding]:
        for key in self._view.all_keys(self._transaction):
            self._counts["objects"] += 1
            try:
                yield from self._object(key, _name(unpack_object_key(key)))
            except _UNDECODABLE as error:
                yield _finding(FindingKind.ENTRY_UNREADABLE, f"object {key!r}", "one that can be decoded", repr(error))

    def _object(self, key: bytes, where: str) -> Iterator[Finding]:
        view, transaction = self._view, self._transaction
        unconfirmed = view.unconfirmed(transaction, key)
        shown, base = view.prepared(transaction, key), view.base(transaction, key)
        present = None if shown is None else decode_map(shown.attributes)
        if not unconfirmed:
            if base is not None:
                yield _finding(FindingKind.BASE_WRONG, where, "no base, for nothing is replayed", "one")
            if shown is not None and shown.dirty:
                yield _finding(FindingKind.VIEW_DIFFERS, where, "to be clean, for nothing is replayed", "dirty")
            return
        attributes = None if base is None else decode_map(base.attributes)
        created = damaged = False
        for seq, version in unconfirmed:
            problem = self._replay_problem(key, seq, version, base)
            if problem:
                yield _finding(FindingKind.REPLAY_WRONG, f"operation {seq}, on {where}", *problem)
            operation = self._logged(seq)
            if operation is None:
                damaged = True
                continue
            if pack_object_key(*operation.key) != key:
                expected = f"an operation on {where}"
                yield _finding(
                    FindingKind.REPLAY_WRONG, f"operation {seq}", expected, f"one on {_name(operation.key)}"
                )
            created = created or operation.kind is OperationKind.CREATE
            attributes = replay(attributes, operation)
        if not damaged:  # else that is named for itself
            version = 0 if base is None or created else base.version
            expected_record = None if attributes is None else (version, True, attributes)
            found_record = None if shown is None or present is None else (shown.version, shown.dirty, present)
            if not _same(expected_record, found_record):
                yield _finding(
                    FindingKind.VIEW_DIFFERS, where, _record_text(expected_record), _record_text(found_record)
                )

    def _replay_problem(self, key: bytes, seq: int, version: int, base: ViewRecord | None) -> tuple[str, str] | None:
        """Return what is wrong with an operation being replayed: expected, found."""
        position = pack_position(seq)
        if self._transaction.get(position, db=self._positions[_LOG]) is None:
            return ("to be logged", "none")
        is_pending = self._transaction.get(position, db=self._positions[_PENDING]) is not None
        if not version:
            if not self._view.is_open(self._transaction, key, seq):
                return ("the version 0 in full", "a part of it")
            is_open = is_pending or self._transaction.get(position, db=self._reoffers) is not None
            return None if is_open else ("to be pending", "not")
        outcome = self._outcome_at(seq) or Outcome(0, "")
        # An outcome of the new timeline may be here before its state is.
        is_rebasing = bool(self._meta.get(self._transaction, "next_timeline"))
        if is_pending or (outcome.version != version and not is_rebasing):
            found = "pending" if is_pending else f"version {outcome.version}"
            return (f"to be applied at version {version}", found)
        if base is not None and version <= base.version and not is_rebasing:
            return (f"a version above the base's, {base.version}", f"version {version}")
        return None

    def _was_set_aside(self, seq: int) -> bool:
        """Tell whether an operation failed here because it, or one of its commit group, cannot be read."""
        outcome = self._outcome_at(seq)
        return outcome is not None and outcome.failure_id in self._own_failures

    def _note_files(self, seq: int) -> None:
        """Note an operation if it may refer to files."""
        data = self._log.stored(self._transaction, seq)
        if may_refer_to_files(data):
            self._to_upload[seq] = data

    def _outcome_at(self, seq: int) -> Outcome | None:
        """Return what became of an operation; None if that is not noted, or cannot be read."""
        value = self._transaction.get(pack_position(seq), db=self._positions[_OUTCOMES])
        try:
            return None if value is None else unpack_outcome(value)
        except _UNDECODABLE:
            return None

    def _logged(self, seq: int) -> Operation | None:
        try:
            data = self._log.get(self._transaction, seq)
        except LogCorrupt:
            return None
        return None if data is None else decode_operation(data)

    # --- failures -------------------------------------------------------------

    def _failures(self) -> Iterator[Finding]:
        for key, value in self._transaction.cursor(self._failures_table):
            self._counts["failures"] += 1
            where = f"failure {key.decode(errors='replace')}"
            try:
                failure = failure_pb2.SynchronizationFailure.FromString(value)
            except DecodeError:
                yield _finding(FindingKind.ENTRY_UNREADABLE, where, "a record", "bytes that are none")
                continue
            if failure.id.encode() != key:
                yield _finding(FindingKind.FAILURE_WRONG, where, "its own id", failure.id)
            if failure.id in self._own_failures:
                continue  # what is left of its operation says nothing
            operations = failure.group_operations or [failure.operation]
            if not failure.operation or failure.operation not in operations:
                yield _finding(FindingKind.FAILURE_WRONG, where, "the refused operation", "none")
            for data in operations:
                seq, _nonce = identity_of(data)
                outcome = self._outcome_at(seq)
                if outcome is None and seq < self._first:
                    continue  # it has left the log
                if may_refer_to_files(data):
                    self._failed[seq] = data
                if outcome is None or outcome.failure_id != failure.id:
                    expected = f"operation {seq} to be refused with it"
                    found = "no outcome" if outcome is None else str(outcome)
                    yield _finding(FindingKind.FAILURE_WRONG, where, expected, found)

    def _offered_again(self) -> Iterator[Finding]:
        for key in self._transaction.cursor(self._reoffers).iternext(keys=True, values=False):
            self._note_files(unpack_position(key))
            log, _, outcomes = self._positions
            if any(self._transaction.get(key, db=table) is None for table in (log, outcomes)):
                where = f"operation {unpack_position(key)}, to be offered again"
                yield _finding(FindingKind.OUTCOME_WRONG, where, "to be logged and settled", "not")

    # --- what is remembered ---------------------------------------------------

    def _remembered(self) -> Iterator[Finding]:
        meta, transaction = self._meta, self._transaction
        replica_id = meta.get(transaction, "replica_id")
        try:
            uuid.UUID(replica_id.decode())
        except ValueError:
            yield _finding(FindingKind.META_WRONG, "replica id", "a UUID", repr(replica_id))
        last_seq, last = self._last_seq(), self._log_end(last=True)
        while last_seq in self._set_aside:
            last_seq -= 1
        if last and last != last_seq:
            yield _finding(FindingKind.LOG_GAP, "end of the log", f"operation {last_seq}", f"operation {last}")
        yield from self._newest_settled()
        try:
            Plans.decode(meta.get(transaction, "plans"))
        except (DecodeError, *_UNDECODABLE) as error:
            yield _finding(FindingKind.META_WRONG, "plans", "what the server does with each entity", repr(error))

    def _newest_settled(self) -> Iterator[Finding]:
        last_seq = self._last_seq()
        value = self._meta.get(self._transaction, "newest_settled")
        newest, nonce = unpack_position(value[:POSITION_BYTES]), unpack_position(value[POSITION_BYTES:])
        cursor = self._transaction.cursor(self._positions[_OUTCOMES])
        more = cursor.last()
        # What failed here alone the server knows nothing of.
        while more and (outcome := self._outcome_at(unpack_position(cursor.key()))) is not None:
            if outcome.failure_id not in self._own_failures:
                break
            more = cursor.prev()
        settled = unpack_position(cursor.key()) if more else 0
        where = "newest settled operation"
        if newest > last_seq or newest < settled:
            expected = f"one of {settled} to {last_seq}"
            yield _finding(FindingKind.META_WRONG, where, expected, f"operation {newest}")
        elif newest and (operation := self._logged(newest)) is not None and operation.nonce != nonce:
            expected = f"nonce {operation.nonce} of operation {newest}"
            yield _finding(FindingKind.META_WRONG, where, expected, f"nonce {nonce}")

    def _staged(self) -> Iterator[Finding]:
        counts = dict.fromkeys(("count", "bytes"), 0)
        for name, table in (("incoming", self._incoming), ("merging", self._merging)):
            for key, page in self._transaction.cursor(table):
                where = f"{name} page {unpack_position(key)}"
                try:
                    message = sync_pb2.SnapshotPage.FromString(page)
                except DecodeError:
                    yield _finding(FindingKind.ENTRY_UNREADABLE, where, "a page", "bytes that are none")
                    continue
                if table is self._incoming:
                    counts["bytes"] += len(page)
                    counts["count"] += len(message.snapshots) + len(message.removals) + len(message.confirmations)
        is_publishing = bool(self._meta.get(self._transaction, "publishing"))
        is_merging = bool(self._meta.get(self._transaction, "merge_end"))
        for name, counted in counts.items():
            noted = unpack_position(self._meta.get(self._transaction, f"staged_{name}"))
            # Pages that are published already are gone, and counted until all are.
            if counted > noted or (counted < noted and not is_publishing):
                yield _finding(FindingKind.STAGED_WRONG, f"staged {name}", f"{noted}", f"{counted}")
        if self._transaction.stat(self._seen)["entries"] and not is_publishing:
            yield _finding(FindingKind.STAGED_WRONG, "seen objects", "none, for nothing is being published", "some")
        is_reconciling = bool(self._meta.get(self._transaction, "state_lost"))
        is_drawn = self._transaction.stat(self._curtain)["entries"] > 0
        if is_drawn and not (is_publishing or is_merging or is_reconciling):
            yield _finding(FindingKind.STAGED_WRONG, "the curtain", "open, for nothing is being published", "drawn")

        for key, value in self._transaction.cursor(self._curtain):
            try:
                if len(value) < POSITION_BYTES:
                    raise damaged("the version of its base")
                record = self._view.get(self._transaction, key)
                if record is not None:
                    decode_map(record.attributes)
            except _UNDECODABLE as error:
                where = f"what hangs in front of the object {key!r}"
                yield _finding(FindingKind.ENTRY_UNREADABLE, where, "one that can be decoded", repr(error))

    def _last_seq(self) -> int:
        """Return the position of the newest operation ever logged, as the replica remembers it."""
        return unpack_position(self._meta.get(self._transaction, "last_seq"))

    def _log_end(self, *, last: bool) -> int:
        """Return the position of the newest entry of the log, or of the oldest; 0 if there is none."""
        cursor = self._transaction.cursor(self._positions[_LOG])
        return unpack_position(cursor.key()) if (cursor.last() if last else cursor.first()) else 0


# Version, whether operations are replayed, attributes; None: there is no object.
_Record = tuple[int, bool, Attributes] | None


def _same(expected: _Record, found: _Record) -> bool:
    if expected is None or found is None:
        return expected is found
    return expected[:2] == found[:2] and equal(expected[2], found[2])


def _record_text(record: _Record) -> str:
    if record is None:
        return "no object"
    version, dirty, attributes = record
    return f"version {version}, {'dirty' if dirty else 'clean'}, {quoted(attributes)}"


def _read(seq: int, entry: bytes) -> tuple[Operation | None, str]:
    """Return the operation of a log entry, or None and what is wrong with it."""
    try:
        operation = decode_operation(checked(seq, entry))
        operation.decoded_patch()
    except TidelogError as error:
        return None, str(error)
    return (operation, "") if operation.seq == seq else (None, f"operation {operation.seq}")


def _broken_group(first: PendingOperation) -> Iterator[Finding]:
    where = f"commit group of the pending operation {first.seq}"
    yield _finding(
        FindingKind.PENDING_WRONG, where, f"its {first.group_size} operations one after the other", "others"
    )


def _finding(kind: FindingKind, where: str, expected: str, found: str) -> Finding:
    return Finding(kind, where, expected, found)


def _name(key: tuple[str, str]) -> str:
    return f"{key[0]} {key[1]!r}"


def _operations_text(first: int, last: int) -> str:
    return f"operation {first}" if first == last else f"operations {first} to {last}"
