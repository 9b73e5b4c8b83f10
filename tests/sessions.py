"""Sessions without transport: a replica's own code on one side, answers made by hand on the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidelog._downloads import DownloadMode
from tidelog._keys import ObjectKey
from tidelog._operation import Operation, decode_operation
from tidelog._values import encode
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_client import Replica, Report
from tidelog_client._selection import select
from tidelog_client._synchronization import Mode, PlansChanged, Synchronization, TimelineChanged
from tidelog_client._view import StateLost

EPOCH = "epoch"
LIMITS = sync_pb2.Limits(batch_operation_count=2, batch_bytes=10_000, batches_in_flight=2)


def plan(
    entity: str, mode: str = "all", *, excluded: bool | None = None, reconcile: bool = False
) -> sync_pb2.EntityPlan:
    """Return what a server does with an entity; it takes no operations of one that is never synchronized."""
    number = DownloadMode(mode).number
    upload_excluded = mode == "never" if excluded is None else excluded
    return sync_pb2.EntityPlan(entity=entity, mode=number, upload_excluded=upload_excluded, reconcile=reconcile)


def page(
    *snapshots: tuple[str, str, int, dict[str, Any]],
    removals: Sequence[tuple[str, str, int]] = (),
    confirmations: Sequence[tuple[str, str, int]] = (),
    outside: Collection[str] = (),
    token: bytes = b"",
) -> sync_pb2.SnapshotPage:
    """Return a page; *outside* has the ids of snapshots that are not in the projection."""
    message = sync_pb2.SnapshotPage(resume_token=token)
    for entity, id_, version, attributes in snapshots:
        message.snapshots.add(
            entity=entity,
            id=id_,
            version=version,
            attributes=encode(attributes),
            outside_projection=id_ in outside,
        )
    for entity, id_, version in removals:
        message.removals.add(entity=entity, id=id_, version=version)
    for entity, id_, version in confirmations:
        message.confirmations.add(entity=entity, id=id_, version=version)
    return message


@dataclass
class ServerEnd:
    """
    The server's side of sessions, as a test wants it to be.

    Attributes:
        plans: What it does with entities that differ from the rest.
        reconcile: Whether it streams everything.
        resumed: Whether it takes up an interrupted download.
        pages: What it sends.
        version: Its newest version; each applied operation takes the next one.
        refuses: Seqs of operations that it refuses.
        tenant: Whose replica it takes the caller's for.
        user_id: The same.
        start: What the newest session began with.
        uploaded: What the newest session sent.
    """

    plans: Sequence[sync_pb2.EntityPlan] = ()
    reconcile: bool = False
    resumed: bool = False
    pages: Sequence[sync_pb2.SnapshotPage] = ()
    version: int = 100
    refuses: Collection[int] = ()
    tenant: str = ""
    user_id: str = ""
    start: sync_pb2.SessionStart = field(default_factory=sync_pb2.SessionStart)
    uploaded: list[Operation] = field(default_factory=list)
    session_count: int = 0

    def started(self) -> sync_pb2.SessionStarted:
        """Answer `start`."""
        return sync_pb2.SessionStarted(
            protocol_version=1,
            limits=LIMITS,
            epoch=EPOCH,
            timeline="timeline",
            reconcile=self.reconcile,
            resumed=self.resumed,
            entities=self.plans,
            tenant=self.tenant,
            user_id=self.user_id,
        )

    def settle(self, operations: Sequence[Operation]) -> list[operation_pb2.OperationResult]:
        """Answer a batch."""
        results = []
        for operation in operations:
            if operation.seq in self.refuses:
                results.append(refused(operation))
            else:
                self.version += 1
                results.append(applied(operation, self.version))
        return results

    def download(self) -> Sequence[sync_pb2.SnapshotPage]:
        """Answer the end of the upload."""
        return self.pages

    def cursor(self) -> bytes:
        """Return where the replica then stands."""
        return b"cursor at %d" % self.version

    def answer(self, request: sync_pb2.SynchronizeRequest) -> list[sync_pb2.SynchronizeResponse]:
        """Answer one message."""
        match request.WhichOneof("message"):
            case "start":
                self.start, self.uploaded = request.start, []
                self.session_count += 1
                return [sync_pb2.SynchronizeResponse(started=self.started())]
            case "batch":
                operations = [decode_operation(one.SerializeToString()) for one in request.batch.operations]
                self.uploaded += operations
                results = sync_pb2.BatchResults(results=self.settle(operations))
                return [sync_pb2.SynchronizeResponse(batch_results=results)]
            case "upload_complete":
                is_all = self.start.mode == sync_pb2.SYNCHRONIZE_MODE_ALL
                complete = sync_pb2.SessionComplete(cursor=self.cursor() if is_all else b"", version=self.version)
                return [
                    sync_pb2.SynchronizeResponse(upload_settled=sync_pb2.UploadSettled()),
                    *(sync_pb2.SynchronizeResponse(page=one) for one in self.download()),
                    sync_pb2.SynchronizeResponse(complete=complete),
                ]
            case _:
                return []


def applied(operation: Operation, version: int) -> operation_pb2.OperationResult:
    """Say that an operation was applied."""
    return operation_pb2.OperationResult(
        seq=operation.seq, status=operation_pb2.OPERATION_STATUS_APPLIED, version=version
    )


def refused(operation: Operation, *, culprit: Operation | None = None) -> operation_pb2.OperationResult:
    """Say that an operation was refused, for its own sake or for that of another one of its commit group."""
    rejected = operation_pb2.FAILURE_REASON_GROUP_REJECTED
    return operation_pb2.OperationResult(
        seq=operation.seq,
        status=operation_pb2.OPERATION_STATUS_REJECTED,
        failure_id=f"failure {(culprit or operation).seq}",
        reason=operation_pb2.FAILURE_REASON_OBJECT_GONE if culprit in (None, operation) else rejected,
        message="it is gone",
    )


def synchronize(
    replica: Replica,
    server: ServerEnd,
    mode: str = "all",
    selected: Sequence[ObjectKey] = (),
    *,
    on_answer: Callable[[], object] = lambda: None,
) -> Report:
    """
    Synchronize as the synchronizer does, attempt by attempt.

    *on_answer* is called before each answer of the server arrives; it may commit, or
    raise to cut the connection.
    """
    report = Report()
    for _ in range(3):
        report.begin_attempt()
        report.count_published(replica._storage.publication.finish())
        try:
            _attempt(begin(replica, report, mode, selected), server, on_answer)
        except StateLost:
            replica._storage.publication.start_over()
        except (PlansChanged, TimelineChanged):
            pass
        else:
            return report
    raise AssertionError("three attempts were not enough")


def begin(replica: Replica, report: Report, mode: str, selected: Sequence[ObjectKey] = ()) -> Synchronization:
    """Return an attempt that is to begin."""
    storage, schema = replica._storage, replica._known_schema()
    selection = select(storage, schema, dict.fromkeys(selected, False), report) if mode == "selected" else None
    return Synchronization(
        storage,
        Mode[mode.upper()],
        report,
        lambda _: None,
        selection=selection,
        downloads=replica._synchronizer._downloads,
    )


def _attempt(attempt: Synchronization, server: ServerEnd, on_answer: Callable[[], object]) -> None:
    requests = deque(attempt.begin())
    answers: deque[sync_pb2.SynchronizeResponse] = deque()
    while not attempt.done:
        while requests:
            request = requests.popleft()
            if request is not None:
                answers.extend(server.answer(sync_pb2.SynchronizeRequest.FromString(request)))
        on_answer()
        requests.extend(attempt.receive(answers.popleft().SerializeToString()))
