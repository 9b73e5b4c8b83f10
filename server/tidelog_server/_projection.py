"""
Projection: the part of a tenant that a principal may see and that its replica asked for.

Entity by entity three things come together: what the access rules let the principal
read, how much the application offers to replicas, and how much the replica wants.
The offer is a ceiling, the wish narrows it. A wish is decided on what may be read of
an object, so it cannot be used to find out the rest; one that names what the principal
may not read of any object matches nothing. That may be so from one day to the next,
and who loses access must lose the objects, not the way to synchronize.

What shaped the projection leaves a fingerprint in each cursor. An entity whose
fingerprint has changed is reconciled: what the replica has of it was chosen otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Final, NamedTuple

from tidelog._constraints import NEVER, All, Any_, Constraint, required_values
from tidelog._downloads import Download, DownloadMode
from tidelog._errors import InvalidConstraint
from tidelog._schema import Schema
from tidelog._values import Attributes, check_name, decode_trusted, encode
from tidelog.v1 import sync_pb2
from tidelog_server._access import EVERYTHING, AccessRule, EntityRights, Rights, bound
from tidelog_server._application import Application
from tidelog_server._indexes import by_version_prefix
from tidelog_server._principal import Principal
from tidelog_server._records import ObjectState

# Beyond so many values of an attribute the whole entity is scanned.
INDEXED_VALUES_MAX: Final = 100
ENTITIES_KEPT_MAX: Final = 10_000
FINGERPRINT_BYTES: Final = 16

_NOT_DOWNLOADED: Final = b"\0"

# From most to least.
_MODES: Final = (
    DownloadMode.ALL,
    DownloadMode.WHERE,
    DownloadMode.NOTHING_PRESERVE,
    DownloadMode.NOTHING_CLEAR,
    DownloadMode.NEVER,
)


class Scope(NamedTuple):
    """
    What a projection was made of, as fingerprints.

    Attributes:
        default: That of the entities not named.
        entities: Those that differ from it, by entity.
    """

    default: bytes
    entities: Mapping[str, bytes]

    def of(self, entity: str) -> bytes:
        """Return the fingerprint of an entity."""
        return self.entities.get(entity, self.default)


class Sight:
    """
    Which objects of one entity are seen, and which attributes of each.

    Attributes:
        is_whole: Whether all objects are seen, whole.
        sees_whole_objects: Whether each object that is seen is seen whole.

    Args:
        rights: What the principal may read.
        where: What the objects must be besides, on the server.
        wished: What they must be as far as the principal may read them.
    """

    def __init__(
        self, rights: EntityRights, where: Constraint | None = None, wished: Constraint | None = None
    ) -> None:
        self._rights = rights
        self._where = where
        self._wished = wished
        self.is_whole = rights.reads_everything and where is None and wished is None
        self.sees_whole_objects = rights.reads_everything or all(rule.read is None for rule in _reading_rules(rights))

    def of(self, attributes: Attributes) -> Attributes | None:
        """Return what is seen of an object (the argument itself if that is all), or None if it is not seen."""
        if self._where is not None and not self._where.matches(attributes):
            return None
        seen = self._rights.readable(attributes)
        if seen is None or (self._wished is not None and not self._wished.matches(seen)):
            return None
        return seen

    def encoded(self, state: ObjectState) -> bytes | None:
        """Return what is seen of a state, encoded: its own bytes if that is all; None if nothing or a tombstone."""
        if state.deleted:
            return None
        if self.is_whole:
            return state.attributes
        attributes = decode_trusted(state.attributes)
        seen = self.of(attributes)
        if seen is None:
            return None
        return state.attributes if len(seen) == len(attributes) else encode(seen)


class EntityProjection:
    """
    What a replica has of one entity.

    Attributes:
        mode: How much of it is downloaded.
        readable: What the principal may read.
        shown: What the replica has after a synchronization of mode all.
        index_prefixes: Where in the table of indexes the objects shown are found; None:
            all objects of the entity must be looked at.
        fingerprint: What stands for all that is shown.
    """

    def __init__(self, name: str, rights: EntityRights, offer: Download, wish: Download, schema: Schema) -> None:
        self.mode = max(offer.mode, wish.mode, key=_MODES.index)
        self.readable = Sight(rights)
        if self.mode.downloads:
            self.shown = Sight(rights, offer.where, wish.where)
        else:
            self.shown = Sight(rights, NEVER)
        self.fingerprint = _NOT_DOWNLOADED
        self.index_prefixes: tuple[bytes, ...] | None = ()
        if self.mode.downloads:
            declared = schema.entity(name)
            indexes = declared.indexes if declared is not None else ()
            conditions = (offer.where, wish.where, _rows_seen(rights))
            self.index_prefixes = _index_prefixes(name, indexes, conditions, rights)
            shape = (str(offer.where), str(wish.where))
            self.fingerprint = rights.fingerprint() if shape == _PLAIN else _digest((rights.fingerprint(), *shape))


class Projection:
    """
    What a replica has of a tenant.

    Args:
        application: Says what may be read and what is offered.
        principal: Who reads.
        wishes: How much the replica wants, by entity; of others what is offered.
        tolerant: Whether a wish that does not fit the schema is passed over instead of refused.

    Raises:
        InvalidConstraint: A wish does not fit the schema.
        InvalidValue: A wish is for what no entity can be called.
    """

    def __init__(
        self,
        application: Application,
        principal: Principal,
        wishes: Mapping[str, Download],
        *,
        tolerant: bool = False,
    ) -> None:
        self.principal = principal
        self._application = application
        self._rights = application.rights(principal)
        self._entities: dict[str, EntityProjection] = {}
        self._wishes: dict[str, Download] = {}
        for entity, wish in wishes.items():
            check_name(entity, "an entity name")
            self._wishes[entity] = wish if wish.where is None else self._usable(entity, wish.where, tolerant=tolerant)

    def _usable(self, entity: str, where: Constraint, *, tolerant: bool) -> Download:
        """Return the wish for what matches a constraint, as far as it means anything. Raises InvalidConstraint."""
        try:
            self._application.schema.check_constraint(entity, where)
        except InvalidConstraint:
            if not tolerant:
                raise
            return _EVERYTHING
        if _hidden(self._rights.entity(entity), where):
            return Download(DownloadMode.WHERE, NEVER)
        return Download(DownloadMode.WHERE, _bound(where, self.principal))

    def entity(self, name: str) -> EntityProjection:
        """Return what the replica has of an entity."""
        found = self._entities.get(name)
        if found is None:
            offer = self._application.synchronization_of(name).offer
            if offer.where is not None:
                offer = Download(offer.mode, _bound(offer.where, self.principal))
            wish = self._wishes.get(name, _EVERYTHING)
            found = EntityProjection(name, self._rights.entity(name), offer, wish, self._application.schema)
            if len(self._entities) < ENTITIES_KEPT_MAX:
                self._entities[name] = found
        return found

    def plans(self, time_us: int, reconciling: Collection[str] | None = ()) -> list[sync_pb2.EntityPlan]:
        """
        Return the plans of those entities that are not simply downloaded whole.

        Args:
            time_us: The server's clock.
            reconciling: The entities that the session reconciles; None: all of them.
        """
        plans = []
        scope_changed, no_cause = sync_pb2.RECONCILE_CAUSE_SCOPE_CHANGED, sync_pb2.RECONCILE_CAUSE_UNSPECIFIED
        for name in sorted({*self._application.synchronization, *self._wishes, *(reconciling or ())}):
            mode = self.entity(name).mode
            excluded = self._application.synchronization_of(name).excludes_uploads(time_us, mode)
            reconcile = mode.downloads and (reconciling is None or name in reconciling)
            if mode is not DownloadMode.ALL or excluded or (reconcile and reconciling is not None):
                plans.append(
                    sync_pb2.EntityPlan(
                        entity=name,
                        mode=mode.number,
                        upload_excluded=excluded,
                        reconcile=reconcile,
                        reconcile_cause=scope_changed if reconcile and reconciling is not None else no_cause,
                    )
                )
        return plans

    @cached_property
    def scope(self) -> Scope:
        """What the projection is made of."""
        # No entity has an empty name: it gets what all those get that nobody named.
        default = self.entity("").fingerprint
        ruled = (rule.entity for rule in self._application.access_rules if rule.entity != EVERYTHING)
        names = {*ruled, *self._application.synchronization, *self._wishes}
        fingerprints = {name: self.entity(name).fingerprint for name in names}
        return Scope(default, {name: one for name, one in fingerprints.items() if one != default})


def matching(schema: Schema, rights: Rights, entity: str, where: Constraint | None) -> Sight:
    """
    Return what a principal sees of an entity, of those objects that match a constraint of its own.

    Raises:
        InvalidConstraint: It names what the principal may not read, or does not fit the schema.
    """
    readable = rights.entity(entity)
    if where is None:
        return Sight(readable)
    if hidden := _hidden(readable, where):
        raise InvalidConstraint(f"the constraint on {entity} uses {hidden[0]!r}, which may not be read")
    schema.check_constraint(entity, where)
    return Sight(readable, wished=_bound(where, rights.principal))


def _hidden(rights: EntityRights, where: Constraint) -> list[str]:
    """Return the attributes in a constraint that the principal may not read of any object."""
    names = rights.readable_names()
    return [] if names is None else sorted(where.attributes() - names)


def _bound(where: Constraint, principal: Principal) -> Constraint:
    """Return a constraint with the principal's claims in place; as in a rule, nothing is meant if one is missing."""
    found = bound(where, principal.claims_and_identity())
    return NEVER if found is None else found


def _rows_seen(rights: EntityRights) -> Constraint | None:
    """Return what an object must be so that any rule lets it be read; None: nothing special."""
    if rights.reads_everything:
        return None
    rules = _reading_rules(rights)
    constraints = tuple(rule.where for rule in rules if rule.where is not None)
    return Any_(constraints) if len(constraints) == len(rules) else None


def _reading_rules(rights: EntityRights) -> list[AccessRule]:
    return [rule for rule in rights.rules or () if rule.read != frozenset()]


def _index_prefixes(
    entity: str, indexes: Iterable[str], conditions: Iterable[Constraint | None], rights: EntityRights
) -> tuple[bytes, ...] | None:
    """
    Return where in the table of indexes the objects are found by the fewest values; None if no index helps.

    A download brings together what it finds by one value. So by an attribute that is not
    read of each object at most one value is looked up: else the order would tell which
    objects have the same.
    """
    stated = tuple(one for one in conditions if one is not None)
    if NEVER in stated:
        return ()
    required = required_values(All(stated))
    found = []
    for index in indexes:
        if index in required and len(required[index]) <= INDEXED_VALUES_MAX:
            prefixes = tuple(sorted({by_version_prefix(entity, index, value) for value in required[index]}))
            if len(prefixes) <= 1 or _reads_of_each(rights, index):
                found.append(prefixes)
    return min(found, key=len, default=None)


def _reads_of_each(rights: EntityRights, attribute: str) -> bool:
    """Tell whether an attribute is read of each object that is seen."""
    return rights.reads_everything or all(
        rule.read is None or attribute in rule.read for rule in _reading_rules(rights)
    )


def _digest(shape: object) -> bytes:
    return hashlib.sha256(repr(shape).encode()).digest()[:FINGERPRINT_BYTES]


_EVERYTHING: Final = Download()
_PLAIN: Final = ("None", "None")
