"""
The engine: decides what becomes of operations. No I/O.

A batch, what the store holds, and the application go in; what is to be written and
one result per operation come out. The store's one writer thread runs it inside a
transaction, a simulation can run it anywhere.

For each operation, in order: settled already? -> readable -> object there -> patch
applied -> before-hooks -> references resolve -> written -> after-hooks. A refusal
undoes the operation (its whole commit group) and becomes a failure record with the
payload; what follows goes on.

An operation whose reference leads to an object that has not arrived is *held*, with
its group and with later operations on its object. When all batches have come the
held ones are settled together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import uuid_utils

from tidelog._errors import InvalidValue, LimitExceeded
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import BATCH_OPERATIONS_MAX, GROUP_BYTES_MAX
from tidelog._logging import get_logger
from tidelog._operation import Operation, OperationKind, decode_operation, identity_of
from tidelog._patch import Patch, encoded_attributes
from tidelog.v1 import failure_pb2
from tidelog_server._action import Action, References, Refused, Waits
from tidelog_server._application import Application
from tidelog_server._errors import OperationForked, OperationsOutOfOrder, RequestInvalid, SessionSuperseded
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import (
    FailureRecord,
    Settled,
    Writes,
    merged_ranges,
)
from tidelog_server._store import Reader

HELD_UNITS_MAX = 10_000
HELD_BYTES_MAX = 16 * 1024 * 1024
HELD_ROUNDS_MAX = 64

# A named tuple's own constructor is a Python function, and costs twice as much. Where every operation passes, the
# tuple is made directly.
_new = tuple.__new__

# What a mistake in a program raises, as opposed to a failing disk or a lack of memory.
_DEFECTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)

_BEHIND_ANOTHER = "waits for an earlier operation on the same object"

_log = get_logger("tidelog.engine")


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


@dataclass(frozen=True, slots=True)
class Uploader:
    """
    Who uploads, and how.

    Attributes:
        replica: The replica's id in 16 bytes.
        principal: Who is calling.
        session_number: The session's number, which fences older sessions.
        leaves_earlier: Whether operations with lower seqs stay behind on the replica.
    """

    replica: bytes
    principal: Principal
    session_number: int
    leaves_earlier: bool


class Member(NamedTuple):
    """One operation of a batch, read as far as it can be."""

    seq: int
    nonce: int
    operation: Operation | None
    patch: Patch
    data: bytes
    error: InvalidValue | None


# What is applied all or none: one operation, or the operations of one commit group.
Unit = tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class UploadState:
    """
    What a session carries from batch to batch. A value: a batch that runs again starts from the same one.

    Attributes:
        last_seq: Newest seq received.
        held: Units that wait for an object.
        held_bytes: Size of their operations.
        held_keys: Objects whose further operations wait behind a held one.
        parked: Objects with an operation that cannot be settled in this session, each
            with the first such seq. What comes behind it cannot either.
    """

    last_seq: int = 0
    held: tuple[Unit, ...] = ()
    held_bytes: int = 0
    held_keys: frozenset[ObjectKey] = frozenset()
    parked: Mapping[ObjectKey, int] = field(default_factory=dict)


class Evaluation(NamedTuple):
    """What came of a batch."""

    writes: Writes
    results: list[Result]
    state: UploadState


def evaluate_batch(
    batch: Sequence[bytes],
    *,
    application: Application,
    uploader: Uploader,
    reader: Reader,
    state: UploadState,
    time_us: int,
) -> Evaluation:
    """
    Settle a batch of serialized operations as far as it can be settled now.

    There is one result per operation, in order; held ones have a preliminary one.

    Raises:
        SessionSuperseded, OperationForked, RequestInvalid, TransientError:
            Nothing of the batch may be written, and the session ends.
    """
    return _Evaluator(application, uploader, reader, state, time_us).batch(batch)


def evaluate_held(
    *, application: Application, uploader: Uploader, reader: Reader, state: UploadState, time_us: int
) -> Evaluation:
    """
    Settle the held operations together, as if all their creations existed.

    Refused ones are dropped, with what depends on them, until nothing changes.
    Raises what `evaluate_batch` raises.
    """
    return _Evaluator(application, uploader, reader, state, time_us).held()


# At which version an operation was applied, and whether its object changed in more than it said.
_Applied = tuple[int, bool]


class _Evaluator:
    """One batch, or the held operations of one session, in one store transaction."""

    def __init__(
        self, application: Application, uploader: Uploader, reader: Reader, state: UploadState, time_us: int
    ) -> None:
        known = reader.replica(uploader.replica)
        if known is None or known.session_number != uploader.session_number:
            raise SessionSuperseded("a newer session of this replica has begun to upload")
        self.application = application
        self.schema = application.schema
        self.uploader = uploader
        self.reader = reader
        self.time_us = time_us
        self.overlay = Overlay(reader)
        self._references = References()
        self._action = Action(
            application,
            self.overlay,
            replica=uploader.replica,
            principal=uploader.principal,
            time_us=time_us,
            references=self._references,
        )
        self._replica_state = known
        self._head_version = self.overlay.version
        self._last_seq = state.last_seq
        self._held = list(state.held)
        self._held_bytes = state.held_bytes
        self._held_keys = set(state.held_keys)
        self._parked = dict(state.parked)
        self._settled: list[tuple[int, Settled]] = []
        self._failures: dict[bytes, FailureRecord] = {}
        self._causes: dict[bytes, bytes] = {}
        self._refused_creations: dict[ObjectKey, bytes] = {}

    # --- a batch --------------------------------------------------------------

    def batch(self, batch: Sequence[bytes]) -> Evaluation:
        members = [_read(data) for data in batch]
        self._check_order(members)
        former = self._former_outcomes(members)
        self.overlay.prefetch(self._named_objects(members))
        units = list(_units(members))
        if len(members) > BATCH_OPERATIONS_MAX and len(units) > 1:
            raise RequestInvalid(f"a batch of {len(members)} operations: the limit is {BATCH_OPERATIONS_MAX}")
        results: list[Result] = []
        for unit in units:
            if former and any(member.seq in former for member in unit):
                results.extend(self._repeated(unit, former))
            else:
                results.extend(self._first_try(unit))
        return self._evaluation(results)

    def _check_order(self, members: list[Member]) -> None:
        for member in members:
            if member.seq:
                if member.seq <= self._last_seq:
                    raise OperationsOutOfOrder(f"seq {member.seq} came after seq {self._last_seq}")
                self._last_seq = member.seq

    def _former_outcomes(self, members: list[Member]) -> dict[int, Settled]:
        """Look up what was settled before; nothing above the newest settled seq was."""
        newest = self._replica_state.newest_seq
        seqs = [member.seq for member in members if 0 < member.seq <= newest]
        former = self.reader.settled(self.uploader.replica, seqs) if seqs else {}
        for member in members:
            if member.seq in former and former[member.seq].nonce != member.nonce:
                raise OperationForked(f"seq {member.seq} of this replica was settled before as another operation")
        return former

    def _named_objects(self, members: Iterable[Member]) -> Iterator[ObjectKey]:
        has_references = self.schema.has_references
        for member in members:
            if member.operation is not None:
                yield member.operation.key
                if has_references:
                    for _attribute, target in self.schema.referenced(member.operation.entity, member.patch.set):
                        yield target

    def _repeated(self, unit: Unit, former: dict[int, Settled]) -> Iterator[Result]:
        for member in unit:
            settled = former.get(member.seq)
            if settled is None:
                refusal = Refused(FailureReason.MALFORMED, "a part of its commit group was settled before without it")
                yield from self._refuse((member,), refusal)
            elif not settled.failure_id:
                yield Result(member.seq, Status.APPLIED, settled.version, settled.changed_by_server)
            else:
                yield self._recorded_refusal(member.seq, settled)

    def _recorded_refusal(self, seq: int, settled: Settled) -> Result:
        record = failure_pb2.SynchronizationFailure.FromString(self.reader.failure(settled.failure_id) or b"")
        reason = FailureReason.of_number(record.reason) if settled.culprit else FailureReason.GROUP_REJECTED
        return Result(seq, Status.REJECTED, failure_id=settled.failure_id, reason=reason, message=record.message)

    def _first_try(self, unit: Unit) -> list[Result]:
        if self._is_parked(unit):
            return self._park(unit, _BEHIND_ANOTHER)
        if len(unit) > 1 and _size_bytes(unit) > GROUP_BYTES_MAX:
            message = f"a commit group of {_size_bytes(unit)} bytes: the limit is {GROUP_BYTES_MAX}"
            return self._refuse(unit, Refused(FailureReason.TOO_LARGE, message))
        if self._is_newer(unit):
            return self._park(unit, "made with a newer schema than the server has: waits for the server")
        if self._held_keys and not self._held_keys.isdisjoint(_keys_of(unit)):
            return self._hold(unit, _BEHIND_ANOTHER)
        try:
            return self._settle(unit, self._apply_unit(unit))
        except Refused as refusal:
            return self._refuse(unit, refusal)
        except Waits as wait:
            return self._hold(unit, wait.message)

    def _is_parked(self, unit: Unit) -> bool:
        """Tell whether an earlier operation on one of the unit's objects stays unsettled."""
        return bool(self._parked) and any(self._parked.get(key, unit[0].seq) < unit[0].seq for key in _keys_of(unit))

    def _is_newer(self, unit: Unit) -> bool:
        return self.application.has_schema and any(
            member.operation is not None and member.operation.schema_version > self.schema.version for member in unit
        )

    def _hold(self, unit: Unit, message: str) -> list[Result]:
        size_bytes = _size_bytes(unit)
        if len(self._held) >= HELD_UNITS_MAX or self._held_bytes + size_bytes > HELD_BYTES_MAX:
            return self._park(unit, f"{message}; too many operations wait already")
        self._held.append(unit)
        self._held_bytes += size_bytes
        self._held_keys.update(_keys_of(unit))
        return [Result(member.seq, Status.HELD, message=message) for member in unit]

    def _park(self, unit: Unit, message: str) -> list[Result]:
        for key in _keys_of(unit):
            self._parked[key] = min(unit[0].seq, self._parked.get(key, unit[0].seq))
        return [Result(member.seq, Status.NOT_READY, message=message) for member in unit]

    # --- the held operations --------------------------------------------------

    def held(self) -> Evaluation:
        """Settle in rounds: each drops what is refused and what depends on it; the last one drops nothing."""
        units = self._held
        self.overlay.prefetch(self._named_objects(member for unit in units for member in unit))
        mark = self.overlay.mark()
        results: dict[int, list[Result]] = {}
        live = list(range(len(units)))
        for _ in range(HELD_ROUNDS_MAX):
            applied = self._held_round(units, live, results)
            withdrawn = self._withdraw_behind_parked(units, results)
            if len(applied) == len(live) and not withdrawn:
                results.update({index: self._settle(units[index], applied[index]) for index in live})
                break
            self.overlay.rollback(mark)
            live = [index for index in live if index not in results]
        else:
            results.update(
                {index: self._park(units[index], "too entangled with refused operations") for index in live}
            )
        self._held, self._held_bytes, self._held_keys = [], 0, set()
        return self._evaluation([result for index in range(len(units)) for result in results[index]])

    def _held_round(
        self, units: list[Unit], live: list[int], results: dict[int, list[Result]]
    ) -> dict[int, list[_Applied]]:
        """Try all live units; put the results of those dropped into *results*, return what the others did."""
        references = self._references
        references.assumed = Counter(key for index in live for key in _created_keys(units[index]))
        applied: dict[int, list[_Applied]] = {}
        dropped: dict[int, Refused | Waits | None] = {}
        users: dict[ObjectKey, list[int]] = {}
        # Objects with a dropped operation that may stay pending: what comes behind it is judged next round.
        undecided: set[ObjectKey] = set()
        for index in live:
            unit = units[index]
            if undecided and not undecided.isdisjoint(_keys_of(unit)):
                undecided.update(_keys_of(unit))
                continue
            references.used = set()
            try:
                if self._is_parked(unit):
                    dropped[index] = None
                else:
                    applied[index] = self._apply_unit(unit)
                    for key in references.used:
                        users.setdefault(key, []).append(index)
                    continue
            except (Refused, Waits) as verdict:
                # With its traceback it would hold on to this frame, and so to itself.
                dropped[index] = verdict.with_traceback(None)
            references.assumed.subtract(_created_keys(unit))
            if not isinstance(dropped[index], Refused):
                undecided.update(_keys_of(unit))
        self._drop(units, [index for index in live if index not in dropped], dropped, users, results)
        return applied

    def _drop(
        self,
        units: list[Unit],
        kept: Iterable[int],
        dropped: dict[int, Refused | Waits | None],
        users: dict[ObjectKey, list[int]],
        results: dict[int, list[Result]],
    ) -> None:
        """
        Settle what a round dropped, as far as its verdicts can be trusted.

        A dropped unit takes those with it that came before it and relied on what it
        would create. What was judged on top of such a one is judged again in the next
        round, without it.
        """
        creators: dict[ObjectKey, set[int]] = {}
        for index in kept:
            for key in _created_keys(units[index]):
                creators.setdefault(key, set()).add(index)
        fallen: dict[int, ObjectKey] = {}
        trusted = set(dropped)
        for root in sorted(dropped):
            fallen = _fallen(units, users, creators, root)
            if fallen:
                trusted = {index for index in dropped if index < min(fallen)}
                # What takes others with it may itself have been judged on top of them.
                touched = {key for index in fallen for key in _keys_of(units[index])}
                if touched.isdisjoint(_keys_of(units[root])):
                    trusted.add(root)
                break
        for index in sorted(trusted):
            verdict = dropped[index]
            if verdict is None:
                results[index] = self._park(units[index], _BEHIND_ANOTHER)
            elif isinstance(verdict, Refused):
                results[index] = self._refuse(units[index], verdict)
            else:
                results[index] = self._give_up(units[index], verdict)
        for index, (entity, id_) in sorted(fallen.items()):
            missing = Waits((entity, id_), f"refers to {entity} {id_!r}, which was not created")
            results[index] = self._give_up(units[index], missing)

    def _withdraw_behind_parked(self, units: list[Unit], results: dict[int, list[Result]]) -> bool:
        """
        Take back refusals that stand behind an operation which stays pending after all; tell whether there were any.

        Operations on one object settle in order: what comes behind stays pending too,
        and what was refused because of such a refusal.
        """
        withdrawn: set[bytes] = set()
        settled_count = len(self._settled)
        again = bool(self._parked)
        while again:
            again = False
            for index in sorted(results):
                failure_id = results[index][0].failure_id
                if failure_id and (self._is_parked(units[index]) or self._causes.get(failure_id) in withdrawn):
                    withdrawn.add(failure_id)
                    self._failures.pop(failure_id, None)
                    self._settled = [one for one in self._settled if one[1].failure_id != failure_id]
                    for key in _created_keys(units[index]):
                        self._refused_creations.pop(key, None)
                    results[index] = self._park(units[index], _BEHIND_ANOTHER)
                    again = True
        return len(self._settled) != settled_count

    def _give_up(self, unit: Unit, wait: Waits) -> list[Result]:
        cause = self._refused_creation(wait.target)
        if cause:
            return self._refuse(unit, Refused(FailureReason.DEPENDENCY_FAILED, wait.message, cause=cause))
        if self.uploader.leaves_earlier or wait.target in self._parked:
            return self._park(unit, wait.message)
        return self._refuse(unit, Refused(FailureReason.DANGLING_REFERENCE, wait.message))

    # --- outcomes -------------------------------------------------------------

    def _settle(self, unit: Unit, applied: list[_Applied]) -> list[Result]:
        results = []
        for member, (version, changed) in zip(unit, applied, strict=True):
            self._settled.append((member.seq, _new(Settled, (member.nonce, version, changed, b"", False))))
            results.append(_new(Result, (member.seq, Status.APPLIED, version, changed, b"", None, "")))
        return results

    def _refuse(self, unit: Unit, refusal: Refused) -> list[Result]:
        """Make one failure record for the unit, with the whole payload."""
        culprit = unit[refusal.position]
        failure_id = self._record_failure(unit, culprit, refusal)
        results = []
        for member in unit:
            is_culprit = member is culprit
            if member.seq:
                self._settled.append((member.seq, Settled(member.nonce, 0, False, failure_id, is_culprit)))
            if member.operation is not None and member.operation.kind is OperationKind.CREATE:
                self._refused_creations[member.operation.key] = failure_id
            reason = refusal.reason if is_culprit else FailureReason.GROUP_REJECTED
            results.append(
                Result(member.seq, Status.REJECTED, failure_id=failure_id, reason=reason, message=refusal.message)
            )
        return results

    def _record_failure(self, unit: Unit, culprit: Member, refusal: Refused) -> bytes:
        if culprit.seq:
            failure_id = uuid_utils.uuid7().bytes
        else:
            # Nothing tells a repetition of unreadable bytes but the bytes themselves.
            failure_id = hashlib.sha256(self.uploader.replica + culprit.data).digest()[:16]
            if self.reader.failure(failure_id) is not None:
                return failure_id
        self._causes[failure_id] = refusal.cause
        entity, object_id = culprit.operation.key if culprit.operation is not None else ("", "")
        record = failure_pb2.SynchronizationFailure(
            id=str(uuid_utils.UUID(bytes=failure_id)),
            replica_id=str(uuid_utils.UUID(bytes=self.uploader.replica)),
            user_id=self.uploader.principal.user_id,
            entity=entity,
            object_id=object_id,
            reason=refusal.reason.number,
            message=refusal.message,
            operation=culprit.data,
            group_operations=[member.data for member in unit] if len(unit) > 1 else [],
            version=self._head_version,
            status=failure_pb2.FAILURE_STATUS_OPEN,
            cause_failure_id=str(uuid_utils.UUID(bytes=refusal.cause)) if refusal.cause else "",
        )
        record.create_time.FromMicroseconds(self.time_us)
        self._failures[failure_id] = FailureRecord(
            failure_id, record.SerializeToString(), self.uploader.replica, tuple(_created_keys(unit))
        )
        return failure_id

    def _refused_creation(self, key: ObjectKey) -> bytes | None:
        """Return the failure because of which this replica could not create an object that never was there."""
        if self.overlay.state(key) is not None:
            return None
        return self._refused_creations.get(key) or self.reader.refused_creation(self.uploader.replica, key)

    def _evaluation(self, results: list[Result]) -> Evaluation:
        replica = None
        if self._settled:
            self._settled.sort()
            newest_seq, newest = self._settled[-1]
            known = self._replica_state
            if newest_seq <= known.newest_seq:
                newest_seq, newest_nonce = known.newest_seq, known.newest_nonce
            else:
                newest_nonce = newest.nonce
            ranges = merged_ranges(known.settled_ranges, [seq for seq, _ in self._settled])
            replica = (
                self.uploader.replica,
                known._replace(newest_seq=newest_seq, newest_nonce=newest_nonce, settled_ranges=ranges),
            )
        writes = Writes(
            objects=self.overlay.written_objects(),
            changes=self.overlay.changes,
            replica=replica,
            settled=self._settled,
            failures=list(self._failures.values()),
            version=self.overlay.version,
        )
        state = UploadState(
            self._last_seq,
            tuple(self._held),
            self._held_bytes,
            frozenset(self._held_keys),
            self._parked,
        )
        return Evaluation(writes, results, state)

    # --- one unit -------------------------------------------------------------

    def _apply_unit(self, unit: Unit) -> list[_Applied]:
        """Apply all members, or leave no trace and raise Waits."""
        mark = self.overlay.mark()
        applied: list[_Applied] = []
        try:
            for member in unit:
                applied.append(self._apply(member))  # noqa: PERF401 - what was done before a refusal is counted
        except Refused as refusal:
            refusal.position = len(applied)
            self.overlay.rollback(mark)
            raise
        except _DEFECTS as error:
            # A defect of this program must not stop what comes behind the operation that shows it.
            self.overlay.rollback(mark)
            _log.exception("evaluation failed", seq=unit[len(applied)].seq)
            failed = Refused(FailureReason.HOOK_ERROR, "the server failed on it: the server's log has the details")
            failed.position = len(applied)
            raise failed from error
        except BaseException:
            self.overlay.rollback(mark)
            raise
        return applied

    def _apply(self, member: Member) -> _Applied:
        operation = member.operation
        if member.error is not None or operation is None:
            reason = FailureReason.TOO_LARGE if isinstance(member.error, LimitExceeded) else FailureReason.MALFORMED
            raise Refused(reason, str(member.error))
        key = (operation.entity, operation.id)
        action = self._action
        action.begin(operation)
        if operation.kind is OperationKind.CREATE:
            version = action.create(key, member.patch.set, encoded_attributes(operation.patch))
        else:
            state = self.overlay.state(key)
            if state is None:
                cause = self._refused_creation(key)
                raise Refused(
                    FailureReason.DEPENDENCY_FAILED if cause else FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} " + ("could not be created" if cause else "does not exist"),
                    cause=cause or b"",
                )
            if operation.kind is OperationKind.DELETE and state.deleted:
                # Nothing changes, and that has been so up to this version.
                return (self.overlay.version, False)
            # Another incarnation than the author saw; an author who created this one has seen it.
            if operation.base_version < state.created and state.creator != self.uploader.replica:
                raise Refused(
                    FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} was deleted and created again since its author saw it",
                )
            if operation.kind is OperationKind.DELETE:
                version = action.delete(key)
            else:
                version = action.update(key, member.patch, operation.patch)
        return (version, action.changed_own_object)


def _read(data: bytes) -> Member:
    try:
        operation = decode_operation(data)
    except InvalidValue as error:
        seq, nonce = identity_of(data)
        return Member(seq, nonce, None, _NO_PATCH, data, error)
    try:
        patch = operation.decoded_patch()
    except InvalidValue as error:
        return Member(operation.seq, operation.nonce, operation, _NO_PATCH, data, error)
    return _new(Member, (operation.seq, operation.nonce, operation, patch, data, None))


def _units(members: list[Member]) -> Iterator[Unit]:
    """Split a batch into what is applied all or none. A commit group that is not whole becomes malformed."""
    position = 0
    while position < len(members):
        member = members[position]
        group = member.operation.group if member.operation is not None else None
        if group is None:
            yield (member,)
            position += 1
            continue
        unit = []
        for place, candidate in enumerate(members[position : position + group.size]):
            # Unreadable bytes between members of a group can only be one of them.
            if candidate.operation is not None and candidate.operation.group != group._replace(position=place):
                break
            unit.append(candidate)
        if len(unit) < group.size:
            error = InvalidValue(f"its commit group of {group.size} operations is not whole in this batch")
            unit = [(unit or [member])[0]._replace(error=error), *unit[1:]]
        yield tuple(unit)
        position += len(unit)


def _keys_of(unit: Unit) -> list[ObjectKey]:
    return [member.operation.key for member in unit if member.operation is not None]


def _fallen(
    units: list[Unit], users: dict[ObjectKey, list[int]], creators: dict[ObjectKey, set[int]], dropped: int
) -> dict[int, ObjectKey]:
    """
    Return the units that relied on what a dropped one would create, directly or not, each with what it lacks.

    An object that another unit creates as well is not lacking.
    """
    fallen: dict[int, ObjectKey] = {}
    gone = _created_keys(units[dropped])
    while gone:
        key = gone.pop()
        if creators.get(key, set()) - fallen.keys():
            continue
        for index in users.get(key, ()):
            if index not in fallen and index != dropped:
                fallen[index] = key
                gone.extend(_created_keys(units[index]))
    return fallen


def _size_bytes(unit: Unit) -> int:
    return sum(len(member.data) for member in unit)


def _created_keys(unit: Unit) -> list[ObjectKey]:
    return [
        member.operation.key
        for member in unit
        if member.operation is not None and member.operation.kind is OperationKind.CREATE
    ]


_NO_PATCH = Patch()
