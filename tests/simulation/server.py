"""The server of a simulated world: the real application and store, which may die and start again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar
from uuid import UUID

from tests.simulation.disk import SERVER_FILES, Disk
from tests.simulation.exchange import FileEnd, FilePeer
from tests.simulation.faults import Commit, Coverage, server_commit
from tests.simulation.link import ServerEnd
from tests.simulation.promises import Settlement
from tests.simulation.records import History

from tidelog import StorageError
from tidelog._contents import ContentDirectory
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog_server import Application, LmdbStore, Principal, backup_store, restore_store
from tidelog_server._adoption import adopt_schema
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._content_store import CONTENTS_DIRECTORY, DirectoryContents
from tidelog_server._files import Files
from tidelog_server._indexes import twins_prefix
from tidelog_server._lmdb_store import _Job
from tidelog_server._principal import DEFAULT_TENANT
from tidelog_server._records import Identity, Settled, Writes
from tidelog_server._retention import Collected, Periods, Retention
from tidelog_server._sealing import Sealer
from tidelog_server._store import Reader

T = TypeVar("T")

# Of an operation: replica id and seq.
Place: TypeAlias = tuple[str, int]

TWIN = twins_prefix(b"")


class ServerDied(StorageError):
    """The server's process dies in the middle of a commit."""

    def __init__(self) -> None:
        super().__init__("the simulated server dies")


class InlineStore(LmdbStore):
    """
    The real store, whose jobs run in the thread that submits them: so they run in one order only.

    Attributes:
        is_holding: Whether jobs wait, to be committed together.
    """

    def __init__(self, path: Path, *, map_bytes: int) -> None:
        super().__init__(path, map_bytes=map_bytes)
        self.is_holding = False
        self._waiting: list[_Job] = []

    def submit(
        self, tenant: str, job: Callable[[Any], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """See `Store`."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self._waiting.append(_Job(tenant, job, future, attempt))
        if not self.is_holding:
            self.write_waiting()
        return future

    def write_waiting(self) -> None:
        """Commit the jobs that wait in one transaction."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._write_group(waiting)


@dataclass
class Chronicle:
    """
    What a store's transactions settled; it forgets nothing.

    Attributes:
        settlements: When each operation, (replica id, seq), was settled.
        applications: When it was applied, if it was: it may have been forgotten, and settled once more, after that.
        marks: What became of it.
        forgotten: Those of which the store knows no more what became of them.
        doubted: Nonces of those that were sent again after that, and became failures since nobody knew.
        transaction_count: How many transactions there were.
    """

    settlements: dict[Place, Settlement] = field(default_factory=dict)
    applications: dict[Place, Settlement] = field(default_factory=dict)
    marks: dict[Place, Settled] = field(default_factory=dict)
    forgotten: set[Place] = field(default_factory=set)
    doubted: set[int] = field(default_factory=set)
    transaction_count: int = 0

    def copy(self) -> Chronicle:
        """Return what is known by now."""
        return Chronicle(
            dict(self.settlements),
            dict(self.applications),
            dict(self.marks),
            set(self.forgotten),
            set(self.doubted),
            self.transaction_count,
        )

    def note(self, replica_id: str, settled: Iterable[tuple[int, Settled]], before: int, after: int) -> Iterator[str]:
        """Note what a transaction has settled. Yields what must not be."""
        failures = {mark.nonce: mark.failure_id for mark in self.marks.values()}
        for seq, one in settled:
            place = replica_id, seq
            if one.failure_id and failures.get(one.nonce, one.failure_id) != one.failure_id:
                self.doubted.add(one.nonce)
            if place in self.settlements and place not in self.forgotten:
                yield f"seq {seq} of replica {replica_id} was settled a second time"
            now = self.settlements[place] = Settlement(self.transaction_count, before, after)
            if before < one.version <= after:
                self.applications[place] = now
            self.marks[place] = one


@dataclass(frozen=True)
class Backup:
    """
    A copy of a store.

    Attributes:
        path: Where it is.
        is_raw: Whether it was made behind the server's back, and will be put back so.
        chronicle: What was settled by then.
        history: What was applied by then.
    """

    path: Path
    is_raw: bool
    chronicle: Chronicle
    history: History


class SimulatedServer:
    """
    A store, an application, and what the store's transactions settled.

    Attributes:
        application: What it serves; may be replaced before a restart.
        store: What sessions use: the real one, with a record of what goes through it.
        disk: Where the store writes.
        files: The contents of files.
        chronicle: What was settled.
        defects: What the store's own thread saw that must not be.
        clock: What time it is there.

    Args:
        directory: The store's.
        application: See there.
        coverage: Counts what happens.
        periods: How long the server remembers.
        clock: See above.
        map_bytes: Size of the store's map.
        file_bytes_max: How large the content of a file may be. None: there are no files.
    """

    def __init__(
        self,
        directory: Path,
        application: Application,
        coverage: Coverage,
        periods: Periods,
        clock: Callable[[], int],
        *,
        map_bytes: int,
        file_bytes_max: int | None = None,
    ) -> None:
        self.application = application
        self.chronicle = Chronicle()
        self.disk = Disk(ServerDied, coverage, self._take_queued, self._note_settled, files=SERVER_FILES)
        self.store = SimulatedStore(self)
        self._directory = directory
        self._periods = periods
        self.clock = clock
        self._map_bytes = map_bytes
        self._has_files = file_bytes_max is not None
        self._file_bytes_max = FILE_BYTES_MAX_DEFAULT if file_bytes_max is None else file_bytes_max
        self.files: Files
        self.defects: list[str] = []
        self._queued: list[tuple[Commit, list[tuple[int, Writes]]]] = []
        self._committing: list[tuple[Commit, list[tuple[int, Writes]]]] = []
        self.lmdb = self._open()

    @property
    def has_died(self) -> bool:
        """Whether the process died at a commit, and was not started again."""
        return self.disk.is_dead

    def end(self, principal: Principal, clock: Callable[[], int]) -> ServerEnd:
        """Return the server's end of a new session."""
        return ServerEnd(self.application, self.store, principal, clock, file_bytes_max=self._file_bytes_max)

    def file_end(self, principal: Principal, peer: FilePeer) -> FileEnd:
        """Return the server's end of a new file call."""
        return FileEnd(self.files, principal, peer)

    @property
    def contents(self) -> ContentDirectory:
        """The contents of files, as they lie on the disk."""
        return ContentDirectory(DirectoryContents(self._directory / CONTENTS_DIRECTORY).tenant_path(DEFAULT_TENANT))

    def restart(self) -> None:
        """Stop and start again. The store is not adopted yet."""
        self.lmdb.close()
        self.lmdb = self._open()
        self._note_forgotten()  # it may have died when it had just forgotten something

    def adopt(self) -> None:
        """Make the store ready for the application's schema, as a server does that starts. Raises StorageError."""
        adopt_schema(self.application, self.store, migrate=True, time_us=self.clock())
        Sealer(self.store, "")  # makes the key

    def collect(self, periods: Periods | None = None) -> Collected:
        """Forget what is due, after its own periods or others. Raises StorageError."""
        files = self.files if self._has_files else None
        try:
            return Retention(self.store, periods or self._periods, self.clock, files).collect()
        finally:
            if not self.has_died:
                self._note_forgotten()

    def back_up(self, path: Path, history: History, *, is_raw: bool) -> Backup:
        """Copy the store, by the means there are for it or behind its back."""
        if is_raw:
            shutil.copytree(self._directory, path)
        else:
            backup_store(self._directory, path)
        return Backup(path, is_raw, self.chronicle.copy(), history.copy())

    def restore(self, backup: Backup) -> None:
        """Stop, put a backup in the place of the store, and start again. The store is not adopted yet."""
        self.lmdb.close()
        shutil.rmtree(self._directory)
        if backup.is_raw:
            shutil.copytree(backup.path, self._directory)
        else:
            restore_store(backup.path, self._directory)
        self.chronicle = backup.chronicle.copy()
        self.lmdb = self._open()

    def close(self) -> None:
        """Stop."""
        self.lmdb.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit all jobs that are submitted meanwhile in one transaction; nobody may wait for them inside."""
        self.lmdb.is_holding = True
        try:
            yield
        finally:
            self.lmdb.is_holding = False
            self.lmdb.write_waiting()

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """Submit a job to the store; outside of `together` its transaction has ended when this returns."""
        written: list[tuple[int, Writes]] = []

        def recorded(reader: Reader) -> tuple[Writes | None, T]:
            written.clear()
            writes, result = job(reader)
            if writes is not None:
                written.append((reader.head().version, writes))
            return writes, result

        self._queued.append((server_commit(job), written))
        return self.lmdb.submit(tenant, recorded, attempt)

    def _take_queued(self, work: object) -> Callable[[], list[Commit]]:
        """Take what the transaction that begins commits; return what names it afterwards."""
        self._committing, self._queued = self._queued, []
        if not self._committing and "set_note" in getattr(work, "__qualname__", ""):
            return lambda: [server_commit(work)]
        return self._names

    def _names(self) -> list[Commit]:
        names = []
        for commit, written in self._committing:
            names.append(commit)
            for _, writes in written:
                if writes.timeline:
                    names.append(Commit.TIMELINE)
                if writes.replica is not None and any(key.startswith(TWIN) for key in writes.index_entries):
                    names.append(Commit.COPIES)
        return names

    def _note_settled(self) -> None:
        for before, writes in (one for _, written in self._committing for one in written):
            self.chronicle.transaction_count += 1
            if writes.replica is not None:
                replica_id = str(UUID(bytes=writes.replica[0]))
                self.defects += self.chronicle.note(replica_id, writes.settled, before, writes.version)

    def _note_forgotten(self) -> None:
        """Note what the store has forgotten of what was settled."""
        chronicle = self.chronicle
        seqs_of: dict[str, list[int]] = {}
        for replica_id, seq in chronicle.marks.keys() - chronicle.forgotten:
            seqs_of.setdefault(replica_id, []).append(seq)
        with self.lmdb.read(DEFAULT_TENANT) as reader:
            collected = reader.collected()
            for replica_id, seqs in sorted(seqs_of.items()):
                id_ = UUID(replica_id).bytes
                state, kept = reader.replica(id_), reader.settled(id_, seqs)
                for seq in sorted(set(seqs) - kept.keys()):
                    chronicle.forgotten.add((replica_id, seq))
                    mark = chronicle.marks[replica_id, seq]
                    if state is None or not (
                        state.retired or (seq <= state.watermark and (mark.failure_id or mark.version < collected))
                    ):
                        self.defects.append(f"what became of seq {seq} of replica {replica_id} is forgotten too early")

    def _open(self) -> InlineStore:
        self.disk.is_dead = False
        self.disk.trap = None
        self._queued = []
        contents = DirectoryContents(self._directory / CONTENTS_DIRECTORY)
        self.files = Files(self.application, self.store, contents, self.clock, bytes_max=self._file_bytes_max)
        return InlineStore(self._directory, map_bytes=self._map_bytes)


class SimulatedStore:
    """The store as sessions see it. See `Store`."""

    is_shared: ClassVar[bool] = False

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server

    @property
    def identity(self) -> Identity:
        """See `Store`."""
        return self._server.lmdb.identity

    def read(self, tenant: str) -> AbstractContextManager[Reader]:
        """See `Store`."""
        return self._server.lmdb.read(tenant)

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """See `Store`."""
        return self._server.submit(tenant, job, attempt)

    def check_outside_of_jobs(self) -> None:
        """See `Store`."""
        self._server.lmdb.check_outside_of_jobs()

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """See `Store`."""
        self._server.lmdb.announce(tenant, attempt)

    def left_under_way(self) -> UnderWay:
        """See `Store`."""
        return self._server.lmdb.left_under_way()

    def forget_under_way(self) -> None:
        """See `Store`."""
        self._server.lmdb.forget_under_way()

    def tenants(self) -> list[str]:
        """See `Store`."""
        return self._server.lmdb.tenants()

    def note(self, name: str) -> bytes:
        """See `Store`."""
        return self._server.lmdb.note(name)

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """See `Store`."""
        return self._server.lmdb.set_note(name, value, expected=expected)

    def require_note(self, name: str, value: bytes) -> None:
        """See `Store`."""
        self._server.lmdb.require_note(name, value)

    def preparing(self) -> AbstractContextManager[None]:
        """See `Store`."""
        return self._server.lmdb.preparing()

    def close(self) -> None:
        """See `Store`."""
        self._server.close()
