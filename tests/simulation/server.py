"""The server of a simulated world: the real application and store, which may die and start again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from tests.simulation.disk import Disk
from tests.simulation.faults import Commit, Coverage, server_commit
from tests.simulation.link import ServerEnd
from tests.simulation.promises import Settlement

from tidelog import StorageError
from tidelog_server import Application, LmdbStore, Principal
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._lmdb_store import _Job
from tidelog_server._records import Identity, Writes
from tidelog_server._store import Reader

T = TypeVar("T")


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


class SimulatedServer:
    """
    A store, an application, and what the store's transactions settled.

    Attributes:
        application: What it serves; may be replaced at a restart.
        store: What sessions use: the real one, with a record of what goes through it.
        disk: Where the store writes.
        settlements: When each operation, (replica id, seq), was settled.
        defects: What the store's own thread saw that must not be.
    """

    def __init__(self, directory: Path, application: Application, coverage: Coverage, *, map_bytes: int) -> None:
        self.application = application
        self.settlements: dict[tuple[str, int], Settlement] = {}
        self.disk = Disk(ServerDied, coverage, self._take_queued, self._note_settled)
        self.store = SimulatedStore(self)
        self._directory = directory
        self._map_bytes = map_bytes
        self.defects: list[str] = []
        self._transaction_count = 0
        self._queued: list[tuple[Commit, list[tuple[int, Writes]]]] = []
        self._committing: list[list[tuple[int, Writes]]] = []
        self.lmdb = self._open()

    @property
    def has_died(self) -> bool:
        """Whether the process died at a commit, and was not started again."""
        return self.disk.is_dead

    def end(self, principal: Principal, clock: Callable[[], int]) -> ServerEnd:
        """Return the server's end of a new session."""
        return ServerEnd(self.application, self.store, principal, clock)

    def restart(self) -> None:
        """Stop and start again."""
        self.lmdb.close()
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

    def _take_queued(self, _work: object) -> list[Commit]:
        """Return what the transaction that begins is about to commit."""
        queued, self._queued = self._queued, []
        self._committing = [written for _, written in queued]
        return [commit for commit, _ in queued]

    def _note_settled(self) -> None:
        for before, writes in (one for written in self._committing for one in written):
            self._transaction_count += 1
            if writes.replica is None:
                continue
            replica_id = str(UUID(bytes=writes.replica[0]))
            for seq, _ in writes.settled:
                if (replica_id, seq) in self.settlements:
                    self.defects.append(f"seq {seq} of replica {replica_id} was settled a second time")
                self.settlements[replica_id, seq] = Settlement(self._transaction_count, before, writes.version)

    def _open(self) -> InlineStore:
        self.disk.is_dead = False
        self.disk.trap = None
        self._queued = []
        return InlineStore(self._directory, map_bytes=self._map_bytes)


class SimulatedStore:
    """The store as sessions see it. See `Store`."""

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

    def set_note(self, name: str, value: bytes) -> None:
        """See `Store`."""
        self._server.lmdb.set_note(name, value)

    def close(self) -> None:
        """See `Store`."""
        self._server.close()
