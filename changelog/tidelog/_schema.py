"""
Schema: what an application says of its entities.

Today it names the references between objects. The server refuses one that leads
nowhere and holds back what refers to an object still to come; a replica uses them
to find what a selected object needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tidelog._errors import InvalidSchema, InvalidValue
from tidelog._patch import check_attribute_name
from tidelog._values import check_name
from tidelog.v1 import schema_pb2


class Reference(NamedTuple):
    """
    An attribute that holds the id of another object, a list of ids, or null.

    Attributes:
        attribute: Name of the attribute.
        target: Entity of the object it names.
    """

    attribute: str
    target: str


class Schema:
    """
    The entities of an application and the references between them.

    Entities that are not named are accepted with whatever attributes they have.

    Args:
        references: By entity, the entity that each reference attribute names:
            `{"OrderLine": {"order": "Order"}}`.
        version: Rises with each change of the schema.

    Raises:
        InvalidSchema: A name that no entity or attribute can have.
    """

    def __init__(self, references: Mapping[str, Mapping[str, str]] | None = None, *, version: int = 1) -> None:
        if version < 1:
            raise InvalidSchema(f"a schema's version starts at 1, got {version}")
        self.version = version
        self._references: dict[str, tuple[Reference, ...]] = {}
        try:
            for entity, targets in (references or {}).items():
                check_name(entity, "an entity name")
                for attribute, target in targets.items():
                    check_attribute_name(attribute)
                    check_name(target, "an entity name")
                self._references[entity] = tuple(Reference(*pair) for pair in targets.items())
        except InvalidValue as error:
            raise InvalidSchema(str(error)) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schema):
            return NotImplemented
        return (self.version, self._references) == (other.version, other._references)

    def __hash__(self) -> int:
        return hash((self.version, tuple(sorted(self._references))))

    @property
    def has_references(self) -> bool:
        """Whether there are any references at all."""
        return bool(self._references)

    def references(self, entity: str) -> tuple[Reference, ...]:
        """Return the references of an entity."""
        return self._references.get(entity, ())

    def referenced(self, entity: str, attributes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (attribute, key of the object it names) for each reference that *attributes* set."""
        for attribute, target in self.references(entity):
            value = attributes.get(attribute)
            for id_ in value if type(value) is list else (value,):
                if type(id_) is str:
                    yield attribute, (target, id_)

    def to_message(self) -> schema_pb2.Schema:
        """Return the wire form."""
        return schema_pb2.Schema(
            version=self.version,
            entities=[
                schema_pb2.Entity(
                    name=entity,
                    references=[
                        schema_pb2.Reference(attribute=one.attribute, target=one.target) for one in references
                    ],
                )
                for entity, references in self._references.items()
            ],
        )

    @classmethod
    def from_message(cls, message: schema_pb2.Schema) -> Schema:
        """Read the wire form. Raises InvalidSchema."""
        return cls(
            {entity.name: {one.attribute: one.target for one in entity.references} for entity in message.entities},
            version=message.version or 1,
        )
