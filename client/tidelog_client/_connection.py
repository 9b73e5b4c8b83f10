"""The connection to a server: a gRPC channel, who is calling, and errors as typed ones."""

from __future__ import annotations

import _thread
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias
from uuid import uuid4

import grpc

from tidelog._address import host_of, is_loopback
from tidelog._channel import (
    CLOSE_SECONDS_MAX,
    ClientTls,
    Metadata,
    aside,
    authorization,
    channel_opener,
    check_token,
)
from tidelog._errors import ResourceClosed, TokenUnavailable
from tidelog._logging import get_logger
from tidelog_client._call_errors import Transient, error_of
from tidelog_client._file_calls import FileCalls
from tidelog_client._file_channel import FileChannel
from tidelog_client._workers import Workers, WorkRunner

_SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"

# How long gRPC may take to end a call that is over, or whose time is. It is a matter of milliseconds, or of ever.
END_SECONDS_MAX: Final = 5.0
LOOK_SECONDS: Final = 1.0

_log = get_logger("tidelog.connection")

TokenSource: TypeAlias = str | Callable[[], str] | None


class Connection:
    """
    A channel to "host:port". Connects when it is used, and again after an outage.

    Nothing of gRPC runs in a thread of the caller's, who may be interrupted (Ctrl-C): in the middle of gRPC an
    interrupt may leave a lock taken that every later call waits for, or end the process.

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
        self._opening = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stream: Stream | None = None
        self._is_closed = False
        self._uploader = uuid4().hex
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
        if self._stream is not None:
            self._stream.cancel()  # an interrupt may have been in the way
            if self._stream.is_stuck:
                self._leave_channel()
        if self._is_closed:
            raise ResourceClosed("the connection is closed")
        self._stream = stream = Stream(self.address, self._opened)
        stream.start(metadata, timeout)
        return stream

    def files(self, timeout: float | None) -> FileCalls:
        """
        Return calls for contents, on a channel of their own; *timeout* in seconds bounds each. Close them in the end.

        Raises:
            ResourceClosed: The connection was closed.
        """
        calls = FileChannel(self.address, self._open, timeout, self._uploader)
        self._file_channels.add(calls)
        if self._is_closed:
            raise ResourceClosed("the connection is closed")
        return calls

    def workers(self, count_max: int) -> WorkRunner:
        """Return what makes such calls."""
        return Workers(count_max)

    def close(self) -> None:
        """Close the channel; calls under way end."""
        self._is_closed = True
        with suppress(TimeoutError, RuntimeError):  # no thread begins any more where the interpreter ends
            aside(self._close_channel, CLOSE_SECONDS_MAX)
        for calls in list(self._file_channels):
            calls.close()

    def _opened(self) -> grpc.Channel:
        # In a stream's thread.
        with self._opening:
            if self._is_closed:
                raise ResourceClosed("the connection is closed")
            if self._channel is None:
                self._channel = self._open()
            return self._channel

    def _leave_channel(self) -> None:
        """Go on with another channel: nothing comes from this one any more."""
        channel, self._channel = self._channel, None
        if channel is not None:
            _thread.start_new_thread(channel.close, ())

    def _close_channel(self) -> None:
        with self._opening:
            if self._channel is not None:
                self._channel.close()


class Stream:
    """
    One session's messages. Start it, and cancel it in the end.

    Args:
        address: Where the server is.
        channel: Gives the channel.

    Attributes:
        is_stuck: Whether gRPC did not end it when it, or its time, was over.
    """

    def __init__(self, address: str, channel: Callable[[], grpc.Channel]) -> None:
        self._address = address
        self._channel = channel
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # The next message is waited for while the last one is looked at, and none is taken ahead of that.
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        self._call: Any = None
        self._is_over = False
        self._end: float | None = None
        self._ended: float | None = None
        self.is_stuck = False

    def start(self, metadata: Metadata, timeout: float | None) -> None:
        """Open the stream."""
        self._end = None if timeout is None else time.monotonic() + timeout + END_SECONDS_MAX
        _thread.start_new_thread(self._run, (metadata, timeout))

    def send(self, messages: list[bytes | None]) -> None:
        """Send messages; None closes this side of the stream."""
        for message in messages:
            self._requests.put(message)

    def receive(self) -> bytes | None:
        """
        Wait for the next message; None when the server has closed the stream.

        Raises:
            ResourceClosed: The connection was closed.
            Transient: The stream broke; another one may do better.
            SynchronizationError: The server refuses.
        """
        answer = self._answer()
        self._wanted.put(True)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def cancel(self) -> None:
        """End the stream, whatever its state, and without a wait."""
        self._is_over = True
        self._wanted.put(True)
        if self._call is not None:
            _thread.start_new_thread(self._call.cancel, ())
        # The thread of gRPC's that waits for a message is told by `_run`, once the call is cancelled: a server that
        # sees the end of the messages first would take it for a mistake.

    def _answer(self) -> bytes | BaseException | None:
        began = time.monotonic()
        while True:
            limits = [one for one in (self._end, self._late(began)) if one is not None]
            try:
                left = min(limits, default=began + LOOK_SECONDS) - time.monotonic()
                return self._answers.get(timeout=max(0.0, min(left, LOOK_SECONDS)))
            except queue.Empty:
                if limits and time.monotonic() >= min(limits):
                    self.is_stuck = True
                    raise Transient(f"{self._address}: gRPC did not end the call when it was over") from None

    def _late(self, began: float) -> float | None:
        """Return until when somebody waits for more of a call that has ended, as gRPC says; it forgets to end it."""
        return None if self._ended is None else max(self._ended, began) + END_SECONDS_MAX

    def _note_end(self) -> None:
        self._ended = time.monotonic()

    def _run(self, metadata: Metadata, timeout: float | None) -> None:
        end: BaseException | None = None
        try:
            self._receive(metadata, timeout)
        except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
            end = error
        self._answers.put(end)
        self._requests.put(None)  # a thread of gRPC's may wait for it

    def _receive(self, metadata: Metadata, timeout: float | None) -> None:
        try:
            method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel().stream_stream(_SYNCHRONIZE)
            self._call = method(iter(self._requests.get, None), timeout=timeout, metadata=metadata)
            if not self._call.add_callback(self._note_end):
                self._note_end()
            if self._is_over:  # `cancel` may have missed it
                self._call.cancel()
            for data in self._call:
                self._answers.put(data)
                self._wanted.get()
        except grpc.RpcError as error:
            raise error_of(error, self._address) from error
        except ValueError as error:  # what gRPC says of a channel that was closed meanwhile
            raise ResourceClosed(f"the connection is closed: {error}") from error
