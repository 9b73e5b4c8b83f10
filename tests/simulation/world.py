"""
A world of replicas and a server, driven from one seed.

Everything that can happen happens one thing at a time, and dice choose what: a local
change, one message on one link, a cut, a crash of a replica at one of its writes, a
crash of the server before or after it replied. The real client and server code runs;
only the link between them, the fuse in their writes and the dice are made here. After
each step what holds at any moment is checked; at the end the world heals, and all
replicas must agree with the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest import mock
from uuid import UUID

from tests.builders import references_schema
from tests.simulation import promises
from tests.simulation.actions import User, fits
from tests.simulation.application import REFERENCES, Weather, make_application, may_hooks_refuse
from tests.simulation.link import Link, ServerEnd, ServerGone
from tests.simulation.model import Key
from tests.simulation.promises import Rules, Settlement
from tests.simulation.records import Committed, History, ReplicaRecord, ServerRecord, read_replica, read_server

from tidelog import StorageError, _log
from tidelog.v1 import sync_pb2
from tidelog_client import Object, Replica, Report, SkipReason, _publication, _storage, _synchronization, _view
from tidelog_client._selection import Selection, select
from tidelog_client._synchronization import Mode, Synchronization
from tidelog_client._view import StateLost
from tidelog_server import LmdbStore, Principal, _download, _engine, _overlay, _session
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._records import Identity, Writes
from tidelog_server._store import Reader

STEPS_DEFAULT = 150
QUIET_ROUNDS = 2
QUIET_ROUNDS_MAX = 12
CALL_MOVES_MAX = 20_000
MIB = 1024 * 1024

T = TypeVar("T")


class ReplicaDied(BaseException):
    """A replica's process dies. Nothing may catch it on the way, as nothing catches SIGKILL."""


@dataclass(frozen=True)
class Settings:
    """What a seed draws once: how many replicas, and how small the limits are."""

    replica_count: int
    schema_versions: tuple[int, ...]
    server_map_bytes: int
    replica_map_bytes: int
    is_hasty: bool
    limits: dict[str, int]

    @classmethod
    def drawn(cls, random: Random) -> Settings:
        """Draw settings: small limits reach in a few steps what takes a million objects otherwise."""
        replica_count = random.randint(1, 4)
        return cls(
            replica_count,
            tuple(random.choices([1, 2], [4, 1])[0] for _ in range(replica_count)),
            random.choice([256 * 1024, 1024 * MIB]),
            random.choice([256 * 1024, 1024 * MIB]),
            random.random() < 0.3,
            {
                "batch_operations": random.choice([1, 2, 5, 500]),
                "batches_in_flight": random.choice([1, 2, 4]),
                "download_page": random.choice([1, 2, 5, 1_000]),
                "catch_up_rounds": random.choice([1, 3]),
                "held_units": random.choices([1, 3, 10_000], [1, 1, 6])[0],
                "server_scan_page": random.choice([1, 3, 500]),
                "stage_bytes": random.choice([1, 300, 8 * MIB]),
                "publish_objects": random.choice([0, 3, 100_000]),
                "publish_pages": random.choice([1, 2, 20]),
                "replica_page": random.choice([1, 3, 500]),
                "selection_keys": random.choice([1, 5_000]),
            },
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the limits in force."""
        limits = self.limits
        message = sync_pb2.Limits()
        message.CopyFrom(_session.LIMITS)
        message.batch_operation_count = limits["batch_operations"]
        message.batches_in_flight = limits["batches_in_flight"]
        with ExitStack() as stack:
            for module, name, value in (
                (_session, "LIMITS", message),
                (_download, "PAGE_OBJECTS_MAX", limits["download_page"]),
                (_download, "CATCH_UP_ROUNDS_MAX", limits["catch_up_rounds"]),
                (_engine, "HELD_UNITS_MAX", limits["held_units"]),
                (_overlay, "_SCAN_PAGE_OBJECTS", limits["server_scan_page"]),
                (_synchronization, "STAGE_BYTES", limits["stage_bytes"]),
                (_synchronization, "SELECTION_KEYS_A_MESSAGE", limits["selection_keys"]),
                (_publication, "PUBLISH_OBJECTS_MAX", limits["publish_objects"]),
                (_publication, "PUBLISH_STEP_PAGES", limits["publish_pages"]),
                (_publication, "END_STEP_OBJECTS", limits["publish_pages"]),
                (_storage, "READ_PAGE_ENTRIES", limits["replica_page"]),
                (_view, "PAGE_OBJECTS", limits["replica_page"]),
                (_log, "_SCAN_PAGE_ENTRIES", limits["replica_page"]),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


@dataclass
class Call:
    """One call of `synchronize_...` under way, with all its attempts."""

    mode: Mode
    picked: dict[Key, bool] | None
    report: Report = field(default_factory=Report)
    link: Link | None = None
    selection: Selection | None = None
    settled_before: int = 0
    pending_before: frozenset[int] = frozenset()


class Device:
    """A replica in the world, and who works with it."""

    def __init__(self, world: World, number: int, random: Random) -> None:
        self.name = f"r{number}"
        self.committed = Committed()
        self.call: Call | None = None
        self.cursor_version = 0
        self.fuse: tuple[int, bool] | None = None  # writes until it dies, and whether after the last one
        self._world = world
        self._path = world.directory / self.name
        self._schema_version = world.settings.schema_versions[number]
        self.replica = self._open()
        self.user = User(self.replica, random, self.name)

    def crash(self) -> None:
        """Lose all that is not on disk, and start again."""
        self.fuse = None
        self.call = None
        self.replica.close()
        self.replica = self._open()
        self.user.open_again(self.replica)

    def record(self) -> ReplicaRecord:
        """Read what is on disk."""
        return read_replica(self.replica._storage)

    def begin_attempt(self, call: Call, server: ServerEnd) -> None:
        """Do what the synchronizer does at the start of an attempt."""
        storage = self.replica._storage
        call.report.count_published(storage.publication.finish())
        if call.picked is not None:
            call.report.skipped.clear()
            call.report.added.clear()
            call.selection = select(storage, self.replica._known_schema(), call.picked, call.report)
        attempt = Synchronization(
            storage,
            call.mode,
            call.report,
            lambda _: None,
            selection=call.selection,
            schema_version=self._schema_version,
        )
        pending = [one.seq for one in storage.pending()]
        call.pending_before = frozenset(pending if call.selection is None else call.selection.seqs)
        call.link = Link(attempt, server)

    def trim(self) -> int:
        """Trim the log as if all of it were old."""
        return self.replica.trim_log()

    def _open(self) -> Replica:
        replica = Replica(
            self._path,
            durability="relaxed",
            schema=references_schema(REFERENCES, self._schema_version),
            log_retention=timedelta(0),
            map_bytes=self._world.settings.replica_map_bytes,
        )
        environment = replica._storage.environment
        write = environment.write

        def fused_write(work: Callable[[Any], T]) -> T:
            if self.fuse is None:
                return write(work)
            left, is_after = self.fuse
            if left == 0 and not is_after:
                raise ReplicaDied
            result = write(work)
            if left == 0:
                raise ReplicaDied
            self.fuse = (left - 1, is_after)
            return result

        environment.write = fused_write  # type: ignore[method-assign]
        return replica


class FusedStore:
    """The server's store, with a record of what its transactions settled, and a fuse."""

    def __init__(self, world: World, store: LmdbStore) -> None:
        self._world = world
        self._store = store

    @property
    def identity(self) -> Identity:
        """See `Store`."""
        return self._store.identity

    def read(self, tenant: str) -> AbstractContextManager[Reader]:
        """See `Store`."""
        return self._store.read(tenant)

    def tenants(self) -> list[str]:
        """See `Store`."""
        return self._store.tenants()

    def note(self, name: str) -> bytes:
        """See `Store`."""
        return self._store.note(name)

    def set_note(self, name: str, value: bytes) -> None:
        """See `Store`."""
        self._store.set_note(name, value)

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """See `Store`."""
        self._store.announce(tenant, attempt)

    def left_under_way(self) -> UnderWay:
        """See `Store`."""
        return self._store.left_under_way()

    def forget_under_way(self) -> None:
        """See `Store`."""
        self._store.forget_under_way()

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """See `Store`; the transaction has ended when this returns."""
        world = self._world
        written: list[tuple[int, Writes]] = []

        def recorded(reader: Reader) -> tuple[Writes | None, T]:
            written.clear()
            writes, result = job(reader)
            if writes is not None:
                written.append((reader.head().version, writes))
            if world.store_fuse == "fail":
                world.store_fuse = None
                raise StorageError("the disk of the simulated server fails")
            if world.store_fuse == "before":
                raise StorageError("the simulated server dies")
            return writes, result

        future = self._store.submit(tenant, recorded, attempt)
        error = future.exception()
        if world.store_fuse == "before":
            raise ServerGone
        if error is None:
            for before, writes in written:
                world.note_settled(before, writes)
        if world.store_fuse == "after":
            raise ServerGone
        return future

    def close(self) -> None:
        """See `Store`."""
        self._store.close()


class World:
    """
    Replicas, a server, and what happens to them.

    Args:
        seed: Decides everything.
        directory: An empty directory for the data.
        steps: How many things happen before the world heals.
    """

    def __init__(self, seed: int, directory: Path, *, steps: int = STEPS_DEFAULT) -> None:
        self.seed = seed
        self.directory = directory
        self.events: list[str] = []
        self.settlements: dict[tuple[str, int], Settlement] = {}
        self.store_fuse: str | None = None
        self.states_lost = 0
        self._random = Random(seed)
        self._steps = steps
        self.settings = Settings.drawn(self._random)
        self._weather = Weather()
        self._schema_version = 1
        self._transaction_count = 0
        self._time_us = 0
        self._history = History()
        self._store = self._open_store()
        self._application = make_application(self._weather, schema_version=1)
        self._devices = [
            Device(self, number, Random(self._random.random())) for number in range(self.settings.replica_count)
        ]
        # Links that were cut, whose last messages may still arrive.
        self._ghosts: list[tuple[str, Link]] = []

    def run(self) -> None:
        """Let things happen, then heal, then check everything. Raises AssertionError or whatever went wrong."""
        with self.settings.applied():
            try:
                for _ in range(self._steps):
                    self._step()
                self._heal()
            finally:
                for device in self._devices:
                    device.replica.close()
                self._store.close()

    def note_settled(self, before: int, writes: Writes) -> None:
        """Note what a transaction of the store settled."""
        self._transaction_count += 1
        if writes.replica is None:
            return
        replica_id = str(UUID(bytes=writes.replica[0]))
        for seq, _ in writes.settled:
            if (replica_id, seq) in self.settlements:
                raise AssertionError(f"{self._name(replica_id)}: seq {seq} was settled a second time")
            self.settlements[replica_id, seq] = Settlement(self._transaction_count, before, writes.version)

    # --- what can happen ----------------------------------------------------------------

    def _step(self) -> None:
        random = self._random
        device = random.choice(self._devices)
        active = [one for one in self._devices if one.call is not None]
        happening, weight = zip(
            *(
                (lambda: self._act(device), 6.0),
                (lambda: self._call(device), 4.0 if device.call is None else 0.0),
                (lambda: self._advance(random.choice(active)), 16.0 if active else 0.0),
                (lambda: self._cut(random.choice(active)), 1.0 if active else 0.0),
                (lambda: self._crash(device), 0.4),
                (lambda: self._light_fuse(device), 0.8),
                (self._light_store_fuse, 0.5),
                (self._restart_server, 0.2),
                (self._haunt, 3.0 if self._ghosts else 0.0),
                (self._change_weather, 0.3),
                (lambda: self._trim(device), 0.5),
            ),
            strict=True,
        )
        random.choices(happening, weight)[0]()

    def _act(self, device: Device) -> None:
        try:
            what, intended, is_grouped = device.user.act()
        except ReplicaDied:
            self._die(device)
            return
        operations = self._note_commits(device)
        self._say(f"{device.name} {what}")
        if len(operations) != len(intended) or not all(
            fits(operation, one, is_grouped=is_grouped) for operation, one in zip(operations, intended, strict=True)
        ):
            raise AssertionError(f"{device.name} logged {operations}, meant {intended}")
        self._check(device)

    def _call(self, device: Device) -> None:
        random = self._random
        mode = random.choices([Mode.ALL, Mode.UNSYNCHRONIZED, Mode.SELECTED], [5, 3, 3])[0]
        picked = None
        if mode is Mode.SELECTED:
            picked = {
                (one.entity, one.id) if isinstance(one, Object) else one: isinstance(one, Object) and one.is_new
                for one in device.user.pick_keys()
            }
        self._begin(device, mode, picked)
        if self.settings.is_hasty:
            self._advance(device, moves=CALL_MOVES_MAX)

    def _begin(self, device: Device, mode: Mode, picked: dict[Key, bool] | None) -> None:
        device.call = Call(mode, picked, settled_before=len(self._outcomes(device)))
        self._say(f"{device.name} synchronizes {mode.name} {list(picked) if picked is not None else ''}")
        self._attempt(device)

    def _attempt(self, device: Device) -> None:
        call = device.call
        if call is None:
            return
        try:
            server = ServerEnd(self._application, self._fused_store(), Principal(f"user-{device.name}"), self._clock)
            device.begin_attempt(call, server)
        except ReplicaDied:
            self._die(device)
        except StateLost as error:
            self._lose_state(device, error)

    def _advance(self, device: Device, *, moves: int | None = None) -> None:
        for _ in range(moves or self._random.choice([1, 1, 2, 5, 20])):
            call = device.call
            if call is None or call.link is None:
                break
            possible = call.link.moves()
            if not possible:
                if not call.link.is_broken:
                    raise AssertionError(f"{device.name}: the session hangs")
                self._retry(device)
                continue
            self._move(device, call, call.link, self._random.choice(possible))
        self._check(device)

    def _move(self, device: Device, call: Call, link: Link, move: Callable[[], str]) -> None:
        try:
            self._say(f"{device.name} {move()}")
        except ServerGone:
            self._restart_server()
            return
        except ReplicaDied:
            self._die(device)
            return
        except StateLost as error:
            self._lose_state(device, error)
            return
        if link.attempt.done:
            self._complete(device, call, link)

    def _complete(self, device: Device, call: Call, link: Link) -> None:
        device.call = None
        self._say(f"{device.name} is done: {call.report.applied} applied, {call.report.rejected} rejected")
        self._read_history()
        record, report = device.record(), call.report
        settled = len(record.outcomes) - call.settled_before
        if report.applied + report.rejected != settled:
            raise AssertionError(f"{device.name} reports {report.applied}+{report.rejected}, {settled} were settled")
        if {failure.id for failure in report.failures} - record.failures.keys():
            raise AssertionError(f"{device.name} reports failures of which it has no record")
        promises.check_uploaded(record, call.pending_before, self._not_ready(report))
        promises.check_fresh(self._history, record, self._covered(call, record), since=link.settled_version)

    def _covered(self, call: Call, record: ReplicaRecord) -> list[Key]:
        """Return the objects that the mode of a call covers."""
        if call.mode is Mode.ALL:
            return list(dict.fromkeys([*self._history.keys, *record.keys]))
        if call.selection is not None:
            return list(call.selection.keys)
        seqs = call.pending_before & record.outcomes.keys()
        return [
            change.key
            for change in self._history.changes
            if change.seq in seqs and str(UUID(bytes=change.replica)) == record.replica_id
        ]

    def _retry(self, device: Device) -> None:
        if self._random.random() < 0.6:
            self._say(f"{device.name} tries again")
            self._attempt(device)
        else:
            self._say(f"{device.name} gives up")
            device.call = None

    def _cut(self, device: Device) -> None:
        if device.call is None or device.call.link is None:
            return
        link = device.call.link
        self._say(f"the link of {device.name} is cut")
        self._leave(device.name, link)
        self._retry(device)

    def _leave(self, name: str, link: Link) -> None:
        """Leave a link to its fate: what is on its way to the server may still arrive."""
        if link.to_server and not link.is_broken:
            self._ghosts.append((name, link))

    def _haunt(self) -> None:
        name, link = self._random.choice(self._ghosts)
        try:
            self._say(f"late, {name}: {link.deliver_to_server()}")
        except ServerGone:
            self._restart_server()
            return
        if link.is_broken or not link.to_server:
            self._ghosts = [one for one in self._ghosts if one[1] is not link]

    def _lose_state(self, device: Device, error: StateLost) -> None:
        self._say(f"{device.name} lost the state of {error}")
        self.states_lost += 1
        device.replica._storage.publication.start_over()
        device.cursor_version = 0
        self._attempt(device)

    def _light_fuse(self, device: Device) -> None:
        device.fuse = (self._random.randrange(4), self._random.random() < 0.5)
        self._say(f"{device.name} will die at a write: {device.fuse}")

    def _light_store_fuse(self) -> None:
        self.store_fuse = self._random.choice(["before", "after", "fail"])
        self._say(f"the store will die: {self.store_fuse}")

    def _crash(self, device: Device) -> None:
        self._say(f"{device.name} is killed")
        self._die(device)

    def _die(self, device: Device) -> None:
        self._say(f"{device.name} dies")
        if device.call is not None and device.call.link is not None:
            self._leave(device.name, device.call.link)
        device.crash()
        self._note_commits(device)
        self._check(device)

    def _restart_server(self) -> None:
        self._say("the server dies and starts again")
        self.store_fuse = None
        self._ghosts = []
        for device in self._devices:
            if device.call is not None and device.call.link is not None:
                device.call.link.is_broken = True
        self._store.close()
        self._store = self._open_store()
        if self._random.random() < 0.3:
            self._deploy()
        self._read_history()

    def _deploy(self) -> None:
        if self._schema_version == 1:
            self._say("the server gets the newer schema")
            self._schema_version = 2
            self._application = make_application(self._weather, schema_version=2)

    def _change_weather(self) -> None:
        self._weather.is_service_down = not self._weather.is_service_down
        self._say(f"the service is {'down' if self._weather.is_service_down else 'up'}")

    def _trim(self, device: Device) -> None:
        if device.call is not None:
            return
        try:
            self._say(f"{device.name} trims {device.trim()} operations")
        except ReplicaDied:
            self._die(device)
        self._check(device)

    # --- the end ------------------------------------------------------------------------

    def _heal(self) -> None:
        self._say("the world heals")
        self.store_fuse = None
        self._weather.is_service_down = False
        self._ghosts = []
        self._deploy()
        for device in self._devices:
            device.fuse = None
            device.call = None
        reports: dict[str, Report] = {}
        for round_ in range(QUIET_ROUNDS_MAX):
            settled = sum(len(self._outcomes(device)) for device in self._devices)
            for device in self._devices:
                reports[device.name] = self._synchronize_to_the_end(device)
            # What is bounded to wait may need more than two rounds, but each must settle something.
            done = settled == sum(len(self._outcomes(device)) for device in self._devices)
            if round_ + 1 >= QUIET_ROUNDS and done:
                break
        else:
            raise AssertionError(f"not quiet after {QUIET_ROUNDS_MAX} rounds")
        self._check_all(reports)

    def _synchronize_to_the_end(self, device: Device) -> Report:
        self._begin(device, Mode.ALL, None)
        call = device.call
        if call is None:
            raise AssertionError(f"{device.name} could not begin")
        self._advance(device, moves=CALL_MOVES_MAX)
        if device.call is not None:
            raise AssertionError(f"{device.name} does not come to an end")
        return call.report

    def _check_all(self, reports: dict[str, Report]) -> None:
        server = self._server_record()
        committed = {device.replica.replica_id: device.committed for device in self._devices}
        promises.check_server(server, committed)
        rules = Rules(references_schema(REFERENCES), may_hooks_refuse)
        for device in self._devices:
            record = device.record()
            promises.check_replica(server, record, device.committed)
            promises.check_groups(server, record.replica_id, device.committed, self.settlements)
            promises.check_settlement_order(record.replica_id, device.committed, self.settlements)
            promises.check_refusals(server, record.replica_id, device.committed, self.settlements, rules)
            not_ready = self._not_ready(reports[device.name])
            if not_ready and self.settings.limits["held_units"] > len(device.committed.data):
                raise AssertionError(f"{device.name}: nothing should have to wait: {reports[device.name].skipped}")
            promises.check_converged_when_quiet(server, record, not_ready)

    # --- helpers ------------------------------------------------------------------------

    def _check(self, device: Device) -> None:
        """Check what must hold at any moment of one replica."""
        self._read_history()
        record = device.record()
        promises.check_log(record, device.committed)
        promises.check_view(self._history, record, device.committed)
        promises.check_versions_shown(record, device.committed)
        promises.check_cursor(self._history, record)
        version = record.cursor.version if record.cursor is not None else 0
        promises.check_cursor_moves_forward(device.cursor_version, version)
        device.cursor_version = version

    def _note_commits(self, device: Device) -> list[Any]:
        """Take over what is new in the log."""
        storage = device.replica._storage
        after = len(device.committed.data)
        found = []
        with storage.environment.read() as transaction:
            for seq in range(after + 1, storage.last_seq(transaction) + 1):
                data = storage.log.get(transaction, seq)
                if data is None:
                    raise AssertionError(f"{device.name}: seq {seq} is missing in the log")
                found.append(device.committed.add(seq, data))
        return found

    def _outcomes(self, device: Device) -> dict[int, Any]:
        return dict(device.record().outcomes)

    def _not_ready(self, report: Report) -> set[int]:
        return {one.seq for one in report.skipped if one.reason is SkipReason.NOT_READY and one.seq is not None}

    def _read_history(self) -> None:
        with self._store.read("default") as reader:
            self._history.read_on(reader)

    def _server_record(self) -> ServerRecord:
        return read_server(
            self._store,
            {device.replica.replica_id: len(device.committed.data) for device in self._devices},
            history=self._history,
        )

    def _open_store(self) -> LmdbStore:
        return LmdbStore(self.directory / "server", map_bytes=self.settings.server_map_bytes)

    def _fused_store(self) -> FusedStore:
        return FusedStore(self, self._store)

    def _clock(self) -> int:
        self._time_us += 1
        return self._time_us

    def _name(self, replica_id: str) -> str:
        return next(device.name for device in self._devices if device.replica.replica_id == replica_id)

    def _say(self, event: str) -> None:
        self.events.append(event)
