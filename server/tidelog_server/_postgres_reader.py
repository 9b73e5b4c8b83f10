"""Reading one tenant's data in PostgreSQL, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, LiteralString

import msgspec

from tidelog._keys import ObjectKey
from tidelog._operation import OperationKind
from tidelog_server._postgres_arrays import Bigints, Byteas, Texts
from tidelog_server._records import Change, Head, Identity, ObjectState, ReplicaState, Settled
from tidelog_server._store import ObjectsPage

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Transaction
    from tidelog_server._postgres_entry import TenantState

_UINT64: Final = 1 << 64
_KINDS: Final = {int(kind): kind for kind in OperationKind}
_new = tuple.__new__

# Many keys are looked up one by one, whatever the planner thinks: OFFSET 0 keeps it from turning that into a scan of
# all that the tenant has, which it would prefer as long as it takes the table for a small one.
_OBJECTS: Final[LiteralString] = """
    SELECT entity, id, version, created, creator, deleted, sole_writer, attributes
    FROM unnest(%s::text[], %s::text[]) AS wanted (entity, id) CROSS JOIN LATERAL (
        SELECT version, created, creator, deleted, sole_writer, attributes
        FROM objects WHERE tenant = %s AND entity = wanted.entity AND id = wanted.id OFFSET 0
    ) AS found
"""

_COMMITS_UNTIL: Final[LiteralString] = """
    SELECT DISTINCT version, commit_id
    FROM unnest(%s::bigint[]) AS wanted (until) CROSS JOIN LATERAL (
        SELECT version, commit_id FROM commits WHERE tenant = %s AND version <= wanted.until
        ORDER BY version DESC LIMIT 1
    ) AS found
    ORDER BY version DESC
"""

# A page ends with the object that makes it reach its size. One more than its limit is looked at, to know whether
# there are more; what is too large for the page is not sent.
_ENTITY_OBJECTS: Final[LiteralString] = """
    SELECT found, entity, id, version, created, creator, deleted, sole_writer, attributes
    FROM (
        SELECT *, count(*) OVER () AS found, row_number() OVER by_id AS place,
            sum(octet_length(attributes)) OVER by_id - octet_length(attributes) AS bytes_before
        FROM (
            SELECT * FROM objects WHERE tenant = %s AND entity = %s AND id > %s ORDER BY id LIMIT %s
        ) AS looked_at
        WINDOW by_id AS (ORDER BY id)
    ) AS measured
    WHERE place <= %s AND bytes_before < %s
    ORDER BY id
"""
_LATEST_OBJECTS: Final[LiteralString] = """
    SELECT found, entity, id, version, created, creator, deleted, sole_writer, attributes
    FROM (
        SELECT *, count(*) OVER () AS found, row_number() OVER by_version AS place,
            sum(octet_length(attributes)) OVER by_version - octet_length(attributes) AS bytes_before
        FROM (
            SELECT * FROM objects WHERE tenant = %s AND entity COLLATE "POSIX" = %s AND version > %s
            ORDER BY version LIMIT %s
        ) AS looked_at
        WINDOW by_version AS (ORDER BY version)
    ) AS measured
    WHERE place <= %s AND bytes_before < %s
    ORDER BY version
"""

# One after the other, each found by its index: PostgreSQL has no scan that skips.
_ENTITIES: Final[LiteralString] = """
    WITH RECURSIVE found (entity) AS (
        (SELECT entity FROM objects WHERE tenant = %s ORDER BY entity LIMIT 1)
        UNION ALL
        SELECT (SELECT entity FROM objects WHERE tenant = %s AND entity > found.entity ORDER BY entity LIMIT 1)
        FROM found WHERE found.entity IS NOT NULL
    )
    SELECT entity FROM found WHERE entity IS NOT NULL
"""

_INDEXES: Final[LiteralString] = """
    SELECT key, value
    FROM unnest(%s::bytea[]) AS wanted (key) CROSS JOIN LATERAL (
        SELECT value FROM indexes WHERE tenant = %s AND key = wanted.key OFFSET 0
    ) AS found
"""
_INDEX_RANGE: Final[LiteralString] = """
    SELECT key, value FROM indexes WHERE tenant = %s AND key >= %s AND key > %s ORDER BY key LIMIT %s
"""
_INDEX_RANGE_BELOW: Final[LiteralString] = """
    SELECT key, value FROM indexes WHERE tenant = %s AND key >= %s AND key > %s AND key < %s ORDER BY key LIMIT %s
"""

_CHANGE: Final[LiteralString] = """
    SELECT version, entity, id, kind, patch, before, previous, replica, seq, by_hook, user_id, time_us, failure,
        new_names, moved_from, former_version, former_timeline
    FROM changes WHERE tenant = %s AND version = %s
"""
_CHANGES: Final[LiteralString] = """
    SELECT version, entity, id, kind, patch, before, previous, replica, seq, by_hook, user_id, time_us, failure,
        new_names, moved_from, former_version, former_timeline
    FROM (
        SELECT *, sum(octet_length(patch) + octet_length(before)) OVER (ORDER BY version)
            - octet_length(patch) - octet_length(before) AS bytes_before
        FROM (SELECT * FROM changes WHERE tenant = %s AND version > %s ORDER BY version LIMIT %s) AS looked_at
    ) AS measured
    WHERE bytes_before < %s
    ORDER BY version
"""

_REPLICA: Final[LiteralString] = """
    SELECT replica, session_number, user_id, newest_seq, newest_nonce, settled_ranges, heard_us, retired,
        common_replicas, common_seqs
    FROM replicas WHERE tenant = %s AND replica = %s
"""
_REPLICAS: Final[LiteralString] = """
    SELECT replica, session_number, user_id, newest_seq, newest_nonce, settled_ranges, heard_us, retired,
        common_replicas, common_seqs
    FROM replicas WHERE tenant = %s AND replica > %s ORDER BY replica LIMIT %s
"""
_SETTLED: Final[LiteralString] = """
    SELECT seq, nonce, version, changed_by_server, failure_id, culprit
    FROM unnest(%s::bigint[]) AS wanted (seq) CROSS JOIN LATERAL (
        SELECT nonce, version, changed_by_server, failure_id, culprit
        FROM settled WHERE tenant = %s AND replica = %s AND seq = wanted.seq OFFSET 0
    ) AS found
"""
_FIRST_SETTLED: Final[LiteralString] = """
    SELECT seq, nonce, version, changed_by_server, failure_id, culprit
    FROM settled WHERE tenant = %s AND replica = %s ORDER BY seq LIMIT %s
"""
_FAILURES: Final[LiteralString] = """
    SELECT id, data
    FROM (
        SELECT *, sum(octet_length(data)) OVER (ORDER BY id) - octet_length(data) AS bytes_before
        FROM (SELECT * FROM failures WHERE tenant = %s AND id > %s ORDER BY id LIMIT %s) AS looked_at
    ) AS measured
    WHERE bytes_before < %s
    ORDER BY id
"""


class PostgresReader:
    """Reads one tenant in one transaction. See `Reader` for what each method promises."""

    is_remote: ClassVar[bool] = True

    def __init__(self, transaction: Transaction, state: TenantState) -> None:
        self._rows = transaction.rows
        self._state = state
        self._tenant = state.number

    def identity(self) -> Identity:
        return self._state.identity

    def run(self) -> bytes:
        return self._state.run

    def head(self) -> Head:
        return self._state.head

    def collected(self) -> int:
        return self._state.collected

    def commit_id(self, version: int) -> bytes | None:
        return self._value("SELECT commit_id FROM commits WHERE tenant = %s AND version = %s", version)

    def commits_until(self, versions: Iterable[int]) -> list[Head]:
        return [Head(*row) for row in self._rows(_COMMITS_UNTIL, Bigints(versions), self._tenant)]

    def objects(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, ObjectState]:
        wanted = [key for key in keys if _may_be_there(*key)]
        if not wanted:
            return {}
        entities, ids = Texts(key[0] for key in wanted), Texts(key[1] for key in wanted)
        rows = self._rows(_OBJECTS, entities, ids, self._tenant)
        return {row[:2]: _new(ObjectState, row[2:]) for row in rows}

    def entity_objects(self, entity: str, after_id: str, limit: int, bytes_max: int) -> ObjectsPage:
        return self._page(_ENTITY_OBJECTS, entity, after_id, limit, bytes_max)

    def latest_objects(self, entity: str, after: int, limit: int, bytes_max: int) -> ObjectsPage:
        return self._page(_LATEST_OBJECTS, entity, after, limit, bytes_max)

    def entities(self) -> list[str]:
        return [entity for (entity,) in self._rows(_ENTITIES, self._tenant, self._tenant)]

    def index(self, key: bytes) -> bytes | None:
        return self._value("SELECT value FROM indexes WHERE tenant = %s AND key = %s", key)

    def indexes(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        wanted = Byteas(keys)
        return dict(self._rows(_INDEXES, wanted, self._tenant)) if wanted else {}

    def index_range(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        # With nothing to start after, the prefix itself is in the range; no key is empty.
        end = _after_all_with(prefix)
        if end is None:
            return self._rows(_INDEX_RANGE, self._tenant, prefix, after, limit)
        return self._rows(_INDEX_RANGE_BELOW, self._tenant, prefix, after, end, limit)

    def change(self, version: int) -> Change | None:
        found = self._rows(_CHANGE, self._tenant, version)
        return _change(found[0]) if found else None

    def changes(self, after: int, limit: int, bytes_max: int) -> list[Change]:
        return [_change(row) for row in self._rows(_CHANGES, self._tenant, after, limit, bytes_max)]

    def replica(self, replica: bytes) -> ReplicaState | None:
        found = self._rows(_REPLICA, self._tenant, replica)
        return _replica(found[0])[1] if found else None

    def replicas(self, after: bytes, limit: int) -> list[tuple[bytes, ReplicaState]]:
        return [_replica(row) for row in self._rows(_REPLICAS, self._tenant, after, limit)]

    def settled(self, replica: bytes, seqs: Iterable[int]) -> dict[int, Settled]:
        wanted = Bigints(seqs)
        return dict(map(_settled, self._rows(_SETTLED, wanted, self._tenant, replica))) if wanted else {}

    def first_settled(self, replica: bytes, limit: int) -> list[tuple[int, Settled]]:
        return [_settled(row) for row in self._rows(_FIRST_SETTLED, self._tenant, replica, limit)]

    def failure(self, failure_id: bytes) -> bytes | None:
        return self._value("SELECT data FROM failures WHERE tenant = %s AND id = %s", failure_id)

    def failures(self, after: bytes, limit: int, bytes_max: int) -> list[tuple[bytes, bytes]]:
        return self._rows(_FAILURES, self._tenant, after, limit, bytes_max)

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        if not _may_be_there(*key):
            return None
        return self._value(
            "SELECT failure FROM refused WHERE tenant = %s AND replica = %s AND entity = %s AND id = %s", replica, *key
        )

    def refused_creations(self, replica: bytes, limit: int) -> list[ObjectKey]:
        return self._rows(
            "SELECT entity, id FROM refused WHERE tenant = %s AND replica = %s ORDER BY entity, id LIMIT %s",
            self._tenant,
            replica,
            limit,
        )

    def _page(self, query: LiteralString, entity: str, after: str | int, limit: int, bytes_max: int) -> ObjectsPage:
        if not _may_be_there(entity):
            return ObjectsPage([], has_more=False)
        rows = self._rows(query, self._tenant, entity, after, limit + 1, limit, bytes_max)
        return ObjectsPage(
            [(row[1:3], _new(ObjectState, row[3:])) for row in rows], has_more=bool(rows) and rows[0][0] > len(rows)
        )

    def _value(self, query: LiteralString, *key: Any) -> bytes | None:
        found = self._rows(query, self._tenant, *key)
        return found[0][0] if found else None


def _may_be_there(*names: str) -> bool:
    """Tell whether names could be stored: whoever is told to look for another one finds nothing, as anywhere else."""
    return not any("\0" in name for name in names)


def _after_all_with(prefix: bytes) -> bytes | None:
    """Return the first key behind all that start with *prefix*; None: there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None


def _change(row: tuple[Any, ...]) -> Change:
    # As in `Change`, but for the key in two columns, the kind as a number and the names as text.
    version, entity, id_, kind = row[:4]
    names = msgspec.json.decode(row[13], type=dict[str, str]) if row[13] else None
    return _new(Change, (version, (entity, id_), _KINDS[kind], *row[4:13], names, *row[14:]))


def _replica(row: tuple[Any, ...]) -> tuple[bytes, ReplicaState]:
    replica, session_number, user_id, newest_seq, nonce, bounds, heard_us, retired, former_ids, common = row
    ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    common_seqs = tuple(zip(former_ids, common, strict=True))
    known = ReplicaState(session_number, user_id, newest_seq, nonce % _UINT64, ranges, heard_us, retired, common_seqs)
    return replica, known


def _settled(row: tuple[Any, ...]) -> tuple[int, Settled]:
    seq, nonce, version, changed_by_server, failure_id, culprit = row
    return seq, _new(Settled, (nonce % _UINT64, version, changed_by_server, failure_id, culprit))
