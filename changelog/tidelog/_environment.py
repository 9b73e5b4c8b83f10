"""
Environment: an LMDB environment as both the replica and the embedded store need it.

What LMDB leaves to its caller is done here, once:

- One environment per path and process. LMDB forbids a second one; opening a path
  again shares the first.
- The map is far larger than the data at open, which costs address space only. If
  it fills all the same it is enlarged, which LMDB allows only while the process
  has no transaction open: hence the gate that counts them. Processes take turns
  at that under a file lock.
- A transaction belongs to the thread that began it; a forked child inherits an
  environment that only seems to work: it gets an error instead.
- LMDB's errors become typed ones.

Nobody may hold a transaction while waiting for a network or a user: a reader keeps
every page it can see from being reused, and the file grows. Nobody may write inside
their own `read` block: enlarging the map would wait for that block to end.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias, TypeVar

import lmdb
from filelock import FileLock

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

from tidelog._errors import DiskFull, FormatUnsupported, InheritedEnvironment, ResourceClosed, StorageError

MAP_BYTES_DEFAULT: Final = 1024**4
DATABASES_MAX: Final = 32
READERS_MAX: Final = 1024

SCAN_PAGE_KEYS: Final = 500
LITTLE_ROOM_BYTES: Final = 16 * 1024 * 1024

GATE_POLL_SECONDS: Final = 0.001

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORMAT_FILE: Final = "FORMAT"
DATA_FILE: Final = "data.mdb"
_GROW_LOCK_FILE: Final = "grow.lock"

LmdbTransaction: TypeAlias = "lmdb.Transaction[bytes]"
LmdbDatabase: TypeAlias = "lmdb._Database"  # noqa: SLF001 - the only name that py-lmdb gives it

T = TypeVar("T")


class _Ticket:
    """
    A transaction of this process, or somebody who wants none to be open.

    Attributes:
        thread_id: Whose it is.
        transaction: The transaction, once it is open.
    """

    __slots__ = ("thread_id", "transaction")

    def __init__(self) -> None:
        self.thread_id = threading.get_ident()
        self.transaction: LmdbTransaction | None = None


class _Gate:
    """
    Knows the open transactions of this process, and closes while the map changes size.

    An interrupt (Ctrl-C) may be raised wherever a function of Python begins and a call of C has ended. So a ticket is
    given back in a `finally`, by calling a set's method and nothing else, which happens whatever comes; and nobody
    waits to be told of it, but looks.

    Attributes:
        inside: The tickets of open transactions.
        closers: The ticket of who closed it; empty while it is open.
    """

    def __init__(self) -> None:
        self.inside: set[_Ticket] = set()
        self.closers: set[_Ticket] = set()
        self._lock = threading.Lock()

    def enter(self, ticket: _Ticket) -> None:
        """Wait until it is open, and go inside."""
        while True:
            with self._lock:
                if not self.closers:
                    self.inside.add(ticket)
                    return
            time.sleep(GATE_POLL_SECONDS)

    def close(self, ticket: _Ticket) -> None:
        """Close it, and wait until nobody is inside."""
        while ticket not in self.closers:
            with self._lock:
                if not self.closers:
                    self.closers.add(ticket)
                    break
            time.sleep(GATE_POLL_SECONDS)
        while self.inside:
            self._clear(ticket.thread_id)
            if self.inside:
                time.sleep(GATE_POLL_SECONDS)

    def _clear(self, thread_id: int) -> None:
        """End the transactions of a thread which has none open, unless an interrupt left one."""
        for ticket in tuple(self.inside):
            if ticket.thread_id == thread_id:
                if ticket.transaction is not None:
                    ticket.transaction.abort()
                self.inside.discard(ticket)


class _Read:
    """A read transaction for the length of a `with` block, or until it is forgotten. See `Environment.read`."""

    _ticket: _Ticket | None = None

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._inside = environment._gate.inside  # noqa: SLF001 - its own module

    def __enter__(self) -> LmdbTransaction:
        try:
            self._ticket = ticket = _Ticket()
            return self._environment._begin(ticket, write=False)  # noqa: SLF001
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        if isinstance(error, lmdb.Error | OSError):
            with typed_errors(self._environment.path):
                raise error

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        ticket = self._ticket
        if ticket is None:
            return
        try:
            if ticket.transaction is not None:
                ticket.transaction.abort()
        finally:
            self._inside.discard(ticket)


class _Shared:
    """The one LMDB environment of a path in this process, with as many users as opened it."""

    def __init__(self, path: Path, *, format_name: str, relaxed: bool = False, read_only: bool = False) -> None:
        self.path = path
        self.pid = os.getpid()
        # Weak: who was interrupted while opening it, and forgot it, uses it no more.
        self.users: weakref.WeakSet[Environment] = weakref.WeakSet()
        # Not open yet, or to be closed: whatever is open of it nobody uses.
        self.is_over = True
        self.format_name = format_name
        self.relaxed = relaxed
        self.read_only = read_only
        self.gate = _Gate()
        self.databases: dict[str, LmdbDatabase] = {}
        self.lmdb: lmdb.Environment | None = None

    def open(self, map_bytes: int) -> None:
        """Open it."""
        path = self.path
        with typed_errors(path):
            if not self.read_only:
                path.mkdir(parents=True, exist_ok=True)
            _check_format(path, self.format_name, read_only=self.read_only)
            self.lmdb = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=DATABASES_MAX,
                max_readers=READERS_MAX,
                # A forked child that ends frees what is kept for reuse, and with it the parent's reader slots.
                max_spare_txns=0,
                # Without it a power cut may take the newest commit; integrity and order are kept.
                metasync=not self.relaxed,
                readonly=self.read_only,
                create=not self.read_only,
            )
            self.lmdb.reader_check()
        self.is_over = False

    def close(self) -> None:
        """Close it, as far as that has not happened."""
        self.is_over = True
        if self.lmdb is not None:
            self.lmdb.close()

    @property
    def opened(self) -> lmdb.Environment:
        """LMDB's own object."""
        if self.lmdb is None:
            raise InheritedEnvironment(
                f"{self.path} was opened by the process this one was forked from: open it again after the fork"
            )
        return self.lmdb


class Environment:
    """
    An LMDB environment in a directory of its own.

    Use `Environment.open`; close with `close`. Safe to use from many threads.
    """

    _open_paths: dict[str, _Shared] = {}  # noqa: RUF012 - one per path and process, see the module
    _open_lock = threading.Lock()

    def __init__(self, shared: _Shared, *, relaxed: bool) -> None:
        self.path = shared.path
        self._shared = shared
        self._gate = shared.gate
        self._relaxed = relaxed
        self._closed = False

    @classmethod
    def open(
        cls, path: Path, *, format_name: str, relaxed: bool = False, map_bytes: int = MAP_BYTES_DEFAULT
    ) -> Environment:
        """
        Open the environment at *path*, or share the one that this process has open there.

        Args:
            path: Its directory.
            format_name: What the directory holds, and in which format.
            relaxed: Whether a commit need not wait for the last of two syncs. A power
                cut may then take the newest commits, never order or integrity.
            map_bytes: Size of the map at first.

        Raises:
            FormatUnsupported: The directory holds something else, or another format.
            StorageError: The directory cannot be opened.
        """
        name = os.path.realpath(path)
        with cls._open_lock:
            shared = cls._open_paths.get(name)
            if shared is None or shared.is_over or shared.pid != os.getpid():
                if shared is not None and shared.pid == os.getpid():
                    shared.close()  # an interrupt may have come in the way
                shared = _Shared(Path(name), format_name=format_name, relaxed=relaxed)
                cls._open_paths[name] = shared
                shared.open(map_bytes)
            elif shared.format_name != format_name:
                raise FormatUnsupported(name, found=shared.format_name, supported=format_name)
            elif shared.read_only:
                raise StorageError(f"{name} is being read in this process, to be copied or verified: open it later")
            environment = cls(shared, relaxed=relaxed)
            shared.users.add(environment)
            return environment

    @classmethod
    def open_read_only(cls, path: Path, *, format_name: str) -> Environment:
        """
        Open an environment that is there, and write nothing; another process may write to it meanwhile.

        One that this process has open for writing is shared. As long as it is open read-only in
        this process, the process cannot open it for writing.

        Raises:
            FormatUnsupported: The directory holds something else, or another format.
            StorageError: There is none, or it cannot be opened.
        """
        name = os.path.realpath(path)
        with cls._open_lock:
            shared = cls._open_paths.get(name)
            if shared is None or shared.is_over or shared.pid != os.getpid():
                shared = _Shared(Path(name), format_name=format_name, read_only=True)
                cls._open_paths[name] = shared
                shared.open(MAP_BYTES_DEFAULT)
            elif shared.format_name != format_name:
                raise FormatUnsupported(name, found=shared.format_name, supported=format_name)
            environment = cls(shared, relaxed=shared.relaxed)
            shared.users.add(environment)
            return environment

    @classmethod
    def _forget_after_fork(cls) -> None:
        """Let a forked child open anew what its parent has open; what it inherited stays unusable."""
        cls._open_lock = threading.Lock()
        for shared in cls._open_paths.values():
            shared.databases.clear()
            shared.lmdb = None
        cls._open_paths = {}

    def close(self) -> None:
        """Close it for this user, and the files with the last user in this process. May be repeated."""
        self._closed = True
        shared = self._shared
        if shared.pid != os.getpid():
            return
        with self._open_lock:
            shared.users.discard(self)
            if shared.users:
                return
            ticket = _Ticket()
            try:
                self._gate.close(ticket)
                shared.close()
            finally:
                self._gate.closers.discard(ticket)
            if self._open_paths.get(str(self.path)) is shared:
                del self._open_paths[str(self.path)]

    def database(self, name: str) -> LmdbDatabase:
        """Return the database of this name, creating it if need be. Not inside a transaction."""
        databases = self._shared.databases
        if name not in databases:
            databases[name] = self._retried(lambda: self._open_database(name))
        return databases[name]

    def read(self) -> AbstractContextManager[LmdbTransaction]:
        """
        Open a read transaction for the length of a `with` block.

        Raises:
            ResourceClosed: It is closed.
            InheritedEnvironment: In a forked child.
            StorageError: LMDB failed.
        """
        return _Read(self)

    def write(self, work: Callable[[LmdbTransaction], T]) -> T:
        """
        Run *work* in a write transaction and commit it; what it raises aborts the transaction.

        *work* runs again from the start if the map had to be enlarged, so it must
        have no effects but those in the transaction.

        Raises:
            DiskFull: There is no room. Nothing was written.
            ResourceClosed: It is closed.
            InheritedEnvironment: In a forked child.
            StorageError: LMDB failed. Nothing was written.
        """
        result = self._retried(lambda: self._write_once(work))
        if self._shared.relaxed and not self._relaxed:
            self.sync()  # another user opened it relaxed; this one was promised more
        return result

    def sync(self) -> None:
        """Force everything that was committed to disk, in relaxed durability too."""
        if self._shared.relaxed:
            with typed_errors(self.path):
                self._shared.opened.sync(True)

    def copy_to(self, directory: Path) -> None:
        """
        Copy everything, as of one moment, into an empty directory; only what is in use, in the order of its keys.

        Who writes meanwhile goes on. But nothing that is in use at the beginning can be reused
        before the end, so the file grows by what is written until then.

        Raises:
            DiskFull: There is no room for the copy.
            StorageError: LMDB failed.
        """
        self._retried(lambda: self._copy_once(directory))

    def _copy_once(self, directory: Path) -> None:
        self._check_usable()
        ticket = _Ticket()
        try:
            # As for any reader: the map must not change size under it.
            self._gate.enter(ticket)
            self._check_usable()
            with typed_errors(directory):
                self._shared.opened.copy(str(directory), compact=True)
        finally:
            self._gate.inside.discard(ticket)

    @property
    def last_transaction_id(self) -> int:
        """Number of the newest committed transaction, of whatever process."""
        self._check_usable()
        return int(self._shared.opened.info()["last_txnid"])

    def _open_database(self, name: str) -> LmdbDatabase:
        # LMDB begins a write transaction of its own here, and waits for it with the interpreter's lock held:
        # no other thread of this process may be inside one.
        ticket = _Ticket()
        try:
            self._gate.close(ticket)
            if not self._shared.read_only:
                return self._shared.opened.open_db(name.encode())
            with typed_errors(self.path):
                try:
                    return self._shared.opened.open_db(name.encode(), create=False)
                except lmdb.NotFoundError:
                    raise StorageError(f"{self.path} has no table {name!r}") from None
        finally:
            self._gate.closers.discard(ticket)

    def _write_once(self, work: Callable[[LmdbTransaction], T]) -> T:
        ticket = _Ticket()
        try:
            transaction = self._begin(ticket, write=True)
            with typed_errors(self.path):
                result = work(transaction)
                transaction.commit()
                return result
        finally:
            try:
                if ticket.transaction is not None:
                    ticket.transaction.abort()  # does nothing after a commit
            finally:
                self._gate.inside.discard(ticket)

    def _begin(self, ticket: _Ticket, *, write: bool) -> LmdbTransaction:
        self._check_usable()
        while True:
            self._gate.enter(ticket)
            # Inside the gate: whoever closes waits outside until this transaction has ended.
            self._check_usable()
            try:
                with typed_errors(self.path):
                    ticket.transaction = self._shared.opened.begin(write=write, buffers=False)
                    return ticket.transaction
            except lmdb.MapResizedError:
                self._gate.inside.discard(ticket)
                self._adopt_map_size()

    def _check_usable(self) -> None:
        if self._closed:
            raise ResourceClosed(f"{self.path} is closed")
        _ = self._shared.opened  # raises in a forked child

    def _retried(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except lmdb.MapFullError:
                self._grow()
            except lmdb.MapResizedError:
                self._adopt_map_size()

    def _adopt_map_size(self) -> None:
        ticket = _Ticket()
        try:
            self._gate.close(ticket)
            self._shared.opened.set_mapsize(0)
        finally:
            self._gate.closers.discard(ticket)

    def _grow(self) -> None:
        lock = FileLock(self.path / _GROW_LOCK_FILE, is_singleton=False)
        ticket = _Ticket()
        try:
            lock.acquire()
            self._gate.close(ticket)
            before = self._shared.opened.info()["map_size"]
            self._shared.opened.set_mapsize(0)  # what another process made of it meanwhile
            if self._shared.opened.info()["map_size"] <= before:
                self._shared.opened.set_mapsize(before * 2)
        finally:
            self._gate.closers.discard(ticket)
            try:
                lock.release()
            finally:
                lock.release()  # does nothing, unless an interrupt came in the way of the first


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=Environment._forget_after_fork)  # noqa: SLF001 - its own module


def put_many(transaction: LmdbTransaction, database: LmdbDatabase, items: list[tuple[bytes, bytes]]) -> None:
    """Put entries in one call: each call gives up the interpreter lock and asks for it again among the others."""
    if items:
        cursor = transaction.cursor(database)
        cursor.putmulti(items)
        cursor.close()


def scan_keys(
    transaction: LmdbTransaction, database: LmdbDatabase, prefix: bytes = b"", after: bytes = b""
) -> Iterator[bytes]:
    """Iterate over the keys with a prefix, behind a key; between two steps entries may be put and deleted."""
    start = after + b"\0" if after else prefix
    while True:
        cursor = transaction.cursor(database)
        found = cursor.set_range(start) if start else cursor.first()
        page: list[bytes] = []
        while found and len(page) < SCAN_PAGE_KEYS and cursor.key().startswith(prefix):
            page.append(cursor.key())
            found = cursor.next()
        yield from page
        if len(page) < SCAN_PAGE_KEYS:
            return
        start = page[-1] + b"\0"


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turn LMDB's errors into ours, but for the two that are mended and tried again."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError):
        raise
    except lmdb.Error as error:
        if _is_disk_full(error, path):
            raise DiskFull(f"no room left on the disk of {path}: nothing was written, make room and repeat") from error
        raise StorageError(f"LMDB failed on {path}: {error}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"no room left on the disk of {path}: nothing was written, make room and repeat") from error
        raise StorageError(f"{path} cannot be used: {error}") from error


def _is_disk_full(error: lmdb.Error, path: Path) -> bool:
    if any(os.strerror(number) in str(error) for number in _FULL):
        return True
    # A write that was cut short because no more would fit comes as an input/output error.
    return os.strerror(errno.EIO) in str(error) and _room_bytes(path) < LITTLE_ROOM_BYTES


def _room_bytes(path: Path) -> int:
    """Return how much the files in a directory can grow."""
    room = shutil.disk_usage(path).free
    if resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            room = min(room, limit - (path / DATA_FILE).stat().st_size)
    return room


def _check_format(path: Path, format_name: str, *, read_only: bool) -> None:
    """Compare the directory's format with *format_name*, or write it into a new directory."""
    file = path / FORMAT_FILE
    try:
        found = file.read_text(errors="replace").strip()
    except FileNotFoundError:
        if (path / DATA_FILE).exists():
            raise FormatUnsupported(str(path), found="data without a format mark", supported=format_name) from None
        if read_only:
            raise StorageError(f"there is nothing of tidelog in {path}") from None
        temporary = path / f"{FORMAT_FILE}.{os.getpid()}"
        temporary.write_text(format_name + "\n")
        temporary.replace(file)
        return
    if found != format_name:
        raise FormatUnsupported(str(path), found=found, supported=format_name)
