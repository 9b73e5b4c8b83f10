"""
The embedded store: LMDB in one directory, one server process.

One thread writes. It takes the jobs of all sessions that are waiting and commits
them together, so that many sessions share one sync to disk; a job that fails takes
nothing with it, because only what jobs return is written. Readers never wait.

Keys start with the tenant's number in four bytes, so that a tenant's data are
neighbours, and go on so that what is written together sorts together:

    tenants    name                        -> number
    heads      tenant                      -> version, commit id
    collected  tenant                      -> highest version collected
    commits    tenant version              -> id of the commit that ended there
    objects    tenant entity NUL id        -> state
    by_version tenant entity NUL version   -> id, at the latest version only
    indexes    tenant key                  -> value; see `_indexes`
    changes    tenant version              -> change
    replicas   tenant replica              -> state
    settled    tenant replica seq          -> nonce, outcome
    failures   tenant failure              -> serialized SynchronizationFailure
    refused    tenant replica entity NUL id -> failure that kept the replica from creating the object
    meta       epoch, timeline; NUL name -> what the server noted

Beside them a file says which attempts are under way. It is never synced: it has to
outlive the process, not the machine.
"""

from __future__ import annotations

import os
import queue
import secrets
import struct
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

import msgpack
from filelock import FileLock, Timeout

from tidelog._environment import MAP_BYTES_DEFAULT, Environment, put_many
from tidelog._errors import InheritedEnvironment, ResourceClosed, StorageError, StoreInUse, damaged
from tidelog._keys import ObjectKey, entity_prefix, pack_object_key, pack_position, unpack_object_key, unpack_position
from tidelog._logging import get_logger
from tidelog._operation import OperationKind
from tidelog_server._attempts import Attempt, UnderWay, decode_under_way, encode_under_way
from tidelog_server._backup_note import BACKUP_FILE
from tidelog_server._errors import ServerOutdated
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
from tidelog_server._store import ObjectsPage
from tidelog_server._survivor import Survivor

if TYPE_CHECKING:
    from tidelog._environment import LmdbDatabase, LmdbTransaction

FORMAT: Final = "tidelog-server-store-2"
LOCK_FILE: Final = "server.lock"
UNFINISHED_RESTORE: Final = "restore.unfinished"
GROUP_JOBS_MAX: Final = 64

_OBJECT: Final = struct.Struct(">QQ16sB")
_SETTLED: Final = struct.Struct(">QQB16s")
# What stands in the place of a failure where there is none: nonce and version once more, because nothing else has the
# nonce. Zeros in a store of before that.
_TWICE: Final = struct.Struct(">QQ")
_TENANT: Final = struct.Struct(">I")

TENANT_BYTES: Final = _TENANT.size

_DELETED: Final = 1
_SOLE_WRITER: Final = 2
_CHANGED: Final = 1
_REJECTED: Final = 2
_CULPRIT: Final = 4

_KINDS: Final = {int(kind): kind for kind in OperationKind}
# What comes of reading fields that `_packed` did not write.
_NOT_PACKED: Final = (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException)
_log = get_logger("tidelog.store")

T = TypeVar("T")


class LmdbStore:
    """
    Keeps everything in an LMDB environment in *path*.

    Raises:
        StoreInUse: Another server has the store open.
        FormatUnsupported: The directory holds something else.
        StorageError: It cannot be used, or is a backup.
    """

    is_shared: ClassVar[bool] = False

    def __init__(self, path: str | Path, *, map_bytes: int = MAP_BYTES_DEFAULT) -> None:
        self.path = Path(path)
        if (self.path / BACKUP_FILE).exists():
            raise StorageError(f"{self.path} is a backup: a server gets its data from it by `tidelog restore`")
        if (self.path / UNFINISHED_RESTORE).exists():
            raise StorageError(f"a restore to {self.path} was broken off, or is under way: restore it once more")
        self._pid = os.getpid()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be used: {error}") from error
        self._lock = FileLock(self.path / LOCK_FILE, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise StoreInUse(f"another server has {self.path} open: an embedded store has one server") from None
        try:
            self._environment = Environment.open(self.path, format_name=FORMAT, map_bytes=map_bytes)
            try:
                self._databases = Databases(self._environment)
                self._identity = self._environment.write(self._load_identity)
                self._under_way = Survivor(self.path / "under-way")
                self._left_under_way = decode_under_way(self._under_way.read())
            except BaseException:
                self._environment.close()
                raise
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise StorageError(f"{self.path} cannot be used: {error}") from error
            raise
        self._run = secrets.token_bytes(RUN_BYTES)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._required_note: tuple[str, bytes] | None = None
        self._closing = False
        self._writer = threading.Thread(target=self._write_jobs, name="tidelog-writer", daemon=True)
        self._writer.start()

    @property
    def identity(self) -> Identity:
        """Which store this is."""
        return self._identity

    @contextmanager
    def read(self, tenant: str) -> Iterator[LmdbReader]:
        """Read a tenant's data as of one moment."""
        with self._environment.read() as transaction:
            self._check_note(transaction)
            prefix = self._known_prefix(transaction, tenant) or _NO_TENANT
            reader = LmdbReader(transaction, self._databases, prefix, self._run)
            try:
                yield reader
            finally:
                reader.detach()

    def submit(
        self, tenant: str, job: Callable[[Any], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """Run a job in a write transaction. See `Store.submit`."""
        if threading.current_thread() is self._writer:
            # Whoever waited for it there would wait for ever, and everybody else with him.
            raise StorageError("a job, and a hook in it, cannot submit another one: a hook writes through its context")
        future: Future[T] = Future()
        # A job that was submitted runs: whoever stops waiting for it must not cancel it.
        future.set_running_or_notify_cancel()
        if self._closing:
            raise ResourceClosed("the store is closed")
        self._check_process()
        self._jobs.put(_Job(tenant, job, future, attempt))
        return future

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """Say what is under way more precisely. See `Store.announce`."""
        self._under_way.write(encode_under_way([(tenant, attempt)]))

    def left_under_way(self) -> UnderWay:
        """Return what was under way when the process died that had the store before this one."""
        return self._left_under_way

    def forget_under_way(self) -> None:
        """Forget what was left under way."""
        self._left_under_way = ()
        self._under_way.write(b"")

    def tenants(self) -> list[str]:
        """Return the tenants that anything was ever written for."""
        with self._environment.read() as transaction:
            names = transaction.cursor(self._databases.tenants).iternext(keys=True, values=False)
            return [name.decode() for name in names]

    def note(self, name: str) -> bytes:
        """Return what the server noted about the whole store under a name; empty if nothing."""
        with self._environment.read() as transaction:
            return noted(transaction, self._databases, name)

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """Note something about the whole store, durably. See `Store.set_note`."""
        databases = self._databases

        def work(transaction: LmdbTransaction) -> bool:
            if expected is not None and noted(transaction, databases, name) != expected:
                return False
            return transaction.put(_NOTE + name.encode(), value, db=databases.meta)

        return self._environment.write(work)

    def require_note(self, name: str, value: bytes) -> None:
        """Go on only as long as this is noted. See `Store.require_note`."""
        self._required_note = name, value

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Make the store ready. There is no other server that could."""
        self._required_note = None
        yield

    def _check_note(self, transaction: LmdbTransaction) -> None:
        if (required := self._required_note) is not None:
            name, value = required
            if noted(transaction, self._databases, name) != value:
                raise ServerOutdated(f"{self.path} was made ready for another schema")

    def begin_timeline(self) -> Identity:
        """Begin a new timeline, because the history may go on otherwise than it did, and return the identity."""

        def work(transaction: LmdbTransaction) -> Identity:
            transaction.put(b"timeline", str(uuid.uuid4()).encode(), db=self._databases.meta)
            return self._load_identity(transaction)

        self._identity = self._environment.write(work)
        return self._identity

    def close(self) -> None:
        """Finish the jobs that were submitted, then close."""
        self.check_outside_of_jobs()
        if self._closing:
            return
        self._closing = True
        if self._pid != os.getpid():
            return  # the process it was opened by goes on with it
        self._jobs.put(None)
        self._writer.join()
        while not self._jobs.empty():  # submitted in the instant before the close
            if (job := self._jobs.get()) is not None:
                job.future.set_exception(ResourceClosed("the store is closed"))
        self._under_way.close()
        self._environment.close()
        self._lock.release()

    def check_outside_of_jobs(self) -> None:
        """Raise StorageError inside a job, which must not wait for what only comes after it."""
        if threading.current_thread() is self._writer:
            raise StorageError("a hook can neither stop its server nor add a file: that waits for its end")

    def _check_process(self) -> None:
        # Its writer did not come along into a forked child: a job would wait for ever.
        if self._pid != os.getpid():
            raise InheritedEnvironment(
                f"{self.path} was opened by the process this one was forked from, which goes on with it: "
                "an embedded store has one server process"
            )

    def _load_identity(self, transaction: LmdbTransaction) -> Identity:
        meta = self._databases.meta
        for name in (b"epoch", b"timeline"):
            transaction.put(name, str(uuid.uuid4()).encode(), db=meta, overwrite=False)
        return read_identity(transaction, self._databases)

    def _write_jobs(self) -> None:
        group: list[_Job] = []
        while (job := self._jobs.get()) is not None:
            if job.alone and group:
                self._write_group(group)
                group = []
            group.append(job)
            if job.alone or len(group) == GROUP_JOBS_MAX or self._jobs.empty():
                self._write_group(group)
                group = []
        if group:
            self._write_group(group)

    def _write_group(self, group: list[_Job]) -> None:
        identity = self._identity
        under_way = [(job.tenant, job.attempt) for job in group if job.attempt is not None]
        try:
            if under_way:
                self._under_way.write(encode_under_way(under_way))
            outcomes = self._environment.write(lambda transaction: self._run_group(transaction, group))
        except BaseException as error:  # noqa: BLE001 - the jobs' owners are told; this thread must live on
            _log.exception("commit failed", job_count=len(group))
            self._identity = identity
            for job in group:
                job.future.set_exception(error)
            return
        finally:
            if under_way:
                self._under_way.write(b"")
        for job, (result, refusal) in zip(group, outcomes, strict=True):
            if refusal is None:
                job.future.set_result(result)
            elif isinstance(refusal, Exception):
                job.future.set_exception(refusal)
            else:
                # What would end a program must not end whoever awaits this.
                job.future.set_exception(StorageError(f"a job ended with {type(refusal).__name__}"))

    def _run_group(self, transaction: LmdbTransaction, group: list[_Job]) -> list[tuple[Any, BaseException | None]]:
        # An id for each tenant: the cursor of one must never pass as another's.
        commit_ids: dict[bytes, bytes] = defaultdict(lambda: secrets.token_bytes(COMMIT_ID_BYTES))
        outcomes: list[tuple[Any, BaseException | None]] = []
        heads: dict[bytes, int] = {}
        self._check_note(transaction)
        for job in group:
            known = self._known_prefix(transaction, job.tenant)
            reader = LmdbReader(transaction, self._databases, known or _NO_TENANT, self._run)
            try:
                writes, result = job.work(reader)
            except BaseException as error:  # noqa: BLE001 - handed to the job's owner; nothing of it was written
                outcomes.append((None, error))
                continue
            if writes is not None:
                prefix = known or self._new_prefix(transaction, job.tenant)
                self._apply(transaction, prefix, writes, commit_ids[prefix])
                if writes.changes:
                    heads[prefix] = writes.version
            outcomes.append((result, None))
        for prefix, version in heads.items():
            transaction.put(prefix + pack_position(version), commit_ids[prefix], db=self._databases.commits)
        return outcomes

    def _known_prefix(self, transaction: LmdbTransaction, tenant: str) -> bytes | None:
        return transaction.get(tenant.encode(), db=self._databases.tenants)

    def _new_prefix(self, transaction: LmdbTransaction, tenant: str) -> bytes:
        database = self._databases.tenants
        prefix = _TENANT.pack(transaction.stat(database)["entries"] + 1)
        transaction.put(tenant.encode(), prefix, db=database)
        return prefix

    def _apply(self, transaction: LmdbTransaction, prefix: bytes, writes: Writes, commit_id: bytes) -> None:
        databases = self._databases
        put, delete = transaction.put, transaction.delete
        objects = []
        by_version = []
        for (entity, id_), (state, replaced) in writes.objects.items():
            place, id_bytes = prefix + entity_prefix(entity), id_.encode()
            version, created, creator, deleted, sole_writer, attributes = state
            flags = (_DELETED if deleted else 0) | (_SOLE_WRITER if sole_writer else 0)
            objects.append((place + id_bytes, _OBJECT.pack(version, created, creator, flags) + attributes))
            if replaced:
                delete(place + pack_position(replaced), db=databases.by_version)
            by_version.append((place + pack_position(version), id_bytes))
        put_many(transaction, databases.objects, objects)
        put_many(transaction, databases.by_version, by_version)
        put_many(
            transaction,
            databases.changes,
            [(prefix + pack_position(change.version), _pack_change(change)) for change in writes.changes],
        )
        if writes.changes:
            put(prefix, pack_position(writes.version) + commit_id, db=databases.heads)
        indexed = []
        for key, value in writes.index_entries.items():
            if value is None:
                delete(prefix + key, db=databases.indexes)
            else:
                indexed.append((prefix + key, value))
        put_many(transaction, databases.indexes, indexed)
        if writes.replica is not None:
            replica, replica_state = writes.replica
            put(prefix + replica, _packed(replica_state), db=databases.replicas)
            put_many(
                transaction,
                databases.settled,
                [(prefix + replica + pack_position(seq), _pack_settled(one)) for seq, one in writes.settled],
            )
        self._forget(transaction, prefix, writes.forgotten)
        for failure in writes.failures:
            put(prefix + failure.id, failure.data, db=databases.failures)
            for uncreated in failure.refused_creations:
                put(prefix + failure.replica + pack_object_key(*uncreated), failure.id, db=databases.refused)
        if writes.timeline:
            put(b"timeline", writes.timeline.encode(), db=databases.meta)
            # The jobs behind this one, of the same commit too, are of the new timeline.
            self._identity = self._identity._replace(timeline=writes.timeline)

    def _forget(self, transaction: LmdbTransaction, prefix: bytes, forgotten: Forgotten) -> None:
        databases, delete = self._databases, transaction.delete
        if forgotten.version:
            last = pack_position(forgotten.version)
            _delete_up_to(transaction, databases.changes, prefix, last)
            _delete_up_to(transaction, databases.commits, prefix, pack_position(forgotten.version - 1))
            transaction.put(prefix, last, db=databases.collected)
        for (entity, id_), version in forgotten.tombstones.items():
            place = prefix + entity_prefix(entity)
            delete(place + id_.encode(), db=databases.objects)
            delete(place + pack_position(version), db=databases.by_version)
        for replica, seq in forgotten.settled:
            delete(prefix + replica + pack_position(seq), db=databases.settled)
        for replica, key in forgotten.refused_creations:
            delete(prefix + replica + pack_object_key(*key), db=databases.refused)


class LmdbReader:
    """Reads one tenant in one transaction. See `Reader` for what each method promises."""

    is_remote: ClassVar[bool] = False

    def __init__(
        self, transaction: LmdbTransaction, databases: Databases, prefix: bytes, run: bytes = bytes(RUN_BYTES)
    ) -> None:
        self._transaction = transaction
        self._databases = databases
        self._prefix = prefix
        self._run = run

    def detach(self) -> None:
        """
        Let go of the transaction.

        A read transaction that has ended keeps its reader slot as long as anybody refers
        to it: a generator that waits for a slow client would, and the slots run out.
        """
        del self._transaction

    def identity(self) -> Identity:
        return read_identity(self._transaction, self._databases)

    def head(self) -> Head:
        value = self._transaction.get(self._prefix, db=self._databases.heads)
        return Head(0, b"") if value is None else Head(unpack_position(value[:8]), value[8:])

    def commit_id(self, version: int) -> bytes | None:
        return self._transaction.get(self._prefix + pack_position(version), db=self._databases.commits)

    def commits_until(self, versions: Iterable[int]) -> list[Head]:
        cursor = self._transaction.cursor(self._databases.commits)
        found: list[Head] = []
        for version in sorted(versions, reverse=True):
            if found and version >= found[-1].version:
                continue  # it is the one that was found already
            place = self._prefix + pack_position(version)
            exists = cursor.set_range(place)
            if not (exists and cursor.key() == place):
                exists = cursor.prev() if exists else cursor.last()
            if not exists or not (key := cursor.key()).startswith(self._prefix):
                break
            found.append(Head(unpack_position(key[len(self._prefix) :]), cursor.value()))
        return found

    def run(self) -> bytes:
        return self._run

    def collected(self) -> int:
        return unpack_position(self._transaction.get(self._prefix, b"", db=self._databases.collected))

    def objects(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, ObjectState]:
        get, database, prefix = self._transaction.get, self._databases.objects, self._prefix
        found = {}
        for key in keys:
            value = get(prefix + pack_object_key(*key), db=database)
            if value is not None:
                found[key] = _unpack_object(value)
        return found

    def entity_objects(self, entity: str, after_id: str, limit: int, bytes_max: int) -> ObjectsPage:
        prefix = self._prefix + entity_prefix(entity)
        # No id holds a NUL: with one appended, the search starts behind the id itself.
        start = prefix + after_id.encode() + b"\0" if after_id else prefix
        page = _PageBuilder(limit, bytes_max)
        for key, value in self._scan(self._databases.objects, start, prefix):
            if page.is_full:
                return page.end(has_more=True)
            page.add(unpack_object_key(key[len(self._prefix) :]), value)
        return page.end(has_more=False)

    def entities(self) -> list[str]:
        found: list[str] = []
        cursor = self._transaction.cursor(self._databases.by_version)
        more = cursor.set_range(self._prefix)
        while more and (key := cursor.key()).startswith(self._prefix):
            entity, _, _ = key[len(self._prefix) :].partition(b"\0")
            found.append(entity.decode())
            # The byte after NUL: the first key behind all of the entity's.
            more = cursor.set_range(self._prefix + entity + b"\1")
        return found

    def latest_objects(self, entity: str, after: int, limit: int, bytes_max: int) -> ObjectsPage:
        prefix = self._prefix + entity_prefix(entity)
        get, objects = self._transaction.get, self._databases.objects
        page = _PageBuilder(limit, bytes_max)
        for _place, id_ in self._scan(self._databases.by_version, prefix + pack_position(after + 1), prefix):
            if page.is_full:
                return page.end(has_more=True)
            page.add((entity, id_.decode()), get(prefix + id_, b"", db=objects))
        return page.end(has_more=False)

    def index(self, key: bytes) -> bytes | None:
        return self._transaction.get(self._prefix + key, db=self._databases.indexes)

    def indexes(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return {key: value for key in keys if (value := self.index(key)) is not None}

    def index_range(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        # The shortest key above another one is that with a NUL appended.
        start = self._prefix + (max(prefix, after + b"\0") if after else prefix)
        skipped = len(self._prefix)
        entries = self._scan(self._databases.indexes, start, self._prefix + prefix)
        return [(key[skipped:], value) for key, value in islice(entries, limit)]

    def change(self, version: int) -> Change | None:
        value = self._transaction.get(self._prefix + pack_position(version), db=self._databases.changes)
        return None if value is None else _unpack_change(version, value)

    def changes(self, after: int, limit: int, bytes_max: int) -> list[Change]:
        start = self._prefix + pack_position(after + 1)
        found = []
        for key, value in islice(self._scan(self._databases.changes, start, self._prefix), limit):
            found.append(_unpack_change(unpack_position(key[len(self._prefix) :]), value))
            bytes_max -= len(value)
            if bytes_max <= 0:
                break
        return found

    def replica(self, replica: bytes) -> ReplicaState | None:
        value = self._transaction.get(self._prefix + replica, db=self._databases.replicas)
        return None if value is None else _unpack_replica(value)

    def replicas(self, after: bytes, limit: int) -> list[tuple[bytes, ReplicaState]]:
        start = self._prefix + after + b"\0" if after else self._prefix
        found = islice(self._scan(self._databases.replicas, start, self._prefix), limit)
        return [(key[len(self._prefix) :], _unpack_replica(value)) for key, value in found]

    def settled(self, replica: bytes, seqs: Iterable[int]) -> dict[int, Settled]:
        prefix = self._prefix + replica
        found = {}
        for seq in seqs:
            value = self._transaction.get(prefix + pack_position(seq), db=self._databases.settled)
            if value is not None:
                found[seq] = _unpack_settled(value)
        return found

    def first_settled(self, replica: bytes, limit: int) -> list[tuple[int, Settled]]:
        prefix = self._prefix + replica
        found = islice(self._scan(self._databases.settled, prefix, prefix), limit)
        return [(unpack_position(key[len(prefix) :]), _unpack_settled(value)) for key, value in found]

    def failure(self, failure_id: bytes) -> bytes | None:
        return self._transaction.get(self._prefix + failure_id, db=self._databases.failures)

    def failures(self, after: bytes, limit: int, bytes_max: int) -> list[tuple[bytes, bytes]]:
        start = self._prefix + after + b"\0" if after else self._prefix
        found = []
        for key, value in islice(self._scan(self._databases.failures, start, self._prefix), limit):
            found.append((key[len(self._prefix) :], value))
            bytes_max -= len(value)
            if bytes_max <= 0:
                break
        return found

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        return self._transaction.get(self._prefix + replica + pack_object_key(*key), db=self._databases.refused)

    def refused_creations(self, replica: bytes, limit: int) -> list[ObjectKey]:
        prefix = self._prefix + replica
        found = islice(self._scan(self._databases.refused, prefix, prefix), limit)
        return [unpack_object_key(key[len(prefix) :]) for key, _ in found]

    def _scan(self, database: LmdbDatabase, start: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._transaction.cursor(database)
        if cursor.set_range(start):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value


class _PageBuilder:
    """Collects objects up to a limit."""

    def __init__(self, limit: int, bytes_max: int) -> None:
        self._limit = limit
        self._bytes_left = bytes_max
        self._objects: list[tuple[ObjectKey, ObjectState]] = []

    @property
    def is_full(self) -> bool:
        return len(self._objects) >= self._limit or self._bytes_left <= 0

    def add(self, key: ObjectKey, value: bytes) -> None:
        self._objects.append((key, _unpack_object(value)))
        self._bytes_left -= len(value)

    def end(self, *, has_more: bool) -> ObjectsPage:
        return ObjectsPage(self._objects, has_more)


class _Job:
    __slots__ = ("attempt", "future", "tenant", "work")

    def __init__(
        self,
        tenant: str,
        work: Callable[[Any], tuple[Writes | None, Any]],
        future: Future[Any],
        attempt: Attempt | None,
    ) -> None:
        self.tenant = tenant
        self.work = work
        self.future = future
        self.attempt = attempt

    @property
    def alone(self) -> bool:
        """Whether it gets a transaction of its own."""
        return self.attempt is not None and self.attempt.alone


class Databases:
    """The tables of a store."""

    def __init__(self, environment: Environment) -> None:
        self.tenants = environment.database("tenants")
        self.heads = environment.database("heads")
        self.collected = environment.database("collected")
        self.commits = environment.database("commits")
        self.objects = environment.database("objects")
        self.by_version = environment.database("by_version")
        self.indexes = environment.database("indexes")
        self.changes = environment.database("changes")
        self.replicas = environment.database("replicas")
        self.settled = environment.database("settled")
        self.failures = environment.database("failures")
        self.refused = environment.database("refused")
        self.meta = environment.database("meta")

    @property
    def of_tenants(self) -> dict[str, LmdbDatabase]:
        """The tables whose keys start with a tenant's number, by name."""
        return {name: database for name, database in vars(self).items() if name not in {"tenants", "meta"}}

    @property
    def all(self) -> dict[str, LmdbDatabase]:
        """All tables, by name."""
        return dict(vars(self))


# Names of meta with a NUL in front are the server's notes: none can hide the store's own entries.
_NOTE: Final = b"\0"

# Sorts before every tenant's number: a tenant that was never written reads as empty.
_NO_TENANT: Final = _TENANT.pack(0)


def _delete_up_to(transaction: LmdbTransaction, database: LmdbDatabase, prefix: bytes, last: bytes) -> None:
    """Delete the entries of a tenant whose positions are up to *last*."""
    cursor = transaction.cursor(database)
    found = cursor.set_range(prefix)
    while found and prefix <= cursor.key() <= prefix + last:
        found = cursor.delete() and bool(cursor.key())


def noted(transaction: LmdbTransaction, databases: Databases, name: str) -> bytes:
    """Return what the server noted about the whole store under a name; empty if nothing."""
    return transaction.get(_NOTE + name.encode(), b"", db=databases.meta)


def read_identity(transaction: LmdbTransaction, databases: Databases) -> Identity:
    """Return which store this is."""
    get, meta = transaction.get, databases.meta
    return Identity(get(b"epoch", b"", db=meta).decode(), get(b"timeline", b"", db=meta).decode())


def _unpack_object(value: bytes) -> ObjectState:
    try:
        version, created, creator, flags = _OBJECT.unpack_from(value)
    except struct.error as error:
        raise damaged("the record of an object") from error
    return ObjectState(
        version, created, creator, bool(flags & _DELETED), bool(flags & _SOLE_WRITER), value[_OBJECT.size :]
    )


def _pack_settled(one: Settled) -> bytes:
    flags = (
        (_CHANGED if one.changed_by_server else 0)
        | (_REJECTED if one.failure_id else 0)
        | (_CULPRIT if one.culprit else 0)
    )
    failure_id = one.failure_id or _TWICE.pack(one.nonce, one.version)
    return _SETTLED.pack(one.nonce, one.version, flags, failure_id)


def is_settled_twice(value: bytes) -> bool:
    """Tell whether the outcome of an operation says the same both times, or only once: a refusal, or an old one."""
    nonce, version, flags, second = _SETTLED.unpack(value)
    return bool(flags & _REJECTED) or second in (_TWICE.pack(nonce, version), bytes(_TWICE.size))


def _unpack_settled(value: bytes) -> Settled:
    try:
        nonce, version, flags, failure_id = _SETTLED.unpack(value)
    except struct.error as error:
        raise damaged("the outcome of an operation") from error
    return Settled(
        nonce, version, bool(flags & _CHANGED), failure_id if flags & _REJECTED else b"", bool(flags & _CULPRIT)
    )


def _pack_change(change: Change) -> bytes:
    return _packed(change[1:])


def _packed(fields: tuple[Any, ...]) -> bytes:
    return cast("bytes", msgpack.packb(fields))


def _unpack_change(version: int, value: bytes) -> Change:
    try:
        key, kind, *rest = msgpack.unpackb(value, use_list=False)
        return Change(version, key, _KINDS[kind], *rest)
    except _NOT_PACKED as error:
        raise damaged(f"the change at version {version}") from error


def _unpack_replica(value: bytes) -> ReplicaState:
    try:
        return ReplicaState(*msgpack.unpackb(value, use_list=False))
    except _NOT_PACKED as error:
        raise damaged("the record of a replica") from error
