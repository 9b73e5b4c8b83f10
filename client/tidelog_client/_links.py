"""Links: which objects pending operations create and delete, and to which ones they refer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._keys import pack_object_key
from tidelog._operation import OperationKind, decode_operation
from tidelog._schema import Schema
from tidelog._values import decode_trusted
from tidelog.v1 import schema_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from tidelog._environment import LmdbTransaction
    from tidelog._keys import ObjectKey
    from tidelog._operation import Operation
    from tidelog_client._storage import PendingOperation, Storage


class Links(NamedTuple):
    """
    What the operations of a commit group, or a single one, have to do with other objects.

    Attributes:
        created: The objects that they create.
        referenced: The objects to which they refer: these must be there before.
    """

    created: AbstractSet[ObjectKey]
    referenced: AbstractSet[ObjectKey]


NO_LINKS: Final = Links(frozenset(), frozenset())


class LinkReader:
    """
    Finds links, by the schema that the server has.

    Attributes:
        is_any: Whether objects refer to objects.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._schema = Schema.from_message(schema_pb2.Schema.FromString(storage.meta("schema")))
        self.is_any = any(self._schema.references(entity) for entity in self._schema.entities)

    def of(self, unit: Sequence[PendingOperation]) -> Links:
        """Return the links of a commit group, or a single operation. What it creates itself it does not refer to."""
        if not self.is_any:
            return NO_LINKS
        created: set[ObjectKey] = set()
        referenced: set[ObjectKey] = set()
        with self._storage.environment.read() as transaction:
            for operation in self._operations(transaction, unit):
                if operation.kind is OperationKind.CREATE:
                    created.add(operation.key)
                referenced.update(self._named(operation))
        return Links(created, referenced - created)

    def bound(self, unit: Sequence[PendingOperation]) -> set[ObjectKey]:
        """Return the objects to which a unit refers, or what it changes did before: none of them must go before it."""
        found: set[ObjectKey] = set()
        with self._storage.environment.read() as transaction:
            for operation in self._operations(transaction, unit):
                found.update(self._named(operation))
                base = self._storage.view.base(transaction, pack_object_key(*operation.key))
                if base is not None:
                    attributes = decode_trusted(base.attributes)
                    found.update(key for _, key in self._schema.referenced(operation.entity, attributes))
        return found

    def deletes_any(self, unit: Sequence[PendingOperation], keys: AbstractSet[ObjectKey]) -> bool:
        """Tell whether a unit deletes one of some objects."""
        concerned = [one for one in unit if one.key in keys]
        if not concerned:
            return False
        with self._storage.environment.read() as transaction:
            return any(one.kind is OperationKind.DELETE for one in self._operations(transaction, concerned))

    def _operations(self, transaction: LmdbTransaction, unit: Sequence[PendingOperation]) -> Iterator[Operation]:
        for one in unit:
            data = self._storage.log.get(transaction, one.seq)
            if data is not None:
                yield decode_operation(data)

    def _named(self, operation: Operation) -> Iterator[ObjectKey]:
        patch = operation.decoded_patch()
        return (key for _, key in self._schema.referenced(operation.entity, {**patch.set, **patch.add}))
