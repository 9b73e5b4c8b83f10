"""
Copied devices and servers put back, at random: no operation is lost, none takes effect twice.

Each operation increments a number by one and adds its own mark to a list. An increment
that took effect twice shows as a number greater than there are marks. At the end every
operation in the log of a device that is still there must have left its mark, or a
failure on the server.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
from collections import deque
from pathlib import Path
from typing import Any

from tests.builders import TENANT, MemoryStore, contents, quick_folder
from tests.simulation.link import ServerEnd

from tidelog import MassRemoval, ServerUnavailable
from tidelog._operation import decode_operation
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_client._call_errors import _BY_REASON, Transient
from tidelog_client._synchronizer import Synchronizer
from tidelog_server import Application, HookContext, HookObject, Principal, Reject
from tidelog_server._sealing import Sealer
from tidelog_server._session import server_time_us
from tidelog_server._status import status_of

# More worlds: TIDELOG_FORK_SEEDS=3000-3599
FIRST_SEED, LAST_SEED = map(int, os.environ.get("TIDELOG_FORK_SEEDS", "0-39").split("-"))
STEPS = 50
USER = Principal("ann", tenant=TENANT)


class Cut(Exception):
    """The device's program ended in the middle of a synchronization."""


class FakeStream:
    """A session in memory that ends, for the device or for good, after so many messages."""

    def __init__(self, server: ServerEnd, messages_left: int, *, is_crash: bool) -> None:
        self._server = server
        self._messages_left = messages_left
        self._is_crash = is_crash
        self._requests: deque[bytes | None] = deque()

    def send(self, messages: list[bytes | None]) -> None:
        """Take in messages."""
        self._requests.extend(messages)

    def receive(self) -> bytes | None:
        """Return the server's next message."""
        if not self._messages_left:
            raise Cut if self._is_crash else Transient("cut")
        self._messages_left -= 1
        try:
            while self._requests:
                if (answer := self._server.receive(self._requests.popleft())) is not None:
                    return answer
            return self._server.next_page()
        except Exception as error:
            _, reason, message = status_of(error)
            if reason == "INTERNAL":
                raise
            raise _BY_REASON.get(reason, Transient)(message) from error

    def cancel(self) -> None:
        """End the session."""


class FakeConnection:
    """A connection to the server of the world."""

    may_get_another_token = False

    def __init__(self, world: World) -> None:
        self._world = world

    def authorization(self) -> tuple[()]:
        """Return nothing: the caller is known."""
        return ()

    def synchronize(self, *_: object) -> FakeStream:
        """Open a session."""
        world = self._world
        server = ServerEnd(world.application, world.store, USER, server_time_us)
        return FakeStream(server, world.next_cut(), is_crash=world.dice.random() < 0.5)

    def close(self) -> None:
        """Close nothing."""


class World:
    """Devices, directories put aside, a server and its backups; all of it drawn from one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.folder = folder
        self.application = Application()

        @self.application.before_commit("Task")
        def rejects(task: HookObject, context: HookContext) -> None:
            if "bad" in (task["marks"] or [])[-1:]:
                raise Reject("bad")

        self.disk: dict[str, Any] = {}
        self.store = MemoryStore(self.disk)
        Sealer(self.store, "")  # every server makes the key when it starts
        self.backups: list[dict[str, Any]] = []
        self.devices: list[str] = []
        self.copies: list[str] = []
        self.has_faults = True
        self.marks = itertools.count(1)
        self.names = itertools.count(1)
        self.trace: list[str] = []
        self.covered: set[str] = set()

    def next_cut(self) -> int:
        """Return after how many messages the next session breaks off."""
        return self.dice.randint(0, 6) if self.has_faults and self.dice.random() < 0.3 else 1_000_000

    def open(self, name: str) -> Replica:
        """Open a device's directory."""
        replica = Replica(self.folder / name, server="127.0.0.1:1")
        replica._synchronizer.close()
        connection: Any = FakeConnection(self)
        replica._synchronizer = Synchronizer(replica._storage, connection, 0, {})
        return replica

    def step(self) -> None:
        """Do something."""
        actions = [self.commit] * 5 + [self.synchronize] * 5
        actions += [self.new_device, self.put_aside, self.put_back, self.copy_device, self.back_up, self.restore]
        action = self.dice.choice(actions)
        if action.__name__ not in {"new_device", "back_up"} and not self.devices:
            action = self.new_device
        self.trace.append(action.__name__)
        action()

    def new_device(self) -> None:
        """Set up a device with an empty directory."""
        name = f"device {next(self.names)}"
        self.devices.append(name)
        self.open(name).close()

    def commit(self) -> None:
        """Commit some operations on a device."""
        with self.open(self.dice.choice(self.devices)) as replica:
            for _ in range(self.dice.randint(1, 3)):
                mark = f"{next(self.marks)}" if self.dice.random() < 0.9 else "bad"
                shown = list(contents(replica))
                id_ = self.dice.choice([*shown[:4], ""])
                if not id_:
                    replica.create("Task", {"n": 1, "marks": [mark]}, f"t{next(self.names)}")
                elif self.dice.random() < 0.05:
                    replica.delete("Task", id_)
                else:
                    title = {"title": mark} if self.dice.random() < 0.3 else {}
                    replica.update("Task", id_, title, increment={"n": 1}, add={"marks": [mark]})

    def synchronize(self) -> None:
        """Synchronize a device, in some mode."""
        name = self.dice.choice(self.devices)
        with self.open(name) as replica:
            shown = contents(replica)
            ids = list(shown)
            mode = self.dice.choice(["all", "all", "unsynchronized", "selected"])
            try:
                if mode == "all":
                    report = replica.synchronize_all(timeout=0, accept_mass_removal=True)
                elif mode == "unsynchronized":
                    report = replica.synchronize_unsynchronized(timeout=0)
                else:
                    report = replica.synchronize_selected([("Task", one) for one in ids[:2]], timeout=0)
            except Cut:
                self.covered.add("crash")
            except (ServerUnavailable, MassRemoval) as error:
                self.covered.add(type(error).__name__)
            else:
                self.note(report)

    def note(self, report: Any) -> None:
        """Note what was seen."""
        self.covered.update(one.reason.name for one in report.failures)
        if report.former_replica_id:
            self.covered.add("fork")
        if report.server_restored:
            self.covered.add("rebase")
        if report.reoffered:
            self.covered.add("reoffer")

    def put_aside(self) -> None:
        """Keep a copy of a device's directory."""
        name = f"copy {next(self.names)}"
        shutil.copytree(self.folder / self.dice.choice(self.devices), self.folder / name)
        self.copies.append(name)

    def put_back(self) -> None:
        """Put a copy in the place of a device's directory."""
        if self.copies:
            name = self.dice.choice(self.devices)
            shutil.rmtree(self.folder / name)
            shutil.copytree(self.folder / self.dice.choice(self.copies), self.folder / name)

    def copy_device(self) -> None:
        """Go on with a directory on another device too."""
        if len(self.devices) < 5:
            name = f"device {next(self.names)}"
            shutil.copytree(self.folder / self.dice.choice(self.devices), self.folder / name)
            self.devices.append(name)

    def back_up(self) -> None:
        """Keep a copy of the server's store."""
        self.backups.append(copy.deepcopy(self.disk))

    def restore(self) -> None:
        """Put a copy in the place of the server's store."""
        if self.backups:
            self.disk = copy.deepcopy(self.dice.choice(self.backups[-2:]))
            self.store = MemoryStore(self.disk)

    # --- the end --------------------------------------------------------------

    def settle_everything(self) -> None:
        """Let every device synchronize without faults until nothing is left to be done."""
        self.has_faults = False
        for _ in range(3):
            for name in self.devices:
                with self.open(name) as replica:
                    self.note(replica.synchronize_all(accept_mass_removal=True))

    def check(self) -> None:
        """Raise AssertionError if a promise is broken."""
        with self.open(self.new_name()) as fresh:
            fresh.synchronize_all()
            truth = contents(fresh)
        for id_, task in truth.items():
            assert task["n"] == len(task["marks"]), f"{id_}: an operation took effect twice, or by half: {task}"
        with self.store.read(TENANT) as reader:
            failures = [
                failure_pb2.SynchronizationFailure.FromString(data)
                for _, data in reader.failures(b"", 1_000_000, 1 << 30)
            ]
        failed = {decode_operation(one.operation).nonce for one in failures}
        tenants = self.disk["tenants"]
        marks = tenants[TENANT].settled if TENANT in tenants else {}
        settled = {(seq, mark.nonce): mark for (_, seq), mark in marks.items()}
        for name in self.devices:
            with self.open(name) as replica:
                assert replica.pending_count() == 0, f"{name} has operations left"
                assert contents(replica) == truth, f"{name} shows something else than the server"
                for logged in replica.log():
                    operation = logged.operation
                    mark = settled.get((operation.seq, operation.nonce))
                    assert mark is not None, f"{name}: seq {operation.seq} is lost"
                    if mark.failure_id:
                        assert operation.nonce in failed, f"{name}: seq {operation.seq} failed without a record"

    def new_name(self) -> str:
        """Return the name of a directory that is not there yet."""
        return f"fresh {next(self.names)}"


def run(seed: int, steps: int = STEPS) -> set[str]:
    """Run one world."""
    with quick_folder() as folder:
        world = World(folder, seed)
        world.new_device()
        for _ in range(steps):
            world.step()
        world.settle_everything()
        try:
            world.check()
        except AssertionError as error:
            error.add_note(f"seed {seed}: {' '.join(world.trace)}")
            raise
        return world.covered


def test_nothing_is_lost() -> None:
    """Whatever is copied and put back, every kept operation settles once, or is a failure for a person to look at."""
    covered: set[str] = set()
    for seed in range(FIRST_SEED, LAST_SEED + 1):
        covered |= run(seed)

    assert covered >= {"fork", "rebase", "reoffer", "crash", "ServerUnavailable", "HOOK_REJECTED", "SUPERSEDED"}
