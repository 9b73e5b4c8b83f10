"""
Working off synchronization failures: retry, edit and retry, dismiss. No I/O.

What is retried is judged by today's rules, with the rights of its author as the
application knows them today, and written in the transaction that marks the failure as
retried: so it happens once. Whatever is done about a failure is added to its record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import uuid_utils

from tidelog._errors import InvalidValue
from tidelog._failure import FailureReason
from tidelog._operation import OperationKind
from tidelog.v1 import failure_pb2
from tidelog_server._action import References
from tidelog_server._application import Application
from tidelog_server._applier import UnitApplier
from tidelog_server._conflicts import collision
from tidelog_server._errors import FailureSettled, FailureStale, NotFound, RequestInvalid
from tidelog_server._history import changes_since
from tidelog_server._indexes import dependents_prefix
from tidelog_server._outcomes import Outcomes, Uploader
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import FailureRecord, Writes
from tidelog_server._refusal import Refused, Waits
from tidelog_server._store import Reader
from tidelog_server._units import Member, Unit, read_member

RETRIED_AT_ONCE_MAX: Final = 1_000
ACTIONS_KEPT_MAX: Final = 100

_OPEN: Final = failure_pb2.FAILURE_STATUS_OPEN


class RetryOutcome(NamedTuple):
    """
    What came of retrying one failure.

    Attributes:
        failure: The record as it is now.
        version: The version that its operation was applied at; 0: it was refused again.
        reason: Why it was refused again.
        message: The refusal in a sentence for people.
    """

    failure: failure_pb2.SynchronizationFailure
    version: int = 0
    reason: FailureReason | None = None
    message: str = ""


class Decision(NamedTuple):
    """
    What somebody decided about a failure.

    Attributes:
        operator: Who.
        time_us: The server's clock.
        note: Why.
        force: Whether changes made since the refusal are overruled.
        patch: Patch to be applied in place of the refused operation's, encoded; empty: as it is.
    """

    operator: Principal
    time_us: int
    note: str = ""
    force: bool = False
    patch: bytes = b""


def load(reader: Reader, failure_id: bytes) -> failure_pb2.SynchronizationFailure:
    """Return a failure's record. Raises NotFound."""
    data = reader.failure(failure_id)
    if data is None:
        raise NotFound(f"there is no failure {uuid_utils.UUID(bytes=failure_id)}", reason="FAILURE_NOT_FOUND")
    return failure_pb2.SynchronizationFailure.FromString(data)


def dependents(reader: Reader, failure_id: bytes) -> Iterator[bytes]:
    """Yield the ids of the failures that a failure caused directly, oldest first."""
    prefix = dependents_prefix(failure_id)
    after = b""
    while page := reader.index_range(prefix, after, RETRIED_AT_ONCE_MAX):
        for after, _value in page:
            yield after[len(prefix) :]


def retry(
    reader: Reader, application: Application, failure_id: bytes, decision: Decision
) -> tuple[Writes, list[RetryOutcome]]:
    """
    Apply the operation of a failure, then those that were refused because of it, in order.

    Raises:
        NotFound, FailureSettled: There is nothing to be retried.
        FailureStale: What it writes was changed since it was refused.
        RequestInvalid: It cannot be read, or the patch does not fit it.
        TransientError: A hook cannot tell now.
    """
    return _Retry(reader, application, decision).run(failure_id)


def dismiss(
    reader: Reader, failure_id: bytes, decision: Decision
) -> tuple[Writes, failure_pb2.SynchronizationFailure]:
    """Close a failure. Raises NotFound, FailureSettled."""
    record = _load_open(reader, failure_id)
    _settle(record, failure_pb2.FAILURE_STATUS_DISMISSED, decision)
    _act(record, failure_pb2.FAILURE_ACTION_KIND_DISMISSED, decision, acted_as="", outcome="")
    writes = Writes({}, [], None, [], [_stored(failure_id, record)], reader.head().version)
    return writes, record


def without_payload(
    reader: Reader, after: bytes, limit: int, bytes_max: int, settled_before_us: int
) -> tuple[Writes | None, bytes]:
    """
    Take the payloads out of the records, among the next ones, that were settled long ago.

    The rest of a record stays, for its operation may be repeated, and is then answered as before.

    Returns:
        What is to be written, and the id to go on after; empty at the end.
    """
    stripped = []
    found = reader.failures(after, limit, bytes_max)
    for failure_id, data in found:
        record = failure_pb2.SynchronizationFailure.FromString(data)
        is_old = record.HasField("settle_time") and record.settle_time.ToMicroseconds() < settled_before_us
        if record.status != _OPEN and is_old and not record.payload_removed:
            record.ClearField("operation")
            record.ClearField("group_operations")
            for action in record.actions:
                action.ClearField("edited_operation")
            record.payload_removed = True
            stripped.append(_stored(failure_id, record))
    writes = Writes({}, [], None, [], stripped, reader.head().version) if stripped else None
    return writes, found[-1][0] if found else b""


class _Retry:
    def __init__(self, reader: Reader, application: Application, decision: Decision) -> None:
        self._reader = reader
        self._application = application
        self._decision = decision
        self._overlay = Overlay(reader)
        self._head_version = self._overlay.version
        self._records: dict[bytes, FailureRecord] = {}

    def run(self, failure_id: bytes) -> tuple[Writes, list[RetryOutcome]]:
        record = _load_open(self._reader, failure_id)
        tenant = self._decision.operator.tenant
        author = self._application.user(tenant, record.user_id) or self._decision.operator
        replica = uuid_utils.UUID(record.replica_id).bytes
        references = References()
        units = UnitApplier(
            self._application,
            self._overlay,
            references,
            Outcomes(Uploader(replica, author, 0, False), self._reader, self._overlay, {}, self._decision.time_us),
            replica=replica,
            principal=author,
            rights=self._application.rights(author),
            time_us=self._decision.time_us,
        )
        outcomes = [self._retry_one(units, failure_id, record, author, self._unit(record, self._decision.patch))]
        waiting = [failure_id] if outcomes[0].version else []
        while waiting and len(outcomes) < RETRIED_AT_ONCE_MAX:
            for one_id, one, unit in self._open_dependents(waiting.pop(0)):
                outcome = self._retry_one(units, one_id, one, author, unit)
                outcomes.append(outcome)
                if outcome.version:
                    waiting.append(one_id)
        writes = Writes(
            objects=self._overlay.written_objects(),
            changes=self._overlay.changes,
            replica=None,
            settled=[],
            failures=list(self._records.values()),
            version=self._overlay.version,
            index_entries=units.index_writes(),
        )
        return writes, outcomes

    def _open_dependents(self, failure_id: bytes) -> list[tuple[bytes, failure_pb2.SynchronizationFailure, Unit]]:
        found = []
        for one_id in dependents(self._reader, failure_id):
            if one_id not in self._records:
                record = load(self._reader, one_id)
                if record.status == _OPEN:
                    found.append((one_id, record, self._unit(record, b"")))
        return sorted(found, key=lambda one: one[2][0].seq)

    def _unit(self, record: failure_pb2.SynchronizationFailure, patch: bytes) -> Unit:
        """Return the operations of a failure, the refused one with another patch if there is one."""
        schema = self._application.schema
        members = [read_member(data, schema) for data in record.group_operations or [record.operation]]
        if not patch:
            return tuple(members)
        culprit = _culprit(record)
        operation = members[culprit].operation
        if operation is None:
            raise RequestInvalid("the operation cannot be read, so it has no patch to be edited")
        edited = operation._replace(patch=patch, schema_version=schema.version)
        try:
            edited.decoded_patch()
        except InvalidValue as error:
            raise RequestInvalid(f"the edited patch: {error}") from error
        members[culprit] = read_member(edited.encode(), schema)
        return tuple(members)

    def _retry_one(
        self,
        units: UnitApplier,
        failure_id: bytes,
        record: failure_pb2.SynchronizationFailure,
        author: Principal,
        unit: Unit,
    ) -> RetryOutcome:
        decision = self._decision
        edited = unit[_culprit(record)].data if decision.patch and not self._records else b""
        if decision.force:
            unit = tuple(self._looking_at_present(unit))
        else:
            self._check_not_stale(record, unit)
        try:
            applied = units.apply(unit, failure_id)
        except (Refused, Waits) as refusal:
            reason = refusal.reason if isinstance(refusal, Refused) else FailureReason.DANGLING_REFERENCE
            _act(record, failure_pb2.FAILURE_ACTION_KIND_REFUSED, decision, author.user_id, refusal.message, edited)
            self._records[failure_id] = _stored(failure_id, record)
            return RetryOutcome(record, 0, reason, refusal.message)
        version = applied[-1][0]
        _settle(record, failure_pb2.FAILURE_STATUS_RETRIED, decision)
        outcome = f"applied at version {version}"
        _act(record, failure_pb2.FAILURE_ACTION_KIND_RETRIED, decision, author.user_id, outcome, edited)
        self._records[failure_id] = _stored(failure_id, record)
        return RetryOutcome(record, version)

    def _check_not_stale(self, record: failure_pb2.SynchronizationFailure, unit: Unit) -> None:
        """Raise FailureStale if somebody has changed since the refusal what the unit writes."""
        for member in unit:
            operation = member.operation
            if operation is None or operation.kind is OperationKind.CREATE:
                continue
            patch = member.patch if operation.kind is OperationKind.UPDATE else None
            state = self._overlay.state(operation.key)
            if state is None:
                continue
            for change in changes_since(record.version, state.version, self._overlay.change):
                if change.version <= self._head_version and collision(change, patch) is not None:
                    entity, id_ = operation.key
                    raise FailureStale(
                        f"what the operation writes of {entity} {id_!r} was changed since it was refused: "
                        "look at the object, then force the retry or dismiss the failure"
                    )

    def _looking_at_present(self, unit: Unit) -> Iterator[Member]:
        """Yield the members as if their author had seen the objects as they are."""
        for member in unit:
            if member.operation is None:
                yield member
                continue
            state = self._overlay.state(member.operation.key)
            version = state.version if state is not None else 0
            yield member._replace(operation=member.operation._replace(base_version=version))


def _culprit(record: failure_pb2.SynchronizationFailure) -> int:
    """Return the place of the refused operation in its commit group."""
    return next((place for place, data in enumerate(record.group_operations) if data == record.operation), 0)


def _load_open(reader: Reader, failure_id: bytes) -> failure_pb2.SynchronizationFailure:
    record = load(reader, failure_id)
    if record.status != _OPEN:
        what = "retried" if record.status == failure_pb2.FAILURE_STATUS_RETRIED else "dismissed"
        raise FailureSettled(f"the failure {record.id} was {what} already, by {record.settled_by}")
    return record


def _settle(
    record: failure_pb2.SynchronizationFailure, status: failure_pb2.FailureStatus.ValueType, decision: Decision
) -> None:
    record.status = status
    record.settled_by = decision.operator.user_id
    record.settle_time.FromMicroseconds(decision.time_us)


def _act(  # noqa: PLR0917 - the fields of one entry
    record: failure_pb2.SynchronizationFailure,
    kind: failure_pb2.FailureActionKind.ValueType,
    decision: Decision,
    acted_as: str,
    outcome: str,
    edited: bytes = b"",
) -> None:
    action = record.actions.add(
        kind=kind,
        user_id=decision.operator.user_id,
        acted_as=acted_as,
        note=decision.note,
        outcome=outcome,
        edited_operation=edited,
        forced=decision.force,
    )
    action.time.FromMicroseconds(decision.time_us)
    # A record must fit a message, however often somebody tries.
    del record.actions[:-ACTIONS_KEPT_MAX]


def _stored(failure_id: bytes, record: failure_pb2.SynchronizationFailure) -> FailureRecord:
    return FailureRecord(failure_id, record.SerializeToString(), uuid_utils.UUID(record.replica_id).bytes, ())
