"""
The engine: decides what becomes of operations. No I/O.

A batch, what the store holds, and the application go in; what is to be written and
one result per operation come out. The store's one writer thread runs it inside a
transaction, a simulation can run it anywhere.

For each unit (an operation, or a commit group), in order: settled already? ->
readable -> applied by the rules (see `_action`). A refusal undoes the whole unit and
becomes a failure record with the payload; what follows goes on.

An operation whose reference leads to an object that has not arrived is *held*, with
its group and with later operations on its object. When all batches have come the
held ones are settled together (see `_held`). One that refers to the content of a file
which is not there stays pending, like any that can be neither applied nor refused now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tidelog._failure import FailureReason
from tidelog._file_reference import file_references
from tidelog._keys import ObjectKey
from tidelog._limits import BATCH_OPERATIONS_MAX, GROUP_BYTES_MAX
from tidelog._operation import OperationKind
from tidelog._patch import Patch
from tidelog_server import _account, _runs
from tidelog_server._action import References
from tidelog_server._application import Application
from tidelog_server._applier import UnitApplier
from tidelog_server._errors import OperationForked, OperationsOutOfOrder, RequestInvalid, SessionSuperseded
from tidelog_server._file_records import content_key, grant_key
from tidelog_server._file_rules import FileRules
from tidelog_server._formers import Formers
from tidelog_server._held import HeldUnits
from tidelog_server._indexes import unique_key
from tidelog_server._knowledge import Knowledge
from tidelog_server._outcomes import BEHIND_ANOTHER, Applied, Outcomes, Result, Status, Uploader
from tidelog_server._overlay import Overlay
from tidelog_server._records import Settled, Writes
from tidelog_server._refusal import NotReady, Refused, Waits
from tidelog_server._store import Reader
from tidelog_server._units import (
    FormerOutcome,
    Member,
    Unit,
    contents_of,
    is_whole,
    keys_of,
    read_member,
    size_bytes,
    split_units,
)

GIVEN_UP: Final = "the server's process ended again and again while it was applied: the server's log has the details"

FRAGMENTED: Final = "the replica has left too many earlier operations behind: synchronize everything"

HELD_UNITS_MAX: Final = 10_000
# Each gap that a replica leaves in what is settled is written again with each batch.
SETTLED_RANGES_MAX: Final = 10_000
HELD_BYTES_MAX: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UploadState:
    """
    What a session carries from batch to batch. A value: a batch that runs again starts from the same one.

    Attributes:
        last_seq: Newest seq received.
        last_former_seq: Newest seq received of what is offered again.
        lost: Contents that held units refer to, and that the replica has lost.
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
    last_former_seq: int = 0
    lost: frozenset[bytes] = frozenset()


class Trial(NamedTuple):
    """
    How units are tried of which one may end the process. See `_attempts`.

    Attributes:
        given_up: The first seqs of units that are refused without being run.
        announce: Called with each unit before it is run. None: nobody has to know.
    """

    given_up: frozenset[int] = frozenset()
    announce: Callable[[Unit], None] | None = None


NO_TRIAL: Final = Trial()


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
    former_outcomes: Sequence[FormerOutcome] = (),
    lost_contents: Iterable[bytes] = (),
    trial: Trial = NO_TRIAL,
) -> Evaluation:
    """
    Settle a batch of serialized operations as far as it can be settled now.

    There is one result per operation, in order; held ones have a preliminary one.
    With *former_outcomes*, one an operation, the batch offers again what was settled
    before the store was put back from a backup. *lost_contents* are those that the
    replica cannot upload any more.

    Raises:
        SessionSuperseded, OperationForked, RequestInvalid, TransientError:
            Nothing of the batch may be written, and the session ends.
    """
    evaluator = _Evaluator(application, uploader, reader, state, time_us, trial)
    return evaluator.batch(batch, former_outcomes, frozenset(lost_contents))


def evaluate_held(
    *,
    application: Application,
    uploader: Uploader,
    reader: Reader,
    state: UploadState,
    time_us: int,
    trial: Trial = NO_TRIAL,
) -> Evaluation:
    """
    Settle the held operations together, as if all their creations existed.

    Refused ones are dropped, with what depends on them, until nothing changes.
    Raises what `evaluate_batch` raises.
    """
    return _Evaluator(application, uploader, reader, state, time_us, trial).held()


class _Evaluator:
    """One batch, or the held operations of one session, in one store transaction."""

    def __init__(  # noqa: PLR0917 - as those who call it are called
        self,
        application: Application,
        uploader: Uploader,
        reader: Reader,
        state: UploadState,
        time_us: int,
        trial: Trial,
    ) -> None:
        known = reader.replica(uploader.replica)
        if known is None or known.session_number != uploader.session_number:
            raise SessionSuperseded("a newer session of this replica has begun to upload")
        self._application = application
        self._schema = application.schema
        self._uploader = uploader
        self._reader = reader
        self._overlay = Overlay(reader)
        rights = application.rights(uploader.principal)
        knowledge = Knowledge(self._overlay, rights if application.access_rules else None)
        self._outcomes = Outcomes(uploader, reader, self._overlay, knowledge, state.parked, time_us)
        self._references = References()
        self._files = FileRules(
            self._overlay,
            rights if application.access_rules else None,
            user_id=uploader.principal.user_id,
            bytes_max=uploader.file_bytes_max,
            lost=state.lost,
        )
        self._units = UnitApplier(
            application,
            self._overlay,
            self._references,
            self._outcomes,
            author=uploader.author,
            principal=uploader.principal,
            rights=rights,
            time_us=time_us,
            files=self._files,
        )
        self._formers = Formers(uploader.replica, uploader.formers, reader)
        self._trial = trial
        # What every operation passes takes no detour for the sake of a few.
        self._apply = self._units.apply if trial is NO_TRIAL else self._try
        self._replica_state = known
        self._is_fragmented = len(known.settled_ranges) >= SETTLED_RANGES_MAX
        self._last_seq = state.last_seq
        self._last_former_seq = state.last_former_seq
        self._held = list(state.held)
        self._held_bytes = state.held_bytes
        self._held_keys = set(state.held_keys)
        self._lost = state.lost

    # --- a batch --------------------------------------------------------------

    def batch(
        self, batch: Sequence[bytes], former_outcomes: Sequence[FormerOutcome], lost: frozenset[bytes]
    ) -> Evaluation:
        schema = self._schema
        self._files.lost = lost
        members = [read_member(data, schema) for data in batch]
        if former_outcomes:
            if len(former_outcomes) != len(members):
                raise RequestInvalid("a batch that is offered again has one former outcome an operation")
            members = [member._replace(former=former) for member, former in zip(members, former_outcomes, strict=True)]
            self._last_former_seq = _checked_order(members, self._last_former_seq)
        else:
            self._last_seq = _checked_order(members, self._last_seq)
        former, forgotten = self._settled_before(members)
        self._prefetch(members)
        units = list(split_units(members))
        if len(members) > BATCH_OPERATIONS_MAX and len(units) > 1:
            raise RequestInvalid(f"a batch of {len(members)} operations: the limit is {BATCH_OPERATIONS_MAX}")
        results: list[Result] = []
        for unit in units:
            if former and any(member.seq in former for member in unit):
                results.extend(self._repeated(unit, former, forgotten))
            elif forgotten and not forgotten.isdisjoint(member.seq for member in unit):
                results.extend(self._outcomes.refuse(unit, _superseded()))
            else:
                results.extend(self._first_try(unit))
        return self._evaluation(results)

    def _settled_before(self, members: list[Member]) -> tuple[dict[int, Settled], set[int]]:
        """Look up what was settled before, and the seqs of that of which nobody knows any more how."""
        # Nothing above the newest settled seq was.
        newest = self._replica_state.newest_seq
        seqs = [member.seq for member in members if 0 < member.seq <= newest]
        former = self._reader.settled(self._uploader.replica, seqs) if seqs else {}
        for member in members:
            if member.seq in former and former[member.seq].nonce != member.nonce:
                raise OperationForked(f"seq {member.seq} of this replica was settled before as another operation")
        has_settled = self._replica_state.has_settled
        forgotten = {seq for seq in seqs if seq not in former and has_settled(seq)}
        if self._formers.exist:
            concern = self._formers.concern
            rest = {one.seq: one.nonce for one in members if one.seq and one.seq not in former and concern(one.seq)}
            former |= self._formers.settled(rest)
            forgotten.update(filter(self._formers.is_forgotten, rest))
            forgotten.difference_update(former)
        return former, forgotten

    def _prefetch(self, members: Sequence[Member]) -> None:
        """Read what the operations are going to need, as far as they say so themselves."""
        self._overlay.prefetch(self._named_objects(members))
        self._overlay.prefetch_index(self._named_entries(members))

    def _named_entries(self, members: Iterable[Member]) -> Iterator[bytes]:
        """Yield the keys of the table of indexes that every batch needs, or one with what these operations name."""
        yield _runs.PRESENT
        yield _account.FAILURES
        overlay, user_id = self._overlay, self._uploader.principal.user_id
        for operation, patch in ((one.operation, one.patch) for one in members if one.operation is not None):
            entity = self._schema.entity(operation.entity)
            for names in entity.unique if entity is not None else ():
                if not patch.set.keys().isdisjoint(names):
                    held = overlay.attributes(operation.key) if overlay.exists(operation.key) else {}
                    if (key := unique_key(operation.entity, names, {**held, **patch.set})) is not None:
                        yield key
            for _attribute, reference in file_references(patch.set):
                yield content_key(reference.sha256)
                yield grant_key(reference.sha256, user_id)

    def _named_objects(self, members: Iterable[Member]) -> Iterator[ObjectKey]:
        has_references = self._schema.has_references
        for member in members:
            if member.operation is not None:
                yield member.operation.key
                if has_references:
                    for _attribute, target in self._schema.referenced(member.operation.entity, member.patch.set):
                        yield target

    def _repeated(self, unit: Unit, former: dict[int, Settled], forgotten: set[int]) -> Iterator[Result]:
        for member in unit:
            settled = former.get(member.seq)
            if settled is None:
                refusal = Refused(FailureReason.MALFORMED, "a part of its commit group was settled before without it")
                if member.seq in forgotten:
                    refusal = _superseded()
                yield from self._outcomes.refuse((member,), refusal)
            else:
                yield self._outcomes.repeat(member, settled, is_new=not self._replica_state.has_settled(member.seq))

    def _first_try(self, unit: Unit) -> list[Result]:
        outcomes = self._outcomes
        if (former := unit[0].former) is not None and not former.version:
            return outcomes.record_former(unit)
        if outcomes.is_parked(unit):
            return outcomes.park(unit, BEHIND_ANOTHER)
        if former is not None and not is_whole(unit):
            message = "a part of its commit group is not kept any more: what is left of it is not applied on its own"
            return outcomes.refuse(unit, Refused(FailureReason.SUPERSEDED, message))
        if self._is_fragmented and self._is_behind_gap(unit):
            return outcomes.park(unit, FRAGMENTED)
        if len(unit) > 1 and size_bytes(unit) > GROUP_BYTES_MAX:
            message = f"a commit group of {size_bytes(unit)} bytes: the limit is {GROUP_BYTES_MAX}"
            return outcomes.refuse(unit, Refused(FailureReason.TOO_LARGE, message))
        if self._is_newer(unit):
            return outcomes.park(unit, "made with a newer schema than the server has: waits for the server")
        if self._held_keys and not self._held_keys.isdisjoint(keys_of(unit)):
            return self._hold(unit, BEHIND_ANOTHER)
        try:
            return outcomes.settle(unit, self._apply(unit))
        except Refused as refusal:
            if refusal.reason is FailureReason.UNIQUE_VIOLATED and self._held:
                return self._hold(unit, refusal.message)  # one that waits may give the value free
            return outcomes.refuse(unit, refusal)
        except Waits as wait:
            return self._hold(unit, wait.message)
        except NotReady as verdict:
            return outcomes.park(unit, verdict.message)

    def _try(self, unit: Unit) -> list[Applied]:
        if unit[0].seq in self._trial.given_up:
            raise Refused(FailureReason.HOOK_ERROR, GIVEN_UP)
        if self._trial.announce is not None:
            self._trial.announce(unit)
        return self._units.apply(unit)

    def _is_behind_gap(self, unit: Unit) -> bool:
        """Tell whether the operation before a unit is not settled."""
        seq = unit[0].seq - 1
        settled_now = (at for at, _ in reversed(self._outcomes.settled))
        return seq > 0 and not self._replica_state.has_settled(seq) and seq not in settled_now

    def _is_newer(self, unit: Unit) -> bool:
        return self._application.has_schema and any(
            member.operation is not None and member.operation.schema_version > self._schema.version for member in unit
        )

    def _hold(self, unit: Unit, message: str) -> list[Result]:
        unit_bytes = size_bytes(unit)
        if len(self._held) >= HELD_UNITS_MAX or self._held_bytes + unit_bytes > HELD_BYTES_MAX:
            return self._outcomes.park(unit, f"{message}; too many operations wait already")
        self._held.append(unit)
        self._held_bytes += unit_bytes
        self._held_keys.update(keys_of(unit))
        if self._files.lost:
            self._lost |= {sha256 for sha256 in contents_of(unit) if sha256 in self._files.lost}
        return [Result(member.seq, Status.HELD, message=message) for member in unit]

    # --- the held operations --------------------------------------------------

    def held(self) -> Evaluation:
        self._prefetch([member for unit in self._held for member in unit])
        units = HeldUnits(self._overlay, self._outcomes, self._references, self._apply)
        results = units.settle(self._held)
        self._held, self._held_bytes, self._held_keys, self._lost = [], 0, set(), frozenset()
        return self._evaluation(results)

    def _record_left_out(self) -> None:
        """Record files without which something was applied, unless others have taken their place."""
        overlay, left_out = self._overlay, self._units.left_out
        for seq, settled in self._outcomes.settled if left_out else ():
            if seq not in left_out or settled.failure_id:
                continue
            key = left_out[seq].operation.key
            if overlay.exists(key) and (missing := left_out[seq].missing_in(overlay.attributes(key))):
                rest = left_out[seq].operation._replace(
                    kind=OperationKind.UPDATE,
                    base_version=settled.version,
                    patch=Patch(missing).encode(),
                    group=None,
                    schema_version=self._schema.version,
                )
                self._outcomes.record_left_out(rest)

    def _evaluation(self, results: list[Result]) -> Evaluation:
        overlay, outcomes = self._overlay, self._outcomes
        self._record_left_out()
        replica_state = outcomes.replica_state(self._replica_state)
        failures = outcomes.failures
        writes = Writes(
            objects=overlay.written_objects(),
            changes=overlay.changes,
            replica=(self._uploader.replica, replica_state) if replica_state is not None else None,
            settled=outcomes.settled,
            failures=failures,
            version=overlay.version,
            index_entries={
                **self._units.index_writes(failures),
                **outcomes.index_writes(),
                **self._formers.notes(outcomes.settled),
                **(_runs.next_commit(self._reader, overlay.index) if outcomes.settled else {}),
                **(
                    _account.with_failures(self._reader, overlay.index, failures)
                    if outcomes.settled or failures
                    else {}
                ),
            },
        )
        state = UploadState(
            self._last_seq,
            tuple(self._held),
            self._held_bytes,
            frozenset(self._held_keys),
            outcomes.parked,
            self._last_former_seq,
            self._lost,
        )
        return Evaluation(writes, results, state)


def _checked_order(members: Iterable[Member], last_seq: int) -> int:
    """Return the newest seq. Raises OperationsOutOfOrder."""
    for member in members:
        if member.seq:
            if member.seq <= last_seq:
                raise OperationsOutOfOrder(f"seq {member.seq} came after seq {last_seq}")
            last_seq = member.seq
    return last_seq


def _superseded() -> Refused:
    """Refuse what was settled before: whoever applied it again might do so twice."""
    message = "what was settled at its place is forgotten: nobody can tell whether it was this, so it is not applied"
    return Refused(FailureReason.SUPERSEDED, message)
