"""A server of files in memory, and a connection to it without a network: what a replica does with contents."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.sessions import ServerEnd, refused

from tidelog._file_reference import FileReference, file_references
from tidelog._keys import ObjectKey
from tidelog._operation import Operation
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_client import Replica
from tidelog_client._call_errors import Transient
from tidelog_client._file_calls import ContentStatus, FileRefused, Presence, Standings
from tidelog_client._files import Needed
from tidelog_client._workers import Workers

CHUNK_BYTES = 64 * 1024


def sha256(data: bytes) -> bytes:
    """Return the name of a content."""
    return hashlib.sha256(data).digest()


def reference(data: bytes, name: str = "file") -> dict[str, Any]:
    """Return the value of an attribute that is a file."""
    return FileReference(name, len(data), "application/octet-stream", sha256(data)).to_value()


@dataclass
class FileServer(ServerEnd):
    """
    The server's side, with contents.

    Attributes:
        contents: What it has, by hash.
        parts: What came of uploads under way, by hash.
        size_max: The largest content it takes.
        room_bytes: How much it says that it takes which no operation refers to yet.
        lost_contents: Every hash that a batch called lost.
        batches: The seqs of each batch.
        uploads: The (hash, offset) of each upload that began.
        downloads: The (hash, object, offset) of each download that began.
        stat_count: How many times it was asked how contents stand.
        on_upload: Called with hash and position before each chunk is taken; may wait, or raise to cut it.
        on_download: The same, before each chunk is sent.
        gives: What it sends in place of a content, by hash.
        hides: Contents that it says it does not have until they are uploaded, though it gives them by an object.
    """

    contents: dict[bytes, bytes] = field(default_factory=dict)
    parts: dict[bytes, bytes] = field(default_factory=dict)
    size_max: int = 1 << 40
    room_bytes: int | None = None
    lost_contents: list[bytes] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    uploads: list[tuple[bytes, int]] = field(default_factory=list)
    downloads: list[tuple[bytes, ObjectKey, int]] = field(default_factory=list)
    stat_count: int = 0
    on_upload: Callable[[bytes, int], object] = lambda _sha256, _position: None
    on_download: Callable[[bytes, int], object] = lambda _sha256, _position: None
    gives: dict[bytes, bytes] = field(default_factory=dict)
    hides: set[bytes] = field(default_factory=set)

    def put(self, data: bytes) -> bytes:
        """Have a content, as if somebody else had uploaded it."""
        self.contents[sha256(data)] = data
        return sha256(data)

    def shows(self, name: bytes) -> bool:
        """Tell whether operations may refer to a content."""
        return name in self.contents and name not in self.hides

    def answer(self, request: sync_pb2.SynchronizeRequest) -> list[sync_pb2.SynchronizeResponse]:
        """Answer one message."""
        if request.WhichOneof("message") == "batch":
            self.lost_contents += request.batch.lost_contents
            self.batches.append([one.seq for one in request.batch.operations])
        return super().answer(request)

    def settle(self, operations: Sequence[Operation]) -> list[operation_pb2.OperationResult]:
        """Answer a batch: nothing is applied that refers to a content which is not there."""
        results = []
        for operation in operations:
            needed = [one for _, one in file_references(operation.decoded_patch().set)]
            missing = [one for one in needed if not self.shows(one.sha256)]
            if any(one.size > self.size_max for one in needed):
                results.append(self._refused(operation, operation_pb2.FAILURE_REASON_TOO_LARGE))
            elif any(one.sha256 in self.lost_contents for one in missing):
                results.append(self._refused(operation, operation_pb2.FAILURE_REASON_FILE_MISSING))
            elif missing:
                status = operation_pb2.OPERATION_STATUS_NOT_READY
                results.append(operation_pb2.OperationResult(seq=operation.seq, status=status))
            else:
                results += super().settle([operation])
        return results

    @staticmethod
    def _refused(operation: Operation, reason: operation_pb2.FailureReason.ValueType) -> operation_pb2.OperationResult:
        result = refused(operation)
        result.reason = reason
        return result


class Connection:
    """What a replica has for a connection. See `tidelog_client._connection.Connection`."""

    may_get_another_token = False

    def __init__(self, server: FileServer) -> None:
        self.server = server
        self.channel_count = 0
        self.token_count = 0

    def authorization(self) -> tuple[()]:
        """See `Connection`."""
        self.token_count += 1
        return ()

    def synchronize(self, _metadata: object, _timeout: float | None) -> _Stream:
        """See `Connection`."""
        return _Stream(self.server)

    def files(self, _timeout: float | None) -> Calls:
        """See `Connection`."""
        self.channel_count += 1
        return Calls(self.server)

    def workers(self, count_max: int) -> Workers:
        """See `Connection`."""
        return Workers(count_max)

    def close(self) -> None:
        """See `Connection`."""


class _Stream:
    def __init__(self, server: ServerEnd) -> None:
        self._server = server
        self._answers: deque[sync_pb2.SynchronizeResponse] = deque()

    def send(self, messages: list[bytes | None]) -> None:
        for message in filter(None, messages):
            self._answers.extend(self._server.answer(sync_pb2.SynchronizeRequest.FromString(message)))

    def receive(self) -> bytes | None:
        return self._answers.popleft().SerializeToString()

    def cancel(self) -> None:
        pass


class Calls:
    """File calls on a server in memory. See `tidelog_client._file_calls.FileCalls`."""

    def __init__(self, server: FileServer) -> None:
        self._server = server
        self.is_closed = threading.Event()

    def stat(self, _metadata: object, contents: Sequence[Needed]) -> Standings:
        """See `FileCalls`."""
        self._server.stat_count += 1
        return Standings([self._status(one) for one in contents], self._server.room_bytes)

    def _status(self, one: Needed) -> ContentStatus:
        if self._server.shows(one.sha256):
            return ContentStatus(Presence.PRESENT)
        if one.size > self._server.size_max:
            return ContentStatus(Presence.TOO_LARGE)
        return ContentStatus(Presence.MISSING, len(self._server.parts.get(one.sha256, b"")))

    def upload(self, _metadata: object, content: Needed, offset: int, chunks: Iterable[bytes]) -> None:
        """See `FileCalls`."""
        server, name = self._server, content.sha256
        part = server.parts.get(name, b"")
        server.uploads.append((name, offset))
        if offset != len(part):
            raise Transient("FILE_OFFSET_MISMATCH")
        for chunk in chunks:
            server.on_upload(name, len(part))
            self._check_open()
            part += chunk
            server.parts[name] = part
        del server.parts[name]
        if sha256(part) != name:
            raise FileRefused("FILE_CORRUPT")
        server.contents[name] = part
        server.hides.discard(name)

    def download(self, _metadata: object, name: bytes, key: ObjectKey, offset: int) -> Iterator[bytes]:
        """See `FileCalls`."""
        server = self._server
        server.downloads.append((name, key, offset))
        data = server.gives.get(name, server.contents.get(name))
        if data is None:
            raise FileRefused("FILE_LOST")
        while offset < len(data):
            server.on_download(name, offset)
            self._check_open()
            yield data[offset : offset + CHUNK_BYTES]
            offset += CHUNK_BYTES

    def close(self) -> None:
        """See `FileCalls`."""
        self.is_closed.set()

    def _check_open(self) -> None:
        if self.is_closed.is_set():
            raise Transient("closed")


def connect(replica: Replica, server: FileServer) -> Connection:
    """Let a replica synchronize with a server in memory."""
    connection = Connection(server)
    replica._synchronizer._connection = connection  # type: ignore[assignment]
    return connection
