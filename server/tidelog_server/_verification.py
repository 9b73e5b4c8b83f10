"""
Verification of what a server keeps of one tenant. No I/O.

Everything is said more than once in a store: objects are what the change log makes of
them, indexes follow from objects, marks of settled operations from changes and failures.
So whatever was damaged or lost contradicts something else, and is named.

An object is followed through its changes from the newest one back: each is undone by
its before-image, and done again by its patch, which must lead to where it came from. So
one object at a time is in memory, and one bit for each change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Final, Protocol

import uuid_utils
from google.protobuf.message import DecodeError

from tidelog._errors import TidelogError, quoted
from tidelog._failure import FailureReason
from tidelog._file_reference import may_refer_to_files
from tidelog._finding import Finding, FindingKind
from tidelog._keys import ObjectKey
from tidelog._operation import OperationKind, decode_operation, identity_of
from tidelog._patch import decode_patch
from tidelog._schema import Schema
from tidelog._values import Attributes, decode_map, decode_trusted, equal
from tidelog.v1 import failure_pb2
from tidelog_server import _account, _runs
from tidelog_server._file_verification import FILE_TABLES, FileVerification
from tidelog_server._formers import is_note_of_forgotten, read_note
from tidelog_server._history import attributes_before, kept_changes
from tidelog_server._indexes import (
    TABLES,
    Written,
    by_version_prefix,
    complete_since,
    dependents_prefix,
    indexed_entities,
    is_twin,
    left_at,
    rebuilt,
    rebuilt_entries,
    split_dependent,
    split_entry,
)
from tidelog_server._records import (
    NO_REPLICA,
    REPLICA_ID_BYTES,
    Change,
    Head,
    ObjectState,
    ReplicaState,
    Settled,
)

# What reading something damaged may raise, whichever part of it is damaged.
DAMAGE: Final = (TidelogError, ValueError, TypeError, LookupError, AttributeError, OverflowError)

# What an operation that cannot be read is refused for.
_UNREADABLE_REASONS: Final = frozenset(
    reason.number for reason in (FailureReason.MALFORMED, FailureReason.TOO_LARGE, FailureReason.SCHEMA_MISMATCH)
)

Counts = Counter[str]


class Records(Protocol):
    """
    All that a store keeps of one tenant, as of one moment, each table in the order of its keys.

    What cannot be decoded is passed over, as if it was not there.
    """

    def head(self) -> Head:
        """Return where the tenant's history stands."""
        ...

    def collected(self) -> int:
        """Return the highest version collected, up to which no change is kept."""
        ...

    def commits(self) -> Iterable[tuple[int, bytes]]:
        """Iterate over versions that ended a commit, and its id."""
        ...

    def commit_end(self, version: int) -> int:
        """Return at which version the commit ended that a version belongs to; 0 if it is not known."""
        ...

    def changes(self) -> Iterable[Change]:
        """Iterate over the changes that are kept."""
        ...

    def change(self, version: int) -> Change | None:
        """Return one change, or None."""
        ...

    def objects(self) -> Iterable[tuple[ObjectKey, ObjectState]]:
        """Iterate over objects, tombstones too."""
        ...

    def state(self, key: ObjectKey) -> ObjectState | None:
        """Return one object, or None."""
        ...

    def versions(self) -> Iterable[tuple[str, int, str]]:
        """Iterate over (entity, version, id): the objects by their latest version."""
        ...

    def id_at(self, entity: str, version: int) -> str | None:
        """Return the id of the object that is listed by a version, or None."""
        ...

    def indexes(self) -> Iterable[tuple[bytes, bytes]]:
        """Iterate over the table of indexes."""
        ...

    def index(self, key: bytes) -> bytes | None:
        """Return one value of the table of indexes, or None."""
        ...

    def replicas(self) -> Iterable[tuple[bytes, ReplicaState]]:
        """Iterate over replicas."""
        ...

    def replica(self, replica: bytes) -> ReplicaState | None:
        """Return what is known of one replica, or None."""
        ...

    def settling_replicas(self) -> Iterable[bytes]:
        """Iterate over the ids of replicas that have settled operations."""
        ...

    def settled(self, replica: bytes) -> Iterable[tuple[int, Settled]]:
        """Iterate over the settled operations of a replica: seq, outcome."""
        ...

    def outcome(self, replica: bytes, seq: int) -> Settled | None:
        """Return what became of one operation, or None."""
        ...

    def failures(self) -> Iterable[tuple[bytes, bytes]]:
        """Iterate over failures: id, serialized record."""
        ...

    def failure(self, failure_id: bytes) -> bytes | None:
        """Return one serialized record, or None."""
        ...

    def refused(self) -> Iterable[tuple[bytes, ObjectKey, bytes]]:
        """Iterate over refused creations: replica, key of the object, id of the failure."""
        ...

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        """Return the id of the failure because of which a replica could not create an object, or None."""
        ...


def findings(
    records: Records, schema: Schema | None, counts: Counts | None = None, *, has_referrers: bool = True
) -> Iterator[Finding]:
    """
    Yield what is wrong.

    Args:
        records: One tenant's.
        schema: What the table of indexes was made by. None: it is being made anew, and is not looked at.
        counts: Gets how many of each were looked at.
        has_referrers: Whether it is on record who refers to which file. Otherwise that is not looked at.
    """
    yield from _Verification(records, schema, Counter() if counts is None else counts, has_referrers).run()


class _Verification:
    def __init__(
        self,
        records: Records,
        schema: Schema | None,
        counts: Counts,
        has_referrers: bool,  # noqa: FBT001 - as `findings` is told
    ) -> None:
        self._records = records
        self._files = FileVerification(records) if has_referrers else None
        self._schema = schema
        self._counts = counts
        self._head = records.head().version
        self._indexed = indexed_entities(schema) if schema is not None else frozenset()
        self._since = complete_since(records.index)
        self._settling = _runs.present(records.index)
        self._oldest = records.collected() + 1
        self._failure_count = _account.failure_count(records.index)
        self._reached = _Reached(self._oldest, 0)
        self._expected_of = lru_cache(maxsize=1)(self._entries_of)

    def run(self) -> Iterator[Finding]:
        yield from self._changes()
        yield from self._commits()
        for key, state in self._records.objects():
            self._counts["objects"] += 1
            yield from self._object(key, state)
        yield from self._orphans()
        yield from self._versions()
        yield from self._indexes()
        yield from self._settled()
        yield from self._failures()
        yield from self._refused()

    # --- the change log -------------------------------------------------------

    def _changes(self) -> Iterator[Finding]:
        newest = self._oldest - 1
        count = 0
        if newest > self._head:
            expected = f"no version above {self._head}, that of the head"
            yield _finding(FindingKind.HEAD_WRONG, "highest version collected", expected, f"version {newest}")
        for change in self._records.changes():
            self._counts["changes"] += 1
            count += 1
            version = change.version
            if version < self._oldest:
                expected = f"to be gone, like all up to version {self._oldest - 1}"
                yield _finding(FindingKind.HEAD_WRONG, f"change {version}", expected, "the change")
                continue
            if version > newest + 1:
                yield _finding(
                    FindingKind.CHANGE_MISSING, _changes_text(newest + 1, version - 1), "to be kept", "none"
                )
            newest = version
            yield from self._outcome_of(change)
        self._reached = _Reached(self._oldest, count)
        if newest != self._head:
            expected = f"version {newest}, that of the newest change"
            yield _finding(FindingKind.HEAD_WRONG, "head", expected, f"version {self._head}")

    def _outcome_of(self, change: Change) -> Iterator[Finding]:
        where = f"change {change.version}"
        if change.failure:
            if self._records.failure(change.failure) is None:
                yield _finding(FindingKind.FAILURE_WRONG, where, f"the failure {_uuid(change.failure)}", "none")
        elif change.replica != NO_REPLICA:
            mark = self._records.outcome(change.replica, change.seq)
            if mark is None and self._is_retired(change.replica):
                return
            if change.by_hook and (mark is not None or self._is_forgotten(change.replica, change.seq)):
                return  # the operation was applied at an earlier version
            if mark is None or mark.version != change.version:
                yield _finding(
                    FindingKind.SETTLED_WRONG,
                    _operation_text(change.replica, change.seq),
                    f"applied at version {change.version}, as the change says",
                    "no outcome" if mark is None else _outcome_text(mark),
                )

    def _is_forgotten(self, replica: bytes, seq: int) -> bool:
        """Tell whether an outcome may be missing, because the store says that it was forgotten."""
        if self._is_retired(replica) or seq <= _account.forgotten_through(self._records.index, replica):
            return True
        if self._failure_count is not None:
            return False
        # Before there was an account they were forgotten from the oldest operation on. What came again
        # after that has an outcome anew, and those behind it need not have come again too.
        kept = (one for one, mark in self._records.settled(replica) if not self._is_in_doubt(mark))
        return next(kept, seq + 1) > seq

    def _is_retired(self, replica: bytes) -> bool:
        state = self._records.replica(replica)
        return state is not None and state.retired

    def _commits(self) -> Iterator[Finding]:
        newest = (0, b"")
        for version, commit_id in self._records.commits():
            newest = (version, commit_id)
            if version > self._head:
                expected = f"no version above {self._head}"
                yield _finding(FindingKind.HEAD_WRONG, f"commit {version}", expected, f"version {version}")
        head = self._records.head()
        if newest[0] <= self._head and newest != head:
            expected = f"version {newest[0]}, commit {newest[1].hex()}"
            yield _finding(
                FindingKind.HEAD_WRONG, "head", expected, f"version {head.version}, commit {head.commit_id.hex()}"
            )

    def _orphans(self) -> Iterator[Finding]:
        for change in self._records.changes():
            if self._oldest <= change.version <= self._head and change.version not in self._reached:
                expected = f"to lead to {_name(change.key)}"
                yield _finding(
                    FindingKind.CHANGE_ORPHANED, f"change {change.version}", expected, "none that follows it"
                )

    # --- objects --------------------------------------------------------------

    def _object(self, key: ObjectKey, state: ObjectState) -> Iterator[Finding]:
        listed = self._records.id_at(key[0], state.version)
        if listed != key[1]:
            found = "none" if listed is None else f"that of {listed!r}"
            yield _finding(FindingKind.BY_VERSION_WRONG, _name(key), f"an entry at version {state.version}", found)
        attributes: Attributes | None = None
        if not state.deleted:
            try:
                attributes = decode_map(state.attributes)
            except DAMAGE as error:
                yield _finding(FindingKind.ENTRY_UNREADABLE, _name(key), "attributes", str(error))
                self._reach_all(key, state)
                return
        elif state.attributes:
            yield _finding(FindingKind.STATE_DIFFERS, _name(key), "a tombstone without attributes", "attributes")
        yield from self._chain(key, state, attributes)
        if attributes is not None and self._files is not None and may_refer_to_files(state.attributes):
            yield from self._files.of_object(key, attributes)
        if key[0] in self._indexed:
            yield from self._index(key)

    def _chain(self, key: ObjectKey, state: ObjectState, attributes: Attributes | None) -> Iterator[Finding]:
        """Go back through an object's changes, as far as they are kept."""
        version, after = state.version, attributes
        is_present_incarnation = True
        if not 0 < version <= self._head:
            expected = f"a version of 1 to {self._head}"
            yield _finding(FindingKind.STATE_DIFFERS, _name(key), expected, f"version {version}")
            return
        while version >= self._oldest:
            where = f"{_name(key)}, change {version}"
            change = self._records.change(version)
            if change is None:
                yield _finding(FindingKind.CHAIN_BROKEN, where, "the change", "none")
                return
            if change.key != key:
                expected = f"a change of {_name(key)}"
                yield _finding(FindingKind.CHAIN_BROKEN, where, expected, f"one of {_name(change.key)}")
                return
            self._reached.add(version)
            if not 0 <= change.previous < version:
                yield _finding(FindingKind.CHAIN_BROKEN, where, "a lower version before it", str(change.previous))
                return
            if is_present_incarnation:
                yield from _author(state, change)
                is_present_incarnation = change.kind is not OperationKind.CREATE
            try:
                before = attributes_before(change, after)
                difference = _difference(change, before, after)
            except DAMAGE as error:
                yield _finding(FindingKind.ENTRY_UNREADABLE, where, "what it did", str(error))
                return
            if difference is not None:
                yield _finding(FindingKind.STATE_DIFFERS, where, *difference)
                self._reach_all(key, state)
                return
            version, after = change.previous, before
        if version == 0 and after is not None:
            yield _finding(FindingKind.CHAIN_BROKEN, _name(key), "a creation as its first change", "another one")

    def _reach_all(self, key: ObjectKey, state: ObjectState) -> None:
        """Pass over the rest of a chain in which something was found."""
        for change in self._falling(state):
            if change.key != key or not self._oldest <= change.version <= self._head:
                return
            self._reached.add(change.version)

    def _falling(self, state: ObjectState) -> Iterator[Change]:
        """Yield the changes that led to an object, the newest first, as long as each leads further back."""
        last = state.version + 1
        for change in kept_changes(state.version, self._records.change):
            if change.version >= last:
                return
            last = change.version
            yield change

    def _versions(self) -> Iterator[Finding]:
        for entity, version, id_ in self._records.versions():
            state = self._records.state((entity, id_))
            if state is None or state.version != version:
                found = "no such object" if state is None else f"it at version {state.version}"
                where = f"entry by version of {_name((entity, id_))}"
                yield _finding(FindingKind.BY_VERSION_WRONG, where, f"the object at version {version}", found)

    # --- indexes --------------------------------------------------------------

    def _entries_of(self, key: ObjectKey) -> dict[bytes, bytes]:
        """Return the entries that follow from what an object holds now."""
        state = self._records.state(key)
        if state is None or self._schema is None or key[0] not in self._indexed:
            return {}
        try:
            attributes = None if state.deleted else decode_trusted(state.attributes)
            return rebuilt_entries(self._schema, key, attributes, (Written(key, None, attributes, state.version),))
        except DAMAGE:
            return {}  # the object is named for itself

    def _index(self, key: ObjectKey) -> Iterator[Finding]:
        """Compare the table of indexes with an object."""
        for entry, value in self._expected_of(key).items():
            present = self._records.index(entry)
            if present != value:
                found = "none" if present is None else repr(present)
                yield _finding(FindingKind.INDEX_WRONG, f"index of {_name(key)}, {entry!r}", repr(value), found)
        for by_version, version in self._left(key).items():
            told = left_at(by_version, key[1], self._records.index)
            if told < version:
                yield _finding(
                    FindingKind.INDEX_WRONG,
                    f"index of {_name(key)}, {by_version!r}",
                    f"that it lost the value at version {version}",
                    f"version {told}" if told else "none",
                )

    def _left(self, key: ObjectKey) -> dict[bytes, int]:
        """
        Return the values that an object had, each with the version at which it lost it, as far as somebody may ask.

        Nobody asks for what was there for a part of a commit only, or before the table was made.
        """
        entity = self._schema.entity(key[0]) if self._schema is not None else None
        state = self._records.state(key)
        lost: dict[bytes, int] = {}
        if entity is None or state is None or not entity.indexes:
            return lost
        try:
            after = None if state.deleted else decode_trusted(state.attributes)
            held = _values(key[0], entity.indexes, after)
            for change in self._falling(state):
                if change.version <= self._since:
                    break
                before = attributes_before(change, after)
                if before is not None and self._records.commit_end(change.previous) < change.version:
                    for by_version in _values(key[0], entity.indexes, before) - held:
                        lost.setdefault(by_version, change.version)
                after = before
        except DAMAGE:
            pass  # the change is named for itself
        return lost

    def _indexes(self) -> Iterator[Finding]:
        for key, value in self._records.indexes():
            self._counts["index entries"] += 1
            expected = self._index_entry(key, value)
            if expected:
                yield _finding(FindingKind.INDEX_WRONG, f"index entry {key!r}", expected, repr(value))
        if self._since > self._head:
            yield _finding(FindingKind.INDEX_WRONG, "index", f"to be made by version {self._head}", f"{self._since}")

    def _index_entry(self, key: bytes, value: bytes) -> str:
        """Return what was to be expected in place of an entry; empty if it is right."""
        if key[:1] in TABLES:
            if self._schema is None:
                return ""
            try:
                entry = split_entry(key, value)
            except DAMAGE:
                return "an entry of its table"
            if entry.left_at:
                told = left_at(entry.by_version, entry.key[1], self._records.index)
                return "" if told == entry.left_at <= self._head else "an entry that says what the one beside it says"
            return "" if self._expected_of(entry.key).get(key) == value else f"what follows from {_name(entry.key)}"
        if key[:1] in FILE_TABLES:
            return self._files.expected(key, value) if self._files is not None else ""
        if is_twin(key):
            noted = read_note(key, value)
            if noted is None:
                return "" if is_note_of_forgotten(key, value) else "what a copy of a replica settled"
            return next((finding.expected for finding in self._mark("", noted.settled)), "")
        if _runs.is_entry(key):
            return "" if _runs.is_in_order(key, value, self._settling) else "how far settling came in which run"
        if _account.is_entry(key):
            return "" if _account.is_in_order(key, value, self._ranges) else "what is on record, or forgotten"
        pair = split_dependent(key)
        if pair is None:
            return "" if key in rebuilt(0) else "an entry of a known table"
        cause, failure_id = pair
        record = self._failure(failure_id)
        if record is None or _id(record.cause_failure_id) != cause or self._records.failure(cause) is None:
            return f"the failure {_uuid(failure_id)} because of {_uuid(cause)}"
        return ""

    def _ranges(self, replica: bytes) -> Sequence[tuple[int, int]]:
        state = self._records.replica(replica)
        return state.settled_ranges if state is not None else ()

    # --- outcomes, failures ---------------------------------------------------

    def _settled(self) -> Iterator[Finding]:
        for replica in self._records.settling_replicas():
            if self._records.replica(replica) is None:
                where = f"outcomes of replica {_uuid(replica)}"
                yield _finding(FindingKind.SETTLED_WRONG, where, "the replica to be known", "no such replica")
        for replica, state in self._records.replicas():
            self._counts["replicas"] += 1
            ranges: list[tuple[int, int]] = []
            newest = (0, 0)
            for seq, mark in self._records.settled(replica):
                self._counts["outcomes"] += 1
                newest = (seq, mark.nonce)
                ranges[-1:] = _extended(ranges[-1:], seq)
                yield from self._mark(_operation_text(replica, seq), mark)
            for first, last in _without(state.settled_ranges, ranges):
                if self._is_forgotten(replica, last):
                    continue
                where = _operations_text(replica, first, last)
                yield _finding(FindingKind.SETTLED_WRONG, where, "an outcome, as the replica's state says", "none")
            for first, last in _without(ranges, state.settled_ranges):
                where = _operations_text(replica, first, last)
                yield _finding(FindingKind.SETTLED_WRONG, where, "no outcome", "one that the replica's state lacks")
            if state.settled_ranges and state.settled_ranges[-1][1] > newest[0]:
                newest = (state.settled_ranges[-1][1], state.newest_nonce)  # forgotten, its nonce with it
            if newest != (state.newest_seq, state.newest_nonce):
                expected = f"operation {newest[0]}, nonce {newest[1]}, as its newest"
                found = f"operation {state.newest_seq}, nonce {state.newest_nonce}"
                yield _finding(FindingKind.SETTLED_WRONG, f"replica {_uuid(replica)}", expected, found)

    def _mark(self, where: str, mark: Settled) -> Iterator[Finding]:
        if mark.failure_id:
            if self._records.failure(mark.failure_id) is None:
                yield _finding(FindingKind.SETTLED_WRONG, where, f"the failure {_uuid(mark.failure_id)}", "none")
            if mark.version:
                expected, found = "to be refused, and not applied", f"applied at version {mark.version} too"
                yield _finding(FindingKind.SETTLED_WRONG, where, expected, found)
        elif not 0 < mark.version <= self._head:
            expected = f"a version of 1 to {self._head}"
            yield _finding(FindingKind.SETTLED_WRONG, where, expected, _outcome_text(mark))

    def _failures(self) -> Iterator[Finding]:
        count = 0
        for failure_id, data in self._records.failures():
            self._counts["failures"] += 1
            count += 1
            where = f"failure {_uuid(failure_id)}"
            record = _parsed(data)
            if record is None:
                yield _finding(FindingKind.ENTRY_UNREADABLE, where, "a record", "bytes that are none")
                continue
            if _id(record.id) != failure_id:
                yield _finding(FindingKind.FAILURE_WRONG, where, "its own id", record.id)
            yield from self._cause(failure_id, where, record)
            if not record.payload_removed:
                yield from self._payload(failure_id, where, record)
            if self._files is not None:
                yield from self._files.of_failure(where, failure_id, data)
        if self._failure_count not in (None, count):
            expected = f"{self._failure_count} of them, as they were counted"
            yield _finding(FindingKind.FAILURE_WRONG, "failures", expected, str(count))

    def _cause(self, failure_id: bytes, where: str, record: failure_pb2.SynchronizationFailure) -> Iterator[Finding]:
        if not record.cause_failure_id:
            return
        cause = _id(record.cause_failure_id)
        if cause is None or self._records.failure(cause) is None:
            expected = f"its cause, the failure {record.cause_failure_id}"
            yield _finding(FindingKind.FAILURE_WRONG, where, expected, "none")
        elif self._records.index(dependents_prefix(cause) + failure_id) is None:
            expected = f"an entry under its cause, the failure {record.cause_failure_id}"
            yield _finding(FindingKind.INDEX_WRONG, where, expected, "none")

    def _payload(self, failure_id: bytes, where: str, record: failure_pb2.SynchronizationFailure) -> Iterator[Finding]:
        operations = _operations_of(record)
        if record.operation not in operations:
            yield _finding(FindingKind.FAILURE_WRONG, where, "the refused operation in its commit group", "others")
        try:
            decode_operation(record.operation).decoded_patch()
        except DAMAGE as error:
            if record.reason not in _UNREADABLE_REASONS:
                yield _finding(FindingKind.FAILURE_WRONG, where, "an operation that can be read", str(error))
        replica = _id(record.replica_id)
        if replica is not None and not self._is_retired(replica):
            yield from self._creations(failure_id, replica, operations)
        for seq, nonce in map(identity_of, operations):
            mark = self._records.outcome(replica, seq) if seq and replica else None
            if mark is None and replica and self._is_forgotten(replica, seq):
                continue
            if mark is not None and mark.nonce == nonce and self._is_in_doubt(mark):
                continue  # it came again when it was forgotten that it had failed so
            if mark is not None and mark.nonce == nonce and not mark.failure_id and _is_left_out(record):
                continue  # the rest of it was applied
            if seq and (mark is None or (mark.failure_id, mark.nonce) != (failure_id, nonce)):
                yield _finding(
                    FindingKind.FAILURE_WRONG,
                    where,
                    f"operation {seq} of replica {record.replica_id} to be refused with it",
                    "no outcome" if mark is None else _outcome_text(mark),
                )

    def _creations(self, failure_id: bytes, replica: bytes, operations: Iterable[bytes]) -> Iterator[Finding]:
        """Look for what says that creations were refused, under the names that their entities have had."""
        for data in operations:
            key = _created(data)
            names = () if key is None else _names_since(key[0], self._schema)
            if key is not None and not any(self._records.refused_creation(replica, (name, key[1])) for name in names):
                where = f"refused creation of {_name(key)} by replica {_uuid(replica)}"
                yield _finding(FindingKind.REFUSED_WRONG, where, f"the failure {_uuid(failure_id)}", "none")

    def _is_in_doubt(self, mark: Settled) -> bool:
        """Tell whether an operation was refused because it was forgotten what had become of it."""
        record = self._failure(mark.failure_id) if mark.failure_id else None
        return record is not None and record.reason == FailureReason.SUPERSEDED.number

    def _refused(self) -> Iterator[Finding]:
        for replica, key, failure_id in self._records.refused():
            record = self._failure(failure_id)
            found = ""
            if record is None:
                found = "none"
            elif _id(record.replica_id) != replica:
                found = f"one of replica {record.replica_id}"
            elif not record.payload_removed and not any(_creates(one, key[1]) for one in _operations_of(record)):
                found = "one of other operations"
            if found:
                where = f"refused creation of {_name(key)} by replica {_uuid(replica)}"
                yield _finding(FindingKind.REFUSED_WRONG, where, f"the failure {_uuid(failure_id)}", found)

    def _failure(self, failure_id: bytes) -> failure_pb2.SynchronizationFailure | None:
        data = self._records.failure(failure_id)
        return None if data is None else _parsed(data)


class _Reached:
    """
    Versions of changes that were found to be one of their object's: one bit for each change there is.

    Args:
        oldest: The first version that there is a bit for.
        count: How many changes there are; those that lie further apart are remembered one by one.
    """

    def __init__(self, oldest: int, count: int) -> None:
        self._oldest = oldest
        self._bits = bytearray((count + 7) // 8)
        self._others: set[int] = set()

    def add(self, version: int) -> None:
        byte, bit = divmod(version - self._oldest, 8)
        if byte < len(self._bits):
            self._bits[byte] |= 1 << bit
        else:
            self._others.add(version)

    def __contains__(self, version: int) -> bool:
        byte, bit = divmod(version - self._oldest, 8)
        return bool(self._bits[byte] & 1 << bit) if byte < len(self._bits) else version in self._others


def _values(entity: str, indexes: Iterable[str], attributes: Attributes | None) -> set[bytes]:
    """Return by what an object with some attributes is found."""
    held = ((name, attributes.get(name)) for name in indexes) if attributes is not None else ()
    return {by_version_prefix(entity, name, value) for name, value in held if value is not None}


def _author(state: ObjectState, change: Change) -> Iterator[Finding]:
    """Compare what an object says of its author with a change of its present incarnation."""
    # What a migration moved to another key keeps its author.
    if change.kind is OperationKind.CREATE and change.new_names is None:
        expected, found = (change.version, change.replica), (state.created, state.creator)
        if expected != found:
            yield _finding(
                FindingKind.STATE_DIFFERS,
                _name(change.key),
                f"created at version {expected[0]} by replica {_uuid(expected[1])}",
                f"at version {found[0]} by replica {_uuid(found[1])}",
            )
    if state.sole_writer and (change.replica != state.creator or change.by_hook or change.failure):
        found_text = f"change {change.version} by another one"
        yield _finding(
            FindingKind.STATE_DIFFERS,
            _name(change.key),
            f"replica {_uuid(state.creator)} to be its sole writer",
            found_text,
        )


def _difference(change: Change, before: Attributes | None, after: Attributes | None) -> tuple[str, str] | None:
    """Return what a change makes of an object, and what is there instead; None if it is the same."""
    replayed: Attributes | None = None
    if change.kind is OperationKind.CREATE:
        replayed = decode_patch(change.patch).set
    elif change.kind is OperationKind.UPDATE and before is not None and after is not None:
        replayed = decode_patch(change.patch).apply(before)
    if replayed is None or after is None:
        same = replayed is None and after is None and change.kind is OperationKind.DELETE
    else:
        same = equal(replayed, after)
    if same:
        return None
    return (_attributes_text(replayed, change), _attributes_text(after, change))


def _attributes_text(attributes: Attributes | None, change: Change) -> str:
    if attributes is None:
        return "no object"
    return f"the object as {change.kind.name.lower()}d with {quoted(attributes)}"


def _extended(last: list[tuple[int, int]], seq: int) -> list[tuple[int, int]]:
    """Return the last range of ascending ones with a seq added, or it and another one."""
    if last and last[0][1] == seq - 1:
        return [(last[0][0], seq)]
    return [*last, (seq, seq)]


def _without(ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what of ascending ranges is in none of the others."""
    for first, last in ranges:
        start = first
        for other_first, other_last in others:
            if other_last < start or other_first > last:
                continue
            if other_first > start:
                yield start, other_first - 1
            start = other_last + 1
        if start <= last:
            yield start, last


def _is_left_out(record: failure_pb2.SynchronizationFailure) -> bool:
    """Tell whether a failure may be about files without which its operation was applied."""
    return record.reason == FailureReason.FILE_MISSING.number


def _parsed(data: bytes) -> failure_pb2.SynchronizationFailure | None:
    try:
        return failure_pb2.SynchronizationFailure.FromString(data)
    except DecodeError:
        return None


def _operations_of(record: failure_pb2.SynchronizationFailure) -> Sequence[bytes]:
    return record.group_operations or [record.operation]


def _creates(data: bytes, id_: str) -> bool:
    key = _created(data)
    # By its id only: the entity may have got another name since.
    return key is not None and key[1] == id_


def _created(data: bytes) -> ObjectKey | None:
    """Return the key of the object that an operation creates, as it says itself; None: it creates none."""
    try:
        operation = decode_operation(data)
    except TidelogError:
        return None
    return operation.key if operation.kind is OperationKind.CREATE else None


def _names_since(entity: str, schema: Schema | None) -> Sequence[str]:
    """Return the names that an entity has had, from the one that it had then."""
    names = [entity]
    for rename in sorted(schema.renames if schema is not None else (), key=attrgetter("version")):
        if rename.attribute is None and rename.entity in names and rename.to not in names:
            names.append(rename.to)
    return names


def _id(text: str) -> bytes | None:
    try:
        return uuid_utils.UUID(text).bytes
    except ValueError:
        return None


def _uuid(data: bytes) -> str:
    return str(uuid_utils.UUID(bytes=data)) if len(data) == REPLICA_ID_BYTES else data.hex()


def _finding(kind: FindingKind, where: str, expected: str, found: str) -> Finding:
    return Finding(kind, where, expected, found)


def _name(key: ObjectKey) -> str:
    return f"{key[0]} {key[1]!r}"


def _operation_text(replica: bytes, seq: int) -> str:
    return f"operation {seq} of replica {_uuid(replica)}"


def _operations_text(replica: bytes, first: int, last: int) -> str:
    return _operation_text(replica, first) if first == last else f"operations {first} to {last} of {_uuid(replica)}"


def _changes_text(first: int, last: int) -> str:
    return f"change {first}" if first == last else f"changes {first} to {last}"


def _outcome_text(mark: Settled) -> str:
    if mark.failure_id:
        return f"refused with the failure {_uuid(mark.failure_id)}, nonce {mark.nonce}"
    return f"applied at version {mark.version}"
