"""
A thread's way of writing to PostgreSQL: groups of one tenant's jobs, each in one transaction.

A transaction that is broken off, by a deadlock or a lost connection, runs again. Was the connection lost while it
was being committed, then the database is asked what became of it: each transaction
leaves a random name in a row of the thread that wrote it, which is there exactly if the
rest is. An id that the database gives would not do: after a crash it may give it once more.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, LiteralString, NamedTuple

from tidelog._logging import get_logger
from tidelog_server._attempts import Attempt
from tidelog_server._errors import StoreUnavailable
from tidelog_server._postgres_entry import BEGIN_WRITING, Entry, TenantState, lock_tenant
from tidelog_server._postgres_reader import PostgresReader
from tidelog_server._postgres_writes import put_commit, statements_of
from tidelog_server._records import COMMIT_ID_BYTES, Head, Writes

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Address, Connection, Transaction
    from tidelog_server._postgres_presence import Presence

# How often a transaction is tried that is broken off.
RUNS_MAX: Final = 5
# For how long the database is asked what became of a transaction, if it does not answer.
ASK_SECONDS_MAX: Final = 10.0
ASK_EVERY_SECONDS: Final = 0.1

_REGISTER: Final[LiteralString] = """
    INSERT INTO writers (server, writer, transaction) VALUES (%s, %s, '') ON CONFLICT (server, writer) DO NOTHING
"""
_SIGN: Final[LiteralString] = """
    INSERT INTO writers (server, writer, transaction) VALUES (%s, %s, %s)
    ON CONFLICT (server, writer) DO UPDATE SET transaction = excluded.transaction
"""
_SIGNED: Final[LiteralString] = "SELECT transaction FROM writers WHERE server = %s AND writer = %s"
_CLEAR_UNDER_WAY: Final[LiteralString] = "UPDATE under_way SET attempts = '' WHERE server = %s AND writer = %s"

# Only by who has made it: then it is empty, and nobody else has seen it.
_DELETE_TENANT: Final[LiteralString] = """
    DELETE FROM tenants WHERE number = %s AND xmin = pg_current_xact_id()::xid
"""

_NAME_BYTES: Final = 16

_log = get_logger("tidelog.store")

# What a job yields, or what it raised.
Outcome = tuple[Any, BaseException | None]


class Job(NamedTuple):
    """
    What is to be run in a transaction.

    Attributes:
        work: The job itself.
        future: Who waits for it.
        attempt: What is under way meanwhile, if anything.
    """

    work: Callable[[Any], tuple[Writes | None, Any]]
    future: Future[Any]
    attempt: Attempt | None

    @property
    def is_alone(self) -> bool:
        """Whether it gets a transaction of its own."""
        return self.attempt is not None and self.attempt.alone


class Writer:
    """
    Writes groups of jobs. Used by one thread.

    Args:
        address: Where the database is.
        presence: Says what is under way.
        entry: How transactions begin.
        number: Tells the server's writers apart.
    """

    def __init__(self, address: Address, presence: Presence, entry: Entry, number: int) -> None:
        self.number = number
        self._address = address
        self._presence = presence
        self._entry = entry
        self._connection: Connection | None = None
        self._server = presence.server

    def write(self, tenant: str, jobs: Sequence[Job]) -> list[Outcome]:
        """
        Run a tenant's jobs until what they return is durable, and return what became of each.

        Raises:
            StoreUnavailable: The database cannot be reached, or has broken the transaction off too often.
            StorageError: It does not take what is to be written.
        """
        under_way = [(tenant, job.attempt) for job in jobs if job.attempt is not None]
        if under_way:
            self._presence.put(self.number, under_way)
        is_noted = bool(under_way)
        try:
            outcomes, is_noted = self._written(tenant, jobs, is_noted)
        finally:
            if is_noted:
                self._presence.put(self.number, ())
        return outcomes

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _written(self, tenant: str, jobs: Sequence[Job], is_noted: bool) -> tuple[list[Outcome], bool]:  # noqa: FBT001
        """Return what became of the jobs, and whether it is still noted what is under way."""
        locks_timeline = False
        for run in itertools.count(1):
            connection = self._connected()
            attempt = _Run(self._entry, connection, (self._server, self.number), tenant)
            try:
                wrote = attempt.run(jobs, locks_timeline=locks_timeline, clears=is_noted)
            except StoreUnavailable as error:
                self.close()
                locks_timeline = attempt.begins_timeline
                if attempt.is_in_doubt and self._has_committed(tenant, attempt):
                    wrote = True
                elif run < RUNS_MAX:
                    _log.info("a transaction was broken off and runs again", tenant=tenant, detail=str(error))
                    continue
                else:
                    raise
            except BaseException:
                self.close()
                raise
            if attempt.begins_timeline:
                self._entry.hear(attempt.state.identity)
            return attempt.outcomes, is_noted and not wrote
        raise AssertionError  # there is always another run

    def _connected(self) -> Connection:
        server = self._presence.server
        if self._connection is None or not self._connection.is_usable or self._server != server:
            self.close()
            connection = self._address.connect()
            connection.rows(_REGISTER, server, self.number)
            self._connection, self._server = connection, server
        return self._connection

    def _has_committed(self, tenant: str, run: _Run) -> bool:
        """
        Ask what became of a transaction whose connection was lost.

        Raises:
            StoreUnavailable: Nobody knows.
        """
        until = time.monotonic() + ASK_SECONDS_MAX
        while True:
            try:
                return self._asked(tenant, run)
            except _Unknown:
                raise  # it will not be known later either
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(ASK_EVERY_SECONDS)

    def _asked(self, tenant: str, run: _Run) -> bool:
        connection = self._address.connect()
        try:
            transaction = connection.begin(BEGIN_WRITING)
            # As long as it is not over it holds this lock.
            lock_tenant(transaction, tenant)
            found = transaction.rows(_SIGNED, *run.signature)
        finally:
            connection.close()
        if not found:
            raise _Unknown("the database does not know any more whether it has committed a transaction")
        return bool(found[0][0] == run.name)


class _Unknown(StoreUnavailable):
    pass


class _Run:
    """
    One transaction: a group of jobs, once.

    Attributes:
        name: Tells it from all others.
        signature: The server and the thread that write it, as they were known when it began.
        state: Where the tenant stands, with what was written so far.
        outcomes: What became of the jobs.
        begins_timeline: Whether one of them begins a timeline.
        is_in_doubt: Whether the database was told to commit, so that it may have done so.
    """

    def __init__(self, entry: Entry, connection: Connection, signature: tuple[int, int], tenant: str) -> None:
        self.name = secrets.token_bytes(_NAME_BYTES)
        self.signature = signature
        self.outcomes: list[Outcome] = []
        self.begins_timeline = False
        self.is_in_doubt = False
        self.state: TenantState
        self._entry = entry
        self._connection = connection
        self._tenant = tenant

    def run(self, jobs: Sequence[Job], *, locks_timeline: bool, clears: bool) -> bool:
        """
        Run the jobs and commit; tell whether anything was written.

        Args:
            jobs: The jobs.
            locks_timeline: Whether one of them is known to begin a timeline.
            clears: Whether nothing is under way any more once it is written.
        """
        transaction, self.state = self._entry.write(self._connection, self._tenant, locks_timeline=locks_timeline)
        commit_id = secrets.token_bytes(COMMIT_ID_BYTES)
        before = self.state.head.version
        wrote = False
        for job in jobs:
            try:
                writes, result = job.work(PostgresReader(transaction, self.state))
                statements = statements_of(writes, self.state.number, commit_id) if writes is not None else ()
            except BaseException as error:  # noqa: BLE001 - handed to the job's owner; nothing of it was written
                self.outcomes.append((None, error))
                statements, writes = (), None
            else:
                self.outcomes.append((result, None))
            # Whatever the job made of it: what it saw was not the store, so it does not count.
            transaction.check()
            for statement, parameters in statements:
                transaction.send(statement, *parameters)
            if writes is not None:
                wrote = True
                self._note(transaction, writes, commit_id)
        if not wrote:
            if self.state.is_new:
                transaction.send(_DELETE_TENANT, self.state.number)
            # Nobody waits for the disk because somebody has looked.
            transaction.send("SET LOCAL synchronous_commit TO off")
            transaction.end()
            return False
        if self.state.head.version != before:
            put_commit(transaction, self.state.number, self.state.head.version, commit_id)
        transaction.send(_SIGN, *self.signature, self.name)
        if clears:
            transaction.send(_CLEAR_UNDER_WAY, *self.signature)
        self.is_in_doubt = True
        transaction.end()
        return True

    def _note(self, transaction: Transaction, writes: Writes, commit_id: bytes) -> None:
        """Go on with what a job has written."""
        if writes.changes:
            self.state = self.state._replace(head=Head(writes.version, commit_id))
        if writes.forgotten.version:
            self.state = self.state._replace(collected=writes.forgotten.version)
        if writes.timeline:
            self.begins_timeline = True
            self._entry.begin_timeline(transaction, writes.timeline)
            identity = self.state.identity._replace(timeline=writes.timeline)
            self.state = self.state._replace(identity=identity)
