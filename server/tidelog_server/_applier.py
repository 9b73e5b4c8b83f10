"""
Applying units: all operations of one, or none and no trace of them.

What can be said of an operation before the rules are asked is said here: it can be
read, its entity takes uploads, its object is there and is the one that its author saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tidelog._errors import LimitExceeded, ValidationFailed
from tidelog._failure import FailureReason
from tidelog._logging import get_logger
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, encoded_attributes
from tidelog._values import Attributes, equal
from tidelog_server._access import Rights
from tidelog_server._action import Action, References
from tidelog_server._application import Application
from tidelog_server._author import Author
from tidelog_server._conflicts import is_superseded
from tidelog_server._file_records import file_writes
from tidelog_server._file_rules import FileRules
from tidelog_server._indexes import IndexWrites, index_lookups, index_writes
from tidelog_server._knowledge import Knowledge
from tidelog_server._outcomes import Applied, Outcomes
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import FailureRecord, ObjectState
from tidelog_server._refusal import Refused, Waits
from tidelog_server._units import Member, Unit
from tidelog_server._upload_records import without_settled

# What a mistake in a program raises, as opposed to a failing disk or a lack of memory.
_DEFECTS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)

_log = get_logger("tidelog.engine")


class LeftOut(NamedTuple):
    """
    What was left out of an operation that is offered again: files whose contents nobody has any more.

    Attributes:
        operation: The operation.
        files: The values of its attributes that were left out.
        held: What these attributes held before, if anything.
    """

    operation: Operation
    files: Attributes
    held: Attributes

    def missing_in(self, attributes: Attributes) -> Attributes:
        """Return those that an object still lacks: nothing else came in their place."""
        held = self.held
        return {
            name: value
            for name, value in self.files.items()
            if (name in attributes) is (name in held) and equal(attributes.get(name), held.get(name))
        }


class UnitApplier:
    """
    Applies the units of one replica to an overlay.

    Attributes:
        left_out: What operations were applied without, if they were, by seq.

    Args:
        application: The rules.
        overlay: Takes what they do.
        references: Decides about references to objects that are not there.
        outcomes: Knows which creations were refused.
        author: The replica.
        principal: Whose operations they are.
        rights: What the principal may do.
        time_us: The server's clock.
        files: Decides about references to contents of files.
    """

    def __init__(
        self,
        application: Application,
        overlay: Overlay,
        references: References,
        outcomes: Outcomes,
        *,
        author: Author,
        principal: Principal,
        rights: Rights,
        time_us: int,
        files: FileRules,
    ) -> None:
        self._application = application
        self._overlay = overlay
        self._synchronization = application.synchronization
        self._outcomes = outcomes
        self.left_out: dict[int, LeftOut] = {}
        author = author._replace(has_applied=outcomes.has_applied)
        self._author = author
        self._knowledge = Knowledge(overlay, rights if application.access_rules else None)
        self._time_us = time_us
        self._files = files
        self._action = Action(
            application,
            overlay,
            author=author,
            principal=principal,
            rights=rights,
            time_us=time_us,
            references=references,
            files=files,
        )

    def apply(self, unit: Unit, failure: bytes = b"") -> list[Applied]:
        """
        Apply all members, or leave no trace.

        Args:
            unit: The operations.
            failure: Id of the failure that is retried; empty: none is.

        Raises:
            Refused, Waits, NotReady: Nothing of the unit is applied.
            TransientError: The application cannot tell now.
        """
        mark = self._overlay.mark()
        applied: list[Applied] = []
        try:
            for member in unit:
                applied.append(self._apply(member, len(applied), failure))
            self._action.end_unit()
        except (Refused, Waits) as verdict:
            if len(applied) < len(unit):
                verdict.position = len(applied)
            self._overlay.rollback(mark)
            raise
        except _DEFECTS as error:
            # A defect of this program must not stop what comes behind the operation that shows it.
            self._overlay.rollback(mark)
            position = min(len(applied), len(unit) - 1)
            _log.exception("evaluation failed", seq=unit[position].seq)
            failed = Refused(FailureReason.HOOK_ERROR, "the server failed on it: the server's log has the details")
            failed.position = position
            raise failed from error
        except BaseException:
            self._overlay.rollback(mark)
            raise
        return applied

    def index_writes(self, failures: Sequence[FailureRecord]) -> IndexWrites:
        """Return what changes in the table of indexes because of what was applied, and of the failures written."""
        files = {
            **file_writes(self._overlay, failures, self._time_us),
            **without_settled(self._files.referred(), self._overlay.index),
        }
        indexed = self._application.indexed_entities
        if not indexed:
            return files
        schema, overlay, written = self._application.schema, self._overlay, list(self._overlay.written(indexed))
        overlay.prefetch_index(index_lookups(schema, written))
        return {**index_writes(schema, written, overlay.index), **files}

    def _apply(self, member: Member, position: int, failure: bytes) -> Applied:
        operation = member.operation
        if member.error is not None or operation is None:
            raise Refused(_reason_of(member.error), str(member.error))
        key = (operation.entity, operation.id)
        if self._synchronization and not self._application.synchronization_of(key[0]).takes_uploads(self._time_us):
            raise Refused(FailureReason.ACCESS_DENIED, f"{key[0]} is not changed by replicas")
        base_version = operation.base_version
        former_version = 0
        if member.former is not None:
            former_version = member.former.version
            self._check_not_superseded(operation, member.patch, former_version)
            member = self._without_lost(member, operation)
            operation = member.operation or operation
        author = self._author
        if author.old_bases is not None:
            base_version = author.sight(operation, former_version).base_version
        action = self._action
        action.begin(operation, position, member.renamed, failure, former_version)
        if operation.kind is OperationKind.CREATE:
            version = action.create(key, member.patch.set, encoded_attributes(operation.patch))
        else:
            state = self._overlay.state(key)
            if state is None or not self._knowledge.knows(key):
                if state is None and self._was_collected(operation):
                    return (self._overlay.version, False)  # as if the tombstone were there
                cause = self._outcomes.refused_creation(key)
                raise Refused(
                    FailureReason.DEPENDENCY_FAILED if cause else FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} " + ("could not be created" if cause else "does not exist"),
                    cause=cause or b"",
                )
            if operation.kind is OperationKind.DELETE and state.deleted:
                # Nothing changes, and that has been so up to this version.
                return (self._overlay.version, False)
            # Another incarnation than the author saw; an author who created this one has seen it.
            if base_version < state.created and not self._has_seen(state, operation, former_version):
                # Nor was it ever seen by an author whose own creation was refused.
                cause = self._outcomes.late_creation(key, state.created) if not operation.base_version else None
                if cause:
                    message = f"{key[0]} {key[1]!r} could not be created"
                    raise Refused(FailureReason.DEPENDENCY_FAILED, message, cause=cause)
                raise Refused(
                    FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} was deleted and created again since its author saw it",
                )
            if operation.kind is OperationKind.DELETE:
                version = action.delete(key)
            else:
                version = action.update(key, member.patch, operation.patch)
        return (version, action.changed_own_object)

    def _without_lost(self, member: Member, operation: Operation) -> Member:
        """
        Return what is offered again without the files whose contents nobody has any more.

        It was applied once, and the rest of it is not to be lost with them. What is left out is not lost either.
        """
        if not self._files.lost:
            return member
        key = operation.key
        before = self._overlay.attributes(key) if self._overlay.exists(key) else {}
        lost = self._files.lost_in(key, member.patch.set, before=before)
        if not lost:
            return member
        written = member.patch.set
        self.left_out[operation.seq] = LeftOut(
            operation,
            {name: written[name] for name in lost},
            {name: before[name] for name in lost if name in before},
        )
        patch = member.patch._replace(set={name: value for name, value in written.items() if name not in lost})
        return member._replace(patch=patch, operation=operation._replace(patch=patch.encode()), renamed=True)

    def _has_seen(self, state: ObjectState, operation: Operation, former_version: int) -> bool:
        """Tell whether the author knows an incarnation that began above the operation's base version."""
        author = self._author
        if state.creator == author.replica:
            return True
        creation = self._overlay.change(state.created)
        if creation is None:
            return False
        if author.may_have_created(state) and author.wrote(creation):
            return True
        return author.old_bases is not None and author.sight(operation, former_version).covers(creation)

    def _check_not_superseded(self, operation: Operation, patch: Patch, former_version: int) -> None:
        """Refuse what is offered again if somebody else took its place since the store was put back."""
        author, key = self._author, operation.key
        state = self._overlay.state(key)
        if operation.kind is OperationKind.UPDATE and not self._knowledge.sees(key):
            raise Refused(FailureReason.SUPERSEDED, f"{key[0]} {key[1]!r} is not there any more")
        if state is None or state.deleted is not (operation.kind is OperationKind.CREATE):
            return  # nobody else can have done anything, or what is there says more than that
        written = patch if operation.kind is OperationKind.UPDATE else None
        sight = author.sight(operation, former_version)
        if is_superseded(self._overlay, state, operation, author, sight, written):
            raise Refused(
                FailureReason.SUPERSEDED,
                f"{key[0]} {key[1]!r} was changed since the server was put back from a backup",
            )

    def _was_collected(self, operation: Operation) -> bool:
        """
        Tell whether an operation deletes what was deleted so long ago that no tombstone is left.

        Its author saw the object. Who may not see all objects is told of this one what is told of a hidden one.
        """
        return (
            operation.kind is OperationKind.DELETE
            and 0 < operation.base_version <= self._overlay.collected()
            and not self._knowledge.is_anything_hidden(operation.entity)
        )


def _reason_of(error: Exception | None) -> FailureReason:
    if isinstance(error, LimitExceeded):
        return FailureReason.TOO_LARGE
    return FailureReason.SCHEMA_MISMATCH if isinstance(error, ValidationFailed) else FailureReason.MALFORMED
