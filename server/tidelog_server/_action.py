"""
Applying one operation: what it does to its object, and what the application's rules and hooks do besides.

In order: object there -> access -> contents of files are there -> conflict ->
before-hooks -> validation -> references resolve -> written -> after-hooks; and when all operations of a unit are
applied: unique values, and references to what was deleted. What a hook or a deletion
rule does runs through the same steps with the rights of the system, one level deeper,
with `by_hook` set on the change.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from tidelog._errors import InvalidValue, ValidationFailed, quoted
from tidelog._failure import FailureReason
from tidelog._file_reference import may_refer_to_files
from tidelog._keys import ObjectKey
from tidelog._limits import OBJECT_BYTES_MAX
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, check_attributes, patch_setting
from tidelog._values import Attributes, copied, encode, equal
from tidelog_server._access import Denied, Rights
from tidelog_server._application import Application, Hook
from tidelog_server._author import Author
from tidelog_server._conflicts import divergence
from tidelog_server._deadline import paused
from tidelog_server._errors import HistoryCollected
from tidelog_server._file_rules import FileRules
from tidelog_server._hooks import ActionContext, HookedObject, call
from tidelog_server._integrity import Integrity
from tidelog_server._knowledge import Knowledge
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import NO_REPLICA, Change, ObjectState
from tidelog_server._refusal import Refused, Waits

HOOK_DEPTH_MAX: Final = 16
# What hooks and deletion rules may change besides for the operations of one unit.
EFFECTS_MAX: Final = 10_000

_NAMELESS: Final = "an object that this changes besides"


class References:
    """
    Decides about references to objects that are not there.

    While held operations are settled, some creations are taken for granted.

    Attributes:
        assumed: How many creations of each object are taken for granted: those that are still to come.
        used: Those objects that the references of one unit relied upon.
    """

    def __init__(self) -> None:
        self.assumed: Counter[ObjectKey] = Counter()
        self.used: set[ObjectKey] = set()
        self._arrived: list[ObjectKey] = []

    def begin_unit(self) -> None:
        """Take note that the operations of another unit follow."""
        self.used = set()
        self._arrived = []

    def note_created(self, key: ObjectKey) -> None:
        """Take note that a creation is no longer to come: if its object is deleted now, it is gone."""
        if self.assumed[key]:
            self.assumed[key] -= 1
            self._arrived.append(key)

    def end_unit(self, created: Iterable[ObjectKey]) -> None:
        """Take what a unit creates for granted no more: it has come, or will not."""
        self.assumed.update(self._arrived)
        self.assumed.subtract(created)

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
        author: The replica whose operations are applied.
        principal: Who sent them.
        rights: What the principal may do. None: everything, it is the system itself.
        time_us: The server's clock.
        references: Decides about references to objects that are not there.
        files: Decides about references to contents of files.
    """

    def __init__(
        self,
        application: Application,
        overlay: Overlay,
        *,
        author: Author,
        principal: Principal,
        rights: Rights | None,
        time_us: int,
        references: References,
        files: FileRules,
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
        self._knowledge = Knowledge(overlay, self._rights)
        self._first_version = overlay.version
        self._has_effects = self._integrity is not None or self._has_hooks or self._rights is not None
        self._author = author
        self._former_timeline = author.old_bases.timeline if author.old_bases is not None else ""
        self._replica = author.replica
        self._time_us = time_us
        self._references = references
        self.files = files
        self._failure = b""
        self._former_version = 0
        self._position = 0
        self._begin_unit()

    def begin(
        self,
        operation: Operation,
        position: int,
        renamed: bool = False,  # noqa: FBT001, FBT002
        failure: bytes = b"",
        former_version: int = 0,
    ) -> None:
        """
        Attribute what follows to an operation.

        Args:
            operation: The operation.
            position: Its place in its unit; 0 begins a new unit.
            renamed: Whether it was translated from names that the schema has given up.
            failure: Id of the failure that is retried; empty: none is.
            former_version: The version that it was applied at before the store was put back; 0: it was not.
        """
        if position == 0 and self._has_effects:
            self._begin_unit()
        self.operation = operation
        self.depth = 0
        # What is retried has left its replica long ago.
        self.changed_own_object = renamed or bool(failure)
        self._failure = failure
        self._former_version = former_version
        self._position = position
        self.files.begin(operation.patch)
        if self._rights is not None:
            self._own_keys.add(operation.key)

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
                        who = self._name(source) if self._knowledge.sees(source) else "another object"
                        message = f"{self._name(key)} cannot be deleted: {who} refers to it"
                        raise self._blamed(position, FailureReason.REFERENCED, message)

    def create(self, key: ObjectKey, attributes: Attributes, encoded: bytes | None) -> int:
        """Create an object; *encoded* are its attributes' bytes, if the caller has them."""
        entity = key[0]
        wanted = attributes
        if self._has_rules:
            attributes = self._schema.with_defaults(entity, attributes)
        if self._rights is not None and self.depth == 0:
            # Asked first: who may not create is told nothing of what is there.
            try:
                self._rights.entity(entity).check_create(attributes, wanted)
            except Denied as denied:
                raise self._denied(key, "created", denied) from denied
        state = self.overlay.state(key)
        if state is not None and not state.deleted:
            reason = FailureReason.SUPERSEDED if self._former_version else FailureReason.ALREADY_EXISTS
            if self.depth:
                reason = FailureReason.HOOK_ERROR
            raise Refused(reason, f"{self._name(key)} exists already")
        sets_files = encoded is None or may_refer_to_files(encoded)
        if sets_files and not self.depth:
            # Before hooks see it: what they do with it must not tell anybody what is there.
            self.files.check_authored(key, wanted, before=_NOTHING)
        if self._has_hooks and (hooks := self._hooks("before_commit", entity)):
            attributes = self._run_before(hooks, key, attributes, state)
        if attributes is not wanted:
            encoded = None
            if key == self.operation.key:
                self.changed_own_object = True
        if self._has_rules:
            try:
                self._schema.check_object(entity, attributes, key[1])
            except ValidationFailed as error:
                raise self._invalid(key, attributes, error) from error
        if encoded is None:
            encoded = encode(attributes)
            sets_files = may_refer_to_files(encoded)
        self._check_size(key, encoded)
        if self._has_references:
            self._check_references(key, attributes, before=_NOTHING, authored=Patch(wanted))
        if sets_files:
            self.files.check_there(key, attributes, after=attributes)
        version = self.overlay.version + 1
        sole_writer = self.depth == 0 and not self.changed_own_object and self._replica != NO_REPLICA
        new_state = ObjectState(version, version, self._replica, False, sole_writer, encoded)
        self._write(key, OperationKind.CREATE, patch_setting(encoded), b"", state, new_state, attributes, sets_files)
        if self._has_references and self.depth == 0:
            self._references.note_created(key)
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
        if self.depth == 0 and may_refer_to_files(encoded):
            self.files.check_authored(key, patch.set, before=before)
        if self._policies and self.depth == 0:
            merged = self._merged(key, state, before, patch, after)
            if merged is None:
                return self._delete(key, state)
            if merged is not after:
                difference = _difference(before, merged)
                return self._update(key, state, before, merged, difference, difference.encode(), authored=patch)
        return self._update(key, state, before, after, patch, encoded, authored=patch)

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
                    return self._update(key, state, before, merged, patch, patch.encode(), authored=_NO_PATCH)
        return self._delete(key, state)

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Do what follows one level deeper; an error leaves nothing of it, should somebody catch it."""
        if self.depth >= HOOK_DEPTH_MAX:
            self._exhausted = f"hooks of the application called each other more than {HOOK_DEPTH_MAX} deep"
        self._check_not_exhausted()
        with paused():
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
        # The objects that the unit deleted, or gave a unique value, with the place of the operation that did it last.
        self._touched: dict[ObjectKey, int] = {}
        self._restricting: set[ObjectKey] = set()
        # Deleted objects whose referrers are still to be dealt with.
        self._deleted: deque[ObjectKey] = deque()
        self._is_releasing = False
        self._effects_count = 0
        # The refusal that ends the unit, whoever caught it.
        self._exhausted = ""
        self._own_keys: set[ObjectKey] = set()

    def _existing(self, key: ObjectKey) -> ObjectState:
        state = self.overlay.state(key)
        if state is None or state.deleted or not (self.depth or self._knowledge.sees(key)):
            what = "is deleted" if state is not None and state.deleted else "does not exist"
            reason = FailureReason.HOOK_ERROR if self.depth else FailureReason.OBJECT_GONE
            raise Refused(reason, f"{self._name(key)} {what}")
        return state

    def _name(self, key: ObjectKey) -> str:
        """Name an object in a refusal, unless the author may not know of it."""
        if self._rights is None or key in self._own_keys or self._knowledge.knows(key):
            return f"{key[0]} {key[1]!r}"
        return _NAMELESS

    def _readable(self, key: ObjectKey, attributes: Attributes) -> Attributes:
        """Return what the one who writes may know of an object: the system, one level deeper, all of it."""
        if self._rights is None or self.depth:
            return attributes
        return self._rights.entity(key[0]).readable(attributes) or _NOTHING

    def _check_not_exhausted(self) -> None:
        """Refuse again what a hook may have caught."""
        if self._exhausted:
            raise Refused(FailureReason.HOOK_ERROR, self._exhausted)

    def _update(  # noqa: PLR0917 - the parts of one change
        self,
        key: ObjectKey,
        state: ObjectState,
        before: Attributes,
        after: Attributes,
        patch: Patch,
        encoded: bytes,
        *,
        authored: Patch,
    ) -> int:
        if self._has_hooks and (hooks := self._hooks("before_commit", key[0])):
            self.files.note_seen(before, is_stored=True)
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
            new = {name: after[name] for name in written if name in after}
            self._check_references(key, new, before=before, authored=authored)
        if sets_files := may_refer_to_files(encoded):
            self.files.check_there(key, {name: after[name] for name in written if name in after}, after=after)
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
        self._write(key, OperationKind.UPDATE, encoded, images, state, new_state, after, sets_files)
        self._run_after("after_commit", key, after)
        return version

    def _delete(self, key: ObjectKey, state: ObjectState) -> int:
        if self._has_hooks and (hooks := self._hooks("before_delete", key[0])):
            self._run(hooks, HookedObject(key, self.overlay.attributes(key), frozen=True))
            found = self.overlay.state(key)  # the hook may have changed it through its context
            if found is None or found.deleted:
                raise Refused(FailureReason.HOOK_ERROR, f"{self._name(key)} is deleted already")
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
        operation = self.operation
        sight = self._author.sight(operation, self._former_version)
        if sight.base_version > self._first_version:
            sight = sight._replace(base_version=0)  # nobody has ever seen that version
        try:
            found = divergence(
                self.overlay, state, before, operation, self._author, sight, patch, is_retried=bool(self._failure)
            )
        except HistoryCollected as error:
            # Who cannot tell what was changed must not take it for nothing.
            message = f"{key[0]} {key[1]!r} was changed since its author saw it, too long ago to tell by whom"
            raise Refused(FailureReason.CONFLICT, message) from error
        if found is None:
            return after
        if policy == "reject_stale":
            what = (
                f"attribute {found.attribute!r} of {key[0]} {key[1]!r}" if found.attribute else f"{key[0]} {key[1]!r}"
            )
            raise Refused(FailureReason.CONFLICT, f"{what} was changed by somebody else since its author saw it")
        for seen in (before, found.base):
            self.files.note_seen(seen, is_stored=True)
        try:
            mine = None if patch is None else patch.apply(found.mine)
        except InvalidValue as error:
            raise self._unfit(key, before, patch or Patch(), error) from error
        merged = call(
            policy,
            copied(found.base),
            copied(before),
            copied(mine),
            key=key,
            name=self._name(key),
            rejected_as=FailureReason.CONFLICT,
            seconds=self._application.hook_seconds_max,
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
        if not self._knowledge.reads(key, before, {*patch.increment, *patch.add, *patch.remove}):
            said = "what the operation means does not fit the present value"
        return Refused(FailureReason.VALIDATION_FAILED, f"{self._name(key)}: {said}")

    def _invalid(self, key: ObjectKey, attributes: Attributes, error: ValidationFailed) -> Refused:
        """
        Refuse what breaks a rule of the schema.

        An author with an older schema could not know the rule. Who may not read the
        value that comes of an intent is not told what it is.
        """
        is_old = self.depth == 0 and 0 < self.operation.schema_version < self._schema.version
        reason = FailureReason.SCHEMA_MISMATCH if error.is_mismatch or is_old else FailureReason.VALIDATION_FAILED
        if self._name(key) == _NAMELESS:
            return Refused(reason, f"{_NAMELESS} does not fit the schema")
        if error.attribute and not self._knowledge.reads(key, attributes, {error.attribute}):
            return Refused(reason, f"{key[0]} {key[1]!r}: attribute {error.attribute!r} {error.rule}")
        return Refused(reason, error)

    def _check_size(self, key: ObjectKey, encoded: bytes) -> None:
        if len(encoded) > OBJECT_BYTES_MAX:
            # How large only who reads all of it may know.
            size = f" have {len(encoded)} bytes of attributes" if self._rights is None else " be too large"
            raise Refused(FailureReason.TOO_LARGE, f"{self._name(key)} would{size}: the limit is {OBJECT_BYTES_MAX}")

    def _check_references(self, key: ObjectKey, written: Attributes, *, before: Attributes, authored: Patch) -> None:
        """
        Require that what an object newly refers to is there.

        Args:
            key: The object.
            written: The attributes that are written.
            before: What it held before: what it refers to there may stay.
            authored: What its author said. Who may not see an object cannot refer to it,
                and is not told whether it is referred to already; hooks can.
        """
        entity = key[0]
        judged = False
        there: set[tuple[str, ObjectKey]] = set()
        known, said = there, there
        for attribute, target in self._schema.referenced(entity, written):
            if target == key:
                continue
            is_there = self.overlay.exists(target)
            if is_there and (self.depth or self._knowledge.sees(target)):
                continue
            if not judged:
                judged = True
                there = set(self._schema.referenced(entity, before))
                known = set(self._schema.referenced(entity, self._readable(key, before)))
                said = {*self._schema.referenced(entity, authored.set), *self._schema.referenced(entity, authored.add)}
            is_authored = not self.depth and (attribute, target) in said
            if (attribute, target) in (known if is_authored else there) or (is_there and not is_authored):
                continue
            what = f"{target[0]} {target[1]!r}" if is_authored or self._rights is None else "an object"
            self._references.require(
                target, f"{self._name(key)}: attribute {attribute!r} refers to {what}, which does not exist"
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
            f"{name} {quoted(attributes.get(name))}" if self._knowledge.reads(key, attributes, {name}) else name
            for name in names
        )
        return f"{self._name(key)}: {', '.join(values)} is taken by another object"

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
        sets_files: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        by_hook = self.depth > 0
        if by_hook:
            self._effects_count += 1
            if self._effects_count > EFFECTS_MAX:
                self._exhausted = f"hooks and deletion rules would change more than {EFFECTS_MAX} objects besides"
                self._check_not_exhausted()
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
            former_version=self._former_version,
            former_timeline=self._former_timeline if self._former_version else "",
        )
        integrity = self._integrity
        if integrity is None:
            self.overlay.write(change, new_state, attributes, sets_files=sets_files)
            return
        held = self.overlay.attributes(key) if state is not None and not state.deleted else None
        self.overlay.write(change, new_state, attributes, sets_files=sets_files)
        if attributes is None or integrity.note(key, held, attributes):
            self._touched[key] = self._position

    # --- hooks ----------------------------------------------------------------

    def _run_before(
        self, hooks: list[Hook], key: ObjectKey, attributes: Attributes, state: ObjectState | None
    ) -> Attributes:
        """Run before-commit hooks and return the attributes as they leave them: the same object if unchanged."""
        hooked = HookedObject(key, attributes)
        self._run(hooks, hooked, is_stored=False)
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

    def _run(self, hooks: list[Hook], hooked: HookedObject, *, is_stored: bool = True) -> None:
        self.files.note_seen(hooked.attributes, is_stored=is_stored)
        for hook in hooks:
            call(
                hook,
                hooked,
                ActionContext(self),
                key=(hooked.entity, hooked.id),
                name=self._name((hooked.entity, hooked.id)),
                rejected_as=FailureReason.HOOK_REJECTED,
                seconds=self._application.hook_seconds_max,
            )
            self._check_not_exhausted()


def _difference(before: Attributes, after: Attributes) -> Patch:
    return Patch(
        {name: value for name, value in after.items() if name not in before or not equal(before[name], value)},
        tuple(name for name in before if name not in after),
    )


def _clearing(attribute: str, value: object, id_: str) -> Patch:
    """Return the patch that takes a reference to *id_* out of an attribute."""
    return Patch(remove={attribute: [id_]}) if type(value) is list else Patch(unset=(attribute,))


_NOTHING: Final[Attributes] = {}
_NO_PATCH: Final = Patch()
