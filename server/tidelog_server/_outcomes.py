"""
Outcomes: what became of the units of a batch, and what of that is written.

A refused unit becomes one failure record with the whole payload. An operation that
can be neither applied nor refused in this session is parked: it stays pending, and so
does what comes behind it on the same object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import uuid_utils

from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog._operation import Operation, OperationKind, identity_of
from tidelog.v1 import failure_pb2
from tidelog_server._author import Author, FormerIdentity, OldBases
from tidelog_server._history import kept_changes
from tidelog_server._indexes import IndexWrites, dependents_prefix
from tidelog_server._knowledge import Knowledge
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import FailureRecord, ReplicaState, Settled, with_settled
from tidelog_server._refusal import Refused, Waits
from tidelog_server._store import Reader
from tidelog_server._units import FormerOutcome, Member, Unit, created_keys, keys_of

BEHIND_ANOTHER = "waits for an earlier operation on the same object"

# A named tuple's own constructor is a Python function, and costs twice as much. Where every operation passes, the
# tuple is made directly.
_new = tuple.__new__

# At which version an operation was applied, and whether its object changed in more than it said.
Applied = tuple[int, bool]


class Status:
    """What became of an operation. The values are those of `tidelog.v1.OperationStatus`."""

    APPLIED = 1
    REJECTED = 2
    HELD = 3
    NOT_READY = 4


class Result(NamedTuple):
    """What became of one operation. See `tidelog.v1.OperationResult`."""

    seq: int
    status: int
    version: int = 0
    changed_by_server: bool = False
    failure_id: bytes = b""
    reason: FailureReason | None = None
    message: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Uploader:
    """
    Who uploads, and how.

    Attributes:
        replica: The replica's id in 16 bytes.
        principal: Who is calling.
        session_number: The session's number, which fences older sessions.
        leaves_earlier: Whether operations with lower seqs stay behind on the replica.
        formers: The ids that the replica had before.
        old_bases: Which of its operations were made on a state of an older timeline.
        file_bytes_max: How large a file may be that they refer to.
    """

    replica: bytes
    principal: Principal
    session_number: int
    leaves_earlier: bool
    formers: tuple[FormerIdentity, ...] = ()
    old_bases: OldBases | None = None
    file_bytes_max: int = FILE_BYTES_MAX_DEFAULT

    @property
    def author(self) -> Author:
        """The replica as the author of its operations."""
        return Author(self.replica, self.formers, self.old_bases)


class Outcomes:
    """
    What becomes of the units of one batch.

    Attributes:
        settled: Outcomes by seq.
        parked: Objects with an operation that cannot be settled in this session, each
            with the first such seq. What comes behind it cannot either.
    """

    def __init__(  # noqa: PLR0917 - all that a decision rests on
        self,
        uploader: Uploader,
        reader: Reader,
        overlay: Overlay,
        knowledge: Knowledge,
        parked: Mapping[ObjectKey, int],
        time_us: int,
    ) -> None:
        self.settled: list[tuple[int, Settled]] = []
        self.parked = dict(parked)
        self._uploader = uploader
        self._reader = reader
        self._overlay = overlay
        self._knowledge = knowledge
        self._time_us = time_us
        self._failures: dict[bytes, FailureRecord] = {}
        self._causes: dict[bytes, bytes] = {}
        self._refused_creations: dict[ObjectKey, bytes] = {}

    @property
    def failures(self) -> list[FailureRecord]:
        """The failures to be recorded."""
        return list(self._failures.values())

    def settle(self, unit: Unit, applied: list[Applied]) -> list[Result]:
        """Note a unit as applied."""
        results = []
        for member, (version, changed) in zip(unit, applied, strict=True):
            self.settled.append((member.seq, _new(Settled, (member.nonce, version, changed, b"", False))))
            results.append(_new(Result, (member.seq, Status.APPLIED, version, changed, b"", None, "", "")))
        return results

    def refuse(self, unit: Unit, refusal: Refused) -> list[Result]:
        """Make one failure record for the unit, with the whole payload; or park it, if what stays behind may help."""
        if refusal.reason is FailureReason.UNIQUE_VIOLATED and (self._uploader.leaves_earlier or self.parked):
            return self.park(unit, refusal.message)
        culprit = unit[refusal.position]
        return self._refuse(unit, culprit, refusal, self._record_failure(unit, culprit, refusal))

    def _refuse(self, unit: Unit, culprit: Member, refusal: Refused, failure_id: bytes) -> list[Result]:
        results = []
        for member in unit:
            is_culprit = member is culprit
            if member.seq:
                self.settled.append((member.seq, Settled(member.nonce, 0, False, failure_id, is_culprit)))
            if member.operation is not None and member.operation.kind is OperationKind.CREATE:
                self._refused_creations[member.operation.key] = failure_id
            reason = refusal.reason if is_culprit else FailureReason.GROUP_REJECTED
            code = refusal.code if is_culprit else ""
            results.append(Result(member.seq, Status.REJECTED, 0, False, failure_id, reason, refusal.message, code))
        return results

    def _record_failure(self, unit: Unit, culprit: Member, refusal: Refused, failure_id: bytes = b"") -> bytes:
        """Make a failure record, with an id of its own unless one is given."""
        if failure_id:
            pass
        elif any(member.seq for member in unit):
            failure_id = uuid_utils.uuid7().bytes
        else:
            # Nothing tells a repetition of unreadable bytes but the bytes themselves.
            failure_id = hashlib.sha256(self._uploader.replica + culprit.data).digest()[:16]
            if self._reader.failure(failure_id) is not None:
                return failure_id
        self._causes[failure_id] = refusal.cause
        entity, object_id = culprit.operation.key if culprit.operation is not None else ("", "")
        record = failure_pb2.SynchronizationFailure(
            id=str(uuid_utils.UUID(bytes=failure_id)),
            replica_id=str(uuid_utils.UUID(bytes=self._uploader.replica)),
            user_id=self._uploader.principal.user_id,
            entity=entity,
            object_id=object_id,
            reason=refusal.reason.number,
            message=refusal.message,
            code=refusal.code,
            roles=sorted(self._uploader.principal.roles),
            operation=culprit.data,
            group_operations=[member.data for member in unit] if len(unit) > 1 else [],
            version=self._overlay.version,
            status=failure_pb2.FAILURE_STATUS_OPEN,
            cause_failure_id=str(uuid_utils.UUID(bytes=refusal.cause)) if refusal.cause else "",
        )
        record.create_time.FromMicroseconds(self._time_us)
        self._failures[failure_id] = FailureRecord(
            failure_id, record.SerializeToString(), self._uploader.replica, tuple(created_keys(unit))
        )
        return failure_id

    def repeat(self, member: Member, settled: Settled, *, is_new: bool) -> Result:
        """Return the result of an operation that was settled before; *is_new*: under a former id, so it is noted."""
        if is_new:
            self.settled.append((member.seq, settled))
        if not settled.failure_id:
            return Result(member.seq, Status.APPLIED, settled.version, settled.changed_by_server)
        record = failure_pb2.SynchronizationFailure.FromString(self._reader.failure(settled.failure_id) or b"")
        return _refusal_again(member.seq, settled, record)

    def has_applied(self, seq: int, version: int) -> bool:
        """Tell whether it was this operation of the replica that was applied at a version."""
        return any(one.version == version for one in self._settled_at(seq))

    def _settled_at(self, seq: int) -> list[Settled]:
        """Return what is known, or new, of an operation under the replica's present id."""
        known = self._reader.settled(self._uploader.replica, (seq,)).values()
        return [*known, *(one for at, one in self.settled if at == seq)]

    def record_former(self, unit: Unit) -> list[Result]:
        """Record a failure again that was recorded before the store was put back from a backup."""
        formers = [member.former or FormerOutcome(0) for member in unit]
        position = next(
            (place for place, one in enumerate(formers) if one.reason is not FailureReason.GROUP_REJECTED), 0
        )
        culprit, former = unit[position], formers[position]
        refusal = Refused(former.reason or FailureReason.SUPERSEDED, former.message, code=former.code)
        known = self._reader.failure(former.failure_id)
        if known is None:
            failure_id = self._record_failure(unit, culprit, refusal, former.failure_id)
        elif failure_pb2.SynchronizationFailure.FromString(known).operation == culprit.data:
            failure_id = former.failure_id  # one of its own commit group brought it before
        else:
            failure_id = self._record_failure(unit, culprit, refusal)
        return self._refuse(unit, culprit, refusal, failure_id)

    def record_left_out(self, operation: Operation) -> None:
        """Record files without which an operation was applied again, for whoever may still find them."""
        patch = operation.decoded_patch()
        member = Member(operation.seq, operation.nonce, operation, patch, operation.encode(), None, renamed=False)
        names = ", ".join(map(repr, patch.set))
        message = (
            f"{operation.entity} {operation.id!r} was applied again without {names}, "
            "because nobody had the content: who adds it to the server can retry this"
        )
        self._record_failure((member,), member, Refused(FailureReason.FILE_MISSING, message))

    def refused_creation(self, key: ObjectKey) -> bytes | None:
        """Return the failure because of which this replica could not create an object that it knows nothing of."""
        if self._knowledge.knows(key):
            return None
        failure_id = self._own_refused_creation(key)
        return None if failure_id is None or self._was_created_since(key, failure_id) else failure_id

    def late_creation(self, key: ObjectKey, created: int) -> bytes | None:
        """Return the failure of this replica's creation of an object that was there already, created at a version."""
        failure_id = self._own_refused_creation(key)
        if failure_id is None:
            return None
        record = self._record_of(failure_id)
        is_late = record.reason == FailureReason.ALREADY_EXISTS.number and record.version >= created
        return failure_id if is_late else None

    def _was_created_since(self, key: ObjectKey, failure_id: bytes) -> bool:
        """Tell whether a later operation of the replica created the object after all, whatever became of it then."""
        state = self._overlay.state(key)
        if state is None:
            return False
        own = {self._uploader.replica, *(former.replica for former in self._uploader.formers)}
        since = self._record_of(failure_id).version
        return any(
            change.kind is OperationKind.CREATE and change.replica in own and not change.by_hook
            for change in takewhile(lambda one: one.version > since, kept_changes(state.version, self._overlay.change))
        )

    def _record_of(self, failure_id: bytes) -> failure_pb2.SynchronizationFailure:
        known = self._failures.get(failure_id)
        data = known.data if known is not None else self._reader.failure(failure_id)
        return failure_pb2.SynchronizationFailure.FromString(data or b"")

    def _own_refused_creation(self, key: ObjectKey) -> bytes | None:
        if known := self._refused_creations.get(key):
            return known
        if known := self._reader.refused_creation(self._uploader.replica, key):
            return known
        for former in self._uploader.formers:
            known = self._reader.refused_creation(former.replica, key)
            if known and self._is_own(known, former):
                return known
        return None

    def _is_own(self, failure_id: bytes, former: FormerIdentity) -> bool:
        """Tell whether a failure under a former id is about this copy's operations, not about those of another one."""
        record = failure_pb2.SynchronizationFailure.FromString(self._reader.failure(failure_id) or b"")
        seqs = [identity_of(data)[0] for data in (record.operation, *record.group_operations)]
        return any(0 < seq <= former.settled_seq for seq in seqs) or any(
            one.failure_id == failure_id for seq in seqs for one in self._settled_at(seq)
        )

    def give_up(self, unit: Unit, wait: Waits) -> list[Result]:
        """Refuse a unit that waited in vain; or park it, if what it waits for may still come."""
        cause = self.refused_creation(wait.target)
        if not cause and (self._uploader.leaves_earlier or wait.target in self.parked):
            return self.park(unit, wait.message)
        reason = FailureReason.DEPENDENCY_FAILED if cause else FailureReason.DANGLING_REFERENCE
        refusal = Refused(reason, wait.message, cause=cause or b"")
        refusal.position = wait.position
        return self.refuse(unit, refusal)

    def is_parked(self, unit: Unit) -> bool:
        """Tell whether an earlier operation on one of the unit's objects stays unsettled."""
        return bool(self.parked) and any(self.parked.get(key, unit[0].seq) < unit[0].seq for key in keys_of(unit))

    def park(self, unit: Unit, message: str) -> list[Result]:
        """Leave a unit pending."""
        for key in keys_of(unit):
            self.parked[key] = min(unit[0].seq, self.parked.get(key, unit[0].seq))
        return [Result(member.seq, Status.NOT_READY, message=message) for member in unit]

    def withdraw_behind_parked(self, units: Sequence[Unit], results: dict[int, list[Result]]) -> bool:
        """
        Take back refusals that stand behind an operation which stays pending after all; tell whether there were any.

        Operations on one object settle in order: what comes behind stays pending too,
        and what was refused because of such a refusal.
        """
        withdrawn: set[bytes] = set()
        settled_count = len(self.settled)
        again = bool(self.parked)
        while again:
            again = False
            for index in sorted(results):
                failure_id = results[index][0].failure_id
                if failure_id and (self.is_parked(units[index]) or self._causes.get(failure_id) in withdrawn):
                    withdrawn.add(failure_id)
                    self._failures.pop(failure_id, None)
                    self.settled = [one for one in self.settled if one[1].failure_id != failure_id]
                    for key in created_keys(units[index]):
                        self._refused_creations.pop(key, None)
                    results[index] = self.park(units[index], BEHIND_ANOTHER)
                    again = True
        return len(self.settled) != settled_count

    def replica_state(self, known: ReplicaState) -> ReplicaState | None:
        """Return the replica's state with what was settled, or None if nothing was."""
        if not self.settled:
            return None
        self.settled.sort()
        return with_settled(known, self.settled)

    def index_writes(self) -> IndexWrites:
        """Return what finds the failures that others caused."""
        return {
            dependents_prefix(cause) + failure_id: b""
            for failure_id, cause in self._causes.items()
            if cause and failure_id in self._failures
        }


def _refusal_again(seq: int, settled: Settled, record: failure_pb2.SynchronizationFailure) -> Result:
    """Return the result of an operation that was refused before."""
    reason = FailureReason.of_number(record.reason) if settled.culprit else FailureReason.GROUP_REJECTED
    code = record.code if settled.culprit else ""
    return Result(seq, Status.REJECTED, 0, False, settled.failure_id, reason, record.message, code)
