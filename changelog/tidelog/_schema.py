"""
Schema: what an application says of its entities.

The server refuses what does not fit it; a replica that holds it refuses the same
before anything is appended, and uses the references to find what a selected object
needs. A schema is checked when it is made, as a whole, and does not change.

Evolution: what is added is fine. A name that is given up is declared as a `Rename`,
and operations of older versions are read as if they used the new one. Whatever else
an older program says that no longer fits is refused, with a reason.
"""

from __future__ import annotations

import graphlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tidelog._constraints import Constraint, comparisons
from tidelog._entity import Entity, EntityReference, Rename
from tidelog._errors import InvalidConstraint, InvalidSchema, ValidationFailed, quoted
from tidelog._limits import SCHEMA_ENTITIES_MAX, SCHEMA_RENAMES_MAX
from tidelog._patch import Patch
from tidelog._renames import Renames
from tidelog._schema_document import SchemaParts, canonical_form, format_json, format_toml, parse_json, parse_toml
from tidelog._schema_message import (
    entity_from_message,
    entity_to_message,
    rename_from_message,
    rename_to_message,
)
from tidelog._validation import EntityRules
from tidelog._values import INTEGER_MAX, Attributes
from tidelog.v1 import schema_pb2

_UNKNOWN_ENTITY: Final = "the schema has no such entity"


class Schema:
    """
    The entities of an application, their attributes and the rules between them.

    Args:
        entities: The entities.
        version: Rises with each change of the schema. Operations carry that of their author.
        renames: Names that were given up in this or earlier versions.
        open: Accept entities and attributes that are not declared, as they come.

    Attributes:
        entities: The entities, by name.

    Raises:
        InvalidSchema: It contradicts itself.
    """

    def __init__(
        self,
        entities: Iterable[Entity] = (),
        *,
        version: int = 1,
        renames: Iterable[Rename] = (),
        open: bool = False,  # noqa: A002 - what a schema is called that accepts more than it names
    ) -> None:
        if type(version) is not int or not 1 <= version <= INTEGER_MAX:
            raise InvalidSchema(f"a schema's version starts at 1, got {quoted(version)}")
        if type(open) is not bool:
            raise InvalidSchema(f"open is {quoted(open)}, but must be True or False")
        self.version = version
        self.open = open
        self.entities: Mapping[str, Entity] = MappingProxyType(_by_name(entities))
        self.renames = _renames(renames)
        if len(self.renames) > SCHEMA_RENAMES_MAX:
            raise InvalidSchema(f"a schema of {len(self.renames)} renames: the limit is {SCHEMA_RENAMES_MAX}")
        self._references = {name: entity.references for name, entity in self.entities.items() if entity.references}
        self._referrers = self._found_referrers()
        self._check_cycles()
        self._upcaster = Renames(self.renames, self.entities, version=version, open=open)
        self._rules = {name: EntityRules(entity, open=open) for name, entity in self.entities.items()}
        self.has_rules = not open or any(rules.can_refuse or rules.has_defaults for rules in self._rules.values())
        self._canonical_form = canonical_form(self._parts())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schema):
            return NotImplemented
        return self._canonical_form == other._canonical_form

    def __hash__(self) -> int:
        return hash(self._canonical_form)

    def __repr__(self) -> str:
        return f"<Schema version {self.version}: {', '.join(self.entities)}>"

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of what the schema says: two schemas share it exactly if they are equal."""
        return hashlib.sha256(self._canonical_form).digest()

    # --- looking up -----------------------------------------------------------

    def entity(self, name: str) -> Entity | None:
        """Return an entity by its name, or None if it is not declared."""
        return self.entities.get(name)

    @property
    def has_references(self) -> bool:
        """Whether there are any references at all."""
        return bool(self._references)

    def references(self, entity: str) -> tuple[EntityReference, ...]:
        """Return the references of an entity."""
        return self._references.get(entity, ())

    def referrers(self, target: str) -> tuple[tuple[str, EntityReference], ...]:
        """Return (entity, reference) for each reference that names objects of the entity *target*."""
        return self._referrers.get(target, ())

    def referenced(self, entity: str, attributes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (attribute, key of the object it names) for each reference that *attributes* set."""
        for reference in self.references(entity):
            value = attributes.get(reference.attribute)
            for id_ in value if type(value) is list else (value,):
                if type(id_) is str:
                    yield reference.attribute, (reference.target, id_)

    # --- checking -------------------------------------------------------------

    def with_defaults(self, entity: str, attributes: Attributes) -> Attributes:
        """
        Return the attributes of a creation, those that it leaves out with their defaults.

        A null that is there stays. Returns the same object if nothing is filled in.
        """
        rules = self._rules.get(entity)
        return attributes if rules is None else rules.with_defaults(attributes)

    def check_object(self, entity: str, attributes: Mapping[str, Any], id: str = "") -> None:  # noqa: A002
        """
        Check a whole object, as it is created.

        Args:
            entity: Its type.
            attributes: All its attributes.
            id: Its id, for the message.

        Raises:
            ValidationFailed: It does not fit.
        """
        rules = self._rules_of(entity, id)
        if rules is not None:
            rules.check_object(attributes, id)

    def check_written(
        self,
        entity: str,
        attributes: Mapping[str, Any],
        written: Iterable[str],
        id: str = "",  # noqa: A002 - the glossary's word
    ) -> None:
        """
        Check what an update has made of an object: those attributes that it wrote, and no others.

        What an older schema let in, or an attribute that has become required since, does
        not stand in the way of changes to other attributes.

        Args:
            entity: Its type.
            attributes: All its attributes after the update.
            written: Names of those that the update wrote or removed.
            id: Its id, for the message.

        Raises:
            ValidationFailed: One of them does not fit.
        """
        rules = self._rules_of(entity, id)
        if rules is not None:
            rules.check_written(attributes, written, id)

    def check_patch(self, entity: str, patch: Patch, id: str = "") -> None:  # noqa: A002
        """
        Check the patch of an update, as far as it can be told without the object.

        Args:
            entity: The object's type.
            patch: The patch.
            id: The object's id, for the message.

        Raises:
            ValidationFailed: It does not fit.
        """
        rules = self._rules_of(entity, id)
        if rules is not None:
            rules.check_patch(patch, id)

    def check_constraint(self, entity: str, constraint: Constraint | None) -> None:
        """
        Check that a constraint makes sense for an entity. None, which is all objects, does if the entity does.

        Raises:
            InvalidConstraint: It names an entity or attribute that the schema does not
                have, or compares with a value of a type that the attribute never has.
        """
        rules = self._rules.get(entity)
        if rules is None:
            if self.open:
                return
            raise InvalidConstraint(f"the schema has no entity {entity!r}")
        if constraint is not None:
            for comparison in comparisons(constraint):
                rules.check_comparison(comparison)

    def upcast(self, entity: str, patch: Patch, schema_version: int, id: str = "") -> tuple[str, Patch]:  # noqa: A002
        """
        Return entity and patch of an operation in the names of this schema: the same objects if nothing changes.

        Args:
            entity: The entity that the operation names.
            patch: Its patch.
            schema_version: The schema version of its author. 0: there was none; then a
                name that is declared means itself.
            id: The object's id, for the message.

        Raises:
            ValidationFailed: An attribute is written by its former and its present name.
        """
        return self._upcaster.upcast(entity, patch, schema_version, id)

    def _rules_of(self, entity: str, id_: str) -> EntityRules | None:
        """Return the rules of an entity; None: it has none, since it may be there without being declared."""
        rules = self._rules.get(entity)
        if rules is None and not self.open:
            raise ValidationFailed(entity=entity, id=id_, rule=_UNKNOWN_ENTITY, is_mismatch=True)
        return rules

    # --- making ---------------------------------------------------------------

    def _found_referrers(self) -> dict[str, tuple[tuple[str, EntityReference], ...]]:
        found: dict[str, list[tuple[str, EntityReference]]] = {}
        for name, references in self._references.items():
            for reference in references:
                if reference.target not in self.entities and not self.open:
                    raise InvalidSchema(
                        f"{name}: attribute {reference.attribute!r} refers to {reference.target!r}, "
                        "which is none of the entities"
                    )
                found.setdefault(reference.target, []).append((name, reference))
        return {target: tuple(referrers) for target, referrers in found.items()}

    def _check_cycles(self) -> None:
        """Refuse objects that could only be created after each other."""
        needs = {
            name: {one.target for one in references if one.required and not one.many}
            for name, references in self._references.items()
        }
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            around = " -> ".join(reversed(error.args[1]))
            raise InvalidSchema(
                f"required references go round in a circle: {around}: no object of these could be the first"
            ) from error

    # --- other forms ----------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """
        Read a schema from a file, JSON or TOML by its suffix.

        Raises:
            InvalidSchema: The file cannot be read, or what it says makes no sense; the
                message names the file and the place.
        """
        path = Path(path)
        parse, _ = _notation(path)
        try:
            return cls._of(parse(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InvalidSchema(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InvalidSchema(f"{path} is no UTF-8 text: {error}") from error
        except InvalidSchema as error:
            raise InvalidSchema(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """
        Write the schema to a file, JSON or TOML by its suffix, from which `load` reads it back equal.

        Raises:
            InvalidSchema: The suffix is another.
            OSError: The file cannot be written.
        """
        path = Path(path)
        _, form = _notation(path)
        path.write_text(form(self._parts()), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Read a schema from JSON text. Raises InvalidSchema."""
        return cls._of(parse_json(text))

    def to_json(self) -> str:
        """Return the schema as JSON text, laid out to be read."""
        return format_json(self._parts())

    @classmethod
    def from_message(cls, message: schema_pb2.Schema) -> Schema:
        """Read the wire form. Raises InvalidSchema."""
        return cls(
            map(entity_from_message, message.entities),
            version=message.version or 1,
            renames=map(rename_from_message, message.renames),
            open=not message.closed,
        )

    def to_message(self) -> schema_pb2.Schema:
        """Return the wire form."""
        return schema_pb2.Schema(
            version=self.version,
            entities=map(entity_to_message, self.entities.values()),
            closed=not self.open,
            renames=map(rename_to_message, self.renames),
        )

    @classmethod
    def _of(cls, parts: SchemaParts) -> Schema:
        return cls(parts.entities, version=parts.version, renames=parts.renames, open=parts.open)

    def _parts(self) -> SchemaParts:
        return SchemaParts(list(self.entities.values()), self.version, list(self.renames), self.open)


def _renames(renames: Iterable[Rename]) -> tuple[Rename, ...]:
    if not isinstance(renames, Iterable):
        raise InvalidSchema(f"renames are a list, got {quoted(renames)}")
    found = tuple(renames)
    for rename in found:
        if not isinstance(rename, Rename):
            raise InvalidSchema(f"{quoted(rename)} is among the renames, but is no Rename")
    return found


def _by_name(entities: Iterable[Entity]) -> dict[str, Entity]:
    if not isinstance(entities, Iterable):
        raise InvalidSchema(f"the entities of a schema are a list, got {quoted(entities)}")
    found: dict[str, Entity] = {}
    for entity in entities:
        if not isinstance(entity, Entity):
            raise InvalidSchema(f"{quoted(entity)} is among the entities, but is no Entity")
        if entity.name in found:
            raise InvalidSchema(f"entity {entity.name!r} stands twice in the schema")
        found[entity.name] = entity
    if len(found) > SCHEMA_ENTITIES_MAX:
        raise InvalidSchema(f"a schema of {len(found)} entities: the limit is {SCHEMA_ENTITIES_MAX}")
    return found


def _notation(path: Path) -> tuple[Callable[[str], SchemaParts], Callable[[SchemaParts], str]]:
    """Return how a file of this name is read and written."""
    match path.suffix.lower():
        case ".json":
            return parse_json, format_json
        case ".toml":
            return parse_toml, format_toml
        case _:
            raise InvalidSchema(f"{path}: a schema file ends in .json or .toml")
