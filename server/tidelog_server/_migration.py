"""
Migration: what stored objects become under a new schema. No I/O.

First names that were given up become the present ones, then the application's
migrations run, those of each version that the store has not seen, then required
attributes without a value get their defaults. Only what does not fit is changed: what
was merely added is fine without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from tidelog._errors import InvalidValue, LimitExceeded, ValidationFailed
from tidelog._keys import ObjectKey
from tidelog._limits import OBJECT_BYTES_MAX
from tidelog._patch import Patch, check_attributes
from tidelog._values import Attributes, copied, decode_trusted, encode
from tidelog_server._application import Application
from tidelog_server._records import ObjectState

# What an object becomes; None: it is deleted, or was before.
Outcome = tuple[ObjectKey, Attributes] | None


class Migration:
    """
    What the objects of one tenant become.

    Args:
        application: The schema and its migrations.
        since: Version of the schema that the store was served with. 0: it had none.
        entities: The entities that have objects.
        done_after: Objects above this version are as they should be: a migration that
            was broken off wrote them. None: everything stays as it is.
    """

    def __init__(
        self, application: Application, *, since: int, entities: Collection[str], done_after: int | None
    ) -> None:
        self._application = application
        self._schema = application.schema
        self._since = since
        self._done_after = done_after
        self._new_names = {entity: self._names_of(entity) for entity in entities}
        self._former_names: defaultdict[str, list[str]] = defaultdict(list)
        for entity in entities if done_after is not None else ():
            today, _ = self._schema.upcast(entity, Patch(), since)
            if today != entity:
                self._former_names[today].append(entity)

    def origins(self, key: ObjectKey) -> list[ObjectKey]:
        """Return the keys of all stored objects that may become the object of this key."""
        return [key, *((entity, key[1]) for entity in self._former_names.get(key[0], ()))]

    def new_names(self, entity: str) -> Mapping[str, str]:
        """Return the present names of attributes, by their former ones, of the objects stored as this entity."""
        return self._new_names[entity]

    def check_names(self, key: ObjectKey, attributes: Attributes) -> None:
        """
        Check an object that stays as it is.

        Raises:
            ValidationFailed: It has names that the schema has given up since: they would be taken for
                others, or for nothing at all.
        """
        if self._done_after is not None:
            return
        entity, patch = self._schema.upcast(key[0], Patch(attributes), self._since, key[1])
        if entity != key[0]:
            raise ValidationFailed(entity=key[0], id=key[1], rule=f"the schema calls this entity {entity!r} now")
        for name, now in zip(attributes, patch.set, strict=True):
            if name != now:
                raise ValidationFailed(
                    entity=entity, id=key[1], attribute=name, value=attributes[name], rule=f"is called {now!r} now"
                )

    def outcome(self, key: ObjectKey, state: ObjectState) -> Outcome:
        """
        Return what an object becomes.

        Raises:
            InvalidValue: It would be nothing that can be stored, or the application's migration failed on it.
        """
        if state.deleted:
            return None
        attributes = decode_trusted(state.attributes)
        if self._done_after is None or state.version > self._done_after:
            return key, attributes
        entity, patch = self._schema.upcast(key[0], Patch(attributes), self._since, key[1])
        migrated: Attributes | None = patch.set
        for version, function in self._application.migrations(entity, after=self._since):
            if migrated is None:
                return None
            try:
                migrated = function(copied(migrated))
                if migrated is not None:
                    _check(migrated)
            except Exception as error:
                raise InvalidValue(
                    f"{key[0]} {key[1]!r}: the migration of {entity} to version {version} failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return None if migrated is None else ((entity, key[1]), self._completed(entity, migrated))

    def _names_of(self, entity: str) -> dict[str, str]:
        found = {}
        for former in {rename.attribute for rename in self._schema.renames if rename.attribute is not None}:
            _, patch = self._schema.upcast(entity, Patch(unset=(former,)), self._since)
            if patch.unset != (former,):
                [found[former]] = patch.unset
        return found

    def _completed(self, entity: str, attributes: Attributes) -> Attributes:
        """Return attributes with the defaults of those that must have a value."""
        declared = self._schema.entity(entity)
        if declared is None:
            return attributes
        defaults = self._schema.with_defaults(entity, {})
        missing = {
            name: defaults[name]
            for name, one in declared.attributes.items()
            if one.required and attributes.get(name) is None and name in defaults
        }
        return {**attributes, **missing} if missing else attributes


def _check(attributes: Attributes) -> None:
    if type(attributes) is not dict:
        raise InvalidValue(f"expected a dict of attributes or None, got {type(attributes).__name__}")
    check_attributes(attributes)
    size_bytes = len(encode(attributes))
    if size_bytes > OBJECT_BYTES_MAX:
        raise LimitExceeded(f"an object of {size_bytes} bytes: the limit is {OBJECT_BYTES_MAX}")
