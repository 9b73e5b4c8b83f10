"""
Working off synchronization failures: retry, edit and retry, dismiss. No I/O.

What is retried is judged by today's rules, with the rights of its author as the
application knows them today, and written in the transaction that marks the failure as
retried: so it happens once. Whatever is done about a failure is added to its record.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import uuid_utils

from tidelog._errors import InvalidValue, LimitExceeded
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._limits import GROUP_BYTES_MAX, OPERATION_BYTES_MAX
from tidelog._operation import Operation, OperationKind, decode_operation, identity_of
from tidelog._patch import Patch
from tidelog._schema import Schema
from tidelog.v1 import failure_pb2
from tidelog_server._action import References
from tidelog_server._application import Application
from tidelog_server._applier import UnitApplier
from tidelog_server._author import Author
from tidelog_server._conflicts import collision
from tidelog_server._errors import FailureSettled, FailureStale, HistoryCollected, NotFound, RequestInvalid
from tidelog_server._file_records import SERVICE, failure_referral, referral_writes
from tidelog_server._file_rules import FileRules
from tidelog_server._history import changes_since
from tidelog_server._indexes import IndexWrites, dependents_prefix
from tidelog_server._knowledge import Knowledge
from tidelog_server._outcomes import Outcomes, Uploader
from tidelog_server._overlay import Overlay
from tidelog_server._principal import Principal
from tidelog_server._records import MAX_POSITION, FailureRecord, Writes
from tidelog_server._refusal import NotReady, Refused, Waits
from tidelog_server._store import Reader
from tidelog_server._units import Member, Unit, created_keys, read_member, size_bytes, split_units

RETRIED_AT_ONCE_MAX: Final = 1_000
RETRY_ROUNDS_MAX: Final = 16
DEPENDENTS_PAGE: Final = 1_000

# A record must fit a message, however often somebody tries: what was applied stands in the change log too.
ACTIONS_KEPT_MAX: Final = 100
EDITS_KEPT_BYTES_MAX: Final = OPERATION_BYTES_MAX

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
    while page := reader.index_range(prefix, after, DEPENDENTS_PAGE):
        for after, _value in page:
            yield after[len(prefix) :]


def key_of(record: failure_pb2.SynchronizationFailure, schema: Schema) -> ObjectKey:
    """Return the key of the object that a failure is about, in the names of the present schema."""
    operation = read_member(record.operation, schema).operation
    return operation.key if operation is not None else (record.entity, record.object_id)


def retry(
    reader: Reader, application: Application, failure_id: bytes, decision: Decision
) -> tuple[Writes, list[RetryOutcome]]:
    """
    Apply the operation of a failure, then those that were refused because of it, in the order of the log.

    At most 1,000 at once: the others stay open, and are retried like any failure.

    Raises:
        NotFound, FailureSettled: There is nothing to be retried.
        FailureStale: What it writes was changed since it was refused.
        RequestInvalid: It cannot be read, or the patch does not fit it.
        TransientError: A hook cannot tell now. Nothing is done.
    """
    return _Retry(reader, application, failure_id, decision).run()


def dismiss(
    reader: Reader, failure_id: bytes, decision: Decision
) -> tuple[Writes, failure_pb2.SynchronizationFailure]:
    """Close a failure. Raises NotFound, FailureSettled."""
    record = _load_open(reader, failure_id)
    _settle(record, failure_pb2.FAILURE_STATUS_DISMISSED, decision)
    _act(record, failure_pb2.FAILURE_ACTION_KIND_DISMISSED, decision, acted_as="", outcome="")
    stored = _stored(failure_id, record)
    files = referral_writes(failure_referral(stored), reader.index, decision.time_us)
    return Writes({}, [], None, [], [stored], reader.head().version, files), record


def is_payload_due(data: bytes, settled_before_us: int) -> bool:
    """Tell whether a serialized record was settled so long ago that its payload goes."""
    record = failure_pb2.SynchronizationFailure.FromString(data)
    return (
        not record.payload_removed
        and record.HasField("settle_time")
        and record.settle_time.ToMicroseconds() < settled_before_us
    )


def without_payloads(reader: Reader, failure_ids: Iterable[bytes]) -> Writes:
    """
    Take the payloads out of settled records.

    The rest of a record stays, for its operation may be repeated, and is then answered as before.
    """
    stripped = []
    for failure_id in failure_ids:
        record = load(reader, failure_id)
        record.ClearField("operation")
        record.ClearField("group_operations")
        for action in record.actions:
            action.ClearField("edited_operation")
        record.payload_removed = True
        stripped.append(_stored(failure_id, record))
    return Writes({}, [], None, [], stripped, reader.head().version)


class _Candidate(NamedTuple):
    """
    A failure that may be retried along with another.

    Attributes:
        seq: Its place in the log of its replica.
        creates: Keys of the objects that its operations create.
        dependents: Ids of the candidates that it caused.
    """

    seq: int
    creates: list[ObjectKey]
    dependents: list[bytes]


class _Retry:
    """
    One failure with those that depend on it, in one store transaction.

    Operations may refer to what comes behind them. So all are tried as if the
    creations of the others took place; what was relied on in vain is not taken for
    granted in the next round, until nothing was.
    """

    def __init__(self, reader: Reader, application: Application, failure_id: bytes, decision: Decision) -> None:
        record = _load_open(reader, failure_id)
        operator, time_us = decision.operator, decision.time_us
        replica = uuid_utils.UUID(record.replica_id).bytes
        known_author = application.user(operator.tenant, record.user_id)
        author = known_author or operator
        overlay = Overlay(reader)
        references = References()
        uploader = Uploader(replica, author, 0, leaves_earlier=False)
        outcomes = Outcomes(uploader, reader, overlay, Knowledge(overlay, None), {}, time_us)
        self._reader = reader
        self._schema = application.schema
        self._failure_id = failure_id
        self._decision = decision
        self._author = author
        self._replica = replica
        self._overlay = overlay
        self._references = references
        self._outcomes = outcomes
        self._head_version = overlay.version
        # What the author uploaded, the author may refer to, whoever retries; and what the operator has put in its
        # place since. What an operator may merely read, or had before, is for nobody else.
        author_then = Principal(record.user_id, operator.tenant, frozenset(record.roles))
        self._files = FileRules(
            overlay,
            application.rights(known_author or author_then) if application.access_rules else None,
            user_id=record.user_id,
            bytes_max=MAX_POSITION,
            vouching=(operator.user_id, SERVICE),
        )
        self._units = UnitApplier(
            application,
            overlay,
            references,
            outcomes,
            author=Author(replica),
            principal=author,
            rights=application.rights(author),
            time_us=time_us,
            files=self._files,
        )
        self._results: list[RetryOutcome] = []
        self._records: list[FailureRecord] = []
        self._moves: IndexWrites = {}

    def run(self) -> tuple[Writes, list[RetryOutcome]]:
        candidates = self._candidates()
        granted = frozenset(key for candidate in candidates.values() for key in candidate.creates)
        mark = self._overlay.mark()
        rounds = 1
        while missing := self._round(candidates, granted):
            self._overlay.rollback(mark)
            rounds += 1
            granted = granted - missing if rounds < RETRY_ROUNDS_MAX else frozenset()
        writes = Writes(
            objects=self._overlay.written_objects(),
            changes=self._overlay.changes,
            replica=None,
            settled=[],
            failures=self._records,
            version=self._overlay.version,
            index_entries={**self._units.index_writes(self._records), **self._moves},
        )
        return writes, self._results

    def _candidates(self) -> dict[bytes, _Candidate]:
        """Return the failure, and the open ones that may follow it, no more than can be retried at once."""
        found = {self._failure_id: self._candidate(load(self._reader, self._failure_id))}
        causes = [self._failure_id]
        for cause in causes:
            for failure_id in dependents(self._reader, cause):
                if len(found) >= RETRIED_AT_ONCE_MAX:
                    return found
                record = load(self._reader, failure_id)
                if failure_id not in found and record.status == _OPEN:
                    found[failure_id] = self._candidate(record)
                    found[cause].dependents.append(failure_id)
                    causes.append(failure_id)
        return found

    def _candidate(self, record: failure_pb2.SynchronizationFailure) -> _Candidate:
        return _Candidate(identity_of(record.operation)[0], created_keys(self._unit(record, b"")), [])

    def _round(self, candidates: dict[bytes, _Candidate], granted: frozenset[ObjectKey]) -> set[ObjectKey]:
        """Try everything, with some creations taken for granted; return those that were so in vain."""
        self._results, self._records, self._moves = [], [], {}
        references = self._references
        references.assumed = Counter(key for one in candidates.values() for key in one.creates if key in granted)
        missing: set[ObjectKey] = set()
        users: defaultdict[ObjectKey, list[_Candidate]] = defaultdict(list)
        # In the order of the log: what came last may build upon everything before it.
        waiting = [(0, self._failure_id)]
        while waiting:
            _seq, failure_id = heapq.heappop(waiting)
            candidate = candidates[failure_id]
            # What a unit creates itself will be there if anything of the unit is.
            references.assumed.update(key for key in candidate.creates if key not in granted)
            references.begin_unit()
            result = self._following(failure_id) if self._results else self._first()
            self._results.append(result)
            references.end_unit(candidate.creates)
            if result.version:
                for key in references.used:
                    users[key].append(candidate)
                missing |= references.used
                missing.difference_update(candidate.creates)
                for one in candidate.dependents:
                    heapq.heappush(waiting, (candidates[one].seq, one))
        # Whoever relied on them will not create anything either.
        falling = list(missing)
        for key in falling:
            lost = {created for user in users[key] for created in user.creates} - missing
            missing |= lost
            falling.extend(lost)
        return missing

    def _first(self) -> RetryOutcome:
        record = load(self._reader, self._failure_id)
        unit = self._unit(record, self._decision.patch)
        edited = unit[_culprit(record)].data if self._decision.patch else b""
        return self._apply(self._failure_id, record, self._looked_at(record, unit), edited)

    def _following(self, failure_id: bytes) -> RetryOutcome:
        """Retry a failure because the one that caused it was applied; if it is refused again, the rest goes on."""
        record = load(self._reader, failure_id)
        try:
            unit = self._looked_at(record, self._unit(record, b""))
        except FailureStale as stale:
            return self._refuse(failure_id, record, Refused(FailureReason.CONFLICT, stale))
        return self._apply(failure_id, record, unit)

    def _unit(self, record: failure_pb2.SynchronizationFailure, patch: bytes) -> Unit:
        """Return the operations of a failure, the refused one with another patch if there is one."""
        members = [read_member(data, self._schema) for data in record.group_operations or [record.operation]]
        if patch:
            members[_culprit(record)] = _edited(record.operation, patch, self._schema)
        # A record holds one unit. One that was not whole when it came is not whole now.
        unit = next(split_units(members))
        if len(unit) > 1 and size_bytes(unit) > GROUP_BYTES_MAX:
            error = LimitExceeded(f"a commit group of {size_bytes(unit)} bytes: the limit is {GROUP_BYTES_MAX}")
            return (unit[0]._replace(error=error), *unit[1:])
        return unit

    def _looked_at(self, record: failure_pb2.SynchronizationFailure, unit: Unit) -> Unit:
        """Return the unit as it is to be judged. Raises FailureStale if a person has to look at it first."""
        if self._decision.force:
            return tuple(self._looking_at_present(unit))
        self._check_not_stale(record, unit)
        return unit

    def _apply(
        self, failure_id: bytes, record: failure_pb2.SynchronizationFailure, unit: Unit, edited: bytes = b""
    ) -> RetryOutcome:
        self._files.vouching_since_us = record.create_time.ToMicroseconds()
        try:
            applied = self._units.apply(unit, failure_id)
        except Refused as refusal:
            return self._refuse(failure_id, record, refusal, edited)
        except Waits as wait:
            cause = self._outcomes.refused_creation(wait.target) or b""
            reason = FailureReason.DEPENDENCY_FAILED if cause else FailureReason.DANGLING_REFERENCE
            return self._refuse(failure_id, record, Refused(reason, wait.message, cause=cause), edited)
        except NotReady as verdict:
            return self._refuse(failure_id, record, Refused(FailureReason.FILE_MISSING, verdict.message), edited)
        version = applied[-1][0]
        _settle(record, failure_pb2.FAILURE_STATUS_RETRIED, self._decision)
        self._note(
            failure_id, record, failure_pb2.FAILURE_ACTION_KIND_RETRIED, f"applied at version {version}", edited
        )
        return RetryOutcome(record, version)

    def _refuse(
        self, failure_id: bytes, record: failure_pb2.SynchronizationFailure, refusal: Refused, edited: bytes = b""
    ) -> RetryOutcome:
        # What an edited operation lacks says nothing of the one that stays on record.
        if refusal.cause not in {b"", failure_id} and not edited:
            self._hang_under(refusal.cause, failure_id, record)
        outcome = f"{refusal.reason}: {refusal.message}"
        self._note(failure_id, record, failure_pb2.FAILURE_ACTION_KIND_REFUSED, outcome, edited)
        return RetryOutcome(record, 0, refusal.reason, refusal.message)

    def _hang_under(self, cause: bytes, failure_id: bytes, record: failure_pb2.SynchronizationFailure) -> None:
        """Let a failure follow the one that stands in its way now: the last that does takes it along."""
        if record.cause_failure_id:
            former = uuid_utils.UUID(record.cause_failure_id).bytes
            self._moves[dependents_prefix(former) + failure_id] = None
        self._moves[dependents_prefix(cause) + failure_id] = b""
        record.cause_failure_id = str(uuid_utils.UUID(bytes=cause))

    def _note(
        self,
        failure_id: bytes,
        record: failure_pb2.SynchronizationFailure,
        kind: failure_pb2.FailureActionKind.ValueType,
        outcome: str,
        edited: bytes,
    ) -> None:
        _act(record, kind, self._decision, self._author.user_id, outcome, edited)
        self._records.append(_stored(failure_id, record))

    def _check_not_stale(self, record: failure_pb2.SynchronizationFailure, unit: Unit) -> None:
        """Raise FailureStale if somebody has changed since the refusal what the unit writes."""
        for member in unit:
            operation = member.operation
            if operation is None or operation.kind is OperationKind.CREATE:
                continue
            patch = member.patch if operation.kind is OperationKind.UPDATE else None
            state = self._overlay.state(operation.key)
            if state is not None and self._is_changed(operation, patch, record.version, state.version):
                entity, id_ = operation.key
                raise FailureStale(
                    f"what the operation writes of {entity} {id_!r} was changed since it was refused: "
                    "look at the object, then force the retry or dismiss the failure"
                )

    def _is_changed(self, operation: Operation, patch: Patch | None, since: int, newest: int) -> bool:
        """Tell whether somebody changed what an operation writes above a version, as far as that can be ruled out."""
        try:
            for change in changes_since(since, newest, self._overlay.change):
                # What its author did before it is no news to it, even if it was refused too and retried first.
                is_earlier = change.replica == self._replica and change.seq < operation.seq
                if change.version <= self._head_version and not is_earlier and collision(change, patch) is not None:
                    return True
        except HistoryCollected:
            return True  # something was, and nobody can tell any more what
        return False

    def _looking_at_present(self, unit: Unit) -> Iterator[Member]:
        """Yield the members as if their author had seen the objects as they are."""
        for member in unit:
            if member.operation is None:
                yield member
                continue
            state = self._overlay.state(member.operation.key)
            version = state.version if state is not None else 0
            yield member._replace(operation=member.operation._replace(base_version=version))


def _edited(data: bytes, patch: bytes, schema: Schema) -> Member:
    """Return a refused operation with another patch, which is in the names of the present schema."""
    try:
        operation = decode_operation(data)
        entity, _ = schema.upcast(operation.entity, Patch(), operation.schema_version)
    except InvalidValue as error:
        raise RequestInvalid(f"the operation cannot be read, so it cannot be edited: {error}") from error
    edited = operation._replace(entity=entity, patch=patch, schema_version=schema.version)
    member = read_member(edited.encode(), schema)
    if member.error is not None:
        raise RequestInvalid(f"the edited operation: {member.error}") from member.error
    return member


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
    del record.actions[:-ACTIONS_KEPT_MAX]
    kept_bytes = 0
    for one in reversed(record.actions):
        kept_bytes += len(one.edited_operation)
        if kept_bytes > EDITS_KEPT_BYTES_MAX:
            one.ClearField("edited_operation")


def _stored(failure_id: bytes, record: failure_pb2.SynchronizationFailure) -> FailureRecord:
    return FailureRecord(failure_id, record.SerializeToString(), uuid_utils.UUID(record.replica_id).bytes, ())
