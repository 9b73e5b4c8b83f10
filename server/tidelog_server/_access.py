"""
Access rules: what a principal may do to which objects, and what it may know of them.

A rule grants something to a role on one entity; the rules of all roles of a principal
add up, object by object. Where a rule's constraint names a claim that the principal
does not have, the rule grants nothing. To a principal an object that no rule lets it
read is as if it were not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidelog._constraints import Constraint
from tidelog._values import Attributes
from tidelog_server._principal import Principal

EVERYTHING: Final = "*"


class Denied(Exception):
    """
    The principal may not do this.

    Attributes:
        attribute: The attribute that it may not write; empty if it may not do this to the object at all.
    """

    def __init__(self, attribute: str = "") -> None:
        super().__init__(attribute)
        self.attribute = attribute


@dataclass(frozen=True, slots=True)
class AccessRule:
    """
    What a role may do to objects of an entity.

    Attributes:
        role: The role, or "*" for everybody.
        entity: The entity, or "*" for every one.
        create: Whether objects may be created.
        delete: Whether objects may be deleted.
        read: Attributes that may be read; None: all. Empty: the objects are not seen.
        write: Attributes that may be written; None: all.
        where: Which objects the rule is about, as they are before. None: all.
        check: What they must be afterwards. None: what *where* says.
    """

    role: str
    entity: str
    create: bool = False
    delete: bool = False
    read: frozenset[str] | None = None
    write: frozenset[str] | None = frozenset()
    where: Constraint | None = None
    check: Constraint | None = None

    def bound(self, claims: Mapping[str, Any]) -> AccessRule | None:
        """Return the rule with the principal's claims in place, or None if it lacks one of them."""
        where, check = self.where, self.check
        if where is not None and (where := bound(where, claims)) is None:
            return None
        if check is None:
            check = where
        elif (check := bound(check, claims)) is None:
            return None
        return AccessRule(self.role, self.entity, self.create, self.delete, self.read, self.write, where, check)

    def covers(self, attributes: Attributes) -> bool:
        """Tell whether the rule is about an object that holds these attributes."""
        return self.where is None or self.where.matches(attributes)

    def accepts(self, attributes: Attributes) -> bool:
        """Tell whether the rule lets an object become this."""
        return self.check is None or self.check.matches(attributes)


class EntityRights:
    """
    What one principal may do to the objects of one entity.

    Attributes:
        rules: The rules that apply, claims in place. None: there are no rules at all, everything is allowed.
        reads_everything: Whether all objects may be read whole.
        writes_everything: Whether all may be created, changed and deleted.
    """

    def __init__(self, rules: tuple[AccessRule, ...] | None) -> None:
        self.rules = rules
        self.reads_everything = rules is None or any(rule.read is None and rule.where is None for rule in rules)
        self.writes_everything = rules is None or any(
            rule.create and rule.delete and rule.write is None and rule.where is None and rule.check is None
            for rule in rules
        )

    def sees(self, attributes: Attributes) -> bool:
        """Tell whether an object may be known of."""
        return self.reads_everything or any(
            rule.read != _NOTHING and rule.covers(attributes) for rule in self.rules or ()
        )

    def readable(self, attributes: Attributes) -> Attributes | None:
        """Return what may be read of an object (the argument itself if that is all), or None if it is not seen."""
        if self.reads_everything:
            return attributes
        names: frozenset[str] = _NOTHING
        seen = False
        for rule in self.rules or ():
            if rule.read == _NOTHING or not rule.covers(attributes):
                continue
            if rule.read is None:
                return attributes
            names |= rule.read
            seen = True
        if not seen:
            return None
        return {name: value for name, value in attributes.items() if name in names}

    def readable_names(self) -> frozenset[str] | None:
        """Return the attributes that may be read of some object; None: all."""
        if self.reads_everything:
            return None
        names: frozenset[str] = _NOTHING
        for rule in self.rules or ():
            if rule.read is None:
                return None
            names |= rule.read
        return names

    def check_create(self, after: Attributes, written: Iterable[str]) -> None:
        """Raise Denied unless these attributes may be written to create an object, so that it becomes *after*."""
        if not self.writes_everything:
            rules = [rule for rule in self.rules or () if rule.create and rule.accepts(after)]
            if not rules:
                raise Denied
            _check_written(rules, written)

    def check_update(self, before: Attributes, after: Attributes, written: Iterable[str]) -> None:
        """Raise Denied unless these attributes of an object may be written, so that it becomes *after*."""
        if not self.writes_everything:
            rules = [rule for rule in self.rules or () if rule.covers(before) and rule.write != _NOTHING]
            if not rules:
                raise Denied
            accepting = [rule for rule in rules if rule.accepts(after)]
            if not accepting:
                raise Denied
            _check_written(accepting, written)

    def check_written(self, before: Attributes, written: Iterable[str]) -> None:
        """Raise Denied unless each of these attributes of an object may be written, whatever it becomes."""
        if not self.writes_everything:
            rules = [rule for rule in self.rules or () if rule.covers(before) and rule.write != _NOTHING]
            if not rules:
                raise Denied
            _check_written(rules, written)

    def check_delete(self, before: Attributes) -> None:
        """Raise Denied unless an object may be deleted."""
        if not self.writes_everything and not any(rule.delete and rule.covers(before) for rule in self.rules or ()):
            raise Denied

    def fingerprint(self) -> bytes:
        """Return what stands for the objects and attributes that may be read: another one, another projection."""
        if self.reads_everything:
            return b""
        seen = sorted(
            (str(rule.where), "*" if rule.read is None else ",".join(sorted(map(repr, rule.read))))
            for rule in self.rules or ()
            if rule.read != _NOTHING
        )
        return hashlib.sha256(repr(seen).encode()).digest()[:16]


class Rights:
    """What one principal may do, entity by entity."""

    def __init__(self, rules: Iterable[AccessRule], principal: Principal) -> None:
        self.principal = principal
        declared = tuple(rules)
        self._has_rules = bool(declared)
        claims = principal.claims_and_identity()
        mine = (rule for rule in declared if rule.role == EVERYTHING or rule.role in principal.roles)
        self._rules = tuple(bound for rule in mine if (bound := rule.bound(claims)) is not None)
        self._entities: dict[str, EntityRights] = {}

    def entity(self, name: str) -> EntityRights:
        """Return the rights on one entity."""
        found = self._entities.get(name)
        if found is None:
            rules = tuple(rule for rule in self._rules if rule.entity in (EVERYTHING, name))
            found = EntityRights(rules if self._has_rules else None)
            if len(self._entities) < _ENTITIES_KEPT_MAX:
                self._entities[name] = found
        return found


def bound(constraint: Constraint, claims: Mapping[str, Any]) -> Constraint | None:
    """Return a constraint with claims in place, or None if one is missing: then nothing is meant, whatever it says."""
    if any(claims.get(name) is None for name in constraint.claims()):
        return None
    return constraint.bind(claims)


def _check_written(rules: Iterable[AccessRule], written: Iterable[str]) -> None:
    for name in written:
        if not any(rule.write is None or name in rule.write for rule in rules):
            raise Denied(name)


_NOTHING: Final[frozenset[str]] = frozenset()
_ENTITIES_KEPT_MAX: Final = 10_000
