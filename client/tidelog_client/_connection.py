"""The connection to a server: a gRPC channel, and its errors as typed ones."""

from __future__ import annotations

import queue
from typing import Final

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from tidelog._errors import (
    DownloadRefused,
    PermissionRefused,
    ProtocolUnsupported,
    ProtocolViolated,
    ReplicaForked,
    ServerUnavailable,
    SynchronizationError,
    Unauthenticated,
)
from tidelog._limits import MESSAGE_BYTES_MAX

_SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"

# See the server's options: the ping timeout finds a server that vanished without a word.
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two replicas of one program must not share a connection, or one's stall is the other's.
    ("grpc.use_local_subchannel_pool", 1),
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


class Transient(Exception):
    """The call failed in a way that a repetition may mend."""

    def __init__(self, message: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Connection:
    """A channel to "host:port". Connects when it is used, and again after an outage."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)

    def synchronize(self, timeout: float | None) -> Stream:
        """Open a session's stream; *timeout* in seconds bounds all of it."""
        return Stream(self._channel, timeout, self.address)

    def close(self) -> None:
        """Close the channel; calls under way end."""
        self._channel.close()


class Stream:
    """One session's messages. Cancel it unless `receive` returned None."""

    def __init__(self, channel: grpc.Channel, timeout: float | None, address: str) -> None:
        self._address = address
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_SYNCHRONIZE)
        self._call = call(iter(self._requests.get, None), timeout=timeout)

    def send(self, messages: list[bytes | None]) -> None:
        """Send messages; None closes this side of the stream."""
        for message in messages:
            self._requests.put(message)

    def receive(self) -> bytes | None:
        """
        Wait for the next message; None when the server has closed the stream.

        Raises:
            Transient: The stream broke; another one may do better.
            SynchronizationError: The server refuses.
        """
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise error_of(error, self._address) from error

    def cancel(self) -> None:
        """End the call, whatever its state."""
        self._requests.put(None)
        self._call.cancel()


def error_of(error: grpc.RpcError, address: str) -> Transient | SynchronizationError:
    """Return what a failed call means for the caller."""
    code, message = error.code(), error.details() or ""
    info = _error_info(error)
    reason = info.reason if info is not None else ""
    if code in _TRANSIENT:
        retry_after = float(info.metadata.get("retry_after_seconds", "0")) if info is not None else 0.0
        return Transient(f"{address}: {message}", retry_after_seconds=retry_after)
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, ServerUnavailable)
    return kind(f"{address}: {message}" + (f" ({reason})" if reason else ""))


def _error_info(error: grpc.RpcError) -> ErrorInfo | None:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call
    except (ValueError, AttributeError):
        return None
    for detail in status.details if status is not None else ():
        info = ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
