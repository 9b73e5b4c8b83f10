"""
One attempt at a synchronization, as a state machine without transport.

Messages from the server go in, messages to the server come out; whoever carries
them may be a gRPC stream or a simulation. Everything that must survive a crash goes
through the storage, so an attempt that breaks off anywhere is simply followed by
another one: what the server settled meanwhile is settled again with the same result.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeVar

from google.protobuf.message import DecodeError, Message

from tidelog import _limits
from tidelog._downloads import Download
from tidelog._errors import (
    ForeignServer,
    PermissionRefused,
    ProtocolUnsupported,
    ProtocolViolated,
    ReplicaForked,
)
from tidelog._logging import get_logger
from tidelog._operation import decode_operation
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_client._answers import batch_limits, check_complete, check_final, check_page, check_started, check_token
from tidelog_client._plans import Plans
from tidelog_client._report import OnProgress, Phase, Progress, Report, Skipped, SkipReason
from tidelog_client._selection import Selection
from tidelog_client._upload import NO_FILES, FilePlan, Sieve, Upload, upload_of

if TYPE_CHECKING:
    from tidelog_client._storage import Storage

# What an interruption costs at most: on a bad network it is paid again and again.
STAGE_BYTES: Final = 1024 * 1024
SELECTION_KEYS_A_MESSAGE: Final = 5_000

_M = TypeVar("_M", bound=Message)

_log = get_logger("tidelog.synchronization")


class Mode(enum.IntEnum):
    """What a synchronization covers."""

    ALL = sync_pb2.SYNCHRONIZE_MODE_ALL
    UNSYNCHRONIZED = sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED
    SELECTED = sync_pb2.SYNCHRONIZE_MODE_SELECTED


class PlansChanged(Exception):
    """The session was begun on what the server had said of its plans before: another attempt knows better."""

    def __init__(self) -> None:
        super().__init__("the server changed which entities it takes operations of")


class TimelineChanged(Exception):
    """The server has begun another timeline: what it has lost is offered to it by another attempt."""

    def __init__(self) -> None:
        super().__init__("the server began a new timeline")


class Consent(NamedTuple):
    """
    What the caller agrees to beforehand.

    Attributes:
        foreign_server: That the replica becomes one of another server.
        mass_removal: That much of it is removed without a cause that the server states.
    """

    foreign_server: bool = False
    mass_removal: bool = False


class _Stage(enum.Enum):
    OPENING = enum.auto()
    UPLOADING = enum.auto()
    SETTLING = enum.auto()
    DOWNLOADING = enum.auto()
    DONE = enum.auto()


class _Batch(NamedTuple):
    seqs: list[int]
    message: splice_pb2.OperationBatchSplice


_NO_CONSENT: Final = Consent()


class Synchronization:
    """
    One attempt.

    Send what `begin` and `receive` return, in order, until `done`. `None` among the
    messages means that the client's side of the stream is to be closed.
    """

    def __init__(
        self,
        storage: Storage,
        mode: Mode,
        report: Report,
        on_progress: OnProgress,
        *,
        selection: Selection | None = None,
        schema_version: int = 0,
        downloads: Mapping[str, Download] | None = None,
        consent: Consent = _NO_CONSENT,
        files: FilePlan = NO_FILES,
        batch_bytes: int = _limits.BATCH_BYTES_MAX,
    ) -> None:
        self._storage = storage
        self._mode = mode
        self._batch_bytes = batch_bytes
        self._was_answered = False
        self._report = report
        self._on_progress = on_progress
        self._selection = selection
        self._schema_version = schema_version
        self._downloads = downloads or {}
        self._consent = consent
        self._files = files
        self._reoffer_count = 0
        self._is_uploading = False
        self._guards_removals = False
        self._plans = Plans()
        self._stage = _Stage.OPENING
        self._limits = sync_pb2.Limits()
        self._until = 0
        self._upload = Upload(0, leaves_earlier=False, left_behind={})
        self._results_count = 0
        self._batches: Iterator[_Batch] = iter(())
        # The operations of the batches under way, and of those held by the server.
        self._in_flight: deque[list[int]] = deque()
        self._held: set[int] = set()
        self._pages: list[bytes] = []
        self._pages_bytes = 0
        self._pages_objects = 0
        self._resume_token = b""
        self._downloaded_count = 0

    @property
    def done(self) -> bool:
        """Whether the synchronization is complete."""
        return self._stage is _Stage.DONE

    @property
    def uploaded(self) -> bool:
        """Whether the upload phase is over."""
        return self._stage in (_Stage.DOWNLOADING, _Stage.DONE)

    @property
    def is_stuck(self) -> bool:
        """Whether batches were sent, and not one was answered."""
        return bool(self._in_flight) and not self._was_answered

    def begin(self) -> list[bytes | None]:
        """Return the first messages."""
        storage = self._storage
        with storage.environment.read() as transaction:
            self._until = storage.last_seq(transaction) if self._files.until is None else self._files.until
            first_seq = storage.first_unsettled(transaction)
            first_kept = storage.log.first_seq(transaction)
            # In all modes: what comes behind it on the same objects has to wait for it, on the server too.
            self._reoffer_count = storage.lineage.reoffer_count(transaction)
        storage.lineage.forget_old_bases(first_seq)
        self._plans = Plans.decode(storage.meta("plans"))
        self._upload = self._planned_upload()
        start = sync_pb2.SessionStart(
            protocol_version=_limits.PROTOCOL_VERSION,
            mode=int(self._mode),  # type: ignore[arg-type]  # the same numbers
            schema_version=self._schema_version,
            cursor=storage.meta("cursor"),
            uploading=self._upload.operation_count + self._reoffer_count > 0,
            leaves_earlier_operations=self._upload.leaves_earlier,
            # What is offered again is in no state of the replica's own yet.
            accepts_confirmations=storage.publication.has_own_states() and not self._reoffer_count,
            downloads=[download.to_message(entity) for entity, download in self._downloads.items()],
            bound_tenant=storage.meta("tenant").decode(),
            bound_user_id=storage.meta("user_id").decode(),
        )
        storage.lineage.introduce(start, first_seq=first_seq, first_kept=first_kept)
        if self._mode is Mode.ALL:
            start.resume_token = storage.meta("resume_token")
        # What is removed from a state that the server itself has followed up to here, it has reason to remove.
        self._guards_removals = storage.lineage.is_rebasing or bool(start.cursor)
        self._on_progress(Progress(Phase.CONNECT, 0, None))
        messages: list[bytes | None] = [_request(start=start.SerializeToString())]
        self._is_uploading = start.uploading
        if not start.uploading:
            messages.extend(self._end_of_upload())  # nothing to wait for: saves a round trip
        return messages

    def receive(self, data: bytes) -> list[bytes | None]:
        """
        Take in a message and return what is to be sent next.

        Raises:
            ProtocolViolated, ProtocolUnsupported, PermissionRefused, ForeignServer: The attempt is over.
            StateLost: The attempt is over; another one will get all states.
            PlansChanged: The attempt is over; another one will begin as it should.
            TimelineChanged: The attempt is over; another one will go on from there.
            ReplicaForked: The attempt is over; another one may go on under another id.
            MassRemoval: The attempt is over, everything but the removal is done.
        """
        response = _parsed(splice_pb2.SynchronizeResponseSplice, data)
        which = response.WhichOneof("message")
        stage = self._stage
        if which == "started" and stage is _Stage.OPENING:
            return self._started(_parsed(sync_pb2.SessionStarted, response.started))
        if which == "batch_results" and stage is _Stage.UPLOADING:
            return self._batch_results(_parsed(sync_pb2.BatchResults, response.batch_results))
        if which == "upload_settled" and stage in (_Stage.UPLOADING, _Stage.SETTLING) and not self._in_flight:
            self._upload_settled(_parsed(sync_pb2.UploadSettled, response.upload_settled))
            return []
        if which == "page" and stage is _Stage.DOWNLOADING:
            self._page(response.page)
            return []
        if which == "complete" and stage is _Stage.DOWNLOADING:
            self._complete(_parsed(sync_pb2.SessionComplete, response.complete))
            return []
        raise ProtocolViolated(f"the server sent `{which}` while the session was {stage.name.lower()}")

    # --- upload ---------------------------------------------------------------

    def _started(self, started: sync_pb2.SessionStarted) -> list[bytes | None]:
        if started.protocol_version != _limits.PROTOCOL_VERSION:
            raise ProtocolUnsupported(
                f"the server speaks version {started.protocol_version} of the protocol, "
                f"this client version {_limits.PROTOCOL_VERSION}: upgrade the older one"
            )
        check_started(started)
        self._adopt(started)
        self._check_log(started.settled)
        if self._reoffer_count:
            self._reoffer_count -= self._storage.keep_settled(started.former_settled)
        self._limits = batch_limits(started.limits)
        self._limits.batch_bytes = min(self._limits.batch_bytes, self._batch_bytes)
        self._check_upload(Plans(started))
        # What a download that was broken off left behind can be gone on with in mode all only.
        self._storage.publication.discard_merge()
        if self._mode is Mode.ALL and not started.resumed:
            self._storage.publication.discard_staged()
        if not self._is_uploading:
            self._stage = _Stage.SETTLING
            return []
        self._stage = _Stage.UPLOADING
        # Relaxed durability or not: what the server has seen must not be forgotten here.
        self._storage.environment.sync()
        self._batches = self._batched_operations()
        messages: list[bytes | None] = []
        for _ in range(self._limits.batches_in_flight):
            messages.extend(self._next_batch())
            if self._stage is not _Stage.UPLOADING:
                break
        return messages

    def _adopt(self, started: sync_pb2.SessionStarted) -> None:
        storage = self._storage
        lineage = storage.lineage
        epoch = lineage.epoch
        if epoch and not lineage.knows_store(started.epoch) and not self._consent.foreign_server:
            raise ForeignServer(expected=epoch, actual=started.epoch)
        values = self._owner(started)
        if epoch and (epoch, lineage.timeline) != (started.epoch, started.timeline):
            self._begin_rebase(started)
        schema = b""
        if started.HasField("schema"):
            schema = started.schema.SerializeToString()
        values |= {
            "schema": schema,
            "plans": Plans(started).lasting().encode(),
        }
        if not epoch:
            values |= {"epoch": started.epoch.encode(), "timeline": started.timeline.encode()}
        if any(storage.meta(name) != value for name, value in values.items()):
            storage.set_meta(**values)

    def _begin_rebase(self, started: sync_pb2.SessionStarted) -> NoReturn:
        self._check_log(started.settled)
        count = self._storage.begin_rebase(
            epoch=started.epoch,
            timeline=started.timeline,
            settled_ranges=[(one.first, one.last) for one in started.settled.ranges],
        )
        _log.warning(
            "the server was put back from a backup, or is another one: what it lacks is offered to it again",
            replica_id=self._storage.lineage.replica_id,
            operation_count=count,
        )
        self._report.server_restored = True
        raise TimelineChanged

    def _owner(self, started: sync_pb2.SessionStarted) -> dict[str, bytes]:
        """Return what is to be remembered of whom the replica belongs to; older servers do not say it."""
        values = {}
        for name, what, actual in (("tenant", "tenant", started.tenant), ("user_id", "user", started.user_id)):
            bound = self._storage.meta(name).decode()
            if bound and actual and actual != bound:
                raise PermissionRefused(
                    f"this replica belongs to the {what} {bound!r}, the server takes its caller for {actual!r}: "
                    "use the credentials of its owner, or another replica directory"
                )
            if actual:
                values[name] = actual.encode()
        return values

    def _check_log(self, settled: sync_pb2.SettledOperations) -> None:
        """Compare the newest operation that the server settled with this log: a copy of it went on elsewhere?"""
        if not settled.newest_seq:
            return
        storage = self._storage
        with storage.environment.read() as transaction:
            last_seq = storage.last_seq(transaction)
            known_seq, nonce = storage.newest_settled(transaction)
            data = storage.log.get(transaction, settled.newest_seq) if known_seq != settled.newest_seq else None
        if data is not None:
            known_seq, nonce = settled.newest_seq, decode_operation(data).nonce
        is_other = known_seq == settled.newest_seq and nonce != settled.newest_nonce
        if settled.newest_seq > last_seq or is_other:
            raise ReplicaForked(
                f"the server has settled seq {settled.newest_seq} of replica {storage.lineage.replica_id}, "
                "which is not in this log: the directory is a copy, or was restored from one"
            )

    def _planned_upload(self) -> Upload:
        selection, held = self._selection, self._files.held
        if selection is None:
            return upload_of(self._storage, self._plans.upload_excluded, until=self._until, held=held)
        upload = upload_of(self._storage, (), until=self._until, seqs=selection.seqs, held=held)
        leaves_earlier = upload.leaves_earlier or selection.leaves_earlier or self._storage.has_reoffers()
        return upload._replace(leaves_earlier=leaves_earlier)

    def _check_upload(self, plans: Plans) -> None:
        """Take over the server's plans, if they allow of what the session was begun with."""
        begun, known = self._upload, self._plans
        self._plans = plans
        if plans.upload_excluded != known.upload_excluded:
            self._upload = self._planned_upload()
            if not self._upload.begins_like(begun):
                raise PlansChanged
        self._report.skipped += self._upload.skipped()

    def _next_batch(self) -> list[bytes | None]:
        batch = next(self._batches, None)
        if batch is None:
            if self._stage is _Stage.UPLOADING and not self._in_flight:
                return self._end_of_upload()
            return []
        self._in_flight.append(batch.seqs)
        return [_request(batch=batch.message)]

    def _end_of_upload(self) -> list[bytes | None]:
        if self._stage is _Stage.UPLOADING:
            self._stage = _Stage.SETTLING
        messages: list[bytes | None] = []
        keys = self._selection.keys if self._selection is not None else ()
        for first in range(0, len(keys), SELECTION_KEYS_A_MESSAGE):
            selection = sync_pb2.Selection(
                keys=[
                    sync_pb2.ObjectKey(entity=entity, id=id_)
                    for entity, id_ in keys[first : first + SELECTION_KEYS_A_MESSAGE]
                ]
            )
            messages.append(_request(selection=selection.SerializeToString()))
        messages.append(_request(upload_complete=sync_pb2.UploadComplete().SerializeToString()))
        messages.append(None)
        return messages

    def _batched_operations(self) -> Iterator[_Batch]:
        """Yield batches in log order, first what is offered again: within the limits, a commit group never in two."""
        after = 0
        while self._reoffer_count and (
            offered := self._storage.reoffer_batch(
                after=after, count_max=self._limits.batch_operation_count, bytes_max=self._limits.batch_bytes
            )
        ):
            after = offered[-1].seq
            reoffered = [one.seq for one in offered]
            message = splice_pb2.OperationBatchSplice(
                operations=[one.data for one in offered],
                former_outcomes=[one.former_outcome for one in offered],
                lost_contents=self._files.lost_in(reoffered),
            )
            yield _Batch(reoffered, message)
        seqs = None if self._selection is None else self._selection.seqs
        excluded = self._plans.upload_excluded if seqs is None else frozenset()
        sieve = Sieve(excluded, self._files.held) if excluded or self._files.held else None
        after = 0
        while batch := self._storage.upload_batch(
            after=after,
            until=self._until,
            seqs=seqs,
            sieve=sieve,
            count_max=self._limits.batch_operation_count,
            bytes_max=self._limits.batch_bytes,
        ):
            uploaded = [seq for seq, _ in batch]
            message = splice_pb2.OperationBatchSplice(
                operations=[data for _, data in batch], lost_contents=self._files.lost_in(uploaded)
            )
            yield _Batch(uploaded, message)
            after = batch[-1][0]

    def _batch_results(self, message: sync_pb2.BatchResults) -> list[bytes | None]:
        if not self._in_flight:
            raise ProtocolViolated("the server answered a batch that was not sent")
        seqs = self._in_flight.popleft()
        self._was_answered = True
        if [result.seq for result in message.results] != seqs:
            raise ProtocolViolated("the server's results are not those of the batch")
        final = []
        for result in message.results:
            if result.status == operation_pb2.OPERATION_STATUS_HELD:
                self._held.add(result.seq)
                self._report.held += 1
            elif result.status == operation_pb2.OPERATION_STATUS_NOT_READY:
                self._not_ready(result)
            else:
                final.append(result)
        self._settle(final, message.checkpoint)
        return self._next_batch()

    def _upload_settled(self, message: sync_pb2.UploadSettled) -> None:
        final = []
        for result in message.results:
            if result.seq not in self._held:
                raise ProtocolViolated(f"the server settled seq {result.seq}, which was not held")
            self._held.remove(result.seq)
            if result.status == operation_pb2.OPERATION_STATUS_NOT_READY:
                self._not_ready(result)
            else:
                final.append(result)
        self._settle(final, message.checkpoint)
        if message.more_follow:
            return
        if self._held:
            raise ProtocolViolated("the server ended the upload with operations unsettled")
        self._stage = _Stage.DOWNLOADING
        self._on_progress(Progress(Phase.DOWNLOAD, 0, None))

    def _settle(self, results: list[operation_pb2.OperationResult], checkpoint: bytes) -> None:
        check_final(results)
        check_token(checkpoint)
        if results:
            counts = self._storage.settle(results, checkpoint)
            self._report.reoffered += counts.reoffered
            self._report.applied += counts.applied
            self._report.rejected += counts.rejected
            self._report.failures.add(counts.failures)
        self._results_count += len(results)
        total = self._upload.operation_count + self._reoffer_count
        self._on_progress(Progress(Phase.UPLOAD, self._results_count, total))

    def _not_ready(self, result: operation_pb2.OperationResult) -> None:
        with self._storage.environment.read() as transaction:
            data = self._storage.log.get(transaction, result.seq)
        if data is not None:
            self._storage.files.note_late(result.seq, data)
        entity, id_ = decode_operation(data).key if data is not None else ("", "")
        self._report.skipped.append(Skipped(entity, id_, SkipReason.NOT_READY, result.message, seq=result.seq))

    # --- download -------------------------------------------------------------

    def keep(self) -> None:
        """Keep what came of a download that broke off: another attempt goes on behind it."""
        if self._mode is Mode.ALL and self._pages and self._stage is _Stage.DOWNLOADING:
            self._put_aside()

    def _page(self, page: bytes) -> None:
        message = _parsed(sync_pb2.SnapshotPage, page)
        check_page(message)
        count = len(message.snapshots) + len(message.removals) + len(message.confirmations)
        self._pages.append(page)
        self._pages_bytes += len(page)
        self._pages_objects += count
        self._resume_token = message.resume_token
        if self._pages_bytes >= STAGE_BYTES:
            self._put_aside()
        self._downloaded_count += count
        self._on_progress(Progress(Phase.DOWNLOAD, self._downloaded_count, None))

    def _put_aside(self) -> None:
        """Move the pages in memory to disk."""
        if self._mode is Mode.ALL:
            self._storage.publication.stage(self._pages, self._pages_objects, self._resume_token)
        else:
            self._storage.publication.stage_merge(self._pages)
        self._pages, self._pages_bytes, self._pages_objects = [], 0, 0

    def _complete(self, complete: sync_pb2.SessionComplete) -> None:
        check_complete(complete)
        self._on_progress(Progress(Phase.PUBLISH, 0, self._downloaded_count))
        if self._mode is Mode.ALL:
            if not complete.cursor:
                raise ProtocolViolated("the server completed the download without a cursor")
            counts = self._storage.publication.publish(
                self._pages,
                self._pages_objects,
                complete=complete,
                plans=self._plans,
                guards_removals=self._guards_removals,
                removals_accepted=self._consent.mass_removal,
            )
        else:
            counts = self._storage.publication.merge(self._pages, complete.cursor, complete.checkpoint)
        self._report.count_published(counts)
        self._on_progress(Progress(Phase.PUBLISH, self._downloaded_count, self._downloaded_count))
        self._stage = _Stage.DONE


def _request(**message: object) -> bytes:
    return splice_pb2.SynchronizeRequestSplice(**message).SerializeToString()  # type: ignore[arg-type]


def _parsed(kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolViolated(f"the server sent bytes that are no {kind.DESCRIPTOR.name}") from error
