"""
The store of many servers: PostgreSQL.

Any number of servers work on one database, and none keeps anything that the others
lack. A transaction that writes locks its tenant's row first and reads everything after
that, so the order of commits is the order of versions, whichever server makes them.
Within a server the jobs of one tenant wait in a queue, and those that wait together are
one transaction; other tenants' run at the same time, in other threads.

Servers that stand still hold nothing but their connections: who reads does so in short
transactions, and what is known of the store's identity is heard anew in each.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, LiteralString, TypeVar

from tidelog._errors import InheritedEnvironment, ResourceClosed, StorageError
from tidelog._logging import get_logger
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._errors import ExtraMissing, ServerOutdated, StoreUnavailable
from tidelog_server._postgres_entry import BEGIN_WRITING, Entry, note_digest
from tidelog_server._postgres_reader import PostgresReader
from tidelog_server._postgres_schema import PREPARING_LOCK, prepare_tables
from tidelog_server._postgres_writer import Job, Outcome, Writer
from tidelog_server._records import Identity, Writes
from tidelog_server._tenant_queues import TenantQueues

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Connection

WRITERS: Final = 4
READ_CONNECTIONS_MAX: Final = 16
GROUP_JOBS_MAX: Final = 64

EXTRA_MISSING: Final = "a store in PostgreSQL needs the extra postgres: pip install 'tidelog[postgres]'"

_PUT_NOTE: Final[LiteralString] = """
    INSERT INTO notes (name, value, digest) VALUES (%s, %s, %s)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, digest = excluded.digest RETURNING 1
"""
_PUT_EMPTY_NOTE: Final[LiteralString] = """
    INSERT INTO notes (name, value, digest) VALUES (%s, '', %s) ON CONFLICT (name) DO NOTHING
"""
_CHANGE_NOTE: Final[LiteralString] = """
    UPDATE notes SET value = %s, digest = %s WHERE name = %s AND value = %s RETURNING 1
"""

_log = get_logger("tidelog.store")

T = TypeVar("T")


class PostgresStore:
    """
    Keeps everything in a PostgreSQL database, together with other servers.

    Args:
        conninfo: A connection string, such as "postgresql://tidelog@db.example/tidelog".

    Raises:
        ExtraMissing: The extra is not installed.
        InvalidValue: *conninfo* is none.
        StoreUnavailable: The database cannot be reached now.
        FormatUnsupported: It holds something else.
        StorageError: It cannot be used.
    """

    is_shared: ClassVar[bool] = True

    def __init__(self, conninfo: str) -> None:
        try:
            from tidelog_server._postgres_connection import Address, Pool  # noqa: PLC0415
            from tidelog_server._postgres_presence import Presence  # noqa: PLC0415
        except ImportError as error:
            raise ExtraMissing(EXTRA_MISSING) from error
        self._pid = os.getpid()
        self._address = Address(conninfo)
        connection = self._address.connect()
        try:
            prepare_tables(connection, str(self._address))
            [(epoch, timeline, is_synced)] = connection.rows(
                "SELECT epoch, timeline, current_setting('fsync') = 'on' FROM store"
            )
        finally:
            connection.close()
        if not is_synced:
            _log.warning(
                "the database does not wait for its disk: a crash of its machine may lose what was acknowledged"
            )
        self._entry = Entry(Identity(epoch, timeline))
        self._readers = Pool(self._address, READ_CONNECTIONS_MAX)
        self._presence = Presence(self._address)
        self._queues: TenantQueues[Job] = TenantQueues(lambda job: job.is_alone, GROUP_JOBS_MAX)
        self._closing = False
        self._place = threading.local()
        self._writers = [
            threading.Thread(target=self._write_jobs, args=(number,), name=f"tidelog-writer-{number}", daemon=True)
            for number in range(WRITERS)
        ]
        for writer in self._writers:
            writer.start()

    def __str__(self) -> str:
        return str(self._address)

    @property
    def identity(self) -> Identity:
        """Which store this is, as far as this process has heard. See `Reader.identity`."""
        return self._entry.identity

    @contextmanager
    def read(self, tenant: str) -> Iterator[PostgresReader]:
        """Read a tenant's data as of one moment."""
        self._check_process()
        if self._closing and not self._is_writer:  # jobs come to their end
            raise ResourceClosed("the store is closed")
        connection = self._readers.take()
        try:
            try:
                transaction, state = self._entry.read(connection, tenant)
            except StoreUnavailable:
                # It may have been left by a database that was restarted since: nothing was read, so another will do.
                connection = self._readers.renew(connection)
                transaction, state = self._entry.read(connection, tenant)
            try:
                yield PostgresReader(transaction, state)
            finally:
                with suppress(StorageError):  # what was read was read
                    transaction.end()
        finally:
            self._readers.give_back(connection)

    def submit(
        self, tenant: str, job: Callable[[Any], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """Run a job in a write transaction. See `Store.submit`."""
        if self._is_writer:
            raise StorageError("a job, and a hook in it, cannot submit another one: a hook writes through its context")
        self._check_process()
        future: Future[T] = Future()
        # A job that was submitted runs: whoever stops waiting for it must not cancel it.
        future.set_running_or_notify_cancel()
        if not self._queues.put(tenant, Job(job, future, attempt)):
            raise ResourceClosed("the store is closed")
        return future

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """Say what is under way more precisely. See `Store.announce`."""
        self._presence.put(self._place.writer, [(tenant, attempt)])

    def left_under_way(self) -> UnderWay:
        """Return what was under way in servers that have died."""
        return self._presence.left()

    def forget_under_way(self) -> None:
        """Forget what was left under way."""
        self._presence.forget()

    def tenants(self) -> list[str]:
        """Return the tenants that anything was ever written for."""
        return [name for (name,) in self._rows("SELECT name FROM tenants ORDER BY name")]

    def note(self, name: str) -> bytes:
        """Return what the server noted about the whole store under a name; empty if nothing."""
        found = self._rows("SELECT value FROM notes WHERE name = %s", name)
        return found[0][0] if found else b""

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """Note something about the whole store, durably. See `Store.set_note`."""
        digest = note_digest(value)
        if expected is None:
            return bool(self._rows(_PUT_NOTE, name, value, digest))
        # Nothing noted and an empty note are the same; so there is a row that can be compared and locked.
        self._rows(_PUT_EMPTY_NOTE, name, note_digest(b""))
        return bool(self._rows(_CHANGE_NOTE, value, digest, name, expected))

    def require_note(self, name: str, value: bytes) -> None:
        """Go on only as long as this is noted. See `Store.require_note`."""
        self._entry.require_note(name, value)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Be the only one who makes the store ready. See `Store.preparing`."""
        connection = self._address.connect(is_patient=True)  # a migration takes as long as it takes
        try:
            connection.rows("SELECT pg_advisory_lock(%s)", PREPARING_LOCK)
            self._entry.require_no_note()
            [(self._entry.preparer,)] = connection.rows("SELECT pg_backend_pid()")
            # What this thread notes meanwhile goes the same way, so that it cannot outlive the lock.
            self._place.preparing = connection
            yield
        finally:
            self._entry.preparer = None
            self._place.preparing = None
            with suppress(StoreUnavailable):  # then it is unlocked already
                connection.rows("SELECT pg_advisory_unlock(%s)", PREPARING_LOCK)
            connection.close()

    def begin_timeline(self) -> Identity:
        """Begin a new timeline, because the history may go on otherwise than it did, and return the identity."""
        connection = self._address.connect()
        try:
            transaction = connection.begin(BEGIN_WRITING)
            self._entry.begin_timeline(transaction, str(uuid.uuid4()))
            [(epoch, timeline)] = transaction.rows("SELECT epoch, timeline FROM store")
            transaction.end()
        finally:
            connection.close()
        self._entry.hear(Identity(epoch, timeline))
        return self.identity

    def close(self) -> None:
        """Finish the jobs that were submitted, then close."""
        self.check_outside_of_jobs()
        if self._closing:
            return
        self._closing = True
        if self._pid != os.getpid():
            return  # the process it was opened by goes on with it
        self._queues.close()
        for writer in self._writers:
            writer.join()
        self._readers.close()
        self._presence.close()

    def check_outside_of_jobs(self) -> None:
        """Raise StorageError inside a job, which must not wait for what only comes after it."""
        if self._is_writer:
            raise StorageError("a hook can neither stop its server nor add a file: that waits for its end")

    @property
    def _is_writer(self) -> bool:
        return getattr(self._place, "writer", None) is not None

    def _check_process(self) -> None:
        # Its writers did not come along into a forked child: a job would wait for ever.
        if self._pid != os.getpid():
            raise InheritedEnvironment(
                f"{self} was opened by the process this one was forked from: open it again in this one"
            )

    def _rows(self, statement: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own. If a connection for reading breaks it is run once more."""
        self._check_process()
        preparing: Connection | None = getattr(self._place, "preparing", None)
        if preparing is not None:
            return preparing.rows(statement, *parameters)
        connection = self._readers.take()
        try:
            return connection.rows(statement, *parameters)
        except StoreUnavailable:
            connection = self._readers.renew(connection)
            return connection.rows(statement, *parameters)
        finally:
            self._readers.give_back(connection)

    # --- writing --------------------------------------------------------------

    def _write_jobs(self, number: int) -> None:
        self._place.writer = number
        writer = Writer(self._address, self._presence, self._entry, number)
        while (taken := self._queues.take()) is not None:
            tenant, group = taken
            try:
                self._write_group(writer, tenant, group)
            finally:
                self._queues.done(tenant)
        writer.close()

    def _write_group(self, writer: Writer, tenant: str, group: list[Job]) -> None:
        outcomes: list[Outcome]
        try:
            outcomes = writer.write(tenant, group)
        except (StoreUnavailable, ServerOutdated) as error:
            _log.warning("jobs were given up", tenant=tenant, job_count=len(group), detail=str(error))
            outcomes = [(None, error)] * len(group)
            self._readers.close_idle()  # it may be that the database has no connections left to give
        except BaseException as error:  # noqa: BLE001 - the jobs' owners are told; this thread must live on
            if len(group) > 1:
                # One of them cannot be written: it is not to take the others with it.
                _log.info("jobs run one by one, because one of them fails", tenant=tenant, detail=str(error))
                for job in group:
                    self._write_group(writer, tenant, [job])
                return
            _log.exception("commit failed", tenant=tenant)
            outcomes = [(None, error)]
        for job, (result, refusal) in zip(group, outcomes, strict=True):
            if refusal is None:
                job.future.set_result(result)
            elif isinstance(refusal, Exception):
                job.future.set_exception(refusal)
            else:
                # What would end a program must not end whoever awaits this.
                job.future.set_exception(StorageError(f"a job ended with {type(refusal).__name__}"))
