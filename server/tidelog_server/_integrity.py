"""
Integrity: who has a unique value, and who refers to an object, as a batch has left it so far.

The store's indexes tell how things stood before the batch; what the batch writes is
remembered here. Both only name candidates: what counts is what an object holds now,
so nothing has to be taken back when a part of the batch is undone.
"""

from __future__ import annotations

from collections import defaultdict

from tidelog._keys import ObjectKey
from tidelog._schema import Schema
from tidelog._values import Attributes
from tidelog_server._indexes import referrer_of, referrers_prefix, unique_key
from tidelog_server._overlay import Overlay


class Integrity:
    """Answers for one batch."""

    def __init__(self, schema: Schema, overlay: Overlay) -> None:
        self._schema = schema
        self._overlay = overlay
        self._owners: defaultdict[bytes, set[str]] = defaultdict(set)
        self._referrers: defaultdict[ObjectKey, set[tuple[ObjectKey, str]]] = defaultdict(set)

    def note(self, key: ObjectKey, before: Attributes | None, attributes: Attributes) -> bool:
        """Take note of what an object holds now; tell whether it has a unique value that it had not *before*."""
        entity = self._schema.entity(key[0])
        if entity is None:
            return False
        is_new = False
        for names in entity.unique:
            found = unique_key(key[0], names, attributes)
            if found is not None:
                self._owners[found].add(key[1])
                is_new = is_new or before is None or unique_key(key[0], names, before) != found
        for attribute, target in self._schema.referenced(key[0], attributes):
            self._referrers[target].add((key, attribute))
        return is_new

    def taken(self, key: ObjectKey) -> tuple[str, ...] | None:
        """Return attributes whose values another object has too although they are unique, or None."""
        entity = self._schema.entity(key[0])
        if entity is None or not entity.unique:
            return None
        attributes = self._overlay.attributes(key)
        for names in entity.unique:
            wanted = unique_key(key[0], names, attributes)
            if wanted is None:
                continue
            candidates = set(self._owners.get(wanted, ()))
            stored = self._overlay.index(wanted)
            if stored is not None:
                candidates.add(stored.decode())
            candidates.discard(key[1])
            for id_ in candidates:
                other = (key[0], id_)
                if (
                    self._overlay.exists(other)
                    and unique_key(key[0], names, self._overlay.attributes(other)) == wanted
                ):
                    return names
        return None

    def referrers(self, target: ObjectKey) -> list[tuple[ObjectKey, str]]:
        """Return who refers to an object, each with the attribute, in a stable order."""
        candidates = set(self._referrers.get(target, ()))
        for entry in self._overlay.index_entries(referrers_prefix(target)):
            candidates.add(referrer_of(entry, target))
        return sorted(
            (key, attribute)
            for key, attribute in candidates
            if self._overlay.exists(key)
            and (attribute, target) in self._schema.referenced(key[0], self._overlay.attributes(key))
        )
