"""Links: which objects pending operations create, and to which ones they refer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tidelog._operation import OperationKind, decode_operation
from tidelog._schema import Schema
from tidelog.v1 import schema_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from tidelog._keys import ObjectKey
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
    """Finds links, by the schema that the server has."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._schema = Schema.from_message(schema_pb2.Schema.FromString(storage.meta("schema")))
        self._is_any = any(self._schema.references(entity) for entity in self._schema.entities)

    def of(self, unit: Sequence[PendingOperation]) -> Links:
        """Return the links of a commit group, or a single operation. What it creates itself it does not refer to."""
        if not self._is_any:
            return NO_LINKS
        created: set[ObjectKey] = set()
        referenced: set[ObjectKey] = set()
        with self._storage.environment.read() as transaction:
            for one in unit:
                data = self._storage.log.get(transaction, one.seq)
                if data is None:
                    continue
                operation = decode_operation(data)
                if operation.kind is OperationKind.CREATE:
                    created.add(one.key)
                patch = operation.decoded_patch()
                referenced.update(key for _, key in self._schema.referenced(one.key[0], {**patch.set, **patch.add}))
        return Links(created, referenced - created)
