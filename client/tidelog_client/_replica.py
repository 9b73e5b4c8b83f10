"""The replica: a local copy of shared data that can always be worked on."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, NamedTuple, Self, TypeAlias

import uuid_utils

from tidelog._address import check_address
from tidelog._channel import ClientTls
from tidelog._clock import Clock, system_time_us
from tidelog._constraints import Constraint, Where, attribute, constraint_of
from tidelog._downloads import Download, DownloadMode, DownloadWish, downloads_of
from tidelog._environment import MAP_BYTES_DEFAULT
from tidelog._errors import (
    FileUnavailable,
    InvalidValue,
    LimitExceeded,
    ObjectNotFound,
    StorageError,
    SynchronizationError,
)
from tidelog._failure import SynchronizationFailure
from tidelog._file_reference import FileReference
from tidelog._finding import Finding
from tidelog._limits import MESSAGE_BYTES_MAX, SELECTION_OBJECTS_MAX
from tidelog._logging import get_logger
from tidelog._operation import Operation
from tidelog._patch import Patch
from tidelog._schema import Schema
from tidelog._values import Attributes, check_id, check_name, decode_trusted, sort_key
from tidelog.v1 import schema_pb2
from tidelog_client._attachment import FileSource, stored_file
from tidelog_client._commit import Committer, Transaction
from tidelog_client._connection import Connection, TokenSource
from tidelog_client._file_wishes import FileMode, FileWish, FileWishes
from tidelog_client._files import FileState
from tidelog_client._object import Object
from tidelog_client._report import Failures, OnProgress, Report
from tidelog_client._selection import Selection, select
from tidelog_client._set_aside import SetAside, set_aside_damaged
from tidelog_client._storage import Storage
from tidelog_client._synchronization import Consent, Mode
from tidelog_client._synchronizer import Synchronizer
from tidelog_client._verification import findings
from tidelog_client._view import ViewRecord

LOG_RETENTION_DEFAULT: Final = timedelta(days=30)
LOG_RETENTION_BYTES_DEFAULT: Final = 1024**3
# It must fit, with the rest, into the first message of a session.
DOWNLOADS_BYTES_MAX: Final = MESSAGE_BYTES_MAX // 2
TRIM_STEP_OPERATIONS: Final = 10_000
TAIL_POLL_SECONDS: Final = 0.05

_log = get_logger("tidelog.replica")

Durability: TypeAlias = Literal["full", "relaxed"]


class LoggedOperation(NamedTuple):
    """
    An operation in the log, with what became of it.

    Attributes:
        operation: The operation.
        status: "pending", "applied" or "failed".
        version: The server version it was applied at; 0 unless applied.
        failure_id: The synchronization failure; empty unless failed.
    """

    operation: Operation
    status: Literal["pending", "applied", "failed"]
    version: int
    failure_id: str


class Replica:
    """
    A local copy of shared data, with its own operation log.

    Everything but `synchronize_*` works without a network. Reads see what is
    committed locally; each commit is on disk when it returns. Safe to use from many
    threads; several processes may open one directory; a forked child must open it anew.
    What an interrupted synchronization had begun to bring into view all is when this returns, unless it cannot
    be, on a full disk say, or another process is at it.

    Args:
        path: The replica's directory; made if it is not there.
        server: "host:port" of the server, needed to synchronize only.
        token: What tells the server who is calling: a bearer token, or a provider, a
            function that returns one. It is asked before each attempt, and once more if
            the server refuses its token. None: no token is sent.
        tls: How to speak TLS with the server. True: the system knows whom to trust.
            False: not at all.
        schema: The program's schema: what does not fit it is refused before anything is
            appended, and its version goes with each operation. None: everything is
            accepted, and the references that the server names at the first
            synchronization are used.
        download: How much the replica wants of each entity when everything is synchronized,
            where that is less than the server offers: a `DownloadMode` or its name, or a
            constraint on the objects it wants. It may want something else each time it is
            opened: objects come and go accordingly at the next `synchronize_all`.
        files: Which contents of files the replica downloads, by entity: with the objects ("eager"), when they are
            opened ("lazy") or "never", or a `FileDownload`, which can limit their size. Without a word, all are.
        durability: "full": each commit waits until it is on disk. "relaxed": it skips
            the last of two syncs, and a power cut may take the newest commits, never
            order or integrity.
        log_retention: How long settled operations stay in the log.
        log_retention_bytes: How large the log may get before settled operations
            leave it earlier.
        map_bytes: Address space for the data at first; it grows by itself.
        clock: Returns the time in microseconds since 1970: how long the log, and contents that nobody refers to, are
            kept goes by it. For tests, see `tidelog.testing.ManualClock`.

    Raises:
        InvalidValue: *server*, *durability*, *download* or *files* is none, no header can carry
            *token*, or a file of *tls* is not what it should be.
        InvalidConstraint: A constraint in *download* makes no sense, or does not fit *schema*.
        LimitExceeded: *download* is larger than any server would take.
        FormatUnsupported: The directory holds something else.
        DiskFull, StorageError: The directory cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        server: str | None = None,
        token: TokenSource = None,
        tls: ClientTls | bool = False,
        schema: Schema | None = None,
        download: Mapping[str, DownloadWish] | None = None,
        files: Mapping[str, FileWish] | None = None,
        durability: Durability = "full",
        log_retention: timedelta = LOG_RETENTION_DEFAULT,
        log_retention_bytes: int = LOG_RETENTION_BYTES_DEFAULT,
        map_bytes: int = MAP_BYTES_DEFAULT,
        clock: Clock = system_time_us,
    ) -> None:
        if durability not in ("full", "relaxed"):
            raise InvalidValue(f"durability is 'full' or 'relaxed', got {durability!r}")
        downloads = _checked_downloads(download or {}, schema)
        self._file_wishes = FileWishes(files or {})
        connection = None
        if server is not None:
            tls_used = ClientTls() if tls is True else tls or None
            connection = Connection(check_address(server), tls=tls_used, token=token)
        self.path = Path(path)
        self._schema = schema
        self._log_retention = log_retention
        self._log_retention_bytes = log_retention_bytes
        self._storage = Storage(self.path, relaxed=durability == "relaxed", map_bytes=map_bytes, clock=clock)
        schema_version = schema.version if schema is not None else 0
        never = [entity for entity, one in downloads.items() if one.mode is DownloadMode.NEVER]
        self._committer = Committer(self._storage, schema, never)
        self._synchronizer = Synchronizer(self._storage, connection, schema_version, downloads, self._file_wishes)
        try:
            self._synchronizer.go_on()
        except BaseException:
            self.close()
            raise

    @property
    def replica_id(self) -> str:
        """The replica's id, a UUID drawn when the directory was made."""
        return self._storage.lineage.replica_id

    def close(self) -> None:
        """Close the replica. Using it afterwards raises ResourceClosed."""
        try:
            self._synchronizer.close()
        finally:
            self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- changing -------------------------------------------------------------

    def transaction(self, *, atomic: bool = False) -> Transaction:
        """
        Open a transaction for a `with` block: all its changes are committed at the end, or none.

        Args:
            atomic: Make the operations a commit group: the server too applies all or none.
        """
        return Transaction(self._storage, self._committer, atomic=atomic)

    def create(self, entity: str, attributes: Mapping[str, Any], id: str | None = None) -> str:  # noqa: A002
        """Create an object in a transaction of its own. See `Transaction.create`."""
        with self.transaction() as transaction:
            return transaction.create(entity, attributes, id)

    def update(
        self,
        entity: str,
        id: str,  # noqa: A002
        attributes: Mapping[str, Any] | None = None,
        *,
        unset: Sequence[str] = (),
        increment: Mapping[str, Any] | None = None,
        add: Mapping[str, Sequence[Any]] | None = None,
        remove: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Change an object in a transaction of its own. See `Transaction.update`."""
        with self.transaction() as transaction:
            transaction.update(entity, id, attributes, unset=unset, increment=increment, add=add, remove=remove)

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """Delete an object in a transaction of its own. See `Transaction.delete`."""
        with self.transaction() as transaction:
            transaction.delete(entity, id)

    def new(self, entity: str, attributes: Mapping[str, Any] | None = None, id: str | None = None) -> Object:  # noqa: A002
        """
        Return an uncommitted object with its defaults; nothing is stored until its `commit`.

        Raises:
            ValidationFailed: A value that does not fit the schema. What is required and
                not there yet is asked for at the commit.
            InvalidValue: A name, the id or a value that cannot be stored.
        """
        id_ = str(uuid_utils.uuid7()) if id is None else id
        check_name(entity, "an entity name")
        check_id(id_)
        patch = Patch(dict(attributes or {}))
        patch.check()
        if self._schema is not None:
            self._schema.check_patch(entity, patch, id_)
            patch = Patch(self._schema.with_defaults(entity, patch.set))
        return Object(self._storage, self._committer, entity, id_, new=patch.set)

    # --- files ----------------------------------------------------------------

    def attach(
        self,
        entity: str,
        id: str,  # noqa: A002
        attribute: str,
        source: FileSource,
        *,
        name: str | None = None,
        media_type: str | None = None,
    ) -> None:
        """Let an attribute of an object be a file, in a transaction of its own. See `Transaction.attach`."""
        with self.transaction() as transaction:
            transaction.attach(entity, id, attribute, source, name=name, media_type=media_type)

    def add_file(
        self, source: FileSource, *, name: str | None = None, media_type: str | None = None
    ) -> dict[str, Any]:
        """
        Store the content of a file, and return the value for an attribute that is to be the file.

        Commit what uses the value within an hour: a content that nobody refers to is deleted.

        Args:
            source: A path, the bytes themselves, or a binary stream, read to its end.
            name: What the file is called. None: the path's name, else "file".
            media_type: What it holds, such as "image/jpeg". None: what its name suggests.

        Raises:
            InvalidValue: The file cannot be read, or its name not be stored.
            DiskFull, StorageError: It cannot be stored.
        """
        return stored_file(self._storage.files, source, name=name, media_type=media_type, default_name="file")

    def open_file(
        self,
        entity: str,
        id: str,  # noqa: A002
        attribute: str,
        *,
        timeout: float | None = None,
    ) -> BinaryIO:
        """
        Open the content of a file to be read. One that is not here is downloaded now. Close it in the end.

        Args:
            entity: Type of the object.
            id: Its id.
            attribute: The attribute that is a file.
            timeout: Seconds after which to give up the download. None: no limit while it gets ahead.

        Raises:
            ObjectNotFound: There is no such object.
            InvalidValue: The attribute is no file.
            FileUnavailable: Its content is not here, and cannot be had now.
            TokenUnavailable: The token provider failed.
        """
        if timeout is not None and not timeout >= 0:
            raise InvalidValue(f"a timeout of {timeout} seconds")
        reference = self._file_reference(entity, id, attribute)
        if reference is None:
            raise InvalidValue(f"{attribute!r} of {entity} {id!r} is no file")
        file = self._storage.files.open(reference)
        if file is not None:
            return file
        if self._file_wishes.of(entity).mode is FileMode.NEVER:
            reason: str | None = "this replica never downloads files of this entity"
        else:
            reason = self._synchronizer.fetch(reference, (entity, id), timeout=timeout)
        file = self._storage.files.open(reference) if reason is None else None
        if file is None:
            raise FileUnavailable(entity=entity, id=id, attribute=attribute, reason=reason or "it was deleted again")
        return file

    def file_state(self, entity: str, id: str, attribute: str) -> FileState | None:  # noqa: A002
        """
        Tell how the content of a file stands; None if the attribute is no file.

        Raises:
            ObjectNotFound: There is no such object.
        """
        reference = self._file_reference(entity, id, attribute)
        return None if reference is None else self._storage.files.state(reference)

    def _file_reference(self, entity: str, id_: str, attribute: str) -> FileReference | None:
        found = self.get(entity, id_)
        if found is None:
            raise ObjectNotFound(entity=entity, id=id_)
        return FileReference.of(found[attribute])

    # --- reading --------------------------------------------------------------

    def get(self, entity: str, id: str) -> Object | None:  # noqa: A002
        """Return a live handle on an object, or None if there is none."""
        check_name(entity, "an entity name")
        check_id(id)
        handle = Object(self._storage, self._committer, entity, id)
        return handle if handle.exists else None

    def query(
        self,
        entity: str,
        where: Where = None,
        order_by: str | Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Iterator[Object]:
        """
        Iterate over the objects of an entity.

        Objects are read a page at a time, and what changes meanwhile shows in the pages that
        follow. With *order_by* all are read as of one moment; only the ids and the attributes
        ordered by are kept in memory, with a *limit* too only that many.

        Args:
            entity: Type of the objects.
            where: A constraint, or attributes that must be equal. None: all.
            order_by: An attribute or several; "-name" is descending. None: by id.
            limit: How many at the most. None: all.

        Raises:
            InvalidConstraint: *where* makes no sense, or the schema does not have what is asked for.
            InvalidValue: A name that no attribute can have, or a negative limit.
        """
        check_name(entity, "an entity name")
        constraint = constraint_of(where)
        orders = [order_by] if isinstance(order_by, str) else list(order_by or ())
        for order in orders:
            check_name(order.removeprefix("-"), "an attribute name")
        if limit is not None and limit < 0:
            raise InvalidValue(f"a limit of {limit}")
        if self._schema is not None:
            self._schema.check_constraint(entity, constraint)
            for order in orders:
                self._schema.check_constraint(entity, attribute(order.removeprefix("-")).exists())
        return self._query(entity, constraint, orders, limit)

    def _query(
        self, entity: str, constraint: Constraint | None, orders: list[str], limit: int | None
    ) -> Iterator[Object]:
        if not orders:
            found = _matching(self._storage.view.entity_objects(entity), constraint)
            yield from islice((self._handle(entity, id_) for id_, _ in found), limit)
            return
        with closing(self._storage.view.entity_snapshot(entity)) as listed:
            keyed = ((_order_key(attributes, orders), id_) for id_, attributes in _matching(listed, constraint))
            ordered = sorted(keyed) if limit is None else heapq.nsmallest(limit, keyed)
        for _key, id_ in ordered:
            yield self._handle(entity, id_)

    def _handle(self, entity: str, id_: str) -> Object:
        return Object(self._storage, self._committer, entity, id_)

    def count(self, entity: str, where: Where = None) -> int:
        """Return how many objects `query` would give, all as of one moment."""
        check_name(entity, "an entity name")
        constraint = constraint_of(where)
        if self._schema is not None:
            self._schema.check_constraint(entity, constraint)
        with closing(self._storage.view.entity_snapshot(entity)) as listed:
            return sum(1 for _ in (listed if constraint is None else _matching(listed, constraint)))

    # --- the log --------------------------------------------------------------

    def pending(self) -> Iterator[LoggedOperation]:
        """Iterate over the operations that the server has not settled, in log order."""
        for pending in self._storage.pending():
            for operation in self._storage.log.scan(after=pending.seq - 1, until=pending.seq):
                yield LoggedOperation(operation, "pending", 0, "")

    def pending_count(self) -> int:
        """Return how many operations are pending."""
        return self._storage.pending_count()

    def log(self, *, after: int = 0) -> Iterator[LoggedOperation]:
        """
        Iterate over the operations above position *after* that the log keeps, oldest first.

        Raises:
            LogCorrupt: An entry fails its check.
        """
        for operation in self._storage.log.scan(after=after):
            yield self._logged(operation)

    def tail(self, *, after: int = 0, timeout: float | None = None) -> Iterator[LoggedOperation]:
        """
        Iterate like `log`, and wait for what is appended later, by whatever thread or process.

        Args:
            after: Position to start above.
            timeout: Seconds without a new operation after which the iteration ends.
                None: never.
        """
        position = after
        last_change = time.monotonic()
        while True:
            for logged in self.log(after=position):
                yield logged
                position = logged.operation.seq
                last_change = time.monotonic()
            if timeout is not None and time.monotonic() - last_change >= timeout:
                return
            time.sleep(TAIL_POLL_SECONDS)

    def history(self, entity: str, id: str) -> Iterator[LoggedOperation]:  # noqa: A002
        """Iterate over this replica's operations on one object that the log keeps, oldest first."""
        check_name(entity, "an entity name")
        check_id(id)
        return (logged for logged in self.log() if logged.operation.key == (entity, id))

    def failures(self) -> Iterator[SynchronizationFailure]:
        """Iterate over the operations of this replica that the server refused, oldest first."""
        return map(SynchronizationFailure.from_message, self._storage.failures())

    def _failure(self, failure_id: str) -> SynchronizationFailure:
        message = self._storage.failure(failure_id)
        if message is None:
            raise StorageError(f"the failure {failure_id} is no longer recorded in {self.path}")
        return SynchronizationFailure.from_message(message)

    def trim_log(self) -> int:
        """
        Remove settled operations that are past the retention, and return how many went.

        Every synchronization does this. Pending operations, and those that a view
        still needs, always stay.
        """
        oldest_us = self._storage.clock() - self._log_retention // timedelta(microseconds=1)
        trimmed = 0
        while step := self._storage.trim(oldest_us, self._log_retention_bytes, count_max=TRIM_STEP_OPERATIONS):
            trimmed += step
        return trimmed

    def verify(self) -> Iterator[Finding]:
        """
        Yield what is wrong in the replica's directory; nothing if all that it keeps agrees. Nothing is written.

        It is read as of one moment: until the last finding is taken, the file grows by what is written.
        """
        return findings(self._storage.environment)

    def set_aside_damaged(self) -> SetAside:
        """
        Take operations that were damaged outside tidelog out of the log, so that the rest can go on.

        What is left of each is kept in a file, in the folder `set-aside` of the replica.
        One that was pending becomes a failure, with its commit group. Does nothing if none is damaged.
        Contents of files that were damaged go there too; those, and what vanished, are downloaded again.

        Raises:
            DiskFull, StorageError: The files cannot be written. Nothing was changed.
        """
        found = set_aside_damaged(self._storage)
        self._synchronizer.go_on()  # what was damaged may have kept it from that
        return found

    def _logged(self, operation: Operation) -> LoggedOperation:
        with self._storage.environment.read() as transaction:
            outcome = self._storage.outcome(transaction, operation.seq)
        if outcome is None:
            return LoggedOperation(operation, "pending", 0, "")
        if outcome.failure_id:
            return LoggedOperation(operation, "failed", 0, outcome.failure_id)
        return LoggedOperation(operation, "applied", outcome.version, "")

    # --- synchronizing --------------------------------------------------------

    def synchronize_all(
        self,
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        accept_foreign_server: bool = False,
        accept_mass_removal: bool = False,
    ) -> Report:
        """
        Upload everything pending, then download everything that changed.

        Args:
            timeout: Seconds after which to give up. None: no limit while the server
                answers, 30 seconds of trying while it does not.
            on_progress: Called with a `Progress` as the work goes on.
            accept_foreign_server: Let the replica become one of another server than it belongs to.
                What the log keeps is offered to it, and what it does not have is removed.
            accept_mass_removal: Let most of an entity be removed although the server does not say why.

        Raises:
            ForeignServer: The replica belongs to another server. Nothing was exchanged.
            MassRemoval: Most of an entity would go. Nothing was removed.
            SynchronizationInProgress: Another synchronization of this replica is running.
            ServerUnavailable: No luck until the deadline; what was settled is settled.
            Unauthenticated: The server does not accept the token, nor the next one of a provider.
            TokenUnavailable: The token provider failed.
            InvalidValue: The token provider gave what no header can carry.
            SynchronizationError: The server refuses; see its subclasses.
        """
        consent = Consent(accept_foreign_server, accept_mass_removal)
        return self._synchronize(Mode.ALL, timeout, on_progress, consent=consent)

    def synchronize_unsynchronized(
        self, *, timeout: float | None = None, on_progress: OnProgress | None = None
    ) -> Report:
        """
        Upload everything pending, deletions included, and download the objects that this changed on the server.

        Arguments and errors are those of `synchronize_all`.
        """
        return self._synchronize(Mode.UNSYNCHRONIZED, timeout, on_progress)

    def synchronize_selected(
        self,
        objects: Iterable[Object | tuple[str, str]],
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Report:
        """
        Upload what is pending on the selected objects, and download them as they are; those gone are removed.

        What their operations need goes with them: earlier operations on the same
        object, whole commit groups, pending creations of referenced objects; the
        report names these objects in `added`. Objects that are deleted here, or were
        never committed, cannot be selected: they are skipped and reported.

        Args:
            objects: Handles, or (entity, id) pairs.
            timeout: As for `synchronize_all`.
            on_progress: As for `synchronize_all`.

        Raises:
            InvalidValue: One of *objects* is neither.
            LimitExceeded: They are, with those that they need, more than 100,000.
            SynchronizationError: As for `synchronize_all`.
        """
        selected = {}
        for one in objects:
            key, is_new = ((one.entity, one.id), one.is_new) if isinstance(one, Object) else (_pair(one), False)
            selected[key] = is_new
        return self._synchronize(Mode.SELECTED, timeout, on_progress, selected)

    def _synchronize(
        self,
        mode: Mode,
        timeout: float | None,
        on_progress: OnProgress | None,
        selected: dict[tuple[str, str], bool] | None = None,
        consent: Consent | None = None,
    ) -> Report:
        if timeout is not None and not timeout >= 0:
            raise InvalidValue(f"a timeout of {timeout} seconds")
        report = Report(failures=Failures(self._failure))

        def selection() -> Selection:
            report.begin_selection()
            known = dict.fromkeys(report.added)  # of a session before this one
            report.added.clear()
            found = select(self._storage, self._known_schema(), selected or {}, report)
            report.added[:] = known | dict.fromkeys(report.added)
            if len(found.keys) > SELECTION_OBJECTS_MAX:
                raise LimitExceeded(
                    f"{len(found.keys)} objects, of which {len(report.added)} are needed by those selected: "
                    f"the limit is {SELECTION_OBJECTS_MAX}"
                )
            return found

        try:
            self._synchronizer.run(
                mode,
                report,
                timeout=timeout,
                on_progress=on_progress,
                selection=selection if selected is not None else None,
                consent=consent or Consent(),
            )
        except SynchronizationError as error:
            error.report = report if report.attempts else None
            raise
        try:
            self.trim_log()
        except StorageError as error:
            # Housekeeping does not undo what was done; whoever reads the log is told.
            _log.warning("the log could not be trimmed", path=str(self.path), detail=str(error))
        return report

    def _known_schema(self) -> Schema:
        """Return the program's schema, else what the server said of its own."""
        if self._schema is not None:
            return self._schema
        return Schema.from_message(schema_pb2.Schema.FromString(self._storage.meta("schema")))


def _checked_downloads(wishes: Mapping[str, DownloadWish], schema: Schema | None) -> dict[str, Download]:
    downloads = downloads_of(wishes)
    if schema is not None:
        for entity, one in downloads.items():
            schema.check_constraint(entity, one.where)
    size_bytes = sum(one.to_message(entity).ByteSize() for entity, one in downloads.items())
    if size_bytes > DOWNLOADS_BYTES_MAX:
        raise LimitExceeded(
            f"what is to be downloaded takes {size_bytes} bytes to say: the limit is {DOWNLOADS_BYTES_MAX}"
        )
    return downloads


def _pair(value: Any) -> tuple[str, str]:
    if not (isinstance(value, tuple) and len(value) == 2):  # noqa: PLR2004 - a pair
        raise InvalidValue(f"select objects or (entity, id) pairs, got {value!r}")
    entity, id_ = value
    check_name(entity, "an entity name")
    check_id(id_)
    return entity, id_


def _matching(
    listed: Iterable[tuple[str, ViewRecord]], constraint: Constraint | None
) -> Iterator[tuple[str, Attributes]]:
    for id_, record in listed:
        attributes = decode_trusted(record.attributes)
        if constraint is None or constraint.matches(attributes):
            yield id_, attributes


def _order_key(attributes: Attributes, orders: list[str]) -> tuple[Any, ...]:
    return tuple(
        _Descending(sort_key(attributes.get(order[1:]))) if order.startswith("-") else sort_key(attributes.get(order))
        for order in orders
    )


class _Descending:
    """Turns an order round."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.key < self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(self.key == other.key)

    __hash__ = None  # type: ignore[assignment]
