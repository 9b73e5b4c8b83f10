"""
How errors are told on the wire: the one table from errors to status codes and reasons.

Programs branch on the reason, which `ErrorInfo` carries; the text is for people.
"""

from __future__ import annotations

from typing import Final

import grpc

from tidelog._contents import ContentCorrupt
from tidelog._errors import DiskFull, InvalidConstraint, InvalidValue, ResourceClosed, StorageError
from tidelog_server._application import TransientError
from tidelog_server._content_store import ContentLost, PartMismatch
from tidelog_server._errors import (
    AuthenticationFailed,
    AuthenticationUnavailable,
    FailureSettled,
    FailureStale,
    FileRoomExhausted,
    FileTooLarge,
    HistoryCollected,
    NotFound,
    OperationForked,
    OperationsOutOfOrder,
    OperatorRequired,
    ProtocolVersionUnknown,
    ReplicaOwned,
    ReplicaRetired,
    RequestInvalid,
    ServerBusy,
    ServerOutdated,
    SessionIdle,
    SessionSuperseded,
    StoreUnavailable,
    UploadSuperseded,
    for_people,
)

# The first class that fits counts: put the special before the general.
STATUS: Final[tuple[tuple[type[Exception], grpc.StatusCode, str], ...]] = (
    (AuthenticationFailed, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (AuthenticationUnavailable, grpc.StatusCode.UNAVAILABLE, "AUTHENTICATION_UNAVAILABLE"),
    (OperationsOutOfOrder, grpc.StatusCode.INVALID_ARGUMENT, "OPERATIONS_OUT_OF_ORDER"),
    (RequestInvalid, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"),
    (InvalidConstraint, grpc.StatusCode.INVALID_ARGUMENT, "CONSTRAINT_INVALID"),
    (InvalidValue, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"),
    (ProtocolVersionUnknown, grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_VERSION_UNSUPPORTED"),
    (SessionSuperseded, grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED"),
    (HistoryCollected, grpc.StatusCode.ABORTED, "HISTORY_COLLECTED"),
    (ReplicaRetired, grpc.StatusCode.FAILED_PRECONDITION, "REPLICA_RETIRED"),
    (SessionIdle, grpc.StatusCode.ABORTED, "SESSION_IDLE"),
    (ServerBusy, grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY"),
    (OperationForked, grpc.StatusCode.FAILED_PRECONDITION, "REPLICA_FORKED"),
    (ReplicaOwned, grpc.StatusCode.PERMISSION_DENIED, "REPLICA_OWNED"),
    (FailureSettled, grpc.StatusCode.FAILED_PRECONDITION, "FAILURE_SETTLED"),
    (FailureStale, grpc.StatusCode.FAILED_PRECONDITION, "FAILURE_STALE"),
    (OperatorRequired, grpc.StatusCode.PERMISSION_DENIED, "OPERATOR_REQUIRED"),
    (NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (PartMismatch, grpc.StatusCode.ABORTED, "FILE_OFFSET_MISMATCH"),
    (UploadSuperseded, grpc.StatusCode.ABORTED, "UPLOAD_SUPERSEDED"),
    (ContentCorrupt, grpc.StatusCode.DATA_LOSS, "FILE_CORRUPT"),
    (FileRoomExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, "FILE_ROOM_EXHAUSTED"),
    (FileTooLarge, grpc.StatusCode.FAILED_PRECONDITION, "FILE_TOO_LARGE"),
    (ContentLost, grpc.StatusCode.DATA_LOSS, "FILE_LOST"),
    (TransientError, grpc.StatusCode.UNAVAILABLE, "HOOK_TRANSIENT"),
    (DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    (ResourceClosed, grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING"),
    (ServerOutdated, grpc.StatusCode.UNAVAILABLE, "SERVER_OUTDATED"),
    (StoreUnavailable, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    (StorageError, grpc.StatusCode.UNAVAILABLE, "STORE_FAILED"),
)

_SENTENCES: Final = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the server has no room left: try again later",
    grpc.StatusCode.UNAVAILABLE: "the server cannot use its store now: try again later",
}


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str, str]:
    """Return (code, reason, message) for the wire. What is not in the table says nothing of itself."""
    for kind, code, reason in STATUS:
        if isinstance(error, kind):
            # What a store says names its directory, which is nobody's business outside.
            message = _SENTENCES.get(code) if isinstance(error, (StorageError, ResourceClosed)) else None
            return code, getattr(error, "reason", reason), message or for_people(error)
    return grpc.StatusCode.INTERNAL, "INTERNAL", "the server failed: its log has the details"
