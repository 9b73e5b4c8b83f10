"""
A tenant's data in the server's own process: what a service itself reads and changes.

The same engine applies it: rules, hooks, versions, change log. So it reaches replicas
like any other change. A transaction looks first and writes at its end: nobody waits
while it is open, and what it looked at is compared once more in the moment it is applied.
"""

from __future__ import annotations

import asyncio
import io
import mimetypes
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Self

import uuid_utils

from tidelog._constraints import Where, constraint_of
from tidelog._errors import (
    InvalidValue,
    LimitExceeded,
    ObjectExists,
    ObjectNotFound,
    ResourceClosed,
    StorageError,
)
from tidelog._failure import FailureReason
from tidelog._file_reference import FileReference
from tidelog._keys import ObjectKey
from tidelog._limits import OPERATION_BYTES_MAX, PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, encoded_attributes, patch_of
from tidelog._values import Attributes, check, check_id, check_name, copied, decode_trusted
from tidelog_server._access import Rights
from tidelog_server._action import Action, References
from tidelog_server._application import Application
from tidelog_server._author import Author
from tidelog_server._errors import ChangedMeanwhile, OperationRefused
from tidelog_server._file_records import SERVICE, file_writes
from tidelog_server._file_rules import FileRules
from tidelog_server._files import Files, Wanted
from tidelog_server._indexes import index_lookups, index_writes
from tidelog_server._overlay import Overlay
from tidelog_server._principal import SYSTEM_USER, Principal
from tidelog_server._projection import Sight, matching
from tidelog_server._records import MAX_POSITION, NO_REPLICA, Writes
from tidelog_server._refusal import NotReady, Refused, Waits
from tidelog_server._store import Reader, Store
from tidelog_server._upload_records import without_settled

# A transaction of the service is held in memory, and applied while nobody else's operations are.
TRANSACTION_OPERATIONS_MAX: Final = 10_000
TRANSACTION_BYTES_MAX: Final = 16 * 1024 * 1024
TRANSACTION_READS_MAX: Final = 10_000

FILE_NAME_BYTES_MAX: Final = 1_024


class Found(NamedTuple):
    """
    An object as a service reads it.

    Attributes:
        id: Its id.
        version: The version of its last change.
        attributes: Its attributes, a dictionary of its own.
    """

    id: str
    version: int
    attributes: dict[str, Any]


class Tenant:
    """
    One tenant's data. Made by `Server.tenant`; safe to use from any thread, until the store is closed.

    Hooks work through their context instead: a hook that writes by a `Tenant` is an error.

    Args:
        application: The rules.
        store: Where the data are.
        name: The tenant.
        principal: On whose behalf, with whose rights. None: the system, which may do
            everything; hooks and the schema bind it too.
        clock: Returns the time in microseconds since 1970.
        files: The contents of files. None: there are none.
    """

    def __init__(  # noqa: PLR0917 - what a tenant's data are, and for whom
        self,
        application: Application,
        store: Store,
        name: str,
        principal: Principal | None,
        clock: Callable[[], int],
        files: Files | None = None,
    ) -> None:
        self.name = name
        self._data = _Data(application, store, name, principal, clock)
        self._files_given = files

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002 - the glossary's word
        """
        Return an object's attributes, as far as the principal may read them, or None if there is none.

        Raises:
            ValidationFailed: The schema has no such entity.
            InvalidValue: A name or an id that cannot be.
        """
        found = self._data.found((entity, id))
        return None if found is None else found.attributes

    def query(self, entity: str, where: Where = None) -> Iterator[Found]:
        """
        Iterate over the entity's objects that match, in the order of their ids.

        Each page is read in a transaction of its own, so that a slow reader holds nothing.

        Args:
            entity: Type of the objects.
            where: A constraint, or attributes that must be equal. None: all.

        Raises:
            InvalidConstraint: *where* makes no sense, or names what the principal may not
                read, or the schema has no such entity.
        """
        return self._data.objects(entity, where)

    def create(self, entity: str, attributes: Mapping[str, Any], id: str | None = None) -> str:  # noqa: A002
        """Create an object in a transaction of its own. See `TenantTransaction.create`."""
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
        """Change an object in a transaction of its own. See `TenantTransaction.update`."""
        with self.transaction() as transaction:
            transaction.update(entity, id, attributes, unset=unset, increment=increment, add=add, remove=remove)

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """Delete an object in a transaction of its own. See `TenantTransaction.delete`."""
        with self.transaction() as transaction:
            transaction.delete(entity, id)

    def add_file(
        self,
        source: str | Path | bytes | bytearray | memoryview | BinaryIO,
        *,
        name: str | None = None,
        media_type: str | None = None,
    ) -> dict[str, Any]:
        """
        Store the content of a file, and return the value for an attribute that is to refer to it.

        It is on disk then. Unless something refers to it within the server's `file_grace`, it is collected. With a
        principal it is added as an upload of that user, whose operations may refer to it. A hook cannot add files.

        Args:
            source: Its path, its bytes, or a stream that is read to its end.
            name: Its name, for people. None: that of its path.
            media_type: What it holds. None: what its name says, or "application/octet-stream".

        Raises:
            InvalidValue: There is no name, or one that no file can have.
            OSError: The file cannot be read.
            DiskFull: There is no room for it.
            StorageError: It cannot be stored.
        """
        if name is None:
            if not isinstance(source, str | Path):
                raise InvalidValue("a file that has no path needs a name")
            name = Path(source).name
        _check_file_name(name)
        media_type = media_type or mimetypes.guess_type(name)[0] or "application/octet-stream"
        with _opened(source) as stream:
            added = self._files.add(self.name, stream, self._data.adds_files_for)
        return FileReference(name, added.size, media_type, added.sha256).to_value()

    def open_file(self, entity: str, id: str, attribute: str) -> BinaryIO:  # noqa: A002
        """
        Open the content of a file that an object refers to, to be read.

        Raises:
            ObjectNotFound: There is no such object (to the principal).
            InvalidValue: The attribute holds no file (that the principal may read).
            ContentLost: Now, or when it is read: the server does not have it any more.
            StoreUnavailable: It cannot be read now. Left to pass by a hook, it ends the session, and refuses nothing.
        """
        attributes = self.get(entity, id)
        if attributes is None:
            raise ObjectNotFound(entity=entity, id=id)
        reference = FileReference.of(attributes.get(attribute))
        if reference is None:
            raise InvalidValue(f"{entity} {id!r}: attribute {attribute!r} holds no file")
        return self._files.open(self.name, Wanted(reference.sha256, reference.size))

    @property
    def _files(self) -> Files:
        if self._files_given is None:
            raise StorageError("there is no place for the contents of files: `Server.tenant` gives one")
        return self._files_given

    def transaction(self) -> TenantTransaction:
        """
        Open a transaction for a `with` or `async with` block: all its changes are applied at the end, or none.

        The plain form waits in the thread that ends the block, the other one lets the
        event loop go on.
        """
        return TenantTransaction(self._data)


class TenantTransaction:
    """
    Changes of a service that are applied together when the block ends, or not at all if it raises.

    What `get` returned is checked at the end: if somebody has changed it meanwhile
    `ChangedMeanwhile` is raised and nothing is applied. Repeat the block then.

    The end of the block raises besides:

    * ObjectExists, ObjectNotFound: an object is there, or is not (to the principal);
    * OperationRefused: a rule or a hook refuses;
    * TransientError: a hook cannot tell now.

    Attributes:
        version: The tenant's version once the block has ended; 0 until then, and if it did nothing.
    """

    def __init__(self, data: _Data) -> None:
        self._data = data
        self._changes: list[_Change] = []
        self._bytes = 0
        # The versions of the objects that were looked at; 0: not there.
        self._seen: dict[ObjectKey, int] = {}
        # The objects as this transaction leaves them so far, as far as that is known; None: not there.
        self._views: dict[ObjectKey, Attributes | None] = {}
        # Updates of objects that nobody has looked at.
        self._blind: defaultdict[ObjectKey, list[Patch]] = defaultdict(list)
        self._entered = False
        self._ended = False
        self.version = 0

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002
        """
        Return an object's attributes as this transaction would leave them, but for what hooks do, or None.

        Raises:
            ValidationFailed: The schema has no such entity.
            InvalidValue: A name or an id that cannot be.
            LimitExceeded: The transaction has looked at 10,000 objects already.
        """
        self._check_open()
        key = (entity, id)
        self._data.check_key(key)
        if key not in self._views:
            if len(self._seen) >= TRANSACTION_READS_MAX:
                raise LimitExceeded(f"a transaction that looks at more than {TRANSACTION_READS_MAX} objects")
            found = self._data.found(key)
            view = None if found is None else found.attributes
            for patch in self._blind.get(key, ()):
                view = None if view is None else patch.apply(view)
            self._blind.pop(key, None)
            self._seen[key] = 0 if found is None else found.version
            self._views[key] = view
        return copied(self._views[key])  # type: ignore[no-any-return]

    def create(self, entity: str, attributes: Mapping[str, Any], id: str | None = None) -> str:  # noqa: A002
        """
        Create an object and return its id, a new UUIDv7 unless *id* is given.

        Raises:
            ObjectExists: This transaction has created or looked at one of this id.
            ValidationFailed: A value does not fit the schema.
            LimitExceeded: It is too large, or the transaction would be.
            InvalidValue: A name, the id or a value that cannot be stored.
        """
        id_ = str(uuid_utils.uuid7()) if id is None else id
        self._add(OperationKind.CREATE, entity, id_, patch_of(attributes))
        return id_

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
        """
        Change attributes of an object.

        Args:
            entity: Type of the object.
            id: Its id.
            attributes: Values that replace what is there.
            unset: Attributes to be removed.
            increment: Numbers to be added.
            add: Members that a set-like list gets.
            remove: Members that it loses.

        Raises:
            ObjectNotFound: This transaction has deleted it, or has looked and not found it.
            ValidationFailed: A value does not fit the schema.
            LimitExceeded: It is too large, or the transaction would be.
            InvalidValue: A name or value that cannot be stored, or an intent that does not fit what `get` returned.
        """
        patch = patch_of(attributes, unset=unset, increment=increment, add=add, remove=remove)
        self._add(OperationKind.UPDATE, entity, id, patch)

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """
        Delete an object.

        Raises:
            ObjectNotFound: This transaction has deleted it, or has looked and not found it.
            ValidationFailed: The schema has no such entity.
            LimitExceeded: The transaction would be too large.
            InvalidValue: A name or an id that cannot be.
        """
        self._add(OperationKind.DELETE, entity, id, Patch())

    def __enter__(self) -> Self:
        if self._entered:
            raise ResourceClosed("a transaction is used once: open another one")
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        future = self._end(kind)
        if future is not None:
            self.version = future.result()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        future = self._end(kind)
        if future is not None:
            self.version = await asyncio.wrap_future(future)

    def _end(self, kind: type[BaseException] | None) -> Future[int] | None:
        self._ended = True
        if kind is not None or not (self._changes or self._seen):
            return None
        return self._data.submit(self._changes, self._seen)

    def _check_open(self) -> None:
        if self._ended:
            raise ResourceClosed("the transaction has ended: open another one")
        if not self._entered:
            raise ResourceClosed("a transaction begins with its block: use it in a with or async with statement")

    def _add(self, kind: OperationKind, entity: str, id_: str, patch: Patch) -> None:
        self._check_open()
        change = self._data.checked_change(kind, entity, id_, patch)
        if len(self._changes) >= TRANSACTION_OPERATIONS_MAX:
            raise LimitExceeded(f"a transaction of more than {TRANSACTION_OPERATIONS_MAX} operations")
        if self._bytes + change.size_bytes > TRANSACTION_BYTES_MAX:
            raise LimitExceeded(
                f"a transaction of {self._bytes + change.size_bytes} bytes: the limit is {TRANSACTION_BYTES_MAX}"
            )
        self._view(change)
        self._changes.append(change)
        self._bytes += change.size_bytes

    def _view(self, change: _Change) -> None:
        """Follow what a change does to its object, as far as that is known."""
        key = change.operation.key
        is_known = key in self._views
        view = self._views.get(key)
        if change.operation.kind is OperationKind.CREATE:
            if view is not None:
                raise ObjectExists(entity=key[0], id=key[1])
            self._views[key] = self._data.schema.with_defaults(key[0], change.patch.set)
            self._blind.pop(key, None)
        elif is_known and view is None:
            raise ObjectNotFound(entity=key[0], id=key[1])
        elif change.operation.kind is OperationKind.DELETE:
            self._views[key] = None
            self._blind.pop(key, None)
        elif view is not None:
            self._views[key] = change.patch.apply(view)
        else:
            self._blind[key].append(change.patch)


class _Change(NamedTuple):
    """An operation of a transaction, with its patch decoded."""

    operation: Operation
    patch: Patch

    @property
    def size_bytes(self) -> int:
        return len(self.operation.patch)


class _Data:
    """One tenant's data to one principal: what a tenant and its transactions work with."""

    def __init__(
        self, application: Application, store: Store, name: str, principal: Principal | None, clock: Callable[[], int]
    ) -> None:
        self.schema = application.schema
        self._name = name
        self._application = application
        self._store = store
        self._principal = principal or Principal(SYSTEM_USER, name)
        # The system is bound by no access rule: None to the engine, and whoever reads without rules reads everything.
        self._rights = application.rights(principal) if principal is not None else None
        self._readable = self._rights or Rights((), self._principal)
        self._clock = clock
        # Who may refer to the contents that are added.
        self.adds_files_for = principal.user_id if principal is not None else SERVICE

    def found(self, key: ObjectKey) -> Found | None:
        """Return an object as the principal sees it, or None."""
        self.check_key(key)
        with self._store.read(self._name) as reader:
            state = reader.objects((key,)).get(key)
        if state is None or state.deleted:
            return None
        attributes = self._readable.entity(key[0]).readable(decode_trusted(state.attributes))
        return None if attributes is None else Found(key[1], state.version, attributes)

    def check_key(self, key: ObjectKey) -> None:
        """
        Check that there can be an object of this key.

        Raises:
            ValidationFailed: The schema has no such entity.
            InvalidValue: The name or the id cannot be.
        """
        check_name(key[0], "an entity name")
        check_id(key[1])
        self.schema.check_patch(key[0], Patch(), key[1])

    def objects(self, entity: str, where: Where) -> Iterator[Found]:
        """Iterate over an entity's objects that match, as the principal sees them."""
        check_name(entity, "an entity name")
        constraint = constraint_of(where)
        self.schema.check_constraint(entity, constraint)
        return self._matching(entity, matching(self.schema, self._readable, entity, constraint))

    def checked_change(self, kind: OperationKind, entity: str, id_: str, patch: Patch) -> _Change:
        """
        Return a change that can be stored, with values of its own.

        Raises:
            ValidationFailed: It does not fit the schema, as far as that can be told without the object and its hooks.
            InvalidValue: It cannot be stored.
        """
        self.check_key((entity, id_))
        patch.check()
        self.schema.check_patch(entity, patch, id_)
        encoded = b"" if kind is OperationKind.DELETE else patch.encode()
        if len(encoded) > OPERATION_BYTES_MAX:
            raise LimitExceeded(
                f"an operation of {len(encoded)} bytes on {entity} {id_!r}: the limit is {OPERATION_BYTES_MAX}"
            )
        operation = Operation(0, 0, kind, entity, id_, encoded, 0, None, self.schema.version, self._clock())
        return _Change(operation, Patch(*map(copied, patch)))

    def submit(self, changes: Sequence[_Change], seen: Mapping[ObjectKey, int]) -> Future[int]:
        """Apply changes in one transaction, if the objects *seen* have their versions still; returns the version."""
        return self._store.submit(self._name, lambda reader: self._evaluate(reader, changes, seen))

    def _matching(self, entity: str, sight: Sight) -> Iterator[Found]:
        after = ""
        more = True
        while more:
            with self._store.read(self._name) as reader:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
            for (_entity, after), state in page:
                if not state.deleted and (seen := sight.of(decode_trusted(state.attributes))) is not None:
                    yield Found(after, state.version, seen)

    def _evaluate(
        self, reader: Reader, changes: Sequence[_Change], seen: Mapping[ObjectKey, int]
    ) -> tuple[Writes | None, int]:
        overlay = Overlay(reader)
        overlay.prefetch([*seen, *(change.operation.key for change in changes)])
        for key, version in seen.items():
            if version != self._seen_version(overlay, key):
                raise ChangedMeanwhile(
                    f"{key[0]} {key[1]!r} was changed while the transaction was open, which saw it as it was before: "
                    "repeat the transaction"
                )
        if not changes:
            return None, overlay.version
        files = self._file_rules(overlay)
        self._apply(overlay, changes, files)
        indexed = list(overlay.written(self._application.indexed_entities))
        overlay.prefetch_index(index_lookups(self.schema, indexed))
        writes = Writes(
            objects=overlay.written_objects(),
            changes=overlay.changes,
            replica=None,
            settled=[],
            failures=[],
            version=overlay.version,
            index_entries={
                **index_writes(self.schema, indexed, overlay.index),
                **file_writes(overlay, (), self._clock()),
                **without_settled(files.referred(), overlay.index),
            },
        )
        return writes, overlay.version

    def _seen_version(self, overlay: Overlay, key: ObjectKey) -> int:
        """Return the version of an object; 0 if it is not there, to this principal at least."""
        state = overlay.state(key)
        if state is None or state.deleted or not self._readable.entity(key[0]).sees(overlay.attributes(key)):
            return 0
        return state.version

    def _file_rules(self, overlay: Overlay) -> FileRules:
        if self._rights is None:
            return FileRules(overlay, None, user_id=None)
        rights = self._rights if self._application.access_rules else None
        return FileRules(overlay, rights, user_id=self._principal.user_id, bytes_max=MAX_POSITION)

    def _apply(self, overlay: Overlay, changes: Sequence[_Change], files: FileRules) -> None:
        references = References()
        # Whatever is created further on is there at the end, or nothing is.
        references.assumed.update(
            change.operation.key for change in changes if change.operation.kind is OperationKind.CREATE
        )
        action = Action(
            self._application,
            overlay,
            author=Author(NO_REPLICA),
            principal=self._principal,
            rights=self._rights,
            time_us=self._clock(),
            references=references,
            files=files,
        )
        for position, (operation, patch) in enumerate(changes):
            key = operation.key
            version = self._seen_version(overlay, key)
            # The service looks at the present: there is nothing that it could have overlooked.
            action.begin(operation._replace(base_version=version), position)
            try:
                if operation.kind is OperationKind.CREATE:
                    if overlay.exists(key):
                        raise ObjectExists(entity=operation.entity, id=operation.id)
                    action.create(key, patch.set, encoded_attributes(operation.patch))
                elif not version:
                    raise ObjectNotFound(entity=operation.entity, id=operation.id)
                elif operation.kind is OperationKind.UPDATE:
                    action.update(key, patch, operation.patch)
                else:
                    action.delete(key)
            except Refused as refusal:
                raise _refused(operation, refusal.reason, refusal.message, refusal.code) from refusal
            except Waits as wait:
                raise _refused(operation, FailureReason.DANGLING_REFERENCE, wait.message) from wait
            except NotReady as verdict:
                raise _refused(operation, FailureReason.FILE_MISSING, verdict.message) from verdict
        try:
            action.end_unit()
        except Refused as refusal:
            operation = changes[refusal.position].operation
            raise _refused(operation, refusal.reason, refusal.message, refusal.code) from refusal


@contextmanager
def _opened(source: str | Path | bytes | bytearray | memoryview | BinaryIO) -> Iterator[BinaryIO]:
    """Give a stream of what a file holds. One that was given stays open."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        with Path(source).open("rb") as opened:
            yield opened
    else:
        yield source


def _check_file_name(name: object) -> None:
    """Raise InvalidValue if no file can have a name."""
    check(name, "the name of a file")
    if type(name) is not str or not name or "\0" in name or len(name.encode()) > FILE_NAME_BYTES_MAX:
        raise InvalidValue(f"the name of a file has 1 to {FILE_NAME_BYTES_MAX} bytes, and no NUL")


def _refused(operation: Operation, reason: FailureReason, message: str, code: str = "") -> OperationRefused:
    return OperationRefused(message, entity=operation.entity, id=operation.id, reason=reason, code=code)
