"""
Applying one operation: what it does to its object, and what the application's rules and hooks do besides.

In order: object there -> access -> conflict -> before-hooks -> validation ->
references resolve -> written -> after-hooks; and when all operations of a unit are
applied: unique values, and references to what was deleted. What a hook or a deletion
rule does runs through the same steps with the rights of the system, one level deeper,
with `by_hook` set on the change.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final

from tidelog._errors import InvalidValue, ValidationFailed, quoted
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import OBJECT_BYTES_MAX
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, check_attributes, patch_setting
from tidelog._values import Attributes, copied, encode, equal
from tidelog_server._access import Denied, Rights
from tidelog_server._application import Application, Hook
from tidelog_server._conflicts import divergence
from tidelog_server._hooks import ActionContext, HookedObject, call
from tidelog_server._integrity import Integrity
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import NO_REPLICA, Change, ObjectState
from tidelog_server._refusal import Refused, Waits

HOOK_DEPTH_MAX: Final = 16
CASCADE_OBJECTS_MAX: Final = 10_000


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
    that writes. `end_unit` checks what only holds once all operations of a unit are
    applied. All raise Refused; what was written until then is the caller's to undo.

    Args:
        application: The rules.
        overlay: Takes the changes.
        replica: Id of the replica whose operations are applied.
        principal: Who sent them.
        rights: What the principal may do. None: everything, it is the system itself.
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
        rights: Rights | None,
        time_us: int,
        references: References,
    ) -> None:
        self.principal = principal
        self.overlay = overlay
        self.depth = 0
        self.changed_own_object = False
        self._application = application
        self._schema = application.schema
        self._has_rules = application.schema.has_rules
        self._has_references = application.schema.has_references
        self._integrity = Integrity(application.schema, overlay) if application.indexed_entities else None
        self._has_hooks = application.has_hooks
        self._hooks = application.hooks
        self._policies = application.conflict_policies
        self._rights = rights if application.access_rules else None
        self._replica = replica
        self._time_us = time_us
        self._references = references
        self._failure = b""
        self._position = 0
        self._begin_unit()

    def begin(self, operation: Operation, position: int, renamed: bool = False, failure: bytes = b"") -> None:  # noqa: FBT001, FBT002 - called for each operation
        """
        Attribute what follows to an operation.

        Args:
            operation: The operation.
            position: Its place in its unit; 0 begins a new unit.
            renamed: Whether it was translated from names that the schema has given up.
            failure: Id of the failure that is retried; empty: none is.
        """
        if position == 0 and self._integrity is not None:
            self._begin_unit()
        self.operation = operation
        self.depth = 0
        # What is retried has left its replica long ago.
        self.changed_own_object = renamed or bool(failure)
        self._failure = failure
        self._position = position

    def end_unit(self) -> None:
        """Check what the operations of a unit must leave behind together."""
        integrity = self._integrity
        if integrity is None:
            return
        for key, position in self._touched.items():
            if self.overlay.exists(key):
                names = integrity.taken(key)
                if names is not None:
                    raise self._blamed(position, FailureReason.UNIQUE_VIOLATED, self._taken_message(key, names))
            elif key in self._restricting:
                for source, attribute in integrity.referrers(key):
                    if self._behaviour(source[0], attribute) == "restrict":
                        who = f"{source[0]} {source[1]!r}" if self._is_seen(source) else "another object"
                        message = f"{key[0]} {key[1]!r} cannot be deleted: {who} refers to it"
                        raise self._blamed(position, FailureReason.REFERENCED, message)

    def create(self, key: ObjectKey, attributes: Attributes, encoded: bytes | None) -> int:
        """Create an object; *encoded* are its attributes' bytes, if the caller has them."""
        entity, id_ = key
        state = self.overlay.state(key)
        if state is not None and not state.deleted:
            raise Refused(FailureReason.ALREADY_EXISTS, f"{entity} {id_!r} exists already")
        wanted = attributes
        if self._has_rules:
            attributes = self._schema.with_defaults(entity, attributes)
        if self._rights is not None and self.depth == 0:
            try:
                self._rights.entity(entity).check_create(attributes, wanted)
            except Denied as denied:
                raise self._denied(key, "created", denied) from denied
        if self._has_hooks and (hooks := self._hooks("before_commit", entity)):
            attributes = self._run_before(hooks, key, attributes, state)
        if attributes is not wanted:
            encoded = None
            if key == self.operation.key:
                self.changed_own_object = True
        if self._has_rules:
            try:
                self._schema.check_object(entity, attributes, id_)
            except ValidationFailed as error:
                raise self._invalid(key, attributes, error) from error
        if encoded is None:
            encoded = encode(attributes)
        self._check_size(key, encoded)
        if self._has_references:
            self._check_references(key, attributes, _NOTHING)
        version = self.overlay.version + 1
        sole_writer = self.depth == 0 and not self.changed_own_object and self._replica != NO_REPLICA
        new_state = ObjectState(version, version, self._replica, False, sole_writer, encoded)
        self._write(key, OperationKind.CREATE, patch_setting(encoded), b"", state, new_state, attributes)
        self._run_after("after_commit", key, attributes)
        return version

    def update(self, key: ObjectKey, patch: Patch, encoded: bytes) -> int:
        """Change an object; *encoded* are the patch's bytes."""
        state = self._existing(key)
        before = self.overlay.attributes(key)
        rights = self._rights.entity(key[0]) if self._rights is not None and self.depth == 0 else None
        try:
            if rights is not None:
                rights.check_written(before, patch.written)
            after = patch.apply(before)
            if rights is not None:
                rights.check_update(before, after, patch.written)
        except InvalidValue as error:
            raise self._unfit(key, before, patch, error) from error
        except Denied as denied:
            raise self._denied(key, "changed", denied) from denied
        if self._policies and self.depth == 0:
            merged = self._merged(key, state, before, patch, after)
            if merged is None:
                return self._delete(key, state)
            if merged is not after:
                after = merged
                patch = _difference(before, after)
                encoded = patch.encode()
        return self._update(key, state, before, after, patch, encoded)

    def delete(self, key: ObjectKey) -> int:
        """Delete an object."""
        state = self._existing(key)
        if self.depth == 0:
            before = self.overlay.attributes(key)
            if self._rights is not None:
                try:
                    self._rights.entity(key[0]).check_delete(before)
                except Denied as denied:
                    raise self._denied(key, "deleted", denied) from denied
            if self._policies:
                merged = self._merged(key, state, before, None, None)
                if merged is not None:
                    patch = _difference(before, merged)
                    return self._update(key, state, before, merged, patch, patch.encode())
        return self._delete(key, state)

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Do what follows one level deeper; an error leaves nothing of it, should somebody catch it."""
        if self.depth >= HOOK_DEPTH_MAX:
            raise Refused(
                FailureReason.HOOK_ERROR,
                f"hooks of the application called each other more than {HOOK_DEPTH_MAX} deep",
            )
        self.depth += 1
        mark = self.overlay.mark()
        try:
            yield
        except BaseException:
            self.overlay.rollback(mark)
            raise
        finally:
            self.depth -= 1

    # --- the steps ------------------------------------------------------------

    def _begin_unit(self) -> None:
        # The objects that the unit wrote, each with the place of the operation that did it last.
        self._touched: dict[ObjectKey, int] = {}
        self._restricting: set[ObjectKey] = set()
        # Deleted objects whose referrers are still to be dealt with.
        self._deleted: deque[ObjectKey] = deque()
        self._is_releasing = False
        self._cascaded_count = 0

    def _existing(self, key: ObjectKey) -> ObjectState:
        state = self.overlay.state(key)
        if state is None or state.deleted or not (self.depth or self._is_seen(key)):
            what = "is deleted" if state is not None and state.deleted else "does not exist"
            raise Refused(FailureReason.OBJECT_GONE, f"{key[0]} {key[1]!r} {what}")
        return state

    def _is_seen(self, key: ObjectKey) -> bool:
        """Tell whether the principal may know of an object that exists."""
        if self._rights is None:
            return True
        rights = self._rights.entity(key[0])
        return rights.reads_everything or rights.sees(self.overlay.attributes(key))

    def _update(  # noqa: PLR0917 - the parts of one change
        self, key: ObjectKey, state: ObjectState, before: Attributes, after: Attributes, patch: Patch, encoded: bytes
    ) -> int:
        if self._has_hooks and (hooks := self._hooks("before_commit", key[0])):
            wanted, after = after, self._run_before(hooks, key, after, state)
            if after is not wanted:
                patch = _difference(before, after)
                encoded = patch.encode()
        written = patch.written
        if self._has_rules:
            try:
                self._schema.check_written(key[0], after, written, key[1])
            except ValidationFailed as error:
                raise self._invalid(key, after, error) from error
        if self._has_references:
            self._check_references(key, {name: after[name] for name in written if name in after}, before)
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

    def _delete(self, key: ObjectKey, state: ObjectState) -> int:
        if self._has_hooks and (hooks := self._hooks("before_delete", key[0])):
            self._run(hooks, HookedObject(key, self.overlay.attributes(key), frozen=True))
            found = self.overlay.state(key)  # the hook may have changed it through its context
            if found is None or found.deleted:
                raise Refused(FailureReason.OBJECT_GONE, f"{key[0]} {key[1]!r} is deleted")
            state = found
        before = self.overlay.attributes(key)
        version = self.overlay.version + 1
        tombstone = ObjectState(version, state.created, state.creator, True, False, b"")
        self._write(key, OperationKind.DELETE, b"", state.attributes, state, tombstone, None)
        self._run_after("after_delete", key, before)
        if self._integrity is not None:
            self._release_referrers(key, self._integrity)
        return version

    def _merged(
        self, key: ObjectKey, state: ObjectState, before: Attributes, patch: Patch | None, after: Attributes | None
    ) -> Attributes | None:
        """Return what an operation makes of its object by the entity's conflict policy: *after* without a conflict."""
        policy = self._policies.get(key[0])
        if policy is None:
            return after
        found = divergence(
            self.overlay, state, before, self.operation, self._replica, patch, is_retried=bool(self._failure)
        )
        if found is None:
            return after
        if policy == "reject_stale":
            what = (
                f"attribute {found.attribute!r} of {key[0]} {key[1]!r}" if found.attribute else f"{key[0]} {key[1]!r}"
            )
            raise Refused(FailureReason.CONFLICT, f"{what} was changed by somebody else since its author saw it")
        try:
            mine = None if patch is None else patch.apply(found.mine)
        except InvalidValue as error:
            raise self._unfit(key, before, patch or Patch(), error) from error
        merged = call(
            policy, copied(found.base), copied(before), copied(mine), key=key, rejected_as=FailureReason.CONFLICT
        )
        if merged is not None:
            try:
                if type(merged) is not dict:
                    raise InvalidValue(f"expected a dict of attributes or None, got {type(merged).__name__}")
                check_attributes(merged)
            except InvalidValue as error:
                message = f"the conflict policy of {key[0]}: {error}"
                raise Refused(FailureReason.HOOK_ERROR, message) from error
        self.changed_own_object = True
        return merged  # type: ignore[no-any-return]

    def _denied(self, key: ObjectKey, what: str, denied: Denied) -> Refused:
        if denied.attribute:
            message = f"attribute {denied.attribute!r} of {key[0]} {key[1]!r} may not be written by this user"
            return Refused(FailureReason.ATTRIBUTE_DENIED, message)
        return Refused(FailureReason.ACCESS_DENIED, f"{key[0]} {key[1]!r} may not be {what} like this by this user")

    def _unfit(self, key: ObjectKey, before: Attributes, patch: Patch, error: InvalidValue) -> Refused:
        """Refuse an intent that does not fit what is there; who may not read that is not told what it is."""
        said: object = error
        if not self._reads(key, before, {*patch.increment, *patch.add, *patch.remove}):
            said = "what the operation means does not fit the present value"
        return Refused(FailureReason.VALIDATION_FAILED, f"{key[0]} {key[1]!r}: {said}")

    def _invalid(self, key: ObjectKey, attributes: Attributes, error: ValidationFailed) -> Refused:
        """
        Refuse what breaks a rule of the schema.

        An author with an older schema could not know the rule. Who may not read the
        value that comes of an intent is not told what it is.
        """
        is_old = self.depth == 0 and 0 < self.operation.schema_version < self._schema.version
        reason = FailureReason.SCHEMA_MISMATCH if error.is_mismatch or is_old else FailureReason.VALIDATION_FAILED
        if error.attribute and not self._reads(key, attributes, {error.attribute}):
            return Refused(reason, f"{key[0]} {key[1]!r}: attribute {error.attribute!r} {error.rule}")
        return Refused(reason, error)

    def _reads(self, key: ObjectKey, attributes: Attributes, names: Collection[str]) -> bool:
        """Tell whether the author may know what these attributes of an object are."""
        if self._rights is None:
            return True
        readable = self._rights.entity(key[0]).readable(attributes)
        return readable is attributes or (
            readable is not None and all(name in readable or name not in attributes for name in names)
        )

    def _check_size(self, key: ObjectKey, encoded: bytes) -> None:
        if len(encoded) > OBJECT_BYTES_MAX:
            raise Refused(
                FailureReason.TOO_LARGE,
                f"{key[0]} {key[1]!r} would have {len(encoded)} bytes of attributes: the limit is {OBJECT_BYTES_MAX}",
            )

    def _check_references(self, key: ObjectKey, written: Attributes, before: Attributes) -> None:
        entity, id_ = key
        known: set[tuple[str, ObjectKey]] | None = None
        for attribute, target in self._schema.referenced(entity, written):
            if target == key:
                continue
            # Who may not see the target cannot refer to it.
            if self.overlay.exists(target) and (self.depth or self._is_seen(target)):
                continue
            # What was there before may stay.
            if known is None:
                known = set(self._schema.referenced(entity, before))
            if (attribute, target) in known:
                continue
            self._references.require(
                target,
                f"{entity} {id_!r}: attribute {attribute!r} refers to {target[0]} {target[1]!r}, which does not exist",
            )

    def _release_referrers(self, key: ObjectKey, integrity: Integrity) -> None:
        """Do what the schema says to the objects that refer to a deleted one, and to those that refer to them."""
        if not self._schema.referrers(key[0]):
            return
        self._deleted.append(key)
        if self._is_releasing:
            return  # further up: a chain of any length needs no deeper stack
        self._is_releasing = True
        try:
            while self._deleted:
                target = self._deleted.popleft()
                for source, attribute in integrity.referrers(target):
                    self._release(target, source, attribute)
        finally:
            self._is_releasing = False
            self._deleted.clear()

    def _release(self, target: ObjectKey, source: ObjectKey, attribute: str) -> None:
        """Do what the schema says to an object that refers to a deleted one."""
        behaviour = self._behaviour(source[0], attribute)
        if behaviour == "restrict":
            self._restricting.add(target)
        if behaviour in {"restrict", "keep"} or not self.overlay.exists(source):
            return
        self._cascaded_count += 1
        if self._cascaded_count > CASCADE_OBJECTS_MAX:
            message = f"the deletion would change more than {CASCADE_OBJECTS_MAX} objects that refer to it"
            raise Refused(FailureReason.TOO_LARGE, message)
        with self.deeper():
            if behaviour == "cascade":
                self.delete(source)
            else:
                cleared = _clearing(attribute, self.overlay.attributes(source)[attribute], target[1])
                self.update(source, cleared, cleared.encode())

    def _behaviour(self, entity: str, attribute: str) -> str:
        return next((one.on_delete for one in self._schema.references(entity) if one.attribute == attribute), "keep")

    def _taken_message(self, key: ObjectKey, names: tuple[str, ...]) -> str:
        attributes = self.overlay.attributes(key)
        values = (
            f"{name} {quoted(attributes.get(name))}" if self._reads(key, attributes, {name}) else name
            for name in names
        )
        return f"{key[0]} {key[1]!r}: {', '.join(values)} is taken by another {key[0]}"

    def _blamed(self, position: int, reason: FailureReason, message: str) -> Refused:
        refusal = Refused(reason, message)
        refusal.position = position
        return refusal

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
            self._failure,
        )
        self.overlay.write(change, new_state, attributes)
        if self._integrity is not None:
            self._touched[key] = self._position
            if attributes is not None:
                self._integrity.note(key, attributes)

    # --- hooks ----------------------------------------------------------------

    def _run_before(
        self, hooks: list[Hook], key: ObjectKey, attributes: Attributes, state: ObjectState | None
    ) -> Attributes:
        """Run before-commit hooks and return the attributes as they leave them: the same object if unchanged."""
        hooked = HookedObject(key, attributes)
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
            self._run(hooks, HookedObject(key, attributes, frozen=True))

    def _run(self, hooks: list[Hook], hooked: HookedObject) -> None:
        for hook in hooks:
            call(
                hook,
                hooked,
                ActionContext(self),
                key=(hooked.entity, hooked.id),
                rejected_as=FailureReason.HOOK_REJECTED,
            )


def _difference(before: Attributes, after: Attributes) -> Patch:
    return Patch(
        {name: value for name, value in after.items() if name not in before or not equal(before[name], value)},
        tuple(name for name in before if name not in after),
    )


def _clearing(attribute: str, value: object, id_: str) -> Patch:
    """Return the patch that takes a reference to *id_* out of an attribute."""
    return Patch(remove={attribute: [id_]}) if type(value) is list else Patch(unset=(attribute,))


_NOTHING: Final[Attributes] = {}
