"""Entities: what a schema says of one type of object, and of names that were given up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import msgspec

from tidelog._attributes import (
    AnyValue,
    Attribute,
    AttributeType,
    File,
    Float,
    List,
    Map,
    OnDelete,
    Reference,
)
from tidelog._errors import InvalidSchema, InvalidValue, quoted
from tidelog._limits import ENTITY_ATTRIBUTES_MAX
from tidelog._patch import check_attribute_name
from tidelog._values import check_name

_T = TypeVar("_T")


class EntityReference(NamedTuple):
    """
    A reference, with the attribute that holds it.

    Attributes:
        attribute: Name of the attribute.
        target: Entity of the object that it names.
        many: Whether it is a list of ids instead of one id.
        on_delete: What becomes of the object when one that it names is deleted.
        required: Whether an object must have a value.
    """

    attribute: str
    target: str
    many: bool
    on_delete: OnDelete
    required: bool


class Entity:
    """
    One type of object. It does not change once it is made.

    Args:
        name: Its name.
        attributes: Its attributes, by name.
        unique: Sets of attributes whose values together no two objects share; the name
            of an attribute alone stands for a set of one.
        indexes: Attributes by which objects are found quickly.

    Attributes:
        references: Those of its attributes that are references.

    Raises:
        InvalidSchema: A name that nothing can have, or a set or index of an attribute
            that is not declared or whose values cannot be looked up.
    """

    __slots__ = ("attributes", "indexes", "name", "references", "unique")

    name: str
    attributes: Mapping[str, Attribute]
    unique: tuple[tuple[str, ...], ...]
    indexes: tuple[str, ...]
    references: tuple[EntityReference, ...]

    def __init__(
        self,
        name: str,
        attributes: Mapping[str, Attribute],
        *,
        unique: Iterable[str | Iterable[str]] = (),
        indexes: Iterable[str] = (),
    ) -> None:
        if not isinstance(attributes, Mapping):
            raise InvalidSchema(f"{name}: attributes are declared by name, as in a dict, got {quoted(attributes)}")
        try:
            check_name(name, "an entity name")
            for attribute in attributes:
                check_attribute_name(attribute)
        except InvalidValue as error:
            raise InvalidSchema(str(error)) from error
        if len(attributes) > ENTITY_ATTRIBUTES_MAX:
            raise InvalidSchema(f"{name} has {len(attributes)} attributes: the limit is {ENTITY_ATTRIBUTES_MAX}")
        for attribute, declared in attributes.items():
            if not isinstance(declared, AttributeType):
                raise InvalidSchema(
                    f"{name}: attribute {attribute!r} is {quoted(declared)}, but must be declared as String(), "
                    "Integer() and the like"
                )
        self.name = name
        self.attributes = MappingProxyType(dict(attributes))
        self.unique = tuple(
            (one,) if isinstance(one, str) else _listed(f"{name}: a unique set", one)
            for one in _listed(f"{name}: the unique sets", unique)
        )
        self.indexes = _listed(f"{name}: the indexes", indexes)
        self.references = tuple(
            EntityReference(attribute, one.target, one.many, one.on_delete, one.required)
            for attribute, one in self.attributes.items()
            if isinstance(one, Reference)
        )
        for together in self.unique:
            if not together:
                raise InvalidSchema(f"{name}: a unique set without attributes")
            self._check_names("a unique set", together, not_looked_up=(Float, *_NOT_LOOKED_UP))
        self._check_names("an index", self.indexes, not_looked_up=_NOT_LOOKED_UP)
        if len(set(map(frozenset, self.unique))) < len(self.unique):
            raise InvalidSchema(f"{name}: the same unique set stands twice")

    def __repr__(self) -> str:
        return f"<Entity {self.name}: {', '.join(self.attributes)}>"

    def _check_names(self, what: str, names: tuple[Any, ...], *, not_looked_up: tuple[type[Attribute], ...]) -> None:
        for name in names:
            declared = self.attributes.get(name) if isinstance(name, str) else None
            if declared is None:
                raise InvalidSchema(f"{self.name}: {what} names {quoted(name)}, which is none of the attributes")
            if isinstance(declared, not_looked_up) or (isinstance(declared, Reference) and declared.many):
                raise InvalidSchema(
                    f"{self.name}: {what} names {name!r}, but nothing is looked up by a value that is "
                    f"{declared.value_check().phrase}"
                )
        if len(set(names)) < len(names):
            raise InvalidSchema(f"{self.name}: {what} names an attribute twice: {', '.join(names)}")


class Rename(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """
    A name that was given up for another one.

    Operations of older schema versions that use it are read as if they used the new one.

    Attributes:
        version: The version of the schema that first has the new name.
        entity: The entity: by the name that it has in that version, or, if it is the
            entity that was renamed, by the name that it had before.
        attribute: The attribute's name before. None: the entity itself was renamed.
        to: The new name.

    Raises:
        InvalidSchema: A name that nothing can have.
    """

    version: int
    entity: str
    attribute: str | None = None
    to: str

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version < 1:
            raise InvalidSchema(f"{self}: versions of a schema start at 1, got {quoted(self.version)}")
        try:
            check_name(self.entity, "an entity name")
            if self.attribute is None:
                check_name(self.to, "an entity name")
            else:
                check_attribute_name(self.attribute)
                check_attribute_name(self.to)
        except InvalidValue as error:
            raise InvalidSchema(f"{self}: {error}") from error
        if self.to == self.old:
            raise InvalidSchema(f"{self}: it had that name before")

    @property
    def old(self) -> str:
        """The name that was given up."""
        return self.entity if self.attribute is None else self.attribute

    def __str__(self) -> str:
        what = self.entity if self.attribute is None else f"{self.entity}.{self.attribute}"
        return f"the rename of {what} to {self.to} in version {self.version}"


def _listed(what: str, members: Iterable[_T]) -> tuple[_T, ...]:
    """Return members as a tuple. A string is iterable too, but never meant as one. Raises InvalidSchema."""
    if isinstance(members, str) or not isinstance(members, Iterable):
        raise InvalidSchema(f"{what} must be a list, got {quoted(members)}")
    return tuple(members)


# Types whose values are not looked up as a whole.
_NOT_LOOKED_UP = (AnyValue, List, Map, File)
