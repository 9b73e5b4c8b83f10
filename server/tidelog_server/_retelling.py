"""
Retelling: what was done to an object before a migration, as if it had been done after it.

Who compares the past with an operation of today needs it in the operation's terms: by
the present names of attributes, and with a value that the migration replaced as what
it became. What else an old value would have become nobody can tell: it stays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

from tidelog._operation import OperationKind
from tidelog._patch import Patch, decode_patch
from tidelog._values import Attributes, decode_trusted, encode, equal
from tidelog_server._records import Change


class Retelling(NamedTuple):
    """
    Tells older changes of one object as one migration would have them.

    Attributes:
        new_names: The names that it gave to attributes, by their former ones.
        before: Those attributes that it replaced or removed, by their former names.
        after: Those that it set.
        removed: Those that it removed for good.
    """

    new_names: Mapping[str, str]
    before: Attributes
    after: Attributes
    removed: Collection[str]

    @classmethod
    def after_migration(cls, change: Change, former: Change) -> Self:
        """
        Return what a migration's change is about.

        Args:
            change: The change.
            former: The deletion under the object's former key; the same change if it kept its key.
        """
        patch = Patch() if change.kind is OperationKind.DELETE else decode_patch(change.patch)
        before: Attributes = {}
        removed = patch.unset
        if change is not former:
            before = decode_trusted(former.before)
            removed = tuple(name for name in before if name not in patch.set)
        elif change.kind is OperationKind.UPDATE:
            before, _ = decode_trusted(change.before)
        new_names = change.new_names or {}
        return cls(new_names, before, patch.set, {name for name in removed if name not in new_names})

    def told(self, change: Change) -> Change:
        """Return an older change as it would be had it come later."""
        if change.kind is OperationKind.DELETE:
            return change._replace(before=encode(self._values(decode_trusted(change.before))))
        patch = decode_patch(change.patch)
        if change.kind is OperationKind.CREATE:
            return change._replace(patch=Patch({**self._added(), **self._values(patch.set)}).encode())
        retold = Patch(
            self._values(patch.set),
            tuple(self._named(dict.fromkeys(patch.unset))),
            self._named(patch.increment),
            self._named(patch.add),
            self._named(patch.remove),
        )
        present, absent = decode_trusted(change.before)
        images = [self._values(present), list(self._named(dict.fromkeys(absent)))]
        return change._replace(patch=retold.encode(), before=encode(images))

    def _named(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is said of attributes by their present names; without those that are removed."""
        return {self.new_names.get(name, name): what for name, what in said.items() if name not in self.removed}

    def _values(self, values: Attributes) -> Attributes:
        """Return values by their present names, and what the migration found as what it became."""
        return self._named({name: self._became(name, value) for name, value in values.items()})

    def _became(self, name: str, value: Any) -> Any:
        was_found = name in self.before and equal(self.before[name], value)
        return self.after.get(self.new_names.get(name, name), value) if was_found else value

    def _added(self) -> Attributes:
        """Return what the migration set that comes of no former attribute."""
        former = {*self.before, *self.new_names.values()}
        return {name: value for name, value in self.after.items() if name not in former}
