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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import uuid_utils

from tidelog._constraints import Where, constraint_of
from tidelog._errors import InvalidValue, LimitExceeded
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import OBJECT_BYTES_MAX
from tidelog._logging import get_logger
from tidelog._operation import Operation, OperationKind, decode_operation, identity_of
from tidelog._patch import Patch, check_attribute_name, encoded_attributes, patch_setting
from tidelog._values import Attributes, check, check_id, check_name, encode, equal
from tidelog.v1 import failure_pb2
from tidelog_server._application import Application, Hook, Reject, TransientError
from tidelog_server._errors import OperationForked, OperationsOutOfOrder, SessionSuperseded
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import (
    Change,
    FailureRecord,
    ObjectState,
    Settled,
    Writes,
    merged_ranges,
)
from tidelog_server._store import Reader

HELD_UNITS_MAX = 10_000
HELD_BYTES_MAX = 16 * 1024 * 1024
HELD_ROUNDS_MAX = 64
HOOK_DEPTH_MAX = 16

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
        parked_keys: Objects whose operations cannot be settled in this session.
    """

    last_seq: int = 0
    held: tuple[Unit, ...] = ()
    held_bytes: int = 0
    held_keys: frozenset[ObjectKey] = frozenset()
    parked_keys: frozenset[ObjectKey] = frozenset()


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
        SessionSuperseded, OperationForked, OperationsOutOfOrder, TransientError:
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


class _Refused(Exception):
    """The operation is refused."""

    def __init__(self, reason: FailureReason, message: str, *, cause: bytes = b"") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.cause = cause
        self.position = 0


class _Waits(Exception):
    """The operation refers to an object that has not arrived."""

    def __init__(self, target: ObjectKey, message: str) -> None:
        super().__init__(message)
        self.target = target
        self.message = message


class _Applied(NamedTuple):
    """At which version an operation was applied, and whether its object changed in more than it said."""

    version: int
    changed_by_server: bool


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
        self._replica_state = known
        self._last_seq = state.last_seq
        self._held = list(state.held)
        self._held_bytes = state.held_bytes
        self._held_keys = set(state.held_keys)
        self._parked_keys = set(state.parked_keys)
        self._settled: list[tuple[int, Settled]] = []
        self._failures: dict[bytes, FailureRecord] = {}
        self._refused_creations: dict[ObjectKey, bytes] = {}
        # While held operations are settled: the creations taken for granted, and those of them a unit used.
        self._assumed: set[ObjectKey] = set()
        self._used: set[ObjectKey] = set()

    # --- a batch --------------------------------------------------------------

    def batch(self, batch: Sequence[bytes]) -> Evaluation:
        members = [_read(data) for data in batch]
        self._check_order(members)
        former = self._former_outcomes(members)
        self.overlay.prefetch(self._named_objects(members))
        results: list[Result] = []
        for unit in _units(members):
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
        for member in members:
            if member.operation is not None:
                yield member.operation.key
                for _attribute, target in self.schema.referenced(member.operation.entity, member.patch.set):
                    yield target

    def _repeated(self, unit: Unit, former: dict[int, Settled]) -> Iterator[Result]:
        for member in unit:
            settled = former.get(member.seq)
            if settled is None:
                refusal = _Refused(FailureReason.MALFORMED, "a part of its commit group was settled before without it")
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
        if self._held_keys and not self._held_keys.isdisjoint(_keys_of(unit)):
            return self._hold(unit, _BEHIND_ANOTHER)
        if self._is_newer(unit):
            return self._park(unit, "made with a newer schema than the server has: waits for the server")
        try:
            return self._settle(unit, self._apply_unit(unit))
        except _Refused as refusal:
            return self._refuse(unit, refusal)
        except _Waits as wait:
            return self._hold(unit, wait.message)

    def _is_parked(self, unit: Unit) -> bool:
        return bool(self._parked_keys) and not self._parked_keys.isdisjoint(_keys_of(unit))

    def _is_newer(self, unit: Unit) -> bool:
        return self.application.has_schema and any(
            member.operation is not None and member.operation.schema_version > self.schema.version for member in unit
        )

    def _hold(self, unit: Unit, message: str) -> list[Result]:
        size_bytes = sum(len(member.data) for member in unit)
        if len(self._held) >= HELD_UNITS_MAX or self._held_bytes + size_bytes > HELD_BYTES_MAX:
            return self._park(unit, f"{message}; too many operations wait already")
        self._held.append(unit)
        self._held_bytes += size_bytes
        self._held_keys.update(_keys_of(unit))
        return [Result(member.seq, Status.HELD, message=message) for member in unit]

    def _park(self, unit: Unit, message: str) -> list[Result]:
        self._parked_keys.update(_keys_of(unit))
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
            if len(applied) == len(live):
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
        self._assumed = {key for index in live for key in _created_keys(units[index])}
        applied: dict[int, list[_Applied]] = {}
        users: dict[ObjectKey, list[int]] = {}
        gone: list[ObjectKey] = []
        for index in live:
            unit = units[index]
            self._used = set()
            try:
                if self._is_parked(unit):
                    results[index] = self._park(unit, _BEHIND_ANOTHER)
                else:
                    applied[index] = self._apply_unit(unit)
                    for key in self._used:
                        users.setdefault(key, []).append(index)
                    continue
            except _Refused as refusal:
                results[index] = self._refuse(unit, refusal)
            except _Waits as wait:
                results[index] = self._give_up(unit, wait)
            self._assumed.difference_update(_created_keys(unit))
            gone.extend(_created_keys(unit))
        # A dropped unit takes those with it that came before it and relied on what it would create.
        while gone:
            key = gone.pop()
            for index in users.pop(key, ()):
                if applied.pop(index, None) is not None:
                    missing = _Waits(key, f"refers to {key[0]} {key[1]!r}, which was not created")
                    results[index] = self._give_up(units[index], missing)
                    gone.extend(_created_keys(units[index]))
        return applied

    def _give_up(self, unit: Unit, wait: _Waits) -> list[Result]:
        cause = self._refused_creation(wait.target)
        if cause:
            return self._refuse(unit, _Refused(FailureReason.DEPENDENCY_FAILED, wait.message, cause=cause))
        if self.uploader.leaves_earlier or wait.target in self._parked_keys:
            return self._park(unit, wait.message)
        return self._refuse(unit, _Refused(FailureReason.DANGLING_REFERENCE, wait.message))

    # --- outcomes -------------------------------------------------------------

    def _settle(self, unit: Unit, applied: list[_Applied]) -> list[Result]:
        results = []
        for member, (version, changed) in zip(unit, applied, strict=True):
            self._settled.append((member.seq, Settled(member.nonce, version, changed, b"", culprit=False)))
            results.append(Result(member.seq, Status.APPLIED, version, changed))
        return results

    def _refuse(self, unit: Unit, refusal: _Refused) -> list[Result]:
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

    def _record_failure(self, unit: Unit, culprit: Member, refusal: _Refused) -> bytes:
        if culprit.seq:
            failure_id = uuid_utils.uuid7().bytes
        else:
            # Nothing tells a repetition of unreadable bytes but the bytes themselves.
            failure_id = hashlib.sha256(self.uploader.replica + culprit.data).digest()[:16]
            if self.reader.failure(failure_id) is not None:
                return failure_id
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
            version=self.overlay.version,
            status=failure_pb2.FAILURE_STATUS_OPEN,
            cause_failure_id=str(uuid_utils.UUID(bytes=refusal.cause)) if refusal.cause else "",
        )
        record.create_time.FromMicroseconds(self.time_us)
        self._failures[failure_id] = FailureRecord(failure_id, record.SerializeToString(), tuple(_created_keys(unit)))
        return failure_id

    def _refused_creation(self, key: ObjectKey) -> bytes | None:
        return self._refused_creations.get(key) or self.reader.refused_creation(key)

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
            frozenset(self._parked_keys),
        )
        return Evaluation(writes, results, state)

    def require(self, target: ObjectKey, message: str) -> None:
        """Decide about a reference to an object that is not there: pass, or raise _Refused or _Waits."""
        if target in self._assumed:
            self._used.add(target)
            return
        cause = self._refused_creation(target)
        if cause:
            raise _Refused(FailureReason.DEPENDENCY_FAILED, message, cause=cause)
        raise _Waits(target, message)

    # --- one unit -------------------------------------------------------------

    def _apply_unit(self, unit: Unit) -> list[_Applied]:
        """Apply all members, or leave no trace and raise _Refused or _Waits."""
        mark = self.overlay.mark()
        applied: list[_Applied] = []
        try:
            for member in unit:
                applied.append(self._apply(member))  # noqa: PERF401 - what was done before a refusal is counted
        except _Refused as refusal:
            refusal.position = len(applied)
            self.overlay.rollback(mark)
            raise
        except BaseException:
            self.overlay.rollback(mark)
            raise
        return applied

    def _apply(self, member: Member) -> _Applied:
        operation = member.operation
        if member.error is not None or operation is None:
            reason = FailureReason.TOO_LARGE if isinstance(member.error, LimitExceeded) else FailureReason.MALFORMED
            raise _Refused(reason, str(member.error))
        key = operation.key
        state = self.overlay.state(key)
        action = _Action(self, operation)
        if operation.kind is OperationKind.CREATE:
            version = action.create(key, member.patch.set, encoded_attributes(operation.patch))
        else:
            if state is None:
                cause = self._refused_creation(key)
                raise _Refused(
                    FailureReason.DEPENDENCY_FAILED if cause else FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} " + ("could not be created" if cause else "does not exist"),
                    cause=cause or b"",
                )
            if operation.kind is OperationKind.DELETE and state.deleted:
                # Nothing changes, and that has been so up to this version.
                return _Applied(self.overlay.version, changed_by_server=False)
            # Another incarnation than the author saw; an author who created this one has seen it.
            if operation.base_version < state.created and state.creator != self.uploader.replica:
                raise _Refused(
                    FailureReason.OBJECT_GONE,
                    f"{key[0]} {key[1]!r} was deleted and created again since its author saw it",
                )
            if operation.kind is OperationKind.DELETE:
                version = action.delete(key)
            else:
                version = action.update(key, member.patch, operation.patch)
        return _Applied(version, action.changed_own_object)


class _Action:
    """
    One operation being applied, with everything that its hooks do meanwhile.

    `depth` is 0 for the operation itself and rises with each hook that writes.
    """

    def __init__(self, evaluator: _Evaluator, operation: Operation) -> None:
        self.operation = operation
        self.principal = evaluator.uploader.principal
        self.overlay = evaluator.overlay
        self.depth = 0
        self.changed_own_object = False
        self._evaluator = evaluator
        self._hooks = evaluator.application.hooks
        self._replica = evaluator.uploader.replica

    def create(self, key: ObjectKey, attributes: Attributes, encoded: bytes | None) -> int:
        """Create an object; *encoded* are its attributes' bytes, if the caller has them."""
        entity, id_ = key
        state = self.overlay.state(key)
        if state is not None and not state.deleted:
            raise _Refused(FailureReason.ALREADY_EXISTS, f"{entity} {id_!r} exists already")
        if hooks := self._hooks("before_commit", entity):
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
            raise _Refused(FailureReason.VALIDATION_FAILED, f"{entity} {id_!r}: {error}") from error
        if hooks := self._hooks("before_commit", entity):
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
        if hooks := self._hooks("before_delete", key[0]):
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
            raise _Refused(FailureReason.OBJECT_GONE, f"{key[0]} {key[1]!r} {what}")
        return state

    def _check_size(self, key: ObjectKey, encoded: bytes) -> None:
        if len(encoded) > OBJECT_BYTES_MAX:
            raise _Refused(
                FailureReason.TOO_LARGE,
                f"{key[0]} {key[1]!r} would have {len(encoded)} bytes of attributes: the limit is {OBJECT_BYTES_MAX}",
            )

    def _check_references(self, key: ObjectKey, written: Attributes) -> None:
        entity, id_ = key
        for attribute, target in self._evaluator.schema.referenced(entity, written):
            if target != key and not self.overlay.exists(target):
                self._evaluator.require(
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
            self._evaluator.time_us,
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
            raise _Refused(
                FailureReason.HOOK_ERROR,
                f"a before-commit hook of {key[0]} wrote its own object through the context "
                "instead of setting its attributes",
            )
        if hooked.attributes is not attributes and not equal(hooked.attributes, attributes):
            if key == self.operation.key:
                self.changed_own_object = True
            return hooked.attributes
        return attributes

    def _run_after(self, moment: str, key: ObjectKey, attributes: Attributes) -> None:
        if hooks := self._hooks(moment, key[0]):
            self._run(hooks, _HookedObject(key, attributes, frozen=True))

    def _run(self, hooks: list[Hook], hooked: _HookedObject) -> None:
        for hook in hooks:
            try:
                hook(hooked, _HookContext(self))
            except Reject as rejection:
                raise _Refused(FailureReason.HOOK_REJECTED, rejection.message) from rejection
            except (_Refused, _Waits, TransientError):
                raise
            except Exception as error:
                # Whatever the application's code raises settles the operation as a failure: it must not
                # end the session, and the traceback must not reach the client.
                name = getattr(hook, "__qualname__", repr(hook))
                _log.exception("hook failed", hook=name, entity=hooked.entity, id=hooked.id)
                raise _Refused(
                    FailureReason.HOOK_ERROR,
                    f"the application failed on {hooked.entity} {hooked.id!r}: the server's log has the details",
                ) from error


class _HookedObject:
    """The object that a hook gets; it copies the attributes at the first change. See `HookObject`."""

    def __init__(self, key: ObjectKey, attributes: Attributes, *, frozen: bool = False) -> None:
        self.entity, self.id = key
        self.attributes = attributes
        self._frozen = frozen
        self._copied = False

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes.get(attribute)

    def __contains__(self, attribute: object) -> bool:
        return attribute in self.attributes

    def __setitem__(self, attribute: str, value: Any) -> None:
        check_attribute_name(attribute)
        check(value, f"attribute {attribute!r}")
        self._own()[attribute] = value

    def __delitem__(self, attribute: str) -> None:
        self._own().pop(attribute, None)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.attributes)

    def _own(self) -> Attributes:
        if self._frozen:
            raise TypeError("only a before-commit hook sets attributes: use context.update here")
        if not self._copied:
            self.attributes = dict(self.attributes)
            self._copied = True
        return self.attributes


class _HookContext:
    """What a hook may use besides its object. See `HookContext`."""

    def __init__(self, action: _Action) -> None:
        self._action = action

    @property
    def principal(self) -> Principal:
        return self._action.principal

    @property
    def operation(self) -> Operation:
        return self._action.operation

    def get(self, entity: str, id: str) -> dict[str, Any] | None:  # noqa: A002
        overlay = self._action.overlay
        return dict(overlay.attributes((entity, id))) if overlay.exists((entity, id)) else None

    def query(self, entity: str, where: Where = None) -> Iterator[tuple[str, dict[str, Any]]]:
        constraint = constraint_of(where)
        overlay = self._action.overlay
        for key in overlay.entity_keys(entity):
            attributes = overlay.attributes(key)
            if constraint is None or constraint.matches(attributes):
                yield key[1], dict(attributes)

    def create(self, entity: str, attributes: dict[str, Any], id: str | None = None) -> str:  # noqa: A002
        id_ = str(uuid_utils.uuid7()) if id is None else id
        check_name(entity, "an entity name")
        check_id(id_)
        Patch(attributes).check()
        with self._deeper():
            self._action.create((entity, id_), dict(attributes), None)
        return id_

    def update(self, entity: str, id: str, attributes: dict[str, Any]) -> None:  # noqa: A002
        patch = Patch(dict(attributes))
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
            raise _Refused(
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
    return Member(operation.seq, operation.nonce, operation, patch, data, None)


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


def _created_keys(unit: Unit) -> list[ObjectKey]:
    return [
        member.operation.key
        for member in unit
        if member.operation is not None and member.operation.kind is OperationKind.CREATE
    ]


def _difference(before: Attributes, after: Attributes) -> Patch:
    return Patch(
        {name: value for name, value in after.items() if name not in before or not equal(before[name], value)},
        tuple(name for name in before if name not in after),
    )


_NO_PATCH = Patch()
