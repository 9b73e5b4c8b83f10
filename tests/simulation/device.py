"""A replica of a simulated world: its directory, its user, its clock, and the synchronization under way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Protocol

from tests.simulation.actions import User
from tests.simulation.contents import Library
from tests.simulation.disk import Disk, abandon
from tests.simulation.exchange import FileLink, SimulatedCalls, Turns
from tests.simulation.faults import Coverage, client_commit
from tests.simulation.fiber import Fiber
from tests.simulation.link import Link
from tests.simulation.model import Key
from tests.simulation.records import Committed, History, ReplicaRecord, SeenHistory, read_replica
from tests.simulation.rights import Eyes

from tidelog import Download, Operation, Schema
from tidelog_client import Object, Replica, Report
from tidelog_client._file_wishes import FileDownload, FileWishes
from tidelog_client._files import Needed
from tidelog_client._selection import Selection
from tidelog_client._synchronization import Mode


class ReplicaDied(BaseException):
    """A replica's process dies. Nothing may catch it on the way, as nothing catches SIGKILL."""


class Network(Protocol):
    """What connects a device with the server, and with the time."""

    def time_us(self) -> int:
        """Return the microseconds since 1970 on the clock of the device that acts."""
        ...

    def connect(self, device: Device) -> Link:
        """Open a stream."""
        ...

    def pause(self, device: Device, seconds: float) -> None:
        """Let the world go on while the synchronizer waits."""
        ...

    def connect_file(self, device: Device, turns: Turns) -> FileLink:
        """Open a file call."""
        ...

    def pause_for_files(self, device: Device, turns: Turns, seconds: float) -> bool:
        """Let the world go on until a file call may, or, False, the time is over."""
        ...


@dataclass(frozen=True)
class Attempt:
    """
    One attempt of a call: a session, or the beginning of one.

    Attributes:
        link: Its link.
        life: In which life of the server's store it began.
        selection: What it is about. Mode selected only.
        covered: The operations that it has to settle.
    """

    link: Link
    life: int
    selection: Selection | None
    covered: frozenset[int]


@dataclass
class Call:
    """
    One call of `synchronize_...` under way, with all its attempts; or of `open_file`.

    Attributes:
        mode: What it synchronizes. None: it opens a file.
        fiber: Where it runs.
        pending_before: How many operations were pending when it began.
        committed_before: How many had ever been committed then.
        has_consent: Whether most of an entity may go.
        link: The present attempt's; None between attempts.
        attempt: The newest attempt.
        completed: The newest one that came to its end. A later one, for what came while contents travelled, may not.
        is_asleep: Whether it waits before its next attempt.
        selected: What was worked out for the next attempt. Mode selected only.
        report: What it returned in the end.
        turns: What transfers contents and is waited for. None: it is not.
        file_links: The file calls under way.
        file_seconds: How long it waits for one of them at the most. None: it does not.
        is_time_over: Whether it has waited for so long.
        prepared_at: The newest operation when the next attempt was prepared. What is committed later is not of it.
        opened: The content of the file that it opened.
    """

    mode: Mode | None
    pending_before: int
    committed_before: int
    has_consent: bool = False
    fiber: Fiber = field(init=False)
    link: Link | None = None
    attempt: Attempt | None = None
    completed: Attempt | None = None
    is_asleep: bool = False
    selected: Selection | None = None
    report: Report | None = None
    turns: Turns | None = None
    file_links: list[FileLink] = field(default_factory=list)
    file_seconds: float | None = None
    is_time_over: bool = False
    prepared_at: int = 0
    opened: bytes = b""

    @property
    def is_transferring(self) -> bool:
        """Whether contents are on their way."""
        return any(not one.is_left for one in self.file_links)


@dataclass(frozen=True)
class Aside:
    """A copy of a replica's directory, and what was known of the replica when it was made."""

    path: Path
    model: Model
    eyes: Eyes
    wishes: Mapping[str, Download]
    is_between_wishes: bool
    seen: SeenHistory
    committed: Committed
    life: int
    sessions: tuple[Link, ...]


@dataclass(frozen=True)
class Model:
    """What a device is, whatever happens: the arguments with which its replica is opened, and who uses it."""

    schema: Schema
    log_retention: timedelta
    map_bytes: int
    files: Mapping[str, FileDownload] = field(default_factory=dict)
    library: Library | None = None
    is_contended: bool = False


class Device:
    """
    A replica in the world, and who works with it.

    Attributes:
        eyes: What may be done and seen with it, once it has synchronized everything.
        wishes: How much of each entity its user wants.
        seen: The server's history as it may know it.
        committed: The operations that it ever committed.
        call: The synchronization under way.
        cursor_at: Where its cursor was last seen: replica id, timeline, version.
        life: In which of the lives of the server's store it last had everything. See `History`.
        is_between_wishes: Whether it still has what its user wanted before.
        is_copied: Whether there are, or were, other copies of its directory.
        disk: Where it writes.
        clock_jump: How far its clock is from the world's.
        seconds: How long its process has run, as its monotonic clock says.
        has_stale_token: Whether the server will refuse its next token.
        is_asked: Whether its user was asked whether most of an entity may go, and has not said so yet.
        sessions: The links of which pages may be kept that are not published.
    """

    def __init__(  # noqa: PLR0917 - a device is put together once
        self,
        name: str,
        path: Path,
        model: Model,
        eyes: Eyes,
        history: History,
        network: Network,
        coverage: Coverage,
        random: Random,
    ) -> None:
        self.name = name
        self.path = path
        self.committed = Committed()
        self.call: Call | None = None
        self.cursor_at: tuple[str, str, int] = ("", "", 0)
        self.is_between_wishes = False
        self.life = 0
        self.is_copied = False
        self.disk = Disk(ReplicaDied, coverage, lambda work: lambda: [client_commit(work)])
        self.clock_jump = timedelta(0)
        self.seconds = 0.0
        self.has_stale_token = False
        self.is_asked = False
        self.sessions: list[Link] = []
        self.eyes = eyes
        self.wishes: Mapping[str, Download] = {}
        self._history = history
        self.seen = SeenHistory(history, eyes.readable, eyes.shown, eyes.downloads)
        self._model = model
        self._network = network
        self._random = random
        self.replica: Replica
        self.user: User

    def open(self) -> None:
        """Open the replica. Raises ReplicaDied; then it may be opened once more."""
        self.disk.is_dead = False
        model = self._model
        try:
            replica = Replica(
                self.path,
                schema=model.schema,
                download=dict(self.wishes),
                durability="relaxed",
                log_retention=model.log_retention,
                map_bytes=model.map_bytes,
                files=model.files,
                clock=self._network.time_us,
            )
        except ReplicaDied:
            abandon(self.path)
            raise
        replica._synchronizer._connection = Connection(self, self._network)  # type: ignore[assignment]
        self.replica = replica
        if hasattr(self, "user"):
            self.user.open_again(replica)
        else:
            self.user = User(replica, self._random, self.name, model.library, is_contended=model.is_contended)

    def die(self) -> None:
        """Lose all that is not on disk."""
        self.disk.is_dead = True
        self.disk.trap = None
        call, self.call = self.call, None
        if call is not None and not call.fiber.is_done:
            call.fiber.resume(ReplicaDied())
        self.replica.close()

    def put_aside(self, path: Path) -> Aside:
        """Copy the directory as it is just now."""
        shutil.copytree(self.path, path)
        self.is_copied = True
        return Aside(
            path,
            self._model,
            self.eyes,
            self.wishes,
            self.is_between_wishes,
            self.seen,
            self.committed.copy(),
            self.life,
            tuple(self.sessions),
        )

    def put_back(self, aside: Aside) -> None:
        """Put a copy in the place of the directory. The replica is not open meanwhile."""
        if self.path.exists():
            shutil.rmtree(self.path)
        shutil.copytree(aside.path, self.path)
        self.eyes, self.wishes, self.seen = aside.eyes, aside.wishes, aside.seen
        self.is_between_wishes = aside.is_between_wishes
        self.committed, self.life, self.is_copied = aside.committed.copy(), aside.life, True
        self.cursor_at = ("", "", 0)
        self.sessions = list(aside.sessions)

    def needed_contents(self) -> list[tuple[int, list[Needed]]]:
        """Return what its pending operations need, by seq."""
        return list(self.replica._storage.files.uploads(until=len(self.committed.data)))

    @property
    def file_wishes(self) -> FileWishes:
        """Which contents its user wants."""
        return FileWishes(self._model.files)

    @property
    def is_new_with_work(self) -> bool:
        """Whether it has something to upload, does not do it just now, and has never got everything."""
        storage = self.replica._storage
        is_new = not (storage.meta("cursor") or storage.meta("state_lost"))
        return self.call is None and is_new and self.replica.pending_count() > 0

    @property
    def has_staged_pages(self) -> bool:
        """Whether it keeps pages of an interrupted download of everything."""
        return bool(self.replica._storage.meta("resume_token"))

    @property
    def has_staged_merge(self) -> bool:
        """Whether it keeps pages of a download without a cursor."""
        environment = self.replica._storage.environment
        with environment.read() as transaction:
            return bool(transaction.stat(environment.database("merging"))["entries"])

    def wish(self, wishes: Mapping[str, Download]) -> None:
        """Let the user want something else, from the next time on that the replica is opened."""
        self.is_between_wishes = True
        before, eyes = self.seen, self.eyes.with_wishes(wishes)
        self.wishes, self.eyes = wishes, eyes
        self.seen = SeenHistory(
            self._history,
            eyes.readable,
            lambda entity, state: None if before.shown(entity, state) is None else eyes.shown(entity, state),
            lambda entity: before.follows(entity) and eyes.downloads(entity),
        )

    def see_as_wished(self) -> None:
        """Take note that everything was synchronized."""
        self.is_between_wishes = False
        self.seen = SeenHistory(self._history, self.eyes.readable, self.eyes.shown, self.eyes.downloads)

    def record(self) -> ReplicaRecord:
        """Read what is on disk."""
        return read_replica(self.replica._storage)

    @property
    def nonces(self) -> set[int]:
        """The nonces of all operations that it ever committed."""
        return {operation.nonce for operation in self.committed.operations.values()}

    def note_commits(self) -> list[Operation]:
        """Take over what is new in the log."""
        storage = self.replica._storage
        found = []
        with storage.environment.read() as transaction:
            for seq in range(len(self.committed.data) + 1, storage.last_seq(transaction) + 1):
                data = storage.log.get(transaction, seq)
                if data is None:
                    raise AssertionError(f"{self.name}: seq {seq} is missing in the log")
                found.append(self.committed.add(seq, data))
        return found

    def synchronization(
        self, mode: Mode, picked: Sequence[Object | Key], timeout: float | None, *, accepts_removal: bool = False
    ) -> Callable[[], Report]:
        """Return a call that synchronizes."""
        replica = self.replica
        if mode is Mode.ALL:
            return lambda: replica.synchronize_all(timeout=timeout, accept_mass_removal=accepts_removal)
        if mode is Mode.UNSYNCHRONIZED:
            return lambda: replica.synchronize_unsynchronized(timeout=timeout)
        return lambda: replica.synchronize_selected(picked, timeout=timeout)


class Connection:
    """What a replica has for a connection. See `tidelog_client._connection.Connection`."""

    may_get_another_token = True

    def __init__(self, device: Device, network: Network) -> None:
        self._device = device
        self._network = network
        self._turns: Turns

    def authorization(self) -> None:
        """See `Connection`."""

    def synchronize(self, _metadata: None, _timeout: float | None) -> Link:
        """See `Connection`."""
        return self._network.connect(self._device)

    def files(self, _timeout: float | None) -> SimulatedCalls:
        """See `Caller`."""
        turns = self._turns = Turns(
            lambda seconds: self._network.pause_for_files(self._device, turns, seconds),
            lambda: self._device.seconds,
            lambda: ReplicaDied() if self._device.disk.is_dead else None,
        )
        return SimulatedCalls(lambda: self._network.connect_file(self._device, turns))

    def workers(self, _count_max: int) -> Turns:
        """See `Caller`."""
        return self._turns

    def close(self) -> None:
        """See `Connection`."""
