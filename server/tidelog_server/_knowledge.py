"""
Knowledge: what the author of operations may know of the objects that a batch meets.

To who may not read it an object is as if it were not there, in every answer. What
decides about operations and puts it into words asks here first.
"""

from __future__ import annotations

from collections.abc import Collection

from tidelog._keys import ObjectKey
from tidelog._values import Attributes
from tidelog_server._access import Rights
from tidelog_server._history import attributes_before
from tidelog_server._overlay import Overlay


class Knowledge:
    """
    What an author may know.

    Args:
        overlay: The objects.
        rights: What the author may read. None: everything.
    """

    def __init__(self, overlay: Overlay, rights: Rights | None) -> None:
        self._overlay = overlay
        self._rights = rights

    def sees(self, key: ObjectKey) -> bool:
        """Tell whether an object is there as far as the author may know."""
        if not self._overlay.exists(key):
            return False
        if self._rights is None:
            return True
        rights = self._rights.entity(key[0])
        return rights.reads_everything or rights.sees(self._overlay.attributes(key))

    def knows(self, key: ObjectKey) -> bool:
        """Tell whether an object is, or was, there as far as the author may know."""
        state = self._overlay.state(key)
        if state is None or not state.deleted or self._rights is None:
            return state is not None and (self._rights is None or self.sees(key))
        rights = self._rights.entity(key[0])
        if rights.reads_everything:
            return True
        deletion = self._overlay.change(state.version)
        before = attributes_before(deletion, None) if deletion is not None else None
        return before is not None and rights.sees(before)

    def is_anything_hidden(self, entity: str) -> bool:
        """Tell whether there may be objects of an entity that the author may not know of."""
        return self._rights is not None and not self._rights.entity(entity).reads_everything

    def reads(self, key: ObjectKey, attributes: Attributes, names: Collection[str]) -> bool:
        """Tell whether the author may know what these attributes of an object are."""
        if self._rights is None:
            return True
        readable = self._rights.entity(key[0]).readable(attributes)
        return readable is attributes or (
            readable is not None and all(name in readable or name not in attributes for name in names)
        )
