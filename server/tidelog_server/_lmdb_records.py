"""Records of a tenant as they lie in the tables of the embedded store; see `_verification.Records`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from tidelog._finding import Finding, FindingKind
from tidelog._keys import POSITION_BYTES, ObjectKey, unpack_object_key, unpack_position
from tidelog_server._lmdb_store import Databases, LmdbReader, is_settled_twice
from tidelog_server._records import (
    COMMIT_ID_BYTES,
    REPLICA_ID_BYTES,
    Change,
    Head,
    ObjectState,
    ReplicaState,
    Settled,
)
from tidelog_server._verification import DAMAGE

if TYPE_CHECKING:
    from tidelog._environment import LmdbDatabase, LmdbTransaction

_UNDECODABLE: Final = (*DAMAGE, struct.error)

T = TypeVar("T")


class LmdbRecords:
    """
    One tenant's records, in one transaction.

    What cannot be decoded is passed over; `unreadable` names it.
    """

    def __init__(self, transaction: LmdbTransaction, databases: Databases, prefix: bytes) -> None:
        self._transaction = transaction
        self._databases = databases
        self._prefix = prefix
        self._reader = LmdbReader(transaction, databases, prefix)

    def unreadable(self) -> Iterator[Finding]:
        """Yield a finding for each entry that cannot be decoded."""
        tables: tuple[tuple[str, LmdbDatabase, Callable[[bytes, bytes], object]], ...] = (
            ("heads", self._databases.heads, _commit_of_head),
            ("collected", self._databases.collected, _version),
            ("commits", self._databases.commits, _commit),
            ("changes", self._databases.changes, self._change),
            ("objects", self._databases.objects, self._object),
            ("by_version", self._databases.by_version, self._version),
            ("replicas", self._databases.replicas, self._replica),
            ("settled", self._databases.settled, self._settled),
            ("refused", self._databases.refused, self._refused),
        )
        for name, database, decode in tables:
            for key, value in self._entries(database):
                try:
                    decode(key, value)
                except _UNDECODABLE as error:
                    where = f"entry {key!r} of the table {name}"
                    yield Finding(FindingKind.ENTRY_UNREADABLE, where, "one that can be decoded", repr(error))

    def head(self) -> Head:
        return self._readable(self._reader.head) or Head(0, b"")

    def collected(self) -> int:
        return self._reader.collected()

    def commits(self) -> Iterator[tuple[int, bytes]]:
        for key, commit_id in self._entries(self._databases.commits):
            yield unpack_position(key), commit_id

    def commit_end(self, version: int) -> int:
        cursor = self._transaction.cursor(self._databases.commits)
        found = cursor.set_range(self._prefix + version.to_bytes(POSITION_BYTES, "big"))
        key = cursor.key() if found else b""
        return unpack_position(key[len(self._prefix) :]) if key.startswith(self._prefix) else 0

    def changes(self) -> Iterator[Change]:
        return self._scan(self._databases.changes, self._change)

    def change(self, version: int) -> Change | None:
        return self._readable(lambda: _checked_change(self._reader.change(version)))

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectState]]:
        return self._scan(self._databases.objects, self._object)

    def state(self, key: ObjectKey) -> ObjectState | None:
        return self._readable(lambda: self._reader.objects((key,)).get(key))

    def versions(self) -> Iterator[tuple[str, int, str]]:
        return self._scan(self._databases.by_version, self._version)

    def id_at(self, entity: str, version: int) -> str | None:
        key = self._prefix + entity.encode() + b"\0" + version.to_bytes(POSITION_BYTES, "big")
        value = self._transaction.get(key, db=self._databases.by_version)
        return None if value is None else self._readable(value.decode)

    def indexes(self) -> Iterator[tuple[bytes, bytes]]:
        return self._entries(self._databases.indexes)

    def index(self, key: bytes) -> bytes | None:
        return self._reader.index(key)

    def replicas(self) -> Iterator[tuple[bytes, ReplicaState]]:
        return self._scan(self._databases.replicas, self._replica)

    def replica(self, replica: bytes) -> ReplicaState | None:
        return self._readable(lambda: _checked_replica(self._reader.replica(replica)))

    def settling_replicas(self) -> Iterator[bytes]:
        cursor = self._transaction.cursor(self._databases.settled)
        more = cursor.set_range(self._prefix)
        while more and cursor.key().startswith(self._prefix):
            start = cursor.key()[: len(self._prefix) + REPLICA_ID_BYTES]
            yield start[len(self._prefix) :]
            # Behind the highest seq there can be.
            more = cursor.set_range(start + b"\xff" * (POSITION_BYTES + 1))

    def settled(self, replica: bytes) -> Iterator[tuple[int, Settled]]:
        return self._scan(self._databases.settled, self._settled, replica)

    def outcome(self, replica: bytes, seq: int) -> Settled | None:
        return self._readable(lambda: self._reader.settled(replica, (seq,)).get(seq))

    def failures(self) -> Iterator[tuple[bytes, bytes]]:
        return self._entries(self._databases.failures)

    def failure(self, failure_id: bytes) -> bytes | None:
        return self._reader.failure(failure_id)

    def refused(self) -> Iterator[tuple[bytes, ObjectKey, bytes]]:
        return self._scan(self._databases.refused, self._refused)

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        return self._reader.refused_creation(replica, key)

    # --- entries --------------------------------------------------------------

    def _entries(self, database: LmdbDatabase, under: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Iterate over a table of the tenant: keys without its number, values."""
        prefix = self._prefix + under
        cursor = self._transaction.cursor(database)
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key[len(self._prefix) :], value

    def _scan(self, database: LmdbDatabase, decode: Callable[[bytes, bytes], T], under: bytes = b"") -> Iterator[T]:
        for key, value in self._entries(database, under):
            try:
                decoded = decode(key, value)
            except _UNDECODABLE:
                continue
            yield decoded

    def _readable(self, read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except _UNDECODABLE:
            return None

    def _change(self, key: bytes, _value: bytes) -> Change:
        return _present(_checked_change(self._reader.change(_position(key))))

    def _object(self, key: bytes, _value: bytes) -> tuple[ObjectKey, ObjectState]:
        object_key = unpack_object_key(key)
        return object_key, self._reader.objects((object_key,))[object_key]

    def _version(self, key: bytes, value: bytes) -> tuple[str, int, str]:
        return key[: -POSITION_BYTES - 1].decode(), unpack_position(key[-POSITION_BYTES:]), value.decode()

    def _replica(self, key: bytes, _value: bytes) -> tuple[bytes, ReplicaState]:
        return _sized(key, REPLICA_ID_BYTES), _present(_checked_replica(self._reader.replica(key)))

    def _settled(self, key: bytes, value: bytes) -> tuple[int, Settled]:
        seq = _position(key[REPLICA_ID_BYTES:])
        if not is_settled_twice(value):
            raise ValueError("it contradicts itself")
        return seq, self._reader.settled(key[:REPLICA_ID_BYTES], (seq,))[seq]

    def _refused(self, key: bytes, value: bytes) -> tuple[bytes, ObjectKey, bytes]:
        return key[:REPLICA_ID_BYTES], unpack_object_key(key[REPLICA_ID_BYTES:]), value


def _present(value: T | None) -> T:
    if value is None:
        raise LookupError("it is listed and not there")
    return value


def _sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes in place of {size}")
    return data


def _commit_of_head(_key: bytes, value: bytes) -> bytes:
    return _sized(value, POSITION_BYTES + COMMIT_ID_BYTES)


def _version(_key: bytes, value: bytes) -> int:
    return _position(value)


def _commit(_key: bytes, value: bytes) -> bytes:
    return _sized(value, COMMIT_ID_BYTES)


def _position(data: bytes) -> int:
    return unpack_position(_sized(data, POSITION_BYTES))


def _checked_change(change: Change | None) -> Change | None:
    """Return a change whose fields are of the types that they should have. Raises TypeError."""
    if change is not None:
        entity, id_ = change.key
        _check_types((entity, id_, change.user_id), str)
        _check_types((change.patch, change.before, change.replica, change.failure), bytes)
        _check_types((change.previous, change.seq, change.time_us, change.moved_from), int)
    return change


def _checked_replica(state: ReplicaState | None) -> ReplicaState | None:
    """Return a state whose fields are of the types that they should have. Raises TypeError."""
    if state is not None:
        _check_types((state.session_number, state.newest_seq, state.newest_nonce), int)
        for first, last in state.settled_ranges:
            _check_types((first, last), int)
        for former, seq in state.common_seqs:
            _check_types((former,), bytes)
            _check_types((seq,), int)
    return state


def _check_types(values: tuple[object, ...], kind: type) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {kind.__name__}")
