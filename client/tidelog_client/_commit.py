"""
Local commits: from what a program wants to operations in the log.

A transaction collects changes; its commit checks them against the view as it is
then, and appends. Threads that commit at the same moment share one LMDB transaction
and so one sync to disk: whoever comes first takes the others' changes along.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import uuid_utils

from tidelog._errors import (
    FileUnavailable,
    InvalidValue,
    LimitExceeded,
    ObjectExists,
    ObjectNotFound,
    ResourceClosed,
)
from tidelog._file_reference import may_refer_to_files
from tidelog._keys import pack_object_key
from tidelog._limits import (
    GROUP_BYTES_MAX,
    GROUP_OPERATIONS_MAX,
    OBJECT_BYTES_MAX,
    OPERATION_BYTES_MAX,
)
from tidelog._operation import CommitGroup, Operation, OperationKind
from tidelog._patch import Patch, check_attribute_name, encoded_attributes, patch_of
from tidelog._schema import Schema
from tidelog._values import Attributes, check_id, check_name, decode_trusted, encode
from tidelog_client._attachment import FileSource, stored_file
from tidelog_client._storage import Storage
from tidelog_client._view import ViewRecord

if TYPE_CHECKING:
    from tidelog._environment import LmdbTransaction

COMMITS_AT_ONCE_MAX: Final = 256


class Intent(NamedTuple):
    """
    A change that a program asked for, on its way to becoming an operation.

    Attributes:
        kind: What it does.
        entity: Type of the object.
        id: Its id.
        patch: The change of attributes; empty for a deletion.
        encoded: The patch, encoded.
        base_version: Server version that the author looked at, or None for the
            one that the view has at the commit.
    """

    kind: OperationKind
    entity: str
    id: str
    patch: Patch
    encoded: bytes
    base_version: int | None = None


class Committer:
    """
    Appends intents to the log, those of many threads together.

    Args:
        storage: The replica's data.
        schema: The program's schema, which whatever is appended fits; None: everything does.
        never: Entities that the program wants to keep out of ordinary synchronizations.

    Attributes:
        schema: See above.
    """

    def __init__(self, storage: Storage, schema: Schema | None, never: Collection[str] = ()) -> None:
        self.schema = schema
        self._storage = storage
        self._never = frozenset(never)
        self._turn = threading.Lock()
        self._waiting: deque[_Commit] = deque()

    def commit(self, intents: Sequence[Intent], *, atomic: bool) -> None:
        """
        Append all intents, or none. When this returns they are in the log on disk.

        Raises:
            ObjectNotFound, ObjectExists, ValidationFailed, LimitExceeded, InvalidValue: One of them cannot be.
            DiskFull: There is no room.
        """
        if not intents:
            return
        mine = _Commit(intents, atomic=atomic)
        self._waiting.append(mine)
        try:
            with self._turn:
                while not mine.done and not self._is_logged(mine):
                    self._write(mine)
        except BaseException:
            # Interrupted while it waits: nobody else may commit what this thread gives up.
            with suppress(ValueError):
                self._waiting.remove(mine)
            raise
        if mine.error is not None:
            raise mine.error

    def _write(self, mine: _Commit) -> None:
        """
        Write a commit together with others that wait.

        An interrupt, which ends this thread's commit, may come anywhere. Whoever's commit was taken along
        and is not done then finds that out at its own turn, and looks into the log, or writes it itself.
        """
        commits: list[_Commit] = []
        while self._waiting and len(commits) < COMMITS_AT_ONCE_MAX:
            commits.append(self._waiting.popleft())
        if mine not in commits:  # very many wait, or somebody had taken it along before
            with suppress(ValueError):
                self._waiting.remove(mine)
            commits.append(mine)

        def work(transaction: LmdbTransaction) -> None:
            for commit in commits:
                commit.error = commit.last_entry = None
                builder = _Builder(self._storage, transaction, self.schema, self._never)
                try:
                    builder.build(commit.intents, atomic=commit.atomic)
                except InvalidValue as error:
                    commit.error = error
                except (ObjectNotFound, ObjectExists) as error:
                    commit.error = error
                else:
                    builder.write()
                    commit.last_entry = builder.last_entry

        try:
            self._storage.environment.write(work)
        except Exception as error:  # noqa: BLE001 - each commit's own thread raises it
            for commit in commits:
                commit.error = error
        for commit in commits:
            commit.done = True

    def _is_logged(self, commit: _Commit) -> bool:
        """Tell whether a commit that another thread took along, and was interrupted, is in the log."""
        if commit.last_entry is None:
            return False
        seq, data = commit.last_entry
        with self._storage.environment.read() as transaction:
            return self._storage.log.get(transaction, seq) == data


class _Commit:
    __slots__ = ("atomic", "done", "error", "intents", "last_entry")

    def __init__(self, intents: Sequence[Intent], *, atomic: bool) -> None:
        self.intents = intents
        self.atomic = atomic
        self.done = False
        self.error: BaseException | None = None
        # Seq and bytes of its last operation, once it is in the transaction.
        self.last_entry: tuple[int, bytes] | None = None


class _Builder:
    """Makes the operations of one commit and follows what they do to the view."""

    def __init__(
        self, storage: Storage, transaction: LmdbTransaction, schema: Schema | None, never: frozenset[str]
    ) -> None:
        self._storage = storage
        self._transaction = transaction
        self._schema = schema
        self._never = never
        self._views: dict[bytes, tuple[ViewRecord | None, ViewRecord | None]] = {}
        self._operations: list[Operation] = []
        self._encoded: list[bytes] = []

    def build(self, intents: Sequence[Intent], *, atomic: bool) -> None:
        first_seq = self._storage.last_seq(self._transaction) + 1
        schema_version = self._schema.version if self._schema is not None else 0
        client_time_us = self._storage.clock()
        nonces = iter(struct.unpack(f"{len(intents)}Q", secrets.token_bytes(8 * len(intents))))
        is_group = atomic and len(intents) > 1
        if is_group and len(intents) > GROUP_OPERATIONS_MAX:
            raise LimitExceeded(f"a commit group of {len(intents)} operations: the limit is {GROUP_OPERATIONS_MAX}")
        if is_group:
            self._check_entities({intent.entity for intent in intents})
        for position, intent in enumerate(intents):
            key = pack_object_key(intent.entity, intent.id)
            before, now = self._view(key)
            after = _after(intent, now, self._schema)
            if may_refer_to_files(intent.encoded):
                self._storage.files.check_references(intent.patch.set)
            self._views[key] = (before, after)
            base_version = intent.base_version
            if base_version is None:
                base_version = (
                    now.version if now is not None else self._storage.view.base_version(self._transaction, key)
                )
            operation = Operation(
                first_seq + position,
                next(nonces),
                intent.kind,
                intent.entity,
                intent.id,
                intent.encoded,
                base_version,
                CommitGroup(first_seq, position, len(intents)) if is_group else None,
                schema_version,
                client_time_us,
            )
            data = operation.encode()
            if len(data) > OPERATION_BYTES_MAX:
                raise LimitExceeded(
                    f"an operation of {len(data)} bytes on {intent.entity} {intent.id!r}: "
                    f"the limit is {OPERATION_BYTES_MAX}"
                )
            self._operations.append(operation)
            self._encoded.append(data)
        if is_group and (size_bytes := sum(map(len, self._encoded))) > GROUP_BYTES_MAX:
            raise LimitExceeded(f"a commit group of {size_bytes} bytes: the limit is {GROUP_BYTES_MAX}")

    def _check_entities(self, entities: set[str]) -> None:
        """Refuse a commit group that could never be uploaded whole."""
        if len(entities) == 1:
            return
        never = entities & (self._never | self._storage.never(self._transaction))
        if never and never != entities:
            raise InvalidValue(
                f"a commit group over {', '.join(sorted(entities))}: it cannot hold {', '.join(sorted(never))}, "
                "of download mode 'never', together with others; commit them apart"
            )

    def write(self) -> None:
        self._storage.write_commit(self._transaction, self._operations, self._encoded, self._views)

    @property
    def last_entry(self) -> tuple[int, bytes]:
        """Seq and bytes of the last operation."""
        return self._operations[-1].seq, self._encoded[-1]

    def _view(self, key: bytes) -> tuple[ViewRecord | None, ViewRecord | None]:
        """Return the object's record before this commit and as this commit has left it so far."""
        if key not in self._views:
            record = self._storage.view.get(self._transaction, key)
            return record, record
        return self._views[key]


def _after(intent: Intent, now: ViewRecord | None, schema: Schema | None) -> ViewRecord | None:
    """Return the object's record after an intent, which fits the schema."""
    if intent.kind is OperationKind.CREATE:
        if now is not None:
            raise ObjectExists(entity=intent.entity, id=intent.id)
        return ViewRecord(0, True, encoded_attributes(intent.encoded) or encode(intent.patch.set))
    if now is None:
        raise ObjectNotFound(entity=intent.entity, id=intent.id)
    if intent.kind is OperationKind.DELETE:
        return None
    attributes = intent.patch.apply(decode_trusted(now.attributes))
    if schema is not None:
        schema.check_written(intent.entity, attributes, intent.patch.written, intent.id)
    encoded = encode(attributes)
    if len(encoded) > OBJECT_BYTES_MAX:
        raise LimitExceeded(
            f"{intent.entity} {intent.id!r} would have {len(encoded)} bytes of attributes: "
            f"the limit is {OBJECT_BYTES_MAX}"
        )
    return ViewRecord(now.version, True, encoded)


class Transaction:
    """
    Changes that are committed together when the `with` block ends, or not at all if it raises.

    Nothing outside sees them before. Made by `Replica.transaction`.
    """

    def __init__(self, storage: Storage, committer: Committer, *, atomic: bool) -> None:
        self._storage = storage
        self._committer = committer
        self._atomic = atomic
        self._intents: list[Intent] = []
        # The objects as this transaction leaves them so far; None: deleted.
        self._views: dict[tuple[str, str], ViewRecord | None] = {}
        # The contents of files, and what is to refer to them.
        self._attached: dict[bytes, tuple[str, str, str]] = {}
        self._entered = False
        self._ended = False

    def create(self, entity: str, attributes: Mapping[str, Any], id: str | None = None) -> str:  # noqa: A002
        """
        Create an object and return its id, a new UUIDv7 unless *id* is given.

        What *attributes* leaves out gets its default, if the replica has a schema.

        Raises:
            ObjectExists: There is one of this id.
            ValidationFailed: It does not fit the schema.
            InvalidValue: A name, the id or a value that cannot be stored.
        """
        if id is None:
            id_ = str(uuid_utils.uuid7())
            self._views[entity, id_] = None  # nobody else has this id: no need to look
        else:
            id_ = id
        self._add(OperationKind.CREATE, entity, id_, Patch(dict(attributes)))
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
            increment: Numbers to be added; those of several authors add up.
            add: Members that a set-like list gets; those of several authors come together.
            remove: Members that it loses.

        Raises:
            ObjectNotFound: There is no such object.
            ValidationFailed: What it makes of the object does not fit the schema.
            InvalidValue: A name or value that cannot be stored, or an intent that
                does not fit the present value.
        """
        patch = patch_of(attributes, unset=unset, increment=increment, add=add, remove=remove)
        self._add(OperationKind.UPDATE, entity, id, patch)

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """
        Delete an object.

        Raises:
            ObjectNotFound: There is no such object.
            ValidationFailed: The schema has no such entity.
        """
        self._add(OperationKind.DELETE, entity, id, Patch())

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
        """
        Let an attribute of an object be a file. Its content is on disk when this returns.

        A transaction that stays open for hours may lose it: then its end raises FileUnavailable.

        Args:
            entity: Type of the object.
            id: Its id.
            attribute: The attribute.
            source: A path, the bytes themselves, or a binary stream, read to its end.
            name: What the file is called. None: the path's name, else the attribute's.
            media_type: What it holds, such as "image/jpeg". None: what its name suggests.

        Raises:
            ObjectNotFound, ValidationFailed: As for `update`.
            InvalidValue: The file cannot be read, or its name not be stored.
            DiskFull, StorageError: It cannot be stored.
        """
        if self._view(entity, id) is None:
            raise ObjectNotFound(entity=entity, id=id)
        check_attribute_name(attribute)
        value = stored_file(self._storage.files, source, name=name, media_type=media_type, default_name=attribute)
        self.update(entity, id, {attribute: value})
        self._attached[value["sha256"]] = (entity, id, attribute)

    def get(self, entity: str, id: str) -> Attributes | None:  # noqa: A002
        """Return the attributes of an object as this transaction would leave it, or None."""
        record = self._view(entity, id)
        return None if record is None else decode_trusted(record.attributes)

    def __enter__(self) -> Self:
        if self._entered:
            raise ResourceClosed("a transaction is used once: open another one")
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        if kind is None:
            self._keep_attached()
            self._committer.commit(self._intents, atomic=self._atomic)

    def _keep_attached(self) -> None:
        for sha256, (entity, id_, attribute) in self._attached.items():
            if not self._storage.files.keep(sha256):
                reason = "it was deleted again while the transaction was open: nothing is committed, attach it anew"
                raise FileUnavailable(entity=entity, id=id_, attribute=attribute, reason=reason)

    def _add(self, kind: OperationKind, entity: str, id_: str, patch: Patch) -> None:
        if self._ended:
            raise ResourceClosed("the transaction has ended")
        schema = self._committer.schema
        intent = checked_intent(kind, entity, id_, patch, schema=schema)
        self._views[entity, id_] = _after(intent, self._view(entity, id_), schema)
        self._intents.append(intent)

    def _view(self, entity: str, id_: str) -> ViewRecord | None:
        if (entity, id_) in self._views:
            return self._views[entity, id_]
        with self._storage.environment.read() as transaction:
            return self._storage.view.get(transaction, pack_object_key(entity, id_))


def checked_intent(
    kind: OperationKind,
    entity: str,
    id_: str,
    patch: Patch,
    *,
    schema: Schema | None,
    base_version: int | None = None,
) -> Intent:
    """
    Return an intent whose names, id and values can be stored; a creation has its defaults.

    Raises:
        ValidationFailed: It does not fit the schema, as far as that can be told without the object.
        InvalidValue: It cannot be stored.
    """
    check_name(entity, "an entity name")
    check_id(id_)
    patch.check()
    if schema is not None:
        if kind is OperationKind.CREATE:
            patch = Patch(schema.with_defaults(entity, patch.set))
            schema.check_object(entity, patch.set, id_)
        else:
            schema.check_patch(entity, patch, id_)
    return Intent(kind, entity, id_, patch, b"" if kind is OperationKind.DELETE else patch.encode(), base_version)
