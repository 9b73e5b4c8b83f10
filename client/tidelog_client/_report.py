"""What a synchronization did, and how far it is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, overload

from tidelog._failure import SynchronizationFailure
from tidelog.v1 import failure_pb2

FAILURES_KEPT_BYTES_MAX: Final = 1024 * 1024


class SkipReason(enum.StrEnum):
    """Why something was left out of a synchronization."""

    UNCOMMITTED = "UNCOMMITTED"
    DELETED = "DELETED"
    NOT_READY = "NOT_READY"
    NEVER = "NEVER"
    FILE_NOT_UPLOADED = "FILE_NOT_UPLOADED"
    FILES_EXCEED_ROOM = "FILES_EXCEED_ROOM"
    FILE_NOT_DOWNLOADED = "FILE_NOT_DOWNLOADED"


@dataclass(frozen=True, slots=True)
class Skipped:
    """
    Something that was left out.

    Attributes:
        entity: Type of the object; empty for `FILE_NOT_DOWNLOADED` where none can be had: their folder is away.
        id: Its id; empty where it stands for several: for `NEVER`, for all operations on the entity that stay behind,
            and for `FILE_NOT_DOWNLOADED`, for objects for which no time was left, or that share a content.
        reason: Why.
        message: Why, in a sentence for people.
        seq: The operation that stays pending, or None if it is the object, or several, that were left out.
        count: How many were left out: 1 unless it stands for several.
    """

    entity: str
    id: str
    reason: SkipReason
    message: str
    seq: int | None = None
    count: int = 1


class PublishedCounts(NamedTuple):
    """What a download brought: how many objects were written, confirmed and removed."""

    downloaded: int = 0
    confirmed: int = 0
    removed: int = 0

    def plus(self, other: PublishedCounts) -> PublishedCounts:
        """Return the sums."""
        return PublishedCounts(*map(sum, zip(self, other, strict=True)))


class Failures(Sequence[SynchronizationFailure]):
    """
    The refusals of one synchronization, in the order they were learnt.

    Payloads may be large, and many: the first ones, up to 1 MiB, are kept, the others
    are read from the replica's own record when they are looked at, while it is open.
    """

    def __init__(self, load: Callable[[str], SynchronizationFailure] | None) -> None:
        self._load = load
        self._kept: list[SynchronizationFailure] = []
        self._kept_bytes = 0
        self._ids: list[str] = []

    def add(self, messages: Iterable[failure_pb2.SynchronizationFailure]) -> None:
        """Append refusals."""
        for message in messages:
            self._kept_bytes += message.ByteSize()
            if self._kept_bytes <= FAILURES_KEPT_BYTES_MAX:
                self._kept.append(SynchronizationFailure.from_message(message))
            self._ids.append(message.id)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> SynchronizationFailure: ...
    @overload
    def __getitem__(self, index: slice) -> list[SynchronizationFailure]: ...
    def __getitem__(self, index: int | slice) -> SynchronizationFailure | list[SynchronizationFailure]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        if position < len(self._kept) or self._load is None:
            return self._kept[position]
        return self._load(self._ids[position])

    def __repr__(self) -> str:
        return f"<{len(self)} failures>"


@dataclass(slots=True)
class Report:
    """
    What a synchronization did.

    Attributes:
        applied: Operations that were pending and that the server applied.
        rejected: Operations that the server refused: those that `failures` are about.
        held: Operations that had to wait for others in this synchronization.
        downloaded: Snapshots taken in.
        confirmed: Objects of which the server said that they are as this replica made them.
        removed: Objects that left the replica: they are gone on the server, or no longer visible,
            or no longer of what the replica is to hold.
        sent_bytes: Bytes of the messages sent.
        received_bytes: Bytes of the messages received.
        attempts: How many sessions were begun: 1 unless the network failed, or contents of files travelled for long.
        upload_seconds: Time until the server had settled the upload.
        download_seconds: Time from then to the end.
        failures: The refusals, each with its payload: a sequence. Many or large ones are
            read from the replica when they are looked at, so do that while it is open.
        skipped: What was left out.
        added: Keys of objects that a selection did not name and that had to be uploaded with it.
        former_replica_id: The id under which the replica went until now, if its directory turned out to
            be a copy, or put back from one, or if the server had given the replica up; empty otherwise.
        server_restored: Whether the server turned out to be put back from a backup, or another one.
        reoffered: Operations that had been settled, that the server had lost, and that it settled anew. It
            applied them again or recorded their failures again, but for those that are `rejected`.
        files_uploaded: Contents of files that were uploaded.
        files_downloaded: Contents of files that were downloaded.
        file_bytes_sent: Bytes of contents that were handed to the network, whether or not the server got them:
            what a cut took with it counts each time it was sent.
        file_bytes_received: Bytes of contents that came, what had to be thrown away included.
    """

    applied: int = 0
    rejected: int = 0
    held: int = 0
    downloaded: int = 0
    confirmed: int = 0
    removed: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    attempts: int = 0
    upload_seconds: float = 0.0
    download_seconds: float = 0.0
    failures: Failures = field(default_factory=lambda: Failures(None))
    skipped: list[Skipped] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)
    former_replica_id: str = ""
    server_restored: bool = False
    reoffered: int = 0
    _held_before: int = field(default=0, repr=False, compare=False)
    _open_before: list[Skipped] = field(default_factory=list, repr=False, compare=False)
    files_uploaded: int = 0
    files_downloaded: int = 0
    file_bytes_sent: int = 0
    file_bytes_received: int = 0

    def begin_attempt(self) -> None:
        """Count an attempt; what an earlier one said of operations left open is said anew."""
        self.attempts += 1
        self.held = self._held_before
        self.skipped = [one for one in self.skipped if one.reason not in _OF_AN_ATTEMPT]

    def begin_selection(self) -> None:
        """Forget what an earlier selection said: it is made anew."""
        self.skipped = [one for one in self.skipped if one.reason not in _OF_A_SELECTION]

    def end_session(self) -> None:
        """Note that a session came to its end: what it told stays, whatever follows."""
        self._held_before = self.held
        self._open_before = [one for one in self.skipped if one.reason in _OF_AN_ATTEMPT]

    def give_up_attempt(self) -> None:
        """Note that the session after the one that came to its end did not, and no other one follows."""
        self.held = self._held_before
        self.skipped = [*(one for one in self.skipped if one.reason not in _OF_AN_ATTEMPT), *self._open_before]

    def count_published(self, counts: PublishedCounts) -> None:
        """Add what a part of the download brought."""
        self.downloaded += counts.downloaded
        self.confirmed += counts.confirmed
        self.removed += counts.removed


_OF_AN_ATTEMPT: Final = (SkipReason.NOT_READY, SkipReason.NEVER)
_OF_A_SELECTION: Final = (SkipReason.UNCOMMITTED, SkipReason.DELETED)


class Phase(enum.StrEnum):
    """A part of a synchronization."""

    CONNECT = "connect"
    UPLOAD = "upload"
    DOWNLOAD = "download"
    PUBLISH = "publish"
    FILES = "files"


@dataclass(frozen=True, slots=True)
class Progress:
    """
    How far a synchronization is.

    Attributes:
        phase: What is being done.
        done: Operations or objects done in this phase; of files, bytes.
        total: How many there are, or None if that is not known. Of files it may grow, and never falls.
    """

    phase: Phase
    done: int
    total: int | None


OnProgress = Callable[[Progress], None]


def ignore(*_progress: object) -> None:
    """Tell nobody how far it is."""
