"""
A tenant's data in the server's own process: what a service itself reads and changes.

The same engine applies it: rules, hooks, versions, change log. So it reaches replicas
like any other change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, Self

import uuid_utils

from tidelog._constraints import Constraint, Where, constraint_of
from tidelog._errors import InvalidConstraint, ObjectExists, ObjectNotFound, ResourceClosed
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch
from tidelog._values import Attributes, check_id, check_name, copied, decode_trusted
from tidelog_server._action import Action, References
from tidelog_server._application import Application
from tidelog_server._errors import ChangedMeanwhile, OperationRefused
from tidelog_server._indexes import index_writes
from tidelog_server._overlay import Overlay
from tidelog_server._principal import SYSTEM_USER, Principal
from tidelog_server._records import NO_REPLICA, Writes
from tidelog_server._refusal import Refused, Waits
from tidelog_server._store import Reader, Store


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
    One tenant's data. Made by `Server.tenant`; safe to use from any thread.

    Args:
        application: The rules.
        store: Where the data are.
        name: The tenant.
        principal: On whose behalf, with whose rights. None: the system, which may do
            everything; hooks and the schema bind it too.
        clock: Returns the time in microseconds since 1970.
    """

    def __init__(
        self, application: Application, store: Store, name: str, principal: Principal | None, clock: Callable[[], int]
    ) -> None:
        self.name = name
        self._data = _Data(application, store, name, principal, clock)

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002 - the glossary's word
        """Return an object's attributes, as far as the principal may read them, or None if there is none."""
        found = self._data.found(entity, id)
        return None if found is None else found.attributes

    def query(self, entity: str, where: Where = None) -> Iterator[Found]:
        """
        Iterate over the entity's objects that match, in the order of their ids.

        Each page is read in a transaction of its own, so that a slow reader holds nothing.

        Raises:
            InvalidConstraint: *where* makes no sense, or names what the principal may not read.
        """
        check_name(entity, "an entity name")
        return self._data.objects(entity, constraint_of(where))

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

    def transaction(self) -> TenantTransaction:
        """
        Open a transaction for a `with` or `async with` block: all its changes are applied at the end, or none.

        The plain form waits in the thread that ends the block, the other one lets the
        event loop go on.
        """
        return TenantTransaction(self._data)


class _Data:
    """What a tenant and its transactions work with."""

    def __init__(
        self, application: Application, store: Store, name: str, principal: Principal | None, clock: Callable[[], int]
    ) -> None:
        self.schema = application.schema
        self._name = name
        self._application = application
        self._store = store
        self._principal = principal or Principal(SYSTEM_USER, name)
        self._rights = application.rights(principal) if principal is not None and application.access_rules else None
        self._clock = clock

    def found(self, entity: str, id_: str) -> Found | None:
        check_name(entity, "an entity name")
        check_id(id_)
        key = (entity, id_)
        with self._store.read(self._name) as reader:
            state = reader.objects((key,)).get(key)
        if state is None or state.deleted:
            return None
        readable = self._readable(entity, decode_trusted(state.attributes))
        return None if readable is None else Found(id_, state.version, readable)

    def objects(self, entity: str, where: Constraint | None) -> Iterator[Found]:
        if where is not None:
            self.schema.check_constraint(entity, where)
            self._check_readable(entity, where.attributes())
            where = where.bind(self._principal.claims_and_identity())
        return (found for found in self._all(entity) if where is None or where.matches(found.attributes))

    def submit(self, operations: Sequence[Operation], seen: Mapping[ObjectKey, int]) -> Future[int]:
        """Apply operations in one transaction, if the objects *seen* have their versions still."""
        return self._store.submit(self._name, lambda reader: self._evaluate(reader, operations, seen))

    def _all(self, entity: str) -> Iterator[Found]:
        after = ""
        more = True
        while more:
            with self._store.read(self._name) as reader:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
            for (_entity, after), state in page:
                if not state.deleted:
                    readable = self._readable(entity, decode_trusted(state.attributes))
                    if readable is not None:
                        yield Found(after, state.version, readable)

    def _readable(self, entity: str, attributes: Attributes) -> Attributes | None:
        return attributes if self._rights is None else self._rights.entity(entity).readable(attributes)

    def _check_readable(self, entity: str, names: frozenset[str]) -> None:
        readable = None if self._rights is None else self._rights.entity(entity).readable_names()
        if readable is not None and names - readable:
            raise InvalidConstraint(
                f"the constraint names what may not be read of {entity}: {min(names - readable)!r}"
            )

    def _evaluate(
        self, reader: Reader, operations: Sequence[Operation], seen: Mapping[ObjectKey, int]
    ) -> tuple[Writes, int]:
        overlay = Overlay(reader)
        overlay.prefetch([*seen, *(operation.key for operation in operations)])
        for key, version in seen.items():
            state = overlay.state(key)
            if (0 if state is None or state.deleted else state.version) != version:
                raise ChangedMeanwhile(f"{key[0]} {key[1]!r} was changed while the transaction was open")
        action = Action(
            self._application,
            overlay,
            replica=NO_REPLICA,
            principal=self._principal,
            rights=self._rights,
            time_us=self._clock(),
            references=References(),
        )
        position = 0
        try:
            for position, operation in enumerate(operations):
                _apply(action, operation, position)
            action.end_unit()
        except Refused as refusal:
            position = refusal.position or position
            raise _error(operations[position], refusal.reason, refusal.message, refusal.code) from refusal
        except Waits as wait:
            reason = FailureReason.DANGLING_REFERENCE
            raise _error(operations[position], reason, wait.message, "") from wait
        indexed = self._application.indexed_entities
        writes = Writes(
            objects=overlay.written_objects(),
            changes=overlay.changes,
            replica=None,
            settled=[],
            failures=[],
            version=overlay.version,
            index_entries=index_writes(self._application.schema, overlay.written(indexed), overlay.index),
        )
        return writes, overlay.version


class TenantTransaction:
    """
    Changes of a service that are applied together when the block ends, or not at all if it raises.

    What `get` returned is checked at the end: if somebody has changed it meanwhile
    `ChangedMeanwhile` is raised and nothing is applied. Repeat the block then.

    The end of the block raises OperationRefused if a rule or a hook refuses,
    ObjectExists and ObjectNotFound where an object is there or is not.
    """

    def __init__(self, data: _Data) -> None:
        self._data = data
        self._operations: list[Operation] = []
        self._seen: dict[ObjectKey, int] = {}
        self._views: dict[ObjectKey, Attributes | None] = {}
        self._ended = False
        self.version = 0

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002
        """Return an object's attributes as this transaction would leave them, or None if there is none."""
        key = (entity, id)
        if key not in self._views:
            found = self._data.found(entity, id)
            self._seen[key] = 0 if found is None else found.version
            self._views[key] = None if found is None else found.attributes
        return copied(self._views[key])  # type: ignore[no-any-return]

    def create(self, entity: str, attributes: Mapping[str, Any], id: str | None = None) -> str:  # noqa: A002
        """
        Create an object and return its id, a new UUIDv7 unless *id* is given.

        Raises:
            InvalidValue: A name, the id or a value that cannot be stored.
        """
        id_ = str(uuid_utils.uuid7()) if id is None else id
        patch = Patch(copied(dict(attributes)))
        self._add(OperationKind.CREATE, entity, id_, patch)
        self._views[entity, id_] = patch.set
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
            InvalidValue: A name or value that cannot be stored, or an intent that does not fit what `get` returned.
        """
        patch = Patch(
            copied(dict(attributes or {})),
            tuple(unset),
            dict(increment or {}),
            {name: list(members) for name, members in (add or {}).items()},
            {name: list(members) for name, members in (remove or {}).items()},
        )
        key = (entity, id)
        view = self._views.get(key)
        after = patch.apply(view) if view is not None else None
        self._add(OperationKind.UPDATE, entity, id, patch)
        if after is not None:
            self._views[key] = after

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """Delete an object. Raises InvalidValue: a name or an id that cannot be."""
        self._add(OperationKind.DELETE, entity, id, Patch())
        self._views[entity, id] = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        future = self._end(kind)
        if future is not None:
            self.version = future.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        future = self._end(kind)
        if future is not None:
            self.version = await asyncio.wrap_future(future)

    def _end(self, kind: type[BaseException] | None) -> Future[int] | None:
        self._ended = True
        if kind is not None or not self._operations:
            return None
        return self._data.submit(self._operations, self._seen)

    def _add(self, kind: OperationKind, entity: str, id_: str, patch: Patch) -> None:
        if self._ended:
            raise ResourceClosed("the transaction has ended: open another one")
        check_name(entity, "an entity name")
        check_id(id_)
        patch.check()
        encoded = b"" if kind is OperationKind.DELETE else patch.encode()
        version = self._data.schema.version
        self._operations.append(Operation(0, 0, kind, entity, id_, encoded, 0, None, version, 0))


def _apply(action: Action, operation: Operation, position: int) -> None:
    key = operation.key
    state = action.overlay.state(key)
    # The service looks at the present: there is nothing that it could have overlooked.
    action.begin(operation._replace(base_version=state.version if state is not None else 0), position)
    if operation.kind is OperationKind.CREATE:
        action.create(key, operation.decoded_patch().set, None)
    elif operation.kind is OperationKind.UPDATE:
        action.update(key, operation.decoded_patch(), operation.patch)
    else:
        action.delete(key)


def _error(operation: Operation, reason: FailureReason, message: str, code: str) -> Exception:
    entity, id_ = operation.key
    if reason is FailureReason.OBJECT_GONE:
        return ObjectNotFound(entity=entity, id=id_)
    if reason is FailureReason.ALREADY_EXISTS:
        return ObjectExists(entity=entity, id=id_)
    return OperationRefused(message, entity=entity, id=id_, reason=reason, code=code)
