"""Objects: live handles on what a replica holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tidelog._errors import ObjectNotFound, ResourceClosed
from tidelog._file_reference import FileReference
from tidelog._keys import pack_object_key
from tidelog._operation import OperationKind
from tidelog._patch import Patch, check_attribute_name
from tidelog._values import Attributes, check, copied, decode_trusted
from tidelog_client._commit import Committer, checked_intent
from tidelog_client._files import FileState

if TYPE_CHECKING:
    from tidelog_client._storage import Storage


class Object:
    """
    A live handle on one object of a replica.

    Item access reads and writes attributes; one that is not there reads as None.
    Reading shows the object as it is now, whoever changed it: this program, another
    process, a synchronization. Writing changes the handle only, until `commit`;
    such uncommitted changes survive a synchronization, and stand in front of what
    it brings. A replica with a schema refuses a value that does not fit when it is set,
    and what an object lacks at the commit.

    When the object is removed the handle becomes empty: `exists` is false, and
    reading or committing raises `ObjectNotFound`, which carries the unsaved changes.

    A handle belongs to one thread at a time.

    Attributes:
        entity: Type of the object.
        id: Its id.
    """

    __slots__ = (
        "_attributes", "_base_version", "_committer", "_new", "_set", "_storage", "_transaction_id", "_unset",
        "_version", "entity", "id",
    )  # fmt: skip

    def __init__(
        self,
        storage: Storage,
        committer: Committer,
        entity: str,
        id: str,  # noqa: A002 - the glossary's word
        *,
        new: Attributes | None = None,
    ) -> None:
        self.entity = entity
        self.id = id
        self._storage = storage
        self._committer = committer
        self._new = new is not None
        self._set: Attributes = copied(new or {})
        self._unset: set[str] = set()
        self._base_version: int | None = None
        self._transaction_id = -1
        self._attributes: Attributes | None = None
        self._version = 0

    @property
    def exists(self) -> bool:
        """Whether the replica has the object: false before the first commit and after a removal."""
        return not self._new and self._current() is not None

    @property
    def uncommitted(self) -> dict[str, Any]:
        """The changes that `commit` would write, by attribute; an attribute to be removed is None."""
        return {**copied(self._set), **dict.fromkeys(self._unset)}

    @property
    def is_new(self) -> bool:
        """Whether the object was never committed."""
        return self._new

    def __getitem__(self, attribute: str) -> Any:
        return copied(self._merged().get(attribute))

    def __contains__(self, attribute: object) -> bool:
        return attribute in self._merged()

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged())

    def __setitem__(self, attribute: str, value: Any) -> None:
        check_attribute_name(attribute)
        check(value, f"attribute {attribute!r}")
        if self._committer.schema is not None:
            self._committer.schema.check_patch(self.entity, Patch({attribute: value}), self.id)
        self._begin_change()
        self._unset.discard(attribute)
        self._set[attribute] = copied(value)

    def __delitem__(self, attribute: str) -> None:
        check_attribute_name(attribute)
        self._begin_change()
        self._set.pop(attribute, None)
        if not self._new:
            self._unset.add(attribute)

    def __repr__(self) -> str:
        if self._new:
            return f"<new {self.entity} {self.id!r} {self._set!r}>"
        try:
            attributes = self._current()
        except ResourceClosed:
            return f"<{self.entity} {self.id!r} closed>"
        return f"<{self.entity} {self.id!r} {'removed' if attributes is None else repr(attributes)}>"

    def to_dict(self) -> dict[str, Any]:
        """
        Return the attributes, with uncommitted changes, as a dictionary of its own.

        Raises:
            ObjectNotFound: The object was removed.
        """
        return copied(self._merged())  # type: ignore[no-any-return]

    def commit(self) -> None:
        """
        Append the uncommitted changes to the log as one operation. Does nothing if there are none.

        Raises:
            ObjectNotFound: The object was removed; the error carries the changes.
            ObjectExists: The object is new, and another one took its id.
            ValidationFailed: It would not fit the schema; the handle keeps the changes.
            InvalidValue, DiskFull: As for `Replica.update`.
        """
        if self._new:
            intent = checked_intent(
                OperationKind.CREATE, self.entity, self.id, Patch(dict(self._set)), schema=self._committer.schema
            )
        elif self._set or self._unset:
            intent = checked_intent(
                OperationKind.UPDATE,
                self.entity,
                self.id,
                Patch(dict(self._set), tuple(sorted(self._unset))),
                schema=self._committer.schema,
                base_version=self._base_version,
            )
        else:
            if self._current() is None:
                raise ObjectNotFound(entity=self.entity, id=self.id)
            return
        try:
            self._committer.commit([intent], atomic=False)
        except ObjectNotFound:
            raise ObjectNotFound(entity=self.entity, id=self.id, unsaved=self.uncommitted) from None
        self._new = False
        self._forget_changes()

    def file_state(self, attribute: str) -> FileState | None:
        """
        Tell how the content of a file stands; None if the attribute is no file.

        Raises:
            ObjectNotFound: The object was removed.
        """
        reference = FileReference.of(self._merged().get(attribute))
        return None if reference is None else self._storage.files.state(reference)

    def rollback(self) -> None:
        """Drop the uncommitted changes. A new object becomes empty."""
        self._new = False
        self._forget_changes()

    def _merged(self) -> Attributes:
        """Return the attributes with uncommitted changes; its lists and maps are the handle's own."""
        if self._new:
            return self._set
        current = self._current()
        if current is None:
            raise ObjectNotFound(entity=self.entity, id=self.id, unsaved=self.uncommitted)
        if not self._set and not self._unset:
            return current
        merged = {**current, **self._set}
        for attribute in self._unset:
            merged.pop(attribute, None)
        return merged

    def _begin_change(self) -> None:
        """Note what the author looks at when the first change is made."""
        if self._new or self._set or self._unset:
            return
        if self._current() is None:
            raise ObjectNotFound(entity=self.entity, id=self.id)
        self._base_version = self._version

    def _forget_changes(self) -> None:
        self._set = {}
        self._unset = set()
        self._base_version = None

    def _current(self) -> Attributes | None:
        """Return the committed attributes as they are now, None if the object is not there."""
        environment = self._storage.environment
        transaction_id = environment.last_transaction_id
        if transaction_id != self._transaction_id:
            with environment.read() as transaction:
                record = self._storage.view.get(transaction, pack_object_key(self.entity, self.id))
            self._attributes = None if record is None else decode_trusted(record.attributes)
            self._version = 0 if record is None else record.version
            self._transaction_id = transaction_id
        return self._attributes
