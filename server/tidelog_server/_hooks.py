"""
Hooks at work: what the application's functions get to see and do while an operation is applied.

See `HookObject` and `HookContext` for what is promised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any

import uuid_utils

from tidelog._constraints import Where, constraint_of
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._logging import get_logger
from tidelog._operation import Operation
from tidelog._patch import Patch, check_attribute_name
from tidelog._values import Attributes, check, check_id, check_name, copied
from tidelog_server._application import Reject, TransientError
from tidelog_server._deadline import DeadlineExceeded, run
from tidelog_server._errors import ServerOutdated, StoreUnavailable
from tidelog_server._principal import Principal
from tidelog_server._refusal import NotReady, Refused, Waits

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidelog_server._action import Action

_log = get_logger("tidelog.hooks")


def call(
    function: Callable[..., Any],
    *arguments: object,
    key: ObjectKey,
    name: str,
    rejected_as: FailureReason,
    seconds: float,
) -> Any:
    """
    Call a function of the application, and turn whatever it raises into what settles the operation.

    Args:
        function: The function.
        arguments: What it gets.
        key: The object that it is called about.
        name: What the object is called in a refusal.
        rejected_as: Why the operation is refused if the function raises Reject.
        seconds: How long it may take.

    Raises:
        Refused: The function rejects, or it is broken.
        Waits, NotReady, TransientError: As the function, or what it called, says.
        StoreUnavailable, ServerOutdated: What it called could not read the store.
    """
    try:
        result: object = run(function, *arguments, seconds=seconds)
        if isinstance(result, Awaitable):
            raise TypeError("the function returned an awaitable, which nobody awaits")
    except Reject as rejection:
        raise Refused(rejected_as, rejection.message, code=rejection.code) from rejection
    except (Refused, Waits, NotReady, TransientError, StoreUnavailable, ServerOutdated):
        raise
    except DeadlineExceeded as error:
        hook = getattr(function, "__qualname__", repr(function))
        _log.exception("hook took too long", hook=hook, entity=key[0], id=key[1], limit_seconds=seconds)
        message = f"the application took longer than {seconds:g} seconds on {name}"
        raise Refused(FailureReason.HOOK_ERROR, message) from error
    except BaseException as error:
        # Whatever the application's code raises settles the operation as a failure: it must not
        # end the session, and the traceback must not reach the client. Not even what ends a
        # program elsewhere ends this thread, which serves everybody.
        hook = getattr(function, "__qualname__", repr(function))
        _log.exception("hook failed", hook=hook, entity=key[0], id=key[1])
        message = f"the application failed on {name}: the server's log has the details"
        raise Refused(FailureReason.HOOK_ERROR, message) from error
    return result


class HookedObject:
    """The object that a hook gets, with attributes of its own. See `HookObject`."""

    def __init__(self, key: ObjectKey, attributes: Attributes, *, frozen: bool = False) -> None:
        self.entity, self.id = key
        self.attributes: Attributes = copied(attributes)
        self._frozen = frozen

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes.get(attribute)

    def __contains__(self, attribute: object) -> bool:
        return attribute in self.attributes

    def __setitem__(self, attribute: str, value: Any) -> None:
        check_attribute_name(attribute)
        check(value, f"attribute {attribute!r}")
        self._writable()[attribute] = value

    def __delitem__(self, attribute: str) -> None:
        self._writable().pop(attribute, None)

    def to_dict(self) -> dict[str, Any]:
        return copied(self.attributes)  # type: ignore[no-any-return]

    def _writable(self) -> Attributes:
        if self._frozen:
            raise TypeError("only a before-commit hook sets attributes: use context.update here")
        return self.attributes


class ActionContext:
    """What a hook may use besides its object. See `HookContext`."""

    def __init__(self, action: Action) -> None:
        self._action = action

    @property
    def principal(self) -> Principal:
        return self._action.principal

    @property
    def operation(self) -> Operation:
        return self._action.operation

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002
        overlay = self._action.overlay
        return self._shown(overlay.attributes((entity, id))) if overlay.exists((entity, id)) else None

    def query(self, entity: str, where: Where = None) -> Iterator[tuple[str, dict[str, Any]]]:
        constraint = constraint_of(where)
        overlay = self._action.overlay
        for key, attributes in overlay.entity_objects(entity):
            if constraint is None or constraint.matches(attributes):
                yield key[1], self._shown(attributes)

    def create(self, entity: str, attributes: dict[str, Any], id: str | None = None) -> str:  # noqa: A002
        id_ = str(uuid_utils.uuid7()) if id is None else id
        check_name(entity, "an entity name")
        check_id(id_)
        Patch(attributes).check()
        with self._action.deeper():
            self._action.create((entity, id_), copied(attributes), None)
        return id_

    def update(self, entity: str, id: str, attributes: dict[str, Any]) -> None:  # noqa: A002
        patch = Patch(copied(attributes))
        patch.check()
        with self._action.deeper():
            self._action.update((entity, id), patch, patch.encode())

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        with self._action.deeper():
            self._action.delete((entity, id))

    def _shown(self, attributes: Attributes) -> dict[str, Any]:
        self._action.files.note_seen(attributes, is_stored=True)
        return copied(attributes)  # type: ignore[no-any-return]
