"""
Store: what the server needs of a place that keeps its data.

Every implementation passes one contract test. A store decides nothing: it reads
records, runs jobs one after the other in transactions, and writes what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple, Protocol, TypeVar

from tidelog._keys import ObjectKey
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._records import Change, Head, Identity, ObjectState, ReplicaState, Settled, Writes

T = TypeVar("T")


class ObjectsPage(NamedTuple):
    """
    Some objects: at least one if there are any, and no more than asked for.

    Attributes:
        objects: Keys and states in order.
        has_more: Whether the scan ended because of a limit, so that more may follow.
    """

    objects: list[tuple[ObjectKey, ObjectState]]
    has_more: bool


class Reader(Protocol):
    """
    One tenant's data as of one moment.

    Attributes:
        is_remote: Whether each question takes a while, because it is asked over a network: then few are asked.
    """

    is_remote: ClassVar[bool]

    def identity(self) -> Identity:
        """Return which store this is, as of that moment: in a job, with what those before it began."""
        ...

    def head(self) -> Head:
        """Return where the tenant's history stands."""
        ...

    def commit_id(self, version: int) -> bytes | None:
        """Return the id of the commit that ended at *version*, or None if none did or it is collected."""
        ...

    def run(self) -> bytes:
        """
        Return which life of the store this is, in 16 bytes.

        It is another one whenever the data may have been replaced by older ones: after
        each opening of an embedded store. As long as it is the same, nothing durable
        went away.
        """
        ...

    def collected(self) -> int:
        """
        Return the highest version collected: 0 at first, and never less than before.

        Changes and tombstones up to it are not kept, all above it are; the ids of
        commits are kept from it on.
        """
        ...

    def commits_until(self, versions: Iterable[int]) -> list[Head]:
        """Return the newest commits that ended at each of *versions* or below: each once, the newest first."""
        ...

    def objects(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, ObjectState]:
        """Return the states of those objects that are or were there."""
        ...

    def entity_objects(self, entity: str, after_id: str, limit: int, bytes_max: int) -> ObjectsPage:
        """Return objects of an entity, tombstones too, in id order above *after_id*."""
        ...

    def entities(self) -> list[str]:
        """Return the entities that have objects, tombstones too, in byte order."""
        ...

    def latest_objects(self, entity: str, after: int, limit: int, bytes_max: int) -> ObjectsPage:
        """
        Return the entity's objects, tombstones too, whose latest version is above *after*, in version order.

        The page ends after *limit* objects, or once their attributes reach *bytes_max*.
        """
        ...

    def index(self, key: bytes) -> bytes | None:
        """Return the value of a key in the table of indexes, or None."""
        ...

    def indexes(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the values of those keys in the table of indexes that are there."""
        ...

    def index_range(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """
        Return entries of the table of indexes whose keys start with *prefix*, in key order.

        At most *limit*, and only those above the key *after* (empty: from the first one).
        """
        ...

    def change(self, version: int) -> Change | None:
        """Return the change of this version, or None if it is not kept."""
        ...

    def changes(self, after: int, limit: int, bytes_max: int) -> list[Change]:
        """Return changes in version order above *after*: up to *limit*, or until their size reaches *bytes_max*."""
        ...

    def replica(self, replica: bytes) -> ReplicaState | None:
        """Return what is known of a replica, or None."""
        ...

    def replicas(self, after: bytes, limit: int) -> list[tuple[bytes, ReplicaState]]:
        """Return up to *limit* replicas in the order of their ids above *after*."""
        ...

    def settled(self, replica: bytes, seqs: Iterable[int]) -> dict[int, Settled]:
        """Return the outcomes of those operations of a replica that are settled, by seq, as far as they are kept."""
        ...

    def first_settled(self, replica: bytes, limit: int) -> list[tuple[int, Settled]]:
        """Return up to *limit* of the outcomes kept of a replica's operations, from the lowest seq on."""
        ...

    def failure(self, failure_id: bytes) -> bytes | None:
        """Return a serialized `SynchronizationFailure`, or None."""
        ...

    def failures(self, after: bytes, limit: int, bytes_max: int) -> list[tuple[bytes, bytes]]:
        """
        Return (id, serialized failure) in the order of their ids above *after*.

        Up to *limit*, or until their size reaches *bytes_max*; empty at the end only.
        """
        ...

    def refused_creation(self, replica: bytes, key: ObjectKey) -> bytes | None:
        """Return the id of the failure because of which a replica could not create the object, or None."""
        ...

    def refused_creations(self, replica: bytes, limit: int) -> list[ObjectKey]:
        """Return up to *limit* keys of objects that a replica could not create."""
        ...


class Store(Protocol):
    """
    Keeps the data of all tenants. Reading may take a while: no event loop does that.

    Attributes:
        is_shared: Whether several servers may have it at the same time.
    """

    is_shared: ClassVar[bool]

    @property
    def identity(self) -> Identity:
        """Which store this is, as far as this process has heard: another one may have begun a timeline since."""
        ...

    def read(self, tenant: str) -> AbstractContextManager[Reader]:
        """Read a tenant's data as of one moment. Keep the block short: no waiting inside."""
        ...

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """
        Run *job* in a write transaction, after all jobs submitted before it.

        From before it runs until it is durable, *attempt* is under way: should the process
        die meanwhile, the next one finds it.

        The future yields what the job returned beside its writes, once these are
        durable, all of them. If it fails, none was made. It cannot be cancelled. The
        job may run more than once and sees the writes of the jobs before it; it must
        change nothing else, nor submit another job.
        """
        ...

    def check_outside_of_jobs(self) -> None:
        """Raise StorageError inside a job, which must not wait for what only comes after it."""
        ...

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """Say what is under way more precisely, from inside of a job that has its transaction alone."""
        ...

    def left_under_way(self) -> UnderWay:
        """Return what was under way when the process died that had the store before this one."""
        ...

    def forget_under_way(self) -> None:
        """Forget what was left under way."""
        ...

    def tenants(self) -> list[str]:
        """Return the tenants that anything was ever written for."""
        ...

    def note(self, name: str) -> bytes:
        """Return what the server noted about the whole store under a name; empty if nothing."""
        ...

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """
        Note something about the whole store, durably, and tell whether it was done. Any later `note` returns it.

        Args:
            name: What it is noted under.
            value: What is noted; empty: nothing.
            expected: Only if this is noted now. None: whatever is.
        """
        ...

    def require_note(self, name: str, value: bytes) -> None:
        """
        From now on raise ServerOutdated for whoever reads or writes a tenant, as long as anything else is noted.

        There is one such note; whoever names another one, or `preparing`, ends that.
        """
        ...

    def preparing(self) -> AbstractContextManager[None]:
        """
        Be the only one who makes the store ready, within a block.

        Another server that does so is waited for. Those that are running can meanwhile
        neither read nor write a tenant: they raise ServerOutdated.
        """
        ...

    def close(self) -> None:
        """Finish the jobs that were submitted, then close."""
        ...
