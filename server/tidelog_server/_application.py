"""
Application: the rules of a business, without any transport.

An application is declared once, when a program starts, and then only read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tidelog._constraints import Where
from tidelog._errors import InvalidSchema, InvalidValue
from tidelog._schema import Schema
from tidelog._values import check_name

if TYPE_CHECKING:
    from tidelog._operation import Operation
    from tidelog_server._principal import Principal


class Reject(Exception):
    """
    Raised by a hook to refuse the operation; the message reaches its author.

    Args:
        message: Why, in a sentence for people. Cut after 1,000 bytes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


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


class Application:
    """
    Schema and hooks.

    A hook is a plain function of (object, context). It runs inside the transaction
    that applies the operation, on the one thread that writes: what it writes
    happens exactly once, and while it runs nobody else's operations are applied,
    so it must be quick. What it raises refuses the operation: `Reject` with the
    hook's own message, anything else as `HOOK_ERROR`, with the traceback in the
    server's log only; `TransientError` refuses nothing and ends the session.

    Args:
        schema: The application's entities. None: everything is accepted.
    """

    def __init__(self, *, schema: Schema | None = None) -> None:
        self.schema = schema if schema is not None else Schema(open=True)
        self.has_schema = schema is not None
        self._hooks: dict[tuple[str, str], list[Hook]] = {}

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
        try:
            check_name(entity, "an entity name")
        except InvalidValue as error:
            raise InvalidSchema(str(error)) from error

        def register(hook: _H) -> _H:
            if inspect.iscoroutinefunction(hook) or inspect.isgeneratorfunction(hook):
                raise InvalidSchema(f"a hook is a plain function, which {hook.__qualname__} is not")
            self._hooks.setdefault((moment, entity), []).append(hook)
            return hook

        return register


_NO_HOOKS: list[Hook] = []
