"""What a job returns to be written, as statements over arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, LiteralString

import msgspec

from tidelog_server._postgres_arrays import Array, Bigints, Booleans, Byteas, Smallints, Texts
from tidelog_server._records import Change, FailureRecord, Forgotten, ObjectState, ReplicaState, Settled, Writes

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_server._postgres_connection import Transaction

_SIGN: Final = 1 << 63
_UINT64: Final = 1 << 64

Statement = tuple[LiteralString, tuple[Any, ...]]

_PUT_OBJECTS: Final[LiteralString] = """
    INSERT INTO objects (tenant, entity, id, version, created, creator, deleted, sole_writer, attributes)
    SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bytea[], %s::boolean[],
        %s::boolean[], %s::bytea[])
    ON CONFLICT (tenant, entity, id) DO UPDATE SET version = excluded.version, created = excluded.created,
        creator = excluded.creator, deleted = excluded.deleted, sole_writer = excluded.sole_writer,
        attributes = excluded.attributes
"""
_PUT_HEAD: Final[LiteralString] = "UPDATE tenants SET version = %s, commit_id = %s WHERE number = %s"
_PUT_CHANGES: Final[LiteralString] = """
    INSERT INTO changes (tenant, version, entity, id, kind, patch, before, previous, replica, seq, by_hook, user_id,
        time_us, failure, new_names, moved_from, former_version, former_timeline)
    SELECT %s, * FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::smallint[], %s::bytea[], %s::bytea[],
        %s::bigint[], %s::bytea[], %s::bigint[], %s::boolean[], %s::text[], %s::bigint[], %s::bytea[], %s::text[],
        %s::bigint[], %s::bigint[], %s::text[])
"""
_PUT_INDEXES: Final[LiteralString] = """
    INSERT INTO indexes (tenant, key, value) SELECT %s, * FROM unnest(%s::bytea[], %s::bytea[])
    ON CONFLICT (tenant, key) DO UPDATE SET value = excluded.value
"""
_PUT_REPLICA: Final[LiteralString] = """
    INSERT INTO replicas (tenant, replica, session_number, user_id, newest_seq, newest_nonce, settled_ranges,
        heard_us, retired, common_replicas, common_seqs)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (tenant, replica) DO UPDATE SET session_number = excluded.session_number,
        user_id = excluded.user_id, newest_seq = excluded.newest_seq, newest_nonce = excluded.newest_nonce,
        settled_ranges = excluded.settled_ranges, heard_us = excluded.heard_us, retired = excluded.retired,
        common_replicas = excluded.common_replicas, common_seqs = excluded.common_seqs
"""
_PUT_SETTLED: Final[LiteralString] = """
    INSERT INTO settled (tenant, replica, seq, nonce, version, changed_by_server, failure_id, culprit)
    SELECT %s, %s, * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::boolean[], %s::bytea[], %s::boolean[])
    ON CONFLICT (tenant, replica, seq) DO UPDATE SET nonce = excluded.nonce, version = excluded.version,
        changed_by_server = excluded.changed_by_server, failure_id = excluded.failure_id, culprit = excluded.culprit
"""
_PUT_FAILURES: Final[LiteralString] = """
    INSERT INTO failures (tenant, id, data) SELECT %s, * FROM unnest(%s::bytea[], %s::bytea[])
    ON CONFLICT (tenant, id) DO UPDATE SET data = excluded.data
"""
_PUT_REFUSED: Final[LiteralString] = """
    INSERT INTO refused (tenant, replica, entity, id, failure)
    SELECT %s, * FROM unnest(%s::bytea[], %s::text[], %s::text[], %s::bytea[])
    ON CONFLICT (tenant, replica, entity, id) DO UPDATE SET failure = excluded.failure
"""
# Each row is looked up by its key; see `_postgres_reader`. Nobody else moves it: the tenant is locked.
_DELETE_INDEXES: Final[LiteralString] = """
    DELETE FROM indexes WHERE ctid = ANY (ARRAY(
        SELECT place FROM unnest(%s::bytea[]) AS gone (key) CROSS JOIN LATERAL (
            SELECT ctid AS place FROM indexes WHERE tenant = %s AND key = gone.key OFFSET 0
        ) AS found
    ))
"""
_DELETE_TOMBSTONES: Final[LiteralString] = """
    DELETE FROM objects WHERE ctid = ANY (ARRAY(
        SELECT place FROM unnest(%s::text[], %s::text[]) AS gone (entity, id) CROSS JOIN LATERAL (
            SELECT ctid AS place FROM objects WHERE tenant = %s AND entity = gone.entity AND id = gone.id OFFSET 0
        ) AS found
    ))
"""
_DELETE_SETTLED: Final[LiteralString] = """
    DELETE FROM settled WHERE ctid = ANY (ARRAY(
        SELECT place FROM unnest(%s::bytea[], %s::bigint[]) AS gone (replica, seq) CROSS JOIN LATERAL (
            SELECT ctid AS place FROM settled WHERE tenant = %s AND replica = gone.replica AND seq = gone.seq OFFSET 0
        ) AS found
    ))
"""
_DELETE_REFUSED: Final[LiteralString] = """
    DELETE FROM refused WHERE ctid = ANY (ARRAY(
        SELECT place
        FROM unnest(%s::bytea[], %s::text[], %s::text[]) AS gone (replica, entity, id) CROSS JOIN LATERAL (
            SELECT ctid AS place FROM refused
            WHERE tenant = %s AND replica = gone.replica AND entity = gone.entity AND id = gone.id OFFSET 0
        ) AS found
    ))
"""


def statements_of(writes: Writes, tenant: int, commit_id: bytes) -> list[Statement]:
    """
    Return the statements that write what a job returned, each with its parameters.

    All of them are made before any is sent: what cannot be written harms its own job only.
    """
    made: list[Statement] = []
    if writes.objects:
        made.append((_PUT_OBJECTS, (tenant, *_object_columns(writes.objects))))
    if writes.changes:
        made.append((_PUT_CHANGES, (tenant, *_change_columns(writes.changes))))
        made.append((_PUT_HEAD, (writes.version, commit_id, tenant)))
    if writes.index_entries:
        made += _index_statements(writes.index_entries, tenant)
    if writes.replica is not None:
        replica, state = writes.replica
        made.append((_PUT_REPLICA, (tenant, replica, *_replica_values(state))))
        if writes.settled:
            made.append((_PUT_SETTLED, (tenant, replica, *_settled_columns(writes.settled))))
    made += _forgetting(writes.forgotten, tenant)
    if writes.failures:
        made += _failure_statements(writes.failures, tenant)
    return made


def put_commit(transaction: Transaction, tenant: int, version: int, commit_id: bytes) -> None:
    """Note the id of a commit under the version at which it ends."""
    statement: LiteralString = "INSERT INTO commits (tenant, version, commit_id) VALUES (%s, %s, %s)"
    transaction.send(statement, tenant, version, commit_id)


def _object_columns(objects: Mapping[ObjectKey, tuple[ObjectState, int]]) -> tuple[Array, ...]:
    states = [state for state, _replaced in objects.values()]
    versions, created, creators, deleted, sole_writers, attributes = zip(*states, strict=True)
    return (
        Texts(key[0] for key in objects),
        Texts(key[1] for key in objects),
        Bigints(versions),
        Bigints(created),
        Byteas(creators),
        Booleans(deleted),
        Booleans(sole_writers),
        Byteas(attributes),
    )


def _change_columns(changes: list[Change]) -> tuple[Array, ...]:
    columns = list(zip(*changes, strict=True))
    versions, keys, kinds, patches, befores, previous, replicas, seqs, by_hook, users, times = columns[:11]
    failures, new_names, moved_from, former_versions, former_timelines = columns[11:]
    return (
        Bigints(versions),
        Texts(key[0] for key in keys),
        Texts(key[1] for key in keys),
        Smallints(kinds),
        Byteas(patches),
        Byteas(befores),
        Bigints(previous),
        Byteas(replicas),
        Bigints(seqs),
        Booleans(by_hook),
        Texts(users),
        Bigints(times),
        Byteas(failures),
        Texts("" if names is None else msgspec.json.encode(names).decode() for names in new_names),
        Bigints(moved_from),
        Bigints(former_versions),
        Texts(former_timelines),
    )


def _index_statements(entries: Mapping[bytes, bytes | None], tenant: int) -> Iterable[Statement]:
    removed = Byteas(key for key, value in entries.items() if value is None)
    if removed:
        yield _DELETE_INDEXES, (removed, tenant)
    kept = [(key, value) for key, value in entries.items() if value is not None]
    if kept:
        yield _PUT_INDEXES, (tenant, Byteas(key for key, _ in kept), Byteas(value for _, value in kept))


def _replica_values(state: ReplicaState) -> tuple[Any, ...]:
    return (
        state.session_number,
        state.user_id,
        state.newest_seq,
        _signed(state.newest_nonce),
        Bigints(bound for bounds in state.settled_ranges for bound in bounds),
        state.heard_us,
        state.retired,
        Byteas(replica for replica, _ in state.common_seqs),
        Bigints(seq for _, seq in state.common_seqs),
    )


def _settled_columns(settled: list[tuple[int, Settled]]) -> tuple[Array, ...]:
    nonces, versions, changed, failures, culprits = zip(*(one for _, one in settled), strict=True)
    return (
        Bigints(seq for seq, _ in settled),
        Bigints(map(_signed, nonces)),
        Bigints(versions),
        Booleans(changed),
        Byteas(failures),
        Booleans(culprits),
    )


def _failure_statements(failures: list[FailureRecord], tenant: int) -> Iterable[Statement]:
    # The last of one id counts, as when they are written one by one.
    data = {failure.id: failure.data for failure in failures}
    yield _PUT_FAILURES, (tenant, Byteas(data), Byteas(data.values()))
    refused = {(one.replica, *key): one.id for one in failures for key in one.refused_creations}
    if refused:
        replicas, entities, ids = zip(*refused, strict=True)
        yield _PUT_REFUSED, (tenant, Byteas(replicas), Texts(entities), Texts(ids), Byteas(refused.values()))


def _forgetting(forgotten: Forgotten, tenant: int) -> Iterable[Statement]:
    if forgotten.version:
        yield "DELETE FROM changes WHERE tenant = %s AND version <= %s", (tenant, forgotten.version)
        yield "DELETE FROM commits WHERE tenant = %s AND version < %s", (tenant, forgotten.version)
        yield "UPDATE tenants SET collected = %s WHERE number = %s", (forgotten.version, tenant)
    if forgotten.tombstones:
        keys = forgotten.tombstones.keys()
        yield _DELETE_TOMBSTONES, (Texts(key[0] for key in keys), Texts(key[1] for key in keys), tenant)
    if forgotten.settled:
        replicas, seqs = zip(*forgotten.settled, strict=True)
        yield _DELETE_SETTLED, (Byteas(replicas), Bigints(seqs), tenant)
    if forgotten.refused_creations:
        replicas, refused = zip(*forgotten.refused_creations, strict=True)
        yield (
            _DELETE_REFUSED,
            (
                Byteas(replicas),
                Texts(key[0] for key in refused),
                Texts(key[1] for key in refused),
                tenant,
            ),
        )


def _signed(nonce: int) -> int:
    return nonce - _UINT64 if nonce >= _SIGN else nonce
