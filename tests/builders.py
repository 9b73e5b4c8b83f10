"""
What tests are built from: operations, stores, upload sessions, a server with its replicas.

Everything has a default that fits most tests; a test names what it is about.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import secrets
import threading
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeVar, cast

import grpc
import lmdb
import msgpack

from tidelog._attributes import Reference
from tidelog._contents import content_path
from tidelog._entity import Entity
from tidelog._environment import DATABASES_MAX
from tidelog._errors import ResourceClosed, StorageError
from tidelog._keys import ObjectKey
from tidelog._operation import CommitGroup, Operation, OperationKind
from tidelog._patch import Patch, decode_patch
from tidelog._schema import Schema
from tidelog._values import decode_trusted, encode, equal
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_server import (
    Application,
    Authenticator,
    ContentStore,
    DirectoryContents,
    LmdbStore,
    Principal,
    Server,
    ServerLimits,
    Tenant,
    TransientError,
)
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._author import FormerIdentity
from tidelog_server._engine import Evaluation, UploadState, evaluate_batch, evaluate_held
from tidelog_server._errors import ServerOutdated
from tidelog_server._file_records import content_record
from tidelog_server._files import Files, Wanted
from tidelog_server._indexes import Written, index_writes
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._principal import ANONYMOUS
from tidelog_server._records import (
    COMMIT_ID_BYTES,
    RUN_BYTES,
    Change,
    Forgotten,
    Head,
    Identity,
    ObjectState,
    ReplicaState,
    Settled,
    Writes,
)
from tidelog_server._retention import Collected, Periods, Retention
from tidelog_server._session import begin_upload
from tidelog_server._store import ObjectsPage, Reader, Store

TENANT: Final = "default"
USER: Final = Principal("ann")
REPLICA_A: Final = b"a" * 16
REPLICA_B: Final = b"b" * 16
TIME_US: Final = 1_700_000_000_000_000

T = TypeVar("T")


# --- schemas --------------------------------------------------------------------


def references_schema(references: Mapping[str, Mapping[str, str | list[str]]], version: int = 1) -> Schema:
    """
    Return a schema that says nothing but what refers to what.

    Args:
        references: By entity, the entity that each reference attribute names; in a list,
            if the attribute is a list of ids.
        version: The schema's version.
    """
    return Schema(
        [
            Entity(
                entity,
                {
                    attribute: Reference(target, on_delete="keep")
                    if isinstance(target, str)
                    else Reference(target[0], many=True, on_delete="keep")
                    for attribute, target in targets.items()
                },
            )
            for entity, targets in references.items()
        ],
        version=version,
        open=True,
    )


# --- files ----------------------------------------------------------------------


def file_value(data: bytes, name: str = "photo.jpg", **others: Any) -> dict[str, Any]:
    """Return the value of an attribute that refers to a content."""
    return {
        "name": name,
        "size": len(data),
        "media_type": "image/jpeg",
        "sha256": hashlib.sha256(data).digest(),
        **others,
    }


class Cabinet:
    """
    The files of a lab, in a directory, with a clock of their own.

    Attributes:
        files: They.
        time_us: What the clock shows.
    """

    def __init__(self, lab: Lab, path: Path) -> None:
        self.lab = lab
        self.time_us = TIME_US
        self.contents = DirectoryContents(path)
        self.files = Files(lab.application, lab.store, self.contents, lambda: self.time_us)
        self.files.note_timeline()

    def upload(self, data: bytes, principal: Principal | None = None) -> dict[str, Any]:
        """Upload a content, and return the value that refers to it."""
        incoming = self.files.begin_upload(principal or USER, wanted(data), 0)
        if data:
            incoming.append(data)
        incoming.complete()
        incoming.leave()
        return file_value(data)

    def has(self, data: bytes) -> bool:
        """Tell whether a content is there; fail if the store of contents and the record differ."""
        sha256 = hashlib.sha256(data).digest()
        with self.lab.store.read(TENANT) as reader:
            record = content_record(sha256, reader.index)
        size = self.contents.size(TENANT, sha256, "" if record is None else record.copy)
        assert (None if record is None else record.size) == size
        return record is not None

    def path(self, data: bytes) -> Path:
        """Return where a content lies, of which there is one copy."""
        sha256 = hashlib.sha256(data).digest()
        (copy,) = (one.copy for one in self.contents.contents(TENANT) if one.sha256 == sha256)
        return self.contents.tenant_path(TENANT) / content_path(sha256, copy)

    def tenant(self, principal: Principal | None = None) -> Tenant:
        """Return the tenant's data, for a service."""
        return Tenant(self.lab.application, self.lab.store, TENANT, principal, lambda: self.time_us, self.files)

    def entries(self, prefix: bytes) -> list[bytes]:
        """Return the keys of the table of indexes that start with a prefix."""
        with self.lab.store.read(TENANT) as reader:
            return [key for key, _ in reader.index_range(prefix, b"", 1_000)]

    def collect(self, grace: timedelta = timedelta(days=1)) -> int:
        """Collect what nothing refers to; return how many contents went."""
        never = timedelta(days=100_000)
        retention = Retention(self.lab.store, Periods(never, never, never, grace), lambda: self.time_us, self.files)
        return retention.collect().contents

    def wait(self, period: timedelta) -> None:
        """Let time pass."""
        self.time_us += period // timedelta(microseconds=1)


def wanted(data: bytes) -> Wanted:
    """Name a content."""
    return Wanted(hashlib.sha256(data).digest(), len(data))


# --- operations -----------------------------------------------------------------


def make_operation(
    kind: str = "create",
    *,
    seq: int = 1,
    id: str = "t1",  # noqa: A002 - the glossary's word
    entity: str = "Task",
    set: dict[str, Any] | None = None,  # noqa: A002 - a patch's field
    unset: Sequence[str] = (),
    increment: dict[str, Any] | None = None,
    add: dict[str, list[Any]] | None = None,
    remove: dict[str, list[Any]] | None = None,
    patch: bytes | None = None,
    nonce: int | None = None,
    base_version: int = 0,
    group: CommitGroup | None = None,
    schema_version: int = 0,
) -> Operation:
    """Return an operation. Its nonce follows from its seq unless one is given."""
    if patch is None:
        patch = (
            b""
            if kind == "delete"
            else Patch(set or {}, tuple(unset), increment or {}, add or {}, remove or {}).encode()
        )
    return Operation(
        seq,
        1_000_000 + seq if nonce is None else nonce,
        OperationKind[kind.upper()],
        entity,
        id,
        patch,
        base_version,
        group,
        schema_version,
        TIME_US,
    )


def create(seq: int, id: str = "t1", set: dict[str, Any] | None = None, **others: Any) -> bytes:  # noqa: A002
    """Return a serialized creation."""
    return make_operation(
        "create", seq=seq, id=id, set={"title": "Buy milk"} if set is None else set, **others
    ).encode()


def update(seq: int, id: str = "t1", set: dict[str, Any] | None = None, **others: Any) -> bytes:  # noqa: A002
    """Return a serialized update."""
    return make_operation("update", seq=seq, id=id, set=set, **others).encode()


def delete(seq: int, id: str = "t1", **others: Any) -> bytes:  # noqa: A002
    """Return a serialized deletion."""
    return make_operation("delete", seq=seq, id=id, **others).encode()


def group(*operations: Operation) -> list[bytes]:
    """Return operations with consecutive seqs, serialized, as one commit group."""
    first = operations[0].seq
    return [
        operation._replace(group=CommitGroup(first, position, len(operations))).encode()
        for position, operation in enumerate(operations)
    ]


def packed(value: Any) -> bytes:
    """Return plain MessagePack, with none of tidelog's checks."""
    return cast("bytes", msgpack.packb(value))


def nested(levels: int) -> Any:
    """Return a value of so many lists, one inside the other."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# --- a store in memory -----------------------------------------------------------


@dataclass
class _Data:
    """What a store keeps of one tenant. States replace each other, so a shallow copy is a snapshot."""

    head: Head = field(default_factory=lambda: Head(0, b""))
    collected: int = 0
    commits: dict[int, bytes] = field(default_factory=dict)
    objects: dict[ObjectKey, ObjectState] = field(default_factory=dict)
    changes: dict[int, Change] = field(default_factory=dict)
    replicas: dict[bytes, ReplicaState] = field(default_factory=dict)
    settled: dict[tuple[bytes, int], Settled] = field(default_factory=dict)
    failures: dict[bytes, bytes] = field(default_factory=dict)
    refused: dict[tuple[bytes, ObjectKey], bytes] = field(default_factory=dict)
    indexes: dict[bytes, bytes] = field(default_factory=dict)

    def copy(self) -> _Data:
        return _Data(
            self.head,
            self.collected,
            dict(self.commits),
            dict(self.objects),
            dict(self.changes),
            dict(self.replicas),
            dict(self.settled),
            dict(self.failures),
            dict(self.refused),
            dict(self.indexes),
        )


class _MemoryReader:
    """Reads one tenant as of one moment. See `Reader`."""

    # So that the engine's tests ask for everything ahead.
    is_remote: ClassVar[bool] = True

    def __init__(self, data: _Data, identity: Identity, run: bytes) -> None:
        self._data = data
        self._identity = identity
        self._run = run

    def identity(self) -> Identity:
        return self._identity

    def head(self) -> Head:
        return self._data.head

    def commit_id(self, version: int) -> bytes | None:
        return self._data.commits.get(version)

    def commits_until(self, versions: Iterable[int]) -> list[Head]:
        commits = self._data.commits
        found = {max((one for one in commits if one <= version), default=0) for version in versions}
        return [Head(version, commits[version]) for version in sorted(found - {0}, reverse=True)]

    def run(self) -> bytes:
        return self._run

    def collected(self) -> int:
        return self._data.collected

    def objects(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, ObjectState]:
        return {key: self._data.objects[key] for key in keys if key in self._data.objects}

    def entity_objects(self, entity: str, after_id: str, limit: int, bytes_max: int) -> ObjectsPage:
        found = [one for one in self._data.objects.items() if one[0][0] == entity and one[0][1] > after_id]
        return _page(sorted(found, key=lambda one: one[0][1].encode()), limit, bytes_max)

    def entities(self) -> list[str]:
        return sorted({entity for entity, _ in self._data.objects}, key=str.encode)

    def latest_objects(self, entity: str, after: int, limit: int, bytes_max: int) -> ObjectsPage:
        found = [one for one in self._data.objects.items() if one[0][0] == entity and one[1].version > after]
        return _page(sorted(found, key=lambda one: one[1].version), limit, bytes_max)

    def index(self, key: bytes) -> bytes | None:
        return self._data.indexes.get(key)

    def indexes(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return {key: self._data.indexes[key] for key in keys if key in self._data.indexes}

    def index_range(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        keys = sorted(key for key in self._data.indexes if key.startswith(prefix) and key > after)
        return [(key, self._data.indexes[key]) for key in keys[:limit]]

    def change(self, version: int) -> Change | None:
        return self._data.changes.get(version)

    def changes(self, after: int, limit: int, bytes_max: int) -> list[Change]:
        found: list[Change] = []
        for version in sorted(version for version in self._data.changes if version > after)[:limit]:
            if bytes_max <= 0:
                break
            change = self._data.changes[version]
            found.append(change)
            bytes_max -= len(change.patch) + len(change.before)
        return found

    def replica(self, replica: bytes) -> ReplicaState | None:
        return self._data.replicas.get(replica)

    def replicas(self, after: bytes, limit: int) -> list[tuple[bytes, ReplicaState]]:
        ids = sorted(self._data.replicas)
        return [(one, self._data.replicas[one]) for one in ids[bisect_right(ids, after) :][:limit]]

    def settled(self, replica: bytes, seqs: Iterable[int]) -> dict[int, Settled]:
        return {seq: self._data.settled[replica, seq] for seq in seqs if (replica, seq) in self._data.settled}

    def first_settled(self, replica: bytes, limit: int) -> list[tuple[int, Settled]]:
        seqs = sorted(seq for one, seq in self._data.settled if one == replica)[:limit]
        return [(seq, self._data.settled[replica, seq]) for seq in seqs]

    def failure(self, failure_id: bytes) -> bytes | None:
        return self._data.failures.get(failure_id)

    def failures(self, after: bytes, limit: int, bytes_max: int) -> list[tuple[bytes, bytes]]:
        ids = sorted(self._data.failures)
        return [(one, self._data.failures[one]) for one in ids[bisect_right(ids, after) :][:limit]]

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        return self._data.refused.get((replica, key))

    def refused_creations(self, replica: bytes, limit: int) -> list[ObjectKey]:
        return [key for one, key in self._data.refused if one == replica][:limit]


class ProcessDied(TransientError):
    """Raised in a hook, it leaves a `MemoryStore` as the death of the process would."""


class MemoryStore:
    """
    Keeps everything in memory and runs each job at once, in the caller's thread. See `Store`.

    Args:
        disk: What outlives `close`; a second store opened on it finds what the first one wrote.
    """

    is_shared: ClassVar[bool] = False

    def __init__(self, disk: dict[str, Any] | None = None) -> None:
        self._disk = {} if disk is None else disk
        self._identity: Identity = self._disk.setdefault("identity", Identity(secrets.token_hex(8), str(uuid.uuid4())))
        self._tenants: dict[str, _Data] = self._disk.setdefault("tenants", {})
        self._notes: dict[str, bytes] = self._disk.setdefault("notes", {})
        self._left: list[tuple[str, Attempt]] = self._disk.get("under way", [])
        self._run = secrets.token_bytes(RUN_BYTES)
        self._lock = threading.RLock()
        self._is_running_job = False
        self._required_note: tuple[str, bytes] | None = None
        self._closed = False

    @property
    def identity(self) -> Identity:
        """Which store this is."""
        return self._identity

    @contextmanager
    def read(self, tenant: str) -> Iterator[_MemoryReader]:
        """Read a tenant's data as of one moment."""
        if self._closed:
            raise ResourceClosed("the store is closed")
        self._check_note()
        with self._lock:
            yield _MemoryReader(self._tenants.get(tenant, _Data()).copy(), self._identity, self._run)

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """Run a job, now."""
        if self._closed:
            raise ResourceClosed("the store is closed")
        self._disk["under way"] = [] if attempt is None else [(tenant, attempt)]
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            data = self._tenants.get(tenant, _Data()).copy()
            self._is_running_job = True
            try:
                self._check_note()
                writes, result = job(_MemoryReader(data, self._identity, self._run))
                if writes is not None:
                    _write(data, writes)
            except ProcessDied:
                raise
            except BaseException as error:  # noqa: BLE001 - the job's owner gets it
                future.set_exception(
                    error if isinstance(error, Exception) else StorageError(f"a job ended with {type(error).__name__}")
                )
            else:
                if writes is not None:
                    self._tenants[tenant] = data
                    if writes.timeline:
                        self._identity = self._identity._replace(timeline=writes.timeline)
                        self._disk["identity"] = self._identity
                future.set_result(result)
            finally:
                self._is_running_job = False
        self._disk["under way"] = []
        return future

    def check_outside_of_jobs(self) -> None:
        """Raise StorageError inside a job."""
        with self._lock:  # it is the thread of whoever runs a job
            if self._is_running_job:
                raise StorageError("this is inside of a job")

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """Say what is under way more precisely."""
        self._disk["under way"] = [(tenant, attempt)]

    def left_under_way(self) -> UnderWay:
        """Return what a job was submitted with that never came to its end."""
        return list(self._left)

    def forget_under_way(self) -> None:
        """Forget it."""
        self._left = []

    def tenants(self) -> list[str]:
        """Return the tenants that anything was ever written for."""
        return sorted(self._tenants, key=str.encode)

    def note(self, name: str) -> bytes:
        """Return what was noted under a name."""
        return self._notes.get(name, b"")

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """Note something about the whole store."""
        with self._lock:
            if expected is not None and self.note(name) != expected:
                return False
            self._notes[name] = value
            return True

    def require_note(self, name: str, value: bytes) -> None:
        """Go on only as long as this is noted."""
        self._required_note = name, value

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Go on whatever is noted."""
        self._required_note = None
        yield

    def _check_note(self) -> None:
        if (required := self._required_note) is not None and self.note(required[0]) != required[1]:
            raise ServerOutdated("the note is another one")

    def close(self) -> None:
        """Refuse everything from now on."""
        self._closed = True


def _page(found: list[tuple[ObjectKey, ObjectState]], limit: int, bytes_max: int) -> ObjectsPage:
    page: list[tuple[ObjectKey, ObjectState]] = []
    size_bytes = 0
    for key, state in found:
        if len(page) == limit or (page and size_bytes >= bytes_max):
            return ObjectsPage(page, has_more=True)
        page.append((key, state))
        size_bytes += len(state.attributes)
    return ObjectsPage(page, has_more=False)


def _write(data: _Data, writes: Writes) -> None:
    data.objects.update((key, state) for key, (state, _) in writes.objects.items())
    data.changes.update((change.version, change) for change in writes.changes)
    for key, value in writes.index_entries.items():
        if value is None:
            data.indexes.pop(key, None)
        else:
            data.indexes[key] = value
    if writes.changes:
        data.head = Head(writes.version, secrets.token_bytes(COMMIT_ID_BYTES))
        data.commits[writes.version] = data.head.commit_id
    if writes.replica is not None:
        replica, state = writes.replica
        data.replicas[replica] = state
        data.settled.update(((replica, seq), one) for seq, one in writes.settled)
    _forget(data, writes.forgotten)
    for failure in writes.failures:
        data.failures[failure.id] = failure.data
        data.refused.update(((failure.replica, key), failure.id) for key in failure.refused_creations)


def _forget(data: _Data, forgotten: Forgotten) -> None:
    if forgotten.version:
        data.collected = forgotten.version
        data.changes = {version: one for version, one in data.changes.items() if version > forgotten.version}
        data.commits = {version: one for version, one in data.commits.items() if version >= forgotten.version}
    for key in forgotten.tombstones:
        del data.objects[key]
    for mark in forgotten.settled:
        del data.settled[mark]
    for refused in forgotten.refused_creations:
        del data.refused[refused]


# --- the engine -------------------------------------------------------------------


@dataclass
class Session:
    """The upload of one replica, driven without transport."""

    store: Store
    application: Application
    uploader: Uploader
    state: UploadState = field(default_factory=UploadState)
    time_us: int = TIME_US

    def batch(self, *operations: bytes, lost: Iterable[bytes] = ()) -> list[Result]:
        """Evaluate a batch, write what comes of it, return the results; *lost* are contents of files."""
        return self._run(
            lambda reader: evaluate_batch(
                operations,
                application=self.application,
                uploader=self.uploader,
                reader=reader,
                state=self.state,
                time_us=self.time_us,
                lost_contents=lost,
            )
        )

    def held(self) -> list[Result]:
        """Settle what is held."""
        return self._run(
            lambda reader: evaluate_held(
                application=self.application,
                uploader=self.uploader,
                reader=reader,
                state=self.state,
                time_us=self.time_us,
            )
        )

    def settle(self, *operations: bytes, lost: Iterable[bytes] = ()) -> list[Result]:
        """Upload a batch and end the upload; return the final results in order."""
        results = self.batch(*operations, lost=lost)
        final = iter(self.held())
        return [next(final) if result.status == Status.HELD else result for result in results]

    def _run(self, evaluate: Callable[[Reader], Evaluation]) -> list[Result]:
        def job(reader: Reader) -> tuple[Writes, Evaluation]:
            evaluation = evaluate(reader)
            return evaluation.writes, evaluation

        evaluation = self.store.submit(TENANT, job).result()
        self.state = evaluation.state
        return evaluation.results


@dataclass
class Lab:
    """An application over a store, and what a test wants to know of the two."""

    application: Application = field(default_factory=Application)
    store: Store = field(default_factory=MemoryStore)
    time_us: int = TIME_US

    def session(
        self,
        replica: bytes = REPLICA_A,
        *,
        principal: Principal = USER,
        leaves_earlier: bool = False,
        formers: tuple[FormerIdentity, ...] = (),
    ) -> Session:
        """Begin to upload as a replica."""
        begun = self.store.submit(
            TENANT, lambda reader: begin_upload(reader, replica, principal, self.time_us)
        ).result()
        uploader = Uploader(replica, principal, begun.session_number, leaves_earlier, formers)
        return Session(self.store, self.application, uploader, time_us=self.time_us)

    def settle(self, *operations: bytes, replica: bytes = REPLICA_A) -> list[Result]:
        """Upload operations in a session of their own; return the final results in order."""
        return self.session(replica).settle(*operations)

    def state(self, id: str = "t1", entity: str = "Task") -> ObjectState | None:  # noqa: A002
        """Return an object's state, or tombstone, or None."""
        with self.store.read(TENANT) as reader:
            return reader.objects([(entity, id)]).get((entity, id))

    def attributes(self, id: str = "t1", entity: str = "Task") -> dict[str, Any] | None:  # noqa: A002
        """Return an object's attributes, or None if it is not there."""
        state = self.state(id, entity)
        return None if state is None or state.deleted else decode_trusted(state.attributes)

    def changes(self, *, after: int = 0) -> list[Change]:
        """Return the change log."""
        with self.store.read(TENANT) as reader:
            return reader.changes(after, 100_000, 1_000_000_000)

    def version(self) -> int:
        """Return the newest version."""
        with self.store.read(TENANT) as reader:
            return reader.head().version

    def failures(self) -> list[failure_pb2.SynchronizationFailure]:
        """Return all failure records."""
        with self.store.read(TENANT) as reader:
            found = reader.failures(b"", 100_000, 1 << 30)
        return [failure_pb2.SynchronizationFailure.FromString(data) for _, data in found]

    def failure(self, result: Result) -> failure_pb2.SynchronizationFailure:
        """Return the record that a result names."""
        with self.store.read(TENANT) as reader:
            data = reader.failure(result.failure_id)
        assert data is not None, f"no failure {result.failure_id.hex()} was recorded"
        return failure_pb2.SynchronizationFailure.FromString(data)

    def replica(self, replica: bytes = REPLICA_A) -> ReplicaState:
        """Return what the store knows of a replica that has uploaded."""
        with self.store.read(TENANT) as reader:
            state = reader.replica(replica)
        assert state is not None
        return state

    def settled(self, *seqs: int, replica: bytes = REPLICA_A) -> list[int]:
        """Return which of the seqs are settled."""
        with self.store.read(TENANT) as reader:
            return sorted(reader.settled(replica, seqs))

    def collect(self, *, history: timedelta = timedelta(0), replicas: timedelta = timedelta.max) -> Collected:
        """Let be forgotten what was done before now; replicas only if a period is given."""
        return collect(self.store, self.time_us, history=history, replicas=replicas)

    def check_history(self) -> None:
        """Fail unless the change log explains every object: its state, its before-images, its order."""
        states: dict[ObjectKey, tuple[int, dict[str, Any]] | None] = {}
        for version, change in zip(itertools.count(1), self.changes(), strict=False):
            assert change.version == version, "versions have no gaps"
            known = states.get(change.key)
            if change.kind is OperationKind.CREATE:
                assert known is None, f"{change.key} was created twice"
                states[change.key] = (version, decode_patch(change.patch).apply({}))
                continue
            assert known is not None, f"{change.key} was changed before it was created"
            assert change.previous == known[0], f"version {version} does not name the change before it"
            before = known[1]
            if change.kind is OperationKind.DELETE:
                assert equal(decode_trusted(change.before), before), f"wrong before-image at version {version}"
                states[change.key] = None
                continue
            patch = decode_patch(change.patch)
            present, absent = decode_trusted(change.before)
            assert equal(present, {name: before[name] for name in patch.written if name in before})
            assert sorted(absent) == sorted(name for name in patch.written if name not in before)
            states[change.key] = (version, patch.apply(before))
        for key, known in states.items():
            attributes = self.attributes(key[1], key[0])
            assert equal(attributes, None if known is None else known[1]), f"the change log does not explain {key}"


def said(results: Iterable[Result]) -> list[str]:
    """Return each result as one word: APPLIED, HELD, NOT_READY, or the reason of a refusal."""
    names = {Status.APPLIED: "APPLIED", Status.HELD: "HELD", Status.NOT_READY: "NOT_READY"}
    return [names.get(result.status) or str(result.reason) for result in results]


def collect(
    store: Store, now_us: int, *, history: timedelta = timedelta(0), replicas: timedelta = timedelta.max
) -> Collected:
    """Let a store forget what was done before a moment; replicas only if a period is given."""
    return Retention(store, Periods(history, replicas, failures=timedelta.max), lambda: now_us).collect()


# --- a history made by hand --------------------------------------------------------


class Step(NamedTuple):
    """
    One change of one object.

    Attributes:
        key: Key of the object.
        attributes: What it holds then. None: it is deleted.
        replica: Who writes.
        seq: The operation that it is part of.
        by_hook: Whether a hook does it.
    """

    key: ObjectKey
    attributes: dict[str, Any] | None
    replica: bytes = REPLICA_B
    seq: int = 1
    by_hook: bool = False


def write_steps(
    store: Store,
    steps: Sequence[Step],
    *,
    schema: Schema | None = None,
    tenant: str = TENANT,
    time_us: int = TIME_US,
) -> int:
    """
    Write changes in one transaction, with the entries in the indexes that a schema asks for.

    Deleting what is not there changes nothing. Returns the newest version.
    """

    def job(reader: Reader) -> tuple[Writes, int]:
        version = reader.head().version
        states = dict(reader.objects(step.key for step in steps))
        stored = dict(states)
        changes = []
        for step in steps:
            state = states.get(step.key)
            before = None if state is None or state.deleted else decode_trusted(state.attributes)
            if before is None and step.attributes is None:
                continue
            version += 1
            change, states[step.key] = _written(step, version, state, before)
            change = change._replace(time_us=time_us)
            changes.append(change)
        written = {key: state for key, state in states.items() if key not in stored or stored[key] is not state}
        index = index_writes(
            schema or Schema(open=True),
            [Written(key, _held(stored.get(key)), _held(state), state.version) for key, state in written.items()],
            reader.index,
        )
        objects = {key: (state, stored[key].version if key in stored else 0) for key, state in written.items()}
        return Writes(objects, changes, None, [], [], version, index), version

    return store.submit(tenant, job).result()


def _written(
    step: Step, version: int, state: ObjectState | None, before: dict[str, Any] | None
) -> tuple[Change, ObjectState]:
    after, previous = step.attributes, state.version if state is not None else 0
    images: Any = b""
    if after is None:
        kind, images = OperationKind.DELETE, encode(before)
        new = ObjectState(version, state.created if state else 0, step.replica, True, False, b"")
    elif before is None or state is None:
        kind = OperationKind.CREATE
        new = ObjectState(version, version, step.replica, False, not step.by_hook, encode(after))
    else:
        kind = OperationKind.UPDATE
        names = {name for name in {*before, *after} if not equal(before.get(name), after.get(name))}
        present = {name: value for name, value in before.items() if name in names}
        images = encode([present, sorted(names - before.keys())])
        is_sole = state.sole_writer and state.creator == step.replica and not step.by_hook
        new = ObjectState(version, state.created, state.creator, False, is_sole, encode(after))
    change = Change(
        version, step.key, kind, b"", images, previous, step.replica, step.seq, step.by_hook, USER.user_id, TIME_US
    )
    return change, new


def _held(state: ObjectState | None) -> dict[str, Any] | None:
    return None if state is None or state.deleted else decode_trusted(state.attributes)


# --- a server and its replicas ------------------------------------------------------


@contextmanager
def quick_folder() -> Iterator[Path]:
    """Give a folder that syncs at once, where the machine has one: for tests that are not about the disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(prefix="tidelog-test-", dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


class World:
    """
    A server in this process, its store at hand, and the replicas of a test.

    Use it as a context manager.

    Attributes:
        lab: The application and the store. What it settles arrives as from other devices.
        server: The server; `stop` and `start` it at will.
    """

    def __init__(
        self,
        folder: Path,
        application: Application | None = None,
        *,
        authenticator: Authenticator | None = None,
        limits: ServerLimits | None = None,
        contents: ContentStore | None = None,
    ) -> None:
        self.folder = folder
        self.store = LmdbStore(folder / "server")
        self.lab = Lab(application or Application(), self.store)
        self._authenticator = authenticator
        self._limits = limits
        self._contents = contents
        self.server = self.made_server()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self.server.stop(grace_seconds=0)
        self.store.close()

    def replica(self, name: str = "a", **options: Any) -> Replica:
        """Open a replica of this server; it is closed with the world."""
        options.setdefault("server", self.server.address)
        return self._open.enter_context(Replica(self.folder / name, **options))

    def deploy(self, application: Application) -> None:
        """Stop the server and start one with another application over the same store, at another address."""
        self.server.stop(grace_seconds=0)
        self.lab.application = application
        self.server = self.made_server()
        self.server.start()

    def made_server(self, listen: str = "127.0.0.1:0") -> Server:
        """Return a server of the lab's application and store, not started. It forgets no history."""
        # What the lab writes is of long ago by the server's clock.
        return Server(
            self.lab.application,
            store=self.store,
            listen=listen,
            authenticator=self._authenticator,
            limits=self._limits,
            contents=self._contents,
            history_retention=timedelta.max,
            replica_retention=timedelta.max,
        )

    def channel(self) -> grpc.Channel:
        """Open a channel to the server; it is closed with the world."""
        return self._open.enter_context(grpc.insecure_channel(self.server.address))

    def lose_answers(self, replica: Replica) -> list[Result]:
        """Settle what is pending on a replica without its knowledge, as if the answers had been lost."""
        pending = [logged.operation.encode() for logged in replica.pending()]
        return self.lab.session(uuid.UUID(replica.replica_id).bytes, principal=ANONYMOUS).settle(*pending)


def contents(replica: Replica, entity: str = "Task") -> dict[str, dict[str, Any]]:
    """Return the objects of an entity as a replica shows them, by id."""
    return {found.id: found.to_dict() for found in replica.query(entity)}


def entries(path: Path) -> list[tuple[str, bytes, bytes]]:
    """Return table, key and value of all that is in a directory of LMDB."""
    with lmdb.open(str(path), max_dbs=DATABASES_MAX) as environment, environment.begin() as transaction:
        names = [key.decode() for key, _ in transaction.cursor()]
        tables = {name: environment.open_db(name.encode(), txn=transaction, create=False) for name in names}
        return [(name, *entry) for name, table in tables.items() for entry in transaction.cursor(table)]


def replace_entry(path: Path, table: str, key: bytes, value: bytes | None) -> None:
    """Put an entry behind everybody's back, or delete it."""
    with (
        lmdb.open(str(path), max_dbs=DATABASES_MAX, sync=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        database = environment.open_db(table.encode(), txn=transaction, create=False)
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)


def damages(value: bytes, chosen: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield what may become of an entry, each with what it is: deleted, cut off, one bit or one byte flipped."""
    yield "deleted", None
    if not value:
        return
    yield "cut", value[: chosen.randrange(len(value))]
    for flipped in (1 << chosen.randrange(8), 0xFF):
        place = chosen.randrange(len(value))
        yield "flipped", value[:place] + bytes([value[place] ^ flipped]) + value[place + 1 :]
