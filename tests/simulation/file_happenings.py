"""
What happens to files in a simulated world: contents on their way, lost, pried into, collected, and checked in the end.

A part of `World`, which has the rest: who acts, who is connected with whom, and what the dice say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.simulation.contents import ATTRIBUTES
from tests.simulation.device import Call, Device
from tests.simulation.disk import Trap
from tests.simulation.exchange import Ask, Fetch, FileLink, Turns
from tests.simulation.faults import CLIENT_FILE_COMMITS, Commit, Coverage, Fault, Moment
from tests.simulation.link import ServerGone
from tests.simulation.model import Key
from tests.simulation.promises import PromiseBroken
from tests.simulation.records import History, ServerRecord
from tests.simulation.rights import Eyes
from tests.simulation.server import SimulatedServer
from tests.simulation.settings import NEVER, Settings
from tests.simulation.witness import (
    Watch,
    Witness,
    content_files,
    destroy,
    needed_on_replica,
    needed_on_server,
    sha256_of,
)

from tidelog import FailureReason, Operation, StorageError
from tidelog.testing import ManualClock
from tidelog_client._files import Needed
from tidelog_client._verification import verify_replica
from tidelog_server import verify_store
from tidelog_server._errors import NotFound
from tidelog_server._principal import DEFAULT_TENANT
from tidelog_server._retention import Periods
from tidelog_server._tenant import Tenant

FILE_TRAPS_SHARE: Final = 0.4
LOST_TRAPS_SHARE: Final = 0.5
FILE_TRAP_WEIGHTS: Final = [1 if commit in {Commit.PART, Commit.LOOK} else 4 for commit in CLIENT_FILE_COMMITS]
COLLECTING_FILES: Final = (Commit.COLLECT_CONTENT, Commit.COLLECT_GRANTS, Commit.SERVER_CONTENT_DELETED)
YEAR: Final = timedelta(days=365)
# Longer than any clock has jumped.
AGES: Final = 20 * YEAR
STALL_STEPS_MAX: Final = 30
CALL_MOVES_MAX: Final = 20_000


class FileHappenings(ABC):
    """What can happen to files."""

    settings: Settings
    coverage: Coverage
    _random: Random
    _directory: Path
    _devices: list[Device]
    _server: SimulatedServer
    _server_clock: ManualClock
    _history: History
    # None: there are no files in this world.
    witness: Witness | None
    # File calls that were left, of which something may still arrive.
    _file_ghosts: list[FileLink]

    @abstractmethod
    def _say(self, event: str) -> None: ...

    @abstractmethod
    def _moment(self) -> Moment: ...

    @abstractmethod
    def _start(self, device: Device, call: Call, work: Callable[[], None]) -> None: ...

    @abstractmethod
    def _advance(self, device: Device, *, moves: int | None = None) -> None: ...

    @abstractmethod
    def _take_turns(self, device: Device, turns: Turns) -> None: ...

    @abstractmethod
    def _resume(self, device: Device) -> None: ...

    @abstractmethod
    def _restart_server(self, why: Fault) -> None: ...

    @abstractmethod
    def _server_record(self) -> ServerRecord: ...

    @abstractmethod
    def _synchronize_to_the_end(self, device: Device) -> object: ...

    # --- the network, as devices see it -----------------------------------------------------

    def connect_file(self, device: Device, turns: Turns) -> FileLink:
        """See `Network`."""
        call, witness = device.call, self.witness
        if call is None or witness is None:
            raise AssertionError(f"{device.name} transfers a content, and nobody asked for it")
        watch = Watch(witness, device.eyes, lambda: self._server_record().visible())
        link = FileLink(self._server.file_end(device.eyes.principal, watch), turns, lambda: self._server.has_died)
        call.file_links = [one for one in call.file_links if not one.is_left] + [link]
        self.coverage.totals["file calls"] += 1
        return link

    def pause_for_files(self, device: Device, turns: Turns, seconds: float) -> bool:
        """See `Network`."""
        call = device.call
        if call is None:
            raise AssertionError(f"{device.name} waits for contents, and nobody asked for them")
        call.file_seconds, call.is_time_over, call.turns = seconds, False, turns
        call.fiber.pause()
        call.file_seconds, call.turns = None, None
        if call.is_time_over:
            device.seconds += seconds
        return not call.is_time_over

    # --- what can happen ----------------------------------------------------------------

    def _happenings_with_files(self, witness: Witness, device: Device) -> list[tuple[str, float, Callable[[], None]]]:
        """Return what can happen besides where there are files."""
        transferring = [one for one in self._devices if one.call is not None and one.call.is_transferring]
        return [
            ("open", 0.6 if device.call is None else 0.0, lambda: self._open_file(device)),
            ("file fault", 2.5 if transferring else 0.0, lambda: self._file_fault(self._random.choice(transferring))),
            ("late file", 3.0 if self._file_ghosts else 0.0, self._haunt_files),
            ("lose", 0.4, lambda: self._lose(witness, device)),
            ("pry", 0.5, lambda: self._pry(witness, device.eyes)),
            ("collect files", 0.9, lambda: self._collect_files(witness)),
        ]

    def _services_files(self, tenant: Tenant) -> dict[str, Any]:
        """Return attributes that refer to a content which the service itself adds, or none."""
        if self.witness is None or self._random.random() < 0.6:
            return {}
        content = self.witness.library.draw(self._random)
        return {ATTRIBUTES[0]: tenant.add_file(BytesIO(content), name="service.txt")}

    def _open_file(self, device: Device) -> None:
        """Let a user open a file that is not here."""
        found = device.user.missing_file()
        if found is None:
            return
        self._begin_to_open(device, *found)

    def _begin_to_open(self, device: Device, key: Key, name: str, sha256: bytes) -> Call:
        self._say(f"{device.name} opens {name} of {key}")
        call = Call(None, 0, 0)
        replica = device.replica

        def work() -> None:
            with replica.open_file(*key, name, timeout=60.0) as file:
                call.opened = file.read()
            witness = self.witness
            if (
                witness is not None
                and sha256 not in witness.lost_here
                and not device.user.is_right(sha256, call.opened)
            ):
                raise PromiseBroken("Files: what is opened is what was attached", [f"{name} of {key}"])

        self._start(device, call, work)
        return call

    def _open_to_the_end(self, witness: Witness, device: Device, server: ServerRecord) -> None:
        """Let a user open what is not downloaded before somebody does."""
        wishes, record = device.file_wishes, device.record()
        for key, name, one in witness.openable(device.replica, wishes, record, server, device.eyes):
            call = self._begin_to_open(device, key, name, one.sha256)
            self._advance(device, moves=CALL_MOVES_MAX)
            if call.opened != witness.library.content(one.sha256):
                raise PromiseBroken("Files: what a replica may have can be opened", [f"{name} of {key}"])

    def _advance_files(self, device: Device, call: Call, *, is_patient: bool) -> bool:
        """Let one thing happen to the contents on their way; tell whether anything did."""
        links = [one for one in call.file_links if not one.is_left]
        stalled = [one for one in links if one.stalled_steps] if is_patient else []
        for link in stalled:
            link.stalled_steps -= 1
        possible = [(link, move) for link in links if link not in stalled for move in link.moves()]
        if possible and not (any(one.is_dark for one in links) and self._random.random() < 0.2):
            link, move = self._random.choice(possible)
            try:
                what = move()
            except ServerGone:
                self._restart_server(Fault.SERVER_CRASH)
                what = "the server is gone"
            self._say(f"{device.name}, a content: {what}")
        elif stalled:
            return False
        else:
            self._say(f"{device.name} waits {call.file_seconds} s")
            call.is_time_over = True
        if call.is_time_over or (call.turns is not None and call.turns.may_go_on):
            self._resume(device)
        return True

    def _move_beside(self, device: Device, call: Call) -> None:
        """Let one thing happen to the contents that are on their way while a session goes on."""
        possible = [(link, move) for link in call.file_links if not link.is_left for move in link.moves()]
        if not possible:
            return
        link, move = self._random.choice(possible)
        try:
            self._say(f"{device.name}, a content meanwhile: {move()}")
        except ServerGone:
            self._restart_server(Fault.SERVER_CRASH)
            return
        self._take_turns(device, link.turns)

    def _file_fault(self, device: Device) -> None:
        call, random = device.call, self._random
        links = [] if call is None else [one for one in call.file_links if not one.is_left]
        if not links:
            return
        link = random.choice(links)
        fault = random.choices([Fault.FILE_CUT, Fault.FILE_DELAY, Fault.FILE_BLACK_HOLE], [6, 2, 1])[0]
        self._say(f"{fault.name} on a content of {device.name}")
        self.coverage.faults[fault.name] += 1
        match fault:
            case Fault.FILE_CUT:
                for one in links if random.random() < 0.5 else [link]:
                    one.cut(drops_answers=random.random() < 0.5)
                    self._leave_file(one)
            case Fault.FILE_DELAY:
                link.stalled_steps = random.randint(1, STALL_STEPS_MAX)
            case _:
                for one in links:
                    one.is_dark = True
                    one.to_server.clear()
                    one.to_client.clear()

    def _leave_files(self, call: Call) -> None:
        for link in call.file_links:
            if not link.is_over:
                self._leave_file(link)
        call.file_links = []

    def _leave_file(self, link: FileLink) -> None:
        """Leave a file call to its fate: what is on its way to the server may still arrive."""
        if not link.is_spent and self._random.random() < 0.5:
            self._file_ghosts.append(link.ghost())
        else:
            link.end()

    def _haunt_files(self) -> None:
        link = self._random.choice(self._file_ghosts)
        self.coverage.faults[Fault.FILE_LATE.name] += 1
        try:
            self._say(f"late, a content: {link.end_late()}")
        except ServerGone:
            self._restart_server(Fault.SERVER_CRASH)
            return
        self._file_ghosts = [one for one in self._file_ghosts if not one.is_over]

    def _lose(self, witness: Witness, device: Device) -> None:
        """Destroy a content."""
        random = self._random
        # A backup that lacks something is not restored; that is not what this is about.
        is_here = self.settings.has_copies or random.random() < 0.5
        is_damaged = random.random() < 0.5
        found = content_files(device.replica._storage.files.contents if is_here else self._server.contents)
        if not found:
            return
        needed = {one.sha256.hex() for _, some in device.needed_contents() for one in some} if is_here else set()
        path = random.choice([one for one in found if sha256_of(one).hex() in needed] or found)
        if random.random() < LOST_TRAPS_SHARE:
            self._lay_lost_trap(device, is_here=is_here)
        destroy(path, is_damaged=is_damaged)
        (witness.lost_here if is_here else witness.lost_there).add(sha256_of(path))
        if is_here:
            fault = Fault.CONTENT_DAMAGED if is_damaged else Fault.CONTENT_LOST
        else:
            fault = Fault.SERVER_CONTENT_DAMAGED if is_damaged else Fault.SERVER_CONTENT_LOST
        self.coverage.faults[fault.name] += 1
        self._say(f"{fault.value}: {path.name} of {device.name}")

    def _pry(self, witness: Witness, eyes: Eyes) -> None:
        """Let a program ask for contents that it knows, whatever its user may read."""
        random, keys = self._random, [*self._history.keys]
        found = content_files(self._server.contents)
        if not found or not keys:
            return
        fetch = Fetch(sha256_of(random.choice(found)), random.choice(keys), 0)
        ask = Ask([Needed(fetch.sha256, len(witness.library.content(fetch.sha256) or b""))])
        watch = Watch(witness, eyes, lambda: self._server_record().visible())
        message: Ask | Fetch = ask if random.random() < 0.5 else fetch
        try:
            self._server.file_end(eyes.principal, watch).receive(message)
        except NotFound:
            self._say(f"{eyes.principal.user_id} may not have {fetch}")
        except StorageError:
            if not self._server.has_died:
                return
            self._restart_server(Fault.SERVER_CRASH)

    def _lay_lost_trap(self, device: Device, *, is_here: bool) -> None:
        """Let a process die when it notices that a content is gone."""
        if is_here:
            device.disk.trap = Trap(Fault.CLIENT_CRASH, 0, Commit.GONE, self._moment())
        else:
            self._server.disk.trap = Trap(Fault.SERVER_CRASH, 0, Commit.BROKEN_CONTENT, self._moment())

    def _lay_file_trap(self, device: Device) -> None:
        fault = self._random.choices(
            [Fault.CLIENT_CRASH, Fault.CLIENT_DISK_FULL, Fault.CLIENT_WRITE_FAILED], [6, 1, 1]
        )
        commit = self._random.choices(CLIENT_FILE_COMMITS, FILE_TRAP_WEIGHTS)[0]
        device.disk.trap = Trap(fault[0], 0, commit, self._moment())
        self._say(f"{device.name} will meet {device.disk.trap}")

    def _collect_files(self, witness: Witness) -> None:
        """Let the server forget contents to which nobody refers."""
        if self.settings.files is None:
            return
        if self._random.random() < 0.3:
            self._server_clock.advance(YEAR)
        if self._random.random() < 0.5:
            commit = self._random.choice(COLLECTING_FILES)
            self._server.disk.trap = Trap(Fault.SERVER_CRASH, 0, commit, self._moment())
        try:
            collected = self._server.collect(self._only_files(self.settings.files.grace))
        except StorageError as error:
            if self._server.has_died:
                self._restart_server(Fault.SERVER_CRASH)
                return
            self._say(f"the server cannot forget: {type(error).__name__}")
            return
        self.coverage.totals["collected contents"] += collected.contents
        self._say(f"the server collects {collected.contents} contents")
        self._check_contents(witness, self._server_record())

    def _only_files(self, grace: timedelta) -> Periods:
        return Periods(NEVER, NEVER, NEVER, grace)

    def _may_lack_contents(self, reason: FailureReason, operation: Operation) -> bool:
        """Tell whether an operation may be refused because of the contents that it refers to."""
        if (witness := self.witness) is None:
            return False
        if reason is FailureReason.TOO_LARGE:
            return witness.is_too_large(operation)
        return witness.may_be_missing(operation)

    def _check_contents(self, witness: Witness, server: ServerRecord) -> None:
        """Check what must hold of the server's contents at any moment."""
        with self._server.lmdb.read(DEFAULT_TENANT) as reader:
            witness.check_there(server, reader, self._server.contents)

    def _check_files(self, witness: Witness) -> None:
        """Check what holds of files when all agree, and when what nobody refers to is due to go."""
        server = self._server_record()
        self._check_contents(witness, server)
        for device in self._devices:
            record = device.record()
            witness.check_had_when_quiet(device.replica, device.file_wishes, record, server, device.eyes)
            self._open_to_the_end(witness, device, server)
        for _ in range(2):  # what a restored store does not know is kept until long after that was noticed
            self._server_clock.advance(AGES)
            self._server.collect(self._only_files(timedelta(0)))
        for device in self._devices:
            self._synchronize_to_the_end(device)
        server = self._server_record()
        left = [content.sha256 for content in self._server.contents.contents()]
        # What waits for something else is uploaded again.
        waiting = {one.sha256 for device in self._devices for _, some in device.needed_contents() for one in some}
        witness.check_left_when_quiet("the server", left, needed_on_server(server) | waiting)
        self._check_contents(witness, server)
        for device in self._devices:
            record = device.record()
            left = [one.sha256 for one in device.replica._storage.files.contents.contents()]
            needed = needed_on_replica(record, device.committed.operations)
            witness.check_left_when_quiet(device.name, left, needed)
            witness.check_had_when_quiet(device.replica, device.file_wishes, record, server, device.eyes)

    def _verify(self, witness: Witness) -> None:
        """Verify what all directories hold when everything is closed."""
        findings = list(verify_store(self._directory / "server"))
        for device in self._devices:
            findings += verify_replica(device.path)
        if left := [str(one) for one in findings if not witness.explains(one)]:
            raise PromiseBroken("Verification: nothing is wrong on either side", left)
