"""
A world of replicas and a server, driven from one seed.

Everything that can happen happens one thing at a time, and dice choose what: a local
change, one message on one link, a fault of the network, a crash of either side before or
after any of its commits, a full disk, a clock that jumps; in some worlds a directory that
is copied or put back, and a server's store that is restored. The real client and server
code runs; only the network, the disks, the clocks and the dice are made here. After each
step what holds at any moment is checked; at the end the world heals, and all replicas must
agree with the server within a few synchronizations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock
from uuid import UUID

import grpc
from tests.simulation import chance, copies, disk, promises, removals
from tests.simulation.actions import IDS, fits, pick_contended
from tests.simulation.application import ENTITIES, Weather, make_application, may_hooks_refuse
from tests.simulation.applied import Account, check_applied
from tests.simulation.applied import Commit as Committal
from tests.simulation.audience import Audience
from tests.simulation.bounds import check_page
from tests.simulation.device import Aside, Attempt, Call, Device, Model, ReplicaDied
from tests.simulation.disk import Disk, Trap
from tests.simulation.exchange import FileLink, Turns
from tests.simulation.faults import (
    CLIENT_COMMITS,
    SERVER_COMMITS,
    SERVER_FILE_COMMITS,
    Commit,
    Coverage,
    Fault,
    Moment,
)
from tests.simulation.fiber import Fiber
from tests.simulation.file_happenings import CALL_MOVES_MAX, FILE_TRAPS_SHARE, STALL_STEPS_MAX, YEAR, FileHappenings
from tests.simulation.link import Link, ServerGone
from tests.simulation.model import Key
from tests.simulation.privacy import Listener
from tests.simulation.promises import PromiseBroken, Rules
from tests.simulation.records import History, ReplicaRecord, ServerRecord, read_server
from tests.simulation.rights import Eyes
from tests.simulation.server import Backup, SimulatedServer
from tests.simulation.settings import Settings
from tests.simulation.third_party import ThirdParty
from tests.simulation.witness import Witness

from tidelog import (
    FailureReason,
    FileUnavailable,
    InvalidValue,
    MassRemoval,
    ObjectExists,
    ObjectNotFound,
    Operation,
    OperationKind,
    ReplicaRetired,
    ServerUnavailable,
    StorageError,
    SynchronizationInProgress,
    TidelogError,
    Unauthenticated,
)
from tidelog._operation import decode_operation
from tidelog.internal.v1 import splice_pb2
from tidelog.testing import ManualClock
from tidelog_client import Object, Report, SkipReason, _replica
from tidelog_client._file_exchange import FileExchange
from tidelog_client._publication import Publication
from tidelog_client._report import PublishedCounts
from tidelog_client._selection import Selection, select
from tidelog_client._storage import Storage
from tidelog_client._synchronization import Mode
from tidelog_client._synchronizer import Synchronizer
from tidelog_client._upload import FilePlan
from tidelog_client._view import StateLost
from tidelog_server import OperationRefused, TransientError
from tidelog_server._principal import DEFAULT_TENANT
from tidelog_server._records import Change
from tidelog_server._tenant import Tenant

STEPS_DEFAULT: Final = 100

# A replica that synchronizes everything twice has all that the others uploaded by then; what is bounded to wait on the
# server may need more rounds, but each of these must settle something.
QUIET_ROUNDS: Final = 2
QUIET_ROUNDS_MAX: Final = 12
HASTY_MOVES: Final = 100
BEGINNING_MOVES: Final = 2
# A trap at a commit that comes seldom waits for it; it takes many of them to meet all.
SELDOM: Final = frozenset(
    (Commit.UNSTAGE, Commit.UNSTAGE_MERGE, Commit.PUBLISH_STEP, Commit.PUBLISHING, Commit.PUBLISH)
)
DEVICES_MAX: Final = 5
ASIDES_MAX: Final = 4
SET_BACK_ACTIONS: Final = 6
MONTH: Final = timedelta(days=31)
BACKUPS_MAX: Final = 3
# What is noted by the way of a copy or a restore takes attempts of its own.
COPIES_ATTEMPTS_MAX: Final = 5
TRAP_WEIGHTS: Final = [4 if commit in SELDOM else 1 for commit in CLIENT_COMMITS]
ADOPTING: Final = (Commit.NOTE, Commit.MIGRATION, Commit.INDEXES)
COLLECTING: Final = (Commit.COLLECT, Commit.COLLECT_OUTCOMES, Commit.COLLECT_INDEX, Commit.RETIRE)
BEGINNING: Final = datetime(2027, 1, 15, 8, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
STEP_SECONDS: Final = 0.001
# How often who was asked says yes the next time.
AGREEING: Final = 0.3
# How often a user works between two steps of a publication.
BUSY_SHARE: Final = 0.3
# Longer than the synchronizer goes on trying while it hears nothing.
SILENCE_SECONDS: Final = 20.0
# How often a content moves on while a session does.
BESIDE_SHARE: Final = 0.3


class World(FileHappenings):
    """
    Replicas, a server, and what happens to them.

    Attributes:
        events: All that happened, in words.
        coverage: The count of it.
        witness: Who knows what became of contents. None: there are no files.

    Args:
        seed: Decides everything.
        directory: An empty directory for the data.
        steps: How many things happen before the world heals.
        focus: How much more often than usual things of a kind happen.
    """

    def __init__(
        self, seed: int, directory: Path, *, steps: int = STEPS_DEFAULT, focus: Mapping[str, float] | None = None
    ) -> None:
        self.seed = seed
        self.events: list[str] = []
        self.coverage = Coverage()
        self._random = Random(seed)
        self._steps = steps
        self._focus = focus or {}
        settings = Settings.drawn(self._random, copies_focus=self._focus.get("copies", 1.0))
        settings = settings.with_files(Random(f"{seed} files"))
        settings = settings.with_guard(Random(f"{seed} guard"))
        contention = self._focus.get("contention", 1.0)
        self.settings = settings.with_contention(Random(f"{seed} contention"), focus=contention)
        self.coverage.settings.update(self.settings.business.names())
        if self.settings.business.is_contended:
            self.coverage.settings["contention"] += 1
        if self.settings.has_third_party:
            self.coverage.settings["third party"] += 1
        if self.settings.has_copies:
            self.coverage.settings["copies and restores"] += 1
        files = self.settings.files
        self.witness = Witness(files.bytes_max) if files is not None else None
        if files is not None:
            self.coverage.settings.update(files.names())
        self._directory = directory.resolve()
        self._weather = Weather()
        self._schema_version = 1
        self._server_clock = ManualClock(BEGINNING)
        self._history = History()
        self._devices: list[Device] = []
        self._acting: Device | None = None
        # The replica that is being opened.
        self._opening: Storage | None = None
        self._is_healing = False
        # Who looks at what a replica shows while a download comes into its view.
        self._audience: Audience | None = None
        # Links that were left, whose messages may still arrive, and the number of the stream that each was.
        self._ghosts: list[tuple[Device, Link]] = []
        self._file_ghosts: list[FileLink] = []
        self._third_party: ThirdParty | None = None
        self._asides: list[Aside] = []
        self._backups: list[Backup] = []
        self._copy_count = 0
        # What the store was before it was put back, and the failures that it had.
        self._past_lives: list[History] = []
        self._restored_at: list[int] = []
        # Whether the store ever became what it had been before another backup was put back: then what replicas were
        # told in between is of a life beside that one, and the store may know of other outcomes.
        self._has_gone_aside = False
        self._former_failures: set[bytes] = set()
        # All operations that anybody ever committed, by nonce.
        self._ledger: dict[int, bytes] = {}
        self._commits: dict[int, Committal] = {}
        # The nonces of each log that is gone since another one was put in its place.
        self._former_logs: list[frozenset[int]] = []
        # What devices knew to be settled when the store was put back, by nonce: the failures' ids.
        self._acknowledged: dict[str, dict[int, str]] = {}
        self._disks: dict[Path, Disk] = {}

    def run(self) -> None:
        """Let things happen, then heal, then check everything. Raises AssertionError or whatever went wrong."""
        settings = self.settings
        self._server: SimulatedServer
        with (
            settings.applied(),
            chance.from_seed(Random(f"{self.seed} ids"), self),
            mock.patch.object(_replica, "select", self._recorded(select)),
            mock.patch.object(Publication, "publish", self._in_steps(self._judged(Publication.publish))),
            mock.patch.object(Publication, "merge", self._in_steps(Publication.merge)),
            mock.patch.object(Publication, "finish", self._in_steps(Publication.finish)),
            mock.patch.object(Synchronizer, "go_on", self._opened(Synchronizer.go_on)),
            mock.patch.object(FileExchange, "prepare", self._noted(FileExchange.prepare)),
            mock.patch.object(Report, "end_session", self._ticked_off(Report.end_session)),
        ):
            self._server = SimulatedServer(
                self._directory / "server",
                make_application(self._weather, schema_version=1, business=settings.business),
                self.coverage,
                settings.periods,
                self._clock,
                map_bytes=settings.server_map_bytes,
                file_bytes_max=None if settings.files is None else settings.files.bytes_max,
            )
            self._server.adopt()
            self._devices = [self._device(number) for number in range(settings.replica_count)]
            self._third_party = self._other_client() if settings.has_third_party else None
            self._disks |= {one.path: one.disk for one in self._devices}
            self._disks[self._directory / "server"] = self._server.disk
            with disk.inserted(self._disks, lambda: self.time_us() / 1e6):
                try:
                    for device in self._devices:
                        self._open(device)
                    if self.witness is not None and self._random.random() < FILE_TRAPS_SHARE:
                        self._server.disk.trap = Trap(Fault.SERVER_CRASH, 0, Commit.UPLOAD, self._moment())
                    for _ in range(self._steps):
                        self._step()
                    self._heal()
                finally:
                    for device in self._devices:
                        if hasattr(device, "replica"):
                            device.die()
                    self._server.close()
                    if self._third_party is not None:
                        self._third_party.close()
                if self.witness is not None:
                    self._verify(self.witness)

    @property
    def fingerprint(self) -> str:
        """What stands for all that happened: it depends on the seed only."""
        digest = hashlib.sha256("\n".join(self.events).encode())
        for change in self._history.changes:
            digest.update(repr(change).encode())
        return digest.hexdigest()

    # --- clocks, as the product asks for them -----------------------------------------------

    def time_us(self) -> int:
        """See `chance.Clocks`."""
        jump = self._acting.clock_jump if self._acting is not None else timedelta(0)
        return self._server_clock() + jump // MICROSECOND

    def monotonic(self) -> float:
        """See `chance.Clocks`."""
        return self._acting.seconds if self._acting is not None else 0.0

    def sleep(self, seconds: float) -> None:
        """See `chance.Clocks`."""
        if self._acting is not None:
            self.pause(self._acting, seconds)

    # --- the network, as devices see it -----------------------------------------------------

    def connect(self, device: Device) -> Link:
        """See `Network`."""
        call = device.call
        if call is None or not call.fiber.is_running:
            raise PromiseBroken("One at a time: a second synchronization fails at once", [device.name])
        server = self._server.end(device.eyes.principal, self._clock)
        link = Link(
            server,
            call.fiber.pause,
            lambda: self._server.has_died,
            lambda answer: self._overhear(listener, answer),
        )
        call.link = link
        device.sessions.append(link)
        selection, call.selected = call.selected, None
        pending = (one.seq for one in device.replica._storage.pending(until=call.prepared_at))
        covered = frozenset(pending if selection is None else selection.seqs)
        call.attempt = Attempt(link, self._history.lives, selection, covered)
        listener = self._listener(device, call, link, selection)
        self.coverage.totals["streams"] += 1
        if device.has_stale_token:
            device.has_stale_token = False
            self.coverage.faults[Fault.TOKEN_REFUSED.name] += 1
            link.break_off(grpc.StatusCode.UNAUTHENTICATED, "the token has expired", "UNAUTHENTICATED")
        return link

    def _overhear(self, listener: Listener, answer: bytes) -> None:
        self._read_history()
        check_page(answer)
        listener.hear(answer)

    def _listener(self, device: Device, call: Call, link: Link, selection: Selection | None) -> Listener:
        """Return one who listens to what the server says in a session that begins."""
        cursor, sessions = device.replica._storage.meta("cursor"), device.sessions
        known = int(splice_pb2.Cursor.FromString(cursor).version) if cursor else None
        if call.mode is not Mode.ALL or not self._is_current(device):
            known = 0

        def since() -> int:
            if known is not None:
                return known
            # Nothing was told yet but by this session, and by those of which pages are staged.
            links: list[Link] = [link, *sessions] if link.started.resumed else [link]
            return min(one.settled_version for one in links)

        asked = None if selection is None else set(selection.keys)
        schema = self.settings.business.schema(2)
        return Listener(device.eyes, device.seen, self._history, device.committed, schema, asked, since)

    def pause(self, device: Device, seconds: float) -> None:
        """See `Network`."""
        call = device.call
        if call is None:
            raise AssertionError(f"{device.name} sleeps, and nobody asked for it")
        call.link, call.is_asleep = None, True
        call.fiber.pause()
        device.seconds += seconds

    def _recorded(self, work_out: Callable[..., Selection]) -> Callable[..., Selection]:
        def recorded(*arguments: Any) -> Selection:
            selected = work_out(*arguments)
            if self._acting is not None and self._acting.call is not None:
                self._acting.call.selected = selected
            return selected

        return recorded

    def _noted(self, prepare: Callable[..., FilePlan]) -> Callable[..., FilePlan]:
        """Return *prepare* with somebody who notes what there is to be uploaded by then."""

        def noted(*arguments: Any) -> FilePlan:
            # Of a synchronization that should not have begun `connect` tells.
            if self._acting is not None and self._acting.call is not None:
                self._acting.call.prepared_at = len(self._acting.committed.data)
            return prepare(*arguments)

        return noted

    def _ticked_off(self, end_session: Callable[[Report], None]) -> Callable[[Report], None]:
        """Return *end_session* with somebody who notes which attempt came to its end."""

        def ticked_off(report: Report) -> None:
            if self._acting is not None and self._acting.call is not None:
                self._acting.call.completed = self._acting.call.attempt
            end_session(report)

        return ticked_off

    def _judged(self, publish: Callable[..., PublishedCounts]) -> Callable[..., PublishedCounts]:
        """Return *publish* with somebody who looks on: was anybody to be asked?"""

        def judged(*arguments: Any, **options: Any) -> PublishedCounts:
            device = self._acting
            if device is None or (call := device.call) is None or (attempt := call.attempt) is None:
                raise AssertionError("a download is published, and nobody asked for it")
            before = device.record()
            expected = self._loss(device, attempt.link, before)
            if attempt.life != self._history.lives:
                return publish(*arguments, **options)  # the store that sent all this is gone
            try:
                counts = publish(*arguments, **options)
            except MassRemoval as error:
                removals.check_refused(expected, error, before, device.record(), has_consent=call.has_consent)
                raise
            device.sessions.clear()
            if not call.has_consent:
                removals.check_adopted(expected, device.record())
            elif any(expected.is_mass(entity, len(keys)) for entity, keys in expected.surely.items()):
                self.coverage.totals["mass removals agreed to"] += 1
            return counts

        return judged

    def _opened(self, go_on: Callable[[Synchronizer], None]) -> Callable[[Synchronizer], None]:
        """Return *go_on* with somebody who knows of which replica: its device has it once it is open."""

        def opened(synchronizer: Synchronizer) -> None:
            self._opening = synchronizer._storage
            try:
                go_on(synchronizer)
            finally:
                self._opening = None

        return opened

    def _in_steps(self, publish: Callable[..., PublishedCounts]) -> Callable[..., PublishedCounts]:
        """Return *publish* with somebody who looks at what shows between its steps, and works on it."""

        def in_steps(publication: object, *arguments: Any, **options: Any) -> PublishedCounts:
            if self._acting is None or self._audience is not None:
                return publish(publication, *arguments, **options)  # See `connect`; it is looked at already.
            device = self._acting
            storage = self._opening or device.replica._storage
            self._audience = audience = Audience(storage)
            write = storage.environment.write

            def look(work: Callable[..., Any]) -> Any:
                if not audience.is_looking:
                    return write(work)
                audience.check()
                result = write(work)
                audience.look()
                is_free = audience.sees_nothing_new and storage is not self._opening and not self._is_healing
                if is_free and self._random.random() < BUSY_SHARE:
                    with audience.looking_away():
                        audience.take_in(self._use(device))
                return result

            try:
                with mock.patch.object(storage.environment, "write", look):
                    counts = publish(publication, *arguments, **options)
            except (TidelogError, StateLost):
                audience.check()
                raise
            finally:
                self._audience = None
            return counts

        return in_steps

    def _loss(self, device: Device, link: Link, record: ReplicaRecord) -> removals.Loss:
        """Return what a download takes away that has just come to its end."""
        self._read_history()
        is_rebasing = device.replica._storage.lineage.is_rebasing
        reconciled = removals.Reconciled(link.started, is_rebasing, had_cursor=record.cursor is not None)
        # What was kept of earlier ones was the server's state when they came.
        since = min(one.settled_version for one in (device.sessions if link.started.resumed else [link]))
        storage = device.replica._storage
        with storage.environment.read() as transaction:
            seqs = [seq for seq, _ in storage.lineage.waiting(transaction)]
        operations = [decode_operation(record.log[seq]) for seq in seqs]
        waiting = [one.key for one in operations if one.kind is OperationKind.CREATE]
        unasked_max = self.settings.limits["removed_unasked"]
        return removals.loss(
            reconciled, record, device.eyes, self._history, since, waiting=waiting, unasked_max=unasked_max
        )

    # --- what can happen ----------------------------------------------------------------

    def _step(self) -> None:
        random = self._random
        device = random.choice(self._devices)
        active = [one for one in self._devices if one.call is not None]
        linked = [one for one in active if one.call is not None and one.call.link is not None]
        for one in self._devices:
            one.seconds += STEP_SECONDS
        happenings: list[tuple[str, float, Callable[[], None]]] = [
            ("act", 6.0, lambda: self._act(device)),
            ("synchronize", 4.0 if device.call is None else 0.2, lambda: self._call(device)),
            ("advance", 16.0 if active else 0.0, lambda: self._advance(random.choice(active))),
            ("fault", 1.3 if linked else 0.0, lambda: self._fault(random.choice(linked))),
            ("burst", 1.5 if linked else 0.0, self._burst),
            ("service", 0.8, self._write_as_service),
            ("third party", 2.0 if self._third_party is not None else 0.0, self._act_as_third_party),
            ("late", 3.0 if any(link.to_server for _, link in self._ghosts) else 0.0, self._haunt),
            ("kill", 0.4, lambda: self._kill(device)),
            ("trap", 0.9, lambda: self._lay_trap(device)),
            ("server trap", 0.6, self._lay_server_trap),
            ("restart", 0.2, lambda: self._restart_server(Fault.SERVER_RESTART)),
            ("weather", 0.3, self._change_weather),
            ("trim", 0.5, lambda: self._trim(device)),
            ("clock", 0.3, lambda: self._jump(device)),
            ("token", 0.2, lambda: self._expire(device)),
            (
                "wishes",
                1.5 if any(one.has_staged_pages for one in self._devices) else 0.4,
                lambda: self._change_wishes(device),
            ),
            ("collect", 0.4, self._collect),
        ]
        if self.settings.has_copies:
            happenings += [
                ("copy", 0.8 if len(self._devices) < DEVICES_MAX else 0.0, lambda: self._copy_device(device)),
                ("put aside", 0.8, lambda: self._put_aside(device)),
                ("put back", 1.2 if self._asides else 0.0, lambda: self._put_back(device)),
                ("relapse", 2.0 if device.is_new_with_work else 0.0, lambda: self._relapse(device)),
                ("back up", 0.8, self._back_up),
                ("restore", 0.8 if self._backups else 0.0, self._restore),
                ("set back", 0.15 if device.call is None else 0.0, lambda: self._set_back(device)),
            ]
        if self.witness is not None:
            happenings += self._happenings_with_files(self.witness, device)
        weights = [weight * self._focus.get(name, 1.0) for name, weight, _ in happenings]
        random.choices(happenings, weights)[0][2]()

    def _act(self, device: Device) -> None:
        self._acting = device
        try:
            self._use(device)
        except ReplicaDied:
            self._die(device)
            return
        finally:
            self._acting = None
        self._check(device)

    def _use(self, device: Device) -> list[Operation]:
        """Let the user of a device commit something; return what was logged."""
        device.disk.has_failed = False
        try:
            what, intended, is_grouped = device.user.act()
        except StorageError as error:
            if not device.disk.has_failed:
                raise
            what, intended, is_grouped = f"could not act: {type(error).__name__}", [], False
        operations = self._note_commits(device)
        self._say(f"{device.name} {what}")
        if len(operations) != len(intended) or not all(
            fits(operation, one, is_grouped=is_grouped) for operation, one in zip(operations, intended, strict=True)
        ):
            raise PromiseBroken(
                "Durable: a commit logs what was meant", [f"{device.name} logged {operations}, meant {intended}"]
            )
        return operations

    def _call(self, device: Device) -> None:
        random = self._random
        mode = random.choices([Mode.ALL, Mode.UNSYNCHRONIZED, Mode.SELECTED], [5, 3, 3])[0]
        if device.call is not None and device.call.mode is None:
            return
        picked = device.user.pick_keys() if mode is Mode.SELECTED else []
        timeout = random.choice([None, None, 0.5, 60.0])
        if device.call is not None:
            self._call_again(device, mode, picked)
            return
        self._begin(device, mode, picked, timeout, has_consent=mode is Mode.ALL and self._agrees(device))
        if self.settings.is_hasty:
            self._advance(device, moves=HASTY_MOVES)

    def _call_again(self, device: Device, mode: Mode, picked: list[Object | Key]) -> None:
        try:
            device.synchronization(mode, picked, None)()
        except SynchronizationInProgress:
            self.coverage.faults[Fault.TWO_AT_ONCE.name] += 1
            self._say(f"{device.name} is synchronized already")
        else:
            raise PromiseBroken("One at a time: a second synchronization fails at once", [device.name])

    def _begin(
        self, device: Device, mode: Mode, picked: list[Object | Key], timeout: float | None, *, has_consent: bool
    ) -> None:
        keys = [(one.entity, one.id) if isinstance(one, Object) else one for one in picked]
        self._say(f"{device.name} synchronizes {mode.name} {keys or ''}")
        if device.replica._synchronizer._schema_version > self._schema_version:
            self.coverage.faults[Fault.ROLLOUT.name] += 1
        call = Call(mode, device.replica.pending_count(), len(device.committed.data), has_consent)
        synchronize = device.synchronization(mode, picked, timeout, accepts_removal=has_consent)

        def work() -> None:
            call.report = synchronize()

        self._start(device, call, work)

    def _agrees(self, device: Device) -> bool:
        """Tell whether a device's program agrees that most of an entity goes: at once, or after it was asked."""
        if not self.settings.has_copies:
            return False
        return self.settings.consents_at_once or (device.is_asked and self._random.random() < AGREEING)

    def _start(self, device: Device, call: Call, work: Callable[[], None]) -> None:
        call.fiber = Fiber(work)
        device.call = call
        self._resume(device)

    def _resume(self, device: Device) -> None:
        """Let a device's synchronizer go on, as far as it comes."""
        call = device.call
        if call is None:
            return
        call.is_asleep = False
        former, self._acting = call.link, device
        call.fiber.resume()
        self._acting = None
        if former is not None and former.is_left:
            self._leave(device, former)
            if call.link is former:
                call.link = None
        if call.fiber.is_done:
            self._ended(device, call)

    def _take_turns(self, device: Device, turns: Turns) -> None:
        """Let the workers of a device go on while its synchronizer waits for something else."""
        self._acting = device
        while turns.take_turn():
            pass
        self._acting = None
        if device.disk.is_dead:
            self._die(device)

    def _ended(self, device: Device, call: Call) -> None:
        error, completed = call.fiber.error, call.completed
        self._leave_files(call)
        if isinstance(error, ReplicaDied):
            device.call = None
            self._die(device)
            return
        device.call = None
        if error is None and call.report is not None and completed is not None:
            self._complete(device, call, call.report, completed)
            return
        if call.mode is None and (error is None or isinstance(error, FileUnavailable | ObjectNotFound | InvalidValue)):
            self._say(f"{device.name} has opened a file: {error or len(call.opened)}")
            return
        has_failed, device.disk.has_failed = device.disk.has_failed, False
        if isinstance(error, StorageError) and has_failed:
            self._say(f"{device.name} cannot write: {type(error).__name__}")
        elif isinstance(error, ServerUnavailable | Unauthenticated):
            self._say(f"{device.name} gives up: {error}")
            self.coverage.totals["given up"] += 1
        elif isinstance(error, ReplicaRetired) and error.report is not None and error.report.former_replica_id:
            self._say(f"{device.name} cannot take two new ids at once")
        elif isinstance(error, MassRemoval):
            self._say(f"{device.name} is asked: {error}")
            self.coverage.totals["mass removals asked for"] += 1
            device.is_asked = True
        else:
            raise error or AssertionError(f"{device.name} synchronized without a stream")

    def _advance(self, device: Device, *, moves: int | None = None) -> None:
        for _ in range(moves or self._random.choice([1, 1, 2, 5, 20])):
            call = device.call
            if call is None:
                break
            if call.file_seconds is not None:
                if not self._advance_files(device, call, is_patient=moves is None):
                    break
                continue
            if call.is_asleep or call.link is None:
                self._say(f"{device.name} tries again")
                self._resume(device)
                continue
            if call.is_transferring and self._random.random() < BESIDE_SHARE:
                self._move_beside(device, call)
                continue
            link = call.link
            if link.stalled_steps and moves is None:
                link.stalled_steps -= 1
                break
            possible = link.moves()
            if not possible or (link.is_lost and self._random.random() < 0.2):
                self._give_up_waiting(device, link)
                continue
            self._move(device, link, self._random.choice(possible))
        self._check(device)

    def _give_up_waiting(self, device: Device, link: Link) -> None:
        if not (link.is_dark or link.is_mute):
            raise PromiseBroken("No poison: a session comes to its end", [f"{device.name} waits for ever"])
        self._say(f"{device.name} has heard nothing for long")
        device.seconds += SILENCE_SECONDS
        link.to_client.append(link.silence())
        link.deliver_to_client()
        self._resume(device)

    def _move(self, device: Device, link: Link, move: Callable[[], str]) -> None:
        try:
            what = move()
        except ServerGone:
            self._restart_server(Fault.SERVER_CRASH)
            return
        self._say(f"{device.name} {what}")
        if link.has_arrived:
            self._resume(device)

    def _complete(self, device: Device, call: Call, report: Report, attempt: Attempt) -> None:
        if call.mode is None:
            raise AssertionError("a file was opened, and nothing synchronized")
        self._say(f"{device.name} is done: {report.applied} applied, {report.rejected} rejected")
        self._note_identity(device, report)
        self.coverage.modes[call.mode.name] += 1
        self.coverage.totals["attempts"] += report.attempts
        self._read_history()
        record = device.record()
        committed = len(device.committed.data) - call.committed_before
        settled = call.pending_before + committed - len(record.pending)
        refused = sum(len(failure.group_operations) or 1 for failure in report.failures)
        # Of what was offered again those are counted that became failures by it.
        counted_again = report.applied + report.rejected - settled
        if report.rejected != refused or not 0 <= counted_again <= report.reoffered:
            raise PromiseBroken(
                "Settled once: a report counts what was settled",
                [
                    f"{device.name} reports {report.applied}+{report.rejected}, {settled} were settled",
                    f"and {report.reoffered} again; its failures are about {refused}",
                ],
            )
        # What was offered again, and has become something else by another copy, is that failure no more.
        has_changed_its_mind = report.reoffered and device.is_copied
        if {failure.id for failure in report.failures} - record.failures.keys() and not has_changed_its_mind:
            raise PromiseBroken("Nothing lost on refusal: what is reported is recorded", [device.name])
        if call.mode is Mode.ALL:
            device.see_as_wished()
            device.life = attempt.life
            device.is_asked = False
        if call.mode is Mode.SELECTED:
            # What holds at any moment shows best while a part of the log is settled.
            self._check_everything(device, record)
        promises.check_uploaded(record, attempt.covered, self._not_ready(report))
        if not self._is_current(device):
            return
        seen = device.seen.selected if call.mode is Mode.SELECTED else device.seen
        since = attempt.link.settled_version
        covered = self._covered(device, call.mode, attempt, record)
        promises.check_fresh(seen, record, covered, since=since)

    def _covered(self, device: Device, mode: Mode, attempt: Attempt, record: ReplicaRecord) -> list[Key]:
        """Return the objects that an attempt in a mode covers."""
        if mode is Mode.ALL:
            return list(dict.fromkeys([*self._history.keys, *record.keys]))
        if attempt.selection is not None:
            return list(attempt.selection.keys)
        refused = {seq for seq, outcome in record.outcomes.items() if outcome.failure_id}
        seqs = attempt.covered - record.pending.keys() - refused
        with self._server.lmdb.read(DEFAULT_TENANT) as reader:
            collected = reader.collected()  # of what was changed up to there nobody knows by which operation it was
        ours: dict[Key, list[Change]] = {}
        for change in self._history.changes[collected:]:
            if change.seq in seqs and str(UUID(bytes=change.replica)) == record.replica_id:
                ours.setdefault(change.key, []).append(change)
        known = record.cursor.version if record.cursor is not None else 0
        if known < collected:
            known = 0
        seen, since = device.seen, attempt.link.settled_version

        def is_told(key: Key, changes: list[Change]) -> bool:
            # What is not shown any more is told of as far as the server knows that it was.
            # The rest of it is covered by the next synchronization of everything.
            if not seen.was_absent(key, since):
                return True
            moments = [known, changes[0].version - 1]
            was_shown = any(not seen.was_absent(key, version, version) for version in moments)
            return not device.is_between_wishes and (was_shown or not all(one.by_hook for one in changes))

        return [key for key, changes in ours.items() if is_told(key, changes)]

    # --- others who write -------------------------------------------------------------------

    def _write_as_service(self, keys: list[Key] | None = None, names: str = "x") -> None:
        """Let the service itself change some objects, whichever or certain ones."""
        random = self._random
        if keys is None:
            is_contended = self.settings.business.is_contended
            keys = [
                pick_contended(random) if is_contended else (random.choice(ENTITIES), random.choice(IDS))
                for _ in range(random.choice([1, 1, 2]))
            ]
        server = self._server
        tenant = Tenant(server.application, server.store, DEFAULT_TENANT, None, self._clock, server.files)
        what = "the service writes"
        try:
            files = self._services_files(tenant)
            with tenant.transaction() as transaction:
                for key in dict.fromkeys(keys):
                    if transaction.get(*key) is None:
                        transaction.create(key[0], {"n": random.randint(-5, 5), "title": "service", **files}, key[1])
                    elif random.random() < 0.3:
                        transaction.delete(*key)
                    else:
                        values = {name: random.randint(0, 3) for name in names}
                        transaction.update(*key, {**values, **files}, increment={"n": 1})
        except (OperationRefused, ObjectExists, ObjectNotFound, InvalidValue, TransientError, StorageError) as error:
            if self._server.has_died:
                self._restart_server(Fault.SERVER_CRASH)
                return
            what = f"the service is refused: {error}"
        self._say(f"{what} {keys}")
        self._read_history()

    def _act_as_third_party(self) -> None:
        if (party := self._third_party) is None:
            return
        random = self._random
        happening: Callable[[], str] = random.choices(
            [
                party.act,
                lambda: self._upload_of_third_party(party, is_answer_lost=random.random() < 0.2),
                lambda: party.download(self._server),
            ],
            [3, 2, 1],
        )[0]
        try:
            self._say(happening())
        except (StorageError, TransientError) as error:
            if self._server.has_died:
                self._restart_server(Fault.SERVER_CRASH)
                return
            self._say(f"the third party is told to come again: {type(error).__name__}")
        self._ledger.update((one.nonce, party.committed.data[seq]) for seq, one in party.committed.operations.items())
        self._commits.update(
            (one.nonce, Committal(one, party.eyes, is_translated=False)) for one in party.committed.operations.values()
        )
        self._read_history()

    def _upload_of_third_party(self, party: ThirdParty, *, is_answer_lost: bool) -> str:
        if self.settings.has_copies:
            self._say(party.download(self._server))
        return party.upload(self._server, is_answer_lost=is_answer_lost)

    # --- copies and restores ----------------------------------------------------------------

    def _note_identity(self, device: Device, report: Report) -> None:
        if report.former_replica_id:
            self._say(f"{device.name} goes on under another id than {report.former_replica_id}")
            self.coverage.totals["forks"] += 1
        if report.server_restored:
            self._say(f"{device.name} has offered {report.reoffered} operations again")
            self.coverage.totals["rebases"] += 1
            self.coverage.totals["offered again"] += report.reoffered

    def _next_copy(self, what: str) -> Path:
        """Return where the next copy is kept: beside the directories that are in use."""
        self._copy_count += 1
        directory = self._directory / "copies"
        directory.mkdir(exist_ok=True)
        return directory / f"{what} {self._copy_count}"

    def _copy_device(self, device: Device) -> None:
        """Let a second device go on with a copy of a directory, whatever is under way there."""
        aside = device.put_aside(self._next_copy("second of"))
        number = len(self._devices)
        second = Device(
            f"r{number}",
            self._directory / f"r{number}",
            aside.model,
            aside.eyes,
            self._history,
            self,
            self.coverage,
            Random(self._random.random()),
        )
        self._disks[second.path] = second.disk
        self._devices.append(second)
        self._say(f"{second.name} is a copy of {device.name}")
        self.coverage.faults[Fault.COPIED.name] += 1
        second.put_back(aside)
        self._lay_traps(Commit.FORK, (device, second))
        self._open(second)
        self._check(second)

    def _put_aside(self, device: Device) -> None:
        self._say(f"the directory of {device.name} is put aside")
        self._asides = [*self._asides, device.put_aside(self._next_copy("aside of"))][-ASIDES_MAX:]

    def _put_back(self, device: Device, aside: Aside | None = None) -> None:
        """Put a copy, whichever or a certain one, in the place of a directory: what was done there since is gone."""
        aside = aside or self._random.choice(self._asides)
        self._say(f"{aside.path.name} is put back as {device.name}")
        self.coverage.faults[Fault.PUT_BACK.name] += 1
        call = device.call
        link = call.link if call is not None else None
        device.die()
        if call is not None:
            self._leave_files(call)
        if link is not None:
            self._leave(device, link)
        self._former_logs.append(frozenset(device.nonces))
        device.put_back(aside)
        self._lay_traps(Commit.FORK, [device])
        self._open(device)
        self._note_commits(device)
        self._check(device)

    def _relapse(self, device: Device) -> None:
        """
        Put a directory back to what it was before its first synchronization, which the server has forgotten.

        What it creates is there, nobody can tell whether by this very operation, and it gets no state of it.
        """
        self._put_aside(device)
        aside = self._asides[-1]
        self._begin(device, Mode.ALL, [], None, has_consent=self._agrees(device))
        self._advance(device, moves=HASTY_MOVES)
        self._server_clock.advance(MONTH)
        self._forget()
        self._put_back(device, aside)
        device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, Commit.START_OVER, self._moment())
        self._begin(device, Mode.ALL, [], None, has_consent=self._agrees(device))
        self._advance(device, moves=HASTY_MOVES)

    def _back_up(self) -> None:
        is_raw = self._random.random() < 0.5
        self._read_history()
        backup = self._server.back_up(self._next_copy("backup"), self._history, is_raw=is_raw)
        self._say(f"the server's store is kept as {backup.path.name}{' behind its back' if is_raw else ''}")
        self._backups = [*self._backups, backup][-BACKUPS_MAX:]

    def _set_back(self, device: Device) -> None:
        """Let the server lose what a device has just done, and acknowledged."""
        for is_to_be_lost in (False, True):
            if is_to_be_lost:
                self._back_up()
            for _ in range(SET_BACK_ACTIONS):
                self._act(device)
            if device.call is None:
                self._begin(device, Mode.ALL, [], None, has_consent=self._agrees(device))
                self._advance(device, moves=HASTY_MOVES)
        self._restore(self._backups[-1])

    def _restore(self, backup: Backup | None = None) -> None:
        """Put a backup, whichever or a certain one, in the place of the store: what was applied since is gone."""
        backup = backup or self._random.choice(self._backups)
        self._read_history()
        check_applied(self._account)
        self._past_lives.append(self._history.copy())
        self._former_failures |= {one.failure_id for one in self._server.chronicle.marks.values() if one.failure_id}
        known, kept = self._server.chronicle.marks, {one.nonce for one in backup.chronicle.marks.values()}
        self._has_gone_aside |= any(known.get(place) != one for place, one in backup.chronicle.marks.items())
        self._history.become(backup.history)
        for device in self._devices:
            outcomes, operations = device.record().outcomes, device.committed.operations
            told = {operations[seq].nonce: outcome.failure_id for seq, outcome in outcomes.items()}
            acknowledged = {**self._acknowledged.get(device.name, {}), **told}
            # What the backup has is not offered again.
            self._acknowledged[device.name] = {nonce: one for nonce, one in acknowledged.items() if nonce not in kept}
        self._restored_at.append(backup.history.version)
        self._lay_traps(self._random.choice([Commit.REBASE, Commit.KEEP]), self._devices)
        since = backup.history.version
        edits = [one for one in self._past_lives[-1].changes if one.kind is OperationKind.UPDATE and not one.by_hook]
        lost = list(dict.fromkeys(one.key for one in edits if one.version > since))
        self._restart_server(Fault.SILENTLY_RESTORED if backup.is_raw else Fault.RESTORED, backup)
        if lost and self._random.random() < 0.7:
            # Before those who did it offer it again.
            self._write_as_service(self._random.sample(lost, min(2, len(lost))), "xyz")

    def _lay_traps(self, commit: Commit, devices: Iterable[Device]) -> None:
        """Let some of the devices die where they note what is about to come."""
        for device in devices:
            if self._random.random() < 0.3:
                device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, commit, self._moment())

    def _is_current(self, device: Device) -> bool:
        """Tell whether a replica has what it has from the server's store as it is now."""
        return device.life == self._history.lives

    def _knows_outcomes(self, device: Device) -> bool:
        """Tell whether nobody has settled otherwise, or in doubt, what the replica believes to be settled."""
        doubted = self._server.chronicle.doubted
        return (
            not self._has_gone_aside
            and not (device.is_copied and self._history.lives)
            and doubted.isdisjoint(device.nonces)
        )

    # --- faults of the network ------------------------------------------------------------

    def _fault(self, device: Device) -> None:
        if device.call is None or device.call.link is None:
            return
        link, random = device.call.link, self._random
        # Elsewhere nothing comes again that is forgotten. See `_collect`.
        may_repeat = self.settings.has_copies or not link.is_outdated
        fault = random.choices(
            [
                Fault.CUT,
                Fault.DELAY,
                Fault.SLOW_CONSUMER,
                Fault.DUPLICATE,
                Fault.BLACK_HOLE,
                Fault.HALF_OPEN,
            ],
            [8, 2, 1, 2 * self._focus.get("duplicate", 1.0) * may_repeat, 2, 2],
        )[0]
        self._say(f"{fault.name} on the link of {device.name}")
        self.coverage.faults[fault.name] += 1
        match fault:
            case Fault.CUT:
                self._cut(device, link)
            case Fault.DUPLICATE:
                server = self._server.end(device.eyes.principal, self._clock)
                self._ghosts.append((device, link.echo(server)))
            case Fault.BLACK_HOLE:
                link.is_dark = True
                self._drop(link.to_server, link.to_client)
            case Fault.HALF_OPEN:
                link.is_mute = True
                self._drop(link.to_client)
            case Fault.SLOW_CONSUMER:
                self._fill(device, link)
                link.stalled_steps = random.randint(1, STALL_STEPS_MAX)
            case _:
                link.stalled_steps = random.randint(1, STALL_STEPS_MAX)

    def _cut(self, device: Device, link: Link) -> None:
        """Break a link. What was under way may be lost, or come late."""
        if device.has_staged_merge and self._random.random() < 0.5:
            device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, Commit.UNSTAGE_MERGE, self._moment())
        if self._random.random() < 0.5:
            self._drop(link.to_client)
        if self._random.random() < 0.4:
            self._drop(link.to_server)
        link.break_off(grpc.StatusCode.UNAVAILABLE, "the link is cut", still_arrives=True)

    def _drop(self, *queues: Any) -> None:
        for queue in queues:
            if queue:
                self.coverage.faults[Fault.DROP.name] += 1
            queue.clear()

    def _fill(self, device: Device, link: Link) -> None:
        """Let the server send as long as it may to somebody who does not read."""
        while device.call is not None and device.call.link is link and link.read_page in link.moves():
            self._move(device, link, link.read_page)

    def _leave(self, device: Device, link: Link) -> None:
        """Leave a link to its fate: what is on its way to the server may still arrive."""
        if not link.is_spent:
            self._ghosts.append((device, link))

    def _haunt(self) -> None:
        device, link = self._random.choice([one for one in self._ghosts if one[1].to_server])
        if device.call is not None and device.call.link is not None:
            self.coverage.faults[Fault.REORDER.name] += 1
        try:
            self._say(f"late, {device.name}: {link.deliver_to_server()}")
        except ServerGone:
            self._restart_server(Fault.SERVER_CRASH)
            return
        self._ghosts = [one for one in self._ghosts if not one[1].is_spent]

    def _burst(self) -> None:
        """Let batches of several links arrive while the store is busy: it commits them together."""
        for device in self._devices:
            self._bring_to_batches(device)
        links = [
            (one.name, one.call.link) for one in self._devices if one.call is not None and one.call.link is not None
        ]
        links += [(f"late, {device.name}", link) for device, link in self._ghosts]
        taking = [(name, link) for name, link in links if link.next_to_server == "batch" and not link.is_spent]
        if not taking:
            return
        with self._server.together():
            answers = [
                (name, link.submit_batch())
                for name, link in taking
                for _ in range(self._random.randint(1, link.batches_under_way))
            ]
        if len(answers) > 1:
            self.coverage.faults[Fault.BURST.name] += 1
        for name, answer in answers:
            try:
                self._say(f"{name}: {answer()}")
            except ServerGone:
                self._restart_server(Fault.SERVER_CRASH)
                return
        self._ghosts = [one for one in self._ghosts if not one[1].is_spent]

    def _bring_to_batches(self, device: Device) -> None:
        """Let a session that has just begun come as far as its first batches."""
        for _ in range(BEGINNING_MOVES):
            link = device.call.link if device.call is not None else None
            if link is None or link.next_to_server == "batch" or link.stalled_steps:
                return
            moves = [one for one in link.moves() if one != link.read_page]
            if not moves or link.next_to_server not in {"start", ""}:
                return
            self._move(device, link, moves[0])

    # --- faults of processes, disks and clocks ------------------------------------------------

    def _kill(self, device: Device) -> None:
        self._say(f"{device.name} is killed")
        self.coverage.faults[Fault.CLIENT_KILLED.name] += 1
        self._die(device)

    def _die(self, device: Device) -> None:
        self._say(f"{device.name} dies")
        call = device.call
        link = call.link if call is not None else None
        device.die()
        if call is not None:
            self._leave_files(call)
        if link is not None:
            self._leave(device, link)
        if self._random.random() < 0.1:
            # What is opened again after a crash may crash at once.
            device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, None, self._moment())
        self._open(device)
        self._note_commits(device)
        self._check(device)

    def _open(self, device: Device) -> None:
        self._acting = device
        try:
            device.open()
        except ReplicaDied:
            device.open()
        finally:
            self._acting = None
        self.coverage.totals["replicas opened"] += 1

    def _lay_trap(self, device: Device) -> None:
        fault = self._random.choices(
            [Fault.CLIENT_CRASH, Fault.CLIENT_DISK_FULL, Fault.CLIENT_MAP_FULL, Fault.CLIENT_WRITE_FAILED],
            [6, 1, 1, 1],
        )[0]
        if self.witness is not None and self._random.random() < FILE_TRAPS_SHARE:
            self._lay_file_trap(device)
            return
        commit = self._random.choices(CLIENT_COMMITS, TRAP_WEIGHTS)[0] if self._random.random() < 0.5 else None
        passed = self._random.randrange(4) if commit is None else self._random.choice([0, 0, 1])
        device.disk.trap = Trap(fault, passed, commit, self._moment())
        self._say(f"{device.name} will meet {device.disk.trap}")

    def _lay_server_trap(self) -> None:
        fault = self._random.choices(
            [Fault.SERVER_CRASH, Fault.SERVER_DISK_FULL, Fault.SERVER_MAP_FULL, Fault.SERVER_WRITE_FAILED],
            [6, 1, 1, 2],
        )[0]
        is_about_files = self.witness is not None and self._random.random() < FILE_TRAPS_SHARE
        commits = SERVER_FILE_COMMITS if is_about_files else SERVER_COMMITS
        commit = self._random.choice(commits) if self._random.random() < (0.9 if is_about_files else 0.5) else None
        self._server.disk.trap = Trap(fault, self._random.choice([0, 0, 1, 2]), commit, self._moment())
        self._say(f"the server will meet {self._server.disk.trap}")

    def _moment(self) -> Moment:
        return self._random.choice(list(Moment))

    def _restart_server(self, why: Fault, backup: Backup | None = None) -> None:
        self._say(f"the server dies and starts again: {why.name}")
        if why is not Fault.SERVER_CRASH:
            self.coverage.faults[why.name] += 1
        self._ghosts = []
        self._file_ghosts = []
        for device in self._devices:
            if device.call is not None and device.call.link is not None:
                device.call.link.break_off(grpc.StatusCode.UNAVAILABLE, "the server is gone")
            for link in device.call.file_links if device.call is not None else ():
                link.vanish()
        if self._random.random() < 0.3:
            self._deploy()
        if backup is None:
            self._server.restart()
        else:
            self._server.restore(backup)
        if self._random.random() < 0.5:
            commit, passed = self._random.choice(ADOPTING), self._random.choice([0, 0, 1, 2])
            self._server.disk.trap = Trap(Fault.SERVER_CRASH, passed, commit, self._moment())
        self._adopt()
        if backup is not None and backup.is_raw and self._random.random() < 0.3:
            self._server.disk.trap = Trap(Fault.SERVER_CRASH, 0, Commit.TIMELINE, self._moment())
        self._read_history()

    def _adopt(self) -> None:
        """Let the server make its store ready, as often as it takes."""
        self.coverage.totals["server starts"] += 1
        while True:
            try:
                self._server.adopt()
            except StorageError:
                if not self._server.has_died:
                    raise
                self._say("the server dies while it adopts the schema")
                self.coverage.totals["server starts"] += 1
                self._server.restart()
            else:
                break
        self._server.disk.trap = None

    def _deploy(self) -> None:
        if self._schema_version == 1:
            self._say("the server gets the newer schema")
            self._schema_version = 2
            self._server.application = make_application(
                self._weather, schema_version=2, business=self.settings.business
            )

    def _collect(self) -> None:
        """Let the server forget, unless somebody may still ask who must not be told that it is forgotten."""
        if not self.settings.has_copies and self._is_anything_in_doubt():
            return
        if self._random.random() < 0.3:
            self._server_clock.advance(YEAR)
            self.coverage.faults[Fault.SERVER_CLOCK.name] += 1
        if self._random.random() < 0.5:
            # There is seldom much to be forgotten of some.
            commit = self._random.choices(COLLECTING, [1, 1, 8, 3])[0]
            self._server.disk.trap = Trap(Fault.SERVER_CRASH, 0, commit, self._moment())
        self._forget()

    def _forget(self) -> None:
        self._read_history()
        self.coverage.faults[Fault.COLLECTED.name] += 1
        for device in self._devices:
            if device.call is not None and device.call.link is not None:
                device.call.link.is_outdated = True
        try:
            collected = self._server.collect()
        except StorageError as error:
            if self._server.has_died:
                self._restart_server(Fault.SERVER_CRASH)
                return
            self._say(f"the server cannot forget: {type(error).__name__}")
            return
        for name, count in collected._asdict().items():
            self.coverage.totals[f"collected {name}"] += count
        self._say(f"the server forgets: {collected}")

    def _is_anything_in_doubt(self) -> bool:
        """Tell whether anything may come again that is settled already."""
        marks = self._server.chronicle.marks
        pending = [
            (device.replica.replica_id, one.seq)
            for device in self._devices
            for one in device.replica._storage.pending()
        ]
        if self._third_party is not None:
            pending += [(self._third_party.replica_id, seq) for seq in self._third_party.pending]
        return bool(self._ghosts) or any(place in marks for place in pending)

    def _change_weather(self) -> None:
        self._weather.is_service_down = not self._weather.is_service_down
        if self._weather.is_service_down:
            self.coverage.faults[Fault.SERVICE_DOWN.name] += 1
        self._say(f"the service is {'down' if self._weather.is_service_down else 'up'}")

    def _jump(self, device: Device) -> None:
        jump = self._random.choice([YEAR, -YEAR])
        if self._random.random() < 0.5:
            device.clock_jump += jump
            self.coverage.faults[Fault.CLIENT_CLOCK.name] += 1
            self._say(f"the clock of {device.name} jumps by {jump.days} days")
        else:
            self._server_clock.advance(jump)
            self.coverage.faults[Fault.SERVER_CLOCK.name] += 1
            self._say(f"the server's clock jumps by {jump.days} days")

    def _expire(self, device: Device) -> None:
        device.has_stale_token = True
        self._say(f"the token of {device.name} expires")

    def _change_wishes(self, device: Device) -> None:
        """Open a replica with other wishes: until it has synchronized everything it is between two projections."""
        if not device.has_staged_pages:
            # What is staged for other wishes has to be thrown away.
            device = next((one for one in self._devices if one.has_staged_pages), device)
        is_staged, business = device.has_staged_pages, self.settings.business
        device.wish(business.narrow_wishes(self._random) if is_staged else business.wishes(self._random))
        self._say(f"{device.name} wants {device.wishes}")
        self._die(device)
        if is_staged:
            # It comes seldom, and no trap laid by chance would wait for it long enough.
            device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, Commit.UNSTAGE, self._moment())

    def _trim(self, device: Device) -> None:
        if device.call is not None:
            return
        device.disk.has_failed = False
        self._acting = device
        try:
            trimmed = device.replica.trim_log()
        except ReplicaDied:
            self._die(device)
            return
        except StorageError as error:
            if not device.disk.has_failed:
                raise
            self._say(f"{device.name} cannot trim: {type(error).__name__}")
            return
        finally:
            self._acting = None
        self._say(f"{device.name} trims {trimmed} operations")
        self._check(device)

    # --- the end ------------------------------------------------------------------------

    def _heal(self) -> None:
        self._say("the world heals")
        self._is_healing = True
        self._server.disk.trap = None
        self._weather.is_service_down = False
        self._ghosts, self._file_ghosts = [], []
        self._deploy()
        self._server.restart()
        self._adopt()
        for device in self._devices:
            device.die()
            device.has_stale_token = False
            self._open(device)
        reports: dict[str, Report] = {}
        party = self._third_party
        for round_ in range(1, QUIET_ROUNDS_MAX + 1):
            pending = sum(device.replica.pending_count() for device in self._devices)
            version = self._history.version
            self._settle_third_party()
            for device in self._devices:
                reports[device.name] = self._synchronize_to_the_end(device)
            done = pending == sum(device.replica.pending_count() for device in self._devices)
            if self.settings.has_copies:
                # What was lost is offered again by one after the other.
                done = done and version == self._history.version and all(map(self._is_current, self._devices))
                done = done and (party is None or party.timeline == self._server.lmdb.identity.timeline)
            if round_ >= QUIET_ROUNDS and done:
                break
        else:
            raise PromiseBroken(
                "Converges: nothing is left after a few synchronizations", [f"more than {QUIET_ROUNDS_MAX} rounds"]
            )
        self.coverage.rounds_max = round_
        self._check_all(reports)

    def _settle_third_party(self) -> None:
        if (party := self._third_party) is None:
            return
        if self.settings.has_copies:
            self._say(party.download(self._server))
        for _ in range(QUIET_ROUNDS_MAX):
            pending = 0
            while len(party.pending) != pending:
                pending = len(party.pending)
                self._say(party.upload(self._server, is_answer_lost=False, count_max=pending))
            if not pending:
                return
        raise AssertionError(f"the third party keeps pending {list(party.pending)}")

    def _synchronize_to_the_end(self, device: Device) -> Report:
        # There may be a session more for each content that is uploaded.
        content_count = sum(len(some) for _, some in device.needed_contents()) if self.witness is not None else 0
        agrees, device.is_asked = self._agrees(device), False
        call = self._call_to_the_end(device, has_consent=agrees)
        if device.is_asked:
            call = self._call_to_the_end(device, has_consent=True)
        if device.call is not None or call.report is None:
            raise PromiseBroken("Converges: a synchronization ends when nothing fails", [device.name])
        attempts_max = COPIES_ATTEMPTS_MAX if self.settings.has_copies else 1
        if self.witness is not None:
            attempts_max += content_count + 1
        # While what is offered again waits for contents there is a session every few seconds, here all the time.
        is_restless = call.report.server_restored and self.settings.has_restless_files
        if call.report.attempts > attempts_max and not is_restless:
            raise PromiseBroken(
                "Converges: one attempt is enough when nothing fails", [f"{device.name} took {call.report.attempts}"]
            )
        return call.report

    def _call_to_the_end(self, device: Device, *, has_consent: bool) -> Call:
        self._begin(device, Mode.ALL, [], None, has_consent=has_consent)
        call = device.call
        if call is None:
            raise AssertionError(f"{device.name} could not begin")
        self._advance(device, moves=CALL_MOVES_MAX)
        return call

    def _check_everything(self, device: Device, record: ReplicaRecord) -> None:
        """Check what must hold at any moment of the server, and of it and one replica."""
        server = self._server_record()
        if self.witness is not None:
            self._check_contents(self.witness, server)
        merging = self._merging
        if not self.settings.has_copies:
            committed = {one.replica.replica_id: one.committed for one in self._devices}
            if self._third_party is not None:
                committed[self._third_party.replica_id] = self._third_party.committed
            promises.check_server(server, committed)
            promises.check_replica(server, record, device.committed, seen=device.seen, merging=merging)
            return
        chronicle = self._server.chronicle
        promises.check_server(server, copies.committed_under(chronicle.marks, self._ledger))
        ledger = {nonce: decode_operation(data) for nonce, data in self._ledger.items()}
        promises.check_effects(server, ledger, chronicle.marks, chronicle.doubted, merging)
        promises.check_settled_on_replica(record, device.committed)
        if self._is_current(device) and self._knows_outcomes(device):
            told, _ = copies.as_of_one_id(server, chronicle, record.replica_id, device.committed)
            lost = self._lost(device, record, told)
            promises.check_replica(told, record, device.committed, seen=device.seen, merging=merging, lost=lost)
        else:
            self._check(device)

    def _check_all(self, reports: dict[str, Report]) -> None:
        for device in self._devices:
            self._check_everything(device, device.record())
        server = self._server_record()
        for failure in server.failures.values():
            self.coverage.reasons[FailureReason.of_number(failure.reason).name] += 1
        business = self.settings.business
        chronicle = self._server.chronicle
        promises.check_references(server, business.schema(2))
        check_applied(self._account)
        if self._third_party is not None:
            self._check_third_party(self._third_party, server)
        if self._history.lives:
            self._check_offered_again(server)
        for device in self._devices:
            record = device.record()
            promises.check_kept_when_quiet(server, record, device.committed, chronicle.marks)
            if self._knows_outcomes(device):
                self._check_settlements(device, record, server)
            not_ready = self._not_ready(reports[device.name])
            if not_ready and self.settings.limits["held_units"] > len(device.committed.data):
                raise PromiseBroken(
                    "No poison: nothing has to wait that is not bounded to", [f"{reports[device.name].skipped}"]
                )
            promises.check_converged_when_quiet(server, record, not_ready, device.eyes)
        if self.witness is not None:
            self._check_files(self.witness)

    def _check_third_party(self, party: ThirdParty, server: ServerRecord) -> None:
        business, chronicle, replica_id, committed = (
            self.settings.business,
            self._server.chronicle,
            party.replica_id,
            party.committed,
        )
        settlements, lost = chronicle.settlements, party.abandoned
        if self.settings.has_copies:
            server, settlements = copies.as_of_one_id(server, chronicle, replica_id, committed)
        if self._history.lives:
            lost = lost | (committed.operations.keys() - server.settled[replica_id].keys())
        self._say(party.download(self._server))
        party.check(server, lost)
        if not chronicle.doubted.isdisjoint(one.nonce for one in committed.operations.values()):
            return
        promises.check_groups(server, replica_id, committed, settlements, lost)
        rules = Rules(
            business.schema(1),
            may_hooks_refuse,
            business,
            party.eyes,
            is_put_back=self._history.lives > 0,
            has_copies=self.settings.has_copies,
            former_failures=self._former_failures,
        )
        promises.check_refusals(server, replica_id, committed, settlements, rules)
        if not self._history.lives:
            # It cannot know of a store that was put back behind everybody's back, and fills no gaps then.
            promises.check_order(server, replica_id, committed, lost)
            promises.check_settlement_order(replica_id, committed, settlements)

    def _check_offered_again(self, server: ServerRecord) -> None:
        """Check what became of what replicas knew, unless there are copies of them that knew it otherwise."""
        operations = {nonce: decode_operation(data) for nonce, data in self._ledger.items()}
        acknowledged: dict[int, str] = {}
        for device in self._devices:
            if not device.is_copied and device.name in self._acknowledged:
                acknowledged.update(self._acknowledged[device.name])
        marks = self._server.chronicle.marks
        promises.check_offered_again(server, acknowledged, operations, marks, self._restored_at[-1])

    def _lost(self, device: Device, record: ReplicaRecord, server: ServerRecord) -> set[int]:
        """Return what was trimmed on a replica, and then lost on the server when it was put back."""
        if not self._history.lives:
            return set()
        return device.committed.operations.keys() - record.log.keys() - server.settled[record.replica_id].keys()

    def _check_settlements(self, device: Device, record: ReplicaRecord, server: ServerRecord) -> None:
        """Check how, and for what reasons, the operations of a replica were settled."""
        business, chronicle = self.settings.business, self._server.chronicle
        settlements, replica_id = chronicle.settlements, record.replica_id
        if self.settings.has_copies:
            server, settlements = copies.as_of_one_id(server, chronicle, replica_id, device.committed)
        rules = Rules(
            business.schema(1),
            may_hooks_refuse,
            business,
            device.eyes,
            is_put_back=self._history.lives > 0,
            has_copies=self.settings.has_copies,
            former_failures=self._former_failures,
            may_lack_contents=self._may_lack_contents,
        )
        lost = self._lost(device, record, server)
        promises.check_groups(server, replica_id, device.committed, settlements, lost)
        promises.check_settlement_order(replica_id, device.committed, settlements)
        promises.check_refusals(server, replica_id, device.committed, settlements, rules)

    # --- helpers ------------------------------------------------------------------------

    def _check(self, device: Device) -> None:
        """Check what must hold at any moment of one replica."""
        self._read_history()
        record = device.record()
        if self._server.defects:
            raise PromiseBroken("Settled once: an operation is settled by one transaction", self._server.defects)
        promises.check_log(record, device.committed)
        promises.check_versions_shown(record, device.committed)
        if self._is_current(device):
            knows = self._knows_outcomes(device)
            promises.check_view(device.seen, record, device.committed, knows_outcomes=knows)
            promises.check_cursor(device.seen, record)
        else:
            others = [device.seen.over(history) for history in self._past_lives]
            promises.check_view(device.seen, record, device.committed, others=others, knows_outcomes=False)
        version = record.cursor.version if record.cursor is not None else 0
        cursor_at = record.replica_id, record.timeline, version
        # A copy may have to ask for all states: then it has no cursor until it has synchronized everything.
        is_asking_for_all = self.settings.has_copies and record.cursor is None
        if cursor_at[:2] == device.cursor_at[:2] and not is_asking_for_all:
            promises.check_cursor_moves_forward(device.cursor_at[2], version)
        device.cursor_at = cursor_at

    def _note_commits(self, device: Device) -> list[Operation]:
        found = device.note_commits()
        self._ledger.update((one.nonce, device.committed.data[one.seq]) for one in found)
        life = self._life_of_bases(device) if found else None
        replica = UUID(device.replica.replica_id).bytes
        self._commits.update((one.nonce, Committal(one, device.eyes, life, replica=replica)) for one in found)
        if self.witness is not None:
            self.witness.note_commits(device.replica._storage.files.contents, found)
        return found

    def _life_of_bases(self, device: Device) -> int | None:
        """Return of which of the store's lives the states are that a device has; None: some may be of another one."""
        if self._is_current(device):
            return device.life
        lineage = device.replica._storage.lineage
        is_known = lineage.timeline in ("", self._server.lmdb.identity.timeline)
        return None if lineage.is_rebasing or is_known else device.life

    @property
    def _merging(self) -> list[str]:
        return [entity for entity, policy in self.settings.business.policies.items() if policy == "merge"]

    @property
    def _account(self) -> Account:
        chronicle = self._server.chronicle
        logs = [*self._former_logs, *(frozenset(device.nonces) for device in self._devices)]
        if self._third_party is not None:
            logs.append(frozenset(one.nonce for one in self._third_party.committed.operations.values()))
        return Account(
            self._history,
            self.settings.business,
            chronicle.marks,
            {**chronicle.settlements, **chronicle.applications},
            self._commits,
            logs,
            tuple(self._restored_at),
            self.settings.has_copies,
            self.witness is not None,
        )

    def _not_ready(self, report: Report) -> set[int]:
        reasons = {SkipReason.NOT_READY, SkipReason.FILE_NOT_UPLOADED}
        return {one.seq for one in report.skipped if one.reason in reasons and one.seq is not None}

    def _read_history(self) -> None:
        with self._server.lmdb.read("default") as reader:
            self._history.read_on(reader)

    def _server_record(self) -> ServerRecord:
        seqs = {device.replica.replica_id: len(device.committed.data) for device in self._devices}
        if self._third_party is not None:
            seqs[self._third_party.replica_id] = len(self._third_party.committed.data)
        chronicle = self._server.chronicle
        if self.settings.has_copies:
            seqs = copies.last_seqs(seqs, chronicle)
        return read_server(self._server.lmdb, seqs, history=self._history, known=chronicle.marks)

    def _device(self, number: int) -> Device:
        settings, name = self.settings, f"r{number}"
        business, random = settings.business, self._random
        model = Model(
            business.schema(settings.schema_versions[number], is_servers=False),
            random.choice([timedelta(0), timedelta(days=30)]),
            settings.replica_map_bytes,
            {} if settings.files is None else settings.files.wishes[number],
            None if self.witness is None else self.witness.library,
            self.settings.business.is_contended,
        )
        return Device(
            name,
            self._directory / name,
            model,
            Eyes(business.granted, business.offers, business.principal(random, f"user-{name}"), {}),
            self._history,
            self,
            self.coverage,
            Random(random.random()),
        )

    def _other_client(self) -> ThirdParty:
        business, random = self.settings.business, Random(self._random.random())
        principal = business.principal(random, "third party")
        eyes = Eyes(business.granted, business.offers, principal, {})
        return ThirdParty(
            str(UUID(bytes=random.randbytes(16), version=4)),
            principal,
            eyes,
            random,
            is_contended=self.settings.business.is_contended,
        )

    def _clock(self) -> int:
        """Return what time it is on the server, where no two things happen at the same time."""
        self._server_clock.advance(MICROSECOND)
        return self._server_clock()

    def _say(self, event: str) -> None:
        # Where the data lie is of this run; all else is of the seed.
        self.events.append(event.replace(str(self._directory), "the disk"))
