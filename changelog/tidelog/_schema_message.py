"""
The wire form of a schema's parts.

What a newer side says and this one does not know is read as the least that can be
meant: an attribute of an unknown type may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from tidelog._attributes import (
    MEMBER_TYPES,
    AnyValue,
    Attribute,
    Boolean,
    Bytes,
    DecimalNumber,
    Enumeration,
    File,
    Float,
    Integer,
    List,
    Map,
    Reference,
    String,
    Timestamp,
)
from tidelog._entity import Entity, Rename
from tidelog._errors import InvalidSchema, InvalidValue
from tidelog._values import decode, encode
from tidelog.v1 import schema_pb2

_TYPES: Final[dict[type[Attribute], schema_pb2.AttributeType.ValueType]] = {
    AnyValue: schema_pb2.ATTRIBUTE_TYPE_UNSPECIFIED,
    String: schema_pb2.ATTRIBUTE_TYPE_STRING,
    Integer: schema_pb2.ATTRIBUTE_TYPE_INTEGER,
    Float: schema_pb2.ATTRIBUTE_TYPE_FLOAT,
    DecimalNumber: schema_pb2.ATTRIBUTE_TYPE_DECIMAL,
    Boolean: schema_pb2.ATTRIBUTE_TYPE_BOOLEAN,
    Timestamp: schema_pb2.ATTRIBUTE_TYPE_TIMESTAMP,
    Bytes: schema_pb2.ATTRIBUTE_TYPE_BYTES,
    List: schema_pb2.ATTRIBUTE_TYPE_LIST,
    Map: schema_pb2.ATTRIBUTE_TYPE_MAP,
    Enumeration: schema_pb2.ATTRIBUTE_TYPE_ENUMERATION,
    Reference: schema_pb2.ATTRIBUTE_TYPE_REFERENCE,
    File: schema_pb2.ATTRIBUTE_TYPE_FILE,
}
_CLASSES: Final = {number: kind for kind, number in _TYPES.items()}
_BEHAVIOURS: Final = {
    "restrict": schema_pb2.DELETION_BEHAVIOUR_RESTRICT,
    "cascade": schema_pb2.DELETION_BEHAVIOUR_CASCADE,
    "clear": schema_pb2.DELETION_BEHAVIOUR_CLEAR,
    "keep": schema_pb2.DELETION_BEHAVIOUR_KEEP,
}
_BEHAVIOUR_NAMES: Final = {number: name for name, number in _BEHAVIOURS.items()}


def entity_to_message(entity: Entity) -> schema_pb2.Entity:
    """Return the wire form of an entity."""
    return schema_pb2.Entity(
        name=entity.name,
        # For clients of before schemas had more than references.
        references=[schema_pb2.Reference(attribute=one.attribute, target=one.target) for one in entity.references],
        attributes=[_attribute_to_message(name, declared) for name, declared in entity.attributes.items()],
        unique=[schema_pb2.AttributeSet(attributes=together) for together in entity.unique],
        indexes=entity.indexes,
    )


def entity_from_message(message: schema_pb2.Entity) -> Entity:
    """Read the wire form of an entity. Raises InvalidSchema."""
    attributes: dict[str, Attribute] = {}
    for one in message.attributes:
        if one.name in attributes:
            raise InvalidSchema(f"{message.name}: attribute {one.name!r} stands twice")
        try:
            attributes[one.name] = _attribute_from_message(one)
        except (InvalidSchema, InvalidValue) as error:
            raise InvalidSchema(f"{message.name}.{one.name}: {error}") from error
    if not attributes:
        # From a server of before schemas had more than references: an id or a list of ids, which led anywhere.
        attributes = {one.attribute: Reference(one.target, on_delete="keep") for one in message.references}
    return Entity(
        message.name,
        attributes,
        unique=[tuple(together.attributes) for together in message.unique],
        indexes=message.indexes,
    )


def rename_to_message(rename: Rename) -> schema_pb2.Rename:
    """Return the wire form of a rename."""
    return schema_pb2.Rename(
        version=rename.version, entity=rename.entity, attribute=rename.attribute or "", to=rename.to
    )


def rename_from_message(message: schema_pb2.Rename) -> Rename:
    """Read the wire form of a rename. Raises InvalidSchema."""
    return Rename(version=message.version, entity=message.entity, attribute=message.attribute or None, to=message.to)


class _Field(NamedTuple):
    """How a field of a declaration that is not None is written into a message, and how it is read from one."""

    write: Callable[[schema_pb2.Attribute, Any], None]
    read: Callable[[schema_pb2.Attribute], Any]


def _plain(name: str) -> _Field:
    return _Field(lambda message, value: setattr(message, name, value), lambda message: getattr(message, name))


def _optional(name: Literal["min_length", "max_length"]) -> _Field:
    return _Field(
        lambda message, value: setattr(message, name, value),
        lambda message: getattr(message, name) if message.HasField(name) else None,
    )


def _encoded(name: str) -> _Field:
    return _Field(
        lambda message, value: setattr(message, name, encode(value)),
        lambda message: decode(data) if (data := getattr(message, name)) else None,
    )


def _write_member(message: schema_pb2.Attribute, member: Attribute) -> None:
    message.member_type = _TYPES[type(member)]


def _read_member(message: schema_pb2.Attribute) -> Attribute | None:
    kind = _CLASSES.get(message.member_type)
    return kind() if kind in MEMBER_TYPES else None


def _write_behaviour(message: schema_pb2.Attribute, behaviour: str) -> None:
    message.on_delete = _BEHAVIOURS[behaviour]


_FIELDS: Final = {
    "required": _plain("required"),
    "default": _encoded("default_value"),
    "minimum": _encoded("minimum"),
    "maximum": _encoded("maximum"),
    "min_length": _optional("min_length"),
    "max_length": _optional("max_length"),
    "pattern": _Field(_plain("pattern").write, lambda message: message.pattern or None),
    "values": _Field(lambda message, values: message.values.extend(values), lambda message: list(message.values)),
    "member": _Field(_write_member, _read_member),
    "target": _plain("target"),
    "many": _plain("many"),
    "on_delete": _Field(_write_behaviour, lambda message: _BEHAVIOUR_NAMES.get(message.on_delete, "restrict")),
}


def _attribute_to_message(name: str, declared: Attribute) -> schema_pb2.Attribute:
    message = schema_pb2.Attribute(name=name, type=_TYPES[type(declared)])
    for field in declared.__struct_fields__:
        value = getattr(declared, field)
        if value is not None:
            _FIELDS[field].write(message, value)
    return message


def _attribute_from_message(message: schema_pb2.Attribute) -> Attribute:
    kind = _CLASSES.get(message.type, AnyValue)
    return kind(**{field: _FIELDS[field].read(message) for field in kind.__struct_fields__})
