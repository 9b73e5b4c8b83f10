"""
Renames: what operations of older schema versions say, in the names of today.

An operation names its schema version, so it is known which renames its author had
not heard of. An author without a schema (version 0) may use any name that ever was:
then a name that is declared today means itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from tidelog._entity import Entity, Rename
from tidelog._errors import InvalidSchema, ValidationFailed
from tidelog._patch import Patch


class Renames:
    """
    The renames of a schema.

    Args:
        renames: As declared.
        entities: The entities of the schema, by name.
        version: The version of the schema.
        open: Whether names that are not declared are accepted.

    Raises:
        InvalidSchema: A rename that leads nowhere, that contradicts another one, or
            that gives up a name which is still in use.
    """

    def __init__(
        self,
        renames: Iterable[Rename],
        entities: Mapping[str, Entity],
        *,
        version: int,
        open: bool,  # noqa: A002 - the word of the schema
    ) -> None:
        ordered = sorted(renames, key=attrgetter("version"))
        _check_each_version(ordered)
        self._entities = entities
        self._version = version
        self._open = open
        self._newest = ordered[-1].version if ordered else 0
        self._of_entities = [rename for rename in ordered if rename.attribute is None]
        # By the name that the entity has today.
        self._of_attributes: dict[str, list[Rename]] = {}
        for rename in ordered:
            if rename.attribute is not None:
                entity = self._entity_of_today(rename.entity, rename.version)
                self._of_attributes.setdefault(entity, []).append(rename)
        self._check_targets(ordered)

    def upcast(self, entity: str, patch: Patch, schema_version: int, id_: str) -> tuple[str, Patch]:
        """
        Return entity and patch in the names of today: the same objects if nothing changes.

        Raises:
            ValidationFailed: An attribute is written by its former and its present name.
        """
        if schema_version >= self._newest:
            return entity, patch
        today = self._entity_of_today(entity, schema_version)
        renames = self._of_attributes.get(today)
        if renames is None:
            return today, patch
        names = dict(zip(patch.written, patch.written, strict=True))
        for rename in renames:
            if self._is_news(rename, schema_version, declared=self._attributes(today)):
                for name, now in names.items():
                    if now == rename.attribute:
                        names[name] = rename.to
        if all(name == now for name, now in names.items()):
            return today, patch
        _check_distinct(today, id_, patch, names)
        return today, Patch(
            _renamed(patch.set, names),
            tuple(names[name] for name in patch.unset),
            _renamed(patch.increment, names),
            _renamed(patch.add, names),
            _renamed(patch.remove, names),
        )

    def _entity_of_today(self, name: str, schema_version: int) -> str:
        for rename in self._of_entities:
            if name == rename.entity and self._is_news(rename, schema_version, declared=self._entities):
                name = rename.to
        return name

    def _is_news(self, rename: Rename, schema_version: int, *, declared: Mapping[str, Any]) -> bool:
        """Tell whether an author with this schema version used, or may have used, the name that was given up."""
        return rename.version > schema_version and (schema_version > 0 or rename.old not in declared)

    def _attributes(self, entity: str) -> Mapping[str, Any]:
        found = self._entities.get(entity)
        return {} if found is None else found.attributes

    def _check_targets(self, ordered: list[Rename]) -> None:
        for rename in ordered:
            if rename.version > self._version:
                raise InvalidSchema(f"{rename}: the schema has version {self._version}")
            if rename.attribute is None:
                declared: Mapping[str, Any] = self._entities
                target = self._entity_of_today(rename.to, rename.version)
                what = "entity"
            else:
                entity = self._entity_of_today(rename.entity, rename.version)
                if entity not in self._entities and not self._open:
                    raise InvalidSchema(f"{rename}: the schema has no entity {entity!r}")
                declared = self._attributes(entity)
                target = rename.to
                for later in self._of_attributes[entity]:
                    if later.version > rename.version and later.attribute == target:
                        target = later.to
                what = f"attribute of {entity}"
            if target not in declared and not self._open:
                raise InvalidSchema(f"{rename}: the schema has no {what} named {target!r}")
            if rename.version == self._version and rename.old in declared:
                raise InvalidSchema(f"{rename}: the schema still has an {what} named {rename.old!r}")


def _check_each_version(ordered: list[Rename]) -> None:
    """Check that the renames of one version can be told apart, in whatever order they are read."""
    given_up: set[tuple[int, str | None, str]] = set()
    taken: set[tuple[int, str | None, str]] = set()
    for rename in ordered:
        scope = rename.version, None if rename.attribute is None else rename.entity
        if (*scope, rename.old) in given_up:
            raise InvalidSchema(f"{rename}: that name is given up twice in this version")
        if (*scope, rename.to) in taken:
            raise InvalidSchema(f"{rename}: another name became that one in this version")
        given_up.add((*scope, rename.old))
        taken.add((*scope, rename.to))
    for rename in ordered:
        scope = rename.version, None if rename.attribute is None else rename.entity
        if (*scope, rename.old) in taken:
            raise InvalidSchema(f"{rename}: {rename.old!r} is the new name of another rename of this version")


def _check_distinct(entity: str, id_: str, patch: Patch, names: Mapping[str, str]) -> None:
    former: dict[str, str] = {}
    for name, now in names.items():
        if now in former:
            old = name if name != now else former[now]
            values = {**patch.set, **patch.increment, **patch.add, **patch.remove}
            raise ValidationFailed(
                entity=entity,
                id=id_,
                attribute=now,
                value=values.get(now, values.get(old)),
                rule=f"is written by its former name {old!r} too",
                is_mismatch=True,
            )
        former[now] = name


def _renamed(values: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in values.items()}
