"""What a failed call means for the caller: gRPC's errors as typed ones."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from tidelog._errors import (
    DownloadRefused,
    PermissionRefused,
    ProtocolUnsupported,
    ProtocolViolated,
    ReplicaForked,
    ReplicaRetired,
    ServerUnavailable,
    SynchronizationError,
    Unauthenticated,
)

# What a repetition may mend. Everything else is told to the caller at once.
_TRANSIENT: Final = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    )
)

# The reason decides; where the server gave none, the status code.
_BY_REASON: Final[dict[str, type[SynchronizationError]]] = {
    "PROTOCOL_VERSION_UNSUPPORTED": ProtocolUnsupported,
    "REPLICA_FORKED": ReplicaForked,
    "REPLICA_RETIRED": ReplicaRetired,
    "REPLICA_OWNED": PermissionRefused,
    "CONSTRAINT_INVALID": DownloadRefused,
    "REQUEST_INVALID": ProtocolViolated,
    "OPERATIONS_OUT_OF_ORDER": ProtocolViolated,
}
_BY_CODE: Final[dict[grpc.StatusCode, type[SynchronizationError]]] = {
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionRefused,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolUnsupported,
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolViolated,
}

# What no repetition mends, though gRPC calls it unavailable. Only its text tells.
_HANDSHAKE_FAILURES: Final = (
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate cannot be verified"),
    ("Hostname Verification Check failed", "the server's certificate is for another name"),
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS"),
)


class Transient(Exception):
    """
    The call failed in a way that a repetition may mend.

    Attributes:
        retry_after_seconds: When to repeat it, as the server says. None: it says nothing.
    """

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def error_of(error: grpc.RpcError, address: str) -> Transient | SynchronizationError:
    """Return what a failed call means for the caller."""
    return call_error(error, address)[0]


def call_error(error: grpc.RpcError, address: str) -> tuple[Transient | SynchronizationError, str]:
    """Return what a failed call means for the caller, and the reason that the server gave to programs, if any."""
    code, message = error.code(), error.details() or ""
    info, retry = _details(error)
    for mark, meaning in _HANDSHAKE_FAILURES:
        if code is grpc.StatusCode.UNAVAILABLE and mark in message:
            return ServerUnavailable(f"{address}: {meaning}; nothing was exchanged ({message})"), info.reason
    if "failed to connect" in message and "Socket closed" in message:
        message += " (while connecting: does the server expect TLS, or a client certificate?)"
    if code in _TRANSIENT:
        delay = retry.retry_delay
        # A pause that is none is passed over.
        retry_after = max(0.0, delay.seconds + delay.nanos / 1e9) if retry.HasField("retry_delay") else None
        return Transient(f"{address}: {message}", retry_after_seconds=retry_after), info.reason
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, ServerUnavailable)
    return kind(f"{address}: {message}" + (f" ({info.reason})" if info.reason else "")), info.reason


def _details(error: grpc.RpcError) -> tuple[ErrorInfo, RetryInfo]:
    """Return what an error says to programs; empty messages where it says nothing."""
    info, retry = ErrorInfo(), RetryInfo()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call
        for detail in status.details if status is not None else ():
            _ = detail.Unpack(info) or detail.Unpack(retry)
    except (ValueError, AttributeError, DecodeError):
        pass  # details that cannot be read tell nothing
    return info, retry
