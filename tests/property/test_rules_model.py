"""
Rules from device to device, against a model that reads them naively.

Two people with a device each, the service beside them, an application whose rules,
roles, offers and wishes change at any time. The real client and the real server run,
with a wire in memory between them that may be cut, and on which the service writes
between two pages. What everybody may read and write is computed object by object from
the change log, without any of the server's machinery; what a replica must show follows
from that and its pending operations. What goes wrong is cut down to the fewest actions
that still do.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple
from unittest import mock
from uuid import UUID

import pytest
from tests.builders import TENANT, MemoryStore
from tests.simulation.link import ServerEnd
from tests.simulation.model import patched, replayed, same
from tests.simulation.rights import Eyes, Granted, allow

from tidelog import (
    Constraint,
    Download,
    DownloadMode,
    Entity,
    Integer,
    InvalidValue,
    ObjectExists,
    ObjectNotFound,
    Operation,
    OperationKind,
    Patch,
    Reference,
    Schema,
    ServerUnavailable,
    String,
    SynchronizationError,
    attribute,
    claim,
)
from tidelog._keys import ObjectKey
from tidelog._patch import decode_patch
from tidelog._values import decode_map
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import failure_pb2, sync_pb2
from tidelog_client import Replica, Report, _publication, _synchronization
from tidelog_client._call_errors import Transient
from tidelog_server import Application, HookContext, HookObject, OperationRefused, Principal, _download
from tidelog_server._records import Change
from tidelog_server._status import status_of
from tidelog_server._tenant import Tenant

pytestmark = pytest.mark.slow

SEEDS = 12
ACTIONS = 120
ATTEMPTS_MAX = 10

Attributes = dict[str, Any]
States = dict[ObjectKey, Attributes]

_ATTRIBUTES = {"who": String(), "kind": String(), "n": Integer(), "note": String()}
SCHEMA = Schema(
    [
        Entity("Task", {**_ATTRIBUTES, "stamp": String()}, indexes=["who"]),
        Entity("Line", {**_ATTRIBUTES, "task": Reference("Task", on_delete="cascade")}),
        Entity("Memo", {**_ATTRIBUTES, "task": Reference("Task", on_delete="clear")}, indexes=["kind"]),
        Entity("Seal", {**_ATTRIBUTES, "task": Reference("Task", on_delete="restrict")}),
    ]
)
ENTITIES = ("Task", "Line", "Memo", "Seal")
KEYS = [(entity, f"{entity.lower()}-{letter}") for entity in ENTITIES for letter in "abcd"]
PEOPLE = ("ann", "bob")

# Each note is another one, so that a note on the wire tells where it comes from. So does each id.
_TELLTALE = re.compile(rb"note-\d+-|(?:task|line|memo|seal)-[a-d]")


# --- the rules, read naively --------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """Who somebody is today."""

    name: str
    roles: frozenset[str] = frozenset()
    me: str | None = None

    @property
    def principal(self) -> Principal:
        """The principal."""
        return Principal(self.name, roles=self.roles, claims={} if self.me is None else {"me": self.me})


@dataclass(frozen=True)
class Rules:
    """What the application says."""

    granted: tuple[Granted, ...] = ()
    offers: Mapping[str, Download] = field(default_factory=dict)

    def application(self) -> Application:
        """Return the application, with a hook that writes what hardly anybody may."""
        application = Application(schema=SCHEMA)
        allow(application, self.granted)
        for entity, offer in self.offers.items():
            application.synchronize(entity, offer)

        @application.after_commit("Task")
        def spread(task: HookObject, context: HookContext) -> None:
            memo = ("Memo", task.id.replace("task", "memo"))
            if task["n"] == 3 and context.get(*memo) is not None:
                context.update(*memo, {"n": 3, "kind": task["kind"] or "x"})

        @application.before_commit("Task")
        def stamp(task: HookObject, _context: HookContext) -> None:
            if task["kind"] == "x":
                task["stamp"] = f"{task['note']}stamped"

        return application


# --- the world ----------------------------------------------------------------------------


class Step(NamedTuple):
    """A change that somebody makes."""

    kind: OperationKind
    key: ObjectKey
    patch: Patch = Patch()


class Broken(Exception):
    """What the model says does not hold."""


@dataclass
class Device:
    """Somebody's replica, with what it has been told of."""

    person: Person
    path: Path
    wishes: Mapping[str, Download] = field(default_factory=dict)
    # Notes and ids that its own operations brought up, and those of which it was told rightly.
    known: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.open({})

    def open(self, wishes: Mapping[str, Download]) -> None:
        """Open the replica, with what it wants."""
        self.wishes = wishes
        self.replica = Replica(
            self.path, server="localhost:1", schema=SCHEMA, durability="relaxed", download=dict(wishes)
        )

    def view(self) -> States:
        """Return what the replica shows."""
        return {(one.entity, one.id): one.to_dict() for entity in ENTITIES for one in self.replica.query(entity)}

    def pending(self) -> dict[ObjectKey, list[Operation]]:
        """Return the pending operations by object."""
        found: dict[ObjectKey, list[Operation]] = {}
        for logged in self.replica.pending():
            found.setdefault(logged.operation.key, []).append(logged.operation)
        return found


class Wire:
    """Carries a replica's sessions to the server and looks at all that comes back. Stands for a connection."""

    may_get_another_token = False

    def __init__(
        self, world: World, device: Device, meanwhile: Iterable[Sequence[Step]], cut_after: int | None
    ) -> None:
        self._world = world
        self._device = device
        self._meanwhile = iter(meanwhile)
        self._left = cut_after
        self._attempts_left = ATTEMPTS_MAX

    def authorization(self) -> None:
        """See `Connection`."""

    def synchronize(self, _metadata: None, _timeout: float | None) -> Wire:
        """See `Connection`."""
        self._attempts_left -= 1
        _expect(self._attempts_left, "a synchronization comes to an end")
        world = self._world
        principal = self._device.person.principal
        self.eyes = Eyes(world.rules.granted, world.rules.offers, principal, self._device.wishes)
        self._server = ServerEnd(world.application, world.store, principal, world.clock)
        self._answers: deque[bytes] = deque()
        return self

    def send(self, messages: list[bytes | None]) -> None:
        """See `Stream`."""
        for message in messages:
            try:
                answer = self._server.receive(message)
            except Exception as error:
                code, reason, text = status_of(error)
                if not reason or code.name in ("INTERNAL", "UNKNOWN"):
                    raise
                raise SynchronizationError(f"{reason} {text}") from error
            if answer is not None:
                self._world.look_at(self._device, self.eyes, answer)
                self._answers.append(answer)

    def receive(self) -> bytes | None:
        """See `Stream`."""
        if self._left is not None:
            if self._left == 0:
                raise Transient("the wire is cut")
            self._left -= 1
        if self._answers:
            return self._answers.popleft()
        if not self._server.has_pages:
            return None
        page = self._server.next_page()
        self._world.look_at(self._device, self.eyes, page)
        self._world.write(next(self._meanwhile, ()))
        return page

    def cancel(self) -> None:
        """See `Stream`."""

    def close(self) -> None:
        """See `Connection`."""


class World:
    """People who change things, rules that change, synchronizations, in any order."""

    def __init__(self, directory: Path) -> None:
        self.store = MemoryStore()
        self.rules = Rules()
        self.application = self.rules.application()
        self.devices = {name: Device(Person(name), directory / name) for name in PEOPLE}
        self.changes: list[Change] = []
        self._states: list[States] = [{}]
        self._time = count(1)

    def close(self) -> None:
        """Close the replicas."""
        for device in self.devices.values():
            device.replica.close()

    def clock(self) -> int:
        """Return the server's time."""
        return next(self._time)

    # --- what happens ---------------------------------------------------------------------

    def write(self, steps: Sequence[Step]) -> None:
        """Let the service change objects."""
        tenant = Tenant(self.application, self.store, TENANT, None, self.clock)
        with suppress(OperationRefused, ObjectExists, ObjectNotFound), tenant.transaction() as transaction:
            for step in steps:
                _change(transaction, step)
        self._read_history()

    def edit(self, name: str, steps: Sequence[Step], *, atomic: bool) -> None:
        """Let somebody change what the device has."""
        device = self.devices[name]
        with suppress(InvalidValue), device.replica.transaction(atomic=atomic) as transaction:
            for step in steps:
                with suppress(ObjectExists, ObjectNotFound, InvalidValue):
                    _change(transaction, step)
        for logged in device.replica.pending():
            device.known.update(_TELLTALE.findall(logged.operation.encode()))

    def change_rules(self, rules: Rules) -> None:
        """Start the application anew, with other rules."""
        self.rules = rules
        self.application = rules.application()

    def change_person(self, person: Person) -> None:
        """Give somebody other roles and claims."""
        self.devices[person.name].person = person

    def reopen(self, name: str, wishes: Mapping[str, Download]) -> None:
        """Open somebody's replica with other wishes."""
        device = self.devices[name]
        device.replica.close()
        device.open(wishes)

    def synchronize(  # noqa: PLR0917 - what a draw is made of
        self,
        name: str,
        mode: str,
        keys: Sequence[ObjectKey],
        limits: Mapping[str, int],
        meanwhile: Sequence[Sequence[Step]],
        cut_after: int | None,
    ) -> None:
        """Synchronize a device, and compare what it then has with what the rules say."""
        device = self.devices[name]
        wire = Wire(self, device, meanwhile, cut_after)
        if mode == "selected":
            device.known.update(id_.encode() for _, id_ in keys)
        device.replica._synchronizer._connection = wire  # type: ignore[assignment]
        before, pending_before, seen_before = device.view(), device.pending(), len(self.changes)
        with _limited(limits):
            try:
                report = _synchronize(device.replica, mode, keys, timeout=None if cut_after is None else 0)
            except ServerUnavailable:
                report = None
                _expect(cut_after is not None, "only a cut makes the server unavailable")
        self._read_history()
        self._check_settled(device, wire.eyes, seen_before)
        if report is None:
            return
        if mode == "all":
            self._check_all(device, wire.eyes, before, pending_before)
        elif not meanwhile:
            keys = keys if mode == "selected" else self._own_keys(device, seen_before)
            skipped = {(one.entity, one.id) for one in report.skipped if one.seq is None}
            self._check_keys(device, wire.eyes, mode, set(keys) - skipped)

    # --- what must hold ---------------------------------------------------------------------

    def look_at(self, device: Device, eyes: Eyes, answer: bytes) -> None:
        """Check that a message tells nothing that its receiver may not know."""
        self._read_history()
        readable: States = {}
        for key, attributes in self._states[-1].items():
            seen = eyes.readable(key[0], attributes)
            if seen is not None:
                readable[key] = seen
        response = splice_pb2.SynchronizeResponseSplice.FromString(answer)
        page = sync_pb2.SnapshotPage.FromString(response.page)
        for one in page.snapshots:
            came, expected = decode_map(one.attributes), readable.get((one.entity, one.id))
            _expect(same(came, expected), f"{one.entity} {one.id} came as {came}, readable is {expected}")
        for key, attributes in readable.items():
            device.known.add(key[1].encode())
            device.known.update(_TELLTALE.findall(repr(attributes).encode()))
        leaked = {one for one in _TELLTALE.findall(answer) if one not in device.known}
        _expect(not leaked, f"{device.person.name} was told of {leaked} in {response.WhichOneof('message')}")

    def _check_settled(self, device: Device, eyes: Eyes, seen_before: int) -> None:
        """Check that nothing was applied that may not be, groups settled whole, and refusals keep all."""
        replica_id = UUID(device.replica.replica_id).bytes
        logged = {one.operation.seq: one for one in device.replica.log()}
        for change in self.changes[seen_before:]:
            if change.replica == replica_id and not change.by_hook and change.seq in logged:
                operation = logged[change.seq].operation
                allowed = eyes.may(operation, self._states[change.version - 1].get(change.key))
                _expect(allowed, f"{operation} was applied, which {device.person} may not do")
        with self.store.read(TENANT) as reader:
            records = dict(reader.failures(b"", 100_000, 1 << 30))
        for one in logged.values():
            if one.status == "failed":
                record = failure_pb2.SynchronizationFailure.FromString(records[UUID(one.failure_id).bytes])
                kept = {record.operation, *record.group_operations}
                _expect(one.operation.encode() in kept, f"the failure of {one.operation} does not keep it")
            group = one.operation.group
            if group is not None and group.position == 0:
                seqs = range(one.operation.seq, one.operation.seq + group.size)
                _expect(len({logged[seq].status for seq in seqs}) == 1, f"the group of {one.operation} fell apart")

    def _check_all(
        self, device: Device, eyes: Eyes, before: States, pending_before: dict[ObjectKey, list[Operation]]
    ) -> None:
        cursor = splice_pb2.Cursor.FromString(device.replica._storage.meta("cursor"))
        view, pending = device.view(), device.pending()
        refused = {one.operation.key for one in device.replica.log() if one.status == "failed"}
        for key in KEYS:
            shown, mode = view.get(key), eyes.mode(key[0])
            if eyes.downloads(key[0]):
                expected = eyes.shown(key[0], self._states[cursor.version].get(key))
                for operation in pending.get(key, ()):
                    expected = replayed(expected, operation)
                _expect(same(shown, expected), f"{device.person.name} shows of {key} {shown}, not {expected}")
            elif mode is DownloadMode.NOTHING_CLEAR:
                _expect(shown is None or key in pending, f"{key} should have been cleared: {shown}")
            elif key not in refused or not pending_before.get(key):
                _expect(same(shown, before.get(key)), f"{key} should be as it was, {before.get(key)}, not {shown}")

    def _check_keys(self, device: Device, eyes: Eyes, mode: str, keys: Iterable[ObjectKey]) -> None:
        """Check the objects that a synchronization of another mode than all is about."""
        view, pending = device.view(), device.pending()
        for key in keys:
            if mode == "unsynchronized" and eyes.mode(key[0]) in (DownloadMode.NEVER, DownloadMode.NOTHING_CLEAR):
                continue
            state = self._states[-1].get(key)
            is_shown = mode == "unsynchronized" and eyes.downloads(key[0])
            expected = eyes.shown(key[0], state) if is_shown else eyes.readable(key[0], state)
            for operation in pending.get(key, ()):
                expected = replayed(expected, operation)
            shown = view.get(key)
            _expect(same(shown, expected), f"{device.person.name} shows of {key} {shown}, not {expected} after {mode}")

    def _own_keys(self, device: Device, seen_before: int) -> list[ObjectKey]:
        """Return the objects that the device's operations have changed themselves."""
        replica_id = UUID(device.replica.replica_id).bytes
        found = self.changes[seen_before:]
        return [change.key for change in found if change.replica == replica_id and not change.by_hook]

    def _read_history(self) -> None:
        with self.store.read(TENANT) as reader:
            new = reader.changes(len(self.changes), 100_000, 1 << 30)
        for change in new:
            states = dict(self._states[-1])
            if change.kind is OperationKind.DELETE:
                del states[change.key]
            else:
                before = {} if change.kind is OperationKind.CREATE else states[change.key]
                states[change.key] = patched(before, decode_patch(change.patch))
            self.changes.append(change)
            self._states.append(states)


def _change(transaction: Any, step: Step) -> None:
    entity, id_ = step.key
    if step.kind is OperationKind.CREATE:
        transaction.create(entity, step.patch.set, id_)
    elif step.kind is OperationKind.DELETE:
        transaction.delete(entity, id_)
    else:
        transaction.update(entity, id_, step.patch.set, unset=step.patch.unset, increment=step.patch.increment)


def _synchronize(replica: Replica, mode: str, keys: Sequence[ObjectKey], timeout: float | None) -> Report:
    if mode == "selected":
        return replica.synchronize_selected(keys, timeout=timeout)
    if mode == "all":
        return replica.synchronize_all(timeout=timeout)
    return replica.synchronize_unsynchronized(timeout=timeout)


@contextmanager
def _limited(limits: Mapping[str, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (_download, _synchronization, _publication):
            for name, value in limits.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise Broken(message)


_FEW = frozenset({"who"})
_SOME = frozenset({"who", "n", "note"})


# --- dice ---------------------------------------------------------------------------------

Action = tuple[str, dict[str, Any]]


class Draw:
    """What a seed makes of a world."""

    _KINDS: ClassVar = {
        "write": 20,
        "edit": 35,
        "synchronize": 35,
        "change_rules": 6,
        "change_person": 6,
        "reopen": 6,
    }

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._notes = count(1)

    def actions(self, length: int) -> list[Action]:
        """Draw what happens."""
        kinds = self._random.choices(list(self._KINDS), list(self._KINDS.values()), k=length)
        return [(kind, getattr(self, f"_{kind}")()) for kind in kinds]

    def _write(self) -> dict[str, Any]:
        return {"steps": self._steps()}

    def _edit(self) -> dict[str, Any]:
        return {"name": self._name(), "steps": self._steps(), "atomic": self._random.random() < 0.4}

    def _change_rules(self) -> dict[str, Any]:
        granted = tuple(self._granted() for _ in range(self._random.choice([0, 1, 3, 5, 7])))
        return {"rules": Rules(granted, self._downloads(0.2))}

    def _change_person(self) -> dict[str, Any]:
        roles = frozenset(self._random.choice([["r"], ["r"], ["r", "s"], ["s"], []]))
        return {"person": Person(self._name(), roles, self._random.choice(["a", "b", None]))}

    def _reopen(self) -> dict[str, Any]:
        return {"name": self._name(), "wishes": self._downloads(0.3)}

    def _synchronize(self) -> dict[str, Any]:
        random = self._random
        return {
            "name": self._name(),
            "mode": random.choice(["all", "all", "all", "unsynchronized", "selected"]),
            "keys": random.sample(KEYS, 3),
            "limits": {
                "PAGE_OBJECTS_MAX": random.choice([1, 2, 3, 100]),
                "STAGE_BYTES": random.choice([1, 100, 10_000]),
                "PUBLISH_OBJECTS_MAX": random.choice([0, 3, 1_000]),
                "PUBLISH_STEP_PAGES": random.choice([1, 20]),
            },
            "meanwhile": [self._steps() for _ in range(random.choice([0, 0, 0, 1, 3]))],
            "cut_after": random.choice([None, None, None, None, 0, 1, 2, 3, 5]),
        }

    def _name(self) -> str:
        return self._random.choice(PEOPLE)

    def _steps(self) -> list[Step]:
        random = self._random
        steps = []
        for _ in range(random.choice([1, 1, 2, 4])):
            kind = random.choice([OperationKind.CREATE] * 3 + [OperationKind.UPDATE] * 5 + [OperationKind.DELETE])
            key = random.choice([*KEYS[:4], *KEYS])
            patch = Patch() if kind is OperationKind.DELETE else self._patch(key[0], kind)
            steps.append(Step(kind, key, patch))
        return steps

    def _patch(self, entity: str, kind: OperationKind) -> Patch:
        random = self._random
        values: Attributes = {
            "who": random.choice("abc"),
            "kind": random.choice("xy"),
            "n": random.randrange(4),
            "note": f"note-{next(self._notes)}-",
        }
        if entity != "Task":
            values["task"] = f"task-{random.choice('abcd')}"
        written = {name: value for name, value in values.items() if random.random() < 0.5}
        if kind is OperationKind.CREATE:
            return Patch(written)
        left = [name for name in ("kind", "task") if name in values and name not in written]
        unset = tuple(name for name in left if random.random() < 0.1)
        increment = {"n": 1} if "n" not in written and random.random() < 0.4 else {}
        return Patch(written or {"note": values["note"]}, unset, increment)

    def _granted(self) -> Granted:
        random = self._random
        return Granted(
            random.choice(["r", "r", "*", "s"]),
            random.choice(["Task", "Task", "*", *ENTITIES]),
            random.random() < 0.6,
            random.random() < 0.6,
            random.choice([None, None, None, frozenset({"who"}), frozenset({"who", "note", "n"}), frozenset()]),
            random.choice(
                [None, None, frozenset({"n", "note"}), frozenset({"who", "kind", "n", "note"}), frozenset()]
            ),
            random.choice([None, self._constraint()]),
            random.choice([None, None, self._constraint()]),
        )

    def _downloads(self, share: float) -> dict[str, Download]:
        return {entity: self._download() for entity in ENTITIES if self._random.random() < share}

    def _download(self) -> Download:
        mode = self._random.choice([*DownloadMode, DownloadMode.WHERE, DownloadMode.WHERE])
        return Download(mode, self._constraint() if mode is DownloadMode.WHERE else None)

    def _constraint(self) -> Constraint:
        simple = [
            attribute("who") == "a",
            attribute("who") == claim("me"),
            attribute("who").is_in(["a", "b"]),
            attribute("kind") == "x",
            attribute("n") >= 1,
        ]
        one, other = self._random.choices(simple, k=2)
        return self._random.choice([one, one, one & other, one | ~other])


def error_of(actions: Sequence[Action]) -> Exception | None:
    """Return what goes wrong if all this happens, or None."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="tidelog-rules-", dir=memory if memory.is_dir() else None))
    world = World(directory)
    try:
        for kind, arguments in actions:
            getattr(world, kind)(**arguments)
    except Exception as error:  # noqa: BLE001 - any will do
        return error
    finally:
        world.close()
        shutil.rmtree(directory)
    return None


def shrunk(actions: Sequence[Action]) -> list[Action]:
    """Return as few of the actions as still go wrong."""
    actions = list(actions)
    size = len(actions) // 2
    while size:
        first = 0
        while first < len(actions):
            fewer = actions[:first] + actions[first + size :]
            if error_of(fewer) is None:
                first += size
            else:
                actions = fewer
        size //= 2
    return actions


@pytest.mark.parametrize("seed", range(SEEDS))
def test_rules(seed: int) -> None:
    """Whoever may do and see what, replicas show what the rules say, and are told of nothing else."""
    actions = Draw(seed).actions(ACTIONS)
    if error_of(actions) is not None:
        few = shrunk(actions)
        raise AssertionError("\n".join(["the fewest actions that go wrong:", *map(repr, few)])) from error_of(few)
