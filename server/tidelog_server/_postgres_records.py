"""Records of a tenant as they lie in the tables of a database; see `_verification.Records`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, LiteralString, TypeVar

from tidelog._errors import StorageError
from tidelog._finding import Finding, FindingKind
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX
from tidelog_server._postgres_reader import PostgresReader
from tidelog_server._records import REPLICA_ID_BYTES, Change, Head, ObjectState, ReplicaState, Settled
from tidelog_server._verification import DAMAGE

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Transaction
    from tidelog_server._postgres_entry import TenantState

PAGE_ROWS: Final = 1_000

_COMMITS: Final[LiteralString] = """
    SELECT version, commit_id FROM commits WHERE tenant = %s AND version > %s ORDER BY version LIMIT %s
"""
_COMMIT_END: Final[LiteralString] = """
    SELECT version FROM commits WHERE tenant = %s AND version >= %s ORDER BY version LIMIT 1
"""
_CHANGE_VERSIONS: Final[LiteralString] = """
    SELECT version FROM changes WHERE tenant = %s AND version > %s ORDER BY version LIMIT %s
"""
# Led by the index by version, whose order of entities has this name: so it shows if that has lost an entry.
_VERSIONS: Final[LiteralString] = """
    SELECT entity, version, id FROM objects
    WHERE tenant = %s AND entity COLLATE "POSIX" = %s AND (version, id) > (%s, %s) ORDER BY version, id LIMIT %s
"""
_ID_AT: Final[LiteralString] = """
    SELECT id FROM objects WHERE tenant = %s AND entity COLLATE "POSIX" = %s AND version = %s LIMIT 1
"""
_REPLICA_IDS: Final[LiteralString] = """
    SELECT replica FROM replicas WHERE tenant = %s AND replica > %s ORDER BY replica LIMIT %s
"""
_NEXT_SETTLING: Final[LiteralString] = """
    SELECT replica FROM settled WHERE tenant = %s AND replica > %s ORDER BY replica LIMIT 1
"""
_SETTLED_SEQS: Final[LiteralString] = """
    SELECT seq FROM settled WHERE tenant = %s AND replica = %s AND seq > %s ORDER BY seq LIMIT %s
"""
_REFUSED: Final[LiteralString] = """
    SELECT replica, entity, id, failure FROM refused
    WHERE tenant = %s AND (replica, entity, id) > (%s, %s, %s) ORDER BY replica, entity, id LIMIT %s
"""

K = TypeVar("K")
T = TypeVar("T")

# The key of a row, and what reads it, which may fail.
_Read = tuple[K, Callable[[], T | None]]


class PostgresRecords:
    """
    One tenant's records, in one transaction, read a page at a time.

    What cannot be decoded is passed over; `unreadable` names it.
    """

    def __init__(self, transaction: Transaction, state: TenantState) -> None:
        self._rows = transaction.rows
        self._tenant = state.number
        self._reader = PostgresReader(transaction, state)

    def unreadable(self) -> Iterator[Finding]:
        """Yield a finding for each row that cannot be decoded. Of most tables the columns say all that there is."""
        for version, error in _unreadable(self._changes()):
            yield _finding(f"row {version} of the table changes", error)
        for replica, error in _unreadable(self._replicas()):
            yield _finding(f"row {replica.hex()} of the table replicas", error)

    def head(self) -> Head:
        return self._reader.head()

    def collected(self) -> int:
        return self._reader.collected()

    def commits(self) -> Iterator[tuple[int, bytes]]:
        after = 0
        while page := self._rows(_COMMITS, self._tenant, after, PAGE_ROWS):
            yield from page
            after = page[-1][0]

    def commit_end(self, version: int) -> int:
        found = self._rows(_COMMIT_END, self._tenant, version)
        return found[0][0] if found else 0

    def changes(self) -> Iterator[Change]:
        return _readable(self._changes())

    def change(self, version: int) -> Change | None:
        return _or_none(lambda: self._reader.change(version))

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectState]]:
        for entity in self._reader.entities():
            after, more = "", True
            while more:
                page = self._reader.entity_objects(entity, after, PAGE_ROWS, PAGE_BYTES_MAX)
                yield from page.objects
                after, more = page.objects[-1][0][1] if page.objects else after, page.has_more

    def state(self, key: ObjectKey) -> ObjectState | None:
        return self._reader.objects((key,)).get(key)

    def versions(self) -> Iterator[tuple[str, int, str]]:
        for entity in self._reader.entities():
            after: tuple[int, str] = (0, "")
            while page := self._rows(_VERSIONS, self._tenant, entity, *after, PAGE_ROWS):
                yield from page
                after = page[-1][1:]

    def id_at(self, entity: str, version: int) -> str | None:
        found = self._rows(_ID_AT, self._tenant, entity, version)
        return found[0][0] if found else None

    def indexes(self) -> Iterator[tuple[bytes, bytes]]:
        after = b""
        while page := self._reader.index_range(b"", after, PAGE_ROWS):
            yield from page
            after = page[-1][0]

    def index(self, key: bytes) -> bytes | None:
        return self._reader.index(key)

    def replicas(self) -> Iterator[tuple[bytes, ReplicaState]]:
        return _readable(self._replicas())

    def replica(self, replica: bytes) -> ReplicaState | None:
        return _or_none(lambda: self._reader.replica(replica))

    def settling_replicas(self) -> Iterator[bytes]:
        after = b""
        while found := self._rows(_NEXT_SETTLING, self._tenant, after):
            after = found[0][0]
            yield after

    def settled(self, replica: bytes) -> Iterator[tuple[int, Settled]]:
        after = -1
        while page := self._rows(_SETTLED_SEQS, self._tenant, replica, after, PAGE_ROWS):
            after = page[-1][0]
            yield from sorted(self._reader.settled(replica, [seq for (seq,) in page]).items())

    def outcome(self, replica: bytes, seq: int) -> Settled | None:
        return self._reader.settled(replica, (seq,)).get(seq)

    def failures(self) -> Iterator[tuple[bytes, bytes]]:
        after = b""
        while page := self._reader.failures(after, PAGE_ROWS, PAGE_BYTES_MAX):
            yield from page
            after = page[-1][0]

    def failure(self, failure_id: bytes) -> bytes | None:
        return self._reader.failure(failure_id)

    def refused(self) -> Iterator[tuple[bytes, ObjectKey, bytes]]:
        after: tuple[bytes, str, str] = (b"", "", "")
        while page := self._rows(_REFUSED, self._tenant, *after, PAGE_ROWS):
            for replica, entity, id_, failure in page:
                after = (replica, entity, id_)
                yield replica, (entity, id_), failure

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        return self._reader.refused_creation(replica, key)

    # --- rows that may not be what was written --------------------------------

    def _changes(self) -> Iterator[_Read[int, Change]]:
        """Iterate over the change log: versions, and what reads the changes."""
        after = 0
        while page := self._changes_above(after):
            after = page[-1][0]
            yield from page

    def _changes_above(self, after: int) -> list[_Read[int, Change]]:
        try:
            found = self._reader.changes(after, PAGE_ROWS, PAGE_BYTES_MAX)
        except StorageError:
            raise
        except DAMAGE:  # one of them: each for itself
            versions = self._rows(_CHANGE_VERSIONS, self._tenant, after, PAGE_ROWS)
            return [(version, partial(self._reader.change, version)) for (version,) in versions]
        return [(one.version, partial(_itself, one)) for one in found]

    def _replicas(self) -> Iterator[_Read[bytes, tuple[bytes, ReplicaState]]]:
        """Iterate over replicas: ids, and what reads them."""
        after = b""
        while page := self._rows(_REPLICA_IDS, self._tenant, after, PAGE_ROWS):
            after = page[-1][0]
            for (replica,) in page:
                yield replica, partial(self._known_replica, replica)

    def _known_replica(self, replica: bytes) -> tuple[bytes, ReplicaState] | None:
        if len(replica) != REPLICA_ID_BYTES:
            raise ValueError(f"an id of {len(replica)} bytes")
        state = self._reader.replica(replica)
        return None if state is None else (replica, state)


def _readable(rows: Iterator[_Read[K, T]]) -> Iterator[T]:
    """Return those that can be read."""
    return (found for _, read in rows if (found := _or_none(read)) is not None)


def _unreadable(rows: Iterator[_Read[K, T]]) -> Iterator[tuple[K, Exception]]:
    """Return which cannot be read, and why."""
    for key, read in rows:
        try:
            read()
        except StorageError:
            raise
        except DAMAGE as error:
            yield key, error


def _or_none(read: Callable[[], T | None]) -> T | None:
    try:
        return read()
    except StorageError:
        raise  # it is the database that cannot read it
    except DAMAGE:
        return None


def _itself(one: T) -> T:
    return one


def _finding(where: str, error: Exception) -> Finding:
    return Finding(FindingKind.ENTRY_UNREADABLE, where, "one that can be decoded", repr(error))
