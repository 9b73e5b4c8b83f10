"""
A witness of contents: who had which, who was told of them, and what the world itself destroyed.

What must hold of files, whatever happens, is checked against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.simulation.contents import Library, references
from tests.simulation.exchange import Ask, Fetch
from tests.simulation.model import Attributes, Key
from tests.simulation.promises import promise
from tests.simulation.records import ReplicaRecord, ServerRecord
from tests.simulation.rights import Eyes

from tidelog import Operation, OperationKind
from tidelog._contents import ContentDirectory
from tidelog._file_reference import FileReference
from tidelog._finding import Finding
from tidelog._operation import decode_operation
from tidelog._values import decode_map
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_client._file_calls import ContentStatus, Presence
from tidelog_client._file_wishes import FileMode, FileWishes
from tidelog_client._files import FileState
from tidelog_server._file_records import content_record
from tidelog_server._store import Reader

Objects = Mapping[Key, tuple[int, Attributes]]


class Witness:
    """
    What is known of contents by one who sees everything.

    Attributes:
        library: The contents.
        lost_here: Those that the world destroyed on a device.
        lost_there: Those that it destroyed on the server.
    """

    def __init__(self, bytes_max: int) -> None:
        self.library = Library()
        self.lost_here: set[bytes] = set()
        self.lost_there: set[bytes] = set()
        self._bytes_max = bytes_max
        # What its author had when an operation was committed, by nonce.
        self._had: dict[int, set[bytes]] = {}
        # Who may refer to what since he uploaded it, or was told that it is there.
        self._entitled: set[tuple[str, bytes]] = set()

    def note_commits(self, contents: ContentDirectory, operations: Iterable[Operation]) -> None:
        """Note which contents are there that operations refer to."""
        for one in operations:
            here = {sha256 for sha256 in _needed(one) if contents.size(sha256) is not None}
            self._had.setdefault(one.nonce, set()).update(here)

    def note_uploaded(self, user_id: str, sha256: bytes) -> None:
        """Note that somebody has begun to upload a content: so he has it."""
        self._entitled.add((user_id, sha256))

    def may_be_missing(self, operation: Operation) -> bool:
        """Tell whether an operation may be refused since a content cannot be had."""
        had = self._had.get(operation.nonce, set())
        return any(sha256 in self.lost_here or sha256 not in had for sha256 in _needed(operation))

    def is_too_large(self, operation: Operation) -> bool:
        """Tell whether an operation refers to a content that no server takes."""
        return any(one.size > self._bytes_max for one in _files(operation))

    def explains(self, finding: Finding) -> bool:
        """Tell whether a verification found what the world destroyed."""
        return any(sha256.hex() in str(finding) for sha256 in self.lost_here | self.lost_there)

    @promise("Private: nobody is told of a content that he has not uploaded and may not read")
    def check_told(self, eyes: Eyes, ask: Ask, answer: Sequence[ContentStatus], objects: Objects) -> Iterator[str]:
        """Look at what the server says of contents; then the user may refer to them."""
        user_id = eyes.principal.user_id
        for one, status in zip(ask.contents, answer, strict=True):
            if status.presence is not Presence.PRESENT or (user_id, one.sha256) in self._entitled:
                continue
            if not any(one.sha256 in _readable(eyes, key, seen) for key, (_, seen) in objects.items()):
                yield f"{user_id} is told that {one.sha256.hex()} is there"
            self._entitled.add((user_id, one.sha256))

    @promise("Private: nobody is sent a content that he may not read")
    def check_sent(self, eyes: Eyes, fetch: Fetch, objects: Objects) -> Iterator[str]:
        """Look at what the server begins to send."""
        _, attributes = objects.get(fetch.key, (0, None))
        if fetch.sha256 not in _readable(eyes, fetch.key, attributes):
            yield f"{eyes.principal.user_id} is sent {fetch.sha256.hex()} of {fetch.key}, which is {attributes}"

    @promise("Files: what is applied refers to contents that the server has, whole")
    def check_there(self, server: ServerRecord, reader: Reader, contents: ContentDirectory) -> Iterator[str]:
        """Look up what all objects refer to."""
        for key, (_, attributes) in server.visible().items():
            for name, one in references(attributes).items():
                if one.sha256 in self.lost_there:
                    continue
                record = content_record(one.sha256, reader.index)
                if record is None or record.size != one.size:
                    yield f"{key} refers to {one.sha256.hex()} by {name!r}, on record is {record}"
                if record is not None and not _is_whole(contents, one.sha256, record.copy):
                    yield f"{key} refers to {one.sha256.hex()} by {name!r}, which is not there"

    @promise("Files: after a complete synchronize-all a replica has the contents that it wants, byte for byte")
    def check_had_when_quiet(
        self, replica: Replica, wishes: FileWishes, record: ReplicaRecord, server: ServerRecord, eyes: Eyes
    ) -> Iterator[str]:
        """Open all files of a replica that it may have from the server."""
        for key, name, one in self._available(record, server, eyes):
            state = replica.file_state(*key, name)
            if state is FileState.AVAILABLE:
                with replica.open_file(*key, name) as file:
                    if file.read() != self.library.content(one.sha256):
                        yield f"{name!r} of {key} is another content than {one.sha256.hex()}"
            elif wishes.of(key[0]).wants(one.size):
                yield f"{name!r} of {key} is {state}, {wishes.of(key[0])} is wanted: {one}"

    def openable(
        self, replica: Replica, wishes: FileWishes, record: ReplicaRecord, server: ServerRecord, eyes: Eyes
    ) -> Iterator[tuple[Key, str, FileReference]]:
        """Yield files that are not here, and can be opened."""
        for key, name, one in self._available(record, server, eyes):
            is_here = replica.file_state(*key, name) is FileState.AVAILABLE
            if not is_here and wishes.of(key[0]).mode is not FileMode.NEVER:
                yield key, name, one

    def _available(
        self, record: ReplicaRecord, server: ServerRecord, eyes: Eyes
    ) -> Iterator[tuple[Key, str, FileReference]]:
        """Yield the files of a replica that it may have from the server."""
        visible = server.visible()
        for key, shown in record.view.items():
            if not eyes.downloads(key[0]):
                continue
            there = _readable(eyes, key, visible.get(key, (0, None))[1])
            for name, one in references(decode_map(shown.attributes)).items():
                if one.sha256 in there - self.lost_there - self.lost_here:
                    yield key, name, one

    @promise("Files: contents that nobody refers to are gone in the end, and the others are not")
    def check_left_when_quiet(self, where: str, found: Collection[bytes], needed: set[bytes]) -> Iterator[str]:
        """Compare the contents on one side with those that are needed there."""
        for sha256 in found:
            if sha256 not in needed and sha256 not in self.lost_here | self.lost_there:
                yield f"{where} keeps {sha256.hex()}, to which nobody refers"


class Watch:
    """
    Looks on while somebody transfers contents. See `FilePeer`.

    Args:
        witness: Who looks.
        eyes: Whom at.
        objects: Returns what the server has at the moment.
    """

    def __init__(self, witness: Witness, eyes: Eyes, objects: Callable[[], Objects]) -> None:
        self._witness = witness
        self._eyes = eyes
        self._objects = objects

    def told(self, ask: Ask, answer: Sequence[ContentStatus]) -> None:
        """See `FilePeer`."""
        self._witness.check_told(self._eyes, ask, answer, self._objects())

    def began(self, sha256: bytes) -> None:
        """See `FilePeer`."""
        self._witness.note_uploaded(self._eyes.principal.user_id, sha256)

    def sent(self, fetch: Fetch) -> None:
        """See `FilePeer`."""
        self._witness.check_sent(self._eyes, fetch, self._objects())


def needed_on_server(server: ServerRecord) -> set[bytes]:
    """Return the contents that objects and open failures of a store refer to."""
    needed = {one.sha256 for _, attributes in server.visible().values() for one in references(attributes).values()}
    for failure in server.failures.values():
        if failure.status == failure_pb2.FAILURE_STATUS_OPEN:
            for data in failure.group_operations or [failure.operation]:
                needed |= _needed(decode_operation(data))
    return needed


def needed_on_replica(record: ReplicaRecord, operations: Mapping[int, Operation]) -> set[bytes]:
    """Return the contents that a replica's objects, and operations that are pending or failed, refer to."""
    needed = set()
    for one in [*record.view.values(), *record.base.values()]:
        needed |= {file.sha256 for file in references(decode_map(one.attributes)).values()}
    failed = (seq for seq, outcome in record.outcomes.items() if outcome.failure_id)
    for seq in [*record.pending, *failed]:
        needed |= _needed(operations[seq])
    for failure in record.failures.values():
        for data in failure.group_operations or [failure.operation]:
            needed |= _needed(decode_operation(data))
    return needed


def destroy(path: Path, *, is_damaged: bool) -> None:
    """Destroy a file behind everybody's back."""
    data = bytearray(path.read_bytes())
    if is_damaged and data:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


def content_files(contents: ContentDirectory) -> list[Path]:
    """Return where contents lie."""
    return [contents._path(one.sha256, one.copy) for one in contents.contents()]


def sha256_of(path: Path) -> bytes:
    """Return the content that lies in a file."""
    return bytes.fromhex(path.name.partition("-")[0])


def _needed(operation: Operation) -> set[bytes]:
    return {one.sha256 for one in _files(operation)}


def _files(operation: Operation) -> Collection[FileReference]:
    if operation.kind is OperationKind.DELETE:
        return ()  # with a patch it is malformed
    return references(operation.decoded_patch().set).values()


def _readable(eyes: Eyes, key: Key, attributes: Attributes | None) -> set[bytes]:
    return {one.sha256 for one in references(eyes.readable(key[0], attributes)).values()}


def _is_whole(contents: ContentDirectory, sha256: bytes, copy: str) -> bool:
    file = contents.open(sha256, copy)
    if file is None:
        return False
    with file:
        return hashlib.sha256(file.read()).digest() == sha256
