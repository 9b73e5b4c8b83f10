"""
What is on disk, read out as plain values for the checkers.

A server's store is read through its `Reader`, a replica's directory through its LMDB
databases, so that nothing that the product leaves out of its own answers is missed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias
from uuid import UUID

from tests.simulation.model import Attributes, Key, patched

from tidelog._keys import unpack_object_key, unpack_position
from tidelog._operation import Operation, OperationKind, decode_operation
from tidelog._patch import decode_patch
from tidelog._values import decode_map
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import failure_pb2
from tidelog_client._storage import Outcome, Storage
from tidelog_client._view import ViewRecord, _unpack
from tidelog_server._principal import DEFAULT_TENANT
from tidelog_server._records import Change, Head, ObjectState, ReplicaState, Settled
from tidelog_server._store import Reader, Store

SCAN_ENTRIES = 1_000
SCAN_BYTES = 1 << 30
SEQ_BYTES = 8


class History:
    """
    Every state that every object ever had on the server, made from the change log alone.

    Attributes:
        version: How far it goes.
        changes: All changes, in order.
        changes_to: The changes of each object.
        lives: How often it became another one.
    """

    def __init__(self) -> None:
        self.version = 0
        self.lives = 0
        self.changes: list[Change] = []
        self.changes_to: dict[Key, list[Change]] = {}
        self._versions: dict[Key, list[int]] = {}
        self._states: dict[Key, list[Attributes | None]] = {}

    @property
    def keys(self) -> Iterable[Key]:
        """The keys of all objects that ever were."""
        return self._versions.keys()

    def copy(self) -> History:
        """Return the history as it is now."""
        history = History()
        history.become(self)
        return history

    def become(self, other: History) -> None:
        """Be another history from now on: the server's store is another one."""
        self.lives += 1
        self.version = other.version
        self.changes = list(other.changes)
        self.changes_to = {key: list(changes) for key, changes in other.changes_to.items()}
        self._versions = {key: list(versions) for key, versions in other._versions.items()}
        self._states = {key: list(states) for key, states in other._states.items()}

    def read_on(self, reader: Reader) -> None:
        """Take in what was applied since the last time."""
        if reader.collected() > self.version:
            raise AssertionError(f"what was applied since {self.version} is collected already")
        while changes := reader.changes(self.version, SCAN_ENTRIES, SCAN_BYTES):
            for change in changes:
                self._take(change)

    def at(self, key: Key, version: int) -> Attributes | None:
        """Return the attributes that an object had at a version; None: it was not there."""
        index = bisect_right(self._versions.get(key, []), version)
        return self._states[key][index - 1] if index else None

    def version_at(self, key: Key, version: int) -> int:
        """Return the version of an object's newest change at or below *version*; 0: there was none."""
        index = bisect_right(self._versions.get(key, []), version)
        return self._versions[key][index - 1] if index else 0

    def next_after(self, key: Key, version: int) -> int | None:
        """Return the version of an object's first change above *version*, or None."""
        versions = self._versions.get(key, [])
        index = bisect_right(versions, version)
        return versions[index] if index < len(versions) else None

    def follows(self, entity: str) -> bool:
        """Tell whether a synchronization of everything brings objects of an entity."""
        return True

    def was_absent(self, key: Key, first: int, last: int | None = None) -> bool:
        """Tell whether the object was not there at some moment from version *first* to *last* (None: now)."""
        return any(state is None for state in self.states_between(key, first, last))

    def states_between(self, key: Key, first: int, last: int | None = None) -> Iterable[Attributes | None]:
        """Return every state that the object had from version *first* to *last* (None: now)."""
        yield self.at(key, first)
        for version, state in zip(self._versions.get(key, []), self._states.get(key, []), strict=True):
            if first < version and (last is None or version <= last):
                yield state

    def _take(self, change: Change) -> None:
        before = self.at(change.key, self.version)
        after: Attributes | None = None
        if change.kind is OperationKind.CREATE:
            after = patched({}, decode_patch(change.patch))
        elif change.kind is OperationKind.UPDATE and before is not None:
            after = patched(before, decode_patch(change.patch))
        self.version = change.version
        self.changes.append(change)
        self.changes_to.setdefault(change.key, []).append(change)
        self._versions.setdefault(change.key, []).append(change.version)
        self._states.setdefault(change.key, []).append(after)


class SeenHistory:
    """
    A history as one replica may know it: to the checkers, a history.

    Args:
        history: What really happened.
        readable: Returns what may be read of an object's attributes, or None if it is not seen.
        shown: The same of what a synchronization of everything brings.
        follows: Tells whether a synchronization of everything brings objects of an entity at all.
    """

    def __init__(
        self,
        history: History,
        readable: Callable[[str, Attributes | None], Attributes | None],
        shown: Callable[[str, Attributes | None], Attributes | None],
        follows: Callable[[str], bool],
    ) -> None:
        self.readable = readable
        self.shown = shown
        self.follows = follows
        self.version_at = history.version_at
        self.next_after = history.next_after
        self._history = history
        self._seen: dict[tuple[Key, int], Attributes | None] = {}
        self._lives = history.lives

    @property
    def keys(self) -> Iterable[Key]:
        """The keys of all objects that ever were."""
        return self._history.keys

    @property
    def version(self) -> int:
        """How far the history goes."""
        return self._history.version

    @property
    def selected(self) -> SeenHistory:
        """The history as one sees it who asks for single objects."""
        return SeenHistory(self._history, self.readable, self.readable, lambda _: True)

    def over(self, history: History) -> SeenHistory:
        """Return another history as the same replica may know it."""
        return SeenHistory(history, self.readable, self.shown, self.follows)

    def at(self, key: Key, version: int) -> Attributes | None:
        """Return what may be read of the attributes that an object had at a version."""
        if self._lives != self._history.lives:
            self._lives = self._history.lives
            self._seen.clear()
        place = key, self._history.version_at(key, version)
        if place not in self._seen:
            self._seen[place] = self.readable(key[0], self._history.at(key, version))
        return self._seen[place]

    def was_absent(self, key: Key, first: int, last: int | None = None) -> bool:
        """Tell whether the object was not shown at some moment from version *first* to *last* (None: now)."""
        states = self._history.states_between(key, first, last)
        return any(self.shown(key[0], state) is None for state in states)


Past: TypeAlias = History | SeenHistory


@dataclass(frozen=True)
class ServerRecord:
    """
    All that a store holds of one tenant, as of one moment.

    Attributes:
        settled: By replica id and seq: what is collected by now is still in it.
        collected: The highest version that is collected.
        places: Where the changes of an operation, by (replica id, seq), are counted, if not there.
    """

    head: Head
    head_commit_id: bytes | None
    history: History
    objects: dict[Key, ObjectState]
    by_version: list[tuple[int, Key]]
    replicas: dict[str, ReplicaState | None]
    settled: dict[str, dict[int, Settled]]
    failures: dict[str, failure_pb2.SynchronizationFailure]
    collected: int = 0
    places: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    @cached_property
    def changes_of(self) -> dict[tuple[str, int], list[Change]]:
        """The changes that each operation (replica id, seq) caused."""
        found: dict[tuple[str, int], list[Change]] = {}
        for change in self.history.changes:
            place = str(UUID(bytes=change.replica)), change.seq
            found.setdefault(self.places.get(place, place), []).append(change)
        return found

    def visible(self) -> dict[Key, tuple[int, Attributes]]:
        """Return version and attributes of each object that is there."""
        return {
            key: (state.version, decode_map(state.attributes))
            for key, state in self.objects.items()
            if not state.deleted
        }


@dataclass(frozen=True)
class ReplicaRecord:
    """All that a replica directory holds, as of one moment."""

    replica_id: str
    view: dict[Key, ViewRecord]
    base: dict[Key, ViewRecord]
    unconfirmed: dict[Key, list[tuple[int, int]]]
    pending: dict[int, Key]
    outcomes: dict[int, Outcome]
    failures: dict[str, failure_pb2.SynchronizationFailure]
    log: dict[int, bytes]
    last_seq: int
    cursor: splice_pb2.Cursor | None
    timeline: str = ""

    def held(self, key: Key) -> ViewRecord | None:
        """Return what the replica has of the server's state of an object."""
        return self.base.get(key) if self.unconfirmed.get(key) else self.view.get(key)

    @property
    def keys(self) -> list[Key]:
        """The keys of all objects that the replica knows anything of."""
        return list(dict.fromkeys([*self.view, *self.base, *self.unconfirmed]))


class Committed:
    """The operations that one replica ever committed, by seq, as they were logged."""

    def __init__(self, entries: Mapping[int, bytes] | None = None) -> None:
        self.data: dict[int, bytes] = {}
        self.operations: dict[int, Operation] = {}
        self.seqs_of: dict[Key, list[int]] = {}
        for seq, data in (entries or {}).items():
            self.add(seq, data)

    def add(self, seq: int, data: bytes) -> Operation:
        """Note the next operation."""
        operation = decode_operation(data)
        self.data[seq] = data
        self.operations[seq] = operation
        self.seqs_of.setdefault(operation.key, []).append(seq)
        return operation

    def copy(self) -> Committed:
        """Return what is committed by now."""
        copied = Committed()
        copied.data, copied.operations = dict(self.data), dict(self.operations)
        copied.seqs_of = {key: list(seqs) for key, seqs in self.seqs_of.items()}
        return copied


def read_server(
    store: Store,
    last_seqs: Mapping[str, int],
    *,
    history: History | None = None,
    known: Mapping[tuple[str, int], Settled] | None = None,
    tenant: str = DEFAULT_TENANT,
) -> ServerRecord:
    """
    Read a store.

    Args:
        store: The store.
        last_seqs: By replica id, the newest seq of its log.
        history: Taken on from where it is. None: read from the beginning.
        known: What the store ever settled, by replica id and seq: it may have forgotten some of it.
        tenant: Whose data.
    """
    history = history if history is not None else History()
    with store.read(tenant) as reader:
        history.read_on(reader)
        head = reader.head()
        # As the index has them: an entry that should not be there shows as a repetition.
        by_version = sorted(
            (state.version, key)
            for entity in reader.entities()
            for key, state in reader.latest_objects(entity, 0, 2**62, 2**62).objects
        )
        failures: dict[str, failure_pb2.SynchronizationFailure] = {}
        after = b""
        while found := reader.failures(after, SCAN_ENTRIES, SCAN_BYTES):
            failures.update(
                (str(UUID(bytes=id_)), failure_pb2.SynchronizationFailure.FromString(data)) for id_, data in found
            )
            after = found[-1][0]
        return ServerRecord(
            head=head,
            head_commit_id=reader.commit_id(head.version),
            history=history,
            objects=reader.objects(history.keys),
            by_version=by_version,
            replicas={id_: reader.replica(UUID(id_).bytes) for id_ in last_seqs},
            settled={
                id_: _remembered(id_, reader.settled(UUID(id_).bytes, range(1, last_seq + 1)), known or {})
                for id_, last_seq in last_seqs.items()
            },
            failures=failures,
            collected=reader.collected(),
        )


def _remembered(
    replica_id: str, settled: Mapping[int, Settled], known: Mapping[tuple[str, int], Settled]
) -> dict[int, Settled]:
    """Return what is settled of a replica, with what the store has forgotten."""
    forgotten = {seq: one for (id_, seq), one in known.items() if id_ == replica_id}
    return dict(sorted({**forgotten, **settled}.items()))


def read_shown(storage: Storage) -> dict[Key, ViewRecord]:
    """Read what a replica shows."""
    with storage.environment.read() as transaction:
        entries = storage.view._entries(transaction, b"")
        return {unpack_object_key(key): _unpack(value) for key, value in entries if value}


def read_replica(storage: Storage) -> ReplicaRecord:
    """Read a replica directory in one transaction."""
    environment = storage.environment
    with environment.read() as transaction:

        def entries(name: str) -> list[tuple[bytes, bytes]]:
            return list(transaction.cursor(environment.database(name)))

        seqs = [unpack_position(key) for key, _ in entries("log")]
        log = {seq: storage.log.get(transaction, seq) or b"" for seq in seqs}
        unconfirmed: dict[Key, list[tuple[int, int]]] = {}
        for entry, version in entries("unconfirmed"):
            key = unpack_object_key(entry[: -SEQ_BYTES - 1])
            unconfirmed.setdefault(key, []).append((unpack_position(entry[-SEQ_BYTES:]), unpack_position(version)))
        pending = {}
        for position, _ in entries("pending"):
            one = storage.pending_at(transaction, unpack_position(position))
            if one is not None:
                pending[one.seq] = one.key
        outcomes = {}
        for position, _ in entries("outcomes"):
            outcome = storage.outcome(transaction, unpack_position(position))
            if outcome is not None:
                outcomes[unpack_position(position)] = outcome
        failures = [failure_pb2.SynchronizationFailure.FromString(value) for _, value in entries("failures")]
        cursor = transaction.get(b"cursor", db=environment.database("meta"))
        return ReplicaRecord(
            replica_id=storage.lineage.replica_id,
            view={unpack_object_key(key): _unpack(value) for key, value in entries("objects")},
            base={unpack_object_key(key): _unpack(value) for key, value in entries("base")},
            unconfirmed=unconfirmed,
            pending=pending,
            outcomes=outcomes,
            failures={failure.id: failure for failure in failures},
            log=log,
            last_seq=storage.last_seq(transaction),
            cursor=splice_pb2.Cursor.FromString(cursor) if cursor else None,
            timeline=storage.lineage.timeline,
        )
