"""
A session: one replica's synchronization as the server sees it, without transport.

Whoever carries the messages calls, in this order: `open`; `upload` for each batch;
`settle_held`; then `pages`, and `complete`. The store's futures are handed through,
so that several batches can be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING, Final

import uuid_utils
from google.protobuf.message import DecodeError

from tidelog import _limits
from tidelog._clock import Clock, system_time_us
from tidelog._downloads import Download as Wish
from tidelog._errors import StorageError
from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog._logging import get_logger
from tidelog._values import check_id, check_name
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_server import _engine, _runs
from tidelog_server._application import Application
from tidelog_server._attempts import NO_SUSPECTS, Attempt, Suspects, last_seq
from tidelog_server._author import FormerIdentity, OldBases
from tidelog_server._checkpoints import Checkpoints, found_timeline, is_found
from tidelog_server._download import Download, PageBytes, Start, check_timeline, cursor_at, full_pages
from tidelog_server._engine import NO_TRIAL, Evaluation, Trial, UploadState
from tidelog_server._errors import (
    ProtocolVersionUnknown,
    ReplicaOwned,
    ReplicaRetired,
    RequestInvalid,
    SessionSuperseded,
    for_people,
)
from tidelog_server._formers import common_seqs
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._principal import Principal
from tidelog_server._projection import Projection
from tidelog_server._records import MAX_POSITION, Head, Identity, ReplicaState, Writes
from tidelog_server._requests import uuid_bytes
from tidelog_server._runs import Moment
from tidelog_server._store import Reader, Store
from tidelog_server._units import FormerOutcome, Unit, read_member, split_units

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from tidelog.v1.operation_pb2 import OperationResult

# As many as one commit group has; see REASON_BYTES_MAX.
# A replica that was forked more often than this is used by two devices at a time.
FORMER_IDENTITIES_MAX: Final = 100

RESULTS_A_MESSAGE_MAX: Final = _limits.GROUP_OPERATIONS_MAX

LIMITS: Final = sync_pb2.Limits(
    batch_operation_count=_limits.BATCH_OPERATIONS_MAX,
    batch_bytes=_limits.BATCH_BYTES_MAX,
    batches_in_flight=_limits.BATCHES_IN_FLIGHT_MAX,
    operation_bytes=_limits.OPERATION_BYTES_MAX,
    group_operation_count=_limits.GROUP_OPERATIONS_MAX,
    group_bytes=_limits.GROUP_BYTES_MAX,
)

_log = get_logger("tidelog.session")


# The clock of a server that was given none.
server_time_us: Final[Clock] = system_time_us


def check_protocol_version(version: int) -> None:
    """Raise ProtocolVersionUnknown unless *version* is the one spoken here."""
    if version != _limits.PROTOCOL_VERSION:
        raise ProtocolVersionUnknown(
            f"this server speaks version {_limits.PROTOCOL_VERSION} of the protocol, the client version {version}"
        )


def parse_replica_id(text: str) -> bytes:
    """Return the 16 bytes of a replica id in canonical text form. Raises RequestInvalid."""
    try:
        parsed = uuid_utils.UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != text or parsed.int == 0:
        raise RequestInvalid(f"a replica id is a UUID in its canonical text form, got {text[:60]!r}")
    return parsed.bytes


def parse_formers(identities: Sequence[sync_pb2.FormerIdentity]) -> tuple[FormerIdentity, ...]:
    """Return the former ids of a replica. Raises RequestInvalid."""
    if len(identities) > FORMER_IDENTITIES_MAX:
        raise RequestInvalid(f"{len(identities)} former ids of the replica: the limit is {FORMER_IDENTITIES_MAX}")
    return tuple(
        FormerIdentity(parse_replica_id(one.replica_id), one.last_seq, one.settled_seq, one.settled_nonce)
        for one in identities
    )


def parse_former_outcome(data: bytes) -> FormerOutcome:
    """Return what a replica says of an operation that it offers again. Raises RequestInvalid."""
    try:
        outcome = sync_pb2.FormerOutcome.FromString(data)
    except DecodeError as error:
        raise RequestInvalid("a former outcome cannot be read") from error
    if not 0 <= outcome.version < MAX_POSITION:
        raise RequestInvalid(f"a former outcome at version {outcome.version}")
    if outcome.version:
        return FormerOutcome(outcome.version)
    return FormerOutcome(
        0,
        uuid_bytes(outcome.failure_id, "a failure id"),
        FailureReason.of_number(outcome.reason),
        outcome.message,
        for_people(outcome.code),
    )


class Upload:
    """
    The upload phase: the batches of one replica, one after the other.

    Several may be submitted before the first is done. The first that fails ends the
    upload: those behind it fail too, because operations settle in order.

    A batch that may hold an operation which ends the process is settled unit by unit; see `_attempts`.

    Args:
        application: The rules.
        store: Where the data are.
        uploader: Who uploads.
        clock: The server's clock.
        suspects: Who may end the process.
        identity: The store and the timeline that the replica was told of. None: those that were heard of last.
    """

    def __init__(
        self,
        application: Application,
        store: Store,
        uploader: Uploader,
        clock: Clock = server_time_us,
        suspects: Suspects = NO_SUSPECTS,
        *,
        identity: Identity | None = None,
    ) -> None:
        self._application = application
        self._store = store
        self._identity = identity or store.identity
        self._uploader = uploader
        self._clock = clock
        self._suspects = suspects
        self._suspicion = suspects.suspicion(uploader.principal.tenant, uploader.replica)
        self._trial = Trial(self._suspicion.given_up) if self._suspicion.until else NO_TRIAL
        self._last_seq = 0
        # The first batch that failed: those behind it fail too.
        self._failed: int | None = None
        self._abandoned = False
        self._batch_count = 0
        # What each batch that is under way starts from. Kept until it is durable: it may have to run again.
        self._states: dict[int, UploadState] = {0: UploadState()}
        self.first_seq = 0
        self.first_version = 0

    def submit(
        self,
        operations: Sequence[bytes],
        former_outcomes: Sequence[FormerOutcome] = (),
        lost_contents: Sequence[bytes] = (),
    ) -> Future[list[Result]]:
        """
        Settle a batch. Results come once they are durable; held operations have a preliminary one.

        With *former_outcomes*, the batch offers again what was settled before the store was put back.
        *lost_contents* are those that the replica cannot upload any more.
        """
        self._last_seq = max(self._last_seq, last_seq(operations))
        if not self._suspicion.covers(operations):
            attempt = Attempt(self._uploader.replica, self._last_seq)
            return self._submit_batch(operations, former_outcomes, lost_contents, attempt)
        schema = self._application.schema
        formers = iter(former_outcomes)
        units = split_units([read_member(data, schema) for data in operations])
        return _joined(
            [
                self._submit_batch(
                    [one.data for one in unit],
                    list(islice(formers, len(unit))),
                    lost_contents,
                    self._next_attempt(unit),
                )
                for unit in units
            ]
        )

    def settle_held(self) -> Future[list[Result]]:
        """End the upload: settle what was held. Results come in the order held."""
        trial, attempt = self._trial, Attempt(self._uploader.replica, self._last_seq)
        if trial is not NO_TRIAL:
            # They cannot be settled one by one, for they need each other.
            trial, attempt = trial._replace(announce=self._announce), attempt._replace(alone=True)
        future = self._submit(
            lambda reader, state: _engine.evaluate_held(
                application=self._application,
                uploader=self._uploader,
                reader=reader,
                state=state,
                time_us=self._clock(),
                trial=trial,
            ),
            attempt,
        )
        future.add_done_callback(self._clear)
        return future

    def _submit_batch(
        self,
        operations: Sequence[bytes],
        former_outcomes: Sequence[FormerOutcome],
        lost_contents: Sequence[bytes],
        attempt: Attempt,
    ) -> Future[list[Result]]:
        return self._submit(
            lambda reader, state: _engine.evaluate_batch(
                operations,
                application=self._application,
                uploader=self._uploader,
                reader=reader,
                state=state,
                time_us=self._clock(),
                former_outcomes=former_outcomes,
                lost_contents=lost_contents,
                trial=self._trial,
            ),
            attempt,
        )

    def _next_attempt(self, unit: Unit) -> Attempt:
        return self._suspicion.next_attempt(self._uploader.replica, unit[0].seq)

    def abandon(self) -> None:
        """Do no more: what was submitted and has not begun is dropped. Who sent it sends it again."""
        self._abandoned = True

    def _announce(self, unit: Unit) -> None:
        self._store.announce(self._uploader.principal.tenant, self._next_attempt(unit))

    def _clear(self, done: Future[list[Result]]) -> None:
        """Lift the suspicion of a replica all of whose suspected operations were evaluated."""
        has_sent_all = self._last_seq >= self._suspicion.until or not self._uploader.leaves_earlier
        if done.exception() is None and has_sent_all:
            try:
                self._suspects.clear(self._uploader.principal.tenant, self._uploader.replica)
            except StorageError as error:
                # Until it goes well these operations are tried one by one.
                _log.warning("a replica stays suspected of ending the process", detail=str(error))

    def _submit(self, evaluate: Callable[[Reader, UploadState], Evaluation], attempt: Attempt) -> Future[list[Result]]:
        number = self._batch_count
        self._batch_count += 1

        def job(reader: Reader) -> tuple[Writes | None, list[Result]]:
            if self._abandoned or (self._failed is not None and self._failed < number):
                raise SessionSuperseded("an earlier batch of this session failed")
            # If it runs once more, what became of it before does not count.
            self._failed = None
            try:
                check_timeline(reader.identity(), self._identity)
                evaluation = evaluate(reader, self._states[number])
            except BaseException:
                self._failed = number
                raise
            self._states[number + 1] = evaluation.state
            return evaluation.writes, evaluation.results

        future = self._store.submit(self._uploader.principal.tenant, job, attempt)
        future.add_done_callback(lambda done: self._note(number, done))
        return future

    def _note(self, number: int, done: Future[list[Result]]) -> None:
        self._states.pop(number, None)
        if done.exception() is not None:
            self._failed = number if self._failed is None else min(self._failed, number)
            return
        applied = [result for result in done.result() if result.status == Status.APPLIED]
        if applied:
            first_version = min(result.version for result in applied)
            self.first_version = min(self.first_version or first_version, first_version)
            self.first_seq = min(self.first_seq or applied[0].seq, applied[0].seq)


def _joined(parts: Sequence[Future[list[Result]]]) -> Future[list[Result]]:
    """Return the results of parts, which settle in order, as one."""
    joined: Future[list[Result]] = Future()
    # As with the parts: whoever stops waiting for it must not cancel it.
    joined.set_running_or_notify_cancel()

    def join(_last: Future[list[Result]]) -> None:
        try:
            joined.set_result([result for part in parts for result in part.result()])
        except Exception as error:  # noqa: BLE001 - the future carries it
            joined.set_exception(error)

    parts[-1].add_done_callback(join)
    return joined


class Session:
    """
    One session of a replica.

    Raises from every method what `_status.STATUS` knows.
    """

    def __init__(  # noqa: PLR0917 - what a session is about, then what it rests on
        self,
        application: Application,
        store: Store,
        principal: Principal,
        start: sync_pb2.SessionStart,
        clock: Clock = server_time_us,
        suspects: Suspects = NO_SUSPECTS,
        *,
        page_bytes: PageBytes = full_pages,
        file_bytes_max: int = _limits.FILE_BYTES_MAX_DEFAULT,
    ) -> None:
        check_protocol_version(start.protocol_version)
        if start.mode not in _MODES:
            raise RequestInvalid(f"unknown mode {start.mode}")
        self.mode = start.mode
        self._application = application
        self._store = store
        self._principal = principal
        self._request = start
        self._clock = clock
        self._suspects = suspects
        self._file_bytes_max = file_bytes_max
        self._replica = parse_replica_id(start.replica_id)
        self._formers = parse_formers(start.former_identities)
        check_binding(start, principal)
        self._upload: Upload | None = None
        self._selection: list[ObjectKey] = []
        # A wish that makes no sense is an error of who downloads; it must not keep anybody's work from being uploaded.
        self._projection = Projection(
            application,
            principal,
            wishes_of(start.downloads),
            tolerant=self.mode != sync_pb2.SYNCHRONIZE_MODE_ALL,
        )
        self._start = Start()
        self._identity = store.identity
        self._settling = Moment(0, b"")
        self._old_bases: OldBases | None = None
        self._checkpoints = Checkpoints(store, principal.tenant)
        self._download = Download(store, self._projection, replica=self._replica, page_bytes=page_bytes)

    def open(self) -> Future[sync_pb2.SessionStarted]:
        """
        Begin. A session that uploads takes the replica's next session number and so ends older ones.

        Where the replica's checkpoint shows that the store was put back from a backup, it
        begins a new timeline.
        """
        done: Future[sync_pb2.SessionStarted] = Future()
        try:
            if not self._request.uploading:
                with self._store.read(self._principal.tenant) as reader:
                    known = reader.replica(self._replica)
                    is_restored = self._checkpoints.contradicts(reader, self._request.checkpoint)
                if not is_restored:
                    check_owner(known, self._principal)
                    done.set_result(self._started(known))
                    return done
            return _then(self._store.submit(self._principal.tenant, self._begin), self._started)
        except Exception as error:  # noqa: BLE001 - the future carries it
            done.set_exception(error)
        return done

    def upload(
        self,
        operations: Sequence[bytes],
        former_outcomes: Sequence[bytes] = (),
        lost_contents: Sequence[bytes] = (),
    ) -> Future[list[Result]]:
        """
        Settle a batch.

        With *former_outcomes*, serialized, it is one that is offered again. *lost_contents* are those that the
        replica cannot upload any more.
        """
        if self._upload is None:
            raise RequestInvalid("a batch came in a session that was opened without uploading")
        if former_outcomes:
            if self._old_bases is None:
                raise RequestInvalid("former outcomes came in a session that names no older timeline")
            if len(former_outcomes) != len(operations):
                raise RequestInvalid("a batch that is offered again has one former outcome an operation")
        formers = [parse_former_outcome(data) for data in former_outcomes]
        return self._upload.submit(operations, formers, lost_contents)

    def checkpoint(self) -> bytes:
        """Return the checkpoint of what is settled by now."""
        with self._store.read(self._principal.tenant) as reader:
            self._settling = _runs.present(reader.index)
            return self._checkpoints.at(reader.identity(), reader.head(), self._settling)

    def select(self, selection: sync_pb2.Selection) -> None:
        """Add objects to be downloaded."""
        if self.mode != sync_pb2.SYNCHRONIZE_MODE_SELECTED:
            raise RequestInvalid("a selection came in a session of another mode")
        if len(self._selection) + len(selection.keys) > _limits.SELECTION_OBJECTS_MAX:
            raise RequestInvalid(f"more than {_limits.SELECTION_OBJECTS_MAX} objects are selected")
        for key in selection.keys:
            check_name(key.entity, "an entity name")
            check_id(key.id)
            self._selection.append((key.entity, key.id))

    def settle_held(self) -> Future[list[Result]]:
        """End the upload phase."""
        if self._upload is None:
            done: Future[list[Result]] = Future()
            done.set_result([])
            return done
        return self._upload.settle_held()

    def abandon(self) -> None:
        """Begin nothing more of what was submitted."""
        if self._upload is not None:
            self._upload.abandon()

    def pages(self) -> Iterator[sync_pb2.SnapshotPage]:
        """Iterate over the download. Each step reads one page in a short transaction."""
        download, upload = self._download, self._upload
        if self.mode == sync_pb2.SYNCHRONIZE_MODE_ALL:
            return download.everything_since(self._start)
        if self.mode == sync_pb2.SYNCHRONIZE_MODE_SELECTED:
            return download.selected(self._selection)
        if upload is not None and upload.first_version:
            return download.changed_by_operations(self._start, upload.first_seq, upload.first_version)
        return download.selected(())  # nothing was applied, so nothing is told

    def complete(self) -> sync_pb2.SessionComplete:
        """Return the last message, after the last page."""
        check_timeline(self._store.identity, self._identity)
        head: Head = self._download.head
        checkpoint = self._checkpoints.at(self._identity, head, self._settling)
        complete = sync_pb2.SessionComplete(version=head.version, checkpoint=checkpoint)
        if self.mode == sync_pb2.SYNCHRONIZE_MODE_ALL:
            complete.cursor = cursor_at(self._identity, head, self._projection.scope)
        else:
            complete.cursor = self._start.without_changed()
        return complete

    @property
    def _is_of_other_timeline(self) -> bool:
        return self._request.timeline not in {"", self._identity.timeline}

    def _begin(self, reader: Reader) -> tuple[Writes, ReplicaState | None]:
        """Take what the session needs of the store before it says anything."""
        for former in self._formers:
            check_owner(reader.replica(former.replica), self._principal)
        known = reader.replica(self._replica)
        check_owner(known, self._principal)
        writes = Writes({}, [], None, [], [], reader.head().version)
        if self._request.uploading:
            writes, known = begin_upload(reader, self._replica, self._principal, self._clock(), self._formers)
        if self._checkpoints.contradicts(reader, self._request.checkpoint):
            writes = writes._replace(timeline=found_timeline())
            _log.warning(
                "a replica knows of history that this store lacks: an older one was put back, a new timeline begins",
                replica_id=self._request.replica_id,
                timeline=writes.timeline,
            )
        return writes, known

    def _found_old_bases(self, reader: Reader) -> OldBases | None:
        """Return which operations were made on a state of another timeline, if any."""
        request, common_version = self._request, self._checkpoints.common_version
        found = []
        if request.HasField("old_bases"):
            old = request.old_bases
            found.append(OldBases(old.through_seq, common_version(reader, old.checkpoint), old.timeline))
        if self._is_of_other_timeline:
            found.append(OldBases(MAX_POSITION, common_version(reader, request.checkpoint), request.timeline))
        if not found:
            return None
        through_seq, common = max(one.through_seq for one in found), min(one.common_version for one in found)
        is_one_timeline = len(found) == 1 and not is_found(self._identity.timeline)
        return OldBases(through_seq, common, found[0].timeline if is_one_timeline else "")

    def _settled_under_formers(self, reader: Reader, known: ReplicaState) -> list[sync_pb2.FormerSettled]:
        """Return what is settled under the former ids, as far as there is room; the newest ids are the last."""
        found = []
        common = dict(known.common_seqs)
        room = _engine.SETTLED_RANGES_MAX
        for former in reversed(self._formers):
            state = reader.replica(former.replica)
            if state is None or former.replica not in common:
                continue
            room -= len(state.settled_ranges)
            if room < 0:
                break
            found.append(
                sync_pb2.FormerSettled(
                    replica_id=str(uuid_utils.UUID(bytes=former.replica)),
                    ranges=_range_messages(state),
                    common_seq=common[former.replica],
                )
            )
        return found

    def _started(self, known: ReplicaState | None) -> sync_pb2.SessionStarted:
        request, is_all = self._request, self.mode == sync_pb2.SYNCHRONIZE_MODE_ALL
        with self._store.read(self._principal.tenant) as reader:
            head = reader.head()
            identity = self._identity = reader.identity()
            self._start = self._download.start_of(
                reader,
                request.cursor,
                request.resume_token if is_all else b"",
                # Versions of another timeline do not tell what the replica still has.
                confirms=request.accepts_confirmations and not self._is_of_other_timeline,
            )
            self._checkpoints.begin(reader)
            self._settling = _runs.present(reader.index)
            old_bases = self._old_bases = self._found_old_bases(reader)
            offers_again = request.uploading and request.HasField("old_bases")
            former_settled = self._settled_under_formers(reader, known) if known is not None and offers_again else []
        cause = sync_pb2.RECONCILE_CAUSE_UNSPECIFIED
        if self._start.collected:
            cause = sync_pb2.RECONCILE_CAUSE_HISTORY_COLLECTED
        started = sync_pb2.SessionStarted(
            protocol_version=_limits.PROTOCOL_VERSION,
            limits=LIMITS,
            version=head.version,
            epoch=identity.epoch,
            timeline=identity.timeline,
            resumed=self._start.resumed,
            reconcile=is_all and self._start.reconcile,
            reconcile_cause=cause,
            entities=self._projection.plans(self._clock(), self._start.reconciled if is_all else ()),
            tenant=self._principal.tenant,
            user_id=self._principal.user_id,
            common_version=old_bases.common_version if old_bases is not None else 0,
            former_settled=former_settled,
        )
        if self._application.has_schema:
            started.schema.CopyFrom(self._application.schema.to_message())
        if known is not None:
            started.settled.newest_seq = known.newest_seq
            started.settled.newest_nonce = known.newest_nonce
            started.settled.ranges.extend(_range_messages(known))
            if request.uploading:
                started.session_number = known.session_number
                self._upload = Upload(
                    self._application,
                    self._store,
                    Uploader(
                        self._replica,
                        self._principal,
                        known.session_number,
                        self._request.leaves_earlier_operations,
                        self._formers,
                        old_bases,
                        self._file_bytes_max,
                    ),
                    self._clock,
                    self._suspects,
                    identity=identity,
                )
        return started


def _range_messages(known: ReplicaState) -> list[sync_pb2.SeqRange]:
    return [sync_pb2.SeqRange(first=first, last=last) for first, last in known.settled_ranges]


def begin_upload(
    reader: Reader, replica: bytes, principal: Principal, time_us: int, formers: Sequence[FormerIdentity] = ()
) -> tuple[Writes, ReplicaState]:
    """Take the replica's next session number, binding a new replica to its principal."""
    known = reader.replica(replica)
    check_owner(known, principal)
    if known is None:
        known = ReplicaState(0, principal.user_id, 0, 0, ())
    if known.retired:
        raise ReplicaRetired(
            "this replica was away for so long that what became of its operations is forgotten: "
            "it goes on under another replica id"
        )
    begun = known._replace(session_number=known.session_number + 1, heard_us=time_us)
    if formers:
        begun = begun._replace(common_seqs=tuple(common_seqs(reader, known, formers).items()))
    return Writes({}, [], (replica, begun), [], [], reader.head().version), begun


def check_owner(known: ReplicaState | None, principal: Principal) -> None:
    """Raise ReplicaOwned if the replica belongs to somebody else."""
    if known is not None and known.user_id != principal.user_id:
        raise ReplicaOwned("this replica id belongs to another user: a replica is used by one user only")


def check_binding(start: sync_pb2.SessionStart, principal: Principal) -> None:
    """Raise ReplicaOwned if the replica says that it is bound to another tenant or user."""
    for what, bound, actual in (
        ("tenant", start.bound_tenant, principal.tenant),
        ("user", start.bound_user_id, principal.user_id),
    ):
        if bound not in ("", actual):
            raise ReplicaOwned(f"this replica is bound to another {what}: a replica is used by one user of one tenant")


def wishes_of(downloads: Iterable[sync_pb2.EntityDownload]) -> dict[str, Wish]:
    """Return how much a replica wants, by entity. Raises InvalidConstraint."""
    return {one.entity: Wish.from_message(one) for one in downloads}


def put_results(results: Iterable[Result], container: RepeatedCompositeFieldContainer[OperationResult]) -> None:
    """Append the wire form of results to a message's field."""
    for result in results:
        if result.status == Status.APPLIED:
            container.add(
                seq=result.seq,
                status=operation_pb2.OPERATION_STATUS_APPLIED,
                version=result.version,
                changed_by_server=result.changed_by_server,
            )
            continue
        container.add(
            seq=result.seq,
            status=result.status,
            failure_id=str(uuid_utils.UUID(bytes=result.failure_id)) if result.failure_id else "",
            reason=result.reason.number if result.reason is not None else operation_pb2.FAILURE_REASON_UNSPECIFIED,
            message=result.message,
            code=result.code,
        )


def settled_messages(results: Sequence[Result], checkpoint: bytes) -> Iterator[sync_pb2.UploadSettled]:
    """Yield the messages that bring the results of held operations, each small enough to be sent."""
    for first in range(0, max(1, len(results)), RESULTS_A_MESSAGE_MAX):
        end = first + RESULTS_A_MESSAGE_MAX
        message = sync_pb2.UploadSettled(more_follow=end < len(results), checkpoint=checkpoint)
        put_results(results[first:end], message.results)
        yield message


def _then(
    future: Future[ReplicaState | None], transform: Callable[[ReplicaState | None], sync_pb2.SessionStarted]
) -> Future[sync_pb2.SessionStarted]:
    result: Future[sync_pb2.SessionStarted] = Future()
    result.set_running_or_notify_cancel()

    def pass_on(done: Future[ReplicaState | None]) -> None:
        try:
            result.set_result(transform(done.result()))
        except Exception as error:  # noqa: BLE001 - the future carries it
            result.set_exception(error)

    future.add_done_callback(pass_on)
    return result


_MODES = frozenset(
    (
        sync_pb2.SYNCHRONIZE_MODE_ALL,
        sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED,
        sync_pb2.SYNCHRONIZE_MODE_SELECTED,
    )
)
