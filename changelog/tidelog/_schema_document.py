"""
A schema as a document: JSON or TOML text.

The same document in both notations, decoded part by part so that whoever wrote it
is told the attribute that is wrong. What the notations lack is text: decimals are
digits, binaries base64, and in JSON timestamps are RFC 3339.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from tidelog._attributes import Attribute, AttributeType
from tidelog._entity import Entity, Rename
from tidelog._errors import InvalidSchema, quoted
from tidelog._limits import SCHEMA_BYTES_MAX

_T = TypeVar("_T")


class SchemaParts(NamedTuple):
    """
    What a schema is made from.

    Attributes:
        entities: The entities.
        version: Rises with each change of the schema.
        renames: Names that were given up.
        open: Whether entities and attributes that are not declared are accepted.
    """

    entities: list[Entity]
    version: int
    renames: list[Rename]
    open: bool


class _EntityDocument(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    attributes: dict[str, Any] = {}
    unique: list[str | list[str]] = []
    indexes: list[str] = []


class _Document(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    version: int
    entities: dict[str, Any]
    open: bool = False
    renames: list[Any] = []


def parse_json(text: str) -> SchemaParts:
    """Read a schema from JSON. Raises InvalidSchema."""
    _check_size(len(text))
    try:
        plain = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidSchema(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise InvalidSchema("nested too deeply") from error
    return _parts(plain)


def parse_toml(text: str) -> SchemaParts:
    """Read a schema from TOML. Raises InvalidSchema."""
    _check_size(len(text))
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSchema(str(error)) from error
    except RecursionError as error:
        raise InvalidSchema("nested too deeply") from error
    return _parts(plain)


def format_json(parts: SchemaParts) -> str:
    """Return a schema as JSON, laid out to be read."""
    return msgspec.json.format(msgspec.json.encode(_document(parts)), indent=2).decode() + "\n"


def format_toml(parts: SchemaParts) -> str:
    """Return a schema as TOML."""
    return msgspec.toml.encode(_document(parts)).decode()


def canonical_form(parts: SchemaParts) -> bytes:
    """
    Return bytes that two schemas share exactly if they say the same.

    Raises:
        InvalidSchema: The schema is too large to travel.
    """
    data = msgspec.json.encode(_document(parts), order="sorted")
    _check_size(len(data))
    return data


def _check_size(size: int) -> None:
    if size > SCHEMA_BYTES_MAX:
        raise InvalidSchema(f"a schema of {size} bytes: the limit is {SCHEMA_BYTES_MAX}")


def _document(parts: SchemaParts) -> _Document:
    return _Document(
        version=parts.version,
        entities={
            entity.name: _EntityDocument(
                dict(entity.attributes), [list(together) for together in entity.unique], list(entity.indexes)
            )
            for entity in parts.entities
        },
        open=parts.open,
        renames=parts.renames,
    )


def _parts(plain: Any) -> SchemaParts:
    document = _converted(plain, _Document)
    return SchemaParts(
        [_entity(name, body) for name, body in document.entities.items()],
        document.version,
        [_converted(one, Rename, f"renames[{place}]") for place, one in enumerate(document.renames)],
        document.open,
    )


def _entity(name: str, plain: Any) -> Entity:
    document = _converted(plain, _EntityDocument, name)
    declarations = cast("type[Attribute]", AttributeType)  # the union of all of them
    attributes = {
        attribute: _converted(declared, declarations, f"{name}.{attribute}")
        for attribute, declared in document.attributes.items()
    }
    return Entity(name, attributes, unique=document.unique, indexes=document.indexes)


def _converted(plain: Any, kind: type[_T], place: str = "") -> _T:
    try:
        return msgspec.convert(plain, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InvalidSchema(f"{place}: {error}" if place else str(error)) from error


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise InvalidSchema(f"{quoted(name)} stands twice in one place")
        result[name] = value
    return result


def _refuse_constant(name: str) -> None:
    raise InvalidSchema(f"{name} is no number that a schema can have")
