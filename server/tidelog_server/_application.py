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

from tidelog._constraints import Comparison, Constraint, Where, comparisons, constraint_of
from tidelog._downloads import Download, DownloadMode, DownloadWish, download_of
from tidelog._errors import InvalidConstraint, InvalidRule, InvalidSchema, InvalidValue, quoted
from tidelog._logging import get_logger
from tidelog._patch import check_attribute_name
from tidelog._schema import Schema
from tidelog._values import check_id, check_name
from tidelog_server._access import EVERYTHING, AccessRule, Rights
from tidelog_server._indexes import indexed_entities
from tidelog_server._principal import Principal

if TYPE_CHECKING:
    from tidelog._operation import Operation


HOOK_SECONDS_MAX_DEFAULT: Final = 30.0

_log = get_logger("tidelog.application")


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

    Raises:
        InvalidSchema: *schema* is none.
        InvalidRule: *operators* is no list of roles, or hooks get no time.
    """

    def __init__(
        self,
        *,
        schema: Schema | None = None,
        operators: Iterable[str] = (),
        hook_seconds_max: float = HOOK_SECONDS_MAX_DEFAULT,
    ) -> None:
        if schema is not None and not isinstance(schema, Schema):
            raise InvalidSchema(f"the schema of an application is a Schema, got {quoted(schema)}: see Schema.load")
        if type(hook_seconds_max) not in (int, float) or not hook_seconds_max > 0:
            raise InvalidRule(f"hooks may take {quoted(hook_seconds_max)} seconds: expected a number above 0")
        self.hook_seconds_max = hook_seconds_max
        self.schema = schema if schema is not None else Schema(open=True)
        self.has_schema = schema is not None
        self.indexed_entities = indexed_entities(self.schema)
        self.access_rules: list[AccessRule] = []
        self.synchronization: dict[str, EntitySynchronization] = {}
        self.conflict_policies: dict[str, Merge | Literal["reject_stale"]] = {}
        self._operators = _operator_roles(operators)
        self._hooks: dict[tuple[str, str], list[Hook]] = {}
        self._migrations: dict[str, dict[int, Migration]] = {}
        self._user_lookup: Callable[[str, str], Principal | None] | None = None

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
            InvalidRule: It names what the schema does not have, compares with a value of another type, or is
                made of something else than it should be. For every entity: none of them has what it names.
        """
        what = f"the access rule of {quoted(role)} on {quoted(entity)}"
        _check_role(role, what)
        _check_flag("create", create, what)
        _check_flag("delete", delete, what)
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
            InvalidRule: It names what the schema does not have, a date without a time zone, or no date.
        """
        what = f"the synchronization of {quoted(entity)}"
        self._check_entity(entity, what)
        try:
            offer = download_of(download)
        except (InvalidValue, InvalidConstraint) as error:
            raise InvalidRule(f"{what}: {error}") from error
        self._constraint(entity, offer.where, what)
        _check_flag("uploads", uploads, what)
        _check_date("uploads_until", uploads_until, what)
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
        what = f"the conflict policy of {quoted(entity)}"
        self._check_entity(entity, what)
        if policy != "reject_stale":
            _check_function(policy, what, ("base", "theirs", "mine"), other="'reject_stale' or ")
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
            InvalidRule: The schema has no such entity, or its version is older, or there is one already, or
                it is no such function.
        """
        what = f"the migration of {quoted(entity)} to version {quoted(version)}"
        self._check_entity(entity, what)
        if type(version) is not int or not 1 <= version <= self.schema.version:
            raise InvalidRule(f"{what}: the schema has version {self.schema.version}")

        def register(function: _M) -> _M:
            _check_function(function, what, ("attributes",))
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

        Raises:
            InvalidRule: It is no such function.
        """
        _check_function(lookup, "the lookup of users", ("tenant", "user_id"))
        self._user_lookup = lookup
        return lookup

    def user(self, tenant: str, user_id: str) -> Principal | None:
        """
        Return who a user is today, or None if that is not known.

        Raises:
            TransientError: The function that should say so fails, or names somebody else.
        """
        if self._user_lookup is None:
            return None
        try:
            found: object = self._user_lookup(tenant, user_id)
        except Exception as error:
            _log.exception("the lookup of users failed", tenant=tenant, user_id=user_id)
            raise TransientError(f"the application cannot say who {user_id!r} is: its log has the details") from error
        if found is None:
            return None
        if not isinstance(found, Principal) or (found.tenant, found.user_id) != (tenant, user_id):
            raise TransientError(f"the application was asked who {user_id!r} is, and named somebody else")
        return found

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
        what = f"a {moment} hook of {quoted(entity)}"
        self._check_entity(entity, what)

        def register(hook: _H) -> _H:
            _check_function(hook, what, ("object", "context"))
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
        if isinstance(names, str) and names == EVERYTHING:
            return None
        found = _listed(names, f"{what}: attributes are a list of names or '*'")
        for name in found:
            try:
                check_attribute_name(name)
            except InvalidValue as error:
                raise InvalidRule(f"{what}: {error}") from error
            if not self._has_attribute(entity, name):
                owner = "no entity has an" if entity == EVERYTHING else f"{entity} has no"
                raise InvalidRule(f"{what}: {owner} attribute {name!r}")
        return frozenset(found)

    def _has_attribute(self, entity: str, name: str) -> bool:
        """Tell whether objects of an entity, or of any, may have an attribute."""
        if self.schema.open:
            return True
        about = self.schema.entities.values() if entity == EVERYTHING else (self.schema.entities[entity],)
        return any(name in one.attributes for one in about)

    def _constraint(self, entity: str, where: Where, what: str) -> Constraint | None:
        try:
            constraint = constraint_of(where)
            if constraint is not None:
                self._check_constraint(entity, constraint)
        except InvalidConstraint as error:
            raise InvalidRule(f"{what}: {error}") from error
        return constraint

    def _check_constraint(self, entity: str, constraint: Constraint) -> None:
        if entity != EVERYTHING:
            self.schema.check_constraint(entity, constraint)
        elif not self.schema.open:
            for comparison in comparisons(constraint):
                self._check_for_any(comparison)

    def _check_for_any(self, comparison: Comparison) -> None:
        """Raise InvalidConstraint unless a comparison makes sense for any entity."""
        misfit = InvalidConstraint(f"no entity has an attribute {comparison.attribute!r}")
        for name, declared in self.schema.entities.items():
            if comparison.attribute in declared.attributes:
                try:
                    self.schema.check_constraint(name, comparison)
                except InvalidConstraint as error:
                    misfit = error
                else:
                    return
        raise misfit


def _check_role(role: object, what: str) -> None:
    try:
        check_id(role, "a role")  # type: ignore[arg-type]  # that is the question
    except InvalidValue as error:
        raise InvalidRule(f"{what}: {error}; '*' is everybody") from error


def _check_flag(name: str, flag: object, what: str) -> None:
    # Not what is true in Python: the text "no" is.
    if type(flag) is not bool:
        raise InvalidRule(f"{what}: {name} is {quoted(flag)}, but must be True or False")


def _check_date(name: str, date: object, what: str) -> None:
    if date is not None and not (isinstance(date, datetime) and date.utcoffset() is not None):
        raise InvalidRule(f"{what}: {name} is {quoted(date)}, but must be a datetime with a time zone")


def _operator_roles(operators: Iterable[str]) -> frozenset[str]:
    roles = _listed(operators, "operators are a list of roles")
    for role in roles:
        _check_role(role, "the operators")
        if role == EVERYTHING:
            raise InvalidRule("operators are named by their roles, and '*' is none")
    return frozenset(roles)


def _listed(members: Iterable[str], expected: str) -> list[str]:
    """Return names as a list. A string is iterable too, but never meant as one."""
    if isinstance(members, str) or not isinstance(members, Iterable):
        raise InvalidRule(f"{expected}, got {quoted(members)}")
    return list(members)


def _check_function(function: object, what: str, parameters: tuple[str, ...], *, other: str = "") -> None:
    """Raise InvalidRule unless a function can be called, at once and with so many arguments."""
    expected = f"{what} is {other}a plain function of ({', '.join(parameters)})"
    if not callable(function):
        raise InvalidRule(f"{expected}, got {quoted(function)}")
    name = getattr(function, "__qualname__", quoted(function))
    for one in (function, function.__call__):
        if inspect.iscoroutinefunction(one) or inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise InvalidRule(f"{expected}, which {name} is not: it returns before it has run")
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except Exception:  # noqa: BLE001 - one written in C may have none, and annotations may lead anywhere
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise InvalidRule(f"{expected}, but {name} takes {signature}") from error


_EVERYTHING_SYNCHRONIZED = EntitySynchronization()
_NO_HOOKS: list[Hook] = []
