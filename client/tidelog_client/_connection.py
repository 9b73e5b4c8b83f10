"""The connection to a server: a gRPC channel, who is calling, and errors as typed ones."""

from __future__ import annotations

import queue
import traceback
import weakref
from collections.abc import Callable
from typing import Final, TypeAlias

import grpc

from tidelog._address import host_of, is_loopback
from tidelog._channel import (
    CLOSE_SECONDS_MAX,
    ClientTls,
    Metadata,
    authorization,
    channel_opener,
    check_token,
    close_aside,
)
from tidelog._errors import ResourceClosed, TokenUnavailable
from tidelog._logging import get_logger
from tidelog_client._call_errors import error_of
from tidelog_client._file_calls import FileCalls
from tidelog_client._file_channel import FileChannel
from tidelog_client._workers import Workers, WorkRunner

_SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"

_log = get_logger("tidelog.connection")

TokenSource: TypeAlias = str | Callable[[], str] | None


class Connection:
    """
    A channel to "host:port". Connects when it is used, and again after an outage.

    An interrupt (Ctrl-C) in the middle of gRPC may leave a lock taken, or a thread not started, that every later call
    of the channel waits for. So a channel is not used again unless what was begun on it has come to its end, and its
    calls are not waited for: another one is opened.

    Args:
        address: Where the server is.
        tls: How to speak TLS. None: not at all.
        token: The bearer token, or a provider that is asked for one before each attempt.
            None: no token is sent.

    Raises:
        InvalidValue: A token that no header can carry, or a file of *tls* that is none.
    """

    def __init__(self, address: str, *, tls: ClientTls | None = None, token: TokenSource = None) -> None:
        self.address = address
        self._token = check_token(token) if token is not None and not callable(token) else token
        self._open = channel_opener(address, tls)
        self._channel: grpc.Channel | None = None
        # Also where an interrupt was in the way of everything that would mend it.
        self._is_in_use = False
        self._is_closed = False
        self._file_channels: weakref.WeakSet[FileChannel] = weakref.WeakSet()
        if token is not None and tls is None and not is_loopback(host_of(address)):
            _log.warning("a token is sent without TLS: whoever is on the way can read it", address=address)

    @property
    def may_get_another_token(self) -> bool:
        """Tell whether a refused token is worth another attempt: a provider may have a newer one."""
        return callable(self._token)

    def authorization(self) -> Metadata:
        """
        Return what tells the server who is calling. Asks the token provider, if there is one.

        Raises:
            TokenUnavailable: The provider failed.
            InvalidValue: It gave a token that no header can carry.
        """
        if self._token is None or isinstance(self._token, str):
            return authorization(self._token)
        try:
            token = self._token()
        except Exception as error:
            raise TokenUnavailable(f"{self.address}: the token provider raised {type(error).__name__}") from error
        return authorization(check_token(token))

    def synchronize(self, metadata: Metadata, timeout: float | None) -> Stream:
        """
        Open a session's stream; *timeout* in seconds bounds all of it. There is one at a time: cancel it in the end.

        Raises:
            ResourceClosed: The connection was closed.
        """
        if self._is_in_use:
            self.abandon_channel()
        channel = self._channel
        if channel is None:
            channel = self._channel = self._open()
        if self._is_closed:
            self.close()
            raise ResourceClosed("the connection is closed")
        self._is_in_use = True
        try:
            return Stream(self, channel, metadata, timeout)
        except BaseException as error:
            self.abandon_channel()
            # The frames that an interrupt left may hold a lock of all of gRPC as long as somebody keeps the error.
            traceback.clear_frames(error.__traceback__)
            raise

    def files(self, timeout: float | None) -> FileCalls:
        """
        Return calls for contents, on a channel of their own; *timeout* in seconds bounds each. Close them in the end.

        Raises:
            ResourceClosed: The connection was closed.
        """
        calls = FileChannel(self.address, self._open, timeout)
        self._file_channels.add(calls)
        if self._is_closed:
            raise ResourceClosed("the connection is closed")
        return calls

    def workers(self, count_max: int) -> WorkRunner:
        """Return what makes such calls."""
        return Workers(count_max)

    def release_channel(self) -> None:
        """Let the channel be used for the next stream."""
        self._is_in_use = False

    def abandon_channel(self, call: grpc.Call | None = None) -> None:
        """Have the next stream get another channel. *call* of this one is ended, if it can still do that."""
        if self._channel is not None:
            close_aside(self._channel, call)
            self._channel = None
        self._is_in_use = False

    def close(self) -> None:
        """Close the channel; calls under way end."""
        self._is_closed = True
        channel = self._channel
        if channel is not None:
            close_aside(channel).acquire(timeout=CLOSE_SECONDS_MAX)
        for calls in list(self._file_channels):
            calls.close()


class Stream:
    """One session's messages. Cancel it in the end."""

    def __init__(
        self, connection: Connection, channel: grpc.Channel, metadata: Metadata, timeout: float | None
    ) -> None:
        self._connection = connection
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_receiving = False
        try:
            call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_SYNCHRONIZE)
            self._call = call(iter(self._requests.get, None), timeout=timeout, metadata=metadata)
        except BaseException:
            self._requests.put(None)  # a thread of gRPC's may wait for it already
            raise

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
        self._is_receiving = True
        try:
            data = next(self._call, None)
        except grpc.RpcError as error:
            failure = error_of(error, self._connection.address)
            self._is_receiving = False
            raise failure from error
        self._is_receiving = False
        return data

    def cancel(self) -> None:
        """End the call, whatever its state: also after an interrupt, and then without a wait."""
        self._requests.put(None)
        if self._is_receiving:  # no longer, but it did not come back
            self._connection.abandon_channel(self._call)
            return
        try:
            self._call.cancel()
        except BaseException:
            self._connection.abandon_channel(self._call)
            raise
        self._connection.release_channel()
