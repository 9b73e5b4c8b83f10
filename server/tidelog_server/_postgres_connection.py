"""
Connections to PostgreSQL, and the one place that knows its driver.

Within a transaction statements are sent in a pipeline: what nobody waits for costs no
round trip. Whatever goes wrong ends the transaction and its connection too, for a new
one is cheap compared with knowing what state the old one is in.

There is a small pool here, and not the driver's: that one waits for its own threads to
connect again, so an outage would be told late, and each server of many would hold
connections that nobody uses.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, LiteralString, Never, TypeVar

import psycopg
from psycopg import conninfo as _conninfo
from psycopg import errors
from psycopg.adapt import Dumper
from psycopg.pq import Format, TransactionStatus
from psycopg.types.numeric import Int8BinaryDumper
from psycopg.types.string import BytesBinaryDumper, StrBinaryDumper

from tidelog._errors import DiskFull, InvalidValue, ResourceClosed, StorageError
from tidelog_server._deadline import waiting
from tidelog_server._errors import StoreUnavailable
from tidelog_server._postgres_arrays import ARRAYS

SERVER_VERSION_MIN: Final = 130_000
# Who reads waits so long for one of the connections that others have.
TAKE_SECONDS_MAX: Final = 10.0
# What nobody has read with for so long is closed: a database has few connections for all servers.
IDLE_SECONDS_MAX: Final = 60.0

# Who writes waits so long for whoever writes the same tenant on another server, which may have come to a halt.
LOCK_SECONDS_MAX: Final = 60.0
# A process of the database that says nothing for so long has come to a halt, though its machine may answer for it. A
# transaction waits for two such locks at most, in one silence.
SILENCE_SECONDS_MAX: Final = 3 * LOCK_SECONDS_MAX

# What whoever deploys a server may say otherwise in the connection string.
_DEFAULTS: Final = {
    "application_name": "tidelog",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
    # Among several hosts, the one that takes writes.
    "target_session_attrs": "read-write",
}

# Every query has its index: a plan that was made while a table was empty must not outlive that. A server that
# vanished without a word holds its locks no longer than it takes to notice. And nobody's configuration garbles text,
# changes what a transaction sees, ends a session that stands still or makes a commit return before it is durable.
_SETTINGS: Final[LiteralString] = """
    SELECT set_config(name, value, false) FROM (VALUES
        ('search_path', 'tidelog, pg_temp'),
        ('client_encoding', 'UTF8'),
        ('default_transaction_isolation', 'read committed'),
        ('default_transaction_deferrable', 'off'),
        ('enable_seqscan', 'off'),
        ('enable_bitmapscan', 'off'),
        ('jit', 'off'),
        ('lock_timeout', %s),
        ('statement_timeout', '0'),
        ('transaction_timeout', '0'),
        ('idle_session_timeout', '0'),
        ('idle_in_transaction_session_timeout', '600000'),
        ('tcp_keepalives_idle', '10'),
        ('tcp_keepalives_interval', '5'),
        ('tcp_keepalives_count', '3'),
        ('synchronous_commit', CASE current_setting('synchronous_commit')
            WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END)
    ) AS settings (name, value)
    WHERE current_setting(name, true) IS NOT NULL -- older versions lack some
"""

# What may go better when it is done again, with the connection that broke or without it.
_TRANSIENT: Final = (psycopg.OperationalError, errors.ReadOnlySqlTransaction, psycopg.errors.PipelineAborted)

T = TypeVar("T")


class Address:
    """
    Where a database is.

    Args:
        conninfo: A connection string as PostgreSQL's own programs take it, or a URL.

    Raises:
        InvalidValue: It is neither.
    """

    def __init__(self, conninfo: str) -> None:
        try:
            given = _conninfo.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            # What the driver says of it may quote a password.
            raise InvalidValue("this is no connection string of PostgreSQL: postgresql://user@host/database") from None
        self._conninfo = _conninfo.make_conninfo(conninfo, **{k: v for k, v in _DEFAULTS.items() if k not in given})
        host = given.get("host") or given.get("hostaddr") or "its default host"
        port = f":{given['port']}" if given.get("port") else ""
        self._name = f"PostgreSQL at {host}{port}, database {given.get('dbname') or 'of the default name'}"

    def __str__(self) -> str:
        """Name it, without a user or a password."""
        return self._name

    def connect(self, *, is_patient: bool = False) -> Connection:
        """
        Connect.

        Args:
            is_patient: Whether answers may take as long as they like.

        Raises:
            StoreUnavailable: It cannot be reached now, or lets nobody in.
            StorageError: It is none that can be used.
        """
        try:
            connection = _Connection.connect(self._conninfo, autocommit=True, prepare_threshold=0)
        except psycopg.Error as error:
            raise StoreUnavailable(f"{self} cannot be reached: {error}") from error
        try:
            for array in ARRAYS:
                connection.adapters.register_dumper(array, _dumper_of(array))
            connection.adapters.register_dumper(int, Int8BinaryDumper)
            connection.adapters.register_dumper(str, StrBinaryDumper)
            connection.adapters.register_dumper(bytes, BytesBinaryDumper)
            if connection.info.server_version < SERVER_VERSION_MIN:
                raise StorageError(
                    f"{self} is of version {connection.info.server_version // 10_000}: 13 is the oldest"
                )
            if connection.info.parameter_status("server_encoding") != "UTF8":
                raise StorageError(f"{self} has another encoding than UTF8: not every text can be stored there")
            lock_timeout = "0" if is_patient else f"{round(LOCK_SECONDS_MAX * 1_000)}ms"
            connection.execute(_SETTINGS, (lock_timeout,))
            connection.is_patient = is_patient
        except psycopg.Error as error:
            connection.close()
            raise _told(error, str(self)) from error
        except BaseException:
            connection.close()
            raise
        return Connection(connection, str(self))


class _Connection(psycopg.Connection[Any]):
    """
    The driver's connection, which would wait for ever.

    Attributes:
        is_patient: Whether answers may take as long as they like.
    """

    is_patient = False

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        """Do what *gen* does, unless the database falls silent."""
        return super().wait(gen if self.is_patient else _unless_silent(gen), *arguments, **options)


def _unless_silent(gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Do what *gen* does with an answer; the driver says again and again whether more of that is there."""
    silent_since = 0.0
    try:
        wanted = next(gen)
        while True:
            if ready := (yield wanted):
                silent_since = 0.0
            elif not silent_since:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > SILENCE_SECONDS_MAX:
                raise psycopg.OperationalError(f"it has said nothing for {SILENCE_SECONDS_MAX:g} seconds")
            wanted = gen.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class Connection:
    """
    A connection, used by one thread at a time.

    Attributes:
        place: What it takes up in a pool while it is in use.
    """

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self.place: _Place | None = None
        self._connection = connection
        self._name = name
        self._is_busy = False

    @property
    def is_usable(self) -> bool:
        """Whether another transaction can begin: the last one, if any, came to its end, as far as is known here."""
        if self._is_busy or self._connection.closed:
            return False
        return self._connection.info.transaction_status == TransactionStatus.IDLE

    def begin(self, how: LiteralString) -> Transaction:
        """Begin a transaction, with this statement."""
        self._is_busy = True  # whatever interrupts it, and wherever
        return Transaction(self._connection, self._name, how, self._rest)

    def rows(self, statement: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own."""
        try:
            cursor = self._connection.execute(statement, parameters, binary=True)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg.Error as error:
            self.close()
            raise _told(error, self._name) from error

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def _rest(self) -> None:
        self._is_busy = False


class Transaction:
    """
    Statements that take effect together.

    Attributes:
        failure: What went wrong, once something has: then nothing of it will take effect, whoever
            caught the error.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], name: str, how: LiteralString, on_end: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._name = name
        self._on_end = on_end
        self.failure: StorageError | None = None
        self._ended = False
        try:
            self._pipeline = connection.pipeline()
            self._pipeline.__enter__()
        except psycopg.Error as error:
            self._fail(error)
        self.send(how)

    def send(self, statement: LiteralString, *parameters: Any) -> psycopg.Cursor[Any]:
        """Send a statement. What comes of it is known when something is read, or at the end."""
        with self._asking():
            return self._connection.execute(statement, parameters, binary=True)

    def rows(self, statement: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a statement."""
        return self.rows_of(self.send(statement, *parameters))

    def rows_of(self, sent: psycopg.Cursor[Any]) -> list[tuple[Any, ...]]:
        """Return the rows of a statement that was sent."""
        with self._asking():
            return sent.fetchall()

    def end(self) -> None:
        """
        Commit, and return once that is done.

        What is not to take effect is abandoned instead: after a rollback the driver would prepare all statements anew.
        """
        sent = self.send("COMMIT")
        self._ended = True
        with waiting():
            try:
                self._pipeline.__exit__(None, None, None)
                if sent.statusmessage != "COMMIT":
                    raise errors.InternalError(f"COMMIT was answered with {sent.statusmessage}")
            except psycopg.Error as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, KeyboardInterrupt):
                    cause = cause.__context__
                if cause is not None:  # the driver tells what came of it instead
                    self._close()
                    raise cause from None
                self._fail(error)
        self._on_end()

    def abandon(self) -> None:
        """End it in whatever state it is, with its connection. Nothing of it takes effect, unless it has ended."""
        self._ended = True
        self._close()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self.failure is not None:
            raise self.failure
        if self._ended:
            raise ResourceClosed("the transaction has ended: a reader is used inside of its block")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self.check()
        with waiting():
            try:
                yield
            except psycopg.Error as error:
                self._fail(error)
            except Exception:
                raise  # something that cannot be sent
            except BaseException:
                # Nobody knows how much of an answer was read.
                self.failure = StoreUnavailable(f"{self._name}: who waited for an answer was interrupted")
                self._close()
                raise

    def _fail(self, error: psycopg.Error) -> Never:
        self.failure = _told(error, self._name)
        self._close()
        raise self.failure from error

    def _close(self) -> None:
        self._connection.close()
        # Left to the garbage collector, the pipeline would complain of that in the log.
        with suppress(psycopg.Error):
            self._pipeline.__exit__(None, None, None)


class Pool:
    """
    Connections for short reads, made when they are needed and kept for the next ones.

    Args:
        address: Where to.
        connections_max: How many there may be.
    """

    def __init__(self, address: Address, connections_max: int) -> None:
        self._address = address
        # Not a semaphore: one that an interrupt (Ctrl-C, or the end of a hook's time) comes to may keep its lock.
        self._places: queue.SimpleQueue[_Place] = queue.SimpleQueue()
        for _ in range(connections_max):
            self._places.put(_Place(self._places))
        self._lock = threading.Lock()
        # With when each was given back. The youngest are taken first, so that the others come to an age.
        self._idle: list[tuple[float, Connection]] = []
        self._closed = False

    def take(self) -> Connection:
        """
        Return a connection that nobody else uses until it is given back.

        Raises:
            ResourceClosed: The pool is closed.
            StoreUnavailable: None can be made, or all are in use for too long.
        """
        place, connection = None, None
        try:
            with waiting():
                try:
                    place = self._places.get(timeout=TAKE_SECONDS_MAX)
                except queue.Empty:
                    raise StoreUnavailable(f"{self._address}: all connections for reading are in use") from None
                with self._lock:
                    if self._closed:
                        raise ResourceClosed("the store is closed")
                    connection = self._idle.pop()[1] if self._idle else None
                if connection is None:
                    connection = self._address.connect()
                connection.place = place
            return connection
        except BaseException:
            # The time of a hook that reads may be over, too. What is raised may live long, and must not hold anything.
            if connection is not None:
                connection.close()
            del place, connection
            raise

    def renew(self, connection: Connection) -> Connection:
        """
        Return a new connection for one that broke. Those that nobody uses are as old and probably no better: they go.

        Raises:
            StoreUnavailable: None can be made. The broken one is still to be given back.
        """
        connection.close()
        self.close_idle()
        renewed = self._address.connect()
        renewed.place, connection.place = connection.place, None
        return renewed

    def give_back(self, connection: Connection) -> None:
        """Take a connection back."""
        with self._lock:
            if keeps := not self._closed and connection.is_usable:
                self._idle.append((time.monotonic(), connection))
        if not keeps:
            connection.close()
        connection.place = None
        self.close_idle(IDLE_SECONDS_MAX)

    def close(self) -> None:
        """Close what is not in use now, and the rest when it is given back."""
        with self._lock:
            self._closed = True
        self.close_idle()

    def close_idle(self, seconds: float = 0) -> None:
        """Close what nobody has used for so long."""
        before = time.monotonic() - seconds
        with self._lock:
            idle = [connection for since, connection in self._idle if since <= before]
            self._idle = self._idle[len(idle) :]
        for connection in idle:
            connection.close()


class _Place:
    """A place among those that there are. It is free again once nobody holds it, whatever became of who did."""

    def __init__(self, places: queue.SimpleQueue[_Place]) -> None:
        self._places = weakref.ref(places)

    def __del__(self) -> None:
        places = self._places()
        if places is not None:
            places.put(_Place(places))


def _dumper_of(array: type[Any]) -> type[Dumper]:
    class ArrayDumper(Dumper):
        format = Format.BINARY
        oid = array.ARRAY_OID

        def dump(self, obj: Any) -> bytes:
            return obj.data  # type: ignore[no-any-return]

    return ArrayDumper


def _told(error: psycopg.Error, name: str) -> StorageError:
    """Return an error of the driver as one of ours."""
    message = f"{name}: {error}"
    if isinstance(error, errors.DiskFull):
        return DiskFull(message)
    return StoreUnavailable(message) if isinstance(error, _TRANSIENT) else StorageError(message)
