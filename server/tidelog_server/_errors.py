"""
What ends a call or a session on the server, and how that is told on the wire.

* TidelogError
  + RequestInvalid          a request that the protocol does not allow
    - OperationsOutOfOrder  positions in an upload that do not rise
  + ProtocolVersionUnknown  a client of another protocol version
  + SessionSuperseded       a newer session of the replica has begun to upload
  + OperationForked         a settled position was sent with another nonce
  + ReplicaOwned            the replica id belongs to another principal
  + NotFound                what was asked for by name is not there (to this principal)
  + AddressUnavailable      the server cannot listen where it should

`STATUS` is the one table from errors to status codes and reasons; programs branch on
the reason.
"""

from __future__ import annotations

from typing import Final

import grpc

from tidelog._errors import (
    DiskFull,
    InvalidConstraint,
    InvalidValue,
    ResourceClosed,
    StorageError,
    TidelogError,
)
from tidelog_server._application import TransientError


class RequestInvalid(TidelogError):
    """The request breaks a rule of the protocol."""


class OperationsOutOfOrder(RequestInvalid):
    """The positions in an upload do not rise."""


class ProtocolVersionUnknown(TidelogError):
    """The client speaks a version of the protocol that this server does not."""


class SessionSuperseded(TidelogError):
    """A newer session of the replica has begun to upload: this one may write nothing more."""


class OperationForked(TidelogError):
    """A settled position of the replica's log was sent with another nonce: there are two logs."""


class ReplicaOwned(TidelogError):
    """The replica id belongs to the principal that used it first."""


class NotFound(TidelogError):
    """What was asked for by name is not there, or not to be seen by this principal."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class AddressUnavailable(TidelogError):
    """The server cannot listen at the address it was given."""


# The first class that fits counts: put the special before the general.
STATUS: Final[tuple[tuple[type[Exception], grpc.StatusCode, str], ...]] = (
    (OperationsOutOfOrder, grpc.StatusCode.INVALID_ARGUMENT, "OPERATIONS_OUT_OF_ORDER"),
    (RequestInvalid, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"),
    (InvalidConstraint, grpc.StatusCode.INVALID_ARGUMENT, "CONSTRAINT_INVALID"),
    (InvalidValue, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"),
    (ProtocolVersionUnknown, grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_VERSION_UNSUPPORTED"),
    (SessionSuperseded, grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED"),
    (OperationForked, grpc.StatusCode.FAILED_PRECONDITION, "REPLICA_FORKED"),
    (ReplicaOwned, grpc.StatusCode.PERMISSION_DENIED, "REPLICA_OWNED"),
    (NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (TransientError, grpc.StatusCode.UNAVAILABLE, "HOOK_TRANSIENT"),
    (DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    (ResourceClosed, grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING"),
    (StorageError, grpc.StatusCode.UNAVAILABLE, "STORE_FAILED"),
)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str, str]:
    """Return (code, reason, message) for the wire. What is not in the table says nothing of itself."""
    for kind, code, reason in STATUS:
        if isinstance(error, kind):
            return code, getattr(error, "reason", reason), str(error)
    return grpc.StatusCode.INTERNAL, "INTERNAL", "the server failed: its log has the details"
