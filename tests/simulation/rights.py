"""
Access rules and download modes, read naively: object by object, without any of the server's machinery.

What the simulation and the model of changing rules compare the product with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.simulation.model import patched

from tidelog import Constraint, Download, DownloadMode, Operation, OperationKind, Patch
from tidelog_server import Application, Principal

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Granted:
    """An access rule."""

    role: str
    entity: str
    create: bool
    delete: bool
    read: frozenset[str] | None
    write: frozenset[str] | None
    where: Constraint | None
    check: Constraint | None


def allow(application: Application, granted: Sequence[Granted]) -> None:
    """Give an application its access rules."""
    for one in granted:
        application.allow(
            one.role,
            one.entity,
            create=one.create,
            delete=one.delete,
            read="*" if one.read is None else one.read,
            write="*" if one.write is None else one.write,
            where=one.where,
            check=one.check,
        )


class Eyes:
    """
    What one person may read and write, and what the person's replica has of it.

    Args:
        granted: The application's access rules; without any, everything is allowed.
        offers: How much of each entity the application offers to replicas.
        principal: Who it is.
        wishes: How much the replica wants.
    """

    def __init__(
        self,
        granted: Sequence[Granted],
        offers: Mapping[str, Download],
        principal: Principal,
        wishes: Mapping[str, Download],
    ) -> None:
        self.principal = principal
        self._all_granted = granted
        self._has_rules = bool(granted)
        self._offers = offers
        self._claims = {"user_id": principal.user_id, **principal.claims}
        self._wishes = wishes
        self._granted = [one for one in granted if one.role == "*" or one.role in principal.roles]

    def with_wishes(self, wishes: Mapping[str, Download]) -> Eyes:
        """Return the eyes of the same person with other wishes."""
        return Eyes(self._all_granted, self._offers, self.principal, wishes)

    def mode(self, entity: str) -> DownloadMode:
        """Return how much of an entity is downloaded."""
        modes = [one[entity].mode for one in (self._offers, self._wishes) if entity in one]
        for mode in ("never", "nothing_clear", "nothing_preserve", "where"):
            if mode in modes:
                return DownloadMode(mode)
        return DownloadMode.ALL

    def downloads(self, entity: str) -> bool:
        """Tell whether objects of an entity are downloaded."""
        return self.mode(entity) in (DownloadMode.ALL, DownloadMode.WHERE)

    def readable(self, entity: str, attributes: Attributes | None) -> Attributes | None:
        """Return what may be read of an object, or None."""
        if attributes is None or not self._has_rules:
            return attributes
        names: set[str] = set()
        seen = False
        for one in self._of(entity):
            if one.read != frozenset() and self._holds(one.where, attributes):
                seen = True
                names |= set(attributes) if one.read is None else one.read
        return {name: value for name, value in attributes.items() if name in names} if seen else None

    def shown(self, entity: str, attributes: Attributes | None) -> Attributes | None:
        """Return what the replica has of an object of a downloaded entity, or None."""
        if attributes is None or not self.downloads(entity) or self.is_blind(entity):
            return None
        offer, wish = self._offers.get(entity), self._wishes.get(entity)
        if offer is not None and offer.where is not None and not self._holds(offer.where, attributes):
            return None
        seen = self.readable(entity, attributes)
        if seen is None or (wish is not None and wish.where is not None and not self._holds(wish.where, seen)):
            return None
        return seen

    def is_blind(self, entity: str) -> bool:
        """Tell whether a wish names what may be read of no object: then nothing matches it."""
        wish = self._wishes.get(entity)
        if wish is None or wish.where is None or not self._has_rules:
            return False
        reads = [one.read for one in self._of(entity) if self._has_claims(one)]
        return None not in reads and bool(wish.where.attributes() - frozenset().union(*(one or () for one in reads)))

    def may(self, operation: Operation, before: Attributes | None) -> bool:
        """Tell whether an operation on an object may be applied."""
        if not self._has_rules:
            return True
        patch = operation.decoded_patch()
        rules = [one for one in self._of(operation.entity) if self._has_claims(one)]
        if operation.kind is OperationKind.CREATE:
            after = dict(patch.set)
            return self._covers([one for one in rules if one.create and self._accepts(one, after)], patch)
        if before is None or self.readable(operation.entity, before) is None:
            return False
        rules = [one for one in rules if self._holds(one.where, before)]
        if operation.kind is OperationKind.DELETE:
            return any(one.delete for one in rules)
        after = patched(before, patch)
        writing = [one for one in rules if one.write != frozenset() and self._accepts(one, after)]
        return self._covers(writing, patch)

    def may_write(self, entity: str, names: Sequence[str], before: Attributes) -> bool:
        """Tell whether some attributes of an object may be written, whatever it becomes."""
        if not self._has_rules:
            return True
        rules = [one for one in self._of(entity) if one.write != frozenset() and self._holds(one.where, before)]
        return bool(rules) and all(any(one.write is None or name in one.write for one in rules) for name in names)

    def _of(self, entity: str) -> list[Granted]:
        return [one for one in self._granted if one.entity in ("*", entity) and self._has_claims(one)]

    def _has_claims(self, one: Granted) -> bool:
        named = [where.claims() for where in (one.where, one.check) if where is not None]
        return frozenset().union(*named) <= self._claims.keys()

    def _accepts(self, one: Granted, after: Attributes) -> bool:
        return self._holds(one.where if one.check is None else one.check, after)

    def _covers(self, rules: Sequence[Granted], patch: Patch) -> bool:
        return bool(rules) and all(
            any(one.write is None or name in one.write for one in rules) for name in patch.written
        )

    def _holds(self, where: Constraint | None, attributes: Attributes) -> bool:
        if where is None:
            return True
        return where.claims() <= self._claims.keys() and where.bind(self._claims).matches(attributes)
