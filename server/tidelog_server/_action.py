"""
Applying one operation: what it does to its object, and what the application's hooks do besides.

In order: object there -> patch applied -> before-hooks -> references resolve ->
written -> after-hooks. What a hook does runs through the same steps, one level
deeper, with `by_hook` set on the change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import uuid_utils

from tidelog._constraints import Where, constraint_of
from tidelog._errors import InvalidValue
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import OBJECT_BYTES_MAX
from tidelog._logging import get_logger
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, check_attribute_name, check_attributes, patch_setting
from tidelog._values import Attributes, check, check_id, check_name, copied, encode, equal
from tidelog_server._application import Application, Hook, Reject, TransientError
from tidelog_server._errors import for_people
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import Change, ObjectState

HOOK_DEPTH_MAX = 16

_log = get_logger("tidelog.hooks")


class Refused(Exception):
    """The operation is refused."""

    def __init__(self, reason: FailureReason, message: object, *, cause: bytes = b"") -> None:
        self.message = for_people(message)
        super().__init__(self.message)
        self.reason = reason
        self.cause = cause
        self.position = 0


class Waits(Exception):
    """The operation refers to an object that has not arrived."""

    def __init__(self, target: ObjectKey, message: str) -> None:
        self.message = for_people(message)
        super().__init__(self.message)
        self.target = target


class References:
    """
    Decides about references to objects that are not there.

    While held operations are settled, some creations are taken for granted.

    Attributes:
        assumed: How many creations of each object are taken for granted.
        used: Those objects that the references of one unit relied upon.
    """

    def __init__(self) -> None:
        self.assumed: Counter[ObjectKey] = Counter()
        self.used: set[ObjectKey] = set()

    def require(self, target: ObjectKey, message: str) -> None:
        """Pass, or raise Waits."""
        if not self.assumed[target]:
            raise Waits(target, message)
        self.used.add(target)


class Action:
    """
    Applies operations to an overlay, with everything that their hooks do meanwhile.

    `begin` says whose effects follow: what is written from then on is attributed to
    that operation. `depth` is 0 for the operation itself and rises with each hook
    that writes.

    Args:
        application: Schema and hooks.
        overlay: Takes the changes.
        replica: Id of the replica whose operations are applied.
        principal: Who sent them.
        time_us: The server's clock.
        references: Decides about references to objects that are not there.
    """

    def __init__(
        self,
        application: Application,
        overlay: Overlay,
        *,
        replica: bytes,
        principal: Principal,
        time_us: int,
        references: References,
    ) -> None:
        self.principal = principal
        self.overlay = overlay
        self.depth = 0
        self.changed_own_object = False
        self._schema = application.schema
        self._has_references = application.schema.has_references
        self._has_hooks = application.has_hooks
        self._hooks = application.hooks
        self._replica = replica
        self._time_us = time_us
        self._references = references

    def begin(self, operation: Operation) -> None:
        """Attribute what follows to an operation."""
        self.operation = operation
        self.depth = 0
        self.changed_own_object = False

    def create(self, key: ObjectKey, attributes: Attributes, encoded: bytes | None) -> int:
        """Create an object; *encoded* are its attributes' bytes, if the caller has them."""
        entity, id_ = key
        state = self.overlay.state(key)
        if state is not None and not state.deleted:
            raise Refused(FailureReason.ALREADY_EXISTS, f"{entity} {id_!r} exists already")
        if self._has_hooks and (hooks := self._hooks("before_commit", entity)):
            wanted, attributes = attributes, self._run_before(hooks, key, attributes, state)
            if attributes is not wanted:
                encoded = None
        if encoded is None:
            encoded = encode(attributes)
        self._check_size(key, encoded)
        self._check_references(key, attributes)
        version = self.overlay.version + 1
        sole_writer = self.depth == 0 and not self.changed_own_object
        new_state = ObjectState(version, version, self._replica, False, sole_writer, encoded)
        self._write(key, OperationKind.CREATE, patch_setting(encoded), b"", state, new_state, attributes)
        self._run_after("after_commit", key, attributes)
        return version

    def update(self, key: ObjectKey, patch: Patch, encoded: bytes) -> int:
        """Change an object; *encoded* are the patch's bytes."""
        entity, id_ = key
        state = self._existing(key)
        before = self.overlay.attributes(key)
        try:
            after = patch.apply(before)
        except InvalidValue as error:
            raise Refused(FailureReason.VALIDATION_FAILED, f"{entity} {id_!r}: {error}") from error
        if self._has_hooks and (hooks := self._hooks("before_commit", entity)):
            wanted, after = after, self._run_before(hooks, key, after, state)
            if after is not wanted:
                patch = _difference(before, after)
                encoded = patch.encode()
        written = patch.written
        self._check_references(key, {name: after[name] for name in written if name in after})
        after_encoded = encode(after)
        self._check_size(key, after_encoded)
        images = encode(
            [
                {name: before[name] for name in written if name in before},
                [name for name in written if name not in before],
            ]
        )
        version = self.overlay.version + 1
        sole_writer = (
            state.sole_writer
            and state.creator == self._replica
            and self.depth == 0
            and not self.changed_own_object
            and not patch.has_intents
        )
        new_state = ObjectState(version, state.created, state.creator, False, sole_writer, after_encoded)
        self._write(key, OperationKind.UPDATE, encoded, images, state, new_state, after)
        self._run_after("after_commit", key, after)
        return version

    def delete(self, key: ObjectKey) -> int:
        """Delete an object."""
        state = self._existing(key)
        if self._has_hooks and (hooks := self._hooks("before_delete", key[0])):
            self._run(hooks, _HookedObject(key, self.overlay.attributes(key), frozen=True))
            state = self._existing(key)  # the hook may have changed it through its context
        before = self.overlay.attributes(key)
        version = self.overlay.version + 1
        tombstone = ObjectState(version, state.created, state.creator, True, False, b"")
        self._write(key, OperationKind.DELETE, b"", state.attributes, state, tombstone, None)
        self._run_after("after_delete", key, before)
        return version

    def _existing(self, key: ObjectKey) -> ObjectState:
        state = self.overlay.state(key)
        if state is None or state.deleted:
            what = "does not exist" if state is None else "is deleted"
            raise Refused(FailureReason.OBJECT_GONE, f"{key[0]} {key[1]!r} {what}")
        return state

    def _check_size(self, key: ObjectKey, encoded: bytes) -> None:
        if len(encoded) > OBJECT_BYTES_MAX:
            raise Refused(
                FailureReason.TOO_LARGE,
                f"{key[0]} {key[1]!r} would have {len(encoded)} bytes of attributes: the limit is {OBJECT_BYTES_MAX}",
            )

    def _check_references(self, key: ObjectKey, written: Attributes) -> None:
        if not self._has_references:
            return
        entity, id_ = key
        for attribute, target in self._schema.referenced(entity, written):
            if target != key and not self.overlay.exists(target):
                self._references.require(
                    target,
                    f"{entity} {id_!r}: attribute {attribute!r} refers to {target[0]} {target[1]!r}, "
                    "which does not exist",
                )

    def _write(  # noqa: PLR0917 - the parts of one change
        self,
        key: ObjectKey,
        kind: OperationKind,
        patch: bytes,
        before: bytes,
        state: ObjectState | None,
        new_state: ObjectState,
        attributes: Attributes | None,
    ) -> None:
        by_hook = self.depth > 0
        if by_hook and key == self.operation.key:
            self.changed_own_object = True
        change = Change(
            new_state.version,
            key,
            kind,
            patch,
            before,
            state.version if state is not None else 0,
            self._replica,
            self.operation.seq,
            by_hook,
            self.principal.user_id,
            self._time_us,
        )
        self.overlay.write(change, new_state, attributes)

    # --- hooks ----------------------------------------------------------------

    def _run_before(
        self, hooks: list[Hook], key: ObjectKey, attributes: Attributes, state: ObjectState | None
    ) -> Attributes:
        """Run before-commit hooks and return the attributes as they leave them: the same object if unchanged."""
        hooked = _HookedObject(key, attributes)
        self._run(hooks, hooked)
        if self.overlay.state(key) is not state:
            raise Refused(
                FailureReason.HOOK_ERROR,
                f"a before-commit hook of {key[0]} wrote its own object through the context "
                "instead of setting its attributes",
            )
        if equal(hooked.attributes, attributes):
            return attributes
        try:
            check_attributes(hooked.attributes)
        except InvalidValue as error:
            raise Refused(FailureReason.HOOK_ERROR, f"a before-commit hook of {key[0]}: {error}") from error
        if key == self.operation.key:
            self.changed_own_object = True
        return hooked.attributes

    def _run_after(self, moment: str, key: ObjectKey, attributes: Attributes) -> None:
        if self._has_hooks and (hooks := self._hooks(moment, key[0])):
            self._run(hooks, _HookedObject(key, attributes, frozen=True))

    def _run(self, hooks: list[Hook], hooked: _HookedObject) -> None:
        for hook in hooks:
            try:
                result: object = hook(hooked, _HookContext(self))
                if isinstance(result, Awaitable):
                    raise TypeError("the hook returned an awaitable, which nobody awaits")
            except Reject as rejection:
                raise Refused(FailureReason.HOOK_REJECTED, rejection.message) from rejection
            except (Refused, Waits, TransientError):
                raise
            except BaseException as error:
                # Whatever the application's code raises settles the operation as a failure: it must not
                # end the session, and the traceback must not reach the client. Not even what ends a
                # program elsewhere ends this thread, which serves everybody.
                name = getattr(hook, "__qualname__", repr(hook))
                _log.exception("hook failed", hook=name, entity=hooked.entity, id=hooked.id)
                raise Refused(
                    FailureReason.HOOK_ERROR,
                    f"the application failed on {hooked.entity} {hooked.id!r}: the server's log has the details",
                ) from error


class _HookedObject:
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


class _HookContext:
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
        return copied(overlay.attributes((entity, id))) if overlay.exists((entity, id)) else None

    def query(self, entity: str, where: Where = None) -> Iterator[tuple[str, dict[str, Any]]]:
        constraint = constraint_of(where)
        overlay = self._action.overlay
        for key, attributes in overlay.entity_objects(entity):
            if constraint is None or constraint.matches(attributes):
                yield key[1], copied(attributes)

    def create(self, entity: str, attributes: dict[str, Any], id: str | None = None) -> str:  # noqa: A002
        id_ = str(uuid_utils.uuid7()) if id is None else id
        check_name(entity, "an entity name")
        check_id(id_)
        Patch(attributes).check()
        with self._deeper():
            self._action.create((entity, id_), copied(attributes), None)
        return id_

    def update(self, entity: str, id: str, attributes: dict[str, Any]) -> None:  # noqa: A002
        patch = Patch(copied(attributes))
        patch.check()
        with self._deeper():
            self._action.update((entity, id), patch, patch.encode())

    def delete(self, entity: str, id: str) -> None:  # noqa: A002
        with self._deeper():
            self._action.delete((entity, id))

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        action = self._action
        if action.depth >= HOOK_DEPTH_MAX:
            raise Refused(
                FailureReason.HOOK_ERROR,
                f"hooks of the application called each other more than {HOOK_DEPTH_MAX} deep",
            )
        action.depth += 1
        mark = action.overlay.mark()
        try:
            yield
        except BaseException:
            action.overlay.rollback(mark)  # should the hook catch it, no half of a write stays behind
            raise
        finally:
            action.depth -= 1


def _difference(before: Attributes, after: Attributes) -> Patch:
    return Patch(
        {name: value for name, value in after.items() if name not in before or not equal(before[name], value)},
        tuple(name for name in before if name not in after),
    )
