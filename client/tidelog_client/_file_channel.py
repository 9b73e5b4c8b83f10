"""File calls over gRPC, on a channel of their own."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import grpc

from tidelog._errors import ProtocolViolated, ResourceClosed, SynchronizationError
from tidelog.v1 import file_pb2, file_pb2_grpc, sync_pb2
from tidelog_client._call_errors import Transient, call_error
from tidelog_client._file_calls import ContentStatus, FileRefused, Presence, Standings

if TYPE_CHECKING:
    from tidelog._channel import Metadata
    from tidelog._keys import ObjectKey
    from tidelog_client._files import Needed

# One question has this long. It is asked again.
STAT_SECONDS_MAX: Final = 30.0

_REFUSALS: Final = frozenset(("FILE_NOT_FOUND", "FILE_LOST", "FILE_CORRUPT", "FILE_TOO_LARGE", "FILE_ROOM_EXHAUSTED"))
_PRESENCES: Final = {
    file_pb2.FILE_STATE_PRESENT: Presence.PRESENT,
    file_pb2.FILE_STATE_MISSING: Presence.MISSING,
    file_pb2.FILE_STATE_TOO_LARGE: Presence.TOO_LARGE,
}


class FileChannel:
    """
    See `FileCalls`. Its calls are made by threads that no interrupt comes to; who may be interrupted only closes it.

    Args:
        address: Where it leads to.
        open_channel: Opens the channel, which nobody else uses.
        timeout: Seconds that a transfer may take. None: as long as it likes.
        uploader: Who uploads, by a name that nobody else has.
    """

    def __init__(
        self, address: str, open_channel: Callable[[], grpc.Channel], timeout: float | None, uploader: str
    ) -> None:
        self._address = address
        self._open_channel = open_channel
        self._timeout = timeout
        self._uploader = uploader
        self._opening = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._is_closed = False

    def stat(self, metadata: Metadata, contents: Sequence[Needed]) -> Standings:
        """See `FileCalls`."""
        request = file_pb2.StatFilesRequest(
            contents=[file_pb2.FileContent(sha256=one.sha256, size=one.size) for one in contents]
        )
        timeout = STAT_SECONDS_MAX if self._timeout is None else min(STAT_SECONDS_MAX, self._timeout)
        try:
            response = self._stub().StatFiles(request, timeout=timeout, metadata=metadata)
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error) from error
        if len(response.statuses) != len(contents):
            raise ProtocolViolated(f"the server told of {len(response.statuses)} contents, asked for {len(contents)}")
        statuses = [_status(one, asked) for one, asked in zip(response.statuses, contents, strict=True)]
        return Standings(statuses, response.room_bytes if response.room_bytes > 0 else None)

    def upload(self, metadata: Metadata, content: Needed, offset: int, chunks: Iterable[bytes]) -> None:
        """See `FileCalls`."""
        failed: list[Exception] = []
        start = file_pb2.UploadFileStart(
            content=file_pb2.FileContent(sha256=content.sha256, size=content.size),
            offset=offset,
            uploader=self._uploader,
        )

        def requests() -> Iterator[file_pb2.UploadFileRequest]:
            # In a thread of gRPC's, which would only log what is raised.
            yield file_pb2.UploadFileRequest(start=start)
            try:
                for chunk in chunks:
                    yield file_pb2.UploadFileRequest(chunk=chunk)
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)

        try:
            self._stub().UploadFile(requests(), timeout=self._timeout, metadata=metadata)
        except (grpc.RpcError, ValueError) as error:
            if failed:
                raise failed[0] from error
            raise self._error(error) from error
        if failed:
            raise failed[0]

    def download(self, metadata: Metadata, sha256: bytes, key: ObjectKey, offset: int) -> Iterator[bytes]:
        """See `FileCalls`."""
        request = file_pb2.DownloadFileRequest(
            sha256=sha256, object=sync_pb2.ObjectKey(entity=key[0], id=key[1]), offset=offset
        )
        call = None
        try:
            call = self._stub().DownloadFile(request, timeout=self._timeout, metadata=metadata)
            for response in call:
                yield response.chunk
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error) from error
        finally:
            if call is not None:
                call.cancel()

    def close(self) -> None:
        """See `FileCalls`."""
        _thread.start_new_thread(self._close, ())

    def _close(self) -> None:
        with self._opening:
            self._is_closed = True
            if self._channel is not None:
                self._channel.close()

    def _stub(self) -> file_pb2_grpc.FileServiceStub:
        with self._opening:
            if self._is_closed:
                raise ResourceClosed("the connection is closed")
            if self._channel is None:
                self._channel = self._open_channel()
            return file_pb2_grpc.FileServiceStub(self._channel)

    def _error(self, error: grpc.RpcError | ValueError) -> Transient | SynchronizationError | FileRefused:
        if not isinstance(error, grpc.RpcError):
            return Transient(f"{self._address}: {error}")  # the channel was closed meanwhile
        meaning, reason = call_error(error, self._address)
        if reason in _REFUSALS:
            is_denied = reason == "FILE_NOT_FOUND"
            return FileRefused(str(meaning), is_too_large=reason == "FILE_TOO_LARGE", is_denied=is_denied)
        return meaning


def _status(status: file_pb2.FileStatus, asked: Needed) -> ContentStatus:
    presence = _PRESENCES.get(status.state)
    if presence is None or not 0 <= status.received_bytes <= asked.size:
        raise ProtocolViolated(f"the server told state {status.state}, {status.received_bytes} bytes of a content")
    return ContentStatus(presence, status.received_bytes, status.takes_room)
