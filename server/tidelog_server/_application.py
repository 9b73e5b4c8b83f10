"""
Application: the rules of a business, without any transport.

An application is declared once, when a program starts, and then only read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from tidelog._constraints import Constraint, Where, constraint_of
from tidelog._downloads import Download, DownloadMode, DownloadWish, download_of
from tidelog._errors import InvalidConstraint, InvalidRule, InvalidValue
from tidelog._patch import check_attribute_name
from tidelog._schema import Schema
from tidelog._values import check_name
from tidelog_server._access import EVERYTHING, AccessRule, Rights
from tidelog_server._indexes import indexed_entities
from tidelog_server._principal import Principal

if TYPE_CHECKING:
    from tidelog._operation import Operation


HOOK_SECONDS_MAX_DEFAULT: Final = 30.0


class Reject(Exception):
    """
    Raised by a hook to refuse the operation; message and code reach its author.

    Args:
        message: Why, in a sentence for people. Cut after 1,000 bytes.
        code: Why, for programs: 1 to 64 bytes, or empty for none.
    """

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        if code:
            check_name(code, "the code of a rejection")
        self.message = message
        self.code = code


class TransientError(Exception):
    """
    Raised by a hook that cannot tell now (a service it asks is down).

    Nothing is refused and nothing is lost: the session ends, the operation stays
    pending on its replica, and a later synchronization tries again.
    """


class HookObject(Protocol):
    """
    An object as a hook sees it: item access reads and writes attributes, a missing one reads as None.

    Attributes:
        entity: Type of the object.
        id: Its id.
    """

    entity: str
    id: str

    def __getitem__(self, attribute: str) -> Any: ...
    def __setitem__(self, attribute: str, value: Any) -> None: ...
    def __delitem__(self, attribute: str) -> None: ...
    def __contains__(self, attribute: object) -> bool: ...
    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dictionary of its own."""
        ...


class HookContext(Protocol):
    """
    What a hook may use besides its object. All of it happens in the operation's own transaction.

    Attributes:
        principal: Who sent the operation.
        operation: The operation.
    """

    @property
    def principal(self) -> Principal:
        """Who sent the operation."""
        ...

    @property
    def operation(self) -> Operation:
        """The operation."""
        ...

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002 - the glossary's word
        """Return the attributes of an object, or None if there is none."""
        ...

    def query(self, entity: str, where: Where = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Iterate over (id, attributes) of the entity's objects that match, in no particular order."""
        ...

    def create(self, entity: str, attributes: dict[str, Any], id: str | None = None) -> str:  # noqa: A002
        """Create an object and return its id."""
        ...

    def update(self, entity: str, id: str, attributes: dict[str, Any]) -> None:  # noqa: A002
        """Set attributes of an object."""
        ...

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        """Delete an object."""
        ...


Hook = Callable[[Any, Any], None]
_H = TypeVar("_H", bound=Hook)

# What a stored object becomes; None: it is deleted.
Migration = Callable[[dict[str, Any]], dict[str, Any] | None]
_M = TypeVar("_M", bound=Migration)


# What an object becomes where two authors changed the same: a function of its attributes at the version that the
# author saw, as they are now, and as the author wants them (None: deleted).
Merge = Callable[[dict[str, Any], dict[str, Any], dict[str, Any] | None], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class EntitySynchronization:
    """
    What replicas get and may send of an entity.

    Attributes:
        offer: How much of it a replica can have.
        uploads: Whether operations on it are taken.
        uploads_until: Until then operations are taken that *uploads*, or the mode never, would refuse.
    """

    offer: Download = field(default_factory=Download)
    uploads: bool = True
    uploads_until: datetime | None = None

    def takes_uploads(self, time_us: int) -> bool:
        """Tell whether operations on the entity are taken at this time of the server's clock."""
        return self.uploads or self._is_lenient(time_us)

    def excludes_uploads(self, time_us: int, mode: DownloadMode) -> bool:
        """Tell whether a replica with this mode leaves its operations out of sessions of other modes than selected."""
        return mode is DownloadMode.NEVER and not self._is_lenient(time_us)

    def _is_lenient(self, time_us: int) -> bool:
        return self.uploads_until is not None and time_us < self.uploads_until.timestamp() * 1e6


class Application:
    """
    The rules of a business: schema, access, downloads, conflicts, hooks.

    A hook is a plain function of (object, context). It runs inside the transaction
    that applies the operation, on the one thread that writes: what it writes
    happens exactly once, and while it runs nobody else's operations are applied,
    so it must be quick: its time is limited. What it raises refuses the operation: `Reject` with the
    hook's own message, anything else as `HOOK_ERROR`, with the traceback in the
    server's log only; `TransientError` refuses nothing and ends the session.

    Args:
        schema: The application's entities. None: everything is accepted.
        operators: Roles that work off the synchronization failures of everybody. None
            named and no access rules: everybody does.
        hook_seconds_max: How long the hooks on one operation may take. What goes on longer
            is ended and recorded as `HOOK_ERROR`; code that waits outside of Python is
            ended when it comes back.
    """

    def __init__(
        self,
        *,
        schema: Schema | None = None,
        operators: Iterable[str] = (),
        hook_seconds_max: float = HOOK_SECONDS_MAX_DEFAULT,
    ) -> None:
        if not hook_seconds_max > 0:
            raise InvalidRule(f"hooks may take {hook_seconds_max!r} seconds: expected more than 0")
        self.hook_seconds_max = hook_seconds_max
        self.schema = schema if schema is not None else Schema(open=True)
        self.has_schema = schema is not None
        self.indexed_entities = indexed_entities(self.schema)
        self.access_rules: list[AccessRule] = []
        self.synchronization: dict[str, EntitySynchronization] = {}
        self.conflict_policies: dict[str, Merge | Literal["reject_stale"]] = {}
        self._operators = frozenset(operators)
        self._hooks: dict[tuple[str, str], list[Hook]] = {}
        self._migrations: dict[str, dict[int, Migration]] = {}
        self._user_lookup: Callable[[str, str], Principal | None] | None = None
        if isinstance(operators, str):
            raise InvalidRule(f"operators are a list of roles, got {operators!r}")

    def allow(
        self,
        role: str,
        entity: str,
        *,
        create: bool = False,
        delete: bool = False,
        read: Iterable[str] = EVERYTHING,
        write: Iterable[str] = (),
        where: Where = None,
        check: Where = None,
    ) -> None:
        """
        Grant a role something on an entity. Rules add up; with the first one, what none grants is denied.

        Args:
            role: The role, or "*" for everybody.
            entity: The entity, or "*" for every one.
            create: Whether objects may be created, with the attributes of *write*.
            delete: Whether objects may be deleted.
            read: Attributes that may be read, "*" for all. None of them: objects are not seen.
            write: Attributes that may be written, "*" for all.
            where: Which objects the rule is about, as they are before; it may use
                claims. None: all.
            check: What objects must be after they were written. None: what *where* says.

        Raises:
            InvalidRule: It names what the schema does not have, or compares with a value of another type.
        """
        if not role:
            raise InvalidRule("a role has a name; '*' is everybody")
        what = f"the access rule of {role!r} on {entity!r}"
        if entity != EVERYTHING:
            self._check_entity(entity, what)
        self.access_rules.append(
            AccessRule(
                role,
                entity,
                create,
                delete,
                self._attribute_names(entity, read, what),
                self._attribute_names(entity, write, what),
                self._constraint(entity, where, what),
                self._constraint(entity, check, what),
            )
        )

    def synchronize(
        self,
        entity: str,
        download: DownloadWish = DownloadMode.ALL,
        *,
        uploads: bool = True,
        uploads_until: datetime | None = None,
    ) -> None:
        """
        Say what replicas get and may send of an entity. Entities not named: everything.

        Args:
            entity: The entity.
            download: How much a replica can have: a mode or a constraint. A replica may ask for less.
            uploads: False: operations on it are refused.
            uploads_until: Until then operations are taken although *uploads* is false or
                the mode is `never`: for replicas that worked with what was allowed before.

        Raises:
            InvalidRule: It names what the schema does not have, or a date without a time zone.
        """
        what = f"the synchronization of {entity!r}"
        self._check_entity(entity, what)
        try:
            offer = download_of(download)
        except (InvalidValue, InvalidConstraint) as error:
            raise InvalidRule(f"{what}: {error}") from error
        self._constraint(entity, offer.where, what)
        if uploads_until is not None and uploads_until.utcoffset() is None:
            raise InvalidRule(f"{what}: {uploads_until} has no time zone")
        self.synchronization[entity] = EntitySynchronization(offer, uploads, uploads_until)

    def on_conflict(self, entity: str, policy: Merge | Literal["reject_stale"]) -> None:
        """
        Say what happens to an operation that writes what somebody else changed since its author looked.

        Without a policy the last one to arrive wins, attribute by attribute. Intents of one
        kind are never in conflict with each other.

        Args:
            entity: The entity.
            policy: "reject_stale" refuses the operation. A function of (base, theirs,
                mine) returns what the object becomes, or None to delete it; it may
                raise `Reject`. *mine* is None where the author deleted.

        Raises:
            InvalidRule: The schema has no such entity, or it is no policy.
        """
        self._check_entity(entity, f"the conflict policy of {entity!r}")
        if policy != "reject_stale" and not callable(policy):
            raise InvalidRule(f"a conflict policy is 'reject_stale' or a function, got {policy!r}")
        self.conflict_policies[entity] = policy

    def migration(self, entity: str, *, version: int) -> Callable[[_M], _M]:
        """
        Register a function that makes stored objects fit a version of the schema. Use it as a decorator.

        It gets an object's attributes, in the names of the present schema, and returns
        what they become, or None to delete the object. It runs when the server starts
        on a store of an older version and was told to migrate: those of several
        versions one after the other. It may be called several times for an object, and
        its result counts once: it must depend on nothing but its argument.

        Args:
            entity: The entity, by its present name.
            version: The version of the schema that it leads to.

        Raises:
            InvalidRule: The schema has no such entity, or its version is older, or there is one already.
        """
        what = f"the migration of {entity!r} to version {version!r}"
        self._check_entity(entity, what)
        if type(version) is not int or not 1 <= version <= self.schema.version:
            raise InvalidRule(f"{what}: the schema has version {self.schema.version}")

        def register(function: _M) -> _M:
            _check_function(function, "a migration")
            if self._migrations.setdefault(entity, {}).setdefault(version, function) is not function:
                raise InvalidRule(f"{what} stands twice")
            return function

        return register

    def migrations(self, entity: str, *, after: int) -> list[tuple[int, Migration]]:
        """Return (version, migration) of an entity for the versions above *after*, in order."""
        return sorted((version, one) for version, one in self._migrations.get(entity, {}).items() if version > after)

    def users(self, lookup: Callable[[str, str], Principal | None]) -> Callable[[str, str], Principal | None]:
        """
        Register a function of (tenant, user id) that says who a user is today. Use it as a decorator.

        A retried operation is judged by the present rights of its author; without the
        function, or where it returns None, by those of the operator who retries it.
        """
        self._user_lookup = lookup
        return lookup

    def user(self, tenant: str, user_id: str) -> Principal | None:
        """Return who a user is today, or None if that is not known."""
        return self._user_lookup(tenant, user_id) if self._user_lookup is not None else None

    def rights(self, principal: Principal) -> Rights:
        """Return what a principal may do."""
        return Rights(self.access_rules, principal)

    def is_operator(self, principal: Principal) -> bool:
        """Tell whether a principal works off the failures of everybody."""
        if not self._operators and not self.access_rules:
            return True
        return not self._operators.isdisjoint(principal.roles)

    def synchronization_of(self, entity: str) -> EntitySynchronization:
        """Return what replicas get and may send of an entity."""
        return self.synchronization.get(entity, _EVERYTHING_SYNCHRONIZED)

    def before_commit(self, entity: str) -> Callable[[_H], _H]:
        """Run the decorated hook before a creation or update of *entity* is applied; it may change the object."""
        return self._registrar("before_commit", entity)

    def after_commit(self, entity: str) -> Callable[[_H], _H]:
        """Run the decorated hook after a creation or update of *entity* was applied, in the same transaction."""
        return self._registrar("after_commit", entity)

    def before_delete(self, entity: str) -> Callable[[_H], _H]:
        """Run the decorated hook before an object of *entity* is deleted."""
        return self._registrar("before_delete", entity)

    def after_delete(self, entity: str) -> Callable[[_H], _H]:
        """Run the decorated hook after an object of *entity* was deleted, in the same transaction."""
        return self._registrar("after_delete", entity)

    @property
    def has_hooks(self) -> bool:
        """Whether any hook was declared."""
        return bool(self._hooks)

    def hooks(self, moment: str, entity: str) -> list[Hook]:
        """Return the hooks of a moment and entity in the order they were declared."""
        return self._hooks.get((moment, entity), _NO_HOOKS)

    def _registrar(self, moment: str, entity: str) -> Callable[[_H], _H]:
        self._check_entity(entity, f"a hook on {entity!r}")

        def register(hook: _H) -> _H:
            _check_function(hook, "a hook")
            self._hooks.setdefault((moment, entity), []).append(hook)
            return hook

        return register

    def _check_entity(self, entity: str, what: str) -> None:
        try:
            check_name(entity, "an entity name")
        except InvalidValue as error:
            raise InvalidRule(f"{what}: {error}") from error
        if not self.schema.open and self.schema.entity(entity) is None:
            raise InvalidRule(f"{what}: the schema has no entity {entity!r}")

    def _attribute_names(self, entity: str, names: Iterable[str], what: str) -> frozenset[str] | None:
        if names == EVERYTHING:
            return None
        if isinstance(names, str):
            raise InvalidRule(f"{what}: attributes are a list of names or '*', got {names!r}")
        found = frozenset(names)
        declared = self.schema.entity(entity)
        for name in sorted(found):
            try:
                check_attribute_name(name)
            except InvalidValue as error:
                raise InvalidRule(f"{what}: {error}") from error
            if not self.schema.open and declared is not None and name not in declared.attributes:
                raise InvalidRule(f"{what}: {entity} has no attribute {name!r}")
        return found

    def _constraint(self, entity: str, where: Where, what: str) -> Constraint | None:
        try:
            constraint = constraint_of(where)
            if constraint is not None and entity != EVERYTHING:
                self.schema.check_constraint(entity, constraint)
        except InvalidConstraint as error:
            raise InvalidRule(f"{what}: {error}") from error
        return constraint


def _check_function(function: Callable[..., object], what: str) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise InvalidRule(f"{what} is a plain function, which {function.__qualname__} is not")


_EVERYTHING_SYNCHRONIZED = EntitySynchronization()
_NO_HOOKS: list[Hook] = []
